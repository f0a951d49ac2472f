"""What a run and collecting tell of themselves, in words."""

from __future__ import annotations

from kit.cases import each

import stockrt
from stockrt import CollectStats, Failure, FailureKind, Report, in_language

WHY = stockrt.phrase("http.late")
FAILURES = {f"X{n}": Failure(FailureKind.NETWORK, WHY) for n in range(4)}


@each(
    ("report", "english", "chinese"),
    [
        (
            Report(total=2, stored=1, duplicates=1, took_s=1.25),
            "total 2, stored 1, already known 1, failed 0 (1.2 s)",
            "共 2，已入库 1，已有 1，失败 0（1.2 秒）",
        ),
        (
            Report(total=9, stored=1, queued=1, queued_because=WHY, failures=FAILURES, interrupted=True),
            "total 9, stored 1, already known 0, failed 4 (0.0 s), interrupted: 3 not done; "
            "1 trade kept on this machine, no answer in time",
            "共 9，已入库 1，已有 0，失败 4（0.0 秒），已中断：3 个代码未完成；1 笔成交暂存于本机，超时未应答",
        ),
        (
            Report(total=1, stored=1, close_error=WHY),
            "total 1, stored 1, already known 0, failed 0 (0.0 s); the closing snapshot is not kept: no answer in time",
            "共 1，已入库 1，已有 0，失败 0（0.0 秒）；收盘快照未保存：超时未应答",
        ),
    ],
    ids=["whole", "interrupted", "without closes"],
)
def test_the_closing_line_is_one_in_each_language(report: Report, english: str, chinese: str) -> None:
    summary = report.summary()
    assert summary == english
    assert in_language(summary, "zh") == chinese


@each(
    ("stats", "english", "chinese"),
    [
        (CollectStats(), "begins", "正在启动"),
        (
            CollectStats(connections=1, connections_wanted=2, codes=3, polled=1, per_second=9.96, delay_p50_ms=2.0,
                         delay_p99_ms=12.0, gaps_today=1, missed_beats=2, trouble=WHY),
            "1 of 2 connections, 3 codes subscribed, 1 code polled, 10.0 trades/s, stored after 2 ms (p99 12 ms), "
            "1 gap today, 2 beats missed, no answer in time",
            "2 个连接中 1 个已连上，已订阅 3 个代码，轮询 1 个代码，每秒 10.0 笔成交，入库延迟 2 毫秒（p99 12 毫秒），"
            "今日 1 处缺口，错过 2 次轮询，超时未应答",
        ),
        (CollectStats(polled=2, per_second=41.6), "2 codes polled, 42 trades/s", "轮询 2 个代码，每秒 42 笔成交"),
    ],
    ids=["nothing yet", "everything", "a poll"],
)  # fmt: skip
def test_what_collecting_does_is_told_in_each_language(
    stats: CollectStats, english: str, chinese: str
) -> None:
    words = stockrt.collect_words(stats)
    assert words == english
    assert in_language(words, "zh") == chinese


def test_a_trouble_is_cut_in_the_readers_language() -> None:
    """As long as one line holds, in each of them."""
    long = stockrt.phrase("tools.because", what="x" * 200, why=WHY)
    for language in stockrt.LANGUAGES:
        told = in_language(stockrt.collect_words(CollectStats(trouble=long)), language)
        assert told == "x" * (stockrt.TROUBLE_SHOWN - 1) + "…"
