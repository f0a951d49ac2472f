"""What is no plain file where one is expected: said at once, never waited for, and never read without an end."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from conftest import RunPyz

# A pipe that nobody writes to is waited for until then: any time at all would do.
PATIENCE_S = 30
ODD = "it is a pipe or a device, expected a plain file"


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("stockrt.db", ("--once", "--demo", "--codes", "TSLA.US")),
        ("stockrt.db-wal", ("--once", "--demo", "--codes", "TSLA.US")),
        ("stockrt.db.lock", ("--show", "--demo")),
        ("stockrt.db.damaged", ("--once", "--demo", "--codes", "TSLA.US")),
        ("executions.db.lock", ("--executions",)),
        ("lock", ("--status",)),
        ("lock", ()),
        ("module_hash", ("--register",)),
        ("stockrt.env", ("--check-settings",)),
        ("tls.pem", ("--check-settings",)),
        ("codes", ("--once", "--demo", "--codes-file", "codes")),
        ("config/.env", ("--migrate", ".", "--dry-run", "--env-file", "new.env")),
    ],
)
def test_a_pipe_in_place_of_a_file_is_refused(
    run_pyz: RunPyz, tmp_path: Path, name: str, args: tuple[str, ...]
) -> None:
    for made in ("stockrt.db", "executions.db"):  # what is not there is not looked into
        (tmp_path / made).touch()
    place = tmp_path / name
    place.unlink(missing_ok=True)
    place.parent.mkdir(exist_ok=True)
    os.mkfifo(place)
    env = {"STATE_DIRECTORY": str(tmp_path), "SERVER_IP": "127.0.0.1", "SERVER_PORT": "9"}
    env |= {"INFOWAY_API_KEY": "test-key"}
    if name == "tls.pem":
        env["MONGODB_HOST"] = f"mongodb://127.0.0.1:9/?tlsCAFile={place}"
    done = run_pyz(*args, env=env, timeout=PATIENCE_S)
    assert ODD in done.stderr and name in done.stderr, done
    assert done.returncode in (1, 64, 78) and place.is_fifo()


def test_a_pipe_for_certificates_is_refused_where_something_asks(run_pyz: RunPyz, tmp_path: Path) -> None:
    """OpenSSL would wait for it at each connection."""
    os.mkfifo(tmp_path / "ca.pem")
    for name in ("SSL_CERT_FILE", "SSLKEYLOGFILE"):
        env = {name: str(tmp_path / "ca.pem"), "INFOWAY_API_KEY": "test-key"}
        done = run_pyz("--once", "--codes", "TSLA.US", env=env, timeout=PATIENCE_S)
        assert done.returncode == 78 and f"{name}: {tmp_path}/ca.pem" in done.stderr and ODD in done.stderr
    done = run_pyz("--check-settings", env=env, timeout=PATIENCE_S)
    assert done.stderr.count(ODD) == 1  # though two look at it


@pytest.mark.parametrize("given", ["/dev/zero", "-"])
def test_codes_without_an_end_are_refused(pyz: Path, clean_env: dict[str, str], given: str) -> None:
    with Path("/dev/zero").open("rb") as zeros:
        done = subprocess.run(
            [pyz, "--once", "--demo", "--codes-file", given],
            env=clean_env, stdin=zeros, capture_output=True, text=True, timeout=PATIENCE_S,
        )  # fmt: skip
    words = ODD if given == "/dev/zero" else "it has more than 16 MiB"
    assert f"--codes-file {given} cannot be read: {words}" in done.stderr
    assert done.returncode == 64


def test_codes_may_come_through_a_pipe(pyz: Path, clean_env: dict[str, str]) -> None:
    """As `--codes-file <(…)` of a shell has it, and settings as well."""
    command = (
        '"$0" --once --demo --json --env-file <(echo LOG_LEVEL=debug) --codes-file <(sleep 0.2; echo TSLA.US)'
    )
    done = subprocess.run(
        ["bash", "-c", command, pyz], env=clean_env, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0 and '"TSLA.US"' in done.stdout, done
