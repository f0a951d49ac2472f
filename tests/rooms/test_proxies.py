"""Ways out of the machine: which proxy a URL goes through, and what becomes of a request there."""

from __future__ import annotations

import contextlib
import logging
import ssl
import threading
import time
import tracemalloc
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from kit.cases import each
from kit.chinese import in_chinese
from kit.daemons import PATIENCE
from kit.infoway_server import Answer, InfowayServer, make_certificate
from kit.platform_server import PlatformServer
from kit.proxy_server import ProxyServer
from kit.tls import TlsFront

import stockrt
from stockrt import API_LIMITS, NO_PROXIES, FailureKind, HttpConnection, Limits, Response, Settings

PATH = "/stock/batch_trade/AAPL.US"
KEY = {"apiKey": "test-key"}
SHORT = Limits(connect_s=1.0, read_s=0.3, whole_s=0.6)
# Where only the limit of the whole ends it.
PATIENT = Limits(connect_s=100.0, read_s=100.0, whole_s=0.5)
# For what must end soon: no promise is that slack, no busy machine that slow.
HUSH = "hu%40sh-h%3Aush"  # a password, as a URL has it
CLEAR = "hu@sh-h:ush"


def load(**environ: str) -> Settings:
    """Return the settings of an environment."""
    return stockrt.load_settings(environ, None, (), is_root=False).settings


def faults(**environ: str) -> str:
    """Return what is wrong with an environment."""
    with pytest.raises(stockrt.SettingsError) as caught:
        load(**environ)
    return str(caught.value)


def ask(url: str, limits: Limits = API_LIMITS, **environ: str) -> Response:
    """Ask an Infoway server once."""
    return stockrt.get_once(url, PATH, limits, load(**environ).proxies, KEY)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, Path]:
    """What a server of loopback shows, and the file in which a client finds it."""
    return make_certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(params=["http", "https"])
def proxy(
    request: pytest.FixtureRequest, certificate: tuple[ssl.SSLContext, Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[ProxyServer]:
    """A proxy of either scheme, whose certificate is trusted."""
    context, file = certificate
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    with ProxyServer(context=context if request.param == "https" else None) as made:
        yield made


@pytest.fixture
def http_proxy() -> Iterator[ProxyServer]:
    """A proxy of the usual scheme."""
    with ProxyServer() as made:
        yield made


@pytest.fixture
def secure(certificate: tuple[ssl.SSLContext, Path], infoway: InfowayServer) -> Iterator[str]:
    """The URL of the Infoway server behind TLS, of the same certificate."""
    with TlsFront(certificate[0], infoway.port) as front:
        yield f"https://127.0.0.1:{front.port}"


# ------------------------------------------------------------------------------------------------------
# Which one
# ------------------------------------------------------------------------------------------------------

A, B, C = "http://a:1", "http://b:2", "http://c:3"


@each(
    ("environ", "https", "http"),
    [
        ({}, "", ""),
        ({"HTTPS_PROXY": A}, "a", ""),
        ({"HTTP_PROXY": B}, "", "b"),
        ({"ALL_PROXY": C}, "c", "c"),
        ({"HTTPS_PROXY": A, "ALL_PROXY": C}, "a", "c"),
        ({"HTTP_PROXY": B, "all_proxy": C}, "c", "b"),
        ({"https_proxy": A, "HTTPS_PROXY": B, "http_proxy": C, "HTTP_PROXY": A}, "a", "c"),
        ({"https_proxy": "", "HTTPS_PROXY": B}, "b", ""),
        ({"ALL_PROXY": C, "NO_PROXY": "*"}, "", ""),
        ({"ALL_PROXY": C, "NO_PROXY": "api.example:443"}, "", "c"),
    ],
)
def test_a_scheme_has_its_own_proxy_or_the_one_for_all(
    environ: dict[str, str], https: str, http: str
) -> None:
    proxies = load(**environ).proxies
    found = [proxies.for_url(f"{scheme}://api.example") for scheme in ("https", "http")]
    assert [proxy.host if proxy else "" for proxy in found] == [https, http]


@each(
    ("entry", "host", "straight"),
    [
        ("*", "any.example", True),
        ("example.com", "example.com", True),
        ("example.com", "EXAMPLE.COM", True),
        ("example.com", "www.example.com", True),
        (".example.com", "www.example.com", True),
        (".example.com", "example.com", True),
        ("example.com.", "example.com", True),
        ("example.com", "example.com.", True),
        ("example.com", "notexample.com", False),
        ("example.com", "example.com.evil", False),
        ("com", "example.com", True),
        ("example.com:8080", "example.com:8080", True),
        ("example.com:8080", "example.com:8081", False),
        ("example.com:80", "example.com", True),
        ("192.0.2.7", "192.0.2.7", True),
        ("192.0.2.7", "192.0.2.70", False),
        ("2.7", "192.0.2.7", False),
        ("192.0.2.0/24", "192.0.2.200", True),
        ("192.0.2.0/24", "192.0.3.1", False),
        ("192.0.2.9/24", "192.0.2.1", True),
        ("10.0.0.0/8", "ten.example", False),
        ("::1", "[::1]", True),
        ("[::1]", "[::1]:8000", True),
        ("[::1]:80", "[::1]:8000", False),
        ("fe80::/10", "[fe80::1]", True),
        ("fe80::/10", "10.0.0.1", False),
        ("a.example b.example", "b.example", True),
        ("a.example,,b.example", "b.example", True),
    ],
)
def test_no_proxy_names_what_is_asked_straight(entry: str, host: str, straight: bool) -> None:
    proxies = load(ALL_PROXY=A, NO_PROXY=entry).proxies
    assert (proxies.for_url(f"http://{host}/path") is None) == straight


def test_the_file_says_it_too_and_the_environment_is_stronger(tmp_path: Path) -> None:
    """Small letters are stronger within one place alone."""
    file = tmp_path / "stockrt.env"
    file.write_text(f"https_proxy={A}\nHTTP_PROXY={B}\n")
    proxies = stockrt.load_settings({"HTTPS_PROXY": C}, file).settings.proxies
    assert [proxy and proxy.host for proxy in (proxies.https, proxies.http)] == ["c", "b"]


def test_a_proxy_may_be_a_credential(tmp_path: Path) -> None:
    (tmp_path / "https_proxy").write_text(f"http://me:{HUSH}@h:1\n")
    proxy = load(CREDENTIALS_DIRECTORY=str(tmp_path)).proxies.https
    assert proxy is not None and proxy.password == HUSH


@each("scheme", ["socks5", "socks5h", "socks4", "SOCKS5"])
def test_a_socks_proxy_that_would_be_used_is_a_fault(scheme: str) -> None:
    said = faults(HTTP_PROXY=A, ALL_PROXY=f"{scheme}://me:{HUSH}@h:1080")
    assert said.startswith(f"ALL_PROXY='{scheme.lower()}://***@h:1080' (environment): expected http:// or ht")
    assert "SOCKS is not supported" in said and HUSH not in said


def test_a_socks_proxy_for_other_programs_is_no_fault() -> None:
    """Many machines set all three, and the one for all is then never looked at."""
    load(HTTP_PROXY=A, HTTPS_PROXY=A, ALL_PROXY="socks5://127.0.0.1:7891")


@each("url", [f"http://me:{HUSH}@h:0", f"me:{HUSH}@h/x", f"ftp://me:{HUSH}@h"])
def test_a_fault_shows_no_password(url: str) -> None:
    said = faults(HTTPS_PROXY=url)
    assert "***@h" in said and HUSH not in said and "hu%40" not in said


def test_no_form_of_a_password_is_shown() -> None:
    settings = load(HTTPS_PROXY=f"http://me:{HUSH}@h:1")
    proxy = settings.proxies.https
    assert proxy is not None and proxy.shown == "http://***@h:1"
    coded = proxy.authorization.removeprefix("Basic ")
    assert settings.redact(f"<{HUSH}> <{CLEAR}> <{coded}>") == "<***> <***> <***>"
    assert HUSH not in repr(settings)


# ------------------------------------------------------------------------------------------------------
# Through it
# ------------------------------------------------------------------------------------------------------


def test_http_is_asked_in_absolute_form(infoway: InfowayServer, proxy: ProxyServer) -> None:
    assert ask(infoway.url, HTTP_PROXY=proxy.url).status == 200
    assert proxy.targets() == [f"GET {infoway.url}{PATH}"]
    assert proxy.requests[0].headers["host"] == f"127.0.0.1:{infoway.port}"
    assert infoway.request_count == 1


def test_https_goes_through_a_tunnel_that_the_proxy_cannot_read(secure: str, proxy: ProxyServer) -> None:
    assert ask(secure, HTTPS_PROXY=proxy.url).status == 200
    (passed,) = proxy.requests
    assert (passed.method, f"https://{passed.target}") == ("CONNECT", secure)
    assert passed.headers["host"] == passed.target
    assert "apikey" not in passed.headers


def test_a_tunnel_to_an_ipv6_address_has_it_in_brackets(proxy: ProxyServer) -> None:
    assert ask("https://[::1]:1", HTTPS_PROXY=proxy.url).fault
    (passed,) = proxy.requests
    assert (passed.target, passed.headers["host"]) == ("[::1]:1", "[::1]:1")


def test_a_tunnel_is_kept_for_the_next_request(secure: str, proxy: ProxyServer) -> None:
    connection = HttpConnection(secure, API_LIMITS, load(ALL_PROXY=proxy.url).proxies)
    with contextlib.closing(connection):
        for _ in range(3):
            assert connection.open() is None
            assert connection.get(PATH, KEY).status == 200
    assert len(proxy.requests) == 1


def test_the_password_is_given(secure: str, infoway: InfowayServer, proxy: ProxyServer) -> None:
    proxy.password = f"m ü:{CLEAR}"
    url = proxy.url_at(proxy.port, f"m%20%C3%BC:{HUSH}")
    assert ask(secure, HTTPS_PROXY=url).status == 200
    assert ask(infoway.url, HTTP_PROXY=url).status == 200
    assert len(infoway.requests) == 2


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("given", ["", f"me:{HUSH}"])
def test_a_proxy_that_wants_another_password_is_named_and_not_asked_again(
    infoway: InfowayServer, secure: str, http_proxy: ProxyServer, scheme: str, given: str
) -> None:
    http_proxy.password = "me:another"
    url = http_proxy.url_at(http_proxy.port, given)
    answer = ask(secure if scheme == "https" else infoway.url, ALL_PROXY=url)
    assert answer.hopeless and answer.kind is FailureKind.NETWORK
    wanted = "does not take this user and password" if given else "asks for a user and a password"
    assert wanted in answer.fault and "407" in answer.fault and "ALL_PROXY" in answer.fault
    assert HUSH not in answer.fault and f"127.0.0.1:{http_proxy.port}" in answer.fault
    assert in_chinese(answer.words).endswith(
        "不接受此用户名和密码（HTTP 407）；请检查 ALL_PROXY"
        if given
        else "要求用户名和密码（HTTP 407）；应为 ALL_PROXY=http://用户名:密码@主机:端口"
    )


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_proxy_that_reaches_nothing_is_named_and_asked_again(
    infoway: InfowayServer, secure: str, http_proxy: ProxyServer, scheme: str, status: int
) -> None:
    http_proxy.status = status
    answer = ask(secure if scheme == "https" else infoway.url, ALL_PROXY=http_proxy.url)
    assert not answer.hopeless and answer.kind is FailureKind.NETWORK
    assert f"HTTP {status}" in answer.fault and "ALL_PROXY" in answer.fault
    assert in_chinese(answer.words) == f"代理 {http_proxy.url} 应答 HTTP {status}；请检查 ALL_PROXY"


def test_what_a_server_behind_the_proxy_refuses_is_its_own_answer(
    infoway: InfowayServer, http_proxy: ProxyServer
) -> None:
    infoway.script = [Answer.json({"ret": 500, "msg": "down"}, 503)]
    assert ask(infoway.url, HTTP_PROXY=http_proxy.url).status == 503


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_dead_proxy_is_named(infoway: InfowayServer, secure: str, scheme: str) -> None:
    answer = ask(secure if scheme == "https" else infoway.url, ALL_PROXY="http://127.0.0.1:1")
    assert not answer.hopeless and answer.kind is FailureKind.NETWORK
    assert "refused" in answer.fault and "http://127.0.0.1:1" in answer.fault
    assert answer.fault.endswith("see ALL_PROXY")
    assert in_chinese(answer.words) == "经代理 http://127.0.0.1:1：连接被拒绝；请检查 ALL_PROXY"


def test_a_proxy_whose_certificate_is_not_trusted_is_named(
    secure: str, certificate: tuple[ssl.SSLContext, Path]
) -> None:
    with ProxyServer(context=certificate[0]) as proxy:
        answer = ask(secure, HTTPS_PROXY=proxy.url)
        assert proxy.requests == []
    assert answer.hopeless and "certificate" in answer.fault.lower() and "HTTPS_PROXY" in answer.fault
    assert "：证书不受信任，是自签名证书" in in_chinese(answer.words)


@pytest.mark.parametrize("mode", ["hang", "garbage", "close"])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_is_none_is_a_fault_of_the_network(
    infoway: InfowayServer, secure: str, http_proxy: ProxyServer, mode: str, scheme: str
) -> None:
    http_proxy.mode = mode  # type: ignore[assignment]
    url = secure if scheme == "https" else infoway.url
    answer = ask(url, SHORT, ALL_PROXY=http_proxy.url)
    assert answer.fault and answer.kind is FailureKind.NETWORK and not answer.hopeless


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_closes_what_it_said_goes_on_is_named(
    infoway: InfowayServer, secure: str, http_proxy: ProxyServer, scheme: str
) -> None:
    http_proxy.mode = "promise"
    answer = ask(secure if scheme == "https" else infoway.url, SHORT, ALL_PROXY=http_proxy.url)
    assert answer.kind is FailureKind.NETWORK and not answer.hopeless
    assert f"through the proxy {http_proxy.url}" in answer.fault and answer.fault.endswith("see ALL_PROXY")


def test_an_answer_that_only_announces_one_is_not_the_proxys_last(secure: str, proxy: ProxyServer) -> None:
    proxy.mode = "announce"
    assert ask(secure, HTTPS_PROXY=proxy.url).status == 200


def test_a_server_behind_a_tunnel_that_announces_an_answer_is_a_fault_as_without_one(
    secure: str, infoway: InfowayServer, proxy: ProxyServer
) -> None:
    infoway.script = [Answer.raw(103, b"")]
    answer = ask(secure, SHORT, HTTPS_PROXY=proxy.url)
    assert "announces an answer" in answer.fault
    assert in_chinese(answer.words) == "HTTP 103 只是预告，没有给出真正的应答"


@pytest.mark.parametrize("what", ["api", "platform"])
def test_a_proxy_that_drips_its_answer_is_cut_before_a_request_would_be(
    secure: str, http_proxy: ProxyServer, platform: PlatformServer, what: str
) -> None:
    """The time of opening a connection holds over the proxy's answer too."""
    http_proxy.mode = "drip"
    limits = stockrt.Limits(connect_s=0.3, read_s=60.0, whole_s=120.0)
    if what == "platform":
        with pytest.raises(stockrt.DialError, match="no whole answer within") as caught:
            dial(platform.port, {"ALL_PROXY": http_proxy.url}, limits._replace(whole_s=0.6))
        assert http_proxy.url in str(caught.value)
        return
    connection = HttpConnection(secure, limits, load(ALL_PROXY=http_proxy.url).proxies)
    opened: list[Response | None] = []
    thread = threading.Thread(target=lambda: opened.append(connection.open()), daemon=True)
    thread.start()
    while thread.is_alive():  # as the API's client watches it
        thread.join(0.05)
        if connection.deadline and time.monotonic() >= connection.deadline:
            connection.abort()
    (fault,) = opened
    assert fault is not None and "no whole answer within 1 s" in fault.fault and http_proxy.url in fault.fault


def test_no_proxy_is_used_where_none_is_set(infoway: InfowayServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the process has beside its settings does not count."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert stockrt.get_once(infoway.url, PATH, API_LIMITS, NO_PROXIES, KEY).status == 200


# ------------------------------------------------------------------------------------------------------
# The WebSocket
# ------------------------------------------------------------------------------------------------------


@pytest.fixture
def platform() -> Iterator[PlatformServer]:
    """A platform that knows a module."""
    with PlatformServer() as made:
        made.know("known-hash")
        yield made


def dial(port: int, environ: Mapping[str, str], limits: Limits = stockrt.DIAL_LIMITS) -> stockrt.Link:
    """Open a WebSocket to the platform at a port."""
    return stockrt.Link(load(SERVER_IP="127.0.0.1", SERVER_PORT=str(port), **environ), "known-hash", limits)


@pytest.mark.parametrize("way", ["straight", "proxy"])
@pytest.mark.parametrize("tls", [False, True])
def test_a_websocket_goes_through_a_tunnel_with_tls_and_without(
    platform: PlatformServer,
    proxy: ProxyServer,
    certificate: tuple[ssl.SSLContext, Path],
    way: str,
    tls: bool,
) -> None:
    with TlsFront(certificate[0], platform.port) as front:
        port = front.port if tls else platform.port
        through = {"ALL_PROXY": proxy.url} if way == "proxy" else {}
        link = dial(port, {"SERVER_TLS": "1" if tls else "0", **through})
        link.send_text('{"type": "heartbeat"}')
        assert platform.wait_for(lambda p: p.frames, PATIENCE)
        platform.send_text("hello")
        deadline = time.monotonic() + PATIENCE
        heard: list[str | None] = []
        while "hello" not in heard and time.monotonic() < deadline:
            heard += link.frames()
        assert "hello" in heard
        link.close()
        assert platform.wait_for(lambda p: not p.connected, PATIENCE)
    assert proxy.targets() == ([f"CONNECT 127.0.0.1:{port}"] if way == "proxy" else [])


@pytest.mark.parametrize(
    ("password", "status", "words"), [("me:x", 0, "HTTP 407"), ("", 502, "HTTP 502"), ("", 403, "HTTP 403")]
)
def test_a_proxy_that_refuses_a_websocket_is_named(
    platform: PlatformServer, http_proxy: ProxyServer, password: str, status: int, words: str
) -> None:
    http_proxy.password, http_proxy.status = password, status
    with pytest.raises(stockrt.DialError, match=rf"the proxy .*{words}.*HTTP_PROXY") as caught:
        dial(platform.port, {"HTTP_PROXY": http_proxy.url})
    assert caught.value.status == 0  # which is the platform's


@pytest.mark.parametrize("tls", ["0", "1"])
def test_a_proxy_that_closes_the_way_to_a_websocket_is_named(
    platform: PlatformServer, http_proxy: ProxyServer, tls: str
) -> None:
    http_proxy.mode = "promise"
    with pytest.raises(stockrt.DialError, match=r"through the proxy .*; see ALL_PROXY"):
        dial(platform.port, {"SERVER_TLS": tls, "ALL_PROXY": http_proxy.url})


def test_a_platform_that_refuses_behind_a_proxy_has_its_own_status(
    platform: PlatformServer, http_proxy: ProxyServer
) -> None:
    platform.forget("known-hash")
    with pytest.raises(stockrt.DialError) as caught:
        dial(platform.port, {"HTTP_PROXY": http_proxy.url})
    assert caught.value.status == 403


@pytest.mark.parametrize("way", ["straight", "proxy"])
def test_a_tls_handshake_that_never_ends_is_cut(
    certificate: tuple[ssl.SSLContext, Path], http_proxy: ProxyServer, way: str
) -> None:
    environ = {"ALL_PROXY": http_proxy.url} if way == "proxy" else {}
    errors: list[Exception] = []

    def run() -> None:
        try:
            dial(front.port, {"SERVER_TLS": "1", **environ}, PATIENT)
        except stockrt.DialError as error:
            errors.append(error)

    with TlsFront(certificate[0], 1, drips=True) as front:
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert len(errors) == 1


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_handshake_of_the_api_that_never_ends_is_cut(
    certificate: tuple[ssl.SSLContext, Path], http_proxy: ProxyServer, scheme: str
) -> None:
    done: list[Response] = []
    environ = {"HTTPS_PROXY": http_proxy.url} if scheme == "https" else {}
    with TlsFront(certificate[0], 1, drips=True) as front:
        url = f"https://127.0.0.1:{front.port}"
        thread = threading.Thread(target=lambda: done.append(ask(url, PATIENT, **environ)), daemon=True)
        thread.start()
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert "no whole answer within" in done[0].fault
    assert "：0 秒内没有收到完整的应答" in in_chinese(done[0].words)


# ------------------------------------------------------------------------------------------------------
# Faults of the network without a proxy
# ------------------------------------------------------------------------------------------------------


@each(
    ("head", "said"),
    [
        (b"", "对方未应答就关闭了连接"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "应答不是 HTTP（SSH-2.0-OpenSSH_9.2）"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf", "应答不完整"),
    ],
)
def test_what_a_server_does_instead_of_answering_is_told_in_chinese_with_its_place(
    head: bytes, said: str
) -> None:
    with Raw(head) as server:
        answer = stockrt.get_once(server.url, "/", API_LIMITS)
    place = server.url.removeprefix("http://")
    assert in_chinese(answer.words, *["SSH-2.0-OpenSSH_9.2"][: head[:3] == b"SSH"]) == f"{place}：{said}"
    assert str(answer.words) == f"{place}: {answer.fault}"


@pytest.mark.parametrize(
    "head",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/1.1 twohundred OK\r\n\r\n",
        b"HTTP/1.1 200 " + b"O" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1_000 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nnope",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 12\r\n\r\n\x1f\x8b\x08 nothing ",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf",
    ],
)
def test_what_is_no_http_is_a_fault_of_the_network_and_said(
    head: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with Raw(head) as server:
        answer = stockrt.get_once(server.url, "/", API_LIMITS)
    assert answer.fault and answer.fault.isprintable() and len(answer.fault) < 250
    assert answer.kind is FailureKind.NETWORK and not answer.hopeless
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_an_answer_that_unpacks_to_no_end_takes_no_memory(infoway: InfowayServer) -> None:
    infoway.script = [Answer.gzip_bomb(1 << 28)]
    tracemalloc.start()
    try:
        answer = ask(infoway.url)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "more than 16 MiB" in answer.fault and answer.kind is FailureKind.API and answer.hopeless
    assert in_chinese(answer.words) == "应答超过 16 MiB"
    assert peak < 8 * stockrt.MAX_ANSWER_BYTES


class Raw:
    """Answers every connection with the same bytes, and closes it."""

    def __init__(self, answer: bytes) -> None:
        import socket

        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                with client:
                    client.recv(65536)
                    client.sendall(self._answer)
