"""From what a person typed to codes, products and batches."""

from __future__ import annotations

import posixpath
import re
import tracemalloc
from collections.abc import Iterator
from urllib.parse import unquote, urlsplit

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kit.cases import each
from kit.chinese import in_chinese
from kit.daemons import number

import stockrt
from stockrt import (
    MARKETS,
    MAX_BATCH,
    PRODUCTS,
    Batch,
    BatchPlan,
    Instrument,
    InstrumentError,
    UnclearCode,
    market_of,
    parse_code,
    plan_batches,
    split_codes,
)


def refusal(raw: object) -> str:
    """Return the words with which a code is refused."""
    with pytest.raises(InstrumentError) as caught:
        parse_code(raw)
    return caught.value.message


@each(
    ("raw", "words"),
    [
        ("700", "未写交易所：是不是 00700.HK 或 000700.SZ？"),
        ("ES", "有两个品种用这个代码：是不是 common:ES 或 ES.US？"),
        ("9999", "未写交易所：是不是 09999.HK、009999.SH、9999.JP 或 9999.TW？"),
        ("茅台", "不是代码，可能是名称；应为代码，如 600519.SH，名称可用 --symbols 查找"),
        ("430047", "属于北京证券交易所，Infoway 没有其行情"),
        ("BJ:", "代码为空；应为代码，如 AAPL.US"),
        ("7203.TSE", ".TSE 可指东京、台湾或多伦多的交易所：请写后缀，如 7203.JP 或 2330.TW"),
        ("12.SH", "应为六位数字，如 600519.SH"),
        ("12345678", "共 8 位数字：应为六位，如 600519"),
    ],
)
def test_a_refusal_can_be_read_in_chinese(raw: str, words: str) -> None:
    assert in_chinese(refusal(raw)) == words


def test_a_name_is_told_how_it_is_looked_up() -> None:
    words = "no code but perhaps a name; expected a code such as 600519.SH, or --symbols NAME to look it up"
    assert refusal("茅台") == words


@each(
    ("raw", "shown"),
    [(None, "null"), (True, "true"), (["AAPL.US"], '["AAPL.US"]'), ({"code": None}, '{"code": null}')],
)
def test_what_is_no_code_is_shown_as_it_came(raw: object, shown: str) -> None:
    """As the platform wrote it, in JSON."""
    words = f"no code: {shown}; expected a text such as AAPL.US"
    assert plan_batches(["AAPL.US", raw]).invalid == {shown: words}


@each(
    "raw",
    ["", "A" * 33, "A B", ".BJ", "TSE:7203", "X.BSE", "BO:X", ".DJI", "AAPL.SS", "BRK.B", "300750.SS1", "NASDAQ:600",
     "FOO:BAR", "BINANCE:AAPL", "OANDA:AAPL", ".HK", "123456.HK", "FOO=X", None, 1.5, True, "BTC", "^GSPC", "AAPL",
     "japan:AAPL.US"],
)  # fmt: skip
def test_nothing_of_a_refusal_stays_english(raw: object) -> None:
    in_chinese(plan_batches([raw]).invalid.popitem()[1])


# ------------------------------------------------------------------------------------------------------
# One code
# ------------------------------------------------------------------------------------------------------


@given(
    st.from_regex(r"[A-Z0-9]{1,21}\.(US|JP|KS|IN|TW|HK|SH|SZ)", fullmatch=True)
    | st.from_regex(r"[0-9]{5}\.HK|[0-9]{6}\.S[HZ]", fullmatch=True)
)
@example("00000.HK")
@example("600519.SH")
def test_the_short_way_for_plain_codes_leads_to_the_same(code: str) -> None:
    """A blank before a code keeps it from the short way."""
    found: list[object] = []
    for typed in (code, f" {code}"):
        try:
            found.append(parse_code(typed))
        except InstrumentError as error:
            found.append(str(error))
    assert found[0] == found[1]


@each(
    ("raw", "code", "product"),
    [
        ("AAPL.US", "AAPL.US", "stock"),
        ("aapl.us", "AAPL.US", "stock"),
        ("  Aapl.Us\t\n", "AAPL.US", "stock"),
        ("　AAPL.US　", "AAPL.US", "stock"),
        (".DJI.US", ".DJI.US", "stock"),
        ("BRK.B.US", "BRK.B.US", "stock"),
        ("00700.HK", "00700.HK", "stock"),
        ("700.HK", "00700.HK", "stock"),
        ("5.hk", "00005.HK", "stock"),
        ("0000700.HK", "00700.HK", "stock"),
        ("80700.HK", "80700.HK", "stock"),
        ("HSI.HK", "HSI.HK", "stock"),
        ("７００．ＨＫ", "00700.HK", "stock"),
        ("600519.SH", "600519.SH", "stock"),
        ("000001.sz", "000001.SZ", "stock"),
        ("600519", "600519.SH", "stock"),
        ("688981", "688981.SH", "stock"),
        ("900901", "900901.SH", "stock"),
        ("000001", "000001.SZ", "stock"),
        ("200012", "200012.SZ", "stock"),
        ("300750", "300750.SZ", "stock"),
        (600519, "600519.SH", "stock"),
        (600519.0, "600519.SH", "stock"),
        (300750, "300750.SZ", "stock"),
        ("7203.JP", "7203.JP", "japan"),
        ("005930.KS", "005930.KS", "korea"),
        ("reliance.in", "RELIANCE.IN", "india"),
        ("M&M.IN", "M&M.IN", "india"),
        ("2330.TW", "2330.TW", "taiwan"),
        ("USDCNY", "USDCNY", "common"),
        ("eurusd", "EURUSD", "common"),
        ("XAUUSD", "XAUUSD", "common"),
        ("XAGUSD", "XAGUSD", "common"),
        ("USOIL", "USOIL", "common"),
        ("BTCUSDT", "BTCUSDT", "crypto"),
        ("ethusdt", "ETHUSDT", "crypto"),
        ("1000PEPEUSDT", "1000PEPEUSDT", "crypto"),
        ("ETHBTC", "ETHBTC", "crypto"),
        ("BTCUSD", "BTCUSD", "crypto"),
        ("common:US500", "US500", "common"),
        ("Crypto: newcoin", "NEWCOIN", "crypto"),
    ],
)
def test_a_code_gets_its_form_and_its_product(raw: object, code: str, product: str) -> None:
    """What a person types becomes what the API knows."""
    assert parse_code(raw) == Instrument(code, product)


@each(
    ("raw", "proposal"),
    [
        ("AAPL", "AAPL.US"),
        ("aapl ", "AAPL.US"),
        ("ABNB", "ABNB.US"),
        ("META", "META.US"),
        ("700", "00700.HK"),
        (700, "00700.HK"),
        (1, "000001.SZ"),
        (2230, "02230.HK, 002230.SZ, 2230.JP or 2230.TW"),
        (5930, "005930.KS"),
        ("005930", "did you mean 005930.KS?"),
        ("00878", "00878.HK or 00878.TW"),
        ("BTC", "BTCUSDT or BTC.US"),
        ("ES", "common:ES or ES.US"),
        ("WTI", "common:WTI or WTI.US"),
        (".DJI", ".DJI.US"),
        ("^DJI", ".DJI.US"),
        ("BRK-B", "BRK.B.US"),
        ("TSE:7203", "7203.JP or 2330.TW"),
        ("RELIANCE.BO", "RELIANCE.IN"),
        ("BSE:RELIANCE", "RELIANCE.IN"),
        ("NASDAQ:600519", "AAPL.US"),
        ("NYSE:", "AAPL.US"),
        ("XXX:AAPL", "product"),
        ("TVC:GOLD", "OANDA:XAUUSD"),
        ("BINANCE:AAPL", "BINANCE:BTCUSDT"),
        ("AAPL=X", "USDCNY"),
        ("7203.N", "AAPL.US"),
        ("AAPL.T", "7203.JP"),
        ("300750.SS1", "expected one of .US"),
        ("japan:AAPL.US", "is asked at stock"),
        ("茅台", "600519.SH"),
        ("1234567", "expected six"),
        ("BRK.B", "BRK.B.US"),
        ("SAP.DE", ".US"),
        ("AAPL.", ".US"),
        ("600519.HK", "00700.HK"),
        ("00000.HK", "00700.HK"),
        ("1.SZ", "000001.SZ"),
        ("MAOTAI.SH", "600519.SH"),
        (".US", "AAPL.US"),
        (600519.5, "600519.SH"),
        (True, "AAPL.US"),
        (None, "AAPL.US"),
        ([], "AAPL.US"),
        ({"code": "AAPL.US"}, "AAPL.US"),
        (b"AAPL.US", "AAPL.US"),
        (float("nan"), "AAPL.US"),
        (float("inf"), "AAPL.US"),
        (-5, "."),
        ("", "AAPL.US"),
        (" \t", "AAPL.US"),
    ],
)
def test_a_refused_code_comes_with_what_to_type_instead(raw: object, proposal: str) -> None:
    """The person needs no documentation."""
    assert proposal in refusal(raw)


# A number of each row of MAINLAND_RANGES, and of the shares and indices 000xxx -> what is asked, in turn.
MAINLAND = {
    "000001": "SZ",
    "000858": "SZ",
    "000300": "SH SZ",
    "000132": "SH SZ",
    "000016": "SZ SH",
    "000688": "SZ SH",
    "000852": "SZ SH",
    "000905": "SZ SH",
    "000660": "SZ",  # a share of the past: better unknown than the index
    "001979": "SZ",
    "002594": "SZ",
    "003816": "SZ",
    "004001": "SZ",
    "009908": "SH",
    "010303": "SH",
    "018006": "SH",
    "019547": "SH",
    "020556": "SH",
    "101303": "SZ SH",
    "110059": "SH",
    "113050": "SH",
    "118000": "SH",
    "111019": "SH SZ",
    "123123": "SZ",
    "127045": "SZ",
    "128136": "SZ",
    "120004": "SZ SH",
    "131810": "SZ",
    "132018": "SH SZ",
    "143001": "SH SZ",
    "150019": "SZ",
    "159915": "SZ",
    "161725": "SZ",
    "180101": "SZ",
    "184721": "SZ",
    "155001": "SZ SH",
    "175001": "SH",
    "188001": "SZ SH",
    "194001": "SH",
    "200012": "SZ",
    "204001": "SH",
    "240001": "SH",
    "250001": "SH",
    "300750": "SZ",
    "301269": "SZ",
    "302132": "SZ",
    "395001": "SZ",
    "399006": "SZ",
    "508000": "SH",
    "510300": "SH",
    "588000": "SH",
    "600519": "SH",
    "601318": "SH",
    "603288": "SH",
    "605499": "SH",
    "688981": "SH",
    "689009": "SH",
    "900901": "SH",
}


@each(("number", "exchanges"), MAINLAND.items())
def test_a_mainland_number_is_asked_where_its_range_is(number: str, exchanges: str) -> None:
    """Where it does not tell, the likelier exchange first and then the other."""
    instrument = parse_code(number)
    assert [code for code, _, _ in (instrument, *instrument.alternatives)] == [
        f"{number}.{exchange}" for exchange in exchanges.split()
    ]


def test_every_range_has_its_number_above() -> None:
    """One without would be tested by nobody."""
    starts = {start for row in stockrt.MAINLAND_RANGES for start in row.split()}
    numbers = [*MAINLAND, *BEIJING]
    assert {start for start in starts if not any(number.startswith(start) for number in numbers)} == set()


def test_a_number_that_was_a_share_never_falls_to_an_index_but_for_the_four() -> None:
    """An index in place of a company that is gone would be taken for its price."""
    unclear = {
        n for n in range(1000) if len(stockrt._mainland(f"{n:06}")) > 1 and n in stockrt._shenzhen_000()
    }
    assert unclear == {16, 688, 852, 905}


BEIJING = ("430047", "830799", "835185", "870204", "872925", "889999", "920002", "899050", "810011", "820001")


@each(
    "raw",
    [
        *BEIJING,
        430047,
        "BJ430047",
        "bj920002",
        "BJ.430047",
        "bj:430047",
        "430047.BJ",
        "920002.bj",
        "0.430047",
        "0.920002",
    ],
)
def test_the_beijing_exchange_is_refused_by_its_name(raw: object) -> None:
    """Nothing that could be typed instead exists."""
    assert "Beijing exchange, which Infoway does not carry" in refusal(raw)
    assert not re.search(r"\.(SH|SZ)", refusal(raw))


# What other programs write -> the API's form and its product.
NOTATIONS = {
    # sina, tencent, xueqiu, baostock, futu
    "SH600519": ("600519.SH", "stock"),
    "sz300750": ("300750.SZ", "stock"),
    "sh000001": ("000001.SH", "stock"),
    "sh.600519": ("600519.SH", "stock"),
    "SH.600519": ("600519.SH", "stock"),
    "SZ.000001": ("000001.SZ", "stock"),
    "ＳＨ６００５１９": ("600519.SH", "stock"),
    "hk00700": ("00700.HK", "stock"),
    "rt_hk00700": ("00700.HK", "stock"),
    "HK.00700": ("00700.HK", "stock"),
    "US.AAPL": ("AAPL.US", "stock"),
    "US.BRK.B": ("BRK.B.US", "stock"),
    "US.T": ("T.US", "stock"),
    "US.TW": ("TW.US", "stock"),
    "US.IN": ("IN.US", "stock"),
    "gb_aapl": ("AAPL.US", "stock"),
    # yfinance
    "600519.SS": ("600519.SH", "stock"),
    "000001.SS": ("000001.SH", "stock"),
    "0700.HK": ("00700.HK", "stock"),
    "7203.T": ("7203.JP", "japan"),
    "130A.T": ("130A.JP", "japan"),
    "RELIANCE.NS": ("RELIANCE.IN", "india"),
    "005930.KS": ("005930.KS", "korea"),
    "005930.KQ": ("005930.KS", "korea"),
    "2330.TW": ("2330.TW", "taiwan"),
    "2330.TWO": ("2330.TW", "taiwan"),
    "BTC-USD": ("BTCUSD", "crypto"),
    "USDCNY=X": ("USDCNY", "common"),
    "CNY=X": ("USDCNY", "common"),
    "CL=F": ("CL", "common"),
    # joinquant, myquant, vn.py
    "600519.XSHG": ("600519.SH", "stock"),
    "000001.XSHE": ("000001.SZ", "stock"),
    "SHSE.600519": ("600519.SH", "stock"),
    "SZSE.000001": ("000001.SZ", "stock"),
    "600519.SSE": ("600519.SH", "stock"),
    "300750.SZSE": ("300750.SZ", "stock"),
    "00700.SEHK": ("00700.HK", "stock"),
    # eastmoney
    "1.600519": ("600519.SH", "stock"),
    "0.300750": ("300750.SZ", "stock"),
    "1.000001": ("000001.SH", "stock"),
    "0.000001": ("000001.SZ", "stock"),
    "0.399001": ("399001.SZ", "stock"),
    "105.AAPL": ("AAPL.US", "stock"),
    "106.BRK_B": ("BRK.B.US", "stock"),
    "107.SPY": ("SPY.US", "stock"),
    "116.00700": ("00700.HK", "stock"),
    # reuters, wind
    "AAPL.O": ("AAPL.US", "stock"),
    "AAPL.OQ": ("AAPL.US", "stock"),
    "AAPL.N": ("AAPL.US", "stock"),
    "TW.O": ("TW.US", "stock"),
    "IN.N": ("IN.US", "stock"),
    # tradingview, google
    "NASDAQ:AAPL": ("AAPL.US", "stock"),
    "NYSE:BRK.B": ("BRK.B.US", "stock"),
    "SSE:600519": ("600519.SH", "stock"),
    "SSE:000001": ("000001.SH", "stock"),
    "SZSE:300750": ("300750.SZ", "stock"),
    "SHA：600519": ("600519.SH", "stock"),
    "HKEX:700": ("00700.HK", "stock"),
    "HKG:0700": ("00700.HK", "stock"),
    "TYO:7203": ("7203.JP", "japan"),
    "KRX:005930": ("005930.KS", "korea"),
    "NSE:RELIANCE": ("RELIANCE.IN", "india"),
    "TWSE:2330": ("2330.TW", "taiwan"),
    "BINANCE:BTCUSDT": ("BTCUSDT", "crypto"),
    "BINANCE:BTCUSDT.P": ("BTCUSDT.P", "crypto"),
    "OANDA:XAUUSD": ("XAUUSD", "common"),
    "TVC:DXY": ("DXY", "common"),
    # pairs
    "BTC/USDT": ("BTCUSDT", "crypto"),
    "btc-usdt": ("BTCUSDT", "crypto"),
    "BTC_USDT": ("BTCUSDT", "crypto"),
    "BTC／USDT": ("BTCUSDT", "crypto"),
    "BTCUSDT.P": ("BTCUSDT.P", "crypto"),
    "BTC/USDT:USDT": ("BTCUSDT.P", "crypto"),
    "BTC_USDT.P": ("BTCUSDT.P", "crypto"),
    "USD/CNY": ("USDCNY", "common"),
    "usd-cny": ("USDCNY", "common"),
    "XAU/USD": ("XAUUSD", "common"),
    "XPB/USD": ("XPBUSD", "common"),
    # what `common` lists
    "CL": ("CL", "common"),
    "XPBUSD": ("XPBUSD", "common"),
    "XCUUSD_S": ("XCUUSD_S", "common"),
    "ZINCSPOT": ("ZINCSPOT", "common"),
    "US500": ("US500", "common"),
    "hk50": ("HK50", "common"),
    "NI225": ("NI225", "common"),
    "DXY": ("DXY", "common"),
    "common:TOPIX.JP": ("TOPIX.JP", "common"),
    "crypto:BTCUSDT.P": ("BTCUSDT.P", "crypto"),
    "japan:7203": ("7203.JP", "japan"),
    "stock:600519": ("600519.SH", "stock"),
    # shares whose code is what stands for an exchange elsewhere
    "T.US": ("T.US", "stock"),
    "O.US": ("O.US", "stock"),
    "SH.US": ("SH.US", "stock"),
    "HK.US": ("HK.US", "stock"),
    "NS.US": ("NS.US", "stock"),
}


@each(("typed", "meant"), NOTATIONS.items())
def test_a_notation_of_another_program_is_read_as_it_means(typed: str, meant: tuple[str, str]) -> None:
    """And never as another company's."""
    assert parse_code(typed) == Instrument(*meant)


# Every name of an exchange or a venue, behind what is meant by it.
NAMES = {
    "600519.SH": "SH SS SSE SHSE XSHG SHA",
    "300750.SZ": "SZ SZSE XSHE SHE",
    "00700.HK": "HK HKEX SEHK XHKG HKG",
    "AAPL.US": "US O OQ N NASDAQ NYSE AMEX NYSEARCA ARCA XNAS XNYS",
    "7203.JP": "JP T TYO XTKS",
    "005930.KS": "KS KQ KR KRX KOSPI KOSDAQ XKRX",
    "RELIANCE.IN": "IN NS NSE XNSE",
    "2330.TW": "TW TWO TWSE TPEX TPE XTAI",
    "BTCUSDT": "BINANCE COINBASE BYBIT OKX KRAKEN BITSTAMP BITFINEX BITGET KUCOIN GATEIO GATE HTX HUOBI MEXC",
    "XAUUSD": "FX FX_IDC OANDA FOREXCOM SAXO ICMARKETS PEPPERSTONE CAPITALCOM TVC",
}


@each(("code", "name"), [(code, name) for code in NAMES for name in NAMES[code].split()])
def test_every_name_of_an_exchange_means_that_one(code: str, name: str) -> None:
    symbol, dot, _ = code.rpartition(".")
    forms = [f"{name}:{symbol or code}", f"{name.lower()} : {symbol or code}"]
    if dot:
        forms.append(f"{symbol}.{name}")
    assert {parse_code(form).code for form in forms} == {code}


def test_every_name_of_the_tables_is_tested() -> None:
    tables = {*stockrt._SUFFIX_OF, *stockrt.CRYPTO_VENUES, *stockrt.COMMON_VENUES}
    assert tables == {name for names in NAMES.values() for name in names.split()}


def test_an_unclear_code_says_what_it_may_be() -> None:
    """For who has a list of what exists; what is only wrong is not unclear."""
    for typed, text, candidates in (
        ("aapl", "AAPL", ["AAPL.US"]),
        ("ES", "ES", ["ES", "ES.US"]),
        ("005930", "005930", ["005930.KS"]),
        ("茅台", "茅台", []),
        ("币安人生usdt", "币安人生USDT", []),
        ("600519SH", "600519SH", []),
    ):
        with pytest.raises(UnclearCode) as caught:
            parse_code(typed)
        assert (caught.value.text, [parse_code(code).code for code in caught.value.guesses]) == (
            text,
            candidates,
        )
    for wrong in ("A\u202e.US", "600519.HK", "430047", "", "RELIANCE.BO"):
        with pytest.raises(InstrumentError) as refused:
            parse_code(wrong)
        assert not isinstance(refused.value, UnclearCode)


@each(
    "raw",
    [
        "../../x",
        "..",
        ".",
        "-",
        "A..B.US",
        "a/b.US",
        "A\\B.US",
        "A?B.US",
        "A#B.US",
        "A%2FB.US",
        "%",
        "A B.US",
        "A,B.US",
        "A;B.US",
        "A+B.US",
        "A@B.US",
        "A\0.US",
        "A\n.US",
        "A\r\nX: y.US",
        "A\x1b[31m.US",
        "A\u202e.US",
        "A\ud800.US",
        "茅台.SH",
        "A／B.US",
        "A．．B.US",
        "‥.US",
        "A" * 30 + ".US",
        "9" * 5000,
        10**5000,
        10**40,
        1e300,
        "stock:../x",
        "stock:",
        "stock:a/b",
        "common:" + "A" * 33,
        "common:crypto:BTCUSDT",
        "bonds:X",
    ],
)
def test_what_could_change_the_url_is_refused(raw: object) -> None:
    """The refusal itself is one harmless line that does not repeat what came."""
    assert refusal(raw).isprintable()
    assert len(refusal(raw)) < 150


def test_a_code_has_at_most_32_characters() -> None:
    """32 are taken, 33 refused, whatever blanks are around."""
    assert parse_code(" " + "A" * 29 + ".US ").code == "A" * 29 + ".US"
    assert "33 characters" in refusal("A" * 30 + ".US")


def test_every_suffix_has_an_example_that_is_right() -> None:
    """What is proposed can be typed."""
    for suffix, market in MARKETS.items():
        proposed = refusal(f"..{suffix}"[1:]).rpartition(" ")[2]
        assert parse_code(proposed) == Instrument(proposed, market.product)


CODE_LIKE = st.text("AaUuSsHhKk0169.:-&/%?=_^ \n７．。", max_size=12)
FOREIGN = st.builds(
    "{}{}{}".format,
    st.sampled_from(
        [*stockrt._SUFFIX_OF, *stockrt.EASTMONEY_MARKETS, "BJ", "BINANCE", "BTC", "USD", "gb", "rt_hk"]
    ),
    st.sampled_from(".:/-_="),
    st.sampled_from([*stockrt._SUFFIX_OF, "BO", "P", "USDT", "CNY", "X", "F"])
    | st.from_regex(r"[0-9A-Z]{1,6}"),
)
WITH_ENDING = st.builds("{}{}".format, st.text(max_size=8) | CODE_LIKE | st.integers(), st.sampled_from(
    [*("." + suffix for suffix in MARKETS), ".hk", "USDT", "USD", "CNY", ""]))  # fmt: skip
WITH_PRODUCT = st.builds("{}:{}".format, st.sampled_from(PRODUCTS), st.text(max_size=8) | CODE_LIKE)
ANYTHING: st.SearchStrategy[object] = (
    st.text()
    | CODE_LIKE
    | WITH_ENDING
    | WITH_PRODUCT
    | FOREIGN
    | st.integers()
    | st.floats()
    | st.integers(0, 999_999)
    | st.sampled_from([10**400, -(10**400), True, None, b"", [], {}])
)


@given(ANYTHING)
@example("ß.US")
@example("ﬁ.US")
@example("ŉ.US")
def test_anything_gives_a_harmless_code_or_a_refusal(raw: object) -> None:
    """Joined to a URL, a code is one path segment and stays what it is; nothing else gets through."""
    try:
        code, product, _ = parse_code(raw)
    except InstrumentError as error:
        assert str(error).isprintable()
        return
    assert product in PRODUCTS
    assert 1 <= len(code) <= 32
    assert set(code) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.&^=_-")
    parts = urlsplit(f"https://host/base/{code}")
    assert (parts.netloc, parts.path, parts.query, parts.fragment) == ("host", f"/base/{code}", "", "")
    assert posixpath.normpath(parts.path) == unquote(parts.path) == parts.path


@given(ANYTHING)
def test_parsing_what_was_parsed_changes_nothing(raw: object) -> None:
    """A stored code can be asked for again; one whose product was named needs the name again."""
    try:
        instrument = parse_code(raw)
    except InstrumentError:
        return
    meant = instrument._replace(alternatives=())  # which a whole code has none of
    assert parse_code(f"{instrument.product}:{instrument.code}") == meant
    if ":" not in str(raw) and "：" not in str(raw) and "=F" not in str(raw).upper():
        assert parse_code(instrument.code) == meant
    for other in instrument.alternatives:
        assert parse_code(other.code) == other


@given(st.integers(1, 99_999), st.integers(0, 5))
def test_a_hong_kong_number_has_five_digits_however_it_is_typed(number: int, zeros: int) -> None:
    """Leading zeros neither matter nor get lost."""
    assert parse_code(f"{'0' * zeros}{number}.HK") == Instrument(f"{number:05}.HK", "stock")


@each("text", ["A.US,B.US", "A.US B.US", " A.US\n\tB.US ", "A.US，B.US", "A.US；B.US、", ",A.US;;B.US,"])
def test_codes_may_be_separated_in_any_usual_way(text: str) -> None:
    """Commas of both kinds, semicolons, blanks, in any number."""
    assert split_codes(text) == ["A.US", "B.US"]


@each(
    ("code", "zone"),
    [
        ("AAPL.US", "America/New_York"),
        ("00700.HK", "Asia/Hong_Kong"),
        ("600519.SH", "Asia/Shanghai"),
        ("000001.SZ", "Asia/Shanghai"),
        ("7203.JP", "Asia/Tokyo"),
        ("005930.KS", "Asia/Seoul"),
        ("RELIANCE.IN", "Asia/Kolkata"),
        ("2330.TW", "Asia/Taipei"),
        ("USDCNY", "America/New_York"),
        ("XAUUSD", "America/New_York"),
        ("XPBUSD", "Europe/London"),
        ("ZINCSPOT", "Europe/London"),
        ("BTCUSDT", "UTC"),
        ("BTCUSDT.P", "UTC"),
    ],
)
def test_every_code_has_the_clock_of_its_exchange(code: str, zone: str) -> None:
    """The code alone tells it."""
    market = market_of(code)
    assert market is not None and market.zone == zone


def test_a_code_that_does_not_tell_its_market_has_none() -> None:
    """It is stored, but it has no close."""
    for code in ("US500", "XCUUSD", "XCUUSD_S", "CL", "AAPL.XX", "HK"):
        assert market_of(code) is None


# ------------------------------------------------------------------------------------------------------
# Batches
# ------------------------------------------------------------------------------------------------------


def test_codes_go_into_batches_of_one_product_each() -> None:
    """In the order they came, each once, whatever its spelling."""
    plan = plan_batches(
        ["700.HK", "BTCUSDT", "aapl.us", 600519, "00700.hk", "USDCNY", "AAPL.US", "600519.SH"]
    )
    assert plan.batches == [
        Batch("stock", "00700.HK,AAPL.US,600519.SH"),
        Batch("crypto", "BTCUSDT"),
        Batch("common", "USDCNY"),
    ]
    assert (plan.total, plan.invalid) == (5, {})


def test_a_bad_code_is_named_with_its_reason_and_harms_no_other() -> None:
    """It counts in the total, once."""
    plan = plan_batches(["AAPL.US", "../../x", "AAPL", "../../x", "", "BTCUSDT"])
    assert [batch.codes for batch in plan.batches] == ["AAPL.US", "BTCUSDT"]
    assert plan.invalid.keys() == {"../../x", "AAPL", "''"}
    assert "AAPL.US" in plan.invalid["AAPL"]
    assert plan.total == 5


@each(
    "raw",
    [
        "A\x1b[31m\n",
        "x" * 10_000,
        10**5000,
        None,
        ["x"],
        float("nan"),
        "\ud800",
    ],
)
def test_whatever_was_given_is_named_in_one_short_printable_line(raw: object) -> None:
    """A terminal and a result on the platform can show it."""
    plan = plan_batches([raw])
    (shown,) = plan.invalid
    assert shown
    assert shown.isprintable()
    assert len(shown) <= 40


def test_a_plan_knows_what_was_typed_for_a_code_that_became_another() -> None:
    """A result can name it so; one that only changed its case needs no word."""
    plan = plan_batches(["SH600519", "aapl.us", "700.HK", "MSFT.US", 300750, "600519"])
    assert plan.asked_as == {"600519.SH": "SH600519", "00700.HK": "700.HK", "300750.SZ": "300750"}
    assert plan.total == 5


def test_a_plan_knows_what_to_ask_next_where_a_number_does_not_tell() -> None:
    """Only the likelier exchange is asked at first."""
    plan = plan_batches(["000905", "000001", "000300"])
    assert plan.batches == [Batch("stock", "000905.SZ,000001.SZ,000300.SH")]
    assert plan.alternatives == {
        "000905.SZ": (Instrument("000905.SH", "stock"),),
        "000300.SH": (Instrument("000300.SZ", "stock"),),
    }


def test_nothing_gives_no_batch() -> None:
    """An empty list is no request."""
    plan = plan_batches([])
    assert (plan.batches, plan.invalid, plan.total) == ([], {}, 0)


@each(("count", "sizes"), [(99, [99]), (100, [100]), (101, [100, 1]), (250, [100, 100, 50])])
def test_a_batch_is_full_before_the_next_begins(count: int, sizes: list[int]) -> None:
    """No request is wasted."""
    batches = plan_batches(f"C{n}.US" for n in range(count)).batches
    assert [len(batch.split()) for batch in batches] == sizes


def test_a_code_that_is_one_part_of_another_is_another() -> None:
    """The duplicate check compares whole codes."""
    codes = ["AA.US", "A.US", "AAA.US", "BTCUSDT", "1000BTCUSDT", "BTCUSDTUSDT"]
    assert plan_batches(codes).total == len(codes)


CODES = st.builds(
    "{}{}".format,
    st.integers(1, 400),
    st.sampled_from([".US", ".us", ".HK", ".JP", "USDT", ".TW", "!", ""]),
)


@settings(deadline=None, max_examples=number(30, 30, quick=15))
@given(st.lists(CODES, max_size=20) | st.lists(CODES, min_size=300, max_size=500))
def test_a_plan_holds_every_code_once_in_order_and_no_batch_over_the_limit(codes: list[str]) -> None:
    """For any list: nothing lost, nothing twice, and the total is right."""
    wanted: dict[str, dict[str, None]] = {}
    bad = set()
    for code in codes:
        try:
            instrument = parse_code(code)
            wanted.setdefault(instrument.product, {})[instrument.code] = None
        except InstrumentError:
            bad.add(code)
    plan = plan_batches(codes)
    for product, expected in wanted.items():
        batches = [batch.split() for batch in plan.batches if batch.product == product]
        assert [code for batch in batches for code in batch] == list(expected)
        assert all(len(batch) == MAX_BATCH for batch in batches[:-1])
    assert all(1 <= len(batch.split()) <= MAX_BATCH == 100 for batch in plan.batches)
    assert {batch.product for batch in plan.batches} == wanted.keys()
    assert plan.invalid.keys() == bad
    assert plan.total == sum(map(len, wanted.values())) + len(bad)


@given(st.from_regex(stockrt._PLAIN_CODE, fullmatch=True))
def test_a_plan_takes_a_plain_code_as_it_would_be_read(code: str) -> None:
    """Which it does without reading it."""
    instrument = parse_code(code)
    assert plan_batches([code]).batches == [Batch(instrument.product, instrument.code)]


def test_instruments_can_be_planned_without_being_parsed_again() -> None:
    """A code that is asked once more at another product keeps its form."""
    plan = BatchPlan()
    for _ in range(2):
        plan.add_instrument(Instrument("BTCUSDT", "stock"))
    assert plan.finish() == [Batch("stock", "BTCUSDT")]


def test_a_plan_of_100_000_codes_is_small_and_lacks_none() -> None:
    """A few bytes a code: the codes themselves are read once and not kept. Many end like another."""

    def codes() -> Iterator[str]:
        for one in reversed(range(100_000)):
            yield f"{one}.US"

    plan_batches(["AAPL.US"])  # what is made once is made before
    tracemalloc.start()
    try:
        plan = plan_batches(codes())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert plan.total == 100_000
    assert len(plan.batches) == 1000
    assert peak < 5 * 2**20


@each(
    ("code", "hours"),
    [
        ("AAPL.US", 120), ("00700.HK", 144), ("600519.SH", 288), ("000001.SZ", 288), ("7203.JP", 288),
        ("005930.KS", 288), ("RELIANCE.IN", 288), ("2330.TW", 336), ("USDCNY", 96), ("BTCUSDT", 1),
    ],
)  # fmt: skip
def test_a_trade_is_stale_that_is_older_than_its_market_ever_rests(code: str, hours: int) -> None:
    """A holiday makes none so."""
    t = 1_786_751_999_691
    assert not stockrt.is_stale(code, t, t + hours * 3_600_000)
    assert stockrt.is_stale(code, t, t + hours * 3_600_000 + 1)
    assert not stockrt.is_stale("VIX", t, t * 2)  # nobody knows when it is open
