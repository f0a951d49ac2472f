"""The promises of the stores: one suite over both, then what is particular to each."""

from __future__ import annotations

import contextlib
import json
import linecache
import os
import random
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol

import pymongo
import pytest
from bson.decimal128 import Decimal128
from bson.int64 import Int64
from conftest import controlled, forget_files, unprivileged
from kit.cases import each
from kit.chinese import in_chinese
from kit.clock import FakeClock
from kit.daemons import PATIENCE, number
from kit.infoway_server import InfowayServer, make_record
from kit.ledger import NoLedger
from kit.mongo import UNAUTHORIZED, MongoServer
from kit.trades import CREATED, by_id, make_documents, make_trades, settings_of

import stockrt
from stockrt import (
    Collector,
    Delivery,
    Document,
    FailureKind,
    InfowayApi,
    Keeper,
    KeyPool,
    MongoStore,
    Pipeline,
    Plan,
    SettingsError,
    SqliteStore,
    StoreAway,
    StoreError,
    Trade,
    WriteReport,
    identity,
    open_store_file,
    to_document,
    utc_now,
)

FIELDS = ["_id", "s", "t", "p", "v", "vw", "td", "stock_code", "create_time"]
SECRET = "hunter2-secret"
MAX_TIME_EXPIRED = 50
QUICK = "serverSelectionTimeoutMS=1500&timeoutMS=1500"


class Place(Protocol):
    """Where a store keeps its documents, seen from outside."""

    environ: dict[str, str]

    def documents(self) -> list[Document]:
        """Return what is there, by `_id`, read without stockrt."""

    def broken(self, document: Document) -> Document:
        """Return the document with something that this store refuses."""


class SqlitePlace:
    """The embedded store's file."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "stockrt.db"
        self.environ = {"STATE_DIRECTORY": str(folder)}

    def documents(self) -> list[Document]:
        """Return the rows without `seq`, dates parsed, and `demo` only where it is set."""
        with contextlib.closing(sqlite3.connect(self.file)) as db:
            db.row_factory = sqlite3.Row
            rows = [dict(row) for row in db.execute("SELECT * FROM realtime ORDER BY _id")]
        for row in rows:
            del row["seq"]
            row["create_time"] = datetime.strptime(row["create_time"], "%Y-%m-%dT%H:%M:%S.%f%z")
            demo = row.pop("demo")
            row |= {} if demo is None else {"demo": bool(demo)}
        return rows

    def broken(self, document: Document) -> Document:
        """A field without a value."""
        return document | {"v": None}


class MongoPlace:
    """A collection in a database of its own."""

    def __init__(self, uri: str, name: str, folder: Path) -> None:
        self.uri = uri
        self.name = name
        self.environ = {"MONGODB_HOST": uri, "MONGODB_DB_NAME": name, "STATE_DIRECTORY": str(folder)}

    @contextlib.contextmanager
    def collection(self) -> Iterator[pymongo.collection.Collection[Document]]:
        """Yield the collection, through a client of the test's own."""
        with pymongo.MongoClient[Document](self.uri, tz_aware=True) as client:
            yield client[self.name]["realtime"]

    def documents(self) -> list[Document]:
        """Return the documents."""
        with self.collection() as collection:
            return list(collection.find().sort("_id", 1))

    def broken(self, document: Document) -> Document:
        """A field against the collection's rule, made here."""
        with self.collection() as collection:
            collection.database.command("collMod", "realtime", validator={"bad": {"$exists": False}})
            return document | {"bad": 1}


@pytest.fixture(params=["sqlite", "mongodb"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """An empty place of each kind."""
    if request.param == "sqlite":
        return SqlitePlace(tmp_path / "state")
    uri, name = request.getfixturevalue("mongo_db")
    return MongoPlace(uri, name, tmp_path / "state")


@contextlib.contextmanager
def opened(place: Place) -> Iterator[SqliteStore | Delivery]:
    """Yield a store of the place."""
    with Pipeline(settings_of(place.environ)) as pipeline:
        yield pipeline.store


# --------------------------------------------------------------------------------------------- other processes

WRITER = """
import json, os, sys
import stockrt
settings = stockrt.load_settings(os.environ, places=(), is_root=False).settings
trades = [stockrt.Trade(*fields) for fields in json.loads(sys.stdin.readline())]
open_late = sys.argv[1:] == ["open-late"]
store = None if open_late else stockrt.Pipeline(settings).store
print("ready", flush=True)
sys.stdin.readline()
try:
    store = store or stockrt.Pipeline(settings).store
    done = store.write([stockrt.to_document(trade, stockrt.utc_now()) for trade in trades])
    print(json.dumps([done.stored, done.duplicates, dict(done.refused)]), flush=True)
except stockrt.StoreError as error:
    print(json.dumps(str(error)), flush=True)
sys.stdin.readline()
os._exit(0)
"""


class Writer:
    """A process that opens the store, and writes when it is told to."""

    def __init__(self, place: Place, trades: Sequence[Trade], *args: str, **options: Any) -> None:
        environ = {"PATH": os.environ.get("PATH", os.defpath), **place.environ}
        environ["PYTHONDONTWRITEBYTECODE"] = "1"  # a file that may not grow would be one that is cut short
        environ["PYTHONPATH"] = os.pathsep.join(
            [str(Path(stockrt.__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", WRITER, *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environ,
            **options,
        )
        self._say(json.dumps(trades))

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def wait_ready(self) -> None:
        """Return when it would write."""
        assert self._read() == "ready"

    def go(self) -> None:
        """Let it write."""
        self._say("")

    def result(self) -> Any:
        """Return [stored, known, refused], or the text of its StoreError."""
        return json.loads(self._read())

    def kill(self) -> None:
        """SIGKILL it."""
        self._process.kill()
        self._process.communicate()

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _read(self) -> str:
        assert self._process.stdout is not None
        return str(self._process.stdout.readline()).strip()


# -------------------------------------------------------------------------------------------------- the contract


def test_new_then_known(place: Place) -> None:
    with opened(place) as store:
        assert store.write(make_documents(10)) == WriteReport(10, 0)
        assert store.write(make_documents(10)) == WriteReport(0, 10)
        assert store.write(make_documents(10, first=5)) == WriteReport(5, 5)
    assert len(place.documents()) == 15


def test_documents_are_stored_exactly_as_given(place: Place) -> None:
    documents = make_documents(20)
    documents[3] = to_document(make_trades(20)[3]._replace(p="1e-7", v="0.00000000", vw="00.10"), CREATED)
    expected = [dict(document) for document in documents]
    with opened(place) as store:
        store.write(documents)
    assert documents == expected  # the store has not touched what it was given
    found = place.documents()
    assert found == by_id(expected)
    for document in found:
        assert list(document) == FIELDS
        assert document["_id"] == "|".join(str(document[name]) for name in ("s", "t", "p", "v", "td"))
        assert document["stock_code"] == document["s"]
        assert [type(document[name]) for name in ("_id", "s", "p", "v", "vw", "stock_code")] == [str] * 6
        assert isinstance(document["t"], int) and isinstance(document["td"], int)


def test_create_time_is_now_in_whole_milliseconds(place: Place) -> None:
    before = datetime.now(UTC) - timedelta(milliseconds=1)
    with opened(place) as store:
        store.write(make_documents(1, created=utc_now()))
    (document,) = place.documents()
    assert before <= document["create_time"] <= datetime.now(UTC)
    # Else the same document would be another one once it was read back.
    assert not any(utc_now().microsecond % 1000 for _ in range(20))


def test_demo_trades_are_marked(place: Place) -> None:
    real, demo = make_trades(2)
    with opened(place) as store:
        store.write([to_document(real, CREATED), to_document(demo, CREATED, demo=True)])
    marks = {document["s"]: document.get("demo") for document in place.documents()}
    assert marks == {real.s: None, demo.s: True}


def test_same_trade_twice_in_one_batch(place: Place) -> None:
    documents = make_documents(3)
    later = make_documents(3, created=CREATED + timedelta(seconds=1))
    with opened(place) as store:
        assert store.write([*documents, *later, *documents]) == WriteReport(3, 6)
    assert place.documents() == by_id(documents)


def test_create_time_of_the_first_is_kept(place: Place) -> None:
    with opened(place) as store:
        store.write(make_documents(5))
    with opened(place) as store:
        assert store.write(make_documents(5, created=CREATED + timedelta(days=1))) == WriteReport(0, 5)
    assert {document["create_time"] for document in place.documents()} == {CREATED}


@pytest.mark.parametrize("name", ["s", "t", "p", "v", "td"])
def test_trades_that_differ_in_one_part_of_the_identity_are_two(place: Place, name: str) -> None:
    trade = make_trades(1)[0]
    other: dict[str, Any] = {
        "s": "600999.SH",
        "t": trade.t + 1,
        "p": "1.0",
        "v": trade.v + "0",
        "td": (trade.td + 1) % 3,
    }
    changed = trade._replace(**{name: other[name]})
    with opened(place) as store:
        assert store.write([to_document(trade, CREATED), to_document(changed, CREATED)]).stored == 2
    assert {document["_id"] for document in place.documents()} == {identity(trade), identity(changed)}


def test_a_thousand_and_none(place: Place) -> None:
    with opened(place) as store:
        assert store.write([]) == WriteReport(0, 0)
        assert store.write(make_documents(1_000)) == WriteReport(1_000, 0)
        assert store.write(make_documents(1_000)) == WriteReport(0, 1_000)
        assert store.write([]) == WriteReport(0, 0)
    assert place.documents() == by_id(make_documents(1_000))


def test_refused_document_costs_its_neighbours_nothing(place: Place) -> None:
    documents = make_documents(10)
    with opened(place) as store:
        store.write(documents[:3])  # three known, six new, two of all refused
        documents[1:2] = [documents[1], place.broken(make_documents(1, first=100)[0])]
        documents[7] = place.broken(documents[7])
        done = store.write(documents)
        assert (done.stored, done.duplicates) == (6, 3)
        assert set(done.refused) == {documents[2]["_id"], documents[7]["_id"]}
        assert all(len(reason) > 10 and "\n" not in reason for reason in done.refused.values())
        expected = [documents[i] for i in range(11) if i not in (2, 7)]
        assert [document["_id"] for document in place.documents()] == [d["_id"] for d in by_id(expected)]
        # And the store works on.
        assert store.write(make_documents(1, first=200)) == WriteReport(1, 0)


def test_any_order_of_writes_counts_right(place: Place) -> None:
    rng = random.Random(11)
    pool = make_documents(120)
    there: set[str] = set()
    with opened(place) as first, opened(place) as second:
        for _ in range(25):
            batch = rng.choices(pool, k=rng.randrange(1, 60))
            new = {document["_id"] for document in batch} - there
            done = rng.choice((first, second)).write(batch)
            assert done == WriteReport(len(new), len(batch) - len(new))
            there |= new
    assert {document["_id"] for document in place.documents()} == there


def test_two_processes_write_the_same_trades_at_once(place: Place) -> None:
    trades = make_trades(1_000)
    with Writer(place, trades) as first, Writer(place, trades[::-1]) as second:
        for writer in (first, second):
            writer.wait_ready()
        for writer in (first, second):
            writer.go()
        results = [writer.result() for writer in (first, second)]
    assert [stored + known for stored, known, _ in results] == [1_000, 1_000]
    assert sum(stored for stored, _, _ in results) == 1_000
    assert [refused for *_, refused in results] == [{}, {}]
    assert [document["_id"] for document in place.documents()] == sorted(map(identity, trades))


def test_many_processes_open_a_new_place_at_once(place: Place) -> None:
    trades = make_trades(5)
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(Writer(place, trades, "open-late")) for _ in range(number(4, 6, quick=3))
        ]
        for writer in writers:
            writer.wait_ready()
        for writer in writers:
            writer.go()
        results = [writer.result() for writer in writers]
    assert all(isinstance(result, list) for result in results), results
    assert sum(stored for stored, *_ in results) == 5
    assert len(place.documents()) == 5


def test_what_was_reported_as_stored_outlives_a_kill(place: Place) -> None:
    with Writer(place, make_trades(300)) as writer:
        writer.wait_ready()
        writer.go()
        assert writer.result() == [300, 0, {}]
        writer.kill()
    assert len(place.documents()) == 300


def test_write_that_is_killed_is_there_at_most_once_when_repeated(place: Place) -> None:
    trades = make_trades(1_000)
    for milliseconds in (1, 5, 15, 40):
        with Writer(place, trades) as writer:
            writer.wait_ready()
            writer.go()
            threading.Event().wait(milliseconds / 1000)  # somewhere within the write
            writer.kill()
    with opened(place) as store:
        done = store.write([to_document(trade, CREATED) for trade in trades])
    assert done.stored + done.duplicates == 1_000
    assert [document["_id"] for document in place.documents()] == sorted(map(identity, trades))


def test_check_leaves_nothing_behind(place: Place) -> None:
    with opened(place) as store:
        assert "can be written" in store.check()
        assert "可写入" in in_chinese(store.check())
        if isinstance(store, Delivery):  # no collection, and so no index either
            assert store.mongo.client[place.environ["MONGODB_DB_NAME"]].list_collection_names() == []
            assert "index on realtime is made with the next trades" in store.check()
        store.write(make_documents(2))
        assert "can be written" in store.check()
        assert store.write(make_documents(3)) == WriteReport(1, 2)
    assert place.documents() == by_id(make_documents(3))


def test_numbers_of_any_width_are_kept(place: Place) -> None:
    trade = make_trades(1)[0]._replace(
        p="12345678901234567890.123456789012", v="1" * 20, vw="-0.000000000001"
    )
    with opened(place) as store:
        store.write([to_document(trade, CREATED)])
    (document,) = place.documents()
    assert [document[name] for name in ("p", "v", "vw")] == [trade.p, trade.v, trade.vw]


# ---------------------------------------------------------------------------------------------------- SQLite


@pytest.fixture
def sqlite_place(tmp_path: Path) -> SqlitePlace:
    """An empty place of the embedded store."""
    return SqlitePlace(tmp_path / "state")


def test_sqlite_writes_are_synchronous(tmp_path: Path) -> None:
    with stockrt.LocalFile(tmp_path / "x.db", 1, "") as file:
        assert file.read_one("PRAGMA synchronous") == (2,)  # FULL
        assert file.read_one("PRAGMA journal_mode") == ("wal",)


def test_sqlite_file_is_one_of_plain_sqlite(sqlite_place: SqlitePlace) -> None:
    with opened(sqlite_place) as store:
        store.write(make_documents(3))
        with contextlib.closing(sqlite3.connect(sqlite_place.file)) as db:  # while the store is open
            types = db.execute(
                "SELECT typeof(_id), typeof(s), typeof(t), typeof(p), typeof(v), typeof(vw), typeof(td), "
                "typeof(stock_code), typeof(create_time), typeof(demo) FROM realtime"
            )
            text, integer = "text", "integer"
            assert set(types) == {(text, text, integer, text, text, text, integer, text, text, "null")}
            assert db.execute("SELECT DISTINCT create_time FROM realtime").fetchall() == [
                ("2026-08-15T01:02:03.456Z",)
            ]
            plan = "EXPLAIN QUERY PLAN SELECT * FROM realtime WHERE stock_code = 'x' ORDER BY t DESC LIMIT 1"
            assert "realtime_code_time" in str(db.execute(plan).fetchall())
            assert "TEMP B-TREE" not in str(db.execute(plan).fetchall())
    assert sqlite_place.file.read_bytes()[:16] == b"SQLite format 3\0"
    assert sqlite_place.file.read_bytes()[18:20] == b"\2\2"  # WAL
    if shell := shutil.which("sqlite3"):
        command = [shell, "-readonly", str(sqlite_place.file), "SELECT count(*), min(p) FROM realtime"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.startswith("3|")


def test_sqlite_keeps_what_an_earlier_run_stored(sqlite_place: SqlitePlace) -> None:
    for round_of in range(3):
        with opened(sqlite_place) as store:
            store.write(make_documents(1, first=round_of))
    assert len(sqlite_place.documents()) == 3


def test_sqlite_many_open_a_new_file_at_once(tmp_path: Path) -> None:
    faults: list[StoreError] = []

    def open_one(folder: Path, barrier: threading.Barrier) -> None:
        barrier.wait()
        try:
            open_store_file(folder).close()
        except StoreError as error:
            faults.append(error)

    for which in range(40):
        barrier = threading.Barrier(4)
        threads = [threading.Thread(target=open_one, args=(tmp_path / str(which), barrier)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not faults


def test_sqlite_waits_for_another_writer(sqlite_place: SqlitePlace) -> None:
    with opened(sqlite_place) as store:
        other = sqlite3.connect(sqlite_place.file, check_same_thread=False)
        other.execute("BEGIN IMMEDIATE")
        release = threading.Timer(0.4, other.rollback)
        release.start()
        try:
            assert store.write(make_documents(2)) == WriteReport(2, 0)
        finally:
            release.join()
            other.close()


def test_sqlite_reader_does_not_hold_up_a_writer(sqlite_place: SqlitePlace) -> None:
    with opened(sqlite_place) as store, contextlib.closing(sqlite3.connect(sqlite_place.file)) as reader:
        store.write(make_documents(1))
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM realtime").fetchone() == (1,)
        assert store.write(make_documents(5)) == WriteReport(4, 1)
        assert reader.execute("SELECT count(*) FROM realtime").fetchone() == (1,)


def test_sqlite_of_a_newer_stockrt_is_refused(sqlite_place: SqlitePlace) -> None:
    with opened(sqlite_place) as store:
        store.write(make_documents(2))
    with contextlib.closing(sqlite3.connect(sqlite_place.file)) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreError, match=r"newer stockrt.*99.*STATE_DIRECTORY"), opened(sqlite_place):
        pass
    assert len(sqlite_place.documents()) == 2


def test_sqlite_file_that_is_a_directory(sqlite_place: SqlitePlace) -> None:
    sqlite_place.file.mkdir(parents=True)
    with pytest.raises(StoreError, match=r"stockrt\.db.*STATE_DIRECTORY"), opened(sqlite_place):
        pass


def test_state_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"cannot be made.*STATE_DIRECTORY"):
        open_store_file(tmp_path / "file" / "state")


def test_state_directory_that_may_not_be_written() -> None:
    # pytest's own folders may not be entered by another user.
    with tempfile.TemporaryDirectory(prefix="stockrt-test-") as folder:
        place = SqlitePlace(Path(folder, "state"))
        with opened(place) as store:
            store.write(make_documents(1))
        for path in (Path(folder), place.file.parent, *place.file.parent.iterdir()):
            path.chmod(0o777 if path.is_dir() else 0o666)
        place.file.parent.chmod(0o555)
        with unprivileged(), pytest.raises(StoreError, match="STATE_DIRECTORY"):
            SqliteStore(open_store_file(place.file.parent)).write(make_documents(2))
        place.file.parent.chmod(0o777)
        assert len(place.documents()) == 1


def test_sqlite_on_a_full_disk_counts_nothing(sqlite_place: SqlitePlace) -> None:
    import resource

    with opened(sqlite_place) as store:
        store.write(make_documents(5))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    with Writer(sqlite_place, make_trades(5_000), preexec_fn=limit) as writer:
        writer.wait_ready()
        writer.go()
        error = writer.result()
    assert isinstance(error, str) and "STATE_DIRECTORY" in error
    assert sqlite_place.documents() == by_id(make_documents(5))
    with opened(sqlite_place) as store:  # there is room again
        assert store.write(make_documents(5_000)) == WriteReport(4_995, 5)


def test_state_directory_is_private(tmp_path: Path) -> None:
    with open_store_file(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700


# --------------------------------------------------------------------------------------------------- MongoDB


@pytest.fixture
def mongo_place(mongo_db: tuple[str, str], tmp_path: Path) -> MongoPlace:
    """An empty database."""
    return MongoPlace(*mongo_db, tmp_path / "state")


def mongo_store(uri: str, name: str = "stockrt_test", **more: str) -> MongoStore:
    """Return a store for this URI."""
    return MongoStore(settings_of({"MONGODB_HOST": uri, "MONGODB_DB_NAME": name, **more}))


def test_a_client_of_mongodb_leaves_no_source_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each keeps the text of the stack that it was made on, and for that every line of the program is read."""
    monkeypatch.setattr(linecache, "clearcache", forget_files)
    linecache.getline(stockrt.__file__, 1)
    assert stockrt.__file__ in linecache.cache
    with contextlib.closing(mongo_store("mongodb://127.0.0.1:1/")):
        assert stockrt.__file__ not in linecache.cache


def with_options(uri: str, options: str) -> str:
    """Return the URI with these options too."""
    return f"{uri}{'&' if '?' in uri else '?'}{options}"


def nobody_listens() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_mongo_types_are_those_of_the_contract(mongo_place: MongoPlace) -> None:
    with opened(mongo_place) as store:
        store.write(make_documents(4))
    types = {"create_time": "date", "t": "long", "td": "int"}
    types |= dict.fromkeys(("_id", "s", "p", "v", "vw", "stock_code"), "string")
    with mongo_place.collection() as collection:
        assert collection.count_documents({name: {"$type": kind} for name, kind in types.items()}) == 4


def test_mongo_index(mongo_place: MongoPlace) -> None:
    with opened(mongo_place) as store:
        store.write(make_documents(1))
    with mongo_place.collection() as collection:
        keys = [list(index["key"].items()) for index in collection.list_indexes()]
    assert sorted(keys) == [[("_id", 1)], [("stock_code", 1), ("t", -1)]]


@pytest.mark.parametrize(("code", "again"), [(UNAUTHORIZED, False), (MAX_TIME_EXPIRED, True)])
def test_mongo_index_that_cannot_be_made_now_is_made_later(
    mongo_server: MongoServer,
    mongo_place: MongoPlace,
    code: int,
    again: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Trades are stored without it; one who lacks the right asks no more, one whom the server keeps waiting does."""
    clock = FakeClock()
    with contextlib.closing(MongoStore(settings_of(mongo_place.environ), clock)) as store:
        with controlled(mongo_server).failing("createIndexes", error_code=code):
            assert store.write(make_documents(1)).stored == 1
            assert store.write(make_documents(2)).stored == 1
        assert caplog.text.count("refused the index") == 1, "each try may take its whole time limit"
        clock.advance(stockrt.INDEX_AGAIN_S)
        store.write(make_documents(3))
        with mongo_place.collection() as collection:
            made = [*collection.index_information()]
    assert ("stock_code_1_t_-1" in made) == again


@pytest.mark.parametrize(("numeric", "kind"), [("string", str), ("double", float), ("decimal", Decimal128)])
def test_mongo_numeric_type(mongo_place: MongoPlace, numeric: str, kind: type) -> None:
    mongo_place.environ["MONGODB_NUMERIC_TYPE"] = numeric
    check_numbers(mongo_place, kind)


def check_numbers(place: MongoPlace, kind: type) -> None:
    """p, v, vw are of this type and have their values; the rest, the identity too, is as ever."""
    documents = make_documents(10)
    given = [dict(document) for document in documents]
    with opened(place) as store:
        assert store.write(documents) == WriteReport(10, 0)
        assert store.write(documents) == WriteReport(0, 10)
    assert documents == given  # what is printed stays as the API sent it
    for found, expected in zip(place.documents(), by_id(given), strict=True):
        for name in ("p", "v", "vw"):
            assert type(found[name]) is kind
            text = expected.pop(name)
            number = found.pop(name)
            assert float(str(number)) == float(text)
            if kind is not float:
                assert Decimal(str(number)).as_tuple() == Decimal(text).as_tuple()  # no digit more or less
        assert found == expected
        assert type(found["t"]) in (int, Int64)


def test_mongo_away_is_said_within_a_time_limit() -> None:
    options = f"authSource=admin&timeoutMS=1000&serverSelectionTimeoutMS={3600 * 1000}"
    uri = f"mongodb://user:{SECRET}@127.0.0.1:{nobody_listens()}/?{options}"
    with contextlib.closing(mongo_store(uri)) as store, pytest.raises(StoreAway) as caught:
        store.write(make_documents(1))
    assert "MONGODB_HOST" in str(caught.value) and "refused" in str(caught.value)
    told = in_chinese(caught.value.message)
    assert told.endswith("：连接被拒绝；请检查 MONGODB_HOST，并确认 mongod 在运行") and SECRET not in told
    assert SECRET not in str(caught.value) and "\n" not in str(caught.value)


def test_mongo_check_says_that_it_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stockrt, "MONGODB_SELECTION_TIMEOUT_MS", 300)
    uri = f"mongodb://user:{SECRET}@127.0.0.1:{nobody_listens()}/?{QUICK}"
    with contextlib.closing(mongo_store(uri)) as store, pytest.raises(StoreError) as caught:
        store.check()
    assert "MONGODB_HOST" in str(caught.value) and SECRET not in str(caught.value)


def test_a_shorter_limit_of_the_uri_holds_for_a_look_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stockrt, "MONGODB_SELECTION_TIMEOUT_MS", 3_600_000)
    with contextlib.closing(mongo_store(f"mongodb://127.0.0.1:{nobody_listens()}/?timeoutMS=300")) as store:

        def look() -> None:
            assert store.lacks("license_usage") and not store.takes_another("realtime")
            with pytest.raises(StoreError):
                store.check()
            looked.set()

        looked = threading.Event()
        threading.Thread(target=look, daemon=True).start()
        assert looked.wait(PATIENCE)


def test_mongo_options_that_do_not_go_together_are_a_fault_of_the_settings() -> None:
    uri = f"mongodb://user:{SECRET}@127.0.0.1/?tlsInsecure=true&tlsAllowInvalidCertificates=true"
    with pytest.raises(SettingsError, match="MONGODB_HOST") as caught:
        mongo_store(uri)
    assert SECRET not in str(caught.value)


def test_mongo_that_hangs_is_given_up_and_used_again(
    mongo_server: MongoServer, mongo_place: MongoPlace
) -> None:
    controlled(mongo_server)
    with contextlib.closing(mongo_store(with_options(mongo_place.uri, QUICK), mongo_place.name)) as store:
        assert store.write(make_documents(5)) == WriteReport(5, 0)
        mongo_server.pause()
        with pytest.raises(StoreError, match="MONGODB_HOST"):
            store.write(make_documents(10))
        mongo_server.resume()
        done = store.write(make_documents(10))  # what the hanging one took after all is known now
        assert done.stored + done.duplicates == 10 and not done.refused
    assert len(mongo_place.documents()) == 10


def test_mongo_that_was_killed_is_used_again(mongo_server: MongoServer, mongo_place: MongoPlace) -> None:
    controlled(mongo_server)
    with contextlib.closing(mongo_store(with_options(mongo_place.uri, QUICK), mongo_place.name)) as store:
        assert store.write(make_documents(5)) == WriteReport(5, 0)
        mongo_server.checkpoint()
        mongo_server.kill()
        with pytest.raises(StoreError, match="MONGODB_HOST"):
            store.write(make_documents(10))
        mongo_server.start()
        assert store.write(make_documents(10)) == WriteReport(5, 5)
    assert len(mongo_place.documents()) == 10


def test_mongo_that_was_restarted_between_two_writes_is_not_noticed(
    mongo_server: MongoServer, mongo_place: MongoPlace
) -> None:
    controlled(mongo_server)
    with contextlib.closing(mongo_store(mongo_place.uri, mongo_place.name)) as store:
        store.write(make_documents(5))
        mongo_server.restart()
        done: list[WriteReport] = []
        with contextlib.suppress(StoreError):  # one write may meet the old connection
            done.append(store.write(make_documents(10)))
        done.append(store.write(make_documents(10)))
        assert done[-1].stored + done[-1].duplicates == 10
    assert len(mongo_place.documents()) == 10


LISTENER = """
import json, os, sys
import pymongo.monitoring, stockrt
class Listener(pymongo.monitoring.CommandListener):
    def started(self, event):
        if event.command_name == "insert":
            command = event.command
            print(json.dumps([command.get("writeConcern"), command.get("maxTimeMS"), command.get("ordered")]))
    def succeeded(self, event): pass
    def failed(self, event): pass
pymongo.monitoring.register(Listener())
settings = stockrt.load_settings(os.environ, places=(), is_root=False).settings
trade = stockrt.Trade("AAPL.US", 1786751999691, "1", "1", "1", 0)
stockrt.Pipeline(settings).store.write([stockrt.to_document(trade, stockrt.utc_now())])
"""


@pytest.mark.parametrize(
    ("options", "concern", "most_ms"),
    [
        ("", {"w": "majority"}, 20_000),
        pytest.param("w=1", {"w": 1}, 20_000, marks=pytest.mark.long),
        ("W=1&journal=true", {"w": 1, "j": True}, 20_000),
        pytest.param("timeoutMS=3000", {"w": "majority"}, 3_000, marks=pytest.mark.long),
        ("timeoutms=3000&w=majority", {"w": "majority"}, 3_000),
    ],
)
def test_mongo_write_concern_and_time_limit(
    mongo_place: MongoPlace, options: str, concern: dict[str, Any], most_ms: int
) -> None:
    """As they go over the wire: majority and 20 s, unless the URI says otherwise."""
    environ = os.environ | mongo_place.environ | {"MONGODB_HOST": with_options(mongo_place.uri, options)}
    done = subprocess.run(
        [sys.executable, "-c", LISTENER],
        env=environ | {"PYTHONPATH": str(Path(stockrt.__file__).parent)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    sent, limit_ms, ordered = json.loads(done.stdout.splitlines()[-1])
    assert (sent, ordered) == (concern, False)
    assert most_ms / 2 < limit_ms <= most_ms


def test_mongo_duplicate_of_another_index_is_no_known_trade(mongo_place: MongoPlace) -> None:
    """Only a trade's own `_id` says that it is there."""
    with mongo_place.collection() as collection:
        collection.create_index([("stock_code", 1)], unique=True)
    trade = make_trades(1)[0]
    with opened(mongo_place) as store:
        assert store.write([to_document(trade, CREATED)]) == WriteReport(1, 0)
        other = to_document(trade._replace(p="7.77"), CREATED)
        done = store.write([to_document(trade, CREATED), other, *make_documents(1, first=9)])
        assert (done.stored, done.duplicates, set(done.refused)) == (1, 1, {other["_id"]})


def test_mongo_collection_of_the_settings(mongo_place: MongoPlace) -> None:
    mongo_place.environ["MONGODB_REALTIME_COLLECTION_NAME"] = "latest.trades"
    with opened(mongo_place) as store:
        store.write(make_documents(2))
        assert "latest.trades" in store.check()
    with mongo_place.collection() as collection:
        assert collection.database["latest.trades"].count_documents({}) == 2
        assert collection.count_documents({}) == 0


NO_ACK = "发出 3 帧，24 秒内未收到确认；请检查 INFOWAY_STREAM_URL"


@pytest.mark.parametrize(
    ("reason", "chinese"),
    [
        (stockrt.STOPPED, "stockrt 已停止"),
        (stockrt.ENDED_WITHOUT_NOTICE, "stockrt 意外退出"),
        (stockrt.MOVED, "转移到另一个连接"),
        (stockrt.DEAF, "有成交，但没有推送"),
        ("the vendor's own words", "the vendor's own words"),
        ("theirs: too many", "theirs: too many"),
        ("127.0.0.1:1: cannot connect: no such thing", "127.0.0.1:1：无法连接：no such thing"),
        ("a: b" * 5000, "a: b" * 5000),  # another program's
        ("connection closed by the server", "连接中断：由服务器关闭"),
        ("connection closed by the server (code 1006)", "连接中断：由服务器关闭（关闭码 1006）"),
        ("connection lost: the connection was cut", "连接中断：对方断开了连接"),
        ("no ack within 24 s to 3 frames; see INFOWAY_STREAM_URL", NO_ACK),
        (
            "the stream says 516: Total: 9 > 8: too many codes on all connections of the key; see INFOWAY_PLAN",
            "推送流返回 516：Total: 9 > 8：该密钥各连接的代码总数过多；请检查 INFOWAY_PLAN",
        ),
    ],
)
def test_why_a_gap_is_is_stored_in_english_and_known_again(tmp_path: Path, reason: str, chinese: str) -> None:
    gap = stockrt.Gap("stock", ("AAPL.US",), 1, 2, stockrt.gap_reason(reason), "here")
    with open_store_file(tmp_path) as file:
        stockrt.Gaps(file, None).note(gap)
        assert file.read_all("SELECT why, typeof(why) FROM stream_gaps") == [(reason, "text")]
        (found,) = stockrt.Gaps(file, None).open() or stockrt.Gaps(file, None).some("1")
    assert found.why == reason
    assert stockrt.in_language(stockrt.gap_reason(found.why), "zh") == chinese


# ------------------------------------------------------------------------------------- a run over a store


class CountingStore:
    """Counts the writes to a store."""

    def __init__(self, store: MongoStore) -> None:
        self.writes = 0
        self._store = store

    def write(self, documents: Sequence[Document]) -> WriteReport:
        """Write, and count it."""
        self.writes += 1
        return self._store.write(documents)

    def check(self) -> str:
        """As the store behind."""
        return self._store.check()


def test_run_stops_fetching_when_the_store_is_away(infoway: InfowayServer) -> None:
    codes = [f"{600_000 + number}.SH" for number in range(3_000)]
    uri = f"mongodb://user:{SECRET}@127.0.0.1:{nobody_listens()}/?timeoutMS=1000"
    pool = KeyPool([("test-key", Plan("20", 20, 1200))], NoLedger())
    with (
        contextlib.closing(mongo_store(uri)) as store,
        contextlib.closing(InfowayApi(infoway.url, pool)) as api,
    ):
        counting = CountingStore(store)
        report = Collector(api, counting, Keeper()).run(codes, threading.Event())
    assert infoway.request_count < 30  # what is not under way when the store fails is not fetched
    assert counting.writes == 1  # nor is its time limit waited out twice
    assert set(report.failures) == set(codes) and not report.stored and not report.complete
    assert {kind for kind, _ in report.failures.values()} == {FailureKind.STORE}
    assert all("MONGODB_HOST" in reason for _, reason in report.failures.values())
    assert not any(SECRET in reason for _, reason in report.failures.values())
    told = {in_chinese(words) for _, words in report.failures.values()}
    assert len(told) == 2 and {words.partition("：")[0] for words in told} == {"已获取，未入库", "未请求"}


def test_run_says_which_codes_the_store_refused(infoway: InfowayServer, sqlite_place: SqlitePlace) -> None:
    """A trigger stands for whatever an operator may have added to the file."""
    with opened(sqlite_place) as store:
        with contextlib.closing(sqlite3.connect(sqlite_place.file)) as db:
            db.execute(
                "CREATE TRIGGER no_hk BEFORE INSERT ON realtime WHEN NEW.s LIKE '%.HK' "
                "BEGIN SELECT RAISE(ABORT, 'no Hong Kong here'); END"
            )
        with contextlib.closing(
            InfowayApi(infoway.url, KeyPool([("test-key", Plan("0", 0, 0))], NoLedger()))
        ) as api:
            report = Collector(api, store, Keeper()).run(
                ["AAPL.US", "00700.HK", "600519.SH"], threading.Event()
            )
    assert (report.total, report.stored, set(report.failures)) == (3, 2, {"00700.HK"})
    assert (
        in_chinese(report.failures["00700.HK"].words, "no Hong Kong here")
        == "被本地存储拒绝：no Hong Kong here"
    )
    assert {document["s"] for document in sqlite_place.documents()} == {"AAPL.US", "600519.SH"}


def test_same_run_twice_stores_nothing_twice(place: Place, infoway: InfowayServer) -> None:
    codes = ["AAPL.US", "00700.HK", "600519.SH", "BTCUSDT", "USDCNY"]
    pool = KeyPool([("test-key", Plan("0", 0, 0))], NoLedger())
    counts = []
    with opened(place) as store, contextlib.closing(InfowayApi(infoway.url, pool)) as api:
        for tick in (0, 0, 1, 1):
            infoway.bump(tick - infoway.tick)
            report = Collector(api, store, Keeper()).run(codes, threading.Event())
            assert report.complete
            counts.append((report.stored, report.duplicates))
    assert counts == [(5, 0), (0, 5), (5, 0), (0, 5)]
    assert len(place.documents()) == 10
    expected = sorted(identity(Trade(**make_record(code, tick))) for code in codes for tick in (0, 1))
    assert [document["_id"] for document in place.documents()] == expected


@each(
    ("error", "taken"),
    [
        ({"keyPattern": {"_id": 1}, "errmsg": ""}, True),
        ({"keyPattern": {"stock_code": 1}, "errmsg": ""}, False),
        ({"keyPattern": {"_id": 1, "s": 1}, "errmsg": ""}, False),
        (
            {"errmsg": 'E11000 duplicate key error collection: a.realtime index: _id_ dup key: { : "x" }'},
            True,
        ),
        ({"errmsg": 'E11000 duplicate key error index: a.realtime.$_id_ dup key: { : "x" }'}, True),
        ({"errmsg": "E11000 duplicate key error collection: a.realtime index: s_1 dup key: { : 1 }"}, False),
        ({"errmsg": "duplicate key"}, False),
    ],
)
def test_which_index_a_duplicate_is_of(error: dict[str, Any], taken: bool) -> None:
    """As servers of today say it, as those before 4.2 did, and as some say nothing."""
    assert stockrt._is_identity_taken(error) is taken


@each(
    ("said", "chinese"),
    [
        (
            "a.b:9: Connection refused,[::1]:27017: No route to host",
            "a.b:9：连接被拒绝，[::1]:27017：没有到主机的路由",
        ),
        ("h:1: Temporary failure in name resolution", "h:1：DNS 暂时不可用"),
        ("h:1: No address associated with hostname", "h:1：该主机名没有对应的地址"),
        ("h:1: timed out", "h:1：超时未应答"),
        ("h:1: The read operation timed out", "h:1：读取超时"),
        ("No servers found yet", "还没有服务器应答"),
        ("SSL handshake failed: h:1: The handshake operation timed out", "（h:1：TLS 握手超时）"),
        (
            "SSL handshake failed: h:1: certificate verify failed: certificate has expired",
            "h:1 的证书不受信任（证书已过期）",
        ),
        ("No primary available for writes", "副本集没有可写入的主节点"),
        ("node is recovering", "所连接的成员正在恢复"),
        ("waiting for replication timed out", "等待复制到其他成员超时"),
        ("bad auth : Authentication failed.", "身份验证失败（用户名、密码或 authSource 不正确）"),
        (
            "The resolution lifetime expired after 5.4 seconds: "
            "Server Do53:10.0.0.1@53 answered The DNS operation timed out.",
            "DNS 在 5.4 秒内没有应答（服务器 10.0.0.1@53：超时）",
        ),
        ("The DNS query name does not exist: _mongodb._tcp.a.b.", "DNS 中没有 _mongodb._tcp.a.b"),
        (
            "available disk space of 9 bytes is less than required minimum of 500",
            "MongoDB 服务器的磁盘仅剩 9 字节，低于所需的 500 字节",
        ),
        (
            'E11000 duplicate key error collection: a.b index: c_1 dup key: { p: "1" }',
            '与 a.b 的唯一索引 c_1 冲突（{ p: "1" }）',
        ),
        ("what nobody knows: h:1: it is odd", "what nobody knows: h:1: it is odd"),
    ],
)
def test_what_mongodb_usually_says_is_known_by_its_words(said: str, chinese: str) -> None:
    """In English it stays what it was, but for what pymongo writes without a blank, or with a full stop."""
    words = stockrt.mongo_words(said)
    assert words.replace(" ", "") == said.rstrip(".").replace(" ", "")
    assert chinese in stockrt.in_language(words, "zh")


def test_of_a_command_that_is_not_allowed_its_name_is_told_and_what_it_is_about() -> None:
    said = 'not authorized on db to execute command { delete: "close", ordered: true, lsid: { id: UUID("87")…'
    words = stockrt.mongo_words(said)
    assert words == 'not authorized on db to execute command delete: "close"'
    assert stockrt.in_language(words, "zh") == '当前用户无权在数据库 db 上执行命令 delete: "close"'


@each(
    ("uri", "chinese"),
    [
        ("mongodb://h/?wtimeoutMS=x", "wtimeoutms 应为整数"),
        ("mongodb://h/?timeoutMS=x", "timeoutms 应为数字"),
        ("mongodb://h/?tls=maybe", "tls 应为 true 或 false"),
        ("mongodb://h/?readPreference=foo", "没有 foo 这种读偏好"),
        ("mongodb://h/?authMechanism=FOO", "authmechanism 应为"),
        ("mongodb://h,i/?directConnection=true", "设置了 directConnection=true 时只能写一个主机"),
        ("mongodb://h/?loadBalanced=true&replicaSet=a", "replicaSet 不能与 loadBalanced=true 同用"),
        ("mongodb://h/?tlsInsecure=true&tlsAllowInvalidCertificates=true", "不能同时设置"),
        ("mongodb://h/?compressors=snappy", "无法用 snappy 压缩"),
    ],
)
def test_what_pymongo_says_of_options_is_known_by_its_words(uri: str, chinese: str) -> None:
    (fault,) = stockrt.uri_faults(uri)
    assert chinese in in_chinese(fault)
