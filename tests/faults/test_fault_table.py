"""The fault suite's command and its table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from faults import fault_table
from faults.fault_table import BEGIN, END, collect, markdown, plain, write_readme

ROOT = Path(__file__).resolve().parents[2]
ROWS = [
    {"fault": "down", "facts": {"seconds": 6, "every": "0.2"}, "rounds": 1, "acknowledged": 6000},
    {"fault": "kill", "facts": {}, "rounds": 9, "acknowledged": 20_000, "lost": 1},
    {"fault": "kill", "facts": {}, "rounds": 1, "acknowledged": 500, "lost": 2, "doubled": 4},
]
LINES = [json.dumps({"lost": 0, "doubled": 0} | row) for row in ROWS]


def test_rows_of_a_fault_are_added_up_in_the_order_of_the_list() -> None:
    rows = collect(LINES)
    assert [row.titles[0][:7] for row in rows] == ["kill -9", "MongoDB"]
    assert rows[0].numbers == (10, 20_500, 3, 4)
    assert "6 s, 100 codes every 0.2 s" in plain(rows)
    assert "| 10 | 20,500 | 3 | 4 |" in markdown(rows, 1)


def test_the_table_goes_between_the_comments_in_both_languages(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"a\n{BEGIN}\nold\n{END}\nb\n{BEGIN}{END}\nc\n", encoding="utf-8")
    for _ in range(2):
        write_readme(readme, collect(LINES), "2026-11-24")
    text = readme.read_text(encoding="utf-8")
    assert "old" not in text
    assert text.index("| fault |") < text.index("\nb\n") < text.index("| 故障 |") < text.index("\nc\n")
    assert text.count(BEGIN) == text.count(END) == 2


def test_a_readme_without_the_comments_is_left_alone(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("nothing", encoding="utf-8")
    with pytest.raises(ValueError, match="not there twice"):
        write_readme(readme, [], "2026-11-24")
    assert readme.read_text(encoding="utf-8") == "nothing"


def test_the_readme_has_a_place_for_both_tables() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 2


@pytest.mark.parametrize("arguments", [["--minutes"], ["--minutes", "soon"], ["--longer"]])
def test_a_wrong_command_line_says_what_is_right(arguments: list[str]) -> None:
    done = subprocess.run(
        [ROOT / "tests" / "faults" / "run", *arguments], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (64, "")
    assert "--long" in done.stderr


def test_a_run_without_rows_prints_an_empty_table(tmp_path: Path) -> None:
    command = [sys.executable, fault_table.__file__, str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["fault", "rounds", "trades", "lost", "doubled"]
