"""Which content belongs to which split: rules that any component can check.

Splits differ in seeds and in content. A hash decides whether a sentence is used for training,
validation or test, and whether a pair of sound kinds is held out from training. Six voices are held
out by name (`speakers.HELD_OUT_VOICES`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

from moss_audio_jax.draw import bucket
from moss_audio_jax.errors import UsageError
from moss_audio_jax.text.labels import KINDS


@dataclasses.dataclass(frozen=True)
class Split:
    """What a scene of the split may hold.

    Attributes:
      sentences: the part to which all sentences belong: "train", "validation" or "test".
      order: the order of all sentences, one of `grammar.ORDERS`; None: all orders.
      held_out_voices: True: all speakers have held-out voices. False: none has.
      held_out_pairs: True: every scene has a held-out pair of sounds. False: none has.
      needs: content that every scene has, or None.
    """

    sentences: str
    order: str | None = None
    held_out_voices: bool = False
    held_out_pairs: bool = False
    needs: str | None = None


SPLITS = {
    "train": Split("train"),
    "validation": Split("validation"),
    "test": Split("test"),
    "test_random_order": Split("test", order="random", needs="speech"),
    "test_voices": Split("test", held_out_voices=True, needs="speech"),
    "test_combinations": Split("test", held_out_pairs=True, needs="sound"),
}


def split_named(name: str) -> Split:
    if name not in SPLITS:
        raise UsageError(f"no split {name!r} of the world; expected one of {', '.join(SPLITS)}")
    return SPLITS[name]


def sentence_part(text: str) -> str:
    """The part of a sentence as in labels: "train" (90%), "validation" (5%) or "test" (5%)."""
    at = bucket("sentence", text)
    return "train" if at < 90 else "validation" if at < 95 else "test"


def pair_held_out(kind: str, other: str) -> bool:
    """Whether no training scene contains both kinds of sound (true of 10% of the pairs)."""
    return kind != other and bucket("pair", *sorted((kind, other))) < 10


@functools.cache
def held_out_pairs() -> tuple[tuple[str, str], ...]:
    return tuple(pair for pair in itertools.combinations(sorted(KINDS), 2) if pair_held_out(*pair))
