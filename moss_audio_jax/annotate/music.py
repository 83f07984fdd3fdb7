"""Tempo, beats, key, chroma and sections of music, by librosa (extra `annotate`)."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import numpy as np

from moss_audio_jax.audio.lengths import SAMPLE_RATE
from moss_audio_jax.errors import InputError, extra

PITCHES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
_HOP = 512  # samples: 32 ms
# C. Krumhansl and E. Kessler (1982): listeners' ratings of how well each degree fits a key.
_MAJOR = (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88)
_MINOR = (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17)


@dataclasses.dataclass(frozen=True)
class MusicOptions:
    """section_seconds: the shortest section. max_seconds: how much is analysed."""

    section_seconds: float = 8.0
    max_seconds: float = 300.0


def describe_music(wav: np.ndarray, options: MusicOptions = MusicOptions()) -> dict[str, Any]:
    """Measures music.

    Args:
      wav: floating [n], 16 kHz mono; only its first `max_seconds` are analysed.

    Returns:
      {"tempo" beats per minute or None, "beats" [seconds], "key" such as "C major" or None,
      "key_score" -1..1 (correlation with the key's profile), "chroma" [12 shares from C up],
      "sections" [{"start", "end", "label"}]}. Similar sections share a label A, B, ... Times count
      from the start of `wav`, rounded to ms. Silence and very short clips have no tempo and no
      key.

    Raises:
      InputError: librosa is not installed; wav is not [n].
    """
    librosa = _librosa()
    wav = np.asarray(wav, np.float32)
    if wav.ndim != 1:
        raise InputError(f"music: the waveform has shape {list(wav.shape)}; expected [n]")
    wav = wav[: round(options.max_seconds * SAMPLE_RATE)]
    seconds = len(wav) / SAMPLE_RATE
    if seconds < 1 or np.abs(wav).max() < 1e-4:
        return {
            "tempo": None,
            "beats": [],
            "key": None,
            "key_score": 0.0,
            "chroma": [round(1 / 12, 3)] * 12,
            "sections": [{"start": 0.0, "end": round(seconds, 3), "label": "A"}],
        }
    onset = librosa.onset.onset_strength(y=wav, sr=SAMPLE_RATE, hop_length=_HOP)
    tempo, frames = librosa.beat.beat_track(onset_envelope=onset, sr=SAMPLE_RATE, hop_length=_HOP)
    beats = librosa.frames_to_time(frames, sr=SAMPLE_RATE, hop_length=_HOP)
    spectrum = np.abs(librosa.stft(wav, n_fft=4096, hop_length=_HOP))
    chroma = librosa.feature.chroma_stft(
        S=spectrum**2, sr=SAMPLE_RATE, n_fft=4096, tuning=0.0, norm=None
    )
    share = chroma.sum(axis=1) / max(chroma.sum(), 1e-12)
    key, score = _key(np.sqrt(share))
    tempo = float(np.atleast_1d(tempo)[0])
    return {
        "tempo": round(tempo, 1) if tempo > 0 and len(beats) >= 2 else None,
        "beats": [round(float(beat), 3) for beat in beats if beat <= seconds],
        "key": key,
        "key_score": round(score, 3),
        "chroma": [round(float(x), 3) for x in share],
        "sections": _sections(librosa, wav, chroma, seconds, options),
    }


def _key(share: np.ndarray) -> tuple[str, float]:
    best = ("", -2.0)
    for mode, profile in (("major", _MAJOR), ("minor", _MINOR)):
        for tonic in range(12):
            fit = np.corrcoef(np.roll(profile, tonic), share)[0, 1]
            if np.isfinite(fit) and fit > best[1]:
                best = (f"{PITCHES[tonic]} {mode}", float(fit))
    return best if best[0] else ("C major", 0.0)


def _sections(
    librosa: ModuleType, wav: np.ndarray, chroma: np.ndarray, seconds: float, options: MusicOptions
) -> list[dict[str, Any]]:
    """Sections by clustering timbre and chroma in time; similar ones share a label."""
    count = int(seconds // options.section_seconds)
    edges = np.array([0.0])
    timbre = librosa.feature.mfcc(y=wav, sr=SAMPLE_RATE, hop_length=_HOP, n_mfcc=13)
    n = min(timbre.shape[1], chroma.shape[1])
    stacked = np.concatenate(
        [timbre[:, :n] / 40, chroma[:, :n] / (chroma[:, :n].max(axis=0) + 1e-9)]
    )
    if count >= 2:
        # Steps of about half a second: sections are long, and the cost of clustering grows fast.
        step = 16
        coarse = stacked[:, : n // step * step].reshape(len(stacked), -1, step).mean(axis=2)
        found = librosa.segment.agglomerative(coarse, min(count, 12))
        edges = found * step * _HOP / SAMPLE_RATE
        keep = [0.0]
        for edge in edges[1:]:
            far = options.section_seconds / 2
            if edge - keep[-1] >= far and seconds - edge >= far:
                keep.append(float(edge))
        edges = np.array(keep)
    labels: list[np.ndarray] = []
    sections = []
    for start, end in zip(edges, [*edges[1:], seconds], strict=True):
        first = int(start * SAMPLE_RATE / _HOP)
        mean = stacked[:, first : max(int(end * SAMPLE_RATE / _HOP), first + 1)].mean(axis=1)
        far = [float(np.linalg.norm(known - mean)) for known in labels]
        which = int(np.argmin(far)) if far and min(far) < 0.5 else len(labels)
        if which == len(labels):
            labels.append(mean)
        sections.append(
            {"start": round(float(start), 3), "end": round(float(end), 3), "label": _letter(which)}
        )
    return sections


def _letter(index: int) -> str:
    return chr(ord("A") + index % 26) + ("" if index < 26 else str(index // 26))


def _librosa() -> ModuleType:
    try:
        import librosa
    except ImportError as error:
        raise InputError(f"music analysis needs librosa: {extra('annotate')}") from error
    return librosa
