"""The outbox: every answer is sent until its receipt, in order, whatever happens to the connection."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stockrt import Outbox


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
