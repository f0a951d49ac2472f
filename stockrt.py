#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "pymongo>=4.10",
#     "python-dotenv>=1.0",
#     "tqdm>=4.66",
#     "websocket-client>=1.8",
# ]
# ///
"""stockrt: collects the latest trades of stocks, currency pairs and crypto.

The trades come in batches from the Infoway REST API and go into MongoDB, or into a local SQLite file
where no MongoDB is configured. Data goes one way through the rooms below, leaves first, `main` last:

    text -> codes -> batches -> answers -> trades -> documents -> store -> report -> text

Rooms: errors, tools, settings, instruments, events, HTTP, local files, quota, Infoway, stores, delivery, closing
prices, run, platform protocol, platform link, command journal, daemon, service manager, command line.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036  (before anything that an older Python could not import)
    raise SystemExit(
        f"stockrt needs Python 3.11 or newer; this is {sys.version.split()[0]} ({sys.executable})"
    )

import argparse
import contextlib
import gc
import hashlib
import io
import json
import logging
import math
import os
import queue
import random
import re
import signal
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta, tzinfo
from enum import Enum
from functools import cache, lru_cache, partial
from itertools import islice
from operator import itemgetter
from pathlib import Path
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, Protocol, TypeAlias, TypeVar, cast
from urllib.parse import parse_qsl, quote, unquote, unquote_plus, urlencode, urlsplit

if TYPE_CHECKING:  # what a path does not need is imported where it is needed: it costs start time and memory
    import socket
    import sqlite3
    from http.client import HTTPConnection, HTTPResponse

    from dotenv.parser import Binding
    from pymongo import MongoClient
    from pymongo.collection import Collection as MongoCollection

__version__ = "1.0.0"

log = logging.getLogger("stockrt")
_T = TypeVar("_T")


# ======================================================================================================
# Errors
# ======================================================================================================


class StockrtError(Exception):
    """Root of everything that stockrt raises by itself.

    StockrtError            exit 1
    ├── UsageError          exit 64: the command line; says which flag
    ├── SettingsError       exit 78: the settings; holds every fault found
    ├── InstrumentError     a code that cannot be asked for; says what to type instead
    ├── NoKeyError          no API key can serve now; says which key is out, why and until when
    ├── Interrupted         the run was asked to stop
    ├── StoreError          the store did not take what it was given; says which setting mends it
    │   ├── StoreAway       MongoDB does not take writes now; what is not written is kept and follows
    │   └── SpoolFull       no more may wait on this machine for MongoDB
    ├── RegistrationError   the platform did not register the module; says what to do
    ├── DialError           no connection to the platform could be made
    └── LinkLost            the connection to the platform is gone

    Each message says what came, what was expected and which setting or flag changes it.
    """

    exit_code = 1


class UsageError(StockrtError):
    """The command line cannot be understood; exit status 64 (EX_USAGE of sysexits.h)."""

    exit_code = 64


class SettingsError(StockrtError):
    """The settings have faults; exit status 78 (EX_CONFIG of sysexits.h).

    `faults` holds one sentence for each, secrets masked.
    """

    exit_code = 78

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = tuple(faults)


class InstrumentError(StockrtError):
    """A code that is refused before any request is made."""


class NoKeyError(StockrtError):
    """No API key can serve this product now."""


class Interrupted(StockrtError):
    """The run was asked to stop while it waited."""


class StoreError(StockrtError):
    """The store is away or refuses to work; nothing of the write counts as stored."""


class StoreAway(StoreError):
    """MongoDB does not take writes now, for no fault of a document: `unreachable`, or with words of its own."""

    def __init__(self, message: str, unreachable: bool = True, words: str = "") -> None:
        super().__init__(message)
        self.unreachable = unreachable
        self.words = words


class SpoolFull(StoreError):
    """The limit of what may wait on this machine is reached; what waits is kept."""


class LostCommand(StoreError):
    """A command of the journal that nobody can read any more."""


class RegistrationError(StockrtError):
    """The platform did not register the module; says what to do."""


class DialError(StockrtError):
    """No connection could be made; `status` is the HTTP status of a refused handshake, 0 without one."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class LinkLost(StockrtError):
    """The connection is gone."""


# ======================================================================================================
# Tools: one line, times, whole files, the state directory, back-off, a throttle for what repeats
# ======================================================================================================


class Clock:
    """The time: of the wall, and of what only counts how long something takes. Tests hand in one of their own."""

    def wall(self) -> float:
        """Return epoch seconds."""
        return time.time()

    def monotonic(self) -> float:
        """Return seconds that no setting of the clock changes."""
        return time.monotonic()


SYSTEM_CLOCK = Clock()


def one_line(text: object, limit: int = 300) -> str:
    """Return `text` as one printable line of at most `limit` characters, control characters escaped."""
    try:
        text = str(text).strip()
    except ValueError:  # an int of more digits than Python writes
        text = f"a huge {type(text).__name__}"
    line = text
    if not text.isprintable():
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _nothing() -> None:
    """Stand for a callable that nobody gave."""


def _iso(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


def utc_now() -> datetime:
    """Return the time now, aware UTC, cut to whole milliseconds."""
    now = datetime.now(UTC)
    return now.replace(microsecond=now.microsecond // 1000 * 1000)


def utc_day(now: float) -> str:
    """Return the UTC date of epoch seconds, ISO 8601."""
    return datetime.fromtimestamp(now, UTC).date().isoformat()


def next_midnight(now: float) -> float:
    """Return the epoch seconds of the next midnight UTC: days of the API's quota are taken as UTC's."""
    return (now // 86400 + 1) * 86400


def _later(now: float, seconds: float) -> str:
    return _iso(datetime.fromtimestamp(round(now + seconds), UTC))


def age_words(seconds: float) -> tuple[str, float]:
    """Return an age in words, and the age at which the words are no longer true."""
    for unit, size, limit in (("s", 1, 60), ("min", 60, 3600), ("h", 3600, 48 * 3600)):
        if seconds < limit:
            whole = int(seconds // size)
            return f"{whole} {unit} ago", float((whole + 1) * size)
    days = int(seconds // 86400)
    return f"{days} d ago", (days + 1) * 86400.0


def show_age(seconds: float) -> str:
    """Return an age in its largest whole unit: `12 s`, `5 min`, `3 h`, `2 d`."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{int(seconds // size)} {unit}"
    return f"{max(0, int(seconds))} s"


def write_whole(path: Path, text: str, durable: bool = False) -> None:
    """Write a file of ours, mode 0600: the old one or the new one, never a part. Raises StoreError.

    `durable`: it is on disk when this returns; else it may be the old one after a power cut.
    """
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        with open(
            os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8"
        ) as stream:
            stream.write(text)
            keep_owner(new, path.parent)
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        new.replace(path)
        if durable:
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror}; see STATE_DIRECTORY") from None


def make_state_directory(directory: Path) -> None:
    """Make the state directory, for this user alone. Raises StoreError when it cannot be used."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"the state directory {directory} cannot be made: {error.strerror}; see STATE_DIRECTORY"
        ) from None
    if not os.access(directory, os.W_OK | os.X_OK):
        raise StoreError(
            f"the state directory {directory} cannot be written by this user; see STATE_DIRECTORY"
        )


def keep_owner(path: Path, directory: Path) -> None:
    """Give a new file to the owner of its directory: root's --register must not lock the service out."""
    owner = directory.stat()
    if os.geteuid() == 0 and owner.st_uid != 0:
        os.chown(path, owner.st_uid, owner.st_gid)


def backoff(first_s: float, cap_s: float, rng: random.Random, growth: float = 2.0) -> Iterator[float]:
    """Yield delays in seconds for ever: exponential, capped, with full jitter from the first one on."""
    ceiling = first_s
    while True:
        yield rng.uniform(0, ceiling)
        ceiling = min(cap_s, ceiling * growth)


def shorten(secret: str) -> str:
    """Return a hash as a person may see it."""
    return f"{secret[:4]}…{secret[-3:]}" if len(secret) > 10 else "***"


# How often a thread that waits for a key looks whether the run was stopped.
STOP_POLL_S = 0.2
# Ctrl-C: what was fetched has this long to be stored; a store that hangs is left behind.
INTERRUPT_GRACE_S = 0.9
# Codes that a line of the log names for each kind of failure.
CODES_NAMED = 5
# A trouble that goes on is said again this often.
TROUBLE_AGAIN_S = 300.0
# Reasons of one trouble that are told apart; a peer that says something new each time fills no log.
TROUBLE_KINDS = 16


class LogThrottle:
    """Says a repeating trouble when it begins or changes, every few minutes with a count, and when it ends."""

    def __init__(
        self, what: str, clock: Callable[[], float] = time.monotonic, then: str = "trying again"
    ) -> None:
        self._what = what
        self._then = then
        self._clock = clock
        self._said: dict[str, float] = {}  # kind of reason -> when it was said
        self._count = 0

    def again(self, reason: str) -> None:
        """The trouble is there (still)."""
        now = self._clock()
        self._count += 1
        kind = re.sub(r"\d+", "#", reason)  # seconds and bytes that differ make no new reason
        if kind not in self._said and len(self._said) >= TROUBLE_KINDS:
            kind = ""
        if kind not in self._said:
            log.warning("%s: %s; %s", self._what, reason, self._then)
        elif now - self._said[kind] >= TROUBLE_AGAIN_S:
            log.warning("%s: still %s (%d tries)", self._what, reason, self._count)
        else:
            return
        self._said[kind] = now

    @property
    def there(self) -> bool:
        """Whether the trouble is not over."""
        return self._count > 0

    def over(self) -> None:
        """The trouble is over, if there was one."""
        if self._count:
            log.info("%s: well again after %d tries", self._what, self._count)
            # Exceptions and the frames they came through hold each other: left alone they stay for hours, and
            # the next trouble's come on top. A hundred outages took 7 MB more than without this.
            gc.collect()
        self._said.clear()
        self._count = 0


# ======================================================================================================
# Settings
# ======================================================================================================

# Looked for in this order when --env-file is not given; the first that exists is the one that is read.
ENV_FILE_PLACES = (
    Path("stockrt.env"),
    Path(".env"),
    Path("config/.env"),
    Path("/etc/stockrt/stockrt.env"),
)
# Names with these beginnings are ours: an unknown one in the file is a misspelling worth a warning.
OUR_PREFIXES = ("MONGODB_", "INFOWAY_", "SERVER_")
# A shorter secret would mask pieces of ordinary words; no real key or password is that short.
SHORTEST_SECRET = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """What an API key may ask for; 0 means no limit."""

    name: str
    per_second: float
    per_minute: int
    per_day: int = 0

    def windows(self) -> tuple[tuple[int, float], ...]:
        """Return the sliding windows that keep the plan: (requests, seconds)."""
        if not self.per_second:
            return ()
        burst = max(1, int(self.per_second))  # 2.5 a second is 2 in every 0.8 s; 0.2 is 1 in every 5 s
        second = (burst, burst / self.per_second)
        return (second, (self.per_minute, 60.0)) if self.per_minute else (second,)


# Requests per second, minute and day of each plan: Infoway's price list.
PLANS = {
    "free": Plan("free", 1, 60, 172_800),
    "basic": Plan("basic", 2, 120, 172_800),
    "premium": Plan("premium", 10, 600, 864_000),
    "pro": Plan("pro", 20, 1200, 1_728_000),
}


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that can be set, checked. Made by `load_settings`; nothing else reads the environment."""

    api_keys: tuple[str, ...] = field(repr=False)
    api_base_url: str
    plans: tuple[Plan, ...]
    mongodb_uri: str = field(repr=False)
    mongodb_db_name: str
    realtime_name: str
    close_name: str
    license_name: str
    numeric_type: str
    server_host: str
    server_port: int
    server_tls: bool
    heartbeat_s: float
    module_name: str
    module_description: str
    state_directory: Path
    log_level: str
    metrics_file: Path | None = None
    spool_max_bytes: int = 1024 << 20
    color: bool = True

    def secrets(self) -> tuple[str, ...]:
        """Return every text that must not be shown, the longest first."""
        found = set(self.api_keys)
        if self.mongodb_shown() != self.mongodb_uri:
            found.add(self.mongodb_uri)
        match = _USERINFO.search(self.mongodb_uri)
        if match and ":" in match[1]:
            password = match[1].partition(":")[2]
            found |= {password, unquote(password), unquote_plus(password)}
        return tuple(sorted((s for s in found if len(s) >= SHORTEST_SECRET), key=len, reverse=True))

    def redact(self, text: str) -> str:
        """Return `text` with every secret replaced."""
        for secret in self.secrets():
            text = text.replace(secret, "***")
        return text

    def key_plans(self) -> tuple[tuple[str, Plan], ...]:
        """Return each API key with its plan: its own, or the one that is set for all."""
        plans = self.plans * len(self.api_keys) if len(self.plans) == 1 else self.plans
        return tuple(zip(self.api_keys, plans, strict=True))

    def mongodb_shown(self) -> str:
        """Return the MongoDB string without its user and password."""
        return mask_uri(self.mongodb_uri)

    def platform_url(self) -> str:
        """Return the platform's HTTP base URL, or '' where none is set."""
        if not (self.server_host and self.server_port):
            return ""
        host = f"[{self.server_host}]" if ":" in self.server_host else self.server_host
        return f"http{'s' if self.server_tls else ''}://{host}:{self.server_port}"


class LoadedSettings(NamedTuple):
    """The settings, the file they came from (None: the environment alone) and warnings to show."""

    settings: Settings
    source: Path | None
    warnings: tuple[str, ...]


_USERINFO = re.compile(r"^[a-z+]+://(.*)@", re.IGNORECASE | re.DOTALL)


def mask_uri(uri: str) -> str:
    """Return a URI with its user and password replaced: everything up to the last `@` goes."""
    shown = _USERINFO.sub(lambda m: uri[: uri.index("://") + 3] + "***@", uri)
    return re.sub(r"(?i)((?:password|authMechanismProperties)=)[^&;]*", r"\1***", shown)


def uri_options(uri: str) -> dict[str, str]:
    """Return the options of a MongoDB connection string, names in lower case."""
    return {name.lower(): value for name, value in parse_qsl(uri.partition("?")[2], keep_blank_values=True)}


def _expect(good: bool) -> None:
    if not good:
        raise ValueError


def _text(shortest: int, longest: int) -> Callable[[str], str]:
    def parse(value: str) -> str:
        _expect(shortest <= len(value) <= longest and value.isprintable())
        return value

    return parse


def _number(low: float, high: float) -> Callable[[str], float]:
    def parse(value: str) -> float:
        number = float(value)
        _expect(low <= number <= high)
        return number

    return parse


def _one_of(*words: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        _expect(value.lower() in words)
        return value.lower()

    return parse


def _port(value: str) -> int:
    _expect(value.isascii() and value.isdigit() and 1 <= int(value) <= 65535)
    return int(value)


def _switch(value: str) -> bool:
    _expect(value.lower() in ("0", "1", "false", "true", "no", "yes", "off", "on"))
    return value.lower() in ("1", "true", "yes", "on")


def _api_keys(value: str) -> tuple[str, ...]:
    keys = tuple(dict.fromkeys(key.strip() for key in value.split(",")))
    _expect(all(re.fullmatch(r"[!-~]+", key) for key in keys))  # it travels in an HTTP header
    return keys


def _base_url(value: str) -> str:
    parts = urlsplit(value)
    _expect(parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0)
    _expect(
        not (parts.query or parts.fragment or "@" in parts.netloc)
        and re.fullmatch(r"[!-~]+", value) is not None
    )
    return value.rstrip("/")


def _plans(value: str) -> tuple[Plan, ...]:
    return tuple(_plan(word.strip()) for word in value.split(","))


def _plan(word: str) -> Plan:
    if word.lower() in PLANS:
        return PLANS[word.lower()]
    rate = _number(0, 10_000)(word)
    _expect(rate == 0 or rate >= 0.01)
    return Plan(word, rate, int(rate * 60), 0)


def _mongodb_uri(value: str) -> str:
    match = re.fullmatch(r"(mongodb|mongodb\+srv)://(?:([^/]*)@)?([^/?@]+)(?:/([^?]*))?(?:\?(.*))?", value)
    _expect(match is not None)
    assert match is not None  # for the type checker: _expect has raised
    _expect("@" not in (match[2] or "") and (match[2] or "").count(":") <= 1)
    for host in match[3].split(","):
        parts = re.fullmatch(r"(\[[^\[\]]+\]|[^\[\]:\s]+)(?::(\d+))?", host)
        _expect(parts is not None and (not parts[2] or bool(_port(parts[2]))))
    # unacknowledged writes could not be counted as stored; MongoDB's URIs may separate options by ; too
    _expect(not re.search(r"(?i)(?:^|[&;])w=[+-]?0+(?:[&;]|$)", unquote(value.partition("?")[2])))
    return value


def _database_name(value: str) -> str:
    _expect(0 < len(value.encode()) <= 63 and not re.search(r'[/\\."$*<>:|?\s\0]', value))
    return value


def _collection_name(value: str) -> str:
    _expect(
        0 < len(value.encode()) <= 120 and not set(value) & set("$\0") and not value.startswith("system.")
    )
    return value


def _host(value: str) -> str:
    import ipaddress

    bare = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(bare))
    _expect(
        re.fullmatch(r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_-]+)*\.?", bare)
        is not None
    )
    _expect(not re.fullmatch(r"[\d.]+", bare))  # 10.0.0 or 10.0.0.256: a mistyped address, not a name
    return bare


def _megabytes(value: str) -> int:
    """Return the bytes of a number of megabytes (2^20 each)."""
    _expect(value.isascii() and value.isdigit() and 1 <= int(value) <= 1 << 20)
    return int(value) << 20


def _directory(value: str) -> Path:
    path = Path(value.partition(":")[0])  # systemd joins several with colons; ours is the first
    _expect(path.is_absolute() and "\0" not in value)
    return path


def _metrics_file(value: str) -> Path:
    path = Path(value)
    _expect(path.is_absolute() and path.suffix == ".prom")  # node_exporter reads no other names
    return path


class Setting(NamedTuple):
    """One row of the settings' table."""

    name: str
    attribute: str
    default: str
    expected: str
    parse: Callable[[str], object]
    secret: bool = False
    old_name: str = ""


SETTINGS = (
    Setting("INFOWAY_API_KEY", "api_keys", "", "one or several keys, comma-separated, ASCII without blanks",
            _api_keys, secret=True),
    Setting("INFOWAY_API_BASE_URL", "api_base_url", "https://data.infoway.io", "an http:// or https:// URL",
            _base_url),
    Setting("INFOWAY_PLAN", "plans", "free",
            "free, basic, premium, pro, or requests per second as a number (0: no limit); one for all keys, or "
            "one for each, comma-separated", _plans),
    Setting("MONGODB_HOST", "mongodb_uri", "",
            "mongodb://[user:password@]host[:port][/…] or mongodb+srv://…, with / : @ % in user and password "
            "percent-encoded and acknowledged writes (no w=0)", _mongodb_uri, secret=True),
    Setting("MONGODB_DB_NAME", "mongodb_db_name", "forecast_platform",
            "a database name of at most 63 bytes without / \\ . \" $ * < > : | ? or blanks", _database_name),
    Setting("MONGODB_REALTIME_COLLECTION_NAME", "realtime_name", "realtime",
            "a collection name of at most 120 bytes without $, not system.…", _collection_name,
            old_name="MONGODB_COLLECTION_NAME"),
    Setting("MONGODB_CLOSE_COLLECTION_NAME", "close_name", "close",
            "a collection name of at most 120 bytes without $, not system.…", _collection_name),
    Setting("MONGODB_LICENSE_COLLECTION_NAME", "license_name", "license_usage",
            "a collection name of at most 120 bytes without $, not system.…", _collection_name),
    Setting("MONGODB_NUMERIC_TYPE", "numeric_type", "string", "string, decimal or double",
            _one_of("string", "decimal", "double")),
    Setting("SERVER_IP", "server_host", "", "a host name or an address, without http:// and without a port",
            _host),
    Setting("SERVER_PORT", "server_port", "", "a number from 1 to 65535", _port),
    Setting("SERVER_TLS", "server_tls", "0", "0 (http, ws) or 1 (https, wss)", _switch),
    Setting("HEARTBEAT_INTERVAL", "heartbeat_s", "10", "seconds from 1 to 3600", _number(1, 3600)),
    Setting("MODULE_NAME", "module_name", "股票实时数据获取模块", "1 to 100 printable characters",
            _text(1, 100)),
    Setting("MODULE_DESCRIPTION", "module_description", "获取股票、外汇、加密货币的最新成交并写入 MongoDB",
            "at most 500 printable characters", _text(0, 500)),
    Setting("STATE_DIRECTORY", "state_directory", "", "an absolute path", _directory),
    Setting("SPOOL_MAX_MB", "spool_max_bytes", "1024", "megabytes, a whole number from 1 to 1048576", _megabytes),
    Setting("METRICS_FILE", "metrics_file", "", "an absolute path that ends in .prom", _metrics_file),
    Setting("LOG_LEVEL", "log_level", "info", "debug, info, warning or error",
            _one_of("debug", "info", "warning", "error")),
)  # fmt: skip
# What an attribute is when its setting has neither a value nor a default that could be parsed.
_WHEN_UNSET: dict[str, object] = {"api_keys": (), "mongodb_uri": "", "server_host": "", "server_port": 0}


def default_state_directory(environ: Mapping[str, str], is_root: bool) -> Path:
    """Return where state lives when STATE_DIRECTORY is not set: /var/lib for root, else the XDG place."""
    if is_root:
        return Path("/var/lib/stockrt")
    base = environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(base):  # the XDG specification: such a path is to be ignored
        base = os.path.join(environ.get("HOME") or "/", ".local/state")
    return Path(base) / "stockrt"


def read_env_file(path: Path) -> dict[str, str]:
    """Return the names and values of an env file; nothing in it is expanded."""
    return {b.key: b.value for b in _bindings(path) if b.key is not None and b.value is not None}


def broken_lines(path: Path) -> list[str]:
    """Return a fault for each line of an env file that is no NAME=value."""
    return [
        f"{path}, line {_line_number(b)}: expected NAME=value (not shown: it may hold a secret)"
        for b in _bindings(path)
        if b.error or (b.key is not None and b.value is None)
    ]


def _line_number(binding: Binding) -> int:
    text = binding.original.string  # it begins with the blank lines before
    return binding.original.line + text[: len(text) - len(text.lstrip())].count("\n")


def _bindings(path: Path) -> list[Binding]:
    """Return the parsed lines of an env file. Raises SettingsError when it cannot be read or is not UTF-8."""
    from dotenv.parser import parse_stream

    try:
        with path.open(encoding="utf-8-sig") as stream:
            return list(parse_stream(stream))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SettingsError([f"{path}: cannot be read: {why}; --env-file names another file"]) from None


def find_env_file(named: Path | None, places: Iterable[Path]) -> tuple[Path | None, str]:
    """Return the file to read (None: none) and a warning ('' for none).

    A named file must be readable, which `read_env_file` sees to. One of the usual places that exists but
    may not be read is passed over with a warning: a service gets its settings from its service manager.
    """
    if named is not None:
        return named, ""
    for place in places:
        with contextlib.suppress(OSError):  # a directory on the way that may not be searched: as not there
            if place.is_file():
                if os.access(place, os.R_OK):
                    return place, ""
                return None, f"{place} is there but may not be read by this user; left out"
    return None, ""


def is_service(environ: Mapping[str, str]) -> bool:
    """Return whether a unit of systemd runs this: its environment is then what the operator wrote."""
    return "INVOCATION_ID" in environ and "STATE_DIRECTORY" in environ


def read_credentials(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the secrets that systemd hands over in files (LoadCredential=), by the names of their settings.

    A file has the name of its setting in small letters; a missing or blank one is not set. Raises
    SettingsError.
    """
    folder = environ.get("CREDENTIALS_DIRECTORY")
    found: dict[str, str] = {}
    for name in (setting.name for setting in SETTINGS if folder and setting.secret):
        path = Path(cast(str, folder), name.lower())
        try:
            found[name] = path.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise SettingsError([f"{name}: the credential {path} cannot be read: {why}"]) from None
    return {name: text for name, text in found.items() if text}


def load_settings(
    environ: Mapping[str, str],
    env_file: Path | None = None,
    places: Iterable[Path] = ENV_FILE_PLACES,
    is_root: bool | None = None,
) -> LoadedSettings:
    """Read and check all settings: credentials are stronger than the environment, that than the file.

    An empty value counts as not set. Raises SettingsError with every fault at once.
    """
    source, warning = find_env_file(env_file, places)
    from_file = read_env_file(source) if source else {}
    origins = {"credential": read_credentials(environ), "environment": environ, str(source): from_file}
    warnings = (
        [warning] if warning and not is_service(environ) else []
    )  # systemd has read it (EnvironmentFile=)
    warnings += [_misspelled(name, str(source)) for name in from_file if _is_unknown(name)]
    if is_service(environ):
        warnings += [_misspelled(name, "environment") for name in environ if _is_unknown(name)]
    values: dict[str, Any] = dict(_WHEN_UNSET)
    faults = broken_lines(source) if source else []
    for setting in SETTINGS:
        where, name, text = _look_up(setting, origins)
        if not text and not setting.default:
            continue
        try:
            values[setting.attribute] = setting.parse(text or setting.default)
        except ValueError:
            shown = _masked(setting, text)
            faults.append(f"{name}={shown} ({where}): expected {setting.expected}")
    faults += _contradictions(values)
    if faults:
        raise SettingsError(faults)
    is_root = os.geteuid() == 0 if is_root is None else is_root
    values.setdefault("state_directory", default_state_directory(environ, is_root))
    values.setdefault("module_description", "")
    return LoadedSettings(Settings(**values, color=not environ.get("NO_COLOR")), source, tuple(warnings))


def _contradictions(values: Mapping[str, Any]) -> list[str]:
    """Return the faults of settings that are right one by one, but not together."""
    faults = []
    taken: dict[str, str] = {}
    for setting in SETTINGS:
        if setting.attribute in ("realtime_name", "close_name", "license_name"):
            name = values.get(setting.attribute, "")
            if name in taken:
                faults.append(f"{setting.name}={name!r}: expected another name than {taken[name]} has")
            elif name:
                taken[name] = setting.name
    keys, plans = len(values.get("api_keys", ())), len(values.get("plans", ()))
    if plans > 1 and plans != keys:
        faults.append(
            f"INFOWAY_PLAN names {plans} plans for {keys} keys: expected one for all or one for each"
        )
    return faults


def _look_up(setting: Setting, origins: Mapping[str, Mapping[str, str]]) -> tuple[str, str, str]:
    """Return where a setting is set, under which name, and its text."""
    for where, origin in origins.items():
        for name in filter(None, (setting.name, setting.old_name)):
            if text := origin.get(name, "").strip():
                return where, name, text
    return "", setting.name, ""


def _masked(setting: Setting, text: str) -> str:
    if setting.secret and not (setting.attribute == "mongodb_uri" and _USERINFO.match(text)):
        return "'***'"
    return repr(one_line(mask_uri(text), 100))


def _is_unknown(name: str) -> bool:
    return name.startswith(OUR_PREFIXES) and name not in _known_names()


def _known_names() -> list[str]:
    return [name for setting in SETTINGS for name in (setting.name, setting.old_name) if name]


def _misspelled(name: str, source: str) -> str:
    import difflib

    near = difflib.get_close_matches(name, _known_names(), n=1, cutoff=0)
    return f"{source}: {name} is no setting and has no effect; did you mean {near[0]}?"


NO_KEY_HINT = (
    "INFOWAY_API_KEY is not set: set it (environment or stockrt.env), or try --demo, which needs none"
)


# ======================================================================================================
# Instruments: from what a person typed to (code, product)
# ======================================================================================================


class Market(NamedTuple):
    """Where a code belongs: the API's product, the clock of its exchange, and when its regular session ends.

    `close` and `early_close` (on half days) are hour and minute of the exchange's clock; `calendar` is the
    market's name in the API's trading calendar, '' where it has no half days; a `continuous` market goes on
    through its close, without an auction.
    """

    product: str
    zone: str
    close: tuple[int, int]
    early_close: tuple[int, int] | None = None
    calendar: str = ""
    continuous: bool = False
    rests_on_weekends: bool = False


# The API's products, their codes' suffixes and the times of their sessions: Infoway's documentation.
_CHINA = Market("stock", "Asia/Shanghai", (15, 0))
MARKETS = {
    "US": Market("stock", "America/New_York", (16, 0), (13, 0), "US"),
    "HK": Market("stock", "Asia/Hong_Kong", (16, 0), (12, 0), "HK"),
    "SH": _CHINA,
    "SZ": _CHINA,
    "JP": Market("japan", "Asia/Tokyo", (15, 30)),
    "KS": Market("korea", "Asia/Seoul", (15, 30)),
    "IN": Market("india", "Asia/Kolkata", (15, 30)),
    "TW": Market("taiwan", "Asia/Taipei", (13, 30)),
}
# Instruments without a suffix: the market is their product's.
PRODUCT_MARKETS = {
    "common": Market("common", "America/New_York", (17, 0), continuous=True, rests_on_weekends=True),
    "crypto": Market("crypto", "UTC", (24, 0), continuous=True),
}
PRODUCTS = ("stock", "japan", "korea", "india", "taiwan", "crypto", "common")
# A workflow of the platform may send any code there: asked once more at this product before it fails.
FALLBACK_PRODUCT = "stock"
# What other programs call the same exchange.
SUFFIX_ALIASES = {"SS": "SH", "N": "US", "O": "US", "T": "JP", "NS": "IN", "KR": "KS"}
# First digit of a Chinese A-share number -> exchange.
A_SHARE_EXCHANGE = {"6": "SH", "9": "SH", "0": "SZ", "2": "SZ", "3": "SZ"}
# ISO 4217 codes that are quoted against each other, and the metals (XAU …).
CURRENCIES = frozenset(
    "USD EUR JPY GBP CNY CNH AUD NZD CAD CHF HKD SGD KRW TWD INR THB MYR IDR PHP VND MOP SEK NOK DKK PLN CZK "
    "HUF TRY RUB ZAR MXN BRL ARS CLP COP PEN ILS AED SAR QAR KWD EGP NGN KES PKR BDT LKR KZT UAH RON BGN ISK "
    "XAU XAG XPT XPD".split()
)
# Energy that the API lists at `common` without being a pair.
ENERGY = frozenset("USOIL UKOIL NGAS NATGAS WTIUSD BRENTUSD".split())
# What crypto pairs are quoted in; a pair such as BTCUSD is told from currencies by its other half.
CRYPTO_QUOTES = ("USDT", "USDC", "FDUSD", "TUSD", "BUSD", "BTC", "ETH", "BNB")
CRYPTO_COINS = frozenset("BTC ETH BNB SOL XRP ADA DOGE LTC BCH DOT TRX LINK AVAX".split())
# The API's codes are far shorter; a longer text is no code, whatever it holds.
MAX_CODE_LENGTH = 32
_CODE_ALPHABET = re.compile(r"[A-Z0-9.&^=_-]+")
_SEPARATORS = re.compile(r"[\s,;，；、]+")  # noqa: RUF001  (Chinese commas are meant)


class Instrument(NamedTuple):
    """A code in the API's own form, and the product it is asked at."""

    code: str
    product: str


_SUFFIX_PRODUCTS = {suffix: market.product for suffix, market in MARKETS.items()}
# Most codes come in the API's own form: reading them as a person's typing would give them back as they are.
_PLAIN_CODE = re.compile(
    r"[0-9]{6}\.(?:SH|SZ)|(?!00000)[0-9]{5}\.HK|[A-Z0-9]{1,20}\.(?:US|JP|KS|IN|TW)", re.ASCII
)


def split_codes(text: str) -> list[str]:
    """Return the codes of a text in which commas (Chinese ones too), semicolons or blanks separate them."""
    return [code for code in _SEPARATORS.split(text) if code]


def parse_code(raw: object) -> Instrument:
    """Return the instrument that a person or the platform meant by `raw` (a text or a whole number).

    `product:CODE` names the product outright, for a code whose form does not tell it (`common:US500`).
    Raises InstrumentError, which says what to type instead; nothing that could change a URL gets through.
    """
    import unicodedata

    text = unicodedata.normalize("NFKC", _code_text(raw)).strip().upper()
    named, _, rest = text.rpartition(":")
    if named.lower() in PRODUCTS and "." not in rest:
        return Instrument(_safe(rest.strip(), raw), named.lower())
    code = _safe(rest.strip() if named.lower() in PRODUCTS else text, raw)
    symbol, dot, suffix = code.rpartition(".")
    if not dot:
        return _without_suffix(code)
    if suffix not in MARKETS:
        raise InstrumentError(f"unknown exchange .{suffix}: {_proposal(symbol, suffix)}")
    return Instrument(_with_suffix(symbol, suffix), MARKETS[suffix].product)


def market_of(code: str) -> Market | None:
    """Return the market that `code` is traded at, None when its form does not tell."""
    name = market_name(code)
    return MARKETS.get(name) or PRODUCT_MARKETS.get(name)


def market_name(code: str) -> str:
    """Return the suffix of a code, or the product of one that has none: the names of the markets."""
    _, dot, suffix = code.rpartition(".")
    return suffix if dot else _bare_product(code)


def _code_text(raw: object) -> str:
    if isinstance(raw, str):
        return raw
    if (
        isinstance(raw, bool)
        or not isinstance(raw, int | float)
        or raw != raw
        or raw in (float("inf"), float("-inf"))
    ):
        raise InstrumentError(f"no code: {one_line(repr(raw), 40)}; expected a text such as AAPL.US")
    if raw != int(raw):
        raise InstrumentError(f"no code: {raw!r}; expected a whole number or a text such as 600519.SH")
    return str(int(raw)) if abs(raw) < 10**MAX_CODE_LENGTH else "9" * (MAX_CODE_LENGTH + 1)


def _safe(code: str, raw: object) -> str:
    """Return `code` if it is made of code characters only: the one gate before any URL."""
    if not code:
        raise InstrumentError("an empty code; expected one such as AAPL.US")
    if len(code) > MAX_CODE_LENGTH:
        raise InstrumentError(f"{len(code)} characters; a code has at most {MAX_CODE_LENGTH}")
    if not _CODE_ALPHABET.fullmatch(code) or ".." in code or not any(c.isalnum() for c in code):
        raise InstrumentError(
            "characters that no code has; expected letters, digits and dots such as AAPL.US"
        )
    return code


def _with_suffix(symbol: str, suffix: str) -> str:
    if not symbol.strip("."):
        raise InstrumentError(f"nothing before .{suffix}; expected a code such as {_EXAMPLES[suffix]}")
    if suffix == "HK" and symbol.isdigit():
        number = symbol.lstrip("0")
        if not 1 <= len(number) <= 5:
            raise InstrumentError(f"{symbol}.HK: expected one to five digits such as 00700.HK")
        return f"{number:0>5}.HK"
    if suffix in ("SH", "SZ") and not re.fullmatch(r"\d{6}", symbol):
        raise InstrumentError(f"{symbol}.{suffix}: expected six digits such as {_EXAMPLES[suffix]}")
    return f"{symbol}.{suffix}"


_EXAMPLES = {"US": "AAPL.US", "HK": "00700.HK", "SH": "600519.SH", "SZ": "000001.SZ", "JP": "7203.JP",
             "KS": "005930.KS", "IN": "RELIANCE.IN", "TW": "2330.TW"}  # fmt: skip


def _without_suffix(code: str) -> Instrument:
    if re.fullmatch(r"\d{6}", code) and code[0] in A_SHARE_EXCHANGE:
        return Instrument(f"{code}.{A_SHARE_EXCHANGE[code[0]]}", "stock")
    if product := _bare_product(code):
        return Instrument(code, product)
    raise InstrumentError(f"no exchange given: {_bare_proposal(code)}")


@lru_cache(maxsize=4096)  # asked again and again by every run; few codes have no suffix
def _bare_product(code: str) -> str:
    """Return the product of a code without suffix, '' when its form does not tell."""
    if code in ENERGY or (len(code) == 6 and code[:3] in CURRENCIES and code[3:] in CURRENCIES):
        return "common"
    if any(code.endswith(quoted) and len(code) >= len(quoted) + 2 for quoted in CRYPTO_QUOTES):
        return "crypto"
    return "crypto" if any(code.startswith(c) and code[len(c) :] in CURRENCIES for c in CRYPTO_COINS) else ""


def _bare_proposal(code: str) -> str:
    if not code.isdigit():
        return f"did you mean {code}.US?"
    if len(code) <= 5:
        return f"did you mean {code:0>5}.HK, or {code:0>6}.SZ?"
    return f"did you mean {code}.SH or {code}.SZ?" if len(code) == 6 else "expected six digits such as 600519"


def _proposal(symbol: str, suffix: str) -> str:
    if suffix in SUFFIX_ALIASES:
        return f"did you mean {symbol}.{SUFFIX_ALIASES[suffix]}?"
    if re.fullmatch(r"[A-Z]", suffix):
        return f"did you mean {symbol}.{suffix}.US?"
    return f"expected one of {' '.join('.' + name for name in MARKETS)}"


# ------------------------------------------------------------------------------------------------------
# Sessions
# ------------------------------------------------------------------------------------------------------

# The closing auction prints its trades within this time after the close.
AUCTION_MS = 5 * 60 * 1000
SATURDAY = 5


class Session(NamedTuple):
    """One market's session of one exchange-local date; all times are epoch milliseconds.

    `start`, `end`: the date itself, midnight to midnight. `close`: from then on the session is over.
    `until`: the last moment of a regular trade. `early_close`, `early_until`: the same on a half day.
    `half_day`: whether it is one, None when the calendar is missing.
    """

    date: str
    start: int
    end: int
    close: int
    until: int
    early_close: int
    early_until: int
    half_day: bool | None = False

    def on(self, half_day: bool | None) -> Session:
        """Return the session in the light of the calendar; without one the usual close counts."""
        if not half_day:
            return self._replace(half_day=half_day)
        return self._replace(close=self.early_close, until=self.early_until, half_day=True)


# The close of what is never over: dates on which a market rests, and codes of no known market.
NEVER = 1 << 62
NO_SESSION = Session("", 0, NEVER, NEVER, NEVER, NEVER, NEVER)


@cache
def zone_info(name: str) -> tzinfo | None:
    """Return an IANA zone, None on a machine without time-zone data, which is said once."""
    from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

    if name == "UTC":  # needs no data
        return UTC
    try:
        return ZoneInfo(name)
    except ZoneInfoNotFoundError:
        _say_no_zones()
        return None


@cache
def _say_no_zones() -> None:
    log.error(
        "no time-zone data on this machine: times are shown in UTC, and no close is kept but that of crypto; "
        "install the package tzdata"
    )


def session_of(market: Market, t: int) -> Session:
    """Return the session of the exchange-local date of a trade at `t` (epoch ms).

    NO_SESSION without time-zone data.
    """
    zone = zone_info(market.zone)
    return _session(market, datetime.fromtimestamp(t // 1000, zone).date(), zone) if zone else NO_SESSION


def session_before(market: Market, session: Session) -> Session:
    """Return the session before one of a market that is known: Friday's before Monday's."""
    while (before := session_of(market, session.start - 1)).close == NEVER:
        session = before
    return before


@lru_cache(maxsize=256)
def _session(market: Market, day: date, zone: tzinfo) -> Session:
    def at(hour_and_minute: tuple[int, int]) -> int:
        hour, minute = hour_and_minute
        later = day + timedelta(days=hour // 24)
        moment = datetime(later.year, later.month, later.day, hour % 24, minute, tzinfo=zone)
        return int(moment.timestamp()) * 1000

    start, end = at((0, 0)), at((24, 0))
    if market.rests_on_weekends and day.weekday() >= SATURDAY:
        return Session(day.isoformat(), start, end, NEVER, NEVER, NEVER, NEVER)
    # what goes on through its close trades in the next session from that moment on
    grace = -1 if market.continuous else AUCTION_MS
    close, early = at(market.close), at(market.early_close or market.close)
    return Session(day.isoformat(), start, end, close, close + grace, early, early + grace)


# ------------------------------------------------------------------------------------------------------
# Batches
# ------------------------------------------------------------------------------------------------------

# The API refuses more with `ret` 505.
MAX_BATCH = 100
# The duplicate check keeps codes in buckets of about so many, each one text: a short search for every code.
CODES_PER_BUCKET = 6
# Where nobody knows how many codes will come.
MANY_CODES = 100_000


class Batch(NamedTuple):
    """Codes that are asked for in one request, joined by commas as the URL has them.

    A joined text and not a list: 100,000 codes are then one megabyte, not ten.
    """

    product: str
    codes: str

    def split(self) -> list[str]:
        """Return the codes one by one."""
        return self.codes.split(",")


class BatchPlan:
    """Turns codes into batches of one product each, every code once, in the order they came.

    `total` counts distinct codes, those that cannot be asked included; `failures` says of each why. `expected`:
    about how many codes will come, which only its speed depends on.
    """

    def __init__(self, expected: int = MANY_CODES) -> None:
        self.total = 0
        self.failures: dict[str, str] = {}
        self.batches: list[Batch] = []
        self._open: dict[str, list[str]] = {}
        self._seen = [","] * (1 + expected // CODES_PER_BUCKET)

    def add(self, codes: Iterable[object]) -> None:
        """Take codes as they were typed; for a plain one, as nearly all are, `parse_code` would say the same."""
        take, is_plain = self._take, _PLAIN_CODE.fullmatch
        for raw in codes:
            if type(raw) is str and is_plain(raw):
                take(raw, _SUFFIX_PRODUCTS[raw[-2:]])
            else:
                self._add_one(raw)

    def _add_one(self, raw: object) -> None:
        try:
            self._take(*parse_code(raw))
        except InstrumentError as error:
            shown = one_line(raw, MAX_CODE_LENGTH + 8) or "''"
            self.total += shown not in self.failures
            self.failures[shown] = str(error)

    def add_instrument(self, instrument: Instrument) -> None:
        """Take one code that is already in the API's form."""
        self._take(*instrument)

    def _take(self, code: str, product: str) -> None:
        bucket = hash(code) % len(self._seen)
        if f",{code}," in self._seen[bucket]:
            return
        self._seen[bucket] += code + ","
        self.total += 1
        waiting = self._open.get(product)
        if waiting is None:
            waiting = self._open[product] = []
        waiting.append(code)
        if len(waiting) == MAX_BATCH:
            self._close(product)

    def finish(self) -> list[Batch]:
        """Close the batches that are not full, and return all."""
        for product in list(self._open):
            self._close(product)
        self._seen = []
        return self.batches

    def _close(self, product: str) -> None:
        if codes := self._open.pop(product):
            self.batches.append(Batch(product, ",".join(codes)))


def plan_batches(codes: Iterable[object]) -> BatchPlan:
    """Return the finished plan for `codes`, which are read once and not kept."""
    plan = BatchPlan(len(codes) if isinstance(codes, Sized) else MANY_CODES)
    plan.add(codes)
    plan.finish()
    return plan


# ======================================================================================================
# Events: what runs and the daemon tell, and in which words
# ======================================================================================================


class FailureKind(Enum):
    """Why a code failed, for counting; the reason in words goes to who asked."""

    INVALID_CODE = "invalid_code"
    UNKNOWN_CODE = "unknown_code"
    BAD_RECORD = "bad_record"
    NETWORK = "network"
    API = "api"
    KEY = "key"
    STORE = "store"
    OTHER = "other"


# How the reasons begin that this program gives; what the network says begins with the name of an exception.
_FAILURE_BEGINNINGS = (
    ("unknown to the API", FailureKind.UNKNOWN_CODE),
    ("field ", FailureKind.BAD_RECORD),
    ("the API sent ", FailureKind.BAD_RECORD),
    ("the API", FailureKind.API),
    ("HTTP ", FailureKind.API),
    ("an answer of more than ", FailureKind.API),
    ("no API key", FailureKind.KEY),
    ("fetched, not stored", FailureKind.STORE),
    ("its numbers do not fit", FailureKind.STORE),
    ("not asked for: ", FailureKind.STORE),
    ("MongoDB refused it", FailureKind.STORE),
    ("the local store refused it", FailureKind.STORE),
    ("no whole answer ", FailureKind.NETWORK),
    ("the connection broke", FailureKind.NETWORK),
)
_EXCEPTION_NAME = re.compile(
    r"\w*(Error|Exception|Timeout|timeout|IncompleteRead|Disconnected|gaierror|herror)\b"
)


def failure_kind(code: str, reason: str) -> FailureKind:
    """Return what kind of failure a report's `failures` holds for `code`."""
    for beginning, kind in _FAILURE_BEGINNINGS:
        if reason.startswith(beginning):
            return kind
    if _EXCEPTION_NAME.match(reason):
        return FailureKind.NETWORK
    try:
        parse_code(code)
    except InstrumentError:
        return FailureKind.INVALID_CODE
    return FailureKind.OTHER


@dataclass
class Report:
    """What became of a run. Every distinct code is stored, known, kept or failed, unless the run was interrupted.

    `known`: its latest trade was in the store before. `kept`: its trade waits on this machine for MongoDB, for
    the reason `kept_because`. `failures`: code -> reason. `store_error`: what the store said when it failed;
    `close_error`: when it failed at the closing snapshot alone.
    """

    total: int = 0
    stored: int = 0
    known: int = 0
    kept: int = 0
    kept_because: str = ""
    failures: dict[str, str] = field(default_factory=dict)
    store_error: str = ""
    close_error: str = ""
    interrupted: bool = False
    took_s: float = 0.0

    @property
    def complete(self) -> bool:
        """Whether the latest trade of every code is in the store, and the closes that follow from them."""
        return not self.failures and not self.close_error and self.stored + self.known == self.total

    def kept_words(self) -> str:
        """Return how many trades wait on this machine, and why."""
        return f"{self.kept} trade{'s' if self.kept > 1 else ''} kept on this machine, {self.kept_because}"

    def summary(self) -> str:
        """Return the closing line."""
        line = (
            f"total {self.total}, stored {self.stored}, already known {self.known}, "
            f"failed {len(self.failures)} ({self.took_s:.1f} s)"
        )
        left = self.total - self.stored - self.known - self.kept - len(self.failures)
        line += f", interrupted: {left} not asked" if self.interrupted else ""
        line += f"; {self.kept_words()}" if self.kept else ""
        return line + (f"; the closing snapshot is not kept: {self.close_error}" if self.close_error else "")


class QueueStats(NamedTuple):
    """What waits: trades, their bytes on disk, when the oldest came (ISO 8601 UTC); and what was refused.

    `rejects`: documents that MongoDB refused for good. `refused`: trades that found no room, of this process.
    """

    trades: int = 0
    bytes: int = 0
    oldest: str | None = None
    rejects: int = 0
    refused: int = 0


class Events:
    """What the daemon tells of itself; this one does not listen. Called from several threads, never raises."""

    def started(self) -> None:
        """The settings hold and the loop runs."""

    def turn(self, unanswered: int, unreceived: int) -> float:
        """The socket's loop made a turn; return when (monotonic) it shall make the next one at the latest.

        `unanswered`: commands that were accepted; `unreceived`: answers without the platform's receipt.
        """
        return math.inf

    def beat(self, waiting_documents: int = 0) -> None:
        """The executor makes progress."""

    def connected(self) -> None:
        """The connection to the platform stands."""

    def disconnected(self, reason: str) -> None:
        """The connection is gone, or could not be made."""

    def asked(self, answer: Response, verdict: Verdict, seconds: float) -> None:
        """The API was asked once."""

    def spooled(self, facts: QueueStats) -> None:
        """What waits for MongoDB on this machine changed."""

    def executed(self, report: Report | None) -> None:
        """An execution ended; None: it was refused or could not begin."""

    def stopping(self, seconds: float) -> None:
        """The daemon leaves, and may need so long for it."""


# ======================================================================================================
# HTTP
# ======================================================================================================

# A hundred trades are about ten kilobytes; more than this is not an answer but an accident or an attack.
MAX_ANSWER_BYTES = 16 * 1024 * 1024
# What zlib calls a gzip stream.
GZIP_BITS = 16 + 15


class Limits(NamedTuple):
    """Seconds for connecting, for a silence while reading, and for a request as a whole.

    The whole counts too: a server that drips a byte a second never runs into the read limit.
    """

    connect_s: float
    read_s: float
    whole_s: float


# The API was seen to take many seconds under load; a longer silence is a dead peer.
API_LIMITS = Limits(5.0, 20.0, 30.0)
# The platform's views answer from memory; the daemon has nothing else to do meanwhile, but signals.
PLATFORM_LIMITS = Limits(5.0, 8.0, 10.0)


class Response(NamedTuple):
    """What came back for one request: an HTTP answer, or a `fault` of the way there."""

    status: int = 0
    body: bytes = b""
    retry_after: str = ""
    fault: str = ""
    hopeless: bool = False


class HttpConnection:
    """One keep-alive HTTP connection, used by one thread at a time; `abort` may be called from any.

    The foreign exceptions of the network end here: they become an `Response` with a `fault`.
    """

    def __init__(self, base_url: str, limits: Limits = API_LIMITS) -> None:
        from http.client import HTTPConnection, HTTPSConnection

        self._limits = limits
        parts = urlsplit(base_url)
        self._path = parts.path
        make = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._conn: HTTPConnection = make(cast(str, parts.hostname), parts.port, timeout=limits.connect_s)
        self._conn.response_class = cast(Any, self._response)
        self._on_idle = _nothing
        self._rested_at = 0.0  # monotonic, as the deadline
        self.rested_s = 0.0  # what `on_idle` took of the last request's time
        self.deadline = 0.0  # 0 while no request is under way

    def get(self, path: str, headers: Callable[[], Mapping[str, str]]) -> Response:
        """Ask for `path` and return the answer, whatever it is.

        `headers` is called when the connection stands, right before the request is written: what it
        counts as sent is then sent, however long the connecting took. What it raises is passed on.
        """
        try:
            if (fault := self._connect()) is not None:
                return fault
            chosen = headers()
            if (fault := self._connect()) is not None:  # the server may have closed it during the wait
                return fault
        except BaseException:
            self.close()
            raise
        return self.get_at_once(path, chosen)

    def get_at_once(
        self, path: str, headers: Mapping[str, str], on_idle: Callable[[], None] = _nothing
    ) -> Response:
        """Ask over a connection that is open. `on_idle` is called now and then while it takes; it may raise."""
        self._on_idle, self.rested_s, self._rested_at = on_idle, 0.0, time.monotonic()
        self.deadline = self._rested_at + self._limits.whole_s
        answered = False
        try:
            answer = self._exchange(self._path + path, headers)
            answered = not answer.fault
            return answer
        finally:
            self._on_idle = _nothing
            self.deadline = 0.0
            if not answered:
                self.close()

    def is_open(self) -> bool:
        """Return whether a request can be written at once."""
        sock = self._conn.sock
        if sock is None:
            return False
        if not _has_input(sock):  # an idle one has something to read when it ends
            return True
        with contextlib.suppress(OSError):
            return _receive(sock, bytearray(1)) is None  # or when TLS has something to say to itself
        return False

    def abort(self) -> None:
        """Cut the connection under a request, so that its thread comes back with a fault."""
        if self._conn.sock is not None:
            cut_socket(self._conn.sock)

    def close(self) -> None:
        """Close the connection; the next request opens a new one."""
        with contextlib.suppress(OSError):  # nothing is lost when a closing fails
            self._conn.close()

    def _connect(self) -> Response | None:
        if self.is_open():
            return None
        self.close()
        conn = self._conn
        conn.timeout = self._limits.connect_s
        self.deadline = time.monotonic() + self._limits.whole_s
        fault = self._guarded(conn.connect)
        self.deadline = 0.0  # waiting for a key is no part of the request
        if fault is not None:
            self.close()
        elif conn.sock is not None:
            conn.timeout = self._limits.read_s
            conn.sock.settimeout(self._limits.read_s)
        return fault

    def _exchange(self, path: str, headers: Mapping[str, str]) -> Response:
        answer = Response()

        def exchange() -> None:
            nonlocal answer
            all_headers = {"User-Agent": f"stockrt/{__version__}", "Accept": "application/json", **headers}
            self._conn.request("GET", path, headers=all_headers)
            response = self._conn.getresponse()
            body = b"".join(self._parts(response))
            answer = Response(response.status, body, response.headers.get("Retry-After", "").strip())

        return self._guarded(exchange) or answer

    def _response(self, sock: socket.socket, **more: Any) -> HTTPResponse:
        """Return a response that is read no longer than the limits allow, with `on_idle` called meanwhile."""
        from http.client import HTTPResponse

        return HTTPResponse(cast("socket.socket", _Watched(sock, self._wait_for_input)), **more)

    def _wait_for_input(self, sock: socket.socket) -> None:
        """Wait until there is something to read. Raises TimeoutError at a limit."""
        silent_until = time.monotonic() + self._limits.read_s
        while (left := min(silent_until, self.deadline) - time.monotonic()) > 0:
            has_input = _has_input(sock, min(left, STOP_POLL_S))
            silent_until += self._rest()
            if has_input:
                return
        raise TimeoutError("timed out")

    def _rest(self) -> float:
        """Call `on_idle` if that is due, however busily a server drips; return its time, which is not the server's."""
        began = time.monotonic()
        if began - self._rested_at < STOP_POLL_S:
            return 0.0
        self._on_idle()
        self._rested_at = time.monotonic()
        took = self._rested_at - began
        self.rested_s += took
        self.deadline += took
        return took

    def _parts(self, response: HTTPResponse) -> Iterator[bytes]:
        """Yield the body, unpacked where it is gzip. Raises when it is too large or not whole."""
        packed = response.headers.get("Content-Encoding", "").lower() in ("gzip", "x-gzip")
        unpacker = zlib.decompressobj(GZIP_BITS) if packed else None
        size = 0
        while chunk := response.read1(65536):
            if unpacker is not None:
                chunk = unpacker.decompress(chunk, MAX_ANSWER_BYTES + 1 - size)
            size += len(chunk)
            if size > MAX_ANSWER_BYTES:
                raise _Refused(f"an answer of more than {MAX_ANSWER_BYTES >> 20} MiB")
            yield chunk
        if response.length:
            raise ConnectionError(f"{response.length} bytes are missing")
        if unpacker is not None and not unpacker.eof:
            raise ConnectionError("the end of the gzip stream is missing")
        response.close()  # or the connection takes no further request

    def _guarded(self, step: Callable[[], None]) -> Response | None:
        fault = _as_fault(step)
        if fault is not None and time.monotonic() >= self.deadline:
            return Response(fault=f"no whole answer within {self._limits.whole_s:.0f} s")
        return fault


class _Watched(io.RawIOBase):
    """A socket as http.client reads it: `wait` is called before every read."""

    def __init__(self, sock: socket.socket, wait: Callable[[socket.socket], None]) -> None:
        self._sock = sock
        self._hold = sock.makefile("rb", buffering=0)  # keeps the socket open until the answer is read
        self._wait = wait

    def makefile(self, mode: str) -> io.BufferedReader:
        """Return the stream that http.client asks its socket for."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int | None:
        """Read what is there, or comes in time."""
        while True:
            self._wait(self._sock)
            if (size := _receive(self._sock, buffer)) is not None:
                return size

    def close(self) -> None:
        """Let go of the socket."""
        self._hold.close()
        super().close()


def _has_input(sock: socket.socket, seconds: float = 0.0) -> bool:
    """Return whether there is something to read within some seconds, the end of the connection included."""
    import select

    if getattr(sock, "pending", int)():  # unpacked already: no poll would tell of it
        return True
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(math.ceil(seconds * 1000)))


def _receive(sock: socket.socket, buffer: Any) -> int | None:
    """Read what is there, 0 at the end, None where nothing is for us: half a record of TLS, or its own matters."""
    import ssl

    timeout = sock.gettimeout()
    sock.settimeout(0.0)
    try:
        return sock.recv_into(buffer)
    except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
        return None
    finally:
        sock.settimeout(timeout)


def cut_socket(sock: socket.socket) -> None:
    """End all reading and writing on a socket, TLS or not, from whatever thread."""
    import socket

    with contextlib.suppress(OSError):  # it may have been closed just now
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def get_once(base_url: str, path: str, limits: Limits, headers: Mapping[str, str] | None = None) -> Response:
    """Ask for one thing over a connection of its own, which is cut when the time is over."""
    connection = HttpConnection(base_url, limits)
    cut = threading.Timer(limits.whole_s, connection.abort)
    cut.daemon = True
    cut.start()
    try:
        return connection.get(path, lambda: headers or {})
    finally:
        cut.cancel()
        connection.close()


class _Refused(Exception):
    """An answer that would be as wrong the next time."""


class _CallersOwn(Exception):
    """Carries what `on_idle` raised, its cause, past the code that takes exceptions for the network's."""


def _as_fault(step: Callable[[], None]) -> Response | None:
    """Do a step of a request; return what went wrong as an Response, None if nothing did."""
    from http.client import HTTPException

    try:
        step()
    except _Refused as error:
        return Response(fault=str(error), hopeless=True)
    except (HTTPException, OSError, ValueError, AttributeError, zlib.error) as error:
        import ssl

        # ValueError, AttributeError: what ssl and http.client raise when `abort` cuts under them
        if isinstance(error, ValueError | AttributeError) and not isinstance(error, OSError):
            return Response(fault=f"the connection broke ({type(error).__name__})")
        hopeless = isinstance(error, ssl.SSLCertVerificationError)
        return Response(fault=_network_words(error), hopeless=hopeless)
    return None


def _network_words(error: BaseException) -> str:
    """Return what happened on the network in a few words, without addresses of objects in memory."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
    return one_line(
        f"{type(cause).__name__}: {re.sub(r'<[^>]*> *:? *', '', text) or 'no more is known'}", 200
    )


# ------------------------------------------------------------------------------------------------------
# JSON
# ------------------------------------------------------------------------------------------------------


def _envelope(body: bytes) -> dict[str, Any] | None:
    """Return the JSON object that the body is, None if it is none. Numbers keep their digits as text."""
    try:
        parsed = _read_json(body)
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None


_NUMBERS_AS_TEXT = json.JSONDecoder(parse_float=str, parse_constant=str)


def _read_json(body: bytes) -> Any:
    try:
        return _NUMBERS_AS_TEXT.decode(body.decode(json.detect_encoding(body), "surrogatepass"))
    except json.JSONDecodeError:
        raise
    except ValueError:  # a number of thousands of digits, which Python does not read: slower, as its text
        return json.loads(body, parse_float=str, parse_constant=str, parse_int=_short_number)


def _short_number(digits: str) -> int | str:
    return int(digits) if len(digits) <= 40 else digits


def _words(envelope: Mapping[str, Any]) -> str:
    """Return what the API says in words; each kind of refusal has its own name for the field."""
    found = (envelope.get(name) for name in ("msg", "message", "detail", "title"))
    return one_line(next((text for text in found if isinstance(text, str) and text), ""), 160)


# ======================================================================================================
# Local files
# ======================================================================================================

# How long one process waits for another that writes to the same SQLite file.
SQLITE_BUSY_S = 10.0
# The page size of our files: SQLite's default since 2016.
SQLITE_PAGE = 4096
# A log has a header, and one before each page.
WAL_HEAD, WAL_FRAME_HEAD = 32, 24
# What its primary result codes say of a file: SQLITE_CORRUPT and SQLITE_NOTADB.
SQLITE_DAMAGED = (11, 26)
SQLITE_SIDES = ("", "-wal", "-shm")


def _move(path: Path, target: Path) -> None:
    """Rename a file of SQLite's and what it keeps beside it, as far as they exist."""
    for old, new in zip(_sides(path), _sides(target), strict=True):
        if old.exists():
            old.replace(new)


def _sides(path: Path) -> list[Path]:
    """Return a file of SQLite's and what it keeps beside it: the file, the write-ahead log, shared memory."""
    return [path.with_name(path.name + end) for end in SQLITE_SIDES]


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _log_is_torn(db: sqlite3.Connection, path: Path) -> bool:
    """Whether a file's log holds transactions that SQLite does not see.

    It reads a log up to the first frame with a wrong checksum, takes the rest for a write that a power cut
    interrupted, and writes over it: after damage in the middle everything behind it would be gone.
    """
    import sqlite3

    write_ahead_log = _sides(path)[1]
    if _size_of(write_ahead_log) <= WAL_HEAD:
        return False
    db.execute("BEGIN IMMEDIATE")  # nobody writes meanwhile
    try:
        # Not read from the index file itself: to close it would undo SQLite's locks, which belong to the process.
        with contextlib.closing(sqlite3.connect(path)) as other:
            other.execute("PRAGMA user_version").fetchone()  # opens the log
            seen = int(other.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()[1])
        return (
            0 <= seen < _transactions_end(write_ahead_log)
        )  # -1: another process is at it, which opened it well
    finally:
        db.rollback()


def _transactions_end(write_ahead_log: Path) -> int:
    """Return the number of the last frame that ends a transaction, frames of the log's earlier lives left out."""
    with write_ahead_log.open("rb") as stream:
        head = stream.read(WAL_HEAD)
        frames = []
        while len(frame := stream.read(WAL_FRAME_HEAD)) == WAL_FRAME_HEAD:
            frames.append(
                (frame[8:16], any(frame[4:8]))
            )  # the salts, which change with each life; the end's mark
            stream.seek(SQLITE_PAGE, os.SEEK_CUR)
    if head[24:] == _wal_checksum(head[:24]):
        salts = head[16:24]
    else:
        salts = Counter(salt for salt, _ in frames).most_common(1)[0][0] if frames else b""
    return max((number for number, frame in enumerate(frames, 1) if frame == (salts, True)), default=0)


def _wal_checksum(head: bytes) -> bytes:
    """Return the checksum of the head of a log (sqlite.org/fileformat2.html#checksum_algorithm)."""
    order: Literal["big", "little"] = "big" if head[3] & 1 else "little"
    first = second = 0
    for at in range(0, len(head), 8):
        first = first + int.from_bytes(head[at : at + 4], order) + second & 0xFFFFFFFF
        second = second + int.from_bytes(head[at + 4 : at + 8], order) + first & 0xFFFFFFFF
    return first.to_bytes(4) + second.to_bytes(4)


def _damage(words: str) -> Exception:
    import sqlite3

    error = sqlite3.DatabaseError(words)
    error.sqlite_errorcode = SQLITE_DAMAGED[0]
    return error


@contextlib.contextmanager
def _directory_lock(directory: Path) -> Iterator[None]:
    """Hold the lock that keeps other processes, and other threads, from opening our files in a directory.

    Raises StoreError.
    """
    import fcntl

    try:
        handle = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise StoreError(
            f"the state directory {directory} cannot be used: {error.strerror}; see STATE_DIRECTORY"
        ) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def open_sqlite(path: Path, version: int, schema: str) -> sqlite3.Connection:
    """Open a file of ours, made or brought up to `version` with `schema`.

    Raises sqlite3.Error, and StoreError when it was written by a newer stockrt.
    """
    db = connect_sqlite(path)
    try:
        bring_up(db, path, version, schema)
    except BaseException:
        db.close()
        raise
    return db


def connect_sqlite(path: Path) -> sqlite3.Connection:
    """Open a file: WAL, and fsynced at every commit. Raises sqlite3.Error."""
    import sqlite3

    db = sqlite3.connect(path, timeout=SQLITE_BUSY_S, check_same_thread=False)
    try:
        _set_wal(db)
        db.execute("PRAGMA synchronous=FULL")
    except BaseException:
        db.close()
        raise
    return db


def bring_up(db: sqlite3.Connection, path: Path, version: int, schema: str) -> None:
    """Bring a file up to `version` with `schema`.

    Raises sqlite3.Error, and StoreError when it was written by a newer stockrt.
    """
    (found,) = db.execute("PRAGMA user_version").fetchone()
    if found > version:
        raise StoreError(
            f"{path} was written by a newer stockrt (format {found}, this one knows {version}); "
            "use that one, or another STATE_DIRECTORY"
        )
    if found < version:
        db.executescript(schema)
        keep_owner(path, path.parent)


def _set_wal(db: sqlite3.Connection) -> None:
    """Switch a file to WAL. While another process does the same SQLite says "locked" without waiting."""
    import sqlite3

    give_up = time.monotonic() + SQLITE_BUSY_S
    while True:
        try:
            db.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > give_up:
                raise
        time.sleep(0.01)


def sqlite_fault(path: Path, error: Exception) -> StoreError:
    """Return what an operator must know of a fault of SQLite, or of the disk below it."""
    return StoreError(f"the local file {path} fails: {error}; see STATE_DIRECTORY")


SQLITE_NAME = "stockrt.db"
SQLITE_VERSION = 3
# IF NOT EXISTS: two processes may open a new file at the same moment.
_SQLITE_SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS realtime (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,  -- order of arrival
    _id TEXT NOT NULL UNIQUE,
    s TEXT NOT NULL, t INTEGER NOT NULL,
    p TEXT NOT NULL, v TEXT NOT NULL, vw TEXT NOT NULL, td INTEGER NOT NULL,
    stock_code TEXT NOT NULL,
    create_time TEXT NOT NULL,              -- UTC, ISO 8601
    demo INTEGER                            -- 1: synthetic, by --demo
);
CREATE INDEX IF NOT EXISTS realtime_code_time ON realtime (stock_code, t DESC);
CREATE INDEX IF NOT EXISTS realtime_demo ON realtime (seq) WHERE demo IS NOT NULL;
CREATE TABLE IF NOT EXISTS rejects (        -- what MongoDB refused for good
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    collection TEXT NOT NULL, _id TEXT NOT NULL,
    document TEXT NOT NULL,                 -- JSON
    reason TEXT NOT NULL,                   -- MongoDB's words
    rejected_at TEXT NOT NULL,              -- UTC, ISO 8601
    UNIQUE (collection, _id)
);
CREATE TABLE IF NOT EXISTS close (
    _id TEXT PRIMARY KEY,                   -- code|date
    date TEXT NOT NULL,                     -- of the session, on the exchange's calendar
    s TEXT NOT NULL, t INTEGER NOT NULL,
    p TEXT NOT NULL, v TEXT NOT NULL, vw TEXT NOT NULL, td INTEGER NOT NULL,
    stock_code TEXT NOT NULL,
    after_hours INTEGER, half_day INTEGER, half_day_unknown INTEGER,
    create_time TEXT NOT NULL, update_time TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS unsettled (      -- trades that MongoDB has, whose closes could not be made
    _id TEXT PRIMARY KEY,
    s TEXT NOT NULL, t INTEGER NOT NULL,
    p TEXT NOT NULL, v TEXT NOT NULL, vw TEXT NOT NULL, td INTEGER NOT NULL,
    stock_code TEXT NOT NULL,
    create_time TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS key_usage (
    digest TEXT, day TEXT, used INTEGER NOT NULL, PRIMARY KEY (digest, day)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS calendar (
    market TEXT PRIMARY KEY, asked_on TEXT NOT NULL, first TEXT NOT NULL, last TEXT NOT NULL,
    half_days TEXT NOT NULL                 -- JSON: ISO dates
) WITHOUT ROWID;
PRAGMA user_version = {SQLITE_VERSION};
COMMIT;
"""


# ------------------------------------------------------------------------------------------------------
# Rescue
# ------------------------------------------------------------------------------------------------------

# Rows of a damaged file, about a second's work.
RESCUED_AT_ONCE = 20_000
# More rows than can be missing at the end of a damaged table.
NUMBERS_SKIPPED = 1_000_000


def rescue(damaged: Path, db: sqlite3.Connection, on_busy: Callable[[], None] = _nothing) -> int:
    """Copy what can be read of a damaged file into a new one of ours and return how many rows that is.

    `on_busy` is called now and then. Trades are looked for page by page, so that they are found where nothing
    points to them any more. One that was deleted may come back so: it is known to MongoDB then, which does no
    harm.
    """
    with db:
        found = _rescue_trades(damaged, db, on_busy) if _columns(db, "realtime") else 0
        names = db.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
        for (name,) in names.fetchall():
            if name != "realtime":
                found += _rescue_table(damaged, db, name)
        _skip_numbers(damaged, db)
    return found


def _skip_numbers(damaged: Path, db: sqlite3.Connection) -> None:
    """Give no number again that was given out for a row that is lost: somebody may still know it."""
    given = {row["name"]: row["seq"] for row in _readable_rows(damaged, "SELECT * FROM sqlite_sequence")}
    tables = db.execute("SELECT name FROM sqlite_master WHERE sql LIKE '%AUTOINCREMENT%'").fetchall()
    for (name,) in tables:
        (last,) = db.execute(f"SELECT max(rowid) FROM {name}").fetchone()  # noqa: S608
        number = max([n for n in (given.get(name), last) if isinstance(n, int)], default=0) + NUMBERS_SKIPPED
        db.execute("DELETE FROM sqlite_sequence WHERE name = ?", (name,))
        db.execute("INSERT INTO sqlite_sequence (name, seq) VALUES (?, ?)", (name, number))


def _rescue_trades(damaged: Path, db: sqlite3.Connection, on_busy: Callable[[], None]) -> int:
    """Rescue trades in their order of arrival, under new numbers: old ones could be there twice."""
    columns = ", ".join(_columns(db, "realtime")[1:])
    db.execute("CREATE TEMP TABLE rescued AS SELECT * FROM realtime LIMIT 0")
    places = ", ".join("?" * len(_columns(db, "realtime")))
    rows = carve_trades(damaged)
    while some := list(islice(rows, RESCUED_AT_ONCE)):
        db.executemany(f"INSERT INTO rescued VALUES ({places})", some)  # noqa: S608
        on_busy()
    done = db.execute(
        f"INSERT INTO realtime ({columns}) SELECT {columns} FROM rescued WHERE true ORDER BY seq "  # noqa: S608
        "ON CONFLICT (_id) DO NOTHING"
    )
    db.execute("DROP TABLE rescued")
    return done.rowcount


def _rescue_table(damaged: Path, db: sqlite3.Connection, name: str) -> int:
    """Rescue a table from both its ends, up to where it cannot be read."""
    before = db.total_changes
    for order in ("", "ORDER BY 1 DESC"):
        for row in _readable_rows(damaged, f"SELECT * FROM {name} {order}"):  # noqa: S608
            columns, places = ", ".join(row), ", ".join("?" * len(row))
            insert = f"INSERT OR IGNORE INTO {name} ({columns}) VALUES ({places})"  # noqa: S608
            db.execute(insert, tuple(row.values()))
    return db.total_changes - before


def _readable_rows(damaged: Path, query: str) -> Iterator[dict[str, Any]]:
    """Yield rows, each by the names of its columns, up to the first that cannot be read."""
    import sqlite3

    try:
        with contextlib.closing(sqlite3.connect(damaged)) as old:
            rows = old.execute(query)
            names = [column[0] for column in rows.description]
            for row in rows:
                yield dict(zip(names, row, strict=True))
    except sqlite3.Error as error:
        log.debug("%s: %s", damaged, error)


def _columns(db: sqlite3.Connection, table: str) -> list[str]:
    return [row[1] for row in db.execute(f"PRAGMA table_info({table})")]


def carve_trades(path: Path) -> Iterator[tuple[Any, ...]]:
    """Yield rows of `realtime` from the pages of a file and of its log, whether or not they are in use.

    The layout is that of SQLite's file format (sqlite.org/fileformat2.html); a row counts only if its
    `_id` follows from its fields.
    """
    file, write_ahead_log, _ = _sides(path)
    # the log first: somebody may still move pages from it into the file
    for source, start, skip in ((write_ahead_log, WAL_HEAD, WAL_FRAME_HEAD), (file, 0, 0)):
        with contextlib.suppress(OSError), source.open("rb") as stream:  # not there, or not for this user
            stream.seek(start)
            while block := stream.read(skip + SQLITE_PAGE):
                yield from _leaf_rows(block[skip:])


def _leaf_rows(page: bytes) -> Iterator[tuple[Any, ...]]:
    """Yield the trades of a page, if it is a leaf of a table."""
    if page[:1] != b"\x0d":
        return
    for number in range(min(int.from_bytes(page[3:5]), (len(page) - 8) // 2)):
        with contextlib.suppress(IndexError, ValueError):  # no row, or none of ours
            yield _carve_row(page, int.from_bytes(page[8 + 2 * number : 10 + 2 * number]))


def _carve_row(page: bytes, at: int) -> tuple[Any, ...]:
    """Return the trade at a place of a page. Raises IndexError or ValueError where there is none."""
    _, at = _varint(page, at)  # the row's length
    number, start = _varint(page, at)
    size, at = _varint(page, start)
    head = page[at : start + size]
    kinds = [*head] if head.isascii() else _varints(head)  # mostly of one byte each
    at = start + size
    values: list[Any] = []
    for kind in kinds:
        value, at = _carve_value(page, kind, at)
        values.append(value)
    _, name, s, t, p, v, vw, td, code, created, demo = values
    if name != f"{s}|{t}|{p}|{v}|{td}" or code != s or not isinstance(vw, str) or demo not in (None, 1):
        raise ValueError("its fields do not make its _id")
    datetime.fromisoformat(str(created))
    return (number, *values[1:])


def _varints(data: bytes) -> list[int]:
    """Return the variable-length integers that data consists of."""
    found, at = [], 0
    while at < len(data):
        value, at = _varint(data, at)
        found.append(value)
    return found


def _varint(page: bytes, at: int) -> tuple[int, int]:
    """Return SQLite's variable-length integer at a place, and the place behind it."""
    value = 0
    for place in range(at, at + 8):
        value = value << 7 | page[place] & 0x7F
        if page[place] < 0x80:
            return value, place + 1
    return value << 8 | page[at + 8], at + 9


def _carve_value(page: bytes, kind: int, at: int) -> tuple[str | int | None, int]:
    """Return a value of a serial type and the place behind it; types that trades do not have raise ValueError."""
    if kind in (0, 8, 9):
        return {0: None, 8: 0, 9: 1}[kind], at
    if 1 <= kind <= 6:
        end = at + (1, 2, 3, 4, 6, 8)[kind - 1]
        return int.from_bytes(page[at:end], signed=True), end
    if kind < 13 or not kind % 2:
        raise ValueError(f"serial type {kind}")
    end = at + (kind - 13) // 2
    if end > len(page):
        raise ValueError("beyond the page")
    return page[at:end].decode(), end


# ------------------------------------------------------------------------------------------------------
# The file
# ------------------------------------------------------------------------------------------------------


class LocalFile:
    """One of our SQLite files: WAL, fsynced at every commit, for this user alone; thread-safe.

    Damaged, or of another user, it is set aside and a new one takes its place (promise 6), whenever that is
    seen; a gigabyte takes a minute to rescue, during which `on_busy` is called now and then. Raises StoreError
    when the file cannot be used or was written by a newer stockrt.
    """

    def __init__(self, path: Path, version: int, schema: str, on_busy: Callable[[], None] = _nothing) -> None:
        make_state_directory(path.parent)
        self.path = path
        self._on_busy = on_busy
        self._version = version
        self._schema = schema
        self.lock = threading.RLock()  # held for every use: by a thread that needs several at one moment, too
        self.identity: tuple[int, int] | None = None  # in another file rows have other numbers
        self._db: sqlite3.Connection | None = None
        self._closed = False
        self._open()

    def write(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """Do `work` in a transaction of its own, on disk when this returns. Raises StoreError."""
        return self._run(work, "BEGIN IMMEDIATE")

    def read(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """Return what `work` reads, all of it at one moment. Raises StoreError."""
        return self._run(work, "BEGIN")

    def read_one(self, query: str, *values: object) -> Any:
        """Return a query's first row, None without one; cheaper than `read`. Raises StoreError."""
        return self._run(lambda db: db.execute(query, values).fetchone(), "")

    def shrink(self) -> None:
        """Give unused space back to the disk, as far as nobody else reads the file now. Raises StoreError."""
        self._maintain("VACUUM", "PRAGMA wal_checkpoint(TRUNCATE)")

    def empty_log(self) -> None:
        """Move the write-ahead log into the file, as far as nobody else reads it now. Raises StoreError."""
        self._maintain("PRAGMA wal_checkpoint(TRUNCATE)")

    def _maintain(self, *statements: str) -> None:
        import sqlite3

        with self.lock:
            db = self._connection()
            try:
                for statement in statements:
                    db.execute(statement).fetchall()
            except sqlite3.Error as error:
                raise sqlite_fault(self.path, error) from error

    def bytes_on_disk(self) -> int:
        """Return the size of the file and of what SQLite keeps beside it, in bytes."""
        return sum(_size_of(side) for side in _sides(self.path))

    def close(self) -> None:
        """Close the file."""
        with self.lock:
            self._closed = True
            self._disconnect()

    def _disconnect(self) -> None:
        if self._db is not None:
            self._db.close()
        self._db = None

    def _run(self, work: Callable[[sqlite3.Connection], _T], begin: str) -> _T:
        import sqlite3

        with self.lock:
            try:
                return self._transact(work, begin)
            except sqlite3.Error as error:
                if not self._is_lost(error):
                    raise sqlite_fault(self.path, error) from error
                self._open(error)
            try:
                return self._transact(work, begin)
            except sqlite3.Error as error:
                raise sqlite_fault(self.path, error) from error

    def _transact(self, work: Callable[[sqlite3.Connection], _T], begin: str) -> _T:
        """Do `work` in the file that is current, and was so to the end.

        Others may set aside at any moment what this one has open; what it commits then may be in no file.
        """
        while True:
            with self._connection() as db:
                if begin:
                    db.execute(begin)
                done = [work(db)] if self._is_current() else []
            if done and self._is_current():
                return done[0]
            self._open()

    def _connection(self) -> sqlite3.Connection:
        if self._closed:
            raise StoreError(f"the local file {self.path} is closed already")
        if self._db is None:  # it could not be opened the last time
            self._open()
        return cast("sqlite3.Connection", self._db)

    def _is_current(self) -> bool:
        return self.identity == _inode(self.path)

    def _open(self, damage: Exception | None = None) -> None:
        """Open the file; `damage` is what showed that it cannot go on as it is."""
        import sqlite3

        with _directory_lock(self.path.parent):  # nobody opens a file while another sets it aside
            try:
                if damage is not None and self._is_current():
                    self._set_aside(damage)
                try:
                    self._connect()
                except sqlite3.Error as error:
                    if not self._is_lost(error):
                        raise
                    self._set_aside(error)
                    self._connect()
            except (sqlite3.Error, OSError) as error:
                raise sqlite_fault(self.path, error) from error

    def _connect(self) -> None:
        self._disconnect()
        if any(side.exists() for side in _sides(self._away())):
            self._end_setting_aside("its rescue was interrupted")
        if not _size_of(self.path) and _size_of(_sides(self.path)[1]):
            raise _damage("its beginning is cut off")  # SQLite would take it for new and drop the log
        self._db = connect_sqlite(self.path)
        if _log_is_torn(
            self._db, self.path
        ):  # it stays open until the log is rescued: to close it empties the log
            raise _damage("its log is damaged, and transactions lie behind the damage")
        try:
            bring_up(self._db, self.path, self._version, self._schema)
        except BaseException:
            self._disconnect()
            raise
        self.identity = _inode(self.path)

    def _is_lost(self, error: Exception) -> bool:
        """Whether the file is damaged, or may not be used by this user."""
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in SQLITE_DAMAGED or "decode to UTF-8" in str(error):
            return True
        return self.path.is_file() and not all(
            os.access(side, os.R_OK | os.W_OK) for side in _sides(self.path) if side.exists()
        )

    def _set_aside(self, damage: Exception) -> None:
        """Put a new file in the place of the old one, with what can be read of it.

        The old one is moved away first: who has it open sees then that it is current no more.
        """
        _move(self.path, self._away())
        self._end_setting_aside(one_line(damage))

    def _away(self) -> Path:
        """The name of a file that is being rescued; what has it after a kill is rescued once more."""
        return self.path.with_name(f"{self.path.name}.setting-aside")

    def _end_setting_aside(self, why: str) -> None:
        done = "it had been rescued already"
        if not self.path.exists():
            _move(self.path, self._away())  # its log, where a kill came in between
            done = f"{self._rescue()} rows of it are rescued"
        aside = self.path.with_name(f"{self.path.name}.damaged-{datetime.now(UTC):%Y%m%dT%H%M%S.%f}Z")
        _move(self._away(), aside)
        _sync_directory(self.path.parent)
        log.error(
            "the local file %s cannot be used: %s; it is set aside as %s, %s",
            self.path,
            why,
            aside.name,
            done,
        )

    def _rescue(self) -> int:
        """Make the new file of what can be read of the old one, and return how many rows that is."""
        fresh = self.path.with_name(f"{self.path.name}.rescue")
        for side in _sides(fresh):
            side.unlink(missing_ok=True)
        with contextlib.closing(open_sqlite(fresh, self._version, self._schema)) as db:
            rescued = rescue(self._away(), db, self._on_busy)
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        self._disconnect()  # not before: the last one to close a damaged log empties it
        fresh.replace(self.path)
        return rescued


# ======================================================================================================
# Quota: API keys and their request rates
# ======================================================================================================

# Two requests sent a second apart can arrive a little less than a second apart: kept between windows.
WINDOW_MARGIN_S = 0.03
# A key that comes back later than this is not waited for: the batch fails and says when it returns.
LONGEST_WAIT_FOR_KEY_S = 60.0
# After a refusal for its rate a key goes at half its pace for this long.
SLOW_FOR_S = 60.0
# A key whose lease is refused is not asked about again at once.
MIN_REST_S = 0.05
# The API's midnight may be a little later than ours.
MIDNIGHT_MARGIN_S = 1.0


class SlidingWindow:
    """At most `limit` requests in any `seconds`; pure, the caller brings the clock."""

    def __init__(self, limit: int, seconds: float) -> None:
        self.seconds = seconds
        self._taken: deque[float] = deque(maxlen=limit)

    def ready_at(self, now: float, stretch: float = 1.0) -> float:
        """Return the earliest time of the next request, at least `now`; `stretch` makes the window longer."""
        if len(self._taken) < cast(int, self._taken.maxlen):
            return now
        return max(now, self._taken[0] + self.seconds * stretch + WINDOW_MARGIN_S)

    def take(self, now: float) -> None:
        """Count a request that is made now; the oldest falls out."""
        self._taken.append(now)


def key_digest(secret: str) -> str:
    """Return what stands for a key wherever counts are kept: never the key."""
    return hashlib.sha256(secret.encode()).hexdigest()[:16]


class Lease(NamedTuple):
    """Requests that a ledger grants until `until`; 0: none before `until`.

    `until` is epoch seconds; `why` says which limit is used up.
    """

    requests: int
    until: float
    why: str = ""


UNLIMITED = Lease(1_000_000_000, float("inf"))


class Ledger(Protocol):
    """Counts a key's requests beyond this process: over restarts, or together with other instances.

    `now` is epoch seconds. Never raises: a count that cannot be kept is said, and the work goes on.
    """

    def lease(self, digest: str, plan: Plan, now: float) -> Lease:
        """Take some requests of a key out of its limits."""

    def give_back(self, digest: str, lease: Lease, now: float) -> None:
        """Take the requests of a lease off the counts: it was made today (UTC), and they were not."""

    def used_today(self, digest: str, now: float) -> int:
        """Return how many requests of the key were leased today (UTC)."""


class NoLedger:
    """Counts nothing: for a single request, and for plans without a limit."""

    def lease(self, digest: str, plan: Plan, now: float) -> Lease:
        """Grant whatever is asked."""
        return UNLIMITED

    def give_back(self, digest: str, lease: Lease, now: float) -> None:
        """Nothing is counted."""

    def used_today(self, digest: str, now: float) -> int:
        """Nothing is known."""
        return 0


class ApiKey:
    """One key: its windows, its lease, and whether it is out (for good, for a product, or until a time)."""

    def __init__(self, secret: str, plan: Plan) -> None:
        self.secret = secret
        self.plan = plan
        self.digest = key_digest(secret)
        self.windows = [SlidingWindow(limit, seconds) for limit, seconds in plan.windows()]
        self.lease = Lease(0, 0.0)
        self.leased_on = ""  # UTC date
        self.dead = ""
        self.closed_products: dict[str, str] = {}
        self.paused_until = 0.0
        self.paused_why = ""
        self.slow_until = 0.0

    @property
    def shown(self) -> str:
        """The key as a person may see it: its first and last three characters."""
        return f"{self.secret[:3]}…{self.secret[-3:]}" if len(self.secret) >= 16 else "***"

    def refusal(self, product: str) -> str:
        """Return why the key cannot serve `product` at all, '' if it can."""
        return self.dead or self.closed_products.get(product, "")

    def ready_at(self, now: float) -> float:
        """Return the earliest time at which the key may be used again."""
        pace = 2.0 if now < self.slow_until else 1.0
        return max([now, self.paused_until, *(window.ready_at(now, pace) for window in self.windows)])


class KeyPool:
    """Hands out keys so that no key is ever asked more often than its plan allows; thread-safe.

    Requests go to the key that is ready first, so the total rate is the sum of the keys' rates. `clock` is
    monotonic seconds, which the windows and pauses use; `wall` is epoch seconds, which days and leases use.
    While the ledger answers, every thread that wants a key waits: it is asked for many requests at once.
    """

    def __init__(
        self,
        keys: Sequence[tuple[str, Plan]],
        ledger: Ledger | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.keys = [ApiKey(secret, plan) for secret, plan in keys]
        self.ledger = ledger or NoLedger()
        self._clock = clock
        self._wall = wall
        self._changed = threading.Condition()

    def rate(self) -> float:
        """Return the requests per second of all living keys together; infinite without a limit."""
        rates = [key.plan.per_second for key in self.keys if not key.dead]
        return float("inf") if 0 in rates else sum(rates)

    def acquire(self, product: str, stop: threading.Event) -> ApiKey:
        """Wait until a key may be used for `product`, count the request, and return the key.

        Raises NoKeyError when none can serve soon, Interrupted when `stop` is set meanwhile.
        """
        with self._changed:
            while not stop.is_set():
                got = self.try_acquire(product)
                if isinstance(got, ApiKey):
                    return got
                self._changed.wait(min(got, STOP_POLL_S))
        raise Interrupted("stopped")

    def try_acquire(self, product: str) -> ApiKey | float:
        """Return a key for a request that is made now, and count it, or the seconds after which to ask again.

        Raises NoKeyError when none can serve soon.
        """
        with self._changed:
            while True:
                now = self._clock()
                key = self._first_ready(product, now)
                if key is None or key.paused_until - now > LONGEST_WAIT_FOR_KEY_S:
                    raise NoKeyError(self._why_none(product, now))
                wait = key.ready_at(now) - now
                if wait > 0:
                    return wait
                if self._take_leased(key, now):
                    return key
                self._lease(key)

    def take_at_once(self, product: str) -> ApiKey | None:
        """Return a key for a request that is made now, and count it, None where that takes waiting, or the ledger."""
        with self._changed:
            now = self._clock()
            key = self._first_ready(product, now)
            at_once = key is not None and key.ready_at(now) <= now and self._take_leased(key, now)
            return key if at_once else None

    def note(self, key: ApiKey, product: str, verdict: Verdict) -> None:
        """Let an answer steer the key that was used for it."""
        with self._changed:
            if verdict.action is Action.KEY_DEAD and not key.dead:
                key.dead = verdict.reason
                log.error(
                    "API key %s is out: %s; mend INFOWAY_API_KEY and restart", key.shown, verdict.reason
                )
            elif verdict.action is Action.KEY_LACKS_PRODUCT and product not in key.closed_products:
                key.closed_products[product] = verdict.reason
                log.warning("API key %s does not serve %s: %s", key.shown, product, verdict.reason)
            elif verdict.action is Action.KEY_DAY_OVER:
                now = self._wall()
                self._pause(key, next_midnight(now) - now + MIDNIGHT_MARGIN_S, verdict.reason)
            elif verdict.action is Action.SLOW_DOWN:
                self._pause(key, verdict.wait_s, verdict.reason)
                key.slow_until = self._clock() + SLOW_FOR_S
            self._changed.notify_all()

    def close(self) -> None:
        """Give back what is leased and was not used."""
        with self._changed:
            for key in self.keys:
                self._give_back(key, self._wall())

    def describe(self) -> list[dict[str, Any]]:
        """Return of each key: its digest and state, why it is so and until when, and what it does not serve."""
        with self._changed:
            return [self._describe(key) for key in self.keys]

    def _describe(self, key: ApiKey) -> dict[str, Any]:
        rest_s = key.paused_until - self._clock()
        state = "out" if key.dead else "resting" if rest_s > 0 else "ready"
        return {
            "digest": key.digest,
            "state": state,
            "why": key.dead or (key.paused_why if state == "resting" else ""),
            "until": _later(self._wall(), rest_s) if state == "resting" else "",
            "not_for": sorted(key.closed_products),
        }

    def _first_ready(self, product: str, now: float) -> ApiKey | None:
        usable = [key for key in self.keys if not key.refusal(product)]
        return min(usable, key=lambda key: key.ready_at(now), default=None)

    def _take_leased(self, key: ApiKey, now: float) -> bool:
        """Take one request from the key's lease and count it; return False where the lease is over."""
        if key.lease.requests <= 0 or self._wall() >= key.lease.until:
            return False
        key.lease = key.lease._replace(requests=key.lease.requests - 1)
        for window in key.windows:
            window.take(now)
        return True

    def _lease(self, key: ApiKey) -> None:
        """Ask the ledger for a new lease. It may take long: after it the key is chosen anew."""
        wall = self._wall()
        self._give_back(key, wall)
        key.lease = self.ledger.lease(key.digest, key.plan, wall)
        if not key.lease.requests:
            self._pause(key, max(MIN_REST_S, key.lease.until - wall), key.lease.why)

    def _give_back(self, key: ApiKey, wall: float) -> None:
        if key.lease.requests > 0 and utc_day(wall) == key.leased_on and key.lease.until < UNLIMITED.until:
            self.ledger.give_back(key.digest, key.lease, wall)
        key.lease, key.leased_on = Lease(0, 0.0), utc_day(wall)

    def _pause(self, key: ApiKey, seconds: float, why: str) -> None:
        """Let a key rest; a shorter rest neither shortens a longer one nor changes its reason."""
        until = self._clock() + seconds
        if until <= key.paused_until:
            return
        if seconds > LONGEST_WAIT_FOR_KEY_S and key.paused_why != why:
            log.warning("API key %s rests until %s: %s", key.shown, _later(self._wall(), seconds), why)
        key.paused_until, key.paused_why = until, why

    def _why_none(self, product: str, now: float) -> str:
        if not self.keys:
            return "no API key: set INFOWAY_API_KEY"
        reasons = []
        for key in self.keys:
            back = _later(self._wall(), max(0.0, key.paused_until - now))
            reasons.append(f"key {key.shown}: {key.refusal(product) or f'{key.paused_why}, back at {back}'}")
        return f"no API key can serve {product} ({'; '.join(reasons)}); see INFOWAY_API_KEY"


# ------------------------------------------------------------------------------------------------------
# Ledgers
# ------------------------------------------------------------------------------------------------------

# A lease of the day's count is for this time at the key's rate: a crash forgets at most so much.
DAY_LEASE_S = 5.0
# The minute's count is kept in slices. Any 60 s touch at most SLICES_PER_WINDOW of them, and together those
# never hold more than the plan's minute: so no minute, wherever it begins, sees more. The shorter a slice, the
# more of the plan can be used: 60 s of 62.5. The instances' clocks are taken to agree, as NTP makes them.
SLICE_S = 2.5
SLICES_PER_WINDOW = int(60 / SLICE_S) + 1
# What leaves this short before a slice ends may arrive in the next one: it is counted there, and the sum that
# decides takes both in.
SLICE_MARGIN_S = 0.2
# A share of a slice for one instance, so that others find something too.
SHARES_PER_SLICE = 4
# With MongoDB away each instance counts alone, and asks it again after this time.
LEDGER_RETRY_S = 30.0
LEDGER_TIMEOUT_S = 2.0
# Instances that write the same key's count at the same moment try again; each try lets one of them through.
LEDGER_TRIES = 50
# How far a calendar that is asked for reaches to both sides.
CALENDAR_DAYS = 31


class HalfDays(NamedTuple):
    """A market's half days between two dates (ISO 8601, the first later than the last: none are known)."""

    asked_on: str
    first: str
    last: str
    days: frozenset[str]


NO_HALF_DAYS = HalfDays("", "9", "0", frozenset())


class LocalFacts:
    """What one machine remembers in its local file: the day's count of each key, and trading calendars.

    As a Ledger it keeps the days; minutes are kept by each process's own windows.
    """

    def __init__(self, directory: Path) -> None:
        self._file = LocalFile(directory / SQLITE_NAME, SQLITE_VERSION, _SQLITE_SCHEMA)

    def lease(self, digest: str, plan: Plan, now: float) -> Lease:
        """Take requests from the day's count."""
        if not plan.per_day:
            return UNLIMITED
        wanted = day_lease(plan)
        try:
            granted = self._take_day(digest, plan, wanted, now)
        except StoreError as error:
            log.warning("the day's count of a key is not kept: %s", error)
            granted = wanted
        return Lease(granted, next_midnight(now), "" if granted else _day_used_up(plan))

    def give_back(self, digest: str, lease: Lease, now: float) -> None:
        """Take the requests of a lease off the day's count."""
        try:
            self._write(
                "UPDATE key_usage SET used = max(0, used - ?) WHERE digest = ? AND day = ?",
                lease.requests, digest, utc_day(now),
            )  # fmt: skip
        except StoreError as error:
            log.warning("the day's count of a key is not kept: %s", error)

    def used_today(self, digest: str, now: float) -> int:
        """Return how many requests of the key were leased today."""
        query = "SELECT used FROM key_usage WHERE digest = ? AND day = ?"
        try:
            rows = self._read(query, digest, utc_day(now))
        except StoreError as error:
            log.warning("the day's count of a key cannot be read: %s", error)
            return 0
        return int(rows[0][0]) if rows else 0

    def _take_day(self, digest: str, plan: Plan, wanted: int, now: float) -> int:
        """Add what is left of `wanted` to the day's count and return it; processes take turns."""
        place = (digest, utc_day(now))
        where = "WHERE digest = ? AND day = ?"

        def take(db: sqlite3.Connection) -> int:
            db.execute("INSERT INTO key_usage VALUES (?, ?, 0) ON CONFLICT DO NOTHING", place)
            (used,) = db.execute(f"SELECT used FROM key_usage {where}", place).fetchone()  # noqa: S608
            granted = max(0, min(wanted, plan.per_day - int(used)))
            db.execute(f"UPDATE key_usage SET used = used + ? {where}", (granted, *place))  # noqa: S608
            return granted

        return self._file.write(take)

    def calendar(self, market: str) -> HalfDays | None:
        """Return the half days of a market as they were asked for last, None if never. Raises StoreError."""
        rows = self._read("SELECT asked_on, first, last, half_days FROM calendar WHERE market = ?", market)
        if not rows:
            return None
        asked_on, first, last, days = rows[0]
        try:
            return HalfDays(asked_on, first, last, frozenset(json.loads(days)))
        except (TypeError, ValueError):  # the disk has changed it: it is asked for again
            return None

    def keep_calendar(self, market: str, kept: HalfDays) -> None:
        """Keep a market's half days in place of those before. Raises StoreError."""
        days = json.dumps(sorted(kept.days))
        self._write(
            "INSERT OR REPLACE INTO calendar VALUES (?, ?, ?, ?, ?)",
            market, kept.asked_on, kept.first, kept.last, days,
        )  # fmt: skip

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _read(self, query: str, *values: object) -> list[Any]:
        return self._file.read(lambda db: db.execute(query, values).fetchall())

    def _write(self, statement: str, *values: object) -> None:
        self._file.write(lambda db: db.execute(statement, values))


def day_lease(plan: Plan) -> int:
    """Return how many requests a lease of a day's count takes."""
    return max(1, int(plan.per_second * DAY_LEASE_S))


def _day_used_up(plan: Plan) -> str:
    return f"the day's {plan.per_day} requests are used up"


class SharedLedger:
    """The counts of all instances that share keys, in one MongoDB collection; `alone` counts while it is away.

    One document per key digest and window: `<digest>|<UTC date>` counts the day (`used`), `<digest>|minute`
    holds the minute's slices. Both are changed by conditional updates only: the server decides.
    """

    def __init__(self, collection: MongoCollection[Document], alone: Ledger) -> None:
        self._collection = collection
        self._alone = alone
        self._away_until = 0.0
        self._leased_alone: set[str] = set()

    def lease(self, digest: str, plan: Plan, now: float) -> Lease:
        """Take requests from the minute and the day. The shorter of the two limits is what the lease has."""
        if not (plan.per_day or plan.per_minute):
            return UNLIMITED

        def together() -> Lease:
            lease = self._lease_day(digest, plan, now, self._lease_minute(digest, plan, now))
            self._leased_alone.discard(digest)
            return lease

        def alone() -> Lease:
            self._leased_alone.add(digest)
            lease = self._alone.lease(digest, plan, now)
            return lease._replace(until=min(lease.until, now + LEDGER_RETRY_S)) if lease.requests else lease

        return self._shared(now, together, alone)

    def give_back(self, digest: str, lease: Lease, now: float) -> None:
        """Take the requests of a lease off the counts in which they were made."""
        if digest in self._leased_alone:
            self._alone.give_back(digest, lease, now)
            return
        day = {"_id": f"{digest}|{utc_day(now)}", "used": {"$gte": lease.requests}}
        name = f"slices.{int(lease.until // SLICE_S)}"
        minute = {"_id": f"{digest}|minute", name: {"$gte": lease.requests}}

        def give_back() -> None:
            self._collection.update_one(day, {"$inc": {"used": -lease.requests}})
            self._collection.update_one(minute, {"$inc": {name: -lease.requests, "version": 1}})

        self._shared(now, give_back, lambda: None)

    def used_today(self, digest: str, now: float) -> int:
        """Return how many requests of the key all instances leased today; MongoDB away: those of this one."""

        def used() -> int:
            found = self._collection.find_one({"_id": f"{digest}|{utc_day(now)}"})
            return int(found["used"]) if found else 0

        return self._shared(now, used, lambda: self._alone.used_today(digest, now))

    def _shared(self, now: float, ask: Callable[[], _T], alone: Callable[[], _T]) -> _T:
        """Return what MongoDB says, or what is so without it; it is asked again after a while."""
        from pymongo import timeout
        from pymongo.errors import PyMongoError

        if 0 < self._away_until - now <= LEDGER_RETRY_S:  # longer: the clock was set back
            return alone()
        try:
            with timeout(LEDGER_TIMEOUT_S):
                answer = ask()
        except PyMongoError as error:
            self._away_until = now + LEDGER_RETRY_S
            log.warning("the shared counts of API keys are away (%s): counting alone", type(error).__name__)
            return alone()
        if self._away_until:
            self._away_until = 0.0
            log.warning("the shared counts of API keys are back")
        return answer

    def _lease_day(self, digest: str, plan: Plan, now: float, lease: Lease) -> Lease:
        if not (plan.per_day and lease.requests):
            return lease
        for requests in dict.fromkeys((lease.requests, 1)):  # the last few of a day one by one
            if self._count_day(f"{digest}|{utc_day(now)}", requests, plan.per_day):
                return lease._replace(requests=requests)
        return Lease(0, next_midnight(now), _day_used_up(plan))

    def _count_day(self, name: str, requests: int, limit: int) -> bool:
        from pymongo.errors import DuplicateKeyError

        wanted = {"_id": name, "used": {"$lte": limit - requests}}
        update = {"$inc": {"used": requests}}
        if self._collection.update_one(wanted, update).matched_count:
            return True
        with contextlib.suppress(DuplicateKeyError):  # too full, or another instance was quicker
            self._collection.insert_one({"_id": name, "used": 0})
        return bool(self._collection.update_one(wanted, update).matched_count)

    def _lease_minute(self, digest: str, plan: Plan, now: float) -> Lease:
        if not plan.per_minute:
            return Lease(day_lease(plan), next_midnight(now))
        present, counted = int(now // SLICE_S), int((now + SLICE_MARGIN_S) // SLICE_S)
        end = (present + 1) * SLICE_S
        share = max(1, int(plan.per_minute * SLICE_S / 60 / SHARES_PER_SLICE))
        for _ in range(LEDGER_TRIES):
            found = self._collection.find_one({"_id": f"{digest}|minute"}) or {"version": 0, "slices": {}}
            # one that lies ahead was counted before the clock was set back: it is over
            slices = {k: n for k, n in found["slices"].items() if abs(int(k) - present) < SLICES_PER_WINDOW}
            requests = min(share, plan.per_minute - sum(slices.values()))
            if requests <= 0:
                return Lease(0, end, f"the minute's {plan.per_minute} requests are used up")
            slices[str(counted)] = slices.get(str(counted), 0) + requests
            if self._swap(digest, found["version"], slices):
                return Lease(requests, (counted + 1) * SLICE_S - SLICE_MARGIN_S)
        return Lease(0, end, "the shared count is busy")

    def _swap(self, digest: str, version: int, slices: Mapping[str, int]) -> bool:
        """Write the slices if nobody else did since `version`; return whether it was done."""
        from pymongo.errors import DuplicateKeyError

        name = f"{digest}|minute"
        new = {"_id": name, "version": version + 1, "slices": dict(slices)}
        if version:
            return bool(self._collection.replace_one({"_id": name, "version": version}, new).matched_count)
        try:
            self._collection.insert_one(new)
        except DuplicateKeyError:
            return False
        return True


# ======================================================================================================
# Infoway: answers, requests
# ======================================================================================================

# A thread that does not come back this long after its connection was cut is left alone and replaced.
ABANDON_AFTER_S = 2.0
# Tries of one batch after faults of the network or the server.
MAX_TRIES = 5
# Refusals for the request rate are no faults: waited out beyond one full minute's window.
MAX_REFUSALS = 8
BACKOFF_FIRST_S, BACKOFF_CAP_S = 0.5, 8.0
SLOW_DOWN_FIRST_S, SLOW_DOWN_CAP_S = 1.0, 15.0
# Asked for in the midst of a run, which it must not hold up for long: without it the usual close counts.
CALENDAR_LIMITS = Limits(2.0, 3.0, 3.0)
CALENDAR_PATH = "/common/basic/markets/trading_days"
CALENDAR_TRIES = 2
# A `Retry-After` beyond this is answered by failing the batch with that number in the reason.
LONGEST_RETRY_AFTER_S = 60.0
# No server on the path gains from more connections than this, and each is a thread here.
MAX_IN_FLIGHT = 32
# About what this process itself needs to send, read, check and store one batch.
BATCH_WORK_S = 0.0015
# The plain epoch milliseconds that a trade time can have: 2000-01-01 to 2100-01-01.
EARLIEST_TRADE_MS, LATEST_TRADE_MS = 946_684_800_000, 4_102_444_800_000
# Decimal128 of MongoDB has 34 significant digits; prices have fewer than twenty.
_DECIMAL = re.compile(r"-?(?=[\d.]{1,34}(?:[eE]|$))(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{1,2})?", re.ASCII)
# Decimals as nearly all trades have them, those of a whole batch in one text.
_PLAIN_DECIMALS = re.compile(r"(?:\d{1,17}(?:\.\d{1,16})?,)+", re.ASCII)


class Action(Enum):
    """What to do after an answer."""

    ACCEPT = "accept"
    RETRY = "retry with back-off"
    SLOW_DOWN = "let the key rest a moment, then retry"
    KEY_DAY_OVER = "let the key rest until the next day"
    KEY_DEAD = "never use the key again"
    KEY_LACKS_PRODUCT = "never use the key for this product again"
    CODES_UNKNOWN = "give up on the codes"
    GIVE_UP = "give up on the request: it is wrong, and would be wrong again"


class Verdict(NamedTuple):
    """The decision on an answer, its reason in words, the records to read, and seconds to wait."""

    action: Action
    reason: str = ""
    records: Sequence[object] = ()
    wait_s: float = 0.0


# The API's `ret` codes that mean one thing only (its documentation; 500 is decided by its text).
_RET_ACTIONS = {
    401: Action.KEY_DEAD,
    429: Action.SLOW_DOWN,
    501: Action.SLOW_DOWN,
    502: Action.KEY_DAY_OVER,
    505: Action.GIVE_UP,
    506: Action.GIVE_UP,
    507: Action.GIVE_UP,
    508: Action.CODES_UNKNOWN,
    509: Action.KEY_DEAD,
    514: Action.KEY_LACKS_PRODUCT,
}


def decide(answer: Response, now_utc: datetime) -> Verdict:
    """Decide what follows from any answer of the API: the one place where that is decided.

    The body's `ret` is believed, never the HTTP status alone; where the body is no JSON object, the status.
    """
    if answer.fault:
        return Verdict(Action.GIVE_UP if answer.hopeless else Action.RETRY, answer.fault)
    envelope = _envelope(answer.body)
    if envelope is None or (answer.status in (401, 429) and "ret" not in envelope):
        return _by_status(answer, envelope or {}, now_utc)
    text = _words(envelope)
    ret = envelope.get("ret", envelope.get("code"))
    if "rate limit exceeded" in text.lower():
        return Verdict(Action.SLOW_DOWN, f"the API says: {text}", wait_s=_retry_after_s(answer, now_utc))
    if "All product not exists" in text:
        return Verdict(Action.CODES_UNKNOWN, "unknown to the API")
    if ret == 200 and type(envelope.get("ret")) is int:
        return _accept(envelope)
    if type(ret) is int and ret in _RET_ACTIONS:
        return Verdict(
            _RET_ACTIONS[ret],
            f"the API says {ret}: {text or 'nothing more'}",
            wait_s=_retry_after_s(answer, now_utc),
        )
    if ret is None or answer.status >= 400:
        return _by_status(answer, envelope, now_utc)
    return Verdict(Action.RETRY, f"the API says {one_line(repr(ret), 40)}: {text or 'nothing more'}")


def _accept(envelope: Mapping[str, Any]) -> Verdict:
    data = envelope.get("data", ...)
    if data is None:
        return Verdict(Action.ACCEPT)  # none of the codes is known
    if not isinstance(data, list):
        return Verdict(Action.RETRY, "the API's answer says success but holds no list `data`")
    return Verdict(Action.ACCEPT, records=data)


def _by_status(answer: Response, envelope: Mapping[str, Any], now_utc: datetime) -> Verdict:
    status, text = answer.status, _words(envelope)
    said = f"HTTP {status}" + (f": {text}" if text else "")
    if status == 401:
        return Verdict(Action.KEY_DEAD, said)
    if status == 429:
        return Verdict(Action.SLOW_DOWN, said, wait_s=_retry_after_s(answer, now_utc))
    if status >= 500 or status == 408:
        return Verdict(Action.RETRY, said, wait_s=_retry_after_s(answer, now_utc))
    if 300 <= status < 400:
        return Verdict(
            Action.GIVE_UP, f"{said}, a redirection, which is not followed; see INFOWAY_API_BASE_URL"
        )
    if status >= 400:
        return Verdict(Action.GIVE_UP, f"{said}; see INFOWAY_API_BASE_URL")
    return Verdict(Action.RETRY, f"{said}, {len(answer.body)} bytes that are not the API's JSON")


def _retry_after_s(answer: Response, now_utc: datetime) -> float:
    """Return the seconds of a Retry-After header (a number or an HTTP date), 0 without one."""
    if re.fullmatch(r"\d{1,9}", answer.retry_after, re.ASCII):
        return float(answer.retry_after)
    if not answer.retry_after:
        return 0.0
    from email.utils import parsedate_to_datetime

    try:
        at = parsedate_to_datetime(answer.retry_after)
        return max(0.0, ((at if at.tzinfo else at.replace(tzinfo=UTC)) - now_utc).total_seconds())
    except (ValueError, OverflowError):
        return 0.0


# ------------------------------------------------------------------------------------------------------
# Trades
# ------------------------------------------------------------------------------------------------------


class Trade(NamedTuple):
    """One trade, its fields named and typed as the API sends them.

    s: code · t: time, epoch milliseconds UTC · p: price · v: volume · vw: turnover (price x volume, no
    average, despite its name) · td: direction, 0 none, 1 buy, 2 sell
    """

    s: str
    t: int
    p: str
    v: str
    vw: str
    td: int


def read_trade(record: object) -> Trade:
    """Return the trade that a record of an answer holds. Raises ValueError with what is wrong with it."""
    if not isinstance(record, dict):
        raise ValueError(f"the API sent {one_line(json.dumps(record), 40)} in place of a trade")
    get = record.get
    s, t, td = get("s"), get("t"), get("td")
    if not isinstance(s, str):
        raise ValueError(f"field s: {_shown(record, 's')} in place of a code")
    if type(t) is not int or not EARLIEST_TRADE_MS <= t < LATEST_TRADE_MS:
        raise ValueError(f"field t: {_shown(record, 't')} in place of epoch milliseconds")
    if type(td) is not int or not 0 <= td <= 9:
        raise ValueError(f"field td: {_shown(record, 'td')} in place of a direction (0, 1, 2)")
    return Trade(s, t, _decimal(record, "p"), _decimal(record, "v"), _decimal(record, "vw"), td)


_FIELDS_OF = itemgetter(*Trade._fields)


def _plain_trades(records: Sequence[Any]) -> list[Trade]:
    """Return the trades of records that are all as they nearly always are, [] where one is not.

    What `read_trade` makes of each, in half the time: the fields are looked at column by column.
    """
    try:
        trades = [Trade(*_FIELDS_OF(record)) for record in records]
        s, t, p, v, vw, td = zip(*trades, strict=True)
        decimals = (*p, *v, *vw, "")
        text = ",".join(decimals)
    except (KeyError, TypeError, ValueError):  # a field is missing, or of another type, or there is no record
        return []
    plain = (
        {*map(type, s)} == {str}
        and {*map(type, t), *map(type, td)} == {int}
        and EARLIEST_TRADE_MS <= min(t) <= max(t) < LATEST_TRADE_MS
        and 0 <= min(td) <= max(td) <= 9
        and text.count(",") == len(decimals) - 1
        and _PLAIN_DECIMALS.fullmatch(text)
    )
    return trades if plain else []


def _decimal(record: Mapping[str, object], name: str) -> str:
    value = record.get(name)
    text = str(value) if type(value) is int else value  # a JSON number is taken by its digits
    if not isinstance(text, str) or not _DECIMAL.fullmatch(text):
        raise ValueError(f"field {name}: {_shown(record, name)} in place of a decimal number")
    return text


def _shown(record: Mapping[str, object], name: str) -> str:
    return one_line(json.dumps(record[name]), 40) if name in record else "nothing"


class Outcome(NamedTuple):
    """What became of one batch: its trades, the codes the product does not know, reasons for the rest."""

    batch: Batch
    trades: Sequence[Trade] = ()
    unknown: Sequence[str] = ()
    failures: Mapping[str, str] = MappingProxyType({})


def read_records(batch: Batch, records: Sequence[object]) -> Outcome:
    """Sort the records of an accepted answer; each is judged alone, a bad one harms no neighbour."""
    missing = dict.fromkeys(batch.split(), "")
    trades = _plain_trades(records)
    if len(trades) == len(missing) and missing.keys() == {trade.s for trade in trades}:
        return Outcome(batch, trades)  # as nearly always: each code that was asked for, once
    newest: dict[str, Trade] = {}
    for record in records:
        try:
            trade = read_trade(record)
        except ValueError as error:
            code = record.get("s") if isinstance(record, dict) else None
            if isinstance(code, str) and code in missing:
                missing[code] = str(error)
            else:
                log.warning("a record of %s was rejected: %s", batch.product, error)
            continue
        code = trade.s
        if code not in missing:
            log.warning(
                "a record of %s was rejected: %s was not asked for", batch.product, one_line(code, 40)
            )
        elif code not in newest or newest[code].t < trade.t:
            newest[code] = trade
    unknown = [code for code, why in missing.items() if code not in newest and not why]
    failures = {code: why for code, why in missing.items() if code not in newest and why}
    return Outcome(batch, list(newest.values()), unknown, failures)


# ------------------------------------------------------------------------------------------------------
# Client
# ------------------------------------------------------------------------------------------------------


def wanted_in_flight(latency_s: float, rate: float) -> int:
    """Return how many requests should be under way: to hide the latency, no more than the rate feeds."""
    hidden = 1 + int(latency_s / BATCH_WORK_S)
    fed = hidden if rate == float("inf") else 2 + int(rate * latency_s)
    return max(1, min(hidden, fed, MAX_IN_FLIGHT))


class BatchAttempt:
    """A batch on its way to a final answer: the tries so far, and the pause before the next one."""

    def __init__(self, batch: Batch, stop: threading.Event, rng: random.Random) -> None:
        self.batch = batch
        self.stop = stop
        self.faults = self.refusals = 0
        self.pause_s = 0.0
        self.after_fault = backoff(BACKOFF_FIRST_S, BACKOFF_CAP_S, rng)
        self.after_refusal = backoff(SLOW_DOWN_FIRST_S, SLOW_DOWN_CAP_S, rng)

    @property
    def path(self) -> str:
        """What to ask for."""
        return _trade_path(self.batch)


class _Worker(threading.Thread):
    """A thread with a connection of its own that asks for one batch after the other."""

    def __init__(self, api: InfowayApi) -> None:
        super().__init__(name="stockrt-fetch", daemon=True)
        self.connection = HttpConnection(api.base_url, api.limits)
        self.tasks: queue.SimpleQueue[tuple[BatchAttempt, _Done] | None] = queue.SimpleQueue()
        self._api = api
        self.start()

    def run(self) -> None:
        while work := self.tasks.get():
            errand, done = work
            done.put((self, self._api.ask(self.connection, errand)))
        self.connection.close()

    def dismiss(self) -> None:
        """End after the errand in hand, whose answer nobody waits for any more."""
        self.tasks.put(None)
        self.connection.abort()


_Done: TypeAlias = "queue.SimpleQueue[tuple[_Worker, Outcome]]"


class InfowayApi:
    """Asks the API for batches, several at a time, and yields what became of each.

    Promises: no key above its rate; each batch answered exactly once, by trades or by reasons; no request
    outlives API_LIMITS; one caller at a time.
    """

    def __init__(
        self,
        base_url: str,
        keys: KeyPool,
        rng: random.Random | None = None,
        limits: Limits = API_LIMITS,
        on_answer: Callable[[Response, Verdict, float], None] = lambda answer, verdict, seconds: None,
    ) -> None:
        self.base_url = base_url
        self.keys = keys
        self.limits = limits
        self._on_answer = on_answer
        self._rng = rng or random.Random()
        self._idle: list[_Worker] = []
        self._latencies: deque[float] = deque(maxlen=20)
        self._stop = threading.Event()

    def fetch(
        self, batches: Iterable[Batch], stop: threading.Event, on_idle: Callable[[], None] = _nothing
    ) -> Iterator[Outcome]:
        """Yield an Outcome for each batch as it is done; `on_idle` is called now and then while nothing is.

        When `stop` is set, requests under way are cut and the rest is not asked for.
        """
        self._stop = stop
        todo = (BatchAttempt(batch, stop, self._rng) for batch in batches)
        done: _Done = queue.SimpleQueue()
        busy: dict[_Worker, Batch] = {}
        looked_at = time.monotonic()
        try:
            while not stop.is_set():
                yield from self._hand_out(todo, busy, done, on_idle)
                if not busy:
                    return
                if time.monotonic() - looked_at >= STOP_POLL_S:
                    yield from self._overdue(busy)
                    looked_at = time.monotonic()
                try:
                    worker, outcome = done.get(timeout=STOP_POLL_S)
                except queue.Empty:
                    on_idle()
                    continue
                if busy.pop(worker, None) is not None:
                    self._idle.append(worker)
                    yield outcome
            while not done.empty():  # stopped: what has come is not thrown away
                yield done.get()[1]
        finally:
            for worker in busy:
                worker.dismiss()

    def half_days(self, market: str, first: date, last: date) -> list[str] | None:
        """Return the half days of a market as ISO dates, None when the calendar cannot be had now."""
        path = f"{CALENDAR_PATH}?market={market}&beginDay={first:%Y%m%d}&endDay={last:%Y%m%d}"
        for delay in islice(backoff(BACKOFF_FIRST_S, BACKOFF_CAP_S, self._rng), CALENDAR_TRIES):
            try:
                key = self.keys.acquire("common", self._stop)
            except (NoKeyError, Interrupted):
                return None
            answer = get_once(self.base_url, path, CALENDAR_LIMITS, {"apiKey": key.secret})
            found = None if answer.fault else _read_half_days(_envelope(answer.body) or {})
            if found is not None:
                return found
            self.keys.note(key, "common", decide(answer, datetime.now(UTC)))
            self._stop.wait(delay)
        return None

    def close(self) -> None:
        """End the threads that wait for work."""
        while self._idle:
            self._idle.pop().dismiss()

    def _hand_out(
        self,
        todo: Iterator[BatchAttempt],
        busy: dict[_Worker, Batch],
        done: _Done,
        on_idle: Callable[[], None],
    ) -> Iterator[Outcome]:
        """Give the workers as much as shall be under way; yield what needed none of them."""
        while len(busy) < (wanted := self._wanted()):
            errand = next(todo, None)
            if errand is None:
                return
            if wanted == 1 and (outcome := self._ask_here(errand, on_idle)) is not None:
                yield outcome
                if errand.stop.is_set():
                    return
                continue
            worker = self._idle.pop() if self._idle else _Worker(self)
            busy[worker] = errand.batch
            worker.tasks.put((errand, done))

    def _wanted(self) -> int:
        return wanted_in_flight(min(self._latencies, default=0.0), self.keys.rate())

    def _ask_here(self, errand: BatchAttempt, on_idle: Callable[[], None]) -> Outcome | None:
        """Try a batch once on the caller's thread, None where that cannot be, or is not final: for a worker then.

        For one request at a time a thread more is only in the way: it costs a sixth of the processor's time.
        The connection is borrowed from a worker that waits, and only if it is open: connecting can hang.
        """

        def go_on() -> None:
            if errand.stop.is_set():
                raise Interrupted("stopped")
            try:
                on_idle()
            except Exception as error:  # no fault of the network, which it must not be taken for
                raise _CallersOwn from error

        connection = self._idle[-1].connection if self._idle else None
        if connection is None or not connection.is_open():
            return None
        key = self.keys.take_at_once(errand.batch.product)
        if key is None:
            return None
        sent = time.monotonic()
        try:
            answer = connection.get_at_once(errand.path, {"apiKey": key.secret}, go_on)
        except Interrupted:
            return _failed(errand.batch, "interrupted")
        except _CallersOwn as error:
            raise cast(Exception, error.__cause__) from None
        return self._judge(errand, key, answer, time.monotonic() - sent - connection.rested_s)

    def _overdue(self, busy: dict[_Worker, Batch]) -> Iterator[Outcome]:
        """Cut what is over its time; give up on threads that do not come back even so (a hanging DNS)."""
        now = time.monotonic()
        for worker, batch in list(busy.items()):
            deadline = worker.connection.deadline
            if not deadline or now < deadline:
                continue
            worker.connection.abort()
            if now > deadline + ABANDON_AFTER_S:
                del busy[worker]
                worker.dismiss()
                yield _failed(
                    batch, f"no whole answer within {self.limits.whole_s:.0f} s, and the connection hangs"
                )

    def ask(self, connection: HttpConnection, errand: BatchAttempt) -> Outcome:
        """Ask for a batch over `connection` until its answer is final; never raises."""
        try:
            while True:
                errand.stop.wait(errand.pause_s)
                outcome = self._try(connection, errand)
                if outcome is not None:
                    return outcome
        except NoKeyError as error:
            return _failed(errand.batch, str(error))
        except Interrupted:
            return _failed(errand.batch, "interrupted")
        except Exception as error:
            log.exception("a fault of stockrt itself while fetching")
            return _failed(errand.batch, f"a fault of stockrt itself: {type(error).__name__}")

    def _try(self, connection: HttpConnection, errand: BatchAttempt) -> Outcome | None:
        """Ask once, as soon as a key may be used; return the outcome if the answer is final."""
        key: ApiKey | None = None
        sent = 0.0

        def headers() -> Mapping[str, str]:
            nonlocal key, sent
            key = self.keys.acquire(errand.batch.product, errand.stop)
            sent = time.monotonic()
            return {"apiKey": key.secret}

        if errand.stop.is_set():
            raise Interrupted("stopped")
        answer = connection.get(errand.path, headers)
        return self._judge(errand, key, answer, time.monotonic() - sent)

    def _judge(
        self, errand: BatchAttempt, key: ApiKey | None, answer: Response, seconds: float
    ) -> Outcome | None:
        """Return the outcome if an answer is final; else note in the errand how it goes on."""
        if not answer.fault:
            self._latencies.append(seconds)
        verdict = decide(answer, datetime.now(UTC))
        self._on_answer(answer, verdict, seconds)
        if verdict.action is Action.SLOW_DOWN:
            errand.refusals += 1
            verdict = verdict._replace(wait_s=verdict.wait_s or next(errand.after_refusal))
        if key is not None:
            self.keys.note(key, errand.batch.product, verdict)
        if verdict.action is Action.ACCEPT:
            return read_records(errand.batch, verdict.records)
        if verdict.action is Action.CODES_UNKNOWN:
            return Outcome(errand.batch, unknown=errand.batch.split())
        again = verdict.action is Action.RETRY
        errand.faults += again
        if reason := _why_final(errand, verdict):
            return _failed(errand.batch, reason)
        log.debug("%s batch again: %s", errand.batch.product, verdict.reason)
        errand.pause_s = verdict.wait_s or next(errand.after_fault) if again else 0.0
        return None


def _why_final(errand: BatchAttempt, verdict: Verdict) -> str:
    """Return why a batch is not tried again after an answer without trades, '' if it is."""
    late = verdict.action is Action.RETRY and verdict.wait_s > LONGEST_RETRY_AFTER_S
    tries = errand.faults + errand.refusals
    spent = errand.faults >= MAX_TRIES or errand.refusals >= MAX_REFUSALS
    if not (verdict.action is Action.GIVE_UP or late or spent):
        return ""
    asked = f", asks to wait {verdict.wait_s:.0f} s" if late else ""
    return f"{verdict.reason}{asked}{f', {tries} tries' if tries > 1 else ''}"


def _read_half_days(envelope: Mapping[str, Any]) -> list[str] | None:
    """Return the half days of a calendar's answer as ISO dates, None when it holds none of that form."""
    data = envelope.get("data")
    days = data.get("half_trade_days") if envelope.get("ret") == 200 and isinstance(data, dict) else None
    if not isinstance(days, list) or not all(isinstance(d, str) and re.fullmatch(r"\d{8}", d) for d in days):
        return None
    return [f"{day[:4]}-{day[4:6]}-{day[6:]}" for day in days]


def _trade_path(batch: Batch) -> str:
    return f"/{batch.product}/batch_trade/{quote(batch.codes, safe=',')}"


def _failed(batch: Batch, reason: str) -> Outcome:
    return Outcome(batch, failures=dict.fromkeys(batch.split(), reason))


class Source(Protocol):
    """Where trades come from: the API, or the demo."""

    def fetch(
        self, batches: Iterable[Batch], stop: threading.Event, on_idle: Callable[[], None]
    ) -> Iterator[Outcome]:
        """Yield an Outcome for each batch, and call `on_idle` now and then while nothing is done."""

    def close(self) -> None:
        """Let go of connections and threads."""


class DemoApi:
    """Synthetic trades in the API's own form: no network, no key. One trade per code and minute."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock

    def fetch(
        self, batches: Iterable[Batch], stop: threading.Event, on_idle: Callable[[], None] = _nothing
    ) -> Iterator[Outcome]:
        """Yield an Outcome for each batch, read from an answer like a real one."""
        for batch in batches:
            if stop.is_set():
                return
            body = json.dumps(
                {"ret": 200, "msg": "success", "data": [self._record(c) for c in batch.split()]}
            )
            verdict = decide(Response(200, body.encode()), datetime.now(UTC))
            yield read_records(batch, verdict.records)

    def close(self) -> None:
        """Nothing is open."""

    def _record(self, code: str) -> dict[str, object]:
        minute = int(self._clock() // 60)
        base = 1 + int.from_bytes(hashlib.sha256(code.encode()).digest()[:4], "big") % 40_000 / 100
        step = int.from_bytes(hashlib.sha256(f"{code}|{minute}".encode()).digest()[:4], "big")
        price = round(base * (1 + (step % 2001 - 1000) / 100_000), 3)
        volume = 1 + step % 500
        return {"s": code, "t": minute * 60_000, "p": f"{price:.3f}", "v": str(volume),
                "vw": f"{price * volume:.3f}", "td": step % 3}  # fmt: skip


# ======================================================================================================
# Stores
# ======================================================================================================
#
# Promises, over both stores and the spool between them (one contract suite checks them, and the fault suite):
#   1. One trade, one document, whoever writes it and however often: `_id` is made of the trade alone,
#      `s|t|p|v|td`, each part as the API sent it. Polled again, retried, or written by two machines, the
#      same trade has the same `_id`, and the first one written stays, its `create_time` with it.
#   2. What `write` counts is durable: `stored` and `known` are acknowledged by MongoDB with its write
#      concern, or, without MongoDB, on this disk; `kept` is on this disk (SQLite, synchronous=FULL).
#   3. What is kept reaches MongoDB when it is back, in order of arrival per code, without anybody's help,
#      at least five times faster than it came, while new work goes on: new trades queue up behind it.
#   4. What is kept never grows past SPOOL_MAX_MB nor takes the disk below 5 % free: at the limit new work is
#      refused by name and counted. What waits is never thrown away.
#   5. A document that MongoDB refuses for good is named and goes to the table `rejects` with MongoDB's
#      words; the others are stored, and nothing waits for it.
#   6. A damaged local file is set aside with the date in its name, what can be read is rescued, one error
#      line says so, and the work goes on.
#   7. `write` ends within a time limit, or raises StoreError: then nothing of it counts as stored.
#   8. `close` holds ONE document per code and session date, `_id` `code|date`, and whoever writes, in
#      whatever order, it ends as the same one, the best of all candidates: a regular trade of what is known
#      to be a half day, then any other regular trade, then one after hours. Of regular trades the later is
#      the better, of those after hours the earlier; equal times are decided by price, volume and side; of
#      the same trade the one without doubt (`half_day_unknown`) is the better. What cannot be written now
#      is made later, and keeps no trade waiting.

# Every MongoDB operation, its retries included; the platform waits 120 s for a result.
MONGODB_TIMEOUT_MS = 20_000
# Connecting, and finding a server for --check; a write waits longer, for an election to end.
MONGODB_SELECTION_TIMEOUT_MS = 5_000
# For telling the server that a client leaves.
MONGODB_GOODBYE_S = 1.0
DUPLICATE_KEY = 11000
UNAUTHORIZED = 13
# The `_id` of a document that is written and deleted to see whether that works.
PROBE = "stockrt-check"
# Most codes trade in the last minutes before a close (auction included): looked at first.
NEWEST_SPAN_MS = 6 * 60 * 1000
Document = dict[str, Any]
TRADE_FIELDS = Trade._fields


def identity(trade: Trade) -> str:
    """Return the `_id` of a trade: `s|t|p|v|td`, the rule that makes the same trade one document.

    The turnover `vw` follows from price and volume and is left out. No part can hold a `|`.
    """
    s, t, p, v, _, td = trade
    return f"{s}|{t}|{p}|{v}|{td}"


def to_document(trade: Trade, created: datetime, demo: bool = False) -> Document:
    """Return the document of a trade, its fields as the API sent them.

    `created` is aware UTC, whole milliseconds (a BSON date has no more).
    """
    s, t, p, v, vw, td = trade
    document: Document = {"_id": identity(trade), "s": s, "t": t, "p": p, "v": v, "vw": vw, "td": td,
                          "stock_code": s, "create_time": created}  # fmt: skip
    return document | {"demo": True} if demo else document


class Close(NamedTuple):
    """A candidate for the closing snapshot of one code and session date, with the marks it carries if true.

    `half_day`: the calendar says that the date is one. `half_day_unknown`: the calendar is missing, and the
    trade lies between the early and the usual close.
    """

    document: Document
    date: str
    after_hours: bool = False
    half_day: bool = False
    half_day_unknown: bool = False

    @property
    def key(self) -> str:
        """The `_id`: code and session date."""
        return f"{self.document['stock_code']}|{self.date}"

    def marks(self) -> dict[str, bool]:
        """Return the marks that the document carries beside the trade."""
        return {name: True for name in CLOSE_MARKS if getattr(self, name)}


CLOSE_MARKS = ("after_hours", "half_day", "half_day_unknown")


class WriteReport(NamedTuple):
    """What a write did: documents new and known before, and the refused ones (`_id` -> reason).

    `kept`: documents that wait on this machine for MongoDB, and `kept_because` why.
    """

    stored: int = 0
    known: int = 0
    refused: Mapping[str, str] = MappingProxyType({})
    kept: int = 0
    kept_because: str = ""


class Store(Protocol):
    """Where documents go; see the promises above. Used by one thread at a time."""

    def write(self, documents: Sequence[Document]) -> WriteReport:
        """Store documents, each with its own `_id`. Raises StoreError when the store is away."""

    def newest(self, codes: Collection[str], since: int, until: int) -> dict[str, Document]:
        """Return of each code the newest trade with since <= t <= until (epoch ms), synthetic ones left out.

        A code without one is missing. Raises StoreError.
        """

    def write_closes(self, closes: Sequence[Close]) -> Mapping[str, str]:
        """Let each candidate take its place in `close` unless one as good stands there.

        Returns the refused ones (`_id` -> reason). Raises StoreError.
        """

    def check(self) -> str:
        """Try what a run needs and return a line that says what holds. Raises StoreError."""

    def close(self) -> None:
        """Let go of files and connections."""


# ------------------------------------------------------------------------------------------------------
# The embedded store
# ------------------------------------------------------------------------------------------------------


class SqliteStore:
    """The embedded store: one file in the state directory, readable with the sqlite3 shell."""

    def __init__(self, directory: Path, on_busy: Callable[[], None] = _nothing) -> None:
        self.path = directory / SQLITE_NAME
        self._file = LocalFile(self.path, SQLITE_VERSION, _SQLITE_SCHEMA, on_busy)

    def write(self, documents: Sequence[Document]) -> WriteReport:
        """Store documents in one transaction. Raises StoreError when the file cannot be written."""
        import sqlite3

        rows = [_sqlite_row(document) for document in documents]
        refused: dict[str, str] = {}

        def insert(db: sqlite3.Connection) -> int:
            self._admit(db, documents)
            try:
                return db.executemany(_SQLITE_INSERT, rows).rowcount
            except (sqlite3.IntegrityError, sqlite3.ProgrammingError, OverflowError):
                db.rollback()
                return sum(_insert_one(db, row, refused) for row in rows)

        stored = max(0, self._file.write(insert))  # -1 where nothing was to be done
        return WriteReport(stored, len(documents) - stored - len(refused), refused)

    def _admit(self, db: sqlite3.Connection, documents: Sequence[Document]) -> None:
        """Raise StoreError if there is no room for these documents: here only the disk's end is one."""

    def newest(self, codes: Collection[str], since: int, until: int) -> dict[str, Document]:
        """Return the newest trade of each code in a span of time. Raises StoreError."""
        names = ("_id", *TRADE_FIELDS, "stock_code")
        query = (
            f"SELECT {', '.join(names)} FROM realtime "  # noqa: S608
            "WHERE stock_code = ? AND t BETWEEN ? AND ? AND demo IS NULL "
            "ORDER BY t DESC, p DESC, v DESC, td DESC LIMIT 1"
        )
        rows = self._file.read(
            lambda db: [db.execute(query, (code, since, until)).fetchone() for code in codes]
        )
        return {row[-1]: dict(zip(names, row, strict=True)) for row in rows if row}

    def write_closes(self, closes: Sequence[Close]) -> Mapping[str, str]:
        """Write candidates in one transaction; the statement itself decides which is the better one."""
        now = _iso(utc_now())
        rows = [_close_row(close, now) for close in closes]
        self._file.write(lambda db: db.executemany(_SQLITE_CLOSE, rows))
        return {}

    def check(self) -> str:
        """Write and take back a row. Raises StoreError."""

        def probe(db: sqlite3.Connection) -> int:
            db.execute("CREATE TABLE probe (x)")
            db.rollback()
            return int(db.execute("SELECT count(*) FROM realtime").fetchone()[0])

        return f"{self.path} can be written, {self._file.write(probe)} trades in it"

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _insert_one(db: sqlite3.Connection, row: Sequence[Any], refused: dict[str, str]) -> int:
    """Store one row and return how many are new: 0 or 1; a refused one is named in `refused`."""
    import sqlite3

    try:
        return db.execute(_SQLITE_INSERT, row).rowcount
    except (sqlite3.IntegrityError, sqlite3.ProgrammingError, OverflowError) as error:
        refused[str(row[0])] = f"the local store refused it: {one_line(error, 200)}"
        return 0


_SQLITE_INSERT = (
    "INSERT INTO realtime (_id, s, t, p, v, vw, td, stock_code, create_time, demo) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (_id) DO NOTHING"
)


def _sqlite_row(document: Document) -> tuple[Any, ...]:
    names = ("_id", "s", "t", "p", "v", "vw", "td", "stock_code")
    return (*(document[name] for name in names), _iso(document["create_time"]), document.get("demo"))


# Promise 8: which of two closes is the better. Unnamed columns are those of the document that stands there.
_SQLITE_CLOSE = """
INSERT INTO close (_id, date, s, t, p, v, vw, td, stock_code, after_hours, half_day, half_day_unknown,
                   create_time, update_time)
VALUES (:_id, :date, :s, :t, :p, :v, :vw, :td, :stock_code, :after_hours, :half_day, :half_day_unknown, :now, :now)
ON CONFLICT (_id) DO UPDATE SET
    s = excluded.s, t = excluded.t, p = excluded.p, v = excluded.v, vw = excluded.vw, td = excluded.td,
    after_hours = excluded.after_hours, half_day = excluded.half_day,
    half_day_unknown = excluded.half_day_unknown, update_time = excluded.update_time
WHERE CASE
    WHEN :after_hours THEN after_hours AND (t, p, v, td) > (:t, :p, :v, :td)
    WHEN after_hours THEN 1
    WHEN half_day IS NOT :half_day THEN :half_day
    ELSE (t, p, v, td, half_day_unknown IS NULL) < (:t, :p, :v, :td, :half_day_unknown IS NULL)
END
"""


def _close_row(close: Close, now: str) -> dict[str, Any]:
    row = {name: close.document[name] for name in (*TRADE_FIELDS, "stock_code")}
    marks: dict[str, Any] = dict.fromkeys(CLOSE_MARKS) | close.marks()
    return row | marks | {"_id": close.key, "date": close.date, "now": now}


# ------------------------------------------------------------------------------------------------------
# MongoDB
# ------------------------------------------------------------------------------------------------------

# Faults that MongoDB reports of a single document of a batch, though any would have met them: the server is
# about to change its role or to go (the drivers' list of retryable errors), has no room, lacks a right or is
# told to take no writes (371); or a router finds no shard that could take it (70, 82, 133, 202).
NOT_THE_DOCUMENTS_FAULT = frozenset(
    [6, 7, UNAUTHORIZED, 24, 46, 50, 63, 64, 70, 82, 89, 91, 112, 133, 134, 150, 189, 202, 249, 262, 371, 8000,
     9001, 10058, 10107, 11600, 11602, 13388, 13435, 13436, 14031]
)  # fmt: skip


class MongoStore:
    """The collections of a MongoDB; one client per process, connected at first use. Thread-safe."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._convert = _number_converter(settings.numeric_type)
        self.client = self._connect()
        self.realtime_name = settings.realtime_name
        self.close_name = settings.close_name
        self._collections: dict[str, MongoCollection[Document]] = {}
        self._indexed = False

    def write(self, documents: Sequence[Document]) -> WriteReport:
        """Insert documents unordered; those whose `_id` is there count as known.

        Raises StoreAway for whatever is not a fault of single documents.
        """
        from bson.errors import BSONError
        from pymongo.errors import BulkWriteError, PyMongoError

        encoded, refused = self._encode(documents)
        if not encoded:
            return WriteReport(refused=refused)
        try:
            self._make_index()
            self._collection().insert_many(encoded, ordered=False)
        except BulkWriteError as error:
            report = self._sort_errors(error.details or {}, len(encoded))
            return report._replace(refused={**refused, **report.refused})
        except (PyMongoError, BSONError) as error:
            raise self._fault(error) from error
        return WriteReport(len(encoded), refused=refused)

    def _encode(self, documents: Sequence[Document]) -> tuple[Sequence[Document], dict[str, str]]:
        """Return the documents as they will be stored, and those whose numbers do not fit (`_id` -> why)."""
        if self._convert is None:
            return documents, {}
        encoded, refused = [], {}
        for document in documents:
            try:
                encoded.append(self._bson(document))
            except (ArithmeticError, ValueError) as error:
                kind = self._settings.numeric_type
                refused[document["_id"]] = (
                    f"its numbers do not fit MONGODB_NUMERIC_TYPE={kind}: {one_line(error)}"
                )
        return encoded, refused

    def takes_another(self) -> bool:
        """Return whether a document of no use can be written now; it is deleted again.

        Beside the keys' counts, not among the trades: a process may be killed between writing and deleting.
        Among the trades only where this user may write nowhere else.
        """
        from pymongo import timeout
        from pymongo.errors import OperationFailure, PyMongoError, WriteError

        limit = min(MONGODB_SELECTION_TIMEOUT_MS / 1000, self.client.options.timeout or math.inf)
        try:
            with timeout(limit):
                try:
                    self._probe(self._settings.license_name)
                except OperationFailure as error:
                    if error.code != UNAUTHORIZED:
                        raise
                    self._probe(self.realtime_name)
        except WriteError:  # it may not look like this: the server works all the same
            return True
        except PyMongoError:
            return False
        return True

    def has(self, name: str) -> bool:
        """Return whether a trade of this `_id` is in `realtime`. Raises StoreAway."""
        from pymongo.errors import PyMongoError

        try:
            return self._collection().find_one({"_id": name}, {"_id": 1}) is not None
        except PyMongoError as error:
            raise self._fault(error) from error

    def newest(self, codes: Collection[str], since: int, until: int) -> dict[str, Document]:
        """Return the newest trade of each code in a span of time. Raises StoreError.

        Looks at the last minutes for all codes in one request, then at a longer time for those that are
        missing: few requests, and few documents even where a code has thousands of trades a day.
        """
        from pymongo.errors import PyMongoError

        found: dict[str, Document] = {}
        span = NEWEST_SPAN_MS
        try:
            while (missing := [code for code in codes if code not in found]) and until >= since:
                first = max(since, until - span)
                wanted = {"stock_code": {"$in": missing}, "t": {"$gte": first, "$lte": until}}
                for document in self._collection().find(wanted):
                    code = document["stock_code"]
                    if code not in found or _order(found[code]) < _order(document):
                        found[code] = document
                until, span = first - 1, span * 4
        except PyMongoError as error:
            raise self._fault(error) from error
        return {code: document | _as_texts(document) for code, document in found.items()}

    def write_closes(self, closes: Sequence[Close]) -> Mapping[str, str]:
        """Insert candidates; where a document stands already, a conditional update lets the server decide."""
        from pymongo import UpdateOne
        from pymongo.errors import PyMongoError

        now = utc_now()
        documents = [self._close_document(close, now) for close in closes]
        try:
            taken, refused = self._insert_closes(documents)
            updates = []
            for close, document in zip(closes, documents, strict=True):
                if close.key in taken:
                    updates.append(UpdateOne(_worse_close(close, document), _close_update(document)))
            if updates:
                self._collection(self.close_name).bulk_write(updates, ordered=False)
        except PyMongoError as error:
            raise self._fault(error) from error
        return refused

    def _insert_closes(self, documents: Sequence[Document]) -> tuple[set[str], Mapping[str, str]]:
        """Insert what is new; return the `_id` of what stands already, and what was refused (`_id` -> why)."""
        from pymongo.errors import BulkWriteError

        try:
            self._collection(self.close_name).insert_many(documents, ordered=False)
        except BulkWriteError as error:
            details = error.details or {}
            refused = self._sort_errors(details, len(documents)).refused
            return {fault["op"]["_id"] for fault in details["writeErrors"]} - refused.keys(), refused
        return set(), {}

    def _close_document(self, close: Close, now: datetime) -> Document:
        found = self._bson(close.document)
        trade = {name: found[name] for name in (*TRADE_FIELDS, "stock_code")}
        times = {"create_time": now, "update_time": now}
        return {"_id": close.key, "date": close.date, **trade, **close.marks(), **times}

    def check(self) -> str:
        """Ping, make the index, write to and delete from both collections. Raises StoreError."""
        from pymongo import timeout
        from pymongo.errors import PyMongoError

        settings = self._settings
        try:
            with timeout(MONGODB_SELECTION_TIMEOUT_MS / 1000):
                self.client.admin.command("ping")
            self._make_index()
            for name in (self.realtime_name, self.close_name):
                self._probe(name)
        except PyMongoError as error:
            raise self._fault(error) from error
        return (f"{settings.mongodb_shown()}: database {settings.mongodb_db_name} can be written, "
                f"index on {settings.realtime_name} is there")  # fmt: skip

    def close(self) -> None:
        """Close the client."""
        from pymongo import timeout

        with timeout(MONGODB_GOODBYE_S):  # it says goodbye, and would wait for ever for a server that hangs
            self.client.close()

    def _probe(self, name: str) -> None:
        """Write to a collection and take it back."""
        collection, probe = self._collection(name), {"_id": PROBE}
        collection.replace_one(probe, probe, upsert=True)
        collection.delete_one(probe)

    def _connect(self) -> MongoClient[Document]:
        from pymongo import MongoClient
        from pymongo.errors import PyMongoError

        given = uri_options(self._settings.mongodb_uri)
        defaults: dict[str, Any] = {
            "appname": "stockrt",
            "timeoutMS": MONGODB_TIMEOUT_MS,
            "connectTimeoutMS": MONGODB_SELECTION_TIMEOUT_MS,
            "w": "majority",
        }
        options = {name: value for name, value in defaults.items() if name.lower() not in given}
        try:  # not connected before it is used: mongodb+srv:// asks the DNS, which may be away too
            return MongoClient(self._settings.mongodb_uri, tz_aware=True, connect=False, **options)
        except (PyMongoError, ValueError, TypeError) as error:
            raise SettingsError(
                [f"MONGODB_HOST={self._settings.mongodb_shown()!r}: {self._settings.redact(one_line(error))}"]
            ) from None

    def _collection(self, name: str = "") -> MongoCollection[Document]:
        name = name or self.realtime_name
        if name not in self._collections:  # to make one takes longer than to insert a few documents
            self._collections[name] = self.client[self._settings.mongodb_db_name][name]
        return self._collections[name]

    def _make_index(self) -> None:
        """Make the index once per process. A role may forbid it; trades are stored all the same."""
        from pymongo.errors import OperationFailure

        if self._indexed:
            return
        try:
            self._collection().create_index([("stock_code", 1), ("t", -1)])
        except OperationFailure as error:
            log.warning("MongoDB refused the index {stock_code: 1, t: -1} on %s: %s",
                        self.realtime_name, self._settings.redact(one_line(error)))  # fmt: skip
        self._indexed = True

    def _bson(self, document: Document) -> Document:
        if self._convert is None:
            return document
        return document | {name: self._convert(document[name]) for name in ("p", "v", "vw")}

    def _sort_errors(self, details: Mapping[str, Any], total: int) -> WriteReport:
        """Return what became of a batch with faults. Raises StoreAway when they are not the documents'."""
        if details.get("writeConcernErrors"):
            words = one_line(details["writeConcernErrors"][0].get("errmsg", "no more is known"))
            raise self._away(f"it did not confirm the write with its write concern: {words}")
        refused: dict[str, str] = {}
        known = 0
        for error in details.get("writeErrors", ()):
            words = self._settings.redact(one_line(error.get("errmsg", "no more is known"), 200))
            if error.get("code") == DUPLICATE_KEY and _is_identity_taken(error):
                known += 1
            elif error.get("code") in NOT_THE_DOCUMENTS_FAULT:
                raise self._away(words)
            else:
                refused[error["op"]["_id"]] = f"MongoDB refused it: {words}"
        return WriteReport(total - known - len(refused), known, refused)

    def _fault(self, error: Exception) -> StoreAway:
        from pymongo.errors import ConnectionFailure, NotPrimaryError, PyMongoError

        words = one_line(str(error).split(", Timeout:")[0], 200)
        lost = isinstance(error, ConnectionFailure) and not isinstance(error, NotPrimaryError)
        return self._away(words, lost or (isinstance(error, PyMongoError) and error.timeout))

    def _away(self, words: str, unreachable: bool = False) -> StoreAway:
        words = self._settings.redact(words)
        shown = self._settings.mongodb_shown()
        return StoreAway(f"MongoDB at {shown} fails: {words}; see MONGODB_HOST", unreachable, words)


def _is_identity_taken(error: Mapping[str, Any]) -> bool:
    """Return whether a duplicate is one of `_id`; of an operator's own unique index it is a refusal."""
    if "keyPattern" in error:
        return set(error["keyPattern"]) == {"_id"}
    index = re.search(r"index: (?:\S*\$)?(\S+)", error.get("errmsg", ""))  # servers that send no keyPattern
    return index is not None and index[1] == "_id_"


def _worse_close(close: Close, trade: Mapping[str, Any]) -> dict[str, Any]:
    """Return the filter of the documents that `close` may replace: promise 8, as MongoDB's conditions."""
    if close.after_hours:
        return {"_id": close.key, "after_hours": True, "$or": _before(trade, "$gt")}
    worse = _before(trade, "$lt")
    if not close.half_day_unknown:
        worse.append({**{name: trade[name] for name in _ORDER}, "half_day_unknown": True})
    if close.half_day:
        worse.append({"half_day": {"$ne": True}})
    else:
        worse = [{**condition, "half_day": {"$ne": True}} for condition in worse]
    return {"_id": close.key, "$or": [{"after_hours": True}, *worse]}


def _close_update(document: Document) -> dict[str, Any]:
    kept = ("_id", "create_time")
    gone = {name: "" for name in CLOSE_MARKS if name not in document}
    update = {"$set": {name: value for name, value in document.items() if name not in kept}}
    return update | ({"$unset": gone} if gone else {})


# What decides between trades of the same kind.
_ORDER = ("t", "p", "v", "td")


def _before(trade: Mapping[str, Any], operator: str) -> list[dict[str, Any]]:
    """Return the conditions, one of which holds where a document comes before the trade ($gt: after it)."""
    return [
        {same: trade[same] for same in _ORDER[:number]} | {name: {operator: trade[name]}}
        for number, name in enumerate(_ORDER)
    ]


def _order(document: Document) -> tuple[Any, ...]:
    """Return what decides between stored trades, as MongoDB sorts them: numbers of any type before texts."""
    from bson.decimal128 import Decimal128

    values = (document[name] for name in _ORDER)
    plain = (value.to_decimal() if isinstance(value, Decimal128) else value for value in values)
    return tuple((isinstance(value, str), value) for value in plain)


def _as_texts(document: Document) -> dict[str, str]:
    """Return price, volume and turnover as the API sends them, whatever the type they were stored with."""
    return {name: str(document[name]) for name in ("p", "v", "vw")}


def _number_converter(numeric_type: str) -> Callable[[str], object] | None:
    if numeric_type == "double":
        return float
    if numeric_type == "decimal":
        from bson.decimal128 import Decimal128

        return Decimal128
    return None


# ======================================================================================================
# Delivery: what waits on this machine for MongoDB
# ======================================================================================================

# Documents that go to MongoDB at once when it is back.
DRAIN_BATCH = 1000
# A MongoDB that is back is met soon: asking it is cheap, and the results say "failure" meanwhile.
DRAIN_FIRST_S, DRAIN_CAP_S = 1.0, 10.0
# While the spool is emptied a write waits so long for its turn before it queues up itself.
CATCH_UP_S = 5.0
# A document alone that fails so often, while MongoDB takes another one each time, is refused for good.
POISON_TRIES = 3
# What the file keeps free on the disk for everybody else.
DISK_KEPT_FREE = 0.05
# An emptied file of more unused bytes than this is shrunk.
SHRINK_ABOVE = 16 * 1024 * 1024
# Of a document beside its `_id`, which is in the file three times: the table's row and two indexes.
ROW_BYTES = 250
# A document changes at most so many pages of the file, each of which is in the log then.
PAGES_PER_ROW = 4


class QueuedBatch(NamedTuple):
    """The oldest trades of the spool, from number `first` to `last`; `damaged` ones (`_id` -> why) left out.

    `file`: the one they have these numbers in.
    """

    first: int
    last: int
    documents: list[Document]
    damaged: dict[str, str]
    file: tuple[int, int] | None


class Spool(SqliteStore):
    """The embedded store as the place where trades wait for MongoDB: bounded, and read in order of arrival."""

    def __init__(self, directory: Path, max_bytes: int, on_busy: Callable[[], None] = _nothing) -> None:
        super().__init__(directory, on_busy)
        self._max_bytes = max_bytes
        self._trades: int | None = None  # what waits, as far as this process knows
        self.refused = 0

    def write(self, documents: Sequence[Document]) -> WriteReport:
        """Keep documents in one transaction. Raises StoreError, SpoolFull when there is no room."""
        try:
            return self._write_counted(documents)
        except SpoolFull:
            self._file.empty_log()  # what the log took is free again
        try:
            return self._write_counted(documents)
        except SpoolFull:
            self.refused += len(documents)
            raise

    def _write_counted(self, documents: Sequence[Document]) -> WriteReport:
        with self._counting() as count:
            report = super().write(documents)
            count(report.stored)
        return report

    @contextlib.contextmanager
    def _counting(self) -> Iterator[Callable[[int], None]]:
        """Give a callable that counts what is written meanwhile, while no other thread does either."""

        def count(trades: int) -> None:
            if self._trades is not None:
                self._trades = max(0, self._trades + trades)

        with self._file.lock:
            yield count

    def _admit(self, db: sqlite3.Connection, documents: Sequence[Document]) -> None:
        """Raise SpoolFull if the file or the disk could come to its limit."""
        (pages,) = db.execute("PRAGMA page_count").fetchone()
        (unused,) = db.execute("PRAGMA freelist_count").fetchone()
        more = sum(3 * len(document["_id"]) + ROW_BYTES for document in documents) // SQLITE_PAGE + 1
        logged = (min(pages, PAGES_PER_ROW * len(documents)) + more) * (SQLITE_PAGE + 24)
        grown = max(0, more - unused) * SQLITE_PAGE
        _, log_file, shared = _sides(self.path)
        size = pages * SQLITE_PAGE + _size_of(log_file) + _size_of(shared) + grown + logged
        if size > self._max_bytes:
            raise SpoolFull(
                f"{self.path} has come to its limit of {self._max_bytes >> 20} MB; see SPOOL_MAX_MB"
            )
        disk = os.statvfs(self.path.parent)
        free = disk.f_bavail * disk.f_frsize - grown - logged
        if free < disk.f_blocks * disk.f_frsize * DISK_KEPT_FREE:
            raise SpoolFull(
                f"the disk of {self.path} would have less than {DISK_KEPT_FREE:.0%} free; see STATE_DIRECTORY"
            )

    def has_trades(self) -> bool:
        """Return whether trades wait for MongoDB. Raises StoreError."""
        with self._file.lock:
            found = bool(self._file.read_one("SELECT EXISTS (SELECT 1 FROM realtime WHERE demo IS NULL)")[0])
            self._trades = self._trades if found else 0
        return found

    def is_empty(self) -> bool:
        """Return whether nothing at all waits, neither trades nor what is to be a close. Raises StoreError."""
        query = "SELECT EXISTS (SELECT 1 FROM close) OR EXISTS (SELECT 1 FROM unsettled)"
        return not (self.has_trades() or self._file.read_one(query)[0])

    def oldest(self, count: int) -> QueuedBatch:
        """Return up to `count` trades in order of arrival. Raises StoreError."""
        query = f"SELECT seq, {_WAITING_FIELDS} FROM realtime WHERE demo IS NULL ORDER BY seq LIMIT ?"  # noqa: S608

        def look(db: sqlite3.Connection) -> list[Any]:
            found = db.execute(query, (count,)).fetchall()
            numbers = [row[0] for row in found]
            if numbers != sorted(set(numbers)) or any(row[1] is None for row in found):
                raise _damage("its rows are out of order")  # part of a page is gone; SQLite does not look
            return found

        with self._file.lock:
            rows, file = self._file.read(look), self._file.identity
        documents: list[Document] = []
        damaged: dict[str, str] = {}
        for row in rows:
            try:
                documents.append(_waiting_document(row[1:]))
            except (TypeError, ValueError) as error:
                damaged[str(row[1])] = f"damaged on this machine: {one_line(error, 200)}"
        return QueuedBatch(rows[0][0] if rows else 0, rows[-1][0] if rows else 0, documents, damaged, file)

    def finish(
        self, waiting: QueuedBatch, refused: Mapping[str, str], collection: str, settled: bool = True
    ) -> bool:
        """Take out what MongoDB has, and put aside what it refused (`_id` -> reason). Raises StoreError.

        What is not `settled` is kept apart until its closes are made. Return whether it was done: not where
        a rescue has given the rows other numbers meanwhile; they wait as before then.
        """
        rows = "FROM realtime WHERE seq BETWEEN ? AND ? AND demo IS NULL"

        def take_out(db: sqlite3.Connection) -> int:
            if self._file.identity != waiting.file:
                return 0
            for name, why in (waiting.damaged | dict(refused)).items():
                db.execute(
                    "INSERT OR REPLACE INTO rejects (collection, _id, document, reason, rejected_at) "
                    "SELECT ?, _id, json_object('s', s, 't', t, 'p', p, 'v', v, 'vw', vw, 'td', td, "
                    "'stock_code', stock_code, 'create_time', create_time), ?, ? FROM realtime WHERE _id = ?",
                    (collection, why, _iso(utc_now()), name),
                )
            span = (waiting.first, waiting.last)
            if not settled:
                keep = f"INSERT OR IGNORE INTO unsettled SELECT {_WAITING_FIELDS} {rows}"
                db.execute(keep, span)
                gone = [(name,) for name in waiting.damaged | dict(refused)]
                db.executemany("DELETE FROM unsettled WHERE _id = ?", gone)
            return db.execute(f"DELETE {rows}", span).rowcount

        with self._counting() as count:
            taken = self._file.write(take_out)
            count(-taken)
        return taken > 0

    def keep_unsettled(self, documents: Sequence[Document]) -> None:
        """Keep trades that MongoDB has until their closes are made. Raises StoreError, SpoolFull."""
        insert = "INSERT OR IGNORE INTO unsettled VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
        rows = [_sqlite_row(document)[:-1] for document in documents]

        def keep(db: sqlite3.Connection) -> None:
            self._admit(db, documents)
            db.executemany(insert, rows)

        self._file.write(keep)

    def unsettled(self, count: int) -> list[Document]:
        """Return up to `count` trades whose closes are still to be made. Raises StoreError."""
        query = f"SELECT {_WAITING_FIELDS} FROM unsettled LIMIT ?"  # noqa: S608
        documents = []
        for row in self._file.read(lambda db: db.execute(query, (count,)).fetchall()):
            try:
                documents.append(_waiting_document(row))
            except (TypeError, ValueError) as error:
                log.error(
                    "no close is made of %s, which is damaged on this machine: %s", row[0], one_line(error)
                )
                self.settled(row[:1])
        return documents

    def settled(self, ids: Sequence[object]) -> None:
        """Forget trades whose closes are made. Raises StoreError."""
        rows = [(one,) for one in ids]
        self._file.write(lambda db: db.executemany("DELETE FROM unsettled WHERE _id = ?", rows))

    def count_unsettled(self) -> int:
        """Return of how many trades the closes are still to be made. Raises StoreError."""
        return int(self._file.read_one("SELECT count(*) FROM unsettled")[0])

    def reject(self, documents: Sequence[Document], refused: Mapping[str, str], collection: str) -> None:
        """Put aside documents that MongoDB refused (`_id` -> reason). Raises StoreError, SpoolFull."""

        def put(db: sqlite3.Connection) -> None:
            self._admit(db, [d for d in documents if d["_id"] in refused])
            _put_aside(db, documents, refused, collection)

        self._file.write(put)

    def rejects(self) -> list[dict[str, Any]]:
        """Return what MongoDB refused for good, oldest first. Raises StoreError."""
        names = ("collection", "_id", "reason", "rejected_at", "document")
        query = f"SELECT {', '.join(names)} FROM rejects ORDER BY seq"  # noqa: S608
        rows = self._file.read(lambda db: db.execute(query).fetchall())
        return [dict(zip(names, row, strict=True)) | {"document": json.loads(row[-1])} for row in rows]

    def retry(self, collection: str) -> int:
        """Let the trades wait again that MongoDB refused; return how many. Raises StoreError."""
        names = (*TRADE_FIELDS, "stock_code", "create_time")
        fields = ", ".join(f"json_extract(document, '$.{name}')" for name in names)

        def move(db: sqlite3.Connection) -> int:
            done = db.execute(
                f"INSERT INTO realtime (_id, {', '.join(names)}) SELECT _id, {fields} FROM rejects "  # noqa: S608
                "WHERE collection = ? ORDER BY seq ON CONFLICT (_id) DO NOTHING",
                (collection,),
            )
            db.execute("DELETE FROM rejects WHERE collection = ?", (collection,))
            return done.rowcount

        with self._counting() as count:
            moved = self._file.write(move)
            count(moved)
        return moved

    def closes(self, count: int) -> list[tuple[Close, str]]:
        """Return up to `count` closes that wait, each with the time of its last change. Raises StoreError."""
        names = (*TRADE_FIELDS, "stock_code")
        query = (
            f"SELECT update_time, date, {', '.join(CLOSE_MARKS)}, {', '.join(names)} "  # noqa: S608
            "FROM close ORDER BY _id LIMIT ?"
        )
        rows = self._file.read(lambda db: db.execute(query, (count,)).fetchall())
        return [
            (Close(dict(zip(names, trade, strict=True)), day, *(mark == 1 for mark in marks)), changed)
            for changed, day, *rest in rows
            for marks, trade in [(rest[: len(CLOSE_MARKS)], rest[len(CLOSE_MARKS) :])]
        ]

    def finish_closes(
        self, closes: Sequence[tuple[Close, str]], refused: Mapping[str, str], collection: str
    ) -> None:
        """Take out closes that have not changed since they were read, put the refused ones aside. Raises StoreError."""
        documents = [close.document | {"_id": close.key} for close, _ in closes]
        rows = [(close.key, changed) for close, changed in closes]

        def take_out(db: sqlite3.Connection) -> None:
            _put_aside(db, documents, refused, collection)
            db.executemany("DELETE FROM close WHERE _id = ? AND update_time = ?", rows)

        self._file.write(take_out)

    def facts(self, counted: bool = False) -> QueueStats:
        """Return what waits; `counted` anew, which takes a while where millions do. Raises StoreError."""

        def look(db: sqlite3.Connection) -> QueueStats:
            if counted or self._trades is None:
                self._trades = db.execute(_WAITING).fetchone()[0]
            query = "SELECT create_time FROM realtime WHERE demo IS NULL ORDER BY seq LIMIT 1"
            (oldest,) = db.execute(query).fetchone() or (None,)
            (rejects,) = db.execute("SELECT count(*) FROM rejects").fetchone()
            used = self._used_bytes(db) if self._trades else 0
            return QueueStats(self._trades or 0, used, oldest, rejects, self.refused)

        return self._file.read(look)

    def shrink(self) -> None:
        """Give the disk back what a long absence of MongoDB took, if that is much. Raises StoreError."""
        if self._file.bytes_on_disk() > SHRINK_ABOVE + self._file.read(self._used_bytes):
            self._file.shrink()

    @staticmethod
    def _used_bytes(db: sqlite3.Connection) -> int:
        (pages,) = db.execute("PRAGMA page_count").fetchone()
        (unused,) = db.execute("PRAGMA freelist_count").fetchone()
        return int(pages - unused) * SQLITE_PAGE


def _put_aside(
    db: sqlite3.Connection, documents: Iterable[Document], refused: Mapping[str, str], collection: str
) -> None:
    now = _iso(utc_now())
    rows = [
        (collection, d["_id"], json.dumps(d, default=_json_value), refused[d["_id"]], now)
        for d in documents
        if d["_id"] in refused
    ]
    insert = (
        "INSERT OR REPLACE INTO rejects (collection, _id, document, reason, rejected_at) "
        "VALUES (?, ?, ?, ?, ?)"
    )
    db.executemany(insert, rows)


_WAITING_FIELDS = "_id, s, t, p, v, vw, td, stock_code, create_time"
_WAITING = "SELECT (SELECT count(*) FROM realtime) - (SELECT count(*) FROM realtime WHERE demo IS NOT NULL)"


def _waiting_document(row: Sequence[Any]) -> Document:
    """Return the document of a row. Raises ValueError or TypeError when the disk has changed it."""
    name, s, t, p, v, vw, td, code, created = row
    if name != f"{s}|{t}|{p}|{v}|{td}" or code != s:
        raise ValueError("its fields do not make its _id")
    return {"_id": name, "s": s, "t": t, "p": p, "v": v, "vw": vw, "td": td, "stock_code": code,
            "create_time": datetime.fromisoformat(created)}  # fmt: skip


def _json_value(value: object) -> str:
    return _iso(value) if isinstance(value, datetime) else str(value)


class Drain:
    """Moves what waits to MongoDB, a batch at a time. `settle` writes the closes that follow from trades.

    Trades whose closes cannot be made hold nobody up: they are kept apart until all trades are moved.
    `on_fault` is told of a batch that failed and is halved.
    """

    def __init__(
        self,
        spool: Spool,
        mongo: MongoStore,
        settle: Callable[[Sequence[Document]], None],
        on_fault: Callable[[StoreAway], None] = lambda error: None,
    ) -> None:
        self._spool = spool
        self._on_fault = on_fault
        self._mongo = mongo
        self._settle = settle
        self._size = DRAIN_BATCH
        self._failed_alone = 0
        self._settles = True  # until it fails: each try may take its whole time limit
        self.moved = 0
        self.rejected = 0

    def step(self) -> int:
        """Move the oldest batch and return how many trades it had, 0 when none wait.

        Raises StoreAway when MongoDB does not take it, StoreError when the local file fails.
        """
        waiting, refused = self._deliver()
        if not waiting.last:
            return 0
        self._size = min(DRAIN_BATCH, self._size * 2)
        self._failed_alone = 0
        settled = self._settled([d for d in waiting.documents if d["_id"] not in refused])
        if self._spool.finish(waiting, refused, self._mongo.realtime_name, settled):
            self._count(len(waiting.documents) - len(refused), waiting.damaged | refused)
        return len(waiting.documents) + len(waiting.damaged)

    def step_closes(self) -> int:
        """Write closes that wait, or make those of a batch of trades; return how many it had, 0 when none wait.

        Raises StoreAway when MongoDB does not take them, StoreError when the local file fails.
        """
        closes = self._spool.closes(DRAIN_BATCH)
        if closes:
            refused = self._mongo.write_closes([close for close, _ in closes])
            self._spool.finish_closes(closes, refused, self._mongo.close_name)
            self._count(len(closes) - len(refused), refused)
            return len(closes)
        trades = self._spool.unsettled(DRAIN_BATCH)
        if trades:
            self._settle(trades)
            self._spool.settled([trade["_id"] for trade in trades])
            self._settles = True
        return len(trades)

    def _deliver(self) -> tuple[QueuedBatch, dict[str, str]]:
        """Return the oldest batch, which MongoDB has by then, and what it refused of it (`_id` -> why).

        A batch that fails while MongoDB takes something else is halved, until the document is alone that
        MongoDB cannot stand.
        """
        while True:
            waiting = self._spool.oldest(self._size)
            try:
                return waiting, dict(self._mongo.write(waiting.documents).refused)
            except StoreAway as error:
                if not self._mongo.takes_another():
                    raise
                if len(waiting.documents) == 1:
                    return waiting, self._refused_alone(waiting.documents[0], error)
                self._on_fault(error)
                self._size = len(waiting.documents) // 2

    def _settled(self, documents: Sequence[Document]) -> bool:
        """Make the closes of trades that arrived, and return whether that was done."""
        if self._settles:
            try:
                self._settle(documents)
            except Exception as error:  # said when they cannot be made later either
                log.debug("closes are made later: %s", error)
                self._settles = False
        return self._settles

    def _refused_alone(self, document: Document, error: StoreAway) -> dict[str, str]:
        """Return why MongoDB refuses a document ({}: it has it). Raises the error again while that is open."""
        self._failed_alone += 1
        if self._failed_alone < POISON_TRIES:
            raise error
        return {} if self._mongo.has(document["_id"]) else {document["_id"]: str(error)}

    def _count(self, moved: int, refused: Mapping[str, str]) -> None:
        self.moved += moved
        self.rejected += len(refused)
        for name, why in list(refused.items())[:CODES_NAMED]:
            log.error("%s is put aside, see --rejects: %s", name, why)


class SpooledStore:
    """MongoDB, and the spool for when it is away; a thread of its own empties the spool.

    The thread is there only while something waits. `on_change` is told what waits, from either thread.
    """

    def __init__(
        self,
        mongo: MongoStore,
        spool: Spool,
        on_change: Callable[[QueueStats], None] = lambda facts: None,
        rng: random.Random | None = None,
    ) -> None:
        self.mongo = mongo
        self.spool = spool
        self._on_change = on_change
        self._rng = rng or random.Random()
        self._settle: Callable[[Sequence[Document]], None] = lambda documents: None
        self._changed = threading.Condition()
        self._drainer: threading.Thread | None = None  # while something waits
        self._behind = False  # trades wait, as far as is known
        self._away: StoreAway | None = None
        self._away_since = utc_now()
        self._closing = threading.Event()
        self._woken = threading.Event()  # something came, or this closes
        self._close_trouble = LogThrottle(
            "closing snapshot", then="what it follows from is kept on this machine"
        )
        self._trouble = LogThrottle(
            "MongoDB", then="what is fetched is kept on this machine until it is back"
        )
        self._file_trouble = LogThrottle(
            "what waits for MongoDB", then="what it takes does not need the file"
        )

    def start(self, settle: Callable[[Sequence[Document]], None]) -> None:
        """Begin to move what waits; `settle` is called, on the drainer's thread, with trades that arrived."""
        self._settle = settle
        facts = self.spool.facts()
        self._on_change(facts)
        if facts.trades:
            log.info(
                "%d trades wait on this machine for MongoDB, the oldest since %s", facts.trades, facts.oldest
            )
        if not self.spool.is_empty():
            self._wake_drainer()

    def write(self, documents: Sequence[Document]) -> WriteReport:
        """Store documents, or keep them: behind those that wait, and whatever fails but for their own fault."""
        if not self._is_caught_up():
            return self._keep(documents)
        try:
            report = self.mongo.write(documents)
        except StoreAway as error:
            self._note_away(error)
            return self._keep(documents)
        self._note_back()
        if report.refused:
            self._put_aside(documents, report.refused, self.mongo.realtime_name)
        return report

    def postpone(self, documents: Sequence[Document]) -> None:
        """Keep trades that MongoDB has but whose closes could not be made: the drainer makes them."""
        self.spool.keep_unsettled(documents)
        self._wake_drainer()

    def newest(self, codes: Collection[str], since: int, until: int) -> dict[str, Document]:
        """Return the newest trade of each code in MongoDB in a span of time."""
        return self.mongo.newest(codes, since, until)

    def write_closes(self, closes: Sequence[Close]) -> Mapping[str, str]:
        """Let candidates take their place in MongoDB; what it refuses for good is put aside."""
        refused = self.mongo.write_closes(closes)
        if refused:
            documents = [close.document | {"_id": close.key} for close in closes]
            self._put_aside(documents, refused, self.mongo.close_name)
        return refused

    def check(self) -> str:
        """Try MongoDB and say what waits for it."""
        waiting = self.spool.facts().trades
        return self.mongo.check() + (f", {waiting} trades wait here for it" if waiting else "")

    def close(self) -> None:
        """Let go of everything; what waits stays."""
        self._closing.set()
        self._woken.set()
        self.mongo.close()
        self.spool.close()

    def _put_aside(self, documents: Sequence[Document], refused: Mapping[str, str], collection: str) -> None:
        """Keep what MongoDB refused; the others of its batch are stored, whatever the local file says."""
        try:
            self.spool.reject(documents, refused, collection)
            self._on_change(self.spool.facts())
        except StoreError as error:
            log.error("%s cannot be put aside: %s", ", ".join(list(refused)[:CODES_NAMED]), error)

    def _is_caught_up(self) -> bool:
        """Whether no trades wait, if need be after a while. MongoDB is not waited for while it is away."""
        try:
            behind = self.spool.has_trades()
        except StoreError as error:
            self._file_trouble.again(str(error))
            return True
        self._file_trouble.over()
        if not behind:
            return True
        with self._changed:
            self._behind = True
            self._wake_drainer()
            self._changed.wait_for(lambda: self._away or not self._behind, CATCH_UP_S)
            return not self._behind

    def _keep(self, documents: Sequence[Document]) -> WriteReport:
        try:
            report = self.spool.write(documents)
        except StoreError as error:
            self._tell()
            raise StoreError(f"{self._because(0)}, and {error}") from error
        waiting = self._tell()
        self._wake_drainer()
        kept = len(documents) - len(report.refused)
        return WriteReport(
            refused=report.refused, kept=kept, kept_because=self._because(max(0, waiting - kept))
        )

    def _tell(self) -> int:
        """Tell what waits, and return how many trades that is; 0 where the file does not say."""
        try:
            facts = self.spool.facts()
        except StoreError as error:
            self._file_trouble.again(str(error))
            return 0
        self._on_change(facts)
        return facts.trades

    def _because(self, before: int) -> str:
        """Return why trades are kept; `before` of them wait longer."""
        with self._changed:
            away, since = self._away, self._away_since
        if away is None:
            return f"{before} others wait for MongoDB before them"
        form = "%H:%M" if utc_now() - since < timedelta(days=1) else "%Y-%m-%d %H:%M"
        clock = f"{since.astimezone():{form}}"
        if away.unreachable:
            return f"MongoDB unreachable since {clock}"
        return f"MongoDB takes no writes since {clock} ({away.words})"

    def _note_away(self, error: StoreAway) -> None:
        with self._changed:
            if self._away is None:
                self._away_since = utc_now()
            self._away = error
            self._changed.notify_all()
        self._trouble.again(str(error))

    def _note_back(self) -> None:
        with self._changed:
            self._away = None
        self._trouble.over()

    def _wake_drainer(self) -> None:
        self._woken.set()
        with self._changed:
            if self._drainer is None and not self._closing.is_set():
                drainer = threading.Thread(target=self._empty, name="stockrt-drainer", daemon=True)
                try:
                    drainer.start()
                except RuntimeError as error:  # no more threads, at the moment
                    self._file_trouble.again(f"nothing moves it: {error}")
                    return
                self._drainer = drainer

    def _empty(self) -> None:
        """Move everything that waits, however long MongoDB is away; the thread ends when nothing does."""
        drain = Drain(self.spool, self.mongo, lambda documents: self._settle(documents), self._note_away)
        delays, delays_of_closes = self._delays(), self._delays()
        started = time.monotonic()
        while not self._closing.is_set():
            self._woken.clear()
            try:
                if drain.step():
                    self._note_back()
                    self._on_change(self.spool.facts())
                    delays = self._delays()
                    continue
                self._caught_up()
            except Exception as error:  # nobody else looks at this thread
                self._note_fault(error)
                self._closing.wait(next(delays))
                continue
            try:
                if drain.step_closes():
                    self._close_trouble.over()
                    delays_of_closes = self._delays()
                elif self._ends(drain, started):
                    return
            except Exception as error:
                self._note_close_fault(error)
                self._woken.wait(next(delays_of_closes))  # new trades are moved at once

    def _delays(self) -> Iterator[float]:
        return backoff(DRAIN_FIRST_S, DRAIN_CAP_S, self._rng)

    def _caught_up(self) -> None:
        """Note that no trades wait."""
        with self._changed:
            self._behind = self.spool.has_trades()
            self._changed.notify_all()

    def _note_close_fault(self, error: Exception) -> None:
        """Note why closes could not be made. They are tried again, whatever it was."""
        if self._closing.is_set():
            return
        if not isinstance(error, StoreError) and not self._close_trouble.there:
            log.exception("a fault of stockrt itself")
        self._close_trouble.again(str(error) or type(error).__name__)

    def _note_fault(self, error: Exception) -> None:
        """Note why what waits could not be moved. It is tried again, whatever it was."""
        if self._closing.is_set():
            return
        if isinstance(error, StoreAway):
            self._note_away(error)
            return
        if not isinstance(error, StoreError) and not self._trouble.there:
            log.exception("a fault of stockrt itself")
        self._trouble.again(f"what waits cannot be moved to it: {type(error).__name__}: {error}")

    def _ends(self, drain: Drain, started: float) -> bool:
        """End the thread unless something came meanwhile."""
        with self._changed:
            if not self.spool.is_empty():
                return False
            self._drainer = None
            self._behind = False
            self._changed.notify_all()
        self._note_back()
        self._tell()
        try:
            self.spool.shrink()
        except StoreError as error:
            log.warning("what %s has grown by is not given back this time: %s", self.spool.path, error)
        if drain.moved or drain.rejected:
            log.info("%d kept trades moved to MongoDB in %.1f s, %d refused by it",
                     drain.moved, time.monotonic() - started, drain.rejected)  # fmt: skip
        return True


def open_store(
    settings: Settings,
    on_spool: Callable[[QueueStats], None] = lambda facts: None,
    on_busy: Callable[[], None] = _nothing,
) -> SqliteStore | SpooledStore:
    """Open the store that the settings ask for: MongoDB, or the embedded one where none is set."""
    if not settings.mongodb_uri:
        return SqliteStore(settings.state_directory, on_busy)
    spool = Spool(settings.state_directory, settings.spool_max_bytes, on_busy)
    return SpooledStore(MongoStore(settings), spool, on_spool)


def spool_is_empty(settings: Settings, on_busy: Callable[[], None] = _nothing) -> bool:
    """Return whether nothing waits on this machine for MongoDB. Raises StoreError."""
    if not (settings.state_directory / SQLITE_NAME).exists():
        return True
    spool = Spool(settings.state_directory, settings.spool_max_bytes, on_busy)
    try:
        return spool.is_empty()
    finally:
        spool.close()


# ======================================================================================================
# Closing prices
# ======================================================================================================

# Closes that a process remembers to have written or looked up; more are only written once more.
CLOSES_REMEMBERED = 20_000


class Calendar:
    """Half days of the markets, from the API's trading calendar: asked at most once a day and market; thread-safe.

    `ask(market, first day, last day)` returns the half days as ISO dates, None when they cannot be had.
    """

    def __init__(
        self,
        facts: LocalFacts,
        ask: Callable[[str, date, date], Sequence[str] | None],
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._facts = facts
        self._ask = ask
        self._wall = wall
        self._kept: dict[str, HalfDays] = {}
        self._lock = threading.Lock()

    def is_half_day(self, market: str, day: str) -> bool | None:
        """Return whether an ISO date is a half day of the market, None when that cannot be known now.

        Raises StoreError when the local file fails.
        """
        with self._lock:
            kept = self._kept.get(market) or self._facts.calendar(market) or NO_HALF_DAYS
            if not kept.first <= day <= kept.last and kept.asked_on != utc_day(self._wall()):
                kept = self._fetch(market, day, kept)
                self._facts.keep_calendar(market, kept)
            self._kept[market] = kept
        return day in kept.days if kept.first <= day <= kept.last else None

    def _fetch(self, market: str, day: str, before: HalfDays) -> HalfDays:
        """Return the half days around a date; where they cannot be had, those before, as asked today."""
        middle, today = date.fromisoformat(day), utc_day(self._wall())
        first, last = middle - timedelta(days=CALENDAR_DAYS), middle + timedelta(days=CALENDAR_DAYS)
        days = self._ask(market, first, last)
        if days is None:
            log.warning("the trading calendar of %s cannot be had: half days are not known today", market)
            return before._replace(asked_on=today)
        return HalfDays(today, first.isoformat(), last.isoformat(), frozenset(days))


class ClosingPrices:
    """Keeps the closing snapshot: looks at stored trades whose session is over, and writes what is their close.

    The close is the last trade of the regular session: the stored one itself, else the newest in `realtime`
    of that date up to the session's end, else (so that the day is not missing) the stored one as
    `after_hours`. Of a market that goes on through its close the latest trade is hardly ever one of a
    session that is over: there the session before is looked up in `realtime` too, once a date.

    `postpone` takes trades whose closes cannot be made because the store is away; without it StoreAway is raised.
    """

    def __init__(
        self,
        store: Store,
        calendar: Calendar | None,
        wall: Callable[[], float] = time.time,
        postpone: Callable[[Sequence[Document]], None] | None = None,
    ) -> None:
        self._store = store
        self._calendar = calendar
        self._wall = wall
        self._postpone = postpone
        # What is done with, so that a trade polled again costs next to nothing: the trade of a code; the
        # date of a code, and the time from which on its trades after hours change nothing; the date whose
        # session before was looked up.
        self._settled: dict[str, str] = {}
        self._after_hours: dict[str, tuple[str, int]] = {}
        self._looked_back: dict[str, str] = {}

    def settle(self, documents: Sequence[Document]) -> None:
        """Write the closes that follow from these stored trades. Raises StoreError."""
        try:
            self._settle(documents)
        except StoreAway:
            if self._postpone is None:
                raise
            self._postpone(documents)

    def _settle(self, documents: Sequence[Document]) -> None:
        now = int(self._wall() * 1000)
        # of each market the session of its last trade: mostly the next one's too
        sessions: dict[str, Session] = {}
        over: list[tuple[Document, Session]] = []
        begun: dict[tuple[str, Session], list[str]] = {}
        for document in documents:
            code, t = document["stock_code"], document["t"]
            market = market_name(code)
            session = sessions.get(market)
            if session is None or not session.start <= t < session.end:
                session = sessions[market] = self._session(market, t, now)
            if now >= session.close and self._settled.get(code) != document["_id"]:
                over.append((document, session))
            if market in PRODUCT_MARKETS and self._looked_back.get(code) != session.date:
                begun.setdefault((market, session), []).append(code)
        closes = self._closes(over)
        for (market, session), codes in begun.items():
            closes += self._closes_before(market, session, codes)
        if closes:
            self._store.write_closes(closes)
        self._remember(over, closes, begun)

    def _session(self, name: str, t: int, now: int) -> Session:
        """Return the session of a trade, on half days the short one."""
        market = MARKETS.get(name) or PRODUCT_MARKETS.get(name)
        session = session_of(market, t) if market else NO_SESSION
        if market is None or not market.calendar or now < session.early_close:
            return session
        known = self._calendar.is_half_day(market.calendar, session.date) if self._calendar else None
        return session.on(half_day=known)

    def _closes(self, over: Sequence[tuple[Document, Session]]) -> list[Close]:
        """Return the closes that trades of sessions make that are over."""
        closes = []
        late: dict[Session, dict[str, list[Document]]] = {}
        for document, session in over:
            code = document["stock_code"]
            if document["t"] <= session.until:
                closes.append(regular_close(document, session))
            elif not self._changes_nothing(document, session):
                late.setdefault(session, {}).setdefault(code, []).append(document)
        for session, by_code in late.items():
            newest = self._store.newest(by_code, session.start, session.until)
            closes += [regular_close(document, session) for document in newest.values()]
            closes += [
                Close(document, session.date, after_hours=True, half_day=bool(session.half_day))
                for code, documents in by_code.items()
                if code not in newest
                for document in documents
            ]
        return closes

    def _closes_before(self, market: str, session: Session, codes: Sequence[str]) -> list[Close]:
        """Return the closes of the session before, which has ended as this one began."""
        if session is NO_SESSION:
            return []
        before = session_before(PRODUCT_MARKETS[market], session)
        newest = self._store.newest(codes, before.start, before.until)
        return [regular_close(document, before) for document in newest.values()]

    def _changes_nothing(self, document: Document, session: Session) -> bool:
        """Whether a trade after hours comes after what this process has settled for that date."""
        day, since = self._after_hours.get(document["stock_code"], ("", 0))
        return day == session.date and document["t"] > since

    def _remember(
        self,
        over: Iterable[tuple[Document, Session]],
        closes: Iterable[Close],
        begun: Mapping[tuple[str, Session], Sequence[str]],
    ) -> None:
        """Note what is written; nothing of a date whose calendar may come to be known later."""
        if len(self._settled) + len(self._after_hours) + len(self._looked_back) > CLOSES_REMEMBERED:
            for remembered in (self._settled, self._after_hours, self._looked_back):
                remembered.clear()
        regular = {close.key for close in closes if not close.after_hours}
        for document, session in over:
            if session.half_day is None:
                continue
            code, t = document["stock_code"], document["t"]
            self._settled[code] = document["_id"]
            if t > session.until and not self._changes_nothing(document, session):
                known = f"{code}|{session.date}" in regular
                self._after_hours[code] = (session.date, 0 if known else t)
        for (_, session), codes in begun.items():
            self._looked_back.update(dict.fromkeys(codes, session.date))


def regular_close(document: Document, session: Session) -> Close:
    """Return the close that a regular trade makes."""
    doubt = session.half_day is None and document["t"] > session.early_until
    return Close(document, session.date, half_day=bool(session.half_day), half_day_unknown=doubt)


# ======================================================================================================
# Run: codes in, report out
# ======================================================================================================

# MongoDB takes batches of a thousand a third faster than batches of a hundred; bounded, so that memory is.
WRITE_BATCH = 1000
# What was fetched is on its way to the store after this time at the latest.
WRITE_AFTER_S = 0.5


class Collector:
    """One run: fetches, checks, stores, counts. `run` is called once.

    Memory stays bounded whatever the number of codes: documents are handed on and forgotten batch by batch.
    """

    def __init__(
        self,
        source: Source,
        store: Store,
        *,
        demo: bool = False,
        closer: ClosingPrices | None = None,
        on_stored: Callable[[Sequence[Document]], None] = lambda documents: None,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
        on_beat: Callable[[int], None] = lambda waiting: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._store = store
        self._demo = demo
        self._closer = closer
        self._on_stored = on_stored
        self._on_progress = on_progress
        self._on_beat = on_beat  # several times a second while it works; the documents that wait to be stored
        self._clock = clock
        self._waiting: list[Document] = []
        self._waiting_since = 0.0
        self._asked_again: BatchPlan | None = None
        self._done = 0
        self.report = Report()

    def run(self, codes: Iterable[object], stop: threading.Event) -> Report:
        """Collect the latest trades of `codes` and return the report.

        `stop` ends the run early: what was fetched is stored, the rest is not asked.
        """
        started = self._clock()
        plan = plan_batches(codes)
        self.report.total = plan.total
        self.report.failures.update(plan.failures)
        self._done = len(plan.failures)
        self._drain(plan.batches, stop, asked_again=False)
        if self._asked_again is not None:
            self._drain(self._asked_again.finish(), stop, asked_again=True)
        self.report.interrupted = stop.is_set()
        self.report.took_s = self._clock() - started
        return self.report

    def _drain(self, batches: Iterable[Batch], stop: threading.Event, asked_again: bool) -> None:
        for outcome in self._source.fetch(self._while_sound(batches), stop, self._rest):
            self._on_beat(len(self._waiting))
            self._take(outcome, asked_again)
            if self._waiting and self._write_is_due():
                self._write()
        if self._waiting:
            self._write()
        self._on_beat(0)

    def _rest(self) -> None:
        """Nothing comes at the moment: what waits is stored."""
        self._on_beat(len(self._waiting))
        if self._waiting:
            self._write()

    def _while_sound(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Pass batches on until the store has failed: what cannot be stored is not fetched."""
        for batch in batches:
            if self.report.store_error:
                self._fail(dict.fromkeys(batch.split(), f"not asked for: {self.report.store_error}"))
            else:
                yield batch

    def _take(self, outcome: Outcome, asked_again: bool) -> None:
        if not self._waiting:
            self._waiting_since = self._clock()
        created = utc_now()
        self._waiting += [to_document(trade, created, self._demo) for trade in outcome.trades]
        self._fail(outcome.failures)
        if not outcome.unknown:
            return
        if asked_again or outcome.batch.product == FALLBACK_PRODUCT:
            self._fail(dict.fromkeys(outcome.unknown, "unknown to the API"))
            return
        self._asked_again = self._asked_again or BatchPlan()
        for code in outcome.unknown:
            self._asked_again.add_instrument(Instrument(code, FALLBACK_PRODUCT))

    def _fail(self, failures: Mapping[str, str]) -> None:
        if "interrupted" not in failures.values():
            self.report.failures.update(failures)
            self._progress(len(failures))

    def _progress(self, more: int) -> None:
        self._done += more
        self._on_progress(self._done, self.report.total)

    def _write_is_due(self) -> bool:
        return len(self._waiting) >= WRITE_BATCH or self._clock() - self._waiting_since >= WRITE_AFTER_S

    def _write(self) -> None:
        documents, self._waiting = self._waiting, []
        if self.report.store_error:  # not tried again in this run: each try may take its whole time limit
            self._fail(
                {d["stock_code"]: f"fetched, not stored: {self.report.store_error}" for d in documents}
            )
            return
        try:
            written = self._store.write(documents)
        except StoreError as error:
            self.report.store_error = str(error)
            self._fail({d["stock_code"]: f"fetched, not stored: {error}" for d in documents})
            return
        self._progress(len(documents))
        if refused := written.refused:
            self.report.failures |= {
                d["stock_code"]: refused[d["_id"]] for d in documents if d["_id"] in refused
            }
            documents = [d for d in documents if d["_id"] not in refused]
        if written.kept:  # their closes are made when they arrive
            self.report.kept += written.kept
            self.report.kept_because = written.kept_because
            return
        self.report.stored += written.stored
        self.report.known += written.known
        self._on_stored(documents)
        self._settle(documents)

    def _settle(self, documents: Sequence[Document]) -> None:
        """Keep the closing snapshot; that it fails is said, and costs no trade."""
        try:
            if self._closer is not None:
                self._closer.settle(documents)
        except StoreError as error:
            if not self.report.close_error:
                log.error("the closing snapshot is not kept: %s", error)
            self.report.close_error = str(error)


class Pipeline:
    """Everything that runs need, opened together and kept between runs; `close` undoes it in reverse.

    Raises SettingsError without an API key (unless `demo`), StoreError when the local file cannot be used.
    """

    def __init__(
        self,
        settings: Settings,
        demo: bool = False,
        on_answer: Callable[[Response, Verdict, float], None] = lambda answer, verdict, seconds: None,
        on_spool: Callable[[QueueStats], None] = lambda facts: None,
        on_busy: Callable[[], None] = _nothing,
    ) -> None:
        if not (demo or settings.api_keys):
            raise SettingsError([NO_KEY_HINT])
        self._demo = demo
        self.store = open_store(settings, on_spool, on_busy)
        self.facts = LocalFacts(settings.state_directory)
        self.keys = KeyPool(settings.key_plans(), make_ledger(settings, self.store, self.facts))
        self.source: Source
        self._closer: ClosingPrices | None = None
        if demo:
            self.source = DemoApi()
        else:
            api = InfowayApi(settings.api_base_url, self.keys, on_answer=on_answer)
            self.source = api
            calendar = Calendar(self.facts, api.half_days)
            if isinstance(self.store, SpooledStore):
                self._closer = ClosingPrices(self.store, calendar, postpone=self.store.postpone)
                self.store.start(ClosingPrices(self.store, calendar).settle)
            else:
                self._closer = ClosingPrices(self.store, calendar)

    def collector(
        self,
        on_stored: Callable[[Sequence[Document]], None] = lambda documents: None,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
        on_beat: Callable[[int], None] = lambda waiting: None,
    ) -> Collector:
        """Return a collector for one run."""
        return Collector(
            self.source,
            self.store,
            demo=self._demo,
            closer=self._closer,
            on_stored=on_stored,
            on_progress=on_progress,
            on_beat=on_beat,
        )

    def close(self) -> None:
        """Close what is open, last opened first."""
        self.source.close()
        self.keys.close()
        self.facts.close()
        self.store.close()


def make_ledger(settings: Settings, store: Store, facts: LocalFacts) -> Ledger:
    """Return where the keys' requests are counted: in MongoDB with all instances, else on this machine."""
    if not isinstance(store, SpooledStore):
        return facts
    return SharedLedger(store.mongo.client[settings.mongodb_db_name][settings.license_name], facts)


# ======================================================================================================
# Platform protocol: text in, events out
# ======================================================================================================

# Larger frames are refused with close code 1009; 100,000 codes of the greatest length need 3.5 MB.
MAX_FRAME_BYTES = 4 * 1024 * 1024
MAX_CODES_PER_COMMAND = 100_000
# The newer server sweeps a client from which no text frame came for 120 s; its own pings come every 30 s.
TEXT_KEEPALIVE_S = 45.0
# A peer that was silent for this many heartbeats is dead.
SILENT_HEARTBEATS = 2
# The names under which a workflow may hold its codes: today's, the documentation's, the command line's.
CODE_ARGUMENTS = ("code_list", "stock_list", "codes")
FAILURES_LISTED = 100


class Command(NamedTuple):
    """An `execute` that was understood. `context` is what the answer repeats: meta, workflow_id, …"""

    execution_id: str
    context: dict[str, Any]
    codes: list[object]


class Refused(NamedTuple):
    """An `execute` that cannot be understood, and why."""

    context: dict[str, Any]
    reason: str


class Send(NamedTuple):
    """A text frame to send now."""

    text: str


class Receipt(NamedTuple):
    """The server has the oldest result that was sent on this connection."""


class Shutdown(NamedTuple):
    """The platform replaces this module: confirm, finish, leave."""


class Ping(NamedTuple):
    """A WebSocket ping to send now."""


class PeerDead(NamedTuple):
    """The peer is silent for too long: close and dial again."""

    reason: str


Event: TypeAlias = Command | Refused | Send | Receipt | Shutdown | Ping | PeerDead
SHUTDOWN_CONFIRMATION = json.dumps({"status": "success", "message": "模块正在关闭"}, ensure_ascii=False)


class PlatformProtocol:
    """One connection's conversation, for both generations of the server, recognised by what it sends.

    The caller passes in every text frame (`receive`), tells of every other frame (`heard`), calls `tick` no
    later than `next_tick`, and does what the events say, at once. Times are monotonic seconds.
    """

    def __init__(self, heartbeat_s: float, now: float, stamp: Callable[[], str] | None = None) -> None:
        self._heartbeat_s = heartbeat_s
        self._stamp = stamp or _local_time
        self._heard_at = now
        self._pinged_at = now
        self._text_sent_at = now
        self._beat_at = now
        # Whether the server answers the text `heartbeat`: None until it was asked, once per connection.
        self._confirms: bool | None = None
        self._asked = False
        self.useful = False

    def heard(self, now: float) -> None:
        """Any frame came: the peer lives, and the connection has proved itself."""
        self._heard_at = now
        self.useful = True

    def sent_text(self, now: float) -> None:
        """A text frame was sent: the newer server's liveness clock moved."""
        self._text_sent_at = now

    def receive(self, text: str, now: float) -> list[Event]:
        """Return what a text frame asks for; nothing for what is no command."""
        self.heard(now)
        message = _unwrap(text)
        if isinstance(message, str):
            self._confirms = True if message.strip() == "heartbeat confirm" else self._confirms
            return [Receipt()] if message.strip() == "receive result" else []
        kind = message.get("type")
        if kind == "ping":
            self._confirms = bool(self._confirms)  # the newer server: it pings by itself
            return [Send(json.dumps({"type": "pong", "timestamp": self._stamp()}))]
        if kind == "shutdown":
            return [Send(SHUTDOWN_CONFIRMATION), Shutdown()]
        if kind == "execute":
            return [read_execute(message)]
        if message.get("status") == "error" and self._asked and self._confirms is None:
            self._confirms = False  # it took `heartbeat` for broken JSON: never again on this connection
        return []

    def next_tick(self) -> float:
        """Return when `tick` has something to do at the latest."""
        return min(self._pinged_at + self._heartbeat_s, self._silent_at(), self._text_at())

    def tick(self, now: float) -> list[Event]:
        """Return what is due now to keep the connection alive, or to give it up."""
        if now >= self._silent_at():
            return [PeerDead(f"nothing came for {now - self._heard_at:.0f} s")]
        events: list[Event] = []
        if now >= self._pinged_at + self._heartbeat_s:
            self._pinged_at = now
            events.append(Ping())
        if now >= self._text_at():
            events.append(Send(self._keepalive_text()))
            self._beat_at = self._text_sent_at = now
        return events

    def _text_at(self) -> float:
        """Return when a text frame is due: `heartbeat` at its interval, else one in time for the 120 s clock."""
        if self._beats():
            return self._beat_at + min(self._heartbeat_s, TEXT_KEEPALIVE_S)
        return self._text_sent_at + TEXT_KEEPALIVE_S

    def _keepalive_text(self) -> str:
        if self._beats():
            self._asked = True
            return "heartbeat"
        return json.dumps({"type": "pong", "timestamp": self._stamp()})

    def _beats(self) -> bool:
        """Whether `heartbeat` is the text to send: the server confirms it, or was not asked yet."""
        return self._confirms is True or (self._confirms is None and not self._asked)

    def _silent_at(self) -> float:
        return self._heard_at + SILENT_HEARTBEATS * self._heartbeat_s


def _local_time() -> str:
    """Return the time as the server writes it: local, ISO 8601, without a zone."""
    return datetime.now(UTC).astimezone().replace(tzinfo=None).isoformat()


def _unwrap(text: str) -> dict[str, Any] | str:
    """Return the object that a frame carries: bare, in `message`, or as JSON text in `message`; else its text."""
    parsed = _json_or_none(text)
    if not isinstance(parsed, dict):
        return text
    inner = parsed.get("message")
    if "type" in parsed or "status" in parsed or inner is None:
        return parsed
    if isinstance(inner, str):
        unpacked = _json_or_none(inner)
        return unpacked if isinstance(unpacked, dict) else inner
    return inner if isinstance(inner, dict) else ""


def _json_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def read_execute(message: Mapping[str, Any]) -> Command | Refused:
    """Return the command that an `execute` object holds, or why it cannot be understood."""
    meta = message.get("meta")
    known: Mapping[str, Any] = meta if isinstance(meta, dict) else {}
    context = {
        name: known.get(name, message.get(name)) for name in ("workflow_id", "workflow_name")
    } | {name: message[name] for name in ("meta", "execution_id") if name in message}  # fmt: skip
    execution_id = known.get("execution_id", message.get("execution_id"))
    try:
        codes = read_args(message.get("args"))
    except UsageError as error:
        return Refused(context, str(error))
    return Command(str(execution_id) if isinstance(execution_id, str | int) else "", context, codes)


def read_args(args: object) -> list[object]:
    """Return the codes in an execute's `args`, whatever shape a person gave them. Raises UsageError."""
    if isinstance(args, str) and args.strip()[:1] in ("{", "["):
        args = _json_or_none(args)
    if isinstance(args, dict):
        filled = [name for name in CODE_ARGUMENTS if args.get(name) not in (None, "", [])]
        if not filled:
            came = one_line(", ".join(map(str, args)) or "nothing", 80)
            raise UsageError(
                f'args holds no codes: expected code_list, a list such as ["AAPL.US"]; got {came}'
            )
        args = args[filled[0]]
    if isinstance(args, int | float) and not isinstance(args, bool):
        args = [args]
    if not isinstance(args, str | list):
        raise UsageError(
            f'args holds no codes: expected code_list, a list such as ["AAPL.US"]; got {_json_kind(args)}'
        )
    codes = _flat(args if isinstance(args, list) else [args])
    if not codes:
        raise UsageError('code_list is empty: expected codes such as ["AAPL.US"]')
    if len(codes) > MAX_CODES_PER_COMMAND:
        raise UsageError(
            f"{len(codes)} codes in one command: at most {MAX_CODES_PER_COMMAND}; split the workflow"
        )
    return codes


def _flat(items: Sequence[object]) -> list[object]:
    """Return codes one by one: a person also types several into one element. Blank elements are none."""
    with contextlib.suppress(TypeError):  # as nearly always: texts alone
        return [*split_codes(",".join(cast(Sequence[str], items)))]
    codes: list[object] = []
    for item in items:
        codes += split_codes(item) if isinstance(item, str) else [item]
    return codes


def _json_kind(value: object) -> str:
    return "nothing" if value is None else one_line(json.dumps(value), 60)


def make_result(
    context: Mapping[str, Any], module_name: str, message: str, result: Mapping[str, Any], good: bool
) -> str:
    """Return the result as both generations of the server read it: one JSON object with the union of fields.

    ASCII only: a lone surrogate that came in `meta` goes back as it came.
    """
    status = "success" if good else "failure"
    answer = {"type": "result", "status": status, **context, "module_name": module_name, "message": message}
    if not good:
        answer["error"] = message
    return json.dumps(answer | {"result": {"status": status, **result}})


def report_result(
    context: Mapping[str, Any], module_name: str, report: Report, redact: Callable[[str], str]
) -> str:
    """Return the result of a run: `success` when something is in the store, and nothing waits for it."""
    reached = report.stored + report.known
    good = reached > 0 and not report.store_error and not report.kept
    failures = {code: redact(why) for code, why in list(report.failures.items())[:FAILURES_LISTED]}
    result = {
        "total": report.total,
        "success_count": reached,
        "duplicate_count": report.known,
        "kept_count": report.kept,
        "failed_count": len(report.failures),
        "failed_stocks": list(report.failures),
        "failures": failures,
        "took_ms": round(report.took_s * 1000),
    }
    return make_result(context, module_name, redact(_result_words(report, reached)), result, good)


def _result_words(report: Report, reached: int) -> str:
    if report.store_error:
        return f"{reached} of {report.total} codes stored, then the store failed: {report.store_error}"
    words = f"{reached} of {report.total} codes stored"
    if report.kept:
        words = f"{words}; {report.kept_words()}" if reached or report.failures else report.kept_words()
    if report.close_error:
        words += f", the closing snapshot is not kept: {report.close_error}"
    if not report.failures:
        return words
    named = [f"{code} ({why})" for code, why in list(report.failures.items())[:3]]
    more = len(report.failures) - len(named)
    return f"{words}; failed: {', '.join(named)}{f' and {more} more' if more else ''}"


def empty_result(context: Mapping[str, Any], module_name: str, reason: str) -> str:
    """Return the result of a command that was not executed."""
    numbers = ("total", "success_count", "duplicate_count", "kept_count", "failed_count", "took_ms")
    result: dict[str, object] = dict.fromkeys(numbers, 0) | {"failed_stocks": [], "failures": {}}
    return make_result(context, module_name, reason, result, good=False)


# ======================================================================================================
# Platform link: registration, presence, WebSocket
# ======================================================================================================

HASH_NAME = "module_hash"
# Where the older client of this platform kept its hash, below its working directory.
OLD_HASH_FILE = Path("config/module_hash.txt")
# The server's own: at most 64 characters; nothing else may stand behind `hash=`.
_HASH = re.compile(r"[A-Za-z0-9_+=-]{1,64}")
MISSION_KIND = "realtime"


def read_hash(directory: Path) -> str:
    """Return the stored hash, '' where there is none; an older installation's is taken over.

    Raises StoreError when the file cannot be read or holds no hash.
    """
    path = directory / HASH_NAME
    for place in (path, OLD_HASH_FILE):
        try:
            found = place.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise StoreError(f"the module hash {place} cannot be read: {why}; see STATE_DIRECTORY") from None
        if not _HASH.fullmatch(found):
            raise StoreError(f"{place} holds no module hash; remove it and run --register")
        if place is not path:
            write_hash(directory, found)
            log.info("the module hash of an older installation was taken over from %s", place)
        return found
    return ""


def write_hash(directory: Path, module_hash: str) -> None:
    """Store the hash: whole or not at all, readable by this user alone. Raises StoreError."""
    make_state_directory(directory)
    write_whole(directory / HASH_NAME, module_hash + "\n", durable=True)


def program_digest() -> str:
    """Return a digest of this program: a new release registers as a new module."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:32]


def register(settings: Settings) -> str:
    """Register at the platform and return the hash it gave. Raises RegistrationError."""
    query = {
        "name": settings.module_name,
        "description": settings.module_description,
        "input_data": "[]",
        "output_data": "[]",
        "modelHash": program_digest(),
        "missionKind": MISSION_KIND,
        "dataRequirement": "[]",
    }
    url = settings.platform_url()
    answer = get_once(url, f"/module/register?{urlencode(query)}", PLATFORM_LIMITS)
    envelope = _envelope(answer.body) or {}
    result = envelope.get("result")
    module_hash = str(result.get("hash") or "") if isinstance(result, dict) else ""
    if envelope.get("code") == "2000" and _HASH.fullmatch(module_hash):
        return module_hash
    raise RegistrationError(f"not registered at {url}: {_why_not_registered(answer, envelope)}")


def _why_not_registered(answer: Response, envelope: Mapping[str, Any]) -> str:
    code = envelope.get("code")
    if answer.fault:
        return f"{answer.fault}; is the platform up, and are SERVER_IP, SERVER_PORT and SERVER_TLS right?"
    if code == "3005":
        return (
            "it has a module of this name, description and program already (3005), and its hash is not here; "
            f"put it into {HASH_NAME} in STATE_DIRECTORY, or change MODULE_DESCRIPTION and try again"
        )
    if code == "3002":
        return "it found the data invalid (3002); see MODULE_NAME and MODULE_DESCRIPTION"
    if code == "2000":
        return "it said success but gave no usable hash; ask the platform's operator"
    if answer.status >= 500:
        return f"HTTP {answer.status}, a fault inside the platform; see its log"
    said = _words(envelope) or f"{len(answer.body)} bytes that are not the platform's JSON"
    return f"HTTP {answer.status}: {said}; see SERVER_IP and SERVER_PORT"


class Presence(Enum):
    """What `/module/online` says of our hash."""

    ONLINE = "still counted as online by the server (old session or a second instance); it will let go within 120 s"
    UNKNOWN = "hash unknown to the server: run --register --force"
    UNCLEAR = "refused by the server with HTTP 403, and /module/online does not say why"


def ask_presence(settings: Settings, module_hash: str) -> Presence:
    """Ask the platform which of the two meanings a refused handshake has."""
    answer = get_once(settings.platform_url(), "/module/online", PLATFORM_LIMITS)
    envelope = _envelope(answer.body) or {}
    modules = envelope.get("result")
    if envelope.get("code") != "2000" or not isinstance(modules, list):
        return Presence.UNCLEAR
    hashes = [str(module.get("module_hash")) for module in modules if isinstance(module, dict)]
    return Presence.ONLINE if module_hash in hashes else Presence.UNKNOWN


# ------------------------------------------------------------------------------------------------------
# WebSocket
# ------------------------------------------------------------------------------------------------------

# A server that is away comes back within seconds or hours: quick at first, slowly slower, never above 30 s.
# With a first delay of up to 1 s and a growth of 1.3 a server that was away for 5 s is met after about 1 s.
DIAL_FIRST_S, DIAL_CAP_S, DIAL_GROWTH = 1.0, 30.0, 1.3
# Connecting, TLS and the WebSocket handshake together.
DIAL_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 5.0
# A peer that takes no byte for this long is dead; the kernel buffers far more than a result.
SEND_TIMEOUT_S = 5.0
# Frames that are handled before results are sent and signals looked at.
FRAMES_AT_ONCE = 100


class Link:
    """An open WebSocket that never blocks in reading; `fileno` is for select. Raises LinkLost from every call."""

    def __init__(self, settings: Settings, module_hash: str) -> None:
        self._ws = _dial(settings, module_hash)
        self._sock: socket.socket = self._ws.sock
        self._sock.settimeout(0)
        self.has_more = True  # whether frames may wait that no poll would tell of
        self._unfinished = 0  # bytes of a frame whose rest is still to come

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._sock.fileno()

    def frames(self) -> Iterator[str | None]:
        """Yield what has come: a text frame's text, or None for a frame that only shows that the peer lives."""
        from websocket import ABNF

        self.has_more = True
        for _ in range(FRAMES_AT_ONCE):
            frame = self._next_frame()
            if frame is None:
                self.has_more = False
                if self._long_frame_grew():
                    yield None
                return
            opcode, data = frame
            if opcode == ABNF.OPCODE_PING:
                self._send(data, ABNF.OPCODE_PONG)
            yield data.decode("utf-8", "replace") if opcode == ABNF.OPCODE_TEXT else None

    def _long_frame_grew(self) -> bool:
        """Whether more of an unfinished frame has come: its sender is slow, not silent."""
        before, self._unfinished = self._unfinished, sum(map(len, self._ws.frame_buffer.recv_buffer))
        return self._unfinished > before

    def send_text(self, text: str) -> None:
        """Send a text frame."""
        from websocket import ABNF

        self._send(text.encode(), ABNF.OPCODE_TEXT)

    def ping(self) -> None:
        """Send a WebSocket ping."""
        from websocket import ABNF

        self._send(b"", ABNF.OPCODE_PING)

    def close(self, code: int = 1000) -> None:
        """Say goodbye if the peer still listens, and close."""
        from websocket import ABNF

        with contextlib.suppress(LinkLost):
            self._send(code.to_bytes(2, "big"), ABNF.OPCODE_CLOSE)
        self._ws.shutdown()

    def _send(self, data: bytes, opcode: int) -> None:
        from websocket import WebSocketException

        try:
            self._sock.settimeout(SEND_TIMEOUT_S)
            self._ws.send(data, opcode)
            self._sock.settimeout(0)
        except (WebSocketException, OSError) as error:
            raise LinkLost(f"sending failed: {_network_words(error)}") from error

    def _next_frame(self) -> tuple[int, bytes] | None:
        """Return the next whole message, or control frame, None when no more has come."""
        import ssl

        from websocket import ABNF, WebSocketException

        ws = self._ws
        try:
            while True:
                frame = ws.recv_frame()
                if frame.opcode == ABNF.OPCODE_CLOSE:
                    raise LinkLost(f"closed by the server{_close_words(frame.data)}")
                if frame.opcode in (ABNF.OPCODE_PING, ABNF.OPCODE_PONG):
                    return frame.opcode, bytes(frame.data)
                ws.cont_frame.validate(frame)
                ws.cont_frame.add(frame)
                self._limit(len(ws.cont_frame.cont_data[1]))
                if ws.cont_frame.is_fire(frame):
                    opcode, whole = ws.cont_frame.extract(frame)
                    return opcode, bytes(whole.data)
        except (BlockingIOError, ssl.SSLWantReadError):
            self._limit(ws.frame_buffer.length or 0)  # the length of a frame whose rest is still to come
            return None
        except (WebSocketException, OSError, ValueError) as error:
            raise LinkLost(f"lost: {_network_words(error)}") from error

    def _limit(self, size: int) -> None:
        if size > MAX_FRAME_BYTES:
            self.close(1009)
            raise LinkLost(f"a frame of {size} bytes; at most {MAX_FRAME_BYTES} are taken")


def _close_words(data: bytes) -> str:
    code = int.from_bytes(data[:2], "big") if len(data) >= 2 else 0
    return (
        f" (code {code}{' ' + one_line(data[2:].decode('utf-8', 'replace'), 80) if data[2:] else ''})"
        if code
        else ""
    )


def _dial(settings: Settings, module_hash: str) -> Any:
    """Open the socket, TLS and the WebSocket, each and all within limits. Raises DialError."""
    import socket

    from websocket import WebSocket, WebSocketBadStatusException, WebSocketException

    opened: list[socket.socket] = []
    # a server that drips its handshake byte by byte never runs into the socket's own limit
    cut = threading.Timer(DIAL_TIMEOUT_S, lambda: [*map(cut_socket, opened)])
    cut.daemon = True
    cut.start()
    try:
        opened.append(
            # bytes: a text would load the codec for host names in other scripts, which no setting holds
            socket.create_connection(
                (settings.server_host.encode(), settings.server_port),  # type: ignore[arg-type]
                CONNECT_TIMEOUT_S,
            )
        )
        opened[0].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if settings.server_tls:
            opened.append(_start_tls(opened[0], settings.server_host))
        ws: Any = WebSocket(skip_utf8_validation=True, enable_multithread=False)
        url = f"{settings.platform_url().replace('http', 'ws', 1)}/websocket?hash={module_hash}"
        opened[-1].settimeout(DIAL_TIMEOUT_S)
        ws.connect(url, socket=opened[-1], redirect_limit=0)
        return ws
    except WebSocketBadStatusException as error:
        status = error.status_code
        raise DialError(f"the handshake was refused with HTTP {status}", status) from None
    except (WebSocketException, OSError, ValueError) as error:
        for sock in opened:
            sock.close()
        raise DialError(f"cannot connect: {_network_words(error)}") from error
    finally:
        cut.cancel()


def _start_tls(sock: socket.socket, host: str) -> socket.socket:
    import ssl

    wrapped = ssl.create_default_context().wrap_socket(
        sock, server_hostname=host, do_handshake_on_connect=False
    )
    wrapped.settimeout(DIAL_TIMEOUT_S)
    wrapped.do_handshake()
    return wrapped


# ======================================================================================================
# Command journal
# ======================================================================================================
#
# Promises:
#   1. A command that was accepted is on disk until it is answered, its answer until the platform's receipt.
#   2. An `execution_id` is executed once; asked again it gets the same answer, word for word.
#   3. What is given up (answers older than an hour) is said.

JOURNAL_NAME = "executions.db"
JOURNAL_VERSION = 1
# Answers that are kept for an `execution_id` that comes again.
ANSWERS_KEPT = 1000
# To find the oldest of those takes a millisecond: done once in so many receipts, and never before an answer.
RECEIPTS_PER_SWEEP = 100
# The platform has e-mailed the time-out of an execution long before; a later answer would only confuse.
ANSWER_LIFETIME_S = 3600.0
# After this the platform counts an execution as timed out: doing it then helps nobody.
EXECUTION_LIFETIME_S = 120.0


class Accepted(NamedTuple):
    """A command in the journal: its number, who asked (`context`) and for what (`codes`)."""

    number: int
    context: dict[str, Any]
    codes: list[object]


class Journal:
    """Accepted commands and their answers on disk; thread-safe. `clock` is epoch seconds."""

    def __init__(self, directory: Path, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self.path = directory / JOURNAL_NAME
        self._file = LocalFile(self.path, JOURNAL_VERSION, _JOURNAL_SCHEMA)
        self._newest = (0, "")  # the last answer, which is sent next: mostly read without the file
        self._ids = self._file.read(_journal_ids)  # at least all that are in the file
        self._unswept = RECEIPTS_PER_SWEEP

    def accept(self, commands: Sequence[Command]) -> list[int]:
        """Keep commands, all or none, and return their numbers. Raises StoreError."""
        rows = [
            (_journal_id(c.execution_id), self._clock(), json.dumps(c.context), json.dumps(c.codes))
            for c in commands
        ]
        insert = "INSERT INTO executions (execution_id, accepted_at, context, codes) VALUES (?, ?, ?, ?)"
        self._ids.update(row[0] for row in rows)
        return self._file.write(lambda db: [cast(int, db.execute(insert, row).lastrowid) for row in rows])

    def find(self, execution_id: str) -> tuple[int, bool] | None:
        """Return (number, answered) of an execution that was accepted before, None for a new one."""
        name = _journal_id(execution_id)
        if name not in self._ids:
            return None
        query = "SELECT number, answer IS NOT NULL FROM executions WHERE execution_id = ?"
        row = self._file.read_one(query, name)
        return (row[0], bool(row[1])) if row else None

    def read(self, number: int) -> Accepted:
        """Return an accepted command. Raises StoreError, LostCommand where damage has changed or taken it."""
        row = self._file.read_one("SELECT context, codes FROM executions WHERE number = ?", number)
        with contextlib.suppress(TypeError, ValueError):  # no row, or no JSON
            context, codes = map(json.loads, row)
            if isinstance(context, dict) and isinstance(codes, list):
                return Accepted(number, context, codes)
        raise LostCommand(f"the command is lost with damage to {self.path}")

    def forget(self, number: int) -> None:
        """Forget a command that cannot be answered. Raises StoreError."""
        self._file.write(lambda db: db.execute("DELETE FROM executions WHERE number = ?", (number,)))

    def answer(self, number: int, text: str) -> None:
        """Keep the answer of a command."""
        update = "UPDATE executions SET answer = ?, answered_at = ?, codes = '[]' WHERE number = ?"
        self._file.write(lambda db: db.execute(update, (text, self._clock(), number)))
        self._newest = (number, text)

    def refuse(self, context: Mapping[str, Any], text: str) -> int:
        """Keep the answer of a command that was not accepted; its id may come again and is then looked at anew."""
        now = self._clock()
        insert = "INSERT INTO executions (accepted_at, context, codes, answer, answered_at) VALUES (?, ?, '[]', ?, ?)"
        row = (now, json.dumps(context), text, now)
        return self._file.write(lambda db: cast(int, db.execute(insert, row).lastrowid))

    def answer_text(self, number: int) -> str | None:
        """Return an answer, None where there is none (any more)."""
        newest, text = self._newest
        if number == newest:
            return text
        row = self._file.read_one("SELECT answer FROM executions WHERE number = ?", number)
        return row[0] if row else None

    def received(self, numbers: Sequence[int]) -> None:
        """The platform has these answers: they are not sent again, unless the execution is asked for again.

        With it the oldest answers are forgotten that nobody waits for.
        """
        rows = [(number,) for number in numbers]
        self._unswept += len(rows)

        def note(db: sqlite3.Connection) -> list[str | None]:
            db.executemany("DELETE FROM executions WHERE number = ? AND execution_id IS NULL", rows)
            db.executemany("UPDATE executions SET received = 1 WHERE number = ?", rows)
            return _forget_oldest(db) if self._unswept >= RECEIPTS_PER_SWEEP else []

        self._ids.difference_update(self._file.write(note))
        self._unswept %= RECEIPTS_PER_SWEEP

    def unanswered(self) -> list[tuple[int, float]]:
        """Return number and age in seconds of the commands without an answer, oldest first."""
        rows = self._all("SELECT number, accepted_at FROM executions WHERE answer IS NULL ORDER BY number")
        return [(number, self._clock() - accepted_at) for number, accepted_at in rows]

    def count_waiting(self) -> dict[str, int]:
        """Return how many commands wait to be executed and how many results to be delivered."""
        commands, results = self._file.read_one(
            "SELECT count(CASE WHEN answer IS NULL THEN 1 END), count(CASE WHEN answered_at >= ? THEN 1 END) "
            "FROM executions WHERE answer IS NULL OR NOT received",
            self._clock() - ANSWER_LIFETIME_S,
        )
        return {"commands": commands, "results": results}

    def unreceived(self) -> list[int]:
        """Return the numbers of the answers that the platform has not confirmed, oldest first; drop stale ones."""
        self._drop_stale()
        rows = self._all(
            "SELECT number FROM executions WHERE answer IS NOT NULL AND NOT received ORDER BY number"
        )
        return [number for (number,) in rows]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _drop_stale(self) -> None:
        update = (
            "UPDATE executions SET received = 1 WHERE answer IS NOT NULL AND NOT received AND answered_at < ?"
        )
        too_old = (self._clock() - ANSWER_LIFETIME_S,)
        if dropped := self._file.write(lambda db: db.execute(update, too_old).rowcount):
            log.warning("%d results could not be delivered within an hour and are dropped", dropped)

    def _all(self, query: str, *values: object) -> list[Any]:
        return self._file.read(lambda db: db.execute(query, values).fetchall())


def _journal_ids(db: sqlite3.Connection) -> set[str | None]:
    return {row[0] for row in db.execute("SELECT execution_id FROM executions")}


def _forget_oldest(db: sqlite3.Connection) -> list[str | None]:
    """Delete the answers that nobody waits for but the last ANSWERS_KEPT, and return the ids they were for."""
    oldest = (
        "FROM executions WHERE received AND number <= (SELECT number FROM executions "
        "WHERE received AND execution_id IS NOT NULL ORDER BY number DESC LIMIT 1 OFFSET ?)"
    )
    gone = [row[0] for row in db.execute(f"SELECT execution_id {oldest}", (ANSWERS_KEPT,))]
    db.execute(f"DELETE {oldest}", (ANSWERS_KEPT,))
    return gone


def _journal_id(execution_id: str) -> str | None:
    """Return an id as the journal keeps it: what UTF-8 cannot hold (a lone surrogate) is escaped."""
    return execution_id.encode("utf-8", "backslashreplace").decode() or None


_JOURNAL_SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS executions (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    execution_id TEXT UNIQUE,               -- NULL: the platform gave none
    accepted_at REAL NOT NULL,              -- epoch seconds, as answered_at
    context TEXT NOT NULL,                  -- JSON: what the answer repeats
    codes TEXT NOT NULL,                    -- JSON
    answer TEXT,
    answered_at REAL,
    received INTEGER NOT NULL DEFAULT 0     -- 1: the platform confirmed the answer
);
CREATE INDEX IF NOT EXISTS executions_open ON executions (number) WHERE answer IS NULL OR NOT received;
PRAGMA user_version = {JOURNAL_VERSION};
COMMIT;
"""


# ======================================================================================================
# Daemon: one thread for the socket, one for the work
# ======================================================================================================
#
# Promises:
#   1. The socket's thread never fetches and never stores: a ping is answered at once, whatever is executed.
#   2. Every command is answered: executed, or refused with a reason; see the journal's promises.
#   3. It dials for ever, with a delay before every dial, on the same two threads.

STATUS_NAME = "status.json"
# The number of an answer that the journal could not take.
NOT_IN_JOURNAL = 0
# A full disk is looked at again after so long: waiting for room costs nothing, an answer that waits does.
JOURNAL_FIRST_S, JOURNAL_CAP_S = 0.5, 5.0
# --status holds the lock for the blink of an eye to see whether somebody else does.
LOCK_TRIES, LOCK_RETRY_S = 5, 0.05
MAX_QUEUED = 1000
# Answers that are sent before frames are read again: a ping must not wait behind a long backlog.
ANSWERS_AT_ONCE = 20
# SIGTERM, SIGINT: the running execution has this long; what does not end stays in the journal.
STOP_GRACE_S = 20.0
# After the last result the platform's receipts are waited for, when the process is about to leave.
RECEIPT_GRACE_S = 3.0
# For closing what is open, above both.
STOP_MARGIN_S = 4.0
# An answer goes out before its execution is logged: both want the interpreter, and somebody waits for the answer.
ANSWER_FIRST_S = 0.002


class PendingCommand:
    """A command for the executor, which may begin with it before the journal has it, but not answer it."""

    def __init__(self, context: Mapping[str, Any], codes: Iterable[object]) -> None:
        self.context = context
        self.codes = codes
        self._number: int | None = None
        self._decided = threading.Event()

    def accepted(self, number: int | None) -> PendingCommand:
        """Note the number that the journal has it under; None: the journal could not take it."""
        self._number = number
        self._decided.set()
        return self

    def number(self) -> int | None:
        """Wait until it is in the journal and return its number there."""
        self._decided.wait()
        return self._number


class Executor(threading.Thread):
    """Executes accepted commands one at a time and puts their answers into the journal."""

    def __init__(
        self,
        settings: Settings,
        journal: Journal,
        on_answer: Callable[[int | None], None],
        observer: Events,
    ) -> None:
        super().__init__(name="stockrt-executor", daemon=True)
        self._settings = settings
        self._journal = journal
        self._on_answer = on_answer
        self._observer = observer
        self._added = self._ended = 0  # each counted by one thread
        self._store_trouble = LogThrottle(
            "store" if settings.mongodb_uri else "local store", then="the next execution tries again"
        )
        self._api_trouble = LogThrottle("Infoway", then="the next execution tries again")
        self._journal_trouble = LogThrottle("journal")
        self._rng = random.Random()
        self._queue: queue.SimpleQueue[int | PendingCommand | None] = queue.SimpleQueue()
        self.key_states: list[dict[str, Any]] = []  # as of the end of the last execution
        self.spool = QueueStats()
        self._workshop: Pipeline | None = None
        self._unlogged: tuple[Mapping[str, Any], Report] | None = None  # what is still to be logged
        self._leaving = threading.Event()
        self._dropped_because = ""  # what the commands are answered that are not executed any more
        self.stop = threading.Event()  # cuts the running execution short
        self.done = threading.Event()  # set before the last `on_answer`: `is_alive` may lag behind it

    def add(self, command: int | PendingCommand) -> None:
        """Execute a command, after those before it: by its number in the journal, where the codes wait too."""
        self._added += 1
        self._queue.put(command)

    def waiting(self) -> int:
        """Return how many commands wait to be executed."""
        return self._queue.qsize()

    def unanswered(self) -> int:
        """Return how many commands were accepted and are not answered, the running one included."""
        return self._added - self._ended

    def leave(self, dropped_because: str = "") -> None:
        """Begin no further execution and end after the running one.

        Commands that wait stay in the journal for the next start, or are answered with `dropped_because`.
        """
        self._dropped_because = dropped_because
        self._leaving.set()
        self._queue.put(None)

    def run(self) -> None:
        """Work until told to leave."""
        self._move_what_waits()
        while (command := self._next()) is not None:
            self._observer.beat()
            number = self._answer(command)
            self._ended += 1
            if number is not None:
                self._on_answer(number)
        if self._workshop is not None:
            self._workshop.close()
        self.done.set()
        self._on_answer(None)

    def _next(self) -> int | PendingCommand | None:
        """Wait for the next command. What the last one did is logged first, but not in the way of its answer."""
        if self._unlogged is None:
            return self._queue.get()
        unlogged, self._unlogged = self._unlogged, None
        try:
            command = self._queue.get(timeout=ANSWER_FIRST_S)
        except queue.Empty:
            self._log(*unlogged)
            return self._queue.get()
        self._log(*unlogged)
        return command

    def _answer(self, command: int | PendingCommand) -> int | None:
        """Execute a command and return its number once its answer is in the journal, None where there is none."""
        number: int | None = None
        try:
            task = self._read(command) if isinstance(command, int) else command
            answer = ""
            if not self._leaving.is_set():
                answer = self._execute(task)
            elif self._dropped_because:
                answer = self._unexecuted(task.context, self._dropped_because)
            number = task.number()
            return number if answer and number is not None and self._keep_answer(number, answer) else None
        except StoreError as error:  # the journal cannot be read
            log.error("execution %s is not answered: %s", command, error)
            if isinstance(error, LostCommand) and isinstance(command, int):
                self._forget(command)
            return None

    def _forget(self, number: int) -> None:
        """Have a command that is lost not tried again at the next start."""
        try:
            self._journal.forget(number)
        except StoreError as error:
            log.error("execution %s stays in the journal: %s", number, error)

    def _read(self, number: int) -> PendingCommand:
        accepted = self._journal.read(number)
        return PendingCommand(accepted.context, accepted.codes).accepted(number)

    def _move_what_waits(self) -> None:
        """Have moved to MongoDB what waits for it since the last start, without waiting for an execution."""
        try:
            if self._settings.mongodb_uri and not spool_is_empty(self._settings, self._observer.beat):
                self._open_workshop()
        except StockrtError as error:
            log.error("what waits on this machine cannot be moved to MongoDB: %s", error)

    def _keep_answer(self, number: int, answer: str) -> bool:
        """Put an answer into the journal. On a full disk that is tried until there is room, or this ends."""
        for delay in backoff(JOURNAL_FIRST_S, JOURNAL_CAP_S, self._rng, growth=1.5):
            try:
                self._journal.answer(number, answer)
            except StoreError as error:
                self._journal_trouble.again(f"the answer of execution {number} cannot be kept: {error}")
                self._observer.beat()
                if self._leaving.wait(delay):
                    return False  # it is executed again at the next start
            else:
                self._journal_trouble.over()
                return True
        raise AssertionError("the delays never end")

    def _execute(self, command: PendingCommand) -> str:
        """Return the answer of a command, '' when it was cut short and stays in the journal."""
        name = _execution_name(command.context)
        try:
            report = self._collect(command.codes)
        except StockrtError as error:
            return self._unexecuted(command.context, str(error))
        except Exception as error:
            log.exception("execution %s failed", name)
            return self._unexecuted(
                command.context, f"a fault of stockrt itself: {type(error).__name__}; see its log"
            )
        module_name, reason = self._settings.module_name, self._dropped_because
        self._observer.executed(report)
        self._unlogged = (command.context, report)
        if report.interrupted:
            return empty_result(command.context, module_name, reason) if reason else ""
        return report_result(command.context, module_name, report, self._settings.redact)

    def _log(self, context: Mapping[str, Any], report: Report) -> None:
        """Say what an execution did, and what troubles begin or end with it."""
        level = logging.INFO if report.complete else logging.WARNING
        log.log(level, execution_line(context, report))
        reached = report.stored + report.known
        if report.store_error:
            self._store_trouble.again(report.store_error)
        elif reached:
            self._store_trouble.over()
        kinds = (FailureKind.NETWORK, FailureKind.API, FailureKind.KEY)
        away = [why for code, why in report.failures.items() if failure_kind(code, why) in kinds]
        if away:
            self._api_trouble.again(away[0])
        elif reached:
            self._api_trouble.over()

    def _unexecuted(self, context: Mapping[str, Any], reason: str) -> str:
        log.warning("%s; not executed: %s", execution_line(context, Report()), reason)
        self._observer.executed(None)
        return empty_result(context, self._settings.module_name, self._settings.redact(reason))

    def _collect(self, codes: Iterable[object]) -> Report:
        workshop = self._open_workshop()
        report = workshop.collector(on_beat=self._observer.beat).run(codes, self.stop)
        self.key_states = workshop.keys.describe()
        return report

    def _open_workshop(self) -> Pipeline:
        if self._workshop is None:
            self._workshop = Pipeline(
                self._settings,
                on_answer=self._observer.asked,
                on_spool=self._on_spool,
                on_busy=self._observer.beat,
            )
        return self._workshop

    def _on_spool(self, facts: QueueStats) -> None:
        begins_or_ends = bool(facts.trades) != bool(self.spool.trades)
        self.spool = facts
        self._observer.spooled(facts)
        if begins_or_ends:
            self._on_answer(None)  # the status line changes


def _execution_name(context: Mapping[str, Any]) -> str:
    meta = context.get("meta")
    found = meta.get("execution_id") if isinstance(meta, dict) else context.get("execution_id")
    workflow = context.get("workflow_name") or context.get("workflow_id")
    return one_line(f"{found or 'without id'}{f' of {workflow}' if workflow else ''}", 120)


def execution_line(context: Mapping[str, Any], report: Report) -> str:
    """Return the log's one line of an execution: id, workflow, total, stored, duplicates, failed, ms.

    Failures are given by kind: their reasons stand in the answer, and a trouble that goes on is said apart.
    """
    kinds: dict[str, list[str]] = {}
    for code, why in report.failures.items():
        kinds.setdefault(failure_kind(code, why).value, []).append(code)
    words = [
        f"{len(codes)} {kind}: {', '.join(codes[:CODES_NAMED])}{' …' if len(codes) > CODES_NAMED else ''}"
        for kind, codes in kinds.items()
    ]
    named = f" ({'; '.join(words)})" if words else ""
    return one_line(
        f"execution {_execution_name(context)}: total {report.total}, stored {report.stored}, "
        f"duplicates {report.known}{f', kept {report.kept}' if report.kept else ''}, "
        f"failed {len(report.failures)}{named}, "
        f"{report.took_s * 1000:.0f} ms{', interrupted' if report.interrupted else ''}",
        600,
    )


class Daemon:
    """The platform's module: keeps the connection, takes commands, sends answers. `run` is called once.

    `request_stop` may be called from a signal handler. `pause` waits some seconds between two dials and is
    handed in by tests.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        pause: Callable[[float], None] | None = None,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
        observer: Events | None = None,
    ) -> None:
        import socket

        self._settings = settings
        self._observer = observer or Events()
        self._module_hash = ""
        self._clock = clock
        self._rng = rng or random.Random()
        self._pause = pause or self._wait_awake
        self._trouble = LogThrottle(f"platform {settings.server_host}:{settings.server_port}")
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        self._journal = Journal(settings.state_directory)
        self._lock = lock_state_directory(settings.state_directory)
        self._executor = Executor(settings, self._journal, self._on_answer, self._observer)
        self._answered: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._to_send: deque[int] = deque()
        self._status: dict[str, Any] = {
            "version": __version__,
            "pid": os.getpid(),
            "platform": "not connected",
        }
        self._sent: deque[int] = deque()  # on this connection, oldest first, without a receipt yet
        self._received: set[int] = set()  # confirmed, but not noted in the journal yet
        self._unkept: deque[str] = deque()  # refusals that the journal could not take
        self._journal_trouble = LogThrottle("journal")
        self._status_trouble = LogThrottle("status")
        self._stop_asked = False
        self._presence: Presence | None = None  # what the last refused handshake meant
        self._leave_by: float | None = None
        self._receipts_by: float | None = None

    def request_stop(self) -> None:
        """Ask the loop to leave: only sets a flag."""
        self._stop_asked = True
        self._wake()

    def run(self) -> None:
        """Serve the platform until told to stop or shut down. Raises StoreError when the journal fails."""
        self._executor.start()
        self._take_up_journal()
        self._to_send = deque(self._journal.unreceived())
        self._turn()  # before the start is over, the status is said
        self._observer.started()
        self._note_status()
        delays = self._fresh_delays()
        while not self._leaving():
            useful = self._connect_and_serve()
            if useful:
                delays = self._fresh_delays()
            if not self._leaving():
                self._pause(next(delays))
        self._wait_for_executor()
        self._note_status(stopped=_iso(utc_now()))
        self._journal.close()

    def _fresh_delays(self) -> Iterator[float]:
        return backoff(DIAL_FIRST_S, DIAL_CAP_S, self._rng, DIAL_GROWTH)

    def _take_up_journal(self) -> None:
        """Execute again what a crash interrupted, if it is young; answer the rest as interrupted."""
        for number, age_s in self._journal.unanswered():
            if age_s < EXECUTION_LIFETIME_S:
                self._executor.add(number)
            else:
                self._answer_as_interrupted(number, age_s)

    def _answer_as_interrupted(self, number: int, age_s: float) -> None:
        try:
            context = self._journal.read(number).context
        except LostCommand as error:
            log.error("execution %s is not answered: %s", number, error)
            self._journal.forget(number)
            return
        reason = f"interrupted: stockrt was stopped before this was done, {age_s:.0f} s ago"
        log.warning("execution %s: %s", _execution_name(context), reason)
        self._journal.answer(number, empty_result(context, self._settings.module_name, reason))

    def _connect_and_serve(self) -> bool:
        """Hold one connection from dial to end; return whether it was useful."""
        link = self._dial()
        if link is None:
            return False
        protocol = PlatformProtocol(self._settings.heartbeat_s, self._clock())
        self._sent.clear()
        self._to_send = deque(n for n in self._journal.unreceived() if n not in self._received)
        self._observer.connected()
        # after a trouble its end is said instead, and not before the connection has been useful
        level = logging.DEBUG if self._trouble.there else logging.INFO
        log.log(level, "connected to %s:%s", self._settings.server_host, self._settings.server_port)
        self._note_status(platform="connected", connected_since=_iso(utc_now()))
        try:
            self._serve(link, protocol)
        except LinkLost as error:
            self._lost(f"connection {error}")
        except StoreError as error:  # the journal: dialled again, and what is not confirmed is sent again
            self._lost(str(error))
        finally:
            link.close()
            self._note_status(platform="not connected", last_contact=_iso(utc_now()))
        return protocol.useful

    def _dial(self) -> Link | None:
        settings = self._settings
        try:
            self._module_hash = read_hash(settings.state_directory) or self._register()
            self._turn()
            try:
                return Link(settings, self._module_hash)
            except DialError as error:
                self._turn()
                if why := self._why_refused() if error.status == 403 else str(error):
                    self._lost(why)
        except StockrtError as error:
            self._lost(str(error))
        return None

    def _why_refused(self) -> str:
        """Return what a refused handshake means, '' for once unknown: an old session may have ended meanwhile."""
        presence = ask_presence(self._settings, self._module_hash)
        before, self._presence = self._presence, presence
        once = presence is Presence.UNKNOWN and before is not Presence.UNKNOWN
        return "" if once else presence.value

    def _lost(self, reason: str) -> None:
        self._trouble.again(reason)
        self._observer.disconnected(reason)

    def _turn(self) -> float:
        """Tell the observer that this loop lives; return when it wants to hear that again."""
        unreceived = len(self._to_send) + len(self._sent) + self._answered.qsize()
        return self._observer.turn(self._executor.unanswered(), unreceived)

    def _register(self) -> str:
        module_hash = register(self._settings)
        write_hash(self._settings.state_directory, module_hash)
        log.info(
            "registered %s at %s, hash %s",
            self._settings.module_name,
            self._settings.platform_url(),
            shorten(module_hash),
        )
        return module_hash

    def _serve(self, link: Link, protocol: PlatformProtocol) -> None:
        """Move frames and answers until the connection is lost (LinkLost) or the process may leave."""
        while True:
            self._send_answers(link, protocol)
            if self._leaving() and self._may_leave():
                return
            self._select(link, min(protocol.next_tick(), self._turn()))
            events: list[Event] = []
            lost: LinkLost | None = None
            try:
                for text in link.frames():
                    now = self._clock()
                    if text is None:
                        protocol.heard(now)
                    else:
                        events += self._receive(text, protocol, now)
                events += protocol.tick(self._clock())
            except LinkLost as error:  # what came before counts all the same
                lost = error
            self._apply(events, link, protocol)
            if lost is not None:
                raise lost
            if protocol.useful:
                self._trouble.over()

    def _receive(self, text: str, protocol: PlatformProtocol, now: float) -> list[Event]:
        self._log_frame("received", text)
        return protocol.receive(text, now)

    def _send_text(self, link: Link, protocol: PlatformProtocol, text: str) -> None:
        self._log_frame("sent", text)
        link.send_text(text)
        protocol.sent_text(self._clock())

    def _log_frame(self, what: str, text: str) -> None:
        """Log a frame; secrets are masked before it is shortened, or a piece of one could stay."""
        if log.isEnabledFor(logging.DEBUG):
            masked = self._settings.redact(text)
            masked = masked.replace(self._module_hash, "***") if self._module_hash else masked
            log.debug("frame %s: %s", what, one_line(masked, 500))

    def _apply(self, events: Sequence[Event], link: Link, protocol: PlatformProtocol) -> None:
        """Do what the protocol says: what must be quick first, then the commands in one transaction."""
        commands: list[Command] = []
        received: list[int] = []
        lost: LinkLost | None = None
        for event in events:
            if isinstance(event, Send | Ping | PeerDead):
                try:
                    self._keep_alive(event, link, protocol)
                except LinkLost as error:  # a command that came with it counts all the same
                    lost = lost or error
            elif isinstance(event, Receipt):
                received += [self._sent.popleft()] if self._sent else []
            elif isinstance(event, Shutdown):
                log.info("the platform shuts this module down")
                self._begin_leaving("not executed: the platform shut this module down")
            elif isinstance(event, Refused):
                self._refuse(event.context, event.reason)
            else:
                commands.append(event)
        if received:
            self._note_received(received)
        if commands:
            self._accept(commands)
        if lost is not None:
            raise lost

    def _note_received(self, numbers: Sequence[int]) -> None:
        """Note receipts; those that the disk does not take now go with the next ones."""
        self._received.update(numbers)
        try:
            self._journal.received(sorted(self._received))
        except StoreError as error:
            self._journal_trouble.again(str(error))
        else:
            self._received.clear()
            self._journal_trouble.over()

    def _keep_alive(self, event: Send | Ping | PeerDead, link: Link, protocol: PlatformProtocol) -> None:
        if isinstance(event, Send):
            self._send_text(link, protocol, event.text)
        elif isinstance(event, Ping):
            link.ping()
        else:
            raise LinkLost(f"lost: {event.reason}")

    def _accept(self, commands: Sequence[Command]) -> None:
        fresh: dict[str, Command] = {}
        for number, command in enumerate(commands):
            known = self._journal.find(command.execution_id) if command.execution_id else None
            if known is not None:
                self._answer_again(*known)
            elif command.execution_id in fresh:
                continue  # twice in one breath: one answer
            elif self._leave_by is not None:
                self._refuse(command.context, "this module is stopping and takes no new command")
            elif self._executor.waiting() + len(fresh) >= MAX_QUEUED:
                self._refuse(command.context, f"{MAX_QUEUED} commands are waiting already; try again later")
            else:
                fresh[command.execution_id or f"\0{number}"] = command
        self._hand_over(list(fresh.values()))

    def _hand_over(self, commands: Sequence[Command]) -> None:
        """Put commands into the journal and have them executed; a lone one is fetched meanwhile."""
        early = None
        if len(commands) == 1 and not self._executor.unanswered():
            early = PendingCommand(commands[0].context, commands[0].codes)
            self._executor.add(early)
        try:
            numbers = self._journal.accept(commands) if commands else []
        except StoreError as error:
            if early is not None:
                early.accepted(None)
            for command in commands:
                self._refuse(command.context, f"refused: {error}")
            return
        for number in numbers:
            self._executor.add(number) if early is None else early.accepted(number)

    def _answer_again(self, number: int, answered: bool) -> None:
        if answered and number not in self._to_send:
            self._to_send.append(number)

    def _refuse(self, context: Mapping[str, Any], reason: str) -> None:
        log.warning("execution %s refused: %s", _execution_name(context), reason)
        self._observer.executed(None)
        text = empty_result(context, self._settings.module_name, reason)
        try:
            self._to_send.append(self._journal.refuse(context, text))
        except StoreError as error:
            self._journal_trouble.again(str(error))
            self._unkept.append(text)

    def _on_answer(self, number: int | None) -> None:
        if number is not None:
            self._answered.put(number)
        self._wake()

    def _send_answers(self, link: Link, protocol: PlatformProtocol) -> None:
        number: int | None = None
        with contextlib.suppress(queue.Empty):
            while True:
                number = self._answered.get_nowait()
                if number not in self._to_send and number not in self._sent:
                    self._to_send.append(number)
        try:
            self._send_waiting(link, protocol)
        finally:
            if number is not None:  # of several the last: nobody waits for what --status shows
                self._note_execution(number)

    def _send_waiting(self, link: Link, protocol: PlatformProtocol) -> None:
        while self._unkept:
            self._send_text(link, protocol, self._unkept[0])
            self._unkept.popleft()
            self._sent.append(NOT_IN_JOURNAL)
        for _ in range(min(ANSWERS_AT_ONCE, len(self._to_send))):
            text = self._journal.answer_text(self._to_send[0])
            if text is not None:
                self._send_text(link, protocol, text)
                self._sent.append(self._to_send[0])
            self._to_send.popleft()

    def _note_execution(self, number: int) -> None:
        answer = json.loads(self._journal.answer_text(number) or "{}")
        outcome = {name: answer.get(name) for name in ("status", "message", "workflow_name")}
        self._note_status(
            last_execution=outcome | {"at": _iso(utc_now())},
            keys=self._executor.key_states,
            spool_refused=self._executor.spool.refused,
        )

    def _note_status(self, **news: object) -> None:
        """Write what --status shows; that it cannot be written is no reason to stop working."""
        self._status |= news
        try:
            write_whole(self._settings.state_directory / STATUS_NAME, json.dumps(self._status))
        except StoreError as error:
            self._status_trouble.again(str(error))
        else:
            self._status_trouble.over()

    def _leaving(self) -> bool:
        if self._stop_asked and self._leave_by is None:
            log.info("stopping: the running execution has %d s", STOP_GRACE_S)
            self._begin_leaving()
        return self._leave_by is not None

    def _begin_leaving(self, dropped_because: str = "") -> None:
        if self._leave_by is None:
            self._leave_by = self._clock() + STOP_GRACE_S
            self._observer.stopping(STOP_GRACE_S + RECEIPT_GRACE_S + STOP_MARGIN_S)
            self._executor.leave(dropped_because)

    def _may_leave(self) -> bool:
        """Whether the running execution is answered and the answers are confirmed, or their time is over."""
        now = self._clock()
        leave_by = cast(float, self._leave_by)
        if not self._executor.done.is_set():
            if now >= leave_by:
                self._executor.stop.set()  # what it has fetched is stored
            if now < leave_by + STOP_POLL_S + INTERRUPT_GRACE_S:
                return False
        if self._to_send or self._unkept or not self._answered.empty():
            return False
        self._receipts_by = self._receipts_by or now + RECEIPT_GRACE_S
        return not self._sent or now >= self._receipts_by

    def _wait_for_executor(self) -> None:
        self._executor.join(max(0.0, cast(float, self._leave_by) - self._clock()))
        self._executor.stop.set()  # what it has fetched is stored; the command stays in the journal
        self._executor.join(STOP_POLL_S + INTERRUPT_GRACE_S)

    def _select(self, link: Link, until: float) -> None:
        """Wait until a frame comes, the executor or a signal wakes, or it is `until` (monotonic s)."""
        now = self._clock()
        cut_by = None if self._leave_by is None else self._leave_by + STOP_POLL_S + INTERRUPT_GRACE_S
        ends = [t for t in (self._leave_by, cut_by, self._receipts_by) if t is not None and t > now]
        wait = 0.0 if link.has_more or self._to_send else max(0.0, min([until, *ends]) - now)
        self._poll([link.fileno()], wait)

    def _wait_awake(self, seconds: float) -> None:
        """Wait between two dials; a signal ends it early."""
        until = self._clock() + seconds
        while not self._leaving() and (left := until - self._clock()) > 0:
            self._poll([], max(0.0, min(left, self._turn() - self._clock())))

    def _poll(self, descriptors: Sequence[int], seconds: float) -> None:
        import select

        poll = select.poll()
        for descriptor in (self._woken.fileno(), *descriptors):
            poll.register(descriptor, select.POLLIN)
        poll.poll(math.ceil(seconds * 1000))
        with contextlib.suppress(BlockingIOError):  # nothing to read: it was not woken
            self._woken.recv(4096)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: it will wake anyway
            self._waker.send(b"x")


def daemon_runs(directory: Path) -> bool:
    """Return whether a daemon works in this state directory now."""
    import fcntl

    with contextlib.suppress(FileNotFoundError), open(directory / "lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def lock_state_directory(directory: Path) -> IO[str]:
    """Return the open lock file of the one daemon of this directory. Raises StoreError if another holds it."""
    import fcntl

    make_state_directory(directory)
    lock = open(directory / "lock", "w")  # noqa: SIM115  (open for as long as the process lives)
    for _ in range(LOCK_TRIES):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except OSError:
            time.sleep(LOCK_RETRY_S)
    lock.close()
    raise StoreError(
        f"another stockrt daemon works in {directory}; stop it, or give this one its own STATE_DIRECTORY"
    )


# ======================================================================================================
# Service manager: notifications, the journal, metrics, the unpacked program
# ======================================================================================================
#
# Promises:
#   1. STATUS= is true whenever it is read: what changes by itself is said anew when it does.
#   2. WATCHDOG=1 is sent by the socket's loop, and only while the executor is idle or makes progress.
#   3. The metrics file is whole at every moment, and written only when something in it changed.
#   4. Nothing here stops the daemon: a notification or a file that cannot be written is done without.

# Whatever the service manager does meanwhile, the socket's loop does not wait longer for it.
NOTIFY_TIMEOUT_S = 1.0
# A scraper comes every 15 s or more seldom.
METRICS_EVERY_S = 10.0
# A good answer takes a tenth of a second, one under load seconds; 30 s is the limit of a request.
LATENCY_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0)


class Notifier:
    """Speaks sd_notify: NAME=value lines in a datagram. Silent where no service manager listens."""

    def __init__(self, address: str = "") -> None:
        self._address = "\0" + address[1:] if address.startswith("@") else address

    @property
    def listens(self) -> bool:
        """Whether somebody takes the notifications."""
        return bool(self._address)

    def send(self, **values: object) -> bool:
        """Send the values; return whether the manager took them."""
        import socket

        if not self._address:
            return False
        text = "\n".join(f"{name}={one_line(value)}" for name, value in values.items())
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(NOTIFY_TIMEOUT_S)
            sock.connect(self._address)  # not sendto: only a connected socket waits asleep for a full queue
            sock.send(text.encode())
            return True
        return False


def watchdog_seconds(environ: Mapping[str, str], pid: int) -> float:
    """Return the silence after which systemd ends this process, infinite where it watches another or none."""
    microseconds = environ.get("WATCHDOG_USEC", "")
    if environ.get("WATCHDOG_PID", str(pid)) != str(pid) or not re.fullmatch(
        r"0*[1-9]\d{0,17}", microseconds
    ):
        return math.inf
    return int(microseconds) / 1e6


class JournalStream(io.TextIOBase):
    """Stands for a stderr that the journal reads: every line gets a priority, tracebacks included.

    What has none when it comes is an error; `say` and the log give their own.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._begun = threading.local()  # the line that a thread has begun

    def write(self, text: str) -> int:
        """Pass whole lines on, each with its priority; the rest waits for its end."""
        *lines, rest = (getattr(self._begun, "text", "") + text).split("\n")
        self._begun.text = rest
        if lines:
            self._stream.write("".join(f"{_with_priority(line, logging.ERROR)}\n" for line in lines))
            self._stream.flush()
        return len(text)

    def flush(self) -> None:
        """Whole lines are never kept back."""

    def writable(self) -> bool:
        """Yes."""
        return True

    def fileno(self) -> int:
        """Return the descriptor below."""
        return self._stream.fileno()


# syslog's priorities, as the journal takes them at the beginning of a line.
_PRIORITIES = {
    logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2,
}  # fmt: skip
_HAS_PRIORITY = re.compile(r"<[0-7]>")


def _with_priority(line: str, level: int) -> str:
    return line if _HAS_PRIORITY.match(line) else f"<{_PRIORITIES.get(level, 6)}>{line}"


def for_journal(text: str, level: int) -> str:
    """Return `text` with a priority on each of its lines."""
    return "\n".join(f"<{_PRIORITIES.get(level, 6)}>{line}" for line in text.split("\n"))


def journal_reads(descriptor: int, environ: Mapping[str, str]) -> bool:
    """Return whether what is written to a descriptor goes to the journal: JOURNAL_STREAM names its file."""
    try:
        found = os.fstat(descriptor)
    except OSError:
        return False
    return environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


# ------------------------------------------------------------------------------------------------------
# Metrics
# ------------------------------------------------------------------------------------------------------


class Metric(NamedTuple):
    """A row of the metrics' table; `values` are all that its label can have."""

    name: str
    kind: str
    help: str
    label: str = ""
    values: tuple[str, ...] = ("",)


API_ANSWERS = (*(action.name.lower() for action in Action), "no_answer")
OUTCOMES = ("success", "partial", "failure", "interrupted", "refused")
METRICS = (
    Metric("stockrt_info", "gauge", "Version of stockrt.", "version", (__version__,)),
    Metric("stockrt_start_time_seconds", "gauge", "Unix time at which the daemon started."),
    Metric("stockrt_platform_connected", "gauge", "Whether the connection to the platform stands."),
    Metric("stockrt_platform_connections_total", "counter", "Connections made to the platform."),
    Metric("stockrt_executions_total", "counter", "Commands of the platform that ended.", "outcome", OUTCOMES),
    Metric("stockrt_last_success_timestamp_seconds", "gauge",
           "Unix time of the last execution that stored every code, 0 before the first."),
    Metric("stockrt_trades_stored_total", "counter", "Trades that were new in the store."),
    Metric("stockrt_trades_duplicate_total", "counter", "Trades that were in the store before."),
    Metric("stockrt_codes_failed_total", "counter", "Codes without a stored trade.", "reason",
           tuple(kind.value for kind in FailureKind)),
    Metric("stockrt_api_requests_total", "counter", "Requests to the API by what followed from the answer.",
           "answer", API_ANSWERS),
    Metric("stockrt_waiting_executions", "gauge", "Commands that were accepted and have not ended."),
    Metric("stockrt_waiting_results", "gauge", "Results without a receipt of the platform."),
    Metric("stockrt_waiting_documents", "gauge", "Documents that were fetched and are not stored yet."),
    Metric("stockrt_spool_trades", "gauge", "Trades that wait on this machine for MongoDB."),
    Metric("stockrt_spool_bytes", "gauge", "Bytes on disk of the trades that wait for MongoDB."),
    Metric("stockrt_spool_refused_total", "counter", "Trades that found no room on this machine."),
    Metric("stockrt_spool_rejects", "gauge", "Documents that MongoDB refused for good."),
)  # fmt: skip
LATENCY = "stockrt_api_latency_seconds"


class Metrics:
    """Counts since the start, thread-safe. `changes` grows with every change."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = {(metric.name, value): 0.0 for metric in METRICS for value in metric.values}
        self._buckets = [0] * len(LATENCY_BUCKETS_S)
        self._latencies, self._latency_sum = 0, 0.0
        self.changes = 0

    def add(self, name: str, value: str = "", by: float = 1) -> None:
        """Count `by` more; `value` is the label's."""
        with self._lock:
            self._numbers[name, value] += by
            self.changes += bool(by)

    def put(self, name: str, number: float, value: str = "") -> None:
        """Let a gauge stand at `number`."""
        with self._lock:
            self.changes += self._numbers[name, value] != number
            self._numbers[name, value] = number

    def took(self, seconds: float) -> None:
        """Count the latency of one answer."""
        with self._lock:
            for place, limit in enumerate(LATENCY_BUCKETS_S):
                self._buckets[place] += seconds <= limit
            self._latencies += 1
            self._latency_sum += seconds
            self.changes += 1

    def text(self) -> str:
        """Return everything in node_exporter's textfile format."""
        with self._lock:
            lines = [line for metric in METRICS for line in self._lines(metric)]
            lines += [
                f"# HELP {LATENCY} Time from a request to the whole answer.",
                f"# TYPE {LATENCY} histogram",
            ]
            limits = (*map(_number_text, LATENCY_BUCKETS_S), "+Inf")
            counts = (*self._buckets, self._latencies)
            lines += [f'{LATENCY}_bucket{{le="{le}"}} {n}' for le, n in zip(limits, counts, strict=True)]
            lines += [f"{LATENCY}_sum {self._latency_sum:.6f}", f"{LATENCY}_count {self._latencies}"]
        return "\n".join(lines) + "\n"

    def _lines(self, metric: Metric) -> Iterator[str]:
        yield f"# HELP {metric.name} {metric.help}"
        yield f"# TYPE {metric.name} {metric.kind}"
        for value in metric.values:
            label = f'{{{metric.label}="{value}"}}' if metric.label else ""
            yield f"{metric.name}{label} {_number_text(self._numbers[metric.name, value])}"


def _number_text(number: float) -> str:
    return str(int(number)) if number == int(number) else repr(round(number, 3))


class MetricsFile:
    """Keeps a file up to date with the metrics; without a path it does nothing. Times are monotonic seconds."""

    def __init__(self, path: Path | None, metrics: Metrics) -> None:
        self._path = path
        self._metrics = metrics
        self._written_at = -math.inf
        self._written = -1
        self._trouble = LogThrottle(f"metrics file {path}")

    def due(self) -> float:
        """Return when the file is to be written: never while nothing changed."""
        changed = self._path is not None and self._metrics.changes != self._written
        return self._written_at + METRICS_EVERY_S if changed else math.inf

    def write(self, now: float) -> None:
        """Write the file, whole or not at all, readable by everybody. A file that cannot be is said so."""
        if self._path is None:
            return
        self._written_at = now
        changes = self._metrics.changes
        new = self._path.with_name(f".{self._path.name}.new")
        try:
            with new.open("w", encoding="utf-8") as stream:
                os.fchmod(stream.fileno(), 0o644)  # node_exporter is another user
                stream.write(self._metrics.text())
            new.replace(self._path)
        except OSError as error:
            self._trouble.again(f"cannot be written: {error.strerror}; see METRICS_FILE")
            return
        self._written = changes
        self._trouble.over()


class Service(Events):
    """Passes on what the daemon tells: to systemd, and into the metrics file."""

    def __init__(
        self,
        settings: Settings,
        notifier: Notifier,
        watchdog_s: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._notifier = notifier
        self._watchdog_s = watchdog_s
        self._clock = clock
        self._wall = wall
        self.metrics = Metrics()
        self._file = MetricsFile(settings.metrics_file, self.metrics)
        self._peer = f"{settings.server_host}:{settings.server_port}"
        self._keys = len(settings.api_keys)
        self._link = f"connecting to {self._peer}"
        self._waits = False  # whether trades wait for MongoDB
        self._last: tuple[str, float] | None = None  # what the last execution did, and when (monotonic)
        self._unanswered = self._unreceived = 0
        self._beat_at = clock()
        self._watchdog_at = clock()
        self._said = ""
        self._leaving = False
        self.metrics.put("stockrt_info", 1, __version__)
        self.metrics.put("stockrt_start_time_seconds", round(wall(), 3))

    def started(self) -> None:
        """Tell systemd that the start is over."""
        self._notifier.send(READY=1)

    def turn(self, unanswered: int, unreceived: int) -> float:
        """Say what changed; return when there will be something to say again."""
        now = self._clock()
        if unanswered and not self._unanswered:
            self._beat_at = now  # the executor was idle until now
        self._unanswered, self._unreceived = unanswered, unreceived
        self.metrics.put("stockrt_waiting_executions", unanswered)
        self.metrics.put("stockrt_waiting_results", unreceived)
        if now >= self._file.due():
            self._file.write(now)
        return min(self._file.due(), self._say_status(now), self._pat_watchdog(now))

    def beat(self, waiting_documents: int = 0) -> None:
        """Note that the executor makes progress."""
        self._beat_at = self._clock()
        self.metrics.put("stockrt_waiting_documents", waiting_documents)

    def connected(self) -> None:
        """Note the connection."""
        self._link = f"connected to {self._peer}"
        self.metrics.put("stockrt_platform_connected", 1)
        self.metrics.add("stockrt_platform_connections_total")

    def disconnected(self, reason: str) -> None:
        """Note that there is none."""
        self._link = f"not connected to {self._peer}: {one_line(reason, 120)}"
        self.metrics.put("stockrt_platform_connected", 0)

    def asked(self, answer: Response, verdict: Verdict, seconds: float) -> None:
        """Count a request."""
        self.metrics.add(
            "stockrt_api_requests_total", "no_answer" if answer.fault else verdict.action.name.lower()
        )
        if not answer.fault:
            self.metrics.took(seconds)

    def spooled(self, facts: QueueStats) -> None:
        """Note what waits for MongoDB."""
        self._waits = facts.trades > 0
        self.metrics.put("stockrt_spool_trades", facts.trades)
        self.metrics.put("stockrt_spool_bytes", facts.bytes)
        self.metrics.put("stockrt_spool_rejects", facts.rejects)
        self.metrics.put("stockrt_spool_refused_total", facts.refused)

    def executed(self, report: Report | None) -> None:
        """Count an execution and what it did."""
        self.metrics.add("stockrt_executions_total", outcome_of(report))
        if report is None:
            return
        reached = report.stored + report.known
        self._last = (f"{reached}/{report.total} in {report.took_s:.1f} s", self._clock())
        self.metrics.add("stockrt_trades_stored_total", by=report.stored)
        self.metrics.add("stockrt_trades_duplicate_total", by=report.known)
        for kind, count in Counter(failure_kind(*failure) for failure in report.failures.items()).items():
            self.metrics.add("stockrt_codes_failed_total", kind.value, count)
        if report.complete:
            self.metrics.put("stockrt_last_success_timestamp_seconds", round(self._wall(), 3))

    def stopping(self, seconds: float) -> None:
        """Tell systemd that the daemon leaves, and ask for the time that this may take."""
        self._leaving = True
        self._notifier.send(STOPPING=1, EXTEND_TIMEOUT_USEC=int(seconds * 1e6), STATUS="stopping")

    def stopped(self) -> None:
        """Leave the last numbers in the file."""
        self.metrics.put("stockrt_platform_connected", 0)
        self._file.write(self._clock())

    def _say_status(self, now: float) -> float:
        if not self._notifier.listens:
            return math.inf
        status, until = self.status(now)
        if status != self._said and self._notifier.send(STATUS=status):
            self._said = status
        return until

    def status(self, now: float) -> tuple[str, float]:
        """Return the status line and until when it is true, if nothing happens."""
        until = math.inf
        parts = ["stopping"] if self._leaving else []
        parts += [self._link, f"{self._keys} key{'' if self._keys == 1 else 's'}"]
        if self._last is None:
            parts.append("no execute yet")
        else:
            did, at = self._last
            age, changes = age_words(max(0.0, now - at))
            parts.append(f"last execute {did}, {age}")
            until = at + changes
        parts.append(f"{self._unanswered} waiting")
        if self._waits:
            parts.append("trades wait for MongoDB")
        if self._unreceived:
            parts.append(f"{self._unreceived} to deliver")
        return " · ".join(parts), until

    def _pat_watchdog(self, now: float) -> float:
        """Send WATCHDOG=1 twice in the time that systemd gives, while the executor works."""
        if self._watchdog_s == math.inf:
            return math.inf
        if now >= self._watchdog_at:
            stands_still = self._unanswered and now - self._beat_at > self._watchdog_s
            if stands_still or not self._notifier.send(WATCHDOG=1):
                return now + self._watchdog_s / 8  # looked at again soon
            self._watchdog_at = now + self._watchdog_s / 2
        return self._watchdog_at


def outcome_of(report: Report | None) -> str:
    """Return how an execution ended, as the metrics count it."""
    if report is None:
        return "refused"
    if report.interrupted:
        return "interrupted"
    if report.complete and report.total:
        return "success"
    reached = report.stored + report.known
    return "partial" if reached and not report.store_error and not report.kept else "failure"


# ------------------------------------------------------------------------------------------------------
# The unpacked program
# ------------------------------------------------------------------------------------------------------


def clean_cache(environ: Mapping[str, str], own: Path) -> None:
    """Remove what older versions of the program left in the unit's cache directory; `own` is this version's.

    Only in the CacheDirectory= of a unit, only what is named as our own unpackings are, and none that a
    process uses. What cannot be removed stays.
    """
    cache = environ.get("CACHE_DIRECTORY", "").partition(":")[0]
    name, _, build = own.name.rpartition("_")
    if not (cache and name and _BUILD_ID.fullmatch(build) and own.parent == Path(cache).resolve()):
        return
    with contextlib.suppress(OSError):
        _lock(own, shared=True)  # held for as long as this process lives
        for other in own.parent.iterdir():
            ours = re.fullmatch(rf"{re.escape(name)}_([0-9a-f]+)(\.tmp)?", other.name)
            if not ours or ours[1] == build or other.is_symlink() or not _is_unused(other):
                continue
            import shutil  # 0.5 MB that a start without old versions does not need

            shutil.rmtree(other, ignore_errors=True)
            (other.parent / f".{name}_{ours[1]}_lock").unlink(missing_ok=True)


_BUILD_ID = re.compile(r"[0-9a-f]{16,}")


def _lock(folder: Path, shared: bool) -> int:
    """Lock a directory and return the descriptor that holds the lock. Raises OSError when it is taken."""
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _is_unused(folder: Path) -> bool:
    try:
        os.close(_lock(folder, shared=False))
    except OSError:
        return False
    return True


# ======================================================================================================
# Command line
# ======================================================================================================

EXIT_OK, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 130
# Up to here the rows wait until they can be aligned and stand in the order asked; beyond, memory is dearer.
ROWS_ALIGNED = 1000
# What `td` says, in words.
SIDES = {0: "-", 1: "buy", 2: "sell"}
HELP_EXAMPLES = """\
examples:
  stockrt.pyz --once --demo --codes TSLA.US AAPL.US USDCNY   synthetic trades: no key, no network
  stockrt.pyz --once --codes TSLA.US 700.HK 600519 BTCUSDT   real ones: INFOWAY_API_KEY must be set
  stockrt.pyz --once --codes-file codes.txt --json           one JSON document a line on stdout
  stockrt.pyz --check                                        what is wrong, and which setting mends it

exit status: 0 every code stored · 1 any not · 64 usage · 78 settings · 130 interrupted
"""


class _Parser(argparse.ArgumentParser):
    """argparse, but a fault is raised as UsageError and the whole exit is ours."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """argparse's own, as wide as the terminal; it would import shutil at every start to look (0.5 MB, 3 ms)."""

    def __init__(self, prog: str) -> None:
        width = 80
        with contextlib.suppress(OSError, ValueError, AttributeError):  # no terminal
            width = os.get_terminal_size(sys.stdout.fileno()).columns or width
        super().__init__(prog, width=width - 2)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = _Parser(
        prog="stockrt",
        description="Collects the latest trades of stocks, currency pairs and crypto into MongoDB.",
        epilog=HELP_EXAMPLES,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    _add_commands(parser)
    _add_options(parser)
    return parser


def _add_commands(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--once", action="store_true", help="fetch the given codes once, store them, print them"
    )
    what.add_argument("--check", action="store_true", help="check settings, keys, store and platform")
    what.add_argument(
        "--check-settings", action="store_true", help="check the settings alone: no network, nothing written"
    )
    what.add_argument("--status", action="store_true", help="show daemon, platform, store and API keys")
    what.add_argument("--drain", action="store_true", help="move now what waits on this machine for MongoDB")
    what.add_argument("--rejects", action="store_true", help="list what MongoDB refused for good, and why")
    what.add_argument("--register", action="store_true", help="register at the dispatch platform (once)")
    what.add_argument("--version", action="version", version=f"stockrt {__version__}")


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--codes", nargs="+", metavar="CODE", default=[], help="codes, separated by blanks or commas"
    )
    parser.add_argument("--codes-file", metavar="FILE", help="codes from a file, '-' for standard input")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document a line in place of the table"
    )
    parser.add_argument(
        "--demo", action="store_true", help="synthetic trades: no network, no key, embedded store"
    )
    parser.add_argument("--retry", action="store_true", help="with --drain: what MongoDB refused before, too")
    parser.add_argument(
        "--force", action="store_true", help="with --register: anew, although a hash is stored"
    )
    parser.add_argument(
        "--env-file",
        metavar="FILE",
        type=Path,
        help="settings; default: " + ", ".join(map(str, ENV_FILE_PLACES)),
    )


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options. Raises UsageError for what does not go together."""
    options = make_parser().parse_args(argv)
    if options.json and not (options.once or options.status or options.rejects):
        raise UsageError("--json goes with --once, --status or --rejects; see --help")
    for flag in ("codes", "codes_file", "demo"):
        if getattr(options, flag) and not options.once:
            raise UsageError(f"--{flag.replace('_', '-')} goes with --once; see --help")
    if options.retry and not options.drain:
        raise UsageError("--retry goes with --drain; see --help")
    if options.force and not options.register:
        raise UsageError("--force goes with --register; see --help")
    if options.once and not (options.codes or options.codes_file):
        raise UsageError("--once needs --codes CODE … or --codes-file FILE; see --help")
    return options


def read_codes(options: argparse.Namespace) -> Iterator[str]:
    """Yield the codes of the command line, then those of the file, one by one. Raises UsageError."""
    for text in options.codes:
        yield from split_codes(text)
    if not options.codes_file:
        return
    try:
        with (
            sys.stdin
            if options.codes_file == "-"
            else open(options.codes_file, encoding="utf-8-sig") as stream
        ):
            for line in stream:
                yield from split_codes(
                    line.partition("#")[0].lstrip("\ufeff")
                )  # stdin's mark is not decoded away
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"--codes-file {options.codes_file}: cannot be read: {why}") from None


class _Redacting(logging.Formatter):
    """Formats a record, tracebacks included, and takes every secret out."""

    def __init__(self, redact: Callable[[str], str], journal: bool = False) -> None:
        super().__init__("%(message)s" if journal else "%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")
        self._redact = redact
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        text = self._redact(super().format(record))
        return for_journal(text, record.levelno) if self._journal else text


def start_logging(settings: Settings) -> None:
    """Send this program's messages to stderr, secrets masked; libraries only from warnings on."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Redacting(settings.redact, journal=isinstance(sys.stderr, JournalStream)))
    logging.getLogger().handlers = [handler]
    logging.getLogger().setLevel(logging.WARNING)
    log.setLevel(settings.log_level.upper())


# ------------------------------------------------------------------------------------------------------
# Rows
# ------------------------------------------------------------------------------------------------------


class Column(NamedTuple):
    """A column of the table; `width` counts when rows are printed before all are known."""

    title: str
    width: int
    right: bool = False


COLUMNS = (
    Column("CODE", 12),
    Column("PRICE", 14, right=True),
    Column("VOLUME", 14, right=True),
    Column("TURNOVER", 18, right=True),
    Column("SIDE", 4),
    Column("EXCHANGE TIME", 24),
    Column("AGE", 6, right=True),
)


class Rows:
    """Prints stored trades on `out`: an aligned table in the order asked, or JSON lines.

    Beyond ROWS_ALIGNED trades the rows are printed as they come. A reader that went away (`| head`) ends
    the printing, never the storing.
    """

    def __init__(
        self, out: IO[str], as_json: bool = False, color: bool = False, now: Callable[[], float] = time.time
    ) -> None:
        self._out = out
        self._as_json = as_json
        self._color = color
        self._now = now
        self._kept: list[Document] | None = []
        self._gone = False
        self.fault = ""  # why rows are missing on `out`, unless its reader just went away

    def add(self, documents: Sequence[Document]) -> None:
        """Take documents that were stored."""
        if self._as_json:
            self._print("".join(to_json(document) + "\n" for document in documents))
        elif self._kept is None:
            self._table(documents)
        else:
            self._kept += documents
            if len(self._kept) > ROWS_ALIGNED:
                kept, self._kept = self._kept, None
                self._header([column.width for column in COLUMNS])
                self._table(kept)

    def finish(self, order: Sequence[str] = ()) -> None:
        """Print what was kept, in the order of the codes in `order`."""
        if self._kept:
            place = {code: -number for number, code in enumerate(reversed(order))}  # the first of duplicates
            kept = sorted(self._kept, key=lambda d: place.get(d["stock_code"], 1))
            cells = [row_cells(document, self._now()) for document in kept]
            widths = [
                max(len(column.title), *(len(row[i]) for row in cells)) for i, column in enumerate(COLUMNS)
            ]
            self._header(widths)
            self._print("".join(_aligned(row, widths) for row in cells))
        self._kept = []
        self._print("", flush=True)

    def _header(self, widths: Sequence[int]) -> None:
        line = _aligned([column.title for column in COLUMNS], widths)
        self._print(f"\033[1m{line[:-1]}\033[0m\n" if self._color else line)

    def _table(self, documents: Sequence[Document]) -> None:
        widths = [column.width for column in COLUMNS]
        self._print("".join(_aligned(row_cells(document, self._now()), widths) for document in documents))

    def _print(self, text: str, flush: bool = False) -> None:
        if self._gone:
            return
        try:
            self._out.write(text)
            if flush:
                self._out.flush()
        except OSError as error:
            self._gone = True
            if not isinstance(error, BrokenPipeError):
                self.fault = f"the rows cannot be printed: {error.strerror}"
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._out.fileno())  # else the exit's flush fails again


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    parts = [
        c.rjust(w) if column.right else c.ljust(w)
        for c, w, column in zip(cells, widths, COLUMNS, strict=True)
    ]
    return "  ".join(parts).rstrip() + "\n"


def row_cells(document: Document, now: float) -> list[str]:
    """Return the cells of a document's row; `now` is epoch seconds."""
    side = SIDES.get(document["td"], str(document["td"]))
    when = exchange_time(document["stock_code"], document["t"])
    age = show_age(now - document["t"] / 1000)
    return [document["stock_code"], document["p"], document["v"], document["vw"], side, when, age]


def exchange_time(code: str, t: int) -> str:
    """Return a trade's time on the exchange's clock; on UTC where the machine has no time-zone data."""
    market = market_of(code)
    zone = (zone_info(market.zone) if market else None) or UTC
    return datetime.fromtimestamp(t / 1000, zone).strftime("%Y-%m-%d %H:%M:%S %Z")


def to_json(document: Document) -> str:
    """Return a document as one line of JSON, its date as ISO 8601 UTC."""
    return json.dumps(document | {"create_time": _iso(document["create_time"])}, ensure_ascii=False)


# ------------------------------------------------------------------------------------------------------
# Commands
# ------------------------------------------------------------------------------------------------------


class _Job(threading.Thread):
    """A run on a thread of its own, so that the main thread stays free for signals."""

    def __init__(self, work: Callable[[], Report]) -> None:
        super().__init__(name="stockrt-job", daemon=True)
        self._work = work
        self.report: Report | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.report = self._work()
        except BaseException as error:  # handed to the main thread, which raises it again
            self.error = error


def say(text: str, level: int = logging.INFO) -> None:
    """Write a message to stderr, for the person at the terminal or for the journal."""
    text = for_journal(text, level) if isinstance(sys.stderr, JournalStream) else text
    with contextlib.suppress(OSError):  # nobody reads it: nothing else can be done
        print(text, file=sys.stderr, flush=True)


def run_once(options: argparse.Namespace, settings: Settings) -> int:
    """Fetch the given codes once and return the exit status."""
    if options.demo and settings.mongodb_uri:
        raise UsageError(
            "--demo stores synthetic trades on this machine only: unset MONGODB_HOST, or leave --demo out"
        )
    workshop = Pipeline(settings, options.demo)
    rows = Rows(sys.stdout, options.json, color=settings.color and sys.stdout.isatty())
    stop = _stop_on_signals()
    order: list[str] = []
    with _progress_bar() as on_progress:
        collector = workshop.collector(rows.add, on_progress)
        job = _Job(lambda: collector.run(_remembered(read_codes(options), order), stop))
        _wait_for(job, stop)
    if job.error is not None:
        raise job.error
    rows.finish(order)
    if job.report is not None:
        workshop.keys.close()
    status = _close_run(job.report or collector.report, finished=job.report is not None, settings=settings)
    if rows.fault:
        say(f"stockrt: {rows.fault}")
    return status or (EXIT_FAILED if rows.fault else EXIT_OK)


def _remembered(codes: Iterable[str], order: list[str]) -> Iterator[str]:
    """Pass codes on, and keep the first ROWS_ALIGNED of them as they will be shown."""
    for code in codes:
        if len(order) < ROWS_ALIGNED:
            with contextlib.suppress(InstrumentError):  # the plan names it
                order.append(parse_code(code).code)
        yield code


def _stop_on_signals() -> threading.Event:
    """Return the event that SIGINT and SIGTERM set; a second signal ends the process at once."""
    stop = threading.Event()

    def on_signal(number: int, frame: object) -> None:
        if stop.is_set():
            os._exit(EXIT_INTERRUPTED)
        stop.set()

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    return stop


def _wait_for(job: _Job, stop: threading.Event) -> None:
    job.start()
    while job.is_alive() and not stop.is_set():
        job.join(STOP_POLL_S)
    if stop.is_set():
        job.join(INTERRUPT_GRACE_S)


def _close_run(report: Report, finished: bool, settings: Settings) -> int:
    color = settings.color and sys.stderr.isatty()
    if finished:
        say(report.summary())
    elif not report.total:
        say("interrupted while the codes were read")
    else:
        say(f"{report.summary()}; the store did not answer: what was being written may be missing")
    for code, reason in report.failures.items():
        line = settings.redact(f"  {code}: {reason}")
        say(f"\033[31m{line}\033[0m" if color else line)
    if report.interrupted or not finished:
        return EXIT_INTERRUPTED
    return EXIT_OK if report.complete else EXIT_FAILED


@contextlib.contextmanager
def _progress_bar() -> Iterator[Callable[[int, int], None]]:
    """Give a callable (done, total) that draws a bar on a terminal's stderr once a run is a long one."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from tqdm import tqdm

    bar: Any = None

    def show(done: int, total: int) -> None:
        nonlocal bar
        if bar is None and total > MAX_BATCH:
            bar = tqdm(total=total, unit=" codes", file=sys.stderr, leave=False)
        if bar is not None:
            bar.update(done - bar.n)

    try:
        yield show
    finally:
        if bar is not None:
            bar.close()


def run_check(settings: Settings, source: Path | None) -> int:
    """Check everything that a run needs, print a line each, and return the exit status."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("settings", lambda: f"from {source or 'the environment and defaults'}")
    ]
    if not settings.api_keys:
        checks.append(("API key", partial(_check_key, settings, "")))
    for key, plan in settings.key_plans():
        checks.append((f"API key {ApiKey(key, plan).shown}", partial(_check_key, settings, key)))
    checks.append(("state directory", lambda: _check_state_directory(settings.state_directory)))
    checks.append(("MongoDB" if settings.mongodb_uri else "local store", lambda: _check_store(settings)))
    if settings.platform_url():
        checks.append(("platform", lambda: _check_platform(settings)))
    failed = False
    for name, check in checks:
        try:
            good, line = True, check()
        except StockrtError as error:
            good, line = False, str(error)
        failed |= not good
        print(settings.redact(f"{'ok  ' if good else 'FAIL'}  {name}: {line}"), flush=True)
    return EXIT_FAILED if failed else EXIT_OK


def _check_key(settings: Settings, key: str) -> str:
    if not key:
        raise StockrtError(NO_KEY_HINT)
    path = _trade_path(Batch("stock", "AAPL.US"))
    verdict = decide(get_once(settings.api_base_url, path, API_LIMITS, {"apiKey": key}), datetime.now(UTC))
    if verdict.action in (Action.ACCEPT, Action.CODES_UNKNOWN):
        return f"accepted by {settings.api_base_url}"
    name = (
        "INFOWAY_API_KEY"
        if verdict.action in (Action.KEY_DEAD, Action.KEY_LACKS_PRODUCT)
        else "INFOWAY_API_BASE_URL"
    )
    name = "INFOWAY_PLAN" if verdict.action in (Action.SLOW_DOWN, Action.KEY_DAY_OVER) else name
    raise StockrtError(f"{verdict.reason}; see {name}")


def _check_state_directory(directory: Path) -> str:
    make_state_directory(directory)
    return f"{directory} can be written"


def _check_store(settings: Settings) -> str:
    store = open_store(settings)
    try:
        return store.check()
    finally:
        store.close()


def _check_platform(settings: Settings) -> str:
    url = settings.platform_url()
    answer = get_once(url, "/module/online", PLATFORM_LIMITS)
    if answer.fault:
        raise StockrtError(
            f"{url} cannot be reached: {answer.fault}; see SERVER_IP, SERVER_PORT and SERVER_TLS"
        )
    if (_envelope(answer.body) or {}).get("code") != "2000":
        raise StockrtError(f"{url}/module/online answers HTTP {answer.status} and is no dispatch platform; "
                           "see SERVER_IP and SERVER_PORT")  # fmt: skip
    return f"{url} answers"


def gather_status(settings: Settings) -> dict[str, Any]:
    """Return what --status shows, from the daemon's own words where one runs or ran. Raises StoreError."""
    directory = settings.state_directory
    running = daemon_runs(directory)
    told = _read_status(directory)
    platform = {"url": settings.platform_url() or None, "state": "no daemon"}
    if running:
        platform["state"] = told.get("platform", "not connected")
    module_hash = read_hash(directory)
    journal = Journal(directory)
    try:
        waiting = journal.count_waiting()
    finally:
        journal.close()
    return {
        "version": __version__,
        "daemon": {"running": running, **({n: told.get(n) for n in ("pid", "version")} if running else {})},
        "registration": shorten(module_hash) if module_hash else None,
        "platform": platform | {name: told.get(name) for name in ("connected_since", "last_contact")},
        "store": settings.mongodb_shown() or str(directory / SQLITE_NAME),
        "spool": _gather_spool(settings, told if running else {}),
        "waiting": waiting,
        "last_execution": told.get("last_execution"),
        "keys": _gather_keys(settings, told.get("keys", []) if running else []),
    }


def _gather_spool(settings: Settings, told: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what waits for MongoDB, None where none is set: then nothing waits."""
    if not settings.mongodb_uri:
        return None
    spool = Spool(settings.state_directory, settings.spool_max_bytes)
    try:
        facts, unsettled = spool.facts(counted=True), spool.count_unsettled()
    finally:
        spool.close()
    return facts._asdict() | {"unsettled": unsettled, "refused": told.get("spool_refused", 0)}


def _read_status(directory: Path) -> dict[str, Any]:
    """Return what a daemon wrote last, nothing where none ever ran."""
    try:
        told = json.loads((directory / STATUS_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _gather_keys(settings: Settings, told: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return of each key its plan, what is used and left today, and the state that a running daemon told."""
    store = open_store(settings)
    facts = LocalFacts(settings.state_directory)
    try:
        ledger = make_ledger(settings, store, facts)
        states = {state["digest"]: state for state in told}
        return [
            _gather_key(ApiKey(secret, plan), ledger, states.get(key_digest(secret), {}))
            for secret, plan in settings.key_plans()
        ]
    finally:
        facts.close()
        store.close()


def _gather_key(key: ApiKey, ledger: Ledger, told: Mapping[str, Any]) -> dict[str, Any]:
    now = time.time()
    used = ledger.used_today(key.digest, now)
    state = {"state": "ready", "why": "", "until": "", "not_for": []}
    state |= {name: told[name] for name in state if name in told}
    if state["state"] == "resting" and cast(str, state["until"]) <= _later(now, 0):  # it was when it was told
        state |= {"state": "ready", "why": "", "until": ""}
    left = max(0, key.plan.per_day - used) if key.plan.per_day else None
    if left == 0 and state["state"] == "ready":
        until = _later(next_midnight(now), 0)
        state |= {"state": "resting", "why": _day_used_up(key.plan), "until": until}
    return {"key": key.shown, "plan": key.plan.name, "used_today": used, "left_today": left, **state}


def run_status(settings: Settings, as_json: bool) -> int:
    """Print the status for a person, or as one JSON object."""
    status = gather_status(settings)
    if as_json:
        print(settings.redact(json.dumps(status, ensure_ascii=False)))
        return EXIT_OK
    waiting, last = status["waiting"], status["last_execution"]
    lines = [
        ("version", status["version"]),
        ("daemon", _daemon_line(status["daemon"])),
        ("registration", status["registration"] or "none: run --register"),
        ("platform", _platform_line(status["platform"])),
        ("store", status["store"]),
        *([("spool", _spool_line(status["spool"]))] if status["spool"] else []),
        ("waiting", f"{waiting['commands']} commands, {waiting['results']} results to deliver"),
        ("last execution", f"{last['status']} at {last['at']}: {last['message']}" if last else "none yet"),
        *(("API key", _key_line(key)) for key in status["keys"]),
    ]
    print(settings.redact("\n".join(f"{name:<15} {text}" for name, text in lines)))
    return EXIT_OK


def _daemon_line(daemon: Mapping[str, Any]) -> str:
    if not daemon["running"]:
        return "not running"
    return f"running, pid {daemon['pid']}, version {daemon['version']}"


def _spool_line(spool: Mapping[str, Any]) -> str:
    line = f"{spool['trades']} trades wait for MongoDB"
    if spool["trades"]:
        line += f", {spool['bytes'] / 2**20:.1f} MB, the oldest since {spool['oldest']}"
    line += f", {spool['refused']} found no room" if spool["refused"] else ""
    line += f", the closes of {spool['unsettled']} are still to be made" if spool["unsettled"] else ""
    return line + (f", {spool['rejects']} refused by it: see --rejects" if spool["rejects"] else "")


def _platform_line(platform: Mapping[str, Any]) -> str:
    line = f"{platform['url'] or 'none set'}: {platform['state']}"
    if platform["state"] == "connected":
        return f"{line} since {platform['connected_since']}"
    return line + (f", last contact {platform['last_contact']}" if platform["last_contact"] else "")


def _key_line(key: Mapping[str, Any]) -> str:
    left = "no daily limit" if key["left_today"] is None else f"{key['left_today']} left"
    line = f"{key['key']}  {key['plan']}  {key['used_today']} used today, {left}  {key['state']}"
    line += f" until {key['until']}" if key["until"] else ""
    line += f" ({key['why']})" if key["why"] else ""
    return line + (f"; not for {', '.join(key['not_for'])}" if key["not_for"] else "")


def need_mongodb(settings: Settings, why: str) -> None:
    """Raise SettingsError unless the settings name a MongoDB."""
    if not settings.mongodb_uri:
        raise SettingsError(
            [f"MONGODB_HOST not set: {why}; the trades are in {settings.state_directory / SQLITE_NAME}"]
        )


def run_drain(settings: Settings, retry: bool) -> int:
    """Move to MongoDB everything that waits for it, and say what was done. Raises StoreAway.

    `retry`: what MongoDB refused before, too.
    """
    need_mongodb(settings, "there is nowhere to move what this machine holds")
    mongo = MongoStore(settings)
    spool = Spool(settings.state_directory, settings.spool_max_bytes)
    drain = Drain(spool, mongo, _closer_of(settings, mongo).settle)
    if retry:
        spool.retry(mongo.realtime_name)
    stop = _stop_on_signals()
    try:
        with _drain_bar(spool.facts(counted=True).trades) as on_moved:
            while not stop.is_set() and (moved := _drain_step(drain, mongo, stop)):
                on_moved(moved)
        while not stop.is_set() and drain.step_closes():
            pass
    finally:
        left = spool.facts(counted=True).trades
        rejected = f", {drain.rejected} refused by it: see --rejects" if drain.rejected else ""
        say(f"{drain.moved} moved to {settings.mongodb_shown()}{rejected}; {left} left on this machine")
    return EXIT_INTERRUPTED if left and stop.is_set() else EXIT_OK


def _drain_step(drain: Drain, mongo: MongoStore, stop: threading.Event) -> int:
    """Move a batch and return its size. Raises StoreAway when MongoDB takes nothing."""
    while True:
        try:
            return drain.step()
        except StoreAway:  # after a moment it may be a document's fault, which `drain` finds out
            if stop.wait(DRAIN_FIRST_S) or not mongo.takes_another():
                raise


def _closer_of(settings: Settings, mongo: MongoStore) -> ClosingPrices:
    """Return a closer; without an API key for the trading calendar, half days are in doubt."""
    if not settings.api_keys:
        return ClosingPrices(mongo, None)
    facts = LocalFacts(settings.state_directory)
    api = InfowayApi(settings.api_base_url, KeyPool(settings.key_plans(), facts))
    return ClosingPrices(mongo, Calendar(facts, api.half_days))


@contextlib.contextmanager
def _drain_bar(total: int) -> Iterator[Callable[[int], object]]:
    """Give a callable that draws a bar on a terminal's stderr of how many were moved."""
    if not sys.stderr.isatty():
        yield lambda moved: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit=" trades", file=sys.stderr, leave=False) as bar:
        yield bar.update


def run_rejects(settings: Settings, as_json: bool) -> int:
    """Print what MongoDB refused for good, oldest first."""
    spool = Spool(settings.state_directory, settings.spool_max_bytes)
    try:
        rejects = spool.rejects()
    finally:
        spool.close()
    for reject in rejects:
        line = "{rejected_at}  {collection}  {_id}: {reason}".format_map(reject)
        print(settings.redact(json.dumps(reject, ensure_ascii=False) if as_json else line))
    if not rejects and not as_json:
        print("MongoDB has refused nothing")
    return EXIT_OK


def need_platform(settings: Settings) -> None:
    """Raise SettingsError unless the settings say where the platform is."""
    needed = {"SERVER_IP": settings.server_host, "SERVER_PORT": settings.server_port}
    missing = " and ".join(name for name, value in needed.items() if not value)
    if missing:
        raise SettingsError(
            [
                f"{missing} not set: the daemon needs SERVER_IP and SERVER_PORT of the dispatch platform; "
                "without a platform use --once --codes …"
            ]
        )


def run_register(settings: Settings, force: bool) -> int:
    """Register at the platform unless a hash is stored, and say what was done."""
    need_platform(settings)
    place = settings.state_directory / HASH_NAME
    stored = "" if force else read_hash(settings.state_directory)
    if stored:
        print(f"registered already: hash {shorten(stored)} in {place}; --register --force registers anew")
        return EXIT_OK
    module_hash = register(settings)
    write_hash(settings.state_directory, module_hash)
    print(
        f"registered {settings.module_name} at {settings.platform_url()}: hash {shorten(module_hash)} in {place}"
    )
    return EXIT_OK


def need_daemon_settings(settings: Settings) -> None:
    """Raise SettingsError unless everything is set that the daemon cannot do without."""
    need_platform(settings)
    if not settings.api_keys:
        raise SettingsError([NO_KEY_HINT])


def run_check_settings(loaded: LoadedSettings) -> int:
    """Say that the settings, which were read by now, are enough for the daemon. Raises SettingsError."""
    need_daemon_settings(loaded.settings)
    print(f"ok    settings: from {loaded.source or 'the environment and defaults'}")
    return EXIT_OK


def run_daemon(settings: Settings, environ: Mapping[str, str]) -> int:
    """Run as the platform's module until a signal or the platform ends it; return the exit status."""
    need_daemon_settings(settings)
    service = Service(
        settings, Notifier(environ.get("NOTIFY_SOCKET", "")), watchdog_seconds(environ, os.getpid())
    )
    daemon = Daemon(settings, observer=service)
    clean_cache(environ, Path(__file__).resolve().parent.parent)
    stopping = False

    def on_signal(number: int, frame: object) -> None:
        nonlocal stopping
        if stopping:
            os._exit(EXIT_INTERRUPTED)
        stopping = True
        daemon.request_stop()

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    log.info("stockrt %s for %s at %s", __version__, settings.module_name, settings.platform_url())
    daemon.run()
    service.stopped()
    log.info("stopped")
    return EXIT_OK


def run_command(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run one command line and return its exit status. Raises StockrtError: what the operator must mend."""
    options = parse_arguments(argv)
    loaded = load_settings(environ, options.env_file)
    start_logging(loaded.settings)
    for warning in loaded.warnings:
        log.warning(warning)
    if options.once:
        return run_once(options, loaded.settings)
    if options.register:
        return run_register(loaded.settings, options.force)
    if options.status:
        return run_status(loaded.settings, options.json)
    if options.drain:
        return run_drain(loaded.settings, options.retry)
    if options.rejects:
        return run_rejects(loaded.settings, options.json)
    if options.check:
        return run_check(loaded.settings, loaded.source)
    if options.check_settings:
        return run_check_settings(loaded)
    return run_daemon(loaded.settings, environ)


def _open_missing_streams() -> None:
    """Put /dev/null in place of standard streams that were closed, or the next file opened would get their number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  (for as long as the process lives)


def look_for_cycles_seldom() -> None:
    """Let Python look for cyclic garbage less often: trades are many, small, and without cycles (4 % of a trade)."""
    gc.set_threshold(20_000, 20, 20)


def main() -> NoReturn:
    """Run the command line of this process and leave it with the exit status."""
    look_for_cycles_seldom()
    _open_missing_streams()
    if journal_reads(2, os.environ):
        sys.stderr = JournalStream(sys.stderr)
    try:
        status = run_command(sys.argv[1:], os.environ)
        sys.stdout.flush()
    except StockrtError as error:
        say("\n".join(f"stockrt: {line}" for line in str(error).splitlines()), logging.ERROR)
        status = error.exit_code
    except SystemExit as leaving:  # --help, --version
        status = int(leaving.code or 0)
    except OSError as error:  # of printing: everything else says its own words
        status = EXIT_FAILED
        if not isinstance(error, BrokenPipeError):
            say(f"stockrt: cannot print: {error.strerror or error}", logging.ERROR)
    with contextlib.suppress(OSError):  # a reader that went away
        sys.stdout.flush()
    # Not sys.exit: threads that hang on the network must not hold the process up, and pymongo's monitor
    # threads cost half a second at the interpreter's end. Everything that counts is flushed by now.
    os._exit(status)


if __name__ == "__main__":
    main()
