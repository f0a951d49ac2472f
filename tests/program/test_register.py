"""Registration end to end: what is sent, what is stored, what is said, whatever the server answers."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest
from conftest import RunPyz
from kit.chinese import in_chinese
from kit.daemons import PATIENCE, PROGRAM, Hasty, ThreadDaemon, environment, settings_for, until
from kit.platform_server import GENERATIONS, PlatformServer

import stockrt

NEW_HASH = "-3298472938472"


class Register(Protocol):
    """The type of the fixture `register`."""

    def __call__(
        self, *flags: str, port: int | None = None, **settings: str
    ) -> subprocess.CompletedProcess[str]:
        """Run `--register`."""


@pytest.fixture(params=GENERATIONS)
def server(request: pytest.FixtureRequest) -> Iterator[PlatformServer]:
    """A platform of either generation."""
    with PlatformServer(request.param) as made:
        yield made


@pytest.fixture
def new_server() -> Iterator[PlatformServer]:
    """A platform where its generation does not matter."""
    with PlatformServer() as made:
        yield made


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """The state directory; it does not exist yet."""
    return tmp_path / "state"


@pytest.fixture
def hash_file(state: Path) -> Path:
    """Where the hash is stored."""
    return state / "module_hash"


@pytest.fixture
def register(request: pytest.FixtureRequest, run_pyz: RunPyz, state: Path) -> Register:
    """Run `--register` against the test's server, in an empty folder."""

    def run(*flags: str, port: int | None = None, **settings: str) -> subprocess.CompletedProcess[str]:
        if port is None:
            name = "server" if "server" in request.fixturenames else "new_server"
            port = request.getfixturevalue(name).port
        env = environment(port, "http://127.0.0.1:9", state, **settings)
        return run_pyz("--register", *flags, env=env)

    return run


def free_port() -> int:
    """A port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def lines(text: str) -> list[str]:
    """The lines of an output."""
    return text.splitlines()


# ------------------------------------------------------------------------------------------------------
# It works
# ------------------------------------------------------------------------------------------------------


def test_it_registers_stores_the_hash_and_says_so(
    server: PlatformServer, register: Register, hash_file: Path
) -> None:
    done = register()
    assert (done.returncode, done.stderr) == (0, "")
    (known,) = server.registrations
    (line,) = lines(done.stdout)
    assert server.url in line
    assert "股票实时数据获取模块" in line
    assert str(hash_file) in line
    assert known.module_hash not in line
    assert stockrt.shorten(known.module_hash) in line
    assert hash_file.read_text() == known.module_hash + "\n"
    assert stat.S_IMODE(hash_file.stat().st_mode) == 0o600
    assert stat.S_IMODE(hash_file.parent.stat().st_mode) == 0o700
    assert [path.name for path in hash_file.parent.iterdir()] == [hash_file.name]


def test_in_chinese_it_says_so_and_that_it_was_done_before(
    new_server: PlatformServer, register: Register, hash_file: Path
) -> None:
    done = register(STOCKRT_LANG="zh")
    (known,) = new_server.registrations
    shown = stockrt.shorten(known.module_hash)
    assert (
        done.stdout
        == f"已将“股票实时数据获取模块”注册到 {new_server.url}：模块哈希 {shown} 保存在 {hash_file}\n"
    )
    done = register(STOCKRT_LANG="zh")
    assert done.stdout == (
        f"此前已注册：模块哈希 {shown} 保存在 {hash_file}；--register --force 可重新注册\n"
    )


def test_it_sends_what_both_generations_ask_for(server: PlatformServer, register: Register) -> None:
    register(MODULE_NAME="模块 & Co?#=", MODULE_DESCRIPTION="a+b % / ü")
    (call,) = server.register_calls
    digest = call.params.pop("modelHash")
    assert re.fullmatch(r"[0-9a-f]{32}", digest)
    assert call.params.pop("missionKind")
    assert call.params == {
        "name": "模块 & Co?#=",
        "description": "a+b % / ü",
        "input_data": "[]",
        "output_data": "[]",
        "dataRequirement": "[]",
    }


def test_the_built_file_registers_too(run_pyz: RunPyz, new_server: PlatformServer, hash_file: Path) -> None:
    done = run_pyz("--register", env=environment(new_server.port, "http://127.0.0.1:9", hash_file.parent))
    assert (done.returncode, done.stderr) == (0, "")
    assert hash_file.read_text().strip() == new_server.registrations[0].module_hash


def test_with_a_stored_hash_the_server_is_asked_nothing(
    server: PlatformServer, register: Register, hash_file: Path
) -> None:
    register()
    before = (hash_file.read_text(), len(server.connections))
    for _ in range(2):
        again = register()
        assert (again.returncode, again.stderr) == (0, "")
        (line,) = lines(again.stdout)
        assert "registered already" in line
        assert "--force" in line
        assert before[0].strip() not in line
        assert (hash_file.read_text(), len(server.connections)) == before
        server.stop()  # and it need not be there


def test_force_registers_anew(server: PlatformServer, register: Register, hash_file: Path) -> None:
    register()
    first = hash_file.read_text()
    refused = register("--force")
    assert refused.returncode == 1
    assert "3005" in refused.stderr
    assert hash_file.read_text() == first  # nothing is lost by a try that failed
    done = register("--force", MODULE_DESCRIPTION="another")
    assert done.returncode == 0
    assert hash_file.read_text().strip() == server.registrations[-1].module_hash != first.strip()
    assert stat.S_IMODE(hash_file.stat().st_mode) == 0o600


# ------------------------------------------------------------------------------------------------------
# It does not work
# ------------------------------------------------------------------------------------------------------


def success(result: object, code: object = "2000") -> str:
    """The body of an answer."""
    return json.dumps({"code": code, "message": "成功!", "result": result})


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (400, '{"code":"3005","message":"模块重复注册!","result":null}', ["3005", "MODULE_DESCRIPTION"]),
        (400, '{"code":"3002","message":"传递数据非法!","result":null}', ["3002", "MODULE_NAME"]),
        (500, "<html><body><h1>Server Error (500)</h1></body></html>", ["HTTP 500", "log"]),
        (200, "<html><body>Welcome to nginx!</body></html>", ["not the platform's JSON", "SERVER_PORT"]),
        (404, "<html>Not Found</html>", ["HTTP 404", "SERVER_PORT"]),
        (200, "", ["not the platform's JSON"]),
        (200, "[]", ["not the platform's JSON"]),
        pytest.param(200, '{"code":"2000"', ["not the platform's JSON"], marks=pytest.mark.long),
        (200, success(None), ["no usable hash"]),
        pytest.param(200, success({}), ["no usable hash"], marks=pytest.mark.long),
        pytest.param(200, success({"hash": ""}), ["no usable hash"], marks=pytest.mark.long),
        pytest.param(200, success({"hash": "1&hash=2"}), ["no usable hash"], marks=pytest.mark.long),
        (200, success({"hash": "1\r\nX: y"}), ["no usable hash"]),
        (200, success({"hash": "1" * 65}), ["no usable hash"]),
        (200, success({"hash": NEW_HASH}, "5000"), ["HTTP 200"]),
        (502, '{"code":"9\\n9","message":"two\\nlines"}', ["HTTP 502"]),
    ],
)
def test_any_other_answer_is_one_line_that_says_what_to_do(
    new_server: PlatformServer, register: Register, hash_file: Path, status: int, body: str, words: list[str]
) -> None:
    new_server.register_answer = (status, body)
    failed = register()
    assert failed.returncode == 1
    assert failed.stdout == ""
    (line,) = lines(failed.stderr)
    assert line.startswith(f"stockrt: not registered at {new_server.url}: ")
    assert all(word in line for word in words), line
    assert not hash_file.exists()
    assert len(new_server.register_calls) == 1


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (400, '{"code":"3005"}', "平台上已有名称、描述和程序都相同的模块（3005）"),
        (400, '{"code":"3002"}', "平台认为数据无效（3002）"),
        (500, "", "HTTP 500，平台内部错误"),
        (200, success(None), "平台说注册成功，却没有给出可用的哈希"),
        (404, "<html>Not Found</html>", "HTTP 404：22 字节的应答不是平台的 JSON"),
        (403, '{"code":"1","message":"暂停注册"}', "HTTP 403：暂停注册；请检查 SERVER_IP"),
    ],
)
def test_why_it_is_not_registered_can_be_read_in_chinese(
    new_server: PlatformServer, tmp_path: Path, status: int, body: str, words: str
) -> None:
    new_server.register_answer = (status, body)
    with pytest.raises(stockrt.RegistrationError) as caught:
        stockrt.register(settings_for(new_server.port, "http://127.0.0.1:9", tmp_path))
    told = in_chinese(caught.value.message)
    assert told.startswith(f"未能在 {new_server.url} 注册：{words}"), told


def test_what_is_wrong_with_the_platform_or_its_hash_can_be_read_in_chinese(tmp_path: Path) -> None:
    port = free_port()
    url, settings = f"http://127.0.0.1:{port}", settings_for(port, "http://127.0.0.1:9", tmp_path)
    assert in_chinese(stockrt.check_platform(settings).words).startswith(f"无法连接 {url}：")
    for presence in stockrt.Presence:
        in_chinese(stockrt.phrase(presence.value))
    for content in (b"not a hash", b"\xff\xfe"):
        (tmp_path / "module_hash").write_bytes(content)
        with pytest.raises(stockrt.StoreError) as caught:
            stockrt.read_hash(tmp_path)
        assert "没有模块哈希；请删除该文件" in in_chinese(caught.value.message)


def test_success_is_the_code_and_not_the_status(
    new_server: PlatformServer, register: Register, hash_file: Path
) -> None:
    new_server.register_answer = (201, success({"hash": int(NEW_HASH)}))
    assert register().returncode == 0
    assert hash_file.read_text().strip() == NEW_HASH


def test_a_server_that_is_away_is_one_line(register: Register, hash_file: Path) -> None:
    failed = register(port=free_port())
    assert failed.returncode == 1
    (line,) = lines(failed.stderr)
    assert line.count("127.0.0.1:") == 1 and ": connection refused; is the platform up" in line
    assert "SERVER_IP" in line
    assert not hash_file.exists()


@pytest.mark.long  # waits for the request's time limit
def test_a_server_that_hangs_is_one_line(register: Register) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        failed = register(port=silent.getsockname()[1])
    assert failed.returncode == 1
    (line,) = lines(failed.stderr)
    assert "SERVER_IP" in line


def test_a_state_directory_that_cannot_be_is_one_line(
    new_server: PlatformServer, register: Register, state: Path
) -> None:
    state.write_text("a file, no directory")
    failed = register()
    assert failed.returncode == 1
    (line,) = lines(failed.stderr)
    assert "STATE_DIRECTORY" in line


@pytest.mark.parametrize("content", [b"", b"two words", b"1&hash=2", b"\xff\xfe", b"1" * 65])
def test_a_file_that_holds_no_hash_is_said(register: Register, hash_file: Path, content: bytes) -> None:
    hash_file.parent.mkdir()
    hash_file.write_bytes(content)
    failed = register(port=9)
    assert failed.returncode == 1
    (line,) = lines(failed.stderr)
    assert str(hash_file) in line


# ------------------------------------------------------------------------------------------------------
# The file
# ------------------------------------------------------------------------------------------------------


def test_a_reader_sees_one_hash_or_the_other(state: Path, hash_file: Path) -> None:
    hashes = {"-" + "1" * 60, "2" * 60}
    seen: set[str] = set()
    stockrt.write_hash(state, min(hashes))
    written = threading.Event()

    def write() -> None:
        for _ in range(100):
            for one in hashes:
                stockrt.write_hash(state, one)
        written.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not written.is_set():
        seen.add(hash_file.read_text())
    writer.join()
    assert seen <= {one + "\n" for one in hashes}
    assert os.listdir(state) == ["module_hash"]


def test_the_hash_is_private_whatever_the_umask(state: Path, hash_file: Path) -> None:
    code = "import os, sys, stockrt; from pathlib import Path; os.umask(0); stockrt.write_hash(Path(sys.argv[1]), '1')"
    subprocess.run([sys.executable, "-c", code, str(state)], cwd=PROGRAM.parent, check=True)
    assert stat.S_IMODE(hash_file.stat().st_mode) == 0o600


def test_an_older_installations_hash_is_taken_over(
    server: PlatformServer, register: Register, tmp_path: Path, hash_file: Path
) -> None:
    old = tmp_path / "config" / "module_hash.txt"
    old.parent.mkdir()
    old.write_bytes(f"{NEW_HASH}\r\n".encode())
    done = register()
    assert done.returncode == 0
    assert "registered already" in done.stdout
    assert "config/module_hash.txt" in done.stderr
    assert server.connections == []
    assert hash_file.read_text() == NEW_HASH + "\n"
    assert stat.S_IMODE(hash_file.stat().st_mode) == 0o600
    assert NEW_HASH not in done.stdout + done.stderr
    assert old.read_bytes() == f"{NEW_HASH}\r\n".encode()


def test_ones_own_hash_is_stronger_than_an_older_installations(
    register: Register, tmp_path: Path, hash_file: Path
) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "module_hash.txt").write_text("-1111111111111")
    hash_file.parent.mkdir()
    hash_file.write_text(NEW_HASH)
    assert stockrt.shorten(NEW_HASH) in register(port=9).stdout


@pytest.mark.parametrize("secret", ["-1", "1234567890", "12345678901", "-3298472938472", "1" * 64])
def test_no_hash_is_shown_whole(secret: str) -> None:
    assert secret not in stockrt.shorten(secret)


# ------------------------------------------------------------------------------------------------------
# The daemon registers by itself
# ------------------------------------------------------------------------------------------------------


def test_the_daemon_registers_by_itself_as_soon_as_the_server_is_there(
    state: Path, hash_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    port = free_port()
    tried, back = threading.Event(), threading.Event()

    class Chance(Hasty):
        def uniform(self, a: float, b: float) -> float:
            if len(self.ceilings) == 19:
                tried.set()
                back.wait(PATIENCE)
            return super().uniform(a, b)

    chance = Chance()
    settings = settings_for(port, "http://127.0.0.1:9", state)
    with ThreadDaemon(settings, rng=chance):
        assert tried.wait(PATIENCE)
        assert not hash_file.exists()
        with PlatformServer(port=port) as server:
            back.set()
            assert server.wait_for(lambda s: s.connected, PATIENCE)
            (known,) = server.registrations
            assert hash_file.read_text().strip() == known.module_hash
            assert server.connected == [known.module_hash]
            assert stat.S_IMODE(hash_file.stat().st_mode) == 0o600
    delays = chance.ceilings
    assert delays[0] == stockrt.DIAL_FIRST_S
    assert delays[:20] == sorted(delays[:20])
    assert delays[19] == stockrt.DIAL_CAP_S
    assert known.module_hash not in caplog.text
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert sum("not registered at" in record.getMessage() for record in warnings) == 1


def test_the_daemon_goes_on_trying_when_it_is_refused(
    state: Path, new_server: PlatformServer, hash_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    new_server.register_answer = (500, "<html>Server Error</html>")
    with ThreadDaemon(settings_for(new_server.port, "http://127.0.0.1:9", state), rng=Hasty()):
        assert new_server.wait_for(lambda s: len(s.register_calls) >= 10, PATIENCE)
        new_server.register_answer = None
        assert new_server.wait_for(lambda s: s.connected, PATIENCE)
    assert until(hash_file.exists)
    assert caplog.text.count("HTTP 500") == 1
