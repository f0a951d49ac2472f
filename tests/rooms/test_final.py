"""Closes become final with the API's daily bars: a real API on the loopback, both stores, a clock that is set."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import pymongo
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kit.chinese import in_chinese
from kit.clock import FakeClock
from kit.daemons import number as examples
from kit.infoway_server import PLANS, REFUSALS, Answer, InfowayServer, make_bar, make_record
from kit.mongo import MongoServer
from kit.trades import settings_of

import stockrt
from stockrt import Backfilled, Bar, Pipeline, Stage, market_of, open_store_file, session_of

NEVER = threading.Event()
NEW_YORK, HONG_KONG = "America/New_York", "Asia/Hong_Kong"
WED, THU, FRI = "2026-11-18", "2026-11-19", "2026-11-20"


def at(zone: str, moment: str) -> float:
    """Return `2026-11-19 15:59:30` of a zone's clock as epoch seconds."""
    return datetime.fromisoformat(moment).replace(tzinfo=ZoneInfo(zone)).timestamp()


class Place(NamedTuple):
    """A store of one kind: the settings that name it, and how to read `close`."""

    environ: dict[str, str]
    closes: Callable[[], list[dict[str, Any]]]


class World:
    """An API and instances of stockrt on one clock."""

    def __init__(self, place: Place, server: InfowayServer, clock: FakeClock, zone: str) -> None:
        self.place, self.server, self.clock, self.zone = place, server, clock, zone
        self.environ = {"INFOWAY_API_KEY": "test-key", "INFOWAY_PLAN": "0", **place.environ}
        self.environ["INFOWAY_API_BASE_URL"] = server.url

    @contextlib.contextmanager
    def instance(self, **environ: str) -> Iterator[Pipeline]:
        """Open stockrt as another process would."""
        with Pipeline(settings_of(self.environ | environ), clock=self.clock) as pipeline:
            yield pipeline

    def go_to(self, moment: str) -> None:
        """Set the clock, on the exchange's time."""
        self.clock.now_monotonic += max(0.0, at(self.zone, moment) - self.clock.now_wall)
        self.clock.now_wall = at(self.zone, moment)

    def trades(self, code: str, traded: str, price: str) -> None:
        """Let this be the latest trade of a code, seen a second later."""
        self.server.trades[code] = {"t": round(at(self.zone, traded) * 1000), "p": price}

    def poll(self, pipeline: Pipeline, code: str, traded: str, price: str) -> None:
        """Fetch this trade the moment after it."""
        self.trades(code, traded, price)
        self.go_to((datetime.fromisoformat(traded) + timedelta(seconds=1)).isoformat(" "))
        report = pipeline.run([code], NEVER)
        assert report.complete, report

    def closes(self) -> dict[str, dict[str, Any]]:
        """Return `close` by `_id`."""
        return {d["_id"]: {n: v for n, v in d.items() if v is not None} for d in self.place.closes()}

    def close_of(self, key: str) -> tuple[str, str]:
        """Return the price of a close, and what it is: its marks, or final."""
        found = self.closes()[key]
        marks = [name for name in stockrt.CLOSE_MARKS if found.get(name)]
        if "close" in found:
            assert found["close"] == found["p"]
            marks.append("final")
        return found["p"], " ".join(marks)

    def bars_asked(self) -> list[str]:
        """Return the paths of requests for bars, without the product."""
        return [one.path.partition("/batch_kline/")[2] for one in self.server.asked("batch_kline")]


@pytest.fixture(params=["sqlite", "mongodb"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Each of the stores."""
    environ = {"STATE_DIRECTORY": str(tmp_path / "state")}
    if request.param == "mongodb":
        uri, name = request.getfixturevalue("mongo_db")
        environ |= {"MONGODB_HOST": uri, "MONGODB_DB_NAME": name}

        def of_mongodb() -> list[dict[str, Any]]:
            with pymongo.MongoClient[dict[str, Any]](uri) as client:
                return list(client[name]["close"].find())

        return Place(environ, of_mongodb)

    def of_sqlite() -> list[dict[str, Any]]:
        with open_store_file(tmp_path / "state") as file, file.write() as db:
            found = db.execute("SELECT * FROM close")
            names = [column[0] for column in found.description]
            return [dict(zip(names, row, strict=True)) for row in found]

    return Place(environ, of_sqlite)


MakeWorld = Callable[..., contextlib.AbstractContextManager[World]]


@pytest.fixture
def make(place: Place) -> MakeWorld:
    """Start an API and a clock of a zone, at the noon of the Wednesday."""

    @contextlib.contextmanager
    def made(zone: str = NEW_YORK, **options: Any) -> Iterator[World]:
        clock = FakeClock(wall=at(zone, f"{WED} 12:00"))
        with InfowayServer(clock=clock.wall, **options) as server:
            yield World(place, server, clock, zone)

    return made


# ------------------------------------------------------------------------------------------------------
# One session
# ------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """Trades of a session (when, price), the close before its bar, when that is had, and the bar's close."""

    name: str
    code: str
    zone: str
    trades: tuple[tuple[str, str], ...]
    before: tuple[str, str]
    final_at: str
    day: str = THU
    options: Mapping[str, Any] = {}


KOREA, INDIA = "Asia/Seoul", "Asia/Kolkata"
CASES = (
    Case("HK, the auction not seen", "00700.HK", HONG_KONG, ((f"{THU} 15:59:58", "500.0"),),
         ("500.0", "provisional"), f"{THU} 16:40"),
    Case("HK, the auction seen", "00700.HK", HONG_KONG,
         ((f"{THU} 15:59:58", "500.0"), (f"{THU} 16:08:20", "499.6")), ("499.6", "provisional"), f"{THU} 16:40"),
    Case("HK, a half day", "00700.HK", HONG_KONG,
         ((f"{THU} 11:59:58", "500.0"), (f"{THU} 12:08:20", "499.6")), ("499.6", "provisional"), f"{THU} 16:40",
         options={"half_days": {"20261119"}}),
    Case("US, the cross seen, then after hours", "TSLA.US", NEW_YORK,
         ((f"{THU} 16:00:01", "300.10"), (f"{THU} 16:04:30", "303.75")), ("300.10", "provisional"), f"{THU} 16:30"),
    Case("US, after hours alone", "TSLA.US", NEW_YORK, ((f"{THU} 16:04:30", "303.75"),),
         ("303.75", "after_hours provisional"), f"{THU} 16:30"),
    Case("US, a half day", "TSLA.US", NEW_YORK, ((f"{THU} 12:59:58", "1"), (f"{THU} 14:00", "2")),
         ("2", "provisional"), f"{THU} 16:30", options={"half_days": {"20261119"}}),
    Case("KS, the day of the university entrance exam", "005930.KS", KOREA,
         ((f"{THU} 15:29", "1"), (f"{THU} 16:30", "2")), ("1", "provisional"), f"{THU} 17:00",
         options={"sessions": {("KS", "20261119"): ("10:00", "16:31")}}),
    Case("IN, an evening session on a holiday", "RELIANCE.IN", INDIA, ((f"{THU} 18:30", "2"),),
         ("2", "after_hours provisional"), f"{THU} 20:00",
         options={"sessions": {("IN", "20261119"): ("18:00", "19:15")}}),
    Case("crypto", "BTCUSDT", "UTC", ((f"{THU} 23:59:58", "90000"),), ("90000", "provisional"), f"{FRI} 00:30"),
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_close_is_the_exchanges_close(make: MakeWorld, case: Case) -> None:
    """Before the bar by the trade's rule; with it final; a trade that is polled later changes nothing."""
    key = f"{case.code}|{case.day}"
    with make(case.zone, **case.options) as world, world.instance() as pipeline:
        for traded, price in case.trades:
            world.poll(pipeline, case.code, traded, price)
            pipeline.finalise_all(NEVER)
        moment = datetime.fromisoformat(case.final_at) - timedelta(seconds=1)
        world.go_to(moment.isoformat(" "))
        pipeline.finalise_all(NEVER)
        assert world.close_of(key) == case.before
        assert world.bars_asked() == []
        world.go_to(case.final_at)
        assert pipeline.finalise(NEVER) != 0
        bar = make_bar(case.code, case.day)
        assert world.close_of(key) == (bar["c"], "final")
        assert world.bars_asked() == [f"8/2/{case.code}"]
        found = world.closes()[key]
        assert {name: found[name] for name in stockrt.BAR_FIELDS} == dict(
            zip(stockrt.BAR_FIELDS, (bar[name] for name in stockrt.BAR_NUMBERS), strict=True)
        )
        assert (found["v"], found["vw"], found["td"]) == (bar["v"], bar["vw"], 0)
        before = found
        world.poll(pipeline, case.code, f"{case.final_at}:30", "7")  # of the same date, but for crypto
        pipeline.finalise_all(NEVER)
        assert world.closes()[key] == before


def test_a_code_that_is_polled_no_more_has_its_close_all_the_same(make: MakeWorld) -> None:
    """At 15:59:55, and the next time on the next day; another process makes it final. The day before comes, too."""
    with make() as world:
        with world.instance() as pipeline:
            world.poll(pipeline, "TSLA.US", f"{THU} 15:59:55", "300")
            assert world.closes() == {}
            assert 0 < pipeline.finalise(NEVER) < 60
        world.go_to(f"{FRI} 10:00")
        with world.instance() as other:
            other.finalise_all(NEVER)
        assert world.close_of(f"TSLA.US|{THU}") == (make_bar("TSLA.US", THU)["c"], "final")
        world.go_to(f"{FRI} 17:00")
        assert f"TSLA.US|{FRI}" not in world.closes()


def test_the_day_before_becomes_final_with_it(make: MakeWorld) -> None:
    """Nothing ran on the Wednesday."""
    with make() as world, world.instance() as pipeline:
        world.poll(pipeline, "TSLA.US", f"{THU} 15:59:55", "300")
        world.go_to(f"{THU} 16:30")
        pipeline.finalise_all(NEVER)
        found = world.closes()
        assert sorted(found) == [f"TSLA.US|{WED}", f"TSLA.US|{THU}"]
        early = found[f"TSLA.US|{WED}"]
        assert early["p"] == early["close"] == make_bar("TSLA.US", WED)["c"]
        assert early["t"] == round(at(NEW_YORK, f"{WED} 16:00") * 1000)
        assert "provisional" not in early


def test_a_pair_is_looked_back_at_over_a_holiday(make: MakeWorld) -> None:
    """`common` has no bars: its close is that of the trades, not provisional, and no request is made for it."""
    with make() as world, world.instance() as pipeline:
        world.poll(pipeline, "USDCNY", f"{THU} 16:59:50", "7.1")
        world.go_to(f"{FRI} 23:00")
        pipeline.finalise_all(NEVER)
        assert world.close_of(f"USDCNY|{THU}") == ("7.1", "")
        assert world.bars_asked() == []


@pytest.mark.parametrize("manner", ["empty", "null", "absent", "stale", "zero"])
def test_a_share_that_is_suspended_is_not_made_final(make: MakeWorld, manner: Any) -> None:
    """Its trade of the night before a suspension is none of a session that has a bar."""
    with make(suspended={"TSLA.US": manner}) as world, world.instance() as pipeline:
        world.poll(pipeline, "TSLA.US", f"{THU} 15:59:55", "300")
        world.go_to(f"{THU} 18:00")
        pipeline.finalise_all(NEVER)
        assert world.close_of(f"TSLA.US|{THU}") == ("300", "provisional")
        assert all("final" not in world.close_of(key)[1] for key in world.closes() if key.endswith(THU))


def test_an_index_has_a_close_without_volume(make: MakeWorld) -> None:
    with make() as world, world.instance() as pipeline:
        world.poll(pipeline, "000300.SH", f"{THU} 01:59:55", "4000")
        world.go_to(f"{THU} 18:00")
        pipeline.finalise_all(NEVER)
        assert world.close_of(f"000300.SH|{THU}")[1] == "final"


def test_a_share_suspended_for_a_week_asks_for_nothing_again_and_again(make: MakeWorld) -> None:
    """Its old trade is polled every day, by new processes: its session is final, and once is enough."""
    with make() as world:
        for day in range(18, 25):
            world.trades("TSLA.US", f"{WED} 15:59:55", "300")
            world.go_to(f"2026-11-{day} 17:00")
            with world.instance() as pipeline:
                pipeline.run(["TSLA.US"], NEVER)
                pipeline.finalise_all(NEVER)
        assert world.bars_asked() == ["8/2/TSLA.US"]


def test_yesterdays_bar_makes_nothing_final_but_yesterday(make: MakeWorld) -> None:
    """The API is late: asked again later, it has it."""
    with make() as world, world.instance() as pipeline:
        world.server.bars["TSLA.US"] = [make_bar("TSLA.US", WED)]
        world.poll(pipeline, "TSLA.US", f"{THU} 15:59:55", "300")
        world.go_to(f"{THU} 16:30")
        pipeline.finalise_all(NEVER)
        assert world.close_of(f"TSLA.US|{WED}")[1] == "final"
        assert world.close_of(f"TSLA.US|{THU}") == ("300", "provisional")
        del world.server.bars["TSLA.US"]
        world.go_to(f"{THU} 17:00")
        pipeline.finalise_all(NEVER)
        assert world.close_of(f"TSLA.US|{THU}")[1] == "final"


def test_a_bar_of_a_session_that_goes_on_is_not_taken(make: MakeWorld) -> None:
    """Asked for the Thursday on Friday at noon: the Friday's bar is there, and provisional."""
    with make() as world, world.instance() as pipeline:
        world.poll(pipeline, "TSLA.US", f"{THU} 15:59:55", "300")
        world.poll(pipeline, "TSLA.US", f"{FRI} 12:00", "301")
        pipeline.finalise_all(NEVER)
        assert world.close_of(f"TSLA.US|{THU}")[1] == "final"
        assert f"TSLA.US|{FRI}" not in world.closes()


# ------------------------------------------------------------------------------------------------------
# Bars that cannot be had
# ------------------------------------------------------------------------------------------------------


def test_a_plan_without_bars_leaves_the_close_provisional(
    make: MakeWorld, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once a day, trades go on with the same key, and the bar is asked for again."""
    with make(script=lambda r: REFUSALS["ret_514"] if "batch_kline" in r.path else None) as world:
        with world.instance() as pipeline:
            world.poll(pipeline, "TSLA.US", f"{THU} 15:59:55", "300")
            for moment in ("16:30", "17:00", "18:00", "20:00", "23:00"):
                world.go_to(f"{THU} {moment}")
                pipeline.finalise_all(NEVER)
                assert world.close_of(f"TSLA.US|{THU}") == ("300", "provisional")
            world.poll(pipeline, "TSLA.US", f"{FRI} 09:31", "301")
        said = [r.getMessage() for r in caplog.records if "stay provisional" in r.getMessage()]
        assert len(said) == 2  # two days of UTC
        assert all(f"TSLA.US|{THU}" in line for line in said)
        world.server.script = ()
        world.go_to(f"{FRI} 16:30")
        with world.instance() as pipeline:
            pipeline.finalise_all(NEVER)
        assert world.close_of(f"TSLA.US|{THU}")[1] == "final"


def test_after_two_days_it_is_asked_for_alone(make: MakeWorld) -> None:
    """Several codes bring two bars each: those of later sessions."""
    with make() as world:
        with world.instance() as pipeline:
            for code in ("TSLA.US", "AAPL.US"):
                world.poll(pipeline, code, f"{WED} 15:59:55", "300")
        world.go_to("2026-11-24 12:00")
        with world.instance() as pipeline:
            pipeline.finalise_all(NEVER)
        assert [world.close_of(f"{code}.US|{WED}")[1] for code in ("TSLA", "AAPL")] == ["final", "final"]
        first, *alone = world.bars_asked()
        assert first.startswith("8/2/") and sorted(alone) == ["8/8/AAPL.US", "8/8/TSLA.US"]


def test_a_code_that_is_delisted_is_given_up_after_two_weeks(
    make: MakeWorld, caplog: pytest.LogCaptureFixture
) -> None:
    """With growing pauses, alone in the end, and said."""
    with make() as world, world.instance() as pipeline:
        world.poll(pipeline, "GONE.US", f"{WED} 15:59:55", "300")
        world.server.unknown = {"GONE.US"}
        moment = datetime.fromisoformat(f"{WED} 16:30")
        for _ in range(24 * 20):
            world.go_to(moment.isoformat(" "))
            pipeline.finalise_all(NEVER)
            moment += timedelta(hours=1)
        assert world.close_of(f"GONE.US|{WED}") == ("300", "provisional")
        asked = world.bars_asked()
        assert asked[0] == "8/2/GONE.US" and not asked[-1].startswith("8/2/") and 12 < len(asked) < 30
        assert any("for two weeks" in r.getMessage() for r in caplog.records)
        assert pipeline.finalise(NEVER) == float("inf")


def test_a_fault_of_the_api_is_waited_out(make: MakeWorld) -> None:
    """Not asked again for every code: a pause, then all of it."""
    with make(script=lambda r: REFUSALS["503_html"] if "batch_kline" in r.path else None) as world:
        with world.instance() as pipeline:
            world.poll(pipeline, "TSLA.US", f"{THU} 15:59:55", "300")
            world.go_to(f"{THU} 16:30")
            pipeline.finalise_all(NEVER)
            assert len(world.bars_asked()) == stockrt.MAX_BAR_TRIES
            assert pipeline.finalise(NEVER) > 0
            world.server.script = ()
            world.go_to(f"{THU} 17:30")
            pipeline.finalise_all(NEVER)
        assert world.close_of(f"TSLA.US|{THU}")[1] == "final"


def test_a_store_that_fails_does_not_end_anything(
    make: MakeWorld, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said, and made up for when the store is well."""
    with make() as world, world.instance() as pipeline:
        world.poll(pipeline, "TSLA.US", f"{THU} 15:59:55", "300")
        world.go_to(f"{THU} 16:30")
        good, pipeline._finaliser._store = pipeline._finaliser._store, Broken()  # type: ignore[assignment]
        assert pipeline.finalise(NEVER) == stockrt.FINAL_PAUSE_S
        assert any("disk on fire" in r.getMessage() for r in caplog.records)
        pipeline._finaliser._store = good
        assert pipeline.finalise(NEVER) == stockrt.FINAL_PAUSE_S
        world.go_to(f"{THU} 16:36")
        pipeline.finalise_all(NEVER)
        assert world.close_of(f"TSLA.US|{THU}")[1] == "final"


class Broken:
    """A store that fails."""

    def newest(self, *_: object) -> Any:
        raise stockrt.StoreError("disk on fire")


# ------------------------------------------------------------------------------------------------------
# Many
# ------------------------------------------------------------------------------------------------------


def test_two_instances_racing_end_in_the_same(make: MakeWorld, place: Place, tmp_path: Path) -> None:
    """Each has its own notes; with MongoDB they write the same collection, without it the same file."""
    codes = [f"R{number}.US" for number in range(examples(150, 150, quick=50))]
    with (
        make(epoch_ms=round(at(NEW_YORK, f"{THU} 15:59:50") * 1000)) as world,
        contextlib.ExitStack() as stack,
    ):
        world.go_to(f"{THU} 15:59:58")
        own = {"STATE_DIRECTORY": str(tmp_path / "other")} if "MONGODB_HOST" in place.environ else {}
        both = [stack.enter_context(world.instance()), stack.enter_context(world.instance(**own))]
        for pipeline in both:
            assert pipeline.run(codes, NEVER).complete
        world.go_to(f"{THU} 16:30")
        threads = [threading.Thread(target=one.finalise_all, args=(NEVER,)) for one in both]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        for pipeline in both:
            pipeline.finalise_all(NEVER)
        assert {world.close_of(f"{code}|{THU}") for code in codes} == {
            (make_bar(code, THU)["c"], "final") for code in codes
        }
        assert len(world.closes()) == 2 * len(codes)


@pytest.mark.long  # the same with fewer codes is tried above
def test_five_thousand_codes_are_final_with_fifty_requests(tmp_path: Path, mongo_db: tuple[str, str]) -> None:
    """By a premium key, which is never over its rate, while executions go on."""
    codes = [f"A{number}.US" for number in range(5000)]
    clock = FakeClock(wall=at(NEW_YORK, f"{THU} 15:59:58"))
    epoch = round(at(NEW_YORK, f"{THU} 15:59:50") * 1000)
    uri, name = mongo_db
    environ = {
        "INFOWAY_API_KEY": "test-key", "INFOWAY_PLAN": "premium", "STATE_DIRECTORY": str(tmp_path),
        "MONGODB_HOST": uri, "MONGODB_DB_NAME": name,
    }  # fmt: skip
    with InfowayServer(clock=clock.wall, epoch_ms=epoch, plans={"test-key": PLANS["premium"]}) as server:
        environ["INFOWAY_API_BASE_URL"] = server.url
        with Pipeline(settings_of(environ), clock=clock) as pipeline:
            assert pipeline.run(codes, NEVER).complete
            clock.advance(3600)
            turns = 0
            while pipeline.finalise(NEVER) == 0:
                assert pipeline.run(codes[:100], NEVER).complete
                turns += 1
            assert turns >= 5
            with pymongo.MongoClient[dict[str, Any]](uri) as client:
                final = client[name]["close"].count_documents({"date": THU, "close": {"$ne": None}})
        assert final == 5000
        assert len(server.asked("batch_kline")) == 50
        assert server.over_limit == 0


BARS = st.builds(
    lambda volume: Bar("TSLA.US", 0, "1", "4", "1", str(volume / 100), str(volume), "9"), st.integers(1, 3)
)
SESSION = session_of(market_of("TSLA.US"), round(at(NEW_YORK, f"{THU} 12:00") * 1000))  # type: ignore[arg-type]
DEEDS = st.one_of(
    st.tuples(st.sampled_from(["08:00", "15:58", "15:59", "16:00:02", "16:20", "17:00"]), st.sampled_from("12")),
    BARS,
)  # fmt: skip


@settings(
    max_examples=examples(40, 400, quick=10),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(DEEDS, min_size=1, max_size=8), st.data())
def test_any_order_and_repetition_of_trades_and_bars_gives_the_same_document(
    kept: stockrt.CloseStore,
    wipe: Callable[[], Sequence[dict[str, Any]]],
    deeds: list[Any],
    data: st.DataObject,
) -> None:
    """Seen from one instance or several: each deed is one of its own."""
    ends = []
    for number in range(3):
        order = data.draw(st.permutations(deeds)) if number else deeds
        wipe()
        for deed in [*order, *data.draw(st.lists(st.sampled_from(deeds), max_size=4))]:
            if isinstance(deed, Bar):
                kept.write_closes([stockrt.bar_close(deed, SESSION)])
                continue
            moment, price = deed
            trade = make_record("TSLA.US", 0) | {
                "t": round(at(NEW_YORK, f"{THU} {moment}") * 1000),
                "p": price,
            }
            document = stockrt.to_document(stockrt.Trade(**trade), stockrt.utc_now())
            if SESSION.opens <= document["t"]:
                close = stockrt.regular_close(document, SESSION)
                kept.write_closes([close._replace(after_hours=document["t"] > SESSION.until)])
        ends.append([{n: v for n, v in d.items() if not n.endswith("_time")} for d in wipe()])
    assert ends[0] == ends[1] == ends[2]
    if any(isinstance(deed, Bar) for deed in deeds):
        assert ends[0][0]["close"] == ends[0][0]["p"]


@pytest.fixture
def kept(place: Place) -> Iterator[stockrt.CloseStore]:
    """The store that closes are written to."""
    with Pipeline(settings_of(place.environ)) as pipeline:
        yield pipeline._finaliser._store


@pytest.fixture
def wipe(place: Place, kept: stockrt.CloseStore) -> Callable[[], Sequence[dict[str, Any]]]:
    """Return what is in `close`, and empty it."""

    def emptied() -> Sequence[dict[str, Any]]:
        found = place.closes()
        if isinstance(kept, stockrt.MongoStore):
            kept.collection("close").delete_many({})
        elif isinstance(kept, stockrt.SqliteStore):
            with kept._file.write() as db:
                db.execute("DELETE FROM close")
        return found

    return emptied


# ------------------------------------------------------------------------------------------------------
# The past
# ------------------------------------------------------------------------------------------------------


def rows_of(pipeline: Pipeline, codes: Sequence[str] | None, count: int) -> list[Backfilled]:
    """Return what became of each code."""
    return [row for row in pipeline.backfill(codes, count, NEVER) if isinstance(row, Backfilled)]


def test_a_backfill_asks_once_for_each_code_and_never_again(make: MakeWorld) -> None:
    """A fresh store, 60 sessions of many codes: a request for each; then none."""
    codes = [f"A{number}.US" for number in range(examples(50, 50, quick=20))]
    with make() as world:
        world.go_to(f"{THU} 12:00")
        with world.instance() as pipeline:
            rows = rows_of(pipeline, codes, 60)
        assert len(world.bars_asked()) == len(codes) and len(world.closes()) == 60 * len(codes)
        assert {(row.last, row.added, row.there, row.why) for row in rows} == {(WED, 60, 0, "")}
        with world.instance() as pipeline:
            rows = rows_of(pipeline, codes, 60) + rows_of(pipeline, codes[:3], 20)
        assert len(world.bars_asked()) == len(codes) and len(world.closes()) == 60 * len(codes)
        assert {(row.last, row.added, row.there, row.why) for row in rows} == {(WED, 0, 60, "")}
        world.go_to(f"{THU} 17:00")
        with world.instance() as pipeline:
            (row,) = rows_of(pipeline, codes[:1], 60)
        assert (row.last, row.added, row.there) == (THU, 1, 59)
        for close in world.closes().values():
            assert close["p"] == close["close"] == make_bar(close["s"], close["date"])["c"]


def test_a_backfill_does_not_believe_its_notes_when_the_store_has_lost_it(
    make: MakeWorld, place: Place
) -> None:
    with make() as world, world.instance() as pipeline:
        rows_of(pipeline, ["TSLA.US"], 5)
        store, lost = pipeline._finaliser._store, "TSLA.US|2026-11-13"
        if isinstance(store, stockrt.MongoStore):
            store.collection("close").delete_one({"_id": lost})
        elif isinstance(store, stockrt.SqliteStore):
            with store._file.write() as db:
                db.execute("DELETE FROM close WHERE _id = ?", (lost,))
        (row,) = rows_of(pipeline, ["TSLA.US"], 5)
        assert (row.added, row.there) == (1, 4)
        assert lost in world.closes()


def test_a_backfill_without_codes_takes_those_that_are_stored(make: MakeWorld) -> None:
    """But for what has no bars; asked for by name it is told why there are none."""
    with make() as world, world.instance() as pipeline:
        world.poll(pipeline, "TSLA.US", f"{WED} 12:00", "300")
        world.poll(pipeline, "USDCNY", f"{WED} 12:01", "7")
        assert [row.code for row in rows_of(pipeline, None, 3)] == ["TSLA.US"]
        rows = {row.code: row.why for row in rows_of(pipeline, ["USDCNY", "x y"], 3)}
        assert "no documented boundary" in rows["USDCNY"] and "no code has" in rows["x y"]
        assert in_chinese(rows["USDCNY"]) == "该品种没有可用的日线收盘价（README“收盘价”一节）"
        assert "含有代码中不会出现的字符" in in_chinese(rows["x y"])
        world.server.unknown = {"GONE.US"}
        (row,) = rows_of(pipeline, ["GONE.US"], 3)
        assert "no daily bar" in row.why and in_chinese(row.why) == "API 没有该代码的日线"
        world.server.script = lambda _: Answer.empty(302)
        (row,) = rows_of(pipeline, ["AAPL.US"], 3)
        assert in_chinese(row.why).startswith("HTTP 302，是重定向，不予跟随；请检查")


def test_a_backfill_that_is_stopped_goes_on_where_it_was(make: MakeWorld) -> None:
    codes = [f"A{number}.US" for number in range(60)]  # more than can be under way when it stops
    with make() as world, world.instance() as pipeline:
        stop = threading.Event()
        done = 0
        for row in pipeline.backfill(codes, 5, stop):
            done += isinstance(row, Backfilled)
            if done == 4:
                stop.set()
        assert 4 <= done < 60 and len(world.closes()) == 5 * done
        asked = len(world.bars_asked())
        rows = rows_of(pipeline, codes, 5)
        assert len(rows) == 60 and len(world.closes()) == 300
        assert sum(row.there == 5 for row in rows) == done
        assert len(world.bars_asked()) - asked == 60 - done


def test_what_was_backfilled_without_a_mongodb_moves_over(
    tmp_path: Path, mongo_db: tuple[str, str], mongo_server: MongoServer
) -> None:
    """As the trades do; what follows from trades is made of them."""
    uri, name = mongo_db
    clock = FakeClock(wall=at(NEW_YORK, f"{THU} 12:00"))
    environ = {"INFOWAY_API_KEY": "test-key", "INFOWAY_PLAN": "0", "STATE_DIRECTORY": str(tmp_path)}
    with InfowayServer(clock=clock.wall) as server:
        environ["INFOWAY_API_BASE_URL"] = server.url
        with Pipeline(settings_of(environ), clock=clock) as pipeline:
            rows_of(pipeline, ["TSLA.US", "AAPL.US"], 30)
        environ |= {"MONGODB_HOST": uri, "MONGODB_DB_NAME": name}
        with Pipeline(settings_of(environ), clock=clock) as pipeline:
            pipeline.deliver(NEVER, retry=False)
    with pymongo.MongoClient[dict[str, Any]](uri) as client:
        found = list(client[name]["close"].find())
    assert len(found) == 60 and all(d["p"] == d["close"] for d in found)
    with open_store_file(tmp_path) as file:
        assert file.read_all("SELECT 1 FROM close") == []


# ------------------------------------------------------------------------------------------------------
# The notes
# ------------------------------------------------------------------------------------------------------


def test_the_notes_do_not_grow(make: MakeWorld, place: Place) -> None:
    """Of each code the newest session is kept, so that its trade is not taken for a new one."""
    with make() as world, world.instance() as pipeline:
        for day in (16, 17, 18, 19, 20, 23, 24):
            world.poll(pipeline, "TSLA.US", f"2026-11-{day} 15:59:55", "300")
            world.go_to(f"2026-11-{day} 16:30")
            pipeline.finalise_all(NEVER)
        with open_store_file(Path(place.environ["STATE_DIRECTORY"])) as file:
            assert file.read_all("SELECT code, date, stage FROM sessions") == [
                ("TSLA.US", "2026-11-24", Stage.DONE)
            ]


def test_what_is_final_in_the_store_is_not_asked_for_again(make: MakeWorld) -> None:
    """Though this machine has no note of it, as where another instance did the work."""
    with make() as world, world.instance() as pipeline:
        world.poll(pipeline, "TSLA.US", f"{THU} 15:59:55", "300")
        world.go_to(f"{THU} 16:30")
        pipeline.finalise_all(NEVER)
        sessions = pipeline._finaliser._sessions
        sessions.change([stockrt.OpenSession("TSLA.US", THU, Stage.BATCH, 0)])
        pipeline.finalise_all(NEVER)
        assert world.bars_asked() == ["8/2/TSLA.US"]
        assert pipeline.finalise(NEVER) == float("inf")


def test_trades_of_long_ago_are_not_noted(make: MakeWorld) -> None:
    """A frozen feed does not cost a request for each code: that is what --backfill is for."""
    with make(epoch_ms=round(at(NEW_YORK, "2026-08-14 15:00") * 1000)) as world, world.instance() as pipeline:
        assert pipeline.run([f"A{number}.US" for number in range(300)], NEVER).complete
        assert pipeline.finalise(NEVER) == float("inf")
        assert len(world.closes()) == 300
        assert world.bars_asked() == []


@pytest.mark.parametrize("numeric_type", ["decimal", "double"])
def test_numbers_of_a_bar_have_the_type_that_is_set(
    numeric_type: str, tmp_path: Path, mongo_db: tuple[str, str]
) -> None:
    """And bars are compared by number, whatever it is."""
    from bson.decimal128 import Decimal128

    uri, name = mongo_db
    environ = {"MONGODB_HOST": uri, "MONGODB_DB_NAME": name, "MONGODB_NUMERIC_TYPE": numeric_type}
    with contextlib.closing(stockrt.MongoStore(settings_of(environ))) as store:
        for volume in ("9", "1000", "20"):
            bar = Bar("TSLA.US", 0, "1", "4", "1", f"{volume}.5", volume, "9")
            store.write_closes([stockrt.bar_close(bar, SESSION)])
        (found,) = store.collection("close").find()
    kind = Decimal128 if numeric_type == "decimal" else float
    assert {type(found[name]) for name in (*stockrt.BAR_FIELDS, "p", "v", "vw")} == {kind}
    assert float(str(found["volume"])) == 1000
