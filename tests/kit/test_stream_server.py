"""The stream's simulator: what it says, whom it refuses, how it misbehaves, and that its account is true."""

from __future__ import annotations

import itertools
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import urllib3
import websocket

from kit.cases import each
from kit.daemons import until
from kit.infoway_server import PLANS, make_record
from kit.stream_server import (
    ERRORS,
    MALFORMED,
    REFUSE_BY_RESET,
    REFUSE_BY_SILENCE,
    STRANGER,
    SUBSCRIBE_FAIL,
    SWITCHES,
    Gap,
    Push,
    StreamServer,
    Vendor,
    identity,
    main,
    read_script,
    record_of,
    uncovered,
)

PROGRAM = Path(__file__).with_name("stream_server.py")
TIMEOUT = 60.0
KEY = "test-key"
WELCOME = '{"code":200,"msg":"ws connect success"}'


@pytest.fixture
def server() -> Iterator[StreamServer]:
    """A stream that knows the key "test-key" and has no limits."""
    with StreamServer() as made:
        yield made


def connect(
    server: StreamServer, product: str = "crypto", key: str = KEY, **more: Any
) -> websocket.WebSocket:
    """Shake hands, and do not read the welcome."""
    return websocket.create_connection(f"{server.url}?business={product}&apikey={key}", TIMEOUT, **more)


def welcomed(server: StreamServer, product: str = "crypto", key: str = KEY) -> websocket.WebSocket:
    """Connect, and read the welcome."""
    ws = connect(server, product, key)
    while ws.recv() != WELCOME:
        pass
    return ws


def ask(ws: websocket.WebSocket, codes: str, code: int = 10000) -> str:
    """Subscribe, and return the answer."""
    ws.send(json.dumps({"code": code, "trace": "t1", "data": {"codes": codes}}))
    return str(ws.recv())


def subscribed(
    server: StreamServer, codes: str, product: str = "crypto", key: str = KEY
) -> websocket.WebSocket:
    """Connect and subscribe."""
    ws = welcomed(server, product, key)
    assert json.loads(ask(ws, codes)) == {"code": 10001, "trace": "t1", "msg": "ok"}
    return ws


def next_push(ws: websocket.WebSocket) -> str:
    """The identity of what comes next, which must be a push."""
    frame = json.loads(ws.recv())
    assert frame["code"] == 10002
    assert record_of(identity(frame["data"]).upper()) == frame["data"] | {"s": frame["data"]["s"].upper()}
    return identity(frame["data"])


def refused(server: StreamServer, product: str = "crypto", key: str = KEY) -> int:
    """The status with which a handshake is refused."""
    with pytest.raises(websocket.WebSocketBadStatusException) as caught:
        connect(server, product, key)
    return int(caught.value.status_code)


def end_of(ws: websocket.WebSocket) -> str:
    """How the connection ends, whatever comes before."""
    try:
        while True:
            opcode, _ = ws.recv_data(control_frame=True)
            if opcode == websocket.ABNF.OPCODE_CLOSE:
                return "close"
    except websocket.WebSocketConnectionClosedException:
        return "fin"
    except ConnectionResetError:
        return "rst"


# ------------------------------------------------------------------------------------------------------
# What is said
# ------------------------------------------------------------------------------------------------------


def test_a_session_is_as_it_was_captured(server: StreamServer) -> None:
    """Greeting, welcome, ack and errors: word by word those of the captures of 2026-08."""
    ws = connect(server, "stock")
    assert ws.recv() == "You have permission to subscribe to all market data"
    assert ws.recv() == '{"code":200,"msg":"ws connect success"}'
    trace = "336b52a51cfd4fe5ad4f6c7733d77beb"
    ws.send(
        json.dumps({"code": 10000, "trace": trace, "data": {"codes": "AAPL.US,TSLA.US", "includeTy": True}})
    )
    assert ws.recv() == '{"code":10001,"trace":"336b52a51cfd4fe5ad4f6c7733d77beb","msg":"ok"}'
    ws.send(json.dumps({"code": 10010, "trace": "5eedbc23d32d43d686394d60a12c84e8"}))
    other = connect(server)
    assert other.recv() == '{"code":200,"msg":"ws connect success"}'
    other.send('{"code": 10000, "trace": "408e395555214a2e91b596e351b83c97"}')
    assert json.loads(other.recv()) == {
        "traceId": "408e395555214a2e91b596e351b83c97", "code": 507, "msg": "Param lost：data"}  # fmt: skip
    other.send('{"code": 99999, "trace": "5bd586b3b6884212ba76d78d5fb7ebf2", "data": {"codes": "BTCUSDT"}}')
    told = json.loads(other.recv())
    assert (told["traceId"], told["code"]) == ("5bd586b3b6884212ba76d78d5fb7ebf2", 506)
    assert told["msg"] == "Param error：The code is out of range"
    server.wait_for(lambda it: it.connections[0].heartbeats == 1)


def test_what_is_subscribed_is_pushed_until_it_is_not_any_more(server: StreamServer) -> None:
    ws = subscribed(server, "BTCUSDT,ETHUSDT")
    names = server.trade("BTCUSDT", "SOLUSDT", "ETHUSDT")
    assert [next_push(ws), next_push(ws)] == [names[0], names[2]]
    assert json.loads(ask(ws, "BTCUSDT", 11000)) == {"code": 11010, "trace": "t1", "msg": "ok"}
    more = server.trade("BTCUSDT", "ETHUSDT")
    assert next_push(ws) == more[1]
    server.wait_for(lambda it: it.pushed_count == 3)
    assert server.pushed() == {names[0], names[2], more[1]}
    assert server.made() == {*names, *more}
    assert [(push.connection, push.product, push.code) for push in server.missing({names[0]})] == [
        (1, "crypto", "ETHUSDT"), (1, "crypto", "ETHUSDT")]  # fmt: skip


def test_a_code_of_another_product_is_acked_and_silent(server: StreamServer) -> None:
    ws = subscribed(server, "AAPL.US,CL,BTCUSDT")
    server.trade("AAPL.US", "CL")
    (name,) = server.trade("BTCUSDT")
    assert next_push(ws) == name
    common = subscribed(server, "CL", "common")
    (name,) = server.trade("CL")
    assert next_push(common) == name
    server.wait_for(lambda it: it.pushed_count == 2)
    assert {push.product for push in server.pushes()} == {"crypto", "common"}


def test_codes_that_it_does_not_know_are_silent() -> None:
    with StreamServer(known={"BTCUSDT"}) as server:
        ws = subscribed(server, "ETHUSDT,BTCUSDT")
        _, name = server.trade("ETHUSDT", "BTCUSDT")
        assert next_push(ws) == name


def test_the_market_trades_at_the_rate_for_all_who_listen_and_no_trade_is_like_another() -> None:
    with StreamServer(rate=200.0, market=["SOLUSDT"]) as server:
        clients = [subscribed(server, "BTCUSDT,ETHUSDT") for _ in range(2)]
        seen = [{next_push(ws) for _ in range(50)} for ws in clients]
        assert len(seen[0]) == len(seen[1]) == 50
        assert len(seen[0] & seen[1]) > 10
        server.wait_for(lambda it: it.made_count > 300)
        server.rate = 0.0
        assert {name.split("|")[0] for name in server.made()} == {"BTCUSDT", "ETHUSDT", "SOLUSDT"}
        assert len(server.made()) == server.made_count
        for ws in clients:
            ws.close()


# ------------------------------------------------------------------------------------------------------
# Who is refused
# ------------------------------------------------------------------------------------------------------


def test_handshakes_are_refused_for_the_key_the_plan_and_the_number() -> None:
    narrow = replace(PLANS["premium"], products=frozenset({"crypto"}))
    with StreamServer(plans={"a": narrow}, linger_s=3600.0) as server:
        assert refused(server, key="wrong") == 401
        assert refused(server, "stock", "a") == 401
        assert refused(server, "no such", "a") == 400
        with pytest.raises(websocket.WebSocketBadStatusException):
            websocket.create_connection(server.url.replace("/ws", "/other"), TIMEOUT)
        first = welcomed(server, key="a")
        second = welcomed(server, key="a")
        assert refused(server, key="a") == 429
        second.close()
        server.wait_for(lambda it: len(it.open) == 1)
        assert refused(server, key="a") == 429, "one that just ended counts"
        server.linger_s = 0.0
        third = welcomed(server, key="a")
        assert first.connected and third.connected
        assert server.violations == ["one more than 2 connections"] * 2
        assert [it.status for it in server.connections] == [401, 401, 400, 404, 101, 101, 429, 429, 101]


def test_a_connection_too_many_may_be_told_so_by_an_error_instead() -> None:
    with StreamServer(plans={KEY: PLANS["basic"]}, over_by_512=True) as server:
        first, late = welcomed(server), connect(server)
        assert json.loads(late.recv())["code"] == 512
        assert end_of(late) == "fin"
        assert first.connected


def test_codes_over_the_plan_are_refused_by_connection_and_over_all() -> None:
    plan = replace(PLANS["premium"], symbols_per_socket=3, symbols=4)
    with StreamServer(plans={KEY: plan}, codes_linger_s=3600.0) as server:
        ws = subscribed(server, "AUSDT,BUSDT,BTCUSDT")
        assert json.loads(ask(ws, "AUSDT"))["code"] == 10001, "it has it"
        assert json.loads(ask(ws, "DUSDT,EUSDT")) == {
            "traceId": "t1", "code": 505, "msg": "Products quantity exceeds the limit：3"}  # fmt: skip
        other = subscribed(server, "DUSDT")
        assert json.loads(ask(other, "EUSDT"))["code"] == 516
        other.close()
        server.wait_for(lambda it: len(it.open) == 1)
        again = welcomed(server)
        assert json.loads(ask(again, "DUSDT,EUSDT"))["code"] == 516, "those of before count for a while"
        server.codes_linger_s = 0.0
        assert json.loads(ask(again, "EUSDT"))["code"] == 10001
        assert server.subscribed == {"AUSDT", "BUSDT", "BTCUSDT", "EUSDT"}
        assert [words.split(":")[1] for words in server.violations] == [" 505", " 516", " 516"]


def test_too_many_frames_end_the_connection_and_ban_the_key() -> None:
    with StreamServer(frames=4, ban_after=1) as server:
        ws = welcomed(server)
        for _ in range(3):
            ws.send('{"code":10010,"trace":"t"}')
        ws.ping()
        ws.send('{"code":10010,"trace":"t"}')
        assert json.loads(ws.recv())["code"] == 501
        assert end_of(ws) == "fin"
        assert server.connections[0].end == "error 501"
        assert server.violations == ["connection 1: more than 4 frames in 60 s"]
        late = connect(server)
        assert json.loads(late.recv())["code"] == 511
        server.ban_after, server.frame_window_s = 0, 0.001
        patient = welcomed(server)
        for _ in range(6):
            assert json.loads(ask(patient, "BTCUSDT"))["code"] == 10001
            time.sleep(0.002)


def test_a_missed_heartbeat_ends_the_connection() -> None:
    with StreamServer(heartbeat_s=0.3) as server:
        alive, dead = welcomed(server), welcomed(server)

        def beats(number: int) -> Callable[[StreamServer], bool]:
            return lambda it: it.connections[0].heartbeats == number or it.connections[1].end != ""

        for number in itertools.count(1):
            alive.send('{"code":10010,"trace":"t"}')
            server.wait_for(beats(number))
            if server.connections[1].end:
                break
            time.sleep(0.02)
        assert json.loads(dead.recv()) == {"traceId": "", "code": 513, "msg": "Heartbeat timeout"}
        assert (end_of(dead), server.connections[1].end) == ("fin", "error 513")
        assert server.connections[0].is_open


@pytest.mark.parametrize("code", ERRORS)
def test_every_error_can_be_told_and_is_in_its_form(code: int, server: StreamServer) -> None:
    ws, stock = welcomed(server), welcomed(server, "stock")
    server.error(code)
    told = str(stock.recv())
    assert told.startswith(SUBSCRIBE_FAIL)
    assert json.loads(told.removeprefix(SUBSCRIBE_FAIL)) == json.loads(ws.recv())
    if code in (501, 508, 521):
        assert end_of(ws) == end_of(stock) == "fin"
    elif code in (505, 520):
        server.refuse(code, form="prose")
        assert ask(ws, "BTCUSDT").startswith(SUBSCRIBE_FAIL + ERRORS[code][:8])
        assert json.loads(ask(ws, "BTCUSDT"))["code"] == 10001


def test_acks_are_withheld_frames_lost_and_handshakes_refused_as_told(server: StreamServer) -> None:
    server.refuse_handshakes(500, 429, REFUSE_BY_RESET, REFUSE_BY_SILENCE)
    assert [refused(server), refused(server)] == [500, 429]
    with pytest.raises((ConnectionResetError, websocket.WebSocketConnectionClosedException)):
        connect(server)
    with pytest.raises((TimeoutError, websocket.WebSocketTimeoutException)):
        websocket.create_connection(f"{server.url}?business=crypto&apikey={KEY}", 0.2)
    server.withhold_acks, server.lose_frames = 1, 1
    ws = welcomed(server)
    for codes in ("AUSDT", "BUSDT", "BTCUSDT"):
        ws.send(json.dumps({"code": 10000, "trace": codes, "data": {"codes": codes}}))
    assert json.loads(ws.recv())["trace"] == "BTCUSDT"
    assert server.subscribed == {"BUSDT", "BTCUSDT"}
    server.ack_delay_s = 0.05
    ws.send(json.dumps({"code": 10000, "trace": "late", "data": {"codes": "DUSDT"}}))
    (name,) = server.trade("BTCUSDT")
    assert next_push(ws) == name
    assert json.loads(ws.recv())["trace"] == "late"


# ------------------------------------------------------------------------------------------------------
# Misbehaviour
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["fin", "rst", "mid_frame", "close"])
def test_cut_offs(how: str, server: StreamServer) -> None:
    cut, other = subscribed(server, "BTCUSDT"), subscribed(server, "BTCUSDT")
    server.cut(how, connection=1)
    assert end_of(cut) == {"mid_frame": "fin"}.get(how, how)
    assert server.connections[0].end == how
    (name,) = server.trade("BTCUSDT")
    assert next_push(other) == name
    server.wait_for(lambda it: it.pushed_count == 1)
    assert [push.connection for push in server.pushes()] == [2]


def test_silence_ends_with_a_new_subscription_or_when_told(server: StreamServer) -> None:
    ws = subscribed(server, "BTCUSDT,ETHUSDT")
    server.fall_silent()
    server.trade("BTCUSDT")
    assert json.loads(ask(ws, "BTCUSDT"))["code"] == 10001
    name, _ = server.trade("BTCUSDT", "ETHUSDT")
    assert next_push(ws) == name
    server.silent = True
    server.trade("BTCUSDT")
    server.silent = False
    (last,) = server.trade("BTCUSDT")
    assert next_push(ws) == last
    server.wait_for(lambda it: it.pushed_count == 2)
    assert server.pushed() == {name, last}, "what nobody was sent is no push"


def test_duplicates_strangers_and_rubbish_come_between(server: StreamServer) -> None:
    ws = subscribed(server, "BTCUSDT")
    server.duplicate_every, server.malformed_every, server.stranger_every = 2, 3, 5
    names = server.trade(*["BTCUSDT"] * 60)
    texts = [str(ws.recv()) for _ in range(60 + 30 + 20 + 12)]
    assert (server.duplicates, server.malformed, server.strangers) == (30, 20, 12)
    pushed = []
    for text in texts:
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            pushed.append(json.loads(text)["data"]["s"])
    assert pushed.count(STRANGER) == 12
    assert sum(text in MALFORMED for text in texts) == 10
    server.wait_for(lambda it: it.pushed_count == 90)
    assert server.pushed() == {*names}


@each("switches", [{"chop": 1}, {"fragment": 7}, {"chop": 3, "fragment": 10}, {"pace_s": 0.001}])
def test_frames_in_odd_pieces_are_the_same_messages(switches: dict[str, Any]) -> None:
    with StreamServer(**switches) as server:
        ws = subscribed(server, "BTCUSDT")
        names = server.trade(*["BTCUSDT"] * 20)
        assert [next_push(ws) for _ in names] == names


def test_lower_case(server: StreamServer) -> None:
    ws = subscribed(server, "BTCUSDT")
    server.lower_case = True
    (name,) = server.trade("BTCUSDT")
    assert next_push(ws) == name.replace("BTCUSDT", "btcusdt")
    server.wait_for(lambda it: it.pushed() == {name})


@pytest.mark.parametrize("how", ["rst", "fin"])
def test_what_a_slow_client_was_not_sent_is_no_push(how: str, server: StreamServer) -> None:
    """Of what is queued, those count that the socket had taken whole; they are the first ones."""
    ws = subscribed(server, "BTCUSDT")
    ws.sock.setsockopt(  # type: ignore[union-attr]
        socket.SOL_SOCKET, socket.SO_RCVBUF, 4096
    )
    server._peers[1]._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    names = server.trade(*["BTCUSDT"] * 10_000)
    assert until(lambda: server.pushed_count or server._peers[1]._sending)  # of the latter no event tells
    server.cut(how)
    pushed = [push.identity for push in server.pushes()]
    assert 0 < len(pushed) < len(names)
    assert pushed == names[: len(pushed)]


def test_a_burst_is_as_fast_as_the_socket_takes_it_and_nothing_is_lost(server: StreamServer) -> None:
    ws = subscribed(server, "BTCUSDT,ETHUSDT")
    count = 5_000
    before = time.monotonic()
    assert before < server.burst(count) < time.monotonic()
    got = {next_push(ws) for _ in range(count)}
    server.wait_for(lambda it: it.pushed_count == count)
    assert server.pushed() == got
    assert len(got) == count


def test_it_comes_back_on_its_port_and_stops_whatever_its_clients_do() -> None:
    server = StreamServer()
    with server:
        port = server.port
        subscribed(server, "BTCUSDT")
        socket.create_connection(("127.0.0.1", port)).sendall(b"GET /ws HTTP/1.1\r\n")
        server.wait_for(lambda it: len(it.connections) == 2)
    assert [it.end for it in server.connections] == ["fin", ""]
    with server:
        assert server.port == port
        welcomed(server).close()


def test_under_tls() -> None:
    with StreamServer(tls=True) as server:
        assert server.url.startswith("wss:")
        ws = connect(server, sslopt={"ca_certs": str(server.ca_file)})
        assert ws.recv() == WELCOME
        assert json.loads(ask(ws, "BTCUSDT"))["code"] == 10001
        names = server.trade(*["BTCUSDT"] * 300)
        assert [next_push(ws) for _ in names] == names


# ------------------------------------------------------------------------------------------------------
# The account, the REST side, by hand
# ------------------------------------------------------------------------------------------------------


def test_a_gap_covers_its_codes_and_its_time() -> None:
    push = Push(1, "crypto", "BTCUSDT", 1_000, "BTCUSDT|900|1|1|0")
    good = Gap("crypto", {"BTCUSDT"}, 900, 900)
    assert uncovered([push], [good]) == []
    wrong = [good._replace(product="stock"), good._replace(codes={"ETHUSDT"}), good._replace(from_ms=901),
             good._replace(from_ms=1, to_ms=899)]  # fmt: skip
    assert uncovered([push], wrong) == [push]


def test_rest_has_the_same_keys_plans_and_last_trades() -> None:
    with (
        Vendor(plans={KEY: PLANS["pro"]}) as vendor,
        urllib3.PoolManager(retries=False, timeout=60.0) as http,
    ):

        def get(path: str) -> Any:
            return http.request("GET", vendor.rest.url + path, headers={"apiKey": KEY}).json()["data"]

        told = get("/package/info")
        assert (told["maxWsConNum"], told["maxNum"], told["allWsNum"]) == (9, 600, 5_000)
        ws = subscribed(vendor.stream, "BTCUSDT")
        (name,) = vendor.stream.trade("BTCUSDT")
        records = get("/crypto/batch_trade/BTCUSDT,ETHUSDT")
        assert next_push(ws) == name == identity(records[0])
        assert identity(records[1]) in vendor.stream.made(), "one that was never pushed has a last trade, too"
        assert records == get("/crypto/batch_trade/BTCUSDT,ETHUSDT")
        assert records[0].keys() == make_record("BTCUSDT", 0).keys()
        assert vendor.settings["INFOWAY_STREAM_URL"] == vendor.stream.url


def test_by_hand() -> None:
    script = "0.01 set rate=60; 0.02 say hello; 600 cut rst"
    options = [
        "--rest-port",
        "0",
        "--plan",
        "free",
        "--rate",
        "50",
        "--codes",
        "BTCUSDT",
        "--set",
        "form=json",
    ]
    command = [sys.executable, "-S", str(PROGRAM), *options, "--script", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url, rest = process.stdout.readline().strip(), process.stdout.readline().strip()
            ws = websocket.create_connection(f"{url}?business=crypto&apikey={KEY}", TIMEOUT)
            ws.send('{"code":10000,"trace":"t","data":{"codes":"BTCUSDT"}}')
            while "10002" not in str(ws.recv()):
                pass
            path = f"{rest}/crypto/batch_trade/BTCUSDT"
            assert urllib3.request("GET", path, headers={"apiKey": KEY}, timeout=TIMEOUT).json()["ret"] == 200
            process.send_signal(signal.SIGINT)
            told = process.stdout.read()
            assert process.wait(TIMEOUT) == 0
        finally:
            process.kill()
    assert told.startswith("1 connections, ") and told.endswith(" pushes, 0 violations\n")


def test_a_wrong_command_line_says_what_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    for argument, value, words in [
        ("--plan", "gold", "free, basic"),
        ("--script", "1 dance", "fall_silent"),
        ("--script", "1 cut softly", "mid_frame"),
        ("--script", "1", "'1'"),
        ("--script", "1 error x", "error x"),
        ("--set", "rat=1", "heartbeat_s"),
        ("--set", "rate=fast", "rate"),
    ]:
        with pytest.raises(SystemExit) as ended:
            main([argument, value])
        said = capsys.readouterr()
        assert (ended.value.code, said.out) == (2, "") and words in said.err, said.err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for option in ("--port", "--rest-port"):
            done = subprocess.run(
                [sys.executable, str(PROGRAM), option, port], capture_output=True, text=True
            )
            assert done.returncode == 1
            assert done.stderr == (f"cannot listen on 127.0.0.1:{port}: Address already in use; "
                                   f"end what listens there, or name another port: {option}\n")  # fmt: skip


def test_the_script_is_read_in_the_order_of_its_times() -> None:
    steps = read_script(" 20 error 513;3 cut rst; ; 5.5 say two words ; 7 set rate=2 silent=true")
    assert [(it.at, it.action) for it in steps] == [(3, "cut"), (5.5, "say"), (7, "set"), (20, "error")]
    with StreamServer() as server:
        ws = welcomed(server)
        steps[1].run(server)
        assert ws.recv() == "two words"
        steps[2].run(server)
        assert (server.rate, server.silent) == (2.0, True)
        steps[0].run(server)
        assert end_of(ws) == "rst"


@each("name", SWITCHES)
def test_a_switch_takes_only_what_it_can_be(name: str) -> None:
    wrong: dict[str, Any] = {name: [1]}
    with pytest.raises(ValueError, match=name):
        StreamServer(**wrong)
