"""What the stream pushes: stored, once, or known as missing; whatever the store, the connections and the process do."""

from __future__ import annotations

import contextlib
import json
import math
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kit.chinese import in_chinese
from kit.fault_world import ServiceManager
from kit.infoway_server import PLANS, REFUSALS
from kit.mongo_proxy import MongoProxy
from kit.stream_server import REFUSE_BY_RESET, Gap, Vendor, identity, uncovered
from kit.trades import settings_of
from pymongo import MongoClient
from pymongo.collection import Collection

import stockrt
from stockrt import Coverage, Events, Gaps, Intake, Pipeline, Trade

WAIT_S = 60.0
CODES = ("AAUSDT", "BBUSDT", "CCUSDT", "DDUSDT")


def wait_for(what: str, is_there: Any) -> None:
    """Wait until something is so."""
    until = time.monotonic() + WAIT_S
    while not is_there():
        assert time.monotonic() < until, what
        time.sleep(0.01)


def trades_of(count: int, codes: Sequence[str] = CODES, first: int = 0) -> list[Trade]:
    """Return trades of now, no two the same."""
    now = int(time.time() * 1000)
    return [Trade(codes[n % len(codes)], now, f"{1 + n}.5", "2", "3", 1) for n in range(first, first + count)]


def ids(trades: Sequence[Trade]) -> list[str]:
    """Return what the documents of trades are to be called."""
    return sorted(map(stockrt.identity, trades))


class Clock(stockrt.Clock):
    """A wall clock that stands until it is set."""

    def __init__(self, now: float = 2_000_000_000.0) -> None:
        self.now = now

    def wall(self) -> float:
        """Return epoch seconds."""
        return self.now


class Place:
    """A state directory, and what is in its file."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environ = {"STATE_DIRECTORY": str(directory), "INFOWAY_API_KEY": "test-key"}

    def stored(self) -> list[str]:
        """Return the `_id` of every trade in the local file."""
        with contextlib.closing(sqlite3.connect(self.directory / stockrt.SQLITE_NAME)) as db:
            return [name for (name,) in db.execute("SELECT _id FROM realtime ORDER BY _id")]

    def gaps(self) -> list[dict[str, Any]]:
        """Return the gaps in the order of their beginnings."""
        with contextlib.closing(sqlite3.connect(self.directory / stockrt.SQLITE_NAME)) as db:
            db.row_factory = sqlite3.Row
            rows = [dict(row) for row in db.execute('SELECT * FROM stream_gaps ORDER BY "from", _id')]
        return [row | {"codes": json.loads(row["codes"])} for row in rows]

    def spans(self) -> list[tuple[list[str], int, int | None]]:
        """Return of each gap the codes and the times."""
        return [(gap["codes"], gap["from"], gap["to"]) for gap in self.gaps()]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """An empty state directory."""
    return Place(tmp_path / "state")


# ------------------------------------------------------------------------------------------- where it is incomplete


@contextlib.contextmanager
def coverage_in(place: Place, clock: Clock, *wanted: str) -> Iterator[Coverage]:
    """Yield what a process knows that collects these codes; at the end it is killed, unless it was closed."""
    with stockrt.open_store_file(place.directory) as file:
        coverage = Coverage(Gaps(file, None), place.directory, clock)
        coverage.want({"crypto": wanted})
        yield coverage


def connected(coverage: Coverage, *codes: str) -> stockrt.Part:
    """Return the part of a connection that brings these codes."""
    part = coverage.add("crypto")
    coverage.expect(part, codes)
    coverage.acked(part, codes)
    return part


def heard(coverage: Coverage, part: stockrt.Part, clock: Clock) -> None:
    """Have it that a connection has just brought something, and that it is stored."""
    part.heard = int(clock.now * 1000)
    coverage.look()
    coverage.mark(int(clock.now * 1000))


def ms(seconds: float) -> int:
    """Return epoch milliseconds."""
    return int(seconds * 1000)


def test_a_connection_that_is_lost_leaves_a_gap_until_its_codes_are_subscribed_again(place: Place) -> None:
    clock = Clock()
    with coverage_in(place, clock, *CODES) as coverage:
        part = connected(coverage, *CODES[:2])
        assert place.gaps() == []  # nothing is missing before the first subscription
        clock.now += 10
        heard(coverage, part, clock)
        began = ms(clock.now)
        clock.now += 5
        coverage.lost(part, "the connection was lost")
        (gap,) = place.gaps()
        assert (gap["codes"], gap["from"], gap["to"]) == ([*CODES[:2]], began, None)
        assert gap["_id"] == f"{gap['instance']}|crypto|{began}" and gap["why"] == "the connection was lost"
        coverage.acked(part, CODES[:1])
        clock.now += 5
        coverage.acked(part, CODES[1:2])
        assert coverage.to_fetch() == ({*CODES[:2]}, [])
        assert place.gaps()[0]["to"] is None
        coverage.complete()
        assert place.spans() == [([*CODES[:2]], began, ms(clock.now))]
        assert coverage.missing() == 0


def test_after_a_kill_what_is_missing_begins_at_the_mark(place: Place) -> None:
    clock = Clock()
    with coverage_in(place, clock, *CODES) as coverage:
        part = connected(coverage, *CODES[:3])
        clock.now += 10
        heard(coverage, part, clock)
        marked = ms(clock.now)
        clock.now += 7
    with coverage_in(
        place, clock, *CODES[1:]
    ) as coverage:  # of the first code nothing is to be collected any more
        assert place.spans() == [([*CODES[1:3]], marked, None)]
        assert place.gaps()[0]["why"] == "stockrt ended without notice"
        instance = place.gaps()[0]["instance"]
    clock.now += 5
    with coverage_in(place, clock, *CODES[1:]) as coverage:  # killed again before anything was subscribed
        assert place.spans() == [([*CODES[1:3]], marked, None)]
        part = connected(coverage, *CODES[1:])
        coverage.complete()
        assert place.spans() == [([*CODES[1:3]], marked, ms(clock.now))]
        coverage.lost(part, "the connection was lost")
        assert [gap["instance"] for gap in place.gaps()] == [instance] * 2


def test_a_clean_stop_leaves_a_gap_too(place: Place) -> None:
    clock = Clock()
    with coverage_in(place, clock, *CODES) as coverage:
        part = connected(coverage, *CODES)
        clock.now += 10
        part.heard = ms(clock.now)
        coverage.look()
        coverage.close(ms(clock.now) + 500)
        coverage.lost(part, "a thread was late")
    stopped = ms(clock.now)
    clock.now += 60
    with coverage_in(place, clock, *CODES):
        assert place.spans() == [([*CODES], stopped, None)]
        assert place.gaps()[0]["why"] == "stockrt was stopped"


def test_codes_that_a_process_was_about_to_subscribe_are_known_to_the_next_one(place: Place) -> None:
    clock = Clock()
    with coverage_in(place, clock, *CODES) as coverage:
        part = coverage.add("crypto")
        coverage.expect(part, CODES)
        since = ms(clock.now)
    with coverage_in(place, clock, *CODES):
        assert place.spans() == [([*CODES], since, None)]


def test_the_mark_does_not_pass_what_waits_to_be_written(place: Place) -> None:
    clock = Clock()
    with coverage_in(place, clock, *CODES) as coverage:
        part = connected(coverage, *CODES)
        clock.now += 10
        part.heard = ms(clock.now)
        coverage.look()
        coverage.mark(ms(clock.now) - 4000)
        waits = ms(clock.now) - 4000
    with coverage_in(place, clock, *CODES):
        assert place.spans() == [([*CODES], waits, None)]


def test_a_clock_that_is_set_back_takes_the_mark_along(place: Place) -> None:
    clock = Clock()
    with coverage_in(place, clock, *CODES) as coverage:
        part = connected(coverage, *CODES)
        heard(coverage, part, clock)
        clock.now -= 3600
        heard(coverage, part, clock)
    with coverage_in(place, clock, *CODES):
        assert place.spans() == [([*CODES], ms(clock.now), None)]


def test_codes_that_are_not_wanted_any_more_keep_no_gap_open(place: Place) -> None:
    clock = Clock()
    with coverage_in(place, clock, *CODES) as coverage:
        part = connected(coverage, *CODES[:2])
        coverage.lost(part, "the connection was lost")
        coverage.want({"crypto": CODES[:1]})
        coverage.expect(part, CODES[:1])
        coverage.acked(part, CODES[:1])
        coverage.complete()
        assert coverage.missing() == 0 and place.gaps()[0]["to"] == ms(clock.now)
        coverage.want({})
        coverage.drop(part)
    with coverage_in(place, clock, *CODES):
        assert len(place.gaps()) == 1  # and none of those that were given up


def test_codes_that_move_to_another_connection_are_missing_in_between(place: Place) -> None:
    clock = Clock()
    with coverage_in(place, clock, *CODES) as coverage:
        first, second = connected(coverage, *CODES[:2]), connected(coverage, *CODES[2:])
        clock.now += 1
        coverage.expect(first, CODES[:1])
        coverage.expect(second, CODES[1:])
        (gap,) = place.gaps()
        assert (gap["codes"], gap["to"]) == ([CODES[1]], None)
        coverage.acked(second, CODES[1:])
        coverage.complete()
        assert place.gaps()[0]["to"] == ms(clock.now)


def test_codes_that_the_stream_refuses_have_a_gap_of_their_own(place: Place) -> None:
    clock = Clock()
    with coverage_in(place, clock, *CODES) as coverage:
        part = connected(coverage, *CODES)
        coverage.lost(part, "the connection was lost")
        coverage.refused(part, CODES[:1], "505: too many")
        coverage.acked(part, CODES[1:])
        coverage.complete()
        found = {tuple(gap["codes"]): (gap["to"] is None, gap["why"]) for gap in place.gaps()}
        assert found == {CODES[:1]: (True, "505: too many"), CODES[1:]: (False, "the connection was lost")}
        assert len({gap["_id"] for gap in place.gaps()}) == 2


def test_what_the_store_does_not_take_is_one_gap_until_it_does(place: Place) -> None:
    clock = Clock()
    with coverage_in(place, clock, *CODES) as coverage:
        connected(coverage, *CODES)
        began = ms(clock.now)
        for at in range(3):
            parcel = stockrt.Parcel("crypto", trades_of(2), began + 10 * at, began + 10 * at + 5, 0.0)
            coverage.not_stored(parcel, {CODES[at]}, "not stored: the disk is full")
        assert place.spans() == [([*CODES[:3]], began, None)]
        coverage.stored()
        assert place.spans() == [([*CODES[:3]], began, began + 25)]


def test_a_gap_that_cannot_be_noted_holds_the_mark_back_until_it_is(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    with coverage_in(place, clock, *CODES) as coverage:
        part = connected(coverage, *CODES)
        since = part.heard
        other = sqlite3.connect(place.directory / stockrt.SQLITE_NAME)
        with contextlib.closing(other):
            other.execute(
                "ALTER TABLE stream_gaps RENAME COLUMN why TO because"
            )  # no change of damage: it comes back
            clock.now += 10
            coverage.lost(part, "the connection was lost")
            assert "stream_gaps" in caplog.text
            coverage.look()
            coverage.mark(ms(clock.now))
            other.execute("ALTER TABLE stream_gaps RENAME COLUMN because TO why")
    clock.now += 10
    (place.directory / f"{stockrt.SQLITE_NAME}.damaged").unlink(missing_ok=True)
    with coverage_in(place, clock, *CODES):
        assert place.spans() == [([*CODES], since, None)]


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("name", [stockrt.CODES_NAME, stockrt.MARK_NAME])
def test_a_mark_that_is_damaged_is_said(
    place: Place, name: str, cut: bool, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    with coverage_in(place, clock, *CODES) as coverage:
        part = connected(coverage, *CODES)
        heard(coverage, part, clock)
        since = ms(clock.now)
        clock.now += 10
        heard(coverage, part, clock)
    path = place.directory / name
    text = path.read_text().replace('"until"', '"since"').replace('"groups": [[', '"groups": [[1, ')
    path.write_bytes(text[:30].encode() + b"\xff" if cut else text.encode())
    with coverage_in(place, clock, *CODES):
        assert "damaged" in caplog.text
        if name == stockrt.MARK_NAME:  # what is missing is known all the same
            ((codes, begins, _),) = place.spans()
            assert codes == [*CODES] and begins <= since


def test_what_the_last_process_left_stays_until_it_was_read(place: Place) -> None:
    clock = Clock()
    with coverage_in(place, clock, *CODES) as coverage:
        part = connected(coverage, *CODES)
        clock.now += 1000
        heard(coverage, part, clock)
        marked = ms(clock.now)
    clock.now += 100
    with stockrt.open_store_file(place.directory) as file:  # the list of codes could not be read all the time
        coverage = Coverage(Gaps(file, None), place.directory, clock)
        coverage.mark(ms(clock.now))
        coverage.close(ms(clock.now))
    with coverage_in(place, clock, *CODES):
        assert place.spans() == [([*CODES], marked, None)]


def test_a_clock_that_is_set_back_hides_nothing_that_is_missing(place: Place) -> None:
    clock = Clock()
    with coverage_in(place, clock, *CODES) as coverage:
        part = connected(coverage, *CODES)
        clock.now += 10
        heard(coverage, part, clock)
        clock.now -= 3600
        back = ms(clock.now)
        clock.now += 10
        coverage.look()
        coverage.mark(ms(clock.now) - 3000)
        coverage.lost(part, "the connection was lost")
        assert place.spans()[0][1] <= back + 10_000
        coverage.acked(part, CODES)
        coverage.complete()
        clock.now += 10
        coverage.look()
        waits = ms(clock.now) - 3000
        coverage.mark(waits)
    with coverage_in(place, clock, *CODES):
        assert place.spans()[-1][1] <= waits


def test_a_mark_from_the_future_is_said_and_its_gap_is_no_hole_in_time(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    with coverage_in(place, clock, *CODES) as coverage:
        heard(coverage, connected(coverage, *CODES), clock)
    clock.now -= 3600
    with coverage_in(place, clock, *CODES) as coverage:
        connected(coverage, *CODES)
        coverage.complete()
        ((_, since, until),) = place.spans()
        assert until is not None and since <= until == ms(clock.now)
        assert "clock" in caplog.text


def test_two_gaps_of_one_moment_are_two(place: Place) -> None:
    clock = Clock()
    with coverage_in(place, clock, *CODES) as coverage:
        parts = [connected(coverage, *CODES[:2]), connected(coverage, *CODES[2:])]
        for part in parts:
            coverage.lost(part, "the connection was lost")
        assert [gap["codes"] for gap in place.gaps()] == [[*CODES[2:]], [*CODES[:2]]]


def test_gaps_go_to_mongodb_as_they_become(place: Place, mongo_db: tuple[str, str]) -> None:
    uri, name = mongo_db
    clock = Clock(time.time())
    environ = place.environ | {"MONGODB_HOST": uri, "MONGODB_DB_NAME": name}
    client: MongoClient[dict[str, Any]]
    with Pipeline(settings_of(environ)) as pipeline, MongoClient(uri) as client:
        found: Collection[dict[str, Any]] = client[name].stream_gaps
        coverage = Coverage(pipeline.gaps, place.directory, clock)
        coverage.want({"crypto": CODES})
        part = connected(coverage, *CODES)
        coverage.lost(part, "the connection was lost")
        assert pipeline.gaps.deliver() and not pipeline.gaps.deliver()
        (gap,) = found.find()
        assert (gap["product"], gap["codes"], gap["from"], gap["to"]) == (
            "crypto",
            [*CODES],
            part.heard,
            None,
        )
        coverage.acked(part, CODES)
        coverage.complete()
        assert pipeline.gaps.deliver() and not pipeline.gaps.deliver()
        (gap,) = found.find()
        assert gap["to"] == ms(clock.now) and gap["create_time"] is not None
        assert pipeline.gaps.count_since(stockrt.utc_day(time.time())) == 1


# ------------------------------------------------------------------------------------------- from push to store


class Listener(Events):
    """Notes what is stored, and how many trades wait for MongoDB."""

    def __init__(self) -> None:
        self.known: list[str] = []
        self.waiting = self.most_waiting = 0

    def stored(self, documents: Sequence[dict[str, Any]]) -> None:
        """Note them."""
        self.known += [document["_id"] for document in documents]

    def queue_changed(self, stats: stockrt.QueueStats) -> None:
        """Note it."""
        self.waiting = stats.trades
        self.most_waiting = max(self.most_waiting, self.waiting)


@contextlib.contextmanager
def intake_of(pipeline: Pipeline, place: Place) -> Iterator[Intake]:
    """Yield an intake that works."""
    coverage = Coverage(pipeline.gaps, place.directory)
    coverage.want({"crypto": CODES})
    intake = Intake(pipeline, coverage)
    intake.start()
    yield intake
    intake.close(10)


def test_what_is_pushed_is_stored_once(place: Place) -> None:
    listener, trades = Listener(), trades_of(2500)
    with Pipeline(settings_of(place.environ), listener) as pipeline:
        with intake_of(pipeline, place) as intake:
            intake.add("crypto", trades)
            intake.add("crypto", trades[:7])
            wait_for("everything is stored", lambda: intake.stored + intake.duplicates == 2507)
            wait_for("it is known to be", lambda: intake.durable_ms() >= trades[-1].t)  # a moment later
            assert (intake.trades, intake.stored, intake.duplicates, intake.refused) == (2507, 2500, 7, 0)
            p50, p99, per_second = intake.lately()
            assert 0 < p50 <= p99 < WAIT_S * 1000 and per_second > 0
        assert place.stored() == ids(trades) and place.gaps() == []
        assert sorted({*listener.known}) == ids(trades) and not listener.most_waiting


def test_what_waits_is_written_at_the_end(place: Place) -> None:
    trades = trades_of(50)
    with Pipeline(settings_of(place.environ)) as pipeline, intake_of(pipeline, place) as intake:
        intake.add("crypto", trades)
        assert intake.durable_ms() < trades[0].t
        intake.close(10)
        assert place.stored() == ids(trades)


def test_a_mark_stays_before_the_oldest_trade_that_waits(place: Place) -> None:
    """Codes are pushed with more or less delay."""
    first, second = trades_of(2)
    second = second._replace(t=first.t - 3000)
    with Pipeline(settings_of(place.environ)) as pipeline:
        intake = Intake(pipeline, Coverage(pipeline.gaps, place.directory))
        intake.add("crypto", [first, second])
        assert intake.durable_ms() < second.t


def test_pushes_make_the_closes_that_polls_make(place: Place, tmp_path: Path) -> None:
    day = 1_786_752_000_000  # 2026-08-15 00:00 UTC: the session of crypto before it is over
    trades = [Trade("AAUSDT", day - 5000 + n, f"{1 + n}", "2", "3", 1) for n in range(10)]
    other = Place(tmp_path / "polled")
    with Pipeline(settings_of(place.environ)) as pipeline, intake_of(pipeline, place) as intake:
        intake.add("crypto", trades)
    with Pipeline(settings_of(other.environ)) as pipeline:
        documents = [stockrt.to_document(trade, stockrt.utc_now()) for trade in trades]
        pipeline._keeper.follow(pipeline.store.write(documents), documents, threading.Event())
    closes = []
    for one in (place, other):
        with contextlib.closing(sqlite3.connect(one.directory / stockrt.SQLITE_NAME)) as db:
            closes.append(db.execute("SELECT _id, t, p, provisional FROM close").fetchall())
    assert closes[0] == closes[1] == [("AAUSDT|2026-08-14", day - 4991, "10", 1)]


def test_the_embedded_store_holds_the_connections_back(place: Place) -> None:
    """No more than so many trades wait in memory, and none is lost."""
    trades = trades_of(60_000)
    most = 0
    with Pipeline(settings_of(place.environ)) as pipeline, intake_of(pipeline, place) as intake:
        for at in range(0, len(trades), 500):
            intake.add("crypto", trades[at : at + 500])
            most = max(most, intake.trades - intake.stored)
        assert most <= stockrt.MOST_PENDING + 500 + stockrt.COMMIT_BATCH
    assert place.stored() == ids(trades)


def test_trades_that_find_no_room_are_said_and_missing(
    place: Place, caplog: pytest.LogCaptureFixture, mongo_db: tuple[str, str], mongo_proxy: MongoProxy
) -> None:
    """MongoDB is away, and what may wait for it comes to its limit; when it is back nothing more is missing."""
    uri, name = mongo_proxy.uri, mongo_db[1]
    environ = place.environ | {"MONGODB_HOST": uri, "MONGODB_DB_NAME": name, "SPOOL_MAX_MB": "1"}
    trades = trades_of(20_000)
    client: MongoClient[dict[str, Any]]
    with Pipeline(settings_of(environ)) as pipeline, intake_of(pipeline, place) as intake:
        mongo_proxy.down()
        for at in range(0, len(trades), 1000):
            intake.add("crypto", trades[at : at + 1000])
        wait_for("everything is decided", lambda: intake.stored + intake.refused == len(trades))
        assert 0 < intake.refused < len(trades)
        assert "not stored" in intake.trouble and "SPOOL_MAX_MB" in caplog.text and CODES[0] in caplog.text
        (gap,) = place.gaps()
        assert gap["codes"] == [*CODES] and gap["to"] is None
        assert gap["why"].startswith("not stored: ") and "SPOOL_MAX_MB" in gap["why"]
        assert in_chinese(intake.trouble).startswith(f"{'、'.join(CODES)} 未入库：")
        mongo_proxy.up()
        wait_for("what waits is delivered", lambda: not pipeline.store.queue.has_trades())  # type: ignore[union-attr]
        more = trades_of(10, first=len(trades))
        intake.add("crypto", more)
        wait_for("it is stored", lambda: not intake.trouble)
        assert place.gaps()[0]["to"] is not None
        with MongoClient(mongo_db[0]) as client:
            realtime: Collection[dict[str, Any]] = client[name].realtime
            stored = {found["_id"] for found in realtime.find({}, {"_id": 1})}
        assert len(stored) == intake.stored and stored < {*ids(trades + more)}


def test_while_mongodb_is_away_the_disk_takes_what_is_pushed_and_it_arrives_once(
    place: Place, mongo_db: tuple[str, str], mongo_proxy: MongoProxy
) -> None:
    environ = place.environ | {"MONGODB_HOST": mongo_proxy.uri, "MONGODB_DB_NAME": mongo_db[1]}
    trades, listener = trades_of(3000), Listener()
    client: MongoClient[dict[str, Any]]
    with (
        MongoClient(mongo_db[0]) as client,
        Pipeline(settings_of(environ), listener) as pipeline,
        intake_of(pipeline, place) as intake,
    ):
        realtime: Collection[dict[str, Any]] = client[mongo_db[1]].realtime
        intake.add("crypto", trades[:500])
        wait_for("they are in MongoDB", lambda: realtime.count_documents({}) == 500)
        mongo_proxy.down()
        intake.add("crypto", trades[400:2000])
        wait_for("they are on the disk", lambda: listener.waiting >= 1500)
        assert intake.lately()[1] < WAIT_S * 1000 and place.gaps() == []
        mongo_proxy.up()
        intake.add("crypto", trades[2000:])
        wait_for("they are in MongoDB", lambda: realtime.count_documents({}) == 3000)
        assert ids(trades) == sorted(found["_id"] for found in realtime.find({}, {"_id": 1}))
    assert intake.refused == 0


def test_what_is_pushed_waits_for_no_turn_behind_what_waits_already(
    place: Place, mongo_db: tuple[str, str], mongo_proxy: MongoProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unlike a run, which may wait a while for the queue to be delivered."""
    monkeypatch.setattr(stockrt, "CATCH_UP_S", 3600.0)
    environ = place.environ | {"MONGODB_HOST": mongo_proxy.uri, "MONGODB_DB_NAME": mongo_db[1]}
    trades, listener = trades_of(300), Listener()
    client: MongoClient[dict[str, Any]]
    with (
        MongoClient(mongo_db[0]) as client,
        Pipeline(settings_of(environ), listener) as pipeline,
        intake_of(pipeline, place) as intake,
    ):
        assert isinstance(pipeline.store, stockrt.Delivery)
        pipeline.store.keep([stockrt.to_document(trade, stockrt.utc_now()) for trade in trades[:100]])
        mongo_proxy.hang()
        intake.add("crypto", trades[100:])
        wait_for("they are on the disk", lambda: listener.waiting == 300)
        mongo_proxy.resume()
        realtime: Collection[dict[str, Any]] = client[mongo_db[1]].realtime
        wait_for("they are in MongoDB", lambda: realtime.count_documents({}) == 300)


def test_a_mongodb_that_is_slower_than_the_market_is_not_waited_for(
    place: Place, mongo_db: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits in memory goes to the disk, and from there to MongoDB."""
    monkeypatch.setattr(stockrt, "CROWDED", 1000)
    monkeypatch.setattr(stockrt, "CROWDED_S", 0.0)
    environ = place.environ | {"MONGODB_HOST": mongo_db[0], "MONGODB_DB_NAME": mongo_db[1]}
    trades, listener = trades_of(8000), Listener()
    client: MongoClient[dict[str, Any]]
    with (
        MongoClient(mongo_db[0]) as client,
        Pipeline(settings_of(environ), listener) as pipeline,
        intake_of(pipeline, place) as intake,
    ):
        intake.add("crypto", trades)
        wait_for("they are there", lambda: client[mongo_db[1]].realtime.count_documents({}) == 8000)
        wait_for("they are counted", lambda: intake.stored == 8000)
    assert listener.most_waiting and ids(trades) == sorted({*listener.known})


# ------------------------------------------------------------------------------------------- with connections


class Process(Listener):
    """Collects what a vendor pushes, as the daemon does, and looks at what is stored."""

    def __init__(self, place: Place, vendor: Vendor, **environ: str) -> None:
        super().__init__()
        self.place = place
        self.vendor = vendor
        self.environ = place.environ | vendor.settings | {"COLLECT": "stream"} | environ
        self.stats = stockrt.CollectStats()
        self._opened = contextlib.ExitStack()

    def __enter__(self) -> Process:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def collecting(self, stats: stockrt.CollectStats) -> None:
        """Note how it goes on."""
        self.stats = stats

    def start(self) -> None:
        """Open what is needed, and begin."""
        settings = settings_of(self.environ)
        self.pipeline = self._opened.enter_context(Pipeline(settings, self))
        self.it = stockrt.Collecting(self.pipeline, settings, self)
        self._opened.callback(self.it.close)
        self.it.start()

    def stop(self) -> float:
        """End, and return how long it took to be collecting no more."""
        began = time.monotonic()
        self.it.close()
        took = time.monotonic() - began
        self._opened.close()
        return took

    def is_subscribed(self) -> bool:
        """Whether every code of the setting is, and it is known here."""
        codes = self.environ["COLLECT_CODES"].split()
        return len(self.vendor.stream.subscribed) == self.it.stats().codes == len(codes)

    def has_all(self) -> bool:
        """Whether everything is stored that was pushed."""
        return not self.vendor.stream.missing({*self.place.stored()})

    def uncovered(self) -> list[Any]:
        """Return what was pushed while subscribed, is not stored, and not known as missing either."""
        gaps = [
            Gap(gap["product"], frozenset(gap["codes"]), gap["from"] - 1000, (gap["to"] or 1 << 60) + 1000)
            for gap in self.place.gaps()
        ]
        return uncovered(self.vendor.stream.missing({*self.place.stored()}), gaps)


@pytest.fixture
def vendor() -> Iterator[Vendor]:
    """Pushes a few trades a second of every code, with the limits of the largest plan."""
    with Vendor(plans={"test-key": PLANS["pro"]}, rate=20.0) as server:
        yield server


def test_every_push_is_stored_once_and_the_latest_trades_are_fetched(place: Place, vendor: Vendor) -> None:
    codes = " ".join((*CODES, "AAPL.US", "600000.SH"))
    with Process(place, vendor, COLLECT_CODES=codes) as process:
        wait_for("all are subscribed", process.is_subscribed)
        wait_for("much was pushed", lambda: vendor.stream.pushed_count > 300)
        stats = process.it.stats()
        assert (stats.connections, stats.connections_wanted, stats.codes) == (2, 2, 6)
        assert stats.polled == 0 and stats.trouble == ""
        vendor.stream.rate = 0.0
        wait_for("everything is stored", process.has_all)
        wait_for("the latest were fetched", lambda: len(vendor.rest.requests) >= 2)
        assert {*place.stored()} <= vendor.stream.made() and place.gaps() == []
        stats = process.it.stats()
        assert {one["product"]: one["subscribed"] for one in stats.streams} == {"crypto": 4, "stock": 2}
        assert stats.gaps_open == 0
        wait_for(
            "it is told", lambda: process.stats.trades > 300 and not math.isnan(process.stats.delay_p99_ms)
        )
    assert vendor.stream.violations == []


@pytest.mark.parametrize("cut", ["fin", "rst", "mid_frame", "close"])
def test_a_cut_leaves_a_gap_that_covers_what_is_missing(place: Place, vendor: Vendor, cut: str) -> None:
    with Process(place, vendor, COLLECT_CODES=" ".join(CODES)) as process:
        wait_for("all are subscribed", process.is_subscribed)
        wait_for("much was pushed", lambda: vendor.stream.pushed_count > 50)
        asked = len(vendor.rest.requests)
        vendor.stream.cut(cut)
        wait_for("the gap is noted, and over", lambda: [gap for gap in place.gaps() if gap["to"]])
        assert process.is_subscribed()
        wait_for("the latest are fetched", lambda: len(vendor.rest.requests) > asked)
        before = vendor.stream.pushed_count
        wait_for("pushes come again", lambda: vendor.stream.pushed_count > before + 25)
        vendor.stream.rate = 0.0
        wait_for("everything is stored or known as missing", lambda: not process.uncovered())
        (gap,) = place.gaps()
        assert gap["codes"] == [*CODES] and 0 < gap["to"] - gap["from"] < WAIT_S * 1000
        assert gap["why"].startswith("connection ") and gap["why"].isascii()  # as other programs read it
        assert {*place.stored()} <= vendor.stream.made()


@pytest.mark.parametrize("trades_go_on", [True, False], ids=["deaf", "quiet"])
def test_a_silence_in_which_there_were_trades_is_a_gap(
    place: Place, vendor: Vendor, monkeypatch: pytest.MonkeyPatch, trades_go_on: bool
) -> None:
    """The connection lives, and says nothing: what is fetched afterwards tells whether there was something to say."""
    monkeypatch.setattr(stockrt, "SILENCE_S", 1.0)
    monkeypatch.setattr(stockrt, "ACK_S", 1.0)
    with Process(place, vendor, COLLECT_CODES=CODES[0]) as process:
        wait_for("it is subscribed", process.is_subscribed)
        wait_for("much was pushed", lambda: vendor.stream.pushed_count > 10)
        vendor.stream.rate = 0.0
        wait_for("everything is stored", process.has_all)
        asked = len(vendor.rest.requests)
        if trades_go_on:
            vendor.stream.new_trade(CODES[0])
            wait_for("the gap is noted", place.gaps)
            (gap,) = place.gaps()
            assert gap["codes"] == [CODES[0]] and gap["from"] < gap["to"] and "although" in gap["why"]
        else:
            wait_for("it is fetched anew", lambda: len(vendor.rest.requests) > asked)
            assert place.gaps() == []
        assert len(vendor.stream.connections) == 1


def test_much_that_waits_at_the_end_is_kept_in_time(place: Place, mongo_db: tuple[str, str]) -> None:
    environ = place.environ | {"MONGODB_HOST": mongo_db[0], "MONGODB_DB_NAME": mongo_db[1]}
    trades = trades_of(stockrt.MOST_PENDING)
    client: MongoClient[dict[str, Any]]
    with MongoClient(mongo_db[0]) as client, Pipeline(settings_of(environ)) as pipeline:
        with intake_of(pipeline, place) as intake:
            for at in range(0, len(trades), 1000):
                intake.add("crypto", trades[at : at + 1000])
            intake.close(WAIT_S)
            assert intake.stored == len(trades) and intake.refused == 0
        realtime: Collection[dict[str, Any]] = client[mongo_db[1]].realtime
        wait_for("all of it arrives", lambda: realtime.count_documents({}) == len(trades))


def test_a_stop_is_quick_loses_nothing_and_leaves_a_gap_for_the_next_start(
    place: Place, vendor: Vendor
) -> None:
    process = Process(place, vendor, COLLECT_CODES=" ".join(CODES))
    process.start()
    wait_for("all are subscribed", process.is_subscribed)
    wait_for("much was pushed", lambda: vendor.stream.pushed_count > 100)
    assert process.stop() < WAIT_S / 10
    assert place.gaps() == []
    with Process(place, vendor, COLLECT_CODES=" ".join(CODES)) as process:
        wait_for("the gap is over", lambda: [gap for gap in place.gaps() if gap["to"]])
        vendor.stream.rate = 0.0
        wait_for("everything is stored or known as missing", lambda: not process.uncovered())
        (gap,) = place.gaps()
        assert (gap["codes"], gap["why"]) == ([*CODES], "stockrt was stopped")


def test_what_a_plan_does_not_allow_is_polled_instead(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    codes = [f"{chr(65 + n)}{chr(65 + n)}USDT" for n in range(12)]
    with (
        Vendor(plans={"test-key": PLANS["free"]}, rate=5.0, market=codes) as vendor,
        Process(place, vendor, COLLECT_CODES=" ".join(codes)) as process,
    ):
        wait_for("as many are subscribed as may be", lambda: process.it.stats().codes == 10)
        polled = {*codes} - {*vendor.stream.subscribed}
        wait_for("the others are polled", lambda: {name.split("|")[0] for name in place.stored()} >= polled)
        assert process.it.stats().polled == len(polled) == 2
        assert "2 codes polled instead" in caplog.text and vendor.stream.violations == []


def test_a_plan_that_is_told_late_gives_the_codes_their_connections(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stockrt, "PLAN_RETRY_S", 0.1)
    monkeypatch.setattr(stockrt, "LIMITS_AGAIN_S", 0.1)
    codes = [f"{chr(65 + n)}{chr(65 + n)}USDT" for n in range(12)]
    with Vendor(plans={"test-key": PLANS["pro"]}) as vendor:
        vendor.rest.script = [REFUSALS["500_json"]]
        with Process(place, vendor, COLLECT_CODES=" ".join(codes)) as process:
            wait_for("the smallest plan holds", lambda: process.it.stats().codes == 10)
            wait_for("all are subscribed", process.is_subscribed)
            assert place.gaps() == []


def test_a_key_that_the_stream_refuses_is_not_dialled_with_again(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One line, however many connections were to be; and each of them was dialled once."""
    monkeypatch.setattr(stockrt, "POLL_INSTEAD_S", 0.5)
    for name in ("STREAM_FIRST_S", "STREAM_CAP_S"):  # another dial would come at once
        monkeypatch.setattr(stockrt, name, 0.1)
    plan = replace(PLANS["pro"], sockets=2, symbols_per_socket=2, symbols=4)
    with Vendor(plans={"test-key": plan}, market=CODES, rate=5.0) as vendor:
        vendor.stream.refuse_handshakes(*[401] * 50)
        with Process(place, vendor, COLLECT_CODES=" ".join(CODES)) as process:
            wait_for("it is said", lambda: "401" in process.it.stats().trouble)
            wait_for("the codes are polled", lambda: process.it.stats().polled == len(CODES))
            wait_for(
                "the codes are stored", lambda: len({name.split("|")[0] for name in place.stored()}) == 4
            )
            assert process.it.stats().connections_wanted == 0
            assert "401" in in_chinese(process.it.stats().trouble, "Token invalid")
            assert caplog.text.count("401") == 1 and "polled instead" in caplog.text
            assert len(vendor.stream.connections) == 2
            wait_for("why is said", lambda: "no key is of use" in caplog.text)
            assert "plans allow" not in caplog.text


def test_a_change_of_the_watch_list_takes_effect_without_a_restart(
    place: Place, vendor: Vendor, mongo_db: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stockrt, "LOOK_EVERY_S", 0.2)
    client: MongoClient[dict[str, Any]]
    with MongoClient(mongo_db[0]) as client:
        watch: Collection[dict[str, Any]] = client[mongo_db[1]].stock_watch
        realtime: Collection[dict[str, Any]] = client[mongo_db[1]].realtime
        watch.insert_many([{"code": code} for code in CODES[:2]])
        environ = {"COLLECT_CODES": "watch", "MONGODB_HOST": mongo_db[0], "MONGODB_DB_NAME": mongo_db[1]}
        with Process(place, vendor, **environ) as process:
            wait_for("they are subscribed", lambda: {*vendor.stream.subscribed} == {*CODES[:2]})
            watch.delete_one({"code": CODES[0]})
            watch.insert_one({"code": CODES[3]})
            wait_for("they are subscribed", lambda: {*vendor.stream.subscribed} == {CODES[1], CODES[3]})
            wait_for("it is stored", lambda: realtime.find_one({"s": CODES[3]}))
            assert process.it.stats().connections == 1 and place.gaps() == []


def test_that_codes_are_polled_instead_is_told_at_once(
    place: Place, vendor: Vendor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stockrt, "MARK_SILENT_S", 1000.0)
    monkeypatch.setattr(stockrt, "POLL_SOON_S", 1.0)
    vendor.stream.refuse_handshakes(429)
    with Process(place, vendor, COLLECT_CODES=" ".join(CODES)) as process:
        wait_for("it is told", lambda: process.stats.polled == len(CODES))


def test_codes_are_polled_however_often_it_is_dialled_in_vain(
    place: Place, vendor: Vendor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stockrt, "STREAM_CAP_S", 0.5)
    monkeypatch.setattr(stockrt, "POLL_SOON_S", 3.0)
    vendor.stream.refuse_handshakes(*[REFUSE_BY_RESET] * 1000)
    with Process(place, vendor, COLLECT_CODES=" ".join(CODES)) as process:
        wait_for("they are polled", lambda: process.it.stats().polled == len(CODES))
        assert len(vendor.stream.connections) > 2


@pytest.mark.long
def test_what_cannot_be_fetched_after_a_gap_is_fetched_later(
    place: Place, vendor: Vendor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stockrt, "POLL_INSTEAD_S", 0.5)
    vendor.stream.rate = 0.0
    with Process(place, vendor, COLLECT_CODES=CODES[0]) as process:
        wait_for("it is subscribed", process.is_subscribed)
        vendor.rest.script = lambda _: REFUSALS["503_html"]
        vendor.stream.cut("rst")
        wait_for("the gap is over", lambda: [gap for gap in place.gaps() if gap["to"]])
        missed = vendor.stream.new_trade(CODES[0])
        wait_for("it was in vain", lambda: "Infoway: " in caplog.text)
        vendor.rest.script = []
        wait_for("it is stored", lambda: identity(missed) in place.stored())


@pytest.mark.long
def test_a_silence_is_judged_as_soon_as_the_latest_trades_can_be_fetched(
    place: Place, vendor: Vendor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stockrt, "POLL_INSTEAD_S", 0.5)
    monkeypatch.setattr(stockrt, "SILENCE_S", 2.0)
    monkeypatch.setattr(stockrt, "ACK_S", 1.0)
    vendor.stream.rate = 0.0
    with Process(place, vendor, COLLECT_CODES=CODES[0]) as process:
        wait_for("it is subscribed", process.is_subscribed)
        wait_for("its latest trade is there", lambda: place.stored())
        vendor.rest.script = lambda _: REFUSALS["503_html"]
        missed = vendor.stream.new_trade(CODES[0])
        wait_for("it cannot be fetched", lambda: "Infoway: " in caplog.text)
        assert place.gaps() == []
        vendor.rest.script = []
        wait_for("it is known that it is missing", place.gaps)
        gap = place.gaps()[0]
        assert "nothing was pushed" in gap["why"] and gap["from"] <= missed["t"] <= gap["to"]


def test_other_codes_take_over_a_connection_that_has_none_any_more(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that may have one connection, which counts for a while after its end."""
    monkeypatch.setattr(stockrt, "LOOK_EVERY_S", 0.2)
    listed = place.directory.parent / "codes"
    listed.write_text(f"{CODES[0]}\n")
    with (
        Vendor(plans={"test-key": PLANS["free"]}, linger_s=60.0) as vendor,
        Process(place, vendor, COLLECT_CODES=f"@{listed}"),
    ):
        wait_for("it is subscribed", lambda: {*vendor.stream.subscribed} == {CODES[0]})
        listed.write_text(f"{CODES[1]}\n{CODES[2]}\n")
        wait_for("the others are", lambda: {*vendor.stream.subscribed} == {*CODES[1:3]})
        assert len(vendor.stream.connections) == 1 and vendor.stream.violations == []


def test_a_connection_that_begins_as_all_end_ends_too(
    place: Place, vendor: Vendor, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = stockrt.Planner._begin

    def begin_late(planner: stockrt.Planner, allotment: stockrt.Allotment) -> stockrt.Feed:
        feed = begin(planner, allotment)
        planner.leave()  # whoever ends all has told those that there were
        return feed

    monkeypatch.setattr(stockrt.Planner, "_begin", begin_late)
    with Process(place, vendor, COLLECT_CODES=CODES[0]) as process:
        wait_for("there is one", lambda: process.it._planner.feeds)
        wait_for("it has ended", lambda: not process.it._planner.feeds[0].is_alive())


def test_one_process_in_a_state_directory_collects(place: Place, vendor: Vendor) -> None:
    with (
        Process(place, vendor, COLLECT_CODES=CODES[0]) as process,
        pytest.raises(stockrt.StoreError, match="another stockrt collects from the stream in") as caught,
    ):
        stockrt.Collecting(process.pipeline, settings_of(process.environ)).start()
    assert in_chinese(caught.value.message).startswith("已有另一个 stockrt 在接收推送流，目录为 ")


@pytest.mark.parametrize(
    ("environ", "words"),
    [({"INFOWAY_API_KEY": ""}, "INFOWAY_API_KEY"), ({"COLLECT_CODES": "watch"}, "MONGODB_HOST")],
)
def test_what_cannot_be_collected_is_said(
    place: Place, vendor: Vendor, environ: dict[str, str], words: str
) -> None:
    process = Process(place, vendor, **{"COLLECT_CODES": CODES[0]} | environ)
    process.environ |= environ
    with pytest.raises(stockrt.SettingsError, match=words) as caught:
        process.start()
    assert words in in_chinese(caught.value.message)
    process.stop()


def test_without_a_stream_the_codes_are_polled_on_a_beat(place: Place, vendor: Vendor) -> None:
    environ = {"COLLECT": "", "COLLECT_EVERY": "1", "COLLECT_CODES": " ".join(CODES)}
    with Process(place, vendor, **environ) as process:
        wait_for("they are polled", lambda: process.stats.polled == len(CODES) and process.stats.stored)
        assert vendor.stream.connections == []


# ------------------------------------------------------------------------------------------- what hangs


class Watched(Process):
    """It has a service manager with a watchdog of a fifth of a second."""

    def __init__(self, manager: ServiceManager, place: Place, vendor: Vendor, **environ: str) -> None:
        super().__init__(place, vendor, COLLECT_CODES=CODES[0], **environ)
        self._manager = manager
        notifier = stockrt.Notifier(manager.address)
        self._service = stockrt.Service(settings_of(self.environ), notifier, watchdog_s=0.2)

    def __enter__(self) -> Watched:
        self.start()
        return self

    def works(self, is_at_work: bool) -> None:
        """Pass it on."""
        self._service.works(is_at_work)

    def pats(self, seconds: float) -> int:
        """Turn the socket's loop for so long, and return how many signs of life were given."""
        before, until = len(self._manager.beats), time.monotonic() + seconds
        while time.monotonic() < until:
            self._service.tick(0, 0)
            time.sleep(0.02)
        return len(self._manager.beats) - before


@pytest.mark.parametrize(("collects", "hangs"), [("stream", "store"), ("stream", "list"), ("", "list")])
def test_a_thread_that_hangs_ends_the_signs_of_life(
    place: Place, vendor: Vendor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, collects: str, hangs: str
) -> None:
    """A poll waits for its store as a run does, and shows meanwhile that it goes on."""
    stuck, let_go = threading.Event(), threading.Event()
    look = stockrt.WatchList.codes

    def codes(watch: stockrt.WatchList, fresh: bool = False) -> Sequence[str]:
        if stuck.is_set():
            let_go.wait(WAIT_S)
        return look(watch, fresh)

    monkeypatch.setattr(stockrt.WatchList, "codes", codes)
    with (
        ServiceManager(tmp_path) as manager,
        Watched(manager, place, vendor, COLLECT=collects, COLLECT_EVERY="" if collects else "1") as process,
        contextlib.ExitStack() as held,
    ):
        wait_for("something is stored", place.stored)
        assert process.pats(0.8)  # it waits for pushes, or for a beat
        if hangs == "store":
            assert isinstance(process.pipeline.store, stockrt.SqliteStore)
            held.enter_context(process.pipeline.store._file.lock)
        else:
            stuck.set()
            process.it._coverage.news.set()
        wait_for("no sign of life", lambda: not process.pats(0.5))
        held.close()
        stuck.clear()
        let_go.set()
        wait_for("they are given again", lambda: process.pats(0.5))
