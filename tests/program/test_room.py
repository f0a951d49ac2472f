"""The disk below the local files: some of it stays free, and what is not needed any more is given back."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import RunPyz, small_disk
from kit.infoway_server import InfowayServer
from kit.mongo import MongoServer
from kit.trades import make_documents

import stockrt

AWAY = "mongodb://127.0.0.1:1/?serverSelectionTimeoutMS=200&timeoutMS=500"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MB."""
    with small_disk(tmp_path, "8M") as place:
        yield place


def fill(disk: Path) -> None:
    """Let not a byte be free."""
    with contextlib.suppress(OSError), (disk / "others").open("wb", buffering=0) as stream:
        while stream.write(bytes(4096)):
            pass


def queue_up(state: Path, documents: list[stockrt.Document]) -> None:
    with stockrt.open_store_file(state) as file:
        queue = stockrt.DeliveryQueue(file, 1 << 40)
        for first in range(0, len(documents), 1000):
            queue.write(documents[first : first + 1000])


def test_the_embedded_store_of_the_built_file_keeps_some_of_the_disk_free(
    run_pyz: RunPyz, disk: Path
) -> None:
    """A run fails by name once the disk would have less than 5 %; what is stored can be looked at."""
    codes = disk.with_name("codes.txt")
    env = {"STATE_DIRECTORY": str(disk / "state")}
    for turn in range(30):
        codes.write_text("".join(f"A{turn}N{n}.US\n" for n in range(3000)))
        done = run_pyz("--once", "--demo", "--codes-file", codes, env=env)
        if done.returncode:
            break
    assert done.returncode == 1 and "with what is to be written; see STATE_DIRECTORY" in done.stderr, (
        done.stderr[-500:]
    )
    found = os.statvfs(disk)
    assert found.f_bavail >= found.f_blocks * 0.05


def test_a_full_disk_lets_the_built_file_tell_its_status_and_drain_to_mongodb(
    run_pyz: RunPyz, disk: Path, mongo_server: MongoServer, mongo_db: tuple[str, str]
) -> None:
    """What is in MongoDB then can be taken out here once there is a little room; nothing is there twice."""
    uri, name = mongo_db
    state = disk / "state"
    queue_up(state, make_documents(500))
    fill(disk)
    assert os.statvfs(disk).f_bavail == 0
    env = {
        "STATE_DIRECTORY": str(state),
        "INFOWAY_API_KEY": "k",
        "MONGODB_HOST": uri,
        "MONGODB_DB_NAME": name,
    }
    told = run_pyz("--status", env=env)
    assert "500 trades wait for MongoDB" in told.stdout, told.stdout + told.stderr
    full = run_pyz("--drain", env=env)
    assert (
        full.returncode == 1
        and "the disk is full (database or disk is full): free a few MB; see STATE_DIRECTORY" in full.stderr
    ), full.stderr
    stored = mongo_server.client()[name]["realtime"]
    assert stored.count_documents({}) == 500
    (disk / "others").unlink()
    done = run_pyz("--drain", env=env)
    assert done.returncode == 0 and "; 0 left on this machine" in done.stderr, done.stderr
    assert stored.count_documents({}) == 500


def test_drain_of_the_built_file_gives_the_disk_its_room_back(
    run_pyz: RunPyz, mongo_db: tuple[str, str], tmp_path: Path
) -> None:
    uri, name = mongo_db
    state = tmp_path / "state"
    queue_up(state, [d | {"vw": "1" * 2000} for d in make_documents(10_000)])
    path = state / stockrt.SQLITE_NAME
    size = path.stat().st_size
    assert size > stockrt.SHRINK_ABOVE
    done = run_pyz(
        "--drain", env={"STATE_DIRECTORY": str(state), "MONGODB_HOST": uri, "MONGODB_DB_NAME": name}
    )
    assert done.returncode == 0, done.stderr
    assert path.stat().st_size < size / 10


def test_rejects_and_damaged_files_are_counted_and_discarded_by_the_built_file(
    run_pyz: RunPyz, infoway: InfowayServer, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    documents = make_documents(3)
    with stockrt.open_store_file(state) as file:
        stockrt.Rejects(file).add(documents, {d["_id"]: "too large" for d in documents}, "realtime")
    (state / stockrt.JOURNAL_NAME).write_bytes(b"no database at all" * 1000)
    env = {"STATE_DIRECTORY": str(state), "INFOWAY_API_KEY": "k", "INFOWAY_PLAN": "0", "MONGODB_HOST": AWAY}
    for _ in range(2):  # the first one sets the damaged file aside
        told = run_pyz("--status", env=env).stdout
    assert "3 refused by it: see --rejects" in told and "damaged files" in told
    assert "\nbesides         1 damaged file set aside. To do: " in told
    listed = run_pyz("--rejects", env=env)
    assert listed.stdout.count("too large") == 3 and "executions.db.damaged-" in listed.stderr
    chinese = run_pyz("--status", env=env | {"STOCKRT_LANG": "zh"}).stdout
    assert "损坏文件        1 个，详见 --rejects\n" in chinese
    assert "\n此外            1 个损坏的文件已移开保留。处理办法：" in chinese
    listed = run_pyz("--rejects", env=env | {"STOCKRT_LANG": "zh"})
    assert listed.stdout.count("too large") == 3
    assert re.match(
        r"文件损坏，内容已抢救，原文件移开保留：/\S+/executions.db.damaged-\S+，0.0 MB$", listed.stderr
    )
    done = run_pyz("--rejects", "--discard", env=env)
    assert (done.returncode, done.stderr) == (0, "discarded 3 documents and 1 damaged file of 0.0 MB\n")
    assert not list(state.glob("*damaged*"))
    told = run_pyz("--status", env=env).stdout
    assert "see --rejects" not in told
    assert run_pyz("--discard").returncode == 64
