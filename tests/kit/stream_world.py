"""What the faults of the stream are made of: collectors between the whole API and MongoDB, and the account.

It is known which trades the market made, and what each connection was pushed. The account is then "every trade is
stored, once, but for those of which a document in `stream_gaps` says that they may be missing".
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pymongo

import stockrt
from kit.daemons import PATIENCE, ProcessDaemon, until
from kit.fault_world import Account, Document, Rows, copied, rejects_of, rows_of, settle, spool_of
from kit.forked import Forked
from kit.infoway_server import PLANS, Plan
from kit.stream_server import Gap, Push, Vendor, record_of, uncovered

FOREVER_MS = 1 << 62


def crypto_codes(number: int) -> list[str]:
    """So many codes of the market that never closes."""
    return [f"S{count:04d}USDT" for count in range(number)]


class StreamWorld:
    """The API, its stream included, and the collectors that are made of it, from `with` to its end.

    `mongo` is where the test finds MongoDB, and the name of the database.
    """

    def __init__(
        self,
        pyz: Path,
        base: Mapping[str, str],
        folder: Path,
        mongo: tuple[str, str],
        plan: Plan = PLANS["pro"],
        forked: Forked | None = None,
        **switches: Any,
    ) -> None:
        self.uri, self.database = mongo
        self.vendor = Vendor(plans={"test-key": plan}, rest={"record": False}, **switches)
        self.stream = self.vendor.stream
        self.collectors: list[ProcessDaemon] = []
        self._pyz, self._base, self._folder, self._forked = pyz, base, folder, forked

    def __enter__(self) -> Self:
        self.vendor.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for collector in self.collectors:
            collector.kill()
        self.vendor.__exit__(kind, error, trace)

    # --- collectors ---------------------------------------------------------------------------------------

    def collector(self, codes: Iterable[str], uri: str | None = None, **settings: str) -> ProcessDaemon:
        """Make another collector of these codes; it finds MongoDB at `uri`, with '' its store is the local file."""
        number = len(self.collectors)
        file = self._folder / f"codes{number}.txt"
        file.write_text("\n".join(codes), encoding="utf-8")
        own = {
            "COLLECT": "stream",
            "COLLECT_CODES": f"@{file}",
            "STATE_DIRECTORY": str(self._folder / f"state{number}"),
            "MONGODB_HOST": self.uri if uri is None else uri,
            "MONGODB_DB_NAME": self.database,
        }
        made = ProcessDaemon(
            self._base, self.vendor.settings | own | settings, self._pyz, forked=self._forked
        )
        self.collectors.append(made)
        return made

    def start(self, collector: ProcessDaemon, codes: int) -> None:
        """Start a collector, and wait until it has subscribed to so many codes."""
        before = len(self.stream.connections)
        collector.start()
        self.subscribed(codes, before)

    def subscribed(self, codes: int, after: int = 0) -> None:
        """Wait until the connections after this one are subscribed to so many codes."""
        with self._telling():
            self.stream.wait_for(
                lambda it: sum(len(one.codes) for one in it.connections[after:] if one.is_open) >= codes,
                PATIENCE,
            )

    def pushed(self, count: int) -> None:
        """Wait until so many trades more were pushed."""
        before = self.stream.pushed_count
        with self._telling():
            self.stream.wait_for(lambda it: it.pushed_count >= before + count, PATIENCE)

    def stop(self, collector: ProcessDaemon) -> None:
        """SIGTERM, and wait for the end in good order."""
        assert collector.process is not None
        collector.process.terminate()
        assert collector.wait() == 0, collector.log[-3000:]

    @contextlib.contextmanager
    def _telling(self) -> Any:
        """Say what the collectors have said where a wait is in vain."""
        try:
            yield
        except TimeoutError as error:
            logs = "\n".join(collector.log[-2000:] for collector in self.collectors)
            raise AssertionError(f"{error}\n{logs}") from None

    # --- what is where ------------------------------------------------------------------------------------

    def client(self) -> pymongo.MongoClient[Document]:
        """A new client of MongoDB itself; the caller closes it."""
        return pymongo.MongoClient(self.uri, serverSelectionTimeoutMS=30_000)

    def stored(self) -> Rows:
        """The trades that MongoDB has."""
        with self.client() as client:
            return list(client[self.database]["realtime"].find({"_id": {"$ne": stockrt.PROBE}}))

    def wait_stored(self, names: Collection[str]) -> None:
        """Wait until MongoDB has these trades."""
        with self.client() as client:
            realtime = client[self.database]["realtime"]

            def are_there() -> bool:
                return realtime.count_documents({"_id": {"$in": [*names]}}) == len(names)

            assert until(are_there), "\n".join(collector.log[-3000:] for collector in self.collectors)

    def gaps(self) -> list[Gap]:
        """The gaps that MongoDB has been told of."""
        with self.client() as client:
            return [gap_of(row) for row in client[self.database]["stream_gaps"].find()]

    def local(self, collector: ProcessDaemon, read: Callable[[Path], Rows]) -> Rows:
        """What a collector's local file has."""
        path = collector.state / "stockrt.db"
        if not path.exists():
            return []
        if collector.process is not None and collector.process.poll() is None:
            return read(path)
        with copied(path) as copy:
            return read(copy)

    def is_drained(self) -> bool:
        """Whether no collector keeps anything that MongoDB has not been told, gaps included."""
        try:
            return not any(self.local(it, spool_of) or self.local(it, undelivered) for it in self.collectors)
        except sqlite3.Error:
            return False

    # --- the account --------------------------------------------------------------------------------------

    def quiesce(self) -> None:
        """Let the market rest, and wait until MongoDB has the last trade of each subscribed code, and all else."""
        self.stream.rate = 0.0
        self.wait_stored(self.stream.trade(*sorted(self.stream.subscribed)))
        assert until(self.is_drained, 2 * PATIENCE), "\n".join(it.log[-3000:] for it in self.collectors)

    def promised(self) -> list[Push]:
        """What a reader expects: each trade that the market made of a code since the first that was pushed of it."""
        first: dict[str, Push] = {}
        for push in self.stream.pushes():
            first.setdefault(push.code, push)
        made = (first[code]._replace(identity=name) for name in self.stream.made()
                if (code := name.partition("|")[0]) in first)  # fmt: skip
        return [push for push in made if push.t >= first[push.code].t]

    def account(self) -> Account:
        """Make the account: "acknowledged" is what a reader expects, but for what lies in a gap."""
        gaps = self.gaps()
        stored = self.stored()
        kept = [
            row for it in self.collectors for read in (spool_of, rejects_of) for row in self.local(it, read)
        ]
        expected = self.promised()
        outside = {push.identity for push in uncovered(expected, gaps)}
        made = {name: record_of(name) for name in self.stream.made()}
        account = settle(outside, made, stored, kept)
        told = f"{len(expected)} made, {len(outside)} outside of {len(gaps)} gaps, {len(stored)} stored"
        assert len(outside) > len(expected) // 50, f"the gaps take in nearly everything: {told}"
        return account


def gap_of(document: Mapping[str, Any]) -> Gap:
    """A document of `stream_gaps`, or a row of the local file's table."""
    codes = document["codes"]
    names = frozenset(json.loads(codes) if isinstance(codes, str) else codes)
    end = document["to"]
    return Gap(
        document["product"],
        names,
        document["from"],
        FOREVER_MS if end is None else end,
    )


def undelivered(path: Path) -> Rows:
    """The gaps of a local file that MongoDB does not have as they are."""
    return rows_of(path, "stream_gaps", "NOT delivered")
