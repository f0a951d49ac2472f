"""Fault 8: somebody sets the clock. What is measured in seconds goes by the monotonic clock."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

from conftest import MakeWorld
from kit.daemons import PATIENCE, number, until
from kit.fault_world import QUICK, ServiceManager, World, balanced
from kit.mongo_proxy import MongoProxy
from kit.shims import WallClock

import stockrt

HOUR = 3600
RATE = 4
# What systemd gives the service in these tests, in seconds: it is told of life twice in that time.
WATCHDOG_S = 2.0


def _seconds_of_work(world: World) -> float:
    """The time of ten requests: more than twice as many as the API allows in a second."""
    started = time.monotonic()
    told = world.result(world.send(1000), 2 * PATIENCE).data["result"]
    assert told["failed_count"] == 0, told
    return time.monotonic() - started


def test_a_clock_that_is_set_changes_no_rate_no_back_off_and_no_watchdog(
    make_world: MakeWorld, mongo_proxy: MongoProxy, wall_clock: WallClock, manager: ServiceManager
) -> None:
    """Forward, and back to before the time at which it began."""
    rounds = number(1, 10)
    world = make_world(
        mongo_proxy.uri + QUICK,
        (),
        RATE,
        INFOWAY_PLAN=str(RATE),
        **wall_clock.environment,
        **manager.settings(WATCHDOG_S),
    )
    wall_clock.step(0)
    world.start()
    usual = _seconds_of_work(world)
    for turn, way in itertools.product(range(1, rounds + 1), (1, -1)):
        mongo_proxy.down()
        world.result(world.send(10))
        world.platform.stop()
        said = len(world.daemon.log)
        assert until(lambda: "cannot connect" in world.daemon.log[said:]), world.daemon.log[-3000:]  # noqa: B023
        wall_clock.step(way * turn * HOUR)
        beats = len(manager.beats)
        world.platform.start()
        world.connected()
        world.result(world.send(10))
        mongo_proxy.up()
        world.drained()
        assert _seconds_of_work(world) < 20 * usual
        assert until(lambda: len(manager.beats) >= beats + 2), "no sign of life since the clock was set"  # noqa: B023
    # a window that the clock empties lets so many through; a busy machine delays one now and then
    assert world.infoway.over_limit < RATE
    balanced("clock", 2 * rounds, world.final_account(), world.daemon.log)


def test_a_minute_that_was_used_up_before_the_clock_went_back_is_over(
    make_world: MakeWorld, wall_clock: WallClock
) -> None:
    """Instances count an API key's minute together, in slices of the wall clock."""
    world = make_world(INFOWAY_PLAN="free", **wall_clock.environment)
    wall_clock.step(-HOUR)
    minute = {str(int(time.time() // stockrt.SLICE_S)): stockrt.PLANS["free"].per_minute}
    with world.client() as client:
        client[world.database]["license_usage"].insert_one(
            {"_id": f"{stockrt.key_digest('test-key')}|minute", "version": 1, "slices": minute}
        )
    world.start()
    told = world.result(world.send(10), 20)
    assert told.data["result"]["success_count"] == 10, told.text
    balanced("clock", 1, world.final_account(), world.daemon.log)


def test_a_machine_that_starts_in_1970_says_so_and_stores_no_such_time(
    make_world: MakeWorld, wall_clock: WallClock, pyz: Path
) -> None:
    """Executions fail with a sentence until the clock is set, and then succeed, in the same built file."""
    world = make_world(**wall_clock.environment)
    world.daemon._program = pyz
    wall_clock.step(-int(time.time()) + 60)
    try:
        world.start()
        told = world.result(world.send(2))
        assert told.status == "failure" and "the clock of this machine says 1970-01-01" in told.text
        assert "the clock of this machine says 1970-01-01" in world.daemon.log
    finally:
        wall_clock.step(0)
    assert world.result(world.send(2)).status == "success"
    with world.client() as client:
        (oldest, *_) = client[world.database]["realtime"].find().sort("create_time", 1)
    assert oldest["create_time"].year > 2020
