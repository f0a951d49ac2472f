"""Fault 1: kill -9 at random moments under load, while it writes, spools and drains."""

from __future__ import annotations

import random
import threading

import pytest
from conftest import MakeWorld
from kit.daemons import PATIENCE, number, until
from kit.fault_world import QUICK, World, balanced, seeded
from kit.mongo import MongoServer
from kit.mongo_proxy import MongoProxy


# Several times in the long form, each with a database of its own.
@pytest.mark.parametrize("time", range(number(1, 10)))
def test_killed_at_random_moments_it_loses_and_doubles_nothing(
    time: int, make_world: MakeWorld, mongo_server: MongoServer, mongo_proxy: MongoProxy
) -> None:
    rounds, rng = number(6, 20, quick=3), seeded(f"kill {time}")
    world = make_world(mongo_proxy.uri + QUICK)
    with mongo_server.failing("insert", block_ms=20):  # a drain takes long enough to be met by the kill
        for turn in range(rounds):
            phase = (_while_writing, _while_spooling, _while_draining)[turn % 3]
            phase(world, mongo_proxy, rng)
            account = world.account()
            assert account.balances, f"round {turn}, {phase.__name__}: {account}\n{world.daemon.log[-3000:]}"
    mongo_proxy.up()
    world.start()
    balanced("kill", rounds, world.final_account(), world.daemon.log)


def _while_writing(world: World, proxy: MongoProxy, rng: random.Random) -> None:
    """Up to a moment at which MongoDB is written to."""
    proxy.up()
    world.start()
    _killed_after(world, rng.randrange(1, 20), rng)


def _while_spooling(world: World, proxy: MongoProxy, rng: random.Random) -> None:
    """Up to a moment at which the spool is written to."""
    proxy.down()
    world.start()
    _killed_after(world, rng.randrange(1, 40), rng)


def _while_draining(world: World, proxy: MongoProxy, rng: random.Random) -> None:
    """Up to a moment at which MongoDB is back and gets what was spooled, while new work comes."""
    world.start(connected=False)
    proxy.up()
    before = len(proxy.inserted)
    assert until(lambda: len(proxy.inserted) > before), world.daemon.log[-3000:]
    with world.load(0.02, 20):
        threading.Event().wait(rng.uniform(0.0, 0.3))
        world.kill()


def _killed_after(world: World, results: int, rng: random.Random) -> None:
    """Work for so many results and a moment more, and be killed at work."""
    before = len(world.platform.results)
    with world.load(0.02, 60):
        enough = world.platform.wait_for(lambda platform: len(platform.results) >= before + results, PATIENCE)
        assert enough, world.daemon.log[-3000:]
        threading.Event().wait(rng.uniform(0.0, 0.1))
        world.kill()
