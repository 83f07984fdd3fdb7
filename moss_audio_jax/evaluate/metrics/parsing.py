"""Parses a model's output by the strict rule, depending on the kind of item."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moss_audio_jax.evaluate.metrics.caption import read_fields
from moss_audio_jax.evaluate.metrics.choice import read_choice
from moss_audio_jax.text.prompt import THINK, split_thinking
from moss_audio_jax.text.timestamps import parse_timestamps

# "error" means that there is no output at all.
STATUSES = ("ok", "unparsed", "empty", "truncated_thinking", "error")


def parse(kind: str, reference: Mapping[str, Any], raw: str) -> tuple[Any, str]:
    """(parsed, status) of an output, which includes its thinking block.

    Args:
      kind: of the `Item`.
      reference: of the `Item`; used only for the choices of a multiple choice and for the form of a
        caption.

    Returns:
      parsed: choice: the choice's text; timestamps and events: a list of {"start", "end", "text"};
        caption: {field: text}; asr, open and free captions: the text. None if the status is not
        "ok".
      status: one of STATUSES.
    """
    thinking, answer = split_thinking(raw)
    answer = answer.strip()
    if not answer:
        cut = thinking is not None and THINK[1] not in raw
        return None, "truncated_thinking" if cut else "empty"
    parsed: Any = answer
    if kind == "choice":
        parsed = read_choice(answer, reference["choices"])
    elif kind in ("timestamps", "events"):
        parsed = [dict(vars(segment)) for segment in parse_timestamps(answer)] or None
    elif kind == "caption" and "sources" not in reference:
        parsed = read_fields(answer)
    return parsed, "unparsed" if parsed is None else "ok"
