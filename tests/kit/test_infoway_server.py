"""The market-data simulator: plans, daily bars, symbol lists, and the answers that came with them."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from decimal import Decimal
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote
from zoneinfo import ZoneInfo

import pytest
import urllib3

from kit.cases import each
from kit.infoway_server import (
    EVERY_REFUSAL,
    FAR_S,
    MAX_CODES,
    MORE_REFUSALS,
    NO_TRADES,
    PLANS,
    SYMBOL_TYPES,
    SYMBOLS,
    InfowayServer,
    make_bar,
    make_record,
    market_of,
    shapes,
    symbol,
)

KEY = "test-key"
TRADE = "/stock/batch_trade/AAPL.US"
NOON = 1_786_708_800  # 2026-08-14 12:00 UTC, a Friday


@pytest.fixture
def http() -> Iterator[urllib3.PoolManager]:
    """A client without retries and with short time limits."""
    with urllib3.PoolManager(retries=False, timeout=60.0) as pool:
        yield pool


def ask(http: urllib3.PoolManager, server: InfowayServer, path: str, key: str = KEY) -> Any:
    """GET and return the JSON of the answer."""
    return http.request("GET", server.url + path, headers={"apiKey": key}).json()


# ------------------------------------------------------------------------------------------------- refusals


def test_wrapped_errors_are_told_by_their_text_alone(http: urllib3.PoolManager) -> None:
    with InfowayServer(per_minute=5, wrap_errors=True, unknown={"GONE.US"}) as server:
        many = ",".join(f"{number:06}.SH" for number in range(MAX_CODES + 1))
        asked = {
            "/stock/batch_trade/GONE.US": "All product not exists",
            f"/stock/batch_trade/{many}": "Products quantity exceeds the limit：100",
            "/common/basic/markets/trading_days?market=XX&beginDay=20260803&endDay=20260804": "Param error",
        }
        for path, text in asked.items():
            got = http.request("GET", server.url + path, headers={"apiKey": KEY})
            assert (got.status, got.json()["ret"], got.json()["msg"]) == (200, 500, text)
        assert [ask(http, server, TRADE, key)["msg"] for key in ("wrong", "")] == [
            "Apikey not exists",
            "apiKey is required",
        ]
        assert [ask(http, server, TRADE)["ret"] for _ in range(3)] == [200, 200, 500]
        assert ask(http, server, TRADE)["msg"].startswith("Request frequency exceed the limit")


def test_no_key_at_all(http: urllib3.PoolManager, infoway: InfowayServer) -> None:
    got = http.request("GET", infoway.url + TRADE)
    assert (got.status, got.data) == (401, b"Unauthorized")


def test_later_refusals_are_given_as_written(http: urllib3.PoolManager, infoway: InfowayServer) -> None:
    infoway.script = MORE_REFUSALS.values()
    for answer in MORE_REFUSALS.values():
        got = http.request("GET", infoway.url + TRADE, headers={"apiKey": KEY})
        assert (got.status, got.data, got.headers["Content-Type"]) == (
            answer.status,
            answer.body,
            answer.content_type,
        )
    assert {
        json.loads(MORE_REFUSALS[name].body or b"")["ret"] for name in MORE_REFUSALS if "wrapped" in name
    } == {500}
    assert "访问被阻断" in (EVERY_REFUSAL["403_html_gbk"].body or b"").decode("gbk")
    assert len({answer.body for answer in shapes(418).values()}) == len(shapes(418))


# ---------------------------------------------------------------------------------------------------- plans


def test_plan_is_told_and_enforced_for_each_key(http: urllib3.PoolManager) -> None:
    ends = replace(PLANS["free"], name="免费", per_minute=1, expires=NOON + 60, milliseconds=True)
    with InfowayServer(plans={"a": PLANS["premium"], "b": ends}, clock=lambda: NOON) as server:
        assert ask(http, server, "/package/info", "a")["data"] == {
            "packageName": "Premium",
            "expireTime": FAR_S,
            "apiNumPerSec": 10,
            "maxWsConNum": 2,
            "maxNum": 600,
            "allWsNum": 800,
            "maxYearHisData": 2,
        }
        told = ask(http, server, "/package/info", "b")["data"]
        assert (told["packageName"], told["expireTime"]) == ("免费", (NOON + 60) * 1_000)
        assert ask(http, server, TRADE, "b") == {"detail": "Rate limit exceeded"}
        assert (server.over_limit, server.used("b"), len(server.asked("package/info"))) == (1, 1, 2)
        assert [ask(http, server, TRADE, "a")["ret"] for _ in range(9)] == [200] * 9
        assert (server.used("a"), server.over_limit) == (10, 1)
        assert ask(http, server, "/package/info", KEY)["data"]["packageName"] == "Custom"


def test_plan_of_a_day_its_end_and_what_it_lacks(http: urllib3.PoolManager) -> None:
    now = NOON
    plan = replace(PLANS["pro"], per_day=100, expires=NOON + 86_400, products={"stock"})
    with InfowayServer(plans={KEY: plan}, clock=lambda: now) as server:
        assert ask(http, server, "/japan/batch_trade/7203.JP")["ret"] == 508
        server.plans[KEY] = replace(plan, lacking="ret_514")
        assert ask(http, server, "/japan/batch_trade/7203.JP")["ret"] == 514
        server.set_used(KEY, 99)
        assert [ask(http, server, TRADE)["ret"] for _ in range(3)] == [200, 502, 502]
        assert (server.over_day, server.over_limit) == (2, 0)
        now += 43_200  # another day begins
        assert ask(http, server, TRADE)["ret"] == 200
        now += 43_200
        assert ask(http, server, TRADE)["ret"] == 509
        assert ask(http, server, "/package/info")["ret"] == 200


def test_date_header_is_the_clocks_or_off_or_missing(http: urllib3.PoolManager) -> None:
    with InfowayServer(clock=lambda: NOON) as server:
        for offset, expected in ((0.0, NOON), (-3_600.0, NOON - 3_600)):
            server.date_offset_s = offset
            date = http.request("GET", server.url + TRADE, headers={"apiKey": KEY}).headers["Date"]
            assert parsedate_to_datetime(date).timestamp() == expected
        server.date_offset_s = None
        assert "Date" not in http.request("GET", server.url + TRADE, headers={"apiKey": KEY}).headers


# --------------------------------------------------------------------------------------------------- daily bars


def epoch(text: str, zone: str) -> float:
    """Return the epoch seconds of this local time."""
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()


def day_of(bar: Any, zone: str) -> str:
    """Return the date of a bar in this zone."""
    return f"{datetime.fromtimestamp(int(bar['t']), ZoneInfo(zone)):%Y-%m-%d}"


def bars_in(answer: Any) -> dict[str, Any]:
    """Return the bars of each code."""
    return {entry["s"]: entry["respList"] for entry in answer["data"]}


def test_bars_have_the_documented_shape(http: urllib3.PoolManager) -> None:
    now = epoch("2026-08-17T20:00", "America/New_York")
    with InfowayServer(clock=lambda: now, holidays={"20260812"}) as server:
        bars = bars_in(ask(http, server, "/stock/batch_kline/8/500/AAPL.US"))["AAPL.US"]
        assert len(bars) == 500 and bars == server.bars_of("AAPL.US")
        days = [day_of(bar, "America/New_York") for bar in bars]
        assert days[:5] == ["2026-08-17", "2026-08-14", "2026-08-13", "2026-08-11", "2026-08-10"]
        assert bars[1]["t"] == "1786680000"  # as in the documentation
        for bar, older in itertools.pairwise(bars):
            assert all(isinstance(value, str) for value in bar.values())
            first, high, low, last, volume, turnover = (
                Decimal(bar[name]) for name in ("o", "h", "l", "c", "v", "vw")
            )
            assert 0 < low <= min(first, last) <= max(first, last) <= high
            assert low * volume <= turnover <= high * volume and volume > 0
            assert last - Decimal(older["c"]) == Decimal(bar["pca"])
        assert len(bars_in(ask(http, server, "/stock/batch_kline/8/9999/AAPL.US"))["AAPL.US"]) == 500


def test_bars_of_several_codes_are_silently_cut(http: urllib3.PoolManager, infoway: InfowayServer) -> None:
    infoway.unknown = {"GONE.US"}
    answer = ask(http, infoway, "/stock/batch_kline/8/60/AAPL.US,600519.SH,GONE.US")
    assert (answer["ret"], answer["msg"]) == (200, "success")
    assert {code: len(bars) for code, bars in bars_in(answer).items()} == {"AAPL.US": 2, "600519.SH": 2}
    many = ",".join(f"{number:06}.SH" for number in range(MAX_CODES + 1))
    assert ask(http, infoway, f"/stock/batch_kline/8/2/{many}")["ret"] == 505
    assert ask(http, infoway, "/stock/batch_kline/8/2/GONE.US")["ret"] == 508
    for wrong in ("1/2", "8/x", "8/0"):
        assert ask(http, infoway, f"/stock/batch_kline/{wrong}/AAPL.US")["ret"] == 506
    assert infoway.codes_asked() == []
    assert infoway.codes_asked("batch_kline")[:2] == ["AAPL.US", "600519.SH"]


@each(
    ("code", "zone", "opens", "stands"),
    [
        ("AAPL.US", "America/New_York", "2026-08-14T09:30", "2026-08-14T16:05"),
        ("00700.HK", "Asia/Hong_Kong", "2026-08-14T09:30", "2026-08-14T16:10"),
        ("600519.SH", "Asia/Shanghai", "2026-08-14T09:30", "2026-08-14T15:01"),
        ("BTCUSDT", "UTC", "2026-08-16T00:00", "2026-08-17T00:00"),
    ],
)
def test_todays_bar_is_provisional_until_the_session_is_over(
    code: str, zone: str, opens: str, stands: str
) -> None:
    now = epoch(stands, zone)
    server = InfowayServer(clock=lambda: now)
    day, final = opens[:10], make_bar(code, opens[:10])

    def its_bar() -> Any:
        """The bar of this day, None before it begins; the one after it may have begun too."""
        return next((bar for bar in server.bars_of(code, 2) if day_of(bar, zone) == day), None)

    assert [its_bar()[name] for name in "ohlcv"] == [final[name] for name in "ohlcv"]
    for now in (epoch(opens, zone) + 3_600, epoch(stands, zone) - 1):  # noqa: B007 - the clock reads it
        assert its_bar()["o"] == final["o"]
        assert its_bar()["c"] != final["c"] and int(its_bar()["v"].replace(".", "")) > 0
        assert Decimal(its_bar()["v"]) < Decimal(final["v"])
    now = epoch(opens, zone) - 1
    assert its_bar() is None and server.bars_of(code, 1) != []


def test_days_out_of_the_ordinary() -> None:
    now = epoch("2026-11-19T16:00", "Asia/Seoul")  # the university's entrance exam
    server = InfowayServer(clock=lambda: now, holidays={"20261109"}, half_days={"20261127"})
    server.sessions = {("KS", "20261119"): ("10:00", "16:31"), ("IN", "20261109"): ("18:00", "19:30")}
    final = make_bar("005930.KS", "2026-11-19")
    assert server.bars_of("005930.KS", 1)[0]["c"] != final["c"]
    now += 1_860
    assert server.bars_of("005930.KS", 1)[0]["c"] == final["c"]
    days = [day_of(bar, "Asia/Kolkata") for bar in server.bars_of("RELIANCE.IN", 10)]
    assert "2026-11-09" in days
    assert "2026-11-09" not in [day_of(bar, "Asia/Tokyo") for bar in server.bars_of("7203.JP", 10)]
    now = epoch("2026-11-27T13:05", "America/New_York")
    assert server.bars_of("AAPL.US", 1)[0]["c"] == make_bar("AAPL.US", "2026-11-27")["c"]


def test_bars_of_what_does_not_trade(http: urllib3.PoolManager) -> None:
    now = epoch("2026-08-17T20:00", "Asia/Shanghai")
    codes = {
        "600001.SH": "empty",
        "600002.SH": "null",
        "600003.SH": "absent",
        "600004.SH": "stale",
        "600005.SH": "zero",
    }
    with InfowayServer(clock=lambda: now, suspended=codes) as server:  # type: ignore[arg-type]
        bars = bars_in(ask(http, server, f"/stock/batch_kline/8/2/{','.join(codes)},000001.SH"))
        assert (bars["600001.SH"], bars["600002.SH"], "600003.SH" in bars) == ([], None, False)
        assert [day_of(bar, "Asia/Shanghai") for bar in bars["600004.SH"]] == ["2026-08-10", "2026-08-07"]
        assert [bar["v"] for bar in bars["600005.SH"]] == ["0", "0"]
        assert bars["000001.SH"][0]["v"] == "0"  # an index
        flat = server.bars_of("600005.SH", 7)
        assert (
            len({bar["c"] for bar in flat[:6]}) == 1
            and [bar["v"] == "0" for bar in flat] == [True] * 5 + [False] * 2
        )


def test_scripted_bars(http: urllib3.PoolManager, infoway: InfowayServer) -> None:
    today, before = (
        make_bar("TSLA.US", "2025-06-17", c="300.10"),
        make_bar("TSLA.US", "2025-06-16", c="1", h="2"),
    )
    assert (today["o"], today["h"], before["h"], before["l"]) == ("300.10", "300.10", "2", "1")
    infoway.bars["TSLA.US"] = [today, before]
    assert bars_in(ask(http, infoway, "/stock/batch_kline/8/1/TSLA.US")) == {"TSLA.US": [today]}
    infoway.bars["TSLA.US"] = lambda now: [before] if now < FAR_S else []
    assert bars_in(ask(http, infoway, "/stock/batch_kline/8/2/TSLA.US")) == {"TSLA.US": [before]}


# ------------------------------------------------------------------------------------------------------ symbols


def test_symbol_lists_and_what_they_say_is_known(http: urllib3.PoolManager, infoway: InfowayServer) -> None:
    path = "/common/basic/symbols"
    infoway.listed_only = True
    assert len(SYMBOL_TYPES) == 13
    for name, product in SYMBOL_TYPES.items():
        entries = ask(http, infoway, f"{path}?type={name}")["data"]
        assert entries == SYMBOLS[name] != []
        assert {tuple(entry) for entry in entries} == {("symbol", "name_cn", "name_hk", "name_en", "index")}
        codes = [entry["symbol"] for entry in entries]
        trades = ask(http, infoway, f"/{product}/batch_trade/{quote(','.join(codes))}")["data"]
        assert [trade["s"] for trade in trades] == codes
    narrowed = ask(http, infoway, f"{path}?type=STOCK_CN&symbols=000001.SH,600519.SH,GONE.SH")["data"]
    assert [(entry["name_cn"], entry["index"]) for entry in narrowed] == [
        ("贵州茅台", False),
        ("上证指数", True),
    ]
    assert ask(http, infoway, f"{path}?type=STOCK_BJ")["ret"] == 506
    assert ask(http, infoway, path)["ret"] == 507
    infoway.symbols["STOCK_CN"] = [symbol("510300.SH", "沪深300ETF")]
    assert ask(http, infoway, f"{path}?type=STOCK_CN")["data"][0]["name_hk"] == "沪深300ETF"
    trades = ask(http, infoway, "/stock/batch_trade/510300.SH,600519.SH")["data"]
    assert [trade["s"] for trade in trades] == ["510300.SH"]


def test_odd_symbols_are_there() -> None:
    codes = {entry["symbol"] for entries in SYMBOLS.values() for entry in entries}
    assert codes >= {"XCUUSD_S", "BTCUSDT.P", "ZINCSPOT", ".DJI.US"}
    assert any(not code.isascii() for code in codes)
    assert market_of("币安人生USDT") == market_of("BTCUSDT.P") == "CRYPTO"


# --------------------------------------------------------------------------------------------------- odd trades


def test_records_that_are_no_trades(http: urllib3.PoolManager, infoway: InfowayServer) -> None:
    codes = dict(zip((f"60000{number}.SH" for number in range(9)), NO_TRADES, strict=False))
    infoway.trades = {code: NO_TRADES[kind] for code, kind in codes.items()}
    infoway.trades |= {"AAPL.US": {"p": "31.350"}, "TSLA.US": lambda _: None}
    answer = ask(http, infoway, f"/stock/batch_trade/AAPL.US,TSLA.US,{','.join(codes)}")["data"]
    records = {record["s"]: record for record in answer}
    assert [*records] == ["AAPL.US", *codes]
    assert records["AAPL.US"] == infoway.record("AAPL.US") == make_record("AAPL.US", 0) | {"p": "31.350"}
    odd = {kind: records[code] for code, kind in codes.items()}
    assert odd["zero_p"]["p"] == "0" and Decimal(odd["zero_p_with_v"]["p"]) == 0
    assert Decimal(odd["negative_p"]["p"]) < 0 and Decimal(odd["negative_v"]["v"]) < 0
    assert odd["year_ahead_t"]["t"] > (time.time() + 364 * 86_400) * 1_000


def test_frozen_trades_stand_whatever_the_tick(http: urllib3.PoolManager) -> None:
    plan = replace(PLANS["pro"], expires=NOON, at_end="frozen")
    with InfowayServer(plans={"ended": plan}, clock=lambda: NOON + 86_400) as server:
        path = "/stock/batch_trade/AAPL.US,TSLA.US"

        def times(key: str = KEY) -> list[int]:
            server.bump()
            return [record["t"] for record in ask(http, server, path, key)["data"]]

        assert times("ended") == times("ended") and max(times("ended")) < NOON * 1_000
        assert day_of(
            bars_in(ask(http, server, "/stock/batch_kline/8/1/AAPL.US", "ended"))["AAPL.US"][0], "UTC"
        ) == ("2026-08-13")
        server.freeze(1_000_000_000_000, ["AAPL.US"])
        (old, new), (old_again, newer) = times(), times()
        assert old == old_again < 1_000_000_000_000 < new < newer
        server.freeze(NOON * 1_000)
        assert times()[0] == old and times() == times()
        server.thaw()
        assert times()[0] < times()[0]


def test_codes_come_back_in_lower_case(http: urllib3.PoolManager, infoway: InfowayServer) -> None:
    infoway.lower_case = True
    assert [it["s"] for it in ask(http, infoway, TRADE)["data"]] == ["aapl.us"]
    assert [it["s"] for it in ask(http, infoway, "/stock/batch_kline/8/1/AAPL.US")["data"]] == ["aapl.us"]


@contextlib.contextmanager
def running(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """Yield the process; it ends with the block, whatever fails there."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_by_hand(http: urllib3.PoolManager) -> None:
    program = Path(__file__).with_name("infoway_server.py")
    odd = "--no-trade AAPL.US=zero_p --suspended TSLA.US=empty --frozen 86400 --wrap-errors"
    command = [sys.executable, "-S", str(program), "--plan", "free", "--plan", "k2=pro", *odd.split()]
    with running(command) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()

        def get(path: str, key: str) -> Any:
            return http.request("GET", url + path, headers={"apiKey": key}).json()

        assert get("/package/info", KEY)["data"]["packageName"] == "Free"
        assert get("/package/info", "k2")["data"]["packageName"] == "Pro"
        (record,) = get(TRADE, "k2")["data"]
        assert (record["p"], record["t"] < (time.time() - 86_399) * 1_000) == ("0", True)
        assert get("/stock/batch_kline/8/2/TSLA.US", "k2")["data"] == [{"s": "TSLA.US", "respList": []}]
        assert get("/stock/batch_trade/GONE", "k2")["ret"] == 500
        process.terminate()
        assert process.wait(60) == 0
    for wrong in (["--plan", "gold"], ["--no-trade", "AAPL.US"], ["--suspended", "AAPL.US=no"]):
        done = subprocess.run([*command, *wrong], capture_output=True, text=True)
        assert done.returncode == 2 and wrong[1] in done.stderr
