"""The promises of the spool: what MongoDB does not take waits here, and arrives once, in order."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import logging
import os
import pty
import re
import sqlite3
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import cast

import pymongo
import pytest
from conftest import RunPyz, controlled, small_disk
from kit.chinese import in_chinese
from kit.daemons import LOCAL_TIME, PATIENCE, ThreadDaemon, settings_for, until
from kit.infoway_server import InfowayServer
from kit.mongo import INTERRUPTED_AT_SHUTDOWN, ON_COLLECTIONS, UNAUTHORIZED, MongoServer
from kit.mongo_proxy import STEPPED_DOWN, Afterwards, Fate, MongoProxy, Without
from kit.platform_server import PlatformServer
from kit.trades import CREATED, by_id, make_documents, settings_of

import stockrt
from stockrt import (
    ClosesLate,
    ClosingPrices,
    Delivery,
    DeliveryQueue,
    Document,
    LocalFile,
    MongoStore,
    QueueFull,
    QueueStats,
    RefusedClose,
    Rejects,
    SessionsFile,
    SqliteStore,
    StoreAway,
    StoreError,
    Trade,
    UnsettledTrades,
    WriteReport,
    open_store_file,
)

# A fault that is made up is no change that the server tells of: that it is well is learnt at the next heartbeat.
QUICK = "serverSelectionTimeoutMS=1000&timeoutMS=1000&heartbeatFrequencyMS=500"
MEGABYTE = 1 << 20
HASH = "a1b2c3d4e5f6"


def quick(uri: str) -> str:
    """Return the URI with short time limits."""
    return f"{uri}{'&' if '?' in uri else '?'}{QUICK}"


NEVER = threading.Event()


class Closes(ClosingPrices):
    """Makes no close; remembers the trades that it was given, and raises `error` where there is one."""

    def __init__(self, error: Exception | None = None) -> None:
        self.settled: list[Document] = []
        self.error = error

    def settle(self, documents: Sequence[Document], stop: threading.Event) -> list[RefusedClose]:
        """Take trades."""
        if self.error is not None:
            raise self.error
        self.settled += documents
        return []


def delivery(
    mongo: MongoStore, file: LocalFile, max_bytes: int, closes: ClosingPrices, events: stockrt.Events
) -> Delivery:
    """Put a delivery together, as a pipeline does."""
    queue = DeliveryQueue(file, max_bytes)
    return Delivery(mongo, queue, Rejects(file), UnsettledTrades(file), closes, events)


class Place(stockrt.Events):
    """A database, and a state directory beside it; hears what waits."""

    def __init__(self, uri: str, name: str, state: Path, **more: str) -> None:
        self.uri, self.name, self.state = uri, name, state
        self.environ = {
            "MONGODB_HOST": quick(uri), "MONGODB_DB_NAME": name, "STATE_DIRECTORY": str(state), **more,
        }  # fmt: skip
        self.facts: list[QueueStats] = []

    def queue_changed(self, stats: QueueStats) -> None:
        """Remember what waits."""
        self.facts.append(stats)

    @contextlib.contextmanager
    def opened(
        self, closes: ClosingPrices | None = None, *, real: bool = False, **environ: str
    ) -> Iterator[Delivery]:
        """Yield the delivery to this database; `real` closes are made, those of `closes`, or none."""
        settings = settings_of(self.environ | environ)
        with open_store_file(self.state) as file, contextlib.closing(MongoStore(settings)) as mongo:
            closes = ClosingPrices(mongo, SessionsFile(file)) if real else closes or Closes()
            made = delivery(mongo, file, settings.spool_max_bytes, closes, self)
            with contextlib.closing(made) as store:
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


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stockrt, "DELIVERY_FIRST_S", 0.05)


@pytest.fixture
def place(mongo_db: tuple[str, str], tmp_path: Path) -> Place:
    """An empty database and an empty state directory."""
    return Place(*mongo_db, tmp_path / "state")


@pytest.fixture
def killed(mongo_server: MongoServer) -> Iterator[MongoServer]:
    """The server, killed; the test may start it again."""
    controlled(mongo_server).checkpoint()
    mongo_server.kill()
    try:
        yield mongo_server
    finally:
        mongo_server.ensure_running()


@pytest.fixture
def away(place: Place, mongo_proxy: MongoProxy) -> MongoProxy:
    """The server behind an address that refuses, as that of a killed one does, until it is `up`: it need not start."""
    place.environ["MONGODB_HOST"] = quick(mongo_proxy.uri)
    mongo_proxy.down()
    return mongo_proxy


@pytest.fixture
def gone(place: Place, away: MongoProxy) -> None:
    """The same, for good: nobody waits long for it."""
    place.environ["MONGODB_HOST"] = place.environ["MONGODB_HOST"].replace("=1000", "=200")


@contextlib.contextmanager
def queue_in(folder: Path, max_bytes: int = MEGABYTE << 10) -> Iterator[DeliveryQueue]:
    """Open the queue of a state directory."""
    with open_store_file(folder) as file:
        yield DeliveryQueue(file, max_bytes)


def queued(folder: Path, documents: Sequence[Document]) -> None:
    """Let trades wait in a state directory."""
    with queue_in(folder) as queue:
        queue.write(documents)


def take(queue: DeliveryQueue, count: int) -> list[Document]:
    """Take the oldest trades out."""
    with queue.taking_out(batch := queue.oldest(count)):
        pass
    return batch.documents


def threads() -> int:
    """Return how many threads deliver what waits."""
    return sum(thread.name == "stockrt-delivery" for thread in threading.enumerate())


# ------------------------------------------------------------------------------------------------ away and back


def test_what_mongodb_does_not_take_waits_and_arrives(place: Place, killed: MongoServer) -> None:
    with place.opened() as store:
        report = store.write(make_documents(12))
        assert (report.stored, report.duplicates, report.queued, dict(report.refused)) == (0, 0, 12, {})
        assert re.fullmatch(rf"MongoDB unreachable since {LOCAL_TIME}", report.queued_because)
        assert re.fullmatch(rf"MongoDB 自 {LOCAL_TIME} 起无法连接", in_chinese(report.queued_because))
        assert place.waiting() == [d["_id"] for d in make_documents(12)]
        killed.restart()
        store.start()
        assert until(lambda: store.is_empty())
    assert place.documents() == by_id(make_documents(12))
    assert place.waiting() == []


def test_while_mongodb_is_away_only_the_first_write_waits_for_it(place: Place, away: MongoProxy) -> None:
    took = []
    with place.opened() as store:
        for number in range(20):
            began = time.monotonic()
            assert store.write(make_documents(5, first=5 * number)).queued == 5
            took.append(time.monotonic() - began)
    assert sum(took[1:]) < took[0] * 5  # asked each time it would be 19 times as much
    assert len(place.waiting()) == 100


def test_new_trades_queue_up_behind_those_that_wait(place: Place, away: MongoProxy) -> None:
    old, new = make_documents(3000), make_documents(5, first=2995, created=CREATED + timedelta(hours=1))
    later = [d | {"t": d["t"] + 1, "_id": d["_id"].replace(str(d["t"]), str(d["t"] + 1))} for d in new]
    with place.opened() as store:
        for first in range(0, 3000, 1000):
            store.write(old[first : first + 1000])
        away.up()
        report = store.write(later)
        assert report.stored + report.queued == 5
        assert until(lambda: store.is_empty())
    with place.collection() as collection:
        arrived = [document["_id"] for document in collection.find()]  # as they stand in the file
    assert arrived == [document["_id"] for document in old + later]


def test_with_mongodb_back_a_write_waits_for_its_turn_and_is_no_failure(
    place: Place, away: MongoProxy
) -> None:
    with place.opened() as store:
        assert store.write(make_documents(50)).queued == 50
    away.up()
    with place.opened() as store:
        assert store.write(make_documents(60)) == WriteReport(10, 50)
    assert len(place.documents()) == 60


def test_what_waits_moves_in_the_next_process_without_any_write(place: Place, away: MongoProxy) -> None:
    with place.opened() as store:
        store.write(make_documents(7))
    away.up()
    with place.opened() as store:
        store.start()
        assert until(lambda: store.is_empty())
        # said a moment later, and not at all where the end comes before
        assert until(lambda: place.facts[-1].trades == 0)
    assert len(place.documents()) == 7


def test_the_thread_that_moves_begins_when_something_waits(place: Place) -> None:
    assert until(lambda: not threads())  # of tests before
    with place.opened() as store:
        store.start()
        store.write(make_documents(9))
        assert threads() == 0
        store.queue.write(make_documents(20))
        store.start()
        assert threads() == 1
        assert until(lambda: store.is_empty())
        store.queue.write(make_documents(30))
        store.start()
        assert until(lambda: store.is_empty())
        assert threads() == 1
    assert until(lambda: not threads())
    assert len(place.documents()) == 30


def test_a_server_that_hangs_is_one_that_is_away(place: Place, mongo_server: MongoServer) -> None:
    controlled(mongo_server)
    with place.opened() as store:
        assert store.write(make_documents(1)).stored == 1
        mongo_server.pause()
        try:
            report = store.write(make_documents(20))
        finally:
            mongo_server.resume()
        assert report.queued == 20 and "unreachable" in report.queued_because
        assert until(lambda: store.is_empty())
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
    with open_store_file(place.state) as file:
        alone = SqliteStore(file)
        alone.write(make_documents(10))
        alone.write([d | {"demo": True} for d in make_documents(5, first=100)])
        alone.write(make_documents(20))
        ClosingPrices(alone, SessionsFile(file)).settle(make_documents(20), NEVER)
        closes = file.read_all("SELECT _id, t, p, v, td FROM close ORDER BY _id")
    with place.opened(real=True) as store:
        store.start()
        assert until(lambda: store.is_empty())
    assert place.documents() == by_id(make_documents(20))
    assert [tuple(c[n] for n in ("_id", "t", "p", "v", "td")) for c in place.documents("close")] == closes
    assert len(closes) == 20
    assert place.waiting() == [d["_id"] for d in make_documents(5, first=100)]  # synthetic: of this machine


def test_closes_follow_from_trades_when_they_arrive(place: Place, away: MongoProxy) -> None:
    closes = Closes()
    with place.opened(closes) as store:
        store.start()
        store.write(make_documents(30))
        assert not closes.settled
        away.up()
        assert until(lambda: store.is_empty())
    assert closes.settled == make_documents(30)


def test_a_close_that_mongodb_does_not_take_now_is_made_later(place: Place, away: MongoProxy) -> None:
    """The trades are in MongoDB, it goes away before their closes are."""
    documents = make_documents(4)
    with place.opened(real=True) as store:
        store.start()
        store.settle(documents, NEVER)
        assert place.waiting() == [] and store.unsettled.count() == len(documents)
        away.up()
        assert until(lambda: store.is_empty())
    assert [c["s"] for c in place.documents("close")] == [d["s"] for d in documents]


def test_numbers_are_converted_when_they_move(mongo_db: tuple[str, str], tmp_path: Path) -> None:
    place = Place(*mongo_db, tmp_path / "state", MONGODB_NUMERIC_TYPE="decimal")
    queued(place.state, make_documents(3))
    with place.opened() as store:
        store.start()
        assert until(lambda: store.is_empty())
    found = place.documents()
    assert [str(d["p"]) for d in found] == [d["p"] for d in make_documents(3)]
    assert {type(d["p"]).__name__ for d in found} == {"Decimal128"}
    assert [d["create_time"] for d in found] == [CREATED] * 3


def test_a_batch_that_is_cut_short_by_a_fault_of_the_local_file_moves_again(place: Place) -> None:
    """Written to MongoDB, not yet taken out here, killed: it moves once more and is known."""
    queued(place.state, make_documents(10))
    with place.opened() as store:
        store.mongo.write(store.queue.oldest(6).documents)
        store.deliver(NEVER)
        assert (store.moved, store.is_empty()) == (10, True)
    assert place.documents() == by_id(make_documents(10))


def test_a_name_that_the_dns_does_not_know_now_is_a_mongodb_that_is_away(tmp_path: Path) -> None:
    place = Place("mongodb+srv://nowhere.invalid/", "x", tmp_path)
    with place.opened() as store:
        report = store.write(make_documents(2))
    assert report.queued == 2 and re.fullmatch(
        rf"MongoDB takes no writes since {LOCAL_TIME} \((.+)\)", report.queued_because
    )
    because = cast(stockrt.Phrase, report.queued_because)
    assert re.fullmatch(rf"MongoDB 自 {LOCAL_TIME} 起无法写入（.+）", in_chinese(because))


def test_why_others_wait_is_chinese_for_chinese_readers(place: Place) -> None:
    with place.opened() as store:
        assert in_chinese(store._because(3)) == "前面另有 3 条等待写入 MongoDB"
        store._is_silent = True
        assert in_chinese(store._because(0)) == "MongoDB 在 5 秒内没有应答"
        assert in_chinese(store._because(1)) == "MongoDB 在 5 秒内没有应答；前面另有 1 条等待写入 MongoDB"


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
        queued(place.state, documents)
    with place.opened() as store:
        if way == "directly":
            report = store.write(documents)
            assert report.stored == 999 and list(report.refused) == [poison["_id"]]
        else:
            store.start()
            assert until(lambda: store.is_empty())
            assert until(lambda: poison["_id"] in caplog.text and place.facts[-1].rejects)
        (reject,) = store.rejects.all()
    assert reject["_id"] == poison["_id"] and reject["collection"] == "realtime"
    assert re.search(r"duplicate key|E11000", reject["reason"])
    said = re.search(r"collection: (\S+) index: (\S+) dup key: (.*)", reject["reason"])
    assert said
    words = f"被 MongoDB 拒绝：与 {said[1]} 的唯一索引 {said[2]} 冲突（{said[3]}）"
    assert in_chinese(reject["reason"], *said.groups()) == words
    assert {name: reject["document"][name] for name in ("s", "t", "p", "v", "vw", "td")} == {
        name: poison[name] for name in ("s", "t", "p", "v", "vw", "td")
    }
    names = {d["_id"] for d in documents} - {poison["_id"]}
    assert {d["_id"] for d in place.documents()} == names | {"the operator's own"}
    assert place.waiting() == []
    assert place.facts[-1].rejects == 1


def test_while_nothing_can_be_written_no_document_is_taken_for_poison(place: Place, gone: None) -> None:
    queued(place.state, make_documents(3))
    with place.opened() as store:
        for _ in range(stockrt.POISON_TRIES + 1):
            with pytest.raises(StoreAway):
                store.deliver(NEVER)
        assert store.rejects.all() == [] and len(place.waiting()) == 3


def test_numbers_that_do_not_fit_are_refused_by_name(mongo_db: tuple[str, str], tmp_path: Path) -> None:
    place = Place(*mongo_db, tmp_path / "state", MONGODB_NUMERIC_TYPE="decimal")
    documents = make_documents(3)
    documents[1] |= {"vw": "1." + "2" * 60}
    with place.opened() as store:
        report = store.write(documents)
        assert report.stored == 2 and "MONGODB_NUMERIC_TYPE" in report.refused[documents[1]["_id"]]
        assert [r["_id"] for r in store.rejects.all()] == [documents[1]["_id"]]


def test_a_document_that_the_disk_has_changed_is_not_passed_on(place: Place) -> None:
    queued(place.state, make_documents(3))
    with contextlib.closing(sqlite3.connect(place.state / stockrt.SQLITE_NAME)) as db, db:
        db.execute("UPDATE realtime SET p = '1' WHERE seq = 2")
    with (
        pytest.raises(StoreError, match="is damaged: its fields do not make its _id"),
        place.opened() as store,
    ):
        store.deliver(NEVER)
    with place.opened() as store:
        store.deliver(NEVER)
    assert place.documents() == by_id([d for d in make_documents(3) if d != make_documents(3)[1]])
    (aside,) = place.state.glob("stockrt.db.damaged-*Z")
    with contextlib.closing(sqlite3.connect(aside)) as db:
        assert db.execute("SELECT p FROM realtime WHERE seq = 2").fetchone() == ("1",), "as the disk has it"


def test_a_local_file_that_fails_keeps_nothing_from_mongodb(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    documents = with_own_prices(make_documents(3))
    refuse(place, documents[1])
    with place.opened() as store:
        with contextlib.closing(sqlite3.connect(place.state / stockrt.SQLITE_NAME)) as db:
            db.executescript("DROP TABLE realtime; DROP TABLE rejects")
        report = store.write(documents)
        assert store.write(documents[:1]).duplicates == 1
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
    queued(place.state, documents)
    with contextlib.ExitStack() as stack:
        if not may_write_beside:
            stack.enter_context(forbidden(mongo_server, place, "license_usage"))
        store = stack.enter_context(place.opened(MONGODB_HOST=quick(mongo_proxy.uri)))
        store.deliver(NEVER)
        assert store.is_empty()
        assert [r["_id"] for r in store.rejects.all()] == [poison]
    assert place.documents() == by_id([d for d in documents if d["_id"] != poison])


@pytest.mark.parametrize(("written", "there"), [(0, 0), (1, 0), (1, 1)], ids=["none", "emptied", "one"])
def test_what_is_written_to_see_whether_mongodb_takes_anything_never_stays(
    place: Place, mongo_proxy: MongoProxy, written: int, there: int
) -> None:
    """Each insert is applied, and its answer is that the server has stepped down."""
    documents = make_documents(3)
    with place.opened(MONGODB_HOST=quick(mongo_proxy.uri)) as store:
        store.mongo.write(documents[:written])
        if not there:
            store.mongo.collection().delete_many({})
        mongo_proxy.on_insert = lambda _: Afterwards(STEPPED_DOWN)
        assert not store.mongo.takes_another("realtime")
        mongo_proxy.on_insert = lambda _: None
        assert store.mongo.takes_another("realtime")
    assert place.documents() == by_id(documents[:there])


def test_a_second_absence_is_told_from_its_own_beginning(
    place: Place, mongo_proxy: MongoProxy, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where nothing could be kept during the first: nothing has to be moved when MongoDB is back."""
    place.environ |= {"MONGODB_HOST": quick(mongo_proxy.uri), "SPOOL_MAX_MB": "1"}
    with place.opened() as store:
        store.queue._max_bytes = 0
        mongo_proxy.down()
        with pytest.raises(StoreError, match="unreachable since"):
            store.write(make_documents(1))
        mongo_proxy.up()
        with caplog.at_level(logging.INFO, "stockrt"):
            assert store.write(make_documents(1)).stored == 1
        assert "MongoDB: well again" in caplog.text
        mongo_proxy.down()
        store.queue._max_bytes = MEGABYTE
        began = stockrt.utc_now()
        assert store.write(make_documents(1, first=7)).queued == 1
        assert store._away is not None and store._away[1] >= began


# ---------------------------------------------------------------------------------------------- closes that fail


@pytest.fixture
def no_closes(place: Place, mongo_server: MongoServer) -> Iterator[contextlib.ExitStack]:
    """MongoDB lets nobody write closes, until this is closed."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(forbidden(mongo_server, place, "close"))
        yield stack


def test_closes_that_cannot_be_made_keep_no_trade_waiting(
    place: Place, no_closes: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stockrt, "CATCH_UP_S", PATIENCE)
    queued(place.state, make_documents(2500))
    with place.opened(real=True) as store:
        store.start()
        for first in (3000, 3010):  # in its turn, then at once
            report = store.write(make_documents(10, first=first))
            assert (report.stored, report.queued) == (10, 0)
        assert len(place.documents()) == 2520
        assert store.unsettled.count() == 2500
        no_closes.close()
        assert until(lambda: store.is_empty())
    assert len(place.documents("close")) == 2500


def test_closes_that_cannot_be_made_are_said_once_and_their_end_too(
    place: Place, no_closes: contextlib.ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "stockrt")
    queued(place.state, make_documents(5))
    with place.opened(real=True) as store:
        store.start()
        assert until(lambda: "closing snapshot: " in caplog.text)
        assert all(store.write(make_documents(1, first=100 + n)).stored for n in range(5))
        assert caplog.text.count("closing snapshot: ") == 1 and "MongoDB: " not in caplog.text
        no_closes.close()
        assert until(lambda: "closing snapshot: well again" in caplog.text)


def test_trades_that_come_while_closes_fail_are_moved_at_once(
    place: Place, no_closes: contextlib.ExitStack, mongo_server: MongoServer
) -> None:
    """However long the drainer would rest before it tries the closes again."""
    queued(place.state, make_documents(5))
    with place.opened(real=True) as store:
        delays = [3600.0]
        store._fresh_delays = lambda: iter(lambda: delays[0], None)  # type: ignore[method-assign]
        store.start()
        assert until(lambda: store._close_trouble.there)
        delays[0] = 0.1
        with mongo_server.failing(*ON_COLLECTIONS, error_code=INTERRUPTED_AT_SHUTDOWN):
            assert store.write(make_documents(3, first=50)).queued == 3
        assert until(lambda: not store.queue.has_trades())
    assert len(place.documents()) == 8


def test_drain_ends_where_closes_cannot_be_made(
    place: Place, no_closes: contextlib.ExitStack, run_pyz: RunPyz
) -> None:
    with open_store_file(place.state) as file:
        UnsettledTrades(file).add(make_documents(2, first=50))
    queued(place.state, make_documents(5))
    done = run_pyz("--drain", env=environment(place))
    assert done.returncode == 1 and "5 moved to" in done.stderr and "failCommand" in done.stderr
    assert len(place.documents()) == 5
    no_closes.close()
    assert run_pyz("--drain", env=environment(place)).returncode == 0
    assert len(place.documents("close")) == 7


def test_refused_trades_make_no_close(place: Place, mongo_proxy: MongoProxy) -> None:
    refused, *others = make_documents(4)
    queued(place.state, make_documents(4))
    refusal = {"code": 121, "errmsg": "Document failed validation"}
    mongo_proxy.on_insert = lambda insert: Without({refused["_id"]} & {*insert.ids}, refusal)
    with place.opened(Closes(StoreAway("no")), MONGODB_HOST=quick(mongo_proxy.uri)) as store:
        with pytest.raises(ClosesLate):
            store.deliver(NEVER)
        assert store.unsettled.some(9) == others
        assert [r["_id"] for r in store.rejects.all()] == [refused["_id"]]
        assert (store.moved, store.rejected) == (3, 1)


def test_a_damaged_trade_holds_up_no_close_of_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_store_file(tmp_path) as file:
        unsettled = UnsettledTrades(file)
        unsettled.add(make_documents(4))
        with file.write() as db:
            db.execute("UPDATE unsettled SET p = 'x' WHERE _id = ?", (make_documents(1)[0]["_id"],))
        assert unsettled.some(9) == make_documents(4)[1:]
        assert unsettled.count() == 3
    assert make_documents(1)[0]["_id"] in caplog.text


def test_trades_whose_closes_cannot_be_made_do_not_pile_up(
    place: Place, no_closes: contextlib.ExitStack
) -> None:
    """Polled for hours: of a code and session the first and the last are kept, which lead to the same closes."""
    day = 1_750_118_400_000 // stockrt.DAY_MS * stockrt.DAY_MS
    prices = {code: 100 + number for number, code in enumerate(("600519.SH", "AAPL.US", "A.US", "A.US.X"))}
    with place.opened(real=True) as store:
        for minute in (7, 300, 5, 600, 900, 1439, 1440, 1500, 1600):
            trades = [
                Trade(code, day + minute * 60_000, f"{price}.{minute}", "1", "1", 0)
                for code, price in prices.items()
            ]
            documents = [stockrt.to_document(trade, stockrt.utc_now()) for trade in trades]
            assert store.write(documents).stored == len(documents)
            store.settle(documents, NEVER)
        kept = sorted((d["stock_code"], (d["t"] - day) // 60_000) for d in store.unsettled.some(99))
        # the dates are the exchange's; a code of no exchange has UTC's
        sessions = {"600519.SH": (5, 900, 1439, 1600), "A.US.X": (5, 1439, 1440, 1600)}
        days = [(code, minute) for code in prices for minute in sessions.get(code, (5, 7, 300, 1600))]
        assert kept == sorted(days)
        no_closes.close()
        store.deliver(NEVER)
        assert store.is_empty()
    late = place.documents("close")
    with place.opened(real=True) as store:
        store.mongo.collection("close").delete_many({})
        store.settle(place.documents(), NEVER)
    times = ("create_time", "update_time")
    assert [{n: v for n, v in d.items() if n not in times} for d in late] == [
        {n: v for n, v in d.items() if n not in times} for d in place.documents("close")
    ]


def test_closes_that_mongodb_rejects_are_put_aside(place: Place, mongo_proxy: MongoProxy) -> None:
    """Those that follow from trades at once, and from trades that waited."""
    refusal = {"code": 121, "errmsg": "Document failed validation"}
    mongo_proxy.on_insert = lambda insert: (
        Without({i for i in insert.ids if i.count("|") == 1}, refusal)
        if insert.collection == "close"
        else None
    )
    with open_store_file(place.state) as file:
        UnsettledTrades(file).add(make_documents(2))
    with place.opened(real=True, MONGODB_HOST=quick(mongo_proxy.uri)) as store:
        store.settle(make_documents(1, first=2), NEVER)
        store.deliver(NEVER)
        assert store.is_empty()
        assert sorted(str(r["document"]["s"]) for r in store.rejects.all()) == [
            f"60000{n}.SH" for n in range(3)
        ]
        assert {r["collection"] for r in store.rejects.all()} == {"close"}


def test_a_fault_of_ours_in_making_closes_keeps_no_trade_waiting(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    queued(place.state, make_documents(5))
    with place.opened(Closes(TypeError("bug"))) as store:
        store.start()
        assert until(lambda: not store.queue.has_trades() and "bug" in caplog.text)
        assert store.unsettled.count() == 5


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
    place: Place, gone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a batch whose others are kept: no code is left without a word."""
    to_document = stockrt.to_document
    monkeypatch.setattr(
        stockrt,
        "to_document",
        lambda trade, *more: to_document(trade, *more) | ({"td": 2**70} if trade.s == "B.US" else {}),
    )
    with place.opened() as store:
        report = stockrt.Collector(stockrt.DemoApi(), store, stockrt.Keeper()).run(
            ["A.US", "B.US", "C.US"], threading.Event()
        )
    assert (report.total, report.queued, [*report.failures]) == (3, 2, ["B.US"])
    assert report.failures["B.US"].kind is stockrt.FailureKind.STORE
    assert "the local store refused it" in report.failures["B.US"].words


def test_what_cannot_be_counted_is_kept_all_the_same(place: Place, gone: None) -> None:
    with place.opened() as store:

        def fail() -> QueueStats:
            raise StoreError("the disk")

        store.stats = fail  # type: ignore[method-assign]
        assert store.write(make_documents(5)).queued == 5
    assert len(place.waiting()) == 5


def test_a_thread_that_cannot_be_started_is_started_later(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    queued(place.state, make_documents(5))
    with place.opened() as store:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", fail)
            store.start()
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
        assert (report.queued, dict(report.refused)) == (3, {})
        assert store.rejects.all() == []


# ------------------------------------------------------------------------------------------------------ its limits


def test_what_mongodb_refuses_takes_no_more_than_the_limit_either(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_of({"MONGODB_HOST": "mongodb://127.0.0.1:1", "STATE_DIRECTORY": str(tmp_path)})
    with open_store_file(tmp_path) as file, contextlib.closing(MongoStore(settings)) as mongo:
        store = delivery(mongo, file, MEGABYTE, Closes(), stockrt.NO_EVENTS)
        for first in range(0, 100_000, 100):
            documents = make_documents(100, first=first)
            store._put_aside(documents, {d["_id"]: "no" for d in documents}, "realtime")
            if "SPOOL_MAX_MB" in caplog.text:
                break
    assert "cannot be put aside" in caplog.text and first > 100
    assert sum(path.stat().st_size for path in tmp_path.glob("stockrt.db*")) <= MEGABYTE


@pytest.mark.parametrize(("megabytes", "used"), [(1, 0.4), (8, 0.7)])
def test_it_never_grows_past_its_limit_and_keeps_what_it_has(
    tmp_path: Path, megabytes: int, used: float
) -> None:
    limit, sizes, kept = megabytes * MEGABYTE, [], 0
    with queue_in(tmp_path, limit) as queue:
        with pytest.raises(QueueFull, match="SPOOL_MAX_MB"):
            while True:
                assert queue.write(make_documents(100, first=kept)).stored == 100
                kept += 100
                sizes.append(sum(path.stat().st_size for path in tmp_path.glob("stockrt.db*")))
        assert limit * used < max(sizes) <= limit
        with pytest.raises(QueueFull, match="SPOOL_MAX_MB"):
            queue.write(make_documents(100, first=kept))
        assert queue.refused == 200
        assert queue.stats().trades == kept
        take(queue, 500)
        assert queue.write(make_documents(100, first=kept)).stored == 100  # there is room again
        assert queue.stats().trades == queue.count() == kept - 400


def test_at_the_limit_codes_fail_by_name_and_say_why(place: Place, gone: None) -> None:
    place.environ["SPOOL_MAX_MB"] = "1"
    with place.opened() as store:
        store.write(make_documents(1))
        with pytest.raises(
            StoreError, match=r"MongoDB unreachable since .*, and .*stockrt\.db.*SPOOL_MAX_MB"
        ) as caught:
            for first in range(0, 100_000, 1000):
                assert store.write(make_documents(1000, first=first)).queued == 1000
    told = in_chinese(caught.value.message)
    assert re.search(r"起无法连接；且无法暂存：/.*stockrt\.db 将超过上限 1 MB；请检查 SPOOL_MAX_MB$", told), (
        told
    )
    assert place.facts[-1].refused == 1000


def test_the_disk_keeps_some_room(tmp_path: Path) -> None:
    with (
        small_disk(tmp_path, "2M") as disk,
        queue_in(disk / "state") as queue,
    ):
        with pytest.raises(
            QueueFull, match=r"MB free, and less than 5% \(0\.1 MB\) with.*STATE_DIRECTORY"
        ) as caught:
            for first in range(0, 1_000_000, 100):
                queue.write(make_documents(100, first=first))
        assert re.search(
            r"所在磁盘剩余 \d\.\d MB，写入后将不足 5%（0\.1 MB）；请检查 STATE_DIRECTORY$",
            in_chinese(caught.value.message),
        )
        found = os.statvfs(disk)
        assert found.f_bavail >= found.f_blocks * 0.05
        assert queue.count() == first


def test_disk_that_is_low_or_read_only_is_said_before_something_is_lost(
    tmp_path: Path, run_pyz: RunPyz
) -> None:
    """--status shows what there is all the same, and each thing once."""
    env = {"INFOWAY_API_BASE_URL": "http://127.0.0.1:9", "INFOWAY_API_KEY": "test-key", "LANG": "zh_CN.UTF-8"}
    with small_disk(tmp_path, "2M") as disk:
        env["STATE_DIRECTORY"] = str(disk / "state")
        run_pyz("--once", "--demo", "--codes", "TSLA.US", env=env)
        free = os.statvfs(disk)
        (disk / "big").write_bytes(b"x" * int((free.f_bavail - free.f_blocks * 0.02) * free.f_bsize))
        why = rf"{disk}\S+ 所在磁盘剩余 0\.\d MB，写入后将不足 5%（0\.1 MB）；请检查 STATE_DIRECTORY"
        checked = run_pyz("--check", env=env).stdout
        assert len(re.findall(f"^失败  状态目录：{why}$", checked, re.MULTILINE)) == 1
        told = run_pyz("--status", env=env).stdout
        assert re.search(f"^此外 +{why}。处理办法：请清理该磁盘$", told, re.MULTILINE)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        why = f"{disk}/state 所在的文件系统只读；请检查 STATE_DIRECTORY"
        assert run_pyz("--check", env=env).stdout.count(why) == 1
        shown = run_pyz("--status", env=env)
        assert (shown.returncode, shown.stdout.count(why)) == (3, 1) and "未运行" in shown.stdout, (
            shown.stderr
        )


def test_what_a_long_absence_took_is_given_back(place: Place) -> None:
    big = [d | {"vw": "1" * 2000} for d in make_documents(10_000)]
    with place.opened() as store:
        for first in range(0, 10_000, 1000):
            store.queue.write(big[first : first + 1000])
        path = place.state / stockrt.SQLITE_NAME
        size = path.stat().st_size
        assert size > stockrt.SHRINK_ABOVE
        store.start()
        assert until(lambda: store.is_empty() and path.stat().st_size < size / 10)


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
        store.start()
        assert until(lambda: store.is_empty())
        assert store.rejects.all() == []
    assert place.documents() == by_id(make_documents(9))


# ------------------------------------------------------------------------------------------------- command line


def environment(place: Place, **more: str) -> dict[str, str]:
    """Return the settings for the program."""
    return place.environ | {"INFOWAY_API_KEY": "test-key"} | more


def test_drain_moves_everything_and_says_so(place: Place, run_pyz: RunPyz) -> None:
    queued(place.state, make_documents(2500))
    done = run_pyz("--drain", env=place.environ)
    assert (done.returncode, done.stdout) == (0, "")
    assert re.fullmatch(r"2500 moved to mongodb://\S+; 0 left on this machine\n", done.stderr)
    assert len(place.documents()) == 2500 and place.waiting() == []
    assert "0 moved" in run_pyz("--drain", env=place.environ).stderr


def test_drain_shows_a_bar_on_a_terminal(
    place: Place, mongo_server: MongoServer, pyz: Path, clean_env: dict[str, str]
) -> None:
    queued(place.state, make_documents(2500))
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


def test_drain_that_mongodb_does_not_take(place: Place, gone: None, run_pyz: RunPyz) -> None:
    queued(place.state, make_documents(5))
    done = run_pyz("--drain", env=place.environ)
    assert done.returncode == 1
    assert "0 moved" in done.stderr and "5 left" in done.stderr and "MONGODB_HOST" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(place.waiting()) == 5


def test_drain_without_a_mongodb(run_pyz: RunPyz) -> None:
    done = run_pyz("--drain")
    assert done.returncode == 78 and "MONGODB_HOST" in done.stderr


def test_rejects_are_listed(place: Place, run_pyz: RunPyz) -> None:
    assert run_pyz("--rejects", env=place.environ).stdout == "no document is refused now\n"
    assert run_pyz("--rejects", "--json", env=place.environ).stdout == ""
    documents = with_own_prices(make_documents(3))
    refuse(place, documents[1])
    queued(place.state, documents)
    done = run_pyz("--drain", env=place.environ)
    assert done.returncode == 1 and re.search(r"\b2 moved .*; 1 refused by it", done.stderr)
    lines = run_pyz("--rejects", env=place.environ).stdout.splitlines()
    assert len(lines) == 1 and documents[1]["_id"] in lines[0] and "MongoDB refused it" in lines[0]
    (reject,) = map(json.loads, run_pyz("--rejects", "--json", env=place.environ).stdout.splitlines())
    assert reject["document"]["p"] == documents[1]["p"]

    done = run_pyz("--drain", "--retry", env=place.environ)
    assert (done.returncode, "1 refused by it" in done.stderr) == (1, True)
    with place.collection() as collection:  # the operator mends it
        collection.delete_one({"_id": "the operator's own"})
    assert "0 moved" in run_pyz("--drain", env=place.environ).stderr
    assert "1 moved" in run_pyz("--drain", "--retry", env=place.environ).stderr
    assert run_pyz("--rejects", "--json", env=place.environ).stdout == ""
    assert place.documents() == by_id(documents)
    assert run_pyz("--retry").returncode == 64


def test_drain_and_rejects_in_chinese(place: Place, run_pyz: RunPyz) -> None:
    environ = environment(place, STOCKRT_LANG="zh")
    assert (
        "未设置 MONGODB_HOST：没有 MongoDB 可供写入；成交保存在 "
        in run_pyz("--drain", env={"STOCKRT_LANG": "zh"}).stderr
    )
    documents = with_own_prices(make_documents(3))
    refuse(place, documents[1])
    queued(place.state, documents)
    with open_store_file(place.state) as file:
        UnsettledTrades(file).add(make_documents(3, first=50))
    told = run_pyz("--status", env=environ).stdout
    assert re.search(
        rf"^暂存队列 {{8}}3 笔成交等待写入 MongoDB，\d\.\d MB，最早一笔自 {LOCAL_TIME} 起等待，"
        r"3 笔成交的收盘价尚待生成$",
        told,
        re.M,
    )
    assert "\n此外            3 笔成交等待写入 MongoDB。处理办法：请启动守护进程，或用 --drain 写入\n" in told
    done = run_pyz("--drain", env=environ)
    *_, line = done.stderr.splitlines()  # before it stands the log's
    assert done.returncode == 1 and re.fullmatch(
        r"已将 2 笔成交写入 mongodb://\S+；本机剩余 0 笔；1 个文档被拒绝：详见 --rejects", line
    )
    (line,) = run_pyz("--rejects", env=environ).stdout.splitlines()
    assert re.match(rf"{LOCAL_TIME}  \S+  {documents[1]['_id']}：", line)
    told = run_pyz("--status", env=environ).stdout
    assert re.search(r"^暂存队列 .*，1 个文档被拒绝：详见 --rejects$", told, re.M)
    assert "\n此外            1 个文档被 MongoDB 拒绝。处理办法：" in told
    done = run_pyz("--rejects", "--discard", env=environ)
    assert done.stderr == "已删除 1 个文档和 0 个损坏的文件（0.0 MB）\n"


def test_status_shows_what_waits(place: Place, run_pyz: RunPyz) -> None:
    queued(place.state, make_documents(40))
    with open_store_file(place.state) as file:
        UnsettledTrades(file).add(make_documents(3, first=50))
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
        rf"40 trades wait for MongoDB, \d\.\d MB, the oldest since {LOCAL_TIME}"
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
    place: Place, away: MongoProxy, platform: PlatformServer, infoway: InfowayServer
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
    words = rf"1[23] trades kept on this machine, MongoDB unreachable since {LOCAL_TIME}(?:; .*no trade since .*)?"
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

    assert until(lambda: not threads())
    gc.collect()  # the lock of the first daemon goes with it
    away.up()
    with ThreadDaemon(settings):  # no execution is needed to move what waits
        assert until(lambda: place.waiting() == [])
    assert len(place.documents()) == 13


def test_the_metrics_say_what_waits(place: Place) -> None:
    settings = settings_for(
        1, "http://127.0.0.1:1", place.state, **place.environ | {"STATE_DIRECTORY": "/x/stockrt"}
    )
    service = stockrt.Service(settings, stockrt.Notifier())
    service.queue_changed(QueueStats(trades=40, bytes=8192, oldest=None, rejects=2, refused=7))
    lines = service.metrics.text().splitlines()
    assert {"stockrt_spool_trades 40", "stockrt_spool_bytes 8192", "stockrt_spool_rejects 2",
            "stockrt_spool_refused_total 7"} <= set(lines)  # fmt: skip
    assert "· trades wait for MongoDB" in service.status(0.0)[0]
    service.queue_changed(QueueStats())
    assert "MongoDB" not in service.status(0.0)[0]
    kept = stockrt.Report(total=2, stored=1, queued=1)
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
