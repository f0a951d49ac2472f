"""What the README shows is so: its tour is run line by line, its commands and settings exist."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

import stockrt

REPO = Path(__file__).resolve().parents[2]
README = (REPO / "README.md").read_text(encoding="utf-8")
ENGLISH, _, CHINESE = README.partition("\n# 中文\n")
# For a machine without the sqlite3 shell: the same, by Python's own module.
SQLITE_SHELL = f"""sqlite3() {{ {sys.executable} -c '
import sqlite3, sys
for row in sqlite3.connect(sys.argv[1]).execute(sys.argv[2]): print(*row, sep="|")' "$@"; }}
"""


# Of the build script, the simulators and the fault suite.
OTHERS_FLAGS = {"--now", "--native", "--port", "--long", "--executes"}


def blocks(text: str) -> list[str]:
    """Return the shell blocks of a text."""
    return re.findall(r"```sh\n(.*?)```", text, re.DOTALL)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def until(ready: Callable[[], bool], what: str) -> None:
    """Wait for what another process does; there is no event to await across the shell."""
    deadline = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < deadline, f"not in 60 s: {what}"
        time.sleep(0.02)


def answers(port: int) -> bool:
    """Say whether something listens on a port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Shell:
    """A bash that is given one line after the other, as a person types them."""

    def __init__(self, directory: Path, environ: dict[str, str]) -> None:
        self._bash = subprocess.Popen(
            ["bash", "-m"],
            cwd=directory,
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def type(self, line: str) -> str:
        """Type a line and return what is printed until its command has ended."""
        assert self._bash.stdin is not None
        assert self._bash.stdout is not None
        self._bash.stdin.write(f"{line}\necho; echo =ended=\n")
        self._bash.stdin.flush()
        printed = ""
        for out in self._bash.stdout:
            if out.strip() == "=ended=":
                return printed
            printed += out
        raise AssertionError(f"the shell ended: {printed}")

    def close(self) -> None:
        """End the shell and what it started."""
        assert self._bash.stdin is not None
        self._bash.stdin.write("kill -9 $(jobs -p) 2>/dev/null; exit\n")
        self._bash.stdin.close()
        self._bash.wait(60)


def test_the_tour_is_as_it_says(pyz: Path, clean_env: dict[str, str], tmp_path: Path) -> None:
    tour = re.search(r"<!-- tour.*?```sh\n(.*?)```", README, re.DOTALL)
    assert tour is not None
    for part in ("tests/kit/infoway_server.py", "tests/kit/platform_server.py"):
        (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPO / part, tmp_path / part)
    shutil.copy(pyz, tmp_path / "stockrt.pyz")
    api, platform = free_port(), free_port()
    # What the operator's own settings say must not matter: a store that cannot be reached, a proxy that is none.
    (tmp_path / "stockrt.env").write_text(
        "MONGODB_HOST=mongodb://127.0.0.1:1\nHTTP_PROXY=http://127.0.0.1:1\n"
    )
    environ = clean_env | {
        "PATH": os.environ["PATH"],
        "TMPDIR": str(tmp_path),
        "http_proxy": "http://127.0.0.1:1",
        "ALL_PROXY": "http://127.0.0.1:1",
    }
    shell = Shell(tmp_path, environ)
    printed = {}

    def control(action: str) -> dict[str, object]:
        with urllib.request.urlopen(f"http://127.0.0.1:{platform}/_control/{action}") as answer:
            found: dict[str, object] = json.load(answer)
            return found

    try:
        if shutil.which("sqlite3") is None:
            shell.type(SQLITE_SHELL)
        for line in tour[1].strip().splitlines():
            printed[line] = shell.type(line.replace("8765", str(api)).replace("8000", str(platform)))
            if "infoway_server" in line:
                until(lambda: answers(api), "the market-data API")
            elif "platform_server" in line:
                until(lambda: answers(platform), "the platform")
            elif line.startswith("./stockrt.pyz") and line.endswith("&"):
                until(lambda: '"online": true' in json.dumps(control("state")) or "connected" in json.dumps(
                    control("connections")), "the module is connected")  # fmt: skip
            elif "_control/execute" in line:
                until(lambda: "success_count" in json.dumps(control("results")), "a result")
    finally:
        shell.close()
    results = next(text for line, text in printed.items() if "_control/results" in line)
    assert "4 of 5 codes stored" in results
    rows = next(text for line, text in printed.items() if line.startswith("sqlite3"))
    assert [row.split("|")[0] for row in rows.split()] == ["TSLA.US", "00700.HK", "600519.SH", "USDCNY"]


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["English", "中文"])
def test_the_first_two_commands_build_and_test(text: str) -> None:
    assert [block.strip() for block in blocks(text)[:2]] == [
        "./build_pyz.sh && ./stockrt.pyz --once --demo --codes TSLA.US AAPL.US USDCNY",
        "./build_pyz.sh test",
    ]


def test_every_flag_it_names_exists() -> None:
    flags = {flag for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", README) if flag not in OTHERS_FLAGS}
    known = stockrt.make_parser().format_help()
    assert [flag for flag in sorted(flags) if flag not in known] == []


def test_every_setting_it_names_exists() -> None:
    names = {name for setting in stockrt.SETTINGS for name in setting.names()}
    named = set(re.findall(r"\b(?:INFOWAY|MONGODB|SERVER)_[A-Z_]+", README))
    assert named - names - {"MONGODB_TEST_URI"} == set()


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["English", "中文"])
def test_the_codes_it_explains_are_read_so(text: str) -> None:
    table = re.search(r"\n\| (?:you type|输入) \|.*?\n\n", text, re.DOTALL)
    assert table is not None
    read = []
    for row in table[0].strip().splitlines()[2:]:
        _, left, right, _ = row.split("|")
        typed, asked = re.findall("`(.*?)`", left), re.findall("`(.*?)`", right)
        for n, code in enumerate(typed):
            if typed[n] in ("AAPL", "430047", "920002.BJ"):
                with pytest.raises(
                    stockrt.InstrumentError, match=r"did you mean AAPL\.US|the Beijing exchange"
                ):
                    stockrt.parse_code(code)
            elif asked == ["common"]:
                assert stockrt.parse_code(code) == stockrt.Instrument(code, "common")
            else:
                expected = asked[min(n, len(asked) - 1)] if asked else code.removeprefix("common:")
                assert stockrt.parse_code(code).code == expected
        read += typed
    assert len(read) > 40
    assert stockrt.parse_code("common:TOPIX.JP") == stockrt.Instrument("TOPIX.JP", "common")


def test_the_identity_it_shows_is_the_rule() -> None:
    shown = re.search(r"```json\n(\{\"_id\".*?)```", README, re.DOTALL)
    assert shown is not None
    document = json.loads(shown[1])
    trade = stockrt.Trade(*(document[name] for name in stockrt.Trade._fields))
    assert document["_id"] == stockrt.identity(trade)


def test_both_languages_say_the_same() -> None:
    english = [block for block in blocks(ENGLISH) if "infoway_server" not in block]
    commands = [re.sub(r"\s+#.*", "", block) for block in english]
    assert [re.sub(r"\s+#.*", "", block) for block in blocks(CHINESE)] == commands
