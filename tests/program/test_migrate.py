"""Moving from the older client by the built file: settings and hash into files, documents in a real MongoDB."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pymongo
import pytest
from bson.objectid import ObjectId
from conftest import NOBODY, RunPyz, controlled
from kit.chinese import in_chinese
from kit.daemons import PATIENCE, until
from kit.mongo import UNAUTHORIZED, MongoServer
from kit.platform_server import PlatformServer
from rooms.test_fetch import MEASURE

import stockrt
from program.test_once import on_terminal
from stockrt import Document

HASH = "-3298472938472"
KEY, PASSWORD = "old-key-1111", "hunter2-secret"
ENV_FILE = f"""\
# the older client's
SERVER_IP=192.0.2.10
SERVER_PORT=8080
INFOWAY_API_KEY={KEY}
MONGODB_HOST="mongodb://u:{PASSWORD}@127.0.0.1:1/"
MONGODB_COLLECTION_NAME=quotes
MODULE_NAME='股票 #1'
DJANGO_TOKEN={PASSWORD}
"""
T = int(datetime(2026, 6, 1, 2, 0, tzinfo=UTC).timestamp() * 1000)
SHANGHAI_AHEAD = timedelta(hours=8)


@dataclass
class Old:
    """An older installation, and where things go from it."""

    directory: Path
    target: Path
    state: Path

    @property
    def env(self) -> Path:
        """Its settings."""
        return self.directory / "config/.env"

    @property
    def hash(self) -> Path:
        """Its hash."""
        return self.directory / "config/module_hash.txt"

    def arguments(self, *more: str) -> tuple[str, ...]:
        """Return the options that take it over."""
        return ("--migrate", str(self.directory), "--env-file", str(self.target), *more)

    def tree(self) -> dict[str, bytes]:
        """Return every file of it."""
        return {str(path): path.read_bytes() for path in self.directory.rglob("*") if path.is_file()}


@pytest.fixture
def old(tmp_path: Path) -> Old:
    """An older installation with all that it may have; nothing is anywhere else."""
    made = Old(tmp_path / "old", tmp_path / "etc/stockrt.env", tmp_path / "state")
    made.env.parent.mkdir(parents=True)
    made.env.write_text(ENV_FILE, encoding="utf-8")
    made.hash.write_text(HASH + "\n")
    made.target.parent.mkdir()
    return made


def lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines of standard output, without what differs by their alignment."""
    return [re.sub(r"\s+", " ", line) for line in done.stdout.splitlines()]


def check_no_secret(*texts: str) -> None:
    """No traceback, and nothing that must not be shown."""
    for text in texts:
        assert "Traceback" not in text, text
        assert not any(secret in text for secret in (KEY, PASSWORD, HASH)), text


# ---------------------------------------------------------------------------------------- settings and the hash


def test_settings_and_hash_go_where_the_service_wants_them(run_pyz: RunPyz, old: Old) -> None:
    before = old.tree()
    done = run_pyz(*old.arguments())
    assert done.returncode == 0, done.stderr
    assert lines(done) == [
        "taken INFOWAY_API_KEY='***'",
        "taken MONGODB_HOST='mongodb://***@127.0.0.1:1/'",
        "taken MONGODB_REALTIME_COLLECTION_NAME='quotes', there MONGODB_COLLECTION_NAME",
        "taken SERVER_IP='192.0.2.10'",
        "taken SERVER_PORT='8080'",
        "taken MODULE_NAME='股票 #1'",
        "left out DJANGO_TOKEN: stockrt has no such setting",
        f"taken module hash -329…472 into {old.state / 'module_hash'}",
    ]
    check_no_secret(done.stdout, done.stderr)
    settings = stockrt.load_settings({}, old.target).settings
    assert (settings.api_keys, settings.realtime_name, settings.module_name) == ((KEY,), "quotes", "股票 #1")
    assert settings.mongodb_uri == f"mongodb://u:{PASSWORD}@127.0.0.1:1/"
    assert "DJANGO_TOKEN" not in old.target.read_text()
    assert (old.state / "module_hash").read_text() == HASH + "\n"
    assert old.tree() == before
    for path, mode in ((old.target, 0o600), (old.state / "module_hash", 0o600), (old.state, 0o700)):
        assert path.stat().st_mode & 0o777 == mode, path
    assert {path.name for path in old.target.parent.iterdir()} == {"stockrt.env"}


def test_workflows_bound_to_the_old_hash_reach_the_service(
    run_pyz: RunPyz, old: Old, pyz: Path, clean_env: dict[str, str]
) -> None:
    """It connects by the hash of the older client, and does not register as a new module."""
    with PlatformServer() as platform:
        query = urllib.parse.urlencode(
            {"name": "x", "input_data": "[]", "output_data": "[]", "modelHash": "old"}
        )
        with urllib.request.urlopen(f"{platform.url}/module/register?{query}") as answer:
            module_hash = json.load(answer)["result"]["hash"]
        old.hash.write_text(module_hash)
        address = f"SERVER_IP=127.0.0.1\nSERVER_PORT={platform.port}\nINFOWAY_API_KEY={KEY}\n"
        old.env.write_text(address)
        assert run_pyz(*old.arguments()).returncode == 0
        registered = len(platform.register_calls)
        daemon = subprocess.Popen(
            [sys.executable, pyz, "--env-file", old.target],
            env=clean_env,
            cwd=old.state,
            stderr=subprocess.PIPE,
        )
        try:
            assert until(lambda: platform.connected == [module_hash])
            assert len(platform.register_calls) == registered
        finally:
            daemon.terminate()
            daemon.communicate(timeout=PATIENCE)


def test_what_is_there_already_is_kept_line_by_line(run_pyz: RunPyz, old: Old) -> None:
    standing = (
        "# mine\nSERVER_PORT=9000\nSERVER_IP=\nINFOWAY_API_KEY=my-own-key"  # the last line without its end
    )
    old.target.write_text(standing)
    old.target.chmod(0o640)
    old.state.mkdir()
    (old.state / "module_hash").write_text("8471209384712\n")
    done = run_pyz(*old.arguments())
    assert done.returncode == 0, done.stderr
    said = lines(done)
    assert "kept INFOWAY_API_KEY: it is set already; the older one differs" in said
    assert "kept SERVER_PORT: it is set already; the older one differs" in said
    assert "taken SERVER_IP='192.0.2.10'" in said  # an empty value counts as not set
    assert said[-1].startswith("kept module hash 8471…712: ") and "the older one, -329…472" in said[-1]
    assert (old.state / "module_hash").read_text() == "8471209384712\n"
    text = old.target.read_text()
    assert text.startswith(standing + "\n")
    settings = stockrt.load_settings({}, old.target).settings
    assert (settings.server_host, settings.server_port) == ("192.0.2.10", 9000)
    assert settings.api_keys == ("my-own-key",)
    assert old.target.stat().st_mode & 0o777 == 0o640
    check_no_secret(done.stdout, done.stderr)
    assert "my-own-key" not in done.stdout + done.stderr


def test_again_it_changes_nothing(run_pyz: RunPyz, old: Old) -> None:
    run_pyz(*old.arguments())
    text = old.target.read_bytes()
    done = run_pyz(*old.arguments())
    assert done.returncode == 0
    assert old.target.read_bytes() == text
    assert {line.split()[0] for line in lines(done)} == {"kept", "left"}
    assert not any("differs" in line for line in lines(done))


def test_a_credential_is_there_already(run_pyz: RunPyz, old: Old, tmp_path: Path) -> None:
    folder = tmp_path / "credentials"
    folder.mkdir()
    (folder / "infoway_api_key").write_text("my-own-key\n")
    done = run_pyz(*old.arguments(), env={"CREDENTIALS_DIRECTORY": str(folder)})
    assert "kept INFOWAY_API_KEY: it is set already; the older one differs" in lines(done)
    assert "INFOWAY_API_KEY" not in old.target.read_text()


def test_dry_run_says_what_would_be_done_and_writes_nothing(
    run_pyz: RunPyz, old: Old, tmp_path: Path
) -> None:
    before = {path for path in tmp_path.rglob("*") if "shiv" not in path.parts}
    dry = run_pyz(*old.arguments("--dry-run"))
    assert dry.returncode == 0
    assert dry.stderr == f"settings: {old.target}; nothing was written: --dry-run\n"
    assert {path for path in tmp_path.rglob("*") if "shiv" not in path.parts} == before
    chinese = run_pyz(*old.arguments("--dry-run"), env={"STOCKRT_LANG": "zh"})
    assert chinese.stderr == f"设置：{old.target}；未写入任何内容：--dry-run\n"
    in_chinese(chinese.stdout)
    assert run_pyz(*old.arguments()).stdout == dry.stdout.replace("would take ", "taken     ") != dry.stdout


def test_an_installation_that_named_no_collection_is_told_where_trades_go_now(
    run_pyz: RunPyz, old: Old
) -> None:
    old.env.write_text("SERVER_PORT=8080\n")
    done = run_pyz(*old.arguments())
    (line,) = (line for line in lines(done) if line.startswith("differs"))
    assert "realtime" in line and "stock_data" in line and "MONGODB_REALTIME_COLLECTION_NAME" in line


def test_an_installation_that_never_registered_gives_its_settings(run_pyz: RunPyz, old: Old) -> None:
    old.hash.unlink()
    done = run_pyz(*old.arguments())
    assert done.returncode == 0
    assert lines(done)[-1].startswith(f"left out module hash: {old.hash} is not there")
    assert old.target.exists() and not old.state.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: files get an owner")
def test_files_belong_to_whoever_owns_their_place(run_pyz: RunPyz, old: Old) -> None:
    """Run by root: the service's state stays the service's, and a group that may read the settings still may."""
    old.state.mkdir()
    os.chown(old.state, NOBODY, NOBODY)
    old.target.write_text("")
    os.chown(old.target, 0, NOBODY)
    assert run_pyz(*old.arguments()).returncode == 0
    for path, owner in ((old.state / "module_hash", (NOBODY, NOBODY)), (old.target, (0, NOBODY))):
        assert (path.stat().st_uid, path.stat().st_gid) == owner


def test_a_link_stays_a_link_and_its_file_is_written(run_pyz: RunPyz, old: Old, tmp_path: Path) -> None:
    real = tmp_path / "managed.env"
    real.write_text("SERVER_PORT=9000\n")
    old.target.symlink_to(real)
    assert run_pyz(*old.arguments()).returncode == 0
    assert old.target.is_symlink()
    assert stockrt.read_env_file(real)["SERVER_IP"] == "192.0.2.10"


def spoil_directory(old: Old) -> None:
    """There is none."""
    old.directory.rename(old.directory.with_name("elsewhere"))


def spoil_env(old: Old) -> None:
    """Another program's directory."""
    old.env.unlink()


def spoil_env_kind(old: Old) -> None:
    """A directory of that name."""
    old.env.unlink()
    old.env.mkdir()


def spoil_env_encoding(old: Old) -> None:
    """GBK, as an editor in China may have written it."""
    old.env.write_bytes("MODULE_NAME=股票\n".encode("gbk"))


def spoil_value(old: Old) -> None:
    """Two values that cannot be."""
    old.env.write_text(f"SERVER_PORT=many\nMONGODB_HOST=http://u:{PASSWORD}@db1/\n")


def spoil_hash(old: Old) -> None:
    """A page in place of a hash."""
    old.hash.write_text("<html>")


def spoil_hash_kind(old: Old) -> None:
    """A directory of that name."""
    old.hash.unlink()
    old.hash.mkdir()


def spoil_target(old: Old) -> None:
    """A settings file that nobody can read."""
    old.target.mkdir()


def spoil_target_folder(old: Old) -> None:
    """Nothing was installed."""
    old.target.parent.rmdir()


def spoil_state(old: Old) -> None:
    """The state directory is a file."""
    old.state.write_text("")


@pytest.mark.parametrize(
    ("spoil", "status", "words"),
    [
        (spoil_directory, 64, r"--migrate \S+: \S+/config/\.env cannot be read: No such file"),
        (spoil_env, 64, r"--migrate \S+: \S+/config/\.env cannot be read: No such file"),
        (spoil_env_kind, 64, r"/config/\.env cannot be read: Is a directory"),
        (spoil_env_encoding, 64, r"/config/\.env cannot be read: it is not UTF-8 text"),
        (
            spoil_value,
            78,
            r"MONGODB_HOST='http://\*\*\*@db1/' .*expected mongodb://(.|\n)*SERVER_PORT='many' .*65535",
        ),
        (spoil_hash, 1, r"config/module_hash\.txt holds no module hash"),
        (spoil_hash_kind, 1, r"config/module_hash\.txt cannot be read: Is a directory; see --migrate"),
        (spoil_target, 78, r"etc/stockrt\.env cannot be read: Is a directory; --env-file"),
        (spoil_target_folder, 64, r"etc is no directory .*build_pyz\.sh install.*--env-file"),
        (spoil_state, 1, r"/state/module_hash cannot be read: Not a directory; see STATE_DIRECTORY"),
    ],
)
def test_what_cannot_be_taken_over_is_said_and_nothing_is_written(
    run_pyz: RunPyz, old: Old, spoil: Any, status: int, words: str
) -> None:
    spoil(old)
    done = run_pyz(*old.arguments())
    assert done.returncode == status, done.stderr
    assert re.search(words, done.stderr), done.stderr
    check_no_secret(done.stdout, done.stderr)
    assert done.stdout == ""
    assert not old.target.is_file() and not (old.state / "module_hash").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--migrate"], "--migrate needs the older client's directory, or --documents"),
        (["--migrate", "--documents"], "--documents needs --time-zone"),
        (["--migrate", ".", "--time-zone", "UTC"], "--documents needs --time-zone"),
        (["--documents"], "--documents goes with --migrate"),
        (["--time-zone", "UTC"], "--time-zone goes with --migrate"),
        (["--dry-run"], "--dry-run goes with --migrate"),
        (["--migrate", ".", "--force"], "--force goes with"),
        (
            ["--migrate", "--documents", "--time-zone", "Asia/Nowhere"],
            "expected a name such as Asia/Shanghai",
        ),
        (["--migrate", ".", "--documents", "--time-zone", ""], "expected a name such as Asia/Shanghai"),
        (["--migrate", "--once"], "not allowed with"),
    ],
    ids=" ".join,
)
def test_options_that_do_not_go_together(run_pyz: RunPyz, arguments: list[str], words: str) -> None:
    done = run_pyz(*arguments)
    assert (done.returncode, done.stdout) == (64, "")
    assert words in done.stderr


# --------------------------------------------------------------------------------------------------- documents


class Place:
    """A database with older documents, and the environment of whoever brings them over."""

    def __init__(self, uri: str, name: str) -> None:
        self.client: pymongo.MongoClient[Document] = pymongo.MongoClient(uri, tz_aware=True)
        self.db = self.client[name]
        self.env = {"MONGODB_HOST": uri, "MONGODB_DB_NAME": name}

    def trades(self) -> list[Document]:
        """Return ours."""
        return list(self.db["realtime"].find(sort=[("t", 1)]))

    def old(self, name: str = "stock_data") -> list[Document]:
        """Return the older ones."""
        return list(self.db[name].find(sort=[("_id", 1)]))


@pytest.fixture
def place(mongo_db: tuple[str, str]) -> Iterator[Place]:
    """An empty database."""
    made = Place(*mongo_db)
    yield made
    made.client.close()


def older(number: int, again: int = 0, **change: Any) -> Document:
    """Return a document of the older client: its trade, stored a minute later, `again` polls after the first."""
    t = T + number * 1000
    stored = datetime.fromtimestamp(t / 1000, UTC) + timedelta(minutes=1 + again)
    document = {"s": "600519.SH", "t": t, "p": "1680.50", "v": str(1 + number), "vw": "1680.50", "td": 1}
    local = (stored + SHANGHAI_AHEAD).replace(tzinfo=None)
    made = ObjectId(ObjectId.from_datetime(stored).binary[:4] + ObjectId().binary[4:])
    return {"_id": made, **document, "stock_code": "600519.SH", "create_time": local} | change


MIGRATE = ("--migrate", "--documents", "--time-zone", "Asia/Shanghai")


def summary(done: subprocess.CompletedProcess[str]) -> str:
    """The line that says what was done."""
    (line,) = (line for line in done.stderr.splitlines() if " read: " in line)
    return line


def test_doubled_documents_are_brought_over_once_with_the_time_of_the_first(
    run_pyz: RunPyz, place: Place
) -> None:
    found = [older(number, again) for again in range(3) for number in range(4)]
    place.db["stock_data"].insert_many(found)
    before = place.old()
    done = run_pyz(*MIGRATE, env=place.env)
    assert done.returncode == 0, done.stderr
    assert summary(done) == (
        "12 documents of stock_data read: 4 trades added to realtime, 8 already known, 0 no trade, "
        "0 refused by MongoDB"
    )
    expected = []
    for number in range(4):
        t = T + number * 1000
        trade = stockrt.Trade("600519.SH", t, "1680.50", str(1 + number), "1680.50", 1)
        at = datetime.fromtimestamp(t / 1000, UTC) + timedelta(minutes=1)
        expected.append(stockrt.to_document(trade, at))
    assert place.trades() == expected
    assert place.old() == before


def test_a_trade_that_the_service_has_already_stays_as_it_is(run_pyz: RunPyz, place: Place) -> None:
    trade = stockrt.Trade("600519.SH", T, "1680.50", "1", "1680.50", 1)
    ours = stockrt.to_document(trade, datetime(2026, 6, 2, tzinfo=UTC))
    place.db["realtime"].insert_one(ours)
    place.db["stock_data"].insert_many([older(0), older(1)])
    done = run_pyz(*MIGRATE, env=place.env)
    assert "1 trade added to realtime, 1 already known" in summary(done)
    assert place.trades()[0] == ours


@pytest.mark.parametrize(
    ("numeric", "texts_first"),
    [
        ("string", True),
        ("decimal", False),
        ("double", True),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (("string", False), ("decimal", True), ("double", False))
        ),
    ],
)
def test_one_trade_as_number_and_as_text_is_one(
    run_pyz: RunPyz, place: Place, numeric: str, texts_first: bool
) -> None:
    """1680.50 has no trailing zero as a number, and is the same trade; also over pages, and beside the service's."""
    as_numbers: dict[str, Any] = {"p": 1680.5, "v": 1.0, "vw": 1680.5, "t": float(T)}
    pair = [older(0), older(0, again=1, **as_numbers)]
    if not texts_first:
        pair = [older(0, **as_numbers), older(0, again=1)]
    between = [older(number, v=number + 1.0) for number in range(1, 1001)]
    place.db["stock_data"].insert_many([pair[0], *between, pair[1], older(2000, p=1680.5)])
    trade = stockrt.Trade("600519.SH", T + 2_000_000, "1680.50", "2001", "1680.50", 1)
    place.db["realtime"].insert_one(stockrt.to_document(trade, datetime(2026, 6, 2, tzinfo=UTC)))
    done = run_pyz(*MIGRATE, env=place.env | {"MONGODB_NUMERIC_TYPE": numeric})
    assert done.returncode == 0, done.stderr
    assert "1001 trades added to realtime, 2 already known" in summary(done)
    assert place.db["realtime"].count_documents({}) == 1002


def test_what_is_no_trade_is_counted_and_the_first_are_named(run_pyz: RunPyz, place: Place) -> None:
    bad = [older(number, p=None) for number in range(1, 8)]
    odd = {"_id": "by hand", "code": "TSLA.US", "price": 305.7}
    far = older(9, create_time=datetime(9999, 12, 31, 23))
    place.db["stock_data"].insert_many([older(0), *bad, odd, far])
    place.db.command(  # what no driver decodes as it stands: a date after the year 9999
        "update", "stock_data", updates=[{"q": {"_id": far["_id"]}, "u": [{"$set": {"create_time": {
            "$add": ["$create_time", 10**14]}}}]}])  # fmt: skip
    done = run_pyz(*MIGRATE, env=place.env)
    assert done.returncode == 0, done.stderr
    assert "2 trades added to realtime, 0 already known, 8 no trade" in summary(done)
    named = [line for line in done.stderr.splitlines() if line.startswith("  ")]
    assert named[0] == "  by hand: field s: nothing in place of a code"
    assert named[1] == f"  {bad[0]['_id']}: field p: null in place of a decimal number"
    assert len(named) == 5


def test_a_trade_that_mongodb_refuses_is_named_and_the_exit_status_is_one(
    run_pyz: RunPyz, place: Place
) -> None:
    place.db.create_collection("realtime", validator={"v": {"$ne": "2"}})
    place.db["stock_data"].insert_many([older(number) for number in range(3)])
    done = run_pyz(*MIGRATE, env=place.env)
    assert done.returncode == 1
    assert "2 trades added to realtime, 0 already known, 0 no trade, 1 refused by MongoDB" in summary(done)
    assert "MongoDB refused it: Document failed validation" in done.stderr


def test_the_wrong_zone_is_refused_before_anything_is_written(run_pyz: RunPyz, place: Place) -> None:
    """As by a container, whose clock is at UTC, on a machine in China."""
    place.db["stock_data"].insert_many([older(number) for number in range(3)])
    wrong = ("--migrate", "--documents", "--time-zone", "UTC")
    done = run_pyz(*wrong, env=place.env)
    assert done.returncode == 64
    assert "--time-zone UTC: create_time would be +8.0 h from when the documents were made" in done.stderr
    assert place.trades() == []
    assert run_pyz(*wrong, "--force", env=place.env).returncode == 0
    assert len(place.trades()) == 3


def test_documents_dry_run_counts_and_writes_nothing(run_pyz: RunPyz, place: Place, tmp_path: Path) -> None:
    place.db["stock_data"].insert_many([older(0), older(0, again=1), older(1, p=None)])
    done = run_pyz(*MIGRATE, "--dry-run", env=place.env)
    assert done.returncode == 0
    assert summary(done) == (
        "3 documents of stock_data read: 2 trades, doubles included, 1 no trade; nothing was written: --dry-run"
    )
    assert place.db.list_collection_names() == ["stock_data"]
    assert not (tmp_path / "state").exists()


def test_settings_and_documents_in_one_go(run_pyz: RunPyz, place: Place, old: Old) -> None:
    """The collection is the one that the older settings name, which then is ours as well: the older ones stay."""
    names = "".join(f"{name}={value}\n" for name, value in place.env.items())
    old.env.write_text(f"{names}MONGODB_COLLECTION_NAME=quotes\n")
    place.db["quotes"].insert_many([older(0), older(0, again=1), older(1)])
    before = place.old("quotes")
    for more in (("--dry-run",), ()):
        done = run_pyz(*old.arguments("--documents", "--time-zone", "Asia/Shanghai", *more))
        assert done.returncode == 0, done.stderr
        assert "3 documents of quotes read" in summary(done)
        assert "stand there beside them" in done.stderr
    assert "2 trades added to quotes, 1 already known" in summary(done)
    ours = {document["_id"] for document in place.old("quotes")} - {document["_id"] for document in before}
    assert len(ours) == 2 and all(isinstance(name, str) for name in ours)
    assert [document for document in place.old("quotes") if document["_id"] not in ours] == before


@pytest.mark.parametrize(
    ("change", "collection", "status", "words"),
    [
        ({"MONGODB_HOST": ""}, "stock_data", 78, "MONGODB_HOST not set: there are no older documents"),
        ({"MONGODB_HOST": "mongodb://127.0.0.1:1/?timeoutMS=500"}, "stock_data", 1, "see MONGODB_HOST"),
        ({}, "stock_data", 64, "--documents stock_data: no documents in that collection"),
        ({}, "a$b", 64, "--documents a$b: no documents in that collection"),
        ({}, "close", 64, "--documents close: in that collection stockrt keeps what is no trade"),
        ({}, "license_usage", 64, "in that collection stockrt keeps what is no trade"),
    ],
)
def test_documents_that_cannot_be_had(
    run_pyz: RunPyz, place: Place, change: dict[str, str], collection: str, status: int, words: str
) -> None:
    arguments = ("--migrate", "--documents", collection, "--time-zone", "Asia/Shanghai")
    done = run_pyz(*arguments, env=place.env | change)
    assert done.returncode == status, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------------------------------------- interrupted


def fill(place: Place, count: int) -> None:
    """Insert so many trades twice, in the order of their `_id`."""
    for again in range(2):
        rows = [older(number, again=1000 * again) for number in range(count)]
        place.db["stock_data"].insert_many(rows)


def read_so_far(state: Path) -> int:
    """How many documents an unfinished run has read."""
    try:
        return int(json.loads((state / "migration.json").read_text())["read"])
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize(
    "signal_number", [signal.SIGKILL, signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)]
)
def test_ended_in_the_middle_and_begun_again_nothing_is_lost_or_doubled(
    signal_number: signal.Signals,
    run_pyz: RunPyz,
    place: Place,
    pyz: Path,
    clean_env: dict[str, str],
    mongo_server: MongoServer,
    tmp_path: Path,
) -> None:
    fill(place, 5000)
    before = place.db["stock_data"].count_documents({})
    state = tmp_path / "state"
    insert_at = f"{place.db.name}.realtime"
    # the fourth page's insert hangs: the process is ended in the middle of it
    hang = {"skip": 3, "block_ms": 3_600_000} if signal_number is signal.SIGKILL else {"block_ms": 50}
    with controlled(mongo_server).failing("insert", namespace=insert_at, **hang):  # type: ignore[arg-type]
        process = subprocess.Popen(
            [sys.executable, pyz, *MIGRATE], env=clean_env | place.env, cwd=tmp_path, stderr=subprocess.PIPE
        )
        assert until(lambda: read_so_far(state) >= 3000), "three pages were not brought over"
        process.send_signal(signal_number)
        _, said = process.communicate(timeout=PATIENCE)
    if signal_number is not signal.SIGKILL:
        assert process.returncode == 130
        assert b"interrupted: the same command goes on where it stopped" in said
    read = read_so_far(state)
    assert 3000 <= read < before
    done = run_pyz(*MIGRATE, env=place.env)
    assert done.returncode == 0, done.stderr
    assert summary(done).startswith("10000 documents of stock_data read: ")
    assert place.db["realtime"].count_documents({}) == 5000
    assert place.db["stock_data"].count_documents({}) == before
    assert read_so_far(state) == 0  # it is finished, and leaves nothing behind


def test_examples_of_an_earlier_run_are_named_in_the_language_of_who_goes_on(
    run_pyz: RunPyz, place: Place, mongo_server: MongoServer
) -> None:
    bad = older(0, p=None)
    place.db["stock_data"].insert_many([bad, *(older(number) for number in range(1, 2500))])
    away = controlled(mongo_server).failing(
        "insert", error_code=UNAUTHORIZED, skip=1, namespace=f"{place.db.name}.realtime"
    )
    with away:
        done = run_pyz(*MIGRATE, env=place.env)
    assert done.returncode == 1 and f"  {bad['_id']}: field p: null" in done.stderr
    done = run_pyz(*MIGRATE, env=place.env | {"STOCKRT_LANG": "zh"})
    assert done.returncode == 0, done.stderr
    line, example = done.stderr.splitlines()[-2:]
    assert line == (
        "已从 stock_data 读取 2500 个文档：向 realtime 新增 2499 笔成交，重复 0 笔，"
        "不是成交的 1 个，被 MongoDB 拒绝 0 个"
    )
    assert example.startswith(f"  {bad['_id']}：") and not re.search("[a-z]{3,} [a-z]", example), example


def test_mongodb_away_in_the_middle_it_goes_on_from_there(
    run_pyz: RunPyz, place: Place, mongo_server: MongoServer, tmp_path: Path
) -> None:
    """What is deleted from ours meanwhile does not come back: what was read is not read again."""
    place.db["stock_data"].insert_many([older(number) for number in range(3500)])
    away = controlled(mongo_server).failing(
        "insert", error_code=UNAUTHORIZED, skip=2, namespace=f"{place.db.name}.realtime"
    )
    with away:
        done = run_pyz(*MIGRATE, env=place.env)
    assert done.returncode == 1
    assert "2000 documents of stock_data read: 2000 trades added" in summary(done)
    assert "see MONGODB_HOST" in done.stderr and "Traceback" not in done.stderr
    assert read_so_far(tmp_path / "state") == 2000
    place.db["realtime"].delete_many({})
    done = run_pyz(*MIGRATE, env=place.env)
    assert "3500 documents of stock_data read: 3500 trades added to realtime, 0 already known" in summary(
        done
    )
    assert place.db["realtime"].count_documents({}) == 1500


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"what": 1, "more": 2}',
        *(pytest.param(text, marks=pytest.mark.long) for text in ("{", "{}")),
    ],
)
def test_a_damaged_note_of_how_far_it_is_begins_anew(
    run_pyz: RunPyz, place: Place, tmp_path: Path, text: str
) -> None:
    place.db["stock_data"].insert_one(older(0))
    (tmp_path / "state").mkdir()
    (tmp_path / "state/migration.json").write_text(text)
    done = run_pyz(*MIGRATE, env=place.env)
    assert done.returncode == 0, done.stderr
    assert len(place.trades()) == 1


def test_another_collection_begins_at_its_own_beginning(
    run_pyz: RunPyz, place: Place, mongo_server: MongoServer, tmp_path: Path
) -> None:
    """What is noted of an unfinished run holds for that collection alone."""
    place.db["stock_data"].insert_many([older(number) for number in range(1500)])
    place.db["quotes"].insert_many([older(number) for number in range(10)])
    with controlled(mongo_server).failing("insert", error_code=UNAUTHORIZED, skip=1):
        assert run_pyz(*MIGRATE, env=place.env).returncode == 1
    done = run_pyz("--migrate", "--documents", "quotes", *MIGRATE[2:], env=place.env)
    assert "10 documents of quotes read: 0 trades added to realtime, 10 already known" in summary(done)


def test_documents_of_every_kind_of_id_are_read_over_pages(
    run_pyz: RunPyz, place: Place, tmp_path: Path
) -> None:
    """Numbers, texts, ObjectIds, dates: the order of `_id` goes through all of them, also when begun again."""
    base = datetime(2026, 6, 1)
    names: list[Any] = [
        *range(700),
        *(f"n{n}" for n in range(700)),
        *(base + timedelta(n) for n in range(700)),
    ]
    rows = [older(number, _id=name) for number, name in enumerate(names)]
    place.db["stock_data"].insert_many([*rows, *(older(number) for number in range(2100, 2800))])
    done = run_pyz(*MIGRATE, env=place.env)
    assert "2800 documents of stock_data read: 2800 trades added" in summary(done)


def test_a_bar_is_shown_on_a_terminal(
    place: Place, pyz: Path, clean_env: dict[str, str], tmp_path: Path
) -> None:
    fill(place, 1500)
    status, shown, _ = on_terminal(pyz, clean_env | place.env, tmp_path, "stderr", *MIGRATE)
    assert status == 0
    assert re.search(r"\d+%.* \d+/3000 ", shown), shown


def peak_mb(pyz: Path, env: dict[str, str], folder: Path) -> float:
    """Bring everything over and return the most memory that it held."""
    command = [sys.executable, "-S", "-c", MEASURE, sys.executable, str(pyz), *MIGRATE]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=120)
    status, kilobytes = done.stdout.split()
    assert status == "0", done.stderr
    return int(kilobytes) / 1024


def test_memory_does_not_grow_with_what_the_older_documents_hold_or_how_many_they_are(
    place: Place, pyz: Path, clean_env: dict[str, str], tmp_path: Path
) -> None:
    place.db["stock_data"].insert_one(older(0))
    few = peak_mb(pyz, clean_env | place.env, tmp_path)
    place.db["stock_data"].insert_many([older(n, note="x" * 1_000_000) for n in range(1, 100)])
    place.db["stock_data"].insert_many([older(n) for n in range(100, 20_000)])
    assert peak_mb(pyz, clean_env | place.env, tmp_path) < few + 20  # a page of a thousand is some 5
    assert place.db["realtime"].count_documents({}) == 20_000
