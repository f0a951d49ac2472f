"""The outbox: every answer is sent until its receipt, in order, whatever happens to the connection."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st
from kit.cases import each

import stockrt
from stockrt import Failure, FailureKind, Outbox, Report


def sent(outbox: Outbox) -> list[str]:
    """Send everything that waits."""
    texts = []
    while (text := outbox.next()) is not None:
        texts.append(text)
        outbox.note_sent()
    return texts


def filled(*numbers: int) -> Outbox:
    outbox = Outbox()
    for number in numbers:
        outbox.add(number, f"answer {number}", now=float(number))
    return outbox


def test_each_is_sent_once_in_order_and_gone_with_its_receipt() -> None:
    outbox = filled(3, 5, 4)
    assert sent(outbox) == ["answer 3", "answer 5", "answer 4"]
    assert sent(outbox) == []
    assert len(outbox) == 3
    assert [outbox.note_received() for _ in range(3)] == [3, 5, 4]
    assert len(outbox) == 0


def test_a_receipt_for_nothing_is_for_nothing() -> None:
    outbox = filled(1)
    assert outbox.note_received() == 0
    assert sent(outbox) == ["answer 1"]


def test_what_has_no_receipt_goes_first_over_the_next_connection() -> None:
    outbox = filled(1, 2)
    sent(outbox)
    outbox.note_received()
    outbox.add(3, "answer 3", 3.0)
    outbox.reconnect()
    assert sent(outbox) == ["answer 2", "answer 3"]


def test_an_answer_is_there_once_but_is_sent_again_when_asked_for() -> None:
    outbox = filled(1)
    outbox.add(1, "answer 1", 2.0)
    assert sent(outbox) == ["answer 1"]
    outbox.add(1, "answer 1", 3.0)
    assert sent(outbox) == []
    outbox.add(1, "answer 1", 4.0, again=True)
    outbox.add(1, "answer 1", 4.0, again=True)
    assert sent(outbox) == ["answer 1"]
    outbox.reconnect()
    assert sent(outbox) == ["answer 1"]


def test_refusals_are_told_apart_though_no_journal_numbers_them() -> None:
    outbox = Outbox()
    for text in ("no", "no", "never"):
        outbox.add(0, text, 1.0)
    assert sent(outbox) == ["no", "no", "never"]


def test_what_is_too_old_is_given_up_by_number() -> None:
    outbox = filled(1, 2, 3)
    outbox.note_sent()
    assert outbox.drop_older(2.5) == [1, 2]
    assert sent(outbox) == ["answer 3"]
    assert outbox.drop_older(2.5) == []


def test_a_refused_command_that_comes_again_before_its_receipt_has_one_answer() -> None:
    """A server that retries what has no result would else get a failure and a success of one execution."""
    outbox = Outbox()
    assert not outbox.refuse_again("e", 0.0)
    outbox.refuse("e", "no", 0.0)
    outbox.refuse("", "nobody's", 0.0)
    assert outbox.refuse_again("e", 1.0) and not outbox.refuse_again("", 1.0)
    assert sent(outbox) == ["no", "nobody's"]
    assert outbox.refuse_again("e", 1.0) and outbox.refuse_again("e", 1.0)
    assert sent(outbox) == ["no"]
    outbox.reconnect()
    assert outbox.refuse_again("e", 1.0)
    assert not outbox.refuse_again(
        "e", stockrt.EXECUTION_LIFETIME_S + 1
    )  # nobody waits for that one any more
    while outbox.next():
        outbox.note_sent()
        outbox.note_received()
    assert not outbox.refuse_again("e", 1.0)


# ------------------------------------------------------------------------------------------------------
# A result that the server does not take
# ------------------------------------------------------------------------------------------------------


def settings(language: str = "en") -> stockrt.Settings:
    """Settings whose results are in a language."""
    environ = {"STATE_DIRECTORY": "/nowhere", "MODULE_NAME": "m", "MESSAGE_LANG": language}
    return stockrt.load_settings(environ, None, (), is_root=False).settings


def refused(reason: str) -> str:
    """The result of a command that was not executed."""
    return stockrt.empty_result({}, reason, settings()).text


def large(failed: int = 10_000, language: str = "en") -> str:
    """A result with long lists."""
    failures = {f"X{n}.US": Failure(FailureKind.API, "reason") for n in range(failed)}
    report = Report(total=failed + 1, stored=1, failures=failures)
    return stockrt.report_result({"meta": {"execution_id": "e"}}, report, settings(language)).text


def test_a_result_without_its_lists_keeps_its_counts_and_says_so() -> None:
    whole = json.loads(large(150))
    short = json.loads(stockrt.without_lists(large(150)))
    assert short["result"] == whole["result"] | {"failed_stocks": [], "failures": {}}
    assert short["message"].startswith(whole["message"]) and "without its lists" in short["message"]
    assert {name: value for name, value in short.items() if name not in ("message", "result")} == {
        name: value for name, value in whole.items() if name not in ("message", "result")
    }


def test_of_a_failure_the_error_says_it_too() -> None:
    short = json.loads(stockrt.without_lists(refused("why")))
    assert short["error"] == short["message"] and "without its lists" in short["error"]


def test_that_the_lists_are_left_out_is_said_once_and_in_the_language_of_the_result() -> None:
    whole = large(150, "zh")
    short = json.loads(stockrt.without_lists(whole))
    assert short["message"] == (
        f"{json.loads(whole)['message']}；发送时略去了明细列表：原有 {len(whole)} 字节，超出平台的上限"
    )
    assert stockrt.without_lists(json.dumps(short)) == json.dumps(short)


def test_somebody_elses_chinese_makes_no_result_chinese() -> None:
    failures = {"茅台": Failure(FailureKind.API, "签名错误")}
    report = Report(total=1, failures=failures, read_as={"腾讯": "00700.HK"})
    whole = stockrt.report_result({}, report, settings()).text
    assert "; sent without its lists: " in json.loads(stockrt.without_lists(whole))["message"]


@each("text", ["", "no JSON", "[]", "{}", '{"result": 1, "message": 2}', "[" * 5000])
def test_what_a_bad_disk_made_of_a_result_is_left_as_it_is(text: str) -> None:
    assert stockrt.without_lists(text) == text


def test_what_is_too_large_goes_again_without_its_lists_behind_the_others_and_is_then_given_up() -> None:
    outbox = Outbox()
    for number, text in enumerate(["one", large(), "three", "four"], 1):
        outbox.add(number, text, 0.0)
    for _ in range(3):
        outbox.note_sent()
    assert outbox.note_received() == 1
    blamed = outbox.note_too_large()
    assert blamed is not None and not blamed.is_short and blamed.number == 2
    outbox.reconnect()
    assert sent(outbox) == ["three", "four", stockrt.without_lists(large())]
    outbox.add(5, "five", 0.0)
    sent(outbox)
    blamed = outbox.note_too_large()
    assert blamed is not None and blamed.is_short and blamed.number == 2
    outbox.reconnect()
    assert sent(outbox) == ["three", "four", "five"]


def test_nothing_is_too_large_where_nothing_was_sent() -> None:
    assert Outbox().note_too_large() is None
    assert filled(1).note_too_large() is None


def test_what_is_long_when_the_connection_ends_goes_behind_the_others() -> None:
    outbox = Outbox()
    for number, text in enumerate([large(), "two", "three"], 1):
        outbox.add(number, text, 0.0)
    outbox.note_sent()
    for breaks in range(10):  # that may be anybody's fault: nothing is given up
        outbox.note_broken()
        outbox.reconnect()
        last = large() if breaks < 1 else stockrt.without_lists(large())
        assert sent(outbox) == ["two", "three", last]


def test_a_small_result_keeps_its_lists_however_often_the_connection_breaks() -> None:
    outbox = Outbox()
    outbox.add(1, large(3), 0.0)
    for _ in range(9):
        assert sent(outbox) == [large(3)]
        outbox.note_broken()
        outbox.reconnect()


@given(st.lists(st.sampled_from(["add", "send", "receipt", "reconnect"]), max_size=60))
def test_no_answer_is_lost_or_comes_before_an_older_one(steps: list[str]) -> None:
    outbox, added, confirmed = Outbox(), 0, set()
    on_this_connection: list[int] = []
    for step in steps:
        if step == "add":
            added += 1
            outbox.add(added, str(added), 0.0)
        elif step == "send" and (text := outbox.next()) is not None:
            on_this_connection.append(int(text))
            outbox.note_sent()
        elif step == "receipt":
            confirmed.add(outbox.note_received())
        elif step == "reconnect":
            on_this_connection = []
            outbox.reconnect()
        assert on_this_connection == sorted(on_this_connection)
    outbox.reconnect()
    assert {int(text) for text in sent(outbox)} | (confirmed - {0}) == set(range(1, added + 1))


def test_texts_beyond_the_limit_are_read_from_the_journal_when_it_is_their_turn() -> None:
    journal = {number: f"{number}" * 40 for number in range(1, 10)}
    outbox = Outbox(most=100)
    for number, text in journal.items():
        outbox.add(number, text, 1.0)
        assert outbox.in_memory <= 100
    got: list[str] = []
    for _ in range(2):
        while outbox.has_unsent:
            for number in outbox.missing():
                assert not outbox.read(number, journal[number])
            got += sent(outbox)
            assert outbox.in_memory <= 100
        outbox.reconnect()
    assert got == [*journal.values(), *journal.values()]


def test_few_texts_are_read_at_a_time_and_one_of_any_size() -> None:
    outbox = Outbox(most=0)
    for number in range(1, 100):
        outbox.add(number, "", 1.0, size=stockrt.HARMLESS_BYTES * 10 if number == 1 else 10_000)
    assert outbox.missing() == [1]
    outbox.read(1, "x")
    assert outbox.missing() == [] and sent(outbox) == ["x"]
    assert outbox.missing() == [2, 3, 4, 5, 6, 7]


def test_what_the_journal_has_no_more_keeps_no_other_back() -> None:
    outbox = Outbox(most=0)
    outbox.add(1, "", 1.0, size=5)
    outbox.add(2, "", 1.0, size=5)
    assert outbox.read(1, None)
    assert not outbox.read(1, None)  # nobody waits for it
    assert outbox.missing() == [2]


def test_refusals_beyond_the_limit_are_not_sent_again() -> None:
    outbox = Outbox(most=100)
    for number in range(10):
        outbox.refuse(f"e{number}", "no" * 20, 1.0)
        sent(outbox)
        assert outbox.in_memory <= 100
    assert not outbox.refuse_again("e0", 1.0)
    assert outbox.refuse_again("e9", 1.0)
    assert len(outbox) == 11
    outbox.reconnect()
    assert 0 < len(sent(outbox)) <= 3


def test_a_result_that_lost_its_lists_stays_so_where_it_is_read_again() -> None:
    text = refused("x" * stockrt.HARMLESS_BYTES)
    outbox = Outbox(most=0)
    outbox.add(1, text, 1.0)
    assert outbox.missing() == [1]
    for _ in range(stockrt.BREAKS_WITH_LISTS):
        outbox.read(1, text)
        sent(outbox)
        shortened = outbox.note_broken()
        outbox.reconnect()
    assert shortened == [1]
    outbox.read(1, text)
    (short,) = sent(outbox)
    assert short == stockrt.without_lists(text) == stockrt.without_lists(short) != text
