"""Rows without sound that teach a decoder to copy, to look up and to subtract.

A decoder that only learned from clips writes down what it hears, but does not use what the question
names: nothing in a transcript must be copied from the prompt. It learns that within minutes where
the text to be found is short and drawn at random, and hardly at all where it is long
(docs/findings/2026-11-30-copying.md). So these rows come before the longer ones of `world.written`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from moss_audio_jax.draw import Draw
from moss_audio_jax.text import phrases
from moss_audio_jax.text.labels import KINDS
from moss_audio_jax.world.grammar import vocabulary

VERSION = 2

Turns = Iterator[tuple[str, str]]


def drill(index: int, seed: int = 0) -> dict[str, Any]:
    """A row as `data.records` reads it, with the task "drill": a function of its arguments.

    It has one to three turns, each about a text of its own, or several about one list.
    """
    draw = Draw("drill", VERSION, seed, index)
    conversation = []
    for _ in range(draw.integer(1, 3)):
        for question, answer in draw.choice(_MAKERS)(draw):
            for role, text in (("user", question), ("assistant", answer)):
                conversation.append({"role": role, "message_type": "text", "content": text})
    return {"conversation": conversation, "task": "drill", "id": f"drill-{seed}-{index:08d}"}


def _repeat(draw: Draw) -> Turns:
    text = " ".join(draw.choice(vocabulary()) for _ in range(draw.integer(3, 12)))
    yield f"Repeat: {text}", text


def _repeat_times(draw: Draw) -> Turns:
    text = phrases.stamped(_words(draw, draw.integer(2, 6)))
    yield f"Repeat: {text}", text


def _sounds(draw: Draw) -> Turns:
    """When is a sound heard?"""
    found = [
        (kind.label, phrases.span(_span(draw)))
        for kind in draw.sample(list(KINDS.values()), draw.integer(2, 6))
    ]
    listed = "\n".join(f"{span}: {label}" for label, span in found)
    asked = draw.sample(found, draw.integer(1, len(found)))
    for number, (label, span) in enumerate(asked):
        yield ("" if number else f"{listed}\n") + f'When is "{label}" heard?', span


def _said(draw: Draw) -> Turns:
    """When is a word said?"""
    words = _words(draw, draw.integer(3, 8))
    asked = draw.sample(words, draw.integer(1, 3))
    for number, word in enumerate(asked):
        opening = "" if number else phrases.stamped(words) + "\n"
        yield f'{opening}When is the word "{word["text"]}" said?', phrases.span(word)


def _differences(draw: Draw) -> Turns:
    for _ in range(draw.integer(2, 4)):
        start, end = sorted(round(draw.uniform(0, 12), 2) for _ in range(2))
        yield f"{end:.2f} - {start:.2f}", f"{end:.2f} - {start:.2f} = {end - start:.2f}."


_MAKERS: tuple[Callable[[Draw], Turns], ...] = (
    _repeat,
    _repeat_times,
    _sounds,
    _said,
    _differences,
)


def _words(draw: Draw, count: int) -> list[dict[str, Any]]:
    """Different words, one after the other."""
    edges = sorted(draw.uniform(0, 12) for _ in range(count + 1))
    return [
        {"text": text, "start": start, "end": end}
        for text, (start, end) in zip(
            draw.sample(vocabulary(), count), itertools.pairwise(edges), strict=True
        )
    ]


def _span(draw: Draw) -> dict[str, float]:
    start = draw.uniform(0, 12)
    return {"start": start, "end": start + draw.uniform(0.1, 4)}
