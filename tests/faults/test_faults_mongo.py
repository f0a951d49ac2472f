"""Faults 3 to 5: MongoDB away, hanging, flapping; its reply lost; its primary changing; one poison document."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import pytest
from conftest import MakeWorld
from kit.daemons import HOUR, PATIENCE, number, until
from kit.fault_world import QUICK, World, balanced, elect_under_load, proc_status, seeded
from kit.mongo import NOT_PRIMARY, NOT_REPLICATED, SET_NAME, MongoServer, ReplicaSet
from kit.mongo_proxy import STEPPED_DOWN, TOO_LARGE, Afterwards, Fate, Insert, MongoProxy, Without

# ------------------------------------------------------------------------------------------------------
# 3. Away, hanging, flapping
# ------------------------------------------------------------------------------------------------------

OUTAGE_S = number(6, 600, quick=3)
EVERY_S = number(0.2, 1.0)
CODES = 100
FLAP_S = number(1.0, 5.0, quick=0.4)
MEMORY_MIB = 20
# What a short run must see is less, for others are at work beside it: of what came, so much was spooled, and drained
# so many times as fast as it came.
SPOOLED = number(0.1, 0.5)
PACE = number(1, 5)


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


@pytest.mark.parametrize(
    "outage",
    [_down, _hanging, pytest.param(_flapping, marks=pytest.mark.long)],
    ids=["down", "hanging", "flapping"],
)
def test_an_outage_costs_no_trade_little_memory_and_is_made_up_for_fast(
    outage: Callable[[MongoServer, threading.Event], None], mongo_server: MongoServer, make_world: MakeWorld
) -> None:
    world = make_world("" if HOUR else world_uri(mongo_server))
    world.start()
    for _ in range(30):  # what every later execution needs is loaded
        world.send(CODES)
    world.answered()
    before = proc_status(world.daemon.pid, "VmRSS")
    mongo_server.checkpoint()
    over = threading.Event()
    breaker = threading.Thread(target=outage, args=(mongo_server, over), daemon=True)
    with world.load(EVERY_S, CODES):
        sent, began = len(world.sizes), time.monotonic()
        breaker.start()
        try:
            threading.Event().wait(OUTAGE_S)
        finally:
            arrived = (len(world.sizes) - sent) * CODES / (time.monotonic() - began)
            over.set()
            breaker.join()
            waiting = len(world.spool())
            mongo_server.ensure_running()
        took = _drain_seconds(world)
    peak = proc_status(world.daemon.pid, "VmHWM")
    account = world.final_account()
    facts = {"seconds": OUTAGE_S, "every": f"{EVERY_S:g}", "flap": f"{FLAP_S:g}"}
    balanced(outage.__name__.strip("_"), 1, account, world.daemon.log, **facts)
    assert account.acknowledged == len(world.feed.records), "a code failed"
    assert (peak - before) / 1024 < MEMORY_MIB
    if outage is not _flapping:
        assert waiting >= SPOOLED * arrived * OUTAGE_S, "it was not spooled"
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


class Hits(Protocol):
    """Tells, when all is over, how often something happened."""

    hits: int


@dataclass
class Counted:
    """What a test itself counts."""

    hits: int = 0


Spoiled = Callable[[MongoServer, MongoProxy, random.Random], contextlib.AbstractContextManager[Hits]]

SPOILED = 0.4  # of all inserts


def _passing(fate: Fate | Afterwards) -> Spoiled:
    """Inserts meet a fate on their way."""

    @contextlib.contextmanager
    def spoil(server: MongoServer, proxy: MongoProxy, rng: random.Random) -> Iterator[Counted]:
        counted = Counted()

        def decide(insert: Insert) -> Fate | Afterwards | None:
            if (
                counted.hits and rng.random() >= SPOILED
            ):  # the first one always: few inserts may be all there are
                return None
            counted.hits += 1
            return fate

        proxy.on_insert = decide
        yield counted
        proxy.on_insert = lambda insert: None

    return spoil


def _failing(**how: Any) -> Spoiled:
    """The server itself lets inserts fail."""
    return lambda server, proxy, rng: server.failing("insert", probability=SPOILED, **how)


@pytest.mark.parametrize(
    "spoiled",
    [
        _passing(Fate.CUT_AFTER),
        _failing(close_connection=True),
        _failing(error_code=NOT_PRIMARY),
        _passing(Afterwards(STEPPED_DOWN)),
        _failing(write_concern_error=NOT_REPLICATED),
    ],
    ids=["applied and cut", "cut", "not primary", "applied and stepped down", "applied here alone"],
)
def test_a_write_whose_answer_is_lost_is_one_document(
    spoiled: Spoiled, make_world: MakeWorld, mongo_server: MongoServer, mongo_proxy: MongoProxy
) -> None:
    rounds, rng = number(30, 500, quick=15), seeded("lost reply")
    # what is made up is no change that the server tells of: the client learns at the next heartbeat that it is well
    world = make_world(f"{mongo_proxy.uri}{QUICK}&heartbeatFrequencyMS=500")
    world.start()
    with spoiled(mongo_server, mongo_proxy, rng) as met:
        for place in range(rounds):
            world.send(1 + place % 40)
        world.answered(4 * PATIENCE)
    assert met.hits > 0
    account = world.final_account()
    balanced("answer", rounds, account, world.daemon.log)
    assert account.acknowledged == len(world.feed.records), "a code failed"


def test_elections_under_load_lose_and_double_nothing(
    make_world: MakeWorld, replica_set: ReplicaSet, replica_db: tuple[str, str]
) -> None:
    rounds, rng = number(5, 100, quick=2), seeded("elections")
    uri = f"{replica_set.uri}?replicaSet={SET_NAME}&timeoutMS=4000"
    world = make_world(uri, (), None, replica_db)
    lost = _sometimes_lost(rng)
    for member in replica_set.members:
        member.proxy.on_insert = lost
    world.start()
    retried = replica_set.retried_writes()
    elect_under_load(world, replica_set, rounds)
    for member in replica_set.members:
        member.proxy.on_insert = lambda insert: None
    balanced("election", rounds, world.final_account(), world.daemon.log)
    assert replica_set.retried_writes() > retried, "no retryable write was answered from memory"


def _sometimes_lost(rng: random.Random) -> Callable[[Insert], Fate | None]:
    seen = itertools.count(1)
    # the third one always: few inserts may be all there are
    return lambda insert: Fate.CUT_AFTER if next(seen) == 3 or rng.random() < 0.1 else None


# ------------------------------------------------------------------------------------------------------
# 5. Poison
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_rule", [True, False], ids=["fails validation", "too large"])
@pytest.mark.parametrize("path", ["direct", "drain"])
def test_one_poison_document_of_a_thousand_harms_no_other(
    path: str, by_rule: bool, make_world: MakeWorld, mongo_proxy: MongoProxy
) -> None:
    rounds = number(1, 10)
    world = make_world(mongo_proxy.uri + QUICK)
    poison: set[str] = set()
    guard = threading.Lock()

    def spoil(insert: Insert) -> Without | None:
        with guard:
            ids = [name for name in insert.ids if name.split("X")[1].startswith("500.US")]
            poison.update(ids)
        return Without(ids, TOO_LARGE) if ids and not by_rule else None

    mongo_proxy.on_insert = spoil
    if by_rule:
        with world.client() as client:
            rule = {"stock_code": {"$not": {"$regex": r"X500\.US$"}}}
            client[world.database].create_collection("realtime", validator=rule)
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
    said = "Document failed validation" if by_rule else "BSONObj size: 17000000"
    assert all(said in row["reason"] for row in rejects), rejects
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
