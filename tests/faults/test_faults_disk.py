"""Faults 6 and 7: the spool's file damaged, of somebody else, of another version; a full disk and the cap."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from conftest import NOBODY, MakeWorld, RunPyz, unavailable
from kit.daemons import PATIENCE, number, until
from kit.fault_world import QUICK, Account, World, balanced, seeded, settle
from kit.mongo_proxy import MongoProxy

PAGE = 4096
# As root a process may open every file; without these capabilities the permissions hold for it too.
PERMISSIONS_HOLD = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all")
# The file of stockrt 1.0, before trades waited in it for MongoDB: what a machine without MongoDB wrote.
SCHEMA_1 = """
CREATE TABLE realtime (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,  -- order of arrival
    _id TEXT NOT NULL UNIQUE,
    s TEXT NOT NULL, t INTEGER NOT NULL,
    p TEXT NOT NULL, v TEXT NOT NULL, vw TEXT NOT NULL, td INTEGER NOT NULL,
    stock_code TEXT NOT NULL,
    create_time TEXT NOT NULL,              -- UTC, ISO 8601
    demo INTEGER                            -- 1: synthetic, by --demo
);
CREATE INDEX realtime_code_time ON realtime (stock_code, t DESC);
CREATE TABLE close (
    _id TEXT PRIMARY KEY,                   -- code|date
    date TEXT NOT NULL,                     -- of the session, on the exchange's calendar
    s TEXT NOT NULL, t INTEGER NOT NULL,
    p TEXT NOT NULL, v TEXT NOT NULL, vw TEXT NOT NULL, td INTEGER NOT NULL,
    stock_code TEXT NOT NULL,
    after_hours INTEGER, half_day INTEGER, half_day_unknown INTEGER,
    create_time TEXT NOT NULL, update_time TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE key_usage (
    digest TEXT, day TEXT, used INTEGER NOT NULL, PRIMARY KEY (digest, day)
) WITHOUT ROWID;
CREATE TABLE calendar (
    market TEXT PRIMARY KEY, asked_on TEXT NOT NULL, first TEXT NOT NULL, last TEXT NOT NULL,
    half_days TEXT NOT NULL                 -- JSON: ISO dates
) WITHOUT ROWID;
PRAGMA user_version = 1;
"""
Damage = Callable[[Path, random.Random], set[int]]


# ------------------------------------------------------------------------------------------------------
# 6. A damaged file. Each damage returns the numbers of the pages that it touched.
# ------------------------------------------------------------------------------------------------------


def overwritten(path: Path, rng: random.Random) -> set[int]:
    """Random bytes at a few random places."""
    touched: set[int] = set()
    size = path.stat().st_size
    with path.open("r+b") as file:
        for _ in range(rng.randint(1, 6)):
            at, length = rng.randrange(size), rng.randint(1, 2000)
            file.seek(at)
            file.write(rng.randbytes(min(length, size - at)))
            touched |= set(range(at // PAGE, (at + length) // PAGE + 1))
    return touched


def cut_short(path: Path, rng: random.Random) -> set[int]:
    """Cut at a random length, which may be 0."""
    pages = path.stat().st_size // PAGE
    last = path.stat().st_size - PAGE
    length = rng.choice(
        (0, 1, 50, 100, PAGE, last + rng.randrange(PAGE), rng.randrange(last), rng.randrange(last))
    )
    os.truncate(path, length)
    return set(range(length // PAGE, pages))


def beginning_overwritten(path: Path, rng: random.Random) -> set[int]:
    """The header, or the whole first page, which says where all tables are."""
    with path.open("r+b") as file:
        file.write(rng.randbytes(rng.choice((16, 100, PAGE))))
    return {0}


def inner_pages_overwritten(path: Path, rng: random.Random) -> set[int]:
    """Every page that leads to others: no row can be reached from the roots of the tables."""
    touched = set()
    with path.open("r+b") as file:
        for page in range(1, path.stat().st_size // PAGE):
            file.seek(page * PAGE)
            if file.read(1) in (b"\x02", b"\x05"):
                touched.add(page)
                file.seek(page * PAGE)
                file.write(rng.randbytes(PAGE))
    return touched


DAMAGES = (
    overwritten,
    pytest.param(cut_short, marks=pytest.mark.long),
    pytest.param(
        beginning_overwritten, marks=pytest.mark.long
    ),  # of a header test_local_file tries every byte
    inner_pages_overwritten,
)


@pytest.fixture
def spooled(make_world: MakeWorld, mongo_proxy: MongoProxy) -> World:
    """A daemon that was stopped with many trades in its spool, all of them in the file itself."""
    world = make_world(mongo_proxy.uri + QUICK)
    mongo_proxy.down()
    world.start()
    for _ in range(4):
        world.send(150)
    world.answered()
    world.stop()
    assert len(world.spool()) == 600
    assert not world.spool_path.with_name("stockrt.db-wal").exists()
    mongo_proxy.up()
    return world


def whole_rows(path: Path, touched: set[int]) -> set[str]:
    """The `_id` of the rows none of whose pages was touched; read before the damage is done."""
    content = path.read_bytes()
    with closing(sqlite3.connect(path)) as db:
        rows = db.execute("SELECT _id, s FROM realtime").fetchall()
    return {name for name, code in rows if not _pages(content, f"{name}{code}".encode()) & touched}


def _pages(content: bytes, row: bytes) -> set[int]:
    """The pages on which a row lies: its `_id` and, behind it, its first column."""
    return {place.start() // PAGE for place in re.finditer(re.escape(row), content)}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_what_can_be_read_of_a_damaged_spool_arrives(damage: Damage, spooled: World) -> None:
    rounds, rng = number(3, 50, quick=1), seeded(damage.__name__)
    world = spooled
    sound = world.spool_path.read_bytes()
    total = Account(0, set(), 0, set(), set())
    for turn in range(rounds):
        _put_back(world, sound)
        copy = world.folder / "sound.db"
        copy.write_bytes(sound)
        touched = damage(world.spool_path, rng)
        due = whole_rows(copy, touched)
        _add(total, _after(world, due), f"{damage.__name__}, round {turn}")
    balanced(f"file_{damage.__name__}", rounds, total, world.daemon.log)


def _put_back(world: World, sound: bytes) -> None:
    """The file as it was, and an empty MongoDB."""
    for path in world.state.glob("stockrt.db*"):
        path.unlink()
    world.spool_path.write_bytes(sound)
    with world.client() as client:
        client[world.database].drop_collection("realtime")


def _after(world: World, due: set[str]) -> Account:
    """Start the daemon, again where it meets damage, let it drain and work; make the account of the rows due."""
    told = len(world.daemon.log)
    errors = world.daemon.log.count(" ERROR ")
    with world.supervised():
        world.connected()
        new = world.result(world.send(5))
        assert new.data["result"]["failed_count"] == 0, new.text
        world.drained()
    world.stop()
    said = world.daemon.log.count(" ERROR ") - errors
    assert said == bool(list(world.state.glob("*.damaged-*"))), world.daemon.log[told:]
    assert said <= 1, world.daemon.log[told:]
    return settle(due | world.counted(new.data), world.feed.records, world.documents(), [])


def _add(total: Account, account: Account, what: str) -> None:
    assert account.balances, f"{what}: {account}"
    total.acknowledged += account.acknowledged


def test_a_log_with_random_bytes_costs_nothing_outside_of_them(
    make_world: MakeWorld, mongo_proxy: MongoProxy
) -> None:
    """Kill -9, and the write-ahead log, where everything still is, is overwritten at a random place."""
    rounds, rng = number(3, 50, quick=1), seeded("log overwritten")
    world = make_world(mongo_proxy.uri + QUICK)
    mongo_proxy.down()
    world.start()
    for _ in range(60):
        world.send(5)
    world.answered()
    world.kill()
    kept = {path.name: path.read_bytes() for path in world.state.glob("stockrt.db*")}
    log = kept["stockrt.db-wal"]
    mongo_proxy.up()
    total = Account(0, set(), 0, set(), set())
    for turn in range(rounds):
        _put_back(world, kept["stockrt.db"])
        at, length = (
            rng.choice((0, 20, rng.randrange(len(log)), rng.randrange(len(log)))),
            rng.randint(1, 2000),
        )
        spoilt = log[:at] + rng.randbytes(min(length, len(log) - at)) + log[at + length :]
        (world.state / "stockrt.db-wal").write_bytes(spoilt)
        frame = PAGE + 24
        touched = set(range((at - 32) // frame, (at + length - 32) // frame + 1))
        whole = {place: spoilt[32 + place * frame : 32 + (place + 1) * frame]
                 for place in range(len(log) // frame) if place not in touched}  # fmt: skip
        due = {name for name in world.feed.records
               if any(f"{name}{name.split('|')[0]}".encode() in page for page in whole.values())}  # fmt: skip
        _add(total, _after(world, due), f"round {turn}, {length} bytes at {at} of {len(log)}")
    balanced("file_log", rounds, total, world.daemon.log)


@pytest.mark.parametrize("mode", ["of another user", "mode 000"])
def test_a_spool_of_somebody_else_is_set_aside(
    mode: str, make_world: MakeWorld, mongo_proxy: MongoProxy
) -> None:
    if os.geteuid() == 0 and not shutil.which("setpriv"):
        unavailable("root may read every file: put setpriv (util-linux) on the PATH")
    world = make_world(mongo_proxy.uri + QUICK, PERMISSIONS_HOLD if os.geteuid() == 0 else ())
    with closing(sqlite3.connect(world.spool_path)) as db:
        db.executescript(SCHEMA_1)
    if mode == "mode 000":
        world.spool_path.chmod(0)
    elif os.geteuid() == 0:
        world.spool_path.chmod(0o600)
        os.chown(world.spool_path, NOBODY, NOBODY)
    else:
        unavailable("only root gives files away")
    world.start()
    result = world.result(world.send(5))
    assert result.data["result"]["success_count"] == 5, result.text
    assert len(list(world.state.glob("stockrt.db.damaged-*"))) == 1
    assert world.daemon.log.count(" ERROR ") == 1, world.daemon.log
    balanced("file_foreign", 1, world.final_account(), world.daemon.log)


def test_a_file_of_the_version_before_drains(make_world: MakeWorld, mongo_proxy: MongoProxy) -> None:
    world = make_world(mongo_proxy.uri + QUICK)
    codes = [f"OLD{place}.US" for place in range(300)]
    trades = [world.feed.new_trade(code) for code in codes]
    ids = world.feed.newest(codes)
    names = sorted(ids, key=lambda name: int(name.split("|")[1]))
    with closing(sqlite3.connect(world.spool_path)) as db, db:
        db.executescript("PRAGMA journal_mode=WAL;" + SCHEMA_1)
        db.executemany(
            "INSERT INTO realtime (_id, s, t, p, v, vw, td, stock_code, create_time, demo) "
            "VALUES (:_id, :s, :t, :p, :v, :vw, :td, :s, '2026-01-01T00:00:00.000Z', NULL)",
            [{"_id": name, **trade} for name, trade in zip(names, trades, strict=True)],
        )
        db.execute("UPDATE realtime SET demo = 1 WHERE seq = 300")
    world.start()
    world.drained()
    world.result(world.send(5))
    account = settle(ids - {names[-1]}, world.feed.records, world.documents(), world.spool())
    balanced("file_old", 1, account, world.daemon.log)
    assert world.count() == 299 + 5, "the synthetic trade stays where it is"


def test_a_file_of_a_newer_version_is_refused_plainly_and_left_alone(
    make_world: MakeWorld, mongo_proxy: MongoProxy
) -> None:
    world = make_world(mongo_proxy.uri + QUICK)
    with closing(sqlite3.connect(world.spool_path)) as db:
        db.executescript(SCHEMA_1 + "PRAGMA user_version = 99;")
    before = world.spool_path.read_bytes()
    world.start(connected=False)
    answer = until(lambda: not world.alive or world.platform.connected)
    assert answer
    if world.alive:
        text = world.result(world.send(5)).text
        assert "newer stockrt" in text
        world.stop()
    assert "newer stockrt" in world.daemon.log
    assert "Traceback" not in world.daemon.log
    with closing(sqlite3.connect(world.spool_path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (99,)
    assert len(world.spool_path.read_bytes()) == len(before)
    assert not list(world.state.glob("*.damaged-*"))


# ------------------------------------------------------------------------------------------------------
# 7. A full disk, and the cap
# ------------------------------------------------------------------------------------------------------


class TinyDisk:
    """A file system of a few MiB at the state directory, and what others put on it."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._others = place / "of others"

    @property
    def free(self) -> int:
        """Bytes that can still be written."""
        found = os.statvfs(self.place)
        return found.f_bavail * found.f_frsize

    def fill(self, leave: int = 0) -> None:
        """Let others take everything but so many bytes."""
        with self._others.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while self.free > leave:
                file.write(bytes(min(PAGE, self.free - leave)))

    def make_room(self) -> None:
        """Let others go."""
        self._others.unlink(missing_ok=True)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[TinyDisk]:
    """A tmpfs where the state directory will be."""
    if os.geteuid() != 0:
        unavailable("only root mounts a tmpfs")
    place = tmp_path / "state"
    place.mkdir(mode=0o700)
    command = ["mount", "-t", "tmpfs", "-o", "size=32m,mode=700", "tmpfs", str(place)]
    if (done := subprocess.run(command, capture_output=True, text=True)).returncode:
        unavailable(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    try:
        yield TinyDisk(place)
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_is_said_and_survived(
    tiny_disk: TinyDisk, make_world: MakeWorld, mongo_proxy: MongoProxy
) -> None:
    rounds = number(2, 20)
    world = make_world(mongo_proxy.uri + QUICK)
    world.start()
    for turn in range(rounds):
        mongo_proxy.down()
        world.result(world.send(20))
        tiny_disk.fill()
        full = [world.send(20) for _ in range(5)]
        assert until(lambda: _said(world, full)), world.daemon.log[-3000:]  # noqa: B023
        assert world.alive, world.daemon.log[-3000:]
        account = world.account()
        assert account.balances, account
        if turn % 2:
            world.kill()
            tiny_disk.make_room()
            world.start()
        tiny_disk.make_room()
        told = [world.result(execution_id) for execution_id in full]
        assert any(result.status == "failure" and result.data["message"] for result in told)
        assert until(lambda: world.result(world.send(20)).data["result"].get("kept_count", 0) == 20)
        mongo_proxy.up()
        world.drained()
    balanced("disk_full", rounds, world.final_account(), world.daemon.log)
    assert "Traceback" not in world.daemon.log


def _said(world: World, executions: list[str]) -> bool:
    """Whether it answered them all, or wrote that an answer has to wait until there is room for it."""
    answered = all(world.platform.results_for(one) for one in executions)
    return answered or "cannot be kept" in world.daemon.log


@pytest.mark.parametrize("end", ["killed", pytest.param("stopped", marks=pytest.mark.long)])
def test_a_start_on_a_full_disk_loses_nothing_and_answers(
    tiny_disk: TinyDisk, make_world: MakeWorld, mongo_proxy: MongoProxy, start_pyz: RunPyz, end: str
) -> None:
    world = make_world(mongo_proxy.uri + QUICK)
    mongo_proxy.down()
    world.start()
    for _ in range(3):
        world.result(world.send(50))
    spooled = len(world.spool())
    world.infoway.latency = lambda request: 60.0
    interrupted = world.send()
    world.infoway.wait_for(lambda api: api.request_count >= 4, PATIENCE)
    world.kill()
    if (
        end == "stopped"
    ):  # as a clean end leaves them: without a log, and without the index that processes share
        for name in ("stockrt.db", "executions.db"):
            with closing(sqlite3.connect(world.state / name)) as db:
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        assert not list(world.state.glob("*-shm"))
    world.infoway.latency = 0.0
    tiny_disk.fill()
    mongo_proxy.up()
    settings = world.daemon.settings
    for command in ("--status", "--drain"):
        done = start_pyz(command, env=settings)
        words = done.stdout + done.stderr
        assert "Traceback" not in words
        if command == "--status":
            assert f"{spooled} trades wait" in words, words
            continue
        assert done.returncode == 0 or "the disk is full" in words, words
    mongo_proxy.down()
    with world.pinged(2.0):
        world.start()
        full = world.result(world.send())
        assert full.status == "failure" and "see STATE_DIRECTORY" in full.data["message"], full.text
        tiny_disk.make_room()
        assert until(lambda: world.result(world.send()).data["result"].get("kept_count") == 5)
    mongo_proxy.up()
    assert world.result(interrupted)
    balanced("disk_full", 1, world.final_account(), world.daemon.log)
    assert "Traceback" not in world.daemon.log
    world.stop()


def test_the_spool_leaves_others_a_twentieth_of_the_disk(
    tiny_disk: TinyDisk, make_world: MakeWorld, mongo_proxy: MongoProxy
) -> None:
    world = make_world(mongo_proxy.uri + QUICK)
    mongo_proxy.down()
    tiny_disk.fill(leave=4 << 20)
    world.start()
    text = _spool_until_refused(world)
    assert "free" in text
    assert "STATE_DIRECTORY" in text
    size = os.statvfs(tiny_disk.place).f_blocks * os.statvfs(tiny_disk.place).f_frsize
    assert tiny_disk.free >= size // 20
    mongo_proxy.up()
    balanced("disk_share", 1, world.final_account(), world.daemon.log)


def test_the_spool_stops_at_its_cap_and_goes_on_when_it_is_drained(
    make_world: MakeWorld, mongo_proxy: MongoProxy
) -> None:
    rounds = number(1, 10)
    world = make_world(mongo_proxy.uri + QUICK, SPOOL_MAX_MB="1")
    world.start()
    for _ in range(rounds):
        mongo_proxy.down()
        assert "SPOOL_MAX_MB" in _spool_until_refused(world)
        assert sum(path.stat().st_size for path in world.state.glob("stockrt.db*")) <= 1 << 20
        mongo_proxy.up()
        world.drained()
        assert until(lambda: world.result(world.send(20)).status == "success")
    balanced("cap", rounds, world.final_account(), world.daemon.log)


def _spool_until_refused(world: World) -> str:
    """Work until there is no room; everything refused is refused by name."""
    for _ in range(500):
        told = world.result(world.send(100))
        result = told.data["result"]
        if result["failed_count"]:
            assert told.status == "failure"
            assert len(result["failed_stocks"]) == result["failed_count"]
            assert all(why.startswith("fetched, not stored") for why in result["failures"].values()), (
                told.text
            )
            return str(next(iter(result["failures"].values())))
    raise AssertionError(f"never refused\n{world.daemon.log[-3000:]}")
