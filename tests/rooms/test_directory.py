"""The API's symbol lists as a directory: asked for when something needs it, searched, and what it proposes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit.cases import each
from kit.chinese import in_chinese
from kit.clock import FakeClock
from kit.daemons import check_paced
from kit.infoway_server import REFUSALS, Answer, InfowayServer
from kit.ledger import NoLedger

from stockrt import (
    PLAN_RETRY_S,
    SYMBOL_TYPES,
    Directory,
    InfowayApi,
    Instrument,
    InstrumentError,
    KeyPool,
    Limits,
    LocalFile,
    Plan,
    UnclearCode,
    open_store_file,
    parse_code,
    read_symbols,
    symbol_names,
)

NO_LIMIT = Plan("0", 0, 0)


class World:
    """A server with lists, and a directory of them."""

    def __init__(self, folder: Path, server: InfowayServer, file: LocalFile) -> None:
        self.server = server
        self.file = file
        self.clock = FakeClock()
        self.stop = threading.Event()
        self.directory = self.another()

    def another(self) -> Directory:
        """Return the directory of another process."""
        api = InfowayApi(self.server.url, KeyPool([("test-key", NO_LIMIT)], NoLedger()))
        return Directory(self.file, api, self.clock)

    def types(self) -> list[str]:
        """Return the types that were asked for, in order."""
        return [request.path.rpartition("=")[2] for request in self.server.asked("common/basic/symbols")]

    def find(self, typed: str) -> Instrument | None:
        """Look up what was typed and is unclear."""
        with pytest.raises(UnclearCode) as caught:
            parse_code(typed)
        return self.directory.find(caught.value, self.stop)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with InfowayServer() as server, open_store_file(tmp_path) as file:
        yield World(tmp_path, server, file)


def test_each_list_is_asked_for_once_a_day_by_all_processes(world: World) -> None:
    assert world.directory.refresh(SYMBOL_TYPES, world.stop) == ""
    assert world.types() == list(SYMBOL_TYPES)
    assert world.directory.refresh(SYMBOL_TYPES, world.stop) == ""
    assert world.another().refresh(SYMBOL_TYPES, world.stop) == ""
    assert len(world.types()) == 13
    world.clock.advance(86_400)
    assert world.directory.refresh(["FOREX"], world.stop) == ""
    assert world.types()[13:] == ["FOREX"]


def test_the_lists_are_asked_for_under_the_limits_of_the_key(tmp_path: Path) -> None:
    def measure(folder: Path) -> tuple[int, float]:
        keys = KeyPool([("test-key", Plan("x", 10, 600))], NoLedger())
        with InfowayServer(per_second=10, per_minute=600) as server, open_store_file(folder) as file:
            began = time.monotonic()
            directory = Directory(file, InfowayApi(server.url, keys))
            assert directory.refresh(SYMBOL_TYPES, threading.Event()) == ""
            assert server.request_count == 13
            return server.over_limit, time.monotonic() - began

    check_paced(measure, tmp_path, 30)


def test_names_are_those_of_the_lists_that_are_here(world: World) -> None:
    """Nothing is asked for; what two lists have is called by both its names."""
    twin = {"symbol": "ES", "name_cn": "", "name_hk": "", "name_en": "Eversource", "index": False}
    world.server.symbols["INDICES"].append(twin)
    assert symbol_names(world.file, ["AAPL.US", "ES"]) == {}
    assert world.types() == []
    world.directory.refresh(["STOCK_US", "FUTURES", "INDICES", "STOCK_IN"], world.stop)
    codes = ["AAPL.US", "ES", "M&M.IN", "7203.JP", *(f"{n}.US" for n in range(40_000))]
    assert symbol_names(world.file, codes) == {
        "AAPL.US": "苹果",
        "ES": "标普500指数期货 / Eversource",
        "M&M.IN": "Mahindra & Mahindra Ltd",
    }


def test_a_list_that_cannot_be_had_is_not_asked_for_at_once_again(world: World) -> None:
    """What was had before stays."""
    world.directory.refresh(["STOCK_CN"], world.stop)
    world.clock.advance(86_400)
    world.server.script = lambda _: REFUSALS["502_html"]
    assert "502" in world.directory.refresh(SYMBOL_TYPES, world.stop)
    assert world.types()[1:] == ["STOCK_US"]
    assert world.directory.search("茅台")
    world.clock.advance(PLAN_RETRY_S)
    world.server.script = ()
    assert world.directory.refresh(SYMBOL_TYPES, world.stop) == ""


def test_a_server_that_hangs_is_waited_for_once(world: World) -> None:
    """Each list more would take as long, and a result wait for all of them."""
    world.server.script = lambda _: Answer.hang()
    api = InfowayApi(
        world.server.url, KeyPool([("test-key", NO_LIMIT)], NoLedger()), limits=Limits(1.0, 0.2, 0.5)
    )
    directory = Directory(world.file, api, world.clock)
    for kind in SYMBOL_TYPES:
        assert directory.refresh([kind], world.stop) != ""
    assert len(world.types()) == 1
    world.clock.advance(PLAN_RETRY_S)
    world.server.script = ()
    assert directory.refresh(["STOCK_US", "FOREX"], world.stop) == ""


def test_a_list_that_a_plan_lacks_costs_no_other(world: World) -> None:
    world.server.script = lambda request: REFUSALS["ret_514"] if "STOCK_US" in request.path else None
    assert "No permission" in world.directory.refresh(SYMBOL_TYPES, world.stop)
    assert world.types() == list(SYMBOL_TYPES)
    assert world.directory.search("茅台")


def test_a_list_that_was_not_had_for_a_stop_is_asked_for_by_the_next(world: World) -> None:
    world.stop.set()
    assert world.directory.refresh(["STOCK_CN"], world.stop) == "stopped"
    world.stop.clear()
    assert world.directory.refresh(["STOCK_CN"], world.stop) == ""
    assert world.types() == ["STOCK_CN"]


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("茅台", "600519.SH"), ("貴州", "600519.SH"), ("apple", "AAPL.US"), ("aapl", "AAPL.US"), ("黄金", "XAUUSD"),
        ("M&M", "M&M.IN"), ("XCUUSD_S", "XCUUSD_S"), ("币安", "币安人生USDT"), ("BTCUSDT", "BTCUSDT"), ("gold", "GC"),
    ],
)  # fmt: skip
def test_instruments_are_found_by_code_and_by_every_name(world: World, text: str, first: str) -> None:
    world.directory.refresh(SYMBOL_TYPES, world.stop)
    assert first in [symbol.code for symbol in world.directory.search(text)][:2]


@pytest.mark.parametrize("text", ["%", "_", "\\", "'", "%%%", "no such name"])
def test_what_means_something_to_sql_means_itself(world: World, text: str) -> None:
    world.directory.refresh(SYMBOL_TYPES, world.stop)
    for symbol in world.directory.search(text):
        assert any(text in field for field in symbol[1:])


def test_a_name_of_a_future_alone_is_that_future(world: World) -> None:
    """The lists route it to its product; only those are asked for that can have it."""
    assert world.find("ES") == Instrument("ES", "common")
    assert sorted(world.types()) == sorted(
        ["STOCK_US", "CRYPTO", "FOREX", "FUTURES", "ENERGY", "METAL", "INDICES"]
    )
    assert world.find("币安人生usdt") == Instrument("币安人生USDT", "crypto")


@pytest.mark.parametrize(
    ("typed", "proposed"),
    [
        ("AAPL", "AAPL.US (苹果)"),
        ("005930", "005930.KS (三星电子)"),
        ("茅台", "600519.SH (贵州茅台)"),
        ("700", "00700.HK (腾讯控股)"),
    ],
)
def test_what_stays_unclear_proposes_what_exists(world: World, typed: str, proposed: str) -> None:
    with pytest.raises(InstrumentError) as caught:
        world.find(typed)
    assert proposed in str(caught.value)


def test_that_the_lists_cannot_be_had_is_said_once_for_many_codes(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.server.script = lambda _: REFUSALS["502_html"]
    for typed in ("AAPL", "MSFT", "茅台"):
        assert world.find(typed) is None
    (said,) = [record.getMessage() for record in caplog.records if "lists cannot be had" in record.message]
    assert "502" in said
    world.clock.advance(PLAN_RETRY_S)
    world.find("AAPL")
    assert len([record for record in caplog.records if "lists cannot be had" in record.message]) == 2


def test_two_that_are_called_alike_are_both_proposed(world: World) -> None:
    world.server.symbols["STOCK_US"].append(
        {"symbol": "ES.US", "name_cn": "永源能源", "name_hk": "", "name_en": "", "index": False}
    )
    with pytest.raises(InstrumentError, match=r"common:ES \(标普500指数期货\) or ES.US \(永源能源\)"):
        world.find("ES")


def test_what_the_lists_know_can_be_read_in_chinese(world: World) -> None:
    with pytest.raises(InstrumentError) as caught:
        world.find("700")
    assert in_chinese(caught.value.message) == "未写明是哪个品种：是不是 00700.HK（腾讯控股）？"
    explain = world.directory.explain
    assert in_chinese(explain(Instrument("7203.JP", "japan"), world.stop)) == (
        "API 的品种列表中有该代码（丰田汽车），但没有其成交，或此密钥的套餐不包含"
    )
    told = in_chinese(explain(Instrument("9999.JP", "japan"), world.stop))
    assert told == "API 不认识该代码：所有品种列表中都没有"
    world.server.script = lambda _: Answer.html(403, "no")
    assert in_chinese(world.directory.refresh(["STOCK_IN"], world.stop)) == (
        "HTTP 403，被网关拒绝：原因可能是密钥、地区或风控"
    )
    assert in_chinese(world.directory.refresh(["STOCK_IN"], world.stop)) == "刚才查询过，没有结果"
    world.stop.set()
    assert in_chinese(world.directory.refresh(["STOCK_TW"], world.stop)) == "已停止"


def test_what_no_list_knows_stays_as_it_was_refused(world: World) -> None:
    assert world.find("QQQQX") is None
    assert world.find("火星") is None


@each("data", [None, {}, "x"])
def test_what_is_no_list_is_none(data: object) -> None:
    assert read_symbols("FOREX", {"ret": 200, "data": data}) is None
    assert read_symbols("FOREX", {"ret": 500, "data": []}) is None


def test_odd_entries_of_a_list_are_left_out() -> None:
    odd = [None, 7, {}, {"symbol": 7}, {"symbol": ""}, {"symbol": "A\n"}, {"symbol": "A" * 99}]
    good = {"symbol": "EURUSD", "name_cn": None, "name_en": "Euro\x1b"}
    (found,) = read_symbols("FOREX", {"ret": 200, "data": [*odd, good]}) or []
    assert found.code == "EURUSD" and found.name == "Euro\\x1b"


def test_a_wrong_code_is_told_from_one_that_the_plan_lacks(world: World) -> None:
    """Where the lists cannot be had nothing is told."""
    explain = world.directory.explain
    assert explain(Instrument("7203.JP", "japan"), world.stop) == (
        "the API lists it as 丰田汽车, but has no trade of it, or not for this key's plan"
    )
    assert explain(Instrument("9999.JP", "japan"), world.stop) == "unknown to the API: in none of its lists"
    assert world.types() == ["STOCK_JP"]
    assert "none of its lists" in explain(Instrument("NOPEUSDT", "stock"), world.stop)
    assert world.types() == ["STOCK_JP", "CRYPTO"]
    assert "lists it as 锌现货" in explain(Instrument("ZINCSPOT", "stock"), world.stop)
    assert sorted(world.types()[2:]) == ["ENERGY", "FOREX", "FUTURES", "INDICES", "METAL"]
    world.server.script = lambda _: REFUSALS["502_html"]
    assert explain(Instrument("7203.IN", "india"), world.stop) == ""
