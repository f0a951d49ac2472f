"""The servers that the tests lean on behave as they say."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import urllib3
from bson import Int64
from bson.decimal128 import Decimal128
from conftest import controlled
from pymongo.errors import AutoReconnect, BulkWriteError, OperationFailure, PyMongoError, WriteConcernError

from kit.daemons import until
from kit.infoway_server import (
    MAX_CODES,
    RATE_REFUSALS,
    REFUSALS,
    SPOILERS,
    Answer,
    InfowayServer,
    make_record,
)
from kit.mongo import NOT_REPLICATED, Member, MongoServer, ReplicaSet, Unavailable, check_runs

KEY = {"apiKey": "test-key"}
CODES = ("AAPL.US", "00700.HK", "600519.SH", "000001.SZ")


@pytest.fixture
def http() -> Iterator[urllib3.PoolManager]:
    """A client without retries and with short time limits."""
    with urllib3.PoolManager(retries=False, timeout=60.0) as pool:
        yield pool


def ask(
    http: urllib3.PoolManager, server: InfowayServer, path: str, key: str = "test-key"
) -> tuple[int, Any]:
    """GET and return the status and the JSON of the answer."""
    answer = http.request("GET", server.url + path, headers={"apiKey": key})
    return answer.status, answer.json()


# ---------------------------------------------------------------------------------------------- Infoway


def test_trades_are_the_same_until_the_tick(http: urllib3.PoolManager, infoway: InfowayServer) -> None:
    path = f"/stock/batch_trade/{','.join(CODES)}"
    status, first = ask(http, infoway, path)
    assert (status, first["ret"], first["msg"]) == (200, 200, "success")
    assert [record["s"] for record in first["data"]] == [*CODES]
    assert first["data"] == [infoway.record(code) for code in CODES]
    assert ask(http, infoway, path)[1]["data"] == first["data"]
    infoway.bump()
    later = ask(http, infoway, path)[1]["data"]
    assert all(new["t"] > old["t"] for new, old in zip(later, first["data"], strict=True))
    for record in later:
        assert [type(record[name]) for name in ("s", "t", "p", "v", "vw", "td")] == [
            str,
            int,
            str,
            str,
            str,
            int,
        ]
    assert infoway.connections == 1
    assert [request.codes for request in infoway.requests] == [CODES] * 3


def test_turnover_is_price_times_volume() -> None:
    for code, tick in itertools.product(("AAPL.US", "BTCUSDT", "USDCNY", "00700.HK", "2330.TW"), range(50)):
        record = make_record(code, tick)
        assert Decimal(record["vw"]) == Decimal(record["p"]) * Decimal(record["v"])
        assert "E" not in record["vw"]


def test_a_code_is_known_to_its_product_alone(http: urllib3.PoolManager, infoway: InfowayServer) -> None:
    codes = {
        "stock": (*CODES, ".DJI.US", "BRK.B.US"), "japan": ("7203.JP",), "korea": ("005930.KS",),
        "india": ("RELIANCE.IN",), "taiwan": ("2330.TW",), "crypto": ("BTCUSDT",), "common": ("USDCNY", "XAUUSD"),
    }  # fmt: skip
    for product, name in itertools.product(codes, codes):
        for code in codes[product]:
            _, answer = ask(http, infoway, f"/{name}/batch_trade/{code}")
            assert answer["ret"] == (200 if name == product else 508), f"{code} at {name}"


def test_unknown_codes_are_missing(http: urllib3.PoolManager, infoway: InfowayServer) -> None:
    infoway.unknown = {"GONE.US"}
    _, answer = ask(http, infoway, "/stock/batch_trade/GONE.US,AAPL.US,700.HK")
    assert [record["s"] for record in answer["data"]] == ["AAPL.US"]
    forms: dict[Any, Any] = {"ret_508": (508, None), "ret_500": (500, None), "data_null": (200, None)}
    for infoway.all_unknown, expected in forms.items():
        _, answer = ask(http, infoway, "/stock/batch_trade/GONE.US")
        assert (answer["ret"], answer["data"]) == expected


def test_refusals_of_the_request_itself(http: urllib3.PoolManager, infoway: InfowayServer) -> None:
    many = ",".join(f"{number:06}.SH" for number in range(MAX_CODES + 1))
    _, answer = ask(http, infoway, f"/stock/batch_trade/{many}")
    assert (answer["ret"], answer["msg"]) == (505, "Products quantity exceeds the limit：100")
    status, answer = ask(http, infoway, "/stock/batch_trade/AAPL.US", key="wrong")
    assert (status, answer) == (401, {"code": 401, "message": "Token invalid", "timestamp": 1786778697472})
    for path in (
        "/common/basic/markets/trading_hours",
        "/stock/batch_trade/",
        "/mars/batch_trade/AAPL.US",
        "/",
    ):
        status, answer = ask(http, infoway, path)
        assert (status, answer["status"], answer["title"]) == (404, 404, "Not Found")
        assert answer["instance"] == path


def test_rate_limit_slides_and_refuses_in_turn(http: urllib3.PoolManager) -> None:
    with InfowayServer(per_second=3, keys={"a", "b"}) as server:
        url = f"{server.url}/stock/batch_trade/AAPL.US"
        bodies = [http.request("GET", url, headers={"apiKey": "a"}).data for _ in range(7)]
        assert [b'"ret":200' in body for body in bodies] == [True] * 3 + [False] * 4
        assert bodies[3:] == [REFUSALS[name].body for name in RATE_REFUSALS]
        assert b'"ret":200' in http.request("GET", url, headers={"apiKey": "b"}).data
        assert [request.over_limit for request in server.requests] == [False] * 3 + [True] * 4 + [False]
        assert server.over_limit == 4


def test_every_refusal_is_given_as_written(http: urllib3.PoolManager, infoway: InfowayServer) -> None:
    infoway.script = REFUSALS.values()
    for answer in REFUSALS.values():
        got = http.request("GET", f"{infoway.url}/stock/batch_trade/AAPL.US", headers=KEY)
        assert (got.status, got.data, got.headers["Content-Type"]) == (
            answer.status,
            answer.body,
            answer.content_type,
        )
    assert infoway.connections == 1


def test_script_is_a_function_or_a_list(http: urllib3.PoolManager, infoway: InfowayServer) -> None:
    path = "/stock/batch_trade/AAPL.US,TSLA.US"
    infoway.script = [None, REFUSALS["500_empty"].with_headers(("Retry-After", "2")), Answer.null_record()]
    assert ask(http, infoway, path)[1]["ret"] == 200
    assert http.request("GET", infoway.url + path).headers["Retry-After"] == "2"
    assert [record and record["s"] for record in ask(http, infoway, path)[1]["data"]] == [
        "AAPL.US",
        None,
        "TSLA.US",
    ]
    assert ask(http, infoway, path)[1]["ret"] == 200
    infoway.script = lambda request: Answer.data([], ret=len(request.codes))
    assert ask(http, infoway, path)[1]["ret"] == 2


def test_half_bad_answer_has_every_spoilt_record(http: urllib3.PoolManager, infoway: InfowayServer) -> None:
    infoway.script = [Answer.half_bad()]
    codes = [f"{number:06}.SH" for number in range(2 * len(SPOILERS))]
    data = ask(http, infoway, f"/stock/batch_trade/{','.join(codes)}")[1]["data"]
    good = len(SPOILERS)
    assert data[:good] == [infoway.record(code) for code in codes[:good]]
    assert len(data) == len(codes) + 3
    assert all(bad != infoway.record(code) for bad, code in zip(data[good:-3], codes[good:], strict=True))


BROKEN = {
    "short_body": Answer.short_body(),
    "cut_before_answer": Answer.cut_before_answer(),
    "reset": Answer.reset(),
    "cut_mid_body": Answer.cut_mid_body(),
    "cut_chunk": Answer.cut_chunk(),
    "bad_chunk": Answer.bad_chunk(),
    "gzip_broken": Answer.gzip_broken(),
    "hang": Answer.hang(),
    "drip_head": Answer.drip("head", 60.0),
    "drip_body": Answer.drip("body", 60.0),
}


def test_odd_but_good_delivery(http: urllib3.PoolManager, infoway: InfowayServer) -> None:
    infoway.script = [Answer.chunked(), Answer.gzip(), Answer.drip("body", 0.0)]
    headers = KEY | {"Accept-Encoding": "gzip"}
    for _ in range(4):
        got = http.request("GET", f"{infoway.url}/stock/batch_trade/AAPL.US", headers=headers)
        assert got.json()["data"] == [infoway.record("AAPL.US")]
    assert infoway.connections == 1


def test_broken_delivery(http: urllib3.PoolManager, infoway: InfowayServer) -> None:
    url = f"{infoway.url}/stock/batch_trade/AAPL.US"
    for name, answer in BROKEN.items():
        infoway.script = [answer]
        with pytest.raises(urllib3.exceptions.HTTPError):
            pytest.fail(f"{name}: {http.request('GET', url, headers=KEY, timeout=0.2).data!r}")
        assert http.request("GET", url, headers=KEY).json()["ret"] == 200


def test_whole_answer_that_is_no_json(http: urllib3.PoolManager, infoway: InfowayServer) -> None:
    for answer in (Answer.malformed_json(), Answer.empty(), Answer.html(), Answer.understated_length()):
        infoway.script = [answer]
        got = http.request("GET", f"{infoway.url}/stock/batch_trade/AAPL.US", headers=KEY)
        assert got.status == 200
        with pytest.raises(ValueError, match=r"Expecting|Unterminated"):
            got.json()
        http.clear()  # what follows an understated length would be the next answer


def test_huge_answer(http: urllib3.PoolManager, infoway: InfowayServer) -> None:
    for chunked in (False, True):
        infoway.script = [Answer.huge(3_000_000, chunked=chunked)]
        got = http.request("GET", f"{infoway.url}/stock/batch_trade/AAPL.US", headers=KEY)
        assert len(got.data) > 3_000_000
        assert got.json()["data"] == []


def test_large_answers_from_few_bytes(http: urllib3.PoolManager, infoway: InfowayServer) -> None:
    infoway.script = [Answer.gzip_bomb(3_000_000), Answer.nested(50_000)]
    url = f"{infoway.url}/stock/batch_trade/AAPL.US"
    assert len(http.request("GET", url, headers=KEY).data) > 2_900_000
    with pytest.raises(RecursionError):
        json.loads(http.request("GET", url, headers=KEY).data)


def test_latency_and_requests_in_flight() -> None:
    gate = threading.Event()

    def latency(_: object) -> float:
        gate.wait(60)
        return 0.0

    with (
        InfowayServer(latency=latency) as server,
        urllib3.PoolManager(maxsize=4) as http,
        ThreadPoolExecutor(4) as pool,
    ):
        asked = [pool.submit(ask, http, server, "/stock/batch_trade/AAPL.US") for _ in range(4)]
        server.wait_for(lambda it: it.in_flight == 4)
        gate.set()
        assert [future.result()[0] for future in asked] == [200] * 4
        server.wait_for(lambda it: it.in_flight == 0)
        assert server.peak_in_flight == 4
        with pytest.raises(TimeoutError):
            server.wait_for(lambda it: it.request_count > 4, timeout=0.01)


def test_stop_ends_a_hanging_request_and_start_takes_the_same_port() -> None:
    server = InfowayServer(script=[Answer.hang()])
    server.start()
    url = f"{server.url}/stock/batch_trade/AAPL.US"
    with urllib3.PoolManager(retries=False, timeout=600) as http, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(http.request, "GET", url, headers=KEY)
        server.wait_for(lambda it: it.in_flight == 1)
        server.stop()
        with pytest.raises(urllib3.exceptions.HTTPError):
            asked.result(60)
        with pytest.raises(urllib3.exceptions.HTTPError):
            http.request("GET", url, headers=KEY)
        server.start()
        assert http.request("GET", url, headers=KEY).status == 200
    server.stop()


def test_connection_is_closed_unannounced_after_its_requests(http: urllib3.PoolManager) -> None:
    with InfowayServer(requests_per_connection=2) as server:
        for _ in range(2):
            for _ in range(2):
                assert ask(http, server, "/stock/batch_trade/AAPL.US")[0] == 200
            server.wait_for(lambda it: it.open_connections == 0)
        assert server.connections == 2


def test_trading_days(http: urllib3.PoolManager) -> None:
    path = "/common/basic/markets/trading_days?market=US&beginDay=20261124&endDay=20261130"
    with InfowayServer(half_days={"20261127"}, holidays={"20261126"}) as server:
        data = ask(http, server, path)[1]["data"]
        assert data == {"trade_days": ["20261124", "20261125", "20261130"], "half_trade_days": ["20261127"]}
        server.half_days_are_trade_days = True
        assert "20261127" in ask(http, server, path)[1]["data"]["trade_days"]
        assert ask(http, server, path.replace("US", "XX"))[1]["ret"] == 506
        assert ask(http, server, path.replace("2026", "x"))[0] == 400


def test_tls() -> None:
    with InfowayServer(tls=True) as server:
        with urllib3.PoolManager(ca_certs=str(server.ca_file)) as http:
            assert ask(http, server, "/stock/batch_trade/AAPL.US")[1]["ret"] == 200
        with urllib3.PoolManager(retries=False) as http, pytest.raises(urllib3.exceptions.SSLError):
            ask(http, server, "/stock/batch_trade/AAPL.US")


def test_by_hand(http: urllib3.PoolManager) -> None:
    program = Path(__file__).with_name("infoway_server.py")
    command = [sys.executable, "-S", str(program), "--key", "k", "--answer", "429_html"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            assert http.request("GET", f"{url}/stock/batch_trade/AAPL.US", headers=KEY).status == 429
            process.terminate()
            assert process.wait(60) == 0
            assert process.stdout.read() == "1 requests, 0 over the limit\n"
        finally:
            process.kill()  # else a failure waits for it for ever


# ---------------------------------------------------------------------------------------------- MongoDB


def test_mongo_reports_duplicates_and_stores_the_others(
    mongo_server: MongoServer, mongo_db: tuple[str, str]
) -> None:
    uri, name = mongo_db
    assert uri == mongo_server.uri
    with mongo_server.client() as client:
        trades = client[name]["realtime"]
        trades.insert_one({"_id": "b"})
        with pytest.raises(BulkWriteError) as caught:
            trades.insert_many([{"_id": "a"}, {"_id": "b"}, {"_id": "c"}], ordered=False)
        assert caught.value.details is not None
        assert [(it["index"], it["code"]) for it in caught.value.details["writeErrors"]] == [(1, 11000)]
        assert trades.count_documents({}) == 3


def test_mongo_database_is_fresh(mongo_server: MongoServer, mongo_db: tuple[str, str]) -> None:
    with mongo_server.client() as client:
        assert client[mongo_db[1]].list_collection_names() == []


def test_mongo_outlives_kill_pause_and_restart(mongo_server: MongoServer, mongo_db: tuple[str, str]) -> None:
    controlled(mongo_server)
    port, trades = mongo_server.port, mongo_db[1]
    with mongo_server.client(serverSelectionTimeoutMS=300, socketTimeoutMS=300) as client:
        client[trades]["realtime"].insert_one({"_id": "before"})
        mongo_server.checkpoint()
        mongo_server.kill()
        assert not mongo_server.running
        with pytest.raises(PyMongoError):
            client[trades]["realtime"].insert_one({"_id": "down"})
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", port), timeout=1)
    mongo_server.start()
    with mongo_server.client(serverSelectionTimeoutMS=300, socketTimeoutMS=300) as client:
        client.admin.command("ping")
        mongo_server.pause()
        with pytest.raises(PyMongoError):
            client[trades]["realtime"].insert_one({"_id": "paused"})
        mongo_server.resume()
    mongo_server.restart()
    assert mongo_server.port == port
    with mongo_server.client() as client:
        assert client[trades]["realtime"].find_one({"_id": "before"}) == {"_id": "before"}


def test_mongo_stores_decimals(mongo_server: MongoServer, mongo_db: tuple[str, str]) -> None:
    with mongo_server.client() as client:
        prices = client[mongo_db[1]]["realtime"]
        prices.insert_one({"_id": "a", "p": Decimal128("1.10")})
        assert prices.find_one() == {"_id": "a", "p": Decimal128("1.10")}


def test_mongo_commands_fail_as_long_as_they_are_told_to(
    mongo_server: MongoServer, mongo_db: tuple[str, str]
) -> None:
    server, name = controlled(mongo_server), mongo_db[1]
    with server.client(retryWrites=False) as client:
        one, other = client[name]["one"], client[name]["other"]

        def code() -> int | None:
            try:
                one.insert_one({})
            except OperationFailure as error:
                return error.code
            return None

        with server.failing("insert", error_code=13, namespace=f"{name}.one") as outer:
            assert code() == 13
            other.insert_one({})
            with server.failing("insert", error_code=50, times=1):
                assert (code(), code()) == (50, None)
            assert code() == 13
        assert code() is None
        assert outer.hits > 0
        with server.failing("insert", close_connection=True), pytest.raises(AutoReconnect):
            one.insert_one({})
        with server.failing("insert", write_concern_error=NOT_REPLICATED), pytest.raises(WriteConcernError):
            one.insert_one({"_id": "applied"})
        assert one.find_one({"_id": "applied"}) is not None


@pytest.mark.long  # in short: what elects under load, in the tests of faults
def test_three_members_elect_another_and_take_the_first_back(
    replica_set: ReplicaSet, replica_db: tuple[str, str]
) -> None:
    with replica_set.client(heartbeatFrequencyMS=500, connectTimeoutMS=1000) as client:
        trades = client[replica_db[1]]["realtime"]
        for number, fault in enumerate((Member.kill, Member.pause, Member.cut_off)):
            first = replica_set.primary()
            fault(first)
            assert replica_set.wait_for_primary(first) is not first
            trades.insert_one({"_id": number})
            replica_set.ensure_running()
        assert replica_set.step_down() in replica_set.members
        assert trades.count_documents({}) == 3


def test_a_standalone_refuses_retryable_writes(
    standalone: MongoServer, standalone_db: tuple[str, str]
) -> None:
    """A driver that sees what it talks to asks for none; one that asks is told so."""
    insert = {"insert": "realtime", "documents": [{"_id": 1}], "txnNumber": Int64(1)}
    with standalone.client() as client:
        client[standalone_db[1]]["realtime"].insert_one({})
        with pytest.raises(OperationFailure, match="Transaction numbers"):
            client[standalone_db[1]].command(insert)


ABANDONED = """
import os, sys
from pathlib import Path
from kit.mongo import NOT_REPLICATED, Member, MongoServer, ReplicaSet, Unavailable, check_runs
server = MongoServer(Path(sys.argv[1]))
server.start()
print(server._home.path, server._process.pid, flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_server_and_its_folder_end_with_tests_that_are_killed(mongod: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    killed = subprocess.run(
        [sys.executable, "-c", ABANDONED, mongod], env=environment, capture_output=True, text=True, timeout=60
    )
    assert killed.returncode == -9, killed.stderr
    folder, process = killed.stdout.split()
    assert until(lambda: not Path(folder).exists() and not Path("/proc", process).exists())


def test_what_a_mongod_lacks_is_named_as_a_package(tmp_path: Path) -> None:
    program = tmp_path / "mongod"
    said = "mongod: error while loading shared libraries: libcurl.so.4: cannot open shared object file: No such file"
    program.write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 127\n")
    program.chmod(0o755)
    with pytest.raises(Unavailable, match=r"lacks libcurl\.so\.4: install libcurl4 "):
        check_runs(program)
