"""From prompts (ids and mels) to the model's batch of static shapes, for training too. numpy only.

`models.moss_audio` says what the arrays of a batch mean. Several prompts may share a row
(packing): segment s of a row is its s-th prompt, counted from 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import ml_dtypes  # noqa: F401  gives np.dtype the name bfloat16
import numpy as np

from moss_audio_jax.audio import lengths
from moss_audio_jax.config import EncoderConfig
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


@dataclasses.dataclass(frozen=True)
class Shape:
    """A batch's static shape: rows B, tokens T, chunks C of F frames in each row."""

    rows: int
    tokens: int
    chunks: int
    frames: int


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


def chunk_count(example: Example, config: EncoderConfig) -> int:
    """Chunks the encoder sees for this prompt."""
    return chunks_of([mel.shape[1] for mel in example.mels], config)


def chunks_of(mel_frames: Sequence[int], config: EncoderConfig) -> int:
    """Chunks of clips of so many mel frames."""
    if config.attention != "chunked":
        return len(mel_frames)
    return sum(-(-frames // config.chunk_frames) for frames in mel_frames)


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
    return Shape(
        rows=rows,
        tokens=bucket(max(len(e.ids) for e in examples), MIN_LENGTH),
        chunks=bucket(max(chunk_count(e, config) for e in examples)),
        frames=frames,
    )


def packed_shape(rows: Sequence[Sequence[Example]], config: EncoderConfig, prompts: int) -> Shape:
    """The bucket that holds rows of at most `prompts` examples each, packed one after the other.

    Its tokens and chunks are multiples of an eighth of what as many of the longest would need.
    """
    largest = bucket_shape([example for row in rows for example in row], config, 1)
    if prompts == 1:
        return dataclasses.replace(largest, rows=len(rows))

    def packed(most: int, size: Callable[[Example], int]) -> int:
        eighth = -(-prompts * most // 8)
        return eighth * -(-max(sum(map(size, row)) for row in rows) // eighth) if most else 0

    return Shape(
        rows=len(rows),
        tokens=packed(largest.tokens, lambda example: len(example.ids)),
        chunks=packed(largest.chunks, lambda example: chunk_count(example, config)),
        frames=largest.frames,
    )


def make_batch(
    rows: Sequence[Sequence[Example]],
    shape: Shape,
    config: EncoderConfig,
    audio_token_id: int,
    mel_dtype: str = "float32",
) -> dict[str, np.ndarray]:
    """Lays examples out in rows; rows beyond those given stay empty.

    `mel_dtype` is that of the batch's mels: where they were rounded to bfloat16 already, a bfloat16
    batch is the same at half the size.

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
        "frames": np.zeros((b, c), np.int32),
        "padded": np.zeros((b, c), np.int32),
    }
    for row, examples in enumerate(rows):
        token = chunk = 0
        for segment, example in enumerate(examples, 1):
            check(example, config, audio_token_id)
            n, n_chunks = len(example.ids), chunk_count(example, config)
            if token + n > t or chunk + n_chunks > c:
                raise InputError(
                    f"row {row} needs {token + n} tokens and {chunk + n_chunks} chunks; "
                    f"the batch has {t} and {c}"
                )
            here = slice(token, token + n)
            batch["tokens"][row, here] = example.ids
            batch["positions"][row, here] = np.arange(n)
            batch["segment_ids"][row, here] = segment
            places = token + np.flatnonzero(np.asarray(example.ids) == audio_token_id)
            batch["audio_index"][row, places] = _fill_chunks(batch, row, chunk, example, config)
            token, chunk = token + n, chunk + n_chunks
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
    batch = make_batch(rows, shape, config, audio_token_id, mel_dtype)
    b, t = shape.rows, shape.tokens
    batch["labels"] = np.full((b, t), IGNORE, np.int32)
    batch["weights"] = np.zeros((b, t), np.float32)
    batch["tasks"] = np.zeros((b, t), np.int32)
    if branched:
        batch["branch_ids"] = np.zeros((b, t), np.int32)
    if targets:
        batch |= targets.empty(b, shape.chunks, shape.frames // lengths.FRAMES_PER_TOKEN)
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
            if targets and example.mels:
                places = batch["audio_index"][row, here]
                targets.fill(batch, row, example.heard, places[places >= 0])
            token = here.stop
    return batch


def _fill_chunks(
    batch: dict[str, np.ndarray], row: int, chunk: int, example: Example, config: EncoderConfig
) -> np.ndarray:
    """Writes an example's chunks from `chunk` on; returns where its audio tokens will stand."""
    size = config.chunk_frames if config.attention == "chunked" else None
    stride = batch["mels"].shape[2] // lengths.FRAMES_PER_TOKEN  # tokens a chunk
    padded = lengths.padded_frames([mel.shape[1] for mel in example.mels], size)
    index = [np.zeros(0, np.int32)]
    for mel in example.mels:
        start = 0
        for n in lengths.chunk_frames(mel.shape[1], size or mel.shape[1]):
            batch["mels"][row, chunk, :n] = mel[:, start : start + n].T
            batch["frames"][row, chunk] = n
            batch["padded"][row, chunk] = padded
            index.append(chunk * stride + np.arange(lengths.audio_tokens(n)))
            start, chunk = start + n, chunk + 1
    return np.concatenate(index)
