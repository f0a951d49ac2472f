"""A machine whose only way out is a proxy, a proxy that fails, and a platform that is not behind one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import pytest
from conftest import RunPyz, unavailable
from kit.daemons import PATIENCE, ProcessDaemon, environment, until
from kit.infoway_server import InfowayServer, make_certificate
from kit.platform_server import PlatformServer
from kit.proxy_server import NAMESPACE_PORT, NoNetworkNamespace, ProxyServer
from kit.tls import TlsFront

HUSH, CLEAR = "hu%40sh", "hu@sh"  # a password, as a URL has it and as it is


class RunInside(Protocol):
    """The type of the fixture `run_inside`."""

    def __call__(self, *args: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run the program where the proxy is the only way out."""


@pytest.fixture
def proxy() -> Iterator[ProxyServer]:
    """A proxy that wants a password."""
    with ProxyServer(password=f"me:{CLEAR}") as made:
        yield made


@pytest.fixture
def platform() -> Iterator[PlatformServer]:
    """The dispatch platform, which notices by itself when a module is gone."""
    with PlatformServer(zombies=False) as made:
        yield made


@pytest.fixture
def base(
    clean_env: dict[str, str], infoway: InfowayServer, platform: PlatformServer, tmp_path: Path
) -> Iterator[dict[str, str]]:
    """The settings without proxies; the API is asked with https, the platform with http."""
    context, certificate = make_certificate(tmp_path)
    with TlsFront(context, infoway.port) as front:
        yield clean_env | environment(
            platform.port,
            f"https://127.0.0.1:{front.port}",
            tmp_path / "state",
            SSL_CERT_FILE=str(certificate),
        )


@pytest.fixture
def wrapper(proxy: ProxyServer, tmp_path: Path) -> Sequence[str]:
    """The words in front of a command whose only way out is the proxy."""
    try:
        return proxy.only_way_out(tmp_path)
    except NoNetworkNamespace as error:
        unavailable(str(error))


@pytest.fixture
def proxies(proxy: ProxyServer) -> dict[str, str]:
    """The settings of the proxy, as it is reached in the namespace."""
    url = proxy.url_at(NAMESPACE_PORT, f"me:{HUSH}")
    return {"HTTPS_PROXY": url, "http_proxy": url}


@pytest.fixture
def run_inside(pyz: Path, base: Mapping[str, str], wrapper: Sequence[str], tmp_path: Path) -> RunInside:
    """Run the program in the namespace."""

    def run(*args: str, **settings: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*wrapper, sys.executable, str(pyz), *args],
            env={**base, **settings},
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            timeout=120,
        )

    return run


def check_secret(*texts: str) -> None:
    """No form of the password is shown."""
    for text in texts:
        assert HUSH not in text and CLEAR not in text and "bWU6aHVAc2g" not in text


def test_without_the_proxy_there_is_no_way_out(run_inside: RunInside, infoway: InfowayServer) -> None:
    done = run_inside("--once", "--codes", "AAPL.US")
    assert done.returncode == 1 and infoway.request_count == 0


def test_everything_is_checked_through_the_only_way_out(
    run_inside: RunInside, proxies: dict[str, str], proxy: ProxyServer, platform: PlatformServer
) -> None:
    done = run_inside("--check", **proxies)
    assert done.returncode == 0, done.stdout + done.stderr
    shown = f"http://***@127.0.0.1:{NAMESPACE_PORT}"
    line = f"the API through {shown} (HTTPS_PROXY), the platform through {shown} (HTTP_PROXY)"
    assert [text for text in done.stdout.splitlines() if "proxy:" in text] == [f"ok    proxy: {line}"]
    line = f"正常  代理：API → {shown}（HTTPS_PROXY），平台 → {shown}（HTTP_PROXY）\n"
    assert line in run_inside("--check", **proxies, STOCKRT_LANG="zh").stdout
    assert f"GET {platform.url}/module/online" in proxy.targets()
    assert [target for target in proxy.targets() if target.startswith("CONNECT 127.0.0.1:")]
    check_secret(done.stdout, done.stderr)


def test_trades_are_fetched_through_the_only_way_out(
    run_inside: RunInside, proxies: dict[str, str], infoway: InfowayServer
) -> None:
    done = run_inside("--once", "--codes", "AAPL.US", "700.HK", LOG_LEVEL="debug", **proxies)
    assert done.returncode == 0, done.stderr
    assert sorted(infoway.codes_asked()) == ["00700.HK", "AAPL.US"]
    check_secret(done.stdout, done.stderr)


def test_the_daemon_registers_connects_and_executes_through_the_only_way_out(
    pyz: Path,
    base: Mapping[str, str],
    proxies: dict[str, str],
    wrapper: Sequence[str],
    platform: PlatformServer,
    proxy: ProxyServer,
    run_inside: RunInside,
) -> None:
    done = run_inside("--register", **proxies)
    assert done.returncode == 0, done.stderr
    with ProcessDaemon({}, {**base, **proxies}, pyz, wrapper) as daemon:
        assert platform.wait_for(lambda p: p.connected, PATIENCE), daemon.log
        execution = platform.execute(["AAPL.US", "USDCNY"])
        assert platform.wait_for(lambda p: p.results_for(execution), PATIENCE), daemon.log
        result = json.loads(platform.results_for(execution)[0].text)
        assert result["status"] == "success" and result["result"]["success_count"] == 2
        assert f"CONNECT 127.0.0.1:{platform.port}" in proxy.targets()
        platform.kill_connections()
        assert platform.wait_for(lambda p: len(p.dials) > 1 and p.connected, PATIENCE), daemon.log
    check_secret(done.stdout, done.stderr, daemon.log, result["message"])


def test_a_platform_that_no_proxy_names_is_asked_straight(
    pyz: Path, base: Mapping[str, str], platform: PlatformServer, proxy: ProxyServer, infoway: InfowayServer
) -> None:
    more = {
        "ALL_PROXY": proxy.url_at(proxy.port, f"me:{HUSH}"),
        "NO_PROXY": f"localhost,127.0.0.1:{platform.port}",
    }
    with ProcessDaemon({}, {**base, **more}, pyz) as daemon:
        assert platform.wait_for(lambda p: p.connected, PATIENCE), daemon.log
        execution = platform.execute(["AAPL.US"])
        assert platform.wait_for(lambda p: p.results_for(execution), PATIENCE), daemon.log
    assert infoway.codes_asked() == ["AAPL.US"]
    assert platform.registrations
    (target,) = proxy.targets()
    assert target.startswith("CONNECT ") and not target.endswith(f":{platform.port}")
    done = subprocess.run(
        [sys.executable, str(pyz), "--check"],
        env={**base, **more},
        cwd=base["HOME"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert "(ALL_PROXY), the platform straight" in done.stdout


@pytest.mark.parametrize("fault", ["dead", "password", "502"])
def test_a_proxy_that_fails_is_named_with_its_setting(
    run_pyz: RunPyz, base: Mapping[str, str], proxy: ProxyServer, fault: str, platform: PlatformServer
) -> None:
    given = "" if fault == "password" else f"me:{HUSH}"
    port = 1 if fault == "dead" else proxy.port
    url = proxy.url_at(port, given)
    proxy.status = 502 if fault == "502" else 0
    env = {**base, "https_proxy": url, "HTTP_PROXY": url}
    with ThreadPoolExecutor(3) as pool:  # each waits between its tries
        runs = [
            pool.submit(run_pyz, *args, env=env)
            for args in (("--check",), ("--once", "--codes", "AAPL.US"), ("--register",))
        ]
        checked, fetched, registered = (run.result() for run in runs)
    words = {"dead": "refused", "password": "asks for a user and a password", "502": "HTTP 502"}[fault]
    bad = [line for line in checked.stdout.splitlines() if line.startswith("FAIL")]
    assert checked.returncode == 1 and len(bad) == 2, checked.stdout
    for line, setting in zip(bad, ("HTTPS_PROXY", "HTTP_PROXY"), strict=True):
        assert words in line and setting in line and f"127.0.0.1:{port}" in line
    for done, setting in ((fetched, "HTTPS_PROXY"), (registered, "HTTP_PROXY")):
        assert done.returncode == 1
        assert words in done.stderr and setting in done.stderr and "Traceback" not in done.stderr
        check_secret(done.stdout, done.stderr)
    check_secret(checked.stdout, checked.stderr)
    assert not platform.register_calls


def test_a_daemon_goes_on_dialling_while_its_proxy_is_away(
    pyz: Path, base: Mapping[str, str], platform: PlatformServer, proxy: ProxyServer
) -> None:
    platform.know("known-hash")
    state = Path(base["STATE_DIRECTORY"])
    state.mkdir()
    (state / "module_hash").write_text("known-hash\n")
    proxy.status = 502
    more = {"HTTP_PROXY": proxy.url_at(proxy.port, f"me:{HUSH}")}
    with ProcessDaemon({}, {**base, **more}, pyz) as daemon:
        assert until(lambda: "answers HTTP 502; see HTTP_PROXY" in daemon.log), daemon.log
        proxy.status = 0
        assert platform.wait_for(lambda p: p.connected, PATIENCE), daemon.log
    check_secret(daemon.log)


def test_a_socks_proxy_is_a_fault_of_the_settings(run_pyz: RunPyz, base: Mapping[str, str]) -> None:
    done = run_pyz("--check", env={**base, "all_proxy": f"socks5://me:{HUSH}@127.0.0.1:1080"})
    assert done.returncode == 78
    assert "ALL_PROXY='socks5://***@127.0.0.1:1080' (environment): expected http://" in done.stderr
    check_secret(done.stdout, done.stderr)
