"""Everything that a person reads is in the catalogue, in both languages, with the same values."""

from __future__ import annotations

import re

import pytest
from kit.catalogue import PROGRAM, Source, values_of

CHINESE = re.compile(r"[\u4e00-\u9fff]")


@pytest.fixture(scope="module")
def source() -> Source:
    """The module's source."""
    return Source(PROGRAM.read_text(encoding="utf-8"))


def test_both_languages_have_the_same_values(source: Source) -> None:
    odd = {
        kind: templates
        for kind, templates in source.catalogue().items()
        if values_of(templates[0]) != values_of(templates[1])
    }
    assert odd == {}


def test_every_call_has_the_values_of_its_kind(source: Source) -> None:
    catalogue = source.catalogue()
    odd = [
        (call.line, kind)
        for call in source.calls()
        for kind in call.kinds
        if kind not in catalogue or (call.values != values_of(catalogue[kind][0]))
    ]
    assert odd == []


def test_every_kind_is_used(source: Source) -> None:
    used = source.texts() | {kind for call in source.calls() for kind in call.kinds}
    ages = {f"age.{unit}" for unit in ("s", "min", "h", "d")}
    assert source.catalogue().keys() - used - ages == set()


def test_chinese_is_chinese_and_english_is_not(source: Source) -> None:
    catalogue = source.catalogue()
    assert [kind for kind, (english, _) in catalogue.items() if CHINESE.search(english)] == []
