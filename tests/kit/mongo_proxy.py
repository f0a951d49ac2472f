"""A proxy in front of a real MongoDB server that breaks what passes through it, message by message.

    with MongoProxy(server.port) as proxy:
        proxy.on_insert = lambda insert: Fate.CUT_AFTER     # applied, and the reply is lost
        ...                                                 # a client of proxy.uri
        proxy.down()                                        # connections are refused
        proxy.up()

It does what no server can be brought to: lose the answer to a write that is applied, or take one document of an
insert and refuse another. What a fail point says (MongoServer.failing) is said better there.

It reads OP_MSG. A replica set of the server alone is told to clients as one of the proxy alone.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Self

import bson

OP_REPLY, OP_MSG = 1, 2013
HEADER = struct.Struct("<iiii")
CHECKSUM = 1  # flag of an OP_MSG: four bytes at its end, as servers put them among themselves
PORTS = (20_000, 32_000)  # below the ephemeral range: nobody's socket takes it while the proxy is down
CONNECT_SECONDS = 10.0
CHUNK = 64 * 1024
# What a server says that ceases to be the primary while it waits for the others to have a write.
STEPPED_DOWN = {
    "ok": 0.0,
    "errmsg": "operation was interrupted because the primary stepped down",
    "code": 11602,
    "codeName": "InterruptedDueToReplStateChange",
}
TOO_LARGE = {
    "code": 10334,
    "errmsg": "BSONObj size: 17000000 is invalid. Size must be between 0 and 16793600",
}

Document = dict[str, Any]


class Fate(Enum):
    """What becomes of an insert whose reply is not passed on."""

    CUT_BEFORE = "the connection is cut, the server never sees it"
    CUT_AFTER = "the server applies it, the connection is cut in place of the reply"


@dataclass(frozen=True)
class Afterwards:
    """The server applies it; these fields are put into its answer."""

    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Without:
    """Some documents (by `_id`) never reach the server, and are refused with `error`; the others do."""

    ids: Collection[str]
    error: Mapping[str, Any]


@dataclass
class Insert:
    """An insert as it passes: the collection and the `_id` of its documents."""

    collection: str
    ids: Sequence[str]


Rule = Callable[[Insert], "Fate | Afterwards | Without | None"]


@dataclass
class _Message:
    """One message, taken apart when somebody asks: most are passed on as they came."""

    number: int
    answers: int
    opcode: int
    raw: bytes

    @property
    def command(self) -> str:
        """The name of an OP_MSG's command, as far as it can be seen."""
        if self.opcode != OP_MSG or self.raw[HEADER.size + 4] != 0:
            return ""
        start = HEADER.size + 4 + 1 + 4 + 1  # flags, kind, size, the type of the first element
        return self.raw[start : self.raw.index(b"\0", start)].decode()

    @property
    def body(self) -> Document:
        """The command or the answer, without its lists of documents; {} of what is compressed."""
        if self.opcode == OP_REPLY:
            return bson.decode(self.raw[HEADER.size + 20 :])
        return self.parts()[0] if self.opcode == OP_MSG else {}

    def parts(self) -> tuple[Document, dict[str, list[bytes]]]:
        """The body of an OP_MSG, and its lists of documents by name."""
        body: Document = {}
        sequences: dict[str, list[bytes]] = {}
        raw, at, limit = self.raw, HEADER.size + 4, len(self.raw) - (4 if self.flags & CHECKSUM else 0)
        while at < limit:
            kind, at = raw[at], at + 1
            size = int.from_bytes(raw[at : at + 4], "little")
            if kind == 0:
                body = bson.decode(raw[at : at + size])
            else:
                end = raw.index(b"\0", at + 4)
                documents = sequences.setdefault(raw[at + 4 : end].decode(), [])
                place = end + 1
                while place < at + size:
                    length = int.from_bytes(raw[place : place + 4], "little")
                    documents.append(raw[place : place + length])
                    place += length
            at += size
        return body, sequences

    @property
    def flags(self) -> int:
        """The flags of an OP_MSG."""
        return int.from_bytes(self.raw[HEADER.size : HEADER.size + 4], "little")

    def insert(self) -> Insert | None:
        """The insert that this is, if it is one."""
        if self.command != "insert":
            return None
        body, sequences = self.parts()
        inline = [str(one["_id"]) for one in body.get("documents", ())]
        sent = sequences.get("documents", ())
        return Insert(body["insert"], inline or [str(bson.decode(one)["_id"]) for one in sent])

    def without(self, ids: Collection[str]) -> bytes:
        """The same insert without these documents; without any, a ping: no server takes an empty insert."""
        body, sequences = self.parts()
        left = [one for one in sequences["documents"] if str(bson.decode(one)["_id"]) not in ids]
        if not left:
            return _op_msg(self.number, 0, self.flags, {"ping": 1, "$db": body["$db"]})
        return _op_msg(self.number, 0, self.flags, body, sequences | {"documents": left})

    def saying(self, answer: Mapping[str, Any]) -> bytes:
        """The same answer with another content."""
        if self.opcode == OP_REPLY:
            payload = self.raw[HEADER.size : HEADER.size + 20] + bson.encode(answer)
            size = HEADER.size + len(payload)
            return HEADER.pack(size, self.number, self.answers, OP_REPLY) + payload
        return _op_msg(self.number, self.answers, self.flags, answer)


class MongoProxy:
    """Passes everything on to 127.0.0.1:`port`, but for what its rules say. Thread-safe."""

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self.port = 0
        # Asked for every insert, on the connection's own thread.
        self.on_insert: Rule = lambda insert: None
        self.inserted: list[str] = []  # the _id of each document of each insert that the server answered
        self._lock = threading.Lock()
        self._flows = threading.Event()
        self._flows.set()
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None
        self._sockets: set[socket.socket] = set()

    @property
    def address(self) -> str:
        """Host and port, as they stand in a connection string."""
        return f"127.0.0.1:{self.port}"

    @property
    def uri(self) -> str:
        """The connection string, without a database."""
        return f"mongodb://{self.address}/"

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.resume()
        self.down()

    def up(self) -> None:
        """Accept connections (again, on the same port)."""
        if self._listener is not None:
            return
        self._listener = _listen(self.port)
        self.port = self._listener.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, args=(self._listener,), daemon=True)
        self._acceptor.start()

    def down(self) -> None:
        """Refuse connections, and cut those that are open."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        if self._acceptor is not None:
            self._acceptor.join()
            self._acceptor = None
        self.cut()

    def cut(self) -> None:
        """Cut every open connection with a reset."""
        with self._lock:
            sockets = list(self._sockets)
        for sock in sockets:
            _reset(sock)

    def hang(self) -> None:
        """Pass nothing on any more; connections are accepted and stay open."""
        self._flows.clear()

    def resume(self) -> None:
        """Go on after `hang`."""
        self._flows.set()

    # -------------------------------------------------------------------------------------------- inside

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """Carry one client's connection: requests on this thread, answers on another."""
        try:
            server = socket.create_connection(self._target, CONNECT_SECONDS)
        except OSError:
            _reset(client)
            client.close()
            return
        server.settimeout(None)
        with self._lock:
            self._sockets |= {client, server}
        link = _Link(self, client, server)
        back = threading.Thread(target=link.carry_answers, daemon=True)
        back.start()
        link.carry_requests()
        back.join()
        with self._lock:
            self._sockets -= {client, server}
        client.close()
        server.close()

    def wait(self) -> None:
        """Stand still as long as the proxy hangs."""
        self._flows.wait()

    def note(self, insert: Insert) -> None:
        """Remember what the server has taken."""
        with self._lock:
            self.inserted += insert.ids

    def introduced(self, message: _Message) -> bytes:
        """An answer with the proxy's address in place of the server's, where it tells the members of its set."""
        host, port = self._target
        server = f"{host}:{port}"
        if server.encode() not in message.raw or b"setVersion" not in message.raw:
            return message.raw

        def known(value: object) -> object:
            if isinstance(value, list):
                return [known(one) for one in value]
            return self.address if value == server else value

        names = ("hosts", "me", "primary")
        body = message.body
        return message.saying(body | {name: known(body[name]) for name in names if name in body})


class _Link:
    """One client's connection and the server's that belongs to it."""

    def __init__(self, proxy: MongoProxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        self._server = server
        self._open: dict[int, tuple[Insert, object]] = {}  # by number of the request

    def carry_requests(self) -> None:
        """Client to server, until either hangs up."""
        try:
            while (message := _read(self._client)) is not None:
                self._proxy.wait()
                self._server.sendall(self._request(message))
        except OSError:
            pass
        _reset(self._server)
        _reset(self._client)

    def carry_answers(self) -> None:
        """Server to client, until either hangs up."""
        try:
            while (message := _read(self._server)) is not None:
                self._proxy.wait()
                self._client.sendall(self._answer(message))
        except OSError:
            pass
        _reset(self._client)

    def _request(self, message: _Message) -> bytes:
        insert = message.insert()
        if insert is None:
            return message.raw
        fate = self._proxy.on_insert(insert)
        if fate is Fate.CUT_BEFORE:
            raise ConnectionAbortedError("the insert is lost")
        self._open[message.number] = (insert, fate)
        return message.without(fate.ids) if isinstance(fate, Without) else message.raw

    def _answer(self, message: _Message) -> bytes:
        insert, fate = self._open.pop(message.answers, (None, None))
        if insert is None:
            return self._proxy.introduced(message)
        self._proxy.note(insert)
        if fate is Fate.CUT_AFTER:
            raise ConnectionAbortedError("the answer is lost")
        if isinstance(fate, Afterwards):
            return message.saying(message.body | dict(fate.fields))
        if isinstance(fate, Without):
            return message.saying(_with_errors(message.body, insert, fate))
        return message.raw


def _with_errors(answer: Document, insert: Insert, fate: Without) -> Document:
    """The server's answer with the errors of the hidden documents, at their places in the client's insert."""
    seen = [place for place, one in enumerate(insert.ids) if one not in fate.ids]
    errors = [error | {"index": seen[error["index"]]} for error in answer.get("writeErrors", ())]
    errors += [{"index": place, **fate.error} for place, one in enumerate(insert.ids) if one in fate.ids]
    return answer | {
        "n": answer.get("n", 0),
        "writeErrors": sorted(errors, key=lambda error: int(error["index"])),
    }


def _listen(port: int) -> socket.socket:
    """Listen on a port, or on any free one."""
    candidates = [port] if port else random.SystemRandom().sample(range(*PORTS), 200)
    for candidate in candidates:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", candidate))
            sock.listen(128)
        except OSError:
            sock.close()
            if port:
                raise
            continue
        return sock
    raise OSError(f"no free port from {PORTS[0]} to {PORTS[1]}")


def _reset(sock: socket.socket) -> None:
    """Cut a connection and wake whoever reads it; the descriptor is closed by its owner."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.shutdown(socket.SHUT_RDWR)


def _exactly(sock: socket.socket, size: int) -> bytes | None:
    parts: list[bytes] = []
    while size:
        part = sock.recv(min(size, CHUNK))
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _read(sock: socket.socket) -> _Message | None:
    """The next message, None at the connection's end."""
    head = _exactly(sock, HEADER.size)
    if head is None:
        return None
    size, number, answers, opcode = HEADER.unpack(head)
    rest = _exactly(sock, size - HEADER.size)
    return None if rest is None else _Message(number, answers, opcode, head + rest)


def _op_msg(
    number: int,
    answers: int,
    flags: int,
    body: Mapping[str, Any],
    sequences: Mapping[str, Sequence[bytes]] | None = None,
) -> bytes:
    parts = [struct.pack("<i", flags & ~CHECKSUM), b"\0", bson.encode(body)]
    for name, documents in (sequences or {}).items():
        sequence = name.encode() + b"\0" + b"".join(documents)
        parts += [b"\1", struct.pack("<i", len(sequence) + 4), sequence]
    payload = b"".join(parts)
    return HEADER.pack(HEADER.size + len(payload), number, answers, OP_MSG) + payload
