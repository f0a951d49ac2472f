"""An Infoway market-data API on the loopback, with the answers of the real one, the bad ones included.

By hand, needing nothing but Python:

    python tests/kit/infoway_server.py --port 8765 --tick-every 2

In a test:

    with InfowayServer(per_second=10, unknown={"GONE.US"}) as server:
        server.script = [REFUSALS["429_html"], None, Answer.cut_mid_body()]   # None: the usual answer
        ...                                                                   # fetch from server.url
        assert server.over_limit == 0

A trade follows from its code and the server's `tick` alone: the same tick gives the same record again, `bump`
makes new trades. Every connection has a thread; an answer is the join of records that are made once per tick.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gzip
import itertools
import json
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import tempfile
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote

MAX_CODES = 100  # per request, as the API has it
MAX_HEAD = 64 * 1024  # longer request heads are refused, as gateways do
EPOCH_MS = 1_786_752_000_000  # of tick 0: 2026-08-15 00:00 UTC
TICK_MS = 1_000  # between the trade times of two ticks
CHUNK = 64 * 1024
JSON = "application/json"
HTML = "text/html"
PROBLEM = "application/problem+json"

Record = dict[str, Any]

# What each product knows, by the shape of the code.
PRODUCTS: dict[str, re.Pattern[str]] = {
    "stock": re.compile(r"\.?[A-Z0-9]{1,10}([-.][A-Z])?\.US|(\d{5}|\.?[A-Z]{2,8})\.HK|\d{6}\.(SH|SZ)"),
    "japan": re.compile(r"[0-9A-Z]{4}\.JP"),
    "korea": re.compile(r"[0-9A-Z]{6}\.KS"),
    "india": re.compile(r"[A-Z0-9&-]{1,20}\.IN"),
    "taiwan": re.compile(r"[0-9A-Z]{4,6}\.TW"),
    "crypto": re.compile(r"[A-Z0-9]{2,12}(USDT|USDC)"),
    "common": re.compile(r"(?!.*USD[TC]$)[A-Z]{6}|USOIL|UKOIL|NGAS|COPPER"),
}


# ---------------------------------------------------------------------------------------------------- answers

Delivery = Literal[
    "whole",
    "chunked",
    "gzip",
    "overstated",
    "understated",
    "cut_before",
    "reset",
    "cut_body",
    "cut_chunk",
    "bad_chunk",
    "hang",
    "drip_head",
    "drip_body",
    "huge",
]


@dataclass(frozen=True)
class Answer:
    """What the server does instead of its usual answer; `body` None stands for the usual body."""

    status: int = 200
    body: bytes | None = None
    content_type: str = JSON
    headers: tuple[tuple[str, str], ...] = ()
    rewrite: Callable[[Request, list[Record]], Any] | None = None  # the usual `data` to another
    delivery: Delivery = "whole"
    pace: float = 0.0  # seconds per dripped byte
    size: int = 0  # of a huge body
    delay: float = 0.0  # seconds before it

    def with_headers(self, *headers: tuple[str, str]) -> Answer:
        """Return the same answer with these headers too, e.g. ``("Retry-After", "2")``."""
        return replace(self, headers=self.headers + headers)

    def after(self, seconds: float) -> Answer:
        """Return the same answer, given later."""
        return replace(self, delay=seconds)

    @classmethod
    def raw(
        cls,
        status: int,
        body: bytes | str,
        headers: Iterable[tuple[str, str]] = (),
        content_type: str = JSON,
    ) -> Answer:
        """Exactly this status and body."""
        return cls(status, body.encode() if isinstance(body, str) else body, content_type, tuple(headers))

    @classmethod
    def json(cls, value: Any, status: int = 200) -> Answer:
        """Any JSON value; NaN and infinities are written as Python's json does."""
        return cls(status, _dumps(value))

    @classmethod
    def data(cls, value: Any, ret: Any = 200, msg: str = "success") -> Answer:
        """An envelope around this `data`."""
        return cls.json({"ret": ret, "msg": msg, "traceId": TRACE_ID, "data": value})

    @classmethod
    def html(cls, status: int = 200, title: str = "Welcome") -> Answer:
        """A web page, e.g. a captive portal's or a gateway's."""
        page = f"<html>\r\n<head><title>{title}</title></head>\r\n<body><center><h1>{title}</h1></center></body>\r\n"
        return cls(status, (page + "</html>\r\n").encode(), HTML)

    @classmethod
    def malformed_json(cls) -> Answer:
        """JSON that stops in the middle, with a matching Content-Length."""
        return cls(
            200, b'{"ret":200,"msg":"success","traceId":"x","data":[{"s":"AAPL.US","t":1786751999691,"p":"30'
        )

    @classmethod
    def empty(cls, status: int = 200) -> Answer:
        """No body at all."""
        return cls(status, b"")

    @classmethod
    def short_body(cls) -> Answer:
        """The usual body under a Content-Length of 100 bytes more; then the connection is closed."""
        return cls(delivery="overstated")

    @classmethod
    def understated_length(cls) -> Answer:
        """The usual body under a Content-Length of half of it; the rest follows and spoils the connection."""
        return cls(delivery="understated")

    @classmethod
    def cut_before_answer(cls) -> Answer:
        """The connection is closed in good order without a byte of answer."""
        return cls(delivery="cut_before")

    @classmethod
    def reset(cls) -> Answer:
        """The connection is reset without a byte of answer."""
        return cls(delivery="reset")

    @classmethod
    def cut_mid_body(cls) -> Answer:
        """Half of the usual body under its true Content-Length, then the connection is closed."""
        return cls(delivery="cut_body")

    @classmethod
    def chunked(cls) -> Answer:
        """The usual body, in chunks: a good answer."""
        return cls(delivery="chunked")

    @classmethod
    def cut_chunk(cls) -> Answer:
        """Half of the usual body in a chunk, then the connection is closed without the last chunk."""
        return cls(delivery="cut_chunk")

    @classmethod
    def bad_chunk(cls) -> Answer:
        """Chunked, with a chunk size that is no number."""
        return cls(delivery="bad_chunk")

    @classmethod
    def gzip(cls) -> Answer:
        """The usual body, compressed if the request accepts it: a good answer."""
        return cls(delivery="gzip")

    @classmethod
    def gzip_broken(cls) -> Answer:
        """Called gzip, and is none."""
        return cls(200, b"\x1f\x8b\x08 this is no deflate stream", headers=(("Content-Encoding", "gzip"),))

    @classmethod
    def gzip_bomb(cls, size: int) -> Answer:
        """A few bytes that unpack to `size`."""
        packer = zlib.compressobj(9, zlib.DEFLATED, 31)
        blank = b" " * CHUNK
        parts = [packer.compress(blank) for _ in range(size // CHUNK)]
        return cls(200, b"".join(parts) + packer.flush(), headers=(("Content-Encoding", "gzip"),))

    @classmethod
    def hang(cls) -> Answer:
        """Never an answer; the connection stays open until the client or the server closes it."""
        return cls(delivery="hang")

    @classmethod
    def drip(cls, part: Literal["head", "body"], seconds_per_byte: float) -> Answer:
        """The usual answer, whose head or body comes byte by byte."""
        return cls(delivery="drip_head" if part == "head" else "drip_body", pace=seconds_per_byte)

    @classmethod
    def huge(cls, size: int, *, chunked: bool = False) -> Answer:
        """A valid JSON answer of about `size` bytes, streamed; with `chunked` its length is not announced."""
        return cls(delivery="huge", size=size, headers=CHUNKED if chunked else ())

    @classmethod
    def nested(cls, depth: int = 100_000) -> Answer:
        """`data` is that many lists inside each other."""
        return cls(200, b'{"ret":200,"msg":"success","data":' + b"[" * depth + b"]" * depth + b"}")

    @classmethod
    def rewritten(cls, rewrite: Callable[[Request, list[Record]], Any]) -> Answer:
        """The usual envelope, its `data` made by a function of the request and the usual records."""
        return cls(rewrite=rewrite)

    @classmethod
    def null_record(cls) -> Answer:
        """The good records with a null among them."""
        return cls(rewrite=lambda _, records: [*records[:1], None, *records[1:]])

    @classmethod
    def half_bad(cls) -> Answer:
        """The first half of the records good, the others spoilt, each in the next one of `SPOILERS`' ways."""
        return cls(rewrite=half_bad)


CHUNKED = (("Transfer-Encoding", "chunked"),)
TRACE_ID = "00000000-0000-4000-8000-000000000000"

# Ways to spoil a record. After them all, foreign entries follow the records: see `half_bad`.
SPOILERS: dict[str, Callable[[Record], Any]] = {
    "null": lambda _: None,
    "string": lambda record: record["s"],
    "list": lambda record: [*record.values()],
    "empty": lambda _: {},
    "no_s": lambda record: _without(record, "s"),
    "no_t": lambda record: _without(record, "t"),
    "no_p": lambda record: _without(record, "p"),
    "no_v": lambda record: _without(record, "v"),
    "no_vw": lambda record: _without(record, "vw"),
    "no_td": lambda record: _without(record, "td"),
    "null_p": lambda record: record | {"p": None},
    "text_p": lambda record: record | {"p": "n/a"},
    "empty_p": lambda record: record | {"p": ""},
    "nan_p": lambda record: record | {"p": "NaN"},
    "bare_nan_p": lambda record: record | {"p": float("nan")},
    "infinite_p": lambda record: record | {"p": "Infinity"},
    "bool_p": lambda record: record | {"p": True},
    "list_p": lambda record: record | {"p": ["1"]},
    "huge_p": lambda record: record | {"p": "9" * 5_000},
    "exponent_p": lambda record: record | {"p": "1e999999999"},
    "underscore_p": lambda record: record | {"p": "1_000.5"},
    "arabic_p": lambda record: record | {"p": "٣٠٥"},
    "spaced_p": lambda record: record | {"p": " 305.771\n"},
    "negative_v": lambda record: record | {"v": "-1"},
    "text_t": lambda record: record | {"t": "yesterday"},
    "bool_t": lambda record: record | {"t": True},
    "float_t": lambda record: record | {"t": record["t"] + 0.5},
    "negative_t": lambda record: record | {"t": -1},
    "huge_t": lambda record: record | {"t": 10**30},
    "text_td": lambda record: record | {"td": "buy"},
    "bool_td": lambda record: record | {"td": False},
    "huge_td": lambda record: record | {"td": 2**70},
    "number_s": lambda record: record | {"s": 600519},
    "surrogate_s": lambda record: record | {"s": "\ud800"},
}


def half_bad(_: Request, records: list[Record]) -> list[Any]:
    """Spoil the second half; then a code that was not asked and the first record once more, twice."""
    good = (len(records) + 1) // 2
    spoilt = [
        spoil(record)
        for record, spoil in zip(records[good:], itertools.cycle(SPOILERS.values()), strict=False)
    ]
    strangers = [record | {"s": "NOTASKED.US"} for record in records[:1]]
    return [*records[:good], *spoilt, *strangers, *records[:1], *records[:1]]


def _without(record: Record, field: str) -> Record:
    return {name: value for name, value in record.items() if name != field}


def _dumps(value: Any) -> bytes:
    """Write JSON as the API does; text that is no valid Unicode is escaped."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode()


def _business(ret: int, msg: str) -> Answer:
    """HTTP 200 around a refusal."""
    return Answer.json({"ret": ret, "msg": msg, "traceId": TRACE_ID, "data": None})


def _problem(status: int, title: str, detail: str, instance: str) -> Answer:
    """A refusal as RFC 7807 has it."""
    body = {"type": "about:blank", "title": title, "status": status, "detail": detail, "instance": instance}
    return Answer(status, _dumps(body), PROBLEM)


NOT_EXISTS = "All product not exists"

# Every way the API has to say no. The bodies of 401_token_invalid, 200_rate_limit and 404_problem are captures.
REFUSALS: dict[str, Answer] = {
    "401_token_invalid": Answer.raw(401, '{"code":401,"message":"Token invalid","timestamp":1786778697472}'),
    "200_rate_limit": Answer.raw(200, '{"detail":"Rate limit exceeded"}'),
    "429_json": Answer.raw(429, '{"detail":"Rate limit exceeded"}'),
    "429_html": Answer.html(429, "429 Too Many Requests"),
    "ret_501": _business(501, "Request frequency exceed the limit, please reduce the request frequency"),
    "ret_502": _business(502, "Request frequency for the day upper limit"),
    "ret_509": _business(509, "The plan has expired"),
    "ret_514": _business(514, "The market is not included in the plan"),
    "ret_508": _business(508, NOT_EXISTS),
    "ret_500_not_exists": _business(500, NOT_EXISTS),
    "ret_505": _business(505, f"Products quantity exceeds the limit：{MAX_CODES}"),
    "ret_506": _business(506, "Parameter error"),
    "ret_507": _business(507, "Missing parameter"),
    "400_problem": _problem(400, "Bad Request", "Required parameter is not present.", "/stock/batch_trade"),
    "404_problem": _problem(
        404,
        "Not Found",
        "No static resource common/basic/markets/trading_hours.",
        "/common/basic/markets/trading_hours",
    ),
    "ret_500": _business(500, "System error"),
    "500_empty": Answer.empty(500),
    "500_json": Answer.raw(500, '{"ret":500,"msg":"System error","traceId":"x","data":null}'),
    "502_html": Answer.html(502, "502 Bad Gateway"),
    "503_html": Answer.html(503, "503 Service Temporarily Unavailable"),
    "503_json": Answer.raw(503, '{"code":503,"message":"Service Unavailable","timestamp":1786778697472}'),
    "504_empty": Answer.empty(504),
    "ret_0": _business(0, "success"),
}

# The forms in which "over the rate" comes; the server takes them in turn.
RATE_REFUSALS = ("200_rate_limit", "429_json", "429_html", "ret_501")


# --------------------------------------------------------------------------------------------------- the server


@dataclass(slots=True)
class Request:
    """One request, as it arrived and as it was answered."""

    at: float  # time.monotonic() when its head was complete
    path: str  # as sent, with the query
    product: str  # "" unless it asks for trades
    codes: tuple[str, ...]
    key: str
    headers: Mapping[str, str]  # names in lower case
    status: int = 0  # HTTP status of the answer; 0: none was sent
    over_limit: bool = False


Script = Callable[[Request], Answer | None] | Iterable[Answer | None]


class _Window:
    """The requests of one key: told of each, says whether it is within the limits. Refused ones do not count."""

    def __init__(self, limits: Iterable[tuple[int | None, float]]) -> None:
        self._windows = [(limit, seconds, deque[float]()) for limit, seconds in limits if limit is not None]

    def admit(self, now: float) -> bool:
        for _, seconds, times in self._windows:
            while times and times[0] <= now - seconds:
                times.popleft()
        if any(len(times) >= limit for limit, _, times in self._windows):
            return False
        for _, _, times in self._windows:
            times.append(now)
        return True


def make_certificate(folder: Path) -> tuple[ssl.SSLContext, Path]:
    """Make a self-signed certificate for 127.0.0.1 by the openssl program; return a server's context and its file."""
    openssl = shutil.which("openssl")
    if openssl is None:
        raise RuntimeError("TLS needs the openssl program on the PATH")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([openssl, "req", *kind, *names, *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context, certificate


class InfowayServer:
    """The API on 127.0.0.1, from `start` (or ``with``) to `stop`; started again it keeps its port.

    `script` is asked first for every request, whatever its key, rate or path: a callable of the request, or an
    iterable whose answers are used up in the order of arrival. Where it has nothing (None, or its end) the
    usual answer is given.
    """

    def __init__(
        self,
        *,
        keys: Collection[str] = frozenset({"test-key"}),
        per_second: int | None = None,
        per_minute: int | None = None,
        over: str | None = None,  # one of RATE_REFUSALS; None takes them in turn
        latency: float | Callable[[Request], float] = 0.0,
        unknown: Collection[str] = frozenset(),
        all_unknown: Literal["ret_508", "ret_500", "data_null"] = "ret_508",
        script: Script = (),
        half_days: Collection[str] = frozenset(),  # YYYYMMDD
        holidays: Collection[str] = frozenset(),
        half_days_are_trade_days: bool = False,  # listed in both lists
        epoch_ms: int = EPOCH_MS,
        tick_every: float | None = None,  # seconds; None: only `bump` makes new trades
        requests_per_connection: int | None = None,  # then it is closed, unannounced
        record: bool = True,  # keep `requests`
        tls: bool = False,
        port: int = 0,
    ) -> None:
        self.keys = keys
        self.over = over
        self.latency = latency
        self.unknown = unknown
        self.all_unknown = all_unknown
        self.half_days = half_days
        self.holidays = holidays
        self.half_days_are_trade_days = half_days_are_trade_days
        self.requests: list[Request] = []
        self.request_count = 0
        self.over_limit = 0
        self.peak_in_flight = 0
        self.in_flight = 0
        self.connections = 0  # accepted since the start
        self.port = port
        self.ca_file: Path | None = None
        self.script = script
        self._limits = ((per_second, 1.0), (per_minute, 60.0))
        self._windows: dict[str, _Window] = {}
        self._epoch_ms = epoch_ms
        self._tick = 0
        self._tick_every = tick_every
        self._born = time.monotonic()
        self._requests_per_connection = requests_per_connection
        self._record = record
        self._tls = tls
        self._context: ssl.SSLContext | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._condition = threading.Condition()
        self._closing = threading.Event()
        self._listener: socket.socket | None = None
        self._threads: dict[threading.Thread, socket.socket] = {}
        self._acceptor: threading.Thread | None = None
        self._refusals = itertools.cycle(RATE_REFUSALS)
        self._cache: tuple[int, dict[tuple[str, str], bytes | None]] = (-1, {})

    # ------------------------------------------------------------------------------------------------ life

    def __enter__(self) -> InfowayServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The base URL, without a slash at its end."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen."""
        if self._tls and self._context is None:
            self._make_certificate()
        self._closing = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=512)
        self.port = int(self._listener.getsockname()[1])
        self._acceptor = threading.Thread(target=self._accept, args=(self._listener,), daemon=True)
        self._acceptor.start()

    def stop(self) -> None:
        """Close the listener and every connection, whatever it is doing."""
        self._closing.set()
        if self._listener is not None:
            _shut(self._listener)
        if self._acceptor is not None:
            self._acceptor.join()
        with self._condition:
            threads = dict(self._threads)
        for connection in threads.values():
            _shut(connection)
        for thread in threads:
            thread.join()
        if self._listener is not None:
            self._listener.close()
        self._listener = self._acceptor = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = self._context = None

    def _make_certificate(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="stockrt-infoway-")
        self._context, self.ca_file = make_certificate(Path(self._folder.name))

    # ------------------------------------------------------------------------------------------- for tests

    @property
    def tick(self) -> int:
        """Which trades are the latest."""
        timed = 0 if self._tick_every is None else int((time.monotonic() - self._born) / self._tick_every)
        return self._tick + timed

    def bump(self, ticks: int = 1) -> None:
        """Let every instrument have traded."""
        with self._condition:
            self._tick += ticks

    @property
    def script(self) -> Script:
        """The answers to give instead of the usual ones."""
        return self._script

    @script.setter
    def script(self, script: Script) -> None:
        self._script = script
        self._next: Callable[[Request], Answer | None]
        if callable(script):
            self._next = script
        else:
            answers: Iterator[Answer | None] = iter(script)
            self._next = lambda _: next(answers, None)

    def wait_for(self, predicate: Callable[[InfowayServer], object], timeout: float = 10.0) -> None:
        """Return once the predicate holds, asked after each arrival and answer; TimeoutError if it never does."""
        with self._condition:
            if not self._condition.wait_for(lambda: predicate(self), timeout):
                raise TimeoutError(
                    f"not within {timeout} s; {self.request_count} requests, {self.in_flight} in flight"
                )

    def record(self, code: str, product: str | None = None) -> Record:
        """Return the trade that it now answers for this code; KeyError if no product knows it."""
        for name in [product] if product is not None else PRODUCTS:
            if self._knows(name, code):
                return make_record(code, self.tick, self._epoch_ms)
        raise KeyError(code)

    def codes_asked(self) -> list[str]:
        """Return every code of every request for trades, in order of arrival."""
        return [code for request in self.requests for code in request.codes]

    # ----------------------------------------------------------------------------------------- connections

    def _accept(self, listener: socket.socket) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            with self._condition:
                self.connections += 1
                self._threads[thread] = connection
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._context is not None:
                connection = self._context.wrap_socket(connection, server_side=True)
                with self._condition:
                    self._threads[threading.current_thread()] = connection
                    if self._closing.is_set():
                        return
            self._converse(connection)
        except OSError:
            pass  # the client went, or the server is closing
        finally:
            with contextlib.suppress(OSError):
                connection.close()
            with self._condition:
                del self._threads[threading.current_thread()]

    def _converse(self, connection: socket.socket) -> None:
        """Answer one request after the other until one side has had enough."""
        buffer = b""
        for served in itertools.count(1):
            while (end := buffer.find(b"\r\n\r\n")) < 0:
                if len(buffer) > MAX_HEAD:
                    connection.sendall(_head(431, (), 0))
                    return
                received = connection.recv(CHUNK)
                if not received:
                    return
                buffer += received
            at = time.monotonic()
            method, request = _parse(buffer[:end], at)
            buffer = buffer[end + 4 :]
            with self._condition:
                answer = self._decide(method, request)
            try:
                keep = self._deliver(connection, request, answer)
            finally:
                with self._condition:
                    self.in_flight -= 1
                    self._condition.notify_all()
            if not keep or served == self._requests_per_connection:
                return

    # --------------------------------------------------------------------------------------------- answers

    def _decide(self, method: str, request: Request) -> Answer:
        """Record the request and choose its answer; the caller holds the lock."""
        known_key = request.key in self.keys
        if known_key:
            window = self._windows.setdefault(request.key, _Window(self._limits))
            request.over_limit = not window.admit(request.at)
        answer = self._next(request)
        if answer is None:
            if method != "GET":
                answer = _problem(
                    405, "Method Not Allowed", f"Method '{method}' is not supported.", request.path
                )
            elif not known_key:
                answer = REFUSALS["401_token_invalid"]
            elif request.over_limit:
                answer = REFUSALS[self.over or next(self._refusals)]
            else:
                answer = self._usual(request)
        elif answer.body is None:
            answer = replace(answer, body=self._rewritten(request, answer))
        request.status = 0 if answer.delivery in ("hang", "cut_before", "reset") else answer.status
        self.over_limit += request.over_limit
        self.request_count += 1
        self.in_flight += 1
        self.peak_in_flight = max(self.peak_in_flight, self.in_flight)
        if self._record:
            self.requests.append(request)
        self._condition.notify_all()
        return answer

    def _rewritten(self, request: Request, answer: Answer) -> bytes:
        usual = self._usual(request).body or b""
        if answer.rewrite is None:
            return usual
        records = json.loads(usual).get("data") or []
        return _dumps(
            {"ret": 200, "msg": "success", "traceId": TRACE_ID, "data": answer.rewrite(request, records)}
        )

    def _usual(self, request: Request) -> Answer:
        path, _, query = request.path.partition("?")
        if path == "/common/basic/markets/trading_days":
            return self._trading_days(query)
        if not request.product:
            resource = path.removeprefix("/")
            return _problem(404, "Not Found", f"No static resource {resource}.", path)
        if len(request.codes) > MAX_CODES:
            return REFUSALS["ret_505"]
        tick = self.tick
        if self._cache[0] != tick:
            self._cache = (tick, {})
        cache = self._cache[1]
        records = []
        for code in dict.fromkeys(request.codes):
            place = (request.product, code)
            try:
                record = cache[place]
            except KeyError:
                known = self._knows(request.product, code)
                record = cache[place] = _dumps(make_record(code, tick, self._epoch_ms)) if known else None
            if record is not None and code not in self.unknown:
                records.append(record)
        if not records:
            forms = {"ret_508": "ret_508", "ret_500": "ret_500_not_exists"}
            name = forms.get(self.all_unknown)
            return REFUSALS[name] if name else Answer.data(None)
        trace = f"00000000-0000-4000-8000-{self.request_count:012x}".encode()
        envelope = b'{"ret":200,"msg":"success","traceId":"%b","data":[%b]}'
        return Answer(200, envelope % (trace, b",".join(records)))

    def _knows(self, product: str, code: str) -> bool:
        return code not in self.unknown and PRODUCTS[product].fullmatch(code) is not None

    def _trading_days(self, query: str) -> Answer:
        values = {name: found[0] for name, found in parse_qs(query).items()}
        try:
            first, last = (
                datetime.datetime.strptime(values[name], "%Y%m%d").date() for name in ("beginDay", "endDay")
            )
        except (KeyError, ValueError):
            return REFUSALS["400_problem"]
        if values.get("market") not in ("US", "HK", "CN", "JP", "KS", "IN", "TW"):
            return REFUSALS["ret_506"]
        spread = (first + datetime.timedelta(days=number) for number in range((last - first).days + 1))
        days = [f"{day:%Y%m%d}" for day in spread if day.weekday() < 5]
        half = [day for day in days if day in self.half_days]
        full = [
            day
            for day in days
            if day not in self.holidays and (self.half_days_are_trade_days or day not in half)
        ]
        return Answer.data({"trade_days": full, "half_trade_days": half})

    # -------------------------------------------------------------------------------------------- delivery

    def _deliver(self, connection: socket.socket, request: Request, answer: Answer) -> bool:
        """Send an answer in its manner; return whether the connection may be used again."""
        latency = self.latency if isinstance(self.latency, (int, float)) else self.latency(request)
        if latency + answer.delay > 0 and self._closing.wait(latency + answer.delay):
            return False
        body = answer.body or b""
        headers = (("Content-Type", answer.content_type), *answer.headers)
        keep = request.headers.get("connection", "").lower() != "close"
        match answer.delivery:
            case "whole" | "gzip":
                if answer.delivery == "gzip" and "gzip" in request.headers.get("accept-encoding", ""):
                    body, headers = gzip.compress(body, 1), (*headers, ("Content-Encoding", "gzip"))
                connection.sendall(_head(answer.status, headers, len(body)) + body)
            case "chunked" | "cut_chunk" | "bad_chunk":
                return self._deliver_chunks(connection, answer, headers, body) and keep
            case "overstated":
                connection.sendall(_head(answer.status, headers, len(body) + 100) + body)
                return False
            case "understated":
                connection.sendall(_head(answer.status, headers, len(body) // 2) + body)
            case "cut_body":
                connection.sendall(_head(answer.status, headers, len(body)) + body[: len(body) // 2])
                return False
            case "cut_before":
                return False
            case "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return False
            case "hang":
                while connection.recv(CHUNK):
                    pass
                return False
            case "drip_head":
                return (
                    self._drip(connection, _head(answer.status, headers, len(body)) + body, answer.pace)
                    and keep
                )
            case "drip_body":
                connection.sendall(_head(answer.status, headers, len(body)))
                return self._drip(connection, body, answer.pace) and keep
            case "huge":
                self._deliver_huge(connection, answer, headers)
        return keep

    def _deliver_chunks(
        self, connection: socket.socket, answer: Answer, headers: tuple[tuple[str, str], ...], body: bytes
    ) -> bool:
        half = len(body) // 2
        connection.sendall(_head(answer.status, headers + CHUNKED, None) + _chunk(body[:half]))
        if answer.delivery == "cut_chunk":
            return False
        if answer.delivery == "bad_chunk":
            connection.sendall(b"zz\r\n" + body[half:] + b"\r\n0\r\n\r\n")
            return False
        connection.sendall(_chunk(body[half:]) + b"0\r\n\r\n")
        return True

    def _deliver_huge(
        self, connection: socket.socket, answer: Answer, headers: tuple[tuple[str, str], ...]
    ) -> None:
        start, end = b'{"ret":200,"msg":"', b'","data":[]}'
        count, rest = divmod(answer.size, CHUNK)
        pieces = itertools.chain([start], itertools.repeat(b"x" * CHUNK, count), [b"x" * rest + end])
        chunked = CHUNKED[0] in answer.headers
        connection.sendall(
            _head(answer.status, headers, None if chunked else len(start) + answer.size + len(end))
        )
        for piece in pieces:
            connection.sendall(_chunk(piece) if chunked else piece)
        if chunked:
            connection.sendall(b"0\r\n\r\n")

    def _drip(self, connection: socket.socket, text: bytes, pace: float) -> bool:
        for position in range(len(text)):
            if self._closing.wait(pace):
                return False
            connection.sendall(text[position : position + 1])
        return True


# ---------------------------------------------------------------------------------------------- small helpers


def make_record(code: str, tick: int, epoch_ms: int = EPOCH_MS) -> Record:
    """Return the trade of this code at this tick."""
    seed = zlib.crc32(code.encode())
    step = zlib.crc32(f"{code}#{tick}".encode())
    price = 1_000 + seed % 900_000 + step % 1_000  # thousandths
    scale = 5 if code.endswith(("USDT", "USDC")) else 0  # crypto trades fractions
    volume = 1 + step // 1_000 % 10_000
    return {
        "s": code,
        "t": epoch_ms + tick * TICK_MS + seed % TICK_MS,
        "p": _decimal(price, 3),
        "v": _decimal(volume, scale),
        "vw": _decimal(price * volume, 3 + scale),
        "td": step % 3,
    }


def _decimal(number: int, scale: int) -> str:
    """Write number / 10**scale without an exponent or needless zeros."""
    if scale == 0:
        return str(number)
    whole, part = divmod(number, 10**scale)
    return f"{whole}.{part:0{scale}d}".rstrip("0").rstrip(".")


def _parse(head: bytes, at: float) -> tuple[str, Request]:
    """Take a request's head apart; what makes no sense comes out empty and is refused later."""
    lines = head.decode("latin-1").split("\r\n")
    method, _, rest = lines[0].partition(" ")
    path = rest.rpartition(" ")[0] or "/"
    headers = {}
    for line in lines[1:]:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    product, codes = "", ""
    match path.partition("?")[0].split("/"):
        case ["", name, "batch_trade", codes] if codes and name in PRODUCTS:
            product = name
    asked = tuple(unquote(codes).split(",")) if product else ()
    return method, Request(at, path, product, asked, headers.get("apikey", ""), headers)


def _head(status: int, headers: Iterable[tuple[str, str]], length: int | None) -> bytes:
    lines = [f"HTTP/1.1 {status} {REASONS.get(status, 'Unknown')}"]
    lines += [f"{name}: {value}" for name, value in headers]
    if length is not None:
        lines.append(f"Content-Length: {length}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


REASONS = {
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    404: "Not Found",
    405: "Method Not Allowed",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}


def _chunk(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(body), body) if body else b""


def _shut(connection: socket.socket) -> None:
    """Wake whoever reads or writes it."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


# ------------------------------------------------------------------------------------------------- by hand


def main(arguments: list[str] | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(
        description="An Infoway market-data API on the loopback, with made-up trades."
    )
    add = parser.add_argument
    add("--port", type=int, default=0, help="default: a free one")
    add(
        "--key",
        action="append",
        metavar="KEY",
        help="a key that it accepts, may be repeated; default: test-key",
    )
    add(
        "--per-second",
        type=int,
        metavar="N",
        help="requests that a key may make in any second; default: no limit",
    )
    add(
        "--per-minute",
        type=int,
        metavar="N",
        help="requests that a key may make in any minute; default: no limit",
    )
    add(
        "--over",
        choices=RATE_REFUSALS,
        help="how it refuses what is over the limit; default: each way in turn",
    )
    add("--latency", type=float, default=0.0, metavar="SECONDS", help="before each answer; default: 0")
    add("--unknown", default="", metavar="CODES", help="comma-separated codes that it does not know")
    add(
        "--tick-every",
        type=float,
        metavar="SECONDS",
        help="new trades that often; default: the same ones for ever",
    )
    add("--answer", choices=sorted(REFUSALS), help="answer every request thus")
    add("--tls", action="store_true", help="https with a certificate of its own (needs openssl)")
    options = parser.parse_args(arguments)

    server = InfowayServer(
        keys=frozenset(options.key or ["test-key"]),
        per_second=options.per_second,
        per_minute=options.per_minute,
        over=options.over,
        latency=options.latency,
        unknown=frozenset(filter(None, options.unknown.split(","))),
        script=(lambda _: REFUSALS[options.answer]) if options.answer else (),
        epoch_ms=int(time.time() * 1000),
        tick_every=options.tick_every,
        record=False,
        tls=options.tls,
        port=options.port,
    )
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    with server:
        print(server.url, flush=True)
        if server.ca_file:
            print(f"its certificate: {server.ca_file}", flush=True)
        stopped.wait()
    print(f"{server.request_count} requests, {server.over_limit} over the limit", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
