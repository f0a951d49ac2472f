"""What the older client left, as values: its settings, its hash, its documents."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import hypothesis
import pytest
from bson.decimal128 import Decimal128
from bson.int64 import Int64
from bson.objectid import ObjectId
from hypothesis import strategies as st
from kit.cases import each

import stockrt
from stockrt import (
    InstrumentError,
    SettingsError,
    StoreError,
    Trade,
    UsageError,
    env_line,
    first_stored,
    move_installation,
    old_settings,
    plan_hash,
    plan_settings,
    read_old_trade,
    time_zone,
)

TARGET = Path("/there/stockrt.env")
SHANGHAI = ZoneInfo("Asia/Shanghai")
NEW_YORK = ZoneInfo("America/New_York")
T = 1786751999691
RECORD: dict[str, Any] = {"s": "TSLA.US", "t": T, "p": "305.770", "v": "1", "vw": "305.770", "td": 0}
HASH, OTHER_HASH = "-3298472938472", "8471209384712"


# ------------------------------------------------------------------------------------------------- settings


def test_names_of_settings_the_old_one_becomes_that_of_today() -> None:
    taken, lines = plan_settings({"MONGODB_COLLECTION_NAME": "quotes", "SERVER_PORT": "8080"}, {}, TARGET)
    assert taken == {"MONGODB_REALTIME_COLLECTION_NAME": "quotes", "SERVER_PORT": "8080"}
    assert "taken     MONGODB_REALTIME_COLLECTION_NAME='quotes', there MONGODB_COLLECTION_NAME" in lines


@pytest.mark.parametrize("name", ["MONGODB_COLLECTION_NAME", "MONGODB_REALTIME_COLLECTION_NAME"])
def test_what_is_set_stays_under_whichever_of_its_names(name: str) -> None:
    taken, lines = plan_settings({"MONGODB_COLLECTION_NAME": "quotes"}, {name: "mine"}, TARGET)
    assert taken == {}
    assert lines == ["kept      MONGODB_REALTIME_COLLECTION_NAME: it is set already; the older one differs"]


def test_each_line_is_there_in_chinese() -> None:
    old = {
        "MONGODB_COLLECTION_NAME": "quotes",
        "SERVER_PORT": "8080",
        "SERVER_IP": "::1",
        "DJANGO_TOKEN": "x",
    }
    _, lines = plan_settings(old, {"SERVER_PORT": "8080", "SERVER_IP": "::2"}, TARGET)
    assert sorted(stockrt.in_language(line, "zh") for line in lines) == [
        "已保留  SERVER_IP：此处已有设置，与旧客户端的不同",
        "已保留  SERVER_PORT：此处已有设置",
        "已迁移  MONGODB_REALTIME_COLLECTION_NAME=“quotes”，旧客户端中名为 MONGODB_COLLECTION_NAME",
        "未采用  DJANGO_TOKEN：stockrt 没有这项设置",
    ]


def test_a_credential_that_is_not_there_hides_nothing_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key of the env file stays the service's: an older one below it would be stronger."""
    target, older, absent = tmp_path / "stockrt.env", tmp_path / "older", tmp_path / "infoway_api_key"
    target.write_text("INFOWAY_API_KEY=key-of-today\n")
    (older / "config").mkdir(parents=True)
    (older / "config/.env").write_text("INFOWAY_API_KEY=older-key\n")
    unit = tmp_path / "stockrt.service"
    unit.write_text(f"[Service]\nEnvironmentFile={target}\nLoadCredential=infoway_api_key:{absent}\n")
    monkeypatch.setattr(stockrt, "UNIT_PLACES", [unit])
    monkeypatch.setenv("PATH", str(tmp_path))  # no systemctl: the file itself is read
    _, settings, lines = move_installation(older, target, {}, dry=False)
    assert "kept      INFOWAY_API_KEY: it is set already; the older one differs" in lines
    assert target.read_text() == "INFOWAY_API_KEY=key-of-today\n"
    assert settings.api_keys == ("key-of-today",)


def test_a_setting_that_is_the_same_here_is_not_said_to_differ() -> None:
    _, lines = plan_settings({"SERVER_PORT": "8080"}, {"SERVER_PORT": "8080"}, TARGET)
    assert lines == ["kept      SERVER_PORT: it is set already"]


def test_an_unknown_setting_is_named_and_its_value_is_not() -> None:
    taken, lines = plan_settings({"DJANGO_TOKEN": "hunter2-secret"}, {}, TARGET)
    assert taken == {}
    assert lines == ["left out  DJANGO_TOKEN: stockrt has no such setting"]


def test_secrets_are_in_no_line() -> None:
    old = {
        "INFOWAY_API_KEY": "hunter2-secret",
        "MONGODB_HOST": "mongodb://u:hunter2-secret@db1/",
        "HTTPS_PROXY": "http://u:hunter2-secret@proxy:3128",
    }
    taken, lines = plan_settings(old, {}, TARGET)
    assert taken == old
    _, kept = plan_settings(old, dict.fromkeys(old, "another-secret"), TARGET)
    assert len(lines) == len(kept) == 3
    assert not any("secret" in line for line in (*lines, *kept))


def test_values_that_cannot_be_taken_are_named_all_at_once_but_not_where_one_is_set() -> None:
    old = {"SERVER_IP": "http://10.0.0.5", "SERVER_PORT": "many", "LOG_LEVEL": "loud"}
    with pytest.raises(SettingsError) as raised:
        plan_settings(old, {"LOG_LEVEL": "info"}, TARGET)
    ip, port = raised.value.faults
    assert ip.startswith("SERVER_IP='http://10.0.0.5' (older): expected a host name")
    assert port.startswith("SERVER_PORT='many'") and str(TARGET) in port


def test_what_the_older_file_holds_is_read_as_the_older_client_did(tmp_path: Path) -> None:
    """Quotes, comments, blanks, Windows' line ends; a line that is no setting is named by its number alone."""
    (tmp_path / "config").mkdir()
    lines = ["\ufeff# settings", "export SERVER_IP = 10.0.0.5  # the platform", "hunter2-secret", "EMPTY=", "",
             "MODULE_NAME='股票 #1'", 'INFOWAY_API_KEY="k1,k2"']  # fmt: skip
    (tmp_path / "config/.env").write_bytes("\r\n".join(lines).encode())
    found, unread = old_settings(tmp_path)
    assert found == {"SERVER_IP": "10.0.0.5", "MODULE_NAME": "股票 #1", "INFOWAY_API_KEY": "k1,k2"}
    (line,) = unread
    assert line.startswith(f"left out  {tmp_path / 'config/.env'}, line 3: expected NAME=value")
    assert "hunter2" not in line


@hypothesis.given(st.text(st.characters(exclude_categories=("C", "Z"), include_characters=" "), min_size=1))
@hypothesis.example("it's")
@hypothesis.example('say "C:\\new\\t" it\'s #1 $HOME ${HOME}')
@hypothesis.example("mongodb://u:p%40ss@db1,db2/?replicaSet=rs0&w=majority")
def test_any_value_is_read_from_the_file_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, value: str
) -> None:
    path = tmp_path_factory.mktemp("env") / "stockrt.env"
    path.write_text(env_line("MODULE_NAME", value) + env_line("SERVER_PORT", "1"), encoding="utf-8")
    assert stockrt.read_env_file(path) == {"MODULE_NAME": value, "SERVER_PORT": "1"}
    assert stockrt.read_env_file(path).faults == []


# ----------------------------------------------------------------------------------------------------- hash


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state directory, and an older installation beside it."""
    (tmp_path / "state").mkdir()
    (tmp_path / "old/config").mkdir(parents=True)
    (tmp_path / "old/config/module_hash.txt").write_text(HASH)
    return tmp_path / "state"


def test_the_hash_is_taken_where_none_is(state: Path) -> None:
    taken, line = plan_hash(state.parent / "old", state)
    assert taken == HASH
    assert line == f"taken     module hash -329…472 into {state / 'module_hash'}"


def test_what_is_only_tried_is_said_as_what_would_be(state: Path) -> None:
    _, lines = plan_settings({"SERVER_PORT": "8080", "MONGODB_COLLECTION_NAME": "x"}, {}, TARGET, dry=True)
    _, line = plan_hash(state.parent / "old", state, dry=True)
    assert all(stockrt.in_language(one, "zh").startswith("将迁移  ") for one in [*lines, line])
    assert "would take SERVER_PORT='8080'" in lines and line.startswith(
        "would take module hash -329…472 into"
    )


def test_a_hash_that_is_there_stays_and_the_way_to_the_older_one_is_said(state: Path) -> None:
    (state / "module_hash").write_text(OTHER_HASH + "\n")
    taken, line = plan_hash(state.parent / "old", state)
    assert taken == ""
    assert line.startswith("kept      module hash 8471…712") and "the older one, -329…472" in line
    assert f"remove {state / 'module_hash'} and try again" in line


def test_the_same_hash_needs_nothing(state: Path) -> None:
    (state / "module_hash").write_text(HASH)
    assert plan_hash(state.parent / "old", state) == (
        "",
        f"kept      module hash -329…472: it is in {state / 'module_hash'} already",
    )


def test_no_older_hash_is_said_with_what_follows(state: Path) -> None:
    (state.parent / "old/config/module_hash.txt").unlink()
    taken, line = plan_hash(state.parent / "old", state)
    assert taken == ""
    assert "module_hash.txt is not there" in line and "workflows" in line


def test_what_became_of_the_hash_is_there_in_chinese(state: Path) -> None:
    (state / "module_hash").write_text(OTHER_HASH + "\n")
    place = state / "module_hash"
    _, line = plan_hash(state.parent / "old", state)
    assert stockrt.in_language(line, "zh") == (
        f"已保留  模块哈希 8471…712：已在 {place} 中；工作流可能绑定在旧哈希 -329…472 上："
        f"如需采用旧哈希，请停止服务，删除 {place} 后重试"
    )


@pytest.mark.parametrize("text", ["", "no hash at all", "1" * 65, "12\n34", "<html>"])
def test_a_file_of_another_form_is_no_hash(state: Path, text: str) -> None:
    (state.parent / "old/config/module_hash.txt").write_text(text)
    with pytest.raises(StoreError, match=r"module_hash\.txt holds no module hash"):
        plan_hash(state.parent / "old", state)


# -------------------------------------------------------------------------------------------------- documents


@each(
    ("change", "expected"),
    [
        ({}, RECORD),
        ({"p": 305.77, "v": 1.0, "vw": 305.77}, RECORD | {"p": "305.77", "v": "1", "vw": "305.77"}),
        ({"p": 305, "v": Int64(1), "t": Int64(T)}, RECORD | {"p": "305"}),
        ({"t": float(T), "td": 0.0}, RECORD),
        ({"p": Decimal128("305.770")}, RECORD),
        ({"p": 1e-07}, RECORD | {"p": "1e-07"}),
        ({"s": "tsla.us"}, RECORD),
        ({"s": "USOIL", "p": "-37.63"}, RECORD | {"s": "USOIL", "p": "-37.63"}),
        ({"s": "币安人生USDT"}, RECORD | {"s": "币安人生USDT"}),
    ],
    ids=str,
)
def test_a_trade_is_what_the_api_sent_whatever_type_it_is_stored_as(
    change: dict[str, Any], expected: dict[str, Any]
) -> None:
    trade = read_old_trade({"_id": ObjectId(), **RECORD, **change})
    assert trade == Trade(**expected)
    assert {type(trade.t), type(trade.td)} == {int}


def test_a_document_without_s_has_its_code_in_stock_code() -> None:
    document = {"_id": ObjectId(), **RECORD, "stock_code": "TSLA.US"}
    del document["s"]
    assert read_old_trade(document) == Trade(**RECORD)


@each(
    ("change", "why"),
    [
        ({"p": None}, "field p: null"),
        ({"p": float("nan")}, 'field p: "nan"'),
        ({"p": "0"}, "p 0: it has not traded"),
        ({"p": "-1"}, "p -1"),
        ({"v": datetime(2026, 8, 15)}, "field v"),
        ({"t": True}, "field t: true"),
        ({"t": 1786751999.5}, "field t"),
        ({"t": T * 1000}, "field t"),
        ({"t": T + 1}, "more than a day ahead"),
        ({"td": None}, "field td: null"),
        ({"s": ObjectId(b"twelve bytes")}, "field s"),
        ({"s": "TSLA.US|1"}, "characters that no code has"),
        ({"s": ""}, "empty code"),
    ],
    ids=str,
)
def test_what_is_no_trade_is_refused_with_the_reason(change: dict[str, Any], why: str) -> None:
    with pytest.raises((ValueError, InstrumentError)) as raised:
        read_old_trade(RECORD | change, latest_ms=T)
    assert why in str(raised.value)


def made_at(moment: datetime) -> ObjectId:
    """Return an ObjectId that was made then."""
    return ObjectId.from_datetime(moment)


NAIVE = datetime(2026, 8, 15, 9, 2, 3, 456_789)
MADE = datetime(2026, 8, 15, 1, 2, 3, tzinfo=UTC)


@each("told", [NAIVE, "2026-08-15 09:02:03.456789", "2026-08-15T01:02:03.456+00:00"], ids=str)
def test_a_naive_time_is_of_the_named_zone_in_whole_milliseconds(told: object) -> None:
    at, late = first_stored({"_id": made_at(MADE), "create_time": told}, T, SHANGHAI)
    assert at == MADE + timedelta(milliseconds=456)
    assert at.tzinfo is UTC
    assert late == pytest.approx(0.456)


def test_the_wrong_zone_shows_in_how_far_it_is_from_the_object_id() -> None:
    _, late = first_stored({"_id": made_at(MADE), "create_time": NAIVE}, T, NEW_YORK)
    assert late == pytest.approx(12 * 3600 + 0.456)


@pytest.mark.parametrize("hours", [5, 6])
def test_the_hour_of_autumn_that_is_there_twice_is_told_by_the_object_id(hours: int) -> None:
    """On 2025-11-02 New York's 01:30 was 05:30 UTC, and 06:30 UTC."""
    made = datetime(2025, 11, 2, hours, 30, tzinfo=UTC)
    told = {"_id": made_at(made), "create_time": datetime(2025, 11, 2, 1, 30)}
    assert first_stored(told, T, NEW_YORK) == (made, 0.0)


@each("told", [None, "yesterday", 17, datetime.min, "0001-01-01T00:00:00+14:00"], ids=str)
def test_without_a_time_it_is_when_the_object_id_was_made_or_the_trade(told: object) -> None:
    assert first_stored({"_id": made_at(MADE), "create_time": told}, T, SHANGHAI) == (MADE, None)
    trade_time = datetime.fromtimestamp(T / 1000, UTC)
    assert first_stored({"_id": 17, "create_time": told}, T, SHANGHAI) == (trade_time, None)


@each("name", ["Asia/Nowhere", "Asia", "../etc/passwd", "/etc/passwd", "", "+08:00", "CST6"])
def test_a_zone_that_is_none_is_a_fault_of_the_command_line(name: str) -> None:
    with pytest.raises(UsageError, match=r"--time-zone .*expected a name such as Asia/Shanghai"):
        time_zone(name)


def test_zones_are_found_by_their_names() -> None:
    assert time_zone("Asia/Shanghai") == SHANGHAI
    assert time_zone("UTC") is UTC
