"""What the program says is what is so: each message names its own cause, whole, in words that a person can act on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import RunPyz, unavailable
from kit.infoway_server import InfowayServer
from kit.mongo import Unavailable, make_certificates

from program.test_once import DEMO, api_env

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
    try:
        authority = str(make_certificates(tmp_path)[0])
    except Unavailable as error:
        unavailable(str(error))
    env = {
        "METRICS_FILE": str(tmp_path / "stockrt.prom"),
        "SSL_CERT_FILE": authority,
        "SSL_CERT_DIR": str(tmp_path),
        "SSLKEYLOGFILE": str(tmp_path / "keys"),
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


# ------------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("job", [("--once",), ("--backfill", "3")])
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


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (("--once", "--cods", "AAPL.US"), "--codes"),
        (("--chek",), "--check"),
        (("--check-setting",), "--check-settings"),
        (("--once", "--demo", "--codes", "A.US", "--jsn"), "--json"),
        (("—once", "--codes", "A.US"), "--once"),
        (("--qwertz",), ""),
    ],
)
def test_mistyped_option_gets_the_nearest_one(run_pyz: RunPyz, typed: tuple[str, ...], meant: str) -> None:
    done = run_pyz(*typed)
    assert done.returncode == 64
    (line,) = done.stderr.splitlines()
    assert (f"did you mean {meant}?" in line) if meant else ("did you mean" not in line), line
