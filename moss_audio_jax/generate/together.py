"""Several processes of one mesh that answer together: process 0 speaks, and all step alike.

Every process must run the same programs in the same order. An engine's turns follow from what
enters it and what is cancelled, and from nothing else: no clock, no thread, no order of a set. So
process 0 tells the others before each turn who enters and who is cancelled (`Speaker`), and they
do the same with engines of their own (`follow`).

What a guide allows is found by process 0 and told for each token. The others need no grammar, and
a guide may be anything that has the two methods.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any, NamedTuple

import numpy as np
from jax.experimental import multihost_utils

from moss_audio_jax.generate.engine import Asked, Engine, Progress
from moss_audio_jax.generate.request import Guide, Prepared
from moss_audio_jax.generate.sampling import Sampling

# Bytes of a message's first part and of the others. Each size is a program of its own.
_FIRST, _NEXT = 2**12, 2**20
_TURN = 4 * _NEXT  # bytes of requests that are told in a turn, so that sound stops nobody's tokens
_LENGTH = 8  # bytes in which a message says how long it is


class Turn(NamedTuple):
    """What happens before a step: requests that enter, then numbers that are cancelled."""

    entered: Sequence[Asked]
    cancelled: Sequence[int]


def advance(engine: Engine, cancelled: Sequence[int]) -> Iterator[Progress]:
    """Cancels, and steps if there is anything to do; what is new."""
    for progress in map(engine.cancel, cancelled):
        if progress is not None:
            yield progress
    if engine.busy:
        yield from engine.step()


class Speaker:
    """Process 0's side. Making one waits for `follow` in every other process."""

    def __init__(self) -> None:
        self._parcel: np.ndarray | None = None  # of the first in line, if it was begun
        self._sent = 0  # bytes of it
        _shared(np.zeros(_FIRST, np.uint8))  # compiles both parts

    def tell(self, line: Sequence[Asked], cancelled: Set[int]) -> Turn:
        """Tells the others what happens in this turn.

        Args:
          line: who is to enter, in order. A request enters once all of it has been told, which
            takes several turns if it has minutes of sound.
          cancelled: numbers, of which those that are in line wait until they have entered.
        """
        entered, parts, room = [], [], _TURN
        for one in line:
            if self._parcel is None:
                self._parcel, self._sent = _packed(one), 0
            part = self._parcel[self._sent : self._sent + room]
            parts.append(part)
            room, self._sent = room - len(part), self._sent + len(part)
            if self._sent < len(self._parcel):
                break
            self._parcel = None
            entered.append(one)
        waiting = {one.number for one in line[len(entered) :]}
        turn = Turn(entered, sorted(cancelled - waiting))
        head = {"entered": [_described(one) for one in entered], "cancelled": turn.cancelled}
        _shared(np.concatenate([_line(head), *parts]))
        for one in entered:
            if one.guide is not None:
                one.example = dataclasses.replace(one.example, guide=_Spoken(one.guide))
        return turn

    def end(self) -> None:
        """Lets `follow` return."""
        _shared(_line(None))


def follow(
    engine: Engine, vocab_size: int, compiling: Callable[[int, int], None] | None = None
) -> None:
    """Does what process 0 tells, until it says that it ends.

    Args:
      engine: made like that of process 0.
      vocab_size: V, of the model's logits.
      compiling: as for the `Service` of process 0.
    """
    _shared()
    if compiling is not None:
        engine.compile(compiling)
    come = bytearray()  # of requests that have not entered
    while True:
        line, _, parts = _shared().tobytes().partition(b"\n")
        turn = json.loads(line)
        if turn is None:
            return
        come += parts
        for described in turn["entered"]:
            engine.enter(_unpacked(engine, described, come, vocab_size))
        for _ in advance(engine, turn["cancelled"]):
            pass


class _Spoken:
    """A guide in process 0."""

    def __init__(self, guide: Guide) -> None:
        self._guide = guide

    def allowed(self) -> np.ndarray:
        allowed = self._guide.allowed()
        multihost_utils.broadcast_one_to_all(np.packbits(allowed))
        return allowed

    def push(self, token: int) -> None:
        self._guide.push(token)


class _Followed:
    """The same guide in another process."""

    def __init__(self, size: int) -> None:
        self._size = size

    def allowed(self) -> np.ndarray:
        bits = multihost_utils.broadcast_one_to_all(np.zeros(-(-self._size // 8), np.uint8))
        return np.unpackbits(np.asarray(bits), count=self._size).astype(bool)

    def push(self, token: int) -> None:
        """Process 0 knows."""


def _arrays(one: Asked) -> list[np.ndarray]:
    return [one.example.ids, *one.example.mels]


def _packed(one: Asked) -> np.ndarray:
    """A request's arrays one after the other, uint8 [n]."""
    arrays = map(np.ascontiguousarray, _arrays(one))
    return np.concatenate([x.reshape(-1).view(np.uint8) for x in arrays])


def _described(one: Asked) -> dict[str, Any]:
    return {
        "number": one.number,
        "each_token": one.each_token,
        "guided": one.guide is not None,
        "sampling": dataclasses.asdict(one.sampling),
        "arrays": [[str(x.dtype), x.shape] for x in _arrays(one)],
    }


def _unpacked(engine: Engine, described: dict[str, Any], come: bytearray, vocab_size: int) -> Asked:
    """A request as process 0 described it; takes its arrays from the beginning of `come`."""
    arrays = []
    for dtype, shape in described["arrays"]:
        size = np.dtype(dtype).itemsize * int(np.prod(shape))
        arrays.append(np.frombuffer(bytes(come[:size]), dtype).reshape(shape))
        del come[:size]
    sampling = Sampling(**described["sampling"])
    guide = _Followed(vocab_size) if described["guided"] else None
    prompt = Prepared(arrays[0], tuple(arrays[1:]), sampling=sampling, guide=guide)
    one = engine.asked(prompt, sampling, described["each_token"])
    one.number = described["number"]
    return one


def _line(value: Any) -> np.ndarray:
    text = json.dumps(value, default=lambda number: number.item())  # those of numpy
    return np.frombuffer(text.encode() + b"\n", np.uint8)


def _shared(data: np.ndarray | None = None) -> np.ndarray:
    """The bytes uint8 [n] that process 0 gives; the others give None. All must call it."""
    first = np.zeros(_FIRST, np.uint8)
    if data is not None:
        first[:_LENGTH] = np.frombuffer(len(data).to_bytes(_LENGTH), np.uint8)
        _fill(first[_LENGTH:], data)
    first = np.asarray(multihost_utils.broadcast_one_to_all(first))
    length = int.from_bytes(first[:_LENGTH].tobytes())
    parts = [first[_LENGTH:]]
    for start in range(_FIRST - _LENGTH, length, _NEXT):
        part = np.zeros(_NEXT, np.uint8)
        if data is not None:
            _fill(part, data[start:])
        parts.append(np.asarray(multihost_utils.broadcast_one_to_all(part)))
    return np.concatenate(parts)[:length]


def _fill(part: np.ndarray, data: np.ndarray) -> None:
    """Writes as much of `data` as there is room for."""
    count = min(len(part), len(data))
    part[:count] = data[:count]
