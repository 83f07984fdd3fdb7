"""Sources of recordings: what each holds, under which licence, and whether it is here."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np

from moss_audio_jax.draw import Draw
from moss_audio_jax.errors import InputError, UsageError

if TYPE_CHECKING:
    from moss_audio_jax.world.espeak import SpokenWord

GROUP = "moss_audio_jax.recordings"  # of entry points: a Source, or a tuple of them
KINDS = ("voice", "instrument", "score", "sound", "text")
# Modules of this package; each has SOURCES, and imports what its sources need only when they work.
_BUILT_IN = (
    "scores",
    "soundfonts",
    "sounds",
    "texts.grammar",
    "texts.words",
    "texts.prose",
    "voices.espeak",
    "voices.flite",
    "voices.kokoro",
    "voices.piper",
    "voices.prompts",
)


@dataclasses.dataclass(frozen=True)
class Source:
    """Something that sounds or texts come from. Its module is a plug-in; its package optional.

    Attributes:
      name: what labels and tables call it.
      kind: one of KINDS.
      licence: of the data; of the program too, where that makes the data.
      origin: the package that holds the data.
      install: the command that brings it.
    """

    name: str
    kind: str
    licence: str
    origin: str
    install: str

    def available(self) -> bool:
        """Whether the package is here."""
        raise NotImplementedError

    def require(self) -> None:
        """Raises InputError, with the command to run, unless the package is here."""
        if not self.available():
            raise InputError(f"the {self.kind} source {self.name} is not here: {self.install}")


class Speaker(NamedTuple):
    """A person, or a setting of a synthesiser that sounds like one.

    Attributes:
      name: unique within the source.
      language: code of what is spoken, such as "en".
      sex: "male" or "female".
      accent: as in `speakers.ACCENTS`, or None.
    """

    name: str
    language: str
    sex: str
    accent: str | None = None


class Line(NamedTuple):
    """wav float64 [n] at 16 kHz, from the first word's start to the last one's end, peak 1.

    `words` and `phones` are None where nothing tells their times; phones have espeak's names.
    `file` names the recording, if it is one.
    """

    wav: np.ndarray
    text: str
    words: list[SpokenWord] | None
    phones: list[SpokenWord] | None = None
    file: str | None = None


class Voice(Source):
    """A source of kind "voice".

    Attributes:
      certain: it always says its text, so that no judge has to listen.
    """

    certain: ClassVar[bool] = False

    def speakers(self, split: str) -> tuple[Speaker, ...]:
        """Who may speak in a split, one of `held_out.SPLITS`; see `held_out.speakers`."""
        raise NotImplementedError

    def texts(self, speaker: Speaker, split: str) -> tuple[str, ...] | None:
        """All that a recorded speaker says in a split; None: whatever is asked for."""
        return None

    def say(self, text: str, speaker: Speaker, draw: Draw) -> Line:
        """Says a text of `sentences` or of `texts`; the same draw gives the same sound.

        Raises:
          InputError: the package is missing, or cannot say this text.
        """
        raise NotImplementedError


class Text(Source):
    """A source of kind "text"."""

    def sentence(self, draw: Draw) -> str:
        """A sentence of any split: words as they are said, joined by single spaces."""
        raise NotImplementedError


@functools.cache
def sources() -> tuple[Source, ...]:
    """Every source, here or not: those of this package, then those of other packages.

    Raises:
      InputError: an entry point that cannot be loaded, or a name that is used twice.
    """
    found: list[Source] = []
    for module in _BUILT_IN:
        found += importlib.import_module(f"{__package__}.{module}").SOURCES
    for point in importlib.metadata.entry_points(group=GROUP):
        found += _plugged_in(point)
    names = [source.name for source in found]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two sources of recordings are called {name!r}; rename one")
    return tuple(found)


def of_kind(kind: str) -> tuple[Source, ...]:
    """The sources of a kind that are here."""
    return tuple(s for s in sources() if s.kind == kind and s.available())


def named(name: str) -> Source:
    for source in sources():
        if source.name == name:
            return source
    raise UsageError(
        f"no source {name!r} of recordings; expected one of "
        f"{', '.join(source.name for source in sources())}"
    )


def table() -> str:
    """A line for each source: name, kind, licence, and "here" or the command that brings it."""
    rows = [("source", "kind", "licence", "here, or how to get it")]
    rows += [(s.name, s.kind, s.licence, "here" if s.available() else s.install) for s in sources()]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]])
        for row in rows
    )


def _plugged_in(point: importlib.metadata.EntryPoint) -> tuple[Source, ...]:
    try:
        loaded = point.load()
    except Exception as error:  # importing runs a user's code
        raise InputError(
            f"entry point {point.name!r} of the group {GROUP}: cannot be imported "
            f"({type(error).__name__}: {error})"
        ) from None
    found = (loaded,) if isinstance(loaded, Source) else loaded
    if not isinstance(found, tuple) or not all(
        isinstance(s, Source) and s.kind in KINDS for s in found
    ):
        raise InputError(
            f"entry point {point.name!r} of the group {GROUP}: expected a Source or a tuple of "
            f"Sources, each of a kind {', '.join(KINDS)}"
        )
    return found
