"""What is collected without anybody asking: the watch list and its shares, polls beside a run, the beat."""

from __future__ import annotations

import itertools
import logging
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pymongo
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.cases import each
from kit.chinese import in_chinese
from kit.clock import FakeClock
from kit.daemons import PATIENCE, check_paced, until
from kit.infoway_server import Answer, InfowayServer, Request
from kit.ledger import NoLedger
from kit.mongo_proxy import MongoProxy

import stockrt
from rooms.test_spool import quick
from stockrt import (
    LOOK_EVERY_S,
    Beat,
    Directory,
    InfowayApi,
    Instrument,
    KeyPool,
    MongoStore,
    Pipeline,
    Plan,
    Poller,
    Settings,
    StockrtError,
    WatchList,
    open_store_file,
    resolve,
    share_of,
)

NAME = "stock_watch"


def settings_of(codes: str, **more: str) -> Settings:
    """Settings with this COLLECT_CODES."""
    environ = {"COLLECT_CODES": codes, "INFOWAY_API_KEY": "test-key", "INFOWAY_PLAN": "0", **more}
    return stockrt.load_settings(environ, None, (), is_root=False).settings


class Watched:
    """A watch list by a clock that stands."""

    def __init__(self, settings: Settings, mongo: MongoStore | None = None) -> None:
        self.clock = FakeClock()
        self.list = WatchList(settings, mongo, self.clock)

    def codes(self, after_s: float = 0.0, fresh: bool = False) -> list[str]:
        """Let time pass and look."""
        self.clock.advance(after_s)
        return list(self.list.codes(fresh))


def said(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> list[str]:
    """What was logged about collecting."""
    return [r.getMessage() for r in caplog.records if r.levelno >= level]


# ------------------------------------------------------------------------------------------------------
# Codes in the setting, and in a file
# ------------------------------------------------------------------------------------------------------


def test_codes_in_the_setting_are_separated_as_elsewhere_and_stay() -> None:
    watched = Watched(settings_of("AAPL.US，700.HK;茅台 AAPL.US\nsh600519"))
    assert watched.codes() == ["AAPL.US", "700.HK", "茅台", "sh600519"]
    assert watched.list.codes() is watched.list.codes(fresh=True)
    assert watched.list.wait_s() == float("inf")


def test_a_file_is_read_again_when_it_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    file = tmp_path / "my codes.txt"
    file.write_text("\ufeffAAPL.US, 700.HK  # two\n\n# none\n600519\n", encoding="utf-8")
    watched = Watched(settings_of(f"@{file}"))
    assert watched.codes() == ["AAPL.US", "700.HK", "600519"]
    assert watched.list.wait_s() == LOOK_EVERY_S
    before = watched.list.codes()
    file.write_text("AAPL.US\nMSFT.US\n")
    assert watched.codes(LOOK_EVERY_S - 1) == list(before)
    assert watched.codes(1) == ["AAPL.US", "MSFT.US"]
    os.utime(file, (1, 1))  # changed, and the same
    before = watched.list.codes()
    watched.clock.advance(LOOK_EVERY_S)
    assert watched.list.codes() is before
    assert said(caplog, logging.INFO) == ["COLLECT_CODES: 2 codes, 1 new, 2 gone"]


def test_who_asks_for_it_sees_a_change_at_once(tmp_path: Path) -> None:
    file = tmp_path / "codes"
    file.write_text("AAPL.US")
    watched = Watched(settings_of(f"@{file}"))
    assert watched.codes() == ["AAPL.US"]
    file.write_text("AAPL.US MSFT.US")
    assert watched.codes() == ["AAPL.US"]
    assert watched.codes(fresh=True) == ["AAPL.US", "MSFT.US"]


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda file: file.unlink(), "cannot be read: No such file or directory"),
        (lambda file: file.write_text("# nothing\n"), "no code in "),
        (lambda file: file.write_bytes(b"\xff\xfe\x00"), "cannot be read: it is not UTF-8 text"),
    ],
    ids=["gone", "empty", "binary"],
)
def test_a_file_with_a_fault_leaves_the_codes_from_before(
    harm: Any, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once, and that it is over."""
    caplog.set_level(logging.INFO)
    file = tmp_path / "codes"
    file.write_text("AAPL.US")
    watched = Watched(settings_of(f"@{file}"))
    assert watched.codes() == ["AAPL.US"]
    harm(file)
    assert watched.codes(LOOK_EVERY_S) == watched.codes(LOOK_EVERY_S) == ["AAPL.US"]
    (line,) = said(caplog)
    assert line.startswith("COLLECT_CODES: ")
    assert words in line
    assert str(file) in line
    assert line.endswith("; the codes from before stay")
    file.write_text("AAPL.US")
    assert watched.codes(LOOK_EVERY_S) == ["AAPL.US"]
    assert said(caplog, logging.INFO)[-1] == "COLLECT_CODES: well again after 2 tries"


def test_a_first_look_that_fails_is_an_error_and_the_next_one_is_tried(tmp_path: Path) -> None:
    file = tmp_path / "codes"
    watched = Watched(settings_of(f"@{file}"))
    with pytest.raises(
        StockrtError, match=r"^COLLECT_CODES: .*codes cannot be read: No such file or directory$"
    ):
        watched.codes()
    assert watched.list.wait_s() == LOOK_EVERY_S
    file.write_text("AAPL.US")
    assert watched.codes() == ["AAPL.US"]


def test_what_is_no_file_of_codes_is_refused_without_reading_it(tmp_path: Path) -> None:
    """A pipe would never end, and the wrong file may be large."""
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as large:
        large.truncate((stockrt.MOST_FILE_MIB << 20) + 1)
    (tmp_path / "many").write_text("\n".join(map(str, range(stockrt.MOST_COLLECTED + 1))))
    for name, words in [
        ("pipe", "it is a pipe or a device, expected a plain file"),
        (".", "Is a directory"),
        ("large", "it has more than 16 MiB"),
        ("many", "has more than 100000 codes"),
    ]:
        with pytest.raises(StockrtError, match=words) as caught:
            Watched(settings_of(f"@{tmp_path / name}")).codes()
        assert in_chinese(caught.value.message, str(tmp_path)).startswith("COLLECT_CODES：")


def test_without_codes_there_is_no_list() -> None:
    """As after a restart with a command of before."""
    with pytest.raises(StockrtError, match="COLLECT_CODES in the settings of this module") as caught:
        Watched(settings_of("")).codes()
    assert in_chinese(caught.value.message).startswith("COLLECT_CODES：没有给出代码：")


# ------------------------------------------------------------------------------------------------------
# Codes in a collection
# ------------------------------------------------------------------------------------------------------


@pytest.fixture
def watch(mongo_db: tuple[str, str]) -> Iterator[pymongo.collection.Collection[dict[str, Any]]]:
    """The collection of the watch list, empty."""
    with pymongo.MongoClient[dict[str, Any]](mongo_db[0]) as client:
        yield client[mongo_db[1]][NAME]


def in_mongodb(uri: str, name: str, **more: str) -> Settings:
    """Settings of a watch list there."""
    return settings_of("watch", MONGODB_HOST=uri, MONGODB_DB_NAME=name, **more)


def test_a_collection_is_looked_at_again_every_minute(
    mongo_db: tuple[str, str], watch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Codes that come and go take effect; what has no text there is passed over, which is said once."""
    watch.insert_many([{"code": "AAPL.US"}, {"code": " 700.HK ", "name": "x"}, {"code": "AAPL.US"}])
    watch.insert_many([{"code": 600519}, {"code": ""}, {"symbol": "MSFT.US"}, {"code": ["X.US"]}])
    settings = in_mongodb(*mongo_db)
    with Pipeline.open_mongodb(settings) as mongo:
        watched = Watched(settings, mongo)
        assert sorted(watched.codes()) == ["700.HK", "AAPL.US"]
        before = watched.list.codes()
        watch.insert_one({"code": "600519.SH"})
        watch.delete_one({"code": " 700.HK "})
        assert watched.codes(LOOK_EVERY_S - 1) == list(before)
        assert sorted(watched.codes(1)) == ["600519.SH", "AAPL.US"]
        watch.insert_one({"code": "MSFT.US"})
        assert sorted(watched.codes(fresh=True)) == ["600519.SH", "AAPL.US", "MSFT.US"]
    name = f"{mongo_db[1]}.{NAME}"
    assert said(caplog) == [
        f"COLLECT_CODES: 4 of 7 documents in {name} have no text in the field code, and are passed over"
    ]


def test_another_name_of_the_collection_can_be_set(mongo_db: tuple[str, str], watch: Any) -> None:
    watch.database["mine"].insert_one({"code": "AAPL.US"})
    settings = in_mongodb(*mongo_db, MONGODB_WATCH_COLLECTION_NAME="mine")
    with Pipeline.open_mongodb(settings) as mongo:
        assert Watched(settings, mongo).codes() == ["AAPL.US"]


def test_an_empty_collection_leaves_the_codes_from_before(
    mongo_db: tuple[str, str], watch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    settings = in_mongodb(*mongo_db)
    with Pipeline.open_mongodb(settings) as mongo:
        watched = Watched(settings, mongo)
        with pytest.raises(
            StockrtError, match=rf"^COLLECT_CODES: no code in {mongo_db[1]}\.{NAME}; expected "
        ):
            watched.codes()
        watch.insert_one({"code": "AAPL.US"})
        assert watched.codes() == ["AAPL.US"]
        watch.delete_many({})
        assert watched.codes(LOOK_EVERY_S) == ["AAPL.US"]
    assert said(caplog) == [
        f"COLLECT_CODES: no code in {mongo_db[1]}.{NAME}; expected codes such as AAPL.US 600519.SH; "
        "the codes from before stay"
    ]


def test_while_mongodb_is_away_the_codes_from_before_stay(
    mongo_db: tuple[str, str], watch: Any, mongo_proxy: MongoProxy, caplog: pytest.LogCaptureFixture
) -> None:
    watch.insert_one({"code": "AAPL.US"})
    settings = in_mongodb(quick(mongo_proxy.uri), mongo_db[1])
    with Pipeline.open_mongodb(settings) as mongo:
        watched = Watched(settings, mongo)
        mongo_proxy.down()
        with pytest.raises(
            StockrtError, match=rf"^COLLECT_CODES: .*{NAME} cannot be read: MongoDB at .*MONGODB_HOST"
        ):
            watched.codes()
        mongo_proxy.up()
        assert until(lambda: _codes_or_none(watched) == ["AAPL.US"])
        caplog.clear()
        mongo_proxy.down()
        watch.insert_one({"code": "MSFT.US"})
        assert watched.codes(LOOK_EVERY_S) == ["AAPL.US"]
        assert ["cannot be read" in line for line in said(caplog)] == [True]
        mongo_proxy.up()
        assert until(lambda: sorted(watched.codes(LOOK_EVERY_S)) == ["AAPL.US", "MSFT.US"])


def _codes_or_none(watched: Watched) -> list[str] | None:
    try:
        return watched.codes()
    except StockrtError:
        return None


def test_without_mongodb_there_is_no_collection() -> None:
    with pytest.raises(StockrtError, match="COLLECT_CODES: watch without MONGODB_HOST"):
        Watched(settings_of("watch")).codes()


# ------------------------------------------------------------------------------------------------------
# Shares
# ------------------------------------------------------------------------------------------------------

CODES = [f"{n:06d}.SH" for n in range(600_000, 600_600)] + [f"{n:05d}.HK" for n in range(1, 400)]


@pytest.mark.parametrize("shares", [pytest.param(2, marks=pytest.mark.long), 1, 3, 7, 100])
def test_each_code_is_in_one_share_and_no_share_has_far_more_than_its_part(shares: int) -> None:
    lists = [
        Watched(settings_of(" ".join(CODES), COLLECT_SHARE=f"{number}/{shares}")).codes()
        for number in range(1, shares + 1)
    ]
    assert sorted(code for codes in lists for code in codes) == sorted(CODES)
    assert all(len(codes) < 2 * len(CODES) / shares + 10 for codes in lists)


@each(
    "notations",
    [
        ("600519.SH", "600519", "sh600519", "SSE:600519", "６００５１９", "1.600519"),
        ("00700.HK", "700.HK", "hk00700", "HKEX:700"),
        ("AAPL.US", "aapl.us", "NASDAQ:AAPL", "AAPL.O"),
        ("BTCUSDT", "btc/usdt", "BINANCE:BTCUSDT"),
        ("es", "ES"),
    ],
)
def test_notations_of_one_code_are_in_one_share(notations: Sequence[str]) -> None:
    for shares in (2, 3, 10, 97):
        assert len({share_of(code, shares) for code in notations}) == 1


def test_shares_are_the_same_at_every_instance_and_version() -> None:
    """The first 32 bits of the SHA-256 of the code: sha256sum tells it, too."""
    assert {code: share_of(code, 3) for code in ("AAPL.US", "00700.HK", "600519.SH", "BTCUSDT", "XXX?")} == {
        "AAPL.US": int("5bbc5c9e", 16) % 3 + 1,
        "00700.HK": int("e99cfdac", 16) % 3 + 1,
        "600519.SH": int("0716b17b", 16) % 3 + 1,
        "BTCUSDT": int("19aa16ae", 16) % 3 + 1,
        "XXX?": int("420a53b8", 16) % 3 + 1,
    }


def test_a_share_without_a_code_is_said(caplog: pytest.LogCaptureFixture) -> None:
    shares = [f"{number}/2" for number in (1, 2) if share_of("AAPL.US", 2) != number]
    assert Watched(settings_of("AAPL.US", COLLECT_SHARE=shares[0])).codes() == []
    assert said(caplog) == [f"COLLECT_CODES: none of 1 code is in the share {shares[0]}"]


# ------------------------------------------------------------------------------------------------------
# What codes mean
# ------------------------------------------------------------------------------------------------------


def test_codes_mean_what_they_mean_to_a_run(infoway: InfowayServer, tmp_path: Path) -> None:
    """Asked at the same products under the same names, or refused in the same words."""
    codes = [
        *("600519", "sh600519", "000905", "700.HK", "aapl.us", "BTC/USDT", "ES", "CL", "茅台", "920002.BJ"),
        *("AAPL", "A?B", "", 600519, "TOPIX.JP", "common:TOPIX.JP", "USDCNY", "12345678"),
    ]
    with (
        open_store_file(tmp_path / "a") as file,
        Pipeline(
            settings_of("", INFOWAY_API_BASE_URL=infoway.url, STATE_DIRECTORY=str(tmp_path / "b"))
        ) as pipeline,
    ):
        directory = Directory(
            file, InfowayApi(infoway.url, KeyPool([("test-key", Plan("0", 0, 0))], NoLedger()))
        )
        found = resolve(codes, directory, threading.Event())
        infoway.requests.clear()
        report = pipeline.run(codes, threading.Event())
        asked = {(r.product, code) for r in infoway.asked("batch_trade") for code in r.codes}
    assert {(one.product, one.code) for one in found.instruments.values()} <= asked
    assert len({one.code for one in found.instruments.values()}) == len(found.instruments)
    assert found.instruments["600519"] == Instrument("600519.SH", "stock")
    assert found.instruments["ES"].product == "common"  # which the lists alone tell
    assert found.instruments["000905"].alternatives == (Instrument("000905.SH", "stock"),)
    invalid = {c: f.words for c, f in report.failures.items() if f.kind is stockrt.FailureKind.INVALID_CODE}
    assert found.refused == invalid
    assert "of the Beijing exchange, " in found.refused["920002.BJ"]
    assert found.instruments.keys() & found.refused.keys() == set()


def test_without_lists_a_form_that_does_not_tell_is_refused() -> None:
    found = resolve(["ES", "AAPL.US"], None, threading.Event())
    assert list(found.instruments) == ["AAPL.US"]
    assert "did you mean" in found.refused["ES"]


# ------------------------------------------------------------------------------------------------------
# A poll beside a run
# ------------------------------------------------------------------------------------------------------


class Heard(stockrt.Events):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.codes: list[str] = []
        self.turns = 0
        self.told: list[stockrt.CollectStats] = []
        self.damage: list[str] = []

    def progress(self, done: int = 0, total: int = 0, unwritten: int = 0) -> None:
        """Count."""
        self.turns += 1

    def stored(self, documents: Sequence[dict[str, Any]]) -> None:
        """Keep the codes."""
        self.codes += [document["stock_code"] for document in documents]

    def collecting(self, stats: stockrt.CollectStats) -> None:
        """Keep it."""
        self.told.append(stats)

    def damaged(self, error: StockrtError) -> None:
        """Keep it."""
        self.damage.append(str(error))


class Opened:
    """A pipeline over a local file, and threads that use it."""

    def __init__(self, infoway: InfowayServer, folder: Path, **more: str) -> None:
        self.heard = Heard()
        self.settings = settings_of(
            more.pop("codes", ""),
            INFOWAY_API_BASE_URL=infoway.url,
            STATE_DIRECTORY=str(folder / "state"),
            **more,
        )
        self.pipeline = Pipeline(self.settings, self.heard)
        self.stop = threading.Event()
        self.reports: list[stockrt.Report] = []
        self.threads: list[threading.Thread] = []

    def start(self, how: Any, *codes: str) -> threading.Thread:
        """Run or poll on a thread."""
        thread = threading.Thread(target=lambda: self.reports.append(how(codes, self.stop)), daemon=True)
        thread.start()
        self.threads.append(thread)
        return thread

    def end(self) -> None:
        """Stop what goes on, and close."""
        self.stop.set()
        for thread in self.threads:
            thread.join(PATIENCE)
        self.pipeline.close()


@pytest.fixture
def opened(infoway: InfowayServer, tmp_path: Path) -> Iterator[Opened]:
    made = Opened(infoway, tmp_path)
    yield made
    made.end()


class Hold:
    """Holds back the answers to requests that ask for some code."""

    def __init__(self, infoway: InfowayServer, code: str) -> None:
        self._code = code
        self._open = threading.Event()
        self.reached = threading.Event()
        infoway.latency = self._wait

    def _wait(self, request: Request) -> float:
        if self._code in request.codes:
            self.reached.set()
            self._open.wait(PATIENCE)
        return 0.0

    def release(self) -> None:
        """Let them go."""
        self._open.set()


def test_a_poll_goes_on_beside_a_run(opened: Opened, infoway: InfowayServer) -> None:
    """It tells what it stores, and nothing of how it goes on: by that the run is watched."""
    hold = Hold(infoway, "HELD.US")
    run = opened.start(opened.pipeline.run, "HELD.US")
    try:
        assert hold.reached.wait(PATIENCE)
        report = opened.pipeline.poll(["AAPL.US", "600519"], opened.stop)
        assert (report.total, report.stored, report.failures) == (2, 2, {})
        assert run.is_alive()
        assert sorted(opened.heard.codes) == ["600519.SH", "AAPL.US"]
    finally:
        hold.release()
    run.join(PATIENCE)
    assert [one.stored for one in opened.reports] == [1]
    before = opened.heard.turns
    assert opened.pipeline.poll(["AAPL.US"], opened.stop).duplicates == 1
    assert opened.heard.turns == before


def test_a_poll_that_waits_for_its_turn_can_be_stopped(opened: Opened, infoway: InfowayServer) -> None:
    hold = Hold(infoway, "HELD.US")
    first = opened.start(opened.pipeline.poll, "HELD.US")
    assert hold.reached.wait(PATIENCE)
    stop = threading.Event()
    stop.set()
    assert opened.pipeline.poll(["AAPL.US"], stop).interrupted
    assert "AAPL.US" not in infoway.codes_asked()
    hold.release()
    first.join(PATIENCE)
    assert opened.pipeline.poll(["AAPL.US"], opened.stop).stored == 1


def test_no_two_polls_ask_at_the_same_time(opened: Opened, infoway: InfowayServer) -> None:
    infoway.latency = 0.03
    for number in range(4):
        opened.start(opened.pipeline.poll, f"Q{number}X.US")
    for thread in opened.threads:
        thread.join(PATIENCE)
    assert sum(report.stored for report in opened.reports) == 4
    assert infoway.peak_in_flight == 1


def test_a_poll_and_a_run_keep_the_limits_of_a_key_together(tmp_path: Path) -> None:
    codes = [f"Q{n}X.US" for n in range(600)]

    def measure(folder: Path) -> tuple[int, float]:
        with InfowayServer(per_second=5, per_minute=300) as server:
            opened = Opened(server, folder, INFOWAY_PLAN="5")
            began = time.monotonic()
            opened.start(opened.pipeline.run, *codes)
            opened.start(opened.pipeline.poll, *codes)
            for thread in opened.threads:
                thread.join(PATIENCE)
            took_s = time.monotonic() - began
            opened.end()
        assert sum(report.stored for report in opened.reports) == 600
        assert sum(report.duplicates for report in opened.reports) == 600
        return server.over_limit, took_s

    check_paced(measure, tmp_path, 20)


def test_plan_and_lists_are_asked_for_once_by_a_run_and_a_poll(
    infoway: InfowayServer, tmp_path: Path
) -> None:
    """They begin at the same time, and each needs them."""
    opened = Opened(infoway, tmp_path, INFOWAY_PLAN="auto")
    infoway.latency = lambda request: 0.0 if request.codes else 0.2
    opened.start(opened.pipeline.run, "ES")
    opened.start(opened.pipeline.poll, "ES")
    for thread in opened.threads:
        thread.join(PATIENCE)
    opened.end()
    assert len(infoway.asked("package/info")) == 1
    asked = Counter(request.path for request in infoway.asked("common/basic/symbols"))
    assert set(asked.values()) == {1}
    assert [(report.total, len(report.failures)) for report in opened.reports] == [(1, 0), (1, 0)]


# ------------------------------------------------------------------------------------------------------
# The beat
# ------------------------------------------------------------------------------------------------------


def test_a_beat_comes_on_the_grid_however_long_a_poll_takes() -> None:
    beat = Beat(10, 100)
    assert beat.wait_s(100) == 0
    assert beat.done(100.5) == 0
    assert beat.wait_s(100.5) == 9.5
    assert beat.wait_s(110.25) == 0  # woken late
    assert beat.done(117) == 0
    assert beat.wait_s(117) == 3
    assert beat.done(145) == 2  # 130 and 140 came meanwhile
    assert beat.wait_s(145) == 5
    assert beat.done(160) == 0  # the next one is due at this moment, and not missed
    assert beat.wait_s(160) == 0


@given(
    st.floats(1, 86_400),
    st.floats(0, 1e7),
    st.lists(st.tuples(st.floats(0, 5), st.floats(0, 4)), max_size=30),
)
def test_beats_never_drift_and_each_is_taken_or_missed(
    every: float, begun: float, polls: list[tuple[float, float]]
) -> None:
    """Polls of any length, and threads that wake late: what is counted is what the grid had."""
    beat, now, missed = Beat(every, begun), begun, 0
    for taken, (late, length) in enumerate(polls, 1):
        now += beat.wait_s(now) + (late + length) * every
        missed += beat.done(now)
        due = now + beat.wait_s(now)
        assert due == pytest.approx(begun + (taken + missed) * every, rel=1e-9, abs=1e-6)
        assert due - now <= every * (1 + 1e-9)


class Polling:
    """A Poller at work."""

    def __init__(self, opened: Opened, every_s: float) -> None:
        settings = opened.settings._replace(collect_every_s=every_s)
        self.heard = opened.heard
        self.poller = Poller(opened.pipeline, settings, WatchList(settings, None), opened.heard)
        self.poller.start()

    def told(self, beats: int) -> stockrt.CollectStats:
        """Wait for so many polls, and return what was told of the last one."""
        assert until(lambda: len(self.heard.told) >= beats)
        return self.heard.told[beats - 1]

    def __enter__(self) -> Polling:
        return self

    def __exit__(self, *_: object) -> None:
        self.poller.leave()
        self.poller.join(PATIENCE)
        assert not self.poller.is_alive()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "codes"


@pytest.fixture
def watching(infoway: InfowayServer, tmp_path: Path, file: Path) -> Iterator[Opened]:
    """A pipeline whose COLLECT_CODES is `file`."""
    made = Opened(infoway, tmp_path, codes=f"@{file}")
    yield made
    made.end()


def test_a_poller_polls_at_every_beat_and_tells_what_it_did(
    watching: Opened, infoway: InfowayServer, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    file.write_text("AAPL.US 600519 GONE.US 430047")
    infoway.unknown = {"GONE.US"}
    with Polling(watching, 0.05) as polling:
        first = polling.told(1)
        assert (first.polled, first.trades, first.stored, first.duplicates) == (2, 2, 2, 0)
        assert first.refused == 2 and "430047 (of the Beijing" in first.refused_why
        assert "GONE.US (unknown to the API" in first.refused_why
        told = r"2 codes polled, 40 trades/s, (?:\d+ beats? missed, )?2 codes not collected"
        assert re.search(told, stockrt.collect_words(first))
        assert first.per_second == pytest.approx(40)
        second = polling.told(2)
        assert (second.trades, second.stored, second.duplicates, second.per_second) == (4, 2, 2, 0)
        infoway.bump()
        assert until(lambda: polling.poller.stats().stored == 4)
    assert (second.trouble, second.connections_wanted, second.codes) == ("", 0, 0)
    assert [line for line in said(caplog, logging.INFO) if "every" in line and "polled" in line] == [
        "2 codes polled every 0.05 s"
    ]


def test_codes_that_fail_are_said_once_and_not_at_each_beat(
    watching: Opened, infoway: InfowayServer, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    file.write_text("AAPL.US GONE.US")
    infoway.unknown = {"GONE.US"}
    with Polling(watching, 0.05) as polling:
        polling.told(5)
        infoway.unknown = set()
        assert until(lambda: any("well again" in line for line in said(caplog, logging.INFO)))
    (line,) = [line for line in said(caplog) if "GONE" in line]
    assert line.startswith("collecting: 1 of 2 codes failed: GONE.US (unknown to the API")
    assert line.endswith("; they are asked for at every beat")


def test_an_api_that_is_away_is_a_trouble_that_begins_and_ends(
    watching: Opened, infoway: InfowayServer, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    file.write_text("AAPL.US")
    infoway.script = lambda _: Answer.html(404)
    with Polling(watching, 0.05) as polling:
        assert "404" in polling.told(3).trouble
        infoway.script = ()
        assert until(lambda: polling.poller.stats().stored == 1)
        assert until(lambda: polling.poller.stats().trouble == "")
    (line,) = [line for line in said(caplog) if "404" in line]
    assert line.startswith("Infoway: ")
    assert line.endswith("; the next beat tries again")
    assert any(line.startswith("Infoway: well again") for line in said(caplog, logging.INFO))


def test_a_list_that_cannot_be_read_is_said_and_tried_at_each_beat(
    watching: Opened, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Polling(watching, 0.05) as polling:
        assert "No such file" in polling.told(2).trouble
        file.write_text("AAPL.US")
        assert until(lambda: polling.poller.stats().stored == 1)
        assert polling.poller.stats().trouble == ""
    assert len([line for line in said(caplog) if "No such file" in line]) == 1


def test_missed_beats_are_counted_and_said_once_and_polls_never_overlap(
    watching: Opened, infoway: InfowayServer, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file.write_text("AAPL.US")
    infoway.latency = 0.12
    with Polling(watching, 0.05) as polling:
        stats = polling.told(4)
    assert stats.missed_beats >= 8  # two at least of each poll
    assert infoway.peak_in_flight == 1
    (line,) = [line for line in said(caplog) if "skipped" in line]
    assert line.startswith("collecting: a poll took 0.")
    assert "longer than one every 0.05 s allows; beats are skipped, never two polls at once" in line


def test_beats_that_are_missed_now_and_then_are_said_once_until_none_was_for_a_while(
    watching: Opened,
    infoway: InfowayServer,
    file: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO)
    file.write_text("AAPL.US")
    every_other = itertools.cycle([0.08, 0.0])
    infoway.latency = lambda _: next(every_other)
    monkeypatch.setattr(stockrt, "TROUBLE_AGAIN_S", 0.2)
    with Polling(watching, 0.05) as polling:
        polling.told(8)
        assert [line for line in said(caplog, logging.INFO) if "well again" in line] == []
        infoway.latency = 0.0
        assert until(lambda: any("collecting: well again" in line for line in said(caplog, logging.INFO)))
    assert len([line for line in said(caplog) if "skipped" in line]) == 1


def test_a_poll_that_hangs_is_cut_when_it_leaves(
    watching: Opened, infoway: InfowayServer, file: Path
) -> None:
    file.write_text("HELD.US")
    hold = Hold(infoway, "HELD.US")
    try:
        with Polling(watching, 0.05):
            assert hold.reached.wait(PATIENCE)
    finally:
        hold.release()


def test_a_fault_of_the_program_ends_no_thread(
    watching: Opened, file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is logged whole once; a part of the program that is lost has the process end."""
    file.write_text("AAPL.US")
    faults: list[Exception] = [ZeroDivisionError("x"), ZeroDivisionError("x"), ImportError("y", name="y")]
    poll = Pipeline.poll

    def once_broken(self: Pipeline, codes: Any, stop: threading.Event) -> stockrt.Report:
        if faults:
            raise faults.pop(0)
        return poll(self, codes, stop)

    monkeypatch.setattr(Pipeline, "poll", once_broken)
    with Polling(watching, 0.05) as polling:
        assert "ZeroDivisionError" in polling.told(2).trouble
        assert until(lambda: polling.poller.stats().stored == 1)
    assert len([r for r in caplog.records if r.exc_info]) == 1
    assert len(polling.heard.damage) == 1
