"""A server that speaks MongoDB's protocol, acknowledges everything and keeps nothing: for measuring clients.

    python tests/bench/null_mongo.py        # prints the port it listens on, ends when its input does

It answers what a driver says: hello, OP_MSG commands (an insert with the number of its documents, a find
with none, a count with the number of all that ever were inserted), and the OP_QUERY that opens a connection.
Each connection has a thread; an insert costs it one look at the length of each document.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
import threading
from typing import Any

import bson

OP_REPLY, OP_QUERY, OP_MSG = 1, 2004, 2013
_HEAD = struct.Struct("<iiii")
_INT = struct.Struct("<i")
BODY, SEQUENCE = 0, 1  # kinds of an OP_MSG's sections

HELLO: dict[str, Any] = {
    "helloOk": True,
    "ismaster": True,
    "isWritablePrimary": True,
    "maxBsonObjectSize": 16 * 1024 * 1024,
    "maxMessageSizeBytes": 48_000_000,
    "maxWriteBatchSize": 100_000,
    "logicalSessionTimeoutMinutes": 30,
    "minWireVersion": 0,
    "maxWireVersion": 21,
    "readOnly": False,
    "ok": 1.0,
}
# The commands that are answered with more than `ok`; `n` of an insert is put in later.
ANSWERS: dict[str, dict[str, Any]] = {
    "hello": HELLO,
    "ismaster": HELLO,
    "find": {"cursor": {"firstBatch": [], "id": 0, "ns": "null.null"}, "ok": 1.0},
    "listCollections": {"cursor": {"firstBatch": [], "id": 0, "ns": "null.null"}, "ok": 1.0},
    "listIndexes": {"cursor": {"firstBatch": [], "id": 0, "ns": "null.null"}, "ok": 1.0},
}


class NullMongo:
    """The server, on threads of this process; `documents` counts what it was given."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.documents = 0
        self._answers = {name: bson.encode(answer) for name, answer in ANSWERS.items()}
        self._lock = threading.Lock()

    @property
    def uri(self) -> str:
        """The connection string."""
        return f"mongodb://127.0.0.1:{self.port}/"

    def start(self) -> None:
        """Accept connections from now on."""
        threading.Thread(target=self._accept, name="null-mongo", daemon=True).start()

    def close(self) -> None:
        """Accept no more."""
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, _ = self._listener.accept()
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(ConnectionError), connection.makefile("rb", 1 << 20) as stream:
            while head := stream.read(_HEAD.size):
                length, request, _, opcode = _HEAD.unpack(head)
                message = stream.read(length - _HEAD.size)
                if opcode == OP_QUERY:
                    reply = bson.encode(HELLO)
                    connection.sendall(
                        _HEAD.pack(_HEAD.size + 20 + len(reply), 0, request, OP_REPLY)
                        + struct.pack("<iqii", 8, 0, 0, 1) + reply
                    )  # fmt: skip
                elif opcode == OP_MSG:
                    reply = self._answer(message)
                    connection.sendall(
                        _HEAD.pack(_HEAD.size + 5 + len(reply), 0, request, OP_MSG) + b"\0\0\0\0\0" + reply
                    )
                else:
                    raise ValueError(f"opcode {opcode}: expected OP_MSG or OP_QUERY")

    def _answer(self, message: bytes) -> bytes:
        command, documents = read_message(message)
        if command == "insert":
            with self._lock:
                self.documents += documents
            return bson.encode({"n": documents, "ok": 1.0})
        if command == "count":
            return bson.encode({"n": self.documents, "ok": 1.0})
        if command in ("update", "delete"):
            return bson.encode({"n": documents, "nModified": documents, "ok": 1.0})
        return self._answers.get(command) or bson.encode({"ok": 1.0})


def read_message(message: bytes) -> tuple[str, int]:
    """Return the command's name and the number of documents in the sequences of an OP_MSG (flags first).

    Documents that stand in the command itself, as small writes have them, are counted there.
    """
    command, documents, at = "", 0, 4
    while at < len(message):
        kind = message[at]
        (size,) = _INT.unpack_from(message, at + 1)
        if kind == BODY:
            name_end = message.index(b"\0", at + 6)
            command = message[at + 6 : name_end].decode()
            documents += _embedded(command, message[at + 1 : at + 1 + size])
        elif kind == SEQUENCE:
            end = at + 1 + size
            place = message.index(b"\0", at + 5) + 1
            while place < end:
                documents += 1
                place += _INT.unpack_from(message, place)[0]
        at += 1 + size
    return command, documents


def _embedded(command: str, body: bytes) -> int:
    field = {"insert": "documents", "update": "updates", "delete": "deletes"}.get(command)
    if field is None or b"\x04" + field.encode() + b"\0" not in body:
        return 0
    return len(bson.decode(body)[field])


def main() -> None:
    """Serve until the input ends."""
    server = NullMongo()
    server.start()
    print(server.port, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
