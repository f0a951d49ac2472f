"""What one test for a table of cases says of those that fail."""

from __future__ import annotations

import pytest

from kit.cases import each


def test_every_case_is_tried_and_each_that_fails_is_named() -> None:
    tried = []

    @each("a, b", [(1, 2), (2, 2), (5, 3), (9, 10)])
    def one_more(a: int, b: int) -> None:
        tried.append(a)
        assert a + 1 == b

    @each("number", [1, 10**5000], ids=["small", "huge"])
    def small(number: int) -> None:
        with pytest.raises(ZeroDivisionError):
            number // (number - 1)

    with pytest.raises(ExceptionGroup, match="2 of 4 cases") as several:
        one_more()
    assert tried == [1, 2, 5, 9]
    assert [error.__notes__ for error in several.value.exceptions] == [
        ["the case: a=2, b=2"],
        ["the case: a=5, b=3"],
    ]
    with pytest.raises(pytest.fail.Exception) as one:
        small()
    assert one.value.__notes__ == ["the case: huge"]


def test_stacked_tables_are_tried_in_all_pairs_and_fixtures_come_through() -> None:
    tried = []

    @each("a", "xy")
    @each("b", [10**5000, 1])
    def both(a: str, b: int, fixture: object) -> None:
        tried.append((a, b, fixture))

    both(fixture=7)
    assert tried == [("x", 10**5000, 7), ("x", 1, 7), ("y", 10**5000, 7), ("y", 1, 7)]
