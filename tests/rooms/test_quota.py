"""API keys: never above their rate, and who is out, why, and until when."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.cases import each
from kit.clock import FakeClock
from kit.ledger import NoLedger

from stockrt import (
    LONGEST_WAIT_FOR_KEY_S,
    MIDNIGHT_MARGIN_S,
    PLANS,
    WINDOW_MARGIN_S,
    ApiKey,
    Interrupted,
    KeyPool,
    NoKeyError,
    Plan,
    SlidingWindow,
    load_settings,
)

NOON = datetime(2026, 8, 14, 12, tzinfo=UTC)
KEY = "aaa-first-key-111"
OTHER = "bbb-other-key-222"
UNLIMITED = Plan("0", 0, 0)


class Clock(FakeClock):
    """A clock that stands until it is moved; who looks too often waits for ever."""

    def __init__(self, start: datetime = NOON) -> None:
        super().__init__(start.timestamp())
        self.looks_at = self.now_monotonic
        self.looks_left = 30

    def monotonic(self) -> float:
        """Return the time."""
        if self.now_monotonic != self.looks_at:
            self.looks_at, self.looks_left = self.now_monotonic, 30
        self.looks_left -= 1
        assert self.looks_left >= 0
        return self.now_monotonic


def go() -> threading.Event:
    """Return a stop that is not set."""
    return threading.Event()


def pool_of(keys: Sequence[str], plan: Plan = UNLIMITED, start: datetime = NOON) -> tuple[KeyPool, Clock]:
    """Return a pool and the clock that it goes by; it is `start` at first."""
    clock = Clock(start)
    return KeyPool([(key, plan) for key in keys], NoLedger(), clock), clock


def back_at(start: datetime, seconds: float) -> str:
    """Return how a refusal says when a key returns."""
    moment = datetime.fromtimestamp(round(start.timestamp() + seconds), UTC)
    return f"back at {moment:%Y-%m-%dT%H:%M:%S}.000Z"


def assert_interrupted(pool: KeyPool, clock: Clock) -> None:
    """Check that a stopped run gets no key and does not wait for one either."""
    stop = go()
    stop.set()
    clock.looks_left = 2
    with pytest.raises(Interrupted):
        pool.acquire("stock", stop)


def refusal(pool: KeyPool, product: str = "stock") -> str:
    """Return the words with which no key is given."""
    with pytest.raises(NoKeyError) as caught:
        pool.acquire(product, go())
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------
# Windows
# ------------------------------------------------------------------------------------------------------


@each(
    ("plan", "windows"),
    [
        ("free", ((1, 1), (60, 60))),
        ("basic", ((2, 1), (120, 60))),
        ("premium", ((10, 1), (600, 60))),
        ("pro", ((20, 1), (1200, 60))),
        ("0", ()),
        ("5", ((5, 1), (300, 60))),
        ("2.5", ((2, 0.8), (150, 60))),
        ("0.2", ((1, 5), (12, 60))),
        ("0.02", ((1, 50), (1, 60))),
        ("4.1", ((4, 4 / 4.1), (246, 60))),
    ],
)
def test_a_plan_is_kept_by_these_windows(plan: str, windows: tuple[tuple[int, float], ...]) -> None:
    """Requests and seconds; the price list's for a named plan, the number's for a custom one."""
    loaded = load_settings({"INFOWAY_PLAN": plan}, None, (), is_root=False).settings.plans[0]
    assert loaded.windows() == windows


@given(st.floats(1 / 60, 10_000))
def test_the_windows_of_any_rate_allow_that_rate_and_no_more(rate: float) -> None:
    """Over its length no window lets more through than the rate."""
    plan = load_settings({"INFOWAY_PLAN": repr(rate)}, None, (), is_root=False).settings.plans[0]
    assert plan.windows()
    for limit, seconds in plan.windows():
        assert limit >= 1
        assert limit / seconds <= rate * (1 + 1e-9)
    assert plan.windows()[0][0] / plan.windows()[0][1] == pytest.approx(rate)


def run_through(window: SlidingWindow | ApiKey, wishes: Sequence[float], take: SlidingWindow) -> list[float]:
    """Make a request as early as allowed after each wish (seconds after the one before); return when."""
    now, times = 0.0, []
    for wish in wishes:
        now = window.ready_at(now + wish)
        take.take(now)
        times.append(now)
    return times


@given(
    st.integers(1, 20),
    st.floats(0.1, 60),
    st.lists(st.floats(0, 2) | st.just(0.0) | st.floats(0, 200), max_size=80),
)
def test_no_window_ever_holds_more_than_its_limit(limit: int, seconds: float, wishes: list[float]) -> None:
    """Wherever a span of `seconds` is laid over the requests, and none waits longer than it must."""
    window = SlidingWindow(limit, seconds)
    times = run_through(window, wishes, window)
    now = 0.0
    for number, (at, wish) in enumerate(zip(times, wishes, strict=True)):
        now += wish
        earliest = now
        if number >= limit:
            assert at - times[number - limit] > seconds
            earliest = max(now, times[number - limit] + seconds + WINDOW_MARGIN_S)
        assert at == pytest.approx(earliest)
        now = at


def test_a_window_gives_no_time_in_the_past() -> None:
    """The caller may wait for the difference."""
    window = SlidingWindow(1, 1)
    assert window.ready_at(5.0) == 5.0
    window.take(5.0)
    assert window.ready_at(5.5) > 6.0
    assert window.ready_at(60.0) == 60.0


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from([*PLANS.values(), Plan("2.5", 2.5, 150), Plan("0.2", 0.2, 12), Plan("3", 3, 30)]),
    st.lists(st.sampled_from([0.0, 0.0, 0.0, 0.1, 1.0, 30.0]), max_size=300),
)
def test_a_key_keeps_all_windows_of_its_plan_together(plan: Plan, wishes: list[float]) -> None:
    """Second and minute at once."""
    pool, clock = pool_of([KEY], plan)
    times = []
    for wish in wishes:
        clock.advance(pool.keys[0].ready_at(clock.now_monotonic + wish) - clock.now_monotonic)
        assert pool.acquire("stock", go()).secret == KEY
        times.append(clock.now_monotonic)
    for limit, seconds in plan.windows():
        assert all(late - early > seconds for early, late in zip(times, times[limit:], strict=False))


@each("plan", PLANS.values())
def test_a_busy_key_is_used_within_five_percent_of_its_rate(plan: Plan) -> None:
    """The margin between two windows costs little."""
    pool, clock = pool_of([KEY], plan)
    start, count = clock.now_monotonic, int(plan.per_second * 100)
    for _ in range(count):
        clock.advance(pool.keys[0].ready_at(clock.now_monotonic) - clock.now_monotonic)
        pool.acquire("stock", go())
    assert clock.now_monotonic - start <= count / plan.per_second * 1.05


# ------------------------------------------------------------------------------------------------------
# The pool
# ------------------------------------------------------------------------------------------------------


def test_no_key_at_all_names_the_setting() -> None:
    """The operator knows what to do."""
    assert "INFOWAY_API_KEY" in refusal(pool_of([])[0])


def test_a_key_within_its_rate_is_given_at_once() -> None:
    """And counted: the next one has to wait."""
    pool, clock = pool_of([KEY], PLANS["free"])
    assert pool.acquire("stock", go()).secret == KEY
    assert pool.keys[0].ready_at(clock.now_monotonic) > clock.now_monotonic + 1


def test_without_a_limit_nothing_waits() -> None:
    """Plan 0."""
    pool, _ = pool_of([KEY], UNLIMITED)
    assert {pool.acquire("stock", go()).secret for _ in range(25)} == {KEY}
    assert pool.rate() == float("inf")


def test_several_keys_add_their_rates() -> None:
    """Each is used to its limit before any request waits."""
    pool, clock = pool_of([KEY, OTHER], PLANS["basic"])
    assert pool.rate() == 4
    given = [pool.acquire("stock", go()).secret for _ in range(4)]
    assert sorted(given) == [KEY, KEY, OTHER, OTHER]
    assert all(key.ready_at(clock.now_monotonic) > clock.now_monotonic for key in pool.keys)


def test_a_dead_key_is_never_used_again_and_its_rate_is_gone() -> None:
    """The others go on."""
    pool, clock = pool_of([KEY, OTHER], PLANS["premium"])
    pool.retire(pool.keys[0], "Token invalid")
    assert pool.rate() == 10
    assert {pool.acquire("stock", go()).secret for _ in range(10)} == {OTHER}
    clock.advance(1e9)
    assert {pool.acquire("crypto", go()).secret for _ in range(10)} == {OTHER}


def test_when_every_key_is_dead_each_is_named_with_its_reason() -> None:
    """Masked, and at once: there is nothing to wait for."""
    pool, _ = pool_of([KEY, OTHER])
    pool.retire(pool.keys[0], "Token invalid")
    pool.retire(pool.keys[1], "plan expired")
    words = refusal(pool)
    assert "aaa…111: Token invalid" in words
    assert "bbb…222: plan expired" in words
    assert KEY not in words
    assert OTHER not in words
    assert pool.rate() == 0


def test_the_first_reason_of_a_dead_key_stays() -> None:
    """What came while it died does not cover it."""
    pool, _ = pool_of([KEY])
    for reason in ("Token invalid", "plan expired"):
        pool.retire(pool.keys[0], reason)
    assert "Token invalid" in refusal(pool)


def test_a_product_that_the_key_lacks_closes_that_product_only() -> None:
    """Another key may serve it."""
    pool, _ = pool_of([KEY, OTHER])
    pool.close_product(pool.keys[0], "japan", "not in the plan")
    assert {pool.acquire("japan", go()).secret for _ in range(5)} == {OTHER}
    pool.close_product(pool.keys[1], "japan", "not in the plan")
    assert "japan" in refusal(pool, "japan")
    assert "not in the plan" in refusal(pool, "japan")
    assert pool.acquire("stock", go()).secret == KEY


@each(
    ("now_utc", "seconds"),
    [
        (datetime(2026, 8, 14, 23, 0, tzinfo=UTC), 3600),
        (datetime(2026, 8, 14, 0, 0, tzinfo=UTC), 86400),
        (datetime(2026, 12, 31, 22, 58, 20, tzinfo=UTC), 3700),
        (datetime(2028, 2, 28, 12, 0, 0, 500_000, tzinfo=UTC), 43199.5),
    ],
)
def test_a_key_whose_day_is_over_rests_until_midnight_utc(now_utc: datetime, seconds: float) -> None:
    """No request waits for that; the refusal says how long it is, and afterwards the key is back."""
    pool, clock = pool_of([KEY], start=now_utc)
    pool.rest_until_midnight(pool.keys[0], "day upper limit")
    words = refusal(pool)
    assert "day upper limit" in words
    assert back_at(now_utc, seconds + MIDNIGHT_MARGIN_S) in words
    clock.advance(seconds + MIDNIGHT_MARGIN_S - 0.01)
    assert_interrupted(pool, clock)
    clock.advance(0.02)
    assert pool.acquire("stock", go()).secret == KEY


def test_another_key_takes_over_when_one_rests() -> None:
    """A day's quota is each key's own."""
    pool, _ = pool_of([KEY, OTHER])
    pool.rest_until_midnight(pool.keys[0], "day upper limit")
    assert {pool.acquire("stock", go()).secret for _ in range(5)} == {OTHER}


def test_a_key_that_was_refused_for_its_rate_rests_as_long_as_told() -> None:
    """Then it is used again."""
    pool, clock = pool_of([KEY])
    pool.slow_down(pool.keys[0], 7, "too fast")
    assert pool.keys[0].ready_at(clock.now_monotonic) == clock.now_monotonic + 7
    clock.advance(7)
    assert pool.acquire("stock", go()).secret == KEY


def test_a_shorter_rest_neither_shortens_nor_renames_a_longer_one() -> None:
    """Requests that were under way meanwhile may be refused for another reason."""
    pool, _ = pool_of([KEY])
    pool.rest_until_midnight(pool.keys[0], "day upper limit")
    pool.slow_down(pool.keys[0], 1, "too fast")
    words = refusal(pool)
    assert back_at(NOON, 43200 + MIDNIGHT_MARGIN_S) in words
    assert "day upper limit" in words


def test_a_key_that_was_refused_on_the_way_is_tried_again_later_each_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """After a minute, two, four, up to an hour; once it is taken all begins anew. Each time is said once."""
    pool, clock = pool_of([KEY])
    key = pool.keys[0]
    for rest in (61, 122, 244, 488, 976, 1952, 3600, 3600):
        for _ in range(3):  # several were under way
            pool.doubt(key, "HTTP 401")
        assert back_at(NOON, clock.now_wall - NOON.timestamp() + rest) in refusal(pool)
        clock.advance(rest + 0.001)
        assert pool.acquire("stock", go()) is key
    assert len(caplog.records) == 1
    pool.trust(key)
    pool.doubt(key, "HTTP 401")
    assert back_at(NOON, clock.now_wall - NOON.timestamp() + 61) in refusal(pool)
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 2


def test_a_key_that_comes_back_too_late_is_not_waited_for() -> None:
    """Up to the limit it is, beyond it is not."""
    pool, clock = pool_of([KEY])
    pool.slow_down(pool.keys[0], LONGEST_WAIT_FOR_KEY_S + 1, "x")
    assert back_at(NOON, LONGEST_WAIT_FOR_KEY_S + 1) in refusal(pool)
    clock.advance(1)
    assert_interrupted(pool, clock)


def test_a_stopped_run_gets_no_key() -> None:
    """Not even a free one."""
    assert_interrupted(*pool_of([KEY]))


def test_a_stopped_run_waits_for_no_key() -> None:
    """Where one is used up for now."""
    pool, clock = pool_of([KEY], PLANS["free"])
    pool.acquire("stock", go())
    assert_interrupted(pool, clock)


def test_a_stop_ends_the_waiting_for_a_key() -> None:
    """It comes while the key is used up, and is seen at the next look at the clock."""
    stop = go()

    class StoppingClock(Clock):
        def monotonic(self) -> float:
            if self.looks_left == 2:
                stop.set()
            return super().monotonic()

    clock = StoppingClock()
    pool = KeyPool([(KEY, PLANS["free"])], NoLedger(), clock)
    pool.acquire("stock", stop)
    clock.looks_left = 3
    with pytest.raises(Interrupted):
        pool.acquire("stock", stop)
    assert clock.looks_left == 1


def test_a_key_that_dies_wakes_those_who_wait_for_it() -> None:
    """They learn that there is nothing left to wait for."""
    pool, clock = pool_of([KEY], Plan("0.02", 0.02, 1))
    pool.acquire("stock", go())
    words: list[str] = []
    waiting = threading.Thread(target=lambda: words.append(refusal(pool)))
    waiting.start()
    pool.retire(pool.keys[0], "Token invalid")
    waiting.join(40)
    assert "Token invalid" in words[0]
    assert clock.now_monotonic == 1000.0


@each(
    ("secret", "shown"),
    [
        (KEY, "aaa…111"),
        ("123456789012345", "***"),
        ("1234567890123456", "123…456"),
        ("12345678", "***"),
        ("x", "***"),
    ],
)
def test_a_key_is_shown_by_its_ends_only(secret: str, shown: str) -> None:
    """A short one not at all."""
    assert ApiKey(secret, UNLIMITED).shown == shown


@pytest.mark.parametrize("verb", ["retire", "close_product", "rest_until_midnight"])
def test_the_log_says_once_which_key_is_out_and_shows_no_secret(
    verb: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With the reason, masked."""
    pool, _ = pool_of([KEY])
    more = ["stock"] if verb == "close_product" else []
    for _ in range(2):
        getattr(pool, verb)(pool.keys[0], *more, "the reason")
    (record,) = caplog.records
    assert "aaa…111" in record.getMessage()
    assert "the reason" in record.getMessage()
    assert KEY not in record.getMessage()
