"""The local files are crash-only: damage ends who meets it, and the next one to open the file rescues it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from conftest import RunPyz, unavailable, unprivileged
from kit.chinese import in_chinese
from kit.daemons import HASH, PATIENCE, ProcessDaemon, environment, settings_for, until
from kit.infoway_server import InfowayServer
from kit.platform_server import PlatformServer
from kit.trades import make_documents

import stockrt
from stockrt import (
    Close,
    Command,
    DeliveryQueue,
    Document,
    Journal,
    LocalFile,
    SqliteStore,
    StoreError,
    open_store_file,
)

ROOT = Path(stockrt.__file__).parent


@contextlib.contextmanager
def queue_in(folder: Path, events: stockrt.Events = stockrt.NO_EVENTS) -> Iterator[DeliveryQueue]:
    """Open the queue of a state directory."""
    with open_store_file(folder, events) as file:
        yield DeliveryQueue(file, 1 << 30)


def take(queue: DeliveryQueue, count: int) -> list[Document]:
    """Take the oldest trades out."""
    with queue.taking_out(batch := queue.oldest(count)):
        pass
    return batch.documents


def spoiled(folder: Path, spoil: Callable[[Path], object], count: int = 2000) -> Path:
    """Return the file of a state directory with `count` trades, closed, of which something was spoiled."""
    with queue_in(folder) as queue:
        for first in range(0, count, 100):
            queue.write(make_documents(100, first=first))
        path = folder / stockrt.SQLITE_NAME
        for extra in ("-wal", "-shm"):  # as a crash leaves it: not moved into the file
            shutil.copy(beside(path, extra), folder / f"kept{extra}")
    spoil(path)
    return path


def beside(path: Path, end: str) -> Path:
    """Return a file's name with an end."""
    return path.with_name(path.name + end)


def set_aside(folder: Path) -> Path:
    """Return the one file that was set aside."""
    (aside,) = [p for p in folder.glob("*.db.damaged-*") if not p.name.endswith(("-wal", "-shm"))]
    return aside


def overwrite(path: Path, at: int, length: int) -> None:
    """Put random bytes into a file."""
    with path.open("r+b") as stream:
        stream.seek(at)
        stream.write(random.Random(at).randbytes(length))


def cut(path: Path, size: int) -> None:
    """Cut a file short."""
    with path.open("r+b") as stream:
        stream.truncate(size)


def blind(path: Path, name: str) -> None:
    """Overwrite the root page of a table or an index: it is met only by who uses it."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        (root,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (name,)).fetchone()
    overwrite(path, (root - 1) * 4096, 4096)


def a_close(number: int) -> Close:
    """Return a close."""
    (document,) = make_documents(1, first=number)
    return Close(document, "2026-08-14")


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the error lines."""
    return [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]


class Heard(stockrt.Events):
    """Hears what a file tells."""

    def __init__(self) -> None:
        self.signs = 0
        self.damages: list[stockrt.StockrtError] = []

    def progress(self, done: int = 0, total: int = 0, unwritten: int = 0) -> None:
        """Count."""
        self.signs += 1

    def damaged(self, error: stockrt.StockrtError) -> None:
        """Remember."""
        self.damages.append(error)


# ------------------------------------------------------------------------------------------------------
# Transactions
# ------------------------------------------------------------------------------------------------------


def counted(file: LocalFile) -> int:
    """Return how many rows of the keys' counts a file has."""
    return int(file.read_one("SELECT count(*) FROM key_usage")[0])


def test_a_transaction_in_another_one_is_a_part_of_it(tmp_path: Path) -> None:
    insert = "INSERT INTO key_usage VALUES (?, 'd', 1)"
    with open_store_file(tmp_path) as file:
        with pytest.raises(RuntimeError), file.write() as db:
            db.execute(insert, "a")
            with file.write() as inner:
                inner.execute(insert, "b")
            raise RuntimeError
        assert counted(file) == 0
        with file.write() as db:
            db.execute(insert, "a")
            with file.write() as inner:
                inner.execute(insert, "b")
        assert counted(file) == 2


def test_threads_wait_for_each_other(tmp_path: Path) -> None:
    faults: list[Exception] = []

    def work(who: int) -> None:
        try:
            for number in range(50):
                with file.write() as db:
                    db.execute("INSERT INTO key_usage VALUES (?, ?, 1)", (str(who), str(number)))
                assert counted(file) > number
        except Exception as error:
            faults.append(error)

    with open_store_file(tmp_path) as file:
        threads = [threading.Thread(target=work, args=(who,)) for who in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (faults, counted(file)) == ([], 200)


def test_a_file_that_is_closed_says_so(tmp_path: Path) -> None:
    with open_store_file(tmp_path) as file:
        pass
    with pytest.raises(StoreError, match="closed already") as caught:
        counted(file)
    assert in_chinese(caught.value.message) == f"本地文件 {file.path} 已经关闭"


# ------------------------------------------------------------------------------------------------------
# Damage that shows when the file is opened
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "rescued"),
    [
        (lambda path: overwrite(path, 0, 100), 2000),
        (lambda path: overwrite(path, 0, 4096), 2000),
        (lambda path: cut(path, path.stat().st_size // 2), 780),
        (lambda path: cut(path, path.stat().st_size - 4096), 1900),
        (lambda path: path.write_bytes(b"this is no database\n" * 500), 0),
    ],
    ids=["header", "first page", "half", "last page", "no database"],
)
def test_a_damaged_file_is_set_aside_and_rescued(
    tmp_path: Path, spoil: Callable[[Path], object], rescued: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = spoiled(tmp_path, spoil)
    before = path.read_bytes()
    for _ in range(2):  # a damage may show only when the file is used
        with contextlib.suppress(StoreError), queue_in(tmp_path) as queue:
            queue.write(make_documents(1, first=5000))
            found = [d for _ in range(30) for d in take(queue, 100)]
            break
    aside = set_aside(tmp_path)
    assert aside.read_bytes()[:1000] == before[:1000]
    assert datetime.now(UTC) - datetime.strptime(aside.name[-23:], "%Y%m%dT%H%M%S.%f%z") < timedelta(hours=1)
    expected = {d["_id"]: d for d in make_documents(2000) + make_documents(1, first=5000)}
    assert all(expected[d["_id"]] == d for d in found)
    assert len({d["_id"] for d in found}) == len(found) > rescued
    arrived = [d["_id"] for d in found]
    assert arrived == [name for name in expected if name in arrived]  # in their order
    (error,) = errors(caplog)
    assert aside.name in error
    (rows,) = map(int, re.findall(r"(\d+) rows of it", error))
    assert rows in (len(found) - 1, len(found))  # the last one was written before or after


def test_what_marks_damage_is_said_in_both_languages_by_the_next_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The mark holds the words with their kind; one of an older version is its text, an empty one a mark as well."""
    with queue_in(tmp_path) as queue, pytest.raises(StoreError):
        raise queue._file.damaged(stockrt.phrase("tools.no_memory"))
    (mark,) = tmp_path.glob("*.damaged")
    assert stockrt.in_language(stockrt.unpacked(json.loads(mark.read_text())), "zh").startswith("内存不足")
    with queue_in(tmp_path):
        pass
    assert "memory is short" in caplog.text
    for text, said in (("seen in use\n", "seen in use"), ("", "a mark says so"), ("[" * 10**5, "[[[[")):
        caplog.clear()
        mark.write_text(text)
        with queue_in(tmp_path):
            pass
        assert said in caplog.text
    assert not mark.exists()


def test_a_long_rescue_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stockrt, "RESCUED_AT_ONCE", 500)
    many = 2 * stockrt.RESCUED_AT_ONCE + 100
    spoiled(tmp_path, lambda path: overwrite(path, 0, 100), many)
    heard = Heard()
    with queue_in(tmp_path, heard) as queue:
        assert queue.trades == many
    assert heard.signs == 3


KILLED_WHILE_SETTING_ASIDE = """
import os, pathlib, sys
import stockrt

left = int(sys.argv[2])

def counted(change):
    def count(*arguments, **more):
        global left
        if not left:
            os._exit(9)
        left -= 1
        return change(*arguments, **more)
    return count

for name in ("replace", "unlink"):
    setattr(pathlib.Path, name, counted(getattr(pathlib.Path, name)))
stockrt.open_store_file(pathlib.Path(sys.argv[1])).close()
print("done")
"""


@pytest.mark.parametrize(
    "steps", [pytest.param(n, marks=pytest.mark.long) if n in (1, 3, 6, 10) else n for n in range(12)]
)
def test_a_kill_at_any_step_of_a_rescue_loses_nothing(tmp_path: Path, steps: int) -> None:
    path = spoiled(tmp_path, lambda path: None, count=1000)
    for side in ("-wal", "-shm"):
        (tmp_path / f"kept{side}").rename(beside(path, side))
    overwrite(path, 0, 4096)
    beside(path, ".damaged").write_text("seen while it was in use\n")
    command = [sys.executable, "-c", KILLED_WHILE_SETTING_ASIDE, str(tmp_path), str(steps)]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == 9 or "done" in killed.stdout, killed.stderr
    assert killed.returncode == 9 or steps > 7, "the steps are not the ones that this test counts"
    with queue_in(tmp_path) as queue:
        assert queue.oldest(2000).documents == make_documents(1000)
    set_aside(tmp_path)
    left = [*tmp_path.glob("*.setting-aside*"), *tmp_path.glob("*.rescue*"), *tmp_path.glob("*.damaged")]
    assert not left


def test_a_rescue_that_finds_no_room_is_made_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise sqlite3.OperationalError("database or disk is full")

    spoiled(tmp_path, lambda path: overwrite(path, 0, 100), 1000)
    with monkeypatch.context() as patch:
        patch.setattr(stockrt, "rescue", fail)
        for _ in range(3):
            with pytest.raises(StoreError, match="disk is full"):
                open_store_file(tmp_path)
    with queue_in(tmp_path) as queue:
        assert queue.oldest(2000).documents == make_documents(1000)
    set_aside(tmp_path)


def test_long_codes_are_rescued_too(tmp_path: Path) -> None:
    """The length of an `_id` of 58 and more characters takes two bytes in the file."""
    (short,) = make_documents(1)
    numbers = {"p": "1" * 17 + "." + "2" * 16, "v": "3" * 17 + "." + "4" * 16}
    long = short | numbers | {"_id": f"{short['s']}|{short['t']}|{numbers['p']}|{numbers['v']}|{short['td']}"}
    with queue_in(tmp_path) as queue:
        queue.write([short, long])
    overwrite(tmp_path / stockrt.SQLITE_NAME, 0, 100)
    with queue_in(tmp_path) as queue:
        assert queue.oldest(10).documents == [short, long]


@pytest.mark.parametrize("left", [b"", b"S"])
def test_the_log_is_rescued_where_the_file_is_gone(tmp_path: Path, left: bytes) -> None:
    """SQLite takes a file of one byte for an empty one too."""
    path = spoiled(tmp_path, lambda path: None, count=500)
    (tmp_path / "kept-wal").rename(beside(path, "-wal"))
    path.write_bytes(left)
    with queue_in(tmp_path) as queue:
        assert queue.oldest(1000).documents == make_documents(500)


def test_a_torn_log_loses_nothing_behind_the_damage(tmp_path: Path) -> None:
    """SQLite would take everything behind the first damaged frame for a write that a power cut interrupted."""
    path = spoiled(tmp_path, lambda path: None, count=500)
    (tmp_path / "kept-wal").rename(beside(path, "-wal"))
    overwrite(beside(path, "-wal"), 32 + 3 * (24 + 4096) + 24 + 2000, 8)
    with queue_in(tmp_path) as queue:
        found = {d["_id"] for d in queue.oldest(1000).documents}
    assert len(found) >= 490
    set_aside(tmp_path)


def test_other_tables_are_rescued_too(tmp_path: Path) -> None:
    with open_store_file(tmp_path) as file:
        noted = stockrt.OpenSession("AAPL.US", "2026-08-14", stockrt.Stage.BATCH, 1_786_752_000)
        stockrt.SessionsFile(file).note([noted])
        store = SqliteStore(file)
        store.write_closes([a_close(number) for number in range(5)])
        for first in range(0, 2000, 100):
            store.write(make_documents(100, first=first))
    path = tmp_path / stockrt.SQLITE_NAME
    overwrite(path, path.stat().st_size - 20 * 4096, 20 * 4096)
    with pytest.raises(StoreError, match="damaged"), queue_in(tmp_path) as queue:
        while take(queue, 500):
            pass
    with open_store_file(tmp_path) as file:
        closes = file.read_all("SELECT _id FROM close ORDER BY _id")
        assert closes == [(a_close(n).key,) for n in range(5)]
        assert stockrt.SessionsFile(file).due(1_786_752_000, 9) == [noted]


@pytest.mark.parametrize("mode", [0o000, 0o444])
def test_a_file_of_another_user_is_set_aside(mode: int, caplog: pytest.LogCaptureFixture) -> None:
    """Its lock is another user's too, and keeps nobody out."""
    # pytest's own folders may not be entered by another user.
    with tempfile.TemporaryDirectory(prefix="stockrt-test-") as folder:
        state = Path(folder, "state")
        with queue_in(state) as queue:
            queue.write(make_documents(10))
        Path(folder).chmod(0o755)
        state.chmod(0o777)
        (state / stockrt.SQLITE_NAME).chmod(mode)
        with unprivileged(), queue_in(state) as queue:
            assert len(queue.oldest(100).documents) == (10 if mode else 0)
            queue.write(make_documents(1, first=50))
        aside = set_aside(state)
        with contextlib.closing(sqlite3.connect(aside)) as db:
            assert db.execute("SELECT count(*) FROM realtime").fetchone() == (10,)
    (error,) = errors(caplog)
    assert aside.name in error


def test_many_may_find_the_damage_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One of them rescues, the others wait for it."""
    path = spoiled(tmp_path, lambda path: overwrite(path, 0, 4096), count=1000)
    barrier = threading.Barrier(4)
    faults: list[Exception] = []

    def write(number: int) -> None:
        barrier.wait()
        try:
            with queue_in(tmp_path) as queue:
                queue.write(make_documents(10, first=3000 + 10 * number))
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    with queue_in(tmp_path) as queue:
        names = {d["_id"] for d in queue.oldest(5000).documents}
    assert names == {d["_id"] for d in make_documents(1000) + make_documents(40, first=3000)}
    assert len(errors(caplog)) == 1
    assert path.exists()


# ------------------------------------------------------------------------------------------------------
# Damage that shows while the file is in use
# ------------------------------------------------------------------------------------------------------


def test_damage_in_use_ends_the_use_and_is_rescued_at_the_next_opening(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is in an index that nothing at the opening looks at."""
    path = spoiled(tmp_path, lambda path: blind(path, "realtime_code_time"))
    heard = Heard()
    with queue_in(tmp_path, heard) as queue:
        assert len(queue.oldest(100).documents) == 100
        with pytest.raises(StoreError, match=r"stockrt\.db is damaged: .*next start.*rescues") as first:
            queue.write(make_documents(1, first=5000))
        for _ in range(2):
            with pytest.raises(StoreError, match="is damaged"):
                queue.oldest(1)
    assert heard.damages == [first.value]
    assert in_chinese(first.value.message) == (
        f"本地文件 {path} 已损坏：数据库内容错乱；下次启动时会将其移开保留，并抢救能读出的内容"
    )
    assert "malformed" in beside(path, ".damaged").read_text()
    assert not errors(caplog), "the words are the error's, which who asked says"
    with queue_in(tmp_path) as queue:
        assert queue.oldest(9999).documents == make_documents(2000)
        queue.write(make_documents(1, first=5000))
    assert set_aside(tmp_path).name in errors(caplog)[0] and "malformed" in errors(caplog)[0]
    assert not beside(path, ".damaged").exists()


def test_rows_that_are_out_of_order_are_damage(tmp_path: Path) -> None:
    """Part of a page is gone, and SQLite does not look."""
    path = spoiled(tmp_path, lambda path: None, 1000)
    with path.open("rb") as stream:
        content = bytearray(stream.read())
    (leaf,) = [
        at
        for at in range(0, len(content), 4096)
        if content[at] == 0x0D and make_documents(1, first=500)[0]["_id"].encode() in content[at : at + 4096]
    ][:1]
    first, second = content[leaf + 8 : leaf + 10], content[leaf + 10 : leaf + 12]
    content[leaf + 8 : leaf + 12] = second + first
    path.write_bytes(content)
    with pytest.raises(StoreError, match="out of order"), queue_in(tmp_path) as queue:
        queue.oldest(1000)
    with queue_in(tmp_path) as queue:
        assert queue.oldest(9999).documents == make_documents(1000)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"tablerealtimerealtime", b"table\xe2ealtimerealtime"),
        (b"TABLE realtime", b"TABLE realtimX"),
        (b"vw TEXT", b"vX TEXT"),
        (b"create_time TEXT", b"create_tim\xe2 TEXT"),
    ],
)
def test_a_damaged_name_in_the_schema_is_damage(tmp_path: Path, old: bytes, new: bytes) -> None:
    spoiled(tmp_path, lambda path: path.write_bytes(path.read_bytes().replace(old, new)), count=200)
    with contextlib.suppress(StoreError), queue_in(tmp_path) as queue:  # it is met here,
        queue.write(make_documents(1, first=1000))
    with queue_in(tmp_path) as queue:  # and mended here at the latest
        assert len(take(queue, 1000)) in (200, 201)
    set_aside(tmp_path)


@pytest.mark.parametrize("name", [b"accepted_at", b"codes ", b"answer TEXT", b"executions_open"])
def test_a_command_is_rescued_though_the_name_of_a_column_is_damaged(tmp_path: Path, name: bytes) -> None:
    def use() -> tuple[list[int], stockrt.Known | None]:
        with contextlib.closing(Journal(tmp_path)) as journal:
            journal.accept([stockrt.Command("", {}, ["B.US"])])
            return [one.number for one in journal.unanswered()], journal.find("e1")

    with contextlib.closing(Journal(tmp_path)) as journal:
        journal.accept([stockrt.Command("e1", {"meta": {}}, ["A.US"])])
    path = tmp_path / stockrt.JOURNAL_NAME
    path.write_bytes(path.read_bytes().replace(name, b"X" + name[1:]))
    with contextlib.suppress(StoreError):  # it is met here,
        use()
    numbers, known = use()  # and mended here at the latest
    assert numbers[0] == 1 and known == stockrt.Known(1, None)
    with contextlib.closing(Journal(tmp_path)) as journal:
        assert journal.read(1).codes == ["A.US"]


def usable(path: Path, commands: int) -> str:
    """Use a journal as a start does; return what it says where it cannot be used."""
    try:
        with contextlib.closing(Journal(path)) as journal:
            assert len(journal.unanswered()) == commands
            (number,) = journal.accept([Command("", {}, ["A.US"])])
            journal.forget(number)
    except StoreError as error:
        return error.message
    return ""


@pytest.mark.parametrize("flip", [0xFF, pytest.param(0x01, marks=pytest.mark.long)], ids=hex)
def test_no_byte_of_a_header_that_is_damaged_keeps_a_file_from_being_used(tmp_path: Path, flip: int) -> None:
    with contextlib.closing(Journal(tmp_path)) as journal:
        journal.accept([Command(f"e{number}", {}, ["A.US"]) for number in range(3)])
    whole = journal.path.read_bytes()
    for at in range(100):
        folder = tmp_path / str(at)
        folder.mkdir()
        damaged = bytearray(whole)
        damaged[at] ^= flip
        (folder / journal.path.name).write_bytes(damaged)
        said = usable(folder, 3)
        if "newer stockrt" in said:
            assert "make an empty file" in said
            assert f"请新建空文件 {folder / journal.path.name}.damaged，下次" in in_chinese(said)
            (folder / f"{journal.path.name}.damaged").touch()
        elif said:
            assert "the next start" in said, (at, said)
        assert usable(folder, 3) == "", at


@pytest.mark.parametrize("file", [stockrt.JOURNAL_NAME, stockrt.SQLITE_NAME])
@pytest.mark.parametrize("found", [8, 99, 255])
def test_a_file_that_a_newer_stockrt_has_made_is_refused_by_name_and_left_alone(
    tmp_path: Path, file: str, found: int
) -> None:
    opening = Journal if file == stockrt.JOURNAL_NAME else stockrt.open_store_file
    with contextlib.closing(opening(tmp_path)):
        pass
    with contextlib.closing(sqlite3.connect(tmp_path / file)) as db:
        db.executescript(f"CREATE TABLE later (name TEXT); PRAGMA user_version = {found};")
    before = (tmp_path / file).read_bytes()
    with pytest.raises(StoreError, match="newer stockrt") as refused:
        opening(tmp_path)
    assert "damaged" not in str(refused.value)
    assert in_chinese(refused.value.message).startswith(
        f"{tmp_path / file} 由更新版本的 stockrt 写成（格式 {found}，本版本只认到 "
    )
    assert (tmp_path / file).read_bytes() == before and not list(tmp_path.glob("*.damaged*"))


def test_a_lower_format_in_a_damaged_header_makes_no_close_anew(tmp_path: Path) -> None:
    row = "('A.US|2026-01-02', '2026-01-02', 'A', 1, '1', '1', '1', 0, 'A.US', 0, 1, 2, 3, 2, 5, 6, 'x', 'x')"
    columns = (
        "_id, date, s, t, p, v, vw, td, stock_code, after_hours, open, high, low, close, volume, turnover, "
        "create_time, update_time"
    )
    with contextlib.closing(stockrt.open_store_file(tmp_path)) as file, file.write() as db:
        db.execute(f"INSERT INTO close ({columns}) VALUES {row}")
    damage_at(file.path, 63, 4)
    with contextlib.closing(stockrt.open_store_file(tmp_path)) as file:
        assert file.read_all("SELECT open, close FROM close") == [("1", "2")]


def damage_at(path: Path, place: int, value: int) -> None:
    """Write one byte."""
    with path.open("r+b") as file:
        file.seek(place)
        file.write(bytes([value]))


def test_a_file_that_others_have_open_is_not_rescued_under_their_hands(tmp_path: Path) -> None:
    path = spoiled(tmp_path, lambda path: blind(path, "realtime_code_time"), 500)
    with queue_in(tmp_path) as other:
        with pytest.raises(StoreError, match="is damaged"), queue_in(tmp_path) as queue:
            queue.write(make_documents(1, first=5000))
        for _ in range(2):
            with pytest.raises(
                StoreError, match=r"damaged \(.*malformed.*another process has it open.*next start"
            ) as caught:
                open_store_file(tmp_path)
            told = in_chinese(caught.value.message)
            assert told.startswith(f"本地文件 {path} 已损坏（数据库内容错乱），且另一个进程")
        assert len(other.oldest(1000).documents) == 500, "who does not meet the damage works on"
        assert not [*tmp_path.glob("*.damaged-*")]
    with queue_in(tmp_path) as queue:
        assert len(queue.oldest(1000).documents) == 500
    assert not beside(path, ".damaged").exists()


HOLDS = """
import pathlib, sys
import stockrt
with stockrt.open_store_file(pathlib.Path(sys.argv[1])):
    print("open", flush=True)
    sys.stdin.read()
"""


def test_two_processes_at_a_damaged_file(tmp_path: Path) -> None:
    """One has it open and is killed: its lock goes with it, and the other one's next try rescues."""
    spoiled(tmp_path, lambda path: None, 500)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"open\n"
        overwrite(tmp_path / stockrt.SQLITE_NAME, 0, 4096)
        with pytest.raises(StoreError, match="another process has it open"):
            open_store_file(tmp_path)
        holder.kill()
    with queue_in(tmp_path) as queue:
        assert queue.oldest(1000).documents == make_documents(500)


def test_who_opens_waits_for_a_rescue_and_gives_signs_of_life(tmp_path: Path) -> None:
    spoiled(tmp_path, lambda path: None, 100)
    heard, opened = Heard(), threading.Event()

    def open_it() -> None:
        with open_store_file(tmp_path, heard):
            opened.set()

    with (tmp_path / "stockrt.db.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = threading.Thread(target=open_it)
        waiting.start()
        assert until(lambda: heard.signs > 2)
        assert not opened.is_set()
    waiting.join(PATIENCE)
    assert opened.is_set()


@pytest.mark.parametrize("replaced", [False, True])
def test_what_goes_into_a_file_that_was_taken_away_does_not_count(tmp_path: Path, replaced: bool) -> None:
    heard = Heard()
    with queue_in(tmp_path, heard) as queue:
        queue.write(make_documents(3))
        for path in tmp_path.glob("stockrt.db*"):
            path.unlink()
        if replaced:
            open_store_file(tmp_path).close()
        with pytest.raises(StoreError, match="taken away"):
            queue.write(make_documents(2))
        with pytest.raises(StoreError, match="taken away"):
            queue.has_trades()
    assert len(heard.damages) == 1
    with queue_in(tmp_path) as queue:
        assert queue.write(make_documents(2)).stored == 2
    assert not [*tmp_path.glob("*.damaged*")], "the one that is there is sound"


@pytest.mark.parametrize("end", ["-wal", "-shm"])
def test_what_goes_into_a_log_that_was_taken_away_does_not_count_and_is_not_lost(
    tmp_path: Path, end: str
) -> None:
    """Whoever opens the file next makes another log, and two programs that do not see each other write."""
    heard = Heard()
    with queue_in(tmp_path, heard) as queue:
        queue.write(make_documents(3))
        tmp_path.joinpath(f"stockrt.db{end}").unlink()
        with pytest.raises(StoreError, match=f"{end} was taken away") as caught:
            queue.write(make_documents(5))
        assert in_chinese(caught.value.message) == f"本地文件 {tmp_path}/stockrt.db{end} 在使用中被移走"
        with queue_in(tmp_path) as another:  # before the first has ended
            assert another.write(make_documents(7)).duplicates == 5
    assert len(heard.damages) == 1
    assert not [*tmp_path.glob("*.damaged*")]


def test_a_log_that_is_cut_in_use_is_damage(tmp_path: Path) -> None:
    """Or each use would fail for ever, where the next start finds a file that is sound."""
    heard = Heard()
    with open_store_file(tmp_path, heard) as file:
        SqliteStore(file).write(make_documents(3))
        file.read_all("PRAGMA shrink_memory")
        os.truncate(tmp_path / "stockrt.db-wal", 0)
        with pytest.raises(StoreError, match=r"stockrt\.db is damaged"):
            file.read_all("SELECT * FROM realtime")
    assert len(heard.damages) == 1
    with queue_in(tmp_path) as queue:
        queue.write(make_documents(2))


def test_what_is_counted_while_others_write_is_right(tmp_path: Path) -> None:
    with open_store_file(tmp_path) as file:
        queue = DeliveryQueue(file, 1 << 30)
        read = file.read_one
        writer = threading.Thread(target=queue.write, args=(make_documents(100),))

        def read_while_others_write(query: str, *values: object) -> object:
            found = read(query, *values)
            if not writer.ident:
                writer.start()
                writer.join(0.2)
            return found

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(file, "read_one", read_while_others_write)
            queue.has_trades()
        writer.join()
        assert queue.stats().trades == 100


# ------------------------------------------------------------------------------------------------------
# The program
# ------------------------------------------------------------------------------------------------------


@pytest.fixture
def platform() -> Iterator[PlatformServer]:
    """A platform that knows the daemon."""
    with PlatformServer(ping_every=0) as server:
        server.know(HASH)
        yield server


def test_a_daemon_that_meets_damage_ends_and_its_next_start_rescues(
    tmp_path: Path, platform: PlatformServer, infoway: InfowayServer, pyz: Path, clean_env: dict[str, str]
) -> None:
    """The command that met it is not answered by the one that ends, but by the next."""
    state = tmp_path / "state"
    spoiled(state, lambda path: blind(path, "sqlite_autoindex_realtime_1"), 500)
    stockrt.write_hash(state, HASH)
    daemon = ProcessDaemon(clean_env, environment(platform.port, infoway.url, state), pyz)
    with daemon:
        assert platform.wait_for(lambda s: s.connected, PATIENCE)
        platform.execute(["AAPL.US"], execution_id="e1")
        assert daemon.wait() == 1
        assert re.search(
            r"^stockrt: the local file \S+stockrt\.db is damaged: .*next start", daemon.log, re.M
        )
        assert "Traceback" not in daemon.log
        assert not platform.results_for("e1")
        daemon.start()
        assert platform.wait_for(lambda s: s.results_for("e1"), PATIENCE)
    (answer,) = platform.results_for("e1")
    assert answer.status == "success"
    set_aside(state)
    with queue_in(state) as queue:
        assert {d["s"] for d in queue.oldest(9999).documents} == {d["s"] for d in make_documents(500)} | {
            "AAPL.US"
        }


def test_a_daemon_whose_journal_is_damaged_ends_and_its_next_start_rescues(
    tmp_path: Path, platform: PlatformServer, infoway: InfowayServer, pyz: Path, clean_env: dict[str, str]
) -> None:
    """A command that the journal cannot take is refused before the daemon ends."""
    state = tmp_path / "state"
    stockrt.write_hash(state, HASH)
    with contextlib.closing(Journal(state)) as journal:
        numbers = journal.accept([stockrt.Command(f"old{n}", {}, ["A.US"]) for n in range(200)])
        for number in numbers:
            journal.answer(number, "{}")
        journal.received(numbers)
    blind(state / stockrt.JOURNAL_NAME, "sqlite_autoindex_executions_1")
    daemon = ProcessDaemon(clean_env, environment(platform.port, infoway.url, state), pyz)
    with daemon:
        assert platform.wait_for(lambda s: s.connected, PATIENCE)
        platform.execute(["AAPL.US"], execution_id="e1")
        assert daemon.wait() == 1
        assert re.search(r"^stockrt: the local file \S+executions\.db is damaged", daemon.log, re.M)
        (refusal,) = platform.results_for("e1")
        assert refusal.status == "failure" and "executions.db is damaged" in refusal.data["message"]
        dials = len(platform.dials)  # the platform may not have noticed the end of the first connection
        daemon.start()
        assert platform.wait_for(lambda s: s.connected and len(s.dials) > dials, PATIENCE)
        platform.execute(["AAPL.US"], execution_id="e2")
        assert platform.wait_for(lambda s: s.results_for("e2"), PATIENCE)
    set_aside(state)
    with contextlib.closing(Journal(state)) as journal:
        found = journal.find("old17")
        assert found is not None and found.number == numbers[17] and found.answer


def test_a_command_that_meets_damage_says_it_and_the_next_one_rescues(
    tmp_path: Path, infoway: InfowayServer, start_pyz: RunPyz
) -> None:
    state = tmp_path / "state"
    spoiled(state, lambda path: blind(path, "realtime_code_time"), 500)
    env = {"INFOWAY_API_KEY": "test-key", "INFOWAY_API_BASE_URL": infoway.url}
    done = start_pyz("--once", "--codes", "AAPL.US", env=env)
    assert done.returncode == 1 and "stockrt.db is damaged" in done.stderr
    assert "Traceback" not in done.stderr
    done = start_pyz("--once", "--codes", "AAPL.US", env=env)
    assert done.returncode == 0, done.stderr
    assert set_aside(state).name in done.stderr


BY_HAND = (
    ("--once", "--codes", "AAPL.US"),
    ("--check",),
    ("--retain",),
    ("--show", "AAPL.US"),
    ("--status",),
)


@pytest.mark.parametrize("typed", BY_HAND, ids=" ".join)
def test_a_command_says_in_the_readers_language_what_it_set_aside(
    tmp_path: Path, infoway: InfowayServer, start_pyz: RunPyz, typed: tuple[str, ...]
) -> None:
    state = tmp_path / "state"
    path = spoiled(state, lambda path: path.write_bytes(b"no database at all" * 1000), 500)
    env = {"INFOWAY_API_KEY": "test-key", "INFOWAY_API_BASE_URL": infoway.url, "STOCKRT_LANG": "zh"}
    done = start_pyz(*typed, env=env | {"STATE_DIRECTORY": str(state)})
    (said,) = [line for line in done.stderr.splitlines() if set_aside(state).name in line]
    words = (
        f"stockrt：无法使用本地文件 {path}：不是数据库文件；已移开保留为 {set_aside(state).name}，并抢救出 "
    )
    assert said.startswith(words), done.stderr


def test_a_daemons_log_says_what_it_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = spoiled(tmp_path, lambda path: path.write_bytes(b"no database at all" * 1000), 5)
    with open_store_file(tmp_path):
        pass
    words = f"the local file {path} cannot be used: file is not a database; it is set aside as "
    assert f"{words}{set_aside(tmp_path).name}, " in caplog.text and " rows of it are rescued" in caplog.text


def test_a_daemon_takes_the_directory_before_it_opens_any_file(tmp_path: Path) -> None:
    """A second one beside it must not touch a file, however damaged."""
    state = tmp_path / "state"
    with contextlib.closing(Journal(state)):
        pass
    broken = b"no database at all" * 1000
    with stockrt.lock_state_directory(state):
        (state / stockrt.JOURNAL_NAME).write_bytes(broken)
        with pytest.raises(StoreError, match="another stockrt daemon works"):
            stockrt.Daemon(settings_for(1, "http://127.0.0.1:1", state))
    assert (state / stockrt.JOURNAL_NAME).read_bytes() == broken


# ------------------------------------------------------------------------------------------------------
# What the system does not allow
# ------------------------------------------------------------------------------------------------------


@pytest.fixture
def foreign() -> Iterator[Path]:
    """A state directory that another user may enter and write, for tests that go on as that user."""
    with tempfile.TemporaryDirectory(prefix="stockrt-test-") as folder:
        Path(folder).chmod(0o755)
        state = Path(folder, "state")
        state.mkdir()
        state.chmod(0o777)
        yield state


def test_a_lock_of_another_user_is_said(foreign: Path) -> None:
    for name in ("lock", "stockrt.db.lock"):
        (foreign / name).touch(mode=0o600)
        (foreign / name).chmod(0o600)
    with unprivileged():
        for use in (stockrt.lock_state_directory, stockrt.daemon_runs, open_store_file):
            with pytest.raises(
                StoreError, match=r"the lock \S+lock cannot be .*Permission denied.*STATE_DIRECTORY"
            ) as caught:
                use(foreign)
            told = in_chinese(caught.value.message)
            assert re.fullmatch(r"无法\S+锁文件 \S+lock：权限不足；请检查 STATE_DIRECTORY", told)


def test_a_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", fail)
    (tmp_path / "lock").touch()
    for use in (stockrt.lock_state_directory, stockrt.daemon_runs, open_store_file):
        with pytest.raises(StoreError, match=r"cannot be .*No locks available.*STATE_DIRECTORY"):
            use(tmp_path)


def test_a_directory_that_cannot_be_read_is_no_trouble_of_printing(tmp_path: Path, start_pyz: RunPyz) -> None:
    state = tmp_path / "state"
    (state / "lock").mkdir(parents=True)
    for command in (["--status"], []):
        env = {"INFOWAY_API_KEY": "k" * 20, "SERVER_IP": "127.0.0.1", "SERVER_PORT": "1"}
        done = start_pyz(*command, env=env)
        assert done.returncode == 1 and "print" not in done.stderr, done.stderr
        assert re.search(r"stockrt: the lock \S+/lock cannot be .*Is a directory", done.stderr)


@pytest.mark.parametrize("command", ["--status", "--check"])
def test_what_cannot_be_printed_is_said_unless_its_reader_went_away(
    command: str, pyz: Path, clean_env: dict[str, str]
) -> None:
    def run(stdout: int) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, str(pyz), command],
            env=clean_env,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
        )
        return done.returncode, done.stderr

    with open("/dev/full", "wb") as full:
        assert run(full.fileno()) == (1, "stockrt: cannot print: No space left on device\n")
    reader, writer = os.pipe()
    os.close(reader)
    assert run(writer) == (1, "")
    os.close(writer)


@pytest.mark.parametrize("durable", [False, True])
def test_a_write_that_fails_leaves_nothing_behind(
    tmp_path: Path, durable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "status.json"
    stockrt.write_whole(path, "old")
    (tmp_path / "directory").mkdir()
    with pytest.raises(StoreError, match=r"directory cannot be written: Is a directory.*METRICS_FILE"):
        stockrt.write_whole(tmp_path / "directory", "x", durable=durable, setting="METRICS_FILE")
    monkeypatch.setattr(stockrt, "keep_owner", fail)
    with pytest.raises(StoreError, match=r"status\.json cannot be written: No space left.*STATE_DIRECTORY"):
        stockrt.write_whole(path, "new", durable=durable)
    assert path.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["directory", "status.json"]


@pytest.mark.parametrize("name", ["a.csv", "*.csv", "**.csv", "[a].csv"])
def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path: Path, name: str) -> None:
    """That of one who may still write, that of another file, and what others named alike, stay."""
    code = (
        "import os, pathlib, stockrt\n"
        f"with stockrt.whole_file(pathlib.Path('{name}')) as stream: os.kill(os.getpid(), 9)"
    )
    for _ in range(2):
        env = {"PYTHONPATH": str(Path(stockrt.__file__).parent)}
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=False)
    old, young = tmp_path.iterdir()
    others = [tmp_path / ".b.csv.0123456789abcdef.new", tmp_path / f".{name}.settings.new"]
    for path in (old, *others):
        path.touch()
        os.utime(path, (0, time.time() - stockrt.LEFTOVER_S - 1))
    stockrt.write_whole(tmp_path / name, "x")
    assert {*tmp_path.iterdir()} == {young, *others, tmp_path / name}


def test_a_file_has_the_mode_that_was_asked_for(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        stockrt.write_whole(tmp_path / "open", "x", mode=0o644)
        stockrt.write_whole(tmp_path / "ours", "x")
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("open", "ours")] == [0o644, 0o600]


def test_what_root_makes_belongs_to_the_owner_of_the_directory(foreign: Path) -> None:
    if os.geteuid() != 0:
        unavailable("only root gives files away")
    os.chown(foreign, 65534, 65534)
    stockrt.write_whole(foreign / "hash", "x")
    (foreign / "stockrt.db.lock").touch()  # as an older program may have left it
    stockrt.lock_state_directory(foreign).close()
    with open_store_file(foreign):
        owners = {path.name: path.stat().st_uid for path in foreign.iterdir()}
    ours = ("hash", "lock", "stockrt.db", "stockrt.db.lock", "stockrt.db-shm", "stockrt.db-wal")
    assert owners == dict.fromkeys(ours, 65534)


FORMAT_3_CLOSE = """
CREATE TABLE close (
    _id TEXT PRIMARY KEY, date TEXT NOT NULL, s TEXT NOT NULL, t INTEGER NOT NULL,
    p TEXT NOT NULL, v TEXT NOT NULL, vw TEXT NOT NULL, td INTEGER NOT NULL, stock_code TEXT NOT NULL,
    after_hours INTEGER, half_day INTEGER, half_day_unknown INTEGER,
    create_time TEXT NOT NULL, update_time TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE calendar (
    market TEXT PRIMARY KEY, asked_on TEXT NOT NULL, first TEXT NOT NULL, last TEXT NOT NULL, half_days TEXT NOT NULL
) WITHOUT ROWID;
INSERT INTO calendar VALUES ('US', '2026-08-14', '2026-07-14', '2026-09-14', '[]');
PRAGMA user_version = 3;
"""


def test_closes_of_an_older_format_are_kept_and_wait_for_their_bars(tmp_path: Path) -> None:
    """But for those of `common`, which have none; what decided half days is gone."""
    with contextlib.closing(sqlite3.connect(tmp_path / stockrt.SQLITE_NAME)) as db, db:
        db.executescript(FORMAT_3_CLOSE)
        for code, after_hours, unknown in (
            ("TSLA.US", None, 1),
            ("BTCUSDT", 1, None),
            ("USDCNY", None, None),
        ):
            row = (f"{code}|2026-08-14", "2026-08-14", code, 1, "9.5", "1", "1", 0, code)
            values = (
                *row,
                after_hours,
                None,
                unknown,
                "2026-08-14T20:00:00.000Z",
                "2026-08-14T21:00:00.000Z",
            )
            db.execute(f"INSERT INTO close VALUES ({', '.join('?' * len(values))})", values)
    with open_store_file(tmp_path) as file:
        query = "SELECT stock_code, p, after_hours, provisional, close, create_time FROM close ORDER BY stock_code"
        assert file.read_all(query) == [
            ("BTCUSDT", "9.5", 1, 1, None, "2026-08-14T20:00:00.000Z"),
            ("TSLA.US", "9.5", None, 1, None, "2026-08-14T20:00:00.000Z"),
            ("USDCNY", "9.5", None, None, None, "2026-08-14T20:00:00.000Z"),
        ]
        assert file.read_one(
            "SELECT count(*) FROM sqlite_master WHERE name IN ('calendar', 'new_close')"
        ) == (0,)
        store = SqliteStore(file)
        bar = stockrt.Bar("TSLA.US", 0, "1", "2", "1", "2", "10", "20")
        market = stockrt.MARKETS["US"]
        session = stockrt.session_on(market, datetime(2026, 8, 14).date())
        store.write_closes([stockrt.bar_close(bar, session)])
        assert store.finals(["TSLA.US|2026-08-14", "BTCUSDT|2026-08-14"]) == {"TSLA.US|2026-08-14"}


def test_closes_of_an_older_format_are_rescued(tmp_path: Path) -> None:
    """Whatever columns they had."""
    path = tmp_path / stockrt.SQLITE_NAME
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.executescript(FORMAT_3_CLOSE)
        row = (
            "TSLA.US|2026-08-14",
            "2026-08-14",
            "TSLA.US",
            1,
            "9.5",
            "1",
            "1",
            0,
            "TSLA.US",
            None,
            1,
            None,
            "a",
            "b",
        )
        db.execute(f"INSERT INTO close VALUES ({', '.join('?' * len(row))})", row)
    beside(path, ".damaged").write_text("a test says so")
    with open_store_file(tmp_path) as file:
        assert file.read_all("SELECT stock_code, p FROM close") == [("TSLA.US", "9.5")]


@pytest.mark.parametrize("patient", [False, True])
def test_a_file_that_another_program_locks_is_said_in_words_of_ours(
    tmp_path: Path, patient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the opening, and by a use; nothing is wrong with the state directory."""
    monkeypatch.setattr(stockrt, "SQLITE_BUSY_S", 0.1)
    with open_store_file(tmp_path) as file:
        path = file.path
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreError) as locked, open_store_file(tmp_path, patient=patient) as file:
            file.read_one("SELECT 1")
    assert locked.value.message == f"the local file {path} is locked by another program; try again later"
    assert in_chinese(locked.value.message) == f"本地文件 {path} 正被其他程序锁定；请稍后再试"


@pytest.mark.parametrize(
    ("number", "setting"), [(errno.EMFILE, "LimitNOFILE"), (errno.EACCES, "STATE_DIRECTORY")]
)
def test_a_file_that_cannot_be_opened_names_what_has_to_change(number: int, setting: str) -> None:
    with pytest.raises(StoreError, match=setting), stockrt.disk_trouble("the lock a cannot be opened"):
        raise OSError(number, os.strerror(number))


def test_a_file_of_format_6_keeps_its_final_closes_and_gains_the_gaps(tmp_path: Path) -> None:
    """What turns closes of older formats into those of today's would drop the bars of these."""
    market = stockrt.MARKETS["US"]
    session = stockrt.session_on(market, datetime(2026, 8, 14).date())
    bar = stockrt.Bar("TSLA.US", 0, "1", "2", "1", "2", "10", "20")
    with open_store_file(tmp_path) as file:
        SqliteStore(file).write_closes([stockrt.bar_close(bar, session)])
        before = file.read_all("SELECT * FROM close")
        with file.write() as db:
            db.execute("DROP TABLE stream_gaps")
            db.execute("PRAGMA user_version = 6")
    with open_store_file(tmp_path) as file:
        assert file.read_all("SELECT * FROM close") == before
        assert file.read_one('SELECT count("from") FROM stream_gaps') == (0,)
        assert file.read_one("PRAGMA user_version") == (stockrt.SQLITE_VERSION,)


def test_gaps_are_rescued(tmp_path: Path) -> None:
    """Two of their columns are named by words of SQL."""
    row = ("i|crypto|5", "i", "crypto", '["BTCUSDT"]', 5, None, "the connection was lost", "2026-08-14", 1)
    with open_store_file(tmp_path) as file, file.write() as db:
        db.execute("INSERT INTO stream_gaps VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
    beside(tmp_path / stockrt.SQLITE_NAME, ".damaged").write_text("a test says so")
    with open_store_file(tmp_path) as file:
        assert file.read_all("SELECT * FROM stream_gaps") == [row]
