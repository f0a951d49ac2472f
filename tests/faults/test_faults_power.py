"""Fault 2: the power fails. What was not synced is gone, what was acknowledged is not."""

from __future__ import annotations

import json
import random
import re
import sqlite3
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conftest import MakeWorld, RunPyz
from kit.daemons import number
from kit.fault_world import QUICK, Account, World, balanced, rejects_of, rows_of, seeded, settle, spool_of
from kit.mongo_proxy import MongoProxy
from kit.shims import Disk, Event, read_events
from kit.websocket_wire import masked

# As an insert holds them.
TRADE = re.compile(rb"E\d{5}X\d{3}\.US\|\d+\|[\d.]+\|\d+\|\d")
WAL_HEAD, FRAME_HEAD = 32, 24


@dataclass
class Wire:
    """What the events so far say on the sockets: results sent, documents that MongoDB has answered for."""

    results: list[dict[str, Any]] = field(default_factory=list)
    stored: set[str] = field(default_factory=set)
    _asked: dict[int, set[str]] = field(default_factory=dict)  # by socket: sent, and not answered yet

    def feed(self, event: Event) -> None:
        """Take the next event."""
        if event.kind == ">":
            self._sent(event)
        elif event.kind == "<":
            self.stored |= self._asked.pop(event.descriptor, set())
        elif event.kind == "C":
            self._asked.pop(event.descriptor, None)

    def _sent(self, event: Event) -> None:
        if event.data[:1] == b"\x81" and (told := _unmasked(event.data)).get("type") == "result":
            self.results.append(told)
        elif trades := {found.decode() for found in TRADE.findall(event.data)}:
            self._asked.setdefault(event.descriptor, set()).update(trades)


def _unmasked(frame: bytes) -> dict[str, Any]:
    """The JSON object in a text frame of a WebSocket client, {} where it holds none."""
    size = frame[1] & 0x7F
    at = 2 + {126: 2, 127: 8}.get(size, 0)
    try:
        found = json.loads(masked(frame[at + 4 :], frame[at : at + 4]))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def test_power_cut_at_any_moment_loses_nothing_that_was_acknowledged(
    make_world: MakeWorld, mongo_proxy: MongoProxy, disk_shim: Path, tmp_path: Path
) -> None:
    rounds, rng = number(150, 2000, quick=50), seeded("power")
    world, events = _recorded(make_world, mongo_proxy, disk_shim, tmp_path, number(60, 400, quick=24))
    cuts = sorted(rng.sample(range(len(events)), min(rounds, len(events))))
    total = _cut_at(cuts, events, world, rng, tmp_path / "rebuilt")
    balanced("power", len(cuts), total, world.daemon.log)


def test_stockrt_goes_on_after_a_power_cut(
    make_world: MakeWorld, mongo_proxy: MongoProxy, disk_shim: Path, tmp_path: Path, start_pyz: RunPyz
) -> None:
    rounds, rng = number(6, 60, quick=3), seeded("after power cut")
    world, events = _recorded(make_world, mongo_proxy, disk_shim, tmp_path, number(60, 60, quick=24))
    # from the middle on: before it nothing may be acknowledged yet, and few rounds would show nothing
    cuts = set(rng.sample(range(len(events) // 2, len(events)), rounds))
    mongo_proxy.up()
    disk, wire = Disk(world.state), Wire()
    total = Account(0, set(), 0, set(), set())
    with world.client() as client:
        for moment, event in enumerate(events):
            if moment in cuts:
                name = f"{world.database}_{moment}"
                files, place = disk.after_cut(rng), tmp_path / str(moment)
                _lay_down(files, place)
                env = {"STATE_DIRECTORY": str(place), "MONGODB_HOST": world.real_uri, "MONGODB_DB_NAME": name}
                done = start_pyz("--drain", env=env)
                documents = list(client[name]["realtime"].find())
                client.drop_database(name)
                assert done.returncode == 0, done.stderr
                acknowledged = set().union(*(world.counted(result) for result in wire.results))
                account = settle(acknowledged - wire.stored, world.feed.records, documents, [])
                assert account.balances, f"cut at {moment}: {account}\n{done.stderr}"
                total.acknowledged += account.acknowledged
            (wire if event.kind in "><C" else disk).feed(event)
    balanced("power_drain", rounds, total)


def _recorded(
    make_world: MakeWorld, proxy: MongoProxy, shim: Path, folder: Path, commands: int
) -> tuple[World, list[Event]]:
    """A world that went through an outage, and everything that the daemon did to its files and sockets."""
    log, state = folder / "events", folder / "state"
    watched = {"LD_PRELOAD": str(shim), "STOCKRT_SHIM_LOG": str(log), "STOCKRT_SHIM_FOLDER": str(state)}
    world = make_world(proxy.uri + QUICK, **watched)
    _work_through_an_outage(world, proxy, commands)
    return world, list(read_events(log))


def _work_through_an_outage(world: World, proxy: MongoProxy, commands: int) -> None:
    """Write, spool, drain while new work comes, and spool again."""
    world.start()
    for up in (True, False, True, False):
        proxy.up() if up else proxy.down()
        for place in range(commands // 4):
            world.send(1 + place % 7)
        world.answered()
        if up:
            world.drained()
    world.kill()


def _cut_at(cuts: list[int], events: list[Event], world: World, rng: random.Random, place: Path) -> Account:
    """Cut the power at each of these events, and add the accounts up."""
    disk, wire = Disk(world.state), Wire()
    total = Account(0, set(), 0, set(), set())
    for moment, event in enumerate(events):
        if cuts and moment == cuts[0]:
            cuts = cuts[1:]
            account = _account_after_cut(disk.after_cut(rng), wire, world, place / str(moment))
            total.acknowledged = max(total.acknowledged, account.acknowledged)
            total.lost |= account.lost
            total.strangers |= account.strangers
            total.changed |= account.changed
        (wire if event.kind in "><C" else disk).feed(event)
    return total


def _account_after_cut(files: dict[str, bytes], wire: Wire, world: World, place: Path) -> Account:
    """Make the account of the files that a power cut left, and of what MongoDB had confirmed by then."""
    _lay_down(files, place)
    spool, answers = place / "stockrt.db", place / "executions.db"
    for path in (spool, answers):
        if path.exists():
            assert _integrity(path) == "ok", f"{path} after a power cut"
    acknowledged = set().union(*(world.counted(result) for result in wire.results))
    if wire.results:
        kept = {row["execution_id"] for row in rows_of(answers, "executions", "answer IS NOT NULL")}
        assert {result["meta"]["execution_id"] for result in wire.results} <= kept
    rows = [*spool_of(spool), *rejects_of(spool)] if spool.exists() else []
    account = settle(acknowledged, world.feed.records, [], rows)
    account.lost -= wire.stored
    return account


def _lay_down(files: dict[str, bytes], place: Path) -> None:
    place.mkdir(parents=True)
    for name, content in files.items():
        if not name.endswith("-shm"):  # never synced: SQLite makes it anew
            (place / name).write_bytes(content)


def _integrity(path: Path) -> str:
    with closing(sqlite3.connect(path)) as db:
        return str(db.execute("PRAGMA integrity_check").fetchone()[0])


def test_a_wal_cut_at_every_frame_holds_the_transactions_up_to_there(
    make_world: MakeWorld, mongo_proxy: MongoProxy, tmp_path: Path
) -> None:
    world = make_world(mongo_proxy.uri + QUICK)
    mongo_proxy.down()
    world.start()
    for size in range(1, number(40, 120, quick=20)):
        world.send(1 + size % 11)
    world.answered()
    world.kill()
    wal, rows = (world.state / "stockrt.db-wal").read_bytes(), world.spool()
    assert world.acknowledged() == {row["_id"] for row in rows}
    page = int.from_bytes(wal[8:12], "big")
    frames = range(WAL_HEAD, len(wal) + 1, FRAME_HEAD + page)
    assert frames[-1] == len(wal)
    assert len(frames) > 50
    before: list[dict[str, Any]] = []
    states = 0
    for end in frames:
        head = wal[end - FRAME_HEAD - page : end - page] if end > WAL_HEAD else bytes(FRAME_HEAD)
        commits = any(head[4:8])
        for cut in (end, end + 7, end + FRAME_HEAD + page // 2):
            found = _rows_with(wal[:cut], world.state / "stockrt.db", tmp_path / f"{cut}")
            assert found == rows[: len(found)], f"cut at {cut}: other rows than the first"
            if commits and cut == end:
                assert len(found) >= len(before)
                states += len(found) > len(before)
                before = found
            assert found == before, f"cut at {cut}: half a transaction"
    assert before == rows
    lost = world.acknowledged() - {row["_id"] for row in before}
    account = Account(len(rows), lost, 0, set(), set())
    assert states > 10
    balanced("power_wal", len(frames) * 3, account)


def _rows_with(wal: bytes, database: Path, place: Path) -> list[dict[str, Any]]:
    """The trades in a file whose WAL is this."""
    place.mkdir()
    path = place / database.name
    path.write_bytes(database.read_bytes())
    path.with_name(path.name + "-wal").write_bytes(wal)
    assert _integrity(path) == "ok"
    return spool_of(path)
