"""Sentences of novels whose copyright has ended, from Debian's packages."""

from __future__ import annotations

import dataclasses
import functools
import re
import struct
import zlib
from pathlib import Path

from moss_audio_jax.draw import Draw
from moss_audio_jax.world.recordings.source import Text
from moss_audio_jax.world.recordings.spoken import spoken

_WORDS = range(3, 17)  # in a line; longer sentences are said in clauses
_ABBREVIATED = ("mr", "mrs", "ms", "dr", "st", "esq", "etc", "viz", "ie", "eg", "co")
_POINT = re.compile(rf"\b({'|'.join(_ABBREVIATED)})\.", re.IGNORECASE)
_STRINGS, _STRING, _NONE = 16, 9, -1  # types in R's files, and the length of a missing string


@dataclasses.dataclass(frozen=True)
class Prose(Text):
    """Attributes: path: of the file that holds the text."""

    path: Path

    def available(self) -> bool:
        return self.path.is_file()

    def sentence(self, draw: Draw) -> str:
        self.require()
        return draw.choice(_lines(self.path))


@functools.cache
def _lines(path: Path) -> tuple[str, ...]:
    """The clauses of a text, as they are said, each once."""
    text = _r_strings(path) if path.suffix == ".rdb" else path.read_text("latin-1")
    text = re.sub(r"(?<=\w)-\s*\n\s*(?=\w)", "-", text).replace("_", "").replace("--", ", ")
    text = _POINT.sub(r"\1", text)  # no sentence ends there
    found: dict[str, None] = {}
    for sentence in re.split(r"[.!?]['\")]*\s+|\n\s*\n", text):
        for clause in (
            [sentence] if len(sentence.split()) in _WORDS else re.split("[,;:]", sentence)
        ):
            said = spoken(re.sub(r"(?<!\w)[`']|'(?!\w)", " ", clause))
            if said is None or len(words := said.split()) not in _WORDS:
                continue
            letters = {word for word in words if len(word) == 1} - {"a", "i", "o"}
            if not letters and not set(_ABBREVIATED) & set(words) and said.isascii():
                found[said] = None
    return tuple(found)


def _r_strings(path: Path) -> str:
    """All vectors of strings in a database of R's: a length and a zlib stream for each object."""
    data, lines = path.read_bytes(), []
    while data:
        stream = zlib.decompressobj()
        lines += _r_vector(stream.decompress(data[4:]))
        data = stream.unused_data
    return "\n".join(lines)


def _r_vector(data: bytes) -> list[str]:
    """The strings of a serialised vector (big-endian); of another object none."""
    (version,) = struct.unpack_from(">i", data, 2)
    at = 14
    if version == 3:  # followed by the name of an encoding
        at += 4 + struct.unpack_from(">i", data, at)[0]
    kind, count = struct.unpack_from(">ii", data, at)
    found, at = [], at + 8
    for _ in range(count if kind & 255 == _STRINGS else 0):
        flags, size = struct.unpack_from(">ii", data, at)
        at += 8 + max(size, 0)
        if flags & 255 == _STRING and size != _NONE:
            found.append(data[at - size : at].decode("utf-8", "replace"))
    return found


SOURCES = (
    Prose(
        name="alice",
        kind="text",
        licence="public domain (L. Carroll)",
        origin="Debian flite",
        install="apt-get install flite",
        path=Path("/usr/share/doc/flite/examples/alice"),
    ),
    Prose(
        name="austen",
        kind="text",
        licence="public domain (J. Austen), package MIT",
        origin="Debian r-cran-janeaustenr",
        install="apt-get install r-cran-janeaustenr",
        path=Path("/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"),
    ),
)
