"""The platform's protocol as pure code: what a text asks for, what keeps a connection alive, what is answered."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.cases import each
from kit.chinese import in_chinese
from kit.clock import FakeClock
from kit.daemons import number
from kit.platform_server import FAILURE_STATUSES, GARBAGE, NOT_JSON, wrapped

import stockrt
from stockrt import (
    Command,
    Event,
    Failure,
    FailureKind,
    PeerDead,
    Ping,
    PlatformProtocol,
    Receipt,
    Refused,
    Report,
    Send,
    Shutdown,
    UsageError,
)

WALL_S = 1_767_261_600.25
STAMP = datetime.fromtimestamp(WALL_S).isoformat()
META = {"execution_id": "e-1", "execution_time": "t", "workflow_id": "7", "workflow_name": "n"}
# The newer server's liveness clock.
SWEPT_AFTER_S = 120
WRAPPINGS = ("object", "string", "bare")
BAD = json.dumps(NOT_JSON, ensure_ascii=False)

any_text = st.text(st.one_of(st.characters(), st.sampled_from("\ud800\udfff\0\u2028")), max_size=20)
any_json = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), any_text, st.sampled_from(["execute", "ping"])
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.one_of(any_text, st.sampled_from(["type", "message", "meta", "args", "codes", "status"])),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=15,
)
finite_json = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), any_text),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(any_text, inner, max_size=4)),
    max_leaves=15,
)


def protocol(heartbeat_s: float = 10) -> PlatformProtocol:
    """A new connection at the time 0."""
    return PlatformProtocol(heartbeat_s, 0, FakeClock(WALL_S))


def receive(text: str) -> list[Event]:
    """What a text brings about on a new connection."""
    return protocol().receive(text, 1)


def execute(args: object = ..., **more: object) -> dict[str, Any]:
    """An execute object."""
    return {"type": "execute", "meta": META} | ({} if args is ... else {"args": args}) | more


def codes_of(args: object) -> list[object]:
    """The codes that an execute with these `args` asks for."""
    (event,) = receive(json.dumps({"message": execute(args)}))
    assert isinstance(event, Command), event
    return event.codes


def refusal_of(args: object) -> str:
    """Why an execute with these `args` is refused."""
    (event,) = receive(json.dumps({"message": execute(args)}))
    assert isinstance(event, Refused), event
    assert event.context["meta"] == META
    return event.reason


# ------------------------------------------------------------------------------------------------------
# What a text asks for
# ------------------------------------------------------------------------------------------------------


@each("wrap", WRAPPINGS)
def test_an_execute_is_understood_however_it_is_wrapped(wrap: str) -> None:
    (event,) = receive(wrapped(execute({"code_list": ["TSLA.US", "AAPL.US"]}), wrap))
    assert event == Command(
        "e-1", {"workflow_id": "7", "workflow_name": "n", "meta": META}, ["TSLA.US", "AAPL.US"]
    )


@each("wrap", WRAPPINGS)
def test_a_shutdown_is_confirmed_however_it_is_wrapped(wrap: str) -> None:
    confirm, shutdown = receive(wrapped({"type": "shutdown"}, wrap))
    assert isinstance(confirm, Send)
    assert json.loads(confirm.text) == {"status": "success", "message": "模块正在关闭"}
    assert shutdown == Shutdown()


@each("wrap", WRAPPINGS)
def test_a_ping_is_answered_however_it_is_wrapped(wrap: str) -> None:
    (pong,) = receive(wrapped({"type": "ping", "timestamp": "2026-01-01T10:00:00.000000"}, wrap))
    assert isinstance(pong, Send)
    assert json.loads(pong.text) == {"type": "pong", "timestamp": STAMP}


def test_a_pong_bears_the_local_time_without_a_zone() -> None:
    (pong,) = PlatformProtocol(10, 0).receive('{"type": "ping"}', 1)
    assert isinstance(pong, Send)
    stamp = datetime.fromisoformat(json.loads(pong.text)["timestamp"])
    assert stamp.tzinfo is None
    assert abs((datetime.now() - stamp).total_seconds()) < 60


@each("text", ["receive result", " receive result\n", '{"message": "receive result"}'])
def test_a_receipt_is_one_plain_or_wrapped(text: str) -> None:
    assert receive(text) == [Receipt()]


@each("text", [*GARBAGE, "heartbeat confirm", BAD, '{"status": "success"}', '"receive result"'])
def test_what_is_no_command_asks_for_nothing(text: str) -> None:
    assert receive(text) == []


@given(st.one_of(any_text, any_json.map(json.dumps), any_json.map(lambda v: json.dumps({"message": v}))))
def test_no_text_raises_and_only_an_execute_executes(text: str) -> None:
    for event in receive(text):
        if isinstance(event, Command | Refused):
            assert "execute" in text
            found = json.loads(text)
            while isinstance(inner := found.get("message"), str | dict) and "type" not in found:
                found = json.loads(inner) if isinstance(inner, str) else inner
            assert found["type"] == "execute"


@given(any_json, any_json, any_json, st.sampled_from(WRAPPINGS))
def test_no_execute_raises_and_each_is_taken_or_refused(meta: Any, args: Any, more: Any, wrap: str) -> None:
    (event,) = receive(wrapped({"type": "execute", "meta": meta, "args": args, "workflow_id": more}, wrap))
    assert isinstance(event, Command | Refused)
    assert json.dumps(event.context["meta"]) == json.dumps(meta)
    if isinstance(event, Command):
        assert event.codes or names_nothing(args)
    else:
        event.reason.encode()
        assert "\n" not in event.reason


# From one too many, over what only json.dumps cannot take, to what json.loads cannot.
TOO_MANY = [64, 300, 900, 1600, 12_000, 400_000]


@each("depth", TOO_MANY)
@each("shape", ["{}{}", '{{"a":{}1{}'], ids=["lists", "objects"])
@each("place", ["meta", "args", "workflow_name", "execution_id", "more"])
@each("wrap", WRAPPINGS)
def test_what_is_nested_too_deep_is_refused_by_name(depth: int, shape: str, place: str, wrap: str) -> None:
    opening, closing = ("[", "]") if shape == "{}{}" else ('{"a":', "}")
    deep = opening * depth + "1" + closing * depth
    fields = {"args": '{"codes": ["A.US"]}', "execution_id": '"e-2"'} | {place: deep}
    bare = '{"type": "execute", ' + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}"
    text = {"object": f'{{"message": {bare}}}', "string": json.dumps({"message": bare}), "bare": bare}[wrap]
    (event,) = receive(text)
    assert isinstance(event, Refused)
    assert event.reason == "JSON nested deeper than 64 levels; expected a flat list of codes"
    assert len(json.dumps(event.context)) < 100  # it is kept and sent
    if depth < 900 and place != "execution_id":
        assert event.context["execution_id"] == "e-2"  # who asked is told


def test_codes_in_a_text_that_are_nested_too_deep_are_refused_by_name() -> None:
    for depth in TOO_MANY:
        assert "deeper than 64" in refusal_of("[" * (depth + 1) + "]" * (depth + 1))


def test_of_a_meta_that_is_nested_too_deep_comes_back_what_is_flat() -> None:
    deep: object = 1
    for _ in range(80):
        deep = [deep]
    (event,) = receive(json.dumps(execute(["A.US"], meta=META | {"more": deep})))
    assert isinstance(event, Refused)
    assert event.context["meta"] == META
    assert event.context["workflow_name"] == META["workflow_name"]


def test_what_is_nested_as_deep_as_it_may_be_is_executed() -> None:
    deep: object = "A.US"
    for _ in range(61):  # in the meta of the message
        deep = [deep]
    (event,) = receive(json.dumps({"message": execute(["A.US"], meta={"more": deep})}))
    assert isinstance(event, Command)


@each("depth", TOO_MANY)
def test_nesting_without_end_is_no_command(depth: int) -> None:
    assert receive("[" * depth + "]" * depth) == []
    assert receive("[" * depth) == []


# ------------------------------------------------------------------------------------------------------
# Codes
# ------------------------------------------------------------------------------------------------------


@each("name", ["code_list", "stock_list", "codes"])
@each(
    ("value", "codes"),
    [
        (["TSLA.US", "AAPL.US"], ["TSLA.US", "AAPL.US"]),
        ("TSLA.US,AAPL.US", ["TSLA.US", "AAPL.US"]),
        (" TSLA.US ,\tAAPL.US,, ", ["TSLA.US", "AAPL.US"]),
        ("TSLA.US，AAPL.US、00700.HK；600519", ["TSLA.US", "AAPL.US", "00700.HK", "600519"]),
        (["TSLA.US,AAPL.US", " ", "", "00700.HK "], ["TSLA.US", "AAPL.US", "00700.HK"]),
        ([600519, "000001"], [600519, "000001"]),
        (600519, [600519]),
        ("TSLA.US", ["TSLA.US"]),
        (["AAPL.US", None, True, {}, ["X.US"], 1.5], ["AAPL.US", None, True, {}, ["X.US"], 1.5]),
    ],
)
def test_codes_are_read_from_every_name_and_shape(name: str, value: object, codes: list[object]) -> None:
    assert codes_of({name: value}) == codes


@each(
    ("args", "codes"),
    [
        (["TSLA.US"], ["TSLA.US"]),
        ("TSLA.US, AAPL.US", ["TSLA.US", "AAPL.US"]),
        ('{"code_list": ["TSLA.US"]}', ["TSLA.US"]),
        ('["TSLA.US"]', ["TSLA.US"]),
        (600519, [600519]),
        ({"code_list": None, "stock_list": "A.US"}, ["A.US"]),
        ({"code_list": [], "codes": ["A.US"]}, ["A.US"]),
        ({"code_list": "", "codes": ["A.US"]}, ["A.US"]),
        ({"code_list": ["A.US"], "codes": ["B.US"]}, ["A.US"]),
        ({"code_list": " , ", "codes": ["A.US"]}, ["A.US"]),
        ({"code_list": '["A.US", 600519]'}, ["A.US", "600519"]),
        ({"code_list": "['A.US', 'B.US']"}, ["A.US", "B.US"]),  # as Python prints one
        ({"code_list": ['["A.US"]', '"B.US"']}, ["A.US", "B.US"]),
        ({"code_list": "“A.US”，'B.US'"}, ["A.US", "B.US"]),
        ({"code_list": "【“A.US”、‘B.US’】"}, ["A.US", "B.US"]),  # [ of a Chinese keyboard
        ("（A.US，B.US）", ["A.US", "B.US"]),
        ({"code_list": "('A.US', 'B.US')"}, ["A.US", "B.US"]),
    ],
)
def test_args_in_other_shapes_are_read_too(args: object, codes: list[object]) -> None:
    assert codes_of(args) == codes


@each(
    ("args", "words"),
    [
        (True, "got true"),
        ({"code_list": True}, "got true"),
        ({"code_list": {"a": 1}}, 'got {"a": 1}'),
        ({"symbols": ["A.US"]}, "got symbols"),
        ({"symbols": ["A.US"], "every": None}, "got symbols, every"),
        ([], "code_list is empty"),
        ("[]", "code_list is empty"),
        ({"code_list": []}, "code_list is empty"),
        ({"code_list": [], "stock_list": None}, "code_list is empty"),
        ({"code_list": [" ", ""]}, "code_list is empty"),
        ({"code_list": "[]"}, "code_list is empty"),
        ({"code_list": "【】"}, "code_list is empty"),
        ({"code_list": "()"}, "code_list is empty"),
        ("{broken", "got {broken"),
    ],
)
def test_args_without_codes_are_refused_with_what_came_and_what_was_expected(
    args: object, words: str
) -> None:
    reason = refusal_of(args)
    assert words in reason
    assert "code_list" in reason


@each(
    "args",
    [
        None,
        {},
        "",
        "{}",
        {"code_list": None},
        {"code_list": ""},
        {"codes": " , "},
        {"code_list": None, "every": 5},
        {"symbols": ""},
    ],
)
def test_args_that_were_left_blank_name_no_codes(args: object) -> None:
    """It means the codes of COLLECT_CODES; an empty list does not."""
    assert codes_of(args) == []


def test_missing_args_name_no_codes() -> None:
    (event,) = receive(json.dumps({"message": {"type": "execute"}}))
    assert isinstance(event, Command)
    assert event.codes == []


def names_nothing(args: Any) -> bool:
    """Whether nothing in `args` could be meant to be a code, nor to be a list of them."""
    if isinstance(args, str) and args.strip()[:1] in ("{", "["):
        args = json.loads(args)
    if not isinstance(args, dict):
        is_list = isinstance(args, str) and set(args) & set(stockrt.BRACKETS)
        return args is None or (isinstance(args, str) and not (stockrt.split_codes(args) or is_list))
    named = [args[name] for name in ("code_list", "stock_list", "codes") if name in args]
    return all(names_nothing(value) for value in named or args.values() if not isinstance(value, dict))


def test_a_hundred_thousand_codes_are_taken_and_one_more_is_not() -> None:
    codes = [f"{n:06d}" for n in range(100_000)]
    assert codes_of({"code_list": codes}) == codes
    assert codes_of({"code_list": ",".join(codes)}) == codes
    assert "100001 codes" in refusal_of({"code_list": [*codes, "A.US"]})
    assert "100001 codes" in refusal_of({"code_list": ",".join([*codes, "A.US"])})


def test_a_hundred_thousand_codes_of_the_greatest_length_fit_into_a_frame() -> None:
    codes = ["9" * stockrt.MAX_CODE_LENGTH] * stockrt.MAX_CODES_PER_COMMAND
    assert len(wrapped(execute({"code_list": codes}), "string")) < stockrt.MAX_FRAME_BYTES


@given(any_json)
def test_read_args_returns_codes_or_says_why_not(args: Any) -> None:
    try:
        assert stockrt.read_args(args) or names_nothing(args)
    except UsageError as error:
        assert "expected" in str(error)


# ------------------------------------------------------------------------------------------------------
# Meta
# ------------------------------------------------------------------------------------------------------


@each(
    ("more", "execution_id"),
    [
        ({}, "e-1"),
        ({"meta": {}}, ""),
        ({"meta": None}, ""),
        ({"meta": "e-9"}, ""),
        ({"meta": ["e-9"]}, ""),
        ({"meta": {}, "execution_id": "top"}, "top"),
        ({"meta": {"execution_id": "in"}, "execution_id": "top"}, "in"),
        ({"meta": {"execution_id": 12345678901234567890}}, "12345678901234567890"),
        ({"meta": {"execution_id": None}}, ""),
        ({"meta": {"execution_id": ["x"]}}, ""),
    ],
)
def test_the_execution_id_is_found(more: dict[str, object], execution_id: str) -> None:
    event = stockrt.read_execute(execute("A.US", **more))
    assert isinstance(event, Command)
    assert event.execution_id == execution_id


def test_the_answer_repeats_what_is_there_and_invents_nothing() -> None:
    event = stockrt.read_execute({"type": "execute", "args": "A.US"})
    assert event.context == {"workflow_id": None, "workflow_name": None}
    top = stockrt.read_execute(
        {"type": "execute", "args": "A.US", "workflow_id": 5, "workflow_name": "w", "execution_id": "x"}
    )
    assert top.context == {"workflow_id": 5, "workflow_name": "w", "execution_id": "x"}


@pytest.mark.parametrize("good", [True, False])
@given(meta=finite_json)
def test_meta_goes_back_word_for_word(good: bool, meta: Any) -> None:
    (event,) = receive(json.dumps({"message": {"type": "execute", "meta": meta, "args": "A.US"}}))
    assert isinstance(event, Command)
    kept = json.loads(json.dumps(event.context))  # as the journal keeps it
    text = stockrt.make_result(kept, "m", "words", {"total": 1}, good)
    assert text.isascii()
    assert json.dumps(json.loads(text)["meta"]) == json.dumps(meta)


def test_odd_meta_goes_back_word_for_word() -> None:
    deep, big = "[" * 60 + "]" * 60, "9" * 400
    meta = f'{{"execution_id": "x", "half": "\\ud800", "big": {big}, "deep": {deep}}}'
    (event,) = receive(f'{{"message": {{"type": "execute", "meta": {meta}, "args": "A.US"}}}}')
    assert isinstance(event, Command)
    assert meta in stockrt.make_result(event.context, "m", "words", {}, good=True)


# ------------------------------------------------------------------------------------------------------
# Keeping alive
# ------------------------------------------------------------------------------------------------------


class Line:
    """A connection on a clock of its own, with a server that answers at once."""

    def __init__(
        self,
        heartbeat_s: float,
        answer: Callable[[str], str] = lambda text: "",
        *,
        pongs: bool = True,
        ping_every: float = float("inf"),
    ) -> None:
        self.protocol = protocol(heartbeat_s)
        self.now = 0.0
        self.texts: list[tuple[float, str]] = []
        self.pings: list[float] = []
        self.dead: float | None = None
        self._answer = answer
        self._pongs = pongs
        self._ping_every = ping_every
        self._next_ping = ping_every

    def live(self, seconds: float) -> None:
        """Let so much time go by, or less if the peer is given up."""
        end = self.now + seconds
        while self.dead is None:
            self.now = min(self.protocol.next_tick(), self._next_ping)
            if self.now > end:
                self.now = end
                return
            if self.now == self._next_ping:
                self._next_ping += self._ping_every
                self._do(self.protocol.receive('{"type": "ping"}', self.now))
            self._do(self.protocol.tick(self.now))
            assert self.dead is not None or self.protocol.next_tick() > self.now, "it would spin"

    def _do(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, PeerDead):
                self.dead = self.now
            elif isinstance(event, Ping):
                self.pings.append(self.now)
                if self._pongs:
                    self.protocol.heard(self.now)
            else:
                assert isinstance(event, Send)
                self.texts.append((self.now, event.text))
                self.protocol.sent_text(self.now)
                if reply := self._answer(event.text):
                    self._do(self.protocol.receive(reply, self.now))

    def heartbeats(self) -> list[float]:
        """When the text `heartbeat` was sent."""
        return [at for at, text in self.texts if text == "heartbeat"]

    def longest_silence(self) -> float:
        """The longest time without a text frame sent."""
        times = [0.0, *(at for at, _ in self.texts), self.now]
        return max(later - earlier for earlier, later in itertools.pairwise(times))


def confirms(text: str) -> str:
    """The older server."""
    return "heartbeat confirm" if text == "heartbeat" else ""


def complains(text: str) -> str:
    """The newer server."""
    return BAD if text == "heartbeat" else ""


def test_a_heartbeat_goes_on_where_it_is_confirmed() -> None:
    line = Line(10, confirms)
    line.live(3600)
    assert line.heartbeats() == [10.0 * n for n in range(1, 361)]


@pytest.mark.parametrize("answer", [complains, lambda text: ""])
def test_a_heartbeat_is_tried_once_where_it_is_not_confirmed(answer: Callable[[str], str]) -> None:
    line = Line(10, answer)
    line.live(3600)
    assert line.heartbeats() == [10]


def test_a_server_that_pings_by_itself_is_not_asked_for_more() -> None:
    line = Line(10, complains, ping_every=5)
    line.live(3600)
    assert line.heartbeats() == []


def test_each_connection_is_asked_anew() -> None:
    for _ in range(2):
        line = Line(10, complains)
        line.live(60)
        assert line.heartbeats() == [10]


@each("heartbeat_s", [1, 10, 44, 45, 46, 60, 100, 3600])
@each("answer", [confirms, complains, lambda text: ""])
@each("ping_every", [float("inf"), 30, 119])
def test_a_text_goes_out_in_time_for_the_newer_servers_clock(
    heartbeat_s: float, answer: Callable[[str], str], ping_every: float
) -> None:
    line = Line(heartbeat_s, answer, ping_every=ping_every)
    line.live(number(4, 4, quick=2) * 3600)
    assert line.dead is None
    assert line.longest_silence() < SWEPT_AFTER_S / 2
    assert all(json.loads(text)["type"] == "pong" for _, text in line.texts if text != "heartbeat")


@each("heartbeat_s", [1, 10, 3600])
def test_a_websocket_ping_goes_out_at_every_interval(heartbeat_s: float) -> None:
    line = Line(heartbeat_s)
    line.live(100 * heartbeat_s)
    assert line.pings == [heartbeat_s * n for n in range(1, 101)]


@each("heartbeat_s", [1, 10, 3600])
def test_a_peer_silent_for_two_intervals_is_dead(heartbeat_s: float) -> None:
    line = Line(heartbeat_s, pongs=False)
    line.live(100 * heartbeat_s)
    assert line.dead == 2 * heartbeat_s


@pytest.mark.parametrize("sign", ["text", "frame"])
def test_any_frame_is_a_sign_of_life(sign: str) -> None:
    line = Line(10, pongs=False)
    for at in (15.0, 30.0, 45.0):
        line.live(at - line.now)
        if sign == "text":
            assert line.protocol.receive("anything", at) == []
        else:
            line.protocol.heard(at)
    line.live(100)
    assert line.dead == 65


def test_a_connection_is_useful_once_a_frame_has_come() -> None:
    line = Line(10, pongs=False)
    line.live(19)
    assert not line.protocol.useful
    line.protocol.heard(19)
    assert line.protocol.useful


@given(
    st.sampled_from([1.0, 10.0, 60.0, 3600.0]),
    st.lists(
        st.tuples(
            st.floats(0, 100),
            st.sampled_from(["", "heartbeat confirm", BAD, '{"type": "ping"}', "receive result", "noise"]),
        ),
        max_size=20,
    ),
)
def test_after_a_tick_there_is_nothing_to_do_at_once(
    heartbeat_s: float, story: list[tuple[float, str]]
) -> None:
    tested, now = protocol(heartbeat_s), 0.0
    for wait, text in story:
        now += wait
        events = tested.receive(text, now) if text else []
        events += tested.tick(now)
        if any(isinstance(event, PeerDead) for event in events):
            return
        if any(isinstance(event, Send) for event in events):
            tested.sent_text(now)
        assert tested.next_tick() > now


# ------------------------------------------------------------------------------------------------------
# Results
# ------------------------------------------------------------------------------------------------------

CONTEXT = {"workflow_id": "7", "workflow_name": "n", "meta": META}


def settings(**more: str) -> stockrt.Settings:
    """Settings of a module with one key, which is a secret."""
    environ = {"INFOWAY_API_KEY": "hunter22", "MODULE_NAME": "模块", "MESSAGE_LANG": "en"} | more
    return stockrt.load_settings(environ, None, (), is_root=False).settings


def result_of(report: Report, language: str = "en") -> dict[str, Any]:
    """The result of a run, as the platform reads it."""
    made = stockrt.report_result(CONTEXT, report, settings(MESSAGE_LANG=language))
    answer: dict[str, Any] = json.loads(made.text)
    return answer


def test_trades_that_wait_are_a_failure_with_their_count_and_reason() -> None:
    since = "MongoDB unreachable since 10:04"
    all_kept = result_of(Report(total=12, queued=12, queued_because=since))
    assert (
        all_kept["message"]
        == all_kept["error"]
        == "12 trades kept on this machine, MongoDB unreachable since 10:04"
    )
    assert all_kept["status"] == all_kept["result"]["status"] == "failure"
    assert all_kept["result"]["kept_count"] == 12 and all_kept["result"]["failed_stocks"] == []
    some = result_of(
        Report(
            total=4,
            stored=2,
            queued=1,
            queued_because=since,
            failures={"X": Failure(FailureKind.INVALID_CODE, "no exchange given")},
        )
    )
    assert some["status"] == "failure"
    assert some["message"] == (
        "1 of 4 codes failed: X (no exchange given); 1 trade kept on this machine, MongoDB unreachable since 10:04; "
        "2 of 4 codes stored"
    )
    assert some["result"]["status_detail"] == "failure"


def test_a_success_holds_what_both_generations_read() -> None:
    assert result_of(Report(total=3, stored=2, duplicates=1, took_s=1.2344)) == {
        "type": "result",
        "status": "success",
        "meta": META,
        "workflow_id": "7",
        "workflow_name": "n",
        "module_name": "模块",
        "message": "3 of 3 codes stored",
        "result": {
            "status": "success",
            "status_detail": "success",
            "total": 3,
            "success_count": 3,
            "duplicate_count": 1,
            "kept_count": 0,
            "failed_count": 0,
            "failed_stocks": [],
            "failures": {},
            "read_as": {},
            "stale_count": 0,
            "took_ms": 1234,
        },
    }


def test_a_result_says_what_a_number_was_read_as_that_does_not_tell() -> None:
    answer = result_of(Report(total=1, stored=1, read_as={"000905": "000905.SH"}))
    assert answer["message"] == "1 of 1 codes stored; read as: 000905 -> 000905.SH"
    assert answer["result"]["read_as"] == {"000905": "000905.SH"}


def test_a_result_says_how_many_trades_are_old() -> None:
    answer = result_of(Report(total=50, stored=50, stale=12, stale_since=1_786_752_000_000))
    since = datetime.fromtimestamp(1_786_752_000, UTC).astimezone().isoformat(" ", "seconds")
    words = f"12 of 50 codes: no trade since {since}, though the market was open"
    assert answer["message"] == f"50 of 50 codes stored; {words}"
    assert answer["result"]["stale_count"] == 12


def test_a_partial_success_names_what_failed() -> None:
    answer = result_of(
        Report(
            total=3,
            stored=1,
            duplicates=1,
            failures={"XXXX.US": Failure(FailureKind.UNKNOWN_CODE, "unknown to the API")},
        )
    )
    assert (answer["status"], "error" in answer) == ("success", False)
    assert answer["message"] == "1 of 3 codes failed: XXXX.US (unknown to the API); 2 of 3 codes stored"
    assert answer["result"]["status_detail"] == "partial"
    result = answer["result"]
    assert (result["status"], result["total"], result["success_count"]) == ("success", 3, 2)
    assert (result["failed_count"], result["failed_stocks"]) == (1, ["XXXX.US"])
    assert result["failures"] == {"XXXX.US": "unknown to the API"}


@each(
    "report",
    [
        Report(total=2, failures=dict.fromkeys(("A.US", "B.US"), Failure(FailureKind.API, "HTTP 500"))),
        Report(
            total=2,
            stored=1,
            failures={"B.US": Failure(FailureKind.STORE, "not stored")},
            store_error="MongoDB is away",
        ),
        Report(total=0),
    ],
)
def test_nothing_stored_or_a_broken_store_is_a_failure_that_is_mailed(report: Report) -> None:
    answer = result_of(report)
    assert answer["status"] in FAILURE_STATUSES
    assert answer["result"]["status"] == answer["status"] == "failure"
    assert answer["error"] == answer["message"]
    assert answer["result"]["success_count"] == report.stored
    assert (
        report.store_error or "".join(why for _, why in [*report.failures.values()][:1]) or "0 of 0"
    ) in answer["error"]


def test_known_trades_alone_are_a_success() -> None:
    answer = result_of(Report(total=2, duplicates=2))
    assert (answer["status"], answer["result"]["success_count"]) == ("success", 2)
    assert answer["result"]["duplicate_count"] == 2


def test_at_most_a_hundred_failures_are_explained_and_all_are_named() -> None:
    failures = {f"X{n}.US": Failure(FailureKind.API, f"reason {n}") for n in range(150)}
    answer = result_of(Report(total=151, stored=1, failures=failures))
    result = answer["result"]
    assert result["failures"] == {f"X{n}.US": f"reason {n}" for n in range(100)}
    assert (result["failed_stocks"], result["failed_count"]) == (list(failures), 150)
    assert len(answer["message"]) < 500


def test_no_secret_is_in_a_result() -> None:
    report = Report(
        total=1,
        failures={"A.US": Failure(FailureKind.KEY, "key hunter22 refused")},
        store_error="user:hunter22@host",
    )
    for answer in stockrt.report_result(CONTEXT, report, settings()):
        assert "hunter22" not in answer
        assert "***" in answer


def test_a_command_that_was_not_executed_is_answered_with_the_same_fields() -> None:
    answer = json.loads(stockrt.empty_result(CONTEXT, "why", settings()).text)
    assert (answer["status"], answer["error"], answer["message"]) == ("failure", "why", "why")
    assert answer["meta"] == META
    assert answer["result"].keys() == result_of(Report())["result"].keys()


# ------------------------------------------------------------------------------------------------------
# In the platform's language
# ------------------------------------------------------------------------------------------------------


NESTED = json.loads("[" * 100 + "]" * 100)
SHORT = stockrt.phrase("tools.no_memory")


def test_a_result_is_chinese_unless_another_language_is_set() -> None:
    environ = {"STATE_DIRECTORY": "/nowhere"}
    default = stockrt.load_settings(environ, None, (), is_root=False).settings
    answer = json.loads(stockrt.report_result(CONTEXT, Report(total=2, stored=2), default).text)
    assert answer["message"] == "2 个代码中 2 个已入库"


def test_message_error_and_failures_of_a_result_are_chinese_and_nothing_else_changes() -> None:
    failures = {f"X{n}.US": Failure(FailureKind.API, SHORT) for n in range(5)}
    report = Report(total=9, stored=2, duplicates=1, queued=1, queued_because=SHORT,
                    failures=failures, read_as={"600519": "600519.SH"}, stale=2, stale_since=1_800_000_000_000,
                    close_error=SHORT)  # fmt: skip
    english, chinese = result_of(report), result_of(report, "zh")
    short = stockrt.in_language(SHORT, "zh")
    since = stockrt.local_times("2027-01-15T08:00:00Z")
    assert chinese["message"] == (
        f"9 个代码中 5 个失败：X0.US、X1.US、X2.US、X3.US、X4.US（{short}）；"
        f"收盘价未保存：{short}；1 笔成交暂存于本机，{short}"
        f"；9 个代码中 3 个已入库；实际查询：600519 -> 600519.SH"
        f"；9 个代码中有 2 个自 {since} 起没有新成交，期间市场曾开市"
    )
    assert chinese["error"] == chinese["message"]
    assert chinese["result"]["failures"] == dict.fromkeys(failures, short)
    for answer in (english, chinese):
        del answer["message"], answer["error"], answer["result"]["failures"]
    assert english == chinese


def test_codes_that_failed_for_one_reason_are_named_with_it_once() -> None:
    def message(total: int, **reasons: str) -> tuple[str, str]:
        failures = {code: Failure(FailureKind.API, why) for code, why in reasons.items()}
        report = Report(total=total, failures=failures, stored=total - len(failures))
        return result_of(report)["message"], result_of(report, "zh")["message"]

    assert message(3, A="gone", B="gone", C="gone") == (
        "all 3 codes failed (A, B, C): gone",
        "3 个代码全部失败（A、B、C）：gone",
    )
    assert message(4, A="gone", B="late", C="gone") == (
        "3 of 4 codes failed: A, C (gone), B (late); 1 of 4 codes stored",
        "4 个代码中 3 个失败：A、C（gone）、B（late）；4 个代码中 1 个已入库",
    )
    assert message(1, A="gone")[0] == "1 of 1 codes failed: A (gone)"
    many = {f"X{number}": "gone" for number in range(9)} | {f"Y{number}": f"{number}" for number in range(4)}
    assert message(20, **many)[0] == (
        "13 of 20 codes failed: X0, X1, X2, X3, X4 … (gone), Y0 (0), Y1 (1) and 2 more; 7 of 20 codes stored"
    )


@each(
    "args",
    [[], {"codez": "A"}, "{", ["A.US"] * (stockrt.MAX_CODES_PER_COMMAND + 1), NESTED],
    ids=["empty", "misspelled", "cut off", "too many", "nested"],
)
def test_why_a_command_is_refused_can_be_read_in_chinese(args: object) -> None:
    reason = refusal_of(args)
    told = in_chinese(reason)
    answer = json.loads(stockrt.empty_result(CONTEXT, reason, settings(MESSAGE_LANG="zh")).text)
    assert answer["message"] == answer["error"] == told


def test_what_a_result_says_is_kept_in_all_languages() -> None:
    """Whatever the platform's is: with the failures, the times as programs read them, without secrets."""
    failures = {"X.US": Failure(FailureKind.KEY, stockrt.phrase("tools.see", words="hunter22", cause="A"))}
    report = Report(total=2, stored=1, failures=failures)
    for language in stockrt.LANGUAGES:
        said = stockrt.unpacked(
            json.loads(stockrt.report_result(CONTEXT, report, settings(MESSAGE_LANG=language)).said)
        )
        assert stockrt.in_language(said["message"], "en") == (
            "1 of 2 codes failed: X.US (***; see A); 1 of 2 codes stored"
        )
        assert stockrt.in_language(said["message"], "zh") == (
            "2 个代码中 1 个失败：X.US（***；请检查 A）；2 个代码中 1 个已入库"
        )
        assert stockrt.in_language(said["failures"]["X.US"], "zh") == "***；请检查 A"


@each("password", ["1234", "kind", "text", "message", "true", "protocol"])
def test_what_a_result_says_is_kept_whatever_the_password_is(password: str) -> None:
    """It is masked in the values alone: JSON has numbers and words that a password may be, too."""
    made = settings(MESSAGE_LANG="zh", MONGODB_HOST=f"mongodb://user:{password}@127.0.0.1/")
    why = stockrt.phrase("tools.see", words=f"no {password}", cause=stockrt.phrase("tools.stopped"))
    report = Report(total=12345, stored=1, failures={"X.US": Failure(FailureKind.KEY, why)})
    said = stockrt.unpacked(json.loads(stockrt.report_result(CONTEXT, report, made).said))
    assert stockrt.in_language(said["failures"]["X.US"], "en") == "no ***; see stopped"
    assert stockrt.in_language(said["message"], "en").startswith(
        "1 of 12345 codes failed: X.US (no ***; see stopped)"
    )
