"""The daemon against real servers: it stays connected, executes, and answers each command exactly once."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import RunPyz
from kit.chinese import in_chinese
from kit.clock import FakeClock
from kit.daemons import (
    HASH,
    PATIENCE,
    ROOT_FOLDER,
    Hasty,
    Lag,
    ProcessDaemon,
    ThreadDaemon,
    environment,
    number,
    settings_for,
    until,
)
from kit.fault_world import rows_of
from kit.forked import Forked
from kit.infoway_server import Answer, InfowayServer, Request
from kit.platform_server import (
    FAILURE_STATUSES,
    GENERATIONS,
    PlatformProcess,
    PlatformServer,
    Result,
)
from kit.shims import WallClock
from kit.websocket_wire import TEXT, accept_key, frame_bytes

import stockrt
from stockrt import Command, Journal

# A server that forgets a session as soon as its connection is gone, so that a test need not wait for its sweep.
FORGETFUL: dict[str, Any] = {"zombies": False}

StartDaemon = Callable[..., ProcessDaemon]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """The state directory of the one daemon, which is registered."""
    directory = tmp_path / "state"
    stockrt.write_hash(directory, HASH)
    return directory


@pytest.fixture
def platform() -> Iterator[PlatformServer]:
    """A newer server that knows the daemon and pings only when told to."""
    with PlatformServer(ping_every=0, **FORGETFUL) as server:
        server.know(HASH)
        yield server


@pytest.fixture
def settings(platform: PlatformServer, infoway: InfowayServer, state: Path) -> stockrt.Settings:
    """The settings of a daemon of `platform` and `infoway`."""
    return settings_for(platform.port, infoway.url, state)


@pytest.fixture
def start_daemon(
    clean_env: dict[str, str], state: Path, infoway: InfowayServer, pyz: Path, forked: Forked
) -> Iterator[StartDaemon]:
    """Start the daemon as a process, which does not outlive the test; the quick run forks it, where it can."""
    with contextlib.ExitStack() as stack:

        def start(server: PlatformServer | PlatformProcess, **more: str) -> ProcessDaemon:
            settings = environment(server.port, infoway.url, state, **more)
            return stack.enter_context(ProcessDaemon(clean_env, settings, pyz, forked=forked))

        yield start


class Gate:
    """Holds the API's answers back until it is opened."""

    def __init__(self, infoway: InfowayServer) -> None:
        self._infoway = infoway
        self._open = threading.Event()
        infoway.latency = self._wait

    def _wait(self, request: Request) -> float:
        self._open.wait(PATIENCE)
        return 0.0

    def reached(self, requests: int = 1) -> None:
        """Wait until so many requests have come."""
        self._infoway.wait_for(lambda s: s.request_count >= requests, PATIENCE)

    def open(self) -> None:
        """Let every answer go."""
        self._open.set()


@pytest.fixture
def gate(infoway: InfowayServer) -> Iterator[Gate]:
    """The gate in front of the API's answers, closed."""
    made = Gate(infoway)
    yield made
    made.open()


def connected(server: PlatformServer | PlatformProcess, times: int = 1) -> None:
    """Wait until the module is connected, and was dialled so many times."""
    if isinstance(server, PlatformServer):
        assert server.wait_for(lambda s: s.connected and len(s.dials) >= times, PATIENCE), "not connected"
    else:
        assert server.wait_for(lambda s: s["connected"] and s["dials"] >= times, PATIENCE), "not connected"


def answered(server: PlatformServer, *ids: str, times: int = 1) -> None:
    """Wait until each of these executions has so many results."""
    done = server.wait_for(lambda s: all(len(s.results_for(one)) >= times for one in ids), PATIENCE)
    assert done, f"unanswered: {[one for one in ids if len(server.results_for(one)) < times]}"


def one_answer(server: PlatformServer, execution_id: str) -> dict[str, Any]:
    """The result of an execution, of which there is one."""
    answered(server, execution_id)
    (result,) = server.results_for(execution_id)
    return result.data


def settled(server: PlatformServer) -> None:
    """Wait until what was sent to the daemon is handled: it answers in the order of arrival."""
    before = len(server.pings)
    server.ping_now()
    assert server.wait_for(
        lambda s: len(s.pings) > before and all(ping.answered or ping.ended for ping in s.pings), PATIENCE
    )


def texts_by_id(results: Iterable[Result]) -> dict[str, set[str]]:
    """The different texts of each execution's results."""
    found: dict[str, set[str]] = {}
    for result in results:
        found.setdefault(result.execution_id, set()).add(result.text)
    return found


def stored(state: Path) -> list[str]:
    """The code of every document in the local store, in the order of arrival."""
    if not (state / stockrt.SQLITE_NAME).exists():
        return []
    rows = rows_of(state / stockrt.SQLITE_NAME, "realtime")
    return [row["stock_code"] for row in sorted(rows, key=lambda row: int(row["seq"]))]


def journalled(state: Path, what: str = "execution_id", where: str = "execution_id IS NOT NULL") -> list[Any]:
    """What the journal's file holds."""
    if not (state / stockrt.JOURNAL_NAME).exists():
        return []
    with contextlib.closing(sqlite3.connect(state / stockrt.JOURNAL_NAME)) as db:
        if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'executions'").fetchone():
            return []
        return [
            value for (value,) in db.execute(f"SELECT {what} FROM executions WHERE {where} ORDER BY number")
        ]


def codes_for(name: object, count: int = 10) -> list[str]:
    """Codes that only this command asks for."""
    return [f"Q{name}X{n}.US".upper() for n in range(count)]


EXECUTE = json.dumps({"type": "execute", "meta": {"execution_id": "e-1"}, "args": {"code_list": ["AAPL.US"]}})


@contextlib.contextmanager
def in_one_breath(*texts: str, hang_up: bool = False) -> Iterator[int]:
    """Listen on a port; the first client gets the handshake and all the texts in one piece, others are refused."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(listener.getsockname()[1])

        def serve() -> None:
            peer, _ = listener.accept()
            listener.close()
            with peer:
                head = b""
                while b"\r\n\r\n" not in head and (more := peer.recv(4096)):
                    head += more
                (key,) = (
                    line[18:].strip()
                    for line in head.decode().splitlines()
                    if line.startswith("Sec-WebSocket-Key")
                )
                answer = (
                    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                    f"Sec-WebSocket-Accept: {accept_key(key)}\r\n\r\n"
                )
                peer.sendall(answer.encode() + b"".join(frame_bytes(TEXT, text.encode()) for text in texts))
                while not hang_up and peer.recv(4096):
                    pass

        server = threading.Thread(target=serve, daemon=True)
        server.start()
        yield port
        server.join(PATIENCE)


# ------------------------------------------------------------------------------------------------------
# Execute, answer
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", GENERATIONS)
def test_it_executes_and_answers_for_both_generations(
    generation: str, infoway: InfowayServer, state: Path
) -> None:
    with PlatformServer(generation) as server:
        server.know(HASH)
        with ThreadDaemon(settings_for(server.port, infoway.url, state)):
            connected(server)
            ids = [
                server.execute(codes_for(n), args_key=args_key, wrap=wrap)
                for n, (wrap, args_key) in enumerate(
                    [("object", "code_list"), ("string", "stock_list"), ("bare", "codes")]
                )
            ]
            ids.append(server.execute("600519, 000001.SZ", wrap="string"))
            ids.append(server.execute([600519]))
            answered(server, *ids)
            answers = [one_answer(server, one) for one in ids]
            settled(server)
            assert len(server.results) == len(ids)
            assert until(lambda: journalled(state, where="NOT received") == [])
        assert [answer["status"] for answer in answers] == ["success"] * 5
        assert [answer["result"]["success_count"] for answer in answers] == [10, 10, 10, 2, 1]
        assert [answer["result"]["duplicate_count"] for answer in answers] == [0, 0, 0, 0, 1]
        assert [answer["meta"] for answer in answers] == [
            json.loads(json.dumps(_command(execute.text)["meta"])) for execute in server.executes
        ]
        assert server.mailed == []
        assert len(server.dials) == 1
    assert len(stored(state)) == len(set(stored(state))) == 32


def _command(text: str) -> dict[str, Any]:
    """The command in a text that the server has sent."""
    found = json.loads(text)
    found = found.get("message", found)
    command: dict[str, Any] = json.loads(found) if isinstance(found, str) else found
    return command


def test_what_cannot_be_understood_is_answered_with_a_failure(
    platform: PlatformServer, settings: stockrt.Settings
) -> None:
    with ThreadDaemon(settings):
        connected(platform)
        ids = [
            platform.execute(None),
            platform.execute("", args_key=None),
            platform.execute({"a": 1}),
            platform.execute([f"{n:06d}" for n in range(100_001)]),
        ]
        answers = [one_answer(platform, one) for one in ids]
        platform.execute(["AAPL.US"], meta=None)  # without an id it is answered all the same
        assert platform.wait_for(lambda s: len(s.results) == 5, PATIENCE)
    assert all(answer["status"] in FAILURE_STATUSES for answer in answers)
    assert all(answer["error"] for answer in answers)
    assert len(platform.mailed) == 4
    assert platform.results[-1].status == "success"


def test_a_command_without_codes_takes_this_instances_share(
    platform: PlatformServer, infoway: InfowayServer, state: Path
) -> None:
    """Where none of the codes is in it, that is said."""
    place = stockrt.share_of("AAPL.US", 2)
    for share, status in ((place, "success"), (3 - place, "failure")):
        settings = settings_for(
            platform.port, infoway.url, state, COLLECT_CODES="aapl.us", COLLECT_SHARE=f"{share}/2"
        )
        before = len(platform.dials)
        with ThreadDaemon(settings):
            connected(platform, before + 1)
            answer = one_answer(platform, platform.execute(None))
        assert answer["status"] == status
    assert answer["error"] == f"none of the codes of COLLECT_CODES is in COLLECT_SHARE={3 - place}/2"
    assert stored(state) == ["AAPL.US"]


def test_partial_and_total_failures_are_said(
    platform: PlatformServer, settings: stockrt.Settings, infoway: InfowayServer
) -> None:
    infoway.unknown = {"GONE.US"}
    with ThreadDaemon(settings):
        connected(platform)
        some = one_answer(platform, platform.execute(["AAPL.US", "GONE.US", "A?B"]))
        infoway.script = lambda request: Answer.html(500)
        none = one_answer(platform, platform.execute(["AAPL.US"]))
    assert some["status"] == "success"
    assert "GONE.US" in some["message"]
    assert "GONE.US" in some["result"]["failed_stocks"]
    assert some["result"]["failed_count"] == len(some["result"]["failed_stocks"])
    assert none["status"] == "failure"
    assert "AAPL.US (HTTP 500" in none["error"]
    assert [mail.text for mail in platform.mailed] == [none["error"]]


@pytest.mark.parametrize("odd", ["\ud800half", "a\0b", "x" * 10_000, "';--"])
def test_an_odd_execution_id_is_served_like_any_other(
    odd: str, platform: PlatformServer, settings: stockrt.Settings
) -> None:
    with ThreadDaemon(settings) as running:
        connected(platform)
        execution_id = platform.execute(["AAPL.US"], execution_id=odd)
        assert platform.wait_for(lambda s: s.results or running.error, PATIENCE)
        assert running.error is None
        assert one_answer(platform, execution_id)["status"] == "success"


# ------------------------------------------------------------------------------------------------------
# The connection during work
# ------------------------------------------------------------------------------------------------------


def test_pings_are_answered_at_once_while_the_api_is_slow(gate: Gate, start_daemon: StartDaemon) -> None:
    """The API answers when the pings were."""
    many, every = number(10, 50), number(0.1, 1.0)
    with PlatformServer(ping_every=every, ws_ping_every=every) as server:
        server.know(HASH)
        start_daemon(server)
        connected(server)
        execution_id = server.execute(["AAPL.US"])
        gate.reached()
        before = len(server.pings)
        for kind in ("json", "ws"):
            assert server.wait_for(
                lambda s: sum(p.kind == kind and p.answered is not None for p in s.pings[before:]) >= many,  # noqa: B023
                PATIENCE,
            )
        assert not server.results_for(execution_id)
        gate.open()
        assert one_answer(server, execution_id)["status"] == "success"
        settled(server)
        assert len(server.dials) == 1


def test_fifteen_commands_at_once_are_fifteen_results(
    infoway: InfowayServer, start_daemon: StartDaemon, state: Path
) -> None:
    infoway.latency = number(0.3, 4.0, quick=0.1)
    with PlatformServer(ping_every=1) as server:
        server.know(HASH)
        start_daemon(server)
        connected(server)
        ids = [server.execute(codes_for(n, 3)) for n in range(15)]
        assert server.wait_for(lambda s: not s.unanswered, 15 * 4 + PATIENCE)
        settled(server)
        assert [result.execution_id for result in server.results] == ids
        assert {result.status for result in server.results} == {"success"}
        assert len(server.dials) == 1
        assert server.mailed == []
    assert sorted(stored(state)) == sorted(code for n in range(15) for code in codes_for(n, 3))


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_heartbeat_is_sent_to_a_server_that_confirms_it(
    generation: str, infoway: InfowayServer, state: Path
) -> None:
    with PlatformServer(generation, ping_every=0) as server:
        server.know(HASH)
        with ThreadDaemon(settings_for(server.port, infoway.url, state, HEARTBEAT_INTERVAL="1")):
            connected(server)
            if generation == "old":
                assert server.wait_for(lambda s: len(s.frames) >= 3, PATIENCE)
                assert {frame.text for frame in server.frames} == {"heartbeat"}
                assert server.bad_frames == []
            else:
                assert server.wait_for(lambda s: s.bad_frames, PATIENCE)
                assert not server.wait_for(lambda s: len(s.bad_frames) > 1, 2.5)
        assert len(server.dials) == 1


def test_garbage_is_survived(platform: PlatformServer, settings: stockrt.Settings) -> None:
    platform.json_garbage = True
    with ThreadDaemon(settings):
        connected(platform)
        for fragment in (0, 7):
            platform.fragment = fragment
            assert one_answer(platform, platform.execute(["AAPL.US"]))["status"] == "success"
        settled(platform)
        assert len(platform.dials) == 1
    assert len(platform.results) == 2


def test_a_frame_of_ten_mebibytes_is_refused_and_survived(
    platform: PlatformServer, settings: stockrt.Settings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    with ThreadDaemon(settings, rng=Hasty()):
        connected(platform)
        for fragment in (0, 65536):
            platform.fragment, platform.big_frames = fragment, True
            dials = len(platform.dials)
            platform.execute(["AAPL.US"])
            assert platform.wait_for(lambda s: len(s.dials) > dials + 1, PATIENCE)  # noqa: B023
            platform.big_frames = False
        platform.fragment = 0
        assert platform.wait_for(lambda s: s.connected and not s.dials[-1].closed, PATIENCE)
        execution_id = platform.execute(["AAPL.US"])
        if not platform.wait_for(lambda s: s.results_for(execution_id), 2):
            platform.resend(execution_id)  # it had gone to a connection with a great frame on its way
        assert one_answer(platform, execution_id)["status"] == "success"
    assert 1009 in {dial.close_code for dial in platform.dials}
    assert "connection lost: a frame of 10485" in caplog.text


# ------------------------------------------------------------------------------------------------------
# Finding the server again
# ------------------------------------------------------------------------------------------------------


class Longest(random.Random):
    """Takes the whole of each delay."""

    def uniform(self, a: float, b: float) -> float:
        return b


def dial_delays(rng: random.Random) -> Iterator[float]:
    """The daemon's delays between dials."""
    return stockrt.backoff(stockrt.DIAL_FIRST_S, stockrt.DIAL_CAP_S, rng, stockrt.DIAL_GROWTH)


def dial_times(seed: int, until_s: float) -> list[float]:
    """When a client dials that lost its server at 0, up to the first dial after `until_s`."""
    times, now, delays = [], 0.0, dial_delays(random.Random(seed))
    while now < until_s:
        now += next(delays)
        times.append(now)
    return times


def test_a_server_that_was_away_for_five_seconds_is_met_within_two_in_the_median() -> None:
    waits = [dial_times(seed, 5.0)[-1] - 5.0 for seed in range(20 * 200)]
    medians = [statistics.median(waits[n : n + 20]) for n in range(0, len(waits), 20)]
    assert sum(median < 2.0 for median in medians) >= 0.99 * len(medians)
    assert statistics.median(waits) < 1.5


def test_a_hundred_clients_do_not_come_back_at_once() -> None:
    crowds = []
    for crowd in range(50):
        waits = [dial_times(100 * crowd + client, 5.0)[-1] - 5.0 for client in range(100)]
        seconds = Counter(map(int, waits))
        crowds.append(max(seconds.values()) / (len(waits) / (max(seconds) + 1)))
    assert statistics.median(crowds) < 3


def test_no_delay_is_above_half_a_minute_and_the_first_is_random_too() -> None:
    assert len({next(dial_delays(random.Random(seed))) for seed in range(100)}) == 100
    delays = dial_delays(Longest())
    longest = [next(delays) for _ in range(1000)]
    assert longest == sorted(longest)
    assert max(longest) == longest[20] == stockrt.DIAL_CAP_S <= 30


def test_real_daemons_come_back_when_their_delays_say_so(infoway: InfowayServer, tmp_path: Path) -> None:
    away = number(5.0, 5.0, quick=2.0)
    # no dial of these is so near to the server's return that a busy machine could decide its outcome
    seeds = [s for s in range(1000) if all(abs(at - away) > 0.8 for at in dial_times(s, away))]
    seeds = seeds[: number(10, 100)]
    server = PlatformServer(ping_every=0, **FORGETFUL)
    with contextlib.ExitStack() as daemons:
        server.start()
        daemons.callback(server.stop)
        for seed in seeds:
            module = server.know(f"-{1000 + seed}")
            state = tmp_path / module
            stockrt.write_hash(state, module)
            daemons.enter_context(
                ThreadDaemon(settings_for(server.port, infoway.url, state), rng=random.Random(seed))
            )
        assert server.wait_for(lambda s: len(s.connected) == len(seeds), PATIENCE)
        settled(server)
        before = len(server.dials)
        lag = daemons.enter_context(Lag())
        lost = time.monotonic()
        server.stop()
        threading.Event().wait(lost + away - time.monotonic())
        server.start()
        back = time.monotonic()
        assert server.wait_for(lambda s: len(s.connected) == len(seeds), PATIENCE)
        late = {
            int(dial.module_hash[1:]) - 1000: (dial.handshake or back) - back
            for dial in server.dials[before:]
        }
    assert late.keys() == set(seeds)
    for seed, wait in late.items():
        assert wait == pytest.approx(dial_times(seed, away)[-1] - away, abs=1.5 + lag.seconds), seed


ACCEPT_THEN_CLOSE = """
import json, os, random, sys, threading, stockrt

delays = []

def descriptors():
    return len(os.listdir("/proc/self/fd"))

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

class Hasty(random.Random):
    def uniform(self, a, b):
        delays.append(b)
        if len(delays) in marks:
            # a timer that was cancelled is on its way out
            for thread in threading.enumerate():
                if isinstance(thread, threading.Timer):
                    thread.join()
            print(json.dumps({"threads": threading.active_count(), "descriptors": descriptors(),
                              "resident": resident(), "delays": delays}), flush=True)
        return a

marks = [int(mark) for mark in sys.argv[1:]]
settings = stockrt.load_settings(os.environ, None, ()).settings
stockrt.Daemon(settings, rng=Hasty()).run()
"""


@pytest.mark.parametrize("close_code", [1000, pytest.param(1006, marks=pytest.mark.long)])
def test_a_thousand_connections_that_are_closed_at_once_leave_nothing_behind(
    close_code: int, infoway: InfowayServer, state: Path, clean_env: dict[str, str]
) -> None:
    marks = [100, 200, number(300, 1000, quick=250)]
    with (
        PlatformServer(close_after_handshake=True, close_code=close_code, **FORGETFUL) as server,
        contextlib.ExitStack() as stack,
    ):
        server.know(HASH)
        driver = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-c", ACCEPT_THEN_CLOSE, *map(str, marks)],
                env=clean_env
                | environment(server.port, infoway.url, state)
                | {"PYTHONPATH": str(ROOT_FOLDER)},
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="utf-8",
            )
        )
        stack.callback(driver.kill)
        assert driver.stdout is not None
        early, middle, late = (json.loads(driver.stdout.readline()) for _ in marks)
    assert early["threads"] == middle["threads"] == late["threads"] == 3
    # the clerk has a file open now and then
    assert late["descriptors"] - early["descriptors"] < 10
    assert late["resident"] - early["resident"] < 1_000_000
    ceilings = late["delays"]
    assert ceilings[0] == stockrt.DIAL_FIRST_S
    assert ceilings == sorted(ceilings)
    assert set(ceilings[20:]) == {stockrt.DIAL_CAP_S}


def test_the_delay_starts_anew_after_a_connection_that_was_useful(
    platform: PlatformServer, settings: stockrt.Settings
) -> None:
    platform.close_after_handshake = True
    many = threading.Event()

    class Chance(Hasty):
        def uniform(self, a: float, b: float) -> float:
            if len(self.ceilings) == 19:
                platform.close_after_handshake = False
                many.set()
            return super().uniform(a, b)

    chance = Chance()
    with ThreadDaemon(settings, rng=chance):
        assert many.wait(PATIENCE)
        connected(platform, 21)
        settled(platform)
        platform.close_connections()
        connected(platform, 22)
    delays = chance.ceilings
    assert delays[19] > 10
    assert delays[20] == stockrt.DIAL_FIRST_S


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged as a warning."""
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_a_module_still_online_is_told_apart_and_said_once(
    platform: PlatformServer, settings: stockrt.Settings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    platform.refuse_online_for = 3600
    with ThreadDaemon(settings, rng=Hasty()):
        assert platform.wait_for(lambda s: len(s.dials) >= 5, PATIENCE)
        (said,) = warnings_of(caplog)
        assert "still counted as online" in said
        assert "old session or a second instance" in said
        platform.refuse_online_for = 0
        connected(platform)
        settled(platform)
        assert until(lambda: "well again" in caplog.text)
    assert {dial.status for dial in platform.dials} == {101, 403}


def test_after_a_kill_the_built_file_dials_every_second_until_the_old_session_ends(
    pyz: Path, clean_env: dict[str, str], infoway: InfowayServer, state: Path
) -> None:
    """Its delays would have grown to several seconds meanwhile: it would have dialled half as often."""
    lasts = number(20.0, 20.0, quick=8.0)
    with PlatformServer(ping_every=0, zombie_after=lasts, sweep=0.2) as server:
        server.know(HASH)
        settings = environment(server.port, infoway.url, state)
        with ProcessDaemon(clean_env, settings, pyz) as daemon:
            connected(server)
            daemon.kill()
            daemon.start()
            connected(server, times=2)
            assert one_answer(server, server.execute(["TSLA.US"]))["status"] == "success"
        assert len([dial for dial in server.dials if dial.status == 403]) >= 0.75 * lasts


def test_another_instance_that_stays_online_is_dialled_seldom(
    platform: PlatformServer, infoway: InfowayServer, settings: stockrt.Settings
) -> None:
    clock, rng = FakeClock(), Hasty()
    daemon = stockrt.Daemon(settings, rng=rng, clock=clock)
    daemon._presence = stockrt.Presence.ONLINE
    daemon._presence_since = clock.monotonic()
    delays = daemon._fresh_delays()
    assert daemon._delay(delays) == stockrt.OLD_SESSION_DIAL_S[0]
    clock.advance(stockrt.OLD_SESSION_S)
    for _ in range(20):
        daemon._delay(delays)
    assert rng.ceilings[-1] == stockrt.DIAL_CAP_S


def test_an_unknown_hash_is_told_apart_and_said_once_and_a_new_one_is_taken(
    platform: PlatformServer, settings: stockrt.Settings, caplog: pytest.LogCaptureFixture
) -> None:
    platform.forget(HASH)
    with ThreadDaemon(settings, rng=Hasty()):
        assert platform.wait_for(lambda s: len(s.dials) >= 20, PATIENCE)
        (said,) = warnings_of(caplog)
        assert "hash unknown to the server" in said
        assert "--register --force" in said
        stockrt.write_hash(settings.state_directory, platform.know("-5"))  # as --register --force does
        connected(platform)
        assert platform.connected == ["-5"]
        assert HASH not in caplog.text


def test_a_handshake_that_takes_its_time_is_waited_for(
    platform: PlatformServer, settings: stockrt.Settings
) -> None:
    platform.slow_handshake = 2
    with ThreadDaemon(settings):
        connected(platform)
        assert len(platform.dials) == 1


@pytest.mark.parametrize("trouble", ["swallowed pings", "frozen"])
def test_a_dead_peer_is_noticed_and_dialled_again(
    trouble: str,
    platform: PlatformServer,
    infoway: InfowayServer,
    state: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with ThreadDaemon(settings_for(platform.port, infoway.url, state, HEARTBEAT_INTERVAL="1")):
        connected(platform)
        settled(platform)
        if trouble == "frozen":
            platform.freeze()
            try:
                assert until(lambda: "nothing came for" in caplog.text)
            finally:
                platform.thaw()
        else:
            platform.swallow_pings = True
            assert platform.wait_for(lambda s: len(s.dials) > 1, PATIENCE)
            platform.swallow_pings = False
        assert "nothing came for" in caplog.text
        assert platform.wait_for(
            lambda s: s.connected and s.connected and s.dials[-1].closed is None, PATIENCE
        )
        execution_id = platform.execute(["AAPL.US"])
        for _ in range(int(PATIENCE)):
            if platform.wait_for(lambda s: s.results_for(execution_id), 1):
                break
            platform.resend(execution_id)  # it had gone to the connection that was just given up
        assert one_answer(platform, execution_id)["status"] == "success"


# ------------------------------------------------------------------------------------------------------
# Nothing is lost, nothing is done twice
# ------------------------------------------------------------------------------------------------------


def test_an_execution_in_progress_that_comes_again_is_answered_once(
    platform: PlatformServer, settings: stockrt.Settings, infoway: InfowayServer, gate: Gate
) -> None:
    with ThreadDaemon(settings):
        connected(platform)
        execution_id = platform.execute(["AAPL.US"])
        gate.reached()
        queued = platform.execute(["TSLA.US"])
        for _ in range(3):
            platform.resend(execution_id)
            platform.resend(queued)
        settled(platform)
        gate.open()
        answered(platform, execution_id, queued)
        settled(platform)
    assert [result.execution_id for result in platform.results] == [execution_id, queued]
    assert infoway.codes_asked() == ["AAPL.US", "TSLA.US"]


def test_an_execution_that_is_done_gets_the_same_answer_again_also_after_a_restart(
    platform: PlatformServer, settings: stockrt.Settings, infoway: InfowayServer
) -> None:
    with ThreadDaemon(settings):
        connected(platform)
        execution_id = platform.execute(["AAPL.US", "GONE!"])
        answered(platform, execution_id)
        infoway.bump()
        platform.resend(execution_id)
        answered(platform, execution_id, times=2)
    with ThreadDaemon(settings):
        connected(platform, 2)
        settled(platform)
        assert len(platform.results) == 2  # confirmed ones are not sent by themselves
        platform.resend(execution_id)
        answered(platform, execution_id, times=3)
    assert len({result.text for result in platform.results}) == 1
    assert infoway.codes_asked() == ["AAPL.US"]


def test_a_full_queue_refuses_at_once_and_shutdown_answers_everything(
    platform: PlatformServer, settings: stockrt.Settings, infoway: InfowayServer, gate: Gate
) -> None:
    with ThreadDaemon(settings) as running:
        connected(platform)
        working = platform.execute(["AAPL.US"])
        gate.reached()
        queued = [platform.execute(["TSLA.US"], execution_id=f"q{n}") for n in range(1000)]
        settled(platform)
        assert platform.results == []
        extra = [platform.execute(["TSLA.US"], execution_id=f"x{n}") for n in range(3)]
        refusals = [one_answer(platform, one) for one in extra]
        assert all(answer["status"] == "failure" for answer in refusals)
        assert all("1000" in answer["error"] for answer in refusals)
        platform.shutdown_module()
        assert platform.wait_for(lambda s: s.shutdown_confirmations, PATIENCE)
        late = platform.execute(["TSLA.US"])
        assert "stopping" in one_answer(platform, late)["error"]
        gate.open()
        assert running.ended()
        assert platform.unanswered == []
    assert one_answer(platform, working)["status"] == "success"
    assert {one_answer(platform, one)["status"] for one in queued} == {"failure"}
    assert len(platform.results) == 1 + 1000 + 3 + 1
    assert infoway.codes_asked() == ["AAPL.US"]
    assert len(platform.shutdown_confirmations) == 1
    assert len(platform.dials) == 1


def test_a_result_is_kept_on_disk_while_the_server_is_away(
    platform: PlatformServer, infoway: InfowayServer, start_daemon: StartDaemon, state: Path, gate: Gate
) -> None:
    daemon = start_daemon(platform)
    connected(platform)
    execution_id = platform.execute(["AAPL.US"])
    gate.reached()
    platform.stop()
    gate.open()
    assert until(lambda: journalled(state, "answer", "answer IS NOT NULL"))
    daemon.kill()
    daemon.start()
    platform.start()
    answered(platform, execution_id)
    assert until(lambda: journalled(state, "received") == [1])
    dials = len(platform.dials)
    platform.close_connections()
    connected(platform, dials + 1)
    settled(platform)
    assert len(platform.results) == 1
    assert infoway.codes_asked() == ["AAPL.US"]


def test_a_command_that_comes_twice_in_one_breath_is_one(infoway: InfowayServer, state: Path) -> None:
    with in_one_breath(EXECUTE, EXECUTE) as port, ThreadDaemon(settings_for(port, infoway.url, state)):
        assert until(lambda: journalled(state, "answer", "answer IS NOT NULL"))
    assert journalled(state) == ["e-1"]
    assert infoway.codes_asked() == ["AAPL.US"]


def test_a_command_in_front_of_the_connections_end_is_accepted(infoway: InfowayServer, state: Path) -> None:
    ping = json.dumps({"type": "ping"})
    with (
        in_one_breath(ping, EXECUTE, ping, hang_up=True) as port,
        ThreadDaemon(settings_for(port, infoway.url, state)),
    ):
        assert until(lambda: journalled(state, "answer", "answer IS NOT NULL"))
    assert journalled(state) == ["e-1"]


def test_a_shutdown_in_front_of_the_connections_end_is_obeyed(infoway: InfowayServer, state: Path) -> None:
    with (
        in_one_breath(json.dumps({"type": "shutdown"}), hang_up=True) as port,
        ThreadDaemon(settings_for(port, infoway.url, state)) as running,
    ):
        assert running.ended(5), "it dialled again"


@pytest.mark.parametrize("how", ["no receipts", "cut before the receipt"])
def test_a_result_without_a_receipt_is_sent_again_word_for_word(
    how: str, platform: PlatformServer, settings: stockrt.Settings
) -> None:
    platform.send_receipts = how != "no receipts"
    platform.drop_next_result = 0 if how == "no receipts" else 2
    with ThreadDaemon(settings, rng=Hasty()):
        connected(platform)
        execution_id = platform.execute(["AAPL.US"])
        for times in (1, 2, 3):
            answered(platform, execution_id, times=times)
            if how == "no receipts":
                platform.send_receipts = times == 2
                if times < 3:
                    platform.close_connections()
        for times in (4, 5):
            connected(platform, times - 1)
            settled(platform)
            platform.close_connections()
    assert len(platform.results) == 3
    assert len({result.text for result in platform.results}) == 1


@pytest.mark.parametrize("close_code", [1009, 1006], ids=["1009", "cut"])
def test_a_result_that_is_too_large_for_the_platform_holds_no_other_up(
    platform: PlatformServer,
    infoway: InfowayServer,
    start_daemon: StartDaemon,
    gate: Gate,
    close_code: int,
) -> None:
    """Nginx and most servers limit a message; some say so, some cut."""
    platform.max_message, platform.too_large_code = 200_000, close_code
    daemon = start_daemon(platform)
    connected(platform)
    infoway.script = lambda request: Answer.data([])
    large = platform.execute(codes_for("big", 40_000))  # none of which there is
    gate.reached()
    others = [platform.execute(["A.US"], execution_id=f"small-{n}") for n in range(8)]
    gate.open()
    answered(platform, large, *others)
    data = platform.results_for(large)[0].data
    assert data["result"]["failed_count"] == 40_000
    assert data["result"]["failed_stocks"] == [] and "without its lists" in data["message"]
    assert len(platform.dials) <= 4
    if close_code == 1009:
        assert all(len(platform.results_for(one)) <= 2 for one in others)
        assert "1009" in daemon.log


def test_a_result_that_is_too_large_without_its_lists_too_is_given_up(
    platform: PlatformServer, start_daemon: StartDaemon, state: Path
) -> None:
    daemon = start_daemon(platform)
    connected(platform)
    platform.max_message = 5000
    large = platform.execute(["A.US"], meta={"more": "x" * 10_000}, execution_id="large")
    others = [platform.execute(["A.US"], execution_id=f"small-{n}") for n in range(8)]
    answered(platform, *others)
    assert until(lambda: "is given up" in daemon.log)
    assert until(lambda: journalled(state, where="NOT received") == [])
    answered(platform, platform.execute(["A.US"], execution_id="last"))
    assert platform.results_for(large) == []
    assert len(platform.dials) <= 4
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    start_daemon(platform)
    connected(platform)
    answered(platform, platform.execute(["A.US"], execution_id="next life"))
    assert len(platform.dials) <= 5


def test_wrapped_receipts_count_too(
    platform: PlatformServer, settings: stockrt.Settings, state: Path
) -> None:
    platform.wrap_receipts = True
    with ThreadDaemon(settings):
        connected(platform)
        answered(platform, platform.execute(["AAPL.US"]))
        assert until(lambda: journalled(state, "received") == [1])


def test_after_a_crash_the_young_are_executed_and_the_old_are_answered_as_interrupted(
    platform: PlatformServer, settings: stockrt.Settings, infoway: InfowayServer, state: Path
) -> None:
    ages = {"old": 121.0, "older": 3000.0, "young": 60.0, "younger": 0.0}
    for name, age in ages.items():
        journal = Journal(state, FakeClock(time.time() - age, time.monotonic() - age))
        journal.accept([Command(name, {"meta": {"execution_id": name}}, [f"{name.upper()}.US"])])
        journal.close()
    with ThreadDaemon(settings):
        answered(platform, *ages)
        answers = {name: one_answer(platform, name) for name in ages}
    assert [name for name in ages if answers[name]["status"] == "success"] == ["young", "younger"]
    assert all("interrupted" in answers[name]["error"] for name in ("old", "older"))
    assert sorted(infoway.codes_asked()) == ["YOUNG.US", "YOUNGER.US"]
    assert len(platform.results) == 4


def test_a_journal_that_takes_no_answer_as_it_is_taken_up_ends_nothing(
    platform: PlatformServer, settings: stockrt.Settings, state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What was interrupted is answered once that is over, of which a trigger decides here."""
    ids = [f"old-{n}" for n in range(3)]
    long_ago = FakeClock(time.time() - 600, time.monotonic() - 600)
    with contextlib.closing(Journal(state, long_ago)) as journal:
        journal.accept([Command(name, {"meta": {"execution_id": name}}, ["A.US"]) for name in ids])
    refusing = (
        "CREATE TRIGGER no BEFORE UPDATE OF answer ON executions BEGIN SELECT RAISE(ABORT, 'not now'); END"
    )
    with contextlib.closing(sqlite3.connect(state / stockrt.JOURNAL_NAME)) as other:
        other.execute(refusing)
        other.commit()
        with ThreadDaemon(settings) as running:
            connected(platform)
            assert until(lambda: any("not now" in text for text in warnings_of(caplog)))
            settled(platform)
            assert running.thread.is_alive() and not platform.results
            other.execute("DROP TRIGGER no")
            other.commit()
            answered(platform, *ids)
    assert all("interrupted" in one_answer(platform, name)["message"] for name in ids)


def test_a_command_that_the_disk_has_changed_keeps_no_other_from_its_answer(
    platform: PlatformServer, settings: stockrt.Settings, state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for age in (3000.0, 0.0):
        journal = Journal(state, FakeClock(time.time() - age, time.monotonic() - age))
        for name in (f"lost {age}", f"well {age}"):
            journal.accept([Command(name, {"meta": {"execution_id": name}}, ["A.US"])])
        journal.close()
    with contextlib.closing(sqlite3.connect(state / stockrt.JOURNAL_NAME)) as db, db:
        db.execute("UPDATE executions SET context = '{' WHERE execution_id LIKE 'lost%'")
    with ThreadDaemon(settings):
        answered(platform, "well 3000.0", "well 0.0")
    assert caplog.text.count("is not answered: the command is lost") == 2
    journal = Journal(state)
    assert journal.unanswered() == []
    journal.close()


def test_a_command_that_cannot_be_read_at_first_is_tried_again(
    platform: PlatformServer, settings: stockrt.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = iter(range(3))
    real = stockrt.Journal.read

    def read(self: Journal, number: int) -> stockrt.Accepted:
        for _ in failures:
            raise stockrt.StoreError("not now")
        return real(self, number)

    monkeypatch.setattr(stockrt.Journal, "read", read)
    with ThreadDaemon(settings):
        connected(platform)
        execution_id = platform.execute(["A.US"])
        answered(platform, execution_id)
    assert next(failures, None) is None


@pytest.mark.parametrize("broken", [stockrt.Clerk, stockrt.Executor], ids=["clerk", "executor"])
def test_a_thread_that_ends_by_an_error_ends_the_daemon_at_once(
    platform: PlatformServer, settings: stockrt.Settings, monkeypatch: pytest.MonkeyPatch, broken: type
) -> None:
    monkeypatch.setattr(stockrt, "STOP_GRACE_S", 20 * PATIENCE)  # which a running execution would have
    running = ThreadDaemon(settings)
    with contextlib.ExitStack() as stack:
        stack.enter_context(monkeypatch.context()).setattr(
            broken, {"Clerk": "_accept", "Executor": "_answer"}[broken.__name__], wrong
        )
        stack.callback(running.daemon.request_stop)
        running.thread.start()
        connected(platform)
        platform.execute(["A.US"])
        assert running.ended()
    assert isinstance(running.error, stockrt.StockrtError) and "a fault of stockrt itself" in str(
        running.error
    )
    assert running.error.exit_code == 1


def wrong(*_: object) -> None:
    """Fail as nobody has foreseen."""
    raise KeyError("wrong")


def test_answers_beyond_what_fits_into_memory_come_from_the_journal(
    platform: PlatformServer, settings: stockrt.Settings, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stockrt.Outbox.__init__, "__defaults__", (2000,))
    ids = [f"e{n}" for n in range(30)]
    journal = Journal(state)
    for name in ids:
        context = {"meta": {"execution_id": name}}
        (accepted,) = journal.accept([Command(name, context, ["A.US"])])
        journal.answer(accepted, *stockrt.empty_result(context, f"answer of {name}", settings))
    journal.close()
    platform.send_receipts = False
    with ThreadDaemon(settings) as running:
        answered(platform, *ids)
        ids += [platform.execute(["A.US"]) for _ in range(10)]
        answered(platform, *ids)
        assert running.daemon._outbox.in_memory <= 2000
        platform.send_receipts = True
        platform.kill_connections()
        answered(platform, *ids, times=2)
        assert platform.wait_for(lambda s: not running.daemon._outbox, PATIENCE)
    texts = {one: {result.text for result in platform.results_for(one)} for one in ids}
    assert {len(found) for found in texts.values()} == {1}


def test_results_older_than_an_hour_are_dropped_with_a_warning(
    platform: PlatformServer, settings: stockrt.Settings, state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, age in {"old": 3601.0, "young": 3500.0}.items():
        journal = Journal(state, FakeClock(time.time() - age, time.monotonic() - age))
        context = {"meta": {"execution_id": name}}
        (accepted,) = journal.accept([Command(name, context, ["A.US"])])
        journal.answer(accepted, *stockrt.empty_result(context, "x", settings))
        journal.close()
    with ThreadDaemon(settings):
        answered(platform, "young")
        settled(platform)
    assert [result.execution_id for result in platform.results] == ["young"]
    assert any("1 results" in text and "hour" in text for text in warnings_of(caplog))


def test_the_journal_of_a_server_that_never_confirms_forgets_without_a_new_connection(
    settings: stockrt.Settings, state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each result takes 0.9 kB in it; those that are older than an hour go, but for the last thousand."""
    clock = FakeClock(time.time())
    daemon = stockrt.Daemon(settings, clock=clock)
    daemon._clerk.start()
    for hour in range(4):
        for n in range(400):
            (accepted,) = daemon._clerk._journal.accept([Command(f"{hour}-{n}", {}, ["A.US"])])
            daemon._clerk._journal.answer(accepted, "answer")
            daemon._outbox.add(accepted, "answer", clock.monotonic())
            daemon._outbox.note_sent()
        clock.advance(stockrt.ANSWER_LIFETIME_S + 1)
        daemon._tick()
        assert until(lambda: journalled(state, where="NOT received") == [])
        assert len(daemon._outbox) == 0
        if hour == 2:
            size = (state / stockrt.JOURNAL_NAME).stat().st_size
    kept = journalled(state)
    assert stockrt.ANSWERS_KEPT <= len(kept) <= stockrt.ANSWERS_KEPT + 400
    assert kept[-1] == "3-399"
    assert (state / stockrt.JOURNAL_NAME).stat().st_size <= size + 64 * 1024
    assert sum("could not be delivered" in text for text in warnings_of(caplog)) == 4
    caplog.clear()
    for late in range(100):  # one after the other
        daemon._outbox.add(100_000 + late, "answer", clock.monotonic() - stockrt.ANSWER_LIFETIME_S - 1)
        daemon._tick()
    assert len(warnings_of(caplog)) <= 1
    daemon._clerk.leave()
    daemon._clerk.join()


@pytest.mark.parametrize("hours", [2, -2])
def test_the_clock_set_in_the_middle_of_an_execution_drops_no_result(
    platform: PlatformServer,
    start_daemon: StartDaemon,
    gate: Gate,
    wall_clock: WallClock,
    start_pyz: RunPyz,
    state: Path,
    hours: int,
) -> None:
    platform.send_receipts = False
    daemon = start_daemon(platform, **wall_clock.environment)
    connected(platform)
    executions = [platform.execute(["A.US"]) for _ in range(3)]
    gate.reached()
    wall_clock.step(3600 * hours)
    gate.open()
    answered(platform, *executions)
    wall_clock.step(3600 * (hours + 2))
    settled(platform)
    told = start_pyz("--status", "--json", env={"STATE_DIRECTORY": str(state), **wall_clock.environment})
    assert json.loads(told.stdout)["waiting"] == {"executing": 0, "commands": 0, "results": 3}
    platform.send_receipts = True
    platform.kill_connections()
    answered(platform, *executions, times=2)
    assert until(lambda: journalled(state, where="NOT received") == [])
    assert "dropped" not in daemon.log
    assert all(len(found) == 1 for found in texts_by_id(platform.results).values())


def test_a_clock_set_right_before_a_restart_makes_nothing_old_in_the_built_file(
    platform: PlatformServer,
    pyz: Path,
    clean_env: dict[str, str],
    infoway: InfowayServer,
    gate: Gate,
    wall_clock: WallClock,
    state: Path,
) -> None:
    """The machine was three hours behind: an answer is sent again, a command executed, as young as they are."""
    wall_clock.step(-3 * 3600)
    platform.send_receipts = False
    settings = environment(platform.port, infoway.url, state) | wall_clock.environment
    with ProcessDaemon(clean_env, settings, pyz) as daemon:
        connected(platform)
        failed = platform.execute(["920002.BJ"])
        answered(platform, failed)
        running = platform.execute(["A.US"])
        gate.reached()
        settled(platform)
        daemon.kill()
        wall_clock.step(0)
        gate.open()
        daemon.start()
        answered(platform, failed, times=2)
        assert one_answer(platform, running)["status"] == "success"
        assert "dropped" not in daemon.log and "interrupted" not in daemon.log


@pytest.mark.parametrize("store", ["sqlite", pytest.param("mongodb", marks=pytest.mark.long)])
def test_commands_are_answered_while_the_server_is_killed_again_and_again(
    store: str, request: pytest.FixtureRequest, infoway: InfowayServer, start_daemon: StartDaemon, state: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    commands, kills, size = number(100, 200, quick=30), number(8, 20, quick=3), 3
    more, documents = _store(store, request, state)
    infoway.latency = 0.02
    rng = random.Random(5)
    directory = tmp_path / "platform"
    directory.mkdir()
    with PlatformProcess(directory, retry_executes=True, **FORGETFUL) as server:
        server.control("know", {"module_hash": HASH})
        start_daemon(server, **more)
        connected(server)
        ids = [f"e{n}" for n in range(commands)]
        waiting, down = list(ids), threading.Event()

        def kill() -> None:
            server.kill()
            down.set()

        for _ in range(kills):
            moment = threading.Timer(rng.uniform(0.0, 0.5), kill)
            moment.start()
            for _ in range(commands // kills):
                if waiting:
                    with contextlib.suppress(OSError, ValueError):
                        server.execute(codes_for(waiting[0], size), execution_id=waiting[0])
                        waiting.pop(0)
                    if down.is_set():
                        break
            assert down.wait(PATIENCE)
            moment.join()
            down.clear()
            server.start()
            assert server.wait_for(lambda s: s["connected"], PATIENCE)
        for execution_id in waiting:
            server.execute(codes_for(execution_id, size), execution_id=execution_id)
        assert server.wait_for(lambda s: not s["unanswered"], PATIENCE + commands)
        results = server.results
    texts = texts_by_id(results)
    assert texts.keys() == set(ids)
    assert {execution_id: len(found) for execution_id, found in texts.items() if len(found) > 1} == {}
    assert {result.status for result in results} == {"success"}
    assert sorted(documents()) == sorted(code for one in ids for code in codes_for(one, size))


def _store(
    kind: str, request: pytest.FixtureRequest, state: Path
) -> tuple[Mapping[str, str], Callable[[], Sequence[str]]]:
    """The settings of a store, and the codes of its documents."""
    if kind == "sqlite":
        return {}, lambda: stored(state)
    uri, name = request.getfixturevalue("mongo_db")
    server = request.getfixturevalue("mongo_server")
    client = server.client()
    request.addfinalizer(client.close)
    return {"MONGODB_HOST": uri, "MONGODB_DB_NAME": name}, lambda: [
        document["stock_code"] for document in client[name]["realtime"].find()
    ]


@pytest.mark.parametrize("store", ["sqlite", pytest.param("mongodb", marks=pytest.mark.long)])
def test_killed_again_and_again_it_answers_everything_it_accepted(
    store: str, request: pytest.FixtureRequest, infoway: InfowayServer, start_daemon: StartDaemon, state: Path
) -> None:
    kills, size = number(12, 50, quick=4), 5
    more, documents = _store(store, request, state)
    infoway.latency = 0.02
    rng = random.Random(7)
    accepted: set[str] = set()
    sent = 0
    with PlatformServer(ping_every=0, **FORGETFUL) as server:
        server.know(HASH)
        daemon = start_daemon(server, **more)
        for _ in range(kills):
            assert server.wait_for(lambda s: s.connected, PATIENCE)
            moment = threading.Timer(rng.uniform(0.0, 0.4), daemon.kill)
            moment.start()
            while moment.is_alive() and server.connected:
                server.execute(codes_for(sent, size), execution_id=f"e{sent}")
                sent += 1
                moment.join(rng.uniform(0.0, 0.03))
            moment.join()
            accepted.update(journalled(state))
            there = set(documents())
            counted = [r for r in server.results if r.status == "success"]
            assert {code for r in counted for code in codes_for(r.execution_id[1:], size)} <= there
            assert server.wait_for(lambda s: not s.connected, PATIENCE)
            daemon.start()
        assert accepted
        # what 50 kills left unanswered, one after the other, is more than half a minute's work
        server.wait_for(lambda s: all(s.results_for(one) for one in accepted), 4 * PATIENCE)
        answered(server, *accepted)
        assert server.wait_for(lambda s: s.connected, PATIENCE)
        settled(server)
        assert len(infoway.requests) > len(accepted) / 2
        texts = texts_by_id(server.results)
    assert {execution_id: len(found) for execution_id, found in texts.items() if len(found) > 1} == {}
    for result in server.results:
        assert (result.status, result.data["result"]["success_count"]) == ("success", size)
    codes = documents()
    assert len(codes) == len(set(codes))
    assert {code for one in texts for code in codes_for(one[1:], size)} <= set(codes)


def test_a_redirected_handshake_is_no_connection(infoway: InfowayServer, state: Path) -> None:
    """Nor is it followed: the hash is for this server alone."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def redirect() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: ws://127.0.0.1:1/\r\n\r\n")

        server = threading.Thread(target=redirect)
        server.start()
        with pytest.raises(stockrt.DialError, match="Redirect"):
            stockrt.Link(settings_for(listener.getsockname()[1], infoway.url, state), HASH)
        server.join(PATIENCE)


def test_a_handshake_is_answered_with_what_is_too_long(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its library would take all memory for it."""
    dials: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    dials.append(connection)
                    head = connection.recv(65536)
                    if b"/websocket" in head:
                        connection.sendall(b"y" * 200_000)
                        connection.shutdown(socket.SHUT_WR)
                    else:
                        connection.sendall(
                            b'HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\n{"code": "2000", "result": []}'
                        )

        threading.Thread(target=serve, daemon=True).start()
        settings = settings_for(listener.getsockname()[1], "http://127.0.0.1:1", tmp_path / "state")
        stockrt.make_state_directory(settings.state_directory)
        stockrt.write_hash(settings.state_directory, HASH)
        with ThreadDaemon(settings, rng=Hasty()):
            assert until(lambda: len(dials) > 3)
        listener.shutdown(socket.SHUT_RDWR)
    for connection in dials:
        connection.close()
    assert "cannot connect: an answer of more than 65536 bytes" in caplog.text


def test_a_connection_is_made_where_no_thread_can_be_started(
    platform: PlatformServer, settings: stockrt.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would cut it is missing: its own limits have to do."""
    refused: list[threading.Thread] = []

    def fail(thread: threading.Thread) -> None:
        refused.append(thread)
        raise RuntimeError("can't start new thread")

    with ThreadDaemon(settings, rng=Hasty()):
        connected(platform)
        monkeypatch.setattr(threading.Timer, "start", fail, raising=False)
        platform.close_connections()
        connected(platform, times=2)
        assert refused


def test_no_ping_waits_behind_a_burst_of_big_frames(
    monkeypatch: pytest.MonkeyPatch, infoway: InfowayServer, state: Path
) -> None:
    """What may be understood before anything is answered has a limit in bytes, too."""
    monkeypatch.setattr(stockrt, "FRAME_BYTES_AT_ONCE", 20_000)
    with in_one_breath(*["x" * 10_000] * 6) as port:
        link = stockrt.Link(settings_for(port, infoway.url, state), HASH)
        read: list[int] = []

        def all_is_read() -> bool:
            read.append(len(list(link.frames())))
            return sum(read) == 6

        assert until(all_is_read)
        assert max(read) == 2
        assert not link.has_more or not list(link.frames())
        link.close()


# ------------------------------------------------------------------------------------------------------
# The end
# ------------------------------------------------------------------------------------------------------


def test_shutdown_is_confirmed_and_the_process_stays_down(
    platform: PlatformServer, start_daemon: StartDaemon, gate: Gate, state: Path
) -> None:
    daemon = start_daemon(platform)
    connected(platform)
    running = platform.execute(["AAPL.US"])
    gate.reached()
    queued = platform.execute(["TSLA.US"])
    settled(platform)
    platform.shutdown_module(wrap="string")
    assert platform.wait_for(lambda s: s.shutdown_confirmations, PATIENCE)
    gate.open()
    assert daemon.wait() == 0
    assert platform.wait_for(lambda s: not s.connected, PATIENCE)
    assert platform.dials[-1].close_code == 1000
    assert one_answer(platform, running)["status"] == "success"
    assert one_answer(platform, queued)["status"] == "failure"
    assert len(platform.shutdown_confirmations) == 1
    assert len(platform.dials) == 1
    assert until(lambda: journalled(state, where="NOT received") == [])


@pytest.mark.parametrize("number_", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_running_execution_finish_and_keeps_the_rest(
    number_: signal.Signals, platform: PlatformServer, start_daemon: StartDaemon, gate: Gate, state: Path
) -> None:
    daemon = start_daemon(platform)
    connected(platform)
    running = platform.execute(["AAPL.US"])
    gate.reached()
    queued = platform.execute(["TSLA.US"])
    settled(platform)
    daemon.signal(number_)
    assert until(lambda: "stopping" in daemon.log)
    late = platform.execute(["MSFT.US"])
    assert "stopping" in one_answer(platform, late)["error"]
    gate.open()
    assert daemon.wait() == 0
    assert one_answer(platform, running)["status"] == "success"
    assert platform.results_for(queued) == []
    assert platform.wait_for(lambda s: not s.connected, PATIENCE)
    assert platform.dials[-1].close_code == 1000
    assert "Traceback" not in daemon.log
    daemon.start()
    assert one_answer(platform, queued)["status"] == "success"


def test_a_second_signal_ends_at_once(
    platform: PlatformServer, start_daemon: StartDaemon, gate: Gate, state: Path
) -> None:
    daemon = start_daemon(platform)
    connected(platform)
    running = platform.execute(["AAPL.US"])
    gate.reached()
    daemon.signal(signal.SIGTERM)
    assert until(lambda: "stopping" in daemon.log)
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == stockrt.EXIT_INTERRUPTED
    assert journalled(state, where="answer IS NULL") == [running]


@pytest.mark.parametrize("where", ["away", "closing"])
def test_a_signal_while_the_server_is_away_ends_it_at_once(
    where: str, platform: PlatformServer, start_daemon: StartDaemon
) -> None:
    if where == "closing":
        platform.close_after_handshake = True
    else:
        platform.stop()
    daemon = start_daemon(platform)
    assert until(lambda: "trying again" in daemon.log)
    tries = daemon.log.count("trying again")
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    assert daemon.log.count("trying again") <= tries + 1


@pytest.mark.long  # waits for the 20 s of a stop
@pytest.mark.parametrize("how", ["signal", "shutdown"])
def test_a_running_execution_that_does_not_end_is_cut_short(
    how: str, platform: PlatformServer, start_daemon: StartDaemon, gate: Gate, state: Path
) -> None:
    daemon = start_daemon(platform)
    connected(platform)
    running = platform.execute(["AAPL.US"])
    gate.reached()
    started = time.monotonic()
    if how == "signal":
        daemon.signal(signal.SIGTERM)
    else:
        platform.shutdown_module()
    assert daemon.wait(2 * PATIENCE) == 0
    assert time.monotonic() - started > 19
    if how == "signal":
        assert journalled(state, where="answer IS NULL") == [running]
    else:
        assert one_answer(platform, running)["status"] == "failure"


def test_two_daemons_do_not_share_a_state_directory(
    platform: PlatformServer, start_daemon: StartDaemon, clean_env: dict[str, str], infoway: InfowayServer,
    state: Path,
) -> None:  # fmt: skip
    start_daemon(platform)
    connected(platform)
    second = ProcessDaemon(clean_env, environment(platform.port, infoway.url, state))
    second.log_path = state.with_name("second.log")
    with second:
        assert second.wait() == 1
        (line,) = second.log.splitlines()[-1:]
    assert "another stockrt daemon" in line
    assert "STATE_DIRECTORY" in line
    assert "Traceback" not in second.log
    assert len(platform.dials) == 1


# ------------------------------------------------------------------------------------------------------
# Idle
# ------------------------------------------------------------------------------------------------------


def cpu_seconds(pid: int) -> float:
    """The CPU time of all threads of a process."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def test_idle_it_uses_next_to_no_cpu(
    infoway: InfowayServer, clean_env: dict[str, str], tmp_path: Path
) -> None:
    seconds = number(10, 60, quick=5)
    with contextlib.ExitStack() as stack:
        daemons = []
        for generation, interval in (("new", 10), ("old", 10), ("old", 3600)):
            server = stack.enter_context(PlatformServer(generation, ping_every=5))
            state = tmp_path / f"{generation}{interval}"
            stockrt.write_hash(state, server.know(HASH))
            more = {"HEARTBEAT_INTERVAL": str(interval)}
            daemon = ProcessDaemon(clean_env, environment(server.port, infoway.url, state, **more))
            daemons.append(stack.enter_context(daemon))
            connected(server)
            settled(server)
            server.send_text("heartbeat confirm" if generation == "old" else "noise")
            answered(server, server.execute(["AAPL.US"]))
            settled(server)
        before = [cpu_seconds(daemon.pid) for daemon in daemons]
        threading.Event().wait(seconds)
        used = [cpu_seconds(daemon.pid) - start for daemon, start in zip(daemons, before, strict=True)]
        threads = [len(os.listdir(f"/proc/{daemon.pid}/task")) for daemon in daemons]
    assert max(used) < 0.1 * seconds / 60, used
    assert max(threads) <= 4, threads


# ------------------------------------------------------------------------------------------------------
# The whole of it, with the built file
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_built_file_registers_starts_executes_and_answers(
    generation: str, pyz: Path, clean_env: dict[str, str], infoway: InfowayServer, tmp_path: Path
) -> None:
    state = tmp_path / "fresh"
    with PlatformServer(generation) as server:
        settings = environment(server.port, infoway.url, state)
        registered = subprocess.run(
            [sys.executable, str(pyz), "--register"],
            env=clean_env | settings,
            capture_output=True,
            check=True,
        )
        assert server.url.encode() in registered.stdout
        with ProcessDaemon(clean_env, settings, pyz) as daemon:
            connected(server)
            answer = one_answer(server, server.execute(["TSLA.US", "AAPL.US"]))
            settled(server)
            daemon.signal(signal.SIGTERM)
            assert daemon.wait() == 0
            assert server.registrations[0].module_hash not in daemon.log
        assert answer["result"]["success_count"] == 2
        assert server.bad_frames == []
    assert sorted(stored(state)) == ["AAPL.US", "TSLA.US"]


@pytest.mark.parametrize("language", ["", "en"])
def test_the_built_file_answers_in_the_platforms_language_and_tells_everybody_in_theirs(
    language: str, pyz: Path, clean_env: dict[str, str], platform: PlatformServer,
    infoway: InfowayServer, state: Path,
) -> None:  # fmt: skip
    """Chinese unless MESSAGE_LANG says otherwise; who reads the journal has a language of their own."""
    infoway.unknown = {"GONE.US"}
    settings = environment(platform.port, infoway.url, state, MESSAGE_LANG=language)
    with ProcessDaemon(clean_env, settings, pyz):
        connected(platform)
        ids = [
            platform.execute(["AAPL.US", "GONE.US"]),
            platform.execute(["GONE.US"]),
            platform.execute(None),
        ]
        answers = [one_answer(platform, one) for one in ids]
        settled(platform)
    assert [answer["result"]["failed_count"] for answer in answers] == [1, 1, 0]
    assert {mail.text for mail in platform.mailed} == {answer["error"] for answer in answers[1:]}

    said = executions(pyz, clean_env | settings | {"STOCKRT_LANG": language or "zh"})
    assert said[ids[0]] == (answers[0]["message"], answers[0]["result"]["failures"])
    chinese = executions(pyz, clean_env | settings | {"STOCKRT_LANG": "zh"})
    english = executions(pyz, clean_env | settings | {"STOCKRT_LANG": "en"})
    for message, failures in [chinese[one] for one in ids[:2]]:
        assert all(in_chinese(text) == text for text in (message, *failures.values()))
    for total, name, end in [(2, ids[0], "; 1 of 2 codes stored"), (1, ids[1], "")]:
        message, failures = english[name]
        assert message.startswith(f"1 of {total} codes failed: GONE.US ({failures['GONE.US']}){end}")


def executions(pyz: Path, environ: Mapping[str, str]) -> dict[str, tuple[str, dict[str, str]]]:
    """The messages and failures that --executions shows, by id."""
    command = [sys.executable, str(pyz), "--executions", "9", "--json"]
    done = subprocess.run(command, env=environ, capture_output=True, check=True, encoding="utf-8")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {
        one["execution_id"]: (stockrt.local_times(one["message"]), one["result"]["failures"]) for one in found
    }
