"""Room Stream: limits, the spreading of codes, the table of errors, the protocol, the connection."""

from __future__ import annotations

import json
import logging
import random
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.cases import each
from kit.chinese import in_chinese
from kit.daemons import PATIENCE
from kit.infoway_server import PLANS as PLANS_THERE
from kit.raw_websocket import RawWebSocket
from kit.stream_server import ERRORS, SUBSCRIBE_FAIL, Vendor
from kit.websocket_wire import CLOSE, PING, TEXT, frame_bytes

import stockrt
from stockrt import (
    PLANS,
    STREAM_ERRORS,
    STREAM_LIMITS,
    Allotment,
    CodesRefused,
    DialError,
    PackageInfo,
    Plan,
    Pushes,
    Said,
    SendText,
    Silent,
    StreamAction,
    StreamConnection,
    StreamEnd,
    StreamEvent,
    StreamLimits,
    StreamProtocol,
    Subscribed,
    allot,
    refused_dial,
    stream_error,
    stream_limits,
)

# Wednesday 2026-08-12, 15:00 UTC: New York is open, Hong Kong is not.
OPEN_MS = 1_786_546_800_000
LATEST_MS = OPEN_MS + 4 * 86_400_000
US = [f"A{number}.US" for number in range(1_000)]

# Sessions of 2026-08, word by word: who sent what, in order; (trace of ours, what came).
STOCK_SESSION = [
    "You have permission to subscribe to all market data",
    '{"code":200,"msg":"ws connect success"}',
    '{"code":10001,"trace":"336b52a51cfd4fe5ad4f6c7733d77beb","msg":"ok"}',
]
STOCK_TRACE = "336b52a51cfd4fe5ad4f6c7733d77beb"
MALFORMED_SESSION = [
    '{"code":200,"msg":"ws connect success"}',
    '{"traceId":"408e395555214a2e91b596e351b83c97","code":507,"msg":"Param lost：data"}',
    '{"traceId":"5bd586b3b6884212ba76d78d5fb7ebf2","code":506,"msg":"Param error：The code is out of range"}',
]


class Talk:
    """A protocol with its clock, and the frames that it has sent."""

    def __init__(self, product: str = "stock", codes: Iterable[str] = (), wall_ms: int = OPEN_MS) -> None:
        self.now = 1_000.0
        self.begun_ms = wall_ms - 1_000_000
        self.protocol = StreamProtocol(product, self.now, random.Random(7))
        self.sent: list[tuple[float, dict[str, object]]] = []
        self.events: list[StreamEvent] = []
        self.heard = 0
        self.protocol.want(codes)
        self.tick()

    @property
    def wall_ms(self) -> int:
        """The time of the wall, which goes as the other does."""
        return self.begun_ms + int(self.now * 1000)

    def tick(self) -> list[StreamEvent]:
        """Do what is due."""
        events = self.protocol.tick(self.now, self.wall_ms)
        for event in events:
            if isinstance(event, SendText):
                self.sent.append((self.now, json.loads(event.text)))
        told: list[StreamEvent] = [event for event in events if not isinstance(event, SendText)]
        self.events += told
        return told

    def go_on(self, seconds: float, hear: bool = True) -> list[StreamEvent]:
        """Let time pass, ticking when it is wanted; each frame is acked at once if that is said."""
        end = self.now + seconds
        told: list[StreamEvent] = self.ack_all() if hear else []
        for _ in range(10_000):
            at = self.protocol.next_tick()
            if at > end or any(isinstance(event, StreamEnd) for event in told):
                break
            self.now = max(self.now, at)
            told += self.tick()
            if hear:
                told += self.ack_all()
        else:
            raise AssertionError("it wants to be ticked without end")
        self.now = end
        return told

    def ack(self, frame: dict[str, object]) -> list[StreamEvent]:
        """Hear the ack of a frame."""
        kinds = {10000: 10001, 11000: 11010}
        kind = kinds.get(int(str(frame["code"])))
        return (
            self.hear(json.dumps({"code": kind, "trace": frame["trace"], "msg": "ok"})).events if kind else []
        )

    def ack_all(self) -> list[StreamEvent]:
        """Hear the acks of all that was sent since the last time."""
        new, self.heard = self.sent[self.heard :], len(self.sent)
        return [event for _, frame in new for event in self.ack(frame)]

    def hear(self, *texts: str) -> Pushes:
        """Take in what came."""
        pushes = self.protocol.receive(texts, self.now, LATEST_MS)
        self.events += pushes.events
        return pushes

    def frames(self, kind: int = 10000) -> list[list[str]]:
        """The codes of each frame of a kind that was sent."""
        return [codes_of(frame) for _, frame in self.sent if frame["code"] == kind]

    def last(self) -> dict[str, object]:
        """The frame that was sent last."""
        return self.sent[-1][1]


def subscribed(protocol: StreamProtocol) -> int:
    """Return how many codes are subscribed now."""
    return sum(standing is stockrt._Standing.ON for standing in protocol._standing.values())


def codes_of(frame: dict[str, object]) -> list[str]:
    """The codes of a frame."""
    data = frame["data"]
    assert isinstance(data, dict)
    return str(data["codes"]).split(",")


def push(code: str = "A0.US", **changes: object) -> str:
    """A push of the documented form."""
    record = {"s": code, "t": OPEN_MS, "p": "305.770", "v": "12", "vw": "3669.24", "td": 1} | changes
    return json.dumps({"code": 10002, "data": record}, separators=(",", ":"))


def error(code: int, trace: object = None, msg: str = "no") -> str:
    """An error as it comes as JSON."""
    return json.dumps({"code": code, "msg": msg} | ({} if trace is None else {"traceId": trace}))


# ------------------------------------------------------------------------------------------------------
# Limits
# ------------------------------------------------------------------------------------------------------


@each(
    ("info", "plan", "limits"),
    [
        (stockrt.NO_PACKAGE, stockrt.PLAN_TO_ASK, (1, 10, 10)),
        (stockrt.NO_PACKAGE, PLANS["basic"], (1, 200, 200)),
        (stockrt.NO_PACKAGE, Plan("高级", 10, 600), (2, 600, 800)),
        (stockrt.NO_PACKAGE, Plan("Professional", 20, 1200), (9, 600, 5000)),
        (stockrt.NO_PACKAGE, Plan("Custom", 12, 700), (2, 600, 800)),
        (stockrt.NO_PACKAGE, Plan("0.5", 0.5, 30), (1, 10, 10)),
        (stockrt.NO_PACKAGE, Plan("0", 0, 0), (9, 600, 5000)),
        (PackageInfo("Premium", 10, 0.0, 3, 700, 900), Plan("Premium", 10, 600), (3, 700, 900)),
        (PackageInfo("Premium", 10, 0.0, None, 700, None), Plan("Premium", 10, 600), (2, 700, 800)),
        (PackageInfo("Rest", 10, 0.0, 0, 0, 0), Plan("Rest", 10, 600), (0, 0, 0)),
    ],
)
def test_a_key_has_the_limits_that_were_told_else_those_of_its_plan(
    info: PackageInfo, plan: Plan, limits: tuple[int, int, int]
) -> None:
    assert stream_limits(info, plan)[:3] == limits


@each(
    ("told", "read"),
    [
        ({"maxWsConNum": 2, "maxNum": 600, "allWsNum": 800}, (2, 600, 800)),
        ({"maxWsConNum": "2", "maxNum": None, "allWsNum": -1}, (2, None, None)),
        ({"maxWsConNum": 0, "maxNum": 1.5, "allWsNum": True}, (0, None, None)),
        ({}, (None, None, None)),
    ],
)
def test_what_the_api_says_of_a_key_is_read_as_far_as_it_is_a_count(
    told: dict[str, object], read: tuple[int | None, ...]
) -> None:
    found = stockrt.read_package({"ret": 200, "data": {"packageName": "x", "apiNumPerSec": 1} | told})
    assert found is not None and found[3:] == read


def test_codes_are_spread_over_as_few_connections_as_will_do() -> None:
    codes = {"stock": US[:700], "crypto": ["BTCUSDT"], "common": ["USDCNY"]}
    found, rest = allot(codes, {"k": STREAM_LIMITS["pro"]})
    assert [(one.product, len(one.codes)) for one in found] == [
        ("stock", 600),
        ("stock", 100),
        ("crypto", 1),
        ("common", 1),
    ]
    assert rest == {}


def test_what_a_plan_does_not_allow_is_the_rest() -> None:
    codes = {"stock": US[:700], "crypto": ["BTCUSDT"]}
    found, rest = allot(codes, {"k": STREAM_LIMITS["premium"]})
    assert [(one.product, len(one.codes)) for one in found] == [("stock", 600), ("stock", 100)]
    assert rest == {"crypto": ["BTCUSDT"]}
    found, rest = allot({"stock": US[:15]}, {"k": STREAM_LIMITS["free"]})
    assert found == [Allotment("k", "stock", tuple(US[:10]))] and rest == {"stock": US[10:15]}
    assert allot(codes, {}) == ([], codes)
    assert allot(codes, {"k": StreamLimits(0, 600, 800)}) == ([], codes)


def test_a_key_that_is_refused_for_a_product_serves_the_others() -> None:
    keys = {
        "a": STREAM_LIMITS["pro"]._replace(not_for=frozenset({"stock"})),
        "b": STREAM_LIMITS["free"],
    }
    found, rest = allot({"stock": US[:12], "crypto": ["BTCUSDT"]}, keys)
    assert {(one.key, one.product, len(one.codes)) for one in found} == {
        ("b", "stock", 10),
        ("a", "crypto", 1),
    }
    assert rest == {"stock": US[10:12]}


def test_codes_stay_on_their_connection_where_others_come_and_go() -> None:
    keys = {"k": STREAM_LIMITS["pro"]}
    before, _ = allot({"stock": US[:700], "crypto": ["BTCUSDT"]}, keys)
    found, rest = allot({"stock": ["NEW.US", *US[1:700]]}, keys, before)
    assert [one.codes for one in found] == [(*US[1:600], "NEW.US"), tuple(US[600:700])]
    assert rest == {}


def test_all_is_spread_anew_where_more_find_room_then() -> None:
    keys = {"k": STREAM_LIMITS["premium"]}
    before = [Allotment("k", "stock", tuple(US[:5])), Allotment("k", "stock", tuple(US[5:10]))]
    found, rest = allot({"stock": US[:10], "crypto": ["BTCUSDT"]}, keys, before)
    assert [one.codes for one in found] == [tuple(US[:10]), ("BTCUSDT",)] and rest == {}


LIMITS = st.builds(StreamLimits, st.integers(0, 4), st.integers(0, 30), st.integers(0, 60))
SOME = st.dictionaries(st.sampled_from(["stock", "crypto", "japan"]), st.integers(0, 70))


@given(SOME, SOME, st.dictionaries(st.sampled_from(["a", "b", "c"]), LIMITS))
def test_no_limit_is_ever_passed_and_no_code_lost(
    first: dict[str, int], then: dict[str, int], keys: dict[str, StreamLimits]
) -> None:
    before: list[Allotment] = []
    for counts in (first, then):
        codes = {
            product: [f"{product}{number}" for number in range(count)] for product, count in counts.items()
        }
        found, rest = allot(codes, keys, before)
        assert (found, rest) == allot(codes, keys, before)
        spread = [(one.product, code) for one in found for code in one.codes]
        left = [(product, code) for product, some in rest.items() for code in some]
        assert sorted(spread + left) == sorted((p, code) for p, some in codes.items() for code in some)
        for key, limits in keys.items():
            mine = [len(one.codes) for one in found if one.key == key]
            assert len(mine) <= limits.connections and sum(mine) <= limits.in_all
            assert all(0 < size <= limits.per_connection for size in mine)
            free = len(mine) < limits.connections and sum(mine) < limits.in_all and limits.per_connection
            assert not (left and free)
        before = found


# ------------------------------------------------------------------------------------------------------
# The table of errors
# ------------------------------------------------------------------------------------------------------

NEVER, OUT = StreamAction.NEVER, StreamAction.KEY_OUT
WAIT, DIAL = StreamAction.WAIT, StreamAction.DIAL_AGAIN
ENDS = {
    501: WAIT,
    508: OUT,
    509: OUT,
    510: OUT,
    511: OUT,
    512: WAIT,
    513: DIAL,
    517: OUT,
    518: OUT,
    519: NEVER,
    401: NEVER,
    403: WAIT,
    429: WAIT,
}
FORMS = ["{}", "Subscribe fail: {}", "Subscribe fail:{}", " {} "]


def test_each_code_has_one_row_and_each_row_a_test() -> None:
    codes = [row.code for row in STREAM_ERRORS]
    assert len(codes) == len(set(codes))
    assert set(codes) == {*ENDS, 505, 506, 507, 516, 520, 521}
    settings = {setting.name for setting in stockrt.SETTINGS}
    assert all(row.means and row.setting in settings for row in STREAM_ERRORS)


@each("form", FORMS)
@each("code", ENDS)
def test_an_error_that_ends_the_connection_says_what_follows(code: int, form: str) -> None:
    talk = Talk(codes=US[:3])
    (end,) = talk.hear(form.format(error(code, talk.last()["trace"], "These words"))).events
    assert isinstance(end, StreamEnd)
    assert end.action is ENDS[code]
    assert f"{code}: These words" in end.words and "; see " in end.words
    low, high = {512: (120, 180), 403: (120, 180), 429: (120, 180), 501: (60, 90)}.get(code, (0, 0))
    assert low <= end.wait_s <= high


def test_waits_are_jittered() -> None:
    waits = set()
    for seed in range(20):
        protocol = StreamProtocol("stock", 0.0, random.Random(seed))
        (end,) = protocol.receive([error(512)], 0.0, LATEST_MS).events
        assert isinstance(end, StreamEnd)
        waits.add(end.wait_s)
    assert len(waits) == 20 and max(waits) - min(waits) > 20


@each(("code", "words"), ERRORS.items())
@each("form", ["{}", SUBSCRIBE_FAIL + "{}"])
def test_an_error_in_words_alone_is_the_one_with_the_number(code: int, words: str, form: str) -> None:
    words = words.format(per_connection=10, connections=1, in_all=10)
    found = stream_error(None, form.format(words))
    wanted = stream_error(code, "")
    assert found.action is wanted.action
    assert stream_error(None, f"Subscribe fail {code}") is wanted


@each("form", ["json", "prefix", "prose"])
def test_too_many_codes_on_a_connection_are_left_out_and_named(form: str) -> None:
    talk = Talk(codes=US[:150])
    first, second = (frame for _, frame in talk.sent)
    talk.ack(first)
    said = error(505, second["trace"], "Products quantity exceeds the limit：100")
    texts = {
        "json": said,
        "prefix": f"Subscribe fail: {said}",
        "prose": "Subscribe fail: Products quantity exceeds",
    }
    (refused,) = talk.hear(texts[form]).events
    assert isinstance(refused, CodesRefused)
    assert refused.codes == tuple(US[100:150]) and "INFOWAY_PLAN" in refused.words
    assert subscribed(talk.protocol) == 100
    assert not [one for one in talk.go_on(600) if not isinstance(one, Silent | Subscribed)]
    assert not {*US[100:150]} & {code for codes in talk.frames()[2:] for code in codes}


def test_a_refused_code_is_asked_for_again_when_it_was_dropped_and_is_wanted_anew() -> None:
    talk = Talk(codes=US[:2])
    talk.hear(error(505, talk.last()["trace"]))
    talk.protocol.want(US[:3])
    talk.tick()
    assert talk.frames() == [US[:2], [US[2]]]
    talk.protocol.want(US[1:3])
    talk.tick()
    talk.protocol.want(US[:3])
    talk.tick()
    assert talk.frames()[2:] == [[US[0]]]


def test_too_many_codes_in_all_may_be_the_old_connections_and_are_asked_for_again() -> None:
    talk = Talk(codes=US[:5])
    times = []
    for _ in range(3):
        times.append(talk.sent[-1][0])
        assert talk.hear(error(516, talk.last()["trace"])).events == []
        sent = len(talk.frames())
        while len(talk.frames()) == sent:
            talk.go_on(1, hear=False)
    assert all(later - earlier >= 60 for earlier, later in pairwise(times))
    (refused,) = talk.hear(error(516, talk.last()["trace"])).events
    assert isinstance(refused, CodesRefused) and refused.codes == tuple(US[:5])


@each("code", [506, 507, 520, 521])
def test_the_wrong_codes_of_a_frame_are_found_and_the_others_kept(code: int) -> None:
    wrong = {US[17], US[64]}
    talk = Talk(codes=US[:100])
    at = 0
    told: list[StreamEvent] = []
    for _ in range(200):
        if at == len(talk.sent):
            if subscribed(talk.protocol) == 98:
                break
            talk.go_on(1, hear=False)
            continue
        frame = talk.sent[at][1]
        at += 1
        if frame["code"] == 10000:
            bad = wrong & {*codes_of(frame)}
            told += talk.hear(error(code, frame["trace"])).events if bad else talk.ack(frame)
        talk.tick()
    refused = {code for one in told if isinstance(one, CodesRefused) for code in one.codes}
    assert refused == wrong
    assert subscribed(talk.protocol) == 98


def test_an_unknown_error_is_asked_again_and_in_the_end_names_its_codes() -> None:
    talk = Talk(codes=US[:2])
    for _ in range(3):
        assert talk.hear(error(577, talk.last()["trace"], "Whatever")).events == []
        told = talk.go_on(8.1, hear=False)
    assert told == [CodesRefused(tuple(US[:2]), "the stream says 577: Whatever")]
    assert len(talk.frames()) == 3


def test_an_error_about_nothing_is_said_and_an_answered_frames_is_no_later_ones() -> None:
    talk = Talk(codes=US[:2])
    first = talk.last()
    talk.ack(first)
    assert [type(one) for one in talk.hear(error(505)).events] == [Said]
    talk.protocol.want(US[:3])
    talk.tick()
    assert [type(one) for one in talk.hear(error(505, first["trace"])).events] == [Said]
    assert [type(one) for one in talk.hear(error(505, "a trace of the server's own")).events] == [
        CodesRefused
    ]


@each(
    ("status", "body", "action"),
    [
        (401, b'{"code":401,"message":"Token invalid"}', NEVER),
        (401, b"Unauthorized", NEVER),
        (401, b"", NEVER),
        (401, b"<html>please log in</html>", WAIT),
        (403, b"", WAIT),
        (429, b"", WAIT),
        (429, b"<html>", WAIT),
        (500, b"", DIAL),
        (404, b'{"detail":"Not Found"}', DIAL),
        (0, b"", DIAL),
    ],
)
def test_a_refused_handshake_says_what_follows(status: int, body: bytes, action: StreamAction) -> None:
    end = refused_dial(
        DialError(f"the handshake was refused with HTTP {status}", status, body), random.Random(1)
    )
    assert end.action is action and "; see INFOWAY_" in end.words
    assert (120 <= end.wait_s <= 180) is (action is WAIT)
    assert ("Token invalid" in end.words) is (b"Token" in body)


@each("row", STREAM_ERRORS, ids=lambda row: str(row.code))
def test_each_error_has_its_meaning_in_chinese(row: stockrt.StreamError) -> None:
    talk = Talk(codes=US[:1])
    frame = error(row.code, talk.last()["trace"], "These words")
    told = talk.hear(frame).events
    while not told:  # asked for again before it is given up
        told = [one for one in talk.go_on(61, hear=False) if not isinstance(one, Silent)]
        told = told or talk.hear(error(row.code, talk.last()["trace"], "These words")).events
    (one,) = told
    assert isinstance(one, StreamEnd | CodesRefused)
    words = in_chinese(one.words, "These words")
    assert words.startswith(f"推送流返回 {row.code}：These words：") and f"；请检查 {row.setting}" in words


def test_what_a_gateway_says_to_the_handshake_is_foreign_and_the_rest_chinese() -> None:
    dialled = DialError(stockrt.phrase("tools.stopped"), 401, b'{"message":"Log in first"}')
    words = in_chinese(refused_dial(dialled, random.Random(1)).words, "Log in first")
    assert (
        words
        == "已停止：Log in first，不像 API 的应答，像是来自途中的网关或登录页；请检查 INFOWAY_STREAM_URL"
    )


# ------------------------------------------------------------------------------------------------------
# The protocol
# ------------------------------------------------------------------------------------------------------


def test_the_session_of_a_closed_market_is_understood_as_what_it_is() -> None:
    talk = Talk(codes=["AAPL.US", "TSLA.US"])
    ours = str(talk.last()["trace"])
    assert len(ours) == len(STOCK_TRACE)
    pushes = talk.hear(*(text.replace(STOCK_TRACE, ours) for text in STOCK_SESSION))
    assert pushes == Pushes([], [Subscribed(("AAPL.US", "TSLA.US"))])
    assert subscribed(talk.protocol) == 2


def test_the_session_of_malformed_frames_is_understood_as_what_it_is() -> None:
    """Nothing that this program asks for is that wrong: what it says is for the log."""
    talk = Talk("crypto", ["BTCUSDT"])
    talk.ack_all()
    pushes = talk.hear(*MALFORMED_SESSION)
    assert pushes.dropped == 0 and not pushes.trades
    assert [type(one) for one in pushes.events] == [Said, Said]
    assert "507: Param lost：data" in str(pushes.events[0])
    assert "506: Param error：The code is out of range" in str(pushes.events[1])


def test_a_push_is_a_trade_whose_document_is_right() -> None:
    talk = Talk(codes=["AAPL.US"])
    pushes = talk.hear(push("AAPL.US", t=1786751999691, p="305.771", v="1", vw="305.771", td=0))
    assert pushes.dropped == 0
    (trade,) = pushes.trades
    assert trade == stockrt.Trade("AAPL.US", 1786751999691, "305.771", "1", "305.771", 0)
    document = stockrt.to_document(trade, stockrt.utc_now())
    assert document["s"] == document["stock_code"] == "AAPL.US"
    assert (document["t"], document["p"], document["v"], document["vw"]) == (
        1786751999691,
        "305.771",
        "1",
        "305.771",
    )


def test_pushes_keep_their_order_and_their_digits() -> None:
    talk = Talk(codes=US[:3])
    texts = [push(US[i % 3], t=OPEN_MS + i, p=f"{i + 1}.310", v=i) for i in range(300)]
    pushes = talk.hear(*texts)
    assert [(one.t, one.p, one.v) for one in pushes.trades] == [
        (OPEN_MS + i, f"{i + 1}.310", str(i)) for i in range(300)
    ]
    raw = push(p="P").replace('"P"', "1.10")  # a number of JSON's keeps its digits, too
    assert talk.hear(raw).trades[0].p == "1.10"


def test_lower_case_is_what_was_asked_for() -> None:
    talk = Talk(codes=["AAPL.US"])
    assert [one.s for one in talk.hear(push("aapl.us"), push("AAPL.US")).trades] == ["AAPL.US", "AAPL.US"]


NO_PUSHES = [
    push("TSLA.US"),
    push(p="0"),
    push(p="-1"),
    push(p=None),
    push(v="-1"),
    push(t="1786546800000"),
    push(t=LATEST_MS + 1),
    push(t=1.5),
    push(td=True),
    push(s=None),
    push(s=["A0.US"]),
    '{"code":10002}',
    '{"code":10002,"data":null}',
    '{"code":10002,"data":[]}',
    '{"code":10005,"data":{}}',
    push()[:-1],
    push() + "}",
    "[" * 100_000,
    '{"code":' + "9" * 5_000 + "}",
    "[1]",
    "{",
]


@each("number", range(len(NO_PUSHES)))
def test_what_is_no_push_of_what_was_asked_for_is_dropped_and_counted(number: int) -> None:
    talk = Talk(codes=["A0.US"])
    talk.ack_all()
    pushes = talk.hear(push(), NO_PUSHES[number], push())
    assert len(pushes.trades) == 2
    if pushes.events:  # a number that is no kind of frame is an error's
        assert [type(one) for one in pushes.events] == [Said]
    else:
        assert pushes.dropped == 1 and pushes.why


@given(st.lists(st.one_of(st.text(), st.sampled_from(NO_PUSHES), st.just(push())), max_size=12))
def test_nothing_that_comes_breaks_it_or_harms_a_push(texts: list[str]) -> None:
    talk = Talk(codes=["A0.US"])
    pushes = talk.hear(*texts)
    assert len(pushes.trades) == texts.count(push())
    talk.tick()


def test_white_space_around_a_push_is_none_of_it() -> None:
    talk = Talk(codes=["A0.US"])
    pushes = talk.hear(f" {push()}\n")
    assert (len(pushes.trades), pushes.dropped) == (1, 0)


def test_codes_are_asked_for_by_the_hundred() -> None:
    talk = Talk(codes=US[:250])
    assert [len(codes) for codes in talk.frames()] == [100, 100, 50]
    assert [code for codes in talk.frames() for code in codes] == US[:250]
    assert len({str(frame["trace"]) for _, frame in talk.sent}) == 3
    for _, frame in reversed(talk.sent):  # acks come in any order, one by one
        assert talk.ack(frame) == [Subscribed(tuple(codes_of(frame)))]
    assert subscribed(talk.protocol) == 250


def test_what_is_wanted_no_more_makes_room_before_others_are_asked_for() -> None:
    talk = Talk(codes=US[:3])
    talk.ack_all()
    talk.protocol.want([US[2], US[3]])
    talk.tick()
    assert talk.frames(11000) == [US[:2]]
    assert talk.frames() == [US[:3]]
    assert talk.hear(push(US[0])).dropped == 1
    talk.ack(talk.last())
    talk.tick()
    assert talk.frames()[1:] == [[US[3]]]
    assert talk.ack(talk.last()) == [Subscribed((US[3],))]
    assert subscribed(talk.protocol) == 2


def test_a_code_that_is_wanted_again_at_once_ends_subscribed() -> None:
    talk = Talk(codes=US[:2])
    talk.protocol.want([US[1]])  # before its ack
    talk.tick()
    talk.go_on(2)
    talk.protocol.want(US[:2])
    talk.go_on(2)
    talk.ack_all()
    talk.go_on(2)
    assert subscribed(talk.protocol) == 2
    assert talk.frames()[-1] == [US[0]]


def test_a_frame_without_its_ack_is_asked_again_after_eight_seconds() -> None:
    talk = Talk(codes=US[:2])
    assert talk.go_on(7.9, hear=False) == [] and len(talk.frames()) == 1
    assert talk.go_on(0.2, hear=False) == [] and talk.frames() == [US[:2]] * 2
    first = talk.sent[0][1]
    assert talk.ack(first) == [Subscribed(tuple(US[:2]))]  # of the first try, late
    assert talk.ack(talk.last()) == []
    assert talk.go_on(20, hear=False) == []


def test_a_stream_that_acks_nothing_is_dialled_again() -> None:
    talk = Talk(codes=US[:2])
    (end,) = talk.go_on(24.5, hear=False)
    assert isinstance(end, StreamEnd) and end.action is DIAL and "no ack within 24 s" in end.words
    assert len(talk.frames()) == 3


def test_a_heartbeat_goes_out_every_thirty_seconds() -> None:
    talk = Talk("stock", [])
    talk.go_on(301)
    times = [at - 1_000 for at, frame in talk.sent if frame["code"] == 10010]
    assert times == [30.0 * number for number in range(1, 11)]


CHANGES = st.lists(
    st.tuples(
        st.integers(0, 900), st.integers(0, 120), st.floats(0, 40), st.sampled_from(["ack", "lose", "refuse"])
    ),
    max_size=25,
)


@given(CHANGES)
def test_no_minute_has_more_than_sixty_frames(changes: list[tuple[int, int, float, str]]) -> None:
    talk = Talk(codes=US[:600])
    for first, count, seconds, way in changes:
        talk.protocol.want(US[first : first + count])
        before = len(talk.sent)
        told = talk.go_on(seconds, hear=way == "ack")
        if any(isinstance(one, StreamEnd) for one in told):
            break
        if way == "refuse":
            for _, frame in talk.sent[before:]:
                talk.hear(error(520, frame["trace"]))
    else:
        talk.go_on(120)
    times = [at for at, _ in talk.sent]
    for at in times:
        assert sum(at <= other < at + 60 for other in times) <= 50


def test_a_connection_that_is_opened_again_counts_in_the_same_minute() -> None:
    window = stockrt.SlidingWindow(stockrt.ASKS_PER_MINUTE, 60.0)
    sent = 0
    for number in range(20):
        protocol = StreamProtocol("stock", float(number), random.Random(1), window)
        protocol.want(US[:600])
        sent += len(protocol.tick(float(number), OPEN_MS))
    assert sent == stockrt.ASKS_PER_MINUTE
    assert protocol.next_tick() == 19 + stockrt.HEARTBEAT_S
    assert len(protocol.tick(59.0, OPEN_MS)) == 1  # a heartbeat
    assert protocol.tick(61.5, OPEN_MS)


# ------------------------------------------------------------------------------------------------------
# Silence
# ------------------------------------------------------------------------------------------------------


def test_a_market_that_is_open_and_silent_is_subscribed_anew_after_ninety_seconds() -> None:
    talk = Talk(codes=US[:150])
    talk.go_on(89)
    assert len(talk.frames()) == 2
    talk.hear(push())
    talk.go_on(89)
    assert len(talk.frames()) == 2
    told = talk.go_on(2)
    assert isinstance(told[0], Silent) and told[0].codes == tuple(US[:150]) and 90 <= told[0].seconds < 92
    assert talk.frames()[2:] == [US[:100], US[100:150]]
    assert subscribed(talk.protocol) == 150
    talk.hear(push())
    talk.go_on(91)
    assert len(talk.frames()) == 6


def test_a_holiday_is_asked_about_more_and_more_seldom() -> None:
    talk = Talk(codes=US[:5])
    talk.go_on(5 * 3600)
    times = [at for at, frame in talk.sent if frame["code"] == 10000]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert gaps[0] < 91 and all(later >= min(1_440, 1.9 * earlier) for earlier, later in pairwise(gaps[:6]))
    assert max(gaps) < 1_500


@each(
    ("product", "code", "hour", "anew"),
    [
        ("stock", "00700.HK", 15, False),  # 23:00 in Hong Kong
        ("stock", "AAPL.US", 15, True),
        ("crypto", "BTCUSDT", 3, True),
        ("common", "US500", 15, False),  # whose session nobody knows
        ("common", "USDCNY", 15, True),
        ("japan", "7203.JP", 2, True),
        ("japan", "7203.JP", 8, False),
    ],
)
def test_a_market_that_is_closed_may_be_silent(product: str, code: str, hour: int, anew: bool) -> None:
    talk = Talk(product, [code], OPEN_MS + (hour - 15) * 3_600_000)
    talk.go_on(200)
    assert (len(talk.frames()) > 1) is anew


def test_a_market_that_opens_has_ninety_seconds_from_then_on() -> None:
    """13:30 UTC is when New York opens in August."""
    talk = Talk(codes=US[:5], wall_ms=OPEN_MS - 2 * 3_600_000)
    talk.go_on(7_300)
    times = [talk.begun_ms + at * 1000 - OPEN_MS for at, frame in talk.sent if frame["code"] == 10000]
    assert times[0] == -2 * 3_600_000
    assert -1_800_000 * 3 + 90_000 <= times[1] <= -1_800_000 * 3 + 200_000


# ------------------------------------------------------------------------------------------------------
# The connection
# ------------------------------------------------------------------------------------------------------

KEY = "a-key-of/the stream&more"


@pytest.fixture
def server() -> Iterator[RawWebSocket]:
    """A server that sends what a test says."""
    with RawWebSocket() as made:
        yield made


@pytest.fixture
def vendor() -> Iterator[Vendor]:
    """The API's stream, silent until it is told to trade."""
    with Vendor(plans={KEY: PLANS_THERE["pro"]}) as made:
        yield made


def collect(connection: StreamConnection, enough: int = 0) -> Pushes:
    """Read until so many trades are there, or an end."""
    got = Pushes([], [])
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        one = connection.read(deadline)
        got = Pushes(
            got.trades + one.trades, got.events + one.events, got.dropped + one.dropped, got.why or one.why
        )
        over = any(isinstance(event, StreamEnd) for event in got.events)
        if over or (enough and len(got.trades) >= enough):
            return got
    raise AssertionError(f"nothing more came after {len(got.trades)} trades, {got.events}")


def until_subscribed(connection: StreamConnection, count: int) -> None:
    """Read until so many codes are subscribed."""
    deadline = time.monotonic() + PATIENCE
    while subscribed(connection._protocol) != count:
        assert time.monotonic() < deadline
        events = connection.read(deadline).events
        assert not [event for event in events if isinstance(event, StreamEnd | CodesRefused)]


def asked(server: RawWebSocket) -> dict[str, object]:
    """The next text that a client sent."""
    while True:
        opcode, data = server.next_frame()
        if opcode == TEXT:
            return dict(json.loads(data))


def text(words: str) -> bytes:
    """A text frame."""
    return frame_bytes(TEXT, words.encode())


def test_trades_come_through_and_codes_change_at_once(vendor: Vendor) -> None:
    connection = StreamConnection(vendor.stream.url, "stock", KEY)
    connection.want(US[:250])
    assert connection.open() is None
    until_subscribed(connection, 250)
    vendor.stream.trade(*US[:250])
    got = collect(connection, 250)
    assert [one.s for one in got.trades] == US[:250] and got.dropped == 0
    # another thread changes the codes while this one waits
    threading.Timer(0.05, connection.want, (US[200:300],)).start()
    until_subscribed(connection, 100)
    assert vendor.stream.subscribed == {*US[200:300]}
    connection.close()
    assert vendor.stream.violations == []


def test_codes_that_another_thread_wants_are_asked_for_before_anything_else_is_due(
    server: RawWebSocket,
) -> None:
    connection = StreamConnection(server.url, "stock", KEY)
    assert connection.open() is None
    threading.Timer(0.05, connection.want, (US[:1],)).start()
    reading = threading.Thread(target=connection.read, args=(time.monotonic() + PATIENCE,))
    reading.start()
    assert asked(server)["code"] == 10000  # and no heartbeat before it
    connection.wake()
    reading.join(PATIENCE)
    connection.close()


def test_dialling_again_and_again_makes_no_more_frames_a_minute(server: RawWebSocket) -> None:
    connection = StreamConnection(server.url, "stock", KEY)
    connection.want(US[:600])
    for _ in range(9):  # times six frames
        assert connection.open() is None
        connection.read(time.monotonic())
        connection.close()
    sent, ends = 0, 0
    while ends < 9:
        opcode, _ = server.next_frame()
        sent += opcode == TEXT
        ends += opcode == -1
    assert sent == stockrt.ASKS_PER_MINUTE


def test_a_thread_that_waits_is_woken(server: RawWebSocket) -> None:
    connection = StreamConnection(server.url, "stock", KEY)
    assert connection.open() is None
    connection.wake()  # before anybody waits
    assert connection.read(time.monotonic() + PATIENCE) == Pushes([], [])
    threading.Timer(0.05, connection.wake).start()
    began = time.monotonic()
    assert connection.read(began + PATIENCE) == Pushes([], [])
    assert time.monotonic() < began + PATIENCE
    connection.close()
    connection.wake()
    connection.want(US[:1])


def test_what_came_before_the_end_comes_with_it(server: RawWebSocket) -> None:
    connection = StreamConnection(server.url, "stock", KEY)
    connection.want(US[:1])
    assert connection.open() is None
    collecting = threading.Thread(target=lambda: got.append(collect(connection)))
    got: list[Pushes] = []
    server.send(text(push()) * 3 + frame_bytes(CLOSE, (1011).to_bytes(2, "big")))
    collecting.start()
    collecting.join(PATIENCE)
    (pushes,) = got
    assert len(pushes.trades) == 3
    end = pushes.events[-1]
    assert (
        isinstance(end, StreamEnd) and end.action is DIAL and "closed by the server (code 1011)" in end.words
    )
    connection.close()
    assert connection.open() is None  # again, with what is wanted
    assert subscribed(connection._protocol) == 0
    connection.read(time.monotonic())
    assert codes_of(asked(server)) == US[:1]
    connection.close()


def test_an_error_before_a_cut_says_why(server: RawWebSocket) -> None:
    connection = StreamConnection(server.url, "stock", KEY)
    connection.want(US[:1])
    assert connection.open() is None
    server.send(text("Subscribe fail: " + error(511, msg="The apikey has been banned")))
    server.hang_up()
    (end,) = collect(connection).events
    assert isinstance(end, StreamEnd) and end.action is OUT
    connection.close()


def test_a_close_that_asks_for_patience_is_given_some(server: RawWebSocket) -> None:
    connection = StreamConnection(server.url, "crypto", KEY)
    assert connection.open() is None
    server.send(
        frame_bytes(CLOSE, (1008).to_bytes(2, "big") + b"The number of connections exceeds the limit")
    )
    (end,) = collect(connection).events
    assert isinstance(end, StreamEnd) and end.action is WAIT and 120 <= end.wait_s <= 180
    connection.close()


def test_a_close_that_says_why_is_an_error_too(server: RawWebSocket) -> None:
    connection = StreamConnection(server.url, "stock", KEY)
    assert connection.open() is None
    server.send(frame_bytes(CLOSE, (1008).to_bytes(2, "big") + b"508 The apikey has expired"))
    (end,) = collect(connection).events
    assert isinstance(end, StreamEnd) and end.action is OUT and "INFOWAY_API_KEY" in end.words
    connection.close()


def test_an_ack_and_a_push_may_be_cut_anywhere(server: RawWebSocket) -> None:
    connection = StreamConnection(server.url, "stock", KEY)
    connection.want(US[:1])
    assert connection.open() is None
    connection.read(time.monotonic())
    ack = {"code": 10001, "trace": asked(server)["trace"], "msg": "ok"}
    wire = frame_bytes(PING, b"") + text(json.dumps(ack)) + text(push())
    sender = threading.Thread(target=lambda: server.send(*[wire[i : i + 1] for i in range(len(wire))]))
    sender.start()
    got = collect(connection, 1)
    sender.join(PATIENCE)
    assert got == Pushes(got.trades, [Subscribed((US[0],))]) and subscribed(connection._protocol) == 1
    connection.close()


@pytest.mark.parametrize(("status", "action"), [(401, NEVER), (429, WAIT), (500, DIAL)])
def test_a_handshake_that_is_refused_never_shows_the_key(
    server: RawWebSocket,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    action: StreamAction,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(stockrt.HIDDEN, "secrets", (KEY,))
    echo = json.dumps({"code": status, "message": f"{KEY} is bad"})
    server.refusal = f"HTTP/1.1 {status} No\r\nContent-Length: {len(echo)}\r\n\r\n{echo}".encode()
    connection = StreamConnection(server.url, "crypto", KEY)
    end = connection.open()
    assert end is not None and end.action is action
    assert "business=crypto&apikey=a-key-of%2Fthe+stream%26more HTTP/1.1" in server.heads[0]
    for form in stockrt.forms_of((KEY,)):
        assert form not in caplog.text + end.words
    connection.close()


def test_who_is_away_is_dialled_again() -> None:
    with RawWebSocket() as server:
        url = server.url
    end = StreamConnection(url, "stock", KEY).open()
    assert end is not None and end.action is DIAL
    assert "connection refused" in end.words and "INFOWAY_STREAM_URL" in end.words


def test_the_system_gives_a_dead_peer_up(server: RawWebSocket) -> None:
    """What is sent to a cable that was pulled is never refused: the time for it is the connection's own."""
    link = stockrt.WebSocket(server.url, max_bytes=stockrt.MAX_STREAM_BYTES)
    link.give_up_after(stockrt.UNCONFIRMED_S)
    with socket.socket(fileno=link.fileno()) as sock:
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000
        sock.detach()
    link.close()


def test_a_burst_is_handed_on_in_portions(server: RawWebSocket) -> None:
    connection = StreamConnection(server.url, "stock", KEY)
    connection.want(US[:1])
    assert connection.open() is None
    sender = threading.Thread(target=lambda: server.send(*[text(push()) * 1_000] * 30))
    sender.start()
    sizes: list[int] = []
    while sum(sizes) < 30_000:
        sizes.append(len(connection.read(time.monotonic() + PATIENCE).trades))
    sender.join(PATIENCE)
    assert sum(sizes) == 30_000 and max(sizes) <= stockrt.MOST_AT_ONCE + stockrt.FRAMES_AT_ONCE
    connection.close()
