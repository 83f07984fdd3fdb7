"""Normalises text before comparison, and divides it into the units of error rates.

    english     Whisper's English normaliser (package whisper-normalizer)
    chinese     our own rules, below
    basic       other languages: Whisper's basic rule, but a combining mark stays with its letter
    unspaced    the same, for scripts without spaces between words: Japanese, Thai, Lao, Khmer,
                Burmese, Tibetan and related ones

Whisper's basic rule replaces every combining mark by a space. This splits words of Hindi, Tamil or
pointed Hebrew into letters and loses their vowels. Here a mark is part of its letter: a wrong vowel
sign is a wrong word, and no mark (a point, a tone) is optional. Spellings that Unicode treats as
equal (composed and decomposed, full and half width) are equal. Invisible characters (joiners,
directions, soft hyphens, variation selectors) do not count.

Chinese: width and letter case are unified; numerals of any form (二十三, 二三, 3万, 百分之五,
三分之一, 三点五) become Arabic ones; dates, times of day, percentages, money and temperatures get
one form; punctuation is removed; erhua (花儿) is kept, because it is heard.

Error rates count words if the script separates them, else characters (code points). Words of
another script within such a text count as words, so that mixed speech is counted fairly.
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

VERSION = "2"

Rules = Literal["english", "chinese", "basic", "unspaced"]
# What the error rates count; the score file contains it.
COUNTED = {
    "wer": "words; of scripts without spaces between words (Chinese, Japanese, Thai, Lao, Khmer, "
    "Burmese, Tibetan) characters",
    "cer": "code points of the normalised text; one space between words is one",
}

_HAN = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff〇"
_KANA = r"\u3040-\u30ff\u31f0-\u31ff"
_UNSPACED = (
    _HAN + _KANA + r"\u0e00-\u0eff"  # Thai, Lao
    r"\u0f00-\u0fff\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Tibetan, Burmese
    r"\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\uaa80-\uaadf\U00011700-\U0001174f"  # Khmer, Tai
    r"\u1b00-\u1b7f\ua980-\ua9df"  # Balinese, Javanese
)
_HAN_CHARACTER, _KANA_CHARACTER = re.compile(f"[{_HAN}]"), re.compile(f"[{_KANA}]")
_UNSPACED_CHARACTER = re.compile(f"[{_UNSPACED}]")
_LATIN_LETTER = re.compile(r"[A-Za-z\u00aa-\u024f\u1e00-\u1eff\uff21-\uff5a]")
_UNIT = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")
_NO_SPACE = re.compile(rf"(?<=[{_UNSPACED}]) | (?=[{_UNSPACED}])")
_LANGUAGES: dict[Rules, str] = {
    "chinese": "zh zho chi cmn yue wuu nan hak chinese mandarin cantonese",
    "english": "en eng english",
    "unspaced": "ja jpn japanese th tha thai lo lao km khm khmer my mya burmese myanmar bo bod "
    "tibetan dz dzo dzongkha shn shan",
}
_BY_CODE = {code: rules for rules, codes in _LANGUAGES.items() for code in codes.split()}


def rules_for(reference: str, language: str | None = None) -> Rules:
    """The rules for a row: by its language, else by the script of its reference.

    Without a language, a text in mostly Latin letters is taken for English.
    """
    if language:
        code = re.split(r"[-_]", language.lower())[0]
        if code in _BY_CODE:
            return _BY_CODE[code]
    elif reference.isascii():
        return "english"
    elif _KANA_CHARACTER.search(reference):
        return "unspaced"
    elif _HAN_CHARACTER.search(reference):
        return "chinese"
    letters = sum(map(str.isalpha, reference))
    if 2 * len(_UNSPACED_CHARACTER.findall(reference)) > letters:
        return "unspaced"
    if language or 2 * len(_LATIN_LETTER.findall(reference)) < letters:
        return "basic"
    return "english"


def unit(rules: Rules) -> Literal["words", "characters"]:
    """The unit that the word error rate counts under these rules."""
    return "characters" if rules in ("chinese", "unspaced") else "words"


def normalise(text: str, rules: Rules) -> str:
    """The text in the form in which it is compared; words are separated by one space.

    Raises:
      InputError: whisper-normalizer is needed but not installed.
    """
    if rules == "chinese":
        return chinese(text)
    if rules == "english":
        return english(text)
    text = basic(text)
    return _NO_SPACE.sub("", text) if rules == "unspaced" else text


def units(normalised: str, rules: Rules) -> list[str]:
    """The units of an error rate: characters in scripts without spaces between words, else words.

    In a text of such a script each digit is a unit too, because it is said as a character.
    """
    if unit(rules) == "characters":
        # "mp3" is one word; "5%" and "2008" are said character by character.
        found = []
        for each in _UNIT.findall(normalised):
            found += [each] if re.search(r"[^\W\d_]", each) else each
        return found
    return _UNIT.findall(normalised)


def plain_units(text: str) -> list[str]:
    """Units of a text without case and punctuation; nothing else is changed.

    For words with times: rules that join or drop words would lose their times.
    """
    if text.isalpha() and text.isascii():  # true of most words with times
        return [text.lower()]
    text = re.sub(r"(?<=\w)['’](?=\w)", "", _folded(text))
    return _UNIT.findall(_words(text))


def key(text: str) -> str:
    """The form in which short answers and names are compared.

    Case, width, spacing and surrounding punctuation do not count.
    """
    return " ".join(_folded(text).split()).strip(" .,;:!?。，；：！？、\"'`“”‘’*_")


@functools.cache
def identity() -> dict[str, str | None]:
    """What determines the normalised text: the hash of these rules, and versions of packages."""
    try:
        whisper = importlib.metadata.version("whisper-normalizer")
    except importlib.metadata.PackageNotFoundError:
        whisper = None
    digest = hashlib.sha256(Path(__file__).read_bytes())
    digest.update(f"{whisper} {unicodedata.unidata_version}".encode())
    return {"version": VERSION, "hash": digest.hexdigest()[:16], "whisper_normalizer": whisper}


# --- all scripts ---------------------------------------------------------------------------------


class _Table(dict):
    """A table for str.translate; the replacement of a character is computed at its first use."""

    def __init__(self, rule: Callable[[str], str]) -> None:
        super().__init__()
        self._rule = rule

    def __missing__(self, code: int) -> str:
        self[code] = self._rule(chr(code))
        return self[code]


def _seen(c: str) -> str:
    """Removes invisible characters; an invisible word separator becomes a space."""
    if c == "\u200b":
        return " "
    selector = "\ufe00" <= c <= "\ufe0f" or "\U000e0100" <= c <= "\U000e01ef"
    return "" if selector or unicodedata.category(c) in ("Cf", "Cs") else c


_SEEN = _Table(_seen)
_LETTERS = _Table(lambda c: c if unicodedata.category(c)[0] in "LMN" else " ")
_SYMBOLS = _Table(lambda c: " " if unicodedata.category(c)[0] in "SP" else c)


def _folded(text: str) -> str:
    """Lower case, one spelling of what Unicode treats as equal, without invisible characters."""
    if text.isascii():
        return text.casefold()
    # casefold() leaves a dot behind the dotted capital I, and decomposes some letters.
    text = unicodedata.normalize("NFKC", text.translate(_SEEN)).replace("İ", "i").casefold()
    return unicodedata.normalize("NFKC", text)


def _words(text: str, table: _Table = _LETTERS) -> str:
    """Words separated by one space, split where `table` gives one; marks without a letter go."""
    words = text.translate(table).split()
    for number, word in enumerate(words):
        while word and unicodedata.category(word[0])[0] == "M":
            words[number] = word = word[1:]
    return " ".join(filter(None, words))


def basic(text: str) -> str:
    """Whisper's basic rule: lower case without bracketed words, symbols, punctuation; keeps marks.

    Equal to whisper-normalizer's BasicTextNormalizer(preserve_marks=True) for texts without
    invisible characters and without marks that have no letter.
    """
    text = unicodedata.normalize("NFC", text.translate(_SEEN)).replace("İ", "i").lower()
    text = unicodedata.normalize("NFKC", _without_asides(text)).lower()
    return _words(unicodedata.normalize("NFKC", text), _SYMBOLS)


def _without_asides(text: str) -> str:
    """Text without [brackets], <tags> and (parentheses), as Whisper's patterns find them.

    Those patterns take quadratic time if opening brackets are never closed.
    """
    text = _cut(text, "<[", ">]", 0)
    return _cut(text, "(", ")", 1)


def _cut(text: str, openers: str, closers: str, least: int) -> str:
    """Removes each opener up to the next closer, if `least` or more characters are between them.

    Openers that are never closed become a symbol that matches no closer.
    """
    if not any(opener in text for opener in openers):
        return text
    kept, at = [], 0
    opening, closing = re.compile(f"[{re.escape(openers)}]"), re.compile(f"[{re.escape(closers)}]")
    while (start := opening.search(text, at)) is not None:
        end = closing.search(text, start.end())
        if end is None:
            return "".join([*kept, opening.sub("|", text[at:])])
        closed = end.start() - start.end() >= least
        kept.append(text[at : start.start() if closed else start.end()])
        at = end.end() if closed else start.end()
    return "".join([*kept, text[at:]])


_FILLERS = re.compile(r"\b(hmm|mm|mhm|mmm|uh|um)\b")


def english(text: str) -> str:
    """Whisper's rule for English, in linear time.

    Raises:
      InputError: whisper-normalizer is not installed.
    """
    # First removes what its slow patterns would find: bracketed text, then long runs of spaces.
    text = _without_asides(unicodedata.normalize("NFC", text).lower())
    text = " ".join(_FILLERS.sub("", text).split())
    try:
        return " ".join(_whisper()(text).split())
    except (AssertionError, ValueError, IndexError, TypeError):
        return basic(text)  # its rule for numbers fails, for example with thousands of digits


@functools.cache
def _whisper() -> Callable[[str], str]:
    try:
        from whisper_normalizer.english import EnglishTextNormalizer
    except ImportError:
        raise InputError(f"english text needs whisper-normalizer: {extra('evaluate')}") from None
    whisper = EnglishTextNormalizer()
    # About fifty patterns per text; compiled here, so that re does not look them up each time.
    whisper.replacers = {re.compile(find): put for find, put in whisper.replacers.items()}
    return whisper


# --- Chinese -------------------------------------------------------------------------------------

_SAME = str.maketrans(
    "〇壹贰叁肆伍陆柒捌玖拾佰仟萬億兩貳參陸點負", "零一二三四五六七八九十百千万亿两二三六点负"
)
_DIGITS = {c: str(i) for i, c in enumerate("零一二三四五六七八九")} | {"两": "2", "幺": "1"}
_SMALL = {"百": 100, "千": 1000}
_N = "零一二三四五六七八九两十百千万亿"
_D = "零一二三四五六七八九幺"
# The digits of a decimal are said one by one; 三点五分 and 三点十五 are times of day.
_DECIMAL = re.compile(rf"(?<![{_N}])([{_N}]+)点([{_D}]+)(?![{_D}两十百千分刻钟])")
_RUN = re.compile(rf"[{_N}幺]+")
# Numbers of up to 28 digits, which a Decimal holds exactly.
_ARABIC_LARGE = re.compile(r"(?<![\d.])(\d{1,14}(?:\.\d{1,14})?)(百万|千万|万|亿)(?![万亿\d])")
_LONGEST = 60  # characters of the longest number that is converted
_LARGE = {"百万": 10**6, "千万": 10**7, "万": 10**4, "亿": 10**8}


_CHINESE = _Table(lambda c: c if c in "%‰\0\1" else _LETTERS[ord(c)])


def chinese(text: str) -> str:
    """Normalises Chinese text, which may contain Latin words."""
    text = " ".join(_folded(text).translate(_SAME).split())
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(\d{4})([-/.])(\d{1,2})\2(\d{1,2})(?![\d.])", r"\1年\3月\4日", text)
    text = re.sub(r"(?<![\d:])(\d{1,2}):(\d{2})(?![\d:])", r"\1点\2分", text)
    text = re.sub(r"(?<![\w.])[-−](?=\d)", "负", text)
    text = _numerals(text)
    text = text.replace("百分之百", "100%")
    text = re.sub(r"百分之(负?\d+(?:\.\d+)?)", r"\1%", text)
    text = re.sub(r"千分之(负?\d+(?:\.\d+)?)", r"\1‰", text)
    text = re.sub(r"(?<!\d)(\d+)分之(\d+)", r"\2/\1", text)
    # 08月 is 8月
    text = re.sub(r"(?<![\d.])\d+(?=[月日号点])", lambda m: m[0].lstrip("0") or "0", text)
    text = re.sub(r"(?<=\d点)(?:半|(\d{1,2})分(?!之))", _minutes, text)
    text = re.sub(r"\$(\d+(?:\.\d+)?)", r"\1美元", text)
    text = re.sub(r"¥(\d+(?:\.\d+)?)", r"\1元", text)
    text = text.replace("°c", "摄氏度")
    text = re.sub(r"(?<=\w)['’](?=\w)", "", text)
    text = re.sub(r"(?<=\d)[./](?=\d)", lambda m: {".": "\0", "/": "\1"}[m[0]], text)
    text = _words(text, _CHINESE).replace("\0", ".").replace("\1", "/")
    return re.sub(rf"(?<=[{_HAN}]) | (?=[{_HAN}])", "", text)


def _minutes(match: re.Match[str]) -> str:
    minutes = int(match[1] or 30)
    return str(minutes) if minutes else ""


def _numerals(text: str) -> str:
    text = re.sub(r"(?<![\d.])\d(?=[百千万亿])|(?<=[百千万亿])\d(?![\d.])", _spelt, text)
    text = _DECIMAL.sub(_decimal, text)
    text = _RUN.sub(lambda m: _run(m[0], text[m.end() : m.end() + 1]), text)
    # 35万 mixes both kinds of numerals; it becomes 350000, like 三十五万.
    return _ARABIC_LARGE.sub(lambda m: _written(Decimal(m[1]) * _LARGE[m[2]]), text)


def _spelt(match: re.Match[str]) -> str:
    return "零一二三四五六七八九"[int(match[0])]  # 3万5千 becomes 三万五千


def _decimal(match: re.Match[str]) -> str:
    whole = _cardinal(match[1])
    if whole is None:
        return match[0]
    return f"{whole}.{''.join(_DIGITS[c] for c in match[2])}"


def _run(run: str, following: str) -> str:
    value = _cardinal(run)
    if value is not None:
        return str(value)
    # 二三 alone is "two or three", and 九八年 a year; three or more digits are a number.
    clear = len(run) > 2 or following == "年" or set(run) & set("零幺")
    if clear and all(c in _DIGITS for c in run):
        return "".join(_DIGITS[c] for c in run)
    return run


def _cardinal(text: str) -> int | None:
    """The value of a numeral such as 三百零五, 十二, 两万三千, 一亿; None for other texts."""
    if len(text) > _LONGEST:
        return None
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
