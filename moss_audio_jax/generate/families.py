"""Finds prompts that ask about the same sound; their shared beginning is prefilled once.

numpy only. Numbers of prompts here are those of the requests in `Engine.run`.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from moss_audio_jax.config import EncoderConfig
from moss_audio_jax.data.batch import Example, bucket, size_of

PREFILL_TOKENS = 16384  # padded tokens that go through the decoder together, at most


class Family(NamedTuple):
    """Prompts whose first `shared` tokens are the same and hold the same clips.

    All clips are in those tokens, and each member has tokens of its own after them. A prompt
    without siblings is a family of one that shares 0 tokens.
    """

    members: list[int]
    shared: int


def find_families(examples: Sequence[Example], audio_token_id: int) -> list[Family]:
    """Puts every prompt in one family. Clips are the same if they are one array or equal arrays."""
    alike: dict[Hashable, list[int]] = defaultdict(list)  # by the ids up to the last placeholder
    for number, example in enumerate(examples):
        ids = np.asarray(example.ids, np.int32)
        end = 1 + max(np.flatnonzero(ids == audio_token_id), default=-1)
        own = not example.mels or end in (0, len(ids))
        alike[number if own else ids[:end].tobytes()].append(number)

    digests: dict[int, bytes] = {}  # of arrays that live as long as `examples`

    def digest(mel: np.ndarray) -> bytes:
        if id(mel) not in digests:
            values = np.ascontiguousarray(mel)
            content = hashlib.blake2b(values.view(np.uint8).data, digest_size=32)
            content.update(f"{values.dtype} {values.shape}".encode())
            digests[id(mel)] = content.digest()
        return digests[id(mel)]

    families = []
    for numbers in alike.values():
        by_clips: dict[Hashable, list[int]] = defaultdict(list)
        for number in numbers:
            by_clips[tuple(map(id, examples[number].mels))].append(number)
        if len(by_clips) > 1:  # clips of one length, or one clip loaded again
            by_clips = defaultdict(list)
            for number in numbers:
                by_clips[tuple(map(digest, examples[number].mels))].append(number)
        for members in by_clips.values():
            families.append(Family(members, _shared([examples[i].ids for i in members])))
    return families


def _shared(prompts: Sequence[np.ndarray]) -> int:
    """How many first tokens all prompts share, never all of a prompt; 0 for a single prompt."""
    if len(prompts) == 1:
        return 0
    shared = min(map(len, prompts)) - 1
    first = np.asarray(prompts[0])[:shared]
    for other in prompts[1:]:
        differ = np.flatnonzero(first[:shared] != np.asarray(other)[:shared])
        shared = int(differ[0]) if len(differ) else shared
    return shared


class Queue:
    """Families to prefill. Costly prompts come first, so that neighbours share a bucket and short
    ones fill the end. Prompts with siblings and prompts without them have separate queues."""

    def __init__(
        self, examples: Sequence[Example], encoder: EncoderConfig, audio_token_id: int
    ) -> None:
        def cost(number: int) -> tuple[int, int]:
            return sum(size_of(examples[number].mels, encoder)), len(examples[number].ids)

        families = [
            Family(sorted(family.members, key=cost, reverse=True), family.shared)
            for family in find_families(examples, audio_token_id)
        ]
        families.sort(key=lambda family: cost(family.members[0]), reverse=True)
        self._examples, self._cost = examples, cost
        self._lines = [
            [family for family in families if family.shared == 0],
            [family for family in families if family.shared > 0],
        ]

    def __bool__(self) -> bool:
        return any(self._lines)

    def take(self, free: int) -> list[Family]:
        """Families to prefill together, either all of one member or all of several: as many as the
        memory of a prefill allows, and none that is not needed to fill the `free` slots."""
        line = max(filter(None, self._lines), key=lambda line: self._cost(line[0].members[0]))
        # A queue is sorted by falling cost, so its first family sets the bucket for the others.
        width = bucket(line[0].shared or len(self._examples[line[0].members[0]].ids), 128)
        taken: list[Family] = []
        while line and free > 0 and len(taken) < max(1, PREFILL_TOKENS // width):
            taken.append(line.pop(0))
            free -= len(taken[-1].members)
        return taken
