"""Flite's recorded voices, each word with its times, through Debian's library."""

from __future__ import annotations

import ctypes
import functools
import json
import os
from pathlib import Path

import numpy as np

from moss_audio_jax.draw import Draw
from moss_audio_jax.errors import InputError
from moss_audio_jax.world.recordings import held_out
from moss_audio_jax.world.recordings.source import Line, Speaker, Voice
from moss_audio_jax.world.recordings.voices.line import Span, line
from moss_audio_jax.world.worker import Worker

_SPEAKERS = (
    Speaker("kal", "en", "male", "American"),
    Speaker("awb", "en", "male", "Scottish"),
    Speaker("rms", "en", "male", "American"),
    Speaker("slt", "en", "female", "American"),
)
_VOICE = {"kal": "kal16"}  # the same man at 16 kHz
# Flite's phonemes by espeak's names; the others are pauses.
_RENAMED = {
    "aa": "A:",
    "ae": "a",
    "ah": "V",
    "ao": "O:",
    "aw": "aU",
    "ax": "@",
    "ay": "aI",
    "ch": "tS",
    "dh": "D",
    "eh": "E",
    "er": "3:",
    "ey": "eI",
    "hh": "h",
    "ih": "I",
    "iy": "i:",
    "jh": "dZ",
    "ng": "N",
    "ow": "oU",
    "oy": "OI",
    "sh": "S",
    "th": "T",
    "uh": "U",
    "uw": "u:",
    "y": "j",
    "zh": "Z",
}
_PHONES = {name: name for name in "bdfgklmnprstvwz"} | _RENAMED


class Flite(Voice):
    certain = True

    def available(self) -> bool:
        try:
            ctypes.CDLL("libflite.so.1")
        except OSError:
            return False
        return True

    def speakers(self, split: str) -> tuple[Speaker, ...]:
        return held_out.speakers(self.name, _SPEAKERS, split)

    def say(self, text: str, speaker: Speaker, draw: Draw) -> Line:
        self.require()
        stretch = draw.log_uniform(0.8, 1.2)  # of durations: the voice's own speed is 1
        request = {"text": text, "voice": _VOICE.get(speaker.name, speaker.name)}
        answer = _worker_of(os.getpid()).ask(json.dumps(request | {"stretch": stretch}).encode())
        if not answer:
            raise InputError(f"flite could not say {text!r} with the voice {speaker.name}")
        head, _, sound = answer.partition(b"\n")
        told = json.loads(head)
        return line(
            np.frombuffer(sound, np.int16) / 32768.0,
            told["rate"],
            text,
            [Span(*word) for word in told["words"]],
            [Span(_PHONES[n], *when) for n, *when in told["phones"] if n in _PHONES],
        )


@functools.cache
def _worker_of(pid: int) -> Worker:
    return Worker("flite", ["-I", "-S"], Path(__file__).with_name("flite_worker.py"))


SOURCES = (
    Flite(
        name="flite",
        kind="voice",
        licence="BSD-like (CMU)",
        origin="Debian libflite1",
        install="apt-get install libflite1",
    ),
)
