"""The built file, loaded once and forked for each run: what a start costs beyond its own work is paid once.

    with Forked(pyz, shiv_root) as program:
        done = program.run(["--check"], env, cwd)     # as subprocess.run with captured output
        daemon = program.start([], env, cwd, log)     # as subprocess.Popen with its output in a file

A run has its own descriptors, environment, directory and signals, and ends by the program's own exit. What belongs to
a start itself (unpacking, the interpreter's own variables, imports, memory) is for tests that start the built file.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Self

# Runs inside the built file. Each request is a connection: descriptors and a line of JSON, then the pid and the status.
SERVER = r"""
import argparse, gc, json, os, socket, sqlite3, sys, time
import dotenv, pymongo, stockrt, tqdm, urllib3.connection

def serve(request):
    data, descriptors, _, _ = socket.recv_fds(request, 1 << 20, 3)
    while not data.endswith(b"\n"):
        data += request.recv(1 << 20)
    asked = json.loads(data)
    pid = os.fork()
    if pid:
        for descriptor in descriptors:
            os.close(descriptor)
        request.sendall(b"%d\n" % pid)
        request.sendall(b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        os._exit(0)
    request.close()
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    time.tzset()
    sys.argv[1:] = asked["arguments"]
    stockrt.main()

listener = socket.socket(fileno=int(sys.argv[1]))
gc.freeze()
running = 0
while True:
    request, _ = listener.accept()
    while running and os.waitpid(-1, os.WNOHANG)[0]:
        running -= 1
    running += 1
    if not os.fork():
        listener.close()
        try:
            serve(request)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
            os._exit(1)
    request.close()
"""


class ForkedProcess:
    """A run that goes on: what of subprocess.Popen a daemon is handled with."""

    def __init__(self, pid: int, connection: socket.socket, status: socket.SocketIO) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._connection = connection
        self._status = status

    def poll(self) -> int | None:
        """Return the exit status, None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end and return the exit status. Raises TimeoutExpired."""
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("stockrt", timeout or 0)
            self.returncode = int(self._status.readline())
            self._status.close()
            self._connection.close()
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


class Forked:
    """A process that has the built file loaded, started by the first run; any thread may call `run`."""

    def __init__(self, pyz: Path, shiv_root: Path) -> None:
        self._pyz = pyz
        self._shiv_root = shiv_root
        self._lock = threading.Lock()
        self._server: subprocess.Popen[bytes] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="stockrt-forked-")
        self._address = f"{self._folder.name}/socket"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.kill()
            self._server.wait()
        self._folder.cleanup()

    def _start(self) -> None:
        """Start the process, unless it runs."""
        with self._lock, socket.socket(socket.AF_UNIX) as listener:
            if self._server is not None:
                return
            listener.bind(self._address)
            listener.listen(64)
            env = {"PATH": os.environ.get("PATH", os.defpath), "HOME": self._folder.name, "LANG": "C.UTF-8"}
            self._server = subprocess.Popen(
                [sys.executable, str(self._pyz), "-c", SERVER, str(listener.fileno())],
                env=env | {"SHIV_ROOT": str(self._shiv_root), "SHIV_INTERPRETER": "1"},
                stdin=subprocess.DEVNULL,
                pass_fds=[listener.fileno()],
            )

    def run(
        self,
        arguments: Sequence[str],
        env: Mapping[str, str],
        cwd: Path,
        given: str = "",
        timeout: float = 60,
    ) -> subprocess.CompletedProcess[str]:
        """Run the program with these arguments, environment and standard input, and return what came of it."""
        with (
            tempfile.TemporaryFile() as stdin,
            tempfile.TemporaryFile() as stdout,
            tempfile.TemporaryFile() as stderr,
        ):
            stdin.write(given.encode())
            stdin.seek(0)
            streams = [stdin.fileno(), stdout.fileno(), stderr.fileno()]
            status = self._ask(arguments, env, cwd, streams, timeout)
            for stream in (stdout, stderr):
                stream.seek(0)
            command = [str(self._pyz), *arguments]
            return subprocess.CompletedProcess(
                command, status, stdout.read().decode(), stderr.read().decode()
            )

    def _ask(
        self, arguments: Sequence[str], env: Mapping[str, str], cwd: Path, streams: list[int], timeout: float
    ) -> int:
        process = self._ask_for(arguments, env, cwd, streams, timeout)
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise subprocess.TimeoutExpired(list(arguments), timeout) from None

    def start(
        self, arguments: Sequence[str], env: Mapping[str, str], cwd: Path, log: IO[bytes]
    ) -> ForkedProcess:
        """Start the program with these arguments and environment; what it prints goes to the file."""
        with Path(os.devnull).open("rb") as nothing:
            return self._ask_for(arguments, env, cwd, [nothing.fileno(), log.fileno(), log.fileno()])

    def _ask_for(
        self,
        arguments: Sequence[str],
        env: Mapping[str, str],
        cwd: Path,
        streams: list[int],
        timeout: float = 60,
    ) -> ForkedProcess:
        self._start()
        asked = json.dumps({"arguments": arguments, "env": dict(env), "cwd": str(cwd)}) + "\n"
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(timeout)
        connection.connect(self._address)
        sent = socket.send_fds(connection, [asked.encode()], streams)
        connection.sendall(asked.encode()[sent:])
        answers = connection.makefile("rb", buffering=0)
        return ForkedProcess(int(answers.readline()), connection, answers)
