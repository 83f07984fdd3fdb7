"""Reads speech data in its usual layouts: LibriSpeech, AISHELL-1, FLEURS, Kaldi, JSONL, TextGrid,
CTM.

This does not open audio files, because scoring only needs the references.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePath
from typing import Any, Literal, NamedTuple

from moss_audio_jax.audio.io import SUFFIXES
from moss_audio_jax.buckets import files_below, is_remote
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.evaluate.reading import (
    first_of,
    group_of,
    json_kind,
    name_of,
    read_keyed,
    read_lines,
    read_rows,
    text_of,
)
from moss_audio_jax.files import brief, shown
from moss_audio_jax.text import textgrid

Level = Literal["word", "sentence"]
Cut = tuple[float, float | None]  # start, end in seconds; None is the end of the file

AUDIO_KEYS = ("audio", "audio_path", "audio_filepath")
# AISHELL-1 is split by speaker.
_AISHELL_SPEAKERS = {"train": (2, 723), "dev": (724, 763), "test": (764, 916)}
_TIERS: dict[Level, tuple[str, ...]] = {
    "word": ("words", "word"),
    "sentence": ("sentences", "sentence", "segments", "utterances", "utterance"),
}
_NO_SPEECH = {"", "<eps>", "sil", "sp", "<sil>"}  # forced aligners' labels of pauses


class Entry(NamedTuple):
    """A recording and its reference.

    `reference` is {"text"} or {"slots", "level"}; `cut` is a part of the recording.
    """

    id: str
    audio: tuple[str, ...]
    reference: dict[str, Any]
    group: dict[str, Any]
    cut: Cut | None = None


class Root(NamedTuple):
    """The folder to which audio paths are relative.

    Paths may not leave a closed root: absolute paths and ".." are refused. Symbolic links inside it
    are followed.
    """

    folder: Path
    closed: bool

    @classmethod
    def of(cls, given: Path | None, otherwise: Path, allow_outside: bool) -> Root:
        """`given` is closed unless `allow_outside` is set; the data's own folder is always open."""
        return cls(otherwise if given is None else given, given is not None and not allow_outside)

    def place(self, name: str, where: str) -> str:
        """The path of a file in a manifest. Raises InputError if it leaves a closed root."""
        if self.closed and (is_remote(name) or os.path.isabs(name) or ".." in PurePath(name).parts):
            raise InputError(
                f"{where}: {brief(name)!r} lies outside of --audio-root {shown(self.folder)}; "
                "expected a path relative to it without '..' (--allow-outside allows others)"
            )
        if not name or "\0" in name:
            raise InputError(f"{where}: {brief(repr(name))} is not a path of a file")
        return name if is_remote(name) else str(self.folder / name)


Clips = tuple[list[Entry], list[str]]  # clips, and a message for each oddity


# --- transcripts ---------------------------------------------------------------------------------


def read_transcripts(
    data: Path,
    audio_root: Path | None = None,
    split: str = "test",
    allow_outside: bool = False,
) -> Clips:
    """Clips with {"text"} from data in any of these layouts.

    Args:
      data: a JSONL or JSON manifest ("audio", "text"; optional: "id", "dimension", "language", and
        "offset" and "duration" in seconds for a part of the file); a Kaldi folder (text, wav.scp,
        segments); LibriSpeech or one of its parts; AISHELL-1's data_aishell; a language's folder
        of FLEURS, or its .tsv.
      audio_root: replaces the folder to which audio paths are relative; they may not leave it.
      split: train, dev or test, for AISHELL-1 and FLEURS.
      allow_outside: audio paths may leave `audio_root`.

    Raises:
      InputError: no known layout, or a line that cannot be read.
    """

    def root(otherwise: Path) -> Root:
        return Root.of(audio_root, otherwise, allow_outside)

    if data.exists() and not data.is_dir():
        if data.suffix == ".tsv":
            return _fleurs(data, root(data.parent / "audio" / data.stem))
        return _manifest(data, root(data.parent))
    if (data / "wav.scp").exists():
        return _kaldi(data, root(Path()))
    if found := sorted(data.glob("transcript/aishell_transcript*.txt")):
        return _aishell(found[0], root(data / "wav"), split)
    if (data / f"{split}.tsv").exists():
        return _fleurs(data / f"{split}.tsv", root(data / "audio" / split))
    if found := [f for f in files_below(data) if f.name.endswith(".trans.txt")]:
        return _librispeech(data, found, root(data))
    if not data.exists():
        raise InputError(f"{data}: no such file or folder")
    raise InputError(
        f"{data}: no transcripts; expected a .jsonl manifest, wav.scp and text (Kaldi), "
        f"*.trans.txt (LibriSpeech), transcript/aishell_transcript*.txt or {split}.tsv (FLEURS)"
    )


def _manifest(data: Path, root: Root) -> Clips:
    clips = []
    for where, row in read_rows(data):
        text = first_of(row, ("text", "transcript"), where)
        if not isinstance(text, str):
            raise InputError(f"{where}: the text is {json_kind(text)}; expected a string")
        clips.append(row_clip(row, where, root, {"text": text}))
    return _noted(clips)


def row_clip(row: dict[str, Any], where: str, root: Root, reference: dict[str, Any]) -> Entry:
    """A clip from a JSONL row. If it has no "id", its id is made of its audio path and cut."""
    audio = first_of(row, AUDIO_KEYS, where)
    paths = [audio] if isinstance(audio, str) else audio
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise InputError(
            f"{where}: the audio is {json_kind(audio)}; expected a path or a list of paths"
        )
    placed = tuple(root.place(path, where) for path in paths)
    cut, start = None, row.get("offset")
    if start is not None or row.get("duration") is not None:
        if len(paths) != 1:
            raise InputError(
                f"{where}: offset and duration need exactly one audio file; there are {len(paths)}"
            )
        cut = _cut(start, row.get("duration"), where)
    name = name_of(row, " ".join(paths) + (f"@{start}" if start is not None else ""), where)
    group = group_of(row, ("dimension", "language", "category"), where)
    return Entry(name, placed, reference, group, cut)


def _cut(offset: Any, duration: Any, where: str) -> Cut:
    times = [0 if offset is None else offset, 0 if duration is None else duration]
    for name, time in zip(("offset", "duration"), times, strict=True):
        # Excludes infinity and integers that are too large for a float.
        if isinstance(time, bool) or not isinstance(time, int | float) or not 0 <= time < 1e9:
            what = json_kind(time) if isinstance(time, str | dict | list) else brief(time, 40)
            raise InputError(f"{where}: the {name} is {what}; expected seconds, 0 or more")
    start, length = map(float, times)
    if duration is not None and length == 0:
        raise InputError(f"{where}: the duration is 0; expected more than 0")
    return start, None if duration is None else start + length


def _librispeech(data: Path, files: list[Path], root: Root) -> Clips:
    clips = []
    for file in files:
        folder = file.parent.relative_to(data)
        parts = file.resolve().parts  # part/speaker/chapter/*.trans.txt
        for where, name, text in read_keyed(file):
            if not text:
                raise InputError(f"{where}: {name} has no transcript")
            group = {"dimension": parts[max(-4, -len(parts))], "language": "en"}
            audio = root.place(str(folder / f"{name}.flac"), where)
            clips.append(Entry(name, (audio,), {"text": text}, group))
    return clips, []


def _aishell(file: Path, root: Root, split: str) -> Clips:
    if split not in _AISHELL_SPEAKERS:
        raise UsageError(f"split {split!r} of AISHELL-1: expected train, dev or test")
    first, last = _AISHELL_SPEAKERS[split]
    clips = []
    for where, name, text in read_keyed(file):
        speaker = re.fullmatch(r"BAC\d{3}(S(\d{4}))W\d{4}", name)
        if not speaker:
            raise InputError(
                f"{where}: {name!r} is not an AISHELL-1 utterance (like BAC009S0764W0121)"
            )
        if not first <= int(speaker[2]) <= last:
            continue
        audio = root.place(f"{split}/{speaker[1]}/{name}.wav", where)
        reference = {
            "text": text.replace(" ", "")
        }  # AISHELL-1 puts spaces between words, unlike Chinese writing
        clips.append(Entry(name, (audio,), reference, {"dimension": "AISHELL-1", "language": "zh"}))
    return _noted(clips)


def _fleurs(file: Path, root: Root) -> Clips:
    """Columns: id, file name, raw text, normalised text, letters, samples, gender.

    Ids repeat, file names do not.
    """
    language = file.resolve().parent.name
    code = {"cmn": "zh", "yue": "zh"}.get(language.split("_")[0], language.split("_")[0])
    clips = []
    for where, line in read_lines(file):
        columns = line.split("\t")
        if len(columns) < 4:
            raise InputError(
                f"{where}: {len(columns)} tab-separated column(s); expected id, file, text"
            )
        group = {"dimension": f"FLEURS {language}", "language": code}
        name, text = Path(columns[1]).stem, columns[2].strip()
        clips.append(Entry(name, (root.place(columns[1], where),), {"text": text}, group))
    return _noted(clips)


def _kaldi(folder: Path, root: Root) -> Clips:
    """`text` has a line for each utterance. Utterances are recordings, or `segments` of them."""
    if not (folder / "text").exists():
        raise InputError(f"{folder / 'text'}: no such file; a Kaldi folder has text and wav.scp")
    known: dict[str, tuple[str, Cut | None]] = {}
    # File names need not be UTF-8.
    for where, name, path in read_keyed(folder / "wav.scp", errors="surrogateescape"):
        if path.endswith("|") or not path:
            raise InputError(
                f"{where}: {name} is a command (a pipe), which is never run, or empty; "
                "expected an audio file"
            )
        known[name] = (root.place(path, where), None)
    listed = folder / "wav.scp"
    if (folder / "segments").exists():
        listed = folder / "segments"
        known = {name: (known[at][0], cut) for name, at, cut in _segments(listed, known)}
    clips = []
    for where, name, text in read_keyed(folder / "text"):
        if name not in known:
            raise InputError(f"{where}: {name} is not in {listed}")
        audio, cut = known.pop(name)
        clips.append(Entry(name, (audio,), {"text": text}, {"dimension": folder.name}, cut))
    clips, problems = _noted(clips)
    return clips, problems + [f"{folder / 'text'}: no transcript of {name}" for name in known]


def _segments(file: Path, recordings: Iterable[str]) -> Iterable[tuple[str, str, Cut]]:
    """(utterance, recording, cut) of Kaldi's segments. An end of -1 means the recording's end."""
    for where, line in read_lines(file):
        try:
            name, recording, *times = line.split()
            start, end = map(float, times)
        except ValueError:
            raise InputError(
                f"{where}: expected `utterance recording start end`, found {brief(line, 60)!r}"
            ) from None
        if recording not in recordings:
            raise InputError(f"{where}: {recording} is not in {file.parent / 'wav.scp'}")
        if not 0 <= start < (math.inf if end == -1 else end) or end == math.inf:
            raise InputError(f"{where}: {name} runs from {start:g} to {end:g} s")
        yield name, recording, (start, None if end == -1 else end)


def _noted(clips: list[Entry]) -> Clips:
    return clips, [
        f"{clip.id}: an empty transcript" for clip in clips if not clip.reference["text"].strip()
    ]


# --- transcripts with times ----------------------------------------------------------------------


def read_timed(
    data: Path,
    audio_root: Path | None = None,
    level: Level = "word",
    tier: str | None = None,
    allow_outside: bool = False,
) -> Clips:
    """Clips with {"slots": [{"text", "start", "end"}, ...], "level"}; times in seconds.

    Args:
      data: a JSONL manifest ("audio" and "words" or "sentences"; with "offset" times count from
        there), a .ctm or .TextGrid file, or a folder of those.
      audio_root: the folder of the audio. The audio of a TextGrid or CTM has the same name, in any
        subfolder. Manifests may not name files outside the folder, unless `allow_outside`.
      level: which of a row's lists, or of a TextGrid's tiers, is the reference.
      tier: the name of the TextGrid's tier, if it is unusual.

    Raises:
      InputError: no such data, a line that cannot be read, or impossible times.
    """
    if data.is_dir():
        files = sorted(file for file in files_below(data) if file.suffix in (".TextGrid", ".ctm"))
        if not files:
            raise InputError(f"{data}: no .TextGrid or .ctm file in it")
    elif not data.exists():
        raise InputError(f"{data}: no such file or folder")
    elif data.suffix not in (".TextGrid", ".ctm"):
        return _timed_rows(data, Root.of(audio_root, data.parent, allow_outside), level)
    else:
        files = [data]
    timed: list[tuple[str, str, list]] = []  # where, name, slots
    for file in files:
        if file.suffix == ".ctm":
            named = read_ctm(file).items()
            timed += ((f"{shown(file)}: {name}", name, slots) for name, slots in named)
        else:
            timed.append((shown(file), file.stem, read_textgrid(file, tier or _TIERS[level])))
    otherwise = data if data.is_dir() else data.parent
    find = _finder(Root.of(audio_root, otherwise, allow_outside))
    clips = []
    for where, name, slots in timed:
        reference = {"slots": checked_slots(slots, where), "level": level}
        clips.append(Entry(name, (find(name, where),), reference, {"level": level}))
    return clips, []


def _timed_rows(data: Path, root: Root, level: Level) -> Clips:
    clips = []
    for where, row in read_rows(data):
        slots = first_of(row, (f"{level}s",), where)
        reference = {"slots": checked_slots(slots, where), "level": level}
        clip = row_clip(row, where, root, reference)
        clips.append(clip._replace(group={**clip.group, "level": level}))
    return clips, []


def checked_slots(slots: Any, where: str) -> list[dict[str, Any]]:
    """[{"text", "start", "end"}, ...] in order of time.

    Raises:
      InputError: `slots` is something else, or 0 <= start <= end does not hold.
    """
    try:
        found = [
            {
                "text": text_of(s["text"], where, "a text"),
                "start": float(s["start"]),
                "end": float(s["end"]),
            }
            for s in slots
        ]
    except (TypeError, KeyError, ValueError, OverflowError):
        raise InputError(
            f'{where}: expected a list of {{"text", "start", "end"}} with times in seconds'
        ) from None
    for slot in found:
        if not 0 <= slot["start"] <= slot["end"] < float("inf"):
            raise InputError(
                f"{where}: {slot['text'][:40]!r} runs from {slot['start']} to {slot['end']} s; "
                "expected 0 <= start <= end"
            )
    return sorted(found, key=lambda slot: (slot["start"], slot["end"]))


def read_ctm(file: Path) -> dict[str, list[dict[str, Any]]]:
    """Timed words of each recording of a CTM (lines `name channel start duration word
    [confidence]`)."""
    found: dict[str, list[dict[str, Any]]] = {}
    for where, line in read_lines(file):
        if line.startswith(";;"):
            continue
        try:
            name, _, start, duration, word, *_ = line.split()
            slot = {"text": word, "start": float(start), "end": float(start) + float(duration)}
        except ValueError:
            raise InputError(
                f"{where}: expected `name channel start duration word`, found {brief(line, 60)!r}"
            ) from None
        if word.lower() not in _NO_SPEECH:
            found.setdefault(name, []).append({**slot, "end": round(slot["end"], 6)})
    return found


def read_textgrid(file: Path, tiers: str | Iterable[str]) -> list[dict[str, Any]]:
    """The spoken intervals of one tier of a Praat TextGrid; see `textgrid.read_intervals`."""
    found = textgrid.read_intervals(file, tiers)
    return [span for span in found if span["text"].lower() not in _NO_SPEECH]


def _finder(root: Root) -> Callable[[str, str], str]:
    """A function of (name, where): the audio file of that name under `root`, or name.wav."""
    found: dict[str, Path] = {}
    for path in files_below(root.folder) if root.folder.is_dir() else ():
        if path.suffix.lower() in SUFFIXES:
            if path.stem in found:
                raise InputError(
                    f"{path} and {found[path.stem]} have one name; expected one audio file per name"
                )
            found[path.stem] = path
    return lambda name, where: str(found.get(name) or root.place(f"{name}.wav", where))
