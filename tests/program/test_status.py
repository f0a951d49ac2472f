"""--status: what a person asks first, beside a running daemon and without one."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import re
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
from conftest import RunPyz, unprivileged
from kit.chinese import in_chinese
from kit.clock import FakeClock
from kit.daemons import LOCAL_TIME, command_of
from kit.infoway_server import REFUSALS, InfowayServer
from kit.platform_server import PlatformServer

import stockrt
from stockrt import Command, Journal, LocalLedger, Plan, SharedLedger, in_language, key_digest, load_settings

WELL, WRONG, NOT_RUNNING, UNKNOWN, FAULTY = 0, 1, 3, 4, 78
FIRST, OTHER = "aaa-first-key-111", "bbb-other-key-222"
# A wait for something that must happen; long, because a busy machine is slow, not wrong.
PATIENCE = 30.0


class Program:
    """The program in a folder of its own, with the settings of a test."""

    def __init__(self, base: Mapping[str, str], folder: Path, run: RunPyz) -> None:
        self._run = run
        self.folder = folder
        self.state = folder / "state"
        self.env = {**base, "STATE_DIRECTORY": str(self.state), "INFOWAY_API_KEY": f"{FIRST},{OTHER}",
                    "INFOWAY_PLAN": "free,pro"}  # fmt: skip
        self.daemon: subprocess.Popen[bytes] | None = None

    def run(self, *arguments: str, status: int | None = 0) -> str:
        """Run it and return its stdout."""
        if "PYTHONIOENCODING" in self.env:
            done = subprocess.run(
                [*command_of(), *arguments], env=self.env, cwd=self.folder, capture_output=True,
                encoding=self.env["PYTHONIOENCODING"], timeout=60, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        else:
            done = self._run(*arguments, env=self.env, cwd=self.folder)
        assert status in (None, done.returncode), done.stdout + done.stderr
        assert FIRST not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout

    def status(self, status: int = NOT_RUNNING) -> dict[str, Any]:
        """Return what --status --json says."""
        (line,) = self.run("--status", "--json", status=status).splitlines()
        found = json.loads(line)
        assert isinstance(found, dict)
        return found

    def lines(self, status: int = NOT_RUNNING) -> str:
        """Return what --status says to a person."""
        return self.run("--status", status=status)

    def start_daemon(self) -> None:
        """Start a daemon and wait until it works."""
        with (self.folder / "log").open("ab") as log:
            self.daemon = subprocess.Popen(
                command_of(), env=self.env, cwd=self.folder, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log,
            )  # fmt: skip
        self.until(lambda: stockrt.daemon_runs(self.state) and (self.state / stockrt.STATUS_NAME).exists())

    def until(self, holds: Callable[[], object]) -> None:
        """Wait for what the daemon does."""
        deadline = time.monotonic() + PATIENCE
        pause = threading.Event()
        while not holds():
            assert time.monotonic() < deadline, (self.folder / "log").read_text()
            pause.wait(0.05)

    def stop_daemon(self) -> None:
        """End it in good order."""
        if self.daemon is not None:
            self.daemon.terminate()
            self.daemon.wait(PATIENCE)
            self.daemon = None


@pytest.fixture
def program(clean_env: dict[str, str], tmp_path: Path, run_pyz: RunPyz) -> Iterator[Program]:
    """The program; its daemon ends with the test."""
    program = Program(clean_env, tmp_path, run_pyz)
    yield program
    program.stop_daemon()


def lines_of(text: str) -> dict[str, str]:
    """Return the lines for a person by what they are about; of several keys the last."""
    return {line[:15].strip(): line[16:] for line in text.splitlines()}


# ------------------------------------------------------------------------------------------------------
# Without a daemon
# ------------------------------------------------------------------------------------------------------


def test_on_a_fresh_machine_everything_is_said_to_be_empty(program: Program) -> None:
    """Nothing ever ran here."""
    assert program.status() == {
        "status": "not running",
        "version": stockrt.__version__,
        "daemon": {"running": False},
        "registration": None,
        "platform": {"url": None, "state": "no daemon", "connected_since": None, "last_contact": None,
                     "lost_since": None, "lost_because": None},
        "store": str(program.state / stockrt.SQLITE_NAME),
        "spool": None,
        "waiting": {"executing": 0, "commands": 0, "results": 0},
        "damaged_files": 0,
        "collecting": None,
        "last_execution": None,
        "totals": {},
        "keys": [
            {"key": "aaa…111", "plan": "free", "per_day": 86_400, "ends": None, "ends_soon": "", "used_today": 0,
             "leased_today": 0, "left_today": 86_400, "state": "unknown", "why": "",
             "until": "", "not_for": []},
            {"key": "bbb…222", "plan": "pro", "per_day": 1_728_000, "ends": None, "ends_soon": "", "used_today": 0,
             "leased_today": 0, "left_today": 1_728_000, "state": "unknown", "why": "",
             "until": "", "not_for": []},
        ],
        "wrong": [],
        "to_do": [
            "nothing for commands by hand; a daemon needs SERVER_IP and SERVER_PORT, or COLLECT or COLLECT_EVERY"
        ],
    }  # fmt: skip
    assert not program.state.exists()


def test_the_lines_for_a_person_say_the_same(program: Program) -> None:
    """One about each; keys by their ends."""
    text = program.lines()
    lines = lines_of(text)
    assert lines["status"] == (
        "not running. To do: nothing for commands by hand; a daemon needs SERVER_IP and SERVER_PORT, or COLLECT or "
        "COLLECT_EVERY"
    )
    assert lines["version"] == stockrt.__version__
    assert lines["daemon"] == "not running"
    assert lines["registration"] == "none: no platform is set"
    assert lines["platform"] == "none set: no daemon"
    assert lines["waiting"] == "0 commands, 0 results to deliver"
    assert lines["last execution"] == "none yet"
    untold = "not told by a daemon: see --check"
    assert f"aaa…111  plan Free  0 used today, 86400 left  {untold}" in text
    assert lines["API key"] == f"bbb…222  plan Pro  0 used today, 1728000 left  {untold}"


def test_a_hash_that_cannot_be_used_is_said_beside_the_rest(program: Program) -> None:
    place = program.state / stockrt.HASH_NAME
    program.state.mkdir()
    place.write_bytes(b"no hash\xff")
    found = program.status()
    assert found["wrong"] == [f"{place} holds no module hash; remove it and run --register"]
    assert (found["registration"], found["waiting"]["commands"]) == (None, 0)


def test_what_waits_is_counted_and_not_touched(program: Program) -> None:
    """Commands without an answer, answers without a receipt; those given up for their age are none."""
    now = time.time()
    for age in (0.0, stockrt.ANSWER_LIFETIME_S + 60):
        journal = Journal(program.state, FakeClock(now - age, 1e6 - age))
        numbers = journal.accept([Command(f"e{age}{n}", {}, []) for n in range(3)])
        journal.answer(numbers[0], "{}")
        journal.close()
    assert program.status()["waiting"] == {"executing": 0, "commands": 4, "results": 1}
    with sqlite3.connect(program.state / stockrt.JOURNAL_NAME) as db:
        found = db.execute("SELECT count(*) FROM executions WHERE answer IS NOT NULL AND NOT received")
        assert found.fetchone() == (2,)


def test_a_run_counts_what_it_used(program: Program) -> None:
    """As many requests as were made, not as many as were leased."""
    with InfowayServer(keys={FIRST, OTHER}) as server:
        program.env["INFOWAY_API_BASE_URL"] = server.url
        for _ in range(3):
            program.run("--once", "--codes", "AAPL.US")
        used = [key["used_today"] for key in program.status()["keys"]]
        assert sum(used) == server.request_count


def test_a_key_whose_day_is_used_up_says_until_when(program: Program) -> None:
    """By the count alone."""
    with stockrt.open_store_file(program.state) as file:
        LocalLedger(file).lease(key_digest(FIRST), Plan("x", 86_400, 0, 86_400), time.time())
    key = program.status()["keys"][0]
    assert (key["used_today"], key["left_today"], key["state"]) == (86_400, 0, "resting")
    assert key["until"].endswith("T00:00:00.000Z")
    assert "86400 used today, 0 left  resting until " in program.lines()


def test_keys_without_a_daily_limit_and_none_at_all(program: Program) -> None:
    """A custom plan; no key set."""
    program.env["INFOWAY_PLAN"] = "0"
    assert "no daily limit" in program.lines()
    del program.env["INFOWAY_API_KEY"]
    assert program.status()["keys"] == []


KEY_STATE: dict[str, object] = {
    "digest": stockrt.key_digest(FIRST),
    "leased": 0,
    "state": "out",
    "why": "w",
    "until": "",
    "not_for": [],
}


TOLD: dict[str, object] = {"last_contact": "2026-01-01T10:00:00.000Z"}


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{", "null", "{}", "[" * 5000),
        '{"last_contact": "now", "more": ' + '{"a":' * 900 + "1" + "}" * 901,
        *map(
            json.dumps,
            (
                TOLD | {"keys": [KEY_STATE | {"not_for": 1}]},
                TOLD | {"keys": [{"digest": KEY_STATE["digest"]}]},
                TOLD | {"keys": {"a": 1}},
                TOLD | {"keys": None},
                TOLD | {"keys": [KEY_STATE | {"state": "gone"}]},
                TOLD | {"platform": ["connected"]},
                TOLD | {"spool_refused": "1"},
                TOLD | {"pid": 1.5},
                TOLD | {"connected_since": {}},
            ),
        ),
    ],
    ids=lambda content: content[:40],
)
@pytest.mark.parametrize("running", [False, True], ids=["no daemon", "daemon"])
def test_a_status_file_of_another_shape_is_as_good_as_none(
    program: Program, content: str, running: bool
) -> None:
    """A machine that lost its power, or another program, may leave anything; a daemon is met before it wrote."""
    program.state.mkdir()
    (program.state / stockrt.STATUS_NAME).write_text(content)
    with (program.state / "lock").open("w") as lock:
        if running:
            fcntl.flock(lock, fcntl.LOCK_EX)
        assert status_in_this_process(program)["platform"]["last_contact"] is None


def status_in_this_process(program: Program) -> dict[str, Any]:
    """What --status shows, without the start of a process."""
    settings = load_settings(program.env, None, (), is_root=False).settings
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        for as_json in (False, True):
            stockrt.run_status(settings, as_json)
    found = json.loads(said.getvalue().splitlines()[-1])
    assert isinstance(found, dict)
    return found


LOST: stockrt.StreamFacts = {
    "product": "crypto", "codes": 1, "subscribed": 0, "state": "waiting", "why": "429: too many"
}  # fmt: skip
STREAM = stockrt.CollectStats(
    connections=2, connections_wanted=2, codes=800, per_second=41.6, trades=900, stored=880
)


def test_what_the_daemon_writes_has_the_shape_that_is_read(program: Program) -> None:
    told = {"version": "1", "pid": 1, "platform": "connected", "url": "x", "connected_since": "x", "last_contact": "x",
            "lost_since": "x", "lost_because": "x", "stopped": "x", "keys": [KEY_STATE], "spool_refused": 0,
            "collecting": stockrt.collect_facts(STREAM._replace(streams=[LOST], gaps_open=1))}  # fmt: skip
    assert told.keys() == stockrt.DaemonStatus.__annotations__.keys()
    program.state.mkdir()
    (program.state / stockrt.STATUS_NAME).write_text(json.dumps(told))
    assert status_in_this_process(program)["platform"]["last_contact"] == "x"


def test_reasons_in_the_status_file_can_be_read_in_all_languages(program: Program) -> None:
    """One with reasons that a later version makes is read, too: they are their English text."""
    settings = load_settings(program.env, None, (), is_root=False).settings
    why = stockrt.phrase("websocket.lost", why=stockrt.phrase("http.cut"))
    trouble = stockrt.phrase("tools.because", what="AAPL.US", why=why)
    told = stockrt.DaemonStatus(keys=[cast(stockrt.KeyState, KEY_STATE | {"why": why})])
    lost = STREAM._replace(trouble=trouble, streams=[stockrt.StreamFacts(**{**LOST, "why": why})])
    told["collecting"] = stockrt.collect_facts(lost)
    journal = Journal(settings.state_directory)
    inbox = stockrt.Inbox()
    relay = stockrt.Relay(stockrt.NO_EVENTS, inbox)
    executor = stockrt.Executor(settings, journal, inbox, relay)
    clerk = stockrt.Clerk(settings, journal, executor, inbox, stockrt.SettingsSource({}))
    clerk.do(stockrt.NoteStatus(told))
    clerk.leave()
    clerk.run()
    journal.close()

    def reasons() -> list[str]:
        found = stockrt.read_status(program.state)
        return [
            found["collecting"]["trouble"],
            found["collecting"]["streams"][0]["why"],
            found["keys"][0]["why"],
        ]

    assert [in_language(one, "zh") for one in reasons()] == [
        "AAPL.US：对方断开了连接",
        *2 * ["对方断开了连接"],
    ]
    english = ["AAPL.US: lost: the connection was cut", *2 * ["lost: the connection was cut"]]
    assert reasons() == english
    file = program.state / stockrt.STATUS_NAME
    file.write_text(file.read_text().replace("websocket.lost", "websocket.gone"))
    assert [in_language(one, "zh") for one in reasons()][1:] == english[1:]


@contextlib.contextmanager
def a_daemon_that_told(program: Program, told: dict[str, Any] | None) -> Iterator[None]:
    """As while a daemon collects that told this of it last, None: nothing yet."""
    program.env |= {"COLLECT": "stream", "COLLECT_CODES": "AAPL.US"}
    status: dict[str, object] = {"platform": stockrt.NO_NEED, "pid": 7, "version": "1"}
    if told is not None:
        status["collecting"] = stockrt.collect_facts(STREAM._replace(**told))
    with stockrt.lock_state_directory(program.state):
        (program.state / stockrt.STATUS_NAME).write_text(json.dumps(status))
        yield


@pytest.mark.parametrize(
    ("told", "wrong"),
    [
        ({}, []),
        ({"connections": 1, "streams": [LOST]}, ["1 of 2 connections to the stream stand"]),
        ({"trouble": "stream: HTTP 401"}, ["collecting fails (stream: HTTP 401)"]),
        (
            {"connections": 0, "connections_wanted": 0, "codes": 0, "polled": 800},
            ["the stream brings nothing, 800 codes polled instead"],
        ),
        (None, ["collecting has not begun"]),
        ({"refused": 1, "refused_why": "X (why)"}, ["1 code not collected: X (why)"]),
    ],
)
def test_a_service_that_collects_is_well_without_a_platform(
    program: Program, told: dict[str, object] | None, wrong: list[str]
) -> None:
    """From what its daemon told last; what is not known is null."""
    with a_daemon_that_told(program, told):
        found = program.status(WRONG if wrong else WELL)
        lines = lines_of(program.lines(WRONG if wrong else WELL))
    assert found["wrong"] == wrong and found["platform"]["state"] == "not needed"
    assert lines["platform"] == "none set: not needed" and "register" not in lines["registration"]
    assert found["collecting"]["delay_p50_ms"] is None
    if told is None:
        assert (lines["collecting"], found["collecting"]["codes"]) == ("nothing now", None)
        return
    assert found["collecting"]["codes"] + found["collecting"]["polled"] == 800
    assert re.match(
        r"(\d of 2 connections, 800 codes subscribed|800 codes polled), 42 trades/s", lines["collecting"]
    )
    trouble = f"; {told['trouble']}" if "trouble" in told else ""
    assert ("42 trades/s, 1 code not collected, at" in lines["collecting"]) == ("refused" in told)
    assert re.search(
        rf"42 trades/s,.* at {LOCAL_TIME}; since the start 900 trades, 880 new{trouble}$", lines["collecting"]
    )
    assert lines.get("stream") == (
        "crypto: 0 of 1 code, waiting: 429: too many" if "streams" in told else None
    )


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "gb18030"])
def test_any_name_of_a_workflow_can_be_printed(program: Program, encoding: str) -> None:
    """Half of a pair of surrogates stands in names that a program cut, and in no encoding."""
    program.env["PYTHONIOENCODING"] = encoding
    odd = {"workflow_name": "half \ud83d of \u80a1", "message": "half \udcff of \u80a1 \U0001f600"}
    journal = Journal(program.state)
    journal.answer(journal.accept([Command("e", {}, [])])[0], json.dumps({"status": "success"} | odd))
    journal.close()
    last = program.status()["last_execution"]
    assert {name: last[name] for name in odd} == odd
    assert "half \\udcff of" in program.lines()


def test_the_counts_of_all_instances_come_from_mongodb(program: Program, mongo_db: tuple[str, str]) -> None:
    """And its address is shown without a password."""
    uri, name = mongo_db
    program.env |= {"MONGODB_HOST": uri, "MONGODB_DB_NAME": name, "MONGODB_LICENSE_COLLECTION_NAME": "counts"}
    loaded = load_settings(program.env, None, (), is_root=False).settings
    with stockrt.Pipeline(loaded) as pipeline:
        assert isinstance(pipeline.keys.ledger, SharedLedger)
        for _ in range(2):
            pipeline.keys.try_acquire("stock")
    found = program.status()
    assert [key["used_today"] for key in found["keys"]] == [1, 1]
    assert found["store"] == loaded.mongodb_shown()


def test_mongodb_away_is_said_and_costs_no_status(program: Program) -> None:
    """Soon: one try for all keys together, then the local counts."""
    program.env |= {"MONGODB_HOST": "mongodb://user:pass-word-1@127.0.0.1:9/?serverSelectionTimeoutMS=500"}
    program.env |= {
        "INFOWAY_API_KEY": ",".join(f"key-number-{n}-abc" for n in range(120)),
        "INFOWAY_PLAN": "free",
    }
    started = time.monotonic()
    found = program.status()
    assert time.monotonic() - started < 120 * 0.5 / 2
    assert len(found["keys"]) == 120
    assert "pass-word-1" not in json.dumps(found)


# ------------------------------------------------------------------------------------------------------
# Beside a daemon
# ------------------------------------------------------------------------------------------------------


def test_beside_a_daemon_that_cannot_reach_its_platform(program: Program) -> None:
    """It runs, it is not connected; afterwards it does not run, and a killed one neither."""
    program.env |= {"SERVER_IP": "127.0.0.1", "SERVER_PORT": "9"}
    program.start_daemon()
    assert program.daemon is not None
    program.until(lambda: "lost_because" in stockrt.read_status(program.state))
    found = program.status(WRONG)
    assert found["wrong"] == [f"no connection to the platform: {found['platform']['lost_because']}"]
    assert found["daemon"] == {"running": True, "pid": program.daemon.pid, "version": stockrt.__version__}
    assert found["platform"]["url"] == "http://127.0.0.1:9"
    assert found["platform"]["state"] == "not connected"
    text = program.lines(WRONG)
    assert re.match(
        "status          something is wrong: no connection to the platform: .*connection refused.* "
        "To do: it tries again by itself\n",
        text,
    )
    assert f"running, pid {program.daemon.pid}, version {stockrt.__version__}" in text
    assert "http://127.0.0.1:9: not connected" in text
    program.env["SERVER_PORT"] = "8"  # of which a reload makes nothing
    found = program.status(WRONG)
    assert found["platform"]["url"] == "http://127.0.0.1:9"
    assert found["wrong"][0] == (
        "the daemon has the platform http://127.0.0.1:9, the settings have http://127.0.0.1:8"
    )
    assert found["to_do"][0] == "restart the daemon"
    program.env["SERVER_PORT"] = "9"
    program.daemon.kill()
    program.daemon.wait()
    assert program.status()["daemon"] == {"running": False}
    after = program.status()
    assert after["platform"]["state"] == "no daemon"
    assert after["to_do"] == ["start it: stockrt.pyz without a command"]


def test_asking_for_the_status_keeps_no_daemon_from_starting(program: Program) -> None:
    """It holds the daemon's lock for a moment, to see whether somebody else does."""
    stockrt.lock_state_directory(program.state).close()
    with open(program.state / "lock") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        timer = threading.Timer(0.03, lambda: fcntl.flock(held, fcntl.LOCK_UN))
        timer.start()
        stockrt.lock_state_directory(program.state).close()
        timer.join()


def test_two_daemons_do_not_share_a_directory(program: Program) -> None:
    """Many may ask at the same time whether one runs."""
    assert not stockrt.daemon_runs(program.state)
    lock = stockrt.lock_state_directory(program.state)
    assert stockrt.daemon_runs(program.state)
    with pytest.raises(stockrt.StoreError, match="another stockrt daemon"):
        stockrt.lock_state_directory(program.state)
    lock.close()
    with open(program.state / "lock") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        assert not stockrt.daemon_runs(program.state)


def test_a_daemon_that_has_just_taken_the_lock_has_told_nothing_yet(program: Program) -> None:
    """Its file is not written, or is of the one before."""
    lock = stockrt.lock_state_directory(program.state)
    found = program.status(WRONG)
    assert found["daemon"] == {"running": True, "pid": None, "version": None}
    assert found["platform"]["state"] == "not connected"
    lock.close()


def test_beside_a_connected_daemon_the_last_execution_and_the_keys_are_told(program: Program) -> None:
    """Connected since when, what was executed last, which key is out and why."""
    with InfowayServer(keys={FIRST, OTHER}) as api, PlatformServer() as platform:
        api.script = lambda request: REFUSALS["401_token_invalid"] if request.key == FIRST else None
        program.env |= {"SERVER_IP": "127.0.0.1", "SERVER_PORT": str(platform.port), "INFOWAY_PLAN": "0",
                        "INFOWAY_API_BASE_URL": api.url}  # fmt: skip
        program.start_daemon()
        program.until(lambda: stockrt.read_status(program.state)["platform"] == "connected")
        found = program.status(WELL)
        assert (found["status"], found["wrong"], found["to_do"]) == ("well", [], [])
        assert found["platform"]["connected_since"]
        assert found["registration"]
        assert lines_of(program.lines(WELL))["status"] == "well"
        platform.execute([f"A{number}.US" for number in range(300)])
        program.until(lambda: "keys" in stockrt.read_status(program.state))
        found = program.status(WRONG)
        assert found["wrong"] == ["API key aaa…111 is out"]
        assert found["to_do"] == ["see its line below; replace it in INFOWAY_API_KEY"]
        assert found["last_execution"]["status"] == "success"
        assert "300 of 300 codes stored" in found["last_execution"]["message"]
        first, other = found["keys"]
        assert (first["state"], first["why"]) == ("out", "HTTP 401: Token invalid")
        assert other["state"] == "ready"
        lines = program.lines(WRONG)
        assert "success at " in lines
        assert "out (HTTP 401: Token invalid)" in lines
        program.stop_daemon()
        after = program.status()
        assert after["daemon"] == {"running": False}
        assert after["last_execution"] == found["last_execution"]
        assert after["platform"]["last_contact"]
        assert [key["state"] for key in after["keys"]] == ["unknown", "unknown"]  # it was asked, and is gone


def test_a_key_that_collecting_was_refused_is_not_shown_as_usable(program: Program) -> None:
    """Without a platform there is no execution that could tell of it."""
    with InfowayServer(keys={OTHER}) as api:
        program.env |= {"INFOWAY_API_BASE_URL": api.url, "COLLECT_CODES": "AAPL.US", "COLLECT_EVERY": "1",
                        "INFOWAY_API_KEY": FIRST, "INFOWAY_PLAN": "0"}  # fmt: skip
        program.start_daemon()
        program.until(lambda: stockrt.read_status(program.state).get("keys"))
        (key,) = program.status(WRONG)["keys"]
    assert (key["state"], key["why"]) == ("out", "HTTP 401: Token invalid")


# ------------------------------------------------------------------------------------------------------
# What was executed
# ------------------------------------------------------------------------------------------------------


def test_status_remembers_over_a_restart_and_knows_of_runs_by_hand(program: Program) -> None:
    """The last result, when the platform was heard last, and what was counted; a run counts as an execution does."""
    with InfowayServer(keys={FIRST, OTHER}) as api:
        with PlatformServer() as platform:
            program.env |= {"SERVER_IP": "127.0.0.1", "SERVER_PORT": str(platform.port), "INFOWAY_PLAN": "0",
                            "INFOWAY_API_BASE_URL": api.url}  # fmt: skip
            program.start_daemon()
            program.until(lambda: platform.connected)
            platform.execute(["TSLA.US", "NOPE", "AAPL.US"])
            program.until(lambda: platform.results)
            program.stop_daemon()
        told = program.state / stockrt.STATUS_NAME
        before = json.loads(told.read_text()) | {"spool_refused": 7}
        told.write_text(json.dumps(before))
        program.start_daemon()
        program.until(lambda: stockrt.read_status(program.state)["pid"] != before["pid"])
        assert stockrt.read_status(program.state)["spool_refused"] == 7
        program.until(lambda: "lost_because" in stockrt.read_status(program.state))
        after = program.status(WRONG)
        (lost,) = after["wrong"]
        assert re.search("^no connection to the platform: .*connection refused", lost)
        assert after["last_execution"]["message"].startswith("1 of 3 codes failed: NOPE (")
        assert after["last_execution"]["status"] == "partial"
        assert after["platform"]["last_contact"]
        platform_line = lines_of(program.lines(WRONG))["platform"]
        assert re.fullmatch(rf"http://127\S+: not connected since {LOCAL_TIME}", platform_line)
        counted = {"success": 0, "partial": 1, "failure": 0, "stored": 2, "known": 0, "kept": 0, "failed": 1}
        assert after["totals"] == {"since": after["totals"]["since"]} | counted
        program.env["INFOWAY_PLAN"] = "none"
        faulty = program.status(FAULTY)  # what is on the disk does not depend on it
        assert faulty["wrong"] == [lost, "the settings are faulty"]
        told_alike = ("status", "daemon", "registration", "waiting", "last_execution", "totals")
        assert [faulty[name] for name in told_alike] == [after[name] for name in told_alike]
        assert (faulty["store"], faulty["keys"]) == ("unknown", [])
        program.env["INFOWAY_PLAN"] = "0"
        program.run("--once", "--codes", "TSLA.US", "700.HK")
        now = program.status(WRONG)
        assert now["last_execution"]["workflow_name"] == "--once"
        assert now["last_execution"]["message"].startswith("2 of 2 codes stored")
        assert now["totals"]["success"] == 1
        assert now["totals"]["stored"] + now["totals"]["known"] == 4
        line = lines_of(program.lines(WRONG))["in all"]
        since = stockrt.local_times(after["totals"]["since"])
        assert line.startswith(f"2 executions since {since}, 1 in part, 0 failed; ")


def test_a_run_by_hand_is_told_in_the_language_of_each_reader(program: Program) -> None:
    program.run("--once", "--demo", "--codes", "A?B", status=1)
    start = {"en": "1 of 1 codes failed: A?B (", "zh": "1 个代码中 1 个失败：A?B（"}
    for language in ("zh", "en"):
        program.env["STOCKRT_LANG"] = language
        (one,) = map(json.loads, program.run("--executions", "--json").splitlines())
        reason = one["result"]["failures"]["A?B"]
        assert one["message"].startswith(start[language] + reason)
        assert program.status()["last_execution"]["message"] == one["message"]
        assert reason in program.run("--executions")
    assert one["status"] == "failure"


def test_executions_lists_the_last_ones_with_their_failures(program: Program) -> None:
    """Of the platform, without an id too, and by hand; what waits as well; for a person and for programs."""
    assert program.run("--executions") == "nothing was executed yet\n"
    assert program.run("--executions", "--json") == ""
    assert not program.state.exists()
    settings = load_settings(program.env, None, (), is_root=False).settings
    journal = Journal(program.state)
    for number in range(30):
        name = "" if number == 3 else f"id-{number}"
        context = {"workflow_name": f"w{number}", "meta": {"execution_id": name}}
        (accepted,) = journal.accept([Command(name, context, ["A.US", FIRST])])
        failures = {"X": stockrt.Failure(stockrt.FailureKind.KEY, f"the key {FIRST} is bad")}
        report = stockrt.Report(total=2, stored=1, failures=failures)
        if number < 29:
            journal.answer(accepted, *stockrt.report_result(context, report, settings))
        if number < 28:
            journal.received([accepted])
    journal.close()
    with InfowayServer(keys={FIRST, OTHER}) as api:
        program.env |= {"INFOWAY_API_BASE_URL": api.url, "INFOWAY_PLAN": "0"}
        program.run("--once", "--codes", "AAPL.US", "NOPE", status=1)
    found = [json.loads(line) for line in program.run("--executions", "100", "--json").splitlines()]
    assert [one["workflow_name"] for one in found] == [*(f"w{n}" for n in range(29)), "w29", "--once"]
    assert [one["delivered"] for one in found] == [*[True] * 28, False, False, None]
    assert [one["execution_id"] for one in found[2:5]] == ["id-2", None, "id-4"]
    assert (found[29]["status"], found[29]["ended_at"], found[29]["result"]) == (None, None, None)
    assert found[30]["result"]["failures"].keys() == {"NOPE"}
    lines = program.run("--executions", "3").splitlines()
    assert [line[:2] for line in lines] == ["20", "  ", "20", "20", "  "]
    assert re.match(rf"{LOCAL_TIME}  partial    id-28  w28  1 of 2 codes stored, to be delivered$", lines[0])
    assert lines[1] == "  X: the key *** is bad"
    assert re.match(rf"{LOCAL_TIME}  not ended  id-29  w29$", lines[2])
    assert re.match(rf"{LOCAL_TIME}  partial    -  --once  1 of 2 codes stored$", lines[3])
    assert len(program.run("--executions", "--json").splitlines()) == 20
    program.run("--once", "--codes", "NOPE", status=1)
    first, why = program.run("--executions", "1").splitlines()
    assert first.endswith("  failure  -  --once  0 of 1 codes stored") and why.startswith("  NOPE: ")
    program.run("--once", "--codes", "A?B", "C?D", status=1)
    assert program.run("--executions", "1").splitlines()[1].startswith("  A?B, C?D: ")
    for wrong in ("0", "1001", "many"):
        program.run("--executions", wrong, status=64)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_outcomes_of_executions_are_as_wide_as_the_widest(program: Program, language: str) -> None:
    program.env["STOCKRT_LANG"] = language
    settings = load_settings(program.env, None, (), is_root=False).settings
    failures = {"X": stockrt.Failure(stockrt.FailureKind.KEY, "nothing came")}
    with contextlib.closing(Journal(program.state)) as journal:
        for stored in (1, 2):
            report = stockrt.Report(total=2, stored=stored, failures=failures if stored == 1 else {})
            told = stockrt.report_result({"workflow_name": "--once"}, report, settings)
            journal.note_run(time.time(), *told)
    lines = [line for line in program.run("--executions").splitlines() if "--once" in line]
    partial, success = ("部分成功", "成功") if language == "zh" else ("partial", "success")
    assert partial in lines[0] and success in lines[1]
    before = [line.partition("  -  --once")[0] for line in lines]
    assert stockrt.columns_of(before[0]) == stockrt.columns_of(before[1])


@pytest.mark.parametrize("language", ["en", "zh"])
def test_how_much_a_run_stored_whose_store_failed_is_said_once(program: Program, language: str) -> None:
    program.env["STOCKRT_LANG"] = language
    settings = load_settings(program.env, None, (), is_root=False).settings
    report = stockrt.Report(total=3, stored=1, store_error="disk full")
    with contextlib.closing(Journal(program.state)) as journal:
        journal.note_run(time.time(), *stockrt.report_result({"workflow_name": "--once"}, report, settings))
    stored = "3 个代码中 1 个已入库，" if language == "zh" else "1 of 3 codes stored,"
    for said in (program.run("--executions", "1"), program.lines()):
        assert said.count(stored.rstrip("，,")) == 1 and stored in said and "disk full" in said


def test_what_is_executed_is_told_from_what_waits_for_it(program: Program) -> None:
    lock = stockrt.lock_state_directory(program.state)
    journal = Journal(program.state)
    journal.accept([Command(f"e{n}", {}, []) for n in range(3)])
    journal.close()
    assert program.status(WRONG)["waiting"] == {"executing": 1, "commands": 2, "results": 0}
    assert lines_of(program.lines(WRONG))["waiting"] == "one executed now, 2 commands, 0 results to deliver"
    lock.close()


def test_looking_leaves_nothing_behind(program: Program) -> None:
    """No directory, no database, no lock; beside what is there neither."""
    for command in LOOKS:
        program.run(*command, status=None)
        assert not program.state.exists()
    with InfowayServer(keys={FIRST, OTHER}) as api:
        program.env |= {"INFOWAY_API_BASE_URL": api.url, "INFOWAY_PLAN": "0"}
        program.run("--once", "--codes", "AAPL.US")
        program.status()  # takes SQLite's log away, which a run leaves
        before = contents(program.state)
        for command in LOOKS:
            program.run(*command, status=None)
    assert contents(program.state) == before


LOOKS = (("--check",), ("--status",), ("--executions",), ("--check-settings",))


def contents(folder: Path) -> dict[str, list[Any]]:
    """Return what every table of every file has, and which files there are."""
    found: dict[str, list[Any]] = {path.name: [] for path in folder.iterdir()}
    for path in folder.glob("*.db"):
        with contextlib.closing(sqlite3.connect(path)) as db:
            tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            for table in tables:
                found[f"{path.name} {table}"] = db.execute(f"SELECT * FROM {table}").fetchall()
    return found


# ------------------------------------------------------------------------------------------------------
# As another user
# ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_to_another_user_the_state_is_unknown_and_not_down(program: Program) -> None:
    """A daemon runs and is registered in a directory that this user may not look into, as systemd makes one."""
    stockrt.write_hash(program.state, "a" * 32)
    lock = stockrt.lock_state_directory(program.state)
    settings = load_settings(program.env, None, (), is_root=False).settings
    assert said_to_another(settings, as_json=False) == [
        "status          unknown: this user may not look at it. To do: run as root",
        f"version         {stockrt.__version__}",
        *(f"{name:<15} unknown" for name in ("daemon", "registration", "platform", "store", "waiting",
                                             "last execution", "API key")),
    ]  # fmt: skip
    told = json.loads(said_to_another(settings, as_json=True)[0])
    assert told.keys() == stockrt.StatusReport.__annotations__.keys()
    assert (told["daemon"], told["registration"], told["waiting"]) == ({"running": None}, None, None)
    assert (told["status"], told["to_do"]) == ("unknown", ["run as root"])
    with unprivileged(), pytest.raises(stockrt.StoreError, match="run as root"):
        stockrt.run_executions(5, settings, as_json=False)
    lock.close()


def said_to_another(settings: stockrt.Settings, as_json: bool) -> list[str]:
    """What --status says to a user who is neither root nor the owner of the state."""
    said = io.StringIO()
    with unprivileged(), contextlib.redirect_stdout(said):
        assert stockrt.run_status(settings, as_json) == UNKNOWN
    return said.getvalue().splitlines()


# ------------------------------------------------------------------------------------------------------
# In Chinese
# ------------------------------------------------------------------------------------------------------


def speak_chinese(program: Program) -> None:
    """Let the program speak Chinese from now on."""
    program.env["STOCKRT_LANG"] = "zh"


def test_in_chinese_a_fresh_machine_is_told_of_in_aligned_columns(program: Program) -> None:
    speak_chinese(program)
    assert program.lines().splitlines() == [
        "状态            未运行。处理办法：手动执行命令时不需要守护进程，要运行它请设置 SERVER_IP 和 SERVER_PORT，"
        "或设置 COLLECT 或 COLLECT_EVERY",
        f"版本            {stockrt.__version__}",
        "守护进程        未运行",
        "注册            无：未设置平台",
        "平台            未设置：守护进程未运行",
        f"存储            {program.state / stockrt.SQLITE_NAME}",
        "待处理          0 条指令待执行，0 条结果待送达",
        "最近执行        尚无",
        "API 密钥        aaa…111  套餐 Free  当日已用 0，剩余额度 86400  守护进程未报告：请看 --check",
        "API 密钥        bbb…222  套餐 Pro  当日已用 0，剩余额度 1728000  守护进程未报告：请看 --check",
    ]
    assert program.run("--executions") == "尚未执行过\n"
    assert program.run("--rejects") == "目前没有被 MongoDB 拒绝的文档\n"


def test_in_chinese_programs_get_the_same_keys_and_states(program: Program) -> None:
    """What a person reads in them is Chinese."""
    english = program.status()
    speak_chinese(program)
    chinese = program.status()
    assert [name for name in english if english[name] != chinese[name]] == ["to_do"]
    assert chinese["to_do"][0].startswith("手动执行命令时不需要守护进程，")
    with InfowayServer(keys={FIRST, OTHER}) as api:
        program.env |= {"INFOWAY_API_BASE_URL": api.url}
        checks = [json.loads(line) for line in program.run("--check", "--json").splitlines()]
    names = ["settings", "API key aaa…111", "API key bbb…222", "state directory", "store", "platform"]
    assert [check["name"] for check in checks] == names
    assert checks[-1]["words"] == "未设置 SERVER_IP 和 SERVER_PORT：只够 --once 使用，不能运行守护进程"
    assert checks[3]["words"] == f"{program.state} 可以创建"
    # what was looked at in its place is not told
    assert checks[4]["words"].startswith(f"{program.state / stockrt.SQLITE_NAME} 可写入")


def test_in_chinese_beside_a_daemon(program: Program) -> None:
    """Connected, executing, with a key that is out; then without its platform; then gone."""
    speak_chinese(program)
    with InfowayServer(keys={FIRST, OTHER}) as api:
        with PlatformServer() as platform:
            api.script = lambda request: REFUSALS["401_token_invalid"] if request.key == FIRST else None
            program.env |= {"SERVER_IP": "127.0.0.1", "SERVER_PORT": str(platform.port), "INFOWAY_PLAN": "0",
                            "INFOWAY_API_BASE_URL": api.url}  # fmt: skip
            program.start_daemon()
            program.until(lambda: stockrt.read_status(program.state)["platform"] == "connected")
            assert lines_in_chinese(program.lines(WELL))["状态"] == "正常"
            platform.execute([*(f"A{number}.US" for number in range(300)), "NOPE"])
            program.until(lambda: "keys" in stockrt.read_status(program.state))
            text = program.lines(WRONG)
            lines = lines_in_chinese(text)
            assert lines["状态"] == (
                "有问题：API 密钥 aaa…111 已停用。处理办法：请看下面该密钥的一行，在 INFOWAY_API_KEY 中换掉它"
            )
            assert re.fullmatch(r"运行中，pid \d+，版本 \S+", lines["守护进程"])
            assert re.fullmatch(rf"http://127\S+：自 {LOCAL_TIME} 起已连接", lines["平台"])
            assert re.match(rf"{LOCAL_TIME} 部分成功，simulated：", lines["最近执行"])
            assert re.search(
                rf"自 {LOCAL_TIME} 起共 1 次执行，部分成功 1 次，失败 0 次；300 笔成交已入库，0 笔已有，"
                "曾暂存 0 笔，1 个代码失败",
                lines["累计"],
            )
            assert "aaa…111  套餐 0  无每日额度限制，不计数  已停用（HTTP 401：Token invalid）" in text
            first, *failed = program.run("--executions", "1").splitlines()
            assert re.match(rf"{LOCAL_TIME}  部分成功  \S+  simulated  301 个代码中 300 个已入库", first)
            assert [line[:7] for line in failed] == ["  NOPE："]
            in_chinese(text, "Token invalid")
            in_chinese("\n".join([first, *failed]))
            in_chinese(program.run("--check", status=1), "Token invalid")
        program.until(lambda: stockrt.read_status(program.state)["platform"] == "not connected")
        program.until(lambda: "lost_because" in stockrt.read_status(program.state))
        lines = lines_in_chinese(program.lines(WRONG))
        assert re.fullmatch(r"有问题：未连接到平台：\S.*。处理办法：程序会自动重试", lines["状态"])
        assert lines["此外"].startswith("API 密钥 aaa…111 已停用。处理办法：请看下面该密钥的一行，")
        assert re.fullmatch(rf"http://127\S+：自 {LOCAL_TIME} 起未连接", lines["平台"])
        program.stop_daemon()
        assert lines_in_chinese(program.lines())["状态"] == (
            "未运行。处理办法：请不带命令运行 stockrt.pyz 来启动"
        )
        program.env["LOG_LEVEL"] = "loud"
        lines = lines_in_chinese(program.lines(FAULTY))
        assert lines["状态"] == "未运行：设置有误。处理办法：请修正设置，详见 --check-settings"
        assert lines["平台"].startswith("未知：守护进程未运行，") and lines["存储"] == "未知"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_settings_file_that_was_just_copied_is_said_to_be_found(program: Program, language: str) -> None:
    """Unless it sets something, be it that the environment has that otherwise."""
    program.env["STOCKRT_LANG"] = language
    file = program.folder / "stockrt.env"
    file.write_text((Path(stockrt.__file__).parent / "stockrt.env.example").read_text(encoding="utf-8"))
    beginning = {
        "en": "ok    settings: from environment, {}defaults",
        "zh": "正常  设置：环境变量、{}默认值",
    }[language]
    nothing = {"en": "stockrt.env (sets nothing), ", "zh": "stockrt.env（未设置任何项）、"}[language]
    assert beginning.format(nothing) in program.run("--check-settings", status=None)
    assert beginning.format(nothing) in program.run("--check", status=None)
    file.write_text(f"STOCKRT_LANG={language}\n")
    assert beginning.format("") in program.run("--check-settings", status=None)


def test_in_chinese_every_fault_that_check_finds(program: Program) -> None:
    speak_chinese(program)
    (program.folder / "file").write_text("")
    nobody = "mongodb://127.0.0.1:9/?timeoutMS=300"
    program.env |= {"INFOWAY_API_BASE_URL": "http://127.0.0.1:9", "SERVER_IP": "127.0.0.1", "SERVER_PORT": "9",
                    "MONGODB_HOST": nobody, "METRICS_FILE": str(program.folder / "file" / "m.prom"),
                    "STATE_DIRECTORY": str(program.folder / "file" / "state")}  # fmt: skip
    text = program.run("--check", status=1)
    good, *bad = text.splitlines()
    assert good == "正常  设置：环境变量、默认值"
    names = "API 密钥 aaa…111", "API 密钥 bbb…222", "状态目录", "METRICS_FILE", "平台"
    assert (
        f"失败  状态目录：无法使用 {program.folder / 'file' / 'state'}：不是目录；请检查 STATE_DIRECTORY\n"
        in text
    )
    assert [line.partition("：")[0] for line in bad] == [f"失败  {name}" for name in names]
    in_chinese(text)
    program.env |= {"STATE_DIRECTORY": str(program.state), "INFOWAY_API_KEY": "", "INFOWAY_PLAN": "0"}
    text = program.run("--check", status=1)
    assert "\n失败  API 密钥：未设置 INFOWAY_API_KEY" in text and "\n失败  存储：MongoDB（" in text
    in_chinese(text)


def test_in_chinese_settings_that_the_service_does_not_have(
    program: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_settings(program.env, None, (), is_root=False)
    monkeypatch.setattr(stockrt.SPOKEN, "language", stockrt.CHINESE)
    stockrt.run_check_settings(loaded._replace(hiding=("KEEP_DAYS", "LOG_LEVEL")), is_service_hidden=True)
    assert capsys.readouterr().out == (
        "失败  设置：环境变量、默认值；与 stockrt.service 的设置不同：KEEP_DAYS、LOG_LEVEL 来自当前环境变量，"
        "服务看不到；要按服务的设置检查，请先取消这些变量；"
        "当前用户看不到 stockrt.service 的设置：请用 root 运行以检查；"
        "未设置 SERVER_IP 和 SERVER_PORT：只够 --once 使用，不能运行守护进程\n"
    )


@pytest.mark.parametrize("collects", [False, True])
@pytest.mark.parametrize("language", stockrt.LANGUAGES)
def test_of_a_service_that_does_not_run_the_log_is_named(
    program: Program,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    language: str,
    collects: bool,
) -> None:
    monkeypatch.setattr(stockrt.SPOKEN, "language", language)
    if collects:
        program.env |= {"COLLECT": "stream", "COLLECT_CODES": "AAPL.US"}
    settings = load_settings(program.env, None, (), is_root=False).settings
    words = {"en": "; see sudo journalctl -u stockrt\n", "zh": "；请看 sudo journalctl -u stockrt\n"}[
        language
    ]
    unit = stockrt.Unit({}, {}, [], program.state, [])
    for installed in (None, unit):
        assert stockrt.run_status(settings, False, installed) == NOT_RUNNING
        assert (words in capsys.readouterr().out) == (installed is not None)
    with stockrt.lock_state_directory(program.state):
        stockrt.run_status(settings, False, unit)
    assert "journalctl" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("told", "wrong", "line"),
    [
        ({"dropped": 3}, "", "启动以来 900 笔成交，新入库 880 笔，丢弃 3 条"),
        ({"connections": 1, "streams": [LOST]}, "推送流应有 2 个连接，现有 1 个", "启动以来 900 笔成交"),
        (
            {"connections": 0, "connections_wanted": 0, "codes": 0, "polled": 800},
            "推送流没有数据，已改为轮询 800 个代码",
            "启动以来 900 笔成交",
        ),
        (None, "行情采集尚未开始", "目前未采集"),
    ],
)
def test_in_chinese_a_service_that_collects(
    program: Program, told: dict[str, object] | None, wrong: str, line: str
) -> None:
    speak_chinese(program)
    with a_daemon_that_told(program, told):
        lines = lines_in_chinese(program.lines(WRONG if wrong else WELL))
        check = program.run("--check", status=None)
    assert lines["状态"].startswith(f"有问题：{wrong}。处理办法：请看 --check 和" if wrong else "正常")
    assert lines["平台"] == "未设置：不需要"
    assert line in lines["行情采集"]
    assert lines.get("推送流") == (
        "crypto：1 个代码中已订阅 0 个，等待重连：429: too many" if told and "streams" in told else None
    )
    if told and "connections_wanted" not in told:
        assert (f"失败  推送流：{wrong}\n" if wrong else "正常  推送流：守护进程正在使用：") in check
    assert "正常  平台：未设置 SERVER_IP 和 SERVER_PORT：守护进程自行采集，不连接平台\n" in check


def test_in_chinese_what_a_key_does_not_serve(program: Program) -> None:
    """To programs it is called as ever."""
    speak_chinese(program)
    rests = {
        "state": "resting",
        "why": stockrt.packed(stockrt.phrase("quota.busy")),
        "until": "2999-01-01T00:00:00.000Z",
    }
    state = KEY_STATE | rests | {"digest": stockrt.key_digest(OTHER), "not_for": ["crypto", "stock bars"]}
    with stockrt.lock_state_directory(program.state):
        (program.state / stockrt.STATUS_NAME).write_text(json.dumps({"keys": [state]}))
        line = lines_in_chinese(program.lines(WRONG))["API 密钥"]
        key = program.status(WRONG)["keys"][-1]
    assert re.search(rf"暂停使用.*{LOCAL_TIME}.*（共用计数正忙）；不能用于 crypto、stock 日线$", line)
    assert (key["state"], key["why"], key["not_for"]) == ("resting", "共用计数正忙", ["crypto", "stock bars"])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_in_chinese_another_user_is_told_that_nothing_is_known(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    stockrt.write_hash(program.state, "a" * 32)
    settings = load_settings(program.env, None, (), is_root=False).settings
    monkeypatch.setattr(stockrt.SPOKEN, "language", stockrt.CHINESE)
    assert said_to_another(settings, as_json=False) == [
        "状态            未知：当前用户无权查看。处理办法：请用 root 运行",
        f"版本            {stockrt.__version__}",
        "守护进程        未知",
        "注册            未知",
        "平台            未知",
        "存储            未知",
        "待处理          未知",
        "最近执行        未知",
        "API 密钥        未知",
    ]
    told = json.loads(said_to_another(settings, as_json=True)[0])
    assert (told["status"], told["wrong"], told["to_do"]) == (
        "unknown",
        ["当前用户无权查看"],
        ["请用 root 运行"],
    )
    with unprivileged(), pytest.raises(stockrt.StoreError) as caught:
        stockrt.run_executions(5, settings, as_json=False)
    assert in_chinese(caught.value.message).startswith("当前用户无权查看 stockrt.service 的设置和状态：")


def lines_in_chinese(text: str) -> dict[str, str]:
    """Return the lines for a person by what they are about; of several keys the last."""
    pairs = [line.split("  ", 1) for line in text.splitlines()]
    return {label: words.strip() for label, words in pairs}
