"""Reads the module's source: which words a person may read, where they are made, and what the catalogue has.

`python3 tests/kit/catalogue.py [ROOM]` lists what a room says outside of the catalogue, and where its words lose their
other languages; without a room, how much of both each room has.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from string import Formatter
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kit.glue import Glue
from kit.outside import OUTSIDE

PROGRAM = Path(__file__).resolve().parents[2] / "stockrt.py"
# Two words, or a word beside a value, or two values with what stands between clauses.
_SENTENCE = re.compile(
    r"[A-Za-z]{2,}[,;:.]? \(?[a-z]{2,}|[a-z]{2,},? [a-z({'\"]|[a-z)}'\"],? [a-z]{2,}"
    r"|\{\}[,;:]? \(?[a-z]{2,}|[a-z]{2,}[,:;]? \(?\{\}|\{\}(?:; |: |, | \()\{\}|^[,;:] \S"
)


class Call(NamedTuple):
    """A call that makes words: its kinds, and what it gives as their values."""

    line: int
    kinds: tuple[str, ...]
    values: Mapping[str, ast.expr]


class Sentence(NamedTuple):
    """Words in the source that are not in the catalogue."""

    line: int
    room: str
    place: str
    text: str


class Source:
    """The module's text, parsed."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tree = ast.parse(text)
        self._nodes = [*ast.walk(self.tree)]
        self._parents = {child: parent for parent in self._nodes for child in ast.iter_child_nodes(parent)}
        lines = text.splitlines()
        self._rooms = [
            (number, lines[number][2:].partition(":")[0])
            for number in range(1, len(lines) - 1)
            if lines[number - 1].startswith("# ====") and lines[number + 1].startswith("# ====")
        ]

    def room(self, line: int) -> str:
        """Return the room that a line lies in."""
        return next((name for at, name in reversed(self._rooms) if at < line), "")

    def place(self, node: ast.AST) -> str:
        """Return what a node lies in: a constant, a function, a class or a method of one."""
        names: list[str] = []
        while not isinstance(node, ast.Module):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.insert(0, node.name)
            parent = self._parents[node]
            if isinstance(parent, ast.Module) and isinstance(node, (ast.Assign, ast.AnnAssign)):
                names = [ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)]
            node = parent
        return ".".join(names[:2])

    def _found(self, node: ast.expr, text: str) -> Sentence:
        return Sentence(node.lineno, self.room(node.lineno), self.place(node), " ".join(text.split()))

    def catalogue(self) -> dict[str, tuple[str, str]]:
        """Return every kind with its English and its Chinese template; a kind that is there twice fails."""
        found: dict[str, tuple[str, str]] = {}
        for node in self.tree.body:
            if isinstance(node, ast.AugAssign) and ast.unparse(node.target) == "TEMPLATES":
                assert isinstance(node.value, ast.Dict)
                for key, value in zip(node.value.keys, node.value.values, strict=True):
                    kind = ast.literal_eval(key or node.value)
                    assert kind not in found, f"{kind} is there twice"
                    found[kind] = ast.literal_eval(value)
        return found

    @cached_property
    def glue(self) -> Glue:
        """What in the module is words."""
        return Glue(self.tree)

    @cached_property
    def calls(self) -> list[Call]:
        """Every call whose kinds can be told: outright, or by a variable, a constant or a table."""
        return [*self._calls()]

    def _calls(self) -> Iterator[Call]:
        for node in self._nodes:
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or not node.args:
                continue
            name = node.func.id
            if name == "phrase" and (kinds := tuple(self._texts(node.args[0]))):
                yield Call(node.lineno, kinds, {str(word.arg): word.value for word in node.keywords})
            elif name in ("count_words", "waiting_words"):
                words = [text for argument in node.args[1:] for text in self._texts(argument)] or ["trade"]
                for word in words:
                    ends = ("n.", "n.") if name == "count_words" else ("waits.", "wait.")
                    kinds = (ends[0] + word, f"{ends[1]}{word}s")
                    yield Call(node.lineno, kinds, {"n": node.args[0]})

    def _texts(self, node: ast.expr) -> Iterator[str]:
        """Yield the texts that an expression may be, as far as they are written there or in what it names."""
        match node:
            case ast.Constant(value=str(text)):
                yield text
            case ast.IfExp(body=body, orelse=other):
                yield from self._texts(body)
                yield from self._texts(other)
            case ast.Name() | ast.Subscript(value=ast.Name()):
                for value in self.glue.given(node):
                    parts = value.values if isinstance(value, ast.Dict) else [value]
                    for part in parts:
                        yield from self._texts(part) if not isinstance(part, ast.Name) else ()

    def texts(self) -> set[str]:
        """Return every text of the source outside of the catalogue."""
        return {
            node.value
            for node in self._nodes
            if isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and self.room(node.lineno) != "Catalogue"
        }

    def sentences(self) -> list[Sentence]:
        """Return what reads like words for a person and is neither in the catalogue nor in the log."""
        found = []
        for node in self._nodes:
            text = _template(node)
            if (
                not isinstance(node, ast.expr)
                or text is None
                or not _SENTENCE.search(text)
                or self.room(node.lineno) == "Catalogue"
            ):
                continue
            if not self._is_elsewhere(node):
                found.append(self._found(node, text))
        return found

    def losses(self) -> list[Sentence]:
        """Return where words of the catalogue become a text of one language."""
        return [self._found(node, ast.unparse(node)) for node in self.glue.losses()]

    def values_given(self) -> dict[tuple[str, str], list[ast.expr]]:
        """Return what is given as a value: by kind and the value's name."""
        found: dict[tuple[str, str], list[ast.expr]] = {}
        for call in self.calls:
            for kind in call.kinds:
                for name, value in call.values.items():
                    found.setdefault((kind, name), []).append(value)
        return found

    def plain_values(self) -> list[Sentence]:
        """Return the texts that are given as a value of words and are not in the catalogue."""
        found = []
        for call in self.calls:
            for name, value in call.values.items():
                for text in self._texts(value):
                    if re.search("[a-z]{2}", text):
                        found.append(self._found(value, f"{name}={text}"))
        return found

    def _is_elsewhere(self, node: ast.AST) -> bool:
        """Whether a text is a docstring, a part of another text, a type, of the log, or names a word of a count."""
        parent = self._parents[node]
        if isinstance(parent, (ast.Expr, ast.JoinedStr, ast.FormattedValue)):
            return True
        while not isinstance(parent, ast.stmt):
            if isinstance(parent, ast.Call) and re.match(
                r"(?:log\.|LogThrottle|cast\b|re\.|count_words|waiting_words)", ast.unparse(parent.func)
            ):
                return True
            node, parent = parent, self._parents[parent]
        return isinstance(parent, (ast.AnnAssign,)) and node is parent.annotation


def _template(node: ast.AST) -> str | None:
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    return None


def why_outside(found: Sentence) -> str | None:
    """Return why some words may stand where they do, None where nothing is said of them."""
    return next(
        (
            reason
            for place, text, reason in OUTSIDE
            if re.fullmatch(place, found.place) and re.match(text, found.text)
        ),
        None,
    )


def values_of(template: str) -> frozenset[tuple[str, str, str]]:
    """Return the names of the values of a template, and how each is written."""
    return frozenset(
        (name, how or "", form or "")
        for _, name, form, how in Formatter().parse(template)
        if name is not None
    )


def main(rooms: list[str]) -> None:
    """Print what the rooms still say outside of the catalogue, or how much it is in each."""
    source = Source(PROGRAM.read_text(encoding="utf-8"))
    found = {
        "sentence": source.sentences(),
        "plain value": source.plain_values(),
        "language lost": source.losses(),
    }
    left = {what: [one for one in every if why_outside(one) is None] for what, every in found.items()}
    if not rooms:
        for name in dict.fromkeys(one.room for every in left.values() for one in every):
            counts = {what: sum(one.room == name for one in every) for what, every in left.items()}
            print(f"{name:<20}", *(f"{count:>4} {what}" for what, count in counts.items()))
    for what, every in left.items():
        for one in every:
            if one.room in rooms:
                print(f"{one.line}  {what}  {one.place}  {one.text[:150]}")


if __name__ == "__main__":
    main(sys.argv[1:])
