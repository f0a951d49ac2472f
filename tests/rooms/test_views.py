"""Views: what is shown of the stores and of the metrics."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from kit.cases import each
from kit.trades import CREATED, settings_of

import stockrt
from stockrt import (
    LATENCY,
    METRICS,
    PANELS,
    Bar,
    Candle,
    Chart,
    Close,
    Gap,
    LocalFile,
    Pipeline,
    Slot,
    Span,
    SqliteStore,
    Trade,
    bar_close,
    dashboard,
    draw_chart,
    open_store_file,
    price_marks,
    quotes,
    read_charts,
    session_of,
    slots_of,
    to_document,
    trading_span,
)

MINUTE = 60_000
AAPL, MAOTAI, RELIANCE, BITCOIN = "AAPL.US", "600519.SH", "RELIANCE.IN", "BTCUSDT"
NOON = int(datetime(2026, 11, 27, 17, 0, tzinfo=UTC).timestamp()) * 1000  # twelve o'clock in New York


class Place:
    """An embedded store that a test fills."""

    def __init__(self, folder: Path, file: LocalFile) -> None:
        self.settings = settings_of({"STATE_DIRECTORY": str(folder)})
        self.file = file

    def put(self, code: str, *trades: tuple[int, str], volume: str = "100") -> None:
        """Store trades: times and prices."""
        found = [Trade(code, t, price, volume, "1", 1) for t, price in trades]
        assert not SqliteStore(self.file).write([to_document(one, CREATED) for one in found]).refused

    def close(self, code: str, t: int, price: str) -> None:
        """Store the final close of the session that a moment is in."""
        market = stockrt.market_of(code)
        assert market is not None
        bar = Bar(code, t, price, price, price, price, "1000", "1")
        SqliteStore(self.file).write_closes([bar_close(bar, session_of(market, t))])

    def provisional(self, code: str, t: int, price: str) -> None:
        """Store the close of a session whose bar has not come."""
        document = to_document(Trade(code, t, price, "1", "1", 1), CREATED)
        day = session_of(stockrt.MARKETS["US"], t).date
        SqliteStore(self.file).write_closes([Close(document, day, provisional=True)])

    def charts(
        self, codes: Sequence[str], step: str, span: Span | None = None, room: int = 100
    ) -> dict[str, Chart]:
        """Return what is drawn of codes."""
        with Pipeline.open_reader(self.settings) as reader:
            last = reader.last(codes)
            return read_charts(reader, codes, last, step, span or Span(), NOON / 1000, room)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """An empty store."""
    with open_store_file(tmp_path) as file:
        yield Place(tmp_path, file)


# ------------------------------------------------------------------------------------------------------
# Charts
# ------------------------------------------------------------------------------------------------------


def candle(t: int, first: float, last: float, volume: str = "10") -> Candle:
    """Return a candle without a shadow."""
    return Candle(t, str(first), str(max(first, last)), str(min(first, last)), str(last), volume, 1)


def test_steps_without_trades_are_left_out_but_the_first_of_a_gap_are_shown() -> None:
    """What was traded beside or within a gap is marked as such; a long gap takes no more room than five steps."""
    candles = [candle(NOON + n * MINUTE, 1, 2) for n in (0, 1, 2, 30)]
    gaps = [Gap("stock", (AAPL,), NOON + 2 * MINUTE + 5, NOON + 20 * MINUTE, "cut")]
    slots = slots_of(candles, gaps, NOON, MINUTE, NOON + 60 * MINUTE)
    assert [(slot.t - NOON) // MINUTE for slot in slots] == [0, 1, 2, 3, 4, 5, 6, 7, 30]
    assert [slot.is_gap for slot in slots] == [False, False, *[True] * 6, False]
    assert [slot.candle is None for slot in slots] == [False, False, False, *[True] * 5, False]


def test_many_gaps_after_the_last_trade_push_no_candle_out() -> None:
    """A stream that was cut each night while a share rests; a gap before the chart is not told with it."""
    candles = [candle(NOON + n * MINUTE, 1, 2) for n in range(60)]
    gaps = [
        Gap("stock", (AAPL,), NOON + n * 86_400_000, NOON + n * 86_400_000 + 9 * MINUTE, "cut")
        for n in range(200)
    ]
    slots = slots_of(candles, gaps, NOON, MINUTE, NOON + 300 * 86_400_000)
    assert [slot.candle for slot in slots] == [*candles, *[None] * 5]
    chart = stockrt.newest_steps(Chart(AAPL, "1m", slots, gaps), 40)
    assert (len(chart.slots), chart.left_out, chart.gaps) == (40, 25, gaps[1:])


def test_a_gap_that_lasts_goes_on_until_now_and_a_short_one_marks_its_step() -> None:
    candles = [candle(NOON, 1, 2)]
    open_still = Gap("stock", (AAPL,), NOON + 90_000, None, "cut")
    slots = slots_of(candles, [open_still], NOON, MINUTE, NOON + 3 * MINUTE)
    assert [(slot.t - NOON) // MINUTE for slot in slots if slot.is_gap] == [1, 2]
    short = Gap("stock", (AAPL,), NOON + 7, NOON + 7, "cut")
    assert slots_of(candles, [short], NOON, MINUTE, NOON) == [Slot(NOON, candles[0], is_gap=True)]


def test_steps_are_those_of_the_exchanges_clock(place: Place) -> None:
    """An hour in India begins at half past of UTC's."""
    ten = int(datetime(2026, 11, 27, 4, 30, tzinfo=UTC).timestamp()) * 1000
    place.put(RELIANCE, (ten, "1"), (ten + 59 * MINUTE, "2"), (ten + 61 * MINUTE, "3"))
    for span in (Span(), Span(ten + 20 * MINUTE, ten + 90 * MINUTE)):
        chart = place.charts([RELIANCE], "1h", span)[RELIANCE]
        assert [slot.t for slot in chart.slots] == [ten, ten + 60 * MINUTE]
    assert stockrt.time_ticks(chart, 6) == [(0, "11-27 10:00"), (1, "11:00")]
    assert stockrt.time_ticks(chart, 1) == [(0, "11-27 10:00")]


def test_candles_are_those_of_the_last_days_with_a_trade_and_what_has_no_room_is_counted(
    place: Place,
) -> None:
    """Of a share that is suspended too: its last day may be long ago."""
    place.put(AAPL, *((NOON - n * MINUTE, str(n)) for n in range(30)), (NOON - 86_400_000, "7"))
    place.put(MAOTAI, (NOON - 300 * 86_400_000, "1450"))
    charts = place.charts([AAPL, MAOTAI, BITCOIN], "1m", room=20)
    assert set(charts) == {AAPL, MAOTAI}
    assert (len(charts[AAPL].slots), charts[AAPL].left_out) == (20, 10)
    last = charts[AAPL].slots[-1].candle
    assert last == Candle(NOON, "0", "0", "0", "0", "100", 1)
    assert [slot.candle.close for slot in charts[MAOTAI].slots if slot.candle] == ["1450"]
    assert len(place.charts([AAPL], "5m")[AAPL].slots) == 8  # six, one of noon itself, one of the day before


def test_a_span_is_kept_to(place: Place) -> None:
    place.put(AAPL, *((NOON + n * MINUTE, str(n)) for n in range(10)))
    chart = place.charts([AAPL], "1m", Span(NOON + 3 * MINUTE, NOON + 6 * MINUTE))[AAPL]
    assert [slot.candle.close for slot in chart.slots if slot.candle] == ["3", "4", "5"]
    assert place.charts([AAPL], "1m", Span(NOON - 9 * MINUTE, NOON))[AAPL].slots == []


def test_days_are_final_closes(place: Place) -> None:
    """What is provisional is none; of a code without any there is an empty chart."""
    place.put(AAPL, (NOON, "5"))
    place.put(BITCOIN, (NOON, "5"))
    for days in (3, 2, 1):
        place.close(AAPL, NOON - days * 86_400_000, f"10{days}.5")
    place.provisional(AAPL, NOON, "100.5")
    charts = place.charts([AAPL, BITCOIN], "1d")
    assert [slot.candle.close for slot in charts[AAPL].slots if slot.candle] == ["103.5", "102.5", "101.5"]
    assert [words for _, words in stockrt.time_ticks(charts[AAPL], 9)] == [
        "2026-11-24",
        "2026-11-25",
        "2026-11-26",
    ]
    assert charts[BITCOIN].slots == []
    two_days = Span(NOON - 3 * 86_400_000 - 17 * 3_600_000, NOON - 86_400_000 - 17 * 3_600_000)
    slots = place.charts([AAPL], "1d", two_days)[AAPL].slots
    assert [slot.candle.close for slot in slots if slot.candle] == ["103.5", "102.5"]


# ------------------------------------------------------------------------------------------------------
# Candles in a terminal
# ------------------------------------------------------------------------------------------------------

RISES_AND_FALLS = Chart(
    AAPL, "1m", [Slot(NOON + n * MINUTE, candle(NOON, *p)) for n, p in enumerate([(1, 9), (9, 1)])]
)


def test_what_rises_is_drawn_other_than_what_falls() -> None:
    """In colours as the reader has them, and without."""
    for up, down in (("red", "green"), ("green", "red")):
        drawn, _ = draw_chart(RISES_AND_FALLS, 60, 20, up, color=True)
        codes = {"red": "\033[38;5;1m", "green": "\033[38;5;2m"}
        first, second = (drawn.find(f"{codes[name]}█") for name in (up, down))
        assert first != -1
        assert f"{codes[down]}▒" in drawn
        assert second > drawn.find("┘")  # its volume alone is full
    plain, _ = draw_chart(RISES_AND_FALLS, 60, 20, "red", color=False)
    assert "\033" not in plain and "█" in plain and "▒" in plain


@each("volume", ["7", "31194", "999999", "1234567"])
def test_a_candle_stands_above_its_volume(volume: str) -> None:
    slots = [Slot(NOON + n * MINUTE, candle(NOON, n + 1, n + 2, volume)) for n in range(2)]
    lines = draw_chart(Chart(AAPL, "1m", slots), 60, 20, "red", color=False)[0].splitlines()
    places = [{place for place, one in enumerate(line) if one == "█"} for line in lines]
    assert set().union(*places[:14]) == set().union(*places[14:])


@each("count", [1, 2, 13, 60])
@each("width", [40, 80, 200])
def test_a_chart_is_as_wide_as_its_terminal_at_most(count: int, width: int) -> None:
    """Each candle has a column of its own, whatever there is room for; prices may be the same, or below zero."""
    slots = [Slot(NOON + n * MINUTE, candle(NOON, -37.5, -37.5 + n % 2, "0")) for n in range(count)]
    drawn, shown = draw_chart(Chart(AAPL, "1m", slots), width, 24, "red", color=False)
    lines = drawn.splitlines()
    assert len(lines) == 24
    assert max(map(len, lines)) <= width
    assert (len(shown.slots) + shown.left_out, shown.slots) == (count, slots[-len(shown.slots) :])
    assert len(shown.slots) == min(count, width - len("-36.5") - 2)
    assert any("┼" in line for line in lines if "┤" in line)


def test_the_price_of_the_opening_auction_is_the_sessions_open(place: Place) -> None:
    """Shanghai's prints at 9:25, five minutes before trading begins; the hours before New York opens are apart."""
    auction = int(datetime(2026, 11, 27, 1, 25, tzinfo=UTC).timestamp()) * 1000
    early = int(datetime(2026, 11, 27, 14, 25, tzinfo=UTC).timestamp()) * 1000
    place.put(MAOTAI, (auction, "1450.00"), (auction + 10 * MINUTE, "1460.00"))
    place.put(AAPL, (early, "260.0"), (early + 10 * MINUTE, "270.0"))
    with Pipeline.open_reader(place.settings) as reader:
        maotai, apple = (quote.session for quote in quotes(reader, [MAOTAI, AAPL]))
    assert maotai is not None and (maotai.open, maotai.volume) == ("1450.00", "200")
    assert apple is not None and (apple.open, apple.volume) == ("270.0", "100")


@each(
    ("code", "moment", "day", "since"),
    [
        ("EURUSD", "2026-08-13T20:59", "2026-08-13", "2026-08-12T21:00"),
        ("EURUSD", "2026-08-13T21:00", "2026-08-14", "2026-08-13T21:00"),
        ("EURUSD", "2026-08-16T21:30", "2026-08-17", "2026-08-16T21:00"),  # a Sunday
        ("EURUSD", "2026-08-14T21:00", "2026-08-14", "2026-08-13T21:00"),  # after Friday's close: follows it
        (BITCOIN, "2026-08-13T23:59", "2026-08-13", "2026-08-13T00:00"),
        (BITCOIN, "2026-08-14T00:00", "2026-08-14", "2026-08-14T00:00"),
    ],
)
def test_what_trades_through_its_close_is_in_the_next_session_from_then_on(
    code: str, moment: str, day: str, since: str
) -> None:
    at = [int(datetime.fromisoformat(f"{text}+00:00").timestamp()) * 1000 for text in (moment, since)]
    assert trading_span(code, at[0])[:2] == (day, at[1])


@each(
    ("low", "high"),
    [("10.01", "10.03"), ("0.0000000000009", "0.0000000000015"), ("9", "10"), ("-3", "3"), ("7", "7")],
)
def test_the_axis_has_no_price_twice(low: str, high: str) -> None:
    words = [*price_marks([Candle(NOON, low, high, low, high, "1", 1)]).values()]
    assert sorted({*map(float, words)}) == [*map(float, words)]
    assert len({*words}) == 5
    assert low == high or (float(words[0]), float(words[-1])) == (float(low), float(high))


def test_a_gap_is_a_column_of_its_own_colour() -> None:
    chart = Chart(AAPL, "1m", [*RISES_AND_FALLS.slots, Slot(NOON + 5 * MINUTE, None, is_gap=True)])
    lines = draw_chart(chart, 60, 20, "red", color=False)[0].splitlines()
    assert sum("░" in line for line in lines) == 20 - 6 - 2  # of all lines of prices


# ------------------------------------------------------------------------------------------------------
# The dashboard
# ------------------------------------------------------------------------------------------------------

# A histogram is three kinds of series.
SERIES = {metric.name for metric in METRICS} | {f"{LATENCY}_{part}" for part in ("bucket", "sum", "count")}


def expressions() -> list[str]:
    """Return the queries of the dashboard as Grafana gets them."""
    return [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]


def test_no_panel_is_without_its_metric_and_no_metric_without_a_panel() -> None:
    used = {name for text in expressions() for name in re.findall(r"stockrt_\w+", text)}
    assert used - SERIES == set()
    assert SERIES - used == set()


def test_every_series_is_that_of_the_instances_chosen_and_every_label_is_one_of_its_metric() -> None:
    labels = {metric.name: metric.label for metric in METRICS} | {f"{LATENCY}_bucket": "le"}
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            found = re.findall(r"(stockrt_\w+)(\{instance=~\"\$instance\"\})?", target["expr"])
            assert all(chosen for _, chosen in found), target["expr"]
            named = set(re.findall(r"by \((\w+)\)", target["expr"]))
            named |= set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) - {
                "instance",
                "exported_instance",
            }
            assert named <= {labels.get(name, "") for name, _ in found}, (target["expr"], named)


def test_counters_are_shown_as_what_was_counted_lately() -> None:
    """Since a counter begins anew with every start of the daemon, its number says nothing."""
    counters = {metric.name for metric in METRICS if metric.kind == "counter"}
    for text in expressions():
        for name in re.findall(r"stockrt_\w+", text):
            lately = re.search(rf"(?:increase|rate)\({name}\{{[^}}]*}}\[", text) is not None
            assert lately == (name in counters or name.startswith(LATENCY)), text


def overlaps(one: dict[str, int], other: dict[str, int]) -> bool:
    """Return whether two places of the grid share a cell."""
    return all(
        one[at] < other[at] + other[size] and other[at] < one[at] + one[size] for at, size in ("xw", "yh")
    )


def test_it_is_json_that_grafana_imports() -> None:
    """A data source to choose, a known model, panels that stand beside each other on 24 columns."""
    model: dict[str, Any] = json.loads(json.dumps(dashboard()))
    assert "id" not in model  # which only a dashboard has that is there already
    variables = {one["name"]: one for one in model["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    panels = model["panels"]
    assert len(panels) == len(PANELS) == len({panel["id"] for panel in panels})
    places = [panel["gridPos"] for panel in panels]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    pairs = [(a, b) for n, a in enumerate(places) for b in places[:n]]
    assert not [pair for pair in pairs if overlaps(*pair)]
    for panel in panels:
        assert panel["description"]
        assert {panel["datasource"]["uid"], *(one["datasource"]["uid"] for one in panel["targets"])} == {
            "${datasource}"
        }
        assert max(Counter(one["refId"] for one in panel["targets"]).values()) == 1
    states = next(panel for panel in panels if panel["title"] == "State of each key")
    options = states["fieldConfig"]["defaults"]["mappings"][0]["options"]
    assert [options[str(number)]["text"] for number in range(3)] == list(stockrt.KEY_STATES)
