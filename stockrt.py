#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "plotext>=5.3,<6",
#     "pymongo>=4.10",
#     "python-dotenv>=1.0",
#     "tqdm>=4.66",
#     "urllib3>=2.6",
#     "websocket-client>=1.8",
# ]
# ///
"""stockrt: collects the latest trades of stocks, currency pairs and crypto.

The trades come in batches from the Infoway REST API and go into MongoDB, or into a local SQLite file where no
MongoDB is configured. Data goes one way through the rooms, leaves first; a room calls only rooms above it:

    Words              what a person reads, made of a kind and its values; the reader's language; secrets masked
    Errors             everything that is raised, and its exit status
    Tools              time, whole files, back-off, a throttle for what repeats in the log
    Settings           one table; environment, file, credentials, proxies
    Instruments        what a person typed -> (code, product); sessions of the markets; batches
    Events             what runs and the daemon tell of themselves: reports, failures, the class of listeners
    HTTP               one connection, straight or through a proxy; limits; JSON
    WebSocket          an open one, straight or through a proxy; its frames
    Local files        a SQLite file of ours, crash-only; its rescue
    Quota              API keys, their windows, the count of a day here or with all instances
    Infoway            answers decided in one table, records read, the client that asks several at a time
    Stream             the WebSocket of every trade: limits, errors, the protocol (pure), the connection
    Stores             the contract and its promises; SQLite, MongoDB
    Closing prices     which trade is the close of a session
    Delivery           what waits on this machine for MongoDB, and the one loop that delivers it
    Reading            what the views read from both stores: last trades, candles, closes, gaps, names
    Run                codes in, report out: everything above put together in one place
    Collection         what is collected without anybody asking, and when
    Platform protocol  text in, events out: pure
    Platform link      registration, presence, the WebSocket's address
    Command journal    accepted commands and their answers on disk
    Daemon             inbox, outbox, and the three threads
    Service manager    notifications, the journal's priorities, metrics
    Migration          what the older client of the platform left: settings, hash, documents
    Views              what is stored, as tables, charts and pages; the dashboard
    Command line       options, rows, commands, `main`
    Catalogue          every sentence of all rooms, in English and in Chinese

The daemon's threads: the socket's (main) owns link, protocol and outbox, and waits for nothing but its inbox and the
socket; the clerk owns the writing of journal and status file; the executor owns the pipeline, whose workers
ask the API and whose delivery thread moves what waits, and the collecting, whose threads bring what is pushed.
Without a platform there is no link: the main thread waits for its inbox alone.

A command's way: `Link.frames` gives its text, `PlatformProtocol.receive` makes a Command of it, `Daemon._accept`
hands that to the clerk, `Clerk._accept` puts it into the journal and hands its number to the executor.
`Executor._execute` has `Pipeline.run` collect: `plan_batches` -> `InfowayApi.fetch` -> `decide` -> `read_records` ->
`to_document` -> `Store.write` -> `ClosingPrices.settle` -> Report. `report_result` makes the answer,
`Executor._keep_answer` puts it into the journal, the inbox takes it to `Outbox.add`, `Daemon._send_answers`
sends it, and the platform's receipt ends it in `Outbox.note_received` and `Journal.received`.
"""

from __future__ import annotations

import os
import signal
import sys

# Ctrl-C while the rest is imported, and where a command has nothing to end first, ends quietly.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
if sys.version_info < (3, 11):  # noqa: UP036  (before anything that an older Python could not import)
    raise SystemExit(
        f"stockrt needs Python 3.11 or newer; this is {sys.version.split()[0]} ({sys.executable})"
    )

import base64
import codecs
import contextlib
import errno
import gc
import io
import json
import logging
import math
import queue
import random
import re
import threading
import time
from bisect import bisect_left, insort
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from datetime import UTC, date, datetime, timedelta, tzinfo
from enum import Enum, IntEnum
from functools import cache, lru_cache, partial
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from types import MappingProxyType
from typing import (
    IO,
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    NoReturn,
    Protocol,
    Self,
    TextIO,
    TypeAlias,
    TypedDict,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)
from urllib.parse import parse_qsl, quote, quote_plus, unquote, unquote_plus, urlencode, urlsplit

if TYPE_CHECKING:  # what a path does not need is imported where it is needed: it costs start time and memory
    import argparse
    import socket
    import sqlite3
    from http.client import HTTPResponse

    from dotenv.parser import Binding
    from pymongo import MongoClient
    from pymongo.collection import Collection as MongoCollection
    from urllib3.connection import HTTPConnection

__version__ = "1.0.0"

log = logging.getLogger("stockrt")

# Patterns stand here as texts, which `re` compiles when they are first used and keeps: all of them at every start would
# take six milliseconds. Compiled are those that every trade or code needs.


# ======================================================================================================
# Words: what a person reads, in two languages; one printable line, secrets masked
# ======================================================================================================

ENGLISH, CHINESE = LANGUAGES = ("en", "zh")
# Every sentence: kind -> its template in each of LANGUAGES. Filled by the last room, where both stand side by side.
TEMPLATES: dict[str, tuple[str, str]] = {}
# Kinds that are no sentences: parts of the same kind one after the other, and a sentence cut to one line.
JOIN, LINE = "join.", "line"
# Punctuation of Chinese, which has its room about it within the character.
WIDE_SIGNS = "，。；：？！、（）“”《》"
# Beginnings of kinds that tell no reason by themselves.
NO_REASONS = (JOIN, LINE, "n.", "age.", "wait.", "waits.", "tools.because", "tools.see", "cli.error")

# ------------------------------------------------------------------------------------------------------
# Secrets
# ------------------------------------------------------------------------------------------------------

# A shorter secret would mask pieces of ordinary words; no real key or password is that short.
SHORTEST_SECRET = 4
# What html.escape does, without that module's table of two thousand names.
HTML_ESCAPES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#x27;"})


@lru_cache(maxsize=8)
def forms_of(secrets: tuple[str, ...]) -> tuple[str, ...]:
    """Return secrets in every form in which a peer may send them back, the longest first."""
    forms: set[str] = set()
    for secret in secrets:
        quoted = {quote(secret), quote(secret, safe=""), quote_plus(secret)}
        forms |= quoted | {re.sub("%..", lambda found: found[0].lower(), text) for text in quoted}
        forms |= {json.dumps(secret, ensure_ascii=ascii_alone)[1:-1] for ascii_alone in (True, False)}
        forms |= {secret, repr(secret)[1:-1], secret.translate(HTML_ESCAPES)}
    return tuple(sorted((form for form in forms if len(form) >= SHORTEST_SECRET), key=len, reverse=True))


def mask(text: str, secrets: tuple[str, ...]) -> str:
    """Return `text` with every secret replaced, however it is encoded."""
    for form in forms_of(secrets):
        text = text.replace(form, "***")
    return text


class Hidden:
    """The secrets of the settings that were loaded last: what shortens a text masks them first, or a piece may stay."""

    def __init__(self) -> None:
        self.secrets: tuple[str, ...] = ()


HIDDEN = Hidden()


# ------------------------------------------------------------------------------------------------------
# Phrases
# ------------------------------------------------------------------------------------------------------


class Phrase(str):
    """Words for a person: the English ones as a text, and their kind and values, from which other languages follow.

    The log, and what compares or stores words, take it as the English text that it is; what is shown goes through
    `in_language` first. Made by `phrase`, `listing`, `count_words` and `one_line`.
    """

    __slots__ = ("kind", "values")
    kind: str
    values: Mapping[str, Any]

    def __new__(cls, kind: str, values: Mapping[str, Any]) -> Self:
        """Make words of a kind; what stands for it in a template is in `values`."""
        self = super().__new__(cls, _written(kind, values, ENGLISH))
        self.kind = kind
        self.values = values
        return self


def phrase(kind: str, /, **values: Any) -> Phrase:
    """Return the words of a kind of message with its values, of which some may be words themselves."""
    if not values:
        return _phrase_without_values(kind)
    return Phrase(kind, values)


@cache
def _phrase_without_values(kind: str) -> Phrase:
    """Return the same object each time: a hundred thousand codes may have failed for one reason."""
    return Phrase(kind, {})


def listing(how: str, parts: Iterable[str]) -> Phrase:
    """Return words one after the other, separated as `how` says: a kind that begins with JOIN."""
    return Phrase(how, {"parts": tuple(parts)})


def count_words(count: int, word: str) -> Phrase:
    """Return a number with its word: `1 key`, `2 keys`."""
    return Phrase(f"n.{word}" if count == 1 else f"n.{word}s", {"n": count})


def error_words(error: BaseException) -> str:
    """Return the words that an error was raised with, in all languages where they are ours."""
    if error.args and isinstance(error.args[0], Phrase):
        return error.args[0]
    return str(error)


def in_language(words: str, language: str) -> str:
    """Return words in one of LANGUAGES; whatever is not ours, such as a server's, is left as it is."""
    if not isinstance(words, Phrase):
        return words
    if language == ENGLISH:
        return str(words)
    return _written(words.kind, words.values, language)


def kinds_in(words: object) -> Iterator[str]:
    """Yield the kinds of the reasons that words of ours are made of, the outermost first."""
    if not isinstance(words, Phrase):
        return
    if not words.kind.startswith(NO_REASONS):
        yield words.kind
    for value in words.values.get("parts", words.values.values()):
        yield from kinds_in(value)


def all_in_language(value: Any, language: str) -> Any:
    """Return a value for JSON with every text in it in one of LANGUAGES."""
    if isinstance(value, str):
        return in_language(value, language)
    if isinstance(value, Mapping):
        return {key: all_in_language(inner, language) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [all_in_language(inner, language) for inner in value]
    return value


def _written(kind: str, values: Mapping[str, Any], language: str) -> str:
    if kind == LINE:
        return _as_line(in_language(values["words"], language), values["limit"])
    template = TEMPLATES[kind][LANGUAGES.index(language)]
    if kind.startswith(JOIN):
        return template.join(in_language(part, language) for part in values["parts"])
    shown = {
        name: in_language(value, language) if isinstance(value, str) else value
        for name, value in values.items()
    }
    if language == CHINESE:
        template = _without_blanks(template, shown)
    return template.format(**shown)


def _without_blanks(template: str, values: Mapping[str, Any]) -> str:
    """Return a template without its single blanks beside Chinese punctuation that values begin or end with."""
    for name, value in values.items():
        if isinstance(value, str) and value:
            if value[-1] in WIDE_SIGNS:
                template = re.sub(rf"(\{{{name}\}}) (?! )", r"\1", template)
            if value[0] in WIDE_SIGNS:
                template = re.sub(rf"(?<! ) (\{{{name}\}})", r"\1", template)
    return template


def one_line(text: object, limit: int = 300) -> str:
    """Return `text` as one printable line of at most `limit` characters: secrets masked, control characters escaped."""
    if isinstance(text, Phrase):
        return text if _as_line(str(text), limit) == text else Phrase(LINE, {"words": text, "limit": limit})
    try:
        return _as_line(str(text), limit)
    except ValueError:  # an int of more digits than Python writes
        return phrase("huge", type=type(text).__name__)


def _as_line(text: str, limit: int) -> str:
    text = mask(text, HIDDEN.secrets).strip()
    if not text.isprintable():
        escaped = {c: c.encode("unicode_escape").decode() for c in text if not c.isprintable()}
        text = "".join(escaped.get(c, c) for c in text)
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    return text


# Where words are kept for another process, which may speak another language: their kind and values beside the text.
PACKED = "kind"


def packed(value: Any) -> Any:
    """Return a value for JSON with whatever words are in it as what `unpacked` makes words of again, secrets masked.

    Here and not in the JSON: a password may be a number or a word of it.
    """
    if isinstance(value, Phrase):
        return {PACKED: value.kind, "values": packed(value.values), "text": mask(value, HIDDEN.secrets)}
    if isinstance(value, Mapping):
        return {key: packed(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [packed(inner) for inner in value]
    if value is None or isinstance(value, (int, float)):
        return value
    return mask(str(value), HIDDEN.secrets)


def unpacked(value: Any) -> Any:
    """Return what `packed` was given; words of a kind that this version does not know are their English text."""
    if isinstance(value, list):
        return [unpacked(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    if value.keys() != {PACKED, "values", "text"}:
        return {key: unpacked(inner) for key, inner in value.items()}
    with contextlib.suppress(LookupError, TypeError, ValueError, AttributeError):
        return Phrase(value[PACKED], unpacked(value["values"]))
    return str(value["text"])


# ------------------------------------------------------------------------------------------------------
# The reader's language
# ------------------------------------------------------------------------------------------------------


def locale_name(environ: Mapping[str, str]) -> str:
    """Return the reader's locale, as POSIX has it: the first of three variables that is not empty."""
    return next(filter(None, map(environ.get, ("LC_ALL", "LC_MESSAGES", "LANG"))), "")


def language_of(environ: Mapping[str, str]) -> str:
    """Return the language of whoever runs this: STOCKRT_LANG, else the locale of its messages."""
    named = environ.get("STOCKRT_LANG", "").strip().lower()
    if named in LANGUAGES:
        return named
    return CHINESE if locale_name(environ).lower().startswith("zh") else ENGLISH


def can_show(stream: TextIO, term: str) -> bool:
    """Whether Chinese can be read on a stream: its encoding has it, and it is not the console, whose font has not."""
    try:
        # 设 is not in Big5, which has the others
        "行情设置，".encode(stream.encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        return False
    return term != "linux" or not stream.isatty()


class Spoken:
    """The language in which this process speaks to whoever reads it."""

    def __init__(self) -> None:
        self.language = ENGLISH

    def choose(self, environ: Mapping[str, str]) -> None:
        """Take the language that an environment, or what stands for one, asks for, where the terminal can show it."""
        term = environ.get("TERM", "")
        shown = all(can_show(stream, term) for stream in (sys.stdout, sys.stderr))
        self.language = language_of(environ) if shown else ENGLISH


SPOKEN = Spoken()


def for_reader(words: str) -> str:
    """Return words in the language of whoever reads what this process prints."""
    return in_language(words, SPOKEN.language)


# ======================================================================================================
# Errors
# ======================================================================================================


class StockrtError(Exception):
    """Root of everything that stockrt raises by itself.

    StockrtError            exit 1
    ├── UsageError          exit 64: the command line; says which flag
    ├── SettingsError       exit 78: the settings; holds every fault found
    ├── InstrumentError     a code that cannot be asked for; says what to type instead
    │   └── UnclearCode     one whose form does not tell what is meant; a list of what exists may
    ├── NoKeyError          no API key can serve now; says which key is out, why and until when
    ├── Interrupted         the run was asked to stop
    ├── StoreError          the store did not take what it was given; says which setting mends it
    │   ├── StoreAway       MongoDB does not take writes now; what is not written is queued and follows
    │   ├── ClosesLate      all trades are delivered, the closes that follow from them cannot be made now
    │   ├── QueueFull       no more may wait on this machine for MongoDB
    │   └── LostCommand     a command of the journal that nobody can read any more
    ├── RegistrationError   the platform did not register the module; says what to do
    ├── PrintError          what was asked for cannot be printed
    ├── DialError           no WebSocket could be opened
    └── LinkLost            an open WebSocket is gone

    Each message says what came, what was expected and which setting or flag changes it.
    """

    exit_code = 1

    @property
    def message(self) -> str:
        """What it was raised with, in all languages."""
        return error_words(self)


class UsageError(StockrtError):
    """The command line cannot be understood; exit status 64 (EX_USAGE of sysexits.h)."""

    exit_code = 64


class SettingsError(StockrtError):
    """The settings have faults; exit status 78 (EX_CONFIG of sysexits.h).

    `faults` holds one sentence for each, secrets masked; `language` is the one that the settings ask for, and
    `directory` the state's, as far as they say so.
    """

    exit_code = 78

    def __init__(self, faults: Sequence[str], language: str = "", directory: Path | None = None) -> None:
        super().__init__(listing("join.lines", faults))
        self.faults = tuple(faults)
        self.language = language
        self.directory = directory


class InstrumentError(StockrtError):
    """A code that is refused before any request is made."""


class UnclearCode(InstrumentError):
    """The form of a code does not tell what is meant; a list of what exists may.

    `text`: as it was typed, in upper case and half width; letters and digits of any script, or code characters.
    `guesses`: codes by its form, the likeliest first, of which none is known to exist.
    """

    def __init__(self, words: str, text: str, guesses: Sequence[str] = ()) -> None:
        super().__init__(words)
        self.text = text
        self.guesses = tuple(guesses)


class NoKeyError(StockrtError):
    """No API key can serve this product now."""


class Interrupted(StockrtError):
    """The run was asked to stop while it waited."""


class StoreError(StockrtError):
    """The store is away or refuses to work; nothing of the write counts as stored."""


class StoreAway(StoreError):
    """MongoDB does not take writes now, for no fault of a document: `unreachable`, or with words of its own.

    `refused` (`_id` -> why): it refused each document of a batch, as it may have done with any.
    """

    def __init__(
        self,
        message: str,
        unreachable: bool = True,
        words: str = "",
        refused: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.unreachable = unreachable
        self.words = words
        self.refused = refused or {}


class ClosesLate(StoreError):
    """All trades are delivered; the closes that follow from them cannot be made now, and are kept to be made."""


class QueueFull(StoreError):
    """The limit of what may wait on this machine is reached; what waits is kept."""


class LostCommand(StoreError):
    """A command of the journal that nobody can read any more."""


class RegistrationError(StockrtError):
    """The platform did not register the module; says what to do."""


class PrintError(StockrtError):
    """Standard output takes nothing; without words where its reader went away."""


class DialError(StockrtError):
    """No connection could be made; `status`, `body`: of the HTTP answer that refused the handshake, 0 without one."""

    def __init__(self, message: str, status: int = 0, body: bytes = b"") -> None:
        super().__init__(message)
        self.status = status
        self.body = body


class LinkLost(StockrtError):
    """The connection is gone; `code` is the one that the server closed it with, 0 without one."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


# ======================================================================================================
# Tools: times, whole files, the state directory, back-off, a throttle for what repeats
# ======================================================================================================


class Clock:
    """The time: of the wall, and of what only counts how long something takes. Tests hand in one of their own."""

    def wall(self) -> float:
        """Return epoch seconds."""
        return time.time()

    def monotonic(self) -> float:
        """Return seconds that no setting of the clock changes."""
        return time.monotonic()

    def boot(self) -> str:
        """Return a name of the time since this machine started, in which `monotonic` counts; '' where it has none."""
        with contextlib.suppress(OSError):
            return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return ""


SYSTEM_CLOCK = Clock()


# Levels of nesting in foreign JSON. Python reads a thousand or ten thousand of them, and writes fewer: what is read
# must be one that can be kept and sent.
MAX_DEPTH = 64


def is_deep(value: object, containers: float = math.inf) -> bool:
    """Return whether a value from JSON is nested deeper than MAX_DEPTH.

    `containers`: no more lists and objects are in it, as its text has no more opening brackets.
    """
    level: list[Any] = [[value]]
    for _ in range(MAX_DEPTH + 1):
        if not level or containers <= 0:
            return False
        level = [inner for one in level for inner in _items(one) if isinstance(inner, (list, dict))]
        containers -= len(level)
    return bool(level)


def _items(one: Any) -> Iterable[Any]:
    return one.values() if isinstance(one, dict) else one


def sha256(data: bytes) -> str:
    """Return the digest of some bytes in hexadecimal digits."""
    import hashlib

    return hashlib.sha256(data).hexdigest()


def iso(moment: datetime) -> str:
    """Return a time in UTC as ISO 8601 with milliseconds."""
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


def utc_now() -> datetime:
    """Return the time now, aware UTC, cut to whole milliseconds."""
    now = datetime.now(UTC)
    return now.replace(microsecond=now.microsecond // 1000 * 1000)


# Before this, in epoch seconds, no clock is right: 2025-01-01. A machine without a battery starts in 1970.
EARLIEST_S = 1_735_689_600


def need_clock(now: float) -> None:
    """Raise StoreError where the clock of this machine was not set since it started: its times would be stored."""
    if now < EARLIEST_S:
        raise StoreError(phrase("tools.clock", now=iso_after(now, 0)))


def utc_day(now: float) -> str:
    """Return the UTC date of epoch seconds, ISO 8601."""
    return datetime.fromtimestamp(now, UTC).date().isoformat()


def next_midnight(now: float) -> float:
    """Return the epoch seconds of the next midnight UTC: days of the API's quota are taken as UTC's."""
    return (now // 86400 + 1) * 86400


def iso_after(now: float, seconds: float) -> str:
    """Return the time some seconds after `now` (epoch seconds), to the second."""
    return iso(datetime.fromtimestamp(round(now + seconds), UTC))


def local_time(moment: datetime) -> str:
    """Return a time as people read it: this machine's, with its offset, to the second."""
    return moment.astimezone().isoformat(" ", "seconds")


def local_times(text: str) -> str:
    """Return a text for people with its times, which programs get in UTC, on this machine's clock."""

    def local(found: re.Match[str]) -> str:
        with contextlib.suppress(ValueError, OverflowError, OSError):  # somebody else's, and no time
            return local_time(datetime.fromisoformat(found[0]))
        return found[0]

    return re.sub(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?Z", local, text)


def parts_of(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Yield some values, so many at once."""
    for at in range(0, len(values), size):
        yield values[at : at + size]


def age_words(seconds: float) -> tuple[Phrase, float]:
    """Return an age in its largest whole unit (`12 s`, `5 min`, `3 h`, `2 d`), and the age at which that changes."""
    seconds = max(0.0, seconds)
    for unit, size, limit in (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 48 * 3600)):
        if seconds < limit:
            whole = int(seconds // size)
            return phrase(f"age.{unit}", n=whole), float((whole + 1) * size)
    days = int(seconds // 86400)
    return phrase("age.d", n=days), (days + 1) * 86400.0


def waiting_words(count: int, word: str = "trade") -> Phrase:
    """Return how many of something wait: `1 trade waits`, `2 trades wait`."""
    return Phrase(f"waits.{word}" if count == 1 else f"wait.{word}s", {"n": count})


# Names that a line of the log holds of many.
NAMES_SHOWN = 5


def first_few(names: Collection[str]) -> Phrase:
    """Return the first of some names, with a sign where there are more."""
    shown = listing("join.names", islice(names, NAMES_SHOWN))
    return phrase("tools.and_so_on", names=shown) if len(names) > NAMES_SHOWN else shown


def alternatives(names: Sequence[str]) -> str:
    """Return names of which one is meant: `a, b or c`."""
    if len(names) < 2:
        return next(iter(names), "")
    return phrase("tools.or", first=listing("join.names", names[:-1]), last=names[-1])


def see(words: str, cause: str) -> str:
    """Return words with the setting, or whatever else, to look at behind them, unless they name one by themselves."""
    return words if re.search(r"\bsee [A-Z]", words) else phrase("tools.see", words=words, cause=cause)


@contextlib.contextmanager
def disk_trouble(what: str, setting: str = "STATE_DIRECTORY") -> Iterator[None]:
    """Raise StoreError in place of an OSError: `what` says which file cannot be what; `setting` names its place."""
    try:
        yield
    except OSError as error:
        # the place is not at fault where this process may open nothing more
        why = lack_words(error) or phrase("tools.see", words=os_words(error), cause=setting)
        raise StoreError(phrase("tools.because", what=what, why=why)) from error


def write_whole(
    path: Path, text: str, *, durable: bool = False, mode: int = 0o600, setting: str = "STATE_DIRECTORY"
) -> None:
    """Write a file of ours: the old one or the new one, never a part. Raises StoreError.

    `durable`: it is on disk when this returns; else it may be the old one after a power cut. `setting` is the
    one that a failure names.
    """
    with whole_file(path, durable=durable, mode=mode, setting=setting) as stream:
        stream.write(text.encode())


@contextlib.contextmanager
def whole_file(
    path: Path, *, durable: bool = False, mode: int | None = None, setting: str = "STATE_DIRECTORY"
) -> Iterator[IO[bytes]]:
    """Give a stream whose bytes are the file once the block has ended, and nothing where it ends in an error.

    Without a `mode` the file has the one that the user's umask leaves. Raises StoreError, as `write_whole`.
    """
    # A name that nobody can guess: no other user puts a link there before us.
    new = path.with_name(f".{path.name}.{os.urandom(8).hex()}.new")
    with disk_trouble(phrase("tools.not_written", path=path), setting):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        try:  # from before it is made on: Ctrl-C comes between any two lines
            descriptor = os.open(new, flags, 0o666 if mode is None else mode)
            with open(descriptor, "wb") as stream:
                if mode is not None:
                    os.fchmod(descriptor, mode)
                yield stream
                stream.flush()
                if durable:
                    os.fsync(descriptor)
            keep_owner(new, path.parent)
            new.replace(path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
        if durable:
            sync_directory(path.parent)


def need_plain_file(path: Path, setting: str) -> None:
    """Raise StoreError where a name is there and is no file's: a new file would take the place of /dev/null itself."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise StoreError(phrase("tools.no_plain_file", path=path, setting=setting))


# No file that a person writes is larger, and an endless one would be read until there is no memory left.
MOST_FILE_MIB = 16
# Where the pipes and streams of a command are: what its caller hands over there is meant.
HANDED_OVER_AT = ("/dev/fd/", "/dev/std", "/proc/self/fd/")


def is_odd_file(path: str | Path) -> bool:
    """Whether a name is a pipe's, which would be waited for, or a device's but /dev/null, which may have no end."""
    is_usual = os.path.isfile(path) or os.path.isdir(path) or not os.path.exists(path)
    return not (is_usual or os.path.realpath(path) == os.devnull or str(path).startswith(HANDED_OVER_AT))


def open_plain(path: str | Path, flags: int = os.O_RDONLY) -> int:
    """Open what is no odd file, as the `opener` of open() too. Raises OSError."""
    if is_odd_file(path):
        raise OSError(errno.EINVAL, phrase("tools.odd_file"))
    return os.open(path, flags, 0o644)


def read_file(path: str | Path | int) -> str:
    """Return the text of a file without the mark that may begin it. Raises OSError, UnicodeDecodeError."""
    with open(path, encoding="utf-8-sig", opener=open_plain) as stream:
        text = stream.read((MOST_FILE_MIB << 20) + 1)
    if len(text) > MOST_FILE_MIB << 20:
        raise OSError(errno.EFBIG, phrase("tools.large_file", most=MOST_FILE_MIB))
    return text


def sync_directory(directory: Path) -> None:
    """Have on disk which files a directory has. Raises OSError."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_state_directory(directory: Path) -> None:
    """Make the state directory, for this user alone. Raises StoreError when it cannot be used."""
    with disk_trouble(phrase("tools.no_state_directory", path=directory)):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not os.access(directory, os.W_OK | os.X_OK):
        raise StoreError(phrase("tools.foreign_state_directory", path=directory))


def keep_owner(path: Path, directory: Path) -> None:
    """Give a new file to the owner of its directory: root's --register must not lock the service out."""
    owner = directory.stat()
    if os.geteuid() == 0 and owner.st_uid != 0:
        os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def make_for_owner(path: Path) -> None:
    """Where root works in another user's directory: make an empty file there that is that user's from the beginning.

    What SQLite makes beside a file is its owner's, and root may be killed at any moment. A file of root's that is
    there is given to that user. Raises OSError.
    """
    if os.geteuid() != 0 or path.parent.stat().st_uid == 0:
        return
    if not path.exists():
        new = path.with_name(f".{path.name}.{os.urandom(8).hex()}.new")
        os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))
        try:
            keep_owner(new, path.parent)
            with contextlib.suppress(FileExistsError):  # somebody else was quicker
                os.link(new, path)
        finally:
            new.unlink()
    keep_owner(path, path.parent)


# Who only looks whether a lock is held holds it for the blink of an eye.
LOCK_TRIES, LOCK_RETRY_S = 5, 0.05


def lock_in(directory: Path, name: str, who: str) -> IO[str]:
    """Return an open lock file of a state directory. Raises StoreError if another one holds it, who is named."""
    import fcntl

    make_state_directory(directory)
    path = directory / name
    with disk_trouble(phrase("tools.no_lock", path=path)):
        make_for_owner(path)
        lock = open(path, "w", opener=open_plain)  # noqa: SIM115  (the caller's)
        for _ in range(LOCK_TRIES):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return lock
            except BlockingIOError:
                time.sleep(LOCK_RETRY_S)
            except OSError:
                lock.close()
                raise
    lock.close()
    raise StoreError(phrase("tools.locked", who=who, path=directory))


def backoff(first_s: float, cap_s: float, rng: random.Random, growth: float = 2.0) -> Iterator[float]:
    """Yield delays in seconds for ever: exponential, capped, with full jitter from the first one on."""
    ceiling = first_s
    while True:
        yield rng.uniform(0, ceiling)
        ceiling = min(cap_s, ceiling * growth)


def lost_part(error: ImportError) -> StockrtError:
    """Return what to end with where a part of this program is gone, and have the next start unpack it anew.

    Cleaners of caches take files away from under a process that runs for months.
    """
    site, then = Path(__file__).resolve().parent, phrase("tools.install_anew")
    if site.name == "site-packages" and re.fullmatch(r".+_[0-9a-f]{16,}", site.parent.name):
        then = phrase("tools.unpacked_anew")
        with contextlib.suppress(OSError):  # gone altogether, or another process was first
            site.rename(site.with_name(f"lost-{os.urandom(4).hex()}"))
    return StockrtError(phrase("tools.lost_part", site=site, error=one_line(error), then=then))


def start_thread(thread: threading.Thread) -> None:
    """Start a thread. Raises StockrtError where the system gives none."""
    try:
        thread.start()
    except RuntimeError as error:
        raise no_thread(error) from None


def no_thread(error: RuntimeError) -> StockrtError:
    """Return what an operator must know where the system gives no thread."""
    return StockrtError(phrase("tools.no_thread", error=one_line(error)))


def lack_words(error: BaseException) -> str:
    """Return what this machine is short of where that is what an error says, else ''."""
    number = getattr(error, "errno", None)
    if number in (errno.EMFILE, errno.ENFILE):
        return phrase("tools.no_descriptor", why=os_words(OSError(number, os.strerror(number))))
    if number == errno.ENOMEM or isinstance(error, MemoryError):
        return phrase("tools.no_memory")
    return ""


def host_and_port(host: str, port: int) -> str:
    """Return both as a URL has them: an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def os_words(error: OSError) -> str:
    """Return what the system says of an error; words of ours where the Catalogue has them."""
    kind, said = f"os.{errno.errorcode.get(error.errno or 0)}", error.strerror or str(error)
    return phrase(kind) if said == TEMPLATES.get(kind, ("",))[0] else said


def unread_words(error: OSError | UnicodeDecodeError) -> str:
    """Return why a text file cannot be read."""
    return phrase("tools.not_utf8") if isinstance(error, UnicodeDecodeError) else os_words(error)


def own_fault(error: BaseException, is_said: bool = False) -> str:
    """Return what an error is called that is none of ours.

    It is logged whole, unless that `is_said` already, or the machine lacks something.
    """
    words = lack_words(error)
    if not words:
        if not is_said:
            log.error("a fault of stockrt itself", exc_info=error)
        words = phrase("tools.own_fault", error=type(error).__name__)
    return words


def shorten(secret: str) -> str:
    """Return a hash as a person may see it."""
    return f"{secret[:4]}…{secret[-3:]}" if len(secret) > 10 else "***"


# How often a thread that waits for a key looks whether the run was stopped.
STOP_POLL_S = 0.2
# Ctrl-C: what was fetched has this long to be stored; a store that hangs is left behind.
INTERRUPT_GRACE_S = 0.9
# A trouble that goes on is said again this often.
TROUBLE_AGAIN_S = 300.0
# One that nothing is lost by, and that may stay for months, no more often than this.
SMALL_TROUBLE_AGAIN_S = 6 * 3600.0
# Reasons of one trouble that are told apart; a peer that says something new each time fills no log.
TROUBLE_KINDS = 16


@contextlib.contextmanager
def turn(lock: threading.Lock, stop: threading.Event) -> Iterator[None]:
    """Hold a lock in the body. Raises Interrupted where `stop` is set before it is free."""
    while not lock.acquire(timeout=STOP_POLL_S):
        if stop.is_set():
            raise Interrupted(phrase("tools.stopped"))
    try:
        yield
    finally:
        lock.release()


class LogThrottle:
    """Says a repeating trouble when it begins or changes, every few minutes with a count, and when it ends.

    Any thread may call it.
    """

    def __init__(
        self,
        what: str,
        clock: Clock = SYSTEM_CLOCK,
        then: str = "trying again",
        again_s: float = TROUBLE_AGAIN_S,
    ) -> None:
        self._what = what
        self._then = then
        self._again_s = again_s
        self._clock = clock
        self._said: dict[str, float] = {}  # kind of reason -> when it was said
        self._count = 0

    def again(self, reason: str) -> None:
        """The trouble is there (still)."""
        now = self._clock.monotonic()
        self._count += 1
        kind = re.sub(r"\d+", "#", reason)  # seconds and bytes that differ make no new reason
        if kind not in self._said and len(self._said) >= TROUBLE_KINDS:
            kind = ""
        said_at = self._said.get(kind)
        if said_at is None:
            log.warning("%s: %s; %s", self._what, reason, self._then)
        elif now - said_at >= self._again_s:
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
            tries = "1 try" if self._count == 1 else f"{self._count} tries"
            log.info("%s: well again after %s", self._what, tries)
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
OUR_PREFIXES = ("MONGODB_", "INFOWAY_", "SERVER_", "COLLECT_", "STOCKRT_LANG", "MESSAGE_LANG")
# And so is one that begins with the same letter as one of ours and is so like it (difflib's ratio).
NEAR_NAME = 0.9
# What whoever types a command may have otherwise than the service: it changes how something is said, not what is done.
READERS_OWN = ("LOG_LEVEL", "STOCKRT_LANG")
# What COLLECT_CODES says for the codes of the collection MONGODB_WATCH_COLLECTION_NAME.
WATCH = "watch"
# Of these one may be set: how the daemon collects by itself.
COLLECTING = ("COLLECT", "COLLECT_EVERY")
MOST_SHARES = 100
# Where a proxy listens whose setting names no port: curl's.
PROXY_PORTS = {"http": 1080, "https": 443}


class Plan(NamedTuple):
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


# Requests per second, minute and day of each plan: Infoway's price list; of Free's two figures the stricter one.
PLANS = {
    "free": Plan("free", 1, 60, 86_400),
    "basic": Plan("basic", 2, 120, 172_800),
    "premium": Plan("premium", 10, 600, 864_000),
    "pro": Plan("pro", 20, 1200, 1_728_000),
}
# A key whose plan the API is asked for; until it has told, the smallest one's limits hold.
AUTO = "auto"
PLAN_TO_ASK = PLANS["free"]._replace(name=AUTO)


class Proxy(NamedTuple):
    """An HTTP proxy, and the setting that names it; `user` and `password` are as the setting has them."""

    setting: str
    scheme: str
    host: str
    port: int
    user: str = ""
    password: str = ""

    def __repr__(self) -> str:
        return f"Proxy({self.setting}, {self.shown})"

    @property
    def shown(self) -> str:
        """The proxy as a person may see it."""
        masked = "***@" if self.authorization else ""
        return f"{self.scheme}://{masked}{host_and_port(self.host, self.port)}"

    @property
    def authorization(self) -> str:
        """What its header Proxy-Authorization has to say, '' where it wants to know nobody."""
        if not (self.user or self.password):
            return ""
        pair = f"{unquote(self.user)}:{unquote(self.password)}"
        return "Basic " + base64.b64encode(pair.encode()).decode()

    def secrets(self) -> set[str]:
        """Return what must not be shown."""
        return {self.password, unquote(self.password), self.authorization.removeprefix("Basic ")}


class Proxies(NamedTuple):
    """Which way a URL is asked for, as curl decides it: the scheme's own proxy, else the one for all, else straight."""

    https: Proxy | None = None
    http: Proxy | None = None
    every: Proxy | None = None
    exempt: tuple[str, ...] = ()

    def for_url(self, url: str) -> Proxy | None:
        """Return the proxy for an http:// or https:// URL, None where it is asked straight."""
        parts = urlsplit(url)
        proxy = (self.https if parts.scheme == "https" else self.http) or self.every
        if proxy is None:
            return None
        host = (parts.hostname or "").rstrip(".")
        port = parts.port or (443 if parts.scheme == "https" else 80)
        return None if any(_is_exempt(entry, host, port) for entry in self.exempt) else proxy

    def in_use(self) -> tuple[Proxy, ...]:
        """Return those that some URL goes through."""
        some = {self.https or self.every: None, self.http or self.every: None}
        return tuple(proxy for proxy in some if proxy is not None)


NO_PROXIES = Proxies()


def _is_exempt(entry: str, host: str, port: int) -> bool:
    """Whether an entry of NO_PROXY means a host: `*`, a name and all below it, an address or a block of them.

    A port in the entry narrows it.
    """
    import ipaddress

    parts = cast("re.Match[str]", re.fullmatch(r"(\[[^\]]*\]|[^:]*)(?::(\d+))?|(.*)", entry))
    name = (parts[3] or parts[1]).strip("[]").strip(".")
    if parts[2] and int(parts[2]) != port:
        return False
    if name == "*":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return bool(name) and f".{host}".endswith(f".{name}")
    try:
        return address in ipaddress.ip_network(name, strict=False)
    except ValueError:  # a name: no address is below it
        return False


class Settings(NamedTuple):
    """Everything that can be set, checked. Made by `load_settings`; nothing else reads the environment.

    The defaults here are what an attribute is whose setting has neither a value nor a default of its own.
    """

    api_base_url: str
    stream_url: str
    plans: tuple[Plan, ...]
    mongodb_db_name: str
    realtime_name: str
    close_name: str
    license_name: str
    watch_name: str
    gap_name: str
    numeric_type: str
    collect_share: tuple[int, int]
    server_tls: bool
    heartbeat_s: float
    module_name: str
    module_description: str
    state_directory: Path
    spool_max_bytes: int
    log_level: str
    message_language: str
    api_keys: tuple[str, ...] = ()
    mongodb_uri: str = ""
    server_host: str = ""
    server_port: int = 0
    metrics_file: Path | None = None
    https_proxy: Proxy | None = None
    http_proxy: Proxy | None = None
    all_proxy: Proxy | None = None
    no_proxy: tuple[str, ...] = ()
    color: bool = True
    old_secrets: tuple[str, ...] = ()  # of settings that these replaced
    collect: str = ""
    collect_every_s: float = 0.0  # 0: no poll
    collect_codes: str = ""
    keep_days: int = 0  # 0: for ever
    language: str = ""  # of who reads what this process prints; '': as the locale has it

    def __repr__(self) -> str:
        shown = [
            f"{name}={value!r}"
            for name, value in self._asdict().items()
            if name not in ("api_keys", "mongodb_uri", "old_secrets")
        ]
        return f"Settings({', '.join(shown)})"

    @property
    def collects(self) -> bool:
        """Whether the daemon is to collect by itself, with a platform or without."""
        return bool(self.collect or self.collect_every_s)

    @property
    def proxies(self) -> Proxies:
        """The proxies together."""
        return Proxies(self.https_proxy, self.http_proxy, self.all_proxy, self.no_proxy)

    def secrets(self) -> tuple[str, ...]:
        """Return every text that must not be shown."""
        found = {*self.api_keys, *self.old_secrets}
        if self.mongodb_shown() != self.mongodb_uri:
            found.add(self.mongodb_uri)
        match = re.search(_USERINFO, self.mongodb_uri)
        if match and ":" in match[1]:
            password = match[1].partition(":")[2]
            found |= {password, unquote(password), unquote_plus(password)}
        for proxy in filter(None, (self.https_proxy, self.http_proxy, self.all_proxy)):
            found |= proxy.secrets()
        return tuple(sorted(secret for secret in found if len(secret) >= SHORTEST_SECRET))

    def redact(self, text: str) -> str:
        """Return `text` with every secret replaced, however it is encoded."""
        return mask(text, self.secrets())

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
        return f"http{'s' if self.server_tls else ''}://{host_and_port(self.server_host, self.server_port)}"


class Needs(NamedTuple):
    """What a command needs of the settings: a key, the platform (`whole`: all of it or nothing), usable paths.

    `collect`: what the daemon collects by itself, which stands for a platform where that is not set at all.
    """

    key: bool = False
    platform: bool = False
    whole_platform: bool = False
    paths: bool = False
    collect: bool = False


NO_NEEDS = Needs()
DAEMON_NEEDS = Needs(key=True, platform=True, collect=True)


class LoadedSettings(NamedTuple):
    """The settings, and warnings to show.

    `origins`: all that they came from, in words. `hiding`: names whose values the caller's environment has and the
    installed service does not see.
    """

    settings: Settings
    warnings: tuple[str, ...]
    origins: str
    hiding: tuple[str, ...]


_USERINFO = r"(?is)^[a-z+]+://(.*)@"


def mask_uri(uri: str) -> str:
    """Return a URI with its user and password replaced: everything up to the last `@` goes."""
    shown = re.sub(_USERINFO, lambda m: uri[: uri.index("://") + 3] + "***@", uri)
    return re.sub(r"(?i)((?:password|authMechanismProperties)=)[^&;]*", r"\1***", shown)


def mask_userinfo(url: str) -> str:
    """Return a proxy's URL, or what should be one, with all up to the last `@` replaced, but the scheme."""
    return re.sub(r"(?is)^([a-z][a-z0-9+.-]*://)?.*@", r"\1***@", url)


def uri_options(uri: str) -> dict[str, str]:
    """Return the options of a MongoDB connection string, names in lower case."""
    return {name.lower(): value for name, value in _uri_pairs(uri)}


def _uri_pairs(uri: str) -> list[tuple[str, str]]:
    return parse_qsl(uri.partition("?")[2].replace(";", "&"), keep_blank_values=True)


def uri_database(uri: str) -> str:
    """Return the database that a connection string names for documents, '' without one: `admin` is for logging in."""
    name = unquote(uri.partition("?")[0].partition("://")[2].rpartition("@")[2].partition("/")[2])
    return "" if name in ("admin", "config", "local") else name


# Files that a MongoDB connection string can name, and options whose values nobody may see.
_URI_FILES = ("tlscafile", "tlscrlfile", "tlscertificatekeyfile")
_URI_SECRETS = ("authmechanismproperties", "tlscertificatekeyfilepassword")


def uri_faults(uri: str) -> list[str]:
    """Return the faults of a MongoDB connection string's options, and of the files that they name."""
    import warnings

    from pymongo import uri_parser

    faults: list[str] = []
    password = uri_options(uri).get("tlscertificatekeyfilepassword", "")
    for name, value in _uri_pairs(uri):
        shown, words = f"{name}={value}", ""
        if name.lower() in _URI_SECRETS:
            shown = name
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                if name.lower() in _URI_FILES:
                    os.close(open_plain(value))  # OpenSSL would wait for a pipe
                    _try_pem_file(name, value, password)
                elif not name.lower().startswith("srv"):
                    uri_parser.parse_uri(f"mongodb://host/?{urlencode({name: value})}", warn=False)
        except OSError as error:
            words = phrase("settings.unreadable_file", why=os_words(error))
        except Exception as error:  # whatever pymongo says it with
            said = words = one_line(error)
            if said.startswith("Unknown option"):  # its value may be meant to be secret
                shown, words = name, _unknown_option(name, said)
            elif shown == name:
                words = phrase("settings.expect.option")
        if words:
            faults.append(phrase("settings.option", option=one_line(shown, 100), words=words))
    if not faults and uri.startswith("mongodb://"):  # else the DNS would be asked
        try:
            uri_parser.parse_uri(uri, warn=False)
        except Exception as error:
            faults.append(phrase("settings.options", words=one_line(error)))
    return faults


def _try_pem_file(option: str, path: str, password: str) -> None:
    """Load a file of certificates as pymongo will. Raises OSError, of which SSLError is one."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if option.lower() == "tlscertificatekeyfile":
        context.load_cert_chain(path, password=password)  # without one OpenSSL would ask the terminal
    else:
        context.load_verify_locations(path)


def _unknown_option(name: str, said: str) -> str:
    """Return what to say of an option that pymongo says it does not know, and which ones are like it."""
    import difflib

    for near in difflib.get_close_matches(name.lower(), re.findall(r"\w+", said.partition("(")[2]), n=1):
        return phrase("settings.unknown_option_near", near=near)
    return phrase("settings.unknown_option")


# As a person writes one; Python's own would read 1_0 as ten, and nan and 1e3 too.
_PLAIN_NUMBER = r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+"


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
        _expect(re.fullmatch(_PLAIN_NUMBER, value) is not None)
        number = float(value)
        _expect(low <= number <= high)
        return number

    return parse


def _one_of(*words: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        _expect(value.lower() in words)
        return value.lower()

    return parse


def _whole_number(low: int, high: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        _expect(value.isascii() and value.isdigit() and low <= int(value) <= high)
        return int(value)

    return parse


def _switch(value: str) -> bool:
    _expect(value.lower() in ("0", "1", "false", "true", "no", "yes", "off", "on"))
    return value.lower() in ("1", "true", "yes", "on")


def _api_keys(value: str) -> tuple[str, ...]:
    keys = tuple(dict.fromkeys(key.strip() for key in value.split(",")))
    _expect(all(re.fullmatch(r"[!-~]+", key) for key in keys))  # it travels in an HTTP header
    return keys


def _url(*schemes: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        parts = urlsplit(value)
        _expect(parts.scheme in schemes and bool(_host(parts.hostname or "")) and parts.port != 0)
        _expect(
            not (parts.query or parts.fragment or "@" in parts.netloc)
            and re.fullmatch(r"[!-~]+", value) is not None
        )
        return value.rstrip("/")

    return parse


def _plans(value: str) -> tuple[Plan, ...]:
    return tuple(_plan(word.strip()) for word in value.split(","))


def _plan(word: str) -> Plan:
    if word.lower() == AUTO:
        return PLAN_TO_ASK
    if word.lower() in PLANS:
        return PLANS[word.lower()]
    rate = _number(0, 10_000)(word)
    per_minute = int(rate * 60 + 1e-9)  # 4.1 x 60 is a little less than 246
    _expect(rate == 0 or per_minute >= 1)  # 0 a minute would mean no limit
    return Plan(word, rate, per_minute, 0)


def _mongodb_uri(value: str) -> str:
    match = re.fullmatch(r"(mongodb|mongodb\+srv)://(?:([^/]*)@)?([^/?@]+)(?:/([^?]*))?(?:\?(.*))?", value)
    _expect(match is not None)
    assert match is not None  # for the type checker: _expect has raised
    _expect("@" not in (match[2] or "") and (match[2] or "").count(":") <= 1)
    _expect(not set(match[4] or "") & set("&="))  # options without the ? in front of them
    for host in match[3].split(","):
        parts = re.fullmatch(r"(\[[^\[\]]+\]|[^\[\]:\s]+)(?::(\d+))?", host)
        _expect(parts is not None and (not parts[2] or bool(_whole_number(1, 65535)(parts[2]))))
    # unacknowledged writes could not be counted as stored; MongoDB's URIs may separate options by ; too
    _expect(not re.search(r"(?i)(?:^|[&;])w=[+-]?0+(?:[&;]|$)", unquote(value.partition("?")[2])))
    return value


def _database_name(value: str) -> str:
    _expect(0 < len(value.encode()) <= 63 and not re.search(r'[/\\."$*<>:|?\s\0]', value))
    return value


def _collection_name(value: str) -> str:
    _expect(len(value.encode()) <= 120 and not set(value) & set("$\0") and not value.startswith("system."))
    _expect(all(value.split(".")))
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
    _expect(max(map(len, bare.split("."))) <= 63)  # more is no name for the DNS
    _expect(not re.fullmatch(r"[\d.]+", bare))  # 10.0.0 or 10.0.0.256: a mistyped address, not a name
    return bare


def _proxy(setting: str) -> Callable[[str], Proxy]:
    def parse(value: str) -> Proxy:
        parts = urlsplit(value if "://" in value else f"http://{value}")
        _expect(parts.scheme in PROXY_PORTS or parts.scheme.startswith("socks"))
        _expect(parts.path in ("", "/") and not parts.query and not parts.fragment and parts.port != 0)
        port = parts.port or PROXY_PORTS.get(parts.scheme, 1080)
        host = _host(parts.hostname or "")
        return Proxy(setting, parts.scheme, host, port, parts.username or "", parts.password or "")

    return parse


def _no_proxy(value: str) -> tuple[str, ...]:
    import ipaddress

    entries = tuple(filter(None, re.split(r"[\s,]+", value.lower())))
    for entry in entries:
        _expect(re.fullmatch(r"[a-z0-9_.:*/\[\]-]+", entry) is not None)
        if "/" in entry:
            ipaddress.ip_network(entry, strict=False)
    return entries


def _megabytes(value: str) -> int:
    """Return the bytes of a number of megabytes (2^20 each)."""
    return _whole_number(1, 1 << 20)(value) << 20


def _collect_codes(value: str) -> str:
    """Return what says which codes to collect: WATCH in small letters, else as it is."""
    _expect("".join(value.split()).isprintable() and any(map(str.isalnum, value)))
    return WATCH if value.lower() == WATCH else value


def _share(value: str) -> tuple[int, int]:
    """Return which share of how many: 2/3 -> (2, 3)."""
    match = re.fullmatch(r"(\d{1,3})\s*/\s*(\d{1,3})", value, re.ASCII)
    _expect(match is not None and 1 <= int(match[1]) <= int(match[2]) <= MOST_SHARES)
    assert match is not None  # for the type checker: _expect has raised
    return int(match[1]), int(match[2])


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
    expects: str  # a kind of words
    parse: Callable[[str], object]
    secret: bool = False
    old_name: str = ""
    in_small_letters: bool = False  # its name may be written so as well, and is stronger then
    at_start: bool = False  # a change needs a restart

    def names(self) -> tuple[str, ...]:
        """Return the names under which it is looked for, the strongest first."""
        small = self.name.lower() if self.in_small_letters else ""
        return tuple(name for name in (small, self.name, self.old_name) if name)

    @property
    def expected(self) -> Phrase:
        """What its values may be, a clause: `expected zh or en`."""
        return phrase(self.expects, most_shares=MOST_SHARES)


_PROXY_EXPECTED = "settings.expect.proxy"
_COLLECT_EXPECTED = "settings.expect.codes"
_COLLECTION_EXPECTED = "settings.expect.collection"

# fmt: off
SETTINGS = (
    Setting("INFOWAY_API_KEY", "api_keys", "", "settings.expect.keys", _api_keys, secret=True),
    Setting("INFOWAY_API_BASE_URL", "api_base_url", "https://data.infoway.io", "settings.expect.url",
            _url("http", "https")),
    Setting("INFOWAY_STREAM_URL", "stream_url", "wss://data.infoway.io/ws",
            "settings.expect.stream_url", _url("ws", "wss")),
    Setting("INFOWAY_PLAN", "plans", AUTO, "settings.expect.plans", _plans),
    Setting("MONGODB_HOST", "mongodb_uri", "", "settings.expect.mongodb", _mongodb_uri, secret=True),
    Setting("MONGODB_DB_NAME", "mongodb_db_name", "forecast_platform",
            "settings.expect.database", _database_name),
    Setting("MONGODB_REALTIME_COLLECTION_NAME", "realtime_name", "realtime",
            _COLLECTION_EXPECTED, _collection_name, old_name="MONGODB_COLLECTION_NAME"),
    Setting("MONGODB_CLOSE_COLLECTION_NAME", "close_name", "close",
            _COLLECTION_EXPECTED, _collection_name),
    Setting("MONGODB_LICENSE_COLLECTION_NAME", "license_name", "license_usage",
            _COLLECTION_EXPECTED, _collection_name),
    Setting("MONGODB_WATCH_COLLECTION_NAME", "watch_name", "stock_watch",
            _COLLECTION_EXPECTED, _collection_name),
    Setting("MONGODB_GAP_COLLECTION_NAME", "gap_name", "stream_gaps",
            _COLLECTION_EXPECTED, _collection_name),
    Setting("MONGODB_NUMERIC_TYPE", "numeric_type", "string", "settings.expect.numeric_type",
            _one_of("string", "decimal", "double")),
    Setting("COLLECT", "collect", "", "settings.expect.collect", _one_of("stream")),
    Setting("COLLECT_EVERY", "collect_every_s", "", "settings.expect.every", _number(1, 86_400)),
    Setting("COLLECT_CODES", "collect_codes", "", _COLLECT_EXPECTED, _collect_codes),
    Setting("COLLECT_SHARE", "collect_share", "1/1", "settings.expect.share", _share),
    Setting("KEEP_DAYS", "keep_days", "", "settings.expect.days",
            _whole_number(1, 36_500)),
    Setting("SERVER_IP", "server_host", "", "settings.expect.host", _host, at_start=True),
    Setting("SERVER_PORT", "server_port", "", "settings.expect.port", _whole_number(1, 65535),
            at_start=True),
    Setting("SERVER_TLS", "server_tls", "0", "settings.expect.tls", _switch, at_start=True),
    Setting("HEARTBEAT_INTERVAL", "heartbeat_s", "10", "settings.expect.heartbeat", _number(1, 3600)),
    Setting("MODULE_NAME", "module_name", "股票实时数据获取模块", "settings.expect.name",
            _text(1, 100), at_start=True),
    Setting("MODULE_DESCRIPTION", "module_description", "获取股票、外汇、加密货币的最新成交并写入 MongoDB",
            "settings.expect.description", _text(0, 500), at_start=True),
    Setting("STATE_DIRECTORY", "state_directory", "", "settings.expect.directory", _directory, at_start=True),
    Setting("SPOOL_MAX_MB", "spool_max_bytes", "1024", "settings.expect.megabytes", _megabytes),
    Setting("HTTPS_PROXY", "https_proxy", "", _PROXY_EXPECTED, _proxy("HTTPS_PROXY"), secret=True,
            in_small_letters=True),
    Setting("HTTP_PROXY", "http_proxy", "", _PROXY_EXPECTED, _proxy("HTTP_PROXY"), secret=True,
            in_small_letters=True),
    Setting("ALL_PROXY", "all_proxy", "", _PROXY_EXPECTED, _proxy("ALL_PROXY"), secret=True,
            in_small_letters=True),
    Setting("NO_PROXY", "no_proxy", "", "settings.expect.hosts", _no_proxy, in_small_letters=True),
    Setting("METRICS_FILE", "metrics_file", "", "settings.expect.metrics_file", _metrics_file, at_start=True),
    Setting("LOG_LEVEL", "log_level", "info", "settings.expect.log_level",
            _one_of("debug", "info", "warning", "error")),
    Setting("STOCKRT_LANG", "language", "", "settings.expect.language", _one_of(*LANGUAGES), at_start=True),
    Setting("MESSAGE_LANG", "message_language", CHINESE, "settings.expect.language", _one_of(*LANGUAGES),
            at_start=True),
)
# fmt: on


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
    """Return a fault for each line of an env file that is no NAME=value, or none that means the same to systemd."""
    faults: list[str] = []
    for b in _bindings(path):
        line = _line_number(b)
        if b.error or (b.key is not None and b.value is None):
            faults.append(phrase("settings.no_assignment", path=path, line=line))
        elif b.key is not None and not _has_inline_comment(b) and _as_systemd(b) != b.value:
            faults.append(phrase("settings.systemd_reads_otherwise", path=path, line=line, name=b.key))
    return faults


def inline_comments(path: Path) -> list[str]:
    """Return a warning for each line of an env file that has a comment behind a value without quotes."""
    return [
        phrase("settings.inline_comment", path=path, line=_line_number(b), name=b.key)
        for b in _bindings(path)
        if _has_inline_comment(b)
    ]


def _has_inline_comment(binding: Binding) -> bool:
    text = _text_of(binding)
    return text[:1] not in ("'", '"') and binding.value is not None and "#" in text[len(binding.value) :]


def _text_of(binding: Binding) -> str:
    return binding.original.string.partition("=")[2].strip(" \t\r\n")


def _as_systemd(binding: Binding) -> str:
    """Return what systemd's EnvironmentFile= reads from a line; what stands behind a value is a part of it."""
    text = _text_of(binding)
    if text[:1] == "'":
        value, _, rest = text[1:].partition("'")
        return value + rest
    quoted = re.fullmatch(r'"((?:[^"\\]|\\.)*)"(.*)', text, re.DOTALL)
    if quoted:
        return re.sub(r'\\(?:\n|(["\\`$]))', lambda found: found[1] or "", quoted[1]) + quoted[2]
    return re.sub(r"\\(.)", r"\1", text)


def _line_number(binding: Binding) -> int:
    text = binding.original.string  # it begins with the blank lines before
    return binding.original.line + text[: len(text) - len(text.lstrip())].count("\n")


def _bindings(path: Path) -> list[Binding]:
    """Return the parsed lines of an env file. Raises SettingsError when it cannot be read or is not UTF-8."""
    from dotenv.parser import parse_stream

    try:
        return list(parse_stream(io.StringIO(read_file(path))))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError([phrase("settings.unreadable", path=path, why=unread_words(error))]) from None


def find_env_file(named: Path | None, places: Iterable[Path]) -> tuple[Path | None, str]:
    """Return the file to read (None: none) and a warning ('' for none).

    A named file must be readable, which `read_env_file` sees to. One of the usual places that exists but
    may not be read is passed over with a warning: a service gets its settings from its service manager.
    """
    if named is not None:
        return named, ""
    for place in places:
        with contextlib.suppress(OSError):  # a directory on the way that may not be searched: as not there
            if place.is_file() or place.is_fifo():
                if os.access(place, os.R_OK):
                    return place, ""
                return None, phrase("settings.forbidden_file", path=place)
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
    names = [setting.name for setting in SETTINGS if folder and setting.secret]
    found = {name: read_credential(name, Path(cast(str, folder), name.lower())) for name in names}
    return {name: text for name, text in found.items() if text}


def read_credential(name: str, path: Path) -> str:
    """Return the text of a credential's file, '' where it is missing. Raises SettingsError."""
    try:
        return read_file(path).strip()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        fault = phrase("settings.unreadable_credential", name=name, path=path, why=unread_words(error))
        raise SettingsError([fault]) from None


# The unit that `build_pyz.sh install` puts in place, and where systemd looks for it.
UNIT = "stockrt.service"
UNIT_PLACES = [
    Path(place, "systemd/system", UNIT) for place in ("/etc", "/run", "/usr/local/lib", "/usr/lib", "/lib")
]


class Unit(NamedTuple):
    """What the installed unit gives its service: credentials (setting -> file), variables, files of them.

    The last file is the strongest. `unseen`: credentials that only systemd can read.
    """

    credentials: dict[str, Path]
    variables: dict[str, str]
    files: list[Path]
    state_directory: Path
    unseen: list[str]

    def origins(self) -> dict[str, Mapping[str, str]]:
        """Return where the service has its settings from, the strongest first. Raises SettingsError."""
        found: dict[str, Mapping[str, str]] = {
            phrase("settings.credential_file", path=path): {name: read_credential(name, path)}
            for name, path in self.credentials.items()
        }
        found |= {str(path): read_env_file(path) for path in reversed(self.files)}
        return found | {UNIT: {"STATE_DIRECTORY": str(self.state_directory)} | self.variables}

    def is_hidden(self) -> bool:
        """Return whether this user may not look at all of it."""
        return any(map(is_hidden, (*self.credentials.values(), *self.files, self.state_directory)))


def is_hidden(path: Path) -> bool:
    """Return whether a file, or a directory of ours, is there or may be, that this user may not use."""
    if os.geteuid() == 0:
        return False
    try:
        mode = os.R_OK
        if path.is_dir():
            mode |= os.W_OK | os.X_OK  # to look into SQLite's files takes the right to write beside them
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return not os.access(path, mode)


def find_unit(environ: Mapping[str, str], env_file: Path | None) -> Unit | None:
    """Return the installed unit where a command run by hand means its service, else None.

    It does not where a unit runs it, nor where the caller names a state or settings of their own. Raises SettingsError
    where a file that the unit demands is missing.
    """
    if any(environ.get(name) for name in ("INVOCATION_ID", "STATE_DIRECTORY", "CREDENTIALS_DIRECTORY")):
        return None
    place = next(filter(Path.exists, UNIT_PLACES), None)
    if place is None:
        return None
    unit = parse_unit(_unit_text(place))
    if env_file is not None and env_file.resolve() not in [path.resolve() for path in unit.files]:
        return None
    return unit


def _unit_text(place: Path) -> str:
    """Return the unit with its drop-ins as systemctl knows them, the file alone where it is of no help."""
    import subprocess

    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["systemctl", "cat", UNIT]
        done = subprocess.run(command, capture_output=True, timeout=10, check=True)  # noqa: S603
        return done.stdout.decode(errors="replace")
    return place.read_text(encoding="utf-8", errors="replace")


def parse_unit(text: str) -> Unit:
    """Return what a unit with its drop-ins gives its service. A later assignment adds, an empty one takes all back."""
    import glob
    import shlex

    found: dict[str, list[str]] = {}
    for line in re.sub(r"\\\n", " ", text).splitlines():
        name, equals, value = (part.strip() for part in line.partition("="))
        if equals and not value:
            found.pop(name, None)
        elif equals and name[:1] not in "#;":
            found.setdefault(name, []).append(value)
    unit = Unit({}, {}, [], Path("/var/lib", "stockrt"), [])
    for value in found.get("LoadCredential", ()):
        name, _, path = value.partition(":")
        if os.path.isabs(path):
            unit.credentials[name.upper()] = Path(path)
        else:
            unit.unseen.append(name)
    unit.unseen.extend(value.partition(":")[0] for value in found.get("LoadCredentialEncrypted", ()))
    for value in found.get("Environment", ()):
        with contextlib.suppress(ValueError):  # quotes without an end: systemd passes over it, too
            unit.variables.update(word.partition("=")[::2] for word in shlex.split(value))
    for value in found.get("EnvironmentFile", ()):
        path = value.removeprefix("-")
        is_wanted = path == value or is_hidden(Path(path))  # "-": it may be missing
        unit.files.extend(map(Path, sorted(glob.glob(path)) or [path] * is_wanted))
    state = found.get("StateDirectory", ["stockrt"])[0].split()[0].partition(":")[0]
    return unit._replace(state_directory=Path("/var/lib", state))


def load_settings(
    environ: Mapping[str, str],
    env_file: Path | None = None,
    places: Iterable[Path] = ENV_FILE_PLACES,
    is_root: bool | None = None,
    unit: Unit | None = None,
    needs: Needs = NO_NEEDS,
    old_secrets: tuple[str, ...] = (),
) -> LoadedSettings:
    """Read and check all settings: credentials are stronger than the environment, that than the file.

    With `unit` its files are read in place of the caller's, as its service gets them. An empty value counts as not
    set. `old_secrets` stay hidden. Raises SettingsError with every fault at once, what is needed and missing too.
    """
    if unit is None:
        origins, files, warnings = _caller_origins(environ, env_file, places)
    else:
        origins, files, warnings = _service_origins(environ, unit, places)
    for path in files:
        warnings += [_misspelled(name, str(path)) for name in origins[str(path)] if _is_meant(name)]
    if is_service(environ):
        warnings += [_misspelled(name, _environment()) for name in environ if _is_unknown(name)]
    warnings += [warning for path in files for warning in inline_comments(path)]
    read = _read_values(environ, origins, unit)
    values = read.values
    faults = [fault for path in files for fault in broken_lines(path)] + read.faults
    if "MONGODB_DB_NAME" in read.unset and uri_database(values.get("mongodb_uri", "")):
        faults += _take_database(values)
    faults += _contradictions(values) + _missing(read.unset, needs, values)
    is_root = os.geteuid() == 0 if is_root is None else is_root
    if "STATE_DIRECTORY" in read.unset:
        values["state_directory"] = default_state_directory(environ, is_root)
    for name in ("SSL_CERT_FILE", "SSLKEYLOGFILE"):  # OpenSSL would wait for a pipe at each connection
        place = environ.get(name, "")
        if is_odd_file(place):
            why = phrase("tools.odd_file")
            faults.append(phrase("settings.unusable_path", name=name, path=place, why=why))
    if needs.paths:
        faults += _path_faults(values, environ)
    if faults:
        # a misspelled name, or a file that was left out, is why a setting is missing
        raise SettingsError(faults + warnings, values.get("language", ""), values.get("state_directory"))
    color = not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"
    settings = Settings(**values, color=color, old_secrets=old_secrets)
    HIDDEN.secrets = settings.secrets()
    if read.hiding:
        names = listing("join.names", read.hiding)
        warnings.append(phrase("settings.hiding", names=names, unit=UNIT))
    in_use = _origins_in_use(origins, files, read.used)
    words = listing("join.names", [*in_use, phrase("settings.defaults")])
    return LoadedSettings(settings, tuple(warnings), words, tuple(read.hiding))


def _origins_in_use(
    origins: Mapping[str, Mapping[str, str]], files: Iterable[Path], used: Collection[str]
) -> Iterator[str]:
    """Yield the origins that something came from, and the files that set nothing: they were found."""
    read = {*map(str, files)}
    for where, found in origins.items():
        if where in used:
            yield where
        elif where in read and not any(_look_up(setting, {where: found})[2] for setting in SETTINGS):
            yield phrase("settings.sets_nothing", path=where)


class _Read(NamedTuple):
    """What was read: values by attribute, faults, origins in use, settings without a text, and what a unit lacks."""

    values: dict[str, Any]
    faults: list[str]
    used: set[str]
    unset: set[str]
    hiding: list[str]


def _read_values(
    environ: Mapping[str, str], origins: Mapping[str, Mapping[str, str]], unit: Unit | None
) -> _Read:
    """Look every setting up and parse it; with `unit` note what the environment alone has, or has otherwise."""
    read = _Read({}, [], set(), set(), [])
    environment = _environment()
    others = {where: found for where, found in origins.items() if where != environment}
    for setting in SETTINGS:
        where, name, text = _look_up(setting, origins)
        if text:
            read.used.add(where)
        else:
            read.unset.add(setting.name)
        is_hiding = where == environment and text != _look_up(setting, others)[2]
        if unit is not None and is_hiding and setting.name not in READERS_OWN:
            read.hiding.append(name)
        if not text and not setting.default:
            continue
        try:
            read.values[setting.attribute] = setting.parse(text or setting.default)
        except ValueError:
            shown = shown_value(setting, text)
            if where == environment and is_service(environ):
                where = phrase("settings.unit_environment", unit=UNIT)
            expected = setting.expected
            read.faults.append(
                phrase("settings.fault", name=name, shown=shown, where=where, expected=expected)
            )
    return read


def _environment() -> Phrase:
    """Return what the environment is called among the origins of settings, whose names are words."""
    return phrase("settings.environment")


def _caller_origins(
    environ: Mapping[str, str], env_file: Path | None, places: Iterable[Path]
) -> tuple[dict[str, Mapping[str, str]], list[Path], list[str]]:
    """Return where settings may be, the strongest first, which of it are files, and warnings. Raises SettingsError."""
    credential = phrase("settings.credential")
    origins: dict[str, Mapping[str, str]] = {credential: read_credentials(environ), _environment(): environ}
    source, warning = find_env_file(env_file, places)
    if source is not None:
        origins[str(source)] = read_env_file(source)
    warnings = [warning] if warning and not is_service(environ) else []  # a service's: systemd has read it
    return origins, [source] if source else [], warnings


def _service_origins(
    environ: Mapping[str, str], unit: Unit, places: Iterable[Path]
) -> tuple[dict[str, Mapping[str, str]], list[Path], list[str]]:
    """Return the same of a unit's service, for who runs a command by hand: the environment is still theirs."""
    service = unit.origins()
    # they are the first that it has
    credentials = dict(islice(service.items(), len(unit.credentials)))
    warnings: list[str] = [phrase("settings.unseen_credential", unit=UNIT, name=name) for name in unit.unseen]
    other, _ = find_env_file(None, places)
    if other is not None and other.resolve() not in [path.resolve() for path in unit.files]:
        warnings.append(phrase("settings.other_file", path=other, unit=UNIT))
    return credentials | {_environment(): environ} | service, unit.files, warnings


def _take_database(values: dict[str, Any]) -> list[str]:
    """Let the database be the one that the connection string names; return its fault, if it has one."""
    (setting,) = (one for one in SETTINGS if one.name == "MONGODB_DB_NAME")
    try:
        values[setting.attribute] = setting.parse(uri_database(values["mongodb_uri"]))
    except ValueError:
        return [phrase("settings.database_of_host", expected=setting.expected)]
    return []


def _missing(unset: Collection[str], needs: Needs, values: Mapping[str, Any]) -> list[str]:
    """Return the faults of what a command needs and nothing sets."""
    faults: list[str] = []
    platform = [name for name in ("SERVER_IP", "SERVER_PORT") if name in unset]
    collecting = [name for name in COLLECTING if needs.collect and name not in unset]
    half = len(platform) == 1 and (needs.platform or needs.whole_platform)
    if half or (platform and needs.platform and not collecting):
        faults.append(phrase("settings.no_platform", names=listing("join.and", platform)))
    if needs.key and "INFOWAY_API_KEY" in unset:
        faults.append(phrase("settings.no_key"))
    if collecting and "COLLECT_CODES" in unset:
        names, expected = listing("join.and", collecting), phrase(_COLLECT_EXPECTED)
        faults.append(phrase("settings.no_codes", names=names, expected=expected))
    if len(collecting) == len(COLLECTING):
        faults.append(phrase("settings.two_ways"))
    if needs.collect and values.get("collect_codes") == WATCH and "MONGODB_HOST" in unset:
        faults.append(phrase("settings.watch_needs_mongodb", what="COLLECT_CODES=watch"))
    return faults


def _path_faults(values: Mapping[str, Any], environ: Mapping[str, str]) -> list[str]:
    """Try every file and directory that the environment names, without writing; return what is wrong with them."""
    tried, state = [], values.get("state_directory")  # which may be faulty itself
    if state is not None:
        there = next(path for path in (state, *state.parents) if os.path.lexists(path))
        tried.append(("STATE_DIRECTORY", f"{there}/.", os.W_OK | os.X_OK))
    tried += [(name, environ.get(name, ""), os.R_OK) for name in ("SSL_CERT_FILE", "CREDENTIALS_DIRECTORY")]
    codes = values.get("collect_codes", "")
    if codes[:1] == "@":
        tried.append(("COLLECT_CODES", codes[1:], os.R_OK))
    tried += [("SSL_CERT_DIR", path, os.R_OK) for path in environ.get("SSL_CERT_DIR", "").split(":")]
    metrics, keys = values.get("metrics_file"), environ.get("SSLKEYLOGFILE", "")
    if metrics:
        tried.append(("METRICS_FILE", f"{metrics.parent}/.", os.W_OK | os.X_OK))
    if keys and not os.path.lexists(keys):
        keys = f"{Path(keys).parent}/."
    tried.append(("SSLKEYLOGFILE", keys, os.W_OK))
    faults: list[str] = []
    for name, place, mode in tried:
        why = place and fault_of_place(place, mode)
        if why:
            path = place.removesuffix("/.") or "/"
            faults.append(phrase("settings.unusable_path", name=name, path=path, why=why))
    return faults


def fault_of_place(place: str, mode: int) -> str:
    """Return why a file or a directory cannot be used so, '' if it can."""
    try:
        os.stat(place)
    except OSError as error:
        return os_words(error)
    if is_odd_file(place):
        return phrase("tools.odd_file")
    if os.access(place, mode):
        return ""
    return phrase("settings.may_not_read" if mode == os.R_OK else "settings.may_not_write")


def _contradictions(values: Mapping[str, Any]) -> list[str]:
    """Return the faults of settings that are right one by one, but not together."""
    faults: list[str] = []
    if "?" in values.get("mongodb_uri", ""):
        faults += uri_faults(values["mongodb_uri"])
    taken: dict[str, str] = {}
    for setting in SETTINGS:
        if setting.parse is _collection_name:
            name = values.get(setting.attribute, "")
            if name in taken:
                faults.append(phrase("settings.same_name", name=setting.name, value=name, other=taken[name]))
            elif name:
                taken[name] = setting.name
    keys, plans = len(values.get("api_keys", ())), len(values.get("plans", ()))
    if plans > 1 and plans != keys:
        faults.append(phrase("settings.plans_and_keys", plans=plans, keys=keys))
    proxies = Proxies(values.get("https_proxy"), values.get("http_proxy"), values.get("all_proxy"))
    faults += [
        phrase("settings.socks", name=proxy.setting, shown=proxy.shown, expected=phrase(_PROXY_EXPECTED))
        for proxy in proxies.in_use()
        if proxy.scheme not in PROXY_PORTS
    ]
    return faults


def _look_up(setting: Setting, origins: Mapping[str, Mapping[str, str]]) -> tuple[str, str, str]:
    """Return where a setting is set, under which name, and its text."""
    for where, origin in origins.items():
        for name in setting.names():
            if text := origin.get(name, "").strip():
                return where, name, text
    return "", setting.name, ""


def shown_value(setting: Setting, text: str) -> str:
    """Return the text of a setting as a person may see it, in quotes."""
    if setting.in_small_letters:
        return repr(one_line(mask_userinfo(text), 100))
    if setting.secret and not (setting.attribute == "mongodb_uri" and re.match(_USERINFO, text)):
        return "'***'"
    return repr(one_line(mask_uri(text), 100))


def env_line(name: str, value: str) -> str:
    """Return the line of an env file that sets a printable text, for systemd and for `read_env_file` alike."""
    if re.fullmatch(r"[\w.:/@%+,=~-]+", value, re.ASCII):
        return f"{name}={value}\n"
    if not set(value) & set("'\\"):
        return f"{name}='{value}'\n"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{name}="{escaped}"\n'


def _is_unknown(name: str) -> bool:
    return name.startswith(OUR_PREFIXES) and name not in _known_names()


def _is_meant(name: str) -> bool:
    """Return whether a name in a settings file is a setting of ours with a slip in it."""
    import difflib

    if name in _known_names() or _is_unknown(name):
        return _is_unknown(name)
    alike = [known for known in _known_names() if known[0] == name[0]]
    return bool(difflib.get_close_matches(name, alike, 1, NEAR_NAME))


def _known_names() -> list[str]:
    return [name for setting in SETTINGS for name in setting.names()]


def _misspelled(name: str, source: str) -> str:
    import difflib

    near = difflib.get_close_matches(name, _known_names(), n=1, cutoff=0)
    return phrase("settings.misspelled", where=source, name=name, near=near[0])


# The environment of a process stays what it was at its start: `systemctl reload` leaves here, in RUNTIME_DIRECTORY,
# which is in memory and this user's alone, what a start would get now.
HANDED_OVER = "environment.json"


def handed_over(environ: Mapping[str, str]) -> Path | None:
    """Return where the service's new environment is left, None where no unit says so."""
    directory = environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    return Path(directory, HANDED_OVER) if directory else None


class Renewed(NamedTuple):
    """Settings that were read anew: the names of those that changed, and of those that would need a restart."""

    settings: Settings
    changed: tuple[str, ...]
    need_restart: tuple[str, ...]
    warnings: tuple[str, ...]


class SettingsSource:
    """Where the settings of this process come from, to be read anew; the calls are one thread's."""

    def __init__(self, environ: Mapping[str, str], env_file: Path | None = None) -> None:
        self._environ = environ
        self._env_file = env_file

    def read_again(self, before: Settings) -> Renewed:
        """Return the settings as they are now. Raises SettingsError: the ones before stay good."""
        environ = self._environ
        place = handed_over(environ)
        if place is not None and place.exists():
            environ = self._take(place)
        secrets = before.secrets()
        loaded = load_settings(environ, self._env_file, needs=DAEMON_NEEDS, old_secrets=secrets)
        new = loaded.settings
        self._environ = environ
        changed = [s for s in SETTINGS if getattr(new, s.attribute) != getattr(before, s.attribute)]
        kept = {s.attribute: getattr(before, s.attribute) for s in changed if s.at_start}
        return Renewed(
            new._replace(**kept),
            tuple(s.name for s in changed if not s.at_start),
            tuple(s.name for s in changed if s.at_start),
            loaded.warnings,
        )

    def _take(self, place: Path) -> Mapping[str, str]:
        try:
            found = json.loads(read_file(place))
            place.unlink()
        except (OSError, ValueError) as error:
            raise SettingsError(
                [phrase("settings.unreadable_handed_over", path=place, why=str(error))]
            ) from None
        return cast(Mapping[str, str], found)


# ======================================================================================================
# Instruments: from what a person typed to (code, product)
# ======================================================================================================


class Hours(NamedTuple):
    """A regular session on the clock of its exchange, hour and minute of the same day (24: the end of it).

    `prints` (with seconds): when the closing auction has printed its last trade. `bar`: when the daily bar is asked
    for, None where its boundary is not documented.
    """

    opens: tuple[int, int]
    close: tuple[int, int]
    prints: tuple[int, int, int]
    bar: tuple[int, int] | None


class Market(NamedTuple):
    """Where a code belongs: the API's product, the clock of its exchange, and its regular session.

    A `continuous` market goes on through its close, without an auction. `former`: the hours up to an ISO date.
    `rest_h`: no holiday lasted longer, in hours, from the last trade before it: what is older is so although the
    market was open.
    """

    product: str
    zone: str
    hours: Hours
    continuous: bool = False
    rests_on_weekends: bool = True
    former: tuple[str, Hours] | None = None
    rest_h: int = 12 * 24


# The API's products and their codes' suffixes: Infoway's documentation. The hours are the exchanges'; a bar is asked
# for half an hour after the last trade that can be in it, and on half days no earlier: the bar is then there, too.
# The auction prints until:
#   US  the cross comes in the first seconds; trading after hours, which nothing marks, begins at 16:00:00 too
#   HK  16:08 to 16:10, at random; on half days 12:08 to 12:10, and nothing trades after it
#   SH, SZ  15:00:00; until 15:30 there is trading at the close's price, whose volume is in the bar
#   JP, TW  the moment of the close, or a few minutes later where it was put off
#   KS  as JP; on the day of the university entrance exam an hour later, which its bar waits for
#   IN  the closing session goes on until 16:00 at the close's price. Sessions on weekends are held now and then, and
#       on the holiday of Diwali one in the evening, which ends before 20:00
# The longest rest of SH and SZ was eleven days, in the autumn of 2023.
_CHINA = Market("stock", "Asia/Shanghai", Hours((9, 30), (15, 0), (15, 5, 0), (16, 0)))
_TOKYO = Hours((9, 0), (15, 30), (15, 35, 0), (16, 0))
_TOKYO_TO_2024 = Hours((9, 0), (15, 0), (15, 5, 0), (15, 30))
MARKETS = {
    "US": Market("stock", "America/New_York", Hours((9, 30), (16, 0), (16, 0, 5), (16, 30)), rest_h=5 * 24),
    "HK": Market("stock", "Asia/Hong_Kong", Hours((9, 30), (16, 0), (16, 10, 0), (16, 40)), rest_h=6 * 24),
    "SH": _CHINA,
    "SZ": _CHINA,
    "JP": Market("japan", "Asia/Tokyo", _TOKYO, former=("2024-11-04", _TOKYO_TO_2024)),
    "KS": Market("korea", "Asia/Seoul", Hours((9, 0), (15, 30), (15, 35, 0), (17, 0))),
    "IN": Market(
        "india", "Asia/Kolkata", Hours((9, 15), (15, 30), (16, 0, 0), (20, 0)), rests_on_weekends=False
    ),
    "TW": Market(
        "taiwan",
        "Asia/Taipei",
        Hours((9, 0), (13, 30), (13, 35, 0), (15, 0)),
        rests_on_weekends=False,
        rest_h=14 * 24,
    ),
}
# Instruments without a suffix: the market is their product's, but for the metals that follow London's exchange.
PRODUCT_MARKETS = {
    "common": Market(
        "common", "America/New_York", Hours((0, 0), (17, 0), (17, 0, 0), None), continuous=True, rest_h=96
    ),
    "metals": Market(
        "common", "Europe/London", Hours((0, 0), (19, 0), (19, 0, 0), None), continuous=True, rest_h=5 * 24
    ),
    "crypto": Market(
        "crypto",
        "UTC",
        Hours((0, 0), (24, 0), (24, 0, 0), (24, 30)),
        continuous=True,
        rests_on_weekends=False,
        rest_h=1,
    ),
}
PRODUCTS = ("stock", "japan", "korea", "india", "taiwan", "crypto", "common")
# A workflow of the platform may send any code there: asked once more at this product before it fails.
FALLBACK_PRODUCT = "stock"
# ISO 4217 codes that are quoted against each other, and the precious metals (XAU …).
CURRENCIES = frozenset(
    "USD EUR JPY GBP CNY CNH AUD NZD CAD CHF HKD SGD KRW TWD INR THB MYR IDR PHP VND MOP SEK NOK DKK PLN CZK "
    "HUF TRY RUB ZAR MXN BRL ARS CLP COP PEN ILS AED SAR QAR KWD EGP NGN KES PKR BDT LKR KZT UAH RON BGN ISK "
    "XAU XAG XPT XPD".split()
)
# Metals whose day is that of the London Metal Exchange.
BASE_METALS = frozenset("XALUSD XNIUSD XPBUSD ZINCSPOT".split())
# Energy that the API lists at `common` without being a pair; its price may be below zero.
ENERGY = frozenset("USOIL UKOIL NGAS NATGAS WTIUSD BRENTUSD".split())
# What else it lists there whose session nobody knows, so that it has no close: copper, futures, indices
# (its lists of October 2026).
SESSIONLESS = frozenset(
    "XCUUSD XCUUSD_S CL "
    "AEX AUS200 CN50 DJU DXY ESP35 EUSTX50 FRA40 GER30 GER40 HK50 HSHCI HSTECH IBOV JPN225 KOSDAQ KOSPI "
    "KOSPI200 NAS100 NI225 NIFTY SA40 SENSEX SG20 SG30SGD SISE SIXE SOX SWISS20 TAIEX TSX UK100 US2000 US30 "
    "US500 VIX VXN".split()
)
# Indices, energy and futures that are called as a US share is: their name alone never reaches either.
SHARED_NAMES = frozenset(
    "DJT HSII NBI REIT SMI STI WTI BZ ES GC HG HO NG NQ PA PL RB RTY SI YM ZB ZC ZN ZS ZW".split()
)
# What crypto pairs are quoted in; a pair such as BTCUSD is told from currencies by its other half.
CRYPTO_QUOTES = ("USDT", "USDC", "FDUSD", "TUSD", "BUSD", "BTC", "ETH", "BNB")
CRYPTO_COINS = frozenset("BTC ETH BNB SOL XRP ADA DOGE LTC BCH DOT TRX LINK AVAX".split())
# The API's codes are far shorter; a longer text is no code, whatever it holds.
MAX_CODE_LENGTH = 32
_CODE_ALPHABET = re.compile(r"[A-Z0-9.&^=_-]+")


class Instrument(NamedTuple):
    """A code in the API's own form, and the product it is asked at.

    `alternatives`: what the text may mean as well, where it does not tell; each is asked in turn, and only when
    none is known the code counts as failed.
    """

    code: str
    product: str
    alternatives: tuple[Instrument, ...] = ()


_SUFFIX_PRODUCTS = {suffix: market.product for suffix, market in MARKETS.items()}
PRODUCT_SUFFIXES = {product: suffix for suffix, product in _SUFFIX_PRODUCTS.items()}


def _safe(code: str) -> str:
    """Return `code` if it is made of code characters only: the one gate before any URL."""
    if not code:
        raise InstrumentError(phrase("instruments.empty"))
    if len(code) > MAX_CODE_LENGTH:
        raise InstrumentError(phrase("instruments.too_long", n=len(code), most=MAX_CODE_LENGTH))
    # a name, 茅台, or one of the few crypto symbols that are no ASCII
    if not code.isascii() and code.isalnum():
        raise UnclearCode(phrase("instruments.perhaps_a_name"), code)
    if not _CODE_ALPHABET.fullmatch(code) or ".." in code or not any(c.isalnum() for c in code):
        raise InstrumentError(phrase("instruments.alphabet"))
    return code


# ------------------------------------------------------------------------------------------------------
# Mainland numbers
# ------------------------------------------------------------------------------------------------------

# First digits of a number -> the exchanges that have such numbers, in the order in which they are asked. From the
# exchanges' own rules: 上海证券交易所证券交易业务指南第4号 (证券代码段分配指南, 2024), 深圳证券交易所证券代码区间表,
# 北京证券交易所证券代码、证券简称编制指引. A second exchange stands where both have such numbers; it does not where
# what people type is on one of them (ETFs, convertible bonds), so that they never get another company's bond.
MAINLAND_RANGES = {
    "001 002 003 004": "SZ",  # main board
    "009 010 018 019 020": "SH",  # treasury and policy-bank bonds
    "10": "SZ SH",  # treasury bonds; convertible and local-government bonds
    "110 113 118": "SH",  # convertible bonds
    "11": "SH SZ",  # convertible and corporate bonds; corporate bonds
    "123 127 128": "SZ",  # convertible bonds
    "12": "SZ SH",  # convertible and exchangeable bonds; corporate bonds
    "1318": "SZ",  # repos
    "13 14": "SH SZ",  # exchangeable, corporate and local-government bonds
    "150 159 16 180 184": "SZ",  # funds: ETF, LOF, REIT
    "15 18": "SZ SH",  # funds; corporate bonds
    "17 19": "SH",  # corporate bonds
    "200": "SZ",  # B shares
    "204": "SH",  # repos
    "24 25": "SH",  # corporate bonds
    "30": "SZ",  # ChiNext
    "395 399": "SZ",  # indices
    "5": "SH",  # funds: ETF, LOF, REIT
    "60 68": "SH",  # main board, STAR
    "900": "SH",  # B shares
    "43 81 82 83 87 88 89 92": "BJ",  # shares, bonds and indices of the Beijing exchange
}
_RANGES = {
    start: tuple(where.split()) for starts, where in MAINLAND_RANGES.items() for start in starts.split()
}
# 000xxx is a share of Shenzhen and an index of Shanghai. These numbers are, or were, shares (Shenzhen's list;
# new shares get 001xxx): they mean the share, and the index where .SH is typed.
SHENZHEN_000 = """
001-021 023-040 042 045-050 055-056 058-063 065-066 068-070 078 088-090 096 099-100 150-151 153 155-159
166 301 333 338 400-413 415-423 425-426 428-430 488 498 501-511 513-573 576 578 581-603 605-613 615-623
625-633 635-639 650-653 655-663 665-673 675-683 685-693 695 697-703 705 707-713 715-723 725-733 735-739
748 750-753 755-763 765-769 776-780 782-783 785-793 795-803 805-807 809-813 815-823 825-833 835-839 848
850-852 856 858-863 866 868-869 875-878 880-883 885-890 892-893 895 897-903 905-906 908-913 915-923
925-933 935-939 948-953 955-963 965-973 975-983 985 987-990 993 995-999
"""
# SSE 50, STAR 50, CSI 1000, CSI 500: typed as an index as often as the share of the same number.
FOLLOWED_INDICES = frozenset("000016 000688 000852 000905".split())


@cache
def _shenzhen_000() -> frozenset[int]:
    """Return the numbers of SHENZHEN_000, which a daemon that is asked for none of them does without."""
    spans = (span.partition("-") for span in SHENZHEN_000.split())
    return frozenset(
        number for first, _, last in spans for number in range(int(first), int(last or first) + 1)
    )


def _mainland(number: str) -> tuple[str, ...]:
    """Return the suffixes of the exchanges that six digits may belong to, the likelier first."""
    if number.startswith("000"):
        if number in FOLLOWED_INDICES:
            return ("SZ", "SH")
        return ("SZ",) if int(number) in _shenzhen_000() else ("SH", "SZ")
    return next((_RANGES[number[:n]] for n in (4, 3, 2, 1) if number[:n] in _RANGES), ())


def _mainland_instruments(number: str) -> tuple[Instrument, ...]:
    return tuple(Instrument(f"{number}.{suffix}", "stock") for suffix in _mainland(number) if suffix != "BJ")


def _no_beijing() -> InstrumentError:
    return InstrumentError(phrase("instruments.beijing"))


# ------------------------------------------------------------------------------------------------------
# Notations
# ------------------------------------------------------------------------------------------------------

# The API's suffix -> what other programs call the same market: before a dot or a colon, or after a dot. Korea's and
# Taiwan's numbers are given out once for both their exchanges, so that .KQ and .TWO reach no other company.
EXCHANGE_NAMES = {
    "SH": "SS SSE SHSE XSHG SHA",  # Yahoo, TradingView and vn.py, MyQuant, ISO 10383 and JoinQuant, Google
    "SZ": "SZSE XSHE SHE",
    "HK": "HKEX SEHK XHKG HKG",
    "US": "O OQ N NASDAQ NYSE AMEX NYSEARCA ARCA XNAS XNYS",  # Reuters, TradingView, ISO 10383
    "JP": "T TYO XTKS",
    "KS": "KQ KR KRX KOSPI KOSDAQ XKRX",
    "IN": "NS NSE XNSE",
    "TW": "TWO TWSE TPEX TPE XTAI",
}
_SUFFIX_OF = {name: suffix for suffix, names in EXCHANGE_NAMES.items() for name in (suffix, *names.split())}
# What Eastmoney puts before the dot (secid); its 0 is Beijing too.
EASTMONEY_MARKETS = {"1": "SH", "0": "SZ", "116": "HK", "105": "US", "106": "US", "107": "US"}
BEIJING_NAMES = frozenset("BJ BJSE BJEX XBEJ".split())
# Names that mean more than one exchange, or one whose prices the API does not say to have: what is said of them.
UNCERTAIN_EXCHANGES = {"TSE": "instruments.tse", "BSE": "instruments.bse", "BO": "instruments.bo"}
# Venues that TradingView names before a colon; the API has one price of a pair, whoever is named.
CRYPTO_VENUES = frozenset(
    "BINANCE COINBASE BYBIT OKX KRAKEN BITSTAMP BITFINEX BITGET KUCOIN GATEIO GATE HTX HUOBI MEXC".split()
)
COMMON_VENUES = frozenset("FX FX_IDC OANDA FOREXCOM SAXO ICMARKETS PEPPERSTONE CAPITALCOM TVC".split())
# What a symbol looks like at each market; without it, another notation is not read as that market's.
_SYMBOL_FORMS = {
    "SH": r"[0-9]{6}",
    "SZ": r"[0-9]{6}",
    "HK": r"[0-9]{1,5}",
    "US": r"[A-Z]{1,6}(?:[.-][A-Z]{1,3})?",
    "JP": r"[0-9][0-9A-Z]{3}5?",
    "KS": r"[0-9][0-9A-Z]{5}",
    "IN": r"[A-Z0-9&_-]*[A-Z][A-Z0-9&_-]*",
    "TW": r"[0-9]{4,6}[A-Z]?",
}
_EXAMPLES = {"US": "AAPL.US", "HK": "00700.HK", "SH": "600519.SH", "SZ": "000001.SZ", "JP": "7203.JP",
             "KS": "005930.KS", "IN": "RELIANCE.IN", "TW": "2330.TW"}  # fmt: skip
# sh600519, hk00700 (Sina, Tencent, Xueqiu; r_ and rt_ ask them for the live price)
_GLUED = r"(?:RT?_)?(?:(SH|SZ|BJ)([0-9]{6})|(HK)([0-9]{4,5}))"


def _read(text: str) -> Instrument:
    """Read a text without a colon, in any notation."""
    if text.isdigit():  # as most codes are that are not plain
        return _without_suffix(_safe(text))
    if pair := _pair(text):
        return pair
    code = _safe(text)
    if code.endswith(("=X", "=F")):
        return _of_yahoo(*code.split("=", 1))
    if glued := re.fullmatch(_GLUED, code):
        return _at_market(glued[2] or glued[4], glued[1] or glued[3])
    if code.startswith("GB_") and re.fullmatch(_SYMBOL_FORMS["US"], code[3:]):  # Sina
        return _at_market(code[3:], "US")
    symbol, dot, suffix = code.rpartition(".")
    if not dot:
        return _without_suffix(code)
    if suffix in MARKETS and not (symbol == "US" and suffix != "US"):
        return _at_market(symbol, suffix)
    return _elsewhere(code)


def _elsewhere(code: str) -> Instrument:
    """Read a code with a dot and without a suffix of the API's."""
    first, _, rest = code.partition(".")
    symbol, _, last = code.rpartition(".")
    named = EASTMONEY_MARKETS.get(first, "")
    if named and re.fullmatch(_SYMBOL_FORMS[named], rest.replace("_", ".")):  # 106.BRK_B
        if named == "SZ" and _mainland(rest) == ("BJ",):
            raise _no_beijing()
        return _at_market(rest.replace("_", "."), named)
    for name, other in ((first, rest), (last, symbol)):
        if name in BEIJING_NAMES:
            raise _no_beijing()
        market = _SUFFIX_OF.get(name)
        if market is None or not re.fullmatch(_SYMBOL_FORMS[market], other):
            continue
        # ARCA.O and IN.N are shares called ARCA and IN: of what takes letters only US stands before a dot
        if name == last or name == "US" or market not in ("US", "IN"):
            return _at_market(other, market)
    if last == "P" and _bare_product(symbol) == "crypto":  # a perpetual
        return Instrument(code, "crypto")
    raise _unknown_exchange(symbol, last)


def _unknown_exchange(symbol: str, suffix: str) -> InstrumentError:
    if suffix in UNCERTAIN_EXCHANGES:
        return InstrumentError(phrase(UNCERTAIN_EXCHANGES[suffix], name=f".{suffix}"))
    if not symbol and suffix:
        return _unclear(f".{suffix}", phrase("instruments.index_alone"), f".{suffix}.US")
    if suffix in _SUFFIX_OF:
        example = _EXAMPLES[_SUFFIX_OF[suffix]]
        return InstrumentError(phrase("instruments.unknown_form", code=f"{symbol}.{suffix}", example=example))
    if re.fullmatch(r"[A-Z]", suffix) and re.fullmatch(_SYMBOL_FORMS["US"], symbol):
        why = phrase("instruments.unknown_exchange", suffix=suffix)
        return _unclear(f"{symbol}.{suffix}", why, f"{symbol}.{suffix}.US")
    names = " ".join(f".{name}" for name in MARKETS)
    return InstrumentError(phrase("instruments.not_an_exchange", suffix=suffix, names=names))


def _at_venue(symbol: str, venue: str) -> Instrument:
    """Read TradingView's and Google's `NASDAQ:AAPL`."""
    if venue in CRYPTO_VENUES or venue in COMMON_VENUES:
        return _at_pair_venue(symbol, venue)
    if (pair := _pair(venue)) and pair.product == "crypto" and venue.endswith(f"/{symbol}"):
        return Instrument(f"{pair.code}.P", "crypto")  # ccxt's BTC/USDT:USDT, a perpetual
    if venue in BEIJING_NAMES and _safe(symbol):
        raise _no_beijing()
    market = _SUFFIX_OF.get(venue)
    if market and re.fullmatch(_SYMBOL_FORMS[market], symbol):
        return _at_market(symbol, market)
    if market:
        raise InstrumentError(phrase("instruments.not_of_venue", venue=venue, example=_EXAMPLES[market]))
    if venue in UNCERTAIN_EXCHANGES:
        raise InstrumentError(phrase(UNCERTAIN_EXCHANGES[venue], name=venue))
    products = listing("join.names", PRODUCTS)
    raise InstrumentError(phrase("instruments.unknown_venue", products=products))


def _at_pair_venue(symbol: str, venue: str) -> Instrument:
    product = "crypto" if venue in CRYPTO_VENUES else "common"
    with contextlib.suppress(UnclearCode):  # its proposals would be shares
        instrument = _read(symbol)
        if instrument.product == product:
            return instrument
    example = "BINANCE:BTCUSDT" if product == "crypto" else "OANDA:XAUUSD"
    raise InstrumentError(phrase("instruments.not_of_product", venue=venue, product=product, example=example))


def _at_market(symbol: str, suffix: str) -> Instrument:
    """Return the instrument of a symbol whose market is known."""
    if suffix in BEIJING_NAMES:
        raise _no_beijing()
    if not symbol.strip("."):
        raise InstrumentError(phrase("instruments.only_suffix", suffix=suffix, example=_EXAMPLES[suffix]))
    if suffix == "HK" and symbol.isdigit():
        number = symbol.lstrip("0")
        if not 1 <= len(number) <= 5:
            raise InstrumentError(phrase("instruments.hong_kong", symbol=symbol))
        symbol = f"{number:0>5}"
    if suffix in ("SH", "SZ") and not re.fullmatch(_SYMBOL_FORMS[suffix], symbol):
        raise InstrumentError(phrase("instruments.mainland", example=_EXAMPLES[suffix]))
    return Instrument(_safe(f"{symbol}.{suffix}"), _SUFFIX_PRODUCTS[suffix])


def _of_yahoo(symbol: str, kind: str) -> Instrument:
    """Read Yahoo's `USDCNY=X`, `CNY=X` (a rate of the dollar) and `CL=F` (a future)."""
    if kind == "F" and re.fullmatch(r"[A-Z0-9]{1,3}", symbol):
        return Instrument(symbol, "common")
    pair = f"USD{symbol}" if symbol in CURRENCIES - {"USD"} else symbol
    if kind == "X" and _bare_product(pair) == "common":
        return Instrument(pair, "common")
    raise InstrumentError(phrase("instruments.yahoo"))


def _pair(text: str) -> Instrument | None:
    """Read a pair with something between its halves, BTC/USDT, perpetual or not; None if it is none."""
    spot = text.removesuffix(".P")
    pair = re.fullmatch(r"([A-Z0-9]{2,15})[/_-]([A-Z0-9]{3,5})", spot)
    if pair is None or text in SESSIONLESS:  # XCUUSD_S
        return None
    product = _pair_product(pair[1], pair[2])
    if not product or (spot != text and product != "crypto"):
        return None
    return Instrument(pair[1] + pair[2] + text[len(spot) :], product)


def _pair_product(base: str, quoted: str) -> str:
    """Return the product of a pair that was typed with something between its halves, '' if it is none."""
    if base in CURRENCIES and quoted in CURRENCIES:
        return "common" if base != quoted else ""
    if quoted in CRYPTO_QUOTES and base != quoted:
        return "crypto"
    if base in CRYPTO_COINS and quoted in CURRENCIES:
        return "crypto"
    listed = base + quoted in BASE_METALS or base + quoted in SESSIONLESS
    return "common" if quoted == "USD" and listed else ""  # XPB/USD


def _without_suffix(code: str) -> Instrument:
    if len(code) == 6 and code.isdigit() and (where := _mainland(code)):
        if where == ("BJ",):
            raise _no_beijing()
        first, *others = _mainland_instruments(code)
        return first._replace(alternatives=tuple(others))
    if product := _bare_product(code):
        return Instrument(code, product)
    raise _bare_proposal(code)


@lru_cache(maxsize=4096)  # asked again and again by every run; few codes have no suffix
def _bare_product(code: str) -> str:
    """Return the product of a code without suffix, '' when its form does not tell."""
    if code in ENERGY or code in BASE_METALS or code in SESSIONLESS:
        return "common"
    if len(code) == 6 and code[:3] in CURRENCIES and code[3:] in CURRENCIES:
        return "common"
    code = code.removesuffix(".P")
    if any(code.endswith(quoted) and len(code) >= len(quoted) + 2 for quoted in CRYPTO_QUOTES):
        return "crypto"
    return "crypto" if any(code.startswith(c) and code[len(c) :] in CURRENCIES for c in CRYPTO_COINS) else ""


def _bare_proposal(code: str) -> InstrumentError:
    """Return the refusal of a code without exchange, which proposes what its form allows."""
    if code.isdigit():
        return _unclear(code, phrase("instruments.no_exchange"), *_numbers_like(code))
    if code in CRYPTO_COINS:
        return _unclear(code, phrase("instruments.coin_alone"), f"{code}USDT", f"{code}.US")
    if code in SHARED_NAMES:
        return _unclear(code, phrase("instruments.shared_name"), f"common:{code}", f"{code}.US")
    if code.startswith("^"):
        return _unclear(code, phrase("instruments.yahoo_index"))
    if re.fullmatch(r"[A-Z]{1,6}(?:-[A-Z]{1,2})?", code):
        return _unclear(code, phrase("instruments.no_exchange"), f"{code.replace('-', '.')}.US")
    return _unclear(code, phrase("instruments.no_exchange"))


def _numbers_like(number: str) -> Iterator[str]:
    """Yield the codes that a number without exchange may stand for, which may have lost its leading zeros."""
    if len(number) <= 5 and number.strip("0"):
        yield f"{number:0>5}.HK"
    if len(number) <= 5 and not number.startswith("0"):
        yield from (instrument.code for instrument in _mainland_instruments(f"{number:0>6}")[:1])
    if len(number) == 4:
        yield f"{number}.JP"
    if len(number) in (4, 5):
        yield f"{number}.TW"
    if len(number) in (4, 5, 6) and not _mainland(f"{number:0>6}"):
        yield f"{number:0>6}.KS"


def _unclear(text: str, why: str, *codes: str) -> UnclearCode:
    """Return the refusal of an unclear text, which proposes codes that are read as they stand."""
    if codes:
        words = phrase("instruments.did_you_mean", why=why, codes=alternatives(codes))
    elif text.isdigit():
        words = phrase("instruments.expected_digits", why=why)
    else:
        words = phrase("instruments.expected_code", why=why)
    return UnclearCode(words, text, codes)


# ------------------------------------------------------------------------------------------------------
# Codes
# ------------------------------------------------------------------------------------------------------


# What stands around codes in a list that came as a text: JSON, or as Python prints one.
_AROUND = "[]\"'“”"


def split_codes(text: str) -> list[str]:
    """Return the codes of a text in which commas (Chinese ones too), semicolons or blanks separate them."""
    return [*filter(None, (word.strip(_AROUND) for word in re.split(r"[\s,;，；、]+", text)))]


def codes_in(text: str) -> Iterator[str]:
    """Yield the codes of a file; a # begins a comment."""
    for line in text.split("\n"):  # each of several that were put together may begin with a mark
        yield from split_codes(line.partition("#")[0].lstrip("\ufeff"))


def parse_code(raw: object) -> Instrument:
    """Return the instrument that a person or the platform meant by `raw` (a text or a whole number).

    `product:CODE` names the product outright, for a code whose form does not tell it (`common:TOPIX.JP`).
    Raises InstrumentError, which says what to type instead, and of its kinds UnclearCode where a list of what
    exists could tell; nothing that could change a URL gets through.
    """
    text = _code_text(raw)
    if not text.isascii():
        import unicodedata

        text = unicodedata.normalize("NFKC", text)
    text = text.strip().upper()
    venue, colon, symbol = text.rpartition(":")
    if not colon:
        return _read(text)
    venue, symbol = venue.strip(), symbol.strip()
    if venue.lower() in PRODUCTS:
        return _at_product(symbol, venue.lower())
    return _at_venue(symbol, venue)


def market_of(code: str) -> Market | None:
    """Return the market that `code` is traded at, None when its form does not tell."""
    return market_named(market_name(code))


def market_named(name: str) -> Market | None:
    """Return the market of a name that `market_name` gives, None of ''."""
    return MARKETS.get(name) or PRODUCT_MARKETS.get(name)


def is_stale(code: str, t: int, now_ms: int) -> bool:
    """Whether a latest trade at `t` (epoch ms) is old although the code's market was open since."""
    market = market_of(code)
    return market is not None and now_ms - t > market.rest_h * 3_600_000


def market_name(code: str) -> str:
    """Return the suffix of a code, or the product of one that has none, '' where its session is not known."""
    _, dot, suffix = code.rpartition(".")
    if dot and suffix in MARKETS:
        return suffix
    if code in BASE_METALS:
        return "metals"
    return "" if code in SESSIONLESS else _bare_product(code)


def is_index(code: str) -> bool:
    """Return whether a code is that of an index, as far as its form tells: its bars may have no volume."""
    symbol, _, suffix = code.rpartition(".")
    numbered = (suffix == "SH" and symbol.startswith("000")) or (suffix == "SZ" and symbol.startswith("399"))
    return numbered or symbol.startswith(".") or (suffix == "HK" and not symbol.isdigit())


def _code_text(raw: object) -> str:
    if isinstance(raw, str):
        return raw
    if isinstance(raw, bool) or not isinstance(raw, int | float) or raw - raw != 0:  # not finite
        raise InstrumentError(phrase("instruments.no_text", raw=one_line(_as_it_came(raw), 40)))
    if raw != int(raw):
        raise InstrumentError(phrase("instruments.no_number", raw=repr(raw)))
    return str(int(raw)) if abs(raw) < 10**MAX_CODE_LENGTH else "9" * (MAX_CODE_LENGTH + 1)


def _as_it_came(raw: object) -> object:
    """Return of what is no text and no number its JSON, as the platform sent it."""
    if isinstance(raw, str | int | float) and not isinstance(raw, bool):
        return raw
    return json.dumps(raw, ensure_ascii=False, default=repr)


def _at_product(symbol: str, product: str) -> Instrument:
    """Read what follows `product:`; at `common` and `crypto` and without an exchange it is taken as it is."""
    code = _safe(symbol)
    if product in ("common", "crypto"):
        return Instrument(code, product)
    if "." not in code and product != "stock":
        return _at_market(code, PRODUCT_SUFFIXES[product])
    if "." not in code and not code.isdigit():
        return Instrument(code, product)
    instrument = _read(code)
    if instrument.product != product:
        raise InstrumentError(
            phrase(
                "instruments.other_product", code=instrument.code, product=instrument.product, other=product
            )
        )
    return instrument


# ------------------------------------------------------------------------------------------------------
# Sessions
# ------------------------------------------------------------------------------------------------------

SATURDAY = 5


class Session(NamedTuple):
    """One market's session of one exchange-local date; all times are epoch milliseconds.

    `start`, `end`: the date itself, midnight to midnight. `opens`, `until`: the first and the last moment of a
    regular trade. `close`: from then on the session is over. `bar`: from then on its daily bar can be had, NEVER
    where there is none.
    """

    date: str
    start: int
    end: int
    opens: int
    close: int
    until: int
    bar: int


# The close of what is never over: dates on which a market rests, and codes of no known market.
NEVER = 1 << 62
NO_SESSION = Session("", 0, NEVER, NEVER, NEVER, NEVER, NEVER)


@cache
def zone_info(name: str) -> tzinfo | None:
    """Return an IANA zone, None on a machine without its data, which is said once."""
    from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

    if name == "UTC":  # needs no data
        return UTC
    try:
        return ZoneInfo(name)
    except ZoneInfoNotFoundError:
        _say_no_zones()
    except Exception as error:  # of a file that is empty or cut short: ValueError, IndexError, struct.error
        log.error(
            "the time-zone data of %s cannot be read (%s): its times are shown in UTC, and no close is kept there; "
            "install the package tzdata anew, or see PYTHONTZPATH",
            name,
            one_line(error),
        )
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


def opened_at(market: Market, now_ms: int) -> int:
    """Return since when (epoch ms) a market is open by its regular hours, NEVER while it is not.

    Holidays and lunch breaks are not known here.
    """
    session = session_of(market, now_ms)
    return session.opens if session.opens <= now_ms <= session.until else NEVER


def session_on(market: Market, day: date) -> Session:
    """Return the session of an exchange-local date; NO_SESSION without time-zone data."""
    zone = zone_info(market.zone)
    return _session(market, day, zone) if zone else NO_SESSION


@lru_cache(maxsize=256)
def _session(market: Market, day: date, zone: tzinfo) -> Session:
    def at(hour: int, minute: int, second: int = 0) -> int:
        later = day + timedelta(days=hour // 24)
        moment = datetime(later.year, later.month, later.day, hour % 24, minute, second, tzinfo=zone)
        return int(moment.timestamp()) * 1000

    start, end = at(0, 0), at(24, 0)
    if market.rests_on_weekends and day.weekday() >= SATURDAY:
        return Session(day.isoformat(), start, end, NEVER, NEVER, NEVER, NEVER)
    hours = market.hours
    if market.former and day.isoformat() <= market.former[0]:
        hours = market.former[1]
    # what goes on through its close trades in the next session from that moment on; a second is a whole one
    until = at(*hours.prints) + (-1 if market.continuous else 999)
    bar = at(*hours.bar) if hours.bar else NEVER
    return Session(day.isoformat(), start, end, at(*hours.opens), at(*hours.close), until, bar)


# ------------------------------------------------------------------------------------------------------
# Batches
# ------------------------------------------------------------------------------------------------------

# Most codes come in the API's own form: reading them as a person's typing would give them back as they are.
_PLAIN_CODE = re.compile(
    r"[0-9]{6}\.(?:SH|SZ)|(?!00000)[0-9]{5}\.HK|(?!US\.[JKIT])[A-Z0-9]{1,20}\.(?:US|JP|KS|IN|TW)", re.ASCII
)
# The API refuses more with `ret` 505.
MAX_BATCH = 100
# The duplicate check keeps codes in buckets of about so many, each one text: a short search for every code.
CODES_PER_BUCKET = 10
# Where nobody knows how many codes will come.
MANY_CODES = 100_000
# What the name of a product's bars ends with, where they are told from the product.
OF_BARS = " bars"


class Batch(NamedTuple):
    """Codes that are asked for in one request, joined by commas as the URL has them.

    A joined text and not a list: 100,000 codes are then one megabyte, not ten. `bars`: how many daily bars of each
    code are asked for, 0 for its latest trade.
    """

    product: str
    codes: str
    bars: int = 0

    @property
    def service(self) -> str:
        """What a key must serve: the product, or its bars, which a plan may lack."""
        return self.product + OF_BARS if self.bars else self.product

    def split(self) -> list[str]:
        """Return the codes one by one."""
        return self.codes.split(",")


class BatchPlan:
    """Turns codes into batches of one product each, every code once, in the order they came.

    `total` counts distinct codes, those that cannot be asked included; `invalid` says of each why, and `unclear` of
    those among them about which a list of what exists could tell. `asked_as` holds what was typed for a code that
    became another text (SH600519, not aapl.us); `alternatives` what is asked next where a code turns out to be
    unknown; `guessed` the codes whose text does not tell that it means them.
    `expected`: about how many codes will come, which only its speed depends on.
    """

    def __init__(self, expected: int = MANY_CODES) -> None:
        self.total = 0
        self.invalid: dict[str, str] = {}
        self.unclear: dict[str, UnclearCode] = {}
        self.asked_as: dict[str, str] = {}
        self.guessed: set[str] = set()
        self.alternatives: dict[str, tuple[Instrument, ...]] = {}
        self.batches: list[Batch] = []
        self._open: defaultdict[str, list[str]] = defaultdict(list)
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
            instrument = parse_code(raw)
        except InstrumentError as error:
            shown = one_line(_as_it_came(raw), MAX_CODE_LENGTH + 8) or "''"
            self.total += shown not in self.invalid
            self.invalid[shown] = error.message
            if isinstance(error, UnclearCode):
                self.unclear[shown] = error
        else:
            self.add_instrument(instrument, one_line(raw, MAX_CODE_LENGTH + 8))

    def add_instrument(self, instrument: Instrument, typed: str = "", unsure: bool = False) -> None:
        """Take one code that is already in the API's form; `typed` is what stood for it."""
        code, product, alternatives = instrument
        self._take(code, product)
        if alternatives:  # which only this text may mean, not what else was typed for the code
            self.alternatives[code], self.asked_as[code] = alternatives, typed
        if typed.upper() == code:
            return
        if alternatives or unsure:
            self.guessed.add(code)
        if typed:
            self.asked_as.setdefault(code, typed)

    def _take(self, code: str, product: str) -> None:
        seen, entry = self._seen, code + ","
        bucket = hash(code) % len(seen)
        if "," + entry in seen[bucket]:
            return
        seen[bucket] += entry
        self.total += 1
        waiting = self._open[product]
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
    """Whose fault it is that a code failed."""

    INVALID_CODE = "invalid_code"
    UNKNOWN_CODE = "unknown_code"
    BAD_RECORD = "bad_record"
    NETWORK = "network"
    API = "api"
    KEY = "key"
    STORE = "store"
    OTHER = "other"


class Failure(NamedTuple):
    """Why a code failed: the kind for whoever counts, the words for whoever asked."""

    kind: FailureKind
    words: str


def failed_words(failures: Mapping[str, Failure], total: int) -> Phrase:
    """Return how many of how many codes failed, and of the first few why."""
    first = islice(failures.items(), FAILURES_NAMED)
    named = [phrase("events.code", code=code, why=failure.words) for code, failure in first]
    names, more = listing("join.names", named), len(failures) - len(named)
    if more:
        return phrase("events.failed_more", failed=len(failures), total=total, names=names, more=more)
    return phrase("events.failed", failed=len(failures), total=total, names=names)


class Check(NamedTuple):
    """What `--check` found of one thing."""

    name: str
    good: bool
    words: str


# Codes that a report names beside its failures, and failures that one line names.
NAMES_LISTED = 100
FAILURES_NAMED = 3


class Report:
    """What became of a run. Every distinct code is stored, a duplicate, queued or failed, unless it was interrupted.

    `duplicates`: the latest trade was in the store before. `queued`: it waits on this machine for MongoDB, for the
    reason `queued_because`. `store_error`: what the store said when it failed; `close_error`: when it failed at
    the closing snapshot alone. `failures` are by the codes as they were asked; `read_as` says of the first
    NAMES_LISTED codes whose form does not tell what they mean as which code they are stored. `stale`: codes whose
    latest trade is old although their market was open since (a suspended share, a frozen feed, an expired plan);
    `stale_since`: the newest of those trades, epoch milliseconds.
    """

    total: int = 0
    stored: int = 0
    duplicates: int = 0
    queued: int = 0
    queued_because: str = ""
    failures: dict[str, Failure]
    read_as: dict[str, str]
    stale: int = 0
    stale_since: int = 0
    store_error: str = ""
    close_error: str = ""
    interrupted: bool = False
    took_s: float = 0.0

    def __init__(self, **known: Any) -> None:
        vars(self).update({"failures": {}, "read_as": {}} | known)

    @property
    def reached(self) -> int:
        """Of how many codes the latest trade is in the store."""
        return self.stored + self.duplicates

    @property
    def complete(self) -> bool:
        """Whether the latest trade of every code is in the store, and the closes that follow from them."""
        return not self.failures and not self.close_error and self.reached == self.total

    @property
    def outcome(self) -> str:
        """How it ended: `success`, `partial`, `failure` or `interrupted`."""
        if self.interrupted:
            return "interrupted"
        if self.complete and self.total:
            return "success"
        if self.reached and not self.store_error and not self.queued:
            return "partial"
        return "failure"

    def as_of_now(self) -> Report:
        """Return what it says now, of a run that another thread may go on with."""
        return Report(**vars(self) | {"failures": self.failures.copy(), "read_as": self.read_as.copy()})

    def queued_words(self) -> Phrase:
        """Return how many trades wait on this machine, and why."""
        trades = count_words(self.queued, "trade")
        return phrase("events.queued", trades=trades, why=self.queued_because)

    def read_as_words(self) -> str:
        """Return what the first few codes were read as whose form does not tell, '' where there are none."""
        return first_few([f"{asked} -> {code}" for asked, code in self.read_as.items()])

    def stale_words(self) -> str:
        """Return of how many codes the trades are old, '' where there are none."""
        if not self.stale:
            return ""
        since, codes = iso_after(self.stale_since / 1000, 0), count_words(self.total, "code")
        return phrase("events.stale", stale=self.stale, codes=codes, since=since)

    def close_words(self) -> Phrase:
        """Return why the closing snapshot is not kept, as `close_error` says."""
        return phrase("events.close_lost", why=self.close_error)

    def summary(self) -> Phrase:
        """Return the closing line."""
        counts: Phrase = phrase(
            "events.counts",
            total=self.total,
            stored=self.stored,
            known=self.duplicates,
            failed=len(self.failures),
            took=self.took_s,
        )
        if self.interrupted:
            left = self.total - self.reached - self.queued - len(self.failures)
            counts = phrase("events.interrupted", counts=counts, left=left)
        clauses = [counts]
        if self.queued:
            clauses.append(self.queued_words())
        if self.close_error:
            clauses.append(self.close_words())
        return listing("join.clauses", clauses)


class QueueStats(NamedTuple):
    """What waits: trades, their bytes on disk, when the oldest came (ISO 8601 UTC); and what was refused.

    `rejects`: documents that MongoDB refused for good. `refused`: trades that found no room, of this process.
    """

    trades: int = 0
    bytes: int = 0
    oldest: str | None = None
    rejects: int = 0
    refused: int = 0


class KeyStats(NamedTuple):
    """What is known of an API key: requests used and left today (None: not known; infinite: no limit), its state.

    `digest` stands for the key; `ends`: when its plan does, epoch seconds, 0 where it is not known.
    """

    digest: str
    used: int | None
    left: float | None
    state: str
    ends: float


class StreamFacts(TypedDict):
    """What is known of a connection to the stream: for how many codes it is, how many are subscribed, its state."""

    product: str
    codes: int
    subscribed: int
    state: str
    why: str


class CollectStats(NamedTuple):
    """What collecting without pause does now; the counts are since the start of the process.

    `connections` of `connections_wanted` stand; `codes`: subscribed; `polled`: asked for over REST instead, as the
    key's plan allows no more; `per_second`: trades of the last seconds; `delay_p50_ms`, `delay_p99_ms`: from a
    trade's arrival until it is durable (NaN where none came lately); `gaps_today`: of this UTC day; `gaps_open`: those
    that go on.
    """

    connections: int = 0
    connections_wanted: int = 0
    codes: int = 0
    polled: int = 0
    per_second: float = 0.0
    delay_p50_ms: float = math.nan
    delay_p99_ms: float = math.nan
    gaps_today: int = 0
    trades: int = 0
    stored: int = 0
    duplicates: int = 0
    dropped: int = 0  # what was pushed and not asked for, or was no trade
    missed_beats: int = 0
    trouble: str = ""
    streams: Sequence[StreamFacts] = ()
    gaps_open: int = 0


# Of a trouble that stands in one line with others.
TROUBLE_SHOWN = 120


def collect_words(stats: CollectStats) -> Phrase:
    """Return what collecting does now, for a status line."""
    parts: list[str] = []
    if stats.connections_wanted:
        wanted = count_words(stats.connections_wanted, "connection")
        parts.append(phrase("events.connected", up=stats.connections, connections=wanted))
        parts.append(phrase("events.subscribed", codes=count_words(stats.codes, "code")))
    if stats.polled:
        parts.append(phrase("events.polled", codes=count_words(stats.polled, "code")))
    if parts:
        rate = round(stats.per_second, 1) if stats.per_second < 10 else round(stats.per_second)
        parts.append(phrase("events.rate", rate=rate))
    if not math.isnan(stats.delay_p99_ms):
        parts.append(phrase("events.delays", p50=stats.delay_p50_ms, p99=stats.delay_p99_ms))
    if stats.gaps_today:
        parts.append(phrase("events.gaps", gaps=count_words(stats.gaps_today, "gap")))
    if stats.missed_beats:
        parts.append(phrase("events.missed", beats=count_words(stats.missed_beats, "beat")))
    if stats.trouble:
        parts.append(one_line(stats.trouble, TROUBLE_SHOWN))
    return listing("join.commas", parts or [phrase("events.begins")])


def steady(stats: CollectStats) -> tuple[object, ...]:
    """Return of it what stands in a status line and does not change all the time while trades come."""
    rates = {"per_second", "delay_p50_ms", "delay_p99_ms", "trades", "stored", "duplicates", "dropped"}
    others = rates | {"streams", "gaps_open"}
    return tuple(value for name, value in stats._asdict().items() if name not in others)


class Events:
    """What a run and the daemon tell of themselves; this one does not listen. Never raises, whatever the thread."""

    def started(self) -> None:
        """The settings hold and the daemon's loop runs."""

    def tick(self, unanswered: int, undelivered: int) -> float:
        """The socket's loop made a turn; return when (monotonic) it shall make the next one at the latest.

        `unanswered`: commands that were accepted; `undelivered`: answers without the platform's receipt.
        """
        return math.inf

    def progress(self, done: int = 0, total: int = 0, unwritten: int = 0) -> None:
        """Something is at work; of a run: so many codes are done with, and so many documents wait to be stored."""

    def asked(self, kind: str, seconds: float | None) -> None:
        """The API was asked once: what followed from the response, and its latency, None where none came."""

    def stored(self, documents: Sequence[dict[str, Any]]) -> None:
        """These documents are in the store, new or not, or wait on this machine for MongoDB."""

    def queue_changed(self, stats: QueueStats) -> None:
        """What waits for MongoDB on this machine changed."""

    def keys_used(self, keys: Sequence[KeyStats]) -> None:
        """A run is over that may have used these API keys."""

    def keys_out(self, out: int, of: int) -> None:
        """A run is over, and so many of the API keys are not used again."""

    def collecting(self, stats: CollectStats) -> None:
        """Collecting without pause goes on; told about once a second while something comes, else more seldom."""

    def damaged(self, error: StockrtError) -> None:
        """A local file or the program is: with these words the process has to end, and its next start mends it."""

    def set_aside(self, words: str) -> None:
        """A damaged local file is set aside and rescued; where this tells nobody else it goes to the log."""
        log.error("%s", words)

    def connected(self) -> None:
        """The connection to the platform stands."""

    def disconnected(self, reason: str) -> None:
        """The connection is gone, or could not be made."""

    def executed(self, report: Report | None) -> None:
        """An execution ended; None: it was refused or could not begin."""

    def reloading(self) -> None:
        """The settings are about to be read anew."""

    def reloaded(self, settings: Settings) -> None:
        """That is over, and these hold: new ones, or those from before where the new ones are faulty."""

    def stopping(self, seconds: float) -> None:
        """The daemon leaves, and may need so long for it."""


# Nobody listens.
NO_EVENTS = Events()


def fault_words(error: Exception, events: Events, is_said: bool = False) -> str:
    """Return what is to be said of whatever kept a thread from its work; that a part of the program is gone is told."""
    if isinstance(error, ImportError):
        lost = lost_part(error)
        events.damaged(lost)
        return lost.message
    return error.message if isinstance(error, StockrtError) else own_fault(error, is_said)


# ======================================================================================================
# HTTP
# ======================================================================================================

# The longest lists of the API have a few megabytes; more than this is not an answer but an accident or an attack.
MAX_ANSWER_BYTES = 16 * 1024 * 1024
# What a proxy answers itself when it cannot reach the server behind it.
GATEWAY_STATUSES = (502, 503, 504)


class Limits(NamedTuple):
    """Seconds for connecting, for a silence while reading, and for a request as a whole.

    The whole counts too: a server that drips a byte a second never runs into the read limit.
    """

    connect_s: float
    read_s: float
    whole_s: float

    @property
    def handshakes_s(self) -> float:
        """For what comes between connecting and the request: a proxy's answer, and TLS."""
        return min(2 * self.connect_s, self.whole_s)


# The API was seen to take many seconds under load; a longer silence is a dead peer.
API_LIMITS = Limits(5.0, 20.0, 30.0)
# The platform's views answer from memory; the daemon has nothing else to do meanwhile, but signals.
PLATFORM_LIMITS = Limits(5.0, 8.0, 10.0)


class Response(NamedTuple):
    """What came back for one request: an HTTP answer, or a `fault` of the way there and of which `kind` it is.

    `place`: where it shows, '' where the fault says that itself. A `hopeless` one would be the same the next time.
    """

    status: int = 0
    body: bytes = b""
    retry_after: str = ""
    fault: str = ""
    kind: FailureKind = FailureKind.NETWORK
    hopeless: bool = False
    date: str = ""  # the header of that name
    place: str = ""

    @property
    def words(self) -> str:
        """The fault with its place."""
        return phrase("tools.because", what=self.place, why=self.fault) if self.place else self.fault


# ------------------------------------------------------------------------------------------------------
# JSON
# ------------------------------------------------------------------------------------------------------


def json_object(body: bytes) -> dict[str, Any] | None:
    """Return the JSON object that the body is, None if it is none or too deep. Numbers keep their digits as text."""
    try:
        parsed = _read_json(body)
    except (ValueError, RecursionError):
        return None
    brackets = body.count(b"[") + body.count(b"{")
    return parsed if isinstance(parsed, dict) and not is_deep(parsed, brackets) else None


def not_json_words(body: bytes, whose: str) -> str:
    """Return what a body is that is no JSON object as `whose` are."""
    deep = False
    try:
        deep = is_deep(_read_json(body))
    except RecursionError:
        deep = True
    except ValueError:
        pass
    if deep:
        return phrase("http.deep_json", size=len(body), levels=MAX_DEPTH)
    return phrase("http.no_json", size=len(body), whose=whose)


NUMBERS_AS_TEXT = json.JSONDecoder(parse_float=str, parse_constant=str)


def _read_json(body: bytes) -> Any:
    try:
        return NUMBERS_AS_TEXT.decode(body.decode(json.detect_encoding(body), "surrogatepass"))
    except json.JSONDecodeError:
        raise
    except ValueError:  # a number of thousands of digits, which Python does not read: slower, as its text
        return json.loads(body, parse_float=str, parse_constant=str, parse_int=_short_number)


def _short_number(digits: str) -> int | str:
    return int(digits) if len(digits) <= 40 else digits


def words_of(envelope: Mapping[str, Any]) -> str:
    """Return what the API says in words; each kind of refusal has its own name for the field."""
    found = (envelope.get(name) for name in ("msg", "message", "detail", "title"))
    return one_line(next((text for text in found if isinstance(text, str) and text), ""), 160)


# ------------------------------------------------------------------------------------------------------
# Faults of proxies
# ------------------------------------------------------------------------------------------------------


def _proxy_headers(proxy: Proxy) -> dict[str, str]:
    return {"Proxy-Authorization": proxy.authorization} if proxy.authorization else {}


def _fault_of_proxy(proxy: Proxy, error: Exception, fault: Response) -> Response:
    """Return a fault of connecting as one of the way through a proxy."""
    # how http.client says that a CONNECT was refused; there is no other sign
    refused = re.match(r"Tunnel connection failed: (\d+)", str(error))
    if refused:
        return _refused_by_proxy(proxy, int(refused[1]))
    return fault._replace(fault=_through(proxy, fault.fault))


def _through(proxy: Proxy, fault: str) -> str:
    return phrase("http.through_proxy", proxy=proxy.shown, fault=fault, setting=proxy.setting)


@cache
def _answer_to_connect() -> type[HTTPResponse]:
    """Return http.client's class of an answer, but one that passes over what only announces one (100 Continue)."""
    from http.client import HTTPResponse, parse_headers

    class FinalAnswer(HTTPResponse):
        def _read_status(self) -> tuple[str, int, str]:
            while True:
                found: tuple[str, int, str] = super()._read_status()  # type: ignore[misc]
                if found[1] >= 200:
                    return found
                parse_headers(self.fp)

    return FinalAnswer


def _is_of_proxy(response: Response) -> bool:
    """Return whether an answer to a forwarded request is the proxy's own, as far as that can be known."""
    away = response.status in GATEWAY_STATUSES and json_object(response.body) is None
    return away or response.status == 407


def _refused_by_proxy(proxy: Proxy, status: int) -> Response:
    shown, setting = proxy.shown, proxy.setting
    fault = phrase("http.proxy_answers", proxy=shown, status=status, setting=setting)
    if status == 407 and proxy.authorization:
        fault = phrase("http.proxy_refuses_user", proxy=shown, setting=setting)
    elif status == 407:
        fault = phrase("http.proxy_asks_user", proxy=shown, setting=setting, scheme=proxy.scheme)
    return Response(fault=fault, hopeless=400 <= status < 500)


# ------------------------------------------------------------------------------------------------------
# The connection
# ------------------------------------------------------------------------------------------------------


class Wire:
    """A second handle of a socket, by which any thread can cut it: a TLS handshake takes the first one away."""

    def __init__(self) -> None:
        self._handle: socket.socket | None = None
        self.is_cut = False

    def keep(self, sock: socket.socket) -> None:
        """Take a handle of a socket. Raises TimeoutError when it is too late."""
        self._handle = sock.dup()
        if self.is_cut:
            raise TimeoutError

    def cut(self) -> None:
        """End all reading and writing on the socket."""
        import socket

        self.is_cut = True
        if self._handle is not None:
            with contextlib.suppress(OSError):  # it may have been closed just now
                self._handle.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Let go of the socket."""
        if self._handle is not None:
            self._handle.close()


class HttpConnection:
    """One keep-alive HTTP connection, straight or through a proxy, used by one thread at a time.

    `open`, then `get`: what is done between is no part of a request's time. `deadline` (monotonic seconds, 0
    while nothing is under way) is for the caller to watch, who ends what is over it with `abort`, from
    whatever thread. Foreign exceptions end here: they become a `Response` with a fault. With `tunnel` a proxy
    passes on unread what is not for TLS, too: a WebSocket.
    """

    def __init__(
        self, base_url: str, limits: Limits = API_LIMITS, proxies: Proxies = NO_PROXIES, tunnel: bool = False
    ) -> None:
        parts = urlsplit(base_url)
        self._limits = limits
        self._tls = parts.scheme == "https"
        self._host = cast(str, parts.hostname)
        self._port = parts.port or (443 if self._tls else 80)
        self._place = host_and_port(self._host, self._port)
        self._path = parts.path
        self._headers = {"User-Agent": f"stockrt/{__version__}", "Accept": "application/json"}
        self._proxy = proxies.for_url(base_url)
        self._tunnels = self._tls or tunnel
        if self._proxy is not None and not self._tunnels:
            self._path = base_url
            self._headers |= _proxy_headers(self._proxy)
        self._conn: HTTPConnection | None = None
        self._wire = Wire()
        self._is_over = False
        self._limit_s = limits.whole_s  # what the deadline leaves
        self.deadline = 0.0

    def named(self, fault: str) -> str:
        """Return what went wrong behind an open connection, with the proxy that it goes through."""
        if self._proxy is None:
            return fault
        return _through(self._proxy, fault)

    @property
    def sock(self) -> socket.socket:
        """The socket of the open connection."""
        assert self._conn is not None
        return cast("socket.socket", self._conn.sock)

    def open(self) -> Response | None:
        """Connect where no connection stands; return what went wrong, None if nothing did."""
        if self._is_open():
            return None
        self.close()
        self._wire = Wire()
        self._limit_to(self._limits.whole_s)
        fault = None
        try:
            if self._is_over:
                raise TimeoutError
            self._conn = self._new_connection()
            final = self._conn.response_class
            self._conn.response_class = _answer_to_connect()
            self._conn.connect()
            self._conn.response_class = final
            if self._wire.is_cut:  # which http.client takes for the end of a proxy's answer
                raise TimeoutError
            self._conn.timeout = self._limits.read_s
        except _foreign_errors() as error:
            fault = self._fault(error, "" if self._proxy else self._place)
            if self._proxy is not None:
                fault = _fault_of_proxy(self._proxy, error, fault)
            self.close()
        self.deadline = 0.0
        return fault

    def get(self, path: str, headers: Mapping[str, str], most_bytes: int = MAX_ANSWER_BYTES) -> Response:
        """Ask for `path` over the open connection and return the answer, whatever it is, up to so many bytes."""
        self._limit_to(self._limits.whole_s)
        try:
            response = self._exchange(path, headers, most_bytes)
        except _foreign_errors() as error:
            behind_proxy = self._proxy is not None and not self._tunnels
            response = self._fault(error, "" if behind_proxy else self._place)
            if self._proxy is not None and behind_proxy:
                response = _fault_of_proxy(self._proxy, error, response)
        self.deadline = 0.0
        if response.fault:
            self.close()
        return response

    def abort(self, for_good: bool = False) -> None:
        """Cut the connection under what goes on, so that its thread comes back with a fault.

        `for_good`: no other one is opened.
        """
        self._is_over |= for_good  # before the cut: `open` looks at it when its new wire is there
        self._wire.cut()

    def close(self) -> None:
        """Close the connection; `open` makes a new one."""
        if self._conn is not None:
            with contextlib.suppress(OSError):  # nothing is lost when a closing fails
                self._conn.close()
        self._conn = None
        self._wire.close()

    def let_go(self) -> None:
        """Leave the open socket to the caller."""
        self._conn = None
        self._wire.close()

    def _limit_to(self, seconds: float) -> None:
        self._limit_s = seconds
        self.deadline = time.monotonic() + seconds

    def _is_open(self) -> bool:
        """Return whether a request can be written at once."""
        if self._conn is None or self._conn.sock is None:
            return False
        # An idle connection has something to read when it ends, or when TLS has something to say to itself.
        return self._conn.is_connected or _has_nothing_for_us(self._conn.sock)

    def _new_connection(self) -> HTTPConnection:
        from urllib3.connection import HTTPConnection, HTTPSConnection, ProxyConfig

        proxy, timeout = self._proxy, self._limits.connect_s
        tls = self._tls
        if proxy is not None and not self._tunnels:
            tls = proxy.scheme == "https"
        make = HTTPSConnection if tls else HTTPConnection
        if proxy is None:
            conn = make(self._host, self._port, timeout=timeout)
        else:
            config = ProxyConfig(None, False, None, None)  # the proxy's certificate is checked like any
            conn = make(proxy.host, proxy.port, timeout=timeout, proxy_config=config)
        if proxy is not None and self._tunnels:
            headers = {"Host": self._place, **_proxy_headers(proxy)}
            conn.set_tunnel(self._host, self._port, headers, proxy.scheme)
        connect = conn._new_conn
        conn._new_conn = lambda: self._keep(connect())  # type: ignore[method-assign]
        return conn

    def _keep(self, sock: socket.socket) -> socket.socket:
        """Make a new socket one that `abort` can cut; TLS to a proxy that urllib3 does not do is done."""
        self._wire.keep(sock)
        self._limit_to(min(self._limits.handshakes_s, self.deadline - time.monotonic()))
        proxy = self._proxy
        if proxy is not None and proxy.scheme == "https" and self._tunnels and not self._tls:
            return start_tls(sock, proxy.host)
        return sock

    def _exchange(self, path: str, headers: Mapping[str, str], most_bytes: int) -> Response:
        if self._conn is None or self._wire.is_cut:
            raise TimeoutError
        conn = self._conn
        conn.request("GET", self._path + path, headers={**self._headers, **headers}, preload_content=False)
        answer = conn.getresponse()
        # the answer is still to come, and would be taken for that to the next request
        if answer.status < 200:
            words = phrase("http.announced", status=answer.status)
            return Response(fault=words, kind=FailureKind.API)
        body = answer.read(most_bytes + 1)
        if len(body) > most_bytes:
            words = phrase("http.large", size=most_bytes >> 20)
            return Response(fault=words, kind=FailureKind.API, hopeless=True)
        retry_after, date = (answer.headers.get(name, "").strip() for name in ("Retry-After", "Date"))
        response = Response(answer.status, body, retry_after, date=date)
        if self._proxy is not None and not self._tunnels and _is_of_proxy(response):
            return _refused_by_proxy(self._proxy, response.status)
        return response

    def _fault(self, error: Exception, place: str) -> Response:
        """Return what an exception means that came from `place`, '' where others say that."""
        fault, hopeless = network_words(error), _is_about_a_certificate(error)
        if self._wire.is_cut or time.monotonic() >= self.deadline:
            fault, hopeless = phrase("http.not_whole", seconds=self._limit_s), False
        elif isinstance(error, ValueError | AttributeError) and not isinstance(error, OSError):
            fault, hopeless = phrase("http.broke"), False
        return Response(fault=fault, hopeless=hopeless, place=place)


class StraightSocket:
    """A TCP or TLS connection without urllib3, which would take an idle daemon's memory: for a WebSocket.

    Used like an HttpConnection.
    """

    def __init__(self, base_url: str, limits: Limits) -> None:
        parts = urlsplit(base_url)
        self._limits = limits
        self._host = cast(str, parts.hostname)
        self._tls = parts.scheme == "https"
        self._port = parts.port or (443 if self._tls else 80)
        self._wire = Wire()
        self._sock: socket.socket | None = None

    @property
    def sock(self) -> socket.socket:
        """The socket of the open connection."""
        assert self._sock is not None
        return self._sock

    def open(self) -> Response | None:
        """Connect; return what went wrong, None if nothing did."""
        import socket

        try:
            # bytes: a text would load the codec for host names in other scripts, which no setting holds
            place = cast("tuple[str, int]", (self._host.encode(), self._port))
            self._sock = socket.create_connection(place, self._limits.connect_s)
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._wire.keep(self._sock)
            if self._tls:
                self._sock = start_tls(self._sock, self._host)
        except (OSError, ValueError) as error:
            self.close()
            return Response(fault=network_words(error))  # who dials names the platform
        return None

    def named(self, fault: str) -> str:
        """Return what went wrong behind the open connection."""
        return fault

    def abort(self, for_good: bool = True) -> None:
        """Cut the connection under what goes on, so that its thread comes back with a fault."""
        self._wire.cut()

    def close(self) -> None:
        """Close the connection."""
        if self._sock is not None:
            self._sock.close()
        self._wire.close()

    def let_go(self) -> None:
        """Leave the open socket to the caller."""
        self._wire.close()


def get_once(
    base_url: str,
    path: str,
    limits: Limits,
    proxies: Proxies = NO_PROXIES,
    headers: Mapping[str, str] = MappingProxyType({}),
) -> Response:
    """Ask for one thing over a connection of its own, which is cut when the time is over."""
    connection = HttpConnection(base_url, limits, proxies)
    with cut_after(limits.whole_s, connection):
        try:
            return connection.open() or connection.get(path, headers)
        finally:
            connection.close()


@contextlib.contextmanager
def cut_after(seconds: float, connection: HttpConnection | StraightSocket) -> Iterator[None]:
    """Cut a connection for good that is under way after so long: a peer that drips never runs into its own limit.

    Where no thread is to be had for that, its own limits have to do.
    """
    timer = threading.Timer(seconds, connection.abort, (True,))
    timer.daemon = True
    with contextlib.suppress(StockrtError):
        start_thread(timer)
    try:
        yield
    finally:
        timer.cancel()


def start_tls(sock: socket.socket, host: str) -> socket.socket:
    """Return the socket with TLS on it, `host`'s certificate checked. Raises OSError."""
    import ssl

    return ssl.create_default_context().wrap_socket(sock, server_hostname=host)


# By the name of the exception or of one that it is a kind of; whatever else it is keeps the words of whoever raised it.
_NETWORK_KINDS = {
    "gaierror": "http.no_address",
    "ConnectionRefusedError": "http.refused",
    "RemoteDisconnected": "http.closed",
    "ConnectionError": "http.cut",
    "WebSocketConnectionClosedException": "http.cut",
    "TimeoutError": "http.late",
    "WebSocketTimeoutException": "http.late",
    "SSLCertVerificationError": "http.untrusted",
    "SSLError": "http.tls",
    "IncompleteRead": "http.short",
    "HTTPException": "http.no_http",
}
_LIBRARY_WORDS = (
    r"(?s)\[Errno -?\d+\] |\[\w+(?:: \w+)?\] | \(_ssl\.c:\d+\)| \(configured timeouts: [^)]*\)|<[^>]*> *:? *"
    r"|, (?:full error|Timeout): .*"
)

# An IPv6 address as pymongo writes it in front of a port.
_BARE_ADDRESS = r"(?<![\w.:\[])((?:[0-9a-f]*:){2,}[\w.%]*):(\d+)(?=: )"


def network_words(error: BaseException) -> str:
    """Return what happened on the network in a few words, without names and numbers that mean something to Python."""
    cause = _root_of(error)
    if lack_words(cause):
        return lack_words(cause)
    if isinstance(cause, OSError) and cause.filename:
        return phrase("http.key_log", path=one_line(cause.filename), why=os_words(cause))
    words = error_words(cause)
    if isinstance(words, Phrase):
        return words
    words = plain_words(getattr(cause, "verify_message", "") or words)
    words = one_line(words, 160) or phrase("tools.unknown")
    for kind in type(cause).__mro__:
        if kind.__name__ in _NETWORK_KINDS:
            return phrase(_NETWORK_KINDS[kind.__name__], why=words)
    return os_words(cause) if isinstance(cause, OSError) and words == cause.strerror else words


def plain_words(text: str) -> str:
    """Return what a library says of the network without what means something to its authors alone."""
    # masked before something is taken out of the middle
    return re.sub(_BARE_ADDRESS, r"[\1]:\2", re.sub(_LIBRARY_WORDS, "", mask(text, HIDDEN.secrets)))


def _root_of(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _is_about_a_certificate(error: BaseException) -> bool:
    ssl = sys.modules.get("ssl")  # not imported here: there may be no descriptor for that
    return ssl is not None and isinstance(_root_of(error), ssl.SSLCertVerificationError)


def _foreign_errors() -> tuple[type[Exception], ...]:
    """Return what a request may raise. ValueError, AttributeError: ssl and http.client do when they are cut."""
    plain = (OSError, ValueError, AttributeError)
    try:
        from http.client import HTTPException

        from urllib3.exceptions import HTTPError
    except OSError:  # no descriptor to be had: then nothing else was imported before
        return plain
    return HTTPException, HTTPError, *plain


def _has_nothing_for_us(sock: socket.socket) -> bool:
    """Return whether what there is to read is TLS's own (session tickets), and not the end."""
    import ssl

    timeout = sock.gettimeout()
    sock.settimeout(0.0)
    try:
        sock.recv(1)
    except (BlockingIOError, ssl.SSLWantReadError):
        return True
    except OSError:
        return False
    finally:
        sock.settimeout(timeout)
    return False


# ======================================================================================================
# WebSocket
# ======================================================================================================

# Connecting, TLS and the WebSocket handshake together.
DIAL_LIMITS = Limits(connect_s=5.0, read_s=10.0, whole_s=10.0)
# A peer that takes no byte for this long is dead; the kernel buffers far more than a result.
SEND_TIMEOUT_S = 5.0
# Frames that are handled before results are sent and signals looked at.
FRAMES_AT_ONCE = 100
# And their bytes: to understand 4 MB takes a tenth of a second, and a ping may wait behind.
FRAME_BYTES_AT_ONCE = 1024 * 1024
# As of any HTTP answer's head.
MAX_HANDSHAKE_BYTES = 65536
# What one call of the kernel's gives: at a hundred bytes a frame it is the calls that take the time.
READ_BYTES = 65536
# The first byte of a text frame that is a whole message.
WHOLE_TEXT = 0x81


class WebSocket:
    """An open WebSocket that never blocks in reading; `fileno` is for select. Raises LinkLost from every call.

    `url`: ws:// or wss://, as http:// or https:// too; what is secret in its query is told to nobody but the server.
    `max_bytes`: a longer message is refused with close code 1009. Raises DialError where it cannot be opened.
    """

    def __init__(
        self,
        url: str,
        limits: Limits = DIAL_LIMITS,
        proxies: Proxies = NO_PROXIES,
        headers: Mapping[str, str] = MappingProxyType({}),
        *,
        max_bytes: int,
    ) -> None:
        self._ws = _dial(url, limits, proxies, headers)
        self._ws.frame_buffer.recv = self._read_ahead
        self._sock: socket.socket = self._ws.sock
        self._sock.settimeout(0)
        self._max_bytes = max_bytes
        self.has_more = True  # whether frames may wait that no poll would tell of
        self._unfinished = 0  # bytes of a frame whose rest is still to come

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._sock.fileno()

    def give_up_after(self, seconds: float) -> None:
        """Have the system end the connection where nothing confirms for so long what was sent; Linux does."""
        import socket

        with contextlib.suppress(AttributeError, OSError):
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))

    def frames(self) -> Iterator[str | None]:
        """Yield what has come: a text frame's text, or None for a frame that only shows that the peer lives."""
        from websocket import ABNF

        self.has_more = True
        count = size = 0
        while count < FRAMES_AT_ONCE and size < FRAME_BYTES_AT_ONCE:
            texts = self._texts_at_hand(FRAMES_AT_ONCE - count, FRAME_BYTES_AT_ONCE - size)
            if texts:
                count += len(texts)
                size += sum(map(len, texts))
                for data in texts:
                    yield data.decode("utf-8", "replace")
                continue
            frame = self._next_frame()
            if frame is None:
                self.has_more = False
                if self._long_frame_grew():
                    yield None
                return
            opcode, data = frame
            count += 1
            size += len(data)
            if opcode == ABNF.OPCODE_PING:
                self._send(data, ABNF.OPCODE_PONG)
            yield data.decode("utf-8", "replace") if opcode == ABNF.OPCODE_TEXT else None

    def _texts_at_hand(self, most: int, most_bytes: int) -> list[bytes]:
        """Return the plain text frames at the front of what was read ahead: the library takes ten times as long."""
        buffer = self._ws.frame_buffer
        if buffer.header is not None or self._ws.cont_frame.recving_frames or not buffer.recv_buffer:
            return []
        data = b"".join(buffer.recv_buffer)
        texts: list[bytes] = []
        at, end = 0, len(data)
        while at + 4 <= end and data[at] == WHOLE_TEXT and len(texts) < most and at < most_bytes:
            start, length = at + 2, data[at + 1]
            if length == 126:
                start, length = at + 4, data[at + 2] << 8 | data[at + 3]
            # masked, longer than most, too long or not here yet: the library's
            if data[at + 1] > 126 or length > self._max_bytes or start + length > end:
                break
            at = start + length
            texts.append(data[start:at])
        buffer.recv_buffer = [data[at:]]
        return texts

    def _read_ahead(self, _wanted: int) -> bytes:
        """Read whatever there is: the library keeps what it does not need yet."""
        data = self._sock.recv(READ_BYTES)
        if not data:
            raise LinkLost(phrase("websocket.lost", why=phrase("http.cut")))
        return data

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
            try:
                self._ws.send(data, opcode)
            finally:
                self._sock.settimeout(0)
        except (WebSocketException, OSError) as error:
            raise LinkLost(phrase("websocket.not_sent", why=network_words(error))) from error

    def _next_frame(self) -> tuple[int, bytes] | None:
        """Return the next whole message, or control frame, None when no more has come."""
        import ssl

        from websocket import ABNF, WebSocketException

        ws = self._ws
        try:
            while True:
                frame = ws.recv_frame()
                if frame.opcode == ABNF.OPCODE_CLOSE:
                    raise _closed(frame.data)
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
            raise LinkLost(phrase("websocket.lost", why=network_words(error))) from error

    def _limit(self, size: int) -> None:
        if size > self._max_bytes:
            self.close(1009)
            why = phrase("websocket.large_frame", size=size, most=self._max_bytes)
            raise LinkLost(phrase("websocket.lost", why=why))


def wait_readable(seconds: float, *descriptors: int) -> None:
    """Wait until there is something to read at one of the descriptors, or the time, if it ends, is over."""
    import select

    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    timeout_ms = None
    if seconds < math.inf:
        timeout_ms = math.ceil(max(0.0, seconds) * 1000)
    poll.poll(timeout_ms)


def _closed(data: bytes) -> LinkLost:
    """Return what a close frame's data says: a code, 0 without one, and perhaps why."""
    code = int.from_bytes(data[:2], "big") if len(data) > 1 else 0
    why = one_line(data[2:].decode("utf-8", "replace"), 80)
    words = phrase("websocket.closed")
    if code and why:
        words = phrase("websocket.closed_because", code=code, why=why)
    elif code:
        words = phrase("websocket.closed_with_code", code=code)
    return LinkLost(words, code)


class _ShortAnswer:
    """A socket for a handshake alone: its library takes an answer of any length, and as much as that announces."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._left = MAX_HANDSHAKE_BYTES

    def recv(self, size: int) -> bytes:
        """Receive at most so many bytes. Raises OSError."""
        if not self._left:
            raise OSError(phrase("websocket.large_handshake", size=MAX_HANDSHAKE_BYTES))
        received = self._sock.recv(min(size, self._left))
        self._left -= len(received)
        return received

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


def _dial(url: str, limits: Limits, proxies: Proxies, headers: Mapping[str, str]) -> Any:
    """Open the socket, TLS and the WebSocket, each and all within limits. Raises DialError."""
    try:
        from websocket import WebSocket as Client
        from websocket import WebSocketBadStatusException, WebSocketException
    except OSError as error:
        raise DialError(phrase("websocket.not_connected", why=network_words(error))) from error

    parts = urlsplit(url)
    tls = "s" * (parts.scheme in ("https", "wss"))
    base = f"http{tls}://{parts.netloc}"
    way: HttpConnection | StraightSocket = StraightSocket(base, limits)
    if proxies.for_url(base) is not None:
        way = HttpConnection(base, limits, proxies, tunnel=True)
    try:
        with cut_after(limits.whole_s, way):
            fault = way.open()
            if fault is not None:
                raise DialError(phrase("websocket.not_connected", why=fault.words))
            ws: Any = Client(skip_utf8_validation=True, enable_multithread=False)
            way.sock.settimeout(limits.read_s)
            address = parts._replace(scheme=f"ws{tls}").geturl()
            ws.connect(address, socket=_ShortAnswer(way.sock), redirect_limit=0, header=dict(headers))
            ws.sock = way.sock
    except WebSocketBadStatusException as error:
        way.close()
        status = error.status_code
        words = phrase("websocket.refused", status=status)
        raise DialError(words, status, error.resp_body or b"") from None
    except (WebSocketException, OSError, ValueError) as error:
        way.close()
        raise DialError(phrase("websocket.not_connected", why=way.named(network_words(error)))) from error
    way.let_go()
    return ws


# ======================================================================================================
# Local files
# ======================================================================================================

# How long one process waits for another that writes to the same SQLite file.
SQLITE_BUSY_S = 10.0
# And its primary result code where that was too short.
SQLITE_BUSY = 5
# A file that another process rescues is looked at again so often.
RESCUE_POLL_S = 0.05
# What a file keeps free on the disk for everybody else.
DISK_KEPT_FREE = 0.05
# A file of more unused bytes than this is shrunk.
SHRINK_ABOVE = 16 * 1024 * 1024
# The page size of our files: SQLite's default since 2016.
SQLITE_PAGE = 4096
# What SQLite has open at most for a file: the file, its log, the index of that, and the directory.
SQLITE_FILES = 4
# A log has a header, and one before each page.
WAL_HEAD, WAL_FRAME_HEAD = 32, 24
# What is the same in the headers of all our files (sqlite.org/fileformat2.html#the_database_header): where it stands.
SQLITE_HEADER = {
    0: b"SQLite format 3\0" + SQLITE_PAGE.to_bytes(2) + b"\2\2\0\x40\x20\x20",
    44: (4).to_bytes(4),
    52: bytes(4) + (1).to_bytes(4),
}
# No format of a file of ours is numbered higher.
HIGHEST_FORMAT = 255
# What its primary result codes say of a file: SQLITE_CORRUPT and SQLITE_NOTADB.
SQLITE_DAMAGED = (11, 26)
# A log that is shorter than its index says (SQLITE_IOERR_SHORT_READ); in the file itself it takes that for zeros.
SQLITE_CUT = 522
# This code of its without a further reason: a byte of the header says that others than we may write to the file.
SQLITE_READONLY = 8
# And its words where damage has changed the schema: what is asked of our files is always the same.
SCHEMA_DAMAGED = r"no such (?:table|column)|has no column named|unsupported file format|decode to UTF-8"


def _connect_sqlite(path: Path, wait_s: float = SQLITE_BUSY_S, alone: bool = False) -> sqlite3.Connection:
    """Open a file: WAL, and fsynced at every commit; `alone`: no other may meanwhile. Raises sqlite3.Error."""
    import sqlite3

    make_for_owner(path)
    for side in _sides(path)[1:]:
        with contextlib.suppress(FileNotFoundError):  # they come and go
            keep_owner(side, path.parent)
    db = sqlite3.connect(path, timeout=wait_s, check_same_thread=False)
    try:
        if alone:
            db.execute("PRAGMA locking_mode=EXCLUSIVE")
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        # Debian's SQLite writes zeros over what is deleted: half of the time that a queue takes to be emptied.
        db.execute("PRAGMA secure_delete=OFF")
    except BaseException:
        db.close()
        raise
    return db


def _sqlite_fault(path: Path, error: Exception) -> StoreError:
    """Return what an operator must know of a fault of SQLite, or of the disk below it."""
    if getattr(error, "sqlite_errorcode", 0) & 0xFF == SQLITE_BUSY:
        return StoreError(phrase("files.locked", path=path))
    why = str(error)
    if _is_full(path.parent):
        why = phrase("files.disk_full", why=why)
    with contextlib.ExitStack() as opened:
        try:
            for _ in range(SQLITE_FILES):  # it does not say why it could not open them
                opened.callback(os.close, os.open(path.parent, os.O_RDONLY))
        except OSError as lack:
            why = lack_words(lack) or why
    return StoreError(phrase("files.fails", path=path, why=why))


def _is_full(directory: Path) -> bool:
    """Whether a disk has no room for a page; SQLite says so of some of its files in other words."""
    try:
        found = os.statvfs(directory)
    except OSError:
        return False
    return found.f_bavail * found.f_frsize < SQLITE_PAGE


def _sqlite_errors() -> tuple[type[Exception], ...]:
    """Return what SQLite raises. UnicodeDecodeError: in place of its own, whose words name a damaged name."""
    import sqlite3

    return sqlite3.Error, UnicodeDecodeError


def _is_damage(error: Exception) -> bool:
    if isinstance(error, UnicodeDecodeError):
        return True
    code = getattr(error, "sqlite_errorcode", 0)
    if code & 0xFF in SQLITE_DAMAGED or code in (SQLITE_READONLY, SQLITE_CUT):
        return True
    return re.search(SCHEMA_DAMAGED, str(error)) is not None


def _tables(db: sqlite3.Connection) -> set[Any]:
    """Return what tables and indexes a file has, and of which columns. Raises sqlite3.Error."""
    return set(db.execute("SELECT type, name, sql FROM sqlite_master").fetchall())


@contextlib.contextmanager
def _header_mended(path: Path) -> Iterator[None]:
    """Let SQLite read a file of ours whose header is damaged, as long as its first page is one that leads to tables."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # not there, or not for this user
            file = stack.enter_context(path.open("r+b"))
            old = file.read(101)
            if old[100:] in (b"\x05", b"\x0d"):
                stack.callback(_put, file, {0: old})
                _put(file, SQLITE_HEADER)
        yield


def _put(file: IO[bytes], pieces: Mapping[int, bytes]) -> None:
    for place, piece in pieces.items():
        file.seek(place)
        file.write(piece)
    file.flush()


def _beside(path: Path, end: str) -> Path:
    return path.with_name(path.name + end)


def _sides(path: Path) -> list[Path]:
    """Return a file of SQLite's and what it keeps beside it: the file, the write-ahead log, shared memory."""
    return [_beside(path, end) for end in ("", "-wal", "-shm")]


def damaged_files(directory: Path) -> list[Path]:
    """Return the damaged files that were set aside in a state directory, with what belongs to them."""
    return sorted(directory.glob("*.db.damaged-*"))


def _move(path: Path, target: Path) -> None:
    """Rename a file of SQLite's and what it keeps beside it, as far as they exist."""
    for old, new in zip(_sides(path), _sides(target), strict=True):
        if old.exists():
            old.replace(new)


def _is_forbidden(path: Path) -> bool:
    """Whether a file is there that this user may not read and write. Others may make or remove it meanwhile."""
    mode = os.R_OK | os.W_OK
    return not os.access(path, mode) and path.exists() and not os.access(path, mode)


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
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
            try:
                seen = int(other.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()[1])
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
                    raise
                seen = _frames_seen(write_ahead_log)  # slower, and takes no room
        # -1: another process is at it, which opened it well
        return 0 <= seen < _transactions_end(write_ahead_log)
    finally:
        db.rollback()


def _transactions_end(write_ahead_log: Path) -> int:
    """Return the number of the last frame that ends a transaction, frames of the log's earlier lives left out."""
    with write_ahead_log.open("rb") as stream:
        head = stream.read(WAL_HEAD)
    size = WAL_FRAME_HEAD + SQLITE_PAGE
    frames = [
        (frame[8:16], any(frame[4:8]))  # salts, which change with each life; the end's mark
        for frame in _blocks(write_ahead_log, WAL_HEAD, size)
        if len(frame) == size
    ]
    salts = head[16:24]
    if head[24:] != _wal_checksum(head[:24]):
        salts, _ = max(Counter(salt for salt, _ in frames).items(), key=itemgetter(1), default=(b"", 0))
    return max((number for number, frame in enumerate(frames, 1) if frame == (salts, True)), default=0)


def _frames_seen(write_ahead_log: Path) -> int:
    """Return the last frame up to which SQLite reads a log: it ends a transaction, and all before are good."""
    with write_ahead_log.open("rb") as stream:
        head = stream.read(WAL_HEAD)
    checksum = _wal_checksum(head[:24])
    if head[24:] != checksum:
        return 0
    seen = 0
    for number, frame in enumerate(_blocks(write_ahead_log, WAL_HEAD, WAL_FRAME_HEAD + SQLITE_PAGE), 1):
        checksum = _wal_checksum(frame[:8] + frame[WAL_FRAME_HEAD:], checksum)
        if frame[8:24] != head[16:24] + checksum:
            break
        if any(frame[4:8]):
            seen = number
    return seen


def _blocks(path: Path, start: int, size: int) -> Iterator[bytes]:
    """Yield what a file has from a place on, in blocks of a size. Raises OSError."""
    with path.open("rb") as stream:
        stream.seek(start)
        yield from iter(lambda: stream.read(size), b"")


def _wal_checksum(data: bytes, before: bytes = bytes(8)) -> bytes:
    """Return the checksum of a part of a log, behind one (sqlite.org/fileformat2.html#checksum_algorithm)."""
    older, newer = int.from_bytes(before[:4]), int.from_bytes(before[4:])
    for at in range(0, len(data), 4):  # SQLite writes it as the machine orders bytes
        older, newer = newer, older + newer + int.from_bytes(data[at : at + 4], sys.byteorder) & 0xFFFFFFFF
    return older.to_bytes(4) + newer.to_bytes(4)


# ------------------------------------------------------------------------------------------------------
# Rescue
# ------------------------------------------------------------------------------------------------------

# Rows of a damaged file, about a second's work.
RESCUED_AT_ONCE = 20_000


def rescue(damaged: Path, db: sqlite3.Connection, events: Events) -> int:
    """Copy what can be read of a damaged file into a new one of ours and return how many rows that is.

    `events` is told of progress. Trades are looked for page by page, so that they are found where nothing
    points to them any more. One that was deleted may come back so: it is known to MongoDB then, which does no
    harm.
    """
    with db:
        found = 0
        names = db.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
        for (name,) in names.fetchall():
            if name == "realtime":
                found += _rescue_trades(damaged, db, events)
            else:
                found += _rescue_table(damaged, db, name)
    return found


def _rescue_trades(damaged: Path, db: sqlite3.Connection, events: Events) -> int:
    """Rescue trades in their order of arrival, under new numbers: old ones could be there twice."""
    _, *names = [row[1] for row in db.execute("PRAGMA table_info(realtime)")]
    columns, places = ", ".join(names), ", ".join("?" * len(names))
    db.execute("CREATE TEMP TABLE rescued AS SELECT * FROM realtime LIMIT 0")
    for number, row in enumerate(scan_trades(damaged)):
        db.execute(f"INSERT INTO rescued VALUES (?, {places})", row)  # noqa: S608
        if number % RESCUED_AT_ONCE == 0:
            events.progress()
    done = db.execute(
        f"INSERT INTO realtime ({columns}) SELECT {columns} FROM rescued WHERE true ORDER BY seq "  # noqa: S608
        "ON CONFLICT (_id) DO NOTHING"
    )
    db.execute("DROP TABLE rescued")
    return done.rowcount


def _rescue_table(damaged: Path, db: sqlite3.Connection, name: str) -> int:
    """Rescue a table from both its ends, up to where it cannot be read."""
    before = db.total_changes
    known = [column[1] for column in db.execute(f"PRAGMA table_info({name})")]
    for order in ("", "ORDER BY 1 DESC"):
        for found in _readable_rows(damaged, f"SELECT * FROM {name} {order}"):  # noqa: S608
            row = {column: value for column, value in found.items() if column in known}
            if len(found) == len(known) > len(row):  # a column whose name is damaged is known by its place
                row = dict(zip(known, found.values(), strict=True))
            columns, places = '"' + '", "'.join(row) + '"', ", ".join("?" * len(row))
            insert = f"INSERT OR IGNORE INTO {name} ({columns}) VALUES ({places})"  # noqa: S608
            db.execute(insert, tuple(row.values()))
    return db.total_changes - before


def _readable_rows(damaged: Path, query: str) -> Iterator[dict[str, Any]]:
    """Yield rows, each by the names of its columns, up to the first that cannot be read."""
    import sqlite3

    try:
        with contextlib.closing(sqlite3.connect(damaged)) as old:
            old.execute("PRAGMA writable_schema = ON")  # a damaged entry of the schema hides no other one
            rows = old.execute(query)
            names = [column[0] for column in rows.description]
            for row in rows:
                yield dict(zip(names, row, strict=True))
    except _sqlite_errors() as error:
        log.debug("%s: %s", damaged, error)


def scan_trades(path: Path) -> Iterator[tuple[Any, ...]]:
    """Yield rows of `realtime` from the pages of a file and of its log, whether or not they are in use.

    The layout is that of SQLite's file format (sqlite.org/fileformat2.html); a row counts only if its
    `_id` follows from its fields.
    """
    file, write_ahead_log, _ = _sides(path)
    # the log first: somebody may still move pages from it into the file
    for source, start, skip in ((write_ahead_log, WAL_HEAD, WAL_FRAME_HEAD), (file, 0, 0)):
        with contextlib.suppress(OSError):  # not there, or not for this user
            for block in _blocks(source, start, skip + SQLITE_PAGE):
                yield from _leaf_rows(block[skip:])


def _leaf_rows(page: bytes) -> Iterator[tuple[Any, ...]]:
    """Yield the trades of a page, if it is a leaf of a table."""
    if page[:1] != b"\x0d":
        return
    for number in range(min(int.from_bytes(page[3:5]), (len(page) - 8) // 2)):
        with contextlib.suppress(IndexError, ValueError):  # no row, or none of ours
            yield _row_at(page, int.from_bytes(page[8 + 2 * number : 10 + 2 * number]))


def _row_at(page: bytes, at: int) -> tuple[Any, ...]:
    """Return the trade at a place of a page. Raises IndexError, ValueError where there is none, or none of ours."""
    _, at = _varint(page, at)  # the row's length
    number, start = _varint(page, at)
    size, at = _varint(page, start)
    kinds = []
    while at < start + size:
        kind, at = _varint(page, at)
        kinds.append(kind)
    values: list[Any] = []
    for kind in kinds:
        value, at = _value_at(page, kind, at)
        values.append(value)
    _, name, s, t, p, v, vw, td, code, created, demo = values
    if name != f"{s}|{t}|{p}|{v}|{td}" or code != s or not isinstance(vw, str) or demo not in (None, 1):
        raise ValueError
    datetime.fromisoformat(str(created))
    return (number, *values[1:])


def _varint(page: bytes, at: int) -> tuple[int, int]:
    """Return SQLite's variable-length integer at a place, and the place behind it."""
    value = 0
    for place in range(at, at + 8):
        value = value << 7 | page[place] & 0x7F
        if page[place] < 0x80:
            return value, place + 1
    return value << 8 | page[at + 8], at + 9


def _value_at(page: bytes, kind: int, at: int) -> tuple[str | int | None, int]:
    """Return a value of a serial type and the place behind it; ValueError for types that trades do not have."""
    if kind in (0, 8, 9):
        return {0: None, 8: 0, 9: 1}[kind], at
    if 1 <= kind <= 6:
        end = at + (1, 2, 3, 4, 6, 8)[kind - 1]
        return int.from_bytes(page[at:end], signed=True), end
    if kind < 13 or not kind % 2:
        raise ValueError
    end = at + (kind - 13) // 2
    if end > len(page):
        raise ValueError
    return page[at:end].decode(), end


# ------------------------------------------------------------------------------------------------------
# The file
# ------------------------------------------------------------------------------------------------------


class LocalFile:
    """One of our SQLite files: WAL, fsynced at every commit, crash-only. Every method may be called by any thread.

    Whoever has it open holds its lock (`stockrt.db.lock`) shared. A file that is damaged, or of another user, is
    set aside when it is opened, and rescued under the lock alone (promise 6): a gigabyte takes a minute, during
    which `events` is told of progress. Damage that shows later is noted beside the file and ends its use here:
    `events` is told, every call raises StoreError from then on, and the next one to open the file rescues it.

    Raises StoreError when the file cannot be used, is in use although it is damaged, or was written by a newer
    stockrt. With `patient` what is no fault of the file, as a lock that another program holds, or a full disk, is
    raised by each use until one finds it over, and by none waited for here; without it a file is read on a full
    disk, too, by this process alone. Used with `with`, which closes it.
    """

    def __init__(
        self,
        path: Path,
        version: int,
        schema: str,
        events: Events = NO_EVENTS,
        patient: bool = False,
        additions: tuple[int, str] = (HIGHEST_FORMAT, ""),
    ) -> None:

        make_state_directory(path.parent)
        self.path = path
        self.lock = threading.RLock()  # held for every use: by a thread that needs several at one moment, too
        self._version = version
        self._schema = schema
        # from which format on these statements alone bring a file up to the version
        self._additions = additions
        self._events = events
        self._patient = patient
        self._db: sqlite3.Connection | None = None
        self._fault: StoreError | None = None  # what ended its use
        lock = _beside(path, ".lock")
        with disk_trouble(phrase("files.lock_not_opened", path=lock)):
            make_for_owner(lock)
            self._locked = open_plain(lock, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW)
        try:
            self._open(0.0 if patient else SQLITE_BUSY_S)
        except BaseException as error:
            if isinstance(error, _sqlite_errors()):
                if patient:
                    return
                self.close()
                raise _sqlite_fault(path, error) from error
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """Give the connection in a transaction that is on disk when the block ends; in another one it is a part of it.

        Raises StoreError.
        """
        with self._guarded() as db:
            if db.in_transaction:
                yield db
                return
            with db:
                db.execute("BEGIN IMMEDIATE")
                yield db
        if self._inodes != self._inodes_now():
            raise self._taken_away()

    def read_one(self, query: str, *values: object) -> Any:
        """Return a query's first row, None without one. Raises StoreError."""
        with self._guarded() as db:
            return db.execute(query, values).fetchone()

    def read_all(self, query: str, *values: object) -> list[Any]:
        """Return a query's rows. Raises StoreError."""
        with self._guarded() as db:
            return db.execute(query, values).fetchall()

    def shrink(self) -> None:
        """Give unused space back to the disk, as far as nobody else reads the file now. Raises StoreError."""
        self.read_all("VACUUM")
        self.empty_log()

    def empty_log(self) -> None:
        """Move the write-ahead log into the file, as far as nobody else reads it now. Raises StoreError."""
        self.read_all("PRAGMA wal_checkpoint(TRUNCATE)")

    def pages(self) -> tuple[int, int]:
        """Return how many pages the file has, and how many of them are unused. Raises StoreError."""
        (pages,) = self.read_one("PRAGMA page_count")
        (unused,) = self.read_one("PRAGMA freelist_count")
        return pages, unused

    def why_no_room(self, more: int) -> str:
        """Return why so many bytes more are too many for the disk, '' where they are not. Raises StoreError."""
        with disk_trouble(phrase("files.disk_unseen", path=self.path)):
            disk = os.statvfs(self.path.parent)
        if disk.f_bavail * disk.f_frsize - more >= disk.f_blocks * disk.f_frsize * DISK_KEPT_FREE:
            return ""
        return phrase("files.no_room", path=self.path, kept=DISK_KEPT_FREE)

    def bytes_beside(self) -> int:
        """Return the size of what SQLite keeps beside the file, in bytes. Raises StoreError."""
        with disk_trouble(phrase("files.unseen", path=self.path)):
            return sum(_size_of(side) for side in _sides(self.path)[1:])

    def damaged(self, words: str) -> StoreError:
        """Note damage that shows while the file is in use, and return what to raise."""
        try:
            write_whole(self._mark, json.dumps(packed(words)), durable=True)
        except StoreError as fault:
            log.error("the next start may not see that %s is damaged: %s", self.path, fault)
        return self._end_use(StoreError(phrase("files.damaged", path=self.path, damage=words)))

    def close(self) -> None:
        """Close the file, and let its lock go."""
        with self.lock:
            self._disconnect()
            self._fault = self._fault or StoreError(phrase("files.closed", path=self.path))
            if self._locked >= 0:
                os.close(self._locked)
            self._locked = -1

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[sqlite3.Connection]:
        """Give the connection to one thread, and turn what SQLite raises into StoreError."""

        with self.lock:
            if self._fault is not None:
                raise self._fault
            try:
                if self._db is None:
                    self._open_late()
                yield cast("sqlite3.Connection", self._db)
            except _sqlite_errors() as error:
                if _is_damage(error):
                    raise self.damaged(one_line(error)) from error
                raise _sqlite_fault(self.path, error) from error

    def _inodes_now(self) -> list[tuple[int, int] | None]:
        """Return which files stand under the names of this one and of what SQLite keeps beside it."""
        return [_inode(side) for side in _sides(self.path)]

    def _taken_away(self) -> StoreError:
        """End the use of files that nobody can find any more: SQLite would go on writing to them."""
        missing = zip(_sides(self.path), self._inodes, self._inodes_now(), strict=True)
        name = next(side for side, before, now in missing if before != now)
        error = self._end_use(StoreError(phrase("files.taken_away", path=name)))
        with self.lock:
            self._disconnect()  # which brings what its log has into the file, where that is there
        return error

    def _end_use(self, error: StoreError) -> StoreError:
        """Let every further call raise an error, tell it, and return it."""
        with self.lock:
            self._fault = error
        self._events.damaged(error)
        return error

    def _disconnect(self) -> None:
        if self._db is not None:
            self._db.close()
        self._db = None

    def _open_late(self) -> None:
        """Open what could not be opened at the start. Raises sqlite3.Error, StoreError."""
        try:
            self._open(SQLITE_BUSY_S)
        except StoreError as error:
            raise self._end_use(error) from error

    def _open(self, wait_s: float) -> None:
        """Lock and open the file; a damaged one is set aside first. Raises sqlite3.Error, StoreError."""
        import fcntl

        try:
            with disk_trouble(phrase("files.not_opened", path=self.path)):
                self._open_locked(wait_s)
                self._inodes = self._inodes_now()
        except _sqlite_errors():
            self._disconnect()
            fcntl.flock(self._locked, fcntl.LOCK_UN)
            raise

    def _open_locked(self, wait_s: float) -> None:
        for odd in filter(is_odd_file, (self._mark, *_sides(self.path))):
            why = phrase("tools.odd_file")
            raise StoreError(phrase("settings.unusable_path", name="STATE_DIRECTORY", path=odd, why=why))
        if not self._lock_alone():
            self._lock_shared()
        damage = self._connect(wait_s)
        if damage:
            if not self._lock_alone():
                raise StoreError(phrase("files.damaged_and_open", path=self.path, damage=damage))
            self._set_aside(damage)
            damage = self._connect(wait_s)
        if damage:
            raise StoreError(phrase("files.unusable", path=self.path, damage=damage))
        self._lock_shared()

    def _lock_alone(self) -> bool:
        """Try to be the only one who has the file open, and return whether that is so."""
        import fcntl

        try:
            fcntl.flock(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _lock_shared(self) -> None:
        """Take the lock together with others, once nobody has it alone."""
        import fcntl

        while True:
            try:
                fcntl.flock(self._locked, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                self._events.progress()
                time.sleep(RESCUE_POLL_S)

    def _connect(self, wait_s: float) -> str:
        """Connect to the file and return what is wrong with it, '' where nothing is.

        Another program that holds its lock is waited for so long, and by each later use for SQLITE_BUSY_S.

        With a torn log it stays connected: to close it would empty the log.
        """

        if any(side.exists() for side in _sides(self._away)):
            return phrase("files.rescue_interrupted")
        if self._mark.exists():
            told = self._mark.read_text(encoding="utf-8", errors="replace")
            with contextlib.suppress(ValueError, RecursionError):  # an older version's is the text alone
                told = unpacked(json.loads(told))
            return one_line(told) or phrase("files.marked")
        # SQLite would take it for new, a single byte as well, and drop the log
        if _size_of(self.path) <= 1 and _size_of(_sides(self.path)[1]):
            return phrase("files.beheaded")
        if any(_is_forbidden(side) for side in _sides(self.path)):
            return phrase("files.forbidden")
        try:
            self._db = self._connection(wait_s)
            if _log_is_torn(self._db, self.path):
                return phrase("files.torn_log")
            damage = self._bring_up(self._db)
            self._db.execute(f"PRAGMA busy_timeout = {SQLITE_BUSY_S * 1000:.0f}")
        except _sqlite_errors() as error:
            if not _is_damage(error):
                raise
            damage = one_line(error)
        if damage:
            self._disconnect()
        return damage

    def _connection(self, wait_s: float) -> sqlite3.Connection:
        try:
            return _connect_sqlite(self.path, wait_s)
        except _sqlite_errors():
            if self._patient or not _is_full(self.path.parent):
                raise
        # the index that processes share finds no room
        return _connect_sqlite(self.path, wait_s, alone=True)

    def _bring_up(self, db: sqlite3.Connection) -> str:
        """Bring a file up to the version that this stockrt knows, and return what is wrong with it, '' for nothing.

        Raises sqlite3.Error, StoreError.
        """
        (found,) = db.execute("PRAGMA user_version").fetchone()
        if found == self._version:
            return ""
        tables = _tables(db)
        is_ours = bool(tables) and tables == self._own_tables()
        if not 0 <= found <= HIGHEST_FORMAT or (found < self._version and is_ours):
            return phrase("files.damaged_header", found=found)
        if found > self._version:
            newer = phrase("files.newer", path=self.path, found=found, known=self._version)
            raise StoreError(
                phrase("files.newer_or_damaged", newer=newer, mark=self._mark) if is_ours else newer
            )
        since, script = self._additions
        if found < since:
            script = self._schema
        db.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {self._version}; COMMIT;")
        return ""

    def _own_tables(self) -> set[Any]:
        """Return what `_tables` does of a file that this stockrt has made."""
        import sqlite3

        with contextlib.closing(sqlite3.connect(":memory:")) as db:
            db.executescript(self._schema)
            return _tables(db)

    @property
    def _away(self) -> Path:
        """The name of a file that is being rescued; what has it after a kill is rescued once more."""
        return _beside(self.path, ".setting-aside")

    @property
    def _mark(self) -> Path:
        """The file that says that damage has shown, and in which words."""
        return _beside(self.path, ".damaged")

    def _set_aside(self, damage: str) -> None:
        """Put a new file in the place of the old one, with what can be read of it."""
        rescued = None
        if not (self.path.exists() and any(side.exists() for side in _sides(self._away))):
            _move(self.path, self._away)  # its log alone, where a kill came in between
            rescued = self._rescue()
        aside = _beside(self.path, f".damaged-{datetime.now(UTC):%Y%m%dT%H%M%S.%f}Z")
        _move(self._away, aside)
        sync_directory(self.path.parent)
        kind = "files.set_aside_again" if rescued is None else "files.set_aside"
        self._events.set_aside(phrase(kind, path=self.path, damage=damage, aside=aside.name, rows=rescued))

    def _rescue(self) -> int:
        """Make the new file of what can be read of the old one, and return how many rows that is."""
        fresh = _beside(self.path, ".rescue")
        for side in _sides(fresh):
            side.unlink(missing_ok=True)
        with contextlib.closing(_connect_sqlite(fresh)) as db:
            self._bring_up(db)
            with _header_mended(self._away):
                rescued = rescue(self._away, db, self._events)
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        self._disconnect()  # not before: the last one to close a damaged log empties it
        self._mark.unlink(missing_ok=True)
        fresh.replace(self.path)
        return rescued


# ------------------------------------------------------------------------------------------------------
# The stores' file
# ------------------------------------------------------------------------------------------------------

SQLITE_NAME = "stockrt.db"
SQLITE_VERSION = 7
# IF NOT EXISTS: two processes may open a new file at the same moment.
_SQLITE_TABLES = """
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
CREATE TABLE IF NOT EXISTS sessions (       -- of which closes are to be made final, and the newest that are
    code TEXT, date TEXT,
    stage INTEGER NOT NULL,                 -- see Stage
    due INTEGER NOT NULL,                   -- epoch seconds: then it is looked at
    tries INTEGER NOT NULL,
    PRIMARY KEY (code, date)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS sessions_due ON sessions (due) WHERE stage < 3;
CREATE TABLE IF NOT EXISTS backfilled (     -- what --backfill has asked for
    code TEXT PRIMARY KEY,
    first TEXT NOT NULL, last TEXT NOT NULL,  -- the dates between which everything is final
    asked INTEGER NOT NULL, closes INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS unsettled (      -- trades that MongoDB has, whose closes could not be made
    _id TEXT PRIMARY KEY,
    s TEXT NOT NULL, t INTEGER NOT NULL,
    p TEXT NOT NULL, v TEXT NOT NULL, vw TEXT NOT NULL, td INTEGER NOT NULL,
    stock_code TEXT NOT NULL,
    create_time TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS stream_gaps (    -- when the stream did not bring every trade
    _id TEXT PRIMARY KEY,                   -- instance|product|from
    instance TEXT NOT NULL, product TEXT NOT NULL,
    codes TEXT NOT NULL,                    -- a JSON list
    "from" INTEGER NOT NULL, "to" INTEGER,  -- epoch ms by the clock of this machine; NULL: it goes on
    why TEXT NOT NULL,
    create_time TEXT NOT NULL,              -- UTC, ISO 8601
    delivered INTEGER NOT NULL DEFAULT 0    -- whether MongoDB has it as it stands here
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS key_usage (
    digest TEXT, day TEXT, used INTEGER NOT NULL, PRIMARY KEY (digest, day)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS key_pace (
    digest TEXT PRIMARY KEY, pace TEXT NOT NULL  -- JSON: Pace.stored
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS symbols (        -- what exists, by the API's lists
    type TEXT NOT NULL, code TEXT NOT NULL,
    name_cn TEXT NOT NULL, name_hk TEXT NOT NULL, name_en TEXT NOT NULL,
    PRIMARY KEY (code, type)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS symbol_lists (
    type TEXT PRIMARY KEY, asked_on TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS key_package (    -- what the API said of each key last
    digest TEXT PRIMARY KEY, asked_on TEXT NOT NULL,
    name TEXT NOT NULL, per_second REAL NOT NULL,
    ends REAL NOT NULL,                     -- epoch seconds, 0: not told
    connections INTEGER, per_connection INTEGER, in_all INTEGER -- of the stream, NULL: not told
) WITHOUT ROWID;
DROP TABLE IF EXISTS key_plan;
DROP TABLE IF EXISTS calendar;
"""
# A file without final closes, of an older format or new. From format 5 on it has them, and they stay as they are.
_CLOSES_SINCE = 5
_SQLITE_CLOSES = """
CREATE TABLE IF NOT EXISTS close (          -- as it was up to format 4
    _id TEXT PRIMARY KEY,
    date TEXT NOT NULL,
    s TEXT NOT NULL, t INTEGER NOT NULL,
    p TEXT NOT NULL, v TEXT NOT NULL, vw TEXT NOT NULL, td INTEGER NOT NULL,
    stock_code TEXT NOT NULL,
    after_hours INTEGER,
    create_time TEXT NOT NULL, update_time TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE new_close (
    _id TEXT PRIMARY KEY,                   -- code|date
    date TEXT NOT NULL,                     -- of the session, on the exchange's calendar
    s TEXT NOT NULL, t INTEGER NOT NULL,
    p TEXT NOT NULL, v TEXT NOT NULL, vw TEXT NOT NULL, td INTEGER NOT NULL,
    stock_code TEXT NOT NULL,
    after_hours INTEGER, provisional INTEGER,
    open TEXT, high TEXT, low TEXT, close TEXT, volume TEXT, turnover TEXT,  -- of the daily bar: it is final
    create_time TEXT NOT NULL, update_time TEXT NOT NULL
) WITHOUT ROWID;
INSERT INTO new_close (_id, date, s, t, p, v, vw, td, stock_code, after_hours, provisional, create_time, update_time)
    SELECT _id, date, s, t, p, v, vw, td, stock_code, after_hours,
           CASE WHEN stock_code GLOB '*.*' OR stock_code GLOB '*USD[TC]' THEN 1 END, create_time, update_time
    FROM close;
DROP TABLE close;
ALTER TABLE new_close RENAME TO close;
"""


def open_store_file(directory: Path, events: Events = NO_EVENTS, patient: bool = False) -> LocalFile:
    """Open the file that the store, what waits for MongoDB, the keys' counts and the sessions share: once a process.

    `patient` as for LocalFile. Raises StoreError.
    """
    schema, additions = _SQLITE_TABLES + _SQLITE_CLOSES, (_CLOSES_SINCE, _SQLITE_TABLES)
    return LocalFile(directory / SQLITE_NAME, SQLITE_VERSION, schema, events, patient, additions)


# ======================================================================================================
# Quota: API keys and their request rates
# ======================================================================================================

# Two requests sent a second apart can arrive a little less than a second apart: kept between windows.
WINDOW_MARGIN_S = 0.03
# A key that comes back later than this is not waited for: the batch fails and says when it returns.
LONGEST_WAIT_FOR_KEY_S = 60.0
# After a refusal for its rate a key goes at half its pace for this long.
SLOW_FOR_S = 60.0
# A key that was refused on the way rests so long, a run's patience at least, and twice as long each time up to an hour.
DOUBT_FIRST_S, DOUBT_CAP_S = LONGEST_WAIT_FOR_KEY_S + 1, 3600.0
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

    def taken(self) -> tuple[float, ...]:
        """Return when the last requests were made, the oldest first."""
        return tuple(self._taken)


def key_digest(secret: str) -> str:
    """Return what stands for a key wherever counts are kept: never the key."""
    return sha256(secret.encode())[:16]


class Lease(NamedTuple):
    """Requests that a ledger grants until `until`; 0: none before `until`.

    `until` is epoch seconds; `why` says which limit is used up. `slots`: when each may be made (epoch seconds) and
    for how long from then on, where others use the key too; without any the key's own windows are all.
    """

    requests: int
    until: float
    why: str = ""
    slots: tuple[float, ...] = ()
    life_s: float = 0.0


UNLIMITED = Lease(1_000_000_000, float("inf"))


class Ledger(Protocol):
    """Counts a key's requests beyond this process: over restarts, or together with other instances.

    `now` is epoch seconds. Never raises: a count that cannot be kept is said, and the work goes on.
    """

    def lease(self, digest: str, plan: Plan, now: float, made: Sequence[float] = ()) -> Lease:
        """Take some requests of a key out of its limits; `made`: when those of the lease before were made."""

    def give_back(
        self, digest: str, plan: Plan, lease: Lease, now: float, made: Sequence[float] = ()
    ) -> None:
        """Take the requests of a lease off the counts: it was leased today (UTC), and they were not made."""

    def used_today(self, digest: str, now: float) -> int | None:
        """Return how many requests of the key were leased today (UTC), None where that cannot be known."""


class ApiKey:
    """One key: its windows, its lease, and whether it is out (for good, for a product, or until a time)."""

    def __init__(self, secret: str, plan: Plan) -> None:
        self.secret = secret
        self.plan = plan
        self.digest = key_digest(secret)
        self.windows = [SlidingWindow(limit, seconds) for limit, seconds in plan.windows()]
        self.lease = Lease(0, 0.0)
        self.leased_on = ""  # UTC date
        self.slots: deque[float] = deque()  # those of the lease that are left, monotonic
        self.made: list[float] = []  # epoch seconds of requests that the ledger does not know of yet
        self.dead = ""
        self.closed_products: dict[str, str] = {}
        self.paused_until = 0.0
        self.paused_why = ""
        self.slow_until = 0.0
        self.doubt_s = 0.0  # how long it rests, or rested, because something on the way refused it

    def go_by(self, plan: Plan) -> None:
        """Keep another plan from now on; what was asked before counts."""
        before = max((window.taken() for window in self.windows), key=len, default=())
        self.plan = plan
        self.windows = [SlidingWindow(limit, seconds) for limit, seconds in plan.windows()]
        for window in self.windows:
            for moment in before:
                window.take(moment)

    @property
    def shown(self) -> str:
        """The key as a person may see it: its first and last three characters."""
        return f"{self.secret[:3]}…{self.secret[-3:]}" if len(self.secret) >= 16 else "***"

    def refusal(self, product: str) -> str:
        """Return why the key cannot serve a product (or its bars: `stock bars`) at all, '' if it can."""
        closed = self.closed_products
        return self.dead or closed.get(product, "") or closed.get(product.removesuffix(OF_BARS), "")

    def ready_at(self, now: float) -> float:
        """Return the earliest time at which the key may be used again."""
        pace = 2.0 if now < self.slow_until else 1.0
        slots = islice(self.slots, 1)
        return max([now, self.paused_until, *slots, *(window.ready_at(now, pace) for window in self.windows)])

    def pass_over_late_slots(self, now: float) -> None:
        """Forget the slots of the lease whose time is over."""
        while self.slots and self.slots[0] + self.lease.life_s < now:
            self.slots.popleft()


class KeyState(TypedDict):
    """What the status shows of a key: why it is out or rests, until when (ISO 8601 UTC), what it does not serve.

    `leased`: requests that are counted today and not made yet.
    """

    digest: str
    leased: int
    state: Literal["ready", "resting", "out"]
    why: str
    until: str
    not_for: list[str]


class KeyPool:
    """Hands out keys so that no key is ever asked more often than its plan allows; thread-safe.

    Requests go to the key that is ready first, so the total rate is the sum of the keys' rates. Windows and
    rests go by the clock's monotonic time, days and leases by that of the wall. While the ledger answers, every
    thread that wants a key waits: it is asked for many requests at once.
    """

    def __init__(
        self,
        keys: Sequence[tuple[str, Plan]],
        ledger: Ledger,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.keys = [ApiKey(secret, plan) for secret, plan in keys]
        self.ledger = ledger
        self._clock = clock
        self._changed = threading.Condition()

    def rate(self) -> float:
        """Return the requests per second of all living keys together; infinite without a limit."""
        rates = [key.plan.per_second for key in self.keys if not key.dead]
        return float("inf") if 0 in rates else sum(rates)

    def acquire(self, product: str, stop: threading.Event, only: ApiKey | None = None) -> ApiKey:
        """Wait until a key (or `only` this one) may be used for `product`, count the request, and return the key.

        Raises NoKeyError when none can serve soon, Interrupted when `stop` is set meanwhile.
        """
        with self._changed:
            while not stop.is_set():
                got = self.try_acquire(product, only)
                if isinstance(got, ApiKey):
                    return got
                self._changed.wait(min(got, STOP_POLL_S))
        raise Interrupted(phrase("tools.stopped"))

    def try_acquire(self, product: str, only: ApiKey | None = None) -> ApiKey | float:
        """Return a key for a request that is made now, and count it, or the seconds after which to ask again.

        Raises NoKeyError when none can serve soon.
        """
        with self._changed:
            while True:
                now = self._clock.monotonic()
                key = self._first_ready(product, now, only)
                if key is None or key.paused_until - now > LONGEST_WAIT_FOR_KEY_S:
                    raise NoKeyError(self._why_none(product, now))
                wait = key.ready_at(now) - now
                if wait > 0:
                    return wait
                if self._take_leased(key, now):
                    return key
                self._lease(key)

    def set_plan(self, key: ApiKey, plan: Plan) -> None:
        """Let a key go by another plan from now on."""
        with self._changed:
            if plan == key.plan:
                return
            self._give_back(key, self._clock.wall())
            key.go_by(plan)
            self._changed.notify_all()

    def retire(self, key: ApiKey, why: str) -> None:
        """Never use a key again, until settings are read anew."""
        with self._changed:
            if key.dead:
                return
            key.dead = why
            log.error("API key %s is out: %s; mend INFOWAY_API_KEY, then reload or restart", key.shown, why)
            self._changed.notify_all()

    def close_product(self, key: ApiKey, product: str, why: str) -> None:
        """Never use a key for this product again."""
        with self._changed:
            if product in key.closed_products:
                return
            key.closed_products[product] = why
            log.warning("API key %s does not serve %s: %s", key.shown, product, why)
            self._changed.notify_all()

    def rest_until_midnight(self, key: ApiKey, why: str) -> None:
        """Let a key rest until its next day (UTC) begins."""
        now = self._clock.wall()
        self._rest(key, next_midnight(now) - now + MIDNIGHT_MARGIN_S, why)

    def doubt(self, key: ApiKey, why: str) -> None:
        """Let a key rest that something on the way refused: a minute, twice as long each time until `trust`."""
        with self._changed:
            if key.paused_until > self._clock.monotonic():
                return  # this request was under way when another one was refused
            key.doubt_s = min(DOUBT_CAP_S, key.doubt_s * 2 or DOUBT_FIRST_S)
            self._rest(key, key.doubt_s, why)

    def trust(self, key: ApiKey) -> None:
        """Note that the API took a key."""
        if key.doubt_s:
            with self._changed:
                key.doubt_s, key.paused_why = 0.0, ""
            log.info("API key %s is taken again", key.shown)

    def slow_down(self, key: ApiKey, seconds: float, why: str) -> None:
        """Let a key rest for some seconds, and go at half its pace for a while."""
        with self._changed:
            self._rest(key, seconds, why)
            key.slow_until = self._clock.monotonic() + SLOW_FOR_S

    def close(self) -> None:
        """Give back what is leased and was not used."""
        with self._changed:
            for key in self.keys:
                self._give_back(key, self._clock.wall(), closing=True)

    def describe(self) -> list[KeyState]:
        """Return the state of each key."""
        with self._changed:
            return [self._state_of(key) for key in self.keys]

    def _state_of(self, key: ApiKey) -> KeyState:
        not_for = sorted(key.closed_products)
        rest_s = key.paused_until - self._clock.monotonic()
        leased = 0
        if key.plan.per_day and key.leased_on == utc_day(self._clock.wall()):
            leased = max(0, key.lease.requests)
        state = KeyState(digest=key.digest, leased=leased, state="ready", why="", until="", not_for=not_for)
        if key.dead:
            state |= {"state": "out", "why": key.dead}
        elif rest_s > 0:
            until = iso_after(self._clock.wall(), rest_s)
            state |= {"state": "resting", "why": key.paused_why, "until": until}
        return state

    def _first_ready(self, product: str, now: float, only: ApiKey | None) -> ApiKey | None:
        usable = [key for key in self.keys if not key.refusal(product) and only in (None, key)]
        for key in usable:
            key.pass_over_late_slots(now)
        return min(usable, key=lambda key: key.ready_at(now), default=None)

    def _take_leased(self, key: ApiKey, now: float) -> bool:
        """Take one request from the key's lease and count it; return False where the lease is over."""
        wall = self._clock.wall()
        if key.lease.requests <= 0 or wall >= key.lease.until:
            return False
        if key.lease.slots:
            if not key.slots:
                return False
            key.slots.popleft()
            key.made.append(wall)
        key.lease = key.lease._replace(requests=key.lease.requests - 1)
        for window in key.windows:
            window.take(now)
        return True

    def _lease(self, key: ApiKey) -> None:
        """Ask the ledger for a new lease. It may take long: after it the key is chosen anew."""
        wall = self._clock.wall()
        self._give_back(key, wall)
        key.lease = self.ledger.lease(key.digest, key.plan, wall, key.made)
        key.made = []
        now, wall = self._clock.monotonic(), self._clock.wall()  # it may have taken long
        key.slots = deque(now + (slot - wall) for slot in key.lease.slots)
        if not key.lease.requests:
            self._rest(key, max(MIN_REST_S, key.lease.until - wall), key.lease.why)

    def _give_back(self, key: ApiKey, wall: float, closing: bool = False) -> None:
        counted = utc_day(wall) == key.leased_on and key.lease.until < UNLIMITED.until
        over = key.lease._replace(requests=key.lease.requests if counted else 0)
        if over.requests or (closing and over.slots):
            self.ledger.give_back(key.digest, key.plan, over, wall, key.made)
            key.made = []
        key.slots.clear()
        key.lease, key.leased_on = Lease(0, 0.0), utc_day(wall)

    def _rest(self, key: ApiKey, seconds: float, why: str) -> None:
        """Let a key rest; a shorter rest neither shortens a longer one nor changes its reason."""
        with self._changed:
            until = self._clock.monotonic() + seconds
            if until <= key.paused_until:
                return
            if seconds > LONGEST_WAIT_FOR_KEY_S and key.paused_why != why:
                back = iso_after(self._clock.wall(), seconds)
                log.warning("API key %s rests until %s: %s", key.shown, back, why)
            key.paused_until, key.paused_why = until, why
            self._changed.notify_all()

    def _why_none(self, product: str, now: float) -> str:
        if not self.keys:
            return phrase("quota.no_key")
        reasons = listing(
            "join.clauses",
            [phrase("quota.key", key=key.shown, why=self._why_not(key, product, now)) for key in self.keys],
        )
        return see(
            phrase("quota.none_serves", service=service_words(product), reasons=reasons), "INFOWAY_API_KEY"
        )

    def _why_not(self, key: ApiKey, product: str, now: float) -> str:
        back = iso_after(self._clock.wall(), max(0.0, key.paused_until - now))
        return key.refusal(product) or phrase("quota.back_at", why=key.paused_why, back=back)


def service_words(service: str) -> str:
    """Return what a person reads of a product, or of its bars: `stock bars`."""
    product = service.removesuffix(OF_BARS)
    return service if product == service else phrase("quota.bars", product=product)


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
# A slot of a key that others use too is for so long (and while its lease is on its way): a wake-up may be late, and
# what it is late the others wait. Nobody else's slots are near: no other use of the time.
SHARED_SLOT_S, ALONE_SLOT_S = 0.02, 0.5
# Whose slots ended this long ago is not there any more.
OTHERS_S = 3.0
# No slot lies farther ahead; those of several holders of the slowest plan would.
FARTHEST_SLOT_S = 300.0
# A greater rate than any plan's: its second is kept by each process alone, as its slots would be too many to write.
FASTEST_PACED = 100.0
# With MongoDB away each instance counts alone, and asks it again after this time.
LEDGER_RETRY_S = 30.0
LEDGER_TIMEOUT_S = 2.0
# Instances that write the same key's count at the same moment try again; each try lets one of them through.
LEDGER_TRIES = 50
# MongoDB's code for a right that the user lacks.
UNAUTHORIZED = 13


class Pace:
    """When the requests of a key are made by all who share it, so that none of its seconds holds more than the plan's.

    Pure; all times are epoch seconds. `made`: requests that were made. `held`: of each holder of a lease the latest
    times at which it may make those that it was granted. A slot begins when, whatever becomes of both, fewer than
    the limit can lie in the window before it.
    """

    def __init__(self, stored: Mapping[str, Any], plan: Plan, now: float) -> None:
        self._limit, self._seconds = plan.windows()[0]
        self._now = now
        self.made = self._near(stored.get("made"))
        held = stored.get("held")
        nearby = {name: self._near(times) for name, times in held.items()} if isinstance(held, dict) else {}
        self.held = {name: times for name, times in nearby.items() if times}

    def settle(self, holder: str, made: Sequence[float]) -> None:
        """Note when the requests of a lease were made; those that were not are free again."""
        self.held.pop(holder, None)
        self.made += self._near(list(made))

    def slots(self, count: int, now: float, took_s: float) -> tuple[list[float], float]:
        """Return from when on each of up to so many requests may be made, and for how long from then on.

        Who shares the key with nobody has long: its own windows keep its own requests apart. Others get few at a
        time, as what they do not use in time is lost. `took_s`: what a lease takes to arrive.
        """
        life_s = ALONE_SLOT_S
        if self.held:
            life_s = SHARED_SLOT_S + 2 * took_s
            count = min(count, max(1, self._limit // SHARES_PER_SLICE))
        taken = sorted([*self.made, *(time for times in self.held.values() for time in times)])
        slots = []
        for _ in range(count):
            ready = now
            if len(taken) >= self._limit:
                ready = max(now, taken[-self._limit] + self._seconds + WINDOW_MARGIN_S)
            slots.append(ready)
            insort(taken, ready + life_s if self.held else ready)
        return slots, life_s

    def hold(self, holder: str, slots: Sequence[float], life_s: float) -> None:
        """Note that these slots are leased."""
        self.held[holder] = [slot + life_s for slot in slots]

    def _near(self, times: object) -> list[float]:
        """Return the times that count. One far ahead was noted before the clock was set back: it is over."""
        since, until = self._now - self._seconds - OTHERS_S, self._now + FARTHEST_SLOT_S
        listed = times if isinstance(times, list) else []
        return [t for t in listed if isinstance(t, int | float) and since < t < until]

    def stored(self) -> dict[str, Any]:
        """Return what the next one is made of."""
        return {"made": self.made, "held": self.held}


def is_paced(plan: Plan) -> bool:
    """Return whether the second's window is kept with others too."""
    return 0 < plan.per_second <= FASTEST_PACED


def new_holder() -> str:
    """Return a name for one who leases: of a process, and unlike any other's."""
    return f"{os.getpid()}-{os.urandom(4).hex()}"


class LocalLedger:
    """The count of a day and the pace of each key on this machine, for all its processes, and those that come after.

    The minute is each process's own.
    """

    def __init__(self, file: LocalFile) -> None:
        self._file = file
        self._holder = new_holder()

    def lease(self, digest: str, plan: Plan, now: float, made: Sequence[float] = ()) -> Lease:
        """Take requests from the day's count, and slots."""
        paced = is_paced(plan)
        if not (plan.per_day or paced):
            return UNLIMITED
        lease = Lease(max(1, int(plan.per_second)) if paced else day_lease(plan), next_midnight(now))
        try:
            with self._file.write():
                if paced:
                    lease = self._take_slots(digest, plan, lease, now, made)
                if plan.per_day:
                    granted = self._take_day(digest, plan, lease.requests, now)
                    lease = lease._replace(requests=granted, slots=lease.slots[:granted])
        except StoreError as error:
            log.warning("the counts of a key are not kept: %s", error)
            return lease._replace(slots=())
        return lease if lease.requests else lease._replace(why=day_used_up(plan))

    def give_back(
        self, digest: str, plan: Plan, lease: Lease, now: float, made: Sequence[float] = ()
    ) -> None:
        """Take the requests of a lease off the day's count, and its slots."""
        update = "UPDATE key_usage SET used = max(0, used - ?) WHERE digest = ? AND day = ?"
        try:
            with self._file.write() as db:
                db.execute(update, (lease.requests, digest, utc_day(now)))
                if lease.slots:
                    pace = self._pace(digest, plan, now)
                    pace.settle(self._holder, made)
                    self._write_pace(digest, pace)
        except StoreError as error:
            log.warning("the counts of a key are not kept: %s", error)

    def used_today(self, digest: str, now: float) -> int | None:
        """Return how many requests of the key were leased today, None where the file cannot be read."""
        query = "SELECT used FROM key_usage WHERE digest = ? AND day = ?"
        try:
            row = self._file.read_one(query, digest, utc_day(now)) or (0,)
        except StoreError as error:
            log.warning("the day's count of a key cannot be read: %s", error)
            return None
        return int(row[0])

    def _take_slots(self, digest: str, plan: Plan, lease: Lease, now: float, made: Sequence[float]) -> Lease:
        """Return a lease with its slots, as many as there are now."""
        pace = self._pace(digest, plan, now)
        pace.settle(self._holder, made)
        slots, life_s = pace.slots(lease.requests, now, 0.0)
        pace.hold(self._holder, slots, life_s)
        self._write_pace(digest, pace)
        return lease._replace(requests=len(slots), slots=tuple(slots), life_s=life_s)

    def _pace(self, digest: str, plan: Plan, now: float) -> Pace:
        (text,) = self._file.read_one("SELECT pace FROM key_pace WHERE digest = ?", digest) or ("{}",)
        try:
            found = json.loads(text)
        except (TypeError, ValueError):  # the disk has changed it
            found = {}
        return Pace(found if isinstance(found, dict) else {}, plan, now)

    def _write_pace(self, digest: str, pace: Pace) -> None:
        with self._file.write() as db:
            row = (digest, json.dumps(pace.stored()))
            db.execute("INSERT OR REPLACE INTO key_pace VALUES (?, ?)", row)

    def _take_day(self, digest: str, plan: Plan, wanted: int, now: float) -> int:
        """Add what is left of `wanted` to the day's count and return it; processes take turns."""
        place = (digest, utc_day(now))
        where = "WHERE digest = ? AND day = ?"
        with self._file.write() as db:
            db.execute("INSERT INTO key_usage VALUES (?, ?, 0) ON CONFLICT DO NOTHING", place)
            (used,) = db.execute(f"SELECT used FROM key_usage {where}", place).fetchone()  # noqa: S608
            granted = max(0, min(wanted, plan.per_day - int(used)))
            db.execute(f"UPDATE key_usage SET used = used + ? {where}", (granted, *place))  # noqa: S608
        return granted


def day_lease(plan: Plan) -> int:
    """Return how many requests a lease of a day's count takes."""
    return max(1, int(plan.per_second * DAY_LEASE_S))


def day_used_up(plan: Plan) -> str:
    """Return why a key rests whose day's requests are used up."""
    return phrase("quota.day_used_up", n=plan.per_day)


class SharedLedger:
    """The counts of all instances that share keys, in one MongoDB collection; `alone` counts while it is away.

    One document per key digest and window: `<digest>|<UTC date>` counts the day (`used`), `<digest>|minute`
    holds the minute's slices and the pace of the second. Both are changed by conditional updates only: the server
    decides.
    """

    def __init__(
        self, collection: MongoCollection[dict[str, Any]], alone: Ledger, clock: Clock = SYSTEM_CLOCK
    ) -> None:
        self._collection = collection
        self._alone = alone
        self._clock = clock
        self._away_until = 0.0  # monotonic; 0: it is there
        self._trouble = LogThrottle(
            "the shared counts of API keys", clock, "counting alone", SMALL_TROUBLE_AGAIN_S
        )
        self._leased_alone: set[str] = set()
        self._holder = new_holder()
        self._took_s = 0.0  # what the last lease took

    def lease(self, digest: str, plan: Plan, now: float, made: Sequence[float] = ()) -> Lease:
        """Take requests from the minute and the day. The shorter of the two limits is what the lease has."""
        if not (plan.per_day or plan.per_minute):
            return UNLIMITED
        began = self._clock.monotonic()
        lease: Lease | None = None
        for last_try in (False, True):  # an election cuts the connection under what is asked
            with contextlib.suppress(StoreAway), self._together(last_try):
                lease = self._lease_day(digest, plan, now, self._lease_minute(digest, plan, now, made))
                break
        if lease is None:
            return self._lease_alone(digest, plan, now, made)
        self._took_s = self._clock.monotonic() - began
        self._leased_alone.discard(digest)
        return lease

    def _lease_alone(self, digest: str, plan: Plan, now: float, made: Sequence[float]) -> Lease:
        """Take requests from this machine's own count, for no longer than until MongoDB is asked again."""
        self._leased_alone.add(digest)
        lease = self._alone.lease(digest, plan, now, made)
        if not lease.requests:
            return lease
        return lease._replace(until=min(lease.until, now + LEDGER_RETRY_S))

    def give_back(
        self, digest: str, plan: Plan, lease: Lease, now: float, made: Sequence[float] = ()
    ) -> None:
        """Take the requests of a lease off the counts in which they were made, and its slots."""
        if digest in self._leased_alone:
            self._alone.give_back(digest, plan, lease, now, made)
            return
        day = {"_id": f"{digest}|{utc_day(now)}", "used": {"$gte": lease.requests}}
        name = f"slices.{int(lease.until // SLICE_S)}"
        minute = {"_id": f"{digest}|minute", name: {"$gte": lease.requests}}
        update: dict[str, Any] = {"$inc": {name: -lease.requests, "version": 1}}
        if lease.slots:
            update |= {"$unset": {f"held.{self._holder}": ""}, "$push": {"made": {"$each": list(made)}}}
        with contextlib.suppress(StoreAway), self._together():
            if lease.requests:
                self._collection.update_one(day, {"$inc": {"used": -lease.requests}})
            self._collection.update_one(minute, update)

    def used_today(self, digest: str, now: float) -> int | None:
        """Return how many requests of the key all instances leased today, None where MongoDB is away."""
        try:
            with self._together():
                found = self._collection.find_one({"_id": f"{digest}|{utc_day(now)}"})
        except StoreAway:
            return None
        return int(found["used"]) if found else 0

    @contextlib.contextmanager
    def _together(self, last_try: bool = True) -> Iterator[None]:
        """Ask MongoDB in the body. Raises StoreAway when it is away, or was a moment ago.

        A connection that broke is no sign of that but at the `last_try`.
        """
        from pymongo import timeout
        from pymongo.errors import AutoReconnect, OperationFailure, PyMongoError

        now = self._clock.monotonic()
        if now < self._away_until:
            raise StoreAway(phrase("quota.away"))
        try:
            with timeout(LEDGER_TIMEOUT_S):
                yield
        except PyMongoError as error:
            if not last_try and isinstance(error, AutoReconnect) and not error.timeout:
                raise StoreAway(phrase("quota.away")) from error
            self._away_until = now + LEDGER_RETRY_S
            words = phrase("quota.mongo_away", error=one_line(plain_words(str(error)), 100))
            if isinstance(error, OperationFailure) and error.code == UNAUTHORIZED:
                words = phrase("quota.no_right", place=self._collection.full_name)
            self._trouble.again(words)
            raise StoreAway(phrase("quota.away")) from error
        self._away_until = 0.0
        self._trouble.over()

    def _lease_day(self, digest: str, plan: Plan, now: float, lease: Lease) -> Lease:
        if not (plan.per_day and lease.requests):
            return lease
        for requests in dict.fromkeys((lease.requests, 1)):  # the last few of a day one by one
            if self._count_day(f"{digest}|{utc_day(now)}", requests, plan.per_day):
                return lease._replace(requests=requests, slots=lease.slots[:requests])
        return Lease(0, next_midnight(now), day_used_up(plan))

    def _count_day(self, name: str, requests: int, limit: int) -> bool:
        from pymongo.errors import DuplicateKeyError

        wanted = {"_id": name, "used": {"$lte": limit - requests}}
        update = {"$inc": {"used": requests}}
        if self._collection.update_one(wanted, update).matched_count:
            return True
        with contextlib.suppress(DuplicateKeyError):  # too full, or another instance was quicker
            self._collection.insert_one({"_id": name, "used": 0})
        return bool(self._collection.update_one(wanted, update).matched_count)

    def _lease_minute(self, digest: str, plan: Plan, now: float, made: Sequence[float]) -> Lease:
        if not plan.per_minute:
            return Lease(day_lease(plan), next_midnight(now))
        present = int(now // SLICE_S)
        end = (present + 1) * SLICE_S
        share = max(1, int(plan.per_minute * SLICE_S / 60 / SHARES_PER_SLICE))
        for _ in range(LEDGER_TRIES):
            found = self._collection.find_one({"_id": f"{digest}|minute"}) or {"version": 0, "slices": {}}
            # one that lies ahead was counted before the clock was set back: it is over
            slices = {k: n for k, n in found["slices"].items() if abs(int(k) - present) < SLICES_PER_WINDOW}
            requests = min(share, plan.per_minute - sum(slices.values()))
            if requests <= 0:
                return Lease(0, end, phrase("quota.minute_used_up", n=plan.per_minute))
            pace = Pace(found, plan, now)
            pace.settle(self._holder, made)
            lease = self._slots_of_a_slice(pace, requests, plan, now)
            counted = str(int(lease.until // SLICE_S))
            slices[counted] = slices.get(counted, 0) + lease.requests
            if self._swap(digest, found["version"], {"slices": slices, **pace.stored()}):
                return lease
        return Lease(0, end, phrase("quota.busy"))

    def _slots_of_a_slice(self, pace: Pace, requests: int, plan: Plan, now: float) -> Lease:
        """Return a lease of as many requests as there are slots for in the slice of the first one."""
        if not is_paced(plan):
            return Lease(requests, _end_of_slice(now))
        slots, life_s = pace.slots(requests, now, self._took_s)
        end = _end_of_slice(slots[0])
        slots = [slot for slot in slots if slot < end]
        pace.hold(self._holder, slots, life_s)
        return Lease(len(slots), end, "", tuple(slots), life_s)

    def _swap(self, digest: str, version: int, fields: Mapping[str, Any]) -> bool:
        """Write the minute's document if nobody else did since `version`; return whether it was done."""
        from pymongo.errors import DuplicateKeyError

        name = f"{digest}|minute"
        new = {"_id": name, "version": version + 1, **fields}
        if version:
            return bool(self._collection.replace_one({"_id": name, "version": version}, new).matched_count)
        try:
            self._collection.insert_one(new)
        except DuplicateKeyError:
            return False
        return True


def _end_of_slice(start: float) -> float:
    """Return until when what leaves from `start` on arrives in one slice: the next one, where it may come too late."""
    return (int((start + SLICE_MARGIN_S) // SLICE_S) + 1) * SLICE_S - SLICE_MARGIN_S


# ======================================================================================================
# Infoway: answers, requests
# ======================================================================================================

# A hundred trades are about ten kilobytes. Several answers are in flight at once, and what is read of one takes many
# times its size: an answer to a batch, or with a code's daily bars, is refused beyond this.
MAX_BATCH_BYTES = 1024 * 1024
# A thread that does not come back this long after its connection was cut is left alone and replaced.
ABANDON_AFTER_S = 2.0
# Tries of one batch after faults of the network or the server.
MAX_TRIES = 5
# Refusals for the request rate are no faults: waited out beyond one full minute's window.
MAX_REFUSALS = 8
BACKOFF_FIRST_S, BACKOFF_CAP_S = 0.5, 8.0
SLOW_DOWN_FIRST_S, SLOW_DOWN_CAP_S = 1.0, 15.0
# Tries for daily bars: who asks for them comes back to it.
MAX_BAR_TRIES = 2
# A trade that is further ahead of the API's clock, or this machine's, is none.
MAX_AHEAD_MS = 24 * 60 * 60 * 1000
# Of how many seconds a clock may be off until it is said.
CLOCK_TOLERANCE_S = 60.0
# Asked for in the midst of a run, which it must not hold up for long.
PLAN_LIMITS = Limits(2.0, 3.0, 3.0)
PACKAGE_PATH = "/package/info"
SYMBOLS_PATH = "/common/basic/symbols"
# The types of the API's symbol lists, and the product at which each one's instruments are asked.
SYMBOL_TYPES = {
    "STOCK_US": "stock",
    "STOCK_CN": "stock",
    "STOCK_HK": "stock",
    "STOCK_JP": "japan",
    "STOCK_KS": "korea",
    "STOCK_IN": "india",
    "STOCK_TW": "taiwan",
    "CRYPTO": "crypto",
    "FOREX": "common",
    "FUTURES": "common",
    "ENERGY": "common",
    "METAL": "common",
    "INDICES": "common",
}
# Those whose codes have no suffix.
BARE_TYPES = tuple(name for name, product in SYMBOL_TYPES.items() if product in PRODUCT_MARKETS)
# The price list's plan by the name that the API gives it.
PACKAGE_NAMES = {
    name: plan
    for plan, names in {
        "free": "free 免费 免费版",
        "basic": "basic 基础 基础版",
        "premium": "premium advanced 高级 高级版",
        "pro": "pro professional 专业 专业版",
    }.items()
    for name in names.split()
}
# More than any plan allows, and than any number of its means: what is told beyond them is neither.
MOST_PER_SECOND = 10_000
MOST_BELIEVED = 1e15
# A plan that could not be had is not asked for again at once.
PLAN_RETRY_S = 600.0
ENDS_SOON_S = 7 * 86_400.0
# A `Retry-After` beyond this is answered by failing the batch with that number in the reason.
LONGEST_RETRY_AFTER_S = 60.0
# No `Retry-After` is believed beyond this: one answer of a proxy would put a key out for days, or for good.
BELIEVED_RETRY_AFTER_S = 3600.0
# No server on the path gains from more connections than this, and each is a thread here.
MAX_IN_FLIGHT = 32
# About what this process itself needs to send, read, check and store one batch.
BATCH_WORK_S = 0.0015
# The plain epoch milliseconds that a trade time can have: 2000-01-01 to 2100-01-01.
EARLIEST_TRADE_MS, LATEST_TRADE_MS = 946_684_800_000, 4_102_444_800_000
# Decimal128 of MongoDB has 34 significant digits; prices have fewer than twenty.
DECIMAL = re.compile(r"-?(?=[\d.]{1,34}(?:[eE]|$))(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{1,2})?", re.ASCII)
# Decimals as nearly all trades have them, those of a whole batch in one text.
_PLAIN_DECIMALS = re.compile(r"(?:\d{1,17}+(?:\.\d{1,16}+)?+,)++", re.ASCII)


class Action(Enum):
    """What to do after an answer."""

    ACCEPT = "accept"
    # with back-off
    RETRY = "retry"
    # let the key rest a moment, then retry
    SLOW_DOWN = "slow_down"
    # let the key rest until the next day
    KEY_DAY_OVER = "key_day_over"
    # never use the key again
    KEY_DEAD = "key_dead"
    # let the key rest, longer each time: something on the way refused it, not the API
    KEY_DOUBTED = "key_doubted"
    # never use the key for this product again
    KEY_LACKS_PRODUCT = "key_lacks_product"
    # give up on the codes
    CODES_UNKNOWN = "codes_unknown"
    # give up on the request: it is wrong, and would be wrong again
    GIVE_UP = "give_up"


class Refusal(NamedTuple):
    """A row of the table of refusals: what follows, and how the API says it, by `ret`, text or HTTP status.

    `setting`: what an operator looks at. `more`: the kind of what is said, where that is more than the API's words.
    """

    action: Action
    kind: FailureKind
    setting: str
    rets: Collection[int] = ()
    beginnings: Collection[str] = ()
    statuses: Collection[int] = ()
    more: str = ""


# What the API says in plain text to a request without a key.
NO_KEY_TEXT = "Unauthorized"
_KEY_TEXTS = (
    "Token invalid",
    NO_KEY_TEXT,
    "Apikey not exists",
    "apiKey is required",
    "The token permission has expired",
)
_RATE_TEXTS = ("Rate limit exceeded", "Request frequency exceed")
_REQUEST_TEXTS = ("Products quantity exceeds", "Param error", "Param lost")
# Each refusal has a `ret` of its own, or comes with `ret` 500 or without one: then its text begins so. The
# status counts where neither tells, as with what a gateway sends. Of several rows the first one counts.
REFUSALS = (
    Refusal(Action.KEY_DEAD, FailureKind.KEY, "INFOWAY_API_KEY", (401, 509), _KEY_TEXTS),
    Refusal(
        Action.KEY_DOUBTED, FailureKind.KEY, "INFOWAY_API_BASE_URL", (), (), (401,), "infoway.not_the_api"
    ),
    Refusal(Action.KEY_LACKS_PRODUCT, FailureKind.KEY, "INFOWAY_API_KEY", (514,), ("No permission",)),
    Refusal(Action.KEY_DAY_OVER, FailureKind.KEY, "INFOWAY_PLAN", (502,), ("Request frequency for the day",)),
    Refusal(Action.SLOW_DOWN, FailureKind.API, "INFOWAY_PLAN", (429, 501), _RATE_TEXTS, (429,)),
    Refusal(Action.CODES_UNKNOWN, FailureKind.UNKNOWN_CODE, "", (508,), ("All product not exists",)),
    Refusal(Action.GIVE_UP, FailureKind.API, "", (505, 506, 507), _REQUEST_TEXTS),
    Refusal(Action.RETRY, FailureKind.API, "INFOWAY_API_BASE_URL", statuses=(408,)),
    Refusal(Action.RETRY, FailureKind.API, "INFOWAY_API_BASE_URL", statuses=range(500, 1000)),
    Refusal(
        Action.GIVE_UP, FailureKind.API, "INFOWAY_API_KEY", (403, 499), (), (403, 499), "infoway.gateway"
    ),
    Refusal(Action.GIVE_UP, FailureKind.API, "INFOWAY_API_BASE_URL", statuses=range(400, 500)),
    Refusal(
        Action.GIVE_UP,
        FailureKind.API,
        "INFOWAY_API_BASE_URL",
        (),
        (),
        range(300, 400),
        "infoway.redirection",
    ),
)
# What no row is for: a fault of the API's own, or a success that is none.
UNCLEAR = Refusal(Action.RETRY, FailureKind.API, "INFOWAY_API_BASE_URL")


class Verdict(NamedTuple):
    """The decision on an answer: its failure unless it is accepted, the records to read, seconds to wait.

    `setting`: the one that an operator looks at, '' for none in particular.
    """

    action: Action
    failure: Failure = Failure(FailureKind.API, "")
    records: Sequence[object] = ()
    wait_s: float = 0.0
    setting: str = ""


def decide(response: Response, now_utc: datetime) -> Verdict:
    """Decide what follows from any answer of the API: the one place where that is decided.

    The body's `ret` is believed, then its text, and only then the HTTP status: 200 alone is no success.
    """
    if response.fault:
        action = Action.GIVE_UP if response.hopeless else Action.RETRY
        return Verdict(action, Failure(response.kind, response.words))
    envelope = json_object(response.body) or {}
    ret, text = envelope.get("ret"), words_of(envelope)
    if response.body.strip() == NO_KEY_TEXT.encode():
        text = NO_KEY_TEXT
    row = _row_of_body(ret, text) if _is_own(response, envelope) else None
    if row is None and type(ret) is int and ret == 200:
        return _accept(envelope)
    status = _status_of(response, envelope)
    row = row or next((one for one in REFUSALS if status in one.statuses), UNCLEAR)
    failure = Failure(row.kind, _refused_words(row, ret, status, text, response.body))
    return Verdict(row.action, failure, wait_s=_retry_after_s(response, now_utc), setting=row.setting)


def _refused_words(row: Refusal, ret: object, status: int, text: str, body: bytes) -> Phrase:
    """Return what an answer says that is none, by its `ret`, else by its HTTP status."""
    if ret is not None:
        number = one_line(repr(ret), 40)
        return phrase("infoway.says", number=number, text=text or phrase("infoway.nothing_more"))
    said = phrase("infoway.http", status=status)
    if text:
        said = phrase("infoway.http_says", status=status, text=text)
    if row.more:
        return phrase(row.more, said=said)
    if row is UNCLEAR:
        return phrase("infoway.not_json", said=said, body=not_json_words(body, phrase("infoway.its")))
    return said


def _is_own(response: Response, envelope: Mapping[str, Any]) -> bool:
    """Return whether a body may be the API's: of a 401 only with its numbers, as gateways refuse in like words."""
    if response.status != 401 or not envelope:
        return True
    return type(envelope.get("ret")) is int or type(envelope.get("code")) is int


def _row_of_body(ret: object, text: str) -> Refusal | None:
    """Return the row that the body of an answer names, None for a success, and for what only the status tells."""
    for row in REFUSALS:
        if type(ret) is int and ret in row.rets:
            return row
    begins = text.casefold().startswith
    return next((row for beginnings, row in _BEGINNINGS if begins(beginnings)), None)


_BEGINNINGS = [(tuple(map(str.casefold, row.beginnings)), row) for row in REFUSALS if row.beginnings]


def _status_of(response: Response, envelope: Mapping[str, Any]) -> int:
    """Return the HTTP status, or the `code` that stands for it in a body that came with a good one."""
    code = envelope.get("code")
    return code if response.status < 300 and type(code) is int and 400 <= code < 1000 else response.status


def _accept(envelope: Mapping[str, Any]) -> Verdict:
    data = envelope.get("data", ...)
    if data is None:
        return Verdict(Action.ACCEPT)  # none of the codes is known
    if not isinstance(data, list):
        failure = Failure(UNCLEAR.kind, phrase("infoway.no_list"))
        return Verdict(UNCLEAR.action, failure, setting=UNCLEAR.setting)
    return Verdict(Action.ACCEPT, records=data)


def _retry_after_s(response: Response, now_utc: datetime) -> float:
    """Return the seconds of a Retry-After header (a number or an HTTP date) as far as believed, 0 without one."""
    if re.fullmatch(r"\d{1,9}", response.retry_after, re.ASCII):
        return min(BELIEVED_RETRY_AFTER_S, float(response.retry_after))
    at = _http_date(response.retry_after)
    return min(BELIEVED_RETRY_AFTER_S, max(0.0, at - now_utc.timestamp())) if at else 0.0


def _http_date(text: str) -> float:
    """Return the epoch seconds of an HTTP date, 0 where it is none."""
    if not text:
        return 0.0
    from email.utils import parsedate_to_datetime

    try:
        at = parsedate_to_datetime(text)
        return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return 0.0


def clock_fault(response: Response, now: float) -> str:
    """Return how far this machine's clock (`now`, epoch seconds) is off by the API's, '' where that is not much."""
    at = _http_date(response.date)
    if not at or abs(now - at) <= CLOCK_TOLERANCE_S:
        return ""
    if now > at:
        return phrase("infoway.clock_ahead", s=now - at)
    return phrase("infoway.clock_behind", s=at - now)


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


def read_trade(record: object, product: str = "", latest_ms: int = LATEST_TRADE_MS) -> Trade:
    """Return the trade that a record of an answer of `product` holds.

    Raises ValueError with what is wrong with it: its form, or that by its product's rule it is no trade.
    """
    if not isinstance(record, dict):
        raise ValueError(phrase("infoway.sent_no_trade", record=one_line(json.dumps(record), 40)))
    get = record.get
    s, t, td = get("s"), get("t"), get("td")
    if not isinstance(s, str):
        raise ValueError(phrase("infoway.no_code", shown=_shown(record, "s")))
    if type(t) is not int or not EARLIEST_TRADE_MS <= t < LATEST_TRADE_MS:
        raise ValueError(phrase("infoway.no_milliseconds", shown=_shown(record, "t")))
    if type(td) is not int or not 0 <= td <= 9:
        raise ValueError(phrase("infoway.no_direction", shown=_shown(record, "td")))
    trade = Trade(s, t, _decimal(record, "p"), _decimal(record, "v"), _decimal(record, "vw"), td)
    why = _why_no_trade(trade, product, latest_ms)
    if why:
        raise ValueError(phrase("infoway.no_trade", why=why))
    return trade


def _why_no_trade(trade: Trade, product: str, latest_ms: int) -> str:
    """Return why a well-formed record is no trade by its product's rule, '' if it is one."""
    price = float(trade.p)
    if price == 0:
        return phrase("infoway.price_zero", p=trade.p)
    if price < 0 and not (product == "common" and trade.s in ENERGY):
        return phrase("infoway.price_below_zero", p=trade.p)
    if float(trade.v) < 0:
        return phrase("infoway.volume_below_zero", v=trade.v)
    if trade.t > latest_ms:
        at = iso(datetime.fromtimestamp(trade.t / 1000, UTC))
        return phrase("infoway.ahead", t=trade.t, at=at)
    return ""


def are_plain_decimals(texts: Sequence[str]) -> bool:
    """Return whether texts are decimals as nearly all trades have them. Raises TypeError where one is no text."""
    text = ",".join(texts) + ","
    return text.count(",") == len(texts) and _PLAIN_DECIMALS.fullmatch(text) is not None


_FIELDS_OF = itemgetter(*Trade._fields)
# What Trade(*fields) does when their number is right, without a call of Python's.
_TRADE_OF = partial(tuple.__new__, Trade)


def plain_trades(records: Sequence[Any], latest_ms: int) -> list[Trade]:
    """Return the trades of records that are all as they nearly always are, [] where one is not.

    What `read_trade` makes of each, in half the time: the fields are looked at column by column.
    """
    try:
        trades: list[Trade] = [*map(_TRADE_OF, map(_FIELDS_OF, records))]
        s, t, p, v, vw, td = zip(*trades, strict=True)
        decimals_are_plain = are_plain_decimals((*p, *v, *vw))
    except (KeyError, TypeError, ValueError):  # a field is missing, or of another type, or there is no record
        return []
    plain = (
        {*map(type, s)} == {str}
        and {*map(type, t), *map(type, td)} == {int}
        and EARLIEST_TRADE_MS <= min(t) <= max(t) <= latest_ms
        and 0 <= min(td) <= max(td) <= 9
        and decimals_are_plain
        and min(map(float, p)) > 0
    )
    return trades if plain else []


def _decimal(record: Mapping[str, object], name: str) -> str:
    value = record.get(name)
    text = str(value) if type(value) is int else value  # a JSON number is taken by its digits
    if not isinstance(text, str) or not is_decimal(text):
        raise ValueError(phrase("infoway.no_decimal", name=name, shown=_shown(record, name)))
    return text


def is_decimal(text: str) -> bool:
    """Return whether a text is a decimal number as the API sends them."""
    return DECIMAL.fullmatch(text) is not None


def _shown(record: Mapping[str, object], name: str) -> str:
    if name not in record:
        return phrase("infoway.nothing")
    return one_line(json.dumps(record[name], default=str), 40)


class Bar(NamedTuple):
    """One daily bar, of the regular session alone: the code, its time (epoch seconds), the rest as the API sends it."""

    s: str
    t: int
    open: str
    high: str
    low: str
    close: str
    volume: str
    turnover: str


# The API's names of a bar's numbers, in the order of Bar's.
BAR_NUMBERS = ("o", "h", "l", "c", "v", "vw")
BAR_FIELDS = Bar._fields[2:]


def read_bar(code: str, record: object) -> Bar:
    """Return the bar that a record of an answer holds. Raises ValueError with what is wrong with it."""
    if not isinstance(record, dict):
        raise ValueError(phrase("infoway.sent_no_bar", record=one_line(json.dumps(record), 40)))
    t = record.get("t")
    if not re.fullmatch(r"\d{9,10}", str(t), re.ASCII):
        raise ValueError(phrase("infoway.no_seconds", shown=_shown(record, "t")))
    bar = Bar(code, int(str(t)), *(_decimal(record, name) for name in BAR_NUMBERS))
    if min(map(float, bar[2:6])) <= 0 or float(bar.volume) < 0:
        prices = listing("join.names", bar[2:6])
        raise ValueError(phrase("infoway.no_bar", prices=prices, volume=bar.volume))
    return bar


class Outcome(NamedTuple):
    """What became of one batch: its trades, the codes the product does not know, reasons for the rest.

    `interrupted`: it was stopped before its answer, which says nothing of its codes. `bars`: of a batch that asks
    for them those of each code that has any, newest first.
    """

    batch: Batch
    trades: Sequence[Trade] = ()
    unknown: Sequence[str] = ()
    failures: Mapping[str, Failure] = MappingProxyType({})
    interrupted: bool = False
    bars: Mapping[str, Sequence[Bar]] = MappingProxyType({})


def read_bars(batch: Batch, records: Sequence[object]) -> Outcome:
    """Sort the records of an accepted answer with bars; a bad bar harms no neighbour."""
    asked = {code.upper(): code for code in batch.split()}
    found: dict[str, list[Bar]] = {}
    for record in records:
        fields = record if isinstance(record, dict) else {}
        code = asked.get(str(fields.get("s")).upper())
        if code is None:
            log.warning("bars of %s were rejected: %s", batch.product, one_line(json.dumps(record), 80))
            continue
        listed = fields.get("respList")
        for one in listed if isinstance(listed, list) else ():
            try:
                found.setdefault(code, []).append(read_bar(code, one))
            except ValueError as error:
                log.warning("a bar of %s was rejected: %s", code, error)
    return Outcome(batch, unknown=[code for code in asked.values() if code not in found], bars=found)


def read_records(batch: Batch, records: Sequence[object], now: float = math.inf) -> Outcome:
    """Sort the records of an accepted answer; each is judged alone, a bad one harms no neighbour.

    `now`: the API's time, epoch seconds; what is more than a day ahead of it is no trade.
    """
    if batch.bars:
        return read_bars(batch, records)
    asked = dict.fromkeys(batch.split())
    latest_ms = int(min(now * 1000 + MAX_AHEAD_MS, LATEST_TRADE_MS - 1))
    trades = plain_trades(records, latest_ms)
    if len(trades) == len(asked) and asked.keys() == {trade.s for trade in trades}:
        return Outcome(batch, trades)  # as nearly always: each code that was asked for, once
    newest: dict[str, Trade] = {}
    bad: dict[str, Failure] = {}
    # what is wrong with the first, and '' for each other one: words for all would take memory
    strays: list[str] = []
    for record in records:
        try:
            trade = read_trade(record, batch.product, latest_ms)
        except ValueError as error:
            code = record.get("s") if isinstance(record, dict) else None
            code = code if not isinstance(code, str) or code in asked else code.upper()
            if isinstance(code, str) and code in asked:
                bad[code] = Failure(FailureKind.BAD_RECORD, error_words(error))
            else:
                strays.append("" if strays else error_words(error))
            continue
        code = trade.s
        if code not in asked and code.upper() in asked:  # seen in lower case
            code = code.upper()
            trade = trade._replace(s=code)
        if code not in asked:
            strays.append("" if strays else phrase("infoway.not_asked", code=one_line(code, 40)))
        elif code not in newest or newest[code].t < trade.t:
            newest[code] = trade
    if strays:
        log.warning(
            "%s of %s rejected, the first because: %s",
            count_words(len(strays), "record"),
            batch.product,
            strays[0],
        )
    unknown = [code for code in asked if code not in newest and code not in bad]
    failures = {code: failure for code, failure in bad.items() if code not in newest}
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


class _Worker(threading.Thread):
    """A thread with a connection of its own that asks for one batch after the other."""

    def __init__(self, api: InfowayApi) -> None:
        super().__init__(name="stockrt-fetch", daemon=True)
        self.connection = HttpConnection(api.base_url, api.limits, api.proxies)
        self.tasks: queue.SimpleQueue[tuple[BatchAttempt, _Done] | None] = queue.SimpleQueue()
        self._api = api
        start_thread(self)

    def run(self) -> None:
        while work := self.tasks.get():
            attempt, done = work
            done.put((self, self._api.ask(self.connection, attempt)))
        self.connection.close()

    def dismiss(self) -> None:
        """End after the batch in hand, whose answer nobody waits for any more."""
        self.tasks.put(None)
        self.connection.abort(for_good=True)


# A batch that is done, and by which worker; None: it was not asked for.
_Done: TypeAlias = "queue.SimpleQueue[tuple[_Worker | None, Outcome]]"


class Caution:
    """Keeps a caller that gets nothing but refusals from earning a ban.

    After a run whose every request was refused for one reason (`before`) the next one asks one thing at a time;
    what is refused for that reason again spares the rest of its product, anything else ends the caution.
    """

    def __init__(self, before: Failure | None) -> None:
        self._before = before
        self._spare: set[str] = set()
        self._reasons: set[Failure | None] = set()
        self.is_careful = before is not None

    def note(self, outcome: Outcome) -> None:
        """Look at what became of a request."""
        if outcome.interrupted:
            return
        reasons = set(outcome.failures.values())
        refused = len(reasons) == 1 and not (outcome.trades or outcome.unknown)
        reason = next(iter(reasons), None)
        if not refused or (reason is not None and reason.kind is not FailureKind.API):
            reason = None
        self._reasons.add(reason)
        if not self.is_careful:
            return
        if reason == self._before:
            self._spare.add(outcome.batch.product)
        else:
            self.is_careful = False
            self._spare.clear()

    def spared(self, batch: Batch) -> Outcome | None:
        """Return what becomes of a batch that is not asked for, None for one that is."""
        if self._before is None or batch.product not in self._spare:
            return None
        words = phrase("infoway.spared", why=self._before.words)
        return _failed(batch, Failure(self._before.kind, words))

    def refused_all(self) -> Failure | None:
        """Return why every request of this run was refused, None if one was not."""
        if len(self._reasons) != 1:
            return None
        return next(iter(self._reasons))


class InfowayApi:
    """Asks the API for batches, several at a time, and yields what became of each.

    Promises: no key above its rate; each batch answered exactly once, by trades (or bars) or by reasons; no request
    outlives its limits. One run at a time.
    """

    def __init__(
        self,
        base_url: str,
        keys: KeyPool,
        proxies: Proxies = NO_PROXIES,
        events: Events = NO_EVENTS,
        rng: random.Random | None = None,
        limits: Limits = API_LIMITS,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._clock = clock
        self._clock_said = False
        self.base_url = base_url
        self.keys = keys
        self.proxies = proxies
        self.limits = limits
        self._events = events
        self._rng = rng or random.Random()
        self._idle: list[_Worker] = []
        self._held: list[BatchAttempt] = []  # the one that found no thread, until one is free
        self._caution = Caution(None)
        self._latencies: deque[float] = deque(maxlen=20)

    def fetch(self, batches: Iterable[Batch], stop: threading.Event) -> Iterator[Outcome | None]:
        """Yield an Outcome for each batch as it is done, and None several times a second while none is.

        When `stop` is set, requests under way are cut and the rest is not asked for.
        """
        self._caution = Caution(self._caution.refused_all())
        todo = (BatchAttempt(batch, stop, self._rng) for batch in batches)
        self._held.clear()
        done: _Done = queue.SimpleQueue()
        busy: dict[_Worker, Batch] = {}
        looked_at = time.monotonic()
        try:
            while not stop.is_set():
                self._hand_out(todo, busy, done)
                if not busy and done.empty():
                    return
                if time.monotonic() - looked_at >= STOP_POLL_S:
                    yield from self._overdue(busy)
                    looked_at = time.monotonic()
                try:
                    worker, outcome = done.get(timeout=STOP_POLL_S)
                except queue.Empty:
                    yield None
                    continue
                if worker is None:
                    yield outcome
                elif busy.pop(worker, None) is not None:
                    self._idle.append(worker)
                    self._caution.note(outcome)
                    yield outcome
            while not done.empty():  # stopped: what has come is not thrown away
                yield done.get()[1]
        finally:
            for worker in busy:
                worker.dismiss()

    def package(self, key: ApiKey, stop: threading.Event) -> PackageInfo | Failure:
        """Ask once what a key's plan is; return that, or why it cannot be had. Raises Interrupted."""
        envelope, failure = self._learn(PACKAGE_PATH, PLAN_LIMITS, stop, key)
        return read_package(envelope) or failure

    def symbols(self, kind: str, stop: threading.Event) -> list[Symbol] | Failure:
        """Ask once for a list of symbols; return it, or why it cannot be had. Raises Interrupted."""
        envelope, failure = self._learn(f"{SYMBOLS_PATH}?type={kind}", self.limits, stop)
        found = read_symbols(kind, envelope)
        return failure if found is None else found

    def _learn(
        self, path: str, limits: Limits, stop: threading.Event, only: ApiKey | None = None
    ) -> tuple[Mapping[str, Any], Failure]:
        """Ask for what is no batch, tell the key what follows, and return the answer, and why it is none if it is none.

        Raises Interrupted.
        """
        try:
            key, answer = self.ask_once(path, "", limits, stop, only)
        except NoKeyError as error:
            return {}, Failure(FailureKind.KEY, error.message)
        envelope, verdict = judge(answer)
        if key is not None and envelope.get("ret") == 200:
            self.keys.trust(key)
        elif key is not None and verdict.action is not Action.KEY_LACKS_PRODUCT:
            steer(self.keys, key, "", verdict)
        return envelope, verdict.failure

    def ask_once(
        self, path: str, product: str, limits: Limits, stop: threading.Event, only: ApiKey | None = None
    ) -> tuple[ApiKey | None, Response]:
        """Ask over a connection of its own, and return the key that was used with the answer; None: it was not asked.

        As with batches the key is taken when the connection stands. Raises NoKeyError, Interrupted.
        """
        with contextlib.closing(HttpConnection(self.base_url, limits, self.proxies)) as connection:
            with cut_after(limits.whole_s, connection):
                fault = connection.open()
            if fault is not None:
                return None, fault
            key = self.keys.acquire(product, stop, only)
            with cut_after(limits.whole_s, connection):
                return key, connection.open() or connection.get(path, {"apiKey": key.secret})

    def close(self) -> None:
        """End the threads that wait for work."""
        while self._idle:
            self._idle.pop().dismiss()

    def _hand_out(self, todo: Iterator[BatchAttempt], busy: dict[_Worker, Batch], done: _Done) -> None:
        """Give the workers as much as shall be under way."""
        for attempt in islice(chain(self._take_held(), todo), max(0, self._wanted() - len(busy))):
            spared = self._caution.spared(attempt.batch)
            if spared is not None:
                done.put((None, spared))
                continue
            worker = self._free_worker(others=bool(busy))
            if worker is None:
                self._held.append(attempt)
                return
            busy[worker] = attempt.batch
            worker.tasks.put((attempt, done))

    def _take_held(self) -> Iterator[BatchAttempt]:
        while self._held:
            yield self._held.pop()

    def _free_worker(self, others: bool) -> _Worker | None:
        """Return a worker that has nothing to do, None where `others` have to do. Raises StockrtError."""
        if self._idle:
            return self._idle.pop()
        try:
            return _Worker(self)
        except StockrtError:
            if not others:
                raise
        return None

    def _wanted(self) -> int:
        if self._caution.is_careful:
            return 1
        return wanted_in_flight(min(self._latencies, default=0.0), self.keys.rate())

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
                words = phrase("infoway.hangs", s=self.limits.whole_s)
                yield _failed(batch, Failure(FailureKind.NETWORK, words))

    def ask(self, connection: HttpConnection, attempt: BatchAttempt) -> Outcome:
        """Ask for a batch over `connection` until its answer is final; never raises."""
        try:
            while True:
                attempt.stop.wait(attempt.pause_s)
                outcome = self._try(connection, attempt)
                if outcome is not None:
                    return outcome
        except NoKeyError as error:
            return _failed(attempt.batch, Failure(FailureKind.KEY, error.message))
        except Interrupted:
            return Outcome(attempt.batch, interrupted=True)
        except Exception as error:
            return _failed(attempt.batch, Failure(FailureKind.OTHER, fault_words(error, self._events)))

    def _try(self, connection: HttpConnection, attempt: BatchAttempt) -> Outcome | None:
        """Ask once, as soon as a key may be used; return the outcome if the answer is final.

        The key is taken when the connection stands: what counts as sent is then sent, however long connecting
        took. While the key is waited for the server may close the connection: it is then opened once more.
        """
        if attempt.stop.is_set():
            raise Interrupted(phrase("tools.stopped"))
        fault = connection.open()
        if fault is not None:
            return self._judge(attempt, None, fault, None)
        key = self.keys.acquire(attempt.batch.service, attempt.stop)
        sent = time.monotonic()
        path, headers = path_of(attempt.batch), {"apiKey": key.secret}
        answer = connection.open() or connection.get(path, headers, MAX_BATCH_BYTES)
        return self._judge(attempt, key, answer, time.monotonic() - sent)

    def _judge(
        self, attempt: BatchAttempt, key: ApiKey | None, answer: Response, seconds: float | None
    ) -> Outcome | None:
        """Return the outcome if an answer is final; else note in the attempt how it goes on."""
        verdict = decide(answer, datetime.now(UTC))
        if answer.fault or seconds is None:
            self._events.asked("no_answer", None)
        else:
            self._latencies.append(seconds)
            self._events.asked(verdict.action.value, seconds)
        if verdict.action is Action.SLOW_DOWN:
            attempt.refusals += 1
            verdict = verdict._replace(wait_s=verdict.wait_s or next(attempt.after_refusal))
        if key is not None:
            steer(self.keys, key, attempt.batch.service, verdict)
        if verdict.action is Action.ACCEPT:
            return read_records(attempt.batch, verdict.records, self._api_time(answer))
        if verdict.action is Action.CODES_UNKNOWN:
            return Outcome(attempt.batch, unknown=attempt.batch.split())
        again = verdict.action is Action.RETRY
        attempt.faults += again
        failure = _why_final(attempt, verdict)
        if failure is not None:
            return _failed(attempt.batch, failure)
        log.debug("%s batch again: %s", attempt.batch.product, verdict.failure.words)
        attempt.pause_s = 0.0
        if again:
            attempt.pause_s = verdict.wait_s or next(attempt.after_fault)
        return None

    def _api_time(self, answer: Response) -> float:
        """Return the later of this machine's time and the API's; that they differ is said once."""
        now = self._clock.wall()
        fault = clock_fault(answer, now)
        if fault and not self._clock_said:
            self._clock_said = True
            log.warning("%s", fault)
        return max(now, _http_date(answer.date))


def _why_final(attempt: BatchAttempt, verdict: Verdict) -> Failure | None:
    """Return why a batch is not tried again after an answer without trades, None if it is."""
    hopeless = verdict.action is Action.GIVE_UP
    late = verdict.action is Action.RETRY and verdict.wait_s > LONGEST_RETRY_AFTER_S
    tries = attempt.faults + attempt.refusals
    spent = attempt.faults >= MAX_TRIES or attempt.refusals >= MAX_REFUSALS
    spent |= bool(attempt.batch.bars) and tries >= MAX_BAR_TRIES
    if not (hopeless or late or spent):
        return None
    kind, words = verdict.failure
    if late:
        words = phrase("infoway.asks_to_wait", said=words, s=verdict.wait_s)
    if tries > 1:
        words = phrase("infoway.tries", said=words, n=tries)
    if hopeless and verdict.setting:
        words = see(words, verdict.setting)
    return Failure(kind, words)


def steer(keys: KeyPool, key: ApiKey, product: str, verdict: Verdict) -> None:
    """Tell the keys what an answer says of the one that was used for it."""
    why = verdict.failure.words
    if verdict.action is Action.ACCEPT:
        keys.trust(key)
    elif verdict.action is Action.KEY_DEAD:
        keys.retire(key, why)
    elif verdict.action is Action.KEY_DOUBTED:
        keys.doubt(key, why)
    elif verdict.action is Action.KEY_LACKS_PRODUCT:
        keys.close_product(key, product, why)
    elif verdict.action is Action.KEY_DAY_OVER:
        keys.rest_until_midnight(key, why)
    elif verdict.action is Action.SLOW_DOWN:
        keys.slow_down(key, verdict.wait_s, why)


def path_of(batch: Batch) -> str:
    """Return what to ask for to have the latest trades of a batch, or its daily bars."""
    codes = quote(batch.codes, safe=",")
    if batch.bars:
        return f"/{batch.product}/batch_kline/8/{batch.bars}/{codes}"
    return f"/{batch.product}/batch_trade/{codes}"


class PackageInfo(NamedTuple):
    """What the API says of a key: its plan's name, requests a second, and its end (epoch seconds).

    '' and 0: not told. Of the stream, None where not told: connections, codes on each of them, codes on all.
    """

    name: str
    per_second: float
    ends: float = 0.0
    connections: int | None = None
    per_connection: int | None = None
    in_all: int | None = None

    def plan(self) -> Plan:
        """Return the limits: of the minute and the day those of the price list by the name, else by the rate."""
        rate, name = self.per_second, self.name or phrase("infoway.unnamed")
        listed = PLANS.get(PACKAGE_NAMES.get(name.casefold(), ""))
        if listed is None:
            return Plan(name, rate, max(1, int(rate * 60)), max(1, int(rate * 86_400)))
        return Plan(name, rate, listed.per_minute, listed.per_day)

    def end_words(self, now: float) -> str:
        """Return when the plan ends, '' unless that is soon; `now` is epoch seconds."""
        if not self.ends or self.ends - now > ENDS_SOON_S:
            return ""
        if self.ends <= now:
            return phrase("infoway.plan_ended", when=iso_after(self.ends, 0))
        left, _ = age_words(self.ends - now)
        return phrase("infoway.plan_ends", when=iso_after(self.ends, 0), left=left)


NO_PACKAGE = PackageInfo("", 0.0)


def read_package(envelope: Mapping[str, Any]) -> PackageInfo | None:
    """Return what an answer says of a key's plan, None when it holds nothing of that form."""
    data = envelope.get("data")
    if envelope.get("ret") != 200 or not isinstance(data, dict):
        return None
    name, rate = data.get("packageName"), _number_in(data, "apiNumPerSec")
    ends = _number_in(data, "expireTime")
    if not 1 / 60 <= rate <= MOST_PER_SECOND:
        return None
    if ends >= EARLIEST_TRADE_MS:  # the unit is not documented; as seconds it is the year 30,000
        ends /= 1000
    if not 0 <= ends <= LATEST_TRADE_MS / 1000:
        ends = 0.0
    shown = one_line(name, 40) if isinstance(name, str) else ""
    stream = (_count_in(data, field) for field in ("maxWsConNum", "maxNum", "allWsNum"))
    return PackageInfo(shown, rate, ends, *stream)


def _number_in(data: Mapping[str, Any], name: str) -> float:
    """Return a number of an answer, 0 where there is none."""
    value = data.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < MOST_BELIEVED:
        return 0.0
    return float(value)


def _count_in(data: Mapping[str, Any], name: str) -> int | None:
    """Return a count of an answer, None where there is none."""
    told = (
        name in data
        and type(data[name]) in (int, str)
        and re.fullmatch(r"\d{1,9}", str(data[name]), re.ASCII)
    )
    return int(data[name]) if told else None


def judge(answer: Response) -> tuple[Mapping[str, Any], Verdict]:
    """Return what an answer holds that is no batch's, nothing of a faulty one, and what follows if it is no good."""
    envelope = {} if answer.fault else json_object(answer.body) or {}
    return envelope, decide(answer, datetime.now(UTC))


def _failed(batch: Batch, failure: Failure) -> Outcome:
    return Outcome(batch, failures=dict.fromkeys(batch.split(), failure))


class KeyPlans:
    """The plans of the keys for which none is set: as the API tells them once a day, kept in the local file.

    Any thread may ask; they take turns. What cannot be had now is the plan told last, and before any the smallest one.
    """

    def __init__(self, file: LocalFile, api: InfowayApi, clock: Clock = SYSTEM_CLOCK) -> None:
        self._file = file
        self._api = api
        self._clock = clock
        self._to_ask = [key for key in api.keys.keys if key.plan is PLAN_TO_ASK]
        self._not_before: dict[str, float] = {}  # by digest, monotonic: after a question without an answer
        self._told: dict[str, tuple[str, PackageInfo]] = {}  # by digest: the day, and what was said
        self._no_plan_said: set[str] = set()
        self._asking = threading.Lock()
        self.recall()

    def of(self, key: ApiKey) -> PackageInfo:
        """Return what the API said of a key last, NO_PACKAGE before it said anything."""
        kept = self._kept(key)
        return NO_PACKAGE if kept is None else kept[1]

    def recall(self) -> None:
        """Let the keys go by what was told before, to whichever process."""
        for key in self._to_ask:
            info = self.of(key)
            if info is not NO_PACKAGE:
                self._api.keys.set_plan(key, info.plan())

    def ask(self, stop: threading.Event) -> None:
        """Ask for what was not told today, before a run."""
        with contextlib.suppress(Interrupted), turn(self._asking, stop):
            self.recall()
            self._ask_what_is_due(stop)

    def _ask_what_is_due(self, stop: threading.Event) -> None:
        for key in self._to_ask:
            if not self._is_due(key):
                continue
            found = self._api.package(key, stop)
            if isinstance(found, PackageInfo):
                self._keep(key, found)
                continue
            self._not_before[key.digest] = self._clock.monotonic() + PLAN_RETRY_S
            self._say_none(key, found)
            if found.kind is FailureKind.NETWORK:  # each question more would take as long
                return

    def _is_due(self, key: ApiKey) -> bool:
        kept = self._kept(key)
        told_today = kept is not None and kept[0] == utc_day(self._clock.wall())
        failed = self._clock.monotonic() < self._not_before.get(key.digest, -math.inf)
        return not (told_today or failed or key.dead)

    def _kept(self, key: ApiKey) -> tuple[str, PackageInfo] | None:
        """Return the day on which the API told of a key, and what, None if never."""
        told = self._told.get(key.digest)
        if told is None or told[0] != utc_day(self._clock.wall()):  # another process may have asked today
            query = (
                "SELECT asked_on, name, per_second, ends, connections, per_connection, in_all "
                "FROM key_package WHERE digest = ?"
            )
            try:
                row = self._file.read_one(query, key.digest)
            except StoreError as error:
                log.warning("the plan of a key cannot be read: %s", error)
                row = None
            if row is not None:
                told = self._told[key.digest] = (row[0], PackageInfo(*row[1:]))
        return told

    def _keep(self, key: ApiKey, info: PackageInfo) -> None:
        today = utc_day(self._clock.wall())
        self._told[key.digest] = (today, info)
        self._api.keys.set_plan(key, info.plan())
        ending = info.end_words(self._clock.wall())
        if ending:
            log.warning("API key %s: %s", key.shown, ending)
        try:
            with self._file.write() as db:
                row = (key.digest, today, *info)
                db.execute("INSERT OR REPLACE INTO key_package VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
        except StoreError as error:
            log.warning("the plan of a key is not kept: %s", error)

    def _say_none(self, key: ApiKey, failure: Failure) -> None:
        if key.digest in self._no_plan_said or key.dead:
            return
        self._no_plan_said.add(key.digest)
        if key.digest in self._told:
            log.warning(
                "the plan of API key %s cannot be had (%s): it goes by the limits that it told last; "
                "INFOWAY_PLAN can name one",
                key.shown,
                failure.words,
            )
            return
        log.warning(
            "the plan of API key %s cannot be had (%s): it goes by Free's limits; INFOWAY_PLAN can name one",
            key.shown,
            failure.words,
        )


class Symbol(NamedTuple):
    """An entry of the API's symbol lists; a name that it does not have is ''."""

    type: str
    code: str
    name_cn: str
    name_hk: str
    name_en: str

    @property
    def name(self) -> str:
        """The name to show."""
        return self.name_cn or self.name_en or self.name_hk

    @property
    def typed(self) -> str:
        """What to type for it: the code, at its product where the code alone does not tell that."""
        product = SYMBOL_TYPES[self.type]
        try:
            plain = parse_code(self.code)
        except InstrumentError:
            return f"{product}:{self.code}"
        return self.code if plain[:2] == (self.code, product) else f"{product}:{self.code}"


# The kind of words about a list that was asked for a moment ago.
ASKED_IN_VAIN = "infoway.asked_in_vain"


def read_symbols(kind: str, envelope: Mapping[str, Any]) -> list[Symbol] | None:
    """Return the entries of a list of some type, None when an answer holds none of that form."""
    data = envelope.get("data")
    if envelope.get("ret") != 200 or not isinstance(data, list):
        return None
    found = []
    for entry in data:
        code = entry.get("symbol") if isinstance(entry, dict) else None
        if isinstance(code, str) and 0 < len(code) <= MAX_CODE_LENGTH and code.isprintable():
            names = (entry.get(name) for name in ("name_cn", "name_hk", "name_en"))
            found.append(Symbol(kind, code, *(one_line(name, 100) if name else "" for name in names)))
    return found


def kept_symbols(file: LocalFile, codes: Collection[str]) -> list[Symbol]:
    """Return the entries of codes in the lists that are kept in the local file. Raises StoreError."""
    query = "SELECT * FROM symbols WHERE code IN (SELECT value FROM json_each(?)) ORDER BY code, type"
    return [Symbol(*row) for row in file.read_all(query, json.dumps([*codes]))]


def symbol_names(file: LocalFile, codes: Collection[str], english: bool = False) -> dict[str, str]:
    """Return the names of codes as far as their lists are kept in the local file. Raises StoreError."""
    found: dict[str, list[str]] = {}
    for symbol in kept_symbols(file, codes):
        name = symbol.name
        if english:
            name = symbol.name_en or name
        found.setdefault(symbol.code, []).append(name)
    return {code: " / ".join(dict.fromkeys(filter(None, names))) for code, names in found.items()}


class Directory:
    """Which instruments exist: the API's symbol lists, each asked for when something needs it, once a day at most.

    They are kept in the local file, for all processes. Any thread may ask; they take turns. Raises StoreError.
    """

    def __init__(self, file: LocalFile, api: InfowayApi, clock: Clock = SYSTEM_CLOCK) -> None:
        self._file = file
        self._api = api
        self._clock = clock
        self._not_before: dict[str, float] = {}  # by type, monotonic: after a question without an answer
        self._asking = threading.Lock()

    def refresh(self, types: Iterable[str], stop: threading.Event) -> str:
        """Ask for those of the lists that were not had today; return why one cannot be had, '' if all are here."""
        try:
            with turn(self._asking, stop):
                return self._refresh(types, stop)
        except Interrupted as error:
            return error.message

    def _refresh(self, types: Iterable[str], stop: threading.Event) -> str:
        """Do so. Raises Interrupted."""
        today, why = utc_day(self._clock.wall()), ""
        kept = dict(self._file.read_all("SELECT type, asked_on FROM symbol_lists"))
        for kind in types:
            if kept.get(kind) == today:
                continue
            if self._clock.monotonic() < self._not_before.get(kind, -math.inf):
                why = why or phrase(ASKED_IN_VAIN)
                continue
            found = self._api.symbols(kind, stop)
            if not isinstance(found, Failure):
                self._keep(kind, found, today)
                continue
            why = why or found.words
            # each list more may take as long as one from a server that hangs
            paused = SYMBOL_TYPES if found.kind is FailureKind.NETWORK else [kind]
            self._not_before.update(dict.fromkeys(paused, self._clock.monotonic() + PLAN_RETRY_S))
            if found.kind is not FailureKind.KEY:  # the plan may have the others
                break
        return why

    def search(self, text: str) -> list[Symbol]:
        """Return the instruments whose code or a name holds a text: first those that are it, or begin with it."""
        wanted = text.strip().casefold()
        escaped = re.sub(r"([\\%_])", r"\\\1", wanted)
        where = " OR ".join(
            f"{column} LIKE ? ESCAPE '\\'" for column in ("code", "name_cn", "name_hk", "name_en")
        )
        query = f"SELECT * FROM symbols WHERE {where}"  # noqa: S608
        found = [Symbol(*row) for row in self._file.read_all(query, *[f"%{escaped}%"] * 4)]
        return sorted(found, key=lambda symbol: (_distance(symbol, wanted), symbol.code, symbol.type))

    def find(self, unclear: UnclearCode, stop: threading.Event) -> Instrument | None:
        """Return what a text means whose form does not tell, None where the lists know nothing of it.

        Raises InstrumentError where it could be several, or a name: it proposes what exists.
        """
        guesses = [parse_code(code) for code in unclear.guesses]
        is_name = not unclear.text.isascii()
        why = self.refresh(SYMBOL_TYPES if is_name else self._types_of(guesses), stop)
        if why and why != phrase(ASKED_IN_VAIN):  # which was said then
            log.warning("the symbol lists cannot be had: %s", why)
        exact = kept_symbols(self._file, {unclear.text, *(guess.code for guess in guesses)})
        if len(exact) == 1 and exact[0].code == unclear.text:
            return Instrument(exact[0].code, SYMBOL_TYPES[exact[0].type])
        if not exact and is_name:
            exact = self.search(unclear.text)[:NAMES_SHOWN]
        if not exact:
            return None
        proposals = [phrase("infoway.proposal", code=symbol.typed, name=symbol.name) for symbol in exact]
        raise InstrumentError(
            phrase(
                "instruments.did_you_mean",
                why=phrase("infoway.ambiguous"),
                codes=alternatives(proposals),
            )
        )

    def explain(self, unknown: Instrument, stop: threading.Event) -> str:
        """Return whether an instrument that the API does not know exists, '' where the lists cannot tell."""
        types, market = self._types_of([unknown]), market_of(unknown.code)
        listed = [kind for kind in types if kind not in BARE_TYPES]
        if listed:  # it has a suffix
            types = listed
        elif market is not None:
            types = [kind for kind in types if SYMBOL_TYPES[kind] == market.product]
        if self.refresh(types, stop):
            return ""
        found = [symbol for symbol in kept_symbols(self._file, [unknown.code]) if symbol.type in types]
        if found:
            name = found[0].name or found[0].code
            return phrase("infoway.listed", name=name)
        return phrase("infoway.unlisted")

    def _types_of(self, guesses: Iterable[Instrument]) -> list[str]:
        """Return the types of the lists that can have an instrument without a suffix, or one of some guesses."""
        types = set(BARE_TYPES)
        for guess in guesses:
            suffix = guess.code.rpartition(".")[2]
            if suffix in MARKETS:
                types.add(f"STOCK_{'CN' if suffix in ('SH', 'SZ') else suffix}")
        return [kind for kind in SYMBOL_TYPES if kind in types]

    def _keep(self, kind: str, symbols: Iterable[Symbol], today: str) -> None:
        with self._file.write() as db:
            db.execute("DELETE FROM symbols WHERE type = ?", (kind,))
            db.executemany("INSERT OR REPLACE INTO symbols VALUES (?, ?, ?, ?, ?)", symbols)
            db.execute("INSERT OR REPLACE INTO symbol_lists VALUES (?, ?)", (kind, today))


def _distance(symbol: Symbol, wanted: str) -> int:
    """Return how far an instrument is from what was looked for: 0 it is that, 1 it begins so, 2 it holds it."""
    texts = [text.casefold() for text in symbol[1:]]
    if wanted in texts or wanted == texts[0].partition(".")[0]:
        return 0
    return 1 if any(text.startswith(wanted) for text in texts) else 2


class Source(Protocol):
    """Where trades come from: the API, or the demo."""

    def fetch(self, batches: Iterable[Batch], stop: threading.Event) -> Iterator[Outcome | None]:
        """Yield an Outcome for each batch, and None now and then while none is done."""


# About what things cost, that a synthetic price is one that its instrument could have: halves of pairs in US dollars,
# the rest in the currency of their market.
# fmt: off
DEMO_USD = {
    "USD": 1.0, "USDT": 1.0, "USDC": 1.0,
    "EUR": 1.16, "GBP": 1.33, "JPY": 0.0065, "CNY": 0.14, "CNH": 0.14, "AUD": 0.66, "NZD": 0.58, "CAD": 0.72,
    "CHF": 1.25, "HKD": 0.128, "SGD": 0.77, "KRW": 0.0007, "TWD": 0.032, "INR": 0.0113, "XAU": 4000.0, "XAG": 48.0,
    "XPT": 1600.0, "XPD": 1400.0, "BTC": 95_000.0, "ETH": 3300.0, "BNB": 900.0, "SOL": 150.0, "XRP": 2.3,
    "DOGE": 0.17, "ADA": 0.6, "LTC": 95.0,
}
DEMO_PRICES = {
    "AAPL.US": 270.0, "TSLA.US": 420.0, "MSFT.US": 490.0, "NVDA.US": 185.0, "00700.HK": 620.0, "09988.HK": 155.0,
    "600519.SH": 1450.0, "000001.SZ": 11.5, "300750.SZ": 380.0, "7203.JP": 3100.0, "005930.KS": 98_000.0,
    "RELIANCE.IN": 1480.0, "2330.TW": 1450.0, "US500": 6700.0, "HK50": 25_800.0, "USOIL": 60.0, "UKOIL": 64.0,
}
# fmt: on


def _demo_price(code: str) -> float:
    """Return about what an instrument costs: by name, by both halves of a pair, else anything up to 400."""
    for quoted in (*CRYPTO_QUOTES, *CURRENCIES):
        base = code.removesuffix(quoted)
        if base != code and base in DEMO_USD and quoted in DEMO_USD:
            return DEMO_USD[base] / DEMO_USD[quoted]
    by_chance = 1 + int(sha256(code.encode())[:8], 16) % 40_000 / 100
    return DEMO_PRICES.get(code, by_chance)


class DemoApi:
    """Synthetic trades in the API's own form: no network, no key. One trade per code and `step_s`, whole seconds."""

    def __init__(self, clock: Clock = SYSTEM_CLOCK, step_s: int = 60) -> None:
        self._clock = clock
        self._step_s = step_s

    def fetch(self, batches: Iterable[Batch], stop: threading.Event) -> Iterator[Outcome | None]:
        """Yield an Outcome for each batch, read from an answer like a real one."""
        for batch in batches:
            if stop.is_set():
                return
            body = json.dumps(
                {"ret": 200, "msg": "success", "data": [self._record(c) for c in batch.split()]}
            )
            verdict = decide(Response(200, body.encode()), datetime.now(UTC))
            yield read_records(batch, verdict.records)

    def _record(self, code: str) -> dict[str, object]:
        number = int(self._clock.wall() // self._step_s)
        step = int(sha256(f"{code}|{number}".encode())[:8], 16)
        minute = number * self._step_s / 60
        tides = 0.6 * math.sin(minute / 97 + len(code)) + 0.3 * math.sin(minute / 23 + ord(code[0]))
        price = _demo_price(code) * (1 + (tides + (step % 2001 - 1000) / 10_000) / 100)
        p = f"{price:.{max(2, 4 - math.floor(math.log10(price)))}f}"
        volume = 1 + step % 500
        vw = f"{float(p) * volume:.3f}"
        return {
            "s": code,
            "t": number * self._step_s * 1000,
            "p": p,
            "v": str(volume),
            "vw": vw,
            "td": step % 3,
        }


# ======================================================================================================
# Stream
# ======================================================================================================
#
# Promises:
#   1. No connection sends more than 60 frames in any minute, of whatever kind; a refusal is never hammered at.
#   2. What was asked for is acked, asked for again, named as refused, or the end of the connection.
#   3. What is handed on was asked for and is a trade by the same rules as an answer's record; the rest is counted.
#   4. The key stands in the address alone: no log, no error, no proxy's line holds it.

# What frames are, by their `code`.
SUBSCRIBE, SUBSCRIBED, PUSH = 10000, 10001, 10002
HEARTBEAT, UNSUBSCRIBE, UNSUBSCRIBED = 10010, 11000, 11010
WELCOME = 200
# Numbers from here on are kinds of frames; lower ones say how something went.
LOWEST_KIND = 1000
# Codes of one frame, as many as users send.
CODES_PER_FRAME = 100
HEARTBEAT_S = 30.0
# The API cuts off beyond 60 frames a minute, and bans. Two or three of a minute's are heartbeats, some pongs, and
# what goes out evenly may arrive in a bunch.
ASKS_PER_MINUTE = 45
# What is not acked in this time is asked again, so often in all.
ACK_S, ASK_TRIES = 8.0, 3
# After a reconnect the old connection's codes count for up to three minutes.
LATER_S, LATER_TRIES = 60.0, 3
# Connections of a process that ended count for so long.
OLD_CONNECTIONS_S = (120.0, 180.0)
FRAME_RATE_S = (60.0, 90.0)
# A market that is open and says nothing for so long is subscribed anew; on holidays, and in lunch breaks, which are
# not known here, twice as long each time.
SILENCE_S, SILENCE_CAP_S = 90.0, 1440.0
# What is sent and not confirmed by the peer's system for so long ends a connection: heartbeats are not answered.
UNCONFIRMED_S = 60.0
# A push has a hundred bytes, the longest text that was seen two hundred.
MAX_STREAM_BYTES = 1024 * 1024
# Trades that are handed on at once.
MOST_AT_ONCE = 1000
# Frames of which it is known that an error is about them, and not about a later one.
TRACES_KEPT = 200
# Error words are shown up to this length.
SAID_LENGTH = 160


# ------------------------------------------------------------------------------------------------------
# Limits, and the spreading of codes
# ------------------------------------------------------------------------------------------------------


class StreamLimits(NamedTuple):
    """What a key may have open: connections, codes on each, codes on all; `not_for`: products that it is refused."""

    connections: int
    per_connection: int
    in_all: int
    not_for: frozenset[str] = frozenset()


# By the plan's name: Infoway's price list.
STREAM_LIMITS = {
    "free": StreamLimits(1, 10, 10),
    "basic": StreamLimits(1, 200, 200),
    "premium": StreamLimits(2, 600, 800),
    "pro": StreamLimits(9, 600, 5000),
}


def stream_limits(info: PackageInfo, plan: Plan) -> StreamLimits:
    """Return a key's limits: as the API told them, else those of its plan's name, else of its rate."""
    name = PACKAGE_NAMES.get(plan.name.casefold(), "")
    if name not in STREAM_LIMITS:
        within = [one for one, listed in PLANS.items() if 0 < listed.per_second <= plan.per_second]
        # a rate of 0 has no limit
        name = (
            max(within, key=lambda one: PLANS[one].per_second, default="free") if plan.per_second else "pro"
        )
    listed = STREAM_LIMITS[name]
    told = (info.connections, info.per_connection, info.in_all)
    found = [one if said is None else said for said, one in zip(told, listed[:3], strict=True)]
    return StreamLimits(found[0], found[1], found[2])


class Allotment(NamedTuple):
    """One connection: the key's digest, the product, the codes."""

    key: str
    product: str
    codes: tuple[str, ...]


def allot(
    codes: Mapping[str, Sequence[str]],
    keys: Mapping[str, StreamLimits],
    before: Sequence[Allotment] = (),
) -> tuple[list[Allotment], dict[str, list[str]]]:
    """Spread codes, by product, over connections within the limits of keys, by digest; return the rest, too.

    As few connections as will do, the same ones each time. `before`: those that stand. Their codes stay where they
    are, and they come first, unless more find room when all are spread anew.
    """
    kept, rest = _spread(codes, keys, before)
    if before and rest:
        anew = _spread(codes, keys, ())
        if sum(map(len, anew[1].values())) < sum(map(len, rest.values())):
            return anew
    return kept, rest


def _spread(
    codes: Mapping[str, Sequence[str]], keys: Mapping[str, StreamLimits], before: Sequence[Allotment]
) -> tuple[list[Allotment], dict[str, list[str]]]:
    left = {product: dict.fromkeys(some) for product, some in codes.items()}
    room = {key: [limits.connections, limits.in_all] for key, limits in keys.items()}
    found: list[tuple[str, str, list[str]]] = []

    def take(key: str, chosen: list[str], wanted: Iterable[str], product: str) -> None:
        most = min(keys[key].per_connection - len(chosen), room[key][1])
        new = list(islice(wanted, max(0, most)))
        for code in new:
            del left[product][code]
        room[key][1] -= len(new)
        chosen += new

    def open_one(key: str, product: str, wanted: Iterable[str]) -> None:
        chosen: list[str] = []
        take(key, chosen, wanted, product)
        if chosen:
            room[key][0] -= 1
            found.append((key, product, chosen))

    for one in before:
        limits, here = keys.get(one.key), left.get(one.product, {})
        if limits and room[one.key][0] > 0 and one.product not in limits.not_for:
            open_one(one.key, one.product, [code for code in one.codes if code in here])
    for key, product, chosen in found:
        take(key, chosen, list(left[product]), product)
    while True:
        # the most codes at once, with the key that has the least room for more
        places = [
            (min(len(some), keys[key].per_connection, in_all), -in_all, key, product)
            for key, (connections, in_all) in room.items()
            for product, some in left.items()
            if connections > 0 and product not in keys[key].not_for
        ]
        most = max(places, key=itemgetter(0, 1), default=(0, 0, "", ""))
        if most[0] <= 0:
            break
        open_one(most[2], most[3], list(left[most[3]]))
    rest = {product: [*some] for product, some in left.items() if some}
    return [Allotment(key, product, tuple(chosen)) for key, product, chosen in found], rest


# ------------------------------------------------------------------------------------------------------
# Errors
# ------------------------------------------------------------------------------------------------------


class StreamAction(Enum):
    """What to do after an error of the stream."""

    DIAL_AGAIN = "dial again"
    WAIT = "wait, then dial again"
    NEVER = "do not dial again for this product with this key"
    KEY_OUT = "do not dial again with this key"
    LESS = "leave the frame's codes out"
    LATER = "ask for the frame's codes again later, and leave them out in the end"
    HALVE = "ask for each half of the frame's codes, until the wrong ones are found"
    ASK_AGAIN = "ask again as if nothing had been answered"


class StreamEnd(NamedTuple):
    """The connection is over, and what follows. `wait_s`: where that is a wait, no dial before."""

    words: str
    action: StreamAction
    wait_s: float = 0.0


class StreamError(NamedTuple):
    """A row of the table of errors: its number, what follows, what it means, and how it is said without a number.

    `means`: a kind of words. `setting`: what an operator looks at. `wait_s`: between which times a wait is.
    """

    code: int
    action: StreamAction
    means: str
    setting: str
    prose: str = ""
    wait_s: tuple[float, float] = OLD_CONNECTIONS_S


_DIAL, _WAIT, _NEVER = StreamAction.DIAL_AGAIN, StreamAction.WAIT, StreamAction.NEVER
_OUT, _LESS, _LATER, _HALVE = StreamAction.KEY_OUT, StreamAction.LESS, StreamAction.LATER, StreamAction.HALVE
_KEY, _PLAN, _CODES, _URL = "INFOWAY_API_KEY", "INFOWAY_PLAN", "COLLECT_CODES", "INFOWAY_STREAM_URL"
_BAD_KEY, _BAD_CODES = "stream.bad_key", "stream.bad_codes"
# Of several rows whose words are in a text the first one counts. 401, 403 and 429 are those of the handshake.
STREAM_ERRORS = (
    StreamError(516, _LATER, "stream.many_codes", _PLAN, r"total number of .*exceed"),
    StreamError(512, _WAIT, "stream.many_connections", _PLAN, r"connections? .*exceed"),
    StreamError(505, _LESS, "stream.many_on_one", _PLAN, r"quantity exceed"),
    StreamError(501, _WAIT, "stream.many_frames", _CODES, r"frequency|rate limit", FRAME_RATE_S),
    StreamError(508, _OUT, "stream.plan_ended", _KEY, r"expired"),
    StreamError(509, _OUT, _BAD_KEY, _KEY, r"key (?:does )?not exist|token invalid"),
    StreamError(517, _OUT, _BAD_KEY, _KEY, r"key error|unauthorized|key is required"),
    StreamError(518, _OUT, _BAD_KEY, _KEY, r"key verif"),
    StreamError(510, _OUT, "stream.disabled", _KEY, r"key .*disabled"),
    StreamError(511, _OUT, "stream.banned", _KEY, r"\bbanned\b"),
    StreamError(519, _NEVER, "stream.not_in_plan", _KEY, r"\b(?:no|not have|without) permission"),
    StreamError(521, _HALVE, "stream.not_free", _PLAN, r"free plan"),
    StreamError(520, _HALVE, "stream.other_product", _CODES, r"suffix"),
    StreamError(506, _HALVE, _BAD_CODES, _CODES, r"param error"),
    StreamError(507, _HALVE, _BAD_CODES, _CODES, r"param lost"),
    StreamError(513, _DIAL, "stream.no_heartbeat", _URL, r"heart ?beat"),
    StreamError(401, _NEVER, "stream.bad_key_or_plan", _KEY),
    StreamError(403, _WAIT, "stream.gateway", _KEY),
    StreamError(429, _WAIT, "stream.many_or_old", _PLAN),
)
_IN_VAIN = (_WAIT, _NEVER, _OUT)
# What no row is for.
UNKNOWN_ERROR = StreamError(0, StreamAction.ASK_AGAIN, "", "")
_BY_CODE = {row.code: row for row in STREAM_ERRORS}


def stream_error(code: object, text: str) -> StreamError:
    """Return the row of an error: by its number, else by one in its text, else by its words."""
    if type(code) is int and code in _BY_CODE:
        return _BY_CODE[code]
    found = re.search(r"(?<!\d)(?:401|403|429|5\d\d)(?!\d)", text)
    if found and int(found[0]) in _BY_CODE:
        return _BY_CODE[int(found[0])]
    return next(
        (row for row in STREAM_ERRORS if row.prose and re.search(row.prose, text, re.I)), UNKNOWN_ERROR
    )


def _end_by(row: StreamError, words: str, rng: random.Random) -> StreamEnd:
    return StreamEnd(words, row.action, rng.uniform(*row.wait_s) if row.action is _WAIT else 0.0)


def _error_words(row: StreamError, said: str) -> str:
    if not row.means:
        return said
    return see(phrase("tools.because", what=said, why=phrase(row.means)), row.setting)


# ------------------------------------------------------------------------------------------------------
# The protocol
# ------------------------------------------------------------------------------------------------------


class SendText(NamedTuple):
    """A text frame to send now."""

    text: str


class Subscribed(NamedTuple):
    """These codes' frame was acked, which says nothing of each of them."""

    codes: tuple[str, ...]


class CodesRefused(NamedTuple):
    """These codes are not subscribed, nor asked for again until they are dropped and wanted anew."""

    codes: tuple[str, ...]
    words: str


class Silent(NamedTuple):
    """Nothing came for so many seconds although a market of these codes is open: they are asked for anew."""

    codes: tuple[str, ...]
    seconds: float


class Said(NamedTuple):
    """Something for the log alone."""

    words: str


StreamEvent: TypeAlias = SendText | Subscribed | CodesRefused | Silent | Said | StreamEnd


class Pushes(NamedTuple):
    """What has come: trades in the order of arrival, events, and how much was dropped, with why of the first."""

    trades: list[Trade]
    events: list[StreamEvent]
    dropped: int = 0
    why: str = ""

    @property
    def is_last(self) -> bool:
        """Whether the connection is over."""
        return any(isinstance(event, StreamEnd) for event in self.events)


class _Standing(Enum):
    """How it stands with a code that was asked for."""

    ASKED = 1
    ON = 2
    DROPPING = 3
    REFUSED = 4


class _Ask:
    """A frame's codes, until it is acked or given up: to be sent at `at`, or sent and to be acked by `due`."""

    def __init__(self, subscribes: bool, codes: Sequence[str], at: float) -> None:
        self.subscribes = subscribes
        self.codes = tuple(codes)
        self.at = at
        self.due = math.inf
        self.traces: set[str] = set()  # one of each try: an ack may be late
        self.tries = 0
        self.put_off = 0  # how often it was refused for now
        self.why = ""  # what was said to the last try


class StreamProtocol:
    """One connection's conversation about one product.

    The caller passes in every text (`receive`), calls `tick` no later than `next_tick` and after each `receive`,
    and does what the events say, at once. `now` is monotonic seconds, `wall_ms` epoch milliseconds; `asks` are
    the frames of connections before this one, which count in the same minute.
    """

    def __init__(
        self, product: str, now: float, rng: random.Random, asks: SlidingWindow | None = None
    ) -> None:
        self._product = product
        self._rng = rng
        self._window = asks or SlidingWindow(ASKS_PER_MINUTE, 60.0)
        self._wanted: dict[str, None] = {}
        self._standing: dict[str, _Standing] = {}
        self._markets: list[Market] = []
        self._is_to_do = False  # whether what is wanted and what stands may differ
        self._asks: list[_Ask] = []
        # traces of frames that are answered, and of heartbeats
        self._past: deque[str] = deque(maxlen=TRACES_KEPT)
        self._beat_at = now + HEARTBEAT_S
        self._heard_at = now
        self._silence_s = SILENCE_S
        self._silent_at = now + SILENCE_S

    @property
    def subscribed(self) -> int:
        """How many codes are subscribed now."""
        return sum(standing is _Standing.ON for standing in self._standing.values())

    def want(self, codes: Iterable[str]) -> None:
        """Have these codes, and no others, from now on."""
        self._wanted = dict.fromkeys(codes)
        markets = {name: market_named(name) for name in {market_name(code) for code in self._wanted}}
        self._markets = [market for market in markets.values() if market is not None]
        self._is_to_do = True

    # what comes

    def receive(self, texts: Iterable[str], now: float, latest_ms: int) -> Pushes:
        """Take in the texts of frames; no trade is later than `latest_ms`."""
        decode = NUMBERS_AS_TEXT.raw_decode
        records: list[Any] = []
        others: list[str] = []
        for text in map(str.strip, texts):
            try:
                frame, end = decode(text)
                if frame["code"] == PUSH and end == len(text):
                    records.append(frame["data"])
                    continue
            except (ValueError, KeyError, TypeError, RecursionError):
                pass  # no push as nearly all are: looked at below
            others.append(text)
        trades = plain_trades(records, latest_ms)
        bad: list[str] = []
        if len(trades) != len(records) or not {trade.s for trade in trades} <= self._wanted.keys():
            trades = [trade for one in records for trade in self._judged(one, latest_ms, bad)]
        events = [event for text in others for event in self._understand(text, now, bad)]
        if trades:
            self._heard_at = now
            if self._silence_s > SILENCE_S:
                self._silence_s, self._silent_at = SILENCE_S, now + SILENCE_S
        return Pushes(trades, events, len(bad), next(iter(bad), ""))

    def _judged(self, record: object, latest_ms: int, bad: list[str]) -> Iterator[Trade]:
        """Yield the trade that a push holds; if it is none, or nobody's, say why in `bad`."""
        try:
            trade = read_trade(record, self._product, latest_ms)
        except ValueError as error:
            bad.append(error_words(error))
            return
        if trade.s not in self._wanted:  # seen in lower case
            trade = trade._replace(s=trade.s.upper())
        if trade.s in self._wanted:
            yield trade
        else:
            bad.append(phrase("stream.not_asked_for", code=one_line(trade.s, 40)))

    def _understand(self, text: str, now: float, bad: list[str]) -> Iterator[StreamEvent]:
        """Yield what follows from a text that is no push; where it means nothing, say so in `bad`."""
        words = text
        failed = words.casefold().startswith("subscribe fail")
        if failed:
            words = words.partition(":")[2].strip()
        frame = json_object(words.encode())
        if frame is None and words[:1] in ("{", "["):
            bad.append(not_json_words(text.encode(), phrase("stream.its")))
        elif frame is None:
            yield from self._hear_words(one_line(words, SAID_LENGTH), failed, now)
        else:
            yield from self._hear(frame, now, bad)

    def _hear(self, frame: Mapping[str, Any], now: float, bad: list[str]) -> Iterator[StreamEvent]:
        kind, trace = frame.get("code"), frame.get("trace") or frame.get("traceId")
        ask = (
            next((ask for ask in self._asks if trace in ask.traces), None) if isinstance(trace, str) else None
        )
        if kind in (SUBSCRIBED, UNSUBSCRIBED):
            if ask is not None:  # else it is one of an earlier try, or of one that was given up
                yield from self._acked(ask)
        elif kind == PUSH:
            bad.append(phrase("stream.no_data"))
        elif kind in (WELCOME, HEARTBEAT):
            return
        elif type(kind) is int and kind >= LOWEST_KIND:
            bad.append(phrase("stream.other_frame", code=kind))
        else:
            words = words_of(frame)
            said = phrase("stream.says", words=words or phrase("stream.nothing_more"))
            if kind is not None:
                number = one_line(repr(kind), 40)
                said = phrase(
                    "stream.says_number", number=number, words=words or phrase("stream.nothing_more")
                )
            if ask is None and trace not in self._past:
                ask = self._oldest()
            yield from self._failed(stream_error(kind, words), said, ask, now)

    def _hear_words(self, said: str, failed: bool, now: float) -> Iterator[StreamEvent]:
        """Take in what is no JSON: a greeting, or an error in words."""
        row = stream_error(None, said)
        if row is UNKNOWN_ERROR and not failed:
            log.debug("the stream says: %s", said)
            return
        yield from self._failed(row, phrase("stream.says", words=said), self._oldest(), now)

    def _oldest(self) -> _Ask | None:
        """Return what an error without a trace is about: the first that was sent and is not answered."""
        sent = [ask for ask in self._asks if ask.subscribes and ask.due < math.inf]
        return min(sent, key=lambda ask: ask.due, default=None)

    def _acked(self, ask: _Ask) -> Iterator[StreamEvent]:
        self._drop(ask)
        self._is_to_do = True
        if not ask.subscribes:
            self._forget(ask.codes)
            return
        self._standing |= dict.fromkeys(ask.codes, _Standing.ON)
        yield Subscribed(self._still_wanted(ask.codes))

    def _failed(self, row: StreamError, said: str, ask: _Ask | None, now: float) -> Iterator[StreamEvent]:
        words = _error_words(row, said)
        if row.action is _DIAL or row.action in _IN_VAIN:
            yield _end_by(row, words, self._rng)
        elif ask is None:
            yield Said(words)
        elif row.action is StreamAction.ASK_AGAIN or not ask.subscribes:
            ask.why = words
        elif row.action is _LATER and ask.put_off < LATER_TRIES:
            ask.put_off += 1
            ask.at, ask.due, ask.tries = now + LATER_S, math.inf, 0
        elif row.action is _HALVE and len(ask.codes) > 1:
            self._drop(ask)
            middle = len(ask.codes) // 2
            self._asks += [_Ask(True, half, now) for half in (ask.codes[:middle], ask.codes[middle:])]
        else:
            yield from self._refused(ask, words)

    def _refused(self, ask: _Ask, words: str) -> Iterator[StreamEvent]:
        self._drop(ask)
        self._is_to_do = True
        self._standing |= dict.fromkeys(ask.codes, _Standing.REFUSED)
        codes = self._still_wanted(ask.codes)
        if codes:
            yield CodesRefused(codes, words)

    def _drop(self, ask: _Ask) -> None:
        self._asks.remove(ask)
        self._past.extend(ask.traces)

    def _still_wanted(self, codes: Iterable[str]) -> tuple[str, ...]:
        return tuple(code for code in codes if code in self._wanted)

    def _forget(self, codes: Iterable[str]) -> None:
        for code in codes:
            self._standing.pop(code, None)

    # what is due

    def next_tick(self) -> float:
        """Return when `tick` is wanted, monotonic seconds; in the past: now."""
        times = [self._beat_at, self._silent_at, *(ask.due for ask in self._asks)]
        ready = min((ask.at for ask in self._asks if self._may_go(ask)), default=math.inf)
        return 0.0 if self._is_to_do else min(*times, max(ready, self._window.ready_at(0.0)))

    def tick(self, now: float, wall_ms: int) -> list[StreamEvent]:
        """Return what is to be done now."""
        events: list[StreamEvent] = []
        if now >= self._beat_at:
            self._beat_at = now + HEARTBEAT_S
            trace = self._trace()
            self._past.append(trace)
            events.append(SendText(json.dumps({"code": HEARTBEAT, "trace": trace})))
        for ask in [ask for ask in self._asks if ask.due <= now]:
            events += self._overdue(ask, now)
        if now >= self._silent_at:
            events += self._silence(now, wall_ms)
        if self._is_to_do:
            self._plan(now)
        return events + self._send_asks(now)

    def _trace(self) -> str:
        return f"{self._rng.getrandbits(128):032x}"

    def _overdue(self, ask: _Ask, now: float) -> Iterator[StreamEvent]:
        """Ask again, or give up: on the codes if something was answered, else on the connection."""
        if ask.tries < ASK_TRIES:
            ask.at, ask.due = now, math.inf
        elif ask.why and ask.subscribes:
            yield from self._refused(ask, ask.why)
        elif ask.why:  # what cannot be unsubscribed goes on, and is dropped here
            self._drop(ask)
            self._forget(ask.codes)
            yield Said(ask.why)
        else:
            words = phrase("stream.no_ack", seconds=round(ASK_TRIES * ACK_S), tries=ASK_TRIES)
            yield StreamEnd(see(words, _URL), _DIAL)

    def _silence(self, now: float, wall_ms: int) -> Iterator[StreamEvent]:
        """Ask anew for what is subscribed where an open market says nothing for too long."""
        opened = min((opened_at(market, wall_ms) for market in self._markets), default=NEVER)
        if opened > wall_ms:
            self._heard_at, self._silence_s, opened = now, SILENCE_S, wall_ms
        since = max(self._heard_at, now - (wall_ms - opened) / 1000)
        on = [code for code, standing in self._standing.items() if standing is _Standing.ON]
        on = [*self._still_wanted(on)]
        if now - since >= self._silence_s and on and not self._asks:
            yield Silent(tuple(on), now - since)
            self._asks += [_Ask(True, codes, now) for codes in parts_of(on, CODES_PER_FRAME)]
            self._silence_s = min(SILENCE_CAP_S, 2 * self._silence_s)
            self._heard_at = since = now
        self._silent_at = max(since + self._silence_s, now + ACK_S)

    def _plan(self, now: float) -> None:
        """Make frames of the difference between what is wanted and what stands."""
        self._is_to_do = False
        unwanted = [code for code in self._standing if code not in self._wanted]
        self._forget([code for code in unwanted if self._standing[code] is _Standing.REFUSED])
        drop = [code for code in unwanted if self._standing.get(code) is _Standing.ON]
        add = [code for code in self._wanted if code not in self._standing]
        self._standing |= dict.fromkeys(drop, _Standing.DROPPING) | dict.fromkeys(add, _Standing.ASKED)
        self._asks += [_Ask(False, codes, now) for codes in parts_of(drop, CODES_PER_FRAME)]
        self._asks += [_Ask(True, codes, now) for codes in parts_of(add, CODES_PER_FRAME)]

    def _may_go(self, ask: _Ask) -> bool:
        """Whether a frame need not wait for codes that are to make room first."""
        return not ask.subscribes or all(other.subscribes for other in self._asks)

    def _send_asks(self, now: float) -> list[StreamEvent]:
        sent: list[StreamEvent] = []
        for ask in [ask for ask in self._asks if ask.at <= now and self._may_go(ask)]:
            if ask.subscribes and not ask.tries:  # what is no more wanted was never asked for
                self._forget(code for code in ask.codes if code not in self._wanted)
                ask.codes = self._still_wanted(ask.codes)
            if not ask.codes:
                self._drop(ask)
            elif self._window.ready_at(now) <= now:
                self._window.take(now)
                sent.append(SendText(self._frame_of(ask, now)))
        return sent

    def _frame_of(self, ask: _Ask, now: float) -> str:
        trace = self._trace()
        ask.traces.add(trace)
        ask.tries += 1
        ask.at, ask.due, ask.why = math.inf, now + ACK_S, ""
        kind = SUBSCRIBE if ask.subscribes else UNSUBSCRIBE
        return json.dumps({"code": kind, "trace": trace, "data": {"codes": ",".join(ask.codes)}})


# ------------------------------------------------------------------------------------------------------
# The connection
# ------------------------------------------------------------------------------------------------------


def refused_dial(error: DialError, rng: random.Random) -> StreamEnd:
    """Return what follows where the stream could not be dialled."""
    text = error.body.decode("utf-8", "replace").strip()
    envelope = json_object(error.body) or {}
    said = words_of(envelope) or (text if text == NO_KEY_TEXT else "")
    words = phrase("tools.because", what=error.message, why=said) if said else error.message
    row = _BY_CODE.get(error.status, UNKNOWN_ERROR)
    if error.status == 401 and text and text != NO_KEY_TEXT and type(envelope.get("code")) is not int:
        words = phrase("stream.not_of_the_api", words=words)
        row = _BY_CODE[403]._replace(means="", setting=_URL)
    if row is UNKNOWN_ERROR:
        return StreamEnd(see(words, _URL), _DIAL)
    if row.means:
        words = phrase("tools.because", what=words, why=phrase(row.means))
    return _end_by(row, see(words, row.setting), rng)


def _end_of(error: LinkLost, rng: random.Random) -> StreamEnd:
    """Return what follows where a connection is lost: a close may say why, as an error does."""
    words = phrase("stream.connection", why=error.message)
    row = stream_error(None, words) if error.code else UNKNOWN_ERROR
    if row.action not in _IN_VAIN:
        return StreamEnd(words, _DIAL)
    return _end_by(row, _error_words(row, words), rng)


class StreamConnection:
    """The stream of one product with one key: opened again as often as wanted, used by one thread.

    `want` and `wake` are for any thread.
    """

    def __init__(self, url: str, product: str, secret: str, proxies: Proxies = NO_PROXIES) -> None:
        query = urlencode({"business": product, "apikey": secret})
        self._address = f"{url}{'&' if '?' in url else '?'}{query}"
        self._product = product
        self._proxies = proxies
        self._rng = random.Random()
        self._asks = SlidingWindow(ASKS_PER_MINUTE, 60.0)
        self._wanted: tuple[str, ...] = ()
        self._told: tuple[str, ...] | None = None  # what the protocol was told of it
        self._link: WebSocket | None = None
        self._protocol = StreamProtocol(product, time.monotonic(), self._rng, self._asks)
        self._lock = threading.Lock()  # over the pipe, which is there while the link is
        self._pipe: tuple[int, int] | None = None
        self._is_woken = False

    @property
    def subscribed(self) -> int:
        """How many codes are subscribed now."""
        return self._protocol.subscribed if self._link else 0

    def want(self, codes: Iterable[str]) -> None:
        """Have these codes, and no others, from now on, or from when it is open."""
        self._wanted = tuple(codes)
        self._rouse()

    def wake(self) -> None:
        """Have `read` return at once, now or the next time."""
        self._is_woken = True
        self._rouse()

    def _rouse(self) -> None:
        with self._lock, contextlib.suppress(BlockingIOError):  # a full pipe wakes as well
            if self._pipe:
                os.write(self._pipe[1], b".")

    def open(self) -> StreamEnd | None:
        """Dial; return why that is in vain and what follows, None where it stands."""
        headers = {"User-Agent": f"stockrt/{__version__}"}
        try:
            pipe = os.pipe()
        except OSError as error:
            return StreamEnd(network_words(error), _DIAL)
        for descriptor in pipe:
            os.set_blocking(descriptor, False)
        with self._lock:
            self._pipe = pipe
        try:
            link = WebSocket(self._address, DIAL_LIMITS, self._proxies, headers, max_bytes=MAX_STREAM_BYTES)
        except DialError as error:
            self.close()
            return refused_dial(error, self._rng)
        link.give_up_after(UNCONFIRMED_S)
        self._protocol = StreamProtocol(self._product, time.monotonic(), self._rng, self._asks)
        self._link, self._told = link, None
        return None

    def close(self) -> None:
        """Say goodbye, and close; what is open no more is left as it is."""
        if self._link is not None:
            self._link.close()
        self._link = None
        with self._lock:
            pipe, self._pipe = self._pipe or (), None
            for descriptor in pipe:
                os.close(descriptor)

    def read(self, until: float) -> Pushes:
        """Return what has come, waiting for something until `until` (monotonic seconds), or until woken.

        An end of the connection is the last event, and what came before it is there.
        """
        assert self._link is not None and self._pipe is not None
        while True:
            pushes = self._exchange(self._link)
            if pushes.trades or pushes.events or pushes.dropped or self._is_woken:
                self._is_woken = False
                return pushes
            now = time.monotonic()
            if now >= until:
                return pushes
            wait_s = min(until, self._protocol.next_tick()) - now
            if not self._link.has_more and wait_s > 0:
                wait_readable(wait_s, self._link.fileno(), self._pipe[0])
                with contextlib.suppress(BlockingIOError):
                    os.read(self._pipe[0], READ_BYTES)

    def _exchange(self, link: WebSocket) -> Pushes:
        """Send what is due, and return what has come."""
        if self._told != self._wanted:
            self._told = self._wanted
            self._protocol.want(self._told)
        pushes = self._take(link)
        if pushes.is_last:
            return pushes
        due = self._protocol.tick(time.monotonic(), int(time.time() * 1000))
        pushes.events.extend(event for event in due if not isinstance(event, SendText))
        try:
            for event in due:
                if isinstance(event, SendText):
                    link.send_text(event.text)
        except LinkLost as error:
            last = self._take(link)  # what came before counts, and may say why
            if not (pushes.is_last or last.is_last):
                last.events.append(_end_of(error, self._rng))
            trades, events = pushes.trades + last.trades, pushes.events + last.events
            return Pushes(trades, events, pushes.dropped + last.dropped, pushes.why or last.why)
        return pushes

    def _take(self, link: WebSocket) -> Pushes:
        """Return what has come; the end of the connection is the last event."""
        texts: list[str] = []
        lost: StreamEnd | None = None
        try:
            while len(texts) < MOST_AT_ONCE:
                for text in link.frames():
                    if text is not None:
                        texts.append(text)
                if not link.has_more:
                    break
        except LinkLost as error:
            lost = _end_of(error, self._rng)
        latest_ms = int(min(time.time() * 1000 + MAX_AHEAD_MS, LATEST_TRADE_MS - 1))
        pushes = self._protocol.receive(texts, time.monotonic(), latest_ms)
        if lost and not pushes.is_last:
            pushes.events.append(lost)
        return pushes


# ======================================================================================================
# Stores
# ======================================================================================================
#
# Promises, over both stores and the spool between them (one contract suite checks them, and the fault suite):
#   1. One trade, one document, whoever writes it and however often: `_id` is made of the trade alone,
#      `s|t|p|v|td`, each part as the API sent it. Polled again, retried, or written by two machines, the
#      same trade has the same `_id`, and the first one written stays, its `create_time` with it.
#   2. What `write` counts is durable: `stored` and `duplicates` are acknowledged by MongoDB with its write
#      concern, or, without MongoDB, on this disk; `queued` is on this disk (SQLite, synchronous=FULL).
#   3. What is kept reaches MongoDB when it is back, in order of arrival per code, without anybody's help,
#      at least five times faster than it came, while new work goes on: new trades queue up behind it.
#   4. What is kept never grows past SPOOL_MAX_MB nor takes the disk below 5 % free: at the limit new work is
#      refused by name and counted. What waits is never thrown away.
#   5. A document that MongoDB refuses for good, while its collection takes another one, is named and goes to
#      the table `rejects` with MongoDB's words; the others are stored, and nothing waits for it. Where the
#      collection takes none (a role, a view by its name, a schema for other documents), all of them are kept.
#   6. A damaged local file ends the process that finds it damaged, in its own words; nothing that this process
#      was told to be kept is taken back by that. The next one to open the file sets it aside with the date in
#      its name, rescues what can be read before anybody has it open, says so in one error line, and goes on.
#   7. `write` ends within a time limit, or raises StoreError: then nothing of it counts as stored.
#   8. `close` holds ONE document per code and session date, `_id` `code|date`, and whoever writes, in
#      whatever order, it ends as the same one, the best of all candidates: a daily bar, which makes it final
#      for every trade, then a regular trade, then one after hours. Of two bars that of the greater volume is
#      the better (a session's volume only grows), of equal volumes that of the greater close; of regular trades
#      the later, of those after hours the earlier; equal times are decided by price, volume and side. A final
#      document is made of the bar alone: `p` is its close. What cannot be written now is made later, and
#      keeps no trade waiting.

# Every MongoDB operation, its retries included; the platform waits 120 s for a result.
MONGODB_TIMEOUT_MS = 20_000
# Connecting, and finding a server for --check; a write waits longer, for an election to end.
MONGODB_SELECTION_TIMEOUT_MS = 5_000
# For telling the server that a client leaves.
MONGODB_GOODBYE_S = 1.0
# To ask pymongo for a server without waiting for one.
AT_ONCE_S = 0.001
DUPLICATE_KEY = 11000
# What keeps no `_id` apart, or takes no documents at all.
NO_COLLECTIONS = {"view": "stores.view", "timeseries": "stores.time_series"}
# An index that could not be made now is asked for again after this time: each try may take its whole time limit.
INDEX_AGAIN_S = 300.0
# The `_id` of a document that is written and deleted to see whether that works.
PROBE = "stockrt-check"
# MongoDB's code for an `_id` that no document may have.
INVALID_ID = 53
# What a reader of the latest trades needs.
INDEX = [("stock_code", 1), ("t", -1)]
# What KEEP_DAYS makes, known by its name: one of another name is somebody else's.
TTL_INDEX, TTL_KEY = "stockrt_keep_days", [("create_time", 1)]
PROBE_T = 1 << 40  # as wide as the times of trades, and none of them: 2004
# Codes that trade much trade in the last seconds before a close, and of those every tick may be there: looked at first.
NEWEST_SPAN_MS = 10 * 1000
# Documents that are read at once where a whole collection is: their fields of trades are some 200 kB.
PAGE = 1000
Document = dict[str, Any]
TRADE_FIELDS = Trade._fields
DOCUMENT_FIELDS = ("_id", *TRADE_FIELDS, "stock_code", "create_time")
# Sent as texts, stored as MONGODB_NUMERIC_TYPE says.
NUMBERS = ("p", "v", "vw")


def identity(trade: Trade) -> str:
    """Return the `_id` of a trade: `s|t|p|v|td`, the rule that makes the same trade one document.

    The turnover `vw` follows from price and volume and is left out. No part can hold a `|`.
    """
    s, t, p, v, _, td = trade
    return f"{s}|{t}|{p}|{v}|{td}"


def to_document(trade: Trade, created: datetime, demo: bool = False) -> Document:
    """Return the document of a trade, its fields as the API sent them.

    `created` is UTC in whole milliseconds (a BSON date has no more): without a zone the driver need not take it off
    for each document.
    """
    s, t, p, v, vw, td = trade
    document: Document = {
        "_id": identity(trade),
        "s": s,
        "t": t,
        "p": p,
        "v": v,
        "vw": vw,
        "td": td,
        "stock_code": s,
        "create_time": created,
    }
    if demo:
        document["demo"] = True
    return document


class Close(NamedTuple):
    """A candidate for the closing snapshot of one code and session date.

    `document`: the trade that it follows from, or what stands for one (`bar_close`). `provisional`: its bar is still
    to come. `bar`: it has come, and the close is final.
    """

    document: Document
    date: str
    after_hours: bool = False
    provisional: bool = False
    bar: Bar | None = None

    @property
    def key(self) -> str:
        """The `_id`: code and session date."""
        return f"{self.document['stock_code']}|{self.date}"

    def marks(self) -> dict[str, bool]:
        """Return the marks that the document carries beside the trade."""
        return {name: True for name in CLOSE_MARKS if getattr(self, name)}

    def bar_fields(self) -> dict[str, str]:
        """Return what the document gains when it is final, as the API sends it."""
        return {} if self.bar is None else {name: getattr(self.bar, name) for name in BAR_FIELDS}


CLOSE_MARKS = ("after_hours", "provisional")
# What documents of older versions may carry.
FORMER_MARKS = ("half_day", "half_day_unknown")


def bar_close(bar: Bar, session: Session) -> Close:
    """Return the final close that a bar makes: where a trade's fields are read they say the same."""
    trade = Trade(bar.s, session.close, bar.close, bar.volume, bar.turnover, 0)
    return Close(trade._asdict() | {"stock_code": bar.s}, session.date, bar=bar)


class WriteReport(NamedTuple):
    """What a write did: documents that are new, that were there before, and refused ones (`_id` -> reason).

    `queued`: documents that wait on this machine for MongoDB, and `queued_because` why.
    """

    stored: int = 0
    duplicates: int = 0
    refused: Mapping[str, str] = MappingProxyType({})
    queued: int = 0
    queued_because: str = ""


class Store(Protocol):
    """Where documents go; see the promises above. Its methods may be called by any thread.

    Who opened the file or the client that a store uses closes it.
    """

    def write(self, documents: Sequence[Document]) -> WriteReport:
        """Store documents, each with its own `_id`. Raises StoreError when the store is away."""

    def check(self) -> str:
        """Try what a run needs and return a line that says what holds. Raises StoreError."""


class CloseStore(Protocol):
    """Where closes go, and where the trades are that they follow from. Its methods may be called by any thread."""

    def newest(self, codes: Collection[str], since: int, until: int) -> dict[str, Document]:
        """Return of each code the newest trade with since <= t <= until (epoch ms), synthetic ones left out.

        A code without one is missing. Raises StoreError.
        """

    def write_closes(self, closes: Sequence[Close]) -> Mapping[str, str]:
        """Let each candidate take its place in `close` unless one as good stands there.

        Returns the refused ones (`_id` -> reason). Raises StoreError.
        """

    def finals(self, keys: Collection[str]) -> set[str]:
        """Return which of these closes (by `_id`) are final. Raises StoreError."""

    def codes(self) -> list[str]:
        """Return every code in `realtime`. Raises StoreError."""


# What is kept was cut to a line of fewer; of a longer text every ": " would be looked at in the one before.
LONGEST_KEPT = 1000


@cache
def _patterns(kinds: tuple[str, ...]) -> list[tuple[str, str, re.Pattern[str]]]:
    """Return the kinds that begin so with their own words and the pattern of the whole; who says most comes first."""
    found = []
    for kind in filter(lambda kind: kind.startswith(kinds), TEMPLATES):
        parts = re.split(r"\{(\w+)[^}]*\}", TEMPLATES[kind][0])  # texts, and the names of values between them
        own = parts[::2]
        # a reason of ours may stand behind words of the vendor's that have colons, too
        for few in ("", "?") if kind == "tools.because" else ("?",):
            values = [f"(?P<{name}>.+{few})" for name in parts[1::2]]
            pattern = "".join(chain.from_iterable(zip(map(re.escape, own), [*values, ""], strict=True)))
            found.append((kind, "".join(own), re.compile(pattern, re.DOTALL)))
    return sorted(found, key=lambda one: len(one[1]), reverse=True)


def stored_words(text: str, kinds: tuple[str, ...]) -> str:
    """Return as words what is stored as its English text, which other programs read; what is not ours as it is.

    `kinds`: what the kinds of it, and of the values in it, begin with.
    """
    if len(text) > LONGEST_KEPT:
        return text
    for kind, own, pattern in _patterns(kinds):
        found = pattern.fullmatch(text)
        if found is None:
            continue
        values = {name: stored_words(value, kinds) for name, value in found.groupdict().items()}
        is_ours = own.strip(":; ") or any(isinstance(value, Phrase) for value in values.values())
        with contextlib.suppress(ValueError):  # a number has its place there
            words = Phrase(kind, values)
            if is_ours and words == text:
                return words
    return text


# ------------------------------------------------------------------------------------------------------
# The embedded store
# ------------------------------------------------------------------------------------------------------


# Of a document beside its `_id`, which is in the file three times: the table's row and two indexes.
ROW_BYTES = 250
# A document changes at most so many pages of the file, each of which is in the log then.
PAGES_PER_ROW = 4


def most_growth(file: LocalFile, documents: Collection[Document]) -> int:
    """Return how many bytes more a file and its log may take with these documents. Raises StoreError."""
    pages, unused = file.pages()
    rows = [3 * len(document["_id"]) + ROW_BYTES for document in documents]
    more = sum(rows) // SQLITE_PAGE + 1
    logged = (min(pages, PAGES_PER_ROW * len(rows)) + more) * (SQLITE_PAGE + WAL_FRAME_HEAD)
    return max(0, more - unused) * SQLITE_PAGE + logged


class SqliteStore:
    """The embedded store: tables of the local file, readable with the sqlite3 shell."""

    def __init__(self, file: LocalFile) -> None:
        self._file = file

    def write(self, documents: Sequence[Document]) -> WriteReport:
        """Store documents in one transaction. Raises StoreError when the file or the disk does not take them."""
        with self._file.lock:
            more = most_growth(self._file, documents)
            if self._file.why_no_room(more):
                self._file.empty_log()  # what the log took is free again
            why = self._file.why_no_room(more)
            if why:
                raise StoreError(why)
            with self._file.write() as db:
                return insert_trades(db, documents)

    def newest(self, codes: Collection[str], since: int, until: int) -> dict[str, Document]:
        """Return the newest trade of each code in a span of time. Raises StoreError."""
        names = DOCUMENT_FIELDS[:-1]
        query = (
            f"SELECT {', '.join(names)} FROM realtime "  # noqa: S608
            "WHERE stock_code = ? AND t BETWEEN ? AND ? AND demo IS NULL "
            "ORDER BY t DESC, p DESC, v DESC, td DESC LIMIT 1"
        )
        rows = [self._file.read_one(query, code, since, until) for code in codes]
        return {row[-1]: dict(zip(names, row, strict=True)) for row in rows if row}

    def write_closes(self, closes: Sequence[Close]) -> Mapping[str, str]:
        """Write candidates in one transaction; the statement itself decides which is the better one."""
        now = iso(utc_now())
        rows = [_close_row(close, now) for close in closes]
        with self._file.write() as db:
            db.executemany(_SQLITE_CLOSE, rows)
        return {}

    def finals(self, keys: Collection[str]) -> set[str]:
        """Return which of these closes are final. Raises StoreError."""
        query = "SELECT 1 FROM close WHERE close IS NOT NULL AND _id = ?"
        return {key for key in keys if self._file.read_one(query, key)}

    def codes(self) -> list[str]:
        """Return every code in `realtime`, synthetic ones left out. Raises StoreError."""
        query = "SELECT DISTINCT stock_code FROM realtime WHERE demo IS NULL ORDER BY stock_code"
        return [code for (code,) in self._file.read_all(query)]

    def check(self) -> str:
        """Write and take back a row. Raises StoreError."""
        with self._file.write() as db:
            db.execute("SAVEPOINT probe")
            db.execute("CREATE TABLE probe (x)")
            db.execute("ROLLBACK TO probe")
            (trades,) = db.execute("SELECT count(*) FROM realtime").fetchone()
        return phrase("stores.file_good", path=self._file.path, trades=count_words(trades, "trade"))


def insert_trades(db: sqlite3.Connection, documents: Sequence[Document]) -> WriteReport:
    """Store documents in the transaction that is open, and name those that SQLite does not take."""
    import sqlite3

    db.execute("SAVEPOINT trades")
    try:
        stored = max(0, db.executemany(_SQLITE_INSERT, map(_trade_row_demo, documents)).rowcount)
    except (sqlite3.IntegrityError, sqlite3.ProgrammingError, OverflowError):
        db.execute("ROLLBACK TO trades")
        return _insert_one_by_one(db, documents)
    return WriteReport(stored, len(documents) - stored)


def _insert_one_by_one(db: sqlite3.Connection, documents: Sequence[Document]) -> WriteReport:
    import sqlite3

    stored, refused = 0, {}
    for document in documents:
        try:
            stored += db.execute(_SQLITE_INSERT, _trade_row_demo(document)).rowcount
        except (sqlite3.IntegrityError, sqlite3.ProgrammingError, OverflowError) as error:
            refused[document["_id"]] = phrase("stores.local_refused", why=one_line(error, 200))
    return WriteReport(stored, len(documents) - stored - len(refused), refused)


def trade_row(document: Document) -> tuple[Any, ...]:
    """Return the columns of a trade: its `_id`, what the API sent, `stock_code` and `create_time`."""
    return (*_ROW_OF(document), _created(document["create_time"]))


def _trade_row_demo(document: Document) -> tuple[Any, ...]:
    return (*_ROW_OF(document), _created(document["create_time"]), document.get("demo"))


_ROW_OF = itemgetter(*DOCUMENT_FIELDS[:-1])
# Those of a batch are all the same.
_created = lru_cache(maxsize=16)(iso)
_SQLITE_INSERT = (
    "INSERT INTO realtime (_id, s, t, p, v, vw, td, stock_code, create_time, demo) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (_id) DO NOTHING"
)


# Promise 8: which of two closes is the better. Unnamed columns are those of the document that stands there.
_SQLITE_CLOSE = """
INSERT INTO close (_id, date, s, t, p, v, vw, td, stock_code, after_hours, provisional,
                   open, high, low, close, volume, turnover, create_time, update_time)
VALUES (:_id, :date, :s, :t, :p, :v, :vw, :td, :stock_code, :after_hours, :provisional,
        :open, :high, :low, :close, :volume, :turnover, :now, :now)
ON CONFLICT (_id) DO UPDATE SET
    s = excluded.s, t = excluded.t, p = excluded.p, v = excluded.v, vw = excluded.vw, td = excluded.td,
    after_hours = excluded.after_hours, provisional = excluded.provisional,
    open = excluded.open, high = excluded.high, low = excluded.low, close = excluded.close,
    volume = excluded.volume, turnover = excluded.turnover, update_time = excluded.update_time
WHERE CASE
    WHEN close IS NOT NULL THEN :close IS NOT NULL
        AND (CAST(volume AS REAL), CAST(close AS REAL)) < (CAST(:volume AS REAL), CAST(:close AS REAL))
    WHEN :close IS NOT NULL THEN 1
    WHEN :after_hours THEN after_hours AND (t, p, v, td) > (:t, :p, :v, :td)
    WHEN after_hours THEN 1
    ELSE (t, p, v, td) < (:t, :p, :v, :td)
END
"""


def _close_row(close: Close, now: str) -> dict[str, Any]:
    row = {name: close.document[name] for name in (*TRADE_FIELDS, "stock_code")}
    more: dict[str, Any] = dict.fromkeys((*CLOSE_MARKS, *BAR_FIELDS)) | close.marks() | close.bar_fields()
    return row | more | {"_id": close.key, "date": close.date, "now": now}


# ------------------------------------------------------------------------------------------------------
# MongoDB
# ------------------------------------------------------------------------------------------------------

# Faults that MongoDB reports of a single document of a batch, though any would have met them: the server is
# about to change its role or to go (the drivers' list of retryable errors), has no room, lacks a right or is
# told to take no writes (371); or a router finds no shard that could take it (70, 82, 133, 202).
NOT_THE_DOCUMENTS_FAULT = frozenset(
    map(
        int,
        "6 7 13 24 46 50 63 64 70 82 89 91 112 133 134 150 189 202 249 262 371 8000 9001 10058 10107 11600 "
        "11602 13388 13435 13436 14031".split(),
    )
)


class TtlIndex(NamedTuple):
    """An index by which MongoDB removes documents of `realtime`: so many seconds after the time in a field.

    None: it removes nothing, and is where ours would be.
    """

    name: str
    field: str
    seconds: int | None


class MongoStore:
    """The collections of a MongoDB; one client per process, connected at first use. Thread-safe."""

    def __init__(self, settings: Settings, clock: Clock = SYSTEM_CLOCK) -> None:
        from bson.decimal128 import Decimal128

        self._settings = settings
        self._clock = clock
        types: dict[str, Callable[[str], object]] = {"double": float, "decimal": Decimal128}
        self._convert = types.get(settings.numeric_type, str)
        self.client = self._connect()
        self.realtime_name = settings.realtime_name
        self.close_name = settings.close_name
        self.gap_name = settings.gap_name
        self._plain: set[str] = set()  # collections that were seen to be none of NO_COLLECTIONS
        self._index_due = 0.0  # monotonic
        self._has_threads = False

    def write(self, documents: Sequence[Document], takes: bool = False) -> WriteReport:
        """Insert documents unordered; those whose `_id` is there count as duplicates.

        `takes`: the collection was just seen to take another document. Raises StoreAway for whatever is not a
        fault of single documents, and where the collection takes none.
        """
        encoded, refused = self._encode(documents)
        if not encoded:
            return WriteReport(refused=refused)
        with self.asking():
            self._demand_plain(self.realtime_name)
            self._make_index()
            known, rejected = self._in_bulk(
                self.realtime_name,
                len(encoded),
                lambda: self.collection().insert_many(encoded, ordered=False),
                takes,
            )
        stored = len(encoded) - len(known) - len(rejected)
        return WriteReport(stored, len(known), refused | rejected)

    def _in_bulk(
        self, name: str, count: int, write: Callable[[], object], takes: bool = False
    ) -> tuple[list[str], dict[str, Phrase]]:
        """Write a batch; return the `_id` of what was there before, and what was refused (`_id` -> why).

        Where all of it is refused it is written again when the collection was seen to take another document (`takes`):
        then they are at fault. Raises StoreAway when it takes none.
        """
        from pymongo.errors import BulkWriteError

        try:
            write()
        except BulkWriteError as error:
            known, whys = self._sort_errors(error.details or {})
        else:
            return [], {}
        refused = {one: phrase("stores.refused", why=why) for one, why in whys.items()}
        if takes or len(refused) < count:
            return known, refused
        if not self.takes_another(name):
            raise self._away(next(iter(whys.values())), refused=refused)
        return self._in_bulk(name, count, write, takes=True)

    def _encode(self, documents: Sequence[Document]) -> tuple[list[Document], dict[str, str]]:
        """Return the documents as they will be stored, and those whose numbers do not fit (`_id` -> why)."""
        if self._convert is str:
            return list(documents), {}
        encoded: list[Document] = []
        refused: dict[str, str] = {}
        for document in documents:
            try:
                encoded.append(self._bson(document))
            except (ArithmeticError, ValueError) as error:
                refused[document["_id"]] = phrase(
                    "stores.odd_numbers", type=self._settings.numeric_type, why=one_line(error)
                )
        return encoded, refused

    def takes_another(self, name: str, others: Sequence[Document] = ()) -> bool:
        """Return whether a collection takes a document now: any, or else the first of `others`, where it says no.

        No other collection is asked: it could take what a role, a view or a schema keeps out of this one.
        """
        from pymongo import timeout
        from pymongo.errors import OperationFailure, PyMongoError

        with timeout(self._looking_s()), contextlib.suppress(PyMongoError, StoreAway):
            self._demand_plain(name)
            try:
                self._probe(name)
            except OperationFailure:  # who may only insert; or a schema
                return any(self._is_taken(name, other) for other in self._encode(others[:1])[0])
            return True
        return False

    def lacks(self, name: str) -> bool:
        """Return whether there is no collection by this name, or that cannot be told."""
        from pymongo import timeout
        from pymongo.errors import PyMongoError

        with timeout(self._looking_s()), contextlib.suppress(PyMongoError):
            return name not in self.client[self._settings.mongodb_db_name].list_collection_names(
                filter={"name": name}
            )
        return True

    def within(self, seconds: float) -> contextlib.AbstractContextManager[object]:
        """Let what is done in the body take so long at most: a shorter limit of the URI holds."""
        from pymongo import timeout

        return timeout(min(seconds, self.client.options.timeout or math.inf))

    def _looking_s(self) -> float:
        """Return for how long, in seconds, a server is looked for: a shorter limit of the URI holds."""
        return min(MONGODB_SELECTION_TIMEOUT_MS / 1000, self.client.options.timeout or math.inf)

    def _is_taken(self, name: str, document: Document) -> bool:
        """Insert a document and return whether the collection has it then. Raises PyMongoError where nobody knows."""
        from pymongo.errors import DuplicateKeyError, OperationFailure

        try:
            self.collection(name).insert_one(document)
        except DuplicateKeyError as error:
            return _is_identity_taken(error.details or {})
        except OperationFailure:
            return False
        return True

    def has(self, name: str) -> bool:
        """Return whether a trade of this `_id` is in `realtime`. Raises StoreAway."""
        with self.asking():
            return self.collection().find_one({"_id": name}, {"_id": 1}) is not None

    def estimate(self, name: str) -> int:
        """Return about how many documents a collection has, 0 where it is none. Raises StoreAway."""
        from pymongo.errors import InvalidName

        with self.asking(), contextlib.suppress(InvalidName):
            return self.collection(name).estimated_document_count()
        return 0

    def pages(self, name: str, after: Document) -> Iterator[list[Document]]:
        """Yield the fields of trades of all documents of a collection, whoever wrote them, in the order of `_id`.

        `after`: the `_id` from which to go on, {} for all. Each page is asked for by itself, so an election costs none
        of them. Dates are naive, as they stand there. Raises StoreAway.
        """
        while True:
            with self.asking():
                found = self._page(name, after)
            yield [document for document in found if document["_id"] != after.get("_id", ...)]
            if len(found) < PAGE + bool(after):
                return
            after = {"_id": found[-1]["_id"]}

    def _page(self, name: str, after: Document) -> list[Document]:
        from bson.codec_options import CodecOptions, DatetimeConversion

        options: CodecOptions[Document] = CodecOptions(
            unicode_decode_error_handler="replace", datetime_conversion=DatetimeConversion.DATETIME_AUTO
        )
        wanted = dict.fromkeys(DOCUMENT_FIELDS[1:], 1)
        cursor = self.collection(name).with_options(codec_options=options).find({}, wanted)
        if after:  # unlike $gt it goes on to `_id` of another type
            cursor = cursor.hint([("_id", 1)]).min(list(after.items()))
        return list(cursor.sort("_id", 1).limit(PAGE + bool(after)))

    def at_moments(self, documents: Iterable[Document]) -> list[Document]:
        """Return our trades of the codes and times that documents have, one at least. Raises StoreAway."""
        moments = [{name: document[name] for name in ("stock_code", "t")} for document in documents]
        with self.asking():
            return [*filter(is_trade, self.collection().find({"$or": moments}))]

    def newest(self, codes: Collection[str], since: int, until: int) -> dict[str, Document]:
        """Return the newest trade of each code in a span of time. Raises StoreError.

        Looks at the last seconds for all codes in one request, then at a longer time for those that are
        missing: few requests, and few documents even where a code has thousands of trades a day. What another
        program has put there and is no trade is passed over.
        """
        found: dict[str, Document] = {}
        missing = [*codes]
        span = NEWEST_SPAN_MS
        with self.asking():
            while missing and until >= since:
                first = max(since, until - span)
                wanted = {"stock_code": {"$in": missing}, "t": {"$gte": first, "$lte": until}}
                for document in filter(is_trade, self.collection().find(wanted)):
                    code = document["stock_code"]
                    if code not in found or _order(found[code]) < _order(document):
                        found[code] = document
                missing = [code for code in codes if code not in found]
                until, span = first - 1, span * 4
        return {
            code: document | {name: str(document[name]) for name in NUMBERS}
            for code, document in found.items()
        }

    def write_closes(self, closes: Sequence[Close]) -> Mapping[str, str]:
        """Insert candidates; where a document stands already, a conditional update lets the server decide."""
        from pymongo import UpdateOne

        now = utc_now()
        documents = [self._close_document(close, now) for close in closes]
        collection = self.collection(self.close_name)
        with self.asking():
            self._demand_plain(self.close_name)
            taken, refused = self._in_bulk(
                self.close_name, len(documents), lambda: collection.insert_many(documents, ordered=False)
            )
            updates = [
                UpdateOne(_worse_close(close, document), _close_update(document))
                for close, document in zip(closes, documents, strict=True)
                if close.key in taken
            ]
            if updates:
                _, worse = self._in_bulk(
                    self.close_name, len(updates), lambda: collection.bulk_write(updates, ordered=False)
                )
                refused |= worse
        return refused

    def _close_document(self, close: Close, now: datetime) -> Document:
        found = self._bson(close.document)
        trade = {name: found[name] for name in (*TRADE_FIELDS, "stock_code")}
        times = {"create_time": now, "update_time": now}
        bar = {name: self._number(text) for name, text in close.bar_fields().items()}
        return {"_id": close.key, "date": close.date, **trade, **close.marks(), **bar, **times}

    def finals(self, keys: Collection[str]) -> set[str]:
        """Return which of these closes are final. Raises StoreError."""
        wanted = {"_id": {"$in": list(keys)}, "close": {"$ne": None}}
        with self.asking():
            return {found["_id"] for found in self.collection(self.close_name).find(wanted, {"_id": 1})}

    def write_gaps(self, documents: Sequence[Document]) -> None:
        """Write times in which the stream did not bring every trade, as they are now. Raises StoreAway."""
        from pymongo import ReplaceOne

        updates = [ReplaceOne({"_id": one["_id"]}, one, upsert=True) for one in documents]
        with self.asking():
            self.collection(self.gap_name).bulk_write(updates, ordered=False)

    def codes(self) -> list[str]:
        """Return every code in `realtime`. Raises StoreError."""
        with self.asking():
            return sorted(filter(None, map(str, self.collection().distinct("stock_code"))))

    def field(self, name: str, field: str, most: int) -> list[object]:
        """Return a field of up to `most` documents of a collection, None for one that lacks it. Raises StoreAway."""
        with self.asking():
            found = self.collection(name).find({}, {"_id": 0, field: 1}).limit(most)
            return [document.get(field) for document in found]

    def check(self) -> str:
        """Ping, look for the index, write to and delete from both collections. Raises StoreError."""
        from pymongo import timeout

        settings = self._settings
        with self.asking():
            with timeout(self._looking_s()):
                self.client.admin.command("ping")
            for name in (self.realtime_name, self.close_name):
                self._demand_plain(name)
                self._probe(name)
            # closes are replaced, too: this finds none, and needs the right
            self.collection(self.close_name).update_one({"_id": PROBE}, {"$unset": {"date": ""}})
            index = self._index_words()
        place, database = settings.mongodb_shown(), settings.mongodb_db_name
        return phrase("stores.mongodb_good", place=place, database=database, index=index)

    def ttl_indexes(self) -> list[TtlIndex]:
        """Return the indexes by which MongoDB removes documents of `realtime`, or could. Raises StoreAway."""
        from pymongo import timeout

        with self.asking(), timeout(self._looking_s()):
            found = self.collection().index_information()
        return [
            TtlIndex(name, index["key"][0][0], index.get("expireAfterSeconds"))
            for name, index in found.items()
            if "expireAfterSeconds" in index or index["key"] == TTL_KEY
        ]

    @property
    def is_met(self) -> bool:
        """Whether a server is there, as far as is known without waiting for one."""
        return bool(self.client.nodes)

    def count_older(self, before: datetime) -> int | None:
        """Return how many documents are older by `create_time`, None where that takes long. Raises StoreAway."""
        from pymongo import timeout
        from pymongo.errors import PyMongoError

        with self.asking(), timeout(self._looking_s()):
            try:
                return self.collection().count_documents({"create_time": {"$lt": before}})
            except PyMongoError as error:
                if error.timeout and self.is_met:
                    return None
                raise

    def oldest(self) -> list[str]:
        """Return the earliest `create_time` (ISO 8601 UTC), nothing where there is none. Raises StoreAway."""
        with self.asking():
            found = self.collection().find({"create_time": {"$type": "date"}}).sort(TTL_KEY).limit(1)
            return [iso(document["create_time"]) for document in found]

    def make_ttl_index(self, seconds: int, wait_s: float) -> None:
        """Have MongoDB remove documents so long after their `create_time`. Raises StoreAway, also after `wait_s`."""
        from pymongo import timeout

        with self.asking(), timeout(wait_s):
            self.collection().create_index(TTL_KEY, name=TTL_INDEX, expireAfterSeconds=seconds)

    def change_ttl_index(self, seconds: int) -> bool:
        """Change that time, and return whether the role of the user allows it. Raises StoreAway."""
        from pymongo.errors import OperationFailure

        change = {"name": TTL_INDEX, "expireAfterSeconds": seconds}
        with self.asking():
            try:
                self.collection().database.command("collMod", self.realtime_name, index=change)
            except OperationFailure as error:
                if error.code != UNAUTHORIZED:
                    raise
                return False
        return True

    def drop_ttl_index(self) -> None:
        """Have MongoDB remove nothing by our index any more. Raises StoreAway."""
        with self.asking():
            self.collection().drop_index(TTL_INDEX)

    def _index_words(self) -> Phrase:
        from pymongo.errors import OperationFailure

        with contextlib.suppress(OperationFailure):  # who may not look at indexes
            keys = [index["key"] for index in self.collection().index_information().values()]
            if INDEX in keys:
                return phrase("stores.index_there", name=self.realtime_name)
        return phrase("stores.index_to_come", name=self.realtime_name)

    def close(self) -> None:
        """Close the client."""
        from pymongo import timeout

        with timeout(MONGODB_GOODBYE_S):  # it says goodbye, and would wait for ever for a server that hangs
            self.client.close()

    def _probe(self, name: str) -> None:
        """Let a collection take a document, and leave nothing behind.

        A document that it has is refused for its `_id` alone, when all else is well, and where there is no collection
        yet, one for the form of its `_id`. Where it is empty, one of no use is deleted again; who may not delete gets
        an error before it is there.
        """
        from pymongo.errors import OperationFailure

        collection = self.collection(name)
        with contextlib.suppress(OperationFailure):  # who may only insert; or a schema that is younger
            known = collection.find_one()
            if known is not None and self._is_taken(name, known):
                return
            if known is None and not collection.index_information() and self._refuses_form(name):
                return
        collection.delete_one({"_id": PROBE})
        try:
            collection.insert_one(self._probe_of(name))
        finally:  # it may be there although its answer was lost
            collection.delete_one({"_id": PROBE})

    def _refuses_form(self, name: str) -> bool:
        """Return whether all is well but for an `_id` that no server takes: not even the collection is made then."""
        from pymongo.errors import OperationFailure

        try:
            self.collection(name).insert_one({"_id": []})
        except OperationFailure as error:
            return error.code == INVALID_ID
        self.collection(name).delete_one({"_id": []})  # what only speaks as MongoDB does may take it
        return True

    def _probe_of(self, name: str) -> Document:
        """Return a document of no use that looks as a schema may ask it to."""
        document = to_document(Trade(PROBE, PROBE_T, "0", "0", "0", 0), utc_now())
        if name == self.close_name:
            return self._close_document(Close(document, "1970-01-01"), utc_now()) | {"_id": PROBE}
        return self._bson(document) | {"_id": PROBE}

    def _demand_plain(self, name: str) -> None:
        """Raise StoreAway where a view or a time-series collection has the name; asked until neither has it."""
        from pymongo.errors import OperationFailure

        if name in self._plain:
            return
        database = self.client[self._settings.mongodb_db_name]
        try:
            found = list(
                database.list_collections(filter={"name": name}, nameOnly=True, authorizedCollections=True)
            )
        except OperationFailure as error:
            if error.code != UNAUTHORIZED:
                raise
            found = []  # what is wrong with it will be seen
        for one in found:
            if one["type"] in NO_COLLECTIONS:
                setting = "MONGODB_CLOSE_COLLECTION_NAME"
                if name == self.realtime_name:
                    setting = "MONGODB_REALTIME_COLLECTION_NAME"
                raise self._away(phrase(NO_COLLECTIONS[one["type"]], name=name, setting=setting))
        self._plain.add(name)

    def _connect(self) -> MongoClient[Document]:
        import linecache

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
            why = self._settings.redact(one_line(error))
            raise SettingsError(
                [phrase("stores.bad_uri", uri=self._settings.mongodb_shown(), why=why)]
            ) from None
        finally:
            # a client keeps the text of the stack that it was made on: every line of this file would stay in memory
            linecache.clearcache()

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """Raise StoreAway in place of whatever pymongo raises in the block."""
        from bson.errors import BSONError
        from pymongo.errors import PyMongoError

        try:
            yield
        except (PyMongoError, BSONError) as error:
            raise self._fault(error) from error

    def start_threads(self) -> None:
        """Let pymongo start its threads before others take what there are. Raises StockrtError where there are none."""
        from pymongo import timeout
        from pymongo.errors import PyMongoError

        if self._has_threads:
            return
        try:
            with timeout(AT_ONCE_S), contextlib.suppress(PyMongoError):  # no server is waited for
                _ = self.client.address
        except RuntimeError as error:
            raise no_thread(error) from None
        self._has_threads = True

    def collection(self, name: str = "") -> MongoCollection[Document]:
        """Return a collection of the database, `realtime` without a name."""
        return self.client[self._settings.mongodb_db_name][name or self.realtime_name]

    def _make_index(self) -> None:
        """Make the index, once per process; trades are stored without it too.

        A role may forbid it: that is for good. Where the server is not able to now, it is asked again later.
        """
        from pymongo.errors import OperationFailure

        if self._clock.monotonic() < self._index_due:
            return
        due = math.inf
        try:
            self.collection().create_index(INDEX)
        except OperationFailure as error:
            words = self._settings.redact(one_line(error))
            log.warning(
                "MongoDB refused the index {stock_code: 1, t: -1} on %s: %s", self.realtime_name, words
            )
            if error.timeout or error.code in NOT_THE_DOCUMENTS_FAULT - {UNAUTHORIZED}:
                due = self._clock.monotonic() + INDEX_AGAIN_S
        self._index_due = due

    def _bson(self, document: Document) -> Document:
        return document | {name: self._convert(document[name]) for name in NUMBERS}

    def _number(self, text: str) -> object:
        return self._convert(text)

    def _sort_errors(self, details: Mapping[str, Any]) -> tuple[list[str], dict[str, str]]:
        """Return the `_id` of what was there before, and what was refused (`_id` -> MongoDB's words).

        Raises StoreAway for faults of neither.
        """
        if details.get("writeConcernErrors"):
            raise self._away(phrase("stores.unconfirmed", why=self._said(details["writeConcernErrors"][0])))
        known, refused = [], {}
        for error in details.get("writeErrors", ()):
            words = self._said(error)
            name = error["op"].get("q", error["op"])["_id"]  # of an update, or an insert
            if error.get("code") == DUPLICATE_KEY and _is_identity_taken(error):
                known.append(name)
            elif error.get("code") in NOT_THE_DOCUMENTS_FAULT:
                raise self._away(words)
            else:
                refused[name] = words
        return known, refused

    def _said(self, error: Mapping[str, Any]) -> str:
        """Return what the server says of an error."""
        if "errmsg" not in error:
            return phrase("tools.unknown")
        return self._settings.redact(one_line(error["errmsg"], 200))

    def _fault(self, error: Exception) -> StoreAway:
        from pymongo.errors import ConnectionFailure, NotPrimaryError, PyMongoError

        words = self._settings.redact(one_line(plain_words(str(error)), 200))
        lost = isinstance(error, ConnectionFailure) and not isinstance(error, NotPrimaryError)
        lost = lost or (isinstance(error, PyMongoError) and error.timeout)
        return self._away(words, lost and not self._is_unwanted())

    def _is_unwanted(self) -> bool:
        """Whether a server answers and refuses the user: after the first time pymongo takes it for one that is away."""
        from pymongo.errors import OperationFailure

        servers = self.client.topology_description.server_descriptions().values()
        return any(isinstance(server.error, OperationFailure) for server in servers)

    def _away(
        self, words: str, unreachable: bool = False, refused: Mapping[str, str] | None = None
    ) -> StoreAway:
        cause = "MONGODB_HOST"
        if "failed validation" in words:
            cause = phrase("stores.validators", realtime=self.realtime_name, close=self.close_name)
        fails = phrase("stores.fails", place=self._settings.mongodb_shown(), why=words)
        return StoreAway(see(fails, cause), unreachable, words, refused)


def _is_identity_taken(error: Mapping[str, Any]) -> bool:
    """Return whether a duplicate is one of `_id`; of an operator's own unique index it is a refusal."""
    if "keyPattern" in error:
        return set(error["keyPattern"]) == {"_id"}
    index = re.search(r"index: (?:\S*\$)?(\S+)", error.get("errmsg", ""))  # servers that send no keyPattern
    return index is not None and index[1] == "_id_"


def _worse_close(close: Close, document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the filter of the documents that `close` may replace: promise 8, as MongoDB's conditions."""
    if close.bar is not None:
        return {"_id": close.key, "$or": [{"close": None}, {"$expr": _is_lesser_bar(close.bar)}]}
    if close.after_hours:
        return {"_id": close.key, "close": None, "after_hours": True, "$or": _before(document, "$gt")}
    return {"_id": close.key, "close": None, "$or": [{"after_hours": True}, *_before(document, "$lt")]}


def _is_lesser_bar(bar: Bar) -> dict[str, Any]:
    """Return the expression that holds for a final document of a lesser bar, whatever type its numbers have."""
    stands = [
        {"$convert": {"input": f"${name}", "to": "double", "onError": None, "onNull": None}}
        for name in ("volume", "close")
    ]
    return {"$lt": [stands, [float(bar.volume), float(bar.close)]]}


def _close_update(document: Document) -> dict[str, Any]:
    kept = ("_id", "create_time")
    gone = {name: "" for name in (*CLOSE_MARKS, *FORMER_MARKS) if name not in document}
    return {"$set": {name: value for name, value in document.items() if name not in kept}, "$unset": gone}


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


def is_trade(document: Document) -> bool:
    """Return whether a document of the collection is a trade that stockrt stored; other programs may write there."""
    times = [document.get(name) for name in ("t", "td")]
    numbers = [document.get(name) for name in ("p", "v", "vw")]
    whole = all(isinstance(time, int) and not isinstance(time, bool) for time in times)
    whole = whole and EARLIEST_TRADE_MS <= document["t"] < LATEST_TRADE_MS
    code, key = document.get("s"), document.get("_id")
    begins = f"{code}|{document.get('t')}|"
    ours = isinstance(key, str) and key.startswith(begins) and code == document.get("stock_code")
    ours = ours and isinstance(code, str) and code.isprintable()
    return ours and whole and all(map(is_number, numbers))


def is_number(value: object) -> bool:
    """Return whether a stored value is a decimal number, as the API sends them or as MONGODB_NUMERIC_TYPE has them."""
    from bson.decimal128 import Decimal128

    if isinstance(value, Decimal128):
        value = float(value.to_decimal())
    if isinstance(value, str):
        return is_decimal(value)
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# ------------------------------------------------------------------------------------------------------
# Retention: KEEP_DAYS
# ------------------------------------------------------------------------------------------------------

# What is too old is looked for again after this time; sooner where closes are to be made of it, or no server is met.
KEEP_EVERY_S, KEEP_AGAIN_S = 3600.0, 300.0
# Trades that are looked at and deleted in one transaction, 0.1 s on a slow disk, and the pause in which others write.
EXPIRED_AT_ONCE, EXPIRED_PAUSE_S = 500, 0.2
# A file is written anew to give back what is unused, but not one of more than this: nobody writes to it meanwhile.
REWRITTEN_MOST = 256 * 1024 * 1024
# As long as a market's longest holidays: a clock that is further ahead of the newest trade is not believed.
LONGEST_REST_S = 14 * 24 * 3600
# A time that is no further ahead than this is none of a clock that was ahead.
CLOCKS_DIFFER_S = 60.0
# The greatest number that MongoDB takes for it.
TTL_MOST_S = (1 << 31) - 1
# For an index on a collection of any size, where somebody waits for it.
TTL_BUILD_S = 24 * 3600.0


class Retention(Protocol):
    """What removes trades older than KEEP_DAYS from `realtime`. One thread at a time."""

    def step(self) -> float:
        """Do the next part, and return after how many seconds there is more to do. Raises StoreError."""

    def apply(self) -> str:
        """Have done at once what is asked for explicitly, and return what is in the way, or ''. Raises StoreError."""

    def words(self) -> str:
        """Return what holds, for --check. Raises StoreError."""


class SqliteRetention:
    """Deletes what is older than KEEP_DAYS from the embedded store, in the order in which it came, step by step.

    A step is one transaction, so a kill costs nothing. Trades that came while the clock was ahead are passed over, and
    what came behind them goes in time, or stays twice as long at most. A clock that is ahead deletes nothing
    (LONGEST_REST_S). Nothing is deleted while closes are to be made of it. Space is given back where that is much and
    takes seconds; what is not is taken up by the next trades.
    """

    def __init__(self, file: LocalFile, days: int, clock: Clock = SYSTEM_CLOCK) -> None:
        self._file = file
        self._days = days
        self._clock = clock
        self._passed = 0  # the last row that was looked at in this round
        self._deleted = 0

    def step(self, goes_on: bool = False) -> float:
        """Delete what is old among the next rows; a round ends with rows that are not, unless it `goes_on`."""
        if not self._days:
            return math.inf
        if self._closes_wait():
            return KEEP_AGAIN_S
        query = "SELECT seq, create_time FROM realtime WHERE seq > ? ORDER BY seq LIMIT ?"
        rows = self._file.read_all(query, self._passed, EXPIRED_AT_ONCE)
        before, now = self._bounds()
        if any(created < before for _, created in rows):
            if self._file.why_no_room(EXPIRED_AT_ONCE * PAGES_PER_ROW * SQLITE_PAGE):
                self._file.empty_log()  # at the limit it is what keeps the next step from its room
            with self._file.write() as db:
                delete = "DELETE FROM realtime WHERE seq BETWEEN ? AND ? AND create_time < ?"
                self._deleted += db.execute(delete, (rows[0][0], rows[-1][0], before)).rowcount
        if rows and (goes_on or not any(before <= created <= now for _, created in rows)):
            self._passed = rows[-1][0]
            return EXPIRED_PAUSE_S
        self._end_round()
        return KEEP_EVERY_S

    def apply(self) -> str:
        """Look at every row."""
        while self.step(goes_on=True) <= EXPIRED_PAUSE_S:
            pass
        return phrase("stores.closes_wait") if self._days and self._closes_wait() else ""

    def words(self) -> str:
        """Return for how long trades are kept, and of when the oldest is."""
        kept = _kept_words(self._days * 24 * 3600 or None)
        found = self._file.read_one("SELECT create_time FROM realtime ORDER BY seq LIMIT 1") or ()
        return listing(
            "join.commas", [kept, *(phrase("stores.oldest", created=created) for created in found)]
        )

    def _closes_wait(self) -> bool:
        """Whether trades of a session that is over are still to be looked at: Stage.LOOK_BACK is 0."""
        query = "SELECT EXISTS (SELECT 1 FROM sessions WHERE stage < 3 AND stage = 0 AND due <= ?)"
        return bool(self._file.read_one(query, int(self._clock.wall()))[0])

    def _bounds(self) -> tuple[str, str]:
        """Return the first time that is not too old, and the time now, as they stand in `create_time`."""
        query = "SELECT max(t) FROM (SELECT t FROM realtime ORDER BY seq DESC LIMIT ?)"
        newest = self._file.read_one(query, EXPIRED_AT_ONCE)[0] or 0
        now = self._clock.wall()
        sure = datetime.fromtimestamp(min(now, newest / 1000 + LONGEST_REST_S), UTC)
        return iso(sure - timedelta(days=self._days)), iso_after(now, CLOCKS_DIFFER_S)

    def _end_round(self) -> None:
        deleted, self._passed, self._deleted = self._deleted, 0, 0
        if not deleted:
            return
        trades = count_words(deleted, "trade")
        log.info("%s older than KEEP_DAYS=%d deleted from %s", trades, self._days, self._file.path)
        pages, unused = self._file.pages()
        used = (pages - unused) * SQLITE_PAGE
        # half of it at least: else each round would write it anew
        is_much = unused * SQLITE_PAGE > max(SHRINK_ABOVE, used)
        if is_much and used <= REWRITTEN_MOST and not self._file.why_no_room(used):
            self._file.shrink()


class MongoRetention:
    """Has MongoDB remove trades older than KEEP_DAYS, by a TTL index of ours on `create_time`.

    The index is made on its own where that removes nothing at once; where older documents are there, somebody must ask
    for it (`apply`), as they may be more than whoever set KEEP_DAYS knows of. It is changed and dropped as the setting
    is. Indexes of others are left alone. What MongoDB refuses, or waits to be asked for, is said once.
    """

    def __init__(self, mongo: MongoStore, days: int) -> None:
        self._mongo = mongo
        self._days = days
        self._seconds = min(days * 24 * 3600, TTL_MOST_S)
        self._older = ""  # what would be removed at once, when that was counted
        self._said = ""
        self._is_there = False  # our index, when it was looked for

    def step(self) -> float:
        """Have the index be as KEEP_DAYS says, as far as nobody need be asked; no server is waited for."""
        if not self._mongo.is_met:
            return KEEP_AGAIN_S
        try:
            why = self._arrange()
        except StoreAway as error:
            if error.unreachable:
                raise
            why = phrase("stores.refused", why=error.words)
        if why and why != self._said:
            if self._days:
                log.warning("KEEP_DAYS=%d has no effect: %s", self._days, why)
            elif self._is_there:
                log.warning("that KEEP_DAYS is not set has no effect: %s", why)
        self._said = why
        return KEEP_EVERY_S if self._days else math.inf

    def apply(self) -> str:
        """Have the index be as KEEP_DAYS says, also where older documents go then."""
        return self._arrange(is_asked_for=True)

    def words(self) -> str:
        """Return for how long trades are kept, and by which index."""
        try:
            mine, others = self._indexes()
        except StoreAway as error:
            if error.unreachable:
                raise
            return phrase("stores.kept_unseen", why=error.words)
        words = [_kept_words(mine.seconds if mine else None)]
        if mine is not None:
            words += [phrase("stores.oldest", created=created) for created in self._mongo.oldest()]
            if not self._days:
                words.append(phrase("stores.for_ever_soon"))
            elif mine.seconds != self._seconds:
                words.append(phrase("stores.kept_soon", days=self._days))
        elif self._days:
            why = self._why_not_on_its_own(others) or phrase("stores.ttl_to_come")
            words.append(phrase("stores.kept_not_yet", days=self._days, why=why))
        told = listing("join.commas", words)  # may name one that is in the way
        removing = [_other_words(index) for index in others if index.seconds is not None]
        words += [phrase("stores.but", other=other) for other in removing if other not in told]
        return listing("join.commas", words)

    def _indexes(self) -> tuple[TtlIndex | None, list[TtlIndex]]:
        """Return our index, and those of others."""
        found = self._mongo.ttl_indexes()
        mine = next((index for index in found if index.name == TTL_INDEX), None)
        self._is_there = mine is not None
        return mine, [index for index in found if index is not mine]

    def _arrange(self, is_asked_for: bool = False) -> str:
        """Have the index be as KEEP_DAYS says, and return why it is not, or ''. Raises StoreAway."""
        mine, others = self._indexes()
        wanted = count_words(self._days, "day") if self._days else "ever"
        limit = TTL_BUILD_S if is_asked_for else MONGODB_TIMEOUT_MS / 1000
        if mine is None and self._days:
            why = self._why_not_on_its_own(others, is_asked_for)
            if why:
                return why
            self._mongo.make_ttl_index(self._seconds, limit)
            log.info("MongoDB keeps trades in %s for %s", self._mongo.realtime_name, wanted)
        elif mine is not None and mine.seconds != self._seconds:
            if not self._days:
                self._mongo.drop_ttl_index()
            elif not self._mongo.change_ttl_index(self._seconds):  # readWrite may not, but drop and make it
                self._mongo.drop_ttl_index()
                self._mongo.make_ttl_index(self._seconds, limit)
            was = "ever" if mine.seconds is None else _span_words(mine.seconds)
            log.warning(
                "MongoDB keeps trades in %s for %s now, not for %s: KEEP_DAYS is %s",
                self._mongo.realtime_name,
                wanted,
                was,
                self._days or "not set",
            )
        return ""

    def _why_not_on_its_own(self, others: Sequence[TtlIndex], is_asked_for: bool = False) -> str:
        """Return why our index is not made without more ado, '' where it is."""
        for index in others:
            if index.field == "create_time":
                return phrase("stores.drop_other", other=_other_words(index))
        if not (is_asked_for or self._older):
            count = self._mongo.count_older(utc_now() - timedelta(seconds=self._seconds))
            if count is None:
                self._older = phrase("stores.holds_many", name=self._mongo.realtime_name)
            elif count:
                documents = count_words(count, "document")
                self._older = phrase(
                    "stores.holds_older", name=self._mongo.realtime_name, documents=documents
                )
        return "" if is_asked_for else self._older


def _kept_words(seconds: int | None) -> Phrase:
    if seconds is None:
        return phrase("stores.kept_for_ever")
    return phrase("stores.kept", span=_span_words(seconds))


def _span_words(seconds: int) -> Phrase:
    days = seconds / (24 * 3600)
    return count_words(int(days), "day") if days.is_integer() else phrase("age.s", n=seconds)


def _other_words(index: TtlIndex) -> Phrase:
    if index.seconds is None:
        return phrase("stores.other_in_place", name=index.name, field=index.field)
    span = _span_words(index.seconds)
    return phrase("stores.other_removes", name=index.name, field=index.field, span=span)


# ======================================================================================================
# Closing prices
# ======================================================================================================

# Closes that a process remembers to have written or noted; more are only looked at once more.
CLOSES_REMEMBERED = 20_000
DAY_S = 24 * 60 * 60
# A session is looked after for so long; what is older is the business of --backfill.
LOOKED_AFTER_S = 14 * DAY_S
# After that the two newest bars, which a request for many codes brings, are those of later sessions.
SINGLE_AFTER_S = 2 * DAY_S
# A bar that could not be had is asked for again after this time, then after twice as long, and so on.
BAR_AGAIN_S, BAR_AGAIN_CAP_S = 30 * 60, DAY_S
# After a fault of the API's, the network's or the store's nothing is made final for a while.
FINAL_PAUSE_S = 300.0
# Sessions that are looked at in one step, in between which executions begin: ten requests for a hundred codes each.
SESSIONS_AT_ONCE = 1000
# Requests for a single code in one step.
SINGLES_AT_ONCE = 10
# The API's bars of several codes, and of one code at most.
BARS_OF_SEVERAL, MAX_BARS = 2, 500


class Stage(IntEnum):
    """What is still to be done for the close of a code's session."""

    LOOK_BACK = 0  # it is not over, or its trades have not been looked at since
    BATCH = 1  # its bar is to come, with those of other codes
    SINGLE = 2  # its bar is to come, in a request of its own
    DONE = 3  # it is final, or as good as it gets


class OpenSession(NamedTuple):
    """A session in which a code traded: what is to be done next, when (epoch seconds), and the tries so far."""

    code: str
    date: str
    stage: Stage
    due: int
    tries: int = 0

    @property
    def key(self) -> str:
        """The `_id` of its close."""
        return f"{self.code}|{self.date}"


class SessionsFile:
    """The sessions whose closes are still to be made final, in the local file. Any thread may call it."""

    def __init__(self, file: LocalFile) -> None:
        self._file = file

    def note(self, sessions: Sequence[OpenSession]) -> None:
        """Keep sessions, unless they are there. Raises StoreError."""
        query = (
            "SELECT key FROM json_each(?) WHERE NOT EXISTS (SELECT 1 FROM sessions "
            "WHERE code = json_extract(value, '$[0]') AND date = json_extract(value, '$[1]'))"
        )
        asked = json.dumps([(one.code, one.date) for one in sessions])
        fresh = [sessions[number] for (number,) in self._file.read_all(query, asked)]
        if fresh:
            with self._file.write() as db:
                db.executemany("INSERT OR IGNORE INTO sessions VALUES (?, ?, ?, ?, ?)", fresh)

    def due(self, now: float, count: int) -> list[OpenSession]:
        """Return up to `count` of which something is to be done now, the next stage's last. Raises StoreError."""
        query = "SELECT * FROM sessions WHERE stage < 3 AND due <= ? ORDER BY stage, due LIMIT ?"
        return [_open_session(row) for row in self._file.read_all(query, int(now), count)]

    def next_due(self) -> int | None:
        """Return when (epoch seconds) something is to be done next, None for never. Raises StoreError."""
        found = self._file.read_one("SELECT min(due) FROM sessions WHERE stage < 3")[0]
        return None if found is None else int(found)

    def change(self, sessions: Iterable[OpenSession]) -> None:
        """Keep what is to be done next; what is done is forgotten when the code has a newer one. Raises StoreError."""
        rows = list(sessions)
        forget = (
            "DELETE FROM sessions WHERE code = ? AND stage = 3 "
            "AND date < (SELECT max(date) FROM sessions AS others WHERE others.code = sessions.code)"
        )
        with self._file.write() as db:
            db.executemany("INSERT OR REPLACE INTO sessions VALUES (?, ?, ?, ?, ?)", rows)
            db.executemany(forget, [(row.code,) for row in rows])


def _open_session(row: Sequence[Any]) -> OpenSession:
    code, day, stage, due, tries = row
    return OpenSession(code, day, Stage(stage), due, tries)


class RefusedClose(NamedTuple):
    """A close that the store refused for good, and in which words."""

    close: Close
    why: str


def place_closes(store: CloseStore, closes: Sequence[Close]) -> list[RefusedClose]:
    """Let closes take their places in a store, and return those that it refused. Raises StoreError."""
    refused = store.write_closes(closes) if closes else {}
    return [RefusedClose(close, refused[close.key]) for close in closes if close.key in refused]


class ClosingPrices:
    """Keeps the closing snapshot from trades: looks at stored ones whose session is over, and writes their closes.

    The close is, until the daily bar comes (`Finaliser`), the last trade of the regular session: the stored one
    itself, else the newest in `realtime` of that session, else (so that the day is not missing) the stored one as
    `after_hours`. A trade before the session opens makes none. Of each session it is noted that the code traded.

    Any thread may call it: what it remembers only saves work, the store decides which close is the better one.
    """

    def __init__(self, store: CloseStore, sessions: SessionsFile, clock: Clock = SYSTEM_CLOCK) -> None:
        self._store = store
        self._sessions = sessions
        self._clock = clock
        # What is done with, so that a trade polled again costs next to nothing: the trade of a code; the
        # date of a code, and the time from which on its trades after hours change nothing; the date of a
        # code that is noted.
        self._settled: dict[str, str] = {}
        self._after_hours: dict[str, tuple[str, int]] = {}
        self._noted: dict[str, str] = {}

    def settle(self, documents: Sequence[Document], stop: threading.Event) -> list[RefusedClose]:
        """Write the closes that follow from these stored trades, and return those that the store refused.

        Raises StoreError.
        """
        now = int(self._clock.wall() * 1000)
        # of each market the session of its last trade: mostly the next one's too
        sessions: dict[str, Session] = {}
        over: list[tuple[Document, Session]] = []
        traded: dict[tuple[str, str], Session] = {}
        for document in documents:
            code, t = document["stock_code"], document["t"]
            market = market_name(code)
            session = sessions.get(market)
            if session is None or not session.start <= t < session.end:
                session = sessions[market] = _session_at(market, t)
            day, _, _, opens, close, _, _ = session
            if now >= close and t >= opens and self._settled.get(code) != document["_id"]:
                over.append((document, session))
            if self._noted.get(code) != day and close < NEVER:
                traded[code, day] = session
        closes = self._closes(over)
        refused = place_closes(self._store, closes)
        self._note(traded, now)
        self._remember(over, closes)
        return refused

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
            newest = self._store.newest(by_code, session.opens, session.until)
            closes += [regular_close(document, session) for document in newest.values()]
            closes += [
                regular_close(document, session)._replace(after_hours=True)
                for code, documents in by_code.items()
                if code not in newest
                for document in documents
            ]
        return closes

    def _changes_nothing(self, document: Document, session: Session) -> bool:
        """Whether a trade after hours comes after what this process has settled for that date."""
        day, since = self._after_hours.get(document["stock_code"], ("", 0))
        return day == session.date and document["t"] > since

    def _note(self, traded: Mapping[tuple[str, str], Session], now: int) -> None:
        """Note in the file in which sessions codes traded, those of long ago left out."""
        if len(self._noted) > CLOSES_REMEMBERED:
            self._noted.clear()
        fresh = [
            OpenSession(code, day, Stage.LOOK_BACK, session.until // 1000 + 1)
            for (code, day), session in traded.items()
            if now - session.close < LOOKED_AFTER_S * 1000
        ]
        if fresh:
            self._sessions.note(fresh)
        self._noted.update(traded.keys())  # pairs of a code and a date

    def _remember(self, over: Iterable[tuple[Document, Session]], closes: Iterable[Close]) -> None:
        """Note what is written."""
        if len(self._settled) + len(self._after_hours) > CLOSES_REMEMBERED:
            self._settled.clear()
            self._after_hours.clear()
        regular = {close.key for close in closes if not close.after_hours}
        for document, session in over:
            code, t = document["stock_code"], document["t"]
            self._settled[code] = document["_id"]
            if t > session.until and not self._changes_nothing(document, session):
                known = f"{code}|{session.date}" in regular
                self._after_hours[code] = (session.date, 0 if known else t)


def _session_at(name: str, t: int) -> Session:
    """Return the session of a market, by its name, at `t` (epoch ms)."""
    market = market_named(name)
    return session_of(market, t) if market else NO_SESSION


def regular_close(document: Document, session: Session) -> Close:
    """Return the close that a regular trade makes."""
    return Close(document, session.date, provisional=session.bar < NEVER)


# ------------------------------------------------------------------------------------------------------
# Final closes
# ------------------------------------------------------------------------------------------------------


def final_closes(code: str, bars: Sequence[Bar], now_ms: int) -> list[Close]:
    """Return the final closes that a code's bars make: of sessions that are over, in which it traded.

    A bar without volume is that of a suspended share, but for an index. Of two bars of one date the better counts.
    """
    market = market_of(code)
    if market is None:
        return []
    found: dict[str, Close] = {}
    for bar in sorted(bars, key=lambda bar: (float(bar.volume), float(bar.close))):
        session = session_of(market, bar.t * 1000)
        if now_ms >= session.bar and (float(bar.volume) > 0 or is_index(code)):
            found[session.date] = bar_close(bar, session)
    return list(found.values())


class Finaliser:
    """Makes closes final with the API's daily bars, step by step: of every session that was noted.

    A session is first looked back at, for trades that were polled while it went on; when its bar is due it is asked
    for, a hundred codes at once. What cannot be had stays provisional and is asked for again, alone after two days,
    until two weeks have gone. One thread at a time.
    """

    def __init__(
        self,
        store: CloseStore,
        source: Source,
        sessions: SessionsFile,
        events: Events = NO_EVENTS,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._store = store
        self._source = source
        self._sessions = sessions
        self._events = events
        self._clock = clock
        self._not_before = 0.0  # monotonic
        self._said_on = ""  # UTC date

    def wait_s(self) -> float:
        """Return the seconds after which there is something to do, infinite for never. Raises StoreError."""
        due = self._sessions.next_due()
        if due is None:
            return math.inf
        return max(0.0, due - self._clock.wall(), self._not_before - self._clock.monotonic())

    def pause(self) -> None:
        """Do nothing for a while."""
        self._not_before = self._clock.monotonic() + FINAL_PAUSE_S

    def step(self, stop: threading.Event) -> list[RefusedClose]:
        """Do the next part of what is due, and return the closes that the store refused. Raises StoreError."""
        due = self._sessions.due(self._clock.wall(), SESSIONS_AT_ONCE)
        refused = self._look_back([one for one in due if one.stage is Stage.LOOK_BACK])
        refused += self._finalise([one for one in due if one.stage is not Stage.LOOK_BACK], stop)
        return refused

    def _look_back(self, rows: Sequence[OpenSession]) -> list[RefusedClose]:
        """Write the closes of the newest trades of sessions that are over."""
        groups: dict[Session, list[OpenSession]] = {}
        for row in rows:
            groups.setdefault(_session_of_row(row), []).append(row)
        refused = []
        for session, some in groups.items():
            newest = self._store.newest([row.code for row in some], session.opens, session.until)
            closes = [regular_close(document, session) for document in newest.values()]
            refused += place_closes(self._store, closes)
            stage = Stage.BATCH if session.bar < NEVER else Stage.DONE
            self._sessions.change(row._replace(stage=stage, due=session.bar // 1000) for row in some)
        return refused

    def _finalise(self, rows: Sequence[OpenSession], stop: threading.Event) -> list[RefusedClose]:
        """Ask for the bars of sessions, and write what they make."""
        if not rows:
            return []
        final = self._store.finals([row.key for row in rows])
        self._sessions.change(row._replace(stage=Stage.DONE) for row in rows if row.key in final)
        by_code: dict[str, list[OpenSession]] = {}
        for row in rows:
            if row.key not in final:
                by_code.setdefault(row.code, []).append(row)
        refused: list[RefusedClose] = []
        for outcome in self._source.fetch(self._batches(by_code), stop):
            self._events.progress()
            if outcome is not None and not outcome.interrupted:
                refused += self._take(outcome, by_code)
        return refused

    def _batches(self, by_code: Mapping[str, Sequence[OpenSession]]) -> list[Batch]:
        """Return what is to be asked for: many codes at once, or where nothing else is left some alone."""
        plan = BatchPlan(len(by_code))
        for code, rows in by_code.items():
            if any(row.stage is Stage.BATCH for row in rows):
                plan.add_instrument(Instrument(code, _market_of_row(rows[0]).product))
        together = plan.finish()
        if together:
            return [batch._replace(bars=BARS_OF_SEVERAL) for batch in together]
        now = self._clock.wall()
        return [
            Batch(_market_of_row(rows[0]).product, code, _days_since(min(row.date for row in rows), now))
            for code, rows in islice(by_code.items(), SINGLES_AT_ONCE)
        ]

    def _take(self, outcome: Outcome, by_code: Mapping[str, Sequence[OpenSession]]) -> list[RefusedClose]:
        """Write the closes that an answer makes, and keep what is still to be done."""
        now_ms = int(self._clock.wall() * 1000)
        codes = outcome.batch.split()
        closes = {code: final_closes(code, outcome.bars.get(code, ()), now_ms) for code in codes}
        refused = place_closes(self._store, [close for some in closes.values() for close in some])
        made = {close.key for some in closes.values() for close in some}
        rows = [row for code in codes for row in by_code[code]]
        left = [row for row in rows if row.key not in made]
        passed = {code for code in codes if closes[code] and outcome.batch.bars == BARS_OF_SEVERAL}
        changed = [row._replace(stage=Stage.DONE) for row in rows if row.key in made]
        for row in left:
            if row.code in passed and all(row.date < close.date for close in closes[row.code]):
                changed.append(row._replace(stage=Stage.SINGLE))  # the two newest bars are later ones
            else:
                changed.append(self._later(row))
        self._sessions.change(changed)
        failure = next(iter(outcome.failures.values()), None)
        if failure is not None and failure.kind in (FailureKind.NETWORK, FailureKind.API):
            self.pause()
        if left:
            self._say(left, failure.words if failure else phrase("closes.no_bars"))
        return refused

    def _later(self, row: OpenSession) -> OpenSession:
        """Return when a session is looked at again whose bar could not be had."""
        now = int(self._clock.wall())
        age = now - _session_of_row(row).bar // 1000
        stage, tries = row.stage, row.tries + 1
        if age > LOOKED_AFTER_S:
            log.warning("the close of %s stays provisional: no daily bar could be had for two weeks", row.key)
            stage = Stage.DONE
        elif age > SINGLE_AFTER_S:
            stage = Stage.SINGLE
        delay = min(BAR_AGAIN_CAP_S, BAR_AGAIN_S * 2 ** min(row.tries, 10))
        return row._replace(stage=stage, due=now + delay, tries=tries)

    def _say(self, rows: Sequence[OpenSession], why: str) -> None:
        """Say once a day that closes stay provisional."""
        today = utc_day(self._clock.wall())
        if self._said_on != today:
            self._said_on = today
            names = first_few([row.key for row in rows])
            log.warning("closes stay provisional, their daily bars are asked for again: %s: %s", names, why)


def _market_of_row(row: OpenSession) -> Market:
    return cast(Market, market_of(row.code))


def _session_of_row(row: OpenSession) -> Session:
    return session_on(_market_of_row(row), date.fromisoformat(row.date))


def _days_since(day: str, now: float) -> int:
    """Return how many daily bars reach back to a date for certain, as far as the API has so many."""
    days = (datetime.fromtimestamp(now, UTC).date() - date.fromisoformat(day)).days
    return max(3, min(MAX_BARS, days + 2))


class Backfilled(NamedTuple):
    """What became of a code of a backfill: the dates of its first and last close, and how many closes are new.

    `there`: how many were final before. `why`: what was wrong, '' where nothing was.
    """

    code: str
    first: str = ""
    last: str = ""
    added: int = 0
    there: int = 0
    why: str = ""


class Backfill:
    """Makes the closes of the past final, one request a code; what it has asked for is kept in the local file."""

    def __init__(
        self, store: CloseStore, source: Source, file: LocalFile, clock: Clock = SYSTEM_CLOCK
    ) -> None:
        self._store = store
        self._source = source
        self._file = file
        self._clock = clock

    def run(
        self, codes: Iterable[str], sessions: int, stop: threading.Event
    ) -> Iterator[Backfilled | int | None]:
        """Yield how many codes there are, then what became of each, and None now and then.

        `sessions`: the last ones, up to 500. Raises StoreError.
        """
        plan = plan_batches(codes)
        yield plan.total
        for code, why in plan.invalid.items():
            yield Backfilled(code, why=why)
        batches: list[Batch] = []
        for product, code in ((batch.product, code) for batch in plan.batches for code in batch.split()):
            if not has_bars(code):
                yield Backfilled(code, why=phrase("closes.no_boundary"))
                continue
            known = self._known(code, sessions)
            if known is not None:
                yield known
            else:  # today's bar may come on top
                batches.append(Batch(product, code, min(MAX_BARS, sessions + 1)))
        for outcome in self._source.fetch(batches, stop):
            if outcome is None or not outcome.interrupted:
                yield outcome and self._take(outcome, sessions)

    def codes(self) -> list[str]:
        """Return the codes in `realtime` that have daily bars. Raises StoreError."""
        return [code for code in self._store.codes() if has_bars(code)]

    def _take(self, outcome: Outcome, sessions: int) -> Backfilled:
        """Write the closes of a code."""
        code = outcome.batch.codes
        if outcome.failures:
            return Backfilled(code, why=outcome.failures[code].words)
        closes = final_closes(code, outcome.bars.get(code, ()), int(self._clock.wall() * 1000))
        closes = sorted(closes, key=lambda close: close.date)[-sessions:]
        if not closes:
            return Backfilled(code, why=phrase("closes.no_bar"))
        there = len(self._store.finals([close.key for close in closes]))
        refused = self._store.write_closes(closes)
        first, last = closes[0].date, closes[-1].date
        if refused:
            return Backfilled(
                code, first, last, len(closes) - len(refused), there, next(iter(refused.values()))
            )
        with self._file.write() as db:
            row = (code, first, last, sessions, len(closes))
            db.execute("INSERT OR REPLACE INTO backfilled VALUES (?, ?, ?, ?, ?)", row)
        return Backfilled(code, first, last, len(closes) - there, there)

    def _known(self, code: str, sessions: int) -> Backfilled | None:
        """Return what there is of a code that was asked for before and is final up to now, None where it is not."""
        query = "SELECT first, last, asked, closes FROM backfilled WHERE code = ?"
        first, last, asked, closes = self._file.read_one(query, code) or ("", "", 0, 0)
        if asked < sessions:
            return None
        since, until = date.fromisoformat(first), date.fromisoformat(self._last_session(code))
        days = [since + timedelta(days=number) for number in range((until - since).days + 1)]
        final = {name.rpartition("|")[2] for name in self._store.finals([f"{code}|{day}" for day in days])}
        if sum(day <= last for day in final) < closes or max(final, default="") < until.isoformat():
            return None
        newer = [day for day in days if day.isoformat() > last and day.weekday() < SATURDAY]
        if any(day.isoformat() not in final for day in newer):
            return None
        return Backfilled(code, min(final), max(final), 0, len(final))

    def _last_session(self, code: str) -> str:
        """Return the date of the last session whose bar can be had, if it was no holiday."""
        market = cast(Market, market_of(code))
        now = int(self._clock.wall() * 1000)
        session = session_of(market, now)
        while now < session.bar:
            session = session_of(market, session.start - 1)
        return session.date


def has_bars(code: str) -> bool:
    """Return whether the API's daily bars of a code have a known boundary."""
    market = market_of(code)
    return market is not None and market.hours.bar is not None


# ======================================================================================================
# Delivery: what waits on this machine for MongoDB
# ======================================================================================================

# Documents that go to MongoDB at once when it is back: more than WRITE_BATCH, as each batch is taken out of the
# queue with a commit of its own.
DELIVERY_BATCH = 2000
# A MongoDB that is back is met soon: asking it is cheap, and the results say "failure" meanwhile.
DELIVERY_FIRST_S, DELIVERY_CAP_S = 1.0, 10.0
# While the queue is emptied a write waits so long for its turn before it queues up itself.
CATCH_UP_S = 5.0
# A document alone that fails so often, while MongoDB takes another one each time, is rejected by it for good.
POISON_TRIES = 3


class QueuedBatch(NamedTuple):
    """The oldest trades of the queue, up to number `last`."""

    last: int
    documents: list[Document]


class DeliveryQueue:
    """Trades that wait in the local file for MongoDB: bounded, and read in order of arrival. Any thread may call it.

    Raises StoreError when the file fails.
    """

    def __init__(self, file: LocalFile, max_bytes: int) -> None:
        self._file = file
        self._max_bytes = max_bytes
        self.trades = 0  # as far as this process knows: to count millions takes a while
        self.refused = 0  # trades that found no room
        self.count()

    def write(self, documents: Sequence[Document]) -> WriteReport:
        """Queue documents in one transaction. Raises QueueFull when there is no room."""
        with self._file.lock:
            try:
                with self.room_for(documents) as db:
                    report = insert_trades(db, documents)
            except QueueFull:
                self.refused += len(documents)
                raise
            self.trades += report.stored
        return report

    @contextlib.contextmanager
    def room_for(self, documents: Collection[Document]) -> Iterator[sqlite3.Connection]:
        """Begin a transaction that has room for these documents. Raises QueueFull when there is none."""
        with self._file.lock:
            try:
                self._find_room(documents)
            except QueueFull:
                self._file.empty_log()  # what the log took is free again
            with self._file.write() as db:
                self._find_room(documents)
                yield db

    def _find_room(self, documents: Collection[Document]) -> None:
        """Raise QueueFull if the file or the disk could come to its limit with these documents."""
        pages, _ = self._file.pages()
        more = most_growth(self._file, documents)
        if pages * SQLITE_PAGE + self._file.bytes_beside() + more > self._max_bytes:
            raise QueueFull(phrase("delivery.full", path=self._file.path, limit=self._max_bytes >> 20))
        why = self._file.why_no_room(more)
        if why:
            raise QueueFull(why)

    def has_trades(self) -> bool:
        """Return whether trades wait for MongoDB."""
        with self._file.lock:
            found = bool(self._file.read_one("SELECT EXISTS (SELECT 1 FROM realtime WHERE demo IS NULL)")[0])
            if not found:
                self.trades = 0
        return found

    def count(self) -> int:
        """Count what waits, and return it: other processes may have changed it."""
        with self._file.lock:
            (self.trades,) = self._file.read_one(
                "SELECT (SELECT count(*) FROM realtime) - (SELECT count(*) FROM realtime WHERE demo IS NOT NULL)"
            )
        return self.trades

    def oldest(self, count: int) -> QueuedBatch:
        """Return up to `count` trades in order of arrival."""
        names = ", ".join(DOCUMENT_FIELDS)
        query = f"SELECT seq, {names} FROM realtime WHERE demo IS NULL ORDER BY seq LIMIT ?"  # noqa: S608
        rows = self._file.read_all(query, count)
        numbers = [row[0] for row in rows]
        try:  # SQLite does not look
            if numbers != sorted(set(numbers)):
                raise ValueError(phrase("delivery.out_of_order"))
            documents = [_queued_document(row[1:]) for row in rows]
        except (TypeError, ValueError) as error:
            raise self._file.damaged(one_line(error_words(error))) from error
        return QueuedBatch(max(numbers, default=0), documents)

    def newest(self) -> list[Document]:
        """Return the trade that came last; none where none waits, or the disk has changed it. Raises StoreError."""
        names = ", ".join(DOCUMENT_FIELDS)
        query = f"SELECT {names} FROM realtime WHERE demo IS NULL ORDER BY seq DESC LIMIT 1"  # noqa: S608
        with contextlib.suppress(TypeError, ValueError):
            return [_queued_document(row) for row in self._file.read_all(query)]
        return []

    @contextlib.contextmanager
    def taking_out(self, batch: QueuedBatch) -> Iterator[None]:
        """Take a batch out, in one transaction with what the block does."""
        with self._file.lock:
            with self._file.write() as db:
                yield
                taken = db.execute(
                    "DELETE FROM realtime WHERE seq <= ? AND demo IS NULL", (batch.last,)
                ).rowcount
            self.trades = max(0, self.trades - taken)

    def retry(self, collection: str) -> None:
        """Queue the trades again that MongoDB rejected."""
        names = DOCUMENT_FIELDS[1:]
        fields = ", ".join(f"json_extract(document, '$.{name}')" for name in names)
        insert = (
            f"INSERT INTO realtime (_id, {', '.join(names)}) SELECT _id, {fields} FROM rejects "  # noqa: S608
            "WHERE collection = ? ORDER BY seq ON CONFLICT (_id) DO NOTHING"
        )
        with self._file.write() as db:
            db.execute(insert, (collection,))
            db.execute("DELETE FROM rejects WHERE collection = ?", (collection,))
        self.count()

    def finals(self, count: int) -> list[Close]:
        """Return up to `count` final closes, which were made while no MongoDB was set.

        The others follow from the trades.
        """
        names = (*TRADE_FIELDS, "stock_code")
        query = (
            f"SELECT date, {', '.join((*names, *BAR_FIELDS))} FROM close "  # noqa: S608
            "WHERE close IS NOT NULL ORDER BY _id LIMIT ?"
        )
        closes = []
        for day, *values in self._file.read_all(query, count):
            document = dict(zip(names, values, strict=False))
            bar = Bar(document["s"], document["t"] // 1000, *values[len(names) :])
            closes.append(Close(document, day, bar=bar))
        return closes

    def remove_finals(self, closes: Iterable[Close]) -> None:
        """Take out final closes that MongoDB has."""
        rows = [(close.key, close.bar_fields()["volume"]) for close in closes]
        with self._file.write() as db:
            db.executemany("DELETE FROM close WHERE _id = ? AND volume = ?", rows)

    def stats(self) -> QueueStats:
        """Return what waits, without the rejects."""
        if not self.trades:
            return QueueStats(refused=self.refused)
        oldest = "SELECT create_time FROM realtime WHERE demo IS NULL ORDER BY seq LIMIT 1"
        (since,) = self._file.read_one(oldest) or (None,)
        pages, unused = self._file.pages()
        return QueueStats(self.trades, (pages - unused) * SQLITE_PAGE, since, refused=self.refused)

    def shrink(self) -> None:
        """Give the disk back what a long absence of MongoDB took, if that is much."""
        try:
            _, unused = self._file.pages()
            if unused * SQLITE_PAGE + self._file.bytes_beside() > SHRINK_ABOVE:
                self._file.shrink()
        except StoreError as error:
            log.warning("what %s has grown by is not given back this time: %s", self._file.path, error)


def _queued_document(row: Sequence[Any]) -> Document:
    """Return the document of a row. Raises ValueError or TypeError when the disk has changed it."""
    name, *fields, code, created = row
    trade = Trade(*fields)
    document = to_document(trade, datetime.fromisoformat(created))
    if name != document["_id"] or code != trade.s:
        raise ValueError(phrase("delivery.other_id"))
    return document


class Reject(TypedDict):
    """A document that MongoDB rejected for good, with its words and the time (ISO 8601 UTC)."""

    collection: str
    _id: str
    reason: str
    rejected_at: str
    document: Mapping[str, object]


# What the kinds of their reasons begin with.
REJECT_REASONS = ("stores.", "tools.see")


class Rejects:
    """What MongoDB rejected for good, in the local file. Any thread may call it."""

    def __init__(self, file: LocalFile) -> None:
        self._file = file

    def add(self, documents: Iterable[Document], reasons: Mapping[str, str], collection: str) -> None:
        """Put those of the documents aside that have a reason (`_id` -> why). Raises StoreError."""
        insert = (
            "INSERT OR REPLACE INTO rejects (collection, _id, document, reason, rejected_at) "
            "VALUES (?, ?, ?, ?, ?)"
        )
        with self._file.write() as db:
            for document in documents:
                name = document["_id"]
                if name in reasons:
                    told = json.dumps(document, default=_json_value)
                    db.execute(insert, (collection, name, told, reasons[name], iso(utc_now())))

    def all(self) -> list[Reject]:
        """Return them, oldest first. Raises StoreError."""
        query = "SELECT collection, _id, reason, rejected_at, document FROM rejects ORDER BY seq"
        return [
            Reject(
                collection=collection,
                _id=name,
                reason=stored_words(why, REJECT_REASONS),
                rejected_at=at,
                document=json.loads(document),
            )
            for collection, name, why, at, document in self._file.read_all(query)
        ]

    def count(self) -> int:
        """Return how many there are. Raises StoreError."""
        return int(self._file.read_one("SELECT count(*) FROM rejects")[0])

    def discard(self) -> int:
        """Forget them all, and return how many that was. Raises StoreError."""
        with self._file.write() as db:
            return db.execute("DELETE FROM rejects").rowcount


def _json_value(value: object) -> str:
    if isinstance(value, datetime):
        return iso(value)
    return str(value)


def _session_span(code: str, t: int) -> tuple[int, int]:
    """Return from when to when (epoch ms) the session of a trade goes, of a code without sessions the UTC day."""
    market = market_of(code)
    if market is None:
        return t // DAY_MS * DAY_MS, t // DAY_MS * DAY_MS + DAY_MS
    session = session_of(market, t)
    return session.start, session.end


DAY_MS = 86_400_000
_SPAN = "_id > :first AND _id < :last"
_DELETE_BETWEEN = f"""
DELETE FROM unsettled WHERE {_SPAN} AND _id NOT IN (
    SELECT * FROM (SELECT _id FROM unsettled WHERE {_SPAN} ORDER BY _id LIMIT 1)
    UNION ALL SELECT * FROM (SELECT _id FROM unsettled WHERE {_SPAN} ORDER BY _id DESC LIMIT 1)
)"""  # noqa: S608


class UnsettledTrades:
    """Trades that MongoDB has, whose closes are still to be made; in the local file. Any thread may call it.

    Of a code and session the first and the last are kept, however long closes cannot be made: the others are in
    `realtime`, where the close is looked for too. The first one counts where all are after hours.
    """

    def __init__(self, file: LocalFile) -> None:
        self._file = file

    def add(self, documents: Sequence[Document]) -> None:
        """Keep trades until their closes are made. Raises StoreError."""
        insert = "INSERT OR IGNORE INTO unsettled VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
        sessions = {(d["stock_code"], *_session_span(d["stock_code"], d["t"])) for d in documents}
        # an `_id` begins with code and time: those of one code and session lie side by side
        spans = [{"first": f"{code}|{start}", "last": f"{code}|{end}"} for code, start, end in sessions]
        with self._file.write() as db:
            db.executemany(insert, map(trade_row, documents))
            db.executemany(_DELETE_BETWEEN, spans)

    def some(self, count: int) -> list[Document]:
        """Return up to `count` of them; damaged ones are said and forgotten. Raises StoreError."""
        query = f"SELECT {', '.join(DOCUMENT_FIELDS)} FROM unsettled LIMIT ?"  # noqa: S608
        documents = []
        for row in self._file.read_all(query, count):
            try:
                documents.append(_queued_document(row))
            except (TypeError, ValueError) as error:
                words = one_line(error_words(error))
                log.error("no close is made of %s, damaged on this machine: %s", row[0], words)
                self.remove(row[:1])
        return documents

    def remove(self, ids: Sequence[object]) -> None:
        """Forget trades whose closes are made. Raises StoreError."""
        with self._file.write() as db:
            db.executemany("DELETE FROM unsettled WHERE _id = ?", [(one,) for one in ids])

    def count(self) -> int:
        """Return how many there are. Raises StoreError."""
        return int(self._file.read_one("SELECT count(*) FROM unsettled")[0])


class Delivery:
    """MongoDB, and the queue on this machine for when it is away; a thread of its own delivers what waits.

    The thread begins when something waits. Any thread may call the methods, but for `deliver`: that is the
    thread's own, or that of a process in which nothing else waits. `events` is told what waits, by any of them.
    """

    def __init__(
        self,
        mongo: MongoStore,
        queue: DeliveryQueue,
        rejects: Rejects,
        unsettled: UnsettledTrades,
        closes: ClosingPrices,
        events: Events = NO_EVENTS,
    ) -> None:
        self.mongo = mongo
        self.queue = queue
        self.rejects = rejects
        self.unsettled = unsettled
        self.moved = self.rejected = 0  # what was delivered
        self._closes = closes
        self._events = events
        self._rng = random.Random()
        self._size = DELIVERY_BATCH
        self._failed_alone = 0
        self._changed = threading.Condition()  # what waits, or the next one:
        self._away: tuple[StoreAway, datetime] | None = None  # why MongoDB takes nothing, and since when
        self._is_silent = False  # whether nothing was delivered while a write waited for its turn
        self._thread = threading.Thread(target=self._run, name="stockrt-delivery", daemon=True)
        self._closing = threading.Event()
        self._woken = threading.Event()  # something came, or this closes
        self._trouble = LogThrottle(
            "MongoDB", then="what is fetched is kept on this machine until it is back"
        )
        self._close_trouble = LogThrottle(
            "closing snapshot", then="what it follows from is kept on this machine"
        )
        self._file_trouble = LogThrottle(
            "what waits for MongoDB", then="what it takes does not need the file"
        )

    def start(self) -> None:
        """Begin to deliver what waits since an earlier process. Raises StoreError."""
        stats = self.stats()
        self._events.queue_changed(stats)
        if stats.trades:
            log.info(
                "%d trades wait on this machine for MongoDB, the oldest since %s", stats.trades, stats.oldest
            )
        if not self.is_empty():
            self._wake()

    def write(self, documents: Sequence[Document]) -> WriteReport:
        """Store documents, or queue them: behind those that wait, and whatever fails but for their own fault."""
        if not self._is_caught_up():
            return self.keep(documents)
        return self._write_now(documents)

    def write_soon(self, documents: Sequence[Document]) -> WriteReport:
        """Store documents as `write` does, but wait for no turn: behind others they are queued at once."""
        if self._has_waiting():
            return self.keep(documents)
        return self._write_now(documents)

    def keep(self, documents: Sequence[Document]) -> WriteReport:
        """Queue documents, whether or not MongoDB would take them. Raises StoreError."""
        before = self.queue.trades
        try:
            report = self.queue.write(documents)
        except StoreError as error:
            words = phrase("delivery.not_kept", because=self._because(before), why=error.message)
            raise StoreError(words) from error
        finally:
            self._tell()
        self._wake()
        return WriteReport(
            refused=report.refused,
            queued=len(documents) - len(report.refused),
            queued_because=self._because(before - report.duplicates),
        )

    def _write_now(self, documents: Sequence[Document]) -> WriteReport:
        try:
            report = self.mongo.write(documents)
        except StoreAway as error:
            self._note_away(error)
            self._trouble.again(error.message)
            return self.keep(documents)
        self._note_back()
        if report.refused:
            self._put_aside(documents, report.refused, self.mongo.realtime_name)
        return report

    def settle(self, documents: Sequence[Document], stop: threading.Event) -> None:
        """Write the closes that follow from stored trades; where MongoDB does not take them, they are made later.

        Raises StoreError.
        """
        try:
            self._settle(documents, stop)
        except StoreAway:
            with self.queue.room_for(documents):
                self.unsettled.add(documents)
            self._wake()

    def deliver(self, stop: threading.Event, events: Events = NO_EVENTS) -> None:
        """Move everything that waits to MongoDB, in order of arrival, then make the closes; until `stop` is set.

        A batch that fails while MongoDB takes something else is halved, until the document is alone that it
        cannot stand. `events` is told of progress. Raises StoreAway when MongoDB takes nothing, ClosesLate when
        only closes cannot be made, StoreError when the local file fails.
        """
        total = self.moved + self.rejected + self.queue.trades
        while not stop.is_set():
            if self._deliver_trades(stop):
                events.progress(self.moved + self.rejected, total)
            elif not self._deliver_closes(stop):
                return

    def stats(self) -> QueueStats:
        """Return what waits. Raises StoreError."""
        return self.queue.stats()._replace(rejects=self.rejects.count())

    def is_empty(self) -> bool:
        """Return whether nothing at all waits, neither trades nor what is to be a close. Raises StoreError."""
        return not (self.queue.has_trades() or self.unsettled.count() or self.queue.finals(1))

    @property
    def is_away(self) -> bool:
        """Whether MongoDB is away, as far as is known."""
        return self._away is not None

    def check(self) -> str:
        """Try MongoDB and say what waits for it. Raises StoreError."""
        found = [self.mongo.check()]
        waiting = self.queue.stats().trades
        if waiting:
            found.append(phrase("delivery.kept_here", trades=count_words(waiting, "trade")))
        return listing("join.commas", found)

    def close(self) -> None:
        """Tell the thread to end; what waits stays."""
        self._closing.set()
        self._woken.set()

    # what a run's thread does

    def _is_caught_up(self) -> bool:
        """Whether no trades wait, if need be after a while. MongoDB is not waited for while it is away."""
        if not self._has_waiting():
            return True
        self._wake()
        before = self.queue.trades
        with self._changed:
            self._changed.wait_for(lambda: self._away or not self._has_waiting(), CATCH_UP_S)
        self._is_silent = self.queue.trades >= before
        return self._away is None and not self._has_waiting()

    def _has_waiting(self) -> bool:
        """Whether trades wait; none do where the file cannot say."""
        try:
            has_trades = self.queue.has_trades()
        except StoreError as error:
            self._file_trouble.again(error.message)
            return False
        self._file_trouble.over()
        return has_trades

    def _because(self, others: int) -> Phrase:
        """Return why trades are queued, before which `others` wait."""
        away = self._away
        if away is None:
            words = [phrase("delivery.silent", seconds=CATCH_UP_S)] if self._is_silent else []
            if others or not words:
                words.append(phrase("delivery.behind", others=waiting_words(others, "other")))
            return listing("join.clauses", words)
        error, since = away
        if error.unreachable:
            return phrase("delivery.unreachable", since=local_time(since))
        return phrase("delivery.no_writes", since=local_time(since), why=error.words)

    def _put_aside(self, documents: Sequence[Document], reasons: Mapping[str, str], collection: str) -> None:
        """Keep what MongoDB rejected; the others of its batch are stored, whatever the local file says."""
        try:
            with self.queue.room_for([document for document in documents if document["_id"] in reasons]):
                self.rejects.add(documents, reasons, collection)
        except StoreError as error:
            log.error("%s cannot be put aside: %s", first_few(reasons), error)
        else:
            self._tell()

    # what is delivered

    def _deliver_trades(self, stop: threading.Event) -> bool:
        """Move the oldest batch; return False when no trades wait."""
        batch, rejected = self._deliver_oldest(stop)
        if not batch.documents:
            return False
        arrived = [document for document in batch.documents if document["_id"] not in rejected]
        settled = self._settle_at_once(arrived, stop)
        with self.queue.taking_out(batch):
            self.rejects.add(batch.documents, rejected, self.mongo.realtime_name)
            if not settled:
                self.unsettled.add(arrived)
        self._size = min(DELIVERY_BATCH, self._size * 2)
        self._failed_alone = 0
        self.moved += len(arrived)
        self.rejected += len(rejected)
        for name, why in islice(rejected.items(), NAMES_SHOWN):
            log.error("%s is put aside, see --rejects: %s", name, why)
        self._note_back()
        self._tell()
        return True

    def _deliver_oldest(self, stop: threading.Event) -> tuple[QueuedBatch, dict[str, str]]:
        """Return the oldest batch, which MongoDB has by then, and what it rejected of it (`_id` -> why)."""
        takes = False
        while True:
            batch = self.queue.oldest(self._size)
            try:
                return batch, dict(self.mongo.write(batch.documents, takes).refused)
            except StoreAway as error:
                self._note_away(error)
                if not self._takes_another(batch, stop):
                    raise
                if takes := bool(error.refused):
                    continue
                if len(batch.documents) > 1:
                    self._size = len(batch.documents) // 2
                    continue
                self._failed_alone += 1
                if self._failed_alone >= POISON_TRIES:
                    return batch, self._rejected_alone(batch.documents[0], error)
                if stop.wait(DELIVERY_FIRST_S):
                    raise

    def _takes_another(self, batch: QueuedBatch, stop: threading.Event) -> bool:
        """Whether `realtime` takes a document, at once or after a moment: one of these may have brought MongoDB down.

        If need be that is the trade that came last, unless it is the only one: in its turn it is there already.
        """
        others = [
            document for document in self.queue.newest() if document["_id"] != batch.documents[0]["_id"]
        ]

        def takes() -> bool:
            return self.mongo.takes_another(self.mongo.realtime_name, others)

        return takes() or (not stop.wait(DELIVERY_FIRST_S) and takes())

    def _rejected_alone(self, document: Document, error: StoreAway) -> dict[str, str]:
        """Return why MongoDB rejects a document that it cannot stand, {} if it has it. Raises StoreAway."""
        if self.mongo.has(document["_id"]):
            return {}
        return {document["_id"]: error.message}

    def _settle_at_once(self, documents: Sequence[Document], stop: threading.Event) -> bool:
        """Make the closes of trades that arrived, unless others wait for theirs: each try may take its time limit.

        Returns whether that was done.
        """
        if self.unsettled.some(1):
            return False
        try:
            self._settle(documents, stop)
        except Exception as error:  # said when they cannot be made later either
            log.debug("closes are made later: %s", error)
            return False
        return True

    def _deliver_closes(self, stop: threading.Event) -> bool:
        """Make the closes that follow from a batch of trades; return False when there is none. Raises ClosesLate."""
        try:
            finals = self.queue.finals(DELIVERY_BATCH)
            if finals:
                self.put_closes_aside(place_closes(self.mongo, finals))
                self.queue.remove_finals(finals)
            trades = self.unsettled.some(DELIVERY_BATCH)
            if trades:
                self._settle(trades, stop)
                self.unsettled.remove([trade["_id"] for trade in trades])
        except Exception as error:  # whatever it was: the trades are there
            raise ClosesLate(error_words(error) or type(error).__name__) from error
        self._close_trouble.over()
        return bool(trades or finals)

    def _settle(self, documents: Sequence[Document], stop: threading.Event) -> None:
        """Write the closes that follow from trades; what MongoDB rejects of them is put aside."""
        self.put_closes_aside(self._closes.settle(documents, stop))

    def put_closes_aside(self, refused: Sequence[RefusedClose]) -> None:
        """Keep closes that MongoDB rejected."""
        if refused:
            closes = [one.close.document | one.close.bar_fields() | {"_id": one.close.key} for one in refused]
            self._put_aside(closes, {one.close.key: one.why for one in refused}, self.mongo.close_name)

    # the thread, and what both sides know of MongoDB

    def _wake(self) -> None:
        self._woken.set()
        with self._changed:
            if self._thread.ident is None and not self._closing.is_set():
                try:
                    self._thread.start()
                except RuntimeError as error:  # no more threads, at the moment
                    self._file_trouble.again(phrase("delivery.no_thread", why=str(error)))

    def _run(self) -> None:
        while not self._closing.is_set():
            self._woken.wait()
            self._deliver_all()

    def _deliver_all(self) -> None:
        """Deliver everything that waits, however long MongoDB is away, and say how much that was."""
        self.moved = self.rejected = 0
        took = 0.0  # of what moved something: an absence is not counted
        delays, done = self._fresh_delays(), 0
        while not self._closing.is_set():
            self._woken.clear()
            began = time.monotonic()
            try:
                self.deliver(self._closing)
                self._say_delivered(took + time.monotonic() - began)
                return
            except Exception as error:  # nobody else looks at this thread
                self._say_fault(error)
                if self.moved + self.rejected > done:
                    took += time.monotonic() - began
                    delays, done = self._fresh_delays(), self.moved + self.rejected
                wait = self._closing.wait
                if isinstance(error, ClosesLate):
                    wait = self._woken.wait  # new trades are moved at once
                wait(next(delays))

    def _say_delivered(self, took: float) -> None:
        if self._closing.is_set():
            return
        self._note_back()
        self._tell()
        self.queue.shrink()
        if self.moved or self.rejected:
            log.info(
                "%s moved to MongoDB in %.1f s, %d refused by it",
                count_words(self.moved, "kept trade"),
                took,
                self.rejected,
            )

    def _fresh_delays(self) -> Iterator[float]:
        return backoff(DELIVERY_FIRST_S, DELIVERY_CAP_S, self._rng)

    def _tell(self) -> None:
        """Tell what waits."""
        try:
            self._events.queue_changed(self.stats())
        except StoreError as error:
            if not self._closing.is_set():  # else it is the end that has closed the file
                self._file_trouble.again(error.message)

    def _note_away(self, error: StoreAway) -> None:
        with self._changed:
            _, since = self._away or (error, utc_now())
            self._away = error, since
            self._changed.notify_all()

    def _note_back(self) -> None:
        with self._changed:
            self._away = None
            self._changed.notify_all()
        self._trouble.over()

    def _say_fault(self, error: Exception) -> None:
        """Say why what waits is not delivered. It is tried again, whatever it was."""
        if self._closing.is_set():
            return
        trouble, words, cause = self._trouble, error_words(error), error
        if isinstance(error, ClosesLate):
            trouble, cause = self._close_trouble, cast(Exception, error.__cause__)
        elif not isinstance(error, StoreAway):
            named = phrase("tools.because", what=type(error).__name__, why=error_words(error))
            words = phrase("delivery.not_moved", why=lack_words(error) or named)
        if isinstance(cause, ImportError):
            self._events.damaged(lost_part(cause))
            return
        if not isinstance(cause, StoreError) and not trouble.there and not lack_words(cause):
            log.error("a fault of stockrt itself", exc_info=cause)
        trouble.again(words)


# ------------------------------------------------------------------------------------------------------
# Gaps of the stream
# ------------------------------------------------------------------------------------------------------

# Gaps that MongoDB has and that are over stay in the local file for so long; where there is no MongoDB all of them do.
GAPS_KEPT_S = 30 * DAY_S
# Gaps that go to MongoDB at once: each may name thousands of codes.
GAPS_AT_ONCE = 20


class Gap(NamedTuple):
    """A time in which the stream did not bring every trade of some codes, as both stores have it.

    `since` and `until` are times at which pushes arrived, epoch ms by the clock of this machine: the time of a trade
    lies a little before. `until` None: it goes on. `instance` is the one that missed them; another may have them.
    """

    product: str
    codes: tuple[str, ...]
    since: int
    until: int | None
    why: str
    instance: str = ""
    key: str = ""
    create_time: str = ""

    def document(self) -> Document:
        """Return its document in MongoDB."""
        return {
            "_id": self.key,
            "instance": self.instance,
            "product": self.product,
            "codes": [*self.codes],
            "from": self.since,
            "to": self.until,
            "why": self.why,
            "create_time": datetime.fromisoformat(self.create_time),
        }


# What the kinds of their reasons begin with.
GAP_REASONS = (
    "stores.gap_deaf",
    "stores.gap_ended",
    "stores.gap_moved",
    "stores.gap_stopped",
    "stream.",
    "websocket.",
    "http.",
    "tools.because",
    "tools.see",
)


def gap_reason(text: str) -> str:
    """Return why a gap is, of the text that is stored: in all languages as far as it is ours."""
    return stored_words(text, GAP_REASONS)


class Gaps:
    """When the stream did not bring every trade: in the local file first, and in MongoDB as soon as it takes them.

    Any thread may call it. Raises StoreError.
    """

    def __init__(self, file: LocalFile, mongo: MongoStore | None) -> None:
        self._file = file
        self._mongo = mongo

    def note(self, gap: Gap) -> Gap:
        """Note a new gap, and return it with its `_id`. Of two that begin in one moment one begins a little before."""
        insert = (
            'INSERT INTO stream_gaps (product, codes, "from", "to", why, instance, _id, create_time) '
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"
        )
        gap = gap._replace(create_time=iso(utc_now()))
        with self._file.write() as db:
            while True:
                gap = gap._replace(key=f"{gap.instance}|{gap.product}|{gap.since}")
                if db.execute(insert, (gap.product, json.dumps(gap.codes), *gap[2:])).rowcount:
                    return gap
                gap = gap._replace(since=gap.since - 1)

    def change(self, gap: Gap) -> None:
        """Keep what a gap has become: its codes, its end, why it is."""
        update = 'UPDATE stream_gaps SET codes = ?, "to" = ?, why = ?, delivered = 0 WHERE _id = ?'
        with self._file.write() as db:
            db.execute(update, (json.dumps(gap.codes), gap.until, gap.why, gap.key))

    def open(self) -> list[Gap]:
        """Return those that go on."""
        return self.some('"to" IS NULL')

    def count_since(self, moment: str) -> int:
        """Return how many were noted since a time (ISO 8601 UTC)."""
        return int(self._file.read_one("SELECT count(*) FROM stream_gaps WHERE create_time >= ?", moment)[0])

    def deliver(self) -> bool:
        """Bring some that are new or have changed to MongoDB, if there is one; return whether there were any."""
        if self._mongo is None:
            return False
        gaps = self.some(f"NOT delivered LIMIT {GAPS_AT_ONCE}")
        if not gaps:
            return False
        self._mongo.write_gaps([gap.document() for gap in gaps])
        mark = 'UPDATE stream_gaps SET delivered = 1 WHERE _id = ? AND codes = ? AND "to" IS ? AND why = ?'
        forget = 'DELETE FROM stream_gaps WHERE delivered AND "to" < ?'
        with self._file.write() as db:
            db.executemany(mark, [(gap.key, json.dumps(gap.codes), gap.until, gap.why) for gap in gaps])
            db.execute(forget, ((time.time() - GAPS_KEPT_S) * 1000,))
        return True

    def some(self, which: str, *values: object) -> list[Gap]:
        """Return those of this machine for which a condition of SQL holds."""
        names = 'product, codes, "from", "to", why, instance, _id, create_time'
        rows = self._file.read_all(f"SELECT {names} FROM stream_gaps WHERE {which}", *values)  # noqa: S608
        return [Gap(*row)._replace(codes=tuple(json.loads(row[1]))) for row in rows]


# ======================================================================================================
# Reading: what the views read from both stores
# ======================================================================================================
#
# Times are epoch milliseconds, spans are half open (since <= t < until), numbers exact decimal texts whatever type
# MONGODB_NUMERIC_TYPE gave them. An `_id` begins with code and time: the order of `_id`, of which each store has an
# index, is that of codes and, of each code, that of times, as long as those have as many digits.

# Trades that are read at once: 2 MB. More take longer, each, as they leave the caches of the processor.
TRADES_READ = 2_000
# A close from before so many days is none that a change could be told against.
REFERENCE_DAYS = 31
# Codes of one question about closes or candles.
CODES_ASKED = 50
# Spans in which all times of trades have as many digits.
EQUALLY_LONG_MS = ((EARLIEST_TRADE_MS, 10**12), (10**12, 10**13))
# What no code has, nor an `_id`: it comes behind them.
BEHIND = "~"


class StoredTrade(NamedTuple):
    """A document of `realtime`, its fields in their order; `create_time` as ISO 8601 UTC."""

    id: str
    s: str
    t: int
    p: str
    v: str
    vw: str
    td: int
    stock_code: str
    create_time: str


class Candle(NamedTuple):
    """What the trades of a span come to; `t` is its beginning, `trades` how many there are."""

    t: int
    open: str
    high: str
    low: str
    close: str
    volume: str
    trades: int


class StoredClose(NamedTuple):
    """A document of `close`. `p` is the close; what only a final one has is '' in another."""

    code: str
    date: str
    t: int
    p: str
    is_final: bool
    after_hours: bool
    open: str
    high: str
    low: str
    volume: str
    turnover: str


def number_text(value: object) -> str:
    """Return a stored number as a decimal text: a text as it stands, of other types all digits that they have."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return _without_zeros(_without_exponent(repr(value)))
    return _without_exponent(str(value))


def _without_exponent(text: str) -> str:
    """Return a decimal text in which digits stand for themselves."""
    from decimal import Decimal

    return format(Decimal(text), "f") if "e" in text.lower() else text


def _without_zeros(text: str) -> str:
    """Return a decimal text without zeros behind its decimals."""
    return text.rstrip("0").rstrip(".") if "." in text else text


def with_decimals_of(price: str, text: str) -> str:
    """Return a price with at least as many decimals as another one has."""
    missing = len(price.partition(".")[2]) - len(text.partition(".")[2])
    if missing <= 0 or not set(price + text) <= set("-.0123456789"):
        return text
    return text + "." * ("." not in text) + "0" * missing


def _spans_of(code: str, since: int, until: int) -> Iterator[tuple[str, str]]:
    """Yield spans in which all `_id` are of the trades of a code in a span of time; their ends are no `_id`."""
    for first, behind in EQUALLY_LONG_MS:
        low, high = max(since, first), min(until, behind)
        if low < high:
            yield f"{code}|{low}", f"{code}|{high - 1}{BEHIND}"


def _dates_before(day: str) -> list[str]:
    """Return the REFERENCE_DAYS dates before one."""
    last = date.fromisoformat(day)
    return [(last - timedelta(days=days)).isoformat() for days in range(1, REFERENCE_DAYS + 1)]


def _newest_finals(found: Iterable[StoredClose]) -> dict[str, StoredClose]:
    return {close.code: close for close in sorted(found) if close.is_final}


def _by_code(closes: Iterable[StoredClose]) -> dict[str, list[StoredClose]]:
    found: dict[str, list[StoredClose]] = {}
    for close in sorted(closes):
        found.setdefault(close.code, []).append(close)
    return found


class _FileReader:
    """What the views read from the local file whichever the store is; it writes nothing."""

    def __init__(self, file: LocalFile) -> None:
        self._file = file

    def names(self, codes: Collection[str], english: bool = False) -> dict[str, str]:
        """Return the names of codes, as far as the API's lists are on this machine. Raises StoreError."""
        return symbol_names(self._file, codes, english)

    def gaps(self, codes: Collection[str], since: int, until: int) -> list[Gap]:
        """Return the gaps that are noted in the local file. Raises StoreError."""
        which = '"from" < ? AND ifnull("to", ?) > ? ORDER BY "from"'
        return _touching(Gaps(self._file, None).some(which, until, NEVER, since), codes)


def _touching(gaps: Iterable[Gap], codes: Collection[str]) -> list[Gap]:
    wanted = set(codes)
    return [gap for gap in gaps if not wanted.isdisjoint(gap.codes)]


# Text columns hold what the API sent; a sum of volumes is exact to nine decimals.
_SQLITE_CANDLES = """
WITH found AS (
    SELECT (t - ?2) / ?4 AS step, min(t) AS first, max(t) AS last,
           max(CAST(p AS REAL)) AS high, min(CAST(p AS REAL)) AS low,
           sum(CAST(volume AS INTEGER)) AS whole,
           sum(CAST(round((volume - CAST(volume AS INTEGER)) * 1e9) AS INTEGER)) AS billionths,
           total(CASE WHEN volume IS NULL THEN CAST(v AS REAL) END) AS huge,
           count(*) AS trades
    FROM (SELECT *, CASE WHEN CAST(v AS REAL) < 1e15 THEN CAST(v AS REAL) END AS volume FROM realtime)
    WHERE stock_code = ?1 AND t >= ?2 AND t < ?3 AND demo IS ?5 GROUP BY step
)
SELECT ?2 + step * ?4,
    (SELECT p FROM realtime WHERE stock_code = ?1 AND t = first AND demo IS ?5 ORDER BY _id LIMIT 1),
    high, low,
    (SELECT p FROM realtime WHERE stock_code = ?1 AND t = last AND demo IS ?5 ORDER BY _id DESC LIMIT 1),
    whole, billionths, huge, trades
FROM found ORDER BY step
"""
# Each code of the index in its turn, not each trade.
_SQLITE_CODES = """
WITH RECURSIVE every(code) AS (
    SELECT min(stock_code) FROM realtime
    UNION ALL
    SELECT (SELECT min(stock_code) FROM realtime WHERE stock_code > code) FROM every WHERE code IS NOT NULL
)
SELECT code, (SELECT t FROM realtime WHERE stock_code = code AND demo IS ? ORDER BY t DESC LIMIT 1) AS newest
FROM every WHERE newest IS NOT NULL
"""
_TRADE_COLUMNS = ", ".join(DOCUMENT_FIELDS)
_CLOSE_COLUMNS = "stock_code, date, t, p, close IS NOT NULL, after_hours, open, high, low, volume, turnover"


class SqliteReader(_FileReader):
    """Reads the embedded store: its synthetic trades alone (`demo`), or the others alone."""

    def __init__(self, file: LocalFile, demo: bool = False) -> None:
        super().__init__(file)
        self._demo = 1 if demo else None

    def codes(self) -> list[str]:
        """Return every code of which there is a trade, sorted. Raises StoreError."""
        return sorted(code for code, _ in self._file.read_all(_SQLITE_CODES, self._demo))

    def close_codes(self) -> list[str]:
        """Return every code of which there is a close, sorted. Raises StoreError."""
        query = "SELECT DISTINCT stock_code FROM close ORDER BY stock_code"
        return [code for (code,) in self._file.read_all(query)]

    def estimate(self) -> int:
        """Return about how many trades there are. Raises StoreError."""
        first, last = self._file.read_one(
            "SELECT (SELECT min(seq) FROM realtime), (SELECT max(seq) FROM realtime)"
        )
        return 0 if last is None else int(last - first + 1)

    def newest_codes(self, limit: int) -> list[str]:
        """Return the codes that traded last, the latest first. Raises StoreError."""
        query = f"{_SQLITE_CODES} ORDER BY newest DESC, code LIMIT ?"
        return [code for code, _ in self._file.read_all(query, self._demo, limit)]

    def last(self, codes: Collection[str]) -> dict[str, StoredTrade]:
        """Return the latest trade of each code; one without any is missing. Raises StoreError."""
        query = (
            f"SELECT {_TRADE_COLUMNS} FROM realtime WHERE stock_code = ? AND demo IS ? "  # noqa: S608
            "ORDER BY t DESC, _id DESC LIMIT 1"
        )
        rows = [self._file.read_one(query, code, self._demo) for code in codes]
        return {row[-2]: StoredTrade(*row) for row in rows if row}

    def trades(self, codes: Collection[str] | None, since: int, until: int) -> Iterator[list[StoredTrade]]:
        """Yield trades of codes (None: of all), some thousand at once, in the order of `_id`. Raises StoreError."""
        if codes is None and since <= 0 and until >= NEVER:
            yield from self._between("", BEHIND)
            return
        for code in sorted(self.codes() if codes is None else set(codes), key="{}|".format):
            for low, high in _spans_of(code, since, until):
                yield from self._between(low, high)

    def _between(self, after: str, until: str) -> Iterator[list[StoredTrade]]:
        query = (
            f"SELECT {_TRADE_COLUMNS} FROM realtime WHERE _id > ? AND _id < ? AND demo IS ? "  # noqa: S608
            f"ORDER BY _id LIMIT {TRADES_READ}"
        )
        while True:
            rows = self._file.read_all(query, after, until, self._demo)
            if rows:
                yield [*map(StoredTrade._make, rows)]
            if len(rows) < TRADES_READ:
                return
            after = rows[-1][0]

    def candles(
        self, codes: Collection[str], since: int, until: int, step_ms: int
    ) -> dict[str, list[Candle]]:
        """Return what was traded in each step from `since` on; steps and codes without any are missing.

        Raises StoreError.
        """
        found = {}
        for code in codes:
            rows = self._file.read_all(_SQLITE_CANDLES, code, since, until, step_ms, self._demo)
            if rows:
                found[code] = [*map(_sqlite_candle, rows)]
        return found

    def closes(self, codes: Collection[str], first: str, last: str) -> dict[str, list[StoredClose]]:
        """Return the closes, provisional ones too, between two ISO dates, both included, by date. Raises StoreError."""
        query = f"SELECT {_CLOSE_COLUMNS} FROM close WHERE _id BETWEEN ? AND ?"  # noqa: S608
        spans = [(f"{code}|{first}", f"{code}|{last}") for code in codes]
        return _by_code(_sqlite_close(row) for span in spans for row in self._file.read_all(query, *span))

    def last_finals(self, before: Mapping[str, str]) -> dict[str, StoredClose]:
        """Return the newest final close of each code before a date, REFERENCE_DAYS back at most. Raises StoreError."""
        keys = [f"{code}|{day}" for code, until in before.items() for day in _dates_before(until)]
        query = f"SELECT {_CLOSE_COLUMNS} FROM close WHERE _id IN (SELECT value FROM json_each(?))"  # noqa: S608
        return _newest_finals(map(_sqlite_close, self._file.read_all(query, json.dumps(keys))))


def _sqlite_candle(row: Sequence[Any]) -> Candle:
    t, opened, high, low, close, whole, billionths, huge, trades = row
    more, rest = divmod(billionths or 0, 10**9)
    volume = _without_zeros(f"{(whole or 0) + more + int(huge)}.{rest:09d}")
    highest, lowest = (with_decimals_of(opened, number_text(number)) for number in (high, low))
    return Candle(t, opened, highest, lowest, close, volume, trades)


def _sqlite_close(row: Sequence[Any]) -> StoredClose:
    code, day, t, p, is_final, after_hours, *bar = row
    return StoredClose(code, day, t, p, bool(is_final), bool(after_hours), *(text or "" for text in bar))


class MongoReader(_FileReader):
    """Reads MongoDB, names and what else is on this machine from the local file.

    What another program has put into the collections and is no trade is passed over.
    """

    def __init__(self, store: MongoStore, file: LocalFile) -> None:
        super().__init__(file)
        self._store = store

    def codes(self) -> list[str]:
        """Return every code of which there is a trade, sorted. Raises StoreError."""
        return sorted(code for code, _ in self._newest({}))

    def close_codes(self) -> list[str]:
        """Return every code of which there is a close, sorted. Raises StoreError."""
        pipeline = [{"$group": {"_id": "$stock_code"}}]
        with self._store.asking():
            found = list(
                self._store.collection(self._store.close_name).aggregate(pipeline, allowDiskUse=True)
            )
        return sorted(one["_id"] for one in found if isinstance(one["_id"], str) and one["_id"].isprintable())

    def estimate(self) -> int:
        """Return about how many trades there are. Raises StoreError."""
        return self._store.estimate(self._store.realtime_name)

    def newest_codes(self, limit: int) -> list[str]:
        """Return the codes that traded last, the latest first. Raises StoreError."""
        found = sorted((-t, code) for code, t in self._newest({}))
        return [code for _, code in found[:limit]]

    def last(self, codes: Collection[str]) -> dict[str, StoredTrade]:
        """Return the latest trade of each code. Raises StoreError."""
        moments = [{"stock_code": code, "t": t} for code, t in self._newest({"$in": [*codes]})]
        found: dict[str, StoredTrade] = {}
        for part in parts_of(moments, CODES_ASKED):
            found |= {one.s: one for one in sorted(_stored_trades(self._store.at_moments(part)))}
        for moment in moments:
            code = moment["stock_code"]
            if code not in found:  # what another program has put there is the latest
                found |= {one.s: one for one in self._last_by_id(str(code))}
        return found

    def _last_by_id(self, code: str) -> list[StoredTrade]:
        wanted = {
            "_id": {"$gt": f"{code}|", "$lt": f"{code}|{BEHIND}"},
            "stock_code": code,
            **_WITH_NUMBERS,
        }
        with self._store.asking():
            return _stored_trades(list(self._store.collection().find(wanted).sort("_id", -1).limit(1)))

    def _newest(self, wanted: Mapping[str, object]) -> list[tuple[str, int]]:
        """Return codes with the time of their latest trade: the index gives one of each without reading the others."""
        pipeline: list[dict[str, Any]] = [
            {
                "$match": {
                    "stock_code": wanted or {"$gt": ""},
                    "t": {"$gte": EARLIEST_TRADE_MS, "$lt": LATEST_TRADE_MS},
                }
            },
            {"$sort": dict(INDEX)},
            {"$group": {"_id": "$stock_code", "t": {"$first": "$t"}}},
        ]
        with self._store.asking():
            found = self._store.collection().aggregate(pipeline, allowDiskUse=True)
            return [(one["_id"], int(one["t"])) for one in found if one["_id"].isprintable()]

    def trades(self, codes: Collection[str] | None, since: int, until: int) -> Iterator[list[StoredTrade]]:
        """Yield trades, some thousand at once, in the order of `_id`. Raises StoreError."""
        from concurrent.futures import ThreadPoolExecutor

        from bson import decode_all
        from bson.codec_options import CodecOptions, DatetimeConversion

        options: CodecOptions[Document] = CodecOptions(
            unicode_decode_error_handler="replace", datetime_conversion=DatetimeConversion.DATETIME_AUTO
        )
        batches = self._batches(codes, since, until)
        ahead = ThreadPoolExecutor(1, "stockrt-read")  # the server is not idle while a batch is made use of
        try:
            coming = ahead.submit(next, batches, None)
            while True:
                with self._store.asking():
                    batch = coming.result()
                if batch is None:
                    return
                coming = ahead.submit(next, batches, None)
                trades = _stored_trades(decode_all(batch, options))
                if trades:
                    yield trades
        finally:
            ahead.shutdown(wait=False)

    def _batches(self, codes: Collection[str] | None, since: int, until: int) -> Iterator[bytes]:
        """Yield documents as the server sends them. Raises PyMongoError."""
        spans: Iterable[tuple[str, str]] = [("", BEHIND)]
        if codes is not None or since > 0 or until < NEVER:
            every = sorted(self.codes() if codes is None else set(codes), key="{}|".format)
            spans = (span for code in every for span in _spans_of(code, since, until))
        for low, high in spans:
            wanted = {"_id": {"$gt": low, "$lt": high}}
            cursor = self._store.collection().find_raw_batches(
                wanted, batch_size=TRADES_READ, sort=[("_id", 1)]
            )
            yield from cast(Iterable[bytes], cursor)

    def candles(
        self, codes: Collection[str], since: int, until: int, step_ms: int
    ) -> dict[str, list[Candle]]:
        """Return what was traded in each step. Raises StoreError."""
        found: dict[str, list[Candle]] = {}
        for part in parts_of([*codes], CODES_ASKED):
            pipeline = _mongo_candles(part, since, until, step_ms)
            with self._store.asking():
                for one in self._store.collection().aggregate(pipeline, allowDiskUse=True):
                    found.setdefault(one["_id"]["code"], []).append(_mongo_candle(one))
        return {code: sorted(candles) for code, candles in found.items()}

    def closes(self, codes: Collection[str], first: str, last: str) -> dict[str, list[StoredClose]]:
        """Return the closes between two dates, both included. Raises StoreError."""
        found: list[StoredClose] = []
        for part in parts_of([*codes], CODES_ASKED):
            spans = [{"_id": {"$gte": f"{code}|{first}", "$lte": f"{code}|{last}"}} for code in part]
            found += self._closes({"$or": spans})
        return _by_code(found)

    def last_finals(self, before: Mapping[str, str]) -> dict[str, StoredClose]:
        """Return the newest final close of each code before a date. Raises StoreError."""
        found: list[StoredClose] = []
        for part in parts_of([*before], CODES_ASKED):
            keys = [f"{code}|{day}" for code in part for day in _dates_before(before[code])]
            found += self._closes({"_id": {"$in": keys}, "close": {"$ne": None}})
        return _newest_finals(found)

    def _closes(self, wanted: Mapping[str, object]) -> list[StoredClose]:
        with self._store.asking():
            found = self._store.collection(self._store.close_name).find(wanted)
            return [*filter(None, map(_mongo_close, found))]

    def gaps(self, codes: Collection[str], since: int, until: int) -> list[Gap]:
        """Return the gaps that MongoDB has, and those of this machine that it has not yet. Raises StoreError."""
        wanted = {"from": {"$lt": until}, "$or": [{"to": None}, {"to": {"$gt": since}}]}
        with self._store.asking():
            documents = list(self._store.collection(self._store.gap_name).find(wanted))
        there = [*filter(None, map(_mongo_gap, documents))]
        # of one that both have this machine knows best how it stands
        every = [*_touching(there, codes), *super().gaps(codes, since, until)]
        found = {gap[:3]: gap for gap in every}
        return sorted(found.values(), key=lambda gap: gap.since)


Reader: TypeAlias = SqliteReader | MongoReader


def _mongo_gap(document: Document) -> Gap | None:
    """Return a document of the gaps, None where another program has put it there."""
    product, codes, since, until, why = (
        document.get(name) for name in ("product", "codes", "from", "to", "why")
    )
    if not (isinstance(codes, list) and isinstance(since, int) and isinstance(until, int | None)):
        return None
    return Gap(str(product), tuple(map(str, codes)), since, until, str(why))


# As is_trade: numbers that are a double as well, of any type, or such texts.
_MOST = sys.float_info.max
_NUMBER_FORMS = [{"$gte": -_MOST, "$lte": _MOST}, {"$regex": f"^(?:{DECIMAL.pattern})$"}]
_WITH_NUMBERS: Mapping[str, Any] = {
    "$and": [{"$or": [{name: one} for one in _NUMBER_FORMS]} for name in ("p", "v", "vw")],
    "t": {"$type": ["int", "long"], "$gte": EARLIEST_TRADE_MS, "$lt": LATEST_TRADE_MS},
    "td": {"$type": ["int", "long"]},
}
_trade_fields: itemgetter[Any] = itemgetter(*DOCUMENT_FIELDS)


def _stored_trades(documents: Sequence[Document]) -> list[StoredTrade]:
    """Return those documents that are trades; where all have texts as numbers, which is the rule, in few steps."""
    from bson.int64 import Int64

    with contextlib.suppress(KeyError):
        fields = [*map(_trade_fields, documents)]
        columns = [*zip(*fields, strict=True)] or [()] * len(StoredTrade._fields)
        ids, s, t, p, v, vw, td, codes, _ = columns
        plain = (
            {*map(type, chain(ids, s, p, v, vw))} == {str}
            and {*map(type, chain(t, td))} <= {int, Int64}
            and EARLIEST_TRADE_MS <= min(t) <= max(t) < LATEST_TRADE_MS
            and s == codes
            and "".join(s).isprintable()
            and are_plain_decimals((*p, *v, *vw))
            and all(map(str.startswith, ids, map("{}|{}|".format, s, t)))
        )
        if plain:
            times = {moment: _iso_text(moment) for moment in {*columns[-1]}}
            texts = map(times.__getitem__, columns[-1])
            return [*map(StoredTrade._make, zip(*columns[:-1], texts, strict=True))]
    trades = []
    for document in filter(is_trade, documents):
        *fields, created = map(document.get, DOCUMENT_FIELDS)
        for number in (3, 4, 5):
            fields[number] = number_text(fields[number])
        trades.append(StoredTrade._make((*fields, _iso_text(created))))
    return trades


def _iso_text(moment: object) -> str:
    """Return a BSON date as ISO 8601 UTC, and what is none, or far from our time, as a text."""
    if not isinstance(moment, datetime):
        return "" if moment is None else one_line(moment)
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return iso(moment)


def _mongo_candles(codes: Sequence[str], since: int, until: int, step_ms: int) -> list[dict[str, Any]]:
    """Return the aggregation that makes candles; the order of `_id` says what came first."""

    # a double as a decimal would have 15 digits, and zeros for those that it has not
    price = {"$cond": [{"$isNumber": "$p"}, "$p", {"$toDecimal": "$p"}]}

    spans = [span for code in codes for span in _spans_of(code, since, until)]
    into_it = {"$mod": [{"$subtract": ["$t", since]}, step_ms]}
    return [
        {"$match": {"$or": [{"_id": {"$gt": low, "$lt": high}} for low, high in spans]}},
        {"$match": _WITH_NUMBERS},
        {"$sort": {"_id": 1}},
        {
            "$group": {
                "_id": {"code": "$stock_code", "t": {"$subtract": ["$t", into_it]}},
                "open": {"$first": "$p"},
                "high": {"$max": price},
                "low": {"$min": price},
                "close": {"$last": "$p"},
                "volume": {"$sum": {"$toDecimal": "$v"}},
                "trades": {"$sum": 1},
            }
        },
    ]


def _mongo_candle(one: Document) -> Candle:
    first, high, low, last = (number_text(one[name]) for name in ("open", "high", "low", "close"))
    volume = _without_zeros(number_text(one["volume"]))
    return Candle(int(one["_id"]["t"]), first, high, low, last, volume, one["trades"])


def _mongo_close(document: Document) -> StoredClose | None:
    """Return a document of the closes, None where another program has put it there."""
    code, day, t, p = map(document.get, ("stock_code", "date", "t", "p"))
    numbers = [document.get(name) for name in ("open", "high", "low", "volume", "turnover")]
    known = [p, *(number for number in numbers if number is not None)]
    if document["_id"] != f"{code}|{day}" or not (isinstance(t, int) and all(map(is_number, known))):
        return None
    bar = ["" if number is None else number_text(number) for number in numbers]
    is_final, after_hours = document.get("close") is not None, bool(document.get("after_hours"))
    return StoredClose(str(code), str(day), t, number_text(p), is_final, after_hours, *bar)


# ======================================================================================================
# Run: codes in, report out
# ======================================================================================================

# MongoDB takes batches of a thousand a third faster than batches of a hundred; bounded, so that memory is.
WRITE_BATCH = 1000
# A commit to this disk costs as much for a thousand trades of many codes as for these: the same pages are written.
COMMIT_BATCH = 5000
# What was fetched is on its way to the store after this time at the latest.
WRITE_AFTER_S = 0.5


# What --once gives to KEEP_DAYS at its end.
KEEP_ONCE_S = 2.0
# A trade no older than this is stale at no market.
FRESH_MS = 3_600_000


class Keeper:
    """What follows where documents were written: listeners are told, closes are made.

    The same for trades that were asked for and for those that were pushed. Any thread may call it.
    """

    def __init__(self, closing: ClosingPrices | Delivery | None = None, events: Events = NO_EVENTS) -> None:
        self._closing = closing
        self._events = events
        self._trouble = LogThrottle("closing snapshot", then="the trades are stored all the same")

    def follow(self, written: WriteReport, documents: Sequence[Document], stop: threading.Event) -> str:
        """Tell of documents that a store has, and make their closes; return why those cannot be made, '' if they can.

        That is said, too. The closes of what is queued are made when it arrives.
        """
        self._events.stored(documents)
        if written.queued:
            return ""
        try:
            if self._closing is not None:
                self._closing.settle(documents, stop)
        except Exception as error:  # the trades are stored, and that is what counts
            words = fault_words(error, self._events, is_said=self._trouble.there)
            self._trouble.again(words)
            return words
        self._trouble.over()
        return ""


def taken_of(documents: Sequence[Document], written: WriteReport) -> Sequence[Document]:
    """Return those of the documents that a store has not refused."""
    if not written.refused:
        return documents
    return [document for document in documents if document["_id"] not in written.refused]


class Collector:
    """One run: fetches, checks, stores, counts. `run` is called once.

    Memory stays bounded whatever the number of codes: documents are handed on and forgotten batch by batch.
    """

    def __init__(
        self,
        source: Source,
        store: Store,
        keeper: Keeper,
        events: Events = NO_EVENTS,
        *,
        demo: bool = False,
        report: Report | None = None,
        finder: Directory | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._source = source
        self._store = store
        self._events = events
        self._demo = demo
        self._clock = clock
        self._keeper = keeper
        self._unwritten: list[Document] = []
        self._unwritten_since = 0.0
        self._finder = finder
        self._plan = self._next_plan = BatchPlan(0)
        self._unknown: list[tuple[Instrument, str]] = []  # and as what each was asked
        self._tried: dict[str, list[str]] = {}  # as it was asked -> the codes that turned out to be unknown
        self._done = 0
        self._stop = threading.Event()
        self.report = report or Report()

    def run(self, codes: Iterable[object], stop: threading.Event) -> Report:
        """Collect the latest trades of `codes` and return the report.

        `stop` ends the run early: what was fetched is stored, the rest is not asked.
        """
        started = self._clock.monotonic()
        self._stop = stop
        plan = plan_batches(codes)
        self.report.total = plan.total
        for code, why in plan.invalid.items():
            if self._finder is None or code not in plan.unclear:
                self._fail([code], why, FailureKind.INVALID_CODE)
        first = plan
        while plan.batches or plan is first:
            self._plan, self._next_plan = plan, BatchPlan(plan.total)
            self._collect(plan.batches, stop)
            if plan is first and self._finder is not None:  # plain codes wait for no list
                self._look_up(plan, self._finder)
            plan = self._next_plan
            plan.finish()
        if self._finder is not None:
            self._explain(self._finder)
        self.report.interrupted = stop.is_set()
        self.report.took_s = self._clock.monotonic() - started
        return self.report

    def _collect(self, batches: Iterable[Batch], stop: threading.Event) -> None:
        for outcome in self._source.fetch(self._while_sound(batches), stop):
            self._tell()
            if outcome is not None:
                self._take(outcome)
            if self._unwritten and (outcome is None or self._write_is_due()):
                self._write()
        if self._unwritten:
            self._write()
        self._tell()

    def _while_sound(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Pass batches on until the store has failed: what cannot be stored is not fetched."""
        for batch in batches:
            if self.report.store_error:
                self._fail(batch.split(), phrase("run.not_asked_for", why=self.report.store_error))
            else:
                yield batch

    def _take(self, outcome: Outcome) -> None:
        if not self._unwritten:
            self._unwritten_since = self._clock.monotonic()
        created = utc_now().replace(tzinfo=None)
        self._unwritten += [to_document(trade, created, self._demo) for trade in outcome.trades]
        for code, failure in outcome.failures.items():
            self._fail([code], failure.words, failure.kind)
        for code in outcome.unknown:
            self._ask_next(Instrument(code, outcome.batch.product))

    def _ask_next(self, unknown: Instrument) -> None:
        """Plan what else an unknown instrument may be; where nothing is left it has failed."""
        code, product, _ = unknown
        others = self._plan.alternatives.get(code, ())
        if not others and product != FALLBACK_PRODUCT:
            others = (Instrument(code, FALLBACK_PRODUCT),)
        asked = self._asked(code)
        if not others:
            self._unknown.append((unknown, asked))
            self._fail([code], phrase("infoway.unknown"), FailureKind.UNKNOWN_CODE)
            return
        if others[0].code != code:
            self._tried.setdefault(asked, []).append(code)
        self._next_plan.add_instrument(others[0]._replace(alternatives=others[1:]), asked, unsure=True)

    def _look_up(self, plan: BatchPlan, finder: Directory) -> None:
        """Have looked up what the forms of some codes do not tell; what is found is asked next."""
        for shown, found, why in looked_up(plan, finder, self._stop):
            if found is None:
                self._fail([shown], why, FailureKind.INVALID_CODE)
            else:
                self._next_plan.add_instrument(found, shown, unsure=True)

    def _explain(self, finder: Directory) -> None:
        """Say of unknown codes what the lists know better."""
        for unknown, asked in self._unknown[:NAMES_LISTED]:
            if self._stop.is_set():
                return
            better = finder.explain(unknown, self._stop)
            if better:
                words = self._with_codes(better, asked, unknown.code)
                self.report.failures[asked] = Failure(FailureKind.UNKNOWN_CODE, words)

    def _asked(self, code: str) -> str:
        """Return how a code of this round was asked for."""
        return self._plan.asked_as.get(code, code)

    def _fail(self, codes: Collection[str], words: str, kind: FailureKind = FailureKind.STORE) -> None:
        self._done += len(codes)
        if not self._plan.asked_as:
            self.report.failures.update(dict.fromkeys(codes, Failure(kind, words)))
            return
        for code in codes:
            asked = self._asked(code)
            self.report.failures[asked] = Failure(kind, self._with_codes(words, asked, code))

    def _with_codes(self, words: str, asked: str, code: str) -> str:
        """Return why a code failed, and as which codes it was asked for where it was typed in another form."""
        if asked == code:
            return words
        codes = listing("join.names", [*self._tried.get(asked, ()), code])
        return phrase("run.asked_as", words=words, asked=asked, codes=codes)

    def _tell(self) -> None:
        self._events.progress(self._done, self.report.total, len(self._unwritten))

    def _write_is_due(self) -> bool:
        waited = self._clock.monotonic() - self._unwritten_since
        return len(self._unwritten) >= WRITE_BATCH or waited >= WRITE_AFTER_S

    def _write(self) -> None:
        documents, self._unwritten = self._unwritten, []
        try:
            if self.report.store_error:  # not tried again in this run: each try may take its whole time limit
                raise StoreError(self.report.store_error)
            written = self._store.write(documents)
        except StoreError as error:
            self.report.store_error = error.message
            words = phrase("run.not_stored", why=error.message)
            self._fail([document["stock_code"] for document in documents], words)
            return
        self._done += len(documents) - len(written.refused)
        taken = taken_of(documents, written)
        if written.refused:
            for document in documents:
                if document["_id"] in written.refused:
                    self._fail([document["stock_code"]], written.refused[document["_id"]])
        if self._plan.guessed:
            self._note_read_as(taken)
        self._note_stale(taken)
        self._count(written, taken)

    def _note_stale(self, documents: Sequence[Document]) -> None:
        now = int(self._clock.wall() * 1000)
        for document in documents:
            code, t = document["stock_code"], document["t"]
            if now - t > FRESH_MS and is_stale(code, t, now):
                self.report.stale += 1
                self.report.stale_since = max(self.report.stale_since, t)

    def _note_read_as(self, documents: Sequence[Document]) -> None:
        for document in documents:
            code = document["stock_code"]
            if code in self._plan.guessed and len(self.report.read_as) < NAMES_LISTED:
                self.report.read_as[self._asked(code)] = code

    def _count(self, written: WriteReport, documents: Sequence[Document]) -> None:
        """Count what a write did, and let follow what does."""
        if written.queued:
            self.report.queued += written.queued
            self.report.queued_because = written.queued_because
        else:
            self.report.stored += written.stored
            self.report.duplicates += written.duplicates
        close_error = self._keeper.follow(written, documents, self._stop)
        self.report.close_error = close_error or self.report.close_error


def looked_up(
    plan: BatchPlan, finder: Directory, stop: threading.Event
) -> Iterator[tuple[str, Instrument | None, str]]:
    """Yield of each code whose form does not tell what it means what the lists know it as, or why nothing."""
    for shown, unclear in plan.unclear.items():
        found, why = None, plan.invalid[shown]
        if not stop.is_set():
            try:
                found = finder.find(unclear, stop)
            except InstrumentError as error:
                why = error.message
        yield shown, found, why


def store_name(settings: Settings) -> str:
    """Return what the store is called in messages."""
    return "MongoDB" if settings.mongodb_uri else phrase("run.local_store")


def check_key(settings: Settings, api: InfowayApi | None, key: ApiKey) -> list[Check]:
    """Ask the API for one trade with a key, and say what holds; also of this machine's clock where it is off.

    With `api` each request waits for its turn among those of all who use the key: a service may be one.
    """
    path = path_of(Batch("stock", "AAPL.US"))
    try:
        response = _ask_with(settings, api, key, path, "stock", API_LIMITS)
    except StockrtError as error:
        return [Check(phrase("run.api_key", key=key.shown), False, error.message)]
    found = [_check_of(api, key, decide(response, datetime.now(UTC)), settings)]
    fault = clock_fault(response, time.time())
    if fault:
        found.append(Check(phrase("run.clock"), False, fault))
    return found


def _ask_with(
    settings: Settings, api: InfowayApi | None, key: ApiKey, path: str, product: str, limits: Limits
) -> Response:
    if api is None:
        headers = {"apiKey": key.secret}
        return get_once(settings.api_base_url, path, limits, settings.proxies, headers)
    return api.ask_once(path, product, limits, threading.Event(), key)[1]


def _check_of(api: InfowayApi | None, key: ApiKey, verdict: Verdict, settings: Settings) -> Check:
    """Return what an answer says of the key that was used for it, and what its plan is."""
    name = phrase("run.api_key", key=key.shown)
    place = settings.api_base_url
    if verdict.action in (Action.ACCEPT, Action.CODES_UNKNOWN):
        good = phrase("run.accepted", place=place)
    elif verdict.action is Action.KEY_LACKS_PRODUCT:
        # it may serve others: a plan of crypto alone is a good one
        good = phrase("run.accepted_without_stocks", place=place, why=verdict.failure.words)
    else:
        words = see(verdict.failure.words, verdict.setting or "INFOWAY_API_BASE_URL")
        if verdict.action is Action.KEY_DEAD:
            key.dead = words  # it is asked for nothing more
        return Check(name, False, words)
    return Check(name, True, listing("join.clauses", [good, *_plan_words(settings, api, key)]))


def _plan_words(settings: Settings, api: InfowayApi | None, key: ApiKey) -> list[str]:
    """Ask the API for a key's plan, and say what it is and where that differs from what is set, in clauses."""
    try:
        answer = _ask_with(settings, api, key, PACKAGE_PATH, "", PLAN_LIMITS)
    except StockrtError as error:
        return [phrase("run.no_plan", why=error.message)]
    envelope, verdict = judge(answer)
    info = read_package(envelope)
    if info is None:
        why = verdict.failure.words or phrase("run.names_no_plan")
        return [phrase("run.no_plan_but_free" if key.plan is PLAN_TO_ASK else "run.no_plan", why=why)]
    told = info.plan()
    ends = info.end_words(time.time())
    words: list[str] = [phrase("run.plan", limits=_limits_words(told))]
    if ends:
        words.append(ends)
    elif info.ends:
        words = [phrase("run.plan_until", limits=_limits_words(told), until=iso_after(info.ends, 0))]
    if key.plan is not PLAN_TO_ASK and key.plan.windows() != told.windows():
        is_set = dict(settings.key_plans())[key.secret] is key.plan
        kind = "run.other_plan" if is_set else "run.plan_before"
        words.append(phrase(kind, limits=_limits_words(key.plan)))
    return words


def _limits_words(plan: Plan) -> Phrase:
    if not plan.per_second:
        return phrase("run.no_limit", plan=plan.name)
    if not plan.per_day:
        return phrase("run.limits", plan=plan.name, second=plan.per_second, minute=plan.per_minute)
    return phrase(
        "run.limits_of_a_day",
        plan=plan.name,
        second=plan.per_second,
        minute=plan.per_minute,
        day=plan.per_day,
    )


class KeyUsage(TypedDict):
    """What is known of an API key: requests used and left today (None: not counted, or not known), and its state.

    `leased_today`: counted by the running daemon, not made yet, and neither used nor missing in what is left.
    `ends`: when its plan ends (ISO 8601 UTC), None where the API has not told; `ends_soon`: so in words, or ''.
    """

    key: str
    plan: str
    per_day: int
    ends: str | None
    ends_soon: str
    used_today: int | None
    leased_today: int
    left_today: int | None
    state: str
    why: str
    until: str
    not_for: list[str]


class QueueFacts(TypedDict):
    """What waits for MongoDB: QueueStats, and of how many trades the closes are still to be made."""

    trades: int
    bytes: int
    oldest: str | None
    rejects: int
    refused: int
    unsettled: int


class Pipeline:
    """Everything that a run needs, opened in one place, last opened first closed; the daemon keeps it between runs.

    `patient` as for LocalFile: the daemon's file is for others, too. `only_looks`: requests are counted in MongoDB
    where somebody counts there already, and no collection is made for it.

    Raises StoreError when the local file cannot be used, SettingsError for a MongoDB string that pymongo refuses.
    """

    def __init__(
        self,
        settings: Settings,
        events: Events = NO_EVENTS,
        demo: bool = False,
        clock: Clock = SYSTEM_CLOCK,
        patient: bool = False,
        only_looks: bool = False,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._final_trouble = LogThrottle("closing prices", then="they stay provisional until it works")
        self._events = events
        self._demo = demo
        self._delivery: Delivery | None = None
        self._keep_trouble = LogThrottle("KEEP_DAYS", then="older trades stay until it works")
        self._keep_due = 0.0  # monotonic
        with contextlib.ExitStack() as opened:
            file = opened.enter_context(open_store_file(settings.state_directory, self._events, patient))
            self.mongo: MongoStore | None = None
            ledger: Ledger = LocalLedger(file)
            if settings.mongodb_uri:
                self.mongo = opened.enter_context(contextlib.closing(MongoStore(settings)))
            mongo = self.mongo
            if mongo is not None and not (only_looks and mongo.lacks(settings.license_name)):
                ledger = SharedLedger(mongo.collection(settings.license_name), ledger)
            self.keys = KeyPool(settings.key_plans(), ledger)
            opened.callback(self.keys.close)
            proxies = settings.proxies
            api = InfowayApi(settings.api_base_url, self.keys, proxies, self._events, clock=clock)
            opened.callback(api.close)
            self.api = api
            self.gaps = Gaps(file, mongo)
            self._plans = KeyPlans(file, api)
            self.directory = Directory(file, api)
            self._source: Source = api
            if demo:
                self._source = DemoApi(clock, int(settings.collect_every_s) or 60)
            self._open_store(file, mongo)
            self._polled: InfowayApi | None = None  # made at first use
            self._polling = threading.Lock()
            self._opened = opened.pop_all()

    def _open_store(self, file: LocalFile, mongo: MongoStore | None) -> None:
        self.store: SqliteStore | Delivery
        sessions = SessionsFile(file)
        closes_in: SqliteStore | MongoStore = mongo or SqliteStore(file)
        closes = ClosingPrices(closes_in, sessions, self._clock)
        closing: ClosingPrices | Delivery = closes
        self.reader: Reader = SqliteReader(file, self._demo)
        if isinstance(closes_in, SqliteStore):
            self.store = closes_in
        else:
            self.reader = MongoReader(closes_in, file)
            limit = self._settings.spool_max_bytes
            queue, rejects, unsettled = DeliveryQueue(file, limit), Rejects(file), UnsettledTrades(file)
            self._delivery = Delivery(closes_in, queue, rejects, unsettled, closes, self._events)
            self.store = closing = self._delivery
        self._keeper = Keeper(None if self._demo else closing, self._events)
        days = self._settings.keep_days
        self._retention: Retention = SqliteRetention(file, days, self._clock)
        if mongo is not None:  # what waits for it in the local file stays
            self._retention = MongoRetention(mongo, days)
        self._finaliser = Finaliser(closes_in, self._source, sessions, self._events, self._clock)
        self._backfill = Backfill(closes_in, self._source, file, self._clock)

    @staticmethod
    def open_mongodb(settings: Settings) -> contextlib.closing[MongoStore]:
        """Return the collections alone, for work that needs no local file."""
        return contextlib.closing(MongoStore(settings))

    @staticmethod
    @contextlib.contextmanager
    def open_reader(settings: Settings, demo: bool = False, events: Events = NO_EVENTS) -> Iterator[Reader]:
        """Give what the views read from: it writes nothing. `demo`: synthetic trades alone, which are never in MongoDB.

        Raises StoreError.
        """
        with open_store_file(settings.state_directory, events) as file:
            if demo or not settings.mongodb_uri:
                yield SqliteReader(file, demo)
                return
            with Pipeline.open_mongodb(settings) as store:
                yield MongoReader(store, file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close what is open."""
        if self._delivery is not None:
            self._delivery.close()
        self._opened.close()

    def run(self, codes: Iterable[object], stop: threading.Event, report: Report | None = None) -> Report:
        """Collect the latest trades of codes; what becomes of it can be seen in `report` meanwhile.

        Raises SettingsError without an API key, StoreError when a local file is damaged or the clock not set.
        """
        return self._collect(self._source, self._events, codes, stop, report)

    def need_key(self) -> None:
        """Raise SettingsError where trades are to be asked for without an API key."""
        if not (self._demo or self._settings.api_keys):
            raise SettingsError([phrase("settings.no_key")])

    def poll(self, codes: Iterable[object], stop: threading.Event) -> Report:
        """Collect as `run` does, beside it and over connections of its own, without telling how it goes on.

        Any thread may call it; they take turns. It has to be over before this is closed. Raises as `run` does.
        """
        try:
            with turn(self._polling, stop):
                return self._collect(self._source_beside(), NO_EVENTS, codes, stop)
        except Interrupted:
            return Report(interrupted=True)

    def _source_beside(self) -> Source:
        """Return what can be asked while a run asks."""
        if self._demo:
            return self._source
        if self._polled is None:
            self._polled = InfowayApi(
                self._settings.api_base_url,
                self.keys,
                self._settings.proxies,
                self._events,
                clock=self._clock,
            )
            self._opened.callback(self._polled.close)
        return self._polled

    def _collect(
        self,
        source: Source,
        events: Events,
        codes: Iterable[object],
        stop: threading.Event,
        report: Report | None = None,
    ) -> Report:
        self.need_key()
        need_clock(self._clock.wall())
        finder = None
        if not self._demo:
            self._plans.ask(stop)
            finder = self.directory
        collector = Collector(
            source, self.store, self._keeper, events, demo=self._demo, report=report, finder=finder
        )
        if self._delivery is not None:
            self._delivery.mongo.start_threads()
        report = collector.run(codes, stop)
        self._events.keys_out(sum(bool(key.dead) for key in self.keys.keys), len(self.keys.keys))
        if self._settings.metrics_file is not None:  # they cost a question to MongoDB
            self._tell_keys()
        return report

    def put_at_once(self, within_s: float) -> int:
        """Return how many documents are best put at once where so many wait; `within_s` as for `put`."""
        return COMMIT_BATCH if self._delivery is None or not within_s else WRITE_BATCH

    def put(self, documents: Sequence[Document], within_s: float) -> WriteReport:
        """Store documents that were pushed, and let follow what does: within about that time, 0: at once.

        MongoDB has them then, or the queue on this machine. Raises StoreError when nothing of it is stored.
        """
        delivery = self._delivery
        if delivery is None:
            return self._follow(self.store.write(documents), documents)
        if not within_s:
            return self._follow(delivery.keep(documents), documents)
        delivery.mongo.start_threads()
        with delivery.mongo.within(within_s):
            return self._follow(delivery.write_soon(documents), documents)

    def _follow(self, written: WriteReport, documents: Sequence[Document]) -> WriteReport:
        self._keeper.follow(written, taken_of(documents, written), threading.Event())
        return written

    def stream_limits(self, stop: threading.Event) -> dict[str, StreamLimits]:
        """Return what the stream allows each key, by its digest; keys that serve no more are left out."""
        self._plans.ask(stop)
        return {
            key.digest: stream_limits(self._plans.of(key), key.plan) for key in self.keys.keys if not key.dead
        }

    def symbols(self, text: str, stop: threading.Event) -> tuple[list[Symbol], str]:
        """Return the instruments whose code or name holds a text, and why a list is missing, '' where none is.

        Raises SettingsError without an API key, StoreError when the local file fails.
        """
        self.need_key()
        self._plans.ask(stop)
        why = self.directory.refresh(SYMBOL_TYPES, stop)
        return self.directory.search(text), why

    def _tell_keys(self) -> None:
        states = self.keys.describe()
        usages = zip(self.keys.keys, states, self.usage(states), strict=True)
        self._events.keys_used([self._stats(key, state, usage) for key, state, usage in usages])

    def _stats(self, key: ApiKey, state: KeyState, usage: KeyUsage) -> KeyStats:
        ends = self._plans.of(key).ends
        left = usage["left_today"] if usage["per_day"] else math.inf
        return KeyStats(key.digest, usage["used_today"], left, usage["state"], ends)

    def finalise(self, stop: threading.Event) -> float:
        """Make a part of the closes final that are due, and return after how many seconds there is more to do.

        0: at once; infinite: nothing waits. What fails is said and tried again; never raises.
        """
        try:
            wait = self._finaliser.wait_s()
            if wait > 0 or self._demo:
                return wait
            need_clock(self._clock.wall())
            if self._delivery is not None and self._delivery.is_away:
                self._finaliser.pause()
            else:
                refused = self._finaliser.step(stop)
                if self._delivery is not None:
                    self._delivery.put_closes_aside(refused)
            self._final_trouble.over()
            return self._finaliser.wait_s()
        except Exception as error:  # it must not cost a trade
            self._final_trouble.again(fault_words(error, self._events))
        self._finaliser.pause()
        return FINAL_PAUSE_S

    def finalise_all(self, stop: threading.Event) -> None:
        """Make all closes final whose bars can be had now, or until `stop` is set."""
        while not stop.is_set() and self.finalise(stop) == 0:
            pass

    def retain(self) -> float:
        """Do a part of what KEEP_DAYS asks for, if that is due; return after how many seconds there is more to do.

        Infinite for never. What fails is said and tried again; never raises.
        """
        now = self._clock.monotonic()
        if self._demo:
            return math.inf
        if now < self._keep_due:
            return self._keep_due - now
        wait = FINAL_PAUSE_S
        try:
            need_clock(self._clock.wall())
            if self._delivery is None or not self._delivery.is_away:
                wait = self._retention.step()
            self._keep_trouble.over()
        except Exception as error:  # it must not cost a trade
            self._keep_trouble.again(fault_words(error, self._events))
        self._keep_due = self._clock.monotonic() + wait
        return wait

    def retain_some(self, stop: threading.Event) -> None:
        """Do what KEEP_DAYS asks for, as far as that is a matter of seconds, or until `stop` is set."""
        until = self._clock.monotonic() + KEEP_ONCE_S
        wait = self.retain()
        while wait <= EXPIRED_PAUSE_S and self._clock.monotonic() < until and not stop.wait(wait):
            wait = self.retain()

    def apply_retention(self) -> str:
        """Remove what is older than KEEP_DAYS, and return what is in the way of that, or ''. Raises StoreError."""
        need_clock(self._clock.wall())
        return self._retention.apply()

    def kept(self) -> str:
        """Return for how long trades are kept. Raises StoreError."""
        return self._retention.words()

    def check_store(self) -> str:
        """Try what a run needs of the store, and say for how long trades are kept. Raises StoreError."""
        return listing("join.commas", [self.store.check(), self.kept()])

    def backfill(
        self, codes: Iterable[str] | None, sessions: int, stop: threading.Event
    ) -> Iterator[Backfilled | int | None]:
        """Yield how many codes there are, then what became of each as its last sessions are made final, and None.

        Without `codes` every code in `realtime`. Raises SettingsError without an API key, StoreError.
        """
        self.need_key()
        need_clock(self._clock.wall())
        self._plans.ask(stop)
        return self._backfill.run(self._backfill.codes() if codes is None else codes, sessions, stop)

    def start_delivery(self) -> None:
        """Begin to deliver what waits for MongoDB on this machine. Raises StoreError."""
        if self._delivery is not None:
            self._delivery.start()

    def deliver(self, stop: threading.Event, retry: bool) -> None:
        """Move what waits to MongoDB until nothing does or `stop` is set; `retry`: what it rejected before, too.

        Raises StoreAway when MongoDB takes nothing, StoreError when closes cannot be made or the local file fails.
        """
        delivery = cast(Delivery, self._delivery)
        if retry:
            delivery.queue.retry(self._settings.realtime_name)
        delivery.deliver(stop, self._events)
        delivery.queue.shrink()

    def delivered(self) -> tuple[int, int, int]:
        """Return how many trades `deliver` moved, how many MongoDB rejected of them, and how many are left."""
        delivery = cast(Delivery, self._delivery)
        return delivery.moved, delivery.rejected, delivery.queue.count()

    def rejects(self) -> list[Reject]:
        """Return what MongoDB rejected for good, oldest first. Raises StoreError."""
        return [] if self._delivery is None else self._delivery.rejects.all()

    def discard_rejects(self) -> int:
        """Forget what MongoDB rejected for good, and return how many documents that was. Raises StoreError."""
        return 0 if self._delivery is None else self._delivery.rejects.discard()

    def queued(self, refused: int) -> QueueFacts | None:
        """Return what waits for MongoDB, None where none is set; `refused`: what found no room. Raises StoreError."""
        if self._delivery is None:
            return None
        stats = self._delivery.stats()._replace(refused=refused)
        return cast(QueueFacts, stats._asdict() | {"unsettled": self._delivery.unsettled.count()})

    def usage(self, told: Sequence[KeyState]) -> list[KeyUsage]:
        """Return of each key its plan, what is used and left today, and the state that a running daemon told."""
        states = {state["digest"]: state for state in told}
        return [self._usage(key, states.get(key.digest)) for key in self.keys.keys]

    def _usage(self, key: ApiKey, told: KeyState | None) -> KeyUsage:
        now = time.time()
        counted = None
        if key.plan.per_day:
            counted = self.keys.ledger.used_today(key.digest, now)
        info = self._plans.of(key)
        usage: KeyUsage = {
            "key": key.shown,
            "plan": key.plan.name,
            "per_day": key.plan.per_day,
            "ends": iso_after(info.ends, 0) if info.ends else None,
            "ends_soon": info.end_words(now),
            "used_today": counted,
            "leased_today": 0,
            "left_today": None,
            "state": "unknown",
            "why": "",
            "until": "",
            "not_for": [],
        }
        if told is not None:
            usage |= {"state": "ready", "not_for": told["not_for"]}
            if told["state"] != "resting" or told["until"] > iso_after(now, 0):  # it was when it was told
                usage |= {"state": told["state"], "why": told["why"], "until": told["until"]}
        if counted is not None:
            leased = min(counted, told["leased"]) if told else 0
            left = max(0, key.plan.per_day - counted + leased)
            usage |= {"used_today": counted - leased, "leased_today": leased, "left_today": left}
        if usage["left_today"] == 0 and usage["state"] in ("ready", "unknown"):
            until = iso_after(next_midnight(now), 0)
            usage |= {"state": "resting", "why": day_used_up(key.plan), "until": until}
        return usage


# ======================================================================================================
# Collection: what is collected without anybody asking, and when
# ======================================================================================================

# ------------------------------------------------------------------------------------------------------
# What: the codes of COLLECT_CODES
# ------------------------------------------------------------------------------------------------------

# A file or a collection of codes is looked at again after so long, seconds.
LOOK_EVERY_S = 60.0
# As many codes as a command may have.
MOST_COLLECTED = 100_000
# The kind of what a command is answered that names none.
NO_CODES = "collection.no_codes"


class WatchList:
    """The codes of COLLECT_CODES, of which this instance takes its share; a file or a collection is looked at again.

    Any thread may call it. What cannot be read, or holds no code any more, leaves the codes from before, and is said.
    """

    def __init__(self, settings: Settings, mongo: MongoStore | None, clock: Clock = SYSTEM_CLOCK) -> None:
        self._settings = settings
        self._mongo = mongo
        self._clock = clock
        self._codes: tuple[str, ...] | None = None
        self._look_at = -math.inf
        self._listed: list[str] | None = None  # of all shares
        self._odd_said = False
        self._trouble = LogThrottle("COLLECT_CODES", clock, then="the codes from before stay")
        self._lock = threading.Lock()

    def codes(self, fresh: bool = False) -> Sequence[str]:
        """Return this instance's codes as they were typed, the same object until they change; `fresh`: as of now.

        Raises StockrtError while there are none from before.
        """
        with self._lock:
            if fresh or self._codes is None or self._clock.monotonic() >= self._look_at:
                self._look()
            return self._codes or ()

    def wait_s(self) -> float:
        """Return after how many seconds `codes` looks again; infinite where that is of no use."""
        return max(0.0, self._look_at - self._clock.monotonic())

    def _look(self) -> None:
        self._look_at = math.inf
        if self._settings.collect_codes[:1] == "@" or self._settings.collect_codes == WATCH:
            self._look_at = self._clock.monotonic() + LOOK_EVERY_S
        try:
            found = self._read()
        except StockrtError as error:
            if self._codes is None:
                raise StockrtError(phrase("collection.watch_list", why=error.message)) from None
            self._trouble.again(error.message)
        else:
            self._trouble.over()
            if found != self._listed:
                self._listed = found
                self._take(found)

    def _read(self) -> list[str]:
        """Return the codes of all shares, each once. Raises StockrtError."""
        text = place = self._settings.collect_codes
        if text == WATCH:
            place = f"{self._settings.mongodb_db_name}.{self._settings.watch_name}"
            found = self._read_collection(place)
        elif text[:1] == "@":
            place = text[1:]
            found = self._read_file(Path(place))
        elif text:
            found = split_codes(text)
        else:
            raise StockrtError(phrase(NO_CODES))
        codes = [*dict.fromkeys(found)]
        if not codes:
            raise StockrtError(phrase("collection.empty", place=place))
        if len(codes) > MOST_COLLECTED:
            raise StockrtError(phrase("collection.many_codes", place=place, most=MOST_COLLECTED))
        return codes

    def _read_collection(self, place: str) -> list[str]:
        if self._mongo is None:
            raise StockrtError(phrase("settings.watch_needs_mongodb", what=WATCH))
        try:
            values = self._mongo.field(self._settings.watch_name, "code", MOST_COLLECTED + 1)
        except StoreAway as error:
            raise StockrtError(phrase("collection.unread", place=place, why=error.message)) from error
        if len(values) > MOST_COLLECTED:
            raise StockrtError(phrase("collection.many_documents", place=place, most=MOST_COLLECTED))
        texts = [value for value in values if isinstance(value, str) and split_codes(value)]
        odd = len(values) - len(texts)
        if odd and not self._odd_said:
            log.warning(
                "COLLECT_CODES: %d of %s in %s have no text in the field code, and are passed over",
                odd,
                count_words(len(values), "document"),
                place,
            )
        self._odd_said = bool(odd)
        return [code for text in texts for code in split_codes(text)]

    @staticmethod
    def _read_file(path: Path) -> list[str]:
        """Return the codes in a file. Raises StockrtError."""
        try:
            return list(codes_in(read_file(path)))
        except (OSError, UnicodeDecodeError) as error:
            raise StockrtError(phrase("collection.unread", place=path, why=unread_words(error))) from None

    def _take(self, listed: Collection[str]) -> None:
        """Go over to what of a new list is in the share, and say what changed, or that it is nothing."""
        number, shares = self._settings.collect_share
        codes = [code for code in listed if share_of(code, shares) == number]
        before, now = set(self._codes or ()), set(codes)
        if self._codes is not None and before == now:
            return
        if not codes:
            total = count_words(len(listed), "code")
            log.warning("COLLECT_CODES: none of %s is in the share %d/%d", total, number, shares)
        elif self._codes is not None:
            total, new, gone = count_words(len(codes), "code"), len(now - before), len(before - now)
            log.info("COLLECT_CODES: %s, %d new, %d gone", total, new, gone)
        self._codes = tuple(codes)


def share_of(code: str, shares: int) -> int:
    """Return in which of so many shares a code is, from 1 on, the same one in whichever notation it is typed.

    It is the first 32 bits of the SHA-256 of the API's form, modulo the number of shares, plus 1.
    """
    if shares == 1:
        return 1
    try:
        form = parse_code(code).code
    except UnclearCode as error:
        form = error.text  # what a list may know it as
    except InstrumentError:
        form = code
    return int(sha256(form.encode("utf-8", "backslashreplace"))[:8], 16) % shares + 1


class Resolved(NamedTuple):
    """Instruments by how they were asked for, each once; and of the codes that are none in which words."""

    instruments: dict[str, Instrument]
    refused: dict[str, str]

    def refused_words(self) -> Phrase:
        """Return of the first few codes that are none why."""
        first = islice(self.refused.items(), NAMES_SHOWN)
        return listing("join.clauses", [phrase("tools.because", what=code, why=why) for code, why in first])


def resolve(codes: Iterable[object], finder: Directory | None, stop: threading.Event) -> Resolved:
    """Return what codes mean, by the rules of a run, as far as their forms and the lists tell. Raises StoreError."""
    plan = BatchPlan()
    plan.add(codes)
    refused = dict(plan.invalid)
    if finder is not None:
        for shown, found, why in looked_up(plan, finder, stop):
            refused[shown] = why
            if found is not None:
                del refused[shown]
                plan.add_instrument(found, shown)
    instruments = {
        plan.asked_as.get(code, code): Instrument(code, batch.product, plan.alternatives.get(code, ()))
        for batch in plan.finish()
        for code in batch.split()
    }
    return Resolved(instruments, refused)


# ------------------------------------------------------------------------------------------------------
# When: on a fixed beat
# ------------------------------------------------------------------------------------------------------

# Failures that are nobody's but the way to the trades: said as a trouble, whatever the codes.
TROUBLES = frozenset({FailureKind.NETWORK, FailureKind.API, FailureKind.KEY, FailureKind.OTHER})
# Those of a code itself.
OF_THE_CODE = frozenset({FailureKind.INVALID_CODE, FailureKind.UNKNOWN_CODE, FailureKind.BAD_RECORD})


class Troubles:
    """What runs meet and no single code is to blame for, said as it begins, goes on and ends.

    `then`: what comes after a run that met some.
    """

    def __init__(self, settings: Settings, then: str) -> None:
        self.store = LogThrottle(store_name(settings), then=then)
        self._api = LogThrottle("Infoway", then=then)
        self._stale = LogThrottle("trades", then="they are stored all the same")

    def note(self, report: Report) -> str:
        """Say which begin or end with a run; return what it met, '' for nothing."""
        away = next((failure.words for failure in report.failures.values() if failure.kind in TROUBLES), "")
        found = ((self.store, report.store_error), (self._stale, report.stale_words()), (self._api, away))
        for trouble, words in found:
            if words:
                trouble.again(words)
            elif report.reached:
                trouble.over()
        return report.store_error or away


class Beat:
    """When a poll begins: on a grid from the first one on, which no poll's length shifts. Never two at once.

    A beat that comes while a poll goes on is missed. Times are monotonic seconds. Pure.
    """

    def __init__(self, every_s: float, now: float) -> None:
        self._every_s = every_s
        self._first_at = now
        self._next = 0  # the number of the next beat

    def wait_s(self, now: float) -> float:
        """Return after how many seconds the next beat comes."""
        return max(0.0, self._first_at + self._next * self._every_s - now)

    def done(self, now: float) -> int:
        """Take it that the poll of the last beat is over; return how many beats were missed."""
        this = self._next
        self._next = max(this + 1, math.ceil((now - self._first_at) / self._every_s))
        return self._next - this - 1


class Poller(threading.Thread):
    """Polls the codes of a watch list every COLLECT_EVERY seconds until told to leave."""

    def __init__(
        self, pipeline: Pipeline, settings: Settings, watch: WatchList, events: Events = NO_EVENTS
    ) -> None:
        super().__init__(name="stockrt-poll", daemon=True)
        self._pipeline = pipeline
        self._every_s = settings.collect_every_s
        self._watch = watch
        self._events = events
        then = "the next beat tries again"
        self._troubles = Troubles(settings, then)
        self._poll_trouble = LogThrottle("collecting", then=then)
        self._code_trouble = LogThrottle("collecting", then="they are asked for at every beat")
        self._beat_trouble = LogThrottle("collecting", then="beats are skipped, never two polls at once")
        self._in_time = 0  # polls without a missed beat since
        self._stats = CollectStats()
        self._leaving = threading.Event()

    def leave(self) -> None:
        """End; of a poll that goes on what was fetched is stored."""
        self._leaving.set()

    def stats(self) -> CollectStats:
        """Return what it did so far."""
        return self._stats

    def run(self) -> None:
        """Work until told to leave."""
        beat = Beat(self._every_s, time.monotonic())
        while not self._leaving.wait(beat.wait_s(time.monotonic())):
            began = time.monotonic()
            report = self._poll()
            now = time.monotonic()
            self._note_beats(beat.done(now), now - began)
            self._count(report)
            self._events.collecting(self._stats)

    def _poll(self) -> Report:
        """Poll once; what keeps it from that is said, and the report's `store_error`."""
        try:
            report = self._pipeline.poll(self._watch.codes(), self._leaving)
        except Exception as error:  # nobody else looks at this thread
            words = fault_words(error, self._events, is_said=self._poll_trouble.there)
        else:
            if not report.interrupted:
                self._poll_trouble.over()
                self._note_codes(report)
            return report
        self._poll_trouble.again(words)
        return Report(store_error=words, interrupted=True)

    def _note_codes(self, report: Report) -> None:
        failed = {code: one for code, one in report.failures.items() if one.kind in OF_THE_CODE}
        if failed:
            self._code_trouble.again(failed_words(failed, report.total))
        elif report.reached:
            self._code_trouble.over()

    def _note_beats(self, missed: int, took_s: float) -> None:
        """Say that beats are missed, and that it is over once none was for a while: else each would be said."""
        if missed:
            self._in_time = 0
            self._stats = self._stats._replace(missed_beats=self._stats.missed_beats + missed)
            self._beat_trouble.again(phrase("collection.slow_poll", took=took_s, every=self._every_s))
            return
        self._in_time += 1
        if self._in_time * self._every_s >= TROUBLE_AGAIN_S:
            self._beat_trouble.over()

    def _count(self, report: Report) -> None:
        before = self._stats
        if report.total and not before.polled:
            log.info("%s polled every %g s", count_words(report.total, "code"), self._every_s)
        trouble = report.store_error
        if not report.interrupted:
            trouble = self._troubles.note(report)
        new = report.stored + report.queued
        self._stats = before._replace(
            polled=report.total or before.polled,
            per_second=new / self._every_s,
            trades=before.trades + new + report.duplicates,
            stored=before.stored + new,
            duplicates=before.duplicates + report.duplicates,
            trouble=trouble,
        )


# ------------------------------------------------------------------------------------------------------
# Where the stream is incomplete
# ------------------------------------------------------------------------------------------------------
#
# The way of a push: `StreamConnection.read` gives its trade to a Feed, a thread for each connection; `Intake.add` takes
# it, and the intake's thread writes it with others to the store, or to what waits for MongoDB. `Coverage` knows of each
# code whether its pushes come, notes gaps, and marks in the state directory up to when everything is kept: so the next
# start knows since when something is missing, however this one ends. The Planner looks after the list of codes, spreads
# them over connections, and asks over REST for what the stream does not bring.

CODES_NAME, MARK_NAME = "collecting.codes", "collecting.mark"
# A mark this far in the future is none of a clock that is slewed.
CLOCK_BACK_MS = 2000


class Parcel(NamedTuple):
    """Trades of a product that came together: when, in epoch ms and monotonic seconds.

    `since`: epoch ms, what comes later by both its arrival and its own time was not among those before.
    """

    product: str
    trades: Sequence[Trade]
    since: int
    arrived_ms: int
    arrived: float


class Group(NamedTuple):
    """Codes of a product of which everything is kept that came up to a moment (epoch ms)."""

    product: str
    until: int
    codes: Sequence[str]


class Left(NamedTuple):
    """What the last process that collected here has left: who it was, of what it kept everything, and how it ended."""

    instance: str = ""
    version: int = 0
    groups: Sequence[Group] = ()
    stopped: bool = False


class MarkFiles:
    """Up to when everything is kept, in the state directory: which codes, and a small file that follows the time.

    The codes are on disk when they are written; of the times older ones may stand there after a power cut, and then a
    gap only begins earlier.
    """

    def __init__(self, directory: Path) -> None:
        self._codes = directory / CODES_NAME
        self._mark = directory / MARK_NAME

    def read(self) -> Left:
        """Return what the last process has left. Raises StoreError."""
        try:
            codes = self._object(self._codes)
            groups = [
                Group(product, int(until), [*names]) for product, until, names in codes.get("groups", ())
            ]
            left = Left(str(codes.get("instance", "")), int(codes.get("version", 0)), groups)
        except (TypeError, ValueError) as error:
            words = one_line(error, 80)
            log.error("%s is damaged (%s): a gap before this start is not noted", self._codes, words)
            return Left()
        try:
            mark = self._object(self._mark)
            if mark.get("version") != left.version:
                return left
            times = [int(until) for until in mark["until"]]
            groups = [one._replace(until=until) for one, until in zip(groups, times, strict=True)]
            return left._replace(groups=groups, stopped=bool(mark["stopped"]))
        except (KeyError, TypeError, ValueError) as error:
            words = one_line(error, 80)
            log.error("%s is damaged (%s): a gap before this start begins too early", self._mark, words)
            return left

    @staticmethod
    def _object(path: Path) -> dict[str, Any]:
        """Return what a file holds, nothing where there is none. Raises StoreError, ValueError for no object."""
        what = phrase("tools.not_read", path=path)
        with disk_trouble(what), contextlib.suppress(FileNotFoundError):
            found = json_object(read_file(path).encode())
            if found is None:
                raise ValueError("no JSON object")
            return found
        return {}

    def write_codes(self, left: Left) -> None:
        """Keep of which codes everything is kept. Raises StoreError."""
        facts = {"instance": left.instance, "version": left.version, "groups": left.groups}
        write_whole(self._codes, json.dumps(facts), durable=True)

    def write_mark(self, left: Left) -> None:
        """Keep up to when everything of them is kept. Raises StoreError."""
        until = [group.until for group in left.groups]
        write_whole(
            self._mark, json.dumps({"version": left.version, "until": until, "stopped": left.stopped})
        )


class Part:
    """What one connection is to bring: codes of a product, those that are subscribed, and when it brought something.

    `heard`: epoch ms; what it brought up to then was handed on, and `seen` is that of a moment at which the intake was
    looked at afterwards. Only the thread of the connection changes `heard`.
    """

    def __init__(self, product: str, now_ms: int) -> None:
        self.product = product
        self.codes: frozenset[str] = frozenset()
        self.acked: set[str] = set()
        self.silent: set[str] = set()  # those that are subscribed anew for saying nothing
        self.silent_since = 0  # epoch ms
        self.heard = self.seen = now_ms


# Why there is a gap, where it was no connection that was refused or lost: as other programs read it in the database.
STOPPED = "stockrt was stopped"
ENDED_WITHOUT_NOTICE = "stockrt ended without notice"
MOVED = "moved to another connection"
DEAF = "nothing was pushed although there were trades"


class OpenGap:
    """A gap in memory: `missing` are those of its codes that are not subscribed again; `is_kept` as it is now."""

    def __init__(self, gap: Gap, missing: Iterable[str], is_kept: bool = False) -> None:
        self.gap = gap
        self.missing = set(missing)
        self.is_kept = is_kept
        self.last = 0  # of refused pushes: when the last one came


class Coverage:
    """Knows of each code of the stream whether its pushes come, or since when not. Any thread may call it.

    A code is missing from the last sign of a connection that was lost (or the mark of a process that ended) until it
    is subscribed again. What cannot be noted now is noted later, and the mark stays behind it until then.
    """

    def __init__(self, gaps: Gaps, directory: Path, clock: Clock = SYSTEM_CLOCK) -> None:
        self.news = threading.Event()  # there is something to be fetched, or to be planned anew
        self._gaps = gaps
        self._files = MarkFiles(directory)
        self._clock = clock
        self._lock = threading.RLock()
        self._parts: list[Part] = []
        self._open: list[OpenGap] = []
        self._ended: list[OpenGap] = []  # subscribed again, and not fetched yet
        self._silent: list[Gap] = []  # up to when codes were subscribed anew
        self._refused: dict[str, OpenGap] = {}  # by product: pushes that the store does not take now
        self._back: set[str] = set()
        self._wanted: Mapping[str, Collection[str]] = {}
        self._left = Left()
        self._durable = 0
        self._has_begun = self._is_closed = False
        self._trouble = LogThrottle("stream_gaps", clock, then="it is noted as soon as that works")

    def want(self, wanted: Mapping[str, Collection[str]]) -> None:
        """Have it which codes are to be collected, by product: of others nothing is missing from now on.

        The first time it takes over what the last process left. Raises StoreError where that cannot be read.
        """
        with self._lock:
            if not self._has_begun:
                self._begin(wanted)
                self._has_begun = True
            self._wanted = wanted
            for one in self._open:
                one.missing &= {*wanted.get(one.gap.product, ())}
            self._end_gaps()

    def add(self, product: str) -> Part:
        """Return the part of a new connection."""
        with self._lock:
            part = Part(product, self._now_ms())
            self._parts.append(part)
            return part

    def expect(self, part: Part, codes: Iterable[str]) -> None:
        """Have it that a connection is to bring these codes, and no others.

        Called before they are subscribed: if this process ends then, the next one knows of them.
        """
        with self._lock:
            codes = frozenset(codes)
            gone = part.acked - codes
            part.codes = codes
            part.acked -= gone
            moved = gone & {*self._wanted.get(part.product, ())}
            self._lose(part.product, moved, self._last_sign(part), MOVED)
            self._write_codes()

    def drop(self, part: Part) -> None:
        """Have it that a connection is not used any more."""
        with self._lock:
            self.expect(part, ())
            self._parts.remove(part)

    def acked(self, part: Part, codes: Iterable[str]) -> None:
        """Codes are subscribed: from now on everything of them comes."""
        with self._lock:
            part.heard = self._now_ms()
            fresh = part.codes & {*codes} - part.acked
            part.acked |= fresh
            for one in self._open:
                if one.gap.product == part.product:
                    one.missing -= fresh
            self._end_gaps()
            again = part.silent & {*codes}
            part.silent -= again
            if again:
                silence = self._new(part.product, again, part.silent_since, DEAF).gap
                self._silent.append(silence._replace(until=part.heard))
            self._back |= fresh
            self._write_codes()
        self.news.set()

    def lost(self, part: Part, why: str) -> None:
        """A connection is over: what it brought is missing since its last sign."""
        with self._lock:
            acked, part.acked, part.silent = part.acked, set(), set()
            self._lose(part.product, acked, self._last_sign(part), why)
            self._write_codes()

    def refused(self, part: Part, codes: Iterable[str], why: str) -> None:
        """The stream does not take codes of a connection; those that came before or are missing are so for this."""
        with self._lock:
            codes = {*codes}
            acked = part.acked & codes
            part.acked -= acked
            self._lose(part.product, acked, self._last_sign(part), why)
            for one in [one for one in self._open if one.gap.product == part.product]:
                self._split(one, codes - acked, why)
            self._write_codes()
        self.news.set()

    def silent(self, part: Part, codes: Iterable[str]) -> None:
        """An open market says nothing, and these codes are subscribed anew: whether they are missing is to be seen."""
        with self._lock:
            part.silent = part.acked & {*codes}
            part.silent_since = self._last_sign(part)

    def to_fetch(self) -> tuple[set[str], list[Gap]]:
        """Return the codes that were subscribed since this was asked last, and the silences that are over.

        Their latest trades are to be fetched. Those of a silence that were not pushed tell a gap.
        """
        with self._lock:
            back, silences = self._back, self._silent
            self._back, self._silent = set(), []
            return back, silences

    def was_deaf(self, silence: Gap) -> None:
        """In a silence there were trades that were not pushed."""
        with self._lock:
            self._ended.append(OpenGap(silence, silence.codes))

    def not_stored(self, parcel: Parcel, codes: Collection[str], why: str) -> None:
        """The store took none of these pushes, or not those of some codes: missing until it takes some again."""
        with self._lock:
            one = self._refused.get(parcel.product)
            if one is None:
                one = self._refused[parcel.product] = self._new(parcel.product, (), parcel.since, why)
            one.last = max(one.last, parcel.arrived_ms)
            fresh = {*codes} - one.missing
            if fresh:
                one.missing |= fresh
                self._change(one, one.gap._replace(codes=tuple(sorted(one.missing))))

    def stored(self) -> None:
        """The store takes pushes again."""
        with self._lock:
            for product, one in [*self._refused.items()]:
                self._change(one, one.gap._replace(until=one.last))
                if one.is_kept:
                    del self._refused[product]

    def complete(self) -> None:
        """Note that the gaps are over whose codes are subscribed again."""
        with self._lock:
            for one in [*self._ended]:
                self._change(one, one.gap)
                if one.is_kept:
                    self._ended.remove(one)

    def missing(self) -> int:
        """Return how many gaps go on."""
        with self._lock:
            return len(self._open) + len(self._ended) + len(self._refused)

    def subscribed(self) -> dict[str, set[str]]:
        """Return the codes whose pushes come now, by product."""
        with self._lock:
            found: dict[str, set[str]] = {}
            for part in self._parts:
                found.setdefault(part.product, set()).update(part.acked)
            return found

    def look(self) -> None:
        """Look up to when connections have handed on what they brought; then the intake is to be asked, then `mark`."""
        with self._lock:
            for part in self._parts:
                part.seen = self._last_sign(part)

    def mark(self, durable_ms: int, stopped: bool = False) -> None:
        """Keep in the state directory up to when everything is kept: what came before a moment (epoch ms).

        Not before `want` has read what the last process left there.
        """
        with self._lock:
            if self._is_closed or not self._has_begun:
                return
            self._durable = durable_ms
            self._keep([*self._refused.values(), *self._open, *self._ended])
            if not self._write_codes():
                return
            self._left = self._left._replace(groups=self._groups(), stopped=stopped)
            try:
                self._files.write_mark(self._left)
            except StoreError as error:
                self._trouble.again(error.message)

    def close(self, durable_ms: int) -> None:
        """Leave: gaps that are over are noted, and nothing is from now on, whatever thread is late."""
        with self._lock:
            self.stored()
            self.complete()
            self.mark(durable_ms, stopped=True)
            self._is_closed = True

    # under the lock

    def _begin(self, wanted: Mapping[str, Collection[str]]) -> None:
        """Take over the open gaps of the last process, and note a new one since its mark. Raises StoreError."""
        left = self._files.read()
        self._left = left._replace(instance=left.instance or _new_instance(), stopped=False)
        now = self._now_ms()
        known: set[tuple[str, str]] = set()
        for gap in self._gaps.open():
            missing = {*gap.codes} & {*wanted.get(gap.product, ())}
            known |= {(gap.product, code) for code in missing}
            self._open.append(OpenGap(gap, missing, is_kept=True))
        self._durable = now
        self._end_gaps()
        why = STOPPED if left.stopped else ENDED_WITHOUT_NOTICE
        since: dict[tuple[str, int], set[str]] = {}
        for product, until, codes in left.groups:
            lost = {code for code in codes if (product, code) not in known} & {*wanted.get(product, ())}
            since.setdefault((product, until), set()).update(lost)
        for (product, until), lost in since.items():
            self._lose(product, lost, min(until, now), why)
            if until > now + CLOCK_BACK_MS:
                log.warning(
                    "the clock was set back by %d s or more: a gap of %s may begin earlier than is noted",
                    (until - now) / 1000,
                    product,
                )
        self.complete()

    def _now_ms(self) -> int:
        return int(self._clock.wall() * 1000)

    def _last_sign(self, part: Part) -> int:
        """Return when a connection brought something; a clock that was set back makes no sign of the future."""
        return min(part.heard, self._now_ms())

    def _new(self, product: str, codes: Collection[str], since: int, why: str) -> OpenGap:
        gap = Gap(product, tuple(sorted(codes)), since, None, str(why), self._left.instance)
        return OpenGap(gap, codes)

    def _lose(self, product: str, codes: Collection[str], since: int, why: str) -> None:
        """Note that codes are missing."""
        if codes and not self._is_closed:
            one = self._new(product, codes, since, why)
            self._open.append(one)
            self._keep([one])

    def _split(self, one: OpenGap, codes: set[str], why: str) -> None:
        """Give codes that stay missing for another reason a gap of their own."""
        here = one.missing & codes
        if not here:
            return
        rest = {*one.gap.codes} - here
        gap = one.gap._replace(why=str(why))
        if rest:
            gap = one.gap._replace(codes=tuple(sorted(rest)))
            one.missing -= here
            self._lose(gap.product, here, gap.since, why)
        self._change(one, gap)
        self._end_gaps()

    def _end_gaps(self) -> None:
        """Set those apart in which nothing is missing any more."""
        now = self._now_ms()
        for one in [one for one in self._open if not one.missing]:
            one.gap = one.gap._replace(until=now)
            self._open.remove(one)
            self._ended.append(one)

    def _change(self, one: OpenGap, gap: Gap) -> None:
        """Have in the local file what a gap has become."""
        one.gap, one.is_kept = gap, False
        self._keep([one])

    def _keep(self, gaps: Iterable[OpenGap]) -> None:
        """Have gaps in the local file as they are now."""
        for one in gaps:
            if one.is_kept or self._is_closed:
                continue
            try:
                if one.gap.key:
                    self._gaps.change(one.gap)
                else:
                    one.gap = self._gaps.note(one.gap)
            except StoreError as error:
                self._trouble.again(error.message)
                return
            one.is_kept = True
            self._trouble.over()
            self.news.set()

    def _groups(self) -> list[Group]:
        """Return of which codes everything is kept up to when; gaps that are not noted yet hold it back."""
        groups = []
        gone: dict[str, set[str]] = {}
        for one in self._open:
            gone.setdefault(one.gap.product, set()).update(one.missing)
        for part in self._parts:
            codes = part.codes - (gone.get(part.product, set()) - part.acked)
            groups.append(Group(part.product, min(self._durable, part.seen), sorted(codes)))
        groups += [
            Group(one.gap.product, one.gap.since, one.gap.codes)
            for one in (*self._open, *self._refused.values())
            if not one.is_kept
        ]
        return groups

    def _write_codes(self) -> bool:
        """Keep of which codes everything is kept, where that has changed; return whether it stands there."""
        groups = self._groups()
        if [(one.product, one.codes) for one in groups] == [
            (one.product, one.codes) for one in self._left.groups
        ]:
            return True
        if self._is_closed:
            return False
        left = self._left._replace(groups=groups, version=self._left.version + 1)
        try:
            self._files.write_codes(left)
        except StoreError as error:
            self._trouble.again(error.message)
            return False
        self._left = left
        return True


def _new_instance() -> str:
    """Return a name for what collects with this state directory."""
    return f"{one_line(os.uname().nodename, 60).replace('|', '-')}-{os.urandom(3).hex()}"


# ------------------------------------------------------------------------------------------------------
# From the connections to the store
# ------------------------------------------------------------------------------------------------------

# What is pushed is on its way to the store after this time at the latest.
PUSHES_WAIT_S = 0.1
# Trades that wait in memory at most: then no more is read from the connections.
MOST_PENDING = 20_000
# When more wait, and the oldest of them for longer, MongoDB is slower than the market: this machine's disk takes them.
CROWDED, CROWDED_S = 10_000, 1.0
# MongoDB has so long to take a batch of pushes before the disk does; as this process leaves too, where few wait.
PUSHES_TAKEN_S, PUSHES_TAKEN_LAST_S = 2.0, 0.5
# The mark is written so often while trades come, and while none do.
MARK_S, MARK_SILENT_S = 1.0, 30.0
# Delays and rates are those of the last one or two spans of this length.
LATELY_S = 15.0


class Delays:
    """How long something took lately: counts in classes that grow by a fifth, of the span of time now and the last."""

    BOUNDS = tuple(1.2**power for power in range(70))  # milliseconds, up to about five minutes

    def __init__(self, now: float) -> None:
        self._begun = now
        self._counts = [0] * (len(self.BOUNDS) + 1)
        self._before = self._counts.copy()
        self._before_begun = now

    def add(self, milliseconds: float, count: int) -> None:
        """Count some that took so long."""
        self._counts[bisect_left(self.BOUNDS, milliseconds)] += count

    def turn(self, now: float) -> None:
        """Begin a new span when the one now is over."""
        if now - self._begun >= LATELY_S:
            self._before, self._before_begun = self._counts, self._begun
            if now - self._begun >= 2 * LATELY_S:  # and one in between, in which nobody looked
                self._before, self._before_begun = [0] * len(self._counts), now - LATELY_S
            self._counts = [0] * len(self._before)
            self._begun = now

    def per_second(self, now: float) -> float:
        """Return how many there were a second."""
        return (sum(self._before) + sum(self._counts)) / max(1.0, now - self._before_begun)

    def within(self, part: float) -> float:
        """Return within which time (milliseconds) that part of them was done with, NaN where there were none."""
        counts = [*map(sum, zip(self._before, self._counts, strict=True))]
        left = sum(counts) * part
        if not left:
            return math.nan
        for bound, count in zip((*self.BOUNDS, math.inf), counts, strict=True):
            left -= count
            if left <= 0:
                return bound
        return math.inf


class Intake:
    """Takes what connections bring, and writes it from a thread of its own. Any thread may call it.

    What waits in memory is bounded: `add` takes its time where the embedded store, or the disk, is slower than the
    market; where MongoDB is, what waits goes to the disk. What the store does not take is counted, said and noted as
    a gap.
    """

    def __init__(self, pipeline: Pipeline, coverage: Coverage) -> None:
        self.came = threading.Event()  # something did, or is to be looked at
        self.trades = self.stored = self.duplicates = self.refused = self.dropped = 0
        self.trouble = ""
        self._pipeline = pipeline
        self._coverage = coverage
        self._changed = threading.Condition()  # what follows:
        self._pending: deque[Parcel] = deque()
        self._waiting = 0  # trades of those
        self._written: list[Parcel] = []  # they are on their way to the store
        self._is_closing = self._is_over = False
        self._delays = Delays(time.monotonic())
        then = "what is pushed meanwhile is missing, see stream_gaps"
        self._trouble = LogThrottle("the stream's trades", then=then)
        self._thread = threading.Thread(target=self._run, name="stockrt-intake", daemon=True)

    def start(self) -> None:
        """Begin to write. Raises StockrtError where there is no thread."""
        start_thread(self._thread)

    def add(self, product: str, trades: Sequence[Trade]) -> int:
        """Take trades that have just come, and return up to when (epoch ms) nothing of their connection is missing.

        Waits while too many wait.
        """
        arrived_ms, arrived = int(time.time() * 1000), time.monotonic()
        for some in parts_of(trades, WRITE_BATCH):
            since = min(_moment(trade, arrived_ms) for trade in some)
            self._add(Parcel(product, some, since, arrived_ms, arrived))
        return _moment(trades[-1], arrived_ms)

    def _add(self, parcel: Parcel) -> None:
        with self._changed:
            while self._waiting >= MOST_PENDING and not self._is_closing:
                self._changed.wait()
            before = self._waiting
            self._pending.append(parcel)
            self._waiting += len(parcel.trades)
            self.trades += len(parcel.trades)
            if not before or before < WRITE_BATCH <= self._waiting:
                self._changed.notify_all()
        self.came.set()

    def drop(self, count: int) -> None:
        """Count pushes that are of no use."""
        with self._changed:
            self.dropped += count

    def lately(self) -> tuple[float, float, float]:
        """Return how long half and 99 of 100 trades took lately until they were durable (ms), and trades a second."""
        with self._changed:
            now = time.monotonic()
            self._delays.turn(now)
            return self._delays.within(0.5), self._delays.within(0.99), self._delays.per_second(now)

    def durable_ms(self) -> int:
        """Return before which moment (epoch ms) everything that came is in the store, or noted as missing."""
        with self._changed:
            now = int(time.time() * 1000)
            return min((parcel.since - 1 for parcel in (*self._written, *self._pending)), default=now)

    def close(self, within_s: float) -> None:
        """Write what is there, and end; what cannot be written within that time is missing since the mark."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(within_s)
        self._is_over = True

    # its thread

    def _run(self) -> None:
        while not self._is_over:
            batch, within_s = self._next()
            if not batch:
                return
            self._write(batch, within_s)
            with self._changed:
                self._written = []

    def _next(self) -> tuple[list[Parcel], float]:
        """Return what is to be written next, and how long MongoDB has for it, once it is time; nothing at the end."""
        with self._changed:
            while not self._pending and not self._is_closing:
                self._changed.wait()
            self._await_more()
            within_s = self._time_for_mongodb()
            most, size = self._pipeline.put_at_once(within_s), 0
            while self._pending and size + len(self._pending[0].trades) <= most:
                self._written.append(self._pending.popleft())
                size += len(self._written[-1].trades)
            self._waiting -= size
            self._changed.notify_all()
            return self._written, within_s

    def _time_for_mongodb(self) -> float:
        """Return how many seconds it has: none where more waits than there is time for."""
        if self._is_closing:
            return PUSHES_TAKEN_LAST_S if self._waiting <= 2 * WRITE_BATCH else 0.0
        if self._waiting > CROWDED and time.monotonic() - self._pending[0].arrived > CROWDED_S:
            return 0.0
        return PUSHES_TAKEN_S

    def _await_more(self) -> None:
        """Wait until a batch is full, or its first trade has waited long enough."""
        while self._pending and self._waiting < WRITE_BATCH and not self._is_closing:
            left = self._pending[0].arrived + PUSHES_WAIT_S - time.monotonic()
            if left <= 0:
                return
            self._changed.wait(left)

    def _write(self, batch: Sequence[Parcel], within_s: float) -> None:
        created = utc_now().replace(tzinfo=None)
        documents = [to_document(trade, created) for parcel in batch for trade in parcel.trades]
        try:
            written = self._put(documents, within_s)
        except StockrtError as error:
            self._refuse(batch, None, error.message)
            return
        except Exception as error:  # nobody else looks at this thread
            self._refuse(batch, None, own_fault(error))
            return
        self.stored += written.stored + written.queued
        self.duplicates += written.duplicates
        if written.refused:
            self._refuse(batch, written.refused, next(iter(written.refused.values())))
        elif self.trouble:
            self._coverage.stored()
            self._trouble.over()
            self.trouble = ""
        now = time.monotonic()
        with self._changed:
            for parcel in batch:
                self._delays.add((now - parcel.arrived) * 1000, len(parcel.trades))

    def _put(self, documents: Sequence[Document], within_s: float) -> WriteReport:
        try:
            return self._pipeline.put(documents, within_s)
        except StoreError:
            if within_s:
                raise
        return self._pipeline.put(documents, PUSHES_TAKEN_S)  # the disk is full, and MongoDB only slow

    def _refuse(self, batch: Sequence[Parcel], refused: Mapping[str, str] | None, why: str) -> None:
        """Count, say and note as missing what the store does not take; `refused`: by `_id`, None for everything."""
        if self._is_over:  # the store is closed, and it is missing since the mark
            return
        names: set[str] = set()
        for parcel in batch:
            gone = [trade.s for trade in parcel.trades if refused is None or identity(trade) in refused]
            self.refused += len(gone)
            names |= {*gone}
            if gone:
                self._coverage.not_stored(parcel, {*gone}, f"not stored: {why}")
        self.trouble = phrase("collection.not_stored", codes=first_few(sorted(names)), why=why)
        self._trouble.again(self.trouble)


# A trade this much older than its push says nothing of when it was pushed.
OLD_PUSH_MS = 60_000


def _moment(trade: Trade, arrived_ms: int) -> int:
    """Return since when (epoch ms), by its arrival and its own time, what comes after a trade is to be looked for."""
    t = trade.t
    if t % 1000 == 999:  # of whole seconds
        t -= 999
    if arrived_ms - t > OLD_PUSH_MS:
        return arrived_ms
    return min(t, arrived_ms)


# ------------------------------------------------------------------------------------------------------
# The stream's connections
# ------------------------------------------------------------------------------------------------------

# As to the platform: quick at first, slowly slower.
STREAM_FIRST_S, STREAM_CAP_S, STREAM_GROWTH = 1.0, 30.0, 1.3
# A connection that stood so long was a good one: the next is dialled quickly again.
STREAM_GOOD_S = 60.0
# So long at most it is waited for what a connection brings: its thread is woken when there is something to do.
STREAM_READ_S = 600.0


class Feed(threading.Thread):
    """One connection to the stream with its thread: dials, hands on what comes, dials again; until told to leave.

    `end`: why it does so no more by itself. `missing_since`: when its codes were lost last, or others were wanted.
    """

    def __init__(
        self,
        allotment: Allotment,
        connection: StreamConnection,
        coverage: Coverage,
        intake: Intake,
        events: Events,
    ) -> None:
        super().__init__(name=f"stockrt-stream-{allotment.product}", daemon=True)
        self.allotment = allotment
        self.part = coverage.add(allotment.product)
        self.state = "connecting"
        self.why = ""
        self.since = self.missing_since = time.monotonic()
        self.end: StreamEnd | None = None
        self._connection = connection
        self._coverage = coverage
        self._intake = intake
        self._events = events
        self._leaving = threading.Event()
        self._trouble = LogThrottle(f"stream {allotment.product}", then="dialling again")
        self._refusal = LogThrottle(f"stream {allotment.product}", then="polled instead")
        self._odd = LogThrottle(f"stream {allotment.product}", then="passed over")

    def want(self, allotment: Allotment) -> None:
        """Bring these codes from now on."""
        self.allotment = allotment
        self.missing_since = time.monotonic()
        self._coverage.expect(self.part, allotment.codes)
        self._connection.want(allotment.codes)

    def facts(self) -> StreamFacts:
        """Return how it stands with the connection."""
        part = self.part
        return StreamFacts(
            product=part.product,
            codes=len(part.codes),
            subscribed=len(part.acked),
            state=self.state,
            why=self.why,
        )

    def leave(self) -> None:
        """End, soon."""
        self._leaving.set()
        self._connection.wake()

    def run(self) -> None:
        """Work until told to leave, or the stream says that it is of no use."""
        delays = self._fresh_delays()
        while not self._leaving.is_set():
            self._turn("connecting")
            end = self._serve()
            self._connection.close()
            if end is None:
                return
            if self.part.acked:
                self.missing_since = time.monotonic()
            self._coverage.lost(self.part, end.words)
            self.why = end.words
            if end.action in (StreamAction.NEVER, StreamAction.KEY_OUT):
                self._turn("given up")
                self.end = end
                self._coverage.news.set()
                return
            self._trouble.again(end.words)
            if self.state == "connected" and time.monotonic() - self.since >= STREAM_GOOD_S:
                delays = self._fresh_delays()
            self._turn("waiting")
            self._leaving.wait(end.wait_s if end.action is StreamAction.WAIT else next(delays))

    def _fresh_delays(self) -> Iterator[float]:
        return backoff(STREAM_FIRST_S, STREAM_CAP_S, random.Random(), STREAM_GROWTH)

    def _turn(self, state: str) -> None:
        self.state, self.since = state, time.monotonic()
        self._intake.came.set()

    def _serve(self) -> StreamEnd | None:
        """Dial, and hand on what comes until the connection is over; None: told to leave."""
        try:
            end = self._connection.open()
            if end is None:
                self._turn("connected")
            while end is None and not self._leaving.is_set():
                end = self._take(self._connection.read(time.monotonic() + STREAM_READ_S))
        except Exception as error:  # nobody else looks at this thread
            words = fault_words(error, self._events, is_said=self._trouble.there)
            return StreamEnd(words, StreamAction.DIAL_AGAIN)
        return end

    def _take(self, received: Pushes) -> StreamEnd | None:
        """Hand on what has come, and return the end of the connection if that is in it."""
        if received.trades:
            sign = self._intake.add(self.part.product, received.trades)
            if self.part.heard <= time.time() * 1000:  # else the clock was set back
                sign = max(self.part.heard, sign)
            self.part.heard = sign
        if received.dropped:
            self._intake.drop(received.dropped)
            self._odd.again(received.why)
        for event in received.events:
            if isinstance(event, StreamEnd):
                return event
            self._note(event)
        return None

    def _note(self, event: StreamEvent) -> None:
        if isinstance(event, Subscribed):
            self._coverage.acked(self.part, event.codes)
            self._intake.came.set()
            self.why = ""
            self._trouble.over()
        elif isinstance(event, CodesRefused):
            self.why = event.words
            self._coverage.refused(self.part, event.codes, event.words)
            codes = count_words(len(event.codes), "code")
            names = first_few(event.codes)
            self._refusal.again(phrase("collection.refused", codes=codes, names=names, why=event.words))
        elif isinstance(event, Silent):
            self._coverage.silent(self.part, event.codes)
            self._odd.again(phrase("collection.silent", seconds=event.seconds))
        elif isinstance(event, Said):
            self._odd.again(event.words)


# ------------------------------------------------------------------------------------------------------
# The whole of it
# ------------------------------------------------------------------------------------------------------

# What the stream does not bring is polled this often, or seldom enough that a day's quota lasts.
POLL_INSTEAD_S = 10.0
POLL_SHARE = 0.5
# Codes of a connection that has just been dialled, or dropped, are not polled yet.
POLL_SOON_S = 10.0
# Subscriptions come in frames: what is fetched after them is fetched together.
BACK_TOGETHER_S = 0.5
# What fails is tried again.
PLAN_AGAIN_S = 10.0
# What the keys allow may have changed, or could not be had before.
LIMITS_AGAIN_S = 300.0
# How long leaving may take: for what connections and requests are at, and for what waits to be written.
LEAVE_POLL_S, LEAVE_INTAKE_S = 0.7, 1.1
# And a connection whose codes are wanted no more, before others are dialled.
LEAVE_FEED_S = 2.0


class Planner(threading.Thread):
    """Spreads the codes over connections, fetches what was missed, and polls what the stream does not bring."""

    def __init__(
        self,
        pipeline: Pipeline,
        settings: Settings,
        watch: WatchList,
        coverage: Coverage,
        intake: Intake,
        events: Events,
    ) -> None:
        super().__init__(name="stockrt-collect", daemon=True)
        self.feeds: list[Feed] = []
        self.polled = 0
        self.stored = self.duplicates = 0  # of the trades that were asked for
        self.trouble = ""
        self._pipeline = pipeline
        self._settings = settings
        self._watch = watch
        self._coverage = coverage
        self._intake = intake
        self._events = events
        self._leaving = threading.Event()
        self._listed: Sequence[str] | None = None
        self._wanted: dict[str, list[str]] = {}  # by product
        self._is_spread = False
        self._never: dict[
            str, dict[str, str]
        ] = {}  # by key and product, '' for all of them: why it is of no use
        self._back: set[str] = set()  # codes whose latest trades are to be fetched
        self._silences: list[Gap] = []  # of which that is to tell whether anything was missed
        self._limits: dict[str, StreamLimits] = {}  # by key
        self._limits_at = 0.0  # monotonic, as are:
        self._back_at = 0.0
        self._poll_at = 0.0
        self._gaps_at = 0.0
        self._rest_said: tuple[object, ...] = ()
        then = "trying again"
        self._trouble = LogThrottle("collecting", then=then)
        self._troubles = Troubles(settings, then)
        self._code_trouble = LogThrottle("collecting", then="they are asked for again")
        self._gap_trouble = LogThrottle(
            "stream_gaps", then="they are kept on this machine until MongoDB takes them"
        )

    def given_up(self) -> list[str]:
        """Return why keys are of no use for the stream, or for a product of it."""
        return [words for whys in [*self._never.values()] for words in [*whys.values()]]

    def leave(self) -> None:
        """End, soon; of a poll that goes on what was fetched is stored."""
        self._leaving.set()
        self._coverage.news.set()

    def run(self) -> None:
        """Work until told to leave."""
        self._go_on()
        for feed in self.feeds:  # one may have begun since all were told to
            feed.leave()

    def _go_on(self) -> None:
        while not self._leaving.is_set():
            wait_s, words = PLAN_AGAIN_S, ""
            try:
                wait_s = self._work()
            except Exception as error:  # nobody else looks at this thread
                words = fault_words(error, self._events, is_said=self._trouble.there)
            if self._leaving.is_set():
                return
            if words:
                self._trouble.again(words)
            else:
                self._trouble.over()
            self.trouble = words
            if self._coverage.news.wait(wait_s):
                self._coverage.news.clear()
                self._leaving.wait(BACK_TOGETHER_S)

    def _work(self) -> float:
        """Do what is to be done now, and return after how many seconds to look again. Raises StockrtError."""
        need_clock(time.time())
        self._plan()
        self._coverage.complete()
        fetch_s = self._fetch()
        waits = (self._watch.wait_s(), fetch_s, self._poll_instead(), self._deliver_gaps(), LIMITS_AGAIN_S)
        return min(waits)

    def _fetch(self) -> float:
        """Fetch what was missed; return after how many seconds to try again what fails for no fault of the codes."""
        back, silences = self._coverage.to_fetch()
        self._back |= back
        self._silences += silences
        now = time.monotonic()
        if (self._back or self._silences) and now >= self._back_at:
            if self._back:
                _, self._back = self._poll(sorted(self._back))
            for silence in [*self._silences]:
                new, failed = self._poll(silence.codes)
                if new:
                    self._coverage.was_deaf(silence)
                if new or not failed:
                    self._silences.remove(silence)
            if self._back or self._silences:
                self._back_at = now + self._pause_s(len(self._back))
        return max(0.0, self._back_at - time.monotonic()) if self._back or self._silences else math.inf

    def _plan(self) -> None:
        """Look at the list, and spread the codes where it has changed or a connection is of no use any more."""
        codes = self._watch.codes()
        over = [(feed, feed.end) for feed in self.feeds if feed.end is not None]
        if self._look_at_limits() or over or codes is not self._listed:
            self._is_spread = False
        if self._is_spread:
            return
        if codes is not self._listed:
            self._read(codes)
            self._listed = codes
        for feed, end in over:
            what = "" if end.action is StreamAction.KEY_OUT else feed.allotment.product
            never = self._never.setdefault(feed.allotment.key, {})
            if what not in never:
                log.error(
                    "stream %s: %s; what no other key brings is polled instead",
                    feed.allotment.product,
                    end.words,
                )
            never[what] = end.words
            self._coverage.drop(feed.part)
            self.feeds.remove(feed)
        self._spread()
        self._is_spread = True

    def _look_at_limits(self) -> bool:
        """Ask now and then what keys allow, and return whether that has changed."""
        now, before = time.monotonic(), self._limits
        if now >= self._limits_at:
            self._limits = self._pipeline.stream_limits(self._leaving)
            self._limits_at = now + LIMITS_AGAIN_S
        return self._limits != before

    def _read(self, codes: Sequence[str]) -> None:
        """Find out what the codes mean."""
        found = resolve(codes, self._pipeline.directory, self._leaving)
        if found.refused:
            codes = count_words(len(found.refused), "code")
            log.error("%s not collected: %s", codes, found.refused_words())
        wanted: dict[str, list[str]] = {}
        for instrument in found.instruments.values():
            wanted.setdefault(instrument.product, []).append(instrument.code)
        self._coverage.want(wanted)
        self._wanted = wanted

    def _spread(self) -> None:
        """Let connections bring what they can."""
        limits = {
            digest: one._replace(not_for=one.not_for | self._never.get(digest, {}).keys())
            for digest, one in self._limits.items()
            if "" not in self._never.get(digest, ())
        }
        before = [feed.allotment for feed in self.feeds]
        allotments, rest = allot(self._wanted, limits, before)
        goes_on: dict[Feed, Allotment] = {}
        for is_same in (_brings_some, _can_bring):
            for feed in self.feeds:
                found = next((one for one in allotments if is_same(feed.allotment, one)), None)
                if found is not None and feed not in goes_on:
                    allotments.remove(found)
                    goes_on[feed] = found
        gone = [feed for feed in self.feeds if feed not in goes_on]
        for feed in gone:
            feed.leave()
            self._coverage.drop(feed.part)
        self.feeds = [*goes_on]
        for feed, allotment in goes_on.items():
            if allotment != feed.allotment:
                feed.want(allotment)
        until = time.monotonic() + LEAVE_FEED_S
        for feed in gone:  # the key may have no connection more
            feed.join(max(0.0, until - time.monotonic()))
        for allotment in allotments:
            self.feeds.append(self._begin(allotment))
        self._say_rest(rest)

    def _begin(self, allotment: Allotment) -> Feed:
        """Start a connection. Raises StockrtError where there is no thread, or this ends."""
        settings, product = self._settings, allotment.product
        secret = next(key.secret for key in self._pipeline.keys.keys if key.digest == allotment.key)
        if self._leaving.is_set():
            raise Interrupted(phrase("tools.stopped"))
        connection = StreamConnection(settings.stream_url, product, secret, settings.proxies)
        feed = Feed(allotment, connection, self._coverage, self._intake, self._events)
        feed.want(allotment)
        try:
            start_thread(feed)
        except StockrtError:
            self._coverage.drop(feed.part)
            raise
        return feed

    def _say_rest(self, rest: Mapping[str, Sequence[str]]) -> None:
        """Say what connections bring, and how many codes they do not."""
        streamed = sum(len(feed.allotment.codes) for feed in self.feeds)
        codes, connections = count_words(streamed, "code"), count_words(len(self.feeds), "connection")
        left = count_words(sum(map(len, rest.values())), "code")
        by_product = ", ".join(f"{len(codes)} {product}" for product, codes in rest.items() if codes)
        said = (codes, connections, by_product, bool(self._never))
        if said == self._rest_said:
            return
        self._rest_said = said
        why = phrase("collection.no_key" if self._never else "collection.over_plans")
        if by_product:
            log.warning(
                "stream: %s over %s; %s polled instead, %s (%s)", codes, connections, left, why, by_product
            )
        else:
            log.info("stream: %s over %s", codes, connections)

    # over REST

    def _instead(self) -> list[str]:
        """Return the codes that no connection brings now, but for those that one is about to."""
        now = time.monotonic()
        held = self._coverage.subscribed()
        for feed in self.feeds:
            if feed.state != "given up" and now - feed.missing_since < POLL_SOON_S:
                held.setdefault(feed.allotment.product, set()).update(feed.allotment.codes)
        return [
            code
            for product, codes in self._wanted.items()
            for code in codes
            if code not in held.get(product, ())
        ]

    def _poll_instead(self) -> float:
        """Poll now and then what the stream does not bring; return after how many seconds to look again."""
        codes = self._instead()
        if len(codes) != self.polled:
            self.polled = len(codes)
            self._intake.came.set()  # it is to be told now
        wait_s = math.inf
        if codes:
            now = time.monotonic()
            if now >= self._poll_at:
                self._poll(codes)
                self._poll_at = now + self._pause_s(len(codes))
            wait_s = max(0.0, self._poll_at - time.monotonic())
        if self._is_waiting():
            wait_s = min(wait_s, 1.0)
        return wait_s

    def _pause_s(self, codes: int) -> float:
        """Return in how many seconds so many codes are polled again: a day's quota has to last, for others too."""
        plans = [key.plan for key in self._pipeline.keys.keys if not key.dead]
        if not plans or not all(plan.per_day for plan in plans):
            return POLL_INSTEAD_S
        requests = codes / MAX_BATCH + len(self._wanted)
        return max(POLL_INSTEAD_S, requests * DAY_S / sum(plan.per_day for plan in plans) / POLL_SHARE)

    def _is_waiting(self) -> bool:
        """Whether codes of a connection that does not stand may have to be polled soon."""
        return any(len(feed.part.acked) < len(feed.part.codes) for feed in self.feeds)

    def _poll(self, codes: Sequence[str]) -> tuple[int, set[str]]:
        """Fetch the latest trades of codes; return how many are new, and of which codes that is not known.

        Raises StockrtError.
        """
        report = self._pipeline.poll(codes, self._leaving)
        unknown = {code for code, one in report.failures.items() if one.kind in TROUBLES}
        if report.store_error:
            unknown = {*codes}
        if not report.interrupted:
            self._troubles.note(report)
            failed = {code: one for code, one in report.failures.items() if one.kind in OF_THE_CODE}
            if failed:
                self._code_trouble.again(failed_words(failed, report.total))
        self.stored += report.stored + report.queued
        self.duplicates += report.duplicates
        return report.stored + report.queued, unknown

    def _deliver_gaps(self) -> float:
        """Bring gaps to MongoDB; return after how many seconds to try again."""
        now = time.monotonic()
        if now < self._gaps_at:
            return self._gaps_at - now
        try:
            while self._pipeline.gaps.deliver() and not self._leaving.is_set():
                pass
        except StoreAway as error:
            if not self._leaving.is_set():  # else it is closed already
                self._gap_trouble.again(error.message)
            self._gaps_at = now + PLAN_AGAIN_S
            return PLAN_AGAIN_S
        self._gap_trouble.over()
        return math.inf


def _can_bring(before: Allotment, now: Allotment) -> bool:
    """Whether a connection that stands can bring an allotment."""
    return (before.key, before.product) == (now.key, now.product)


def _brings_some(before: Allotment, now: Allotment) -> bool:
    """Whether a connection that stands brings some of an allotment already."""
    return _can_bring(before, now) and not {*before.codes}.isdisjoint(now.codes)


class Collecting:
    """Collecting without pause: the stream, or a poll on a fixed beat, as COLLECT and COLLECT_EVERY say.

    `start` raises StockrtError where that cannot be; `close` takes about two seconds at most. The pipeline stays open
    from before the one until after the other. One process in each state directory collects from the stream.
    """

    def __init__(self, pipeline: Pipeline, settings: Settings, events: Events = NO_EVENTS) -> None:
        self._pipeline = pipeline
        self._settings = settings
        self._events = events
        watch = WatchList(settings, pipeline.mongo)
        self._poller = Poller(pipeline, settings, watch, events)
        self._coverage = Coverage(pipeline.gaps, settings.state_directory)
        self._intake = Intake(pipeline, self._coverage)
        self._planner = Planner(pipeline, settings, watch, self._coverage, self._intake, events)
        self._clerk = threading.Thread(target=self._look_after, name="stockrt-mark", daemon=True)
        self._stop = threading.Event()
        self._lock: IO[str] | None = None
        self._gaps_today = self._gaps_open = 0

    def start(self) -> None:
        """Begin. Raises StockrtError."""
        self._pipeline.need_key()
        if self._settings.collect_codes == WATCH and self._pipeline.mongo is None:
            raise SettingsError([phrase("settings.watch_needs_mongodb", what="COLLECT_CODES=watch")])
        try:
            if self._settings.collect:
                who = phrase("collection.another")
                self._lock = lock_in(self._settings.state_directory, "collecting.lock", who)
                self._intake.start()
                start_thread(self._planner)
                start_thread(self._clerk)
            else:
                start_thread(self._poller)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End: what was pushed is stored, or waits for MongoDB on this machine."""
        self._stop.set()
        self._intake.came.set()
        self._planner.leave()
        self._poller.leave()
        for feed in self._planner.feeds:
            feed.leave()
        until = time.monotonic() + LEAVE_POLL_S
        for thread in (*self._planner.feeds, self._planner, self._poller):
            if thread.ident is not None:
                thread.join(max(0.0, until - time.monotonic()))
        self._intake.close(LEAVE_INTAKE_S)
        if self._lock is not None:
            self._coverage.look()
            self._coverage.close(self._intake.durable_ms())
            self._lock.close()
            self._lock = None

    def stats(self) -> CollectStats:
        """Return what it does now."""
        if not self._settings.collect:
            return self._poller.stats()
        feeds, intake = [*self._planner.feeds], self._intake
        p50, p99, per_second = intake.lately()
        troubles = (
            self._planner.trouble,
            intake.trouble,
            *(feed.why for feed in feeds),
            *self._planner.given_up(),
        )
        return CollectStats(
            connections=sum(feed.state == "connected" for feed in feeds),
            connections_wanted=len(feeds),
            codes=sum(len(feed.part.acked) for feed in feeds),
            polled=self._planner.polled,
            per_second=per_second,
            delay_p50_ms=p50,
            delay_p99_ms=p99,
            gaps_today=self._gaps_today,
            trades=intake.trades + self._planner.stored + self._planner.duplicates,
            stored=intake.stored + self._planner.stored,
            duplicates=intake.duplicates + self._planner.duplicates,
            dropped=intake.dropped,
            trouble=next(filter(None, troubles), ""),
            streams=[feed.facts() for feed in feeds],
            gaps_open=self._gaps_open,
        )

    def _look_after(self) -> None:
        """Write the mark, and tell how it goes on."""
        while not self._stop.is_set():
            self._intake.came.wait(MARK_SILENT_S)
            self._intake.came.clear()
            self._coverage.look()
            self._coverage.mark(self._intake.durable_ms())
            self._gaps_open = self._coverage.missing()
            with contextlib.suppress(StoreError):  # said by whoever notes one
                self._gaps_today = self._pipeline.gaps.count_since(utc_day(time.time()))
            self._events.collecting(self.stats())
            self._stop.wait(MARK_S)


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
# Failures that a result explains.
FAILURES_LISTED = 100


class Command(NamedTuple):
    """An `execute` that was understood. `context` is what the answer repeats: meta, workflow_id, …

    Without `codes` it means those of COLLECT_CODES.
    """

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

    def __init__(self, heartbeat_s: float, now: float, clock: Clock = SYSTEM_CLOCK) -> None:
        self._heartbeat_s = heartbeat_s
        self._clock = clock
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
        try:
            message = _unwrap(text)
        except UsageError as error:
            return [Refused({}, error.message)] if "execute" in text else []
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
            return [PeerDead(phrase("protocol.silent", seconds=now - self._heard_at))]
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

    def _stamp(self) -> str:
        """Return the time as the server writes it: local, ISO 8601, without a zone."""
        return datetime.fromtimestamp(self._clock.wall(), UTC).astimezone().replace(tzinfo=None).isoformat()


def _unwrap(text: str) -> dict[str, Any] | str:
    """Return the object that a frame carries: bare, in `message`, or as JSON text in `message`; else its text.

    Raises UsageError where it cannot be read for its depth.
    """
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
    """Return what a text holds, None if that is no JSON. Raises UsageError where it is too deep to tell."""
    try:
        return json.loads(text)
    except RecursionError:
        raise UsageError(_too_deep()) from None
    except ValueError:
        return None


def read_execute(message: Mapping[str, Any]) -> Command | Refused:
    """Return the command that an `execute` object holds, or why it cannot be understood."""
    if is_deep(message):
        flat = {name: _without_lists(value) for name, value in message.items()}
        return Refused(read_context(flat)[1], _too_deep())
    execution_id, context = read_context(message)
    try:
        return Command(execution_id, context, read_args(message.get("args")))
    except UsageError as error:
        return Refused(context, error.message)


def _too_deep() -> Phrase:
    return phrase("protocol.too_deep", levels=MAX_DEPTH)


def _without_lists(value: object) -> object:
    """Return of a value what is flat."""
    if isinstance(value, dict):
        return {name: inner for name, inner in value.items() if not isinstance(inner, list | dict)}
    return None if isinstance(value, list) else value


def read_context(message: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return of an `execute` its id, '' without one, and what its answer repeats."""
    meta = message.get("meta")
    known: Mapping[str, Any] = meta if isinstance(meta, dict) else {}
    context = {name: known.get(name, message.get(name)) for name in ("workflow_id", "workflow_name")}
    context |= {name: message[name] for name in ("meta", "execution_id") if name in message}
    execution_id = known.get("execution_id", message.get("execution_id"))
    return str(execution_id) if isinstance(execution_id, str | int) else "", context


def read_args(args: object) -> list[object]:
    """Return the codes in an execute's `args`, whatever shape a person gave them, [] where none are named.

    None are named by what is missing, null or blank. An empty list is another thing: whatever made it found nothing
    to ask for, and is not to get everything. Raises UsageError.
    """
    if isinstance(args, str) and args.strip()[:1] in ("{", "["):
        args = _parsed_args(args)
    if isinstance(args, dict):
        args = _named_codes(args)
    if _is_blank(args):
        return []
    if isinstance(args, int | float) and not isinstance(args, bool):
        args = [args]
    if not isinstance(args, str | list):
        raise _no_codes(one_line(json.dumps(args), 60))
    codes = _flat(args if isinstance(args, list) else [args])
    if not codes:
        raise UsageError(phrase("protocol.empty_list"))
    if len(codes) > MAX_CODES_PER_COMMAND:
        raise UsageError(phrase("protocol.many_codes", codes=len(codes), most=MAX_CODES_PER_COMMAND))
    return codes


def _parsed_args(text: str) -> object:
    """Return what a text holds that looks like JSON. Raises UsageError."""
    found = _json_or_none(text)
    if is_deep(found):
        raise UsageError(_too_deep())
    if found is None:
        raise _no_codes(one_line(text, 60))
    return found


def _named_codes(args: Mapping[str, object]) -> object:
    """Return what stands under a name for codes, None where that is blank. Raises UsageError."""
    named = [args[name] for name in CODE_ARGUMENTS if name in args]
    filled = [value for value in named if not _is_blank(value)]
    if not (named or all(map(_is_blank, args.values()))):  # a misspelled name may stand for it
        raise _no_codes(one_line(", ".join(map(str, args)), 80))
    return next((value for value in filled if value != []), filled[0] if filled else None)


def _is_blank(value: object) -> bool:
    """Whether somebody left a value out: it is null, or a text without a code and without a list, as `[]` is one."""
    return value is None or (isinstance(value, str) and not (split_codes(value) or "[" in value))


def _no_codes(came: str) -> UsageError:
    return UsageError(phrase("protocol.no_codes", came=came))


def _flat(items: Sequence[object]) -> list[object]:
    """Return codes one by one: a person also types several into one element. Blank elements are none."""
    with contextlib.suppress(TypeError):  # as nearly always: texts alone
        return [*split_codes(",".join(cast(Sequence[str], items)))]
    codes: list[object] = []
    for item in items:
        codes += split_codes(item) if isinstance(item, str) else [item]
    return codes


class Result(NamedTuple):
    """The answer of a command or a run: `text` for the platform, in its language; `said`: its words in all of them.

    That is JSON with `message` and `failures`, see `packed`.
    """

    text: str
    said: str = ""


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
    return json.dumps(answer | {"result": {"status": status, "status_detail": status, **result}})


def report_result(context: Mapping[str, Any], report: Report, settings: Settings) -> Result:
    """Return the result of a run: `success` when something is in the store, and nothing waits for it."""
    good = report.reached > 0 and not report.store_error and not report.queued
    listed = islice(report.failures.items(), FAILURES_LISTED)
    message, failures = _result_words(report), {code: failure.words for code, failure in listed}
    result = {
        "status_detail": report.outcome,
        "total": report.total,
        "success_count": report.reached,
        "duplicate_count": report.duplicates,
        "kept_count": report.queued,
        "failed_count": len(report.failures),
        "failed_stocks": list(report.failures),
        "failures": {code: _for_platform(words, settings) for code, words in failures.items()},
        "read_as": report.read_as,
        "stale_count": report.stale,
        "took_ms": round(report.took_s * 1000),
    }
    text = make_result(context, settings.module_name, _for_platform(message, settings), result, good)
    return Result(text, _said(message, failures))


def _for_platform(words: str, settings: Settings) -> str:
    """Return words as a result has them: in the platform's language, without secrets."""
    return settings.redact(local_times(in_language(words, settings.message_language)))


def _said(message: str, failures: Mapping[str, str]) -> str:
    """Return what a result says for whoever reads the journal, in whatever language."""
    return json.dumps(packed({"message": message, "failures": failures}))


def _result_words(report: Report) -> Phrase:
    """Return the message: what failed comes first."""
    reached, total = report.reached, report.total
    if report.store_error:
        return phrase("protocol.store_failed", reached=reached, total=total, why=report.store_error)
    words: list[str] = []
    if report.failures:
        words.append(failed_words(report.failures, report.total))
    if report.close_error:
        words.append(report.close_words())
    if report.queued:
        words.append(report.queued_words())
    if report.reached or not report.queued:
        words.append(phrase("protocol.stored", reached=reached, total=total))
    if report.read_as:
        words.append(phrase("events.read_as", codes=report.read_as_words()))
    if report.stale:
        words.append(report.stale_words())
    return listing("join.clauses", words)


# The kind of what the message of a result says whose lists were left out.
WITHOUT_LISTS = "protocol.without_lists"


def without_lists(text: str) -> str:
    """Return a result that the platform did not take for its size without what makes it long; counts stay."""
    try:
        answer = _json_or_none(text)
        message = answer["message"]
        if any(words in message for words in TEMPLATES[WITHOUT_LISTS]):
            return text
        # in Chinese: before somebody else's words come, which follow such a sign, are those of ours
        language = CHINESE if re.match("[^:(]*[\u4e00-\u9fff]", message) else ENGLISH
        why = phrase("protocol.too_long", what=phrase(WITHOUT_LISTS), bytes=len(text))
        answer["result"] |= {"failed_stocks": [], "failures": {}}
        answer["message"] = in_language(listing("join.clauses", [message, why]), language)
    except (KeyError, TypeError, UsageError):
        return text  # what a bad disk made of it
    if "error" in answer:
        answer["error"] = answer["message"]
    return json.dumps(answer)


def empty_result(context: Mapping[str, Any], reason: str, settings: Settings) -> Result:
    """Return the result of a command that was not executed."""
    numbers = (
        "total",
        "success_count",
        "duplicate_count",
        "kept_count",
        "failed_count",
        "stale_count",
        "took_ms",
    )
    result: dict[str, object] = dict.fromkeys(numbers, 0) | {
        "failed_stocks": [],
        "failures": {},
        "read_as": {},
    }
    message = _for_platform(reason, settings)
    text = make_result(context, settings.module_name, message, result, good=False)
    return Result(text, _said(reason, {}))


# ======================================================================================================
# Platform link: registration, presence, WebSocket
# ======================================================================================================

HASH_NAME = "module_hash"
# Where the older client of this platform kept its hash, below its working directory.
OLD_HASH_FILE = Path("config/module_hash.txt")
# The server's own: at most 64 characters; nothing else may stand behind `hash=`.
_HASH = r"[A-Za-z0-9_+=-]{1,64}"
MISSION_KIND = "realtime"


def read_hash(directory: Path) -> str:
    """Return the stored hash, '' where there is none; an older installation's is taken over.

    Raises StoreError when the file cannot be read or holds no hash.
    """
    found = hash_in(directory / HASH_NAME)
    if not found:
        found = hash_in(OLD_HASH_FILE)
        if found:
            write_hash(directory, found)
            log.info("the module hash of an older installation was taken over from %s", OLD_HASH_FILE)
    return found


def hash_in(place: Path, setting: str = "STATE_DIRECTORY") -> str:
    """Return the hash that a file holds, '' where there is no file. Raises StoreError, which names the setting."""
    try:
        found = read_file(place).strip()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        why = unread_words(error)
        raise StoreError(phrase("link.hash_unread", place=place, why=why, setting=setting)) from None
    if not re.fullmatch(_HASH, found):
        raise StoreError(phrase("link.no_hash", place=place))
    return found


def write_hash(directory: Path, module_hash: str) -> None:
    """Store the hash: whole or not at all, readable by this user alone. Raises StoreError."""
    make_state_directory(directory)
    write_whole(directory / HASH_NAME, module_hash + "\n", durable=True)


def program_digest() -> str:
    """Return a digest of this program: a new release registers as a new module. Raises StoreError."""
    with disk_trouble(phrase("link.program_unread"), phrase("link.its_place")):
        return sha256(Path(__file__).read_bytes())[:32]


def register(settings: Settings) -> str:
    """Register at the platform and return the hash it gave. Raises RegistrationError, StoreError."""
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
    answer = get_once(url, f"/module/register?{urlencode(query)}", PLATFORM_LIMITS, settings.proxies)
    envelope = json_object(answer.body) or {}
    result = envelope.get("result")
    module_hash = str(result.get("hash") or "") if isinstance(result, dict) else ""
    if envelope.get("code") == "2000" and re.fullmatch(_HASH, module_hash):
        return module_hash
    why = _why_not_registered(answer, envelope)
    raise RegistrationError(phrase("link.not_registered", url=url, why=why))


def _why_not_registered(answer: Response, envelope: Mapping[str, Any]) -> Phrase:
    code = envelope.get("code")
    if answer.fault:
        return phrase("link.no_answer", why=answer.fault)
    if code == "3005":
        return phrase("link.exists", file=HASH_NAME)
    if code == "3002":
        return phrase("link.invalid")
    if code == "2000":
        return phrase("link.success_without_hash")
    if answer.status >= 500:
        return phrase("link.inner_fault", status=answer.status)
    said = words_of(envelope) or not_json_words(answer.body, phrase("link.platforms"))
    return phrase("link.refused", status=answer.status, said=said)


def check_platform(settings: Settings) -> Check:
    """Ask the platform who is online; say whether it answers as one, and whether there is a hash for it."""
    url, faults, clauses = settings.platform_url(), [], [phrase("link.answers", url=settings.platform_url())]
    response = get_once(url, "/module/online", PLATFORM_LIMITS, settings.proxies)
    if response.fault:
        words = phrase("link.unreachable", url=url, why=response.fault)
        faults.append(see(words, phrase("link.server_settings")))
    elif (json_object(response.body) or {}).get("code") != "2000":
        faults.append(phrase("link.no_platform", url=url, status=response.status))
    try:
        if not (hash_in(settings.state_directory / HASH_NAME) or hash_in(OLD_HASH_FILE)):
            clauses.append(phrase("link.registers"))
    except StoreError as error:
        faults.append(error.message)
    return Check(phrase("link.platform"), not faults, listing("join.clauses", faults or clauses))


class Presence(Enum):
    """What `/module/online` says of our hash: the kind of its words."""

    ONLINE = "link.online"
    UNKNOWN = "link.unknown"
    UNCLEAR = "link.unclear"


def ask_presence(settings: Settings, module_hash: str) -> Presence:
    """Ask the platform which of the two meanings a refused handshake has."""
    answer = get_once(settings.platform_url(), "/module/online", PLATFORM_LIMITS, settings.proxies)
    envelope = json_object(answer.body) or {}
    modules = envelope.get("result")
    if envelope.get("code") != "2000" or not isinstance(modules, list):
        return Presence.UNCLEAR
    hashes = [str(module.get("module_hash")) for module in modules if isinstance(module, dict)]
    return Presence.ONLINE if module_hash in hashes else Presence.UNKNOWN


# ------------------------------------------------------------------------------------------------------
# Dialling
# ------------------------------------------------------------------------------------------------------

# A server that is away comes back within seconds or hours: quick at first, slowly slower, never above 30 s.
# With a first delay of up to 1 s and a growth of 1.3 a server that was away for 5 s is met after about 1 s.
DIAL_FIRST_S, DIAL_CAP_S, DIAL_GROWTH = 1.0, 30.0, 1.3
# After a kill -9 the server counts our session online for up to 120 s, and looks once a minute: so long it is dialled
# every second, to be back as soon as it lets go. A second instance with our hash may stay: seldom then, as above.
OLD_SESSION_S = 190.0
OLD_SESSION_DIAL_S = (0.5, 1.0)


class Link(WebSocket):
    """The WebSocket to the platform."""

    def __init__(self, settings: Settings, module_hash: str, limits: Limits = DIAL_LIMITS) -> None:
        address = f"{settings.platform_url()}/websocket?hash={module_hash}"
        super().__init__(address, limits, settings.proxies, max_bytes=MAX_FRAME_BYTES)


# ======================================================================================================
# Command journal
# ======================================================================================================
#
# Promises:
#   1. A command that was accepted is on disk until it is answered, its answer until the platform's receipt.
#   2. An `execution_id` is executed once; asked again it gets the same answer, word for word.
#   3. What is given up (answers older than an hour) is said.

JOURNAL_NAME = "executions.db"
JOURNAL_VERSION = 3
# Commands whose answers are kept for an `execution_id` that comes again, and to be looked at: the last ones.
ANSWERS_KEPT = 1000
# The platform has e-mailed the time-out of an execution long before; a later answer would only confuse.
ANSWER_LIFETIME_S = 3600.0
# A clock that is so far off from where it was has been set; one that is only corrected slowly has not.
CLOCK_SET_S = 2.0
# After this the platform counts an execution as timed out: doing it then helps nobody.
EXECUTION_LIFETIME_S = 120.0


class Accepted(NamedTuple):
    """A command in the journal: its number, who asked (`context`) and for what (`codes`)."""

    number: int
    context: dict[str, Any]
    codes: list[object]


class OpenCommand(NamedTuple):
    """A command of the journal without an answer: its number, and for how many seconds it waits."""

    number: int
    age_s: float


class Undelivered(NamedTuple):
    """An answer of the journal that the platform has not confirmed: its number, and its length in characters."""

    number: int
    size: int


class Known(NamedTuple):
    """An execution that was accepted before: its number, and its answer, None while there is none."""

    number: int
    answer: str | None


class Waiting(TypedDict):
    """How many commands are executed now, how many wait for that, and how many results to be delivered."""

    executing: int
    commands: int
    results: int


class ExecutionFacts(TypedDict):
    """A command of the journal, or a run without a platform, as --executions shows it; times are ISO 8601 UTC.

    Without an answer yet the last three are None; `delivered` is None where there is no platform. The message, and the
    result's `failures`, are in all languages, or as they were sent where they were kept in no other way.
    """

    execution_id: str | None
    workflow_name: object
    accepted_at: str
    ended_at: str | None
    delivered: bool | None
    status: str | None
    message: str | None
    result: dict[str, Any] | None


class Journal:
    """Accepted commands and their answers on disk. Every method may be called by any thread, and waits for the disk."""

    def __init__(
        self,
        directory: Path,
        clock: Clock = SYSTEM_CLOCK,
        events: Events = NO_EVENTS,
        patient: bool = False,
    ) -> None:
        """Open the file; `patient` as for LocalFile."""
        self._clock = clock
        self.path = directory / JOURNAL_NAME
        self._file = LocalFile(self.path, JOURNAL_VERSION, _JOURNAL_SCHEMA, events, patient)

    def accept(self, commands: Sequence[Command]) -> list[int]:
        """Keep commands, all or none, and return their numbers. Raises StoreError."""
        now = self._clock.wall()
        rows = [
            (_journal_id(c.execution_id), now, json.dumps(c.context), json.dumps(c.codes)) for c in commands
        ]
        insert = "INSERT INTO executions (execution_id, accepted_at, context, codes) VALUES (?, ?, ?, ?)"
        with self._file.write() as db:
            self._set_right(writes=True)
            return [cast(int, db.execute(insert, row).lastrowid) for row in rows]

    def find(self, execution_id: str) -> Known | None:
        """Return what is known of an execution that was accepted before, None for a new one. Raises StoreError."""
        query = "SELECT number, answer FROM executions WHERE execution_id = ?"
        row = self._file.read_one(query, _journal_id(execution_id))
        return None if row is None else Known(*row)

    def read(self, number: int) -> Accepted:
        """Return an accepted command. Raises StoreError, LostCommand where damage has changed or taken it."""
        row = self._file.read_one("SELECT context, codes FROM executions WHERE number = ?", number)
        with contextlib.suppress(TypeError, ValueError):  # no row, or no JSON
            context, codes = map(json.loads, row)
            if isinstance(context, dict) and isinstance(codes, list):
                return Accepted(number, context, codes)
        raise LostCommand(phrase("journal.lost", path=self.path))

    def forget(self, number: int) -> None:
        """Forget a command that cannot be answered. Raises StoreError."""
        with self._file.write() as db:
            db.execute("DELETE FROM executions WHERE number = ?", (number,))

    def answer(self, number: int, text: str, said: str = "") -> None:
        """Keep the answer of a command, and its words as Result has them. Raises StoreError."""
        update = "UPDATE executions SET answer = ?, answered_at = ?, codes = '[]' WHERE number = ?"
        now = self._clock.wall()
        with self._file.write() as db:
            self._set_right(writes=True)
            db.execute(update, (text, now, number))
            _keep_said(db, number, said)
            _add_up(db, text, now)

    def note_run(self, started_at: float, answer: str, said: str = "") -> None:
        """Keep the answer of a run that no platform asked for, which began then (epoch seconds), and its words.

        Raises StoreError.
        """
        now = self._clock.wall()
        with self._file.write() as db:
            insert = "INSERT INTO runs (started_at, ended_at, answer) VALUES (?, ?, ?)"
            number = cast(int, db.execute(insert, (started_at, now, answer)).lastrowid)
            _keep_said(db, -number, said)
            db.execute("DELETE FROM runs WHERE number <= (SELECT max(number) FROM runs) - ?", (ANSWERS_KEPT,))
            _add_up(db, answer, now)

    def last(self, count: int, only_ended: bool = False) -> list[ExecutionFacts]:
        """Return the last executions and runs, oldest first. Raises StoreError."""
        query = (
            "SELECT accepted_at, answered_at AS ended_at, execution_id, context, answer, received, "
            "(SELECT words FROM said WHERE said.number = executions.number) FROM executions "
            "UNION ALL SELECT started_at, ended_at, NULL, '{}', answer, NULL, "
            "(SELECT words FROM said WHERE said.number = -runs.number) FROM runs"
        )
        rows = self._file.read_all(
            f"SELECT * FROM ({query}) WHERE ended_at IS NOT NULL OR NOT ? "  # noqa: S608
            "ORDER BY coalesce(ended_at, accepted_at) DESC, accepted_at DESC LIMIT ?",
            only_ended,
            count,
        )
        return [_execution(*row) for row in reversed(rows)]

    def totals(self) -> dict[str, int]:
        """Return what was counted, by TOTALS, and `since` when (epoch seconds); nothing yet: empty."""
        return dict(self._file.read_all("SELECT name, count FROM totals"))

    def answer_of(self, number: int) -> str | None:
        """Return the answer of a command, None where there is none. Raises StoreError."""
        row = self._file.read_one("SELECT answer FROM executions WHERE number = ?", number)
        return row and cast("str | None", row[0])

    def shorten(self, numbers: Iterable[int]) -> None:
        """Keep answers without their lists, as they are sent: the platform takes them in no other way.

        Raises StoreError.
        """
        with self._file.write() as db:
            for number in numbers:
                short = without_lists(self.answer_of(number) or "")
                update = "UPDATE executions SET answer = ? WHERE number = ? AND answer IS NOT NULL"
                db.execute(update, (short, number))
                db.execute("DELETE FROM said WHERE number = ?", (number,))

    def received(self, numbers: Sequence[int]) -> None:
        """The platform has these answers: they are not sent again, unless the execution is asked for again.

        With it the oldest answers are forgotten that nobody waits for.
        """
        rows = [(number,) for number in numbers]
        with self._file.write() as db:
            db.executemany("UPDATE executions SET received = 1 WHERE number = ?", rows)
            forget = (
                "DELETE FROM executions WHERE received AND number <= (SELECT max(number) FROM executions) - ?"
            )
            db.execute(forget, (ANSWERS_KEPT,))

    def unanswered(self) -> list[OpenCommand]:
        """Return the commands without an answer, oldest first."""
        query = "SELECT number, accepted_at FROM executions WHERE answer IS NULL ORDER BY number"
        self._set_right()
        now = self._clock.wall()
        return [OpenCommand(number, now - accepted_at) for number, accepted_at in self._file.read_all(query)]

    def count_waiting(self, running: bool) -> Waiting:
        """Return what is executed and what waits for that, or to be delivered.

        `running`: a daemon does so, which drops what is too old by itself, whatever the clock was set to meanwhile.
        """
        lifetime_s = math.inf if running else ANSWER_LIFETIME_S
        commands, results = self._file.read_one(
            "SELECT count(CASE WHEN answer IS NULL THEN 1 END), count(CASE WHEN answered_at >= ? THEN 1 END) "
            "FROM executions WHERE answer IS NULL OR NOT received",
            self._clock.wall() - lifetime_s,
        )
        executing = min(commands, int(running))  # one at a time, the oldest first
        return Waiting(executing=executing, commands=commands - executing, results=results)

    def unreceived(self) -> list[Undelivered]:
        """Return the answers that the platform has not confirmed, oldest first; drop stale ones. Raises StoreError."""
        query = (
            "SELECT number, length(answer), answered_at < ? FROM executions "
            "WHERE answer IS NOT NULL AND NOT received ORDER BY number"
        )
        self._set_right()
        rows = self._file.read_all(query, self._clock.wall() - ANSWER_LIFETIME_S)
        stale = [number for number, _, is_stale in rows if is_stale]
        if stale:
            log.warning("%d results could not be delivered within an hour and are dropped", len(stale))
            try:
                self.received(stale)
            except StoreError as error:  # a later start drops them once more
                log.warning("that they are dropped cannot be kept: %s", error)
        return [Undelivered(number, size) for number, size, is_stale in rows if not is_stale]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _set_right(self, writes: bool = False) -> None:
        """Where the clock was set since the last write, let what is open be as old as it is. Raises StoreError.

        After a restart of the machine that is not known of what a clock stamped that was wrong: it counts as new.
        Nothing is written by who only reads where there is nothing to set right.
        """
        now, boot = self._clock.wall(), self._clock.boot()
        ahead = now - self._clock.monotonic()
        last = self._file.read_one("SELECT boot, ahead FROM clock")
        if last is None and not writes:
            return
        if last is not None and last[0] == boot and abs(ahead - last[1]) < CLOCK_SET_S:
            return
        with self._file.write() as db:
            db.execute("DELETE FROM clock")
            db.execute("INSERT INTO clock VALUES (?, ?)", (boot, ahead))
            if last is None:
                return
            for stamp in ("accepted_at", "answered_at"):
                new = "?1"
                if last[0] == boot:
                    new = f"{stamp} + ?2"
                update = (
                    f"UPDATE executions SET {stamp} = {new} WHERE (answer IS NULL OR NOT received) "  # noqa: S608
                    f"AND (?3 OR NOT {stamp} BETWEEN {EARLIEST_S} AND ?1)"
                )
                db.execute(update, (now, ahead - last[1], last[0] == boot))


def _journal_id(execution_id: str) -> str | None:
    """Return an id as the journal keeps it: what UTF-8 cannot hold (a lone surrogate) is escaped."""
    return execution_id.encode("utf-8", "backslashreplace").decode() or None


_JOURNAL_SCHEMA = """
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
CREATE TABLE IF NOT EXISTS runs (           -- --once: what no platform asked for
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    started_at REAL NOT NULL, ended_at REAL NOT NULL,
    answer TEXT NOT NULL                    -- as a platform would have got it
);
CREATE TABLE IF NOT EXISTS said (           -- what answers say, for readers of another language than the platform's
    number INTEGER PRIMARY KEY,             -- of the execution; of a run below 0
    words TEXT NOT NULL                     -- JSON, as Result has them
);
CREATE TRIGGER IF NOT EXISTS executions_said AFTER DELETE ON executions
    BEGIN DELETE FROM said WHERE number = old.number; END;
CREATE TRIGGER IF NOT EXISTS runs_said AFTER DELETE ON runs
    BEGIN DELETE FROM said WHERE number = -old.number; END;
CREATE TABLE IF NOT EXISTS totals (         -- of all that was answered; and since when (epoch seconds)
    name TEXT PRIMARY KEY, count INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS clock (          -- one row: the last write's boot, and by how much its clock was
    boot TEXT NOT NULL, ahead REAL NOT NULL -- ahead of the seconds since then
);
"""
# What is counted: how executions and runs ended, then what became of their codes.
TOTALS = ("success", "partial", "failure", "stored", "known", "kept", "failed")


def _facts(text: str | None) -> dict[str, Any]:
    """Return a JSON object of the journal, an empty one for what a bad disk made of it."""
    with contextlib.suppress(ValueError):
        found = json.loads(text or "{}")
        if isinstance(found, dict):
            return found
    return {}


def _execution(
    begun: float,
    ended: float | None,
    name: str | None,
    context: str,
    answer: str | None,
    received: int | None,
    said: str | None,
) -> ExecutionFacts:
    told = _in_all_languages(_facts(answer), unpacked(_facts(said)))
    facts: ExecutionFacts = {
        "execution_id": name,
        "workflow_name": (told or _facts(context)).get("workflow_name"),
        "accepted_at": iso(datetime.fromtimestamp(begun, UTC)),
        "ended_at": None if ended is None else iso(datetime.fromtimestamp(ended, UTC)),
        "delivered": None if received is None else bool(received),
        "status": told.get("status"),
        "message": told.get("message"),
        "result": told.get("result"),
    }
    return facts


def _in_all_languages(answer: dict[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """Return an answer with the words that were kept beside it, where they are what they ought to be."""
    message, failures, result = said.get("message"), said.get("failures"), answer.get("result")
    if not (isinstance(message, str) and isinstance(failures, dict) and isinstance(result, dict)):
        return answer
    return answer | {"message": message, "result": result | {"failures": failures}}


def _keep_said(db: sqlite3.Connection, number: int, said: str) -> None:
    """Keep the words of an answer in the transaction that is open."""
    if said:
        db.execute("INSERT OR REPLACE INTO said VALUES (?, ?)", (number, said))


def _add_up(db: sqlite3.Connection, answer: str, now: float) -> None:
    """Count an answer in the transaction that is open."""
    facts = _facts(answer)
    counts = Counter(facts.get("result", {}))
    outcome = facts.get("status", "failure")
    if outcome == "success" and counts["failed_count"]:
        outcome = "partial"
    new = counts["success_count"] - counts["duplicate_count"]
    numbers = (new, counts["duplicate_count"], counts["kept_count"], counts["failed_count"])
    found = {name: 1 for name in TOTALS if name == outcome} | dict(zip(TOTALS[3:], numbers, strict=True))
    db.execute("INSERT INTO totals VALUES ('since', ?) ON CONFLICT DO NOTHING", (int(now),))
    add = "INSERT INTO totals VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET count = count + excluded.count"
    db.executemany(add, [(name, count) for name, count in found.items() if count])


# ======================================================================================================
# Daemon: one thread for the socket, one for the work, one for the disk
# ======================================================================================================
#
# Promises:
#   1. The socket's thread never fetches, never stores and waits for no disk: a ping is answered at once,
#      whatever is executed and however slow the disk is.
#   2. Every command is answered: executed, or refused with a reason; see the journal's promises.
#   3. It dials for ever, with a delay before every dial, on the same three threads. No local file ends that
#      but a damaged one, which the next start mends.

STATUS_NAME = "status.json"
# What the state of the platform is to a daemon that collects without one.
NO_NEED = "not needed"
# A full disk is looked at again after so long: waiting for room costs nothing, an answer that waits does.
JOURNAL_FIRST_S, JOURNAL_CAP_S = 0.5, 5.0
# What changes all the time is in the status file no older than this, as long as it changes.
STATUS_EVERY_S = 10.0
# The executor looks at the clock at least so often while nothing comes: a wait is not right when the clock is set.
LOOK_AROUND_S = 600.0
# While trades are collected, closes come to be due of which nothing tells.
COLLECT_LOOK_S = 60.0
# What follows an execution that met a trouble.
RETRIED = "the next execution tries again"
# What waits on this machine and could not be taken up at the start is tried again after so long.
TAKE_UP_AGAIN_S = 30.0
# Commands that wait behind the running one.
MAX_QUEUED = 1000
# Codes that may wait in memory for a disk that hangs: about 100 MB.
MAX_CODES_UNWRITTEN = 10 * MAX_CODES_PER_COMMAND
# What a server closes the connection with over a message that is too large.
TOO_LARGE = 1009
# Some servers and proxies cut the connection over a long message without a word. Under a shorter one it ended for
# another reason, and under a long one it may: its lists are left out when that was so twice.
HARMLESS_BYTES = 64 * 1024
BREAKS_WITH_LISTS = 2
# Answers that are sent before frames are read again: a ping must not wait behind a long backlog.
ANSWERS_AT_ONCE = 20
# Texts of answers without a receipt that are in memory, in characters, which are bytes here; others are in the
# journal alone until it is their turn.
OUTBOX_MOST = 32 * 1024 * 1024
# SIGTERM, SIGINT: the running execution has this long; what does not end stays in the journal.
STOP_GRACE_S = 20.0
# After the last result the platform's receipts are waited for, when the process is about to leave.
RECEIPT_GRACE_S = 3.0
# For closing what is open, above both.
STOP_MARGIN_S = 4.0


class CollectFacts(TypedDict, total=False):
    """What the daemon tells of collecting, and `at` when: CollectStats, and more where it goes on; None: not known.

    `streams`: of each connection its product, how many codes it is for, how many are subscribed, its state and why.
    """

    at: str
    connections: int
    connections_wanted: int
    codes: int
    polled: int
    per_second: float
    delay_p50_ms: object
    delay_p99_ms: object
    gaps_today: int
    trades: int
    stored: int
    duplicates: int
    dropped: int
    missed_beats: int
    trouble: str
    streams: list[StreamFacts]
    gaps_open: int


class DaemonStatus(TypedDict, total=False):
    """What the daemon tells --status, in a file; times are ISO 8601 UTC."""

    version: str
    pid: int
    platform: str
    connected_since: str
    last_contact: str
    lost_since: str
    lost_because: str
    stopped: str
    keys: list[KeyState]
    spool_refused: int
    collecting: CollectFacts


def read_status(directory: Path) -> DaemonStatus:
    """Return what a daemon wrote last; nothing where none ever ran, or another program wrote."""
    try:
        told = json.loads(read_file(directory / STATUS_NAME))
    except (OSError, ValueError, RecursionError):
        return {}
    if is_deep(told):
        return {}
    told = unpacked(told)
    return cast(DaemonStatus, told) if _fits(told, DaemonStatus) else {}


def _fits(value: object, kind: Any) -> bool:
    """Whether a value from JSON is of a type that stands in DaemonStatus."""
    if is_typeddict(kind):
        if not isinstance(value, dict) or not kind.__required_keys__ <= value.keys():
            return False
        hints = get_type_hints(kind)
        return all(_fits(inner, hints[name]) for name, inner in value.items() if name in hints)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(inner, get_args(kind)[0]) for inner in value)
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    return kind is object or type(value) is kind or (kind is str and isinstance(value, Phrase))


def collect_facts(stats: CollectStats) -> CollectFacts:
    """Return what the status file has of collecting: what is told of it now."""
    facts = stats._asdict() | {"at": iso(utc_now())}
    for name, value in facts.items():
        if isinstance(value, float) and math.isnan(value):
            facts[name] = None
    return cast(CollectFacts, facts)


class Answered(NamedTuple):
    """To the socket's thread: an answer that is in the journal is to be sent; it ends so many `commands`.

    `again`: its execution was asked for once more. `text` is '' for one of `size` that is read from there later.
    """

    number: int
    text: str
    commands: int = 0
    again: bool = False
    news: DaemonStatus | None = None  # what --status shows of the execution
    size: int = 0


class Recalled(NamedTuple):
    """To the socket's thread: the text of an answer that was asked for; None where the journal has it no more."""

    number: int
    text: str | None


class Declined(NamedTuple):
    """To the socket's thread: a command that the journal did not take, and why."""

    command: Command
    reason: str


class Ended(NamedTuple):
    """To the socket's thread: of so many commands nothing more is to come now; below 0: so many are taken up again."""

    commands: int = 1


class Broken(NamedTuple):
    """To the socket's thread: a thread of ours met what only a new start can mend."""

    error: StockrtError


def broken_by(error: Exception) -> Broken:
    """Return what a thread says whose work ended with an error; what is no error of ours is logged whole."""
    if isinstance(error, StockrtError):
        return Broken(error)
    return Broken(StockrtError(fault_words(error, NO_EVENTS)))


class StopAsked(NamedTuple):
    """To the socket's thread: a signal asks the process to leave."""


class ReloadAsked(NamedTuple):
    """To the socket's thread: a signal asks for the settings to be read anew."""


class SettingsRead(NamedTuple):
    """To the socket's thread: the settings were read anew, and these hold now."""

    settings: Settings


class ExecutorLeft(NamedTuple):
    """To the socket's thread: no execution runs, and none will."""


Message: TypeAlias = (
    Answered | Recalled | Declined | Ended | Broken | StopAsked | ReloadAsked | SettingsRead | ExecutorLeft
)


class Inbox:
    """What other threads and signal handlers tell the socket's thread, which sleeps in `poll` until they do."""

    def __init__(self) -> None:
        import socket

        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)

    def put(self, message: Message) -> None:
        """Leave a message, from any thread, also from a signal handler."""
        self._messages.put(message)
        self.wake()

    def wake(self) -> None:
        """Let the socket's thread look around, from any thread."""
        with contextlib.suppress(BlockingIOError):  # full: it will wake anyway
            self._waker.send(b"x")

    def take(self) -> list[Message]:
        """Return what has come."""
        with contextlib.suppress(BlockingIOError):  # nothing to read: nobody woke
            self._woken.recv(4096)
        return [self._messages.get() for _ in range(self._messages.qsize())]

    def wait(self, seconds: float, *descriptors: int) -> None:
        """Wait until a message or something at one of the descriptors is there, or the time, if it ends, is over."""
        wait_readable(seconds, self._woken.fileno(), *descriptors)


class Outgoing(NamedTuple):
    """An answer on its way: its number in the journal (0: not there), and since when (monotonic seconds).

    `text` is '' where it is to be read from the journal, `size` its length. `refused`: the execution that it refuses,
    '' where it refuses none, or one without an id. `breaks`: how often the connection ended under it; `is_short`:
    its lists are left out.
    """

    number: int
    text: str
    since: float
    size: int = 0
    breaks: int = 0
    is_short: bool = False
    refused: str = ""

    def shortened(self) -> Outgoing:
        """Return it without its lists."""
        return self._replace(is_short=True).with_text(self.text)

    def with_text(self, text: str) -> Outgoing:
        """Return it with its text, as far as that is sent; '' leaves it to the journal."""
        if self.is_short and text:
            text = without_lists(text)
        return self._replace(text=text, size=len(text) or self.size)


class Outbox:
    """The answers without a receipt: sent in order, and again over the next connection. Pure.

    Receipts name no answer: each is for the oldest that was sent on this connection. Texts beyond `most` characters
    are left to the journal: `missing` says which are wanted from there, `read` takes them.
    """

    def __init__(self, most: int = OUTBOX_MOST) -> None:
        self._most = most
        self._to_send: deque[Outgoing] = deque()
        self._sent: deque[Outgoing] = deque()

    def __len__(self) -> int:
        """How many wait to be sent or for their receipt."""
        return len(self._to_send) + len(self._sent)

    @property
    def has_unsent(self) -> bool:
        """Whether answers wait to be sent."""
        return bool(self._to_send)

    @property
    def in_memory(self) -> int:
        """Characters of the texts that are here."""
        return sum(len(one.text) for one in (*self._sent, *self._to_send))

    def add(self, number: int, text: str, now: float, again: bool = False, size: int = 0) -> None:
        """Take an answer, unless it is here; `again`: its execution was asked for once more after it was sent.

        One of the journal whose `text` is '' has `size` characters there.
        """
        others = self._to_send if again else (*self._to_send, *self._sent)
        if not number or all(one.number != number for one in others):
            self._to_send.append(self._fitting(Outgoing(number, text, now, len(text) or size)))

    def _fitting(self, one: Outgoing) -> Outgoing:
        """Leave a text to the journal where there are too many."""
        if one.number and self.in_memory + len(one.text) > self._most:
            return one._replace(text="")
        return one

    def missing(self) -> list[int]:
        """Return the numbers of the answers that come next and whose texts are to be read, one by one or a few."""
        numbers: list[int] = []
        size = 0
        for one in islice(self._to_send, ANSWERS_AT_ONCE):
            size += one.size
            if one.text or (numbers and size > HARMLESS_BYTES):
                break
            numbers.append(one.number)
        return numbers

    def read(self, number: int, text: str | None) -> bool:
        """Take the text of an answer from the journal; return whether it waits for one that is there no more."""
        wanted = any(one.number == number for one in self._to_send)
        waiting = (one.with_text(text or "") if one.number == number else one for one in self._to_send)
        self._to_send = deque(one for one in waiting if one.number != number or one.text)
        return wanted and not text

    def refuse(self, execution_id: str, text: str, now: float) -> None:
        """Take the answer of a command that is not in the journal.

        Where there are too many, those that were sent are not sent again.
        """
        if self.in_memory + len(text) > self._most:
            self._sent = deque(one if one.number else one._replace(text="") for one in self._sent)
        self._to_send.append(Outgoing(0, text, now, len(text), refused=execution_id))

    def refuse_again(self, execution_id: str, now: float) -> bool:
        """Whether a command comes once more whose refusal the platform has not confirmed: one answer for both."""
        if not execution_id:
            return False
        since = now - EXECUTION_LIFETIME_S
        if any(one.refused == execution_id and one.since >= since for one in self._to_send):
            return True
        sent = [one for one in self._sent if one.refused == execution_id and one.since >= since and one.text]
        self._to_send.extend(sent[:1])
        return bool(sent)

    def next(self) -> str | None:
        """Return the text that is to be sent next, None where there is none, or it is not here."""
        if not self._to_send:
            return None
        return self._to_send[0].text or None

    def note_sent(self) -> None:
        """What `next` returned is on its way."""
        self._sent.append(self._fitting(self._to_send.popleft()))

    def note_received(self) -> int:
        """Take a receipt, and return the number of the answer that it is for; 0 where none is in the journal."""
        return self._sent.popleft().number if self._sent else 0

    def note_too_large(self) -> Outgoing | None:
        """Take it that the server closed over a message that is too large, and return the one that will have been it.

        That is the largest on its way. It goes again behind the others, without its lists, or never if it was.
        """
        if not self._sent:
            return None
        largest = max(self._sent, key=lambda one: one.size)
        self._sent.remove(largest)
        if not largest.is_short:
            self._to_send.append(largest.shortened())
        return largest

    def note_broken(self) -> list[int]:
        """Take it that the connection ended for another reason: what is long goes again behind the others.

        Return the numbers of those that go without their lists from now on.
        """
        shortened: list[int] = []
        for one in [one for one in self._sent if one.size > HARMLESS_BYTES]:
            self._sent.remove(one)
            breaks = one.breaks + 1
            if breaks >= BREAKS_WITH_LISTS and not one.is_short:
                one = one.shortened()
                shortened.append(one.number)
            self._to_send.append(one._replace(breaks=breaks))
        return shortened

    def reconnect(self) -> None:
        """Over a new connection everything without a receipt is sent again, in the same order, and each once."""
        known = [one for one in (*self._sent, *self._to_send) if one.number or one.text]
        everything = {one.number or -place: one for place, one in enumerate(known, 1)}
        self._sent.clear()
        self._to_send = deque(everything.values())

    def drop_older(self, since: float) -> list[int]:
        """Give up what has waited since before `since` (monotonic seconds), and return the numbers."""
        stale = [one.number for one in (*self._sent, *self._to_send) if one.since < since]
        if stale:
            self._sent = deque(one for one in self._sent if one.since >= since)
            self._to_send = deque(one for one in self._to_send if one.since >= since)
        return stale


class Leaving(NamedTuple):
    """By when (monotonic seconds) what is under way must be over as the daemon leaves.

    The running execution is cut short at `cut_at` and left behind at `left_at`; answers are sent, and their receipts
    waited for, until `end_at`, which comes nearer once all are sent.
    """

    cut_at: float
    left_at: float
    end_at: float
    all_sent: bool = False


def leaving_from(now: float) -> Leaving:
    """Return what may be waited for when the daemon begins to leave now."""
    left_at = now + STOP_GRACE_S + STOP_POLL_S + INTERRUPT_GRACE_S
    return Leaving(now + STOP_GRACE_S, left_at, left_at + RECEIPT_GRACE_S)


# ------------------------------------------------------------------------------------------------------
# The thread for the work
# ------------------------------------------------------------------------------------------------------


class Relay(Events):
    """Passes on what the pipeline tells, and wakes the socket's thread where the status line changes."""

    def __init__(self, events: Events, inbox: Inbox) -> None:
        self._events = events
        self._inbox = inbox
        self.queue = QueueStats()
        self.collect = CollectStats()
        self.is_damaged = False  # a local file, or the program: nothing is executed or answered any more

    def progress(self, done: int = 0, total: int = 0, unwritten: int = 0) -> None:
        """Pass it on."""
        self._events.progress(done, total, unwritten)

    def asked(self, kind: str, seconds: float | None) -> None:
        """Pass it on."""
        self._events.asked(kind, seconds)

    def executed(self, report: Report | None) -> None:
        """Pass it on."""
        self._events.executed(report)

    def queue_changed(self, stats: QueueStats) -> None:
        """Pass it on."""
        begins_or_ends = bool(stats.trades) != bool(self.queue.trades)
        self.queue = stats
        self._events.queue_changed(stats)
        if begins_or_ends:
            self._inbox.wake()

    def keys_used(self, keys: Sequence[KeyStats]) -> None:
        """Pass it on."""
        self._events.keys_used(keys)

    def keys_out(self, out: int, of: int) -> None:
        """Pass it on."""
        self._events.keys_out(out, of)

    def collecting(self, stats: CollectStats) -> None:
        """Pass it on."""
        self.collect = stats
        self._events.collecting(stats)
        self._inbox.wake()

    def damaged(self, error: StockrtError) -> None:
        """Let the daemon end: the next start mends it."""
        self.is_damaged = True
        self._inbox.put(Broken(error))


class Order(NamedTuple):
    """To the executor: a command of the journal, and why it is answered without being executed, '' where it is not."""

    number: int
    why_not: str = ""


# In place of an answer: the command stays in the journal.
NO_RESULT = Result("")
# In place of a command, whose number begins at 1: the executor looks around.
NO_COMMAND = Order(0)


class Executor(threading.Thread):
    """Executes accepted commands one at a time and puts their answers into the journal."""

    def __init__(self, settings: Settings, journal: Journal, inbox: Inbox, events: Relay) -> None:
        super().__init__(name="stockrt-executor", daemon=True)
        self._settings = self._wanted = settings  # in use, and those to be used next
        self._journal = journal
        self._inbox = inbox
        self._events = events
        self._troubles = Troubles(settings, RETRIED)
        self._journal_trouble = LogThrottle("journal")
        self._refused_before = read_status(settings.state_directory).get("spool_refused", 0)
        self._rng = random.Random()
        self._queue: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._pipeline: Pipeline | None = None
        self._watch: WatchList | None = None  # for commands without codes
        self._collecting: Collecting | None = None
        # when (monotonic) it is begun, or tried again: infinite where only new settings help
        self._collect_at = 0.0
        self._collect_trouble = LogThrottle("collecting")
        self._leaving = threading.Event()
        self._dropped_because = ""  # what the commands are answered that are not executed any more
        self.stop = threading.Event()  # cuts the running execution short

    def add(self, order: Order) -> None:
        """Execute or answer a command of the journal, after those before it."""
        self._queue.put(order)

    def renew(self, settings: Settings) -> None:
        """Go over to other settings after the running execution; what waits for MongoDB is tried with them, too."""
        self._wanted = settings
        self._collect_at = 0.0
        self._queue.put(NO_COMMAND)

    def leave(self, dropped_because: str = "") -> None:
        """Begin no further execution.

        Commands that wait stay in the journal for the next start, or are answered with `dropped_because`.
        """
        self._dropped_because = dropped_because
        self._leaving.set()

    def end(self) -> None:
        """End after what was added before."""
        self._queue.put(None)

    def run(self) -> None:
        """Work until told to leave."""
        try:
            self._move_what_waits()
            while (order := self._next()) is not None:
                self._events.progress()
                self._inbox.put(self._answer(order))
        except Exception as error:
            self._inbox.put(broken_by(error))
        finally:
            self._end_collecting()
            if self._pipeline is not None:
                self._pipeline.close()
            self._inbox.put(ExecutorLeft())

    def _next(self) -> Order | None:
        """Return the next command, None for the end; closes are made final before it and while none is there."""
        while True:
            wait = self._wait_s()
            try:
                order = self._queue.get(timeout=wait)
            except queue.Empty:
                self._events.progress()
                if self._pipeline is None:
                    self._move_what_waits()
                continue
            if order != NO_COMMAND:
                return order
            if not (self._leaving.is_set() or self._events.is_damaged):
                self._move_what_waits()

    def _wait_s(self) -> float | None:
        """Do what is due beside the commands, and return for how many seconds there is nothing more to do."""
        self._collect()
        wait = self._finalise()
        if self._collect_at == math.inf:
            return wait
        most = TAKE_UP_AGAIN_S
        if self._collecting is not None:
            most = COLLECT_LOOK_S
        return most if wait is None else min(wait, most)

    def _collect(self) -> None:
        """Begin to collect without pause where that is wanted, anew with new settings; what fails is tried again."""
        if self._leaving.is_set() or self._events.is_damaged:
            return
        if not self._wanted.collects:
            self._collect_at = math.inf
            return
        goes_on = self._collecting is not None and self._wanted is self._settings
        if goes_on or time.monotonic() < self._collect_at:
            return
        self._collect_at = time.monotonic() + TAKE_UP_AGAIN_S
        try:
            pipeline = self._open_pipeline()
            pipeline.start_delivery()
            if self._collecting is None:
                collecting = Collecting(pipeline, self._settings, self._events)
                collecting.start()
                self._collecting = collecting
        except Exception as error:
            self._note_not_collecting(error)
        else:
            self._collect_trouble.over()

    def _note_not_collecting(self, error: Exception) -> None:
        """Say why collecting does not begin. What no time mends ends a daemon that has nothing else to do."""
        words = fault_words(error, self._events)
        if isinstance(error, SettingsError):
            self._collect_at = math.inf
            if not self._settings.platform_url():
                self._inbox.put(Broken(error))
                return
            log.error("collecting: %s; mend that, then reload or restart", words)
        elif not self._events.is_damaged:
            self._collect_trouble.again(words)
        self._events.collecting(CollectStats(trouble=words))

    def _end_collecting(self) -> None:
        collecting, self._collecting = self._collecting, None
        if collecting is None:
            return
        try:
            collecting.close()
        except Exception as error:  # what it could not write down counts as a gap
            log.error("collecting: did not end well: %s", fault_words(error, self._events))

    def _finalise(self) -> float | None:
        """Make a part of the closes final that are due; return for how many seconds there is no more to do."""
        if self._leaving.is_set() or self._events.is_damaged:
            return None
        if self._pipeline is None:
            if self._troubles.store.there:
                return TAKE_UP_AGAIN_S
            return None
        wait = self._pipeline.finalise(self._leaving)
        return min(wait, self._pipeline.retain(), LOOK_AROUND_S)

    def _answer(self, order: Order) -> Message:
        """Execute a command, and return what the socket's thread has to know once the answer is in the journal."""
        try:
            result = NO_RESULT
            command = self._read(order.number)
            if command is not None:
                result = self._result_of(command, order.why_not)
            if result.text and self._keep_answer(order.number, result):
                return Answered(order.number, result.text, commands=1, news=self.news())
        except LostCommand as error:
            log.error("execution %s is not answered: %s", order.number, error)
            self._forget(order.number)
        return Ended()

    def _read(self, number: int) -> Accepted | None:
        """Return a command of the journal, tried until that can be read; None where this ends before."""
        for delay in backoff(JOURNAL_FIRST_S, JOURNAL_CAP_S, self._rng, growth=1.5):
            try:
                command = self._journal.read(number)
                break
            except LostCommand:
                raise
            except StoreError as error:
                self._journal_trouble.again(phrase("daemon.unread", number=number, why=error.message))
                self._events.progress()
                if self._events.is_damaged or self._leaving.wait(delay):
                    return None  # it is executed at the next start
        self._journal_trouble.over()
        return command

    def _result_of(self, command: Accepted, why_not: str) -> Result:
        """Return the answer of a command, NO_RESULT where it stays in the journal for the next start."""
        result = NO_RESULT
        if self._leaving.is_set():
            why_not = why_not or self._dropped_because
        if why_not:
            result = self._unexecuted(command.context, why_not)
        elif not (self._leaving.is_set() or self._events.is_damaged):
            result = self._execute(command)
        return NO_RESULT if self._events.is_damaged else result

    def news(self) -> DaemonStatus:
        """Return what --status shows of it; called by any thread that may wait for the disk."""
        news: DaemonStatus = {"spool_refused": self._refused_before + self._events.queue.refused}
        pipeline = self._pipeline
        if pipeline is not None:
            news["keys"] = pipeline.keys.describe()
        return news

    def _forget(self, number: int) -> None:
        """Have a command that is lost not tried again at the next start."""
        try:
            self._journal.forget(number)
        except StoreError as error:
            log.error("execution %s stays in the journal: %s", number, error)

    def _move_what_waits(self) -> None:
        """Take up what waits since the last start, for MongoDB or a daily bar, without waiting for an execution.

        Where trades are collected without pause, that does it.
        """
        if self._wanted.collects or not (self._settings.state_directory / SQLITE_NAME).exists():
            return
        try:
            self._open_pipeline().start_delivery()
        except Exception as error:
            words = fault_words(error, self._events)
            if not self._events.is_damaged:
                self._troubles.store.again(phrase("daemon.not_taken_up", why=words))

    def _keep_answer(self, number: int, answer: Result) -> bool:
        """Put an answer into the journal. On a full disk that is tried until there is room, or this ends."""
        for delay in backoff(JOURNAL_FIRST_S, JOURNAL_CAP_S, self._rng, growth=1.5):
            try:
                self._journal.answer(number, *answer)
                break
            except StoreError as error:
                self._journal_trouble.again(phrase("daemon.not_kept", number=number, why=error.message))
                self._events.progress()
                if self._leaving.wait(delay):
                    return False  # it is executed again at the next start
        self._journal_trouble.over()
        return True

    def _execute(self, command: Accepted) -> Result:
        """Return the answer of a command, NO_RESULT when it was cut short and stays in the journal."""
        try:
            pipeline = self._open_pipeline()
            report = pipeline.run(command.codes or self._codes_to_watch(pipeline), self.stop)
        except Exception as error:  # where that damages the daemon it stays in the journal for the next start
            return self._unexecuted(command.context, fault_words(error, self._events))
        self._events.executed(report)
        self._log(command.context, report)
        if not report.interrupted:
            return report_result(command.context, report, self._settings)
        if self._dropped_because:
            return empty_result(command.context, self._dropped_because, self._settings)
        return NO_RESULT

    def _codes_to_watch(self, pipeline: Pipeline) -> Sequence[str]:
        """Return the codes of a command that names none: those of COLLECT_CODES as of now. Raises StockrtError."""
        if self._watch is None:
            self._watch = WatchList(self._settings, pipeline.mongo)
        codes = self._watch.codes(fresh=True)
        if not codes:
            number, shares = self._settings.collect_share
            raise StockrtError(phrase("daemon.not_in_share", number=number, shares=shares))
        return codes

    def _log(self, context: Mapping[str, Any], report: Report) -> None:
        """Say what an execution did, and what troubles begin or end with it."""
        level = logging.INFO if report.complete else logging.WARNING
        log.log(level, execution_line(context, report))
        self._troubles.note(report)

    def _unexecuted(self, context: Mapping[str, Any], reason: str) -> Result:
        log.warning("%s; not executed: %s", execution_line(context, Report()), reason)
        self._events.executed(None)
        return empty_result(context, reason, self._settings)

    def _open_pipeline(self) -> Pipeline:
        """Return the pipeline, a new one where the settings were read anew. Raises StockrtError."""
        wanted, old = self._wanted, self._pipeline
        if old is not None and (wanted is self._settings or self._may_go_on(wanted)):
            self._settings = wanted
            return old
        try:
            self._pipeline = Pipeline(wanted, self._events, patient=True)
        except StockrtError as error:
            if old is None:
                raise
            log.error("the new settings are not used, and those from before stay: %s", error)
            self._wanted = self._settings
            return old
        if old is not None:
            self._end_collecting()
            old.close()
            if store_name(self._settings) != store_name(wanted):
                self._troubles = Troubles(wanted, RETRIED)
        self._settings, self._watch = wanted, None
        return self._pipeline

    def _may_go_on(self, wanted: Settings) -> bool:
        """Whether collecting goes well and new settings change nothing of it: each new connection leaves a gap."""
        stats = self._events.collect
        if self._collecting is None or stats.trouble or stats.connections < stats.connections_wanted:
            return False
        pipeline = cast(Pipeline, self._pipeline)
        if any(key.dead for key in pipeline.keys.keys):  # an operator may have mended it
            return False
        return self._settings == wanted._replace(
            log_level=self._settings.log_level, old_secrets=self._settings.old_secrets
        )


def execution_name(context: Mapping[str, Any]) -> str:
    """Return what an execution is called in the log: its id and its workflow."""
    meta = context.get("meta")
    found = meta.get("execution_id") if isinstance(meta, dict) else context.get("execution_id")
    workflow = context.get("workflow_name") or context.get("workflow_id")
    name = str(found or "without id")
    if workflow:
        name += f" of {workflow}"
    return one_line(name, 120)


def execution_line(context: Mapping[str, Any], report: Report) -> str:
    """Return the log's one line of an execution: id, workflow, total, stored, duplicates, failed, ms.

    Failures are given by kind: their reasons stand in the answer, and a trouble that goes on is said apart.
    """
    kinds: dict[str, list[str]] = {}
    for code, failure in report.failures.items():
        kinds.setdefault(failure.kind.value, []).append(code)
    line = (
        f"execution {execution_name(context)}: total {report.total}, stored {report.stored}, "
        f"duplicates {report.duplicates}"
    )
    if report.queued:
        line += f", kept {report.queued}"
    line += f", failed {len(report.failures)}"
    if kinds:
        line += f" ({'; '.join(f'{len(codes)} {kind}: {first_few(codes)}' for kind, codes in kinds.items())})"
    line += f", {report.took_s * 1000:.0f} ms"
    if report.interrupted:
        line += ", interrupted"
    return one_line(line, 600)


# ------------------------------------------------------------------------------------------------------
# The thread for the disk
# ------------------------------------------------------------------------------------------------------


class Received(NamedTuple):
    """To the clerk: the platform has these answers, or nobody waits for them any more."""

    numbers: Sequence[int]


class Recall(NamedTuple):
    """To the clerk: the texts of these answers are wanted."""

    numbers: Sequence[int]


class Shorten(NamedTuple):
    """To the clerk: these answers are kept without their lists."""

    numbers: Sequence[int]


class EndExecutor(NamedTuple):
    """To the clerk: no further command comes."""


class NoteStatus(NamedTuple):
    """To the clerk: what changed of what --status shows."""

    news: DaemonStatus


class ReadSettings(NamedTuple):
    """To the clerk: the settings are to be read anew."""


ClerkJob: TypeAlias = (
    list[Command] | Received | Recall | Shorten | NoteStatus | ReadSettings | EndExecutor | None
)


class Clerk(threading.Thread):
    """Does what waits for the disk, in order: keeps commands and receipts in the journal, and the status file.

    What came of it goes to the socket's thread as messages, accepted commands to the executor.
    """

    def __init__(
        self, settings: Settings, journal: Journal, executor: Executor, inbox: Inbox, source: SettingsSource
    ) -> None:
        super().__init__(name="stockrt-clerk", daemon=True)
        self._settings = settings
        self._source = source
        self._journal = journal
        self._executor = executor
        self._inbox = inbox
        self._jobs: queue.SimpleQueue[ClerkJob] = queue.SimpleQueue()
        self._held: list[ClerkJob] = []  # taken, and still to be done
        self._codes_given = self._codes_done = 0  # each counted by one thread alone
        self._declined: dict[str, tuple[float, str]] = {}  # id -> when (monotonic s), and why
        self._accepted: deque[str] = deque(maxlen=ANSWERS_KEPT)  # looked at while the journal cannot be asked
        self._is_taken_up = False  # what the journal has of earlier lives
        # not noted in the journal yet, and not read from it
        self._received: set[int] = set()
        self._too_long: set[int] = set()
        self._wanted: list[int] = []
        self._status: DaemonStatus = {"version": __version__, "pid": os.getpid(), "platform": "not connected"}
        if not settings.platform_url():
            self._status["platform"] = NO_NEED
        before = read_status(settings.state_directory)
        if "last_contact" in before:
            self._status["last_contact"] = before["last_contact"]
        self._status["spool_refused"] = before.get("spool_refused", 0)
        self._trouble = LogThrottle("journal")
        self._status_trouble = LogThrottle("status")
        self._rng = random.Random()

    def do(self, job: ClerkJob) -> None:
        """Have something done; returns at once."""
        if isinstance(job, list):
            self._codes_given += _count_codes(job)
        self._jobs.put(job)

    def codes_unwritten(self) -> int:
        """Return how many codes of commands wait in memory for the disk."""
        return self._codes_given - self._codes_done

    def leave(self) -> None:
        """End after the jobs that are there."""
        self._jobs.put(None)

    def run(self) -> None:
        """Work until told to leave."""
        try:
            self._note_status(self._status)
            going_on = self._work([])
            while going_on:
                going_on = self._work(self._take())
        except Exception as error:
            self._inbox.put(broken_by(error))
        finally:
            self._executor.end()  # nobody would give it anything, or tell it to end

    def _take(self) -> list[ClerkJob]:
        """Return all that is to be done, once there is something, or it is time to try again what was not done.

        Each write may wait long for a disk, or for a program that holds the file's lock: what came meanwhile is done,
        or refused, at once.
        """
        held, self._held = self._held, []
        if not held:
            wait_s = None
            if not self._is_taken_up or self._wanted:
                wait_s = self._rng.uniform(0, JOURNAL_CAP_S)
            with contextlib.suppress(queue.Empty):
                held = [self._jobs.get(timeout=wait_s)]
        return [*held, *self._take_rest()]

    def _take_rest(self) -> list[ClerkJob]:
        return [self._jobs.get() for _ in range(self._jobs.qsize())]

    def _work(self, jobs: Sequence[ClerkJob]) -> bool:
        """Do some jobs; return whether further ones are to be done."""
        commands: list[Command] = []
        news: DaemonStatus = {}
        noted = len(self._received) + len(self._too_long)
        for job in jobs:
            if isinstance(job, list):
                commands += job
            elif isinstance(job, Received):
                self._received.update(job.numbers)
            elif isinstance(job, Shorten):
                self._too_long.update(job.numbers)
            elif isinstance(job, Recall):
                self._wanted += job.numbers
            elif isinstance(job, NoteStatus):
                news.update(job.news)
        if "collecting" in news:  # what an execution would tell of the keys
            news |= self._executor.news()
        if commands:
            self._accept(commands)
            self._codes_done += _count_codes(commands)
        if not self._is_taken_up or self._wanted or len(self._received) + len(self._too_long) > noted:
            self._catch_up()
        if news:
            self._note_status(news)
        if any(isinstance(job, ReadSettings) for job in jobs):
            self._read_settings()
        if any(isinstance(job, EndExecutor) for job in jobs):
            self._executor.end()
        return None not in jobs

    def _catch_up(self) -> None:
        """Do what is still to be done with the journal; what the disk does not take now goes with what comes next."""
        try:
            if not self._is_taken_up:
                self._take_up_journal()
            while self._wanted:
                number = self._wanted[0]
                self._inbox.put(Recalled(number, self._journal.answer_of(number)))
                del self._wanted[0]
            if self._received:
                self._journal.received(sorted(self._received))
                self._received.clear()
            if self._too_long:
                self._journal.shorten(sorted(self._too_long))
                self._too_long.clear()
        except StoreError as error:
            self._trouble.again(error.message)
        else:
            self._trouble.over()

    def _take_up_journal(self) -> None:
        """Have sent what has no receipt, and executed what a crash interrupted, if it is young. Raises StoreError."""
        for name in self._declined:  # while the journal could not be asked: that was the answer
            known = self._journal.find(name)
            if known is not None and known.answer is None:
                self._journal.forget(known.number)
            elif known is not None:
                self._journal.received([known.number])
        unanswered, unreceived = self._journal.unanswered(), self._journal.unreceived()
        self._is_taken_up = True
        for one in unreceived:
            self._inbox.put(Answered(one.number, "", size=one.size))
        for number, age_s in unanswered:
            why_not = ""
            if age_s >= EXECUTION_LIFETIME_S:  # nobody waits for it any more
                why_not = phrase("daemon.interrupted", age=age_s)
            self._inbox.put(Ended(-1))
            self._executor.add(Order(number, why_not))

    def _accept(self, commands: Sequence[Command]) -> None:
        """Put commands into the journal, all or none, and have them executed; answer again what was answered."""
        commands = self._without_declined(commands)
        fresh, told = list(commands), list[Message]()
        try:
            if not self._is_taken_up:  # or what is accepted now would be taken up too
                self._take_up_journal()
            fresh, told = self._sort(commands)
            if not self._settings.collect_codes:
                told += [Declined(command, phrase(NO_CODES)) for command in fresh if not command.codes]
                fresh = [command for command in fresh if command.codes]
            numbers = self._journal.accept(fresh) if fresh else []
        except StoreError as error:
            numbers = []
            for command in (*fresh, *self._hold_all_but_commands()):
                if command.execution_id in self._accepted:  # it has an answer, or gets one
                    self._inbox.put(Ended())
                else:
                    self._decline(command, phrase("daemon.not_on_disk", why=error.message))
        else:
            self._accepted.extend(command.execution_id for command in fresh if command.execution_id)
        for message in told:
            self._inbox.put(message)
        for number in numbers:
            self._executor.add(Order(number))

    def _decline(self, command: Command, reason: str) -> None:
        if command.execution_id:
            self._declined[command.execution_id] = (time.monotonic(), reason)
        self._inbox.put(Declined(command, reason))

    def _without_declined(self, commands: Sequence[Command]) -> list[Command]:
        """Decline anew what was declined just now: it came again before its refusal was known."""
        since = time.monotonic() - EXECUTION_LIFETIME_S
        self._declined = {name: one for name, one in self._declined.items() if one[0] >= since}
        for command in commands:
            if command.execution_id in self._declined:
                self._inbox.put(Declined(command, self._declined[command.execution_id][1]))
        return [command for command in commands if command.execution_id not in self._declined]

    def _hold_all_but_commands(self) -> list[Command]:
        """Return the commands that came while the journal took nothing: the same one among them has one answer."""
        rest = self._take_rest()
        self._held = [job for job in rest if not isinstance(job, list)]
        commands = [command for job in rest if isinstance(job, list) for command in job]
        self._codes_done += _count_codes(commands)
        return commands

    def _sort(self, commands: Sequence[Command]) -> tuple[list[Command], list[Message]]:
        """Return the commands that were not accepted before, and what follows from the others."""
        fresh: dict[str, Command] = {}
        told: list[Message] = []
        for place, command in enumerate(commands):
            known = self._journal.find(command.execution_id) if command.execution_id else None
            if known is None and command.execution_id not in fresh:
                fresh[command.execution_id or f"\0{place}"] = command
            elif known is not None and known.answer is not None:
                told.append(Answered(known.number, known.answer, commands=1, again=True))
            else:  # it is executed now, or came twice in one breath: one answer
                told.append(Ended())
        return list(fresh.values()), told

    def _note_status(self, news: DaemonStatus) -> None:
        """Write what --status shows; that it cannot be written is no reason to stop working."""
        self._status.update(news)
        try:
            write_whole(self._settings.state_directory / STATUS_NAME, json.dumps(packed(self._status)))
        except StoreError as error:
            self._status_trouble.again(error.message)
        else:
            self._status_trouble.over()

    def _read_settings(self) -> None:
        """Read the settings anew, and have them used where they are good."""
        try:
            renewed = self._source.read_again(self._settings)
        except SettingsError as error:
            for fault in error.faults:
                log.error("the settings stay as they were: %s", fault)
        else:
            for warning in renewed.warnings:
                log.warning("%s", warning)
            log.info("settings read anew; changed: %s", ", ".join(renewed.changed) or "none")
            if renewed.need_restart:
                log.warning("changed, but needs a restart: %s", ", ".join(renewed.need_restart))
            self._settings = renewed.settings
            self._executor.renew(renewed.settings)
        self._inbox.put(SettingsRead(self._settings))


def _count_codes(commands: Sequence[Command]) -> int:
    return sum(len(command.codes) for command in commands)


# ------------------------------------------------------------------------------------------------------
# The thread for the socket
# ------------------------------------------------------------------------------------------------------


class Daemon:
    """The platform's module: keeps the connection, takes commands, sends answers. `run` is called once.

    `request_stop` may be called from a signal handler.
    """

    def __init__(
        self,
        settings: Settings,
        events: Events = NO_EVENTS,
        *,
        source: SettingsSource | None = None,
        rng: random.Random | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._settings = settings
        self._events = events
        self._clock = clock
        self._rng = rng or random.Random()
        self._peer = host_and_port(settings.server_host, settings.server_port)
        self._trouble = LogThrottle(f"platform {self._peer}")
        self._lock = lock_state_directory(settings.state_directory)  # before any file is opened
        self._inbox = Inbox()
        self._outbox = Outbox()
        self._relay = relay = Relay(events, self._inbox)
        journal = Journal(settings.state_directory, clock, relay, patient=True)
        # of its own: it does not wait while the clerk waits for the lock of the file, which others may hold
        answers = Journal(settings.state_directory, clock, relay, patient=True)
        self._executor = Executor(settings, answers, self._inbox, relay)
        source = source or SettingsSource(os.environ)
        self._clerk = Clerk(settings, journal, self._executor, self._inbox, source)
        self._module_hash = ""
        self._lost_because = ""  # while there is no connection
        self._presence: Presence | None = None  # what the last refused handshake meant, and since when
        self._presence_since = clock.monotonic()
        self._recalled: set[int] = set()  # answers whose texts are on their way from the journal
        self._dropped = 0  # answers that nobody took within an hour
        self._drop_trouble = LogThrottle("results", clock, then="so is each that comes to be as old")
        self._open_commands = 0  # accepted, or on their way into the journal, and not ended
        self._executor_left = False
        self._collect_noted = relay.collect
        self._collect_noted_at = -math.inf
        self._leaving: Leaving | None = None
        self._broken: StockrtError | None = None

    def request_stop(self) -> None:
        """Ask the loop to leave."""
        self._inbox.put(StopAsked())

    def request_reload(self) -> None:
        """Ask for the settings to be read anew; called from a signal handler, too."""
        self._inbox.put(ReloadAsked())

    def run(self) -> None:
        """Serve the platform, if there is one, until told to stop or shut down.

        Raises StoreError when a local file is damaged, SettingsError where nothing is left to do with these settings.
        """
        start_thread(self._executor)
        start_thread(self._clerk)
        self._tick()  # before the start is over, the status is said
        self._events.started()
        delays = self._fresh_delays()
        while self._leaving is None:
            if not self._settings.platform_url():
                self._wait_awake(math.inf)
                continue
            if self._connect_and_serve():
                delays = self._fresh_delays()
            self._wait_awake(self._delay(delays))
        self._wait_for_threads()
        if self._broken is not None:
            raise self._broken

    def _fresh_delays(self) -> Iterator[float]:
        return backoff(DIAL_FIRST_S, DIAL_CAP_S, self._rng, DIAL_GROWTH)

    def _delay(self, delays: Iterator[float]) -> float:
        """Return for how long to wait before the next dial."""
        since = self._clock.monotonic() - self._presence_since
        if self._presence is Presence.ONLINE and since < OLD_SESSION_S:
            return self._rng.uniform(*OLD_SESSION_DIAL_S)
        return next(delays)

    def _connect_and_serve(self) -> bool:
        """Hold one connection from dial to end; return whether it was useful."""
        link = self._dial()
        if link is None:
            return False
        self._presence, self._lost_because = None, ""
        protocol = PlatformProtocol(self._settings.heartbeat_s, self._clock.monotonic())
        self._outbox.reconnect()
        self._events.connected()
        # after a trouble its end is said instead, and not before the connection has been useful
        level = logging.DEBUG if self._trouble.there else logging.INFO
        log.log(level, "connected to %s", self._peer)
        self._clerk.do(NoteStatus({"platform": "connected", "connected_since": iso(utc_now())}))
        try:
            self._serve(link, protocol)
        except LinkLost as error:
            self._lost(phrase("daemon.lost", why=error.message))
            if error.code == TOO_LARGE:
                self._mend_too_large()
            else:
                self._clerk.do(Shorten(self._outbox.note_broken()))
        finally:
            link.close()
            self._clerk.do(NoteStatus({"platform": "not connected", "last_contact": iso(utc_now())}))
        return protocol.useful

    def _mend_too_large(self) -> None:
        """Keep the result over which the server closed from standing before the others again."""
        result = self._outbox.note_too_large()
        if result is None:
            return
        if not result.is_short:
            log.warning(
                "a result of %s bytes is too large for the platform (1009): it is sent again without its lists, "
                "after the others",
                result.size,
            )
            self._clerk.do(Shorten([result.number]))
            return
        log.warning(
            "a result of %s bytes is too large for the platform (1009) without its lists too, and is given up",
            result.size,
        )
        self._clerk.do(Received([result.number]))

    def _dial(self) -> Link | None:
        settings = self._settings
        try:
            self._module_hash = read_hash(settings.state_directory) or self._register()
            self._tick()
            return Link(settings, self._module_hash)
        except DialError as error:
            self._tick()
            why = self._why_refused() if error.status == 403 else error.message
            if why:
                self._lost(why)
        except StockrtError as error:
            self._lost(error.message)
        return None

    def _why_refused(self) -> str:
        """Return what a refused handshake means, '' for once unknown: an old session may have ended meanwhile."""
        presence = ask_presence(self._settings, self._module_hash)
        before, self._presence = self._presence, presence
        if presence is not before:
            self._presence_since = self._clock.monotonic()
        once = presence is Presence.UNKNOWN and before is not Presence.UNKNOWN
        return "" if once else phrase(presence.value)

    def _lost(self, reason: str) -> None:
        self._trouble.again(reason)
        self._events.disconnected(reason)
        news: DaemonStatus = {"lost_because": reason}
        if not self._lost_because:
            news["lost_since"] = iso(utc_now())
        if reason != self._lost_because:
            self._clerk.do(NoteStatus(news))
        self._lost_because = reason

    def _register(self) -> str:
        settings = self._settings
        module_hash = register(settings)
        write_hash(settings.state_directory, module_hash)
        where, shown = settings.platform_url(), shorten(module_hash)
        log.info("registered %s at %s, hash %s", settings.module_name, where, shown)
        return module_hash

    def _tick(self) -> float:
        """Tell that this loop lives, and give up what is too old; return when that is wanted again."""
        now = self._clock.monotonic()
        stale = self._outbox.drop_older(now - ANSWER_LIFETIME_S)
        if stale:
            self._dropped += len(stale)
            self._drop_trouble.again(phrase("daemon.dropped", n=self._dropped))
            self._clerk.do(Received(stale))
        return min(self._note_collecting(now), self._events.tick(self._open_commands, len(self._outbox)))

    def _note_collecting(self, now: float) -> float:
        """Have the status file say how collecting goes on, seldom where no more than its numbers change.

        Return when that is due.
        """
        stats, noted = self._relay.collect, self._collect_noted
        if stats is noted:
            return math.inf
        due = self._collect_noted_at + STATUS_EVERY_S
        if now < due and steady(stats) == steady(noted):
            return due
        self._collect_noted, self._collect_noted_at = stats, now
        self._clerk.do(NoteStatus({"collecting": collect_facts(stats)}))
        return math.inf

    def _serve(self, link: Link, protocol: PlatformProtocol) -> None:
        """Move frames and answers until the connection is lost (LinkLost) or the process may leave."""
        while True:
            self._read_inbox()
            try:
                self._send_answers(link, protocol)
            except LinkLost:
                self._read_frames(link, protocol)  # what came before counts, and may say why
                raise
            if self._leaving is not None and self._may_leave(self._leaving):
                return
            self._inbox.wait(self._seconds_to_wait(link, protocol), link.fileno())
            self._read_frames(link, protocol)
            if protocol.useful:
                self._trouble.over()

    def _seconds_to_wait(self, link: Link, protocol: PlatformProtocol) -> float:
        if link.has_more or self._outbox.next() is not None:
            return 0.0
        now = self._clock.monotonic()
        ends = [end for end in (self._leaving or ())[:3] if end > now]
        return min(protocol.next_tick(), self._tick(), *ends) - now

    def _read_frames(self, link: Link, protocol: PlatformProtocol) -> None:
        """Do what has come. What came before the connection's end counts all the same."""
        events: list[Event] = []
        lost: LinkLost | None = None
        try:
            for text in link.frames():
                now = self._clock.monotonic()
                if text is None:
                    protocol.heard(now)
                else:
                    self._log_frame("received", text)
                    events += protocol.receive(text, now)
            events += protocol.tick(self._clock.monotonic())
        except LinkLost as error:
            lost = error
        ended = self._apply(events, link, protocol)
        if lost or ended:
            raise lost or cast(LinkLost, ended)

    def _apply(self, events: Sequence[Event], link: Link, protocol: PlatformProtocol) -> LinkLost | None:
        """Do what the protocol says, and return the end of the connection where it comes in between."""
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
                received.append(self._outbox.note_received())
            elif isinstance(event, Shutdown):
                log.info("the platform shuts this module down")
                self._begin_leaving(phrase("daemon.shut_down"))
            elif isinstance(event, Refused):
                self._refuse(event.context, event.reason)
            else:
                commands.append(event)
        if received:
            self._drop_trouble.over()
            self._clerk.do(Received(received))
        self._accept(commands)
        return lost

    def _keep_alive(self, event: Send | Ping | PeerDead, link: Link, protocol: PlatformProtocol) -> None:
        if isinstance(event, Send):
            self._send_text(link, protocol, event.text)
        elif isinstance(event, Ping):
            link.ping()
        else:
            raise LinkLost(phrase("websocket.lost", why=event.reason))

    def _send_text(self, link: Link, protocol: PlatformProtocol, text: str) -> None:
        self._log_frame("sent", text)
        link.send_text(text)
        protocol.sent_text(self._clock.monotonic())

    def _log_frame(self, what: str, text: str) -> None:
        """Log a frame; secrets are masked before it is shortened, or a piece of one could stay."""
        if log.isEnabledFor(logging.DEBUG):
            masked = self._settings.redact(text)
            if self._module_hash:
                masked = masked.replace(self._module_hash, "***")
            log.debug("frame %s: %s", what, one_line(masked, 500))

    def _accept(self, commands: Sequence[Command]) -> None:
        """Hand commands to the clerk, as far as there is room for them."""
        taken: list[Command] = []
        for command in commands:
            if self._outbox.refuse_again(command.execution_id, self._clock.monotonic()):
                continue
            why = self._why_not_taken(len(taken))
            if why:
                self._refuse(command.context, why, command.execution_id)
            else:
                taken.append(command)
        if taken:
            self._open_commands += len(taken)
            self._clerk.do(taken)

    def _why_not_taken(self, more: int) -> str:
        """Return why a command is refused at once, '' if it is not; `more`: taken at the same time."""
        if self._leaving is not None:
            return phrase("daemon.stopping")
        if self._open_commands + more > MAX_QUEUED:
            return phrase("daemon.queue_full", most=MAX_QUEUED)
        if self._clerk.codes_unwritten() > MAX_CODES_UNWRITTEN:
            return phrase("daemon.slow_disk")
        return ""

    def _refuse(self, context: Mapping[str, Any], reason: str, execution_id: str = "") -> None:
        log.warning("execution %s refused: %s", execution_name(context), reason)
        self._events.executed(None)
        text = empty_result(context, reason, self._settings).text
        if not self._outbox.refuse_again(execution_id, self._clock.monotonic()):
            self._outbox.refuse(execution_id, text, self._clock.monotonic())

    def _read_inbox(self) -> None:
        """Do what the other threads and the signals say."""
        for message in self._inbox.take():
            now = self._clock.monotonic()
            if isinstance(message, Answered):
                self._open_commands -= message.commands
                self._outbox.add(message.number, message.text, now, message.again, message.size)
                if message.news is not None:
                    self._clerk.do(NoteStatus(message.news))
            elif isinstance(message, Recalled):
                self._recalled.discard(message.number)
                if self._outbox.read(message.number, message.text):
                    log.error("execution %s is not answered: its answer is lost", message.number)
            elif isinstance(message, Declined):
                self._open_commands -= 1
                self._refuse(message.command.context, message.reason, message.command.execution_id)
            elif isinstance(message, Ended):
                self._open_commands -= message.commands
            elif isinstance(message, ExecutorLeft):
                self._executor_left = True
            elif isinstance(message, Broken):
                self._broken = self._broken or message.error
                self._begin_leaving()
            elif isinstance(message, ReloadAsked):
                self._events.reloading()
                self._clerk.do(ReadSettings())
            elif isinstance(message, SettingsRead):
                self._settings = message.settings
                log.setLevel(message.settings.log_level.upper())
                if not message.settings.collects:
                    self._clerk.do(NoteStatus({"collecting": {}}))
                self._events.reloaded(message.settings)
            else:
                if self._settings.platform_url():
                    log.info("stopping: the running execution has %.0f s", STOP_GRACE_S)
                else:
                    log.info("stopping")
                self._begin_leaving()

    def _send_answers(self, link: Link, protocol: PlatformProtocol) -> None:
        for _ in range(ANSWERS_AT_ONCE):
            text = self._outbox.next()
            if text is None:
                break
            self._outbox.note_sent()
            self._send_text(link, protocol, text)
        missing = [number for number in self._outbox.missing() if number not in self._recalled]
        if missing:
            self._recalled.update(missing)
            self._clerk.do(Recall(missing))

    def _begin_leaving(self, dropped_because: str = "") -> None:
        if self._leaving is None:
            self._leaving = leaving_from(self._clock.monotonic())
            self._events.stopping(STOP_GRACE_S + RECEIPT_GRACE_S + STOP_MARGIN_S)
            self._executor.leave(dropped_because)
            self._clerk.do(EndExecutor())  # behind the commands that are on their way into the journal

    def _may_leave(self, leaving: Leaving) -> bool:
        """Whether the running execution is answered and the answers are confirmed, or their time is over."""
        now = self._clock.monotonic()
        if not self._executor_left:
            if now >= leaving.cut_at:
                self._executor.stop.set()  # what it has fetched is stored
            if now < leaving.left_at:
                return False
        if not self._outbox.has_unsent and not leaving.all_sent:
            leaving = leaving._replace(end_at=min(leaving.end_at, now + RECEIPT_GRACE_S), all_sent=True)
            self._leaving = leaving
        return not self._outbox or now >= leaving.end_at

    def _wait_for_threads(self) -> None:
        """Let the execution and the clerk end; a command that is cut short stays in the journal."""
        leaving = cast(Leaving, self._leaving)
        self._executor.join(max(0.0, leaving.cut_at - self._clock.monotonic()))
        self._executor.stop.set()  # what it has fetched is stored
        self._executor.join(max(0.0, leaving.left_at - self._clock.monotonic()))
        self._clerk.do(NoteStatus({"stopped": iso(utc_now())}))
        self._clerk.leave()
        self._clerk.join(STOP_MARGIN_S / 2)

    def _wait_awake(self, seconds: float) -> None:
        """Wait between two dials; a message ends it early where the daemon is to leave."""
        until = self._clock.monotonic() + seconds
        self._read_inbox()
        while self._leaving is None and (left := until - self._clock.monotonic()) > 0:
            self._inbox.wait(min(left, self._tick() - self._clock.monotonic()))
            self._read_inbox()


def daemon_runs(directory: Path) -> bool:
    """Return whether a daemon works in this state directory now. Raises StoreError."""
    import fcntl

    path = directory / "lock"
    with (
        disk_trouble(phrase("daemon.lock_unseen", path=path)),
        contextlib.suppress(FileNotFoundError),
        open(path, opener=open_plain) as lock,
    ):
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def lock_state_directory(directory: Path) -> IO[str]:
    """Return the open lock file of the one daemon of this directory. Raises StoreError if another holds it."""
    return lock_in(directory, "lock", phrase("daemon.another"))


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
# Rates and delays change all the time: the status line has them no older than this.
RATES_EVERY_S = 5.0
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

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._begun = threading.local()  # the line that a thread has begun

    def write(self, text: str) -> int:
        """Pass whole lines on, each with its priority; the rest waits for its end."""
        *lines, rest = (getattr(self._begun, "text", "") + text).split("\n")
        self._begun.text = rest
        if lines:
            has_one = re.compile("<[0-7]>").match
            told = [line if has_one(line) else for_journal(line, logging.ERROR) for line in lines]
            self._stream.write("".join(f"{line}\n" for line in told))
            self._stream.flush()
        return len(text)

    def flush(self) -> None:
        """Whole lines are never kept back."""

    def writable(self) -> bool:
        """Yes."""
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Which characters the stream below takes, as that one tells it."""
        return self._stream.encoding

    def fileno(self) -> int:
        """Return the descriptor below."""
        return self._stream.fileno()


# syslog's priorities, as the journal takes them at the beginning of a line.
_PRIORITIES = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}


def for_journal(text: str, level: int) -> str:
    """Return `text` with a priority on each of its lines."""
    return "\n".join(f"<{_PRIORITIES[logging.getLevelName(level)]}>{line}" for line in text.split("\n"))


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

    def at_first(self) -> float:
        """Return where it stands before anything is told: what may never be known, or done, is left out."""
        return math.nan if self.label == "key" or self.name.startswith(COLLECT_METRICS) else 0.0


# What the names begin with of what collecting without pause tells.
COLLECT_METRICS = "stockrt_collect_"


API_ANSWERS = (*(action.name.lower() for action in Action), "no_answer")
OUTCOMES = ("success", "partial", "failure", "interrupted", "refused")
# fmt: off
METRICS = (
    Metric("stockrt_info", "gauge", "Version of stockrt.", "version", (__version__,)),
    Metric("stockrt_start_time_seconds", "gauge", "Unix time at which the daemon started."),
    Metric("stockrt_platform_connected", "gauge", "Whether the connection to the platform stands."),
    Metric("stockrt_platform_connections_total", "counter", "Connections made to the platform."),
    Metric("stockrt_executions_total", "counter", "Commands of the platform that ended.", "outcome", OUTCOMES),
    Metric("stockrt_last_success_timestamp_seconds", "gauge",
           "Unix time of the last execution that stored every code, 0 before the first."),
    Metric("stockrt_trades_stored_total", "counter", "Trades of executions that were new in the store."),
    Metric("stockrt_trades_duplicate_total", "counter", "Trades of executions that were there before."),
    Metric("stockrt_codes_failed_total", "counter", "Codes without a stored trade.", "reason",
           tuple(kind.value for kind in FailureKind)),
    Metric("stockrt_codes_stale", "gauge",
           "Codes of the last execution whose trade is old although their market was open since."),
    Metric("stockrt_api_requests_total", "counter", "Requests to the API by what followed from the answer.",
           "answer", API_ANSWERS),
    Metric("stockrt_waiting_executions", "gauge", "Commands that were accepted and have not ended."),
    Metric("stockrt_waiting_results", "gauge", "Results without a receipt of the platform."),
    Metric("stockrt_waiting_documents", "gauge", "Documents that were fetched and are not stored yet."),
    Metric("stockrt_spool_trades", "gauge", "Trades that wait on this machine for MongoDB."),
    Metric("stockrt_spool_bytes", "gauge", "Bytes on disk of the trades that wait for MongoDB."),
    Metric("stockrt_spool_refused_total", "counter", "Trades that found no room on this machine."),
    Metric("stockrt_spool_rejects", "gauge", "Documents that MongoDB refused for good."),
    Metric("stockrt_api_key_requests_today", "gauge", "Requests of the key today (UTC).", "key", ()),
    Metric("stockrt_api_key_requests_left", "gauge", "Requests that the key has left today (UTC).", "key", ()),
    Metric("stockrt_api_key_state", "gauge", "The key's state: 0 ready, 1 resting, 2 out.", "key", ()),
    Metric("stockrt_api_key_end_timestamp_seconds", "gauge",
           "Unix time at which the key's plan ends, 0 where it is not known.", "key", ()),
    Metric("stockrt_collect_connections", "gauge", "Connections to the stream that stand."),
    Metric("stockrt_collect_connections_wanted", "gauge", "Connections to the stream that shall stand."),
    Metric("stockrt_collect_codes", "gauge", "Codes subscribed on the stream."),
    Metric("stockrt_collect_polled_codes", "gauge", "Codes that are polled over REST."),
    Metric("stockrt_collect_trades_total", "counter", "Trades that came while collecting."),
    Metric("stockrt_collect_stored_total", "counter", "Of them, those that were new in the store."),
    Metric("stockrt_collect_duplicate_total", "counter", "Of them, those that were in the store before."),
    Metric("stockrt_collect_dropped_total", "counter", "What was pushed and not asked for, or was no trade."),
    Metric("stockrt_collect_gaps_today", "gauge", "Gaps of this UTC day."),
    Metric("stockrt_collect_missed_beats_total", "counter", "Polls left out as one before was still going on."),
    Metric("stockrt_collect_delay_seconds", "gauge", "Time from a trade's arrival until it was durable, lately.",
           "quantile", ("0.5", "0.99")),
)
# fmt: on
LATENCY = "stockrt_api_latency_seconds"
LATENCY_HELP = "Time from a request to the whole answer."
# The state directory of the one daemon that most machines have: its series stay without a label.
USUAL_INSTANCE = "stockrt"
# So much of a key's digest names it.
DIGEST_SHOWN = 8
KEY_STATES = ("ready", "resting", "out")


class Metrics:
    """Counts since the start, thread-safe. `changes` grows with every change; `keys`: the digests of API keys.

    With the name of an `instance` every series has it as a label, so that two files beside each other do not collide.
    """

    def __init__(self, keys: Sequence[str] = (), instance: str = "") -> None:
        self._lock = threading.Lock()
        self._instance = instance.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        self._metrics: Sequence[Metric] = METRICS
        self._numbers: dict[tuple[str, str], float] = {}
        self._buckets = [0] * len(LATENCY_BUCKETS_S)
        self._latencies, self._latency_sum = 0, 0.0
        self.changes = 0
        self.know_keys(keys)

    def know_keys(self, keys: Sequence[str]) -> None:
        """Count for these API keys, and for no others any more."""
        shown = tuple(dict.fromkeys(digest[:DIGEST_SHOWN] for digest in keys))
        with self._lock:
            self._metrics = [m._replace(values=shown) if m.label == "key" else m for m in METRICS]
            self._numbers = {
                (metric.name, value): self._numbers.get((metric.name, value), metric.at_first())
                for metric in self._metrics
                for value in metric.values
            }

    def add(self, name: str, value: str = "", by: float = 1) -> None:
        """Count `by` more; `value` is the label's."""
        with self._lock:
            self._numbers[name, value] += by
            self.changes += bool(by)

    def put(self, name: str, number: float, value: str = "") -> None:
        """Let a gauge, or what somebody else counts, stand at `number`; NaN: it is not known."""
        with self._lock:
            before = self._numbers[name, value]
            self.changes += before != number and not (math.isnan(before) and math.isnan(number))
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
            lines = [line for metric in self._metrics for line in self._lines(metric)]
            lines += [
                f"# HELP {LATENCY} {LATENCY_HELP}",
                f"# TYPE {LATENCY} histogram",
            ]
            limits = (*map(_number_text, LATENCY_BUCKETS_S), "+Inf")
            counts = (*self._buckets, self._latencies)
            for le, n in zip(limits, counts, strict=True):
                lines.append(f"{LATENCY}_bucket{self._labels('le', le)} {n}")
            lines.append(f"{LATENCY}_sum{self._labels()} {self._latency_sum:.6f}")
            lines.append(f"{LATENCY}_count{self._labels()} {self._latencies}")
        return "\n".join(lines) + "\n"

    def _lines(self, metric: Metric) -> Iterator[str]:
        known = [value for value in metric.values if not math.isnan(self._numbers[metric.name, value])]
        if known:
            yield f"# HELP {metric.name} {metric.help}"
            yield f"# TYPE {metric.name} {metric.kind}"
        for value in known:
            labels = self._labels(metric.label, value)
            yield f"{metric.name}{labels} {_number_text(self._numbers[metric.name, value])}"

    def _labels(self, label: str = "", value: str = "") -> str:
        labels = [f'{n}="{text}"' for n, text in ((label, value), ("instance", self._instance)) if n and text]
        return f"{{{','.join(labels)}}}" if labels else ""


def _number_text(number: float) -> str:
    if number == math.inf:
        return "+Inf"
    return str(int(number)) if number == int(number) else repr(round(number, 3))


class MetricsFile:
    """Keeps a file up to date with the metrics, on a thread of its own: a disk that hangs holds nobody up."""

    def __init__(self, path: Path, metrics: Metrics, clock: Clock = SYSTEM_CLOCK) -> None:
        self._path = path
        self._metrics = metrics
        self._clock = clock
        self._written_at = -math.inf
        self._written = -1
        self._due = threading.Event()
        self._trouble = LogThrottle(f"metrics file {path}")
        start_thread(threading.Thread(target=self._run, name="stockrt-metrics", daemon=True))

    def tick(self) -> float:
        """Have the file written if that is due, and return when it will be (monotonic): never while nothing changed."""
        if self._metrics.changes == self._written:
            return math.inf
        due = self._written_at + METRICS_EVERY_S
        if self._clock.monotonic() < due:
            return due
        self._written, self._written_at = self._metrics.changes, self._clock.monotonic()
        self._due.set()
        return math.inf

    def write(self) -> None:
        """Write the file now, whole or not at all, readable by everybody. A file that cannot be is said so."""
        try:
            # node_exporter is another user
            need_plain_file(self._path, "METRICS_FILE")
            write_whole(self._path, self._metrics.text(), mode=0o644, setting="METRICS_FILE")
        except StoreError as error:
            self._trouble.again(error.message)
        else:
            self._trouble.over()

    def _run(self) -> None:
        while True:
            self._due.wait()
            self._due.clear()
            self.write()


class Service(Events):
    """Passes on what the daemon tells: to systemd, and into the metrics file."""

    def __init__(
        self,
        settings: Settings,
        notifier: Notifier,
        watchdog_s: float = math.inf,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._notifier = notifier
        self._watchdog_s = watchdog_s
        self._clock = clock
        instance = settings.state_directory.name
        if instance == USUAL_INSTANCE:
            instance = ""
        self.metrics = Metrics([key_digest(secret) for secret in settings.api_keys], instance)
        self._file: MetricsFile | None = None
        if settings.metrics_file is not None:
            self._file = MetricsFile(settings.metrics_file, self.metrics, clock)
        self._peer = host_and_port(settings.server_host, settings.server_port)
        self._keys = count_words(len(settings.api_keys), "key")
        self._has_platform = bool(settings.platform_url())
        self._link = phrase("service.connecting", peer=self._peer)
        self._collects = settings.collects
        self._collect = CollectStats()
        self._collect_shown: str = ""
        self._collect_steady = steady(self._collect)
        self._collect_shown_at = -math.inf
        self._waits = False  # whether trades wait for MongoDB
        # of the last execution: codes stored, all codes, seconds, and when it ended (monotonic); not its failures
        self._last: tuple[int, int, float, float] | None = None
        self._unanswered = self._undelivered = 0
        self._progress_at = self._watchdog_at = clock.monotonic()
        self._said = ""
        self._leaving = False
        self.metrics.put("stockrt_info", 1, __version__)
        self.metrics.put("stockrt_start_time_seconds", round(clock.wall(), 3))
        if not self._has_platform:
            self.metrics.put("stockrt_platform_connected", math.nan)
            self.metrics.put("stockrt_platform_connections_total", math.nan)

    def started(self) -> None:
        """Tell systemd that the start is over."""
        self._notifier.send(READY=1)

    def reloading(self) -> None:
        """Tell systemd that the settings are read anew; Type=notify-reload wants to know since when."""
        self._notifier.send(RELOADING=1, MONOTONIC_USEC=time.monotonic_ns() // 1000)

    def reloaded(self, settings: Settings) -> None:
        """Tell systemd that this is over."""
        self._keys = count_words(len(settings.api_keys), "key")
        self._collects = settings.collects
        if not self._collects:
            self._collect = CollectStats()
            for metric in METRICS:
                if metric.name.startswith(COLLECT_METRICS):
                    for value in metric.values:
                        self.metrics.put(metric.name, math.nan, value)
        self._notifier.send(READY=1)

    def tick(self, unanswered: int, undelivered: int) -> float:
        """Say what changed; return when there will be something to say again."""
        now = self._clock.monotonic()
        if unanswered and not self._unanswered:
            self._progress_at = now  # the executor was idle until now
        self._unanswered, self._undelivered = unanswered, undelivered
        self.metrics.put("stockrt_waiting_executions", unanswered)
        self.metrics.put("stockrt_waiting_results", undelivered)
        again = min(self._say_status(now), self._pat_watchdog(now))
        return again if self._file is None else min(again, self._file.tick())

    def progress(self, done: int = 0, total: int = 0, unwritten: int = 0) -> None:
        """Note that the executor makes progress."""
        self._progress_at = self._clock.monotonic()
        self.metrics.put("stockrt_waiting_documents", unwritten)

    def connected(self) -> None:
        """Note the connection."""
        self._link = phrase("service.connected", peer=self._peer)
        self.metrics.put("stockrt_platform_connected", 1)
        self.metrics.add("stockrt_platform_connections_total")

    def disconnected(self, reason: str) -> None:
        """Note that there is none."""
        self._link = phrase("service.not_connected", peer=self._peer, why=one_line(reason, 120))
        self.metrics.put("stockrt_platform_connected", 0)

    def asked(self, kind: str, seconds: float | None) -> None:
        """Count a request."""
        self.metrics.add("stockrt_api_requests_total", kind)
        if seconds is not None:
            self.metrics.took(seconds)

    def queue_changed(self, stats: QueueStats) -> None:
        """Note what waits for MongoDB."""
        self._waits = stats.trades > 0
        self.metrics.put("stockrt_spool_trades", stats.trades)
        self.metrics.put("stockrt_spool_bytes", stats.bytes)
        self.metrics.put("stockrt_spool_rejects", stats.rejects)
        self.metrics.put("stockrt_spool_refused_total", stats.refused)

    def keys_used(self, keys: Sequence[KeyStats]) -> None:
        """Note what each key has used and left, and how it stands."""
        self.metrics.know_keys([key.digest for key in keys])
        for key in keys:
            name = key.digest[:DIGEST_SHOWN]
            if key.used is not None:
                self.metrics.put("stockrt_api_key_requests_today", key.used, name)
            if key.left is not None:
                self.metrics.put("stockrt_api_key_requests_left", key.left, name)
            self.metrics.put("stockrt_api_key_state", KEY_STATES.index(key.state), name)
            self.metrics.put("stockrt_api_key_end_timestamp_seconds", key.ends, name)

    def keys_out(self, out: int, of: int) -> None:
        """Note how many keys are not used again."""
        self._keys = count_words(of, "key")
        if out:
            self._keys = phrase("service.keys_out", keys=self._keys, out=out)

    def collecting(self, stats: CollectStats) -> None:
        """Note how collecting goes on."""
        if not self._collects:  # a last word after a reload that ended it
            return
        self._collect = stats
        for name, number in (
            ("connections", stats.connections),
            ("connections_wanted", stats.connections_wanted),
            ("codes", stats.codes),
            ("polled_codes", stats.polled),
            ("trades_total", stats.trades),
            ("stored_total", stats.stored),
            ("duplicate_total", stats.duplicates),
            ("dropped_total", stats.dropped),
            ("gaps_today", stats.gaps_today),
            ("missed_beats_total", stats.missed_beats),
        ):
            self.metrics.put(COLLECT_METRICS + name, number)
        for quantile, milliseconds in (("0.5", stats.delay_p50_ms), ("0.99", stats.delay_p99_ms)):
            self.metrics.put(f"{COLLECT_METRICS}delay_seconds", milliseconds / 1000, quantile)

    def executed(self, report: Report | None) -> None:
        """Count an execution and what it did."""
        self.metrics.add("stockrt_executions_total", outcome_of(report))
        if report is None:
            return
        self._last = (report.reached, report.total, report.took_s, self._clock.monotonic())
        self.metrics.add("stockrt_trades_stored_total", by=report.stored)
        self.metrics.add("stockrt_trades_duplicate_total", by=report.duplicates)
        self.metrics.put("stockrt_codes_stale", report.stale)
        for kind, count in Counter(failure.kind for failure in report.failures.values()).items():
            self.metrics.add("stockrt_codes_failed_total", kind.value, count)
        if report.complete:
            self.metrics.put("stockrt_last_success_timestamp_seconds", round(self._clock.wall(), 3))

    def stopping(self, seconds: float) -> None:
        """Tell systemd that the daemon leaves, and ask for the time that this may take."""
        self._leaving = True
        words = for_reader(phrase("service.stopping"))
        self._notifier.send(STOPPING=1, EXTEND_TIMEOUT_USEC=int(seconds * 1e6), STATUS=words)

    def stopped(self) -> None:
        """Leave the last numbers in the file."""
        if self._has_platform:
            self.metrics.put("stockrt_platform_connected", 0)
        if self._collects:
            self.metrics.put("stockrt_collect_connections", 0)
        if self._file is not None:
            self._file.write()

    def _say_status(self, now: float) -> float:
        if not self._notifier.listens:
            return math.inf
        status, until = self.status(now)
        if status != self._said and self._notifier.send(STATUS=for_reader(status)):
            self._said = status
        return until

    def status(self, now: float) -> tuple[Phrase, float]:
        """Return the status line and until when it is true, if nothing happens."""
        until = math.inf
        parts: list[str] = []
        if self._leaving:
            parts.append(phrase("service.stopping"))
        if self._has_platform:
            parts.append(self._link)
        if self._collects:
            until = self._look_at_collecting(now)
            parts.append(self._collect_shown)
        parts.append(self._keys)
        if self._last is not None:
            words, changes = self._last_words(*self._last, now)
            parts.append(words)
            until = min(until, changes)
        elif self._has_platform:
            parts.append(phrase("service.no_execute"))
        if self._has_platform:
            parts.append(phrase("service.waiting", n=self._unanswered))
        if self._waits:
            parts.append(phrase("service.trades_wait"))
        if self._undelivered:
            parts.append(phrase("service.to_deliver", n=self._undelivered))
        return listing("join.dots", parts), until

    def _last_words(
        self, reached: int, total: int, took_s: float, at: float, now: float
    ) -> tuple[Phrase, float]:
        """Return what the last execution did and how long ago it ended, and until when that is true."""
        age, changes = age_words(now - at)
        words = phrase("service.last_execute", reached=reached, total=total, took_s=took_s, age=age)
        return words, at + changes

    def _look_at_collecting(self, now: float) -> float:
        """Take over what is shown of collecting, rates and delays not too often; return when to look again."""
        words = phrase("service.collecting", words=collect_words(self._collect))
        due = self._collect_shown_at + RATES_EVERY_S
        if now >= due or steady(self._collect) != self._collect_steady:
            self._collect_shown, self._collect_shown_at = words, now
            self._collect_steady = steady(self._collect)
        return due if words != self._collect_shown else math.inf

    def _pat_watchdog(self, now: float) -> float:
        """Send WATCHDOG=1 twice in the time that systemd gives, while the executor works."""
        if self._watchdog_s == math.inf:
            return math.inf
        if now >= self._watchdog_at:
            stands_still = self._unanswered and now - self._progress_at > self._watchdog_s
            if stands_still or not self._notifier.send(WATCHDOG=1):
                return now + self._watchdog_s / 8  # looked at again soon
            self._watchdog_at = now + self._watchdog_s / 2
        return self._watchdog_at


def outcome_of(report: Report | None) -> str:
    """Return how an execution ended, as the metrics count it."""
    return "refused" if report is None else report.outcome


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
    if not (cache and name and re.fullmatch(r"[0-9a-f]{16,}", build) and own.parent == Path(cache).resolve()):
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
# Migration: what the older client of this platform left
# ======================================================================================================
#
# Promises:
#   1. Nothing of the older installation is changed: neither its files nor a document of its own.
#   2. What is set or stored here already stays as it is; each thing that is taken, kept or left out is said in a line.
#   3. Each trade of the older documents is in `realtime` once, in the form of `to_document`, however often the older
#      client stored it, and whoever ends this when: begun again it goes on where it was. What is no trade is counted
#      and named.

# Where the older client kept its settings, below its working directory, and its trades where none was named.
OLD_ENV_FILE = Path("config/.env")
OLD_COLLECTION = "stock_data"
# How far the documents are brought over, until all of them are.
MIGRATION_NAME = "migration.json"
# Documents that are named of those which are no trade, or which MongoDB refused.
EXAMPLES = 5
# Zones differ by a quarter of an hour at least: clocks that are farther apart than half of that are of two zones.
SAME_ZONE_S = 450.0


def old_settings(directory: Path) -> tuple[dict[str, str], list[str]]:
    """Return the settings of an older installation, empty ones left out, and a line for each that cannot be read.

    Raises UsageError where there is none.
    """
    path = directory / OLD_ENV_FILE
    try:
        read_file(path)
    except (OSError, UnicodeDecodeError) as error:
        why = unread_words(error)
        raise UsageError(phrase("migration.no_older", directory=directory, path=path, why=why)) from None
    found = {name: value.strip() for name, value in read_env_file(path).items() if value.strip()}
    # no more than that is asked of a file that no systemd reads
    faults = [fault for fault in broken_lines(path) if "expected NAME=value" in fault]
    return found, [phrase("migration.left_out", what=fault) for fault in faults]


def plan_settings(
    old: Mapping[str, str], there: Mapping[str, str], target: Path
) -> tuple[dict[str, str], list[str]]:
    """Return which settings are taken over into `target`, by their names of today, and a line for each of all.

    `there`: what is set already, by any of its names. Raises SettingsError with every value that cannot be taken.
    """
    taken: dict[str, str] = {}
    lines: list[str] = []
    faults: list[str] = []
    unknown = dict(old)
    for setting in SETTINGS:
        given = [name for name in setting.names() if unknown.pop(name, "")]
        if not given:
            continue
        name, shown = given[0], shown_value(setting, old[given[0]])
        stands = [there[other] for other in setting.names() if there.get(other)]
        if stands:
            kind = "migration.kept" if stands[0] == old[name] else "migration.kept_other"
            lines.append(phrase(kind, name=setting.name))
            continue
        try:
            setting.parse(old[name])
        except ValueError:
            expected = setting.expected
            faults.append(
                phrase("migration.bad_value", name=name, value=shown, expected=expected, path=target)
            )
        taken[setting.name] = old[name]
        if name == setting.name:
            lines.append(phrase("migration.taken", name=name, value=shown))
        else:
            lines.append(phrase("migration.taken_renamed", name=setting.name, value=shown, older=name))
    if faults:
        raise SettingsError(faults)
    lines += [phrase("migration.no_setting", name=one_line(name, 60)) for name in unknown]
    return taken, lines


def write_settings(target: Path, taken: Mapping[str, str], source: Path) -> None:
    """Add settings to an env file, which keeps its lines, mode and owner; a new one is its owner's alone.

    Raises StoreError.
    """
    place = Path(os.path.realpath(target))
    text, mode, owner = "", 0o600, None
    trouble = disk_trouble(phrase("tools.not_read", path=place), "--env-file")
    with trouble, contextlib.suppress(FileNotFoundError):
        owner = place.stat()
        mode, text = owner.st_mode & 0o777, read_file(place)
    if text:
        text = text.rstrip("\n") + "\n\n"
    head = for_reader(phrase("migration.source", path=one_line(source)))
    text += "".join([head, "\n", *(env_line(*pair) for pair in taken.items())])
    write_whole(place, text, durable=True, mode=mode, setting="--env-file")
    if owner is not None and os.geteuid() == 0:
        with disk_trouble(phrase("migration.not_given", path=place), "--env-file"):
            os.chown(place, owner.st_uid, owner.st_gid)


def plan_hash(directory: Path, state: Path) -> tuple[str, str]:
    """Return the older installation's module hash, '' where it is not taken over, and a line about it.

    Raises StoreError for a file that cannot be read or holds none.
    """
    source, place = directory / OLD_HASH_FILE, state / HASH_NAME
    found, stands = hash_in(source, "--migrate"), hash_in(place)
    if not found:
        return "", phrase("migration.no_hash", path=source)
    if not stands:
        return found, phrase("migration.taken_hash", hash=shorten(found), path=place)
    if stands == found:
        return "", phrase("migration.kept_hash", hash=shorten(stands), path=place)
    return "", phrase("migration.kept_hash_other", hash=shorten(stands), path=place, older=shorten(found))


def move_installation(
    directory: Path, target: Path, environ: Mapping[str, str], dry: bool
) -> tuple[dict[str, str], Settings, list[str]]:
    """Take settings over into the env file `target`, and the hash; `dry`: write nothing.

    Returns the older settings, what is set from now on, and a line for each thing. Raises StockrtError; nothing is
    written then, unless it is the disk that fails.
    """
    if not os.path.isdir(target.parent):
        raise UsageError(phrase("migration.no_directory", path=target.parent))
    old, unread = old_settings(directory)
    there = target if os.path.exists(target) else Path(os.devnull)
    unit = find_unit(environ, target)
    held = read_credentials(environ)
    if unit is not None and unit.is_hidden():
        unit = None
    if unit is not None:
        found = {name: read_credential(name, path) for name, path in unit.credentials.items()}
        held = {name: text for name, text in found.items() if text}  # an absent one hides nothing of the file
    taken, lines = plan_settings(old, read_env_file(there) | held, target)
    settings = load_settings({**taken, **environ}, there, unit=unit).settings
    module_hash, line = plan_hash(directory, settings.state_directory)
    lines += [*unread, line]
    if settings.realtime_name != OLD_COLLECTION and "MONGODB_COLLECTION_NAME" not in old:
        lines.append(phrase("migration.changed", name=settings.realtime_name, older=OLD_COLLECTION))
    if taken and not dry:
        write_settings(target, taken, directory / OLD_ENV_FILE)
    if module_hash and not dry:
        write_hash(settings.state_directory, module_hash)
    return old, settings, lines


def time_zone(name: str) -> tzinfo:
    """Return an IANA zone. Raises UsageError for any other name."""
    from zoneinfo import ZoneInfo

    if name == "UTC":  # needs no data
        return UTC
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise UsageError(phrase("migration.no_zone", name=one_line(name, 60))) from None


def read_old_trade(found: Mapping[str, Any], latest_ms: int = LATEST_TRADE_MS) -> Trade:
    """Return the trade that a document of the older client holds, its numbers as texts, without ".0".

    Raises ValueError or InstrumentError with what is wrong with it.
    """
    record = {name: _as_sent(name, found[name]) for name in TRADE_FIELDS if name in found}
    if "s" not in record and "stock_code" in found:
        record["s"] = found["stock_code"]
    trade = read_trade(record, "common", latest_ms)  # whose rule looks at the code
    return trade._replace(s=_code_of(trade.s))


def _as_sent(name: str, value: object) -> object:
    """Return a stored value as the API sends it, if it is of another type."""
    from bson.decimal128 import Decimal128

    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)  # BSON's long integers have a class of their own
    if isinstance(value, Decimal128):
        return str(value)
    if isinstance(value, float):
        text = repr(value).removesuffix(".0")
        return int(text) if name not in NUMBERS and re.fullmatch(r"\d+", text) else text
    return value


@lru_cache(maxsize=4096)
def _code_of(text: str) -> str:
    """Return a code that the API sent, in upper case. Raises InstrumentError for what is none."""
    try:
        return parse_code(f"common:{text}").code  # where any code is taken as it is
    except UnclearCode as unclear:  # one that is not ASCII
        return unclear.text


def first_stored(found: Mapping[str, Any], t: int, zone: tzinfo) -> tuple[datetime, float | None]:
    """Return when an older document was stored, aware UTC, by its naive `create_time` on the clock of `zone`.

    And by how many seconds that is after its ObjectId was made, None where it cannot be told. A document without a
    `create_time` was stored when its ObjectId was made, or else at the time of its trade, `t`.
    """
    from bson.objectid import ObjectId

    made = found["_id"].generation_time if isinstance(found["_id"], ObjectId) else None
    told = found.get("create_time")
    with contextlib.suppress(ValueError, OverflowError):  # no date, or one at the end of all dates
        if isinstance(told, str):
            told = datetime.fromisoformat(told)
        if isinstance(told, datetime):
            told = told.replace(microsecond=told.microsecond // 1000 * 1000)
            if told.tzinfo is None:  # an hour of autumn is there twice
                told = told.replace(tzinfo=zone)
                later = told.replace(fold=1)
                if made and abs(later.astimezone(UTC) - made) < abs(told.astimezone(UTC) - made):
                    told = later
            at = told.astimezone(UTC)
            return at, (at - made).total_seconds() if made else None
    return made or datetime.fromtimestamp(t / 1000, UTC), None


class Migrated:
    """How far a collection is brought over: the last `_id` that was read, and what became of all until there.

    `numbers`: some hold numbers in place of texts. `examples`: the first of what is no trade or was refused, and why.
    """

    after: dict[str, Any]
    read: int = 0
    stored: int = 0
    no_trade: int = 0
    refused: int = 0
    numbers: bool = False
    examples: list[str]

    def __init__(self, **told: Any) -> None:
        vars(self).update({"after": {}, "examples": []} | told)

    def note(self, name: object, why: str) -> None:
        """Take an example, if there are not enough."""
        if len(self.examples) < EXAMPLES:
            self.examples.append(phrase("migration.example", name=one_line(name, 60), why=one_line(why, 200)))


class Migration:
    """Brings the older client's documents of a collection into ours: promise 3.

    `dry`: nothing is written. `any_zone`: `zone` holds, whatever the ObjectIds say.
    """

    def __init__(
        self,
        store: MongoStore,
        settings: Settings,
        source: str,
        zone: tzinfo,
        dry: bool = False,
        any_zone: bool = False,
    ) -> None:
        self.store = store
        self.settings = settings
        self.source = source
        self.zone = zone
        self.dry = dry
        self.any_zone = any_zone
        self.done = Migrated()

    def run(self, stop: threading.Event, events: Events = NO_EVENTS) -> bool:
        """Bring over what is left, or as much as can be until `stop`; return whether that is all.

        Raises UsageError where the collection has none or the zone is wrong, StoreError where a store is away.
        """
        if self.source in (self.settings.close_name, self.settings.license_name):
            raise UsageError(phrase("migration.own_collection", name=self.source))
        total = self.store.estimate(self.source)
        if not total:
            raise UsageError(phrase("migration.no_documents", name=self.source))
        if self.source == self.store.realtime_name:
            log.warning(
                "trades go into the collection of the older documents, and stand there beside them; "
                "MONGODB_REALTIME_COLLECTION_NAME names another"
            )
        self._recall()
        for page in self.store.pages(self.source, self.done.after):
            if stop.is_set():
                return False
            self._take(page)
            self._remember()
            events.progress(self.done.read, total)
        if not self.dry:
            with disk_trouble(phrase("migration.not_removed", path=self._path())):
                self._path().unlink(missing_ok=True)
        return True

    def _take(self, page: Sequence[Document]) -> None:
        done = self.done
        documents: dict[str, Document] = {}
        late: list[float] = []
        latest_ms = int(time.time() * 1000) + MAX_AHEAD_MS
        bad = 0
        for found in page:
            try:
                trade = read_old_trade(found, latest_ms)
            except (ValueError, InstrumentError) as error:
                done.note(found["_id"], error_words(error))
                bad += 1
                continue
            done.numbers |= any(not isinstance(found[name], str) for name in NUMBERS)
            created, seconds = first_stored(found, trade.t, self.zone)
            if seconds is not None:
                late.append(seconds)
            documents.setdefault(identity(trade), to_document(trade, created))
        self._check_zone(late)
        if documents and not self.dry:
            if done.numbers:
                documents = self._without_other_digits(documents)
            self._write([*documents.values()])
        done.no_trade += bad
        done.read += len(page)
        for found in page[-1:]:
            done.after = {"_id": found["_id"]}

    def _write(self, documents: Sequence[Document]) -> None:
        report = self.store.write(documents)
        self.done.stored += report.stored
        self.done.refused += len(report.refused)
        for name, why in report.refused.items():
            self.done.note(name, why)

    def _check_zone(self, late: list[float]) -> None:
        """Raise UsageError where most of some documents cannot have been stored when `create_time` says."""
        seconds = sorted(late or [0.0])[len(late) // 2]
        if abs(seconds) > SAME_ZONE_S and not self.any_zone:
            raise UsageError(phrase("migration.other_zone", zone=self.zone, hours=seconds / 3600))

    def _without_other_digits(self, documents: Mapping[str, Document]) -> dict[str, Document]:
        """Return those whose trade is not there with other digits, as 31.350 is that of the number 31.35."""
        known = {_same_digits(one): one["_id"] for one in self.store.at_moments(documents.values())}
        for name, document in documents.items():
            known.setdefault(_same_digits(document), name)
        names = {*known.values()}
        return {name: document for name, document in documents.items() if name in names}

    def _path(self) -> Path:
        return self.settings.state_directory / MIGRATION_NAME

    def _what(self) -> str:
        place = f"{self.settings.mongodb_shown()} {self.settings.mongodb_db_name}"
        return f"{place} {self.source} -> {self.settings.realtime_name}, {self.zone}"

    def _recall(self) -> None:
        """Go on from where an earlier run was, if it was about the same; what nobody can read begins anew."""
        from bson import json_util

        if self.dry:
            return
        make_state_directory(self.settings.state_directory)
        with (
            disk_trouble(phrase("tools.not_read", path=self._path())),
            contextlib.suppress(FileNotFoundError, ValueError, TypeError, KeyError),
        ):
            options = json_util.JSONOptions(tz_aware=False)
            told = json_util.loads(read_file(self._path()), json_options=options)
            if told.pop("what") == self._what():
                told |= {"after": {**told["after"]}, "examples": [*unpacked(told["examples"])]}
                self.done = Migrated(**told)

    def _remember(self) -> None:
        from bson import json_util

        if not self.dry:
            told = {"what": self._what()} | vars(self.done) | {"examples": packed(self.done.examples)}
            write_whole(self._path(), json_util.dumps(told))

    def words(self) -> Phrase:
        """Return what was done, in a line, and examples of what could not be."""
        done = self.done
        trades = done.read - done.no_trade
        if self.dry:
            line = phrase(
                "migration.would_do",
                documents=count_words(done.read, "document"),
                source=self.source,
                trades=count_words(trades, "trade"),
                no_trade=done.no_trade,
            )
        else:
            line = phrase(
                "migration.done",
                documents=count_words(done.read, "document"),
                source=self.source,
                added=count_words(done.stored, "trade"),
                target=self.store.realtime_name,
                known=trades - done.stored - done.refused,
                no_trade=done.no_trade,
                refused=done.refused,
            )
        return listing("join.lines", [line, *done.examples])


def _same_digits(document: Document) -> tuple[object, ...]:
    """Return what two documents of one trade have in common, however their numbers are written."""
    from decimal import Decimal

    p, v = (Decimal(str(document[name])) for name in ("p", "v"))
    return document["s"], document["t"], p, v, document["td"]


# ======================================================================================================
# Views: what is stored, for people and for other programs
# ======================================================================================================

# Steps of a session in a sparkline, and the heights of its bars.
SPARKS, BARS = 20, "▁▂▃▄▅▆▇█"
# What --show lists where nothing says which codes.
CODES_SHOWN = 50
# Of a name in a table on a terminal: as many columns at most, and where it is narrow at least.
NAME_COLUMNS, NAME_LEAST = 20, 8
# Where red is the colour of what rises. In Hong Kong, Macau and Singapore green is, as in the West.
RED_RISES = r"(?i)(?:zh(?!_(?:HK|MO|SG))|ja|ko)(?:_|\.|@|$)"
# How a terminal is told.
PAINTS, LIT = {"red": "31", "green": "32"}, "7"
OTHER_COLOR = {"red": "green", "green": "red"}
# A cell that changed is lit for so long.
LIT_S = 0.8
# Between two columns.
BETWEEN = "  "
NO_PAINTS: Mapping[int, str] = MappingProxyType({})


def columns_of(text: str) -> int:
    """Return how many columns of a terminal a text takes: two for each character that is a wide one."""
    if text.isascii():
        return len(text)
    import unicodedata

    return sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in text)


def padded(text: str, columns: int) -> str:
    """Return a text with as many blanks behind it as fill so many columns of a terminal."""
    return text + " " * (columns - columns_of(text))


def fitting(text: str, columns: int) -> str:
    """Return as much of a text as fits into so many columns of a terminal."""
    while columns_of(text) > columns:
        text = text[:-1]
    return text


def color_of_rise(environ: Mapping[str, str], up: str | None) -> str:
    """Return the colour of what rises, `red` or `green`: `up`, else as the reader's locale has it.

    A locale tells the place. Where it is none of Chinese, red is for who reads Chinese all the same (STOCKRT_LANG).
    """
    locale = locale_name(environ)
    by_language = SPOKEN.language == CHINESE and not locale.lower().startswith("zh")
    return up or ("red" if by_language or re.match(RED_RISES, locale) else "green")


def date_at(t: int) -> str:
    """Return the UTC date of a time (ms), the first or the last of all that ISO 8601 has for what is beyond them."""
    return utc_day(max(t, 0) / 1000) if t < LATEST_TRADE_MS else date.max.isoformat()


class Span(NamedTuple):
    """What of the stores is asked for: since <= t < until, epoch ms; from 0 on: as far back as a step goes."""

    since: int = 0
    until: int = NEVER


class TradingSpan(NamedTuple):
    """The part of a market's day that a trade belongs to (epoch ms, half open), and the day's date."""

    date: str
    since: int
    until: int


NO_SPAN = TradingSpan("", 0, 0)


# Opening auctions print their price, which is the session's open, up to ten minutes before trading begins: SH and SZ at
# 9:25, HK from 9:20, IN from 9:07. In the US the auction is at the open, and others trade before it.
AUCTION_MS = 600_000


def trading_span(code: str, t: int) -> TradingSpan:
    """Return the regular session that a trade belongs to, or follows: the hours before it are their own span.

    Where the session is not known, or rests, it is the exchange's day, else that of UTC.
    """
    market = market_of(code)
    session = NO_SESSION if market is None else session_of(market, t)
    if market is None or session is NO_SESSION:
        start = t - t % DAY_MS
        return TradingSpan(date_at(t), start, start + DAY_MS)
    if market.continuous:
        # what goes on through its close is in the next session from that moment on
        hour, minute = market.hours.close
        following = session_of(market, t + DAY_MS - (hour * 60 + minute) * 60_000)
        session = session if following.opens == NEVER else following
    if session.opens == NEVER:
        return TradingSpan(session.date, session.start, session.end)
    if market.continuous:
        return TradingSpan(session.date, session.until + 1 - DAY_MS, session.until + 1)
    opens = session.opens - AUCTION_MS * (market is not MARKETS["US"])
    if t < opens:
        return TradingSpan(session.date, session.start, opens)
    return TradingSpan(session.date, opens, session.until + 1)


class Quote(NamedTuple):
    """What is known of a code: its latest trade, what its session came to, and what it is compared with.

    `candles`: the session in SPARKS steps, those without trades missing. `reference`: the last final close before
    the session. What is not known is None, or ''.
    """

    code: str
    name: str
    trade: StoredTrade
    span: TradingSpan
    candles: tuple[Candle, ...]
    reference: StoredClose | None

    @property
    def change(self) -> float | None:
        """By how many per cent the price differs from the reference."""
        if self.reference is None or not float(self.reference.p):
            return None
        before = float(self.reference.p)
        return (float(self.trade.p) - before) / abs(before) * 100

    @property
    def session(self) -> Candle | None:
        """The session in one step."""
        return joined(self.candles)._replace(t=self.span.since) if self.candles else None

    def spark(self) -> list[float | None]:
        """Return the price at each step's end, up to that of the last trade; None before the first."""
        step = step_of(self.span)
        closes = {(candle.t - self.span.since) // step: float(candle.close) for candle in self.candles}
        points: list[float | None] = []
        for number in range(max(closes, default=-1) + 1):
            before = points[-1] if points else None
            points.append(closes.get(number, before))
        return points

    def document(self, now: float) -> dict[str, object]:
        """Return all of it for a program; `now` in epoch seconds."""
        session, reference = self.session, self.reference
        facts: dict[str, object] = {
            "code": self.code,
            "name": self.name or None,
            "price": self.trade.p,
            "t": self.trade.t,
            "age_s": round(now - self.trade.t / 1000, 3),
            "change_percent": None if self.change is None else round(self.change, 4),
            "reference_close": None if reference is None else reference.p,
            "reference_date": None if reference is None else reference.date,
            "session": self.span.date,
        }
        for name in ("open", "high", "low", "volume"):
            facts[name] = getattr(session, name, None)
        return facts | {"spark": self.spark()}


def with_trade(quote: Quote, trade: StoredTrade) -> Quote:
    """Return what a quote becomes by a trade; by one that is not later than the latest nothing else."""
    if (trade.t, trade.id) <= (quote.trade.t, quote.trade.id):
        return quote
    span, candles, reference = quote.span, quote.candles, quote.reference
    if not span.since <= trade.t < span.until:
        span = trading_span(quote.code, trade.t)
    if span != quote.span:
        candles = ()
    if span.date != quote.span.date:
        reference = None
    if span.since <= trade.t < span.until:
        start = trade.t - (trade.t - span.since) % step_of(span)
        new = Candle(start, trade.p, trade.p, trade.p, trade.p, trade.v, 1)
        if candles and candles[-1].t == start:
            candles, new = candles[:-1], joined((candles[-1], new))
        candles = (*candles, new)
    return quote._replace(trade=trade, span=span, candles=candles, reference=reference)


def joined(candles: Sequence[Candle]) -> Candle:
    """Return candles, at least one, as one."""
    from decimal import Decimal

    high = max((candle.high for candle in candles), key=float)
    low = min((candle.low for candle in candles), key=float)
    volume = format(sum(Decimal(candle.volume) for candle in candles), "f")
    first, last = candles[0], candles[-1]
    return Candle(
        first.t, first.open, high, low, last.close, volume, sum(candle.trades for candle in candles)
    )


def step_of(span: TradingSpan) -> int:
    """Return the length of a step of a sparkline (ms)."""
    return -((span.since - span.until) // SPARKS)


def quotes(reader: Reader, codes: Sequence[str], english: bool = False) -> list[Quote]:
    """Return what a store has of codes, in their order; one without a trade is missing. Raises StoreError."""
    last = reader.last(codes)
    spans = {code: trading_span(code, trade.t) for code, trade in last.items()}
    candles: dict[str, list[Candle]] = {}
    for span in set(spans.values()):
        together = [code for code, its in spans.items() if its == span]
        candles |= reader.candles(together, span.since, span.until, step_of(span))
    finals = reader.last_finals({code: span.date for code, span in spans.items()})
    names = reader.names(last, english)
    return [
        Quote(
            code, names.get(code, ""), last[code], spans[code], tuple(candles.get(code, ())), finals.get(code)
        )
        for code in dict.fromkeys(codes)
        if code in last
    ]


def in_order(found: Sequence[Quote], by: str) -> list[Quote]:
    """Return quotes by `code`, by `change` (what rose most first, what has none last), or as `asked`."""
    if by == "code":
        return sorted(found)
    if by == "change":
        return sorted(found, key=_rise, reverse=True)
    return list(found)


def _rise(quote: Quote) -> float:
    return -math.inf if quote.change is None else quote.change


class Column(NamedTuple):
    """A column of a table, its title as a kind; `width` counts where lines are printed before all are known.

    A narrow terminal loses the columns with a number `given_up`, in the order of these, equal ones together.
    """

    kind: str
    right: bool = False
    width: int = 0
    given_up: int = 0

    @property
    def title(self) -> str:
        """Its title in the reader's language."""
        return for_reader(phrase(self.kind))


def line_of(
    columns: Sequence[Column],
    cells: Sequence[str],
    widths: Sequence[int],
    paints: Mapping[int, str] = NO_PAINTS,
) -> str:
    """Return the line of a table; `paints`: by place, how a cell is shown."""
    parts = []
    for place, (column, cell, width) in enumerate(zip(columns, cells, widths, strict=True)):
        blanks = " " * (width - columns_of(cell))
        if cell and place in paints:
            cell = f"\033[{paints[place]}m{cell}\033[0m"
        parts.append(blanks + cell if column.right else cell + blanks)
    return BETWEEN.join(parts).rstrip()


QUOTE_COLUMNS = (
    Column("views.code"),
    Column("views.name", given_up=5),
    Column("views.last", right=True),
    Column("views.change", right=True),
    Column("views.open", right=True, given_up=1),
    Column("views.high", right=True, given_up=2),
    Column("views.low", right=True, given_up=2),
    Column("views.volume", right=True, given_up=3),
    Column("views.age", right=True, given_up=6),
    Column("views.course", given_up=4),
)
NAME_COLUMN, LAST_COLUMN, CHANGE_COLUMN, AGE_COLUMN = 1, 2, 3, 8


class QuoteTable:
    """Lays quotes out as lines of a terminal. `up`: the colour of what rises, '' for no colours.

    Without a `width` no column is lost and no name cut.
    """

    def __init__(self, width: int | None, up: str = "", encoding: str = "utf-8") -> None:
        self.width = width
        self._up = up
        self._bars = BARS
        try:
            BARS.encode(encoding)
        except (UnicodeError, LookupError):
            self._bars = ""
        self._before: dict[str, list[str]] = {}
        self._lit_until: dict[tuple[str, int], float] = {}  # by code and column

    def lines(self, found: Sequence[Quote], now: float, lit: bool = False) -> list[str]:
        """Return the title and a line for each quote; `lit`: cells that changed of late are."""
        rows = {quote.code: self._cells(quote, now) for quote in found}
        titles = [column.title for column in QUOTE_COLUMNS]
        widths = [max(map(columns_of, cells)) for cells in zip(titles, *rows.values(), strict=True)]
        filled = [any(cells) for cells in zip(*rows.values(), strict=True)] or [True] * len(titles)
        kept = self._kept(widths, filled)
        if self.width is not None and NAME_COLUMN in kept:
            over = max(0, _needed(widths, kept) - self.width)
            widths[NAME_COLUMN] -= over
            for cells in rows.values():
                cells[NAME_COLUMN] = fitting(cells[NAME_COLUMN], widths[NAME_COLUMN]).rstrip()
        columns, widths = [QUOTE_COLUMNS[place] for place in kept], [widths[place] for place in kept]
        title = line_of(columns, [column.title for column in columns], widths)
        lines = [f"\033[1m{title}\033[0m" if self._up else title]
        for one in found:
            cells, paints = rows[one.code], self._paints(one)
            for place in self._changed(one.code, cells, now) if lit and self._up else ():
                paints[place] = ";".join(filter(None, (LIT, paints.get(place))))
            shown = {number: paints[place] for number, place in enumerate(kept) if place in paints}
            lines.append(line_of(columns, [cells[place] for place in kept], widths, shown))
        self._before = rows
        return lines

    def _changed(self, code: str, cells: Sequence[str], now: float) -> list[int]:
        """Return which cells of a line changed in the last LIT_S, the age left out."""
        for number, (before, cell) in enumerate(zip(self._before.get(code, cells), cells, strict=True)):
            if before != cell and number != AGE_COLUMN:
                self._lit_until[code, number] = now + LIT_S
        return [number for number in range(len(cells)) if self._lit_until.get((code, number), now) > now]

    def _cells(self, quote: Quote, now: float) -> list[str]:
        session, price = quote.session, quote.trade.p
        change = "-" if quote.change is None else signed_percent(quote.change)
        opened = high = low = volume = "-"
        if session is not None:
            opened, high, low = (with_decimals_of(price, text) for text in session[1:4])
            volume = short_number(session.volume, SPOKEN.language)
        name = quote.name
        if self.width is not None:
            name = fitting(name, NAME_COLUMNS).rstrip()
        spark = sparkline(quote.spark(), self._bars)
        age = for_reader(age_or_ahead(now - quote.trade.t / 1000))
        return [quote.code, name, price, change, opened, high, low, volume, age, spark]

    def _kept(self, widths: Sequence[int], filled: Sequence[bool]) -> list[int]:
        """Return which columns there are: those that hold something, as far as the terminal is wide enough."""
        kept = [number for number, holds in enumerate(filled) if holds]
        least = list(widths)
        least[NAME_COLUMN] = min(widths[NAME_COLUMN], NAME_LEAST)
        for turn in sorted({column.given_up for column in QUOTE_COLUMNS if column.given_up}):
            if self.width is not None and _needed(least, kept) > self.width:
                kept = [number for number in kept if QUOTE_COLUMNS[number].given_up != turn]
        return kept

    def _paints(self, quote: Quote) -> dict[int, str]:
        if not self._up or not quote.change:
            return {}
        color = self._up if quote.change > 0 else OTHER_COLOR[self._up]
        return dict.fromkeys((LAST_COLUMN, CHANGE_COLUMN), PAINTS[color])


def _needed(widths: Sequence[int], kept: Sequence[int]) -> int:
    """Return how wide a line is that has some of the columns."""
    return sum(widths[number] for number in kept) + len(BETWEEN) * (len(kept) - 1)


def signed_percent(change: float) -> str:
    """Return a change with its sign, which says what a colour alone would not."""
    text = f"{change:+.2f}%"
    return text.replace("+", "").replace("-", "") if float(text[:-1]) == 0 else text


# What the units of short numbers are, the greatest first.
SHORT_SIZES = {ENGLISH: (1e12, 1e9, 1e6), CHINESE: (1e12, 1e8, 1e4)}


def short_number(text: str, language: str) -> str:
    """Return a number in six to ten columns, with its language's units."""
    number = float(text)
    units = in_language(phrase("views.units"), language).split()
    for size, unit in zip(SHORT_SIZES[language], units, strict=True):
        if abs(number) >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:,.0f}" if abs(number) >= 1000 or number.is_integer() else f"{number:.4g}"


def age_or_ahead(seconds: float) -> Phrase:
    """Return an age in words, and of what is ahead of this clock by more than a moment how far."""
    if seconds < -1:
        return phrase("views.ahead", age=age_words(-seconds)[0])
    return age_words(seconds)[0]


def sparkline(points: Sequence[float | None], bars: str = BARS) -> str:
    """Return points as bars between the lowest and the highest of them, a blank for None."""
    known = [point for point in points if point is not None]
    if not (known and bars):
        return ""
    low, high = min(known), max(known)
    if low == high:
        return "".join(" " if point is None else bars[len(bars) // 2] for point in points)
    scale = (len(bars) - 1) / (high - low)
    return "".join(" " if point is None else bars[round((point - low) * scale)] for point in points)


# ------------------------------------------------------------------------------------------------------
# Export
# ------------------------------------------------------------------------------------------------------

# How an export is written, by the end of its file's name.
EXPORT_FORMS = (".csv", ".jsonl")
# What an export of closes has of each.
CLOSE_NAMES = tuple("stock_code date close final after_hours open high low volume turnover t".split())


class Export(NamedTuple):
    """What is exported: trades, or closes, of codes and a span of time; `is_whole`: of all codes, all of them."""

    codes: Sequence[str]
    span: Span
    closes: bool
    is_whole: bool
    as_json: bool

    @property
    def names(self) -> tuple[str, ...]:
        """What the fields of its rows are called."""
        return CLOSE_NAMES if self.closes else DOCUMENT_FIELDS

    def rows(self, reader: Reader) -> Iterator[Sequence[Sequence[Any]]]:
        """Yield rows, some thousand at once, code by code. Raises StoreError."""
        if not self.closes:
            yield from reader.trades(None if self.is_whole else self.codes, *self.span)
            return
        for codes in parts_of(sorted(self.codes), CODES_ASKED):
            found = reader.closes(codes, date_at(self.span.since), date_at(self.span.until - 1))
            closes = (close for code in codes for close in found.get(code, ()))
            yield [(code, day, p, *rest, t) for code, day, t, p, *rest in closes]

    def lines(self, rows: Sequence[Sequence[Any]]) -> bytes:
        """Return rows as lines: of CSV, or a JSON document each."""
        if self.as_json:
            encode = json.JSONEncoder(ensure_ascii=False).encode
            documents = (dict(zip(self.names, row, strict=True)) for row in rows)
            return "".join(f"{encode(document)}\n" for document in documents).encode(errors="stockrt")
        return csv_lines(rows).encode(errors="stockrt")


def csv_lines(rows: Sequence[Sequence[Any]]) -> str:
    """Return rows, all of one length, as CSV."""
    form = ",".join(["%s"] * len(rows[0])) + "\n" if rows else ""
    text = "".join([form % (*row,) for row in rows])
    has_others = '"' in text or "\r" in text or text.count("\n") != len(rows)
    if not has_others and text.count(",") == len(rows) * form.count(","):
        return text
    import csv  # which takes thrice the time, for what is rare

    quoted = io.StringIO()
    csv.writer(quoted, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows(rows)
    return quoted.getvalue()


# ------------------------------------------------------------------------------------------------------
# Charts
# ------------------------------------------------------------------------------------------------------

DAILY = "1d"
# The steps of candles in milliseconds, and how many days they go back where nobody says since when.
STEPS = {"1m": 60_000, "5m": 300_000, "1h": 3_600_000, DAILY: DAY_MS}
STEP_KINDS = {"1m": "views.step_1m", "5m": "views.step_5m", "1h": "views.step_1h", DAILY: "views.step_1d"}
DAYS_BACK = {"1m": 1, "5m": 7, "1h": 60, DAILY: 500}
# Steps without a trade are left out (a night would be most of the chart); where the stream missed something, so many
# between two with a trade are shown.
GAP_SLOTS = 5


class Slot(NamedTuple):
    """A step of a chart, from `t` (epoch ms) on: what was traded, and whether the stream missed some of it."""

    t: int
    candle: Candle | None
    is_gap: bool = False


class Chart(NamedTuple):
    """The newest steps of a code by time. `left_out`: candles before them; `gaps`: of the stream, in its span."""

    code: str
    step: str
    slots: Sequence[Slot] = ()
    gaps: Sequence[Gap] = ()
    left_out: int = 0

    @property
    def candles(self) -> list[Candle]:
        """Those of its steps that were traded in."""
        return [slot.candle for slot in self.slots if slot.candle]

    def documents(self) -> Iterator[dict[str, object]]:
        """Yield the candles for a program; `gap`: the stream missed some of it."""
        for slot in self.slots:
            if slot.candle:
                yield {"code": self.code, "step": self.step, **slot.candle._asdict(), "gap": slot.is_gap}


def zone_of(code: str) -> tzinfo:
    """Return the zone of a code's exchange; UTC where the machine has no time-zone data, or nobody knows the market."""
    market = market_of(code)
    return (zone_info(market.zone) if market else None) or UTC


def exchange_time(code: str, t: int) -> str:
    """Return a moment on the exchange's clock; on UTC where the machine has no time-zone data."""
    return datetime.fromtimestamp(t / 1000, zone_of(code)).strftime("%Y-%m-%d %H:%M:%S %Z")


def midnight(code: str, t: int) -> int:
    """Return when the exchange-local date of a moment began, epoch ms."""
    then = datetime.fromtimestamp(min(t, LATEST_TRADE_MS) // 1000, zone_of(code))
    return int(then.replace(hour=0, minute=0, second=0).timestamp()) * 1000


def read_charts(
    reader: Reader,
    codes: Collection[str],
    last: Mapping[str, StoredTrade],
    step: str,
    span: Span,
    now: float,
    room: int,
) -> dict[str, Chart]:
    """Return a chart of each code of at most `room` steps, daily ones of final closes; `last`: their last trades.

    Raises StoreError.
    """
    if step == DAILY:
        closes = reader.closes(codes, *dates_of(span, now))
        slots = {code: _daily_slots(code, closes.get(code, [])) for code in codes}
        return {code: newest_steps(Chart(code, DAILY, slots[code]), room) for code in codes}
    until = min(span.until, max((trade.t for trade in last.values()), default=0) + 1)
    begins: defaultdict[int, list[str]] = defaultdict(list)
    for code, trade in last.items():
        begins[_begin_of(code, step, span, min(trade.t, until - 1))].append(code)
    charts = {}
    for since, together in begins.items():
        candles = reader.candles(together, since, until, STEPS[step])
        gaps = reader.gaps(together, since, min(span.until, int(now * 1000)))
        for code in together:
            missed = [gap for gap in gaps if code in gap.codes]
            steps = slots_of(candles.get(code, []), missed, since, STEPS[step], int(now * 1000))
            charts[code] = newest_steps(Chart(code, step, steps, missed), room)
    return charts


def _begin_of(code: str, step: str, span: Span, end: int) -> int:
    """Return where the first step begins, aligned on the exchange's clock."""
    if span.since <= 0:
        return midnight(code, end - (DAYS_BACK[step] - 1) * DAY_MS)
    return span.since - (span.since - midnight(code, span.since)) % STEPS[step]


def slots_of(
    candles: Sequence[Candle], gaps: Sequence[Gap], since: int, step_ms: int, now_ms: int
) -> list[Slot]:
    """Return the steps that were traded in, and between them the first few of gaps; steps begin at `since`."""
    slots = {candle.t: Slot(candle.t, candle) for candle in candles}
    for gap in gaps:
        end = max(gap.until or now_ms, gap.since + 1)
        first = max(gap.since, since)
        first -= (first - since) % step_ms
        for t, slot in slots.items():
            if first <= t < end:
                slots[t] = slot._replace(is_gap=True)
        empty = (t for t in range(first, end, step_ms) if t not in slots)
        slots |= {t: Slot(t, None, is_gap=True) for t in islice(empty, GAP_SLOTS)}
    shown: list[Slot] = []
    for t in sorted(slots):
        before = shown[-GAP_SLOTS:]
        if slots[t].candle or len(before) < GAP_SLOTS or any(slot.candle for slot in before):
            shown.append(slots[t])
    return shown


def dates_of(span: Span, now: float) -> tuple[str, str]:
    """Return the first and the last date of a span; tomorrow has begun somewhere on earth."""
    until = min(span.until - 1, int(now * 1000) + DAY_MS)
    return date_at(span.since or until - DAYS_BACK[DAILY] * DAY_MS), date_at(until)


def _daily_slots(code: str, closes: Sequence[StoredClose]) -> list[Slot]:
    slots = []
    for close in closes:
        if close.is_final:
            day = datetime.fromisoformat(close.date).replace(tzinfo=zone_of(code))
            t = int(day.timestamp()) * 1000
            slots.append(Slot(t, Candle(t, close.open, close.high, close.low, close.p, close.volume, 0)))
    return slots


def newest_steps(chart: Chart, room: int) -> Chart:
    """Return a chart without the steps that there is no room for, at least one candle kept where it has any."""
    slots = chart.slots
    traded = [place for place, slot in enumerate(slots) if slot.candle]
    if traded and traded[-1] < len(slots) - room:
        slots = slots[: traded[-1] + 1]
    left_out = sum(slot.candle is not None for slot in slots[:-room])
    slots = slots[-room:]
    gaps = [gap for gap in chart.gaps if gap.until is None or not slots or gap.until > slots[0].t]
    return chart._replace(slots=slots, gaps=gaps, left_out=chart.left_out + left_out)


def time_ticks(chart: Chart, most: int) -> list[tuple[int, str]]:
    """Return at most so many places of a chart with their times on the exchange's clock; a date where it is another."""
    zone, date = zone_of(chart.code), ""
    ticks = []
    for place in range(0, len(chart.slots), -(-len(chart.slots) // most) or 1):
        then = datetime.fromtimestamp(chart.slots[place].t // 1000, zone)
        words = f"{then:%Y-%m-%d}"
        if chart.step != DAILY:
            words = f"{then:%H:%M}" if f"{then:%m-%d}" == date else f"{then:%m-%d %H:%M}"
        date = f"{then:%m-%d}"
        ticks.append((place, words))
    return ticks


def price_range(candles: Iterable[Candle]) -> tuple[float, float]:
    """Return the lowest and the highest price of at least one candle, a little apart where they are the same."""
    lows, highs = zip(*((float(candle.low), float(candle.high)) for candle in candles), strict=True)
    low, high = min(lows), max(highs)
    margin = (abs(low) / 100 or 1.0) * (low == high)
    return low - margin, high + margin


def price_marks(candles: Sequence[Candle]) -> dict[float, str]:
    """Return five prices from the lowest to the highest, each with its words: no two have the same ones."""
    low, high = price_range(candles)
    decimals = max(len(candle.close.partition(".")[2]) for candle in candles)
    decimals = min(14, max(decimals, -math.floor(math.log10((high - low) / 4))))
    return {price: f"{price:.{decimals}f}" for price in (low + (high - low) * part / 4 for part in range(5))}


# A chart names so many of its gaps, and counts the others.
GAPS_TOLD = 5


def chart_span(chart: Chart) -> str:
    """Return when the first and the last step of a chart began, on the exchange's clock."""
    first, last = (exchange_time(chart.code, chart.slots[place].t) for place in (0, -1))
    if chart.step == DAILY:
        first, last = first[:10], last[:10]
    return f"{first} – {last}"


def chart_title(chart: Chart, name: str = "") -> str:
    """Return what a chart is of, for the reader: code, name, step, its first and its last step."""
    step = for_reader(phrase(STEP_KINDS[chart.step]))
    return "  ".join(filter(None, (chart.code, one_line(name), step, chart_span(chart))))


def chart_notes(chart: Chart) -> Iterator[str]:
    """Yield what is to be said below a chart: its last candle, gaps, and what is not on it."""
    _, first, high, low, last, volume, _ = chart.candles[-1]
    yield phrase("views.last_candle", open=first, high=high, low=low, close=last, volume=volume)
    for words in gaps_told(chart):
        yield f"░ {for_reader(words)}"
    if chart.left_out:
        yield phrase("views.left_out", candles=count_words(chart.left_out, "candle"))


def what_is_there(chart: Chart, last: StoredTrade | None) -> Phrase:
    """Return why a chart has no candle, and what there is in its place."""
    why = phrase("views.no_final" if chart.step == DAILY else "views.no_trade_then", code=chart.code)
    there = phrase("views.no_trade")
    if last is not None:
        there = phrase("views.last_trade", time=exchange_time(chart.code, last.t))
    return listing("join.clauses", [why, there])


def gaps_told(chart: Chart) -> Iterator[Phrase]:
    """Yield when the stream missed what was traded of a code, and why; of many gaps how many there are before."""
    for gap in chart.gaps[-GAPS_TOLD:]:
        end = phrase("views.now") if gap.until is None else exchange_time(chart.code, gap.until)
        since, why = exchange_time(chart.code, gap.since), one_line(gap_reason(gap.why), 80)
        yield phrase("views.gap", since=since, until=end, why=why)
    if len(chart.gaps) > GAPS_TOLD:
        yield phrase("views.more_gaps", gaps=count_words(len(chart.gaps) - GAPS_TOLD, "gap"))


# ------------------------------------------------------------------------------------------------------
# Candles in a terminal
# ------------------------------------------------------------------------------------------------------

# Columns of a label of the time axis and what keeps it from the next; lines of the volume below the candles.
TICK_COLUMNS = 14
VOLUME_LINES = 6
# What a chart leaves of a terminal to its title, its notes and the next prompt, and what it needs of a low one.
CAPTION_LINES, LEAST_LINES = 4, 14
# More columns between two candles would only tear them apart.
WIDEST_STEP = 3
# Without colours too what rises differs from what falls.
BODIES = {"up": "█", "down": "▒", "same": "┼"}
# plotext takes each character for one column: behind a wide one stands this, until it is drawn.
WIDENED = "\ue000"


def direction(candle: Candle) -> str:
    """Return whether the price went `up`, `down` or stayed the `same`."""
    first, last = float(candle.open), float(candle.close)
    return "same" if first == last else "up" if last > first else "down"


def draw_chart(chart: Chart, width: int, height: int, up: str, color: bool) -> tuple[str, Chart]:
    """Return candles and volume for a terminal of so many columns and lines, and what of the chart they show.

    The chart has a candle. `up`: `red` or `green`.
    """
    volumes = [short_number(candle.volume, SPOKEN.language) for candle in chart.candles]
    label = max(map(columns_of, [*price_marks(chart.candles).values(), *volumes]))
    chart = newest_steps(chart, max(1, width - label - 2))
    candles = chart.candles
    step = max(1, min(WIDEST_STEP, (width - label - 2) // len(chart.slots)))
    columns = max(len(chart.slots) * step, TICK_COLUMNS)
    colors = {"up": up, "down": OTHER_COLOR[up], "same": "default"}
    marks = price_marks(candles)
    plot = _field(columns, height - VOLUME_LINES, marks, label)
    for place, slot in enumerate(chart.slots):
        if slot.is_gap:
            _column(plot, place * step, (min(marks), max(marks)), "░", "gray")
        if slot.candle:
            candle, kind = slot.candle, direction(slot.candle)
            _column(plot, place * step, (float(candle.low), float(candle.high)), "│", colors[kind])
            _column(plot, place * step, (float(candle.open), float(candle.close)), BODIES[kind], colors[kind])
    drawn = plot.build()
    most = max(float(candle.volume) for candle in candles) or 1.0
    plot = _field(columns, VOLUME_LINES, {0.0: "0", most: short_number(str(most), SPOKEN.language)}, label)
    for place, slot in enumerate(chart.slots):
        if slot.candle and float(slot.candle.volume):
            kind = direction(slot.candle)
            _column(plot, place * step, (0.0, float(slot.candle.volume)), "█", colors[kind])
    ticks = time_ticks(chart, columns // TICK_COLUMNS)
    plot.xticks([place * step for place, _ in ticks], [words for _, words in ticks])
    drawn = (drawn + plot.build()).replace(WIDENED, "")
    return str(drawn if color else plot.uncolorize(drawn)), chart


def _field(columns: int, lines: int, marks: Mapping[float, str], label: int) -> Any:
    """Begin a field whose columns are the places 0, 1 … and whose axis has these marks; return plotext."""
    import plotext  # type: ignore[import-untyped]

    plotext.clear_figure()
    plotext.theme("clear")
    plotext.limit_size(False, False)
    plotext.plot_size(label + 2 + columns, lines)
    plotext.xlim(0, columns - 1)
    plotext.ylim(min(marks), max(marks))
    plotext.yticks(list(marks), [_widened(words).rjust(label) for words in marks.values()])
    plotext.xticks([])
    return plotext


def _widened(words: str) -> str:
    """Return words with as many characters as they take columns."""
    return "".join(character + WIDENED * (columns_of(character) - 1) for character in words)


def _column(plot: Any, place: int, span: tuple[float, float], marker: str, color: str) -> None:
    plot.plot([place, place], span, marker=marker, color=color)


# ------------------------------------------------------------------------------------------------------
# The page
# ------------------------------------------------------------------------------------------------------

# Steps of a chart on the page, and sessions of the history of closes: 50 codes stay far below 1 MB.
PAGE_STEPS = 120
PAGE_FORMS = (".html", ".htm", ".svg")
PAGE_CLOSES = 250
# The drawing's units: all whole, so that a path is short.
DRAWING_WIDTH = 820
PLOT_WIDTH, PRICE_HEIGHT, VOLUME_HEIGHT, CLOSES_HEIGHT = 720, 180, 40, 80
WIDEST_CANDLE = 24
# Of a time below it, and what keeps it from the next.
TICK_WIDTH = 120
DRAWING_STYLE = """
:root{--bg:#fff;--ink:#1b1f24;--dim:#667085;--line:#e4e7ec;--gap:#f2c94c;--red:#c8102e;--green:#0a7d3c}
:root{--up:var(--green);--down:var(--red)}:root[data-up=red]{--up:var(--red);--down:var(--green)}
@media (prefers-color-scheme:dark){:root{--bg:#12151a;--ink:#e6e9ee;--dim:#98a2b3;--line:#2a2f38;--gap:#7a6210;
--red:#ff6b6b;--green:#3ddc84}}
@media print{:root{--bg:#fff;--ink:#000;--dim:#444;--line:#bbb;--gap:#ddd;--red:#c8102e;--green:#0a7d3c}}
svg{font:15px/1.5 system-ui,"PingFang SC","Microsoft YaHei","Noto Sans CJK SC",sans-serif;background:var(--bg)}
svg text{fill:var(--dim);font-size:12px}svg .axis{stroke:var(--line)}svg .gap{fill:var(--gap);opacity:.5}
svg .up{stroke:var(--up);fill:var(--bg)}svg .down{stroke:var(--down);fill:var(--down)}
svg .same{stroke:var(--dim);fill:var(--dim)}svg .line{stroke:var(--ink);fill:none}
"""
PAGE_STYLE = """
:root[lang=en] .zh,:root[lang=zh] .en{display:none}
*{box-sizing:border-box}
body{margin:0 auto;max-width:72rem;padding:1rem;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,"PingFang SC","Microsoft YaHei","Noto Sans CJK SC",sans-serif}
h1{font-size:1.3rem;margin:0}h2{font-size:1.1rem;margin:2rem 0 0}p{margin:.2rem 0;color:var(--dim)}
header{display:flex;flex-wrap:wrap;gap:0 1rem;align-items:baseline}header p{flex-basis:100%}
button{font:inherit;color:inherit;background:none;border:0;padding:.2rem .5rem;cursor:pointer}
button:focus-visible,a:focus-visible{outline:2px solid var(--ink)}
#language{margin-left:auto;border:1px solid var(--line);border-radius:.3rem}
.wide{overflow-x:auto}.name{max-width:14rem;overflow:hidden;text-overflow:ellipsis}
table{border-collapse:collapse;width:100%;margin-top:1rem;font-variant-numeric:tabular-nums}
th,td{padding:.2rem .5rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th:first-child,td:first-child,.name{text-align:left!important}
th{padding:0;font-weight:600}th[aria-sort=ascending] button::after{content:" ▲"}
th[aria-sort=descending] button::after{content:" ▼"}
a{color:inherit}.up{color:var(--up)}.down{color:var(--down)}
figure{margin:.5rem 0}figcaption{color:var(--dim);font-size:.85rem}
svg{display:block;width:100%;height:auto}svg.spark{width:5rem;margin-left:auto}
@media (max-width:40rem){.more{display:none}body{padding:.5rem}th button,td{padding:.2rem}svg text{font-size:20px}}
@media print{html{font-size:10px}body{font-size:10px;padding:0}#language{display:none}section{break-inside:avoid}
.wide{overflow:visible}.name{max-width:9rem}th button,td{padding:.1rem .3rem}}
"""
# Red is up where the reader's language has it so: as RED_RISES.
PAGE_SCRIPT = """
"use strict";
const root = document.documentElement;
const known = navigator.languages.map((tag) => tag.slice(0, 2)).find((tag) => tag === "zh" || tag === "en");
root.lang = known || root.lang;
if (!("fixed" in root.dataset) && navigator.language)
  root.dataset.up = /^(zh(?!-(HK|MO|SG|Hant-HK))|ja|ko)\\b/i.test(navigator.language) ? "red" : "green";
function sort(head) {
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of head.parentNode.querySelectorAll("[aria-sort]")) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const body = head.closest("table").tBodies[0];
  const value = (row) => row.cells[head.cellIndex].dataset.v ?? row.cells[head.cellIndex].innerText;
  const compare = (a, b) => (a - b) || (isNaN(a - b) ? a.localeCompare(b, root.lang) : 0);
  const rows = [...body.rows].filter((row) => value(row) !== "");
  const without = [...body.rows].filter((row) => value(row) === "");
  rows.sort((a, b) => (down ? -1 : 1) * compare(value(a), value(b)));
  body.append(...rows, ...without);
}
document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button && button.id === "language") root.lang = root.lang === "zh" ? "en" : "zh";
  else if (button) sort(button.closest("th"));
});
"""


def both(words: Phrase) -> str:
    """Return words of ours as HTML in both languages; the page shows the reader's."""
    return two(*(html_text(in_language(words, language), 1000) for language in LANGUAGES))


def two(english: str, chinese: str) -> str:
    """Return HTML of which the page shows the one or the other, or that which they both are."""
    if english == chinese:
        return english
    return f'<span class="en" lang="en">{english}</span><span class="zh" lang="zh">{chinese}</span>'


class PageColumn(NamedTuple):
    """A column of the page's overview, its title as a kind; `css`: how it is shown, `more` not on a phone."""

    kind: str
    css: str = ""
    sorts: bool = True


PAGE_COLUMNS = (
    PageColumn("views.page_code"),
    PageColumn("views.page_name", "name"),
    PageColumn("views.page_last"),
    PageColumn("views.page_change"),
    PageColumn("views.page_course", "more", sorts=False),
    PageColumn("views.page_open", "more"),
    PageColumn("views.page_high", "more"),
    PageColumn("views.page_low", "more"),
    PageColumn("views.page_volume", "more"),
    PageColumn("views.page_time", "more"),
)
# Of those the ones that show whether the price rose.
PAINTED_KINDS = ("views.page_last", "views.page_change")


class Page(NamedTuple):
    """What the page shows: quotes as asked, of each code its chart and its final closes, and `names` in Chinese.

    `made`: when, epoch seconds; `store`: where it is from; `language`: of who opens it, if the browser does not tell;
    `up`: the colour of what rises, everybody's if `is_fixed`; `is_chosen`: codes were named of which nothing is stored.
    """

    quotes: Sequence[Quote]
    names: Mapping[str, str]
    charts: Mapping[str, Chart]
    closes: Mapping[str, Sequence[StoredClose]]
    made: float
    store: str
    language: str
    up: str
    is_fixed: bool
    is_chosen: bool


def draw_page(page: Page) -> str:
    """Return the page: all of it in one text, nothing from elsewhere, whatever a name or a reason holds."""
    from base64 import b64encode
    from hashlib import sha256

    style = DRAWING_STYLE + PAGE_STYLE
    hashes = [b64encode(sha256(text.encode()).digest()).decode() for text in (style, PAGE_SCRIPT)]
    policy = "default-src 'none';style-src 'sha256-{}';script-src 'sha256-{}';img-src data:".format(*hashes)
    color = f' data-up="{page.up}"' + " data-fixed" * page.is_fixed
    head = (
        f'<!doctype html>\n<html lang="{page.language}"{color}>\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<title>stockrt</title>\n<link rel="icon" href="data:,">\n'
        f"<style>{style}</style>\n<script>{PAGE_SCRIPT}</script>\n</head>\n<body>\n"
    )
    parts = [head, _page_header(page), _overview(page), *(_section(page, quote) for quote in page.quotes)]
    return "".join(parts) + "</body>\n</html>\n"


def _page_header(page: Page) -> str:
    when = local_time(datetime.fromtimestamp(page.made, UTC))
    codes = count_words(len(page.quotes), "code")
    return (
        '<header><h1>stockrt</h1><button type="button" id="language">'
        '<span class="en" lang="zh">中文</span><span class="zh" lang="en">English</span></button><p>'
        f"{both(phrase('views.page_of', codes=codes, store=page.store, when=when))}</p></header>\n"
    )


def _overview(page: Page) -> str:
    if not page.quotes:
        kind = "views.page_nothing_of_them" if page.is_chosen else "views.page_empty"
        return f"<p>{both(phrase(kind))}</p>\n"
    heads = "".join(map(_head, PAGE_COLUMNS))
    rows = "".join(_row(page, quote) for quote in page.quotes)
    return (
        f'<div class="wide"><table><thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>\n'
    )


def _head(column: PageColumn) -> str:
    title, state = both(phrase(column.kind)), ""
    if column.sorts:
        title, state = f'<button type="button">{title}</button>', ' aria-sort="none"'
    return f'<th scope="col" class="{column.css}"{state}>{title}</th>'


def _row(page: Page, quote: Quote) -> str:
    change, prices, volume = quote.change, ("", "", ""), ("", "")
    if quote.session is not None:
        prices, number = quote.session[1:4], quote.session.volume
        volume = two(html_text(number), html_text(short_number(number, CHINESE))), number
    cells = [
        (f'<a href="#{html_text(quote.code)}">{html_text(quote.code)}</a>', quote.code),
        (_name(page, quote), None),
        (html_text(quote.trade.p), quote.trade.p),
        ("–", "") if change is None else (signed_percent(change), f"{change:.6f}"),
        (_spark(quote.spark()), ""),
        *((html_text(text), text) for text in prices),
        volume,
        (html_text(exchange_time(quote.code, quote.trade.t)), str(quote.trade.t)),
    ]
    row = ""
    for column, (content, value) in zip(PAGE_COLUMNS, cells, strict=True):
        css = column.css
        if column.kind in PAINTED_KINDS and change:
            css = "up" if change > 0 else "down"
        key = "" if value is None else f' data-v="{html_text(value)}"'
        row += f"<td{f' class={css}' * bool(css)}{key}>{content}</td>"
    return f"<tr>{row}</tr>\n"


def _name(page: Page, quote: Quote) -> str:
    """Return an instrument's name, as far as it is known, in the reader's language."""
    known = page.names.get(quote.code, "")
    return two(html_text(quote.name or known), html_text(known or quote.name))


def html_text(text: str, limit: int = 300) -> str:
    """Return any text as HTML that shows it, within an attribute as well."""
    return one_line(text, limit).translate(HTML_ESCAPES)


def _spark(prices: Sequence[float | None]) -> str:
    """Return the course of a session as a small line without an axis."""
    known = [(place, price) for place, price in enumerate(prices) if price is not None]
    if len(known) < 2:
        return ""
    low, high = min(price for _, price in known), max(price for _, price in known)
    points = " ".join(f"{place * 4},{_height(price, low, high, 18) + 1}" for place, price in known)
    return f'<svg class="spark" viewBox="0 0 {4 * len(prices)} 20"><polyline class="line" points="{points}"/></svg>'


def _height(price: float, low: float, high: float, of: int) -> int:
    """Return how far below the top of a drawing of that height a price is."""
    return round((high - price) / (high - low or 1) * of)


def _section(page: Page, quote: Quote) -> str:
    """Return what the page has of one code: candles, volume, gaps, the history of closes; or what there is not."""
    code = html_text(quote.code)
    parts = [f'<section id="{code}"><h2>{code} {_name(page, quote)}</h2>\n']
    chart = page.charts.get(quote.code, Chart(quote.code, ""))
    if chart.candles:
        parts.append(_figure(_chart_drawing(chart), _chart_caption(chart)))
    else:
        parts.append(f"<p>{both(phrase('views.page_no_trade'))}</p>\n")
    finals = [close for close in page.closes.get(quote.code, ()) if close.is_final][-PAGE_CLOSES:]
    if finals:
        parts.append(_figure(_closes_drawing(finals), _closes_caption(finals)))
    else:
        parts.append(f"<p>{both(phrase('views.page_no_final'))}</p>\n")
    return "".join(parts) + "</section>\n"


def _figure(drawing: str, caption: str) -> str:
    return f"<figure>{drawing}<figcaption>{caption}</figcaption></figure>\n"


def _chart_drawing(chart: Chart) -> str:
    candles = chart.candles
    low, high = price_range(candles)
    most = max(float(candle.volume) for candle in candles) or 1.0
    step = min(WIDEST_CANDLE, PLOT_WIDTH // len(chart.slots))
    width, bottom = max(1, step - 2), PRICE_HEIGHT + VOLUME_HEIGHT + 10
    paths: defaultdict[str, list[str]] = defaultdict(list)
    for place, slot in enumerate(chart.slots):
        if slot.candle is None:
            continue
        top, end, begin, foot = (
            _height(float(price), low, high, PRICE_HEIGHT)
            for price in (slot.candle.high, slot.candle.close, slot.candle.open, slot.candle.low)
        )
        volume = round(float(slot.candle.volume) / most * VOLUME_HEIGHT)
        left, upper, lower = place * step + 1, min(begin, end), max(begin, end)
        middle, body = left + width // 2, max(1, lower - upper)
        drawn = f"M{middle} {top}V{upper}M{middle} {lower}V{foot}M{left} {upper}h{width}v{body}h-{width}z"
        if volume:
            drawn += f"M{left} {bottom}h{width}v-{volume}h-{width}z"
        paths[direction(slot.candle)].append(drawn)
    parts = [*_price_axis(candles), *_gap_marks(chart, step, bottom)]
    parts += [f'<path class="{kind}" d="{"".join(drawn)}"/>' for kind, drawn in sorted(paths.items())]
    for number, (place, words) in enumerate(time_ticks(chart, max(1, len(chart.slots) * step // TICK_WIDTH))):
        css = ' class="more"' * (number % 2)
        parts.append(f'<text x="{place * step + 1}" y="{bottom + 20}"{css}>{words}</text>')
    return _svg(chart.code, bottom + 26, parts)


def _svg(code: str, height: int, parts: Iterable[str]) -> str:
    box = f"0 -16 {DRAWING_WIDTH} {height + 16}"
    return f'<svg viewBox="{box}" role="img" aria-label="{html_text(code)}">{"".join(parts)}</svg>'


def _price_axis(candles: Sequence[Candle]) -> Iterator[str]:
    for part, words in enumerate(price_marks(candles).values()):
        y = PRICE_HEIGHT - PRICE_HEIGHT * part // 4
        yield f'<path class="axis" d="M0 {y}H{PLOT_WIDTH}"/><text x="{PLOT_WIDTH + 4}" y="{y + 4}">{words}</text>'


def _gap_marks(chart: Chart, step: int, height: int) -> Iterator[str]:
    for place, slot in enumerate(chart.slots):
        if slot.is_gap:
            yield f'<rect class="gap" x="{place * step}" y="0" width="{step}" height="{height}"/>'


def _chart_caption(chart: Chart) -> str:
    step = phrase(STEP_KINDS[chart.step])
    words = phrase("views.page_candles", step=step, span=chart_span(chart))
    return "<br>".join(map(both, [words, *gaps_told(chart)]))


def _closes_drawing(finals: Sequence[StoredClose]) -> str:
    prices = [float(close.p) for close in finals]
    low, high = min(prices), max(prices)
    step = PLOT_WIDTH / max(1, len(prices) - 1)
    points = " ".join(
        f"{round(place * step)},{_height(price, low, high, CLOSES_HEIGHT)}"
        for place, price in enumerate(prices)
    )
    lowest, highest = (html_text(finals[prices.index(price)].p) for price in (low, high))
    parts = [
        f'<polyline class="line" points="{points}"/>',
        f'<text x="{PLOT_WIDTH + 4}" y="4">{highest}</text>',
        f'<text x="{PLOT_WIDTH + 4}" y="{CLOSES_HEIGHT + 4}">{lowest}</text>',
        f'<text y="{CLOSES_HEIGHT + 20}">{html_text(finals[0].date)}</text>',
        f'<text x="{PLOT_WIDTH}" y="{CLOSES_HEIGHT + 20}" text-anchor="end">{html_text(finals[-1].date)}</text>',
    ]
    return _svg(finals[0].code, CLOSES_HEIGHT + 26, parts)


def _closes_caption(finals: Sequence[StoredClose]) -> str:
    closes = count_words(len(finals), "final close")
    return both(phrase("views.page_finals", closes=closes, last=finals[-1].p))


def draw_picture(chart: Chart, up: str) -> str:
    """Return the candles of a code as an SVG file of its own; `up`: `red` or `green`. The chart has a candle."""
    title = html_text(chart_title(chart))
    drawing = _chart_drawing(chart).partition(">")
    begin = drawing[0].replace("<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" data-up="{up}" ')
    return f'{begin}><style>{DRAWING_STYLE}</style><text y="-4">{title}</text>{drawing[2]}\n'


# ------------------------------------------------------------------------------------------------------
# The dashboard
# ------------------------------------------------------------------------------------------------------


class Panel(NamedTuple):
    """A panel of the Grafana dashboard; `queries`: PromQL and what names its lines; `states`: the words of 0, 1 …"""

    title: str
    kind: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    states: tuple[str, ...] = ()


# Of two daemons on one machine the second has its name in the other label; see the README's section on metrics.
_WHOSE = "{{instance}} {{exported_instance}}"


def _line(expression: str, legend: str = _WHOSE) -> tuple[str, str]:
    return expression, legend


def _quantile(percent: int) -> tuple[str, str]:
    """Return the query of the time within which so many per cent of the API's answers came."""
    rates = f"sum by (le) (rate({LATENCY}_bucket[$__rate_interval]))"
    return f"histogram_quantile({percent / 100}, {rates})", f"{percent} %"


def _counted(metric: str, label: str = "") -> tuple[str, str]:
    """Return the query of what a counter counted lately, by its label."""
    increase = f"(increase({metric}[$__rate_interval]))"
    return (f"sum by ({label}) {increase}", f"{{{{{label}}}}}") if label else (f"sum {increase}", metric)


# fmt: off
PANELS = (
    Panel("Connected to the platform", "stat", "short", (_line("stockrt_platform_connected"),), ("no", "yes")),
    Panel("Version", "stat", "short", (_line("stockrt_info", "{{version}}"),)),
    Panel("Running since", "stat", "dateTimeFromNow", (_line("stockrt_start_time_seconds * 1000"),)),
    Panel("Last execution that stored every code", "stat", "dateTimeFromNow",
          (_line("(stockrt_last_success_timestamp_seconds > 0) * 1000"),)),
    Panel("Executions", "timeseries", "short", (_counted("stockrt_executions_total", "outcome"),)),
    Panel("Trades", "timeseries", "short",
          (_counted("stockrt_trades_stored_total"), _counted("stockrt_trades_duplicate_total"))),
    Panel("Codes that failed", "timeseries", "short", (_counted("stockrt_codes_failed_total", "reason"),)),
    Panel("Codes without a new trade although their market was open", "timeseries", "short",
          (_line("stockrt_codes_stale"),)),
    Panel("Waiting in the daemon", "timeseries", "short",
          (_line("stockrt_waiting_executions", f"executions {_WHOSE}"),
           _line("stockrt_waiting_results", f"results {_WHOSE}"),
           _line("stockrt_waiting_documents", f"documents {_WHOSE}"))),
    Panel("Connections made to the platform", "timeseries", "short",
          (_counted("stockrt_platform_connections_total"),)),
    Panel("Requests to the API", "timeseries", "short", (_counted("stockrt_api_requests_total", "answer"),)),
    Panel("Time until the API's answer", "timeseries", "s",
          (_quantile(50), _quantile(95), _quantile(99),
           _line(f"sum(rate({LATENCY}_sum[$__rate_interval])) / sum(rate({LATENCY}_count[$__rate_interval]))",
                 "mean"))),
    Panel("Requests of each key today", "timeseries", "short",
          (_line("stockrt_api_key_requests_today", "{{key}} used"),
           _line("stockrt_api_key_requests_left", "{{key}} left"))),
    Panel("State of each key", "state-timeline", "short", (_line("stockrt_api_key_state", "{{key}}"),), KEY_STATES),
    Panel("End of each key's plan", "stat", "dateTimeFromNow",
          (_line("(stockrt_api_key_end_timestamp_seconds > 0) * 1000", "{{key}}"),)),
    Panel("Documents that MongoDB refused", "stat", "short", (_line("stockrt_spool_rejects"),)),
    Panel("Trades that wait for MongoDB", "timeseries", "short", (_line("stockrt_spool_trades"),)),
    Panel("Bytes that wait for MongoDB", "timeseries", "bytes", (_line("stockrt_spool_bytes"),)),
    Panel("Trades that found no room", "timeseries", "short", (_counted("stockrt_spool_refused_total"),)),
    Panel("Connections to the stream", "timeseries", "short",
          (_line("stockrt_collect_connections", f"standing {_WHOSE}"),
           _line("stockrt_collect_connections_wanted", f"wanted {_WHOSE}"))),
    Panel("Codes that are collected without pause", "timeseries", "short",
          (_line("stockrt_collect_codes", f"subscribed {_WHOSE}"),
           _line("stockrt_collect_polled_codes", f"polled {_WHOSE}"))),
    Panel("Trades collected without pause", "timeseries", "short",
          (_counted("stockrt_collect_trades_total"), _counted("stockrt_collect_stored_total"),
           _counted("stockrt_collect_duplicate_total"), _counted("stockrt_collect_dropped_total"))),
    Panel("Time until a collected trade is durable", "timeseries", "s",
          (_line("stockrt_collect_delay_seconds", f"{{{{quantile}}}} {_WHOSE}"),)),
    Panel("Gaps of the stream today", "stat", "short", (_line("stockrt_collect_gaps_today"),)),
    Panel("Polls that were left out", "timeseries", "short", (_counted("stockrt_collect_missed_beats_total"),)),
)
# fmt: on
# Columns and rows of Grafana's grid, of which a line has 24 columns.
_PANEL_SIZES = {"stat": (6, 4), "timeseries": (12, 8), "state-timeline": (12, 4)}
_GRID_COLUMNS = 24
# Grafana brings older models up to date by themselves when they are imported.
_GRAFANA_SCHEMA = 39
_METRIC_NAME = r"\bstockrt_[a-z_]+"


def dashboard() -> dict[str, Any]:
    """Return a Grafana dashboard over the metrics, as its import takes it; data source and instances are variables."""
    source = {"type": "prometheus", "uid": "${datasource}"}
    instances = "label_values(stockrt_info, instance)"
    of_instance: dict[str, Any] = {
        "name": "instance",
        "label": "Instance",
        "type": "query",
        "datasource": source,
    }
    of_instance |= {
        "query": {"query": instances, "refId": "instances"},
        "definition": instances,
        "refresh": 2,
    }
    of_instance |= {"multi": True, "includeAll": True, "current": {"text": "All", "value": "$__all"}}
    sources = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    about = {"uid": "stockrt", "title": "stockrt", "tags": ["stockrt"], "schemaVersion": _GRAFANA_SCHEMA}
    times = {"timezone": "browser", "refresh": "30s", "time": {"from": "now-24h", "to": "now"}}
    parts = {"templating": {"list": [sources, of_instance]}, "panels": [*_placed(source)]}
    return about | times | parts | {"editable": True}


def _placed(source: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Yield the panels one beside the other, as many as a line has room for."""
    x = y = below = 0
    for number, panel in enumerate(PANELS, start=1):
        width, height = _PANEL_SIZES[panel.kind]
        if x + width > _GRID_COLUMNS:
            x, y = 0, below
        place = {"x": x, "y": y, "w": width, "h": height}
        x, below = x + width, max(below, y + height)
        yield {"id": number, "gridPos": place, "datasource": source} | _panel_model(panel, source)


def _panel_model(panel: Panel, source: Mapping[str, str]) -> dict[str, Any]:
    targets = [
        {
            "refId": chr(ord("A") + place),
            "datasource": source,
            "expr": re.sub(_METRIC_NAME, r'\g<0>{instance=~"$instance"}', expression),
            "legendFormat": legend,
        }
        for place, (expression, legend) in enumerate(panel.queries)
    ]
    words = {str(number): {"text": text, "index": number} for number, text in enumerate(panel.states)}
    mappings = [{"type": "value", "options": words}] * bool(words)
    model: dict[str, Any] = {"title": panel.title, "type": panel.kind, "targets": targets}
    model |= {"description": _help(panel)}
    model |= {"fieldConfig": {"defaults": {"unit": panel.unit, "mappings": mappings}, "overrides": []}}
    if panel.kind == "stat" and panel.unit == "short" and not panel.states:
        model["options"] = {"textMode": "value_and_name"}
    return model


def _help(panel: Panel) -> str:
    """Return what the metrics of a panel say of themselves."""
    helps = {metric.name: metric.help for metric in METRICS} | {f"{LATENCY}_bucket": LATENCY_HELP}
    names = re.findall(_METRIC_NAME, " ".join(expression for expression, _ in panel.queries))
    return " ".join(helps[name] for name in dict.fromkeys(names) if name in helps)


# ======================================================================================================
# Command line
# ======================================================================================================

EXIT_OK, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 130
# Up to here the rows wait until they can be aligned and stand in the order asked; beyond, memory is dearer.
ROWS_ALIGNED = 1000
# `systemctl reload` waits so long for the daemon to take what it hands over; a disk that hangs holds that up.
RELOAD_WAIT_S = 20.0
# Local files, the platform, MongoDB's servers, and a connection for each request that may be under way.
DESCRIPTORS_NEEDED = 64 + MAX_IN_FLIGHT
# Of each key as many connections to the stream as the greatest plan has, each with what wakes it.
DESCRIPTORS_OF_A_KEY = 3 * STREAM_LIMITS["pro"].connections
# What --executions lists where it is not told how many.
EXECUTIONS_SHOWN = 20
# What `td` says, in words.
SIDES = {0: "cli.no_side", 1: "cli.buy", 2: "cli.sell"}


class Options:
    """What the command line asks for; with nothing of it this is the daemon."""

    once = collect = check = check_settings = status = drain = retain = rejects = reload = register = False
    grafana = False
    chart: str | None = None
    html: str | None = None
    json = demo = retry = discard = force = dry_run = False
    backfill: int | None = None
    every: str | None = None
    executions: int | None = None
    show: Sequence[str] | None = None
    sort: str | None = None
    up: str | None = None
    export: str | None = None
    closes = False
    from_: str | None = None
    to: str | None = None
    symbols: str | None = None
    migrate: str | None = None
    documents: str | None = None
    time_zone: str | None = None
    codes: Sequence[str] = ()
    codes_file: str | None = None
    env_file: Path | None = None


def terminal_size(columns: int = 80) -> tuple[int, int]:
    """Return the columns and lines of the terminal that stdout is; where it is none or does not tell, others."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        found = os.get_terminal_size(sys.stdout.fileno())
        return found.columns or columns, found.lines or 24
    return columns, 24


# Of a line that is too long between them: blanks, and in Chinese any two characters but those that punctuation holds.
_PIECES = r"[（“《]*(?:[\u3000-\u9fff]|[^\s\u3000-\u9fff（“《，。；：？）”》]+)[，。；：？、）”》]*\s*|\S\s*"


def lines_within(text: str, columns: int) -> list[str]:
    """Return a text in lines of at most so many columns of a terminal, of which a Chinese character takes two."""
    lines = [""]
    for piece in re.findall(_PIECES, text):
        if lines[-1] and columns_of((lines[-1] + piece).rstrip()) > columns:
            lines.append("")
        lines[-1] += piece
    return [line.rstrip() for line in lines]


def cut_between_words(text: str, columns: int) -> str:
    """Return a text, or its beginning, cut between two words, where it takes more columns of a terminal."""
    if columns_of(text) <= columns:
        return text
    return fitting(lines_within(text, columns - 1)[0], columns - 1) + "…"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    import argparse

    # argparse would import shutil at every start to look
    width = terminal_size()[0] - 2

    class InReadersLanguage(argparse.RawDescriptionHelpFormatter):
        """Lays out help in the reader's language, which only --help asks for."""

        def __init__(self, prog: str) -> None:
            super().__init__(prog, width=width)

        def _get_help_string(self, action: argparse.Action) -> str:
            return for_reader(action.help or "").replace("%", "%%")

        def _split_lines(self, text: str, width: int) -> list[str]:
            return super()._split_lines(text, width) if text.isascii() else lines_within(text, width)

        def _fill_text(self, text: str, width: int, indent: str) -> str:
            return super()._fill_text(for_reader(text), width, indent)

        def _format_usage(self, *what: Any) -> str:
            """Return it in lines that fit: Python 3.11 and 3.12 leave a long group of flags in one."""
            indent = " " * (len(phrase("help.usage")) + len(self._prog) + 1)
            usage = " ".join(super()._format_usage(*what).split())
            usage = re.sub(r"(?<=\w) (?=[\[{A-Z])", "\0", usage)  # a flag and its value stay together
            lines = lines_within(usage, width - len(indent))
            return f"\n{indent}".join(lines).replace("\0", " ") + "\n\n"

        def format_help(self) -> str:
            text = super().format_help()
            for own in (phrase("help.usage"), phrase("help.options")):
                text = text.replace(own, for_reader(own), 1)
            return text

    parser = argparse.ArgumentParser(
        prog="stockrt",
        description=phrase("help.description"),
        epilog=phrase("help.examples"),
        formatter_class=InReadersLanguage,
        allow_abbrev=False,
        add_help=False,
    )
    parser.error = _refuse_arguments  # type: ignore[method-assign]
    # argparse says nothing where that fails
    parser._print_message = _print_help  # type: ignore[assignment, method-assign]
    parser.add_argument("-h", "--help", action="help", help=phrase("help.help"))
    _add_commands(parser.add_mutually_exclusive_group())
    _add_options(parser)
    return parser


def _flag(to: Any, name: str, words: Phrase, **how: Any) -> None:
    """Add a flag with its help; one of which nothing else is said takes no value."""
    to.add_argument(name, help=words, **(how or {"action": "store_true"}))


# What argparse says in English -> the kind of our words for it; `what` is such a text, too.
ARGPARSE_WORDS = {
    r"argument (?P<flag>[-\w/]+): (?P<what>.*)": "usage.argument",
    r"expected a file's name": "usage.file_name",
    r"expected one argument": "usage.one_value",
    r"expected at least one argument": "usage.some_value",
    r"ignored explicit argument (?P<value>.*)": "usage.no_value",
    r"invalid choice: (?P<value>.*) \(choose from (?P<choices>.*)\)": "usage.choice",
    r"invalid int value: (?P<value>.*)": "usage.whole_number",
    r"not allowed with argument (?P<other>.*)": "usage.excluded",
}


def argparse_words(message: str) -> str:
    """Return what argparse says in words of ours, which are the same in English; as it is where it says else."""
    for pattern, kind in ARGPARSE_WORDS.items():
        found = re.fullmatch(pattern, message, re.DOTALL)
        if found:
            values = found.groupdict()
            if "what" in values:
                values["what"] = argparse_words(values["what"])
            if "choices" in values:
                values["choices"] = listing("join.names", values["choices"].split(", "))
            return phrase(kind, **values)
    return message


def _print_help(text: str, *_: object) -> None:
    show(text.removesuffix("\n"))


def _refuse_arguments(message: str) -> NoReturn:
    raise UsageError(phrase("usage.see_help", words=argparse_words(message)))


def _refuse_unknown(unknown: Sequence[str], options: Options) -> NoReturn:
    """Refuse words that belong to no flag, with the flag that may be meant, or that codes may stand after."""
    import difflib

    names = [name for name in vars(Options) if not name.startswith("_")]
    flags = ["--help", *(f"--{name.replace('_', '-')}" for name in names)]
    text = " ".join(unknown)
    typed = re.findall(r"[-–—]+\w[\w-]*", text)
    near = [flag for one in typed for flag in difflib.get_close_matches(one, flags, n=1)]
    near += [f"--{word}" for word in text.split() if f"--{word}" in flags]
    words = phrase("usage.unknown", arguments=text)
    if near:
        raise UsageError(phrase("usage.did_you_mean", words=words, flags=" ".join(near)))
    given = [name for name in names if _is_given(options, name)]
    kind = "usage.see_help"
    if options.show is not None and options.html is None:
        kind = "usage.codes_after_show"
    elif not given or any(name in GOES_WITH["codes"] for name in given):
        kind = "usage.codes_after"
    raise UsageError(phrase("usage.see_help" if typed else kind, words=words))


def _add_commands(what: Any) -> None:
    executions = phrase("help.executions", shown=EXECUTIONS_SHOWN)
    symbols = phrase("help.symbols", examples=listing("join.names", ("茅台", "apple", "黄金")))
    _flag(what, "--once", phrase("help.once"))
    _flag(what, "--collect", phrase("help.collect"))
    _flag(what, "--backfill", phrase("help.backfill", most=MAX_BARS), metavar="DAYS", type=int)
    _flag(what, "--check", phrase("help.check"))
    _flag(what, "--check-settings", phrase("help.check_settings"))
    _flag(what, "--status", phrase("help.status"))
    _flag(what, "--executions", executions, metavar="N", nargs="?", const=EXECUTIONS_SHOWN, type=int)
    _flag(what, "--show", phrase("help.show", shown=CODES_SHOWN), nargs="*", metavar="CODE")
    _flag(what, "--export", phrase("help.export"), metavar="FILE")
    _flag(what, "--symbols", symbols, metavar="TEXT")
    _flag(what, "--drain", phrase("help.drain"))
    _flag(what, "--retain", phrase("help.retain"))
    _flag(what, "--rejects", phrase("help.rejects"))
    _flag(what, "--reload", phrase("help.reload"))
    _flag(what, "--register", phrase("help.register"))
    _flag(what, "--migrate", phrase("help.migrate"), nargs="?", const="", metavar="DIR")
    _flag(what, "--grafana", phrase("help.grafana"))
    _flag(what, "--version", phrase("help.version"), action="version", version=f"stockrt {__version__}")


def _file_name(text: str) -> str:
    """Return the name of a file; an empty one, which a variable of a script may be, is refused."""
    import argparse

    if not text:
        raise argparse.ArgumentTypeError(phrase("usage.file_name"))
    return text


def _file_path(text: str) -> Path:
    return Path(_file_name(text))


def _add_options(parser: argparse.ArgumentParser) -> None:
    documents = phrase("help.documents", collection=OLD_COLLECTION)
    places = phrase("help.env_file", places=listing("join.names", map(str, ENV_FILE_PLACES)))
    orders, colors = ("code", "change", "asked"), ("red", "green")
    _flag(parser, "--codes", phrase("help.codes"), nargs="+", metavar="CODE")
    _flag(parser, "--codes-file", phrase("help.codes_file"), metavar="FILE", type=_file_name)
    _flag(parser, "--every", phrase("help.every"), metavar="S")
    _flag(parser, "--json", phrase("help.json"))
    _flag(parser, "--demo", phrase("help.demo"))
    _flag(parser, "--chart", phrase("help.chart"), choices=tuple(STEPS))
    _flag(parser, "--html", phrase("help.html"), metavar="FILE")
    _flag(parser, "--closes", phrase("help.closes"))
    _flag(parser, "--from", phrase("help.from"), dest="from_", metavar="TIME")
    _flag(parser, "--to", phrase("help.to"), metavar="TIME")
    _flag(parser, "--sort", phrase("help.sort"), choices=orders)
    _flag(parser, "--up", phrase("help.up"), choices=colors)
    _flag(parser, "--retry", phrase("help.retry"))
    _flag(parser, "--discard", phrase("help.discard"))
    _flag(parser, "--documents", documents, nargs="?", const="", metavar="COLLECTION")
    _flag(parser, "--time-zone", phrase("help.time_zone"), metavar="ZONE")
    _flag(parser, "--dry-run", phrase("help.dry_run"))
    _flag(parser, "--force", phrase("help.force"))
    _flag(parser, "--env-file", places, metavar="FILE", type=_file_path)


# Which commands, or what else, each flag goes with.
GOES_WITH = {
    "json": ("once", "collect", "show", "export", "check", "status", "executions", "rejects", "symbols"),
    "codes": ("once", "collect", "backfill", "show", "html", "export"),
    "codes_file": ("once", "collect", "backfill", "show", "html", "export"),
    "demo": ("once", "collect", "show", "html", "export"),
    "every": ("collect",),
    "sort": ("show", "html", "collect"),
    "up": ("show", "html", "collect"),
    "closes": ("export",),
    "chart": ("show", "html"),
    "from_": ("export", "chart", "html"),
    "to": ("export", "chart", "html"),
    "retry": ("drain",),
    "discard": ("rejects",),
    "force": ("register", "documents"),
    "documents": ("migrate",),
    "time_zone": ("migrate",),
    "dry_run": ("migrate",),
}


def _is_given(options: Options, name: str) -> bool:
    return getattr(options, name) not in (None, False, ())


# Longer than any name in the API's lists; SQLite takes no pattern of many thousands.
LONGEST_SOUGHT = 200


def parse_arguments(argv: Sequence[str]) -> Options:
    """Return the options. Raises UsageError for what does not go together."""
    options = Options()
    if "--show" not in argv and any(word.partition("=")[0] == "--html" for word in argv):
        argv = ["--show", *argv]  # a page is what it shows
    if argv:  # or the daemon would carry argparse for months (0.6 MB)
        _, unknown = make_parser().parse_known_args(argv, options)
        if unknown:
            _refuse_unknown(unknown, options)
    if options.symbols is not None:
        _check_symbols(options.symbols)
    if options.executions is not None and not 1 <= options.executions <= ANSWERS_KEPT:
        raise UsageError(phrase("usage.executions", n=options.executions, most=ANSWERS_KEPT))
    if options.json and options.html is not None:
        raise UsageError(phrase("usage.json_with_html"))
    if options.html is not None and not options.html.lower().endswith(PAGE_FORMS):
        raise UsageError(phrase("usage.html", file=one_line(options.html, 100)))
    for flag, commands in GOES_WITH.items():
        if _is_given(options, flag) and not any(_is_given(options, name) for name in commands):
            *names, last = (f"--{name.strip('_').replace('_', '-')}" for name in (*commands, flag))
            raise UsageError(phrase("usage.goes_with", flag=last, commands=alternatives(names)))
    _check_export(options)
    if options.backfill is not None and not 1 <= options.backfill <= MAX_BARS:
        raise UsageError(phrase("usage.backfill", n=options.backfill, most=MAX_BARS))
    _check_migration(options)
    _check_codes(options)
    return options


def _check_codes(options: Options) -> None:
    """Raise UsageError for codes, and how often they are asked for: before a command is told to need a key."""
    if options.once and not (options.codes or options.codes_file):
        raise UsageError(phrase("usage.once_needs_codes"))
    if options.every is not None:
        _seconds_of(options.every)
    if options.show:
        options.codes = [*options.show, *options.codes]
    if options.codes and not options.codes_file:
        next(read_codes(options))


def _seconds_of(text: str) -> float:
    """Return the interval of --every. Raises UsageError."""
    (setting,) = (one for one in SETTINGS if one.name == "COLLECT_EVERY")
    try:
        return cast(float, setting.parse(text))
    except ValueError:
        words = phrase("usage.every", text=one_line(text, 40), expected=setting.expected)
        raise UsageError(words) from None


def _check_export(options: Options) -> None:
    """Raise UsageError for options of --export that do not go together."""
    if options.export is not None and options.export != "-":
        if not options.export.endswith(EXPORT_FORMS):
            raise UsageError(phrase("usage.export", file=one_line(options.export, 100)))
        if options.json:
            raise UsageError(phrase("usage.json_with_export"))
    span_of(options)


def span_of(options: Options) -> Span:
    """Return the moments of --from and --to (epoch ms, half open); without them all of time. Raises UsageError."""
    since, until = 0, NEVER
    if options.from_ is not None:
        since, _ = _moment_of("--from", options.from_)
    if options.to is not None:
        start, length = _moment_of("--to", options.to)
        until = start + length
    if since >= until:
        raise UsageError(phrase("usage.no_span", since=options.from_, until=options.to))
    return Span(since, until)


def _moment_of(flag: str, text: str) -> tuple[int, int]:
    """Return a moment (ms), and the length of a day where a date was given, else 0. Raises UsageError."""
    length = 0
    try:
        with contextlib.suppress(ValueError):
            date.fromisoformat(text)
            length = DAY_MS
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        return round(moment.timestamp() * 1000), length
    except (ValueError, OverflowError):
        raise UsageError(phrase("usage.moment", flag=flag, text=one_line(text, 40))) from None


def _check_symbols(text: str) -> None:
    """Raise UsageError for a text that no list can have."""
    if not text.strip():
        raise UsageError(phrase("usage.symbols_need_text"))
    if len(text) > LONGEST_SOUGHT:
        raise UsageError(phrase("usage.symbols_too_long", n=len(text), most=LONGEST_SOUGHT))
    if any("\ud800" <= character <= "\udfff" for character in text):  # how Python reads other bytes
        raise UsageError(phrase("usage.symbols_no_text", text=one_line(text, 40)))


def _check_migration(options: Options) -> None:
    """Raise UsageError for options of --migrate that do not go together."""
    if options.migrate is None:
        return
    if not options.migrate and options.documents is None:
        raise UsageError(phrase("usage.migrate_needs"))
    if (options.documents is None) != (options.time_zone is None):
        raise UsageError(phrase("usage.documents_need_zone"))


def read_codes(options: Options) -> Iterator[str]:
    """Yield the codes of the command line, then those of the file, one by one; at least one. Raises UsageError."""
    count = 0
    for code in _codes_of(options):
        count += 1
        yield code
    if not count:
        where = "--show" if options.show else "--codes"
        if options.codes_file:
            where = f"--codes-file {options.codes_file}"
        raise UsageError(phrase("usage.no_code", where=where))


def _codes_of(options: Options) -> Iterator[str]:
    for text in options.codes:
        yield from split_codes(text)
    if not options.codes_file:
        return
    try:
        text = read_file(os.dup(0) if options.codes_file == "-" else options.codes_file)
    except (OSError, UnicodeDecodeError) as error:
        fault = phrase("usage.codes_file", file=options.codes_file, why=unread_words(error))
        raise UsageError(fault) from None
    yield from codes_in(text)


def with_kinds(text: str, told: Iterable[object]) -> str:
    """Return a line of the log with the kinds of the reasons in it behind it: they stay when words are mended."""
    words = [one.message if isinstance(one, StockrtError) else one for one in told]
    kinds = dict.fromkeys(chain.from_iterable(map(kinds_in, words)))
    return f"{text} [{', '.join(kinds)}]" if kinds else text


class _Redacting(logging.Formatter):
    """Formats a record, tracebacks included, and takes every secret out, also of settings that were read anew."""

    def __init__(self, journal: bool = False) -> None:
        super().__init__("%(message)s" if journal else "%(levelname)s %(message)s")
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        text = mask(local_times(super().format(record)), HIDDEN.secrets)
        if isinstance(record.args, tuple):
            first, *rest = text.split("\n", 1)
            text = "\n".join([with_kinds(first, record.args), *rest])
        if self._journal:
            return for_journal(text, record.levelno)
        return f"{local_time(datetime.fromtimestamp(record.created, UTC))} {text}"


class Screen:
    """Lines that stand at the end of a terminal and are drawn anew in their place. Any thread may call it."""

    standing: ClassVar[list[Screen]] = []

    def __init__(self, out: IO[str]) -> None:
        self._out = out
        self._height = 0
        self._lock = threading.RLock()
        self.standing.append(self)

    def draw(self, lines: Sequence[str], anew: bool = False) -> None:
        """Put lines in the place of those before; `anew`: the terminal may have broken them. Raises OSError."""
        with self._lock:
            if self not in self.standing:
                return
            to_their_place = f"\033[{self._height}F" if self._height else ""
            if anew:
                to_their_place = "\033[H\033[2J"
            self._out.write(to_their_place + "".join(f"{line}\033[K\n" for line in lines) + "\033[J")
            self._out.flush()
            self._height = len(lines)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Take the lines away while something else is printed; they come back below it."""
        with self._lock:
            if self._height:
                self._out.write(f"\033[{self._height}F\033[J")
                self._out.flush()
            self._height = 0
            yield

    def leave(self) -> None:
        """Let the lines stay where they are from now on."""
        with self._lock:
            self.standing.remove(self)


@contextlib.contextmanager
def bar_aside() -> Iterator[None]:
    """Take away what is drawn on the terminal, a bar or a table, while something is printed."""
    tqdm = sys.modules.get("tqdm")
    with contextlib.ExitStack() as aside:
        for screen in Screen.standing:
            aside.enter_context(screen.aside())
        if tqdm:
            aside.enter_context(tqdm.tqdm.external_write_mode())
        yield


class _BesideBar(logging.StreamHandler[Any]):
    def emit(self, record: logging.LogRecord) -> None:
        with bar_aside():
            super().emit(record)


def start_logging(settings: Settings) -> None:
    """Send this program's messages to stderr, secrets masked; libraries only from warnings on.

    urllib3 only errors: it warns of each answer's odd headers, with a traceback; what counts in them is judged here.
    """
    handler = _BesideBar()
    handler.setFormatter(_Redacting(journal=isinstance(sys.stderr, JournalStream)))
    logging.getLogger().handlers = [handler]
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    log.setLevel(settings.log_level.upper())


def say(words: str, level: int = logging.INFO) -> None:
    """Write a message to stderr: for the person at the terminal in that one's language, or for the journal."""
    if isinstance(sys.stderr, JournalStream):
        text = for_journal(with_kinds(local_times(words), [words]), level)
    else:
        text = local_times(for_reader(words))
    text = mask(text, HIDDEN.secrets)
    with contextlib.suppress(OSError), bar_aside():  # nobody reads it: nothing else can be done
        print(text, file=sys.stderr, flush=True)


def show(words: str) -> None:
    """Print what was asked for to stdout, words of ours in the reader's language. Raises PrintError."""
    _print_whole(mask(for_reader(words), HIDDEN.secrets))


def _print_whole(text: str) -> None:
    try:
        with bar_aside():
            print(text, flush=True)
    except OSError as error:
        raise print_error(error) from None


def print_error(error: OSError) -> PrintError:
    """Return what a command ends with whose output nobody takes."""
    if isinstance(error, BrokenPipeError):
        return PrintError()
    return PrintError(phrase("cli.cannot_print", why=os_words(error)))


def show_one(document: object, line: str, as_json: bool) -> None:
    """Print one of several things, for a person or as a JSON document. Raises PrintError."""
    if as_json:
        show_json(document)
    else:
        show(local_times(for_reader(line)))


def show_json(document: object) -> None:
    """Print a document as one line of JSON, its words in the reader's language. Raises PrintError."""
    spoken = all_in_language(document, SPOKEN.language)
    _print_whole(json.dumps(packed(spoken), ensure_ascii=False))  # in which only texts are masked


# ------------------------------------------------------------------------------------------------------
# Rows
# ------------------------------------------------------------------------------------------------------


TRADE_COLUMNS = (
    Column("views.code", width=12),
    Column("cli.price", right=True, width=14),
    Column("views.volume", right=True, width=14),
    Column("cli.turnover", right=True, width=18),
    Column("cli.side", width=4),
    Column("cli.exchange_time", width=24),
    Column("views.age", right=True, width=8),
    Column("views.name"),
)
# While no trade comes it is seen after so long that the reader went away.
READER_LOOK_S = 1.0
# Of a line where there is no terminal: no name is cut.
WIDEST = 1000


class Rows:
    """Prints stored trades on `out`: an aligned table in the order asked, or JSON lines.

    Beyond ROWS_ALIGNED trades the rows are printed as they come. A reader that went away (`| head`) ends
    the printing, never the storing. `is_live`: the first rows are printed at once, too. `reader`: where names are
    looked up; the table has as much of them as fits into `width` columns, and no column for them where there are none.
    """

    def __init__(
        self, out: IO[str], as_json: bool, color: bool = False, width: int = WIDEST, is_live: bool = False
    ) -> None:
        self._is_live = is_live
        self._out = out
        self._as_json = as_json
        self._color = color
        self._width = width
        self._kept: list[Document] = []
        self._widths: list[int] = []  # of the columns, once they are printed
        self.is_gone = False  # what reads them
        self.look_s = READER_LOOK_S
        self.status = ""  # which rows do not show
        self.reader: Reader | None = None
        self.fault = ""  # why rows are missing on `out`, unless its reader just went away

    def add(self, documents: Sequence[Document]) -> None:
        """Take documents that were stored."""
        if self._as_json:
            self._print("".join(to_json(document) + "\n" for document in documents), self._is_live)
            return
        self._kept += documents
        if self._is_live or self._widths or len(self._kept) > ROWS_ALIGNED:
            self._table([column.width for column in TRADE_COLUMNS])

    def finish(self, order: Sequence[str] = ()) -> None:
        """Print what was kept, in the order of the codes in `order`."""
        if self._kept:
            place = {code: -number for number, code in enumerate(reversed(order))}  # the first of duplicates
            self._kept.sort(key=lambda d: place.get(d["stock_code"], 1))
            self._table()
        self._print("", flush=True)

    def _table(self, fixed: Sequence[int] = ()) -> None:
        """Print what is kept; what comes first tells the columns, and their widths where those are not `fixed`."""
        names, now = self._names(), time.time()
        rows = [[*row_cells(document, now), names.get(document["stock_code"], "")] for document in self._kept]
        self._kept = []
        if not self._widths:
            titles = [column.title for column in TRADE_COLUMNS]
            widths = list(fixed) or [max(map(columns_of, cells)) for cells in zip(titles, *rows, strict=True)]
            self._widths = self._with_name(widths[:-1], bool(names))
            line = self._line(titles)
            self._print(f"\033[1m{line[:-1]}\033[0m\n" if self._color else line)
        self._print("".join(map(self._line, rows)), self._is_live)

    def _with_name(self, widths: list[int], named: bool) -> list[int]:
        """Return the widths with that of the names: they have the rest of the line, unless that is too short."""
        room = self._width - sum(widths) - len(BETWEEN) * len(widths)
        return [*widths, room] if named and room >= columns_of(TRADE_COLUMNS[-1].title) else widths

    def _line(self, cells: Sequence[str]) -> str:
        """Return a line of cells, without the last where there are no names."""
        *cells, name = cells
        if len(self._widths) == len(TRADE_COLUMNS):
            cells.append(fitting(name, self._widths[-1]))
        return line_of(TRADE_COLUMNS[: len(cells)], cells, self._widths) + "\n"

    def _names(self) -> dict[str, str]:
        """Return the names of what is kept, as far as they are at hand."""
        if self.reader is not None:
            with contextlib.suppress(StoreError):  # no name is worth a row
                codes = [document["stock_code"] for document in self._kept]
                return self.reader.names(codes, SPOKEN.language == ENGLISH)
        return {}

    def _print(self, text: str, flush: bool = False) -> None:
        if self.is_gone:
            return
        try:
            self._out.write(text)
            if flush:
                self._out.flush()
        except OSError as error:
            self.is_gone = True
            if not isinstance(error, BrokenPipeError):
                self.fault = phrase("cli.rows_not_printed", why=os_words(error))
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._out.fileno())  # else the exit's flush fails again


def row_cells(document: Document, now: float) -> list[str]:
    """Return the cells of a document's row but its name; `now` is epoch seconds."""
    kind = SIDES.get(document["td"])
    side = str(document["td"]) if kind is None else for_reader(phrase(kind))
    when = exchange_time(document["stock_code"], document["t"])
    age, _ = age_words(now - document["t"] / 1000)
    return [document["stock_code"], document["p"], document["v"], document["vw"], side, when, for_reader(age)]


def to_json(document: Document) -> str:
    """Return a document as one line of JSON, its date as ISO 8601 UTC."""
    return json.dumps(document | {"create_time": iso(document["create_time"])}, ensure_ascii=False)


# ------------------------------------------------------------------------------------------------------
# Commands
# ------------------------------------------------------------------------------------------------------


def stop_on_signals(daemon: Daemon | None = None) -> threading.Event:
    """Let SIGINT and SIGTERM stop the daemon, and set what is returned; a second signal ends the process at once."""
    stop, asked = threading.Event(), False

    def on_signal(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            os._exit(EXIT_INTERRUPTED)
        asked = True
        stop.set()
        if daemon is not None:
            daemon.request_stop()

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    return stop


def reload_on_hangup(daemon: Daemon) -> None:
    """Let SIGHUP have the settings read anew; where a person reads stderr it means that the terminal is gone."""
    on_hangup = daemon.request_reload
    if os.isatty(2):
        on_hangup = daemon.request_stop
    signal.signal(signal.SIGHUP, lambda *_: on_hangup())


# After this time a person wants to see that something goes on, and how often that is drawn anew.
LONG_RUN_S, DRAW_EVERY_S = 2.0, 0.5


class ByHand(Events):
    """Tells the person who typed a command, in that one's language, what became of a local file."""

    def set_aside(self, words: str) -> None:
        """Say it."""
        say(phrase("cli.error", words=words), logging.ERROR)


class Terminal(ByHand):
    """Shows a run to a person: rows as they come, and a bar on a terminal's stderr once it is a long one.

    Long is what has more than `bar_above` of its `unit` (a kind of words), or takes LONG_RUN_S. Any thread may call it.
    """

    def __init__(self, rows: Rows | None = None, unit: str = "", bar_above: float = math.inf) -> None:
        self._rows = rows
        self._unit = unit
        self._bar_above = bar_above
        self._done = self._total = 0
        self._began = time.time()
        self._bar: Any = None
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._is_terminal = sys.stderr.isatty()
        if self._is_terminal:
            with contextlib.suppress(StockrtError):  # no thread is to be had: no bar while nothing happens
                start_thread(threading.Thread(target=self._draw_again, name="stockrt-bar", daemon=True))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stored(self, documents: Sequence[Document]) -> None:
        """Print them."""
        if self._rows is not None:
            with bar_aside():
                self._rows.add(documents)

    def progress(self, done: int = 0, total: int = 0, unwritten: int = 0) -> None:
        """Draw the bar."""
        if total:
            self._done, self._total = done, total
        if self._is_terminal and total > self._bar_above:
            self._draw()

    def close(self) -> None:
        """Take the bar away."""
        with self._lock:
            self._closed.set()
            if self._bar is not None:
                self._bar.close()

    def _draw(self) -> None:
        with self._lock:
            if self._closed.is_set():
                return
            if self._bar is None:
                from tqdm import tqdm

                form, unit = None, ""
                if self._unit:
                    unit = f" {for_reader(phrase(self._unit))}"
                else:
                    form = for_reader(phrase("cli.working"))
                self._bar = tqdm(unit=unit, bar_format=form, file=sys.stderr, leave=False, delay=1e-9)
                self._bar.start_t = self._began
            if self._total:
                self._bar.total, self._bar.n = self._total, self._done
            self._bar.refresh()

    def _draw_again(self) -> None:
        long_at = time.monotonic() + LONG_RUN_S
        while not self._closed.wait(DRAW_EVERY_S):
            if time.monotonic() >= long_at:
                self._draw()


class _Run(threading.Thread):
    """A run on a thread of its own, so that the main thread stays free for signals."""

    def __init__(self, pipeline: Pipeline, codes: Iterator[str], stop: threading.Event) -> None:
        super().__init__(name="stockrt-run", daemon=True)
        self._pipeline = pipeline
        self._codes = codes
        self._stop_event = stop
        self.report = Report()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            first = next(self._codes)  # where there is none, nobody is asked for anything
            self._pipeline.run(chain((first,), self._codes), self._stop_event, self.report)
            self._pipeline.finalise_all(self._stop_event)
            self._pipeline.retain_some(self._stop_event)
        except BaseException as error:  # handed to the main thread, which raises it again
            self.error = error

    def ended(self) -> bool:
        """Wait for the end, or a moment longer than until the run is stopped; return whether it ended."""
        start_thread(self)
        while self.is_alive() and not self._stop_event.is_set():
            self.join(STOP_POLL_S)
        self.join(INTERRUPT_GRACE_S)
        if self.error is not None:
            raise self.error
        return not self.is_alive()


def _refuse_demo_in_mongodb(options: Options, settings: Settings) -> None:
    """Raise UsageError where synthetic trades would go among real ones."""
    if options.demo and settings.mongodb_uri:
        raise UsageError(phrase("usage.demo_in_mongodb"))


def run_once(options: Options, settings: Settings) -> int:
    """Fetch the given codes once and return the exit status."""
    _refuse_demo_in_mongodb(options, settings)
    rows = Rows(sys.stdout, options.json, settings.color and sys.stdout.isatty(), terminal_size(WIDEST)[0])
    terminal = Terminal(rows, "cli.of_codes", bar_above=MAX_BATCH)
    pipeline = Pipeline(settings, terminal, options.demo)
    rows.reader = pipeline.reader
    stop = stop_on_signals()
    order: list[str] = []
    started_at = time.time()
    run = _Run(pipeline, _remembered(read_codes(options), order), stop)
    try:
        finished = run.ended()
    finally:
        terminal.close()
    if not finished:
        rows.reader = None  # what hangs may be the file that it is in
    report = run.report.as_of_now()  # a run that hangs may still write into its own
    rows.finish([report.read_as.get(place, place.upper()) for code in order for place in _places(code)])
    report.failures = _as_typed(report.failures, order)
    if finished:
        pipeline.keys.close()
    status = _close_run(report, finished, settings)
    note_run(settings, started_at, report)
    if rows.fault:
        say(phrase("cli.error", words=rows.fault))
        status = status or EXIT_FAILED
    return status


def note_run(settings: Settings, started_at: float, report: Report) -> None:
    """Keep what came of a run, for --status and --executions; that it cannot be kept costs the run nothing."""
    try:
        with contextlib.closing(Journal(settings.state_directory, events=ByHand())) as journal:
            journal.note_run(started_at, *report_result({"workflow_name": "--once"}, report, settings))
    except StoreError as error:
        log.warning("--status will not know of this run: %s", error)


def _remembered(codes: Iterator[str], order: list[str]) -> Iterator[str]:
    """Pass codes on, and keep the first ROWS_ALIGNED of them."""
    for code in codes:
        if len(order) < ROWS_ALIGNED:
            order.append(code)
        yield code


def _as_typed(failures: Mapping[str, Failure], order: Sequence[str]) -> dict[str, Failure]:
    """Return failures in the order in which the codes were typed."""
    names = [name for code in order for name in (one_line(code, MAX_CODE_LENGTH + 8), *_places(code))]
    return {name: failures[name] for name in chain(names, failures) if name in failures}


def _places(code: str) -> list[str]:
    """Return the codes as which what was typed may be stored; one that does not tell is found in `Report.read_as`."""
    try:
        instrument = parse_code(code)
    except InstrumentError:  # the plan names it
        return [one_line(code)]
    return [instrument.code, *(other.code for other in instrument.alternatives)]


def _close_run(report: Report, finished: bool, settings: Settings) -> int:
    """Say what became of a run and return the exit status."""
    if report.stale:
        say(report.stale_words())
    if report.read_as:
        say(phrase("events.read_as", codes=report.read_as_words()))
    if finished:
        say(report.summary())
    elif not report.total:
        say(phrase("cli.once_codes_interrupted"))
    else:
        say(phrase("cli.once_store_hangs", summary=report.summary()))
    is_red = settings.color and sys.stderr.isatty()
    for code, failure in report.failures.items():
        words = phrase("cli.failed_code", code=code, why=failure.words)
        say(f"\033[31m{for_reader(words)}\033[0m" if is_red else words)
    if report.interrupted or not finished:
        return EXIT_INTERRUPTED
    return EXIT_OK if report.complete else EXIT_FAILED


# Batches of at most a thousand rows that wait for a slow reader of stdout; beyond, it is waited for.
BATCHES_UNREAD = 20
# So many rows are known to be printed.
ROWS_REMEMBERED = 20_000
# A live table is drawn so often at most; beside its rows stand the title, what does not fit, the status, the cursor.
REDRAW_S, LINES_BESIDE = 0.2, 4
# The store is looked at again for it after this time, and so many trades may come meanwhile.
READ_AGAIN_S, TRADES_MEANWHILE = 2.0, 20_000
# After the end a slow reader has so long for the last rows.
LAST_ROWS_S = 2.0
# So often there are synthetic trades.
DEMO_EVERY_S = 1.0


def reader_is_gone() -> bool:
    """Whether stdout is a pipe that nobody reads any more."""
    import select

    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


class LiveTable:
    """The table of --show on a terminal, drawn anew as trades come; Ticks uses it as it does Rows.

    What the store has of a code, and what its change is told against, is read on a thread of its own, which may have
    to wait for MongoDB: no trade waits for it.
    """

    def __init__(self, table: QuoteTable, by: str, english: bool) -> None:
        self.is_gone = False  # the terminal
        self.fault = ""
        self.look_s = REDRAW_S
        self.status = ""
        self._table = table
        self._by = by
        self._english = english
        self._quotes: dict[str, Quote] = {}
        self._unread: set[str] = set()  # codes of which the store is to be looked at
        self._meanwhile: deque[StoredTrade] = deque(maxlen=TRADES_MEANWHILE)  # what came since it is
        self._due = 0.0  # monotonic
        self._lock = threading.Lock()
        self._screen = Screen(sys.stdout)
        self._woken = threading.Event()

    def begin(self, reader: Reader, codes: Iterable[str]) -> None:
        """Show what there is of codes, and what comes. Raises StockrtError where there is no thread."""
        self._unread.update(codes)
        self._woken.set()
        start_thread(threading.Thread(target=self._read, args=(reader,), name="stockrt-table", daemon=True))

    def add(self, documents: Sequence[Document]) -> None:
        """Take documents that were stored, and draw, unless that was done just now."""
        with self._lock:
            for document in documents:
                fields = [document[name] for name in DOCUMENT_FIELDS[:-1]]
                self._take(StoredTrade._make((*fields, "")))
        if time.monotonic() >= self._due and not self.is_gone:
            self._draw()

    def close(self) -> None:
        """Draw what came last, and let it stand."""
        if not self.is_gone:
            self._draw()
        self._screen.leave()

    def _take(self, trade: StoredTrade) -> None:
        code = trade.stock_code
        self._meanwhile.append(trade)
        before = self._quotes.get(code) or Quote(code, "", trade._replace(t=0), NO_SPAN, (), None)
        after = with_trade(before, trade)
        if after.span.date != before.span.date:
            self._unread.add(code)
            self._woken.set()
        self._quotes[code] = after

    def _draw(self) -> None:
        with self._lock:
            found = in_order(list(self._quotes.values()), self._by)
        try:
            width, height = os.get_terminal_size(sys.stdout.fileno())
            room = max(1, height - LINES_BESIDE)
            is_resized = width != self._table.width
            self._table.width = width
            lines = self._table.lines(found[:room], time.time(), lit=True)
            if len(found) > room:
                lines.append(f"… {for_reader(count_words(len(found) - room, 'more code'))}")
            self._screen.draw([*lines, cut_between_words(for_reader(self.status), width)], anew=is_resized)
        except OSError:
            self.is_gone = True
        self._due = time.monotonic() + REDRAW_S

    def _read(self, reader: Reader) -> None:
        """Look at the store for the codes of which that is to be done, for as long as the process lives."""
        while True:
            self._woken.wait()
            self._woken.clear()
            with self._lock:
                codes = sorted(self._unread)
                self._meanwhile.clear()
            try:
                found = quotes(reader, codes, self._english)
            except StoreError as error:  # it is said by those who store
                log.debug("the table does without the store: %s", error)
                self._woken.set()
            else:
                self._put(codes, found)
            time.sleep(READ_AGAIN_S)

    def _put(self, codes: Collection[str], found: Sequence[Quote]) -> None:
        """Take what the store has, and what came since it was asked."""
        with self._lock:
            self._unread.difference_update(codes)
            read = {one.code: one for one in found}
            for trade in self._meanwhile:
                if trade.stock_code in read:
                    read[trade.stock_code] = with_trade(read[trade.stock_code], trade)
            for code, one in read.items():
                before = self._quotes.get(code, one)
                self._quotes[code] = with_trade(one, before.trade)  # it may wait for MongoDB


class Ticks(ByHand):
    """Prints trades as they are stored, those that wait for MongoDB, too, on a thread of its own.

    What was printed just before, or is the latest of its code, is not printed again. A reader that went away sets
    `stop`.
    """

    def __init__(self, rows: Rows | LiveTable, stop: threading.Event) -> None:
        self._rows = rows
        self._stop = stop
        self._batches: queue.Queue[Sequence[Document]] = queue.Queue(BATCHES_UNREAD)
        self._latest: dict[str, str] = {}  # code -> _id
        self._recent: dict[str, None] = {}  # _id of the last rows
        self.waiting = 0  # trades, for MongoDB
        self._is_ending = threading.Event()
        self._thread = threading.Thread(target=self._print, name="stockrt-rows", daemon=True)
        start_thread(self._thread)

    def stored(self, documents: Sequence[Document]) -> None:
        """Have them printed; those that wait for MongoDB are not told again when it has them."""
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._batches.put(documents, timeout=STOP_POLL_S)
                return
        with contextlib.suppress(queue.Full):  # nobody reads, and the end must not wait for it
            self._batches.put_nowait(documents)

    def queue_changed(self, stats: QueueStats) -> None:
        """Note how many wait for MongoDB."""
        self.waiting = stats.trades

    def collecting(self, stats: CollectStats) -> None:
        """Have it said below the table, where there is one."""
        self._rows.status = collect_words(stats)

    def close(self) -> None:
        """Print the last rows, as far as they are read."""
        self._is_ending.set()
        self.stored(())
        self._thread.join(LAST_ROWS_S)

    def is_held_up(self) -> bool:
        """Whether rows are left that nobody reads."""
        return self._thread.is_alive()

    def _print(self) -> None:
        while not (self._is_ending.is_set() and self._batches.empty()):
            documents: Sequence[Document] = ()
            with contextlib.suppress(queue.Empty):
                documents = self._batches.get(timeout=self._rows.look_s)
            self._rows.add([document for document in documents if self._is_new(document)])
            if self._rows.is_gone or reader_is_gone():
                self._rows.is_gone = True
                self._stop.set()

    def _is_new(self, document: Document) -> bool:
        """Whether a trade was not printed; what a poll brings was pushed just before, or is the latest for long."""
        code, name = document["stock_code"], document["_id"]
        is_new = name != self._latest.get(code) and name not in self._recent
        if is_new:
            self._latest[code] = name
            self._recent[name] = None
            if len(self._recent) > ROWS_REMEMBERED:
                del self._recent[next(iter(self._recent))]
        return is_new


def run_collect(options: Options, settings: Settings, environ: Mapping[str, str]) -> int:
    """Collect without pause until a signal, or until nobody reads the rows, and return the exit status."""
    settings = _settings_to_collect(options, settings)
    need_descriptors(settings)
    rows: Rows | LiveTable = Rows(sys.stdout, options.json, is_live=True)
    if sys.stdout.isatty() and environ.get("TERM", "dumb") != "dumb" and not options.json:
        table = quote_table(settings, environ, options.up)
        rows = LiveTable(table, options.sort or "code", SPOKEN.language == ENGLISH)
    stop = stop_on_signals()
    started_at = time.monotonic()
    ticks = Ticks(rows, stop)
    with Pipeline(settings, ticks, options.demo) as pipeline:
        if isinstance(rows, Rows):
            rows.reader = pipeline.reader
        if options.codes or options.codes_file:
            _need_one_code(resolve(settings.collect_codes.split(), pipeline.directory, stop))
        collecting = Collecting(pipeline, settings, ticks)
        collecting.start()
        if isinstance(rows, LiveTable):
            rows.begin(pipeline.reader, _plain_codes(settings.collect_codes))
        pipeline.start_delivery()
        try:
            while not stop.is_set():
                stop.wait(min(pipeline.finalise(stop), READER_LOOK_S))
                _need_use(settings, pipeline, collecting.stats())
        finally:
            collecting.close()
            ticks.close()
            if isinstance(rows, LiveTable):
                rows.close()
    if rows.fault:
        raise PrintError(rows.fault)
    if rows.is_gone:
        return EXIT_OK
    say(_collected_words(collecting.stats(), ticks.waiting, time.monotonic() - started_at))
    if ticks.is_held_up():  # the exit's flush would wait for the reader
        say(phrase("cli.collect_rows_unread"))
        os._exit(EXIT_INTERRUPTED)
    return EXIT_INTERRUPTED


def _need_one_code(found: Resolved) -> None:
    """Raise StockrtError where no typed code can be collected: waiting would not change that."""
    if not found.instruments:
        raise StockrtError(phrase("cli.collect_nothing", words=found.refused_words()))


def _plain_codes(text: str) -> list[str]:
    """Return the codes of COLLECT_CODES as they are stored; those of a file or a collection show when they trade."""
    found = []
    if text[:1] != "@" and text != WATCH:
        for code in split_codes(text):
            with contextlib.suppress(InstrumentError):
                found.append(parse_code(code).code)
    return found


def _need_use(settings: Settings, pipeline: Pipeline, stats: CollectStats) -> None:
    """Raise SettingsError where no key serves, or every trade is asked for and the stream brings none with them."""
    dead = [key.dead for key in pipeline.keys.keys if key.dead]
    if dead and len(dead) == len(pipeline.keys.keys):
        raise SettingsError([phrase("cli.collect_no_key", why=dead[0])])
    # a trade that came over REST tells that the key is good for that
    if settings.collect and stats.trades and stats.polled and not stats.connections_wanted:
        raise SettingsError([phrase("cli.collect_no_stream")])


def _settings_to_collect(options: Options, settings: Settings) -> Settings:
    """Return the settings with what the command line says of collecting. Raises UsageError."""
    _refuse_demo_in_mongodb(options, settings)
    if options.codes or options.codes_file:
        settings = settings._replace(collect_codes=" ".join(read_codes(options)), collect_share=(1, 1))
    elif not settings.collect_codes:
        raise UsageError(phrase("usage.collect_needs_codes"))
    every_s = 0.0
    if options.every is not None:
        every_s = _seconds_of(options.every)
    elif options.demo:
        every_s = DEMO_EVERY_S
    return settings._replace(collect="" if every_s else "stream", collect_every_s=every_s)


def _collected_words(stats: CollectStats, waiting: int, took_s: float) -> Phrase:
    clauses = [
        phrase(
            "cli.collect_done", trades=stats.trades, stored=stats.stored, known=stats.duplicates, took=took_s
        )
    ]
    if waiting:
        clauses.append(phrase("cli.collect_waiting", trades=waiting_words(waiting)))
    if stats.dropped:
        clauses.append(phrase("cli.collect_dropped", n=stats.dropped))
    if stats.gaps_today:
        clauses.append(phrase("events.gaps", gaps=count_words(stats.gaps_today, "gap")))
    return listing("join.clauses", clauses)


def run_check(loaded: LoadedSettings, is_service_hidden: bool, as_json: bool) -> int:
    """Check everything that a run needs, print a line or a JSON document each, and return the exit status."""
    failed = False
    for check in _checks(loaded, is_service_hidden):
        failed |= not check.good
        # to programs its name is a key
        show_one(check._asdict() | {"name": str(check.name)}, _check_line(check), as_json)
    return EXIT_FAILED if failed else EXIT_OK


@contextlib.contextmanager
def without_traces(settings: Settings) -> Iterator[Settings]:
    """Give settings to look with: where there is no local file yet, one is made beside its place and goes again.

    Raises StoreError when it cannot be made.
    """
    directory = settings.state_directory
    with contextlib.ExitStack() as made:
        with disk_trouble(phrase("cli.no_state_directory", path=directory)):
            if not (directory / SQLITE_NAME).exists():
                from tempfile import TemporaryDirectory

                there = next(path for path in (directory, *directory.parents) if path.exists())
                scratch = TemporaryDirectory(prefix=".stockrt-", dir=there, ignore_cleanup_errors=True)
                settings = settings._replace(state_directory=Path(made.enter_context(scratch)))
        yield settings


def _check_line(check: Check) -> str:
    return phrase("cli.check_good" if check.good else "cli.check_bad", name=check.name, words=check.words)


def _check_origins(loaded: LoadedSettings, is_service_hidden: bool) -> Check:
    """Say where the settings come from, and where that is not what the service has."""
    clauses = [phrase("cli.origins", origins=loaded.origins)]
    if loaded.hiding:
        names = listing("join.names", loaded.hiding)
        clauses.append(phrase("cli.not_the_services", unit=UNIT, names=names))
    if is_service_hidden:
        clauses.append(phrase("cli.service_unknown", unit=UNIT))
    return Check(phrase("cli.of_settings"), not loaded.hiding, listing("join.clauses", clauses))


def _without_platform(settings: Settings) -> Phrase:
    """Return for what the settings are enough that name no platform."""
    return phrase("cli.collects_alone" if settings.collects else "cli.no_daemon")


def _checks(loaded: LoadedSettings, is_service_hidden: bool) -> Iterator[Check]:
    settings = loaded.settings
    yield _check_origins(loaded, is_service_hidden)
    if settings.proxies.in_use():
        yield Check(phrase("cli.of_proxy"), True, _ways(settings))
    if not settings.api_keys:
        yield Check(phrase("cli.of_key"), False, phrase("settings.no_key"))
    with contextlib.ExitStack() as opened:
        looked_at, pipeline = settings, None
        words = ""
        try:
            looked_at = opened.enter_context(without_traces(settings))
            pipeline = opened.enter_context(Pipeline(looked_at, ByHand(), only_looks=True))
        except StockrtError as error:
            words = error.message
        api, keys = None, [ApiKey(*one) for one in settings.key_plans()]
        if pipeline is not None:
            api, keys = pipeline.api, pipeline.keys.keys
        for key in keys:
            yield from check_key(settings, api, key)
        directory = _check_state_directory(settings)
        yield directory
        store = Check(phrase("cli.of_store"), False, words)
        if pipeline is not None:
            store = _check_store(pipeline)
        if store.words != directory.words:
            said = for_reader(store.words)  # as of where it will lie
            said = said.replace(str(looked_at.state_directory), str(settings.state_directory))
            yield store._replace(words=said)
        if pipeline is not None and settings.collect_codes:
            yield from _check_collecting(settings, pipeline)
    if settings.metrics_file:
        place = settings.metrics_file.parent
        why = fault_of_place(f"{place}/.", os.W_OK | os.X_OK)
        if why:
            yield Check("METRICS_FILE", False, phrase("cli.os_error", file=place, why=why))
    if settings.platform_url():
        yield check_platform(settings)
    else:
        yield Check(phrase("link.platform"), True, _without_platform(settings))


def _check_state_directory(settings: Settings) -> Check:
    name = phrase("cli.of_state_directory")
    words = phrase("cli.can_be_made", path=settings.state_directory)
    try:
        if settings.state_directory.is_dir():
            make_state_directory(settings.state_directory)  # looks whether this user may write there
            words = phrase("cli.can_be_written", path=settings.state_directory)
        with without_traces(settings):
            return Check(name, True, words)
    except StoreError as error:
        return Check(name, False, error.message)


def _check_collecting(settings: Settings, pipeline: Pipeline) -> Iterator[Check]:
    """Say what is to be collected, and whether the stream takes each key for it.

    A connection may count against the key's limit for minutes after its end: none is made where the daemon has some.
    """
    stop, name = threading.Event(), phrase("cli.of_codes")
    try:
        found = resolve(WatchList(settings, pipeline.mongo).codes(), pipeline.directory, stop)
    except StockrtError as error:
        yield Check(name, False, error.message)
        return
    words: str = phrase("cli.to_collect", n=len(found.instruments))
    if found.refused:
        count, codes = len(found.refused), found.refused_words()
        words = phrase("cli.to_collect_but", words=words, n=count, codes=codes)
    yield Check(name, bool(found.instruments and not found.refused), words)
    products = [one.product for one in found.instruments.values()]
    if not (settings.collect and products):
        return
    told = read_status(settings.state_directory).get("collecting", {})
    if told.get("connections_wanted") and daemon_runs(settings.state_directory):
        facts = dict.fromkeys(CollectFacts.__annotations__) | told
        faults = [trouble.what for trouble in _collect_faults(settings, facts)]
        words = phrase("cli.daemon_streams", words=_collect_line(facts))
        yield Check(phrase("cli.of_stream"), not faults, listing("join.clauses", faults or [words]))
        return
    limits = pipeline.stream_limits(stop)
    for key in pipeline.keys.keys:
        yield _check_stream(settings, key, products[0], limits.get(key.digest))


def _check_stream(settings: Settings, key: ApiKey, product: str, limits: StreamLimits | None) -> Check:
    name = phrase("cli.of_stream_with", key=key.shown)
    if limits is None or not limits.connections:
        return Check(name, False, key.dead or phrase("cli.plan_without_stream"))
    connection = StreamConnection(settings.stream_url, product, key.secret, settings.proxies)
    end = connection.open()
    connection.close()
    if end is not None:
        return Check(name, False, end.words)
    connections, each = count_words(limits.connections, "connection"), limits.per_connection
    clauses = [
        phrase(
            "cli.stream_takes",
            url=settings.stream_url,
            product=product,
            connections=connections,
            each=each,
            all=limits.in_all,
        )
    ]
    if limits.connections == 1:
        clauses.append(phrase("cli.still_counts"))
    return Check(name, True, listing("join.clauses", clauses))


def _check_store(pipeline: Pipeline) -> Check:
    name = phrase("cli.of_store")
    try:
        return Check(name, True, pipeline.check_store())
    except StockrtError as error:
        return Check(name, False, error.message)


def _ways(settings: Settings) -> str:
    """Return what is asked through which proxy, and what straight."""
    ways = []
    asked = [("cli.the_api", settings.api_base_url), ("cli.the_platform", settings.platform_url())]
    if settings.collect:
        asked.insert(1, ("cli.the_stream", "http" + settings.stream_url.removeprefix("ws")))
    for kind, url in asked:
        proxy = settings.proxies.for_url(url)
        if url and proxy is not None:
            ways.append(phrase("cli.through", what=phrase(kind), proxy=proxy.shown, setting=proxy.setting))
        elif url:
            ways.append(phrase("cli.straight", what=phrase(kind)))
    return listing("join.commas", ways)


# The exit statuses of --status, as the Linux Standard Base has them for services.
STATUS_WELL, STATUS_WRONG, STATUS_NOT_RUNNING, STATUS_UNKNOWN = 0, 1, 3, 4
STATUS_WORDS = {
    STATUS_WELL: "well",
    STATUS_WRONG: "something is wrong",
    STATUS_NOT_RUNNING: "not running",
    STATUS_UNKNOWN: "unknown",
}
# What JSON calls a state of daemon, platform, stream, key or execution, and the kind of its words for a person.
STATES = {
    "well": "cli.well",
    "something is wrong": "cli.wrong",
    "not running": "cli.not_running",
    "unknown": "cli.unknown",
    "connected": "cli.connected",
    "not connected": "cli.not_connected",
    "not needed": "cli.not_needed",
    "no daemon": "cli.without_daemon",
    "connecting": "cli.connecting",
    "waiting": "cli.waits_to_connect",
    "given up": "cli.given_up",
    "ready": "cli.ready",
    "resting": "cli.resting",
    "out": "cli.out",
    "success": "cli.success",
    "partial": "cli.partial",
    "failure": "cli.failure",
    "interrupted": "cli.interrupted",
    "not ended": "cli.not_ended",
}
# So many columns has what a line of --status is about.
LABEL_COLUMNS = 15


class DaemonFacts(TypedDict, total=False):
    """What --status shows of the daemon; `running` is None where that is not known."""

    running: bool | None
    pid: int | None
    version: str | None


class PlatformFacts(TypedDict):
    """What --status shows of the platform; times are ISO 8601 UTC."""

    url: str | None
    state: str
    connected_since: str | None
    last_contact: str | None
    lost_since: str | None
    lost_because: str | None


class LastExecution(TypedDict):
    """What --status shows of the last execution."""

    status: str
    message: str
    workflow_name: object
    at: str


class StatusReport(TypedDict):
    """What --status shows, and prints as JSON.

    `status`: one of STATUS_WORDS. `collecting`: what the daemon told last of collecting without pause, None where
    nothing is to be collected. `wrong`: what is, in words, and `to_do` what mends it. `totals`: what was counted
    since the first execution, and `since` when; empty before.
    """

    status: str
    version: str
    daemon: DaemonFacts
    registration: str | None
    platform: PlatformFacts
    store: str
    spool: QueueFacts | None
    waiting: Waiting
    damaged_files: int
    collecting: dict[str, Any] | None
    last_execution: LastExecution | None
    totals: dict[str, int | str]
    keys: list[KeyUsage]
    wrong: list[str]
    to_do: list[str]


class Trouble(NamedTuple):
    """What is wrong, and what a person can do about it."""

    what: str
    to_do: str


def gather_status(settings: Settings, is_installed: bool = False, is_faulty: bool = False) -> StatusReport:
    """Return what --status shows, from the daemon's own words where one runs or ran. Raises StoreError.

    `is_installed`: the daemon is a service, whose log tells why it does not run. `is_faulty`: the settings are.
    """
    directory = settings.state_directory
    told = read_status(directory)
    platform: PlatformFacts = {
        "url": settings.platform_url() or None,
        "state": "no daemon",
        "connected_since": told.get("connected_since"),
        "last_contact": told.get("last_contact"),
        "lost_since": None,
        "lost_because": None,
    }
    daemon: DaemonFacts = {"running": daemon_runs(directory)}
    states: Sequence[KeyState] = ()
    if daemon["running"]:
        platform["state"] = told.get("platform", "not connected")
        if platform["state"] == "not connected":
            platform |= {"lost_since": told.get("lost_since"), "lost_because": told.get("lost_because")}
        daemon |= {"pid": told.get("pid"), "version": told.get("version")}
        states = told.get("keys", [])
    module_hash = read_hash(directory)
    with without_traces(settings) as looked_at, Pipeline(looked_at, ByHand()) as pipeline:
        spool, keys = pipeline.queued(told.get("spool_refused", 0)), pipeline.usage(states)
    status: StatusReport = {
        "status": "",
        "version": __version__,
        "daemon": daemon,
        "registration": shorten(module_hash) if module_hash else None,
        "platform": platform,
        "store": settings.mongodb_shown() or str(directory / SQLITE_NAME),
        "spool": spool,
        "waiting": Waiting(executing=0, commands=0, results=0),
        "damaged_files": len(damaged_files(directory)),
        "collecting": None,
        "last_execution": None,
        "totals": {},
        "keys": keys,
        "wrong": [],
        "to_do": [],
    }
    troubles: list[Trouble] = []
    if settings.collects or (daemon["running"] and told.get("collecting")):
        status["collecting"] = dict.fromkeys(CollectFacts.__annotations__) | told.get("collecting", {})
    if (directory / JOURNAL_NAME).exists():
        troubles = _ask_journal(directory, status)
    troubles += _what_is_wrong(settings, status)
    if is_faulty:
        status |= {"store": phrase("cli.unknown"), "platform": platform | {"url": phrase("cli.unknown")}}
        troubles.append(Trouble(phrase("cli.settings_are_faulty"), phrase("cli.mend_settings")))
    status["wrong"] = [trouble.what for trouble in troubles]
    status["to_do"] = list(dict.fromkeys(trouble.to_do for trouble in troubles))
    status["status"] = STATUS_WORDS[STATUS_WRONG if troubles else STATUS_WELL]
    if not daemon["running"]:
        status["status"] = STATUS_WORDS[STATUS_NOT_RUNNING]
    if not (daemon["running"] or is_faulty):
        log_of_it = [phrase("cli.see_journal", service=UNIT.removesuffix(".service"))] * is_installed
        status["to_do"][:0] = [_how_to_start(settings), *log_of_it]
    return status


def _how_to_start(settings: Settings) -> Phrase:
    if not settings.platform_url() and not settings.collects:
        return phrase("cli.needs_no_daemon")
    return phrase("cli.start_it", service=UNIT.removesuffix(".service"))


def _ask_journal(directory: Path, status: StatusReport) -> list[Trouble]:
    """Fill in what the journal knows, and return what is wrong by it. Raises StoreError."""
    troubles = []
    with contextlib.closing(Journal(directory, events=ByHand())) as journal:
        status["waiting"] = journal.count_waiting(bool(status["daemon"]["running"]))
        totals, last = journal.totals(), journal.last(1, only_ended=True)
    if totals:
        counts = {name: totals.get(name, 0) for name in TOTALS}
        status["totals"] = {"since": iso_after(totals["since"], 0), **counts}
    for one in last:
        status["last_execution"] = {
            "status": _whole_or_partial(one),
            "message": one["message"] or "",
            "workflow_name": one["workflow_name"],
            "at": str(one["ended_at"]),
        }
        if one["status"] != "success" and one["delivered"] is not None:
            troubles.append(Trouble(phrase("cli.last_failed"), phrase("cli.see_executions")))
    return troubles


def _whole_or_partial(one: ExecutionFacts) -> str:
    """Return how an execution ended; an answer of an older version tells no more than its status."""
    if isinstance(one["result"], dict) and "status_detail" in one["result"]:
        return str(one["result"]["status_detail"])
    return str(one["status"] or "not ended")


def _what_is_wrong(settings: Settings, status: StatusReport) -> list[Trouble]:
    """Return what is wrong beside what the journal knows of."""
    wrong = []
    if status["daemon"]["running"] and status["platform"]["state"] not in ("connected", NO_NEED):
        wrong.append(Trouble(phrase("cli.no_connection"), phrase("cli.tries_again")))
    if status["daemon"]["running"] and status["collecting"] is not None:
        wrong += _collect_faults(settings, status["collecting"])
    spool, keys = status["spool"], status["keys"]
    if spool is not None and spool["trades"]:
        words = phrase("cli.wait_for_mongodb", trades=waiting_words(spool["trades"]))
        wrong.append(Trouble(words, phrase("cli.they_follow")))
    if spool is not None and spool["rejects"]:
        words = phrase("cli.refused", documents=count_words(spool["rejects"], "document"))
        wrong.append(Trouble(words, phrase("cli.see_rejects")))
    if status["damaged_files"]:
        words = phrase("cli.set_aside", files=count_words(status["damaged_files"], "damaged file"))
        wrong.append(Trouble(words, phrase("cli.see_lost")))
    out = [key["key"] for key in keys if key["state"] == "out"]
    wrong += [Trouble(phrase("cli.key_is_out", key=key), phrase("cli.renew_plan")) for key in out]
    if keys and all(key["state"] == "resting" for key in keys):
        wrong.append(Trouble(phrase("cli.every_key_rests"), phrase("cli.wait_or_add")))
    return wrong


def _collect_stats(facts: Mapping[str, Any]) -> CollectStats:
    """Return what the daemon told of collecting as it told it."""
    known = {name: facts[name] for name in CollectStats._fields if facts.get(name) is not None}
    return CollectStats(**known)


def _collect_faults(settings: Settings, facts: Mapping[str, Any]) -> list[Trouble]:
    """Return what is wrong with collecting by what the daemon told last."""
    stats = _collect_stats(facts)
    to_do = phrase("cli.tries_again")
    if stats.trouble:
        return [Trouble(phrase("cli.collect_trouble", why=one_line(stats.trouble)), to_do)]
    if stats.connections < stats.connections_wanted:
        wanted = count_words(stats.connections_wanted, "connection")
        return [Trouble(phrase("cli.few_connections", count=stats.connections, wanted=wanted), to_do)]
    if facts["at"] is None:
        return [Trouble(phrase("cli.not_begun"), to_do)]
    if settings.collect and stats.polled and not stats.connections_wanted:
        words = phrase("cli.polled_instead", codes=count_words(stats.polled, "code"))
        return [Trouble(words, phrase("cli.poll_by_setting"))]
    return []


def _collect_line(facts: Mapping[str, Any]) -> Phrase:
    """Return what is collected, in all and now, for a person."""
    if facts["at"] is None:
        return phrase("cli.nothing_now")
    stats = _collect_stats(facts)
    now, trades = collect_words(stats._replace(trouble="")), count_words(stats.trades, "trade")
    clauses = [phrase("cli.collecting", now=now, at=facts["at"], trades=trades, stored=stats.stored)]
    if stats.dropped:
        clauses.append(phrase("cli.dropped", count=stats.dropped))
    words = listing("join.commas", clauses)
    if stats.trouble:
        words = listing("join.clauses", [words, one_line(stats.trouble, TROUBLE_SHOWN)])
    return words


def run_status(settings: Settings, as_json: bool, unit: Unit | None = None, is_faulty: bool = False) -> int:
    """Print the status for a person, or as one JSON object, and return the exit status: one of the STATUS_*.

    `unit`: that of the service that is meant. Nothing is known where the state, or what it has, is another user's.
    `is_faulty`: of the settings no more than the state directory is known.
    """
    if (unit is not None and unit.is_hidden()) or is_hidden(settings.state_directory):
        return _show_unknown(as_json)
    status = gather_status(settings, unit is not None, is_faulty)
    code = next(code for code, words in STATUS_WORDS.items() if words == status["status"])
    if as_json:
        show_json(status)
        return code
    lines = [
        ("cli.of_status", _status_line(status["status"], status["wrong"], status["to_do"])),
        ("cli.of_version", status["version"]),
        ("cli.of_daemon", _daemon_line(status["daemon"])),
        ("cli.of_registration", status["registration"] or _unregistered(status["platform"])),
        ("link.platform", _platform_line(status["platform"])),
    ]
    if status["collecting"] is not None:
        facts: Mapping[str, Any] = status["collecting"]
        if not status["daemon"]["running"]:
            facts = dict.fromkeys(facts)
        lines.append(("cli.of_collecting", _collect_line(facts)))
        odd = [one for one in facts["streams"] or () if one["why"] or one["state"] != "connected"]
        lines += [("cli.of_stream", _stream_line(one)) for one in odd]
    lines.append(("cli.of_store", status["store"]))
    if status["spool"] is not None:
        lines.append(("cli.of_spool", _spool_line(status["spool"])))
    lines.append(("cli.of_waiting", _waiting_line(status["waiting"])))
    if status["damaged_files"]:
        lines.append(("cli.of_damaged", phrase("cli.damaged", count=status["damaged_files"])))
    lines.append(("cli.of_last", _last_line(status["last_execution"])))
    if status["totals"]:
        lines.append(("cli.of_totals", _totals_line(status["totals"])))
    lines += [("cli.of_key", _key_line(key)) for key in status["keys"]]
    _show_labelled(lines)
    return code


def _show_labelled(lines: Iterable[tuple[str, str]]) -> None:
    """Print lines, each with what it is about, a kind, before it."""
    shown = []
    for kind, words in lines:
        label = for_reader(phrase(kind))
        shown.append(f"{padded(label, LABEL_COLUMNS)} {for_reader(words)}")
    show(local_times("\n".join(shown)))


def _state_words(state: str) -> str:
    """Return a state as a person reads it; one of another version as it is."""
    return phrase(STATES[state]) if state in STATES else state


def _status_line(status: str, wrong: Sequence[str], to_do: Sequence[str]) -> str:
    """Return whether all is well, and if not, what is wrong and what to do."""
    words, cure = _state_words(status), listing("join.clauses", to_do)
    if wrong:
        return phrase("cli.wrong_to_do", status=words, wrong=listing("join.clauses", wrong), to_do=cure)
    return phrase("cli.to_do", status=words, to_do=cure) if to_do else words


def _stream_line(stream: Mapping[str, Any]) -> Phrase:
    codes, state = count_words(stream["codes"], "code"), _state_words(stream["state"])
    product, subscribed = stream["product"], stream["subscribed"]
    words = phrase("cli.stream", product=product, subscribed=subscribed, codes=codes, state=state)
    if stream["why"]:
        return phrase("tools.because", what=words, why=one_line(stream["why"], TROUBLE_SHOWN))
    return words


def _unregistered(platform: PlatformFacts) -> Phrase:
    return phrase("cli.run_register" if platform["url"] else "cli.no_platform")


def _waiting_line(waiting: Waiting) -> Phrase:
    commands, results = waiting["commands"], waiting["results"]
    return phrase(
        "cli.executing" if waiting["executing"] else "cli.waiting", commands=commands, results=results
    )


def _last_line(last: LastExecution | None) -> Phrase:
    if last is None:
        return phrase("cli.none_yet")
    name, status = last["workflow_name"] or phrase("cli.nameless"), _state_words(last["status"])
    return phrase("cli.last", status=status, at=last["at"], name=name, message=last["message"])


def _show_unknown(as_json: bool) -> int:
    """Say of everything that it is not known: what cannot be looked at is not down, and not unregistered."""
    why, to_do = [phrase("cli.may_not_look")], [phrase("cli.run_as_root")]
    if as_json:
        known = {"status": STATUS_WORDS[STATUS_UNKNOWN], "version": __version__, "daemon": {"running": None}}
        unknown: dict[str, object] = dict.fromkeys(StatusReport.__annotations__)
        show_json(unknown | known | {"wrong": why, "to_do": to_do})
        return STATUS_UNKNOWN
    lines = [
        ("cli.of_status", _status_line(STATUS_WORDS[STATUS_UNKNOWN], why, to_do)),
        ("cli.of_version", __version__),
    ]
    others = ("cli.of_daemon", "cli.of_registration", "link.platform", "cli.of_store", "cli.of_waiting")
    lines += [(kind, phrase("cli.unknown")) for kind in (*others, "cli.of_last", "cli.of_key")]
    _show_labelled(lines)
    return STATUS_UNKNOWN


def _totals_line(totals: Mapping[str, Any]) -> Phrase:
    return phrase(
        "cli.totals",
        executions=count_words(sum(totals[name] for name in TOTALS[:3]), "execution"),
        since=totals["since"],
        partial=totals["partial"],
        failure=totals["failure"],
        trades=count_words(totals["stored"], "trade"),
        known=totals["known"],
        kept=totals["kept"],
        codes=count_words(totals["failed"], "code"),
    )


def run_executions(count: int, settings: Settings, as_json: bool) -> int:
    """Print the last executions and runs with their failures, oldest first; return the exit status."""
    if is_hidden(settings.state_directory):
        raise StoreError(phrase("cli.hidden", unit=UNIT))
    found: list[ExecutionFacts] = []
    if (settings.state_directory / JOURNAL_NAME).exists():
        with contextlib.closing(Journal(settings.state_directory, events=ByHand())) as journal:
            found = journal.last(count)
    outcomes = [for_reader(_state_words(_whole_or_partial(one))) for one in found]
    width = max(map(columns_of, outcomes), default=0)
    for one, outcome in zip(found, outcomes, strict=True):
        show_one(one, _execution_lines(one, padded(outcome, width)), as_json)
    if not found and not as_json:
        show(phrase("cli.nothing_executed"))
    return EXIT_OK


def _execution_lines(one: ExecutionFacts, outcome: str) -> Phrase:
    """Return an execution for a person: when, its outcome, what, why, and a line for each code that failed."""
    result, message, more = one["result"] or {}, one["message"] or "", []
    if result:
        stored = phrase("protocol.stored", reached=result.get("success_count"), total=result.get("total"))
        # once is enough
        message = _without_clause(message, stored)
        if one["status"] != "failure" or not message.startswith(stored):
            more.append(stored)
    if one["ended_at"] and one["delivered"] is False:
        more.append(phrase("cli.undelivered"))
    words: str = phrase(
        "cli.execution",
        at=one["ended_at"] or one["accepted_at"],
        outcome=outcome,
        id=one["execution_id"] or "-",
        name=one["workflow_name"] or "-",
    )
    if more:
        words = listing("join.columns", [words, listing("join.commas", more)])
    if one["status"] == "failure" and message:
        words = phrase("tools.because", what=words, why=message)
    failures = result.get("failures", {})
    lines = [phrase("cli.failed_code", code=code, why=why) for code, why in failures.items()]
    return listing("join.lines", [one_line(words, 600), *lines])


def _without_clause(message: str, clause: str) -> str:
    """Return a message without a clause that stands beside it; one of an older version is but a text."""
    if isinstance(message, Phrase) and message.kind == "join.clauses":
        return listing(message.kind, [part for part in message.values["parts"] if part != clause])
    return message


def _daemon_line(daemon: DaemonFacts) -> Phrase:
    if not daemon["running"]:
        return phrase("cli.not_running")
    if daemon["pid"] is None:
        return phrase("cli.running_silent")
    return phrase("cli.running", pid=daemon["pid"], version=daemon["version"])


def _spool_line(spool: QueueFacts) -> Phrase:
    clauses = [phrase("cli.wait_for_mongodb", trades=waiting_words(spool["trades"]))]
    if spool["trades"]:
        clauses.append(phrase("cli.oldest", megabytes=spool["bytes"] / 2**20, oldest=spool["oldest"]))
    if spool["refused"]:
        clauses.append(phrase("cli.no_room", count=spool["refused"]))
    if spool["unsettled"]:
        clauses.append(phrase("cli.unsettled", count=spool["unsettled"]))
    if spool["rejects"]:
        clauses.append(phrase("cli.rejected", count=spool["rejects"]))
    return listing("join.commas", clauses)


def _platform_line(platform: PlatformFacts) -> Phrase:
    url, state = platform["url"] or phrase("cli.none_set"), _state_words(platform["state"])
    if platform["state"] == "connected":
        return phrase("cli.connected_since", url=url, since=platform["connected_since"])
    if platform["lost_because"]:
        since, why = platform["lost_since"], one_line(platform["lost_because"])
        return phrase("cli.lost", url=url, since=since, why=why)
    if platform["last_contact"]:
        return phrase("cli.last_contact", url=url, state=state, at=platform["last_contact"])
    return phrase("cli.platform", url=url, state=state)


def _key_line(key: KeyUsage) -> Phrase:
    state = _state_words(key["state"])
    if key["state"] == "unknown":
        state = phrase("cli.untried")
    if key["until"]:
        state = phrase("cli.until", state=state, until=key["until"])
    if key["why"]:
        state = phrase("cli.for_reason", state=state, why=key["why"])
    clauses: list[str] = [listing("join.columns", [key["key"], key["plan"], _quota_words(key), state])]
    if key["ends_soon"]:
        clauses.append(key["ends_soon"])
    if key["not_for"]:
        clauses.append(
            phrase("cli.not_for", products=listing("join.names", map(service_words, key["not_for"])))
        )
    return listing("join.clauses", clauses)


def _quota_words(key: KeyUsage) -> Phrase:
    if not key["per_day"]:
        return phrase("cli.no_limit")
    if key["used_today"] is None:
        return phrase("cli.not_counted")
    used, left, leased = key["used_today"], key["left_today"], key["leased_today"]
    if leased:
        return phrase("cli.quota_leased", used=used, left=left, leased=leased)
    return phrase("cli.quota", used=used, left=left)


def need_mongodb(settings: Settings, why: str) -> None:
    """Raise SettingsError unless the settings name a MongoDB."""
    if not settings.mongodb_uri:
        file = settings.state_directory / SQLITE_NAME
        raise SettingsError([phrase("cli.no_mongodb", why=why, file=file)])


def run_drain(settings: Settings, retry: bool) -> int:
    """Move to MongoDB everything that waits for it, and say what was done. Raises StoreAway.

    `retry`: what MongoDB refused before, too.
    """
    need_mongodb(settings, phrase("cli.nowhere_to_move"))
    terminal = Terminal(None, "unit.trades", bar_above=0)
    stop = stop_on_signals()
    with Pipeline(settings, terminal) as pipeline:
        try:
            pipeline.deliver(stop, retry)
        finally:
            terminal.close()
            moved, rejected, left = pipeline.delivered()
            place = settings.mongodb_shown()
            words = phrase("cli.drained", moved=moved, place=place, left=left)
            if rejected:
                words = phrase("cli.drained_but", moved=moved, place=place, rejected=rejected, left=left)
            say(words)
    return EXIT_INTERRUPTED if left and stop.is_set() else EXIT_OK


def run_retain(settings: Settings) -> int:
    """Remove trades older than KEEP_DAYS, and say what is kept. Raises StoreError where something is in the way."""
    with Pipeline(settings, ByHand()) as pipeline:
        why = pipeline.apply_retention()
        if why:
            raise StoreError(phrase("cli.not_retained", days=settings.keep_days, why=why))
        say(phrase("cli.retained", store=store_name(settings), words=pipeline.kept()))
    return EXIT_OK


def run_backfill(options: Options, settings: Settings) -> int:
    """Make closes of the past final, print a row for each code, and return the exit status."""
    codes = list(read_codes(options)) if options.codes or options.codes_file else None
    terminal = Terminal(None, "cli.of_codes", bar_above=0)
    stop = stop_on_signals()
    done, failed, added = 0, 0, 0
    with Pipeline(settings, terminal) as pipeline:
        rows = pipeline.backfill(codes, cast(int, options.backfill), stop)
        total = 0
        for row in rows:
            terminal.progress(done, total)
            if isinstance(row, int):
                total = row
            elif row is not None:
                done, failed, added = done + 1, failed + bool(row.why), added + row.added
                show(_backfilled_words(row))
        terminal.close()
    kind = "cli.backfill_interrupted" if stop.is_set() else "cli.backfill_done"
    say(phrase(kind, codes=count_words(done, "code"), failed=failed, added=added))
    if stop.is_set():
        return EXIT_INTERRUPTED
    return EXIT_FAILED if failed else EXIT_OK


def _backfilled_words(row: Backfilled) -> Phrase:
    code = padded(row.code, 12)
    if row.why:
        return phrase("cli.backfill_failed_code", code=code, why=row.why)
    return phrase(
        "cli.backfill_code", code=code, first=row.first, last=row.last, added=row.added, there=row.there
    )


def discard_rejects(settings: Settings) -> int:
    """Delete what MongoDB refused for good, and the damaged files that were set aside; say how much that was."""
    with Pipeline(settings, ByHand()) as pipeline:
        rejects = pipeline.discard_rejects()
    files = damaged_files(settings.state_directory)
    size = sum(path.stat().st_size for path in files)
    with disk_trouble(phrase("cli.not_deleted")):
        for path in files:
            path.unlink()
    documents, damaged = count_words(rejects, "document"), count_words(len(files), "damaged file")
    say(phrase("cli.discarded", documents=documents, files=damaged, megabytes=size / 2**20))
    return EXIT_OK


def run_rejects(settings: Settings, as_json: bool) -> int:
    """Print what MongoDB refused for good, oldest first, and which damaged files were set aside."""
    with Pipeline(settings, ByHand()) as pipeline:
        rejects = pipeline.rejects()
    for reject in rejects:
        where = listing("join.columns", [reject["rejected_at"], reject["collection"], reject["_id"]])
        show_one(reject, phrase("tools.because", what=where, why=reject["reason"]), as_json)
    if not rejects and not as_json:
        show(phrase("cli.nothing_refused"))
    for path in damaged_files(settings.state_directory):
        say(phrase("cli.damaged_file", path=path, megabytes=path.stat().st_size / 2**20))
    return EXIT_OK


def run_symbols(text: str, settings: Settings, as_json: bool) -> int:
    """Print the instruments whose code or name holds a text; exit status 1 where there are none."""
    stop = stop_on_signals()
    with Pipeline(settings, ByHand()) as pipeline:
        found, why = pipeline.symbols(text, stop)
    width = min(NAME_COLUMNS, max((columns_of(symbol.name) for symbol in found), default=0))
    for symbol in found:
        names = symbol.name
        if symbol.name_en and symbol.name_en != symbol.name:
            names = f"{padded(symbol.name, width)}  {symbol.name_en}"
        show_one(symbol._asdict(), f"{padded(symbol.code, 16)} {padded(symbol.type, 9)} {names}", as_json)
    if why:
        say(phrase("cli.lists_incomplete", why=why), logging.WARNING)
    elif not found:
        say(phrase("cli.no_instrument", text=one_line(text, 40)))
    if stop.is_set():
        return EXIT_INTERRUPTED
    return EXIT_OK if found and not why else EXIT_FAILED


@contextlib.contextmanager
def reader_of(options: Options, settings: Settings) -> Iterator[Reader]:
    """Give what a view reads from; where nothing is stored yet it leaves no trace. Raises StoreError."""
    with (
        without_traces(settings) as looked_at,
        Pipeline.open_reader(looked_at, options.demo, ByHand()) as reader,
    ):
        yield reader


def run_show(options: Options, settings: Settings, environ: Mapping[str, str]) -> int:
    """Print what is stored of codes; exit status 1 where there is none of one that was asked for, or nothing at all."""
    with reader_of(options, settings) as reader:
        codes, missing = codes_to_show(options, settings, reader)
        found = in_order(quotes(reader, codes, SPOKEN.language == ENGLISH), options.sort or "code")
    now = time.time()
    if options.json:
        for one in found:
            show_json(one.document(now))
    elif found:
        show("\n".join(quote_table(settings, environ, options.up).lines(found, now)))
    status = _end_view(missing, found)
    if found and not options.demo and all(one.reference is None for one in found):
        say(phrase("cli.no_reference"))
    return status


def _end_view(missing: Sequence[str], found: Collection[object]) -> int:
    """Say what is not there to be shown, and return the exit status."""
    for words in missing:
        say(words)
    if not found and not missing:
        say(phrase("cli.no_trade_yet"))
    return EXIT_FAILED if missing or not found else EXIT_OK


def need_blocks(options: Options, encoding: str) -> None:
    """Raise UsageError where stdout cannot show what a chart is drawn with."""
    try:
        "█▒│░".encode(encoding)
    except UnicodeError:
        if not options.json:
            raise UsageError(phrase("cli.no_blocks", encoding=encoding)) from None


def run_chart(options: Options, settings: Settings, environ: Mapping[str, str]) -> int:
    """Print candles of codes; exit status 1 where there are none of one that was asked for, or nothing at all."""
    need_blocks(options, sys.stdout.encoding)
    now, span, step = time.time(), span_of(options), cast(str, options.chart)
    width, height = terminal_size()
    with reader_of(options, settings) as reader:
        codes, missing = codes_to_show(options, settings, reader)
        last = reader.last(codes)
        charts = read_charts(reader, codes, last, step, span, now, width)
        names = reader.names(codes, SPOKEN.language == ENGLISH)
    up, color = color_of_rise(environ, options.up), settings.color and sys.stdout.isatty()
    order = codes if options.sort == "asked" else sorted(charts)
    for code, chart in [(code, charts[code]) for code in order if code in charts]:
        if not chart.candles:
            missing.append(what_is_there(chart, last.get(code)))
        elif options.json:
            for candle in chart.documents():
                show_json(candle)
        else:
            drawn, chart = draw_chart(chart, width, max(LEAST_LINES, height - CAPTION_LINES), up, color)
            show(f"{chart_title(chart, names.get(code, ''))}\n{drawn.rstrip()}")
            for words in chart_notes(chart):
                show(words)
    return _end_view(missing, charts)


def run_page(options: Options, settings: Settings, environ: Mapping[str, str]) -> int:
    """Write the page, or one code's picture, whole or not at all; exit status 1 where it lacks what was asked for."""
    now, span, step = time.time(), span_of(options), options.chart or "5m"
    path = Path(cast(str, options.html))
    need_plain_file(path, "--html")
    store, up = settings.mongodb_shown() or SQLITE_NAME, color_of_rise(environ, options.up)
    with reader_of(options, settings) as reader:
        codes, missing = codes_to_show(options, settings, reader)
        found = in_order(quotes(reader, codes, english=True), options.sort or "code")
        last = {one.code: one.trade for one in found}
        names, charts = reader.names(last), read_charts(reader, [*last], last, step, span, now, PAGE_STEPS)
        closes = reader.closes(last, *dates_of(Span(until=span.until), now))
    is_fixed, is_chosen = options.up is not None, bool(missing)
    page = Page(found, names, charts, closes, now, store, SPOKEN.language, up, is_fixed, is_chosen)
    is_picture = path.suffix.lower() == ".svg"
    text = draw_picture(_only_chart(charts.values()), up) if is_picture else draw_page(page)
    # a web server is another user
    write_whole(path, text, mode=0o644, setting="--html")
    status = _end_view(missing, found)
    size = len(text.encode()) / 1000
    say(phrase("cli.page_written", path=path, codes=count_words(len(found), "code"), size=size))
    return status


def _only_chart(charts: Iterable[Chart]) -> Chart:
    """Return the one chart that a picture has room for. Raises UsageError."""
    found = [chart for chart in charts if chart.candles]
    if not found:
        raise StockrtError(phrase("cli.no_candle"))
    if len(found) > 1:
        raise UsageError(phrase("cli.not_one_code", count=len(found)))
    return found[0]


def quote_table(settings: Settings, environ: Mapping[str, str], up: str | None) -> QuoteTable:
    """Return a table for what stdout is."""
    width, rise = None, ""
    if sys.stdout.isatty():
        width, _ = terminal_size()
        rise = color_of_rise(environ, up) if settings.color else ""
    return QuoteTable(width, rise, sys.stdout.encoding)


def codes_to_show(options: Options, settings: Settings, reader: Reader) -> tuple[list[str], list[str]]:
    """Return the codes that are meant, as far as there are trades of them, and a sentence for each other one.

    Raises StockrtError.
    """
    typed: list[str] = []
    if options.codes or options.codes_file:
        typed = [*read_codes(options)]
    elif settings.collect_codes and not options.demo:
        with Pipeline.open_mongodb(settings) if settings.mongodb_uri else contextlib.nullcontext() as store:
            typed = [*WatchList(settings, store).codes()]
    if not typed:
        return reader.newest_codes(CODES_SHOWN), []
    stored = None
    if options.chart == DAILY and options.html is None:
        stored = {*reader.codes(), *reader.close_codes()}
    return codes_meant(typed, reader, stored)


def codes_meant(
    typed: Iterable[str], reader: Reader, stored: Collection[str] | None = None
) -> tuple[list[str], list[str]]:
    """Return which of the stored codes are meant, by code or by name, and a sentence for what means none of them.

    `stored`: of which there is something; None: of which there are trades. Raises StoreError.
    """
    meant: dict[str, list[str]] = {}
    missing: list[str] = []
    for code in dict.fromkeys(typed):
        try:
            instrument = parse_code(code)
        except UnclearCode as error:
            meant[code] = [error.text, *error.guesses]
            if not error.text.isascii():
                names = reader.names(reader.codes() if stored is None else stored)
                meant[code] += [one for one, name in names.items() if error.text in name.upper()]
        except InstrumentError as error:
            missing.append(phrase("tools.because", what=one_line(code, 40), why=error.message))
        else:
            meant[code] = [instrument.code, *(other.code for other in instrument.alternatives)]
    there = stored
    if there is None:
        there = reader.last(list(dict.fromkeys(chain.from_iterable(meant.values()))))
    found = []
    for code, ones in meant.items():
        of_it = [one for one in ones if one in there]
        found += of_it[:1]
        if not of_it:
            kind = "cli.code_not_stored" if code.isascii() else "cli.name_not_stored"
            missing.append(phrase(kind, code=one_line(code, 40)))
    return list(dict.fromkeys(found)), missing


def run_export(options: Options, settings: Settings) -> int:
    """Write what is stored into a file, whole or not at all, or to stdout; return the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    place = cast(str, options.export)
    if place != "-":
        need_plain_file(Path(place), "--export")
    try:
        with reader_of(options, settings) as reader:
            missing: list[str] = []
            codes: Sequence[str] = ()
            span, is_chosen = span_of(options), bool(options.codes or options.codes_file)
            is_whole = not (is_chosen or options.closes) and span == Span()
            if not is_whole:
                codes = reader.close_codes() if options.closes else reader.codes()
            if is_chosen:
                codes, missing = codes_meant(read_codes(options), reader, set(codes))
            export = Export(codes, span, options.closes, is_whole, options.json or place.endswith(".jsonl"))
            if place == "-":
                count = _to_stdout(export, reader)
            elif missing and not codes:
                why = listing("join.clauses", missing)
                raise StockrtError(phrase("cli.not_exported", path=place, why=why))
            else:
                with whole_file(Path(place), durable=True, setting="--export") as stream:
                    count = _write_export(export, reader, stream)
    except KeyboardInterrupt:
        say(phrase("cli.interrupted" if place == "-" else "cli.export_undone"))
        return EXIT_INTERRUPTED
    for lack in missing:
        say(lack)
    rows = count_words(count, "close" if options.closes else "trade")
    words = phrase("cli.exported", rows=rows)
    if place != "-":
        words = phrase("cli.exported_to", rows=rows, path=place)
    say(words)
    return EXIT_FAILED if missing else EXIT_OK


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _to_stdout(export: Export, reader: Reader) -> int:
    """Write an export to stdout, return how many rows it has. Raises PrintError, without words for a reader gone."""
    try:
        count = _write_export(export, reader, sys.stdout.buffer)
        sys.stdout.buffer.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the exit's flush fails again
        raise print_error(error) from None
    return count


def _write_export(export: Export, reader: Reader, stream: IO[bytes]) -> int:
    """Write an export into a stream, and return how many rows it has. Raises OSError, StoreError."""
    count, done, last_code = 0, 0, ""
    unit, total = "cli.of_codes", len(export.codes)
    if export.is_whole:
        unit, total = "unit.trades", reader.estimate()
    code_at = export.names.index("stock_code")
    with Terminal(None, unit, bar_above=0) as terminal:
        if not export.as_json:
            stream.write(export.lines([export.names]))
        for rows in export.rows(reader):
            stream.write(export.lines(rows))
            count += len(rows)
            done += len({row[code_at] for row in rows} - {last_code})
            last_code = rows[-1][code_at] if rows else last_code
            terminal.progress(min(count if export.is_whole else done, total), total)
    return count


def run_register(settings: Settings, force: bool) -> int:
    """Register at the platform unless a hash is stored, and say what was done."""
    place = settings.state_directory / HASH_NAME
    stored = "" if force else read_hash(settings.state_directory)
    if stored:
        show(phrase("cli.registered_already", hash=shorten(stored), place=place))
        return EXIT_OK
    module_hash = register(settings)
    write_hash(settings.state_directory, module_hash)
    name, url, shown = settings.module_name, settings.platform_url(), shorten(module_hash)
    show(phrase("cli.registered", name=name, url=url, hash=shown, place=place))
    return EXIT_OK


def run_check_settings(loaded: LoadedSettings, is_service_hidden: bool) -> int:
    """Say that the settings, which were read by now, are well, and for what they are enough. Raises SettingsError."""
    zones = {market.zone for market in (*MARKETS.values(), *PRODUCT_MARKETS.values())}
    if None in map(zone_info, zones):
        raise SettingsError([phrase("cli.no_time_zones")])
    check = _check_origins(loaded, is_service_hidden)
    if not loaded.settings.platform_url():
        words = listing("join.clauses", [check.words, _without_platform(loaded.settings)])
        check = check._replace(words=words)
    show(local_times(for_reader(_check_line(check))))
    return EXIT_OK if check.good else EXIT_FAILED


def needs_of(options: Options) -> Needs:
    """Return what a command needs of the settings."""
    if options.check_settings:
        return Needs(key=True, whole_platform=True, paths=True, collect=True)
    if options.register:
        return Needs(platform=True)
    if options.once or options.collect or options.symbols or options.backfill is not None:
        return Needs(key=not options.demo)
    others = ("check", "status", "executions", "drain", "retain", "rejects")
    looks = options.documents is not None or options.show is not None or options.export
    if looks or any(getattr(options, name) for name in others):
        return NO_NEEDS
    return DAEMON_NEEDS


def reloaded_daemon(environ: Mapping[str, str]) -> tuple[int, Path]:
    """Return the pid of the unit's daemon, and where it takes its new environment. Raises UsageError by hand."""
    pid, place = environ.get("MAINPID", ""), handed_over(environ)
    if place is None or not pid.isdigit():
        raise UsageError(phrase("cli.reload_by_unit"))
    return int(pid), place


def run_reload(settings: Settings, environ: Mapping[str, str]) -> int:
    """Hand the unit's new environment, whose settings are good by now, to its daemon, and have it read them."""
    pid, place = reloaded_daemon(environ)
    write_whole(place, json.dumps(dict(environ)), setting="RUNTIME_DIRECTORY")
    os.kill(pid, signal.SIGHUP)
    deadline = time.monotonic() + RELOAD_WAIT_S
    while place.exists():
        if time.monotonic() > deadline:
            raise StockrtError(phrase("cli.not_reloaded", seconds=RELOAD_WAIT_S))
        time.sleep(STOP_POLL_S)
    return EXIT_OK


def need_descriptors(settings: Settings) -> None:
    """Raise StockrtError where too few files may be open: it would be connected, and every execution fail."""
    import resource

    needed = DESCRIPTORS_NEEDED
    if settings.collect:
        needed += DESCRIPTORS_OF_A_KEY * len(settings.api_keys)
    few, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < needed:
        raise StockrtError(phrase("cli.few_descriptors", most=most, needed=needed))
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(few, needed), most))


def run_daemon(settings: Settings, environ: Mapping[str, str], env_file: Path | None) -> int:
    """Run as the platform's module, or as one that collects, until a signal or the platform ends it.

    Return the exit status.
    """
    need_descriptors(settings)
    watchdog_s = watchdog_seconds(environ, os.getpid())
    service = Service(settings, Notifier(environ.get("NOTIFY_SOCKET", "")), watchdog_s)
    daemon = Daemon(settings, service, source=SettingsSource(environ, env_file))
    clean_cache(environ, Path(__file__).resolve().parent.parent)
    stop_on_signals(daemon)
    reload_on_hangup(daemon)
    try:
        need_clock(time.time())
    except StoreError as error:  # it may be set at any moment
        log.warning("%s", error)
    if settings.platform_url():
        log.info("stockrt %s for %s at %s", __version__, settings.module_name, settings.platform_url())
    else:
        log.info("stockrt %s collects without a platform", __version__)
    daemon.run()
    service.stopped()
    log.info("stopped")
    return EXIT_OK


def run_migrate(options: Options, environ: Mapping[str, str]) -> int:
    """Take settings and hash over from the older client's directory, then its documents if they are asked for."""
    if options.time_zone is not None:
        time_zone(options.time_zone)
    here, *_, the_services = ENV_FILE_PLACES
    target = options.env_file or (the_services if os.geteuid() == 0 else here)
    old, settings, lines = move_installation(
        Path(cast(str, options.migrate)), target, environ, options.dry_run
    )
    start_logging(settings)
    show(listing("join.lines", lines))
    say(phrase("cli.would_migrate" if options.dry_run else "cli.migrated", file=target))
    if options.documents is None:
        return EXIT_OK
    return run_documents(options, settings, old.get("MONGODB_COLLECTION_NAME", OLD_COLLECTION))


def run_documents(options: Options, settings: Settings, source: str = OLD_COLLECTION) -> int:
    """Bring the older client's documents over, say what was done, and return the exit status."""
    zone = time_zone(cast(str, options.time_zone))
    need_mongodb(settings, phrase("cli.no_old_documents"))
    if settings.keep_days:
        log.warning(
            "KEEP_DAYS=%d: MongoDB removes what is older from %s again, once that holds there; see --check",
            settings.keep_days,
            settings.realtime_name,
        )
    terminal = Terminal(None, "unit.documents", bar_above=0)
    stop = stop_on_signals()
    with Pipeline.open_mongodb(settings) as store:
        migration = Migration(
            store, settings, options.documents or source, zone, options.dry_run, options.force
        )
        try:
            finished = migration.run(stop, terminal)
        finally:
            terminal.close()
            if migration.done.read:
                say(migration.words())
    if not finished:
        say(phrase("cli.goes_on"))
        return EXIT_INTERRUPTED
    return EXIT_FAILED if migration.done.refused else EXIT_OK


def run_command(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run one command line and return its exit status. Raises StockrtError: what the operator must mend."""
    options = parse_arguments(argv)
    if options.grafana:
        show(json.dumps(dashboard(), indent=2))
        return EXIT_OK
    if options.migrate:
        return run_migrate(options, environ)
    if options.reload:
        reloaded_daemon(environ)  # whoever types it is not to look for settings first
    unit = find_unit(environ, options.env_file)
    hidden = unit is not None and unit.is_hidden()
    needs = needs_of(options)
    try:
        loaded = load_settings(environ, options.env_file, unit=None if hidden else unit, needs=needs)
    except SettingsError as error:
        if options.status and error.directory is not None:
            _show_state(error.directory, options.json, unit)
        raise
    start_logging(loaded.settings)
    if loaded.settings.language:
        SPOKEN.choose({**environ, "STOCKRT_LANG": loaded.settings.language})
    _warn(loaded.warnings, needs is DAEMON_NEEDS)
    looks = options.show is not None or options.export
    if hidden and (options.drain or options.retain or options.rejects or options.executions or looks):
        raise StoreError(phrase("cli.hidden", unit=UNIT))
    if options.once:
        return run_once(options, loaded.settings)
    if options.collect:
        return run_collect(options, loaded.settings, environ)
    if options.backfill is not None:
        return run_backfill(options, loaded.settings)
    if options.documents is not None:
        return run_documents(options, loaded.settings)
    if options.retain:
        return run_retain(loaded.settings)
    if options.export:
        return run_export(options, loaded.settings)
    if options.drain:
        return run_drain(loaded.settings, options.retry)
    if options.reload:
        return run_reload(loaded.settings, environ)
    if needs is DAEMON_NEEDS:
        return run_daemon(loaded.settings, environ, options.env_file)
    with Terminal():
        if options.html is not None:
            return run_page(options, loaded.settings, environ)
        if options.chart is not None:
            return run_chart(options, loaded.settings, environ)
        if options.show is not None:
            return run_show(options, loaded.settings, environ)
        return _run_short(options, loaded, unit)


def _show_state(directory: Path, as_json: bool, unit: Unit | None) -> None:
    """Print what --status knows without the settings, which are faulty."""
    settings = load_settings({"STATE_DIRECTORY": str(directory)}, places=()).settings
    try:
        run_status(settings, as_json, unit, is_faulty=True)
    except StoreError as error:
        _complain(error)


def _warn(warnings: Iterable[str], is_service: bool) -> None:
    """Tell what is odd in the settings: the one who typed a command, or the log of a service."""
    for warning in warnings:
        if is_service or isinstance(sys.stderr, JournalStream):
            log.warning("%s", warning)
        elif log.isEnabledFor(logging.WARNING):
            say(phrase("cli.error", words=warning))


def _run_short(options: Options, loaded: LoadedSettings, unit: Unit | None) -> int:
    """Run a command that counts nothing; `unit`: of the service that is meant."""
    hidden = unit is not None and unit.is_hidden()
    if options.register:
        return run_register(loaded.settings, options.force)
    if options.status:
        return run_status(loaded.settings, options.json, unit)
    if options.executions:
        return run_executions(options.executions, loaded.settings, options.json)
    if options.symbols:
        return run_symbols(options.symbols, loaded.settings, options.json)
    if options.rejects and options.discard:
        return discard_rejects(loaded.settings)
    if options.rejects:
        return run_rejects(loaded.settings, options.json)
    if options.check:
        return run_check(loaded, hidden, options.json)
    return run_check_settings(loaded, hidden)


def _prepare_streams() -> None:
    """Let stdout take any text, and put /dev/null in place of standard streams that were closed.

    Else the next file opened would get their number.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  (for as long as the process lives)
    codecs.register_error("stockrt", _as_json_escapes)
    cast(io.TextIOWrapper, sys.stdout).reconfigure(errors="stockrt")


def _as_json_escapes(error: UnicodeError) -> tuple[str, int]:
    """Return in place of what an encoding cannot hold, as half a pair of surrogates, what is the same in JSON."""
    unfit = cast(UnicodeEncodeError, error)
    return json.dumps(unfit.object[unfit.start : unfit.end])[1:-1], unfit.end


def look_for_cycles_seldom() -> None:
    """Let Python look for cyclic garbage less often: trades are many, small, and without cycles (4 % of a trade)."""
    gc.set_threshold(20_000, 20, 20)


def _complain(error: StockrtError) -> None:
    """Say what a command ends with, on a line of its own for each fault."""
    if isinstance(error, SettingsError) and error.language:
        SPOKEN.choose({**os.environ, "STOCKRT_LANG": error.language})
    faults = error.faults if isinstance(error, SettingsError) else (error.message,)
    for fault in filter(None, faults):
        say(phrase("cli.error", words=fault), logging.ERROR)


def main() -> NoReturn:
    """Run the command line of this process and leave it with the exit status."""
    look_for_cycles_seldom()
    _prepare_streams()
    SPOKEN.choose(os.environ)
    if journal_reads(2, os.environ):
        sys.stderr = JournalStream(sys.stderr)
    try:
        status = run_command(sys.argv[1:], os.environ)
    except StockrtError as error:
        _complain(error)
        status = error.exit_code
    except ImportError as error:
        status = EXIT_FAILED
        _complain(lost_part(error))
    except SystemExit as leaving:  # --help, --version
        status = int(leaving.code or 0)
    except OSError as error:  # whoever met it should have said what was being done
        status = EXIT_FAILED
        _complain(StockrtError(phrase("cli.os_error", file=str(error.filename), why=os_words(error))))
    with contextlib.suppress(OSError):  # a reader that went away
        sys.stdout.flush()
    # Not sys.exit: threads that hang on the network must not hold the process up, and pymongo's monitor
    # threads cost half a second at the interpreter's end. Everything that counts is flushed by now.
    os._exit(status)


# ======================================================================================================
# Catalogue: every sentence of all rooms, in English and in Chinese
# ======================================================================================================

# A kind is named after its room. Both templates have the same values. A dict of its own for each room.
TEMPLATES |= {
    "huge": ("a huge {type}", "一个极大的 {type}"),
    "join.names": (", ", "、"),
    "join.commas": (", ", "，"),
    "join.clauses": ("; ", "；"),
    "join.and": (" and ", " 和 "),
    "join.columns": ("  ", "  "),
    "join.lines": ("\n", "\n"),
    "join.dots": (" · ", " · "),
    "n.beat": ("{n} beat", "{n} 次轮询"),
    "n.beats": ("{n} beats", "{n} 次轮询"),
    "n.candle": ("{n} candle", "{n} 根 K 线"),
    "n.candles": ("{n} candles", "{n} 根 K 线"),
    "n.close": ("{n} close", "{n} 个收盘价"),
    "n.closes": ("{n} closes", "{n} 个收盘价"),
    "n.code": ("{n} code", "{n} 个代码"),
    "n.codes": ("{n} codes", "{n} 个代码"),
    "n.connection": ("{n} connection", "{n} 个连接"),
    "n.connections": ("{n} connections", "{n} 个连接"),
    "n.damaged file": ("{n} damaged file", "{n} 个损坏的文件"),
    "n.damaged files": ("{n} damaged files", "{n} 个损坏的文件"),
    "n.day": ("{n} day", "{n} 天"),
    "n.days": ("{n} days", "{n} 天"),
    "n.document": ("{n} document", "{n} 个文档"),
    "n.documents": ("{n} documents", "{n} 个文档"),
    "n.execution": ("{n} execution", "{n} 次执行"),
    "n.executions": ("{n} executions", "{n} 次执行"),
    "n.final close": ("{n} final close", "{n} 个最终收盘价"),
    "n.final closes": ("{n} final closes", "{n} 个最终收盘价"),
    "n.gap": ("{n} gap", "{n} 处缺口"),
    "n.gaps": ("{n} gaps", "{n} 处缺口"),
    "n.kept trade": ("{n} kept trade", "{n} 笔暂存成交"),
    "n.kept trades": ("{n} kept trades", "{n} 笔暂存成交"),
    "n.key": ("{n} key", "{n} 个密钥"),
    "n.keys": ("{n} keys", "{n} 个密钥"),
    "n.more code": ("{n} more code", "另有 {n} 个代码"),
    "n.more codes": ("{n} more codes", "另有 {n} 个代码"),
    "n.record": ("{n} record", "{n} 条记录"),
    "n.records": ("{n} records", "{n} 条记录"),
    "n.trade": ("{n} trade", "{n} 笔成交"),
    "n.trades": ("{n} trades", "{n} 笔成交"),
    "waits.other": ("{n} other waits", "另有 {n} 条等待"),
    "wait.others": ("{n} others wait", "另有 {n} 条等待"),
    "waits.trade": ("{n} trade waits", "{n} 笔成交等待写入"),
    "wait.trades": ("{n} trades wait", "{n} 笔成交等待写入"),
    "age.s": ("{n} s", "{n} 秒"),
    "age.min": ("{n} min", "{n} 分钟"),
    "age.h": ("{n} h", "{n} 小时"),
    "age.d": ("{n} d", "{n} 天"),
}

# ------------------------------------------------------------------------------------------------------
# Of the room Tools
# ------------------------------------------------------------------------------------------------------

TEMPLATES |= {
    "tools.and_so_on": ("{names} …", "{names} 等"),
    "tools.because": ("{what}: {why}", "{what}：{why}"),
    "tools.clock": (
        "the clock of this machine says {now}: nothing is stored until it is set; see timedatectl, and "
        "systemd-time-wait-sync.service, which lets the service wait for it",
        "本机时钟显示 {now}，校准之前不会存入任何数据；请检查 timedatectl，"
        "也可启用 systemd-time-wait-sync.service，让服务等时钟校准后再启动",
    ),
    "tools.foreign_state_directory": (
        "{path} cannot be written by this user; see STATE_DIRECTORY",
        "当前用户无权写入 {path}；请检查 STATE_DIRECTORY",
    ),
    "tools.install_anew": ("install it anew", "请重新安装"),
    "tools.locked": (
        "{who} in {path}; stop it, or give this one its own STATE_DIRECTORY",
        "{who}，目录为 {path}；请停止它，或为本进程另设 STATE_DIRECTORY",
    ),
    "tools.lost_part": (
        "a part of the program is gone from {site} ({error}): {then}",
        "程序的一部分已从 {site} 消失（{error}）：{then}",
    ),
    "tools.no_descriptor": (
        "no file or connection can be opened ({why}); see LimitNOFILE= of the unit, or ulimit -n",
        "无法再打开文件或连接（{why}）；请检查服务单元的 LimitNOFILE= 或 ulimit -n",
    ),
    "tools.no_lock": ("the lock {path} cannot be taken", "无法取得锁文件 {path}"),
    "tools.no_memory": (
        "memory is short; see MemoryMax= of the unit",
        "内存不足；请检查服务单元的 MemoryMax=",
    ),
    "tools.no_plain_file": (
        "{path} cannot be written: it is a link, a directory, a pipe or a device, expected a file's name; see "
        "{setting}",
        "无法写入 {path}：它是链接、目录、管道或设备，应为普通文件名；请检查 {setting}",
    ),
    "tools.no_state_directory": ("{path} cannot be made", "无法创建 {path}"),
    "tools.no_thread": (
        "no thread can be started ({error}): too many run, or memory is short; see TasksMax= and MemoryMax= of the "
        "unit, or ulimit -u",
        "无法启动线程（{error}）：线程过多或内存不足；请检查服务单元的 TasksMax= 和 MemoryMax=，或 ulimit -u",
    ),
    "tools.not_read": ("{path} cannot be read", "无法读取 {path}"),
    "tools.not_utf8": ("it is not UTF-8 text", "不是 UTF-8 文本"),
    "tools.not_written": ("{path} cannot be written", "无法写入 {path}"),
    "tools.large_file": ("it has more than {most} MiB", "超过 {most} MiB"),
    "tools.odd_file": ("it is a pipe or a device, expected a plain file", "是管道或设备，应为普通文件"),
    "tools.or": ("{first} or {last}", "{first} 或 {last}"),
    "tools.own_fault": (
        "a fault of stockrt itself: {error}; see the log",
        "stockrt 自身的错误：{error}；详见日志",
    ),
    "tools.see": ("{words}; see {cause}", "{words}；请检查 {cause}"),
    "tools.stopped": ("stopped", "已停止"),
    "tools.unknown": ("no more is known", "原因不明"),
    "tools.unpacked_anew": ("the next start unpacks it anew", "下次启动时会重新解压"),
}

# What the system says of files and connections, by the names of errno.
TEMPLATES |= {
    "os.EACCES": ("Permission denied", "权限不足"),
    "os.EADDRINUSE": ("Address already in use", "地址已被占用"),
    "os.EADDRNOTAVAIL": ("Cannot assign requested address", "地址不可用"),
    "os.EAGAIN": ("Resource temporarily unavailable", "资源暂时不可用"),
    "os.EBADF": ("Bad file descriptor", "文件描述符无效"),
    "os.EBUSY": ("Device or resource busy", "设备或资源忙"),
    "os.ECONNABORTED": ("Software caused connection abort", "连接已中止"),
    "os.ECONNREFUSED": ("Connection refused", "连接被拒绝"),
    "os.ECONNRESET": ("Connection reset by peer", "连接被对方重置"),
    "os.EDQUOT": ("Disk quota exceeded", "超出磁盘限额"),
    "os.EEXIST": ("File exists", "文件已存在"),
    "os.EFBIG": ("File too large", "文件过大"),
    "os.EHOSTDOWN": ("Host is down", "主机已关闭"),
    "os.EHOSTUNREACH": ("No route to host", "没有到主机的路由"),
    "os.EINVAL": ("Invalid argument", "参数无效"),
    "os.EIO": ("Input/output error", "输入输出错误"),
    "os.EISDIR": ("Is a directory", "是一个目录"),
    "os.ELOOP": ("Too many levels of symbolic links", "符号链接层数过多"),
    "os.EMFILE": ("Too many open files", "打开的文件过多"),
    "os.ENAMETOOLONG": ("File name too long", "文件名过长"),
    "os.ENETDOWN": ("Network is down", "网络已断开"),
    "os.ENETUNREACH": ("Network is unreachable", "网络不可达"),
    "os.ENFILE": ("Too many open files in system", "系统打开的文件过多"),
    "os.ENOENT": ("No such file or directory", "没有这个文件或目录"),
    "os.ENOLCK": ("No locks available", "没有可用的锁"),
    "os.ENOMEM": ("Cannot allocate memory", "无法分配内存"),
    "os.ENOSPC": ("No space left on device", "磁盘空间不足"),
    "os.ENOTCONN": ("Transport endpoint is not connected", "套接字未连接"),
    "os.ENOTDIR": ("Not a directory", "不是目录"),
    "os.ENXIO": ("No such device or address", "没有这个设备或地址"),
    "os.EPERM": ("Operation not permitted", "不允许的操作"),
    "os.EPIPE": ("Broken pipe", "管道已断开"),
    "os.EROFS": ("Read-only file system", "只读文件系统"),
    "os.ESTALE": ("Stale file handle", "文件句柄已失效"),
    "os.ETIMEDOUT": ("Connection timed out", "连接超时"),
    "os.ETXTBSY": ("Text file busy", "文件正被执行"),
}

# ------------------------------------------------------------------------------------------------------
# Of the room Settings
# ------------------------------------------------------------------------------------------------------

TEMPLATES |= {
    "settings.credential": ("credential", "凭据"),
    "settings.credential_file": ("credential {path}", "凭据 {path}"),
    "settings.database_of_host": (
        "MONGODB_HOST, the database behind its last /: {expected}",
        "MONGODB_HOST 最后一个 / 之后的数据库名：{expected}",
    ),
    "settings.defaults": ("defaults", "默认值"),
    "settings.environment": ("environment", "环境变量"),
    "settings.expect.codes": (
        "expected codes such as AAPL.US 600519.SH, or @ and the name of a file of codes, or watch: the codes of the "
        "collection MONGODB_WATCH_COLLECTION_NAME",
        "应为代码（如 AAPL.US 600519.SH），或 @ 加代码文件的文件名，或 watch（即 MONGODB_WATCH_COLLECTION_NAME "
        "集合中的代码）",
    ),
    "settings.expect.collect": ("expected stream, or nothing", "应为 stream，或留空"),
    "settings.expect.collection": (
        "expected a collection name of at most 120 bytes without $ and needless dots, not system.…",
        "应为最多 120 字节的集合名，不含 $ 和多余的点，不以 system. 开头",
    ),
    "settings.expect.database": (
        'expected a database name of at most 63 bytes without / \\ . " $ * < > : | ? or blanks',
        '应为最多 63 字节的数据库名，不含 / \\ . " $ * < > : | ? 和空格',
    ),
    "settings.expect.days": (
        "expected days, a whole number from 1 to 36500, or nothing: for ever",
        "应为天数（1 到 36500 的整数），或留空（永久保留）",
    ),
    "settings.expect.description": (
        "expected at most 500 printable characters",
        "应为最多 500 个可显示的字符",
    ),
    "settings.expect.directory": ("expected an absolute path", "应为绝对路径"),
    "settings.expect.every": ("expected seconds from 1 to 86400", "应为 1 到 86400 的秒数"),
    "settings.expect.heartbeat": ("expected seconds from 1 to 3600", "应为 1 到 3600 的秒数"),
    "settings.expect.host": (
        "expected a host name or an address, without http:// and without a port",
        "应为主机名或地址，不带 http:// 和端口",
    ),
    "settings.expect.hosts": (
        "expected host names, addresses and blocks such as 10.0.0.0/8, comma-separated, or *",
        "应为以逗号分隔的主机名、地址和地址段（如 10.0.0.0/8），或 *",
    ),
    "settings.expect.keys": (
        "expected one or several keys, comma-separated, ASCII without blanks",
        "应为一个或多个密钥，以逗号分隔，只含 ASCII 字符，不含空格",
    ),
    "settings.expect.language": ("expected zh or en", "应为 zh 或 en"),
    "settings.expect.log_level": (
        "expected debug, info, warning or error",
        "应为 debug、info、warning 或 error",
    ),
    "settings.expect.megabytes": (
        "expected megabytes, a whole number from 1 to 1048576",
        "应为 1 到 1048576 的整数，单位 MB",
    ),
    "settings.expect.metrics_file": (
        "expected an absolute path that ends in .prom",
        "应为以 .prom 结尾的绝对路径",
    ),
    "settings.expect.mongodb": (
        "expected mongodb://[user:password@]host[:port][/…] or mongodb+srv://…, with / : @ % in user and password "
        "percent-encoded and acknowledged writes (no w=0)",
        "应为 mongodb://[用户名:密码@]主机[:端口][/…] 或 mongodb+srv://…，用户名和密码中的 / : @ % 须百分号编码，"
        "写入须有确认（不能用 w=0）",
    ),
    "settings.expect.name": ("expected 1 to 100 printable characters", "应为 1 到 100 个可显示的字符"),
    "settings.expect.numeric_type": ("expected string, decimal or double", "应为 string、decimal 或 double"),
    "settings.expect.option": (
        "expected what MongoDB's documentation of connection strings says",
        "应符合 MongoDB 文档对连接串的规定",
    ),
    "settings.expect.plans": (
        "expected auto, free, basic, premium, pro, or requests per second as a number (0: no limit, else 0.017 or "
        "more: one a minute); one for all keys, or one for each, comma-separated",
        "应为 auto、free、basic、premium、pro，或每秒请求数（0 为不限，否则不小于 0.017，即每分钟一次）；"
        "全部密钥共用一个，或每个密钥各一个，以逗号分隔",
    ),
    "settings.expect.port": ("expected a number from 1 to 65535", "应为 1 到 65535 的数字"),
    "settings.expect.proxy": (
        "expected http:// or https://[user:password@]host[:port], with / : @ % in user and password percent-encoded; "
        "SOCKS is not supported",
        "应为 http:// 或 https://[用户名:密码@]主机[:端口]，用户名和密码中的 / : @ % 须百分号编码；不支持 SOCKS",
    ),
    "settings.expect.share": (
        "expected which share of how many, such as 1/3, of at most {most_shares}",
        "应为总份数中的第几份，如 1/3，最多 {most_shares} 份",
    ),
    "settings.expect.stream_url": (
        "expected a ws:// or wss:// URL without user, query or fragment",
        "应为 ws:// 或 wss:// 开头的 URL，不带用户名、查询参数和片段",
    ),
    "settings.expect.tls": (
        "expected 0 (http, ws) or 1 (https, wss)",
        "应为 0（http、ws）或 1（https、wss）",
    ),
    "settings.expect.url": ("expected an http:// or https:// URL", "应为 http:// 或 https:// 开头的 URL"),
    "settings.fault": ("{name}={shown} ({where}): {expected}", "{name}={shown}（{where}）：{expected}"),
    "settings.forbidden_file": (
        "{path} is there but may not be read by this user; left out",
        "{path} 存在，但当前用户无权读取，已忽略",
    ),
    "settings.hiding": (
        "{names}: the environment's is used here; {unit} does not see it and has another, or none",
        "{names}：此处用的是环境变量的值；{unit} 看不到它，用的是另一个值，或未设置",
    ),
    "settings.inline_comment": (
        "{path}, line {line}: to systemd the comment is a part of {name}; put it on a line of its own",
        "{path} 第 {line} 行：systemd 会把注释当作 {name} 的一部分；请让注释单独成行",
    ),
    "settings.may_not_read": ("this user may not read it", "当前用户无权读取"),
    "settings.may_not_write": ("this user may not write it", "当前用户无权写入"),
    "settings.misspelled": (
        "{where}: {name} is no setting and has no effect; did you mean {near}?",
        "{where}：{name} 不是有效的设置，不起作用；是不是 {near}？",
    ),
    "settings.no_assignment": (
        "{path}, line {line}: expected NAME=value (not shown: it may hold a secret)",
        "{path} 第 {line} 行：应为 NAME=value（可能含有机密，故不显示原文）",
    ),
    "settings.no_codes": (
        "COLLECT_CODES is not set, and {names} would collect nothing: {expected}",
        "未设置 COLLECT_CODES，{names} 没有代码可采集：{expected}",
    ),
    "settings.no_key": (
        "INFOWAY_API_KEY is not set: set it (environment or stockrt.env), or try --demo, which needs none",
        "未设置 INFOWAY_API_KEY：请在环境变量或 stockrt.env 中设置，或用无需密钥的 --demo 试用",
    ),
    "settings.no_platform": (
        "{names} not set: the daemon needs SERVER_IP and SERVER_PORT of the dispatch platform; without a platform "
        "use --once --codes …, or let it collect by itself: COLLECT=stream or COLLECT_EVERY, and COLLECT_CODES",
        "未设置 {names}：守护进程需要调度平台的 SERVER_IP 和 SERVER_PORT；没有平台时请用 --once --codes …，"
        "或让它自行采集：设置 COLLECT=stream 或 COLLECT_EVERY，以及 COLLECT_CODES",
    ),
    "settings.option": ("MONGODB_HOST, option {option}: {words}", "MONGODB_HOST 的选项 {option}：{words}"),
    "settings.options": (
        "MONGODB_HOST, its options together: {words}",
        "MONGODB_HOST 的选项组合有误：{words}",
    ),
    "settings.other_file": (
        "{path} is left out: the settings are those of {unit}; --env-file names another file",
        "已忽略 {path}：此处用的是 {unit} 的设置；可用 --env-file 指定其他文件",
    ),
    "settings.plans_and_keys": (
        "INFOWAY_PLAN names {plans} plans for {keys} keys: expected one for all or one for each",
        "INFOWAY_PLAN 有 {plans} 个套餐，密钥有 {keys} 个：应为全部密钥共用一个，或每个密钥各一个",
    ),
    "settings.same_name": (
        "{name}={value!r}: expected another name than {other} has",
        "{name}={value!r}：不能与 {other} 同名",
    ),
    "settings.sets_nothing": ("{path} (sets nothing)", "{path}（未设置任何项）"),
    "settings.socks": ("{name}={shown}: {expected}", "{name}={shown}：{expected}"),
    "settings.systemd_reads_otherwise": (
        "{path}, line {line}: systemd would read {name} otherwise; put the value between double quotes, with \\ before "
        'each " and \\ in it, and nothing behind it',
        '{path} 第 {line} 行：systemd 读到的 {name} 会是另一个值；请把值放在双引号内，其中的 " 和 \\ 前各加一个 \\，'
        "引号之后不写任何内容",
    ),
    "settings.two_ways": (
        "COLLECT and COLLECT_EVERY are both set: choose one, COLLECT=stream for every trade (what the key's plan has "
        "no room for is polled by itself), or COLLECT_EVERY for the latest trade every so many seconds",
        "COLLECT 和 COLLECT_EVERY 只能设置一个：要逐笔成交请用 COLLECT=stream（超出密钥套餐的代码会自动改为轮询），"
        "每隔若干秒取一次最新成交请用 COLLECT_EVERY",
    ),
    "settings.unit_environment": ("environment, which {unit} sets", "由 {unit} 设置的环境变量"),
    "settings.unknown_option": ("MongoDB has no such option", "MongoDB 没有这个选项"),
    "settings.unknown_option_near": (
        "MongoDB has no such option; did you mean {near}?",
        "MongoDB 没有这个选项；是不是 {near}？",
    ),
    "settings.unreadable": (
        "{path}: cannot be read: {why}; --env-file names another file",
        "无法读取 {path}：{why}；可用 --env-file 指定其他文件",
    ),
    "settings.unreadable_credential": (
        "{name}: the credential {path} cannot be read: {why}",
        "{name}：无法读取凭据 {path}：{why}",
    ),
    "settings.unreadable_file": ("the file cannot be read: {why}", "无法读取该文件：{why}"),
    "settings.unreadable_handed_over": (
        "{path}: cannot be read: {why}; is RUNTIME_DIRECTORY right?",
        "无法读取 {path}：{why}；请检查 RUNTIME_DIRECTORY 是否正确",
    ),
    "settings.unseen_credential": (
        "{unit} has a credential {name} that cannot be seen by hand",
        "{unit} 的凭据 {name} 在手动执行命令时无法看到",
    ),
    "settings.unusable_path": ("{name}: {path} cannot be used: {why}", "{name}：无法使用 {path}：{why}"),
    "settings.watch_needs_mongodb": (
        "{what} without MONGODB_HOST: the watch list is a collection of MongoDB; set MONGODB_HOST, or name the codes, "
        "or @ and a file of them",
        "{what} 需要 MONGODB_HOST：自选列表是 MongoDB 的一个集合；请设置 MONGODB_HOST，或直接写代码，"
        "或写 @ 加代码文件的文件名",
    ),
}

# ------------------------------------------------------------------------------------------------------
# Of the room Instruments
# ------------------------------------------------------------------------------------------------------

TEMPLATES |= {
    "instruments.alphabet": (
        "characters that no code has; expected letters, digits and dots such as AAPL.US",
        "含有代码中不会出现的字符；应由字母、数字和点组成，如 AAPL.US",
    ),
    "instruments.beijing": (
        "of the Beijing exchange, which Infoway does not carry",
        "属于北京证券交易所，Infoway 没有其行情",
    ),
    "instruments.bo": (
        "{name} is Bombay, whose prices Infoway's .IN is not said to have; if the share will do: RELIANCE.IN",
        "{name} 是孟买交易所，Infoway 未说明 .IN 含其价格；如果只要这只股票的价格，可写 RELIANCE.IN",
    ),
    "instruments.bse": (
        "{name} is Bombay or Beijing, neither known at Infoway; India's codes are such as RELIANCE.IN",
        "{name} 可指孟买或北京的交易所，两者 Infoway 都没有；印度的代码形如 RELIANCE.IN",
    ),
    "instruments.coin_alone": (
        "a coin without what it is quoted in",
        "只有币种，未写计价货币",
    ),
    "instruments.did_you_mean": ("{why}: did you mean {codes}?", "{why}：是不是 {codes}？"),
    "instruments.empty": ("an empty code; expected one such as AAPL.US", "代码为空；应为代码，如 AAPL.US"),
    "instruments.expected_code": ("{why}: expected a code such as AAPL.US", "{why}：应为代码，如 AAPL.US"),
    "instruments.expected_digits": (
        "{why}: expected six digits such as 600519",
        "{why}：应为六位数字，如 600519",
    ),
    "instruments.hong_kong": (
        "{symbol}.HK: expected one to five digits such as 00700.HK",
        "{symbol}.HK：应为一到五位数字，如 00700.HK",
    ),
    "instruments.index_alone": ("an index without its exchange", "指数未写交易所"),
    "instruments.mainland": (
        "expected six digits such as {example}",
        "应为六位数字，如 {example}",
    ),
    "instruments.no_exchange": ("no exchange given", "未写交易所"),
    "instruments.no_number": (
        "no code: {raw}; expected a whole number or a text such as 600519.SH",
        "不是代码：{raw}；应为整数或文本，如 600519.SH",
    ),
    "instruments.no_text": (
        "no code: {raw}; expected a text such as AAPL.US",
        "不是代码：{raw}；应为文本，如 AAPL.US",
    ),
    "instruments.not_an_exchange": (
        "unknown exchange .{suffix}: expected one of {names}",
        "未知的交易所 .{suffix}，应为 {names} 之一",
    ),
    "instruments.not_of_product": (
        "{venue}: expected an instrument of {product}, such as {example}",
        "{venue}：应为产品 {product} 中的品种，如 {example}",
    ),
    "instruments.not_of_venue": (
        "{venue}: expected a code of that exchange, such as {example}",
        "{venue}：应为该交易所的代码，如 {example}",
    ),
    "instruments.only_suffix": (
        "nothing before .{suffix}; expected a code such as {example}",
        ".{suffix} 之前为空；应为代码，如 {example}",
    ),
    "instruments.other_product": (
        "{code} is asked at {product}, not at {other}",
        "{code} 属于产品 {product}，不属于 {other}",
    ),
    "instruments.perhaps_a_name": (
        "no code but perhaps a name; expected a code such as 600519.SH, or --symbols NAME to look it up",
        "不是代码，可能是名称；应为代码，如 600519.SH，名称可用 --symbols 查找",
    ),
    "instruments.shared_name": ("two instruments are called so", "有两个品种用这个代码"),
    "instruments.too_long": (
        "{n} characters; a code has at most {most}",
        "共 {n} 个字符；代码最多 {most} 个字符",
    ),
    "instruments.tse": (
        "{name} is Tokyo, Taiwan or Toronto: expected a suffix, such as 7203.JP or 2330.TW",
        "{name} 可指东京、台湾或多伦多的交易所：请写后缀，如 7203.JP 或 2330.TW",
    ),
    "instruments.unknown_exchange": ("unknown exchange .{suffix}", "未知的交易所 .{suffix}"),
    "instruments.unknown_form": (
        "unknown form {code}: expected a code such as {example}",
        "无法识别 {code}：应为代码，如 {example}",
    ),
    "instruments.unknown_venue": (
        "unknown before the colon; expected an exchange or a product: {products}",
        "无法识别冒号前的部分；应为交易所或产品：{products}",
    ),
    "instruments.yahoo": (
        "expected a pair such as USDCNY or a code such as AAPL.US",
        "应为货币对（如 USDCNY）或代码（如 AAPL.US）",
    ),
    "instruments.yahoo_index": (
        "Yahoo's name of an index, Infoway's are such as .DJI.US or US500",
        "这是 Yahoo 的指数代码，Infoway 的形如 .DJI.US 或 US500",
    ),
}

# ------------------------------------------------------------------------------------------------------
# Of the room Events
# ------------------------------------------------------------------------------------------------------

TEMPLATES |= {
    "events.begins": ("begins", "正在启动"),
    "events.close_lost": ("the closing snapshot is not kept: {why}", "收盘快照未保存：{why}"),
    "events.code": ("{code} ({why})", "{code}（{why}）"),
    "events.connected": ("{up} of {connections}", "{connections}中 {up} 个已连上"),
    "events.counts": (
        "total {total}, stored {stored}, already known {known}, failed {failed} ({took:.1f} s)",
        "共 {total}，已入库 {stored}，已有 {known}，失败 {failed}（{took:.1f} 秒）",
    ),
    "events.delays": (
        "stored after {p50:.0f} ms (p99 {p99:.0f} ms)",
        "入库延迟 {p50:.0f} 毫秒（p99 {p99:.0f} 毫秒）",
    ),
    "events.failed": (
        "{failed} of {total} codes failed: {names}",
        "{total} 个代码中 {failed} 个失败：{names}",
    ),
    "events.failed_more": (
        "{failed} of {total} codes failed: {names} and {more} more",
        "{total} 个代码中 {failed} 个失败：{names}，另有 {more} 个",
    ),
    "events.gaps": ("{gaps} today", "今日 {gaps}"),
    "events.interrupted": (
        "{counts}, interrupted: {left} not asked",
        "{counts}，已中断：{left} 个代码未请求",
    ),
    "events.missed": ("{beats} missed", "错过 {beats}"),
    "events.polled": ("{codes} polled", "轮询 {codes}"),
    "events.queued": ("{trades} kept on this machine, {why}", "{trades}暂存于本机，{why}"),
    "events.rate": ("{rate} trades/s", "每秒 {rate} 笔成交"),
    "events.read_as": ("read as: {codes}", "实际查询：{codes}"),
    "events.stale": (
        "{stale} of {codes}: no trade since {since}, though the market was open",
        "{codes}中有 {stale} 个自 {since} 起没有新成交，期间市场曾开市",
    ),
    "events.subscribed": ("{codes} subscribed", "已订阅 {codes}"),
}

# ------------------------------------------------------------------------------------------------------
# Of the room HTTP
# ------------------------------------------------------------------------------------------------------

TEMPLATES |= {
    "http.announced": (
        "HTTP {status}, which announces an answer instead of giving it",
        "HTTP {status} 只是预告，没有给出真正的应答",
    ),
    "http.broke": ("the connection broke", "连接异常中断"),
    "http.closed": ("the connection was closed without an answer", "对方未应答就关闭了连接"),
    "http.cut": ("the connection was cut", "对方断开了连接"),
    "http.deep_json": (
        "{size} bytes of JSON nested deeper than {levels} levels",
        "{size} 字节的 JSON，嵌套超过 {levels} 层",
    ),
    "http.key_log": ("SSLKEYLOGFILE={path} cannot be written: {why}", "无法写入 SSLKEYLOGFILE={path}：{why}"),
    "http.large": ("an answer of more than {size} MiB", "应答超过 {size} MiB"),
    "http.late": ("no answer in time", "超时未应答"),
    "http.no_address": ("its name cannot be resolved ({why})", "无法解析其主机名（{why}）"),
    "http.no_http": ("its answer is not HTTP ({why})", "应答不是 HTTP（{why}）"),
    "http.no_json": ("{size} bytes that are not {whose} JSON", "{size} 字节的应答不是{whose} JSON"),
    "http.not_whole": (
        "no whole answer within {seconds:.0f} s",
        "{seconds:.0f} 秒内没有收到完整的应答",
    ),
    "http.proxy_answers": (
        "the proxy {proxy} answers HTTP {status}; see {setting}",
        "代理 {proxy} 应答 HTTP {status}；请检查 {setting}",
    ),
    "http.proxy_asks_user": (
        "the proxy {proxy} asks for a user and a password (HTTP 407); expected "
        "{setting}={scheme}://user:password@host:port",
        "代理 {proxy} 要求用户名和密码（HTTP 407）；应为 {setting}={scheme}://用户名:密码@主机:端口",
    ),
    "http.proxy_refuses_user": (
        "the proxy {proxy} does not take this user and password (HTTP 407); see {setting}",
        "代理 {proxy} 不接受此用户名和密码（HTTP 407）；请检查 {setting}",
    ),
    "http.refused": ("connection refused", "连接被拒绝"),
    "http.short": ("the answer was cut short", "应答不完整"),
    "http.through_proxy": (
        "through the proxy {proxy}: {fault}; see {setting}",
        "经代理 {proxy}：{fault}；请检查 {setting}",
    ),
    "http.tls": ("TLS fails ({why})", "TLS 失败（{why}）"),
    "http.untrusted": ("its certificate is not trusted ({why})", "证书不受信任（{why}）"),
}

# ------------------------------------------------------------------------------------------------------
# Of the room WebSocket
# ------------------------------------------------------------------------------------------------------

# Whoever tells of an end says that it is a connection's: `connection lost: …`, `连接中断：…`.
TEMPLATES |= {
    "websocket.closed": ("closed by the server", "由服务器关闭"),
    "websocket.closed_because": (
        "closed by the server (code {code} {why})",
        "由服务器关闭（关闭码 {code}，{why}）",
    ),
    "websocket.closed_with_code": ("closed by the server (code {code})", "由服务器关闭（关闭码 {code}）"),
    "websocket.large_frame": (
        "a frame of {size} bytes; at most {most} are taken",
        "收到 {size} 字节的帧，超过上限 {most} 字节",
    ),
    "websocket.large_handshake": ("an answer of more than {size} bytes", "应答超过 {size} 字节"),
    "websocket.lost": ("lost: {why}", "{why}"),
    "websocket.not_connected": ("cannot connect: {why}", "无法连接：{why}"),
    "websocket.not_sent": ("sending failed: {why}", "发送失败：{why}"),
    "websocket.refused": (
        "the handshake was refused with HTTP {status}",
        "握手被拒绝（HTTP {status}）",
    ),
}

# ------------------------------------------------------------------------------------------------------
# Of the room Local files
# ------------------------------------------------------------------------------------------------------

TEMPLATES |= {
    "files.beheaded": ("its beginning is cut off", "文件开头缺失"),
    "files.closed": ("the local file {path} is closed already", "本地文件 {path} 已经关闭"),
    "files.damaged": (
        "the local file {path} is damaged: {damage}; the next start sets it aside and rescues what can be read",
        "本地文件 {path} 已损坏：{damage}；下次启动时会将其移开保留，并抢救能读出的内容",
    ),
    "files.damaged_and_open": (
        "the local file {path} is damaged ({damage}), and another process has it open: stop that one, and the next "
        "start rescues what can be read",
        "本地文件 {path} 已损坏（{damage}），且另一个进程正打开着它：请停止那个进程，下次启动时会抢救能读出的内容",
    ),
    "files.damaged_header": ("its header is damaged: format {found}", "文件头损坏：格式 {found}"),
    "files.disk_full": ("the disk is full ({why})", "磁盘已满（{why}）"),
    "files.disk_unseen": ("the disk of {path} cannot be looked at", "无法查看 {path} 所在的磁盘"),
    "files.fails": (
        "the local file {path} fails: {why}; see STATE_DIRECTORY",
        "本地文件 {path} 出错：{why}；请检查 STATE_DIRECTORY",
    ),
    "files.forbidden": ("this user may not read and write it", "当前用户无权读写"),
    "files.lock_not_opened": ("the lock {path} cannot be opened", "无法打开锁文件 {path}"),
    "files.locked": (
        "the local file {path} is locked by another program; try again later",
        "本地文件 {path} 正被其他程序锁定；请稍后再试",
    ),
    "files.marked": ("a mark says so", "有损坏标记"),
    "files.newer": (
        "{path} was written by a newer stockrt (format {found}, this one knows {known}); use that one, or another "
        "STATE_DIRECTORY",
        "{path} 由更新版本的 stockrt 写成（格式 {found}，本版本只认到 {known}）；请用那个版本，或另设 STATE_DIRECTORY",
    ),
    "files.newer_or_damaged": (
        "{newer}; where there never was a newer one its header is damaged: make an empty file {mark}, and the next "
        "start rescues what can be read",
        "{newer}；如果从未用过更新的版本，则是文件头已损坏：请新建空文件 {mark}，下次启动时会抢救能读出的内容",
    ),
    "files.no_room": (
        "the disk of {path} would have less than {kept:.0%} free; see STATE_DIRECTORY",
        "{path} 所在磁盘的剩余空间将不足 {kept:.0%}；请检查 STATE_DIRECTORY",
    ),
    "files.not_opened": ("the local file {path} cannot be opened", "无法打开本地文件 {path}"),
    "files.rescue_interrupted": ("its rescue was interrupted", "上次抢救已中断"),
    "files.set_aside": (
        "the local file {path} cannot be used: {damage}; it is set aside as {aside}, {rows} rows of it are rescued",
        "无法使用本地文件 {path}：{damage}；已移开保留为 {aside}，并抢救出 {rows} 行",
    ),
    "files.set_aside_again": (
        "the local file {path} cannot be used: {damage}; it is set aside as {aside}, it had been rescued already",
        "无法使用本地文件 {path}：{damage}；已移开保留为 {aside}，此前已抢救过",
    ),
    "files.taken_away": (
        "the local file {path} was taken away while it was in use",
        "本地文件 {path} 在使用中被移走",
    ),
    "files.torn_log": (
        "its log is damaged, and transactions lie behind the damage",
        "预写日志（WAL）损坏，损坏处之后还有事务",
    ),
    "files.unseen": ("the local file {path} cannot be looked at", "无法查看本地文件 {path}"),
    "files.unusable": (
        "the local file {path} cannot be used: {damage}; see STATE_DIRECTORY",
        "无法使用本地文件 {path}：{damage}；请检查 STATE_DIRECTORY",
    ),
}

# ------------------------------------------------------------------------------------------------------
# Of the room Quota
# ------------------------------------------------------------------------------------------------------

TEMPLATES |= {
    "quota.away": ("the shared counts of API keys are away", "API 密钥的共用计数暂不可用"),
    "quota.back_at": ("{why}, back at {back}", "{why}，{back} 恢复"),
    "quota.bars": ("{product} bars", "{product} 日线"),
    "quota.busy": ("the shared count is busy", "共用计数正忙"),
    "quota.day_used_up": ("the day's {n} requests are used up", "当日 {n} 次请求的额度已用完"),
    "quota.key": ("key {key}: {why}", "密钥 {key}：{why}"),
    "quota.minute_used_up": ("the minute's {n} requests are used up", "本分钟 {n} 次请求的额度已用完"),
    "quota.mongo_away": ("MongoDB is away ({error})", "MongoDB 不可用（{error}）"),
    "quota.no_key": ("no API key: set INFOWAY_API_KEY", "没有 API 密钥：请设置 INFOWAY_API_KEY"),
    "quota.no_right": (
        "this user may not write to {place}; see MONGODB_LICENSE_COLLECTION_NAME",
        "当前用户无权写入 {place}；请检查 MONGODB_LICENSE_COLLECTION_NAME",
    ),
    "quota.none_serves": (
        "no API key can serve {service} ({reasons})",
        "没有 API 密钥可用于 {service}（{reasons}）",
    ),
}

# ------------------------------------------------------------------------------------------------------
# Of the room Infoway
# ------------------------------------------------------------------------------------------------------

TEMPLATES |= {
    "infoway.ahead": ("t {t}: {at} is more than a day ahead", "t {t}：{at} 比当前时间晚一天以上"),
    "infoway.ambiguous": ("does not tell what is meant", "未写明是哪个品种"),
    "infoway.asked_in_vain": ("it was asked for a moment ago, in vain", "刚才查询过，没有结果"),
    "infoway.asks_to_wait": ("{said}, asks to wait {s:.0f} s", "{said}，要求等待 {s:.0f} 秒"),
    "infoway.clock_ahead": (
        "this machine is {s:.0f} s ahead of the API; mend its clock (NTP, timedatectl)",
        "本机比 API 快 {s:.0f} 秒；请校准时钟（NTP、timedatectl）",
    ),
    "infoway.clock_behind": (
        "this machine is {s:.0f} s behind the API; mend its clock (NTP, timedatectl)",
        "本机比 API 慢 {s:.0f} 秒；请校准时钟（NTP、timedatectl）",
    ),
    "infoway.gateway": (
        "{said}, a refusal of the gateway: the key, the region or its risk control",
        "{said}，被网关拒绝：原因可能是密钥、地区或风控",
    ),
    "infoway.hangs": (
        "no whole answer within {s:.0f} s, and the connection hangs",
        "{s:.0f} 秒内未收到完整应答，连接无响应",
    ),
    "infoway.http": ("HTTP {status}", "HTTP {status}"),
    "infoway.http_says": ("HTTP {status}: {text}", "HTTP {status}：{text}"),
    "infoway.its": ("the API's", "行情 API 的"),
    "infoway.listed": (
        "the API lists it as {name}, but has no trade of it, or not for this key's plan",
        "API 的品种列表中有该代码（{name}），但没有其成交，或此密钥的套餐不包含",
    ),
    "infoway.no_bar": (
        "prices {prices} and volume {volume}: no bar has them",
        "价格 {prices}，成交量 {volume}：日线不会有这样的数值",
    ),
    "infoway.no_code": ("field s: {shown} in place of a code", "字段 s：{shown}，应为代码"),
    "infoway.no_decimal": (
        "field {name}: {shown} in place of a decimal number",
        "字段 {name}：{shown}，应为十进制数",
    ),
    "infoway.no_direction": (
        "field td: {shown} in place of a direction (0, 1, 2)",
        "字段 td：{shown}，应为方向（0、1、2）",
    ),
    "infoway.no_list": (
        "the API's answer says success but holds no list `data`",
        "API 的应答称成功，却没有列表 `data`",
    ),
    "infoway.no_milliseconds": (
        "field t: {shown} in place of epoch milliseconds",
        "字段 t：{shown}，应为 Unix 毫秒时间戳",
    ),
    "infoway.no_seconds": (
        "field t: {shown} in place of epoch seconds",
        "字段 t：{shown}，应为 Unix 秒级时间戳",
    ),
    "infoway.no_trade": ("no trade: {why}", "不是成交：{why}"),
    "infoway.not_asked": ("{code} was not asked for", "未请求过 {code}"),
    "infoway.not_json": ("{said}, {body}", "{said}，{body}"),
    "infoway.not_the_api": (
        "{said}, not in the API's words: as from a gateway or a login page on the way",
        "{said}，不像 API 的应答，像是来自途中的网关或登录页",
    ),
    "infoway.nothing": ("nothing", "缺失"),
    "infoway.nothing_more": ("nothing more", "无说明"),
    "infoway.plan_ended": ("its plan ended at {when}", "套餐已于 {when} 到期"),
    "infoway.plan_ends": ("its plan ends at {when}, in {left}", "套餐将于 {when} 到期，还剩 {left}"),
    "infoway.price_below_zero": (
        "p {p}: only energy at common has prices below zero",
        "p {p}：只有 common 中的能源价格可以为负",
    ),
    "infoway.price_zero": ("p {p}: it has not traded, or is suspended", "p {p}：尚无成交，或已停牌"),
    "infoway.proposal": ("{code} ({name})", "{code}（{name}）"),
    "infoway.redirection": ("{said}, a redirection, which is not followed", "{said}，是重定向，不予跟随"),
    "infoway.says": ("the API says {number}: {text}", "API 返回 {number}：{text}"),
    "infoway.sent_no_bar": ("the API sent {record} in place of a bar", "API 发来 {record}，应为日线"),
    "infoway.sent_no_trade": ("the API sent {record} in place of a trade", "API 发来 {record}，应为成交"),
    "infoway.spared": (
        "not asked for, as the request before was refused again: {why}",
        "没有请求，因为前一个请求再次被拒绝：{why}",
    ),
    "infoway.tries": ("{said}, {n} tries", "{said}，共尝试 {n} 次"),
    "infoway.unknown": (
        "unknown to the API, or not in this key's plan",
        "API 不认识该代码，或此密钥的套餐不包含",
    ),
    "infoway.unlisted": (
        "unknown to the API: in none of its lists",
        "API 不认识该代码：所有品种列表中都没有",
    ),
    "infoway.unnamed": ("unnamed", "未命名"),
    "infoway.volume_below_zero": ("v {v}: a volume is not below zero", "v {v}：成交量不会为负"),
}

# ------------------------------------------------------------------------------------------------------
# Of the room Stream
# ------------------------------------------------------------------------------------------------------

TEMPLATES |= {
    "stream.bad_codes": ("codes of a form that it does not take", "代码格式不被接受"),
    "stream.bad_key": ("the key is not valid", "密钥无效"),
    "stream.bad_key_or_plan": (
        "the key is not valid, or its plan lacks this product",
        "密钥无效，或其套餐不含该产品",
    ),
    "stream.banned": ("the key is banned", "密钥已被封禁"),
    "stream.connection": ("connection {why}", "连接中断：{why}"),
    "stream.disabled": ("the key is disabled", "密钥已被禁用"),
    "stream.gateway": (
        "a refusal of the gateway: the key, the region or its risk control",
        "被网关拒绝：原因可能是密钥、地区或风控",
    ),
    "stream.its": ("the stream's", "推送流的"),
    "stream.many_codes": ("too many codes on all connections of the key", "该密钥各连接的代码总数过多"),
    "stream.many_connections": ("too many connections of the key", "该密钥的连接数过多"),
    "stream.many_frames": ("more than 60 frames a minute", "每分钟超过 60 帧"),
    "stream.many_on_one": ("too many codes on one connection", "单个连接上的代码过多"),
    "stream.many_or_old": (
        "too many connections of the key, or one that just ended still counts",
        "该密钥的连接数过多，或刚断开的连接仍被计入",
    ),
    "stream.no_ack": (
        "no ack within {seconds} s to {tries} frames",
        "发出 {tries} 帧，{seconds} 秒内未收到确认",
    ),
    "stream.no_data": ("a push without its data", "推送中没有数据"),
    "stream.no_heartbeat": ("a heartbeat did not reach it", "推送流没有收到心跳"),
    "stream.not_asked_for": ("{code} was not asked for", "推送了未订阅的代码 {code}"),
    "stream.not_free": ("not in the free plan", "不在免费套餐内"),
    "stream.not_in_plan": ("the key's plan lacks this product", "密钥的套餐不含该产品"),
    "stream.not_of_the_api": (
        "{words}, not in the API's words: as from a gateway or a login page on the way",
        "{words}，不像 API 的应答，像是来自途中的网关或登录页",
    ),
    "stream.nothing_more": ("nothing more", "无其他说明"),
    "stream.other_frame": ("a frame of kind {code}", "类型为 {code} 的帧"),
    "stream.other_product": ("codes of another product", "代码属于其他产品"),
    "stream.plan_ended": ("the key's plan has ended", "密钥的套餐已到期"),
    "stream.says": ("the stream says: {words}", "推送流返回：{words}"),
    "stream.says_number": ("the stream says {number}: {words}", "推送流返回 {number}：{words}"),
}

# ------------------------------------------------------------------------------------------------------
# Of the room Stores
# ------------------------------------------------------------------------------------------------------

TEMPLATES |= {
    "stores.bad_uri": ("MONGODB_HOST={uri!r}: {why}", "MONGODB_HOST={uri!r}：{why}"),
    "stores.but": ("but {other}", "但{other}"),
    "stores.closes_wait": (
        "closes are still to be made of older trades",
        "较早的成交还要用来生成收盘价",
    ),
    "stores.drop_other": ("{other}: drop that one first", "{other}；请先删除该索引"),
    "stores.fails": ("MongoDB at {place} fails: {why}", "MongoDB（{place}）出错：{why}"),
    "stores.file_good": ("{path} can be written, {trades} in it", "{path} 可写入，内有 {trades}"),
    "stores.for_ever_soon": (
        "KEEP_DAYS is not set any more: with the next run trades are kept for ever",
        "已取消 KEEP_DAYS：自下次运行起成交永久保留",
    ),
    "stores.gap_deaf": ("nothing was pushed although there were trades", "有成交，但没有推送"),
    "stores.gap_ended": ("stockrt ended without notice", "stockrt 意外退出"),
    "stores.gap_moved": ("moved to another connection", "转移到另一个连接"),
    "stores.gap_stopped": ("stockrt was stopped", "stockrt 已停止"),
    "stores.holds_many": (
        "{name} holds too many documents to be counted quickly, which --retain removes",
        "{name} 中超过该期限的文档太多，无法很快数清，可用 --retain 删除",
    ),
    "stores.holds_older": (
        "{name} holds {documents} older than that, which --retain removes",
        "{name} 中有 {documents}超过该期限，可用 --retain 删除",
    ),
    "stores.index_there": ("index on {name} is there", "{name} 的索引已建立"),
    "stores.index_to_come": (
        "index on {name} is made with the next trades",
        "{name} 的索引将在下次写入成交时建立",
    ),
    "stores.kept": ("trades kept for {span}", "成交保留 {span}"),
    "stores.kept_for_ever": ("trades kept for ever", "成交永久保留"),
    "stores.kept_not_yet": ("KEEP_DAYS={days} has no effect yet: {why}", "KEEP_DAYS={days} 尚未生效：{why}"),
    "stores.kept_soon": ("KEEP_DAYS={days} holds with the next run", "KEEP_DAYS={days} 自下次运行起生效"),
    "stores.kept_unseen": (
        "who keeps trades for how long cannot be seen ({why})",
        "无法查看成交的保留期限（{why}）",
    ),
    "stores.local_refused": ("the local store refused it: {why}", "被本地存储拒绝：{why}"),
    "stores.mongodb_good": (
        "{place}: database {database} can be written, {index}",
        "{place}：数据库 {database} 可写入，{index}",
    ),
    "stores.odd_numbers": (
        "its numbers do not fit MONGODB_NUMERIC_TYPE={type}: {why}",
        "数值不适合 MONGODB_NUMERIC_TYPE={type}：{why}",
    ),
    "stores.oldest": ("the oldest of {created}", "最早的一笔存于 {created}"),
    "stores.other_in_place": (
        "an index of others, {name} on {field}, is where that of KEEP_DAYS would be",
        "已有其他程序的索引 {name}（字段 {field}），占用了 KEEP_DAYS 索引的位置",
    ),
    "stores.other_removes": (
        "an index of others, {name} on {field}, removes documents after {span}",
        "其他程序的索引 {name}（字段 {field}）会在 {span}后删除文档",
    ),
    "stores.refused": ("MongoDB refused it: {why}", "被 MongoDB 拒绝：{why}"),
    "stores.time_series": (
        "{name} is a time-series collection, but must be a plain collection, see {setting}",
        "{name} 是时序集合，应为普通集合；请检查 {setting}",
    ),
    "stores.ttl_to_come": ("its index is made with the next run", "其索引将在下次运行时建立"),
    "stores.unconfirmed": (
        "it did not confirm the write with its write concern: {why}",
        "未按写关注确认写入：{why}",
    ),
    "stores.validators": (
        "the validators of {realtime} and {close}",
        "{realtime} 和 {close} 的校验规则",
    ),
    "stores.view": (
        "{name} is a view, but must be a plain collection, see {setting}",
        "{name} 是视图，应为普通集合；请检查 {setting}",
    ),
}

# ------------------------------------------------------------------------------------------------------
# Of the room Closing prices
# ------------------------------------------------------------------------------------------------------

TEMPLATES |= {
    "closes.no_bar": ("the API has no daily bar of it", "API 没有该代码的日线"),
    "closes.no_bars": ("the API has no bar of theirs", "API 没有这些代码的日线"),
    "closes.no_boundary": (
        "the API's daily bars of it have no documented boundary",
        "API 未说明该代码日线的时间范围",
    ),
}

# ------------------------------------------------------------------------------------------------------
# Of the room Delivery
# ------------------------------------------------------------------------------------------------------

TEMPLATES |= {
    "delivery.behind": ("{others} for MongoDB before them", "前面{others}写入 MongoDB"),
    "delivery.full": (
        "{path} has come to its limit of {limit} MB; see SPOOL_MAX_MB",
        "{path} 已达上限 {limit} MB；请检查 SPOOL_MAX_MB",
    ),
    "delivery.kept_here": ("{trades} kept here for it", "另有 {trades}暂存于本机，等待写入"),
    "delivery.no_thread": ("nothing moves it: {why}", "无法启动转存线程：{why}"),
    "delivery.no_writes": (
        "MongoDB takes no writes since {since} ({why})",
        "MongoDB 自 {since} 起无法写入（{why}）",
    ),
    "delivery.not_kept": ("{because}, and {why}", "{because}；且无法暂存：{why}"),
    "delivery.not_moved": ("what waits cannot be moved to it: {why}", "暂存的数据无法写入 MongoDB：{why}"),
    "delivery.other_id": ("its fields do not make its _id", "其字段与 _id 不符"),
    "delivery.out_of_order": ("its rows are out of order", "其中的行顺序错乱"),
    "delivery.silent": (
        "MongoDB did not answer within {seconds:.0f} s",
        "MongoDB 在 {seconds:.0f} 秒内没有应答",
    ),
    "delivery.unreachable": ("MongoDB unreachable since {since}", "MongoDB 自 {since} 起无法连接"),
}

# ------------------------------------------------------------------------------------------------------
# Of the room Run
# ------------------------------------------------------------------------------------------------------

TEMPLATES |= {
    "run.accepted": ("accepted by {place}", "{place} 接受该密钥"),
    "run.accepted_without_stocks": (
        "accepted by {place}, but not for stocks: {why}",
        "{place} 接受该密钥，但不能用于股票：{why}",
    ),
    "run.api_key": ("API key {key}", "API 密钥 {key}"),
    "run.asked_as": ("{words} ({asked} -> {codes})", "{words}（实际查询：{asked} -> {codes}）"),
    "run.clock": ("clock", "时钟"),
    "run.limits": (
        "{plan}: {second:g} requests a second, {minute} a minute",
        "{plan}（每秒 {second:g} 次请求，每分钟 {minute} 次）",
    ),
    "run.limits_of_a_day": (
        "{plan}: {second:g} requests a second, {minute} a minute, {day} a day",
        "{plan}（每秒 {second:g} 次请求，每分钟 {minute} 次，每天 {day} 次）",
    ),
    "run.local_store": ("local store", "本地存储"),
    "run.names_no_plan": ("the answer names none", "应答中没有套餐信息"),
    "run.no_limit": ("{plan}: no limit", "{plan}（不限频）"),
    "run.no_plan": ("its plan cannot be had: {why}", "无法获知其套餐：{why}"),
    "run.no_plan_but_free": (
        "its plan cannot be had: {why}: Free's limits hold unless INFOWAY_PLAN names it",
        "无法获知其套餐：{why}；除非用 INFOWAY_PLAN 指明，否则按 Free 套餐限频",
    ),
    "run.not_asked_for": ("not asked for: {why}", "未请求：{why}"),
    "run.not_stored": ("fetched, not stored: {why}", "已获取，未入库：{why}"),
    "run.other_plan": (
        "INFOWAY_PLAN differs and is what counts: {limits}",
        "INFOWAY_PLAN 与此不同，以 INFOWAY_PLAN 为准：{limits}",
    ),
    "run.plan": ("plan {limits}", "套餐 {limits}"),
    "run.plan_before": (
        "it has changed; until it is asked for anew, once a day (UTC), what was told before holds: {limits}",
        "套餐已变更；每个 UTC 日查询一次，再次查询前仍按 {limits}",
    ),
    "run.plan_until": ("plan {limits}, until {until}", "套餐 {limits}，有效期至 {until}"),
}

# ------------------------------------------------------------------------------------------------------
# Of the room Collection
# ------------------------------------------------------------------------------------------------------

TEMPLATES |= {
    "collection.another": ("another stockrt collects from the stream", "已有另一个 stockrt 在接收推送流"),
    "collection.empty": (
        "no code in {place}; expected codes such as AAPL.US 600519.SH",
        "{place} 中没有代码；应为 AAPL.US 600519.SH 这样的代码",
    ),
    "collection.many_codes": ("{place} has more than {most} codes", "{place} 中的代码超过 {most} 个"),
    "collection.many_documents": ("{place} has more than {most} documents", "{place} 中的文档超过 {most} 个"),
    "collection.no_codes": (
        'no codes are named: expected code_list, a list such as ["AAPL.US"], or COLLECT_CODES in the settings of this '
        "module, for commands without codes",
        '没有给出代码：应为 code_list，形如 ["AAPL.US"]；不带代码的指令需在本模块的设置中配置 COLLECT_CODES',
    ),
    "collection.no_key": ("for which no key is of use", "没有密钥可用于这些代码"),
    "collection.not_stored": ("{codes} not stored: {why}", "{codes} 未入库：{why}"),
    "collection.over_plans": ("more than the keys' plans allow", "超出各密钥套餐的限额"),
    "collection.refused": ("{codes}, {names}: {why}", "{codes}（{names}）：{why}"),
    "collection.silent": (
        "nothing was pushed for {seconds:.0f} s: subscribed anew",
        "{seconds:.0f} 秒没有收到推送：已重新订阅",
    ),
    "collection.slow_poll": (
        "a poll took {took:.1f} s, longer than one every {every:g} s allows",
        "一次轮询用了 {took:.1f} 秒，超出每 {every:g} 秒一次的间隔",
    ),
    "collection.unread": ("{place} cannot be read: {why}", "无法读取 {place}：{why}"),
    "collection.watch_list": ("COLLECT_CODES: {why}", "COLLECT_CODES：{why}"),
}

# ------------------------------------------------------------------------------------------------------
# Of the room Platform protocol
# ------------------------------------------------------------------------------------------------------

TEMPLATES |= {
    "protocol.empty_list": (
        'code_list is empty: expected codes such as ["AAPL.US"]',
        'code_list 为空：应为 ["AAPL.US"] 这样的代码',
    ),
    "protocol.many_codes": (
        "{codes} codes in one command: at most {most}; split the workflow",
        "一条指令有 {codes} 个代码：最多 {most} 个；请拆分工作流",
    ),
    "protocol.no_codes": (
        'args holds no codes: expected code_list, a list such as ["AAPL.US"]; got {came}',
        'args 中没有代码：应为 code_list，形如 ["AAPL.US"]；收到的是 {came}',
    ),
    "protocol.silent": ("nothing came for {seconds:.0f} s", "{seconds:.0f} 秒没有收到任何数据"),
    "protocol.store_failed": (
        "{reached} of {total} codes stored, then the store failed: {why}",
        "{total} 个代码中 {reached} 个已入库，随后入库失败：{why}",
    ),
    "protocol.stored": ("{reached} of {total} codes stored", "{total} 个代码中 {reached} 个已入库"),
    "protocol.too_deep": (
        "JSON nested deeper than {levels} levels; expected a flat list of codes",
        "JSON 嵌套超过 {levels} 层；应为不嵌套的代码列表",
    ),
    "protocol.too_long": (
        "{what}: {bytes} bytes were too many for the platform",
        "{what}：原有 {bytes} 字节，超出平台的上限",
    ),
    "protocol.without_lists": ("sent without its lists", "发送时略去了明细列表"),
}

# ------------------------------------------------------------------------------------------------------
# Of the room Platform link
# ------------------------------------------------------------------------------------------------------

TEMPLATES |= {
    "link.answers": ("{url} answers", "{url} 有应答"),
    "link.exists": (
        "it has a module of this name, description and program already (3005), whose hash belongs into {file} in "
        "STATE_DIRECTORY; for another module change MODULE_DESCRIPTION and try again",
        "平台上已有名称、描述和程序都相同的模块（3005），请把它的哈希写入 STATE_DIRECTORY 下的 {file}；"
        "如需另建模块，请修改 MODULE_DESCRIPTION 后重试",
    ),
    "link.hash_unread": (
        "the module hash {place} cannot be read: {why}; see {setting}",
        "无法读取模块哈希 {place}：{why}；请检查 {setting}",
    ),
    "link.inner_fault": (
        "HTTP {status}, a fault inside the platform; see its log",
        "HTTP {status}，平台内部错误；请看平台的日志",
    ),
    "link.invalid": (
        "it found the data invalid (3002); see MODULE_NAME and MODULE_DESCRIPTION",
        "平台认为数据无效（3002）；请检查 MODULE_NAME 和 MODULE_DESCRIPTION",
    ),
    "link.its_place": ("its place", "它所在的位置"),
    "link.no_answer": (
        "{why}; is the platform up, and are SERVER_IP, SERVER_PORT and SERVER_TLS right?",
        "{why}；请确认平台在运行，且 SERVER_IP、SERVER_PORT 和 SERVER_TLS 正确",
    ),
    "link.no_hash": (
        "{place} holds no module hash; remove it and run --register",
        "{place} 中没有模块哈希；请删除该文件后运行 --register",
    ),
    "link.no_platform": (
        "{url}/module/online answers HTTP {status} and is no dispatch platform; see SERVER_IP and SERVER_PORT",
        "{url}/module/online 应答 HTTP {status}，不是调度平台；请检查 SERVER_IP 和 SERVER_PORT",
    ),
    "link.not_registered": ("not registered at {url}: {why}", "未能在 {url} 注册：{why}"),
    "link.online": (
        "still counted as online by the server (old session or a second instance); it will let go within 120 s",
        "平台仍认为本模块在线（旧会话尚未结束，或另有一个实例）；旧会话最长 120 秒后失效",
    ),
    "link.platform": ("platform", "平台"),
    "link.platforms": ("the platform's", "平台的"),
    "link.program_unread": ("this program cannot be read", "无法读取本程序"),
    "link.refused": (
        "HTTP {status}: {said}; see SERVER_IP and SERVER_PORT",
        "HTTP {status}：{said}；请检查 SERVER_IP 和 SERVER_PORT",
    ),
    "link.registers": ("not registered yet: the daemon does that", "尚未注册：守护进程启动时自动注册"),
    "link.server_settings": ("SERVER_IP, SERVER_PORT and SERVER_TLS", "SERVER_IP、SERVER_PORT 和 SERVER_TLS"),
    "link.success_without_hash": (
        "it said success but gave no usable hash; ask the platform's operator",
        "平台说注册成功，却没有给出可用的哈希；请联系平台的运维人员",
    ),
    "link.unclear": (
        "refused by the server with HTTP 403, and /module/online does not say why",
        "平台以 HTTP 403 拒绝连接，/module/online 也没有说明原因",
    ),
    "link.unknown": (
        "hash unknown to the server: run --register --force",
        "平台不认识本模块的哈希：请运行 --register --force",
    ),
    "link.unreachable": ("{url} cannot be reached: {why}", "无法连接 {url}：{why}"),
}

# ------------------------------------------------------------------------------------------------------
# Of the room Command journal
# ------------------------------------------------------------------------------------------------------

TEMPLATES |= {
    "journal.lost": ("the command is lost with damage to {path}", "{path} 损坏，该指令已丢失"),
}

# ------------------------------------------------------------------------------------------------------
# Of the room Daemon
# ------------------------------------------------------------------------------------------------------

TEMPLATES |= {
    "daemon.another": ("another stockrt daemon works", "已有另一个 stockrt 守护进程在运行"),
    "daemon.dropped": (
        "{n} could not be delivered within an hour and are dropped",
        "{n} 个结果一小时内未能送达，已放弃",
    ),
    "daemon.interrupted": (
        "interrupted: stockrt was stopped before this was done, {age:.0f} s ago",
        "已中断：指令收到于 {age:.0f} 秒前，未执行完 stockrt 就停止了",
    ),
    "daemon.lock_unseen": ("the lock {path} cannot be looked at", "无法查看锁文件 {path}"),
    "daemon.lost": ("connection {why}", "与平台的连接已断开：{why}"),
    "daemon.not_in_share": (
        "none of the codes of COLLECT_CODES is in the share {number}/{shares}",
        "COLLECT_CODES 中没有代码属于分担份额 {number}/{shares}",
    ),
    "daemon.not_kept": (
        "the answer of execution {number} cannot be kept: {why}",
        "无法保存执行 {number} 的结果：{why}",
    ),
    "daemon.not_on_disk": ("cannot be put on disk: {why}", "无法写入磁盘：{why}"),
    "daemon.not_taken_up": (
        "what waits on this machine cannot be taken up: {why}",
        "无法处理暂存于本机的数据：{why}",
    ),
    "daemon.queue_full": (
        "{most} commands are waiting already; try again later",
        "已有 {most} 条指令在等待；请稍后重试",
    ),
    "daemon.shut_down": (
        "not executed: the platform shut this module down",
        "未执行：平台关闭了本模块",
    ),
    "daemon.slow_disk": (
        "the disk of this module does not keep up; try again later",
        "本模块的磁盘写入跟不上；请稍后重试",
    ),
    "daemon.stopping": (
        "this module is stopping and takes no new command",
        "本模块正在停止，不再接受新指令",
    ),
    "daemon.unread": ("execution {number} cannot be read: {why}", "无法读取执行 {number}：{why}"),
}

# ------------------------------------------------------------------------------------------------------
# Of the room Service manager
# ------------------------------------------------------------------------------------------------------

TEMPLATES |= {
    "service.collecting": ("collecting: {words}", "采集中：{words}"),
    "service.connected": ("connected to {peer}", "已连接 {peer}"),
    "service.connecting": ("connecting to {peer}", "正在连接 {peer}"),
    "service.keys_out": ("{keys}, {out} out", "{keys}，其中 {out} 个已停用"),
    "service.last_execute": (
        "last execute {reached}/{total} in {took_s:.1f} s, {age} ago",
        "最近一次执行：{age}前，完成 {reached}/{total}，用时 {took_s:.1f} 秒",
    ),
    "service.no_execute": ("no execute yet", "尚未执行"),
    "service.not_connected": ("not connected to {peer}: {why}", "未连接 {peer}：{why}"),
    "service.stopping": ("stopping", "正在停止"),
    "service.to_deliver": ("{n} to deliver", "{n} 条结果待送达"),
    "service.trades_wait": ("trades wait for MongoDB", "有成交等待写入 MongoDB"),
    "service.waiting": ("{n} waiting", "{n} 条指令待执行"),
}

# ------------------------------------------------------------------------------------------------------
# Of the room Migration
# ------------------------------------------------------------------------------------------------------

TEMPLATES |= {
    "migration.bad_value": (
        "{name}={value} (older): {expected}; what {path} sets is kept",
        "{name}={value}（旧客户端）：{expected}；若在 {path} 中设置，则保留该处的值",
    ),
    "migration.changed": (
        "changed   trades go to the collection {name}, not to {older} as before; see MONGODB_REALTIME_COLLECTION_NAME",
        "已更改  成交写入集合 {name}，不再写入原来的 {older}；请检查 MONGODB_REALTIME_COLLECTION_NAME",
    ),
    "migration.done": (
        "{documents} of {source} read: {added} added to {target}, {known} already there, {no_trade} no trade, "
        "{refused} refused by MongoDB",
        "已从 {source} 读取 {documents}：向 {target} 新增 {added}，已有 {known} 笔，"
        "不是成交的 {no_trade} 个，被 MongoDB 拒绝 {refused} 个",
    ),
    "migration.example": ("  {name}: {why}", "  {name}：{why}"),
    "migration.kept": ("kept      {name}: it is set already", "已保留  {name}：此处已有设置"),
    "migration.kept_hash": (
        "kept      module hash {hash}: it is in {path} already",
        "已保留  模块哈希 {hash}：已在 {path} 中",
    ),
    "migration.kept_hash_other": (
        "kept      module hash {hash}: it is in {path} already; workflows may be bound to the older one, {older}: "
        "to take it, stop the service, remove {path} and try again",
        "已保留  模块哈希 {hash}：已在 {path} 中；工作流可能绑定在旧哈希 {older} 上："
        "如需采用旧哈希，请停止服务，删除 {path} 后重试",
    ),
    "migration.kept_other": (
        "kept      {name}: it is set already; the older one differs",
        "已保留  {name}：此处已有设置，与旧客户端的不同",
    ),
    "migration.left_out": ("left out  {what}", "未采用  {what}"),
    "migration.no_directory": (
        "{path} is no directory that can be looked at: sudo ./build_pyz.sh install makes the service's, --env-file "
        "names another file",
        "{path} 不是可访问的目录：sudo ./build_pyz.sh install 会创建服务的目录，也可用 --env-file 指定其他文件",
    ),
    "migration.no_documents": (
        "--documents {name}: no documents in that collection; see MONGODB_DB_NAME",
        "--documents {name}：该集合中没有文档；请检查 MONGODB_DB_NAME",
    ),
    "migration.no_hash": (
        "left out  module hash: {path} is not there; workflows bound to an older one need it",
        "未采用  模块哈希：{path} 不存在；绑定在旧哈希上的工作流需要它",
    ),
    "migration.no_older": (
        "--migrate {directory}: {path} cannot be read: {why}; expected the older client's directory",
        "--migrate {directory}：无法读取 {path}：{why}；应为旧客户端的目录",
    ),
    "migration.no_setting": (
        "left out  {name}: stockrt has no such setting",
        "未采用  {name}：stockrt 没有这项设置",
    ),
    "migration.no_zone": (
        "--time-zone {name}: no such zone on this machine; expected a name such as Asia/Shanghai, of the package "
        "tzdata",
        "--time-zone {name}：本机没有该时区；应为 Asia/Shanghai 之类的名称，由软件包 tzdata 提供",
    ),
    "migration.not_given": ("{path} cannot be given to its owner", "无法把 {path} 交还给其属主"),
    "migration.not_removed": ("{path} cannot be removed", "无法删除 {path}"),
    "migration.other_zone": (
        "--time-zone {zone}: create_time would be {hours:+.1f} h from when the documents were made, by their "
        "ObjectIds; expected the zone of the clock that wrote them (in a container often UTC); with --force it is "
        "taken as it is",
        "--time-zone {zone}：按此时区，create_time 与 ObjectId 所示的文档创建时间相差 {hours:+.1f} 小时；"
        "应为写入这些文档的时钟所用的时区（容器中常为 UTC）；加上 --force 可强制使用此时区",
    ),
    "migration.own_collection": (
        "--documents {name}: in that collection stockrt keeps what is no trade",
        "--documents {name}：该集合由 stockrt 存放成交以外的内容",
    ),
    "migration.source": ("# From {path}:", "# 取自 {path}："),
    "migration.taken": ("taken     {name}={value}", "已迁移  {name}={value}"),
    "migration.taken_hash": (
        "taken     module hash {hash} into {path}",
        "已迁移  模块哈希 {hash}，写入 {path}",
    ),
    "migration.taken_renamed": (
        "taken     {name}={value}, there {older}",
        "已迁移  {name}={value}，旧客户端中名为 {older}",
    ),
    "migration.would_do": (
        "{documents} of {source} read: {trades}, doubles included, {no_trade} no trade; nothing was written: --dry-run",
        "已从 {source} 读取 {documents}：{trades}（含重复），不是成交的 {no_trade} 个；未写入任何内容：--dry-run",
    ),
}

# ------------------------------------------------------------------------------------------------------
# Of the room Views
# ------------------------------------------------------------------------------------------------------

TEMPLATES |= {
    "views.age": ("AGE", "距今"),
    "views.ahead": ("in {age}", "{age}后"),
    "views.change": ("CHANGE", "涨跌幅"),
    "views.code": ("CODE", "代码"),
    "views.course": ("SESSION", "走势"),
    "views.gap": ("gap: {since} – {until} ({why})", "缺口：{since} – {until}（{why}）"),
    "views.high": ("HIGH", "最高"),
    "views.last": ("LAST", "最新价"),
    "views.last_candle": (
        "last: open {open}  high {high}  low {low}  close {close}  volume {volume}",
        "最新一根：开盘 {open}  最高 {high}  最低 {low}  收盘 {close}  成交量 {volume}",
    ),
    "views.last_trade": ("the last trade is of {time}", "最后一笔成交的时间为 {time}"),
    "views.left_out": (
        "{candles} before them left out: a wider terminal, --from or a longer step",
        "此前另有 {candles}未显示：请加宽终端，或用 --from，或改用更长的周期",
    ),
    "views.low": ("LOW", "最低"),
    "views.more_gaps": ("and {gaps} before them", "此前另有 {gaps}"),
    "views.name": ("NAME", "名称"),
    "views.no_final": (
        "{code}: no final close is stored: --backfill 60 --codes {code} brings some",
        "{code}：库中没有最终收盘价，可用 --backfill 60 --codes {code} 补齐",
    ),
    "views.no_trade": ("no trade of it is stored", "库中没有它的成交"),
    "views.no_trade_then": ("{code}: no trade in this time", "{code}：这段时间没有成交"),
    "views.now": ("now", "至今"),
    "views.open": ("OPEN", "开盘"),
    "views.page_candles": ("{step} candles and volume, {span}", "{step}与成交量，{span}"),
    "views.page_change": ("Change", "涨跌幅"),
    "views.page_code": ("Code", "代码"),
    "views.page_course": ("Session", "走势"),
    "views.page_empty": (
        "There is no trade in the store yet: --once, --collect or the platform's commands bring some.",
        "库中还没有成交：用 --once、--collect 或由平台下发的指令获取。",
    ),
    "views.page_finals": ("{closes}, the last one {last}", "{closes}，最新 {last}"),
    "views.page_high": ("High", "最高"),
    "views.page_last": ("Last", "最新价"),
    "views.page_low": ("Low", "最低"),
    "views.page_name": ("Name", "名称"),
    "views.page_no_final": (
        "No final close yet: --backfill 60 fetches some.",
        "还没有最终收盘价：可用 --backfill 60 补齐。",
    ),
    "views.page_no_trade": ("No trades in this time.", "这段时间没有成交。"),
    "views.page_nothing_of_them": ("Nothing of these codes is stored.", "库中没有这些代码的成交。"),
    "views.page_of": ("{codes} of {store}, as of {when}", "{store} 中的 {codes}，截至 {when}"),
    "views.page_open": ("Open", "开盘"),
    "views.page_time": ("Exchange time", "交易所时间"),
    "views.page_volume": ("Volume", "成交量"),
    "views.step_1d": ("1d", "日 K 线"),
    "views.step_1h": ("1h", "1 小时 K 线"),
    "views.step_1m": ("1m", "1 分钟 K 线"),
    "views.step_5m": ("5m", "5 分钟 K 线"),
    "views.units": ("T B M", "万亿 亿 万"),
    "views.volume": ("VOLUME", "成交量"),
}

# ------------------------------------------------------------------------------------------------------
# Of the room Command line
# ------------------------------------------------------------------------------------------------------

TEMPLATES |= {
    "cli.buy": ("buy", "买"),
    "cli.cannot_print": ("cannot print: {why}", "无法输出：{why}"),
    "cli.code_not_stored": ("{code}: nothing of it is stored", "{code}：库中没有它的数据"),
    "cli.error": ("stockrt: {words}", "stockrt：{words}"),
    "cli.exchange_time": ("EXCHANGE TIME", "交易所时间"),
    "cli.export_undone": ("interrupted: no file was written", "已中断：未写出文件"),
    "cli.exported": ("{rows} written to standard output", "已将 {rows}写到标准输出"),
    "cli.exported_to": ("{rows} written to {path}", "已将 {rows}写入 {path}"),
    "cli.not_exported": ("nothing written, {path} is as it was: {why}", "未写入，{path} 保持原样：{why}"),
    "cli.lists_incomplete": ("not all of the API's lists are here: {why}", "API 的品种列表不全：{why}"),
    "cli.name_not_stored": (
        "{code}: nothing of it is stored; where that is a name, --symbols {code} brings its code",
        "{code}：库中没有它的数据；如果这是名称，可用 --symbols {code} 查代码",
    ),
    "cli.no_blocks": (
        "--chart: stdout is {encoding}, which has no blocks to draw with: set LANG to a UTF-8 locale, or "
        "see --json and --html",
        "--chart：标准输出的编码为 {encoding}，没有绘图用的方块字符：请将 LANG 设为 UTF-8 的区域设置，"
        "或改用 --json、--html",
    ),
    "cli.no_candle": (
        "--html FILE.svg: there is no candle to draw; --show says what is stored",
        "--html FILE.svg：没有可画的 K 线；库中有哪些数据请看 --show",
    ),
    "cli.no_instrument": (
        "no instrument of the API's lists has {text} in its code or its name",
        "API 的品种列表中，没有代码或名称含 {text} 的品种",
    ),
    "cli.no_reference": (
        "no final close is stored that a change could be told against: --backfill 5 brings some",
        "库中没有可用来计算涨跌幅的最终收盘价：可用 --backfill 5 补齐",
    ),
    "cli.no_side": ("-", "-"),
    "cli.no_trade_yet": (
        "no trade is stored yet: see --once, or --show --demo for those of --once --demo",
        "库中还没有成交：请看 --once；--once --demo 的模拟成交请看 --show --demo",
    ),
    "cli.not_one_code": (
        "--html FILE.svg: a picture is of one code, and here are candles of {count}: name one with --codes",
        "--html FILE.svg：一张图只画一个代码，而这里有 {count} 个代码的 K 线：请用 --codes 指定一个",
    ),
    "cli.os_error": ("{file} cannot be used: {why}", "无法使用 {file}：{why}"),
    "cli.page_written": ("{path}: {codes}, {size:.0f} kB", "{path}：{codes}，{size:.0f} kB"),
    "cli.price": ("PRICE", "价格"),
    "cli.rows_not_printed": ("the rows cannot be printed: {why}", "无法输出成交表：{why}"),
    "cli.sell": ("sell", "卖"),
    "cli.side": ("SIDE", "方向"),
    "cli.turnover": ("TURNOVER", "成交额"),
    "cli.backfill_code": (
        "{code}  {first}  {last}  {added} added, {there} there before",
        "{code}  {first}  {last}  新增 {added} 个，已有 {there} 个",
    ),
    "cli.backfill_done": (
        "{codes}, {failed} failed, {added} closes added",
        "{codes}，失败 {failed} 个，新增 {added} 个收盘价",
    ),
    "cli.backfill_failed_code": ("{code}  {why}", "{code}  {why}"),
    "cli.backfill_interrupted": (
        "{codes}, {failed} failed, {added} closes added, interrupted: the same command goes on where it stopped",
        "{codes}，失败 {failed} 个，新增 {added} 个收盘价，已中断：再次运行同一命令会从中断处继续",
    ),
    "cli.collect_done": (
        "trades {trades}, stored {stored}, already known {known} ({took:.1f} s)",
        "成交 {trades} 笔，已入库 {stored} 笔，已有 {known} 笔（用时 {took:.1f} 秒）",
    ),
    "cli.collect_dropped": (
        "{n} pushed and not asked for, or no trades",
        "另有 {n} 条推送并未请求，或不是成交",
    ),
    "cli.collect_no_key": (
        "INFOWAY_API_KEY: no key can be used any more: {why}",
        "INFOWAY_API_KEY：已没有可用的密钥：{why}",
    ),
    "cli.collect_no_stream": (
        "the stream serves none of these codes to INFOWAY_API_KEY: the key's plan has no stream, or none of these "
        "products (see above; --check names the plan, INFOWAY_PLAN where the API does not tell it); "
        "--collect --every 10 asks for their latest trades every 10 s instead",
        "推送流不向 INFOWAY_API_KEY 提供这些代码：该密钥的套餐不含推送流，或不含这些产品"
        "（见上文；套餐可用 --check 查看，API 未说明时取 INFOWAY_PLAN）；"
        "可改用 --collect --every 10，每 10 秒请求一次最新成交",
    ),
    "cli.collect_nothing": (
        "nothing to collect: {words}; see --symbols",
        "没有可采集的代码（请看 --symbols）：{words}",
    ),
    "cli.collect_rows_unread": ("not all rows were read", "仍有成交未被读取方读走"),
    "cli.collect_waiting": (
        "{trades} on this machine for MongoDB",
        "本机上有 {trades} MongoDB",
    ),
    "cli.once_codes_interrupted": ("interrupted while the codes were read", "读取代码时已中断"),
    "cli.once_store_hangs": (
        "{summary}; the store did not answer: what was being written may be missing",
        "{summary}；存储没有应答：正在写入的数据可能缺失",
    ),
    "cli.working": ("working for {{elapsed}} (min:s)", "已运行 {{elapsed}}（分：秒）"),
    "unit.documents": ("documents", "文档"),
    "unit.trades": ("trades", "成交"),
}

# What --help says; "usage: " and "options:" as argparse has them, in Chinese as wide as in English.
TEMPLATES |= {
    "help.backfill": (
        "fetch the final closes of the last DAYS sessions (up to {most}) of the given codes, or of all stored ones",
        "补齐给定代码（或全部已存代码）最近 DAYS 个交易日的最终收盘价，最多 {most} 个交易日",
    ),
    "help.chart": (
        "with --show: candles and volume; with --html: of which step (5m)",
        "与 --show 同用：画 K 线和成交量；与 --html 同用：K 线的周期（默认 5m）",
    ),
    "help.check": ("check settings, keys, store and platform", "检查设置、密钥、存储和平台"),
    "help.check_settings": (
        "check the settings alone: no network, nothing written",
        "只检查设置：不访问网络，不写入任何文件",
    ),
    "help.closes": (
        "with --export: the closing prices in place of the trades",
        "与 --export 同用：导出收盘价，而不是成交",
    ),
    "help.codes": ("codes, separated by blanks or commas", "代码，用空格或逗号分隔"),
    "help.codes_file": ("codes from a file, '-' for standard input", "从文件读取代码，'-' 表示标准输入"),
    "help.collect": (
        "store and print every trade of the given codes, or of COLLECT_CODES, until Ctrl-C",
        "持续采集给定代码（或 COLLECT_CODES）的每一笔成交，存入并打印，直到按 Ctrl-C",
    ),
    "help.demo": (
        "synthetic trades: no network, no key, embedded store",
        "模拟成交：不需要网络和密钥，存入本地文件",
    ),
    "help.description": (
        "Collects the latest trades of stocks, currency pairs and crypto into MongoDB.",
        "获取股票、外汇、加密货币的最新成交，存入 MongoDB。",
    ),
    "help.discard": (
        "with --rejects: delete them, and damaged files that were set aside",
        "与 --rejects 同用：删除这些数据，以及移开保留的损坏文件",
    ),
    "help.documents": (
        "with --migrate: bring the older client's documents over (default: its own collection, {collection})",
        "与 --migrate 同用：迁移旧客户端的文档（默认为旧客户端自己的集合 {collection}）",
    ),
    "help.drain": (
        "move now what waits on this machine for MongoDB",
        "立即把暂存于本机的数据写入 MongoDB",
    ),
    "help.dry_run": (
        "with --migrate: say what would be done, write nothing",
        "与 --migrate 同用：只说明会做什么，不写入任何内容",
    ),
    "help.env_file": ("settings; default: {places}", "设置文件；默认依次查找 {places}"),
    "help.every": (
        "with --collect: ask every S seconds, in place of the stream",
        "与 --collect 同用：不用推送流，改为每 S 秒请求一次",
    ),
    "help.examples": (
        """\
examples:
  stockrt.pyz --once --demo --codes TSLA.US AAPL.US USDCNY   synthetic trades: no key, no network
  stockrt.pyz --once --codes TSLA.US 700.HK 600519 BTCUSDT   real ones: INFOWAY_API_KEY must be set
  stockrt.pyz --once --codes-file codes.txt --json           one JSON document a line on stdout
  stockrt.pyz --collect --codes TSLA.US BTCUSDT              every trade as it is made, until Ctrl-C
  stockrt.pyz --collect --demo --codes TSLA.US               synthetic ones, each second
  stockrt.pyz --show                                         what is stored: price, change, session of each code
  stockrt.pyz --backfill 60 --codes-file codes.txt           closes of the last 60 sessions, to begin with
  stockrt.pyz --html stocks.html                             what is stored, and charts of it, as one page
  stockrt.pyz --check                                        what is wrong, and which setting mends it

exit status: 0 every code stored · 1 any not · 64 usage · 78 settings · 130 interrupted
of --status: 0 well · 1 something is wrong · 3 not running · 4 unknown to this user
""",
        """\
示例：
  stockrt.pyz --once --demo --codes TSLA.US AAPL.US USDCNY   模拟成交：不需要密钥和网络
  stockrt.pyz --once --codes TSLA.US 700.HK 600519 BTCUSDT   真实成交：须设置 INFOWAY_API_KEY
  stockrt.pyz --once --codes-file codes.txt --json           每行一个 JSON 文档，写到标准输出
  stockrt.pyz --collect --codes TSLA.US BTCUSDT              逐笔采集，直到按 Ctrl-C
  stockrt.pyz --collect --demo --codes TSLA.US               模拟成交，每秒一笔
  stockrt.pyz --show                                         已存行情：各代码的价格、涨跌、当日走势
  stockrt.pyz --backfill 60 --codes-file codes.txt           首次使用：补齐最近 60 个交易日的收盘价
  stockrt.pyz --html stocks.html                             把已存行情和 K 线图写成一个网页
  stockrt.pyz --check                                        检查有什么问题，以及该改哪一项设置

退出码：0 每个代码都已入库；1 有代码未入库；64 命令行有误；78 设置有误；130 被中断
--status 的退出码：0 正常；1 有问题；3 未运行；4 未知（当前用户无权查看）
""",
    ),
    "help.executions": (
        "list the last N executions and --once runs with their failures (default {shown})",
        "列出最近 N 次执行和 --once 运行及其失败原因（默认 {shown} 次）",
    ),
    "help.export": (
        "write what is stored, of all codes or those of --codes, into FILE.csv or FILE.jsonl, which it replaces, or "
        "'-': standard output",
        "把已存数据（全部代码，或 --codes 给出的代码）写入 FILE.csv 或 FILE.jsonl，覆盖原文件；'-' 表示标准输出",
    ),
    "help.force": (
        "with --register: anew, although a hash is stored; with --documents: this zone, whatever ObjectIds say",
        "与 --register 同用：即使已存有模块哈希也重新注册；"
        "与 --documents 同用：即使与 ObjectId 的时间矛盾，也用给出的时区",
    ),
    "help.from": (
        "with --chart, --html or --export: since this date or time, ISO 8601, such as 2026-08-14 or "
        "2026-08-14T09:30+08:00; without an offset it is UTC",
        "与 --chart、--html 或 --export 同用：起始日期或时间（ISO 8601），如 2026-08-14 或 "
        "2026-08-14T09:30+08:00；不带时区偏移时为 UTC",
    ),
    "help.grafana": (
        "print a Grafana dashboard over the metrics of METRICS_FILE",
        "输出 Grafana 仪表盘，展示 METRICS_FILE 的指标",
    ),
    "help.help": ("show this help message and exit", "显示本帮助并退出"),
    "help.html": (
        "write what --show has as one page, or candles of one code as a picture where FILE ends in .svg",
        "把 --show 的内容写成一个网页；FILE 以 .svg 结尾时，把一个代码的 K 线写成图片",
    ),
    "help.json": (
        "print one JSON document a line in place of the table",
        "每行输出一个 JSON 文档，而不是表格",
    ),
    "help.migrate": (
        "take settings and module hash over from the older client's directory, with --documents its documents",
        "从旧客户端的目录迁移设置和模块哈希；加 --documents 则迁移其文档",
    ),
    "help.once": (
        "fetch the given codes once, store them, print them",
        "获取一次给定代码的最新成交，存入并打印",
    ),
    "help.options": ("options:", "选项："),
    "help.register": ("register at the dispatch platform (once)", "在调度平台注册（只需一次）"),
    "help.rejects": (
        "list what MongoDB refused for good, and why",
        "列出被 MongoDB 拒绝、不再重试的数据及其原因",
    ),
    "help.reload": (
        "for ExecReload= of the unit: have the daemon read its settings anew",
        "供服务单元的 ExecReload= 使用：让守护进程重新加载设置",
    ),
    "help.retain": (
        "remove now what is older than KEEP_DAYS, also what --check names",
        "立即删除超过 KEEP_DAYS 的数据，包括 --check 指出的数据",
    ),
    "help.retry": (
        "with --drain: what MongoDB refused before, too",
        "与 --drain 同用：此前被 MongoDB 拒绝的数据也一并写入",
    ),
    "help.show": (
        "show what is stored of codes: price, change, session; without codes those of COLLECT_CODES, else the "
        "{shown} that traded last",
        "显示各代码的已存行情：价格、涨跌、当日走势；"
        "未给代码时取 COLLECT_CODES，该项也未设置时取最近成交的 {shown} 个代码",
    ),
    "help.sort": (
        "with --show: order of its lines (code)",
        "与 --show 同用：各行的排序方式（默认 code）",
    ),
    "help.status": (
        "show daemon, platform, store and API keys",
        "显示守护进程、平台、存储和 API 密钥的状态",
    ),
    "help.symbols": (
        "find instruments by code or name: {examples}",
        "按代码或名称查找品种，如 {examples}",
    ),
    "help.time_zone": (
        "with --documents: of the clock that wrote them, such as Asia/Shanghai",
        "与 --documents 同用：写入这些文档的时钟所在时区，如 Asia/Shanghai",
    ),
    "help.to": (
        "as --from: before this time, or up to this date, the date included",
        "同 --from：截止时间（不含），或截止日期（含当日）",
    ),
    "help.up": (
        "of --show, --html and --collect: the colour of what rises, in place of the one of your locale",
        "用于 --show、--html 和 --collect：上涨的颜色；未给出时按区域设置的习惯",
    ),
    "help.usage": ("usage: ", "用法："),
    "help.version": ("show program's version number and exit", "显示版本号并退出"),
}

# What is wrong with a command line.
TEMPLATES |= {
    "usage.argument": ("argument {flag}: {what}", "选项 {flag}：{what}"),
    "usage.backfill": (
        "--backfill {n}: expected 1 to {most} sessions; see --help",
        "--backfill {n}：应为 1 到 {most} 个交易日；详见 --help",
    ),
    "usage.choice": (
        "invalid choice: {value} (choose from {choices})",
        "没有 {value} 这个取值，可选 {choices}",
    ),
    "usage.codes_after": (
        "{words}; codes stand after --codes; see --help",
        "{words}；代码须写在 --codes 之后；详见 --help",
    ),
    "usage.codes_after_show": (
        "{words}; codes stand right after --show, or after --codes; see --help",
        "{words}；代码须紧跟在 --show 之后，或写在 --codes 之后；详见 --help",
    ),
    "usage.codes_file": (
        "--codes-file {file}: cannot be read: {why}",
        "--codes-file {file}：无法读取：{why}",
    ),
    "usage.collect_needs_codes": (
        "--collect needs --codes CODE …, --codes-file FILE, or COLLECT_CODES; see --help",
        "--collect 需要 --codes CODE …、--codes-file FILE 或 COLLECT_CODES；详见 --help",
    ),
    "usage.demo_in_mongodb": (
        "--demo stores synthetic trades on this machine only: unset MONGODB_HOST, or leave --demo out",
        "--demo 的模拟成交只存于本机：请取消设置 MONGODB_HOST，或去掉 --demo",
    ),
    "usage.did_you_mean": (
        "{words}; did you mean {flags}?; see --help",
        "{words}，是不是 {flags}？详见 --help",
    ),
    "usage.documents_need_zone": (
        "--documents needs --time-zone ZONE, and the other way round; see --help",
        "--documents 与 --time-zone ZONE 必须同时使用；详见 --help",
    ),
    "usage.every": (
        "--every {text}: {expected}; see --help",
        "--every {text}：{expected}；详见 --help",
    ),
    "usage.excluded": ("not allowed with argument {other}", "不能与 {other} 同时使用"),
    "usage.executions": (
        "--executions {n}: expected 1 to {most}; see --help",
        "--executions {n}：应为 1 到 {most}；详见 --help",
    ),
    "usage.export": (
        "--export {file}: expected a name that ends with .csv or .jsonl, or -; see --help",
        "--export {file}：应为以 .csv 或 .jsonl 结尾的文件名，或 -；详见 --help",
    ),
    "usage.file_name": ("expected a file's name", "应给出文件名"),
    "usage.goes_with": (
        "{flag} goes with {commands}; see --help",
        "{flag} 须与 {commands} 同用；详见 --help",
    ),
    "usage.html": (
        "--html {file}: expected the name of a file that ends with .html, or with .svg for a picture; see --help",
        "--html {file}：应为以 .html 结尾的文件名，图片则以 .svg 结尾；详见 --help",
    ),
    "usage.json_with_export": (
        "--json goes with --export -, a file has the form of its name; see --help",
        "--json 只与 --export - 同用，写入文件时格式由文件名决定；详见 --help",
    ),
    "usage.json_with_html": (
        "--json does not go with --html; see --help",
        "--json 不能与 --html 同用；详见 --help",
    ),
    "usage.migrate_needs": (
        "--migrate needs the older client's directory, or --documents; see --help",
        "--migrate 需要旧客户端的目录，或 --documents；详见 --help",
    ),
    "usage.moment": (
        "{flag} {text}: expected a date such as 2026-08-14 or a time such as 2026-08-14T09:30+08:00; see --help",
        "{flag} {text}：应为日期（如 2026-08-14）或时间（如 2026-08-14T09:30+08:00）；详见 --help",
    ),
    "usage.no_code": (
        "{where}: no code in it; expected codes such as AAPL.US 600519; see --help",
        "{where}：其中没有代码，应为 AAPL.US 600519 这样的代码；详见 --help",
    ),
    "usage.no_span": (
        "--from {since} --to {until}: nothing lies between them; see --help",
        "--from {since} --to {until}：两者之间没有任何时间；详见 --help",
    ),
    "usage.no_value": ("ignored explicit argument {value}", "不接受取值，却给出了 {value}"),
    "usage.once_needs_codes": (
        "--once needs --codes CODE … or --codes-file FILE; see --help",
        "--once 需要 --codes CODE … 或 --codes-file FILE；详见 --help",
    ),
    "usage.one_value": ("expected one argument", "应给出一个取值"),
    "usage.see_help": ("{words}; see --help", "{words}；详见 --help"),
    "usage.some_value": ("expected at least one argument", "应至少给出一个取值"),
    "usage.symbols_need_text": (
        "--symbols needs a text: a code or a name, or a part of one; see --help",
        "--symbols 需要文字：代码或名称，或其中一部分；详见 --help",
    ),
    "usage.symbols_no_text": (
        "--symbols {text}: it is not UTF-8 text; see --help",
        "--symbols {text}：不是 UTF-8 文本；详见 --help",
    ),
    "usage.symbols_too_long": (
        "--symbols: {n} characters; expected at most {most}; see --help",
        "--symbols：共 {n} 个字符，应不超过 {most} 个；详见 --help",
    ),
    "usage.unknown": ("unrecognized arguments: {arguments}", "无法识别的参数：{arguments}"),
    "usage.whole_number": ("invalid int value: {value}", "应为整数，而不是 {value}"),
}

# Looking and mending: --check, --status, --executions, --drain, --retain, --rejects, --reload, --register, --migrate.
TEMPLATES |= {
    "cli.can_be_made": ("{path} can be made", "{path} 可以创建"),
    "cli.can_be_written": ("{path} can be written", "{path} 可以写入"),
    "cli.check_bad": ("FAIL  {name}: {words}", "失败  {name}：{words}"),
    "cli.check_good": ("ok    {name}: {words}", "正常  {name}：{words}"),
    "cli.collect_trouble": ("collecting: {why}", "行情采集：{why}"),
    "cli.collecting": (
        "{now}, at {at}; since the start {trades}, {stored} new",
        "{now}，截至 {at}；启动以来 {trades}，新入库 {stored} 笔",
    ),
    "cli.collects_alone": (
        "SERVER_IP and SERVER_PORT are not set: the daemon collects by itself, without a platform",
        "未设置 SERVER_IP 和 SERVER_PORT：守护进程自行采集，不连接平台",
    ),
    "cli.connected": ("connected", "已连接"),
    "cli.connected_since": ("{url}: connected since {since}", "{url}：自 {since} 起已连接"),
    "cli.connecting": ("connecting", "正在连接"),
    "cli.daemon_streams": ("the daemon has it: {words}", "守护进程正在使用：{words}"),
    "cli.damaged": ("{count}: see --rejects", "{count} 个，详见 --rejects"),
    "cli.damaged_file": (
        "damaged, rescued and set aside: {path}, {megabytes:.1f} MB",
        "文件损坏，内容已抢救，原文件移开保留：{path}，{megabytes:.1f} MB",
    ),
    "cli.discarded": (
        "discarded {documents} and {files} of {megabytes:.1f} MB",
        "已删除 {documents}和 {files}（{megabytes:.1f} MB）",
    ),
    "cli.drained": (
        "{moved} moved to {place}; {left} left on this machine",
        "已将 {moved} 笔成交写入 {place}；本机剩余 {left} 笔",
    ),
    "cli.drained_but": (
        "{moved} moved to {place}, {rejected} refused by it: see --rejects; {left} left on this machine",
        "已将 {moved} 笔成交写入 {place}，{rejected} 笔被其拒绝：详见 --rejects；本机剩余 {left} 笔",
    ),
    "cli.dropped": ("{count} dropped", "丢弃 {count} 条"),
    "cli.every_key_rests": ("every API key rests", "所有 API 密钥都已暂停使用"),
    "cli.executing": (
        "one executed now, {commands} commands, {results} results to deliver",
        "正在执行 1 条指令，{commands} 条待执行，{results} 条结果待送达",
    ),
    "cli.execution": ("{at}  {outcome}  {id}  {name}", "{at}  {outcome}  {id}  {name}"),
    "cli.failed_code": ("  {code}: {why}", "  {code}：{why}"),
    "cli.failure": ("failure", "失败"),
    "cli.few_connections": (
        "{count} of {wanted} to the stream stand",
        "推送流应有 {wanted}，现有 {count} 个",
    ),
    "cli.few_descriptors": (
        "only {most} files and sockets may be open, and {needed} are needed; see LimitNOFILE= of the unit, "
        "or ulimit -n",
        "最多只能打开 {most} 个文件和套接字，而需要 {needed} 个；请检查服务单元的 LimitNOFILE= 或 ulimit -n",
    ),
    "cli.for_reason": ("{state} ({why})", "{state}（{why}）"),
    "cli.given_up": ("given up", "已放弃"),
    "cli.goes_on": (
        "interrupted: the same command goes on where it stopped",
        "已中断：再次运行同一命令会从中断处继续",
    ),
    "cli.hidden": (
        "this user may not look at what {unit} has: run as root; --env-file or STATE_DIRECTORY names "
        "settings or a state of your own",
        "当前用户无权查看 {unit} 的设置和状态：请用 root 运行；也可用 --env-file 或 STATE_DIRECTORY "
        "指定自己的设置或状态目录",
    ),
    "cli.interrupted": ("interrupted", "已中断"),
    "cli.key_is_out": ("API key {key} is out", "API 密钥 {key} 已停用"),
    "cli.last": ("{status} at {at}, {name}: {message}", "{at} {status}，{name}：{message}"),
    "cli.last_contact": ("{url}: {state}, last contact {at}", "{url}：{state}，上次通信 {at}"),
    "cli.last_failed": ("the last execution failed", "最近一次执行失败"),
    "cli.lost": ("{url}: not connected since {since}: {why}", "{url}：自 {since} 起未连接：{why}"),
    "cli.mend_settings": ("mend them, see --check-settings", "请修正设置，详见 --check-settings"),
    "cli.may_not_look": ("this user may not look at it", "当前用户无权查看"),
    "cli.migrated": (
        "settings: {file}; a service that runs sees changes after its restart",
        "设置：{file}；正在运行的服务重启后才生效",
    ),
    "cli.nameless": ("without a name", "未命名"),
    "cli.needs_no_daemon": (
        "nothing for commands by hand; a daemon needs SERVER_IP and SERVER_PORT, or COLLECT or COLLECT_EVERY",
        "手动执行命令时不需要守护进程，要运行它请设置 SERVER_IP 和 SERVER_PORT，或设置 COLLECT 或 "
        "COLLECT_EVERY",
    ),
    "cli.no_connection": ("no connection to the platform", "未连接到平台"),
    "cli.no_daemon": (
        "SERVER_IP and SERVER_PORT are not set: enough for --once, not for the daemon",
        "未设置 SERVER_IP 和 SERVER_PORT：只够 --once 使用，不能运行守护进程",
    ),
    "cli.no_limit": ("no daily limit, not counted", "无每日额度限制，不计数"),
    "cli.no_mongodb": (
        "MONGODB_HOST not set: {why}; the trades are in {file}",
        "未设置 MONGODB_HOST：{why}；成交保存在 {file}",
    ),
    "cli.no_old_documents": ("there are no older documents", "没有可迁移的旧客户端文档"),
    "cli.no_platform": ("none: no platform is set", "无：未设置平台"),
    "cli.no_room": ("{count} found no room", "{count} 笔因暂存队列已满而未保存"),
    "cli.no_state_directory": ("{path} cannot be used", "无法使用 {path}"),
    "cli.no_time_zones": (
        "time zones: see above; install the package tzdata, or see PYTHONTZPATH",
        "时区：原因见上；请检查 PYTHONTZPATH，或安装 tzdata 软件包",
    ),
    "cli.none_set": ("none set", "未设置"),
    "cli.none_yet": ("none yet", "尚无"),
    "cli.not_begun": ("collecting has not begun", "行情采集尚未开始"),
    "cli.not_connected": ("not connected", "未连接"),
    "cli.not_counted": ("used today: unknown, the counts cannot be read", "当日用量未知：无法读取计数"),
    "cli.not_deleted": ("a damaged file cannot be deleted", "无法删除损坏的文件"),
    "cli.not_ended": ("not ended", "未结束"),
    "cli.not_for": ("not for {products}", "不能用于 {products}"),
    "cli.not_needed": ("not needed", "不需要"),
    "cli.not_reloaded": (
        "the daemon has not read its settings within {seconds:.0f} s; see its log",
        "守护进程未在 {seconds:.0f} 秒内读取设置；详见其日志",
    ),
    "cli.not_retained": ("KEEP_DAYS={days} has no effect: {why}", "KEEP_DAYS={days} 未生效：{why}"),
    "cli.not_running": ("not running", "未运行"),
    "cli.not_the_services": (
        "not as {unit} has them: {names} of the environment, which it does not see; unset that to check it",
        "与 {unit} 的设置不同：{names} 来自当前环境变量，服务看不到；要按服务的设置检查，请先取消这些变量",
    ),
    "cli.nothing_executed": ("nothing was executed yet", "尚未执行过"),
    "cli.nothing_now": ("nothing now", "目前未采集"),
    "cli.nothing_refused": ("MongoDB has refused nothing", "MongoDB 没有拒绝过任何文档"),
    "cli.nowhere_to_move": ("there is nowhere to move what this machine holds", "没有 MongoDB 可供写入"),
    "cli.of_codes": ("codes", "代码"),
    "cli.of_collecting": ("collecting", "行情采集"),
    "cli.of_daemon": ("daemon", "守护进程"),
    "cli.of_damaged": ("damaged files", "损坏文件"),
    "cli.of_key": ("API key", "API 密钥"),
    "cli.of_last": ("last execution", "最近执行"),
    "cli.of_proxy": ("proxy", "代理"),
    "cli.of_registration": ("registration", "注册"),
    "cli.of_settings": ("settings", "设置"),
    "cli.of_spool": ("spool", "暂存队列"),
    "cli.of_state_directory": ("state directory", "状态目录"),
    "cli.of_status": ("status", "状态"),
    "cli.of_store": ("store", "存储"),
    "cli.of_stream": ("stream", "推送流"),
    "cli.of_stream_with": ("stream, API key {key}", "推送流，API 密钥 {key}"),
    "cli.of_totals": ("in all", "累计"),
    "cli.of_version": ("version", "版本"),
    "cli.of_waiting": ("waiting", "待处理"),
    "cli.oldest": (
        "{megabytes:.1f} MB, the oldest since {oldest}",
        "{megabytes:.1f} MB，最早一笔自 {oldest} 起等待",
    ),
    "cli.origins": ("from {origins}", "{origins}"),
    "cli.out": ("out", "已停用"),
    "cli.partial": ("partial", "部分成功"),
    "cli.plan_without_stream": (
        "its plan has none: COLLECT_EVERY asks for the latest trades instead",
        "套餐不含推送流：可改用 COLLECT_EVERY 轮询最新成交",
    ),
    "cli.platform": ("{url}: {state}", "{url}：{state}"),
    "cli.poll_by_setting": (
        "see --check and the daemon's log; COLLECT_EVERY polls without a stream",
        "请看 --check 和守护进程的日志；COLLECT_EVERY 可不用推送流而轮询",
    ),
    "cli.polled_instead": (
        "the stream brings nothing, {codes} polled instead",
        "推送流没有数据，已改为轮询 {codes}",
    ),
    "cli.quota": ("{used} used today, {left} left", "当日已用 {used}，剩余额度 {left}"),
    "cli.quota_leased": (
        "{used} used today, {left} left, {leased} of them leased by the daemon",
        "当日已用 {used}，剩余额度 {left}，其中 {leased} 由守护进程预留",
    ),
    "cli.ready": ("ready", "可用"),
    "cli.refused": ("{documents} refused by MongoDB", "{documents}被 MongoDB 拒绝"),
    "cli.registered": (
        "registered {name} at {url}: hash {hash} in {place}",
        "已将 {name} 注册到 {url}：模块哈希 {hash} 保存在 {place}",
    ),
    "cli.registered_already": (
        "registered already: hash {hash} in {place}; --register --force registers anew",
        "此前已注册：模块哈希 {hash} 保存在 {place}；--register --force 可重新注册",
    ),
    "cli.rejected": ("{count} refused by it: see --rejects", "{count} 个文档被拒绝：详见 --rejects"),
    "cli.reload_by_unit": (
        "--reload is what the unit's ExecReload= calls: type sudo systemctl reload stockrt, or, for a daemon "
        "without a unit, kill -HUP and its pid",
        "--reload 供服务单元的 ExecReload= 调用：请运行 sudo systemctl reload stockrt；"
        "没有服务单元的守护进程，请用 kill -HUP 加其 pid",
    ),
    "cli.renew_plan": (
        "see its line below; renew its plan or replace it in INFOWAY_API_KEY",
        "请看下面该密钥的一行；请续订套餐，或在 INFOWAY_API_KEY 中换掉它",
    ),
    "cli.resting": ("resting", "暂停使用"),
    "cli.retained": ("{store}: {words}", "{store}：{words}"),
    "cli.run_as_root": ("run as root", "请用 root 运行"),
    "cli.run_register": ("none: run --register", "无：请运行 --register"),
    "cli.running": ("running, pid {pid}, version {version}", "运行中，pid {pid}，版本 {version}"),
    "cli.running_silent": ("running, and has told nothing of itself yet", "运行中，尚未报告自身状态"),
    "cli.see_executions": ("see --executions 1", "请看 --executions 1"),
    "cli.see_journal": ("see sudo journalctl -u {service}", "请看 sudo journalctl -u {service}"),
    "cli.see_lost": (
        "see --rejects for what may be lost; then --rejects --discard",
        "可能丢失的内容请看 --rejects，然后用 --rejects --discard 删除",
    ),
    "cli.see_rejects": (
        "see --rejects; then --drain --retry or --rejects --discard",
        "请看 --rejects，然后用 --drain --retry 重试，或用 --rejects --discard 删除",
    ),
    "cli.service_unknown": (
        "what {unit} has is not known here: run as root to check it",
        "当前用户看不到 {unit} 的设置：请用 root 运行以检查",
    ),
    "cli.set_aside": ("{files} set aside", "{files}已移开保留"),
    "cli.settings_are_faulty": ("the settings are faulty", "设置有误"),
    "cli.start_it": (
        "start it: sudo systemctl start {service}, or stockrt.pyz without a command",
        "请用 sudo systemctl start {service} 启动，或不带命令运行 stockrt.pyz",
    ),
    "cli.still_counts": (
        "where it still counts, a service that begins now waits for up to three minutes (429)",
        "这次检查的连接可能仍被计数，此时启动的服务最多要等三分钟（429）",
    ),
    "cli.straight": ("{what} straight", "{what} → 直连"),
    "cli.stream": (
        "{product}: {subscribed} of {codes}, {state}",
        "{product}：{codes}中已订阅 {subscribed} 个，{state}",
    ),
    "cli.stream_takes": (
        "{url} takes it for {product}: {connections}, {each} codes each, {all} in all",
        "{url} 接受此密钥订阅 {product}：{connections}，每个连接 {each} 个代码，共 {all} 个",
    ),
    "cli.success": ("success", "成功"),
    "cli.the_api": ("the API", "API"),
    "cli.the_platform": ("the platform", "平台"),
    "cli.the_stream": ("the stream", "推送流"),
    "cli.they_follow": (
        "see --check; they follow when MongoDB takes them, at once with --drain",
        "请看 --check，MongoDB 恢复后会自动写入，也可用 --drain 立即写入",
    ),
    "cli.through": ("{what} through {proxy} ({setting})", "{what} → {proxy}（{setting}）"),
    "cli.to_collect": ("{n} to collect", "将采集 {n} 个"),
    "cli.to_collect_but": ("{words}, {n} not: {codes}", "{words}，另有 {n} 个无法采集：{codes}"),
    "cli.to_do": ("{status}. To do: {to_do}", "{status}。处理办法：{to_do}"),
    "cli.totals": (
        "{executions} since {since}, {partial} in part, {failure} failed; {trades} stored, {known} already "
        "known, {kept} kept for MongoDB, {codes} failed",
        "自 {since} 起共 {executions}，部分成功 {partial} 次，失败 {failure} 次；{trades}已入库，{known} "
        "笔已有，{kept} 笔暂存待写入 MongoDB，{codes}失败",
    ),
    "cli.tries_again": (
        "see --check and the daemon's log; it tries again by itself",
        "请看 --check 和守护进程的日志，程序会自动重试",
    ),
    "cli.undelivered": ("to be delivered", "待送达"),
    "cli.unknown": ("unknown", "未知"),
    "cli.unsettled": ("the closes of {count} are still to be made", "{count} 笔成交的收盘价尚待生成"),
    "cli.untried": ("not told by a daemon: see --check", "守护进程未报告：请看 --check"),
    "cli.until": ("{state} until {until}", "{state}至 {until}"),
    "cli.wait_for_mongodb": ("{trades} for MongoDB", "{trades} MongoDB"),
    "cli.wait_or_add": (
        "wait, or add another key to INFOWAY_API_KEY",
        "请等待，或在 INFOWAY_API_KEY 中增加密钥",
    ),
    "cli.waiting": (
        "{commands} commands, {results} results to deliver",
        "{commands} 条指令待执行，{results} 条结果待送达",
    ),
    "cli.waits_to_connect": ("waiting", "等待重连"),
    "cli.well": ("well", "正常"),
    "cli.without_daemon": ("no daemon", "守护进程未运行"),
    "cli.would_migrate": (
        "settings: {file}; nothing was written: --dry-run",
        "设置：{file}；未写入任何内容：--dry-run",
    ),
    "cli.wrong": ("something is wrong", "有问题"),
    "cli.wrong_to_do": ("{status}: {wrong}. To do: {to_do}", "{status}：{wrong}。处理办法：{to_do}"),
}


if __name__ == "__main__":
    main()
