"""The closing snapshot: one document per code and session date, the same whoever writes it and in what order."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kit.cases import each
from kit.daemons import number as examples
from kit.infoway_server import InfowayServer
from kit.ledger import NoLedger
from kit.mongo import MongoServer, fresh_database

import stockrt
from stockrt import (
    Bar,
    Batch,
    Close,
    ClosingPrices,
    Collector,
    Failure,
    FailureKind,
    Finaliser,
    InfowayApi,
    Keeper,
    KeyPool,
    MongoStore,
    Outcome,
    Plan,
    SessionsFile,
    SqliteStore,
    StoreError,
    Trade,
    market_name,
    market_of,
    open_store_file,
    session_of,
    to_document,
)

KINDS = ("sqlite", "mongodb")
# The Friday after Thanksgiving, and a half day of Hong Kong (Christmas Eve).
FRI, XMAS = "2025-11-28", "2025-12-24"
MARKS = ("after_hours", "provisional")
STORED_FIELDS = ("date", "s", "t", "p", "v", "vw", "td", "stock_code", *stockrt.BAR_FIELDS, *MARKS)


AnyStore = SqliteStore | MongoStore
NEVER = threading.Event()


def at(zone: str, moment: str) -> int:
    """Return `2025-06-17 15:59[:30[.999]]` of a zone's clock as epoch milliseconds."""
    return round(datetime.fromisoformat(moment).replace(tzinfo=ZoneInfo(zone)).timestamp() * 1000)


def zone_of(code: str) -> str:
    """Return the zone in which the tests write a code's times."""
    market = market_of(code)
    assert market is not None
    return market.zone


class NoBars:
    """A source that has no bars: what the trades alone make."""

    def fetch(self, batches: Iterable[Batch], stop: threading.Event) -> Iterator[Outcome | None]:
        """Yield that no key may ask for bars."""
        for batch in batches:
            failure = Failure(FailureKind.KEY, "no permission")
            yield Outcome(batch, failures=dict.fromkeys(batch.split(), failure))

    def close(self) -> None:
        """Nothing is open."""


class World(stockrt.Clock):
    """A store, the closer of one process over it, and a clock that stands until it is moved."""

    def __init__(self, store: AnyStore, directory: Path) -> None:
        self.store = store
        self.file = open_store_file(directory / uuid.uuid4().hex)
        self.now_ms = 0
        self.restart()

    def reset(self) -> None:
        """Begin anew, on disk too; faster than another store."""
        clear(self.store)
        with self.file.write() as db:
            db.execute("DELETE FROM sessions")
        self.restart()

    def restart(self) -> None:
        """Begin as a new process would: nothing is remembered but what is stored."""
        self.sessions = SessionsFile(self.file)
        self.closer = ClosingPrices(self.store, self.sessions, self)
        self.finaliser = Finaliser(self.store, NoBars(), self.sessions, clock=self)

    def wall(self) -> float:
        """Return epoch seconds."""
        return self.now_ms / 1000

    def monotonic(self) -> float:
        """Return the same."""
        return self.wall()

    def fetch(self, code: str, traded: str, now: str, price: str = "100.5") -> None:
        """Store a trade as a run does that fetches it at `now`; times are the exchange's."""
        self.now_ms = at(zone_of(code), now)
        document = to_document(
            Trade(code, at(zone_of(code), traded), price, "10", "1005", 0), stockrt.utc_now()
        )
        self.store.write([document])
        self.closer.settle([document], NEVER)
        while not self.finaliser.wait_s():
            self.finaliser.step(NEVER)

    def closes(self) -> dict[str, dict[str, Any]]:
        """Return `close` by `_id`, without the times of writing."""
        return {
            d["_id"]: {n: d[n] for n in STORED_FIELDS if d.get(n) is not None} for d in documents(self.store)
        }

    def prices(self) -> dict[str, str]:
        """Return of each close its price, and whether it is one after hours, such as `100.5 after_hours`."""
        return {
            name: d["p"] + " after_hours" * bool(d.get("after_hours")) for name, d in self.closes().items()
        }


def documents(store: AnyStore) -> list[dict[str, Any]]:
    """Return all documents of `close`."""
    if isinstance(store, MongoStore):
        return list(store.collection("close").find())
    assert isinstance(store, SqliteStore)
    with store._file.write() as db:
        found = db.execute("SELECT * FROM close")
        names = [column[0] for column in found.description]
        return [dict(zip(names, row, strict=True)) for row in found]


def clear(store: AnyStore) -> None:
    """Forget everything."""
    if isinstance(store, MongoStore):
        for name in ("close", "realtime"):
            store.collection(name).delete_many({})
        return
    assert isinstance(store, SqliteStore)
    with store._file.write() as db:
        db.execute("DELETE FROM close")
        db.execute("DELETE FROM realtime")


Open = Callable[[], AnyStore]


def sqlite_store(folder: Path) -> SqliteStore:
    """Open the embedded store."""
    return SqliteStore(open_store_file(folder))


def close(store: AnyStore) -> None:
    """Let go of it."""
    (store if isinstance(store, MongoStore) else store._file).close()


def mongo_store(uri: str, database: str, numeric_type: str = "string") -> MongoStore:
    """Open a store as the settings do."""
    environ = {"MONGODB_HOST": uri, "MONGODB_DB_NAME": database, "MONGODB_NUMERIC_TYPE": numeric_type}
    return MongoStore(stockrt.load_settings(environ, None, (), is_root=False).settings)


@pytest.fixture(params=KINDS)
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Open the same store once more, as another process would."""
    opened: list[AnyStore] = []
    place = request.getfixturevalue("mongo_db") if request.param == "mongodb" else None

    def make() -> AnyStore:
        store: AnyStore = mongo_store(*place) if place else sqlite_store(tmp_path / "store")
        opened.append(store)
        return store

    yield make
    for store in opened:
        close(store)


@pytest.fixture
def store(open_store: Open) -> AnyStore:
    """One store."""
    return open_store()


# ------------------------------------------------------------------------------------------------------
# The table of closes
# ------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """Trades, each as (its time, when it was fetched, its price), and the closes that are then stored."""

    name: str
    code: str
    fetched: tuple[tuple[str, str, str], ...]
    closes: Mapping[str, str]


TUE = "2025-06-17"
TABLE = (
    Row("US before the close: none", "TSLA.US", ((f"{TUE} 15:58:59", f"{TUE} 15:59", "1"),), {}),
    Row("US, the cross", "TSLA.US", ((f"{TUE} 16:00:01", f"{TUE} 16:01", "1"),), {f"TSLA.US|{TUE}": "1"}),
    Row("US, the cross, then after hours", "TSLA.US",
        ((f"{TUE} 16:00:01", f"{TUE} 16:01", "300.10"), (f"{TUE} 16:04:30", f"{TUE} 16:05", "303.75")),
        {f"TSLA.US|{TUE}": "300.10"}),
    Row("US, the cross not seen", "TSLA.US",
        ((f"{TUE} 15:59:58", f"{TUE} 16:00", "300"), (f"{TUE} 16:04:30", f"{TUE} 16:05", "303.75")),
        {f"TSLA.US|{TUE}": "300"}),
    Row("US, after the cross", "TSLA.US", ((f"{TUE} 16:00:06.001", f"{TUE} 16:06", "1"),),
        {f"TSLA.US|{TUE}": "1 after_hours"}),
    Row("US before the open and after hours", "TSLA.US",
        ((f"{TUE} 08:00", f"{TUE} 08:01", "1"), (f"{TUE} 18:00", f"{TUE} 18:01", "2")),
        {f"TSLA.US|{TUE}": "2 after_hours"}),
    Row("US overnight: none", "TSLA.US", ((f"{TUE} 01:30", f"{TUE} 18:00", "1"),), {}),
    Row("US at the open", "TSLA.US", ((f"{TUE} 09:30", f"{TUE} 18:00", "1"),), {f"TSLA.US|{TUE}": "1"}),
    Row("US on Sunday night: none", "TSLA.US", (("2025-06-22 20:30", "2025-06-23 03:00", "1"),), {}),
    Row("US at the very close", "TSLA.US", ((f"{TUE} 15:59:59", f"{TUE} 16:00", "1"),), {f"TSLA.US|{TUE}": "1"}),
    Row("US, a later trade", "TSLA.US",
        ((f"{TUE} 15:59:59", f"{TUE} 16:00:10", "1"), (f"{TUE} 16:00:02", f"{TUE} 16:03", "2")),
        {f"TSLA.US|{TUE}": "2"}),
    Row("US after hours, a regular trade stored", "TSLA.US",
        ((f"{TUE} 15:40", f"{TUE} 15:41", "1"), (f"{TUE} 15:59", f"{TUE} 15:59:30", "2"),
         (f"{TUE} 17:29", f"{TUE} 17:30", "3")), {f"TSLA.US|{TUE}": "2"}),
    Row("US after hours, none stored", "TSLA.US", ((f"{TUE} 17:29", f"{TUE} 17:30", "3"),),
        {f"TSLA.US|{TUE}": "3 after_hours"}),
    Row("US after hours, only one of the day before stored", "TSLA.US",
        (("2025-06-16 15:58", "2025-06-16 15:59", "1"), (f"{TUE} 17:29", f"{TUE} 17:30", "3")),
        {"TSLA.US|2025-06-16": "1", f"TSLA.US|{TUE}": "3 after_hours"}),
    Row("US after hours, the earlier stays", "TSLA.US",
        ((f"{TUE} 17:29", f"{TUE} 17:30", "3"), (f"{TUE} 18:29", f"{TUE} 18:30", "4")),
        {f"TSLA.US|{TUE}": "3 after_hours"}),
    Row("US after hours, two at the same time", "TSLA.US",
        ((f"{TUE} 17:29", f"{TUE} 17:30", "4"), (f"{TUE} 17:29", f"{TUE} 17:31", "3"),
         (f"{TUE} 17:29", f"{TUE} 17:32", "5")), {f"TSLA.US|{TUE}": "3 after_hours"}),
    Row("US, a regular trade becomes known late", "TSLA.US",
        ((f"{TUE} 17:29", f"{TUE} 17:30", "3"), (f"{TUE} 15:50", f"{TUE} 18:30", "2")), {f"TSLA.US|{TUE}": "2"}),
    Row("US before the open of the next day", "TSLA.US",
        ((f"{TUE} 15:59", f"{TUE} 15:59:30", "2"), (f"{TUE} 19:59", "2025-06-18 03:00", "3")),
        {f"TSLA.US|{TUE}": "2"}),
    Row("US in the next session: the day before is left alone", "TSLA.US",
        ((f"{TUE} 16:00", f"{TUE} 16:01", "1"), ("2025-06-18 10:00", "2025-06-18 10:01", "9")),
        {f"TSLA.US|{TUE}": "1"}),
    Row("US on Saturday", "TSLA.US",
        (("2025-06-20 16:00:02", "2025-06-20 16:04", "1"), ("2025-06-20 19:58", "2025-06-21 12:00", "2"),
         ("2025-06-20 19:58", "2025-06-22 12:00", "2")), {"TSLA.US|2025-06-20": "1"}),
    Row("US half day: after its close until the bar comes", "TSLA.US",
        ((f"{FRI} 12:59", f"{FRI} 12:59:30", "1"), (f"{FRI} 14:30", f"{FRI} 16:01", "2")),
        {f"TSLA.US|{FRI}": "2"}),
    Row("US summer time begins: Friday before, Monday after", "TSLA.US",
        (("2025-03-07 15:59", "2025-03-09 12:00", "1"), ("2025-03-10 15:59", "2025-03-10 16:00", "2")),
        {"TSLA.US|2025-03-07": "1", "TSLA.US|2025-03-10": "2"}),
    Row("US summer time begins: Monday, a minute before the close", "TSLA.US",
        (("2025-03-10 15:58", "2025-03-10 15:59", "2"),), {}),
    Row("US summer time ends: Friday before, Monday after", "TSLA.US",
        (("2025-10-31 16:00:04", "2025-11-02 12:00", "1"), ("2025-11-03 15:59", "2025-11-03 16:00", "2")),
        {"TSLA.US|2025-10-31": "1", "TSLA.US|2025-11-03": "2"}),
    Row("US summer time ends: Monday, a minute before the close", "TSLA.US",
        (("2025-11-03 15:58", "2025-11-03 15:59", "2"),), {}),
    Row("HK half day", "00700.HK",
        ((f"{XMAS} 11:59", f"{XMAS} 12:01", "1"), (f"{XMAS} 12:08:30", f"{XMAS} 16:01", "2")),
        {f"00700.HK|{XMAS}": "2"}),
    Row("HK full day, at noon: none", "00700.HK", ((f"{TUE} 11:59", f"{TUE} 12:30", "1"),), {}),
    Row("HK, its auction", "00700.HK",
        ((f"{TUE} 15:59:58", f"{TUE} 16:00", "500.0"), (f"{TUE} 16:08:20", f"{TUE} 16:09", "499.6")),
        {f"00700.HK|{TUE}": "499.6"}),
    Row("HK, the auction's trade alone", "00700.HK", ((f"{TUE} 16:08:50", f"{TUE} 16:20", "499.6"),),
        {f"00700.HK|{TUE}": "499.6"}),
    Row("HK, its auction not seen", "00700.HK", ((f"{TUE} 15:59:58", f"{TUE} 16:00", "500.0"),),
        {f"00700.HK|{TUE}": "500.0"}),
    Row("JP in 2024, when it closed at 15:00", "7203.JP",
        (("2024-11-01 15:00", "2024-11-01 15:01", "1"), ("2024-11-01 15:20", "2024-11-01 15:21", "2")),
        {"7203.JP|2024-11-01": "1"}),
    Row("CN in the lunch break: none", "600519.SH", ((f"{TUE} 11:29:59", f"{TUE} 12:15", "1"),), {}),
    Row("CN across the lunch break", "600519.SH",
        ((f"{TUE} 11:29:59", f"{TUE} 12:15", "1"), (f"{TUE} 15:00", f"{TUE} 15:00:05", "2")),
        {f"600519.SH|{TUE}": "2"}),
    Row("CN, a share that did not trade after the lunch break", "000001.SZ",
        ((f"{TUE} 11:29:59", f"{TUE} 12:15", "1"), (f"{TUE} 11:29:59", f"{TUE} 15:01", "1")),
        {f"000001.SZ|{TUE}": "1"}),
    Row("CN, its auction", "600519.SH", ((f"{TUE} 15:00:00.999", f"{TUE} 15:01", "1"),), {f"600519.SH|{TUE}": "1"}),
    Row("JP", "7203.JP", ((f"{TUE} 15:29", f"{TUE} 15:29:59", "1"), (f"{TUE} 15:30", f"{TUE} 15:31", "2")),
        {f"7203.JP|{TUE}": "2"}),
    Row("KS", "005930.KS", ((f"{TUE} 15:30", f"{TUE} 15:31", "2"),), {f"005930.KS|{TUE}": "2"}),
    Row("TW", "2330.TW", ((f"{TUE} 13:30", f"{TUE} 13:31", "2"),), {f"2330.TW|{TUE}": "2"}),
    Row("IN", "RELIANCE.IN", ((f"{TUE} 15:29", f"{TUE} 15:29:59", "1"), (f"{TUE} 15:29:58", f"{TUE} 15:45", "2")),
        {f"RELIANCE.IN|{TUE}": "2"}),
    Row("IN, its closing session", "RELIANCE.IN",
        ((f"{TUE} 15:29:59", f"{TUE} 15:30", "1"), (f"{TUE} 15:50", f"{TUE} 15:51", "2")), {f"RELIANCE.IN|{TUE}": "2"}),
    Row("IN, a session on a Sunday", "RELIANCE.IN", (("2026-02-01 15:29", "2026-02-01 15:45", "1"),),
        {"RELIANCE.IN|2026-02-01": "1"}),
    Row("a pair before 17:00 New York", "USDCNY", ((f"{TUE} 16:59:58", f"{TUE} 16:59:59", "1"),), {}),
    Row("a pair across 17:00 New York", "USDCNY",
        ((f"{TUE} 16:59:58", f"{TUE} 16:59:59", "1"), (f"{TUE} 17:00", f"{TUE} 17:00:01", "2"),
         (f"{TUE} 23:59", f"{TUE} 23:59:30", "3")), {f"USDCNY|{TUE}": "1"}),
    Row("a pair after 17:00, nothing stored before", "USDCNY", ((f"{TUE} 17:00", f"{TUE} 17:00:01", "2"),),
        {f"USDCNY|{TUE}": "2 after_hours"}),
    Row("a pair the next morning: the session before", "USDCNY",
        ((f"{TUE} 16:59", f"{TUE} 16:59:30", "1"), ("2025-06-18 09:00", "2025-06-18 09:01", "2")),
        {f"USDCNY|{TUE}": "1"}),
    Row("a pair on Sunday evening: Friday's", "USDCNY",
        (("2025-06-20 16:59", "2025-06-20 16:59:30", "1"), ("2025-06-22 17:30", "2025-06-22 17:31", "2")),
        {"USDCNY|2025-06-20": "1"}),
    Row("a pair on Monday: Friday's", "XAUUSD",
        (("2025-06-20 16:59", "2025-06-20 16:59:30", "1"), ("2025-06-23 09:00", "2025-06-23 09:01", "2")),
        {"XAUUSD|2025-06-20": "1"}),
    Row("a pair on the Sunday on which summer time begins", "USDCNY",
        (("2025-03-07 16:59", "2025-03-07 16:59:30", "1"), ("2025-03-09 17:01", "2025-03-09 17:02", "2"),
         ("2025-03-10 16:59", "2025-03-10 17:00", "3")), {"USDCNY|2025-03-07": "1", "USDCNY|2025-03-10": "3"}),
    Row("a pair on the Sunday on which summer time ends", "USDCNY",
        (("2025-10-31 16:59", "2025-10-31 16:59:30", "1"), ("2025-11-02 17:01", "2025-11-02 17:02", "2"),
         ("2025-11-03 16:59", "2025-11-03 17:00", "3")), {"USDCNY|2025-10-31": "1", "USDCNY|2025-11-03": "3"}),
    Row("a base metal ends with London", "XALUSD",
        ((f"{TUE} 18:59", f"{TUE} 19:00", "1"), (f"{TUE} 19:00:01", f"{TUE} 20:00", "2")), {f"XALUSD|{TUE}": "1"}),
    Row("gold does not", "XAUUSD", ((f"{TUE} 14:30", f"{TUE} 14:31", "1"),), {}),
    Row("crypto across midnight UTC", "BTCUSDT",
        ((f"{TUE} 23:59:59.500", f"{TUE} 23:59:59.900", "1"), ("2025-06-18 00:00", "2025-06-18 00:00:01", "2")),
        {f"BTCUSDT|{TUE}": "1"}),
    Row("crypto, the last trade fetched after midnight", "BTCUSDT", ((f"{TUE} 23:59:59", "2025-06-18 00:00", "1"),),
        {f"BTCUSDT|{TUE}": "1"}),
    Row("crypto on Saturday and Sunday", "BTCUSDT",
        (("2025-06-21 23:58", "2025-06-21 23:59", "1"), ("2025-06-22 23:58", "2025-06-22 23:59", "2"),
         ("2025-06-23 00:01", "2025-06-23 00:02", "3")), {"BTCUSDT|2025-06-21": "1", "BTCUSDT|2025-06-22": "2"}),
    Row("crypto, nothing of the day before", "BTCUSDT", ((f"{TUE} 00:01", f"{TUE} 00:02", "1"),), {}),
)  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def shared_world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One world for many cases, each of which resets it."""
    folder = tmp_path_factory.mktemp("closes")
    if request.param == "sqlite":
        store: AnyStore = sqlite_store(folder)
        yield World(store, folder)
        close(store)
        return
    server: MongoServer = request.getfixturevalue("mongo_server")
    with fresh_database(server) as place:
        store = mongo_store(*place)
        yield World(store, folder)
        close(store)


@pytest.mark.parametrize("restarted", [False, True], ids=["one process", "a process a run"])
@each("row", TABLE, ids=lambda row: row.name)
def test_the_table_of_closes(shared_world: World, row: Row, restarted: bool) -> None:
    """Whether one process sees it all or each run is a new one, and once more with nothing new."""
    shared_world.reset()
    world = shared_world
    for traded, now, price in (*row.fetched, row.fetched[-1]):
        world.fetch(row.code, traded, now, price)
        if restarted:
            world.restart()
    assert world.prices() == row.closes


@each("row", TABLE, ids=lambda row: row.name)
def test_a_replay_in_reverse_order_ends_the_same(shared_world: World, row: Row) -> None:
    """All trades are fetched anew at the time of the last run, the last one first and the first one first.

    Fetched that late, the trades of dates before make closes too.
    """
    last = row.fetched[-1][1]
    ends = []
    for order in (row.fetched, row.fetched[::-1]):
        shared_world.reset()
        for traded, _, price in order:
            shared_world.fetch(row.code, traded, last, price)
        ends.append(shared_world.prices())
    assert ends[0] == ends[1]
    assert ends[0].items() >= row.closes.items()


# ------------------------------------------------------------------------------------------------------
# The document
# ------------------------------------------------------------------------------------------------------


def test_the_document_has_exactly_these_fields(store: AnyStore, tmp_path: Path) -> None:
    """The trade's as the API sent them; what stands there keeps its create_time."""
    world = World(store, tmp_path)
    world.fetch("TSLA.US", f"{TUE} 15:59", f"{TUE} 16:01", "1")
    (first,) = documents(store)
    world.fetch("TSLA.US", f"{TUE} 16:00:02", f"{TUE} 16:04", "2")
    (second,) = documents(store)
    names = {"_id", "date", "s", "t", "p", "v", "vw", "td", "stock_code", "create_time", "update_time"}
    names |= {"provisional"}
    assert {name for name, value in second.items() if value is not None} == names
    assert second["create_time"] == first["create_time"]
    assert second["update_time"] >= first["update_time"]
    assert (second["_id"], second["date"], second["p"], second["vw"]) == (f"TSLA.US|{TUE}", TUE, "2", "1005")
    if isinstance(store, MongoStore):
        assert isinstance(second["create_time"], datetime)
        assert isinstance(second["t"], int)


def test_what_is_polled_again_is_not_written_again(store: AnyStore, tmp_path: Path) -> None:
    """Neither by the process that wrote it nor by another: update_time stays."""
    world = World(store, tmp_path)
    for code, traded in (("TSLA.US", "15:59"), ("AAPL.US", "17:00"), ("USDCNY", "16:59")):
        world.fetch(code, f"{TUE} {traded}", f"{TUE} 18:00")
    before = documents(store)
    assert len(before) == 3
    for _ in range(2):
        for code, traded in (("TSLA.US", "15:59"), ("AAPL.US", "17:00"), ("USDCNY", "16:59")):
            world.fetch(code, f"{TUE} {traded}", f"{TUE} 18:00")
        world.restart()
    assert documents(store) == before


@pytest.mark.parametrize("numeric_type", ["decimal", "double"])
def test_numbers_have_the_type_that_is_set(
    numeric_type: str, mongo_db: tuple[str, str], tmp_path: Path
) -> None:
    """Also those that come back out of `realtime`; later trades are told by number."""
    from bson.decimal128 import Decimal128

    store = mongo_store(*mongo_db, numeric_type)
    world = World(store, tmp_path)
    world.fetch("TSLA.US", f"{TUE} 15:59", f"{TUE} 15:59:30", "9.50")
    world.fetch("TSLA.US", f"{TUE} 15:59", f"{TUE} 15:59:40", "10.25")  # the same moment, a greater price
    world.fetch("TSLA.US", f"{TUE} 17:29", f"{TUE} 17:30", "12")
    world.fetch("AAPL.US", f"{TUE} 17:29", f"{TUE} 17:30", "12")
    found = {d["_id"]: d for d in documents(store)}
    kind = Decimal128 if numeric_type == "decimal" else float
    assert {type(d[name]) for d in found.values() for name in ("p", "v", "vw")} == {kind}
    assert found[f"TSLA.US|{TUE}"]["p"] == (Decimal128("10.25") if numeric_type == "decimal" else 10.25)
    assert found[f"AAPL.US|{TUE}"]["after_hours"] is True
    close(store)


def test_stored_numbers_of_another_type_are_read_all_the_same(
    mongo_db: tuple[str, str], tmp_path: Path
) -> None:
    """MONGODB_NUMERIC_TYPE was changed between the trade and its close."""
    uri, name = mongo_db
    old, new = mongo_store(uri, name, "double"), mongo_store(uri, name, "string")
    World(old, tmp_path).fetch("TSLA.US", f"{TUE} 15:59", f"{TUE} 15:59:30", "9.5")
    world = World(new, tmp_path)
    world.fetch("TSLA.US", f"{TUE} 17:29", f"{TUE} 17:30", "12")
    assert world.prices() == {f"TSLA.US|{TUE}": "9.5"}
    close(old)
    close(new)


FOREIGN: dict[str, dict[str, Any]] = {
    "no price": {},
    "price null": {"p": None, "v": "1", "vw": "1", "td": 0},
    "no direction": {"p": "9", "v": "1", "vw": "9"},
    "no turnover": {"p": "9", "v": "1", "td": 0},
    "a word for a price": {"p": "n/a", "v": "1", "vw": "1", "td": 0},
    "not a number": {"p": float("nan"), "v": 1.0, "vw": 1.0, "td": 0},
    "a list for a volume": {"p": "9", "v": ["1"], "vw": "1", "td": 0},
    "a direction in words": {"p": "9", "v": "1", "vw": "9", "td": "buy"},
    "time as a fraction": {"t": 0.5, "p": "9", "v": "1", "vw": "9", "td": 0},
    "another code in s": {"s": None, "p": "9", "v": "1", "vw": "9", "td": 0},
}


@pytest.mark.parametrize("numeric_type", ["string", "double", "decimal"])
def test_what_is_no_trade_in_the_collection_is_passed_over(
    numeric_type: str, mongo_db: tuple[str, str], tmp_path: Path
) -> None:
    """Another program wrote to `realtime`: the close is the newest trade that is one. Each case has its code."""
    store = mongo_store(*mongo_db, numeric_type)
    world = World(store, tmp_path)
    t = at("America/New_York", f"{TUE} 15:59")
    codes = {f"A{number}.US": name for number, name in enumerate(FOREIGN)}
    for code, name in codes.items():
        world.fetch(code, f"{TUE} 15:57", f"{TUE} 15:57:30", "9.5")
        fields = FOREIGN[name]
        document = {"s": code, "stock_code": code, "price": 305.7, **fields}
        store.collection().insert_one({**document, "t": t + fields.get("t", 0)})
        # also one that is named as ours are
        like_ours = {**document, "_id": f"{code}|{t + 1}|9|1|0", "t": t + 1 + fields.get("t", 0)}
        store.collection().insert_one(like_ours)
        world.fetch(code, f"{TUE} 17:29", f"{TUE} 17:30", "12")
    found = {codes[name.partition("|")[0]]: d for name, d in world.closes().items()}
    assert {name: str(d["p"]) for name, d in found.items()} == dict.fromkeys(FOREIGN, "9.5")
    assert not [name for name, d in found.items() if "after_hours" in d]
    close(store)


def test_synthetic_trades_are_no_close(tmp_path: Path) -> None:
    """What --demo stored is not taken for the last trade of a session."""
    store = sqlite_store(tmp_path)
    trade = Trade("TSLA.US", at("America/New_York", f"{TUE} 15:59"), "1", "1", "1", 0)
    store.write([to_document(trade, stockrt.utc_now(), demo=True)])
    world = World(store, tmp_path)
    world.fetch("TSLA.US", f"{TUE} 17:29", f"{TUE} 17:30", "12")
    assert world.prices() == {f"TSLA.US|{TUE}": "12 after_hours"}
    close(store)


def test_the_newest_trade_is_found_wherever_in_the_day_it_lies(store: AnyStore) -> None:
    """Many codes at once: some trade every second, some in the morning only, some not at all."""
    start, end = at("America/New_York", f"{TUE} 00:00"), at("America/New_York", f"{TUE} 16:05")
    last = {f"A{number}.US": end - number * number * 40_000 for number in range(38)}
    trades = [
        Trade(code, t - 1000 * back, "1", "1", "1", 0) for code, t in last.items() for back in (0, 1, 2)
    ]
    trades += [Trade(code, end + 1, "9", "9", "9", 0) for code in last]
    trades += [Trade(code, start - 1, "9", "9", "9", 0) for code in [*last, "OLD.US"]]
    store.write([to_document(trade, stockrt.utc_now()) for trade in trades])
    found = store.newest([*last, "OLD.US", "NONE.US"], start, end)
    assert {code: document["t"] for code, document in found.items()} == {
        code: t for code, t in last.items() if t >= start
    }
    assert all(document["_id"].startswith(f"{code}|") for code, document in found.items())


# ------------------------------------------------------------------------------------------------------
# Several writers
# ------------------------------------------------------------------------------------------------------


def test_racing_instances_end_in_the_same_document(open_store: Open, tmp_path: Path) -> None:
    """Each has its own connection and its own part of the trades; both write at the same time."""
    now = at("America/New_York", f"{TUE} 18:00")
    minutes = ("15:58", "15:59", "16:04", "16:20", "17:00", "09:31", "16:00")
    worlds = [World(open_store(), tmp_path) for _ in range(2)]
    barrier = threading.Barrier(2)
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            worlds[number].now_ms = now
            barrier.wait(60)
            for place in range(len(minutes)):
                minute = minutes[place if number else -1 - place]
                t = at("America/New_York", f"{TUE} {minute}")
                fetched = [
                    to_document(Trade(f"R{code}.US", t, f"{number}.{place}", "1", "1", 0), stockrt.utc_now())
                    for code in range(20)
                ]
                worlds[number].store.write(fetched)
                worlds[number].closer.settle(fetched, NEVER)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    # the last regular trade; of the two with the same time the one with the greater price
    assert worlds[0].prices() == {f"R{code}.US|{TUE}": "1.6" for code in range(20)}


RACER = """
import sys, pathlib, uuid
import stockrt
from rooms import test_close
kind, place, state, number = sys.argv[1:]
if kind == "mongodb":
    store = test_close.mongo_store(*place.split(" "))
else:
    store = test_close.sqlite_store(pathlib.Path(place))
world = test_close.World(store, pathlib.Path(state))
print("ready", flush=True)
sys.stdin.readline()
for minute in range(30, 60):
    world.fetch("TSLA.US", f"2025-06-17 15:{minute}", "2025-06-17 18:00", f"{number}.{minute}")
    world.fetch("AAPL.US", f"2025-06-17 17:{89 - minute}", "2025-06-17 18:00", f"{number}.{minute}")
"""


# In short: two instances race in MongoDB in a test above and in rooms/test_final.py.
@pytest.mark.parametrize("kind", ["sqlite", pytest.param("mongodb", marks=pytest.mark.long)])
def test_racing_processes_end_in_the_same_document(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """One may be writing while the other is; nothing is lost and nobody fails."""
    place = " ".join(request.getfixturevalue("mongo_db")) if kind == "mongodb" else str(tmp_path / "store")
    path = os.pathsep.join(map(str, (Path(stockrt.__file__).parent, Path(__file__).parents[1])))
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, kind, place, str(tmp_path / f"state{number}"), str(number)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        for number in (1, 2)
    ]  # fmt: skip
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    for racer in racers:
        _, words = racer.communicate(timeout=60)
        assert racer.returncode == 0, words
    store: AnyStore = mongo_store(*place.split(" ")) if kind == "mongodb" else sqlite_store(Path(place))
    # of AAPL.US both fetched trades after hours only: the earliest, of two at that time the lesser price
    assert World(store, tmp_path).prices() == {f"TSLA.US|{TUE}": "2.59", f"AAPL.US|{TUE}": "1.59 after_hours"}
    close(store)


MINUTES = st.sampled_from([0, 570, 720, 779, 780, 784, 786, 900, 959, 960, 964, 966, 1020, 1199, 1439])
CODES = ("TSLA.US", "00700.HK", "USDCNY", "BTCUSDT")
DATES = (FRI, "2025-12-01", XMAS)
TRADES = st.builds(
    lambda code, day, minute, price, side: Trade(
        code, at(zone_of(code), f"{day} {minute // 60:02d}:{minute % 60:02d}"), price, "1", "1", side
    ),
    st.sampled_from(CODES), st.sampled_from(DATES), MINUTES, st.sampled_from(["9.5", "10.25"]), st.integers(0, 1),
)  # fmt: skip


def replay(world: World, batches: Sequence[Sequence[Trade]], restarts: bool) -> dict[str, dict[str, Any]]:
    """Store batches, all fetched days later, and return the closes."""
    clear(world.store)
    world.restart()
    world.now_ms = at("UTC", "2025-12-31 12:00")
    for batch in batches:
        fetched = list({stockrt.identity(t): to_document(t, stockrt.utc_now()) for t in batch}.values())
        world.store.write(fetched)
        world.closer.settle(fetched, NEVER)
        if restarts:
            world.restart()
    return world.closes()


def check_any_order(world: World, trades: list[Trade], data: st.DataObject) -> None:
    """Check that three replays, cut and ordered and repeated by hypothesis, end in the same collection."""
    ends = []
    for number in range(3):
        order = data.draw(st.permutations(trades)) if number else trades
        repeated = [*order, *data.draw(st.lists(st.sampled_from(trades), max_size=5))]
        cut = data.draw(st.integers(1, len(repeated)))
        batches = [repeated[place : place + cut] for place in range(0, len(repeated), cut)]
        ends.append(replay(world, batches, restarts=data.draw(st.booleans())))
    assert ends[0] == ends[1] == ends[2]
    # of a date without a regular trade a pair may have one after the close, or, as a share, none but before the open
    regular = {f"{t.s}|{session.date}" for t in trades if (session := session_of_trade(t)).opens <= t.t}
    assert set(ends[0]) == regular


def session_of_trade(trade: Trade) -> stockrt.Session:
    """Return the session of the exchange-local date of a trade."""
    market = market_of(trade.s)
    assert market is not None
    return session_of(market, trade.t)


@settings(
    max_examples=examples(100, 1000, quick=20),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(TRADES, min_size=1, max_size=14), st.data())
def test_any_order_and_repetition_ends_in_the_same_closes(
    tmp_path_factory: pytest.TempPathFactory, trades: list[Trade], data: st.DataObject
) -> None:
    """On the embedded store."""
    folder = tmp_path_factory.mktemp("order")
    store = sqlite_store(folder)
    store._file.read_one("PRAGMA synchronous=OFF")
    world = World(store, folder)
    try:
        check_any_order(world, trades, data)
    finally:
        world.file.close()
        close(store)


@settings(
    max_examples=examples(12, 120, quick=6),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(TRADES, min_size=1, max_size=10), st.data())
def test_any_order_and_repetition_ends_in_the_same_closes_on_mongodb(
    mongo_db: tuple[str, str], tmp_path_factory: pytest.TempPathFactory,
    trades: list[Trade], data: st.DataObject,
) -> None:  # fmt: skip
    """The same."""
    store = mongo_store(*mongo_db)
    world = World(store, tmp_path_factory.mktemp("order"))
    try:
        check_any_order(world, trades, data)
    finally:
        world.file.close()
        close(store)


NEW_YEAR = session_of(stockrt.MARKETS["US"], at("America/New_York", "2025-01-01 12:00"))
A_BAR = Bar("X.US", 10**9, "1", "3", "1", "2", "10", "20")
CLOSES = st.builds(
    lambda t, p, td, kind: Close(
        to_document(Trade("X.US", t, p, "1", "1", td), datetime(2025, 1, 1, tzinfo=UTC)), "2025-01-01", **kind
    ),
    st.integers(NEW_YEAR.close - 1, NEW_YEAR.close + 1), st.sampled_from(["9.5", "10.25"]), st.integers(0, 1),
    st.sampled_from([{"provisional": True}, {"after_hours": True, "provisional": True}]),
)  # fmt: skip
FINAL_CLOSES = st.builds(
    lambda volume, price: stockrt.bar_close(
        A_BAR._replace(volume=volume, close=price),
        NEW_YEAR,
    ),
    st.sampled_from(["9", "10", "1e1", "1000.5"]), st.sampled_from(["9.5", "10.25"]),
)  # fmt: skip


def rank(close: Close) -> tuple[Any, ...]:
    """Return promise 8 of the stores as a value: the greater, the better."""
    t, p, td = (close.document[name] for name in ("t", "p", "td"))
    if close.bar is not None:
        return (2, float(close.bar.volume), float(close.bar.close))
    if close.after_hours:
        return (0, -t, [-ord(letter) for letter in p], -td)
    return (1, t, p, td)


@settings(
    max_examples=examples(80, 800, quick=20),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(CLOSES | FINAL_CLOSES, min_size=1, max_size=6))
def test_the_best_of_all_candidates_stands(shared_world: World, closes: list[Close]) -> None:
    """Trades and bars, written one by one and all at once."""
    best, shared_store = max(closes, key=rank), shared_world.store
    for batches in ([[close] for close in closes], [closes]):
        clear(shared_store)
        for batch in batches:
            shared_store.write_closes(batch)
        (stands,) = documents(shared_store)
        names = ("t", "p", "td")
        assert [stands[name] for name in names] == [best.document[name] for name in names]
        assert {name for name in MARKS if stands.get(name)} == set(best.marks())
        numbers = {name: stands.get(name) for name in stockrt.BAR_FIELDS if stands.get(name) is not None}
        assert numbers.keys() == best.bar_fields().keys()
        if best.bar is not None:
            assert float(stands["volume"]) == float(best.bar.volume)
            assert stands["close"] == stands["p"] == best.bar.close
        assert shared_store.finals([best.key, "Y.US|2025-01-01"]) == ({best.key} if best.bar else set())


# ------------------------------------------------------------------------------------------------------
# A run
# ------------------------------------------------------------------------------------------------------


class Hurried(random.Random):
    """Chance that makes every pause before another try the shortest."""

    def random(self) -> float:
        """Return the least."""
        return 0.0


def api_of(server: InfowayServer, key: str = "test-key") -> InfowayApi:
    """Return a client of a server, its key without limits."""
    return InfowayApi(server.url, KeyPool([(key, Plan("0", 0, 0, 0))], NoLedger()), rng=Hurried())


def test_a_run_keeps_the_closes_of_what_it_fetched(store: AnyStore, tmp_path: Path) -> None:
    """From the API's answer to both collections."""
    evening = at("America/New_York", f"{FRI} 15:59:30")
    world = World(store, tmp_path)
    world.now_ms = at("America/New_York", f"{FRI} 16:30")
    codes = [f"A{number}.US" for number in range(150)] + ["BTCUSDT", "USDCNY"]
    with InfowayServer(epoch_ms=evening) as server:
        report = Collector(api_of(server), store, Keeper(world.closer)).run(codes, threading.Event())
    assert report.complete, report
    assert len(world.closes()) == 150
    assert set(world.prices()) == {f"A{number}.US|{FRI}" for number in range(150)}


# A fault of the closes that is no damage of the file.
NO_CLOSES = (
    "CREATE TRIGGER no_closes BEFORE INSERT ON close BEGIN SELECT RAISE(ABORT, 'no closes today'); END"
)


def test_a_snapshot_that_fails_costs_no_trade_and_is_said(tmp_path: Path) -> None:
    """The table `close` takes nothing: everything is fetched and stored all the same, and the run is not complete."""
    store = sqlite_store(tmp_path)
    with store._file.write() as db:
        db.execute(NO_CLOSES)
    world = World(store, tmp_path)
    world.now_ms = at("America/New_York", "2025-06-17 18:00")
    codes = [f"A{number}.US" for number in range(2500)]
    with InfowayServer(epoch_ms=at("America/New_York", "2025-06-17 15:59")) as server:
        report = Collector(api_of(server), store, Keeper(world.closer)).run(codes, threading.Event())
    assert (report.stored, report.failures) == (2500, {})
    assert not report.complete
    assert "no closes today" in report.summary()
    with pytest.raises(StoreError, match="STATE_DIRECTORY"):
        store.write_closes([regular()])


class FaultyCloses(stockrt.ClosingPrices):
    """Closing prices with a fault of our own."""

    def __init__(self) -> None:
        pass

    def settle(
        self, documents: Sequence[dict[str, Any]], stop: threading.Event
    ) -> list[stockrt.RefusedClose]:
        """Fail as a look at a field does that is not there."""
        raise KeyError("p")


def test_any_fault_in_making_closes_costs_the_closes_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is stored counts as stored; the fault is named in the report and once in the log."""
    store = sqlite_store(tmp_path)
    codes = [f"A{number}.US" for number in range(2500)]
    with InfowayServer() as server:
        report = Collector(api_of(server), store, Keeper(FaultyCloses())).run(codes, threading.Event())
    assert (report.total, report.stored, report.failures) == (2500, 2500, {})
    assert not report.complete
    assert "a fault of stockrt itself: KeyError" in report.close_error
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]
    close(store)


def test_closes_that_cannot_be_made_are_said_once_not_at_every_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every report holds it; the log when it begins, and when it is over."""
    caplog.set_level("INFO", "stockrt")
    environ = {"STATE_DIRECTORY": str(tmp_path), "INFOWAY_API_KEY": "test-key", "INFOWAY_PLAN": "0"}
    with InfowayServer(epoch_ms=at("America/New_York", f"{TUE} 15:59")) as server:
        environ["INFOWAY_API_BASE_URL"] = server.url
        loaded = stockrt.load_settings(environ, None, (), is_root=False)
        with stockrt.Pipeline(loaded.settings) as pipeline:
            assert isinstance(pipeline.store, SqliteStore)
            with pipeline.store._file.write() as db:
                db.execute(NO_CLOSES)
            for number in range(5):
                assert "no closes today" in pipeline.run([f"A{number}.US"], NEVER).close_error
            assert caplog.text.count("closing snapshot: ") == 1
            with pipeline.store._file.write() as db:
                db.execute("DROP TRIGGER no_closes")
            assert pipeline.run(["B.US"], NEVER).complete
    assert "closing snapshot: well again" in caplog.text


def regular() -> Close:
    """Return some close."""
    trade = Trade("X.US", at("America/New_York", f"{TUE} 15:59"), "1", "1", "1", 0)
    return Close(to_document(trade, stockrt.utc_now()), TUE)


# ------------------------------------------------------------------------------------------------------
# Sessions
# ------------------------------------------------------------------------------------------------------


@each(
    ("code", "day", "opens", "close", "until"),
    [
        ("TSLA.US", "2025-03-07", "09:30", "16:00", "16:00:05"),
        ("TSLA.US", "2025-03-10", "09:30", "16:00", "16:00:05"),
        ("00700.HK", TUE, "09:30", "16:00", "16:10"),
        ("600519.SH", TUE, "09:30", "15:00", "15:05"),
        ("000001.SZ", TUE, "09:30", "15:00", "15:05"),
        ("7203.JP", TUE, "09:00", "15:30", "15:35"),
        ("7203.JP", "2024-11-05", "09:00", "15:30", "15:35"),
        ("7203.JP", "2024-11-04", "09:00", "15:00", "15:05"),
        ("005930.KS", TUE, "09:00", "15:30", "15:35"),
        ("RELIANCE.IN", TUE, "09:15", "15:30", "16:00"),
        ("2330.TW", TUE, "09:00", "13:30", "13:35"),
        ("USDCNY", TUE, "00:00", "17:00", ""),
        ("ZINCSPOT", TUE, "00:00", "19:00", ""),
    ],
)
def test_sessions_end_when_the_exchange_says(code: str, day: str, opens: str, close: str, until: str) -> None:
    """On the clock of the exchange, from its first to its last moment of the date."""
    zone, market = zone_of(code), market_of(code)
    assert market is not None
    for moment in ("00:00", "12:34:56.789", "23:59:59.999"):
        session = session_of(market, at(zone, f"{day} {moment}"))
        assert session.date == day
        assert (session.opens, session.close) == (at(zone, f"{day} {opens}"), at(zone, f"{day} {close}"))
        last = at(zone, f"{day} {until}") + 999 if until else session.close - 1
        assert session.until == last
        assert session.bar == stockrt.NEVER or session.bar >= session.until + 20 * 60_000


def test_what_rests_on_weekends_has_no_session_there() -> None:
    """A session of India or Taiwan may be held on any day; crypto never rests."""
    sunday = at("UTC", "2025-06-22 12:00")
    resting = {
        code
        for code in (*(f"X.{name}" for name in stockrt.MARKETS), "USDCNY", "XNIUSD", "BTCUSDT")
        if (market := market_of(code)) and session_of(market, sunday).close == stockrt.NEVER
    }
    assert resting == {"X.US", "X.HK", "X.SH", "X.SZ", "X.JP", "X.KS", "USDCNY", "XNIUSD"}


def test_every_date_belongs_to_one_session_and_the_session_before_has_ended() -> None:
    """A year of hours, both daylight-saving Sundays included: no gap, no overlap."""
    start = at("UTC", "2025-01-01 00:00")
    for code in ("TSLA.US", "USDCNY", "BTCUSDT", "RELIANCE.IN"):
        market = market_of(code)
        assert market is not None
        session = session_of(market, start)
        for hour in range(1, 365 * 24):
            t = start + hour * 3_600_000
            found = session_of(market, t)
            assert found.start <= t < found.end
            if found.date != session.date:
                assert found.start == session.end
                assert session.close == stockrt.NEVER or session.close <= found.start
            session = found


def test_a_code_of_no_known_market_has_no_close(store: AnyStore, tmp_path: Path) -> None:
    """`common:US500` is fetched and stored; nobody knows its session."""
    world = World(store, tmp_path)
    world.now_ms = at("UTC", "2025-06-20 12:00")
    document = to_document(Trade("US500", at("UTC", f"{TUE} 12:00"), "1", "1", "1", 0), stockrt.utc_now())
    world.closer.settle([document], NEVER)
    assert market_name("US500") == ""
    assert world.closes() == {}


NO_ZONES = """
import logging, pathlib, sys, threading, stockrt
logging.basicConfig(format="%(message)s")
stockrt.zone_info("Asia/Hong_Kong")
file = stockrt.open_store_file(pathlib.Path(sys.argv[1]))
store = stockrt.SqliteStore(file)
class Clock(stockrt.Clock):
    def wall(self):
        return 1750300000
closer = stockrt.ClosingPrices(store, stockrt.SessionsFile(file), Clock())
codes = ("TSLA.US", "00700.HK", "USDCNY", "BTCUSDT")
closer.settle([
    stockrt.to_document(stockrt.Trade(code, 1750200000000, "1", "1", "1", 0), stockrt.utc_now()) for code in codes
], threading.Event())
with file.write() as db:
    print([row[0] for row in db.execute("SELECT _id FROM close")])
print(stockrt.exchange_time("TSLA.US", 1750200000000))
"""


def test_a_machine_without_time_zone_data_gets_one_clear_line(tmp_path: Path) -> None:
    """It says what is missing, what follows and what to install; crypto's day is UTC's and needs none."""
    source = os.pathsep.join([str(Path(stockrt.__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-S", "-c", NO_ZONES, str(tmp_path)], capture_output=True, text=True, timeout=60,
        env={"PYTHONPATH": source, "PYTHONTZPATH": "", "PATH": os.defpath},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert "no close is kept" in line
    assert "install the package tzdata" in line
    assert done.stdout.splitlines() == ["['BTCUSDT|2025-06-17']", "2025-06-17 22:40:00 UTC"]


# ------------------------------------------------------------------------------------------------------
# Cost
# ------------------------------------------------------------------------------------------------------


def test_trades_of_sessions_that_go_on_cost_nothing_but_a_look(tmp_path: Path) -> None:
    """No query and no write, but for one note of each code and date; told by the files' own counters."""
    store = sqlite_store(tmp_path)
    world = World(store, tmp_path)
    statements: list[str] = []
    notes: list[str] = []
    for file, heard in ((store._file, statements), (world.file, notes)):
        with file._guarded() as db:
            db.set_trace_callback(heard.append)
    world.now_ms = at("America/New_York", f"{TUE} 12:30")
    t = at("America/New_York", f"{TUE} 12:29")
    fetched = [
        to_document(Trade(f"A{n}.US", t, "1", "1", "1", 0), stockrt.utc_now()) for n in range(1000)
    ]  # fmt: skip
    world.closer.settle(fetched, NEVER)
    assert len([s for s in notes if "INSERT" in s]) == 1000
    assert len([s for s in notes if s == "COMMIT"]) == 1
    notes.clear()
    for _ in range(3):
        world.closer.settle(fetched, NEVER)
    assert statements == notes == []
    world.now_ms = at("America/New_York", f"{TUE} 16:10")
    world.closer.settle(fetched, NEVER)
    assert len([s for s in statements if "INSERT" in s]) == 1000
    statements.clear()
    world.closer.settle(fetched, NEVER)
    assert statements == notes == []


def test_what_is_remembered_is_bounded(tmp_path: Path) -> None:
    """100,000 codes need no more memory than the limit allows, and are written all the same."""
    store = sqlite_store(tmp_path)
    store._file.read_one("PRAGMA synchronous=OFF")
    world = World(store, tmp_path)
    world.now_ms = at("America/New_York", f"{TUE} 18:00")
    t = at("America/New_York", f"{TUE} 15:59")
    for first in range(0, stockrt.CLOSES_REMEMBERED + 3000, 1000):
        codes = [f"A{number}.US" for number in range(first, first + 1000)]
        world.closer.settle(
            [to_document(Trade(c, t, "1", "1", "1", 0), stockrt.utc_now()) for c in codes], NEVER
        )
    assert len(world.closer._settled) <= stockrt.CLOSES_REMEMBERED + 1000
    assert len(documents(store)) == stockrt.CLOSES_REMEMBERED + 3000
