"""The program speaks the language of whoever reads it: English and Chinese, chosen as people choose it."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from conftest import RunPyz
from kit.catalogue import PROGRAM
from kit.infoway_server import InfowayServer

from program.test_build import NEW, Python
from program.test_once import DEMO, api_env, on_terminal
from stockrt import columns_of

CHINESE = re.compile(r"[\u4e00-\u9fff]")
ENGLISH_WORDS = re.compile(r"[a-z]{2,} [a-z]{2,}")
ZH = {"LC_ALL": "", "LANG": "zh_CN.UTF-8"}
USAGE = "stockrt: unrecognized arguments: --onse; did you mean --once?; see --help\n"
USAGE_ZH = "stockrt：无法识别的参数：--onse（是不是 --once？）；详见 --help\n"


@pytest.mark.parametrize(
    ("env", "is_chinese"),
    [
        ({"LANG": "en_US.UTF-8"}, False),
        ({"LANG": "C"}, False),
        ({"LANG": "zh_CN.UTF-8"}, True),
        ({"LANG": "zh_TW.UTF-8"}, True),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C.UTF-8"}, False),
        ({"LANG": "C.UTF-8", "LC_MESSAGES": "zh_CN.UTF-8"}, True),
        ({"LANG": "C", "STOCKRT_LANG": "zh"}, True),
        ({"LANG": "zh_CN.UTF-8", "STOCKRT_LANG": "en"}, False),
        ({"LANG": "zh_CN.UTF-8", "STOCKRT_LANG": "zh", "PYTHONIOENCODING": "ascii"}, False),
        ({"LANG": "zh_CN.UTF-8", "STOCKRT_LANG": "zh", "PYTHONIOENCODING": "latin-1"}, False),
        ({"LANG": "zh_CN.UTF-8", "TERM": "linux"}, True),  # a pipe
    ],
)
def test_usage_error_in_the_language_of_the_environment(
    start_pyz: RunPyz, env: dict[str, str], is_chinese: bool
) -> None:
    done = start_pyz("--onse", env=env)
    assert (done.returncode, done.stdout) == (64, "")
    assert done.stderr == (USAGE_ZH if is_chinese else USAGE)


def test_other_encoding_of_chinese_is_used(pyz: Path, start_pyz: RunPyz, clean_env: dict[str, str]) -> None:
    """What Python writes for a terminal of such a locale."""
    env = clean_env | {"LANG": "zh_CN.GBK", "PYTHONIOENCODING": "gbk"}
    done = subprocess.run([pyz, "--onse"], env=env, capture_output=True, check=False)
    assert done.returncode == 64
    assert done.stderr.decode("gbk") == USAGE_ZH


@pytest.mark.parametrize(("term", "is_chinese"), [("xterm", True), ("linux", False)])
def test_console_gets_english_since_its_font_has_no_chinese(
    pyz: Path, clean_env: dict[str, str], tmp_path: Path, term: str, is_chinese: bool
) -> None:
    env = clean_env | ZH | {"TERM": term}
    status, shown, _ = on_terminal(pyz, env, tmp_path, "stderr", "--onse")
    assert status == 64
    assert shown.replace("\r", "") == (USAGE_ZH if is_chinese else USAGE)


@pytest.mark.parametrize("columns", [60, 120])
def test_help_in_chinese_fits_the_terminal(
    pyz: Path, clean_env: dict[str, str], tmp_path: Path, columns: int
) -> None:
    status, shown, _ = on_terminal(pyz, clean_env | ZH, tmp_path, "stdout", "--help", columns=columns)
    assert status == 0
    lines = shown.replace("\r", "").partition("选项：\n")[2].partition("\n\n")[0].splitlines()
    assert len(lines) > 35
    assert max(len(line) + len(re.findall(r"[\u3000-\uffef]", line)) for line in lines) <= columns - 2


@pytest.mark.parametrize("env", [ZH, {}])
def test_help_is_whole_in_either_language(start_pyz: RunPyz, env: dict[str, str]) -> None:
    done = start_pyz("--help", env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(columns_of, done.stdout.splitlines())) <= 80
    if env:
        assert done.stdout.startswith("用法：stockrt [-h]")
        assert not ENGLISH_WORDS.search(re.sub(r"stockrt\.pyz --.*?(?:  |\n)", "", done.stdout))
    else:
        assert done.stdout.startswith("usage: stockrt [-h]")
        assert set(CHINESE.findall(done.stdout)) == set("茅台黄金")


# Run by any Python: the help, and what is said of command lines that argparse refuses, all in Chinese.
IN_CHINESE = """
import sys
sys.dont_write_bytecode = True
sys.path.insert(0, sys.argv[1])
import stockrt
stockrt.SPOKEN.language = "zh"
print(stockrt.make_parser().format_help())
for line in sys.argv[2:]:
    try:
        stockrt.parse_arguments(line.split())
    except stockrt.UsageError as error:
        print(stockrt.for_reader(error.message))
"""
REFUSED = (
    "--once --codes", "--codes-file", "--once --check", "--show --chart 2m", "--up blue", "--backfill many",
    "--once=now", "--zyxwvu", "-x", "--he",
)  # fmt: skip


@pytest.mark.parametrize("python", NEW)
def test_every_python_has_its_words_of_argparse_in_chinese(python: Python, clean_env: dict[str, str]) -> None:
    """argparse's own differ from version to version."""
    done = subprocess.run(
        [python.path, "-c", IN_CHINESE, str(PROGRAM.parent), *REFUSED],
        env=clean_env, capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    usage, _, said = done.stdout.partition("\n\n")
    assert usage.startswith("用法：stockrt [-h]")
    assert " | --backfill DAYS | " in " ".join(usage.split())
    assert max(map(len, usage.splitlines())) <= 78
    assert "选项：\n  -h, --help            显示本帮助并退出\n" in said
    assert len(said.rpartition("\n\n")[2].splitlines()) == len(REFUSED)
    assert not ENGLISH_WORDS.search(re.sub(r"stockrt\.pyz --.*?(?:  |\n)", "", said)), said


def test_version_and_json_are_the_same_in_both_languages(start_pyz: RunPyz) -> None:
    version = [start_pyz("--version", env=env) for env in ({}, ZH)]
    assert [done.returncode for done in version] == [0, 0]
    assert version[0].stdout == version[1].stdout
    rows = [start_pyz(*DEMO, "AAPL.US", "--json", env=env) for env in ({}, ZH)]
    assert [done.returncode for done in rows] == [0, 0]
    assert json.loads(rows[0].stdout).keys() == json.loads(rows[1].stdout).keys()


def test_once_tells_in_chinese_what_became_of_it(start_pyz: RunPyz, infoway: InfowayServer) -> None:
    """The closing line, and the reason of each code; what the server said is left as it is."""
    done = start_pyz("--once", "--codes", "AAPL.US", "NOWHERE", env=api_env(infoway, STOCKRT_LANG="zh"))
    assert done.returncode == 1
    assert not ENGLISH_WORDS.search(done.stderr), done.stderr
    closing, reason = done.stderr.splitlines()[-2:]
    assert CHINESE.search(closing)
    assert re.match(r"  NOWHERE：.*[\u4e00-\u9fff]", reason)


def test_language_of_the_settings_file_holds_for_what_follows(start_pyz: RunPyz, tmp_path: Path) -> None:
    (tmp_path / "stockrt.env").write_text("STOCKRT_LANG=zh\nMONGODB_HSOT=x\n")
    done = start_pyz(*DEMO, "NOWHERE")
    assert done.returncode == 1
    warning, *_, reason = done.stderr.splitlines()
    assert warning.startswith("stockrt：") and "MONGODB_HSOT" in warning and CHINESE.search(warning[8:])
    assert re.match(r"  NOWHERE：.*[\u4e00-\u9fff]", reason)
    # the command line is read before the file
    assert start_pyz("--onse").stderr == USAGE
    # what is asked for stands above what is kept
    done = start_pyz(*DEMO, "NOWHERE", env={"STOCKRT_LANG": "en"})
    assert not CHINESE.search(done.stderr)


@pytest.mark.parametrize(
    ("of_file", "env", "is_chinese"),
    [
        ("zh", {"LANG": "C.UTF-8"}, True),
        ("en", ZH, False),
        ("zh", {"STOCKRT_LANG": "en"}, False),
        ("fr", ZH, True),
    ],
)
def test_language_of_the_settings_file_holds_for_the_faults_in_it(
    start_pyz: RunPyz, tmp_path: Path, of_file: str, env: dict[str, str], is_chinese: bool
) -> None:
    (tmp_path / "stockrt.env").write_text(f"STOCKRT_LANG={of_file}\nSERVER_PORT=abc\n")
    done = start_pyz("--check-settings", env=env)
    assert done.returncode == 78
    lines = done.stderr.splitlines()
    quoted = "SERVER_PORT=“abc”" if is_chinese else "SERVER_PORT='abc'"
    assert any(quoted in line for line in lines)
    assert [bool(CHINESE.search(line)) for line in lines] == [is_chinese] * len(lines)
    done = start_pyz("--status", env=env)
    assert done.returncode == 78 and set(done.stderr.splitlines()) < set(lines)
    assert bool(CHINESE.search(done.stdout)) == is_chinese


def test_what_is_odd_in_the_settings_is_said_to_who_typed_a_command(
    start_pyz: RunPyz, tmp_path: Path
) -> None:
    (tmp_path / "stockrt.env").write_text("MONGODB_HSOT=x\n")
    line, *_ = start_pyz(*DEMO, "AAPL.US").stderr.splitlines()
    assert line.startswith("stockrt: ") and "MONGODB_HSOT" in line
    assert "MONGODB_HSOT" not in start_pyz(*DEMO, "AAPL.US", env={"LOG_LEVEL": "error"}).stderr
