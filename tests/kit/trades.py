"""Trades and settings for tests of what stores them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import stockrt
from kit.infoway_server import EPOCH_MS, make_record
from stockrt import Document, Settings, Trade, to_document

CREATED = datetime(2026, 8, 15, 1, 2, 3, 456_000, tzinfo=UTC)


# The Friday before EPOCH_MS, a Saturday, when Shanghai closes.
FRIDAY_MS = EPOCH_MS - 17 * 60 * 60 * 1000


def make_trades(count: int, first: int = 0) -> list[Trade]:
    """Return trades of that many codes, the same ones each time."""
    return [
        Trade(**make_record(f"{600_000 + number}.SH", 0, FRIDAY_MS)) for number in range(first, first + count)
    ]


def make_documents(count: int, first: int = 0, created: datetime = CREATED) -> list[Document]:
    """Return the documents of `make_trades`."""
    return [to_document(trade, created) for trade in make_trades(count, first)]


def settings_of(environ: dict[str, str]) -> Settings:
    """Return the settings of this environment alone."""
    return stockrt.load_settings(environ, places=(), is_root=False).settings


def by_id(documents: Sequence[Document]) -> list[Document]:
    """Return them in the order of their `_id`."""
    return sorted(documents, key=lambda document: str(document["_id"]))
