"""Closes that become final: by the daemon itself, by --once, and by --backfill for the past."""

from __future__ import annotations

import contextlib
import json
import signal
import sqlite3
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from conftest import RunPyz
from kit.daemons import HASH, PATIENCE, ProcessDaemon, environment, until
from kit.infoway_server import PLANS, InfowayServer, make_bar
from kit.platform_server import PlatformServer
from kit.shims import WallClock

import stockrt

NEW_YORK = "America/New_York"
THU = "2026-11-19"


def at(moment: str) -> float:
    """Return epoch seconds of a time in New York."""
    return datetime.fromisoformat(moment).replace(tzinfo=ZoneInfo(NEW_YORK)).timestamp()


@pytest.fixture
def market(wall_clock: WallClock) -> Iterator[InfowayServer]:
    """An API on the same clock as the program, just before New York closes."""
    set_clock(wall_clock, f"{THU} 15:59:55")
    with InfowayServer(clock=wall_clock.now, epoch_ms=round(at(f"{THU} 15:59:50") * 1000)) as server:
        yield server


def set_clock(wall_clock: WallClock, moment: str) -> None:
    """Set the program's clock; it goes on from there."""
    wall_clock.step(round(at(moment) - time.time()))


def closes_in(state: Path) -> dict[str, dict[str, Any]]:
    """Return the table `close` by `_id`; nothing where there is none yet."""
    with (
        contextlib.suppress(sqlite3.OperationalError),
        contextlib.closing(sqlite3.connect(f"file:{state / stockrt.SQLITE_NAME}?mode=ro", uri=True)) as db,
    ):
        db.row_factory = sqlite3.Row
        return {row["_id"]: dict(row) for row in db.execute("SELECT * FROM close")}
    return {}


def is_final(state: Path, code: str) -> bool:
    """Whether the Thursday's close of a code is its bar's."""
    return bool(closes_in(state).get(f"{code}|{THU}", {}).get("close") == make_bar(code, THU)["c"])


@pytest.mark.parametrize("restarted", [False, True])
def test_the_daemon_makes_closes_final_without_a_further_execute(
    clean_env: dict[str, str], tmp_path: Path, market: InfowayServer, wall_clock: WallClock, restarted: bool
) -> None:
    """When the time has come, and after a restart if it came meanwhile."""
    state = tmp_path / "state"
    stockrt.write_hash(state, HASH)
    with PlatformServer(ping_every=0, zombies=False) as platform:
        platform.know(HASH)
        more = environment(platform.port, market.url, state, **wall_clock.environment)
        set_clock(wall_clock, f"{THU} 15:59:55" if restarted else f"{THU} 16:29:55")
        with ProcessDaemon(clean_env, more) as daemon:
            assert platform.wait_for(lambda s: s.connected, PATIENCE)
            name = platform.execute(["TSLA.US", "AAPL.US"])
            assert platform.wait_for(lambda s: s.results_for(name), PATIENCE), daemon.log
            if restarted:
                daemon.kill()
                assert market.asked("batch_kline") == []
                set_clock(wall_clock, f"{THU} 18:00")
                daemon.start()
            assert until(lambda: is_final(state, "TSLA.US") and is_final(state, "AAPL.US")), daemon.log
            assert "Traceback" not in daemon.log
    assert [one.path for one in market.asked("batch_kline")] == ["/stock/batch_kline/8/2/AAPL.US,TSLA.US"]


def test_a_daemon_that_collects_makes_closes_final_meanwhile(
    clean_env: dict[str, str], tmp_path: Path, market: InfowayServer, wall_clock: WallClock
) -> None:
    """It looks every minute, and when its settings are read anew."""
    state = tmp_path / "state"
    set_clock(wall_clock, f"{THU} 16:29:55")
    collect = {"COLLECT_EVERY": "1", "COLLECT_CODES": "TSLA.US", "SERVER_IP": "", "SERVER_PORT": ""}
    settings = environment(1, market.url, state, **wall_clock.environment) | collect
    with ProcessDaemon(clean_env, settings) as daemon:
        assert until(lambda: closes_in(state)), daemon.log
        assert not is_final(state, "TSLA.US")
        set_clock(wall_clock, f"{THU} 16:30:05")
        daemon.signal(signal.SIGHUP)
        assert until(lambda: is_final(state, "TSLA.US")), daemon.log
        assert "Traceback" not in daemon.log


def once_env(market: InfowayServer, wall_clock: WallClock) -> dict[str, str]:
    """Return the settings of a run on the market's clock."""
    return {
        "INFOWAY_API_BASE_URL": market.url, "INFOWAY_API_KEY": "test-key", "INFOWAY_PLAN": "0",
        **wall_clock.environment,
    }  # fmt: skip


def test_once_makes_final_what_is_over_when_it_runs(
    run_pyz: RunPyz, tmp_path: Path, market: InfowayServer, wall_clock: WallClock
) -> None:
    env = once_env(market, wall_clock)
    for moment, requests in (
        (f"{THU} 15:59:55", 0),
        (f"{THU} 16:10", 0),
        (f"{THU} 17:00", 1),
        (f"{THU} 18:00", 1),
    ):
        set_clock(wall_clock, moment)
        done = run_pyz("--once", "--codes", "TSLA.US", env=env)
        assert done.returncode == 0, done.stderr
        assert len(market.asked("batch_kline")) == requests
    assert is_final(tmp_path / "state", "TSLA.US")


def test_backfill_prints_a_row_for_each_code(
    run_pyz: RunPyz, tmp_path: Path, market: InfowayServer, wall_clock: WallClock
) -> None:
    """From, to, added, there before; what has no bars fails by name. From a file, too, and again for nothing."""
    env = once_env(market, wall_clock)
    set_clock(wall_clock, f"{THU} 17:00")
    (tmp_path / "codes.txt").write_text("TSLA.US 700.HK\n# nothing\n600519\n")
    done = run_pyz("--backfill", "5", "--codes-file", "codes.txt", env=env)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert sorted(rows) == [
        [code, "2026-11-13", THU, "5", "added,", "0", "there", "before"]
        for code in ("00700.HK", "600519.SH", "TSLA.US")
    ]
    assert "3 codes, 0 failed, 15 closes added" in done.stderr
    done = run_pyz("--backfill", "5", "--codes", "TSLA.US,600519", "USDCNY", env=env)
    assert done.returncode == 0 and "USDCNY" in done.stdout and "no documented boundary" in done.stdout
    assert "3 codes, 0 failed, 0 closes added" in done.stderr
    assert "0 added, 5 there before" in done.stdout
    assert len(market.asked("batch_kline")) == 3
    assert len(closes_in(tmp_path / "state")) == 15


def test_backfill_pads_a_name_by_columns(
    run_pyz: RunPyz, market: InfowayServer, wall_clock: WallClock
) -> None:
    done = run_pyz("--backfill", "5", "--codes", "无此名称", "USDCNY", env=once_env(market, wall_clock))
    rows = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert rows.keys() == {"无此名称", "USDCNY"}
    for code, line in lines.items():
        assert stockrt.columns_of(line.removesuffix(rows[code])) == 14, line


def test_backfill_without_codes_takes_those_that_are_stored(
    run_pyz: RunPyz, tmp_path: Path, market: InfowayServer, wall_clock: WallClock
) -> None:
    env = once_env(market, wall_clock)
    assert run_pyz("--once", "--codes", "TSLA.US", "USDCNY", env=env).returncode == 0
    done = run_pyz("--backfill", "3", env=env)
    assert (done.returncode, done.stdout.split()[0]) == (0, "TSLA.US"), done.stderr
    assert len(closes_in(tmp_path / "state")) == 3


def test_backfill_goes_by_the_plan_of_the_key(
    run_pyz: RunPyz, market: InfowayServer, wall_clock: WallClock
) -> None:
    """Which is asked for before anything else, once a day."""
    market.plans["test-key"] = PLANS["premium"]
    env = once_env(market, wall_clock) | {"INFOWAY_PLAN": ""}
    for _ in range(2):
        done = run_pyz("--backfill", "5", "--codes", "TSLA.US", env=env)
        assert done.returncode == 0, done.stderr
    resources = [request.resource for request in market.requests]
    assert resources.index("package/info") == 0 and resources.count("package/info") == 1
    assert "Premium" in run_pyz("--status", env=env).stdout


@pytest.mark.parametrize("days", ["0", "501", "-3", "many"])
def test_backfill_names_what_it_expects(run_pyz: RunPyz, days: str) -> None:
    done = run_pyz(f"--backfill={days}", "--codes", "TSLA.US")
    assert done.returncode == 64 and "--backfill" in done.stderr and "Traceback" not in done.stderr


def test_backfill_needs_a_key(run_pyz: RunPyz) -> None:
    done = run_pyz("--backfill", "3", "--codes", "TSLA.US")
    assert done.returncode == 78 and "INFOWAY_API_KEY" in done.stderr


@pytest.mark.parametrize("offset", [0, 50, 300, -300])
def test_check_says_a_clock_that_is_off(run_pyz: RunPyz, infoway: InfowayServer, offset: int) -> None:
    """And a run says it once, and stores all the same."""
    infoway.date_offset_s = offset
    env = {"INFOWAY_API_BASE_URL": infoway.url, "INFOWAY_API_KEY": "test-key", "INFOWAY_PLAN": "0"}
    done = run_pyz("--check", env=env)
    assert ("FAIL  clock" in done.stdout) is (abs(offset) > 60) is (done.returncode == 1)
    done = run_pyz("--once", "--json", "--codes", *(f"A{number}.US" for number in range(300)), env=env)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 300
    assert done.stderr.count("mend its clock") == (abs(offset) > 60)
    assert all(json.loads(line)["p"] for line in done.stdout.splitlines())


def test_a_trade_is_judged_by_the_apis_clock_where_this_machines_is_behind(
    run_pyz: RunPyz, market: InfowayServer, wall_clock: WallClock
) -> None:
    """By two days: no trade is refused for it."""
    env = once_env(market, wall_clock)
    market.date_offset_s = 2 * 86_400.0
    market.trades["TSLA.US"] = {"t": round(at("2026-11-21 15:00") * 1000)}
    done = run_pyz("--once", "--codes", "TSLA.US", env=env)
    assert done.returncode == 0, done.stderr
    market.date_offset_s = 0.0
    done = run_pyz("--once", "--codes", "TSLA.US", env=env)
    assert done.returncode == 1 and "more than a day ahead" in done.stderr
