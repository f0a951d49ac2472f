"""What the README shows is so: its commands are run, its tour is pasted, its halves say the same."""

import contextlib
import fcntl
import json
import os
import pty
import re
import shutil
import socket
import subprocess
import termios
from dataclasses import dataclass
from pathlib import Path

import pymongo
import pytest
from conftest import unavailable
from kit.mongo import free_port

import stockrt

REPO = Path(__file__).resolve().parents[2]
README = (REPO / "README.md").read_text(encoding="utf-8")
ENGLISH, _, CHINESE = README.partition("\n# 中文\n")


# Of the build script, systemctl, the simulators, the fault suite and json.tool.
OTHERS_FLAGS = {"--now", "--native", "--port", "--long", "--quiet", "--no-ensure-ascii"}


def blocks(text: str) -> list[str]:
    """Return the shell blocks of a text."""
    return re.findall(r"```sh\n(.*?)```", text, re.DOTALL)


def tour_of(text: str) -> str:
    """Return the block that is to be pasted."""
    tour = re.search(r"<!-- tour.*?```sh\n(.*?)```", text, re.DOTALL)
    assert tour is not None
    return tour[1]


class Terminal:
    """A bash on a terminal of its own, into which a person pastes."""

    def __init__(self, directory: Path, environ: dict[str, str]) -> None:
        self._ours, theirs = pty.openpty()
        # what is pasted is not shown again: what is read is what the commands say
        modes = termios.tcgetattr(theirs)
        modes[3] &= ~termios.ECHO
        termios.tcsetattr(theirs, termios.TCSANOW, modes)
        self._bash = subprocess.Popen(
            ["bash", "--norc", "--noprofile", "--noediting", "-i"],
            cwd=directory,
            env=environ | {"TERM": "dumb", "PS1": "", "PS2": ""},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)

    def paste(self, text: str) -> tuple[int, str]:
        """Paste, end the shell, and return the exit status of what was pasted last and all that was shown."""
        os.write(self._ours, f"{text}exit $?\n".encode())
        shown = b""
        # the terminal's other end is closed when the shell and all that it started are gone
        with contextlib.suppress(OSError):
            while chunk := os.read(self._ours, 65536):
                shown += chunk
        os.close(self._ours)
        return self._bash.wait(60), shown.decode().replace("\r\n", "\n")


@dataclass
class Tour:
    """Where the tour is done: the clone as far as it needs it, with ports of its own."""

    directory: Path
    environ: dict[str, str]
    api: int
    platform: int

    def paste(self, block: str, **more: str) -> tuple[int, str]:
        """Paste the block, its ports replaced as the README says."""
        block = block.replace("8765", str(self.api)).replace("8000", str(self.platform))
        return Terminal(self.directory, self.environ | more).paste(block)


@pytest.fixture
def tour(pyz: Path, clean_env: dict[str, str], tmp_path: Path) -> Tour:
    """An operator's clone, whose own settings must not matter: a store that cannot be reached, a proxy that is none."""
    if shutil.which("curl") is None:
        unavailable("no curl: install curl")
    for part in ("tests/kit/infoway_server.py", "tests/kit/platform_server.py"):
        (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPO / part, tmp_path / part)
    shutil.copy(pyz, tmp_path / "stockrt.pyz")
    wrong = {"MONGODB_HOST": "mongodb://127.0.0.1:1", "HTTP_PROXY": "http://127.0.0.1:1"}
    (tmp_path / "stockrt.env").write_text("".join(f"{name}={value}\n" for name, value in wrong.items()))
    return Tour(tmp_path, clean_env | wrong | {"http_proxy": "http://127.0.0.1:1"}, free_port(), free_port())


@pytest.mark.parametrize("store", ["file", "MongoDB"])
def test_the_tour_pasted_as_one_block_is_as_it_says(
    store: str, tour: Tour, request: pytest.FixtureRequest
) -> None:
    block, more = tour_of(ENGLISH), {}
    if store == "MongoDB":
        uri, name = request.getfixturevalue("mongo_db")
        block, more = block.replace("stockrt_tour", name), {"TOUR_MONGODB": uri}
    status, shown = tour.paste(block, **more)
    assert status == 0, shown
    assert shown.count("WARNING") == 1 and "failed 1 (1 invalid_code: XXXX)" in shown
    assert not re.search(r"Traceback|ERROR|No such", shown), shown
    result = json.JSONDecoder().raw_decode(shown, shown.index('{\n    "type": "result"'))[0]
    said = json.loads(re.search(r"```json\n(\{\"type\": \"result\".*?)```", ENGLISH, re.DOTALL)[1])  # type: ignore[index]
    assert told(result) == told(said)
    closing = re.search(r"```text\n(total 4, .*) \(", ENGLISH)
    assert closing is not None and closing[1] in shown
    assert [line.split()[0] for line in shown.splitlines() if re.match(r"\S+ +[\d.]+ ", line)] == [
        "TSLA.US", "00700.HK", "600519.SH", "USDCNY"]  # fmt: skip
    if store == "MongoDB":
        with pymongo.MongoClient[dict[str, object]](uri) as client:
            assert client[name]["realtime"].count_documents({}) == 4


def told(result: object) -> object:
    """A result without what differs from run to run, and without what the README leaves out."""
    if isinstance(result, dict):
        return {name: told(value) for name, value in result.items() if name != "took_ms"}
    return (
        "…"
        if isinstance(result, str) and re.search(r"…|\d{4}-|^no exchange|[0-9a-f]{8}-", result)
        else result
    )


@pytest.mark.parametrize("which", ["api", "platform"])
def test_the_tour_says_in_a_sentence_that_a_port_is_taken(which: str, tour: Tour) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        setattr(tour, which, taken.getsockname()[1])
        status, shown = tour.paste(tour_of(ENGLISH))
    assert status != 0
    assert f"cannot listen on 127.0.0.1:{getattr(tour, which)}: Address already in use" in shown
    assert "Traceback" not in shown and "result" not in shown


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
    commands = [re.sub(r"\s+#.*", "", block) for block in blocks(ENGLISH)]
    assert [re.sub(r"\s+#.*", "", block) for block in blocks(CHINESE)] == commands
