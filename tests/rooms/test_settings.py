"""The settings: where they come from, what they may be, and what a fault says."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

import hypothesis
import pytest
from conftest import unprivileged
from hypothesis import strategies as st
from kit.cases import each
from kit.chinese import in_chinese

import stockrt
from stockrt import (
    PLAN_TO_ASK,
    PLANS,
    SETTINGS,
    LoadedSettings,
    Plan,
    Proxy,
    Settings,
    SettingsError,
    in_language,
)

EXAMPLE = Path(__file__).resolve().parents[2] / "stockrt.env.example"
NAMES = [setting.name for setting in SETTINGS]
# Stands for a secret wherever one may not be shown.
SECRET = "hunter22"

WriteFile = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> WriteFile:
    """Give a callable that writes an env file and returns its path."""

    def make(content: str | bytes, name: str = "test.env") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


def load(
    environ: Mapping[str, str] | None = None, file: Path | None = None, places: Sequence[Path] = ()
) -> LoadedSettings:
    """Load settings as an ordinary user, from nothing but what is given."""
    return stockrt.load_settings(environ or {}, file, places, is_root=False)


def value_of(settings: Settings, name: str) -> object:
    """Return what a setting became."""
    return getattr(settings, next(s.attribute for s in SETTINGS if s.name == name))


def faults_of(
    environ: Mapping[str, str] | None = None, file: Path | None = None, places: Sequence[Path] = ()
) -> tuple[str, ...]:
    """Load settings that have faults, and return these."""
    with pytest.raises(SettingsError) as caught:
        load(environ, file, places)
    return caught.value.faults


# ------------------------------------------------------------------------------------------------------
# Where they come from
# ------------------------------------------------------------------------------------------------------


def test_nothing_set_gives_the_defaults_and_needs_no_file() -> None:
    """An empty environment is a working configuration."""
    settings, warnings, origins, _ = load({"HOME": "/home/u"})
    assert (warnings, origins) == ((), "defaults")
    assert settings == Settings(
        api_keys=(),
        api_base_url="https://data.infoway.io",
        plans=(PLAN_TO_ASK,),
        mongodb_uri="",
        mongodb_db_name="forecast_platform",
        realtime_name="realtime",
        close_name="close",
        license_name="license_usage",
        numeric_type="string",
        server_host="",
        server_port=0,
        server_tls=False,
        heartbeat_s=10,
        module_name="股票实时数据获取模块",
        module_description="获取股票、外汇、加密货币的最新成交并写入 MongoDB",
        state_directory=Path("/home/u/.local/state/stockrt"),
        log_level="info",
        color=True,
        collect="",
        collect_every_s=0,
        collect_codes="",
        collect_share=(1, 1),
        stream_url="wss://data.infoway.io/ws",
        watch_name="stock_watch",
        gap_name="stream_gaps",
        keep_days=0,
        spool_max_bytes=1 << 30,
        message_language="zh",
    )


def test_settings_are_frozen() -> None:
    """Nobody changes a setting after the start."""
    with pytest.raises(AttributeError):
        load().settings.log_level = "debug"  # type: ignore[misc]


def test_the_environment_is_stronger_than_the_file_and_the_file_than_the_default(write: WriteFile) -> None:
    """Each setting is taken from the strongest place that has it."""
    file = write("INFOWAY_PLAN=pro\nLOG_LEVEL=debug\n")
    settings, _, origins, _ = load({"INFOWAY_PLAN": "basic"}, file)
    assert (settings.plans[0].name, settings.log_level, settings.numeric_type) == ("basic", "debug", "string")
    assert origins == f"environment, {file}, defaults"


def test_a_named_file_replaces_the_usual_places(write: WriteFile) -> None:
    """Files are not merged: the named one alone counts."""
    place = write("LOG_LEVEL=debug\nINFOWAY_PLAN=pro\n", "usual.env")
    named = write("INFOWAY_PLAN=basic\n", "named.env")
    settings, _, origins, _ = load({}, named, [place])
    assert (settings.plans[0].name, settings.log_level) == ("basic", "info")
    assert origins == f"{named}, defaults"


def test_the_first_usual_place_that_exists_is_read_alone(tmp_path: Path, write: WriteFile) -> None:
    """The places are tried in their order; what comes later is not read at all."""
    relative = [str(place).lstrip("/") for place in stockrt.ENV_FILE_PLACES]
    places = [tmp_path / place for place in relative]
    for number, name in enumerate(relative):
        write(f"MODULE_NAME=place{number}\n" + ("SERVER_PORT=no\n" if number == 3 else ""), name)
    for number, place in enumerate(places[:3]):
        settings, _, origins, _ = load({}, None, places)
        assert (settings.module_name, origins) == (f"place{number}", f"{place}, defaults")
        place.unlink()
    assert len(faults_of({}, None, places)) == 1


def test_the_usual_places_are_those_of_the_documentation() -> None:
    """Their names and their order are a promise."""
    assert [str(place) for place in stockrt.ENV_FILE_PLACES] == [
        "stockrt.env",
        ".env",
        "config/.env",
        "/etc/stockrt/stockrt.env",
    ]


def test_a_directory_in_a_usual_place_is_no_file(tmp_path: Path, write: WriteFile) -> None:
    """A folder called .env does not stop the search; one called stockrt.env is told of, too."""
    (tmp_path / ".env").mkdir()
    (tmp_path / "stockrt.env").mkdir()
    file = write("LOG_LEVEL=debug\n")
    loaded = load({}, None, [tmp_path / "stockrt.env", tmp_path / ".env", file])
    assert (loaded.origins, len(loaded.warnings)) == (f"{file}, defaults", 1)
    assert loaded.warnings[0].startswith(f"{tmp_path}/stockrt.env cannot be read: Is a directory")


@pytest.mark.parametrize("empty", ["", "  ", "\t"])
def test_an_empty_value_counts_as_not_set(write: WriteFile, empty: str) -> None:
    """Wherever it is empty, the next weaker place is asked."""
    file = write(f"LOG_LEVEL=debug\nINFOWAY_PLAN='{empty}'\nMONGODB_HOST=\nSERVER_PORT=''\n")
    settings = load({"INFOWAY_PLAN": empty, "LOG_LEVEL": empty, "INFOWAY_API_KEY": empty}, file).settings
    assert settings.log_level == "debug"
    assert settings.plans == (PLAN_TO_ASK,)
    assert (settings.mongodb_uri, settings.server_port, settings.api_keys) == ("", 0, ())


OLD, NEW = "MONGODB_COLLECTION_NAME", "MONGODB_REALTIME_COLLECTION_NAME"


@pytest.mark.parametrize(
    ("environ", "file", "expected"),
    [
        ({}, "", "realtime"),
        ({OLD: "old"}, "", "old"),
        ({}, f"{OLD}=old", "old"),
        ({OLD: "old", NEW: "new"}, "", "new"),
        ({}, f"{OLD}=old\n{NEW}=new", "new"),
        ({OLD: "old"}, f"{NEW}=new", "old"),
        ({NEW: "new"}, f"{OLD}=old", "new"),
        ({OLD: "old", NEW: ""}, "", "old"),
        ({}, f"{NEW}=\n{OLD}=old", "old"),
        ({OLD: ""}, f"{OLD}=old", "old"),
    ],
)
def test_the_old_collection_name_is_weaker_than_the_new_one(
    write: WriteFile, environ: dict[str, str], file: str, expected: str
) -> None:
    """In one place the new name wins; the environment wins over the file by either name."""
    settings, warnings, *_ = load(environ, write(file))
    assert settings.realtime_name == expected
    assert warnings == ()


def test_a_fault_under_the_old_name_names_the_old_name() -> None:
    """The operator finds the line that is wrong."""
    (fault,) = faults_of({OLD: "a$b"})
    assert fault.startswith(f"{OLD}='a$b' (environment)")


def test_no_color_is_respected_unless_it_is_empty() -> None:
    """NO_COLOR counts when it holds anything."""
    assert not load({"NO_COLOR": "1"}).settings.color
    assert load({"NO_COLOR": ""}).settings.color


# ------------------------------------------------------------------------------------------------------
# The file
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("A=plain", "plain"),
        ("A=p$w", "p$w"),
        ("A=$HOME", "$HOME"),
        ("A=${HOME}", "${HOME}"),
        ("A='${HOME}'", "${HOME}"),
        ('A="${HOME:-x}"', "${HOME:-x}"),
        ("A=p$$w", "p$$w"),
        ("A=p#w", "p#w"),
        ("A=p #w", "p"),
        ("A='p #w'", "p #w"),
        ('A="p #w" # a comment', "p #w"),
        ("A=it's", "it's"),
        (r"A='it\'s'", "it's"),
        ('A="it\'s"', "it's"),
        ('A=a"b', 'a"b'),
        (r'A="a\"b"', 'a"b'),
        (r"A='a\nb'", r"a\nb"),
        (r'A="a\nb"', "a\nb"),
        (r"A=a\b", r"a\b"),
        (r"A='a\\b'", r"a\b"),
        ("A=two words", "two words"),
        ("A= x ", "x"),
        ("A=' x '", " x "),
        ("A==x=", "=x="),
        ("A=", ""),
        ("A=''", ""),
        ("  export A = x", "x"),
        ("A=1\nA=2", "2"),
        ("# A=1\n\nA=2\n#A=3", "2"),
        ("A=x\r\n", "x"),
        ("\ufeffA=x", "x"),
        ("A=`id`", "`id`"),
    ],
)
def test_a_value_in_the_file_is_taken_as_it_stands(write: WriteFile, line: str, expected: str) -> None:
    """Quotes go, python-dotenv's escapes count, and nothing is expanded."""
    assert stockrt.read_env_file(write(line)) == {"A": expected}


@hypothesis.given(st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=40))
def test_any_password_can_be_written_between_double_quotes(password: str) -> None:
    """Backslash and double quote are escaped with a backslash; everything else stands as it is, to systemd too."""
    line = 'A="' + password.replace("\\", "\\\\").replace('"', '\\"') + '"'
    with tempfile.NamedTemporaryFile(suffix=".env") as file:
        Path(file.name).write_text(line, encoding="utf-8", newline="")
        assert stockrt.read_env_file(Path(file.name)) == {"A": password}
        assert stockrt.read_env_file(Path(file.name)).faults == []


# What systemd 252 made of each with EnvironmentFile=: test_systemd asks the one in the box the same.
SYSTEMD_READS = {
    "A=plain": "plain",
    "A=p$w#x": "p$w#x",
    "A=it's": "it's",
    "A='p #w'": "p #w",
    "A=' x '": " x ",
    'A="p #w"': "p #w",
    r'A="a\"b"': 'a"b',
    r"A='a\nb'": r"a\nb",
    r'A="a\nb"': r"a\nb",
    r"A='a\\b'": r"a\\b",
    r"A='it\'s'": r"it\s'",
    r'A="\$x"': "$x",
    r"A=a\b": "ab",
    "A='x' # comment": "x# comment",
    'A="x" # comment': "x# comment",
}


@pytest.mark.parametrize("line", SYSTEMD_READS)
def test_a_value_of_the_file_means_the_same_to_systemd_or_is_a_fault(write: WriteFile, line: str) -> None:
    file = write(f"B=1\n{line}\n")
    same = stockrt.read_env_file(file)["A"] == SYSTEMD_READS[line]
    assert len(stockrt.read_env_file(file).faults) == (not same)
    if not same:
        (fault,) = faults_of({}, file)
        assert f"{file}, line 2: systemd would read A otherwise" in fault
        assert "it" not in fault.partition("otherwise")[0].partition("line 2")[2]  # its value is not shown


# Files of which systemd makes something else, with the setting LOG_LEVEL as we read it, and what is said of which line:
# test_systemd has the one in the box read them, too.
OTHERWISE = {
    "\ufeffLOG_LEVEL=debug\n": (
        "debug",
        "line 1: systemd passes over LOG_LEVEL, for the file begins with a byte",
    ),
    "A=1\nexport LOG_LEVEL=debug\n": (
        "debug",
        "line 2: systemd passes over the line, for more than LOG_LEVEL",
    ),
    "'LOG_LEVEL'=debug\n": ("debug", "line 1: systemd passes over the line, for more than LOG_LEVEL"),
    "LOG_LEVEL=debug # for a day\n": ("debug", "line 1: to systemd the comment is a part of LOG_LEVEL"),
    "A=1\n\nMODULE_NAME=abc\\\nLOG_LEVEL=debug\n": (
        "debug",
        "line 3: the \\ at its end has systemd read the next",
    ),
    "MODULE_NAME=abc\\": ("info", "line 1: the \\ at its end has systemd read the next"),
    "A=1\n# C:\\stockrt\\\nLOG_LEVEL=debug\n": (
        "debug",
        "line 2: the \\ at its end has systemd read the next",
    ),
}


@pytest.mark.parametrize("content", OTHERWISE)
def test_what_systemd_reads_otherwise_is_a_fault_in_its_file_alone(
    write: WriteFile, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str
) -> None:
    """It is in what the unit names, in what stands in its place, and in the copy that the service has of that."""
    file = write(content, "stockrt.env")
    level, said = OTHERWISE[content]
    loaded = load({}, file)
    assert (loaded.settings.log_level, loaded.warnings) == (level, ())
    with pytest.raises(SettingsError) as caught:
        stockrt.load_settings({}, None, (), is_root=True, unit=parse(f"EnvironmentFile={file}"))
    (fault,) = caught.value.faults
    assert fault.startswith(f"{file}, {said}")
    assert in_chinese(fault).startswith(f"{file} 第 ")
    with monkeypatch.context() as patched:
        patched.setattr(stockrt, "SERVICE_FILE", file)
        assert faults_of({}, file) == (fault,)
    (fault,) = faults_of({"CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert fault.startswith(f"/etc/stockrt/stockrt.env, {said}")


@pytest.mark.parametrize(
    "content",
    [
        "\ufeff# a comment\nLOG_LEVEL=debug\n",
        "LOG_LEVEL = debug \n# a comment of C:\\stockrt\n",
        "LOG_LEVEL=debug\u3000\nMODULE_NAME='a\nb'\n",
        'A="x\\\\"\nLOG_LEVEL=debug',
        "中文=1\n;LOG_LEVEL=info\nLOG_LEVEL=debug\r\n",
    ],
)
def test_what_means_the_same_to_systemd_is_no_fault(write: WriteFile, content: str) -> None:
    file = write(content)
    assert stockrt.read_env_file(file).faults == []
    assert stockrt.read_env_file(file)["LOG_LEVEL"].strip() == "debug"


@each(
    ("uri", "more", "name"),
    [
        ("mongodb://h/", {}, "forecast_platform"),
        ("mongodb://h", {}, "forecast_platform"),
        ("mongodb://h/stocks", {}, "stocks"),
        ("mongodb://u:p@h1,h2:1/stocks?replicaSet=r", {}, "stocks"),
        ("mongodb+srv://h.example.com/st%2Docks", {}, "st-ocks"),
        ("mongodb://h/stocks", {"MONGODB_DB_NAME": "other"}, "other"),
        ("mongodb://u:p@h/admin", {}, "forecast_platform"),  # where the user is
        ("mongodb://h/?appName=a/b", {}, "forecast_platform"),
    ],
)
def test_the_database_of_the_uri_counts_unless_another_is_set(
    uri: str, more: dict[str, str], name: str
) -> None:
    assert load({"MONGODB_HOST": uri, **more}).settings.mongodb_db_name == name


def test_a_database_of_the_uri_that_cannot_be_one_is_a_fault() -> None:
    (fault,) = faults_of({"MONGODB_HOST": "mongodb://u:hunter22@h/a$b"})
    assert fault.startswith("MONGODB_HOST, the database behind its last /: expected a database name")


def test_a_password_with_dollar_hash_and_quotes_arrives_whole(write: WriteFile) -> None:
    """From the file to the settings nothing of it is lost."""
    settings = load({}, write("MONGODB_HOST='mongodb://u:p$w#\"${X}%40 x@h/'\n")).settings
    assert settings.mongodb_uri == 'mongodb://u:p$w#"${X}%40 x@h/'


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ("A=1\n=x\nB=2\n", [2]),
        ("<<<<<<< HEAD\nA=1\n", [1]),
        ("A=1\n\n\n: broken\n\n# c\nalso broken\n", [4, 7]),
        ("INFOWAY_PLAN: pro\n", [1]),
        ("INFOWAY_PLAN pro\n", [1]),
        ("A=1\nINFOWAY_PLAN\n", [2]),
        ("A='never closed\n", [1]),
        ("A=1\nB='x'y\n", [2]),
    ],
)
def test_each_line_that_is_no_setting_is_named(write: WriteFile, content: str, lines: list[int]) -> None:
    """The fault says file and line, and whether it is the quotes."""
    file = write(content)
    faults = faults_of({}, file)
    kind = "settings.odd_quotes" if "='" in content else "settings.no_assignment"
    assert {fault.kind for fault in faults if isinstance(fault, stockrt.Phrase)} == {kind}
    assert [fault.partition(": ")[0] for fault in faults] == [f"{file}, line {n}" for n in lines]


def test_a_broken_line_is_not_shown_for_it_may_hold_a_secret(write: WriteFile) -> None:
    """The operator has the line's number."""
    assert SECRET not in str(faults_of({}, write(f"INFOWAY_API_KEY: {SECRET}\nINFOWAY_API_KEY='{SECRET}\n")))


def test_a_file_that_the_shell_hands_over_is_read_once() -> None:
    """Of --env-file <(…) a second look would find nothing, and no fault."""
    reader, writer = os.pipe()
    os.write(writer, b"LOG_LEVEL=verbose\nbroken line\n")
    os.close(writer)
    assert len(faults_of({}, Path(f"/dev/fd/{reader}"))) == 2
    os.close(reader)


def test_a_named_file_that_is_missing_is_a_fault(tmp_path: Path) -> None:
    """Whoever names a file wants it read."""
    (fault,) = faults_of({}, tmp_path / "absent.env")
    assert str(tmp_path / "absent.env") in fault
    assert "--env-file" in fault


def test_a_named_directory_is_a_fault(tmp_path: Path) -> None:
    """It is no file."""
    assert str(tmp_path) in faults_of({}, tmp_path)[0]


@pytest.mark.parametrize("content", [b"A=\xff\xfe", "A=é".encode("latin-1"), "A=x".encode("utf-16")])
def test_a_file_that_is_not_utf8_is_a_fault(write: WriteFile, content: bytes) -> None:
    """It is said in words, without a traceback, and how it becomes one."""
    (fault,) = faults_of({}, write(content))
    assert "is not UTF-8 text; save it as such (of GBK: iconv -f GBK -t UTF-8)" in fault
    assert "请另存为 UTF-8（GBK 文件可用 iconv -f GBK -t UTF-8 转换）" in in_language(fault, "zh")


def test_a_named_file_that_may_not_be_read_is_a_fault() -> None:
    """The fault says what the system says."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        file = Path(folder, "x.env")
        file.touch(0o000)
        with unprivileged():
            (fault,) = faults_of({}, file)
    assert "Permission denied" in fault


def test_a_usual_place_that_may_not_be_read_is_passed_over_with_a_warning() -> None:
    """A service gets its settings from its service manager, and must start."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        file = Path(folder, "x.env")
        file.touch(0o000)
        with unprivileged():
            settings, warnings, origins, _ = load({"LOG_LEVEL": "debug"}, None, [file])
    assert (settings.log_level, origins, len(warnings)) == ("debug", "environment, defaults", 1)
    assert str(file) in warnings[0]


def test_a_usual_place_behind_a_closed_directory_is_as_not_there() -> None:
    """Whether there is a file cannot be known, so nothing is said."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "x.env")
        file.write_text("LOG_LEVEL=debug\n")
        os.chmod(folder, 0o000)
        with unprivileged():
            settings, warnings, origins, _ = load({}, None, [file])
        os.chmod(folder, 0o755)
    assert (settings.log_level, origins, warnings) == ("info", "defaults", ())


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("MONGODB_HSOT", "MONGODB_HOST"),
        ("MONGODB_DBNAME", "MONGODB_DB_NAME"),
        ("MONGODB_COLECTION_NAME", "MONGODB_COLLECTION_NAME"),
        ("INFOWAY_APIKEY", "INFOWAY_API_KEY"),
        ("INFOWAY_API_KEYS", "INFOWAY_API_KEY"),
        ("INFOWAY_PLN", "INFOWAY_PLAN"),
        ("SERVER_PROT", "SERVER_PORT"),
        ("SERVER_HOST_IP", "SERVER_IP"),
        ("COLECT", "COLLECT"),
        ("KEEP_DAY", "KEEP_DAYS"),
        ("MONGO_HOST", "MONGODB_HOST"),
        ("LOGLEVEL", "LOG_LEVEL"),
        ("STOCKRT_LANGUAGE", "STOCKRT_LANG"),
        ("MESSAGE_LANGUAGE", "MESSAGE_LANG"),
        ("infoway_api_key", "INFOWAY_API_KEY"),
        ("KEEP-DAYS", "KEEP_DAYS"),
        ("Log_Level", "LOG_LEVEL"),
        ("ＫＥＥＰ＿ＤＡＹＳ", "KEEP_DAYS"),
        ("SERVER_HOST", "SERVER_IP"),
        ("MONGODB_URI", "MONGODB_HOST"),
        ("MONGO_URL", "MONGODB_HOST"),
    ],
)
def test_a_misspelled_name_in_the_file_is_warned_of_with_the_nearest(
    write: WriteFile, wrong: str, meant: str
) -> None:
    """The warning names the file, what stands there, and what was meant; the value stays unsaid."""
    file = write(f"{wrong}={SECRET}\n")
    (warning,) = load({}, file).warnings
    assert re.search(rf"\b{wrong}\b.*\b{meant}\?", warning)
    assert str(file) in warning
    assert SECRET not in warning


def test_a_misspelled_name_is_said_with_the_faults_that_follow_from_it(write: WriteFile) -> None:
    """What is missing is missing because of it."""
    file = write("INFOWAY_APIKEY=x\n")
    with pytest.raises(SettingsError) as caught:
        stockrt.load_settings({}, file, (), is_root=False, needs=stockrt.Needs(key=True))
    missing, misspelled = caught.value.faults
    assert missing.startswith("INFOWAY_API_KEY is not set")
    assert "INFOWAY_APIKEY is no setting" in misspelled and "did you mean INFOWAY_API_KEY?" in misspelled


def test_names_of_others_are_no_concern_of_ours(write: WriteFile) -> None:
    """Only our prefixes, only in the file; but a name that no environment can have is nobody's."""
    file = write("PATH=/bin\nCOMPOSE_PROJECT_NAME=x\nMYSERVER_IP=x\nhttp_proxy=\n")
    assert load({"SERVER_SOFTWARE": "x", "MONGODB_HSOT": "x"}, file).warnings == ()
    file.write_text("中文=1\n", encoding="utf-8")
    assert load({}, file).warnings == (f"{file}: 中文 is no setting and has no effect",)


# ------------------------------------------------------------------------------------------------------
# What each may be
# ------------------------------------------------------------------------------------------------------

GOOD: list[tuple[str, str, object]] = [
    ("INFOWAY_API_KEY", "abc", ("abc",)),
    ("INFOWAY_API_KEY", " abc , def,abc", ("abc", "def")),
    ("INFOWAY_API_KEY", "p$w#x'\"=%", ("p$w#x'\"=%",)),
    ("INFOWAY_API_BASE_URL", "http://127.0.0.1:8080", "http://127.0.0.1:8080"),
    ("INFOWAY_API_BASE_URL", "https://[::1]:8443/", "https://[::1]:8443"),
    ("INFOWAY_API_BASE_URL", "https://proxy.example.com/infoway/", "https://proxy.example.com/infoway"),
    ("INFOWAY_PLAN", "free", (PLANS["free"],)),
    ("INFOWAY_PLAN", "Auto", (PLAN_TO_ASK,)),
    ("INFOWAY_PLAN", "Basic", (PLANS["basic"],)),
    ("INFOWAY_PLAN", "PREMIUM", (PLANS["premium"],)),
    ("INFOWAY_PLAN", "pro", (PLANS["pro"],)),
    ("INFOWAY_PLAN", "0", (Plan("0", 0, 0),)),
    ("INFOWAY_PLAN", "5", (Plan("5", 5, 300),)),
    ("INFOWAY_PLAN", "2.5", (Plan("2.5", 2.5, 150),)),
    ("INFOWAY_PLAN", "0.2", (Plan("0.2", 0.2, 12),)),
    ("INFOWAY_PLAN", ".2", (Plan(".2", 0.2, 12),)),
    ("INFOWAY_PLAN", "0.017", (Plan("0.017", 0.017, 1),)),
    ("INFOWAY_PLAN", "4.1", (Plan("4.1", 4.1, 246),)),
    ("MONGODB_HOST", "mongodb://localhost", "mongodb://localhost"),
    ("MONGODB_HOST", "mongodb://u:p%40w@h:27017/db?authSource=admin", ...),
    ("MONGODB_HOST", "mongodb://a:27017,b:27018,c/?replicaSet=rs0&w=majority", ...),
    ("MONGODB_HOST", "mongodb://[::1]:27017", ...),
    ("MONGODB_HOST", "mongodb://u:p@[fe80::1],[::1]:27018/?w=1", ...),
    ("MONGODB_HOST", "mongodb+srv://u:p@cluster0.example.com/?retryWrites=true", ...),
    ("MONGODB_HOST", "mongodb://h/?wTimeoutMS=0&w=2", ...),
    ("MONGODB_HOST", "mongodb://u:%3Fw=0%26w%3D0%26@h/?w=1", ...),
    ("MONGODB_DB_NAME", "行情", "行情"),
    ("MONGODB_DB_NAME", "x" * 63, "x" * 63),
    ("MONGODB_REALTIME_COLLECTION_NAME", "a.b-c", "a.b-c"),
    ("MONGODB_CLOSE_COLLECTION_NAME", "x" * 120, "x" * 120),
    ("MONGODB_LICENSE_COLLECTION_NAME", "x" * 120, "x" * 120),
    ("MONGODB_WATCH_COLLECTION_NAME", "watch.list", "watch.list"),
    ("MONGODB_GAP_COLLECTION_NAME", "gaps", "gaps"),
    ("INFOWAY_STREAM_URL", "ws://127.0.0.1:8766", "ws://127.0.0.1:8766"),
    ("INFOWAY_STREAM_URL", "wss://proxy.example.com/infoway/ws", "wss://proxy.example.com/infoway/ws"),
    ("COLLECT", "Stream", "stream"),
    ("COLLECT_EVERY", "1", 1.0),
    ("COLLECT_EVERY", "2.5", 2.5),
    ("COLLECT_EVERY", "86400", 86400.0),
    ("COLLECT_CODES", "AAPL.US，700.HK\n茅台", ...),
    ("COLLECT_CODES", "@my codes.txt", ...),
    ("COLLECT_CODES", "@/etc/stockrt/codes", ...),
    ("COLLECT_CODES", "Watch", "watch"),
    ("COLLECT_SHARE", "1/3", (1, 3)),
    ("COLLECT_SHARE", "2 / 2", (2, 2)),
    ("COLLECT_SHARE", "100/100", (100, 100)),
    ("KEEP_DAYS", "1", 1),
    ("KEEP_DAYS", "36500", 36500),
    ("MONGODB_NUMERIC_TYPE", "Decimal", "decimal"),
    ("MONGODB_NUMERIC_TYPE", "double", "double"),
    ("SERVER_IP", "10.0.0.5", "10.0.0.5"),
    ("SERVER_IP", "platform.example.com", "platform.example.com"),
    ("SERVER_IP", "platform", "platform"),
    ("SERVER_IP", "::1", "::1"),
    ("SERVER_IP", "[2001:DB8::1]", "2001:db8::1"),
    ("SERVER_PORT", "1", 1),
    ("SERVER_PORT", "65535", 65535),
    ("SERVER_TLS", "1", True),
    ("SERVER_TLS", "0", False),
    ("SERVER_TLS", "True", True),
    ("HEARTBEAT_INTERVAL", "1", 1.0),
    ("HEARTBEAT_INTERVAL", "2.5", 2.5),
    ("HEARTBEAT_INTERVAL", "3600", 3600.0),
    ("MODULE_NAME", "x" * 100, "x" * 100),
    ("MODULE_DESCRIPTION", "两 个 词", "两 个 词"),
    ("STATE_DIRECTORY", "/srv/with blank", Path("/srv/with blank")),
    ("STATE_DIRECTORY", "/run/one:/run/two", Path("/run/one")),
    ("SPOOL_MAX_MB", "10", 10 << 20),
    ("SPOOL_MAX_MB", "1", 1 << 20),
    ("HTTPS_PROXY", "http://h:3128", Proxy("HTTPS_PROXY", "http", "h", 3128)),
    ("HTTPS_PROXY", "https://h", Proxy("HTTPS_PROXY", "https", "h", 443)),
    ("HTTP_PROXY", "10.0.0.1", Proxy("HTTP_PROXY", "http", "10.0.0.1", 1080)),
    ("HTTP_PROXY", "u%40:p:@[::1]:8080/", Proxy("HTTP_PROXY", "http", "::1", 8080, "u%40", "p:")),
    ("ALL_PROXY", "HTTP://u@proxy.example:1", Proxy("ALL_PROXY", "http", "proxy.example", 1, "u")),
    ("NO_PROXY", "*", ("*",)),
    ("NO_PROXY", " .Example.com,10.0.0.0/8 ,[::1]:80", (".example.com", "10.0.0.0/8", "[::1]:80")),
    ("METRICS_FILE", "/var/lib/x/stockrt.prom", Path("/var/lib/x/stockrt.prom")),
    ("LOG_LEVEL", "DEBUG", "debug"),
    ("LOG_LEVEL", "warning", "warning"),
    ("LOG_LEVEL", "error", "error"),
    ("STOCKRT_LANG", "ZH", "zh"),
    ("STOCKRT_LANG", "en", "en"),
    ("MESSAGE_LANG", "en", "en"),
    ("MESSAGE_LANG", "zh", "zh"),
]

BAD: list[tuple[str, str]] = [
    ("INFOWAY_API_KEY", "one,,two"),
    ("INFOWAY_API_KEY", ","),
    ("INFOWAY_API_KEY", "with blank"),
    ("INFOWAY_API_KEY", "line\nbreak"),
    ("INFOWAY_API_KEY", "密钥"),
    ("INFOWAY_API_BASE_URL", "data.infoway.io"),
    ("INFOWAY_API_BASE_URL", "ftp://data.infoway.io"),
    ("INFOWAY_API_BASE_URL", "https://"),
    ("INFOWAY_API_BASE_URL", "https://h:99999"),
    ("INFOWAY_API_BASE_URL", "https://h:x"),
    ("INFOWAY_API_BASE_URL", "https://[::1"),
    ("INFOWAY_API_BASE_URL", "https://u:p@h"),
    ("INFOWAY_API_BASE_URL", "https://h/?q"),
    ("INFOWAY_API_BASE_URL", "https://h/#f"),
    ("INFOWAY_API_BASE_URL", "https://h/a b"),
    ("INFOWAY_API_BASE_URL", "https://data..infoway.io"),
    ("INFOWAY_API_BASE_URL", f"https://{'h' * 64}.infoway.io"),
    ("INFOWAY_PLAN", "gold"),
    ("INFOWAY_PLAN", "-1"),
    ("INFOWAY_PLAN", "nan"),
    ("INFOWAY_PLAN", "inf"),
    ("INFOWAY_PLAN", "free,gold"),
    ("INFOWAY_PLAN", "0.0001"),
    ("INFOWAY_PLAN", "0.0166"),
    ("INFOWAY_PLAN", "1_0"),
    ("INFOWAY_PLAN", "1e1"),
    ("INFOWAY_PLAN", "free,1_0"),
    ("HEARTBEAT_INTERVAL", "1_0"),
    ("HEARTBEAT_INTERVAL", "1e1"),
    ("SERVER_PORT", "8_0"),
    ("SPOOL_MAX_MB", "1_0"),
    ("MONGODB_HOST", "mongodb://"),
    ("MONGODB_HOST", "mongodb://u:p@"),
    ("MONGODB_HOST", "mongodb://a,,b"),
    ("MONGODB_HOST", "mongodb://::1"),
    ("MONGODB_HOST", "mongodb://h/replicaSet=rs0"),
    ("MONGODB_DB_NAME", "a.b"),
    ("MONGODB_DB_NAME", "a b"),
    ("MONGODB_DB_NAME", "a\tb"),
    ("MONGODB_DB_NAME", "a/b"),
    ("MONGODB_DB_NAME", "a$b"),
    ("MONGODB_DB_NAME", "é" * 32),
    ("MONGODB_REALTIME_COLLECTION_NAME", "a$b"),
    ("MONGODB_REALTIME_COLLECTION_NAME", "system.users"),
    ("MONGODB_REALTIME_COLLECTION_NAME", ".realtime"),
    ("MONGODB_CLOSE_COLLECTION_NAME", "close."),
    ("MONGODB_LICENSE_COLLECTION_NAME", "a..b"),
    ("MONGODB_CLOSE_COLLECTION_NAME", "x" * 121),
    ("MONGODB_LICENSE_COLLECTION_NAME", "x" * 121),
    ("MONGODB_WATCH_COLLECTION_NAME", "a$b"),
    ("MONGODB_GAP_COLLECTION_NAME", "system.gaps"),
    ("INFOWAY_STREAM_URL", "https://data.infoway.io/ws"),
    ("INFOWAY_STREAM_URL", "wss://data.infoway.io/ws?business=stock"),
    ("INFOWAY_STREAM_URL", "wss://u:p@data.infoway.io/ws"),
    ("INFOWAY_STREAM_URL", "data.infoway.io/ws"),
    ("COLLECT", "poll"),
    ("COLLECT", "1"),
    ("COLLECT_EVERY", "0"),
    ("COLLECT_EVERY", "0.9"),
    ("COLLECT_EVERY", "86401"),
    ("COLLECT_EVERY", "10s"),
    ("COLLECT_CODES", "@"),
    ("COLLECT_CODES", ",;"),
    ("COLLECT_CODES", "AAPL.US\0"),
    ("COLLECT_SHARE", "0/3"),
    ("COLLECT_SHARE", "4/3"),
    ("COLLECT_SHARE", "1/101"),
    ("COLLECT_SHARE", "1"),
    ("COLLECT_SHARE", "1/0"),
    ("KEEP_DAYS", "0"),
    ("KEEP_DAYS", "1.5"),
    ("KEEP_DAYS", "36501"),
    ("KEEP_DAYS", "-1"),
    ("MONGODB_NUMERIC_TYPE", "float"),
    ("SERVER_IP", "http://platform"),
    ("SERVER_IP", "platform:8080"),
    ("SERVER_IP", "10.0.0"),
    ("SERVER_IP", "10.0.0.256"),
    ("SERVER_IP", f"{'h' * 64}.example.com"),
    ("SERVER_IP", "a/b"),
    ("SERVER_IP", "a..b"),
    ("SERVER_IP", "-a"),
    ("SERVER_IP", "x" * 254),
    ("SERVER_PORT", "0"),
    ("SERVER_PORT", "65536"),
    ("SERVER_PORT", "+80"),
    ("SERVER_PORT", "8080/tcp"),
    ("SERVER_PORT", "9" * 5000),
    ("SERVER_TLS", "2"),
    ("SERVER_TLS", "https"),
    ("HEARTBEAT_INTERVAL", "0"),
    ("HEARTBEAT_INTERVAL", "0.5"),
    ("HEARTBEAT_INTERVAL", "3601"),
    ("HEARTBEAT_INTERVAL", "nan"),
    ("HEARTBEAT_INTERVAL", "10s"),
    ("MODULE_NAME", "x" * 101),
    ("MODULE_NAME", "two\nlines"),
    ("MODULE_NAME", "not \udcff UTF-8"),
    ("MODULE_DESCRIPTION", "x" * 501),
    ("STATE_DIRECTORY", "relative/path"),
    ("STATE_DIRECTORY", "~/state"),
    ("STATE_DIRECTORY", "/nul\0byte"),
    ("SPOOL_MAX_MB", "0"),
    ("SPOOL_MAX_MB", "1.5"),
    ("SPOOL_MAX_MB", "-1"),
    ("SPOOL_MAX_MB", "1 GB"),
    ("HTTPS_PROXY", "ftp://h:1"),
    ("HTTPS_PROXY", "http://"),
    ("HTTPS_PROXY", "http://h:0"),
    ("HTTPS_PROXY", "http://u:p@ss/w@h:1"),
    ("HTTP_PROXY", "h:99999"),
    ("HTTP_PROXY", "http://h/path"),
    ("ALL_PROXY", "http://10.0.0.256"),
    ("ALL_PROXY", "http://h:1?x"),
    ("NO_PROXY", "http://platform"),
    ("NO_PROXY", "a.example, 10.0.0.0/33"),
    ("METRICS_FILE", "stockrt.prom"),
    ("METRICS_FILE", "/var/lib/x/stockrt.txt"),
    ("METRICS_FILE", "/var/lib/x/"),
    ("METRICS_FILE", "/var/lib/\0/x.prom"),
    ("MODULE_NAME", "a\0b"),
    ("MONGODB_HOST", "mongodb://a\0b"),
    ("MONGODB_HOST", "mongodb://" + "a" * 64 + ".example"),
    ("MONGODB_HOST", "mongodb://a..b"),
    ("MONGODB_HOST", "mongodb+srv://a..b.example"),
    ("LOG_LEVEL", "verbose"),
    ("STOCKRT_LANG", "fr"),
    ("STOCKRT_LANG", "zh_CN.UTF-8"),
    ("MESSAGE_LANG", "Chinese"),
]


# What is said in place of all that a setting may be, where it can be told what is wrong.
EXACTLY = {
    "scheme": ["localhost:27017", "http://localhost", "u:p@h", "mongodb3://h", "MONGODB://h"],
    "port": ["mongodb://h:0", "mongodb://h:99999", "mongodb://a,b:x", "mongodb://h:", "mongodb://u:p@h:８０"],
    "user": ["mongodb://u:p@ss@h", "mongodb://u:p:ss@h", "mongodb://u:p/ss@h", "mongodb://u:123/ss@h"],
    "w": ["mongodb://h/?w=0", "mongodb://h?w=0", "mongodb://h/?w=0;journal=false", "mongodb+srv://h/?w=0"],
    "srv": [
        "mongodb+srv://a.b.c:27017",
        "mongodb+srv://127.0.0.1",
        "mongodb+srv://[::1]",
        "mongodb+srv://a.b,c.d",
    ],
}
# What was typed with a Chinese keyboard: which of it is named.
WIDE = [
    ("INFOWAY_API_KEY", "k１，k2", ",", "，"),
    ("INFOWAY_API_KEY", "“k1”", '" "', "“ ”"),
    ("INFOWAY_API_BASE_URL", "https：//data.infoway.io", ":", "："),
    ("INFOWAY_PLAN", "pro，basic", ",", "，"),
    ("INFOWAY_PLAN", "１０", "1 0", "１ ０"),
    ("SERVER_IP", "10。0.0.5", ".", "。"),
    ("SERVER_PORT", "８０", "8 0", "８ ０"),
    ("COLLECT_SHARE", "１/３", "1 3", "１ ３"),
    ("LOG_LEVEL", "“debug”", '" "', "“ ”"),
    ("MONGODB_DB_NAME", "“a”", '" "', "“ ”"),
    ("MONGODB_WATCH_COLLECTION_NAME", "“a”", '" "', "“ ”"),
    ("NO_PROXY", "a，b、c", ", ,", "， 、"),
    ("HTTPS_PROXY", "http：//u:密，码@h:1", ":", "："),
    ("MONGODB_HOST", "mongodb：//u:密，码@h", ":", "："),
    ("MONGODB_HOST", "mongodb://127.0.0.1，10.0.0.2", ",", "，"),
    ("MONGODB_HOST", "mongodb://h：27017", ":", "："),
]


@pytest.mark.parametrize(("name", "text", "narrow", "wide"), WIDE)
def test_what_is_full_width_and_must_not_be_is_named(name: str, text: str, narrow: str, wide: str) -> None:
    (fault,) = faults_of({name: text})
    assert fault.endswith(f" (environment): expected {narrow} in place of the full-width {wide}")
    assert in_language(fault, "zh").endswith(f"（环境变量）：应将全角字符（{wide}）改为半角（{narrow}）")


@pytest.mark.parametrize("kind", EXACTLY)
def test_of_a_mongodb_string_it_is_said_what_is_wrong(kind: str) -> None:
    for text in EXACTLY[kind]:
        (fault,) = faults_of({"MONGODB_HOST": text})
        assert fault.endswith(f": {stockrt.phrase(f'settings.expect.mongodb_{kind}')}"), text


def test_every_setting_has_good_and_bad_values_here() -> None:
    """A new setting comes with its tests."""
    assert {name for name, _, _ in GOOD} == set(NAMES) == {name for name, _ in BAD}


@each(("name", "text", "expected"), GOOD)
def test_a_good_value_is_taken(name: str, text: str, expected: object) -> None:
    """Dots stand for the text itself."""
    assert value_of(load({name: text}).settings, name) == (text if expected is ... else expected)


@each(("name", "text"), BAD)
def test_a_bad_value_is_a_fault_that_says_what_is_expected(name: str, text: str) -> None:
    """Name, place and expectation, on one line that a terminal shows as it is."""
    (fault,) = faults_of({name: text})
    assert fault.startswith(f"{name}=")
    assert "(environment)" in fault
    assert fault.endswith(next(s.expected for s in SETTINGS if s.name == name))
    assert fault.isprintable()
    assert len(fault) < 400


@each(("name", "text"), BAD)
def test_a_bad_value_is_a_fault_in_chinese_too(name: str, text: str) -> None:
    """With the same name and value, and without a word of English that is not the value's."""
    (fault,) = faults_of({name: text})
    shown = fault.partition(" (environment): ")[0].partition("=")[2].strip("'")
    assert in_chinese(fault, shown).startswith(f"{name}=“{shown}”（环境变量）：应")


def test_a_fault_in_what_the_unit_sets_is_not_looked_for_in_the_shell() -> None:
    """Its EnvironmentFile= has become the environment by then."""
    (fault,) = faults_of({"LOG_LEVEL": "verbose", "INVOCATION_ID": "1", "STATE_DIRECTORY": "/tmp"})
    assert fault.startswith("LOG_LEVEL='verbose' (environment, which stockrt.service sets): expected ")


def test_a_fault_shows_what_came() -> None:
    """What is no secret is quoted."""
    assert faults_of({"LOG_LEVEL": "verbose"}) == (
        "LOG_LEVEL='verbose' (environment): expected debug, info, warning or error",
    )


def test_a_fault_in_chinese_is_one_sentence() -> None:
    (fault,) = faults_of({"STOCKRT_LANG": "fr"})
    assert in_language(fault, "zh") == "STOCKRT_LANG=“fr”（环境变量）：应为 zh 或 en"
    (fault,) = faults_of({"LOG_LEVEL": "verbose", "INVOCATION_ID": "1", "STATE_DIRECTORY": "/tmp"})
    assert in_language(fault, "zh") == (
        "LOG_LEVEL=“verbose”（由 stockrt.service 设置的环境变量）：应为 debug、info、warning 或 error"
    )


def test_every_other_fault_and_warning_is_in_chinese_too(write: WriteFile) -> None:
    """Of lines, files, paths, options, and of settings that do not go together or are missing."""
    file = write('broken line\nMODULE_NAME="a\\nb"\nSERVER_PRT=1\n')
    of_file = f"tlsCAFile=/nowhere&tlsCertificateKeyFile={file}"
    environ = {
        "MONGODB_HOST": f"mongodb://h/a.b?noSuchOption=1&maxPoolsize=x&{of_file}&authMechanismProperties=x",
        "MONGODB_CLOSE_COLLECTION_NAME": "realtime",
        "INFOWAY_PLAN": "pro,pro,pro",
        "HTTPS_PROXY": "socks5://h:1",
        "COLLECT": "stream",
        "COLLECT_EVERY": "10",
        "SERVER_IP": "h",
        "SSL_CERT_FILE": "/nowhere",
        "METRICS_FILE": "/nowhere/x.prom",
    }
    needs = stockrt.Needs(key=True, platform=True, whole_platform=True, paths=True, collect=True)
    with pytest.raises(SettingsError) as caught:
        stockrt.load_settings(environ, file, (), is_root=False, needs=needs)
    chinese = [in_chinese(fault) for fault in caught.value.faults]
    assert len(chinese) == 19
    assert any(fault.endswith("：无法读取该文件：不是 PEM 格式，或密码不符") for fault in chinese)
    assert f"{file}：SERVER_PRT 不是有效的设置，不起作用；是不是 SERVER_PORT？" in chinese
    assert in_language(caught.value.message, "zh").splitlines() == chinese


def test_all_faults_are_reported_at_once(write: WriteFile) -> None:
    """One start of the program is enough to find them all; each names where it comes from."""
    bad = dict(BAD)
    from_file = {name: bad.pop(name) for name in ("LOG_LEVEL", "SERVER_PORT", "MODULE_NAME")}
    from_file["MODULE_NAME"] = "x" * 101
    file = write("".join(f"{name}={text}\n" for name, text in from_file.items()))
    faults = faults_of(bad, file)
    assert {fault.partition("=")[0] for fault in faults} == set(NAMES)
    assert len(faults) == len(NAMES)
    assert sum(f"({file})" in fault for fault in faults) == 3
    assert sum("(environment)" in fault for fault in faults) == len(NAMES) - 3


def test_a_broken_line_does_not_hide_the_other_faults(write: WriteFile) -> None:
    """Those of the same file and of the environment are reported with it."""
    file = write("LOG_LEVEL=verbose\nbroken line\n")
    faults = faults_of({"SERVER_PORT": "0"}, file)
    assert len(faults) == 3
    assert all(any(part in fault for fault in faults) for part in ("line 2", "LOG_LEVEL", "SERVER_PORT"))


def test_faults_end_with_the_status_78() -> None:
    """EX_CONFIG of sysexits.h; each fault has a line of its own."""
    with pytest.raises(SettingsError) as caught:
        load({"LOG_LEVEL": "verbose", "SERVER_PORT": "0"})
    assert caught.value.exit_code == 78
    assert str(caught.value).splitlines() == list(caught.value.faults)


@each(
    "environ",
    [
        {"MONGODB_REALTIME_COLLECTION_NAME": "close"},
        {"MONGODB_CLOSE_COLLECTION_NAME": "realtime"},
        {"MONGODB_COLLECTION_NAME": "x", "MONGODB_CLOSE_COLLECTION_NAME": "x"},
    ],
)
def test_the_two_collections_must_differ(environ: dict[str, str]) -> None:
    """Closing prices and latest trades never share a collection."""
    (fault,) = faults_of(environ)
    assert "MONGODB_CLOSE_COLLECTION_NAME" in fault
    assert "MONGODB_REALTIME_COLLECTION_NAME" in fault


@each("name", ["MONGODB_WATCH_COLLECTION_NAME", "MONGODB_GAP_COLLECTION_NAME"])
@each("other", ["realtime", "close", "license_usage"])
def test_watch_list_and_gaps_have_collections_of_their_own(name: str, other: str) -> None:
    (fault,) = faults_of({name: other})
    assert fault.startswith(f"{name}='{other}': expected another name than MONGODB_")


# ------------------------------------------------------------------------------------------------------
# What collecting by itself needs
# ------------------------------------------------------------------------------------------------------

KEY = {"INFOWAY_API_KEY": SECRET}
PLATFORM = {"SERVER_IP": "127.0.0.1", "SERVER_PORT": "80"}


def needs(environ: Mapping[str, str]) -> str:
    """Return what the daemon misses, '' where it may start."""
    try:
        stockrt.load_settings(environ, None, (), is_root=False, needs=stockrt.DAEMON_NEEDS)
    except SettingsError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("how", [{"COLLECT": "stream"}, {"COLLECT_EVERY": "10"}], ids=["stream", "poll"])
def test_a_daemon_that_collects_needs_no_platform(how: dict[str, str]) -> None:
    """It needs a key and codes; half a platform is a mistake as ever."""
    good = KEY | how | {"COLLECT_CODES": "AAPL.US"}
    (name,) = how
    assert needs(good) == ""
    assert needs(good | PLATFORM) == ""
    assert needs(good | {"SERVER_IP": "127.0.0.1"}).startswith("SERVER_PORT not set: expected host and port ")
    assert needs(good | {"INFOWAY_API_KEY": ""}).startswith("INFOWAY_API_KEY is not set: ")
    fault = needs(good | {"COLLECT_CODES": ""})
    assert fault.startswith(
        f"COLLECT_CODES is not set, and {name} would collect nothing: expected codes such as "
    )


def test_a_daemon_without_a_platform_and_with_nothing_to_collect_is_told_of_both_ways() -> None:
    """A list of codes alone is what commands of a platform mean that name none."""
    fault = needs(KEY | {"COLLECT_CODES": "AAPL.US"})
    assert fault.startswith("SERVER_IP and SERVER_PORT not set: ")
    assert "COLLECT=stream or COLLECT_EVERY, and COLLECT_CODES" in fault
    assert needs(KEY | PLATFORM | {"COLLECT_CODES": "AAPL.US", "COLLECT_SHARE": "1/3"}) == ""
    assert needs(KEY | PLATFORM | {"COLLECT_SHARE": "1/3"}) == ""


def test_of_stream_and_poll_one_is_chosen() -> None:
    fault = needs(KEY | {"COLLECT": "stream", "COLLECT_EVERY": "10", "COLLECT_CODES": "AAPL.US"})
    assert fault.startswith("COLLECT and COLLECT_EVERY are both set: choose one, ")


def test_a_watch_list_is_in_mongodb() -> None:
    watch = KEY | PLATFORM | {"COLLECT_CODES": "watch"}
    assert needs(watch | {"MONGODB_HOST": "mongodb://127.0.0.1"}) == ""
    assert needs(watch).startswith("COLLECT_CODES=watch without MONGODB_HOST: the watch list is ")
    assert load(watch).settings.collect_codes == "watch"  # --status and others need it not


@each(
    ("environ", "expected"),
    [
        ({}, ""),
        ({"SERVER_IP": "h"}, ""),
        ({"SERVER_PORT": "80"}, ""),
        ({"SERVER_IP": "h", "SERVER_PORT": "80"}, "http://h:80"),
        ({"SERVER_IP": "h", "SERVER_PORT": "443", "SERVER_TLS": "1"}, "https://h:443"),
        ({"SERVER_IP": "::1", "SERVER_PORT": "80"}, "http://[::1]:80"),
        ({"SERVER_IP": "[::1]", "SERVER_PORT": "80"}, "http://[::1]:80"),
    ],
)
def test_the_platform_url_is_made_of_its_settings(environ: dict[str, str], expected: str) -> None:
    """An IPv6 address stands in brackets; without host or port there is no URL."""
    assert load(environ).settings.platform_url() == expected


# ------------------------------------------------------------------------------------------------------
# The state directory
# ------------------------------------------------------------------------------------------------------


@each(
    ("environ", "is_root", "expected"),
    [
        ({"HOME": "/root", "XDG_STATE_HOME": "/x"}, True, "/var/lib/stockrt"),
        ({"HOME": "/home/u"}, False, "/home/u/.local/state/stockrt"),
        ({"HOME": "/home/u", "XDG_STATE_HOME": "/x"}, False, "/x/stockrt"),
        ({"HOME": "/home/u", "XDG_STATE_HOME": ""}, False, "/home/u/.local/state/stockrt"),
        ({"HOME": "/home/u", "XDG_STATE_HOME": "not/absolute"}, False, "/home/u/.local/state/stockrt"),
        ({"STATE_DIRECTORY": "/srv/s", "XDG_STATE_HOME": "/x"}, False, "/srv/s"),
        ({"STATE_DIRECTORY": "/srv/s"}, True, "/srv/s"),
        ({"STATE_DIRECTORY": "", "HOME": "/home/u"}, False, "/home/u/.local/state/stockrt"),
        ({}, False, "/.local/state/stockrt"),
    ],
)
def test_the_state_directory_is_found_without_being_set(
    environ: dict[str, str], is_root: bool, expected: str
) -> None:
    """STATE_DIRECTORY, else /var/lib for root, else the XDG place, which counts when it is absolute."""
    loaded = stockrt.load_settings(environ, None, (), is_root=is_root)
    assert loaded.settings.state_directory == Path(expected)


def test_loading_makes_no_directory(tmp_path: Path) -> None:
    """Reading settings leaves no trace; the store makes what it needs."""
    load({"STATE_DIRECTORY": str(tmp_path / "state")})
    assert not (tmp_path / "state").exists()


# ------------------------------------------------------------------------------------------------------
# Secrets
# ------------------------------------------------------------------------------------------------------


@each(
    ("name", "text"),
    [
        ("INFOWAY_API_KEY", f"{SECRET},with blank"),
        ("INFOWAY_API_KEY", f"{SECRET}密"),
        ("MONGODB_HOST", f"mongodb://u:{SECRET}@h:99999"),
        ("MONGODB_HOST", f"mongodb://u:p@{SECRET}@h"),
        ("MONGODB_HOST", f"mongodb://u:p/{SECRET}@h:x:y"),
        ("MONGODB_HOST", f"mongodb://u:{SECRET}@h/?w=0"),
        ("MONGODB_HOST", f"MONGODB://u:{SECRET}@h:99999"),
        ("MONGODB_HOST", f"u:{SECRET}@h:27017"),
        ("MONGODB_HOST", f"mongodb3://u:{SECRET}@h"),
        ("MONGODB_HOST", f"'mongodb://u:{SECRET}@h"),
        ("MONGODB_HOST", f"mongodb:/u:{SECRET}@h"),
        ("MONGODB_HOST", f"mongodb://u:p\n{SECRET}@h:99999"),
        ("MONGODB_HOST", f"mongodb://u:{SECRET}"),
        ("MONGODB_HOST", f"mongodb://u:p@h/?w=0&tlsCertificateKeyFilePassword={SECRET}"),
        ("MONGODB_HOST", f"mongodb://u:p@h/?w=0&authMechanismProperties=AWS_SESSION_TOKEN:{SECRET}"),
        ("INFOWAY_API_BASE_URL", f"https://u:{SECRET}@data.infoway.io"),
    ],
)
def test_no_fault_shows_a_secret(name: str, text: str) -> None:
    """However the value is broken."""
    faults = faults_of({name: text})
    assert faults
    assert SECRET not in "\n".join(faults)


def secret_settings() -> LoadedSettings:
    """Return settings that hold each kind of secret."""
    uri = "mongodb://user:p%40ss%2Fword@db1:27017,db2/?replicaSet=rs0"
    return load({"INFOWAY_API_KEY": "key-one-1111,key-two-2222", "MONGODB_HOST": uri})


SECRETS = ["key-one-1111", "key-two-2222", "p%40ss%2Fword", "p@ss/word"]


@each("secret", SECRETS)
def test_redact_takes_every_secret_out(secret: str) -> None:
    """API keys, and the password of the URI both as it is written and as it is meant."""
    settings = secret_settings().settings
    assert settings.redact(f"before {secret} after, {secret}") == "before *** after, ***"


def test_redact_takes_the_whole_uri_out() -> None:
    """A library's message may quote it."""
    settings = secret_settings().settings
    redacted = settings.redact(f"cannot parse {settings.mongodb_uri!r}")
    assert not any(secret in redacted for secret in [*SECRETS, "user"])


def test_redact_leaves_ordinary_words_alone() -> None:
    """Nothing is masked where no secret is, least of all by an empty one."""
    assert load().settings.redact("a b c") == "a b c"
    assert load({"MONGODB_HOST": "mongodb://u:a@h"}).settings.redact("a banana") == "a banana"


def test_redact_leaves_no_part_of_a_secret_that_holds_another() -> None:
    """The longest goes first."""
    settings = load({"INFOWAY_API_KEY": "abcd,abcd-efgh"}).settings
    assert settings.redact("abcd-efgh abcd") == "*** ***"


@each("secret", [*SECRETS, "user:"])
def test_the_printed_settings_hold_no_secret(secret: str) -> None:
    """A traceback or a debug line may print them."""
    loaded = secret_settings()
    assert secret not in f"{loaded} {loaded.settings!r} {loaded.settings.mongodb_shown()}"


def test_the_mongodb_string_is_shown_without_its_user() -> None:
    """Hosts and options help the operator; so they stay."""
    shown = secret_settings().settings.mongodb_shown()
    assert shown == "mongodb://***@db1:27017,db2/?replicaSet=rs0"


@hypothesis.given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=4))
def test_any_percent_encoded_password_is_taken_and_never_shown(password: str) -> None:
    """Whatever it holds, both of its forms are masked."""
    encoded = quote(password, safe="")
    settings = load({"MONGODB_HOST": f"mongodb://u:{encoded}@h"}).settings
    assert settings.redact(f"<{encoded}>") == "<***>"
    assert settings.redact(f"<{password}>") == "<***>"


# ------------------------------------------------------------------------------------------------------
# stockrt.env.example
# ------------------------------------------------------------------------------------------------------

ENTRY = re.compile(r"^#?([A-Z_]+)=(.*)$", re.MULTILINE)


def test_the_example_names_exactly_the_settings_in_their_order() -> None:
    """None is missing, none is made up."""
    assert [name for name, _ in ENTRY.findall(EXAMPLE.read_text("utf-8"))] == NAMES


def test_the_example_loads_without_fault_and_warning() -> None:
    """Copied as it is, it changes nothing."""
    assert load({}, EXAMPLE).settings == load().settings
    assert load({}, EXAMPLE).warnings == ()


def test_every_line_of_the_example_is_valid_once_its_hash_is_off(write: WriteFile) -> None:
    """What it shows can be typed; where there is a default, it shows the default."""
    shown = write(ENTRY.sub(r"\1=\2", EXAMPLE.read_text("utf-8")))
    settings, warnings, *_ = load({}, shown)
    assert warnings == ()
    assert stockrt.read_env_file(shown).keys() == set(NAMES)
    for setting in SETTINGS:
        if setting.default:
            assert value_of(settings, setting.name) == value_of(load().settings, setting.name)


def test_every_setting_of_the_example_is_explained_in_english_and_chinese() -> None:
    """The comment above each has both."""
    comments = re.split(ENTRY.pattern, EXAMPLE.read_text("utf-8"), flags=re.MULTILINE)[:-1:3]
    for name, comment in zip(NAMES, comments, strict=True):
        block = comment.rstrip().rpartition("\n\n")[2]
        assert re.search(r"^# [A-Za-z0-9]", block, re.MULTILINE), name
        assert re.search(r"^# .*[一-龥]{2}", block, re.MULTILINE), name
        assert block.count("(example)") == block.count("（示例）"), name


@pytest.mark.parametrize("old_name", [setting.old_name for setting in SETTINGS if setting.old_name])
def test_the_example_mentions_old_names(old_name: str) -> None:
    """Whoever has an old file finds what became of them."""
    assert old_name in EXAMPLE.read_text("utf-8")


# ------------------------------------------------------------------------------------------------------
# The installed unit
# ------------------------------------------------------------------------------------------------------


def parse(text: str) -> stockrt.Unit:
    return stockrt.parse_unit(text)


def test_the_unit_that_is_installed_is_understood() -> None:
    unit = parse((EXAMPLE.parent / "stockrt.service").read_text())
    names = {setting.name for setting in SETTINGS if setting.secret and not setting.in_small_letters}
    folder = Path("/etc/stockrt/credentials")
    assert unit.credentials == {name: folder / name.lower() for name in names}
    assert unit.variables == {
        "SHIV_ROOT": "%C/stockrt",
        "MALLOC_ARENA_MAX": "1",
        "PYTHONOPTIMIZE": "2",
        "PYTHONNODEBUGRANGES": "1",
    }
    assert (unit.state_directory, unit.unseen) == (Path("/var/lib/stockrt"), [])


def test_drop_ins_of_the_unit_add_and_take_back(tmp_path: Path) -> None:
    first, second = tmp_path / "a.env", tmp_path / "b.env"
    first.touch()
    second.touch()
    unit = parse(
        "# /etc/systemd/system/stockrt.service\n[Service]\n#Environment=A=comment\n;Environment=A=comment\n"
        'Environment=A=1 "B=two words" \\\n  \'C=3\'\nEnvironment=D=never ended"\nEnvironment=A=2\n'
        "EnvironmentFile=/etc/taken-back\nStateDirectory=other:alias more\n"
        "LoadCredential=infoway_api_key:/etc/old\n"
        "# /etc/systemd/system/stockrt.service.d/x.conf\n[Service]\nEnvironmentFile=\n"
        f"EnvironmentFile={tmp_path}/*.env\n"
        "EnvironmentFile=-/missing/it/may/be\nEnvironmentFile=/missing/and/a/fault\n"
        "LoadCredential=infoway_api_key:/etc/new\nLoadCredential=mongodb_host:from-a-store\n"
        "LoadCredentialEncrypted=http_proxy:/etc/encrypted\n"
    )
    assert unit.variables == {"A": "2", "B": "two words", "C": "3"}
    assert unit.files == [first, second, Path("/missing/and/a/fault")]
    assert unit.credentials == {"INFOWAY_API_KEY": Path("/etc/new")}
    assert unit.unseen == ["mongodb_host", "http_proxy"]
    assert unit.state_directory == Path("/var/lib/other")


def unit_of(tmp_path: Path, key: str = "", file: str = "", variables: str = "") -> stockrt.Unit:
    """A unit with an env file, variables, and an API key in a credential."""
    (tmp_path / "key").write_text(key)
    (tmp_path / "unit.env").write_text(file)
    return parse(
        f"Environment={variables}\nEnvironmentFile={tmp_path}/unit.env\n"
        f"LoadCredential=infoway_api_key:{tmp_path}/key\n"
    )


def test_by_hand_the_sources_of_the_unit_count_in_its_order_and_are_named(tmp_path: Path) -> None:
    """Credentials, then the last env file, then variables; a file that merely lies here does not count."""
    here = tmp_path / "stockrt.env"
    here.write_text("MODULE_NAME=here\n")
    unit = unit_of(tmp_path, "key-of-credential", "INFOWAY_API_KEY=key-of-file\nMODULE_NAME=file\nSERVER_PRT=1\n",
                   "MODULE_NAME=variable SERVER_IP=10.0.0.9")  # fmt: skip
    loaded = stockrt.load_settings({}, None, [here], is_root=True, unit=unit)
    assert loaded.settings.api_keys == ("key-of-credential",)
    assert (loaded.settings.module_name, loaded.settings.server_host) == ("file", "10.0.0.9")
    assert loaded.settings.state_directory == Path("/var/lib/stockrt")
    assert loaded.origins == f"credential {tmp_path}/key, {tmp_path}/unit.env, stockrt.service, defaults"
    assert in_language(loaded.origins, "zh") == (
        f"凭据 {tmp_path}/key、{tmp_path}/unit.env、stockrt.service、默认值"
    )
    assert not loaded.hiding
    assert [warning.partition(";")[0] for warning in loaded.warnings] == [
        f"{here} is left out: the settings are those of stockrt.service",
        f"{tmp_path}/unit.env: SERVER_PRT is no setting and has no effect",
    ]


def test_an_environment_that_the_service_does_not_see_is_named(tmp_path: Path) -> None:
    """It counts, as ever; a credential is stronger, the same value is no other one, how to say it a reader's own."""
    unit = unit_of(tmp_path, "key-of-credential", "SERVER_IP=10.0.0.9\nSERVER_PORT=80\n")
    environ = {"INFOWAY_API_KEY": "x-key", "SERVER_IP": "10.0.0.8", "SERVER_PORT": "80", "LOG_LEVEL": "debug",
               "STOCKRT_LANG": "zh", "https_proxy": "http://10.0.0.1:1"}  # fmt: skip
    loaded = stockrt.load_settings(environ, None, (), is_root=True, unit=unit)
    assert loaded.settings.api_keys == ("key-of-credential",)
    assert (loaded.settings.server_host, loaded.settings.log_level) == ("10.0.0.8", "debug")
    assert loaded.hiding == ("SERVER_IP", "https_proxy")
    (warning,) = (one for one in loaded.warnings if "SERVER_IP, https_proxy: the environment's" in one)
    assert in_language(warning, "zh").startswith("SERVER_IP、https_proxy：此处用的是环境变量的值；")
    assert "环境变量" in in_language(loaded.origins, "zh")


def test_a_fault_of_the_unit_names_its_file(tmp_path: Path) -> None:
    unit = unit_of(tmp_path, "key with blanks", "SERVER_PORT=99999\nno assignment\n")
    with pytest.raises(SettingsError) as caught:
        stockrt.load_settings({}, None, (), is_root=True, unit=unit)
    text = str(caught.value)
    assert f"(credential {tmp_path}/key)" in text and f"({tmp_path}/unit.env)" in text and "line 2" in text
    assert "key with blanks" not in text
    (tmp_path / "unit.env").unlink()
    with pytest.raises(SettingsError, match=r"unit\.env cannot be read: No such file"):
        stockrt.load_settings({}, None, (), is_root=True, unit=unit)


def test_who_names_a_state_or_settings_of_their_own_does_not_mean_the_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "stockrt.service"
    monkeypatch.setattr(stockrt, "UNIT_PLACES", [tmp_path / "none", place])
    monkeypatch.setenv("PATH", str(tmp_path))  # no systemctl: the file itself is read
    assert stockrt.find_unit({}, None) is None
    settings = tmp_path / "unit.env"
    settings.touch()
    place.write_text(f"[Service]\nEnvironmentFile=-{settings}\n")
    found = stockrt.find_unit({}, None)
    assert found is not None and found.files == [settings]
    assert stockrt.find_unit({}, settings) == found
    assert stockrt.find_unit({}, tmp_path / "another.env") is None
    for name in ("STATE_DIRECTORY", "CREDENTIALS_DIRECTORY", "INVOCATION_ID"):
        assert stockrt.find_unit({name: "/x"}, None) is None
    systemctl = tmp_path / "systemctl"
    systemctl.write_text("#!/bin/sh\necho 'Environment=A=of-a-drop-in'\n")
    systemctl.chmod(0o755)
    found = stockrt.find_unit({}, None)
    assert found is not None and found.variables == {"A": "of-a-drop-in"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_what_a_user_may_not_look_into_is_hidden_and_what_is_missing_is_not(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        closed, open_one = Path(folder, "closed"), Path(folder, "open")
        Path(folder).chmod(0o755)
        closed.mkdir(mode=0o700)
        open_one.mkdir()
        (closed / "file").touch()
        (open_one / "secret").touch(mode=0o600)
        (open_one / "public").touch(mode=0o644)
        hidden = [
            closed,
            closed / "file",
            open_one,
            open_one / "secret",
        ]  # SQLite's files need a directory to write in
        seen = [open_one / "public", Path(folder) / "missing", open_one / "public/below"]
        assert not any(map(stockrt.is_hidden, hidden + seen))
        with unprivileged():
            assert all(map(stockrt.is_hidden, hidden))
            assert not any(map(stockrt.is_hidden, seen))
