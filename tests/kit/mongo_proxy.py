"""A proxy in front of a real MongoDB server that breaks what passes through it, message by message.

    with MongoProxy(server.port) as proxy:
        proxy.on_insert = lambda insert: Fate.CUT_AFTER     # applied, and the reply is lost
        ...                                                 # a client of proxy.uri
        proxy.down()                                        # connections are refused
        proxy.up()

It reads OP_MSG, so that it can take one document out of an insert, or answer in the server's place.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Self

import bson

OP_REPLY, OP_QUERY, OP_MSG = 1, 2004, 2013
HEADER = struct.Struct("<iiii")
MORE_TO_COME = 2  # flag of an OP_MSG
PORTS = (20_000, 32_000)  # below the ephemeral range: nobody's socket takes it while the proxy is down
CONNECT_SECONDS = 10.0
CHUNK = 64 * 1024
# What a server of a replica set says that is not, or no more, its primary.
NOT_PRIMARY = {"ok": 0.0, "errmsg": "not primary", "code": 10107, "codeName": "NotWritablePrimary"}
STEPPED_DOWN = {
    "ok": 0.0,
    "errmsg": "operation was interrupted because the primary stepped down",
    "code": 11602,
    "codeName": "InterruptedDueToReplStateChange",
}
# Added to an answer: the write is there, and not on the majority.
CONCERN_ERROR = {
    "writeConcernError": {
        "code": 64,
        "codeName": "WriteConcernTimeout",
        "errmsg": "waiting for replication timed out",
    }
}
TOO_LARGE = {
    "code": 10334,
    "errmsg": "BSONObj size: 17000000 is invalid. Size must be between 0 and 16793600",
}
UNAUTHORIZED = {"ok": 0.0, "errmsg": "not authorized", "code": 13, "codeName": "Unauthorized"}
INVALID = {"code": 121, "errmsg": "Document failed validation"}

Document = dict[str, Any]


class Fate(Enum):
    """What becomes of an insert whose reply is not simply passed on."""

    CUT_BEFORE = "the connection is cut, the server never sees it"
    CUT_AFTER = "the server applies it, the connection is cut in place of the reply"


@dataclass(frozen=True)
class Instead:
    """The server never sees it; this is the answer."""

    answer: Mapping[str, Any]


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


Rule = Callable[[Insert], "Fate | Instead | Afterwards | Without | None"]


@dataclass
class _Message:
    """One message; of an OP_MSG `body` is the command or the answer, `sequences` its lists of documents by name."""

    number: int
    answers: int
    opcode: int
    raw: bytes
    body: Document = field(default_factory=dict)
    sequences: dict[str, list[bytes]] = field(default_factory=dict)

    @property
    def insert(self) -> Insert | None:
        """The insert that this is, if it is one."""
        if "insert" not in self.body:
            return None
        inline = [str(one["_id"]) for one in self.body.get("documents", ())]
        sent = self.sequences.get("documents", ())
        return Insert(self.body["insert"], inline or [str(bson.decode(one)["_id"]) for one in sent])


class MongoProxy:
    """Passes everything on to 127.0.0.1:`port`, but for what its rules say. Thread-safe.

    A `fellow` is another member of the same replica set: numbered writes are remembered together.
    """

    def __init__(self, port: int, fellow: MongoProxy | None = None) -> None:
        self._target = ("127.0.0.1", port)
        self.port = 0
        # Asked for every insert into a collection of trades, on the connection's own thread.
        self.on_insert: Rule = lambda insert: None
        # Put into every answer to `hello`: what makes a server the member of a replica set.
        self.hello: Mapping[str, Any] = {}
        # Given in place of any answer but that to `hello`: None, or e.g. NOT_PRIMARY.
        self.refusal: Mapping[str, Any] | None = None
        self.forbidden: Collection[
            str
        ] = ()  # collections on which every command is refused for want of a right
        self.silent: Collection[str] = ()  # commands that are never answered
        self.latency = 0.0  # seconds before each insert reaches the server
        self.inserted: list[str] = []  # the _id of each document of each insert that the server answered
        self.retried = 0  # writes that came again under their number and were answered from memory
        self._written: dict[tuple[bytes, int], Document] = {} if fellow is None else fellow._written
        self._lock = threading.Lock()
        self._flows = threading.Event()
        self._flows.set()
        self._closing = threading.Event()
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
        self._closing.set()
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

    def rest(self) -> None:
        """Let the latency pass."""
        self._closing.wait(self.latency)

    def note(self, insert: Insert) -> None:
        """Remember what the server has taken."""
        with self._lock:
            self.inserted += insert.ids

    def remembered(self, body: Document) -> Document | None:
        """The answer to a write that came before under this number, as a primary keeps it."""
        with self._lock:
            found = self._written.get(_write_number(body))
            self.retried += found is not None
        return found

    def remember(self, body: Document, answer: Document) -> None:
        """Keep the answer to a numbered write."""
        with self._lock:
            self._written[_write_number(body)] = answer


class _Link:
    """One client's connection and the server's that belongs to it."""

    def __init__(self, proxy: MongoProxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        self._server = server
        self._sending = threading.Lock()
        self._open: dict[int, tuple[Document, Insert | None, object]] = {}  # by number of the request

    def carry_requests(self) -> None:
        """Client to server, until either hangs up."""
        try:
            while (message := _read(self._client)) is not None:
                self._proxy.wait()
                self._request(message)
        except OSError:
            pass
        _reset(self._server)

    def carry_answers(self) -> None:
        """Server to client, until either hangs up."""
        try:
            while (message := _read(self._server)) is not None:
                self._proxy.wait()
                self._answer(message)
        except OSError:
            pass
        _reset(self._client)

    def _request(self, message: _Message) -> None:
        body, insert = message.body, message.insert
        if self._proxy.refusal is not None and not _is_hello(body):
            self._reply(message.number, self._proxy.refusal)
            return
        if next(iter(body), "") in self._proxy.silent:
            return
        if str(next(iter(body.values()), "")) in self._proxy.forbidden:
            self._reply(message.number, UNAUTHORIZED)
            return
        if "txnNumber" in body and (found := self._proxy.remembered(body)) is not None:
            self._reply(message.number, found)
            return
        fate = None
        if insert is not None:
            self._proxy.rest()
            fate = self._proxy.on_insert(insert)
        self._open[message.number] = (body, insert, fate)
        if isinstance(fate, Instead):
            self._reply(message.number, fate.answer)
        elif fate is Fate.CUT_BEFORE:
            _reset(self._client)
        else:
            self._server.sendall(self._for_server(message, fate))

    def _for_server(self, message: _Message, fate: object) -> bytes:
        """The request as the server gets it: a standalone knows no sessions, and may not see all documents."""
        hidden = fate.ids if isinstance(fate, Without) else ()
        known = {k: v for k, v in message.body.items() if k not in ("lsid", "txnNumber", "$clusterTime")}
        if not hidden and known == message.body:
            return message.raw
        sequences = dict(message.sequences)
        if hidden:
            sent = message.sequences["documents"]
            sequences["documents"] = [one for one in sent if str(bson.decode(one)["_id"]) not in hidden]
            if not sequences["documents"]:  # the server takes no empty insert
                return _op_msg(message.number, 0, {"ping": 1, "$db": message.body["$db"]})
        return _op_msg(message.number, 0, known, sequences)

    def _answer(self, message: _Message) -> None:
        body, insert, fate = self._open.pop(message.answers, ({}, None, None))
        answer = self._changed(message.body, body, insert, fate)
        if "txnNumber" in body:
            self._proxy.remember(body, answer)
        if insert is not None:
            self._proxy.note(insert)
        if fate is Fate.CUT_AFTER:
            _reset(self._client)
            return
        with self._sending:
            self._client.sendall(message.raw if answer == message.body else _repacked(message, answer))

    def _changed(self, answer: Document, asked: Document, insert: Insert | None, fate: object) -> Document:
        if _is_hello(asked) and self._proxy.hello:
            return answer | dict(self._proxy.hello)
        if isinstance(fate, Afterwards):
            return answer | dict(fate.fields)
        if isinstance(fate, Without) and insert is not None:
            return _with_errors(answer, insert, fate)
        return answer

    def _reply(self, answers: int, answer: Mapping[str, Any]) -> None:
        with self._sending:
            self._client.sendall(_op_msg(random.getrandbits(31), answers, answer))


def _with_errors(answer: Document, insert: Insert, fate: Without) -> Document:
    """The server's answer with the errors of the hidden documents, at their places in the client's insert."""
    seen = [place for place, one in enumerate(insert.ids) if one not in fate.ids]
    errors = [error | {"index": seen[error["index"]]} for error in answer.get("writeErrors", ())]
    errors += [{"index": place, **fate.error} for place, one in enumerate(insert.ids) if one in fate.ids]
    return answer | {
        "n": answer.get("n", 0),
        "writeErrors": sorted(errors, key=lambda error: int(error["index"])),
    }


def _write_number(body: Document) -> tuple[bytes, int]:
    return bson.encode(body["lsid"]), int(body["txnNumber"])


def _is_hello(body: Document) -> bool:
    return bool({"hello", "isMaster", "ismaster"} & body.keys())


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
    if rest is None:
        return None
    message = _Message(number, answers, opcode, head + rest)
    if opcode == OP_MSG:
        _take_apart(message, rest)
    elif opcode == OP_QUERY:
        end = rest.index(b"\0", 4) + 1 + 8
        message.body = bson.decode(rest[end : end + int.from_bytes(rest[end : end + 4], "little")])
    elif opcode == OP_REPLY:
        message.body = bson.decode(rest[20:])
    return message


def _take_apart(message: _Message, rest: bytes) -> None:
    """Find body and documents of an OP_MSG (without a checksum: no client of ours sends one)."""
    at = 4
    while at < len(rest):
        kind, at = rest[at], at + 1
        size = int.from_bytes(rest[at : at + 4], "little")
        if kind == 0:
            message.body = bson.decode(rest[at : at + size])
        else:
            end = rest.index(b"\0", at + 4)
            documents = message.sequences.setdefault(rest[at + 4 : end].decode(), [])
            place = end + 1
            while place < at + size:
                length = int.from_bytes(rest[place : place + 4], "little")
                documents.append(rest[place : place + length])
                place += length
        at += size


def _op_msg(
    number: int, answers: int, body: Mapping[str, Any], sequences: Mapping[str, Sequence[bytes]] | None = None
) -> bytes:
    parts = [struct.pack("<i", 0), b"\0", bson.encode(body)]
    for name, documents in (sequences or {}).items():
        sequence = name.encode() + b"\0" + b"".join(documents)
        parts += [b"\1", struct.pack("<i", len(sequence) + 4), sequence]
    payload = b"".join(parts)
    return HEADER.pack(HEADER.size + len(payload), number, answers, OP_MSG) + payload


def _repacked(message: _Message, answer: Document) -> bytes:
    """The same answer with another content."""
    if message.opcode == OP_REPLY:
        payload = message.raw[HEADER.size : HEADER.size + 20] + bson.encode(answer)
        return HEADER.pack(HEADER.size + len(payload), message.number, message.answers, OP_REPLY) + payload
    return _op_msg(message.number, message.answers, answer)
