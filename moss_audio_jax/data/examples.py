"""Makes training examples from rows: decoded sound, log-mel, token ids, labels."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

import ml_dtypes  # noqa: F401  gives np.dtype the name bfloat16
import numpy as np

from moss_audio_jax.audio import lengths, load_audio, log_mel
from moss_audio_jax.config import EncoderConfig
from moss_audio_jax.data import augment as augmenting
from moss_audio_jax.data.augment import Augment
from moss_audio_jax.data.batch import IGNORE, TrainExample, pieces_of, token_counts
from moss_audio_jax.data.loader_config import Pick
from moss_audio_jax.data.packing import Room, strips_of
from moss_audio_jax.data.records import (
    Branch,
    Clip,
    Rejected,
    Row,
    Span,
    id_of,
    parse_row,
    reason_of,
)
from moss_audio_jax.data.sources import (
    Location,
    SourceError,
    as_file,
    clip_file,
    read_location,
)
from moss_audio_jax.data.targets import Heard, Targets, time_places
from moss_audio_jax.errors import InputError
from moss_audio_jax.text.prompt import build_branches, build_conversation
from moss_audio_jax.text.tokenizer import Tokenizer

_DIGIT = re.compile(r"\d")
_LOUDEST = 1000  # of a log-mel, whose values are a few units


@dataclasses.dataclass(frozen=True)
class Job:
    """One example to make: its index in the mixture, the location of its row, and its part."""

    index: int
    location: Location
    row_id: str
    part: str


@dataclasses.dataclass(frozen=True)
class ExampleMaker:
    """Makes examples. It can be sent to a worker process; the result depends on the job alone.

    Attributes:
      tokenizer: its processor decides on the dtype that mels are rounded to.
      encoder: decides which pieces of sound are heard by themselves.
      room: of a row of the batch.
      tasks: names of the tasks that are told apart: a row's "task", else its part's name.
      seed: of the augmentation and of the choice of branches.
      branches, pick, time_markers: see LoaderConfig.
      targets: what the helper losses need besides; None: nothing.
    """

    tokenizer: Tokenizer
    encoder: EncoderConfig
    room: Room
    tasks: tuple[str, ...] = ()
    augment: Augment = dataclasses.field(default_factory=Augment)
    seed: int = 0
    branches: int = 1
    pick: tuple[Pick, ...] = (Pick(".*", 1.0),)
    targets: Targets | None = None
    time_markers: bool = True

    def __call__(self, job: Job) -> TrainExample | Rejected:
        """The example, or the reason why there is none. No fault of a row ends the run.

        Raises:
          SourceError: the file that holds the row cannot be read.
        """
        data = b""
        try:
            data = read_location(job.location)
            row = parse_row(data)
            made = self.make(row, job)
        except SourceError:
            raise
        except Exception as error:
            return rejected(job, reason_of(error), id_of(data))
        if isinstance(made, TrainExample):
            return made
        return rejected(job, made, row.id, bad=False)

    def make(self, row: Row, job: Job) -> TrainExample | str:
        """The example, or why it is too long. Raises InputError if the row is bad."""
        rng = augmenting.rng_for(self.seed, job.index)
        chosen = self.chosen(row, job.index)
        speed = self._speed(row, chosen, rng)
        sounds, frames = [], []
        for number, clip in enumerate(row.clips, 1):
            sound = _load(clip, job.location.path, speed)
            sounds.append(sound)
            frames.append(sound.shape[1] if sound.ndim == 2 else lengths.mel_frames(len(sound)))
            chunks = self._strips(frames)
            if number < len(row.clips) and chunks > self.room.strips:  # enough is in memory
                return (
                    f"{number} of its {len(row.clips)} clips need {chunks} chunks; a row of the "
                    f"batch has {self.room.strips}"
                )
        said = self._said(row, chosen, job, frames)
        # Before the mels are computed, so that dropped rows cost little.
        tokens, chunks = len(said.ids), self._strips(frames)
        if tokens > self.room.tokens or chunks > self.room.strips:
            return (
                f"needs {tokens} tokens and {chunks} chunks; "
                f"a row of the batch has {self.room.tokens} and {self.room.strips}"
            )
        longest = self.room.length * lengths.FRAMES_PER_TOKEN
        if self.encoder.attention != "chunked" and max(frames, default=0) > longest:
            return f"a clip has {max(frames)} mel frames; the batch has room for {longest}"
        return TrainExample(
            **said._asdict(),
            mels=tuple(self._mel(sound, rng) for sound in sounds),
            row_id=job.row_id,
            index=job.index,
            seconds=sum(frames) * lengths.HOP / lengths.SAMPLE_RATE,
            heard=self._heard(_at_speed(row, speed), frames) if self.targets else None,
            time_places=self._time_places(said) if self.targets else None,
        )

    def _strips(self, frames: list[int]) -> int:
        return strips_of(token_counts(pieces_of(frames, self.encoder)), self.room)

    def _said(self, row: Row, chosen: list[Branch], job: Job, frames: list[int]) -> _Said:
        """Ids and labels; for a row with branches, those of the chosen branches."""
        markers = self.time_markers
        if row.branches and self.branches != 1:
            messages = [branch.messages for branch in chosen]
            opening, parts = build_branches(self.tokenizer, row.messages, messages, frames, markers)
        else:
            messages = [*row.messages, *(m for branch in chosen for m in branch.messages)]
            opening = np.zeros(0, np.int32)
            parts = [build_conversation(self.tokenizer, messages, frames, markers)]
            chosen = chosen or [Branch(messages)]
        said = [_arrays(opening, np.zeros(len(opening), bool), 0, 0, 0, 0)]
        for number, (branch, part) in enumerate(zip(chosen, parts, strict=True), 1):
            task = self._task(branch.task or row.task or job.part)
            weight = row.weight * branch.weight
            if row.branches:
                weight *= self.rule(branch).weight
            shared = len(opening)
            said.append(_arrays(*part, weight, task, shared, number if shared else 0))
        return _Said(*(np.concatenate(arrays) for arrays in zip(*said, strict=True)))

    def _heard(self, row: Row, frames: Sequence[int]) -> Heard:
        chunks = token_counts(pieces_of(frames, self.encoder))
        return self.targets.heard(row, self.tokenizer, chunks)

    def _time_places(self, said: _Said) -> np.ndarray | None:
        if not self.targets.times:
            return None
        return time_places(said.ids, said.labels != IGNORE, self.tokenizer)

    def chosen(self, row: Row, index: int) -> list[Branch]:
        """Up to `branches` branches of the row that stands at `index`, drawn without replacement by
        the weights of `pick`."""
        if not row.branches:
            return []
        rng = np.random.default_rng([self.seed, index, 1])
        weights = np.array([self.rule(branch).often for branch in row.branches])
        # Efraimidis and Spirakis 2006: the largest u^(1/w) are a weighted sample.
        with np.errstate(divide="ignore"):
            keys = np.log(rng.random(len(weights))) / weights
        order = [int(i) for i in np.argsort(-keys, kind="stable") if weights[i] > 0]
        if self.branches and not order:
            raise InputError("data.pick takes none of the row's branches")
        return [row.branches[i] for i in order[: self.branches]]

    def rule(self, branch: Branch) -> Pick:
        """How often a branch is drawn, and what it weighs."""
        return _rule(self.pick, branch.task or "")

    def _speed(self, row: Row, chosen: list[Branch], rng: np.random.Generator) -> float:
        if not self.augment.speeds:
            return 1.0
        speed = self.augment.speeds[rng.integers(len(self.augment.speeds))]
        messages = [*row.messages, *(m for branch in chosen for m in branch.messages)]
        texts = (m.get("content") for m in messages if m.get("message_type") == "text")
        return 1.0 if any(_DIGIT.search(str(text)) for text in texts) else speed

    def _mel(self, sound: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Log-mel [bins, frames] as the batch takes it: rounded, its frames contiguous."""
        if sound.ndim == 1:
            sound = log_mel(sound)
        elif sound.shape[0] != self.encoder.mel_bins:
            raise InputError(
                f"the record's log-mel has {sound.shape[0]} bins; expected {self.encoder.mel_bins}"
            )
        mel = augmenting.mask_mel(augmenting.warp_mel(sound, self.augment, rng), self.augment, rng)
        if not (mel.min() >= -_LOUDEST and mel.max() <= _LOUDEST):  # NaN is neither
            raise InputError(
                f"the log-mel holds values that are NaN or beyond {_LOUDEST} in magnitude"
            )
        return mel.T.astype(np.dtype(self.tokenizer.processor.mel_dtype), order="C").T

    def _task(self, name: str) -> int:
        return self.tasks.index(name) + 1 if name in self.tasks else 0


def rejected(job: Job, reason: str, row_id: str | None = None, bad: bool = True) -> Rejected:
    """A job's row as one that gives no example; `row_id` is the row's own."""
    path, line = job.location[:2]
    return Rejected(bad, path, line, job.row_id, reason, row_id)


@functools.lru_cache(4096)
def _rule(pick: tuple[Pick, ...], task: str) -> Pick:
    """The first rule that finds a task."""
    return next((rule for rule in pick if re.search(rule.rule, task)), Pick("", 0.0))


def _at_speed(row: Row, speed: float) -> Row:
    """The row with the times of its words and tags scaled by the clip's speed."""
    if speed == 1 or any(isinstance(clip, np.ndarray) for clip in row.clips):  # a mel keeps its own
        return row

    def moved(spans: tuple[Span, ...] | None) -> tuple[Span, ...] | None:
        return spans and tuple(Span(text, s / speed, e / speed) for text, s, e in spans)

    return dataclasses.replace(row, words=moved(row.words), tags=moved(row.tags))


class _Said(NamedTuple):
    """Arrays [L] of an example; see `TrainExample`."""

    ids: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    tasks: np.ndarray
    positions: np.ndarray
    branches: np.ndarray


def _arrays(
    ids: np.ndarray, answers: np.ndarray, weight: float, task: int, first: int, branch: int
) -> _Said:
    return _Said(
        ids,
        labels=np.where(answers, ids, IGNORE).astype(np.int32),
        weights=np.where(answers, weight, 0).astype(np.float32),
        tasks=np.full(len(ids), task, np.int32),
        positions=first + np.arange(len(ids), dtype=np.int32),
        branches=np.full(len(ids), branch, np.int32),
    )


def _load(clip: Clip, row_path: str, speed: float) -> np.ndarray:
    """A waveform [n], or the log-mel [bins, frames] that a record held."""
    if isinstance(clip, np.ndarray):
        if not clip.shape[1]:
            raise InputError("the record's log-mel has no frames")
        return clip
    if isinstance(clip, str):
        clip = clip_file(clip, row_path)
    return augmenting.change_speed(load_audio(as_file(clip)), speed)
