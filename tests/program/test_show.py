"""`--show`: what is stored, from the store alone; each lack is a sentence, and looking leaves nothing behind."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import RunPyz
from kit.daemons import PATIENCE

from stockrt import SqliteStore, Trade, open_store_file, to_document, utc_now


@pytest.fixture
def put(tmp_path: Path) -> Callable[..., None]:
    """Store trades of these codes, some seconds old, in the state directory that `run_pyz` gives the program."""

    def store(*codes: str, demo: bool = False) -> None:
        with open_store_file(tmp_path / "state") as file:
            t = int(time.time() * 1000) - 5000
            trades = [Trade(code, t - n, "12.50", "100", "1250", 1) for n, code in enumerate(codes)]
            SqliteStore(file).write([to_document(trade, utc_now(), demo) for trade in trades])

    return store


def test_it_shows_the_codes_that_are_asked_for_and_says_what_it_lacks(
    run_pyz: RunPyz, put: Callable[..., None]
) -> None:
    put("600519.SH", "00700.HK", "AAPL.US")
    done = run_pyz("--show", "aapl.us,700.HK", "600036", "--sort", "asked")
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["CODE", "AAPL.US", "00700.HK"]
    assert "600036: nothing of it is stored" in done.stderr
    assert "no final close is stored" in done.stderr
    assert done.returncode == 1


def test_a_secret_is_masked_in_the_texts_of_json_and_nowhere_else(
    run_pyz: RunPyz, put: Callable[..., None]
) -> None:
    """A password may be a word of JSON, or a number in it."""
    put("600519.SH")
    (plain,) = map(json.loads, run_pyz("--show", "--json").stdout.splitlines())
    env = {"INFOWAY_API_KEY": f"price,0519,null,{plain['t']}"}
    (masked,) = map(json.loads, run_pyz("--show", "--json", env=env).stdout.splitlines())
    assert masked | {"age_s": 0} == plain | {"age_s": 0, "code": "60***.SH"}


def test_a_name_finds_what_is_stored(run_pyz: RunPyz, put: Callable[..., None], tmp_path: Path) -> None:
    put("600519.SH", "00700.HK")
    with open_store_file(tmp_path / "state") as file, file.write() as db:
        db.execute("INSERT INTO symbols VALUES ('STOCK_CN', '600519.SH', '贵州茅台', '', 'Kweichow Moutai')")
    done = run_pyz("--show", "茅台", "五粮液", "--json", env={"LANG": "zh_CN.UTF-8"})
    assert [(one["code"], one["name"]) for one in map(json.loads, done.stdout.splitlines())] == [
        ("600519.SH", "贵州茅台")
    ]
    assert done.stderr.splitlines() == [
        "五粮液：库中没有它的数据；如果这是名称，可用 --symbols 五粮液 查代码",
        "库中没有可用来计算涨跌幅的最终收盘价：可用 --backfill 5 补齐",
    ]
    done = run_pyz("--show", "茅台", "五粮液", "--json")
    assert json.loads(done.stdout)["name"] == "Kweichow Moutai"
    assert "五粮液: nothing of it is stored; where that is a name, --symbols 五粮液 brings" in done.stderr


def test_stockrt_lang_and_the_settings_file_choose_the_language(
    run_pyz: RunPyz, put: Callable[..., None], tmp_path: Path
) -> None:
    put("600519.SH")
    (tmp_path / "chinese.env").write_text("STOCKRT_LANG=zh\n")
    by_locale = run_pyz("--show", env={"LANG": "zh_CN.UTF-8"})
    for done in (
        by_locale,
        run_pyz("--show", env={"STOCKRT_LANG": "zh"}),
        run_pyz("--show", "--env-file", tmp_path / "chinese.env"),
    ):
        assert done.stdout.split()[:2] == ["代码", "最新价"], done.stderr
    english = run_pyz("--show", env={"STOCKRT_LANG": "en", "LANG": "zh_CN.UTF-8"})
    assert english.stdout.split()[:2] == ["CODE", "LAST"]


def test_what_is_not_there_is_said_in_chinese(run_pyz: RunPyz, tmp_path: Path) -> None:
    """Wholly: no word of English beside names, flags and codes."""
    env = {"STOCKRT_LANG": "zh"}
    for args, status, words in (
        (("--show",), 1, "库中还没有成交：可用 --once 存入；--once --demo 的模拟成交用 --show --demo 查看"),
        (("--show", "--demo"), 1, "库中还没有模拟成交：可用 --once --demo 存入"),
        (("--show", "600036"), 1, "600036：库中没有它的数据"),
        (("--html", "one.svg"), 1, "stockrt：--html one.svg：没有可画的 K 线；库中有哪些数据请看 --show"),
        (("--export", "-"), 0, "已将 0 笔成交写到标准输出"),
        (("--export", "all.csv"), 0, "已将 0 笔成交写入 all.csv"),
        (("--export", "all.csv", "--closes"), 0, "已将 0 个收盘价写入 all.csv"),
    ):
        done = run_pyz(*args, env=env)
        assert (done.returncode, done.stderr.splitlines()[0]) == (status, words)


def test_without_codes_those_of_the_watch_list_else_the_latest(
    run_pyz: RunPyz, put: Callable[..., None]
) -> None:
    put("600519.SH", "00700.HK")
    all_of_them = run_pyz("--show", "--json")
    listed = run_pyz("--show", "--json", env={"COLLECT_CODES": "700.HK"})
    assert [json.loads(line)["code"] for line in all_of_them.stdout.splitlines()] == ["00700.HK", "600519.SH"]
    assert [json.loads(line)["code"] for line in listed.stdout.splitlines()] == ["00700.HK"]
    one = json.loads(listed.stdout)
    assert (one["price"], one["change_percent"], listed.returncode) == ("12.50", None, 0)
    assert 0 < one["age_s"] < 600


def test_a_watch_list_without_mongodb_is_said_once(run_pyz: RunPyz) -> None:
    done = run_pyz("--show", env={"COLLECT_CODES": "watch"})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("stockrt: COLLECT_CODES: watch without MONGODB_HOST: the watch list is")


def test_synthetic_trades_are_shown_apart(run_pyz: RunPyz, put: Callable[..., None]) -> None:
    put("600519.SH", demo=True)
    real, synthetic = run_pyz("--show"), run_pyz("--show", "--demo")
    assert (real.returncode, real.stdout) == (1, "")
    assert "no trade is stored yet" in real.stderr
    assert "--show --demo" in real.stderr
    assert synthetic.stdout.splitlines()[1].startswith("600519.SH")


def test_an_empty_store_says_so_and_looking_leaves_nothing_behind(run_pyz: RunPyz, tmp_path: Path) -> None:
    done = run_pyz("--show")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no trade is stored yet" in done.stderr
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_store_with_trades_of_other_codes_is_not_called_empty(
    run_pyz: RunPyz, put: Callable[..., None], tmp_path: Path, language: str
) -> None:
    put("600519.SH")
    lack, unwritten = "NOPE.US: nothing of it is stored", "stockrt: nothing written to page.html: "
    if language == "zh":
        lack, unwritten = "NOPE.US：库中没有它的数据", "stockrt：未写入 page.html："
    env = {"STOCKRT_LANG": language}
    for args in (("--show", "NOPE.US"), ("--show", "--chart", "5m", "--codes", "NOPE.US")):
        done = run_pyz(*args, env=env)
        assert (done.returncode, done.stdout, done.stderr) == (1, "", f"{lack}\n")
    done = run_pyz("--html", "page.html", "--codes", "NOPE.US", env=env)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"{unwritten}{lack}\n")
    assert not (tmp_path / "page.html").exists()


def test_a_chart_of_an_empty_store_says_so(run_pyz: RunPyz) -> None:
    done = run_pyz("--show", "--chart", "5m")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no trade is stored yet" in done.stderr


def test_a_mongodb_that_is_away_is_a_sentence(run_pyz: RunPyz) -> None:
    done = run_pyz("--show", env={"MONGODB_HOST": "mongodb://127.0.0.1:1/?timeoutMS=300"})
    assert done.returncode == 1
    assert "stockrt: MongoDB at mongodb://127.0.0.1:1" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("flags", [("--sort", "code"), ("--up", "red")])
def test_what_belongs_to_it_goes_with_nothing_else(run_pyz: RunPyz, flags: tuple[str, str]) -> None:
    done = run_pyz("--status", *flags)
    assert (done.returncode, done.stdout) == (64, "")
    assert f"{flags[0]} goes with --show, --html or --collect" in done.stderr


class Pane:
    """What a terminal shows of what a program writes, as far as lines are drawn anew in their place."""

    def __init__(self) -> None:
        self.lines = [""]
        self.draws = 0
        self.row = 0

    def take(self, text: str) -> None:
        """Take what was written."""
        for part in re.findall(r"\033\[[\d;]*[A-Za-z]|\n|[^\033\r\n]+", text):
            if part == "\n":
                self.row += 1
                self.lines += [""] * (self.row + 1 - len(self.lines))
                self.lines[self.row] = ""  # each line is written anew, or below all others
            elif re.fullmatch(r"\033\[\d+F", part):
                self.row -= int(part[2:-1])
                self.lines[self.row] = ""
                self.draws += 1
            elif part == "\033[J":
                del self.lines[self.row + 1 :]
            elif not part.startswith("\033"):
                self.lines[self.row] += part


@pytest.mark.parametrize(
    ("locale", "title", "status", "rate"),
    [("ja_JP.UTF-8", "CODE", "3", "trades/s"), ("zh_CN.UTF-8", "代码", "轮询", "笔成交")],
)
def test_on_a_terminal_collect_draws_the_table_in_its_place(
    pyz: Path,
    clean_env: dict[str, str],
    put: Callable[..., None],
    locale: str,
    title: str,
    status: str,
    rate: str,
) -> None:
    put("600519.SH", demo=True)  # a code that nothing is collected of now, and that is not asked for
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 90, 0, 0))
    command = ["--collect", "--demo", "--codes", "BTCUSDT", "ETHUSDT", "XXXX.US"]
    began = time.monotonic()
    pane = Pane()
    with subprocess.Popen(
        [sys.executable, str(pyz), *command],
        env=clean_env | {"TERM": "xterm", "LANG": locale},
        stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, start_new_session=True,
    ) as collect:  # fmt: skip
        os.close(theirs)
        text = b""
        stopped = False
        while True:
            if time.monotonic() - began > PATIENCE:
                collect.kill()
            try:
                chunk = os.read(ours, 65536)
            except OSError:  # its other end is closed
                break
            text += chunk
            if not stopped and text.count(f"F\033[1m{title}".encode()) > 4 and rate.encode() in text:
                collect.send_signal(signal.SIGINT)
                stopped = True
        took = time.monotonic() - began
    os.close(ours)
    pane.take(text.decode())
    assert collect.returncode == 130
    shown = [line.split()[0] for line in pane.lines if line]
    start = shown.index(title)
    assert shown[start : start + 5] == [title, "BTCUSDT", "ETHUSDT", "XXXX.US", status]
    assert shown.count(title) == 1
    assert pane.lines[-2].startswith(("trades ", "成交 "))
    assert 4 < pane.draws <= took * 5 + 2
