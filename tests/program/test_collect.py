"""Collecting without pause, as people run it: a daemon without a platform, and `--collect` at a terminal."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest
from conftest import RunPyz
from kit.chinese import in_chinese
from kit.daemons import HASH, PATIENCE, ProcessDaemon, ThreadDaemon, settings_for, until
from kit.forked import Forked
from kit.infoway_server import PLANS
from kit.platform_server import PlatformServer
from kit.stream_server import Vendor, identity

import stockrt

WELL, WRONG = 0, 1
CODES = ("BTCUSDT", "ETHUSDT")  # their market is never closed
OTHER = "SOLUSDT"
MORE_THAN_WAITS = 1000 * (stockrt.BATCHES_UNREAD + 10)
SETTINGS_FAULT = 78
COLLECTED = re.compile(r"^trades (\d+), stored (\d+), already known (\d+) \(\d+\.\d s\)", re.MULTILINE)


class Manager:
    """The service manager's end of the notify socket; it keeps what it was told."""

    def __init__(self, folder: Path) -> None:
        self.address = str(folder / "notify")
        self.heard: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.address)
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def status(self) -> str:
        """The last status line."""
        lines = [line for text in self.heard for line in text.split("\n") if line.startswith("STATUS=")]
        return lines[-1].removeprefix("STATUS=") if lines else ""

    def close(self) -> None:
        """Listen no more."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while data := self._socket.recv(4096):
                self.heard.append(data.decode())


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    """A service manager."""
    made = Manager(tmp_path)
    yield made
    made.close()


def rows_of(state: Path) -> list[tuple[str, str]]:
    """Return code and `_id` of each stored trade."""
    if not (state / "stockrt.db").exists():
        return []
    try:
        with contextlib.closing(sqlite3.connect(state / "stockrt.db")) as db:
            return list(db.execute("SELECT stock_code, _id FROM realtime ORDER BY seq"))
    except sqlite3.OperationalError:  # it is being made
        return []


def codes_of(state: Path) -> set[str]:
    """Return the codes that have a stored trade."""
    return {code for code, _ in rows_of(state)}


def check(holds: Callable[[], object], daemon: ProcessDaemon) -> None:
    """Wait for what the daemon does."""
    assert until(holds), daemon.log


@pytest.fixture
def vendor() -> Iterator[Vendor]:
    """The API, where both codes have a trade; what more comes is the test's affair."""
    with Vendor() as made:
        for code in (*CODES, OTHER):
            made.stream.new_trade(code)
        yield made


@pytest.fixture
def settings(vendor: Vendor, tmp_path: Path, manager: Manager) -> dict[str, str]:
    """The settings of a daemon that polls, without a platform."""
    return vendor.settings | {
        "INFOWAY_PLAN": "0",
        "STATE_DIRECTORY": str(tmp_path / "state"),
        "COLLECT_EVERY": "1",
        "COLLECT_CODES": " ".join(CODES),
        "METRICS_FILE": str(tmp_path / "stockrt.prom"),
        "NOTIFY_SOCKET": manager.address,
        "WATCHDOG_USEC": "1000000",
    }


@pytest.fixture
def daemon(
    pyz: Path, clean_env: dict[str, str], settings: dict[str, str], tmp_path: Path, forked: Forked
) -> Iterator[ProcessDaemon]:
    """The built file as such a daemon, its COLLECT_CODES in a file of its directory; not started yet."""
    write_settings(tmp_path, COLLECT_CODES=settings.pop("COLLECT_CODES"))
    base = {name: value for name, value in clean_env.items() if name != "STATE_DIRECTORY"}
    made = ProcessDaemon(base, settings, pyz, forked=forked)
    yield made
    made.kill()


def write_settings(folder: Path, **settings: str) -> None:
    (folder / "stockrt.env").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))


# ------------------------------------------------------------------------------------------------ the daemon


def test_a_daemon_without_a_platform_is_a_service_of_its_own(
    daemon: ProcessDaemon, manager: Manager, run_pyz: RunPyz, tmp_path: Path
) -> None:
    """It is ready, says what it does, is watched, reads its settings anew and stops; nobody is dialled."""
    daemon.start()
    check(lambda: "READY=1" in manager.heard, daemon)
    check(lambda: codes_of(daemon.state) == set(CODES), daemon)
    check(lambda: re.match(r"collecting: 2 codes polled, \d\.\d trades/s.* · 1 key$", manager.status), daemon)
    check(lambda: [said for said in manager.heard if "WATCHDOG=1" in said], daemon)
    assert "collects without a platform\n" in daemon.log
    told = run_pyz("--status", "--json", env=daemon.settings)
    status = json.loads(told.stdout)
    assert (told.returncode, status["wrong"]) == (WELL, []), told.stdout + daemon.log
    assert (status["daemon"]["running"], status["platform"]["state"]) == (True, "not needed")
    assert status["collecting"]["polled"] == 2
    lines = run_pyz("--status", env=daemon.settings).stdout
    assert re.search(
        r"^collecting      2 codes polled, .*; since the start \d+ trades, \d+ new$", lines, re.M
    )
    assert "\nregistration    none: no platform is set\nplatform        none set: not needed\n" in lines

    write_settings(tmp_path, COLLECT_CODES=OTHER)
    daemon.signal(signal.SIGHUP)
    check(lambda: "changed: COLLECT_CODES\n" in daemon.log, daemon)
    check(lambda: OTHER in codes_of(daemon.state), daemon)
    check(lambda: manager.status.startswith("collecting: 1 code polled,"), daemon)

    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0, daemon.log
    assert "STOPPING=1" in "\n".join(manager.heard) and daemon.log.endswith("stopped\n")
    busy = "longer than one every 1 s allows"  # a busy machine is slow, not wrong
    said = [line for line in daemon.log.splitlines() if busy not in line]
    assert not re.search("WARNING|ERROR|Traceback|dial|execution", "\n".join(said)), daemon.log
    metrics = Path(daemon.settings["METRICS_FILE"]).read_text()
    assert '\nstockrt_collect_polled_codes{instance="state"} 1\n' in metrics and "_platform_" not in metrics
    assert run_pyz("--status", env=daemon.settings).returncode == 3


def test_a_start_that_settings_make_fail_is_not_over(daemon: ProcessDaemon, manager: Manager) -> None:
    """This string is sound, and only the driver that is to use it knows better."""
    daemon.environment["MONGODB_HOST"] = "mongodb://me@127.0.0.1:1/"
    daemon.start()
    assert daemon.wait() == 78 and "A password is required" in daemon.log, daemon.log
    assert manager.heard and not any("READY=1" in said for said in manager.heard)


def test_without_a_platform_and_without_anything_to_collect_both_ways_are_named(run_pyz: RunPyz) -> None:
    done = run_pyz(env={"INFOWAY_API_KEY": "test-key"})
    assert done.returncode == SETTINGS_FAULT
    for name in ("SERVER_IP", "SERVER_PORT", "COLLECT=stream", "COLLECT_EVERY", "COLLECT_CODES", "--once"):
        assert name in done.stderr


def test_a_fault_of_the_settings_that_only_the_start_finds_ends_it(daemon: ProcessDaemon) -> None:
    """With its sentence alone and the status that systemd does not start again."""
    daemon.environment["MONGODB_HOST"] = "mongodb://127.0.0.1/?authMechanism=MONGODB-OIDC"
    for _ in range(2):  # the second time with a local file
        before = len(daemon.log) if daemon.log_path.exists() else 0
        daemon.start()
        assert daemon.wait() == SETTINGS_FAULT, daemon.log
        begun, *said = daemon.log[before:].splitlines()
        assert "collects without a platform" in begun
        (line,) = said
        assert line.startswith("stockrt: MONGODB_HOST='mongodb://127.0.0.1/?authMechanism=MONGODB-OIDC': ")


@pytest.fixture
def streaming(daemon: ProcessDaemon) -> ProcessDaemon:
    """The same daemon, which takes the stream."""
    for settings in (daemon.environment, daemon.settings):
        assert isinstance(settings, dict)
        del settings["COLLECT_EVERY"]
        settings["COLLECT"] = "stream"
    return daemon


SUBSCRIBED = "collecting: 1 of 1 connection, {} subscribed, "


def subscribed(daemon: ProcessDaemon, manager: Manager, codes: str = "2 codes") -> None:
    """Wait until STATUS says so."""
    check(lambda: manager.status.startswith(SUBSCRIBED.format(codes)), daemon)


def ids_of(state: Path) -> set[str]:
    """Return the identities of what is stored."""
    return {name for _, name in rows_of(state)}


def test_the_stream_of_a_daemon_goes_on_over_a_reload_that_changes_nothing_of_it(
    streaming: ProcessDaemon, manager: Manager, vendor: Vendor, run_pyz: RunPyz, tmp_path: Path
) -> None:
    """Every push is in the store; other codes are subscribed to over a new connection; a cut is said and mended."""
    streaming.start()
    subscribed(streaming, manager)
    pushed = {*vendor.stream.trade(*CODES)}
    check(lambda: pushed <= ids_of(streaming.state), streaming)
    write_settings(tmp_path, COLLECT_CODES=" ".join(CODES), LOG_LEVEL="warning")
    streaming.signal(signal.SIGHUP)
    check(lambda: "changed: LOG_LEVEL\n" in streaming.log, streaming)
    pushed |= {*vendor.stream.trade(*CODES)}
    check(lambda: pushed <= ids_of(streaming.state), streaming)
    assert len(vendor.stream.connections) == 1

    write_settings(tmp_path, COLLECT_CODES=f"{' '.join(CODES)} {OTHER}", LOG_LEVEL="info")
    streaming.signal(signal.SIGHUP)
    subscribed(streaming, manager, "3 codes")
    pushed |= {*vendor.stream.trade(OTHER)}
    check(lambda: pushed <= ids_of(streaming.state), streaming)
    assert len(vendor.stream.connections) == 2

    vendor.stream.refuse_handshakes(429)
    vendor.stream.cut("rst")
    check(lambda: "0 of 1 connection" in manager.status and "429" in manager.status, streaming)
    check(lambda: run_pyz("--status", env=streaming.settings).returncode == WRONG, streaming)
    lines = run_pyz("--status", env=streaming.settings).stdout
    assert re.search("^stream          crypto: 0 of 3 codes, waiting: .*429", lines, re.M), lines
    streaming.signal(signal.SIGTERM)
    assert streaming.wait() == 0, streaming.log
    assert vendor.stream.missing(ids_of(streaming.state)) == [] and vendor.stream.violations == []
    assert "Traceback" not in streaming.log and "test-key" not in streaming.log


def test_what_time_mends_is_said_and_tried_again(
    streaming: ProcessDaemon, manager: Manager, run_pyz: RunPyz
) -> None:
    """Another one collects from the stream there; a reload tries at once, time does by itself."""
    other = stockrt.lock_in(streaming.state, "collecting.lock", "")
    streaming.start()
    words = f"another stockrt collects from the stream in {streaming.state}; stop it"
    check(lambda: manager.status.startswith(f"collecting: {words[:60]}"), streaming)
    assert f"WARNING collecting: {words}" in streaming.log
    status = run_pyz("--status", "--json", env=streaming.settings)
    (wrong,) = json.loads(status.stdout)["wrong"]
    assert status.returncode == WRONG and wrong.startswith(f"collecting fails ({words}")
    other.close()
    streaming.signal(signal.SIGHUP)
    subscribed(streaming, manager)
    assert "collecting: well again after 1 try" in streaming.log


def test_with_a_platform_it_does_both(
    daemon: ProcessDaemon, vendor: Vendor, manager: Manager, run_pyz: RunPyz
) -> None:
    stockrt.write_hash(daemon.state, HASH)
    with PlatformServer(ping_every=0, zombies=False) as platform:
        platform.know(HASH)
        daemon.environment |= {"SERVER_IP": "127.0.0.1", "SERVER_PORT": str(platform.port)}
        daemon.start()
        assert platform.wait_for(lambda p: p.connected, PATIENCE), daemon.log
        check(lambda: codes_of(daemon.state) == set(CODES), daemon)
        execution = platform.execute([OTHER])
        assert platform.wait_for(lambda p: p.results_for(execution), PATIENCE), daemon.log
        assert platform.results_for(execution)[0].data["status"] == "success"
        new = identity(vendor.stream.new_trade(CODES[0]))
        check(lambda: new in {name for _, name in rows_of(daemon.state)}, daemon)
        check(
            lambda: "connected to 127.0.0.1:" in manager.status and "collecting: 2" in manager.status, daemon
        )
        status = run_pyz("--status", env=daemon.environment)
        assert status.returncode == WELL and re.search("^platform .*: connected since ", status.stdout, re.M)
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0, daemon.log


def answers(platform: PlatformServer) -> bool:
    """Ping the daemon, and return whether it answers."""
    before = len(platform.pings)
    platform.ping_now()
    good = platform.wait_for(lambda p: len(p.pings) > before and all(one.answered for one in p.pings), 20)
    return bool(good)


def test_no_disk_that_collecting_waits_for_keeps_a_ping_waiting(
    vendor: Vendor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How collecting goes on is told to the status file by the thread that may wait for a disk."""
    monkeypatch.setattr(stockrt, "STATUS_EVERY_S", 3600.0)
    state = tmp_path / "state"
    stockrt.write_hash(state, HASH)
    more = vendor.settings | {"COLLECT": "stream", "COLLECT_CODES": " ".join(CODES)}
    with PlatformServer(ping_every=0, zombies=False) as platform:
        platform.know(HASH)
        loaded = settings_for(platform.port, vendor.rest.url, state, **more)
        with ThreadDaemon(loaded) as running:
            daemon = running.daemon
            vendor.stream.wait_for(lambda s: {*s.subscribed} >= {*CODES}, PATIENCE)
            assert platform.wait_for(lambda p: p.connected, PATIENCE)
            vendor.stream.rate = 20.0
            told = daemon._relay
            assert until(lambda: told.collect is not daemon._collect_noted and told.collect.trades > 10)
            collecting = daemon._executor._collecting
            assert collecting is not None
            with collecting._coverage._lock:  # as while it writes
                monkeypatch.setattr(stockrt, "STATUS_EVERY_S", 0.0)
                for _ in range(3):
                    assert answers(platform), "the thread of the socket waits for the disk"
            assert until(lambda: stockrt.read_status(state)["collecting"]["trades"] > 10)


# ---------------------------------------------------------------------------------------------- the terminal


class Collect:
    """`--collect` of the built file as a process."""

    def __init__(self, pyz: Path, env: dict[str, str], folder: Path, *arguments: str) -> None:
        command = [sys.executable, str(pyz), "--collect", *arguments]
        self.process = subprocess.Popen(
            command, env=env, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, encoding="utf-8",
        )  # fmt: skip

    def line(self) -> str:
        """Return the next line of its stdout."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def close_stdout(self) -> None:
        """Read no more."""
        assert self.process.stdout is not None
        self.process.stdout.close()

    def end(self, number: signal.Signals | None = signal.SIGINT) -> tuple[int, str, str]:
        """Send a signal, if any, and return exit status, the rest of stdout and stderr."""
        if number is not None:
            self.process.send_signal(number)
        if self.process.stdout is not None and self.process.stdout.closed:
            self.process.stdout = None
        out, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, out or "", err

    def __enter__(self) -> Collect:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


StartCollect = Callable[..., Collect]


@pytest.fixture
def start_collect(pyz: Path, clean_env: dict[str, str], tmp_path: Path) -> Iterator[StartCollect]:
    """Start `--collect`, which does not outlive the test."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: str, **env: str) -> Collect:
            return stack.enter_context(Collect(pyz, clean_env | env, tmp_path, *arguments))

        yield start


def test_the_demo_shows_trades_as_they_are_stored(start_collect: StartCollect, tmp_path: Path) -> None:
    """Each once, until Ctrl-C, which says how many there were."""
    collect = start_collect("--demo", "--codes", *CODES)
    title, *rows = [collect.line() for _ in range(5)]
    assert title.split()[:2] == ["CODE", "PRICE"]
    assert {row.split()[0] for row in rows} == set(CODES)
    status, rest, said = collect.end()
    assert status == stockrt.EXIT_INTERRUPTED, said
    trades, stored, known = map(int, COLLECTED.findall(said)[0])
    lines = [*rows, *rest.splitlines(keepends=True)]
    assert (
        len(set(lines)) == len(lines) == stored == len(rows_of(tmp_path / "state"))
        and trades == stored + known
    )


def test_json_is_a_document_a_line_as_it_is_stored(
    start_collect: StartCollect, vendor: Vendor, tmp_path: Path
) -> None:
    """The latest trade that is there when it is asked again is no new line."""
    env = vendor.settings | {"INFOWAY_PLAN": "0"}
    collect = start_collect("--json", "--every", "1", "--codes", *CODES, **env)
    found = [json.loads(collect.line()) for _ in CODES]
    assert {one["stock_code"] for one in found} == set(CODES)
    vendor.rest.wait_for(lambda s: len(s.asked("batch_trade")) >= 3, PATIENCE)
    new = identity(vendor.stream.new_trade(CODES[0]))
    found.append(json.loads(collect.line()))
    assert found[-1]["_id"] == new
    status, rest, said = collect.end(signal.SIGTERM)
    assert (status, "Traceback" in said) == (stockrt.EXIT_INTERRUPTED, False)
    found += map(json.loads, rest.splitlines())
    assert len({one["_id"] for one in found}) == len(found)
    assert [one["_id"] for one in found] == [name for _, name in rows_of(tmp_path / "state")]


def test_the_stream_shows_each_trade_as_it_is_stored(
    start_collect: StartCollect, vendor: Vendor, tmp_path: Path
) -> None:
    """What comes while nobody listens is a gap; a second one beside it in the same state directory is refused."""
    collect = start_collect("--json", "--codes", *CODES, "AAPL", **vendor.settings)
    vendor.stream.wait_for(lambda s: {*s.subscribed} >= {*CODES}, PATIENCE)
    # the lists, of which a code needs some, are asked for at the plan's rate, which is asked for first
    assert [one.path for one in vendor.rest.requests][:1] == ["/package/info"]
    pushed = [name for _ in range(3) for name in vendor.stream.trade(*CODES)]
    shown: list[str] = []
    while not {*pushed} <= {*shown}:
        shown.append(json.loads(collect.line())["_id"])
    second = start_collect("--codes", *CODES, **vendor.settings)
    status, _, said = second.end(None)
    assert status == 1 and "another stockrt collects from the stream in " in said
    status, rest, said = collect.end()
    shown += [json.loads(line)["_id"] for line in rest.splitlines()]
    trades, stored, known = map(int, COLLECTED.findall(said)[0])
    assert status == stockrt.EXIT_INTERRUPTED and trades == stored + known
    assert stored == len(shown)  # those that were there before came over REST
    assert len({*shown}) == len(shown) and {*shown} == ids_of(tmp_path / "state")
    assert vendor.stream.missing(shown) == []


def test_what_waits_for_mongodb_is_printed_and_counted(start_collect: StartCollect, vendor: Vendor) -> None:
    """It is durable on this machine; when MongoDB has it, it is no row again."""
    env = vendor.settings | {"MONGODB_HOST": "mongodb://127.0.0.1:1/?timeoutMS=300"}
    collect = start_collect("--json", "--codes", *CODES, **env)
    vendor.stream.wait_for(lambda s: {*s.subscribed} >= {*CODES}, PATIENCE)
    wanted = {*vendor.stream.trade(*CODES)}
    shown: set[str] = set()
    while not wanted <= shown:
        shown.add(json.loads(collect.line())["_id"])
    status, rest, said = collect.end()
    shown |= {json.loads(line)["_id"] for line in rest.splitlines()}
    assert status == stockrt.EXIT_INTERRUPTED
    assert f"; {len(shown)} trades wait on this machine for MongoDB" in said.splitlines()[-1], said


def test_what_a_poll_brings_once_more_is_no_row_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the latest of a code, for however long, nor what was pushed just before."""
    monkeypatch.setattr(stockrt, "ROWS_REMEMBERED", 3)
    codes = [CODES[0]] * 3 + [CODES[1]] * 3
    trades = [stockrt.Trade(code, t, "1.0", "2", "2.0", 0) for t, code in enumerate(codes)]
    documents = [stockrt.to_document(trade, datetime(2026, 11, 28)) for trade in trades]
    with (tmp_path / "rows").open("w+") as out:
        ticks = stockrt.Ticks(stockrt.Rows(out, as_json=True, is_live=True), threading.Event())
        for numbers in ([0, 1], [1, 0], [2], [1, 2], [2], [3, 4, 5], [2], [5]):
            ticks.stored([documents[number] for number in numbers])
        ticks.close()
        out.seek(0)
        shown = [json.loads(line)["t"] for line in out]
    assert shown == [0, 1, 2, 3, 4, 5] and not ticks.is_held_up()


def test_a_slow_reader_is_waited_for_and_held_up_it_ends(
    start_collect: StartCollect, vendor: Vendor, tmp_path: Path
) -> None:
    """More than fits between store and reader: no line is left out; nobody who reads keeps it from its end."""
    collect = start_collect("--json", "--codes", *CODES, **vendor.settings)
    vendor.stream.wait_for(lambda s: {*s.subscribed} >= {*CODES}, PATIENCE)
    vendor.stream.burst(MORE_THAN_WAITS, CODES)
    assert until(lambda: len(rows_of(tmp_path / "state")) > MORE_THAN_WAITS // 3)
    shown = {json.loads(collect.line())["_id"] for _ in range(MORE_THAN_WAITS)}
    assert len(shown) == MORE_THAN_WAITS
    assert shown >= {push.identity for push in vendor.stream.pushes()}
    vendor.stream.burst(MORE_THAN_WAITS, CODES)
    assert until(lambda: len(rows_of(tmp_path / "state")) > MORE_THAN_WAITS * 4 // 3)
    collect.process.send_signal(signal.SIGINT)
    assert collect.process.wait(PATIENCE) == stockrt.EXIT_INTERRUPTED


@pytest.mark.parametrize("refused_by", ["handshake", "answer"])
def test_a_key_for_rest_alone_is_told_what_it_may_do(
    start_collect: StartCollect, vendor: Vendor, refused_by: str
) -> None:
    if refused_by == "handshake":
        vendor.stream.refuse_handshakes(*[401] * 9)
    else:
        vendor.stream.refuse(519, 9)
    status, _, said = start_collect("--codes", *CODES, **vendor.settings).end(None)
    assert status == SETTINGS_FAULT, said
    last = said.splitlines()[-1]
    assert last.startswith("stockrt: the stream serves none of these codes to INFOWAY_API_KEY")
    assert "INFOWAY_PLAN" in last and "--collect --every 10" in last
    assert ("401" if refused_by == "handshake" else "519") in said and "test-key" not in said


def test_a_key_that_nobody_takes_ends_it(start_collect: StartCollect, vendor: Vendor) -> None:
    vendor.rest.latency = 1.0  # the stream refuses it first: that alone does not tell that it serves REST
    for every in ((), ("--every", "1")):
        env = vendor.settings | {"INFOWAY_API_KEY": "wrong-key-1", "INFOWAY_PLAN": "pro"}
        status, _, said = start_collect(*every, "--codes", *CODES, **env).end(None)
        assert status == SETTINGS_FAULT and "wrong-key-1" not in said
        assert "stockrt: no key of INFOWAY_API_KEY can be used any more: HTTP 401: Token invalid" in said


def test_codes_of_which_none_can_be_collected_end_it(
    start_collect: StartCollect, vendor: Vendor, tmp_path: Path
) -> None:
    """Typed codes mean the same for ever: nothing would come of waiting. By the stream and, beside it, by polls."""
    ways = {"stream": (), "polls": ("--every", "1")}
    started = [
        start_collect(
            *every, "--codes", "AAPL", "430047", **vendor.settings, STATE_DIRECTORY=str(tmp_path / way)
        )
        for way, every in ways.items()
    ]
    for collect in started:
        status, rows, said = collect.end(None)
        assert status == 1 and len(rows.splitlines()) == 1  # the head
        assert said.startswith("stockrt: nothing to collect: AAPL (") and "did you mean AAPL.US" in said
        assert ", 430047 (" in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("every", [(), ("--every", "1")])
def test_codes_that_are_not_collected_are_named_in_the_readers_language(
    start_collect: StartCollect, vendor: Vendor, every: tuple[str, ...]
) -> None:
    env = vendor.settings | {"LANG": "zh_CN.UTF-8", "LOG_LEVEL": "warning"}
    collect = start_collect(*every, "--codes", CODES[0], "430047", **env)
    assert collect.process.stderr is not None
    said = collect.process.stderr.readline()
    assert "430047（属于北京证券交易所" in in_chinese(said)
    assert "430047" not in in_chinese(collect.end()[2])


@pytest.mark.parametrize(
    ("codes", "status", "line"),
    [
        ("BTCUSDT", 0, ""),
        ("BTCUSDT AAPL", 0, "ok    codes: 1 to collect, 1 not: AAPL (no exchange given: did you mean"),
        ("430047 茅台", 1, "FAIL  codes: 0 to collect, 2 not: 430047 (of the Beijing exchange, which"),
        ("ES", 0, "ok    codes: 0 to collect, 1 not: ES ("),  # the lists know it
    ],
)
def test_codes_that_cannot_be_collected_are_named_before_the_start(
    run_pyz: RunPyz, codes: str, status: int, line: str
) -> None:
    env = {"INFOWAY_API_KEY": "test-key", "COLLECT": "stream", "COLLECT_CODES": codes}
    done = run_pyz("--check-settings", env=env)
    settings, *more = done.stdout.splitlines()
    assert (done.returncode, bool(more)) == (status, bool(line)), done.stdout
    assert "".join(more).startswith(line) and settings.startswith("ok    settings: ")


def test_check_says_what_the_stream_allows(run_pyz: RunPyz, vendor: Vendor) -> None:
    """Of a key with one connection also that this one may still count; a refusal with its words."""
    env = vendor.settings | {"COLLECT": "stream", "COLLECT_CODES": " ".join(CODES)}

    def checked() -> str:
        done = run_pyz("--check", env=env)
        (line,) = [line for line in done.stdout.splitlines() if line[6:].startswith("stream")]
        assert (done.returncode == 0) == line.startswith("ok"), done.stdout
        return line

    vendor.rest.plans = {"test-key": PLANS["free"]}
    assert re.search(
        r"^ok    stream, API key \S+: ws://\S+ takes it for crypto: 1 connection, 10 codes each, 10 in all; .*429",
        checked(),
    )
    assert [one.end for one in vendor.stream.connections] != [""]
    vendor.rest.plans = {"test-key": PLANS["pro"]}
    assert checked().endswith("9 connections, 600 codes each, 5000 in all")
    vendor.stream.refuse_handshakes(401)
    assert re.search("^FAIL  stream, .*401", checked())
    env |= {"HTTP_PROXY": "http://proxy.example:3128", "NO_PROXY": "127.0.0.1"}
    proxy = run_pyz("--check", env=env).stdout
    assert "proxy: the API straight, the stream straight\n" in proxy


def test_a_reader_that_goes_away_ends_it_quietly(start_collect: StartCollect) -> None:
    """Also where no further trade would be printed."""
    for every in ("1", "3600"):
        collect = start_collect("--demo", "--json", "--every", every, "--codes", "TSLA.US")
        collect.line()
        collect.close_stdout()
        status, _, said = collect.end(None)
        assert (status, [line for line in said.splitlines() if " INFO " not in line]) == (0, []), said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--collect", "--every", "0"), "--every 0: expected seconds from 1 to 86400"),
        (("--collect", "--every", "soon"), "--every soon: expected seconds from 1 to 86400"),
        (("--collect", "--every", "nan"), "--every nan: expected seconds"),
        (("--once", "--codes", "AAPL.US", "--every", "5"), "--every goes with --collect"),
        (("--collect",), "--collect needs --codes CODE …, --codes-file FILE, or COLLECT_CODES"),
        (("--collect", "--codes", ","), "--codes: no code in it"),
        (("--collect", "--once", "--codes", "AAPL.US"), "not allowed with argument"),
    ],
)
def test_what_does_not_go_together_is_said(run_pyz: RunPyz, arguments: tuple[str, ...], words: str) -> None:
    if "--codes" not in arguments and "--every" in arguments:
        arguments += ("--codes", "AAPL.US")
    done = run_pyz(*arguments, env={"INFOWAY_API_KEY": "test-key"})
    assert done.returncode == 64 and words in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--collect", "--every", "0", "--codes", "AAPL.US"), "--every 0: expected seconds from 1 to 86400"),
        (("--collect", "--every", "0"), "--every 0: expected seconds from 1 to 86400"),
        (("--collect", "--codes", ","), "--codes: no code in it"),
        (("--once", "--codes", ","), "--codes: no code in it"),
        (("--backfill", "5", "--codes", ","), "--codes: no code in it"),
    ],
)
def test_fault_of_the_command_line_comes_before_a_key_that_is_missing(
    run_pyz: RunPyz, arguments: tuple[str, ...], words: str
) -> None:
    done = run_pyz(*arguments)
    assert done.returncode == 64 and done.stderr.startswith(f"stockrt: {words}"), done.stderr


def test_without_a_key_it_says_so(run_pyz: RunPyz) -> None:
    done = run_pyz("--collect", "--codes", "AAPL.US")
    assert done.returncode == SETTINGS_FAULT and "INFOWAY_API_KEY is not set" in done.stderr


def test_the_demo_stays_out_of_mongodb(run_pyz: RunPyz) -> None:
    done = run_pyz("--collect", "--demo", "--codes", "AAPL.US", env={"MONGODB_HOST": "mongodb://h"})
    assert done.returncode == 64 and "--demo stores synthetic trades on this machine only" in done.stderr
