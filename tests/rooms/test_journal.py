"""The journal keeps its promises: what was accepted is answered, what was answered is kept, over any crash."""

from __future__ import annotations

import contextlib
import json
import logging
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from kit.clock import FakeClock
from kit.daemons import ROOT_FOLDER, number

import stockrt
from stockrt import Command, Journal, StoreError

NOON = 1_800_000_000.0
any_text = st.text(st.one_of(st.characters(), st.sampled_from("\ud800\udfff\0\u2028'\"")), max_size=20)
any_json = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), any_text),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(any_text, inner, max_size=3)),
    max_leaves=8,
)


def command(execution_id: str = "", **context: object) -> Command:
    """A command for one code."""
    return Command(execution_id, dict(context), ["AAPL.US"])


@pytest.fixture
def clock() -> FakeClock:
    """The journal's clock."""
    return FakeClock(NOON)


@pytest.fixture
def journal(tmp_path: Path, clock: FakeClock) -> Iterator[Journal]:
    """An empty journal."""
    made = Journal(tmp_path, clock)
    yield made
    made.close()


def reopened(journal: Journal, clock: FakeClock) -> Journal:
    """The same journal after a restart."""
    journal.close()
    return Journal(journal.path.parent, clock)


def answered(journal: Journal, execution_id: str, received: bool = False) -> int:
    """Accept and answer a command, and return its number."""
    (accepted,) = journal.accept([command(execution_id)])
    journal.answer(accepted, f"answer of {execution_id}")
    if received:
        journal.received([accepted])
    return accepted


# ------------------------------------------------------------------------------------------------------
# A command's life
# ------------------------------------------------------------------------------------------------------


def test_a_command_is_open_until_its_answer_and_the_answer_until_its_receipt(journal: Journal) -> None:
    assert journal.find("a") is None
    (accepted,) = journal.accept([command("a", meta={"x": 1})])
    assert journal.find("a") == (accepted, None)
    assert journal.read(accepted) == (accepted, {"meta": {"x": 1}}, ["AAPL.US"])
    assert journal.unanswered() == [(accepted, 0)]
    assert journal.unreceived() == []
    journal.answer(accepted, "done")
    assert journal.find("a") == (accepted, "done")
    assert journal.unanswered() == []
    assert journal.unreceived() == [(accepted, len("done"))]
    assert journal.answer_of(accepted) == "done"
    journal.received([accepted])
    assert journal.unreceived() == []
    assert journal.find("a") == (accepted, "done")


def test_commands_and_answers_keep_their_order(journal: Journal) -> None:
    numbers = journal.accept([command(name) for name in "cab"])
    assert numbers == sorted(numbers)
    assert [found for found, _ in journal.unanswered()] == numbers
    for accepted in reversed(numbers):
        journal.answer(accepted, "x")
    assert [found for found, _ in journal.unreceived()] == numbers


def test_commands_without_an_id_are_never_the_same(journal: Journal) -> None:
    first, second = journal.accept([command(), command()])
    assert first != second
    assert journal.find("") is None


def test_an_id_is_accepted_once_and_a_group_whole_or_not_at_all(journal: Journal) -> None:
    journal.accept([command("a")])
    with pytest.raises(StoreError):
        journal.accept([command("b"), command("a")])
    assert journal.find("b") is None
    assert len(journal.unanswered()) == 1


def test_the_age_of_a_command_is_told(journal: Journal, clock: FakeClock) -> None:
    (first,) = journal.accept([command("a")])
    clock.advance(100)
    (second,) = journal.accept([command("b")])
    clock.advance(21)
    assert journal.unanswered() == [(first, 121), (second, 21)]


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(context=st.dictionaries(any_text, any_json, max_size=3), codes=st.lists(any_json, max_size=3))
def test_any_command_comes_back_as_it_was(
    journal: Journal, context: dict[str, Any], codes: list[object]
) -> None:
    (accepted,) = journal.accept([Command("", context, codes)])
    kept = journal.read(accepted)
    assert json.dumps(kept.context) == json.dumps(context)
    assert json.dumps(kept.codes) == json.dumps(codes)


@pytest.mark.parametrize(
    "odd", ["\ud800", "a\0b", "'; DROP TABLE executions; --", "x" * 100_000, "\U0001f600"]
)
def test_any_id_is_found_again(journal: Journal, odd: str) -> None:
    assert journal.find(odd) is None
    (accepted,) = journal.accept([command(odd)])
    assert journal.find(odd) == (accepted, None)


# ------------------------------------------------------------------------------------------------------
# What is forgotten
# ------------------------------------------------------------------------------------------------------


def test_the_last_thousand_answers_are_kept(journal: Journal) -> None:
    waiting = answered(journal, "unreceived")
    (still_open,) = journal.accept([command("open")])
    for n in range(1100):
        answered(journal, f"e{n}", received=True)
    assert [n for n in range(1100) if journal.find(f"e{n}")] == list(range(100, 1100))
    assert [found for found, _ in journal.unreceived()] == [waiting]
    assert [found for found, _ in journal.unanswered()] == [still_open]


def test_short_lives_forget_too(journal: Journal, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stockrt, "ANSWERS_KEPT", 20)
    for n in range(60):
        answered(journal, f"e{n}", received=True)
        if not n % 5:
            journal.close()
            journal = Journal(journal.path.parent, clock)
    assert [n for n in range(60) if journal.find(f"e{n}")] == list(range(40, 60))
    journal.close()


def test_an_answer_costs_the_same_however_many_are_kept(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stockrt, "ANSWERS_KEPT", number(1000, 1000, quick=200))
    most = stockrt.ANSWERS_KEPT * 6 // 5

    def steps() -> int:
        """Return the steps of SQLite's machine from a command to its answer, in tens."""
        taken: list[int] = []
        with journal._file.write() as db:
            db.set_progress_handler(lambda: taken.append(1), 10)
        answered(journal, "measured" + str(len(found)))
        with journal._file.write() as db:
            db.set_progress_handler(None, 0)
        return len(taken)

    found: list[int] = []
    for n in range(most):
        answered(journal, f"e{n}", received=True)
        if n in (10, most - 1):
            found.append(steps())
    assert found[1] <= found[0] * 1.5


def test_answers_older_than_an_hour_are_dropped_with_a_warning(
    journal: Journal, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    old = [answered(journal, name) for name in "ab"]
    clock.advance(3599)
    young = answered(journal, "c")
    with caplog.at_level(logging.WARNING):
        assert [found for found, _ in journal.unreceived()] == [*old, young]
        assert not caplog.records
        clock.advance(2)
        for _ in range(2):
            assert [found for found, _ in journal.unreceived()] == [young]
    (record,) = caplog.records
    assert "2 results" in record.getMessage()
    assert journal.find("a") == (old[0], "answer of a")  # still not executed twice


# ------------------------------------------------------------------------------------------------------
# Restarts
# ------------------------------------------------------------------------------------------------------


def answer_of(status: str = "success", **counts: int) -> str:
    numbers = dict.fromkeys(("success_count", "duplicate_count", "kept_count", "failed_count"), 0) | counts
    return json.dumps({"status": status, "workflow_name": "w", "message": "m", "result": numbers})


def test_totals_are_of_everything_since_the_first_answer(journal: Journal, clock: FakeClock) -> None:
    """Executions as runs, over restarts, and after the answers themselves are forgotten."""
    assert journal.totals() == {}
    answers = (
        answer_of(success_count=5, duplicate_count=2),
        answer_of(success_count=1, failed_count=3),
        answer_of("failure", kept_count=4),
        "no result",
    )
    for number_of, text in enumerate(answers):
        journal.answer(journal.accept([command(f"e{number_of}")])[0], text)
        clock.advance(100)
    journal.note_run(NOON, answer_of(success_count=2))
    again = reopened(journal, clock)
    assert again.totals() == {
        "since": int(NOON), "success": 2, "partial": 1, "failure": 2, "stored": 6, "known": 2, "kept": 4, "failed": 3,
    }  # fmt: skip
    again.close()


def test_the_last_thousand_runs_are_kept_and_push_no_answer_out(
    journal: Journal, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stockrt, "ANSWERS_KEPT", 3)
    for name in ("a", "", "c"):
        answered(journal, name, received=True)
        clock.advance(1)
    for _ in range(10):
        journal.note_run(NOON, answer_of())
        clock.advance(1)
    journal.received([])
    assert journal.find("a") is not None
    answered(journal, "d")
    assert [one["execution_id"] for one in journal.last(100)] == ["a", None, "c", None, None, None, "d"]
    assert [one["delivered"] for one in journal.last(100)] == [True, True, True, None, None, None, False]
    clock.advance(1)
    journal.accept([command("open")])
    assert [one["execution_id"] for one in journal.last(1, only_ended=True)] == ["d"]
    assert [one["execution_id"] for one in journal.last(1)] == ["open"]


FORMAT_1 = """
CREATE TABLE executions (
    number INTEGER PRIMARY KEY AUTOINCREMENT, execution_id TEXT UNIQUE, accepted_at REAL NOT NULL,
    context TEXT NOT NULL, codes TEXT NOT NULL, answer TEXT, answered_at REAL, received INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX executions_open ON executions (number) WHERE answer IS NULL OR NOT received;
INSERT INTO executions VALUES (1, 'old', 1.0, '{"workflow_name": "w"}', '[]', '{"status": "success"}', 2.0, 1);
INSERT INTO executions VALUES (2, 'open', 3.0, '{}', '["A.US"]', NULL, NULL, 0);
PRAGMA user_version = 1;
"""


def test_a_journal_of_the_former_format_is_taken_over(tmp_path: Path, clock: FakeClock) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / stockrt.JOURNAL_NAME)) as db:
        db.executescript(FORMAT_1)
    with contextlib.closing(Journal(tmp_path, clock)) as journal:
        assert [(one["execution_id"], one["status"]) for one in journal.last(9)] == [
            ("old", "success"), ("open", None),
        ]  # fmt: skip
        assert [number_of for number_of, _ in journal.unanswered()] == [2]
        assert journal.totals() == {}


FORMAT_2 = (
    FORMAT_1
    + """
CREATE TABLE runs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, started_at REAL NOT NULL, ended_at REAL NOT NULL, answer TEXT NOT NULL
);
CREATE TABLE totals (name TEXT PRIMARY KEY, count INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE clock (boot TEXT NOT NULL, ahead REAL NOT NULL);
INSERT INTO runs VALUES (1, 4.0, 5.0, '{"status": "success", "message": "as it was sent"}');
PRAGMA user_version = 2;
"""
)


def said_of(words: str) -> str:
    """What an answer says, as the journal keeps it."""
    return json.dumps({"message": {"kind": words, "values": {}, "text": "its English"}, "failures": {}})


def test_a_journal_without_words_in_all_languages_shows_what_was_sent(
    tmp_path: Path, clock: FakeClock
) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / stockrt.JOURNAL_NAME)) as db:
        db.executescript(FORMAT_2)
    with contextlib.closing(Journal(tmp_path, clock)) as journal:
        journal.note_run(NOON, answer_of(), said_of("tools.stopped"))
        *_, run, fresh = journal.last(9)
        assert (run["message"], run["status"]) == ("as it was sent", "success")
        assert [stockrt.in_language(str_of(fresh), language) for language in ("en", "zh")] == [
            "stopped",
            "已停止",
        ]


def str_of(one: stockrt.ExecutionFacts) -> str:
    """Its message."""
    assert one["message"] is not None
    return one["message"]


def test_what_answers_say_is_kept_in_all_languages_as_long_as_they_are(
    journal: Journal, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of executions and runs, whose numbers are the same."""
    monkeypatch.setattr(stockrt, "ANSWERS_KEPT", 2)
    for kind in ("tools.stopped", "tools.install_anew", "tools.no_memory"):
        (number_of,) = journal.accept([command()])
        journal.answer(number_of, answer_of("failure"), said_of(kind))
        journal.note_run(NOON, answer_of(), said_of(kind))
        clock.advance(1)
        journal.received([number_of])
    told = [stockrt.in_language(str_of(one), "zh") for one in journal.last(9)]
    assert sorted(told) == sorted(2 * ["请重新安装", "内存不足；请检查服务单元的 MemoryMax="])
    with contextlib.closing(sqlite3.connect(journal.path)) as db:
        assert [row[0] for row in db.execute("SELECT number FROM said ORDER BY 1")] == [-3, -2, 2, 3]


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (said_of("of.another.version"), "its English"),
        ("{no JSON", "m"),
        ("[]", "m"),
        ('{"message": 7, "failures": {}}', "m"),
        ('{"message": "x"}', "m"),
        ("", "m"),
    ],
)
def test_words_that_cannot_be_read_are_shown_as_they_were_sent(
    journal: Journal, said: str, shown: str
) -> None:
    journal.note_run(NOON, answer_of(), said)
    assert [one["message"] for one in journal.last(1)] == [shown]


def test_an_answer_that_lost_its_lists_is_shown_as_it_is_sent(journal: Journal) -> None:
    (number_of,) = journal.accept([command()])
    journal.answer(number_of, answer_of(), said_of("tools.stopped"))
    journal.shorten([number_of])
    (one,) = journal.last(1)
    assert "sent without its lists" in str_of(one) and not isinstance(one["message"], stockrt.Phrase)


def test_everything_survives_a_restart(journal: Journal, clock: FakeClock) -> None:
    done, waiting = answered(journal, "done", received=True), answered(journal, "waiting")
    (still_open,) = journal.accept([command("open", meta="\ud800")])
    clock.advance(30)
    again = reopened(journal, clock)
    assert again.find("done") == (done, "answer of done")
    assert again.unreceived() == [(waiting, len("answer of waiting"))]
    assert again.answer_of(waiting) == "answer of waiting"
    assert again.unanswered() == [(still_open, 30)]
    assert again.read(still_open).context == {"meta": "\ud800"}
    (later,) = again.accept([command("later")])
    assert later > still_open
    again.close()


def test_numbers_are_not_used_twice(journal: Journal, clock: FakeClock) -> None:
    numbers = {answered(journal, f"e{n}", received=True) for n in range(3)}
    again = reopened(journal, clock)
    assert not numbers & set(again.accept([command("new")]))
    again.close()


def test_a_file_of_a_newer_program_is_left_alone(journal: Journal, clock: FakeClock) -> None:
    journal.close()
    with sqlite3.connect(journal.path) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreError, match="newer stockrt"):
        Journal(journal.path.parent, clock)


def test_a_broken_file_is_set_aside_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = b"no database at all" * 1000
    (tmp_path / stockrt.JOURNAL_NAME).write_bytes(broken)
    with contextlib.closing(Journal(tmp_path)) as journal:
        (number,) = journal.accept([Command("e1", {}, ["A.US"])])
        assert journal.unanswered()[0][0] == number
    (aside,) = tmp_path.glob("executions.db.damaged-*")
    assert aside.read_bytes() == broken
    (record,) = caplog.records
    assert record.levelname == "ERROR" and aside.name in record.getMessage()


def spoil(journal: Journal, **fields: str) -> None:
    """Change the row of every command, as a bad disk would."""
    with contextlib.closing(sqlite3.connect(journal.path)) as db, db:
        for name, value in fields.items():
            db.execute(f"UPDATE executions SET {name} = ?", (value,))


@pytest.mark.parametrize(
    "fields", [{"context": "{x"}, {"context": "[]"}, {"codes": '"A.US"'}, {"codes": ""}], ids=str
)
def test_a_command_that_the_disk_has_changed_is_lost_by_name(
    journal: Journal, fields: dict[str, str]
) -> None:
    (number,) = journal.accept([command("e1")])
    spoil(journal, **fields)
    with pytest.raises(stockrt.LostCommand, match=r"damage to .*executions\.db"):
        journal.read(number)
    journal.forget(number)
    assert journal.unanswered() == [] and journal.find("e1") is None
    with pytest.raises(stockrt.LostCommand):
        journal.read(number)


def test_a_result_without_its_lists_is_kept_so(journal: Journal) -> None:
    first, second, unanswered = journal.accept([command("e1"), command("e2"), command("e3")])
    text = json.dumps({"status": "failure", "message": "no", "error": "no", "result": {}})
    journal.answer(first, text)
    journal.answer(second, text)
    for _ in range(2):
        journal.shorten([first, unanswered, 0])
        found = journal.find("e1")
        assert found is not None and found.answer == stockrt.without_lists(text)
        assert journal.answer_of(second) == text
        assert [one.number for one in journal.unanswered()] == [unanswered]


def test_two_threads_may_use_it(journal: Journal) -> None:
    errors: list[Exception] = []

    def work(who: str) -> None:
        try:
            for n in range(50):
                answered(journal, f"{who}{n}")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(who,)) for who in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(journal.unreceived()) == 200


WRITER = """
import sys
from pathlib import Path
from stockrt import Command, Journal
journal = Journal(Path(sys.argv[1]))
life = sys.argv[2]
n = 0
while True:
    n += 1
    (number,) = journal.accept([Command(f"{life}-{n}", {}, ["A.US"])])
    print("accepted", f"{life}-{n}", flush=True)
    if n % 2:
        journal.answer(number, f"answer {life}-{n}")
        print("answered", f"{life}-{n}", flush=True)
"""


def test_what_was_acknowledged_is_there_after_a_kill(tmp_path: Path) -> None:
    rng = random.Random(3)
    said: list[str] = []
    for life in range(number(3, 20)):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(life)],
            cwd=ROOT_FOLDER,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        ) as writer:
            assert writer.stdout is not None
            said += [writer.stdout.readline().strip() for _ in range(rng.randint(1, 60))]
            writer.send_signal(signal.SIGKILL)
            said += [line.strip() for line in writer.stdout if line.endswith("\n")]
        journal = Journal(tmp_path)
        for line in said:
            what, name = line.split()
            found = journal.find(name)
            assert found is not None, line
            if what == "answered":
                assert found.answer == f"answer {name}"
        journal.close()
