"""What the program says is noted, by whichever process it is said, and printed in both languages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from conftest import RunPyz

import stockrt
from kit import words_list


def test_words_of_this_process_and_of_the_built_file_are_noted_and_printed(
    start_pyz: RunPyz, tmp_path: Path
) -> None:
    class Said(stockrt.Phrase):
        """A class of its own: the other's are noted for the whole run, if they are."""

        __module__ = stockrt.__name__

    file = tmp_path / "words"
    words_list.watch(Said, file)
    for n in (1, 2):
        Said("tools.because", {"what": Said("n.keys", {"n": n}), "why": "x" * n})
    assert len(file.read_text().splitlines()) == 2
    found = {"PYTHONPATH": str(words_list.START), words_list.VARIABLE: str(file)}
    done = start_pyz("--check-settings", env=found | {"SERVER_PORT": "many"})
    assert done.returncode == 78
    printed = subprocess.run(
        [sys.executable, words_list.__file__, file],
        env=os.environ,
        capture_output=True,
        encoding="utf-8",
        check=True,
    ).stdout
    assert "[tools.because]\n1 keys: x\n1 个密钥：x\n" in printed
    assert "[cli.error]\nstockrt: " in printed and "\nstockrt：" in printed
    assert "were not:\n" in printed
