"""Scores captions without a judge: fields of a speech caption, sources that a caption names."""

from __future__ import annotations

import collections
import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

from moss_audio_jax.evaluate import text_norm

_TRIED = 50  # braces tried; each attempt may read to the end of the answer


def read_fields(answer: str) -> dict[str, str] | None:
    """The fields of a caption: a JSON object, which may be surrounded by words or a code fence.

    Returns:
      name in lower case -> text; null values are left out, lists and numbers become text. None if
      there is no JSON object, or too many braces precede it.
    """
    decoder = json.JSONDecoder(strict=False)
    for match in itertools.islice(re.finditer(r"\{", answer), _TRIED):
        try:
            found, _ = decoder.raw_decode(answer, match.start())
        except (ValueError, RecursionError):
            continue
        return {
            str(name).strip().lower(): value if isinstance(value, str) else _as_text(value)
            for name, value in found.items()
            if value is not None
        }
    return None


def field_score(reference: Any, said: str | None) -> float:
    """F1 of the words (Chinese: characters) that a field's text shares with the reference's.

    1 for the same words; 0 if no word is shared or the field is missing.
    """
    true = collections.Counter(text_norm.plain_units(_as_text(reference)))
    found = collections.Counter(text_norm.plain_units(said or ""))
    total = true.total() + found.total()
    return 2 * (true & found).total() / total if total else 1.0


def named(sources: Sequence[Sequence[str]], answer: str) -> int:
    """The number of sources that an answer names, as whole words; a source has several names."""
    said = f" {' '.join(text_norm.plain_units(answer))} "
    return sum(
        any(f" {' '.join(text_norm.plain_units(name))} " in said for name in names)
        for names in sources
    )


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return ", ".join(one if isinstance(one, str) else _as_json(one) for one in value)
    return _as_json(value)


def _as_json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        return ""
