"""Written text as it is said: lower case, words alone, numbers written out."""

from __future__ import annotations

import re
import unicodedata

from moss_audio_jax.world.lexicon import number_words

_NUMBER = re.compile(r"(?<![\w.,:])\d{1,4}(?![\w%]|[.,:]\d)")
_SIGNS = "\u2019\u2018`"  # apostrophes as people type them
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
# What may stand between words without being said.
_SILENT = re.compile(r"[\s.,;:!?\"'()\u201c\u201d\u2013\u2014\u2026-]*")


def spoken(text: str, language: str = "en") -> str | None:
    """The words of a text, joined by single spaces; None if it holds signs that may be said.

    English numbers to 9999 become words; those in other forms, such as 3D or 2.5, and all numbers
    in other languages are not known here.
    """
    text = unicodedata.normalize("NFC", text).lower()
    for sign in _SIGNS:
        text = text.replace(sign, "'")
    if language == "en":
        text = _NUMBER.sub(lambda found: f" {number_words(int(found[0]))} ", text)
    if not _SILENT.fullmatch(_WORD.sub(" ", text)):
        return None
    return " ".join(_WORD.findall(text)) or None
