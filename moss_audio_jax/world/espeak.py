"""Speech from espeak-ng, each word with its start and end (the extra `world`)."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import signal

from moss_audio_jax.audio.lengths import SAMPLE_RATE
from moss_audio_jax.errors import InputError, extra
from moss_audio_jax.world.espeak_worker import BETWEEN, WORD
from moss_audio_jax.world.worker import Worker

MISSING = f"scenes with speech need espeak-ng: {extra('world')} (sounds and music do not)"
_QUIET = 10 ** (-50 / 20)  # relative to the loudest 5 ms; espeak's pauses are silent
_WINDOW = SAMPLE_RATE * 5 // 1000
_VOWEL = re.compile("[aeiouyAEIOUY@]")
_NO_BREAK = "\u00a0"  # espeak reads "in the" as one word unless the space forbids it


class Utterance(NamedTuple):
    """What to say and how: espeak's voice, words per minute, pitch and pitch range (0 to 99)."""

    units: tuple[str, ...]
    voice: str
    rate: int
    pitch: int
    range: int
    chinese: bool = False


class SpokenWord(NamedTuple):
    text: str
    start: int  # samples at 16 kHz, from the start of the utterance
    stop: int


class Spoken(NamedTuple):
    """wav float64 [n] at 16 kHz, from the first word's start to the last one's end, peak 1.

    `phones` have the form of words; their text is espeak's name of a phoneme.
    """

    wav: np.ndarray
    words: list[SpokenWord]
    phones: list[SpokenWord]


def speak(utterances: Sequence[Utterance]) -> list[Spoken]:
    """Speaks; the result depends only on the arguments and the version of espeak-ng.

    Raises:
      InputError: the wheel `espeakng-loader` is missing or does not start, or espeak does not know
        a voice or a character.
    """
    requests = [
        {
            "text": ("" if u.chinese else _NO_BREAK).join(u.units),
            "voice": u.voice,
            "rate": u.rate,
            "pitch": u.pitch,
            "range": u.range,
        }
        for u in utterances
    ]
    answer = _worker().ask(json.dumps(requests).encode())
    if not answer:
        raise InputError(f"espeak-ng could not say {requests!r}; does it have this voice?")
    head, _, sound = answer.partition(b"\n")
    described = json.loads(head)
    pcm = np.frombuffer(sound, np.int16)
    spoken, at = [], 0
    for utterance, made in zip(utterances, described["utterances"], strict=True):
        wav = _resampled(pcm[at : at + made["samples"]], described["rate"])
        at += made["samples"]
        spoken.append(_labelled(utterance, wav, made["events"], SAMPLE_RATE / described["rate"]))
    return spoken


class Phoneme(NamedTuple):
    """A phoneme as IPA, with signs of stress and length, and as espeak names it."""

    ipa: str
    name: str


def phonemes(text: str, voice: str) -> list[list[Phoneme]]:
    """How espeak says each word of a text.

    Args:
      text: words joined by single spaces, without punctuation.
      voice: name of an espeak voice, such as "en-us".

    Raises:
      InputError: as `speak`.
    """
    words = text.split()
    for joint in (" ", _NO_BREAK):  # in its natural flow if espeak then keeps the words apart
        request = json.dumps({"voice": voice, "text": joint.join(words)})
        answer = _worker().ask(request.encode())
        if not answer:
            raise InputError(f"espeak-ng could not say {text!r}; does it have the voice {voice}?")
        ipa, names = (form.split() for form in json.loads(answer))
        if len(ipa) == len(names) == len(words):
            return [_word_phonemes(*both) for both in zip(ipa, names, strict=True)]
    raise InputError(
        f"espeak-ng says {text!r} in {len(ipa)} words (voice {voice}); expected {len(words)}: use "
        "words that it knows"
    )


def _word_phonemes(ipa: str, names: str) -> list[Phoneme]:
    """Without pauses and links between sounds, which have no IPA."""
    both = zip(ipa.split(BETWEEN), names.split(BETWEEN), strict=True)
    return [Phoneme(sign, name) for sign, name in both if sign]


def available() -> bool:
    """Whether the wheel is installed."""
    try:
        import espeakng_loader  # noqa: F401
    except ImportError:
        return False
    return True


def _labelled(utterance: Utterance, wav: np.ndarray, events: list, scale: float) -> Spoken:
    """The bounds of each word from espeak's events, moved inwards to where there is sound."""
    bounds = _bounds(utterance, events, round(len(wav) / scale))
    words = tightened(
        wav,
        [
            SpokenWord(text, round(onset * scale), min(round(stop * scale), len(wav)))
            for text, (onset, stop) in zip(utterance.units, bounds, strict=True)
        ],
    )
    begin, end = words[0].start, words[-1].stop
    phones = _phones(events, scale, begin, end)
    words = [SpokenWord(w.text, w.start - begin, w.stop - begin) for w in words]
    return Spoken(cut_out(wav, begin, end), words, phones)


def tightened(
    wav: np.ndarray, words: Sequence[SpokenWord], quiet: float = _QUIET
) -> list[SpokenWord]:
    """The words with bounds moved inwards to where there is sound; a silent one stays as it is.

    Args:
      quiet: what is silent, relative to the loudest 5 ms.
    """
    envelope = _envelope(wav)
    heard = envelope > quiet * envelope.max()
    found = []
    for word in words:
        inside = np.flatnonzero(heard[word.start : word.stop])
        if len(inside):
            first = word.start + int(inside[0])
            word = SpokenWord(word.text, first, word.start + int(inside[-1]) + 1)
        found.append(word)
    return found


def cut_out(wav: np.ndarray, begin: int, end: int) -> np.ndarray:
    """wav[begin:end] with peak 1; its ends rise and fall within 2 ms, so that nothing clicks."""
    piece = wav[begin:end].copy()
    fade = np.linspace(0, 1, 32)
    piece[:32] *= fade
    piece[-32:] *= fade[::-1]
    return piece / np.abs(piece).max()


def _phones(events: list, scale: float, begin: int, end: int) -> list[SpokenWord]:
    """Each phoneme, until the next one or a pause; samples after `begin`, none after `end`."""
    reported = [(sample, name) for kind, _, sample, name in events if kind != WORD]
    found = []
    for (sample, name), (following, _) in itertools.pairwise([*reported, (round(end / scale), "")]):
        start, stop = round(sample * scale), min(round(following * scale), end)
        if not name.startswith("_") and begin <= start < stop:
            found.append(SpokenWord(name, start - begin, stop - begin))
    return found


class _Reported:
    """A word event: its position in the text, its phonemes (sample, name), the pause after it."""

    def __init__(self, position: int):
        self.position = position
        self.phonemes: list[tuple[int, str]] = []
        self.pause: int | None = None


def _bounds(utterance: Utterance, events: list, end: int) -> list[tuple[int, int]]:
    """(onset, stop) of each unit in samples, from phoneme to phoneme.

    A word event may come a phoneme early, up to 70 ms; phoneme events are exact to the sample. A
    plosive's event is its burst.
    """
    words: list[_Reported] = []
    for kind, position, sample, name in events:
        if kind == WORD:
            words.append(_Reported(position))
        elif words and words[-1].pause is None:
            if not name.startswith("_"):
                words[-1].phonemes.append((sample, name))
            elif words[-1].phonemes and name != "_|":  # "_|" is the end of a syllable
                words[-1].pause = sample
    onsets: list[int] = []
    pauses: list[int | None] = []
    for i, word in enumerate(words):
        found = [sample for sample, _ in word.phonemes[:1]]
        # Two words whose tones change each other (ni3 hao3) are reported as one.
        if utterance.chinese:
            following = words[i + 1].position if i + 1 < len(words) else len(utterance.units)
            if following - word.position > 1:
                found = _syllables(word.phonemes)
        onsets += found
        pauses += [*[None] * (len(found) - 1), word.pause][: len(found)]
    if len(onsets) != len(utterance.units):
        raise InputError(
            f"espeak-ng reported {len(onsets)} words of {' '.join(utterance.units)!r} (voice "
            f"{utterance.voice}); expected {len(utterance.units)}: use words that it knows"
        )
    stops = [
        following if pause is None else pause
        for pause, following in zip(pauses, [*onsets[1:], end], strict=True)
    ]
    return list(zip(onsets, stops, strict=True))


def _syllables(phonemes: list[tuple[int, str]]) -> list[int]:
    """The first sample of each Mandarin syllable: a vowel and the consonant before it, if any."""
    onsets = []
    for i, (sample, name) in enumerate(phonemes):
        if not _VOWEL.search(name):
            continue
        before = phonemes[i - 1] if i else None
        if before and before[1] != "N" and not _VOWEL.search(before[1]):
            onsets.append(before[0])  # every consonant but ng can begin a syllable
        else:
            onsets.append(sample)
    return onsets


def _envelope(wav: np.ndarray) -> np.ndarray:
    """RMS over 5 ms around each sample, [n]."""
    power = np.concatenate([np.zeros(1), np.cumsum(wav**2)])
    at = np.arange(len(wav))
    low, high = np.maximum(at - _WINDOW // 2, 0), np.minimum(at + _WINDOW // 2, len(wav))
    return np.sqrt((power[high] - power[low]) / (high - low))


def _resampled(pcm: np.ndarray, rate: int) -> np.ndarray:
    """int16 [n] at `rate` -> float64 at 16 kHz; by SciPy, whose sums have a fixed order."""
    up, down, taps = _filter(rate)
    return signal.resample_poly(pcm / 32768.0, up, down, window=taps)


@functools.cache
def _filter(rate: int) -> tuple[int, int, np.ndarray]:
    divisor = np.gcd(SAMPLE_RATE, rate)
    up, down = SAMPLE_RATE // divisor, rate // divisor
    widest = max(up, down)
    return int(up), int(down), signal.firwin(20 * widest + 1, 0.95 / widest, window=("kaiser", 7.0))


@functools.cache
def _worker_of(pid: int) -> Worker:
    try:
        import espeakng_loader
    except ImportError:
        raise InputError(MISSING) from None
    script = Path(__file__).with_name("espeak_worker.py")
    library, folder = espeakng_loader.get_library_path(), espeakng_loader.get_data_path()
    # -S: only the standard library, so that the process starts at once.
    return Worker("espeak-ng", ["-I", "-S"], script, library, folder)


def _worker() -> Worker:
    return _worker_of(os.getpid())  # each forked process needs its own worker
