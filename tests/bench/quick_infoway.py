"""An Infoway API that costs next to nothing: for measuring clients. Its answers are made once and patched.

    python tests/bench/quick_infoway.py     # prints the port it listens on, ends when its input does

`infoway_server.py` is the one that behaves like the real API; this one knows every code and refuses nothing.
`GET /_control/t/<epoch ms>` sets the time that all trades have, `/_control/latency/<ms>` how long an answer takes.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
import time
import urllib.request
from urllib.parse import unquote

# What stands in the made answers where the trades' time goes.
TIME = b"1000000000000"
BARS = "/batch_kline/"


class QuickInfoway:
    """The server, on threads of this process: one for each connection."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._made: dict[bytes, bytes] = {}
        self._time = str(int(time.time() * 1000)).encode()
        self._latency_s = 0.0

    def start(self) -> None:
        """Accept connections from now on."""
        threading.Thread(target=self._accept, name="quick-infoway", daemon=True).start()

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(ConnectionError):
            head = b""
            while part := connection.recv(65536):
                head += part
                if head.endswith(
                    b"\r\n\r\n"
                ):  # a GET has no body, and nobody sends the next before the answer
                    path = head[4 : head.index(b" ", 4)]
                    head = b""
                    connection.sendall(self._answer(path))

    def _answer(self, path: bytes) -> bytes:
        if path.startswith(b"/_control/"):
            return self._control(path.decode())
        made = self._made.get(path)
        if made is None:
            made = self._made[path] = make_answer(unquote(path.decode()))
        if self._latency_s:
            time.sleep(self._latency_s)
        return made.replace(TIME, self._time)

    def _control(self, path: str) -> bytes:
        _, _, name, value = path.split("/")
        if name == "t":
            self._time = value.encode()
        else:
            self._latency_s = float(value) / 1000
        return _response({"ret": 200})


def make_answer(path: str) -> bytes:
    """Return the whole answer for a path, with TIME where the trades' time goes."""
    if BARS in path:
        return _response({"ret": 200, "msg": "success", "data": []})
    codes = path.rpartition("/")[2].split(",")
    records = [make_record(code) for code in codes]
    return _response({"ret": 200, "msg": "success", "traceId": "00000000-0000-4000-8000-000000000000",
                      "data": records})  # fmt: skip


def make_record(code: str) -> dict[str, str | int]:
    """Return a trade of the real one's form and length; it follows from the code alone."""
    seed = sum(byte * (number + 7) for number, byte in enumerate(code.encode()))
    price, volume = 10 + seed % 900 + (seed % 997) / 1000, 1 + seed % 5000
    return {"s": code, "t": int(TIME), "p": f"{price:.3f}", "v": str(volume),
            "vw": f"{price * volume:.3f}", "td": seed % 3}  # fmt: skip


def _response(value: object) -> bytes:
    body = json.dumps(value, separators=(",", ":")).encode()
    return (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    )


def control(url: str, name: str, value: int) -> None:
    """Set `t` or `latency` of the server at `url`."""
    with urllib.request.urlopen(f"{url}/_control/{name}/{value}", timeout=10) as answer:
        answer.read()


def main() -> None:
    """Serve until the input ends."""
    server = QuickInfoway()
    server.start()
    print(server.port, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
