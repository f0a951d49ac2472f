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
import time
from dataclasses import dataclass
from pathlib import Path

import pymongo
import pytest
from conftest import RunPyz, unavailable
from kit.infoway_server import InfowayServer
from kit.mongo import free_port
from kit.platform_server import PlatformServer

import stockrt

REPO = Path(__file__).resolve().parents[2]
README = (REPO / "README.md").read_text(encoding="utf-8")
ENGLISH, _, CHINESE = README.partition("\n# 中文\n")


# Of the build script, systemctl, the simulators, the fault suite and json.tool.
OTHERS_FLAGS = {
    "--rest-port",
    "--rate",
    "--plan",
    "--script",
    "--foreground",
    "--now",
    "--native",
    "--port",
    "--long",
    "--quiet",
    "--no-ensure-ascii",
    "--executes",
}

COMMAND = re.compile(r"(\./|sudo |systemctl |kill |tests/faults/run|/opt/stockrt/|mongosh |pip |chmod )")


def blocks(text: str) -> list[str]:
    """Return the shell blocks of a text."""
    return re.findall(r"```sh\n(.*?)```", text, re.DOTALL)


def commands_of(text: str) -> list[str]:
    """Return the commands of the shell blocks, and those within sentences, without comments and without the tour."""
    lines = "".join(block for block in blocks(text) if "<<'TOUR'" not in block).splitlines()
    typed = [re.sub(r"(^|\s+)#.*", "", line) for line in lines]
    said = re.findall(r"(?<!`)`([^`]+)`(?!`)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [*filter(None, typed), *(" ".join(one.split()) for one in said if COMMAND.match(one))]


def tour_of(text: str, name: str = "tour") -> str:
    """Return the block of that name that is to be pasted."""
    tour = re.search(rf"<!-- {name}: .*?```sh\n(.*?)```", text, re.DOTALL)
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
    (tmp_path / "tests").mkdir()
    shutil.copytree(REPO / "tests/kit", tmp_path / "tests/kit")
    shutil.copy(pyz, tmp_path / "stockrt.pyz")
    wrong = {"MONGODB_HOST": "mongodb://127.0.0.1:1", "HTTP_PROXY": "http://127.0.0.1:1"}
    (tmp_path / "stockrt.env").write_text("".join(f"{name}={value}\n" for name, value in wrong.items()))
    return Tour(tmp_path, clean_env | wrong | {"http_proxy": "http://127.0.0.1:1"}, free_port(), free_port())


@pytest.mark.parametrize(
    ("half", "store"),
    [
        pytest.param(ENGLISH, "file", marks=pytest.mark.long),
        pytest.param(ENGLISH, "MongoDB", marks=pytest.mark.long),
        (CHINESE, "MongoDB"),
    ],
    ids=["file", "MongoDB", "中文"],
)
def test_the_tour_pasted_as_one_block_is_as_it_says(
    half: str, store: str, tour: Tour, request: pytest.FixtureRequest
) -> None:
    block, more = tour_of(half), {}
    if store == "MongoDB":
        uri, name = request.getfixturevalue("mongo_db")
        block, more = block.replace("stockrt_tour", name), {"TOUR_MONGODB": uri}
    status, shown = tour.paste(block, **more)
    assert status == 0, shown
    assert shown.count("WARNING") == 1 and "failed 1 (1 invalid_code: XXXX)" in shown
    assert not re.search(r"Traceback|ERROR|No such", shown), shown
    result = json.JSONDecoder().raw_decode(shown, shown.index('{\n    "type": "result"'))[0]
    said = json.loads(re.search(r"```json\n(\{\"type\": \"result\".*?)```", half, re.DOTALL)[1])  # type: ignore[index]
    assert told(result) == told(said)
    closing = re.search(r"```text\n(total 4, .*|共 4，.*?) ?[(（]", half)
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
        if isinstance(result, str) and re.search(r"…|\d{4}-|^no exchange|^未写|[0-9a-f]{8}-", result)
        else result
    )


@pytest.mark.long  # eight seconds of the stream, as it says
def test_the_streams_tour_pasted_as_one_block_is_as_it_says(tour: Tour) -> None:
    """Documents of both codes while it runs, its last line, and the gap of the cut."""
    status, shown = tour.paste(tour_of(ENGLISH, "stream").replace("8766", str(free_port())))
    assert status == 0, shown
    assert {json.loads(line)["s"] for line in shown.splitlines() if line.startswith("{")} == {
        "BTCUSDT",
        "ETHUSDT",
    }
    assert re.search(r"(?m)^trades \d+, stored \d+", shown), shown
    assert re.search(r"(?m)^\('crypto', '\[\"BTCUSDT\", \"ETHUSDT\"\]', \d+, 'connection lost", shown), shown
    assert not re.search(r"Traceback|ERROR|No such", shown), shown


@pytest.mark.parametrize("which", [pytest.param("api", marks=pytest.mark.long), "platform"])
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


# Commands that are run here, in a clone beside simulators and a MongoDB, in the README's order, and what each shows.
HERE = {
    "./build_pyz.sh && ./stockrt.pyz --once --demo --codes TSLA.US AAPL.US USDCNY": "total 3, stored 3, ",
    "cp stockrt.env.example stockrt.env": "",
    "./stockrt.pyz --check": "ok    store: ",
    "./stockrt.pyz --once --codes TSLA.US 700.HK 600519 BTCUSDT": "total 4, stored 4, already known 0, ",
    "./stockrt.pyz --symbols 茅台": "600519.SH",
    "./stockrt.pyz --status": "last execution",
    "./stockrt.pyz --executions": "--once",
    "./stockrt.pyz --drain": "0 moved to mongodb://",
    "./stockrt.pyz --rejects": "no document is refused now",
    "./stockrt.pyz --drain --retry": "0 moved to mongodb://",
    "./stockrt.pyz --rejects --discard": "",
    "./stockrt.pyz --backfill 60 --codes-file codes.txt": "1 code, 0 failed, 60 closes added",
    "./stockrt.pyz --backfill 60": "4 codes, 0 failed, 180 closes added",
    "./stockrt.pyz --html demo.svg --demo --codes TSLA.US": "demo.svg: 1 code, ",
    "./stockrt.pyz --show TSLA.US --chart 5m": "last: open ",
    "./stockrt.pyz --show TSLA.US --chart 1h --from 2026-08-01": "last: open ",
    "./stockrt.pyz --html stocks.html": "stocks.html: 4 codes, ",
    "./stockrt.pyz --grafana": '"title": "stockrt"',
    "./stockrt.pyz --register": "registered 股票实时数据获取模块 at http://",
}
# The others: the test that runs them, or why none does.
BOX = "program/test_systemd.py::"
INSTALL, BY_HAND = (
    BOX + "test_install_says_the_next_three_commands",
    BOX + "test_commands_by_hand_run_as_they_stand",
)
MOVED = BOX + "test_backed_up_and_moved_to_another_machine_it_is_the_same_module"
PACK = "sudo sh -c 'umask 077; tar -czf /root/stockrt.tar.gz -C / etc/stockrt var/lib/private/stockrt"
ELSEWHERE = {
    "./build_pyz.sh": "program/test_build.py::test_same_bytes_wherever_it_is_built_and_no_wheel_is_fetched_twice",
    "./build_pyz.sh --native": "program/test_build.py::test_native_build_runs_here",
    "./build_pyz.sh lock": "not run: it asks the index for everything; what it writes is compared by test_build.py",
    "./build_pyz.sh test": "not run: this test is one of those that it runs",
    "./build_pyz.sh test --long": "not run: this test is one of those that it runs",
    "./build_pyz.sh bench": "bench/test_bench.py::test_the_short_form_measures_every_row",
    "tests/faults/run": "not run: each of its tests is a test of every run",
    "tests/faults/run --long": "not run: it takes an hour",
    "tests/faults/run --executes 10000": "not run: it takes 20 minutes",
    "export TOUR_MONGODB=mongodb://127.0.0.1:27017":
        "program/test_readme.py::test_the_tour_pasted_as_one_block_is_as_it_says",
    "./build_pyz.sh && sudo ./build_pyz.sh install": INSTALL,
    "sudo ./build_pyz.sh install": INSTALL,
    "sudo ./build_pyz.sh uninstall": BOX + "test_uninstall_keeps_configuration_and_state",
    "sudoedit /etc/stockrt/stockrt.env": "not run: it opens an editor",
    "sudo systemctl enable --now stockrt": MOVED,
    "sudo systemctl disable --now stockrt": MOVED,
    f"{PACK}; systemctl start stockrt'": MOVED,
    f"{PACK}'": MOVED,
    "sudo sh -c 'umask 077; tar -xzf /root/stockrt.tar.gz -C /'": MOVED,
    "sudo systemctl stop stockrt": MOVED,
    "sudo systemctl start stockrt": BOX + "test_starts_executes_and_says_so",
    "sudo systemctl restart stockrt": BOX + "test_upgrade_under_load_loses_nothing_and_cleans_up",
    "sudo systemctl reload stockrt": "run in the box",
    "systemctl status stockrt": BY_HAND,
    "sudo /opt/stockrt/stockrt.pyz --check": BY_HAND,
    "sudo /opt/stockrt/stockrt.pyz --status": BOX + "test_status_by_hand_is_the_services_own",
    "sudo /opt/stockrt/stockrt.pyz --register": BOX + "test_registration_by_root_does_not_lock_the_service_out",
    "/opt/stockrt/stockrt.pyz --help": BY_HAND,
    "sudo journalctl -u stockrt -n 100": BY_HAND,
    "sudo journalctl -u stockrt -p warning": BY_HAND,
    "sudo journalctl -fu stockrt": "not run: it follows for ever",
    "sudo /opt/stockrt/stockrt.pyz --migrate /opt/older --dry-run":
        "program/test_migrate.py::test_dry_run_says_what_would_be_done_and_writes_nothing",
    "sudo /opt/stockrt/stockrt.pyz --migrate /opt/older":
        BOX + "test_migrated_before_its_first_start_it_is_the_older_module",
    "sudo /opt/stockrt/stockrt.pyz --env-file /etc/stockrt/stockrt.env --migrate --documents stock_data"
    " --time-zone Asia/Shanghai":
        "program/test_migrate.py::test_doubled_documents_are_brought_over_once_with_the_time_of_the_first",
    "./stockrt.pyz --show": "program/test_show.py::test_without_codes_those_of_the_watch_list_else_the_latest",
    "./stockrt.pyz --show 600519 700.HK 苹果 --sort asked": "program/test_show.py::test_a_name_finds_what_is_stored",
    "./stockrt.pyz --show --demo": "program/test_show.py::test_synthetic_trades_are_shown_apart",
    "./stockrt.pyz --export all.csv":
        "program/test_export.py::test_everything_is_exported_in_order_as_csv_and_as_json",
    "./stockrt.pyz --export maotai.jsonl --codes 600519 --from 2026-08-14 --to 2026-08-14T07:00":
        "program/test_export.py::test_a_part_is_what_its_dates_and_codes_say",
    "./stockrt.pyz --export closes.csv --closes":
        "program/test_export.py::test_closes_are_exported_with_what_only_final_ones_have",
    "./stockrt.pyz --export - --json --codes BTCUSDT":
        "program/test_export.py::test_a_code_of_which_there_is_nothing_is_said_and_the_others_are_written",
    "pip config set global.index-url": "program/test_build.py::test_wheels_come_by_the_mirror_of_pip",
    # what the bench's table and sentences name
    "./stockrt.pyz --once": "bench/test_bench.py::test_the_short_form_measures_every_row",
    "./stockrt.pyz --version": "bench/test_bench.py::test_the_short_form_measures_every_row",
    "./stockrt.env": "not run: a file",
    "./stockrt.pyz --collect --codes BTCUSDT ETHUSDT":
        "program/test_readme.py::test_the_streams_tour_pasted_as_one_block_is_as_it_says",
    "kill -9": "faults/test_faults_kill.py::test_killed_at_random_moments_it_loses_and_doubles_nothing",
    "kill -HUP": "run by test_daemon.py",
    "chmod 1777": BOX + "test_metrics_reach_the_node_exporter",
}  # fmt: skip


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["English", "中文"])
def test_every_command_is_run_here_or_elsewhere(text: str) -> None:
    """Where a test is named for it, there is such a test."""
    assert [one for one in commands_of(text) if one not in {*HERE, *ELSEWHERE, "./stockrt.pyz"}] == []
    for place in ELSEWHERE.values():
        file, found, test = place.partition("::")
        assert not found or f"def {test}(" in (REPO / "tests" / file).read_text("utf-8"), place


def test_its_commands_show_what_it_says(
    pyz: Path, clean_env: dict[str, str], tmp_path: Path, mongo_db: tuple[str, str]
) -> None:
    """One after the other, as an operator types them, in a clone that is built already."""
    for path in (pyz, REPO / "stockrt.env.example"):
        shutil.copy(path, tmp_path / path.name)
    (tmp_path / "codes.txt").write_text("TSLA.US\n")

    def type_(command: str) -> str:
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=clean_env, stdin=subprocess.DEVNULL,
                              capture_output=True, encoding="utf-8", timeout=120)  # fmt: skip
        assert done.returncode in ((0, 3) if command.endswith("--status") else (0,)), done.stderr
        return done.stdout + done.stderr

    commands = [one for one in commands_of(ENGLISH) if one in HERE]
    with InfowayServer(epoch_ms=int(time.time() * 1000)) as api, PlatformServer() as platform:
        settings = {
            "INFOWAY_API_BASE_URL": api.url, "INFOWAY_API_KEY": "test-key", "INFOWAY_PLAN": "0",
            "MONGODB_HOST": f"'{mongo_db[0]}'", "MONGODB_DB_NAME": mongo_db[1],
            "SERVER_IP": "127.0.0.1", "SERVER_PORT": str(platform.port),
        }  # fmt: skip
        for command in dict.fromkeys(commands):
            assert HERE[command] in type_(command.replace("./build_pyz.sh && ", "")), command
            if command.startswith("cp "):
                with (tmp_path / "stockrt.env").open("a") as file:
                    file.writelines(f"{name}={value}\n" for name, value in settings.items())
        assert "./stockrt.pyz" in commands_of(ENGLISH)
        with subprocess.Popen([tmp_path / "stockrt.pyz"], cwd=tmp_path, env=clean_env) as daemon:
            assert platform.wait_for(lambda p: p.connected, timeout=60)
            daemon.terminate()
        assert daemon.returncode == 0


def test_what_it_unpacks_is_as_large_as_it_says_and_may_be_deleted(
    start_pyz: RunPyz, clean_env: dict[str, str], tmp_path: Path
) -> None:
    said = re.search(r"for the first time, less than (\d+) MB for each", ENGLISH)
    assert said is not None
    for _ in range(2):
        done = start_pyz(
            "--once", "--demo", "--codes", "AAPL.US", env={"SHIV_ROOT": "", "PYTHONDONTWRITEBYTECODE": ""}
        )
        assert done.returncode == 0, done.stderr
        unpacked = tmp_path / ".shiv"
        size = sum(path.stat().st_size for path in unpacked.rglob("*") if path.is_file())
        assert 0 < size / 1e6 < int(said[1])
        shutil.rmtree(unpacked)


def test_every_flag_it_names_exists() -> None:
    flags = {flag for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", README) if flag not in OTHERS_FLAGS}
    known = stockrt.make_parser().format_help()
    assert [flag for flag in sorted(flags) if flag not in known] == []


def test_every_setting_it_names_exists() -> None:
    names = {name for setting in stockrt.SETTINGS for name in setting.names()}
    named = set(re.findall(r"\b(?:INFOWAY|MONGODB|SERVER|COLLECT)_[A-Z_]+", README))
    assert named - names - {"MONGODB_TEST_URI"} == set()


@pytest.mark.parametrize(
    ("text", "before"), [(ENGLISH, "what needs a restart"), (CHINESE, "哪些要重启才能生效")]
)
def test_it_names_every_setting_that_a_reload_does_not_change(text: str, before: str) -> None:
    paragraph = text.partition(before)[2].partition("\n\n")[0]
    needed = {re.sub("^(SERVER|MODULE)_.*", r"\1_*", one.name) for one in stockrt.SETTINGS if one.at_start}
    assert set(spans(paragraph)) == needed


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
                with pytest.raises(stockrt.InstrumentError) as caught:
                    stockrt.parse_code(code)
                told = stockrt.in_language(caught.value.message, "zh" if text is CHINESE else "en")
                assert re.search(r"the Beijing exchange|北京证券交易所", told) or told.endswith(asked[0])
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


def without_blocks(text: str) -> str:
    """Return a text without its code blocks."""
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def spans(text: str) -> list[str]:
    """Return what stands as code within sentences, sorted: commands, settings, messages."""
    return sorted(" ".join(one.split()) for one in re.findall(r"`([^`]+)`", text))


def all_blocks(text: str) -> list[tuple[str, str]]:
    """Return each code block's language and text, without comments."""
    found = re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL)
    return [(language, re.sub(r"(?m)(^|\s+)#.*$", "", block)) for language, block in found]


def tables(text: str) -> list[list[list[str]]]:
    """Return the tables, of each row what is code in it."""
    lines = "\n".join(line if line.startswith("|") else "" for line in without_blocks(text).splitlines())
    return [[spans(row) for row in table.splitlines()] for table in re.split(r"\n\n+", lines.strip())]


def sections(text: str) -> list[tuple[int, list[str]]]:
    """Return each section's depth and all that is code in its sentences and tables."""
    parts = re.split(r"(?m)^(#+) .*$", without_blocks(text))
    return [(len(mark), spans(body)) for mark, body in zip(parts[1::2], parts[2::2], strict=True)]


# Messages within sentences, as each half's reader gets them.
MESSAGES = {
    "did you mean AAPL.US?": "是不是 AAPL.US？",
    "read as: 000905 -> 000905.SH": "实际查询：000905 -> 000905.SH",
    "did you mean 600519.SH (贵州茅台)?": "是不是 600519.SH（贵州茅台）？",
    "12 of 50 codes: no trade since …": "50 个代码中有 12 个自 … 起没有新成交",
    "run as root": "请用 root 运行",
    "12 trades kept on this machine, MongoDB unreachable since 2026-11-28 10:04:05+08:00":
        "12 笔成交暂存于本机，MongoDB 自 2026-11-28 10:04:05+08:00 起无法连接",
}  # fmt: skip


def in_english(chinese: str) -> str:
    """Return the Chinese half with what the program says in it as the English half has it."""
    for english, message in MESSAGES.items():
        chinese = chinese.replace(f"`{message}`", f"`{english}`")
    chinese = chinese.replace("LANG=zh_CN.UTF-8 MONGODB", "LANG=C.UTF-8 MESSAGE_LANG=en MONGODB")
    return chinese.replace("LANG=zh_CN.UTF-8", "LANG=C.UTF-8")


def numbers_of(block: tuple[str, str]) -> tuple[str, object]:
    """Return of what the program prints the numbers of each line; a command stays as it is."""
    language, text = block
    if language not in ("text", "json"):
        return block
    lines = [re.findall(r"[\d.]*\d(?![\d.]*(?:M|万))", line) for line in text.splitlines()]
    return language, [sorted(map(float, line)) for line in lines]


def test_both_languages_say_the_same() -> None:
    """The same blocks in the same order, the same tables, the same sections with the same names in them."""
    chinese = f"# 中文\n{in_english(CHINESE)}"
    assert list(map(numbers_of, all_blocks(chinese))) == list(map(numbers_of, all_blocks(ENGLISH)))
    assert tables(chinese) == tables(ENGLISH)
    assert len(sections(chinese)) == len(sections(ENGLISH))
    for here, there in zip(sections(ENGLISH), sections(chinese), strict=True):
        assert (here[0], sorted(set(here[1]))) == (there[0], sorted(set(there[1])))


def test_every_link_within_it_leads_somewhere() -> None:
    headings = re.findall(r"(?m)^#+ (.*)$", re.sub(r"```.*?```", "", README, flags=re.DOTALL))
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(#([^)]+)\)", README)
    assert len(links) > 20
    assert [link for link in links if link not in anchors] == []


def test_the_chinese_half_uses_one_word_for_one_thing() -> None:
    """The spool is 暂存队列, a limit of requests 限频; 集合竞价 is the auction, and 集合 alone is a collection."""
    prose = without_blocks(CHINESE)
    assert "限速" not in prose
    assert prose.count("暂存队列") > 5
    assert re.findall(r".{4}(?:缓冲|缓存队列|本地队列|假脱机|排空|暂存文件|暂存区).{4}", prose) == []
    assert [line for line in CHINESE.splitlines() if "竞价" in line and "集合竞价" not in line] == []
    assert all("auction" in line for line in ENGLISH.splitlines() if "| of the last trade between" in line)


def test_the_plans_it_lists_are_those_that_the_program_keeps_to() -> None:
    listed = {
        name: tuple(int(number.replace(",", "")) for number in numbers)
        for name, *numbers in re.findall(r"\| `(\w+)` \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|", ENGLISH)
    }
    plans = stockrt.PLANS.values()
    assert listed == {plan.name: (plan.per_second, plan.per_minute, plan.per_day) for plan in plans}


def test_what_the_tests_lack_is_said_before_they_start(tmp_path: Path) -> None:
    """The functions of the build script that say it, on a machine with next to nothing."""
    script = (REPO / "build_pyz.sh").read_text("utf-8")
    functions = "\n".join(re.findall(r"(?ms)^(?:say|has_mongod|say_what_comes)\(\) \{.*?^\}.*?$", script))
    for name in ("bash", "id", "uname"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    said = subprocess.run(
        ["bash", "-c", f"build={tmp_path}/none python=none\n{functions}\nsay_what_comes quick"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    assert "3 minutes on 2 processors, 4 GB of memory, 2 GB in /tmp" in said and "600 MB" in said
    table = re.search(r"\n\| missing \|.*?\n\n", ENGLISH, re.DOTALL)
    assert table is not None
    for row in table[0].strip().splitlines()[2:]:
        missing = row.split("|")[1]
        assert "root" in missing or any(name in said for name in re.findall(r"[\w-]{4,}", missing)), row
