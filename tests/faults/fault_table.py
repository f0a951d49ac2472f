"""The table of a run of the fault suite: collects its rows, prints them, and writes them into the README.

    python tests/faults/fault_table.py ROWS [--write-readme README]

ROWS holds one JSON object a line, as `record_row` of fault_world writes them. In the README the table stands
between two comments, in each of its two languages.
"""

from __future__ import annotations

import argparse
import json
import re
import time
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Each fault in the order of the table, in both languages; {…} are facts of its rows. Crash-only: the daemon ends
# where it meets the damage, and is started again.
FAULTS = {
    "kill": (
        "kill -9 at a random moment of writing, spooling, draining",
        "写入、放入暂存队列、从队列写入时随机 kill -9",
    ),
    "power": (
        "power cut: whatever was not synced is dropped, in part or whole",
        "断电：未落盘的数据部分或全部丢失",
    ),
    "power_wal": (
        "power cut: SQLite's log ends at, or within, any frame",
        "断电：SQLite 日志在任意帧处或帧内截断",
    ),
    "power_drain": ("power cut, then `--drain` of what is left", "断电后用 `--drain` 写入余下数据"),
    "down": (
        "MongoDB down for {seconds} s, 100 codes every {every} s",
        "MongoDB 停机 {seconds} 秒，每 {every} 秒 100 个代码",
    ),
    "hanging": ("MongoDB hanging for {seconds} s", "MongoDB 挂起 {seconds} 秒"),
    "flapping": (
        "MongoDB flapping every {flap} s for {seconds} s",
        "MongoDB 每 {flap} 秒起停一次，共 {seconds} 秒",
    ),
    "answer": (
        "MongoDB applies a write and its answer is lost, or an error",
        "MongoDB 已写入，但应答丢失或为错误",
    ),
    "election": ("elections in a replica set, answers lost too", "副本集选举，并丢失应答"),
    "election_srv": ("elections in a replica set behind mongodb+srv", "mongodb+srv 副本集选举"),
    "poison": ("one poison document in 1,000", "1000 个文档中有一个被 MongoDB 拒绝"),
    "foreign_index": ("a unique index of the operator forbids a trade", "运维人员的唯一索引拒绝某笔成交"),
    "file_overwritten": (
        "spool file: random bytes overwritten (crash-only)",
        "暂存队列文件：随机字节被改写（crash-only）",
    ),
    "file_cut_short": (
        "spool file: cut short (crash-only)",
        "暂存队列文件：被截短（crash-only）",
    ),
    "file_beginning_overwritten": (
        "spool file: its beginning overwritten (crash-only)",
        "暂存队列文件：开头被改写（crash-only）",
    ),
    "file_inner_pages_overwritten": (
        "spool file: all inner pages overwritten (crash-only)",
        "暂存队列文件：全部内部页被改写（crash-only）",
    ),
    "file_log": (
        "spool file: random bytes of its log overwritten (crash-only)",
        "暂存队列文件：日志中随机字节被改写（crash-only）",
    ),
    "file_foreign": (
        "spool file of another user, or without permissions",
        "暂存队列文件属于其他用户或无权限",
    ),
    "file_old": ("spool file of an older version", "旧版本的暂存队列文件"),
    "disk_full": ("no space left on the disk", "磁盘已满"),
    "disk_share": ("the spool comes to 5 % free on the disk", "暂存队列使磁盘仅余 5%"),
    "cap": ("the spool comes to SPOOL_MAX_MB", "暂存队列达到 SPOOL_MAX_MB"),
    "clock": ("the clock set an hour forward or back", "系统时钟拨快或拨慢一小时"),
    "dns": ("DNS hangs: platform, API and MongoDB", "DNS 无响应：平台、API、MongoDB"),
    "packets": ("an address swallows packets: platform, API, MongoDB", "地址丢弃数据包：平台、API、MongoDB"),
    "silence": ("the connection to the platform dies in silence", "与平台的连接无声中断"),
    "stream_kill": (
        "stream: kill -9 of the collector under 2,000 trades a second",
        "推送流：每秒 2,000 笔成交下对采集进程 kill -9",
    ),
    "stream_cut": (
        "stream: the connection cut under 2,000 trades a second",
        "推送流：每秒 2,000 笔成交下切断连接",
    ),
    "stream_election": (
        "stream: MongoDB's primary killed under 2,000 trades a second",
        "推送流：每秒 2,000 笔成交下杀死 MongoDB 主节点",
    ),
    "stream_two": (
        "stream: two collectors with the same codes, cut in turn",
        "推送流：两个采集进程采集相同代码，轮流断开",
    ),
    "stream_shares": ("stream: shares of the codes that overlap", "推送流：代码份额相互重叠"),
    "stream_slow": ("stream: MongoDB slower than the market", "推送流：MongoDB 慢于行情"),
    "soak": ("soak: {minutes} min of random faults under load", "持续 {minutes} 分钟的随机故障"),
}
HEADS = (("fault", "rounds", "trades", "lost", "doubled"), ("故障", "轮数", "成交", "丢失", "重复"))
BEGIN, END = "<!-- faults: tests/faults/run writes this table -->", "<!-- /faults -->"


class Row(NamedTuple):
    """A line of the table: its texts in both languages, and its numbers."""

    titles: tuple[str, str]
    numbers: tuple[int, int, int, int]


def collect(lines: Iterable[str]) -> list[Row]:
    """Add the rows of each fault up, in the order of FAULTS."""
    sums: dict[str, list[int]] = {}
    facts: dict[str, Mapping[str, Any]] = {}
    for line in lines:
        row = json.loads(line)
        numbers = [row[name] for name in ("rounds", "acknowledged", "lost", "doubled")]
        before = sums.setdefault(row["fault"], [0, 0, 0, 0])
        sums[row["fault"]] = [old + new for old, new in zip(before, numbers, strict=True)]
        facts[row["fault"]] = row["facts"]
    rows = []
    for name, (english, chinese) in FAULTS.items():
        if name in sums:
            rounds, trades, lost, doubled = sums[name]
            titles = (english.format(**facts[name]), chinese.format(**facts[name]))
            rows.append(Row(titles, (rounds, trades, lost, doubled)))
    return rows


def markdown(rows: Sequence[Row], language: int) -> str:
    """The table for the README, in English (0) or Chinese (1)."""
    lines = [f"| {' | '.join(HEADS[language])} |", "|---|---:|---:|---:|---:|"]
    lines += [f"| {row.titles[language]} | {' | '.join(f'{n:,}' for n in row.numbers)} |" for row in rows]
    return "\n".join(lines)


def plain(rows: Sequence[Row]) -> str:
    """The table for a terminal."""
    cells = [[row.titles[0], *(f"{n:,}" for n in row.numbers)] for row in rows]
    widths = [max(map(len, column)) for column in zip(HEADS[0], *cells, strict=True)]
    return "\n".join(
        "  ".join(text.rjust(width) if place else text.ljust(width)
                  for place, (text, width) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in [list(HEADS[0]), *cells]
    )  # fmt: skip


def write_readme(path: Path, rows: Sequence[Row], day: str) -> None:
    """Put the tables between the comments, which must be there twice. Raises ValueError where they are not."""
    tables = iter([
        f"Last long run ({day}):\n\n{markdown(rows, 0)}",
        f"最近一次完整运行（{day}）：\n\n{markdown(rows, 1)}",
    ])  # fmt: skip
    place = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    text = path.read_text(encoding="utf-8")
    if len(place.findall(text)) != 2:
        raise ValueError(f"{path}: the comments {BEGIN} … {END} are not there twice")
    path.write_text(place.sub(lambda _: f"{BEGIN}\n{next(tables)}\n{END}", text), encoding="utf-8")


def main() -> None:
    """Print the table, and write it where that is asked for."""
    parser = argparse.ArgumentParser(description="Show the table of a run of the fault suite.")
    parser.add_argument("rows", type=Path)
    parser.add_argument("--write-readme", type=Path, metavar="README")
    options = parser.parse_args()
    rows = collect(options.rows.read_text(encoding="utf-8").splitlines() if options.rows.exists() else ())
    print(unicodedata.normalize("NFC", plain(rows)))
    if options.write_readme:
        write_readme(options.write_readme, rows, time.strftime("%Y-%m-%d"))


if __name__ == "__main__":
    main()
