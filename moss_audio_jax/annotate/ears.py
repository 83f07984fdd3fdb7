"""Runs the small model on sound: the word piece that is said and the tags, for each 80 ms."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moss_audio_jax.annotate.posteriors import Posteriors
from moss_audio_jax.api import MossAudio, Request
from moss_audio_jax.audio.features import log_mel
from moss_audio_jax.audio.lengths import FRAMES_PER_TOKEN, HOP, SAMPLE_RATE, audio_tokens
from moss_audio_jax.audio.windows import quiet_windows
from moss_audio_jax.buckets import as_path
from moss_audio_jax.data.batch import token_frames
from moss_audio_jax.errors import InputError
from moss_audio_jax.files import open_regular
from moss_audio_jax.generate.familiarity import Familiarity, Gauge, Measures
from moss_audio_jax.generate.sampling import Sampling
from moss_audio_jax.models.encoder import encode
from moss_audio_jax.text.tasks import TRANSCRIBE
from moss_audio_jax.weights.helpers import load_helpers

TOKEN = FRAMES_PER_TOKEN * HOP / SAMPLE_RATE  # seconds
GRID = 25.0  # frames per second of the posteriors
_BUCKETS = (1, 4, 16, 64)  # chunks encoded together


class Heard(NamedTuple):
    """The small model's output for one clip.

    starts: float64 [T], the start of each token in seconds. Tokens are not evenly spaced, because
      chunks are cut at quiet places.
    log_probs: float32 [T, V + 1] of pieces, the blank last; None without that head.
    tags: float32 [T, K] probabilities; None without that head.
    entropy: float32 [T] of the pieces, nats; states: float32 [T, D] of the layer by which
      familiarity is judged; None if the checkpoint has no data for that.
    """

    starts: np.ndarray
    log_probs: np.ndarray | None
    tags: np.ndarray | None
    entropy: np.ndarray | None = None
    states: np.ndarray | None = None


class Ears:
    """A checkpoint with helper projections (`weights.helpers`). Make one with `Ears.load`."""

    def __init__(
        self,
        model: MossAudio,
        helpers: dict[str, np.ndarray],
        tags: tuple[str, ...],
        gauge: Gauge | None = None,
    ):
        self.model = model
        self.tags = tags
        self._gauge = gauge
        self.tokenizer = model.tokenizer
        self._projections = {
            name: (helpers[f"helpers/{name}/kernel"], helpers[f"helpers/{name}/bias"])
            for name in ("pieces", "tags")
            if f"helpers/{name}/kernel" in helpers
        }

    @classmethod
    def load(cls, checkpoint: str | Path) -> Ears:
        """Raises InputError if a file is missing or broken. Helpers may be missing."""
        helpers, tags = load_helpers(checkpoint)
        return cls(MossAudio.load(checkpoint), helpers, tags, Gauge.load(checkpoint))

    @property
    def has(self) -> frozenset[str]:
        """Which projections there are: "pieces" (words), "tags"."""
        return frozenset(self._projections)

    def familiarity(self, heard: Heard) -> Familiarity | None:
        """Whether the model knows such sound; None if clip or checkpoint do not allow to say."""
        if heard.states is None or len(heard.states) * TOKEN < 0.5:
            return None
        mean, spread = heard.states.mean(axis=0), heard.states.std(axis=0)
        doubt = float(heard.entropy.mean())
        return self._gauge.judge(Measures(doubt, np.concatenate([mean, spread])))

    def hear(self, wavs: Sequence[np.ndarray]) -> list[Heard]:
        """Runs the encoder and its heads on clips, each float32 [n] at 16 kHz.

        A clip shorter than 10 ms has no token. Chunks of all clips are encoded 64 at a time; except
        for rounding, a clip's result does not depend on the others.
        """
        if not self._projections:
            raise InputError("this checkpoint has no helper projections (its folder `helpers`)")
        size = self.model.config.encoder.chunk_frames
        chunks: list[tuple[int, float, np.ndarray]] = []  # clip, start in seconds, mel [F, 128]
        for number, wav in enumerate(wavs):
            if len(wav) < HOP:
                continue
            mel = log_mel(wav)
            for first, last in _windows(wav, size):
                if piece := mel[:, first:last].shape[1]:
                    chunks.append((number, first * HOP / SAMPLE_RATE, mel[:, first:last].T))
                    assert piece <= size
        parts: list[list[tuple[float, int, dict[str, np.ndarray]]]] = [[] for _ in wavs]
        for batch in _batches(chunks):
            places = next(b for b in _BUCKETS if b >= len(batch))
            mels = np.zeros((places, size, 128), np.float32)
            frames = np.zeros(places, np.int32)
            for i, (_, _, mel) in enumerate(batch):
                mels[i, : len(mel)], frames[i] = mel, len(mel)
            with jax.set_mesh(self.model.mesh):
                made = _heads(
                    self.model.encoder_params,
                    self._projections,
                    mels,
                    token_frames(frames, size // FRAMES_PER_TOKEN),
                    self.model.config.encoder,
                    self.model.compute,
                    self._gauge.probe.tap if self._gauge else None,
                )
            made = {name: np.asarray(value) for name, value in made.items()}
            for i, (number, start, mel) in enumerate(batch):
                tokens = audio_tokens(len(mel))
                parts[number].append(
                    (start, tokens, {name: value[i, :tokens] for name, value in made.items()})
                )
        return [self._joined(of_clip) for of_clip in parts]

    def _joined(self, parts: list[tuple[float, int, dict[str, np.ndarray]]]) -> Heard:
        starts = [start + TOKEN * np.arange(tokens) for start, tokens, _ in parts]
        widths = {name: (len(bias),) for name, (_, bias) in self._projections.items()}
        if self._gauge:
            widths |= {"entropy": (), "states": (len(self._gauge.probe.weight) // 2,)}

        def column(name: str) -> np.ndarray | None:
            if name not in widths:
                return None
            empty = np.zeros((0, *widths[name]), np.float32)
            return np.concatenate([empty, *(made[name] for _, _, made in parts)])

        names = ("pieces", "tags", "entropy", "states")
        return Heard(np.concatenate([np.zeros(0), *starts]), *map(column, names))

    def posteriors(self, heard: Heard, seconds: float) -> Posteriors:
        """The tags on a regular grid of 25 frames a second."""
        count = max(round(seconds * GRID), 1)
        middle = (np.arange(count) + 0.5) / GRID
        at = np.clip(np.searchsorted(heard.starts, middle, side="right") - 1, 0, None)
        frames = heard.tags[at] if len(heard.starts) else np.zeros((count, len(self.tags)))
        return Posteriors(frames.astype(np.float32), GRID, self.tags)

    def transcribe(self, wavs: Sequence[np.ndarray], batch: int = 16) -> list[str]:
        """The decoder's answers to "Transcribe the audio."; "" for an answer that does not end."""
        prompts, places = [], []
        for number, wav in enumerate(wavs):
            if len(wav) < HOP:
                continue
            sampling = Sampling(max_new_tokens=min(8 + int(8 * len(wav) / SAMPLE_RATE), 256))
            try:
                request = Request(TRANSCRIBE["none"], [np.asarray(wav)], sampling)
                prompts.append(self.model.prepare(request))
            except InputError:  # longer than the model's positions
                continue
            places.append(number)
        texts = [""] * len(wavs)
        for number, reply in zip(places, self.model.answer(prompts, batch), strict=True):
            if reply.finish_reason == "stop":
                texts[number] = reply.text
        return texts


def fingerprint(checkpoint: str | Path) -> str:
    """A hash of the checkpoint's files that decide its output."""
    digest = hashlib.blake2b(digest_size=12)
    folder = as_path(checkpoint)
    for file in sorted([*folder.glob("*.*"), *folder.glob("helpers/*")]):
        if file.is_file():
            digest.update(file.name.encode())
            with open_regular(file) as opened:
                digest.update(hashlib.file_digest(opened, "blake2b").digest())
    return digest.hexdigest()


def _windows(wav: np.ndarray, size: int) -> list[tuple[int, int]]:
    """The mel frames of each chunk, cut at quiet places so that few words are split."""
    cuts = [start // HOP for start, _ in quiet_windows(wav, (size - 1) * HOP / SAMPLE_RATE)]
    return list(zip(cuts, [*cuts[1:], len(wav) // HOP], strict=True))


def _batches(chunks: Sequence) -> Iterator[Sequence]:
    for start in range(0, len(chunks), _BUCKETS[-1]):
        yield chunks[start : start + _BUCKETS[-1]]


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _heads(params, heads, mels, frames, config, compute, tap) -> dict[str, jax.Array]:
    # Each chunk is padded to its own length, as if it were a clip.
    features, taps = encode(params, config, compute, mels, frames)
    out = {}
    for name, (kernel, bias) in heads.items():
        logits = features.astype(jnp.float32) @ kernel + bias
        out[name] = jax.nn.log_softmax(logits) if name == "pieces" else jax.nn.sigmoid(logits)
    if tap is not None:
        out["entropy"] = -jnp.sum(jnp.exp(out["pieces"]) * out["pieces"], -1)
        out["states"] = taps[tap].astype(jnp.float32)
    return out
