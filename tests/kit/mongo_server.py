"""A real server that speaks the MongoDB protocol, for the tests.

Taken from, in this order:

1. ``MONGODB_TEST_URI``: a server that someone else runs; it can be neither killed nor paused;
2. ``mongod`` on the PATH;
3. ``ferretdb`` (version 1, with its SQLite backend) on the PATH;
4. FerretDB, built once with ``go`` into ``.build/``.

FerretDB 1 closes the connection on a Decimal128, so `find_decimal_server` has one more: mongo-java-server,
fetched once with ``mvn`` into ``.build/``; it keeps its documents in memory only.

A server listens on 127.0.0.1, keeps everything in a temporary folder, and ends with the tests.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pymongo
from pymongo.errors import PyMongoError

BUILD_FOLDER = Path(__file__).resolve().parents[2] / ".build"
FERRETDB_VERSION = "1.24.2"
JAVA_SERVER_VERSION = "1.47.0"

START_SECONDS = 60.0  # a JVM on a busy two-core machine needs several
POLL_SECONDS = 0.02  # between two looks whether a starting server listens
STOP_SECONDS = 10.0  # from SIGTERM to SIGKILL
START_TRIES = 5  # a port that was free may be taken when the server comes to bind it
PORTS = (20_000, 32_000)  # below the ephemeral range: no client's socket takes it while the server is down
BUILD_SECONDS = 900.0
TAIL_LINES = 30

FERRETDB_MAIN = """\
// Command ferretdb serves a SQLite folder over the MongoDB protocol; it ends when its input does.
package main

import (
	"context"
	"io"
	"log"
	"log/slog"
	"os"

	"github.com/FerretDB/FerretDB/ferretdb"
)

func main() {
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	server, err := ferretdb.New(&ferretdb.Config{
		Listener:  ferretdb.ListenerConfig{TCP: os.Args[1]},
		Logger:    slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
		Handler:   "sqlite",
		SQLiteURL: os.Args[2],
	})
	if err != nil {
		log.Fatal(err)
	}
	if err := server.Run(context.Background()); err != nil {
		log.Fatal(err)
	}
}
"""

JAVA_MAIN = """\
import de.bwaldvogel.mongo.MongoServer;
import de.bwaldvogel.mongo.MongoVersion;
import de.bwaldvogel.mongo.backend.memory.MemoryBackend;
import java.util.List;

/** Serves documents from memory over the MongoDB protocol; ends when its input does. */
public class MongoMain {
  /** A version that current drivers still talk to. */
  record Version() implements MongoVersion {
    public List<Integer> getVersionArray() { return List.of(5, 0, 0); }
    public int getWireVersion() { return 13; }
    public String toVersionString() { return "5.0.0"; }
  }

  public static void main(String[] arguments) throws Exception {
    new MongoServer(new MemoryBackend().version(new Version())).bind("127.0.0.1", Integer.parseInt(arguments[0]));
    while (System.in.read() >= 0) { }
    System.exit(0);
  }
}
"""

JAVA_POM = f"""\
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>stockrt.test</groupId><artifactId>mongo</artifactId><version>1</version>
  <dependencies><dependency>
    <groupId>de.bwaldvogel</groupId><artifactId>mongo-java-server</artifactId>
    <version>{JAVA_SERVER_VERSION}</version>
  </dependency></dependencies>
</project>
"""

Command = Callable[[int, Path], Sequence[str]]
Client = pymongo.MongoClient[dict[str, Any]]


class Unavailable(Exception):
    """None of the servers is to be had on this machine; the text says what would give one."""


class BuildFailed(Exception):
    """The tools to build the server are here but the build did not succeed; the text is its output's tail."""


class StartFailed(Exception):
    """The server did not answer a ping in time; the text is its output's tail."""


@dataclass(frozen=True)
class Kind:
    """One sort of server: how it is started, and what it can do."""

    name: str
    command: Command | None  # None: someone else runs it
    uri: str = ""  # of the server that someone else runs
    supports_decimals: bool = True
    durable: bool = True  # the documents outlive a kill


class MongoServer:
    """A server of one kind; `start` returns when it answers, `kill` and `pause` are for the tests of faults."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.name = kind.name
        self.controllable = kind.command is not None
        self.supports_decimals = kind.supports_decimals
        self.durable = kind.durable
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._paused = False
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> MongoServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def uri(self) -> str:
        """The connection string, without a database."""
        return f"mongodb://127.0.0.1:{self.port}/" if self.controllable else self.kind.uri

    @property
    def running(self) -> bool:
        """Whether the process lives (a paused one does)."""
        return not self.controllable or (self._process is not None and self._process.poll() is None)

    def client(self, **options: Any) -> Client:
        """Return a new client, which the caller closes."""
        return pymongo.MongoClient(self.uri, **{"serverSelectionTimeoutMS": 5_000, **options})

    def start(self) -> None:
        """Start it, on the port and data it had before if it had any, and wait for its answer to a ping."""
        if not self.controllable:
            self._ping()
            return
        if self.running:
            return
        if self.port:
            self._launch(self.port)
            return
        for attempt in range(1, START_TRIES + 1):
            port = _free_port()
            try:
                self._launch(port)
            except StartFailed:
                if attempt == START_TRIES:
                    raise
            else:
                self.port = port
                return

    def stop(self) -> None:
        """End it in good order; the data stay until `close`."""
        if self.controllable and self._process is not None:
            self.resume()
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
            self._reap()

    def kill(self) -> None:
        """SIGKILL: it's gone at once, as in a power cut of the process."""
        self._controlled().kill()
        self._reap()

    def pause(self) -> None:
        """SIGSTOP: connections stay open and are accepted, nothing is answered."""
        self._controlled().send_signal(signal.SIGSTOP)
        self._paused = True

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
        """Stop it and delete its data."""
        self.stop()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _controlled(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError(f"{self.name} is not run by the tests or not running: it cannot be signalled")
        return self._process

    def _reap(self) -> None:
        assert self._process is not None
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process = None
        self._paused = False

    def _launch(self, port: int) -> None:
        assert self.kind.command is not None
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="stockrt-mongo-")
        home = Path(self._folder.name)
        data = home / "data"
        data.mkdir(exist_ok=True)
        environment = os.environ | {"HOME": str(home), "DO_NOT_TRACK": "1", "FERRETDB_TELEMETRY": "disable"}
        with (home / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self.kind.command(port, data),
                stdin=subprocess.PIPE,  # closes when the tests end, however they end
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=home,
                env=environment,
                start_new_session=True,  # Ctrl-C in the tests' terminal is not for the server
            )
        try:
            self._await_listening(port)
            self._ping(port)
        except (OSError, PyMongoError, StartFailed) as error:
            if self._process is not None:
                self._process.kill()
                self._reap()
            tail = _tail((home / "log").read_text(errors="replace"))
            raise StartFailed(f"{self.name} on port {port}: {error}\n{tail}") from error

    def _await_listening(self, port: int) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                raise StartFailed(f"it ended with status {self._process.wait(POLL_SECONDS)}")
        raise StartFailed(f"it does not listen after {START_SECONDS:.0f} s")

    def _ping(self, port: int | None = None) -> None:
        uri = self.uri if port is None else f"mongodb://127.0.0.1:{port}/"
        with pymongo.MongoClient[dict[str, Any]](uri, serverSelectionTimeoutMS=15_000) as client:
            client.admin.command("ping")


@contextlib.contextmanager
def fresh_database(server: MongoServer) -> Iterator[tuple[str, str]]:
    """Yield the URI and the name of a database that does not exist yet; drop it afterwards."""
    server.ensure_running()
    name = f"stockrt_test_{uuid.uuid4().hex[:16]}"
    try:
        yield server.uri, name
    finally:
        server.ensure_running()
        with server.client() as client:
            client.drop_database(name)


def find_server() -> MongoServer:
    """Return the first server of the list above, not started; raise `Unavailable` or `BuildFailed`."""
    if uri := os.environ.get("MONGODB_TEST_URI"):
        return MongoServer(Kind("MONGODB_TEST_URI", None, uri))
    if mongod := shutil.which("mongod"):
        return MongoServer(Kind("mongod", _mongod_command(mongod)))
    if (ferretdb := shutil.which("ferretdb")) and _has_sqlite(ferretdb):
        return MongoServer(Kind("ferretdb", _ferretdb_command(ferretdb), supports_decimals=False))
    if shutil.which("go") or _ferretdb_binary().exists():
        built = str(build_ferretdb())
        command: Command = lambda port, data: (built, f"127.0.0.1:{port}", f"file:{data}/")  # noqa: E731
        return MongoServer(Kind(f"FerretDB {FERRETDB_VERSION}", command, supports_decimals=False))
    raise Unavailable(
        "no MongoDB server: set MONGODB_TEST_URI, or put mongod, ferretdb 1 or go (to build FerretDB) on the PATH"
    )


def find_decimal_server(server: MongoServer | None) -> MongoServer:
    """Return `server` if it stores Decimal128, else mongo-java-server, not started."""
    if server is not None and server.supports_decimals:
        return server
    if not (shutil.which("javac") and (shutil.which("mvn") or _java_libraries().exists())):
        raise Unavailable(
            "no server that stores Decimal128: set MONGODB_TEST_URI, or put mongod, or a JDK 17 and mvn, on the PATH"
        )
    classes = build_java_server()

    def command(port: int, _: Path) -> Sequence[str]:
        return (
            "java",
            "-Xmx256m",
            "-XX:TieredStopAtLevel=1",
            "-cp",
            f"{classes}:{classes}/*",
            "MongoMain",
            str(port),
        )

    return MongoServer(Kind(f"mongo-java-server {JAVA_SERVER_VERSION}", command, durable=False))


def build_ferretdb() -> Path:
    """Return the binary, built now if it was not yet; several processes may call this at once."""
    binary = _ferretdb_binary()
    with _locked(binary.parent):
        if binary.exists():
            return binary
        with tempfile.TemporaryDirectory(prefix="stockrt-ferretdb-") as folder:
            Path(folder, "main.go").write_text(FERRETDB_MAIN)
            # Not "go install …@version": a main package of the module's own wants a version file that the
            # module does not carry and panics at start; nor does every proxy serve the list of versions.
            _run(folder, "go", "mod", "init", "stockrt.test/ferretdb")
            _run(folder, "go", "mod", "edit", "-require", f"github.com/FerretDB/FerretDB@v{FERRETDB_VERSION}")
            _run(folder, "go", "mod", "tidy")
            _run(folder, "go", "build", "-trimpath", "-tags", "ferretdb_no_postgresql", "-o", "ferretdb", ".")
            temporary = binary.with_suffix(".new")
            shutil.copy2(Path(folder, "ferretdb"), temporary)
            temporary.replace(binary)
    return binary


def build_java_server() -> Path:
    """Return the folder of jars and classes, fetched and compiled now if it was not yet."""
    libraries = _java_libraries()
    with _locked(libraries.parent):
        if libraries.exists():
            return libraries
        with tempfile.TemporaryDirectory(prefix="new-", dir=libraries.parent) as folder:
            Path(folder, "pom.xml").write_text(JAVA_POM)
            Path(folder, "MongoMain.java").write_text(JAVA_MAIN)
            _run(folder, "mvn", "-B", "-q", "dependency:copy-dependencies", "-DoutputDirectory=lib")
            _run(folder, "javac", "-cp", "lib/*", "-d", "lib", "MongoMain.java")
            Path(folder, "lib").replace(libraries)
    return libraries


def _mongod_command(mongod: str) -> Command:
    def command(port: int, data: Path) -> Sequence[str]:
        address = ("--bind_ip", "127.0.0.1", "--port", str(port), "--unixSocketPrefix", str(data.parent))
        return (
            mongod,
            *address,
            "--dbpath",
            str(data),
            "--setParameter",
            "diagnosticDataCollectionEnabled=false",
        )

    return command


def _ferretdb_command(ferretdb: str) -> Command:
    def command(port: int, data: Path) -> Sequence[str]:
        quiet = ("--telemetry=disable", "--debug-addr=-", "--log-level=warn")
        place = (
            f"--listen-addr=127.0.0.1:{port}",
            f"--state-dir={data.parent}",
            f"--sqlite-url=file:{data}/",
        )
        return (ferretdb, "--handler=sqlite", *place, *quiet)

    return command


def _has_sqlite(ferretdb: str) -> bool:
    """Whether it is a FerretDB 1: version 2 needs a PostgreSQL of its own."""
    try:
        answer = subprocess.run([ferretdb, "--help"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return "--sqlite-url" in answer.stdout


def _ferretdb_binary() -> Path:
    return BUILD_FOLDER / f"ferretdb-v{FERRETDB_VERSION}" / "ferretdb"


def _java_libraries() -> Path:
    return BUILD_FOLDER / f"mongo-java-server-{JAVA_SERVER_VERSION}" / "lib"


def _free_port() -> int:
    for port in random.SystemRandom().sample(range(*PORTS), 200):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise StartFailed(f"no free port from {PORTS[0]} to {PORTS[1]}")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes; a holder's death lets it go."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(folder: str, *command: str) -> None:
    """Run one step of a build."""
    environment = os.environ | {"CGO_ENABLED": "0"}
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=BUILD_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildFailed(f"{' '.join(command)}: {error}") from error
    if done.returncode:
        raise BuildFailed(f"{' '.join(command)}: exit status {done.returncode}\n{_tail(done.stdout)}")


def _tail(text: str) -> str:
    return "\n".join(text.splitlines()[-TAIL_LINES:])
