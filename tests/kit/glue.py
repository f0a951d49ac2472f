"""Follows words through the module's source, to where a language is lost: an f-string, `+`, `%`, `.join`, str().

What makes words (`phrase` and what calls it) is followed by name: through variables, attributes, parameters, keys and
returned values. Two things of one name are one here, which finds too much rather than too little.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from functools import cached_property

Scope = ast.FunctionDef | ast.Module

# By what words get from one name to another.
TEACHING = (
    ast.Return, ast.Yield, ast.Assign, ast.AnnAssign, ast.AugAssign, ast.For, ast.comprehension, ast.ExceptHandler,
    ast.Dict, ast.Call,
)  # fmt: skip

# What words are made by, whatever it is given.
MAKERS = {"phrase", "Phrase", "listing", "count_words", "waiting_words", "age_words", "error_words"}
# What gives words back as they came: in all languages.
KEEPERS = {
    "one_line",
    "unpacked",
    "sorted",
    "list",
    "tuple",
    "dict",
    "reversed",
    "filter",
    "chain",
    "next",
    "zip",
}
# What ends them: the language is chosen, or nothing of them is left.
ENDS = {
    "for_reader",
    "in_language",
    "all_in_language",
    "mask",
    "redact",
    "local_times",
    "kinds_in",
    "packed",
    "len",
}
# Methods of Python's own that also are names here.
FOREIGN = {
    "get",
    "values",
    "items",
    "keys",
    "pop",
    "read",
    "write",
    "append",
    "add",
    "join",
    "close",
    "text",
    "send",
}
# What is called so never is words, whatever else stands beside it.
NEVER = {
    "batch", "code", "codes", "market", "name", "number", "pair", "path", "product", "p", "s", "settings", "store",
    "suffix", "symbol", "t", "td", "url", "v", "vw", "trade", "trades", "key", "secret", "address", "uri", "proxy",
}  # fmt: skip
LOSES = {
    "replace", "format", "removesuffix", "removeprefix", "strip", "rstrip", "lstrip", "upper", "lower", "capitalize",
    "ljust", "rjust", "center", "partition", "rpartition", "split", "splitlines", "translate", "encode", "expandtabs",
}  # fmt: skip


class Glue:
    """What in a module is words, found by going over it until nothing new is."""

    def __init__(self, tree: ast.Module) -> None:
        self._tree = tree
        self._functions: dict[str, list[ast.FunctionDef]] = {}
        self._fields: dict[str, list[str]] = {}
        self._home: dict[ast.AST, Scope] = {}
        self._parents: dict[ast.AST, ast.AST] = {}
        self._walk(tree, tree)
        # names of functions, attributes and keys; variables of a function
        self.returned: set[str] = set()
        self.attributes: set[str] = {"message"}
        self.keys: set[str] = set()
        self.variables: set[tuple[Scope, str]] = set()
        self._errors = {
            node.name for node in tree.body if isinstance(node, ast.ClassDef) and self._is_error(node.name)
        }
        teaching = [(node, home) for node, home in self._home.items() if isinstance(node, TEACHING)]
        known = -1
        while known < self._size():
            known = self._size()
            for node, home in teaching:
                self._learn(node, home)

    def _size(self) -> int:
        return len(self.returned) + len(self.attributes) + len(self.keys) + len(self.variables)

    def _walk(self, node: ast.AST, home: Scope) -> None:
        for child in ast.iter_child_nodes(node):
            self._parents[child] = node
            self._home[child] = home
            if isinstance(child, ast.FunctionDef):
                self._functions.setdefault(child.name, []).append(child)
            if isinstance(child, ast.ClassDef):
                self._fields[child.name] = [*_fields(child)]
            self._walk(child, child if isinstance(child, ast.FunctionDef) else home)

    def _is_error(self, name: str) -> bool:
        for node in self._tree.body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                bases = [ast.unparse(base) for base in node.bases]
                return name == "StockrtError" or any(self._is_error(base) for base in bases)
        return False

    def given(self, node: ast.Name | ast.Subscript) -> Iterator[ast.expr]:
        """Yield what is assigned to a name, or to that of a table, where it stands and in the module."""
        name = node.value if isinstance(node, ast.Subscript) else node
        assert isinstance(name, ast.Name)
        for home in dict.fromkeys((self._home[node], self._tree)):
            yield from self._assigned.get((home, name.id), ())

    @cached_property
    def _assigned(self) -> dict[tuple[Scope, str], list[ast.expr]]:
        """What is assigned to each name, by the scope that it stands in."""
        found: dict[tuple[Scope, str], list[ast.expr]] = {}
        for node, home in self._home.items():
            for name, value in _assignments(node):
                found.setdefault((home, name), []).append(value)
        return found

    def meanings(self, node: ast.expr) -> list[ast.expr]:
        """Return what an expression stands for: itself, or whatever is assigned to a name."""
        return (isinstance(node, ast.Name) and [*self.given(node)]) or [node]

    def says(self, node: ast.expr) -> bool:
        """Whether an expression is or holds words."""
        return self.is_words(node, self._home[node])

    # ------------------------------------------------------------------------------------------ what is words

    def is_words(self, node: ast.AST | None, home: Scope) -> bool:
        """Whether an expression is or holds words."""
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) if name in NEVER:
                return False
            case ast.Name(id=name):
                return (home, name) in self.variables
            case ast.Attribute(attr=name):
                return name in self.attributes
            case ast.Subscript(value=value, slice=ast.Constant(value=str(key))):
                return key in self.keys - NEVER
            case ast.Subscript(value=value) | ast.Starred(value=value) | ast.Await(value=value):
                return self.is_words(value, home)
            case ast.IfExp(body=body, orelse=other):
                return self.is_words(body, home) or self.is_words(other, home)
            case (
                ast.BoolOp(values=parts) | ast.List(elts=parts) | ast.Tuple(elts=parts) | ast.Set(elts=parts)
            ):
                return any(self.is_words(part, home) for part in parts)
            case ast.ListComp(elt=made) | ast.GeneratorExp(elt=made) | ast.SetComp(elt=made):
                return self.is_words(made, home)
            case ast.DictComp(value=made):
                return self.is_words(made, home)
            case ast.Call():
                return self._is_called_for_words(node, home)
        return False

    def _is_called_for_words(self, call: ast.Call, home: Scope) -> bool:
        name = _called(call)
        if name in ENDS:
            return False
        if name in KEEPERS:
            return any(self.is_words(argument, home) for argument in call.args)
        if name == "get" and call.args and isinstance(call.args[0], ast.Constant):
            return call.args[0].value in self.keys
        if name == "cast":
            return self.is_words(call.args[1], home)
        return name in MAKERS or name in self.returned

    # -------------------------------------------------------------------------------------------- how it is learned

    def _learn(self, node: ast.AST, home: Scope) -> None:
        match node:
            case ast.Return(value=value) | ast.Yield(value=value):
                if (
                    isinstance(home, ast.FunctionDef)
                    and home.name not in FOREIGN
                    and self.is_words(value, home)
                ):
                    self.returned.add(home.name)
            case ast.Assign(targets=targets, value=value):
                if self.is_words(value, home):
                    for target in targets:
                        self._take(target, home)
            case ast.AnnAssign(target=target, value=value) | ast.AugAssign(target=target, value=value):
                if self.is_words(value, home):
                    self._take(target, home)
            case ast.For(target=target, iter=value) | ast.comprehension(target=target, iter=value):
                if self.is_words(value, home):
                    self._take(target, home)
            case ast.ExceptHandler(name=str(name), type=kind):
                if kind is not None and self._errors & {ast.unparse(one) for one in ast.walk(kind)}:
                    self.variables.add((home, name))
            case ast.Dict(keys=keys, values=values):
                for key, value in zip(keys, values, strict=True):
                    if isinstance(key, ast.Constant) and self.is_words(value, home):
                        self.keys.add(str(key.value))
            case ast.Call():
                self._learn_call(node, home)

    def _learn_call(self, call: ast.Call, home: Scope) -> None:
        name = _called(call)
        if name in ("append", "extend", "add", "insert") and isinstance(call.func, ast.Attribute):
            if self.is_words(call.args[-1] if call.args else None, home):
                self._take(call.func.value, home)
            return
        if name in MAKERS | KEEPERS | ENDS | FOREIGN | NEVER:
            return
        fields = self._fields.get(name, [])
        for function in [*self._functions.get(name, []), *self._inits.get(name, [])]:
            names = [part.arg for part in function.args.posonlyargs + function.args.args]
            names = names[names[:1] in (["self"], ["cls"]) :]
            for place, value in self._given(call, names):
                if self.is_words(value, home):
                    self.variables.add((function, place))
        for place, value in self._given(call, fields):
            if place in fields and self.is_words(value, home):
                self.attributes.add(place)

    @cached_property
    def _inits(self) -> dict[str, list[ast.FunctionDef]]:
        """What a call of each class calls."""
        found: dict[str, list[ast.FunctionDef]] = {}
        for init in self._functions.get("__init__", []):
            parent = self._parents[init]
            if isinstance(parent, ast.ClassDef):
                found.setdefault(parent.name, []).append(init)
        return found

    @staticmethod
    def _given(call: ast.Call, names: list[str]) -> Iterator[tuple[str, ast.expr]]:
        yield from zip(names, call.args, strict=False)
        for keyword in call.keywords:
            if keyword.arg:
                yield keyword.arg, keyword.value

    def _take(self, target: ast.AST, home: Scope) -> None:
        match target:
            case ast.Name(id=name):
                self.variables.add((home, name))
            case ast.Attribute(attr=name):
                self.attributes.add(name)
            case ast.Subscript(slice=ast.Constant(value=str(key))):
                self.keys.add(key)
            case ast.Subscript(value=value) | ast.Starred(value=value):
                self._take(value, home)
            case ast.Tuple(elts=parts):
                for part in parts:
                    self._take(part, home)

    # ---------------------------------------------------------------------------------------------- where it ends

    def losses(self) -> list[ast.expr]:
        """Return every expression by which words become a text of one language, but in the log."""
        found = [
            node.value if isinstance(node, ast.AugAssign) else node
            for node, home in self._home.items()
            if self._loses(node, home) and not self._is_logged(node)
        ]
        return [node for node in found if isinstance(node, ast.expr)]

    def _loses(self, node: ast.AST, home: Scope) -> bool:
        match node:
            case ast.JoinedStr(values=parts):
                return any(
                    self.is_words(part.value, home) for part in parts if isinstance(part, ast.FormattedValue)
                )
            case ast.BinOp(op=ast.Add(), left=left, right=right):
                return _any_text((left, right)) and self._any((left, right), home)
            case ast.BinOp(op=ast.Mod(), left=left, right=right):
                return self._any((left, right), home) and not isinstance(left, ast.Name)
            case ast.AugAssign(op=ast.Add(), target=target, value=value):
                return _any_text((value,)) and self.is_words(target, home)
            case ast.Call(func=ast.Attribute(value=value, attr="join"), args=args):
                return isinstance(value, (ast.Constant, ast.JoinedStr)) and self._any(args, home)
            case ast.Call(func=ast.Attribute(value=value, attr=name)) if name in LOSES:
                return self.is_words(value, home)
            case ast.Call(func=ast.Name(id="str"), args=args):
                return self._any(args, home)
        return False

    def _any(self, nodes: Iterable[ast.expr], home: Scope) -> bool:
        return any(self.is_words(node, home) for node in nodes)

    def _is_logged(self, node: ast.AST) -> bool:
        while not isinstance(node, ast.stmt):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("log."):
                return True
            node = self._parents[node]
        return False


def _assignments(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    match node:
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            yield name, value
        case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)):
            for target, value in zip(targets, values, strict=False):
                if isinstance(target, ast.Name):
                    yield target.id, value
        case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
            yield name, value


def _fields(made: ast.ClassDef) -> Iterator[str]:
    for part in made.body:
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            yield part.target.id


def _called(call: ast.Call) -> str:
    match call.func:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


def _any_text(nodes: Iterable[ast.expr]) -> bool:
    return any(
        isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
        for node in nodes
    )
