"""What a reader of Chinese is shown."""

from __future__ import annotations

import re

from stockrt import CHINESE, in_language

_ENGLISH = re.compile(r"[a-z]{2,},? [a-z]{2,}")
_HAN = re.compile(r"[\u4e00-\u9fff]")


def in_chinese(words: str, *foreign: str) -> str:
    """Return words in Chinese, after looking that nothing of them is English but what is `foreign`."""
    told = in_language(words, CHINESE)
    own = told
    for text in foreign:
        assert text in told, (text, told)
        own = own.replace(text, "")
    assert _HAN.search(own) and not _ENGLISH.search(own), told
    return told
