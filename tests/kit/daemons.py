"""The daemon under test: in a thread of this process with its chance handed in, or as a process to kill."""

from __future__ import annotations

import functools
import gc
import marshal
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import SourceFileLoader
from importlib.util import MAGIC_NUMBER
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import stockrt
from kit.forked import Forked, ForkedProcess

PROGRAM = Path(stockrt.__file__).resolve()
ROOT_FOLDER = PROGRAM.parent
# How much is tried: "quick" after every change; "long" as well what takes more rounds; "hour" takes one.
EXTENTS = ("quick", "long", "hour")
EXTENT = os.environ.get("STOCKRT_TESTS") or "quick"
if EXTENT not in EXTENTS:
    raise SystemExit(f"STOCKRT_TESTS is {EXTENT!r}, but must be one of {', '.join(EXTENTS)}")
HOUR = EXTENT == "hour"
N = TypeVar("N", int, float)
# A wait for something that must happen; long, because a busy machine is slow, not wrong.
PATIENCE = 60.0
HASH = "-4611686018427387904"
# What an interpreter, the file's unpacking or the loader reads when a process starts.
READ_AT_A_START = re.compile("PYTHON|SHIV_|LD_|LANG|LC_")
# How a time is told to people.
LOCAL_TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d"


@functools.cache
def _compiled_folder() -> tempfile.TemporaryDirectory[str]:
    """Return a folder, kept as long as this process lives, with stockrt.py compiled: from the cache, where it is."""
    folder = tempfile.TemporaryDirectory(prefix="stockrt-compiled-")
    code = SourceFileLoader("stockrt", str(PROGRAM)).get_code("stockrt")
    compiled = MAGIC_NUMBER + bytes(12) + marshal.dumps(code)
    Path(folder.name, "stockrt.pyc").write_bytes(compiled)
    return folder


def command_of(program: Path = PROGRAM) -> list[str]:
    """Return the command that runs stockrt.py or the built file.

    A script is compiled by each process that runs it, and that takes longer than all the rest of a start.
    """
    runs = Path(_compiled_folder().name) / "stockrt.pyc" if program == PROGRAM else program
    return [sys.executable, str(runs)]


def number(short: N, hour: N, quick: N | None = None) -> N:
    """Return how many rounds, seconds ... it shall be: `hour` for that extent, `quick`, if any, for that one."""
    if HOUR:
        return hour
    return quick if quick is not None and EXTENT == "quick" else short


def until(holds: Callable[[], object], timeout: float = PATIENCE) -> bool:
    """Wait for what another process writes into a file, which no event tells of; False when time runs out."""
    pause = threading.Event()
    deadline = time.monotonic() + timeout
    while not (found := holds()) and time.monotonic() < deadline:
        pause.wait(0.01)
    return bool(found)


class Lag:
    """Measures, from `with` on, for how long a thread that wants to go on is not let: the others' share."""

    _STEP_S, _USUAL_S = 0.02, 0.005

    def __init__(self) -> None:
        self.seconds = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._measure, daemon=True)

    def _measure(self) -> None:
        before = time.monotonic()
        while not self._over.wait(self._STEP_S):
            now = time.monotonic()
            late = now - before - self._STEP_S
            self.seconds += late if late > self._USUAL_S else 0.0
            before = now

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()


def check_paced(measure: Callable[[Path], tuple[int, float]], folder: Path, most_s: float) -> None:
    """`measure` gives requests over the limit and seconds: none, and not too many, in one of three tries.

    A machine that is busy with something else delays what it likes; what is wrong is so each time.
    """
    seen: list[tuple[int, float]] = []
    for attempt in range(3):
        with Lag() as lag:
            over, took_s = measure(folder / str(attempt))
        took_s -= lag.seconds
        if over == 0 and took_s <= most_s:
            return
        seen.append((over, took_s))
    raise AssertionError(f"(over the limit, seconds): {seen}; expected (0, at most {most_s:.2f})")


def environment(port: int, api_url: str, state: Path, **more: str) -> dict[str, str]:
    """Return the settings of a daemon: its store is the local file, its API has no limits."""
    return {
        "INFOWAY_API_KEY": "test-key",
        "INFOWAY_API_BASE_URL": api_url,
        "INFOWAY_PLAN": "0",
        "SERVER_IP": "127.0.0.1",
        "SERVER_PORT": str(port),
        "STATE_DIRECTORY": str(state),
        "MESSAGE_LANG": "en",
    } | more


def settings_for(port: int, api_url: str, state: Path, **more: str) -> stockrt.Settings:
    """Return the same as loaded settings."""
    return stockrt.load_settings(environment(port, api_url, state, **more), None, (), is_root=False).settings


class Hasty(random.Random):
    """Makes every delay the shortest, and keeps how long each could have been."""

    def __init__(self) -> None:
        super().__init__()
        self.ceilings: list[float] = []

    def uniform(self, a: float, b: float) -> float:
        """Return the shortest delay."""
        self.ceilings.append(b)
        return a


class ThreadDaemon:
    """A Daemon on a thread; used with `with`, which ends it and asserts that it ended well."""

    def __init__(self, settings: stockrt.Settings, *, rng: random.Random | None = None) -> None:
        self.daemon = stockrt.Daemon(settings, rng=rng)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name="daemon", daemon=True)

    def _run(self) -> None:
        try:
            self.daemon.run()
        except BaseException as error:
            self.error = error

    def ended(self, timeout: float = PATIENCE) -> bool:
        """Wait for its end."""
        self.thread.join(timeout)
        return not self.thread.is_alive()

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.daemon.request_stop()
        ended = self.ended()
        del self.daemon
        gc.collect()  # its lock goes with it
        if kind is None:
            assert self.error is None, repr(self.error)
            assert ended, "the daemon did not end"


class ProcessDaemon:
    """A daemon as a process of its own, `program` being stockrt.py or the built file.

    `wrapper` is put in front of the command line; it must `exec`, so that the process is the daemon. In the quick run
    a daemon is forked from `forked`, where that is given and nothing is asked for that only a start has.
    """

    def __init__(
        self,
        base: Mapping[str, str],
        settings: Mapping[str, str],
        program: Path = PROGRAM,
        wrapper: Sequence[str] = (),
        forked: Forked | None = None,
    ) -> None:
        self.settings = settings
        self.environment = {**base, **settings}
        self._program = program
        self._wrapper = wrapper
        is_plain = EXTENT == "quick" and not wrapper and not any(READ_AT_A_START.match(n) for n in settings)
        self._forked = forked if is_plain else None
        self.state = Path(settings["STATE_DIRECTORY"])
        self.log_path = self.state.with_name(self.state.name + ".log")
        self.process: subprocess.Popen[bytes] | ForkedProcess | None = None

    def start(self) -> Self:
        """Start it."""
        with self.log_path.open("ab") as log:
            if self._forked is not None:
                self.process = self._forked.start([], self.environment, self.log_path.parent, log)
                return self
            self.process = subprocess.Popen(
                [*self._wrapper, *command_of(self._program)],
                env=self.environment,
                cwd=self.log_path.parent,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        return self

    @property
    def log(self) -> str:
        """Return what it has printed, in all its lives."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    @property
    def pid(self) -> int:
        """Return the number of the running process."""
        assert self.process is not None
        return self.process.pid

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def wait(self, timeout: float = PATIENCE) -> int:
        """Wait for its end and return the exit status."""
        assert self.process is not None
        return self.process.wait(timeout)

    def kill(self) -> None:
        """kill -9."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
