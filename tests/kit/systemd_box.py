"""A throw-away overlay of this machine's root, booted under a real systemd, for the tests of the unit.

Needs root and the package systemd-container, nothing else. The box reads the machine's files and keeps what
it writes in memory; its network is a loopback of its own::

    with Box() as box:
        box.run("systemctl", "start", "stockrt")
        with box.network():                # sockets made here are the box's
            server = InfowayServer()
            server.start()
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

TOOLS = ("systemd-nspawn", "nsenter", "mount", "umount", "systemctl")
# systemd's own requests to its PID 1: SIGRTMIN+4 powers off, SIGRTMIN+5 reboots.
POWER_OFF = signal.SIGRTMIN + 4
# What nspawn exits with when the box wants to be started again.
REBOOT_WANTED = 133
CLONE_NEWNET = 0x40000000
BOOT_TIMEOUT = 60.0
# Units of the machine that have nothing to do in a box.
MASKED = (
    "apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer",
    "e2scrub_reap.service", "fstrim.timer", "logrotate.timer", "man-db.timer", "postgresql.service",
    "systemd-timesyncd.service",
)  # fmt: skip
# What makes units of the machine's disks, consoles and scripts runs at each daemon-reload, and finds nothing in a box;
# but for the one that masks units.
GENERATORS, NEEDED_GENERATOR = "etc/systemd/system-generators", "systemd-debug-generator"
# What stockrt may have left on the machine, run by hand or as a service. An overlay cannot rename the first, which
# systemd does with a state directory that was there before the dynamic user.
TRACES = (
    "var/lib/stockrt",
    "var/lib/private/stockrt",
    "var/cache/private/stockrt",
    "var/cache/stockrt",
    "etc/stockrt",
)
PLAIN = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}


class BoxError(Exception):
    """The box does not do what it is made for; says what it does."""


def why_not() -> str:
    """Why no box can be had on this machine, '' when one can be tried."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "booting a systemd needs root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"no {', '.join(missing)}: install systemd-container"
    return ""


def hierarchies() -> list[Path]:
    """The cgroup trees that systemd uses: the unified one, or on a hybrid machine its own and the unified one."""
    top = Path("/sys/fs/cgroup")
    if (top / "cgroup.procs").exists():
        return [top]
    return [tree for tree in (top / "systemd", top / "unified") if tree.is_dir()]


def until(holds: Callable[[], object], timeout: float, what: str) -> None:
    """Wait for what another process does, which no event tells of; raises BoxError after the time."""
    pause, deadline = threading.Event(), time.monotonic() + timeout
    step_s = 0.02  # a look may start a process in the box: the longer it takes, the fewer
    while not holds():
        if time.monotonic() > deadline:
            raise BoxError(f"not within {timeout:.0f} s: {what}")
        pause.wait(step_s)
        step_s = min(step_s * 1.3, 0.2)


class Box:
    """A booted copy of this machine; `root` is its file system as seen from here."""

    def __init__(self) -> None:
        self.name = f"stockrt-{os.getpid()}"
        self.base = Path(tempfile.mkdtemp(prefix="stockrt-box-"))
        self.root = self.base / "mem/root"
        self.console = self.base / "console"
        self._mounts: list[Path] = []
        self._nspawn: subprocess.Popen[bytes] | None = None
        self.leader = 0

    def __enter__(self) -> Self:
        try:
            self._make_root()
            self.boot()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------- life

    def boot(self) -> None:
        """Start it, and return when its systemd has nothing left to do."""
        trees = hierarchies()
        for tree in trees:
            (tree / self.name).mkdir(exist_ok=True)
        join = "; ".join(f"echo $$ >{tree / self.name / 'cgroup.procs'}" for tree in trees)
        command = [
            "systemd-nspawn", "--quiet", "--boot", f"--directory={self.root}", f"--machine={self.name}",
            "--register=no", "--keep-unit",  # there may be no systemd outside to ask
            "--private-network",
            "--system-call-filter=bpf",  # IPAddressDeny= and SocketBindDeny= would do nothing without
            "--resolv-conf=off", "--timezone=off", "--link-journal=no", "--console=pipe",
            "systemd.unit=multi-user.target", *(f"systemd.mask={unit}" for unit in MASKED),
        ]  # fmt: skip
        with self.console.open("ab") as console:
            self._nspawn = subprocess.Popen(
                ["sh", "-c", f'{join}; exec "$@"', "sh", *command],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )
        until(self._is_up, BOOT_TIMEOUT, f"the box is up\n{self._said()}")

    def reboot(self) -> None:
        """Let it go down and come up, as `systemctl reboot` does."""
        assert self._nspawn is not None
        os.kill(self.leader, signal.SIGRTMIN + 5)
        if self._nspawn.wait(BOOT_TIMEOUT) != REBOOT_WANTED:
            raise BoxError(f"the box did not reboot, nspawn says {self._nspawn.returncode}\n{self._said()}")
        self.leader = 0
        self.boot()

    def close(self) -> None:
        """Power it off and leave nothing behind."""
        if self._nspawn is not None and self._nspawn.poll() is None:
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                if self.leader:
                    os.kill(self.leader, POWER_OFF)
                    self._nspawn.wait(15)
            with contextlib.suppress(ProcessLookupError):
                if self.leader and self._nspawn.poll() is None:
                    os.kill(self.leader, signal.SIGKILL)  # ends everything in its PID namespace
            if self._nspawn.poll() is None:
                self._nspawn.kill()
            self._nspawn.wait()
        while self._mounts:
            subprocess.run(["umount", "--lazy", self._mounts.pop()], capture_output=True)
        with contextlib.suppress(BoxError):  # the last processes are still being reaped
            until(self._cgroups_are_gone, 5, "the cgroups are empty")
        shutil.rmtree(self.base, ignore_errors=True)

    # -------------------------------------------------------------------------------------------- use

    def run(
        self, *command: str | Path, check: bool = True, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the box, as its root and outside of every unit."""
        done = subprocess.run(
            ["nsenter", "--target", str(self.leader), "--all", *map(str, command)],
            env=PLAIN,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=timeout,
        )
        if check and done.returncode != 0:
            raise BoxError(
                f"{' '.join(map(str, command))}: exit {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done

    def write(self, path: str, text: str, mode: int = 0o644) -> Path:
        """Put a file into the box, with the folders on its way."""
        target = self.root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        target.chmod(mode)
        return target

    @contextlib.contextmanager
    def network(self) -> Iterator[None]:
        """Sockets and threads that this thread makes meanwhile are in the box's network."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open("/proc/thread-self/ns/net") as home, open(f"/proc/{self.leader}/ns/net") as there:
            _set_namespace(libc, there.fileno())
            try:
                yield
            finally:
                _set_namespace(libc, home.fileno())

    # ----------------------------------------------------------------------------------------- within

    def _make_root(self) -> None:
        memory = self.base / "mem"
        memory.mkdir()
        self._mount("-t", "tmpfs", "-o", "mode=0755,size=1g", "tmpfs", memory)
        for name in ("lower", "upper", "work", "root"):
            (memory / name).mkdir()
        lower, upper, work = memory / "lower", memory / "upper", memory / "work"
        self._mount("--bind", "/", lower)  # without what is mounted below: no /proc, /sys, cgroups
        options = f"lowerdir={lower},upperdir={upper},workdir={work}"
        self._mount("-t", "overlay", "-o", options, "overlay", self.root)
        for trace in TRACES:
            shutil.rmtree(self.root / trace, ignore_errors=True)
        masks = self.root / GENERATORS
        masks.mkdir(exist_ok=True)
        for generator in Path("/usr/lib/systemd/system-generators").glob("*"):
            if generator.name != NEEDED_GENERATOR and not (masks / generator.name).exists():
                (masks / generator.name).symlink_to(os.devnull)

    def _mount(self, *arguments: str | Path) -> None:
        done = subprocess.run(["mount", "--make-private", *arguments], capture_output=True, text=True)
        if done.returncode != 0:
            raise BoxError(f"mount: {done.stderr.strip()}")
        self._mounts.append(Path(arguments[-1]))

    def _is_up(self) -> bool:
        assert self._nspawn is not None
        if self._nspawn.poll() is not None:
            raise BoxError(f"nspawn ended with {self._nspawn.returncode}\n{self._said()}")
        children = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children").read_text().split()
        if not children:
            return False
        self.leader = int(children[-1])
        state = self.run("systemctl", "is-system-running", check=False).stdout.strip()
        return state in ("running", "degraded")

    def _cgroups_are_gone(self) -> bool:
        for tree in hierarchies():
            for folder, _, _ in os.walk(tree / self.name, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(folder)
        return not any((tree / self.name).exists() for tree in hierarchies())

    def _said(self) -> str:
        return self.console.read_text(errors="replace") if self.console.exists() else ""


def _set_namespace(libc: ctypes.CDLL, descriptor: int) -> None:
    if libc.setns(descriptor, CLONE_NEWNET) != 0:
        raise BoxError(f"setns: {os.strerror(ctypes.get_errno())}")


def main(command: Sequence[str]) -> int:
    """Boot a box, run one command in it, or a shell, and take it down."""
    if reason := why_not():
        print(reason)
        return 1
    with Box() as box:
        words = ["nsenter", "--target", str(box.leader), "--all", *(command or ["bash"])]
        return subprocess.run(words, env=PLAIN | {"TERM": os.environ.get("TERM", "dumb")}).returncode


if __name__ == "__main__":
    import sys

    raise SystemExit(main(sys.argv[1:]))
