"""One test for all cases of a table: a pure function answers faster than pytest and its workers hand out a test.

    @each("code, product", [("AAPL.US", "stock"), ("USDCNY", "common")])
    def test_a_code_has_its_product(code: str, product: str) -> None: ...

Every case is tried, whatever became of those before it; each that fails is named and shown.
"""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest

Test = Callable[..., None]
Row = dict[str, Any]
Title = Callable[[Any], object] | str


def shown(value: object) -> str:
    """Return a value as it is shown, not too long; Python writes no number of thousands of digits."""
    try:
        return reprlib.repr(value)
    except ValueError:
        return f"a long {type(value).__name__}"


def each(
    names: str | tuple[str, ...],
    cases: Iterable[Any],
    ids: Callable[[Any], object] | Sequence[str] = shown,
) -> Callable[[Test], Test]:
    """Try a test with each case, as pytest.mark.parametrize does with these arguments, in one test.

    For a function that leaves nothing behind for the next case, and has no fixture made anew for each.
    """
    wanted = names.split(", ") if isinstance(names, str) else [*names]
    rows = [dict(zip(wanted, case if len(wanted) > 1 else (case,), strict=True)) for case in cases]
    titles: Sequence[Title] = [ids] * len(rows) if callable(ids) else ids

    def decorate(test: Test) -> Test:
        def all_cases(**others: object) -> None:
            tried = zip(rows, titles, strict=True)
            failed = [error for row, title in tried for error in _failures(test, others, row, title)]
            if len(failed) == 1:
                raise failed[0]
            if failed:
                raise BaseExceptionGroup(f"{len(failed)} of {len(rows)} cases", failed)

        signature = inspect.signature(test)
        left = [parameter for name, parameter in signature.parameters.items() if name not in wanted]
        all_cases.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
        for name in ("__doc__", "__module__", "__name__", "__qualname__"):
            setattr(all_cases, name, getattr(test, name))
        return all_cases

    return decorate


def _failures(test: Test, others: Row, row: Row, title: Title) -> list[BaseException]:
    """Return why the test fails with a case, with the case's name; nothing where it does not."""
    try:
        test(**others, **row)
    except (Exception, pytest.fail.Exception) as error:
        values = title if isinstance(title, str) else ", ".join(f"{n}={title(v)}" for n, v in row.items())
        error.add_note(f"the case: {values}")
        return [error]
    return []
