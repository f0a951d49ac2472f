"""What the daemon tells its service manager, the journal and node_exporter; no root, no systemd."""

from __future__ import annotations

import fcntl
import gc
import io
import logging
import math
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.cases import each
from kit.clock import FakeClock
from kit.daemons import command_of, until
from kit.infoway_server import InfowayServer
from kit.platform_server import PlatformServer

import stockrt
from stockrt import (
    CollectStats,
    Failure,
    FailureKind,
    KeyStats,
    LogThrottle,
    Metrics,
    MetricsFile,
    Notifier,
    Report,
    Service,
)

UNKNOWN = Failure(FailureKind.UNKNOWN_CODE, "unknown to the API")


class Manager:
    """The service manager's end of the notify socket."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)

    def heard(self, timeout: float = 0.0) -> list[str]:
        """The datagrams that have come, the first one waited for."""
        found: list[str] = []
        self.socket.settimeout(timeout or 0.001)
        try:
            while True:
                found.append(self.socket.recv(4096).decode())
                self.socket.settimeout(0.001)
        except (TimeoutError, BlockingIOError):
            return found

    def wait(self, holds: Callable[[str], object], timeout: float = 60) -> list[str]:
        """The datagrams up to the first one of which it holds."""
        found: list[str] = []
        self.socket.settimeout(timeout)
        while not (found and holds(found[-1])):
            found.append(self.socket.recv(4096).decode())
        return found


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    name = f"@stockrt-test-{os.getpid()}-{random.random()}"
    made = Manager(name if request.param == "abstract" else str(tmp_path / "notify"))
    with made.socket:
        yield made


def settings(tmp_path: Path, **more: str) -> stockrt.Settings:
    environ = {
        "INFOWAY_API_KEY": "key-number-one,key-number-two",
        "SERVER_IP": "10.0.0.5",
        "SERVER_PORT": "8080",
        "STATE_DIRECTORY": str(tmp_path / "stockrt"),
    }
    return stockrt.load_settings(environ | more, None, (), is_root=False).settings


def report(total: int = 50, **more: object) -> Report:
    return Report(**({"total": total, "stored": total, "took_s": 0.44} | more))


# --------------------------------------------------------------------------------------------- notifications


def test_notifications_are_lines_in_one_datagram(manager: Manager) -> None:
    Notifier(manager.address).send(READY=1, STATUS="two\nlines")
    assert manager.heard(60) == ["READY=1\nSTATUS=two\\nlines"]


@each("address", ["", "/nowhere/at/all", "@nobody-listens-here"])
def test_manager_that_is_not_there_stops_nothing(address: str) -> None:
    Notifier(address).send(READY=1)


def test_manager_that_reads_nothing_is_waited_for_asleep_and_not_long(manager: Manager) -> None:
    notifier = Notifier(manager.address)
    while notifier.send(STATUS="x"):  # until the kernel keeps no more for it
        pass
    cpu = time.thread_time()
    assert not notifier.send(STATUS="y")
    assert time.thread_time() - cpu < 0.1


@each(
    ("environ", "expected"),
    [
        ({}, math.inf),
        ({"WATCHDOG_USEC": "90000000"}, 90.0),
        ({"WATCHDOG_USEC": "90000000", "WATCHDOG_PID": "7"}, 90.0),
        ({"WATCHDOG_USEC": "90000000", "WATCHDOG_PID": "8"}, math.inf),
        ({"WATCHDOG_USEC": "0"}, math.inf),
        ({"WATCHDOG_USEC": "soon"}, math.inf),
    ],
)
def test_watchdog_of_this_process_alone(environ: dict[str, str], expected: float) -> None:
    assert stockrt.watchdog_seconds(environ, 7) == expected


@given(st.floats(0, 1e7))
def test_age_is_true_until_it_says_so(age: float) -> None:
    words, until = stockrt.age_words(age)
    assert until > age
    assert stockrt.age_words(math.nextafter(until, 0))[0] == words
    assert stockrt.age_words(until)[0] != words


def test_status_says_what_is_true(tmp_path: Path) -> None:
    clock = FakeClock()
    service = Service(settings(tmp_path), Notifier(), clock=clock)
    service.connected()
    service.executed(report(took_s=0.44))
    clock.advance(12.3)
    service.tick(0, 0)
    line, until = service.status(clock.now_monotonic)
    assert line == "connected to 10.0.0.5:8080 · 2 keys · last execute 50/50 in 0.4 s, 12 s ago · 0 waiting"
    assert until == pytest.approx(1013.0)
    service.disconnected("connection refused")
    service.tick(3, 2)
    assert service.status(clock.now_monotonic)[0] == (
        "not connected to 10.0.0.5:8080: connection refused · 2 keys · "
        "last execute 50/50 in 0.4 s, 12 s ago · 3 waiting · 2 to deliver"
    )


def test_reasons_of_the_last_execution_are_not_kept_until_the_next(tmp_path: Path) -> None:
    """A hundred thousand codes may have failed, and the next execution may be tomorrow's."""
    service = Service(settings(tmp_path), Notifier(), clock=FakeClock())
    last = report()
    gone = weakref.ref(last)
    service.executed(last)
    service.tick(0, 0)
    del last
    assert gone() is None


@pytest.fixture
def in_chinese(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads what this process prints reads Chinese."""
    monkeypatch.setattr(stockrt.SPOKEN, "language", stockrt.CHINESE)


@pytest.mark.usefixtures("in_chinese")
def test_status_is_said_to_the_manager_in_the_readers_language(tmp_path: Path, manager: Manager) -> None:
    clock = FakeClock()
    service = Service(settings(tmp_path), Notifier(manager.address), clock=clock)
    service.tick(0, 0)
    assert manager.heard(60) == ["STATUS=正在连接 10.0.0.5:8080 · 2 个密钥 · 尚未执行 · 0 条指令待执行"]
    service.connected()
    service.keys_out(1, 2)
    service.executed(report())
    clock.advance(300)
    service.tick(1, 2)
    assert manager.heard(60) == [
        "STATUS=已连接 10.0.0.5:8080 · 2 个密钥，其中 1 个已停用 · 最近一次执行：5 分钟前，完成 50/50，用时 0.4 秒 · "
        "1 条指令待执行 · 2 条结果待送达"
    ]
    service.disconnected(stockrt.phrase("tools.no_memory"))
    service.tick(1, 2)
    assert manager.heard(60)[0].startswith(
        "STATUS=未连接 10.0.0.5:8080：内存不足；请检查服务单元的 MemoryMax= ·"
    )
    service.stopping(27)
    assert manager.heard(60)[0].endswith("\nSTATUS=正在停止")


NO_PLATFORM = {"SERVER_IP": "", "SERVER_PORT": "", "COLLECT": "stream", "COLLECT_CODES": "AAPL.US"}
STREAM = CollectStats(
    connections=2, connections_wanted=2, codes=800, polled=4200, per_second=812.4, delay_p50_ms=35.2,
    delay_p99_ms=120.9, gaps_today=1, trades=5000, stored=4990, duplicates=10, dropped=3, missed_beats=2,
)  # fmt: skip


def test_status_says_what_is_collected(tmp_path: Path) -> None:
    """A daemon without a platform speaks of none; what is said of rates is a few seconds old at most."""
    clock = FakeClock()
    service = Service(settings(tmp_path, **NO_PLATFORM), Notifier(), clock=clock)
    assert service.status(clock.now_monotonic) == ("collecting: begins · 2 keys", math.inf)
    service.collecting(STREAM)
    words = (
        "collecting: 2 of 2 connections, 800 codes subscribed, 4200 codes polled, {} trades/s, "
        "stored after 35 ms (p99 121 ms), 1 gap today, 2 beats missed · 2 keys"
    )
    assert service.status(clock.now_monotonic) == (words.format(812), math.inf)
    clock.advance(1)
    service.collecting(STREAM._replace(per_second=3.14))
    line, until = service.status(clock.now_monotonic)
    assert (line, round(until)) == (words.format(812), 1005)
    clock.advance(4.1)
    assert service.status(clock.now_monotonic) == (words.format(3.1), math.inf)
    service.collecting(STREAM._replace(connections=1, per_second=2, trouble="stream: refused"))
    line, _ = service.status(clock.now_monotonic)
    assert line.startswith("collecting: 1 of 2 connections,") and ", stream: refused · 2 keys" in line


def test_status_names_what_stands_in_the_way_of_collecting(tmp_path: Path) -> None:
    """Beside a platform, too; after a reload that ended it nothing of it stays."""
    clock = FakeClock()
    both = settings(tmp_path, COLLECT_EVERY="10", COLLECT_CODES="AAPL.US")
    service = Service(both, Notifier(), clock=clock)
    service.collecting(CollectStats(trouble="MongoDB is away " * 20))
    line, _ = service.status(clock.now_monotonic)
    assert line.startswith("connecting to 10.0.0.5:8080 · collecting: MongoDB is away MongoDB")
    assert line.endswith(" · 2 keys · no execute yet · 0 waiting") and len(line) < 300
    service.collecting(CollectStats(polled=2))
    assert " · collecting: 2 codes polled, 0.0 trades/s · " in service.status(clock.now_monotonic)[0]
    assert "stockrt_collect_polled_codes 2\n" in service.metrics.text()
    service.reloaded(both._replace(collect_every_s=0.0))
    service.collecting(CollectStats(polled=2))
    assert "collect" not in service.status(clock.now_monotonic)[0]
    assert "stockrt_collect" not in service.metrics.text()


def test_watchdog_needs_both_loops(tmp_path: Path, manager: Manager) -> None:
    clock = FakeClock()
    service = Service(settings(tmp_path), Notifier(manager.address), 90.0, clock=clock)

    def turn(unanswered: int) -> tuple[bool, float]:
        wanted = service.tick(unanswered, 0) - clock.now_monotonic
        return "WATCHDOG=1" in "\n".join(manager.heard()).split("\n"), wanted

    assert turn(0) == (True, 45.0)
    assert turn(0) == (False, 45.0)  # said just now; wanted again after half the time, no sooner
    clock.advance(45)
    assert turn(0)[0]
    clock.advance(3600)  # idle for an hour: the loop turned all the while, the executor had nothing to do
    assert turn(1)[0]
    for _ in range(5):  # a long execution that makes progress
        clock.advance(45)
        service.progress()
        assert turn(1)[0]
    clock.advance(90.1)  # it stands still
    said, wanted = turn(1)
    assert not said and 1 < wanted <= 45
    service.progress()
    assert turn(1)[0]


def test_start_is_over_once(tmp_path: Path, manager: Manager) -> None:
    Service(settings(tmp_path), Notifier(manager.address)).started()
    assert manager.heard(60) == ["READY=1"]


def test_stop_asks_for_time(tmp_path: Path, manager: Manager) -> None:
    service = Service(settings(tmp_path), Notifier(manager.address))
    service.stopping(27)
    assert manager.heard(60)[0].split("\n")[:2] == ["STOPPING=1", "EXTEND_TIMEOUT_USEC=27000000"]


def test_silent_without_a_manager(tmp_path: Path) -> None:
    """Nothing is said, so nothing has to be said again: the loop sleeps as long as it likes."""
    service = Service(settings(tmp_path), Notifier())
    service.executed(report())
    assert service.tick(0, 0) == math.inf


class Life:
    """The daemon as a process under a manager, with its simulators."""

    def __init__(self, tmp_path: Path, manager: Manager, **more: str) -> None:
        self.api = InfowayServer()
        self.platform = PlatformServer(zombies=False)
        self.api.start()
        self.platform.start()
        self.log = tmp_path / "log"
        environ = {
            "PATH": os.environ["PATH"], "LANG": "C.UTF-8",
            "INFOWAY_API_KEY": "test-key", "INFOWAY_API_BASE_URL": self.api.url, "INFOWAY_PLAN": "0",
            "SERVER_IP": "127.0.0.1", "SERVER_PORT": str(self.platform.port),
            "STATE_DIRECTORY": str(tmp_path / "stockrt"), "NOTIFY_SOCKET": manager.address,
        }  # fmt: skip
        with self.log.open("w") as log:
            found = os.fstat(log.fileno())
            environ["JOURNAL_STREAM"] = f"{found.st_dev}:{found.st_ino}"
            self.process = subprocess.Popen(command_of(), env=environ | more, stderr=log, cwd=tmp_path)

    def __enter__(self) -> Life:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.platform.stop()
        self.api.stop()


@pytest.fixture
def path_manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(str(tmp_path / "notify"))
    with made.socket:
        yield made


def test_life_of_a_daemon_as_the_manager_hears_it(tmp_path: Path, path_manager: Manager) -> None:
    metrics = tmp_path / "stockrt.prom"
    more = {"WATCHDOG_USEC": "500000", "METRICS_FILE": str(metrics), "LOG_LEVEL": "debug"}
    with Life(tmp_path, path_manager, **more) as life:
        heard = path_manager.wait(lambda said: said == "READY=1")
        assert heard[0].startswith("STATUS=connecting to 127.0.0.1:")
        assert until(metrics.exists)
        path_manager.wait(lambda said: "connected to" in said and "not" not in said)
        path_manager.wait(lambda said: "WATCHDOG=1" in said)
        execution_id = life.platform.execute(["TSLA.US"])
        path_manager.wait(lambda said: re.search(r"last execute 1/1 in \d\.\d s, 0 s ago · 0 waiting", said))
        answer = threading.Event()
        life.api.latency = lambda request: 0.0 * answer.wait(60)
        slow = life.platform.execute(["AAPL.US"])
        life.api.wait_for(lambda api: api.in_flight == 1)
        for _ in range(5):  # the fetch takes longer than the watchdog's limit
            path_manager.wait(lambda said: "WATCHDOG=1" in said)
        answer.set()
        path_manager.wait(lambda said: re.search(r"last execute 1/1 in [1-9]\d*\.\d s", said))
        life.process.terminate()
        heard = path_manager.wait(lambda said: "STOPPING=1" in said)
        assert life.process.wait(60) == 0
        assert "stockrt_platform_connected 0\n" in metrics.read_text()
        assert 'stockrt_executions_total{outcome="success"} 2\n' in metrics.read_text()
        lines = life.log.read_text().splitlines()
        assert all(re.match(r"<[4-7]>(?!\d\d:)", line) for line in lines), lines
        for number in (execution_id, slow):
            mine = [line for line in lines if number in line and line.startswith("<6>")]
            assert len(mine) == 1 and re.search(r"stored 1, duplicates 0, failed 0, \d+ ms$", mine[0])
        assert any(line.startswith("<7>frame received: ") for line in lines)
        assert any(line.startswith("<7>frame sent: ") for line in lines)


@pytest.mark.parametrize("way", ["environment", "settings file"])
def test_status_of_a_unit_whose_settings_ask_for_chinese_is_chinese(
    tmp_path: Path, path_manager: Manager, way: str
) -> None:
    """Wherever they do, and its journal stays English."""
    (tmp_path / ".env").write_text("STOCKRT_LANG=zh\n" * (way == "settings file"))
    more = {"STOCKRT_LANG": "zh"} if way == "environment" else {}
    with Life(tmp_path, path_manager, **more) as life:
        path_manager.wait(lambda said: "STATUS=已连接 127.0.0.1:" in said and "尚未执行" in said)
        log = life.log.read_text()
        assert log.startswith("<6>stockrt ") and "连接" not in log


def test_absent_platform_does_not_fail_the_start(tmp_path: Path, path_manager: Manager) -> None:
    with Life(tmp_path, path_manager, SERVER_PORT="1") as life:
        path_manager.wait(lambda said: "READY=1" in said)
        path_manager.wait(lambda said: "not connected to 127.0.0.1:1" in said)
        assert life.process.poll() is None


def test_idle_says_nothing_that_is_not_asked_for(tmp_path: Path, path_manager: Manager) -> None:
    with Life(tmp_path, path_manager, WATCHDOG_USEC="4000000"):
        path_manager.wait(lambda said: "STATUS=connected" in said)
        path_manager.heard(0.5)
        assert len(path_manager.heard(3.0)) <= 2


def test_a_trouble_of_a_single_try_is_told_in_the_singular(caplog: pytest.LogCaptureFixture) -> None:
    trouble = LogThrottle("MongoDB", FakeClock(), then="later")
    with caplog.at_level(logging.INFO, "stockrt"):
        trouble.again("refused")
        trouble.over()
    assert caplog.records[-1].getMessage() == "MongoDB: well again after 1 try"


# --------------------------------------------------------------------------------------------------- journal


def test_a_line_of_the_log_has_its_time_as_every_other_time_for_people() -> None:
    record = logging.LogRecord("x", logging.WARNING, "f", 1, "it failed", (), None)
    line = stockrt._Redacting().format(record)
    assert line == f"{stockrt.local_time(datetime.fromtimestamp(record.created, UTC))} WARNING it failed"


def journal_lines(write: Callable[[io.TextIOBase], object]) -> list[str]:
    below = io.StringIO()
    write(stockrt.JournalStream(below))
    return below.getvalue().splitlines()


def test_every_line_of_a_traceback_has_its_priority(tmp_path: Path) -> None:
    settings(tmp_path, INFOWAY_API_KEY="hush")

    def write(stream: io.TextIOBase) -> None:
        handler = logging.StreamHandler(stream)
        handler.setFormatter(stockrt._Redacting(journal=True))
        try:
            raise ValueError("hush\nsecond line")
        except ValueError:
            record = logging.LogRecord("x", logging.WARNING, "f", 1, "it failed", (), sys.exc_info())
        handler.emit(record)

    lines = journal_lines(write)
    assert len(lines) >= 5 and all(line.startswith("<4>") for line in lines), lines
    assert lines[0] == "<4>it failed" and not [line for line in lines if "hush" in line]


def test_what_python_itself_writes_is_an_error() -> None:
    lines = journal_lines(
        lambda stream: [stream.write(part) for part in ("Trace", "back\n  File", "\n<6>x\n")]
    )
    assert lines == ["<3>Traceback", "<3>  File", "<6>x"]


def test_threads_do_not_mix_their_lines() -> None:
    below = io.StringIO()
    stream = stockrt.JournalStream(below)
    stream.write("begun ")
    thread = threading.Thread(target=lambda: stream.write("<6>other\n"))
    thread.start()
    thread.join()
    stream.write("ended\n")
    assert below.getvalue() == "<6>other\n<3>begun ended\n"


@pytest.mark.parametrize("journal", [True, False])
def test_faults_of_the_settings_have_a_priority_for_the_journal_only(tmp_path: Path, journal: bool) -> None:
    log = tmp_path / "log"
    with log.open("w") as stream:
        found = os.fstat(stream.fileno())
        environ = {"LANG": "C.UTF-8", "JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino + (not journal)}"}
        command = [*command_of(), "--check-settings"]
        done = subprocess.run(command, env=environ, stderr=stream, cwd=tmp_path, timeout=60)
    assert done.returncode == 78
    assert log.read_text().startswith("<3>stockrt: INFOWAY" if journal else "stockrt: INFOWAY")


def test_secrets_in_frames_are_masked_before_the_frame_is_shortened(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    daemon = stockrt.Daemon(settings(tmp_path))
    daemon._module_hash = "-3298472938472"
    with caplog.at_level(logging.DEBUG, "stockrt"):
        daemon._log_frame("sent", "x" * 490 + "key-number-two")
        daemon._log_frame("sent", "hash -3298472938472")
    assert "key-n" not in caplog.text and "32984" not in caplog.text


def test_execution_is_one_line() -> None:
    context = {"meta": {"execution_id": "id-1"}, "workflow_name": "prices\nof today"}
    bad = {"AAPL": Failure(FailureKind.INVALID_CODE, "no exchange given"), "X.US": UNKNOWN, "Y.US": UNKNOWN}
    line = stockrt.execution_line(context, report(stored=40, duplicates=7, failures=bad, took_s=0.1234))
    assert line == (
        "execution id-1 of prices\\nof today: total 50, stored 40, duplicates 7, failed 3 "
        "(1 invalid_code: AAPL; 2 unknown_code: X.US, Y.US), 123 ms"
    )


def test_trouble_is_said_at_its_begin_seldom_and_at_its_end(caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()
    trouble = LogThrottle("MongoDB", clock, then="later")
    with caplog.at_level(logging.INFO, "stockrt"):
        for second in range(700):
            clock.now_monotonic = 1000.0 + second
            trouble.again(f"no server found in {second} ms" if second % 2 else "refused")
        trouble.over()
        trouble.over()
    assert [record.getMessage() for record in caplog.records] == [
        "MongoDB: refused; later",
        "MongoDB: no server found in 1 ms; later",
        "MongoDB: still refused (301 tries)",
        "MongoDB: still no server found in 301 ms (302 tries)",
        "MongoDB: still refused (601 tries)",
        "MongoDB: still no server found in 601 ms (602 tries)",
        "MongoDB: well again after 700 tries",
    ]


def test_what_a_trouble_leaves_in_memory_goes_with_it() -> None:
    class Fault(Exception):
        """One that holds itself, as it does by the frames that it came through."""

    fault = Fault()
    fault.args = (fault,)
    gone = weakref.ref(fault)
    trouble = LogThrottle("MongoDB", FakeClock())
    gc.disable()
    try:
        trouble.again(fault.__class__.__name__)
        del fault
        assert gone() is not None
        trouble.over()
        assert gone() is None
    finally:
        gc.enable()


def test_trouble_with_ever_new_words_fills_no_log(caplog: pytest.LogCaptureFixture) -> None:
    trouble = LogThrottle("platform", FakeClock())
    for number in range(1000):
        trouble.again("reason " + "x" * number)
    assert len(caplog.records) <= stockrt.TROUBLE_KINDS + 1


def executor_in(tmp_path: Path) -> stockrt.Executor:
    """An executor that nobody listens to."""
    inbox = stockrt.Inbox()
    journal = stockrt.Journal(tmp_path)
    return stockrt.Executor(settings(tmp_path), journal, inbox, stockrt.Relay(stockrt.NO_EVENTS, inbox))


def test_store_that_is_away_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    executor = executor_in(tmp_path)
    away = report(
        stored=0,
        store_error="cannot be reached",
        failures={"A.US": Failure(FailureKind.STORE, "fetched, not stored: …")},
    )
    with caplog.at_level(logging.INFO, "stockrt"):
        for one in (away, away, away, report()):
            executor._log({}, one)
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if not line.startswith("execution ")] == [
        "local store: cannot be reached; the next execution tries again",
        "local store: well again after 3 tries",
    ]


@pytest.mark.parametrize("kind", ["network", "api", "key", "other"])
def test_what_keeps_trades_away_is_said_once_whatever_its_kind(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    executor = executor_in(tmp_path)
    away = report(stored=0, failures={"X.US": UNKNOWN, "A.US": Failure(FailureKind(kind), "the words")})
    fine = report(stored=49, failures={"X.US": UNKNOWN})  # no trouble: it stands in the execution's line
    with caplog.at_level(logging.INFO, "stockrt"):
        for one in (away, away, fine, fine):
            executor._log({}, one)
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if not line.startswith("execution ")] == [
        "Infoway: the words; the next execution tries again",
        "Infoway: well again after 2 tries",
    ]


# --------------------------------------------------------------------------------------------------- metrics

SAMPLE = re.compile(r'[a-z_]+(\{[a-z]+="[^"\\]+"\})? (\d+(\.\d+)?|\+Inf)')


def test_metrics_are_in_the_textfile_format() -> None:
    metrics = Metrics()
    metrics.add("stockrt_trades_stored_total", by=7)
    metrics.took(0.3)
    metrics.took(99.0)
    lines = metrics.text().splitlines()
    helped = [line.split()[2] for line in lines if line.startswith("# HELP ")]
    typed = {line.split()[2]: line.split()[3] for line in lines if line.startswith("# TYPE ")}
    assert helped == list(typed) and len(set(helped)) == len(helped)
    samples = [line for line in lines if not line.startswith("#")]
    assert all(SAMPLE.fullmatch(line) and line.startswith("stockrt_") for line in samples), samples
    names = {re.split(r"[{ ]", line)[0] for line in samples}
    assert all((name.endswith("_total")) == (kind == "counter") for name, kind in typed.items())
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in names} == set(typed)
    assert "stockrt_trades_stored_total 7" in lines
    assert 'stockrt_api_latency_seconds_bucket{le="0.25"} 0' in lines
    assert 'stockrt_api_latency_seconds_bucket{le="0.5"} 1' in lines
    assert 'stockrt_api_latency_seconds_bucket{le="30"} 1' in lines
    assert 'stockrt_api_latency_seconds_bucket{le="+Inf"} 2' in lines


def test_the_status_line_counts_the_keys_that_are_out(tmp_path: Path) -> None:
    service = Service(settings(tmp_path, INFOWAY_API_KEY="first-key-here,other-key-here"), Notifier())
    for out, words in ((0, "· 2 keys ·"), (1, "· 2 keys, 1 out ·"), (0, "· 2 keys ·")):
        service.keys_out(out, 2)
        assert words in service.status(0)[0]


def test_each_key_has_its_metrics(tmp_path: Path) -> None:
    """By the first characters of its digest, never by the key."""
    service = Service(settings(tmp_path, INFOWAY_API_KEY="first-key-here,other-key-here"), Notifier())
    first, other = (stockrt.key_digest(key) for key in ("first-key-here", "other-key-here"))
    assert "_api_key_" not in service.metrics.text()  # nothing is known of them yet, which is not 0
    service.keys_used(
        [KeyStats(first, 7, 93, "resting", 1_800_000_000.0), KeyStats(other, None, math.inf, "out", 0.0)]
    )
    lines = service.metrics.text().splitlines()
    samples = [line for line in lines if "_api_key_" in line and not line.startswith("#")]
    assert samples == [
        f'stockrt_api_key_{name}{{key="{digest[:8]}"}} {number}'
        for name, numbers in (
            ("requests_today", ("7",)),
            ("requests_left", ("93", "+Inf")),
            ("state", ("1", "2")),
            ("end_timestamp_seconds", ("1800000000", "0")),
        )
        for digest, number in zip((first, other), numbers, strict=False)
    ]
    assert all(SAMPLE.fullmatch(line) for line in samples)
    assert "key-here" not in service.metrics.text()


def test_collecting_has_its_metrics(tmp_path: Path) -> None:
    """What is not known, and a platform where none is set, is left out; the same numbers again are no change."""
    service = Service(settings(tmp_path, **NO_PLATFORM), Notifier())
    assert "stockrt_collect" not in service.metrics.text() and "_platform_" not in service.metrics.text()

    def samples() -> dict[str, str]:
        lines = [line for line in service.metrics.text().splitlines() if line.startswith("stockrt_collect_")]
        assert all(SAMPLE.fullmatch(line) for line in lines), lines
        return dict(line.removeprefix("stockrt_collect_").split() for line in lines)

    service.collecting(STREAM)
    assert samples() == {
        "connections": "2", "connections_wanted": "2", "codes": "800", "polled_codes": "4200",
        "trades_total": "5000", "stored_total": "4990", "duplicate_total": "10", "dropped_total": "3",
        "gaps_today": "1", "missed_beats_total": "2",
        'delay_seconds{quantile="0.5"}': "0.035", 'delay_seconds{quantile="0.99"}': "0.121",
    }  # fmt: skip
    unknown = STREAM._replace(delay_p50_ms=math.nan, delay_p99_ms=float("nan"))
    service.collecting(unknown)
    changes = service.metrics.changes
    service.collecting(unknown._replace(delay_p50_ms=float("nan")))
    assert service.metrics.changes == changes
    assert not [name for name in samples() if "delay" in name]
    service.stopped()
    assert samples()["connections"] == "0" and "_platform_" not in service.metrics.text()


def test_metrics_file_is_written_seldom_and_only_when_something_changed(tmp_path: Path) -> None:
    clock, path = FakeClock(), tmp_path / "stockrt.prom"
    service = Service(settings(tmp_path, METRICS_FILE=str(path)), Notifier(), clock=clock)
    assert service.tick(0, 0) == math.inf
    assert until(path.exists)
    first = path.stat().st_ino, path.read_text()
    assert path.stat().st_mode & 0o777 == 0o644
    for _ in range(100):  # idle: no write, and no wish to be woken for one
        clock.advance(60)
        assert service.tick(0, 0) == math.inf
    assert (path.stat().st_ino, path.read_text()) == first
    service.executed(report())
    service.tick(0, 0)
    assert until(lambda: 'outcome="success"} 1' in path.read_text())
    service.executed(report())
    assert service.tick(0, 0) == clock.now_monotonic + stockrt.METRICS_EVERY_S
    assert 'outcome="success"} 1' in path.read_text()
    clock.advance(stockrt.METRICS_EVERY_S)
    service.tick(0, 0)
    assert until(lambda: 'outcome="success"} 2' in path.read_text())
    assert until(lambda: os.listdir(tmp_path) == ["stockrt.prom"])


def test_reader_never_sees_half_a_metrics_file(tmp_path: Path) -> None:
    path = tmp_path / "x.prom"
    file, metrics = MetricsFile(path, Metrics()), Metrics()
    file.write()
    with path.open() as reader:
        file.write()
        assert reader.read() == metrics.text()
        assert os.fstat(reader.fileno()).st_nlink == 0  # the old one, whole; the new one is another file


def test_metrics_that_cannot_be_written_are_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = MetricsFile(tmp_path / "missing/x.prom", Metrics())
    for _ in range(10):
        file.write()
    assert len(caplog.records) == 1 and "METRICS_FILE" in caplog.text


def test_a_device_is_not_replaced_by_metrics(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = tmp_path / "x.prom"
    os.mkfifo(place)
    MetricsFile(place, Metrics()).write()
    assert place.is_fifo()
    assert "it is a link, a directory, a pipe or a device" in caplog.text and "METRICS_FILE" in caplog.text


@each(
    ("ended", "outcome"),
    [
        (None, "refused"),
        (report(), "success"),
        (report(stored=0, duplicates=50), "success"),
        (report(stored=49, failures={"X.US": UNKNOWN}), "partial"),
        (report(stored=0, failures={"X.US": UNKNOWN}), "failure"),
        (report(stored=10, store_error="away"), "failure"),
        (report(stored=10, interrupted=True), "interrupted"),
        (Report(), "failure"),
    ],
)
def test_outcome_of_an_execution(ended: Report | None, outcome: str) -> None:
    assert stockrt.outcome_of(ended) == outcome


# ----------------------------------------------------------------------------------------------- credentials


def load(tmp_path: Path, **environ: str) -> stockrt.LoadedSettings:
    return stockrt.load_settings({"STATE_DIRECTORY": str(tmp_path)} | environ, None, (), is_root=False)


def test_credentials_are_stronger_than_the_environment(tmp_path: Path) -> None:
    (tmp_path / "infoway_api_key").write_text("from-the-file\n")
    (tmp_path / "mongodb_host").write_text(" \n")
    found = load(
        tmp_path,
        CREDENTIALS_DIRECTORY=str(tmp_path),
        INFOWAY_API_KEY="from-the-environment",
        MONGODB_HOST="mongodb://h/",
    ).settings
    assert found.api_keys == ("from-the-file",)
    assert found.mongodb_uri == "mongodb://h/"  # a blank credential is none


def test_fault_in_a_credential_names_it_and_hides_it(tmp_path: Path) -> None:
    (tmp_path / "mongodb_host").write_text("mongodb://u:hush@h:0/")
    with pytest.raises(stockrt.SettingsError) as caught:
        load(tmp_path, CREDENTIALS_DIRECTORY=str(tmp_path))
    assert "MONGODB_HOST" in str(caught.value) and "(credential)" in str(caught.value)
    assert "hush" not in str(caught.value)


def test_credential_that_is_no_text_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "infoway_api_key").write_bytes(b"\xff\xfe")
    with pytest.raises(stockrt.SettingsError, match=r"INFOWAY_API_KEY.*UTF-8"):
        load(tmp_path, CREDENTIALS_DIRECTORY=str(tmp_path))


def test_misspelled_setting_of_a_unit_is_warned_of(tmp_path: Path) -> None:
    """There the environment is what the operator wrote into the unit's file; elsewhere it is anybody's."""
    assert load(tmp_path, INFOWAY_PLN="pro").warnings == ()
    (warning,) = load(tmp_path, INFOWAY_PLN="pro", INVOCATION_ID="1").warnings
    assert "INFOWAY_PLN" in warning and "INFOWAY_PLAN" in warning


def test_file_that_the_unit_may_not_read_is_no_news(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "stockrt.env"
    place.touch()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may read everything
    environ = {"STATE_DIRECTORY": str(tmp_path)}
    assert stockrt.load_settings(environ, None, [place], is_root=False).warnings
    assert not stockrt.load_settings(environ | {"INVOCATION_ID": "1"}, None, [place], is_root=False).warnings


# ------------------------------------------------------------------------------------------ unpacked versions

OWN, OLD, USED = (f"stockrt.pyz_{digit * 64}" for digit in "abc")


def test_cache_is_rid_of_what_nobody_uses(tmp_path: Path) -> None:
    kept = [OWN, USED, "stockrt.pyz_notes", "other.pyz_" + "a" * 64, f".{OWN}_lock", f".{USED}_lock"]
    gone = [OLD, f"{'stockrt.pyz_' + 'd' * 64}.tmp", f".{OLD}_lock"]
    for name in kept + gone:
        if name.startswith("."):
            (tmp_path / name).touch()
        else:
            (tmp_path / name / "site-packages").mkdir(parents=True)
    (tmp_path / f"stockrt.pyz_{'e' * 64}").symlink_to(tmp_path / "elsewhere")
    descriptor = os.open(tmp_path / USED, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)  # another process runs from it
    stockrt.clean_cache({"CACHE_DIRECTORY": str(tmp_path)}, tmp_path / OWN)
    os.close(descriptor)
    assert {path.name for path in tmp_path.iterdir()} == {*kept, f"stockrt.pyz_{'e' * 64}"}


@pytest.mark.parametrize(
    ("cache", "own"), [("", OWN), ("elsewhere", OWN), (".", "checkout"), (".", "stockrt.pyz_short")]
)
def test_nothing_is_removed_outside_of_a_cache_of_ours(tmp_path: Path, cache: str, own: str) -> None:
    (tmp_path / own).mkdir()
    (tmp_path / OLD).mkdir(exist_ok=True)
    environ = {"CACHE_DIRECTORY": str(tmp_path / cache) if cache else ""}
    stockrt.clean_cache(environ, tmp_path / own)
    assert (tmp_path / OLD).exists()
