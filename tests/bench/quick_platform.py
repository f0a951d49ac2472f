"""A dispatch platform that costs next to nothing: for measuring how long a module takes to answer.

`platform_server.py` is the one that behaves like the real platform. This one takes one module, whoever it is, sends
it a command when it is told to, and reads on the caller's own thread: between two commands it answers nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import time
from types import TracebackType
from typing import Any, NamedTuple, Self

TEXT, CLOSE, PING, PONG = 1, 8, 9, 10
# What the answer to a handshake is made of: RFC 6455, section 1.3.
GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
TIMEOUT_S = 30.0


class Result(NamedTuple):
    """What the module answered, and the seconds from the command to the last byte of the answer."""

    data: dict[str, Any]
    took: float


class QuickPlatform:
    """The server, used with `with`: listens, and takes one module in `connect`."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(TIMEOUT_S)
        self.port: int = self._listener.getsockname()[1]
        self._socket: socket.socket | None = None
        self._bytes = bytearray()  # what came and was not looked at

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()
        if self._socket is not None:
            self._socket.close()

    def connect(self) -> None:
        """Wait for the module's connection."""
        self._socket, _ = self._listener.accept()
        self._socket.settimeout(TIMEOUT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while b"\r\n\r\n" not in self._bytes:
            self._receive()
        head, _, rest = bytes(self._bytes).partition(b"\r\n\r\n")
        self._bytes = bytearray(rest)
        found = re.search(rb"(?i)^sec-websocket-key: *(\S+)", head, re.MULTILINE)
        if found is None:
            raise ValueError(f"no handshake of a WebSocket: {head!r}")
        accept = base64.b64encode(hashlib.sha1(found[1] + GUID).digest())
        self._socket.sendall(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"
        )

    def execute(self, execution_id: str, codes: list[str]) -> Result:
        """Send a command and wait for its result. Raises TimeoutError when none comes."""
        meta = {"execution_id": execution_id, "execution_time": "2024-01-01T10:00:00",
                "workflow_id": "1", "workflow_name": "bench"}  # fmt: skip
        command = {"message": {"type": "execute", "meta": meta, "args": {"code_list": codes}}}
        frame = make_frame(TEXT, json.dumps(command).encode())
        began = time.monotonic()
        self._send(frame)
        while True:
            opcode, data = self._frame()
            took = time.monotonic() - began
            if opcode == PING:
                self._send(make_frame(PONG, data))
            if opcode == TEXT and data.startswith(b"{") and execution_id.encode() in data:
                self._send(make_frame(TEXT, b"receive result"))
                return Result(json.loads(data), took)

    def _send(self, data: bytes) -> None:
        assert self._socket is not None, "connect first"
        self._socket.sendall(data)

    def _receive(self) -> None:
        assert self._socket is not None, "connect first"
        data = self._socket.recv(65536)
        if not data:
            raise ConnectionError("the module has gone")
        self._bytes += data

    def _frame(self) -> tuple[int, bytes]:
        while (found := read_frame(self._bytes)) is None:
            self._receive()
        opcode, data, end = found
        del self._bytes[:end]
        if opcode == CLOSE:
            raise ConnectionError("the module has closed the connection")
        return opcode, data


def make_frame(opcode: int, data: bytes) -> bytes:
    """Return a server's frame: whole and unmasked."""
    size = len(data)
    if size < 126:
        return bytes([0x80 | opcode, size]) + data
    if size < 1 << 16:
        return struct.pack("!BBH", 0x80 | opcode, 126, size) + data
    return struct.pack("!BBQ", 0x80 | opcode, 127, size) + data


def read_frame(data: bytes | bytearray) -> tuple[int, bytes, int] | None:
    """Return opcode, content and end of a client's frame, None until it is whole."""
    if len(data) < 2:
        return None
    size, at = data[1] & 0x7F, 2
    if size >= 126:
        at = 4 if size == 126 else 10
        size = int.from_bytes(data[2:at])
    end = at + 4 + size
    if len(data) < at or len(data) < end:
        return None
    mask = int.from_bytes((bytes(data[at : at + 4]) * (size // 4 + 1))[:size])
    return data[0] & 0x0F, (int.from_bytes(data[at + 4 : end]) ^ mask).to_bytes(size), end
