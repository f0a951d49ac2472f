"""Room WebSocket: frames however they are cut, and an address that nobody but the server gets to see."""

from __future__ import annotations

import logging
import random
import select
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from kit.chinese import in_chinese
from kit.daemons import PATIENCE, number
from kit.infoway_server import make_certificate
from kit.proxy_server import ProxyServer
from kit.raw_websocket import RawWebSocket
from kit.tls import TlsFront
from kit.websocket_wire import BINARY, CLOSE, PING, PONG, TEXT, frame_bytes

import stockrt
from stockrt import DialError, LinkLost, Proxies, WebSocket

MOST = 300_000
SECRET = "5e/cr et+key&of=the?stream"


@pytest.fixture
def server() -> Iterator[RawWebSocket]:
    """A server that sends what a test says."""
    with RawWebSocket() as made:
        yield made


def read(link: WebSocket, count: int) -> list[str | None]:
    """Return so many frames, waiting for them as a poll does."""
    got: list[str | None] = []
    deadline = time.monotonic() + PATIENCE
    while len(got) < count and time.monotonic() < deadline:
        if not link.has_more:
            select.select([link], [], [], PATIENCE)
        got += link.frames()
    return got


def in_fragments(data: bytes, sizes: list[int]) -> bytes:
    """Return a text message in several frames, with a ping between the first two."""
    parts = [data[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(sizes))]
    parts.append(data[sum(sizes) :])
    frames = [bytearray(frame_bytes(TEXT if not i else 0, part)) for i, part in enumerate(parts)]
    for frame in frames[:-1]:
        frame[0] &= 0x7F
    return b"".join([bytes(frames[0]), frame_bytes(PING, b"p"), *map(bytes, frames[1:])])


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=[pytest.mark.long] * (seed > 1)) for seed in range(6)]
)
def test_what_was_sent_comes_out_in_order_however_it_is_cut(server: RawWebSocket, seed: int) -> None:
    rng = random.Random(seed)
    sent: list[str | None] = []
    wire = b""
    for index in range(400):
        kind = rng.random()
        text = f"{index} " + "价" * rng.choice([0, 1, 30, 41, 42, 60, 300, 30_000 if kind < 0.02 else 7])
        if kind < 0.85:
            wire += frame_bytes(TEXT, text.encode())
            sent.append(text)
        elif kind < 0.9:
            wire += in_fragments(text.encode(), [rng.randrange(3), 1])
            sent += [None, text]  # the ping comes first
        elif kind < 0.95:
            wire += frame_bytes(TEXT, b"")
            sent.append("")
        else:
            wire += frame_bytes(rng.choice([PING, PONG, BINARY]), b"\x00\xff")
            sent.append(None)
    cuts = sorted(rng.sample(range(len(wire)), rng.choice([0, 5, 300])))
    link = WebSocket(server.url, max_bytes=MOST)
    server.send(*[wire[a:b] for a, b in zip([0, *cuts], [*cuts, len(wire)], strict=True)])
    got: list[str | None] = []
    deadline = time.monotonic() + PATIENCE
    while [one for one in got if one is not None] != [one for one in sent if one is not None]:
        assert time.monotonic() < deadline
        got += read(link, 1)
    if not cuts:  # else the growth of a long frame shows that the peer lives, too
        assert got == sent
    link.close()


def test_each_ping_is_answered_with_its_own_words(server: RawWebSocket) -> None:
    link = WebSocket(server.url, max_bytes=MOST)
    server.send(frame_bytes(TEXT, b"a") + frame_bytes(PING, b"one") + frame_bytes(TEXT, b"b"))
    assert read(link, 3) == ["a", None, "b"]
    assert server.next_frame() == (PONG, b"one")
    link.close(1001)
    assert server.next_frame() == (CLOSE, (1001).to_bytes(2, "big"))


def test_what_came_before_the_end_is_read_first(server: RawWebSocket) -> None:
    link = WebSocket(server.url, max_bytes=MOST)
    server.send(frame_bytes(TEXT, b"last") * 3)
    server.send(frame_bytes(CLOSE, (4000).to_bytes(2, "big") + b"why"))
    got: list[str | None] = []
    with pytest.raises(LinkLost, match=r"closed by the server \(code 4000 why\)") as caught:
        while True:
            select.select([link], [], [], PATIENCE)
            for text in link.frames():
                got.append(text)
    assert got == ["last"] * 3
    assert caught.value.code == 4000
    assert in_chinese(caught.value.message) == "由服务器关闭（关闭码 4000，why）"


@pytest.mark.parametrize(
    ("data", "code", "said"),
    [
        (b"", 0, "closed by the server"),
        ((1011).to_bytes(2, "big"), 1011, "closed by the server (code 1011)"),
    ],
)
def test_a_close_without_words_is_said_with_its_code(
    server: RawWebSocket, data: bytes, code: int, said: str
) -> None:
    link = WebSocket(server.url, max_bytes=MOST)
    server.send(frame_bytes(CLOSE, data))
    with pytest.raises(LinkLost) as caught:
        read(link, 1)
    assert (str(caught.value), caught.value.code) == (said, code)
    assert in_chinese(caught.value.message).startswith("由服务器关闭")


@pytest.mark.parametrize("as_one", [True, False])
def test_a_message_that_is_too_long_is_refused(server: RawWebSocket, as_one: bool) -> None:
    link = WebSocket(server.url, max_bytes=5_000)
    data = b"x" * 5_001
    server.send(
        frame_bytes(TEXT, b"ok") + (frame_bytes(TEXT, data) if as_one else in_fragments(data, [4_000]))
    )
    got: list[str | None] = []
    with pytest.raises(LinkLost, match=r"a frame of \d+ bytes; at most 5000 are taken") as caught:
        while True:
            select.select([link], [], [], PATIENCE)
            for text in link.frames():
                got.append(text)
    assert [text for text in got if text] == ["ok"]
    assert in_chinese(caught.value.message).endswith("，超过上限 5000 字节")


def test_a_message_within_another_is_no_message(server: RawWebSocket) -> None:
    link = WebSocket(server.url, max_bytes=MOST)
    begun = frame_bytes(TEXT, b"begun", final=False)
    server.send(begun + frame_bytes(PING, b"") + frame_bytes(TEXT, b"whole") * 2)
    with pytest.raises(LinkLost, match="Illegal frame"):
        read(link, 2)


@pytest.mark.parametrize("seed", range(3))
def test_garbage_ends_the_connection_and_nothing_else(server: RawWebSocket, seed: int) -> None:
    link = WebSocket(server.url, max_bytes=MOST)
    server.send(b"\xf3" + random.Random(seed).randbytes(2_000))
    server.hang_up()
    with pytest.raises(LinkLost):
        read(link, 10_000)


# ------------------------------------------------------------------------------------------------------
# The address
# ------------------------------------------------------------------------------------------------------


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> str:
    """A key as it stands in the settings: what is told is masked by it."""
    monkeypatch.setattr(stockrt.HIDDEN, "secrets", (SECRET,))
    return quote(SECRET, safe="")


REFUSALS = [
    "HTTP/1.1 401 Unauthorized\r\nContent-Length: {size}\r\n\r\n{echo}",
    "HTTP/1.1 302 Found\r\nLocation: ws://127.0.0.1:1/?{echo}\r\n\r\n",
    "HTTP/1.1 {echo} {echo}\r\n\r\n",
    "HTTP/1.1 101 {echo}\r\nUpgrade: {echo}\r\nConnection: Upgrade\r\n\r\n",
    "HTTP/1.1 401 {echo}\r\nContent-Length: {echo}\r\n\r\n",
    "{echo}\r\n\r\n",
]


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_server_that_sends_the_secret_back_finds_no_reader(
    server: RawWebSocket, secret: str, caplog: pytest.LogCaptureFixture, refusal: str
) -> None:
    caplog.set_level(logging.DEBUG)
    server.refusal = refusal.format(echo=secret, size=len(secret)).encode()
    with pytest.raises(DialError) as caught:
        WebSocket(f"{server.url}?business=stock&apikey={secret}", headers={"X": "y"}, max_bytes=MOST)
    assert f"GET /ws?business=stock&apikey={secret} HTTP/1.1\n" in server.heads[0].replace("\r", "")
    assert "\nX: y" in server.heads[0].replace("\r", "")
    told = caplog.text + str(caught.value) + stockrt.in_language(caught.value.message, "zh")
    assert secret not in told and SECRET not in told


def test_the_answer_that_refused_it_is_kept_for_who_understands_it(server: RawWebSocket) -> None:
    server.refusal = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 14\r\n\r\n" + b'{"code": 401 }'
    with pytest.raises(DialError, match=r"^the handshake was refused with HTTP 401$") as caught:
        WebSocket(server.url, max_bytes=MOST)
    assert (caught.value.status, caught.value.body) == (401, b'{"code": 401 }')
    assert in_chinese(caught.value.message) == "握手被 HTTP 401 拒绝"


def test_an_answer_to_the_handshake_that_has_no_end_is_said(server: RawWebSocket) -> None:
    server.refusal = b"HTTP/1.1 101 OK\r\nX: " + b"x" * 70_000
    with pytest.raises(DialError, match=r"^cannot connect: an answer of more than 65536 bytes$") as caught:
        WebSocket(server.url, max_bytes=MOST)
    assert in_chinese(caught.value.message) == "无法连接：应答超过 65536 字节"


def test_nobody_there_is_said() -> None:
    with pytest.raises(DialError, match=r"^cannot connect: connection refused$") as caught:
        WebSocket("ws://127.0.0.1:1/ws", max_bytes=MOST)
    assert in_chinese(caught.value.message) == "无法连接：连接被拒绝"


@pytest.mark.parametrize("tls", [True, False])
def test_a_proxy_is_told_where_to_and_not_for_what(
    server: RawWebSocket,
    secret: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tls: bool,
) -> None:
    caplog.set_level(logging.DEBUG)
    context, file = make_certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    with ProxyServer() as proxy, TlsFront(context, server.port) as front:
        port = front.port if tls else server.port
        way = stockrt.Proxy("ALL_PROXY", "http", "127.0.0.1", proxy.port)
        url = f"{'wss' if tls else 'ws'}://127.0.0.1:{port}/ws?business=stock&apikey={secret}"
        link = WebSocket(url, proxies=Proxies(every=way), max_bytes=MOST)
        server.send(frame_bytes(TEXT, b"hello"))
        assert read(link, 1) == ["hello"]
        link.close()
        assert [(one.method, one.target) for one in proxy.requests] == [("CONNECT", f"127.0.0.1:{port}")]
        assert not any(secret in value for one in proxy.requests for value in one.headers.values())
        proxy.status = 502
        with pytest.raises(DialError, match=r"HTTP 502; see ALL_PROXY") as caught:
            WebSocket(url, proxies=Proxies(every=way), max_bytes=MOST)
        assert secret not in caplog.text + str(caught.value)


def test_through_tls_no_frame_stays_behind(
    server: RawWebSocket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record of TLS holds more than one call gives, and no poll tells of the rest."""
    context, file = make_certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    assert isinstance(context, ssl.SSLContext)
    with TlsFront(context, server.port) as front:
        link = WebSocket(f"wss://127.0.0.1:{front.port}/ws", max_bytes=MOST)
        count = number(3_000, 3_000, quick=1_000)
        server.send(frame_bytes(TEXT, b"x" * 120) * count)
        texts = 0
        deadline = time.monotonic() + PATIENCE
        while texts < count and time.monotonic() < deadline:
            texts += sum(text is not None for text in read(link, 1))
        assert texts == count
        assert not link.has_more or not list(link.frames())
        link.close()
