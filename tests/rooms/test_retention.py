"""KEEP_DAYS: what is too old goes, in MongoDB and in the embedded store, and nothing else does."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pymongo
import pytest
from conftest import RunPyz, small_disk
from kit.chinese import in_chinese
from kit.clock import FakeClock
from kit.daemons import ThreadDaemon, settings_for, until
from kit.infoway_server import InfowayServer
from kit.mongo import GuardedServer, right
from kit.platform_server import PlatformServer
from kit.trades import CREATED, by_id, make_documents, settings_of

import stockrt
from stockrt import Document, Pipeline, Stage, StoreError

NOW = CREATED + timedelta(days=100)
OLD = CREATED + timedelta(days=60)
NEW = NOW - timedelta(hours=1)
INDEX = stockrt.TTL_INDEX
DAY_S = 24 * 3600
AWAY = "mongodb://127.0.0.1:1/?serverSelectionTimeoutMS=100&timeoutMS=200"


def at(created: datetime, count: int, first: int = 0, traded: datetime | None = None) -> list[Document]:
    """Return documents of this `create_time`, traded then or at another time."""
    t = round((traded or created).timestamp() * 1000)
    documents = [document | {"t": t} for document in make_documents(count, first, created)]
    return [d | {"_id": f"{d['s']}|{t}|{d['p']}|{d['v']}|{d['td']}"} for d in documents]


# ------------------------------------------------------------------------------------------ the embedded store


@contextlib.contextmanager
def embedded(state: Path, clock: stockrt.Clock | None = None, **environ: str) -> Iterator[Pipeline]:
    """Yield a pipeline without MongoDB, at the time NOW."""
    settings = settings_of({"STATE_DIRECTORY": str(state), "KEEP_DAYS": "30"} | environ)
    with Pipeline(settings, clock=clock or FakeClock(NOW.timestamp())) as pipeline:
        yield pipeline


def put(pipeline: Pipeline, *parts: list[Document]) -> None:
    """Store documents in this order."""
    for part in parts:
        for first in range(0, len(part), 1000):
            pipeline.store.write(part[first : first + 1000])


def left(pipeline: Pipeline) -> list[str]:
    """Return what is in the file, in order of arrival."""
    with stockrt.open_store_file(pipeline._settings.state_directory) as file:
        return [name for (name,) in file.read_all("SELECT _id FROM realtime ORDER BY seq")]


def names(documents: list[Document]) -> list[str]:
    """Return the `_id` of each."""
    return [document["_id"] for document in documents]


def retain(pipeline: Pipeline) -> int:
    """Let a round end, and return in how many steps."""
    steps = 1
    while pipeline.retain() <= stockrt.EXPIRED_PAUSE_S:
        steps += 1
        assert steps < 100
        pipeline._clock.advance(stockrt.EXPIRED_PAUSE_S)  # type: ignore[attr-defined]
    return steps


def test_what_is_too_old_goes_in_small_steps_and_the_rest_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    old, new = at(OLD, 1200), at(NEW, 300, first=5000)
    with embedded(tmp_path) as pipeline:
        put(pipeline, old, new)
        pipeline.retain()
        assert len(left(pipeline)) == 1500 - stockrt.EXPIRED_AT_ONCE  # others may write in between
        pipeline._clock.advance(1)  # type: ignore[attr-defined]
        retain(pipeline)
        assert left(pipeline) == names(new)
        assert "1200 trades older than KEEP_DAYS=30 deleted" in caplog.text
        assert pipeline.retain() > 3000  # nothing is looked at before
    with embedded(tmp_path) as pipeline:
        assert retain(pipeline) == 1
        assert left(pipeline) == names(new)


def test_gaps_go_with_the_trades_of_their_time(tmp_path: Path) -> None:
    """One that goes on stays, as do those of trades that do."""
    ends = {"old": OLD, "open": None, "new": NEW}
    for days, stay in [("", {"old", "open", "new"}), ("30", {"open", "new"})]:
        state = tmp_path / f"keeps{days}"
        with embedded(state, KEEP_DAYS=days) as pipeline:
            put(pipeline, at(OLD, 2), at(NEW, 2, first=5000))
            for why, end in ends.items():
                until = round(end.timestamp() * 1000) if end else None
                pipeline.gaps.note(stockrt.Gap("crypto", ("BTCUSDT",), stockrt.EARLIEST_TRADE_MS, until, why))
            retain(pipeline)
            assert {gap.why for gap in pipeline.gaps.some("TRUE")} == stay


def test_without_the_setting_everything_stays_for_ever(tmp_path: Path) -> None:
    with embedded(tmp_path, KEEP_DAYS="") as pipeline:
        put(pipeline, at(OLD, 3))
        assert pipeline.retain() == float("inf")
        assert len(left(pipeline)) == 3
        assert f"trades kept for ever, the oldest of {stockrt.iso(OLD)}" in pipeline.check_store()


def test_what_a_kill_interrupts_goes_on_with_the_next_start(tmp_path: Path) -> None:
    new = at(NEW, 3, first=5000)
    with embedded(tmp_path) as pipeline:
        put(pipeline, at(OLD, 1200), new)
    for gone in (500, 1000):
        with embedded(tmp_path) as pipeline:
            pipeline.retain()
            assert len(left(pipeline)) == 1203 - gone
    with embedded(tmp_path) as pipeline:
        retain(pipeline)
        assert left(pipeline) == names(new)


def test_closes_are_kept_and_trades_until_theirs_are_made(tmp_path: Path) -> None:
    """A session that is over and was not looked back at needs its trades, however old they are."""
    old = at(OLD, 3)
    with embedded(tmp_path) as pipeline:
        put(pipeline, old, at(NEW, 1, first=9))
        with stockrt.open_store_file(tmp_path) as file:
            sessions = stockrt.SessionsFile(file)
            due = int(OLD.timestamp()) + 9
            session = stockrt.OpenSession(old[0]["stock_code"], f"{OLD:%Y-%m-%d}", Stage.LOOK_BACK, due)
            sessions.note([session])
            closes = [stockrt.Close(document, "2026-08-15") for document in old]
            stockrt.SqliteStore(file).write_closes(closes)
            assert 0 < pipeline.retain() < 3600
            assert len(left(pipeline)) == 4
            assert pipeline.apply_retention() == "closes are still to be made of older trades"
            with embedded(tmp_path, KEEP_DAYS="") as without:
                assert without.apply_retention() == ""
            sessions.change([session._replace(stage=Stage.BATCH)])
            pipeline._clock.advance(stockrt.KEEP_AGAIN_S)  # type: ignore[attr-defined]
            retain(pipeline)
            assert len(left(pipeline)) == 1
            assert file.read_one("SELECT count(*) FROM close") == (3,)


def test_space_is_given_back(tmp_path: Path) -> None:
    path = tmp_path / stockrt.SQLITE_NAME
    with embedded(tmp_path) as pipeline:
        put(pipeline, [d | {"vw": "1" * 20_000} for d in at(OLD, 1200)], at(NEW, 3, first=5000))
        size = path.stat().st_size
        assert size > stockrt.SHRINK_ABOVE
        retain(pipeline)
        assert path.stat().st_size < size / 10


def test_a_clock_that_is_ahead_deletes_nothing(tmp_path: Path) -> None:
    """Trades tell the time as well: only so long after the newest one is the clock believed."""
    ahead = FakeClock(NOW.timestamp() + 400 * DAY_S)
    with embedded(tmp_path, ahead) as pipeline:
        put(pipeline, at(NOW - timedelta(days=15), 2), at(NEW, 2, first=5))
        retain(pipeline)
        assert len(left(pipeline)) == 4


def test_what_came_while_the_clock_was_ahead_holds_up_nothing(tmp_path: Path) -> None:
    odd = at(NOW + timedelta(days=900), 700, traded=OLD)
    with embedded(tmp_path) as pipeline:
        put(pipeline, odd, at(OLD, 700, first=2000), at(NEW, 2, first=5000))
        retain(pipeline)
        assert left(pipeline) == names(odd) + names(at(NEW, 2, first=5000))


def test_once_and_the_idle_daemon_and_retain_remove_what_is_too_old(
    tmp_path: Path, infoway: InfowayServer, run_pyz: RunPyz
) -> None:
    now = datetime.now(tz=NOW.tzinfo)
    api = {"INFOWAY_API_KEY": "test-key", "INFOWAY_API_BASE_URL": infoway.url, "INFOWAY_PLAN": "0"}

    def filled(name: str) -> dict[str, str]:
        with embedded(tmp_path / name, stockrt.SYSTEM_CLOCK) as pipeline:
            put(pipeline, at(now - timedelta(days=3), 700), at(now, 2, first=5000))
        return {"STATE_DIRECTORY": str(tmp_path / name), "KEEP_DAYS": "2"}

    def count(name: str) -> int:
        with stockrt.open_store_file(tmp_path / name) as file:
            return int(file.read_one("SELECT count(*) FROM realtime")[0])

    done = run_pyz("--once", "--codes", "TSLA.US", env=filled("once") | api)
    assert (done.returncode, count("once")) == (0, 3), done.stderr
    env = filled("retain")
    with embedded(tmp_path / "retain", stockrt.SYSTEM_CLOCK) as pipeline:
        put(pipeline, at(now - timedelta(days=3), 700, first=2000))  # by whom ever, behind newer ones
    done = run_pyz("--retain", env=env)
    assert done.returncode == 0 and "local store: trades kept for 2 days, the oldest of" in done.stderr
    assert count("retain") == 2
    chinese = run_pyz("--retain", env=env | {"STOCKRT_LANG": "zh"}).stderr
    assert chinese.startswith("本地存储：成交保留 2 天") and in_chinese(chinese)
    filled("daemon")
    with PlatformServer() as platform:
        settings = settings_for(platform.port, infoway.url, tmp_path / "daemon", KEEP_DAYS="2")
        with ThreadDaemon(settings):
            assert until(lambda: count("daemon") == 2)


def test_the_embedded_store_keeps_some_of_the_disk_free_in_small_writes_too(tmp_path: Path) -> None:
    """As a stream makes them: refused by name, nothing half written; what goes leaves its room to new ones."""
    with small_disk(tmp_path, "32M") as disk, embedded(disk / "state") as pipeline:
        (disk / "others").write_bytes(bytes(24 << 20))
        stored = 0
        with pytest.raises(StoreError, match=r"with what is to be written; see STATE_DIRECTORY"):
            while True:
                put(pipeline, at(OLD, 20, first=stored))
                stored += 20
        for _ in range(20):
            with pytest.raises(StoreError, match=r"5% \(1.6 MB\) with"):
                put(pipeline, at(NEW, 20, first=90_000))
        assert len(left(pipeline)) == stored
        found = os.statvfs(disk)
        assert found.f_bavail >= found.f_blocks * 0.05
        with stockrt.open_store_file(disk / "state") as file, file.write() as db:
            db.execute("UPDATE realtime SET t = ? WHERE seq = 1", (round(NEW.timestamp() * 1000),))
            db.execute("UPDATE realtime SET seq = ? WHERE seq = 1", (stored + 1,))
        retain(pipeline)
        assert left(pipeline) == []
        for first in range(90_000, 91_000, 20):
            put(pipeline, at(NEW, 20, first))


# ------------------------------------------------------------------------------------------------------ MongoDB


class World:
    """A database, and a state directory."""

    def __init__(self, uri: str, name: str, state: Path) -> None:
        self.environ = {"MONGODB_HOST": uri, "MONGODB_DB_NAME": name, "STATE_DIRECTORY": str(state)}
        self.client = pymongo.MongoClient[Document](uri, tz_aware=True)
        self.realtime = self.client[name]["realtime"]

    @contextlib.contextmanager
    def pipeline(self, days: str) -> Iterator[Pipeline]:
        """Yield a pipeline with this KEEP_DAYS."""
        with Pipeline(settings_of(self.environ | {"KEEP_DAYS": days})) as pipeline:
            yield pipeline

    def run(self, days: str) -> str:
        """Let a run do what KEEP_DAYS asks for, and return what --check says then."""
        with self.pipeline(days) as pipeline:
            assert pipeline.retain() < 3600  # no server is met yet, and none is waited for
            with contextlib.suppress(StoreError):  # of an index of others
                pipeline.kept()
            pipeline._keep_due = 0.0
            pipeline.retain()
            return pipeline.kept()

    def seconds(self) -> int | None:
        """Return after how long our index removes trades."""
        found: int | None = self.realtime.index_information().get(INDEX, {}).get("expireAfterSeconds")
        return found


@pytest.fixture
def world(mongo_db: tuple[str, str], tmp_path: Path) -> Iterator[World]:
    """An empty database."""
    made = World(*mongo_db, tmp_path / "state")
    with made.client:
        yield made


def ago(days: float) -> datetime:
    """Return a time so long ago."""
    return stockrt.utc_now() - timedelta(days=days)


def test_mongodb_removes_what_is_too_old_and_nothing_else(world: World) -> None:
    assert "kept for 2 days" in world.run("2")
    old, new = at(ago(3), 3), at(ago(1), 3, first=10)
    other: list[Document] = [{"_id": "another program's", "create_time": "2001-01-01"}, {"_id": 7}]
    closes = world.realtime.database["close"]
    closes.insert_many(old)
    world.realtime.insert_many([*old, *new, *other])
    assert until(
        lambda: world.realtime.count_documents({}) == 5, timeout=120
    )  # a server of others looks every minute
    assert by_id(list(world.realtime.find())) == by_id([*new, *other])
    assert closes.count_documents({}) == 3


def test_the_index_changes_and_goes_with_the_setting(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert "kept for ever" in world.run("") and world.seconds() is None
    world.run("30")
    assert world.seconds() == 30 * DAY_S
    created = ago(20)
    world.realtime.insert_many(at(created, 3))
    assert f"kept for 30 days, the oldest of {stockrt.iso(created)}" in world.run("30")
    with world.pipeline("36500") as pipeline:
        told = pipeline.check_store()
        assert "kept for 30 days, " in told and "KEEP_DAYS=36500 holds with the next run" in told
        pipeline.retain()
        assert world.seconds() == stockrt.TTL_MOST_S
    world.run("7")
    assert world.seconds() == 7 * DAY_S and "for 7 days now, not for" in caplog.text
    with world.pipeline("") as pipeline:
        told = pipeline.check_store()
        assert told.endswith("KEEP_DAYS is not set any more: with the next run trades are kept for ever")
        assert in_chinese(told).endswith("，已取消 KEEP_DAYS：自下次运行起成交永久保留")
        assert "KEEP_DAYS=" not in told
    world.realtime.create_index("seen", name="theirs")
    assert "kept for ever" in world.run("")
    assert "for ever now, not for 7 days: KEEP_DAYS is not set" in caplog.text
    assert set(world.realtime.index_information()) == {"_id_", "theirs"}


def test_what_was_collected_before_goes_only_when_that_is_asked_for(
    world: World, caplog: pytest.LogCaptureFixture, run_pyz: RunPyz
) -> None:
    """By name and number in the log and by --check; `--retain` then does it."""
    world.realtime.insert_many([*at(ago(40), 5), *at(ago(1), 3, first=10)])
    words = "realtime holds 5 documents older than that, which --retain removes"
    with world.pipeline("30") as pipeline:
        pipeline.check_store()
        for _ in range(2):
            pipeline.retain()
            pipeline._keep_due = 0.0
        assert caplog.text.count(f"KEEP_DAYS=30 has no effect: {words}") == 1
        assert f"KEEP_DAYS=30 has no effect yet: {words}" in pipeline.check_store()
        held = "realtime 中有 5 个文档超过该期限，可用 --retain 删除"
        assert f"成交永久保留，KEEP_DAYS=30 尚未生效：{held}" in in_chinese(pipeline.check_store())
    assert world.seconds() is None and world.realtime.count_documents({}) == 8
    world.client.admin.command("setParameter", 1, ttlMonitorEnabled=False)
    try:
        done = run_pyz("--retain", env=world.environ | {"KEEP_DAYS": "30"})
        with world.pipeline("30") as pipeline:
            assert in_chinese(pipeline.kept()).endswith("，更早的由 MongoDB 每分钟清理一次")
    finally:
        world.client.admin.command("setParameter", 1, ttlMonitorEnabled=True)
    assert done.returncode == 0 and "MongoDB: trades kept for 30 days" in done.stderr, done.stderr
    assert done.stderr.endswith(", MongoDB removes what is older once a minute\n")
    assert world.seconds() == 30 * DAY_S


def test_a_collection_of_newer_trades_gets_the_index_at_once(world: World) -> None:
    world.realtime.insert_many([*at(ago(20), 5), {"_id": 1}, {"_id": 2, "create_time": "1999"}])
    with world.pipeline("30") as pipeline:
        assert "has no effect yet: its index is made with the next run" in pipeline.kept()
    assert "kept for 30 days" in world.run("30")
    assert world.seconds() == 30 * DAY_S
    with world.pipeline("30") as pipeline:
        assert "成交保留 30 天，最早的一笔存于 2" in in_chinese(pipeline.check_store())


def test_an_index_of_others_is_left_alone_and_named(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.realtime.create_index("create_time", name="theirs", expireAfterSeconds=999_999)
    world.realtime.create_index("seen", name="too", expireAfterSeconds=5 * DAY_S)
    before = world.realtime.index_information()
    words = "an index of others, theirs on create_time, removes documents after 11.6 days"
    with pytest.raises(StoreError, match=f"^KEEP_DAYS=30 has no effect yet: {words}: drop that one first$"):
        world.run("30")
    assert caplog.text.count(words) == 1
    told = world.run("")
    assert words in told and "too on seen, removes documents after 5 days" in told
    assert "kept for ever" not in told
    with world.pipeline("30") as pipeline:
        assert "drop that one first" in pipeline.apply_retention()
        removes = "其他程序的索引 theirs（字段 create_time）会在 11.6 天后删除文档"
        assert in_chinese(pipeline.apply_retention()) == f"{removes}；请先删除该索引"
        with pytest.raises(StoreError) as caught:
            pipeline.kept()
        assert in_chinese(caught.value.message) == f"KEEP_DAYS=30 尚未生效：{removes}；请先删除该索引"
    assert world.realtime.index_information() == before


def test_a_plain_index_of_others_is_in_the_way_and_named(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.realtime.create_index("create_time", name="theirs")
    words = (
        "an index of others, theirs on create_time, is where that of KEEP_DAYS would be: drop that one first"
    )
    with pytest.raises(StoreError, match=words):
        world.run("30")
    assert f"KEEP_DAYS=30 has no effect: {words}" in caplog.text
    assert "theirs" not in world.run("")


def test_a_role_that_may_make_no_index_is_said_once_and_trades_are_stored(
    guarded: GuardedServer, guarded_db: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trades = right(guarded_db, "realtime", "find", "insert", "listIndexes")
    uri = guarded.add_user(guarded_db, trades)
    world = World(uri, guarded_db, tmp_path)
    with world.client, world.pipeline("30") as pipeline:
        for first in range(2):
            assert pipeline.store.write(make_documents(1, first)).stored == 1
            pipeline.retain()
            pipeline._keep_due = 0.0
        assert caplog.text.count("KEEP_DAYS=30 has no effect") == 1
        guarded.grant(guarded_db, right(guarded_db, "realtime", "find", "insert"))
        assert "who keeps trades for how long cannot be seen" in pipeline.kept()
        caplog.clear()
        world.run("")
        assert caplog.text == ""


def test_an_index_that_stays_though_the_setting_is_gone_is_said(
    guarded: GuardedServer, guarded_db: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rights = ("find", "insert", "listIndexes", "createIndex")
    world = World(guarded.add_user(guarded_db, right(guarded_db, "realtime", *rights)), guarded_db, tmp_path)
    with world.client:
        world.run("30")
        world.run("")
        assert "that KEEP_DAYS is not set has no effect: MongoDB refused it: " in caplog.text
        assert world.seconds() == 30 * DAY_S and "KEEP_DAYS= " not in caplog.text


def test_a_role_that_may_change_no_index_makes_it_anew(
    guarded: GuardedServer, guarded_db: str, tmp_path: Path
) -> None:
    """As MongoDB's own readWrite."""
    rights = ("find", "insert", "listIndexes", "createIndex", "dropIndex")
    world = World(guarded.add_user(guarded_db, right(guarded_db, "realtime", *rights)), guarded_db, tmp_path)
    with world.client:
        world.run("30")
        world.run("7")
        assert world.seconds() == 7 * DAY_S


def test_what_waits_for_mongodb_is_never_too_old(tmp_path: Path) -> None:
    old = at(ago(400), 3)
    world = World(AWAY, "nowhere", tmp_path)
    with world.client, world.pipeline("30") as pipeline:
        assert pipeline.store.write(old).queued == 3
        assert pipeline.retain() > 60
        assert pipeline.retain() > 60
        with pytest.raises(stockrt.StoreAway):
            pipeline.apply_retention()
        assert left(pipeline) == names(old)
