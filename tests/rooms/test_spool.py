"""The promises of the spool: what MongoDB does not take waits here, and arrives once, in order."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import itertools
import json
import logging
import os
import pty
import random
import re
import sqlite3
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pymongo
import pytest
from conftest import RunPyz, controlled, unavailable, unprivileged
from kit.daemons import PATIENCE, ThreadDaemon, settings_for, until
from kit.infoway_server import InfowayServer
from kit.mongo import INTERRUPTED_AT_SHUTDOWN, ON_COLLECTIONS, UNAUTHORIZED, MongoServer
from kit.mongo_proxy import Fate, MongoProxy, Without
from kit.platform_server import PlatformServer
from kit.trades import CREATED, by_id, make_documents, settings_of

import stockrt
from stockrt import (
    Close,
    Document,
    Drain,
    MongoStore,
    QueueStats,
    Spool,
    SpooledStore,
    SpoolFull,
    SqliteStore,
    StoreAway,
    StoreError,
    WriteReport,
)

# A fault that is made up is no change that the server tells of: that it is well is learnt at the next heartbeat.
QUICK = "serverSelectionTimeoutMS=1000&timeoutMS=1000&heartbeatFrequencyMS=500"
MEGABYTE = 1 << 20
HASH = "a1b2c3d4e5f6"


def quick(uri: str) -> str:
    """Return the URI with short time limits."""
    return f"{uri}{'&' if '?' in uri else '?'}{QUICK}"


class Place:
    """A database, and a state directory beside it."""

    def __init__(self, uri: str, name: str, state: Path, **more: str) -> None:
        self.uri, self.name, self.state = uri, name, state
        self.environ = {
            "MONGODB_HOST": quick(uri), "MONGODB_DB_NAME": name, "STATE_DIRECTORY": str(state), **more,
        }  # fmt: skip
        self.facts: list[QueueStats] = []

    @contextlib.contextmanager
    def opened(self) -> Iterator[SpooledStore]:
        """Yield the store that the settings ask for."""
        store = stockrt.open_store(settings_of(self.environ), self.facts.append)
        assert isinstance(store, SpooledStore)
        with contextlib.closing(store):
            yield store

    @contextlib.contextmanager
    def collection(self, name: str = "realtime") -> Iterator[pymongo.collection.Collection[Document]]:
        """Yield a collection, through a client of the test's own."""
        with pymongo.MongoClient[Document](self.uri, tz_aware=True) as client:
            yield client[self.name][name]

    def documents(self, name: str = "realtime") -> list[Document]:
        """Return what is in MongoDB, by `_id`."""
        with self.collection(name) as collection:
            return list(collection.find().sort("_id", 1))

    def waiting(self) -> list[str]:
        """Return the `_id` of what waits, in order of arrival."""
        with contextlib.closing(sqlite3.connect(self.state / stockrt.SQLITE_NAME)) as db:
            return [name for (name,) in db.execute("SELECT _id FROM realtime ORDER BY seq")]


@pytest.fixture
def place(mongo_db: tuple[str, str], tmp_path: Path) -> Place:
    """An empty database and an empty state directory."""
    return Place(*mongo_db, tmp_path / "state")


@pytest.fixture
def away(mongo_server: MongoServer) -> Iterator[MongoServer]:
    """The server, killed; the test may start it again."""
    controlled(mongo_server).kill()
    try:
        yield mongo_server
    finally:
        mongo_server.ensure_running()


def drainers() -> int:
    """Return how many threads move what waits."""
    return sum(thread.name == "stockrt-drainer" for thread in threading.enumerate())


def nothing_waits(store: SpooledStore) -> bool:
    """Say whether the spool is empty."""
    return store.spool.is_empty()


# ------------------------------------------------------------------------------------------------ away and back


def test_what_mongodb_does_not_take_waits_and_arrives(place: Place, away: MongoServer) -> None:
    with place.opened() as store:
        report = store.write(make_documents(12))
        assert (report.stored, report.known, report.kept, dict(report.refused)) == (0, 0, 12, {})
        assert re.fullmatch(r"MongoDB unreachable since \d\d:\d\d", report.kept_because)
        assert place.waiting() == [d["_id"] for d in make_documents(12)]
        away.restart()
        store.start(lambda documents: None)
        assert until(lambda: nothing_waits(store))
    assert place.documents() == by_id(make_documents(12))
    assert place.waiting() == []


def test_while_mongodb_is_away_only_the_first_write_waits_for_it(place: Place, away: MongoServer) -> None:
    took = []
    with place.opened() as store:
        for number in range(20):
            began = time.monotonic()
            assert store.write(make_documents(5, first=5 * number)).kept == 5
            took.append(time.monotonic() - began)
    assert sum(took[1:]) < took[0] * 5  # asked each time it would be 19 times as much
    assert len(place.waiting()) == 100


def test_new_trades_queue_up_behind_those_that_wait(place: Place, away: MongoServer) -> None:
    old, new = make_documents(3000), make_documents(5, first=2995, created=CREATED + timedelta(hours=1))
    later = [d | {"t": d["t"] + 1, "_id": d["_id"].replace(str(d["t"]), str(d["t"] + 1))} for d in new]
    with place.opened() as store:
        for first in range(0, 3000, 1000):
            store.write(old[first : first + 1000])
        away.restart()
        report = store.write(later)
        assert report.stored + report.kept == 5
        assert until(lambda: nothing_waits(store))
    with place.collection() as collection:
        arrived = [document["_id"] for document in collection.find()]  # as they stand in the file
    assert arrived == [document["_id"] for document in old + later]


def test_with_mongodb_back_a_write_waits_for_its_turn_and_is_no_failure(
    place: Place, away: MongoServer
) -> None:
    with place.opened() as store:
        assert store.write(make_documents(50)).kept == 50
    away.restart()
    with place.opened() as store:
        assert store.write(make_documents(60)) == WriteReport(10, 50)
    assert len(place.documents()) == 60


def test_what_waits_moves_in_the_next_process_without_any_write(place: Place, away: MongoServer) -> None:
    with place.opened() as store:
        store.write(make_documents(7))
    away.restart()
    with place.opened() as store:
        store.start(lambda documents: None)
        assert until(lambda: nothing_waits(store))
    assert len(place.documents()) == 7
    assert until(lambda: place.facts[-1].trades == 0)


def test_the_thread_that_moves_is_there_only_while_something_waits(place: Place) -> None:
    assert until(lambda: not drainers())  # of tests before
    Spool(place.state, MEGABYTE << 10).write(make_documents(7))
    with place.opened() as store:
        assert drainers() == 0
        store.start(lambda documents: None)
        assert until(lambda: nothing_waits(store) and not drainers())
        store.write(make_documents(9))
        assert drainers() == 0
    assert len(place.documents()) == 9


def test_a_server_that_hangs_is_one_that_is_away(place: Place, mongo_server: MongoServer) -> None:
    controlled(mongo_server)
    with place.opened() as store:
        assert store.write(make_documents(1)).stored == 1
        mongo_server.pause()
        try:
            report = store.write(make_documents(20))
        finally:
            mongo_server.resume()
        assert report.kept == 20 and "unreachable" in report.kept_because
        assert until(lambda: nothing_waits(store))
    assert len(place.documents()) == 20


def test_a_goodbye_that_is_not_answered_holds_nobody_up(place: Place, mongo_server: MongoServer) -> None:
    mongo = MongoStore(settings_of(place.environ | {"MONGODB_HOST": place.uri}))
    assert mongo.write(make_documents(1)).stored == 1
    goodbye = threading.Thread(target=mongo.close, daemon=True)
    with controlled(mongo_server).failing("endSessions", block_ms=4_000 * int(PATIENCE), app_name="stockrt"):
        goodbye.start()
        goodbye.join(PATIENCE)
        assert not goodbye.is_alive()


def test_what_was_stored_before_there_was_a_mongodb_moves_over(place: Place) -> None:
    with contextlib.closing(SqliteStore(place.state)) as alone:
        alone.write(make_documents(10))
        alone.write([d | {"demo": True} for d in make_documents(5, first=100)])
        alone.write(make_documents(20))
        alone.write_closes([a_close(number) for number in range(3)])
    with place.opened() as store:
        store.start(lambda documents: None)
        assert until(lambda: nothing_waits(store))
    assert place.documents() == by_id(make_documents(20))
    closes = place.documents("close")
    assert [c["_id"] for c in closes] == [a_close(number).key for number in range(3)]
    assert [c.get("half_day") for c in closes] == [None, True, None]
    assert place.waiting() == [d["_id"] for d in make_documents(5, first=100)]  # synthetic: of this machine


def a_close(number: int) -> Close:
    """Return a close; the second one of a half day."""
    (document,) = make_documents(1, first=number)
    return Close(document, "2026-08-14", half_day=number == 1)


def test_closes_follow_from_trades_when_they_arrive(place: Place, away: MongoServer) -> None:
    settled: list[Document] = []
    with place.opened() as store:
        store.start(settled.extend)
        store.write(make_documents(30))
        assert not settled
        away.restart()
        assert until(lambda: nothing_waits(store))
    assert settled == make_documents(30)


def test_a_close_that_mongodb_does_not_take_now_is_made_later(place: Place, away: MongoServer) -> None:
    """The trades are in MongoDB, it goes away before their closes are."""
    documents = make_documents(4)
    with place.opened() as store:
        store.start(stockrt.ClosingPrices(store, None).settle)
        closer = stockrt.ClosingPrices(store, None, postpone=store.postpone)
        closer.settle(documents)
        assert place.waiting() == [] and store.spool.count_unsettled() == len(documents)
        away.restart()
        assert until(lambda: nothing_waits(store))
    assert [c["s"] for c in place.documents("close")] == [d["s"] for d in documents]


def test_numbers_are_converted_when_they_move(mongo_db: tuple[str, str], tmp_path: Path) -> None:
    place = Place(*mongo_db, tmp_path / "state", MONGODB_NUMERIC_TYPE="decimal")
    Spool(place.state, MEGABYTE << 10).write(make_documents(3))
    with place.opened() as store:
        store.start(lambda documents: None)
        assert until(lambda: nothing_waits(store))
    found = place.documents()
    assert [str(d["p"]) for d in found] == [d["p"] for d in make_documents(3)]
    assert {type(d["p"]).__name__ for d in found} == {"Decimal128"}
    assert [d["create_time"] for d in found] == [CREATED] * 3


def test_a_batch_that_is_cut_short_by_a_fault_of_the_local_file_moves_again(place: Place) -> None:
    """Written to MongoDB, not yet taken out here, killed: it moves once more and is known."""
    spool = Spool(place.state, MEGABYTE << 10)
    spool.write(make_documents(10))
    mongo = MongoStore(settings_of(place.environ))
    with contextlib.closing(mongo), contextlib.closing(spool):
        mongo.write(spool.oldest(6).documents)
        drain = Drain(spool, mongo, lambda documents: None)
        assert (drain.step(), drain.step()) == (10, 0)
    assert place.documents() == by_id(make_documents(10))


def test_a_name_that_the_dns_does_not_know_now_is_a_mongodb_that_is_away(tmp_path: Path) -> None:
    place = Place("mongodb+srv://nowhere.invalid/", "x", tmp_path)
    with place.opened() as store:
        report = store.write(make_documents(2))
    assert report.kept == 2 and re.fullmatch(
        r"MongoDB takes no writes since \d\d:\d\d \(.+\)", report.kept_because
    )


# ------------------------------------------------------------------------------------------------ refused for good


def refuse(place: Place, document: Document) -> None:
    """Let MongoDB refuse a trade for good: an index of the operator's forbids its price a second time."""
    with place.collection() as collection:
        collection.create_index([("p", 1), ("vw", 1), ("t", 1)], unique=True)
        collection.insert_one(document | {"_id": "the operator's own"})


def with_own_prices(documents: Sequence[Document]) -> list[Document]:
    """Return trades no two of which have the same price."""
    return [
        d | {"p": f"{number}.5", "_id": f"{d['s']}|{d['t']}|{number}.5|{d['v']}|{d['td']}"}
        for number, d in enumerate(documents)
    ]


@pytest.mark.parametrize("way", ["directly", "from the spool"])
def test_a_poison_document_is_put_aside_and_holds_nobody_up(
    place: Place, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    documents = with_own_prices(make_documents(1000))
    poison = documents[500]
    refuse(place, poison)
    if way != "directly":
        Spool(place.state, MEGABYTE << 10).write(documents)
    with place.opened() as store:
        if way == "directly":
            report = store.write(documents)
            assert report.stored == 999 and list(report.refused) == [poison["_id"]]
        else:
            store.start(lambda documents: None)
            assert until(lambda: nothing_waits(store))
            assert until(lambda: poison["_id"] in caplog.text and place.facts[-1].rejects)
        (reject,) = store.spool.rejects()
    assert reject["_id"] == poison["_id"] and reject["collection"] == "realtime"
    assert re.search(r"duplicate key|E11000", reject["reason"])
    assert {name: reject["document"][name] for name in ("s", "t", "p", "v", "vw", "td")} == {
        name: poison[name] for name in ("s", "t", "p", "v", "vw", "td")
    }
    names = {d["_id"] for d in documents} - {poison["_id"]}
    assert {d["_id"] for d in place.documents()} == names | {"the operator's own"}
    assert place.waiting() == []
    assert place.facts[-1].rejects == 1


def test_while_nothing_can_be_written_no_document_is_taken_for_poison(
    place: Place, away: MongoServer
) -> None:
    spool = Spool(place.state, MEGABYTE << 10)
    spool.write(make_documents(3))
    environ = place.environ | {"MONGODB_HOST": place.environ["MONGODB_HOST"].replace("=1000", "=100")}
    with contextlib.closing(MongoStore(settings_of(environ))) as mongo:
        drain = Drain(spool, mongo, lambda documents: None)
        for _ in range(stockrt.POISON_TRIES + 1):
            with pytest.raises(StoreAway):
                drain.step()
    assert spool.rejects() == [] and len(place.waiting()) == 3


def test_numbers_that_do_not_fit_are_refused_by_name(mongo_db: tuple[str, str], tmp_path: Path) -> None:
    place = Place(*mongo_db, tmp_path / "state", MONGODB_NUMERIC_TYPE="decimal")
    documents = make_documents(3)
    documents[1] |= {"vw": "1." + "2" * 60}
    with place.opened() as store:
        report = store.write(documents)
        assert report.stored == 2 and "MONGODB_NUMERIC_TYPE" in report.refused[documents[1]["_id"]]
        assert [r["_id"] for r in store.spool.rejects()] == [documents[1]["_id"]]


def test_a_document_that_the_disk_has_changed_is_not_passed_on(place: Place) -> None:
    spool = Spool(place.state, MEGABYTE << 10)
    spool.write(make_documents(3))
    with contextlib.closing(sqlite3.connect(spool.path)) as db, db:
        db.execute("UPDATE realtime SET p = '1' WHERE seq = 2")
    with place.opened() as store:
        store.start(lambda documents: None)
        assert until(lambda: nothing_waits(store))
        (reject,) = store.spool.rejects()
    assert reject["_id"] == make_documents(3)[1]["_id"] and "damaged" in reject["reason"]
    assert len(place.documents()) == 2


def test_a_local_file_that_fails_keeps_nothing_from_mongodb(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    documents = with_own_prices(make_documents(3))
    refuse(place, documents[1])
    with place.opened() as store:
        with contextlib.closing(sqlite3.connect(store.spool.path)) as db:
            db.executescript("DROP TABLE realtime; DROP TABLE rejects")
        report = store.write(documents)
        assert store.write(documents[:1]).known == 1
    assert report.stored == 2 and list(report.refused) == [documents[1]["_id"]]
    assert f"{documents[1]['_id']} cannot be put aside" in caplog.text
    assert caplog.text.count("what waits for MongoDB: ") == 1, "a trouble that goes on is said once"


def forbidden(server: MongoServer, place: Place, name: str) -> contextlib.AbstractContextManager[object]:
    """Let the server do nothing with a collection, for want of a right, while the block lasts."""
    return controlled(server).failing(
        *ON_COLLECTIONS, error_code=UNAUTHORIZED, namespace=f"{place.name}.{name}"
    )


@pytest.mark.parametrize("may_write_beside", [True, False])
def test_a_poison_document_is_put_aside_whatever_else_the_user_may_write(
    place: Place, mongo_proxy: MongoProxy, mongo_server: MongoServer, may_write_beside: bool
) -> None:
    """The server hangs up on it. It is tried whether another document can be written, if need be among the trades."""
    documents = make_documents(5)
    poison = documents[2]["_id"]
    mongo_proxy.on_insert = lambda insert: Fate.CUT_BEFORE if poison in insert.ids else None
    spool = Spool(place.state, MEGABYTE << 10)
    spool.write(documents)
    environ = place.environ | {"MONGODB_HOST": quick(mongo_proxy.uri)}
    with contextlib.ExitStack() as stack:
        if not may_write_beside:
            stack.enter_context(forbidden(mongo_server, place, "license_usage"))
        mongo = stack.enter_context(contextlib.closing(MongoStore(settings_of(environ))))
        stack.enter_context(contextlib.closing(spool))
        drain = Drain(spool, mongo, lambda documents: None)
        for _ in range(3 * stockrt.POISON_TRIES):
            with contextlib.suppress(StoreAway):
                drain.step()
        assert spool.is_empty()
        assert [r["_id"] for r in spool.rejects()] == [poison]
    assert place.documents() == by_id([d for d in documents if d["_id"] != poison])


def test_a_second_absence_is_told_from_its_own_beginning(
    place: Place, mongo_proxy: MongoProxy, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where nothing could be kept during the first: nothing has to be moved when MongoDB is back."""
    place.environ |= {"MONGODB_HOST": quick(mongo_proxy.uri), "SPOOL_MAX_MB": "1"}
    with place.opened() as store:
        store.spool._max_bytes = 0
        mongo_proxy.down()
        with pytest.raises(StoreError, match="unreachable since"):
            store.write(make_documents(1))
        mongo_proxy.up()
        with caplog.at_level(logging.INFO, "stockrt"):
            assert store.write(make_documents(1)).stored == 1
        assert "MongoDB: well again" in caplog.text
        mongo_proxy.down()
        store.spool._max_bytes = MEGABYTE
        began = stockrt.utc_now()
        assert store.write(make_documents(1, first=7)).kept == 1
        assert store._away_since >= began


# ---------------------------------------------------------------------------------------------- closes that fail


@pytest.fixture
def no_closes(place: Place, mongo_server: MongoServer) -> Iterator[contextlib.ExitStack]:
    """MongoDB lets nobody write closes, until this is closed."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(forbidden(mongo_server, place, "close"))
        yield stack


def settle_into(store: SpooledStore) -> Callable[[Sequence[Document]], None]:
    """Return what the drainer does with trades that arrived."""
    return stockrt.ClosingPrices(store, None).settle


def test_closes_that_cannot_be_made_keep_no_trade_waiting(
    place: Place, no_closes: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stockrt, "CATCH_UP_S", PATIENCE)
    Spool(place.state, MEGABYTE << 10).write(make_documents(2500))
    with place.opened() as store:
        store.start(settle_into(store))
        for first in (3000, 3010):  # in its turn, then at once
            report = store.write(make_documents(10, first=first))
            assert (report.stored, report.kept) == (10, 0)
        assert len(place.documents()) == 2520
        assert store.spool.count_unsettled() == 2500
        no_closes.close()
        assert until(lambda: nothing_waits(store))
    assert len(place.documents("close")) == 2500


def test_closes_that_cannot_be_made_are_said_once_and_their_end_too(
    place: Place, no_closes: contextlib.ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "stockrt")
    Spool(place.state, MEGABYTE << 10).write(make_documents(5))
    with place.opened() as store:
        store.start(settle_into(store))
        assert until(lambda: "closing snapshot: " in caplog.text)
        assert all(store.write(make_documents(1, first=100 + n)).stored for n in range(5))
        assert caplog.text.count("closing snapshot: ") == 1 and "MongoDB: " not in caplog.text
        no_closes.close()
        assert until(lambda: "closing snapshot: well again" in caplog.text)


def test_trades_that_come_while_closes_fail_are_moved_at_once(
    place: Place, no_closes: contextlib.ExitStack, mongo_server: MongoServer
) -> None:
    """However long the drainer would rest before it tries the closes again."""
    Spool(place.state, MEGABYTE << 10).write(make_documents(5))
    with place.opened() as store:
        asked = itertools.count()  # for trades first, then for closes, then for trades again
        store._delays = lambda: iter([3600.0 if next(asked) == 1 else 0.1] * 9999)  # type: ignore[method-assign]
        store.start(settle_into(store))
        assert until(lambda: store._close_trouble.there)
        with mongo_server.failing(*ON_COLLECTIONS, error_code=INTERRUPTED_AT_SHUTDOWN):
            assert store.write(make_documents(3, first=50)).kept == 3
        assert until(lambda: not store.spool.has_trades())
    assert len(place.documents()) == 8


def test_drain_ends_where_closes_cannot_be_made(
    place: Place, no_closes: contextlib.ExitStack, run_pyz: RunPyz
) -> None:
    Spool(place.state, MEGABYTE << 10).keep_unsettled(make_documents(2, first=50))
    Spool(place.state, MEGABYTE << 10).write(make_documents(5))
    done = run_pyz("--drain", env=environment(place))
    assert done.returncode == 1 and "5 moved to" in done.stderr and "Unauthorized" in done.stderr
    assert len(place.documents()) == 5
    no_closes.close()
    assert run_pyz("--drain", env=environment(place)).returncode == 0
    assert len(place.documents("close")) == 7


def test_refused_and_damaged_trades_make_no_close(place: Place) -> None:
    spool = Spool(place.state, MEGABYTE << 10)
    spool.write(make_documents(4))
    with contextlib.closing(sqlite3.connect(spool.path)) as db, db:
        db.execute("UPDATE realtime SET p = 'x' WHERE seq = 2")
    waiting = spool.oldest(9)
    refused = {waiting.documents[0]["_id"]: "no"}
    assert spool.finish(waiting, refused, "realtime", settled=False)
    assert spool.unsettled(9) == make_documents(4)[2:]
    assert len(spool.rejects()) == 2


def test_a_damaged_trade_holds_up_no_close_of_others(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    spool = Spool(place.state, MEGABYTE << 10)
    spool.keep_unsettled(make_documents(4))
    with contextlib.closing(sqlite3.connect(spool.path)) as db, db:
        db.execute("UPDATE unsettled SET p = 'x' WHERE _id = ?", (make_documents(1)[0]["_id"],))
    assert spool.unsettled(9) == make_documents(4)[1:]
    assert spool.count_unsettled() == 3
    assert make_documents(1)[0]["_id"] in caplog.text


def test_a_fault_of_ours_in_making_closes_keeps_no_trade_waiting(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(documents: Sequence[Document]) -> None:
        raise TypeError("bug")

    Spool(place.state, MEGABYTE << 10).write(make_documents(5))
    with place.opened() as store:
        store.start(fail)
        assert until(lambda: not store.spool.has_trades() and "bug" in caplog.text)
        assert store.spool.count_unsettled() == 5


def test_trades_stored_with_numbers_of_another_type_are_compared(place: Place) -> None:
    """MONGODB_NUMERIC_TYPE was changed: of the same moment there are texts and decimals."""
    first, *_ = make_documents(1)
    for number, numeric in enumerate(("string", "decimal", "double", "string")):
        place.environ["MONGODB_NUMERIC_TYPE"] = numeric
        twin = first | {"p": f"{number + 1}.5"}
        twin["_id"] = f"{twin['s']}|{twin['t']}|{twin['p']}|{twin['v']}|{twin['td']}"
        with contextlib.closing(MongoStore(settings_of(place.environ))) as mongo:
            mongo.write([twin])
            found = mongo.newest([first["s"]], first["t"], first["t"])
    assert found[first["s"]]["p"] == "4.5"


def test_what_this_machine_cannot_keep_is_named(
    place: Place, away: MongoServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a batch whose others are kept: no code is left without a word."""
    to_document = stockrt.to_document
    monkeypatch.setattr(
        stockrt,
        "to_document",
        lambda trade, *more: to_document(trade, *more) | ({"td": 2**70} if trade.s == "B.US" else {}),
    )
    with place.opened() as store:
        report = stockrt.Collector(stockrt.DemoApi(), store).run(["A.US", "B.US", "C.US"], threading.Event())
    assert (report.total, report.kept, [*report.failures]) == (3, 2, ["B.US"])
    assert "the local store refused it" in report.failures["B.US"]
    assert stockrt.failure_kind(*report.failures.popitem()) is stockrt.FailureKind.STORE


def test_what_cannot_be_counted_is_kept_all_the_same(place: Place, away: MongoServer) -> None:
    with place.opened() as store:

        def fail(counted: bool = False) -> QueueStats:
            raise StoreError("the disk")

        store.spool.facts = fail  # type: ignore[method-assign]
        assert store.write(make_documents(5)).kept == 5
    assert len(place.waiting()) == 5


def test_a_thread_that_cannot_be_started_is_started_later(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    Spool(place.state, MEGABYTE << 10).write(make_documents(5))
    with place.opened() as store:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", fail)
            store.start(lambda documents: None)
        assert "can't start new thread" in caplog.text
        assert store.write(make_documents(6)) == WriteReport(1, 5)


@pytest.mark.parametrize("code", [70, 82, 91, 133, 189, 202, 371])
def test_a_router_or_server_that_is_not_ready_refuses_no_document_for_good(
    place: Place, mongo_proxy: MongoProxy, code: int
) -> None:
    """It says so of each document of a batch."""
    mongo_proxy.on_insert = lambda insert: Without(insert.ids, {"code": code, "errmsg": "not now"})
    place.environ |= {"MONGODB_HOST": quick(mongo_proxy.uri)}
    with place.opened() as store:
        report = store.write(make_documents(3))
        assert (report.kept, dict(report.refused)) == (3, {})
        assert store.spool.rejects() == []


# ------------------------------------------------------------------------------------------------------ its limits


def test_what_mongodb_refuses_takes_no_more_than_the_limit_either(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with contextlib.closing(Spool(tmp_path, MEGABYTE)) as spool, pytest.raises(SpoolFull):
        for first in range(0, 100_000, 100):
            documents = make_documents(100, first=first)
            spool.reject(documents, {d["_id"]: "no" for d in documents}, "realtime")
    assert sum(path.stat().st_size for path in tmp_path.glob("stockrt.db*")) <= MEGABYTE


@pytest.mark.parametrize(("megabytes", "used"), [(1, 0.4), (8, 0.7)])
def test_it_never_grows_past_its_limit_and_keeps_what_it_has(
    tmp_path: Path, megabytes: int, used: float
) -> None:
    limit, sizes, kept = megabytes * MEGABYTE, [], 0
    with contextlib.closing(Spool(tmp_path, limit)) as spool:
        with pytest.raises(SpoolFull, match="SPOOL_MAX_MB"):
            while True:
                assert spool.write(make_documents(100, first=kept)).stored == 100
                kept += 100
                sizes.append(sum(path.stat().st_size for path in tmp_path.glob("stockrt.db*")))
        assert limit * used < max(sizes) <= limit
        with pytest.raises(SpoolFull, match="SPOOL_MAX_MB"):
            spool.write(make_documents(100, first=kept))
        assert spool.refused == 200
        assert spool.facts().trades == kept
        spool.finish(spool.oldest(500), {}, "realtime")
        assert spool.write(make_documents(100, first=kept)).stored == 100  # there is room again
        assert spool.facts(counted=True).trades == spool.facts().trades == kept - 400


def test_at_the_limit_codes_fail_by_name_and_say_why(place: Place, away: MongoServer) -> None:
    place.environ["SPOOL_MAX_MB"] = "1"
    with place.opened() as store:
        store.write(make_documents(1))
        with pytest.raises(
            StoreError, match=r"MongoDB unreachable since .*, and .*stockrt\.db.*SPOOL_MAX_MB"
        ):
            for first in range(0, 100_000, 1000):
                assert store.write(make_documents(1000, first=first)).kept == 1000
    assert place.facts[-1].refused == 1000


def test_the_disk_keeps_some_room(tmp_path: Path) -> None:
    with (
        small_disk(tmp_path, "2M") as disk,
        contextlib.closing(Spool(disk / "state", MEGABYTE << 10)) as spool,
    ):
        with pytest.raises(SpoolFull, match=r"5% free.*STATE_DIRECTORY"):
            for first in range(0, 1_000_000, 100):
                spool.write(make_documents(100, first=first))
        found = os.statvfs(disk)
        assert found.f_bavail >= found.f_blocks * 0.05
        assert spool.facts(counted=True).trades == first


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Yield a disk of this size."""
    disk = folder / "disk"
    disk.mkdir()
    if os.geteuid() != 0:
        unavailable("only root may mount a small disk")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if done.returncode:
        unavailable(f"a small disk cannot be mounted: {done.stderr}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_what_a_long_absence_took_is_given_back(place: Place) -> None:
    big = [d | {"vw": "1" * 2000} for d in make_documents(10_000)]
    with place.opened() as store:
        for first in range(0, 10_000, 1000):
            store.spool.write(big[first : first + 1000])
        size = store.spool.path.stat().st_size
        assert size > stockrt.SHRINK_ABOVE
        store.start(lambda documents: None)
        assert until(lambda: nothing_waits(store) and store.spool.path.stat().st_size < size / 10)


# ------------------------------------------------------------------------------------------------------ damage


def spoiled(tmp_path: Path, spoil: Callable[[Path], object], count: int = 2000) -> Path:
    """Return a spool file with `count` trades, closed, of which something was spoiled."""
    with contextlib.closing(Spool(tmp_path, MEGABYTE << 10)) as spool:
        for first in range(0, count, 100):
            spool.write(make_documents(100, first=first))
        for extra in ("-wal", "-shm"):  # as a crash leaves it: not moved into the file
            path = spool.path.with_name(spool.path.name + extra)
            path.with_name(f"kept{extra}").write_bytes(path.read_bytes())
    spoil(spool.path)
    return spool.path


def set_aside(folder: Path) -> Path:
    """Return the one file that was set aside."""
    (aside,) = [p for p in folder.glob("stockrt.db.damaged-*") if not p.name.endswith(("-wal", "-shm"))]
    return aside


def overwrite(path: Path, at: int, length: int) -> None:
    """Put random bytes into a file."""
    with path.open("r+b") as stream:
        stream.seek(at)
        stream.write(random.Random(at).randbytes(length))


def cut(path: Path, size: int) -> None:
    """Cut a file short."""
    with path.open("r+b") as stream:
        stream.truncate(size)


@pytest.mark.parametrize(
    ("spoil", "rescued"),
    [
        (lambda path: overwrite(path, 0, 100), 2000),
        (lambda path: overwrite(path, 0, 4096), 2000),
        (lambda path: overwrite(path, 4096, 4096), 1900),  # the table's root
        (lambda path: overwrite(path, 20 * 4096, 3 * 4096), 1800),
        (lambda path: cut(path, path.stat().st_size // 2), 800),
        (lambda path: cut(path, path.stat().st_size - 4096), 1900),
        (lambda path: path.write_bytes(b"this is no database\n" * 500), 0),
    ],
    ids=["header", "first page", "second page", "three pages", "half", "last page", "no database"],
)
def test_a_damaged_file_is_set_aside_and_rescued(
    tmp_path: Path, spoil: Callable[[Path], object], rescued: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = spoiled(tmp_path, spoil)
    before = path.read_bytes()
    with contextlib.closing(Spool(tmp_path, MEGABYTE << 10)) as spool:
        spool.write(make_documents(1, first=5000))
        found = [d for _ in range(30) for d in take(spool, 100)]
    aside = set_aside(tmp_path)
    assert aside.read_bytes()[:1000] == before[:1000]
    assert datetime.now(UTC) - datetime.strptime(aside.name[-23:], "%Y%m%dT%H%M%S.%f%z") < timedelta(hours=1)
    expected = {d["_id"]: d for d in make_documents(2000) + make_documents(1, first=5000)}
    assert all(expected[d["_id"]] == d for d in found)
    assert len({d["_id"] for d in found}) == len(found) > rescued
    arrived = [d["_id"] for d in found]
    assert arrived == [name for name in expected if name in arrived]  # in their order
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1 and aside.name in errors[0]
    (counted,) = map(int, re.findall(r"(\d+) rows of it", errors[0]))
    assert counted in (len(found) - 1, len(found))  # the last one was written before or after


def test_a_long_rescue_gives_signs_of_life(tmp_path: Path) -> None:
    many = 2 * stockrt.RESCUED_AT_ONCE + 100
    spoiled(tmp_path, lambda path: overwrite(path, 0, 100), many)
    signs: list[int] = []
    with contextlib.closing(Spool(tmp_path, MEGABYTE << 10, lambda: signs.append(1))) as spool:
        assert spool.facts(counted=True).trades == many
    assert len(signs) == 3


def blind(path: Path, name: str) -> None:
    """Overwrite the root page of a table or an index."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        (root,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (name,)).fetchone()
    overwrite(path, (root - 1) * 4096, 4096)


def test_a_rescue_under_way_takes_out_no_other_trades(tmp_path: Path) -> None:
    """Read under old numbers, damaged in an index that only the deletion meets, rescued under new numbers."""
    every = make_documents(10_000, first=3000)
    with contextlib.closing(Spool(tmp_path, MEGABYTE << 10)) as spool:
        spool.write(make_documents(3000))
        assert len(take(spool, 3000)) == 3000
        for first in range(0, len(every), 1000):
            spool.write(every[first : first + 1000])
        spool._file.empty_log()
    blind(spool.path, "sqlite_autoindex_realtime_1")
    with contextlib.closing(Spool(tmp_path, MEGABYTE << 10)) as spool:
        found = [d for _ in range(len(every) // 1000) for d in take(spool, 1000)]
        assert not take(spool, 1)
    set_aside(tmp_path)
    assert found == every


def test_what_is_written_while_others_rescue_is_not_lost(tmp_path: Path) -> None:
    """Another user of the file meets damage in a table of its own, and sets it aside under the writer's hands."""
    rescuing, written = threading.Event(), threading.Event()

    def wait() -> None:
        rescuing.set()
        written.wait(0.5)  # in vain where the writer waits for the rescue, as it may

    with contextlib.closing(Spool(tmp_path, MEGABYTE << 10)) as spool:
        spool.write(make_documents(2000))
        with contextlib.closing(stockrt.LocalFacts(tmp_path)) as facts:
            facts.used_today("k", 0)
        spool._file.empty_log()
        blind(spool.path, "key_usage")
        with contextlib.closing(stockrt.LocalFacts(tmp_path)) as facts:
            facts._file._on_busy = wait
            rescuer = threading.Thread(target=facts.used_today, args=("k", 0))
            rescuer.start()
            assert rescuing.wait(PATIENCE)
            spool.write(make_documents(10, first=5000))
            written.set()
            rescuer.join()
    set_aside(tmp_path)
    with contextlib.closing(Spool(tmp_path, MEGABYTE << 10)) as spool:
        assert spool.oldest(9999).documents == make_documents(2000) + make_documents(10, first=5000)


def test_a_transaction_that_spans_a_rescue_is_made_again(tmp_path: Path) -> None:
    """It began in the old file, and commits when that is current no more."""
    with contextlib.closing(Spool(tmp_path, MEGABYTE << 10)) as spool:
        spool.write(make_documents(100))
        other = Spool(tmp_path, MEGABYTE << 10)
        once = iter([lambda: other._file._open(stockrt._damage("a test"))])

        def admit(db: sqlite3.Connection, documents: Sequence[Document]) -> None:
            next(once, lambda: None)()

        spool._admit = admit  # type: ignore[method-assign]
        assert spool.write(make_documents(10, first=500)).stored == 10
        other.close()
        assert spool.oldest(999).documents == make_documents(100) + make_documents(10, first=500)
    set_aside(tmp_path)


KILLED_WHILE_SETTING_ASIDE = """
import os, pathlib, sys
import stockrt

left, replace = int(sys.argv[2]), pathlib.Path.replace

def counted(path, target):
    global left
    if not left:
        os._exit(9)
    left -= 1
    return replace(path, target)

pathlib.Path.replace = counted
stockrt.Spool(pathlib.Path(sys.argv[1]), 1 << 30).close()
print("done")
"""


@pytest.mark.parametrize("renames", range(7))
def test_a_kill_while_it_is_set_aside_loses_nothing(
    tmp_path: Path, renames: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = spoiled(tmp_path, lambda path: None, count=1000)
    path.with_name("kept-wal").rename(path.with_name(path.name + "-wal"))
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
    overwrite(path, 0, 4096)
    command = [sys.executable, "-c", KILLED_WHILE_SETTING_ASIDE, str(tmp_path), str(renames)]
    killed = subprocess.run(command, cwd=Path(stockrt.__file__).parent, capture_output=True, text=True)
    assert killed.returncode == 9 or "done" in killed.stdout, killed.stderr
    with contextlib.closing(Spool(tmp_path, MEGABYTE << 10)) as spool:
        assert spool.oldest(2000).documents == make_documents(1000)
    assert set_aside(tmp_path).name in caplog.text + killed.stderr
    assert not [*tmp_path.glob("*.setting-aside*"), *tmp_path.glob("*.rescue*")]


def test_a_rescue_that_finds_no_room_is_made_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise sqlite3.OperationalError("database or disk is full")

    spoiled(tmp_path, lambda path: overwrite(path, 0, 100), 1000)
    with monkeypatch.context() as patch:
        patch.setattr(stockrt, "rescue", fail)
        for _ in range(3):
            with pytest.raises(StoreError, match="disk is full"):
                Spool(tmp_path, MEGABYTE << 10)
    with contextlib.closing(Spool(tmp_path, MEGABYTE << 10)) as spool:
        assert spool.oldest(2000).documents == make_documents(1000)
    set_aside(tmp_path)


def test_a_file_that_could_not_be_opened_once_is_opened_later(tmp_path: Path) -> None:
    with contextlib.closing(Spool(tmp_path, MEGABYTE << 10)) as spool:
        spool.write(make_documents(3))
        spool._file._disconnect()  # as after a fault in opening it anew
        assert spool.write(make_documents(5)).stored == 2
    with pytest.raises(StoreError, match="closed already"):
        spool.write(make_documents(1))


def test_numbers_of_rows_that_are_lost_are_not_given_again(tmp_path: Path) -> None:
    path = spoiled(tmp_path, lambda path: None, count=1000)
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("DELETE FROM realtime WHERE seq > 500")
    with contextlib.closing(Spool(tmp_path, MEGABYTE << 10)) as spool:
        spool._file._open(stockrt._damage("a test"))
        spool.write(make_documents(1, first=5000))
        assert spool.oldest(9999).last > 1000


def test_what_is_counted_while_others_write_is_right(tmp_path: Path) -> None:
    with contextlib.closing(Spool(tmp_path, MEGABYTE << 10)) as spool:
        spool.facts(counted=True)
        read = spool._file.read_one
        writer = threading.Thread(target=spool.write, args=(make_documents(100),))

        def read_while_others_write(query: str, *values: object) -> object:
            found = read(query, *values)
            writer.start()
            writer.join(0.2)
            return found

        spool._file.read_one = read_while_others_write  # type: ignore[method-assign]
        spool.has_trades()
        writer.join()
        assert spool.facts().trades == 100


def test_long_codes_are_rescued_too(tmp_path: Path) -> None:
    """The length of an `_id` of 58 and more characters takes two bytes in the file."""
    (short,) = make_documents(1)
    numbers = {"p": "1" * 17 + "." + "2" * 16, "v": "3" * 17 + "." + "4" * 16}
    long = short | numbers | {"_id": f"{short['s']}|{short['t']}|{numbers['p']}|{numbers['v']}|{short['td']}"}
    with contextlib.closing(Spool(tmp_path, MEGABYTE << 10)) as spool:
        spool.write([short, long])
    overwrite(spool.path, 0, 100)
    with contextlib.closing(Spool(tmp_path, MEGABYTE << 10)) as spool:
        assert spool.oldest(10).documents == [short, long]


def take(spool: Spool, count: int) -> list[Document]:
    """Take the oldest trades out, once they could be."""
    while not spool.finish(waiting := spool.oldest(count), {}, "realtime"):
        if not waiting.last:
            return []
    return waiting.documents


def test_damage_that_shows_only_later_is_mended_then(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The file is damaged while it is open."""
    with contextlib.closing(Spool(tmp_path, MEGABYTE << 10)) as spool:
        for first in range(0, 2000, 100):
            spool.write(make_documents(100, first=first))
        spool._file.empty_log()
        overwrite(spool.path, 8 * 4096, spool.path.stat().st_size - 12 * 4096)
        reader = Spool(tmp_path, MEGABYTE << 10)  # nothing is cached here
        found = [d for _ in range(30) for d in take(reader, 100)]
        reader.close()
        assert 0 < len(found) < 2000
        # the one that had it open goes on in the new file
        spool.write(make_documents(3, first=7000))
        assert [d["_id"] for d in take(spool, 100)] == [d["_id"] for d in make_documents(3, first=7000)]
    assert len([r for r in caplog.records if r.levelname == "ERROR"]) == 1


def test_the_log_is_rescued_where_the_file_is_gone(tmp_path: Path) -> None:
    path = spoiled(tmp_path, lambda path: None, count=500)
    log_file = path.with_name(path.name + "-wal")
    path.with_name("kept-wal").rename(log_file)
    path.write_bytes(b"")
    with contextlib.closing(Spool(tmp_path, MEGABYTE << 10)) as spool:
        assert spool.oldest(1000).documents == make_documents(500)


def test_other_tables_are_rescued_too(tmp_path: Path) -> None:
    with contextlib.closing(stockrt.LocalFacts(tmp_path)) as facts:
        facts.keep_calendar("US", stockrt.HalfDays("2026-08-15", "2026-08-01", "2026-09-01", frozenset()))
    with contextlib.closing(SqliteStore(tmp_path)) as store:
        store.write_closes([a_close(number) for number in range(5)])
        for first in range(0, 2000, 100):
            store.write(make_documents(100, first=first))
    size = store.path.stat().st_size
    overwrite(store.path, size - 20 * 4096, 20 * 4096)
    with contextlib.closing(Spool(tmp_path, MEGABYTE << 10)) as spool:
        while take(spool, 500):
            pass
        assert [close.key for close, _ in spool.closes(10)] == [a_close(number).key for number in range(5)]
    with contextlib.closing(stockrt.LocalFacts(tmp_path)) as facts:
        assert facts.calendar("US") is not None


@pytest.mark.parametrize("mode", [0o000, 0o444])
def test_a_file_of_another_user_is_set_aside(mode: int, caplog: pytest.LogCaptureFixture) -> None:
    # pytest's own folders may not be entered by another user.
    with tempfile.TemporaryDirectory(prefix="stockrt-test-") as folder:
        state = Path(folder, "state")
        with contextlib.closing(Spool(state, MEGABYTE << 10)) as spool:
            spool.write(make_documents(10))
        Path(folder).chmod(0o755)
        state.chmod(0o777)
        spool.path.chmod(mode)
        with unprivileged(), contextlib.closing(Spool(state, MEGABYTE << 10)) as spool:
            assert len(spool.oldest(100).documents) == (10 if mode else 0)
            spool.write(make_documents(1, first=50))
        aside = set_aside(state)
        with contextlib.closing(sqlite3.connect(aside)) as db:
            assert db.execute("SELECT count(*) FROM realtime").fetchone() == (10,)
    (record,) = [r for r in caplog.records if r.levelname == "ERROR"]
    assert aside.name in record.getMessage()


def test_a_file_that_was_taken_away_is_made_anew(tmp_path: Path) -> None:
    with contextlib.closing(Spool(tmp_path, MEGABYTE << 10)) as spool:
        spool.write(make_documents(3))
        for path in tmp_path.glob("stockrt.db*"):
            path.unlink()
        spool.write(make_documents(2))
        assert len(spool.oldest(10).documents) == 2
    with contextlib.closing(Spool(tmp_path, MEGABYTE << 10)) as spool:
        assert len(spool.oldest(10).documents) == 2


VERSION_1 = """
CREATE TABLE realtime (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, _id TEXT NOT NULL UNIQUE,
    s TEXT NOT NULL, t INTEGER NOT NULL, p TEXT NOT NULL, v TEXT NOT NULL, vw TEXT NOT NULL, td INTEGER NOT NULL,
    stock_code TEXT NOT NULL, create_time TEXT NOT NULL, demo INTEGER
);
CREATE INDEX realtime_code_time ON realtime (stock_code, t DESC);
PRAGMA user_version = 1;
"""


def test_a_file_of_an_older_stockrt_is_brought_up(place: Place) -> None:
    place.state.mkdir()
    with contextlib.closing(sqlite3.connect(place.state / "stockrt.db")) as db:
        db.executescript(VERSION_1)
        with db:
            for d in make_documents(9):
                row = (*(d[n] for n in ("_id", "s", "t", "p", "v", "vw", "td", "stock_code")),
                       "2026-08-15T01:02:03.456Z")  # fmt: skip
                db.execute(
                    "INSERT INTO realtime (_id, s, t, p, v, vw, td, stock_code, create_time) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row,
                )  # fmt: skip
    with place.opened() as store:
        store.start(lambda documents: None)
        assert until(lambda: nothing_waits(store))
        assert store.spool.rejects() == []
    assert place.documents() == by_id(make_documents(9))


def test_many_threads_may_find_the_damage_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = spoiled(tmp_path, lambda path: overwrite(path, 0, 4096), count=1000)
    barrier = threading.Barrier(4)
    faults: list[Exception] = []

    def write(number: int) -> None:
        barrier.wait()
        try:
            with contextlib.closing(Spool(tmp_path, MEGABYTE << 10)) as spool:
                spool.write(make_documents(10, first=3000 + 10 * number))
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    with contextlib.closing(Spool(tmp_path, MEGABYTE << 10)) as spool:
        names = {d["_id"] for d in spool.oldest(5000).documents}
    assert names == {d["_id"] for d in make_documents(1000) + make_documents(40, first=3000)}
    assert len([r for r in caplog.records if r.levelname == "ERROR"]) == 1
    assert path.exists()


# ------------------------------------------------------------------------------------------------- command line


def environment(place: Place, **more: str) -> dict[str, str]:
    """Return the settings for the program."""
    return place.environ | {"INFOWAY_API_KEY": "test-key"} | more


def test_drain_moves_everything_and_says_so(place: Place, run_pyz: RunPyz) -> None:
    Spool(place.state, MEGABYTE << 10).write(make_documents(2500))
    done = run_pyz("--drain", env=place.environ)
    assert (done.returncode, done.stdout) == (0, "")
    assert re.fullmatch(r"2500 moved to mongodb://\S+; 0 left on this machine\n", done.stderr)
    assert len(place.documents()) == 2500 and place.waiting() == []
    assert "0 moved" in run_pyz("--drain", env=place.environ).stderr


def test_drain_shows_a_bar_on_a_terminal(
    place: Place, mongo_server: MongoServer, pyz: Path, clean_env: dict[str, str]
) -> None:
    Spool(place.state, MEGABYTE << 10).write(make_documents(2500))
    # a bar is drawn ten times a second, and so much slower than MongoDB writes
    with controlled(mongo_server).failing("insert", block_ms=200):
        done, shown = on_a_terminal([sys.executable, str(pyz), "--drain"], clean_env | place.environ)
    assert done == 0
    assert re.search(r"\| \d000/2500 \[", shown) and "2500 moved" in shown


def on_a_terminal(command: Sequence[str], environ: dict[str, str]) -> tuple[int, str]:
    """Run a command whose stderr is a terminal; return its exit status and what it showed."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen(command, env=environ, stderr=its, stdout=subprocess.DEVNULL)
    os.close(its)
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the last one that held the terminal is gone
        while more := os.read(ours, 4096):
            shown += more
    os.close(ours)
    return process.wait(60), shown.decode()


def test_drain_that_mongodb_does_not_take(place: Place, away: MongoServer, run_pyz: RunPyz) -> None:
    Spool(place.state, MEGABYTE << 10).write(make_documents(5))
    done = run_pyz("--drain", env=place.environ)
    assert done.returncode == 1
    assert "0 moved" in done.stderr and "5 left" in done.stderr and "MONGODB_HOST" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(place.waiting()) == 5


def test_drain_without_a_mongodb(run_pyz: RunPyz) -> None:
    done = run_pyz("--drain")
    assert done.returncode == 78 and "MONGODB_HOST" in done.stderr


def test_rejects_are_listed(place: Place, run_pyz: RunPyz) -> None:
    assert run_pyz("--rejects", env=place.environ).stdout == "MongoDB has refused nothing\n"
    assert run_pyz("--rejects", "--json", env=place.environ).stdout == ""
    documents = with_own_prices(make_documents(3))
    refuse(place, documents[1])
    Spool(place.state, MEGABYTE << 10).write(documents)
    done = run_pyz("--drain", env=place.environ)
    assert done.returncode == 0 and re.search(r"\b2 moved .*, 1 refused by it", done.stderr)
    lines = run_pyz("--rejects", env=place.environ).stdout.splitlines()
    assert len(lines) == 1 and documents[1]["_id"] in lines[0] and "MongoDB refused it" in lines[0]
    (reject,) = map(json.loads, run_pyz("--rejects", "--json", env=place.environ).stdout.splitlines())
    assert reject["document"]["p"] == documents[1]["p"]

    with place.collection() as collection:  # the operator mends it
        collection.delete_one({"_id": "the operator's own"})
    assert "0 moved" in run_pyz("--drain", env=place.environ).stderr
    assert "1 moved" in run_pyz("--drain", "--retry", env=place.environ).stderr
    assert run_pyz("--rejects", "--json", env=place.environ).stdout == ""
    assert place.documents() == by_id(documents)
    assert run_pyz("--retry").returncode == 64


def test_status_shows_what_waits(place: Place, run_pyz: RunPyz) -> None:
    spool = Spool(place.state, MEGABYTE << 10)
    spool.write(make_documents(40))
    spool.keep_unsettled(make_documents(3, first=50))
    status = json.loads(run_pyz("--status", "--json", env=environment(place)).stdout)
    assert status["spool"] == {
        "trades": 40, "bytes": status["spool"]["bytes"], "oldest": "2026-08-15T01:02:03.456Z", "rejects": 0,
        "refused": 0, "unsettled": 3,
    }  # fmt: skip
    assert 0 < status["spool"]["bytes"] < MEGABYTE
    line = next(
        x for x in run_pyz("--status", env=environment(place)).stdout.splitlines() if x.startswith("spool")
    )
    assert re.search(
        r"40 trades wait for MongoDB, \d\.\d MB, the oldest since 2026-08-15T01:02:03\.456Z"
        r", the closes of 3 are still to be made",
        line,
    )


# ----------------------------------------------------------------------------------------------------- the daemon


@pytest.fixture
def platform() -> Iterator[PlatformServer]:
    """A platform that knows the daemon."""
    with PlatformServer(ping_every=0) as server:
        server.know(HASH)
        yield server


def test_the_result_says_what_waits_and_since_when(
    place: Place, away: MongoServer, platform: PlatformServer, infoway: InfowayServer
) -> None:
    stockrt.write_hash(place.state, HASH)
    settings = settings_for(platform.port, infoway.url, place.state, **place.environ)
    codes = [f"{600_000 + number}.SH" for number in range(12)]
    with ThreadDaemon(settings):
        assert platform.wait_for(lambda s: s.connected, PATIENCE)
        platform.execute([*codes, "600012"], execution_id="e1")
        assert platform.wait_for(lambda s: s.results_for("e1"), PATIENCE)
        platform.execute(codes, execution_id="e2")
        assert platform.wait_for(lambda s: s.results_for("e2"), PATIENCE)
    answers = [platform.results_for(name)[0] for name in ("e1", "e2")]
    words = r"1[23] trades kept on this machine, MongoDB unreachable since \d\d:\d\d"
    assert all(re.fullmatch(words, answer.data["message"]) for answer in answers)
    assert all(answer.status == answer.data["status"] == "failure" for answer in answers)
    result = answers[0].data["result"]
    assert (result["total"], result["kept_count"], result["success_count"], result["failed_count"]) == (
        13,
        13,
        0,
        0,
    )
    assert result["failed_stocks"] == [] and len(place.waiting()) == 13

    assert until(lambda: not drainers())
    gc.collect()  # the lock of the first daemon goes with it
    away.restart()
    with ThreadDaemon(settings):  # no execution is needed to move what waits
        assert until(lambda: place.waiting() == [])
    assert len(place.documents()) == 13


def test_the_metrics_say_what_waits(place: Place) -> None:
    settings = settings_for(1, "http://127.0.0.1:1", place.state, **place.environ)
    service = stockrt.Service(settings, stockrt.Notifier())
    service.spooled(QueueStats(trades=40, bytes=8192, oldest=None, rejects=2, refused=7))
    lines = service.metrics.text().splitlines()
    assert {"stockrt_spool_trades 40", "stockrt_spool_bytes 8192", "stockrt_spool_rejects 2",
            "stockrt_spool_refused_total 7"} <= set(lines)  # fmt: skip
    assert "· trades wait for MongoDB" in service.status(0.0)[0]
    service.spooled(QueueStats())
    assert "MongoDB" not in service.status(0.0)[0]
    kept = stockrt.Report(total=2, stored=1, kept=1)
    assert stockrt.outcome_of(kept) == "failure" and not kept.complete


def test_a_full_disk_ends_no_daemon(
    tmp_path: Path, platform: PlatformServer, infoway: InfowayServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing can be kept: commands are refused with the reason, and executed again when there is room."""
    with small_disk(tmp_path, "4M") as disk:
        stockrt.write_hash(disk / "state", HASH)
        with ThreadDaemon(settings_for(platform.port, infoway.url, disk / "state")):
            assert platform.wait_for(lambda s: s.connected, PATIENCE)
            platform.execute(["AAPL.US"], execution_id="e1")
            assert platform.wait_for(lambda s: s.results_for("e1"), PATIENCE)
            ballast = disk / "ballast"
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as stream:
                while stream.write(bytes(4096)):
                    pass
            for number in range(40):
                platform.execute(["AAPL.US"] * 200, execution_id=f"full{number}")
            assert platform.wait_for(lambda s: s.results_for("full39"), PATIENCE)
            ballast.unlink()
            platform.execute(["AAPL.US"], execution_id="e2")
            assert platform.wait_for(lambda s: s.results_for("e2"), PATIENCE)
            assert platform.wait_for(lambda s: not s.unanswered, PATIENCE)
    assert platform.results_for("full39")[0].status == "failure"
    assert "full" in platform.results_for("full39")[0].data["message"]
    assert [platform.results_for(name)[0].status for name in ("e1", "e2")] == ["success"] * 2
    assert len(platform.dials) == 1
