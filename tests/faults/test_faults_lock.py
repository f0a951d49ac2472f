"""Faults of a local file that are no damage: another program holds its lock, or the disk takes its time."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from conftest import MakeWorld
from kit.daemons import PATIENCE, number, until
from kit.fault_world import QUICK, ServiceManager, World, locked_file
from kit.mongo_proxy import MongoProxy

# One that waits for the lock of a file gives up after 10 s.
HELD_S = number(12.0, 31.0)
# A machine that is busy with other tests is slow, not deaf.
SOON_S = number(2.0, 1.0)
# One write waits for 10 s, and the sign of life is given at half of the watchdog's time.
WATCHDOG_S = 25.0
FILES = ["executions.db", "stockrt.db"]


def cut_and_connected(world: World) -> None:
    """Cut the connection, and wait until there is another one."""
    dials = len(world.platform.dials)
    world.platform.kill_connections()
    assert world.platform.wait_for(lambda p: p.connected and len(p.dials) > dials, PATIENCE), (
        world.daemon.log[-3000:]
    )


def all_is_there(world: World) -> None:
    """Fail unless each command has one answer, and what was acknowledged is in MongoDB."""
    account = world.final_account()
    assert account.acknowledged and account.balances, f"{account}\n{world.daemon.log[-3000:]}"


@pytest.mark.long
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("mongodb", ["well", "away"])
def test_a_file_that_another_program_locks_deafens_and_ends_nothing(
    make_world: MakeWorld, mongo_proxy: MongoProxy, manager: ServiceManager, name: str, mongodb: str
) -> None:
    world = make_world(mongo_proxy.uri + QUICK, **manager.settings(WATCHDOG_S))
    world.start()
    if mongodb == "away":
        mongo_proxy.down()
    world.send()
    world.answered()
    with world.pinged(SOON_S), world.load(0.5):
        with locked_file(world.state / name):
            for _ in range(4):
                threading.Event().wait(HELD_S / 4)
                cut_and_connected(world)
        cut_and_connected(world)
        mongo_proxy.up()
        world.answered()
    assert manager.longest_silence() < WATCHDOG_S
    assert world.alive and "Traceback" not in world.daemon.log
    all_is_there(world)
    world.stop()


def test_a_file_that_is_locked_ends_no_dialling(make_world: MakeWorld) -> None:
    """In short: what is refused or kept for later is so in memory."""
    world = make_world()
    world.start()
    world.send()
    world.answered()
    with world.pinged(SOON_S):
        with locked_file(world.state / "executions.db"):
            for _ in range(3):
                world.send()
                cut_and_connected(world)
        world.answered()
    assert world.alive
    all_is_there(world)


def test_a_slow_disk_holds_up_no_ping(
    make_world: MakeWorld, disk_shim: Path, manager: ServiceManager, tmp_path: Path
) -> None:
    slow = tmp_path / "slow"
    world = make_world(
        LD_PRELOAD=str(disk_shim),
        STOCKRT_SHIM_LOG="/dev/null",
        STOCKRT_SHIM_FOLDER=str(tmp_path / "state"),
        STOCKRT_SHIM_SLOW=str(slow),
        **manager.settings(WATCHDOG_S),
    )
    world.start()
    world.send()
    world.answered()
    slow.write_text(str(number(3.0, 8.0, quick=2.5)))
    with world.pinged(SOON_S):
        executions = [world.send() for _ in range(number(3, 3, quick=1))]
        for execution in executions:
            world.result(execution, 120)
        cut_and_connected(world)
        slow.unlink()
        world.answered()
    assert manager.longest_silence() < WATCHDOG_S
    all_is_there(world)
    assert until(lambda: world.alive)
    world.stop()


@pytest.mark.long
@pytest.mark.parametrize("name", FILES)
def test_a_start_beside_a_locked_file_waits_for_it_and_ends_nothing(
    make_world: MakeWorld, mongo_proxy: MongoProxy, manager: ServiceManager, name: str
) -> None:
    world = make_world(mongo_proxy.uri + QUICK, **manager.settings(WATCHDOG_S))
    world.start()
    world.send()
    world.answered()
    world.kill()  # what it wrote last is in the log
    with locked_file(world.state / name), world.pinged(SOON_S):
        world.start()
        refused = world.result(world.send())
        assert refused.status == "failure" and name in refused.data["message"], refused.text
        world.platform.kill_connections()
        world.connected()
    assert until(lambda: world.result(world.send()).status == "success")
    assert manager.longest_silence() < WATCHDOG_S
    assert world.alive and "Traceback" not in world.daemon.log
    all_is_there(world)
    world.stop()


def test_what_waits_is_taken_up_once_the_lock_is_gone(
    make_world: MakeWorld, mongo_proxy: MongoProxy, manager: ServiceManager
) -> None:
    """In short as well: a start beside a locked file waits for it, is connected and ends nothing."""
    world = make_world(mongo_proxy.uri + QUICK, **manager.settings(WATCHDOG_S))
    mongo_proxy.down()
    world.start()
    world.result(world.send())
    world.infoway.latency = lambda request: 60.0
    interrupted = world.send()
    world.infoway.wait_for(lambda api: api.request_count >= 2, PATIENCE)
    world.kill()
    mongo_proxy.up()
    world.infoway.latency = 0.0
    with locked_file(world.state / "executions.db"):
        world.start()
        # the platform asks for it again meanwhile, and the refusal is its answer
        refused = world.result(interrupted)
        assert refused.status == "failure" and "executions.db" in refused.data["message"], refused.text
    assert until(lambda: world.result(world.send()).status == "success")
    assert manager.longest_silence() < WATCHDOG_S
    assert world.alive and "Traceback" not in world.daemon.log
    all_is_there(world)
    world.stop()
