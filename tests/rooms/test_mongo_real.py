"""MongoDB as operators have it: roles, views, validators, capped collections, TLS, another program's documents."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pymongo
import pytest
from bson.decimal128 import Decimal128
from bson.objectid import ObjectId
from conftest import RunPyz, controlled, unavailable
from kit.chinese import in_chinese
from kit.daemons import PATIENCE, until
from kit.infoway_server import InfowayServer
from kit.ledger import NoLedger
from kit.mongo import (
    SET_NAME,
    UNAUTHORIZED,
    Client,
    GuardedServer,
    MongoServer,
    ReplicaSet,
    Unavailable,
    fresh_database,
    make_certificates,
    right,
)
from kit.trades import by_id, make_documents, settings_of

import stockrt
from rooms.test_spool import NEVER, Place, queued, quick
from stockrt import (
    Delivery,
    Document,
    MongoStore,
    Plan,
    SharedLedger,
    StoreAway,
    StoreError,
    WriteReport,
)

NOT_ON_A_VIEW = 166
READING = ("find", "collStats", "listIndexes")
WRITING = ("insert", "update", "remove", "createIndex")
PASSWORD = "hunter2-secret"


@pytest.fixture
def place(mongo_db: tuple[str, str], tmp_path: Path) -> Place:
    """An empty database and an empty state directory."""
    return Place(*mongo_db, tmp_path / "state")


def new_place(request: pytest.FixtureRequest, fixture: str, state: Path) -> Place:
    """Return the place of an empty database that this fixture makes."""
    uri, name = request.getfixturevalue(fixture)
    return Place(uri, name, state)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """What MongoDB does not take is tried again at once, and again soon."""
    monkeypatch.setattr(stockrt, "DELIVERY_FIRST_S", 0.01)
    monkeypatch.setattr(stockrt, "DELIVERY_CAP_S", 0.1)


# ------------------------------------------------------------------------------ a collection that takes nothing


@dataclass
class Obstacle:
    """What keeps every document out of `realtime`, and nothing out of other collections, until `lift` is called."""

    place: Place
    words: str
    lift: Callable[[], object]


Set = Callable[[pytest.FixtureRequest, Path, contextlib.ExitStack], Obstacle]
KEPT_OUT: dict[str, Set] = {}


def keeps_out(make: Set) -> Set:
    """Let the tests meet this obstacle."""
    KEPT_OUT[make.__name__] = make
    return make


def database_of(place: Place, stack: contextlib.ExitStack) -> pymongo.database.Database[Document]:
    """Return the database, through a client of the test's own."""
    client: Client = stack.enter_context(pymongo.MongoClient(place.uri))
    return client[place.name]


def _refusing(
    code: int, request: pytest.FixtureRequest, folder: Path, stack: contextlib.ExitStack
) -> Obstacle:
    place = new_place(request, "mongo_db", folder)
    server = controlled(request.getfixturevalue("mongo_server"))
    lifted = stack.enter_context(contextlib.ExitStack())
    lifted.enter_context(server.failing("insert", error_code=code, namespace=f"{place.name}.realtime"))
    return Obstacle(place, "failpoint", lifted.close)


@keeps_out
def unauthorized(request: pytest.FixtureRequest, folder: Path, stack: contextlib.ExitStack) -> Obstacle:
    """The server says 13 to every insert."""
    return _refusing(UNAUTHORIZED, request, folder, stack)


@keeps_out
def not_on_a_view(request: pytest.FixtureRequest, folder: Path, stack: contextlib.ExitStack) -> Obstacle:
    """The server says 166 to every insert."""
    return _refusing(NOT_ON_A_VIEW, request, folder, stack)


@keeps_out
def view(request: pytest.FixtureRequest, folder: Path, stack: contextlib.ExitStack) -> Obstacle:
    """A view has the name."""
    place = new_place(request, "mongo_db", folder)
    database = database_of(place, stack)
    database.create_collection("elsewhere")
    database.command("create", "realtime", viewOn="elsewhere", pipeline=[])
    words = r"realtime is a view.*MONGODB_REALTIME_COLLECTION_NAME"
    return Obstacle(place, words, lambda: database.drop_collection("realtime"))


@keeps_out
def time_series(request: pytest.FixtureRequest, folder: Path, stack: contextlib.ExitStack) -> Obstacle:
    """A time-series collection has the name: it takes the same `_id` any number of times."""
    place = new_place(request, "mongo_db", folder)
    database = database_of(place, stack)
    database.create_collection("realtime", timeseries={"timeField": "create_time"})

    def lift() -> None:
        assert database["realtime"].count_documents({}) == 0
        database.drop_collection("realtime")

    return Obstacle(place, r"realtime is a time-series collection.*MONGODB_REALTIME_COLLECTION_NAME", lift)


@keeps_out
def validator(request: pytest.FixtureRequest, folder: Path, stack: contextlib.ExitStack) -> Obstacle:
    """The operator's schema is one for other documents."""
    place = new_place(request, "mongo_db", folder)
    database = database_of(place, stack)
    database.create_collection("realtime", validator={"$jsonSchema": {"required": ["price"]}})
    return Obstacle(place, "failed validation", lambda: database.command("collMod", "realtime", validator={}))


@keeps_out
def reading_alone(request: pytest.FixtureRequest, folder: Path, stack: contextlib.ExitStack) -> Obstacle:
    """The user may read `realtime`, and do everything elsewhere."""
    server, name = request.getfixturevalue("guarded"), request.getfixturevalue("guarded_db")
    elsewhere = [right(name, one, *READING, *WRITING) for one in ("close", "license_usage")]
    place = Place(server.add_user(name, right(name, "realtime", *READING), *elsewhere), name, folder)
    return Obstacle(
        place,
        f"not authorized on {name}",
        lambda: server.grant(name, right(name, "realtime", *READING, *WRITING), *elsewhere),
    )


@pytest.fixture(params=KEPT_OUT)
def obstacle(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Obstacle]:
    """Each of them, in turn."""
    with contextlib.ExitStack() as stack:
        yield KEPT_OUT[request.param](request, tmp_path / "state", stack)


def assert_tried(store: Delivery, times: int) -> None:
    """Wait until what waits has been tried so often from now on."""
    tries: list[int] = []
    write = store.mongo.write

    def counted(documents: Sequence[Document], takes: bool = False) -> WriteReport:
        tries.append(len(documents))
        return write(documents, takes)

    store.mongo.write = counted  # type: ignore[method-assign]
    assert until(lambda: len(tries) >= times)
    store.mongo.write = write  # type: ignore[method-assign]


@pytest.mark.usefixtures("hasty")
def test_a_collection_that_takes_nothing_rejects_nothing_and_is_gone_on_with(
    obstacle: Obstacle, caplog: pytest.LogCaptureFixture
) -> None:
    """Kept and said once, however often it is tried; when the obstacle is gone all arrives by itself."""
    place = obstacle.place
    documents = make_documents(5)
    with place.opened() as store:
        with pytest.raises(StoreError, match=obstacle.words):
            store.mongo.check()
        report = store.write(documents[:1])
        assert (report.queued, dict(report.refused)) == (1, {})
        assert re.search(obstacle.words, report.queued_because), report.queued_because
        assert "unreachable" not in report.queued_because
        store.write(documents[1:])
        assert_tried(store, 3 * stockrt.POISON_TRIES)
        assert store.rejects.all() == [] and len(place.waiting()) == 5
        said = [
            r.getMessage()
            for r in caplog.records
            if "MongoDB" in r.getMessage() and "index" not in r.getMessage()
        ]
        assert len(said) == 1 and re.search(obstacle.words, said[0]), said
        obstacle.lift()
        assert until(lambda: store.is_empty())
        assert store.rejects.all() == []
    assert place.documents() == by_id(documents)


def dear(documents: Sequence[Document]) -> list[Document]:
    """Return them with a price that `cheap_only` refuses."""
    return [
        d | {"p": "999.5", "_id": "|".join(map(str, (d["s"], d["t"], "999.5", d["v"], d["td"])))}
        for d in documents
    ]


def cheap_only(place: Place) -> None:
    """Let the operator's schema refuse dear trades."""
    with place.collection() as collection:
        schema = {"properties": {"p": {"not": {"enum": ["999.5"]}}}}
        collection.database.create_collection(collection.name, validator={"$jsonSchema": schema})


def test_a_validator_that_takes_nothing_is_not_looked_for_in_the_connection_string(place: Place) -> None:
    with place.collection() as collection:
        collection.database.create_collection(
            collection.name, validator={"$jsonSchema": {"required": ["price"]}}
        )
    with (
        place.opened() as store,
        pytest.raises(StoreAway, match=r"validation; see the validators of realtime and close$") as caught,
    ):
        store.mongo.check()
    told = in_chinese(caught.value.message)
    assert told.endswith("出错：文档不符合校验规则；请检查 realtime 和 close 的校验规则")


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("known", [True, False], ids=["trades are there", "the collection is empty"])
def test_a_schema_that_refuses_one_trade_alone_rejects_it(place: Place, known: bool) -> None:
    """Nothing else has to come: the collection is seen to take another document, and keeps nothing of that."""
    cheap_only(place)
    (bad,) = dear(make_documents(1))
    with place.opened() as store:
        before = make_documents(2, first=5) if known else []
        store.write(before)
        report = store.write([bad])
        assert (report.queued, list(report.refused)) == (0, [bad["_id"]])
        assert [r["_id"] for r in store.rejects.all()] == [bad["_id"]]
    assert place.documents() == by_id(before)


@pytest.mark.usefixtures("hasty")
def test_trades_that_are_all_refused_wait_until_another_is_taken(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing shows before that they are at fault, and not the schema. The good one may wait far behind them."""
    monkeypatch.setattr(stockrt, "DELIVERY_BATCH", 3)
    with place.collection() as collection:
        rule = {"p": {"$ne": "999.5"}, "s": {"$regex": r"\.SH$"}}
        collection.database.create_collection(collection.name, validator=rule)
    bad, good = dear(make_documents(6)), make_documents(1, first=9)
    queued(place.state, bad)
    with place.opened() as store:
        for _ in range(2 * stockrt.POISON_TRIES):
            with pytest.raises(StoreAway, match="failed validation"):
                store.deliver(NEVER)
        assert store.rejects.all() == [] and len(place.waiting()) == 6
        store.queue.write(good)
        store.deliver(NEVER)
        assert store.is_empty()
        assert sorted(r["_id"] for r in store.rejects.all()) == sorted(d["_id"] for d in bad)
    assert place.documents() == good


@pytest.mark.parametrize("kind", ["a view", "a time-series collection"])
def test_a_close_collection_that_takes_nothing_rejects_no_close(
    place: Place, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The trades are stored as ever, and their closes made when a plain collection has the name."""
    with place.collection("close") as close:
        if kind == "a view":
            close.database.command("create", "close", viewOn="realtime", pipeline=[])
        else:
            close.database.create_collection("close", timeseries={"timeField": "create_time"})
        with place.opened(real=True) as store:
            assert store.write(make_documents(3)).stored == 3
            store.settle(make_documents(3), NEVER)
            assert until(lambda: "closing snapshot: " in caplog.text)
            assert f"close is {kind}" in caplog.text and "MONGODB_CLOSE_COLLECTION_NAME" in caplog.text
            assert store.unsettled.count() == 3 and store.rejects.all() == []
            close.drop()
            assert until(lambda: store.is_empty(), 2 * PATIENCE)
    assert len(place.documents("close")) == 3


def test_a_close_that_a_schema_does_not_let_be_replaced_holds_up_no_other(place: Place) -> None:
    documents = make_documents(3)
    later = [
        d | {"t": d["t"] + 1, "p": "999.5", "_id": f"{d['s']}|{d['t'] + 1}|999.5|{d['v']}|{d['td']}"}
        for d in documents
    ]
    with place.opened(real=True) as store:
        store.write(documents)
        store.settle(documents, NEVER)
        with place.collection("close") as close:
            rule = {"$nor": [{"p": "999.5", "s": documents[1]["s"]}]}
            close.database.command("collMod", "close", validator=rule)
        store.write(later)
        store.settle(later, NEVER)
        store.deliver(NEVER)
        assert store.is_empty()
        (reject,) = store.rejects.all()
        assert reject["collection"] == "close" and reject["document"]["s"] == documents[1]["s"]
    prices = {close["s"]: close["p"] for close in place.documents("close")}
    assert prices == {d["s"]: "999.5" for d in documents} | {documents[1]["s"]: documents[1]["p"]}


# --------------------------------------------------------------------------------------------------- users and TLS


def test_a_user_with_rights_on_the_trades_alone(
    guarded: GuardedServer, guarded_db: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Trades are stored; what lacks its right is said, kept, and made when the right is there."""
    trades = right(guarded_db, "realtime", *READING, *WRITING)
    place = Place(guarded.add_user(guarded_db, trades), guarded_db, tmp_path / "state")
    documents = make_documents(10)
    with place.opened(real=True) as store:
        assert store.write(documents) == WriteReport(10, 0)
        assert store.write(documents) == WriteReport(0, 10)
        store.settle(documents, NEVER)
        assert until(lambda: "closing snapshot: " in caplog.text)
        with pytest.raises(StoreError, match=f"not authorized on {guarded_db}.*close"):
            store.check()
        ledger = SharedLedger(store.mongo.collection("license_usage"), NoLedger())
        assert ledger.lease("d", Plan("x", 2, 0, 1000), time.time()).requests
        assert store.write(make_documents(20)).stored == 10
        assert store.unsettled.count() == 10 and not store.queue.has_trades()
        guarded.grant(guarded_db, trades, right(guarded_db, "close", *READING, *WRITING))
        assert until(lambda: store.is_empty(), 2 * PATIENCE)
    with guarded.client() as client:
        database = client[guarded_db]
        assert [database[name].count_documents({}) for name in ("realtime", "close")] == [20, 10]
        assert "stock_code_1_t_-1" in database["realtime"].index_information()


@pytest.mark.usefixtures("hasty")
def test_a_user_who_may_insert_and_nothing_else(
    guarded: GuardedServer, guarded_db: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each trade is stored once, a refused one is told from the others, and nothing of ours is left behind."""
    place = Place(
        guarded.add_user(guarded_db, right(guarded_db, "", "insert")), guarded_db, tmp_path / "state"
    )
    with guarded.client() as client:
        collection = client[guarded_db]["realtime"]
        collection.create_index([("stock_code", 1)], unique=True)
        documents = make_documents(10)
        theirs = documents[4] | {"_id": "the operator's own"}
        collection.insert_one(theirs)
        queued(place.state, documents[:5])
        with place.opened(real=True) as store:
            store.start()
            assert until(lambda: not store.queue.has_trades())
            report = store.write(documents[:4] + documents[5:])
            assert (report.stored, report.duplicates, report.queued) == (5, 4, 0)
            with pytest.raises(StoreError, match="not authorized"):
                store.check()
            assert [r["_id"] for r in store.rejects.all()] == [documents[4]["_id"]]
        assert caplog.text.count("refused the index") == 1
        found = {document["_id"] for document in collection.find()}
    assert found == {d["_id"] for d in documents if d is not documents[4]} | {"the operator's own"}


@pytest.mark.usefixtures("hasty")
def test_a_wrong_password_is_said_as_what_it_is(
    guarded: GuardedServer,
    guarded_db: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Not as a server that is not there, nor as a fault of the index; nothing is lost."""
    guarded.add_user(guarded_db, right(guarded_db, "", *READING, *WRITING), password="another one")
    place = Place(guarded.uri_of(guarded_db, PASSWORD), guarded_db, tmp_path / "state")
    with place.opened() as store:
        for count in (1, 2):
            report = store.write(make_documents(count))
            assert report.queued == count and "Authentication failed" in report.queued_because
            assert "unreachable" not in report.queued_because
        assert_tried(store, 1)
        with pytest.raises(StoreError, match=r"Authentication failed; see MONGODB_HOST"):
            store.check()
        assert "unreachable" not in store.write(make_documents(2)).queued_because
        with guarded.client() as client:
            client[guarded_db].command("updateUser", "user", pwd=PASSWORD)
        assert until(lambda: store.is_empty())
    assert place.documents() == by_id(make_documents(2))
    assert PASSWORD not in caplog.text and "index" not in caplog.text
    assert caplog.text.count("MongoDB: ") == 1


def test_a_user_who_was_refused_before_is_not_taken_for_a_server_that_is_away(
    guarded: GuardedServer, guarded_db: str
) -> None:
    """The driver does, until it has looked at the server again: its error is that of one that is not there."""
    options = "&timeoutMS=500&heartbeatFrequencyMS=60000"
    environ = {"MONGODB_HOST": guarded.uri_of(guarded_db, PASSWORD) + options, "MONGODB_DB_NAME": guarded_db}
    with contextlib.closing(MongoStore(settings_of(environ))) as store:
        for _ in range(2):
            with pytest.raises(StoreAway, match=r"fails: Authentication failed; see") as caught:
                store.write(make_documents(1))
            assert not caught.value.unreachable
    assert type(caught.value.__cause__) is pymongo.errors.ServerSelectionTimeoutError


def test_check_finds_a_wrong_password(
    guarded: GuardedServer, guarded_db: str, infoway: InfowayServer, run_pyz: RunPyz
) -> None:
    guarded.add_user(guarded_db, right(guarded_db, "", *READING, *WRITING), password="another one")
    env = {
        "INFOWAY_API_KEY": "test-key",
        "INFOWAY_API_BASE_URL": infoway.url,
        "MONGODB_HOST": guarded.uri_of(guarded_db, PASSWORD) + "&timeoutMS=1000",
        "MONGODB_DB_NAME": guarded_db,
    }
    with ThreadPoolExecutor(2) as pool:  # each waits between its tries
        runs = [
            pool.submit(run_pyz, *args, env=env) for args in (("--check",), ("--once", "--codes", "AAPL.US"))
        ]
        done, once = (run.result() for run in runs)
    assert done.returncode == 1
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert re.search(r"store: MongoDB .*Authentication failed; see MONGODB_HOST$", line), done.stdout
    assert PASSWORD not in done.stdout + done.stderr
    assert once.returncode == 1
    assert re.search(
        r"1 trade kept on this machine, MongoDB takes no writes.*Authentication failed", once.stderr
    )


@dataclass
class Encrypted:
    """A server that talks TLS alone, and the CA that signed its certificate."""

    server: MongoServer
    ca: Path


@pytest.fixture(scope="module")
def encrypted(mongod: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Encrypted]:
    """Such a server, with certificates of its own."""
    try:
        ca, certificate = make_certificates(tmp_path_factory.mktemp("tls"))
    except Unavailable as error:
        unavailable(str(error))
    options = ("--tlsMode=requireTLS", f"--tlsCertificateKeyFile={certificate}")
    trusting = {"tls": True, "tlsCAFile": str(ca)}
    with MongoServer(mongod, *options, replica_set=SET_NAME, client_options=trusting) as server:
        yield Encrypted(server, ca)


def test_tls_with_a_ca_file(encrypted: Encrypted, tmp_path: Path) -> None:
    with fresh_database(encrypted.server) as (uri, name):
        trusting = f"{uri}?tls=true&tlsCAFile={encrypted.ca}"
        place = Place(trusting, name, tmp_path / "state")
        queued(place.state, make_documents(5))
        with place.opened(real=True) as store:
            assert "can be written" in store.mongo.check()
            store.deliver(NEVER)
            assert store.write(make_documents(10)) == WriteReport(5, 5)
        assert place.documents() == by_id(make_documents(10))
        assert len(place.documents("close")) == 5


@pytest.mark.parametrize(
    ("options", "words"),
    [("?tls=true", "certificate verify failed"), ("", "connection closed")],
    ids=["without the CA", "without TLS"],
)
def test_tls_that_fails_is_said_and_costs_nothing(
    encrypted: Encrypted, tmp_path: Path, options: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stockrt, "MONGODB_SELECTION_TIMEOUT_MS", 300)
    with fresh_database(encrypted.server) as (uri, name):
        place = Place(uri + options, name, tmp_path / "state")
        with place.opened() as store:
            assert store.write(make_documents(2)).queued == 2
            with pytest.raises(StoreError, match=f"{words}.*MONGODB_HOST"):
                store.check()
        with place.opened(MONGODB_HOST=quick(f"{uri}?tls=true&tlsCAFile={encrypted.ca}")) as store:
            store.deliver(NEVER)
            assert store.write(make_documents(3)) == WriteReport(1, 2)


# ------------------------------------------------------------------------------- other servers and collections


@pytest.mark.parametrize("kind", ["standalone", "capped"])
def test_a_standalone_and_a_capped_collection_take_everything(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    place = new_place(request, "standalone_db" if kind == "standalone" else "mongo_db", tmp_path)
    if kind == "capped":
        with place.collection() as collection:
            for name in ("realtime", "close"):
                collection.database.create_collection(name, capped=True, size=1 << 20)
    queued(place.state, make_documents(50))
    with place.opened(real=True) as store:
        assert "can be written" in store.check()
        store.deliver(NEVER)
        assert store.write(make_documents(100)) == WriteReport(50, 50)
        assert "can be written" in store.check()
        store.settle(make_documents(100), NEVER)
        later = [
            d | {"t": d["t"] + 1, "_id": f"{d['s']}|{d['t'] + 1}|{d['p']}|{d['v']}|{d['td']}"}
            for d in make_documents(9)
        ]
        store.write(later)
        store.settle(later, NEVER)
        assert store.is_empty() and store.rejects.all() == []
        ledger = SharedLedger(store.mongo.collection("license_usage"), NoLedger())
        plan = Plan("x", 2, 0, 15)
        assert [ledger.lease("d", plan, 0.0).requests for _ in range(3)] == [10, 1, 1]
        assert ledger.used_today("d", 0.0) == 12
    assert place.documents() == by_id([*make_documents(100), *later])
    closes = {close["s"]: close["t"] for close in place.documents("close")}
    assert closes == {d["s"]: d["t"] for d in [*make_documents(100), *later]}


@pytest.mark.parametrize(
    ("numeric", "bson"), [("string", "string"), ("double", "double"), ("decimal", "decimal")]
)
def test_a_schema_that_asks_for_what_we_write_lets_everything_in(
    place: Place, numeric: str, bson: str
) -> None:
    """No field but ours, each of its type: --check is no stranger to it either, and leaves nothing behind."""
    texts = {name: {"bsonType": "string"} for name in ("_id", "s", "stock_code")}
    numbers = {name: {"bsonType": bson} for name in ("p", "v", "vw")}
    fields = (
        texts
        | numbers
        | {"t": {"bsonType": "long"}, "td": {"bsonType": "int"}, "create_time": {"bsonType": "date"}}
    )
    schema = {"required": [*fields], "properties": fields, "additionalProperties": False}
    with place.collection() as collection:
        collection.database.create_collection("realtime", validator={"$jsonSchema": schema})
    place.environ["MONGODB_NUMERIC_TYPE"] = numeric
    with place.opened(real=True) as store:
        assert "can be written" in store.check()
        assert place.documents() == []
        assert store.write(make_documents(20)) == WriteReport(20, 0)
        assert "can be written" in store.check()
        store.settle(make_documents(20), NEVER)
        assert store.is_empty()
    assert len(place.documents()) == len(place.documents("close")) == 20
    if numeric == "decimal":
        expected = {d["_id"]: Decimal(d["p"]) for d in make_documents(20)}
        for name in ("realtime", "close"):
            for document in place.documents(name):
                price = document["p"]
                assert isinstance(price, Decimal128)
                if name == "realtime":
                    assert price.to_decimal() == expected[document["_id"]]


def foreign_documents(code: str, t: int) -> list[Document]:
    """Return what another program may keep in `realtime`, as newer trades of a code; naive times become UTC."""
    whole = {"s": code, "t": t, "p": 1.5, "v": 3.0, "vw": 4.5, "td": 0, "stock_code": code}
    naive = datetime(2026, 8, 15, 1, 2, 3)
    return [
        {"_id": ObjectId(), **whole, "create_time": naive},
        {"_id": ObjectId(), **whole, "p": "1.5", "v": "3", "vw": "4.5", "create_time": "2026-08-15 01:02:03"},
        {"_id": ObjectId(), **whole, "t": float(t), "p": None},
        {"_id": ObjectId(), **whole, "p": [1], "td": None},
        {"_id": ObjectId(), "stock_code": code, "t": t, "price": 305.7},
        {"_id": "by hand", "stock_code": code, "t": t},
        {"_id": ObjectId(), "code": code, "time": naive},
    ]


@pytest.mark.parametrize("numeric", ["string", "decimal", "double"])
def test_documents_of_another_program_are_passed_over(place: Place, numeric: str) -> None:
    """Ours are stored beside them and counted as ever, our closes follow from ours alone, theirs stay as they are."""
    place.environ["MONGODB_NUMERIC_TYPE"] = numeric
    session = datetime(2025, 6, 17, 19, 59, tzinfo=UTC)  # a minute before the close in New York
    t = int(session.timestamp() * 1000)
    trades = [
        stockrt.Trade("TSLA.US", t, "305.70", "1", "305.70", 0),
        stockrt.Trade("TSLA.US", t + 3_600_000, "306.1", "2", "612.2", 0),
    ]
    ours = [stockrt.to_document(trade, stockrt.utc_now()) for trade in trades]
    theirs = foreign_documents("TSLA.US", t + 30_000)
    with place.collection() as collection:
        collection.insert_many(theirs)
        before = list(collection.find({"_id": {"$in": [d["_id"] for d in theirs]}}))
        with place.opened(real=True) as store:
            assert store.write(ours) == WriteReport(2, 0)
            assert store.write(ours) == WriteReport(0, 2)
            store.settle(ours[1:], NEVER)  # after hours: the close is looked up among the trades
            assert store.is_empty()
        assert list(collection.find({"_id": {"$in": [d["_id"] for d in theirs]}})) == before
        assert collection.count_documents({}) == len(theirs) + 2
    (close,) = place.documents("close")
    assert (close["_id"], close["t"], Decimal(str(close["p"]))) == (
        "TSLA.US|2025-06-17",
        t,
        Decimal("305.70"),
    )


# ---------------------------------------------------------------------------------------------------- elections


def _kill(members: ReplicaSet) -> None:
    first = members.primary()
    first.kill()
    members.wait_for_primary(first)


def _step_down(members: ReplicaSet) -> None:
    members.step_down()


@pytest.mark.parametrize(
    "elect",
    [pytest.param(_kill, id="kill"), pytest.param(_step_down, id="step down", marks=pytest.mark.long)],
)
def test_an_election_in_the_middle_of_everything(
    elect: Callable[[ReplicaSet], None],
    replica_set: ReplicaSet,
    replica_db: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Trades and closes are written, the queue is drained and requests are counted, all at once and without pause."""
    # however long a busy machine takes to elect: nobody counts alone
    monkeypatch.setattr(stockrt, "LEDGER_TIMEOUT_S", PATIENCE)
    uri = f"{replica_set.uri}?replicaSet={SET_NAME}"
    places = [Place(uri, replica_db[1], tmp_path / name) for name in ("writer", "drainer")]
    for place in places:
        place.environ["MONGODB_HOST"] = f"{uri}&timeoutMS={1000 * int(PATIENCE)}"
    over = threading.Event()
    counts = {"written": 0, "leased": 0, "closed": 0}
    errors: list[BaseException] = []
    with places[0].opened(real=True) as writer, places[1].opened(real=True) as drainer:
        ledger = SharedLedger(writer.mongo.collection("license_usage"), NoLedger())

        def write() -> None:
            first = counts["written"]
            report = writer.write(make_documents(10, first=first))
            assert report.stored + report.duplicates == 10, report
            counts["written"] += 10

        def drain() -> None:
            drainer.queue.write(make_documents(10, first=500_000 - 10 * counts["closed"]))
            drainer.deliver(NEVER)
            counts["closed"] += 1

        def count() -> None:
            lease = ledger.lease("d", Plan("x", 1, 0, 10_000_000), 0.0)
            counts["leased"] += lease.requests

        def forever(work: Callable[[], None]) -> None:
            try:
                while not over.is_set():
                    work()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=forever, args=(work,)) for work in (write, drain, count)]
        for thread in threads:
            thread.start()
        try:
            assert until(lambda: all(counts.values()))
            elect(replica_set)
            after = dict(counts)
            assert until(lambda: errors or all(counts[name] > after[name] for name in counts)), counts
        finally:
            over.set()
            for thread in threads:
                thread.join()
        assert not errors, errors
        assert drainer.is_empty() and writer.rejects.all() == drainer.rejects.all() == []
        used = ledger.used_today("d", 0.0)
    assert used == counts["leased"], "a lease was counted twice, or not at all"
    drained = [make_documents(10, first=500_000 - 10 * n) for n in range(counts["closed"])]
    expected = {d["_id"] for batch in [make_documents(counts["written"]), *drained] for d in batch}
    assert {d["_id"] for d in places[0].documents()} == expected
    closes = places[0].documents("close")
    assert {c["s"] for c in closes} == {d["s"] for batch in drained for d in batch}
    assert len(closes) == 10 * counts["closed"]
    assert "alone" not in caplog.text


def test_the_usual_faults_are_told_in_the_readers_language(
    mongo_server: MongoServer, guarded: GuardedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what a real pymongo and real servers say, each with its kind; in English nothing is lost of that."""
    monkeypatch.setattr(stockrt, "MONGODB_SELECTION_TIMEOUT_MS", 300)
    here, locked = (re.findall(r"127\.0\.0\.1:\d+", one.uri)[0] for one in (mongo_server, guarded))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        deaf = f"127.0.0.1:{silent.getsockname()[1]}"
        for place, options, kind, chinese in (
            ("127.0.0.1:9", "", "os.ECONNREFUSED", "连接被拒绝；请检查 MONGODB_HOST，并确认 mongod 在运行"),
            ("nope.invalid", "", "lib.dns_no_name", "nope.invalid:27017：没有这个主机名"),
            (deaf, "&connectTimeoutMS=100", "mongo.late", f"{deaf}：超时未应答"),
            (here, "&replicaSet=rs1", "mongo.other_set", "没有名为 rs1 的副本集的成员"),
            (here, "&tls=true", "mongo.no_tls", "TLS 握手失败"),
            (
                f"user:wrong@{here}",
                "",
                "mongo.wrong_user",
                "用户名、密码或 authSource 不正确；请检查 MONGODB_HOST",
            ),
            (here, "&w=3", "mongo.few_members", "少于写关注（w）要求的数量"),
            (here, "&readPreference=secondary", "mongo.no_match", "副本集没有符合 Secondary("),
            (locked, "", "mongo.no_user", "需要用户名和密码"),
        ):
            uri = f"mongodb://{place}/?serverSelectionTimeoutMS=300{options}"
            with (
                contextlib.closing(MongoStore(settings_of({"MONGODB_HOST": uri}))) as store,
                pytest.raises(StoreAway) as caught,
            ):
                store.check()
            words = caught.value.message
            assert chinese in stockrt.in_language(words, "zh") and kind in stockrt.kinds_in(words)
            assert words.startswith("MongoDB at mongodb://") and "MONGODB_HOST" in words
