"""The module stays one that can be read: rooms in order, everything flows one way, parts tied by values."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
from kit.structure import ANY_BANNER, PROGRAM, Structure

# A ratchet: what is added has to be worth its lines. 6,300 is where this should come to without new promises.
MOST_LINES = 23_000
MOST_CALLABLES = 15
# What nothing in the module calls: methods of io and logging that a stream and a handler of ours answer.
CALLED_FROM_OUTSIDE = ["writable", "emit"]
# What one in a hundred lines may hold, and what the whole may.
MOST_INLINE_CONDITIONALS = 1.4
MOST_WALRUSES = 11
MOST_SKIPS = 7


@pytest.fixture(scope="module")
def module() -> Structure:
    """The module."""
    return Structure(PROGRAM.read_text(encoding="utf-8"))


def test_it_is_no_longer_than_it_must_be(module: Structure) -> None:
    assert module.lines <= MOST_LINES


def test_parts_are_tied_by_plain_calls_and_values(module: Structure) -> None:
    found = module.callable_parameters()
    assert len(found) <= MOST_CALLABLES, found


def test_a_room_calls_only_rooms_above_it(module: Structure) -> None:
    assert module.upward_uses() == []


def test_a_part_of_a_room_calls_only_parts_above_it(module: Structure) -> None:
    assert Structure(module.text, ANY_BANNER).upward_uses() == []


def test_a_name_with_an_underscore_is_its_rooms_alone(module: Structure) -> None:
    assert module.private_uses() == []


def test_nothing_stays_that_nothing_uses(module: Structure) -> None:
    dead = [words.partition(",")[0] for words in module.dead()]
    assert dead == CALLED_FROM_OUTSIDE


def test_a_run_is_put_together_in_one_place(module: Structure) -> None:
    assert module.assemblers() == ["Pipeline"]


def test_lines_are_not_denser_for_being_fewer(module: Structure) -> None:
    assert module.count(ast.IfExp) * 100 / module.lines <= MOST_INLINE_CONDITIONALS
    assert module.count(ast.NamedExpr) <= MOST_WALRUSES
    assert module.text.count("# fmt: skip") <= MOST_SKIPS


def test_no_comment_is_stranded_behind_a_bracket(module: Structure) -> None:
    assert module.stranded_comments() == []


def test_the_docstring_names_every_room_in_its_order(module: Structure) -> None:
    told = ast.get_docstring(module.tree) or ""
    places = [told.find(f"\n    {title.partition(':')[0]} ") for title in module.rooms]
    assert -1 not in places, [t for t, at in zip(module.rooms, places, strict=True) if at < 0]
    assert places == sorted(places)


def test_the_measures_see_what_they_are_for() -> None:
    bar = "# " + "=" * 30
    odd = Structure(
        f"{bar}\n# A\n{bar}\n"
        "def f(x: Callable[[], int]) -> int:\n"
        "    y = h(\n        1\n    )  # stranded\n"
        "    return _g() if (z := y) else MongoStore()\n"
        f"{bar}\n# B: more\n{bar}\n_g = h = 1\n"
    )
    assert odd.rooms == ["A", "B: more"]
    assert odd.stranded_comments() == [7]
    assert len(odd.callable_parameters()) == 1
    assert {use.name for use in odd.upward_uses()} == {"_g", "h"}
    assert [use.name for use in odd.private_uses()] == ["_g"]
    assert odd.assemblers() == ["f"]
    assert odd.dead() == ["f, line 4"]
    assert (odd.count(ast.IfExp), odd.count(ast.NamedExpr)) == (1, 1)


# What a start may do without: each costs milliseconds and memory, and only some ways through the program need it.
NEEDED_BY_SOME = (
    "argparse dataclasses dotenv hashlib html inspect plotext pymongo socket sqlite3 ssl tqdm urllib3 "
    "websocket"
)


def test_a_daemon_that_begins_loads_nothing_that_only_others_need() -> None:
    code = "import sys, stockrt; stockrt.parse_arguments([]); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=PROGRAM.parent, capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) & set(NEEDED_BY_SOME.split()) == set()
