"""An Infoway market-data API on the loopback, with the answers of the real one, the bad ones included.

By hand, needing nothing but Python:

    python tests/kit/infoway_server.py --port 8765 --tick-every 2
    curl -H 'apiKey: test-key' http://127.0.0.1:8765/stock/batch_trade/AAPL.US,00700.HK
    curl -H 'apiKey: test-key' http://127.0.0.1:8765/stock/batch_kline/8/5/600519.SH
    curl -H 'apiKey: test-key' 'http://127.0.0.1:8765/common/basic/symbols?type=STOCK_CN'
    curl -H 'apiKey: test-key' http://127.0.0.1:8765/package/info

In a test:

    with InfowayServer(per_second=10, unknown={"GONE.US"}) as server:
        server.script = [REFUSALS["429_html"], None, Answer.cut_mid_body()]   # None: the usual answer
        ...                                                                   # fetch from server.url
        assert server.over_limit == 0

A trade follows from its code and the server's `tick` alone: the same tick gives the same record again, `bump`
makes new trades; `trades` and `freeze` make others of them. A daily bar follows from its code, its day and the
server's `clock`, unless `bars` has scripted ones. `plans` say what each key may do.

Every connection has a thread; an answer is the join of records that are made once per tick.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gzip
import itertools
import json
import os
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from email.utils import formatdate
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import parse_qs, unquote
from zoneinfo import ZoneInfo

# Of the codes that the README shows; thousandths.
USUAL_PRICES = {
    "TSLA.US": 423_000,
    "AAPL.US": 267_000,
    "00700.HK": 621_000,
    "600519.SH": 1_450_000,
    "USDCNY": 7_100,
    "BTCUSDT": 91_000_000,
}

MAX_CODES = 100  # per request, as the API has it
MAX_BARS = 500  # of one code
MAX_BARS_OF_SEVERAL = 2  # of each of several codes, whatever is asked
DAILY = "8"  # the kind of bars that it has
MAX_HEAD = 64 * 1024  # longer request heads are refused, as gateways do
EPOCH_MS = 1_786_752_000_000  # of tick 0: 2026-08-15 00:00 UTC
TICK_MS = 1_000  # between the trade times of two ticks
CHUNK = 64 * 1024
JSON = "application/json"
HTML = "text/html"
PROBLEM = "application/problem+json"

Record = dict[str, Any]

# What each product knows, by the shape of the code.
PRODUCTS: dict[str, re.Pattern[str]] = {
    "stock": re.compile(r"\.?[A-Z0-9]{1,10}([-.][A-Z])?\.US|(\d{5}|\.?[A-Z]{2,8})\.HK|\d{6}\.(SH|SZ)"),
    "japan": re.compile(r"[0-9A-Z]{4}\.JP"),
    "korea": re.compile(r"[0-9A-Z]{6}\.KS"),
    "india": re.compile(r"[A-Z0-9&-]{1,20}\.IN"),
    "taiwan": re.compile(r"[0-9A-Z]{4,6}\.TW"),
    "crypto": re.compile(r"[A-Z0-9]{2,12}(USDT|USDC)(\.P)?"),
    "common": re.compile(r"(?!.*USD[TC]$)[A-Z]{6}|USOIL|UKOIL|NGAS|COPPER"),
}


# ------------------------------------------------------------------------------------------------------ plans

FAR_S = 4_102_444_800  # 2100-01-01, the end of what does not end


@dataclass(frozen=True)
class Plan:
    """What a key may do: told by /package/info, and enforced. `dataclasses.replace` makes others of it."""

    name: str
    per_second: int
    per_minute: int | None  # it and `per_day` are not told; None: no limit
    per_day: int | None  # by the UTC day of the server's clock
    sockets: int
    symbols_per_socket: int
    symbols: int
    years: int = 2
    expires: float = FAR_S  # epoch seconds
    milliseconds: bool = False  # how the end is told
    at_end: Literal["ret_509", "frozen"] = "ret_509"  # frozen: the last trades and bars before it, for ever
    products: Collection[str] = frozenset(PRODUCTS)
    lacking: Literal["unknown", "ret_514"] = "unknown"  # how other products' codes are answered

    def info(self) -> dict[str, Any]:
        """Return the `data` of /package/info."""
        return {
            "packageName": self.name,
            "expireTime": int(self.expires * (1_000 if self.milliseconds else 1)),
            "apiNumPerSec": self.per_second,
            "maxWsConNum": self.sockets,
            "maxNum": self.symbols_per_socket,
            "allWsNum": self.symbols,
            "maxYearHisData": self.years,
        }


PLANS = {
    "free": Plan("Free", 1, 60, 86_400, 1, 10, 10),
    "basic": Plan("Basic", 2, 120, 172_800, 1, 200, 200),
    "premium": Plan("Premium", 10, 600, 864_000, 2, 600, 800),
    "pro": Plan("Pro", 20, 1_200, 1_728_000, 9, 600, 5_000),
}
NO_LIMIT_PER_SECOND = 1_000  # told where there is none


# ----------------------------------------------------------------------------------------------------- markets


@dataclass(frozen=True)
class Market:
    """When a market's regular session begins and when its bar stands, the auction's print included."""

    zone: str
    begins: str  # HH:MM there
    stands: str
    stands_early: str  # on a half day
    weekends: bool = False


# Its names are those of the trading calendar, and two without a calendar. The half hour after India's and the
# minutes after New York's close are guesses, and so is any boundary at `common`.
MARKETS = {
    "US": Market("America/New_York", "09:30", "16:05", "13:05"),
    "HK": Market("Asia/Hong_Kong", "09:30", "16:10", "12:10"),
    "CN": Market("Asia/Shanghai", "09:30", "15:01", "15:01"),
    "JP": Market("Asia/Tokyo", "09:00", "15:31", "15:31"),
    "KS": Market("Asia/Seoul", "09:00", "15:31", "15:31"),
    "IN": Market("Asia/Kolkata", "09:15", "16:00", "16:00"),
    "TW": Market("Asia/Taipei", "09:00", "13:31", "13:31"),
    "CRYPTO": Market("UTC", "00:00", "24:00", "24:00", weekends=True),
    "COMMON": Market("UTC", "00:00", "24:00", "24:00"),
}
SUFFIXES = {"SH": "CN", "SZ": "CN"}  # where it is not the market's own name


def market_of(code: str) -> str:
    """Return the market (of MARKETS) whose days this code trades on."""
    _, dot, suffix = code.rpartition(".")
    market = SUFFIXES.get(suffix, suffix if dot else "")
    if market in MARKETS:
        return market
    return "CRYPTO" if PRODUCTS["crypto"].fullmatch(code) or not code.isascii() else "COMMON"


Suspension = Literal["empty", "null", "absent", "stale", "zero"]
SUSPENDED_DAYS = 5  # of trading, that a stale bar is old and zero volume lasts


# ----------------------------------------------------------------------------------------------------- symbols

Symbol = dict[str, Any]

# The types of lists, and the product that has the instruments of each.
SYMBOL_TYPES = {
    "STOCK_US": "stock",
    "STOCK_CN": "stock",
    "STOCK_HK": "stock",
    "STOCK_JP": "japan",
    "STOCK_KS": "korea",
    "STOCK_IN": "india",
    "STOCK_TW": "taiwan",
    "CRYPTO": "crypto",
    "FOREX": "common",
    "FUTURES": "common",
    "ENERGY": "common",
    "METAL": "common",
    "INDICES": "common",
}


def symbol(code: str, name_cn: str, name_en: str = "", name_hk: str = "", *, index: bool = False) -> Symbol:
    """Return an entry of a list; without a name of its own Hong Kong has the mainland's."""
    return {
        "symbol": code,
        "name_cn": name_cn,
        "name_hk": name_hk or name_cn,
        "name_en": name_en,
        "index": index,
    }


# A few of each, with what is odd among them: indices, names in one language alone, symbols that are not ASCII or
# have a dot, an underscore, a shape of their own. What `index` is at `common` is a guess.
SYMBOLS: dict[str, list[Symbol]] = {
    "STOCK_US": [
        symbol("AAPL.US", "苹果", "Apple Inc.", "蘋果"),
        symbol("TSLA.US", "特斯拉", "Tesla, Inc."),
        symbol("BABA.US", "阿里巴巴", "Alibaba Group Holding Ltd ADR"),
        symbol("BRK.B.US", "伯克希尔-B", "Berkshire Hathaway Inc. Class B", "巴郡-B"),
        symbol("CL.US", "高露洁", "Colgate-Palmolive Company", "高露潔"),
        symbol("SPY.US", "标普500指数ETF-SPDR", "SPDR S&P 500 ETF Trust"),
        symbol(".DJI.US", "道琼斯指数", "Dow Jones Industrial Average", "道瓊斯指數", index=True),
        symbol(".IXIC.US", "纳斯达克综合指数", "NASDAQ Composite", "納斯達克綜合指數", index=True),
    ],
    "STOCK_CN": [
        symbol("600519.SH", "贵州茅台", "Kweichow Moutai", "貴州茅台"),
        symbol("601318.SH", "中国平安", "Ping An Insurance", "中國平安"),
        symbol("688981.SH", "中芯国际", "SMIC", "中芯國際"),
        symbol("900901.SH", "云赛B股", "INESA Intelligent Tech B", "雲賽B股"),
        symbol("000001.SZ", "平安银行", "Ping An Bank", "平安銀行"),
        symbol("000333.SZ", "美的集团", "Midea Group", "美的集團"),
        symbol("300750.SZ", "宁德时代", "CATL", "寧德時代"),
        symbol("000001.SH", "上证指数", "SSE Composite Index", "上證指數", index=True),
        symbol("000016.SH", "上证50", "SSE 50", "上證50", index=True),
        symbol("000300.SH", "沪深300", "CSI 300", "滬深300", index=True),
        symbol("000688.SH", "科创50", "STAR 50", "科創50", index=True),
        symbol("000852.SH", "中证1000", "CSI 1000", "中證1000", index=True),
        symbol("000905.SH", "中证500", "CSI 500", "中證500", index=True),
        symbol("399001.SZ", "深证成指", "SZSE Component Index", "深證成指", index=True),
        symbol("399006.SZ", "创业板指", "ChiNext Index", "創業板指", index=True),
    ],
    "STOCK_HK": [
        symbol("00700.HK", "腾讯控股", "Tencent Holdings Ltd.", "騰訊控股"),
        symbol("09988.HK", "阿里巴巴-W", "Alibaba Group Holding Ltd", "阿里巴巴-W"),
        symbol("00005.HK", "汇丰控股", "HSBC Holdings plc", "滙豐控股"),
    ],
    "STOCK_JP": [
        symbol("7203.JP", "丰田汽车", "Toyota Motor Corp.", "豐田汽車"),
        symbol("130A.JP", "", "Veritas In Silico Inc."),
    ],
    "STOCK_KS": [symbol("005930.KS", "三星电子", "Samsung Electronics", "三星電子")],
    "STOCK_IN": [
        symbol("RELIANCE.IN", "", "Reliance Industries Ltd"),
        symbol("M&M.IN", "", "Mahindra & Mahindra Ltd"),
    ],
    "STOCK_TW": [
        symbol("2330.TW", "台积电", "TSMC", "台積電"),
        symbol("0050.TW", "元大台湾50", "Yuanta Taiwan 50"),
    ],
    "CRYPTO": [
        symbol("BTCUSDT", "比特币", "Bitcoin", "比特幣"),
        symbol("BTCUSDT.P", "比特币永续", "Bitcoin Perpetual", "比特幣永續"),
        symbol("ETHUSDT", "以太坊", "Ethereum"),
        symbol("1000PEPEUSDT", "", "1000PEPE"),
        symbol("币安人生USDT", "币安人生", ""),
    ],
    "FOREX": [
        symbol("USDCNY", "美元/人民币", "US Dollar / Chinese Yuan", "美元/人民幣"),
        symbol("EURUSD", "欧元/美元", "Euro / US Dollar", "歐元/美元"),
        symbol("USDJPY", "美元/日元", "US Dollar / Japanese Yen", "美元/日圓"),
        symbol("JPYUSD", "日元/美元", "Japanese Yen / US Dollar", "日圓/美元"),
    ],
    "FUTURES": [
        symbol("CL", "WTI原油期货", "Crude Oil WTI Futures", "WTI原油期貨"),
        symbol("GC", "COMEX黄金期货", "Gold Futures", "COMEX黃金期貨"),
        symbol("ES", "标普500指数期货", "E-mini S&P 500 Futures", "標普500指數期貨"),
    ],
    "ENERGY": [
        symbol("USOIL", "美国原油", "WTI Crude Oil", "美國原油"),
        symbol("UKOIL", "布伦特原油", "Brent Crude Oil", "布蘭特原油"),
        symbol("NGAS", "天然气", "Natural Gas", "天然氣"),
    ],
    "METAL": [
        symbol("XAUUSD", "黄金/美元", "Gold / US Dollar", "黃金/美元"),
        symbol("XAGUSD", "白银/美元", "Silver / US Dollar", "白銀/美元"),
        symbol("XCUUSD_S", "铜/美元", "Copper / US Dollar", "銅/美元"),
        symbol("XALUSD", "铝/美元", "Aluminium / US Dollar", "鋁/美元"),
        symbol("XNIUSD", "镍/美元", "Nickel / US Dollar", "鎳/美元"),
        symbol("XPBUSD", "铅/美元", "Lead / US Dollar", "鉛/美元"),
        symbol("ZINCSPOT", "锌现货", "Zinc Spot", "鋅現貨"),
    ],
    "INDICES": [
        symbol("US500", "标普500指数", "US 500", "標普500指數", index=True),
        symbol("HK50", "香港50指数", "Hong Kong 50", "香港50指數", index=True),
        symbol("CN50", "富时中国A50指数", "China A50", "富時中國A50指數", index=True),
        symbol("NI225", "日经225指数", "Nikkei 225", "日經225指數", index=True),
        symbol("DXY", "美元指数", "US Dollar Index", "美元指數", index=True),
    ],
}
INDICES = frozenset(it["symbol"] for entries in SYMBOLS.values() for it in entries if it["index"])


# ---------------------------------------------------------------------------------------------------- answers

Delivery = Literal[
    "whole",
    "chunked",
    "gzip",
    "overstated",
    "understated",
    "cut_before",
    "reset",
    "cut_body",
    "cut_chunk",
    "bad_chunk",
    "hang",
    "drip_head",
    "drip_body",
    "huge",
]


@dataclass(frozen=True)
class Answer:
    """What the server does instead of its usual answer; `body` None stands for the usual body."""

    status: int = 200
    body: bytes | None = None
    content_type: str = JSON
    headers: tuple[tuple[str, str], ...] = ()
    rewrite: Callable[[Request, list[Record]], Any] | None = None  # the usual `data` to another
    delivery: Delivery = "whole"
    pace: float = 0.0  # seconds per dripped byte
    size: int = 0  # of a huge body
    delay: float = 0.0  # seconds before it

    def with_headers(self, *headers: tuple[str, str]) -> Answer:
        """Return the same answer with these headers too, e.g. ``("Retry-After", "2")``."""
        return replace(self, headers=self.headers + headers)

    def after(self, seconds: float) -> Answer:
        """Return the same answer, given later."""
        return replace(self, delay=seconds)

    @classmethod
    def raw(
        cls,
        status: int,
        body: bytes | str,
        headers: Iterable[tuple[str, str]] = (),
        content_type: str = JSON,
    ) -> Answer:
        """Exactly this status and body."""
        return cls(status, body.encode() if isinstance(body, str) else body, content_type, tuple(headers))

    @classmethod
    def json(cls, value: Any, status: int = 200) -> Answer:
        """Any JSON value; NaN and infinities are written as Python's json does."""
        return cls(status, _dumps(value))

    @classmethod
    def data(cls, value: Any, ret: Any = 200, msg: str = "success") -> Answer:
        """An envelope around this `data`."""
        return cls.json({"ret": ret, "msg": msg, "traceId": TRACE_ID, "data": value})

    @classmethod
    def html(cls, status: int = 200, title: str = "Welcome") -> Answer:
        """A web page, e.g. a captive portal's or a gateway's."""
        page = f"<html>\r\n<head><title>{title}</title></head>\r\n<body><center><h1>{title}</h1></center></body>\r\n"
        return cls(status, (page + "</html>\r\n").encode(), HTML)

    @classmethod
    def html_cn(cls, status: int = 200, charset: Literal["utf-8", "gbk"] = "utf-8") -> Answer:
        """The page of a gateway or firewall in China, which says nothing in English."""
        page = (
            f'<!doctype html><html lang="zh-cn"><head><meta charset="{charset}"><title>{status}</title></head>'
            "<body><p>很抱歉，由于您访问的URL有可能对网站造成安全威胁，您的访问被阻断。</p></body></html>\n"
        )
        return cls(status, page.encode(charset), f"{HTML}; charset={charset}")

    @classmethod
    def malformed_json(cls) -> Answer:
        """JSON that stops in the middle, with a matching Content-Length."""
        return cls(
            200, b'{"ret":200,"msg":"success","traceId":"x","data":[{"s":"AAPL.US","t":1786751999691,"p":"30'
        )

    @classmethod
    def empty(cls, status: int = 200) -> Answer:
        """No body at all."""
        return cls(status, b"")

    @classmethod
    def short_body(cls) -> Answer:
        """The usual body under a Content-Length of 100 bytes more; then the connection is closed."""
        return cls(delivery="overstated")

    @classmethod
    def understated_length(cls) -> Answer:
        """The usual body under a Content-Length of half of it; the rest follows and spoils the connection."""
        return cls(delivery="understated")

    @classmethod
    def cut_before_answer(cls) -> Answer:
        """The connection is closed in good order without a byte of answer."""
        return cls(delivery="cut_before")

    @classmethod
    def reset(cls) -> Answer:
        """The connection is reset without a byte of answer."""
        return cls(delivery="reset")

    @classmethod
    def cut_mid_body(cls) -> Answer:
        """Half of the usual body under its true Content-Length, then the connection is closed."""
        return cls(delivery="cut_body")

    @classmethod
    def chunked(cls) -> Answer:
        """The usual body, in chunks: a good answer."""
        return cls(delivery="chunked")

    @classmethod
    def cut_chunk(cls) -> Answer:
        """Half of the usual body in a chunk, then the connection is closed without the last chunk."""
        return cls(delivery="cut_chunk")

    @classmethod
    def bad_chunk(cls) -> Answer:
        """Chunked, with a chunk size that is no number."""
        return cls(delivery="bad_chunk")

    @classmethod
    def gzip(cls) -> Answer:
        """The usual body, compressed if the request accepts it: a good answer."""
        return cls(delivery="gzip")

    @classmethod
    def gzip_broken(cls) -> Answer:
        """Called gzip, and is none."""
        return cls(200, b"\x1f\x8b\x08 this is no deflate stream", headers=(("Content-Encoding", "gzip"),))

    @classmethod
    def gzip_bomb(cls, size: int) -> Answer:
        """A few bytes that unpack to `size`."""
        packer = zlib.compressobj(9, zlib.DEFLATED, -15)
        blank, blanks = b" " * CHUNK, size // CHUNK
        packed = packer.compress(blank) + packer.flush(zlib.Z_FULL_FLUSH)  # the same as often as one likes
        check = 0
        for _ in range(blanks):
            check = zlib.crc32(blank, check)
        end = packer.flush() + struct.pack("<II", check, blanks * CHUNK & 0xFFFFFFFF)
        body = b"\x1f\x8b\x08" + bytes(7) + packed * blanks + end
        return cls(200, body, headers=(("Content-Encoding", "gzip"),))

    @classmethod
    def hang(cls) -> Answer:
        """Never an answer; the connection stays open until the client or the server closes it."""
        return cls(delivery="hang")

    @classmethod
    def drip(cls, part: Literal["head", "body"], seconds_per_byte: float) -> Answer:
        """The usual answer, whose head or body comes byte by byte."""
        return cls(delivery="drip_head" if part == "head" else "drip_body", pace=seconds_per_byte)

    @classmethod
    def huge(cls, size: int, *, chunked: bool = False) -> Answer:
        """A valid JSON answer of about `size` bytes, streamed; with `chunked` its length is not announced."""
        return cls(delivery="huge", size=size, headers=CHUNKED if chunked else ())

    @classmethod
    def nested(cls, depth: int = 100_000) -> Answer:
        """`data` is that many lists inside each other."""
        return cls(200, b'{"ret":200,"msg":"success","data":' + b"[" * depth + b"]" * depth + b"}")

    @classmethod
    def rewritten(cls, rewrite: Callable[[Request, list[Record]], Any]) -> Answer:
        """The usual envelope, its `data` made by a function of the request and the usual records."""
        return cls(rewrite=rewrite)

    @classmethod
    def null_record(cls) -> Answer:
        """The good records with a null among them."""
        return cls(rewrite=lambda _, records: [*records[:1], None, *records[1:]])

    @classmethod
    def half_bad(cls) -> Answer:
        """The first half of the records good, the others spoilt, each in the next one of `SPOILERS`' ways."""
        return cls(rewrite=half_bad)


CHUNKED = (("Transfer-Encoding", "chunked"),)
TRACE_ID = "00000000-0000-4000-8000-000000000000"

# Ways to spoil a record. After them all, foreign entries follow the records: see `half_bad`.
SPOILERS: dict[str, Callable[[Record], Any]] = {
    "null": lambda _: None,
    "string": lambda record: record["s"],
    "list": lambda record: [*record.values()],
    "empty": lambda _: {},
    "no_s": lambda record: _without(record, "s"),
    "no_t": lambda record: _without(record, "t"),
    "no_p": lambda record: _without(record, "p"),
    "no_v": lambda record: _without(record, "v"),
    "no_vw": lambda record: _without(record, "vw"),
    "no_td": lambda record: _without(record, "td"),
    "null_p": lambda record: record | {"p": None},
    "text_p": lambda record: record | {"p": "n/a"},
    "empty_p": lambda record: record | {"p": ""},
    "nan_p": lambda record: record | {"p": "NaN"},
    "bare_nan_p": lambda record: record | {"p": float("nan")},
    "infinite_p": lambda record: record | {"p": "Infinity"},
    "bool_p": lambda record: record | {"p": True},
    "list_p": lambda record: record | {"p": ["1"]},
    "huge_p": lambda record: record | {"p": "9" * 5_000},
    "exponent_p": lambda record: record | {"p": "1e999999999"},
    "underscore_p": lambda record: record | {"p": "1_000.5"},
    "arabic_p": lambda record: record | {"p": "٣٠٥"},
    "spaced_p": lambda record: record | {"p": " 305.771\n"},
    "negative_v": lambda record: record | {"v": "-1"},
    "text_t": lambda record: record | {"t": "yesterday"},
    "bool_t": lambda record: record | {"t": True},
    "float_t": lambda record: record | {"t": record["t"] + 0.5},
    "negative_t": lambda record: record | {"t": -1},
    "huge_t": lambda record: record | {"t": 10**30},
    "text_td": lambda record: record | {"td": "buy"},
    "bool_td": lambda record: record | {"td": False},
    "huge_td": lambda record: record | {"td": 2**70},
    "number_s": lambda record: record | {"s": 600519},
    "surrogate_s": lambda record: record | {"s": "\ud800"},
}


YEAR_MS = 365 * 86_400_000


def _year_ahead(record: Record) -> Record:
    """The same record a year ahead of itself and of this machine's clock, the same one for a day."""
    today_ms = int(time.time()) // 86_400 * 86_400_000
    return record | {"t": max(record["t"], today_ms) + YEAR_MS}


# Records of good form that are no trades: of a share that is suspended or has not traded yet, and worse.
NO_TRADES: dict[str, Callable[[Record], Record]] = {
    "zero_p": lambda record: record | {"p": "0", "v": "0", "vw": "0"},
    "zero_p_with_v": lambda record: record | {"p": "0.000", "vw": "0"},
    "negative_p": lambda record: record | {"p": f"-{record['p']}", "vw": f"-{record['vw']}"},
    "negative_v": lambda record: record | {"v": f"-{record['v']}", "vw": f"-{record['vw']}"},
    "year_ahead_t": _year_ahead,
}


def half_bad(_: Request, records: list[Record]) -> list[Any]:
    """Spoil the second half; then a code that was not asked and the first record once more, twice."""
    good = (len(records) + 1) // 2
    spoilt = [
        spoil(record)
        for record, spoil in zip(records[good:], itertools.cycle(SPOILERS.values()), strict=False)
    ]
    strangers = [record | {"s": "NOTASKED.US"} for record in records[:1]]
    return [*records[:good], *spoilt, *strangers, *records[:1], *records[:1]]


def _without(record: Record, field: str) -> Record:
    return {name: value for name, value in record.items() if name != field}


def _dumps(value: Any) -> bytes:
    """Write JSON as the API does; text that is no valid Unicode is escaped."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode()


def _business(ret: int, msg: str) -> Answer:
    """HTTP 200 around a refusal."""
    return Answer.json({"ret": ret, "msg": msg, "traceId": TRACE_ID, "data": None})


def _problem(status: int, title: str, detail: str, instance: str) -> Answer:
    """A refusal as RFC 7807 has it."""
    body = {"type": "about:blank", "title": title, "status": status, "detail": detail, "instance": instance}
    return Answer(status, _dumps(body), PROBLEM)


NOT_EXISTS = "All product not exists"
UNAUTHORIZED = Answer.raw(401, "Unauthorized", content_type="text/plain")  # no key was sent
# Python knows those of the standards, not the inventions of nginx and Cloudflare.
REASONS = {it.value: it.phrase for it in HTTPStatus} | {
    499: "Client Closed Request",
    520: "Web Server Returned an Unknown Error",
    522: "Connection Timed Out",
    524: "A Timeout Occurred",
}

# Every way the API has to say no. The bodies of 401_token_invalid, 200_rate_limit and 404_problem are captures.
REFUSALS: dict[str, Answer] = {
    "401_token_invalid": Answer.raw(401, '{"code":401,"message":"Token invalid","timestamp":1786778697472}'),
    "200_rate_limit": Answer.raw(200, '{"detail":"Rate limit exceeded"}'),
    "429_json": Answer.raw(429, '{"detail":"Rate limit exceeded"}'),
    "429_html": Answer.html(429, "429 Too Many Requests"),
    "ret_501": _business(501, "Request frequency exceed the limit, please reduce the request frequency"),
    "ret_502": _business(502, "Request frequency for the day upper limit"),
    "ret_509": _business(509, "The token permission has expired, please renew the plan"),
    "ret_514": _business(514, "No permission: the market is not included in the plan"),
    "ret_508": _business(508, NOT_EXISTS),
    "ret_500_not_exists": _business(500, NOT_EXISTS),
    "ret_505": _business(505, f"Products quantity exceeds the limit：{MAX_CODES}"),
    "ret_506": _business(506, "Param error"),
    "ret_507": _business(507, "Param lost"),
    "400_problem": _problem(400, "Bad Request", "Required parameter is not present.", "/stock/batch_trade"),
    "404_problem": _problem(
        404,
        "Not Found",
        "No static resource common/basic/markets/trading_hours.",
        "/common/basic/markets/trading_hours",
    ),
    "ret_500": _business(500, "System error"),
    "500_empty": Answer.empty(500),
    "500_json": Answer.raw(500, '{"ret":500,"msg":"System error","traceId":"x","data":null}'),
    "502_html": Answer.html(502, "502 Bad Gateway"),
    "503_html": Answer.html(503, "503 Service Temporarily Unavailable"),
    "503_json": Answer.raw(503, '{"code":503,"message":"Service Unavailable","timestamp":1786778697472}'),
    "504_empty": Answer.empty(504),
    "ret_0": _business(0, "success"),
}

# The forms in which "over the rate" comes; the server takes them in turn.
RATE_REFUSALS = ("200_rate_limit", "429_json", "429_html", "ret_501")

# What each refusal is when the API wraps it: the text alone says which it was.
WRAPPED: dict[Answer, Answer] = {
    **{
        REFUSALS[f"ret_{ret}"]: _business(500, str(json.loads(REFUSALS[f"ret_{ret}"].body or b"")["msg"]))
        for ret in (501, 502, 505, 506, 507, 508, 509, 514)
    },
    REFUSALS["401_token_invalid"]: _business(500, "Apikey not exists"),
    UNAUTHORIZED: _business(500, "apiKey is required"),
}


def shapes(status: int) -> dict[str, Answer]:
    """Return a refusal with this HTTP status in each of the shapes that gateways and servers give it."""
    phrase = REASONS.get(status, "Unknown")
    texts = {"code": status, "message": phrase, "timestamp": 1_786_778_697_472}
    return {
        "empty": Answer.empty(status),
        "json": Answer.json(texts, status),
        "detail": Answer.json({"detail": phrase}, status),
        "problem": _problem(status, phrase, "The request was refused.", "/stock/batch_trade"),
        "text": Answer.raw(status, f"error code: {status}", content_type="text/plain; charset=UTF-8"),
        "html": Answer.html(status, f"{status} {phrase}"),
        "html_cn": Answer.html_cn(status),
        "html_gbk": Answer.html_cn(status, "gbk"),
    }


# Those that came later than REFUSALS; `wrapped_502` is what `ret_502` became.
MORE_REFUSALS: dict[str, Answer] = {
    **{f"wrapped_{ret}": WRAPPED[REFUSALS[f"ret_{ret}"]] for ret in (501, 502, 505, 506, 507, 508, 509, 514)},
    "wrapped_no_key": WRAPPED[UNAUTHORIZED],
    "wrapped_wrong_key": WRAPPED[REFUSALS["401_token_invalid"]],
    "401_unauthorized": UNAUTHORIZED,
    "ret_0_error": _business(0, "System error"),
    "ret_0_records": Answer.data(
        [{"s": "AAPL.US", "t": 1_786_751_999_691, "p": "305.771", "v": "1", "vw": "305.771", "td": 0}], ret=0
    ),
    "200_html_cn": Answer.html_cn(),
    "502_html_cn": Answer.html_cn(502),
    **{f"{status}_{shape}": it for status in (403, 499, 524) for shape, it in shapes(status).items()},
}
EVERY_REFUSAL = REFUSALS | MORE_REFUSALS


# --------------------------------------------------------------------------------------------------- the server


@dataclass(slots=True)
class Request:
    """One request, as it arrived and as it was answered."""

    at: float  # time.monotonic() when its head was complete
    path: str  # as sent, with the query
    product: str  # "" unless it asks for trades or bars
    codes: tuple[str, ...]
    key: str
    headers: Mapping[str, str]  # names in lower case
    status: int = 0  # HTTP status of the answer; 0: none was sent
    resource: str = ""  # batch_trade, batch_kline; else the path without query and slash
    over_limit: bool = False  # of a second or minute
    over_day: bool = False


Retouch = Mapping[str, Any] | Callable[[Record], Record | None]  # fields to replace, or the record anew
Bar = dict[str, Any]
Bars = list[Any] | Callable[[float], list[Any]]  # as sent, newest first; or a function of the clock's seconds
Script = Callable[[Request], Answer | None] | Iterable[Answer | None]


# A busy machine lets a thread of ours read one request so much later than it came, and the next one at once.
LATE_S = 0.2


class _Window:
    """The requests of one key: told of each, says whether it is within the limits. Refused ones do not count."""

    def __init__(self, limits: Iterable[tuple[int | None, float]]) -> None:
        self._windows = [(limit, seconds, deque[float]()) for limit, seconds in limits if limit is not None]

    def admit(self, now: float) -> bool:
        for _, seconds, times in self._windows:
            while times and times[0] <= now - seconds + LATE_S:
                times.popleft()
        if any(len(times) >= limit for limit, _, times in self._windows):
            return False
        for _, _, times in self._windows:
            times.append(now)
        return True


def make_certificate(folder: Path) -> tuple[ssl.SSLContext, Path]:
    """Make a self-signed certificate for 127.0.0.1 by the openssl program; return a server's context and its file."""
    openssl = shutil.which("openssl")
    if openssl is None:
        raise RuntimeError("TLS needs the openssl program on the PATH")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([openssl, "req", *kind, *names, *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context, certificate


class InfowayServer:
    """The API on 127.0.0.1, from `start` (or ``with``) to `stop`; started again it keeps its port.

    `script` is asked first for every request, whatever its key, rate or path: a callable of the request, or an
    iterable whose answers are used up in the order of arrival. Where it has nothing (None, or its end) the
    usual answer is given.

    A key of `plans` is known and held to its plan, any other one of `keys` to `per_second` and `per_minute`.
    """

    def __init__(
        self,
        *,
        keys: Collection[str] = frozenset({"test-key"}),
        per_second: int | None = None,
        per_minute: int | None = None,
        plans: Mapping[str, Plan] = {},
        clock: Callable[[], float] = time.time,  # the API's idea of now, for all but rates and trades
        date_offset_s: float | None = 0.0,  # of the Date header from the clock; None: no such header
        over: str | None = None,  # one of RATE_REFUSALS; None takes them in turn
        latency: float | Callable[[Request], float] = 0.0,
        unknown: Collection[str] = frozenset(),
        all_unknown: Literal["ret_508", "ret_500", "data_null"] = "ret_508",
        script: Script = (),
        wrap_errors: bool = False,  # business errors come as `ret` 500, the text says which
        half_days: Collection[str] = frozenset(),  # YYYYMMDD
        holidays: Collection[str] = frozenset(),
        half_days_are_trade_days: bool = False,  # listed in both lists
        sessions: Mapping[tuple[str, str], tuple[str, str] | None] = {},  # see the attribute
        bars: Mapping[str, Bars] = {},
        symbols: Mapping[str, Iterable[Symbol]] = SYMBOLS,  # by type
        listed_only: bool = False,  # a product knows only what its lists have, else also what looks like it
        suspended: Mapping[str, Suspension] = {},
        trades: Mapping[str, Retouch] = {},
        lower_case: bool = False,  # codes in answers to trades and bars, however they were asked
        epoch_ms: int = EPOCH_MS,
        tick_every: float | None = None,  # seconds; None: only `bump` makes new trades
        requests_per_connection: int | None = None,  # then it is closed, unannounced
        record: bool = True,  # keep `requests`
        tls: bool = False,
        port: int = 0,
    ) -> None:
        self.keys = keys
        self.plans = dict(plans)
        self.clock = clock
        self.date_offset_s = date_offset_s
        self.over = over
        self.latency = latency
        self.unknown = unknown
        self.all_unknown = all_unknown
        self.wrap_errors = wrap_errors
        self.half_days = half_days
        self.holidays = holidays
        self.half_days_are_trade_days = half_days_are_trade_days
        # By market and YYYYMMDD: when its session begins and its bar stands, ("09:00", "16:31"); None: no session.
        self.sessions = dict(sessions)
        self.bars = dict(bars)  # by code, instead of made-up ones
        self.symbols = {name: list(entries) for name, entries in symbols.items()}
        self.listed_only = listed_only
        self.suspended = dict(suspended)  # by code: how its made-up bars show that it does not trade
        self.trades = dict(trades)  # by code: what makes its record another (or None), e.g. one of NO_TRADES
        self.frozen: dict[str | None, int] = {}  # see `freeze`
        self.lower_case = lower_case
        self.requests: list[Request] = []
        self.request_count = 0
        self.over_limit = 0
        self.over_day = 0
        self.peak_in_flight = 0
        self.in_flight = 0
        self.connections = 0  # accepted since the start
        self.port = port
        self.ca_file: Path | None = None
        self.script = script
        self._limits = ((per_second, 1.0), (per_minute, 60.0))
        self._windows: dict[str, tuple[Plan | None, _Window]] = {}
        self._used: dict[str, tuple[int, int]] = {}  # day and requests of it
        self._epoch_ms = epoch_ms
        self._tick = 0
        self._tick_every = tick_every
        self._born = time.monotonic()
        self._requests_per_connection = requests_per_connection
        self._record = record
        self._tls = tls
        self._context: ssl.SSLContext | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._condition = threading.Condition()
        self._closing = threading.Event()
        self._listener: socket.socket | None = None
        self._threads: dict[threading.Thread, socket.socket] = {}
        self._acceptor: threading.Thread | None = None
        self._refusals = itertools.cycle(RATE_REFUSALS)
        self._cache: tuple[int, dict[str, bytes]] = (-1, {})

    # ------------------------------------------------------------------------------------------------ life

    def __enter__(self) -> InfowayServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The base URL, without a slash at its end."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen."""
        if self._tls and self._context is None:
            self._make_certificate()
        self._closing = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=512)
        self.port = int(self._listener.getsockname()[1])
        self._acceptor = threading.Thread(target=self._accept, args=(self._listener,), daemon=True)
        self._acceptor.start()

    def stop(self) -> None:
        """Close the listener and every connection, whatever it is doing."""
        self._closing.set()
        if self._listener is not None:
            _shut(self._listener)
        if self._acceptor is not None:
            self._acceptor.join()
        with self._condition:
            threads = dict(self._threads)
        for connection in threads.values():
            _shut(connection)
        for thread in threads:
            thread.join()
        if self._listener is not None:
            self._listener.close()
        self._listener = self._acceptor = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = self._context = None

    def _make_certificate(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="stockrt-infoway-")
        self._context, self.ca_file = make_certificate(Path(self._folder.name))

    # ------------------------------------------------------------------------------------------- for tests

    @property
    def tick(self) -> int:
        """Which trades are the latest."""
        timed = 0 if self._tick_every is None else int((time.monotonic() - self._born) / self._tick_every)
        return self._tick + timed

    def bump(self, ticks: int = 1) -> None:
        """Let every instrument have traded."""
        with self._condition:
            self._tick += ticks

    def freeze(self, at_ms: int, codes: Iterable[str] | None = None) -> None:
        """Let these codes, or all, have traded last just before then and never since, whatever the tick."""
        with self._condition:
            self.frozen |= dict.fromkeys([None] if codes is None else codes, at_ms)

    def thaw(self) -> None:
        """Let everything trade again."""
        with self._condition:
            self.frozen.clear()

    @property
    def script(self) -> Script:
        """The answers to give instead of the usual ones."""
        return self._script

    @script.setter
    def script(self, script: Script) -> None:
        self._script = script
        self._next: Callable[[Request], Answer | None]
        if callable(script):
            self._next = script
        else:
            answers: Iterator[Answer | None] = iter(script)
            self._next = lambda _: next(answers, None)

    def wait_for(self, predicate: Callable[[InfowayServer], object], timeout: float = 60.0) -> None:
        """Return once the predicate holds, asked after each arrival and answer; TimeoutError if it never does."""
        with self._condition:
            if not self._condition.wait_for(lambda: predicate(self), timeout):
                raise TimeoutError(
                    f"not within {timeout} s; {self.request_count} requests, {self.in_flight} in flight"
                )

    def record(self, code: str, product: str | None = None) -> Record:
        """Return the trade that it now answers for this code; KeyError if no product knows it or it has none.

        It is the one of a key whose plan goes on; its code is as it was asked, `lower_case` or not.
        """
        for name in [product] if product is not None else PRODUCTS:
            if self._knows(name, code):
                record = self._record_of(code, self.tick, self._frozen_at(code))
                if record is not None:
                    return record
        raise KeyError(code)

    def bars_of(self, code: str, count: int = MAX_BARS) -> list[Any]:
        """Return the bars that it now answers to a key without an end for this code alone."""
        return self._bars(code, min(count, MAX_BARS), self.clock())

    def codes_asked(self, resource: str = "batch_trade") -> list[str]:
        """Return every code of every request for trades (or for this resource), in order of arrival."""
        return [code for request in self.asked(resource) for code in request.codes]

    def asked(self, resource: str) -> list[Request]:
        """Return the requests for `batch_trade`, `batch_kline`, `package/info`, `common/basic/symbols` …"""
        return [request for request in self.requests if request.resource == resource]

    def used(self, key: str) -> int:
        """Return how many requests of its day this key has had."""
        day, count = self._used.get(key, (0, 0))
        return count if day == self._today() else 0

    def set_used(self, key: str, count: int) -> None:
        """Let this key have had so many requests of its day."""
        with self._condition:
            self._used[key] = (self._today(), count)

    def _today(self) -> int:
        return int(self.clock() // 86_400)

    # ----------------------------------------------------------------------------------------- connections

    @property
    def open_connections(self) -> int:
        """Return how many of the connections this side has not closed."""
        return len(self._threads)

    def _accept(self, listener: socket.socket) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            with self._condition:
                self.connections += 1
                self._threads[thread] = connection
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._context is not None:
                connection = self._context.wrap_socket(connection, server_side=True)
                with self._condition:
                    self._threads[threading.current_thread()] = connection
                    if self._closing.is_set():
                        return
            self._converse(connection)
        except OSError:
            pass  # the client went, or the server is closing
        finally:
            with contextlib.suppress(OSError):
                connection.close()
            with self._condition:
                del self._threads[threading.current_thread()]
                self._condition.notify_all()

    def _converse(self, connection: socket.socket) -> None:
        """Answer one request after the other until one side has had enough."""
        buffer = b""
        for served in itertools.count(1):
            while (end := buffer.find(b"\r\n\r\n")) < 0:
                if len(buffer) > MAX_HEAD:
                    connection.sendall(_head(431, (), 0))
                    return
                received = connection.recv(CHUNK)
                if not received:
                    return
                buffer += received
            at = time.monotonic()
            method, request = _parse(buffer[:end], at)
            buffer = buffer[end + 4 :]
            with self._condition:
                answer = self._decide(method, request)
            try:
                keep = self._deliver(connection, request, answer)
            finally:
                with self._condition:
                    self.in_flight -= 1
                    self._condition.notify_all()
            if not keep or served == self._requests_per_connection:
                return

    # --------------------------------------------------------------------------------------------- answers

    def _decide(self, method: str, request: Request) -> Answer:
        """Record the request and choose its answer; the caller holds the lock."""
        known_key = request.key in self.keys or request.key in self.plans
        if known_key:
            self._count(request)
        answer = self._next(request)
        if answer is None:
            answer = self._refusal(method, request, known_key) or self._usual(request)
            if self.wrap_errors:
                answer = WRAPPED.get(answer, answer)
        elif answer.body is None:
            answer = replace(answer, body=self._rewritten(request, answer))
        request.status = 0 if answer.delivery in ("hang", "cut_before", "reset") else answer.status
        self.over_limit += request.over_limit
        self.over_day += request.over_day
        self.request_count += 1
        self.in_flight += 1
        self.peak_in_flight = max(self.peak_in_flight, self.in_flight)
        if self._record:
            self.requests.append(request)
        self._condition.notify_all()
        return answer

    def _count(self, request: Request) -> None:
        """Hold the request against its key's limits; a refused one uses nothing up."""
        plan = self.plans.get(request.key)
        used = self.used(request.key)
        if plan is not None and plan.per_day is not None and used >= plan.per_day:
            request.over_day = True
            return
        if request.key not in self._windows or self._windows[request.key][0] != plan:
            limits = self._limits if plan is None else ((plan.per_second, 1.0), (plan.per_minute, 60.0))
            self._windows[request.key] = (plan, _Window(limits))
        request.over_limit = not self._windows[request.key][1].admit(request.at)
        if not request.over_limit:
            self._used[request.key] = (self._today(), used + 1)

    def _refusal(self, method: str, request: Request, known_key: bool) -> Answer | None:
        """Return what stands between this request and its usual answer."""
        if method != "GET":
            return _problem(405, "Method Not Allowed", f"Method '{method}' is not supported.", request.path)
        if not request.key:
            return UNAUTHORIZED
        if not known_key:
            return REFUSALS["401_token_invalid"]
        if request.over_limit:
            return REFUSALS[self.over or ("ret_501" if self.wrap_errors else next(self._refusals))]
        if request.over_day:
            return REFUSALS["ret_502"]
        plan = self.plans.get(request.key)
        if plan is None or request.resource == "package/info":
            return None
        if plan.expires <= self.clock() and plan.at_end == "ret_509":
            return REFUSALS["ret_509"]
        if request.product not in ("", *plan.products):
            return REFUSALS["ret_514"] if plan.lacking == "ret_514" else self._nothing_known()
        return None

    def _nothing_known(self) -> Answer:
        """Return the answer to codes of which none is known."""
        forms = {"ret_508": "ret_508", "ret_500": "ret_500_not_exists"}
        name = forms.get(self.all_unknown)
        return REFUSALS[name] if name else Answer.data(None)

    def _rewritten(self, request: Request, answer: Answer) -> bytes:
        usual = self._usual(request).body or b""
        if answer.rewrite is None:
            return usual
        records = json.loads(usual).get("data") or []
        return _dumps(
            {"ret": 200, "msg": "success", "traceId": TRACE_ID, "data": answer.rewrite(request, records)}
        )

    def _usual(self, request: Request) -> Answer:
        path, _, query = request.path.partition("?")
        if len(request.codes) > MAX_CODES:
            return REFUSALS["ret_505"]
        match request.resource:
            case "batch_trade":
                return self._trades(request)
            case "batch_kline":
                return self._klines(request)
            case "package/info":
                return Answer.data(self._plan(request.key).info())
            case "common/basic/symbols":
                return self._symbols(query)
            case "common/basic/markets/trading_days":
                return self._trading_days(query)
        return _problem(404, "Not Found", f"No static resource {request.resource}.", path)

    def _plan(self, key: str) -> Plan:
        """Return the plan of this key; one without has the server's own limits."""
        try:
            return self.plans[key]
        except KeyError:
            (per_second, _), (per_minute, _) = self._limits
            return Plan("Custom", per_second or NO_LIMIT_PER_SECOND, per_minute, None, 9, 600, 5_000)

    def _trades(self, request: Request) -> Answer:
        tick = self.tick
        if self._cache[0] != tick:
            self._cache = (tick, {})
        cache = self._cache[1]
        plan = self._plan(request.key)
        ended = int(plan.expires * 1_000) if plan.expires <= self.clock() else None
        records = []
        for code in dict.fromkeys(request.codes):
            if not self._knows(request.product, code):
                continue
            frozen = self._frozen_at(code, ended)
            if frozen is None and code not in self.trades and not self.lower_case:
                if code not in cache:
                    cache[code] = _dumps(make_record(code, tick, self._epoch_ms))
                records.append(cache[code])
            elif record := self._record_of(code, tick, frozen):
                records.append(_dumps(record | ({"s": code.lower()} if self.lower_case else {})))
        if not records:
            return self._nothing_known()
        trace = f"00000000-0000-4000-8000-{self.request_count:012x}".encode()
        envelope = b'{"ret":200,"msg":"success","traceId":"%b","data":[%b]}'
        return Answer(200, envelope % (trace, b",".join(records)))

    def _frozen_at(self, code: str, ended_ms: int | None = None) -> int | None:
        """Return the milliseconds at which this code's trades stopped; None: they go on."""
        return self.frozen.get(code, self.frozen.get(None, ended_ms))

    def _record_of(self, code: str, tick: int, frozen_ms: int | None) -> Record | None:
        """Return the trade of this code with all that was done to it; None: it has none."""
        record = make_record(code, tick if frozen_ms is None else 0, self._epoch_ms)
        if frozen_ms is not None:
            record["t"] = frozen_ms - 1 - zlib.crc32(code.encode()) % 60_000
        retouch = self.trades.get(code, {})
        return retouch(record) if callable(retouch) else record | dict(retouch)

    def _knows(self, product: str, code: str) -> bool:
        if code in self.unknown:
            return False
        if not self.listed_only and PRODUCTS[product].fullmatch(code) is not None:
            return True
        lists = (self.symbols.get(name, ()) for name, its in SYMBOL_TYPES.items() if its == product)
        return any(it["symbol"] == code for entries in lists for it in entries)

    def _symbols(self, query: str) -> Answer:
        """Return the answer to a request for a list, whole or narrowed to some symbols."""
        values = {name: found[0] for name, found in parse_qs(query).items()}
        if "type" not in values:
            return REFUSALS["ret_507"]
        if values["type"] not in SYMBOL_TYPES:
            return REFUSALS["ret_506"]
        entries = self.symbols.get(values["type"], [])
        if "symbols" in values:
            wanted = values["symbols"].split(",")
            entries = [it for it in entries if it["symbol"] in wanted]
        return Answer.data(entries)

    def _klines(self, request: Request) -> Answer:
        """Return the answer to a request for bars; too many are cut without a word."""
        kind, number = request.path.split("/")[3:5]
        if kind != DAILY or not number.isdecimal() or int(number) < 1:
            return REFUSALS["ret_506"]
        most = MAX_BARS if len(request.codes) == 1 else MAX_BARS_OF_SEVERAL
        count = min(int(number), most)
        codes = [code for code in dict.fromkeys(request.codes) if self._knows(request.product, code)]
        if not codes:
            return self._nothing_known()
        now = self._now(request.key)
        manners = {code: None if code in self.bars else self.suspended.get(code) for code in codes}
        return Answer.data(
            [
                {
                    "s": code.lower() if self.lower_case else code,
                    "respList": None if manner == "null" else self._bars(code, count, now),
                }
                for code, manner in manners.items()
                if manner != "absent"
            ]
        )

    def _now(self, key: str) -> float:
        """Return the time whose data this key gets."""
        return min(self.clock(), self._plan(key).expires)

    def _bars(self, code: str, count: int, now: float) -> list[Any]:
        """Return the newest `count` bars of this code: scripted ones, or what can be known of it now."""
        scripted = self.bars.get(code)
        if scripted is not None:
            return (scripted(now) if callable(scripted) else scripted)[:count]
        manner = self.suspended.get(code)
        if manner in ("empty", "null", "absent"):
            return []
        market = market_of(code)
        skipped = SUSPENDED_DAYS if manner == "stale" else 0
        flat = SUSPENDED_DAYS if manner == "zero" else 0
        days = list(itertools.islice(self._session_days(market, now), skipped + count + flat + 1))
        made = []
        for place, (day, begins, stands) in enumerate(days[skipped : skipped + count]):
            done = 1.0 if now >= stands else (now - begins) / (stands - begins)
            traded = days[flat][0] if place < flat < len(days) else None
            before = days[skipped + place + 1][0] if skipped + place + 1 < len(days) else None
            made.append(make_bar(code, day, done=done, before=before, suspended_since=traded))
        return made

    def _session_days(self, market: str, now: float) -> Iterator[tuple[datetime.date, float, float]]:
        """Yield the days whose session had begun by now, newest first, with its beginning and the bar's end."""
        day = datetime.datetime.fromtimestamp(now, ZoneInfo(MARKETS[market].zone)).date()
        for _ in range(3 * MAX_BARS):
            hours = self._hours(market, day)
            if hours is not None:
                begins, stands = (_moment(day, text, MARKETS[market].zone) for text in hours)
                if begins <= now:
                    yield day, begins, stands
            day -= datetime.timedelta(days=1)

    def _hours(self, market: str, day: datetime.date) -> tuple[str, str] | None:
        """Return when the session of this day begins and its bar stands; None: there is none."""
        name = f"{day:%Y%m%d}"
        if (market, name) in self.sessions:
            return self.sessions[market, name]
        its = MARKETS[market]
        if not its.weekends and (day.weekday() >= 5 or name in self.holidays):
            return None
        return its.begins, its.stands_early if name in self.half_days else its.stands

    def _trading_days(self, query: str) -> Answer:
        values = {name: found[0] for name, found in parse_qs(query).items()}
        try:
            first, last = (
                datetime.datetime.strptime(values[name], "%Y%m%d").date() for name in ("beginDay", "endDay")
            )
        except (KeyError, ValueError):
            return REFUSALS["400_problem"]
        market = values.get("market", "")
        if market not in MARKETS or market in ("CRYPTO", "COMMON"):
            return REFUSALS["ret_506"]
        spread = (first + datetime.timedelta(days=number) for number in range((last - first).days + 1))
        days = [f"{day:%Y%m%d}" for day in spread if self._hours(market, day) is not None]
        half = [day for day in days if day in self.half_days]
        full = [day for day in days if self.half_days_are_trade_days or day not in half]
        return Answer.data({"trade_days": full, "half_trade_days": half})

    # -------------------------------------------------------------------------------------------- delivery

    def _deliver(self, connection: socket.socket, request: Request, answer: Answer) -> bool:
        """Send an answer in its manner; return whether the connection may be used again."""
        latency = self.latency if isinstance(self.latency, (int, float)) else self.latency(request)
        if latency + answer.delay > 0 and self._closing.wait(latency + answer.delay):
            return False
        body = answer.body or b""
        headers = (("Content-Type", answer.content_type), *answer.headers)
        if self.date_offset_s is not None and "date" not in {name.lower() for name, _ in answer.headers}:
            headers += (("Date", formatdate(self.clock() + self.date_offset_s, usegmt=True)),)
        keep = request.headers.get("connection", "").lower() != "close"
        match answer.delivery:
            case "whole" | "gzip":
                if answer.delivery == "gzip" and "gzip" in request.headers.get("accept-encoding", ""):
                    body, headers = gzip.compress(body, 1), (*headers, ("Content-Encoding", "gzip"))
                connection.sendall(_head(answer.status, headers, len(body)) + body)
            case "chunked" | "cut_chunk" | "bad_chunk":
                return self._deliver_chunks(connection, answer, headers, body) and keep
            case "overstated":
                connection.sendall(_head(answer.status, headers, len(body) + 100) + body)
                return False
            case "understated":
                connection.sendall(_head(answer.status, headers, len(body) // 2) + body)
            case "cut_body":
                connection.sendall(_head(answer.status, headers, len(body)) + body[: len(body) // 2])
                return False
            case "cut_before":
                return False
            case "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return False
            case "hang":
                while connection.recv(CHUNK):
                    pass
                return False
            case "drip_head":
                return (
                    self._drip(connection, _head(answer.status, headers, len(body)) + body, answer.pace)
                    and keep
                )
            case "drip_body":
                connection.sendall(_head(answer.status, headers, len(body)))
                return self._drip(connection, body, answer.pace) and keep
            case "huge":
                self._deliver_huge(connection, answer, headers)
        return keep

    def _deliver_chunks(
        self, connection: socket.socket, answer: Answer, headers: tuple[tuple[str, str], ...], body: bytes
    ) -> bool:
        half = len(body) // 2
        connection.sendall(_head(answer.status, headers + CHUNKED, None) + _chunk(body[:half]))
        if answer.delivery == "cut_chunk":
            return False
        if answer.delivery == "bad_chunk":
            connection.sendall(b"zz\r\n" + body[half:] + b"\r\n0\r\n\r\n")
            return False
        connection.sendall(_chunk(body[half:]) + b"0\r\n\r\n")
        return True

    def _deliver_huge(
        self, connection: socket.socket, answer: Answer, headers: tuple[tuple[str, str], ...]
    ) -> None:
        start, end = b'{"ret":200,"msg":"', b'","data":[]}'
        count, rest = divmod(answer.size, CHUNK)
        pieces = itertools.chain([start], itertools.repeat(b"x" * CHUNK, count), [b"x" * rest + end])
        chunked = CHUNKED[0] in answer.headers
        connection.sendall(
            _head(answer.status, headers, None if chunked else len(start) + answer.size + len(end))
        )
        for piece in pieces:
            connection.sendall(_chunk(piece) if chunked else piece)
        if chunked:
            connection.sendall(b"0\r\n\r\n")

    def _drip(self, connection: socket.socket, text: bytes, pace: float) -> bool:
        for position in range(len(text)):
            if self._closing.wait(pace):
                return False
            connection.sendall(text[position : position + 1])
        return True


# ---------------------------------------------------------------------------------------------- small helpers


def make_record(code: str, tick: int, epoch_ms: int = EPOCH_MS) -> Record:
    """Return the trade of this code at this tick."""
    seed = zlib.crc32(code.encode())
    step = zlib.crc32(f"{code}#{tick}".encode())
    price = _usual(code) + step % min(1_000, _usual(code) // 100)  # thousandths
    scale = 5 if code.endswith(("USDT", "USDC")) else 0  # crypto trades fractions
    volume = 1 + step // 1_000 % 10_000
    return {
        "s": code,
        "t": epoch_ms + tick * TICK_MS + seed % TICK_MS,
        "p": _decimal(price, 3),
        "v": _decimal(volume, scale),
        "vw": _decimal(price * volume, 3 + scale),
        "td": step % 3,
    }


def make_bar(
    code: str,
    day: datetime.date | str,
    *,
    done: float = 1.0,
    before: datetime.date | None = None,
    suspended_since: datetime.date | None = None,
    **fields: str,
) -> Bar:
    """Return a made-up bar of this code and day, near the prices of its trades, and consistent in itself.

    `done` is the part of the session that is over: below 1 the bar is provisional and moves with it.
    `before` is the day that `pc` and `pca` compare with, `suspended_since` the last day on which there was a
    trade. `fields` replace its own; where `c` is among them, the other prices follow it.
    """
    day = datetime.date.fromisoformat(day) if isinstance(day, str) else day
    first, high, low, last = _prices(code, suspended_since or day)
    volume = 1 + zlib.crc32(f"{code}@{day}v".encode()) % 10_000_000
    scale = 5 if market_of(code) == "CRYPTO" else 0
    if suspended_since is not None:
        first = high = low = last
        volume = 0
    elif done < 1.0:
        standing = first + int((last - first) * done)
        standing += standing == last  # what is provisional can be told from what is not
        first, high, low, last = first, max(first, standing), min(first, standing), standing
        volume = int(volume * done)
    if is_index(code):
        volume = 0
    change = 0 if before is None or suspended_since is not None else last - _prices(code, before)[3]
    bar = {
        "t": str(int(_moment(day, "00:00", MARKETS[market_of(code)].zone))),
        "o": _thousandths(first),
        "h": _thousandths(high),
        "l": _thousandths(low),
        "c": _thousandths(last),
        "v": _decimal(volume, scale),
        "vw": _decimal(volume * ((first + high + low + last) // 4), 3 + scale),
        "pc": f"{100 * change / (last - change):.2f}%",
        "pca": _thousandths(change),
    }
    if "c" in fields:
        bar |= dict.fromkeys("ohl", fields["c"])
    return bar | fields


def is_index(code: str) -> bool:
    """Whether this is an index, whose bars have no volume."""
    return code.startswith(".") or code in INDICES or re.fullmatch(r"399\d{3}\.SZ", code) is not None


def _usual(code: str) -> int:
    """Return about what it costs, in thousandths: of a few codes as it is, of the others whatever their name gives."""
    return USUAL_PRICES.get(code, 1_000 + zlib.crc32(code.encode()) % 900_000)


def _prices(code: str, day: datetime.date) -> tuple[int, int, int, int]:
    """Return open, high, low and close of this day, in thousandths."""
    base = _usual(code)
    swing = max(base // 25, 20)
    opening, closing, above, below = (zlib.crc32(f"{code}@{day}{what}".encode()) for what in "ochl")
    first, last = (base - swing // 2 + number % swing for number in (opening, closing))
    reach = swing // 4
    return first, max(first, last) + above % reach, min(first, last) - below % reach, last


def _moment(day: datetime.date, clock: str, zone: str) -> float:
    """Return the epoch seconds of HH:MM there on this day; 24:00 is the next day's beginning."""
    hours, minutes = map(int, clock.split(":"))
    midnight = datetime.datetime(day.year, day.month, day.day, tzinfo=ZoneInfo(zone))
    return (midnight + datetime.timedelta(hours=hours, minutes=minutes)).timestamp()


def _thousandths(number: int) -> str:
    """Write number / 1000 with three places, as the API keeps its zeros."""
    return f"{'-' if number < 0 else ''}{abs(number) // 1000}.{abs(number) % 1000:03d}"


def _decimal(number: int, scale: int) -> str:
    """Write number / 10**scale without an exponent or needless zeros."""
    if scale == 0:
        return str(number)
    whole, part = divmod(number, 10**scale)
    return f"{whole}.{part:0{scale}d}".rstrip("0").rstrip(".")


def _parse(head: bytes, at: float) -> tuple[str, Request]:
    """Take a request's head apart; what makes no sense comes out empty and is refused later."""
    lines = head.decode("latin-1").split("\r\n")
    method, _, rest = lines[0].partition(" ")
    path = rest.rpartition(" ")[0] or "/"
    headers = {}
    for line in lines[1:]:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    product, codes = "", ""
    resource = path.partition("?")[0].removeprefix("/")
    match resource.split("/"):
        case [name, "batch_trade" as kind, codes] | [name, "batch_kline" as kind, _, _, codes] if (
            codes and name in PRODUCTS
        ):
            product, resource = name, kind
    asked = tuple(unquote(codes).split(",")) if product else ()
    return method, Request(at, path, product, asked, headers.get("apikey", ""), headers, resource=resource)


def _head(status: int, headers: Iterable[tuple[str, str]], length: int | None) -> bytes:
    lines = [f"HTTP/1.1 {status} {REASONS.get(status, 'Unknown')}"]
    lines += [f"{name}: {value}" for name, value in headers]
    if length is not None:
        lines.append(f"Content-Length: {length}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _chunk(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(body), body) if body else b""


def _shut(connection: socket.socket) -> None:
    """Wake whoever reads or writes it."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


# ------------------------------------------------------------------------------------------------- by hand


def _pair(names: Iterable[str]) -> Callable[[str], tuple[str, str]]:
    """Return what reads CODE=NAME of an argument."""

    def read(text: str) -> tuple[str, str]:
        code, _, name = text.rpartition("=")
        if not code or name not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is not CODE=NAME with one of {', '.join(names)}")
        return code, name

    return read


def _plan_of(text: str) -> tuple[str, Plan]:
    """Read [KEY=]PLAN of an argument."""
    key, _, name = text.rpartition("=")
    if name not in PLANS:
        raise argparse.ArgumentTypeError(f"{text!r} names none of the plans {', '.join(PLANS)}")
    return key, PLANS[name]


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="An Infoway market-data API on the loopback, with made-up trades."
    )
    add = parser.add_argument
    add("--port", type=int, default=0, help="default: a free one")
    add(
        "--key",
        action="append",
        metavar="KEY",
        help="a key that it accepts, may be repeated; default: test-key",
    )
    add(
        "--per-second",
        type=int,
        metavar="N",
        help="requests that a key may make in any second; default: no limit",
    )
    add(
        "--per-minute",
        type=int,
        metavar="N",
        help="requests that a key may make in any minute; default: no limit",
    )
    add(
        "--plan",
        action="append",
        default=[],
        type=_plan_of,
        metavar="[KEY=]PLAN",
        help=f"hold that key, or every one, to {', '.join(PLANS)}; may be repeated",
    )
    add(
        "--date-offset",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="by which its Date header is ahead; default: 0",
    )
    add(
        "--over",
        choices=RATE_REFUSALS,
        help="how it refuses what is over the limit; default: each way in turn",
    )
    add("--latency", type=float, default=0.0, metavar="SECONDS", help="before each answer; default: 0")
    add("--unknown", default="", metavar="CODES", help="comma-separated codes that it does not know")
    add(
        "--tick-every",
        type=float,
        metavar="SECONDS",
        help="new trades that often; default: the same ones for ever",
    )
    add(
        "--answer",
        choices=sorted(EVERY_REFUSAL),
        metavar="NAME",
        help="answer every request thus: %(choices)s",
    )
    add("--wrap-errors", action="store_true", help="business errors come as ret 500, whose text tells them")
    add("--lower-case", action="store_true", help="codes in its answers are in lower case")
    add(
        "--frozen",
        type=float,
        metavar="SECONDS",
        help="no trade since so many seconds before its start",
    )
    add(
        "--no-trade",
        action="append",
        default=[],
        type=_pair(NO_TRADES),
        metavar="CODE=KIND",
        help=f"a record that is no trade: {', '.join(NO_TRADES)}; may be repeated",
    )
    add(
        "--suspended",
        action="append",
        default=[],
        type=_pair(get_args(Suspension)),
        metavar="CODE=HOW",
        help=f"a share without bars of late: {', '.join(get_args(Suspension))}; may be repeated",
    )
    add("--listed-only", action="store_true", help="it knows only the codes of its symbol lists")
    add("--tls", action="store_true", help="https with a certificate of its own (needs openssl)")
    return parser


def _make_server(options: argparse.Namespace) -> InfowayServer:
    keys = options.key or ["test-key"]
    plans: dict[str, Plan] = {}
    for key, plan in options.plan:
        plans |= dict.fromkeys([key] if key else keys, plan)
    server = InfowayServer(
        keys=frozenset(keys),
        plans=plans,
        date_offset_s=options.date_offset,
        per_second=options.per_second,
        per_minute=options.per_minute,
        over=options.over,
        latency=options.latency,
        unknown=frozenset(filter(None, options.unknown.split(","))),
        script=(lambda _: EVERY_REFUSAL[options.answer]) if options.answer else (),
        wrap_errors=options.wrap_errors,
        suspended=dict(options.suspended),
        trades={code: NO_TRADES[kind] for code, kind in options.no_trade},
        lower_case=options.lower_case,
        listed_only=options.listed_only,
        epoch_ms=int(time.time() * 1000),
        tick_every=options.tick_every,
        record=False,
        tls=options.tls,
        port=options.port,
    )
    if options.frozen is not None:
        server.freeze(int((time.time() - options.frozen) * 1000))
    return server


def main(arguments: list[str] | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM."""
    server = _make_server(_make_parser().parse_args(arguments))
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    try:
        server.start()
    except OSError as error:
        print(
            f"cannot listen on 127.0.0.1:{server.port}: {os.strerror(error.errno or 0)}; "
            "end what listens there, or name another port: --port",
            file=sys.stderr,
        )
        return 1
    try:
        print(server.url, flush=True)
        if server.ca_file:
            print(f"its certificate: {server.ca_file}", flush=True)
        stopped.wait()
    finally:
        server.stop()
    print(f"{server.request_count} requests, {server.over_limit} over the limit", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
