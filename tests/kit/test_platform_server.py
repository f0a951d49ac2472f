"""The simulator of the dispatch platform behaves as the platform's protocol says."""

from __future__ import annotations

import json
import signal
import socket
import struct
import subprocess
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import websocket

from kit.platform_server import BIG_FRAME, GARBAGE, GENERATIONS, NOT_JSON, PlatformProcess, PlatformServer

NEEDED = {"name": "股票实时数据获取模块", "description": "d", "input_data": "[]", "output_data": "[]"}
RESULT = {"type": "result", "status": "success", "result": {"status": "success", "total": 1}}
TIMEOUT = 60.0

clients: list[websocket.WebSocket] = []


def fetch(url: str, body: bytes | None = None) -> tuple[int, str]:
    """Status and text of an HTTP answer, whatever its status."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, body, timeout=TIMEOUT) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def register(url: str, **params: str) -> tuple[int, str]:
    """Call /module/register."""
    return fetch(f"{url}/module/register?{urllib.parse.urlencode(params)}")


def registered(url: str, **params: str) -> str:
    """Register anew and return the hash."""
    status, text = register(url, **{**NEEDED, **params})
    answer = json.loads(text)
    assert (status, answer["code"]) == (200, "2000")
    return str(answer["result"]["hash"])


def online(url: str) -> list[str]:
    """The hashes at /module/online."""
    return [row["module_hash"] for row in json.loads(fetch(f"{url}/module/online")[1])["result"]]


def connect(url: str, query: str) -> websocket.WebSocket:
    """Open the WebSocket with a raw query."""
    made = websocket.create_connection(
        f"{url.replace('http', 'ws')}/websocket?{query}",
        timeout=TIMEOUT,
        http_no_proxy=["*"],
        skip_utf8_validation=True,
    )
    assert isinstance(made, websocket.WebSocket)
    clients.append(made)
    return made


def raw(client: websocket.WebSocket) -> socket.socket:
    """The socket under a WebSocket."""
    assert client.sock is not None
    return client.sock


def cut(client: websocket.WebSocket) -> None:
    """End a connection without a close frame, if it is not ended yet."""
    if client.sock is not None:
        client.sock.close()


def hang_up() -> None:
    """End every connection a test has left open."""
    while clients:
        cut(clients.pop())


def refused(url: str, query: str) -> int:
    """The status a handshake is refused with; 0 when it is granted."""
    try:
        cut(connect(url, query))
    except websocket.WebSocketBadStatusException as error:
        return int(error.status_code)
    return 0


def result_for(execution_id: str, **more: object) -> str:
    """The text of a result."""
    return json.dumps({**RESULT, "meta": {"execution_id": execution_id}, **more})


@pytest.fixture(autouse=True)
def no_connection_left() -> Iterator[None]:
    """No socket outlives its test."""
    yield
    hang_up()


@pytest.fixture
def server() -> Iterator[PlatformServer]:
    """The newer server, which knows the hash "-7"."""
    with PlatformServer() as made:
        made.know("-7")
        yield made
        hang_up()


@pytest.fixture
def old_server() -> Iterator[PlatformServer]:
    """The older server, which knows the hash "-7"."""
    with PlatformServer(generation="old") as made:
        made.know("-7")
        yield made
        hang_up()


# --- registration -------------------------------------------------------------------------------------------


def test_the_newer_server_registers(server: PlatformServer) -> None:
    status, text = register(server.url, **NEEDED, modelHash="a")
    answer = json.loads(text)
    assert (status, answer["code"], answer["message"]) == (200, "2000", "成功!")
    assert int(answer["result"]["hash"]) != 0
    assert answer["result"]["module_id"] == 2
    assert register(server.url, **NEEDED, modelHash="a") == (
        400,
        '{"code": "3005", "message": "模块重复注册!", "result": null}',
    )
    assert registered(server.url, modelHash="b") != answer["result"]["hash"]
    assert [call.status for call in server.register_calls] == [200, 400, 200]


def test_the_older_server_registers(old_server: PlatformServer) -> None:
    status, text = register(old_server.url, name="m", description="d", dataRequirement="[]")
    assert (status, list(json.loads(text)["result"])) == (200, ["hash"])
    assert register(old_server.url, name="m", description="d", modelHash="other")[0] == 400
    assert "3002" in register(old_server.url, name="n", dataRequirement="[")[1]


def test_the_newer_server_crashes_without_input_data(server: PlatformServer) -> None:
    status, text = register(server.url, name="m")
    assert status == 500
    assert text.startswith("<!doctype html>")


def test_bad_data_is_refused(server: PlatformServer) -> None:
    for wrong in ({"name": ""}, {"description": "x" * 501}, {"input_data": "{}"}):
        status, text = register(server.url, **{**NEEDED, **wrong})
        assert (status, json.loads(text)["code"]) == (400, "3002")


def test_any_answer_to_a_registration_can_be_set(server: PlatformServer) -> None:
    server.register_answer = (502, "<html>no</html>")
    assert register(server.url, **NEEDED) == (502, "<html>no</html>")


# --- handshake ----------------------------------------------------------------------------------------------


def test_everything_after_the_last_hash_is_the_hash(server: PlatformServer) -> None:
    for query in ("", "hash=", "hash=-7&v=1", "hash=-8", "module=-7"):
        assert refused(server.url, query) == 403
    client = connect(server.url, "hash=1&v=2&hash=-7")
    assert online(server.url) == ["-7"]
    assert refused(server.url, "hash=-7") == 403
    client.close()
    assert server.wait_for(lambda s: not s.sessions, TIMEOUT)
    assert server.dials[-2].close_code == 1000
    assert refused(server.url, "hash=-7") == 0


def test_an_unclean_end_leaves_the_session_online_until_it_is_swept(server: PlatformServer) -> None:
    cut(connect(server.url, "hash=-7"))
    assert server.wait_for(lambda s: not s.connected, TIMEOUT)
    assert online(server.url) == ["-7"]
    assert refused(server.url, "hash=-7") == 403
    server.zombie_after, server.sweep = 0.0, 0.01
    assert server.wait_for(lambda s: not s.sessions, TIMEOUT)
    server.sweep = 60
    assert online(server.url) == []
    assert refused(server.url, "hash=-7") == 0


def test_refusals_can_be_switched_on(server: PlatformServer) -> None:
    server.refuse_online_for = 30
    assert (refused(server.url, "hash=-7"), online(server.url)) == (403, ["-7"])
    server.refuse_online_for = 0
    server.refuse_unknown = True
    assert (refused(server.url, "hash=-7"), online(server.url)) == (403, [])
    server.refuse_unknown = False
    assert refused(server.url, "hash=-7") == 0


@pytest.mark.parametrize(("code", "still_online"), [(1001, False), (1006, True)])
def test_it_can_close_after_the_handshake(server: PlatformServer, code: int, still_online: bool) -> None:
    server.close_code, server.close_after_handshake = code, True
    client = connect(server.url, "hash=-7")
    if code == 1006:
        with pytest.raises(websocket.WebSocketConnectionClosedException):
            client.recv()
    else:
        assert client.recv_data()[1] == struct.pack("!H", code)
    cut(client)
    assert server.wait_for(lambda s: s.dials[0].closed, TIMEOUT)
    assert (server.dials[0].close_code, bool(server.sessions)) == (code, still_online)


# --- keeping alive ------------------------------------------------------------------------------------------


def test_the_newer_server_pings_and_measures_the_pong(server: PlatformServer) -> None:
    client = connect(server.url, "hash=-7")
    server.ping_every = 0.01
    ping = json.loads(client.recv())
    server.ping_every = 0
    assert ping["type"] == "ping"
    assert len(ping["timestamp"]) == len("2026-01-01T10:00:00.000000")
    client.send('{"type":"pong","timestamp":"2026-01-01T10:00:00"}')
    assert server.wait_for(lambda s: s.pings[0].answered, TIMEOUT)
    assert server.pong_delays("json")[0] > 0


def test_a_ping_without_a_pong_counts_with_its_age(server: PlatformServer) -> None:
    client = connect(server.url, "hash=-7")
    server.ping_now()
    assert json.loads(client.recv())["type"] == "ping"
    first = max(server.pong_delays())
    assert max(server.pong_delays()) > first
    cut(client)
    assert server.wait_for(lambda s: not s.connected, TIMEOUT)
    assert server.pong_delays() == server.pong_delays()


def test_websocket_pings_go_both_ways(server: PlatformServer) -> None:
    client = connect(server.url, "hash=-7")
    client.ping("a")
    assert client.recv_data(control_frame=True) == (websocket.ABNF.OPCODE_PONG, b"a")
    server.swallow_pings = True
    client.ping("b")
    server.ws_ping_every = 0.01
    assert client.recv_data(control_frame=True)[0] == websocket.ABNF.OPCODE_PING  # and not the pong of b
    assert server.wait_for(lambda s: any(p.kind == "ws" and p.answered for p in s.pings), TIMEOUT)


def test_only_text_moves_the_liveness_clock_of_the_newer_server(server: PlatformServer) -> None:
    client = connect(server.url, "hash=-7")
    alive = server.sessions[0].last_alive
    client.ping()
    client.recv_data(control_frame=True)
    assert server.sessions[0].last_alive == alive
    client.send("{}")
    assert server.wait_for(lambda s: s.sessions[0].last_alive > alive, TIMEOUT)
    server.zombie_after, server.sweep = 0.0, 0.01
    assert client.recv_data()[0] == websocket.ABNF.OPCODE_CLOSE
    assert server.wait_for(lambda s: not s.sessions, TIMEOUT)


def test_the_newer_server_complains_about_what_is_not_json(server: PlatformServer) -> None:
    client = connect(server.url, "hash=-7")
    client.send("heartbeat")
    assert json.loads(client.recv()) == NOT_JSON
    assert [frame.text for frame in server.bad_frames] == ["heartbeat"]


def test_the_log_of_a_tour_alarms_nobody_over_the_question_of_a_module() -> None:
    said: list[str] = []
    with PlatformServer(ping_every=0, log=said.append) as server:
        server.know("-7")
        client = connect(server.url, "hash=-7")
        client.send("heartbeat")
        assert json.loads(client.recv()) == NOT_JSON
        assert server.wait_for(
            lambda _: any("not JSON ← heartbeat (a module asks so once" in line for line in said), 5
        )
    assert not any("WARNING" in line for line in said)


def test_the_older_server_confirms_heartbeats_and_never_pings(old_server: PlatformServer) -> None:
    old_server.ping_every = 0.01
    client = connect(old_server.url, "hash=-7")
    for _ in range(3):
        client.send("heartbeat")
        assert client.recv() == "heartbeat confirm"
    assert old_server.pings == []
    client.send("what?")
    assert old_server.wait_for(lambda s: len(s.bad_frames) == 1, TIMEOUT)
    old_server.zombie_after, old_server.sweep = 0.0, 0.01
    client.send("heartbeat")  # an open connection is not swept
    assert client.recv() == "heartbeat confirm"


# --- commands and results -----------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_command_and_its_result(generation: str) -> None:
    with PlatformServer(generation, execution_timeout=60) as server:
        client = connect(server.url, f"hash={server.know('5')}")
        execution_id = server.execute(["TSLA.US"])
        command = json.loads(client.recv())["message"]
        assert (command["type"], command["args"]) == ("execute", {"code_list": ["TSLA.US"]})
        assert command["meta"]["execution_id"] == execution_id
        assert server.unanswered == [execution_id]
        client.send(result_for(execution_id))
        assert client.recv() == "receive result"
        (result,) = server.results_for(execution_id)
        assert (result.status, result.text, result.data["type"]) == (
            "success",
            result_for(execution_id),
            "result",
        )
        assert (server.unanswered, server.mailed) == ([], [])
        client.close()


def test_commands_come_wrapped_as_a_string_and_bare(server: PlatformServer) -> None:
    client = connect(server.url, "hash=-7")
    server.execute("A,B", args_key="stock_list", wrap="string", execution_id="x")
    assert json.loads(json.loads(client.recv())["message"])["args"] == {"stock_list": "A,B"}
    assert server.execute([600519], wrap="bare", meta=None, args=None) == ""
    assert json.loads(client.recv()) == {"type": "execute", "args": None}
    server.execute([], args_key=None, meta={"workflow_id": "w"}, execution_id="y")
    command = json.loads(client.recv())["message"]
    assert command == {"type": "execute", "meta": {"workflow_id": "w", "execution_id": "y"}}
    assert [one.execution_id for one in server.executes] == ["x", "", "y"]


def test_send_message_sends_a_string(server: PlatformServer) -> None:
    url = f"{server.url}/module/send_message"
    command = {"type": "execute", "meta": {"execution_id": "x"}, "args": {"codes": "A"}}
    assert fetch(url, json.dumps(command).encode())[0] == 400  # nobody is connected
    client = connect(server.url, "hash=-7")
    for body in (json.dumps({"message": command}), json.dumps(command), f"message={json.dumps(command)}"):
        assert fetch(url, body.encode())[0] == 200
        assert json.loads(json.loads(client.recv())["message"]) == command
    assert fetch(url, b"message=hello&hash=-7")[0] == 200
    assert json.loads(client.recv()) == {"message": "hello"}


def test_failures_and_time_outs_are_mailed(server: PlatformServer) -> None:
    client = connect(server.url, "hash=-7")
    for status in ("failure", "failed", "error", "fail", "success"):
        client.send(result_for(status, status=status, error=f"e {status}", message="m"))
        assert client.recv() == "receive result"
    assert [mail.text for mail in server.mailed] == ["e failure", "e failed", "e error", "e fail"]
    late = server.execute(["A"])
    client.recv()
    server.execution_timeout = 0.01
    assert server.wait_for(lambda s: len(s.mailed) == 5, TIMEOUT)
    assert (server.mailed[-1].execution_id, server.mailed[-1].reason) == (late, "timed out")


def test_shutdown_is_confirmed(server: PlatformServer) -> None:
    client = connect(server.url, "hash=-7")
    server.shutdown_module()
    assert json.loads(client.recv()) == {"message": {"type": "shutdown"}}
    client.send('{"status":"success","message":"模块正在关闭"}')
    assert server.wait_for(lambda s: len(s.shutdown_confirmations) == 1, TIMEOUT)
    assert server.results == []


def test_a_command_waits_for_its_module(server: PlatformServer) -> None:
    first = server.execute(["A"], execution_id="first")
    assert server.executes[0].sent == []
    server.retry_executes = True
    client = connect(server.url, "hash=-7")
    assert json.loads(client.recv())["message"]["meta"]["execution_id"] == first
    client.close()
    client = connect(server.url, "hash=-7")
    text = client.recv()
    server.resend(first)
    assert client.recv() == text
    client.send(result_for(first))
    assert client.recv() == "receive result"
    assert len(server.executes[0].sent) == 3
    client.close()
    connect(server.url, "hash=-7").send("{}")
    assert server.wait_for(lambda s: s.frames[-1].text == "{}", TIMEOUT)
    assert len(server.executes[0].sent) == 3


def test_a_result_can_be_cut_off_before_its_receipt(server: PlatformServer) -> None:
    server.drop_next_result = 1
    server.zombies = False
    client = connect(server.url, "hash=-7")
    client.send(result_for("x"))
    with pytest.raises((ConnectionError, websocket.WebSocketConnectionClosedException)):
        client.recv()
    assert server.wait_for(lambda s: not s.sessions, TIMEOUT)
    client = connect(server.url, "hash=-7")
    client.send(result_for("x"))
    assert client.recv() == "receive result"
    assert len(server.results_for("x")) == 2
    assert server.drop_next_result == 0


# --- frames -------------------------------------------------------------------------------------------------


def test_fragments_and_large_messages(server: PlatformServer) -> None:
    server.fragment = 1000
    client = connect(server.url, "hash=-7")
    text = json.dumps({"message": "长" * 5000}, ensure_ascii=False)
    server.send_text(text)
    assert client.recv() == text
    large = json.dumps("x" * (16 * 1024 * 1024 - 2))
    client.send_frame(websocket.ABNF.create_frame("[1,", websocket.ABNF.OPCODE_TEXT, 0))
    client.ping("between")
    client.send_frame(websocket.ABNF.create_frame("2]", websocket.ABNF.OPCODE_CONT, 1))
    client.send(large)
    assert server.wait_for(lambda s: [frame.text for frame in s.frames] == ["[1,2]", large], TIMEOUT)
    assert client.recv_data(control_frame=True) == (websocket.ABNF.OPCODE_PONG, b"between")


BROKEN_FRAMES = (
    (b"\x81\x02{}", 1002),  # no mask
    (b"\xc1\x80\0\0\0\0", 1002),  # a reserved bit
    (b"\x80\x80\0\0\0\0", 1002),  # the rest of nothing
    (b"\x09\x80\0\0\0\0", 1002),  # a ping in fragments
    (b"\x83\x80\0\0\0\0", 1002),  # an opcode nobody knows
    (b"\x81\x81\0\0\0\0\xff", 1007),
    (b"\x81\xff" + (1 << 32).to_bytes(8, "big"), 1009),
)


def test_a_broken_frame_closes_the_connection(server: PlatformServer) -> None:
    server.zombies = False
    for frame, code in BROKEN_FRAMES:
        client = connect(server.url, "hash=-7")
        raw(client).sendall(frame)
        assert client.recv_data() == (websocket.ABNF.OPCODE_CLOSE, struct.pack("!H", code))
        cut(client)
        assert server.wait_for(lambda s: s.dials[-1].closed and not s.sessions, TIMEOUT)
        assert server.dials[-1].close_code == code


def test_garbage_and_big_frames(server: PlatformServer) -> None:
    server.set_switches({"json_garbage": True, "big_frames": True})
    client = connect(server.url, "hash=-7")
    assert [client.recv() for _ in GARBAGE] == list(GARBAGE)
    assert len(client.recv()) == BIG_FRAME


def test_no_websocket_request_is_a_bad_request(server: PlatformServer) -> None:
    assert fetch(f"{server.url}/websocket?hash=-7")[0] == 400
    assert fetch(f"{server.url}/nothing")[0] == 404
    with socket.create_connection((server.host, server.port), timeout=TIMEOUT) as client:
        client.sendall(b"nonsense\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 400")


# --- what goes wrong ----------------------------------------------------------------------------------------


def test_frozen_it_does_nothing_and_then_everything(server: PlatformServer) -> None:
    client = connect(server.url, "hash=-7")
    server.freeze()
    execution_id = server.execute(["A"])
    client.ping("p")
    client.settimeout(0.05)
    with pytest.raises(websocket.WebSocketTimeoutException):
        client.recv()
    client.settimeout(TIMEOUT)
    server.thaw()
    kinds = {client.recv_data(control_frame=True)[0] for _ in range(2)}
    assert kinds == {websocket.ABNF.OPCODE_PONG, websocket.ABNF.OPCODE_TEXT}
    assert server.unanswered == [execution_id]


def test_connections_can_be_reset(server: PlatformServer) -> None:
    client = connect(server.url, "hash=-7")
    server.kill_connections()
    with pytest.raises(ConnectionResetError):
        client.recv()
    assert server.wait_for(lambda s: s.dials[0].closed, TIMEOUT)
    assert (server.dials[0].close_code, len(server.sessions)) == (1006, 1)


def test_stopping_closes_with_1001_and_ends_the_thread() -> None:
    before = threading.active_count()
    with PlatformServer() as server:
        client = connect(server.url, f"hash={server.know('1')}")
        reader = threading.Thread(target=client.recv_data)
        reader.start()
    reader.join(TIMEOUT)
    assert server.dials[0].close_code == 1001
    assert threading.active_count() == before


def test_unknown_and_wrong_switches_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown switch 'pings'"):
        PlatformServer(pings=3)
    with pytest.raises(ValueError, match="ping_every"):
        PlatformServer(ping_every="often")
    with pytest.raises(ValueError, match="generation"):
        PlatformServer("newest")


# --- as a process -------------------------------------------------------------------------------------------


def test_a_killed_server_comes_back_with_what_it_knew(tmp_path: Path) -> None:
    with PlatformProcess(tmp_path, ping_every=0) as platform:
        module_hash = registered(platform.url)
        client = connect(platform.url, f"hash={module_hash}")
        platform.execute(["A"], execution_id="x")
        assert json.loads(client.recv())["message"]["meta"]["execution_id"] == "x"
        client.send(result_for("x"))
        assert client.recv() == "receive result"
        platform.execute(["B"], execution_id="y")
        platform.kill()
        assert [result.execution_id for result in platform.results] == ["x"]
        platform.start()
        assert refused(platform.url, f"hash={module_hash}") == 403  # the database says: online
        platform.switch(zombie_after=0, sweep=0.01)
        assert platform.wait_for(lambda state: not state["sessions"], TIMEOUT)
        platform.switch(zombie_after=60, sweep=60, retry_executes=True)
        assert registered(platform.url) != module_hash  # another salt
        client = connect(platform.url, f"hash={module_hash}")
        assert json.loads(client.recv())["message"]["meta"]["execution_id"] == "y"
        client.send(result_for("y", status="failed", error="why"))
        assert platform.wait_for(lambda state: state["results"] == 2, TIMEOUT)
        assert (platform.state()["unanswered"], platform.mailed[0].text) == ([], "why")


def test_waiting_goes_on_over_a_restart(tmp_path: Path) -> None:
    with PlatformProcess(tmp_path, zombies=False) as platform:
        platform.control("know", {"module_hash": "3"})
        found: list[bool] = []
        waiter = threading.Thread(
            target=lambda: found.append(platform.wait_for(lambda state: state["connected"] == ["3"], TIMEOUT))
        )
        waiter.start()
        platform.restart()
        client = connect(platform.url, "hash=3")
        waiter.join()
        assert found == [True]
        client.close()


def test_the_control_channel_says_what_it_does_not_know(tmp_path: Path) -> None:
    with PlatformProcess(tmp_path) as platform:
        for action, arguments in (("nothing", None), ("nothing", {}), ("switches", {"x": 1}), ("resend", {})):
            with pytest.raises(ValueError, match="Error"):
                platform.control(action, arguments)
        assert platform.control("connections") == []


def test_a_frozen_process_thaws(tmp_path: Path) -> None:
    with PlatformProcess(tmp_path) as platform:
        platform.freeze()
        with pytest.raises(TimeoutError):
            platform.control("state", timeout=0.1)
        platform.thaw()
        assert platform.state()["pid"] > 0


def test_by_hand_until_ctrl_c() -> None:
    script = Path(__file__).with_name("platform_server.py")
    command: list[str] = [sys.executable, str(script), "--port", "0", "--execute", "A, B", "--every", "0.01"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split(" on ")[1].split()[0]
        client = connect(url, f"hash={registered(url)}")
        ids = set()
        for _ in range(2):
            command_: dict[str, Any] = json.loads(client.recv())["message"]
            assert command_["args"] == {"code_list": ["A", "B"]}
            ids.add(command_["meta"]["execution_id"])
        assert len(ids) == 2
        process.send_signal(signal.SIGINT)
        while client.recv_data()[0] != websocket.ABNF.OPCODE_CLOSE:
            pass
        cut(client)
        log = process.stdout.read()
        assert process.wait(TIMEOUT) == 0
    assert "stopped: " in log.splitlines()[-1]


@pytest.mark.parametrize("script", ["platform_server.py", "infoway_server.py"])
def test_a_port_that_is_taken_gives_a_sentence(script: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, str(Path(__file__).with_name(script)), "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    expected = f"cannot listen on 127.0.0.1:{port}: Address already in use; "
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == expected + "end what listens there, or name another port: --port\n"


def test_a_module_and_its_last_result_are_waited_for() -> None:
    """As the README's tour asks for them; what was not there in that time is said too."""
    with PlatformServer() as platform, ThreadPoolExecutor(1) as pool:
        control = f"{platform.url}/_control"
        assert fetch(f"{control}/connected")[1].strip() == "[]"
        assert fetch(f"{control}/last_result")[1].strip() == "null"
        module_hash = registered(platform.url)
        waiting = pool.submit(fetch, f"{control}/connected?timeout=30")
        client = connect(platform.url, f"hash={module_hash}")
        assert json.loads(waiting.result(TIMEOUT)[1]) == [module_hash]
        waiting = pool.submit(fetch, f"{control}/last_result?timeout=30")
        sent = {**RESULT, "meta": {"execution_id": "e1"}, "message": "存储"}
        client.send(json.dumps(sent))
        status, text = waiting.result(TIMEOUT)
        assert (status, json.loads(text)) == (200, sent)
        cut(client)
