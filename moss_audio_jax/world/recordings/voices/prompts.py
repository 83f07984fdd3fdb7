"""Telephone prompts that people read, with their texts, from Debian's packages for Asterisk.

Nothing tells the times of their words. The English ones, and the Spanish ones of the same woman,
are for tests alone (`held_out`).
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import re
from pathlib import Path

import soundfile

from moss_audio_jax.draw import Draw
from moss_audio_jax.errors import InputError
from moss_audio_jax.world.recordings import held_out
from moss_audio_jax.world.recordings.source import Line, Speaker, Voice
from moss_audio_jax.world.recordings.spoken import spoken
from moss_audio_jax.world.recordings.voices.line import line

_SOUNDS = Path("/usr/share/asterisk/sounds")
_TEXTS = "/usr/share/doc/asterisk-core-sounds-{0}/core-sounds-{0}.txt.gz"
# What is no prompt, or holds a remark of the authors.
_REMARK = re.compile(r"[][(){}<>]")


@dataclasses.dataclass(frozen=True)
class Prompts(Voice):
    """One package: one speaker.

    Attributes:
      folder: of the recordings, in the packages' folder of sounds.
      speaker: the only one.
    """

    folder: str
    speaker: Speaker

    def available(self) -> bool:
        text = Path(_TEXTS.format(self.speaker.language))
        return (_SOUNDS / self.folder).is_dir() and text.is_file()

    def speakers(self, split: str) -> tuple[Speaker, ...]:
        return held_out.speakers(self.name, (self.speaker,), split)

    def texts(self, speaker: Speaker, split: str) -> tuple[str, ...]:
        self.require()
        return held_out.recordings(self.name, self.files(), split)

    def files(self) -> dict[str, tuple[Path, ...]]:
        """The recordings of each text, as it is said. The text decides the split."""
        return _files(self.speaker.language, _SOUNDS / self.folder)

    def say(self, text: str, speaker: Speaker, draw: Draw) -> Line:
        self.require()
        if text not in self.files():
            raise InputError(f"{self.name} has no recording of {text!r}; use one of its texts")
        path = draw.choice(self.files()[text])
        wav, rate = soundfile.read(path, dtype="float64")
        return line(wav, rate, text, file=str(path.relative_to(_SOUNDS)))


@functools.cache
def _files(language: str, folder: Path) -> dict[str, tuple[Path, ...]]:
    with gzip.open(_TEXTS.format(language), "rt", encoding="utf-8-sig") as file:
        listed = [entry.strip() for entry in file]
    found: dict[str, tuple[Path, ...]] = {}
    for entry in listed:
        name, colon, said = entry.partition(":")
        path = folder / f"{name.strip()}.wav"
        if not colon or entry.startswith(";") or _REMARK.search(said):
            continue
        text = spoken(said, language)
        if text and path.is_file():
            found[text] = (*found.get(text, ()), path)
    return found


def _prompts(language: str, folder: str, sex: str, licence: str) -> Prompts:
    package = f"asterisk-core-sounds-{language}"
    accent = "American" if language == "en" else None
    return Prompts(
        name=f"asterisk-{language}",
        kind="voice",
        licence=licence,
        origin=f"Debian {package}-wav",
        install=f"apt-get install {package} {package}-wav",
        folder=folder,
        speaker=Speaker(folder.rpartition("_")[2], language, sex, accent),
    )


SOURCES = (
    _prompts("en", "en_US_f_Allison", "female", "CC-BY-SA-3.0"),
    _prompts("es", "es_MX_f_Allison", "female", "CC-BY-SA-3.0"),
    _prompts("fr", "fr_CA_f_June", "female", "CC-BY-SA-3.0"),
    _prompts("it", "it_IT_m_Carlo", "male", "CC-BY-SA-3.0"),
    _prompts("ru", "ru_RU_f_IvrvoiceRU", "female", "CC-BY-3.0"),
)
