"""What the encoder makes of sound: computed some seconds at a time, and kept for the next question.

A piece of sound (a chunk of 4 s, or with full attention a whole clip) is heard by itself. So pieces
of several clips share a batch, a long clip takes several, and a clip that grows is heard piece by
piece: what it had before is known by its content.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from moss_audio_jax.audio.lengths import FRAMES_PER_TOKEN, audio_tokens, padded_frames
from moss_audio_jax.config import Compute, EncoderConfig
from moss_audio_jax.data.batch import bucket, pieces_of, token_frames
from moss_audio_jax.data.packing import Room, place
from moss_audio_jax.generate.decode_state import encode
from moss_audio_jax.generate.drafts import CtcHead, Likeliest
from moss_audio_jax.generate.familiarity import Gauge, Measures, Sums, measures_of
from moss_audio_jax.sharding import ways

STRIPS = 16  # of sound that the encoder hears at a time, for each group of devices
_NOTED = 2**14  # pieces of which it is kept what they are like: 18 hours


class Piece(NamedTuple):
    """Sound that the encoder hears by itself.

    Attributes:
      digest: 16 bytes that say what it is.
      mel: its log-mel [128, n].
      padded: frames to which its prompt pads pieces (`lengths.padded_frames`).
    """

    digest: bytes
    mel: np.ndarray
    padded: int

    @property
    def tokens(self) -> int:
        return audio_tokens(self.mel.shape[1])


class Heard(NamedTuple):
    """A piece as the decoder meets it: features [n, D] and taps [K, n, D], in compute's dtype."""

    features: np.ndarray
    taps: np.ndarray


class Noted(NamedTuple):
    """What is kept of a piece when its output is not: for `measures`, and for `words`."""

    sums: Sums | None
    words: Likeliest | None


def sound_of(mels: Sequence[np.ndarray], config: EncoderConfig) -> list[Piece]:
    """The pieces of a prompt's clips, in order."""
    chunk = config.chunk_frames if config.attention == "chunked" else None
    padded = padded_frames([mel.shape[1] for mel in mels], chunk)
    pieces = []
    for mel in mels:
        start = 0
        for frames in pieces_of([mel.shape[1]], config):
            part = np.ascontiguousarray(mel[:, start : start + frames])
            content = hashlib.blake2b(part.view(np.uint8).data, digest_size=16)
            content.update(f"{part.dtype} {part.shape} {padded}".encode())
            pieces.append(Piece(content.digest(), part, padded))
            start += frames
    return pieces


class Hearing:
    """The encoder's outputs by the digests of pieces. Engines that share it step in turn.

    Args:
      params: the encoder's.
      keep: bytes of outputs that are kept; those unused the longest are dropped.
      gauge: measures whether sound is like the training data; None: nobody asks.
      head: hears the words; None if there is none.
      few: programs of few sizes, which are known before sound comes (`shapes`).

    Attributes:
      frames: mel frames that were encoded so far.
    """

    def __init__(
        self,
        params: Any,
        config: EncoderConfig,
        compute: Compute,
        gauge: Gauge | None = None,
        head: CtcHead | None = None,
        few: bool = False,
        keep: int = 2**28,
    ) -> None:
        self.frames = 0
        self.params, self._config, self._compute = params, config, compute
        self._gauge, self._head, self._few, self._keep = gauge, head, few, keep
        self._noted: OrderedDict[bytes, Noted] = OrderedDict()
        self._known: OrderedDict[bytes, Heard] = OrderedDict()
        self._bytes = 0
        self._waiting: OrderedDict[bytes, Piece] = OrderedDict()

    def renew(self, params: Any) -> None:
        """Other weights of the encoder, or none; what was heard is forgotten."""
        self.params = params
        self._known.clear()
        self._noted.clear()
        self._waiting.clear()
        self._bytes = 0

    def get(self, digest: bytes) -> Heard | None:
        """A piece's output, if it is known."""
        if digest in self._known:
            self._known.move_to_end(digest)
        return self._known.get(digest)

    def want(self, piece: Piece) -> None:
        """Lets a piece be heard by one of the next turns, unless it is known."""
        if piece.digest not in self._known:
            self._waiting.setdefault(piece.digest, piece)

    def turn(self) -> None:
        """Encodes the next pieces, as many as fit into one batch (with a mesh in context)."""
        waiting = [*self._waiting.values()]
        chunk = self._config.chunk_frames
        frames = chunk
        if self._config.attention != "chunked":
            frames *= bucket(-(-waiting[0].mel.shape[1] // chunk))
        rows, stride = ways((STRIPS,), "batch"), frames // FRAMES_PER_TOKEN
        most = rows * max(1, STRIPS * chunk // frames)
        now, places = 0, []
        while now < len(waiting) and waiting[now].tokens <= stride:
            counts = [piece.tokens for piece in waiting[: now + 1]]
            tried = place(counts, Room(0, most, stride))
            if max(each.strip for each in tried) >= most:
                break
            now, places = now + 1, tried
        strips = -(-(1 + max(each.strip for each in places)) // rows)
        strips = 1 << (strips - 1).bit_length() if self._few else bucket(strips)
        mels = np.zeros((rows * strips, frames, self._config.mel_bins), np.float32)
        behind = np.zeros((rows * strips, stride), np.int32)
        for piece, (strip, first) in zip(waiting, places, strict=False):
            n = piece.mel.shape[1]
            start = first * FRAMES_PER_TOKEN
            mels[strip, start : start + n] = piece.mel.T
            behind[strip, first : first + piece.tokens] = token_frames(piece.padded, piece.tokens)
            self.frames += n
        features, taps = self._encode(mels, behind)
        for piece, (strip, first) in zip(waiting, places, strict=False):
            row, inside = divmod(strip, strips)
            start = inside * stride + first
            at = row, slice(start, start + piece.tokens)
            # Copies: a view would keep the whole batch.
            heard = Heard(features[at].copy(), taps[:, *at].copy())
            del self._waiting[piece.digest]
            self._known[piece.digest] = heard
            self._bytes += heard.features.nbytes + heard.taps.nbytes
            self._noted[piece.digest] = Noted(
                self._gauge and self._gauge.sums(*heard),
                self._head and self._head.hear(heard.features),
            )
        while self._bytes > self._keep and len(self._known) > now:
            _, old = self._known.popitem(last=False)
            self._bytes -= old.features.nbytes + old.taps.nbytes
        while len(self._noted) > _NOTED:
            self._noted.popitem(last=False)

    @property
    def sizes(self) -> list[int]:
        """Strips of all programs, if there are few."""
        chunked = self._config.attention == "chunked"
        return [1 << power for power in range(STRIPS.bit_length())] if chunked else []

    def silence(self, strips: int) -> None:
        """Encodes so many strips in which nothing is heard, to compile the program."""
        strips *= ways((STRIPS,), "batch")
        chunk = self._config.chunk_frames
        self._encode(
            np.zeros((strips, chunk, self._config.mel_bins), np.float32),
            np.zeros((strips, chunk // FRAMES_PER_TOKEN), np.int32),
        )

    def _encode(self, mels: np.ndarray, behind: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Features and taps of strips [S, F, M], whose tokens have `behind` [S, T] frames."""
        rows = ways((STRIPS,), "batch")
        made = encode(
            self.params,
            mels.reshape(rows, -1, *mels.shape[1:]),
            behind.reshape(rows, -1, behind.shape[1]),
            config=self._config,
            compute=self._compute,
        )
        return jax.device_get(made)

    def measure(self, mels: Sequence[np.ndarray]) -> list[Measures | None]:
        """Encodes clips (with a mesh in context) and measures them: see `measures`.

        A clip measures the same alone and among others.
        """
        clips = [sound_of([mel], self._config) for mel in mels]
        found = []
        for clip in clips:
            for piece in clip:
                if piece.digest not in self._noted:
                    self._waiting.setdefault(piece.digest, piece)
        for clip in clips:
            while any(piece.digest in self._waiting for piece in clip):
                self.turn()
            found.append(self.measures(clip))
        return found

    def measures(self, clip: Sequence[Piece]) -> Measures | None:
        """Of a clip that was heard; None if it is too short, or was heard too long ago."""
        noted = [self._noted.get(piece.digest) for piece in clip]
        if self._gauge is None or None in noted:
            return None
        return measures_of([each.sums for each in noted])

    def words(self, clip: Sequence[Piece]) -> Likeliest | None:
        """The word pieces in a clip that was heard; None without a head, or if it was heard too
        long ago."""
        noted = [self._noted.get(piece.digest) for piece in clip]
        if self._head is None or None in noted or not noted:
            return None
        heard = [each.words for each in noted]
        return Likeliest(*(np.concatenate(each) for each in zip(*heard, strict=True)))
