"""On the PYTHONPATH of what the tests start: the program's words are noted from the first on; see words_list.py."""

from __future__ import annotations

import builtins
import importlib.util
import os
from pathlib import Path
from typing import Any

_build = builtins.__build_class__


def _watched(body: Any, name: str, /, *bases: Any, **how: Any) -> Any:
    """Make a class; the one of the program's phrases notes what it makes."""
    made = _build(body, name, *bases, **how)
    if name == "Phrase" and bases == (str,):
        builtins.__build_class__ = _build
        place = Path(__file__).resolve().parents[1] / "words_list.py"
        spec = importlib.util.spec_from_file_location("stockrt_words_list", place)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.watch(made, Path(os.environ["STOCKRT_WORDS_LIST"]))
    return made


builtins.__build_class__ = _watched
