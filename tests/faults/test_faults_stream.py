"""Faults of the stream: collectors that are killed, a primary that is, connections that are cut, a store that is slow.

Every trade that was made since a code was subscribed first is stored, once, but for what `stream_gaps` tells of.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import pytest
from conftest import controlled
from kit.daemons import PATIENCE, ProcessDaemon, number, until
from kit.fault_world import QUICK, balanced, proc_status, rows_of, seeded, spool_of
from kit.forked import Forked
from kit.infoway_server import PLANS
from kit.mongo import SET_NAME, MongoServer, ReplicaSet
from kit.mongo_proxy import MongoProxy
from kit.stream_server import CUTS, Push, identity
from kit.stream_world import StreamWorld, crypto_codes

CODES = crypto_codes(200)
CONNECTIONS = 4  # where there are several
RATE = 10.0  # with so many codes: 2,000 trades a second


class MakeStreamWorld(Protocol):
    """The type of the fixture `make_stream_world`."""

    def __call__(self, place: tuple[str, str] | None = None, /, **switches: Any) -> StreamWorld:
        """Make the API and the place for collectors; the database is of `place`, default: mongo_db."""


@pytest.fixture
def make_stream_world(
    pyz: Path, clean_env: dict[str, str], tmp_path: Path, forked: Forked, request: pytest.FixtureRequest
) -> Iterator[MakeStreamWorld]:
    """Make the world of collectors of the built program; it ends with the test."""
    with contextlib.ExitStack() as stack:

        def make(place: tuple[str, str] | None = None, /, **switches: Any) -> StreamWorld:
            place = place or request.getfixturevalue("mongo_db")
            return stack.enter_context(
                StreamWorld(pyz, clean_env, tmp_path, place, forked=forked, **switches)
            )

        yield make


def test_killed_under_load_it_loses_and_doubles_nothing_that_no_gap_tells_of(
    make_stream_world: MakeStreamWorld, mongo_server: MongoServer
) -> None:
    """MongoDB takes its time, so that a second's trades are on their way whenever the kill comes."""
    rounds, rng = number(20, 100, quick=2), seeded("stream kill")
    world = make_stream_world(rate=RATE)
    collector = world.collector(CODES)
    with controlled(mongo_server).failing("insert", block_ms=500):
        world.start(collector, len(CODES))
        for _ in range(rounds):
            world.pushed(rng.randrange(3_000, 6_000))
            collector.kill()
            world.start(collector, len(CODES))
        world.pushed(2_000)
    world.quiesce()
    balanced("stream_kill", rounds, world.account(), collector.log)
    assert world.gaps()  # one may go on over several kills
    assert world.stream.violations == []


@pytest.mark.long
def test_primaries_that_are_killed_under_load_cost_no_push_at_all(
    make_stream_world: MakeStreamWorld, replica_set: ReplicaSet, replica_db: tuple[str, str]
) -> None:
    """The connection to the stream stands all the time: the spool takes what MongoDB does not, and no gap is needed."""
    rounds = number(5, 20)
    world = make_stream_world(replica_db, rate=RATE)
    collector = world.collector(CODES, f"{replica_set.uri}?replicaSet={SET_NAME}&timeoutMS=4000")
    world.start(collector, len(CODES))
    for _ in range(rounds):
        world.wait_stored(world.stream.trade(CODES[0]))
        first = replica_set.primary()
        first.kill()
        replica_set.wait_for_primary(first)
        first.server.start()
    world.quiesce()
    account = world.account()
    balanced("stream_election", rounds, account, collector.log)
    assert len(world.stream.connections) == 1
    assert account.acknowledged == len(world.promised()), "a gap where none was"


def test_cut_under_load_it_subscribes_again_and_tells_of_the_gap(make_stream_world: MakeStreamWorld) -> None:
    """One connection of several at a time, while others may still be away."""
    rounds, rng = number(20, 60, quick=4), seeded("stream cut")
    plan = replace(PLANS["pro"], symbols_per_socket=len(CODES) // CONNECTIONS)
    world = make_stream_world(plan=plan, rate=RATE)
    collector = world.collector(CODES)
    world.start(collector, len(CODES))
    for turn in range(rounds):
        world.pushed(rng.randrange(500, 2_000))
        world.subscribed(len(CODES) * 3 // 4)
        cut = rng.choice([one for one in world.stream.open if one.codes])
        world.stream.cut(CUTS[turn % len(CUTS)], cut.number)
    world.subscribed(len(CODES))
    world.pushed(2_000)
    world.quiesce()
    balanced("stream_cut", rounds, world.account(), collector.log)
    assert world.gaps()
    assert world.stream.violations == []


def test_two_with_the_same_codes_that_are_cut_in_turn_miss_nothing(
    make_stream_world: MakeStreamWorld,
) -> None:
    """At every moment one of them stands: no push is missing, gap or not; and each trade is one document."""
    rounds, rng = number(6, 30, quick=2), seeded("stream two")
    world = make_stream_world(rate=RATE / 2)
    collectors = [world.collector(CODES), world.collector(CODES)]
    standing = []
    for collector in collectors:
        before = len(world.stream.connections)
        world.start(collector, len(CODES))
        standing.append(before + 1)
    world.pushed(1_000)
    first = min(push.t for push in world.stream.pushes() if push.connection == standing[1])
    for turn in range(rounds):
        world.pushed(rng.randrange(500, 2_000))
        before = len(world.stream.connections)
        world.stream.cut(rng.choice(CUTS), connection=standing[turn % 2])
        world.subscribed(len(CODES), before)
        standing[turn % 2] = before + 1
    world.pushed(1_000)
    world.quiesce()
    stored = {row["_id"] for row in world.stored()}
    assert [push for push in world.stream.missing(stored) if push.t >= first] == []
    balanced("stream_two", rounds, world.account(), collectors[0].log)


@pytest.mark.long
def test_shares_that_overlap_store_each_trade_once(make_stream_world: MakeStreamWorld) -> None:
    """A half, and the whole beside it."""
    world = make_stream_world(rate=RATE)
    half, whole = world.collector(CODES, COLLECT_SHARE="1/2"), world.collector(CODES)
    half.start()
    world.subscribed(1)
    world.stream.wait_for(lambda it: it.pushed_count > 100, PATIENCE)
    its = len(world.stream.subscribed)
    assert 0 < its < len(CODES)
    world.start(whole, len(CODES))
    world.pushed(3_000)
    world.quiesce()
    assert len(world.stream.subscribed) == len(CODES)
    balanced("stream_shares", 1, world.account(), half.log + whole.log)


def _peak_growth_kib(collector: ProcessDaemon, resident_kib: int) -> int:
    return proc_status(collector.pid, "VmHWM") - resident_kib


@pytest.mark.long
def test_a_store_that_is_slower_than_the_market_costs_no_memory_and_no_push(
    make_stream_world: MakeStreamWorld, mongo_server: MongoServer, mongo_proxy: MongoProxy
) -> None:
    """The spool takes what MongoDB does not, and MongoDB gets it when it is fast again."""
    count = number(60_000, 300_000)
    world = make_stream_world()
    collector = world.collector(CODES, mongo_proxy.uri + QUICK)
    world.start(collector, len(CODES))
    world.wait_stored(world.stream.trade(*CODES))
    resident = proc_status(collector.pid, "VmRSS")
    with mongo_server.failing("insert", block_ms=500):
        world.stream.burst(count)
        assert until(lambda: world.local(collector, spool_of)), collector.log[-3000:]
    world.quiesce()
    account = world.account()
    balanced("stream_slow", 1, account, collector.log)
    assert account.acknowledged == len(world.promised()), "a gap where none was"
    assert _peak_growth_kib(collector, resident) < 100 * 1024


def test_a_burst_is_in_the_embedded_store_whole(make_stream_world: MakeStreamWorld) -> None:
    """Without MongoDB there is no spool: the socket has to wait, and what waits is not lost."""
    count = number(50_000, 200_000, quick=5_000)
    world = make_stream_world()
    collector = world.collector(CODES, "")
    world.start(collector, len(CODES))
    resident = proc_status(collector.pid, "VmRSS")
    world.stream.burst(count)

    def missing() -> list[Push]:
        rows = world.local(collector, lambda path: rows_of(path, "realtime"))
        return world.stream.missing({row["_id"] for row in rows})

    assert until(lambda: world.stream.pushed_count == count and not missing()), collector.log[-3000:]
    assert _peak_growth_kib(collector, resident) < 100 * 1024


def test_what_traded_while_nobody_listened_is_fetched_over_rest(make_stream_world: MakeStreamWorld) -> None:
    """The last trade of each code, from before it subscribed and from while it was cut off."""
    world = make_stream_world()
    before = [identity(world.stream.new_trade(code)) for code in CODES]
    collector = world.collector(CODES)
    world.start(collector, len(CODES))
    world.wait_stored(before)
    world.stream.refuse_handshakes(500)
    world.stream.cut("rst")
    unheard = [identity(world.stream.new_trade(code)) for code in CODES]
    world.subscribed(len(CODES), 1)
    world.wait_stored(unheard)
    (gap,) = world.gaps()
    assert gap.codes == {*CODES}
