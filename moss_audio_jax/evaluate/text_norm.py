"""Text before it is compared: English, Chinese and other languages, and the units of error rates.

    english     Whisper's English normaliser (package whisper-normalizer)
    chinese     rules of our own, below
    basic       other languages: Whisper's rule for them, which drops symbols and letter case

Chinese: full width and letter case; numerals to Arabic ones, whatever form they have (二十三,
二三, 3万, 百分之五, 三分之一, 三点五); dates, clocks, percent, signs of money and temperature to
one form; punctuation off; erhua (花儿) left alone, as it is heard. Error rates count characters of
Chinese and words of Latin script, so that mixed speech is fair to both.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import re
import unicodedata
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Literal

from moss_audio_jax.errors import InputError, extra

VERSION = "1"
EXTRA = extra("evaluate")

Rules = Literal["english", "chinese", "basic"]

_HAN = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff〇"
_KANA = r"\u3040-\u30ff\u31f0-\u31ff"
_HAN_CHARACTER = re.compile(f"[{_HAN}]")
_UNIT = re.compile(rf"[{_HAN}{_KANA}]|[^\s{_HAN}{_KANA}]+")


def rules_for(reference: str, language: str | None = None) -> Rules:
    """Which rules a row is under: by its language, else by whether its reference has Chinese."""
    if language:
        code = re.split(r"[-_]", language.lower())[0]
        if code in ("zh", "cmn", "yue", "chinese", "mandarin", "cantonese"):
            return "chinese"
        return "english" if code in ("en", "eng", "english") else "basic"
    return "chinese" if _HAN_CHARACTER.search(reference) else "english"


def normalise(text: str, rules: Rules) -> str:
    """The text in the form in which it is compared; words are one space apart.

    Raises:
      InputError: whisper-normalizer is needed and not installed.
    """
    if rules == "chinese":
        return chinese(text)
    return " ".join(_whisper(rules)(text).split())


def units(normalised: str, rules: Rules) -> list[str]:
    """What an error rate counts: characters of Chinese (and kana), words of everything else.

    Under the Chinese rules a digit is a unit too: it is said as a character.
    """
    if rules == "chinese":
        # "mp3" is one word; "5%" and "2008" are said character by character.
        found = []
        for unit in _UNIT.findall(normalised):
            found += [unit] if re.search(r"[^\W\d_]", unit) else unit
        return found
    return _UNIT.findall(normalised)


def plain_units(text: str) -> list[str]:
    """Units of a text with its case and punctuation off, and nothing else changed.

    For words that carry times: what joins or drops words would lose theirs.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"(?<=\w)['’](?=\w)", "", text)
    if text.isalpha() and text.isascii():  # most words that carry times
        return [text]
    return _UNIT.findall("".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text))


def key(text: str) -> str:
    """For short answers and names: case, width, spacing, punctuation around it do not count."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.strip(" .,;:!?。，；：！？、\"'`“”‘’*_")


@functools.cache
def identity() -> dict[str, str | None]:
    """What decides the normalised text: version, hash of these rules, version of Whisper's."""
    try:
        whisper = importlib.metadata.version("whisper-normalizer")
    except importlib.metadata.PackageNotFoundError:
        whisper = None
    digest = hashlib.sha256(Path(__file__).read_bytes())
    digest.update(f"{whisper} {unicodedata.unidata_version}".encode())
    return {"version": VERSION, "hash": digest.hexdigest()[:16], "whisper_normalizer": whisper}


@functools.cache
def _whisper(rules: Rules) -> Callable[[str], str]:
    try:
        from whisper_normalizer.basic import BasicTextNormalizer
        from whisper_normalizer.english import EnglishTextNormalizer
    except ImportError:
        raise InputError(f"{rules} text needs whisper-normalizer: {EXTRA}") from None
    if rules == "basic":
        return BasicTextNormalizer()
    english = EnglishTextNormalizer()
    # Some fifty patterns a text: compiled once, they are not looked up each time.
    english.replacers = {re.compile(find): put for find, put in english.replacers.items()}
    return english


# --- Chinese -------------------------------------------------------------------------------------

_SAME = str.maketrans("〇壹贰叁肆伍陆柒捌玖拾佰仟萬億兩貳參陸點負",
                      "零一二三四五六七八九十百千万亿两二三六点负")  # fmt: skip
_DIGITS = {c: str(i) for i, c in enumerate("零一二三四五六七八九")} | {"两": "2", "幺": "1"}
_SMALL = {"百": 100, "千": 1000}
_N = "零一二三四五六七八九两十百千万亿"
_D = "零一二三四五六七八九幺"
# A decimal's digits are said one by one; 三点五分 and 三点十五 are clocks.
_DECIMAL = re.compile(rf"([{_N}]+)点([{_D}]+)(?![{_D}两十百千分刻钟])")
_RUN = re.compile(rf"[{_N}幺]+")
_ARABIC_LARGE = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?)(百万|千万|万|亿)(?![万亿\d])")
_LARGE = {"百万": 10**6, "千万": 10**7, "万": 10**4, "亿": 10**8}


def chinese(text: str) -> str:
    """Chinese text, with Latin words in it or not, in one form."""
    text = unicodedata.normalize("NFKC", text).casefold().translate(_SAME)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(\d{4})([-/.])(\d{1,2})\2(\d{1,2})(?![\d.])", r"\1年\3月\4日", text)
    text = re.sub(r"(?<![\d:])(\d{1,2}):(\d{2})(?![\d:])", r"\1点\2分", text)
    text = re.sub(r"(?<![\w.])[-−](?=\d)", "负", text)
    text = _numerals(text)
    text = text.replace("百分之百", "100%")
    text = re.sub(r"百分之(负?\d+(?:\.\d+)?)", r"\1%", text)
    text = re.sub(r"千分之(负?\d+(?:\.\d+)?)", r"\1‰", text)
    text = re.sub(r"(\d+)分之(\d+)", r"\2/\1", text)
    text = re.sub(r"(?<![\d.])0+(?=\d+[月日号点])", "", text)  # 08月 is 8月
    text = re.sub(r"(?<=\d点)(?:半|(\d{1,2})分(?!之))", _minutes, text)
    text = re.sub(r"\$(\d+(?:\.\d+)?)", r"\1美元", text)
    text = re.sub(r"¥(\d+(?:\.\d+)?)", r"\1元", text)
    text = text.replace("°c", "摄氏度")
    text = re.sub(r"(?<=\w)['’](?=\w)", "", text)
    text = re.sub(r"(?<=\d)[./](?=\d)", lambda m: {".": "\0", "/": "\1"}[m[0]], text)
    kept = (c if unicodedata.category(c)[0] in "LMN" or c in "%‰\0\1" else " " for c in text)
    text = "".join(kept).replace("\0", ".").replace("\1", "/")
    text = re.sub(rf"(?<=[{_HAN}])\s+|\s+(?=[{_HAN}])", "", text)
    return " ".join(text.split())


def _minutes(match: re.Match[str]) -> str:
    minutes = int(match[1] or 30)
    return str(minutes) if minutes else ""


def _numerals(text: str) -> str:
    text = re.sub(r"(?<![\d.])\d(?=[百千万亿])|(?<=[百千万亿])\d(?![\d.])", _spelt, text)
    text = _DECIMAL.sub(_decimal, text)
    text = _RUN.sub(lambda m: _run(m[0], text[m.end() : m.end() + 1]), text)
    # 35万 was written half in Arabic: the whole number, as 三十五万 and 350000 are.
    return _ARABIC_LARGE.sub(lambda m: _written(Decimal(m[1]) * _LARGE[m[2]]), text)


def _spelt(match: re.Match[str]) -> str:
    return "零一二三四五六七八九"[int(match[0])]  # 3万5千 is 三万五千


def _decimal(match: re.Match[str]) -> str:
    whole = _cardinal(match[1])
    if whole is None:
        return match[0]
    return f"{whole}.{''.join(_DIGITS[c] for c in match[2])}"


def _run(run: str, following: str) -> str:
    value = _cardinal(run)
    if value is not None:
        return str(value)
    # 二三 alone is "two or three", and 九八年 a year; from three on digits are a number.
    clear = len(run) > 2 or following == "年" or set(run) & set("零幺")
    if clear and all(c in _DIGITS for c in run):
        return "".join(_DIGITS[c] for c in run)
    return run


def _cardinal(text: str) -> int | None:
    """The value of 三百零五, 十二, 两万三千, 一亿; None for what is no such number."""
    for sign, size in (("亿", 10**8), ("万", 10**4)):
        if sign not in text:
            continue
        left, _, right = text.rpartition(sign)
        high = _cardinal(left)
        if high is None:
            return None
        if len(right) == 1 and right in _DIGITS and right != "零":
            low: int | None = int(_DIGITS[right]) * size // 10  # 一万二 is 12,000
        else:
            low = _cardinal(right.removeprefix("零")) if right else 0
        return None if low is None or low >= size else high * size + low
    return _below_ten_thousand(text)


_FOUR = re.compile(
    "(?:({0})千)?(?:零?({0})百)?(零?{0}?十)?(零?{0})?".format("[一二三四五六七八九两]")
)


def _below_ten_thousand(text: str) -> int | None:
    if text == "零":
        return 0
    match = _FOUR.fullmatch(text)
    if not text or text[0] == "零" or not match:
        return None
    thousands, hundreds, tens, ones = match.groups()
    value = 1000 * int(_DIGITS.get(thousands, 0)) + 100 * int(_DIGITS.get(hundreds, 0))
    if tens:
        value += 10 * int(_DIGITS.get(tens[-2:-1].strip("零"), 1))
    if ones:
        # 三百五 is 350, 三百零五 is 305.
        short = text[:-1].endswith(("百", "千"))
        value += int(_DIGITS[ones[-1]]) * (_SMALL[text[-2]] // 10 if short else 1)
    return value


def _written(value: Decimal) -> str:
    return str(int(value)) if value == int(value) else f"{value.normalize():f}"
