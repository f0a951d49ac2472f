"""Faults 3 to 5: MongoDB away, hanging, flapping; its reply lost; its primary changing; one poison document."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
from bson import ObjectId
from conftest import MakeWorld
from kit.daemons import LONG, PATIENCE, number, until
from kit.fault_world import QUICK, World, balanced, proc_status, seeded
from kit.mongo_proxy import (
    CONCERN_ERROR,
    INVALID,
    NOT_PRIMARY,
    STEPPED_DOWN,
    TOO_LARGE,
    Afterwards,
    Fate,
    Insert,
    Instead,
    MongoProxy,
    Without,
)
from kit.mongo_server import MongoServer

# ------------------------------------------------------------------------------------------------------
# 3. Away, hanging, flapping
# ------------------------------------------------------------------------------------------------------

OUTAGE_S = number(6, 600)
EVERY_S = 1.0 if LONG else 0.2
CODES = 100
FLAP_S = number(1, 5)
MEMORY_MIB = 20
PACE = 5


def _down(server: MongoServer, over: threading.Event) -> None:
    server.kill()
    over.wait()


def _hanging(server: MongoServer, over: threading.Event) -> None:
    server.pause()
    over.wait()


def _flapping(server: MongoServer, over: threading.Event) -> None:
    """Away and there again in turn, by a kill and by a stop."""
    while not over.is_set():
        server.kill()
        over.wait(FLAP_S)
        server.start()
        over.wait(FLAP_S)
        server.pause()
        over.wait(FLAP_S)
        server.resume()
        over.wait(FLAP_S)


@pytest.mark.parametrize("outage", [_down, _hanging, _flapping], ids=["down", "hanging", "flapping"])
def test_an_outage_costs_no_trade_little_memory_and_is_made_up_for_fast(
    outage: Callable[[MongoServer, threading.Event], None], mongo_server: MongoServer, make_world: MakeWorld
) -> None:
    world = make_world("" if LONG else world_uri(mongo_server))
    world.start()
    for _ in range(30):  # what every later execution needs is loaded
        world.send(CODES)
    world.answered()
    before = proc_status(world.daemon.pid, "VmRSS")
    over = threading.Event()
    breaker = threading.Thread(target=outage, args=(mongo_server, over), daemon=True)
    with world.load(EVERY_S, CODES):
        breaker.start()
        try:
            threading.Event().wait(OUTAGE_S)
        finally:
            over.set()
            breaker.join()
            waiting = len(world.spool())
            mongo_server.ensure_running()
        took = _drain_seconds(world)
    peak = proc_status(world.daemon.pid, "VmHWM")
    account = world.final_account()
    facts = {"seconds": OUTAGE_S, "every": f"{EVERY_S:g}", "flap": FLAP_S}
    balanced(outage.__name__.strip("_"), 1, account, world.daemon.log, **facts)
    assert account.acknowledged == len(world.feed.records), "a code failed"
    assert (peak - before) / 1024 < MEMORY_MIB
    if outage is not _flapping:
        arrived = CODES / EVERY_S
        assert waiting >= 0.5 * arrived * OUTAGE_S, "it was not spooled"
        assert waiting / took >= PACE * arrived, f"{waiting} in {took:.1f} s"


def world_uri(server: MongoServer) -> str:
    """The server with a short time limit."""
    return server.uri + QUICK


def _drain_seconds(world: World) -> float:
    """Wait for the drain and return the seconds from its first to its last step."""
    waiting = world.spool()
    first = waiting[0]["seq"] if waiting else 0

    def begun() -> bool:
        left = world.spool()
        return not left or left[0]["seq"] != first

    assert until(begun, 2 * PATIENCE), world.daemon.log[-3000:]
    started = time.monotonic()
    world.drained(4 * PATIENCE + OUTAGE_S)
    return time.monotonic() - started


# ------------------------------------------------------------------------------------------------------
# 4. Applied, and the reply lost; elections
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fate",
    [
        Fate.CUT_AFTER,
        Fate.CUT_BEFORE,
        Instead(NOT_PRIMARY),
        Afterwards(NOT_PRIMARY),
        Afterwards(STEPPED_DOWN),
        Afterwards(CONCERN_ERROR),
    ],
    ids=[
        "applied and cut",
        "cut",
        "not primary",
        "applied and not primary",
        "applied and stepped down",
        "applied here alone",
    ],
)
def test_a_write_whose_answer_is_lost_is_one_document(
    fate: Fate | Instead | Afterwards,
    make_world: MakeWorld,
    mongo_proxy: MongoProxy,
) -> None:
    rounds, rng = number(30, 500), seeded("lost reply")
    world = make_world(mongo_proxy.uri + QUICK)
    world.start()
    mongo_proxy.on_insert = lambda insert: fate if rng.random() < 0.4 else None
    for place in range(rounds):
        world.send(1 + place % 40)
    world.answered(4 * PATIENCE)
    mongo_proxy.on_insert = lambda insert: None
    kept = sum(result.data["result"]["kept_count"] for result in world.platform.results)
    assert kept > 0, "a write was counted that MongoDB had not acknowledged"
    account = world.final_account()
    balanced("answer", rounds, account, world.daemon.log)
    assert account.acknowledged == len(world.feed.records), "a code failed"


@pytest.fixture
def members(mongo_server: MongoServer) -> Iterator[list[MongoProxy]]:
    """Two members of a replica set over the same data; the first is the primary."""
    with MongoProxy(mongo_server.port) as one, MongoProxy(mongo_server.port, one) as other:
        elect([one, other], 0, 1)
        yield [one, other]


def elect(members: list[MongoProxy], winner: int, term: int, places: Sequence[str] = ()) -> None:
    """Make one the primary: the others refuse writes, and every connection to them is cut.

    `places`: host and port of each, where a client knows them by names.
    """
    hosts = list(places) or [member.address for member in members]
    for place, member in enumerate(members):
        wins = place == winner
        known = {"setName": "rs0", "hosts": hosts, "setVersion": 1, "me": hosts[place], "primary": hosts[winner],
                 "logicalSessionTimeoutMinutes": 30, "isWritablePrimary": wins, "ismaster": wins,
                 "secondary": not wins}  # fmt: skip
        if wins:
            known["electionId"] = ObjectId(f"7fffffff{term:016x}")
        member.refusal = None if wins else NOT_PRIMARY
        member.hello = known
        if not wins:
            member.cut()


def test_elections_under_load_lose_and_double_nothing(
    make_world: MakeWorld, members: list[MongoProxy]
) -> None:
    rounds, rng = number(5, 100), seeded("elections")
    uri = f"mongodb://{','.join(member.address for member in members)}/?replicaSet=rs0&timeoutMS=4000"
    world = make_world(uri)
    for member in members:
        member.on_insert = _sometimes_lost(rng)
    world.start()
    with world.load(0.02, 10):
        for term in range(2, rounds + 2):
            answers = len(world.platform.results)
            assert world.platform.wait_for(lambda p, n=answers: len(p.results) > n + 10, PATIENCE)  # type: ignore[misc]
            elect(members, term % 2, term)
    for member in members:
        member.on_insert = lambda insert: None
    balanced("election", rounds, world.final_account(), world.daemon.log)
    assert sum(member.retried for member in members) > 0, "no retryable write was answered from memory"


def _sometimes_lost(rng: random.Random) -> Callable[[Insert], Fate | None]:
    return lambda insert: Fate.CUT_AFTER if rng.random() < 0.1 else None


# ------------------------------------------------------------------------------------------------------
# 5. Poison
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [INVALID, TOO_LARGE], ids=["fails validation", "too large"])
@pytest.mark.parametrize("path", ["direct", "drain"])
def test_one_poison_document_of_a_thousand_harms_no_other(
    path: str, error: dict[str, object], make_world: MakeWorld, mongo_proxy: MongoProxy
) -> None:
    rounds = number(1, 10)
    world = make_world(mongo_proxy.uri + QUICK)
    poison: set[str] = set()
    guard = threading.Lock()

    def spoil(insert: Insert) -> Without | None:
        with guard:
            ids = [name for name in insert.ids if name.split("X")[1].startswith("500.US")]
            poison.update(ids)
        return Without(ids, error) if ids else None

    mongo_proxy.on_insert = spoil
    world.start()
    for _ in range(rounds):
        if path == "drain":
            mongo_proxy.down()
        told = world.result(world.send(1000)).data["result"]
        mongo_proxy.up()
        assert told["success_count"] + told["kept_count"] + told["failed_count"] == 1000
        if path == "direct":
            assert told["failed_count"] == 1, "the poison is named, and nothing else"
        assert until(lambda: not world.spool())
    balanced("poison", rounds, world.final_account(rejects=True), world.daemon.log)
    rejects = world.rejects()
    assert {row["_id"] for row in rejects} == poison
    assert len(poison) == rounds
    assert all(str(error["errmsg"])[:20] in row["reason"] for row in rejects), rejects
    assert world.count() == 999 * rounds


@pytest.mark.parametrize("path", ["direct", "drain"])
def test_a_trade_that_an_index_of_the_operator_forbids_is_rejected(
    path: str, make_world: MakeWorld, mongo_proxy: MongoProxy
) -> None:
    world = make_world(mongo_proxy.uri + QUICK)
    with world.client() as client:
        collection = client[world.database]["realtime"]
        collection.create_index([("stock_code", 1)], unique=True)
        collection.insert_one({"_id": "theirs", "stock_code": "E00000X042.US", "s": "x", "t": 0, "p": "", "v": "",
                               "td": 0})  # fmt: skip
        if path == "drain":
            mongo_proxy.down()
        world.start()
        world.result(world.send(100))
        mongo_proxy.up()
        world.drained()
        (reject,) = world.rejects()
        assert reject["_id"].startswith("E00000X042.US|")
        assert "duplicate" in reject["reason"]
        collection.delete_one({"_id": "theirs"})
    balanced("foreign_index", 1, world.final_account(rejects=True), world.daemon.log)
