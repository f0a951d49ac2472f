"""The bench runs: its table has every row, its picture follows from the numbers alone, a missed target counts."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import bson
import pymongo
import pytest
import websocket

from bench import bench
from bench.null_mongo import NullMongo, read_message
from bench.quick_infoway import make_answer
from bench.quick_platform import QuickPlatform, read_frame

BENCH = Path(bench.__file__)


@pytest.fixture(scope="module")
def short_run(pyz: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The short form, run once: what it printed and drew."""
    svg = tmp_path_factory.mktemp("bench") / "bench.svg"
    done = subprocess.run(
        [sys.executable, "-B", str(BENCH), "--short", "--pyz", str(pyz), "--svg", str(svg)],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(table=done.stdout, svg=svg.read_text("utf-8"))


@pytest.mark.long
@pytest.mark.parametrize(
    "row",
    ["throughput, no latency", "CPU per 100,000 trades", "its close written too", "into a real server:",
     "  into the null MongoDB", "counted on this machine alone", "50 codes: p99",
     "throughput, API latency 50 ms", "rate-limited (10/s", "answers over the limit", "no latency: p50",
     "./stockrt.pyz --once with MongoDB", "./stockrt.pyz --version", "idle and connected, nothing executed yet",
     "after the executes", "CPU while idle", "memory at", "time per code",
     "trades in SQLite", "trades in MongoDB",
     "codes, from SQLite", "codes, from MongoDB", "all of it from SQLite", "all of it from MongoDB",
     "spool: write", "spool: drain",
     "stream: one connection into the null", "stream: one connection into the embedded", "real server: p50",
     "real server: p99", "stream: resident memory", "stream: CPU", ": lost", "burst of 5,000: memory"],
)  # fmt: skip
def test_the_short_form_measures_every_row(short_run: SimpleNamespace, row: str) -> None:
    (line,) = [line for line in short_run.table.splitlines() if row in line]
    assert any(character.isdigit() for character in line.partition(row)[2])


@pytest.mark.long
def test_it_draws_what_it_measured(short_run: SimpleNamespace) -> None:
    assert "<svg" in short_run.svg
    for word in ("trades/s", "sdk", "execute to result"):
        assert word in short_run.svg


def rows(reached: float) -> list[bench.Row]:
    return [
        bench.Row("slow", "慢", reached, 1.0, False, "s", "detail"),
        bench.Row("  told", "  说明", 2.0, None),
        bench.Row("fast", "快", reached, 0.5, True, "trades/s"),
    ]


@pytest.mark.parametrize(("reached", "missed"), [(0.4, ["fast"]), (0.7, []), (1.1, ["slow"])])
def test_a_missed_target_is_marked(reached: float, missed: list[str]) -> None:
    assert [row.name for row in rows(reached) if row.missed] == missed
    lines = bench.table(rows(reached)).splitlines()
    assert [line.split()[0] for line in lines if "MISSED" in line] == missed


def test_what_was_not_measured_is_said_and_misses_nothing() -> None:
    row = bench.Row("away", "无", None, 1.0)
    assert (row.missed, row.shown, row.used) == (False, "not measured", None)


@pytest.mark.long  # drawn by the bench alone
def test_the_same_numbers_give_the_same_picture(tmp_path: Path) -> None:
    speeds = {"no latency": {"floor": [1.0, 2.0], "sdk": [0.5], "ours": [3.0, 4.0]}}
    first, second, other = (tmp_path / name for name in ("first.svg", "second.svg", "other.svg"))
    bench.draw(rows(0.7), speeds, first)
    bench.draw(rows(0.7), speeds, second)
    bench.draw(rows(1.1), speeds, other)
    assert first.read_bytes() == second.read_bytes() != other.read_bytes()
    assert str(Path.home()) not in first.read_text("utf-8")


def test_the_tables_stand_between_their_marks() -> None:
    readme = "before\n<!-- bench en -->\nobsolete\n<!-- /bench -->\nafter\n<!-- bench zh -->\nalt\n<!-- /bench -->\n"
    written = bench.with_tables(readme, rows(0.7))
    assert written.startswith("before\n<!-- bench en -->\n|  | target | reached |")
    assert "obsolete" not in written
    assert "\n| slow | ≤ 1.00 s | 0.70 s | detail |" in written
    assert "\n| 慢 | ≤ 1.00 秒 |" in written
    assert bench.with_tables(written, rows(0.7)) == written


def test_the_readme_has_both_tables() -> None:
    """Of one run: each cell of the Chinese one is the English one's in Chinese, and no English word is left."""
    found = {mark[2]: mark[0].strip() for mark in bench.MARKS.finditer(bench.README.read_text("utf-8"))}
    assert [*found] == ["en", "zh"]
    english, chinese = (text.splitlines()[3:-1] for text in found.values())
    assert bench.in_chinese(english.pop()) == chinese.pop()
    for line, ours in zip(filter(None, english), filter(None, chinese), strict=True):
        cells = [bench.in_chinese(cell) for cell in line[2:-2].split(" | ")[1:]]
        shown = ours[2:-2].split(" | ")[1:]
        assert shown == cells
        names = r"python3 -c '[^']*'|floor|sdk|ours|insert_many|MongoDB|MB|ms|p50"
        assert re.findall(r"[A-Za-z]{2,}", re.sub(names, "", " ".join(shown))) == []


# ------------------------------------------------------------------------------------------------------
# The servers
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 1000])
def test_the_null_mongodb_counts_what_it_acknowledges(number: int) -> None:
    server = NullMongo()
    server.start()
    with pymongo.MongoClient[dict[str, object]](server.uri) as client:
        client.db.c.insert_many([{"_id": str(n), "x": 1} for n in range(number)])
        assert client.db.c.update_one({"a": 1}, {"$set": {"b": 2}}).matched_count == 1
        assert client.db.c.find_one({}) is None
    assert server.documents == number
    server.close()


def test_the_null_mongodb_reads_documents_inside_the_command() -> None:
    body = bson.encode({"insert": "c", "documents": [{"x": 1}, {"x": 2}]})
    assert read_message(struct.pack("<ib", 0, 0) + body) == ("insert", 2)


def test_the_quick_api_answers_as_the_real_one() -> None:
    head, _, body = make_answer("/stock/batch_trade/AAPL.US,TSLA.US").partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    import stockrt

    verdict = stockrt.decide(stockrt.Response(200, body), stockrt.utc_now())
    outcome = stockrt.read_records(stockrt.Batch("stock", "AAPL.US,TSLA.US"), verdict.records)
    assert [trade.s for trade in outcome.trades] == ["AAPL.US", "TSLA.US"]


@pytest.mark.parametrize("size", [0, 125, 126, 65_535, 65_536])
def test_the_quick_platform_reads_frames_of_every_length_once_they_are_whole(size: int) -> None:
    from websocket import ABNF

    content = bytes(number % 251 for number in range(size))
    frame = bytes(ABNF.create_frame(content, ABNF.OPCODE_BINARY).format())
    for end in {*range(min(len(frame), 20)), len(frame) - 1}:
        assert read_frame(frame[:end]) is None
    assert read_frame(frame + b"the next") == (ABNF.OPCODE_BINARY, content, len(frame))


def test_the_quick_platform_waits_for_the_answer_to_its_own_command() -> None:
    """Pings are answered meanwhile, the results of others are not taken for it, and the module gets its receipt."""
    with QuickPlatform() as platform:
        said: list[str | bytes] = []

        def module() -> None:
            ws = websocket.create_connection(f"ws://127.0.0.1:{platform.port}/websocket?hash=1")
            command = json.loads(ws.recv())["message"]
            ws.ping("are you there")
            for name in ("another", command["meta"]["execution_id"]):
                ws.send(json.dumps({"meta": {"execution_id": name}, "codes": command["args"]["code_list"]}))
            said.append(ws.recv())
            ws.close(timeout=0)

        thread = threading.Thread(target=module)
        thread.start()
        platform.connect()
        result = platform.execute("e7", ["A.US", "B.US"])
        thread.join(30)
    assert result.data == {"meta": {"execution_id": "e7"}, "codes": ["A.US", "B.US"]}
    assert result.took > 0
    assert said == ["receive result"]


def test_codes_are_those_that_the_program_reads() -> None:
    import stockrt

    for market in ("US", "SH"):
        codes = bench.make_codes(market, 1000)
        assert [stockrt.parse_code(code).code for code in codes] == list(dict.fromkeys(codes)) == codes
