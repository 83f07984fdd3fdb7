"""The settings of `annotate`; reads and checks them.

A config file is a Python file with `get_config()` that changes keys of this one. Any key may be
overridden on the command line: --config.speech.threshold=0.2
"""

from __future__ import annotations

import importlib.util
import reprlib
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from moss_audio_jax.annotate.spans import SegmentOptions
from moss_audio_jax.config_file import read_config_file
from moss_audio_jax.errors import InputError, UsageError, extra
from moss_audio_jax.remote import redact

BUNDLED = "bundled"


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.checkpoint = BUNDLED  # a checkpoint with helpers; "" = no model at all
    # Path of another detector's posteriors, with {folder}, {stem}, {name} of the audio file.
    c.posteriors = ""  # e.g. "{folder}/{stem}.frames.npz"
    # Its labels -> the nine classes, as pairs: (("Bark", "animal"), ("Speech", "speech"))
    c.classes = ()

    # name -> {"kind", "target", ...} (see experts.py); the steps below call them by name.
    c.experts = ConfigDict()

    s = c.segment = ConfigDict()
    for name, field in SegmentOptions.__dataclass_fields__.items():
        s[name] = field.default

    c.silence_dbfs = -70.0  # a segment whose loudest 50 ms is below this is silent

    s = c.speech = ConfigDict()
    s.systems = ("decoder", "ctc")  # or names of experts; with two, the first is used
    s.min_systems = 2  # the fewest transcripts
    s.threshold = 0.3  # the largest WER (zh: CER) between them
    s.doubt = 0.75  # from this WER between decoder and ctc, the model does not know the segment
    s.gate = 0.25  # transcribe from this score of speech or human voice in the profile
    s.present = 0.5  # from this score there is a voice, even without words
    s.align = "ctc"  # or an expert; "" = no word times
    s.align_score = -2.0  # the lowest mean log-probability per token of a text that fits
    s.pause = 0.5  # seconds between sentences
    s.diarise = "measured"  # by pitch and spectrum; or an expert

    s = c.music = ConfigDict()
    s.present = 0.5  # from this score in the profile there is music
    s.key_score = 0.6  # the lowest correlation of a key that is named
    s.instruments = 0.5  # the lowest tag score of an instrument that is named; 0 = none
    s.expert = ""

    s = c.sound = ConfigDict()
    s.events = "tags"  # of the small model or of `posteriors`; or an expert; "" = no events
    s.on, s.off = 0.8, 0.8  # hysteresis of the tags
    # Replaces `on` where there is a voice, because the tags mistake voices for other sounds.
    s.over_speech = 0.95
    s.event_seconds = 0.2
    s.absent = 0.02  # a label whose score stays below this is absent
    s.caption = "template"  # or an expert
    s.judge = ""  # an expert; a caption scored below `judge_score` is replaced by the template
    s.judge_score = 3

    c.unified = "template"  # or an expert

    s = c.rows = ConfigDict()
    s.min_seconds = 0.5  # shorter segments give no rows
    s.skip = ()  # tasks that are left out
    # Keep rows that come only from the small model, for sound that it does not know.
    s.keep_doubtful = False

    c.page_clips = 24  # files shown in index.html
    c.page_seconds = 60.0  # of each
    return c


def load(name: str | None, overrides: Sequence[str] = ()) -> ConfigDict:
    """The config of a file, or the defaults, with overrides like --config.speech.threshold=0.2.

    Raises:
      InputError: no such file.
      UsageError: a file that fails, an unknown key, a value of the wrong type.
    """
    config = read_config_file(name or __file__, overrides)
    check(config)
    return config


def check(config: ConfigDict) -> None:
    """Raises UsageError if a key is unknown or missing, or if a step names no expert."""
    _same_keys(config, get_config(), "")
    named = [(f"speech.systems: {n!r}", n, ("ctc", "decoder")) for n in config.speech.systems]
    named += [
        ("speech.align", config.speech.align, ("ctc", "")),
        ("speech.diarise", config.speech.diarise, ("measured",)),
        ("music.expert", config.music.expert, ("",)),
        ("sound.events", config.sound.events, ("tags", "")),
        ("sound.caption", config.sound.caption, ("template",)),
        ("sound.judge", config.sound.judge, ("",)),
        ("unified", config.unified, ("template",)),
    ]
    for where, name, known in named:
        if name not in known and name not in config.experts:
            raise UsageError(
                f"{where} is {name!r}; expected one of {', '.join(map(repr, known))} or a name of "
                "config.experts"
            )
    for name, spec in config.experts.items():
        if not isinstance(spec, ConfigDict):
            raise UsageError(f"config: experts.{name}: expected its keys, kind and target")
    for module in ("ruptures", "librosa", "whisper_normalizer"):
        if importlib.util.find_spec(module) is None:
            raise InputError(f"annotate needs {module}: {extra('annotate')}")
    SegmentOptions(**config.segment)  # raises UsageError if they contradict each other


def _same_keys(config: Any, default: Any, at: str) -> None:
    for key in config:
        if key not in default:
            raise UsageError(f"config: no key {at}{key}; expected one of {', '.join(default)}")
    for key in default:
        if key not in config:
            raise UsageError(f"config: {at}{key} is missing")
        if isinstance(default[key], ConfigDict) and key != "experts":
            if not isinstance(config[key], ConfigDict):
                said = reprlib.repr(redact(config[key]))
                raise UsageError(f"config: {at}{key} is {said}; expected its keys")
            _same_keys(config[key], default[key], f"{at}{key}.")
