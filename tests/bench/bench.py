"""Measures stockrt against what anyone would write first, and against the vendor's SDK, side by side.

    ./build_pyz.sh bench                    # builds, measures for some minutes, exits 1 when a target is missed
    python tests/bench/bench.py --short           # proves that it runs: a few rounds, no target counts
    python tests/bench/bench.py --write-readme    # the table into README.md, the picture to tests/bench/bench.svg

All in one run on loopback, rounds interleaved A B A B, medians of at least 15 with minimum and maximum. The
API and the null MongoDB are processes of their own and as cheap as they can be, so that the client is what is
measured; each contender is a process too, warm, and only its own processor time counts for it.

Trades are of now, at a market whose session of today is not over, and new in every round.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import platform
import py_compile
import re
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from zoneinfo import ZoneInfo

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent
ROOT = TESTS.parent
for folder in (ROOT, TESTS):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from bench.quick_stream import Feed  # noqa: E402 - found by the path above

KEY = "test-key"
CHUNK = 100  # codes a request, as the API has it
README = ROOT / "README.md"
PICTURE = HERE / "bench.svg"
MB = 1_000_000


# ------------------------------------------------------------------------------------------------------
# What is measured how often
# ------------------------------------------------------------------------------------------------------


class Size(NamedTuple):
    """How much is measured; the short form only proves that it runs."""

    rounds: int
    codes: int
    many_codes: int
    executes: int
    limited_requests: int
    idle_s: float
    spooled: int
    pushes: int
    pushed_s: float
    burst: int


FULL = Size(
    rounds=21, codes=5_000, many_codes=100_000, executes=300, limited_requests=50, idle_s=60, spooled=20_000,
    pushes=100_000, pushed_s=30, burst=200_000,
)  # fmt: skip
SHORT = Size(
    rounds=2, codes=300, many_codes=2_000, executes=4, limited_requests=12, idle_s=1, spooled=500,
    pushes=3_000, pushed_s=1, burst=5_000,
)  # fmt: skip
FEW_CODES = 1_000  # what `many_codes` is compared with
EXECUTE_CODES = 50
LATENCY_MS = 50
FLOOR_THREADS = 8
PER_SECOND = 10
MODULE_HASH = "1234567890"
SHOWN_CODES = 50
STREAM_CODES = 200
STREAM_RATE = 2_000  # trades a second, of all of them
SILENT_CODES, SILENT_CONNECTIONS = 5_000, 9
BATCH = 1_000  # pushes that the bare loop inserts at once
POLL_S, SETTLED_S = 0.01, 1.0
PATIENCE_S = 120.0


@dataclass
class Row:
    """One line of the table. `limit` None: told beside the targets, none itself; `reached` None: not measured."""

    name: str
    chinese: str
    reached: float | None
    limit: float | None = None
    at_least: bool = False
    unit: str = ""
    detail: str = ""

    @property
    def missed(self) -> bool:
        """Whether a target is not reached."""
        if self.limit is None or self.reached is None:
            return False
        return self.reached < self.limit if self.at_least else self.reached > self.limit

    @property
    def target(self) -> str:
        """The target as the table has it."""
        return (
            "" if self.limit is None else f"{'≥' if self.at_least else '≤'} {_shown(self.limit, self.unit)}"
        )

    @property
    def shown(self) -> str:
        """What was reached."""
        if self.reached is None:
            return "not measured"
        return _shown(self.reached, self.unit) + (" MISSED" if self.missed else "")

    @property
    def used(self) -> float | None:
        """The share of the target's room that is used: 1 is the limit, less is better; None: it has no room."""
        if not self.limit or self.reached is None:
            return None
        return self.limit / self.reached if self.at_least else self.reached / self.limit


def _shown(number: float, unit: str) -> str:
    digits = (
        0 if not number or abs(number) >= 1000 else 3 if abs(number) < 0.1 else 2 if abs(number) < 10 else 1
    )
    return f"{number:,.{digits}f}{' ' + unit if unit else ''}"


def spread(values: Sequence[float], digits: int = 0, scale: float = 1) -> str:
    """Return a median with minimum and maximum."""
    low, middle, high = (
        f"{value * scale:,.{digits}f}" for value in (min(values), statistics.median(values), max(values))
    )
    return f"{middle} ({low}-{high})"


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that this share of the values does not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * share) - 1)]


# ------------------------------------------------------------------------------------------------------
# Contenders
# ------------------------------------------------------------------------------------------------------


class Contender(Protocol):
    """Fetches codes and stores their trades."""

    def run(self, codes: list[str]) -> None:
        """Do it once; whatever is not stored is an error."""


class Floor:
    """What anyone would write first: urllib3, json, insert_many in chunks of 100, on some threads."""

    def __init__(self, url: str, mongodb: str, threads: int = 1) -> None:
        import pymongo
        import urllib3

        self.url = url
        self.http = urllib3.PoolManager(maxsize=threads)
        self.trades = pymongo.MongoClient[dict[str, Any]](mongodb).bench.floor
        self.threads = ThreadPoolExecutor(threads) if threads > 1 else None

    def run(self, codes: list[str]) -> None:
        chunks = [codes[at : at + CHUNK] for at in range(0, len(codes), CHUNK)]
        for _ in self.threads.map(self.fetch, chunks) if self.threads else map(self.fetch, chunks):
            pass

    def fetch(self, codes: list[str]) -> None:
        path = f"{self.url}/stock/batch_trade/{','.join(codes)}"
        answer = self.http.request("GET", path, headers={"apiKey": KEY})
        now = datetime.now(UTC)
        records = json.loads(answer.data)["data"]
        self.trades.insert_many([{**r, "stock_code": r["s"], "create_time": now} for r in records])


class Sdk:
    """The vendor's SDK and insert_many, serial."""

    def __init__(self, url: str, mongodb: str) -> None:
        import pymongo
        from infoway import InfowayClient  # type: ignore[import-untyped]

        self.client = InfowayClient(KEY, base_url=url)
        self.trades = pymongo.MongoClient[dict[str, Any]](mongodb).bench.sdk

    def run(self, codes: list[str]) -> None:
        for at in range(0, len(codes), CHUNK):
            now = datetime.now(UTC)
            records = self.client.stock.get_trade(",".join(codes[at : at + CHUNK]))
            self.trades.insert_many([{**r, "stock_code": r["s"], "create_time": now} for r in records])


class Ours:
    """The collector with all that the daemon gives it; `more` are settings."""

    def __init__(self, url: str, mongodb: str, state: str, **more: str) -> None:
        import stockrt

        stockrt.look_for_cycles_seldom()
        environ = {"INFOWAY_API_KEY": KEY, "INFOWAY_API_BASE_URL": url, "INFOWAY_PLAN": "0",
                   "MONGODB_HOST": mongodb, "STATE_DIRECTORY": state}  # fmt: skip
        settings = stockrt.load_settings(environ | more, None, (), is_root=False).settings
        self.service = stockrt.Service(settings, stockrt.Notifier())
        self.pipeline = stockrt.Pipeline(settings, events=self.service)
        self.stop = threading.Event()

    def run(self, codes: list[str]) -> None:
        report = self.pipeline.run(codes, self.stop)
        if not report.complete or report.total != len(codes):
            raise RuntimeError(f"not all is stored: {report.summary()} {report.store_error}")
        self.service.executed(report)
        self.pipeline.keys.describe()


def collect_bare(url: str, mongodb: str, codes: Sequence[str]) -> None:
    """What anyone would write first for the stream, until it is killed: websocket-client, json, insert_many."""
    import pymongo
    import websocket

    trades = pymongo.MongoClient[dict[str, Any]](mongodb).bench.floor
    ws = websocket.create_connection(f"{url}?business=crypto&apikey={KEY}")
    ws.recv()
    for at in range(0, len(codes), CHUNK):
        ws.send(
            json.dumps({"code": 10000, "trace": str(at), "data": {"codes": ",".join(codes[at : at + CHUNK])}})
        )
        ws.recv()
    batch = []
    while True:
        record = json.loads(ws.recv())["data"]
        batch.append({**record, "stock_code": record["s"], "create_time": datetime.now(UTC)})
        if len(batch) == BATCH:
            trades.insert_many(batch)
            batch.clear()


CONTENDERS: dict[str, Callable[..., Contender]] = {"floor": Floor, "sdk": Sdk, "ours": Ours}


Spec = tuple[str, dict[str, Any]]  # a contender's kind and its arguments


def make_codes(market: str, number: int) -> list[str]:
    """Return codes of a market, `US` or `SH`: the same ones for the same numbers."""
    if market == "SH":
        return [f"{600_000 + n}.SH" for n in range(number)]
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    return ["".join(letters[n // 26**place % 26] for place in (3, 2, 1, 0)) + ".US" for n in range(number)]


def open_market(now: datetime) -> str:
    """Return a market whose session of its own today is not over, nor will be within half an hour."""
    york = now.astimezone(ZoneInfo("America/New_York"))
    return "US" if (york.hour, york.minute) < (15, 30) else "SH"


class Round(NamedTuple):
    """One run of a contender: seconds, seconds of its processor, and its memory's peak so far in bytes."""

    wall: float
    cpu: float
    peak: int


def work(pipe: Connection, kind: str, arguments: dict[str, Any]) -> None:
    """Be a contender in a process of its own: run what comes through the pipe until it ends."""
    contender = CONTENDERS[kind](**arguments)
    with contextlib.suppress(EOFError):
        while True:
            codes = make_codes(*pipe.recv())
            wall, cpu = time.perf_counter(), time.process_time()
            contender.run(codes)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            del codes  # or the next ones are made beside them
            pipe.send(Round(wall, cpu, _memory("self", "VmHWM")))
    os._exit(0)  # what is measured has been sent; pymongo's threads take half a second to end


class Worker:
    """A contender's process, warm: it has run once."""

    def __init__(self, kind: str, market: str, **arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._market = market
        self._process = context.Process(target=work, args=(theirs, kind, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def run(self, codes: int) -> Round:
        """Let it fetch and store so many codes."""
        self._pipe.send((self._market, codes))
        done: Round = self._pipe.recv()
        return done

    def close(self) -> None:
        """End it."""
        self._pipe.close()
        self._process.join(10)
        self._process.kill()


def unit_environment() -> dict[str, str]:
    """Return what the unit sets for the program, but for where it unpacks itself."""
    lines = (ROOT / "stockrt.service").read_text().splitlines()
    words = [
        word for line in lines if line.startswith("Environment=") for word in line.split("=", 1)[1].split()
    ]
    return {name: value for name, _, value in (word.partition("=") for word in words) if name != "SHIV_ROOT"}


def _memory(process: int | str, name: str) -> int:
    """Return bytes: VmRSS, what is resident now, or VmHWM, the most that was."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0]) * 1024


def _cpu_seconds(process: int) -> float:
    """Return the processor time of all threads of a process, far finer than the kernel's ticks."""
    threads = Path(f"/proc/{process}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


# ------------------------------------------------------------------------------------------------------
# The bench
# ------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """The servers, the sizes, and what was measured; `close` ends what was started."""

    size: Size
    pyz: Path
    folder: Path
    say: Callable[[str], None]
    rows: list[Row] = field(default_factory=list)
    speeds: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # title -> contender -> trades/s
    market: str = field(default_factory=lambda: open_market(datetime.now(UTC)))

    def __post_init__(self) -> None:
        self._open = contextlib.ExitStack()
        self._api = f"http://127.0.0.1:{self._serve('quick_infoway')}"
        self._null = f"mongodb://127.0.0.1:{self._serve('null_mongo')}/"
        self._states = 0
        self._trade_time = 0

    def close(self) -> None:
        """End all processes."""
        self._open.close()

    def run(self) -> None:
        """Measure everything."""
        for measure in (self.throughput, self.closed_markets, self.real_server, self.latency, self.rate_limit,
                        self.idle, self.executes, self.waits, self.many_codes, self.views, self.spool,
                        self.stream, self.stream_on_file, self.stream_delay, self.stream_silent,
                        self.stream_burst):  # fmt: skip
            self.say(f"{measure.__name__.replace('_', ' ')} …")
            measure()

    # --- what it is made of --------------------------------------------------------------------------

    def _serve(self, module: str) -> int:
        process = subprocess.Popen(
            [sys.executable, "-B", str(HERE / f"{module}.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._open.callback(process.wait)
        self._open.callback(process.kill)
        assert process.stdout is not None
        return int(process.stdout.readline())

    def _state(self) -> str:
        self._states += 1
        return str(self.folder / f"state{self._states}")

    def _set(self, name: str, value: int) -> None:
        from bench.quick_infoway import control

        control(self._api, name, value)

    @contextlib.contextmanager
    def _workers(self, specs: dict[str, Spec], market: str = "") -> Iterator[dict[str, Worker]]:
        """Start contenders, a process each."""
        workers = {
            name: Worker(kind, market or self.market, **arguments)
            for name, (kind, arguments) in specs.items()
        }
        try:
            yield workers
        finally:
            for worker in workers.values():
                worker.close()

    def _new_trades(self, before: timedelta = timedelta()) -> None:
        """Let all codes have another trade, of now or of a time before."""
        now = int((time.time() - before.total_seconds()) * 1000)
        self._trade_time = max(now, self._trade_time + 1) if not before else now
        self._set("t", self._trade_time)

    def _interleaved(
        self, workers: dict[str, Worker], codes: dict[str, int], before: timedelta = timedelta()
    ) -> dict[str, list[Round]]:
        """Run all contenders in turn, once to warm up and then the rounds."""
        rounds: dict[str, list[Round]] = {name: [] for name in workers}
        for number in range(self.size.rounds + 1):
            for name, worker in workers.items():
                self._new_trades(before)
                done = worker.run(codes[name])
                if number:
                    rounds[name].append(done)
        return rounds

    def _against_null(self) -> dict[str, Any]:
        return {"url": self._api, "mongodb": self._null}

    def _ours(self, **more: str) -> Spec:
        return "ours", self._against_null() | {"state": self._state(), **more}

    def _speeds(self, title: str, rounds: dict[str, list[Round]]) -> dict[str, list[float]]:
        found = {name: [self.size.codes / one.wall for one in done] for name, done in rounds.items()}
        self.speeds[title] = found
        return found

    def _compare(self, values: dict[str, list[float]], ours: str = "ours", floor: str = "floor") -> float:
        """Return the median of the ratios of neighbouring rounds: what slows the machine down slows both."""
        return statistics.median(a / b for a, b in zip(values[ours], values[floor], strict=True))

    # --- rows ----------------------------------------------------------------------------------------

    def throughput(self) -> None:
        """No latency: trades a second, and processor time."""
        every = self._against_null()
        codes = dict.fromkeys(("floor", "sdk", "ours"), self.size.codes)
        with self._workers(
            {"floor": ("floor", every), "sdk": ("sdk", every), "ours": self._ours()}
        ) as workers:
            rounds = self._interleaved(workers, codes)
        speeds = self._speeds("no latency", rounds)
        self.rows.append(Row(
            f"throughput, no latency, {self.size.codes:,} codes", f"吞吐量，无延迟，{self.size.codes:,} 个代码",
            self._compare(speeds), 1.0, True, "x floor", _trades(speeds),
        ))  # fmt: skip
        cpu = {name: [one.cpu / self.size.codes * 100_000 for one in done] for name, done in rounds.items()}
        self.rows.append(Row(
            "CPU per 100,000 trades", "每 100,000 笔成交的 CPU 时间",
            self._compare(cpu), 1.05, False, "x floor",
            "; ".join(f"{name} {spread(times, 2)} s" for name, times in cpu.items()),
        ))  # fmt: skip

    def closed_markets(self) -> None:
        """The same where every trade is new and of a session that is over: each makes a close."""
        codes = dict.fromkeys(("floor", "ours"), self.size.codes)
        with self._workers({"floor": ("floor", self._against_null()), "ours": self._ours()}) as workers:
            rounds = self._interleaved(workers, codes, timedelta(days=7))
        speeds = self._speeds("after the close", rounds)
        self.rows.append(Row(
            "  each trade new and of a session that is over, its close written too",
            "  每笔均为已收盘时段的新成交，并写入收盘价",
            self._compare(speeds), None, True, "x floor", _trades(speeds),
        ))  # fmt: skip

    def real_server(self) -> None:
        """The same into the MongoDB server of the tests."""
        from kit.mongo import Unavailable, find_server, fresh_database

        name = "  into a real server: "
        try:
            server = find_server()
        except Unavailable as error:
            self.rows.append(Row(name + str(error), f"  写入真实服务器：{error}", None))
            return
        with server, fresh_database(server) as (uri, database):
            title = server.name
            ours = {"mongodb": uri, "MONGODB_DB_NAME": database}
            specs = {"floor": ("floor", self._against_null() | {"mongodb": uri}),
                     "sdk": ("sdk", self._against_null() | {"mongodb": uri}),
                     "ours": ("ours", self._ours()[1] | ours)}  # fmt: skip
            codes = dict.fromkeys(specs, self.size.codes)
            with self._workers(specs) as workers:
                rounds = self._interleaved(workers, codes)
            with server.client() as client:
                client.drop_database("bench")
        speeds = self._speeds(title, rounds)
        self.rows.append(Row(
            name + title, f"  写入真实服务器：{title}",
            self._compare(speeds), None, True, "x floor", _trades(speeds),
        ))  # fmt: skip

    def latency(self) -> None:
        """An API that takes 50 ms for every answer."""
        every = self._against_null()
        names = {
            "floor": ("floor", every | {"threads": FLOOR_THREADS}),
            "sdk": ("sdk", every),
            "ours": self._ours(),
        }
        self._set("latency", LATENCY_MS)
        with self._workers(names) as workers:
            rounds = self._interleaved(workers, dict.fromkeys(names, self.size.codes))
        self._set("latency", 0)
        speeds = self._speeds(f"API latency {LATENCY_MS} ms", rounds)
        self.rows.append(Row(
            f"throughput, API latency {LATENCY_MS} ms", f"吞吐量，API 延迟 {LATENCY_MS} 毫秒",
            self._compare(speeds), 2.0, True, f"x floor with {FLOOR_THREADS} threads", _trades(speeds),
        ))  # fmt: skip

    def rate_limit(self) -> None:
        """A plan of 10 requests a second: how near to the least time that it permits, and never above it."""
        requests = self.size.limited_requests
        least = float((requests - 1) // PER_SECOND)  # the tenth request of a second opens the next
        over = asked = 0
        for shared, words, chinese in (
            (True, f"rate-limited ({PER_SECOND}/s, {requests} requests): wall",
             f"限频（每秒 {PER_SECOND} 次，{requests} 次请求）：耗时"),
            (False, "  counted on this machine alone, without MongoDB", "  不用 MongoDB，只在本机计数"),
        ):  # fmt: skip
            walls, refused = self._limited_walls(requests, {} if shared else {"mongodb": ""})
            over, asked = over + refused, asked + len(walls) * requests
            self.rows.append(Row(
                words, chinese, statistics.median(walls) / least, 1.05 if shared else None, False,
                "x the least possible", f"{spread(walls, 2)} s where {requests} requests take {least:.0f} s at least",
            ))  # fmt: skip
        self.rows.append(Row(
            "rate-limited: answers over the limit", "限频：超限应答数", over, 0, False, "", f"of {asked}",
        ))  # fmt: skip

    def _limited_walls(self, requests: int, more: dict[str, str]) -> tuple[list[float], int]:
        from kit.infoway_server import InfowayServer

        walls = []
        with InfowayServer(per_second=PER_SECOND) as server:
            ours = self._ours(url=server.url, INFOWAY_PLAN=str(PER_SECOND), **more)
            with self._workers({"ours": ours}, "US") as workers:
                for _ in range(max(2, self.size.rounds * 5 // 7)):
                    time.sleep(1.1)  # until the windows of the round before are empty
                    server.bump()
                    walls.append(workers["ours"].run(requests * CHUNK).wall)
            return walls, server.over_limit

    def idle(self) -> None:
        """The daemon, connected and with nothing to do: memory and processor time."""
        from kit.platform_server import PlatformServer

        environ = self._registered()
        with PlatformServer("new") as server:
            server.know(MODULE_HASH)
            with self._daemon(environ, server.port) as daemon:
                if not server.wait_for(lambda s: s.connected, 30):
                    raise RuntimeError("the daemon does not connect")
                self._look_at(daemon.pid)

    def executes(self) -> None:
        """The daemon: from execute to result, with an API that answers at once and with one that takes its time."""
        from bench.quick_platform import QuickPlatform

        environ = self._registered()
        with QuickPlatform() as server, self._daemon(environ, server.port) as daemon:
            server.connect()
            with self._workers({"floor": ("floor", self._against_null())}) as workers:
                delays, floor = self._execute_times(server, workers["floor"], self.size.executes, "e")
                resident = _memory(daemon.pid, "VmRSS")
                self._set("latency", LATENCY_MS)
                slow, slow_floor = self._execute_times(
                    server, workers["floor"], max(2, self.size.executes // 5), "s"
                )
                self._set("latency", 0)
        own, slow_own = statistics.median(floor), statistics.median(slow_floor)
        detail = "{} ms; the floor's fetch and insert {} ms"
        self.rows += [
            Row(f"execute to result, {EXECUTE_CODES} codes, no latency: p50",
                f"从收到执行命令到返回结果，{EXECUTE_CODES} 个代码，无延迟：p50",
                statistics.median(delays) / own, 3.0, False, "x the floor's own",
                detail.format(spread(delays, 2, 1000), spread(floor, 2, 1000))),
            Row(f"execute to result, {EXECUTE_CODES} codes: p99",
                f"从收到执行命令到返回结果，{EXECUTE_CODES} 个代码：p99",
                percentile(delays, 0.99) / own, 5.0, False, "x the floor's own p50",
                f"{percentile(delays, 0.99) * 1000:.2f} ms"),
            Row(f"execute to result, {EXECUTE_CODES} codes, API latency {LATENCY_MS} ms: p50",
                f"从收到执行命令到返回结果，{EXECUTE_CODES} 个代码，API 延迟 {LATENCY_MS} 毫秒：p50",
                statistics.median(slow) / slow_own, 1.2, False, "x the floor's own",
                detail.format(spread(slow, 2, 1000), spread(slow_floor, 2, 1000))),
            Row("resident memory after the executes of 50 codes", "多次执行（每次 50 个代码）后的常驻内存",
                resident / MB, 42, False, "MB"),
        ]  # fmt: skip

    def _execute_times(
        self, server: Any, floor: Worker, number: int, name: str
    ) -> tuple[list[float], list[float]]:
        """Return the seconds of each execute and of the floor's own run beside it, the first few left out."""
        delays: list[float] = []
        walls: list[float] = []
        for count in range(number + 3):
            self._new_trades()
            done = server.execute(f"{name}{count}", make_codes(self.market, EXECUTE_CODES))
            if done.data["result"]["success_count"] != EXECUTE_CODES:
                raise RuntimeError(f"not all is stored: {done.data}")
            self._new_trades()
            wall = floor.run(EXECUTE_CODES).wall
            if count >= 3:  # warm
                delays.append(done.took)
                walls.append(wall)
        return delays, walls

    def _registered(self) -> dict[str, str]:
        """Return the environment of a daemon: registered, unpacked and compiled, as at every start but the first."""
        environ = unit_environment() | self._environ() | {"SERVER_IP": "127.0.0.1"}
        Path(environ["STATE_DIRECTORY"]).mkdir()
        Path(environ["STATE_DIRECTORY"], "module_hash").write_text(MODULE_HASH)
        self._warm(environ)
        return environ

    @contextlib.contextmanager
    def _daemon(self, environ: dict[str, str], port: int = 0) -> Iterator[subprocess.Popen[bytes]]:
        """Run the daemon; 0: it has no platform."""
        with (self.folder / "daemon.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, str(self.pyz)],
                env=environ | ({"SERVER_PORT": str(port)} if port else {}),
                cwd=self.folder,
                stdout=log,
                stderr=log,
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def _warm(self, environ: dict[str, str]) -> None:
        """Let the program be unpacked and all its modules compiled."""
        for command in ([str(self.pyz), "--version"], ["-m", "compileall", "-q", environ["SHIV_ROOT"]]):
            subprocess.run([sys.executable, *command], env=environ, check=True, capture_output=True)

    def _environ(self) -> dict[str, str]:
        return {"PATH": os.defpath, "HOME": str(self.folder), "SHIV_ROOT": str(self.folder / "shiv"), "LANG": "C.UTF-8",
                "INFOWAY_API_KEY": KEY, "INFOWAY_API_BASE_URL": self._api, "INFOWAY_PLAN": "0",
                "MONGODB_HOST": self._null, "STATE_DIRECTORY": self._state()}  # fmt: skip

    def _look_at(self, pid: int) -> None:
        time.sleep(min(3.0, self.size.idle_s))  # what a start leaves to be done is done
        before, began = _cpu_seconds(pid), time.monotonic()
        time.sleep(self.size.idle_s)
        used = (_cpu_seconds(pid) - before) * 60 / (time.monotonic() - began)
        self.rows += [
            Row("resident memory, idle and connected, nothing executed yet", "常驻内存，空闲且已连接，尚未执行",
                _memory(pid, "VmRSS") / MB, 26, False, "MB"),
            Row("CPU while idle and connected", "空闲且已连接时的 CPU 时间", used, 0.02, False, "s a minute",
                f"looked at for {self.size.idle_s:.0f} s"),
        ]  # fmt: skip

    def waits(self) -> None:
        """What a person waits for at the command line."""
        environ = self._environ()
        self._warm(environ)
        python = [sys.executable]
        commands = {
            "once": [*python, str(self.pyz), "--once", "--codes", make_codes(self.market, 1)[0]],
            "imports": [*python, "-c", "import pymongo, urllib3"],
            "version": [*python, str(self.pyz), "--version"],
            "pass": [*python, "-c", "pass"],
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        for number in range(self.size.rounds + 1):
            for name, command in commands.items():
                self._new_trades()
                began = time.perf_counter()
                subprocess.run(command, env=environ, cwd=self.folder, check=True, capture_output=True)
                if number:
                    times[name].append(time.perf_counter() - began)
        middle = {name: statistics.median(taken) for name, taken in times.items()}
        for ours, theirs, limit, words, chinese in (
            ("once", "imports", 2.0, "./stockrt.pyz --once with MongoDB, one code, warm",
             "./stockrt.pyz --once 写入 MongoDB，一个代码，已预热"),
            ("version", "pass", 6.0, "./stockrt.pyz --version, warm", "./stockrt.pyz --version，已预热"),
        ):  # fmt: skip
            than = f"-c '{commands[theirs][2]}'"
            self.rows.append(Row(
                words, chinese, middle[ours] / middle[theirs], limit, False, f"x python3 {than}",
                f"{spread(times[ours], 0, 1000)} ms, {spread(times[theirs], 0, 1000)} ms",
            ))  # fmt: skip

    def many_codes(self) -> None:
        """A hundred thousand codes against a thousand: memory, and time per code."""
        few, many = FEW_CODES, self.size.many_codes
        repeats = max(1, many // few // 5)
        with self._workers({"few": self._ours(), "many": self._ours()}) as workers:
            times: dict[str, list[float]] = {"few": [], "many": []}
            peaks = {}
            for number in range(max(2, self.size.rounds * 5 // 7) + 1):
                self._new_trades()
                each = []
                for _ in range(repeats):
                    self._new_trades()
                    done = workers["few"].run(few)
                    each.append(done.wall / few)
                peaks["few"] = done.peak
                done = workers["many"].run(many)
                peaks["many"] = done.peak
                if number:
                    times["few"].append(statistics.median(each))
                    times["many"].append(done.wall / many)
        ratio = statistics.median(times["many"]) / statistics.median(times["few"])
        self.rows += [
            Row(f"memory at {many:,} codes against {few:,}", f"{many:,} 个代码相比 {few:,} 个代码的内存增量",
                (peaks["many"] - peaks["few"]) / MB, 10, False, "MB more",
                f"peaks {peaks['few'] / MB:.1f} MB and {peaks['many'] / MB:.1f} MB"),
            Row(f"time per code from {few:,} to {many:,} codes", f"从 {few:,} 到 {many:,} 个代码，每个代码的耗时",
                ratio, 1.1, False, "x",
                f"{spread(times['few'], 2, 1e6)} µs and {spread(times['many'], 2, 1e6)} µs"),
        ]  # fmt: skip

    def views(self) -> None:
        """What is stored, shown and exported by the program as a process of its own, from both stores."""
        from kit.mongo import Unavailable, find_server, fresh_database

        embedded = self._environ() | {"MONGODB_HOST": ""}
        self._warm(embedded)
        self._views_of("SQLite", embedded, self._fill_sqlite)
        try:
            server = find_server()
        except Unavailable as error:
            self.rows.append(Row(f"views of MongoDB: {error}", f"MongoDB 的视图：{error}", None))
            return
        with server, fresh_database(server) as (uri, database):
            environ = self._environ() | {"MONGODB_HOST": uri, "MONGODB_DB_NAME": database}
            self._views_of("MongoDB", environ, self._fill_mongodb)

    def _views_of(self, name: str, environ: dict[str, str], fill: Callable[[dict[str, str]], int]) -> None:
        stored = fill(environ)
        codes = make_codes(self.market, self.size.codes)
        few = codes[:: max(1, len(codes) // SHOWN_CODES)][:SHOWN_CODES]
        rounds = max(2, self.size.rounds // 3)
        shown = [self._timed(environ, "--show", *few)[0] for _ in range(rounds)]
        pages = [self._timed(environ, "--html", "page.html", "--codes", *few)[0] for _ in range(rounds)]
        size = (self.folder / "page.html").stat().st_size
        file = self.folder / "all.csv"
        exports = [self._timed(environ, "--export", str(file)) for _ in range(max(2, rounds // 2))]
        with file.open("rb") as lines:
            if sum(1 for _ in lines) != stored + 1:
                raise RuntimeError("the export does not have every trade")
        file.unlink()
        peaks = [peak for _, peak in exports]
        _, small = self._timed(environ, "--export", str(file), "--codes", *codes[: len(codes) // 5])
        speeds = [stored / wall for wall, _ in exports]
        self.rows += [
            Row(f"--show of {SHOWN_CODES} codes, {stored:,} trades in {name}",
                f"--show {SHOWN_CODES} 个代码，{name} 中有 {stored:,} 笔成交",
                statistics.median(shown), 0.5, False, "s", f"{spread(shown, 2)} s, the start of the program included"),
            Row(f"--html of {SHOWN_CODES} codes, from {name}", f"--html {SHOWN_CODES} 个代码，来自 {name}",
                statistics.median(pages), 3.0, False, "s", f"{spread(pages, 2)} s; {size / MB:.2f} MB"),
            Row(f"--export of all of it from {name}", f"从 {name} 中全部 --export",
                statistics.median(speeds), 100_000, True, "rows/s", f"{spread(speeds)} rows/s"),
            Row(f"  its memory's peak, {name}, above that of a fifth",
                f"  内存峰值（{name}），比只导出五分之一时多",
                (max(peaks) - small) / MB, 10, False, "MB", f"{max(peaks) / MB:.0f} MB"),
        ]  # fmt: skip

    def _timed(self, environ: dict[str, str], *arguments: str) -> tuple[float, int]:
        """Return how long the program takes (s), and its memory's peak (bytes)."""
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, str(self.pyz), *arguments],
            env=environ, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        peak = 0
        while (
            process.poll() is None
        ):  # what the system tells at the end counts this process before its exec, too
            with contextlib.suppress(OSError, AttributeError, IndexError, StopIteration):  # it has just ended
                peak = max(peak, _memory(process.pid, "VmHWM"))
            time.sleep(POLL_S)
        took = time.perf_counter() - began
        if process.returncode:
            raise RuntimeError(f"{arguments[0]} ends with {process.returncode}")
        return took, peak

    def _day(self) -> Iterator[list[dict[str, Any]]]:
        """Yield the documents of a day of all codes, as they would have come: a minute of all of them at once."""
        import stockrt

        created = stockrt.utc_now()
        codes = make_codes(self.market, self.size.codes)
        began = int(time.time() * 1000) - 24 * 3_600_000
        for minute in range(200 if self.size is FULL else 20):
            yield [
                stockrt.to_document(
                    stockrt.Trade(code, began + minute * 60_000 + n % 50_000, f"{100 + (n * minute) % 97}.{n % 100:02}",
                                  f"{n + 1}00", "36691.252", n % 3), created)
                for n, code in enumerate(codes)
            ]  # fmt: skip

    def _fill_sqlite(self, environ: dict[str, str]) -> int:
        """Store a day in the embedded store, and return how many trades that is."""
        import stockrt

        stored = 0
        with stockrt.open_store_file(Path(environ["STATE_DIRECTORY"])) as file:
            for documents in self._day():
                with file.write() as db:
                    stored += stockrt.insert_trades(db, documents).stored
        return stored

    def _fill_mongodb(self, environ: dict[str, str]) -> int:
        """Store a day in MongoDB, and return how many trades that is."""
        import stockrt

        store = stockrt.MongoStore(stockrt.load_settings(environ, None, (), is_root=False).settings)
        with contextlib.closing(store):
            return sum(store.write(documents).stored for documents in self._day())

    def spool(self) -> None:
        """The local file: written in transactions of 100, in memory (an fsync costs nothing) and on the disk."""
        places = {"in memory": Path("/dev/shm"), "on disk": self.folder}
        writes: dict[str, list[float]] = {name: [] for name in places}
        drains: dict[str, list[float]] = {"insert_many": [], **{name: [] for name in places}}
        for _ in range(max(2, self.size.rounds * 5 // 7)):
            documents = self._documents()
            drains["insert_many"].append(self._insert_many(documents, self._null, "bench"))
            for name, place in places.items():
                with tempfile.TemporaryDirectory(dir=place, prefix="stockrt-bench-") as folder:
                    written, drained = self._spooled(documents, folder, self._null, "bench")
                writes[name].append(written)
                drains[name].append(drained)
        self.rows.append(Row(
            "spool: write in transactions of 100, fsync excluded", "暂存队列：每 100 笔一个事务写入，不计 fsync",
            statistics.median(writes["in memory"]), 50_000, True, "trades/s",
            "; ".join(f"{name} {spread(found)}" for name, found in writes.items()),
        ))  # fmt: skip
        self._drain_to_real_server()
        self.rows.append(Row(
            "  into the null MongoDB", "  写入空 MongoDB",
            self._compare(drains, "on disk", "insert_many"), None, True, "x insert_many of 1,000", _trades(drains),
        ))  # fmt: skip

    def _drain_to_real_server(self) -> None:
        from kit.mongo import Unavailable, find_server, fresh_database

        names = "spool: drain from disk into a real server", "暂存队列：从磁盘写入真实服务器"
        speeds: dict[str, list[float]] = {"insert_many": [], "drain": []}
        try:
            server = find_server()
        except Unavailable:
            self.rows.append(Row(*names, None, 0.7, True, "x insert_many of 1,000"))
            return
        with server:
            title = server.name
            for _ in range(max(2, self.size.rounds * 5 // 7)):
                documents = self._documents()
                with fresh_database(server) as place:
                    speeds["insert_many"].append(self._insert_many(documents, *place))
                with (
                    fresh_database(server) as place,
                    tempfile.TemporaryDirectory(dir=self.folder, prefix="spool-") as folder,
                ):
                    speeds["drain"].append(self._spooled(documents, folder, *place)[1])
        self.rows.append(Row(
            *names, self._compare(speeds, "drain", "insert_many"), 0.7, True, "x insert_many of 1,000",
            f"{title}: {_trades(speeds)}",
        ))  # fmt: skip

    def _documents(self) -> list[dict[str, Any]]:
        import stockrt

        now = int(time.time() * 1000)
        created = stockrt.utc_now()
        codes = make_codes(self.market, self.size.spooled)
        return [
            stockrt.to_document(stockrt.Trade(code, now, "305.771", "12", "3669.252", 1), created)
            for code in codes
        ]

    def _insert_many(self, documents: list[dict[str, Any]], uri: str, database: str) -> float:
        """Return how many documents a second a client stores, with the index that ours has."""
        import pymongo

        with pymongo.MongoClient[dict[str, Any]](uri) as client:
            collection = client[database].floor
            collection.create_index([("stock_code", 1), ("t", -1)])
            began = time.perf_counter()
            for at in range(0, len(documents), 1000):
                collection.insert_many(documents[at : at + 1000])
            return len(documents) / (time.perf_counter() - began)

    def _spooled(
        self, documents: list[dict[str, Any]], folder: str, uri: str, database: str
    ) -> tuple[float, float]:
        """Return how many trades a second went into a spool, and out of it into MongoDB."""
        import stockrt

        environ = self._environ() | {
            "STATE_DIRECTORY": folder,
            "MONGODB_HOST": uri,
            "MONGODB_DB_NAME": database,
        }
        settings = stockrt.load_settings(environ, None, (), is_root=False).settings
        mongo, file = stockrt.MongoStore(settings), stockrt.open_store_file(Path(folder))
        closes = stockrt.ClosingPrices(mongo, stockrt.SessionsFile(file))
        queue = stockrt.DeliveryQueue(file, settings.spool_max_bytes)
        delivery = stockrt.Delivery(
            mongo, queue, stockrt.Rejects(file), stockrt.UnsettledTrades(file), closes
        )
        mongo.check()
        mongo.collection().create_index(stockrt.INDEX)
        began = time.perf_counter()
        for at in range(0, len(documents), CHUNK):
            queue.write(documents[at : at + CHUNK])
        written = time.perf_counter()
        delivery.deliver(threading.Event())
        drained = time.perf_counter()
        if delivery.moved != len(documents) or not delivery.is_empty():
            raise RuntimeError(f"{delivery.moved} of {len(documents)} were moved")
        mongo.close()
        file.close()
        return len(documents) / (written - began), len(documents) / (drained - written)

    # --- the stream ------------------------------------------------------------------------------------

    def stream(self) -> None:
        """One connection into the null MongoDB, against a bare loop: as fast as the socket gives them."""
        feeds, nulls = ([self._feed(), self._feed()], [self._own_null(), self._own_null()])
        codes = stream_codes(STREAM_CODES)
        process = multiprocessing.get_context("spawn").Process(
            target=collect_bare, args=(feeds[0].url, nulls[0], codes), daemon=True
        )
        process.start()
        speeds: dict[str, list[float]] = {"floor": [], "ours": []}
        try:
            with self._collector(feeds[1], codes, MONGODB_HOST=nulls[1]):
                counters = [feed_counter(null) for null in nulls]
                for feed in feeds:
                    feed.wait(STREAM_CODES)
                _settled(counters[1], STREAM_CODES)
                for number in range(max(2, self.size.rounds * 5 // 7) + 1):
                    for name, feed, counter in zip(speeds, feeds, counters, strict=True):
                        speed = _pushed(feed, counter, self.size.pushes)
                        if number:
                            speeds[name].append(speed)
        finally:
            process.kill()
            process.join()
        self.speeds["the stream"] = speeds
        self.rows.append(Row(
            "stream: one connection into the null MongoDB", "推送流：单个连接写入空 MongoDB",
            self._compare(speeds), 1.0, True, "x floor", _trades(speeds),
        ))  # fmt: skip

    def stream_on_file(self) -> None:
        """The same into the embedded store."""
        feed = self._feed()
        codes = stream_codes(STREAM_CODES)
        with self._collector(feed, codes, MONGODB_HOST="") as collector:
            feed.wait(STREAM_CODES)
            counter = FileCounter(collector.state / "stockrt.db")
            _settled(counter, STREAM_CODES)
            speeds = [
                _pushed(feed, counter, self.size.pushes) for _ in range(max(2, self.size.rounds // 3) + 1)
            ]
        self.rows.append(Row(
            "stream: one connection into the embedded store", "推送流：单个连接写入内置存储",
            statistics.median(speeds[1:]), 20_000, True, "trades/s", f"{spread(speeds[1:])} trades/s",
        ))  # fmt: skip

    def stream_delay(self) -> None:
        """From the push to the moment at which a reader of a real server is shown the trade as durable."""
        from kit.mongo import Unavailable, find_server, fresh_database

        names = (f"stream: push to durable, {STREAM_RATE:,} trades/s, real server", "推送流：从推送到落盘")
        chinese = f"推送流：从推送到落盘，每秒 {STREAM_RATE:,} 笔，真实服务器"
        try:
            server = find_server()
        except Unavailable:
            self.rows += [Row(f"{names[0]}: {what}", f"{chinese}：{what}", None, limit, False, "ms")
                          for what, limit in (("p50", 150), ("p99", 400))]  # fmt: skip
            return
        feed, codes = self._feed(), stream_codes(STREAM_CODES)
        with (
            server,
            fresh_database(server) as (uri, database),
            self._collector(feed, codes, MONGODB_HOST=uri, MONGODB_DB_NAME=database),
        ):
            feed.wait(STREAM_CODES)
            delays = _delays(feed, uri, database, self.size.pushed_s)
        detail = f"{spread(delays, 0)} ms of {len(delays):,} trades"
        self.rows += [
            Row(
                f"{names[0]}: {what}",
                f"{chinese}：{what}",
                percentile(delays, share),
                limit,
                False,
                "ms",
                told,
            )
            for what, share, limit, told in (("p50", 0.5, 150, detail), ("p99", 0.99, 400, ""))
        ]

    def stream_silent(self) -> None:
        """Many codes on all connections of a plan, and nothing comes: memory and processor time."""
        feed = self._feed("pro")
        codes = make_codes(closed_market(datetime.now(UTC)), SILENT_CODES)
        with self._collector(feed, codes) as collector:
            if (connections := feed.wait(SILENT_CODES)) != SILENT_CONNECTIONS:
                raise RuntimeError(f"{connections} connections")
            time.sleep(min(10.0, self.size.idle_s))  # what a start leaves to be done is done
            before, began = _cpu_seconds(collector.pid), time.monotonic()
            time.sleep(self.size.idle_s)
            used = (_cpu_seconds(collector.pid) - before) * 60 / (time.monotonic() - began)
            resident = _memory(collector.pid, "VmRSS")
        words = f"{SILENT_CODES:,} codes on {SILENT_CONNECTIONS} connections, market silent"
        chinese = f"{SILENT_CONNECTIONS} 个连接订阅 {SILENT_CODES:,} 个代码，行情静默"
        self.rows += [
            Row(f"stream: resident memory, {words}", f"推送流：{chinese}，常驻内存", resident / MB, 45, False, "MB"),
            Row(f"stream: CPU, {words}", f"推送流：{chinese}，CPU 时间", used, 0.05, False, "s a minute",
                f"looked at for {self.size.idle_s:.0f} s"),
        ]  # fmt: skip

    def stream_burst(self) -> None:
        """Far more at once than is stored in a second: none lost, and memory that does not grow with it."""
        feed, null, codes = self._feed(), self._own_null(), stream_codes(STREAM_CODES)
        with self._collector(feed, codes, MONGODB_HOST=null) as collector:
            feed.wait(STREAM_CODES)
            counter = feed_counter(null)
            _settled(counter, STREAM_CODES)  # a last trade of each, asked for over REST
            _pushed(feed, counter, BATCH)  # warm
            before, count = _memory(collector.pid, "VmRSS"), counter.count()
            speed = _pushed(feed, counter, self.size.burst)
            lost = count + self.size.burst - _settled(counter, count + self.size.burst)
            grown = _memory(collector.pid, "VmHWM") - before
        words, chinese = f"stream: a burst of {self.size.burst:,}", f"推送流：突发 {self.size.burst:,} 笔"
        self.rows += [
            Row(f"{words}: lost", f"{chinese}：丢失", lost, 0, False, "", f"{speed:,.0f} trades/s"),
            Row(f"{words}: memory", f"{chinese}：内存增量", grown / MB, 60, False, "MB more"),
        ]

    def _feed(self, plan: str = "") -> Feed:
        feed = Feed(plan)
        self._open.callback(feed.close)
        return feed

    def _own_null(self) -> str:
        return f"mongodb://127.0.0.1:{self._serve('null_mongo')}/"

    @contextlib.contextmanager
    def _collector(self, feed: Feed, codes: Sequence[str], **more: str) -> Iterator[Collector]:
        """Let the built file collect the stream as a daemon without a platform."""
        file = self.folder / f"codes{self._states}"
        file.write_text("\n".join(codes))
        environ = (
            unit_environment()
            | self._environ()
            | feed.settings
            | {"COLLECT": "stream", "COLLECT_CODES": f"@{file}"}
            | more
        )
        del environ["INFOWAY_PLAN"]
        self._warm(environ)
        with self._daemon(environ) as process:
            yield Collector(process.pid, Path(environ["STATE_DIRECTORY"]))


class Collector(NamedTuple):
    """A running collector."""

    pid: int
    state: Path


class Counter(Protocol):
    """Tells how many trades a store has."""

    def count(self) -> int:
        """Return their number."""


class FileCounter:
    """Of an embedded store; the number of its last row costs no look at the others."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def count(self) -> int:
        """Return their number."""
        with contextlib.closing(sqlite3.connect(f"file:{self._path}?mode=ro", uri=True, timeout=30)) as db:
            return int(db.execute("SELECT coalesce(max(seq), 0) FROM realtime").fetchone()[0])


def feed_counter(mongodb: str) -> Counter:
    """Return what counts the documents of a null MongoDB."""
    import pymongo

    collection = pymongo.MongoClient[dict[str, Any]](mongodb).bench.all

    class NullCounter:
        def count(self) -> int:
            return collection.estimated_document_count()

    return NullCounter()


def _pushed(feed: Feed, counter: Counter, number: int) -> float:
    """Push so many trades at once, and return how many a second were stored. Raises RuntimeError: not all were."""
    before = counter.count()
    began = feed.burst(number)
    while (left := before + number - counter.count()) > 0:
        if time.monotonic() > began + PATIENCE_S:
            raise RuntimeError(f"{left} of {number} pushes are not stored")
        time.sleep(POLL_S)
    return number / (time.monotonic() - began)


def _settled(counter: Counter, number: int) -> int:
    """Wait until a store has so many trades and gets no more, and return how many it has."""
    seen = -1
    until = time.monotonic() + PATIENCE_S
    while ((count := counter.count()) < number or count != seen) and time.monotonic() < until:
        seen = count
        time.sleep(SETTLED_S)
    return count


def _delays(feed: Feed, uri: str, database: str, seconds: float) -> list[float]:
    """Return the milliseconds from each push to when it is told as durable, of so many seconds of pushing."""
    import pymongo

    delays: list[float] = []
    with pymongo.MongoClient[dict[str, Any]](uri) as client:
        stages: list[dict[str, Any]] = [
            {"$match": {"operationType": "insert"}},
            {"$project": {"fullDocument.t": 1}},
        ]
        with client[database]["realtime"].watch(stages, max_await_time_ms=50, batch_size=1000) as changes:
            feed.rate(STREAM_RATE / STREAM_CODES)
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                change = changes.try_next()
                if change is not None:
                    delays.append(time.time() * 1000 - change["fullDocument"]["t"])
            feed.rate(0)
    return delays[len(delays) // 10 :]  # warm


def stream_codes(number: int) -> list[str]:
    """Return codes of the market that never closes."""
    return [f"S{n:04d}USDT" for n in range(number)]


def closed_market(now: datetime) -> str:
    """Return a market, `US` or `SH`, that is closed now, and before and after its hours too."""
    return "US" if now.astimezone(UTC).hour in range(1, 8) else "SH"


def _trades(speeds: dict[str, list[float]]) -> str:
    return "; ".join(f"{name} {spread(found)}" for name, found in speeds.items()) + " trades/s"


# ------------------------------------------------------------------------------------------------------
# Table, picture, README
# ------------------------------------------------------------------------------------------------------


def machine() -> str:
    """Return the kind of machine, and how busy it is."""
    models = re.findall(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return (
        f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, load {os.getloadavg()[2]:.1f}"
    )


def table(rows: Sequence[Row]) -> str:
    """Return the table for a terminal."""
    cells = [("", "target", "reached", "")] + [(row.name, row.target, row.shown, row.detail) for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[3]]).rstrip()
        for line in cells
    )


# The words of targets, results and details, longer ones first. floor, sdk, ours and insert_many are names.
IN_CHINESE = (
    (r"(.*) s where (\d+) requests take (\d+) s at least", r"\1 秒，\2 次请求至少需要 \3 秒"),
    (r"peaks (.*) and (.*)", r"峰值 \1 与 \2"),
    (r"of (\d+)$", r"共 \1 次应答"),
    (r" ms of ([\d,]+) trades", r" 毫秒，共 \1 笔"),
    (r"looked at for (\d+) s", r"观察 \1 秒"),
    (r"x floor with (\d+) threads", r"倍 floor（\1 线程）"),
    (r"x the floor's own p50", "倍 floor 自身的 p50"),
    (r"x the floor's own", "倍 floor 自身"),
    (r"the floor's fetch and insert", "floor 查询并写入："),
    (r"x the least possible", "倍理论最短耗时"),
    (r"x insert_many of 1,000", "倍 insert_many（每批 1,000 笔）"),
    (r"x python3", "倍 python3"),
    (r" x floor", " 倍 floor"),
    (r" x\b", " 倍"),
    (r"MB more", "MB"),
    (r" s a minute", " 秒/分钟"),
    (r"µs and ", "微秒与 "),
    (r"µs", "微秒"),
    (r" trades/s", " 笔/秒"),
    (r" rows/s", " 行/秒"),
    (r", the start of the program included", "，含程序启动"),
    (r"\bin memory\b", "内存"),
    (r"\bon disk\b", "磁盘"),
    (r"\bdrain\b", "从队列写入"),
    (r"\bnot measured\b", "未测量"),
    (r"\bMISSED\b", "（未达标）"),
    (r"(?<=[\d)]) s\b", " 秒"),
    (r"(?<=[\d)]) ms\b", " 毫秒"),
    (r"(?<=毫秒), ", "，"),
    (r", (\d+) cores, ", r"，\1 核，"),
    (r", load (?=\d)", "，负载 "),
    (r" (?=（)", ""),
    (r"(?<=：) ", ""),
    (r"; ", "；"),
    (r": (?=insert_many)", "："),
)


def in_chinese(cell: str) -> str:
    """Return a cell of the table, or the line under it, in Chinese."""
    for english, chinese in IN_CHINESE:
        cell = re.sub(english, chinese, cell)
    return cell


def markdown(rows: Sequence[Row], chinese: bool) -> str:
    """Return the table for the README, with the machine's kind under it."""
    heads = (
        ("", "目标", "结果", "中位数（最小-最大）")
        if chinese
        else ("", "target", "reached", "median (min-max)")
    )
    lines = [f"| {' | '.join(heads)} |", "|---|---|---|---|"]
    for row in rows:
        name = row.chinese if chinese else row.name
        told = name.startswith(" ")
        name = ("… " if told else "") + re.sub(
            r"(\./stockrt\.pyz --\w+|python3 -c .*)", r"`\1`", name.strip()
        )
        cells = (row.target, row.shown, row.detail)
        lines.append(f"| {name} | {' | '.join(map(in_chinese, cells) if chinese else cells)} |")
    return "\n".join([*lines, "", in_chinese(machine()) if chinese else machine()])


MARKS = re.compile(r"(<!-- bench (en|zh) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def with_tables(readme: str, rows: Sequence[Row]) -> str:
    """Return the README with the tables of these rows between its marks."""
    return MARKS.sub(lambda m: f"{m[1]}{markdown(rows, m[2] == 'zh')}\n{m[3]}", readme)


def draw(rows: Sequence[Row], speeds: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Draw throughput, and how much of each target's room is used; the same numbers give the same file."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "stockrt", "svg.fonttype": "none", "font.family": "sans-serif"}
    from matplotlib import pyplot

    measured = [(row, row.used) for row in rows if row.used is not None]
    figure, (left, right) = pyplot.subplots(2, 1, figsize=(9, 9), height_ratios=(2, 3), layout="constrained")
    colors = {"floor": "#9aa5b1", "sdk": "#e0b25c", "ours": "#3b7dd8"}
    for number, (name, color) in enumerate(colors.items()):
        found = [(place, s[name]) for place, s in enumerate(speeds.values()) if name in s]
        middles = [statistics.median(values) for _, values in found]
        ends = [[m - min(v) for m, (_, v) in zip(middles, found, strict=True)],
                [max(v) - m for m, (_, v) in zip(middles, found, strict=True)]]  # fmt: skip
        left.bar([place + (number - 1) * 0.27 for place, _ in found], middles, 0.25, yerr=ends, color=color,
                 label=name, capsize=2, ecolor="#333333")  # fmt: skip
    left.set_xticks(range(len(speeds)), list(speeds))
    left.set_ylabel("trades/s")
    left.legend()
    left.set_title("Throughput: medians, minimum and maximum (more is better)")
    names = [row.name for row, _ in measured][::-1]
    used = [share for _, share in measured][::-1]
    right.barh(names, used, color=["#c8453b" if share > 1 else "#3b7dd8" for share in used])
    right.axvline(1, color="#333333", linewidth=1)
    right.set_title("Share of each target that is used (left of the line: reached)")
    right.set_xlim(0, max(1.2, *(share * 1.05 for share in used)))
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, and return 1 when a target is missed (0 in the short form)."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a few rounds; no target counts")
    parser.add_argument("--pyz", type=Path, default=ROOT / "stockrt.pyz", help="the built program")
    parser.add_argument("--svg", type=Path, help="where to draw the picture")
    parser.add_argument("--only", action="append", help="a method of Bench by name; no target counts")
    parser.add_argument(
        "--write-readme", action="store_true", help="write the table into the README, and the picture"
    )
    options = parser.parse_args(argv)
    if options.write_readme and (options.short or options.only):
        parser.error("--write-readme is for a full run")
    py_compile.compile(str(ROOT / "stockrt.py"), doraise=True)  # as a program has it that was started before
    with tempfile.TemporaryDirectory(prefix="stockrt-bench-") as folder:
        bench = Bench(
            SHORT if options.short else FULL,
            options.pyz.resolve(),
            Path(folder),
            lambda text: print(text, file=sys.stderr, flush=True),
        )
        try:
            for name in options.only or ():
                getattr(bench, name)()
            if not options.only:
                bench.run()
        finally:
            bench.close()
    print(f"{machine()}\n\n{table(bench.rows)}")
    if options.write_readme:
        README.write_text(with_tables(README.read_text("utf-8"), bench.rows), "utf-8")
    if path := options.svg or (PICTURE if options.write_readme else None):
        draw(bench.rows, bench.speeds, path)
    counts = not (options.short or options.only)
    return int(counts and any(row.missed for row in bench.rows))


if __name__ == "__main__":
    sys.exit(main())
