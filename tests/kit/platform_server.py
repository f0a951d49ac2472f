#!/usr/bin/env python3
"""A simulator of the dispatch platform, newer and older generation, on one port.

By hand (nothing but Python 3.11 is needed)::

    python3 tests/kit/platform_server.py --port 8000 --execute TSLA.US,AAPL.US --every 30

In a test, in the same process::

    with PlatformServer(generation="new", ping_every=5) as server:
        ...                                         # the client registers and connects
        execution_id = server.execute(["TSLA.US"])
        assert server.wait_for(lambda s: s.results_for(execution_id), timeout=10)

In a test, as a process that can be killed and comes back with what it knew: :class:`PlatformProcess`.

What the simulator promises:

- A hash, once given, stays known; with a state file also over a kill -9, and so do the online flags.
- A result is in the journal before its receipt is sent; a command is in the state before it goes out.
- The lists (``results``, ``frames``, ``connections`` …) only grow, in the order of arrival; their times are
  those of ``time.monotonic()``, which the processes of one machine share.
- A session ends "online" unless a close frame was exchanged (``zombies=False`` turns that off).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import http.client
import json
import os
import secrets
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from types import EllipsisType, FrameType, TracebackType
from typing import Any, Self, TypeVar

if not __package__:  # run by hand
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kit.websocket_wire import (
    ABNORMAL,
    BINARY,
    CLOSE,
    PING,
    PONG,
    Messages,
    ProtocolError,
    close_payload,
    frame_bytes,
    handshake_answer,
    parse_close,
    text_frames,
    websocket_key,
)

# ---------------------------------------------------------------------------------------------------------
# Constants
# ---------------------------------------------------------------------------------------------------------

GENERATIONS = ("new", "old")
WRAPPINGS = ("object", "string", "bare")

# The largest message taken from a client, and the largest body of an HTTP request.
MAX_MESSAGE = 16 * 1024 * 1024
# The request line and the headers of one request together.
MAX_HEAD = 64 * 1024
# What the switch `big_frames` sends.
BIG_FRAME = 10 * 1024 * 1024
# The server's limit on a module's description and hash.
MAX_DESCRIPTION = 500
# How much is taken from a socket at once.
MAX_READ = 64 * 1024
# How many connections may wait to be accepted, as when a hundred modules come back at once.
BACKLOG = 1024
# How long a peer may take to answer a close frame before the connection is cut.
CLOSE_TIMEOUT = 1.0
# How much of a frame a line of the log shows.
LOG_TEXT = 160

NOT_JSON = {"status": "error", "message": "JSON格式错误，请发送有效的 JSON 格式消息"}
CLOSING_MESSAGE = "模块正在关闭"
RECEIPT = "receive result"
FAILURE_STATUSES = frozenset({"failure", "failed", "error", "fail"})

# Frames that are no command: a client ignores every one of them (or calls them broken) and lives on.
GARBAGE = (
    "",
    "hello",
    "null",
    "42",
    "NaN",
    "[]",
    "{}",
    '{"message":',
    '{"message": null}',
    '{"message": 42}',
    '{"message": ["execute"]}',
    '{"message": "plain words"}',
    '{"message": "{\\"type\\": \\"execu"}',
    '{"message": "\\ud800"}',
    '{"type": null}',
    '{"type": {"execute": 1}}',
    '{"type": "no such command", "args": {"code_list": ["TSLA.US"]}}',
    "1" * 5000,
    "[" * 100_000,
)


# ---------------------------------------------------------------------------------------------------------
# Switches
# ---------------------------------------------------------------------------------------------------------


class Switches:
    """What can be changed while the server runs, by plain assignment; seconds unless said otherwise."""

    # A JSON ping by the newer server, a WebSocket ping by either; 0 is never.
    ping_every: float = 30.0
    ws_ping_every: float = 0.0
    # The sweep, and the silence after which it takes a session offline.
    sweep: float = 60.0
    zombie_after: float = 120.0
    # An execution without a result for so long is e-mailed.
    execution_timeout: float = 120.0
    # A session whose connection ended without a close frame stays online until it is swept.
    zombies: bool = True
    # From the assignment on, every handshake is refused as "already online", and /module/online says so.
    refuse_online_for: float = 0.0
    # Every handshake is refused as if the hash were not known.
    refuse_unknown: bool = False
    # The client's WebSocket pings are not answered.
    swallow_pings: bool = False
    # The connection is closed right after the handshake, with `close_code` (1006: without a close frame).
    close_after_handshake: bool = False
    close_code: int = 1000
    slow_handshake: float = 0.0
    # Rubbish, or 10 MiB of plain text, after the handshake and in front of every command.
    json_garbage: bool = False
    big_frames: bool = False
    # Outgoing text in fragments of so many bytes; 0 is whole.
    fragment: int = 0
    # The receipt for a result: at all, and wrapped in {"message": …} instead of plain.
    send_receipts: bool = True
    wrap_receipts: bool = False
    # So many results are taken, and the connection reset before the receipt.
    drop_next_result: int = 0
    # A larger message ends the connection with `too_large_code` (1006: without a close frame), unread.
    max_message: int = MAX_MESSAGE
    too_large_code: int = 1009
    # (status, body) of every answer to /module/register.
    register_answer: tuple[int, str] | None = None
    # After a reconnect, every execution without a result is sent again with its execution_id.
    retry_executes: bool = False


SWITCHES: tuple[str, ...] = tuple(Switches.__annotations__)


def checked_switch(name: str, value: object) -> Any:
    """The value as the switch holds it; raises ValueError for an unknown switch or a value it cannot be."""
    if name not in SWITCHES:
        raise ValueError(f"unknown switch {name!r}; there are: {', '.join(SWITCHES)}")
    default = getattr(Switches, name)
    if name == "register_answer":
        if value is None:
            return None
        if isinstance(value, Sequence) and len(value) == 2 and isinstance(value[0], int):
            return (value[0], str(value[1]))
    elif isinstance(default, bool):
        if isinstance(value, (bool, int)):
            return bool(value)
    elif isinstance(value, (bool, int, float)):
        return type(default)(value)
    raise ValueError(f"{name}: got {value!r}, expected something like {default!r}")


# ---------------------------------------------------------------------------------------------------------
# Records
# ---------------------------------------------------------------------------------------------------------


@dataclass
class Connection:
    """One TCP connection; of a WebSocket, `handshake` is when and `status` how it was answered."""

    number: int
    accepted: float
    method: str = ""
    path: str = ""
    query: str = ""
    module_hash: str = ""
    status: int = 0
    handshake: float | None = None
    closed: float | None = None
    close_code: int | None = None
    close_reason: str = ""
    useful: bool = False

    @property
    def is_websocket(self) -> bool:
        """Whether it asked for the WebSocket, granted or not."""
        return self.path == "/websocket"


@dataclass
class RegisterCall:
    """One call of /module/register, with what it was answered."""

    at: float
    params: dict[str, str]
    status: int
    body: str


@dataclass
class Registration:
    """One module the server knows, or (`forgotten`) does not know any more."""

    module_hash: str
    module_id: int
    name: str
    description: str
    params: dict[str, str]
    forgotten: bool = False


@dataclass
class Session:
    """A module's place in the database; times are of the wall clock, because they outlive the process."""

    module_hash: str
    session_id: str
    online: bool
    last_login: float
    last_alive: float


@dataclass
class Frame:
    """One text frame from a client."""

    at: float
    connection: int
    module_hash: str
    text: str


@dataclass
class Result:
    """One result as it came; the same execution may have several."""

    at: float
    module_hash: str
    execution_id: str
    status: str
    text: str
    data: dict[str, Any]


@dataclass
class Mail:
    """An e-mail the operator would have got."""

    at: float
    execution_id: str
    reason: str
    text: str


@dataclass
class Execute:
    """One command; `sent` holds the time of each delivery, and is empty as long as there was none."""

    number: int
    execution_id: str
    module_hash: str
    text: str
    created: float
    sent: list[float] = field(default_factory=list)
    answered: bool = False
    timed_out: bool = False


@dataclass
class Ping:
    """A ping sent to a client; `kind` is "json" or "ws"; `ended` is when its connection did."""

    kind: str
    connection: int
    sent: float
    answered: float | None = None
    ended: float | None = None

    def delay(self, now: float) -> float:
        """The time to the pong; without one, to the end of the connection or to `now`."""
        end = self.answered if self.answered is not None else self.ended
        return (now if end is None else end) - self.sent


# ---------------------------------------------------------------------------------------------------------
# WebSocket
# ---------------------------------------------------------------------------------------------------------


async def read_messages(
    reader: asyncio.StreamReader, limit: Callable[[], int]
) -> AsyncIterator[tuple[int, bytes]]:
    """Whole messages as (opcode, payload); raises ProtocolError, and IncompleteReadError at the end."""
    messages = Messages(limit)
    while data := await reader.read(MAX_READ):
        for message in messages.feed(data):
            yield message
    raise asyncio.IncompleteReadError(b"", None)


# ---------------------------------------------------------------------------------------------------------
# HTTP
# ---------------------------------------------------------------------------------------------------------


@dataclass
class Request:
    """One HTTP request; `query` is raw, header names are in small letters."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes

    @property
    def params(self) -> dict[str, str]:
        """The query's parameters; the last of a name counts."""
        return dict(urllib.parse.parse_qsl(self.query, keep_blank_values=True))


@dataclass
class Response:
    """One HTTP answer; the connection is closed after it."""

    status: int
    body: bytes = b""
    content_type: str = "application/json"

    def to_bytes(self) -> bytes:
        """The answer as it goes on the wire."""
        reason = http.client.responses.get(self.status, "Unknown")
        head = (
            f"HTTP/1.1 {self.status} {reason}\r\nContent-Type: {self.content_type}\r\n"
            f"Content-Length: {len(self.body)}\r\nConnection: close\r\n\r\n"
        )
        return head.encode() + self.body


def json_response(value: object, status: int = 200) -> Response:
    """An answer in JSON, Chinese left readable."""
    return Response(status, as_json(value).encode())


def html_response(status: int, title: str) -> Response:
    """An answer as the framework gives it when a view crashes or there is none."""
    page = f"<!doctype html>\n<html><head><title>{title}</title></head><body><h1>{title}</h1></body></html>\n"
    return Response(status, page.encode(), "text/html; charset=utf-8")


def success(result: object) -> Response:
    """The platform's own envelope for what went well."""
    return json_response({"code": "2000", "message": "成功!", "result": result})


def refusal(code: str, message: str) -> Response:
    """The platform's own envelope for what it does not take."""
    return json_response({"code": code, "message": message, "result": None}, 400)


BAD_DATA = ("3002", "传递数据非法!")
REGISTERED_ALREADY = ("3005", "模块重复注册!")


async def read_request(reader: asyncio.StreamReader) -> Request:
    """The request a connection opens with; raises ValueError when it is none."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.split("\r\n")
    method, target, _version = first.split(" ")
    headers = {
        name.strip().lower(): value.strip()
        for name, _, value in (line.partition(":") for line in lines if line)
    }
    size = int(headers.get("content-length", "0"))
    if not 0 <= size <= MAX_MESSAGE:
        raise ValueError(f"a body of {size} bytes")
    path, _, query = target.partition("?")
    return Request(method, path, query, headers, await reader.readexactly(size))


# ---------------------------------------------------------------------------------------------------------
# What the platform makes of a text, a query, a record: pure
# ---------------------------------------------------------------------------------------------------------


def parse_json(text: str) -> tuple[bool, Any]:
    """Whether the text is JSON, and what it says."""
    try:
        return True, json.loads(text)
    except (ValueError, RecursionError):
        return False, None


def as_json(value: object) -> str:
    """The value in JSON, Chinese left readable, what UTF-8 cannot say escaped."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return text


def is_json_list(text: str) -> bool:
    """Whether the text is a JSON list."""
    return isinstance(parse_json(text)[1], list)


def is_result(data: object) -> bool:
    """Whether a client's object is an execution's result (a confirmation of `shutdown` is none)."""
    if not isinstance(data, dict) or "status" not in data:
        return False
    return data.get("type") == "result" or any(
        key in data for key in ("meta", "execution_id", "workflow_id", "result")
    )


def result_id(data: Mapping[str, Any]) -> str:
    """The execution a result belongs to: `meta.execution_id`, or `execution_id`, or nothing."""
    meta = data.get("meta")
    found = meta.get("execution_id") if isinstance(meta, dict) else None
    return str(found or data.get("execution_id") or "")


def mail_text(data: Mapping[str, Any]) -> str:
    """What the e-mail about a failure says."""
    return next((str(data[key]) for key in ("error", "message", "error_message") if data.get(key)), "")


def wrapped(command: Mapping[str, Any], wrap: str) -> str:
    """A command as it goes to the client."""
    if wrap not in WRAPPINGS:
        raise ValueError(f"wrap: got {wrap!r}, expected one of {', '.join(WRAPPINGS)}")
    text = as_json(command)
    if wrap == "bare":
        return text
    return as_json({"message": text if wrap == "string" else command})


def iso(wall: float) -> str:
    """A time of the wall clock as the platform writes it."""
    return datetime.fromtimestamp(wall).isoformat(timespec="microseconds")


def shown(text: str) -> str:
    """A text on one line of the log."""
    line = text if len(text) <= LOG_TEXT else f"{text[:LOG_TEXT]}… ({len(text)} characters)"
    return line.replace("\n", "\\n").encode("utf-8", "backslashreplace").decode()


def shortened(name: str) -> str:
    """A hash or an id, short enough for a line of the log."""
    return name if len(name) <= 12 else f"{name[:8]}…"


# ---------------------------------------------------------------------------------------------------------
# What outlives the process
# ---------------------------------------------------------------------------------------------------------

Record = TypeVar("Record")


class Journal:
    """Records as lines of JSON, each in the file when `append` returns; without a path, nowhere."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: int | None = None

    def append(self, record: Result | Mail | Registration | Session | Execute) -> None:
        """Write one record; a single write, so that a kill leaves it whole or not at all."""
        if self._path is None:
            return
        if self._file is None:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            size = os.fstat(self._file).st_size
            if size and os.pread(self._file, 1, size - 1) != b"\n":
                os.write(self._file, b"\n")
        line = json.dumps({"kind": type(record).__name__, **vars(record)})
        os.write(self._file, line.encode() + b"\n")

    def close(self) -> None:
        """Close the file, until the next record."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def read_journal(path: Path | None, record: type[Record]) -> list[Record]:
    """The journal's records of one class, a torn line left out."""
    if path is None or not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        sound, fields = parse_json(line)
        if sound and isinstance(fields, dict) and fields.pop("kind", None) == record.__name__:
            found.append(record(**fields))
    return found


# ---------------------------------------------------------------------------------------------------------
# The server
# ---------------------------------------------------------------------------------------------------------


class Pulse:
    """Wakes everything that waits for it, each time it fires; used on the loop's thread only."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def fire(self) -> None:
        """Wake all who wait now."""
        event, self._event = self._event, asyncio.Event()
        event.set()

    async def wait(self, timeout: float | None) -> None:
        """Wait for the next firing, at most so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._event.wait()


@dataclass
class Link:
    """An open WebSocket; `clean` as soon as either side has sent a close frame."""

    connection: Connection
    writer: asyncio.StreamWriter
    module_hash: str
    session_id: str
    json_pings: list[Ping] = field(default_factory=list)
    ws_pings: dict[bytes, Ping] = field(default_factory=dict)
    clean: bool = False

    def write(self, data: bytes) -> None:
        """Send, unless the connection is going down."""
        if not self.writer.is_closing():
            self.writer.write(data)

    def reset(self) -> None:
        """Cut the connection with an RST."""
        sock = self.writer.get_extra_info("socket")
        if sock is not None and not self.writer.is_closing():
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


class PlatformServer(Switches):
    """The platform on a thread of its own; every public method may be called from any other thread.

    Use it as a context manager, or call :meth:`start` and :meth:`stop`. Each switch of
    :class:`Switches` is an argument and an attribute.
    """

    def __init__(
        self,
        generation: str = "new",
        port: int = 0,
        host: str = "127.0.0.1",
        state: Path | str | None = None,
        journal: Path | str | None = None,
        log: Callable[[str], None] | None = None,
        **switches: object,
    ) -> None:
        if generation not in GENERATIONS:
            raise ValueError(f"generation: got {generation!r}, expected one of {', '.join(GENERATIONS)}")
        self.generation = generation
        self.host = host
        self.port = port
        self._log = log
        self._salt = secrets.token_hex(16)
        self._state_path = Path(state) if state is not None else None
        self._journal_path = Path(journal) if journal is not None else None
        self._condition = threading.Condition(threading.RLock())
        self._version = 0
        self._refused_until = 0.0
        self._connections: list[Connection] = []
        self._register_calls: list[RegisterCall] = []
        self._registrations: dict[str, Registration] = {}
        self._sessions: dict[str, Session] = {}
        self._links: dict[str, Link] = {}
        self._frames: list[Frame] = []
        self._bad_frames: list[Frame] = []
        self._results: list[Result] = []
        self._mailed: list[Mail] = []
        self._executes: list[Execute] = []
        self._pings: list[Ping] = []
        self._thawed = threading.Event()
        self._ready = threading.Event()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._state = Journal(self._state_path)
        self._journal = Journal(self._journal_path)
        self.set_switches(switches)
        self._load()

    def __setattr__(self, name: str, value: Any) -> None:
        """Switches take effect at once: whatever waits for an interval looks at it again."""
        super().__setattr__(name, checked_switch(name, value) if name in SWITCHES else value)
        if name == "refuse_online_for":
            self._refused_until = time.monotonic() + float(value)
        if name in SWITCHES:
            self._on_loop(lambda: self._switched.fire())

    # --- life ---------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Listen and serve; returns when connections are accepted. Raises OSError when the port is taken."""
        listener = socket.create_server((self.host, self.port))
        self.port = listener.getsockname()[1]
        self._ready.clear()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._main(listener)), name="platform-server", daemon=True
        )
        self._thread.start()
        self._ready.wait()
        self._say(
            f"listening on {self.url} as the {'newer' if self.generation == 'new' else 'older'} generation"
        )
        return self

    def stop(self) -> None:
        """Close every connection with 1001 and stop listening; returns when the thread has ended."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self.thaw()
        self._on_loop(lambda: self._stopping.set())
        thread.join()
        self._journal.close()
        self._state.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # --- what a test reads --------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """Where the platform is, without a slash at the end."""
        return f"http://{self.host}:{self.port}"

    @property
    def registrations(self) -> list[Registration]:
        """The modules the server knows."""
        with self._condition:
            return [one for one in self._registrations.values() if not one.forgotten]

    @property
    def register_calls(self) -> list[RegisterCall]:
        """Every call of /module/register, also those refused."""
        with self._condition:
            return list(self._register_calls)

    @property
    def sessions(self) -> list[Session]:
        """The modules the database calls online, zombies among them."""
        with self._condition:
            return [session for session in self._sessions.values() if session.online]

    @property
    def connected(self) -> list[str]:
        """The hashes of the modules whose WebSocket is open, in the order of their handshakes."""
        with self._condition:
            return list(self._links)

    @property
    def connections(self) -> list[Connection]:
        """Every TCP connection, those of the control channel left out."""
        with self._condition:
            return [one for one in self._connections if not one.path.startswith("/_control/")]

    @property
    def dials(self) -> list[Connection]:
        """The connections that asked for the WebSocket, refused ones among them."""
        return [connection for connection in self.connections if connection.is_websocket]

    @property
    def frames(self) -> list[Frame]:
        """Every text frame received."""
        with self._condition:
            return list(self._frames)

    @property
    def bad_frames(self) -> list[Frame]:
        """The frames that the server's generation does not understand."""
        with self._condition:
            return list(self._bad_frames)

    @property
    def results(self) -> list[Result]:
        """Every result received, also before a restart when there is a journal."""
        with self._condition:
            return list(self._results)

    def results_for(self, execution_id: str) -> list[Result]:
        """The results of one execution."""
        return [result for result in self.results if result.execution_id == execution_id]

    @property
    def mailed(self) -> list[Mail]:
        """What the operator would have been e-mailed."""
        with self._condition:
            return list(self._mailed)

    @property
    def executes(self) -> list[Execute]:
        """Every command, also those that could not be delivered yet."""
        with self._condition:
            return list(self._executes)

    @property
    def unanswered(self) -> list[str]:
        """The execution_ids without a result."""
        return [one.execution_id for one in self.executes if one.execution_id and not one.answered]

    @property
    def shutdown_confirmations(self) -> list[Frame]:
        """The frames that confirm a `shutdown`."""
        wanted = {"status": "success", "message": CLOSING_MESSAGE}
        return [frame for frame in self.frames if parse_json(frame.text)[1] == wanted]

    @property
    def pings(self) -> list[Ping]:
        """Every ping sent."""
        with self._condition:
            return list(self._pings)

    def pong_delays(self, kind: str = "") -> list[float]:
        """For each ping sent ("json", "ws"; both by default) the time to its pong; without one, its age."""
        now = time.monotonic()
        return [ping.delay(now) for ping in self.pings if kind in ("", ping.kind)]

    def wait_for(self, predicate: Callable[[PlatformServer], object], timeout: float) -> bool:
        """Wait until the predicate holds; it is asked again after each event. False when time runs out."""
        with self._condition:
            return bool(self._condition.wait_for(lambda: predicate(self), timeout))

    def summary(self) -> dict[str, Any]:
        """The state in short, as the control channel tells it."""
        with self._condition:
            return {
                "version": self._version,
                "generation": self.generation,
                "pid": os.getpid(),
                "registrations": [asdict(one) for one in self.registrations],
                "register_calls": len(self._register_calls),
                "sessions": [asdict(one) for one in self.sessions],
                "connected": self.connected,
                "connections": len(self.connections),
                "dials": len(self.dials),
                "frames": len(self._frames),
                "bad_frames": len(self._bad_frames),
                "results": len(self._results),
                "mailed": [asdict(one) for one in self._mailed],
                "executes": len(self._executes),
                "unanswered": self.unanswered,
                "shutdown_confirmations": len(self.shutdown_confirmations),
                "pong_delays": self.pong_delays(),
                "switches": {name: getattr(self, name) for name in SWITCHES},
            }

    # --- what a test does ---------------------------------------------------------------------------------

    def set_switches(self, switches: Mapping[str, object]) -> None:
        """Change several switches; raises ValueError, before any is changed, for one that cannot be."""
        checked = {name: checked_switch(name, value) for name, value in switches.items()}
        for name, value in checked.items():
            setattr(self, name, value)

    def know(self, module_hash: str, name: str = "known before") -> str:
        """Make a hash known, as if it had been registered in an earlier life of the server."""
        with self._condition:
            number = len(self._registrations) + 1
            known = self._registrations[module_hash] = Registration(module_hash, number, name, "", {})
            self._changed(known)
        return module_hash

    def forget(self, module_hash: str) -> None:
        """Make a hash unknown; an open connection stays open."""
        with self._condition:
            known = self._registrations.get(module_hash)
            if known is not None:
                known.forgotten = True
                self._changed(known)

    def execute(
        self,
        codes: object,
        args_key: str | None = "code_list",
        execution_id: str | None = None,
        wrap: str = "object",
        meta: Mapping[str, Any] | EllipsisType | None = ...,
        module_hash: str | None = None,
        **raw: object,
    ) -> str:
        """Send an `execute` and return its execution_id ("" when it has none).

        `codes` goes out as it is under `args_key` (None: no `args`). `meta` is made up when not given, left
        out when None, else sent as it is (with `execution_id` put in when that is given too). `raw` puts
        further keys at the top, or others in place of `type`, `meta`, `args`. A module that is not connected
        gets nothing now: the command is kept for :meth:`resend` and for the switch `retry_executes`.
        """
        command: dict[str, Any] = {"type": "execute"}
        if isinstance(meta, EllipsisType):
            now = datetime.now().isoformat(timespec="seconds")
            command["meta"] = {
                "execution_id": execution_id or str(uuid.uuid4()),
                "execution_time": now,
                "workflow_id": "1",
                "workflow_name": "simulated",
            }
        elif meta is not None:
            command["meta"] = {**meta, "execution_id": execution_id} if execution_id else dict(meta)
        if args_key is not None:
            command["args"] = {args_key: codes}
        command.update(raw)
        return self._keep_and_deliver(command, wrapped(command, wrap), module_hash)

    def resend(self, execution_id: str) -> None:
        """Send a command again, word for word, as when the operator clicks again; KeyError without one."""
        found = [one for one in self.executes if one.execution_id == execution_id]
        if not found:
            raise KeyError(execution_id)
        self._on_loop(lambda: self._deliver(found[0]))

    def send_text(self, text: str, module_hash: str | None = None) -> None:
        """Send any text frame to a module, by default the one that connected last."""
        self._on_loop(lambda: self._send_text(self._target(module_hash), text))

    def shutdown_module(self, wrap: str = "object", module_hash: str | None = None) -> None:
        """Send `shutdown`."""
        self._say("shutdown →")
        self.send_text(wrapped({"type": "shutdown"}, wrap), module_hash)

    def ping_now(self) -> None:
        """Send one JSON ping (newer) and one WebSocket ping to every module, whatever the intervals are."""

        def ping_all() -> None:
            for link in list(self._links.values()):
                if self.generation == "new":
                    self._ping_json(link)
                self._ping_ws(link)

        self._on_loop(ping_all)

    def kill_connections(self) -> None:
        """Cut every WebSocket with an RST; returns when that is done (at once while frozen: it follows)."""
        done = threading.Event()

        def kill() -> None:
            for link in list(self._links.values()):
                self._say(f"reset {shortened(link.module_hash)}")
                link.reset()
            done.set()

        self._on_loop(kill)
        if self._thawed.is_set() and threading.current_thread() is not self._thread:
            done.wait(CLOSE_TIMEOUT)

    def close_connections(self, code: int = 1000) -> None:
        """Close every WebSocket with a close frame (1006: by FIN alone)."""

        def close_all() -> None:
            for link in list(self._links.values()):
                self._close(link, code)

        self._on_loop(close_all)

    def freeze(self) -> None:
        """Stand still like a stopped process: nothing is accepted, read or sent until :meth:`thaw`."""
        frozen = threading.Event()
        self._thawed.clear()

        def stand_still() -> None:
            frozen.set()
            self._thawed.wait()

        self._on_loop(stand_still)
        frozen.wait()

    def thaw(self) -> None:
        """Go on."""
        self._thawed.set()

    # --- the loop -----------------------------------------------------------------------------------------

    async def _main(self, listener: socket.socket) -> None:
        """The server's thread from start to end."""
        self._stopping, self._switched, self._news = asyncio.Event(), Pulse(), Pulse()
        self._thawed.set()
        server = await asyncio.start_server(self._serve, sock=listener, limit=MAX_HEAD, backlog=BACKLOG)
        self._loop = asyncio.get_running_loop()
        self._spawn(self._sweep())
        for execute in self._executes:
            self._spawn(self._watch(execute))
        self._ready.set()
        await self._stopping.wait()
        server.close()
        for link in list(self._links.values()):
            self._close(link, 1001)
        deadline = time.monotonic() + CLOSE_TIMEOUT
        while any(one.closed is None for one in self._connections) and time.monotonic() < deadline:
            await self._news.wait(deadline - time.monotonic())
        self._loop = None

    def _on_loop(self, action: Callable[[], object]) -> None:
        """Have the server's thread do something; nothing happens when it has ended."""
        loop: asyncio.AbstractEventLoop | None = self.__dict__.get("_loop")
        if loop is not None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(action)

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        """Start a task and hold on to it until it ends."""
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _interval(self, switch: str, started: float | None = None) -> None:
        """Wait for the seconds a switch holds, also when it is changed meanwhile; 0 waits for a change."""
        begun = time.monotonic() if started is None else started
        while True:
            seconds = float(getattr(self, switch))
            left = begun + seconds - time.monotonic()
            if seconds > 0 and left <= 0:
                return
            await self._switched.wait(left if seconds > 0 else None)

    def _say(self, line: str) -> None:
        """One line of the log."""
        if self._log is not None:
            self._log(line)

    def _changed(self, *records: Registration | Session | Execute) -> None:
        """Store what changed and tell those who wait; call it with the condition held."""
        for record in records:
            self._state.append(record)
        self._version += 1
        self._condition.notify_all()
        self._on_loop(lambda: self._news.fire())

    def _load(self) -> None:
        """Take over what an earlier process left: the database, and the journal's results."""
        with self._condition:
            for known in read_journal(self._state_path, Registration):
                self._registrations[known.module_hash] = known
            for session in read_journal(self._state_path, Session):
                session.online = session.online and self.zombies
                self._sessions[session.module_hash] = session
            executes = {one.number: one for one in read_journal(self._state_path, Execute)}
            self._executes.extend(executes.values())
            self._results.extend(read_journal(self._journal_path, Result))
            self._mailed.extend(read_journal(self._journal_path, Mail))
            answered = {result.execution_id for result in self._results}
            for execute in self._executes:
                execute.answered = execute.answered or execute.execution_id in answered

    # --- connections --------------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One TCP connection from its first byte to its end."""
        # asyncio does so for listeners of its own making; else a command waits for the receipt before it
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._condition:
            connection = Connection(len(self._connections), time.monotonic())
            self._connections.append(connection)
            self._changed()
        try:
            try:
                request = await read_request(reader)
            except ValueError:
                writer.write(html_response(400, "Bad Request").to_bytes())
                return
            connection.method, connection.path, connection.query = request.method, request.path, request.query
            if request.path == "/websocket":
                await self._websocket(connection, request, reader, writer)
            else:
                response = await self._answer(request)
                connection.status = response.status
                writer.write(response.to_bytes())
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # the peer went away, which its record says
        finally:
            writer.close()
            with self._condition:
                connection.closed = time.monotonic()
                self._changed()

    async def _websocket(
        self,
        connection: Connection,
        request: Request,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        """The handshake, and what follows when it is granted."""
        await asyncio.sleep(self.slow_handshake)
        key = websocket_key(request.method, request.headers)
        module_hash = request.query.rpartition("hash=")[2] if "hash=" in request.query else ""
        connection.module_hash = module_hash
        why = "no WebSocket handshake" if key is None else self._refused(module_hash)
        with self._condition:
            connection.handshake = time.monotonic()
            connection.status = 101 if not why else 400 if key is None else 403
            if not why:
                now = time.time()
                session = Session(module_hash, str(uuid.uuid4()), True, now, now)
                self._sessions[module_hash] = session
                link = Link(connection, writer, module_hash, session.session_id)
                self._links[module_hash] = link
                self._state.append(session)
            self._changed()
        if why or key is None:
            self._say(f"handshake refused, {connection.status}: {why}, hash {module_hash or '(none)'}")
            writer.write(Response(connection.status, b"", "text/plain").to_bytes())
            return
        self._say(f"connected {shortened(module_hash)} (session {shortened(session.session_id)})")
        link.write(handshake_answer(key))
        pingers = [self._spawn(self._ping_loop(link, kind)) for kind in ("json", "ws")]
        try:
            await self._converse(link, reader)
        finally:
            for pinger in pingers:
                pinger.cancel()
            self._ended(link)

    def _knows(self, module_hash: str) -> bool:
        """Whether the hash is in the database."""
        known = self._registrations.get(module_hash)
        return known is not None and not known.forgotten

    def _refused(self, module_hash: str) -> str:
        """Why a handshake is refused; empty when it is not. The client is not told."""
        session = self._sessions.get(module_hash)
        if not module_hash:
            return "no hash"
        if self.refuse_unknown or not self._knows(module_hash):
            return "unknown hash"
        if time.monotonic() < self._refused_until or (session is not None and session.online):
            return "already online"
        return ""

    async def _converse(self, link: Link, reader: asyncio.StreamReader) -> None:
        """Everything after the handshake, until the connection ends."""
        if self.close_after_handshake:
            self._close(link, self.close_code)
        else:
            self._send_noise(link)
            if self.retry_executes:
                for execute in self.executes:
                    mine = execute.module_hash in ("", link.module_hash)
                    if mine and execute.execution_id and not execute.answered:
                        execute.module_hash = link.module_hash
                        self._deliver(execute)
        try:
            async for opcode, payload in read_messages(reader, lambda: self.max_message):
                if opcode == CLOSE:
                    self._closed_by_peer(link, payload)
                    return
                if not link.clean:
                    self._received(link, opcode, payload)
        except ProtocolError as error:
            self._say(f"protocol error by {shortened(link.module_hash)}: {error}")
            self._close(link, self.too_large_code if error.code == 1009 else error.code)
        except UnicodeDecodeError:
            self._say(f"protocol error by {shortened(link.module_hash)}: a text frame that is not UTF-8")
            self._close(link, 1007)

    def _closed_by_peer(self, link: Link, payload: bytes) -> None:
        """A close frame came: answer it, unless it is the answer to ours."""
        code, reason = parse_close(payload)
        if not link.clean:
            link.clean = True
            link.connection.close_code, link.connection.close_reason = code, reason
            link.write(frame_bytes(CLOSE, payload[:2]))

    def _close(self, link: Link, code: int) -> None:
        """Close from this side: the session is offline at once, the socket when the peer has answered."""
        if link.clean:
            return
        link.connection.close_code = code
        if code == ABNORMAL:
            link.writer.close()
            return
        link.clean = True
        link.write(frame_bytes(CLOSE, close_payload(code)))
        self._offline(link)
        if self._loop is not None:
            self._loop.call_later(CLOSE_TIMEOUT, link.writer.transport.abort)

    def _offline(self, link: Link) -> None:
        """Take a link's session offline and let the module connect again."""
        with self._condition:
            session = self._sessions.get(link.module_hash)
            if session is not None and session.session_id == link.session_id:
                session.online = False
                self._state.append(session)
            if self._links.get(link.module_hash) is link:
                del self._links[link.module_hash]
            self._changed()

    def _ended(self, link: Link) -> None:
        """The connection is gone; without a close frame the session stays online until it is swept."""
        now = time.monotonic()
        for ping in [*link.json_pings, *link.ws_pings.values()]:
            ping.ended = now
        code = link.connection.close_code = link.connection.close_code or ABNORMAL
        if link.clean or not self.zombies:
            self._offline(link)
        else:
            with self._condition:
                if self._links.get(link.module_hash) is link:
                    del self._links[link.module_hash]
                self._changed()
        left = "" if link.clean or not self.zombies else ", its session stays online"
        self._say(f"disconnected {shortened(link.module_hash)}, code {code}{left}")

    # --- frames -------------------------------------------------------------------------------------------

    def _received(self, link: Link, opcode: int, payload: bytes) -> None:
        """One message or control frame of a client, a close frame excepted."""
        now = time.monotonic()
        link.connection.useful = True
        if opcode == PING:
            if not self.swallow_pings:
                link.write(frame_bytes(PONG, payload))
        elif opcode == PONG:
            self._pong_ws(link, payload, now)
        elif opcode == BINARY:
            self._bad_frame(Frame(now, link.connection.number, link.module_hash, repr(payload)))
        else:
            self._received_text(
                link, Frame(now, link.connection.number, link.module_hash, payload.decode("utf-8"))
            )

    def _received_text(self, link: Link, frame: Frame) -> None:
        """A text frame: it moves the liveness clock, whatever it says."""
        with self._condition:
            self._frames.append(frame)
            session = self._sessions.get(link.module_hash)
            if session is not None and session.session_id == link.session_id:
                session.last_alive = time.time()
                self._state.append(session)
            self._changed()
        if self.generation == "old" and frame.text == "heartbeat":
            self._say(f"heartbeat ← {shortened(link.module_hash)}")
            self._write_text(link, "heartbeat confirm")
            return
        sound, data = parse_json(frame.text)
        if not sound:
            self._bad_frame(frame)
            if self.generation == "new":
                self._write_text(link, as_json(NOT_JSON))
        elif is_result(data):
            self._received_result(link, frame, data)
        elif isinstance(data, dict) and data.get("type") == "pong":
            self._pong_json(link, frame)
        else:
            self._say(f"text ← {shown(frame.text)}")

    def _bad_frame(self, frame: Frame) -> None:
        """Record a frame that makes no sense to the server."""
        with self._condition:
            self._bad_frames.append(frame)
            self._changed()
        asked = " (a module asks so once which generation this is)" if frame.text == "heartbeat" else ""
        self._say(f"not JSON ← {shown(frame.text)}{asked}")

    def _received_result(self, link: Link, frame: Frame, data: dict[str, Any]) -> None:
        """A result: into the journal first, then the receipt."""
        execution_id, status = result_id(data), str(data["status"])
        result = Result(frame.at, link.module_hash, execution_id, status, frame.text, data)
        failed = status in FAILURE_STATUSES
        with self._condition:
            self._journal.append(result)
            self._results.append(result)
            for execute in self._executes:
                if execution_id and execute.execution_id == execution_id:
                    execute.answered = True
                    self._state.append(execute)
            if failed:
                self._mail(Mail(frame.at, execution_id, status, mail_text(data)))
            self._changed()
        self._say(f"result ← {shortened(execution_id) or '(no execution_id)'} {status}: {shown(frame.text)}")
        if self.drop_next_result > 0:
            self.drop_next_result -= 1
            link.reset()
        elif self.send_receipts:
            self._write_text(link, json.dumps({"message": RECEIPT}) if self.wrap_receipts else RECEIPT)

    def _mail(self, mail: Mail) -> None:
        """E-mail the operator; call it with the condition held."""
        self._journal.append(mail)
        self._mailed.append(mail)
        self._say(f"e-mail to the operator: {shortened(mail.execution_id)} {mail.reason}: {shown(mail.text)}")

    def _write_text(self, link: Link, text: str) -> None:
        """Send a text frame on an open link."""
        for data in text_frames(text, self.fragment):
            link.write(data)

    def _send_noise(self, link: Link) -> None:
        """What the switches put in front of a command."""
        if self.json_garbage:
            for text in GARBAGE:
                self._write_text(link, text)
        if self.big_frames:
            self._write_text(link, json.dumps({"message": "x" * (BIG_FRAME - len('{"message": ""}'))}))

    # --- commands -----------------------------------------------------------------------------------------

    def _target(self, module_hash: str | None) -> str:
        """The module meant: the one given, else the last connected, the last seen, the last known."""
        with self._condition:
            if module_hash is not None:
                return module_hash
            seen = sorted(self._sessions.values(), key=lambda one: one.last_login)
            known = [
                *(one.module_hash for one in self.registrations),
                *(one.module_hash for one in seen),
                *self._links,
            ]
            return known[-1] if known else ""

    def _keep_and_deliver(self, command: Mapping[str, Any], text: str, module_hash: str | None) -> str:
        """Write a command down, and only then send it."""
        execution_id = result_id(command)
        with self._condition:
            target = self._target(module_hash)
            execute = Execute(len(self._executes), execution_id, target, text, time.time())
            self._executes.append(execute)
            self._changed(execute)

        def deliver_and_watch() -> None:
            self._deliver(execute)
            self._spawn(self._watch(execute))

        self._on_loop(deliver_and_watch)
        return execution_id

    def _deliver(self, execute: Execute) -> None:
        """Send a command to its module, if that is connected."""
        link = self._links.get(execute.module_hash)
        name = shortened(execute.execution_id) or "(no execution_id)"
        if link is None or link.clean:
            self._say(f"execute {name} kept: its module is not connected")
            return
        self._send_noise(link)
        self._say(f"execute → {name}: {shown(execute.text)}")
        with self._condition:
            execute.sent.append(time.monotonic())
            self._changed(execute)
        self._write_text(link, execute.text)

    def _send_text(self, module_hash: str, text: str) -> None:
        """Send any text to a module, if that is connected."""
        link = self._links.get(module_hash)
        if link is None or link.clean:
            self._say(f"not sent, the module is not connected: {shown(text)}")
            return
        self._say(f"text → {shown(text)}")
        self._write_text(link, text)

    async def _watch(self, execute: Execute) -> None:
        """Mail the operator when an execution has no result in time."""
        if not execute.execution_id or execute.answered or execute.timed_out:
            return
        await self._interval("execution_timeout", time.monotonic() - (time.time() - execute.created))
        with self._condition:
            if not execute.answered:
                execute.timed_out = True
                text = f"no result within {self.execution_timeout:g} s"
                self._mail(Mail(time.monotonic(), execute.execution_id, "timed out", text))
                self._changed(execute)

    def execute_every(
        self, codes: Sequence[str], every: float, wrap: str = "object", args_key: str = "code_list"
    ) -> None:
        """Send an `execute` as soon as a module is connected and, unless `every` is 0, again and again."""

        async def repeat() -> None:
            while True:
                while not self._links:
                    await self._news.wait(None)
                self.execute(list(codes), args_key=args_key, wrap=wrap)
                if every <= 0:
                    return
                await asyncio.sleep(every)

        self._on_loop(lambda: self._spawn(repeat()))

    # --- keeping alive ------------------------------------------------------------------------------------

    async def _ping_loop(self, link: Link, kind: str) -> None:
        """The pings of one kind on one link."""
        if kind == "json" and self.generation == "old":
            return
        while True:
            await self._interval("ping_every" if kind == "json" else "ws_ping_every")
            if kind == "json":
                self._ping_json(link)
            else:
                self._ping_ws(link)

    def _ping_json(self, link: Link) -> None:
        """Send the newer server's ping."""
        if link.clean:
            return
        ping = Ping("json", link.connection.number, time.monotonic())
        with self._condition:
            self._pings.append(ping)
            link.json_pings.append(ping)
            self._changed()
        self._say(f"ping → {shortened(link.module_hash)}")
        self._write_text(link, json.dumps({"type": "ping", "timestamp": iso(time.time())}))

    def _ping_ws(self, link: Link) -> None:
        """Send a ping of the WebSocket itself."""
        if link.clean:
            return
        ping = Ping("ws", link.connection.number, time.monotonic())
        payload = str(len(self._pings)).encode()
        with self._condition:
            self._pings.append(ping)
            link.ws_pings[payload] = ping
            self._changed()
        link.write(frame_bytes(PING, payload))

    def _pong_json(self, link: Link, frame: Frame) -> None:
        """A JSON pong answers the oldest JSON ping: its timestamp is the client's own."""
        delay = "unasked"
        with self._condition:
            if link.json_pings:
                ping = link.json_pings.pop(0)
                ping.answered = frame.at
                delay = f"after {1000 * (frame.at - ping.sent):.0f} ms"
            self._changed()
        self._say(f"pong ← {shortened(link.module_hash)} {delay}")

    def _pong_ws(self, link: Link, payload: bytes, now: float) -> None:
        """A WebSocket pong answers its ping and those before it."""
        with self._condition:
            if payload in link.ws_pings:
                for earlier in list(link.ws_pings):
                    link.ws_pings.pop(earlier).answered = now
                    if earlier == payload:
                        break
            self._changed()

    async def _sweep(self) -> None:
        """Take offline who was silent for too long; the older server spares open connections."""
        while True:
            await self._interval("sweep")
            for session in self.sessions:
                link = self._links.get(session.module_hash)
                silent = time.time() - session.last_alive
                if silent <= self.zombie_after or (link is not None and self.generation == "old"):
                    continue
                self._say(f"swept {shortened(session.module_hash)}, silent for {silent:.1f} s")
                with self._condition:
                    session.online = False
                    self._changed(session)
                if link is not None:
                    self._close(link, 1000)

    # --- HTTP ---------------------------------------------------------------------------------------------

    async def _answer(self, request: Request) -> Response:
        """The answer to any request but the WebSocket's."""
        path = request.path.rstrip("/")
        if path.startswith("/_control/"):
            response = await self._control(request, path.removeprefix("/_control/"))
            response.body += b"\n"
            return response
        if path == "/module/register" and request.method == "GET":
            return self._register(request.params)
        if path == "/module/online" and request.method == "GET":
            return self._online()
        if path == "/module/send_message" and request.method == "POST":
            return self._send_message(request)
        return html_response(404, "Not Found")

    def _register(self, params: dict[str, str]) -> Response:
        """GET /module/register."""
        if self.register_answer is not None:
            status, body = self.register_answer
            kind = "application/json" if parse_json(body)[0] else "text/html; charset=utf-8"
            response = Response(status, body.encode(), kind)
        else:
            response = self._registered(params)
        text = response.body.decode()
        with self._condition:
            self._register_calls.append(RegisterCall(time.monotonic(), params, response.status, text))
            self._changed()
        self._say(f"register {params.get('name', '(no name)')}: {response.status} {shown(text)}")
        return response

    def _registered(self, params: dict[str, str]) -> Response:
        """What the view does with the parameters, by generation."""
        name, description = params.get("name", ""), params.get("description", "")
        new = self.generation == "new"
        if new and not {"input_data", "output_data"} <= params.keys():
            return html_response(500, "Server Error (500)")
        lists = ["input_data", "output_data"] if new else []
        wrong = (
            not name
            or len(description) > MAX_DESCRIPTION
            or not all(is_json_list(params[key]) for key in lists)
        )
        if wrong or not (new or parse_json(params.get("dataRequirement", "[]"))[0]):
            return refusal(*BAD_DATA)
        module_hash = self._hash(name, description, params.get("modelHash", "") if new else "")
        with self._condition:
            if self._knows(module_hash):
                return refusal(*REGISTERED_ALREADY)
            number = len(self._registrations) + 1
            known = Registration(module_hash, number, name, description, params)
            self._registrations[module_hash] = known
            self._changed(known)
        return success({"hash": module_hash, "module_id": number} if new else {"hash": module_hash})

    def _hash(self, *values: str) -> str:
        """A decimal number in a string, negative as often as not, and another one in each process."""
        digest = hashlib.sha256(json.dumps([self._salt, *values]).encode()).digest()
        return str(int.from_bytes(digest[:8], "big", signed=True))

    def _online(self) -> Response:
        """GET /module/online: whom the database calls online."""
        with self._condition:
            sessions = {one.module_hash: one for one in self.sessions}
            if time.monotonic() < self._refused_until:
                for module_hash in [one.module_hash for one in self.registrations]:
                    sessions.setdefault(module_hash, Session(module_hash, str(uuid.uuid4()), True, 0.0, 0.0))
            if self.refuse_unknown:
                sessions = {}
            rows = [
                {
                    "module_id": known.module_id,
                    "name": known.name,
                    "module_hash": module_hash,
                    "alive": True,
                    "session_id": session.session_id,
                    "last_alive_time": iso(session.last_alive),
                    "last_login_time": iso(session.last_login),
                }
                for module_hash, session in sessions.items()
                if self._knows(module_hash) and (known := self._registrations[module_hash])
            ]
        return success(rows)

    def _send_message(self, request: Request) -> Response:
        """POST /module/send_message: the message goes to the module as a string inside `message`.

        Taken are a form or a JSON object with `message` and, if it is not for the last connected, `hash`;
        or a bare command.
        """
        text = request.body.decode("utf-8", "replace")
        sound, data = parse_json(text)
        fields: dict[str, Any] = (
            data if sound and isinstance(data, dict) else dict(urllib.parse.parse_qsl(text))
        )
        message = fields.get("message", fields if "type" in fields else None)
        module_hash = self._target(str(fields["hash"]) if fields.get("hash") else None)
        if message is None or module_hash not in self._links:
            return refusal(*BAD_DATA)
        content = message if isinstance(message, str) else as_json(message)
        frame = as_json({"message": content})
        command = parse_json(content)[1]
        if isinstance(command, dict) and command.get("type") == "execute":
            self._keep_and_deliver(command, frame, module_hash)
        else:
            self.send_text(frame, module_hash)
        return success(None)

    # --- the control channel ------------------------------------------------------------------------------

    async def _control(self, request: Request, action: str) -> Response:
        """What is under /_control/: JSON in, JSON out."""
        try:
            if request.method == "GET":
                return await self._control_read(action, request.params)
            arguments = json.loads(request.body or b"{}")
            if not isinstance(arguments, dict):
                raise ValueError("the body must be a JSON object")
            return json_response(self._control_do(action, arguments))
        except (KeyError, TypeError, ValueError) as error:
            return json_response({"error": f"{type(error).__name__}: {error}"}, 400)

    async def _control_read(self, action: str, params: Mapping[str, str]) -> Response:
        """GET; /state?pid=PID&after=VERSION&timeout=SECONDS waits for a newer version of that process.

        /connected?timeout=SECONDS waits for a module, and is the hashes of those that are connected.
        /last_result?timeout=SECONDS waits for a result, and is what the module sent; null: there is none.
        """
        deadline = time.monotonic() + float(params.get("timeout", "0"))
        if action == "connected":
            while not self.connected and time.monotonic() < deadline:
                await self._news.wait(deadline - time.monotonic())
            return json_response(self.connected)
        if action == "last_result":
            while not self._results and time.monotonic() < deadline:
                await self._news.wait(deadline - time.monotonic())
            return json_response(self._results[-1].data if self._results else None)
        if action == "state":
            after = int(params.get("after", "-1")) if params.get("pid") == str(os.getpid()) else -1
            while self._version <= after and time.monotonic() < deadline:
                await self._news.wait(deadline - time.monotonic())
            return json_response(self.summary())
        if action == "switches":
            return json_response(self.summary()["switches"])
        lists: dict[str, Callable[[], Sequence[Any]]] = {
            "results": lambda: self.results,
            "executes": lambda: self.executes,
            "frames": lambda: self.frames,
            "bad_frames": lambda: self.bad_frames,
            "connections": lambda: self.connections,
            "register_calls": lambda: self.register_calls,
            "mailed": lambda: self.mailed,
            "pings": lambda: self.pings,
        }
        if action not in lists:
            raise ValueError(
                f"nothing to read at {action!r}; there are: state, switches, last_result, {', '.join(lists)}"
            )
        return json_response([asdict(one) for one in lists[action]()])

    def _control_do(self, action: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """POST; the body holds the arguments of the method of the same name."""
        if action == "switches":
            self.set_switches(arguments)
            return {name: getattr(self, name) for name in SWITCHES}
        if action == "execute":
            return {"execution_id": self.execute(**arguments)}
        if action == "freeze":
            self._on_loop(lambda: time.sleep(float(arguments.get("seconds", 1))))
            return {}
        actions: dict[str, Callable[..., object]] = {
            "resend": self.resend,
            "send_text": self.send_text,
            "shutdown_module": self.shutdown_module,
            "kill_connections": self.kill_connections,
            "close_connections": self.close_connections,
            "ping_now": self.ping_now,
            "know": self.know,
            "forget": self.forget,
        }
        if action not in actions:
            raise ValueError(
                f"nothing to do at {action!r}; there are: switches, execute, freeze, {', '.join(actions)}"
            )
        actions[action](**arguments)
        return {}


# ---------------------------------------------------------------------------------------------------------
# The server as a process of its own
# ---------------------------------------------------------------------------------------------------------


class PlatformProcess:
    """The platform as a process, which can be killed and started again on the same port with what it knew.

    `directory` holds its state, its journal and its log. Results and e-mails are read from the journal and
    so are there while the process is not; everything else asks the process, and raises OSError or
    http.client.HTTPException when it is down.
    """

    def __init__(self, directory: Path, generation: str = "new", port: int = 0, **switches: object) -> None:
        self.directory = directory
        self.generation = generation
        self.host = "127.0.0.1"
        self.port = port
        self.state_path = directory / "platform-state.json"
        self.journal_path = directory / "platform-journal.jsonl"
        self.log_path = directory / "platform.log"
        self.switches = {name: checked_switch(name, value) for name, value in switches.items()}
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where the platform is, without a slash at the end."""
        return f"http://{self.host}:{self.port}"

    def start(self, timeout: float = 60.0) -> Self:
        """Start it, and return when it listens; RuntimeError when it does not."""
        reading, writing = os.pipe()
        command = [sys.executable, str(Path(__file__).resolve()), "--generation", self.generation]
        command += ["--host", self.host, "--port", str(self.port), "--ready-fd", str(writing)]
        command += ["--state", str(self.state_path), "--journal", str(self.journal_path)]
        for name, value in self.switches.items():
            command += ["--set", f"{name}={json.dumps(value)}"]
        with self.log_path.open("ab") as log, os.fdopen(reading) as ready:
            try:
                self.process = subprocess.Popen(command, stdout=log, stderr=log, pass_fds=(writing,))
            finally:
                os.close(writing)
            answer = ready.readline() if select.select([ready], [], [], timeout)[0] else ""
        if not answer:
            self.kill()
            raise RuntimeError(f"the platform did not start, see {self.log_path}")
        self.port = int(answer)
        return self

    def kill(self) -> None:
        """kill -9."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End it as an operator does."""
        self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.send_signal(signal.SIGCONT)
            process.send_signal(number)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def restart(self) -> None:
        """kill -9, and start again on the same port."""
        self.kill()
        self.start()

    def freeze(self) -> None:
        """SIGSTOP; returns when it stands still."""
        process = self._running()
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def thaw(self) -> None:
        """SIGCONT."""
        self._running().send_signal(signal.SIGCONT)

    def _running(self) -> subprocess.Popen[bytes]:
        if self.process is None:
            raise RuntimeError("the platform is not running")
        return self.process

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def results(self) -> list[Result]:
        """Every result ever received."""
        return read_journal(self.journal_path, Result)

    def results_for(self, execution_id: str) -> list[Result]:
        """The results of one execution."""
        return [result for result in self.results if result.execution_id == execution_id]

    @property
    def mailed(self) -> list[Mail]:
        """Every e-mail the operator would have got."""
        return read_journal(self.journal_path, Mail)

    def control(self, action: str, arguments: Mapping[str, Any] | None = None, timeout: float = 60.0) -> Any:
        """Read (without arguments) or do something under /_control/; ValueError for what it refuses."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        try:
            if arguments is None:
                connection.request("GET", f"/_control/{action}")
            else:
                connection.request("POST", f"/_control/{action}", json.dumps(arguments))
            answer = connection.getresponse()
            value = json.loads(answer.read())
        finally:
            connection.close()
        if answer.status != 200:
            raise ValueError(value["error"])
        return value

    def state(self) -> dict[str, Any]:
        """What :meth:`PlatformServer.summary` says."""
        found: dict[str, Any] = self.control("state")
        return found

    def switch(self, **switches: object) -> None:
        """Change switches, for the next start too."""
        self.switches.update({name: checked_switch(name, value) for name, value in switches.items()})
        self.control("switches", switches)

    def execute(self, codes: object, **arguments: object) -> str:
        """As :meth:`PlatformServer.execute`; give an execution_id to know it even when the answer is lost."""
        return str(self.control("execute", {"codes": codes, **arguments})["execution_id"])

    def wait_for(self, predicate: Callable[[dict[str, Any]], object], timeout: float) -> bool:
        """Wait until the predicate holds of :meth:`state`, also over restarts; False when time runs out."""
        deadline = time.monotonic() + timeout
        after = pid = -1
        while (left := deadline - time.monotonic()) > 0:
            try:
                state = self.control(f"state?pid={pid}&after={after}&timeout={min(left, 5.0):.3f}")
            except (OSError, http.client.HTTPException):
                threading.Event().wait(min(left, 0.02))  # it is down: there is nothing to wait for but time
                continue
            if predicate(state):
                return True
            pid, after = state["pid"], state["version"]
        return False


# ---------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------

EPILOG = """\
examples:
  %(prog)s --port 8000
  %(prog)s --port 8000 --execute TSLA.US,AAPL.US --every 30
  %(prog)s --generation old --set ws_ping_every=10 --set swallow_pings=true

from another terminal:
  curl http://127.0.0.1:8000/module/online
  curl -d '{"message": {"type": "execute", "args": {"code_list": ["TSLA.US"]}}}' \\
       http://127.0.0.1:8000/module/send_message
  curl 'http://127.0.0.1:8000/_control/connected?timeout=60'
  curl -d '{"codes": ["TSLA.US"]}' http://127.0.0.1:8000/_control/execute
  curl -d '{"refuse_online_for": 20}' http://127.0.0.1:8000/_control/switches
  curl -d '{}' http://127.0.0.1:8000/_control/shutdown_module
  curl http://127.0.0.1:8000/_control/results
  curl 'http://127.0.0.1:8000/_control/last_result?timeout=60'

switches (with what they are unless set):
"""


def switch_help() -> str:
    """The switches and their defaults, one a line."""
    return "".join(f"  {name}={json.dumps(getattr(Switches, name))}\n" for name in SWITCHES)


def switch_setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE from the command line, the value in JSON."""
    name, _, value = text.partition("=")
    sound, parsed = parse_json(value)
    try:
        return name, checked_switch(name, parsed if sound else value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description="A simulator of the dispatch platform: registers modules, sends work, shows the results.",
        epilog=EPILOG + switch_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--generation", choices=GENERATIONS, default="new", help="which server to be (default: new)")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    add("--port", type=int, default=8000, help="port to listen on, 0 for any (default: 8000)")
    add("--state", metavar="FILE", help="remember hashes, online flags and commands here over restarts")
    add("--journal", metavar="FILE", help="append each result here, as a line of JSON, before its receipt")
    add("--execute", metavar="CODES", help="send an execute for these codes (A,B,C) when a module connects")
    add("--every", metavar="S", type=float, default=0.0, help="and again every S seconds")
    add("--args-key", default="code_list", help="the name of the codes in args (default: code_list)")
    add("--wrap", choices=WRAPPINGS, default="object", help="how the command is wrapped (default: object)")
    add("--set", metavar="NAME=VALUE", type=switch_setting, action="append", default=[], help="set a switch")
    add("--quiet", action="store_true", help="print nothing")
    add("--ready-fd", type=int, help=argparse.SUPPRESS)
    return made


def print_line(line: str) -> None:
    """One line of the log, with the time."""
    try:
        print(f"{datetime.now().isoformat(sep=' ', timespec='milliseconds')} {line}", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on: go on in silence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until SIGINT or SIGTERM."""
    options = parser().parse_args(arguments)
    stop = threading.Event()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    server = PlatformServer(
        options.generation,
        options.port,
        options.host,
        options.state,
        options.journal,
        None if options.quiet else print_line,
        **dict(options.set),
    )
    try:
        server.start()
    except OSError as error:
        print(
            f"cannot listen on {options.host}:{options.port}: {os.strerror(error.errno or 0)}; "
            "end what listens there, or name another port: --port",
            file=sys.stderr,
        )
        return 1
    if options.execute:
        codes = [code.strip() for code in options.execute.split(",") if code.strip()]
        server.execute_every(codes, options.every, options.wrap, options.args_key)
    if options.ready_fd is not None:
        os.write(options.ready_fd, f"{server.port}\n".encode())
        os.close(options.ready_fd)
    stop.wait()
    server.stop()
    if not options.quiet:
        sent = sum(len(execute.sent) for execute in server.executes)
        print_line(
            f"stopped: {sent} executes sent, {len(server.results)} results, {len(server.mailed)} e-mails"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
