"""API keys: their rates add up, answers steer them, and several instances share what one key may do."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pymongo
import pytest
from conftest import controlled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kit.chinese import in_chinese
from kit.clock import FakeClock
from kit.daemons import check_paced
from kit.daemons import number as examples
from kit.infoway_server import REFUSALS, InfowayServer, Request
from kit.infoway_server import Answer as ServerAnswer
from kit.ledger import NoLedger
from kit.mongo import MongoServer, fresh_database

import stockrt
from stockrt import (
    DAY_LEASE_S,
    LEDGER_RETRY_S,
    PLANS,
    SLICE_S,
    SLOW_FOR_S,
    ApiKey,
    Collector,
    FailureKind,
    InfowayApi,
    Keeper,
    KeyPool,
    Ledger,
    LocalLedger,
    NoKeyError,
    Plan,
    Report,
    SharedLedger,
    SqliteStore,
    key_digest,
    load_settings,
    next_midnight,
    open_store_file,
    utc_day,
)

FIRST, OTHER = "aaa-first-key-111", "bbb-other-key-222"
FREE = PLANS["free"]
UNLIMITED = Plan("0", 0, 0, 0)
NOON = datetime(2026, 8, 14, 12, tzinfo=UTC).timestamp()
REVOKED, DAY_OVER = REFUSALS["401_token_invalid"], REFUSALS["ret_502"]


class NoonForEver(stockrt.Clock):
    """The machine's own monotonic time on a day that does not end."""

    def wall(self) -> float:
        """Return epoch seconds."""
        return NOON


def pool_of(
    keys: Mapping[str, Plan], ledger: Ledger | None = None, clock: FakeClock | None = None
) -> tuple[KeyPool, FakeClock]:
    """Return a pool and the clocks that it goes by."""
    clock = clock or FakeClock(NOON)
    return KeyPool(list(keys.items()), ledger or NoLedger(), clock), clock


def try_key(pool: KeyPool, product: str = "stock") -> str:
    """Return the key that may be used now, '' when one has to wait."""
    got = pool.try_acquire(product)
    return got.secret if isinstance(got, ApiKey) else ""


def take(pool: KeyPool, clock: FakeClock, seconds: float) -> list[tuple[float, str]]:
    """Use keys as fast as they are given for some time; return when (epoch seconds) and which."""
    taken: list[tuple[float, str]] = []
    end = clock.now_wall + seconds
    while clock.now_wall < end:
        got = pool.try_acquire("stock")
        if isinstance(got, ApiKey):
            taken.append((clock.now_wall, got.secret))
        else:
            clock.advance(min(got + 0.001, max(0.001, end - clock.now_wall)))
    return taken


def refusal(pool: KeyPool, product: str = "stock") -> str:
    """Return the words with which no key is given."""
    with pytest.raises(NoKeyError) as caught:
        pool.try_acquire(product)
    return caught.value.message


def most_in_any(seconds: float, times: Sequence[float]) -> int:
    """Return the greatest number of times in any span of so many seconds."""
    times = sorted(times)
    return max((sum(t < start + seconds for t in times[n:]) for n, start in enumerate(times)), default=0)


# ------------------------------------------------------------------------------------------------------
# A pool
# ------------------------------------------------------------------------------------------------------


def test_each_key_keeps_its_own_windows_and_their_rates_add_up() -> None:
    """One free, one basic: three a second together, none above its own second and minute."""
    pool, clock = pool_of({FIRST: FREE, OTHER: PLANS["basic"]})
    taken = take(pool, clock, 100)
    assert pool.rate() == 3
    assert len(taken) >= 0.95 * 300
    for key, limit in ((FIRST, 1), (OTHER, 2)):
        times = [at for at, used in taken if used == key]
        assert most_in_any(1, times) == limit
        assert most_in_any(60, times) <= limit * 60


@pytest.mark.parametrize("reason", ["Token invalid", "The plan has expired"])
def test_a_dead_key_is_out_for_good_and_this_is_said_once(
    reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """At error level, shown by its ends; a second answer that was under way changes and says nothing."""
    pool, clock = pool_of({FIRST: UNLIMITED, OTHER: UNLIMITED})
    for words in (reason, "something else"):
        pool.retire(pool.keys[0], words)
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert f"aaa…111 is out: {reason}; mend INFOWAY_API_KEY, then reload or restart" in record.getMessage()
    assert FIRST not in record.getMessage()
    clock.advance(10 * 86400)
    assert {try_key(pool, product) for product in ("stock", "crypto") for _ in range(5)} == {OTHER}
    pool.retire(pool.keys[1], "Token invalid")
    words = refusal(pool)
    assert f"key aaa…111: {reason}" in words
    assert "key bbb…222: Token invalid" in words
    assert FIRST not in words


def test_a_product_outside_the_plan_closes_that_product_of_that_key() -> None:
    """514: everything else goes on."""
    pool, _ = pool_of({FIRST: UNLIMITED, OTHER: UNLIMITED})
    pool.close_product(pool.keys[0], "japan", "not in the plan")
    assert {try_key(pool, "japan") for _ in range(5)} == {OTHER}
    assert try_key(pool, "stock") == FIRST
    pool.close_product(pool.keys[1], "japan", "not in the plan")
    assert "japan" in refusal(pool, "japan")
    assert "not in the plan" in refusal(pool, "japan")
    assert try_key(pool, "stock") == FIRST


def test_a_key_over_its_day_comes_back_after_midnight_utc() -> None:
    """No batch waits for that: the refusal says when it returns; another key takes over meanwhile."""
    pool, clock = pool_of({FIRST: UNLIMITED, OTHER: UNLIMITED})
    pool.rest_until_midnight(pool.keys[0], "day upper limit")
    assert {try_key(pool) for _ in range(5)} == {OTHER}
    pool.retire(pool.keys[1], "Token invalid")
    words = refusal(pool)
    assert "aaa…111: day upper limit, back at 2026-08-15T00:00:01.000Z" in words
    assert "bbb…222: Token invalid" in words
    clock.advance(12 * 3600 + 0.99)
    assert pool.try_acquire("stock") == pytest.approx(0.01)
    clock.advance(0.02)
    assert try_key(pool) == FIRST


def test_a_key_that_was_too_fast_rests_and_then_goes_at_half_pace_for_a_minute() -> None:
    """501 and 429; after the minute it is as fast as before."""
    plan = Plan("x", 2, 0, 0)
    pool, clock = pool_of({FIRST: plan})
    pool.slow_down(pool.keys[0], 7, "too fast")
    assert pool.try_acquire("stock") == pytest.approx(7)
    slow = [at - NOON for at, _ in take(pool, clock, SLOW_FOR_S)]
    assert slow[0] >= 7
    assert len(slow) == pytest.approx((SLOW_FOR_S - 7) * 1, rel=0.06)
    clock.advance(5)
    assert len(take(pool, clock, 60)) == pytest.approx(120, rel=0.06)


def test_a_shorter_rest_neither_shortens_nor_renames_a_longer_one(caplog: pytest.LogCaptureFixture) -> None:
    """Requests that were under way meanwhile may be refused for another reason, or the same: said once."""
    pool, _ = pool_of({FIRST: UNLIMITED})
    pool.rest_until_midnight(pool.keys[0], "day upper limit")
    pool.rest_until_midnight(pool.keys[0], "day upper limit")
    pool.slow_down(pool.keys[0], 1, "too fast")
    assert "day upper limit, back at 2026-08-15" in refusal(pool)
    assert len(caplog.records) == 1


def test_a_key_is_described_without_a_look_at_any_count() -> None:
    """The daemon's status: the state, the reason, and until when."""
    pool, _ = pool_of({FIRST: UNLIMITED, OTHER: UNLIMITED, "ccc-third-key-333": UNLIMITED})
    pool.retire(pool.keys[0], "Token invalid")
    pool.rest_until_midnight(pool.keys[1], "day upper limit")
    pool.close_product(pool.keys[2], "japan", "not in the plan")
    states = pool.describe()
    assert [state["digest"] for state in states] == [key.digest for key in pool.keys]
    assert [(state["state"], state["why"]) for state in states] == [
        ("out", "Token invalid"), ("resting", "day upper limit"), ("ready", "")]  # fmt: skip
    assert [state["until"] for state in states] == ["", "2026-08-15T00:00:01.000Z", ""]
    assert states[2]["not_for"] == ["japan"]


def test_why_no_key_serves_can_be_read_in_chinese() -> None:
    pool, _ = pool_of({FIRST: UNLIMITED, OTHER: UNLIMITED, "ccc-third-key-333": UNLIMITED})
    answer = stockrt.Response(200, b'{"ret":514,"msg":"No permission"}')
    for key in pool.keys[:2]:
        stockrt.steer(pool, key, "stock", stockrt.decide(answer, datetime.now(UTC)))
    pool.rest_until_midnight(pool.keys[2], stockrt.day_used_up(FREE))
    assert in_chinese(refusal(pool, "stock bars"), "No permission") == (
        "没有 API 密钥可用于 stock 日线：密钥 aaa…111：API 返回 514：No permission；"
        "密钥 bbb…222：API 返回 514：No permission；"
        "密钥 ccc…333：当日 86400 次请求的额度已用完，2026-08-15T00:00:01.000Z 恢复；请检查 INFOWAY_API_KEY"
    )
    assert in_chinese(refusal(KeyPool([], NoLedger()))) == "没有 API 密钥：请设置 INFOWAY_API_KEY"


def test_why_a_key_rests_can_be_read_in_chinese_out_of_a_file() -> None:
    """As the daemon's status file, which --status reads, whoever speaks which language."""
    pool, _ = pool_of({FIRST: UNLIMITED})
    pool.rest_until_midnight(pool.keys[0], stockrt.day_used_up(FREE))
    (state,) = stockrt.unpacked(json.loads(json.dumps(stockrt.packed(pool.describe()))))
    assert state["why"] == "the day's 86400 requests are used up"
    assert in_chinese(state["why"]) == "当日 86400 次请求的额度已用完"


def test_plans_are_one_for_all_or_one_a_key() -> None:
    """Another number of them is a fault of the settings."""

    def plans(text: str) -> list[str]:
        environ = {"INFOWAY_API_KEY": f"{FIRST},{OTHER}", "INFOWAY_PLAN": text}
        loaded = load_settings(environ, None, (), is_root=False).settings
        return [plan.name for _, plan in loaded.key_plans()]

    assert plans("pro") == ["pro", "pro"]
    assert plans("free,premium") == ["free", "premium"]
    with pytest.raises(stockrt.SettingsError, match="INFOWAY_PLAN"):
        plans("free,premium,pro")


class SlowLedger(NoLedger):
    """A ledger of which every other answer takes seconds."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.asked = 0

    def lease(self, digest: str, plan: Plan, now: float, made: Sequence[float] = ()) -> stockrt.Lease:
        """Grant one request, sometimes late."""
        self.asked += 1
        self.clock.advance(3 * (self.asked % 2))
        return stockrt.Lease(1, now + 100)


def test_a_ledger_that_takes_its_time_brings_no_two_requests_too_close() -> None:
    """The request is counted when it is made, not when its count was asked for."""
    clock = FakeClock(NOON)
    pool, _ = pool_of({FIRST: Plan("x", 0.5, 0, 0)}, SlowLedger(clock), clock)
    times = [at for at, _ in take(pool, clock, 60)]
    assert len(times) > 10
    assert most_in_any(2, times) == 1


# ------------------------------------------------------------------------------------------------------
# Against a server
# ------------------------------------------------------------------------------------------------------


def run(server: InfowayServer, pool: KeyPool, codes: Sequence[str], folder: Path) -> tuple[Report, float]:
    """Fetch and store codes; return the report and the seconds from the first to the last request."""
    api = InfowayApi(server.url, pool)
    with open_store_file(folder) as file:
        report = Collector(api, SqliteStore(file), Keeper()).run(codes, threading.Event())
    api.close()
    arrivals = [request.at for request in server.requests]
    return report, max(arrivals) - min(arrivals)


def us_codes(count: int) -> list[str]:
    """Return that many codes."""
    return [f"A{number}.US" for number in range(count)]


def test_ten_keys_of_one_a_second_fetch_5000_codes_at_ten_a_second(tmp_path: Path) -> None:
    """Within 10 %, nothing lost, and no key over its limit by the server's own count."""
    keys = [f"key-number-{number:04d}" for number in range(10)]

    def measure(folder: Path) -> tuple[int, float]:
        with InfowayServer(keys=frozenset(keys), per_second=1, per_minute=60) as server:
            facts = LocalLedger(open_store_file(folder))
            pool = KeyPool([(key, FREE) for key in keys], facts)
            report, seconds = run(server, pool, us_codes(5000), folder)
            facts._file.close()
        assert report.complete, report
        assert report.stored == 5000
        assert server.request_count == 50 + server.over_limit
        used = Counter(request.key for request in server.requests if not request.over_limit)
        assert sum(used.values()) == 50 and min(used[key] for key in keys) >= 4
        return server.over_limit, seconds

    check_paced(measure, tmp_path, (50 - 10) / 10 * 1.1)


def test_one_key_revoked_and_one_over_its_day_in_the_middle_lose_nothing(tmp_path: Path) -> None:
    """No further request on the revoked one; the other is asked again only after midnight UTC."""
    third = "ccc-third-key-333"
    keys = {FIRST: Plan("x", 20, 0, 0), OTHER: Plan("x", 20, 0, 0), third: Plan("x", 20, 0, 0)}
    seen: Counter[str] = Counter()

    def script(request: Request) -> ServerAnswer | None:
        seen[request.key] += 1
        if seen[request.key] <= 3:
            return None
        return {FIRST: REVOKED, OTHER: DAY_OVER}.get(request.key)

    with InfowayServer(keys=frozenset(keys), script=script) as server:
        pool = KeyPool(list(keys.items()), NoLedger(), NoonForEver())
        report, _ = run(server, pool, us_codes(3000), tmp_path)
        assert report.complete, report
        assert report.stored == 3000
        used = Counter(request.key for request in server.requests)
        # each connection may have taken the key before the refusal came
        assert 4 <= used[FIRST] <= 3 + server.connections
        assert 4 <= used[OTHER] <= 3 + server.connections
        run(server, pool, us_codes(2000), tmp_path)
        again = Counter(request.key for request in server.requests)
        assert again == {**used, third: used[third] + 20}
        rests = pool.keys[1].paused_until - time.monotonic()
        assert NOON + rests == pytest.approx(next_midnight(NOON), abs=600)


def test_after_midnight_the_key_over_its_day_is_asked_again_and_the_revoked_one_is_not(
    tmp_path: Path,
) -> None:
    """Three runs of one pool on an injected clock: in the evening, a second before midnight, after it."""
    with InfowayServer(keys=frozenset({FIRST, OTHER})) as server:
        server.script = lambda request: {FIRST: REVOKED, OTHER: DAY_OVER}[request.key]
        pool, clock = pool_of({FIRST: UNLIMITED, OTHER: UNLIMITED})
        report, _ = run(server, pool, us_codes(100), tmp_path)
        assert server.request_count == 2
        ((kind, reason),) = set(report.failures.values())
        assert kind is FailureKind.KEY
        assert "key aaa…111: HTTP 401: Token invalid" in reason
        assert "back at 2026-08-15T00:00:01.000Z" in reason
        clock.advance(12 * 3600 - 61)
        run(server, pool, us_codes(100), tmp_path)
        assert server.request_count == 2
        clock.advance(62)
        server.script = ()
        report, _ = run(server, pool, us_codes(100), tmp_path)
        assert report.complete
        assert Counter(request.key for request in server.requests) == {FIRST: 1, OTHER: 2}


def test_a_key_without_a_product_leaves_it_to_the_others(tmp_path: Path) -> None:
    """One request tells; the product goes on with the other key, the other products with both."""
    refused = REFUSALS["ret_514"]
    with InfowayServer(keys=frozenset({FIRST, OTHER}), latency=0.02) as server:
        server.script = lambda r: refused if (r.key, r.product) == (FIRST, "crypto") else None
        pool = KeyPool([(FIRST, Plan("x", 100, 0, 0)), (OTHER, Plan("x", 100, 0, 0))], NoLedger())
        codes = [f"C{number}USDT" for number in range(1000)] + us_codes(1000)
        report, _ = run(server, pool, codes, tmp_path)
    assert report.complete, report
    crypto = Counter(request.key for request in server.requests if request.product == "crypto")
    assert 1 <= crypto[FIRST] <= server.connections
    assert crypto[OTHER] == 10


@pytest.mark.parametrize("name", ["429_html", "200_rate_limit", "ret_501"])
def test_a_refusal_for_the_rate_lets_the_key_rest_and_loses_nothing(name: str, tmp_path: Path) -> None:
    """The others go on meanwhile."""
    with InfowayServer(keys=frozenset({FIRST, OTHER}), script=[REFUSALS[name]]) as server:
        pool = KeyPool([(FIRST, Plan("x", 50, 0, 0)), (OTHER, Plan("x", 50, 0, 0))], NoLedger())
        began = time.monotonic()
        report, _ = run(server, pool, us_codes(1000), tmp_path)
    assert report.complete, report
    assert server.request_count == 11
    assert max(key.slow_until for key in pool.keys) > began + SLOW_FOR_S


# ------------------------------------------------------------------------------------------------------
# The day's count on one machine
# ------------------------------------------------------------------------------------------------------

SMALL_DAY = Plan("x", 2, 0, 25)


def test_the_day_count_survives_a_restart(tmp_path: Path) -> None:
    """Also one without a farewell, which costs no more than a lease; what is not used is given back."""
    clock = FakeClock(NOON)
    for used in (7, 5):
        facts = LocalLedger(open_store_file(tmp_path))
        pool, _ = pool_of({FIRST: SMALL_DAY}, facts, clock)
        for _ in range(used):
            take_one(pool, clock)
        pool.close()
        facts._file.close()
    facts = LocalLedger(open_store_file(tmp_path))
    digest = key_digest(FIRST)
    assert facts.used_today(digest, clock.now_wall) == 12
    pool, _ = pool_of({FIRST: SMALL_DAY}, facts, clock)
    take_one(pool, clock)  # kill -9 after that: the rest of the lease is gone
    facts._file.close()
    facts = LocalLedger(open_store_file(tmp_path))
    assert 0 < (facts.used_today(digest, clock.now_wall) or 0) <= 12 + int(2 * DAY_LEASE_S)
    assert facts.used_today(digest, clock.now_wall + 86400) == 0
    facts._file.close()


def take_one(pool: KeyPool, clock: FakeClock) -> None:
    """Use a key as soon as there is one."""
    while not isinstance(got := pool.try_acquire("stock"), ApiKey):
        clock.advance(got + 0.001)


def test_no_more_than_a_day_allows_and_again_after_midnight(tmp_path: Path) -> None:
    """The key rests till midnight UTC without being refused by the API, and says so."""
    facts = LocalLedger(open_store_file(tmp_path))
    pool, clock = pool_of({FIRST: SMALL_DAY}, facts)
    for _ in range(25):
        take_one(pool, clock)
    clock.advance(10)
    assert "the day's 25 requests are used up, back at 2026-08-15T00:00:00.000Z" in refusal(pool)
    other, _ = pool_of({FIRST: SMALL_DAY}, facts, clock)
    assert "used up" in refusal(other)
    clock.advance(next_midnight(clock.now_wall) - clock.now_wall + 1)
    assert try_key(pool) == FIRST
    facts._file.close()


def test_processes_on_one_machine_share_the_day(tmp_path: Path) -> None:
    """Four at a time on one file: together exactly the day's count is granted."""
    plan, digest = Plan("x", 3, 0, 200), key_digest(FIRST)
    granted: list[int] = []

    def work() -> None:
        facts = LocalLedger(open_store_file(tmp_path))
        while count := facts.lease(digest, plan, NOON).requests:
            granted.append(count)
        facts._file.close()

    open_store_file(tmp_path).close()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sum(granted) == 200


def test_a_local_file_that_fails_stops_no_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The count is not kept, which is said."""
    facts = LocalLedger(open_store_file(tmp_path))
    with facts._file.write() as db:
        db.execute("DROP TABLE key_usage")
    pool, _ = pool_of({FIRST: FREE}, facts)
    assert try_key(pool) == FIRST
    pool.close()
    assert facts.used_today(key_digest(FIRST), NOON) is None
    assert "the counts of a key are not kept" in caplog.text
    facts._file.close()


def test_the_file_holds_no_key(tmp_path: Path) -> None:
    """Only digests, wherever one looks."""
    facts = LocalLedger(open_store_file(tmp_path))
    pool, clock = pool_of({FIRST: FREE, OTHER: FREE}, facts)
    take(pool, clock, 5)
    facts._file.close()
    files = [path.read_bytes() for path in tmp_path.iterdir()]
    assert any(key_digest(FIRST).encode() in content for content in files)
    assert not any(key.encode() in content for key in (FIRST, OTHER) for content in files)
    with sqlite3.connect(tmp_path / stockrt.SQLITE_NAME) as db:
        days = db.execute("SELECT DISTINCT day FROM key_usage").fetchall()
    assert days == [(utc_day(NOON),)]


# ------------------------------------------------------------------------------------------------------
# Counts in MongoDB
# ------------------------------------------------------------------------------------------------------

Place = tuple[str, str]
Client = pymongo.MongoClient[dict[str, object]]


class Instance:
    """One instance of the program as far as keys go: its own client, local file and pool."""

    def __init__(self, place: Place, folder: Path, keys: Mapping[str, Plan], clock: FakeClock) -> None:
        uri, name = place
        self.client: Client = pymongo.MongoClient(uri, serverSelectionTimeoutMS=300, connectTimeoutMS=300)
        self.facts = LocalLedger(open_store_file(folder))
        self.ledger = SharedLedger(self.client[name]["license_usage"], self.facts, clock)
        self.pool, self.clock = pool_of(keys, self.ledger, clock)

    def close(self) -> None:
        """Let go of it."""
        self.client.close()
        self.facts._file.close()


Start = Callable[..., Instance]


@pytest.fixture
def start(mongo_db: Place, tmp_path: Path) -> Iterator[Start]:
    """Start instances that share keys."""
    started: list[Instance] = []

    def begin(keys: Mapping[str, Plan], clock: FakeClock, place: Place = mongo_db) -> Instance:
        started.append(Instance(place, tmp_path / str(len(started)), keys, clock))
        return started[-1]

    yield begin
    for instance in started:
        instance.close()


SHARED = Plan("x", 50, 20, 0)


def test_instances_share_the_minute_whatever_they_do(start: Start) -> None:
    """Three at once on one clock, for three minutes: never above the limit in any 60 s, and little below."""
    clock = FakeClock(NOON)
    instances = [start({FIRST: SHARED}, clock) for _ in range(3)]
    times: list[float] = []
    end = clock.now_wall + 180
    while clock.now_wall < end:
        for instance in instances:
            while isinstance(instance.pool.try_acquire("stock"), ApiKey):
                times.append(clock.now_wall)
        clock.advance(0.3)
    assert most_in_any(60, times) == 20
    assert len(times) >= 3 * 20 * 0.95


def test_the_lease_of_a_killed_instance_blocks_nobody_for_longer_than_a_minute(start: Start) -> None:
    """Until then the others lack no more than its share."""
    clock = FakeClock(NOON)
    plan = Plan("x", 50, 1200, 0)
    killed, other = start({FIRST: plan}, clock), start({FIRST: plan}, clock)
    assert try_key(killed.pool) == FIRST  # a whole share is leased; kill -9 now
    share = int(1200 * SLICE_S / 60 / stockrt.SHARES_PER_SLICE)
    assert len(take(other.pool, clock, 60)) >= 1200 - share - 50
    clock.advance(SLICE_S)
    assert most_in_any(60, [at for at, _ in take(other.pool, clock, 120)]) == 1200


def test_a_request_at_the_end_of_a_slice_may_arrive_in_the_next(start: Start) -> None:
    """It is not held up, and no minute at the API sees more than the limit, whichever slice it arrives in."""
    clock = FakeClock(NOON)
    margin = stockrt.SLICE_MARGIN_S
    clock.advance(SLICE_S - clock.now_wall % SLICE_S - margin / 2)
    instances = [start({FIRST: SHARED}, clock) for _ in range(2)]
    times: list[float] = []
    end = clock.now_wall + 190
    while clock.now_wall < end:
        for instance in instances:
            while isinstance(instance.pool.try_acquire("stock"), ApiKey):
                times.append(clock.now_wall)
        clock.advance(0.04)
    late = [at for at in times if at % SLICE_S >= SLICE_S - margin]
    assert late[:20] == times[:20]
    for delay in (0.0, margin - 0.001):
        arrivals = [at + (delay if at in late else 0.0) for at in times]
        assert most_in_any(60, arrivals) <= 20
    assert len(times) >= 3 * 20


def test_the_day_is_shared_and_the_last_requests_of_it_are_not_lost(start: Start) -> None:
    """Exactly as many as allowed, then a word on when the key returns; the next day begins anew."""
    clock = FakeClock(NOON)
    plan = Plan("x", 2, 0, 25)
    instances = [start({FIRST: plan}, clock) for _ in range(2)]
    used = 0
    for _ in range(40):
        for instance in instances:
            try:
                used += bool(try_key(instance.pool))
            except NoKeyError as error:
                assert "the day's 25 requests are used up, back at 2026-08-15" in str(error)
        clock.advance(1.1)
    for instance in instances:
        instance.pool.close()
    assert used == 25
    assert instances[0].ledger.used_today(key_digest(FIRST), clock.now_wall) == 25
    clock.advance(86400)
    assert instances[0].ledger.used_today(key_digest(FIRST), clock.now_wall) == 0
    assert try_key(instances[0].pool) == FIRST


def test_the_first_requests_of_a_day_may_be_counted_at_the_same_moment(mongo_db: Place) -> None:
    """Who comes second, when both make the day's document, is not told that the day is over."""
    uri, name = mongo_db
    plan = Plan("x", 0.1, 0, 1000)
    with Client(uri) as client:
        ledgers = [SharedLedger(client[name]["license_usage"], NoLedger()) for _ in range(4)]
        for day in range(10):
            barrier = threading.Barrier(len(ledgers))
            granted: list[int] = []

            def work(
                ledger: SharedLedger, now: float, barrier: threading.Barrier, granted: list[int]
            ) -> None:
                barrier.wait(60)
                granted.append(ledger.lease(key_digest(FIRST), plan, now).requests)

            now = NOON + 86400 * day
            threads = [
                threading.Thread(target=work, args=(ledger, now, barrier, granted)) for ledger in ledgers
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            assert granted == [1, 1, 1, 1]
            assert ledgers[0].used_today(key_digest(FIRST), now) == 4


def test_what_is_leased_and_not_used_does_not_count_for_the_day(start: Start) -> None:
    """Neither at the end of a slice nor at the end of the process."""
    clock = FakeClock(NOON)
    instance = start({FIRST: PLANS["pro"]}, clock)
    for _ in range(10):
        assert try_key(instance.pool) == FIRST
        clock.advance(SLICE_S)
    instance.pool.close()
    assert instance.ledger.used_today(key_digest(FIRST), clock.now_wall) == 10


def test_the_database_holds_no_key(start: Start, mongo_db: Place) -> None:
    """One document per digest and window."""
    clock = FakeClock(NOON)
    instance = start({FIRST: FREE, OTHER: FREE}, clock)
    take(instance.pool, clock, 3)
    uri, name = mongo_db
    with Client(uri) as client:
        found = list(client[name]["license_usage"].find())
    names = {f"{key_digest(key)}|{window}" for key in (FIRST, OTHER) for window in (utc_day(NOON), "minute")}
    assert {document["_id"] for document in found} == names
    assert FIRST not in repr(found)
    assert OTHER not in repr(found)


def test_away_from_mongodb_each_counts_alone_says_so_and_comes_back(
    start: Start, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The local windows and the local day still hold; MongoDB is asked again after a while."""
    monkeypatch.setattr(stockrt, "LEDGER_TIMEOUT_S", 0.3)
    clock = FakeClock(NOON)
    place = ("mongodb://127.0.0.1:9/", "nowhere")
    alone = start({FIRST: Plan("x", 2, 120, 1000)}, clock, place)
    taken = [at for at, _ in take(alone.pool, clock, LEDGER_RETRY_S - 1)]
    assert most_in_any(1, taken) == 2
    assert len(taken) > 50
    assert len(caplog.records) == 1
    assert "MongoDB is away (127.0.0.1:9: Connection refused); counting alone" in caplog.text
    used = alone.facts.used_today(key_digest(FIRST), clock.now_wall) or 0
    assert len(taken) <= used <= len(taken) + 2 * DAY_LEASE_S
    due = alone.ledger._away_until
    clock.now_wall -= 3600  # somebody sets the clock back: it is asked again as soon as ever
    take(alone.pool, clock, 2 * LEDGER_RETRY_S)
    assert alone.ledger._away_until >= due + LEDGER_RETRY_S
    assert len(caplog.records) == 1, "said once"


def test_no_right_on_the_counts_is_said_once_and_seldom(
    mongo_server: MongoServer, mongo_db: Place, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """It may stay so for months: which collection, which setting, and again after hours."""
    clock = FakeClock(NOON)
    instance = start({FIRST: FREE}, clock)
    refused = controlled(mongo_server).failing(
        "find", "update", "insert", error_code=13, namespace=f"{mongo_db[1]}.license_usage"
    )
    with refused:
        for _ in range(10):
            take_one(instance.pool, clock)
            clock.advance(LEDGER_RETRY_S)
        (line,) = [record.getMessage() for record in caplog.records]
        assert f"may not write to {mongo_db[1]}.license_usage; see MONGODB_LICENSE_COLLECTION_NAME" in line
        clock.advance(stockrt.SMALL_TROUBLE_AGAIN_S)
        take_one(instance.pool, clock)
        assert len(caplog.records) == 2


@pytest.mark.parametrize(("per_minute", "per_day"), [(0, 1000), (120, 0)])
def test_a_mongodb_that_comes_back_counts_again(
    mongo_server: MongoServer,
    mongo_db: Place,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    per_minute: int,
    per_day: int,
) -> None:
    """Paused in the middle and resumed: alone, then together again, whatever was leased alone."""
    clock = FakeClock(NOON)
    caplog.set_level("INFO", "stockrt")
    server = controlled(mongo_server)
    instance = Instance(mongo_db, tmp_path, {FIRST: Plan("x", 2, per_minute, per_day)}, clock)
    assert try_key(instance.pool) == FIRST
    server.pause()
    clock.advance(86400)  # the lease is over
    assert try_key(instance.pool) == FIRST
    assert "is away" in caplog.text
    server.resume()
    clock.advance(LEDGER_RETRY_S)
    assert try_key(instance.pool) == FIRST
    assert "well again" in caplog.text
    if per_day:
        assert instance.ledger.used_today(key_digest(FIRST), clock.now_wall) == 2 * DAY_LEASE_S
    instance.pool.close()
    instance.close()


WORKER = """
import sys, threading, pathlib
import stockrt
url, mongo, state, keys, seconds, limits = sys.argv[1:]
environ = {"INFOWAY_API_KEY": keys, "INFOWAY_API_BASE_URL": url, "MONGODB_HOST": mongo.split(" ")[0],
           "MONGODB_DB_NAME": mongo.split(" ")[1], "STATE_DIRECTORY": state}
settings = stockrt.load_settings(environ, None, (), is_root=False).settings
ledger = stockrt.Pipeline(settings).keys.ledger
plan = stockrt.Plan("x", *map(int, limits.split(",")))
api = stockrt.InfowayApi(url, stockrt.KeyPool([(key, plan) for key in settings.api_keys], ledger))
stop = threading.Event()
threading.Timer(float(seconds), stop.set).start()
print("ready", flush=True)
sys.stdin.readline()
batches = (stockrt.Batch("stock", f"A{number}.US") for number in range(10**9))
done = sum(bool(outcome and outcome.trades) for outcome in api.fetch(batches, stop))
print(done, flush=True)
"""


def test_three_processes_share_two_keys_and_one_is_killed(mongo_db: Place, tmp_path: Path) -> None:
    """The server counts no key over its minute; the survivors use what the dead one leaves."""
    with InfowayServer(keys=frozenset({FIRST, OTHER}), per_minute=20) as server:
        workers = [worker(server, mongo_db, tmp_path / str(number)) for number in range(3)]
        for process in workers:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        server.wait_for(lambda server: server.request_count >= 6)
        workers[0].kill()
        words = [process.communicate(timeout=60) for process in workers]
        assert [process.returncode for process in workers] == [-9, 0, 0], words
    used = Counter(request.key for request in server.requests)
    assert server.over_limit == 0, words
    assert max(used.values()) <= 20
    assert sum(used.values()) >= 2 * (20 - 1)  # the dead one's share of each key at most is missing
    times = [request.at for request in server.requests]
    assert max(times) - min(times) < 60
    done = [int(out) for out, _ in words[1:]]
    assert sum(done) >= 2 * 20 - 6 - 2 * 1 - 4


def worker(
    server: InfowayServer, place: Place, folder: Path, limits: str = "50,20,0"
) -> subprocess.Popen[str]:
    """Start a process that fetches as much as it can; it waits for a line."""
    path = str(Path(stockrt.__file__).parent)
    arguments = [server.url, " ".join(place), str(folder), f"{FIRST},{OTHER}", "6", limits]
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


# ------------------------------------------------------------------------------------------------------
# The second, with others
# ------------------------------------------------------------------------------------------------------


class PacedLedger(NoLedger):
    """Keeps the pace of keys for all who share `stored`, and takes its time to answer."""

    def __init__(self, name: str, stored: dict[str, object], clock: FakeClock) -> None:
        self.name = name
        self.stored = stored
        self.clock = clock
        self.took_s = 0.0

    def lease(self, digest: str, plan: Plan, now: float, made: Sequence[float] = ()) -> stockrt.Lease:
        """Grant six slots."""
        pace = stockrt.Pace(self.stored, plan, now)
        pace.settle(self.name, made)
        slots, life_s = pace.slots(6, now, self.took_s)
        pace.hold(self.name, slots, life_s)
        self.stored.update(pace.stored())
        self.clock.advance(self.took_s)
        return stockrt.Lease(len(slots), now + 1000, "", tuple(slots), life_s)

    def give_back(
        self, digest: str, plan: Plan, lease: stockrt.Lease, now: float, made: Sequence[float] = ()
    ) -> None:
        """Note what was made."""
        pace = stockrt.Pace(self.stored, plan, now)
        pace.settle(self.name, made)
        self.stored.update(pace.stored())


@settings(max_examples=examples(150, 1500, quick=20), deadline=None)
@given(
    st.sampled_from([FREE, PLANS["basic"], PLANS["premium"], PLANS["pro"], Plan("0.2", 0.2, 12)]),
    st.lists(
        st.tuples(
            st.sampled_from([0.0, 0.0, 0.0, 0.01, 0.019, 0.1, 0.4, 1.0]),
            st.sampled_from(["a", "b", "c", "a new one"]),
            st.sampled_from([0.0, 0.0, 0.003, 0.2]),
        ),
        min_size=20,
        max_size=150,
    ),
)
def test_whoever_uses_a_key_and_when_no_second_holds_more_than_the_plans(
    plan: Plan, schedule: Sequence[tuple[float, str, float]]
) -> None:
    """Some come and are killed at once, some stay, use their slots early, late or not at all."""
    clock, stored = FakeClock(NOON), dict[str, object]()
    ledgers = {name: PacedLedger(name, stored, clock) for name in "abc"}
    pools = {name: pool_of({FIRST: plan}, ledger, clock)[0] for name, ledger in ledgers.items()}
    times = []
    for number, (pause, name, took_s) in enumerate(schedule):
        clock.advance(pause)
        if name not in pools:
            ledgers[name] = PacedLedger(f"{number}", stored, clock)
        pool = pools.get(name) or pool_of({FIRST: plan}, ledgers[name], clock)[0]
        ledgers[name].took_s = took_s
        if isinstance(pool.try_acquire("stock"), ApiKey):
            times.append(clock.now_wall)
    limit, seconds = plan.windows()[0]
    assert most_in_any(seconds, times) <= limit


def test_runs_one_after_the_other_keep_the_second(tmp_path: Path) -> None:
    """Each is a process of its own, which forgets what it knew; also one that is killed."""
    clock = FakeClock(NOON)
    for plan in (FREE, PLANS["premium"]):
        key = f"key-of-{plan.name}-plan"
        times: list[float] = []
        for number in range(12):
            facts = LocalLedger(open_store_file(tmp_path))
            pool, _ = pool_of({key: plan}, facts, clock)
            for _ in range(4):
                take_one(pool, clock)
                times.append(clock.now_wall)
            if number % 3:
                pool.close()
            facts._file.close()
            clock.advance(0.05)
        limit, seconds = plan.windows()[0]
        assert most_in_any(seconds, times) == limit
        # a killed one leaves slots behind that nobody uses
        assert times[-1] - times[0] <= len(times) / plan.per_second * 1.05 + 4 * 2.5


def test_a_first_run_waits_for_nobody_and_may_use_its_whole_second_at_once(tmp_path: Path) -> None:
    """As without any count."""
    clock = FakeClock(NOON)
    with open_store_file(tmp_path) as file:
        pool, _ = pool_of({FIRST: PLANS["pro"]}, LocalLedger(file), clock)
        assert [try_key(pool) for _ in range(20)] == [FIRST] * 20
        assert len(take(pool, clock, 100)) >= 100 * 20 * 0.95


def in_turns(instances: Sequence[KeyPool], clock: FakeClock, seconds: float) -> list[float]:
    """Let each take what it can get, again and again; return when."""
    times: list[float] = []
    end = clock.now_wall + seconds
    while clock.now_wall < end:
        for pool in instances:
            if isinstance(pool.try_acquire("stock"), ApiKey):
                times.append(clock.now_wall)
        clock.advance(0.003)
    return times


@pytest.mark.parametrize("plan", [FREE, PLANS["premium"], PLANS["pro"]], ids=lambda plan: plan.name)
def test_processes_of_one_machine_at_once_keep_the_second(plan: Plan, tmp_path: Path) -> None:
    """And use most of it."""
    clock = FakeClock(NOON)
    with contextlib.ExitStack() as files:
        ledgers = [LocalLedger(files.enter_context(open_store_file(tmp_path))) for _ in range(3)]
        pools = [pool_of({FIRST: plan}, ledger, clock)[0] for ledger in ledgers]
        times = in_turns(pools, clock, 20)
    assert most_in_any(1, times) <= plan.per_second
    assert len(times) >= 20 * plan.per_second * 0.85


@pytest.mark.parametrize("plan", [FREE, PLANS["premium"], PLANS["pro"]], ids=lambda plan: plan.name)
def test_instances_with_one_mongodb_keep_the_second(plan: Plan, start: Start) -> None:
    """And use most of it."""
    clock = FakeClock(NOON)
    pools = [start({FIRST: plan}, clock).pool for _ in range(3)]
    times = in_turns(pools, clock, 20)
    assert most_in_any(1, times) <= plan.per_second
    assert len(times) >= 20 * plan.per_second * 0.85


def test_slots_from_before_the_clock_was_set_back_hold_nobody_up(tmp_path: Path) -> None:
    """Nor does a record that the disk has changed."""
    clock = FakeClock(NOON)
    with open_store_file(tmp_path) as file:
        for spoiled in ('{"made": 7, "held": []}', "[]", "x", '{"held": {"a": [null, "b"]}}'):
            take_one(pool_of({FIRST: FREE}, LocalLedger(file), clock)[0], clock)
            clock.now_wall -= 86400
            pool, _ = pool_of({FIRST: FREE}, LocalLedger(file), clock)
            assert try_key(pool) == FIRST
            with file.write() as db:
                db.execute("UPDATE key_pace SET pace = ?", (spoiled,))
            assert try_key(pool_of({FIRST: FREE}, LocalLedger(file), clock)[0]) == FIRST


def test_three_processes_keep_the_second_of_a_shared_key(mongo_db: Place, tmp_path: Path) -> None:
    """By the server's own count; what they lose by it is little."""

    def measure(folder: Path) -> tuple[int, float]:
        with InfowayServer(keys=frozenset({FIRST, OTHER}), per_second=10) as server:
            workers = [worker(server, mongo_db, folder / str(n), "10,600,0") for n in range(3)]
            for process in workers:
                assert process.stdin is not None
                process.stdin.write("go\n")
                process.stdin.flush()
            words = [process.communicate(timeout=60) for process in workers]
        assert [process.returncode for process in workers] == [0] * 3, words
        times = [request.at for request in server.requests]
        return server.over_limit, (max(times) - min(times)) / len(times)

    check_paced(measure, tmp_path, 1 / 20)


# ------------------------------------------------------------------------------------------------------
# Slices
# ------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([1, 7, 20, 60, 120, 600]),
    st.lists(
        st.tuples(st.floats(0, 3) | st.floats(0, 40) | st.just(0.0), st.integers(0, 2)),
        min_size=5,
        max_size=40,
    ),
)
def test_no_schedule_of_leases_puts_more_than_the_limit_into_any_minute(
    mongo_server: MongoServer, per_minute: int, schedule: list[tuple[float, int]]
) -> None:
    """Each lease is used at its last moment, or at once: the worst for the minutes around it."""
    plan = Plan("x", 50, per_minute, 0)
    times: list[tuple[float, int]] = []
    with fresh_database(mongo_server) as (uri, name), Client(uri) as client:
        ledgers = [SharedLedger(client[name]["license_usage"], NoLedger()) for _ in range(2)]
        now = NOON
        for pause, choice in schedule:
            now += pause
            lease = ledgers[choice % 2].lease(key_digest(FIRST), plan, now)
            assert lease.until > now
            used_at = now if choice else lease.until - 0.001
            times.append((used_at, lease.requests))
    for start_at, _ in times:
        assert sum(count for at, count in times if start_at <= at < start_at + 60) <= per_minute


def test_a_plan_without_limits_asks_no_ledger() -> None:
    """0: nothing is counted."""
    client: Client = pymongo.MongoClient("mongodb://127.0.0.1:9/", serverSelectionTimeoutMS=50)
    pool, _ = pool_of({FIRST: UNLIMITED}, SharedLedger(client["nowhere"]["x"], NoLedger()))
    assert {try_key(pool) for _ in range(100)} == {FIRST}
    pool.close()
    client.close()
