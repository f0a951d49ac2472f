"""Two daemons on one machine, each with a METRICS_FILE: node_exporter reads both."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import unavailable
from kit.daemons import HASH, PATIENCE, ProcessDaemon, environment, until
from kit.infoway_server import InfowayServer
from kit.platform_server import PlatformServer

import stockrt


@pytest.fixture
def textfile(pyz: Path, clean_env: dict[str, str], infoway: InfowayServer, tmp_path: Path) -> Iterator[Path]:
    """The textfile collector's directory, with the files of two daemons that have executed."""
    folder = tmp_path / "textfile"
    folder.mkdir()
    with contextlib.ExitStack() as opened:
        for name in ("stockrt", 'second "b"'):
            state, path = tmp_path / name, folder / f"{name[:6]}.prom"
            stockrt.write_hash(state, HASH)
            platform = opened.enter_context(PlatformServer(ping_every=0, zombies=False))
            platform.know(HASH)
            settings = environment(platform.port, infoway.url, state, METRICS_FILE=str(path))
            daemon = opened.enter_context(ProcessDaemon(clean_env, settings, pyz))
            assert platform.wait_for(lambda p: p.connected, PATIENCE), daemon.log
            platform.execute(["TSLA.US"])
            assert platform.wait_for(lambda p: p.results, PATIENCE), daemon.log
            assert until(path.exists)
        yield folder


def series(path: Path) -> set[str]:
    return {line.rpartition(" ")[0] for line in path.read_text().splitlines() if not line.startswith("#")}


def test_no_series_of_two_built_files_is_the_same(textfile: Path) -> None:
    usual, other = series(textfile / "stockr.prom"), series(textfile / "second.prom")
    assert "stockrt_platform_connected" in usual
    assert 'stockrt_platform_connected{instance="second \\"b\\""}' in other
    assert 'stockrt_api_latency_seconds_bucket{le="+Inf",instance="second \\"b\\""}' in other
    assert len(usual) == len(other) and not usual & other


def test_node_exporter_reads_the_metrics_of_two_built_files(textfile: Path) -> None:
    program = shutil.which("prometheus-node-exporter") or shutil.which("node_exporter")
    if program is None:
        unavailable("no node_exporter: install prometheus-node-exporter")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [program, "--collector.disable-defaults", "--collector.textfile", f"--web.listen-address={address}",
               f"--collector.textfile.directory={textfile}"]  # fmt: skip
    exporter = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    pages: list[str] = []

    def answers() -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{address}/metrics") as page:
            pages.append(page.read().decode())
        return bool(pages)

    try:
        assert until(answers)
    finally:
        exporter.kill()
        exporter.wait()
    assert "node_textfile_scrape_error 0" in pages[0]
    assert pages[0].count("\nstockrt_platform_connected") == 2
