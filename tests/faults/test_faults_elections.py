"""Fault 4, with the primary killed: a daemon that executes without pause, and a quota that processes share."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pytest
from conftest import MakeWorld
from kit.daemons import PATIENCE, number
from kit.fault_world import World, balanced
from kit.infoway_server import InfowayServer
from kit.mongo import SET_NAME, ReplicaSet

import stockrt

KILLS = number(10, 100, quick=2)
# A session that is over: a close follows from each trade.
LONG_AGO_MS = round(datetime(2026, 8, 12, 15, tzinfo=UTC).timestamp() * 1000)


def kill_one_after_the_other(world: World, members: ReplicaSet, times: int) -> None:
    """Kill the primary, again and again; each time the daemon must have worked with it."""
    for _ in range(times):
        stored = len(at_once(world))
        first = members.primary()
        assert world.platform.wait_for(lambda _, n=stored: len(at_once(world)) > n, PATIENCE)  # type: ignore[misc]
        first.kill()
        members.wait_for_primary(first)
        first.server.start()


def at_once(world: World) -> list[str]:
    """Return the executions whose trades MongoDB had when they were answered."""
    results = world.platform.results
    return [result.execution_id for result in results if not result.data["result"].get("kept_count")]


@pytest.mark.long  # an election in the middle of everything is tried in rooms/test_mongo_real.py
@pytest.mark.parametrize(
    "closes", [pytest.param(False, marks=pytest.mark.long), True], ids=["trades", "trades and closes"]
)
def test_primaries_that_are_killed_under_load_lose_and_double_nothing(
    closes: bool, make_world: MakeWorld, replica_set: ReplicaSet, replica_db: tuple[str, str]
) -> None:
    """Documents in the set = what the results counted, none twice; with closes: of each code one, its last trade's."""
    uri = f"{replica_set.uri}?replicaSet={SET_NAME}&timeoutMS=4000"
    world = make_world(uri, (), None, replica_db)
    if closes:
        world.feed._next_t = LONG_AGO_MS
    world.start()
    with world.load(0.02, 10):
        kill_one_after_the_other(world, replica_set, KILLS)
    account = world.final_account()
    balanced("election", KILLS, account, world.daemon.log)
    assert account.acknowledged == len(world.feed.records) == world.count(), "a code failed"
    with world.client() as client:
        found = {d["stock_code"]: d["t"] for d in client[world.database]["close"].find()}
    expected = {record["s"]: record["t"] for record in world.feed.records.values()} if closes else {}
    assert found == expected


KEYS = ("first-key", "other-key")
PER_MINUTE = 20
# A lease that was granted, and whose answer the election took away, is not used.
LEASES_LOST = 6

WORKER = """
import sys, threading
import stockrt
url, uri, name, state, keys = sys.argv[1:]
environ = {"INFOWAY_API_KEY": keys, "INFOWAY_API_BASE_URL": url, "MONGODB_HOST": uri, "MONGODB_DB_NAME": name,
           "STATE_DIRECTORY": state}
settings = stockrt.load_settings(environ, None, (), is_root=False).settings
stockrt.LEDGER_TIMEOUT_S = 60.0  # however long a busy machine takes to elect: nobody counts alone
mongo = stockrt.MongoStore(settings)
here = stockrt.LocalLedger(stockrt.open_store_file(settings.state_directory))
ledger = stockrt.SharedLedger(mongo.collection(settings.license_name), here)
plan = stockrt.Plan("x", 3, 20, 0)
api = stockrt.InfowayApi(url, stockrt.KeyPool([(key, plan) for key in settings.api_keys], ledger))
stop = threading.Event()
batches = (stockrt.Batch("stock", f"A{number}.US") for number in range(10**9))
print("ready", flush=True)
sys.stdin.readline()
threading.Thread(target=lambda: (sys.stdin.readline(), stop.set()), daemon=True).start()
print(sum(bool(outcome and outcome.trades) for outcome in api.fetch(batches, stop)), flush=True)
"""


def start_worker(server: InfowayServer, place: tuple[str, str], folder: Path) -> subprocess.Popen[str]:
    """Start a process that fetches as much as it may, from one line that it gets to the next."""
    arguments = [server.url, *place, str(folder), ",".join(KEYS)]
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(Path(stockrt.__file__).parent)},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def tell(workers: list[subprocess.Popen[str]]) -> None:
    """Send each of them a line."""
    for process in workers:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()


@pytest.mark.long  # the same
def test_a_shared_quota_holds_while_the_primary_is_killed(
    replica_set: ReplicaSet, replica_db: tuple[str, str], tmp_path: Path
) -> None:
    """Three processes and two keys: none is used above its minute, by the count of the API."""
    place = (f"{replica_set.uri}?replicaSet={SET_NAME}", replica_db[1])
    with InfowayServer(keys=frozenset(KEYS), per_minute=PER_MINUTE) as server:
        workers = [start_worker(server, place, tmp_path / str(n)) for n in range(3)]
        tell(workers)
        server.wait_for(lambda server: server.request_count >= 6, PATIENCE)
        first = replica_set.primary()
        first.kill()
        replica_set.wait_for_primary(first)
        server.wait_for(lambda server: server.request_count >= 2 * PER_MINUTE - LEASES_LOST, 2 * PATIENCE)
        with contextlib.suppress(TimeoutError):  # all want more, and may not have it
            server.wait_for(lambda server: server.request_count > 2 * PER_MINUTE, 1.0)
        tell(workers)
        words = [process.communicate(timeout=2 * PATIENCE) for process in workers]
        assert [process.returncode for process in workers] == [0, 0, 0], words
    assert server.over_limit == 0, words
    used = Counter(request.key for request in server.requests)
    assert max(used.values()) <= PER_MINUTE, used
    assert "alone" not in "".join(err for _, err in words)
    assert sum(int(out) for out, _ in words) == server.request_count
