"""Which language a person is spoken to in, and what of it a stream can show."""

from __future__ import annotations

import io
import logging
import re
from pathlib import Path
from typing import TextIO

import pytest
from kit.cases import each

import stockrt
from stockrt import can_show, columns_of, cut_between_words, in_language, language_of, lines_within, phrase

CHINESE = re.compile(r"[\u4e00-\u9fff]")


# ------------------------------------------------------------------------------------------------------
# The language
# ------------------------------------------------------------------------------------------------------


@each(
    ("environ", "language"),
    [
        ({}, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_TW"}, "zh"),
        ({"LANG": "zh_CN.GBK"}, "zh"),
        ({"LANG": "zh"}, "zh"),
        ({"LANG": "ZH_cn.utf8"}, "zh"),
        ({"LANG": "en_US.UTF-8"}, "en"),
        ({"LANG": "de_DE.UTF-8"}, "en"),
        ({"LANG": "C"}, "en"),
        ({"LANG": "POSIX"}, "en"),
        ({"LANG": "C.UTF-8"}, "en"),
        ({"LC_MESSAGES": "zh_CN.UTF-8", "LANG": "en_US.UTF-8"}, "zh"),
        ({"LC_MESSAGES": "en_US.UTF-8", "LANG": "zh_CN.UTF-8"}, "en"),
        ({"LC_ALL": "zh_CN.UTF-8", "LC_MESSAGES": "en_US.UTF-8", "LANG": "en_US.UTF-8"}, "zh"),
        ({"LC_ALL": "C", "LC_MESSAGES": "zh_CN.UTF-8", "LANG": "zh_CN.UTF-8"}, "en"),
        ({"LC_ALL": "", "LC_MESSAGES": "", "LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LC_CTYPE": "zh_CN.UTF-8", "LANG": "en_US.UTF-8"}, "en"),
        ({"STOCKRT_LANG": "zh", "LC_ALL": "C"}, "zh"),
        ({"STOCKRT_LANG": "en", "LC_ALL": "zh_CN.UTF-8"}, "en"),
        ({"STOCKRT_LANG": " ZH ", "LC_ALL": "C"}, "zh"),
        ({"STOCKRT_LANG": "", "LC_ALL": "zh_CN.UTF-8"}, "zh"),
        ({"STOCKRT_LANG": "fr", "LC_ALL": "zh_CN.UTF-8"}, "zh"),
    ],
)
def test_language_of_an_environment(environ: dict[str, str], language: str) -> None:
    assert language_of(environ) == language


class Stream(io.TextIOWrapper):
    """A stream of some encoding, on a terminal or not."""

    def __init__(self, encoding: str, is_terminal: bool) -> None:
        super().__init__(io.BytesIO(), encoding=encoding)
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        """Whether it is on a terminal."""
        return self._is_terminal


@each(
    ("encoding", "term", "is_terminal", "can"),
    [
        ("utf-8", "xterm-256color", True, True),
        ("utf-8", "", False, True),
        ("gbk", "xterm", True, True),
        ("gb18030", "xterm", True, True),
        ("gb2312", "xterm", True, True),
        ("big5", "xterm", True, False),  # has not the characters of the mainland
        ("ascii", "", False, False),
        ("latin-1", "", False, False),
        ("utf-8", "linux", True, False),  # the console's font
        ("utf-8", "linux", False, True),
        ("utf-8", "dumb", True, True),
    ],
)
def test_stream_shows_chinese_or_does_not(encoding: str, term: str, is_terminal: bool, can: bool) -> None:
    assert can_show(Stream(encoding, is_terminal), term) is can


@pytest.mark.parametrize(
    ("out", "err", "language"),
    [("utf-8", "utf-8", "zh"), ("utf-8", "ascii", "en"), ("latin-1", "utf-8", "en")],
)
def test_english_is_spoken_where_a_stream_cannot_show_chinese(
    monkeypatch: pytest.MonkeyPatch, out: str, err: str, language: str
) -> None:
    monkeypatch.setattr("sys.stdout", Stream(out, False))
    monkeypatch.setattr("sys.stderr", Stream(err, False))
    spoken = stockrt.Spoken()
    spoken.choose({"STOCKRT_LANG": "zh"})
    assert spoken.language == language


def test_journal_is_as_the_stream_below(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings that name a language are read when it stands there already."""
    monkeypatch.setattr("sys.stdout", Stream("utf-8", False))
    for encoding, language in (("utf-8", "zh"), ("ascii", "en")):
        monkeypatch.setattr("sys.stderr", stockrt.JournalStream(Stream(encoding, False)))
        spoken = stockrt.Spoken()
        spoken.choose({"STOCKRT_LANG": "zh"})
        assert spoken.language == language


def test_every_sentence_can_be_written_in_the_older_encoding_of_chinese_terminals() -> None:
    """What an encoding has not is shown as an escape."""
    for _, chinese in stockrt.TEMPLATES.values():
        chinese.encode("gbk")


# ------------------------------------------------------------------------------------------------------
# argparse's own words
# ------------------------------------------------------------------------------------------------------

BAD_LINES = {
    "--once --codes": "选项 --codes：至少需要一个取值",
    "--codes-file": "选项 --codes-file：缺少取值",
    "--once --check": "选项 --check：不能与 --once 同时使用",
    "--show --chart 2m": "选项 --chart：没有“2m”这个取值，可选",
    "--backfill many": "选项 --backfill：应为整数，而不是“many”",
    "--once=now": "选项 --once：不接受取值，却给出了“now”",
    "--help=me": "选项 -h/--help：不接受取值，却给出了“me”",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_argparses_words_stay_in_english_and_are_ours_in_chinese(
    monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    """In the words of the Python that runs this."""
    said = []

    def refuse(message: str) -> None:
        said.append(message)
        raise stockrt.UsageError(message)

    monkeypatch.setattr(stockrt, "_refuse_arguments", refuse)
    with pytest.raises(stockrt.UsageError):
        stockrt.make_parser().parse_args(line.split(), stockrt.Options())
    words = stockrt.argparse_words(said[0])
    assert words == said[0]
    assert in_language(words, "zh").startswith(BAD_LINES[line])


@each(
    ("message", "chinese"),
    [
        (  # of Python 3.11, and since 3.12
            "argument --up: invalid choice: 'blue' (choose from 'red', 'green')",
            "选项 --up：没有“blue”这个取值，可选“red”、“green”",
        ),
        (
            "argument --up: invalid choice: 'blue' (choose from red, green)",
            "选项 --up：没有“blue”这个取值，可选 red、green",
        ),
        ("something that no version says yet", "something that no version says yet"),
    ],
)
def test_argparses_words_of_other_versions(message: str, chinese: str) -> None:
    words = stockrt.argparse_words(message)
    assert words == message
    assert in_language(words, "zh") == chinese


def usage_error(*arguments: str) -> str:
    """Return what is said of a command line, in Chinese."""
    with pytest.raises(stockrt.UsageError) as error:
        stockrt.parse_arguments(arguments)
    assert isinstance(error.value.message, stockrt.Phrase), error.value
    return in_language(error.value.message, "zh")


@each(
    ("names", "english", "chinese"),
    [
        (
            ["forex:XAUUSD（黄金/美元）", "common:GC"],
            "forex:XAUUSD（黄金/美元） or common:GC",
            "forex:XAUUSD（黄金/美元）或 common:GC",
        ),
        (["A", "（B）"], "A or （B）", "A 或（B）"),
        (["A （x） y", "B"], "A （x） y or B", "A （x） y 或 B"),
    ],
)
def test_no_blank_of_a_sentence_stands_beside_punctuation_of_a_value(
    names: list[str], english: str, chinese: str
) -> None:
    words = stockrt.alternatives(names)
    assert (words, in_language(words, "zh")) == (english, chinese)


def test_blanks_between_columns_stay_beside_punctuation() -> None:
    words = phrase("cli.backfill_failed_code", code="茅台）", why="（none）")
    assert in_language(words, "zh") == "茅台）  （none）"


# All the command lines that are refused before anything is done.
REFUSED = {
    ("--onse",): "无法识别的参数：--onse（是不是 --once？）",
    ("--once", "AAPL.US"): "无法识别的参数：AAPL.US；代码须写在 --codes 之后，或紧跟在 --show 之后",
    (
        "--show",
        "--demo",
        "TSLA.US",
    ): "无法识别的参数：TSLA.US；代码须写在 --codes 之后，或紧跟在 --show 之后",
    ("--check", "--env-file", ""): "选项 --env-file：应给出文件名",
    ("--show", "--codes-file="): "选项 --codes-file：应给出文件名",
    ("--migrate", "a", "b"): "无法识别的参数：b",
    ("--foo",): "无法识别的参数：--foo",
    ("restart",): "无法识别的参数：restart；启动、停止服务请用 systemctl",
    ("--zyxwvu",): "无法识别的参数：--zyxwvu",
    ("--once",): "--once 需要 --codes CODE … 或 --codes-file FILE",
    (
        "--json",
    ): "--json 须与 --once、--collect、--show、--export、--check、--status、--executions、--rejects 或 "
    "--symbols 同用",
    ("--discard",): "--discard 须与 --rejects 同用",
    ("--executions", "0"): "--executions 0：应为 1 到 1000",
    ("--collect", "--every", "soon"): "--every soon：应为 1 到 86400 的秒数",
    ("--collect", "--codes", ","): "--codes：其中没有代码，应为 AAPL.US 600519 这样的代码",
    ("--backfill", "501"): "--backfill 501：应为 1 到 500 个交易日",
    ("--html", "a.txt"): "--html a.txt：应为以 .html 结尾的文件名，图片则以 .svg 结尾",
    ("--html", "a.html", "--json"): "--json 不能与 --html 同用",
    ("--export", "a.xls"): "--export a.xls：应为以 .csv 或 .jsonl 结尾的文件名，或 -",
    ("--export", "a.csv", "--json"): "--json 只与 --export - 同用，写入文件时格式由文件名决定",
    ("--export", "-", "--from", "today"): "--from today：应为日期（如 2026-08-14）或时间（如 "
    "2026-08-14T09:30+08:00）",
    ("--export", "-", "--from", "2026-08-14", "--to", "2026-08-01"): (
        "--to 2026-08-01 不晚于 --from 2026-08-14"
    ),
    ("--symbols", " "): "--symbols 需要文字：代码或名称，或其中一部分",
    ("--symbols", "x" * 201): "--symbols：共 201 个字符，应不超过 200 个",
    ("--symbols", "\udcff"): "--symbols \\udcff：不是 UTF-8 文本",
    ("--migrate",): "--migrate 需要旧客户端的目录，或 --documents",
    ("--migrate", "d", "--documents"): "--documents 与 --time-zone ZONE 必须同时使用",
}


@each("arguments", REFUSED)
def test_refused_command_line_in_chinese(arguments: tuple[str, ...]) -> None:
    assert usage_error(*arguments) == REFUSED[arguments]


def test_codes_of_a_command_line_to_collect_are_refused_in_chinese(tmp_path: Path) -> None:
    (tmp_path / "codes").write_bytes(b"\xff")
    (tmp_path / "none").write_text("# none\n")
    settings = stockrt.load_settings({}, needs=stockrt.NO_NEEDS, places=()).settings
    cases = {
        ("--collect",): "--collect 需要 --codes CODE …、--codes-file FILE 或 COLLECT_CODES",
        ("--collect", "--codes-file", f"{tmp_path}/none"): f"--codes-file {tmp_path}/none：其中没有代码，"
        "应为 AAPL.US 600519 这样的代码",
        ("--collect", "--codes-file", f"{tmp_path}/codes"): f"无法读取 --codes-file {tmp_path}/codes："
        "不是 UTF-8 文本；请另存为 UTF-8（GBK 文件可用 iconv -f GBK -t UTF-8 转换）",
    }
    for arguments, words in cases.items():
        options = stockrt.parse_arguments(arguments)
        with pytest.raises(stockrt.UsageError) as error:
            stockrt._settings_to_collect(options, settings)
        assert in_language(error.value.message, "zh") == words


def test_synthetic_trades_are_refused_beside_mongodb_in_chinese() -> None:
    environ = {"MONGODB_HOST": "mongodb://127.0.0.1"}
    settings = stockrt.load_settings(environ, needs=stockrt.NO_NEEDS, places=()).settings
    options = stockrt.parse_arguments(["--once", "--demo", "--codes", "A.US"])
    with pytest.raises(stockrt.UsageError) as error:
        stockrt.run_once(options, settings)
    assert in_language(error.value.message, "zh") == (
        "--demo 的模拟成交只存于本机：请取消设置 MONGODB_HOST，或去掉 --demo"
    )


# ------------------------------------------------------------------------------------------------------
# The help
# ------------------------------------------------------------------------------------------------------


def help_text(monkeypatch: pytest.MonkeyPatch, language: str, columns: int = 80) -> str:
    """Return what --help prints."""
    monkeypatch.setattr(stockrt, "terminal_size", lambda: (columns, 24))
    monkeypatch.setattr(stockrt.SPOKEN, "language", language)
    return stockrt.make_parser().format_help()


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_lines_of_the_help_fit_the_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    text = help_text(monkeypatch, "zh", columns)
    options = text.partition("选项：\n")[2].partition("示例：\n")[0]
    lines = options.splitlines()
    assert [line for line in lines if stockrt.columns_of(line) > columns - 2] == []
    assert max(map(stockrt.columns_of, lines)) > columns - 8  # and use it
    assert [line for line in lines if re.match(r"\s*[，。；：、）]", line)] == []
    assert [line for line in lines if re.search(r"[（“]$", line)] == []


def test_help_has_the_same_flags_in_both_languages(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [re.findall(r"^  (-.*?)(?:  |$)", help_text(monkeypatch, one), re.M) for one in ("en", "zh")]
    assert flags[0] == flags[1] and len(flags[0]) > 35


def test_help_in_chinese_has_no_english_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    text = help_text(monkeypatch, "zh").partition("\n\n")[2]  # without the usage
    assert re.findall(r"[a-z]{2,} [a-z]{2,}", re.sub(r"stockrt\.pyz --.*?(?:  |\n)", "", text)) == []
    assert not CHINESE.search(help_text(monkeypatch, "en").replace("茅台", "").replace("黄金", ""))


def test_help_in_english_is_argparses(monkeypatch: pytest.MonkeyPatch) -> None:
    text = help_text(monkeypatch, "en")
    assert text.startswith("usage: stockrt [-h]")
    assert "\n\noptions:\n  -h, --help            show this help message and exit\n" in text
    assert "  --version             show program's version number and exit\n" in text


def test_no_word_of_the_help_is_made_for_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chinese is made of it where it is asked for only."""
    monkeypatch.setattr(stockrt.SPOKEN, "language", "zh")
    made = []

    def reading(words: str) -> str:
        made.append(words)
        return words

    monkeypatch.setattr(stockrt, "for_reader", reading)
    stockrt.parse_arguments(["--once", "--codes", "AAPL.US"])
    assert made == []
    stockrt.make_parser().format_help()
    assert len(made) > 40


@each(
    ("text", "columns", "lines"),
    [
        ("写入成交", 8, ["写入成交"]),
        ("写入成交", 7, ["写入成", "交"]),
        ("写入成交，然后", 8, ["写入成", "交，然后"]),  # no line begins with a comma
        ("写入（默认 5m）", 9, ["写入（默", "认 5m）"]),
        ("写入 FILE.csv 或 FILE.jsonl", 14, ["写入 FILE.csv", "或 FILE.jsonl"]),
        ("a word and another", 10, ["a word and", "another"]),
        ("2026-08-14T09:30+08:00", 5, ["2026-08-14T09:30+08:00"]),  # what cannot be broken
        ("", 10, [""]),
    ],
)
def test_lines_within_columns(text: str, columns: int, lines: list[str]) -> None:
    assert lines_within(text, columns) == [line.rstrip() for line in lines]


@pytest.mark.parametrize(
    ("columns", "text", "shown"),
    [
        (80, "begins", "begins"),
        (12, "2 of 2 connections", "2 of 2…"),
        (5, "connections", "conn…"),
        (9, "已连上 3 个", "已连上 3…"),
        (10, "2 个连接，正在启动", "2 个连…"),
    ],
)
def test_a_line_is_cut_between_two_words(columns: int, text: str, shown: str) -> None:
    assert cut_between_words(text, columns) == shown
    assert columns_of(shown) <= columns


# ------------------------------------------------------------------------------------------------------
# What is said of the settings
# ------------------------------------------------------------------------------------------------------


def test_line_below_the_live_table_leaves_out_whole_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stockrt.SPOKEN, "language", "zh")
    stats = stockrt.CollectStats(1, 1, 2, 0, 3.4, 114.0, 560.0, gaps_today=2)
    words = stockrt.collect_words(stats)
    assert stockrt.items_within(words, 200) == in_language(words, "zh")
    assert stockrt.items_within(words, 60) == "1 个连接中 1 个已连上，已订阅 2 个代码，今日 2 处缺口"
    failing = stockrt.collect_words(stats._replace(trouble=phrase("tools.stopped")))
    assert stockrt.items_within(failing, 60).endswith("，已停止")
    assert stockrt.items_within("", 60) == ""


def test_closing_line_of_collecting_in_chinese() -> None:
    stats = stockrt.CollectStats(trades=7, stored=5, duplicates=2, dropped=1, gaps_today=1)
    words = stockrt._collected_words(stats, 3, 4.25)
    assert words == (
        "trades 7, stored 5, already known 2 (4.2 s); 3 trades wait on this machine for MongoDB; "
        "1 pushed and not asked for, or no trades; 1 gap today"
    )
    assert in_language(words, "zh") == (
        "成交 7 笔，已入库 5 笔，已有 2 笔（用时 4.2 秒）；本机上有 3 笔成交等待写入 MongoDB；"
        "另有 1 条推送并未请求，或不是成交；今日 1 处缺口"
    )


def stream_of(stream: TextIO) -> str:
    """Return what was written to a stream."""
    stream.seek(0)
    return stream.read()


@pytest.mark.parametrize("reader", ["journal", "log", "person"])
@pytest.mark.parametrize("language", ["zh", "en"])
def test_a_person_reads_reasons_and_the_log_has_them_whole(
    monkeypatch: pytest.MonkeyPatch, reader: str, language: str
) -> None:
    below = Stream("utf-8", False)
    monkeypatch.setattr("sys.stderr", stockrt.JournalStream(below) if reader == "journal" else below)
    monkeypatch.setattr(stockrt.SPOKEN, "language", language)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    settings = stockrt.load_settings({}, needs=stockrt.NO_NEEDS, places=()).settings
    stockrt.start_logging(settings, by_hand=reader != "log")
    odd = phrase("cli.os_error", file="a", why="b")
    stockrt.log.warning("%s", odd)
    stockrt.log.warning("at %s: %s; again", stockrt.count_words(2, "code"), odd)
    stockrt.log.warning("no words of ours")
    lines = [line.partition(" WARNING ") for line in stream_of(below).splitlines()]
    whole = ["a cannot be used: b [cli.os_error]", "at 2 codes: a cannot be used: b; again [cli.os_error]"]
    if reader == "person" and language == "zh":
        assert [before for before, *_ in lines[:2]] == ["stockrt：无法使用 a：b"] * 2
    elif reader == "person":
        assert lines[0][0] == "stockrt: a cannot be used: b" and lines[1][2] == whole[1]
    else:
        said = [line[2] or line[0].removeprefix("<4>") for line in lines]
        assert said == [*whole, "no words of ours"]
    assert "no words of ours" in "".join(lines[2])


@pytest.mark.parametrize(
    ("unit", "english", "chinese"),
    [
        ("", "working for 00:0", "已运行 00:0"),
        ("cli.of_codes", "3/9 [00:0", "3/9 [00:0"),
        ("cli.of_codes", " codes/s", " 代码/s"),
        ("unit.trades", " trades/s", " 成交/s"),
    ],
)
def test_what_goes_on_is_shown_in_the_readers_language(
    monkeypatch: pytest.MonkeyPatch, unit: str, english: str, chinese: str
) -> None:
    for language, words in (("en", english), ("zh", chinese)):
        monkeypatch.setattr(stockrt.SPOKEN, "language", language)
        screen = Stream("utf-8", True)
        monkeypatch.setattr("sys.stderr", screen)
        with stockrt.Terminal(None, unit, bar_above=0) as terminal:
            terminal.progress(3, 9)
        assert words in stream_of(screen)


def test_what_cannot_be_collected_is_said_in_chinese() -> None:
    refused: dict[str, str] = {
        "AAPL": phrase("cli.os_error", file="a", why="b"),
        "B": phrase("tools.stopped"),
    }
    with pytest.raises(stockrt.StockrtError) as error:
        stockrt._need_one_code(stockrt.Resolved({}, refused))
    assert str(error.value) == "nothing to collect: AAPL (a cannot be used: b), B (stopped); see --symbols"
    assert in_language(error.value.message, "zh") == (
        "没有可采集的代码（请看 --symbols）：AAPL（无法使用 a：b）、B（已停止）"
    )


def test_rows_of_a_backfill_in_chinese() -> None:
    row = stockrt.Backfilled("TSLA.US", first="2026-11-02", last="2026-11-06", added=4, there=1)
    assert in_language(stockrt._backfilled_words(row), "zh") == (
        "TSLA.US       2026-11-02  2026-11-06  新增 4 个，已有 1 个"
    )
    failed = stockrt.Backfilled("XX", why=phrase("tools.stopped"))
    assert in_language(stockrt._backfilled_words(failed), "zh") == "XX            已停止"
