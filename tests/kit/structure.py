"""Measures how stockrt.py is tied together: rooms by their banners, arrows between them, callables, lines.

By hand: `python tests/kit/structure.py [FILE]` prints the table.
"""

from __future__ import annotations

import ast
import bisect
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

PROGRAM = Path(__file__).resolve().parents[2] / "stockrt.py"
BANNER = re.compile(r"^# ={20,}\n# (.+)\n# ={20,}$", re.MULTILINE)
# The parts of a room as well.
ANY_BANNER = re.compile(r"^# [=-]{20,}\n# (.+)\n# [=-]{20,}$", re.MULTILINE)
# What a run is put together from; the one room that makes them is Run.
PARTS = {
    "MongoStore",
    "SqliteStore",
    "DeliveryQueue",
    "Delivery",
    "KeyPool",
    "SharedLedger",
    "InfowayApi",
    "ClosingPrices",
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Use:
    """A name of one room that another one uses."""

    room: str
    name: str
    of: str
    line: int
    is_upward: bool = False  # of a later one


# The one that was asked for last: a hundred thousand nodes are a burden to whatever runs in the same process.
@lru_cache(maxsize=1)
def _parsed(text: str) -> tuple[ast.Module, list[ast.AST]]:
    tree = ast.parse(text)
    return tree, [*ast.walk(tree)]


class Structure:
    """One module, measured."""

    def __init__(self, text: str, banner: re.Pattern[str] = BANNER) -> None:
        self.text = text
        self.lines = text.count("\n")
        self.tree, self._nodes = _parsed(text)
        found = [(text.count("\n", 0, m.start()) + 1, m[1]) for m in banner.finditer(text)]
        self.starts = [line for line, _ in found]
        self.rooms = [title for _, title in found]
        self.homes = {name: self.room_at(line) for name, line in self._definitions()}

    def room_at(self, line: int) -> int:
        """Return the number of the room that a line is in, -1 above the first."""
        return bisect.bisect(self.starts, line) - 1

    def functions(self) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
        """Return all functions, methods and inner functions."""
        return [node for node in self._nodes if isinstance(node, FUNCTIONS)]

    def callable_parameters(self) -> list[str]:
        """Return the parameters that are annotated as callables."""
        return [
            f"{function.name}({argument.arg}), line {function.lineno}"
            for function in self.functions()
            for argument in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
            if argument.annotation is not None and "Callable" in ast.unparse(argument.annotation)
        ]

    def upward_uses(self) -> list[Use]:
        """Return where a room uses a name of a later one, annotations included."""
        return [use for use in self._uses if use.is_upward]

    def private_uses(self) -> list[Use]:
        """Return where a room uses a `_name` of another."""
        return [use for use in self._uses if use.name.startswith("_") and use.of != use.room]

    def dead(self) -> list[str]:
        """Return the functions, classes, constants and methods whose name nothing else in the module says."""
        lines: dict[str, list[int]] = {}
        for name, line in _names_in(self._nodes):
            lines.setdefault(name, []).append(line)
        tops = [(node, name) for node in self.tree.body for name in _names_of(node)]
        methods = [
            (method, method.name)
            for node in self.tree.body
            if isinstance(node, ast.ClassDef)
            for method in node.body
            if isinstance(method, FUNCTIONS)
        ]
        return [
            f"{name}, line {node.lineno}"
            for node, name in (*tops, *methods)
            if not re.fullmatch("__.*__", name)
            and all(node.lineno <= line <= (node.end_lineno or 0) for line in lines.get(name, ()))
        ]

    def assemblers(self) -> list[str]:
        """Return the classes and functions that make more than one of the parts of a run."""
        made = {
            top.name: {
                node.func.id
                for node in ast.walk(top)
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in PARTS
            }
            for top in self.tree.body
            if isinstance(top, (*FUNCTIONS, ast.ClassDef))
        }
        return [name for name, parts in made.items() if parts]

    def count(self, kind: type[ast.AST]) -> int:
        """Return how many nodes of a kind there are."""
        return sum(isinstance(node, kind) for node in self._nodes)

    def stranded_comments(self) -> list[int]:
        """Return the lines on which nothing but a closing bracket stands in front of a comment."""
        if not re.search(r"^ *[)\]}]+[:,]?\s*#", self.text, re.MULTILINE):
            return []
        return [
            token.start[0]
            for token in tokenize.generate_tokens(io.StringIO(self.text).readline)
            if token.type == tokenize.COMMENT
            and re.fullmatch(r"\s*[)\]}]+[:,]?\s*", token.line[: token.start[1]])
        ]

    def length_of(self, room: int) -> int:
        """Return the lines of a room."""
        return [*self.starts, self.lines][room + 1] - self.starts[room]

    def _definitions(self) -> Iterator[tuple[str, int]]:
        for node in self.tree.body:
            for name in _names_of(node):
                yield name, node.lineno

    @cached_property
    def _uses(self) -> list[Use]:
        found = []
        seen = set()
        for node in self._nodes:
            if not isinstance(node, ast.Name) or node.id not in self.homes:
                continue
            room, home = self.room_at(node.lineno), self.homes[node.id]
            if room >= 0 and home >= 0 and room != home and (room, node.id) not in seen:
                seen.add((room, node.id))
                found.append(Use(self.rooms[room], node.id, self.rooms[home], node.lineno, home > room))
        return found


def _names_of(node: ast.stmt) -> Iterator[str]:
    """Yield the names that a statement at the top of a module gives."""
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            yield from (name.id for name in ast.walk(target) if isinstance(name, ast.Name))


def _names_in(nodes: list[ast.AST]) -> Iterator[tuple[str, int]]:
    """Yield every name that code says, and the line; not those that it gives to functions and classes."""
    for node in nodes:
        if isinstance(node, ast.Name):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute):
            yield node.attr, node.end_lineno or node.lineno


def table(structure: Structure) -> str:
    """Return the measures, a line each, and the rooms with their lines."""
    per_hundred = structure.count(ast.IfExp) * 100 / structure.lines
    rows = [
        ("lines", structure.lines),
        ("functions", len(structure.functions())),
        ("parameters that are callables", len(structure.callable_parameters())),
        ("uses of a name of a later room", len(structure.upward_uses())),
        ("names with _ that other rooms use", len(structure.private_uses())),
        ("places that make parts of a run", len(structure.assemblers())),
        ("inline conditionals per 100 lines", f"{per_hundred:.2f}"),
        ("walruses", structure.count(ast.NamedExpr)),
        ("fmt: skip", structure.text.count("# fmt: skip")),
        ("names that nothing uses", len(structure.dead())),
        ("comments stranded behind a bracket", len(structure.stranded_comments())),
    ]
    rooms = [(title.partition(":")[0], structure.length_of(n)) for n, title in enumerate(structure.rooms)]
    return "\n".join(f"{what:<36} {number:>6}" for what, number in (*rows, ("", ""), *rooms))


if __name__ == "__main__":
    print(table(Structure(Path(sys.argv[1] if sys.argv[1:] else PROGRAM).read_text(encoding="utf-8"))))
