"""From prompts (ids and mels) to the model's batch of static shapes, for training too. numpy only.

`models.moss_audio` says what the arrays of a batch mean. Several prompts may share a row
(packing): segment s of a row is its s-th prompt, counted from 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import ml_dtypes  # noqa: F401  gives np.dtype the name bfloat16
import numpy as np

from moss_audio_jax.audio import lengths
from moss_audio_jax.config import EncoderConfig
from moss_audio_jax.data.packing import Place, Room, place, strips_of
from moss_audio_jax.data.targets import IGNORE, Heard, Targets
from moss_audio_jax.errors import InputError

# Lengths are rounded up to powers of two and the halves between them, so that few programs are
# compiled and at most a third of a row is padding.
MIN_LENGTH = 128


@dataclasses.dataclass(frozen=True)
class Example:
    """One prompt: token ids int [L] and the log-mels [128, n] of its clips, in order."""

    ids: np.ndarray
    mels: tuple[np.ndarray, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainExample(Example):
    """A conversation to learn from.

    Attributes:
      labels: int32 [L], `ids` where the answers are, else IGNORE.
      weights: float [L] or one for all, of the labels in the loss.
      tasks: int [L] or one for all, 1 for the first of the tasks that are told apart, ...; 0 for
        any other.
      row_id: the row it was made of, "part:row".
      index: where it stands in the mixture.
      seconds: of sound.
      positions: int32 [L], 0, 1, ... along each conversation; None: there is only one.
      branches: int32 [L], 0 for what all its conversations share, else the conversation, from 1 on.
      heard: what the helper losses learn from its clip.
      time_places: int8 [L], see `data.targets`; None: not needed.
    """

    labels: np.ndarray
    weights: np.ndarray | float
    tasks: np.ndarray | int
    row_id: str
    index: int
    seconds: float
    positions: np.ndarray | None = None
    branches: np.ndarray | None = None
    heard: Heard | None = None
    time_places: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Shape:
    """A batch's static shape: rows B, tokens T, strips C of F mel frames in each row."""

    rows: int
    tokens: int
    chunks: int
    frames: int

    def room(self, share: bool = True) -> Room:
        """What a row of it holds."""
        return Room(self.tokens, self.chunks, self.frames // lengths.FRAMES_PER_TOKEN, share)


def check(example: Example, config: EncoderConfig, audio_token_id: int) -> None:
    """Raises InputError unless the placeholders are as many as the clips have tokens."""
    for number, mel in enumerate(example.mels, 1):
        if mel.ndim != 2 or mel.shape[0] != config.mel_bins or mel.shape[1] == 0:
            raise InputError(
                f"clip {number}: log-mel has shape {list(mel.shape)}; "
                f"expected [{config.mel_bins}, frames] with at least one frame"
            )
    found = int(np.sum(np.asarray(example.ids) == audio_token_id))
    expected = sum(lengths.audio_tokens(mel.shape[1]) for mel in example.mels)
    if found != expected:
        raise InputError(
            f"the prompt holds {found} audio placeholders (id {audio_token_id}) but its "
            f"{len(example.mels)} clip(s) make {expected} audio tokens"
        )


def pieces_of(mel_frames: Sequence[int], config: EncoderConfig) -> list[int]:
    """The mel frames of each piece into which the encoder cuts clips of `mel_frames`, in order."""
    size = config.chunk_frames if config.attention == "chunked" else None
    return [n for frames in mel_frames for n in lengths.chunk_frames(frames, size or frames)]


def token_counts(pieces: Sequence[int]) -> tuple[int, ...]:
    """The audio tokens of each piece, from its mel frames."""
    return tuple(lengths.audio_tokens(n) for n in pieces)


def size_of(mels: Sequence[np.ndarray], config: EncoderConfig) -> tuple[int, ...]:
    """The audio tokens of each piece of some clips [128, n]."""
    return token_counts(pieces_of([mel.shape[1] for mel in mels], config))


def token_frames(frames: np.ndarray | int, tokens: int) -> np.ndarray:
    """The mel frames behind each of a piece's first `tokens` audio tokens.

    Args:
      frames: int [...], the frames of the piece that the convolutions see, padding included.

    Returns:
      int32 [..., tokens], 0 to 8.
    """
    before = lengths.FRAMES_PER_TOKEN * np.arange(tokens)
    left = np.asarray(frames)[..., None] - before
    return left.clip(0, lengths.FRAMES_PER_TOKEN).astype(np.int32)


def bucket(n: int, smallest: int = 1) -> int:
    """The smallest 2^k or 3 * 2^(k-1) that is >= n and >= smallest; 0 stays 0."""
    if n == 0:
        return 0
    power = 1 << max(n - 1, smallest - 1, 0).bit_length()
    middle = power // 4 * 3
    return middle if middle >= max(n, smallest) else power


def bucket_shape(examples: Sequence[Example], config: EncoderConfig, rows: int) -> Shape:
    """The bucket that holds each example in a row of its own."""
    longest = max((mel.shape[1] for e in examples for mel in e.mels), default=0)
    frames = config.chunk_frames
    if config.attention != "chunked":
        frames = frames * bucket(-(-longest // frames))
    shape = Shape(
        rows=rows,
        tokens=bucket(max(len(e.ids) for e in examples), MIN_LENGTH),
        chunks=0,
        frames=frames,
    )
    strips = max(strips_of(size_of(e.mels, config), shape.room()) for e in examples)
    return dataclasses.replace(shape, chunks=bucket(strips))


def make_batch(
    rows: Sequence[Sequence[Example]],
    shape: Shape,
    config: EncoderConfig,
    audio_token_id: int,
    mel_dtype: str = "float32",
    share: bool = True,
) -> dict[str, np.ndarray]:
    """Lays examples out in rows; rows beyond those given stay empty.

    `mel_dtype` is that of the batch's mels: where they were rounded to bfloat16 already, a bfloat16
    batch is the same at half the size. With `share`, pieces of sound may share a strip.

    Raises:
      InputError: an example's placeholders and clips disagree, or a row does not fit `shape`.
    """
    b, t, c, f = shape.rows, shape.tokens, shape.chunks, shape.frames
    batch = {
        "tokens": np.zeros((b, t), np.int32),
        "positions": np.zeros((b, t), np.int32),
        "segment_ids": np.zeros((b, t), np.int32),
        "audio_index": np.full((b, t), -1, np.int32),
        "mels": np.zeros((b, c, f, config.mel_bins), np.dtype(mel_dtype)),
        "frames": np.zeros((b, c, f // lengths.FRAMES_PER_TOKEN), np.int32),
    }
    room = shape.room(share)
    for row, examples in enumerate(rows):
        places = place([n for example in examples for n in size_of(example.mels, config)], room)
        tokens = sum(len(example.ids) for example in examples)
        strips = 1 + max((each.strip for each in places), default=-1)
        if tokens > t or strips > c:
            raise InputError(
                f"row {row} needs {tokens} tokens and {strips} chunks; the batch has {t} and {c}"
            )
        token, left = 0, iter(places)
        for segment, example in enumerate(examples, 1):
            check(example, config, audio_token_id)
            n = len(example.ids)
            here = slice(token, token + n)
            batch["tokens"][row, here] = example.ids
            batch["positions"][row, here] = np.arange(n)
            batch["segment_ids"][row, here] = segment
            at = token + np.flatnonzero(np.asarray(example.ids) == audio_token_id)
            batch["audio_index"][row, at] = _fill_strips(batch, row, left, example, config)
            token += n
    return batch


def make_train_batch(
    rows: Sequence[Sequence[TrainExample]],
    shape: Shape,
    config: EncoderConfig,
    audio_token_id: int,
    mel_dtype: str = "float32",
    branched: bool = False,
    targets: Targets | None = None,
) -> dict[str, np.ndarray]:
    """`make_batch` and what a loss needs, each label standing at its own token (not shifted):

    labels      int32 [B, T]    the token where it is to be learned, else IGNORE
    weights     float32 [B, T]  the label's weight; 0 where there is none
    tasks       int32 [B, T]    the example's task at all of its tokens; 0 in padding
    branch_ids  int32 [B, T]    with `branched`: see TrainExample.branches

    and with `targets` the arrays that `data.targets` describes.
    """
    share = targets is None or targets.share
    batch = make_batch(rows, shape, config, audio_token_id, mel_dtype, share)
    b, t = shape.rows, shape.tokens
    batch["labels"] = np.full((b, t), IGNORE, np.int32)
    batch["weights"] = np.zeros((b, t), np.float32)
    batch["tasks"] = np.zeros((b, t), np.int32)
    if branched:
        batch["branch_ids"] = np.zeros((b, t), np.int32)
    if targets:
        batch |= targets.empty(b, shape.chunks, shape.frames // lengths.FRAMES_PER_TOKEN)
    if targets and targets.times:
        batch["time_places"] = np.full((b, t), IGNORE, np.int8)
    for row, examples in enumerate(rows):
        token = 0
        for example in examples:
            here = slice(token, token + len(example.ids))
            batch["labels"][row, here] = example.labels
            batch["weights"][row, here] = np.where(example.labels != IGNORE, example.weights, 0)
            batch["tasks"][row, here] = example.tasks
            if example.positions is not None:
                batch["positions"][row, here] = example.positions
            if branched and example.branches is not None:
                batch["branch_ids"][row, here] = example.branches
            if targets and targets.times:
                batch["time_places"][row, here] = example.time_places
            if targets and example.mels:
                places = batch["audio_index"][row, here]
                targets.fill(batch, row, example.heard, places[places >= 0])
            token = here.stop
    return batch


def _fill_strips(
    batch: dict[str, np.ndarray],
    row: int,
    places: Iterator[Place],
    example: Example,
    config: EncoderConfig,
) -> np.ndarray:
    """Writes an example's sound to the next `places`; returns where its audio tokens will stand."""
    stride = batch["frames"].shape[2]  # tokens a strip
    clips = [mel.shape[1] for mel in example.mels]
    padded = lengths.padded_frames(
        clips, config.chunk_frames if config.attention == "chunked" else None
    )
    index = [np.zeros(0, np.int32)]
    for mel, frames in zip(example.mels, clips, strict=True):
        start = 0
        for n in pieces_of([frames], config):
            strip, first = next(places)
            tokens = first + np.arange(lengths.audio_tokens(n))
            frame = first * lengths.FRAMES_PER_TOKEN
            batch["mels"][row, strip, frame : frame + n] = mel[:, start : start + n].T
            batch["frames"][row, strip, tokens] = token_frames(padded, len(tokens))
            index.append(strip * stride + tokens)
            start += n
    return np.concatenate(index)
