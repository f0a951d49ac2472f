"""Fetching: whatever the API answers, nothing is lost, nothing is made up, and no limit is broken."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import re
import select
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from email.utils import format_datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import RunPyz
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.cases import each
from kit.chinese import in_chinese
from kit.clock import FakeClock
from kit.daemons import PATIENCE, check_paced, number, until
from kit.infoway_server import (
    EVERY_REFUSAL,
    RATE_REFUSALS,
    REFUSALS,
    SPOILERS,
    Answer,
    InfowayServer,
    Record,
    Request,
    make_record,
)
from kit.ledger import NoLedger

import stockrt
from stockrt import (
    API_LIMITS,
    MAX_BATCH,
    MAX_IN_FLIGHT,
    MAX_REFUSALS,
    MAX_TRIES,
    PLANS,
    Batch,
    BatchAttempt,
    Collector,
    Document,
    Events,
    Failure,
    FailureKind,
    HttpConnection,
    InfowayApi,
    Keeper,
    KeyPool,
    Lease,
    Limits,
    Plan,
    Report,
    SqliteStore,
    WriteReport,
    open_store_file,
)

NO_LIMIT = Plan("0", 0, 0)
SHORT = Limits(connect_s=1.0, read_s=0.2, whole_s=0.5)
# Limits that nobody lives to see: what ends before them was ended by something else.
ENDLESSLY = Limits(connect_s=3600.0, read_s=3600.0, whole_s=3600.0)
FIELDS = ("s", "t", "p", "v", "vw", "td")
STOCKS = ("AAPL.US", "00700.HK", "600519.SH", "000001.SZ")


LOGIN_PAGE = Answer.html(401, "Log in to the guests' network")


class Hasty(random.Random):
    """Draws the least each time: back-off without waiting."""

    def uniform(self, a: float, b: float) -> float:
        return a


class Run(NamedTuple):
    """What a run reported and what it left in the store, by code."""

    report: Report
    stored: dict[str, Record]


@contextlib.contextmanager
def api_of(
    server: InfowayServer,
    *keys: str,
    plan: Plan = NO_LIMIT,
    limits: Limits = API_LIMITS,
    rng: random.Random | None = None,
) -> Iterator[InfowayApi]:
    """Yield a client of the server, for "test-key" unless other keys are named."""
    pool = KeyPool([(key, plan) for key in keys or ("test-key",)], NoLedger())
    with contextlib.closing(InfowayApi(server.url, pool, rng=rng or Hasty(), limits=limits)) as api:
        yield api


def collect(
    api: InfowayApi, codes: Iterable[object], folder: Path, stop: threading.Event | None = None
) -> Run:
    """Run once into the embedded store."""
    with open_store_file(folder) as file:
        report = Collector(api, SqliteStore(file), Keeper()).run(codes, stop or threading.Event())
    return Run(report, read_back(folder))


def read_back(folder: Path) -> dict[str, Record]:
    """Return the trades of the store's file, each code with its one trade."""
    with contextlib.closing(sqlite3.connect(folder / "stockrt.db")) as db:
        rows = db.execute("SELECT s, t, p, v, vw, td FROM realtime").fetchall()
    stored = {row[0]: dict(zip(FIELDS, row, strict=True)) for row in rows}
    assert len(stored) == len(rows)
    return stored


def has_stored(folder: Path) -> bool:
    """Return whether the store's file has a trade."""
    with contextlib.suppress(sqlite3.Error):
        return (folder / "stockrt.db").exists() and bool(read_back(folder))
    return False


def check_truth(run: Run, server: InfowayServer, codes: Sequence[str]) -> None:
    """Every code is stored as the API has it or named as failed, never both, and the counts say so."""
    report = run.report
    assert set(run.stored) | set(report.failures) == set(codes)
    assert not set(run.stored) & set(report.failures)
    assert run.stored == {code: server.record(code) for code in run.stored}
    assert (report.total, report.stored, report.duplicates) == (len(set(codes)), len(run.stored), 0)
    assert report.complete == (not report.failures)
    assert all(reason and "fault of stockrt itself" not in reason for _, reason in report.failures.values())


def check_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    assert not [record.getMessage() for record in caplog.records if record.exc_info]


def share_codes(count: int) -> list[str]:
    """Return that many codes of Shanghai."""
    return [f"{600_000 + number}.SH" for number in range(count)]


# ---------------------------------------------------------------------------------------- 250 mixed codes

HOSTILE = "../../x"
UNKNOWN = ("GONE.US", "NOPEUSDT")
CURRENCY_PAIRS = (
    "USDCNY EURUSD GBPUSD USDJPY AUDUSD NZDUSD USDCAD USDCHF USDHKD USDSGD EURGBP EURJPY GBPJPY XAUUSD XAGUSD "
    "USDKRW USDTWD USDINR USDTHB EURCHF"
).split()
COINS = (
    "BTC ETH BNB SOL XRP ADA DOGE LTC BCH DOT TRX LINK AVAX UNI ATOM XLM ETC FIL APT ARB OP NEAR INJ SUI SEI TIA"
).split()


def mixed_codes() -> tuple[list[str], dict[str, str]]:
    """Return 250 codes as people type them, and the good ones' (code of the API -> product)."""
    good = {f"U{number:03}.US": ("stock", f"U{number:03}.US") for number in range(91)}
    good |= {f"{number:05}.HK": ("stock", f"{number:05}.HK") for number in range(1, 31)}
    good |= {f"{number}.HK": ("stock", f"00{number}.HK") for number in range(700, 730)}
    good |= {f"{600_500 + number}": ("stock", f"{600_500 + number}.SH") for number in range(30)}
    good |= {f"{number:06}": ("stock", f"{number:06}.SZ") for number in range(1, 21)}
    good |= {pair: ("common", pair) for pair in CURRENCY_PAIRS}
    good |= {f"{coin}USDT": ("crypto", f"{coin}USDT") for coin in COINS}
    typed = [*good, *UNKNOWN, HOSTILE]
    random.Random(7).shuffle(typed)
    assert len(typed) == 250
    return typed, {code: product for product, code in good.values()}


def check_mixed_requests(server: InfowayServer, products: dict[str, str]) -> None:
    """Every good code was asked once, at its product; the unknown ones at theirs, then at stock."""
    requests = server.asked("batch_trade")
    asked = [(code, request.product) for request in requests for code in request.codes]
    assert sorted(pair for pair in asked if pair[0] in products) == sorted(products.items())
    assert [pair for pair in asked if pair[0] == "GONE.US"] == [("GONE.US", "stock")]
    assert [pair for pair in asked if pair[0] == "NOPEUSDT"] == [
        ("NOPEUSDT", "crypto"),
        ("NOPEUSDT", "stock"),
    ]
    assert len(asked) == len(products) + 3
    assert max(len(request.codes) for request in requests) <= MAX_BATCH
    assert all(request.path.startswith(f"/{request.product}/batch_trade/") for request in requests)


def test_mixed_codes(tmp_path: Path) -> None:
    typed, products = mixed_codes()
    with InfowayServer(unknown=UNKNOWN) as server, api_of(server) as api:
        run = collect(api, typed, tmp_path)
        check_mixed_requests(server, products)
        check_truth(run, server, [*products, *UNKNOWN, HOSTILE])
    assert set(run.report.failures) == {*UNKNOWN, HOSTILE}
    assert not run.report.complete


def test_never_more_than_100_codes_in_a_request_and_each_once(infoway: InfowayServer, tmp_path: Path) -> None:
    codes = share_codes(1_234)
    with api_of(infoway) as api:
        run = collect(api, [*codes, *codes, *(code.lower() for code in codes)], tmp_path)
    check_truth(run, infoway, codes)
    assert sorted(infoway.codes_asked()) == codes
    assert infoway.request_count == 13
    assert max(len(request.codes) for request in infoway.requests) == MAX_BATCH


@pytest.mark.parametrize(
    "code",
    [
        HOSTILE,
        "AAPL.US/../../x",
        "AAPL.US?x=1",
        "AAPL.US#x",
        "AAPL%2eUS",
        "AAPL.US\r\nX-Evil: 1",
        "AAPL.US\0",
        "..",
        "..US",
        "A" * 33 + ".US",
        "http://127.0.0.1/",
        "stock:../crypto/batch_trade/BTCUSDT",
        "AAPL.US\uff0fbatch_trade",  # a slash of full width: normalised, it is one
        "",
        "\ud800.US",
    ],
)
def test_hostile_code_makes_no_request(infoway: InfowayServer, tmp_path: Path, code: str) -> None:
    with api_of(infoway) as api:
        run = collect(api, [code], tmp_path)
    assert (infoway.connections, infoway.request_count) == (0, 0)
    assert (run.report.total, len(run.report.failures), run.stored) == (1, 1, {})
    assert all(name.isprintable() for name in run.report.failures)


@pytest.mark.parametrize("form", ["ret_508", "ret_500", "data_null"])
def test_unknown_codes_are_asked_once_more_at_stock(tmp_path: Path, form: Any) -> None:
    with InfowayServer(all_unknown=form) as server, api_of(server) as api:
        server.unknown = {"NOPEUSDT", "9999.JP"}
        run = collect(api, ["NOPEUSDT", "common:ZZZ", "9999.JP", "stock:YYY"], tmp_path)
    assert (run.report.total, run.report.stored) == (4, 0)
    unknown = Failure(FailureKind.UNKNOWN_CODE, "unknown to the API, or not in this key's plan")
    named = {
        typed: Failure(unknown.kind, f"{unknown.words} ({typed} -> {typed[-3:]})")
        for typed in ("common:ZZZ", "stock:YYY")
    }
    assert run.report.failures == dict.fromkeys(("NOPEUSDT", "9999.JP"), unknown) | named
    asked = [(request.product, code) for request in server.requests for code in request.codes]
    first = [("common", "ZZZ"), ("crypto", "NOPEUSDT"), ("japan", "9999.JP"), ("stock", "YYY")]
    assert sorted(asked[:4]) == first
    assert sorted(asked[4:]) == [("stock", "9999.JP"), ("stock", "NOPEUSDT"), ("stock", "ZZZ")]


def test_code_that_stock_knows_after_all_is_stored(infoway: InfowayServer, tmp_path: Path) -> None:
    """Some of a product's codes live at `stock`, the others are where they were looked for."""

    def script(request: Request) -> Answer | None:
        if request.product == "japan":
            return Answer.data([make_record("7203.JP", 0)])
        return Answer.data([make_record(code, 0) for code in request.codes if code == "6758.JP"])

    infoway.script = script
    with api_of(infoway) as api:
        run = collect(api, ["7203.JP", "6758.JP", "0000.JP"], tmp_path)
    assert (set(run.stored), set(run.report.failures)) == ({"7203.JP", "6758.JP"}, {"0000.JP"})
    asked = [(request.product, request.codes) for request in infoway.requests]
    assert asked == [("japan", ("7203.JP", "6758.JP", "0000.JP")), ("stock", ("6758.JP", "0000.JP"))]


# ------------------------------------------------------------------------------------------- every answer

REDIRECT = Answer.raw(302, "", [("Location", "/stock/batch_trade/AAPL.US")])

# What follows from an answer's text is decided without a network: test_decide.py has every text. Here one of each
# kind comes over a connection, and everything that only a connection can spoil.

# Worth another try: the same request gets its usual answer next.
TRANSIENT: dict[str, Answer] = {
    **{name: REFUSALS[name] for name in ("200_rate_limit", "429_html", "ret_500", "500_empty", "503_html")},
    "no_content": Answer.empty(204),
    "malformed_json": Answer.malformed_json(),
    "nested": Answer.nested(),
    "short_body": Answer.short_body(),
    "understated_length": Answer.understated_length(),
    "cut_before_answer": Answer.cut_before_answer(),
    "reset": Answer.reset(),
    "cut_mid_body": Answer.cut_mid_body(),
    "cut_chunk": Answer.cut_chunk(),
    "bad_chunk": Answer.bad_chunk(),
    "gzip_broken": Answer.gzip_broken(),
}
# Would be the same the next time.
FINAL: dict[str, Answer] = {
    **{name: REFUSALS[name] for name in ("ret_505", "404_problem")},
    "redirect": REDIRECT,
    "redirect_with_body": Answer.html(307).with_headers(("Location", "http://127.0.0.1:9/")),
    "huge": Answer.huge(17 << 20),
    "huge_chunked": Answer.huge(17 << 20, chunked=True),
    "gzip_bomb": Answer.gzip_bomb(64 << 20),
}
KEY_OUT = {name: REFUSALS[name] for name in ("401_token_invalid", "ret_502", "ret_514")}
CODES_UNKNOWN = {"ret_508": REFUSALS["ret_508"]}
# Their bodies never come to an end in time.
ENDLESS = {
    "hang": Answer.hang(),
    "drip_head": Answer.drip("head", 0.05),
    "drip_body": Answer.drip("body", 0.05),
}


@pytest.mark.parametrize("name", TRANSIENT)
def test_transient_answer_is_retried(
    infoway: InfowayServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    infoway.script = [TRANSIENT[name]]
    with api_of(infoway) as api:
        run = collect(api, STOCKS, tmp_path)
    check_truth(run, infoway, STOCKS)
    assert run.report.complete
    # What follows an understated length may spoil the connection for one request more.
    assert 2 <= infoway.request_count <= 2 + (name == "understated_length")
    check_no_traceback(caplog)


@pytest.mark.parametrize("name", FINAL)
def test_final_answer_is_not_asked_for_again(
    infoway: InfowayServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    infoway.script = [FINAL[name]]
    with api_of(infoway) as api:
        run = collect(api, STOCKS, tmp_path)
        assert infoway.request_count == 1
        check_truth(run, infoway, STOCKS)
        assert not run.stored
        # Nothing of it is left on the connection that would spoil the next one.
        assert collect(api, STOCKS, tmp_path).report.complete
    assert infoway.request_count == 2
    check_no_traceback(caplog)


@pytest.mark.parametrize("name", [*TRANSIENT, *FINAL, *KEY_OUT, *CODES_UNKNOWN])
def test_answer_that_never_changes_ends_the_run_without_success(
    infoway: InfowayServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    answer = {**TRANSIENT, **FINAL, **KEY_OUT, **CODES_UNKNOWN}[name]
    infoway.script = lambda _: answer
    with api_of(infoway) as api:
        run = collect(api, STOCKS, tmp_path)
    check_truth(run, infoway, STOCKS)
    assert not run.stored and not run.report.complete
    bound = MAX_REFUSALS if name in RATE_REFUSALS else MAX_TRIES if name in TRANSIENT else 1
    assert infoway.request_count <= bound
    check_no_traceback(caplog)


@pytest.mark.parametrize("name", ENDLESS)
def test_endless_answer_is_cut_and_asked_for_again(
    infoway: InfowayServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    infoway.script = [ENDLESS[name]]
    with api_of(infoway, limits=SHORT) as api:
        run = collect(api, STOCKS, tmp_path)
    check_truth(run, infoway, STOCKS)
    assert run.report.complete
    assert infoway.request_count == 2
    check_no_traceback(caplog)


@contextlib.contextmanager
def warm_api(server: InfowayServer, folder: Path, limits: Limits = API_LIMITS) -> Iterator[InfowayApi]:
    """Yield a client that has asked once: its connection stands."""
    with api_of(server, limits=limits) as api:
        assert collect(api, STOCKS, folder / "warm").report.complete
        server.requests.clear()
        yield api


class SlowLedger(NoLedger):
    """Waits for `released` before it lends."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.released = threading.Event()

    def lease(self, digest: str, plan: Plan, now: float, made: Sequence[float] = ()) -> Lease:
        """Lend some."""
        self.asked.set()
        assert self.released.wait(10 * PATIENCE)
        return Lease(3, now + 3600)


def test_a_ledger_that_takes_long_holds_up_no_stop(infoway: InfowayServer, tmp_path: Path) -> None:
    ledger = SlowLedger()
    pool = KeyPool([("test-key", NO_LIMIT)], ledger)
    stop = threading.Event()
    with contextlib.closing(InfowayApi(infoway.url, pool, rng=Hasty())) as api:
        thread = threading.Thread(target=lambda: collect(api, share_codes(400), tmp_path, stop))
        thread.start()
        assert ledger.asked.wait(PATIENCE)
        stop.set()
        thread.join(PATIENCE)
        assert not thread.is_alive()
        ledger.released.set()


class Heard(Events):
    """Keeps what is told of requests."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, float | None]] = []

    def asked(self, kind: str, seconds: float | None) -> None:
        """Keep it."""
        self.requests.append((kind, seconds))


def test_of_a_request_is_told_what_followed_and_how_long_it_took(
    infoway: InfowayServer, tmp_path: Path
) -> None:
    infoway.script = [REFUSALS["503_html"], Answer.cut_before_answer()]
    heard = Heard()
    pool = KeyPool([("test-key", NO_LIMIT)], NoLedger())
    with contextlib.closing(InfowayApi(infoway.url, pool, events=heard, rng=Hasty())) as api:
        assert collect(api, STOCKS, tmp_path / "1").report.complete
        infoway.stop()
        collect(api, STOCKS, tmp_path / "2")
    kinds = [kind for kind, _ in heard.requests]
    assert kinds == ["retry", "no_answer", "accept", *["no_answer"] * MAX_TRIES]
    for kind, seconds in heard.requests:
        if kind == "no_answer":
            assert seconds is None
        else:
            assert seconds is not None and seconds > 0


@pytest.mark.parametrize("warm", [False, True])
def test_a_silence_is_cut_long_before_the_limit_of_the_whole(
    infoway: InfowayServer, tmp_path: Path, warm: bool
) -> None:
    limits = Limits(connect_s=1.0, read_s=0.2, whole_s=3600.0)
    maker = warm_api(infoway, tmp_path, limits) if warm else api_of(infoway, limits=limits)
    with maker as api:
        infoway.script = [Answer.hang()]
        assert collect(api, STOCKS, tmp_path).report.complete


def test_what_waits_is_stored_while_an_answer_is_waited_for(infoway: InfowayServer, tmp_path: Path) -> None:
    """The second answer comes when the trades of the first are in the store."""
    stored = threading.Event()

    class Store(SqliteStore):
        def write(self, documents: Sequence[Document]) -> WriteReport:
            report = super().write(documents)
            stored.set()
            return report

    answers = iter([None])
    waited: list[bool] = []

    def script(_: Request) -> Answer | None:
        if next(answers, ...) is ...:
            waited.append(stored.wait(PATIENCE))
        return None

    with warm_api(infoway, tmp_path) as api, open_store_file(tmp_path) as file:
        infoway.script = script
        report = Collector(api, Store(file), Keeper()).run(share_codes(200), threading.Event())
    assert report.stored == 200
    assert waited == [True]


def test_server_that_always_drips_is_given_up(infoway: InfowayServer, tmp_path: Path) -> None:
    infoway.script = lambda _: ENDLESS["drip_body"]
    with api_of(infoway, limits=SHORT) as api:
        run = collect(api, STOCKS, tmp_path)
    assert infoway.request_count == MAX_TRIES
    assert set(run.report.failures) == set(STOCKS)
    assert all("no whole answer within" in reason for _, reason in run.report.failures.values())


@pytest.mark.parametrize(
    "answer", [Answer.chunked(), Answer.gzip(), Answer.drip("head", 0.0), Answer.drip("body", 0.0)]
)
def test_odd_but_good_answer(infoway: InfowayServer, tmp_path: Path, answer: Answer) -> None:
    infoway.script = [answer]
    with api_of(infoway) as api:
        run = collect(api, STOCKS, tmp_path / "1")
        assert run.report.complete
        assert collect(api, STOCKS, tmp_path / "2").report.complete
    check_truth(run, infoway, STOCKS)
    assert (infoway.request_count, infoway.connections) == (2, 1)


@each("status", [101, 102, 103, 199])
def test_an_announced_answer_is_not_taken_for_that_to_the_next_request(status: int) -> None:
    """An early hint leaves the answer on the way: whoever asked again over the connection would get it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connections: list[str] = []

        def serve() -> None:
            for _ in range(2):
                peer, _address = listener.accept()
                with peer:
                    asked = peer.recv(65536).split()[1].decode()
                    connections.append(asked)
                    if asked == "/first":
                        peer.sendall(f"HTTP/1.1 {status} Wait\r\nLink: </x>\r\n\r\n".encode())
                        if not peer.recv(65536):
                            continue
                    peer.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {len(asked)}\r\n\r\n{asked}".encode())

        server = threading.Thread(target=serve, daemon=True)
        server.start()
        connection = HttpConnection(f"http://127.0.0.1:{listener.getsockname()[1]}")
        try:
            announced = (connection.open() or connection.get("/first", {})).fault
            second = connection.open() or connection.get("/second", {})
        finally:
            connection.close()
    assert str(status) in announced
    assert second.body == b"/second"


def test_gzip_is_understood_unasked(infoway: InfowayServer, tmp_path: Path) -> None:
    import gzip

    body = json.dumps({"ret": 200, "data": [make_record(code, 0) for code in STOCKS]}).encode()
    infoway.script = [Answer.raw(200, gzip.compress(body), [("Content-Encoding", "gzip")])]
    with api_of(infoway) as api:
        run = collect(api, STOCKS, tmp_path)
    check_truth(run, infoway, STOCKS)
    assert infoway.request_count == 1 and run.report.complete


def test_a_gzip_stream_without_its_second_half_is_not_taken(infoway: InfowayServer, tmp_path: Path) -> None:
    import gzip

    body = json.dumps({"ret": 200, "data": [make_record(code, 0) for code in STOCKS]}).encode()
    cut = gzip.compress(body)
    cut = cut[: len(cut) // 2]
    infoway.script = [Answer.raw(200, cut, [("Content-Encoding", "gzip")]), None]
    with api_of(infoway) as api:
        run = collect(api, STOCKS, tmp_path)
    check_truth(run, infoway, STOCKS)
    assert infoway.request_count == 2 and run.report.complete


@pytest.mark.parametrize(
    ("answer", "bars", "words"),
    [
        (Answer.empty(403), 0, "HTTP 403，被网关拒绝：原因可能是密钥、地区或风控；请检查 INFOWAY_API_KEY"),
        (REFUSALS["500_json"], 2, "API 返回 500：System error，共尝试 2 次"),
        (
            Answer.json({"ret": 0, "msg": "success"}),
            2,
            "API 应答成功（ret 为 0），但没有成交数据，共尝试 2 次",
        ),
        (
            REFUSALS["ret_502"],
            0,
            "没有 API 密钥可用于 stock：密钥 ***：当日额度已用完（API 返回 502：Request frequency for the day "
            "upper limit），TIME 恢复；可增加密钥或升级套餐",
        ),
        (
            Answer.empty(503).with_headers(("Retry-After", "3000")),
            0,
            "HTTP 503，要求等待 3000 秒",
        ),
        (
            LOGIN_PAGE,
            0,
            "没有 API 密钥可用于 stock：密钥 ***：HTTP 401，不像 API 的应答，像是来自途中的网关或登录页，"
            "TIME 恢复；请检查 INFOWAY_API_BASE_URL",
        ),
    ],
)
def test_why_a_batch_failed_can_be_read_in_chinese(
    infoway: InfowayServer, answer: Answer, bars: int, words: str
) -> None:
    infoway.script = lambda _: answer
    with api_of(infoway) as api:
        outcomes = [*filter(None, api.fetch([Batch("stock", "AAPL.US", bars)], threading.Event()))]
    said = [text for text in ("System error", "Request frequency for the day upper limit") if text in words]
    told = in_chinese(outcomes[0].failures["AAPL.US"].words, *said)
    assert re.sub(r"\d{4}-\S+Z", "TIME", told) == words


def test_what_was_refused_when_it_is_interrupted_is_told_with_that(
    infoway: InfowayServer, tmp_path: Path
) -> None:
    """It was asked for; what was not asked for yet is left."""
    stop = threading.Event()

    def refuse(_: Request) -> Answer:
        stop.set()
        return REFUSALS["429_json"]

    infoway.script = refuse
    with api_of(infoway) as api:
        report = collect(api, ["AAPL.US"], tmp_path, stop).report
    assert report.interrupted and report.failures["AAPL.US"].words == "HTTP 429: Rate limit exceeded"
    assert "interrupted: 0 not done" in report.summary()


def test_redirection_is_not_followed(infoway: InfowayServer, tmp_path: Path) -> None:
    with InfowayServer() as elsewhere, api_of(infoway) as api:
        location = ("Location", f"{elsewhere.url}/stock/batch_trade/AAPL.US")
        infoway.script = lambda _: Answer.empty(302).with_headers(location)
        run = collect(api, ["AAPL.US"], tmp_path)
        assert elsewhere.connections == 0  # and has not seen the key
    assert "redirection" in run.report.failures["AAPL.US"].words


def test_good_rows_of_a_half_bad_answer_are_stored(
    infoway: InfowayServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # A negative number is a number: it is stored as it was sent.
    bad = [name for name in SPOILERS if name != "negative_v"]
    codes = share_codes(2 * len(bad))
    ways = dict(zip(codes[::2], bad, strict=True))

    def spoil(_: Request, records: list[Record]) -> list[Any]:
        spoilt = [SPOILERS[ways[r["s"]]](r) if r["s"] in ways else r for r in records]
        return [None, *spoilt, 7, records[1] | {"s": "NOTASKED.US"}, records[1], records[1]]

    infoway.script = lambda _: Answer.rewritten(spoil)
    with api_of(infoway) as api:
        run = collect(api, codes, tmp_path)
    check_truth(run, infoway, codes)
    assert set(run.stored) == set(codes[1::2])
    for code, way in ways.items():
        if named := re.search(r"_(p|t|td)$", way):
            assert f"field {named[1]}" in run.report.failures[code].words, way
    check_no_traceback(caplog)


@pytest.mark.parametrize("value", ["9" * 5_000, "-" + "9" * 5_000, "1e400", "NaN", "[" * 50 + "]" * 50])
@pytest.mark.parametrize("name", FIELDS)
def test_monstrous_number_costs_the_neighbours_nothing(
    infoway: InfowayServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, value: str
) -> None:
    good, bad = (json.dumps(make_record(code, 0)) for code in STOCKS[:2])
    bad = re.sub(rf'"{name}": ("[^"]*"|\d+)', f'"{name}": {value}', bad)
    infoway.script = lambda _: Answer.raw(200, f'{{"ret":200,"data":[{bad},{good}]}}')
    with api_of(infoway) as api:
        run = collect(api, STOCKS[:2], tmp_path)
    check_truth(run, infoway, STOCKS[:2])
    assert set(run.stored) == set(STOCKS[:1])
    assert infoway.request_count == 1
    check_no_traceback(caplog)


def test_of_several_records_of_a_code_the_latest_counts(infoway: InfowayServer, tmp_path: Path) -> None:
    old, new = make_record("AAPL.US", 1), make_record("AAPL.US", 0)
    old["t"] = new["t"] - 1
    infoway.script = [Answer.data([old, new, old])]
    with api_of(infoway) as api:
        run = collect(api, ["AAPL.US"], tmp_path)
    check_truth(run, infoway, ["AAPL.US"])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
field_names = st.sampled_from(FIELDS)
spoilt_records = st.builds(
    lambda code, name, value: make_record(code, 0) | {name: value},
    st.sampled_from(STOCKS[2:]),
    field_names,
    json_values,
)
envelopes = st.one_of(
    json_values,
    st.fixed_dictionaries(
        {},
        optional={
            "ret": st.sampled_from([200, "200", 0, 500, 501, 508, None]) | json_values,
            "code": st.integers(400, 520) | json_values,
            "msg": st.sampled_from(["success", "All product not exists"]) | json_values,
            "detail": st.just("Rate limit exceeded") | json_values,
            "data": json_values | st.lists(json_values | spoilt_records, max_size=4),
        },
    ),
)


@pytest.fixture(scope="module")
def scripted() -> Iterator[InfowayServer]:
    """A server for hypothesis, whose examples share it."""
    with InfowayServer(record=False) as server:
        yield server


@pytest.fixture(scope="module")
def asked(scripted: InfowayServer) -> Callable[[Answer], Any]:
    """Give a callable that asks for STOCKS and gets that answer for ever; it returns what became of it."""

    def ask(answer: Answer) -> Any:
        scripted.script = lambda _: answer
        with api_of(scripted) as api:
            return api.ask(
                connection, BatchAttempt(Batch("stock", ",".join(STOCKS)), threading.Event(), Hasty())
            )

    connection = HttpConnection(scripted.url)
    return ask


@settings(max_examples=number(150, 1500, quick=20), deadline=None)
@given(value=envelopes, status=st.sampled_from([200, 200, 200, 400, 404, 429, 500, 503]))
def test_random_json(asked: Callable[[Answer], Any], value: Any, status: int) -> None:
    outcome = asked(Answer.json(value, status))
    codes = [trade.s for trade in outcome.trades]
    assert sorted([*codes, *outcome.unknown, *outcome.failures]) == sorted(STOCKS)
    assert not any("fault of stockrt" in reason for _, reason in outcome.failures.values())
    if codes:
        assert isinstance(value, dict) and type(value["ret"]) is int and value["ret"] == 200
        # Nothing is made up: each trade is a record of the answer, a number at most written as text.
        sent = [json.dumps(record, default=str) for record in value["data"] if isinstance(record, dict)]
        for trade in outcome.trades:
            assert [type(field) for field in trade] == [str, int, str, str, str, int]
            assert all(Decimal(number).is_finite() for number in (trade.p, trade.v, trade.vw))
            assert any(
                all(str(json.loads(text)[name]) == str(getattr(trade, name)) for name in FIELDS)
                for text in sent
                if set(FIELDS) <= set(json.loads(text))
            )


@settings(max_examples=number(150, 1500, quick=20), deadline=None)
@given(junk=st.lists(json_values | spoilt_records, max_size=5), place=st.integers(0, 5))
def test_random_records_cost_the_good_ones_nothing(
    asked: Callable[[Answer], Any], junk: list[Any], place: int
) -> None:
    good = [make_record(code, 0) for code in STOCKS[:2]]
    outcome = asked(Answer.data([*junk[:place], good[0], *junk[place:], good[1]]))
    taken = {trade.s: trade._asdict() for trade in outcome.trades}
    assert [taken.get(record["s"]) for record in good] == good


# ------------------------------------------------------------------------------------- rate and Retry-After


def gap(server: InfowayServer) -> float:
    """Return the seconds between the first two requests."""
    return server.requests[1].at - server.requests[0].at


@pytest.mark.parametrize("name", ["429_json", "429_html", "200_rate_limit", "503_html"])
def test_retry_after_is_obeyed(infoway: InfowayServer, tmp_path: Path, name: str) -> None:
    infoway.script = [REFUSALS[name].with_headers(("Retry-After", "1"))]
    with api_of(infoway) as api:
        run = collect(api, STOCKS, tmp_path)
    assert run.report.complete and infoway.request_count == 2
    assert gap(infoway) >= 1.0


def test_retry_after_may_be_a_date(infoway: InfowayServer, tmp_path: Path) -> None:
    def refuse_one(_: Request) -> Answer | None:
        if infoway.request_count:
            return None
        at = datetime.now(UTC) + timedelta(seconds=2)  # the header cuts it to whole seconds
        return REFUSALS["429_html"].with_headers(("Retry-After", format_datetime(at, usegmt=True)))

    infoway.script = refuse_one
    with api_of(infoway) as api:
        run = collect(api, STOCKS, tmp_path)
    assert run.report.complete
    assert gap(infoway) > 0.8


def test_retry_after_holds_for_the_whole_key(tmp_path: Path) -> None:
    """Requests of other batches wait too, not only the refused one."""
    told = threading.Event()

    class Told(Events):
        def asked(self, kind: str, seconds: float | None) -> None:
            if kind == "slow_down":
                told.set()

    refused: list[float] = []

    def refuse_one(request: Request) -> Answer | None:
        if refused:
            return None
        refused.append(request.at)
        return REFUSALS["429_json"].with_headers(("Retry-After", "1"))

    def latency(request: Request) -> float:
        """What was under way beside the refused one is answered when the client knows of the refusal."""
        if refused and request.at != refused[0]:
            told.wait(PATIENCE)
        return 0.05

    with InfowayServer(latency=latency) as server:
        pool = KeyPool([("test-key", NO_LIMIT)], NoLedger())
        with contextlib.closing(InfowayApi(server.url, pool, events=Told(), rng=Hasty())) as api:
            collect(api, share_codes(2_000), tmp_path / "warm")  # from here on several are in flight
            before = server.request_count
            server.script = refuse_one
            server.bump()
            assert collect(api, share_codes(20_000), tmp_path).report.complete
        after = [request.at - refused[0] for request in server.requests[before:]]
        assert sum(0 < seconds < 1.0 for seconds in after) <= 2 * MAX_IN_FLIGHT, "of 200"


def test_an_answer_to_a_batch_is_refused_above_a_mebibyte(infoway: InfowayServer, tmp_path: Path) -> None:
    """It is no answer to a hundred codes: not read to its end, nor asked for again; just below it is taken."""
    infoway.script = [Answer.huge(stockrt.MAX_BATCH_BYTES)]
    with api_of(infoway) as api:
        run = collect(api, STOCKS, tmp_path)
    assert infoway.request_count == 1
    assert {reason for _, reason in run.report.failures.values()} == {"an answer of more than 1 MiB"}
    infoway.script = [Answer.huge(stockrt.MAX_BATCH_BYTES - 100)]
    with api_of(infoway) as api:
        run = collect(api, STOCKS, tmp_path)
    assert run.report.failures and "MiB" not in repr(run.report.failures)


def test_big_answers_in_flight_take_little_memory(infoway: InfowayServer) -> None:
    """What four batches at once are read into when each answer is as big as one may be."""
    record = json.dumps(
        {"s": "XXXX.US", "t": 1786751999691, "p": "305.771", "v": "1", "vw": "305.771", "td": 0}
    )
    records = ",".join([record] * (stockrt.MAX_BATCH_BYTES // 90))
    body = f'{{"ret":200,"msg":"success","data":[{records}]}}'
    infoway.script = lambda _: Answer.raw(200, body)
    infoway.latency = 0.2
    tracemalloc.start()
    try:
        with api_of(infoway) as api:
            batches = [stockrt.Batch("stock", f"A{number}.US") for number in range(5)]
            outcomes = [outcome for outcome in api.fetch(batches, threading.Event()) if outcome]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [outcome.unknown for outcome in outcomes] != [] and len(outcomes) == 5
    assert infoway.peak_in_flight >= 2
    assert peak < 150_000_000


def test_retry_after_beyond_all_patience_is_not_waited_for(infoway: InfowayServer, tmp_path: Path) -> None:
    infoway.script = lambda _: REFUSALS["429_json"].with_headers(("Retry-After", "3600"))
    with api_of(infoway) as api:
        run = collect(api, [*STOCKS, "BTCUSDT"], tmp_path)
    assert infoway.request_count == 1
    assert set(run.report.failures) == {*STOCKS, "BTCUSDT"}
    assert all("HTTP 429" in reason and "back at" in reason for _, reason in run.report.failures.values())


@pytest.mark.parametrize("header", ["", "soon", "-1", "1e9", "٣", "Mon, 99 Foo 2026", "0", "9" * 400])
def test_odd_retry_after(
    infoway: InfowayServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, header: str
) -> None:
    infoway.script = [REFUSALS["429_json"].with_headers(("Retry-After", header.encode().decode("latin-1")))]
    with api_of(infoway) as api:
        run = collect(api, STOCKS, tmp_path)
    check_truth(run, infoway, STOCKS)
    assert run.report.complete
    check_no_traceback(caplog)


class ServerProcess:
    """A server in a process of its own: what the tests do meanwhile does not delay it."""

    def __init__(self, *args: str) -> None:
        program = Path(__file__).parents[1] / "kit" / "infoway_server.py"
        self._process = subprocess.Popen([sys.executable, program, *args], stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def end(self) -> tuple[int, int]:
        """End it and return how many requests came, and how many of them over the limit."""
        self._process.send_signal(signal.SIGTERM)
        out, _ = self._process.communicate()
        requests, over = re.findall(r"\d+", out)
        return int(requests), int(over)


def test_5000_codes_at_10_requests_a_second(tmp_path: Path) -> None:
    codes = share_codes(5_000)
    least = (50 - 1) // 10  # ten at once, then ten each second

    def measure(folder: Path) -> tuple[int, float]:
        with ServerProcess("--per-second", "10") as server:
            pool = KeyPool([("test-key", PLANS["premium"])], NoLedger())
            with contextlib.closing(InfowayApi(server.url, pool)) as api:
                run = collect(api, codes, folder)
            requests, over = server.end()
        assert run.report.complete and run.report.stored == 5_000
        assert {code: record["p"] for code, record in run.stored.items()} == {
            code: make_record(code, 0)["p"] for code in codes
        }
        assert requests == 50 + over and run.report.took_s >= least
        return over, run.report.took_s

    check_paced(measure, tmp_path, 1.10 * least)


def test_rates_of_several_keys_add_up(tmp_path: Path) -> None:
    keys = ("first-key", "second-key")
    codes = share_codes(3_000)
    least = (15 - 1) // 5

    def measure(folder: Path) -> tuple[int, float]:
        with (
            InfowayServer(keys=frozenset(keys), per_second=5) as server,
            api_of(server, *keys, plan=Plan("5", 5, 300)) as api,
        ):
            run = collect(api, codes, folder)
            check_truth(run, server, codes)
            assert run.report.complete and run.report.took_s >= least
            used = [sum(request.key == key for request in server.requests) for key in keys]
            assert sum(used) == 30 + server.over_limit and min(used) >= 14
            return server.over_limit, run.report.took_s

    check_paced(measure, tmp_path, 1.25 * least)


def test_server_with_less_than_the_plan_loses_nothing(tmp_path: Path) -> None:
    """The plan is set too high: every form of refusal comes, every trade does too."""
    codes = share_codes(1_500)
    with (
        InfowayServer(per_second=3) as server,
        api_of(server, plan=PLANS["premium"], rng=random.Random(1)) as api,
    ):
        run = collect(api, codes, tmp_path)
        check_truth(run, server, codes)
        assert run.report.complete
        assert server.over_limit >= len(RATE_REFUSALS)


def test_several_requests_are_in_flight_when_the_latency_asks_for_it(tmp_path: Path) -> None:
    codes = share_codes(6_000)
    with InfowayServer(latency=0.1) as server, api_of(server) as api:
        run = collect(api, codes, tmp_path)
        check_truth(run, server, codes)
        assert run.report.complete
        assert 4 <= server.peak_in_flight <= MAX_IN_FLIGHT
        assert server.connections <= MAX_IN_FLIGHT  # kept alive


def test_in_flight_stays_what_the_rate_can_feed(tmp_path: Path) -> None:
    def measure(folder: Path) -> tuple[int, float]:
        with (
            InfowayServer(per_second=10, latency=0.3) as server,
            api_of(server, plan=PLANS["premium"]) as api,
        ):
            run = collect(api, share_codes(2_500), folder)
            assert run.report.complete
            assert 2 <= server.peak_in_flight <= 10
            return server.over_limit, run.report.took_s

    check_paced(measure, tmp_path, 25 * 0.3 / 2)  # one after the other takes 7.5 s


# -------------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize("name", ["401_token_invalid", "ret_509", "ret_502"])
def test_key_that_is_out_leaves_the_work_to_the_other(
    infoway: InfowayServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    codes = [*share_codes(500), "BTCUSDT"]
    infoway.script = lambda request: REFUSALS[name] if request.key == "worn-key" else None
    with api_of(infoway, "worn-key", "test-key") as api:
        run = collect(api, codes, tmp_path)
    check_truth(run, infoway, codes)
    assert run.report.complete
    assert [request.key for request in infoway.requests].count("worn-key") == 1
    assert "worn-key" not in caplog.text  # it is a secret


@pytest.mark.parametrize("name", ["401_token_invalid", "ret_509", "ret_502"])
def test_all_keys_out_is_said_of_every_code_and_ends_the_run(
    infoway: InfowayServer, tmp_path: Path, name: str
) -> None:
    codes = [*share_codes(500), "BTCUSDT"]
    infoway.script = lambda _: REFUSALS[name]
    with api_of(infoway, "first-key", "second-key") as api:
        run = collect(api, codes, tmp_path)
    assert infoway.request_count == 2
    assert set(run.report.failures) == set(codes)
    words = {"401_token_invalid": "Token invalid", "ret_509": "expired", "ret_502": "upper limit"}
    for _, reason in run.report.failures.values():
        assert words[name] in reason and ("INFOWAY_API_KEY" in reason) == (name != "ret_502")
        assert "first-key" not in reason and "second-key" not in reason


def test_a_401_that_is_not_the_apis_own_costs_the_key_a_rest_only(
    infoway: InfowayServer, tmp_path: Path
) -> None:
    """A captive portal on the way: this run ends at once and says so; a minute on the key is used again."""
    infoway.script = [LOGIN_PAGE]
    clock = FakeClock(time.time())
    pool = KeyPool([("test-key", Plan("0", 0, 0))], NoLedger(), clock)
    api = InfowayApi(infoway.url, pool)
    with open_store_file(tmp_path) as file:
        first = Collector(api, SqliteStore(file), Keeper()).run(STOCKS, threading.Event())
        assert infoway.request_count == 1
        ((kind, reason),) = set(first.failures.values())
        assert kind is FailureKind.KEY
        assert "HTTP 401, not in the API's words" in reason and "back at" in reason
        clock.advance(stockrt.DOUBT_FIRST_S + 0.1)
        assert Collector(api, SqliteStore(file), Keeper()).run(STOCKS, threading.Event()).complete
    api.close()


def test_key_without_a_market_serves_the_others(infoway: InfowayServer, tmp_path: Path) -> None:
    infoway.script = lambda request: REFUSALS["ret_514"] if request.product == "crypto" else None
    with api_of(infoway) as api:
        run = collect(api, [*STOCKS, "BTCUSDT", "ETHUSDT", "USDCNY"], tmp_path)
    assert set(run.stored) == {*STOCKS, "USDCNY"}
    assert set(run.report.failures) == {"BTCUSDT", "ETHUSDT"}
    assert all("not included in the plan" in reason for _, reason in run.report.failures.values())


def test_market_that_one_key_lacks_is_served_by_the_other(infoway: InfowayServer, tmp_path: Path) -> None:
    def script(request: Request) -> Answer | None:
        lacks = request.key == "small-key" and request.product == "crypto"
        return REFUSALS["ret_514"] if lacks else None

    infoway.keys = {"small-key", "test-key"}
    infoway.script = script
    codes = [f"{coin}USDT" for coin in COINS] + ["USDCNY"]
    with api_of(infoway, "small-key", "test-key") as api:
        run = collect(api, codes, tmp_path)
        check_truth(run, infoway, codes)
        assert run.report.complete
        collect(api, codes, tmp_path)
    asked = [(request.key, request.product) for request in infoway.requests]
    assert asked.count(("small-key", "crypto")) == 1
    assert ("small-key", "common") in asked


def test_key_told_to_rest_for_long_leaves_the_work_to_the_other(
    infoway: InfowayServer, tmp_path: Path
) -> None:
    resting = REFUSALS["429_json"].with_headers(("Retry-After", "3600"))
    infoway.script = lambda request: resting if request.key == "worn-key" else None
    with api_of(infoway, "worn-key", "test-key") as api:
        run = collect(api, STOCKS, tmp_path)
    check_truth(run, infoway, STOCKS)
    assert run.report.complete


# --------------------------------------------------------------------------------------------- connections


def test_connection_closed_unannounced_loses_nothing(tmp_path: Path) -> None:
    codes = share_codes(2_000)
    with InfowayServer(requests_per_connection=3) as server, api_of(server) as api:
        run = collect(api, codes, tmp_path)
        check_truth(run, server, codes)
        assert run.report.complete


def test_server_away_then_back(infoway: InfowayServer, tmp_path: Path) -> None:
    with api_of(infoway) as api:
        assert collect(api, STOCKS, tmp_path / "1").report.complete
        infoway.stop()
        away = collect(api, STOCKS, tmp_path / "2")
        assert set(away.report.failures) == set(STOCKS) and not away.stored
        assert all("refused" in reason.lower() for _, reason in away.report.failures.values())
        infoway.start()
        assert collect(api, STOCKS, tmp_path / "2").report.complete


def test_server_that_comes_back_within_the_tries(tmp_path: Path) -> None:
    """Back-off is what bridges a server's restart."""
    with InfowayServer() as server, api_of(server, rng=random.Random(3)) as api:
        server.stop()
        back = threading.Timer(0.3, server.start)
        back.start()
        try:
            run = collect(api, STOCKS, tmp_path)
        finally:
            back.join()
        assert run.report.complete


def test_certificate_that_is_not_trusted(tmp_path: Path) -> None:
    with InfowayServer(tls=True) as server, api_of(server) as api:
        run = collect(api, STOCKS, tmp_path)
        assert (server.connections, server.request_count) == (1, 0)  # not tried again
    assert set(run.report.failures) == set(STOCKS)
    assert all("certificate" in reason.lower() for _, reason in run.report.failures.values())


def test_certificate_of_ssl_cert_file(start_pyz: RunPyz) -> None:
    with InfowayServer(tls=True) as server:
        env = {"INFOWAY_API_KEY": "test-key", "INFOWAY_API_BASE_URL": server.url, "INFOWAY_PLAN": "0"}
        refused = start_pyz("--once", "--codes", "AAPL.US", env=env)
        assert refused.returncode == 1
        assert "certificate" in refused.stderr.lower() and "Traceback" not in refused.stderr
        assert server.request_count == 0
        done = start_pyz("--once", "--codes", "AAPL.US", env=env | {"SSL_CERT_FILE": str(server.ca_file)})
        assert (done.returncode, server.codes_asked()) == (0, ["AAPL.US"]), done.stderr


class Relay:
    """Passes connections on to a server; once told so, no more than some bytes of answers over those there are."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._sockets: list[socket.socket] = []
        self._left: dict[socket.socket, int] = {}
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"https://127.0.0.1:{self._listener.getsockname()[1]}"
        self.stalled = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def stall_after(self, size: int) -> None:
        """Hold back what servers send from now on but the first bytes; new connections are not held up."""
        self._left = dict.fromkeys(self._sockets, size)

    def close(self) -> None:
        """Cut everything."""
        for one in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._port))
                self._sockets += [client, server]
                for source, target in ((client, server), (server, client)):
                    threading.Thread(target=self._pass_on, args=(source, target), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                left = (
                    self._left.get(target, len(data)) if source.getpeername()[1] == self._port else len(data)
                )
                target.sendall(data[:left])
                if left < len(data):
                    self._left[target] = 0
                    self.stalled.set()


@pytest.fixture
def relayed(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[InfowayServer, Relay]]:
    with InfowayServer(tls=True) as server, contextlib.closing(Relay(server.port)) as relay:
        monkeypatch.setenv("SSL_CERT_FILE", str(server.ca_file))
        yield server, relay


@contextlib.contextmanager
def relayed_api(relay: Relay, folder: Path, limits: Limits) -> Iterator[InfowayApi]:
    """Yield a client over TLS with a connection that stands, and has the next answer stall in a record."""
    pool = KeyPool([("test-key", NO_LIMIT)], NoLedger())
    with contextlib.closing(InfowayApi(relay.url, pool, rng=Hasty(), limits=limits)) as api:
        assert collect(api, STOCKS, folder / "warm").report.complete
        relay.stall_after(40)
        yield api


def test_a_record_of_tls_that_never_ends_is_cut(relayed: tuple[InfowayServer, Relay], tmp_path: Path) -> None:
    server, relay = relayed
    with relayed_api(relay, tmp_path, Limits(connect_s=3600.0, read_s=3600.0, whole_s=0.5)) as api:
        run = collect(api, STOCKS, tmp_path)
    assert relay.stalled.is_set()
    check_truth(run, server, STOCKS)
    assert run.report.complete


def test_stop_ends_a_record_of_tls_that_never_ends(
    relayed: tuple[InfowayServer, Relay], tmp_path: Path
) -> None:
    _, relay = relayed
    stop = threading.Event()
    with relayed_api(relay, tmp_path, ENDLESSLY) as api:
        thread = threading.Thread(target=lambda: collect(api, STOCKS, tmp_path, stop))
        thread.start()
        assert relay.stalled.wait(PATIENCE)
        stop.set()
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_what_tls_says_to_itself_does_not_end_a_connection(relayed: tuple[InfowayServer, Relay]) -> None:
    """A server sends session tickets after the handshake: they arrive while a key is waited for."""
    server, relay = relayed
    connection = HttpConnection(relay.url)

    with contextlib.closing(connection):
        assert connection.open() is None
        poll = select.poll()
        poll.register(connection.sock, select.POLLIN)
        assert poll.poll(PATIENCE * 1000)
        assert connection.open() is None
        assert connection.get("/stock/batch_trade/AAPL.US", {"apiKey": "test-key"}).status == 200
    assert server.connections == 1


def test_plain_http_server_called_https(infoway: InfowayServer, tmp_path: Path) -> None:
    url, pool = infoway.url.replace("http:", "https:"), KeyPool([("test-key", NO_LIMIT)], NoLedger())
    short = Limits(connect_s=0.2, read_s=0.2, whole_s=0.5)  # it waits for the rest of a request's head
    with contextlib.closing(InfowayApi(url, pool, rng=Hasty(), limits=short)) as api:
        run = collect(api, STOCKS, tmp_path)
    assert set(run.report.failures) == set(STOCKS)
    assert infoway.request_count == 0


# -------------------------------------------------------------------------------------------------- stopping


def fetch_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "stockrt-fetch"}


@pytest.fixture
def check_threads_end() -> Callable[[], None]:
    """Fail unless the client's threads are gone or go now; those that an earlier test has left are not its."""
    others = fetch_threads()

    def check() -> None:
        deadline = time.monotonic() + PATIENCE
        for thread in fetch_threads() - others:
            thread.join(max(0.0, deadline - time.monotonic()))
        assert fetch_threads() <= others

    return check


def test_stop_ends_a_run_under_a_hanging_server(
    infoway: InfowayServer, tmp_path: Path, check_threads_end: Callable[[], None]
) -> None:
    codes = share_codes(1_000)
    first = iter([None])  # the usual answer once, then silence
    infoway.script = lambda _: next(first, Answer.hang())
    stop = threading.Event()
    ended: list[Run] = []
    with api_of(infoway, limits=ENDLESSLY) as api:
        thread = threading.Thread(target=lambda: ended.append(collect(api, codes, tmp_path, stop)))
        thread.start()
        infoway.wait_for(lambda it: it.request_count >= 2)
        assert until(lambda: has_stored(tmp_path))
        stop.set()
        thread.join(PATIENCE)
        assert not thread.is_alive()
    report = ended[0].report
    assert report.interrupted and not report.complete and not report.failures
    assert sorted(ended[0].stored) == codes[:100] and report.stored == 100
    check_threads_end()


@pytest.mark.parametrize("answer", [Answer.hang(), Answer.drip("body", 0.05)], ids=["hang", "drip"])
def test_stop_ends_a_request_over_a_connection_that_stood(
    infoway: InfowayServer, tmp_path: Path, answer: Answer
) -> None:
    codes = share_codes(1_000)
    first = iter([None])
    stop = threading.Event()
    ended: list[Run] = []
    with warm_api(infoway, tmp_path, ENDLESSLY) as api:
        infoway.script = lambda _: next(first, answer)
        thread = threading.Thread(target=lambda: ended.append(collect(api, codes, tmp_path, stop)))
        thread.start()
        infoway.wait_for(lambda it: len(it.requests) >= 2)
        assert until(lambda: has_stored(tmp_path))
        stop.set()
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert len(ended[0].stored) == 100 and ended[0].report.interrupted


@pytest.mark.parametrize("answer", [Answer.hang(), REFUSALS["503_html"].with_headers(("Retry-After", "50"))])
def test_stop_ends_every_wait(
    infoway: InfowayServer, tmp_path: Path, check_threads_end: Callable[[], None], answer: Answer
) -> None:
    """For an answer, for the back-off, and for the key of a plan with few requests."""
    infoway.script = [answer]
    stop = threading.Event()
    with api_of(infoway, plan=Plan("0.001", 0.001, 1), limits=ENDLESSLY) as api:
        thread = threading.Thread(target=lambda: collect(api, share_codes(500), tmp_path, stop))
        thread.start()
        infoway.wait_for(lambda it: it.request_count == 1)
        stop.set()
        thread.join(PATIENCE)
        assert not thread.is_alive()
    check_threads_end()


class GatedStore:
    """A store whose first write waits for `gate`."""

    def __init__(self, store: SqliteStore) -> None:
        self.entered = threading.Event()
        self.gate = threading.Event()
        self._store = store

    def write(self, documents: Sequence[Document]) -> WriteReport:
        """Write when the gate is open."""
        self.entered.set()
        assert self.gate.wait(10 * PATIENCE)
        return self._store.write(documents)

    def check(self) -> str:
        """As the store behind."""
        return self._store.check()


def test_what_was_fetched_before_the_stop_is_stored(tmp_path: Path) -> None:
    """The store is slow, answers wait to be taken, and then comes the stop."""
    codes = share_codes(2_000)
    stop = threading.Event()
    reports: list[Report] = []
    heard, pool = Heard(), KeyPool([("test-key", NO_LIMIT)], NoLedger())
    with (
        InfowayServer(latency=0.05) as server,
        contextlib.closing(InfowayApi(server.url, pool, events=heard, rng=Hasty())) as api,
        open_store_file(tmp_path) as file,
    ):
        store = GatedStore(SqliteStore(file))
        thread = threading.Thread(
            target=lambda: reports.append(Collector(api, store, Keeper()).run(codes, stop))
        )
        thread.start()
        assert store.entered.wait(PATIENCE)
        assert until(lambda: len(heard.requests) == 20)
        stop.set()
        store.gate.set()
        thread.join(PATIENCE)
        assert not thread.is_alive()
        assert reports[0].stored == 2_000
        assert len(read_back(tmp_path)) == 2_000


def test_threads_and_files_do_not_leak(tmp_path: Path, check_threads_end: Callable[[], None]) -> None:
    with InfowayServer(latency=0.005) as server:
        for number in range(50):
            stop = threading.Event()
            server.script = [None, Answer.hang()] if number % 2 else ()
            with api_of(server) as api:
                thread = threading.Thread(target=lambda: collect(api, share_codes(400), tmp_path, stop))  # noqa: B023
                thread.start()
                if number % 2:
                    server.wait_for(lambda it: it.in_flight > 0)
                    stop.set()
                thread.join(PATIENCE)
                assert not thread.is_alive()
            if number == 5:
                check_threads_end()
                files = len(os.listdir("/proc/self/fd"))
        check_threads_end()
        server.wait_for(lambda it: it.in_flight == 0)
        assert len(os.listdir("/proc/self/fd")) <= files + 10


# ---------------------------------------------------------------------------------------------------- memory

# Runs a command and prints its peak in KiB. A process of its own: what forks lends its size to the child.
MEASURE = """
import os, sys
out = os.open(os.devnull, os.O_WRONLY)
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, out, 1)])
_, status, usage = os.wait4(pid, 0)
print(os.waitstatus_to_exitcode(status), usage.ru_maxrss)
"""


MANY = number(100_000, 100_000, quick=25_000)


def test_memory_does_not_grow_with_the_number_of_codes(
    pyz: Path, clean_env: dict[str, str], tmp_path: Path
) -> None:
    peaks = {}
    with ServerProcess() as server:
        env = clean_env | {
            "INFOWAY_API_KEY": "test-key",
            "INFOWAY_API_BASE_URL": server.url,
            "INFOWAY_PLAN": "0",
        }
        # The first unpacks the program and does not count.
        for count in (10, 1_000, MANY):
            file = tmp_path / f"{count}.txt"
            file.write_text("\n".join(f"C{number:06}.US" for number in range(count)))
            command = [sys.executable, pyz, "--once", "--codes-file", file, "--json"]
            state = {"STATE_DIRECTORY": str(tmp_path / f"state{count}")}
            done = subprocess.run(
                [sys.executable, "-S", "-c", MEASURE, *map(str, command)],
                env=env | state,
                capture_output=True,
                text=True,
                timeout=120,
            )
            status, peak = map(int, done.stdout.split())
            assert status == 0, done.stderr
            assert f"total {count}, stored {count}" in done.stderr
            peaks[count] = peak / 1024
    logging.getLogger(__name__).info("peaks in MiB: %s", peaks)
    assert peaks[MANY] - peaks[1_000] <= 10, peaks


# ------------------------------------------------------------------------------------------ nothing but refusals


def test_after_nothing_but_refusals_the_next_run_begins_with_a_single_request(
    infoway: InfowayServer, tmp_path: Path
) -> None:
    """It spares the rest while that goes on, and is at full speed once it is over."""
    codes = [f"S{chr(65 + n // 26 % 26)}{chr(65 + n % 26)}{chr(65 + n // 676)}.US" for n in range(1_000)]
    infoway.script = lambda _: EVERY_REFUSAL["403_html"]
    with api_of(infoway) as api:
        first = collect(api, codes, tmp_path / "1")
        assert infoway.request_count == 10
        for _ in range(2):
            again = collect(api, codes, tmp_path / "2")
            assert len(again.report.failures) == len(first.report.failures) == 1_000
        assert infoway.request_count == 12
        assert len(again.stored) == 0
        words = {failure.words for failure in again.report.failures.values()}
        assert sum(text.startswith("not asked for, as") for text in words) == 1
        assert all("HTTP 403" in text and "INFOWAY_API_KEY" in text for text in words)
        infoway.script = ()
        mended = collect(api, codes, tmp_path / "3")
        assert (len(mended.stored), mended.report.failures) == (1_000, {})
        assert infoway.request_count == 22


def test_a_refusal_of_one_product_spares_no_other(infoway: InfowayServer, tmp_path: Path) -> None:
    infoway.script = lambda _: EVERY_REFUSAL["403_html"]
    with api_of(infoway) as api:
        collect(api, ["AAPL.US", "BTCUSDT"], tmp_path / "1")
        infoway.script = lambda request: EVERY_REFUSAL["403_html"] if request.product == "crypto" else None
        run = collect(api, ["BTCUSDT", "AAPL.US"], tmp_path / "2")
    assert (set(run.stored), set(run.report.failures)) == ({"AAPL.US"}, {"BTCUSDT"})


@pytest.mark.parametrize("script", [[None], [REFUSALS["400_problem"]]], ids=["one is good", "two reasons"])
def test_a_run_that_was_not_all_refused_for_one_reason_makes_nobody_careful(
    infoway: InfowayServer, tmp_path: Path, script: list[Answer | None]
) -> None:
    codes = [f"S{chr(65 + n // 26)}{chr(65 + n % 26)}.US" for n in range(500)]
    answers = iter(script)
    infoway.script = lambda _: next(answers, EVERY_REFUSAL["499_json"])
    with api_of(infoway) as api:
        collect(api, codes, tmp_path / "1")
        collect(api, codes, tmp_path / "2")
    assert infoway.request_count == 10


def test_old_trades_of_an_open_market_are_counted(infoway: InfowayServer, tmp_path: Path) -> None:
    """A frozen feed, or one code that is suspended; the others are not meant."""
    now_ms = int(time.time() * 1000)
    old_ms = now_ms - 20 * 86_400_000
    ages = {
        "600519.SH": old_ms,
        "AAPL.US": old_ms - 5,
        "BTCUSDT": now_ms - 7_200_000,
        "MSFT.US": now_ms - 7_200_000,
    }
    infoway.trades = {code: {"t": t} for code, t in ages.items()}
    with api_of(infoway) as api:
        report = collect(api, list(ages), tmp_path).report
    assert (report.stored, report.stale, report.stale_since) == (4, 3, now_ms - 7_200_000)
    assert report.stale_words().startswith("3 of 4 codes: no trade since ")
