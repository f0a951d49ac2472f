"""The account of the stream's faults: what is lost, doubled, made up or changed is found, and a gap excuses its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pymongo
import pytest
import websocket

from kit.stream_server import record_of
from kit.stream_world import StreamWorld, crypto_codes, gap_of

CODES = crypto_codes(3)


@pytest.mark.parametrize(
    ("what", "found"),
    [
        ("nothing", (0, 0, 0, 0)),
        ("lost", (1, 0, 0, 0)),
        ("lost in a gap", (0, 0, 0, 0)),
        ("lost in a gap of another code", (1, 0, 0, 0)),
        ("lost after a gap", (1, 0, 0, 0)),
        ("doubled", (0, 1, 1, 0)),  # the second has an _id that no trade has
        ("made up", (0, 0, 1, 0)),
        ("changed", (0, 0, 0, 1)),
    ],
)
def test_the_account_finds_what_is_wrong(
    what: str, found: tuple[int, ...], tmp_path: Path, mongo_db: tuple[str, str]
) -> None:
    uri, name = mongo_db
    with (
        StreamWorld(tmp_path / "none", {}, tmp_path, mongo_db) as world,
        pymongo.MongoClient[dict[str, Any]](uri) as client,
    ):
        ws = websocket.create_connection(f"{world.stream.url}?business=crypto&apikey=test-key", 60)
        ws.recv()
        ws.send(json.dumps({"code": 10000, "trace": "t", "data": {"codes": ",".join(CODES)}}))
        ws.recv()
        names = world.stream.trade(*CODES * 4)
        world.stream.wait_for(lambda it: it.pushed_count == len(names))
        rows = [{"_id": it, **record_of(it), "stock_code": it.split("|")[0]} for it in names]
        t = rows[0]["t"]
        gap = {"product": "crypto", "codes": CODES[:1], "from": t - 1, "to": t + 1}
        if what.startswith("lost"):
            del rows[0]
        if what == "doubled":
            rows.append(rows[0] | {"_id": names[0].lower()})
        if what == "made up":
            made_up = f"{CODES[0]}|1|1|1|0"
            rows.append({"_id": made_up, **record_of(made_up), "stock_code": CODES[0]})
        if what == "changed":
            rows[0]["vw"] = "0"
        if "gap" in what:
            gap["codes"] = CODES[1:] if "another" in what else CODES[:1]
            shift = 1_000 if "after" in what else 0
            gap |= {"from": gap["from"] - shift, "to": gap["to"] - shift}
            client[name]["stream_gaps"].insert_one(gap | {"_id": "g"})
        client[name]["realtime"].insert_many(rows)
        account = world.account()
        assert (len(account.lost), account.doubled, len(account.strangers), len(account.changed)) == found
        ws.close()


def test_a_gap_that_goes_on_has_no_end_and_one_of_the_local_file_has_its_codes_as_text() -> None:
    row = {"product": "crypto", "codes": '["AUSDT"]', "from": 10_000, "to": None}
    gap = gap_of(row)
    assert (gap.codes, gap.from_ms, gap.to_ms > 1 << 60) == ({"AUSDT"}, 10_000, True)
    assert gap_of(row | {"to": 20_000, "codes": ["AUSDT"]}).to_ms == 20_000
