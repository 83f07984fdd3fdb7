"""The settings of batches: one frozen dataclass, checked before anything is read."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from moss_audio_jax.config import EncoderConfig
from moss_audio_jax.data.augment import Augment
from moss_audio_jax.data.batch import Shape
from moss_audio_jax.data.packing import Room
from moss_audio_jax.data.targets import Targets
from moss_audio_jax.errors import UsageError

_MAX_STREAMS = 8


class Pick(NamedTuple):
    """For branches whose task matches the regex `rule`: how `often` they are drawn, and their
    `weight`."""

    rule: str
    often: float
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class LoaderConfig:
    """How batches are made.

    Attributes:
      batch: rows of the global batch, B.
      length: tokens of a row, T.
      chunks: strips of sound in a row, C (4 s each with chunked attention). What is shorter than
        its strip shares it with others. About length / 64 fits speech-like mixtures.
      frames: mel frames of a strip, F; None: the encoder's chunk_frames. Give it for full and
        sliding attention, a multiple of 8: longer clips are dropped as over-long.
      packing: several examples in a row; else one.
      row_examples: the most examples that a packed row holds; 0: any number.
      seed: of the order and of the augmentation.
      streams: S; None: the largest divisor of `batch` up to 8. It must divide the batch and be a
        multiple of the number of processes, and must not change when a run is continued.
      window: examples that are packed together.
      workers: processes that decode; 0: the reading thread does it.
      ahead: batches that are kept ready.
      max_bad_share: of the rows seen; more bad ones stop the run,
      min_seen: once so many rows were seen (by one process).
      row_seconds: the most that reading and making one example may take: a row that takes longer is
        bad.
      tasks: names of the tasks that the batch's `tasks` tells apart, from 1 on.
      time_markers: write the seconds between the audio placeholders of a prompt.
      augment: see Augment.
      branches: of a row that has several, so many are learned at a visit, behind one clip; 0: none
        of them (for the helper losses of an encoder alone).
      pick: by which weights branches are drawn, and what they weigh in the loss; the first rule
        that matches a branch's task wins, no match is never.
      words: most pieces of words that a chunk's helper target may hold; 0: no such targets.
      tags: names of the tags that helper targets tell apart.
      times: whether the digits of times in answers are helper targets.
    """

    batch: int
    length: int
    chunks: int
    frames: int | None = None
    packing: bool = True
    row_examples: int = 0
    seed: int = 0
    streams: int | None = None
    window: int = 64
    workers: int = 0
    ahead: int = 2
    max_bad_share: float = 0.05
    min_seen: int = 100
    row_seconds: float = 60.0
    tasks: tuple[str, ...] = ()
    time_markers: bool = True
    augment: Augment = dataclasses.field(default_factory=Augment)
    branches: int = 1
    pick: tuple[Pick, ...] = (Pick(".*", 1.0),)
    words: int = 0
    tags: tuple[str, ...] = ()
    times: bool = False

    def stream_count(self) -> int:
        if self.streams is not None:
            return self.streams
        return max(n for n in range(1, _MAX_STREAMS + 1) if self.batch % n == 0)

    def validate(self, encoder: EncoderConfig, process_count: int = 1) -> None:
        """Raises UsageError naming the first key with an impossible value."""
        least = {"batch": 1, "length": 1, "chunks": 0, "window": 1, "workers": 0, "ahead": 1}
        least |= {"min_seen": 1, "seed": 0, "branches": 0, "words": 0, "row_examples": 0}
        if self.streams is not None:
            least["streams"] = 1
        for key, low in least.items():
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise UsageError(f"data.{key} is {value!r}; expected an integer of at least {low}")
        if not 0 <= self.max_bad_share <= 1:
            raise UsageError(f"data.max_bad_share is {self.max_bad_share!r}; expected 0 to 1")
        seconds = self.row_seconds
        if type(seconds) not in (int, float) or not 0 < seconds < math.inf:
            raise UsageError(f"data.row_seconds is {seconds!r}; expected seconds above 0")
        streams = self.stream_count()
        if self.batch % streams:
            raise UsageError(f"data.streams {streams} does not divide data.batch {self.batch}")
        if streams % process_count:
            raise UsageError(
                f"data.streams {streams} is not a multiple of the {process_count} processes; set "
                f"data.streams to one that divides data.batch {self.batch}"
            )
        frames = self.chunk_frames(encoder)
        if frames % 8 or frames < 8:
            raise UsageError(f"data.frames is {frames}; expected a multiple of 8")
        if encoder.attention == "chunked" and frames != encoder.chunk_frames:
            raise UsageError(
                f"data.frames is {frames}; chunked attention has {encoder.chunk_frames} a chunk"
            )

    def chunk_frames(self, encoder: EncoderConfig) -> int:
        return encoder.chunk_frames if self.frames is None else self.frames

    def room(self, encoder: EncoderConfig) -> Room:
        """What a row holds."""
        targets = self.targets()
        room = self.shape(encoder).room(share=targets is None or targets.share)
        return dataclasses.replace(room, examples=self.row_examples)

    def targets(self) -> Targets | None:
        """What the helper losses learn from; None: nothing."""
        needed = self.words or self.tags or self.times
        return Targets(self.words, self.tags, self.times) if needed else None

    def shape(self, encoder: EncoderConfig, process_count: int = 1) -> Shape:
        """The static shape of one process's part of a batch."""
        return Shape(
            rows=self.batch // process_count,
            tokens=self.length,
            chunks=self.chunks,
            frames=self.chunk_frames(encoder),
        )
