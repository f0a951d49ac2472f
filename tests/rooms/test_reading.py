"""What the views read: the same from both stores, in every type of number, and nothing is written by it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pymongo
import pytest
from bson.decimal128 import Decimal128
from kit.trades import CREATED, settings_of

import stockrt
from stockrt import (
    NEVER,
    Bar,
    Candle,
    Close,
    Document,
    Gap,
    LocalFile,
    MongoStore,
    Pipeline,
    Reader,
    SqliteStore,
    StoreError,
    Trade,
    bar_close,
    open_store_file,
    session_of,
    to_document,
)

DAY = "2026-08-14"
TEN = int(datetime(2026, 8, 14, 2, 0, tzinfo=UTC).timestamp()) * 1000  # ten o'clock in Shanghai
MINUTE = 60_000
MAOTAI, TENCENT, BITCOIN = "600519.SH", "00700.HK", "BTCUSDT"
ADD_GAP = (
    'INSERT INTO stream_gaps (_id, instance, product, codes, "from", "to", why, create_time) '
    "VALUES (?, '', ?, ?, ?, ?, ?, '')"
)


class Place:
    """A store that a test fills, and reads through a Reader."""

    def __init__(self, environ: dict[str, str], file: LocalFile, store: SqliteStore | MongoStore) -> None:
        self.environ = environ
        self.file = file
        self.store = store

    def put(self, *trades: Trade, demo: bool = False) -> None:
        """Store trades."""
        report = self.store.write([to_document(trade, CREATED, demo) for trade in trades])
        assert not report.refused

    @contextlib.contextmanager
    def reader(self, demo: bool = False) -> Iterator[Reader]:
        """Read what is there."""
        with Pipeline.open_reader(settings_of(self.environ), demo) as reader:
            yield reader


@pytest.fixture(params=["sqlite", "string", "double", "decimal"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """An empty store: SQLite, or MongoDB with each type of number."""
    environ = {"STATE_DIRECTORY": str(tmp_path)}
    if request.param != "sqlite":
        uri, name = request.getfixturevalue("mongo_db")
        more = {"MONGODB_HOST": uri, "MONGODB_DB_NAME": name, "MONGODB_NUMERIC_TYPE": request.param}
        environ |= more
    with open_store_file(tmp_path) as file, contextlib.ExitStack() as opened:
        store: SqliteStore | MongoStore = SqliteStore(file)
        if request.param != "sqlite":
            store = opened.enter_context(contextlib.closing(MongoStore(settings_of(environ))))
        yield Place(environ, file, store)


def trade(code: str, minutes: float, price: str, volume: str = "100", side: int = 1) -> Trade:
    """Return a trade so many minutes after ten."""
    return Trade(code, TEN + int(minutes * MINUTE), price, volume, "1", side)


def test_the_latest_trade_of_each_code_and_the_codes_that_traded_last(place: Place) -> None:
    place.put(
        trade(MAOTAI, 0, "10"), trade(MAOTAI, 2, "12"), trade(MAOTAI, 1, "11"), trade(TENCENT, 3, "9.5")
    )
    place.put(trade(BITCOIN, -5, "95000.25", "0.00012"))
    with place.reader() as reader:
        assert reader.codes() == [TENCENT, MAOTAI, BITCOIN]
        assert reader.newest_codes(2) == [TENCENT, MAOTAI]
        last = reader.last([MAOTAI, BITCOIN, "AAPL.US"])
    assert {code: (one.t, one.p, one.v) for code, one in last.items()} == {
        MAOTAI: (TEN + 2 * MINUTE, "12", "100"),
        BITCOIN: (TEN - 5 * MINUTE, "95000.25", "0.00012"),
    }
    assert last[MAOTAI].create_time == "2026-08-15T01:02:03.456Z"


def test_trades_come_by_code_and_time_each_once_however_many_are_read_at_once(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stockrt, "TRADES_READ", 3)
    before_2001 = Trade(MAOTAI, 10**12 - 1, "3", "100", "1", 1)  # its time is a digit shorter
    minutes = [*range(7)]
    place.put(before_2001, *(trade(MAOTAI, m, "10", side=s) for m in reversed(minutes) for s in (2, 0)))
    place.put(trade(TENCENT, 1, "9"), trade("600519.SHX", 1, "1"))
    with place.reader() as reader:
        some = [one.id for page in reader.trades([MAOTAI], TEN, TEN + 3 * MINUTE) for one in page]
        every = [one.id for page in reader.trades(None, 0, NEVER) for one in page]
        early = [one.p for page in reader.trades([MAOTAI], 0, TEN) for one in page]
        since = [one.s for page in reader.trades(None, TEN + 6 * MINUTE, NEVER) for one in page]
    assert some == [f"{MAOTAI}|{TEN + m * MINUTE}|10|100|{side}" for m in range(3) for side in (0, 2)]
    assert len(every) == len(set(every)) == 17
    assert early == ["3"]
    assert since == [MAOTAI] * 2


def test_candles_are_what_the_trades_of_their_steps_come_to(place: Place) -> None:
    place.put(
        trade(BITCOIN, 0.1, "100.10", "0.1"),
        trade(BITCOIN, 0.2, "99.50", "0.2"),
        trade(BITCOIN, 0.3, "101.25", "0.00000007"),
        trade(BITCOIN, 0.9, "100.40", "3"),
        trade(BITCOIN, 5, "9.5", "12"),
        trade(BITCOIN, 10, "200"),
        trade(MAOTAI, 5.5, "1500.01", "7"),
    )
    with place.reader() as reader:
        found = reader.candles([MAOTAI, BITCOIN, TENCENT], TEN, TEN + 10 * MINUTE, MINUTE)
    plain = {code: [_as_numbers(candle) for candle in candles] for code, candles in found.items()}
    assert plain == {
        BITCOIN: [
            (TEN, 100.1, 101.25, 99.5, 100.4, "3.30000007", 4),
            (TEN + 5 * MINUTE, 9.5, 9.5, 9.5, 9.5, "12", 1),
        ],
        MAOTAI: [(TEN + 5 * MINUTE, 1500.01, 1500.01, 1500.01, 1500.01, "7", 1)],
    }


def test_candles_of_doubles_have_the_digits_of_their_trades(place: Place) -> None:
    place.put(trade(MAOTAI, 0, "10.01"), trade(MAOTAI, 0.1, "-40.32"), trade(MAOTAI, 0.2, "123456789.0125"))
    with place.reader() as reader:
        (candle,) = reader.candles([MAOTAI], TEN, TEN + MINUTE, MINUTE)[MAOTAI]
    assert (candle.open, candle.high, candle.low) == ("10.01", "123456789.0125", "-40.32")


def test_volumes_beyond_what_an_integer_holds_are_summed(place: Place) -> None:
    place.put(trade(BITCOIN, 0, "1", "4e24"), trade(BITCOIN, 0.1, "1", "99999999999999999999"))
    place.put(
        trade(BITCOIN, 2, "1", "1e14"), trade(BITCOIN, 2.1, "1", "0.25"), trade(BITCOIN, 2.2, "1", "1e3")
    )
    place.put(*(trade(TENCENT, 0, "1", "9000000000000000000", side) for side in range(3)))
    with place.reader() as reader:
        candles = reader.candles([BITCOIN, TENCENT], TEN, TEN + 3 * MINUTE, MINUTE)
    huge, exact = candles[BITCOIN]
    assert float(huge.volume) == pytest.approx(4.0001e24)
    assert exact.volume == "100000000001000.25"
    assert float(candles[TENCENT][0].volume) == 27e18


def _as_numbers(candle: Candle) -> tuple[object, ...]:
    t, *prices, volume, trades = candle
    return (t, *map(float, prices), volume, trades)


def _closes(*days: tuple[str, str]) -> list[Close]:
    """Return final closes of Maotai on days."""
    market = stockrt.MARKETS["SH"]
    found = []
    for day, price in days:
        at = int(datetime.fromisoformat(f"{day}T02:00+00:00").timestamp()) * 1000
        bar = Bar(MAOTAI, at // 1000, "1", "3", "0.5", price, "1000", "2000")
        found.append(bar_close(bar, session_of(market, at)))
    return found


def test_closes_final_and_provisional_and_the_one_that_a_change_is_told_against(place: Place) -> None:
    provisional = Close(to_document(trade(MAOTAI, 0, "12"), CREATED), DAY, provisional=True)
    place.store.write_closes(
        [*_closes(("2026-08-12", "10"), ("2026-08-13", "11"), ("2026-06-01", "5")), provisional]
    )
    with place.reader() as reader:
        found = reader.closes([MAOTAI, TENCENT], "2026-08-13", DAY)
        finals = reader.last_finals({MAOTAI: "2026-08-15", TENCENT: DAY})
        before = reader.last_finals({MAOTAI: "2026-08-13"})
        long_ago = reader.last_finals({MAOTAI: "2026-08-12"})
    assert [(one.date, one.p, one.is_final, one.volume) for one in found[MAOTAI]] == [
        ("2026-08-13", "11", True, "1000"),
        (DAY, "12", False, ""),
    ]
    assert [(one.code, one.date, one.p) for one in finals.values()] == [(MAOTAI, "2026-08-13", "11")]
    assert before[MAOTAI].p == "10"
    assert [*found] == [MAOTAI]
    assert not long_ago


def test_gaps_are_told_from_this_machine_and_from_mongodb_each_once(place: Place) -> None:
    with place.reader() as reader:
        assert reader.gaps([MAOTAI], 0, NEVER) == []
    gaps = [
        Gap("stock", (MAOTAI, TENCENT), TEN, TEN + MINUTE, "connection lost"),
        Gap("stock", (MAOTAI,), TEN + 5 * MINUTE, None, "stopped"),
    ]
    with place.file.write() as db:
        rows = [
            (gap.since, gap.product, json.dumps(gap.codes), gap.since, gap.until, gap.why) for gap in gaps
        ]
        db.executemany(ADD_GAP, rows)
    if isinstance(place.store, MongoStore):
        first = gaps[0]
        document: Document = {
            "product": "stock",
            "codes": [*first.codes],
            "from": first.since,
            "to": first.until,
        }
        place.store.collection("stream_gaps").insert_one(document | {"why": first.why})
    with place.reader() as reader:

        def told(code: str, since: int, until: int) -> list[Gap]:
            return [Gap(*gap[:5]) for gap in reader.gaps([code], since, until)]

        assert told(MAOTAI, 0, NEVER) == gaps
        assert told(TENCENT, 0, NEVER) == gaps[:1]
        assert told(MAOTAI, TEN + 2 * MINUTE, NEVER) == gaps[1:]
        assert told(MAOTAI, 0, TEN) == []
        assert told(BITCOIN, 0, NEVER) == []


def test_names_are_those_of_the_lists_on_this_machine(place: Place) -> None:
    with place.file.write() as db:
        row = ("STOCK_CN", MAOTAI, "贵州茅台", "", "Kweichow Moutai")
        db.execute("INSERT INTO symbols VALUES (?, ?, ?, ?, ?)", row)
    with place.reader() as reader:
        assert reader.names([MAOTAI, TENCENT]) == {MAOTAI: "贵州茅台"}
        assert reader.names([MAOTAI], english=True) == {MAOTAI: "Kweichow Moutai"}


def test_synthetic_trades_are_apart(tmp_path: Path) -> None:
    with open_store_file(tmp_path) as file:
        place = Place({"STATE_DIRECTORY": str(tmp_path)}, file, SqliteStore(file))
        place.put(trade(MAOTAI, 0, "10"))
        place.put(trade(MAOTAI, 1, "11"), trade(TENCENT, 1, "11"), demo=True)
        for demo, codes, price in ((False, [MAOTAI], "10"), (True, [TENCENT, MAOTAI], "11")):
            with place.reader(demo) as reader:
                assert reader.codes() == codes
                assert reader.newest_codes(9) == codes
                assert reader.last([MAOTAI])[MAOTAI].p == price
                assert [one.p for page in reader.trades([MAOTAI], 0, NEVER) for one in page] == [price]
                (candle,) = reader.candles([MAOTAI], TEN, TEN + 9 * MINUTE, 9 * MINUTE)[MAOTAI]
                assert candle.close == price


def test_what_another_program_has_put_into_mongodb_is_passed_over(
    mongo_db: tuple[str, str], tmp_path: Path
) -> None:
    uri, name = mongo_db
    environ = {"STATE_DIRECTORY": str(tmp_path), "MONGODB_HOST": uri, "MONGODB_DB_NAME": name}
    with contextlib.closing(MongoStore(settings_of(environ))) as store:
        store.write([to_document(trade(MAOTAI, 0, "10"), CREATED)])
        others: list[Document] = [
            {"stock_code": MAOTAI, "t": datetime.now(UTC), "p": "1"},
            {"stock_code": MAOTAI, "t": TEN + MINUTE},
            {"_id": f"{MAOTAI}|{TEN + 2 * MINUTE}|x", "stock_code": MAOTAI, "t": "later", "p": 3.0},
            {"stock_code": 5, "t": TEN},
            {"hello": "world"},
        ]
        store.collection().insert_many(others)
    with Pipeline.open_reader(settings_of(environ)) as reader:
        assert MAOTAI in reader.codes()
        assert [one.p for page in reader.trades(None, 0, NEVER) for one in page] == ["10"]
        (candle,) = reader.candles([MAOTAI], TEN, TEN + 9 * MINUTE, 9 * MINUTE)[MAOTAI]
        assert (candle.close, candle.trades) == ("10", 1)
        assert reader.last([MAOTAI])[MAOTAI].p == "10"


def _nearly_a_trade(minutes: int, **other: object) -> Document:
    """Return a document that differs from a trade of ours in some fields; None: it has no such field."""
    document = to_document(trade(MAOTAI, minutes, "10"), CREATED) | other
    return {name: value for name, value in document.items() if value is not None}


HOSTILE = "\x1b[31mE\u202e<script>\n"


@pytest.mark.parametrize(
    "others",
    [
        {"_id": "settings", "s": None, "t": None, "p": None, "stock_code": None},
        {"p": "abc"},
        {"p": "NaN"},
        {"p": float("inf")},
        {"p": Decimal128("1e400")},
        {"p": Decimal128("NaN")},
        {"v": "many"},
        {"v": float("nan")},
        {"t": str(TEN + MINUTE)},
        {"td": "buy"},
        {"_id": f"{MAOTAI}|{TEN}000|10|100|1", "t": TEN * 1000},
        {"_id": f"{HOSTILE}|{TEN + MINUTE}|10|100|1", "s": HOSTILE, "stock_code": HOSTILE},
        {"stock_code": TENCENT},
    ],
    ids=repr,
)
def test_what_nearly_is_a_trade_is_in_no_view(
    mongo_db: tuple[str, str], tmp_path: Path, others: Document
) -> None:
    uri, name = mongo_db
    environ = {"STATE_DIRECTORY": str(tmp_path), "MONGODB_HOST": uri, "MONGODB_DB_NAME": name}
    with contextlib.closing(MongoStore(settings_of(environ))) as store:
        store.write([to_document(trade(MAOTAI, 0, "10"), CREATED)])
        store.collection().insert_one(_nearly_a_trade(1, **others))
    with Pipeline.open_reader(settings_of(environ)) as reader:
        assert [one.t for page in reader.trades(None, 0, NEVER) for one in page] == [TEN]
        (candle,) = reader.candles([MAOTAI], TEN, TEN + 9 * MINUTE, 9 * MINUTE)[MAOTAI]
        assert (candle.high, candle.low, candle.close, candle.volume) == ("10", "10", "10", "100")
        (quote,) = stockrt.quotes(reader, reader.newest_codes(9))
    assert (quote.code, quote.trade.t) == (MAOTAI, TEN)


def test_what_another_program_has_put_among_the_closes_is_passed_over(
    mongo_db: tuple[str, str], tmp_path: Path
) -> None:
    uri, name = mongo_db
    environ = {"STATE_DIRECTORY": str(tmp_path), "MONGODB_HOST": uri, "MONGODB_DB_NAME": name}
    key: Document = {"_id": f"{MAOTAI}|{DAY}", "stock_code": MAOTAI}
    close = key | {"date": DAY, "t": TEN, "p": "9", "close": "9"}
    others: list[Document] = [
        key,
        close | {"p": float("nan")},
        close | {"p": "abc"},
        close | {"high": "abc"},
        close | {"t": CREATED},
        close | {"date": "soon"},
    ]
    with contextlib.closing(MongoStore(settings_of(environ))) as store:
        store.write_closes(_closes(("2026-08-13", "11")))
        collection = store.collection(store.close_name)
        collection.insert_one({"stock_code": HOSTILE})
        for other in others:
            collection.replace_one({"_id": key["_id"]}, other, upsert=True)
            with Pipeline.open_reader(settings_of(environ)) as reader:
                assert [one.p for one in reader.closes([MAOTAI], "2026-08-01", DAY)[MAOTAI]] == ["11"]
                assert reader.last_finals({MAOTAI: "2026-08-15"})[MAOTAI].p == "11"
                assert reader.close_codes() == [MAOTAI]


def test_what_another_program_has_put_among_the_gaps_is_passed_over(
    mongo_db: tuple[str, str], tmp_path: Path
) -> None:
    uri, name = mongo_db
    environ = {"STATE_DIRECTORY": str(tmp_path), "MONGODB_HOST": uri, "MONGODB_DB_NAME": name}
    gap: Document = {"product": "stock", "codes": [MAOTAI], "from": TEN, "to": None, "why": "lost"}
    others: list[Document] = [
        {"from": TEN},
        gap | {"codes": None},
        gap | {"to": "later"},
        {"codes": [MAOTAI]},
    ]
    with contextlib.closing(MongoStore(settings_of(environ))) as store:
        store.collection("stream_gaps").insert_many([dict(one) for one in (*others, gap)])
    with Pipeline.open_reader(settings_of(environ)) as reader:
        assert [found.why for found in reader.gaps([MAOTAI], 0, NEVER)] == ["lost"]


def test_reading_makes_no_collection_and_writes_nothing(mongo_db: tuple[str, str], tmp_path: Path) -> None:
    uri, name = mongo_db
    environ = {"STATE_DIRECTORY": str(tmp_path), "MONGODB_HOST": uri, "MONGODB_DB_NAME": name}
    with Pipeline.open_reader(settings_of(environ)) as reader:
        assert (reader.codes(), reader.newest_codes(5), reader.last([MAOTAI])) == ([], [], {})
        assert list(reader.trades(None, 0, NEVER)) == []
        assert reader.candles([MAOTAI], TEN, TEN + MINUTE, MINUTE) == {}
        assert not reader.closes([MAOTAI], DAY, DAY)
        assert not reader.last_finals({MAOTAI: DAY})
        assert reader.gaps([MAOTAI], 0, NEVER) == []
    with pymongo.MongoClient[Document](uri) as client:
        assert client[name].list_collection_names() == []


def test_a_mongodb_that_is_away_is_named(tmp_path: Path) -> None:
    uri = "mongodb://127.0.0.1:1/?timeoutMS=300"
    environ = {"STATE_DIRECTORY": str(tmp_path), "MONGODB_HOST": uri}
    with Pipeline.open_reader(settings_of(environ)) as reader:
        for work in (reader.codes, lambda: list(reader.trades(None, 0, NEVER))):
            with pytest.raises(StoreError, match=r"MongoDB at mongodb://127\.0\.0\.1:1"):
                work()


def test_what_nothing_can_be_in_holds_nothing_in_either_store(place: Place) -> None:
    """No code, no close, and a span that ends before it begins, or lies where no trade has a time."""
    place.put(trade(MAOTAI, 0, "10"))
    assert not place.store.write([]).refused
    assert not place.store.write_closes([])
    assert not place.store.finals([])
    assert not place.store.newest([], 0, NEVER)
    with place.reader() as reader:
        for since, until in ((TEN + MINUTE, TEN + 1), (NEVER - 1, NEVER), (0, 0), (5, 6), (TEN, TEN)):
            assert not reader.candles([MAOTAI], since, until, MINUTE)
            assert not [*reader.trades([MAOTAI], since, until)]
            assert not reader.gaps([MAOTAI], since, until)
        assert not reader.candles([], 0, NEVER, MINUTE)
        assert not [*reader.trades([], 0, NEVER)]
        assert not reader.closes([MAOTAI], "2026-08-15", "2026-08-14")
        assert not reader.closes([], DAY, DAY)
        assert not reader.last_finals({})
        assert not reader.last([])
        assert not reader.newest_codes(0)
