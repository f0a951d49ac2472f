"""Fault: no file or socket can be opened, as where LimitNOFILE= of the unit is reached."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator

import pytest
from conftest import MakeWorld
from kit.daemons import PATIENCE, until
from kit.fault_world import World

from faults.test_faults_lock import cut_and_connected

# How many more files, and where the trades go.
QUICK = {(2, "local"), (6, "mongodb")}


@contextlib.contextmanager
def no_more_files(pid: int, more: int) -> Iterator[None]:
    """Let a process open only so many more."""
    _, most = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    limit = 0
    while more >= 0:
        more -= limit not in used
        limit += 1
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit - 1, most))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, most))


def said(world: World) -> str:
    """What the daemon has said, which is no traceback."""
    log = world.daemon.log
    assert "Traceback" not in log, log[log.index("Traceback") - 300 :][:4000]
    assert "a fault of stockrt" not in log, log[-3000:]
    return log


@pytest.mark.parametrize(
    ("more", "store"),
    [
        pytest.param(more, store, marks=() if (more, store) in QUICK else pytest.mark.long)
        for more in (0, 1, 2, 3, 4, 6, 8, 10)
        for store in ("local", "mongodb")
    ],
)
def test_without_descriptors_each_command_is_answered_in_words(
    make_world: MakeWorld, store: str, more: int
) -> None:
    world = make_world("", (), None, *([("", "")] if store == "local" else []))
    world.start()
    with no_more_files(world.daemon.pid, more):
        first = world.result(world.send())
        second = world.result(world.send())
        for told in (first, second):
            text = told.text
            # kept for MongoDB, which cannot be reached
            kept = told.data["result"]["kept_count"] == told.data["result"]["total"] > 0
            assert told.status == "success" or kept or "LimitNOFILE" in text, text
            assert "fault of stockrt" not in text, text
        world.platform.kill_connections()
        assert until(lambda: world.platform.connected or "Too many open files" in world.daemon.log, PATIENCE)
        said(world)
    assert until(lambda: world.result(world.send(), 3 * PATIENCE).status == "success", 3 * PATIENCE), said(
        world
    )
    cut_and_connected(world)
    said(world)
    assert world.alive
    world.stop()
