"""Annotation with your own experts for the steps at which the small model is weakest.

    moss-audio-jax annotate --input recordings --output annotated --config configs/annotate.py \
        --config.experts.whisper.target="('python', 'whisper_jsonl.py')"

Every step has a default that needs only the installation; the experts below replace some of them.
moss_audio_jax/annotate/experts.py describes the request and reply of each step. Every reply is
checked, and if it is wrong the default's evidence stays. Rows from experts are always kept; rows
from the small model only if it knows the sound. A key is read from the environment variable that
`key_from` names, and is never written anywhere.
"""

from moss_audio_jax.annotate import defaults


def get_config():
    c = defaults.get_config()
    # Two independent recognisers; a transcript is kept if they agree.
    c.experts.whisper = {
        "kind": "command",
        "target": ("python", "whisper_jsonl.py"),
        "timeout": 3600.0,
    }
    c.experts.paraformer = {
        "kind": "command",
        "target": ("python", "paraformer_jsonl.py"),
        "timeout": 3600.0,
    }
    c.speech.systems = ("whisper", "paraformer")
    c.speech.threshold = 0.1
    # One of them also gives the times of words; its command answers both steps.
    c.speech.align = "whisper"
    # A diarisation system, run as a command, says who speaks when.
    c.experts.diariser = {"kind": "command", "target": ("python", "diarise_jsonl.py")}
    c.speech.diarise = "diariser"
    # A language model writes the unified caption, with placeholders such as [1] for times.
    c.experts.writer = {
        "kind": "endpoint",
        "target": "http://localhost:8000/v1",
        "model": "NAME",
        "key_from": "OPENAI_API_KEY",
        "timeout": 120.0,
    }
    c.unified = "writer"
    # A file with an event detector's posteriors beside each audio file: float [T, C], fps, labels.
    c.posteriors = "{folder}/{stem}.frames.npz"
    c.classes = (("Speech", "speech"), ("Music", "music"), ("Bark", "animal"))
    return c
