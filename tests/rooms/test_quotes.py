"""The table of --show: what it says of a code, and that its columns stand under each other however narrow it is."""

from __future__ import annotations

import csv
import io
import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest
from kit.cases import each
from kit.trades import CREATED, settings_of

from stockrt import (
    CHINESE,
    ENGLISH,
    MARKETS,
    NEVER,
    SPOKEN,
    Bar,
    LocalFile,
    Pipeline,
    Quote,
    QuoteTable,
    Rows,
    SqliteStore,
    StoredTrade,
    Trade,
    bar_close,
    color_of_rise,
    columns_of,
    csv_lines,
    identity,
    in_order,
    open_store_file,
    quotes,
    session_of,
    short_number,
    sparkline,
    to_document,
    trading_span,
    with_trade,
)

TEN = int(datetime(2026, 8, 14, 2, 0, tzinfo=UTC).timestamp()) * 1000  # ten o'clock in Shanghai
MINUTE = 60_000
NOW = TEN / 1000 + 2 * 3600
MAOTAI, TENCENT, BITCOIN, FOREIGN = "600519.SH", "00700.HK", "BTCUSDT", "US30"
NAMES = [("STOCK_CN", MAOTAI, "贵州茅台", "Kweichow Moutai"), ("STOCK_HK", TENCENT, "腾讯控股", "Tencent")]


def trade(code: str, minutes: float, price: str, volume: str = "100") -> Trade:
    """Return a trade so many minutes after ten."""
    return Trade(code, TEN + int(minutes * MINUTE), price, volume, "1", 1)


def keep_names(file: LocalFile, names: Sequence[tuple[str, str, str, str]]) -> None:
    """Keep names (list, code, Chinese, English) as the API's lists have them."""
    with file.write() as db:
        for kind, code, chinese, latin in names:
            db.execute("INSERT INTO symbols VALUES (?, ?, ?, '', ?)", (kind, code, chinese, latin))


def stored(
    folder: Path,
    trades: Sequence[Trade],
    finals: Sequence[tuple[str, str, str]] = (),
    names: Sequence[tuple[str, str, str, str]] = (),
    english: bool = False,
) -> list[Quote]:
    """Return the quotes of trades that are stored, with final closes (code, date, price)."""
    with open_store_file(folder) as file:
        store = SqliteStore(file)
        store.write([to_document(one, CREATED) for one in trades])
        closes = []
        for code, day, price in finals:
            at = int(datetime.fromisoformat(f"{day}T02:00+00:00").timestamp()) * 1000
            session = session_of(MARKETS[code[-2:]], at)
            closes.append(bar_close(Bar(code, at // 1000, price, price, price, price, "1", "1"), session))
        store.write_closes(closes)
        keep_names(file, names)
    with Pipeline.open_reader(settings_of({"STATE_DIRECTORY": str(folder)})) as reader:
        return quotes(reader, list(dict.fromkeys(one.s for one in trades)), english)


def test_a_quote_is_the_latest_trade_against_the_last_final_close_with_its_session(tmp_path: Path) -> None:
    day_before = [trade(MAOTAI, -24 * 60, "1400")]
    at_half_past_nine = trade(MAOTAI, -30, "1500.00", "200")
    session = [at_half_past_nine, trade(MAOTAI, 0, "1450.5"), trade(MAOTAI, 60, "1530", "300")]
    before_it_opens = [trade(MAOTAI, -41, "9999")]
    finals = [(MAOTAI, "2026-08-13", "1500"), (MAOTAI, "2026-08-12", "1"), (MAOTAI, "2026-08-14", "1530")]
    (one,) = stored(tmp_path, [*day_before, *before_it_opens, *session], finals, NAMES)
    assert one.document(NOW) == {
        "code": MAOTAI,
        "name": "贵州茅台",
        "price": "1530",
        "t": TEN + 60 * MINUTE,
        "age_s": 3600.0,
        "change_percent": 2.0,
        "reference_close": "1500",
        "reference_date": "2026-08-13",
        "session": "2026-08-14",
        "open": "1500.00",
        "high": "1530",
        "low": "1450.5",
        "volume": "600",
        # a step of the session, from 9:20 on, is a twentieth of 345 min: ten o'clock is in the third
        "spark": [1500.0, 1500.0, 1450.5, 1450.5, 1450.5, 1530.0],
    }


def test_a_trade_before_or_without_a_session_has_a_span_of_its_own() -> None:
    opens = TEN - 40 * MINUTE  # with its auction
    before = trading_span(MAOTAI, opens - 1)
    assert before == ("2026-08-14", TEN - 10 * 60 * MINUTE, opens)
    assert trading_span(MAOTAI, opens).since == opens
    assert trading_span(MAOTAI, opens + 10 * 60 * MINUTE) == trading_span(MAOTAI, opens)  # after the close
    saturday = trading_span(MAOTAI, TEN + 24 * 60 * MINUTE)
    assert (saturday.date, saturday.until - saturday.since) == ("2026-08-15", 24 * 60 * MINUTE)
    for code in (BITCOIN, FOREIGN):
        assert trading_span(code, TEN) == ("2026-08-14", TEN - 2 * 60 * MINUTE, TEN + 22 * 60 * MINUTE)
    assert trading_span(BITCOIN, TEN).until < NEVER


def test_without_names_and_closes_and_with_one_trade_it_shows_what_there_is(tmp_path: Path) -> None:
    found = stored(tmp_path, [trade(MAOTAI, 0, "1500.00")])
    title, line = QuoteTable(None).lines(found, NOW)
    assert title.split() == ["CODE", "LAST", "CHANGE", "OPEN", "HIGH", "LOW", "VOLUME", "AGE", "SESSION"]
    assert line.split() == [MAOTAI, "1500.00", "-", "1500.00", "1500.00", "1500.00", "100", "2", "h", "▅"]


def test_a_trade_of_the_future_and_one_of_a_suspended_share_say_so(tmp_path: Path) -> None:
    found = stored(tmp_path, [trade(MAOTAI, 60 * 24 * -90, "5"), trade(BITCOIN, 120 + 7, "6")])
    _, old, ahead = QuoteTable(None).lines(found, NOW)
    assert re.search(r" 90 d( |$)", old)
    assert " in 7 min" in ahead


@pytest.fixture
def chinese_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads what the program prints reads Chinese."""
    monkeypatch.setattr(SPOKEN, "language", CHINESE)


@pytest.mark.usefixtures("chinese_reader")
def test_a_chinese_reader_has_titles_ages_and_numbers_in_chinese(tmp_path: Path) -> None:
    trades = [
        trade(MAOTAI, 0, "1500.00", "123456789"),
        trade(TENCENT, 120 + 7, "6"),
        trade(BITCOIN, 119, "9"),
    ]
    title, maotai, tencent, bitcoin = QuoteTable(None).lines(stored(tmp_path, trades, names=NAMES), NOW)
    titles = "代码 名称 最新价 涨跌幅 开盘 最高 最低 成交量 距今 走势"
    assert title.split() == titles.split()
    assert maotai.split()[-4:] == ["1.23亿", "2", "小时", "▅"]
    assert " 7 分钟后" in tencent and " 60 秒 " in bitcoin
    ends = {columns_of(line.partition(word)[0] + word) for line, word in ((title, "距今"), (maotai, "小时"))}
    assert len(ends) == 1


@each(
    ("number", "english", "chinese"),
    [
        ("0.00012", "0.00012", "0.00012"),
        ("9876", "9,876", "9,876"),
        ("12345", "12,345", "1.23万"),
        ("12345678", "12.35M", "1234.57万"),
        ("-250000000", "-250.00M", "-2.50亿"),
        ("123456789012", "123.46B", "1234.57亿"),
        ("1234567890123", "1.23T", "1.23万亿"),
    ],
)
def test_numbers_are_short_as_the_reader_expects(number: str, english: str, chinese: str) -> None:
    assert (short_number(number, ENGLISH), short_number(number, CHINESE)) == (english, chinese)


def _rows(folder: Path, names: Sequence[tuple[str, str, str, str]], is_live: bool) -> list[str]:
    """Return the lines of the table of --once or --collect of three trades, of each side one."""
    out, now = io.StringIO(), int(time.time() * 1000)
    rows = Rows(out, as_json=False, width=200, is_live=is_live)
    trades = [
        Trade(code, now - minutes * MINUTE, "1", "2", "3", side)
        for code, minutes, side in ((MAOTAI, 3, 1), (TENCENT, 119, 2), (BITCOIN, 119, 0))
    ]
    with open_store_file(folder) as file:
        keep_names(file, names)
    with Pipeline(settings_of({"STATE_DIRECTORY": str(folder)})) as pipeline:
        rows.reader = pipeline.reader
        rows.add([to_document(one, CREATED) for one in trades])
        rows.finish([MAOTAI, TENCENT, BITCOIN])
    return out.getvalue().splitlines()


@pytest.mark.usefixtures("chinese_reader")
@pytest.mark.parametrize("is_live", [False, True])
@pytest.mark.parametrize("names", [[], NAMES])
def test_rows_are_chinese_and_stand_under_their_titles(
    tmp_path: Path, names: Sequence[tuple[str, str, str, str]], is_live: bool
) -> None:
    title, *lines = _rows(tmp_path, names, is_live)
    assert title.split() == "代码 价格 成交量 成交额 方向 交易所时间 距今 名称".split()[: 8 if names else 7]
    assert [line.split()[4] for line in lines] == ["买", "卖", "-"]
    assert [re.findall(r"\d+ \S+钟", line) for line in lines] == [["3 分钟"], ["119 分钟"], ["119 分钟"]]
    ends = {columns_of(re.match(".*(?:距今|分钟)", line)[0]) for line in (title, *lines)}  # type: ignore[index]
    assert len(ends) == 1


def _several(folder: Path) -> list[Quote]:
    trades = [
        trade(MAOTAI, 0, "1450.10"),
        trade(MAOTAI, 1, "1530.20", "12345678"),
        trade(TENCENT, 3, "610.5"),
        trade(BITCOIN, 2, "95000.25", "0.0012"),
    ]
    finals = [(MAOTAI, "2026-08-13", "1500"), (TENCENT, "2026-08-13", "620.5")]
    return stored(folder, trades, finals, NAMES)


@pytest.mark.parametrize(
    ("width", "titles"),
    [
        (200, "CODE NAME LAST CHANGE OPEN HIGH LOW VOLUME AGE SESSION"),
        (90, "CODE NAME LAST CHANGE HIGH LOW VOLUME AGE SESSION"),
        (80, "CODE NAME LAST CHANGE VOLUME AGE SESSION"),
        (60, "CODE NAME LAST CHANGE AGE SESSION"),
        (50, "CODE NAME LAST CHANGE AGE"),
        (36, "CODE LAST CHANGE AGE"),
        (10, "CODE LAST CHANGE"),
    ],
)
def test_a_narrow_terminal_loses_columns_and_not_alignment(tmp_path: Path, width: int, titles: str) -> None:
    lines = QuoteTable(width).lines(_several(tmp_path), NOW)
    assert lines[0].split() == titles.split()
    ends = set()
    for line in lines:
        before = line.partition("%")[0] if "%" in line else line[: line.find("CHANGE") + 5]
        ends.add(columns_of(before) if "BTC" not in line else None)
    assert len(ends - {None}) == 1  # wide names or none, the column after them ends at the same place
    if width > 10:
        assert max(map(columns_of, lines)) <= width


def test_what_changed_is_lit_and_the_age_never_is(tmp_path: Path) -> None:
    found = _several(tmp_path)
    table = QuoteTable(200, "red")
    assert not any("\033[7" in line for line in table.lines(found, NOW, lit=True))
    found[0] = found[0]._replace(trade=found[0].trade._replace(p="1531.00"))
    lines = table.lines(found, NOW + 60, lit=True)
    assert "\033[7;31m1531.00\033[0m" in lines[1]
    assert not any("\033[7" in line for line in lines[2:])
    assert "\033[7;31m1531.00\033[0m" in table.lines(found, NOW + 60.2, lit=True)[1]  # for a moment
    assert not any("\033[7" in line for line in table.lines(found, NOW + 120, lit=True))


def test_trades_make_of_a_quote_what_the_store_would_have_made_of_it(tmp_path: Path) -> None:
    finals = [(MAOTAI, "2026-08-12", "1400"), (MAOTAI, "2026-08-13", "1500")]
    minutes = [(0, "1450"), (0.5, "1449.5"), (61, "1530.25"), (62, "1400"), (400, "1399"), (401, "1398")]
    trades = [trade(MAOTAI, at, price, f"{n}00.5") for n, (at, price) in enumerate(minutes)]
    (live,) = stored(tmp_path / "one", trades[:1], finals)
    for number, one in enumerate(trades):
        live = with_trade(live, StoredTrade(identity(one), *one, one.s, ""))
        assert with_trade(live, live.trade._replace(t=TEN - 1)) == live  # an older one, which is in the store
        (read,) = stored(tmp_path / f"{number}", trades[: number + 1], finals)
        assert _plain(live) == _plain(read)
    tomorrow = live.trade._replace(t=TEN + 24 * 60 * MINUTE, id="x", p="7")
    live = with_trade(live, tomorrow)
    assert (live.reference, live.trade.p, live.session and live.session.volume) == (None, "7", "500.5")


def _plain(quote: Quote) -> dict[str, object]:
    """A quote as numbers: stores write them differently."""
    facts = quote.document(NOW)
    for name in ("open", "high", "low", "volume"):
        facts[name] = float(str(facts[name]))
    return facts


def test_a_change_has_its_sign_beside_its_color(tmp_path: Path) -> None:
    found = _several(tmp_path)
    _, maotai, tencent, bitcoin = QuoteTable(200, color_of_rise({"LANG": "zh_CN.UTF-8"}, None)).lines(
        found, NOW
    )
    assert "\033[31m+2.01%\033[0m" in maotai
    assert "\033[32m-1.61%\033[0m" in tencent
    assert "\033[" not in bitcoin
    plain = QuoteTable(200).lines(found, NOW)
    assert not any("\033" in line for line in plain)
    assert ("+2.01%" in plain[1], "-1.61%" in plain[2]) == (True, True)


@each(
    ("environ", "up", "rises"),
    [
        ({"LANG": "zh_CN.UTF-8"}, None, "red"),
        ({"LANG": "zh_TW"}, None, "red"),
        ({"LANG": "zh"}, None, "red"),
        ({"LANG": "ja_JP.UTF-8"}, None, "red"),
        ({"LANG": "ko_KR.UTF-8"}, None, "red"),
        ({"LANG": "zh_HK.UTF-8"}, None, "green"),
        ({"LANG": "zh_SG"}, None, "green"),
        ({"LANG": "en_US.UTF-8"}, None, "green"),
        ({}, None, "green"),
        ({"LANG": "zh_CN", "LC_ALL": "C"}, None, "green"),
        ({"LANG": "C", "LC_ALL": "", "LC_MESSAGES": "zh_CN"}, None, "red"),
        ({"LANG": "zh_CN.UTF-8"}, "green", "green"),
        ({"LANG": "en_US.UTF-8"}, "red", "red"),
    ],
)
def test_what_rises_has_the_color_of_the_readers_locale(
    environ: dict[str, str], up: str | None, rises: str
) -> None:
    assert color_of_rise(environ, up) == rises


@pytest.mark.usefixtures("chinese_reader")
@pytest.mark.parametrize(
    ("environ", "rises"),
    [
        ({}, "red"),
        ({"LANG": "C.UTF-8"}, "red"),
        ({"LANG": "en_US.UTF-8"}, "red"),
        ({"LANG": "zh_HK.UTF-8"}, "green"),
        ({"LANG": "zh_CN.UTF-8"}, "red"),
    ],
)
def test_red_rises_for_who_reads_chinese_unless_the_locale_tells_where(
    environ: dict[str, str], rises: str
) -> None:
    assert color_of_rise(environ, None) == rises
    assert color_of_rise(environ, "green") == "green"


def test_names_are_in_the_readers_language(tmp_path: Path) -> None:
    (one,) = stored(tmp_path, [trade(MAOTAI, 0, "1")], names=NAMES, english=True)
    assert one.name == "Kweichow Moutai"


def test_lines_are_in_the_order_that_is_asked_for(tmp_path: Path) -> None:
    found = _several(tmp_path)
    orders = {by: [one.code for one in in_order(found, by)] for by in ("code", "change", "asked")}
    assert orders == {
        "code": [TENCENT, MAOTAI, BITCOIN],
        "change": [MAOTAI, TENCENT, BITCOIN],
        "asked": [MAOTAI, TENCENT, BITCOIN],
    }


def test_a_sparkline_has_the_lowest_and_the_highest_bar() -> None:
    assert sparkline([1.0, None, 3.0, 2.0]) == "▁ █▅"
    assert sparkline([]) == sparkline([None]) == ""


def test_a_terminal_that_has_no_bars_gets_none(tmp_path: Path) -> None:
    assert QuoteTable(None, encoding="latin-1").lines(_several(tmp_path), NOW)[0].split()[-1] == "AGE"


def test_csv_is_what_a_csv_reader_reads_whatever_the_texts_are() -> None:
    rows = [("a", "1", True), ("b,c", "2", False), ('"d"', "3\r", 4), ("e\nf", "", 5)]
    for some in (rows, rows[:1], rows[1:2], rows[2:3], rows[3:]):
        text = csv_lines(some)
        assert list(csv.reader(io.StringIO(text, newline=""))) == [[str(one) for one in row] for row in some]
