"""The only formulas from samples to frames, tokens, chunks and time markers.

samples (16 kHz) --160--> mel frames (100 / s) --8--> audio tokens (12.5 / s)
"""

from __future__ import annotations

from collections.abc import Sequence

SAMPLE_RATE = 16_000
HOP = 160  # samples per mel frame
FRAMES_PER_TOKEN = 8  # three stride-2 convolutions
MARKER_SECONDS = 2  # a time marker (the seconds as text) follows every two seconds of audio,
MARKER_TOKENS = 25  # which are 25 audio tokens


def mel_frames(n_samples: int) -> int:
    """Log-mel frames of a 16 kHz waveform. A partial hop at the end makes no frame."""
    return n_samples // HOP


def audio_tokens(frames: int) -> int:
    """Encoder tokens of a clip of `frames` mel frames: ceil(frames / 8)."""
    return -(-frames // FRAMES_PER_TOKEN)


def conv_length(frames: int) -> int:
    """Length after one convolution of kernel 3, stride 2, padding 1: ceil(frames / 2)."""
    return (frames + 1) // 2


def chunk_frames(frames: int, chunk: int) -> list[int]:
    """Frames in each chunk of a clip: [chunk, chunk, ..., rest]. Only the last may be short."""
    return [min(chunk, frames - start) for start in range(0, frames, chunk)]


def padded_frames(clips: Sequence[int], chunk: int | None) -> int:
    """P, the length to which the official code pads the chunks of one prompt.

    Args:
      clips: mel frames of each clip of the prompt.
      chunk: frames of a chunk, or None if a clip is one chunk (full and sliding attention).

    The convolutions see zeros up to P and nothing beyond it, so P decides the last token of a
    shorter chunk.
    """
    longest = max(clips, default=0)
    return longest if chunk is None else min(chunk, longest)


def marker_seconds(n_tokens: int) -> range:
    """The times, in seconds, of the time markers in a clip of `n_tokens` audio tokens: 2, 4, ..."""
    # 2 * tokens // 25 is int(tokens / 12.5) without floating point.
    return range(MARKER_SECONDS, 2 * n_tokens // MARKER_TOKENS + 1, MARKER_SECONDS)
