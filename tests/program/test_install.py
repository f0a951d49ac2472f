"""What `build_pyz.sh install` and `uninstall` put and take, below DESTDIR: no root, no systemd."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

PUT = {"opt/stockrt/stockrt.pyz": 0o755, "etc/systemd/system/stockrt.service": 0o644}
CONFIGURATION = "etc/stockrt/stockrt.env"
FILES = ("build_pyz.sh", "stockrt.py", "stockrt.service", "stockrt.env.example")


@pytest.fixture
def source(tmp_path: Path, pyz: Path) -> Path:
    """A checkout with a built program."""
    folder = tmp_path / "a checkout"
    folder.mkdir()
    for path in (pyz, *(ROOT / name for name in FILES)):
        shutil.copy(path, folder / path.name)
    return folder


def run(
    source: Path, what: str, destination: Path | None, umask: int = 0o022, language: str = ""
) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in ("DESTDIR", "STOCKRT_LANG")}
    env |= {"STOCKRT_LANG": language, "LC_ALL": "C.UTF-8"} if language else {}
    return subprocess.run(
        [source / "build_pyz.sh", what],
        env=env | ({"DESTDIR": str(destination)} if destination else {}),
        capture_output=True,
        text=True,
        umask=umask,
        timeout=60,
        cwd="/",
    )


def files(folder: Path) -> dict[str, int]:
    """Every file below with its mode."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.stat().st_mode & 0o777 for path in found}


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_install_puts_three_files(source: Path, tmp_path: Path, pyz: Path, umask: int) -> None:
    there = tmp_path / "there"
    done = run(source, "install", there, umask)
    assert done.returncode == 0, done.stderr
    assert files(there) == PUT | {CONFIGURATION: 0o600}
    assert (there / "opt/stockrt/stockrt.pyz").read_bytes() == pyz.read_bytes()
    assert (there / "etc/stockrt").stat().st_mode & 0o777 == 0o755
    assert (there / "etc/stockrt/credentials").stat().st_mode & 0o777 == 0o700


def test_install_again_replaces_the_program_and_keeps_the_configuration(source: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    run(source, "install", there)
    (there / CONFIGURATION).write_text("SERVER_IP=10.0.0.5\n")
    program = there / "opt/stockrt/stockrt.pyz"
    with program.open("rb") as running:
        before = running.read()
        done = run(source, "install", there)
        running.seek(0)
        assert running.read() == before  # whoever runs the old file keeps it
        assert os.fstat(running.fileno()).st_ino != program.stat().st_ino
    assert "kept " in done.stdout
    assert (there / CONFIGURATION).read_text() == "SERVER_IP=10.0.0.5\n"
    assert files(there) == PUT | {CONFIGURATION: 0o600}


def test_uninstall_leaves_the_configuration_and_says_where(source: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    run(source, "install", there)
    state = there / "var/lib/private/stockrt/stockrt.db"
    state.parent.mkdir(parents=True)
    state.touch()
    done = run(source, "uninstall", there)
    assert done.returncode == 0, done.stderr
    assert set(files(there)) == {CONFIGURATION, str(state.relative_to(there))}
    assert not (there / "opt/stockrt").exists()
    kept = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("kept")]
    assert kept == [str(there / "etc/stockrt"), str(state.parent)]
    assert run(source, "uninstall", there).returncode == 0


def test_a_chinese_reader_reads_chinese_in_aligned_columns(source: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    run(source, "install", there)
    done = run(source, "install", there, language="zh")
    assert f"已安装    {there}/opt/stockrt/stockrt.pyz\n" in done.stdout
    assert f"已保留    {there}/{CONFIGURATION}\n" in done.stdout
    assert "# INFOWAY_API_KEY；SERVER_IP、SERVER_PORT，或 COLLECT、COLLECT_CODES\n" in done.stdout
    done = run(source, "uninstall", there, language="zh")
    assert f"已删除  {there}/opt/stockrt/stockrt.pyz\n" in done.stdout
    assert f"已保留  {there}/etc/stockrt\n" in done.stdout


def test_program_of_other_sources_is_not_installed(source: Path, tmp_path: Path) -> None:
    with (source / "stockrt.py").open("a") as script:
        script.write("# changed\n")
    done = run(source, "install", tmp_path / "there")
    assert done.returncode == 1 and "run ./build_pyz.sh first" in done.stderr
    (source / "stockrt.pyz").unlink()
    done = run(source, "install", tmp_path / "there")
    assert done.returncode == 1 and "run ./build_pyz.sh first" in done.stderr
    assert not (tmp_path / "there").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may install")
def test_install_without_root_says_how(source: Path) -> None:
    done = run(source, "install", None)
    assert done.returncode == 1 and "sudo ./build_pyz.sh install" in done.stderr
