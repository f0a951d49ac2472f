"""Everything that a person reads is in the catalogue, in both languages, with the same values and in the same terms."""

from __future__ import annotations

import errno
import re
from string import Formatter

import pytest
from kit.cases import each
from kit.catalogue import PROGRAM, Sentence, Source, values_of, why_outside
from kit.outside import OUTSIDE
from kit.terms import forbidden, odd_terms

README = PROGRAM.with_name("README.md")
HAN = "[\u3400-\u9fff]"
# Whose Chinese is without a Chinese word, and why.
WORDLESS = {
    "cli.error": "a name and a colon",
    "cli.last": "values alone",
    "cli.origins": "values alone, behind a label",
    "cli.the_api": "a name",
    "cli.through": "an arrow",
    "cli.wait_for_mongodb": "a name behind a value",
    "websocket.lost": "a value alone: it says that the connection is lost",
    "usage.every": "a flag and a colon",
}
# Punctuation that is not the sentence's: addresses, and characters that are named.
NAMED = re.compile(r"\S*://[^，。；（）]*|(?<= )[^\w\s\u3000-\u303f\uff00-\uffef](?= )")
# What must not be in Chinese text; \0 stands for a value.
ODD = {
    "half-width punctuation beside Chinese": (
        rf"(?:{HAN}|[，。；：（）、“”])\s?[,;:!?()]|[,;:!?()]\s?(?:{HAN}|[，。；：（）、“”])"
    ),
    "half-width punctuation beside a value": r"\0[,;:] |[,;] ?\0|\(\0|\0\)",
    "half-width punctuation": r"[,;] |: ",
    "no blank between Chinese and Latin": rf"{HAN}[A-Za-z0-9@%=/_\\-]|[A-Za-z0-9%=/_\\-]{HAN}",
    "a blank at full-width punctuation": r"(?<! ) [，；：。、（）“”！？]|[，；：。、（“！？）”] (?! )",
    "quotation marks of English": rf"[\"']{HAN}|{HAN}[\"']",
    "punctuation twice": r"[，；：。、]{2}",
    "您": "您",
}


@pytest.fixture(scope="module")
def source() -> Source:
    """The module's source."""
    return Source(PROGRAM.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def catalogue(source: Source) -> dict[str, tuple[str, str]]:
    """Every kind with its two templates."""
    return source.catalogue()


def told(found: list[Sentence]) -> list[str]:
    """Return what stands outside of the catalogue without a reason, one line each."""
    return [f"{one.line} {one.place}: {one.text}" for one in found if why_outside(one) is None]


def with_gaps(template: str) -> str:
    """Return a template with a sign in place of each value."""
    parts = Formatter().parse(template)
    return "".join(text + "\0" * (name is not None) for text, name, _, _ in parts)


# ------------------------------------------------------------------------------------------ what is outside of it


def test_nothing_that_a_person_reads_is_written_elsewhere(source: Source) -> None:
    assert told(source.sentences()) == []


def test_no_text_of_one_language_is_a_value_of_words(source: Source) -> None:
    assert told(source.plain_values()) == []


def test_no_words_are_made_a_text_before_their_language_is_chosen(source: Source) -> None:
    """By an f-string, +, %, join, replace, str(): the other language would be lost."""
    assert told(source.losses()) == []


def test_every_exception_is_needed(source: Source) -> None:
    found = source.sentences() + source.plain_values() + source.losses()
    reasons = {why_outside(one) for one in found}
    assert [row for row in OUTSIDE if row[-1] not in reasons] == []


@each(
    ("code", "words"),
    [
        ('def f() -> str:\n    return "the disk is full"\n', "the disk is full"),
        ('def f(n: int) -> str:\n    return f"{n} left"\n', "{} left"),
        ('def f(n: int) -> Phrase:\n    return phrase("a.b", n="none at all" if n else n)\n', "none at all"),
        ('def f() -> Phrase:\n    state = "unset"\n    return phrase("a.b", n=state)\n', "n=unset"),
        ('def f() -> str:\n    words = phrase("a.b")\n    return f"{words};"\n', "f'{words};'"),
        ('def f() -> str:\n    return phrase("a.b") + ";"\n', "phrase('a.b') + ';'"),
        ('def f() -> str:\n    return "%s;" % phrase("a.b")\n', "'%s;' % phrase('a.b')"),
        ('def f() -> str:\n    return ";".join([phrase("a.b")])\n', "';'.join([phrase('a.b')])"),
        ('def f() -> str:\n    return phrase("a.b").replace("x", "y")\n', "phrase('a.b').replace('x', 'y')"),
        (
            "class StockrtError(Exception): pass\ndef f() -> str:\n    try:\n        g()\n"
            "    except StockrtError as error:\n        return str(error)\n",
            "str(error)",
        ),
        (
            "def g() -> str:\n    return phrase('a.b')\n"
            "class C:\n    def h(self) -> None:\n        self.why = g()\n"
            "def f(c: C) -> str:\n    return f'({c.why})'\n",
            "f'({c.why})'",
        ),
    ],
)
def test_what_stands_outside_is_seen(code: str, words: str) -> None:
    source = Source(code)
    found = source.sentences() + source.plain_values() + source.losses()
    assert words in {one.text for one in found}


def test_the_log_and_what_is_read_by_no_person_is_left_alone() -> None:
    source = Source(
        'def f(error: str) -> Phrase:\n    """What it returns."""\n    log.warning("it is away: %s", error)\n'
        '    return phrase("a.b", words=one_line(error), n=count_words(2, "final close"))\n'
    )
    assert source.sentences() + source.plain_values() + source.losses() == []


# --------------------------------------------------------------------------------------------------- its kinds


def test_both_languages_have_the_same_values(catalogue: dict[str, tuple[str, str]]) -> None:
    """In the same form: as many digits, and quoted or not."""
    odd = {kind: two for kind, two in catalogue.items() if values_of(two[0]) != values_of(two[1])}
    assert odd == {}


def test_no_two_kinds_say_the_same(catalogue: dict[str, tuple[str, str]]) -> None:
    said: dict[tuple[str, str], str] = {}
    twice = [(said[words], kind) for kind, words in catalogue.items() if said.setdefault(words, kind) != kind]
    assert twice == []


def test_every_call_has_the_values_of_its_kind(source: Source, catalogue: dict[str, tuple[str, str]]) -> None:
    """Of some kinds that stand together in a table not each has a place for everything."""
    odd = []
    for call in source.calls:
        for kind in call.kinds:
            names = {name for name, _, _ in values_of(catalogue[kind][0])} if kind in catalogue else {"?"}
            if not names <= call.values.keys() or (len(call.kinds) == 1 and names != call.values.keys()):
                odd.append((call.line, kind))
    assert odd == []


def test_every_kind_is_used(source: Source, catalogue: dict[str, tuple[str, str]]) -> None:
    used = source.texts() | {kind for call in source.calls for kind in call.kinds}
    made = {f"age.{unit}" for unit in ("s", "min", "h", "d")} | {
        f"os.{name}" for name in errno.errorcode.values()
    }
    known_by_its_words = {kind for kind in catalogue if kind.startswith(("mongo.", "lib."))}
    assert catalogue.keys() - used - made - known_by_its_words == set()


# -------------------------------------------------------------------------------------------------- its Chinese


def test_chinese_is_chinese_and_english_is_not(catalogue: dict[str, tuple[str, str]]) -> None:
    odd = []
    for kind, (english, chinese) in catalogue.items():
        if re.search(HAN, english):
            odd.append(kind)
        if re.search("[a-z]{2}", with_gaps(english)) and not re.search(HAN, chinese) and kind not in WORDLESS:
            odd.append(kind)
    assert odd == []
    assert WORDLESS.keys() <= catalogue.keys()


def test_chinese_is_written_as_in_print(catalogue: dict[str, tuple[str, str]]) -> None:
    """Full-width punctuation, and a blank between Chinese and what is not."""
    odd = []
    for kind, (english, chinese) in catalogue.items():
        own = NAMED.sub("x", with_gaps(chinese))
        odd += [f"{kind}: {what}: {chinese}" for what, form in ODD.items() if re.search(form, own)]
        if english.endswith(".") != chinese.endswith("。"):
            odd.append(f"{kind}: full stop")
    assert odd == []


def test_a_value_that_is_not_words_stands_apart_from_chinese(
    source: Source, catalogue: dict[str, tuple[str, str]]
) -> None:
    """A path, a number, or a count, which begins with one; what may be words may begin and end with Chinese."""
    odd = []
    for (kind, name), values in source.values_given().items():
        chinese = catalogue[kind][1]
        meant = [one for value in values for one in source.glue.meanings(value)]
        counts = [ast_name(value) in ("count_words", "age_words") for value in meant]
        words = [source.glue.says(value) for value in meant]
        if (any(counts) or not any(words)) and re.search(rf"{HAN}\{{{name}[!:}}]", chinese):
            odd.append(f"{kind}: no blank before {name}: {chinese}")
        if not any(words) and re.search(rf"\{{{name}(?:[!:][^}}]*)?\}}{HAN}", chinese):
            odd.append(f"{kind}: no blank behind {name}: {chinese}")
    assert odd == []


def ast_name(value: object) -> str:
    """Return the name of the function that an expression calls."""
    return str(getattr(getattr(value, "func", None), "id", ""))


# ---------------------------------------------------------------------------------------------------- its terms


def test_one_thing_has_one_word(catalogue: dict[str, tuple[str, str]]) -> None:
    odd = {kind: found for kind, two in catalogue.items() if (found := odd_terms(*two))}
    assert odd == {}


def test_the_readme_has_no_second_word_for_a_thing() -> None:
    _, _, chinese = README.read_text(encoding="utf-8").partition("\n# 中文\n")
    odd = {line: found for line in chinese.splitlines() if (found := forbidden(line))}
    assert chinese and odd == {}
