"""A list of everything that the program said while the tests ran, in both languages, to be read from top to bottom.

    STOCKRT_WORDS_LIST=FILE ./build_pyz.sh test     # notes each kind of words once per process, with its values
    python3 tests/kit/words_list.py FILE            # prints them

The tests' own process and every Python that it starts note what they say (see words_start/sitecustomize.py).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

VARIABLE = "STOCKRT_WORDS_LIST"
START = Path(__file__).resolve().parent / "words_start"
# Of the values with which a kind was said, so many are shown where they are words themselves.
EXAMPLES = 3
# Where pytest lets a test keep its files.
_FOLDER = re.compile(r"[\w/]*/pytest-of-\w+/pytest-\d+(?:/popen-gw\d+)?/[\w.-]+")


def note_everything() -> None:
    """Have this process, which has the program as a module, and all that it starts note what they say, if asked to."""
    file = os.environ.get(VARIABLE)
    if not file:
        return
    import stockrt

    watch(stockrt.Phrase, Path(file).absolute())
    more = {VARIABLE: str(Path(file).absolute()), "PYTHONPATH": str(START)}
    popen: Any = subprocess.Popen
    start = popen.__init__

    def started(self: Any, *args: Any, env: Mapping[str, str] | None = None, **how: Any) -> None:
        start(self, *args, env={**(os.environ if env is None else env), **more}, **how)

    popen.__init__ = started


def watch(phrase: Any, file: Path) -> None:
    """Have each kind of a class of phrases noted in a file with its first values."""
    make, noted = phrase.__new__, set()

    def made(cls: Any, kind: str, values: Mapping[str, Any]) -> Any:
        words = make(cls, kind, values)
        nested = frozenset(value.kind for value in values.values() if isinstance(value, phrase))
        if (kind, nested) not in noted:
            noted.add((kind, nested))
            line = json.dumps(sys.modules[phrase.__module__].packed(words)) + "\n"
            with contextlib.suppress(OSError):  # a process that may write nothing
                _append(file, line.encode())
        return words

    phrase.__new__ = made


def _append(file: Path, line: bytes) -> None:
    """Add a line in one write: others write at the same time, also as other users."""
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


def examples(lines: Iterable[str]) -> dict[str, list[str]]:
    """Return what was said by its kind, words of ours as phrases: some of middle length, no two of one form."""
    import stockrt

    found: dict[str, dict[tuple[str, ...], list[str]]] = {}
    for line in lines:
        words = stockrt.unpacked(json.loads(line))
        if not isinstance(words, stockrt.Phrase) or words.kind.startswith(stockrt.JOIN):
            continue
        form = tuple(getattr(value, "kind", "") for value in words.values.values())
        found.setdefault(words.kind, {}).setdefault(form, []).append(words)
    return {
        kind: [sorted(said, key=len)[len(said) // 2] for _, said in sorted(forms.items())[:EXAMPLES]]
        for kind, forms in sorted(found.items())
    }


def both(words: str) -> str:
    """Return words in both languages, a line each at least, without the folders of the tests."""
    import stockrt

    return _FOLDER.sub("/…", f"{words}\n{stockrt.in_language(words, stockrt.CHINESE)}")


def main() -> None:
    """Print each kind that was said, then those that were not."""
    sys.path.insert(0, str(START.parents[2]))
    import stockrt

    # a test may say half a pair of surrogates
    sys.stdout = io.TextIOWrapper(sys.stdout.buffer, "utf-8", errors="backslashreplace")
    with open(sys.argv[1], encoding="utf-8") as lines:
        found = examples(lines)
    for kind, said in found.items():
        print(f"[{kind}]", *map(both, said), "", sep="\n")
    left = sorted(
        kind for kind in stockrt.TEMPLATES.keys() - found.keys() if not kind.startswith(stockrt.JOIN)
    )
    print(f"{len(found)} kinds were said; {len(left)} were not:\n")
    for kind in left:
        print(f"[{kind}]", *stockrt.TEMPLATES[kind], "", sep="\n")


if __name__ == "__main__":
    main()
