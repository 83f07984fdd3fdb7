"""What the encoder makes of clips: computed some seconds at a time, and kept for the next question.

Each piece of sound (a chunk of 4 s, or with full attention a whole clip) is heard by itself, so
pieces of several clips share a batch, and a long clip takes several.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import jax
import numpy as np

from moss_audio_jax.audio.lengths import FRAMES_PER_TOKEN, audio_tokens
from moss_audio_jax.config import Compute, EncoderConfig
from moss_audio_jax.data.batch import bucket, pieces_of, token_frames
from moss_audio_jax.data.packing import Room, place
from moss_audio_jax.generate.decode_state import encode
from moss_audio_jax.sharding import ways

STRIPS = 16  # of sound that the encoder hears at a time, for each group of devices


class Heard(NamedTuple):
    """A clip as the decoder meets it.

    Attributes:
      features: [n, D], in compute's dtype.
      taps: [K, n, D].
    """

    features: np.ndarray
    taps: np.ndarray


class _Piece(NamedTuple):
    digest: bytes
    number: int  # of the piece in its clip
    mel: np.ndarray  # [128, n]
    padded: int


class Hearing:
    """The encoder's outputs by their clips' digests.

    Args:
      params: the encoder's.
      keep: bytes of outputs that are kept; those unused the longest are dropped.
    """

    def __init__(
        self,
        params: Any,
        config: EncoderConfig,
        compute: Compute,
        keep: int = 2**28,
    ) -> None:
        self._params, self._config, self._compute = params, config, compute
        self._keep = keep
        self._known: OrderedDict[bytes, Heard] = OrderedDict()
        self._bytes = 0
        self._waiting: list[_Piece] = []
        self._parts: dict[bytes, list[Heard | None]] = {}  # of clips that are being heard
        self.frames = 0  # mel frames that were encoded so far

    def get(self, digest: bytes) -> Heard | None:
        """A clip's output, if it is known."""
        if digest in self._known:
            self._known.move_to_end(digest)
        return self._known.get(digest)

    def want(self, digest: bytes, mel: np.ndarray, padded: int) -> None:
        """Lets a clip be heard by the next turns, unless it is known.

        Args:
          mel: [128, n].
          padded: frames to which its prompt pads chunks (`lengths.padded_frames`).
        """
        if digest in self._known or digest in self._parts:
            return
        start = 0
        for number, frames in enumerate(pieces_of([mel.shape[1]], self._config)):
            piece = _Piece(digest, number, mel[:, start : start + frames], padded)
            self._waiting.append(piece)
            start += frames
        self._parts[digest] = [None] * (number + 1)

    def turn(self) -> None:
        """Encodes the next pieces, as many as fit into one batch (with a mesh in context)."""
        chunk = self._config.chunk_frames
        frames = chunk
        if self._config.attention != "chunked":
            frames *= bucket(-(-self._waiting[0].mel.shape[1] // chunk))
        most = max(1, STRIPS * chunk // frames)
        rows = ways((STRIPS,), "batch")
        stride = frames // FRAMES_PER_TOKEN
        now: list[_Piece] = []
        places = []
        for piece in self._waiting:
            counts = [audio_tokens(each.mel.shape[1]) for each in (*now, piece)]
            if counts[-1] > stride:
                break
            tried = place(counts, Room(0, rows * most, stride))
            if max(each.strip for each in tried) >= rows * most:
                break
            now.append(piece)
            places = tried
        del self._waiting[: len(now)]
        strips = bucket(-(-(1 + max(each.strip for each in places)) // rows))
        mels = np.zeros((rows * strips, frames, self._config.mel_bins), np.float32)
        behind = np.zeros((rows * strips, stride), np.int32)
        for piece, (strip, first) in zip(now, places, strict=True):
            n = piece.mel.shape[1]
            start = first * FRAMES_PER_TOKEN
            mels[strip, start : start + n] = piece.mel.T
            tokens = slice(first, first + audio_tokens(n))
            behind[strip, tokens] = token_frames(piece.padded, audio_tokens(n))
            self.frames += n
        features, taps = encode(
            self._params,
            mels.reshape(rows, strips, *mels.shape[1:]),
            behind.reshape(rows, strips, stride),
            config=self._config,
            compute=self._compute,
        )
        features, taps = jax.device_get((features, taps))
        for piece, (strip, first) in zip(now, places, strict=True):
            row, inside = divmod(strip, strips)
            start = inside * stride + first
            at = row, slice(start, start + audio_tokens(piece.mel.shape[1]))
            self._parts[piece.digest][piece.number] = Heard(features[at], taps[:, *at])
        for digest in dict.fromkeys(piece.digest for piece in now):
            self._join(digest)

    def _join(self, digest: bytes) -> None:
        parts = self._parts[digest]
        if any(part is None for part in parts):
            return
        del self._parts[digest]
        whole = Heard(
            np.concatenate([part.features for part in parts]),
            np.concatenate([part.taps for part in parts], axis=1),
        )
        self._known[digest] = whole
        self._bytes += _size(whole)
        while self._bytes > self._keep and len(self._known) > 1:
            self._bytes -= _size(self._known.popitem(last=False)[1])


def _size(heard: Heard) -> int:
    return heard.features.nbytes + heard.taps.nbytes
