"""What the built file unpacked can be taken away or shadowed: it ends with a sentence, and the next start works."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kit.daemons import HASH, PATIENCE, ProcessDaemon, environment
from kit.infoway_server import InfowayServer
from kit.platform_server import PlatformServer

import stockrt

# A Python without libraries of its own, in place of the one that runs the tests.
BARE = ("sh", "-c", f'shift; exec {sys.executable} -S "$@"', "sh")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where this test's program unpacks itself."""
    return tmp_path / "shiv"


@pytest.fixture
def platform() -> Iterator[PlatformServer]:
    """A server that knows the daemon."""
    with PlatformServer(ping_every=0, zombies=False) as server:
        server.know(HASH)
        yield server


def unpacked(place: Path) -> Path:
    (site,) = place.glob("stockrt.pyz_*/site-packages")
    return site


def lose_everything(place: Path) -> None:
    shutil.rmtree(place)


def lose_a_library(place: Path) -> None:
    shutil.rmtree(unpacked(place) / "urllib3")


def lose_files_and_keep_folders(place: Path) -> None:
    """As cleaners do that go by the time of the last use."""
    for path in unpacked(place).rglob("*.*"):
        if path.is_file():
            path.unlink()


def lose_the_module(place: Path) -> None:
    (unpacked(place) / "stockrt.py").unlink()
    shutil.rmtree(unpacked(place) / "__pycache__", ignore_errors=True)


@pytest.mark.parametrize(
    "lose",
    [lose_everything, pytest.param(lose_a_library, marks=pytest.mark.long), lose_files_and_keep_folders],
)
def test_a_daemon_whose_unpacked_program_vanished_ends_and_the_next_start_executes(
    lose: Callable[[Path], None],
    pyz: Path,
    clean_env: dict[str, str],
    infoway: InfowayServer,
    platform: PlatformServer,
    place: Path,
    tmp_path: Path,
) -> None:
    state = tmp_path / "state"
    stockrt.write_hash(state, HASH)
    base = clean_env | {"SHIV_ROOT": str(place)}
    with ProcessDaemon(base, environment(platform.port, infoway.url, state), pyz, BARE) as daemon:
        assert platform.wait_for(lambda p: p.connected, PATIENCE), daemon.log
        lose(place)
        execution = platform.execute(["TSLA.US"])
        assert daemon.wait() == 1, daemon.log
        assert "a part of the program is gone from" in daemon.log
        assert "Traceback" not in daemon.log
        daemon.start()
        assert platform.wait_for(lambda p: p.results_for(execution), PATIENCE), daemon.log
        assert [result.data["status"] for result in platform.results_for(execution)] == ["success"]


# The daemon's next start, above, is that of a file that lost the others.
@pytest.mark.parametrize(
    "lose",
    [
        lose_the_module,
        *(
            pytest.param(lose, marks=pytest.mark.long)
            for lose in (lose_everything, lose_files_and_keep_folders)
        ),
    ],
)
def test_the_built_file_starts_after_its_unpacked_program_vanished(
    lose: Callable[[Path], None], pyz: Path, clean_env: dict[str, str], place: Path
) -> None:
    command = [sys.executable, str(pyz), "--once", "--demo", "--codes", "TSLA.US"]
    for lost in (lambda place: None, lose):
        done = subprocess.run(
            command, env=clean_env | {"SHIV_ROOT": str(place)}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        lost(place)
    done = subprocess.run(command, env=clean_env | {"SHIV_ROOT": str(place)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_library_on_the_pythonpath_does_not_shadow_that_of_the_built_file(
    pyz: Path, clean_env: dict[str, str], infoway: InfowayServer, place: Path, tmp_path: Path
) -> None:
    for name in ("urllib3", "pymongo", "stockrt"):
        (tmp_path / "path" / name).mkdir(parents=True)
        (tmp_path / "path" / name / "__init__.py").write_text("raise SystemExit('the wrong one')")
    env = clean_env | environment(1, infoway.url, tmp_path / "state") | {"SHIV_ROOT": str(place)}
    command = [sys.executable, str(pyz), "--once", "--codes", "TSLA.US"]
    env["PYTHONPATH"] = str(tmp_path / "path")
    for _ in ("it unpacks itself", "it is unpacked"):
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_built_file_does_not_connect_with_too_few_descriptors(
    pyz: Path, clean_env: dict[str, str], infoway: InfowayServer, platform: PlatformServer, tmp_path: Path
) -> None:
    settings = environment(platform.port, infoway.url, tmp_path / "state")
    few = ["sh", "-c", 'ulimit -n 24; exec "$@"', "sh", sys.executable, str(pyz)]
    done = subprocess.run(few, env=clean_env | settings, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1
    assert "only 24 files and sockets may be open" in done.stderr and "LimitNOFILE=" in done.stderr
    assert platform.dials == []


def test_the_built_file_has_a_descriptor_for_each_connection_to_the_stream(
    pyz: Path, clean_env: dict[str, str], tmp_path: Path
) -> None:
    """Of every key as many as the greatest plan allows."""
    codes = {"COLLECT": "stream", "COLLECT_CODES": "AAPL.US", "INFOWAY_API_KEY": "a-first-key,another-key"}
    most = stockrt.DESCRIPTORS_NEEDED + stockrt.DESCRIPTORS_OF_A_KEY * 2 - 1
    few = ["sh", "-c", f'ulimit -n {most}; exec "$@"', "sh", sys.executable, str(pyz)]
    for command in (few, [*few, "--collect"]):
        done = subprocess.run(
            command, env=clean_env | codes, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 1
        assert f"only {most} files and sockets may be open, and {most + 1} are needed" in done.stderr
