"""Recorded sounds in Debian's packages of games: animals, vehicles, bells, doors, tools.

`sounds.tsv` lists every recording with its kind, split, licence and author. Recordings that are cut
from one take, or that hold the same sound in two packages, are in one split.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import io
import os
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soxr

from moss_audio_jax.audio import load_audio
from moss_audio_jax.audio.lengths import SAMPLE_RATE
from moss_audio_jax.draw import Draw
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.world.dsp import audible, band_pass, loudest, moving_rms, place, samples, swell
from moss_audio_jax.world.recordings import boxes, held_out
from moss_audio_jax.world.recordings.source import Source, of_kind
from moss_audio_jax.world.sounds import Sound

ROOT = "MOSS_AUDIO_JAX_RECORDINGS"  # a folder where packages are unpacked, if not in the system
MAX_SECONDS = 6.0  # a longer recording is cut to this much around its loudest moment
_MOST_UNITS = 6


class Recording(NamedTuple):
    """A row of the table.

    Attributes:
      kind: a key of `labels.ALL_KINDS`.
      split: "train" (and validation) or "test".
      unit: "one" if it holds one unit of its kind, such as a bark; else "-".
      package: Debian's.
      path: from the root folder; "box!name" if it lies in a box (see `boxes`).
      digest: BLAKE2b of the file or of the part of the box, 6 bytes, hexadecimal.
      licence: as Debian writes it.
      author: who recorded or published it.
    """

    kind: str
    split: str
    unit: str
    package: str
    path: str
    digest: str
    licence: str
    author: str


@functools.cache
def table() -> tuple[Recording, ...]:
    text = resources.files(__package__).joinpath("sounds.tsv").read_text(encoding="utf-8")
    rows = csv.reader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
    assert next(rows) == list(Recording._fields)
    return tuple(Recording(*row) for row in rows)


@dataclasses.dataclass(frozen=True)
class Sounds(Source):
    """The recordings of one package."""

    def available(self) -> bool:
        return all(_file(recording) is not None for recording in self.recordings())

    def recordings(self) -> tuple[Recording, ...]:
        return tuple(one for one in table() if one.package == self.origin)


def recordings(split: str) -> dict[str, tuple[Recording, ...]]:
    """What of the packages that are here a split may use, by kind.

    Validation uses what training uses: of most kinds there is too little for three parts.
    """
    wanted = "test" if held_out.checked(split) == "test" else "train"
    here = {source.origin for source in of_kind("sound")}
    return _by_kind(wanted, frozenset(here))


@functools.cache
def _by_kind(split: str, packages: frozenset[str]) -> dict[str, tuple[Recording, ...]]:
    found: dict[str, list[Recording]] = {}
    for one in table():
        if one.split == split and one.package in packages:
            found.setdefault(one.kind, []).append(one)
    return {kind: tuple(of_it) for kind, of_it in sorted(found.items())}


def make(kind: str, split: str, draw: Draw) -> Sound:
    """A sound of a kind from a recording that the split may use.

    In training and validation a recording plays up to 8% faster or slower. One that holds a single
    unit is played 1 to 6 times, and these times are the sound's onsets; other sounds have none,
    because nothing tells them.

    Raises:
      UsageError: no recording of this kind is here for the split.
      InputError: a file differs from the table's, or cannot be read.
    """
    known = recordings(split)
    if kind not in known:
        raise UsageError(
            f"no recording of kind {kind!r} in split {split!r}; expected one of "
            f"{', '.join(known) or 'none: no package of recorded sounds is here'}"
        )
    recording = draw.choice(known[kind])
    wav = load(recording)
    if split != "test":
        wav = soxr.resample(wav, SAMPLE_RATE, SAMPLE_RATE * draw.uniform(0.92, 1.08))
    if recording.unit == "one":
        wav, onsets = _repeated(wav, draw)
    else:
        wav, onsets = _cut(wav, draw), []
    return Sound(wav / loudest(wav), onsets, recording.path)


def _repeated(wav: np.ndarray, draw: Draw) -> tuple[np.ndarray, list[int]]:
    """One to six of a unit, at about equal distances, and where each begins."""
    pause = draw.uniform(0.35, 0.9)
    pieces: list[tuple[int, np.ndarray]] = []
    at = 0
    for _ in range(draw.integer(1, _MOST_UNITS)):
        pieces.append((at, 10 ** (draw.uniform(-3, 0) / 20) * wav))
        at += max(samples(pause * draw.uniform(0.92, 1.08)), len(wav) + samples(0.05))
        if at + len(wav) > samples(MAX_SECONDS):
            break
    return place(pieces), [start for start, _ in pieces]


def _cut(wav: np.ndarray, draw: Draw) -> np.ndarray:
    """At most MAX_SECONDS, with the loudest moment somewhere within."""
    most = samples(MAX_SECONDS)
    if len(wav) <= most:
        return wav
    peak = int(np.argmax(moving_rms(wav, 0.05, 80))) * 80
    first = min(max(peak - samples(draw.uniform(0.3, MAX_SECONDS - 0.3)), 0), len(wav) - most)
    return _trimmed(wav[first : first + most] * swell(most, 0.02, 0.05))


@functools.lru_cache(512)
def load(recording: Recording) -> np.ndarray:
    """float64 [n] at 16 kHz, from the first to the last audible sample, without sound below 20 Hz.

    Raises:
      InputError: the file is missing, differs from the table's or is no sound.
    """
    file = _file(recording)
    if file is None:
        raise InputError(f"{recording.path} is not here: apt-get install {recording.package}")
    name = recording.path.partition("!")[2]
    if name:
        inside = boxes.members(file)
        if name not in inside:
            raise InputError(f"{file} holds no {name}; expected another version of the package")
        data = inside[name]
    else:
        data = file.read_bytes()
    if digest(data) != recording.digest:
        raise InputError(
            f"{recording.path} of {recording.package} differs from the recording in the table; "
            "install the version of Debian 12"
        )
    wav = load_audio(io.BytesIO(data)).astype(np.float64)
    wav = band_pass(wav - wav.mean(), 20, 8000)
    return _trimmed(wav)


def digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=6).hexdigest()


def _trimmed(wav: np.ndarray) -> np.ndarray:
    first, last = audible(wav)
    return wav[first:last]


def _file(recording: Recording) -> Path | None:
    """The file or the box, in the folder ROOT or in the system."""
    path = recording.path.partition("!")[0]
    for root in (os.environ.get(ROOT), "/"):
        if root and (found := Path(root) / path).is_file():
            return found
    return None


def _sources() -> tuple[Sounds, ...]:
    licences: dict[str, list[str]] = {}
    for one in table():
        licences.setdefault(one.package, []).append(one.licence)
    return tuple(
        Sounds(
            name=f"{package} sounds",
            kind="sound",
            licence=", ".join(sorted(set(of_it))),
            origin=package,
            install=f"apt-get install {package}",
        )
        for package, of_it in sorted(licences.items())
    )


SOURCES = _sources()
