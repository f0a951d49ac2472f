"""What the tests share: the program as one file, a MongoDB server, an Infoway server, an empty environment."""

from __future__ import annotations

import contextlib
import gc
import linecache
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, Protocol

import hypothesis
import pytest
from kit.daemons import EXTENT, READ_AT_A_START, number
from kit.fault_world import ServiceManager, World
from kit.forked import Forked
from kit.infoway_server import InfowayServer
from kit.mongo import (
    GuardedServer,
    MongoServer,
    ReplicaSet,
    Unavailable,
    find_mongod,
    find_server,
    fresh_database,
)
from kit.mongo_proxy import MongoProxy
from kit.shims import NoCompiler, WallClock, build_shim
from kit.words_list import note_everything
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]
from xdist.workermanage import WorkerController  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parent.parent
NOBODY = 65534

# Where this process keeps what it compiles is not for those that it starts: their files come and go.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.pop("PYTHONPYCACHEPREFIX", None)

note_everything()

# A client of pymongo keeps the text of the stack that it is made on, and stockrt then forgets the files read for that.
# Of hundreds of clients each would read them again; the test of the forgetting has this back.
forget_files = linecache.clearcache
linecache.clearcache = lambda: None

# What is collected stays: to look through it for garbage again and again finds none, and takes a third of the time.
gc.disable()


def pytest_collection_finish() -> None:
    """Leave what was collected out of every later search for garbage."""
    gc.enable()
    gc.freeze()


# A busy machine is slow, not wrong.
hypothesis.settings.register_profile("stockrt", deadline=None, max_examples=number(100, 1000, quick=20))
hypothesis.settings.load_profile("stockrt")


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Go on as a user that file permissions hold for: root may read and write everything."""
    if os.geteuid() != 0:
        yield
        return
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


class RunPyz(Protocol):
    """The type of the fixture `run_pyz`."""

    def __call__(
        self,
        *args: str | Path,
        env: Mapping[str, str] | None = None,
        input: str | None = None,  # noqa: A002 - named as in subprocess.run
        timeout: float = 60,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run the program with these arguments; `env` is added to an otherwise empty environment."""


def unavailable(reason: str) -> NoReturn:
    """Skip for want of something on this machine; where nothing may be skipped, fail."""
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(f"{reason} (CI: no skip)", pytrace=False)
    pytest.skip(reason)


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Yield a disk of this size."""
    disk = folder / "disk"
    disk.mkdir()
    if os.geteuid() != 0:
        unavailable("only root may mount a small disk")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if done.returncode:
        unavailable(f"a small disk cannot be mounted: {done.stderr}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def controlled(server: MongoServer) -> MongoServer:
    """Return a server that the tests may kill, pause and let fail; skip where it is someone else's."""
    if not server.controllable:
        unavailable("the server of MONGODB_TEST_URI is someone else's: it is neither killed nor let fail")
    return server


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked `long`, unless STOCKRT_TESTS asks for it."""
    if EXTENT != "quick":
        return
    left_out = [item for item in items if item.get_closest_marker("long")]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


class OneByOne(LoadScopeScheduling):  # type: ignore[misc]
    """Each test is for whichever worker is free, but the files that share something dear are for one of them.

    Of a test of a room all cases are for one: most take less time than it takes to hand them out.
    """

    # The bench in short, a booted box, a server with users, and twice a large file that is parsed.
    whole = (
        "bench/test_bench.py",
        "program/test_systemd.py",
        "rooms/test_catalogue.py",
        "rooms/test_mongo_real.py",
        "rooms/test_structure.py",
    )
    # These share three members, and a server with users. Only names are known here; one that is missed costs others of
    # those, and nothing else.
    elections = re.compile("elect|primar")
    roles = re.compile("_role_")

    def mark_test_complete(self, node: WorkerController, item_index: int, duration: float = 0) -> None:
        """Forget a unit that is done: all that a worker has are counted after each test."""
        super().mark_test_complete(node, item_index, duration)
        units = self.assigned_work[node]
        scope = self._split_scope(self.registered_collections[node][item_index])
        if all(units[scope].values()):
            del units[scope]

    def _split_scope(self, nodeid: str) -> str:
        file, _, name = nodeid.partition("::")
        if self.elections.search(name.partition("[")[0]):
            return "elections"
        if self.roles.search(name.partition("[")[0]):
            file = file.rpartition("/")[0] + "/test_mongo_real.py"
        if file.endswith(self.whole):
            return file
        return nodeid.partition("[")[0] if "rooms/" in file else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> OneByOne | None:
    """Spread the tests as OneByOne says, unless --dist asks for something else."""
    return OneByOne(config, log) if config.getoption("dist") == "load" else None


@pytest.fixture(scope="session")
def pyz() -> Path:
    """The built program."""
    path = Path(os.environ.get("STOCKRT_PYZ") or ROOT / "stockrt.pyz").resolve()
    if not path.is_file():
        pytest.fail(f"{path} is missing: run ./build_pyz.sh test", pytrace=False)
    return path


@pytest.fixture(scope="session")
def shiv_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the program unpacks itself, once for all tests of all workers."""
    return shared_folder(tmp_path_factory, "shiv")


def shared_folder(folders: pytest.TempPathFactory, name: str) -> Path:
    """Return a folder that all workers have."""
    base = folders.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    shared.mkdir(exist_ok=True)
    return shared


@pytest.fixture
def clean_env(tmp_path: Path, shiv_root: Path) -> dict[str, str]:
    """An environment without any setting of whoever runs the tests."""
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": str(tmp_path),
        "SHIV_ROOT": str(shiv_root),
        "STATE_DIRECTORY": str(tmp_path / "state"),
        "LANG": "C.UTF-8",
        "MESSAGE_LANG": "en",
    }


@pytest.fixture
def start_pyz(pyz: Path, clean_env: dict[str, str], tmp_path: Path) -> RunPyz:
    """Run the program in an empty folder (no settings file is found by chance) and return what came of it."""

    def run(
        *args: str | Path,
        env: Mapping[str, str] | None = None,
        input: str | None = None,  # noqa: A002 - named as in subprocess.run
        timeout: float = 60,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(pyz), *map(str, args)],
            env=clean_env | dict(env or {}),
            cwd=cwd or tmp_path,
            capture_output=True,
            encoding="utf-8",
            timeout=timeout,
            **({"stdin": subprocess.DEVNULL} if input is None else {"input": input}),
        )

    return run


@pytest.fixture(scope="session")
def forked(pyz: Path, shiv_root: Path) -> Iterator[Forked]:
    """The built program, loaded once for the runs and daemons that are forked from it."""
    with Forked(pyz, shiv_root) as program:
        yield program


@pytest.fixture
def run_pyz(start_pyz: RunPyz, clean_env: dict[str, str], tmp_path: Path, forked: Forked) -> RunPyz:
    """Run the program as `start_pyz` does, where that is not what is tested.

    The quick run forks it from a process that has it loaded, where it can.
    """

    def run(
        *args: str | Path,
        env: Mapping[str, str] | None = None,
        input: str | None = None,  # noqa: A002 - named as in subprocess.run
        timeout: float = 60,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        own = dict(env or {}).items() - clean_env.items()
        if EXTENT != "quick" or any(READ_AT_A_START.match(name) for name, _ in own):
            return start_pyz(*args, env=env, input=input, timeout=timeout, cwd=cwd)
        arguments = [*map(str, args)]
        return forked.run(arguments, clean_env | dict(env or {}), cwd or tmp_path, input or "", timeout)

    return run


@pytest.fixture(scope="session")
def mongo_server() -> Iterator[MongoServer]:
    """A replica set of one member; a test that kills or pauses it, or lets commands fail, needs `controllable`."""
    try:
        server = find_server()
    except Unavailable as error:
        unavailable(str(error))
    with server:
        yield server


@pytest.fixture
def mongo_db(mongo_server: MongoServer) -> Iterator[tuple[str, str]]:
    """The URI of the server and the name of an empty database."""
    with fresh_database(mongo_server) as place:
        yield place


@pytest.fixture(scope="session")
def mongod() -> Path:
    """The program, for a test that starts servers of its own."""
    try:
        return find_mongod()
    except Unavailable as error:
        unavailable(str(error))


class ThreeMembers:
    """A replica set, from the first test that needs it up to the first that does not: heartbeats cost."""

    def __init__(self, mongod: Path) -> None:
        self._mongod = mongod
        self._running = contextlib.ExitStack()
        self._members: ReplicaSet | None = None

    def started(self) -> ReplicaSet:
        """Return the members, all well."""
        if self._members is None:
            self._members = self._running.enter_context(ReplicaSet(self._mongod))
        self._members.ensure_running()
        return self._members

    def close(self) -> None:
        """End them, if they run."""
        self._running.close()
        self._members = None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """End the three members when the next test does without them."""
    members = getattr(item, "funcargs", {}).get("_three_members")
    yield
    if members is not None and "_three_members" not in getattr(nextitem, "fixturenames", ()):
        members.close()


@pytest.fixture(scope="session")
def _three_members(mongod: Path) -> Iterator[ThreeMembers]:
    with contextlib.closing(ThreeMembers(mongod)) as members:
        yield members


@pytest.fixture
def replica_set(_three_members: ThreeMembers) -> Iterator[ReplicaSet]:
    """Three members, all well when the test begins; it may kill, stop, cut off and bring back any of them."""
    members = _three_members.started()
    yield members
    members.ensure_running()


@pytest.fixture
def replica_db(replica_set: ReplicaSet) -> Iterator[tuple[str, str]]:
    """The URI of the three members and the name of an empty database."""
    with fresh_database(replica_set) as place:
        yield place


@pytest.fixture(scope="module")
def standalone(mongod: Path) -> Iterator[MongoServer]:
    """A server that is no member of a set: it refuses retryable writes."""
    with MongoServer(mongod) as server:
        yield server


@pytest.fixture(scope="session")
def guarded(mongod: Path) -> Iterator[GuardedServer]:
    """A server that lets nobody in but its users."""
    with GuardedServer(mongod) as server:
        yield server


@pytest.fixture
def guarded_db(guarded: GuardedServer) -> Iterator[str]:
    """The name of an empty database of the guarded server, without a user."""
    with fresh_database(guarded) as (_, name):
        yield name


@pytest.fixture
def standalone_db(standalone: MongoServer) -> Iterator[tuple[str, str]]:
    """The URI of the standalone and the name of an empty database."""
    with fresh_database(standalone) as place:
        yield place


class MakeWorld(Protocol):
    """The type of the fixture `make_world`."""

    def __call__(
        self,
        uri: str = "",
        wrapper: Sequence[str] = (),
        per_second: int | None = None,
        place: tuple[str, str] | None = None,
        /,
        **settings: str,
    ) -> World:
        """Make a daemon's world around MongoDB at `uri` (default: that of `place`, as of mongo_db); see World."""


@pytest.fixture
def make_world(
    pyz: Path, clean_env: dict[str, str], tmp_path: Path, forked: Forked, request: pytest.FixtureRequest
) -> Iterator[MakeWorld]:
    """Make the world of a daemon of the built program; it ends with the test.

    The quick run forks the daemon from a process that has the program loaded, where it can.
    """
    with contextlib.ExitStack() as stack:

        def make(
            uri: str = "",
            wrapper: Sequence[str] = (),
            per_second: int | None = None,
            place: tuple[str, str] | None = None,
            /,
            **settings: str,
        ) -> World:
            place = place or request.getfixturevalue("mongo_db")
            world = World(pyz, clean_env, tmp_path, place, uri, wrapper, per_second, forked, **settings)
            return stack.enter_context(world)

        yield make


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[ServiceManager]:
    """A service manager that hears the daemon's watchdog."""
    with ServiceManager(tmp_path) as made:
        yield made


@pytest.fixture
def mongo_proxy(mongo_server: MongoServer) -> Iterator[MongoProxy]:
    """A proxy in front of the MongoDB server."""
    with MongoProxy(controlled(mongo_server).port) as proxy:
        yield proxy


@pytest.fixture
def infoway() -> Iterator[InfowayServer]:
    """An Infoway server that knows the key "test-key" and has no limits."""
    with InfowayServer() as server:
        yield server


@pytest.fixture(scope="session")
def disk_shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that writes down what a process does to its files and sockets."""
    return _shim("shim_disk", tmp_path_factory)


@pytest.fixture(scope="session")
def lock_shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that lets no process lock a file."""
    return _shim("shim_lock", tmp_path_factory)


@pytest.fixture(scope="session")
def _clock_shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _shim("shim_clock", tmp_path_factory)


@pytest.fixture
def wall_clock(_clock_shim: Path, tmp_path_factory: pytest.TempPathFactory) -> WallClock:
    """A wall clock to step, and the environment for the processes that go by it."""
    return WallClock(_clock_shim, tmp_path_factory.mktemp("clock"))


def _shim(name: str, folders: pytest.TempPathFactory) -> Path:
    shared = shared_folder(folders, name)
    if (shared / f"{name}.so").exists():
        return shared / f"{name}.so"
    try:
        return build_shim(name, folders.mktemp(name)).replace(shared / f"{name}.so")
    except NoCompiler as error:
        unavailable(str(error))
