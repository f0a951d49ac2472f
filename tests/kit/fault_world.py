"""What the fault suite is made of: one daemon between its platform, its API and its MongoDB, and the account.

Every execution asks for codes of its own, and every poll of a code is a new trade. So it is known which trades
the API gave out, and of each result which of them it counts: the last one of each of its codes. The account is
then "what was acknowledged is in MongoDB, in the spool or among the rejects, none twice".
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import socket
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pymongo
from faults.fault_table import FAULTS

import stockrt
from kit.daemons import HASH, PATIENCE, Lag, ProcessDaemon, environment, number, until
from kit.forked import Forked
from kit.infoway_server import Answer, InfowayServer, Request
from kit.mongo import ReplicaSet
from kit.platform_server import PlatformServer, Result

# Where the rows of the table go, one JSON object a line; `tests/faults/run` sets it.
RECORD = os.environ.get("STOCKRT_FAULTS_RECORD", "")
# Trades of a session that is not over: no close follows from them, and MongoDB gets trades alone. A day ahead a
# record is none.
AHEAD_MS = 23 * 3600 * 1000
# Enough of them to fail fast where MongoDB is away; the default is 20 s.
QUICK = "?timeoutMS=1500"
MAX_CODES = 1000
# What stands beside a local file that is damaged: the mark, the file on its way aside, and the new one.
RESCUE_FILES = (".damaged", ".setting-aside", ".rescue")
# A load stops at so many commands without an answer: the daemon refuses those above a thousand.
BACKLOG = 200

Document = dict[str, Any]
Rows = list[Document]


def identity(record: Mapping[str, Any]) -> str:
    """The `_id` that a trade must have."""
    return "|".join(str(record[name]) for name in ("s", "t", "p", "v", "td"))


def codes_of(execution: int, size: int) -> list[str]:
    """The codes that only this execution asks for."""
    assert size <= MAX_CODES
    return [f"E{execution:05d}X{place:03d}.US" for place in range(size)]


class Feed:
    """The script of an Infoway server whose every answer holds new trades; it remembers what it gave out."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next_t = int(time.time() * 1000) + AHEAD_MS
        self.records: dict[str, Document] = {}  # by _id
        self._newest: dict[str, str] = {}  # the _id of the last trade of each code
        self.trouble: Callable[[], Answer | None] = lambda: None  # asked for an answer in place of trades

    def __call__(self, request: Request) -> Answer | None:
        """Answer one request for trades; anything else is left to the server."""
        if not request.product:
            return None
        with self._lock:
            return self.trouble() or Answer.data([self.new_trade(code) for code in request.codes])

    def new_trade(self, code: str) -> Document:
        """Make a trade that never was before."""
        t = self._next_t = self._next_t + 1
        record = {
            "s": code,
            "t": t,
            "p": f"{t % 99_991 + 1}.25",
            "v": str(t % 977 + 1),
            "vw": "1.5",
            "td": t % 3,
        }
        name = identity(record)
        self.records[name] = record
        self._newest[code] = name
        return record

    def newest(self, codes: Iterable[str]) -> set[str]:
        """The last trade given out for each of these codes."""
        with self._lock:
            return {self._newest[code] for code in codes}


@dataclass
class Account:
    """What became of the trades; `lost`, `strangers` (the API never gave them out) and `changed` are `_id`s."""

    acknowledged: int
    lost: set[str]
    doubled: int
    strangers: set[str]
    changed: set[str]

    @property
    def balances(self) -> bool:
        """Whether nothing is lost, twice there, made up or changed."""
        return not (self.lost or self.doubled or self.strangers or self.changed)

    def __str__(self) -> str:
        sets = {"lost": self.lost, "strangers": self.strangers, "changed": self.changed}
        told = [f"{len(ids)} {name} {sorted(ids)[:3]}" for name, ids in sets.items() if ids]
        return f"{self.acknowledged} acknowledged, {self.doubled} doubled, {', '.join(told) or 'none lost'}"


def settle(acknowledged: set[str], issued: Mapping[str, Document], stored: Rows, kept: Rows) -> Account:
    """Make the account of MongoDB's documents and of what the spool and the rejects keep."""
    names = {str(row["_id"]) for row in stored}
    kept_names = {str(row["_id"]) for row in kept}
    contents = {tuple(row[name] for name in ("s", "t", "p", "v", "td")) for row in stored}
    changed = {
        str(row["_id"])
        for row in [*stored, *kept]
        if (record := issued.get(str(row["_id"]))) is not None and not _is_as_sent(row, record)
    }
    return Account(
        len(acknowledged),
        acknowledged - names - kept_names,
        len(stored) - len(contents),
        (names | kept_names) - issued.keys(),
        changed,
    )


def _is_as_sent(row: Document, record: Document) -> bool:
    return all(row[name] == value for name, value in record.items()) and row["stock_code"] == record["s"]


def record_row(fault: str, rounds: int, account: Account, **facts: object) -> None:
    """Add a row to the table of this run; `fault` and `facts` as in fault_table.FAULTS."""
    assert fault in FAULTS
    if not RECORD:
        return
    row = {"fault": fault, "facts": facts, "rounds": rounds, "acknowledged": account.acknowledged,
           "lost": len(account.lost), "doubled": account.doubled}  # fmt: skip
    with Path(RECORD).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def balanced(fault: str, rounds: int, account: Account, log: str = "", **facts: object) -> None:
    """Record a fault's account, and fail unless it balances and is about something."""
    record_row(fault, rounds, account, **facts)
    assert account.acknowledged > 0, log[-3000:]
    assert account.balances, f"{account}\n{log[-3000:]}"


# ------------------------------------------------------------------------------------------------------
# The local file
# ------------------------------------------------------------------------------------------------------


def rows_of(path: Path, table: str, where: str = "TRUE") -> Rows:
    """The rows of a table of a SQLite file, none where there is no such table."""
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=PATIENCE)) as db:
        db.row_factory = sqlite3.Row
        if not db.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (table,)).fetchone():
            return []
        return [dict(row) for row in db.execute(f"SELECT * FROM {table} WHERE {where}")]


def spool_of(path: Path) -> Rows:
    """The trades that wait in a file for MongoDB, in the order of their arrival."""
    return sorted(rows_of(path, "realtime", "demo IS NULL"), key=lambda row: int(row["seq"]))


def rejects_of(path: Path) -> Rows:
    """The trades that MongoDB refused for good."""
    return [json.loads(row["document"]) | {"_id": row["_id"], "reason": row["reason"]}
            for row in rows_of(path, "rejects")]  # fmt: skip


@contextlib.contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """Hold a file's lock for writing, as a person does who looks into it and leaves a transaction open."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=PATIENCE)) as db:
        db.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            db.execute("ROLLBACK")


@contextlib.contextmanager
def copied(path: Path) -> Iterator[Path]:
    """A copy of a SQLite file that no process uses: to look at it would change the file itself."""
    with tempfile.TemporaryDirectory(prefix="stockrt-look-") as folder:
        for name in (path.name, f"{path.name}-wal"):
            if (path.parent / name).exists():
                shutil.copy2(path.parent / name, folder)
        yield Path(folder) / path.name


# ------------------------------------------------------------------------------------------------------
# The world
# ------------------------------------------------------------------------------------------------------


class World:
    """One daemon and all that it talks to, from `with` to its end; the daemon is started by `start`.

    `uri` is where the daemon finds MongoDB, `real_uri` where the test does, past any proxy. `per_second` is the
    API's limit; {api} in a setting stands for its port.
    """

    def __init__(
        self,
        pyz: Path,
        base: Mapping[str, str],
        folder: Path,
        mongo: tuple[str, str],
        uri: str = "",
        wrapper: Sequence[str] = (),
        per_second: int | None = None,
        forked: Forked | None = None,
        /,
        **settings: str,
    ) -> None:
        self.real_uri, self.database = mongo
        self.folder = folder
        self.state = folder / "state"
        self.feed = Feed()
        self.infoway = InfowayServer(script=self.feed, record=False, per_second=per_second)
        self.platform = PlatformServer(ping_every=0, zombies=False, retry_executes=True)
        self.sizes: dict[str, int] = {}  # of each execution sent
        self._sending = threading.Lock()
        self._standstills: list[tuple[float, float]] = []
        self.slowest_ping = 0.0  # seconds, of those that `pinged` sent
        self._pyz, self._base, self._wrapper, self._forked = pyz, base, wrapper, forked
        self._settings = {"MONGODB_HOST": uri or self.real_uri, "MONGODB_DB_NAME": self.database, **settings}
        self.daemon: ProcessDaemon

    def __enter__(self) -> Self:
        self.infoway.start()
        self.platform.start()
        self.platform.know(HASH)
        stockrt.write_hash(self.state, HASH)
        settings = {
            name: text.replace("{api}", str(self.infoway.port)) for name, text in self._settings.items()
        }
        settings = environment(self.platform.port, self.infoway.url, self.state, **settings)
        self.daemon = ProcessDaemon(self._base, settings, self._pyz, self._wrapper, self._forked)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.daemon.kill()
        self.platform.stop()
        self.infoway.stop()

    # --- the daemon ---------------------------------------------------------------------------------------

    @property
    def spool_path(self) -> Path:
        """The local file."""
        return self.state / "stockrt.db"

    @property
    def alive(self) -> bool:
        """Whether the daemon runs."""
        return self.daemon.process is not None and self.daemon.process.poll() is None

    def start(self, connected: bool = True) -> None:
        """Start the daemon and, unless told otherwise, wait for its connection."""
        self.daemon.start()
        if connected:
            self.connected()

    def connected(self) -> None:
        """Wait for the daemon's connection."""
        assert self.platform.wait_for(lambda platform: platform.connected, PATIENCE), self.daemon.log[-3000:]

    def kill(self) -> None:
        """kill -9, and wait until the platform has noticed."""
        self.daemon.kill()
        assert self.platform.wait_for(lambda platform: not platform.connected, PATIENCE)

    def stop(self) -> None:
        """SIGTERM, and wait for the end in good order."""
        if self.daemon.process is not None:
            self.daemon.process.terminate()
            assert self.daemon.wait(PATIENCE) == 0, self.daemon.log[-3000:]

    @contextlib.contextmanager
    def supervised(self) -> Iterator[None]:
        """Start the daemon, and again whenever it ends by itself with status 1, as systemd does."""
        done = threading.Event()

        def supervise() -> None:
            while not done.wait(0.05):
                if self.daemon.process is not None and self.daemon.process.poll() == 1:
                    self.daemon.start()

        self.start(connected=False)
        supervisor = threading.Thread(target=supervise, daemon=True)
        supervisor.start()
        try:
            yield
        finally:
            done.set()
            supervisor.join()

    # --- work ---------------------------------------------------------------------------------------------

    def send(self, size: int = 5) -> str:
        """Send a command for so many codes and return its execution_id."""
        with self._sending:
            number = len(self.sizes)
            execution_id = f"e{number}"
            self.sizes[execution_id] = size
        return self.platform.execute(codes_of(number, size), execution_id=execution_id)

    @contextlib.contextmanager
    def load(self, every: float, size: int = 5) -> Iterator[None]:
        """Send a command every so many seconds while a module is connected, and has not fallen far behind."""
        stop = threading.Event()

        def work() -> None:
            while not stop.wait(every):
                if self.platform.connected and len(self.platform.unanswered) < BACKLOG:
                    self.send(size)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            yield
        finally:
            stop.set()
            worker.join()

    @contextlib.contextmanager
    def platform_frozen(self) -> Iterator[None]:
        """Let the platform stand still meanwhile; what that does to a ping is not the daemon's fault."""
        begin = time.monotonic()
        self.platform.freeze()
        try:
            yield
        finally:
            self.platform.thaw()
            self._standstills.append((begin, time.monotonic()))

    @contextlib.contextmanager
    def pinged(self, soon_s: float, every_s: float = 0.2) -> Iterator[None]:
        """Ping the daemon without pause, and fail unless each ping was answered soon, or its connection was cut.

        What a busy machine takes from everybody is not held against the daemon.
        """
        stop = threading.Event()

        def work() -> None:
            while not stop.wait(every_s):
                self.platform.ping_now()

        pinger = threading.Thread(target=work, daemon=True)
        pinger.start()
        with Lag() as lag:
            try:
                yield
            finally:
                stop.set()
                pinger.join()
        soon_s += lag.seconds
        self.platform.ping_now()
        self.platform.wait_for(
            lambda p: p.pings and all(ping.answered or ping.ended for ping in p.pings), PATIENCE
        )
        now = time.monotonic()
        delays = {
            round(ping.sent - now, 1): round(ping.delay(now), 3)
            for ping in self.platform.pings
            if not self._stood_still(ping.sent, ping.sent + ping.delay(now))
        }
        self.slowest_ping = max(delays.values(), default=0.0)
        late = {sent: delay for sent, delay in delays.items() if delay > soon_s}
        assert not late, f"seconds ago, and to the pong: {late}\n{self.daemon.log[-3000:]}"

    def _stood_still(self, begin: float, end: float) -> bool:
        return any(begin < stop and start < end for start, stop in self._standstills)

    def answered(self, timeout: float = PATIENCE) -> None:
        """Wait until every command has its result."""
        done = self.platform.wait_for(lambda platform: not platform.unanswered, timeout)
        assert done, f"{len(self.platform.unanswered)} unanswered\n{self.daemon.log[-3000:]}"

    def result(self, execution_id: str, timeout: float = PATIENCE) -> Result:
        """Wait for the result of a command."""
        assert self.platform.wait_for(lambda platform: platform.results_for(execution_id), timeout), (
            self.daemon.log[-3000:]
        )
        return self.platform.results_for(execution_id)[0]

    # --- what is where ------------------------------------------------------------------------------------

    def client(self) -> pymongo.MongoClient[Document]:
        """A new client of MongoDB itself, past any proxy; the caller closes it."""
        return pymongo.MongoClient(self.real_uri, serverSelectionTimeoutMS=30_000)

    def documents(self) -> Rows:
        """What MongoDB holds."""
        with self.client() as client:
            return list(client[self.database]["realtime"].find())

    def count(self) -> int:
        """How many documents MongoDB holds."""
        with self.client() as client:
            return client[self.database]["realtime"].count_documents({})

    def spool(self) -> Rows:
        """What the local file keeps for MongoDB."""
        return self._local(spool_of)

    def rejects(self) -> Rows:
        """What MongoDB refused for good."""
        return self._local(rejects_of)

    def _local(self, read: Callable[[Path], Rows]) -> Rows:
        if not self.spool_path.exists():
            return []
        if self.alive:
            return read(self.spool_path)
        with copied(self.spool_path) as path:
            return read(path)

    def in_rescue(self) -> bool:
        """Whether the local file waits to be rescued, or is being so: then what it keeps stands elsewhere."""
        beside = (self.spool_path.with_name(f"stockrt.db{end}") for end in RESCUE_FILES)
        return any(path.exists() for path in beside)

    def drained(self, timeout: float = 2 * PATIENCE) -> None:
        """Wait until nothing waits for MongoDB any more, in a file that can be read."""

        def is_drained() -> bool:
            try:
                return self.spool_path.exists() and not self.in_rescue() and not self.spool()
            except sqlite3.Error:
                return False

        assert until(is_drained, timeout), f"{len(self.spool())} left\n{self.daemon.log[-3000:]}"

    def counted(self, result: Document) -> set[str]:
        """The trades that a result (as sent) tells the platform are safe; fails where it does not add up."""
        told, execution_id = result["result"], result["meta"]["execution_id"]
        if told["total"] == 0:  # not executed
            return set()
        codes = codes_of(int(execution_id[1:]), self.sizes[execution_id])
        good = set(codes) - set(told["failed_stocks"])
        assert told["success_count"] + told.get("kept_count", 0) == len(good), result
        return self.feed.newest(good)

    def acknowledged(self) -> set[str]:
        """The trades that the platform was told are safe."""
        return set().union(*(self.counted(result.data) for result in self.platform.results))

    def account(self) -> Account:
        """Make the account as it is now. What was acknowledged is read first, then where it may be."""
        acknowledged = self.acknowledged()
        kept = [*self.spool(), *self.rejects()]
        return settle(acknowledged, self.feed.records, self.documents(), kept)

    def final_account(self, rejects: bool = False) -> Account:
        """Wait until every command is answered and the spool is empty, and make the account.

        Fails where MongoDB is said to have refused something, unless `rejects` says that it had to.
        """
        self.answered(4 * PATIENCE)
        self.drained()
        # what the daemon writes to see whether MongoDB takes anything is there for a moment
        assert until(lambda: all(row["_id"] != stockrt.PROBE for row in self.documents()))
        assert rejects or not self.rejects(), self.rejects()[:3]
        texts: dict[str, set[str]] = {}
        for result in self.platform.results:
            texts.setdefault(result.execution_id, set()).add(result.text)
        assert {name for name, found in texts.items() if len(found) > 1} == set(), "answered in two ways"
        return self.account()


# ------------------------------------------------------------------------------------------------------
# Looking at a process
# ------------------------------------------------------------------------------------------------------


def elect_under_load(world: World, members: ReplicaSet, rounds: int) -> None:
    """Let one primary after the other step down while the daemon works without pause."""
    with world.load(number(0.02, 0.02, quick=0.05), 10):
        for _ in range(rounds):
            answers = len(world.platform.results)
            assert world.platform.wait_for(lambda p, n=answers: len(p.results) > n + 10, PATIENCE)  # type: ignore[misc]
            members.step_down()


def proc_status(pid: int, name: str) -> int:
    """A number of /proc/PID/status: VmRSS and VmHWM in KiB, Threads."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise KeyError(name)


def descriptors(pid: int) -> int:
    """How many files and sockets a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


class ServiceManager:
    """The service manager's end of the notify socket, from `with` on; it takes the time of each sign of life."""

    def __init__(self, folder: Path) -> None:
        self.address = str(folder / "notify")
        self.beats: list[float] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.address)

    def __enter__(self) -> Self:
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def settings(self, watchdog_s: float) -> dict[str, str]:
        """The environment of a service with such a watchdog."""
        return {"NOTIFY_SOCKET": self.address, "WATCHDOG_USEC": str(int(watchdog_s * 1e6))}

    def longest_silence(self) -> float:
        """The longest time between two signs of life, and from the last one to now, in seconds."""
        times = [*self.beats, time.monotonic()]
        return max(later - earlier for earlier, later in itertools.pairwise(times))

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._socket.recv(4096):
                if b"WATCHDOG=1" in data:
                    self.beats.append(time.monotonic())


def seeded(name: str) -> random.Random:
    """Random numbers that are others each time; a failing test prints the seed that STOCKRT_SEED sets again."""
    seed = os.environ.get("STOCKRT_SEED") or str(random.SystemRandom().randrange(1_000_000))
    print(f"{name}: STOCKRT_SEED={seed}")
    return random.Random(f"{name} {seed}")
