"""--html: the page as its readers see it, in a real browser, made by the program from a fixed store."""

from __future__ import annotations

import json
import os
import re
import stat
import threading
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import RunPyz, unavailable
from kit.browser import Browser, NoBrowser
from kit.clock import FakeClock
from kit.trades import CREATED

import stockrt
from stockrt import (
    Bar,
    Batch,
    DemoApi,
    SqliteStore,
    Trade,
    bar_close,
    open_store_file,
    session_on,
    to_document,
)

PICTURE = Path(__file__).with_name("demo.svg")
README = PICTURE.parents[2] / "README.md"


def last_friday() -> date:
    """Return the last Friday of a November or a February that is over: it is winter in New York, and no year ago."""
    today = datetime.now(UTC).date()
    ends = (date(today.year - 1, 11, 30), date(today.year, 2, 28), date(today.year, 11, 30))
    fridays = [day - timedelta((day.weekday() - 4) % 7) for day in ends]
    return max(day for day in fridays if day < today)


def opening(day: date) -> int:
    """Return half past nine in New York."""
    return int(datetime(day.year, day.month, day.day, 14, 30, tzinfo=UTC).timestamp()) * 1000


DAY = last_friday()
OPEN = opening(DAY)
RESTS_SINCE, FUTURE = DAY - timedelta(400), DAY + timedelta(400)
CLOSES = f"{DAY - timedelta(59)} – {DAY - timedelta(1)}"
MINUTE = 60_000
AAPL, MAOTAI, TENCENT, BITCOIN = "AAPL.US", "600519.SH", "00700.HK", "BTCUSDT"
EVIL = "<script>alert(1)</script> & \"Co\" 'Ltd'"


def fill(state: Path) -> None:
    """Put into an embedded store: a session with a gap, closes, names, a share that rests, one with one trade."""
    trades = [
        Trade(AAPL, OPEN + n * MINUTE, f"{270 + n % 7}.{n % 10}", "100", "1", 1)
        for n in range(300)
        if not 100 <= n < 110
    ]
    trades += [Trade(MAOTAI, opening(RESTS_SINCE), "1450.00", "100", "1", 1)]
    trades += [
        Trade(TENCENT, OPEN - 6 * 3_600_000 + n * MINUTE, f"{620 - n}", "100", "1", 1) for n in range(60)
    ]
    trades += [Trade(BITCOIN, opening(FUTURE), "95000.5", "0.0001", "1", 1)]  # of the future
    with open_store_file(state) as file:
        store = SqliteStore(file)
        assert not store.write([to_document(one, CREATED) for one in trades]).refused
        for days in range(1, 60):
            for code, price in ((AAPL, 200 + days), (TENCENT, 660 - days)):
                session = session_on(stockrt.market_of(code), DAY - timedelta(days))  # type: ignore[arg-type]
                if session.close != stockrt.NEVER:
                    p = f"{price}.5"
                    bar = Bar(code, session.close, p, p, p, p, "1000", "1")
                    store.write_closes([bar_close(bar, session)])
        with file.write() as db:
            names = [("STOCK_US", AAPL, "苹果", "", EVIL), ("STOCK_HK", TENCENT, "腾讯控股", "", "Tencent")]
            db.executemany("INSERT INTO symbols VALUES (?, ?, ?, ?, ?)", names)
            db.execute(
                'INSERT INTO stream_gaps (_id, instance, product, codes, "from", "to", why, create_time) '
                "VALUES ('1', '', 'stock', ?, ?, ?, 'connection <lost>', '')",
                (json.dumps([AAPL]), OPEN + 100 * MINUTE, OPEN + 110 * MINUTE),
            )


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state directory with that store."""
    fill(tmp_path / "state")
    return tmp_path / "state"


def rows_of(browser: Browser) -> list[str]:
    """Return the codes of the overview in their order on the page."""
    found = browser.tell("[...document.querySelectorAll('tbody tr')].map((row) => row.cells[0].innerText)")
    return [str(code) for code in found]


def color_of(browser: Browser, selector: str) -> str:
    """Return the colour in which an element is shown."""
    return str(browser.tell(f"getComputedStyle(document.querySelector({json.dumps(selector)})).color"))


RED, GREEN, LIGHT_RED = "rgb(200, 16, 46)", "rgb(10, 125, 60)", "rgb(255, 107, 107)"
CHANGE = "th:nth-child(4)"


def test_the_page_as_its_readers_see_it(run_pyz: RunPyz, state: Path, tmp_path: Path) -> None:
    """In English and Chinese, light, dark, on a phone and on paper; sorted by mouse and keys; nothing complains."""
    page = tmp_path / "page.html"
    done = run_pyz("--html", page)
    assert done.returncode == 0, done.stderr
    try:
        browser = Browser(tmp_path)
    except NoBrowser as error:
        unavailable(str(error))
    with browser:
        browser.open(page.as_uri())
        assert browser.tell("document.documentElement.lang") == "en"
        assert rows_of(browser) == [TENCENT, MAOTAI, AAPL, BITCOIN]
        assert browser.tell("document.querySelector('tbody tr:nth-child(3) .name').innerText") == " ".join(
            EVIL.split()
        )
        assert browser.tell("document.body.innerText").count("缺口") == 0
        assert "connection <lost>" in browser.tell("document.body.innerText")
        assert color_of(browser, "td.up") == GREEN
        browser.picture(tmp_path / "light.png")
        # what has no change stands last, whichever way
        browser.click(f"{CHANGE} button")
        assert browser.tell(f"document.querySelector('{CHANGE}').getAttribute('aria-sort')") == "ascending"
        assert rows_of(browser)[:2] == [TENCENT, AAPL]
        browser.press("Enter", 13)
        assert browser.tell(f"document.querySelector('{CHANGE}').getAttribute('aria-sort')") == "descending"
        assert rows_of(browser)[:2] == [AAPL, TENCENT]
        assert {*rows_of(browser)[2:]} == {MAOTAI, BITCOIN}
        browser.click("th:first-child button")
        assert rows_of(browser) == sorted([TENCENT, MAOTAI, AAPL, BITCOIN])
        assert browser.tell("document.querySelectorAll('[aria-sort=none]').length") == 8
        # a phone in the dark, in Chinese
        browser.open(page.as_uri(), language="zh-CN", width=390, dark=True)
        assert browser.tell("document.documentElement.lang") == "zh"
        assert browser.tell("document.querySelector('tbody tr .name').innerText") == "腾讯控股"
        assert "最新价" in browser.tell("document.querySelector('thead').innerText")
        assert color_of(browser, "td.up") == LIGHT_RED
        assert browser.tell("getComputedStyle(document.body).backgroundColor") == "rgb(18, 21, 26)"
        assert browser.tell("document.documentElement.scrollWidth") == 390
        browser.picture(tmp_path / "dark.png")
        browser.click("#language")
        assert browser.tell("document.documentElement.lang") == "en"
        browser.look(width=718, dark=True, media="print")  # A4
        assert browser.tell("document.querySelector('table').scrollWidth") <= 718
        assert browser.tell("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert browser.tell("document.querySelector('#language').offsetParent") is None
        browser.picture(tmp_path / "print.png")
        # Hong Kong reads Chinese, and green is up there
        browser.open(page.as_uri(), language="zh-HK")
        assert (browser.tell("document.documentElement.lang"), color_of(browser, "td.up")) == ("zh", GREEN)
        assert browser.complaints == []
        assert {*browser.asked} <= {page.as_uri(), "data:,"}
        # its policy lets nothing else run
        browser.tell(
            "{ const s = document.createElement('script'); s.text = 'window.ran = 1'; document.body.append(s); }"
        )
        assert browser.tell("window.ran") is None
        assert len(browser.complaints) == 1 and "Content Security Policy" in browser.complaints[0]


def test_every_picture_is_there_and_says_what_it_has(run_pyz: RunPyz, state: Path, tmp_path: Path) -> None:
    """Candles, gaps and closes of each code; of one without closes, of one trade, of the future what there is."""
    done = run_pyz("--html", "page.html", "--up", "red", env={"LANG": "zh_CN.UTF-8"})
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"page\.html：4 个代码，\d+ kB\n", done.stderr), done.stderr
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.startswith('<!doctype html>\n<html lang="zh" data-up="red" data-fixed>')
    sections = dict(re.findall(r'<section id="(.*?)">(.*?)</section>', text, re.DOTALL))
    assert set(sections) == {AAPL, MAOTAI, TENCENT, BITCOIN}
    assert all('<path class="' in section for section in sections.values())
    assert sections[AAPL].count('class="gap"') == 2  # steps of five minutes
    assert f"{DAY} 11:10:00 EST – {DAY} 11:20:00 EST (connection &lt;lost&gt;)" in sections[AAPL]
    assert sections[TENCENT].count('class="gap"') == 0
    for code, count in ((AAPL, 43), (TENCENT, 43), (MAOTAI, 0), (BITCOIN, 0)):
        assert (f"{count} final closes" in sections[code]) == bool(count)
        assert (f"{count} 个最终收盘价，最新 " in sections[code]) == bool(count)
        assert ("--backfill 60" in sections[code]) == (not count)
    for shown in (f"{RESTS_SINCE} 22:30:00 CST", f"{FUTURE} 14:30:00 UTC"):  # on each exchange's clock
        assert shown in text
    assert EVIL not in text and "<lost>" not in text
    assert not re.search(r"(?:src|href)=\"(?!#|data:,\")|url\(|@import|https?:", text)


def test_a_chinese_reader_is_told_in_chinese_why_there_is_a_gap(
    run_pyz: RunPyz, state: Path, tmp_path: Path
) -> None:
    reasons = {
        stockrt.STOPPED: "stockrt 已停止",
        stockrt.ENDED_WITHOUT_NOTICE: "stockrt 意外退出",
        stockrt.MOVED: "转移到另一个连接",
        stockrt.DEAF: "有成交，但没有推送",
    }
    with open_store_file(state) as file, file.write() as db:
        for number, reason in enumerate(reasons):
            db.execute(
                'INSERT INTO stream_gaps SELECT ?, instance, product, codes, "from", "to", ?, create_time, delivered '
                "FROM stream_gaps WHERE _id = '1'",
                (f"n{number}", reason),
            )
    assert run_pyz("--html", "page.html").returncode == 0
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    span = f"{DAY} 11:10:00 EST – {DAY} 11:20:00 EST"
    for english, chinese in reasons.items():
        assert f">gap: {span} ({english})<" in text and f">缺口：{span}（{chinese}）<" in text
    assert "5m candles and volume" in text and "5 分钟 K 线与成交量" in text
    volume = '<span class="en" lang="en">29000</span><span class="zh" lang="zh">2.90万</span>'
    assert f'<td class=more data-v="29000">{volume}</td>' in text


def test_a_timer_may_renew_it_under_a_web_server(run_pyz: RunPyz, state: Path, tmp_path: Path) -> None:
    """Whole or not at all, for everybody to read, whatever the umask; where it cannot be written the old one stays."""
    folder = tmp_path / "web"
    folder.mkdir(mode=0o755)
    page = folder / "page.html"
    page.write_text("old")
    before_it = os.umask(0o077)
    try:
        for _ in range(2):
            assert run_pyz("--html", page).returncode == 0
    finally:
        os.umask(before_it)
    assert stat.S_IMODE(page.stat().st_mode) == 0o644
    assert [one.name for one in folder.iterdir()] == ["page.html"]
    before = page.read_bytes()
    done = run_pyz("--html", page, env={"MONGODB_HOST": "mongodb://127.0.0.1:9/?timeoutMS=300"})
    assert done.returncode == 1 and "MONGODB_HOST" in done.stderr
    assert page.read_bytes() == before
    done = run_pyz("--html", tmp_path / "nowhere" / "page.html")
    assert done.returncode == 1
    assert re.fullmatch(r"stockrt: there is no directory .*/nowhere; see --html\n", done.stderr)


@pytest.mark.parametrize(("command", "name"), [("--html", "all.html"), ("--export", "all.csv")])
@pytest.mark.parametrize("kind", ["link", "pipe", "directory"])
def test_what_is_no_file_is_left_as_it_is(
    run_pyz: RunPyz, state: Path, tmp_path: Path, command: str, name: str, kind: str
) -> None:
    """A new file in the place of /dev/stdout or /dev/null would be one for the whole machine."""
    place, target = tmp_path / name, tmp_path / "target"
    target.write_text("old")
    if kind == "link":
        place.symlink_to(target)
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.mkdir()
    before = place.lstat()
    done = run_pyz(command, place)
    assert f"{place} cannot be written: it is a link, a directory, a pipe or a device" in done.stderr
    assert f"see {command}" in done.stderr
    assert (done.returncode, place.lstat().st_ino, target.read_text()) == (1, before.st_ino, "old")


@pytest.mark.parametrize("args", [("--html", "a.html"), ("--show", "600519", "--chart", "1h")])
def test_a_moment_beyond_the_last_year_is_no_traceback(
    run_pyz: RunPyz, state: Path, args: tuple[str, ...]
) -> None:
    done = run_pyz(*args, "--from", "9999-12-31T23:00")
    assert "Traceback" not in done.stderr


def test_an_empty_store_has_a_page_that_says_so(run_pyz: RunPyz, tmp_path: Path) -> None:
    done = run_pyz("--html", "page.html")
    assert done.returncode == 1
    assert "no trade is stored yet: --once stores some" in done.stderr
    assert "There is no trade in the store yet" in (tmp_path / "page.html").read_text(encoding="utf-8")
    picture = run_pyz("--html", "one.svg")
    assert (picture.returncode, picture.stderr) == (
        1,
        "stockrt: --html one.svg: there is no candle to draw; --show says what is stored\n",
    )
    assert not (tmp_path / "state").exists()


def test_a_picture_is_of_one_code(run_pyz: RunPyz, state: Path, tmp_path: Path) -> None:
    """An SVG that stands alone, for another page."""
    assert run_pyz("--html", "one.svg", "--codes", AAPL, "--chart", "1h", "--up", "red").returncode == 0
    root = ElementTree.fromstring((tmp_path / "one.svg").read_text(encoding="utf-8"))
    assert (root.tag, root.get("data-up")) == ("{http://www.w3.org/2000/svg}svg", "red")
    assert f"AAPL.US  1h  {DAY} 09:00:00 EST" in "".join(root.itertext())
    done = run_pyz("--html", "more.svg")
    assert done.returncode == 64 and "and here are candles of 4: name one with --codes" in done.stderr
    assert not (tmp_path / "more.svg").exists()


def test_the_readmes_picture_is_what_its_command_draws(run_pyz: RunPyz, tmp_path: Path) -> None:
    """Of a session of --demo, one trade a minute, as it is stored by running that long."""
    (tmp_path / "state").mkdir()
    trades: list[Trade] = []
    for minute in range(390):
        demo = DemoApi(FakeClock(opening(date(2026, 11, 27)) / 1000 + 60.0 * minute))
        for outcome in filter(None, demo.fetch([Batch("stock", "TSLA.US")], threading.Event())):
            trades += outcome.trades
    with open_store_file(tmp_path / "state") as file:
        SqliteStore(file).write([to_document(one, CREATED, demo=True) for one in trades])
    command = "./stockrt.pyz --html demo.svg --demo --codes TSLA.US"
    assert README.read_text("utf-8").count(f"{command}\n") == 2
    done = run_pyz(*command.split()[1:])
    assert done.returncode == 0, done.stderr
    drawn = (tmp_path / "demo.svg").read_text("utf-8")
    assert drawn == PICTURE.read_text("utf-8")


# ------------------------------------------------------------------------------------------------------
# Candles in a terminal
# ------------------------------------------------------------------------------------------------------


def test_candles_are_drawn_in_the_terminal(run_pyz: RunPyz, state: Path) -> None:
    done = run_pyz("--show", AAPL, TENCENT, "--chart", "5m")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert f"AAPL.US  {EVIL}  5m  {DAY} 09:30:00 EST – {DAY} 14:25:00 EST" in lines
    assert f"░ gap: {DAY} 11:10:00 EST – {DAY} 11:20:00 EST (connection <lost>)" in lines
    assert lines[0].startswith("00700.HK  Tencent  5m  ")  # in the order of the table of --show
    asked = run_pyz("--show", AAPL, TENCENT, "--chart", "5m", "--sort", "asked")
    assert asked.stdout.startswith("AAPL.US")
    assert "\033" not in done.stdout
    assert max(map(len, lines)) <= 120
    done = run_pyz("--show", AAPL, "--chart", "5m", "--from", f"{DAY}T15:00", "--to", f"{DAY}T16:00")
    assert f"  5m  {DAY} 10:00:00 EST – {DAY} 10:55:00 EST\n" in done.stdout
    done = run_pyz("--show", TENCENT, "--chart", "1d")
    assert f"00700.HK  Tencent  1d  {CLOSES}" in done.stdout
    assert "last: open 659.5  high 659.5  low 659.5  close 659.5  volume 1000" in done.stdout


def test_candles_are_drawn_for_a_chinese_reader(run_pyz: RunPyz, state: Path) -> None:
    """In Chinese, with 万 and 亿 on the axis, which take two columns each: nothing is moved aside by them."""
    with open_store_file(state) as file, file.write() as db:
        db.execute("UPDATE realtime SET v = '1234567' WHERE stock_code = ?", (AAPL,))
    env = {"LANG": "zh_CN.UTF-8"}
    done = run_pyz("--show", AAPL, "--chart", "5m", env=env)
    assert done.returncode == 0, done.stderr
    title, *drawn, last, gap = done.stdout.splitlines()
    assert title == f"AAPL.US  苹果  5 分钟 K 线  {DAY} 09:30:00 EST – {DAY} 14:25:00 EST"
    assert last.startswith("最新一根：开盘 ") and re.search(
        r"  最高 \S+  最低 \S+  收盘 \S+  成交量 \d+$", last
    )
    assert gap == f"░ 缺口：{DAY} 11:10:00 EST – {DAY} 11:20:00 EST（连接中断：<lost>）"
    (most,) = [line for line in drawn if "万" in line]
    assert most.lstrip().startswith("617.28万┤")
    axes = [re.match("[^┤│└┼]*[┤│└┼]", line) for line in drawn[:-1]]
    assert len({stockrt.columns_of(axis[0]) for axis in axes if axis}) == 1
    done = run_pyz("--show", TENCENT, "--chart", "1d", env=env)
    assert f"00700.HK  腾讯控股  日 K 线  {CLOSES}" in done.stdout
    assert "最新一根：开盘 659.5  最高 659.5  最低 659.5  收盘 659.5  成交量 1000" in done.stdout
    done = run_pyz("--show", MAOTAI, "9988.HK", "--chart", "1d", env=env)
    assert done.stderr.splitlines() == [
        "9988.HK：库中没有它的数据",
        "600519.SH：库中没有最终收盘价，可用 --backfill 60 --codes 600519.SH 补齐；"
        f"最后一笔成交的时间为 {RESTS_SINCE} 22:30:00 CST",
    ]


def test_candles_are_json_for_programs(run_pyz: RunPyz, state: Path) -> None:
    done = run_pyz("--show", AAPL, "--chart", "5m", "--json")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["gap"] for one in found].count(True) == 0
    assert found[0] == {
        "code": AAPL, "step": "5m", "t": OPEN, "open": "270.0", "high": "274.4", "low": "270.0",
        "close": "274.4", "volume": "500", "trades": 5, "gap": False,
    }  # fmt: skip


def test_a_terminal_that_cannot_show_blocks_is_told_so(run_pyz: RunPyz, state: Path) -> None:
    env = {"PYTHONIOENCODING": "gb2312"}
    done = run_pyz("--show", AAPL, "--chart", "5m", env=env)
    assert (done.returncode, done.stdout) == (64, "")
    assert "stdout is gb2312" in done.stderr and "--html" in done.stderr
    assert run_pyz("--show", AAPL, "--chart", "5m", "--json", env=env).returncode == 0


def test_what_is_not_there_is_said_with_what_is(run_pyz: RunPyz, state: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("old")
    done = run_pyz("--html", page, "--codes", "9988.HK")
    assert (done.returncode, page.read_text()) == (1, "old")
    assert done.stderr == f"stockrt: nothing written to {page}: 9988.HK: nothing of it is stored\n"
    done = run_pyz("--show", MAOTAI, "9988.HK", "--chart", "1d")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "9988.HK: nothing of it is stored",
        "600519.SH: no final close is stored: --backfill 60 --codes 600519.SH brings some; "
        f"the last trade is of {RESTS_SINCE} 22:30:00 CST",
    ]
    for args, lack in (
        ((TENCENT, "--chart", "1d"), f"no final close in this time; the latest is of {DAY - timedelta(1)}"),
        ((TENCENT, "--chart", "5m"), "no trade in this time; the last trade is of"),
    ):
        done = run_pyz("--show", *args, "--from", f"{DAY + timedelta(27)}")
        assert (done.returncode, done.stdout) == (1, "") and f"{TENCENT}: {lack}" in done.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--chart", "5m"), "--chart goes with --show or --html"),
        (("--show", "--chart", "7m"), "invalid choice: '7m'"),
        (("--html", "page.html", "--json"), "--json does not go with --html"),
        (("--once", "--codes", "A", "--html", "page.html"), "not allowed with argument"),
        (("--html", "-"), "--html -: expected the name of a file that ends with .html, or with .svg"),
        (("--html", "page.png"), "--html page.png: expected the name of a file that ends with .html"),
    ],
)
def test_what_does_not_go_together_is_refused(run_pyz: RunPyz, args: tuple[str, ...], words: str) -> None:
    done = run_pyz(*args)
    assert done.returncode == 64 and words in done.stderr
