"""Fault 10: a soak. One fault after the other, at random, under load; then memory, descriptors and the account."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conftest import MakeWorld
from kit.daemons import PATIENCE, number
from kit.fault_world import (
    QUICK,
    ServiceManager,
    World,
    balanced,
    descriptors,
    locked_file,
    proc_status,
    seeded,
)
from kit.infoway_server import REFUSALS, Answer
from kit.mongo import NOT_PRIMARY, NOT_REPLICATED, MongoServer
from kit.mongo_proxy import STEPPED_DOWN, TOO_LARGE, Afterwards, Fate, MongoProxy, Without
from kit.name_server import ZONE, NameServer
from kit.shims import WallClock

from faults.test_faults_disk import TinyDisk, tiny_disk  # noqa: F401 - a fixture
from faults.test_faults_net import name_server, wrapper  # noqa: F401 - fixtures

MINUTES = float(os.environ.get("STOCKRT_SOAK_MINUTES") or number(0.3, 20.0, quick=0.1))
# The first part of a run, in which caches fill and pools come to their size: measured, 10 minutes. After 5 of a
# run of 20 the resident memory still grew at 2.9 MiB/h, after 10 at 0.96.
WARM_UP = 0.5
SLOPE_MIB_PER_HOUR = 1.0
# Shorter runs say nothing about a slope.
MINUTES_FOR_A_SLOPE = 15
WATCHDOG_S = 20.0
# How many executions there are at least, each in the middle of some fault, and how far apart they are sent.
EXECUTIONS = int(os.environ.get("STOCKRT_SOAK_EXECUTES") or number(0, 10_000))
EVERY_S = 0.05
# A ping is answered this soon; a machine that is busy with other tests is slow, not deaf.
PING_S = number(3.0, 1.0)
FAULT_S = (0.2, number(1.0, 4.0))


@dataclass
class Stage:
    """Everything that can be broken."""

    world: World
    proxy: MongoProxy
    server: MongoServer
    names: NameServer
    disk: TinyDisk
    clock: WallClock
    rng: random.Random


Fault = Callable[[Stage], contextlib.AbstractContextManager[object]]


@contextlib.contextmanager
def mongodb_killed(stage: Stage) -> Iterator[None]:
    """The server, by kill -9."""
    stage.server.kill()
    yield
    stage.server.start()


@contextlib.contextmanager
def mongodb_stopped(stage: Stage) -> Iterator[None]:
    """The server, by SIGSTOP."""
    stage.server.pause()
    yield
    stage.server.resume()


@contextlib.contextmanager
def mongodb_unreachable(stage: Stage) -> Iterator[None]:
    """Connections are refused."""
    stage.proxy.down()
    yield
    stage.proxy.up()


@contextlib.contextmanager
def mongodb_silent(stage: Stage) -> Iterator[None]:
    """Connections hang."""
    stage.proxy.hang()
    yield
    stage.proxy.resume()


@contextlib.contextmanager
def mongodb_answers_strangely(stage: Stage) -> Iterator[None]:
    """Some writes are cut before or after they are applied, or refused; some documents are poison."""
    fates = (Fate.CUT_AFTER, Fate.CUT_BEFORE, Afterwards(STEPPED_DOWN), None, None)
    stage.proxy.on_insert = lambda insert: (
        Without(insert.ids[:1], TOO_LARGE) if stage.rng.random() < 0.1 else stage.rng.choice(fates)
    )
    faults: tuple[dict[str, Any], ...] = (
        {"error_code": NOT_PRIMARY},
        {"write_concern_error": NOT_REPLICATED},
    )
    with stage.server.failing("insert", probability=0.2, **stage.rng.choice(faults)):
        yield
    stage.proxy.on_insert = lambda insert: None


@contextlib.contextmanager
def platform_cut(stage: Stage) -> Iterator[None]:
    """Its connections are reset."""
    stage.world.platform.kill_connections()
    yield


@contextlib.contextmanager
def platform_frozen(stage: Stage) -> Iterator[None]:
    """It reads and sends nothing."""
    with stage.world.platform_frozen():
        yield


@contextlib.contextmanager
def platform_away(stage: Stage) -> Iterator[None]:
    """It is stopped and started."""
    stage.world.platform.stop()
    yield
    stage.world.platform.start()


@contextlib.contextmanager
def platform_gives_no_receipts(stage: Stage) -> Iterator[None]:
    """Results are taken and not confirmed, or the connection is cut in place of it."""
    stage.world.platform.send_receipts = False
    stage.world.platform.drop_next_result = 3
    yield
    stage.world.platform.send_receipts = True
    stage.world.platform.drop_next_result = 0
    stage.world.platform.kill_connections()


@contextlib.contextmanager
def api_away(stage: Stage) -> Iterator[None]:
    """The API is stopped and started."""
    stage.world.infoway.stop()
    yield
    stage.world.infoway.start()


@contextlib.contextmanager
def api_broken(stage: Stage) -> Iterator[None]:
    """Half of its answers are errors, rubbish or cut."""
    answers = [REFUSALS["429_json"], REFUSALS["500_empty"], REFUSALS["502_html"], Answer.malformed_json(),
               Answer.reset(), Answer.cut_before_answer(), Answer.empty(), None, None, None, None, None]  # fmt: skip
    stage.world.feed.trouble = lambda: stage.rng.choice(answers)
    yield
    stage.world.feed.trouble = lambda: None


@contextlib.contextmanager
def names_hang(stage: Stage) -> Iterator[None]:
    """No name is resolved, and whatever is open is cut."""
    stage.names.answers = False
    stage.proxy.cut()
    stage.world.platform.kill_connections()
    yield
    stage.names.answers = True


@contextlib.contextmanager
def disk_full(stage: Stage) -> Iterator[None]:
    """Others take all the space, while MongoDB is away or not."""
    away = stage.rng.random() < 0.5
    if away:
        stage.proxy.down()
    stage.disk.fill()
    yield
    stage.disk.make_room()
    if away:
        stage.proxy.up()


@contextlib.contextmanager
def file_locked(stage: Stage) -> Iterator[None]:
    """Another program holds the lock of a local file."""
    name = stage.rng.choice(("executions.db", "stockrt.db"))
    with locked_file(stage.world.state / name):
        yield


@contextlib.contextmanager
def clock_set(stage: Stage) -> Iterator[None]:
    """The clock goes an hour forward or back, and stays there."""
    stage.clock.step(stage.rng.choice((-3600, 0, 3600)))
    yield


FAULTS: tuple[Fault, ...] = (
    mongodb_killed, mongodb_stopped, mongodb_unreachable, mongodb_silent, mongodb_answers_strangely,
    platform_cut, platform_frozen, platform_away, platform_gives_no_receipts, api_away, api_broken, names_hang,
    disk_full, file_locked, clock_set,
)  # fmt: skip


@dataclass
class Sample:
    """What a quiet daemon uses: at seconds (monotonic), resident KiB, descriptors, threads."""

    at: float
    resident: int
    descriptors: int
    threads: int


def test_a_soak_of_random_faults_loses_nothing_and_grows_nowhere(
    make_world: MakeWorld,
    mongo_proxy: MongoProxy,
    mongo_server: MongoServer,
    name_server: NameServer,  # noqa: F811
    wrapper: tuple[str, ...],  # noqa: F811
    tiny_disk: TinyDisk,  # noqa: F811
    wall_clock: WallClock,
    manager: ServiceManager,
    tmp_path: Path,
) -> None:
    rng = seeded("soak")
    world = make_world(
        f"mongodb://db.{ZONE}:{mongo_proxy.port}/{QUICK}&directConnection=true",
        wrapper,
        SERVER_IP=f"platform.{ZONE}",
        INFOWAY_API_BASE_URL=f"http://api.{ZONE}:{{api}}",
        HEARTBEAT_INTERVAL="2",
        **wall_clock.environment,
        **manager.settings(WATCHDOG_S),
    )
    stage = Stage(world, mongo_proxy, mongo_server, name_server, tiny_disk, wall_clock, rng)
    world.start()
    with world.pinged(PING_S):
        samples, turns = _soak(stage, time.monotonic() + 60 * MINUTES)
    assert len(world.sizes) >= EXECUTIONS
    answered = sum(bool(world.platform.results_for(one)) for one in world.sizes)
    print(f"{len(world.sizes)} executes, {answered} answered; slowest ping {world.slowest_ping:.3f} s")
    assert answered == len(world.sizes)
    _report(samples, tmp_path)
    world.kill()
    world.start()
    assert manager.longest_silence() < WATCHDOG_S
    assert "Traceback" not in world.daemon.log, world.daemon.log[world.daemon.log.index("Traceback") :][:3000]
    balanced("soak", turns, world.final_account(rejects=True), world.daemon.log, minutes=f"{MINUTES:g}")
    _flat(samples)


def _soak(stage: Stage, end: float) -> tuple[list[Sample], int]:
    """Break one thing, or two at once, after the other; look at the daemon whenever all is well and done."""
    samples: list[Sample] = []
    order: list[Fault] = []
    for turn in itertools.count():
        with stage.world.load(EVERY_S, 5):
            for _ in range(2):
                order = order or stage.rng.sample(FAULTS, len(FAULTS))
                _break(stage, order.pop())
        stage.world.connected()
        stage.world.answered(8 * PATIENCE)
        stage.world.drained(8 * PATIENCE)
        samples.append(_sample(stage.world.daemon.pid))
        if time.monotonic() > end and len(stage.world.sizes) >= EXECUTIONS:
            return samples, turn + 1
    raise AssertionError


def _break(stage: Stage, fault: Fault) -> None:
    print(f"{time.strftime('%H:%M:%S')} {fault.__name__}")
    with fault(stage):
        threading.Event().wait(stage.rng.uniform(*FAULT_S))
    threading.Event().wait(stage.rng.uniform(0.0, FAULT_S[1] / 2))


def _sample(pid: int) -> Sample:
    resident, threads = proc_status(pid, "VmRSS"), proc_status(pid, "Threads")
    return Sample(time.monotonic(), resident, descriptors(pid), threads)


def _report(samples: list[Sample], folder: Path) -> None:
    lines = [f"{s.at - samples[0].at:.0f} {s.resident} {s.descriptors} {s.threads}" for s in samples]
    (folder / "samples").write_text("\n".join(lines))
    print("\n".join(lines))


def _flat(samples: list[Sample]) -> None:
    """Fail where something grows after the warm-up."""
    lasted_s = samples[-1].at - samples[0].at
    after = [one for one in samples if one.at >= samples[0].at + WARM_UP * lasted_s] or samples[-1:]
    first, last = after[: len(after) // 2 or 1], after[len(after) // 2 :]
    # a busy machine takes few samples, and a client of MongoDB may have two idle connections at one and none at another
    assert min(one.descriptors for one in last) <= min(one.descriptors for one in first) + 3
    assert min(one.threads for one in last) <= min(one.threads for one in first) + 1
    assert max(one.threads for one in last) <= max(one.threads for one in first) + 2
    if lasted_s >= 60 * MINUTES_FOR_A_SLOPE:
        slope = _slope(after)
        assert slope < SLOPE_MIB_PER_HOUR, f"{slope:.2f} MiB/h"


def _slope(samples: list[Sample]) -> float:
    """The growth of the resident memory in MiB/h: the median of the slopes of all pairs (Theil-Sen)."""
    slopes = [
        (later.resident - earlier.resident) / 1024 / (later.at - earlier.at) * 3600
        for earlier, later in itertools.combinations(samples, 2)
    ]
    return statistics.median(slopes) if slopes else 0.0
