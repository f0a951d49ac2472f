"""An HTTP proxy on loopback: CONNECT and absolute-form requests, a password if told so, and ways to fail.

    with ProxyServer() as proxy:
        env = {"HTTPS_PROXY": proxy.url}

`only_way_out` gives the words in front of a command that put it into a network namespace of its own, in which
nothing but this proxy can be reached.
"""

from __future__ import annotations

import array
import base64
import contextlib
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path
from typing import Literal, NamedTuple, Self
from urllib.parse import urlsplit

from kit.tls import tie

# Where the proxy listens in a namespace of its own: nobody else is there.
NAMESPACE_PORT = 3128
MAX_HEAD = 65536
GOES_ON = b"HTTP/1.1 200 Connection established\r\n\r\n"

Mode = Literal["pass", "hang", "garbage", "close", "promise", "announce", "drip"]

# Runs in the new namespace: has loopback there, listens, hands the listener to the proxy outside, becomes the command.
INSIDE = """
import array, fcntl, os, socket, struct, sys
probe = socket.socket()
request = struct.pack("16sH14s", b"lo", 0, b"")
flags = struct.unpack("16sH14s", fcntl.ioctl(probe, 0x8913, request))[1]
fcntl.ioctl(probe, 0x8914, struct.pack("16sH14s", b"lo", flags | 1, b""))
listener = socket.create_server(("127.0.0.1", int(sys.argv[2])))
with socket.socket(socket.AF_UNIX) as outside:
    outside.connect(sys.argv[1])
    outside.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [listener.fileno()]))])
    outside.recv(1)
os.execvp(sys.argv[3], sys.argv[3:])
"""


class NoNetworkNamespace(Exception):
    """This machine makes none, and says why."""


class Passed(NamedTuple):
    """A request that came: its method, its target as it was written, its headers (names in small letters)."""

    method: str
    target: str
    headers: dict[str, str]


class ProxyServer:
    """The proxy, a thread for each connection; `requests` are what it was asked, refused ones included.

    `password` ("user:password"): asked for. `status`: every request is answered with it. `mode`: what becomes
    of a connection at all; one with a request is closed after it was said to go on ("promise"), goes on after two
    answers that are none ("announce"), or is answered a byte at a time without end ("drip"). `context`: it is an
    https:// proxy. `opened`: connections that it took.
    """

    def __init__(
        self,
        password: str = "",
        status: int = 0,
        mode: Mode = "pass",
        context: ssl.SSLContext | None = None,
    ) -> None:
        self.password = password
        self.status = status
        self.mode = mode
        self.requests: list[Passed] = []
        self.opened = 0
        self._ended = threading.Event()
        self._context = context
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._listen(self._listener)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """What a setting says, without a password."""
        return self.url_at(self.port)

    def url_at(self, port: int, password: str = "") -> str:
        """What a setting says of the proxy at another port, with a password as it is written there."""
        scheme = "https" if self._context else "http"
        return f"{scheme}://{password}{'@' if password else ''}127.0.0.1:{port}"

    def close(self) -> None:
        """Cut everything."""
        self._ended.set()
        for one in list(self._sockets):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def targets(self) -> list[str]:
        """Return what was asked for, once each, in order."""
        return list(dict.fromkeys(f"{passed.method} {passed.target}" for passed in self.requests))

    def only_way_out(self, folder: Path) -> tuple[str, ...]:
        """The words in front of a command whose only way out is this proxy, at NAMESPACE_PORT.

        Each use makes a namespace. Raises NoNetworkNamespace.
        """
        unshare = shutil.which("unshare")
        if os.geteuid() != 0 or unshare is None:
            raise NoNetworkNamespace("a network namespace needs root and unshare (util-linux)")
        done = subprocess.run([unshare, "--net", "true"], capture_output=True, text=True)
        if done.returncode:
            raise NoNetworkNamespace(f"no network namespace can be made here: {done.stderr.strip()}")
        place = str(folder / "proxy.socket")
        if not os.path.exists(place):
            door = socket.socket(socket.AF_UNIX)
            door.bind(place)
            door.listen()
            self._sockets.append(door)
            threading.Thread(target=self._take_listeners, args=(door,), daemon=True).start()
        return (unshare, "--net", sys.executable, "-c", INSIDE, place, str(NAMESPACE_PORT))

    def _take_listeners(self, door: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                inside, _ = door.accept()
                with inside:
                    rights = inside.recvmsg(1, socket.CMSG_SPACE(array.array("i").itemsize))[1]
                    self._listen(socket.socket(fileno=array.array("i", rights[0][2])[0]))
                    inside.send(b"x")

    def _listen(self, listener: socket.socket) -> None:
        self._sockets.append(listener)
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                self.opened += 1
                self._sockets.append(client)
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            if self.mode == "close":
                client.shutdown(socket.SHUT_RDWR)
                return
            if self.mode == "hang":
                return
            if self.mode == "garbage":
                client.recv(MAX_HEAD)
                client.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
                client.shutdown(socket.SHUT_RDWR)
                return
            if self._context is not None:
                client = self._context.wrap_socket(client, server_side=True)
                self._sockets.append(client)
            self._serve_one(client)
            client.close()

    def _serve_one(self, client: socket.socket) -> None:
        """Answer the one request of a connection."""
        head = _read_head(client)
        if not head:
            return
        passed = _parse(head)
        self.requests.append(passed)
        refusal = self._refusal(passed)
        if refusal:
            client.sendall(refusal)
            return
        if self.mode == "promise":
            if passed.method == "CONNECT":
                client.sendall(GOES_ON)
            return
        if self.mode == "announce":
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\n")
        if self.mode == "drip":
            client.sendall(b"HTTP/1.1 200 OK\r\nX: ")
            while not self._ended.wait(0.05):
                client.sendall(b"x")
        if passed.method == "CONNECT":
            host, _, port = passed.target.rpartition(":")
            server = self._reach(client, host.strip("[]"), int(port))
            if server is not None:
                client.sendall(GOES_ON)
                tie(client, server)
            return
        parts = urlsplit(passed.target)
        if parts.scheme != "http" or parts.hostname is None:
            client.sendall(_answer(400))
            return
        server = self._reach(client, parts.hostname, parts.port or 80)
        if server is not None:
            path = parts._replace(scheme="", netloc="").geturl() or "/"
            kept = {n: v for n, v in passed.headers.items() if not n.startswith("proxy-")}
            lines = [f"{passed.method} {path} HTTP/1.1", *(f"{n}: {v}" for n, v in kept.items())]
            server.sendall("\r\n".join([*lines, "Connection: close", "", ""]).encode("latin-1"))
            tie(client, server)

    def _reach(self, client: socket.socket, host: str, port: int) -> socket.socket | None:
        try:
            server = socket.create_connection((host, port), 10)
        except OSError:
            client.sendall(_answer(502))
            return None
        self._sockets.append(server)
        server.settimeout(None)
        return server

    def _refusal(self, passed: Passed) -> bytes:
        wanted = "Basic " + base64.b64encode(self.password.encode()).decode()
        if self.password and passed.headers.get("proxy-authorization") != wanted:
            return _answer(407)
        return _answer(self.status) if self.status else b""


def _read_head(client: socket.socket) -> bytes:
    head = b""
    while not head.endswith(b"\r\n\r\n") and len(head) < MAX_HEAD:
        byte = client.recv(1)  # no more: what follows is not for the proxy
        if not byte:
            return b""
        head += byte
    return head


def _parse(head: bytes) -> Passed:
    first, *lines = head.decode("latin-1").strip().split("\r\n")
    method, target, _ = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Passed(method, target, headers)


def _answer(status: int) -> bytes:
    body = b"<html><body>the proxy</body></html>"
    more = b'Proxy-Authenticate: Basic realm="proxy"\r\n' if status == 407 else b""
    head = b"HTTP/1.1 %d Refused\r\n%bContent-Type: text/html\r\nContent-Length: %d\r\n" % (
        status,
        more,
        len(body),
    )
    return head + b"Connection: close\r\n\r\n" + body
