"""WebSocket (RFC 6455) as a server speaks it: handshake, frames and messages, from bytes to bytes and no socket.

What the simulators of the platform and of the stream have in common; it needs nothing but Python.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
from collections.abc import Callable, Iterator, Mapping

WEBSOCKET_GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
TEXT, BINARY, CLOSE, PING, PONG = 0x1, 0x2, 0x8, 0x9, 0xA
# Never on the wire: the connection ended without a close frame, or with one that has no code.
ABNORMAL, NO_CODE = 1006, 1005


class ProtocolError(Exception):
    """The client broke the WebSocket protocol; `code` is what it is closed with."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


# ---------------------------------------------------------------------------------------------------------
# Handshake
# ---------------------------------------------------------------------------------------------------------


def websocket_key(method: str, headers: Mapping[str, str]) -> str | None:
    """The key of a sound request for a WebSocket, else None; the names of the headers are in small letters."""
    upgrade = [token.strip().lower() for token in headers.get("connection", "").split(",")]
    key = headers.get("sec-websocket-key", "")
    try:
        sound = len(base64.b64decode(key, validate=True)) == 16
    except (binascii.Error, ValueError):
        sound = False
    asked = method == "GET" and headers.get("upgrade", "").lower() == "websocket" and "upgrade" in upgrade
    return key if asked and sound and headers.get("sec-websocket-version") == "13" else None


def accept_key(key: str) -> str:
    """The Sec-WebSocket-Accept that belongs to a Sec-WebSocket-Key."""
    return base64.b64encode(hashlib.sha1((key + WEBSOCKET_GUID).encode()).digest()).decode()


def handshake_answer(key: str) -> bytes:
    """The answer that grants a WebSocket to the client with this key."""
    head = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    return f"{head}Sec-WebSocket-Accept: {accept_key(key)}\r\n\r\n".encode()


# ---------------------------------------------------------------------------------------------------------
# Frames out
# ---------------------------------------------------------------------------------------------------------


def masked(payload: bytes, mask: bytes) -> bytes:
    """The payload with the mask put on or taken off."""
    size = len(payload)
    stream = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(payload, "big") ^ int.from_bytes(stream, "big")).to_bytes(size, "big")


def frame_bytes(opcode: int, payload: bytes, final: bool = True) -> bytes:
    """One frame as a server sends it: without a mask."""
    first = opcode | (0x80 if final else 0)
    size = len(payload)
    if size < 126:
        return struct.pack("!BB", first, size) + payload
    if size < 1 << 16:
        return struct.pack("!BBH", first, 126, size) + payload
    return struct.pack("!BBQ", first, 127, size) + payload


def text_frames(text: str, fragment: int = 0) -> Iterator[bytes]:
    """The frame of a text, or its fragments of at most `fragment` bytes."""
    payload = text.encode()
    if fragment <= 0 or len(payload) <= fragment:
        yield frame_bytes(TEXT, payload)
        return
    for start in range(0, len(payload), fragment):
        final = start + fragment >= len(payload)
        yield frame_bytes(0 if start else TEXT, payload[start : start + fragment], final)


def close_payload(code: int, reason: str = "") -> bytes:
    """The payload of a close frame."""
    return struct.pack("!H", code) + reason.encode()[:123]


# ---------------------------------------------------------------------------------------------------------
# Frames in
# ---------------------------------------------------------------------------------------------------------


def parse_close(payload: bytes) -> tuple[int, str]:
    """The code and the reason of a close frame; 1005 when it has none."""
    if len(payload) < 2:
        return NO_CODE, ""
    return int.from_bytes(payload[:2], "big"), payload[2:].decode("utf-8", "replace")


class Messages:
    """Bytes of a client, in whatever pieces, to whole messages: fragments put together, control frames between them.

    `limit` gives the largest message that is taken, asked anew for each frame.
    """

    def __init__(self, limit: Callable[[], int]) -> None:
        self._limit = limit
        self._bytes = bytearray()  # of a frame that is not whole yet
        self._kind = 0
        self._parts: list[bytes] = []

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Yield (opcode, payload) of each message that is whole now. Raises ProtocolError."""
        self._bytes += data
        while (frame := self._frame()) is not None:
            final, opcode, payload = frame
            if opcode >= CLOSE:
                yield opcode, payload
                continue
            if bool(opcode) == bool(self._kind):
                raise ProtocolError(
                    1002, "a new message inside a fragmented one, or a fragment without a start"
                )
            self._kind = self._kind or opcode
            self._parts.append(payload)
            if sum(map(len, self._parts)) > self._limit():
                raise ProtocolError(1009, f"a message of more than {self._limit()} bytes")
            if final:
                whole, message = self._kind, b"".join(self._parts)
                self._kind, self._parts = 0, []
                yield whole, message

    def _frame(self) -> tuple[bool, int, bytes] | None:
        """Take the next frame as (final, opcode, payload), refuse what a client must not send; None: not whole yet."""
        if len(self._bytes) < 2:
            return None
        first, second = self._bytes[:2]
        final, opcode, size = bool(first & 0x80), first & 0x0F, second & 0x7F
        if first & 0x70:
            raise ProtocolError(1002, "a reserved bit is set and no extension was agreed on")
        if not second & 0x80:
            raise ProtocolError(1002, "a frame from the client is not masked")
        if opcode not in (0, TEXT, BINARY, CLOSE, PING, PONG):
            raise ProtocolError(1002, f"unknown opcode {opcode}")
        if opcode >= CLOSE and (size > 125 or not final):
            raise ProtocolError(1002, "a control frame is fragmented or longer than 125 bytes")
        start = {126: 4, 127: 10}.get(size, 2)
        if len(self._bytes) < start:
            return None
        if size > 125:
            size = int.from_bytes(self._bytes[2:start], "big")
        if size > self._limit():
            raise ProtocolError(1009, f"a frame of {size} bytes; the limit is {self._limit()}")
        end = start + 4 + size
        if len(self._bytes) < end:
            return None
        mask, payload = bytes(self._bytes[start : start + 4]), bytes(self._bytes[start + 4 : end])
        del self._bytes[:end]
        return final, opcode, masked(payload, mask)
