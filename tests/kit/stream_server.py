"""The Infoway stream on the loopback: plans, acks, errors of each kind, cut-offs, silence; and what it pushed to whom.

By hand, needing nothing but Python:

    python tests/kit/stream_server.py --port 8766 --rest-port 8765 --rate 2
    python tests/kit/stream_server.py --port 8766 --plan free --script '10 cut rst; 20 fall_silent; 90 error 513'

In a test:

    with Vendor(plans={"test-key": PLANS["pro"]}) as vendor:      # the stream and the REST side of one API
        vendor.stream.rate = 4.0                                  # trades a second of each code that anyone asked for
        ...                                                       # collect from vendor.stream.url, vendor.rest.url
        vendor.stream.cut("rst")
        missing = vendor.stream.missing(stored)                   # pushed while subscribed and connected, not stored
        assert uncovered(missing, gaps) == []
        assert vendor.stream.violations == []

A trade is of the moment at which it is made, and no two are the same. It is made for every code that was ever
subscribed, whether anybody hears it or not; REST answers with the last one. `pushes` are those that were handed to
the socket of a connection, whole, while it was subscribed.

Every connection has a thread, and all that happens to its socket happens on it. The market has one more.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import select
import signal
import socket
import ssl
import struct
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qsl

if not __package__:  # run by hand
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kit.infoway_server import (
    PLANS,
    PRODUCTS,
    REASONS,
    SPOILERS,
    SYMBOL_TYPES,
    SYMBOLS,
    InfowayServer,
    Plan,
    Retouch,
    make_certificate,
)
from kit.websocket_wire import (
    CLOSE,
    PING,
    PONG,
    TEXT,
    Messages,
    ProtocolError,
    close_payload,
    frame_bytes,
    handshake_answer,
    parse_close,
    text_frames,
    websocket_key,
)

Record = dict[str, Any]

PATH = "/ws"
# What frames are, by their `code`.
SUBSCRIBE, SUBSCRIBED, PUSH, HEARTBEAT, UNSUBSCRIBE, UNSUBSCRIBED = 10000, 10001, 10002, 10010, 11000, 11010
WELCOME = '{"code":200,"msg":"ws connect success"}'
STOCK_GREETING = "You have permission to subscribe to all market data"
SUBSCRIBE_FAIL = "Subscribe fail: "
FORMS = ("json", "prefix", "prose")  # of an error: JSON, SUBSCRIBE_FAIL before it, words alone

# The texts of 506 and 507 are captures, those of 501 and 505 are REST's, the others made up.
ERRORS = {
    501: "Request frequency exceed the limit, please reduce the request frequency",
    505: "Products quantity exceeds the limit：{per_connection}",
    506: "Param error：The code is out of range",
    507: "Param lost：data",
    508: "The apikey has expired",
    509: "The apikey does not exist",
    510: "The apikey has been disabled",
    511: "The apikey has been banned",
    512: "The number of connections exceeds the limit：{connections}",
    513: "Heartbeat timeout",
    516: "The total number of subscribed products exceeds the limit：{in_all}",
    517: "Apikey error",
    518: "Apikey verification failed",
    519: "No permission to subscribe to this market",
    520: "Product suffix error",
    521: "The free plan does not support this product",
}
# After these the connection is closed.
FATAL = frozenset({501, 508, 509, 510, 511, 512, 513, 517, 518, 519, 521})
CUTS = ("fin", "rst", "mid_frame", "close")

MAX_HEAD = 64 * 1024
MAX_MESSAGE = 1024 * 1024
CHUNK = 256 * 1024
# A connection whose client does not read is cut when so much waits for it.
MAX_WAITING = 256 * 1024 * 1024
# `burst` waits while more than this does.
BURST_WAITING = 4 * 1024 * 1024
BURST_S = 600.0
BLOCK = 500  # pushes that a burst hands over at once
STEP_S = 0.01  # of the market
HANDSHAKE_S = 30.0
STRANGER = "NOTASKED.US"

# Pushes that are none, beside those whose record is spoilt as SPOILERS do it.
MALFORMED: tuple[str, ...] = (
    "",
    "null",
    "42",
    "[]",
    "{}",
    "You have been subscribed",
    '{"code":10002}',
    '{"code":10002,"data":null}',
    '{"code":10002,"data":[]}',
    '{"code":10002,"data":"AAPL.US"}',
    '{"code":10002,"data":{"s":"AAPL.US","t":17867519',
    '{"code":"10002","data":{}}',
    '{"code":19999,"data":{"s":"AAPL.US"}}',
    "[" * 10_000,
)
LISTED = {it["symbol"]: SYMBOL_TYPES[name] for name, entries in SYMBOLS.items() for it in entries}


def product_knows(product: str, code: str) -> bool:
    """Whether this code is the product's, by its shape or because its list has it."""
    return PRODUCTS[product].fullmatch(code) is not None or LISTED.get(code) == product


def identity(record: Mapping[str, Any]) -> str:
    """The `_id` that a trade must have."""
    return "{s}|{t}|{p}|{v}|{td}".format_map(record)


def record_of(name: str) -> Record:
    """The trade with this identity, of those that StreamServer makes."""
    code, t, price, volume, direction = name.split("|")
    turnover = int(price.replace(".", "")) * int(volume)
    return {
        "s": code,
        "t": int(t),
        "p": price,
        "v": volume,
        "vw": f"{turnover // 1000}.{turnover % 1000:03d}",
        "td": int(direction),
    }


def push_text(record: Mapping[str, Any]) -> str:
    """The message that pushes this trade."""
    return json.dumps({"code": PUSH, "data": record}, ensure_ascii=False, separators=(",", ":"))


class Push(NamedTuple):
    """A trade that a connection was pushed while it was subscribed; `sent_ms`: when the socket had taken it."""

    connection: int
    product: str
    code: str
    sent_ms: int
    identity: str

    @property
    def t(self) -> int:
        """The trade's own time."""
        return int(self.identity.split("|")[1])


class Gap(NamedTuple):
    """For what time (epoch milliseconds, both ends included) the trades of these codes may be incomplete."""

    product: str
    codes: Collection[str]
    from_ms: int
    to_ms: int

    def covers(self, push: Push) -> bool:
        """Whether it says that this trade may be missing."""
        return (
            push.product == self.product and push.code in self.codes and self.from_ms <= push.t <= self.to_ms
        )


def uncovered(missing: Iterable[Push], gaps: Sequence[Gap]) -> list[Push]:
    """Return those that no gap accounts for."""
    return [push for push in missing if not any(gap.covers(push) for gap in gaps)]


# ------------------------------------------------------------------------------------------------------
# What can be changed at any time
# ------------------------------------------------------------------------------------------------------


class Switches:
    """What can be changed while the server runs, by plain assignment; seconds unless said otherwise."""

    # Trades a second of each code of the market.
    rate: float = 0.0
    # By how many milliseconds trades are ahead of this machine's clock.
    ahead_ms: int = 0
    # Without a heartbeat for so long: 513, and the end.
    heartbeat_s: float = 60.0
    # Frames that a client may send in any `frame_window_s`, and the window; over it: 501, and the end.
    frames: int = 60
    frame_window_s: float = 60.0
    # After so many of those ends a key is banned: 511, and the end; 0: never.
    ban_after: int = 0
    # How long a connection that ended still counts against the plan, and its codes against those over all.
    linger_s: float = 0.0
    codes_linger_s: float = 0.0
    # A connection too many is refused by 429; or it is granted, told 512 and ended.
    over_by_512: bool = False
    # The form of errors (of FORMS); "": on stock "prefix", elsewhere "json".
    form: str = ""
    # Nothing is pushed: alive, and deaf.
    silent: bool = False
    # So many acks of the frames to come are not sent; so many frames are not taken at all; and how late acks are.
    withhold_acks: int = 0
    lose_frames: int = 0
    ack_delay_s: float = 0.0
    # Every so-manieth push is sent twice, is followed by one that is none, by one that was not asked for; 0: none.
    duplicate_every: int = 0
    malformed_every: int = 0
    stranger_every: int = 0
    # Codes in pushes are in small letters.
    lower_case: bool = False
    # Messages are sent in fragments of so many bytes; bytes in pieces of so many, with a pause after each.
    fragment: int = 0
    chop: int = 0
    pace_s: float = 0.0
    # The pause before what a client sent is read.
    read_pause_s: float = 0.0
    # From the handshake to the welcome.
    welcome_delay_s: float = 0.0


SWITCHES: tuple[str, ...] = tuple(Switches.__annotations__)


def checked_switch(name: str, value: object) -> Any:
    """The value as the switch holds it; raises ValueError for an unknown switch or a value it cannot be."""
    if name not in SWITCHES:
        raise ValueError(f"unknown switch {name!r}; there are: {', '.join(SWITCHES)}")
    default = getattr(Switches, name)
    if isinstance(default, str):
        if value in ("", *FORMS):
            return value
    elif isinstance(value, (bool, int, float)):
        return type(default)(value)
    raise ValueError(f"{name}: got {value!r}, expected something like {default!r}")


# ------------------------------------------------------------------------------------------------------
# Connections
# ------------------------------------------------------------------------------------------------------


@dataclass
class Block:
    """Frames that are sent one after the other, each with the identity of the push that it is, or ''."""

    frames: list[bytes] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    size: int = 0

    def add(self, frame: bytes, name: str = "") -> None:
        """Put another frame at its end."""
        self.frames.append(frame)
        self.names.append(name)
        self.size += len(frame)

    def sent(self, size: int) -> list[str]:
        """The pushes that are whole in its first so many bytes."""
        ends = itertools.accumulate(map(len, self.frames))
        return [name for name, end in zip(self.names, ends, strict=True) if name and end <= size]


class Frame(NamedTuple):
    """A text that a client sent; `at`: time.monotonic()."""

    at: float
    text: str


@dataclass(eq=False)
class Connection:
    """One connection as tests see it; `status` is the handshake's, times are those of time.monotonic()."""

    number: int
    opened: float
    key: str = ""
    product: str = ""
    status: int = 0
    codes: dict[str, bool] = field(default_factory=dict)  # those subscribed, and whether they are pushed
    heartbeats: int = 0
    frames: list[Frame] = field(default_factory=list)
    closed: float | None = None
    end: str = ""  # how it ended: one of CUTS, "client close", "client fin", "client reset", "error 513" …

    @property
    def is_open(self) -> bool:
        """Whether it was granted and has not ended."""
        return self.status == 101 and self.closed is None


class Peer:
    """The server's end of a connection, on a thread of its own; what others want of it is queued or ordered."""

    def __init__(self, server: StreamServer, sock: socket.socket, info: Connection) -> None:
        self.info = info
        self.waiting = 0  # bytes that are queued
        self._server = server
        self._socket = sock
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._queue: deque[Block] = deque()
        self._order = ""  # how it shall end, at once
        self._last_words: list[bytes] = []  # sent before it ends by itself
        self._ends = ""  # how it ends when all that is queued is sent
        self._sending: tuple[Block, memoryview, int] | None = None
        self._rest = b""  # what came with the handshake
        self._heard = time.monotonic()
        self.thread = threading.Thread(target=self._run, name=f"stream {info.number}", daemon=True)

    # --- by any thread, with the server's lock ------------------------------------------------------------

    def queue(self, block: Block) -> None:
        """Send this after what is queued."""
        if self._order or self._ends:
            return
        self._queue.append(block)
        self.waiting += block.size
        if self.waiting > MAX_WAITING:
            self.order("rst")
        self.wake()

    def say(self, text: str) -> None:
        """Send a text after what is queued."""
        block = Block()
        block.add(b"".join(text_frames(text, self._server.fragment)))
        self.queue(block)

    def order(self, end: str) -> None:
        """End at once, in this way."""
        self._order = self._order or end
        self.wake()

    def finish(self, end: str) -> None:
        """End when what is queued is sent."""
        self._ends = self._ends or end
        self.wake()

    def beat(self) -> None:
        """Note a heartbeat."""
        self._heard = time.monotonic()

    def interrupt(self) -> None:
        """End it, even in the middle of its handshake."""
        self.order("fin")
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)

    def wake(self) -> None:
        """Let its thread look."""
        with contextlib.suppress(OSError):  # it has ended
            os.eventfd_write(self._wake, 1)

    # --- its own thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        end = "client reset"
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket.settimeout(HANDSHAKE_S)
            self._socket = self._server.secured(self._socket)
            end = self._converse() if self._shake_hands() else ""
        except OSError:
            pass  # the client went
        finally:
            self._account()
            self._server.ended(self, end)
            self._socket.close()
            os.close(self._wake)

    def _shake_hands(self) -> bool:
        """Read the request and answer it; return whether it was granted."""
        received = b""
        while b"\r\n\r\n" not in received:
            data = self._socket.recv(CHUNK)
            if not data or len(received) > MAX_HEAD:
                return False
            received += data
        head, _, self._rest = received.partition(b"\r\n\r\n")
        request, *lines = head.decode("latin-1").split("\r\n")
        method, target, *_ = [*request.split(" "), "", ""]
        headers = {
            name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
        }
        path, _, query = target.partition("?")
        key = websocket_key(method, headers)
        status = 404 if path != PATH else 400 if key is None else self._server.admit(self, query)
        if status == 101 and key is not None:
            self._socket.sendall(handshake_answer(key))
            self._server.welcome(self)
            return True
        self._server.refused(self, status)
        if status > 0:
            self._socket.sendall(_refusal(status))
        elif status == REFUSE_BY_RESET:
            _reset_on_close(self._socket)
        else:  # no answer at all
            self._socket.settimeout(None)
            self._socket.recv(CHUNK)
        return False

    def _converse(self) -> str:
        """Everything after the handshake; return how it ended."""
        self._socket.setblocking(False)
        self._heard = time.monotonic()
        messages = Messages(lambda: MAX_MESSAGE)
        if end := self._take(messages, self._rest):
            return end
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        reading = select.POLLIN
        while True:
            busy = self._sending is not None or bool(self._queue)
            if self._ends and not busy:
                return self._cut(self._ends)
            poller.register(self._socket, reading | (select.POLLOUT if busy else 0))
            events = dict(poller.poll(self._patience_ms()))
            if self._wake in events:
                os.eventfd_read(self._wake)
            if self._order:
                return self._cut(self._order)
            if events.get(self._socket.fileno(), 0) & ~select.POLLOUT and (end := self._read(messages)):
                return end
            if busy:
                self._write()
            if time.monotonic() - self._heard > self._server.heartbeat_s:
                self._heard = float("inf")
                self._server.error(513, self)

    def _patience_ms(self) -> int | None:
        left = self._heard + self._server.heartbeat_s - time.monotonic()
        return None if left == float("inf") else max(0, int(left * 1000) + 1)

    def _read(self, messages: Messages) -> str:
        """Take what the client sent; return how it ended, '' while it goes on."""
        if self._server.read_pause_s:
            time.sleep(self._server.read_pause_s)
        while True:
            try:
                data = self._socket.recv(CHUNK)
            except (BlockingIOError, ssl.SSLWantReadError):
                return ""
            if end := self._take(messages, data) if data else "client fin":
                return end

    def _take(self, messages: Messages, data: bytes) -> str:
        try:
            for opcode, payload in messages.feed(data):
                if opcode == CLOSE:
                    self._last_words.append(frame_bytes(CLOSE, payload[:2]))
                    code = parse_close(payload)[0]
                    return self._cut("client close", f" {code}")
                self._server.heard(self, opcode, payload)
        except (ProtocolError, UnicodeDecodeError) as error:
            self._server.violated(self, f"broke the protocol: {error}")
            self._last_words.append(frame_bytes(CLOSE, close_payload(1002)))
            return self._cut("close")
        return ""

    def _write(self) -> None:
        """Send as much as the socket takes."""
        if self._sending is None:
            with self._server.lock:
                if not self._queue:
                    return
                block = self._queue.popleft()
            self._sending = block, memoryview(b"".join(block.frames)), 0
        block, data, done = self._sending
        end = done + self._server.chop if self._server.chop else len(data)
        try:
            done += self._socket.send(data[done:end])
        except (BlockingIOError, ssl.SSLWantWriteError):
            return
        self._sending = block, data, done
        if self._server.pace_s:
            time.sleep(self._server.pace_s)
        if done == len(data):
            self._account()

    def _account(self) -> None:
        """Note which pushes of the block at hand were sent whole."""
        if self._sending is None:
            return
        block, _, done = self._sending
        self._sending = None
        self._server.sent(self, block.sent(done), block.size)

    def _cut(self, how: str, detail: str = "") -> str:
        """End the connection in this way, and return how."""
        with contextlib.suppress(OSError):
            if how == "rst":
                _reset_on_close(self._socket)
            elif how == "mid_frame" and self._sending is None:
                record = {
                    "s": "AAPL.US",
                    "t": 1_786_751_999_691,
                    "p": "305.771",
                    "v": "1",
                    "vw": "1",
                    "td": 0,
                }
                frame = frame_bytes(TEXT, push_text(record).encode())
                self._socket.send(frame[: len(frame) // 2])
            elif how == "close":
                self._last_words = self._last_words or [frame_bytes(CLOSE, close_payload(1001, "bye"))]
            if how not in ("rst", "mid_frame", "fin"):
                self._socket.settimeout(1.0)
                self._socket.sendall(b"".join(self._last_words))
        return how + detail


REFUSE_BY_RESET, REFUSE_BY_SILENCE = -1, -2  # statuses of handshakes that get no answer


def _reset_on_close(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _refusal(status: int) -> bytes:
    """The answer to a handshake that is refused."""
    words = {401: "Token invalid", 429: "Too many connections"}.get(status, REASONS.get(status, "Unknown"))
    body = json.dumps({"code": status, "message": words}).encode()
    return (
        f"HTTP/1.1 {status} {REASONS.get(status, 'Unknown')}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
        + body
    )


# ------------------------------------------------------------------------------------------------------
# The server
# ------------------------------------------------------------------------------------------------------


class StreamServer(Switches):
    """The stream on 127.0.0.1, from `start` (or ``with``) to `stop`; started again it keeps its port.

    A key of `plans` is known and held to its plan, any other one of `keys` to nothing. `known` are the codes that
    it has, None: all whose shape is a product's; `market` those that trade from the start, without being asked for.
    Each switch of Switches is an argument and an attribute.
    """

    def __init__(
        self,
        *,
        keys: Collection[str] = frozenset({"test-key"}),
        plans: Mapping[str, Plan] = {},
        known: Collection[str] | None = None,
        market: Iterable[str] = (),
        tls: bool = False,
        port: int = 0,
        **switches: object,
    ) -> None:
        self.keys = keys
        self.plans = dict(plans)
        self.known = known
        self.port = port
        self.ca_file: Path | None = None
        self.connections: list[Connection] = []
        self.violations: list[str] = []  # what a client of good manners does not do
        self.bans: dict[str, int] = {}  # by key: ends for too many frames
        self.duplicates = self.malformed = self.strangers = 0  # sent
        self.made_count = 0
        self.lock = threading.Condition(threading.RLock())
        for name, value in switches.items():
            setattr(self, name, checked_switch(name, value))
        self._market: dict[str, None] = dict.fromkeys(market)
        self._latest: dict[str, Record] = {}
        self._made: list[str] = []  # identities, many to an element
        self._log: list[tuple[int, int, str]] = []  # connection, sent_ms, identities of a block
        self._pushed_count = 0
        self._turn = 0  # of what is done every so-manieth time
        self._handshakes: deque[int] = deque()
        self._refusals: deque[tuple[int, str]] = deque()
        self._peers: dict[int, Peer] = {}
        self._listeners: dict[str, dict[Peer, None]] = {}
        self._gone: list[tuple[float, str, int]] = []  # of connections that ended: when, key, codes
        self._spoilers = itertools.cycle(SPOILERS.values())
        self._rubbish = itertools.cycle(MALFORMED)
        self._tls = tls
        self._context: ssl.SSLContext | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._listener: socket.socket | None = None
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []

    # --- life ---------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """What INFOWAY_STREAM_URL is set to."""
        return f"{'wss' if self._tls else 'ws'}://127.0.0.1:{self.port}{PATH}"

    def start(self) -> None:
        """Listen."""
        if self._tls and self._context is None:
            self._folder = tempfile.TemporaryDirectory(prefix="stockrt-stream-")
            self._context, self.ca_file = make_certificate(Path(self._folder.name))
        self._closing = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=512)
        self.port = int(self._listener.getsockname()[1])
        self._threads = [
            threading.Thread(target=self._accept, args=(self._listener,), daemon=True),
            threading.Thread(target=self._trade, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Close the listener, and cut every connection."""
        self._closing.set()
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for thread in self._threads:
            thread.join()
        with self.lock:
            peers = [*self._peers.values()]
            for peer in peers:
                peer.interrupt()
        for peer in peers:
            peer.thread.join()
        self._threads = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = self._context = None

    def _accept(self, listener: socket.socket) -> None:
        while not self._closing.is_set():
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            with self.lock:
                info = Connection(len(self.connections) + 1, time.monotonic())
                self.connections.append(info)
                peer = self._peers[info.number] = Peer(self, sock, info)
                self.lock.notify_all()
            peer.thread.start()

    def secured(self, sock: socket.socket) -> socket.socket:
        """The socket under TLS, where there is any."""
        return sock if self._context is None else self._context.wrap_socket(sock, server_side=True)

    # --- for tests ----------------------------------------------------------------------------------------

    def wait_for(self, predicate: Callable[[Self], object], timeout: float = 60.0) -> None:
        """Return once the predicate holds, asked after each event; TimeoutError if it never does."""
        with self.lock:
            if not self.lock.wait_for(lambda: predicate(self), timeout):
                raise TimeoutError(
                    f"not within {timeout} s; {len(self.connections)} connections, {len(self.open)} open, "
                    f"{len(self.subscribed)} codes, {self.pushed_count} pushed; violations: {self.violations}"
                )

    @property
    def open(self) -> list[Connection]:
        """The connections that stand."""
        return [connection for connection in self.connections if connection.is_open]

    @property
    def subscribed(self) -> set[str]:
        """The codes that any connection that stands is subscribed to."""
        with self.lock:
            return {code for connection in self.open for code in connection.codes}

    @property
    def pushed_count(self) -> int:
        """How many pushes there were."""
        return self._pushed_count

    def pushes(self) -> Iterator[Push]:
        """Yield every trade that was handed, whole, to the socket of a connection that was subscribed to it."""
        with self.lock:
            log = [*self._log]
        products = {connection.number: connection.product for connection in self.connections}
        for number, sent_ms, names in log:
            for name in names.split("\n"):
                yield Push(number, products[number], name.partition("|")[0], sent_ms, name)

    def pushed(self) -> set[str]:
        """The identities of all pushes."""
        return {push.identity for push in self.pushes()}

    def missing(self, stored: Collection[str]) -> list[Push]:
        """The pushes whose identity is not among these; for each identity once, at its first push."""
        first: dict[str, Push] = {}
        for push in self.pushes():
            if push.identity not in stored:
                first.setdefault(push.identity, push)
        return [*first.values()]

    def made(self) -> set[str]:
        """The identities of all trades that there were, pushed or not: what is stored must be among them."""
        with self.lock:
            return {name for names in self._made for name in names.split("\n")}

    def last(self, code: str) -> Record:
        """The last trade of this code; one is made if there was none."""
        with self.lock:
            return self._latest.get(code) or self.new_trade(code)

    def new_trade(self, code: str) -> Record:
        """Make a trade of now, as no other one is, and push it to nobody."""
        with self.lock:
            self.made_count = count = self.made_count + 1
            at = int(time.time() * 1000) + self.ahead_ms
            price = 1_000 + count * 7 % 999_000
            name = f"{code}|{at}|{price // 1000}.{price % 1000:03d}|{1 + count % 999_983}|{count % 3}"
            record = record_of(name)
            self._latest[code] = record
            self._made.append(name)
            return record

    def trade(self, *codes: str) -> list[str]:
        """Let each of these codes trade once, and push it; return the identities."""
        records = [self.new_trade(code) for code in codes]
        self.push(records)
        return [identity(record) for record in records]

    def push(self, records: Iterable[Record]) -> None:
        """Push these records to whoever is subscribed to them."""
        with self.lock:
            for peer, block in self._blocks(records).items():
                peer.queue(block)

    def _blocks(self, records: Iterable[Record]) -> dict[Peer, Block]:
        """What each connection is sent of these records."""
        blocks: dict[Peer, Block] = {}
        for record in records if not self.silent else ():
            listeners = self._listeners.get(record["s"])
            if not listeners:
                continue
            frames = self._frames(record)
            for peer in listeners:
                if peer.info.codes.get(record["s"]):
                    block = blocks.setdefault(peer, Block())
                    for frame, name in frames:
                        block.add(frame, name)
        return blocks

    def burst(self, count: int, codes: Sequence[str] = ()) -> float:
        """Push so many trades, of these or all subscribed codes in turn, as fast as the sockets take them.

        They are made before: returned is when the first one was queued (time.monotonic()). That is when all of them
        are queued, and less than BURST_WAITING is left of them.
        """
        names = itertools.cycle(codes or sorted(self.subscribed))
        with self.lock:
            made = [
                self._blocks([self.new_trade(next(names)) for _ in range(min(BLOCK, count - start))])
                for start in range(0, count, BLOCK)
            ]
        began = time.monotonic()
        for blocks in made:
            with self.lock:
                for peer, block in blocks.items():
                    peer.queue(block)
            self.wait_for(
                lambda it: all(peer.waiting < BURST_WAITING for peer in it._peers.values()), BURST_S
            )
        return began

    def cut(self, how: str = "fin", connection: int | None = None) -> None:
        """End this or every connection in one of CUTS' ways, and return when it has ended."""
        if how not in CUTS:
            raise ValueError(f"how: got {how!r}, expected one of {', '.join(CUTS)}")
        cut = self._chosen(connection)
        for peer in cut:
            peer.order(how)
        for peer in cut:
            peer.thread.join()

    def say(self, text: str, connection: int | None = None) -> None:
        """Send this text to that or every connection."""
        for peer in self._chosen(connection):
            with self.lock:
                peer.say(text)

    def error(self, code: int, to: Peer | int | None = None, trace: str = "", form: str = "") -> None:
        """Tell one or every connection of an error, and end it where it is one of FATAL."""
        with self.lock:
            for peer in [to] if isinstance(to, Peer) else self._chosen(to):
                peer.say(self._error_text(code, peer, trace, form))
                if code in FATAL:
                    peer.finish(f"error {code}")

    def fall_silent(self, connection: int | None = None) -> None:
        """Push nothing more of what is subscribed, until it is subscribed anew: alive, and deaf."""
        with self.lock:
            for peer in self._chosen(connection):
                peer.info.codes = dict.fromkeys(peer.info.codes, False)

    def refuse(self, code: int, times: int = 1, form: str = "") -> None:
        """Answer the next frames that subscribe with this error."""
        with self.lock:
            self._refusals.extend([(code, form)] * times)

    def refuse_handshakes(self, *statuses: int) -> None:
        """Answer the next handshakes thus: 401, 429, 500 …; REFUSE_BY_RESET, REFUSE_BY_SILENCE."""
        with self.lock:
            self._handshakes.extend(statuses)

    def _chosen(self, number: int | None) -> list[Peer]:
        with self.lock:
            return [
                peer for peer in self._peers.values()
                if peer.info.is_open and number in (None, peer.info.number)
            ]  # fmt: skip

    # --- the market ---------------------------------------------------------------------------------------

    def _trade(self) -> None:
        """Let the codes of the market trade at the rate, in turn."""
        place, due, before = 0, 0.0, time.monotonic()
        while not self._closing.wait(STEP_S):
            now = time.monotonic()
            codes = [*self._market] if self.rate else []
            # what a busy machine could not do in time is made up for, within reason
            due += min(now - before, 1.0) * self.rate * len(codes)
            before = now
            count, due = int(due), due % 1
            if codes and count:
                self.push([self.new_trade(codes[(place + turn) % len(codes)]) for turn in range(count)])
                place = (place + count) % len(codes)

    def _frames(self, record: Record) -> list[tuple[bytes, str]]:
        """The frames that push a record, with whatever the switches put between; each with its identity or ''."""
        self._turn += 1
        sent = record | {"s": record["s"].lower()} if self.lower_case else record
        good = b"".join(text_frames(push_text(sent), self.fragment)), identity(record)
        frames = [good]
        if self._is_due(self.duplicate_every):
            self.duplicates += 1
            frames.append(good)
        if self._is_due(self.malformed_every):
            self.malformed += 1
            frames.append((b"".join(text_frames(self._spoilt(record), self.fragment)), ""))
        if self._is_due(self.stranger_every):
            self.strangers += 1
            frames.append((b"".join(text_frames(push_text(record | {"s": STRANGER}))), ""))
        return frames

    def _is_due(self, every: int) -> bool:
        return bool(every) and self._turn % every == 0

    def _spoilt(self, record: Record) -> str:
        """A push that is none: in turn one of a spoilt record, and one of MALFORMED."""
        if self.malformed % 2:
            return next(self._rubbish)
        return json.dumps({"code": PUSH, "data": next(self._spoilers)(record)})

    # --- what connections tell, each on its own thread -------------------------------------------------------

    def admit(self, peer: Peer, query: str) -> int:
        """Return the status with which a handshake is answered, and note who it is if that is 101."""
        values = dict(parse_qsl(query, keep_blank_values=True))
        key, product = values.get("apikey", ""), values.get("business", "")
        with self.lock:
            peer.info.key, peer.info.product = key, product
            status = self._handshakes.popleft() if self._handshakes else self._judge(key, product)
            peer.info.status = max(status, 0)
            return status

    def _judge(self, key: str, product: str) -> int:
        if product not in PRODUCTS:
            return 400
        if key not in self.keys and key not in self.plans:
            return 401
        plan = self.plans.get(key)
        if plan is None:
            return 101
        if product not in plan.products:
            return 401
        if self._connections_of(key) >= plan.sockets and not self.over_by_512:
            self.violations.append(f"one more than {plan.sockets} connections")
            return 429
        return 101

    def _connections_of(self, key: str) -> int:
        """How many connections count against this key now."""
        since = time.monotonic() - self.linger_s
        lingering = sum(at > since and its == key for at, its, _ in self._gone)
        return lingering + sum(connection.key == key for connection in self.open)

    def _codes_of(self, key: str) -> int:
        """How many codes count against this key now."""
        since = time.monotonic() - self.codes_linger_s
        lingering = sum(codes for at, its, codes in self._gone if at > since and its == key)
        return lingering + sum(len(connection.codes) for connection in self.open if connection.key == key)

    def refused(self, peer: Peer, status: int) -> None:
        """A handshake was not granted."""
        with self.lock:
            peer.info.status = max(status, 0)
            self.lock.notify_all()

    def welcome(self, peer: Peer) -> None:
        """Greet a connection that was granted; or say why it is ended at once."""
        self._closing.wait(self.welcome_delay_s)
        key, product = peer.info.key, peer.info.product
        with self.lock:
            if product == "stock":
                peer.say(STOCK_GREETING)
            plan = self.plans.get(key)
            if plan is not None and self._connections_of(key) > plan.sockets:
                self.violations.append(f"one more than {plan.sockets} connections")
                self.error(512, peer, form="json")
            elif self.ban_after and self.bans.get(key, 0) >= self.ban_after:
                self.error(511, peer, form="json")
            else:
                peer.say(WELCOME)
            self.lock.notify_all()

    def heard(self, peer: Peer, opcode: int, payload: bytes) -> None:
        """A connection sent a message."""
        with self.lock:
            now = time.monotonic()
            text = payload.decode() if opcode == TEXT else repr(payload)
            peer.info.frames.append(Frame(now, text))
            recent = sum(
                frame.at > now - self.frame_window_s for frame in peer.info.frames[-self.frames - 1 :]
            )
            if recent > self.frames:
                self.bans[peer.info.key] = self.bans.get(peer.info.key, 0) + 1
                self.violated(peer, f"more than {self.frames} frames in {self.frame_window_s:g} s")
                self.error(501, peer)
            elif opcode == PING:
                block = Block()
                block.add(frame_bytes(PONG, payload))
                peer.queue(block)
            elif opcode == TEXT:
                self._understand(peer, text)
            self.lock.notify_all()

    def violated(self, peer: Peer, what: str) -> None:
        """A client did what it should not."""
        with self.lock:
            self.violations.append(f"connection {peer.info.number}: {what}")

    def _understand(self, peer: Peer, text: str) -> None:
        try:
            frame = json.loads(text)
        except (ValueError, RecursionError):
            frame = None
        if not isinstance(frame, dict):
            self.violated(peer, f"no frame: {text[:80]}")
            self.error(506, peer)
            return
        trace, code, data = str(frame.get("trace", "")), frame.get("code"), frame.get("data")
        if code == HEARTBEAT:
            peer.info.heartbeats += 1
            peer.beat()
        elif code not in (SUBSCRIBE, UNSUBSCRIBE):
            self.violated(peer, f"unknown code {code!r}")
            self.error(506, peer, trace, "json")
        elif not isinstance(data, dict) or not isinstance(data.get("codes"), str) or not data["codes"]:
            self.violated(peer, "no codes")
            self.error(507, peer, trace, "json")
        elif self.lose_frames > 0:
            self.lose_frames -= 1
        else:
            codes = data["codes"].split(",")
            if code == UNSUBSCRIBE:
                self._unsubscribe(peer, codes)
            elif not self._subscribe(peer, codes, trace):
                return
            self._acknowledge(peer, trace, SUBSCRIBED if code == SUBSCRIBE else UNSUBSCRIBED)

    def _acknowledge(self, peer: Peer, trace: str, code: int) -> None:
        text = json.dumps({"code": code, "trace": trace, "msg": "ok"}, separators=(",", ":"))
        if self.withhold_acks > 0:
            self.withhold_acks -= 1
        elif self.ack_delay_s:
            timer = threading.Timer(self.ack_delay_s, self._say_later, (peer, text))
            timer.daemon = True
            timer.start()
        else:
            peer.say(text)

    def _say_later(self, peer: Peer, text: str) -> None:
        with self.lock:
            peer.say(text)

    def _subscribe(self, peer: Peer, codes: list[str], trace: str) -> bool:
        """Subscribe a connection to these codes, or tell it why not."""
        if self._refusals:
            error, form = self._refusals.popleft()
            self.error(error, peer, trace, form)
            return False
        plan = self.plans.get(peer.info.key)
        new = len({*codes} - peer.info.codes.keys())
        if plan is not None:
            over = 0
            if len(peer.info.codes) + new > plan.symbols_per_socket:
                over = 505
            elif self._codes_of(peer.info.key) + new > plan.symbols:
                over = 516
            if over:
                self.violated(peer, f"{over}: {len(peer.info.codes)} codes and {new} more")
                self.error(over, peer, trace)
                return False
        for code in codes:
            peer.info.codes[code] = True
            if product_knows(peer.info.product, code) and (self.known is None or code in self.known):
                self._market.setdefault(code)
                self._listeners.setdefault(code, {})[peer] = None
        return True

    def _unsubscribe(self, peer: Peer, codes: Iterable[str]) -> None:
        for code in codes:
            peer.info.codes.pop(code, None)
            self._listeners.get(code, {}).pop(peer, None)

    def _error_text(self, code: int, peer: Peer, trace: str, form: str) -> str:
        plan = self.plans.get(peer.info.key, PLANS["pro"])
        words = ERRORS.get(code, f"Error {code}").format(
            per_connection=plan.symbols_per_socket, connections=plan.sockets, in_all=plan.symbols
        )
        form = form or self.form or ("prefix" if peer.info.product == "stock" else "json")
        told = json.dumps({"traceId": trace, "code": code, "msg": words}, ensure_ascii=False)
        return {"json": told, "prefix": SUBSCRIBE_FAIL + told, "prose": SUBSCRIBE_FAIL + words}[form]

    def sent(self, peer: Peer, names: list[str], size: int) -> None:
        """A block was sent, or as much of it as went before the end."""
        with self.lock:
            peer.waiting -= size
            if names:
                self._pushed_count += len(names)
                self._log.append((peer.info.number, int(time.time() * 1000), "\n".join(names)))
            self.lock.notify_all()

    def ended(self, peer: Peer, how: str) -> None:
        """A connection is over."""
        with self.lock:
            info = peer.info
            if info.is_open:
                self._gone.append((time.monotonic(), info.key, len(info.codes)))
            for code in info.codes:
                self._listeners.get(code, {}).pop(peer, None)
            info.closed, info.end = time.monotonic(), how
            self._peers.pop(info.number, None)
            peer.waiting = 0
            self.lock.notify_all()


# ------------------------------------------------------------------------------------------------------
# With the REST side
# ------------------------------------------------------------------------------------------------------


class _LastTrades(dict[str, Retouch]):
    """For InfowayServer.trades: the last trade of whatever code is asked for."""

    def __init__(self, stream: StreamServer) -> None:
        super().__init__()
        self._stream = stream

    def __contains__(self, code: object) -> bool:
        return True

    def get(self, code: str, default: object = None) -> Retouch:
        """The fields of its last trade."""
        return self._stream.last(code)


class Vendor:
    """The whole API, its `stream` and its `rest` side: the same keys, plans and trades. Used with `with`.

    `rest` are arguments of InfowayServer, the others those of StreamServer.
    """

    def __init__(
        self,
        *,
        keys: Collection[str] = frozenset({"test-key"}),
        plans: Mapping[str, Plan] = {},
        rest: Mapping[str, Any] | None = None,
        **stream: Any,
    ) -> None:
        self.stream = StreamServer(keys=keys, plans=plans, **stream)
        self.rest = InfowayServer(keys=keys, plans=plans, **(rest or {}))
        self.rest.trades = _LastTrades(self.stream)

    def __enter__(self) -> Self:
        self.stream.start()
        try:
            self.rest.start()
        except OSError:
            self.stream.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.rest.stop()
        self.stream.stop()

    @property
    def settings(self) -> dict[str, str]:
        """The settings of who collects from it with the first of its keys."""
        return {
            "INFOWAY_API_KEY": sorted([*self.stream.keys, *self.stream.plans])[0],
            "INFOWAY_API_BASE_URL": self.rest.url,
            "INFOWAY_STREAM_URL": self.stream.url,
        }


# ------------------------------------------------------------------------------------------------------
# By hand
# ------------------------------------------------------------------------------------------------------

EPILOG = """\
script: steps, with ';' between them, each the seconds since the first subscription, an action and its arguments:
  10 cut rst              end every connection: {cuts}
  20 error 513            tell every connection of an error; after most of them it is ended
  30 fall_silent          alive and deaf, until subscribed anew
  40 refuse 516 3         answer the next 3 subscriptions with this error
  50 refuse_handshakes 429 401
  60 say TEXT
  70 burst 200000         so many trades as fast as the sockets take them
  80 set NAME=VALUE       a switch

switches (with what they are unless set):
{switches}"""

OPTION_OF: dict[type, str] = {StreamServer: "--port", InfowayServer: "--rest-port"}
ACTIONS = ("cut", "error", "fall_silent", "refuse", "refuse_handshakes", "say", "burst", "set")


class Step(NamedTuple):
    """What a script does so many seconds after the first subscription."""

    at: float
    action: str
    arguments: tuple[str, ...]

    def run(self, server: StreamServer) -> None:
        """Do it."""
        if self.action == "say":
            server.say(" ".join(self.arguments))
        elif self.action == "set":
            for name, value in map(switch_setting, self.arguments):
                setattr(server, name, value)
        elif self.action == "cut":
            server.cut(self.arguments[0])
        else:
            getattr(server, self.action)(*map(int, self.arguments))


def read_script(text: str) -> list[Step]:
    """The steps of a script. Raises ArgumentTypeError with what is wrong with it."""
    steps = []
    for part in filter(None, map(str.strip, text.split(";"))):
        try:
            at, action, *arguments = part.split()
            if action not in ACTIONS:
                raise ValueError(f"no action {action!r}, there are {', '.join(ACTIONS)}")
            if action == "set":
                _ = [*map(switch_setting, arguments)]
            elif action == "cut" and (len(arguments) != 1 or arguments[0] not in CUTS):
                raise ValueError(f"cut: expected one of {', '.join(CUTS)}")
            elif action not in ("say", "cut"):
                _ = [*map(int, arguments)]
            steps.append(Step(float(at), action, tuple(arguments)))
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise argparse.ArgumentTypeError(f"{part!r}: {error}") from None
    return sorted(steps)


def switch_setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE of the command line, the value in JSON."""
    name, _, value = text.partition("=")
    try:
        parsed: object = json.loads(value)
    except ValueError:
        parsed = value
    try:
        return name, checked_switch(name, parsed)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _plan_of(text: str) -> tuple[str, Plan]:
    key, _, name = text.rpartition("=")
    if name not in PLANS:
        raise argparse.ArgumentTypeError(f"{text!r} names none of the plans {', '.join(PLANS)}")
    return key, PLANS[name]


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    switches = "".join(f"  {name}={json.dumps(getattr(Switches, name))}\n" for name in SWITCHES)
    parser = argparse.ArgumentParser(
        description="The Infoway stream on the loopback, with made-up trades; and its REST side, if asked for.",
        epilog=EPILOG.format(cuts=", ".join(CUTS), switches=switches),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--port", type=int, default=0, help="of the stream; default: a free one")
    add(
        "--rest-port",
        type=int,
        metavar="PORT",
        help="serve REST there, with the same keys and trades; 0: a free one",
    )
    add(
        "--key",
        action="append",
        metavar="KEY",
        help="a key that it accepts, may be repeated; default: test-key",
    )
    add(
        "--plan",
        action="append",
        default=[],
        type=_plan_of,
        metavar="[KEY=]PLAN",
        help=f"hold that key, or every one, to {', '.join(PLANS)}; may be repeated; default: no limit",
    )
    add("--rate", type=float, default=1.0, metavar="N", help="trades a second of each code; default: 1")
    add(
        "--codes",
        default="",
        metavar="CODES",
        help="comma-separated: all that it knows; default: all that look right",
    )
    add("--script", type=read_script, default=[], metavar="STEPS", help="misbehave, see below")
    add("--set", type=switch_setting, action="append", default=[], metavar="NAME=VALUE", help="set a switch")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM."""
    options = make_parser().parse_args(arguments)
    keys = options.key or ["test-key"]
    plans: dict[str, Plan] = {}
    for key, plan in options.plan:
        plans |= dict.fromkeys([key] if key else keys, plan)
    known = frozenset(filter(None, options.codes.split(","))) or None
    vendor = Vendor(
        keys=frozenset(keys), plans=plans, known=known, port=options.port, rate=options.rate,
        rest={"port": options.rest_port or 0, "record": False}, **dict(options.set),
    )  # fmt: skip
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    parts: list[StreamServer | InfowayServer] = [
        vendor.stream,
        *([vendor.rest] if options.rest_port is not None else []),
    ]
    with contextlib.ExitStack() as running:
        for part in parts:
            try:
                part.start()
            except OSError as error:
                print(
                    f"cannot listen on 127.0.0.1:{part.port}: {os.strerror(error.errno or 0)}; "
                    f"end what listens there, or name another port: {OPTION_OF[type(part)]}",
                    file=sys.stderr,
                )
                return 1
            running.callback(part.stop)
            print(part.url, flush=True)
        _play(vendor.stream, options.script, stopped)
    stream = vendor.stream
    print(
        f"{len(stream.connections)} connections, {stream.pushed_count} pushes, {len(stream.violations)} violations"
    )
    for words in stream.violations:
        print(words)
    return 0


def _play(server: StreamServer, script: Sequence[Step], stopped: threading.Event) -> None:
    """Do what the script says once anybody has subscribed, and then nothing until the end."""
    while script and not stopped.is_set() and not server.subscribed:
        stopped.wait(STEP_S)
    began = time.monotonic()
    for step in script:
        if stopped.wait(max(0.0, began + step.at - time.monotonic())):
            return
        step.run(server)
    stopped.wait()


if __name__ == "__main__":
    raise SystemExit(main())
