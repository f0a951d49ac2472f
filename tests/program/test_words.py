"""What the program says is what is so: each message names its own cause, whole, in words that a person can act on."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pymongo
import pytest
from conftest import MakeWorld, RunPyz, unavailable
from kit.daemons import LOCAL_TIME, until
from kit.fault_world import World
from kit.infoway_server import InfowayServer
from kit.mongo import Unavailable, make_certificates
from kit.mongo_proxy import MongoProxy

from program.test_once import DEMO, api_env, cells, nobody_listens, on_terminal

PLATFORM = {"SERVER_IP": "127.0.0.1", "SERVER_PORT": "8000"}
STANDALONE = {"INFOWAY_API_KEY": "test-key"}
# A user that nobody is, who may read files.
NAMELESS = 61_000 + os.getpid() % 4_000


# ------------------------------------------------------------------------------------------------------
# Paths and options that an environment or a URI names
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("STATE_DIRECTORY", "{file}/state"),
        ("METRICS_FILE", "{nowhere}/stockrt.prom"),
        ("SSL_CERT_FILE", "{nowhere}"),
        ("SSL_CERT_DIR", "{nowhere}"),
        ("SSLKEYLOGFILE", "{nowhere}/keys"),
        ("CREDENTIALS_DIRECTORY", "{nowhere}"),
        ("COLLECT_CODES", "@{nowhere}/codes"),
        ("MONGODB_HOST", "mongodb://127.0.0.1/x?tls=true&tlsCAFile={nowhere}"),
        ("MONGODB_HOST", "mongodb://127.0.0.1/x?tls=true&tlsCRLFile={nowhere}"),
        ("MONGODB_HOST", "mongodb://127.0.0.1/x?tls=true&tlsCertificateKeyFile={nowhere}"),
        ("MONGODB_HOST", "mongodb://127.0.0.1/x?tls=true&tlsCertificateKeyFile={file}"),
    ],
)
def test_path_that_cannot_be_used_is_named_with_its_setting_by_check_settings(
    run_pyz: RunPyz, tmp_path: Path, name: str, value: str
) -> None:
    (tmp_path / "file").write_text("no certificate\n")
    path = value.format(file=tmp_path / "file", nowhere=tmp_path / "nowhere")
    done = run_pyz("--check-settings", env=STANDALONE | {name: path})
    assert done.returncode == 78, done.stdout
    (line,) = done.stderr.splitlines()
    assert name in line and str(tmp_path) in line, line
    assert "Error" not in line and "Errno" not in line, line
    assert not (tmp_path / "state").exists() and not (tmp_path / "nowhere").exists()


def test_paths_that_can_be_used_are_well(run_pyz: RunPyz, tmp_path: Path) -> None:
    (tmp_path / "codes").write_text("AAPL.US")
    try:
        authority = str(make_certificates(tmp_path)[0])
    except Unavailable as error:
        unavailable(str(error))
    env = {
        "METRICS_FILE": str(tmp_path / "stockrt.prom"),
        "SSL_CERT_FILE": authority,
        "SSL_CERT_DIR": str(tmp_path),
        "SSLKEYLOGFILE": str(tmp_path / "keys"),
        "COLLECT_CODES": f"@{tmp_path / 'codes'}",
        "MONGODB_HOST": f"mongodb://127.0.0.1/x?tls=true&tlsCAFile={authority}",
    }
    done = run_pyz("--check-settings", env=STANDALONE | env)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "keys").exists() and not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    "args", [("--once", "--codes", "AAPL.US"), ("--status",), ("--drain",), ("--check",)]
)
def test_missing_file_of_the_uri_is_a_fault_of_the_settings_for_every_command(
    run_pyz: RunPyz, tmp_path: Path, args: tuple[str, ...]
) -> None:
    uri = f"mongodb://127.0.0.1/x?tls=true&tlsCAFile={tmp_path / 'nowhere.pem'}"
    done = run_pyz(*args, env=STANDALONE | {"MONGODB_HOST": uri})
    assert done.returncode == 78
    assert "tlsCAFile" in done.stderr and "cannot be read: No such file or directory" in done.stderr


@pytest.mark.parametrize(
    ("locale", "said"),
    [
        ("C.UTF-8", "stockrt: STOCKRT_LANG='fr' (environment): expected zh or en\n"),
        ("zh_CN.UTF-8", "stockrt：STOCKRT_LANG=“fr”（环境变量）：应为 zh 或 en\n"),
    ],
)
@pytest.mark.parametrize("args", [("--check",), ("--check-settings",), ("--status",)])
def test_a_language_that_is_none_is_a_fault_in_that_of_the_locale(
    run_pyz: RunPyz, args: tuple[str, ...], locale: str, said: str
) -> None:
    done = run_pyz(*args, env=STANDALONE | {"STOCKRT_LANG": "fr", "LC_ALL": locale})
    assert done.returncode == 78
    assert done.stderr == said


def test_unwritable_key_log_is_said_to_be_that(run_pyz: RunPyz, tmp_path: Path) -> None:
    with InfowayServer() as server:
        url = server.url.replace("http:", "https:")
        keys = tmp_path / "nowhere" / "keys"
        env = api_env(server, INFOWAY_API_BASE_URL=url, SSLKEYLOGFILE=str(keys))
        done = run_pyz("--once", "--codes", "AAPL.US", env=env)
    assert done.returncode == 1
    assert f"SSLKEYLOGFILE={keys} cannot be written: No such file or directory" in done.stderr
    assert "Errno" not in done.stderr


OPTIONS = {
    "retryWrite=true": "did you mean retrywrites?",
    "foo=bar": "MongoDB has no such option",
    "serverSelectionTimeoutMS=abc": "must be an integer or float",
    "tls=ja": "'true' or 'false'",
    "compressors=foo": "foo",
    "tlsCertificateKeyFilePasswort=hunter2-secret": "tlscertificatekeyfilepassword",
}


def test_mistyped_options_of_the_uri_are_faults_in_our_words_all_at_once(run_pyz: RunPyz) -> None:
    env = STANDALONE | PLATFORM | {"MONGODB_HOST": f"mongodb://127.0.0.1/x?{'&'.join(OPTIONS)}"}
    for args in (["--check-settings"], []):
        done = run_pyz(*args, env=env)
        assert done.returncode == 78
        lines = done.stderr.splitlines()
        assert len(lines) == len(OPTIONS), done.stderr
        for line, (option, words) in zip(lines, OPTIONS.items(), strict=True):
            assert line.startswith("stockrt: MONGODB_HOST, option ") and option.partition("=")[0] in line
            assert words in line
        assert "Warning" not in done.stderr and "Refer to" not in done.stderr
        assert "hunter2-secret" not in done.stderr


@pytest.mark.parametrize(
    "options", ["tls=true&ssl=false", "tlsInsecure=true&tlsAllowInvalidCertificates=true"]
)
def test_options_of_the_uri_that_contradict_each_other_are_a_fault(run_pyz: RunPyz, options: str) -> None:
    done = run_pyz(
        "--check-settings", env=STANDALONE | {"MONGODB_HOST": f"mongodb://u:hunter2-secret@h/?{options}"}
    )
    assert done.returncode == 78, done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("stockrt: MONGODB_HOST, its options together: ") and "hunter2" not in line


def test_options_of_the_uri_without_their_question_mark_are_no_database(run_pyz: RunPyz) -> None:
    done = run_pyz("--check-settings", env=STANDALONE | {"MONGODB_HOST": "mongodb://h/&retryWrites=true"})
    assert done.returncode == 78 and "MONGODB_HOST=" in done.stderr and "expected mongodb://" in done.stderr


def test_database_of_the_uri_is_the_database(
    run_pyz: RunPyz, mongo_db: tuple[str, str], tmp_path: Path
) -> None:
    uri, name = mongo_db
    place, _, options = uri.partition("?")
    named = f"{place.rstrip('/')}/{name}?{options}"
    done = run_pyz("--check", env=STANDALONE | {"MONGODB_HOST": named})
    assert f"database {name} can be written" in done.stdout, done.stdout


# ------------------------------------------------------------------------------------------------------
# All faults at once
# ------------------------------------------------------------------------------------------------------


def test_faults_of_values_and_what_is_missing_are_said_together(run_pyz: RunPyz, tmp_path: Path) -> None:
    bad = {"LOG_LEVEL": "loud", "SERVER_PORT": "8000", "MONGODB_HOST": "mongodb://h/?retryWrite=1"}
    for args in (["--check-settings"], [], ["--env-file", os.devnull]):
        done = run_pyz(*args, env=bad)
        assert done.returncode == 78
        wanted = [
            "LOG_LEVEL=",
            "MONGODB_HOST, option retryWrite",
            "SERVER_IP not set",
            "INFOWAY_API_KEY is not",
        ]
        assert [len([line for line in done.stderr.splitlines() if part in line]) for part in wanted] == [
            1
        ] * 4
        assert len(done.stderr.splitlines()) == 4, done.stderr
    done = run_pyz("--once", "--codes", "AAPL.US", env={"LOG_LEVEL": "loud"})
    assert done.returncode == 78 and len(done.stderr.splitlines()) == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"COLLECT": "stream"},
            "COLLECT_CODES is not set, and COLLECT would collect nothing: expected codes ",
        ),
        (
            {"COLLECT": "stream", "COLLECT_EVERY": "10", "COLLECT_CODES": "AAPL.US"},
            "COLLECT and COLLECT_EVERY are both set: choose one, ",
        ),
        ({"COLLECT_CODES": "watch"}, "COLLECT_CODES=watch without MONGODB_HOST: "),
        (
            {"COLLECT_SHARE": "3/2"},
            "COLLECT_SHARE='3/2' (environment): expected a share such as 1/3, ",
        ),
    ],
)
def test_what_cannot_be_collected_is_said_before_the_daemon_starts(
    run_pyz: RunPyz, settings: dict[str, str], words: str
) -> None:
    for args in (["--check-settings"], []):
        done = run_pyz(*args, env=STANDALONE | PLATFORM | settings)
        assert done.returncode == 78, done.stdout
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"stockrt: {words}")


def test_check_settings_tells_of_a_daemon_that_collects_without_a_platform(run_pyz: RunPyz) -> None:
    settings = STANDALONE | {"COLLECT_EVERY": "10", "COLLECT_CODES": "AAPL.US"}
    done = run_pyz("--check-settings", env=settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("not set: the daemon collects by itself, without a platform\n")
    done = run_pyz("--check-settings", env=settings | {"INFOWAY_API_KEY": ""})
    assert (done.returncode, done.stderr[:32]) == (78, "stockrt: INFOWAY_API_KEY is not ")


def test_check_settings_tells_a_standalone_run_from_the_daemon(run_pyz: RunPyz) -> None:
    done = run_pyz("--check-settings", env=STANDALONE)
    assert done.returncode == 0, done.stderr
    assert "enough for --once, not for the daemon" in done.stdout
    done = run_pyz("--check-settings", env=STANDALONE | PLATFORM)
    assert done.returncode == 0
    assert "daemon" not in done.stdout
    done = run_pyz(env=STANDALONE)
    assert done.returncode == 78 and "SERVER_IP and SERVER_PORT not set" in done.stderr


# ------------------------------------------------------------------------------------------------------
# Nothing ends in a traceback
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"TZif2", b"TZif2" + bytes(39) + b"\xff" * 9])
def test_damaged_zone_file_is_named_and_costs_no_trade(
    run_pyz: RunPyz, tmp_path: Path, content: bytes
) -> None:
    zones = tmp_path / "zones"
    (zones / "America").mkdir(parents=True)
    (zones / "America" / "New_York").write_bytes(content)
    env = {"PYTHONTZPATH": str(zones)}
    done = run_pyz(*DEMO, "AAPL.US", "TSLA.US", env=env)
    assert done.returncode == 0 and "AAPL.US" in done.stdout
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if "America/New_York" in line]
    assert len(said) == 1 and "PYTHONTZPATH" in said[0]
    done = run_pyz("--check-settings", env=STANDALONE | env)
    assert done.returncode == 78 and "America/New_York" in done.stderr


@pytest.mark.parametrize("home", ["/proc/none", None])
def test_user_without_name_and_home_gets_a_sentence(pyz: Path, tmp_path: Path, home: str | None) -> None:
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        unavailable("to be another user takes root, and setpriv (util-linux) on the PATH")
    may = "-all,+dac_read_search"
    user = ("setpriv", f"--reuid={NAMELESS}", "--clear-groups", f"--inh-caps={may}", f"--ambient-caps={may}",
            f"--bounding-set={may}")  # fmt: skip
    env = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8"} | ({"HOME": home} if home else {})
    done = subprocess.run([*user, sys.executable, str(pyz), *DEMO, "AAPL.US"], env=env, cwd=tmp_path,
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.returncode == 78
    (line,) = done.stderr.splitlines()
    assert "cannot unpack itself into" in line and "SHIV_ROOT" in line
    assert (f"{home}/.shiv" if home else "HOME") in line


@pytest.mark.parametrize(
    ("language", "is_chinese"),
    [
        ({"LANG": "zh_CN.UTF-8"}, True),
        ({"STOCKRT_LANG": " ZH "}, True),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "zh_CN.utf8"}, True),
        ({"LANG": "zh_CN.UTF-8", "STOCKRT_LANG": "en"}, False),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C.UTF-8"}, False),
        ({"LANG": "zh_CN.GB18030"}, False),
        ({"LANG": "en_US.ISO-8859-1", "STOCKRT_LANG": "zh"}, False),
    ],
)
def test_that_it_cannot_be_unpacked_is_said_in_the_readers_language(
    pyz: Path, tmp_path: Path, language: dict[str, str], is_chinese: bool
) -> None:
    """As build_pyz.sh says its words, before anything of the program is there."""
    place = tmp_path / "文件"
    place.touch()
    env = {"PATH": os.environ["PATH"], "SHIV_ROOT": str(place / "100%"), **language}
    done = subprocess.run([sys.executable, str(pyz), "--version"], env=env, capture_output=True, timeout=60)
    words = f"stockrt: cannot unpack itself into {place}/100%: Not a directory; make room there and let this "
    rest = "user write it, or name another directory in SHIV_ROOT\n"
    if is_chinese:
        words = f"stockrt：无法解压到 {place}/100%：Not a directory；请腾出空间并让当前用户可写，或用 "
        rest = "SHIV_ROOT 指定其他目录\n"
    assert (done.returncode, done.stderr.decode()) == (78, words + rest)


# ------------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("job", [("--once",), ("--backfill", "3"), ("--show",)])
@pytest.mark.parametrize(
    "codes", [("--codes", ""), ("--codes", " , ，"), ("--codes-file", "-"), ("--codes-file", "e")]
)
def test_list_without_a_code_is_a_usage_error_and_nobody_is_asked(
    run_pyz: RunPyz, infoway: InfowayServer, tmp_path: Path, job: tuple[str, ...], codes: tuple[str, ...]
) -> None:
    (tmp_path / "e").write_text("# nothing yet\n\n")
    done = run_pyz(*job, *codes, env=api_env(infoway, INFOWAY_PLAN=""), input="\n # nothing\n")
    assert done.returncode == 64, done.stderr
    assert f"{codes[0]}{' ' + codes[1] if codes[0] == '--codes-file' else ''}: no code in it" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not done.stdout and not infoway.requests


@pytest.mark.parametrize("typed", [("--once", "AAPL.US"), ("--html", "page.html", "AAPL.US")])
def test_code_without_its_flag_is_told_where_it_belongs(run_pyz: RunPyz, typed: tuple[str, ...]) -> None:
    done = run_pyz(*typed)
    assert done.returncode == 64
    assert done.stderr == (
        "stockrt: unrecognized arguments: AAPL.US; codes stand after --codes, or right after --show; see --help\n"
    )


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        (("TSLA.US",), "codes stand after --codes, or right after --show; "),
        (("--backfill", "5", "TSLA.US"), "codes stand after --codes, or right after --show; "),
        (("--show", "--demo", "TSLA.US"), "codes stand after --codes, or right after --show; "),
        (("--executions", "3", "4"), ""),
        (("--migrate", "a", "b"), ""),
        (("--symbols", "gold", "silver"), ""),
        (("--status", "TSLA.US"), ""),
    ],
)
def test_word_without_a_flag_is_called_a_code_where_it_may_be_one(
    run_pyz: RunPyz, typed: tuple[str, ...], hint: str
) -> None:
    done = run_pyz(*typed)
    assert done.returncode == 64
    assert done.stderr == f"stockrt: unrecognized arguments: {typed[-1]}; {hint}see --help\n"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (("--once", "--cods", "AAPL.US"), "--codes"),
        (("--chek",), "--check"),
        (("collect",), "--collect"),
        (("--check-setting",), "--check-settings"),
        (("--once", "--demo", "--codes", "A.US", "--jsn"), "--json"),
        (("—once", "--codes", "A.US"), "--once"),
        (("--zyxwvu",), ""),
    ],
)
def test_mistyped_option_gets_the_nearest_one(run_pyz: RunPyz, typed: tuple[str, ...], meant: str) -> None:
    done = run_pyz(*typed)
    assert done.returncode == 64
    (line,) = done.stderr.splitlines()
    assert (f"did you mean {meant}?" in line) if meant else ("did you mean" not in line), line


@pytest.mark.parametrize("flag", ["--env-file", "--codes-file"])
@pytest.mark.parametrize("command", ["--check", "--show", "--once"])
def test_empty_name_of_a_file_is_refused(run_pyz: RunPyz, command: str, flag: str) -> None:
    done = run_pyz(command, flag, "")
    assert (done.returncode, done.stderr) == (
        64,
        f"stockrt: argument {flag}: expected a file's name; see --help\n",
    )


JOBS = {
    "daemon": (),
    "status": ("--status",),
    "check": ("--check",),
    "once": ("--once", "--demo", "--codes", "AAPL.US"),
    "register": ("--register",),
}


@pytest.mark.parametrize(
    ("name", "job"),
    [
        ("lock", "daemon"), ("lock", "status"), ("executions.db", "status"),
        ("executions.db.lock", "daemon"), ("stockrt.db", "status"), ("stockrt.db", "once"), ("stockrt.db", "check"),
        ("stockrt.db.lock", "once"),  ("module_hash", "register"),
    ],
)  # fmt: skip
def test_file_that_cannot_be_used_is_named_with_what_was_done_to_it(
    run_pyz: RunPyz, tmp_path: Path, name: str, job: str
) -> None:
    place = tmp_path / "state" / name
    place.mkdir(parents=True)  # a directory in its place: no user can use that, root neither
    env = STANDALONE | PLATFORM | {"INFOWAY_API_BASE_URL": f"http://127.0.0.1:{nobody_listens()}"}
    done = run_pyz(*JOBS[job], env=env)
    assert done.returncode == (3 if job == "status" and name != "lock" else 1)  # which shows the rest
    said = (done.stdout + done.stderr).splitlines()
    (line,) = [line for line in said if str(place) in line and not line.startswith("store ")]
    assert re.search(r"cannot be (looked at|taken|opened|read)|fails: unable to open", line), line
    assert "STATE_DIRECTORY" in line and "Error" not in line and "print" not in line and "another" not in line
    assert not line.startswith("FAIL") or line.startswith("FAIL  store: ")


@pytest.mark.parametrize("job", ["daemon", "status", "check", "once"])
def test_file_system_without_locks_is_said_to_be_that_and_no_other_daemon(
    run_pyz: RunPyz, lock_shim: Path, job: str
) -> None:
    env = STANDALONE | PLATFORM | {"INFOWAY_API_BASE_URL": f"http://127.0.0.1:{nobody_listens()}"}
    done = run_pyz(*JOBS[job], env=env | {"LD_PRELOAD": str(lock_shim)})
    assert done.returncode == (3 if job == "status" else 1)
    said = done.stdout + done.stderr
    assert (
        "No locks available; see STATE_DIRECTORY" in said
        and "another" not in said
        and "Traceback" not in said
    )


# ------------------------------------------------------------------------------------------------------
# Results and numbers
# ------------------------------------------------------------------------------------------------------


@pytest.fixture
def world(make_world: MakeWorld) -> World:
    """A daemon whose store is the local file."""
    return make_world("", (), None, ("", ""))


def answer_to(world: World, codes: list[str]) -> dict[str, Any]:
    """Return the platform's result of an execution."""
    return world.result(world.platform.execute(codes)).data


def status_of(world: World, run_pyz: RunPyz, *more: str) -> str:
    """Return what --status says beside the daemon."""
    return run_pyz("--status", "--env-file", os.devnull, *more, env=world.daemon.environment).stdout


def test_partial_success_is_told_by_its_status_detail_and_names_first_what_failed(
    world: World, run_pyz: RunPyz
) -> None:
    world.start()
    whole = answer_to(world, ["AAPL.US", "TSLA.US"])
    assert (whole["status"], whole["result"]["status_detail"]) == ("success", "success")
    some = answer_to(world, ["AAPL.US", "A?B"])
    assert (some["status"], some["result"]["status"], some["result"]["status_detail"]) == (
        "success",
        "success",
        "partial",
    )
    assert re.match(r"1 of 2 codes failed: A\?B \(.+\); 1 of 2 codes stored$", some["message"])
    assert until(lambda: "partial at" in status_of(world, run_pyz))
    none = answer_to(world, ["A?B"])
    assert (none["status"], none["result"]["status_detail"]) == ("failure", "failure")
    refused = answer_to(world, [])
    assert (refused["status"], refused["result"]["status_detail"]) == ("failure", "failure")


def test_time_of_a_delivery_is_not_that_of_the_absence_and_its_trades_are_those_that_waited(
    make_world: MakeWorld, mongo_proxy: MongoProxy
) -> None:
    world = make_world(f"{mongo_proxy.uri}?timeoutMS=500")
    mongo_proxy.down()
    world.start()
    began = time.monotonic()
    kept = sum(world.result(world.send(size)).data["result"]["kept_count"] for size in (5, 7))
    assert kept == 12
    assert until(lambda: time.monotonic() > began + 4)  # the absence is to be longer than a delivery
    back = time.monotonic()
    mongo_proxy.up()
    moved = re.compile(r"(\d+) kept trades? moved to MongoDB in ([\d.]+) s, 0 refused")
    assert until(lambda: moved.search(world.daemon.log))
    since_back = time.monotonic() - back
    counts = [(int(found[1]), float(found[2])) for found in moved.finditer(world.daemon.log)]
    assert sum(count for count, _ in counts) == kept
    assert sum(seconds for _, seconds in counts) < since_back + 1  # a try is under way for timeoutMS at most


def test_trades_that_wait_and_trades_that_are_moved_are_the_same_number_whatever_closes_there_are(
    run_pyz: RunPyz, infoway: InfowayServer, mongo_db: tuple[str, str]
) -> None:
    away = api_env(infoway, MONGODB_HOST=f"mongodb://127.0.0.1:{nobody_listens()}/?timeoutMS=500")
    codes = ["AAPL.US", "TSLA.US", "BTCUSDT", "USDCNY", "600519", "700.HK"]
    run_pyz("--once", "--codes", *codes, env=away)
    waiting = re.search(r"(\d+) trades wait for MongoDB", run_pyz("--status", env=away).stdout)
    assert waiting is not None and int(waiting[1]) == 6
    uri, name = mongo_db
    back = away | {"MONGODB_HOST": uri, "MONGODB_DB_NAME": name}
    assert re.match(r"6 moved to \S+; 0 left", run_pyz("--drain", env=back).stderr)
    with pymongo.MongoClient[dict[str, Any]](uri) as client:
        assert client[name]["realtime"].count_documents({}) == 6
        assert client[name]["close"].count_documents({}) > 0


def test_a_single_trade_that_waits_is_told_in_the_singular(run_pyz: RunPyz, infoway: InfowayServer) -> None:
    away = api_env(infoway, MONGODB_HOST=f"mongodb://127.0.0.1:{nobody_listens()}/?timeoutMS=500")
    run_pyz("--once", "--codes", "AAPL.US", env=away)
    shown = run_pyz("--status", env=away).stdout
    assert "\nbesides         1 trade waits for MongoDB. To do: start the daemon, or" in shown
    assert "1 trade waits for MongoDB, " in shown


def test_quota_shows_what_was_used_and_what_is_leased_apart(make_world: MakeWorld, run_pyz: RunPyz) -> None:
    world = make_world("", (), None, ("", ""), INFOWAY_PLAN="premium")
    world.start()
    answer_to(world, ["AAPL.US"])
    assert until(lambda: json.loads(status_of(world, run_pyz, "--json"))["last_execution"])
    (key,) = json.loads(status_of(world, run_pyz, "--json"))["keys"]
    assert key["used_today"] == 1 and key["leased_today"] > 0
    assert key["used_today"] + key["left_today"] == 864_000
    line = f"1 used today, 863999 left, {key['leased_today']} of them leased by the daemon"
    assert line in status_of(world, run_pyz)


def test_unknown_is_not_said_to_be_nought(run_pyz: RunPyz) -> None:
    away = STANDALONE | {
        "MONGODB_HOST": f"mongodb://127.0.0.1:{nobody_listens()}/?timeoutMS=500",
        "INFOWAY_PLAN": "free",
    }
    (key,) = json.loads(run_pyz("--status", "--json", env=away).stdout)["keys"]
    assert (key["used_today"], key["left_today"]) == (None, None)
    assert "used today: unknown" in run_pyz("--status", env=away).stdout
    assert "no daily limit, not counted" in run_pyz("--status", env=away | {"INFOWAY_PLAN": "0"}).stdout


def test_people_get_local_times_with_their_offset_and_programs_get_utc(
    world: World, run_pyz: RunPyz, infoway: InfowayServer
) -> None:
    world.start()
    answer_to(world, ["AAPL.US"])
    assert until(lambda: json.loads(status_of(world, run_pyz, "--json"))["last_execution"])
    tz = {"TZ": "<+0800>-8"}
    env = world.daemon.environment | tz
    people = run_pyz("--status", "--env-file", os.devnull, env=env).stdout
    programs = run_pyz("--status", "--env-file", os.devnull, "--json", env=env).stdout
    assert len(re.findall(LOCAL_TIME, people)) == people.count("+08:00") >= 2
    assert not re.search(r"\d\dZ|\d\d\dZ", people)
    assert "+08" not in programs and re.search(r'"at": "\d{4}-\d\d-\d\dT[\d:.]+Z"', programs)
    away = api_env(infoway, MONGODB_HOST=f"mongodb://127.0.0.1:{nobody_listens()}/?timeoutMS=500", **tz)
    away["STATE_DIRECTORY"] = str(world.folder / "another")
    said = run_pyz("--once", "--codes", "AAPL.US", env=away).stderr
    assert re.search(rf"^{LOCAL_TIME} WARNING MongoDB", said, re.M)
    assert re.search(rf"unreachable since {LOCAL_TIME}$", said, re.M)


# ------------------------------------------------------------------------------------------------------
# The network, and MongoDB away
# ------------------------------------------------------------------------------------------------------


def test_network_errors_name_host_and_port_in_plain_words(run_pyz: RunPyz) -> None:
    port = nobody_listens()
    env = {
        "INFOWAY_API_KEY": "test-key",
        "INFOWAY_API_BASE_URL": f"http://127.0.0.1:{port}",
        "MONGODB_HOST": f"mongodb://127.0.0.1:{port}/?timeoutMS=500",
        "SERVER_IP": "127.0.0.1",
        "SERVER_PORT": str(port),
    }
    nowhere = {"INFOWAY_API_KEY": "test-key", "INFOWAY_API_BASE_URL": "http://nowhere.invalid"}
    six = {name: value.replace("127.0.0.1", "[::1]") for name, value in env.items()}
    with ThreadPoolExecutor(4) as pool:  # each waits between its tries
        asked = [
            pool.submit(run_pyz, *args, env=settings)
            for args, settings in (
                (("--check",), env),
                (("--once", "--codes", "AAPL.US"), env),
                (("--check",), nowhere),
                (("--check",), six),
            )
        ]
        done, once, unknown, bracketed = (one.result() for one in asked)
    assert bracketed.stdout.count(f"[::1]:{port}") == 4  # MongoDB's in the setting and in the reason
    assert "::1" not in bracketed.stdout.replace("[::1]", "")
    assert (
        done.stdout.count(f"127.0.0.1:{port}") >= 3 and done.stdout.lower().count("connection refused") == 3
    )
    assert f"127.0.0.1:{port}: connection refused" in once.stderr
    assert "nowhere.invalid:80: its name cannot be resolved" in unknown.stdout
    for text in (done.stdout, done.stderr, once.stderr, unknown.stdout):
        assert not re.search(r"Errno|[a-z]Error\b|gaierror|_ssl|configured timeouts", text), text
        assert not any(line.count("; see ") > 1 for line in text.splitlines()), text


def test_fault_of_a_proxy_names_one_setting_to_look_at(run_pyz: RunPyz, infoway: InfowayServer) -> None:
    proxy = f"http://127.0.0.1:{nobody_listens()}"
    done = run_pyz("--check", env=api_env(infoway, HTTP_PROXY=proxy))
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert line.count("see ") == 1 and line.endswith("see HTTP_PROXY")


def test_platform_that_is_away_is_named_once_in_a_line(world: World) -> None:
    world.start()
    world.platform.stop()
    assert until(lambda: "cannot connect" in world.daemon.log)
    line = next(line for line in world.daemon.log.splitlines() if "cannot connect" in line)
    assert line.count("127.0.0.1:") == 1
    assert "cannot connect: connection refused; trying again [" in line  # and its kind


def test_check_looks_at_the_directory_of_the_metrics(run_pyz: RunPyz, infoway: InfowayServer) -> None:
    done = run_pyz("--check", env=api_env(infoway, METRICS_FILE="/nowhere/stockrt.prom"))
    assert done.returncode == 1
    assert "FAIL  METRICS_FILE: /nowhere cannot be used: No such file or directory\n" in done.stdout


def test_check_says_that_no_platform_is_set(run_pyz: RunPyz, infoway: InfowayServer) -> None:
    done = run_pyz("--check", env=api_env(infoway))
    assert done.returncode == 0
    assert (
        "ok    platform: SERVER_IP and SERVER_PORT are not set: enough for --once, not for the daemon\n"
        in done.stdout
    )


@pytest.mark.parametrize(
    ("codes", "line"),
    [
        ("AAPL.US 700.HK", "ok    codes: 2 to collect\n"),
        ("AAPL.US 430047", "FAIL  codes: 1 to collect, 1 not: 430047 (of the Beijing exchange, "),
        ("watch", "FAIL  codes: COLLECT_CODES: watch without MONGODB_HOST: "),
    ],
)
def test_check_looks_at_the_codes_also_where_only_commands_take_them(
    run_pyz: RunPyz, infoway: InfowayServer, codes: str, line: str
) -> None:
    """Those of --collect, and of the platform without codes."""
    done = run_pyz("--check", env=api_env(infoway, COLLECT_CODES=codes))
    assert line in done.stdout and (done.returncode == 0) == line.startswith("ok")


def test_once_while_mongodb_is_away_shows_what_is_kept_and_says_so_though_older_trades_wait(
    run_pyz: RunPyz, infoway: InfowayServer
) -> None:
    env = api_env(infoway, MONGODB_HOST=f"mongodb://127.0.0.1:{nobody_listens()}/?timeoutMS=1000")
    run_pyz("--once", "--codes", "TSLA.US", "NVDA.US", env=env)
    env["MONGODB_HOST"] = env["MONGODB_HOST"].partition("?")[0]  # its own limit is 20 s
    done = run_pyz("--once", "--codes", "AAPL.US", "700.HK", "TSLA.US", env=env)
    assert done.returncode == 1
    assert [row[0] for row in cells(done.stdout)] == ["CODE", "AAPL.US", "00700.HK", "TSLA.US"]
    assert "3 trades kept on this machine, MongoDB did not answer within 5 s; 1 other waits" in done.stderr
    env["MONGODB_HOST"] += "?timeoutMS=500"
    lines = run_pyz("--once", "--json", "--codes", "AAPL.US", env=env).stdout.splitlines()
    assert [json.loads(line)["s"] for line in lines] == ["AAPL.US"]
    took = re.search(r"\(([\d.]+) s\)", done.stderr)
    assert took is not None and float(took[1]) < 20


# ------------------------------------------------------------------------------------------------------
# Terminals
# ------------------------------------------------------------------------------------------------------


def test_no_colour_codes_for_a_dumb_terminal(pyz: Path, clean_env: dict[str, str], tmp_path: Path) -> None:
    for stream in ("stdout", "stderr"):
        for term, colours in (("dumb", False), ("xterm", True)):
            env = clean_env | {"TERM": term}
            _, shown, other = on_terminal(pyz, env, tmp_path, stream, *DEMO, "AAPL.US", "NOWHERE")
            assert ("\033" in shown, "\033" in other) == (colours, False)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_an_encoding_cannot_hold_gets_a_stand_in(
    pyz: Path, clean_env: dict[str, str], tmp_path: Path, run_pyz: RunPyz, encoding: str
) -> None:
    env = {"PYTHONIOENCODING": encoding}
    before = run_pyz("--once", "--demo", "--cods", "茅台", env=env)
    assert before.returncode == 64 and "\\u8305\\u53f0" in before.stderr
    after = run_pyz(*DEMO, "AAPL.US", "茅台", env=env)
    assert after.returncode == 1 and "\\u8305\\u53f0" in after.stderr and "AAPL.US" in after.stdout
    for stream in ("stdout", "stderr"):
        status, shown, other = on_terminal(pyz, clean_env | env, tmp_path, stream, *DEMO, "AAPL.US", "茅台")
        assert status == 1 and "\\u8305\\u53f0" in shown + other and "AAPL.US" in shown + other
        assert "Traceback" not in shown + other


@pytest.fixture
def slow_api() -> Iterator[InfowayServer]:
    """An API that takes its time for an answer."""
    with InfowayServer(latency=2.5) as server:
        yield server


@pytest.mark.parametrize("job", [("--once", "--codes", "AAPL.US"), ("--check",), ("--status",)])
def test_run_of_more_than_two_seconds_shows_on_a_terminal_that_it_goes_on(
    pyz: Path,
    clean_env: dict[str, str],
    tmp_path: Path,
    slow_api: InfowayServer,
    run_pyz: RunPyz,
    job: tuple[str, ...],
) -> None:
    env = api_env(slow_api)
    if job == ("--status",):  # what is slow there is a MongoDB that does not answer
        env |= {"MONGODB_HOST": f"mongodb://127.0.0.1:{nobody_listens()}/", "INFOWAY_PLAN": "free"}
        env |= {"MONGODB_LICENSE_COLLECTION_NAME": "l"}
    with ThreadPoolExecutor(1) as pool:
        piped = pool.submit(run_pyz, *job, env=env | {"STATE_DIRECTORY": str(tmp_path / "other")})
        status, shown, other = on_terminal(pyz, clean_env | env, tmp_path, "stderr", *job)
    assert status == (3 if job == ("--status",) else 0), shown  # no daemon runs
    if job[0] == "--once":
        assert re.search(r"0%\||\d+ codes \[", shown), shown
        assert "AAPL.US" in other
    elif job[0] == "--check":
        assert re.search("working for 00:0[2-9]", shown) and "\r" not in other
    assert not re.search("working for|%", piped.result().stderr)
