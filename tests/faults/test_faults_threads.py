"""Fault: no thread is to be had, as where TasksMax= of the unit or the user's limit of processes is reached."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import MakeWorld, RunPyz, unavailable
from kit.daemons import HASH, PATIENCE, command_of
from kit.fault_world import World
from kit.infoway_server import Answer

import stockrt
from faults.test_faults_lock import cut_and_connected

# The limit does not hold for root, and counts all of a user's threads: a user that nobody is, who may read files.
USER = 61_000 + os.getpid() % 4_000
MAY = "-all,+dac_override,+dac_read_search"
UNPRIVILEGED = ("setpriv", f"--reuid={USER}", "--clear-groups", f"--inh-caps={MAY}", f"--ambient-caps={MAY}",
                f"--bounding-set={MAY}")  # fmt: skip


@pytest.fixture(autouse=True)
def _can_be_another_user() -> None:
    if os.geteuid() != 0 or not all(map(shutil.which, ("setpriv", "prlimit"))):
        unavailable("to limit a user's threads takes root, and setpriv and prlimit (util-linux) on the PATH")


@pytest.fixture
def world(make_world: MakeWorld) -> Iterator[World]:
    """A world whose daemon the limit holds for; its store is the local file."""
    with tempfile.TemporaryDirectory(prefix="stockrt-threads-") as folder:  # where every user may look
        state = Path(folder) / "state"
        world = make_world("", UNPRIVILEGED, None, ("", ""), STATE_DIRECTORY=str(state))
        stockrt.write_hash(state, HASH)
        for path in (Path(folder), state, state / stockrt.HASH_NAME):
            os.chown(path, USER, USER)
        yield world


@contextmanager
def no_more_threads(pid: int) -> Iterator[None]:
    """Let a process start none."""
    _, most = resource.getrlimit(resource.RLIMIT_NPROC)
    _limit_threads(pid, 1)
    try:
        yield
    finally:
        _limit_threads(pid, most)


def _limit_threads(pid: int, most: int) -> None:
    subprocess.run([*UNPRIVILEGED, "prlimit", f"--pid={pid}", f"--nproc={most}:"], check=True)


def test_it_dials_on_without_a_thread_and_executes_again_when_there_is_one(world: World) -> None:
    world.start()
    with no_more_threads(world.daemon.pid):
        cut_and_connected(world)
        world.platform.refuse_unknown = True  # it has to ask who is online
        world.platform.kill_connections()
        assert world.platform.wait_for(
            lambda p: [dial.status for dial in p.dials[-2:]] == [403, 403], PATIENCE
        )
        world.platform.refuse_unknown = False
        world.connected()
        result = world.result(world.send())
        assert result.status == "failure" and "no thread" in result.data["error"], result.text
        assert "TasksMax" in result.data["error"]
    assert world.result(world.send()).status == "success"
    assert world.alive and "Traceback" not in world.daemon.log
    world.stop()


def test_it_dials_on_where_a_server_drips_its_handshake_too(world: World) -> None:
    world.start()
    with no_more_threads(world.daemon.pid):
        world.platform.slow_handshake = 1.0
        world.platform.kill_connections()
        world.connected()
    world.stop()


@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.long), 3], ids="{} at most".format)
@pytest.mark.parametrize("arguments", [(), ("--once", "--codes", "A.US")], ids=["daemon", "once"])
def test_a_start_without_threads_says_so(world: World, threads: int, arguments: tuple[str, ...]) -> None:
    world.infoway.script = lambda request: Answer.data([])
    environment = world.daemon.environment | {
        "METRICS_FILE": str(world.daemon.state.with_name("metrics.prom"))
    }
    done = subprocess.run(
        ["prlimit", f"--nproc={threads}", *UNPRIVILEGED, *command_of(), *arguments],
        env=environment,
        cwd=world.daemon.state,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    if threads < 3:
        (line,) = done.stderr.splitlines()[-1:]
        assert line.startswith("stockrt: no thread can be started") and "TasksMax" in line
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("store", ["sqlite", "mongodb"])
def test_the_built_file_goes_on_with_fewer_threads_than_it_wants(
    store: str, world: World, pyz: Path, start_pyz: RunPyz, request: pytest.FixtureRequest
) -> None:
    """Six threads for 3,000 codes: it wanted more workers than it could start, and stored nothing."""
    codes = world.daemon.state.parent / "codes.txt"
    codes.write_text("".join(f"A{n}.US\n" for n in range(3000)))
    assert start_pyz("--version").returncode == 0  # it is unpacked
    environment = world.daemon.environment
    if store == "mongodb":
        uri, name = request.getfixturevalue("mongo_db")
        environment |= {"MONGODB_HOST": uri, "MONGODB_DB_NAME": name}
    world.infoway.latency = 0.05
    done = subprocess.run(
        ["prlimit", "--nproc=6", *UNPRIVILEGED, sys.executable, pyz, "--once", "--codes-file", codes],
        env=environment,
        cwd=world.daemon.state,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        check=False,
    )
    assert "total 3000, stored 3000, already known 0, failed 0" in done.stderr, done.stderr[-3000:]
    assert done.returncode == 0
