"""SIGHUP: the built file reads its settings anew between two executions, or keeps those that it has."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pymongo
import pytest
from conftest import RunPyz
from kit.daemons import HASH, PATIENCE, ProcessDaemon, environment, until
from kit.infoway_server import InfowayServer, Request
from kit.mongo import MongoServer
from kit.platform_server import PlatformServer

import stockrt

OLD_KEY, NEW_KEY = "old-key-4711", "new-key-0815"


@pytest.fixture
def api() -> Iterator[InfowayServer]:
    """An API that knows the old key and the new one."""
    with InfowayServer(keys={OLD_KEY, NEW_KEY}) as server:
        yield server


@pytest.fixture
def platform() -> Iterator[PlatformServer]:
    """A server that knows the daemon."""
    with PlatformServer(ping_every=0, zombies=False) as server:
        server.know(HASH)
        yield server


@pytest.fixture
def daemon(
    pyz: Path, clean_env: dict[str, str], api: InfowayServer, platform: PlatformServer, tmp_path: Path
) -> Iterator[ProcessDaemon]:
    """The built file, its key in a settings file of its directory."""
    state = tmp_path / "state"
    stockrt.write_hash(state, HASH)
    write_settings(tmp_path, INFOWAY_API_KEY=OLD_KEY)
    base = {name: value for name, value in clean_env.items() if name != "STATE_DIRECTORY"}
    settings = environment(platform.port, api.url, state)
    del settings["INFOWAY_API_KEY"]
    with ProcessDaemon(base, settings, pyz) as running:
        assert platform.wait_for(lambda p: p.connected, PATIENCE), running.log
        yield running


def write_settings(folder: Path, **settings: str) -> None:
    (folder / "stockrt.env").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))


def said(daemon: ProcessDaemon, words: str) -> None:
    assert until(lambda: words in daemon.log), daemon.log


def succeeded(platform: PlatformServer, execution_id: str) -> None:
    assert platform.wait_for(lambda p: p.results_for(execution_id), PATIENCE)
    assert [result.data["status"] for result in platform.results_for(execution_id)] == ["success"]


def keys_of(api: InfowayServer) -> list[str]:
    return [request.key for request in api.asked("batch_trade")]


def test_keys_and_log_level_change_between_two_executions_in_the_built_file(
    daemon: ProcessDaemon, platform: PlatformServer, api: InfowayServer, tmp_path: Path
) -> None:
    """The execution that runs ends with the old key, once; the next one has the new key, which no log shows."""
    opened = until_set(api)
    first = platform.execute(["TSLA.US"])
    api.wait_for(lambda server: server.request_count >= 1, PATIENCE)
    write_settings(tmp_path, INFOWAY_API_KEY=NEW_KEY, LOG_LEVEL="debug", MODULE_NAME="other")
    daemon.signal(signal.SIGHUP)
    said(daemon, "settings read anew; changed: INFOWAY_API_KEY, LOG_LEVEL\n")
    said(daemon, "changed, but needs a restart: MODULE_NAME\n")
    second = platform.execute(["AAPL.US"])
    opened()
    succeeded(platform, first)
    succeeded(platform, second)
    assert keys_of(api) == [OLD_KEY, NEW_KEY]
    platform.send_text(json.dumps({"message": f"{OLD_KEY} {NEW_KEY}"}))
    said(daemon, "*** ***")
    assert OLD_KEY not in daemon.log and NEW_KEY not in daemon.log


def test_a_key_that_was_out_is_tried_again_after_a_reload_as_the_log_says(
    daemon: ProcessDaemon, platform: PlatformServer, api: InfowayServer
) -> None:
    """Also the same key, whose plan the operator has renewed."""
    api.keys = {NEW_KEY}
    refused = platform.execute(["TSLA.US"])
    said(
        daemon,
        "is out: HTTP 401: Token invalid; mend INFOWAY_API_KEY, then reload or restart "
        "[quota.out, infoway.http_says]\n",
    )
    assert platform.wait_for(lambda p: p.results_for(refused), PATIENCE)
    api.keys = {OLD_KEY}
    daemon.signal(signal.SIGHUP)
    said(daemon, "settings read anew; changed: none\n")
    succeeded(platform, platform.execute(["TSLA.US"]))


def until_set(api: InfowayServer) -> Callable[[], None]:
    """Hold the API's answers back until what is returned is called."""
    import threading

    gate = threading.Event()

    def wait(request: Request) -> float:
        gate.wait(PATIENCE)
        return 0.0

    api.latency = wait
    return gate.set


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"INFOWAY_API_KEY": NEW_KEY, "LOG_LEVEL": "loud"}, "LOG_LEVEL='loud'"),
        ({"LOG_LEVEL": "debug"}, "INFOWAY_API_KEY is not set"),
    ],
)
def test_a_faulty_file_changes_nothing_in_the_built_file(
    settings: dict[str, str],
    fault: str,
    daemon: ProcessDaemon,
    platform: PlatformServer,
    api: InfowayServer,
    tmp_path: Path,
) -> None:
    write_settings(tmp_path, **settings)
    daemon.signal(signal.SIGHUP)
    said(daemon, f"the settings stay as they were: {fault}")
    succeeded(platform, platform.execute(["TSLA.US"]))
    assert keys_of(api) == [OLD_KEY]
    assert "DEBUG" not in daemon.log


def test_what_waits_goes_to_the_mongodb_of_the_new_settings_from_the_built_file(
    daemon: ProcessDaemon,
    platform: PlatformServer,
    mongo_server: MongoServer,
    mongo_db: tuple[str, str],
    tmp_path: Path,
) -> None:
    """What a wrong MongoDB has let wait moves without an execution, once the settings name the right one."""
    uri, name = mongo_db
    keep = {"INFOWAY_API_KEY": OLD_KEY, "MONGODB_DB_NAME": name}
    write_settings(tmp_path, **keep, MONGODB_HOST="mongodb://127.0.0.1:1/?timeoutMS=500")
    daemon.signal(signal.SIGHUP)
    said(daemon, "changed: MONGODB_HOST, MONGODB_DB_NAME\n")
    execution = platform.execute(["TSLA.US"])
    assert platform.wait_for(lambda p: p.results_for(execution), PATIENCE)
    assert platform.results_for(execution)[0].data["result"]["kept_count"] == 1
    write_settings(tmp_path, **keep, MONGODB_HOST=uri)
    daemon.signal(signal.SIGHUP)
    said(daemon, "1 kept trade moved to MongoDB")
    assert mongo_server.client()[name]["realtime"].count_documents({}) == 1


def test_a_command_without_codes_means_the_watch_list_in_the_built_file(
    daemon: ProcessDaemon, platform: PlatformServer, mongo_db: tuple[str, str], tmp_path: Path
) -> None:
    """As it stands at that moment; without COLLECT_CODES it is refused, and one with an empty list always."""
    uri, name = mongo_db
    assert answer(platform, None)["error"] == stockrt.phrase(stockrt.NO_CODES)
    mongo = {"MONGODB_HOST": uri, "MONGODB_DB_NAME": name}
    write_settings(tmp_path, INFOWAY_API_KEY=OLD_KEY, COLLECT_CODES="watch", **mongo)
    daemon.signal(signal.SIGHUP)
    said(daemon, "changed: MONGODB_HOST, MONGODB_DB_NAME, COLLECT_CODES\n")
    assert f"COLLECT_CODES: no code in {name}.stock_watch; expected " in answer(platform, None)["error"]
    with pymongo.MongoClient[dict[str, Any]](uri) as client:
        watch = client[name]["stock_watch"]
        watch.insert_many([{"code": "AAPL.US"}, {"code": "600519"}, {"code": 5}])
        assert answer(platform, None, args_key=None)["result"]["total"] == 2
        watch.insert_one({"code": "BTCUSDT"})
        third = answer(platform, "")
        stored = set(client[name]["realtime"].distinct("stock_code"))
    assert (third["status"], third["result"]["total"], third["result"]["duplicate_count"]) == (
        "success",
        3,
        2,
    )
    assert "3 of 3 codes stored" in third["message"]
    assert stored == {"AAPL.US", "600519.SH", "BTCUSDT"}
    assert "code_list is empty" in answer(platform, [])["error"]
    write_settings(tmp_path, INFOWAY_API_KEY=OLD_KEY, COLLECT_CODES="MSFT.US", **mongo)
    daemon.signal(signal.SIGHUP)
    said(daemon, "changed: COLLECT_CODES\n")
    assert answer(platform, None)["result"]["total"] == 1


def answer(platform: PlatformServer, codes: object, **how: Any) -> dict[str, Any]:
    """Have these codes executed, and return the result."""
    execution_id = platform.execute(codes, **how)
    assert platform.wait_for(lambda p: p.results_for(execution_id), PATIENCE)
    (result,) = platform.results_for(execution_id)
    return result.data


def test_reload_by_hand_without_settings_asks_for_none(start_pyz: RunPyz) -> None:
    done = start_pyz("--reload", env={"SERVER_PORT": "none"})
    assert done.returncode == 64 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(
        "stockrt: --reload is what the unit's ExecReload= calls: type sudo systemctl "
    )


def test_reload_by_hand_says_what_to_type_in_the_built_file(
    start_pyz: RunPyz, platform: PlatformServer
) -> None:
    done = start_pyz(
        "--reload", env={"INFOWAY_API_KEY": NEW_KEY, "SERVER_IP": "127.0.0.1", "SERVER_PORT": "1"}
    )
    assert done.returncode == 64
    assert "sudo systemctl reload stockrt" in done.stderr and "Traceback" not in done.stderr
    env = {"INFOWAY_API_KEY": NEW_KEY, "SERVER_IP": "127.0.0.1", "SERVER_PORT": "1", "STOCKRT_LANG": "zh"}
    assert start_pyz("--reload", env=env).stderr == (
        "stockrt：--reload 供服务单元的 ExecReload= 调用：请运行 sudo systemctl reload stockrt；"
        "没有服务单元的守护进程，请用 kill -HUP 加其 pid\n"
    )
