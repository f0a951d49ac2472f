"""No secret and no piece of one is shown: it is masked before a text is shortened, however it was encoded."""

from __future__ import annotations

import base64
import html
import json
import re
import ssl
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from kit.cases import each

import stockrt
from stockrt import Response, decide, load_settings, network_words, one_line

NOW = datetime(2026, 1, 2, tzinfo=UTC)
KEY, PASSWORD, PROXY_PASSWORD = 'k9/Zq+7w=="xR2~vT5&', 'p\\w"<d é&4711', "s3cret pr<x>y!"
PAIR = f"someone:{PROXY_PASSWORD}"
# The beginning of a secret that is long enough to be recognised as one.
PIECE = 4


def as_escaped_json(text: str) -> str:
    """A text as JSON writes it that knows ASCII alone."""
    return json.dumps(text)[1:-1]


def as_base64_of_proxy(text: str) -> str:
    """What a proxy's header holds, if it is the proxy's password."""
    return base64.b64encode(PAIR.encode()).decode() if text == PROXY_PASSWORD else text


ENCODINGS: tuple[Callable[[str], str], ...] = (
    str,
    quote,
    quote_plus,
    lambda text: quote(text, safe=""),
    lambda text: re.sub("%..", lambda found: found[0].lower(), quote(text, safe="")),
    as_escaped_json,
    lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
    lambda text: repr(text)[1:-1],
    html.escape,
    as_base64_of_proxy,
)


@pytest.fixture(autouse=True)
def settings() -> stockrt.Settings:
    """Settings with a key, a password of MongoDB, and one of a proxy, each of odd characters."""
    environ = {
        "INFOWAY_API_KEY": KEY,
        "MONGODB_HOST": f"mongodb://user:{quote(PASSWORD, safe='')}@db",
        "HTTPS_PROXY": f"http://someone:{quote(PROXY_PASSWORD, safe='')}@proxy:3128",
        "STATE_DIRECTORY": "/nowhere",
    }
    return load_settings(environ, None, (), is_root=False).settings


def pieces(secret: str) -> set[str]:
    """What must not be seen of a secret: its beginning, in any encoding."""
    return {encode(secret)[:PIECE] for encode in ENCODINGS}


@each("secret", [KEY, PASSWORD, PROXY_PASSWORD])
@each("encode", ENCODINGS)
@each("limit", [40, 160, 300])
def test_a_line_is_masked_before_it_is_cut(secret: str, encode: Callable[[str], str], limit: int) -> None:
    shown = encode(secret)
    for place in range(limit - len(shown) - 4, limit):
        line = one_line("." * place + shown, limit)
        assert not line.strip(".*…"), line


@given(st.text(max_size=30), st.integers(0, 200), st.sampled_from([KEY, PASSWORD, PROXY_PASSWORD]))
@example("", 155, KEY)
def test_nothing_of_a_key_that_the_api_echoes_is_told(before: str, more: int, secret: str) -> None:
    body = json.dumps({"ret": 401, "msg": f"{before}{'.' * more}{secret} is not valid"})
    words = decide(Response(401, body.encode()), NOW).failure.words
    assert not any(piece in words for piece in pieces(secret) if piece not in before + "is not valid")


def test_a_record_and_a_code_that_hold_a_key_tell_nothing_of_it() -> None:
    with pytest.raises(ValueError) as found:
        stockrt.read_trade(["." * 30, KEY])
    assert not any(piece in str(found.value) for piece in pieces(KEY))


@each("make", [OSError, ssl.SSLError, ValueError])
def test_what_the_network_says_is_masked_before_pieces_of_it_are_left_out(make: type[Exception]) -> None:
    """What stands between < and > is taken for an object's address."""
    words = network_words(make(f"no way to {PROXY_PASSWORD}: " + "." * 170 + KEY))
    assert "s3cr" not in words and "y!" not in words and KEY[:PIECE] not in words


def test_a_log_line_is_masked_in_each_encoding(settings: stockrt.Settings) -> None:
    for secret in (KEY, PASSWORD, PROXY_PASSWORD):
        for encode in ENCODINGS:
            assert settings.redact(f"<{encode(secret)}>") == "<***>"


def test_the_settings_loaded_last_are_masked(tmp_path: Path) -> None:
    load_settings({"INFOWAY_API_KEY": "another-key", "STATE_DIRECTORY": str(tmp_path)}, None, ())
    assert one_line("another-key") == "***"
