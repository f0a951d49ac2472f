"""`--export`: everything that is stored, as a file that is whole or not there, or as a stream."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from conftest import RunPyz, controlled
from kit.daemons import PATIENCE
from kit.mongo import MongoServer
from kit.trades import CREATED, settings_of

from stockrt import (
    MARKETS,
    Bar,
    Close,
    MongoStore,
    SqliteStore,
    Trade,
    bar_close,
    open_store_file,
    session_of,
    to_document,
)

TEN = int(datetime(2026, 8, 14, 2, 0, tzinfo=UTC).timestamp()) * 1000  # ten o'clock in Shanghai
HOUR = 3_600_000
MAOTAI, TENCENT = "600519.SH", "00700.HK"
TRADES = [
    Trade(code, TEN + hour * HOUR, f"{40 + hour}.50", "1200", "14.4", hour % 3)
    for code in (TENCENT, MAOTAI)
    for hour in (-30, 0, 1, 20)
]


@pytest.fixture(params=["sqlite", "mongodb"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """A store with trades and closes, as settings."""
    environ = {"STATE_DIRECTORY": str(tmp_path / "state")}
    session = session_of(MARKETS["SH"], TEN)
    bar = Bar(MAOTAI, TEN // 1000, "9", "11.75", "8", "10.5", "1000", "2000")
    provisional = Close(to_document(TRADES[1], CREATED), "2026-08-14", provisional=True)
    with open_store_file(tmp_path / "state") as file:
        store: SqliteStore | MongoStore = SqliteStore(file)
        if request.param == "mongodb":
            uri, name = request.getfixturevalue("mongo_db")
            environ |= {"MONGODB_HOST": uri, "MONGODB_DB_NAME": name}
            store = MongoStore(settings_of(environ))
        store.write([to_document(trade, CREATED) for trade in reversed(TRADES)])
        store.write_closes([bar_close(bar, session), provisional])
        if isinstance(store, MongoStore):
            store.close()
    return environ


def table(text: str) -> list[dict[str, str]]:
    """Return what a CSV reader makes of a text without being told anything."""
    return list(csv.DictReader(io.StringIO(text)))


def test_everything_is_exported_in_order_as_csv_and_as_json(
    run_pyz: RunPyz, place: dict[str, str], tmp_path: Path
) -> None:
    done = run_pyz("--export", "all.csv", env=place)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.strip() == "8 trades written to all.csv"
    rows = table((tmp_path / "all.csv").read_text(encoding="utf-8"))
    assert [Trade(r["s"], int(r["t"]), r["p"], r["v"], r["vw"], int(r["td"])) for r in rows] == TRADES
    assert {row["create_time"] for row in rows} == {"2026-08-15T01:02:03.456Z"}
    chinese = run_pyz("--export", "zh.csv", env=place | {"STOCKRT_LANG": "zh"})
    assert chinese.stderr.strip() == "已将 8 笔成交写入 zh.csv"
    assert (tmp_path / "zh.csv").read_bytes() == (tmp_path / "all.csv").read_bytes()
    assert run_pyz("--export", "all.jsonl", env=place).returncode == 0
    documents = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert [{name: str(value) for name, value in one.items()} for one in documents] == rows
    assert (documents[0]["t"], documents[0]["p"]) == (TEN - 30 * HOUR, "10.50")


@pytest.mark.parametrize(
    ("span", "hours"),
    [
        (("--from", "2026-08-14"), [0, 1, 20]),
        (("--to", "2026-08-14"), [-30, 0, 1, 20]),
        (("--from", "2026-08-14", "--to", "2026-08-14"), [0, 1, 20]),
        (("--from", "2026-08-14T10:00+08:00", "--to", "2026-08-14T03:00"), [0]),
        (("--to", "2026-08-13T23:59:59Z"), [-30]),
    ],
)
def test_a_part_is_what_its_dates_and_codes_say(
    run_pyz: RunPyz, place: dict[str, str], span: tuple[str, ...], hours: list[int]
) -> None:
    done = run_pyz("--export", "-", "--codes", "600519", *span, env=place)
    assert [(row["s"], int(row["t"])) for row in table(done.stdout)] == [
        (MAOTAI, TEN + h * HOUR) for h in hours
    ]
    assert done.returncode == 0


def test_a_code_of_which_there_is_nothing_is_said_and_the_others_are_written(
    run_pyz: RunPyz, place: dict[str, str]
) -> None:
    done = run_pyz("--export", "-", "--json", "--codes", "700.HK,AAPL.US", env=place)
    assert {json.loads(line)["s"] for line in done.stdout.splitlines()} == {TENCENT}
    assert "AAPL.US: nothing of it is stored" in done.stderr
    assert done.returncode == 1


def test_closes_are_exported_with_what_only_final_ones_have(run_pyz: RunPyz, place: dict[str, str]) -> None:
    done = run_pyz("--export", "-", "--closes", env=place)
    final, provisional = sorted(table(done.stdout), key=lambda row: row["stock_code"], reverse=True)
    assert (final["stock_code"], final["date"], final["close"], final["final"]) == (
        MAOTAI,
        "2026-08-14",
        "10.5",
        "True",
    )
    assert (final["open"], final["high"], final["low"], final["volume"]) == ("9", "11.75", "8", "1000")
    assert (provisional["stock_code"], provisional["final"], provisional["high"]) == (TENCENT, "False", "")
    later = run_pyz("--export", "-", "--closes", "--from", "2026-08-15", env=place)
    assert table(later.stdout) == []
    assert later.stdout.startswith("stock_code,date,close,final,")


def test_a_file_that_exists_is_replaced_and_one_that_fails_stays(
    run_pyz: RunPyz, place: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    file = folder / "all.csv"
    file.write_text("old")
    bad = run_pyz("--export", file, env=place | {"MONGODB_HOST": "mongodb://127.0.0.1:1/?timeoutMS=300"})
    assert bad.returncode == 1
    assert "MongoDB at mongodb://127.0.0.1:1" in bad.stderr
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("all.csv", "old")]
    typo = run_pyz("--export", file, "--codes", "AAPL.US,TYPO.US", env=place)
    assert (typo.returncode, file.read_text()) == (1, "old")
    assert f"nothing written to {file}: AAPL.US: nothing of it is stored; TYPO.US: " in typo.stderr
    assert run_pyz("--export", file, env=place).returncode == 0
    assert len(table(file.read_text())) == len(TRADES)
    assert [path.name for path in folder.iterdir()] == ["all.csv"]


def test_ctrl_c_leaves_nothing(
    mongo_server: MongoServer, mongo_db: tuple[str, str], pyz: Path, clean_env: dict[str, str], tmp_path: Path
) -> None:
    uri, name = mongo_db
    environ = clean_env | {"MONGODB_HOST": uri, "MONGODB_DB_NAME": name}
    command = [sys.executable, str(pyz), "--export", "all.csv"]
    folder = tmp_path / "out"
    folder.mkdir()
    with (
        controlled(mongo_server).failing("find", block_ms=30_000, app_name="stockrt"),
        subprocess.Popen(command, env=environ, cwd=folder, stderr=subprocess.PIPE, text=True) as export,
    ):
        deadline = time.monotonic() + PATIENCE
        while not list(folder.iterdir()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        export.send_signal(signal.SIGINT)
        _, words = export.communicate(timeout=PATIENCE)
    assert (export.returncode, words) == (130, "interrupted: no file was written\n")
    assert list(folder.iterdir()) == []


def test_a_reader_that_goes_away_ends_it_quietly(
    pyz: Path, clean_env: dict[str, str], tmp_path: Path
) -> None:
    with open_store_file(tmp_path / "state") as file:
        trades = [Trade(MAOTAI, TEN + n, "10", "1", "1", 1) for n in range(3_000)]  # more than a pipe holds
        SqliteStore(file).write([to_document(trade, CREATED) for trade in trades])
    read, write = os.pipe()
    with subprocess.Popen(
        [sys.executable, str(pyz), "--export", "-"], env=clean_env, stdout=write, stderr=subprocess.PIPE
    ) as export:
        os.close(write)
        assert os.read(read, 10) == b"_id,s,t,p,"
        os.close(read)
        _, words = export.communicate(timeout=PATIENCE)
    assert words == b""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--export", "all.xlsx"), "expected a name that ends with .csv or .jsonl, or -"),
        (
            ("--export", "a.csv", "--from", "yesterday"),
            "--from yesterday: expected a date such as 2026-08-14",
        ),
        (("--export", "a.csv", "--to", "2026-02-30"), "--to 2026-02-30: expected a date"),
        (
            ("--export", "a.csv", "--from", "2026-08-14", "--to", "2026-08-13"),
            "--to 2026-08-13 is not later than --from 2026-08-14",
        ),
        (("--export", "a.csv", "--json"), "--json goes with"),
        (("--once", "--codes", "A.US", "--closes"), "--closes goes with --export"),
        (("--status", "--from", "2026-08-14"), "--from goes with --export"),
    ],
)
def test_what_cannot_be_meant_is_said(run_pyz: RunPyz, arguments: tuple[str, ...], words: str) -> None:
    done = run_pyz(*arguments)
    assert (done.returncode, done.stdout) == (64, "")
    assert words in done.stderr


def test_a_folder_that_is_not_there_is_named(run_pyz: RunPyz, tmp_path: Path) -> None:
    done = run_pyz("--export", "nowhere/all.csv")
    assert done.returncode == 1
    assert "there is no directory nowhere; see --export" in done.stderr


def test_where_nothing_is_stored_there_is_a_head_and_nothing_is_left_behind(
    run_pyz: RunPyz, tmp_path: Path
) -> None:
    done = run_pyz("--export", "-")
    assert (done.returncode, done.stdout) == (0, "_id,s,t,p,v,vw,td,stock_code,create_time\n")
    assert done.stderr.strip() == "0 trades written to standard output"
    assert not (tmp_path / "state").exists()
