"""The plan of a key: asked of the API once a day, kept, kept to, and said where it ends."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from kit.cases import each
from kit.chinese import in_chinese
from kit.clock import FakeClock
from kit.infoway_server import EVERY_REFUSAL, PLANS, Answer, InfowayServer
from kit.infoway_server import Plan as PlanThere
from kit.ledger import NoLedger
from kit.trades import settings_of

import stockrt
from stockrt import (
    PLAN_TO_ASK,
    InfowayApi,
    KeyPlans,
    KeyPool,
    LocalFile,
    LocalLedger,
    PackageInfo,
    Plan,
    open_store_file,
    read_package,
)

KEY, OTHER = "first-key-of-two-keys", "other-key-of-two-keys"
DAY_S = 86_400


class Instance:
    """One process: its file, pool, client and plans."""

    def __init__(
        self, file: LocalFile, server: InfowayServer, clock: FakeClock, *keys: tuple[str, Plan]
    ) -> None:
        self.pool = KeyPool(keys or [(KEY, PLAN_TO_ASK)], LocalLedger(file), clock)
        self.api = InfowayApi(server.url, self.pool)
        self.plans = KeyPlans(file, self.api, clock)
        self.stop = threading.Event()

    def limits(self) -> list[tuple[float, int, int]]:
        """Return the limits of the keys."""
        return [(key.plan.per_second, key.plan.per_minute, key.plan.per_day) for key in self.pool.keys]

    def ask(self) -> list[tuple[float, int, int]]:
        """Ask what is due, and return the limits after it."""
        self.plans.ask(self.stop)
        return self.limits()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[LocalFile]:
    with open_store_file(tmp_path) as opened:
        yield opened


def info_of(**data: object) -> PackageInfo | None:
    return read_package({"ret": 200, "data": {"packageName": "x", "apiNumPerSec": 1, "expireTime": 0} | data})


@each(
    ("name", "rate", "limits"),
    [
        ("Free", 1, (1, 60, 86_400)),
        ("免费", 1, (1, 60, 86_400)),
        ("Basic", 2, (2, 120, 172_800)),
        ("Premium", 10, (10, 600, 864_000)),
        ("ADVANCED", 10, (10, 600, 864_000)),
        ("高级", 10, (10, 600, 864_000)),
        ("专业", 20, (20, 1_200, 1_728_000)),
        ("Premium", 5, (5, 600, 864_000)),  # the rate told counts, the list has the rest
        ("Sonderplan", 5, (5, 300, 432_000)),
        ("Custom", 0.5, (0.5, 30, 43_200)),
    ],
)
def test_limits_follow_from_rate_and_name(name: str, rate: float, limits: tuple[float, int, int]) -> None:
    info = info_of(packageName=name, apiNumPerSec=rate)
    assert info is not None
    plan = info.plan()
    assert (plan.name, (plan.per_second, plan.per_minute, plan.per_day)) == (name, limits)


@each(
    ("told", "ends"),
    [
        (1_800_000_000, 1_800_000_000),
        (1_800_000_000_000, 1_800_000_000),
        (1_800_000_000_500, 1_800_000_000.5),
        (4_102_444_800, 4_102_444_800),
        (4_102_444_800_000, 4_102_444_800),
        *((odd, 0.0) for odd in (0, None, "soon", True, -1, 10**12 * 9, 10**11, 10**400, float("nan"))),
    ],
)
def test_an_end_is_told_in_seconds_or_milliseconds(told: object, ends: float) -> None:
    info = info_of(expireTime=told)
    assert info is not None and info.ends == ends
    assert isinstance(info.end_words(1_790_000_000), str)


@each("rate", [None, 0, -1, "10", True, 0.001, 10**9, float("nan"), float("inf")])
def test_what_names_no_rate_is_no_plan(rate: object) -> None:
    assert info_of(apiNumPerSec=rate) is None
    assert read_package({"ret": 500, "data": {"apiNumPerSec": 1}}) is None
    assert read_package({"ret": 200, "data": [1]}) is None


def test_a_key_is_asked_about_once_a_day(file: LocalFile) -> None:
    """By all processes of this machine; what was asked meanwhile counts in the new windows too."""
    clock = FakeClock()
    with InfowayServer(plans={KEY: PLANS["premium"]}) as server:
        first, second = Instance(file, server, clock), Instance(file, server, clock)
        assert first.limits() == [(1, 60, 86_400)]
        assert first.ask() == first.ask() == second.ask() == [(10, 600, 864_000)]
        assert [request.resource for request in server.requests] == ["package/info"]
        assert (first.pool.ledger.used_today(first.pool.keys[0].digest, clock.wall()) or 0) >= 1
        taken = sum(isinstance(first.pool.try_acquire("stock"), stockrt.ApiKey) for _ in range(20))
        assert taken == 9
        clock.advance(DAY_S)
        assert first.ask() == second.ask() == first.ask() == [(10, 600, 864_000)]
        assert server.request_count == 2
        third = Instance(file, server, clock)
        assert third.limits() == [(10, 600, 864_000)]  # before it asks anything
        assert third.plans.of(third.pool.keys[0])[3:] == (2, 600, 800)  # of the stream
        server.plans[KEY] = PLANS["basic"]
        clock.advance(DAY_S)
        assert Instance(file, server, clock).ask() == [(2, 120, 172_800)]


def test_a_key_in_doubt_is_trusted_again_when_its_plan_is_told(file: LocalFile) -> None:
    """So that the next doubt begins with the shortest rest."""
    clock = FakeClock()
    with InfowayServer(plans={KEY: PLANS["premium"]}) as server:
        one = Instance(file, server, clock)
        (key,) = one.pool.keys
        one.pool.doubt(key, "a gateway says no")
        clock.advance(stockrt.DOUBT_FIRST_S + 1)
        assert isinstance(one.api.package(key, one.stop), PackageInfo)
        assert key.doubt_s == 0


def test_a_plan_that_is_set_is_not_asked_for(file: LocalFile) -> None:
    with InfowayServer(plans={KEY: PLANS["premium"], OTHER: PLANS["pro"]}) as server:
        free = stockrt.PLANS["free"]
        instance = Instance(file, server, FakeClock(), (KEY, free), (OTHER, PLAN_TO_ASK))
        assert instance.ask() == [(1, 60, 86_400), (20, 1_200, 1_728_000)]
        assert [request.key for request in server.requests] == [OTHER]


@pytest.mark.parametrize("name", ["502_html", "404_problem", "ret_500_error", "200_html_cn", "ret_514"])
def test_without_an_answer_the_smallest_plan_holds(
    file: LocalFile, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """It is said once, asked for again after a while, and the last one told is better than none."""
    clock = FakeClock()
    caplog.set_level(logging.WARNING, "stockrt")
    refusal = EVERY_REFUSAL.get(name) or Answer.data(None, ret=500, msg="System error")
    with InfowayServer(plans={KEY: PLANS["premium"]}, script=lambda _: refusal) as server:
        instance = Instance(file, server, clock)
        assert instance.ask() == instance.ask() == [(1, 60, 86_400)]
        assert server.request_count == 1
        clock.advance(stockrt.PLAN_RETRY_S)
        instance.ask()
        assert server.request_count == 2
        (said,) = [record.getMessage() for record in caplog.records]
        assert "Free's limits" in said and "INFOWAY_PLAN" in said and KEY not in said
        server.script = ()
        clock.advance(stockrt.PLAN_RETRY_S)
        assert instance.ask() == [(10, 600, 864_000)]
        server.script = lambda _: refusal
        clock.advance(DAY_S)
        assert Instance(file, server, clock).ask() == [(10, 600, 864_000)]


def test_a_key_that_is_out_is_known_before_the_first_batch(file: LocalFile) -> None:
    with InfowayServer(keys={OTHER}) as server:
        instance = Instance(file, server, FakeClock())
        instance.ask()
        instance.ask()
        assert server.request_count == 1
        assert instance.pool.describe()[0]["state"] == "out"


def test_when_a_plan_ends_can_be_read_in_chinese() -> None:
    info = PackageInfo("", 2.0, ends=1_790_000_000.0)
    assert in_chinese(info.end_words(1_790_000_000 - 3 * 86_400)) == (
        "套餐将于 2026-09-21T14:13:20.000Z 到期，还剩 3 天"
    )
    assert in_chinese(info.end_words(1_790_000_001)) == "套餐已于 2026-09-21T14:13:20.000Z 到期"
    assert in_chinese(info.plan().name) == "未命名"


@pytest.mark.parametrize(("days", "words"), [(8, ""), (3, "its plan ends at"), (-1, "its plan ended at")])
@pytest.mark.parametrize("milliseconds", [False, True])
def test_an_end_within_seven_days_is_said_once_a_day(
    file: LocalFile, caplog: pytest.LogCaptureFixture, days: int, words: str, milliseconds: bool
) -> None:
    clock = FakeClock()
    ends = clock.wall() + days * DAY_S + 60
    plan: PlanThere = replace(PLANS["premium"], expires=ends, milliseconds=milliseconds)
    with InfowayServer(plans={KEY: plan}) as server:
        instance = Instance(file, server, clock)
        for _ in range(2):
            instance.ask()
            instance.ask()
            said = [record.getMessage() for record in caplog.records if "plan" in record.getMessage()]
            assert [words in text for text in said] == [True] * bool(words)
            caplog.clear()
            clock.advance(1)
            if days == 8:
                break
            clock.advance(DAY_S)


def test_what_check_says_of_a_key_is_chinese() -> None:
    """Its plan, until when, where another one is set, and that none can be had."""
    plan = replace(PLANS["premium"], expires=4_000_000_000)
    limits = "Premium（每秒 10 次请求，每分钟 600 次，每天 864000 次）"
    accepted = f"{{url}} 接受该密钥；套餐 {limits}，有效期至 2096-10-02T07:06:40.000Z"
    with InfowayServer(plans={KEY: plan}) as server:

        def told(plan_set: str) -> str:
            settings = settings_of(
                {"INFOWAY_API_KEY": KEY, "INFOWAY_API_BASE_URL": server.url, "INFOWAY_PLAN": plan_set}
            )
            (check,) = stockrt.check_key(settings, None, KeyPool(settings.key_plans(), NoLedger()).keys[0])
            assert check.good and in_chinese(check.name).startswith("API 密钥 ")
            return in_chinese(check.words)

        assert told("") == accepted.format(url=server.url)
        other = "；INFOWAY_PLAN 与此不同，以 INFOWAY_PLAN 为准：Basic（每秒 2 次请求，每分钟 120 次，每天 172800 次）"
        assert told("basic").removeprefix(accepted.format(url=server.url)) == other
        server.script = lambda request: (
            Answer.json({"ret": 200, "data": [{}]}) if request.resource == "package/info" else None
        )
        none = "无法获知其套餐：应答中没有套餐信息；除非用 INFOWAY_PLAN 指明，否则按 Free 套餐限频"
        assert told("") == f"{server.url} 接受该密钥；{none}"
