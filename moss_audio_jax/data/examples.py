"""From a row to what the model learns from: decoded sound, log-mel, token ids, labels."""

from __future__ import annotations

import dataclasses
import re

import ml_dtypes  # noqa: F401  gives np.dtype the name bfloat16
import numpy as np

from moss_audio_jax.audio import lengths, load_audio, log_mel
from moss_audio_jax.config import EncoderConfig
from moss_audio_jax.data import augment as augmenting
from moss_audio_jax.data.augment import Augment
from moss_audio_jax.data.batch import IGNORE, TrainExample, chunks_of
from moss_audio_jax.data.packing import Size
from moss_audio_jax.data.records import Clip, Rejected, Row, parse_row
from moss_audio_jax.data.sources import Location, as_file, clip_file, read_location
from moss_audio_jax.errors import InputError
from moss_audio_jax.text.prompt import build_conversation
from moss_audio_jax.text.tokenizer import Tokenizer

_DIGIT = re.compile(r"\d")


@dataclasses.dataclass(frozen=True)
class Job:
    """One example to make: its index in the mixture, where its row lies, whose row it is."""

    index: int
    location: Location
    row_id: str
    part: str


@dataclasses.dataclass(frozen=True)
class ExampleMaker:
    """Makes examples. It can be sent to a worker process; the result depends on the job alone.

    Attributes:
      tokenizer: its processor decides on time markers and on the dtype that mels are rounded to.
      encoder: decides on the number of chunks.
      room: tokens and chunks of a row of the batch.
      frames: the most that a chunk holds (of a clip, where a clip is one chunk).
      tasks: names of the tasks that are told apart: a row's "task", else its part's name.
      seed: of the augmentation.
    """

    tokenizer: Tokenizer
    encoder: EncoderConfig
    room: Size
    frames: int
    tasks: tuple[str, ...] = ()
    augment: Augment = dataclasses.field(default_factory=Augment)
    seed: int = 0

    def __call__(self, job: Job) -> TrainExample | Rejected:
        row = None
        try:
            row = parse_row(read_location(job.location))
            made = self._make(row, job)
        except (InputError, OSError) as error:
            made, bad = str(error), True
        else:
            bad = False
        if isinstance(made, TrainExample):
            return made
        path, line = job.location[:2]
        return Rejected(bad, path, line, job.row_id, made, row.id if row else None)

    def _make(self, row: Row, job: Job) -> TrainExample | str:
        """The example, or why it is too long. Raises InputError where the row is bad."""
        rng = augmenting.rng_for(self.seed, job.index)
        speed = self._speed(row, rng)
        sounds = [_load(clip, job.location.path, speed) for clip in row.clips]
        frames = [
            sound.shape[1] if sound.ndim == 2 else lengths.mel_frames(len(sound))
            for sound in sounds
        ]
        conversation = build_conversation(
            self.tokenizer, row.messages, frames, self.tokenizer.processor.time_markers
        )
        ids, answers = conversation
        # Before the mels are computed: what is dropped should cost little.
        size = Size(len(ids), chunks_of(frames, self.encoder))
        if size.tokens > self.room.tokens or size.chunks > self.room.chunks:
            return (
                f"needs {size.tokens} tokens and {size.chunks} chunks; "
                f"a row of the batch has {self.room.tokens} and {self.room.chunks}"
            )
        if self.encoder.attention != "chunked" and max(frames, default=0) > self.frames:
            return f"a clip has {max(frames)} mel frames; the batch has room for {self.frames}"
        return TrainExample(
            ids,
            tuple(self._mel(sound, rng) for sound in sounds),
            labels=np.where(answers, ids, IGNORE).astype(np.int32),
            weight=row.weight,
            task=self._task(row.task or job.part),
            row_id=job.row_id,
            index=job.index,
            seconds=sum(frames) * lengths.HOP / lengths.SAMPLE_RATE,
        )

    def _speed(self, row: Row, rng: np.random.Generator) -> float:
        if not self.augment.speeds:
            return 1.0
        speed = self.augment.speeds[rng.integers(len(self.augment.speeds))]
        texts = (m.get("content") for m in row.messages if m.get("message_type") == "text")
        return 1.0 if any(_DIGIT.search(str(text)) for text in texts) else speed

    def _mel(self, sound: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Log-mel [bins, frames] as the batch takes it: rounded, its frames contiguous."""
        if sound.ndim == 1:
            sound = log_mel(sound)
        elif sound.shape[0] != self.encoder.mel_bins:
            raise InputError(
                f"the record's log-mel has {sound.shape[0]} bins; expected {self.encoder.mel_bins}"
            )
        mel = augmenting.mask_mel(sound, self.augment, rng)
        return mel.T.astype(np.dtype(self.tokenizer.processor.mel_dtype), order="C").T

    def _task(self, name: str) -> int:
        return self.tasks.index(name) + 1 if name in self.tasks else 0


def _load(clip: Clip, row_path: str, speed: float) -> np.ndarray:
    """A waveform [n], or the log-mel [bins, frames] that a record held."""
    if isinstance(clip, np.ndarray):
        if not clip.shape[1]:
            raise InputError("the record's log-mel has no frames")
        return clip
    if isinstance(clip, str):
        clip = clip_file(clip, row_path)
    return augmenting.change_speed(load_audio(as_file(clip)), speed)
