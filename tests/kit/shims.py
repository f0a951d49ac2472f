"""Libraries that are preloaded into the daemon, built with the C compiler of the machine."""

from __future__ import annotations

import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent
HEAD = struct.Struct("<ciqI")
SECTOR = 512


class NoCompiler(Exception):
    """There is no C compiler on this machine."""


def build_shim(name: str, folder: Path) -> Path:
    """Compile tests/kit/NAME.c and return the library. Raises NoCompiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise NoCompiler("no C compiler: put cc (gcc and libc6-dev) on the PATH")
    library = folder / f"{name}.so"
    options = ["-O1", "-shared", "-fPIC", "-o", str(library), str(FOLDER / f"{name}.c")]
    subprocess.run([compiler, *options, "-ldl", "-lpthread"], check=True, capture_output=True, text=True)
    return library


# ------------------------------------------------------------------------------------------------------
# shim_disk: what a power cut leaves
# ------------------------------------------------------------------------------------------------------


class Event(NamedTuple):
    """One record of shim_disk.c, which lists the kinds."""

    kind: str
    descriptor: int
    offset: int
    data: bytes


def read_events(path: Path) -> Iterator[Event]:
    """The records of a log; one that was being written is left out."""
    log, at = path.read_bytes(), 0
    while at + HEAD.size <= len(log):
        kind, descriptor, offset, length = HEAD.unpack_from(log, at)
        at += HEAD.size
        if at + length > len(log):
            return
        yield Event(kind.decode(), descriptor, offset, log[at : at + length])
        at += length


@dataclass
class _File:
    """What is on the platters, and what was written since the last sync, in order: (offset, data or None to cut)."""

    synced: bytearray = field(default_factory=bytearray)
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)

    def sync(self) -> None:
        for offset, data in self.pending:
            _apply(self.synced, offset, data)
        self.pending.clear()

    def after_cut(self, rng: Random) -> bytes:
        """The bytes after a power cut: of what was not synced nothing, all, or some sectors, in any order."""
        found = bytearray(self.synced)
        mode = rng.choice(("nothing", "everything", "some", "some"))
        for offset, data in self.pending if mode != "nothing" else ():
            if mode == "everything" or data is None:
                _apply(found, offset, data)
            else:
                _apply_some_sectors(found, offset, data, rng)
        return bytes(found)


def _apply(content: bytearray, offset: int, data: bytes | None) -> None:
    if data is None:
        del content[offset:]
        content.extend(bytes(offset - len(content)))
        return
    if len(content) < offset:
        content.extend(bytes(offset - len(content)))
    content[offset : offset + len(data)] = data


def _apply_some_sectors(content: bytearray, offset: int, data: bytes, rng: Random) -> None:
    for start in range(offset - offset % SECTOR, offset + len(data), SECTOR):
        if rng.random() < 0.5:
            first, last = max(start, offset), min(start + SECTOR, offset + len(data))
            _apply(content, first, data[first - offset : last - offset])


class Disk:
    """The files of one folder as the events so far leave them, on the disk and in the cache above it.

    Names (made, removed, changed) are durable when the folder is synced; of later changes a power cut leaves
    the first so many.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)
        self._names: dict[str, _File] = {}  # as the process sees them
        self._durable: dict[str, _File] = {}
        self._changes: list[tuple[str, _File | None]] = []  # not durable yet
        self._open: dict[int, tuple[str, _File]] = {}

    def feed(self, event: Event) -> None:
        """Take the next event."""
        kind, descriptor, offset, data = event
        if kind == "O":
            self._opened(descriptor, data.decode(), is_new=bool(offset))
        elif kind in "WTS":
            path, file = self._open[descriptor]
            if kind == "W":
                file.pending.append((offset, data))
            elif kind == "T":
                file.pending.append((offset, None))
            elif path == self._folder:
                self._sync_names()
            else:
                file.sync()
        elif kind == "U":
            self._rename(data.decode(), None)
        elif kind == "R":
            old, new = data.decode().split("\0")
            self._rename(new, self._names.get(old))
            self._rename(old, None)

    def after_cut(self, rng: Random) -> dict[str, bytes]:
        """The files as a power cut leaves them now: name -> content."""
        names = dict(self._durable)
        _change(names, self._changes[: rng.randint(0, len(self._changes))])
        return {Path(path).name: file.after_cut(rng) for path, file in names.items() if path != self._folder}

    def _opened(self, descriptor: int, path: str, is_new: bool) -> None:
        if path not in self._names or is_new:
            self._rename(path, _File())
        self._open[descriptor] = (path, self._names[path])

    def _rename(self, path: str, file: _File | None) -> None:
        _change(self._names, [(path, file)])
        self._changes.append((path, file))

    def _sync_names(self) -> None:
        _change(self._durable, self._changes)
        self._changes.clear()


def _change(names: dict[str, _File], changes: list[tuple[str, _File | None]]) -> None:
    for path, file in changes:
        if file is None:
            names.pop(path, None)
        else:
            names[path] = file


# ------------------------------------------------------------------------------------------------------
# shim_clock: the wall clock of one process
# ------------------------------------------------------------------------------------------------------


class WallClock:
    """The wall clock of the processes that have shim_clock and this file in their environment."""

    def __init__(self, library: Path, folder: Path) -> None:
        self.path = folder / "clock"
        self.path.write_bytes(struct.pack("<q", 0))
        self.environment = {"LD_PRELOAD": str(library), "STOCKRT_SHIM_CLOCK": str(self.path)}

    def step(self, seconds: int) -> None:
        """Set it to so many seconds from the true time; the monotonic clock goes on as it does."""
        with self.path.open("r+b") as file:
            file.write(struct.pack("<q", seconds))

    def now(self) -> float:
        """The time that the processes see."""
        return time.time() + int(struct.unpack("<q", self.path.read_bytes())[0])
