"""The program as people run it: one file, one command, its rows, its messages, its exit status."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pty
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import termios
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pymongo
import pytest
from conftest import RunPyz, controlled
from kit.daemons import LOCAL_TIME, PATIENCE, number, until
from kit.infoway_server import PLANS, REFUSALS, Answer, InfowayServer, Request, make_record, symbol
from kit.mongo import MongoServer
from kit.platform_server import PlatformServer
from rooms.test_fetch import HOSTILE, UNKNOWN, check_mixed_requests, mixed_codes

import stockrt

# For what must end soon: no promise is that slack, no busy machine that slow.
SOON_S = 60.0
KEY = "test-key"
PASSWORD = "hunter2-secret"
DEMO = ("--once", "--demo", "--codes")
DEMO_CODES = ("TSLA.US", "AAPL.US", "USDCNY")
FIELDS = ["_id", "s", "t", "p", "v", "vw", "td", "stock_code", "create_time"]
TITLES = ["CODE", "PRICE", "VOLUME", "TURNOVER", "SIDE", "EXCHANGE TIME", "AGE"]
NOT_KNOWN = "unknown to the API: in none of its lists"
LISTED = "the API lists it as {}, but has no trade of it, or not for this key's plan"
CLOSING = re.compile(r"^total (\d+), stored (\d+), already known (\d+), failed (\d+)", re.MULTILINE)


def api_env(server: InfowayServer, **more: str) -> dict[str, str]:
    """Return the settings for this server, whose requests nothing limits."""
    return {
        "INFOWAY_API_KEY": KEY,
        "INFOWAY_API_BASE_URL": server.url,
        "INFOWAY_PLAN": "0",
        "SHOULD_NOT_MATTER": "1",
        **more,
    }


def counts(done: subprocess.CompletedProcess[str]) -> tuple[int, ...]:
    """Return total, stored, known and failed of the one closing line."""
    (found,) = CLOSING.findall(done.stderr)
    return tuple(map(int, found))


def rows_of(state: Path) -> list[dict[str, Any]]:
    """Return the rows of the embedded store."""
    with contextlib.closing(sqlite3.connect(state / "stockrt.db")) as db:
        db.row_factory = sqlite3.Row
        return [dict(row) for row in db.execute("SELECT * FROM realtime ORDER BY seq")]


def cells(table: str) -> list[list[str]]:
    """Return the cells of each line."""
    return [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()]


def check_clean(*texts: str) -> None:
    """No traceback, no secret."""
    for text in texts:
        assert "Traceback" not in text, text
        assert KEY not in text and PASSWORD not in text, text


def nobody_listens() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """The state directory of `clean_env`."""
    return tmp_path / "state"


# -------------------------------------------------------------------------------------------------- the demo


def test_demo_twice_stores_no_trade_twice(run_pyz: RunPyz, state: Path) -> None:
    stored = []
    for _ in range(2):
        done = run_pyz(*DEMO, *DEMO_CODES)
        assert done.returncode == 0, done.stderr
        total, new, known, failed = counts(done)
        assert (total, new + known, failed) == (3, 3, 0)
        assert [row[0] for row in cells(done.stdout)] == ["CODE", *DEMO_CODES]
        stored.append(new)
    assert stored[0] == 3 and stored[1] in (0, 3)  # 3: another minute, other trades
    rows = rows_of(state)
    assert len(rows) == len({row["_id"] for row in rows}) == sum(stored)
    assert {row["demo"] for row in rows} == {1}


def test_table_is_aligned_and_in_the_order_asked(run_pyz: RunPyz, state: Path) -> None:
    codes = ["BTCUSDT", "600519", "AAPL.US", "700.HK", "USDCNY", "BRK.B.US", "aapl.us"]
    done = run_pyz(*DEMO, *codes)
    assert done.returncode == 0
    table = cells(done.stdout)
    assert table[0] == TITLES
    expected = ["BTCUSDT", "600519.SH", "AAPL.US", "00700.HK", "USDCNY", "BRK.B.US"]
    assert [row[0] for row in table[1:]] == expected
    assert all(len(row) == len(TITLES) for row in table)
    lines = done.stdout.splitlines()
    for title in ("PRICE", "VOLUME", "TURNOVER"):  # right-aligned: they end where the title ends
        end = lines[0].index(title) + len(title)
        assert all(line[end - 1].isdigit() and line[end : end + 2] == "  " for line in lines[1:])
    for title in ("SIDE", "EXCHANGE TIME"):
        begin = lines[0].index(title)
        assert all(line[begin - 2 : begin] == "  " and line[begin] != " " for line in lines[1:])
    stored = {row["s"]: row for row in rows_of(state)}
    for code, price, volume, turnover, side, when, age in table[1:]:
        row = stored[code]
        assert [price, volume, turnover] == [row["p"], row["v"], row["vw"]]
        assert side == {0: "-", 1: "buy", 2: "sell"}[row["td"]]
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \S+", when)
        assert re.fullmatch(r"\d+ (s|min)", age)


def test_table_for_a_chinese_reader_is_the_same_one_in_chinese(run_pyz: RunPyz, state: Path) -> None:
    """Titles, sides and ages; for a program nothing changes."""
    env = {"STOCKRT_LANG": "zh"}
    title, *rows = cells(run_pyz(*DEMO, *DEMO_CODES, env=env).stdout)
    assert title == ["代码", "价格", "成交量", "成交额", "方向", "交易所时间", "距今"]
    stored = {row["s"]: row for row in rows_of(state)}
    assert [row[0] for row in rows] == list(DEMO_CODES)
    for code, _, _, _, side, _, age in rows:
        assert side == {0: "-", 1: "买", 2: "卖"}[stored[code]["td"]]
        assert re.fullmatch(r"\d+ (秒|分钟)", age)
    for line in run_pyz(*DEMO, *DEMO_CODES, "--json", env=env).stdout.splitlines():
        assert list(json.loads(line)) == [*FIELDS, "demo"] and line.isascii()


def test_exchange_time_is_local(run_pyz: RunPyz, infoway: InfowayServer) -> None:
    # 2026-08-15 00:00:00 UTC and less than a second
    done = run_pyz("--once", "--codes", "AAPL.US,00700.HK,7203.JP,BTCUSDT", env=api_env(infoway))
    assert done.returncode == 0, done.stderr
    assert [row[5] for row in cells(done.stdout)[1:]] == [
        "2026-08-14 20:00:00 EDT",
        "2026-08-15 08:00:00 HKT",
        "2026-08-15 09:00:00 JST",
        "2026-08-15 00:00:00 UTC",
    ]


def test_json_is_a_document_a_line(run_pyz: RunPyz, state: Path) -> None:
    done = run_pyz(*DEMO, *DEMO_CODES, "--json")
    assert done.returncode == 0
    documents = [json.loads(line) for line in done.stdout.splitlines()]
    assert sorted(document["s"] for document in documents) == sorted(DEMO_CODES)
    stored = {row["_id"]: row for row in rows_of(state)}
    for document in documents:
        assert list(document) == [*FIELDS, "demo"]
        assert document["demo"] is True
        assert {name: document[name] for name in FIELDS} == {
            name: stored[document["_id"]][name] for name in FIELDS
        }


def test_real_documents_carry_no_demo_mark(run_pyz: RunPyz, infoway: InfowayServer, state: Path) -> None:
    done = run_pyz("--once", "--codes", "AAPL.US", "--json", env=api_env(infoway))
    document = json.loads(done.stdout)
    assert list(document) == FIELDS
    record = make_record("AAPL.US", 0)
    assert {name: document[name] for name in record} == record
    assert rows_of(state)[0]["demo"] is None


def test_demo_is_refused_together_with_mongodb(run_pyz: RunPyz, state: Path) -> None:
    env = {"MONGODB_HOST": f"mongodb://user:{PASSWORD}@127.0.0.1:{nobody_listens()}/"}
    done = run_pyz(*DEMO, *DEMO_CODES, env=env)
    assert done.returncode in (64, 78)
    assert "MONGODB_HOST" in done.stderr and "--demo" in done.stderr
    assert not done.stdout and not state.exists()
    check_clean(done.stderr)


def test_demo_asks_nobody(run_pyz: RunPyz, infoway: InfowayServer) -> None:
    assert run_pyz(*DEMO, *DEMO_CODES, env=api_env(infoway)).returncode == 0
    assert infoway.connections == 0


def test_demo_names_bad_codes(run_pyz: RunPyz) -> None:
    done = run_pyz(*DEMO, "TSLA.US", "AAPL", HOSTILE)
    assert done.returncode == 1
    assert counts(done) == (3, 1, 0, 2)
    assert "AAPL.US" in failures_of(done)["AAPL"]
    assert HOSTILE in failures_of(done)


def failures_of(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Return the failed codes and their reasons: the lines after the closing line, each of codes and one reason."""
    found = CLOSING.search(done.stderr)
    assert found is not None
    pairs = (line.strip().partition(": ") for line in done.stderr[found.end() :].splitlines()[1:])
    return {code: reason for codes, _, reason in pairs for code in codes.split(", ")}


# --------------------------------------------------------------------------------------------------- real runs


def test_mixed_codes(run_pyz: RunPyz, state: Path) -> None:
    typed, products = mixed_codes()
    with InfowayServer(unknown=UNKNOWN) as server:
        done = run_pyz("--once", "--codes", *typed[:100], ",".join(typed[100:]), env=api_env(server))
        check_mixed_requests(server, products)
        records = {code: server.record(code) for code in products}
    assert done.returncode == 1
    assert counts(done) == (250, 247, 0, 3)
    assert set(failures_of(done)) == {*UNKNOWN, HOSTILE}
    assert {reason for code, reason in failures_of(done).items() if code in UNKNOWN} == {NOT_KNOWN}
    assert {row["s"]: {name: row[name] for name in records[row["s"]]} for row in rows_of(state)} == records
    assert {row[0] for row in cells(done.stdout)[1:]} == set(products)
    check_clean(done.stdout, done.stderr)


def test_second_run_without_a_new_trade_stores_nothing(
    run_pyz: RunPyz, infoway: InfowayServer, state: Path
) -> None:
    codes = ("AAPL.US", "BTCUSDT")
    found = []
    for bump in (0, 0, 1):
        infoway.bump(bump)
        done = run_pyz("--once", "--codes", *codes, env=api_env(infoway))
        assert done.returncode == 0
        found.append(counts(done))
        assert [row[0] for row in cells(done.stdout)[1:]] == [*codes]
    assert found == [(2, 2, 0, 0), (2, 0, 2, 0), (2, 2, 0, 0)]
    assert len(rows_of(state)) == 4


def test_runs_in_a_row_keep_the_plan_together(run_pyz: RunPyz) -> None:
    """On the free plan, as fast as one can type: the API refuses none of their requests."""
    runs = number(6, 6, quick=3)
    with InfowayServer(keys=frozenset({KEY}), per_second=1, per_minute=60) as server:
        for _ in range(runs):
            done = run_pyz(
                "--once", "--codes", "TSLA.US", "BTCUSDT", env=api_env(server, INFOWAY_PLAN="free")
            )
            assert done.returncode == 0, done.stderr
        assert server.request_count >= 2 * runs
        assert server.over_limit == 0


def test_many_rows_are_printed_as_they_come(run_pyz: RunPyz, infoway: InfowayServer) -> None:
    codes = [f"{600_000 + number}.SH" for number in range(2_345)]
    done = run_pyz("--once", "--codes-file", "-", input="\n".join(codes), env=api_env(infoway))
    assert done.returncode == 0
    assert sorted(row[0] for row in cells(done.stdout)[1:]) == codes
    assert cells(done.stdout)[0] == TITLES


@pytest.mark.parametrize("way", ["file", "stdin"])
def test_codes_file(run_pyz: RunPyz, infoway: InfowayServer, tmp_path: Path, way: str) -> None:
    text = "# a comment\r\nAAPL.US, 700.HK;600519\n\nBTCUSDT  # another\n\tAAPL.US\n，USDCNY"
    file = tmp_path / "my codes.txt"
    file.write_text("\ufeff" + text, encoding="utf-8")  # as Windows' editor saves it
    args = ("-",) if way == "stdin" else (file,)
    done = run_pyz(
        "--once",
        "--codes-file",
        *args,
        "--codes",
        "TSLA.US",
        env=api_env(infoway),
        input=text if way == "stdin" else None,
    )
    assert done.returncode == 0, done.stderr
    assert [row[0] for row in cells(done.stdout)[1:]] == [
        "TSLA.US",
        "AAPL.US",
        "00700.HK",
        "600519.SH",
        "BTCUSDT",
        "USDCNY",
    ]


@pytest.mark.parametrize("name", ["missing.txt", ".", "binary"])
def test_codes_file_that_cannot_be_read(run_pyz: RunPyz, tmp_path: Path, name: str) -> None:
    (tmp_path / "binary").write_bytes(b"AAPL.US\n\xff\xfe\x00")
    done = run_pyz("--once", "--demo", "--codes-file", name)
    assert done.returncode == 64
    assert "--codes-file" in done.stderr and name in done.stderr
    check_clean(done.stderr)


def test_settings_file_of_the_working_directory(
    run_pyz: RunPyz, infoway: InfowayServer, tmp_path: Path
) -> None:
    file = tmp_path / "stockrt.env"
    lines = [f"{name}='{value}'" for name, value in api_env(infoway).items()]
    file.write_text("\n".join([*lines, "INFOWAY_PLAM=pro"]))
    done = run_pyz("--once", "--codes", "AAPL.US")
    assert done.returncode == 0, done.stderr
    assert infoway.requests[0].key == KEY
    assert "INFOWAY_PLAM" in done.stderr and "INFOWAY_PLAN" in done.stderr  # the nearest known name
    # The environment is stronger, and a named file takes the place of the found one.
    weak = run_pyz("--once", "--codes", "AAPL.US", env={"INFOWAY_API_KEY": "other-key"})
    assert (weak.returncode, infoway.requests[-1].key) == (1, "other-key")
    (tmp_path / "other.env").write_text("INFOWAY_PLAN=premium")
    named = run_pyz("--once", "--codes", "AAPL.US", "--env-file", "other.env")
    assert named.returncode == 78 and "INFOWAY_API_KEY" in named.stderr


def test_mongodb_end_to_end(
    run_pyz: RunPyz, infoway: InfowayServer, mongo_db: tuple[str, str], state: Path
) -> None:
    uri, name = mongo_db
    env = api_env(infoway, MONGODB_HOST=uri, MONGODB_DB_NAME=name)
    codes = ("AAPL.US", "700.HK", "BTCUSDT")
    for expected in ((3, 3, 0, 0), (3, 0, 3, 0)):
        done = run_pyz("--once", "--codes", *codes, env=env)
        assert (done.returncode, counts(done)) == (0, expected), done.stderr
        assert [row[0] for row in cells(done.stdout)[1:]] == ["AAPL.US", "00700.HK", "BTCUSDT"]
    with pymongo.MongoClient[dict[str, Any]](uri) as client:
        documents = list(client[name]["realtime"].find())
    assert {document["s"] for document in documents} == {"AAPL.US", "00700.HK", "BTCUSDT"}
    assert all(list(document) == FIELDS for document in documents)
    assert rows_of(state) == []


def test_mongodb_away(run_pyz: RunPyz, infoway: InfowayServer, state: Path) -> None:
    uri = f"mongodb://user:{PASSWORD}@127.0.0.1:{nobody_listens()}/?timeoutMS=1500"
    done = run_pyz("--once", "--codes", "AAPL.US", "AAPL", env=api_env(infoway, MONGODB_HOST=uri))
    assert done.returncode == 1
    assert counts(done) == (2, 0, 0, 1)
    assert re.search(
        rf"; 1 trade kept on this machine, MongoDB unreachable since {LOCAL_TIME}$", done.stderr, re.M
    )
    assert "MONGODB_HOST" in done.stderr
    assert [row[0] for row in cells(done.stdout)] == ["CODE", "AAPL.US"]
    assert len(rows_of(state)) == 1
    check_clean(done.stderr)


def test_state_directory_that_cannot_be_used(run_pyz: RunPyz, infoway: InfowayServer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    env = api_env(infoway, STATE_DIRECTORY=str(tmp_path / "file" / "state"))
    done = run_pyz("--once", "--codes", "AAPL.US", env=env)
    assert done.returncode == 1 and "STATE_DIRECTORY" in done.stderr
    assert infoway.request_count == 0
    check_clean(done.stderr)


def test_two_runs_at_once_share_the_store(
    pyz: Path, clean_env: dict[str, str], tmp_path: Path, infoway: InfowayServer, state: Path
) -> None:
    codes = [f"{600_000 + number}.SH" for number in range(1_000)]
    (tmp_path / "codes.txt").write_text("\n".join(codes))
    args = ("--once", "--codes-file", "codes.txt", "--json")
    with contextlib.ExitStack() as stack:
        runs = [
            stack.enter_context(started(pyz, clean_env | api_env(infoway), *args, cwd=tmp_path))
            for _ in range(3)
        ]
        ends = [run.communicate(timeout=60) for run in runs]
        assert [run.returncode for run in runs] == [0, 0, 0], ends
    assert sum(int(CLOSING.findall(err)[0][1]) for _, err in ends) == 1_000
    assert sorted(row["s"] for row in rows_of(state)) == codes


# ------------------------------------------------------------------------------------------------ exit statuses


@pytest.mark.parametrize(
    "args",
    [
        ("--nonsense",),
        ("--once",),
        ("--once", "--codes"),
        ("--once", "--codes-file"),
        ("--codes", "AAPL.US"),
        ("--demo",),
        ("--json",),
        ("--once", "--check", "--codes", "AAPL.US"),
        ("--onc", "--codes", "AAPL.US"),
        ("--show", ","),
        ("AAPL.US",),
    ],
)
def test_usage(run_pyz: RunPyz, args: Sequence[str]) -> None:
    done = run_pyz(*args)
    assert done.returncode == 64
    assert "--help" in done.stderr and not done.stdout
    check_clean(done.stderr)


def test_no_flag_says_what_the_daemon_needs(run_pyz: RunPyz) -> None:
    done = run_pyz()
    assert done.returncode == 78
    assert "SERVER_IP" in done.stderr and "SERVER_PORT" in done.stderr and "--once" in done.stderr
    assert "INFOWAY_API_KEY" in done.stderr
    assert len(done.stderr.splitlines()) == 2


def test_no_key(run_pyz: RunPyz, state: Path) -> None:
    done = run_pyz("--once", "--codes", "AAPL.US")
    assert done.returncode == 78
    assert "INFOWAY_API_KEY" in done.stderr and "--demo" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_all_faults_of_the_settings_at_once(run_pyz: RunPyz) -> None:
    env = {
        "INFOWAY_API_KEY": f"{KEY} with blanks",
        "INFOWAY_PLAN": "gold",
        "MONGODB_HOST": f"mongo://user:{PASSWORD}@host",
        "SERVER_PORT": "70000",
    }
    for args in ((*DEMO, "AAPL.US"), ("--check",), ()):
        done = run_pyz(*args, env=env)
        assert done.returncode == 78
        assert all(name in done.stderr for name in env)
        assert "gold" in done.stderr and "70000" in done.stderr
        assert len(done.stderr.splitlines()) == 4 + (args == ())  # for the daemon SERVER_IP is missing
        check_clean(done.stdout, done.stderr)


def test_version(run_pyz: RunPyz) -> None:
    done = run_pyz("--version")
    assert done.returncode == 0
    assert re.fullmatch(r"stockrt \d+\.\d+\.\d+\n", done.stdout)


def test_help_has_every_flag_and_examples(run_pyz: RunPyz) -> None:
    done = run_pyz("--help")
    assert done.returncode == 0
    flags = ("--once", "--codes", "--codes-file", "--json", "--demo", "--check", "--version", "--env-file")
    assert all(flag in done.stdout for flag in flags)
    assert "--once --demo --codes" in done.stdout and "INFOWAY_API_KEY" in done.stdout


# One of each kind; test_decide.py has them all.
KINDS_OF_REFUSAL = (
    "429_html",
    "503_html",
    "404_problem",
    "401_token_invalid",
    "ret_502",
    "ret_514",
    "ret_508",
)


@pytest.mark.parametrize("name", KINDS_OF_REFUSAL)
def test_a_refusal_ends_without_success(run_pyz: RunPyz, infoway: InfowayServer, name: str) -> None:
    # What would be waited out says that it takes long.
    answer = REFUSALS[name].with_headers(("Retry-After", "3600"))
    infoway.script = lambda _: answer
    done = run_pyz("--once", "--codes", "AAPL.US", env=api_env(infoway))
    assert done.returncode == 1
    assert counts(done) == (1, 0, 0, 1)
    assert len(failures_of(done)["AAPL.US"]) > 10
    assert not done.stdout
    check_clean(done.stderr)


# ------------------------------------------------------------------------------------------------------ stopping


@contextlib.contextmanager
def started(
    pyz: Path, env: Mapping[str, str], *args: str | Path, **options: Any
) -> Iterator[subprocess.Popen[str]]:
    """Yield the program, running; it is killed if the test leaves it."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    command = [sys.executable, str(pyz), *map(str, args)]
    with subprocess.Popen(command, env=dict(env), encoding="utf-8", **(pipes | options)) as process:
        try:
            yield process
        finally:
            process.kill()


def end(process: subprocess.Popen[str], number: int = signal.SIGINT) -> tuple[str, str]:
    """Send the signal and return stdout and stderr; the program must end sooner than any wait for an answer."""
    process.send_signal(number)
    return process.communicate(timeout=stockrt.API_LIMITS.read_s)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_stores_what_it_has(
    pyz: Path, clean_env: dict[str, str], tmp_path: Path, infoway: InfowayServer, state: Path, number: int
) -> None:
    codes = [f"{600_000 + count}.SH" for count in range(1_000)]
    first = iter([None])  # the usual answer once, then silence
    infoway.script = lambda _: next(first, Answer.hang())
    env = clean_env | api_env(infoway)
    with started(pyz, env, "--once", "--codes", *codes, cwd=tmp_path) as process:
        infoway.wait_for(lambda it: it.request_count >= 2, SOON_S)
        command = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        assert KEY.encode() not in command
        out, err = end(process, number)
    assert process.returncode == 130
    assert [row["s"] for row in rows_of(state)] == codes[:100]
    assert [row[0] for row in cells(out)[1:]] == codes[:100]
    assert CLOSING.findall(err) == [("1000", "100", "0", "0")]
    assert "interrupted" in err
    check_clean(out, err)


def test_interrupted_while_a_refusal_is_waited_out(
    pyz: Path, clean_env: dict[str, str], tmp_path: Path, infoway: InfowayServer
) -> None:
    infoway.script = lambda _: REFUSALS["429_html"].with_headers(("Retry-After", "50"))
    env = clean_env | api_env(infoway)
    with started(pyz, env, "--once", "--codes", "AAPL.US", cwd=tmp_path) as process:
        infoway.wait_for(lambda it: it.request_count == 1 and it.in_flight == 0, SOON_S)
        out, err = end(process)
    assert process.returncode == 130 and not out
    assert "interrupted" in err
    check_clean(err)


def test_interrupted_while_mongodb_hangs(
    pyz: Path,
    clean_env: dict[str, str],
    tmp_path: Path,
    infoway: InfowayServer,
    mongo_server: MongoServer,
    mongo_db: tuple[str, str],
) -> None:
    controlled(mongo_server)
    uri, name = mongo_db
    env = clean_env | api_env(infoway, MONGODB_HOST=uri, MONGODB_DB_NAME=name)
    mongo_server.pause()
    with started(pyz, env, "--once", "--codes", "AAPL.US", cwd=tmp_path) as process:
        infoway.wait_for(lambda it: it.request_count == 1 and it.in_flight == 0, SOON_S)
        out, err = end(process)
    assert process.returncode == 130 and not out
    assert CLOSING.findall(err)[0][1] == "0"
    check_clean(err)


def test_interrupted_while_waiting_for_standard_input(
    pyz: Path, clean_env: dict[str, str], tmp_path: Path
) -> None:
    args = ("--once", "--demo", "--codes-file", "-")
    with started(pyz, clean_env, *args, cwd=tmp_path, stdin=subprocess.PIPE) as process:
        deadline = time.monotonic() + SOON_S
        while not handles(process, signal.SIGTERM):  # Python itself handles SIGINT alone
            assert time.monotonic() < deadline
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        check_clean(process.stderr.read() if process.stderr else "")


def handles(process: subprocess.Popen[str], number: int) -> bool:
    """Whether the process has a handler for the signal."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = int(re.findall(r"^SigCgt:\s*([0-9a-f]+)", status, re.MULTILINE)[0], 16)
    return bool(caught >> (number - 1) & 1)


# ----------------------------------------------------------------------------------- streams and the terminal


def in_shell(
    pyz: Path, env: Mapping[str, str], folder: Path, redirections: str, *args: str
) -> subprocess.CompletedProcess[str]:
    """Run under `sh` with these redirections after the command."""
    return subprocess.run(
        ["/bin/sh", "-c", f'"$@" {redirections}', "sh", sys.executable, str(pyz), *args],
        env=dict(env),
        cwd=folder,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        encoding="utf-8",
        timeout=60,
    )


@pytest.mark.parametrize("form", ["table", "json"])
def test_reader_that_goes_away_ends_the_printing_only(
    pyz: Path, clean_env: dict[str, str], tmp_path: Path, state: Path, form: str
) -> None:
    (tmp_path / "codes.txt").write_text("\n".join(f"{600_000 + number}.SH" for number in range(5_000)))
    json_flag = ["--json"] if form == "json" else []
    args = ("--once", "--demo", "--codes-file", "codes.txt", *json_flag)
    done = in_shell(pyz, clean_env, tmp_path, "| head -1", *args)
    assert len(done.stdout.splitlines()) == 1
    assert "Broken" not in done.stderr
    assert counts(done) == (5_000, 5_000, 0, 0)
    assert len(rows_of(state)) == 5_000
    check_clean(done.stderr)


@pytest.mark.parametrize("redirection", [">&-", "2>&-", "<&-", ">&- 2>&- <&-", ">/dev/full", "2>/dev/full"])
def test_streams_that_are_closed_or_full(
    pyz: Path, clean_env: dict[str, str], tmp_path: Path, state: Path, redirection: str
) -> None:
    done = in_shell(pyz, clean_env, tmp_path, redirection, *DEMO, *DEMO_CODES)
    assert done.returncode in (0, 1)
    check_clean(done.stdout, done.stderr)
    assert len(rows_of(state)) == 3
    if redirection == ">/dev/full":
        assert "No space left" in done.stderr


@pytest.mark.parametrize(("flag", "unbuffered"), [("--help", ""), ("--version", "1")])
def test_help_that_cannot_be_printed_is_said(
    pyz: Path, clean_env: dict[str, str], tmp_path: Path, flag: str, unbuffered: str
) -> None:
    env = clean_env | {"PYTHONUNBUFFERED": unbuffered}
    done = in_shell(pyz, env, tmp_path, ">/dev/full", flag)
    assert (done.returncode, done.stderr) == (1, "stockrt: cannot print: No space left on device\n")


@pytest.mark.parametrize("args", [("--check",), ("--help",), ("--version",), (*DEMO, "AAPL.US")])
@pytest.mark.parametrize("redirection", [">&-", "| true"])
def test_nobody_reads(
    pyz: Path, clean_env: dict[str, str], tmp_path: Path, args: Sequence[str], redirection: str
) -> None:
    done = in_shell(pyz, clean_env, tmp_path, redirection, *args)
    check_clean(done.stderr)
    assert "Broken" not in done.stderr


def on_terminal(
    pyz: Path, env: Mapping[str, str], folder: Path, stream: str, *args: str, columns: int = 80
) -> tuple[int, str, str]:
    """Run with `stdout` or `stderr` on a terminal; return the status, what was shown there, and the other."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, columns))
    with started(pyz, env, *args, cwd=folder, **{stream: slave}) as process:
        os.close(slave)
        shown = b""
        with contextlib.suppress(OSError):  # EIO: the last one has closed it
            while part := os.read(master, 65536):
                shown += part
        os.close(master)
        out, err = process.communicate(timeout=60)
        return process.returncode, shown.decode(), (out if stream == "stderr" else err) or ""


def test_colours_on_a_terminal_only_and_not_with_no_color(
    pyz: Path, clean_env: dict[str, str], tmp_path: Path
) -> None:
    args = (*DEMO, "AAPL.US", "NOWHERE")
    status, shown, other = on_terminal(pyz, clean_env, tmp_path, "stdout", *args)
    assert status == 1
    assert "\033[1m" in shown and "AAPL.US" in shown and "\033" not in other
    _, shown, other = on_terminal(pyz, clean_env, tmp_path, "stderr", *args)
    assert "\033[31m" in shown and "\033" not in other and "AAPL.US" in other
    for stream in ("stdout", "stderr"):
        _, shown, other = on_terminal(pyz, clean_env | {"NO_COLOR": "1"}, tmp_path, stream, *args)
        assert "\033" not in shown + other
        assert "AAPL.US" in shown + other
    _, shown, _ = on_terminal(pyz, clean_env | {"NO_COLOR": ""}, tmp_path, "stdout", *args)
    assert "\033[1m" in shown  # empty is not set


def test_progress_bar_on_a_terminal_of_a_long_run_only(
    pyz: Path, clean_env: dict[str, str], tmp_path: Path, run_pyz: RunPyz
) -> None:
    many = [f"{600_000 + number}.SH" for number in range(500)]
    status, shown, _ = on_terminal(pyz, clean_env, tmp_path, "stderr", *DEMO, *many)
    assert status == 0
    assert re.search(r"\d+%\|", shown) and "500" in shown
    assert CLOSING.search(shown.replace("\r", "\n"))
    _, shown, _ = on_terminal(pyz, clean_env, tmp_path, "stderr", *DEMO, *many[:50])
    assert "%|" not in shown
    assert "%|" not in run_pyz(*DEMO, *many).stderr


# ----------------------------------------------------------------------------------------------- what people type


SEEN = {
    # as it is typed: the product and the code that are asked
    "510300": ("stock", "510300.SH"),
    "159915": ("stock", "159915.SZ"),
    "113050": ("stock", "113050.SH"),
    "000300": ("stock", "000300.SH"),
    "SH600519": ("stock", "600519.SH"),
    "CL": ("common", "CL"),
    "XPBUSD": ("common", "XPBUSD"),
    "US500": ("common", "US500"),
    "HK50": ("common", "HK50"),
    "BTC/USDT": ("crypto", "BTCUSDT"),
}
BEIJING = ("920002", "430047")


def test_what_people_type_is_asked_as_what_it_means(
    run_pyz: RunPyz, infoway: InfowayServer, state: Path
) -> None:
    done = run_pyz("--once", "--json", "--codes", *SEEN, *BEIJING, env=api_env(infoway))
    assert done.returncode == 1
    asked = {(request.product, code) for request in infoway.requests for code in request.codes}
    assert asked == set(SEEN.values())
    assert sorted(row["stock_code"] for row in rows_of(state)) == sorted(code for _, code in SEEN.values())
    assert counts(done) == (12, 10, 0, 2)
    for code in BEIJING:
        assert failures_of(done)[code] == "of the Beijing exchange, which Infoway does not carry"
    assert infoway.request_count == 3
    check_clean(done.stdout, done.stderr)


def test_a_number_that_does_not_tell_is_asked_at_both_exchanges(run_pyz: RunPyz, state: Path) -> None:
    """It failed when neither knows it; a result says which it became, and names it as it was typed."""
    codes = ("000905", "000016", "AAPL.US", "SZ000852", "000852")
    with InfowayServer(unknown={"000905.SZ", "000016.SZ", "000016.SH"}) as server:
        done = run_pyz("--once", "--codes", *codes, env=api_env(server))
    assert done.returncode == 1
    assert sorted(row["s"] for row in rows_of(state)) == ["000852.SZ", "000905.SH", "AAPL.US"]
    assert [row[0] for row in cells(done.stdout)[1:]] == ["000905.SH", "AAPL.US", "000852.SZ"]
    assert counts(done) == (4, 3, 0, 1)
    assert failures_of(done) == {"000016": f"{LISTED.format('上证50')} (000016 -> 000016.SZ, 000016.SH)"}
    assert "read as: 000852 -> 000852.SZ, 000905 -> 000905.SH" in done.stderr
    assert [request.codes for request in server.asked("batch_trade")] == [
        ("000905.SZ", "000016.SZ", "AAPL.US", "000852.SZ"),
        ("000905.SH", "000016.SH"),
    ]


def test_the_lists_tell_what_a_code_is_and_no_plain_code_waits_for_them(run_pyz: RunPyz, state: Path) -> None:
    with InfowayServer() as server:
        codes = ("AAPL.US", "ES", "茅台", "QQQQX", "aapl", "005930")
        done = run_pyz("--once", "--codes", *codes, env=api_env(server))
        resources = [request.resource for request in server.requests if "market" not in request.resource]
        again = run_pyz("--once", "--codes", "ES", "MSFT.US", env=api_env(server))
        lists = [request.resource for request in server.requests].count("common/basic/symbols")
    assert resources[0] == "batch_trade" and lists == 13
    assert counts(done) == (6, 2, 0, 4)
    assert {row["s"] for row in rows_of(state)} == {"AAPL.US", "ES", "MSFT.US"}
    assert "did you mean AAPL.US (苹果)?" in failures_of(done)["aapl"]
    assert "did you mean 005930.KS (三星电子)?" in failures_of(done)["005930"]
    assert "did you mean 600519.SH (贵州茅台)?" in failures_of(done)["茅台"]
    assert "QQQQX.US" in failures_of(done)["QQQQX"]
    assert again.returncode == 0, again.stderr


def test_names_of_symbols_are_padded_by_columns(run_pyz: RunPyz) -> None:
    """A Chinese character takes two."""
    symbols = {
        "STOCK_CN": [
            symbol("600519.SH", "贵州茅台", name_en="Kweichow of one"),
            symbol("000001.SZ", "A茅台", name_en="Ping An of two"),
            symbol("000002.SZ", "茅台" * 8, name_en="Long of three"),
        ]
    }
    with InfowayServer(symbols=symbols) as server:
        done = run_pyz("--symbols", "茅台", env=api_env(server))
    at = [
        stockrt.columns_of(line[: line.index(" of ")].rpartition("  ")[0])
        for line in done.stdout.splitlines()
    ]
    at.sort()
    assert len(at) == 3 and at[0] == at[1] == 16 + 1 + 9 + 1 + 20 < at[2], done.stdout


def test_symbols_finds_by_code_and_name(run_pyz: RunPyz) -> None:
    with InfowayServer() as server:
        done = run_pyz("--symbols", "茅台", env=api_env(server))
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["600519.SH", "STOCK_CN", "贵州茅台", "Kweichow", "Moutai"]
        (found,) = map(
            json.loads, run_pyz("--symbols", "tesla", "--json", env=api_env(server)).stdout.splitlines()
        )
        assert found == {
            "type": "STOCK_US", "code": "TSLA.US", "name_cn": "特斯拉", "name_hk": "特斯拉", "name_en": "Tesla, Inc.",
        }  # fmt: skip
        assert server.request_count == 13
        chinese = run_pyz("--symbols", "no such thing", env=api_env(server, STOCKRT_LANG="zh"))
        assert chinese.stderr.strip() == "API 的品种列表中，没有代码或名称含“no such thing”的品种"
        none = run_pyz("--symbols", "no such thing", env=api_env(server))
        assert none.returncode == 1 and "no such thing" in none.stderr and none.stdout == ""
        for odd in (" ", "a" * 100_000, "\udcff"):
            refused = run_pyz("--symbols", odd, env=api_env(server))
            assert refused.returncode == 64 and refused.stderr.startswith("stockrt: --symbols"), (
                refused.stderr
            )
    check_clean(done.stdout, done.stderr, none.stderr)


NAMED = {
    "600519.SH": "Kweichow Moutai",
    "AAPL.US": "Apple Inc.",
    "MSFT.US": "",  # in no list
    "RELIANCE.IN": "Reliance Industries Ltd",
    "BTCUSDT.P": "Bitcoin Perpetual",
}
CHINESE_NAMES = ["贵州茅台", "苹果", "", "Reliance Industries Ltd", "比特币永续"]


def test_the_table_has_names_once_the_lists_are_here(run_pyz: RunPyz) -> None:
    """For which nothing is asked; they stand last, where what looks at columns by their place does not see them."""
    with InfowayServer() as server:
        env = api_env(server)
        before = run_pyz("--once", "--codes", *NAMED, env=env)
        assert server.asked("common/basic/symbols") == []
        assert run_pyz("--symbols", "茅台", env=env).returncode == 0
        asked = server.request_count
        done = run_pyz("--once", "--codes", *NAMED, env=env)
        assert server.request_count - asked == len(server.asked("batch_trade")) / 2 == 3
        chinese = run_pyz("--once", "--codes", *NAMED, env=env | {"STOCKRT_LANG": "zh"})
        many = [f"{n}.US" for n in range(1_100)]
        long = run_pyz("--once", "--codes-file", "-", env=env, input="\n".join([*NAMED, *many]))
    assert cells(before.stdout)[0] == TITLES
    assert cells(done.stdout)[0] == [*TITLES, "NAME"]
    begin = done.stdout.index("NAME")
    assert [line[begin:] for line in done.stdout.splitlines()] == ["NAME", *NAMED.values()]
    _, *rows = chinese.stdout.splitlines()
    assert [row.rpartition("  ")[2] for row in rows if "MSFT" not in row] == [*filter(None, CHINESE_NAMES)]
    assert cells(long.stdout)[0] == [*TITLES, "NAME"]
    begin = long.stdout.index("NAME")
    assert {
        line[:12].strip(): line[begin:] for line in long.stdout.splitlines()[1:]
    } == NAMED | dict.fromkeys(many, "")


def test_a_name_has_what_a_terminal_has_left(
    pyz: Path, clean_env: dict[str, str], run_pyz: RunPyz, tmp_path: Path
) -> None:
    names_by_room = {
        25: ["NAME", *NAMED.values()],
        9: ["NAME", "Kweichow", "Apple Inc", "", "Reliance", "Bitcoin P"],
        4: ["NAME", "Kwei", "Appl", "", "Reli", "Bitc"],
        3: [""] * 6,
    }
    with InfowayServer() as server:
        env = api_env(server, NO_COLOR="1")
        assert run_pyz("--symbols", "茅台", env=env).returncode == 0
        begin = run_pyz("--once", "--codes", *NAMED, env=env).stdout.index("NAME")
        args = ("--once", "--codes", *NAMED)
        for room, names in names_by_room.items():
            _, text, _ = on_terminal(pyz, clean_env | env, tmp_path, "stdout", *args, columns=begin + room)
            assert [line[begin:].rstrip() for line in text.splitlines()] == names, room


def test_a_code_of_wide_characters_leaves_the_columns_in_their_places(run_pyz: RunPyz) -> None:
    with InfowayServer() as server:
        done = run_pyz("--once", "--codes", "es", "币安人生usdt", "AAPL.US", env=api_env(server))
    titles, future, wide, narrow = done.stdout.splitlines()
    assert future.startswith("ES  ") and future.endswith("  E-mini S&P 500 Futures")
    assert wide.startswith("币安人生USDT  ") and wide.endswith("  币安人生")
    assert narrow.index(" EDT") - 4 == wide.index(" UTC")
    assert titles.index("EXCHANGE TIME") == narrow.index("2026") == wide.index("2026") + 4


def test_rows_are_printed_without_names_that_cannot_be_read(run_pyz: RunPyz, state: Path) -> None:
    with InfowayServer() as server:
        assert run_pyz("--symbols", "茅台", env=api_env(server)).returncode == 0
        with contextlib.closing(sqlite3.connect(state / "stockrt.db")) as db:
            db.execute("DROP TABLE symbols")
        done = run_pyz("--once", "--codes", *NAMED, env=api_env(server))
    assert (done.returncode, counts(done)) == (0, (5, 5, 0, 0))
    assert [row[0] for row in cells(done.stdout)] == ["CODE", *NAMED]
    check_clean(done.stdout, done.stderr)


def test_a_code_that_failed_is_named_as_it_was_typed(run_pyz: RunPyz) -> None:
    """With what it became; where that is what was typed, the code alone."""
    codes = ("sh600519", "BTC-USDT", "700.hk", "MSFT.US")
    with InfowayServer(unknown={"600519.SH", "BTCUSDT", "00700.HK", "MSFT.US"}) as server:
        done = run_pyz("--once", "--codes", *codes, env=api_env(server))
    assert [*failures_of(done)] == [*codes]
    assert failures_of(done) == {
        "sh600519": f"{LISTED.format('贵州茅台')} (sh600519 -> 600519.SH)",
        "BTC-USDT": f"{LISTED.format('比特币')} (BTC-USDT -> BTCUSDT)",
        "700.hk": f"{LISTED.format('腾讯控股')} (700.hk -> 00700.HK)",
        "MSFT.US": NOT_KNOWN,
    }


def test_old_trades_are_said(run_pyz: RunPyz, infoway: InfowayServer) -> None:
    """And stored, as nobody but the exchange knows better."""
    infoway.trades = {"AAPL.US": {"t": int(time.time() - 30 * 86_400) * 1000}}
    done = run_pyz("--once", "--codes", "AAPL.US", "USOIL9", env=api_env(infoway))
    since = stockrt.local_times(stockrt.iso_after(infoway.record("AAPL.US")["t"] / 1000, 0))
    assert f"1 of 2 codes: no trade since {since}, though the market was open" in done.stderr
    assert counts(done) == (2, 1, 0, 1)


def test_lower_case_in_an_answer_is_the_code_that_was_asked(run_pyz: RunPyz, state: Path) -> None:
    with InfowayServer(lower_case=True) as server:
        done = run_pyz("--once", "--codes", "AAPL.US,600519,BTCUSDT", env=api_env(server))
    assert done.returncode == 0, done.stderr
    rows = rows_of(state)
    assert {row["s"] for row in rows} == {"AAPL.US", "600519.SH", "BTCUSDT"}
    assert all(row["_id"].startswith(f"{row['s']}|") and row["stock_code"] == row["s"] for row in rows)


# ------------------------------------------------------------------------------------------------------- secrets


def test_secrets_are_never_shown(run_pyz: RunPyz, tmp_path: Path) -> None:
    secret = "k3y-of-somebody-else"
    uri = f"mongodb://user:{PASSWORD}@127.0.0.1:{nobody_listens()}/?timeoutMS=1000"
    with InfowayServer() as server, ThreadPoolExecutor(9) as pool:
        base = api_env(server, INFOWAY_API_KEY=f"{secret},{KEY}", LOG_LEVEL="debug")
        runs = [
            pool.submit(run_pyz, *args, env=base | more | {"STATE_DIRECTORY": str(tmp_path / f"{place}")})
            for place, more in enumerate(({}, {"MONGODB_HOST": uri}, {"INFOWAY_PLAN": "0.5"}))
            for args in (("--once", "--codes", "AAPL.US"), ("--check",), ())
        ]
        texts = [text for run in runs for text in (run.result().stdout, run.result().stderr)]

        def echo(request: Request) -> Answer:
            return Answer.raw(400, json.dumps({"detail": f"what is {request.key}?", "status": 400}))

        server.script = echo
        done = run_pyz("--once", "--codes", "AAPL.US", env=base)
        texts += [done.stdout, done.stderr]
        assert "what is" in done.stderr
    check_clean(*texts)
    assert not any(secret in text for text in texts)


# --------------------------------------------------------------------------------------------------------- check


def check_lines(done: subprocess.CompletedProcess[str]) -> dict[str, tuple[bool, str]]:
    """Return, by name, whether each check went well and what it says."""
    found = {}
    for line in done.stdout.splitlines():
        good, name, text = re.fullmatch(r"(ok|FAIL)\s+(.+?): (.*)", line).groups()  # type: ignore[union-attr]
        found[name] = (good == "ok", text)
    return found


def test_check_of_what_is_good(
    run_pyz: RunPyz, infoway: InfowayServer, mongo_db: tuple[str, str], state: Path
) -> None:
    done = run_pyz("--check", env=api_env(infoway))
    assert done.returncode == 0, done.stdout
    assert all(good for good, _ in check_lines(done).values())
    assert len(check_lines(done)) == 5
    assert [request.resource for request in infoway.requests] == ["batch_trade", "package/info"]
    assert not state.exists()
    with PlatformServer() as platform:
        env = api_env(infoway, MONGODB_HOST=mongo_db[0], MONGODB_DB_NAME=mongo_db[1])
        env |= {"SERVER_IP": "127.0.0.1", "SERVER_PORT": str(platform.port)}
        done = run_pyz("--check", env=env)
        assert done.returncode == 0, done.stdout
        lines = check_lines(done)
        assert {"settings", "state directory", "store", "platform"} <= set(lines)
        assert all(good for good, _ in lines.values())
        assert "not registered yet: " in lines["platform"][1]
        state.mkdir()
        (state / "module_hash").write_text("no hash!")
        good, words = check_lines(run_pyz("--check", env=env))["platform"]
        assert not good and words.startswith(f"{state / 'module_hash'} holds no module hash; ")
    with pymongo.MongoClient[dict[str, Any]](mongo_db[0]) as client:
        assert mongo_db[1] not in client.list_database_names()
    check_clean(done.stdout, done.stderr)


def test_check_says_the_same_as_json_lines(run_pyz: RunPyz, infoway: InfowayServer) -> None:
    """One document a check; exit status and words are those of the lines for a person, times aside."""
    env = api_env(infoway, METRICS_FILE="/nowhere/stockrt.prom")
    time_of = re.compile(r"\d{4}-\d\d-\d\d[T ][\d:]+[^\s;]*")
    lines = check_lines(run_pyz("--check", env=env))
    done = run_pyz("--check", "--json", env=env)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert (done.returncode, done.stderr) == (1, "")
    said = {name: (good, time_of.sub("TIME", words)) for name, (good, words) in lines.items()}
    assert {one["name"]: (one["good"], time_of.sub("TIME", one["words"])) for one in found} == said
    assert "2100-01-01T00:00:00.000Z" in done.stdout  # as programs have times
    assert [one["name"] for one in found if not one["good"]] == ["METRICS_FILE"]
    check_clean(done.stdout, done.stderr)


BAD: dict[str, tuple[str, str, dict[str, str]]] = {
    # name: (the check that fails, the setting that it names, the environment)
    "no_key": ("API key", "INFOWAY_API_KEY", {"INFOWAY_API_KEY": ""}),
    "wrong_key": ("API key", "INFOWAY_API_KEY", {"INFOWAY_API_KEY": "no-such-key"}),
    "one_wrong_key": ("API key", "INFOWAY_API_KEY", {"INFOWAY_API_KEY": f"{KEY},another-long-key"}),
    "api_away": ("API key", "INFOWAY_API_BASE_URL", {"INFOWAY_API_BASE_URL": "http://127.0.0.1:{nobody}"}),
    "api_elsewhere": ("API key", "INFOWAY_API_BASE_URL", {"INFOWAY_API_BASE_URL": "{api}/elsewhere"}),
    "state": ("state directory", "STATE_DIRECTORY", {"STATE_DIRECTORY": "{file}/state"}),
    "mongodb_away": (
        "store",
        "MONGODB_HOST",
        {"MONGODB_HOST": f"mongodb://user:{PASSWORD}@127.0.0.1:{{nobody}}/?timeoutMS=300"},
    ),
    "platform_away": ("platform", "SERVER_IP", {"SERVER_IP": "127.0.0.1", "SERVER_PORT": "{nobody}"}),
    "no_platform": ("platform", "SERVER_PORT", {"SERVER_IP": "127.0.0.1", "SERVER_PORT": "{port}"}),
}


@pytest.mark.parametrize("name", BAD)
def test_check_of_what_is_bad(run_pyz: RunPyz, infoway: InfowayServer, tmp_path: Path, name: str) -> None:
    check, setting, changes = BAD[name]
    (tmp_path / "file").touch()
    places = {
        "nobody": str(nobody_listens()),
        "api": infoway.url,
        "port": str(infoway.port),
        "file": str(tmp_path / "file"),
    }
    filled = {key: value.format(**places) for key, value in changes.items()}
    done = run_pyz("--check", env=api_env(infoway) | filled)
    assert done.returncode == 1, done.stdout
    lines = check_lines(done)
    failed = {name: text for name, (good, text) in lines.items() if not good}
    assert len(failed) == 1 and next(iter(failed)).startswith(check), done.stdout
    assert setting in next(iter(failed.values()))
    assert len(lines) >= 4  # the others were looked at all the same
    assert not [name for name, (_, text) in lines.items() if name in text[: len(name) + 5]]  # is said twice
    check_clean(done.stdout, done.stderr)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("429_json", "INFOWAY_PLAN"),
        ("ret_502", "the day's quota is used up (the API says 502: Request frequency for the day"),
        ("ret_500", "the API's server fails: the API says 500: System error; try again later"),
        ("ret_0", "the API answers success (ret 0), but without trades"),
        ("ret_509", "INFOWAY_API_KEY"),
        ("401_token_invalid", "INFOWAY_API_KEY"),
        ("502_html", "the API's server fails: HTTP 502; try again later"),
        ("404_problem", "INFOWAY_API_BASE_URL"),
    ],
)
def test_check_names_the_setting_of_a_refusal_or_what_else_helps(
    run_pyz: RunPyz, infoway: InfowayServer, name: str, words: str
) -> None:
    infoway.script = lambda _: REFUSALS.get(name) or Answer.json({"ret": 0, "msg": "success"})
    done = run_pyz("--check", env=api_env(infoway))
    assert done.returncode == 1
    (told,) = [told for name, (_, told) in check_lines(done).items() if name.startswith("API key")]
    assert words in told and ("see INFOWAY" in told) == words.startswith("INFOWAY")
    assert infoway.request_count == 1  # one request, no second try


def test_a_key_that_was_refused_is_no_further_asked_for_by_a_check(
    run_pyz: RunPyz, infoway: InfowayServer
) -> None:
    env = api_env(infoway, INFOWAY_API_KEY="no-such-key", COLLECT="stream", COLLECT_CODES="AAPL.US")
    done = run_pyz("--check", env=env)
    lines = check_lines(done)
    assert (
        lines["stream, API key ***"]
        == lines["API key ***"]
        == (False, "HTTP 401: Token invalid; see INFOWAY_API_KEY")
    )
    assert (done.stderr, infoway.request_count) == ("", 1)


def test_a_check_beside_others_keeps_the_plan_with_them(
    run_pyz: RunPyz, mongo_db: tuple[str, str], tmp_path: Path
) -> None:
    def run_in_a_row(store: str) -> None:
        with InfowayServer(keys=frozenset({KEY}), per_second=1, per_minute=60) as server:
            env = api_env(server, INFOWAY_PLAN="free", STATE_DIRECTORY=str(tmp_path / store))
            if store == "mongodb":
                env |= {"MONGODB_HOST": mongo_db[0], "MONGODB_DB_NAME": mongo_db[1]}
            for args in (("--once", "--codes", "TSLA.US"), ("--check",), ("--check",)):
                done = run_pyz(*args, env=env)
                assert done.returncode == 0, done.stdout + done.stderr
            assert server.request_count >= 5
            assert server.over_limit == 0

    with ThreadPoolExecutor(2) as pool:  # each waits for its turn, second by second
        for done in [pool.submit(run_in_a_row, store) for store in ("local", "mongodb")]:
            done.result()


def test_check_says_what_the_plan_is_and_where_another_is_set(run_pyz: RunPyz) -> None:
    plan = replace(PLANS["premium"], expires=time.time() + 3 * 86_400 + 600)
    name = "API key ***"
    with InfowayServer(plans={KEY: plan}) as server:
        asked = check_lines(run_pyz("--check", env=api_env(server, INFOWAY_PLAN="")))[name]
        same = check_lines(run_pyz("--check", env=api_env(server, INFOWAY_PLAN="premium")))[name]
        other = check_lines(run_pyz("--check", env=api_env(server, INFOWAY_PLAN="basic")))[name]
        assert server.over_limit == 0
        server.script = lambda request: (
            REFUSALS["404_problem"] if request.resource == "package/info" else None
        )
        none = check_lines(run_pyz("--check", env=api_env(server, INFOWAY_PLAN="")))[name]
        server.script = ()
        run_pyz("--once", "--codes", "AAPL.US", env=api_env(server, INFOWAY_PLAN=""))
        server.script = lambda request: (
            Answer.data(PLANS["pro"].info()) if request.resource == "package/info" else None
        )
        changed = check_lines(run_pyz("--check", env=api_env(server, INFOWAY_PLAN="")))[name]
    told = "plan Premium: 10 requests a second, 600 a minute, 864000 a day; its plan ends at"
    assert all(good and told in text and "in 3 d" in text for good, text in (asked, same, other))
    assert "INFOWAY_PLAN" not in asked[1] + same[1] + changed[1]
    assert (
        "it has changed; until it is asked for anew, " in changed[1] and "Premium: 10 requests" in changed[1]
    )
    assert "INFOWAY_PLAN differs and is what counts: Basic: 2 requests a second, 120 a minute" in other[1]
    assert none[0] and "Free's limits hold unless INFOWAY_PLAN names it" in none[1]


def test_a_plan_that_is_not_set_is_asked_for_once_a_day(run_pyz: RunPyz, state: Path) -> None:
    """One request more than today's; the rate told holds from the first request on."""
    codes = ",".join(
        f"C{chr(65 + n // 676)}{chr(65 + n // 26 % 26)}{chr(65 + n % 26)}.US" for n in range(1_000)
    )
    plan = replace(PLANS["premium"], expires=time.time() + 86_400)
    with InfowayServer(plans={KEY: plan}) as server:
        env = api_env(server, INFOWAY_PLAN="")
        done = run_pyz("--once", "--json", "--codes-file", "-", env=env, input=codes)
        assert counts(done) == (1_000, 1_000, 0, 0)
        asked = Counter(request.resource for request in server.requests)
        assert asked == {"package/info": 1, "batch_trade": 10}
        assert "its plan ends at" in done.stderr
        times = [request.at for request in server.asked("batch_trade")]
        pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
        assert min(pauses) < 0.5  # a second by Free's
        again = run_pyz("--once", "--codes", "AAPL.US", env=env)
        assert again.returncode == 0 and "its plan ends at" not in again.stderr
        assert [request.resource for request in server.requests].count("package/info") == 1
        assert server.over_limit == 0
        shown = run_pyz("--status", env=env).stdout
        (told,) = json.loads(run_pyz("--status", "--json", env=env).stdout)["keys"]
    assert "plan Premium" in shown and "its plan ends at" in shown
    assert (told["plan"], told["ends"]) == ("Premium", stockrt.iso_after(plan.expires // 1, 0))
    assert told["used_today"] + told["left_today"] == 864_000
    check_clean(done.stdout, done.stderr, shown)


@pytest.mark.parametrize("answer", [REFUSALS["ret_514"], Answer.json({"ret": 500, "msg": "No permission"})])
def test_check_of_a_good_key_whose_plan_lacks_stocks(
    run_pyz: RunPyz, infoway: InfowayServer, answer: Answer
) -> None:
    infoway.script = lambda _: answer
    done = run_pyz("--check", env=api_env(infoway))
    good, text = check_lines(done)[next(n for n in check_lines(done) if n.startswith("API key"))]
    assert (done.returncode, good) == (0, True), done.stdout
    assert infoway.url in text and "not for stocks" in text
    check_clean(done.stdout, done.stderr)


WAITS_AT_AN_IMPORT = """
import sys, threading

class Waits:
    def find_spec(self, name, *_):
        if name == {name!r}:
            open({reached!r}, "w").close()
            threading.Event().wait()

sys.meta_path.insert(0, Waits())
"""


@pytest.mark.parametrize(
    ("program", "stage"),
    [(program, stage) for program in ("built", "script") for stage in ("importing", "checking")]
    + [("built", "unpacking")],
)
def test_ctrl_c_before_anything_is_done_ends_quietly(
    pyz: Path, clean_env: dict[str, str], tmp_path: Path, program: str, stage: str
) -> None:
    reached = tmp_path / "reached"
    place = tmp_path / "first"
    place.mkdir()
    name = {"unpacking": "shutil", "importing": "argparse", "checking": "sqlite3"}[stage]
    (place / "sitecustomize.py").write_text(WAITS_AT_AN_IMPORT.format(name=name, reached=str(reached)))
    environment = clean_env | {"PYTHONPATH": str(place)}
    if stage == "unpacking":
        environment["SHIV_ROOT"] = str(tmp_path / "empty")
    command = [sys.executable, str(pyz if program == "built" else stockrt.__file__), "--check"]
    with subprocess.Popen(
        command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        there = until(reached.exists, PATIENCE)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert there
    assert process.returncode == 130, errors
    assert errors == b"" and b"Traceback" not in output
