"""What people type, of all kinds at once, and what is told of it: through the built file, as a daemon and by hand."""

from __future__ import annotations

import contextlib
import json
import random
import re
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import RunPyz
from kit.daemons import HASH, PATIENCE, ProcessDaemon, environment, until
from kit.infoway_server import PLANS, SYMBOL_TYPES, InfowayServer, symbol
from kit.platform_server import PlatformServer

import stockrt

KEY = "test-key"

# A hundred, by the API's list that has them: as they are typed -> the API's own form.
TYPED: dict[str, dict[str, str]] = {
    "STOCK_CN": {
        # shares: main boards, STAR, ChiNext, B
        "600519": "600519.SH",
        "601318.sh": "601318.SH",
        "SH603288": "603288.SH",
        "605499.SS": "605499.SH",
        "sh.688981": "688981.SH",
        "SH.689009": "689009.SH",
        "600036.XSHG": "600036.SH",
        "601166.SSE": "601166.SH",
        "1.600030": "600030.SH",
        "SHA:600276": "600276.SH",
        "SHSE.600887": "600887.SH",
        "900901": "900901.SH",
        "000001": "000001.SZ",
        "sz000858": "000858.SZ",
        "000333.XSHE": "000333.SZ",
        "001979": "001979.SZ",
        "002594.SZSE": "002594.SZ",
        "0.300750": "300750.SZ",
        "SZSE:301269": "301269.SZ",
        "200012": "200012.SZ",
        # ETFs, funds, REITs
        "510300": "510300.SH",
        "588000": "588000.SH",
        "508000": "508000.SH",
        "159915": "159915.SZ",
        "161725": "161725.SZ",
        "180101": "180101.SZ",
        # convertible and other bonds
        "113050": "113050.SH",
        "110059": "110059.SH",
        "118000": "118000.SH",
        "019547": "019547.SH",
        "123123": "123123.SZ",
        "127045": "127045.SZ",
        # repos
        "204001": "204001.SH",
        "131810": "131810.SZ",
        # indices
        "000300": "000300.SH",
        "1.000001": "000001.SH",
        "sh000016": "000016.SH",
        "000905": "000905.SH",
        "399001": "399001.SZ",
        "399006.SZ": "399006.SZ",
    },
    "STOCK_HK": {
        "700.HK": "00700.HK",
        "hk00005": "00005.HK",
        "HK.09988": "09988.HK",
        "HKEX:1810": "01810.HK",
        "116.03690": "03690.HK",
        "HSI.HK": "HSI.HK",
    },
    "STOCK_US": {
        "AAPL.US": "AAPL.US",
        "US.MSFT": "MSFT.US",
        "gb_goog": "GOOG.US",
        "TSLA.O": "TSLA.US",
        "JPM.N": "JPM.US",
        "105.NVDA": "NVDA.US",
        "NASDAQ:AMZN": "AMZN.US",
        "106.BRK_B": "BRK.B.US",
        "107.SPY": "SPY.US",
        "qqq.us": "QQQ.US",
        ".DJI.US": ".DJI.US",
    },
    "STOCK_JP": {"7203.T": "7203.JP", "TYO:9984": "9984.JP", "130A.JP": "130A.JP"},
    "STOCK_KS": {"KRX:005930": "005930.KS", "035720.KQ": "035720.KS"},
    "STOCK_IN": {"RELIANCE.NS": "RELIANCE.IN", "NSE:TCS": "TCS.IN", "M&M.IN": "M&M.IN"},
    "STOCK_TW": {"2330.TW": "2330.TW", "6488.TWO": "6488.TW"},
    "FOREX": {
        "USDCNY": "USDCNY",
        "EUR/USD": "EURUSD",
        "JPYUSD": "JPYUSD",
        "GBPUSD=X": "GBPUSD",
        "HKD=X": "USDHKD",
        "usd-chf": "USDCHF",
    },
    "METAL": {
        "XAU/USD": "XAUUSD",
        "OANDA:XAGUSD": "XAGUSD",
        "XPBUSD": "XPBUSD",
        "XCUUSD_S": "XCUUSD_S",
        "ZINCSPOT": "ZINCSPOT",
    },
    "ENERGY": {"USOIL": "USOIL", "NGAS": "NGAS", "common:WTI": "WTI"},
    "INDICES": {"US500": "US500", "HK50": "HK50", "ni225": "NI225", "TVC:DXY": "DXY", "SMI": "SMI"},
    "FUTURES": {"CL": "CL", "GC=F": "GC", "ES": "ES", "FKLI": "FKLI"},
    "CRYPTO": {
        "BTCUSDT": "BTCUSDT",
        "ETH/USDT": "ETHUSDT",
        "SOL-USDT": "SOLUSDT",
        "DOGE_USDT": "DOGEUSDT",
        "BINANCE:XRPUSDT": "XRPUSDT",
        "BTCUSDT.P": "BTCUSDT.P",
        "BTC-USD": "BTCUSD",
        "ethbtc": "ETHBTC",
        "1000PEPEUSDT": "1000PEPEUSDT",
        "币安人生USDT": "币安人生USDT",
    },
}
MEANT = {typed: code for listed in TYPED.values() for typed, code in listed.items()}
PRODUCT_OF = {code: SYMBOL_TYPES[kind] for kind, listed in TYPED.items() for code in listed.values()}
# Their form does not tell what they are, the lists do; 000905 is asked at the likelier exchange first.
LOOKED_UP = {"SMI", "ES", "FKLI", "币安人生USDT"}
ASKED_TWICE = {"000905": "000905.SZ"}


def asked_order() -> list[str]:
    """Return what is typed, in an order in which no kind comes in one piece."""
    order = list(MEANT)
    random.Random(17).shuffle(order)
    return order


def namesakes() -> Iterator[tuple[str, str]]:
    """Yield other instruments that are called almost so, by their lists: what is read wrongly reaches one of them."""
    for kind, listed in TYPED.items():
        for typed, code in listed.items():
            number, _, suffix = code.rpartition(".")
            if kind == "STOCK_CN" and typed not in ASKED_TWICE:
                yield kind, f"{number}.{'SZ' if suffix == 'SH' else 'SH'}"
            elif not kind.startswith("STOCK") and typed not in LOOKED_UP and code.isascii():
                yield "STOCK_US", f"{code}.US"


@pytest.fixture
def server() -> Iterator[InfowayServer]:
    """An API that knows these, and their namesakes, and nothing else; the key's plan is a Premium one."""
    symbols = {kind: [symbol(code, code) for code in listed.values()] for kind, listed in TYPED.items()}
    for kind, code in namesakes():
        if code not in PRODUCT_OF:
            symbols[kind].append(symbol(code, code))
    plan = replace(PLANS["premium"], expires=time.time() + 3 * 86_400)
    with InfowayServer(plans={KEY: plan}, symbols=symbols, listed_only=True) as api:
        yield api


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """The state directory of a daemon that is registered."""
    directory = tmp_path / "stockrt"  # a name that is no label of its metrics
    stockrt.write_hash(directory, HASH)
    return directory


@contextlib.contextmanager
def daemon_of(
    pyz: Path, base: dict[str, str], api: InfowayServer, state: Path, **more: str
) -> Iterator[tuple[ProcessDaemon, PlatformServer]]:
    """Run the built file as a daemon that is connected; its plan is not set."""
    with PlatformServer() as platform:
        platform.know(HASH)
        settings = environment(platform.port, api.url, state, **({"INFOWAY_PLAN": ""} | more))
        with ProcessDaemon(base, settings, pyz) as daemon:
            assert platform.wait_for(lambda s: s.connected, PATIENCE), "not connected"
            yield daemon, platform


def answer_to(platform: PlatformServer, codes: list[str]) -> dict[str, Any]:
    """Have codes executed, and return the one result."""
    execution = platform.execute(codes)
    assert platform.wait_for(lambda s: s.results_for(execution), PATIENCE), "no answer"
    (result,) = platform.results_for(execution)
    return result.data


def stored(state: Path) -> list[dict[str, Any]]:
    """Return the documents of the local store, in the order of arrival."""
    with contextlib.closing(sqlite3.connect(state / stockrt.SQLITE_NAME)) as db:
        db.row_factory = sqlite3.Row
        return [dict(row) for row in db.execute("SELECT * FROM realtime ORDER BY seq")]


def test_the_hundred_are_a_hundred_of_all_kinds() -> None:
    assert len(MEANT) == len(set(MEANT.values())) == len(PRODUCT_OF) == 100
    assert TYPED.keys() == SYMBOL_TYPES.keys()


def test_a_hundred_codes_of_all_kinds_in_one_command_are_each_found(
    pyz: Path, clean_env: dict[str, str], server: InfowayServer, state: Path
) -> None:
    """No instrument is another one, and each product is asked in the order of the command."""
    order = asked_order()
    with daemon_of(pyz, clean_env, server, state) as (_, platform):
        first = answer_to(platform, order)
        again = answer_to(platform, order)
    assert first["status"] == again["status"] == "success"
    assert (first["result"]["total"], first["result"]["success_count"]) == (100, 100), first["message"]
    assert (first["result"]["failed_stocks"], first["result"]["duplicate_count"]) == ([], 0)
    assert first["result"]["read_as"] == {"000300": "000300.SH", "000905": "000905.SH"}
    assert again["result"]["duplicate_count"] == 100
    documents = stored(state)
    assert {row["stock_code"] for row in documents} == PRODUCT_OF.keys()
    for row in documents:
        record = server.record(row["s"], PRODUCT_OF[row["s"]])
        assert {name: row[name] for name in record} == record
        assert row["_id"].startswith(f"{row['s']}|") and row["stock_code"] == row["s"]
    requests = server.asked("batch_trade")
    asked = {(request.product, code) for request in requests for code in request.codes}
    assert asked == {(product, code) for code, product in PRODUCT_OF.items()} | {("stock", "000905.SZ")}
    at_once = [ASKED_TWICE.get(typed, MEANT[typed]) for typed in order if typed not in LOOKED_UP]
    for product in set(PRODUCT_OF.values()):
        expected = [code for code in at_once if PRODUCT_OF.get(code, "stock") == product]
        assert list(next(r for r in requests if r.product == product).codes) == expected
    assert len(server.asked("package/info")) == 1  # a day and key, whatever is executed
    lists = [request.path for request in server.asked("common/basic/symbols")]
    assert len(lists) == len(set(lists)) <= len(SYMBOL_TYPES)


def test_a_hundred_codes_by_hand_are_rows_in_the_order_asked(run_pyz: RunPyz, server: InfowayServer) -> None:
    env = {"INFOWAY_API_KEY": KEY, "INFOWAY_API_BASE_URL": server.url}
    done = run_pyz("--once", "--codes", *asked_order(), env=env)
    assert done.returncode == 0, done.stderr
    titles, *rows = done.stdout.splitlines()
    assert [row.split()[0] for row in rows] == [MEANT[typed] for typed in asked_order()]
    # here each one's name is its code; a row ends with its age where its list was not needed
    assert titles.endswith("  NAME")
    assert all(row.split()[-1] in (row.split()[0], "d") for row in rows)


def test_what_a_key_has_left_and_old_trades_are_metrics(
    pyz: Path, clean_env: dict[str, str], server: InfowayServer, state: Path, tmp_path: Path
) -> None:
    """A key's by the first eight characters of its digest; and what is old is said, in the log and the answer."""
    path = tmp_path / "stockrt.prom"
    now_ms = int(time.time() * 1000)
    server.trades = {code: {"t": now_ms - 3_600_000} for code in PRODUCT_OF}
    server.trades |= {"BTCUSDT": {"t": now_ms - 7_200_000}, "AAPL.US": {"t": now_ms - 30 * 86_400_000}}
    with daemon_of(pyz, clean_env, server, state, METRICS_FILE=str(path)) as (daemon, platform):
        answer = answer_to(platform, ["BTCUSDT", "AAPL.US", "600519", "USDCNY"])
        assert until(lambda: path.exists() and "\nstockrt_codes_stale 2\n" in path.read_text())
        metrics, log = path.read_text(), daemon.log
    executed, used = len(server.asked("batch_trade")), server.used(KEY)
    words = "2 of 4 codes: no trade since "
    assert (answer["status"], answer["result"]["stale_count"]) == ("success", 2)
    assert words in answer["message"] and words in log
    digest = stockrt.key_digest(KEY)[:8]
    found = dict(re.findall(rf'^stockrt_api_key_(\w+){{key="{digest}"}} (\S+)$', metrics, re.M))
    assert float(found["requests_today"]) + float(found["requests_left"]) == 864_000
    # what is leased counts: a second's requests; the bar of a session that has just ended may be asked for later
    assert executed <= float(found["requests_today"]) <= used + 10
    assert found["state"] == "0"
    assert float(found["end_timestamp_seconds"]) == int(server.plans[KEY].expires)
    assert log.count("its plan ends at") == 1
    assert KEY not in metrics + log + json.dumps(answer)
