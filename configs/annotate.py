"""Annotation with experts of your own in the places where the small model's ears are weakest.

    moss-audio-jax annotate --input recordings --output annotated --config configs/annotate.py \
        --config.experts.whisper.target="('python', 'whisper_jsonl.py')"

Every step has a default that needs nothing but the install; what is plugged in here replaces some.
A request and a reply of each step are described in moss_audio_jax/annotate/experts.py; all that a
plug-in says is checked, and where it is wrong the default's evidence stays. Rows of what experts
say are kept whatever the sound; those of the small model only where it knows the sound. A key is
read from the environment variable that `key_from` names, and is never written anywhere.
"""

from moss_audio_jax.annotate import defaults


def get_config():
    c = defaults.get_config()
    # Two recognisers that were made apart: a transcript is kept where they agree.
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
    # Times of words by one of them; its command answers both steps.
    c.speech.align = "whisper"
    # Who speaks when, by a diarisation system behind a command.
    c.experts.diariser = {"kind": "command", "target": ("python", "diarise_jsonl.py")}
    c.speech.diarise = "diariser"
    # A language model for the unified caption. It writes [1] where a time belongs; code fills it.
    c.experts.writer = {
        "kind": "endpoint",
        "target": "http://localhost:8000/v1",
        "model": "NAME",
        "key_from": "OPENAI_API_KEY",
        "timeout": 120.0,
    }
    c.unified = "writer"
    # An event detector's frames beside each file: float [T, C], fps, labels.
    c.posteriors = "{folder}/{stem}.frames.npz"
    c.classes = (("Speech", "speech"), ("Music", "music"), ("Bark", "animal"))
    return c
