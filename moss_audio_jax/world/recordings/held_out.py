"""What only tests may use: speakers, recordings and sentences.

Rules and names lie here and nowhere else, so that any component can check them. Training and
validation share speakers; tests have other speakers, other recordings and other sentences. The
split of each recorded sound is in its table, `sounds.tsv`.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import re
import unicodedata
from collections.abc import Iterable
from importlib import resources

from moss_audio_jax.draw import bucket
from moss_audio_jax.errors import UsageError
from moss_audio_jax.world.recordings.source import Speaker
from moss_audio_jax.world.speakers import HELD_OUT_VOICES
from moss_audio_jax.world.splits import sentence_part

SPLITS = ("train", "validation", "test")
# Patterns of the speakers of each source whom only tests hear. The Spanish prompts are spoken by
# the woman who speaks the English ones, so they are for tests too.
TEST_SPEAKERS = {
    "asterisk-en": ("*",),
    "asterisk-es": ("*",),
    "asterisk-fr": (),
    "asterisk-it": (),
    "asterisk-ru": (),
    "espeak": HELD_OUT_VOICES,
    "flite": ("rms",),
    "kokoro": ("new*",),
    "piper": (),
}
# Patterns of recordings that only tests use, whatever the hash says of them.
TEST_RECORDINGS: dict[str, tuple[str, ...]] = {"asterisk-en": ("*",), "asterisk-es": ("*",)}
# Patterns of the programs of soundfonts ("bank:number") that only tests hear. They share no sample
# with those of training, and the second font shares none with the first.
TEST_PROGRAMS = {
    "fluid": (
        "0:18",  # rock organ
        "0:20",  # reed organ
        "0:30",  # distorted guitar
        "0:33",  # fingered bass
        "0:35",  # fretless bass
        "0:37",  # pop bass
        "0:50",  # synthetic strings
        "0:53",  # voices, "oh"
        "0:59",  # muted trumpet
        "0:64",  # soprano saxophone
        "0:66",  # tenor saxophone
        "0:74",  # recorder
        "0:82",  # calliope
    ),
    "timgm6mb": ("*",),
}
_SENTENCES = "test_sentences.txt"  # digests of what the English prompts say


def checked(split: str) -> str:
    if split not in SPLITS:
        raise UsageError(f"no split {split!r} of recordings; expected one of {', '.join(SPLITS)}")
    return split


def speaker_part(source: str, speaker: str) -> str:
    """ "test", or "train" for those who speak in training and validation.

    Of a source that is not listed above, the hash of their names holds out 10% of the speakers.
    """
    if source in TEST_SPEAKERS:
        held = any(fnmatch.fnmatchcase(speaker, name) for name in TEST_SPEAKERS[source])
    else:
        held = bucket("speaker", source, speaker) < 10
    return "test" if held else "train"


def speakers(source: str, all_of_it: Iterable[Speaker], split: str) -> tuple[Speaker, ...]:
    """Those of a source's speakers who may speak in a split."""
    wanted = "test" if checked(split) == "test" else "train"
    return tuple(one for one in all_of_it if speaker_part(source, one.name) == wanted)


def program_part(source: str, program: str) -> str:
    """ "test", or "train" for the programs of a soundfont that training and validation hear.

    Of a font that is not listed above, the hash of their names holds out 10%.
    """
    if source in TEST_PROGRAMS:
        held = any(fnmatch.fnmatchcase(program, name) for name in TEST_PROGRAMS[source])
    else:
        held = bucket("program", source, program) < 10
    return "test" if held else "train"


def recording_part(source: str, name: str) -> str:
    """The one split that may use a recording or a score, by its name.

    "train" (90%), "validation" (5%) or "test" (5% and TEST_RECORDINGS).
    """
    if any(fnmatch.fnmatchcase(name, held) for held in TEST_RECORDINGS.get(source, ())):
        return "test"
    at = bucket("recording", source, name)
    return "train" if at < 90 else "validation" if at < 95 else "test"


def recordings(source: str, names: Iterable[str], split: str) -> tuple[str, ...]:
    """Those of a source's recordings that a split may use."""
    checked(split)
    return tuple(name for name in names if recording_part(source, name) == split)


def sentence_allowed(text: str, split: str) -> bool:
    """Whether a synthesiser may say a sentence in a split; by `splits.sentence_part`.

    What the recorded test prompts say, nobody says in training.
    """
    said = plain(text)
    return sentence_part(said) == checked(split) and digest(said) not in test_sentences()


def plain(text: str) -> str:
    """Lower case, letters, digits and apostrophes alone, single spaces: what sentences compare."""
    lower = unicodedata.normalize("NFC", text).lower().replace("\u2019", "'")
    return " ".join(re.findall(r"[^\W_]+(?:'[^\W_]+)*", lower))


def digest(said: str) -> str:
    return hashlib.blake2b(said.encode(), digest_size=8).hexdigest()


@functools.cache
def test_sentences() -> frozenset[str]:
    """Digests of what the recorded test prompts say; the texts have a licence of their own."""
    return frozenset(resources.files(__package__).joinpath(_SENTENCES).read_text().split())
