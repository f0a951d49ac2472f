"""What follows from an answer of the API, and what its records become."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from kit import infoway_server
from kit.cases import each
from kit.chinese import in_chinese
from kit.clock import FakeClock
from kit.ledger import NoLedger

import stockrt
from stockrt import (
    BACKOFF_CAP_S,
    BACKOFF_FIRST_S,
    EARLIEST_TRADE_MS,
    LATEST_TRADE_MS,
    MAX_IN_FLIGHT,
    REFUSALS,
    Action,
    Batch,
    Failure,
    FailureKind,
    KeyPool,
    Outcome,
    Plan,
    Refusal,
    Response,
    Trade,
    Verdict,
    backoff,
    decide,
    identity,
    json_object,
    read_records,
    read_trade,
    steer,
    to_document,
    wanted_in_flight,
)

NOW = datetime(2026, 8, 15, 12, tzinfo=UTC)
ASKED = Batch("stock", "AAPL.US,TSLA.US,MSFT.US")
GATEWAY_PAGE = "<html><head><title>429 Too Many Requests</title></head><body>nginx</body></html>"


def verdict_on(body: object, status: int = 200, retry_after: str = "") -> Verdict:
    """Decide on a body: bytes, a text, or what is made JSON."""
    if not isinstance(body, bytes):
        body = (body if isinstance(body, str) else json.dumps(body)).encode()
    return decide(Response(status, body, retry_after), NOW)


def record(**fields: object) -> dict[str, object]:
    """Return a good record with other fields put in."""
    return {"s": "AAPL.US", "t": 1786751999691, "p": "305.771", "v": "1", "vw": "305.771", "td": 0} | fields


def outcome_of(records: Sequence[object]) -> Outcome:
    """Send records through an answer's text, as the API would, and read them."""
    body = json.dumps({"ret": 200, "msg": "success", "traceId": "x", "data": list(records)})
    verdict = verdict_on(body)
    assert verdict.action is Action.ACCEPT
    return read_records(ASKED, verdict.records)


# ------------------------------------------------------------------------------------------------------
# Answers
# ------------------------------------------------------------------------------------------------------

# Production answers, verbatim.
STOCK_TRADE = (
    '{"ret":200,"msg":"success","traceId":"a81a03fa-c575-4e74-a71b-e36bf31376ec","data":[{"s":"AAPL.US",'
    '"t":1786751999691,"p":"305.771","v":"1","vw":"305.771","td":0}]}'
)
CRYPTO_TRADE = (
    '{"ret":200,"msg":"success","traceId":"69302ddf-f335-41e4-94bc-882f6c5e5f01","data":[{"s":"BTCUSDT",'
    '"t":1786775889755,"p":"63059.36","v":"0.01056","vw":"665.9068416","td":1}]}'
)
TOKEN_INVALID = '{"code":401,"message":"Token invalid","timestamp":1786778697472}'
RATE_LIMIT = '{"detail":"Rate limit exceeded"}'
NOT_FOUND = (
    '{"type":"about:blank","title":"Not Found","status":404,"detail":"No static resource common/basic/markets'
    '/trading_hours.","instance":"/common/basic/markets/trading_hours"}'
)
BAD_REQUEST = '{"type":"about:blank","title":"Bad Request","status":400,"detail":"Failed to read request."}'


def said(ret: object, msg: str = "", **more: object) -> str:
    """Return an answer of the API's usual form."""
    return json.dumps({"ret": ret, "msg": msg, "traceId": "x", "data": None} | more)


@each(
    ("status", "body", "action", "words"),
    [
        (200, STOCK_TRADE, Action.ACCEPT, ""),
        (200, CRYPTO_TRADE, Action.ACCEPT, ""),
        (200, said(200, "success"), Action.ACCEPT, ""),
        (200, said(200, "success", data=[]), Action.ACCEPT, ""),
        (401, TOKEN_INVALID, Action.KEY_DEAD, "Token invalid"),
        (200, TOKEN_INVALID, Action.KEY_DEAD, "Token invalid"),
        (401, "Unauthorized", Action.KEY_DEAD, "HTTP 401: Unauthorized"),
        (401, "Unauthorized\n", Action.KEY_DEAD, "HTTP 401: Unauthorized"),
        (401, said(401, "who are you?"), Action.KEY_DEAD, "who are you?"),
        (401, said(500, "Apikey not exists"), Action.KEY_DEAD, "Apikey not exists"),
        (401, "", Action.KEY_DOUBTED, "HTTP 401, not in the API's words"),
        (401, GATEWAY_PAGE, Action.KEY_DOUBTED, "HTTP 401, not in the API's words"),
        (401, "<html>Unauthorized</html>", Action.KEY_DOUBTED, "not in the API's words"),
        (401, '{"message":"Unauthorized"}', Action.KEY_DOUBTED, "HTTP 401: Unauthorized, not in the API's"),
        (401, '{"error":"login required"}', Action.KEY_DOUBTED, "not in the API's words"),
        (401, '{"code":401,"message":"Log in to the wireless network"}', Action.KEY_DOUBTED, "Log in to"),
        (401, '["Token invalid"]', Action.KEY_DOUBTED, "not in the API's words"),
        (200, RATE_LIMIT, Action.SLOW_DOWN, "Rate limit exceeded"),
        (429, RATE_LIMIT, Action.SLOW_DOWN, "Rate limit exceeded"),
        (429, '{"code":429,"message":"Too many"}', Action.SLOW_DOWN, "Too many"),
        (200, '{"code":429,"message":"Too many"}', Action.SLOW_DOWN, "HTTP 429: Too many"),
        (200, '{"code":401,"message":"Bad key"}', Action.KEY_DOUBTED, "HTTP 401: Bad key"),
        (429, GATEWAY_PAGE, Action.SLOW_DOWN, "429"),
        (429, "", Action.SLOW_DOWN, "429"),
        (200, said(501, "Request frequency exceed the limit: 1/s"), Action.SLOW_DOWN, "exceed the limit"),
        (200, said(502, "Request frequency for the day upper limit"), Action.KEY_DAY_OVER, "upper limit"),
        (429, said(502, "Request frequency for the day upper limit"), Action.KEY_DAY_OVER, "upper limit"),
        (200, said(509, "Token expired"), Action.KEY_DEAD, "Token expired"),
        (200, said(514, "No permission for the market"), Action.KEY_LACKS_PRODUCT, "No permission"),
        (200, said(508, "All product not exists"), Action.CODES_UNKNOWN, "not exists"),
        (200, said(500, "All product not exists"), Action.CODES_UNKNOWN, "not exists"),
        (500, said(500, "All product not exists"), Action.CODES_UNKNOWN, "not exists"),
        (200, said(508, "other words"), Action.CODES_UNKNOWN, "other words"),
        (200, said(505, "Products quantity exceeds the limit：100"), Action.GIVE_UP, "quantity exceeds"),
        (200, said(506, "parameter error"), Action.GIVE_UP, "parameter error"),
        (200, said(507, "parameter missing"), Action.GIVE_UP, "parameter missing"),
        (400, said(506, "parameter error"), Action.GIVE_UP, "parameter error"),
        (400, BAD_REQUEST, Action.GIVE_UP, "Failed to read request"),
        (404, NOT_FOUND, Action.GIVE_UP, "No static resource"),
        (404, "", Action.GIVE_UP, "404"),
        (403, GATEWAY_PAGE, Action.GIVE_UP, "403"),
        (200, said(500, "System error"), Action.RETRY, "System error"),
        (500, said(500, "System error"), Action.RETRY, "System error"),
        (500, "", Action.RETRY, "500"),
        (502, GATEWAY_PAGE, Action.RETRY, "502"),
        (503, '{"message":"Service Unavailable"}', Action.RETRY, "Service Unavailable"),
        (504, "{}", Action.RETRY, "504"),
        (408, "", Action.RETRY, "408"),
        (502, '{"code":502,"message":"Bad Gateway"}', Action.RETRY, "Bad Gateway"),
        (200, '{"code":502,"message":"Bad Gateway"}', Action.RETRY, "Bad Gateway"),
        (524, GATEWAY_PAGE, Action.RETRY, "524"),
        (499, "", Action.GIVE_UP, "499"),
        (302, "", Action.GIVE_UP, "redirection"),
    ],
)
def test_every_answer_of_the_documentation_leads_to_its_action(
    status: int, body: str, action: Action, words: str
) -> None:
    """And the reason holds what the API said."""
    verdict = verdict_on(body, status)
    assert verdict.action is action
    assert words in verdict.failure.words


@each(
    ("status", "body", "words"),
    [
        (401, GATEWAY_PAGE, "HTTP 401，不像 API 的应答，像是来自途中的网关或登录页"),
        (
            401,
            '{"error":1,"message":"Log in"}',
            "HTTP 401：Log in，不像 API 的应答，像是来自途中的网关或登录页",
        ),
        (403, "", "HTTP 403，被网关拒绝：原因可能是密钥、地区或风控"),
        (302, "", "HTTP 302，是重定向，不予跟随"),
        (429, '{"code":429,"message":"Too many"}', "HTTP 429：Too many"),
        (200, said(509, "Token expired."), "API 返回 509：Token expired"),
        (200, said(505), "API 返回 505：无其他说明"),
        (200, '{"ret":200,"data":{}}', "API 的应答称成功，却没有列表 `data`"),
    ],
)
def test_what_the_api_refused_can_be_read_in_chinese(status: int, body: str, words: str) -> None:
    """The API's own words stay as they came, but for the stop at their end: ours go on."""
    assert stockrt.in_language(verdict_on(body, status).failure.words, "zh") == words


def rows(*names: str) -> list[tuple[Refusal, Any]]:
    """Return each row of the table of refusals with every value that it has under these names."""
    return [(row, value) for row in REFUSALS for name in names for value in getattr(row, name)]


@each(("row", "ret"), rows("rets"), ids=lambda value: str(value)[:20])
@each("status", [200, 400, 401, 429, 500])
def test_every_ret_of_the_table_is_believed_whatever_its_text_and_the_status_are(
    row: Refusal, ret: int, status: int
) -> None:
    """And it says whose fault that is, and which setting to look at."""
    verdict = verdict_on(said(ret, "other words"), status)
    assert (verdict.action, verdict.failure.kind, verdict.setting) == row[:3]
    assert verdict.failure.words == f"the API says {ret}: other words"


@each(("row", "beginning"), rows("beginnings"), ids=lambda value: str(value)[:30])
@each("envelope", ['{"ret":500,"msg":%s}', '{"ret":0,"msg":%s}', '{"detail":%s}',
                                      '{"message":%s}', '{"ret":200,"msg":%s,"data":[]}'])  # fmt: skip
def test_every_refusal_is_known_by_how_its_text_begins(row: Refusal, beginning: str, envelope: str) -> None:
    """Any business error may come as HTTP 200 with `ret` 500; in small letters or large ones."""
    for text in (beginning, f"{beginning}, and more words", beginning.upper()):
        verdict = verdict_on(envelope % json.dumps(text))
        assert (verdict.action, verdict.failure.kind, verdict.setting) == row[:3]
        assert text in verdict.failure.words


@each("text", ["System error: No permission", "busy (Rate limit exceeded)", "Param"])
def test_a_text_that_holds_a_refusal_further_on_is_none(text: str) -> None:
    """Only the beginning tells: what follows it is somebody's free words."""
    assert verdict_on(said(500, text)).action is Action.RETRY


@each("body", ["", GATEWAY_PAGE, "{}", '{"message":"words"}'], ids=["", "page", "{}", "JSON"])
def test_every_status_leads_to_the_first_row_that_has_it(body: str) -> None:
    """Where the body says nothing: none is a success, and none is without words."""
    for status in range(300, 600):
        first = next(row for row in REFUSALS if status in row.statuses)
        verdict = verdict_on(body, status)
        assert (verdict.action, verdict.failure.kind, verdict.setting) == first[:3]
        assert verdict.failure.words.startswith(f"HTTP {status}")


def test_no_ret_and_no_text_stands_in_two_rows() -> None:
    """One of them would never count."""
    rets = [value for _, value in rows("rets")]
    texts = [value.casefold() for _, value in rows("beginnings")]
    assert len(set(rets)) == len(rets)
    assert not [(one, other) for one, other in itertools.permutations(texts, 2) if one.startswith(other)]


SHAPES = tuple(infoway_server.shapes(403))
# What follows, and which setting an operator is told to look at.
OF_REFUSALS = {
    (Action.SLOW_DOWN, "INFOWAY_PLAN"): (
        "200_rate_limit", "429_json", "429_html", "ret_501", "wrapped_501",
    ),
    (Action.RETRY, "INFOWAY_API_BASE_URL"): ("200_html_cn",),
    (Action.RETRY, ""): (
        "ret_500", "500_empty", "500_json", "502_html", "503_html", "503_json", "504_empty", "ret_0", "ret_0_error",
        "ret_0_records", "502_html_cn", *(f"524_{shape}" for shape in SHAPES),
    ),
    (Action.GIVE_UP, ""): (
        "ret_505", "ret_506", "ret_507", "wrapped_505", "wrapped_506", "wrapped_507",
    ),
    (Action.GIVE_UP, "INFOWAY_API_BASE_URL"): ("400_problem", "404_problem"),
    (Action.GIVE_UP, "INFOWAY_API_KEY"): [f"{status}_{shape}" for status in (403, 499) for shape in SHAPES],
    (Action.KEY_DEAD, "INFOWAY_API_KEY"): (
        "401_token_invalid", "401_unauthorized", "ret_509", "wrapped_509", "wrapped_no_key", "wrapped_wrong_key",
    ),
    (Action.KEY_DAY_OVER, "INFOWAY_PLAN"): ("ret_502", "wrapped_502"),
    (Action.KEY_LACKS_PRODUCT, "INFOWAY_API_KEY"): ("ret_514", "wrapped_514"),
    (Action.CODES_UNKNOWN, ""): ("ret_508", "ret_500_not_exists", "wrapped_508"),
}  # fmt: skip


def test_every_refusal_that_the_simulator_knows_leads_to_its_action_and_its_setting() -> None:
    """Word for word as the API gives them, by `ret`, wrapped in 500, and in all the shapes of gateways."""
    found: dict[tuple[Action, str], set[str]] = {}
    for name, refusal in infoway_server.EVERY_REFUSAL.items():
        verdict = verdict_on(refusal.body or b"", refusal.status)
        assert verdict.failure.words and not verdict.records
        found.setdefault((verdict.action, verdict.setting), set()).add(name)
    assert found == {follows: set(names) for follows, names in OF_REFUSALS.items()}


@each(
    "body",
    [
        b'{"ret":200,"data":[{"s":"\xff"}]}',
        "",
        " ",
        "<html>OK</html>",
        "OK",
        "null",
        "200",
        "[]",
        "{}",
        '"success"',
        '{"data":[]}',
        '{"msg":"success","data":[]}',
        '{"code":200,"data":[]}',
        '{"code":200,"message":"success","data":null}',
        said(0, data=[]),
        said("200", data=[]),
        said(200.0, data=[]),
        said(True, data=[]),
        said(None, data=[]),
        said([200], data=[]),
        said(20000, data=[]),
        '{"ret":200,"msg":"success"}',
        said(200, data={}),
        said(200, data="[]"),
        said(200, data=0),
        said(200, data=False),
        STOCK_TRADE[:-1],
        STOCK_TRADE + "}",
        "[" * 100_000,
        '{"ret":200,"data":' + "[" * 100_000 + "]" * 100_000 + "}",
    ],
    ids=lambda body: str(body)[:40],
)
def test_a_success_that_is_not_one_is_asked_again(body: str | bytes) -> None:
    """HTTP 200 says nothing; only ret 200 with a list of data, or null, is an answer."""
    assert verdict_on(body).action is Action.RETRY


@each("status", [200, 201, 400, 404, 418, 500, 503])
@each(
    ("ret", "action"),
    [
        (501, Action.SLOW_DOWN),
        (502, Action.KEY_DAY_OVER),
        (505, Action.GIVE_UP),
        (508, Action.CODES_UNKNOWN),
        (509, Action.KEY_DEAD),
        (514, Action.KEY_LACKS_PRODUCT),
    ],
)
def test_the_answer_is_believed_by_its_ret_whatever_the_status(status: int, ret: int, action: Action) -> None:
    """A gateway may put any status on it."""
    assert verdict_on(said(ret, "words"), status).action is action


@pytest.mark.parametrize(("hopeless", "action"), [(False, Action.RETRY), (True, Action.GIVE_UP)])
def test_a_fault_on_the_way_is_tried_again_unless_it_is_hopeless(hopeless: bool, action: Action) -> None:
    """The reason is the network's, whatever its words are."""
    for words in ("the connection broke", "BadStatusLine: x", "LineTooLong: y", "error: Error -3 while z"):
        verdict = decide(Response(fault=words, hopeless=hopeless), NOW)
        assert (verdict.action, verdict.failure) == (action, Failure(FailureKind.NETWORK, words))


@each(
    ("retry_after", "seconds"),
    [
        ("", 0),
        ("0", 0),
        ("7", 7),
        ("Sat, 15 Aug 2026 12:00:30 GMT", 30),
        ("Sat, 15 Aug 2026 14:00:30 +0200", 30),
        ("Sat, 15 Aug 2026 12:00:30", 30),
        ("Saturday, 15-Aug-26 12:00:30 GMT", 30),
        ("Sat, 15 Aug 2026 11:00:00 GMT", 0),
        ("3600", 3600),
        ("86400", 3600),
        ("999999999", 3600),
        ("Sun, 16 Aug 2026 12:00:00 GMT", 3600),
        ("Sat, 15 Aug 2099 12:00:30 GMT", 3600),
        ("soon", 0),
        ("-1", 0),
        ("1.5", 0),
        ("７", 0),
        ("nan", 0),
        ("Sat, 15 Aug 2026 12:00:30 +99999999999999", 0),
        ("Sat, 15 Aug 99999 12:00:30 GMT", 0),
    ],
)
@each(("status", "body"), [(429, GATEWAY_PAGE), (200, RATE_LIMIT), (200, said(501, "x")), (503, "")])
def test_retry_after_is_obeyed_as_a_number_and_as_a_date(
    status: int, body: str, retry_after: str, seconds: float
) -> None:
    """Wherever a later time is of use; nonsense counts as none."""
    assert verdict_on(body, status, retry_after).wait_s == seconds


@given(
    st.datetimes(datetime(2026, 8, 15, 12), datetime(2026, 8, 15, 14))
    | st.datetimes(NOW.replace(tzinfo=None))
)
def test_any_retry_after_date_is_read(at: datetime) -> None:
    """To the second, and believed for an hour."""
    aware = at.replace(microsecond=0, tzinfo=UTC)
    waited = verdict_on("", 429, format_datetime(aware, usegmt=True)).wait_s
    assert waited == min(3600, (aware - NOW).total_seconds())


@each("action", Action, ids=lambda action: action.name)
def test_an_answer_steers_its_key_by_the_verb_that_fits(action: Action) -> None:
    """And no other key; what says nothing of the key leaves it as it was."""
    clock = FakeClock(NOW.timestamp())
    keys = ("the-first-key-of-two", "another-key-that-is-good")
    pool = KeyPool([(key, Plan("0", 0, 0)) for key in keys], NoLedger(), clock)
    steer(pool, pool.keys[0], "japan", Verdict(action, Failure(FailureKind.API, "why"), wait_s=7))
    first, other = pool.describe()
    assert (other["state"], other["not_for"]) == ("ready", [])
    expected = {
        Action.KEY_DEAD: ("out", "why", "", []),
        Action.KEY_DOUBTED: ("resting", "why", "2026-08-15T12:01:01.000Z", []),
        Action.KEY_LACKS_PRODUCT: ("ready", "", "", ["japan"]),
        Action.KEY_DAY_OVER: ("resting", "the day's quota is used up (why)", "2026-08-16T00:00:01.000Z", []),
        Action.SLOW_DOWN: ("resting", "why", "2026-08-15T12:00:07.000Z", []),
    }.get(action, ("ready", "", "", []))
    assert (first["state"], first["why"], first["until"], first["not_for"]) == expected


@each("depth", [64, 300, 900, 1600, 12_000, 400_000])
@each("shape", ["[]", "{}"])
def test_an_answer_that_is_nested_too_deep_is_refused_by_name(depth: int, shape: str) -> None:
    deep = ('{"a":' if shape == "{}" else "[") * depth + "1" + shape[1] * depth
    body = f'{{"ret": 200, "msg": "success", "data": {deep}}}'.encode()
    assert json_object(body) is None
    verdict = decide(Response(200, body), datetime(2026, 1, 2, tzinfo=UTC))
    assert verdict.action is Action.RETRY or verdict.action is Action.GIVE_UP
    assert "nested deeper than 64 levels" in verdict.failure.words


def test_an_answer_that_is_nested_as_deep_as_it_may_be_is_read() -> None:
    assert json_object(b'{"a":' * 64 + b"1" + b"}" * 64)
    assert json_object(b'{"a":' * 65 + b"1" + b"}" * 65) is None


def test_brackets_in_texts_hide_no_depth() -> None:
    """How many brackets an answer has tells only how much may be in it."""
    texts = b'"s": "' + b"[{]}" * 200 + b'", '
    assert json_object(b"{" + texts + b'"a":' + b'{"a":' * 63 + b"1" + b"}" * 64)
    assert json_object(b"{" + texts + b'"a":' + b'{"a":' * 64 + b"1" + b"}" * 65) is None
    many = b'"data": [' + b"{}, " * 200
    assert json_object(b"{" + many + b"[" * 62 + b"]" * 62 + b"]}")
    assert json_object(b"{" + many + b"[" * 63 + b"]" * 63 + b"]}") is None


def test_a_reason_is_one_short_printable_line() -> None:
    """The API's words go to terminals, logs and the platform."""
    reason = verdict_on(said(506, "a\x1b[31m\r\nb" * 1000)).failure.words
    assert reason.isprintable()
    assert len(reason) < 250


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(
        [200, 500, 508, 10**40, "200", "success", "Rate limit exceeded", "All product not exists"]
    )
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
FIELDS: dict[str, st.SearchStrategy[object]] = {
    "s": st.sampled_from([*ASKED.split(), "NOBODY.US"]) | JSON,
    "t": st.integers(EARLIEST_TRADE_MS, LATEST_TRADE_MS - 1) | JSON,
    "p": st.decimals(0, 10**6, places=3).map(str) | JSON,
    "v": st.integers(0, 10**6).map(str) | JSON,
    "vw": st.decimals(0, 10**6, places=3).map(str) | JSON,
    "td": st.integers(0, 2) | JSON,
}
RECORDS = st.lists(
    st.fixed_dictionaries(FIELDS) | st.fixed_dictionaries({}, optional=FIELDS) | JSON, max_size=6
)
ENVELOPES = st.fixed_dictionaries(
    {},
    optional={
        "ret": st.just(200) | st.sampled_from([0, 401, 429, *range(500, 516), 200.0, "200", True]) | JSON,
        "code": st.sampled_from([200, 401, 500]) | JSON,
        "msg": JSON,
        "message": JSON,
        "detail": JSON,
        "title": JSON,
        "data": RECORDS | st.none() | JSON,
    },
)
LIKELY_SUCCESS = st.builds(lambda data: {"ret": 200, "msg": "success", "data": data}, RECORDS)
STATUSES = st.sampled_from([200, 200, 400, 401, 404, 429, 500, 503]) | st.integers(0, 999)
RETRY_AFTERS = (
    st.just("")
    | st.text(max_size=30)
    | st.integers().map(str)
    | st.from_regex(r"\A(Mon, )?\d{1,3} (Jan|Aug|Xyz) \d{1,6} \d\d:\d\d:\d\d( GMT| [+-]\d{1,20})?\Z")
)


def check_any_answer(status: int, body: bytes, retry_after: str) -> None:
    """Decide and read, and check the promises that hold for every answer."""
    verdict = decide(Response(status, body, retry_after), NOW)
    assert verdict.failure.words.isprintable()
    assert 0 <= verdict.wait_s < math.inf
    if verdict.action is not Action.ACCEPT:
        assert verdict.failure.words
        assert not verdict.records
        return
    envelope = json.loads(body)
    assert type(envelope["ret"]) is int
    assert envelope["ret"] == 200
    assert envelope["data"] is None or isinstance(envelope["data"], list)
    outcome = read_records(ASKED, verdict.records)
    codes = [*(trade.s for trade in outcome.trades), *outcome.unknown, *outcome.failures]
    assert sorted(codes) == sorted(ASKED.split())
    assert all(failure.words for failure in outcome.failures.values())
    assert {failure.kind for failure in outcome.failures.values()} <= {FailureKind.BAD_RECORD}
    for trade in outcome.trades:
        assert read_trade(trade._asdict()) == trade
        sent = [r for r in envelope["data"] or () if isinstance(r, dict)]
        assert any((r.get("s"), r.get("t")) == (trade.s, trade.t) for r in sent)


@given(STATUSES, st.binary() | st.text().map(str.encode), RETRY_AFTERS)
@example(429, b"", "1 Jan 2026 00:00:00 +99999999999999")
def test_random_bytes_never_raise_and_are_never_a_success(status: int, body: bytes, retry_after: str) -> None:
    """Whatever the status and the headers are."""
    check_any_answer(status, body, retry_after)


@given(STATUSES, ENVELOPES | LIKELY_SUCCESS | JSON, RETRY_AFTERS, st.integers(0, 3))
@example(200, {"code": 200, "data": []}, "", 0)
@example(200, {"ret": 200, "data": [{"s": "AAPL.US", "t": None}]}, "", 0)
def test_random_json_never_raises_and_never_becomes_a_wrong_success(
    status: int, envelope: object, retry_after: str, cut: int
) -> None:
    """Every asked code ends as a trade, as unknown or as failed, exactly once; cut short or whole."""
    body = json.dumps(envelope).encode()
    check_any_answer(status, body[: len(body) - cut], retry_after)


# ------------------------------------------------------------------------------------------------------
# Records
# ------------------------------------------------------------------------------------------------------


def test_the_production_answers_become_their_trades() -> None:
    """Field by field, as the API sent them."""
    (trade,) = read_records(Batch("stock", "AAPL.US"), verdict_on(STOCK_TRADE).records).trades
    assert trade == Trade("AAPL.US", 1786751999691, "305.771", "1", "305.771", 0)
    (trade,) = read_records(Batch("crypto", "BTCUSDT"), verdict_on(CRYPTO_TRADE).records).trades
    assert trade == Trade("BTCUSDT", 1786775889755, "63059.36", "0.01056", "665.9068416", 1)


def test_null_data_means_that_no_code_is_known() -> None:
    """All of them may be asked elsewhere."""
    outcome = read_records(ASKED, verdict_on(said(200, "success")).records)
    assert outcome == Outcome(ASKED, [], ASKED.split(), {})


BAD_RECORDS: list[tuple[dict[str, object], str]] = [
    ({"t": None}, "field t"),
    ({"t": "1786751999691"}, "field t"),
    ({"t": 1786751999691.0}, "field t"),
    ({"t": True}, "field t"),
    ({"t": math.nan}, "field t"),
    ({"t": 0}, "field t"),
    ({"t": -1}, "field t"),
    ({"t": 1786751999}, "field t"),
    ({"t": 1786751999691000}, "field t"),
    ({"t": 10**300}, "field t"),
    ({"t": []}, "field t"),
    ({"p": None}, "field p"),
    ({"p": ""}, "field p"),
    ({"p": "n/a"}, "field p"),
    ({"p": "NaN"}, "field p"),
    ({"p": "Infinity"}, "field p"),
    ({"p": "1,5"}, "field p"),
    ({"p": " 1"}, "field p"),
    ({"p": "1\n"}, "field p"),
    ({"p": "+1"}, "field p"),
    ({"p": "1|2"}, "field p"),
    ({"p": "0x10"}, "field p"),
    ({"p": "1_0"}, "field p"),
    ({"p": "１"}, "field p"),
    ({"p": "1e999"}, "field p"),
    ({"p": "9" * 50}, "field p"),
    ({"p": 10**50}, "field p"),
    ({"p": True}, "field p"),
    ({"p": math.nan}, "field p"),
    ({"p": -math.inf}, "field p"),
    ({"p": ["1"]}, "field p"),
    ({"p": {"a": 1}}, "field p"),
    ({"v": None}, "field v"),
    ({"v": "-"}, "field v"),
    ({"v": False}, "field v"),
    ({"vw": None}, "field vw"),
    ({"vw": "."}, "field vw"),
    ({"td": None}, "field td"),
    ({"td": "1"}, "field td"),
    ({"td": 1.0}, "field td"),
    ({"td": True}, "field td"),
    ({"td": -1}, "field td"),
    ({"td": 10**30}, "field td"),
]


@each(("fields", "words"), BAD_RECORDS, ids=lambda value: str(value)[:40])
def test_a_bad_record_is_rejected_with_its_reason_and_costs_its_neighbours_nothing(
    fields: dict[str, object], words: str
) -> None:
    """Its code is named; those before and after it are taken."""
    outcome = outcome_of([record(s="TSLA.US"), record(**fields), record(s="MSFT.US")])
    assert [trade.s for trade in outcome.trades] == ["TSLA.US", "MSFT.US"]
    assert outcome.failures.keys() == {"AAPL.US"}
    kind, reason = outcome.failures["AAPL.US"]
    assert kind is FailureKind.BAD_RECORD
    assert reason.startswith(words + ":")
    assert reason.isprintable()
    assert len(reason) < 120
    assert not outcome.unknown


@each(("fields", "words"), BAD_RECORDS, ids=lambda value: str(value)[:40])
def test_a_bad_record_is_rejected_however_it_was_parsed(fields: dict[str, object], words: str) -> None:
    """A float is no time and a bool no number, even where they would compare well."""
    with pytest.raises(ValueError, match=f"{words}:"):
        read_trade(record(**fields))


@each(("fields", "words"), BAD_RECORDS, ids=lambda value: str(value)[:40])
def test_why_a_record_is_bad_can_be_read_in_chinese(fields: dict[str, object], words: str) -> None:
    told = in_chinese(outcome_of([record(**fields)]).failures["AAPL.US"].words)
    assert told.startswith(words.replace("field", "字段") + "：") and "，应为" in told


def test_what_is_missing_is_called_so_in_chinese() -> None:
    lacking = record()
    del lacking["td"]
    words = outcome_of([lacking]).failures["AAPL.US"].words
    assert in_chinese(words) == "字段 td：缺失，应为方向（0、1、2）"


@each("name", ["t", "p", "v", "vw", "td"])
def test_a_record_that_lacks_a_field_is_rejected(name: str) -> None:
    """Nothing is made up for it."""
    lacking = record()
    del lacking[name]
    assert "nothing" in outcome_of([lacking]).failures["AAPL.US"].words


@pytest.mark.parametrize(
    "stray",
    [
        None,
        True,
        7,
        "AAPL.US",
        [],
        [record()],
        {},
        record(s=None),
        record(s=7),
        record(s=["AAPL.US"]),
        record(s=""),
        record(s="nvda.us"),
        record(s="NVDA.US"),
        record(s="TSLA.US,MSFT.US"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_trade_that_was_asked_for_is_left_out(
    stray: object, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says so; the code that has no other record counts as unknown."""
    outcome = outcome_of([record(s="TSLA.US"), stray, record(s="MSFT.US")])
    assert [trade.s for trade in outcome.trades] == ["TSLA.US", "MSFT.US"]
    assert (outcome.unknown, outcome.failures) == (["AAPL.US"], {})
    assert len(caplog.records) == 1


def test_records_that_nobody_asked_for_are_one_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """With their number and the first reason, however many they are."""
    strays: list[object] = [record(s=f"X{number}.US") for number in range(5000)] + [None] * 5000
    outcome = outcome_of([record(s="TSLA.US"), *strays])
    assert [trade.s for trade in outcome.trades] == ["TSLA.US"]
    (line,) = [one.getMessage() for one in caplog.records]
    assert line == "10000 records of stock rejected, the first because: X0.US was not asked for"


def test_a_code_in_lower_case_is_the_one_that_was_asked_for() -> None:
    """Its record, too, is the code's own where it is a bad one."""
    outcome = outcome_of([record(s="aapl.us"), record(s="tsla.us", p="n/a"), record(s="MSFT.US")])
    assert [trade.s for trade in outcome.trades] == ["AAPL.US", "MSFT.US"]
    assert (list(outcome.unknown), list(outcome.failures)) == ([], ["TSLA.US"])


@each(
    "field",
    ["[" * 50 + "]" * 50, '{"a":' * 50 + "1" + "}" * 50, "9" * 5000, "-" + "9" * 5000, "9" * 5000 + ".0"],
    ids=["nested list", "nested object", "huge number", "huge negative", "huge fraction"],
)
@each("name", ["s", "t", "p", "v", "vw", "td"])
def test_nesting_and_huge_numbers_cost_the_neighbours_nothing(name: str, field: str) -> None:
    """What is no number in one record, or none that Python reads, is no reason to lose an answer."""
    good = json.dumps(record(s="TSLA.US"))
    bad = json.dumps(record(**{name: "HERE"})).replace('"HERE"', field)
    verdict = verdict_on(f'{{"ret":200,"msg":"success","data":[{bad},{good}]}}')
    assert verdict.action is Action.ACCEPT
    outcome = read_records(ASKED, verdict.records)
    assert [trade.s for trade in outcome.trades] == ["TSLA.US"]


@given(st.integers(1, 3000))
def test_any_depth_of_nesting_is_survived(depth: int) -> None:
    """It may be accepted or refused, but it does not raise."""
    nested = "[" * depth + "]" * depth
    for body in (nested, f'{{"ret":{nested}}}', f'{{"ret":200,"data":{nested}}}'):
        check_any_answer(200, body.encode(), "")
    check_any_answer(200, f'{{"ret":200,"data":[{{"s":"AAPL.US","t":{nested}}}]}}'.encode(), "")


@each(
    "text",
    [
        "1",
        "305.771",
        ".5",
        "0.00000001",
        "12345678901234567890",
        "1E-7",
        "1.5e+3",
        "0.123456789012",
        "0.1234567890123456",
        "63059.36123456789012",
    ],
)
def test_a_decimal_is_kept_as_it_was_sent(text: str) -> None:
    """Not a digit is changed, none lost: a coin's price times its volume has sixteen decimals."""
    trade = read_trade(record(p=text, v=text, vw=text))
    assert (trade.p, trade.v, trade.vw) == (text, text, text)


def test_a_volume_may_be_nothing_and_oil_may_cost_less() -> None:
    """As it did in April 2020."""
    trade = read_trade(record(s="USOIL", p="-37.63", v="0", vw="-0"), "common")
    assert (trade.p, trade.v, trade.vw) == ("-37.63", "0", "-0")


@each("product", stockrt.PRODUCTS)
@each(
    ("fields", "words"),
    [
        ({"p": "0"}, "p 0: it has not traded, or is suspended"),
        ({"p": "0.000"}, "p 0.000: it has not traded"),
        ({"p": "-5"}, "p -5: only energy at common has prices below zero"),
        ({"s": "USOIL", "p": "0"}, "p 0: it has not traded"),
        ({"v": "-1"}, "v -1: a volume is not below zero"),
        ({"t": 1786751999691 + 86_400_000}, "is more than a day ahead"),
        ({"t": LATEST_TRADE_MS - 1}, "is more than a day ahead"),
    ],
)
def test_a_record_that_is_no_trade_is_named_and_refused(
    product: str, fields: dict[str, object], words: str
) -> None:
    """Alone and among good ones, which it does not harm."""
    code = str(fields.get("s", "AAPL.US"))
    with pytest.raises(ValueError, match=re.escape(words)):
        read_trade(record(**fields), product, 1786751999691 + 86_399_999)
    batch = Batch(product, f"{code},TSLA.US")
    outcome = read_records(batch, [record(**fields), record(s="TSLA.US")], 1786751999.690)
    assert [trade.s for trade in outcome.trades] == ["TSLA.US"]
    assert outcome.failures[code].kind is FailureKind.BAD_RECORD
    assert words in outcome.failures[code].words and "no trade" in outcome.failures[code].words
    assert in_chinese(outcome.failures[code].words).startswith("不是成交：")


def test_oil_below_zero_is_no_trade_of_a_share() -> None:
    with pytest.raises(ValueError, match="only energy at common"):
        read_trade(record(s="USOIL", p="-37.63"), "stock")


@each("ahead", [-61, -60, 0, 60, 61])
def test_a_clock_that_is_off_is_told(ahead: int) -> None:
    """By more than a minute; without a date nothing is known."""
    response = Response(200, date="Thu, 19 Nov 2026 12:00:00 GMT")
    words = stockrt.clock_fault(response, datetime(2026, 11, 19, 12, tzinfo=UTC).timestamp() + ahead)
    assert bool(words) is (abs(ahead) > 60)
    assert not words or ("ahead of" in words) is (ahead > 0)
    assert stockrt.clock_fault(Response(200), 0) == stockrt.clock_fault(Response(200, date="soon"), 0) == ""


@each("number", ["305", "305.770", "1.10", "0.00000001", "1E-7"])
def test_a_json_number_is_taken_by_its_digits(number: str) -> None:
    """No binary fraction gets between."""
    body = json.dumps({"ret": 200, "data": [record(p="HERE")]}).replace('"HERE"', number)
    (trade,) = read_records(ASKED, verdict_on(body).records).trades
    assert trade.p == number


@each("td", [0, 1, 2])
def test_every_direction_is_taken(td: int) -> None:
    """None, buy, sell."""
    assert read_trade(record(td=td)).td == td


@each(
    ("t", "good"),
    [
        (EARLIEST_TRADE_MS, True),
        (EARLIEST_TRADE_MS - 1, False),
        (LATEST_TRADE_MS - 1, True),
        (LATEST_TRADE_MS, False),
    ],
)
def test_a_trade_time_is_of_this_century(t: int, good: bool) -> None:
    """Seconds or microseconds in place of milliseconds are told from it."""
    assert bool(outcome_of([record(t=t)]).trades) is good


@given(JSON)
def test_any_value_is_a_trade_or_a_value_error(value: object) -> None:
    """With a reason in one line."""
    try:
        trade = read_trade(value)
    except ValueError as error:
        assert str(error)
        assert str(error).isprintable()
    else:
        assert isinstance(trade, Trade)


@each("times", list(itertools.permutations([1786751999691, 1786751999692, 1786751999693])))
def test_of_several_records_of_a_code_the_newest_is_taken(times: Sequence[int]) -> None:
    """In whatever order they stand."""
    (trade,) = outcome_of([record(t=t) for t in times]).trades
    assert trade.t == 1786751999693


@pytest.mark.parametrize("order", [1, -1])
def test_a_good_record_of_a_code_makes_up_for_a_bad_one(order: int) -> None:
    """Before or after it."""
    outcome = outcome_of([record(), record(p=None)][::order])
    assert ([trade.s for trade in outcome.trades], outcome.failures) == (["AAPL.US"], {})


# ------------------------------------------------------------------------------------------------------
# Documents
# ------------------------------------------------------------------------------------------------------

DECIMALS = st.integers(-(10**9), 10**9).map(str) | st.builds("{}.{}".format, st.integers(0), st.integers(0))
TRADES = st.builds(
    Trade,
    s=st.text("ABZ09.&^=_-", min_size=1, max_size=12),
    t=st.integers(EARLIEST_TRADE_MS, LATEST_TRADE_MS - 1),
    p=DECIMALS,
    v=DECIMALS,
    vw=DECIMALS,
    td=st.integers(0, 2),
)
SIMILAR_TRADES = st.builds(
    Trade,
    s=st.sampled_from(["A", "A1", "A.US"]),
    t=st.integers(1786751999690, 1786751999692),
    p=st.sampled_from(["1", "1.0", "11", "-1"]),
    v=st.sampled_from(["1", "1.0", "11"]),
    vw=st.sampled_from(["1", "2"]),
    td=st.integers(0, 2),
)


@given(TRADES | SIMILAR_TRADES, TRADES | SIMILAR_TRADES)
def test_the_same_trade_is_the_same_id_and_another_trade_another(one: Trade, other: Trade) -> None:
    """Same is what has the same s, t, p, v, td."""
    same = one._replace(vw="") == other._replace(vw="")
    assert (identity(one) == identity(other)) is same
    assert identity(one) == identity(one._replace(vw="7"))


@each(
    "other",
    [
        Trade("B.US", 1786751999691, "1", "2", "2", 0),
        Trade("A.US", 1786751999692, "1", "2", "2", 0),
        Trade("A.US", 1786751999691, "9", "2", "2", 0),
        Trade("A.US", 1786751999691, "1", "9", "2", 0),
        Trade("A.US", 1786751999691, "1", "2", "2", 1),
        Trade("A.US", 1786751999691, "1.0", "2", "2", 0),
        Trade("A.US", 1786751999691, "12", "", "2", 0),
    ],
)
def test_every_part_of_the_identity_counts(other: Trade) -> None:
    """A trade that differs in one of them, as sent, is another document."""
    assert identity(Trade("A.US", 1786751999691, "1", "2", "2", 0)) != identity(other)


def test_the_identity_rule_is_the_written_one() -> None:
    """Another program and another machine must come to the same."""
    trade = Trade("AAPL.US", 1786751999691, "305.771", "1", "305.771", 0)
    assert identity(trade) == "AAPL.US|1786751999691|305.771|1|0"


def test_a_document_has_exactly_its_fields() -> None:
    """As the API sent them, in its types."""
    trade = Trade("AAPL.US", 1786751999691, "305.770", "1", "305.770", 0)
    document = to_document(trade, NOW)
    assert document == {
        "_id": "AAPL.US|1786751999691|305.770|1|0",
        "s": "AAPL.US",
        "t": 1786751999691,
        "p": "305.770",
        "v": "1",
        "vw": "305.770",
        "td": 0,
        "stock_code": "AAPL.US",
        "create_time": NOW,
    }
    types: dict[str, Any] = {name: type(value) for name, value in document.items()}
    assert types == dict.fromkeys(document, str) | {"t": int, "td": int, "create_time": datetime}


@each(
    ("code", "low", "high"),
    [
        ("USDCNY", 6, 8),
        ("EURUSD", 1, 1.4),
        ("USDJPY", 120, 180),
        ("XAUUSD", 2000, 6000),
        ("BTCUSDT", 3e4, 3e5),
        ("ETHBTC", 0.02, 0.06),
        ("AAPL.US", 150, 400),
        ("600519.SH", 1000, 2000),
        ("NEW.US", 0.9, 410),
    ],
)
def test_a_demo_price_is_one_that_its_instrument_could_have(code: str, low: float, high: float) -> None:
    found = [
        trade
        for minute in range(50)
        for outcome in stockrt.DemoApi(FakeClock(1_750_000_000 + minute * 60.0)).fetch(
            [stockrt.Batch("stock", code)], threading.Event()
        )
        if outcome is not None
        for trade in outcome.trades
    ]
    assert len(found) == 50
    assert all(low < float(trade.p) < high for trade in found)
    assert all(abs(float(trade.p) * float(trade.v) - float(trade.vw)) < 0.01 for trade in found)


def test_a_demo_document_says_so() -> None:
    """By one more field, and by nothing else."""
    trade = Trade("AAPL.US", 1786751999691, "305.770", "1", "305.770", 0)
    assert to_document(trade, NOW, demo=True) == to_document(trade, NOW) | {"demo": True}


@given(TRADES)
def test_reading_a_document_gives_its_trade_back(trade: Trade) -> None:
    """Nothing is lost on the way to the store."""
    document = to_document(trade, NOW)
    assert Trade(*(document[name] for name in Trade._fields)) == trade
    assert re.fullmatch(r"[^|]+\|\d+\|[^|]+\|[^|]+\|\d", document["_id"])


@given(st.from_regex(r"[0-9]{1,19}(\.[0-9]{0,18})?", fullmatch=True))
@example("9" * 17 + "." + "9" * 16)
def test_the_short_way_for_plain_decimals_takes_no_other(number: str) -> None:
    """A volume that is no text keeps a record from the short way."""
    record = {"s": "A.US", "t": 1786751999691, "p": number, "v": "1", "vw": "2.5", "td": 0}
    found: list[object] = []
    for volume in ("1", 1):
        try:
            found.append(read_trade(record | {"v": volume}))
        except ValueError as error:
            found.append(str(error))
    assert found[0] == found[1]


# ------------------------------------------------------------------------------------------------------
# Back-off and requests under way
# ------------------------------------------------------------------------------------------------------


@each("step", [0, 1, 2, 5, 20])
def test_every_delay_is_random_from_zero_to_its_ceiling(step: int) -> None:
    """The first one too, so that clients that failed together do not come back together."""
    ceiling = min(BACKOFF_CAP_S, BACKOFF_FIRST_S * 2**step)
    delays = [
        next(itertools.islice(backoff(BACKOFF_FIRST_S, BACKOFF_CAP_S, random.Random(seed)), step, None))
        for seed in range(300)
    ]
    assert 0 <= min(delays) < ceiling * 0.1
    assert ceiling * 0.9 < max(delays) <= ceiling
    assert sum(delays) / len(delays) == pytest.approx(ceiling / 2, rel=0.2)


@given(st.floats(0.01, 10), st.floats(10, 100), st.randoms(use_true_random=False))
def test_no_delay_is_above_the_cap(first: float, cap: float, rng: random.Random) -> None:
    """It goes on for ever."""
    assert all(0 <= delay <= cap for delay in itertools.islice(backoff(first, cap, rng), 100))


@each(
    ("latency", "rate", "expected"),
    [
        (0.0, 1, 1),
        (0.0, math.inf, 1),
        (0.0, 0, 1),
        (0.1, 1, 2),
        (1.0, 1, 3),
        (1.0, 10, 12),
        (0.2, 20, 6),
        (5.0, 20, MAX_IN_FLIGHT),
        (10.0, math.inf, MAX_IN_FLIGHT),
        (10.0, 0, 2),
    ],
)
def test_as_many_requests_are_under_way_as_latency_and_rate_make_useful(
    latency: float, rate: float, expected: int
) -> None:
    """No more than the rate feeds, and no more than hide the latency."""
    assert wanted_in_flight(latency, rate) == expected


@given(st.floats(0, 3600), st.floats(0, 10_000) | st.just(math.inf))
def test_there_is_always_one_request_and_never_a_crowd(latency: float, rate: float) -> None:
    """Within the limit; more latency never means fewer."""
    wanted = wanted_in_flight(latency, rate)
    assert 1 <= wanted <= MAX_IN_FLIGHT
    assert wanted <= wanted_in_flight(latency * 2, rate)
