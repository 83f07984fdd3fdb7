"""Speech data as it lies about: LibriSpeech, AISHELL-1, FLEURS, Kaldi, JSONL, TextGrid, CTM.

Nothing here opens audio: a score is made where the references are, with or without the sound.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from moss_audio_jax.errors import InputError, UsageError, extra

Level = Literal["word", "sentence"]

AUDIO_KEYS = ("audio", "audio_path", "audio_filepath")
_AUDIO_SUFFIXES = {".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac", ".webm", ".mp4"}
# AISHELL-1 is split by speaker.
_AISHELL_SPEAKERS = {"train": (2, 723), "dev": (724, 763), "test": (764, 916)}
_TIERS: dict[Level, tuple[str, ...]] = {
    "word": ("words", "word"),
    "sentence": ("sentences", "sentence", "segments", "utterances", "utterance"),
}
_NO_SPEECH = {"", "<eps>", "sil", "sp", "<sil>"}  # what forced aligners write into pauses


class Clip(NamedTuple):
    """A recording and what is true of it: `reference` is {"text"} or {"slots", "level"}."""

    id: str
    audio: tuple[str, ...]
    reference: dict[str, Any]
    group: dict[str, Any]


Clips = tuple[list[Clip], list[str]]  # and what is odd about them, one line each


# --- transcripts ---------------------------------------------------------------------------------


def read_transcripts(data: Path, audio_root: Path | None = None, split: str = "test") -> Clips:
    """Clips with {"text"}, in the layout that `data` has.

    Args:
      data: a JSONL or JSON manifest ("audio", "text", and where known "id", "dimension",
        "language"); a Kaldi folder (text, wav.scp); LibriSpeech or one of its parts; AISHELL-1's
        data_aishell; a language's folder of FLEURS, or its .tsv.
      audio_root: replaces the folder that audio paths count from.
      split: train, dev or test, of AISHELL-1 and FLEURS.

    Raises:
      InputError: no such layout, or a line that cannot be read.
    """
    if data.is_file():
        if data.suffix == ".tsv":
            return _fleurs(data, audio_root)
        return _manifest(data, audio_root)
    if (data / "wav.scp").exists():
        return _kaldi(data, audio_root)
    if found := sorted(data.glob("transcript/aishell_transcript*.txt")):
        return _aishell(found[0], audio_root or data / "wav", split)
    if (data / f"{split}.tsv").exists():
        return _fleurs(data / f"{split}.tsv", audio_root)
    if found := sorted(data.rglob("*.trans.txt")):
        return _librispeech(data, found, audio_root)
    if not data.exists():
        raise InputError(f"{data}: no such file or folder")
    raise InputError(
        f"{data}: no transcripts; expected a .jsonl manifest, wav.scp and text (Kaldi), "
        f"*.trans.txt (LibriSpeech), transcript/aishell_transcript*.txt or {split}.tsv (FLEURS)"
    )


def _manifest(data: Path, audio_root: Path | None) -> Clips:
    clips = []
    for where, row in read_rows(data):
        text = first_of(row, ("text", "transcript"), where)
        if not isinstance(text, str):
            raise InputError(f"{where}: the text is {text!r}; expected a string")
        clips.append(row_clip(row, where, audio_root or data.parent, {"text": text}))
    return _noted(clips)


def row_clip(row: dict[str, Any], where: str, root: Path, reference: dict[str, Any]) -> Clip:
    """A clip from a JSONL row; without an "id" its audio path is its name."""
    audio = first_of(row, AUDIO_KEYS, where)
    paths = [audio] if isinstance(audio, str) else audio
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise InputError(f"{where}: the audio is {audio!r}; expected a path or a list of paths")
    name = str(row.get("id", " ".join(paths)))
    group = {key: row[key] for key in ("dimension", "language", "category") if row.get(key)}
    return Clip(name, tuple(str(root / path) for path in paths), reference, group)


def _librispeech(data: Path, files: list[Path], audio_root: Path | None) -> Clips:
    clips = []
    for file in files:
        folder = (audio_root or data) / file.parent.relative_to(data)
        part = file.resolve().parents[2].name  # part/speaker/chapter/*.trans.txt
        for where, name, text in _keyed_lines(file):
            if not text:
                raise InputError(f"{where}: {name} has no transcript")
            group = {"dimension": part, "language": "en"}
            clips.append(Clip(name, (str(folder / f"{name}.flac"),), {"text": text}, group))
    return clips, []


def _aishell(file: Path, root: Path, split: str) -> Clips:
    if split not in _AISHELL_SPEAKERS:
        raise UsageError(f"split {split!r} of AISHELL-1: expected train, dev or test")
    first, last = _AISHELL_SPEAKERS[split]
    clips = []
    for where, name, text in _keyed_lines(file):
        speaker = re.fullmatch(r"BAC\d{3}(S(\d{4}))W\d{4}", name)
        if not speaker:
            raise InputError(f"{where}: {name!r} is no AISHELL-1 utterance (BAC009S0764W0121)")
        if not first <= int(speaker[2]) <= last:
            continue
        audio = str(root / split / speaker[1] / f"{name}.wav")
        reference = {"text": text.replace(" ", "")}  # words are split there, as nobody writes them
        clips.append(Clip(name, (audio,), reference, {"dimension": "AISHELL-1", "language": "zh"}))
    return _noted(clips)


def _fleurs(file: Path, audio_root: Path | None) -> Clips:
    """id, file name, raw text, normalised text, letters, samples, gender; ids repeat, files not."""
    root = audio_root or file.parent / "audio" / file.stem
    language = file.resolve().parent.name
    code = {"cmn": "zh", "yue": "zh"}.get(language.split("_")[0], language.split("_")[0])
    clips = []
    for number, line in enumerate(_lines(file), 1):
        columns = line.split("\t")
        if len(columns) < 4:
            raise InputError(
                f"{file}:{number}: {len(columns)} tab-separated column(s); expected id, file, text"
            )
        group = {"dimension": f"FLEURS {language}", "language": code}
        name, text = Path(columns[1]).stem, columns[2].strip()
        clips.append(Clip(name, (str(root / columns[1]),), {"text": text}, group))
    return _noted(clips)


def _kaldi(folder: Path, audio_root: Path | None) -> Clips:
    if (folder / "segments").exists():
        raise InputError(f"{folder / 'segments'}: cut the audio at these segments first")
    if not (folder / "text").exists():
        raise InputError(f"{folder / 'text'}: no such file; a Kaldi folder has text and wav.scp")
    paths = {}
    for where, name, path in _keyed_lines(folder / "wav.scp"):
        if path.endswith("|") or not path:
            raise InputError(f"{where}: {name} is a command or nothing; expected an audio file")
        paths[name] = str((audio_root or Path()) / path)
    clips = []
    for where, name, text in _keyed_lines(folder / "text"):
        if name not in paths:
            raise InputError(f"{where}: {name} is not in {folder / 'wav.scp'}")
        clips.append(Clip(name, (paths.pop(name),), {"text": text}, {"dimension": folder.name}))
    clips, problems = _noted(clips)
    return clips, problems + [f"{folder / 'text'}: no transcript of {name}" for name in paths]


def _noted(clips: list[Clip]) -> Clips:
    return clips, [
        f"{clip.id}: an empty transcript" for clip in clips if not clip.reference["text"].strip()
    ]


# --- transcripts with times ----------------------------------------------------------------------


def read_timed(
    data: Path, audio_root: Path | None = None, level: Level = "word", tier: str | None = None
) -> Clips:
    """Clips with {"slots": [{"text", "start", "end"}, ...], "level"}; times in seconds.

    Args:
      data: a JSONL manifest ("audio" and "words" or "sentences"), a .ctm or .TextGrid file, or a
        folder of those.
      audio_root: where the audio lies. That of a TextGrid or CTM has its name, in any subfolder.
      level: which of a row's lists, or of a TextGrid's tiers, is the reference.
      tier: the TextGrid tier's name, where it is none of the usual ones.

    Raises:
      InputError: nothing of the kind there, a line that cannot be read, times that cannot be.
    """
    if data.is_dir():
        files = sorted(file for file in data.rglob("*") if file.suffix in (".TextGrid", ".ctm"))
        if not files:
            raise InputError(f"{data}: no .TextGrid or .ctm file in it")
    elif not data.exists():
        raise InputError(f"{data}: no such file or folder")
    elif data.suffix not in (".TextGrid", ".ctm"):
        return _timed_rows(data, audio_root, level)
    else:
        files = [data]
    timed: list[tuple[str, str, list]] = []  # where, name, slots
    for file in files:
        if file.suffix == ".ctm":
            timed += ((f"{file}: {name}", name, slots) for name, slots in read_ctm(file).items())
        else:
            timed.append((str(file), file.stem, read_textgrid(file, tier or _TIERS[level])))
    find = _finder(audio_root or (data if data.is_dir() else data.parent))
    clips = []
    for where, name, slots in timed:
        reference = {"slots": checked_slots(slots, where), "level": level}
        clips.append(Clip(name, (find(name),), reference, {"level": level}))
    return clips, []


def _timed_rows(data: Path, audio_root: Path | None, level: Level) -> Clips:
    clips = []
    for where, row in read_rows(data):
        slots = first_of(row, (f"{level}s",), where)
        reference = {"slots": checked_slots(slots, where), "level": level}
        clip = row_clip(row, where, audio_root or data.parent, reference)
        clips.append(clip._replace(group={**clip.group, "level": level}))
    return clips, []


def checked_slots(slots: Any, where: str) -> list[dict[str, Any]]:
    """[{"text", "start", "end"}, ...] in order of time.

    Raises:
      InputError: anything else, or 0 <= start <= end does not hold.
    """
    try:
        found = [
            {"text": str(s["text"]), "start": float(s["start"]), "end": float(s["end"])}
            for s in slots
        ]
    except (TypeError, KeyError, ValueError):
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
    """Slots of each recording of a CTM: `name channel start duration word [confidence]` a line."""
    found: dict[str, list[dict[str, Any]]] = {}
    for number, line in enumerate(_lines(file), 1):
        if line.startswith(";;"):
            continue
        try:
            name, _, start, duration, word, *_ = line.split()
            slot = {"text": word, "start": float(start), "end": float(start) + float(duration)}
        except ValueError:
            raise InputError(
                f"{file}:{number}: expected `name channel start duration word`, found {line!r}"
            ) from None
        if word.lower() not in _NO_SPEECH:
            found.setdefault(name, []).append({**slot, "end": round(slot["end"], 6)})
    return found


_TEXTGRID = re.compile(
    r'"((?:[^"]|"")*)"|<exists>|(?<![\w\[.-])(-?\d+(?:\.\d+)?(?:[eE]-?\d+)?)\b(?!\])'
)


def read_textgrid(file: Path, tiers: str | Iterable[str]) -> list[dict[str, Any]]:
    """The spoken intervals of one interval tier of a Praat TextGrid, long or short text format.

    Args:
      tiers: its name, or the names it may have; letter case does not count.

    Raises:
      InputError: no such tier (the file's are named), or no TextGrid.
    """
    wanted = [tiers] if isinstance(tiers, str) else [*tiers]
    # Both formats are the same strings and numbers in the same order; the long one labels them.
    values: list[str | float] = [
        float(match[2]) if match[2] else match[1].replace('""', '"')
        for match in _TEXTGRID.finditer(_praat_text(file))
        if match[0] != "<exists>"
    ]
    if values[:2] != ["ooTextFile", "TextGrid"]:
        raise InputError(f"{file}: not a TextGrid in text format")
    found: dict[str, list[dict[str, Any]]] = {}
    try:
        at = 5  # behind the header: xmin, xmax, number of tiers
        for _ in range(int(values[4])):
            kind, name, size = values[at], values[at + 1], int(values[at + 4])
            width = 3 if kind == "IntervalTier" else 2
            body, at = values[at + 5 : at + 5 + width * size], at + 5 + width * size
            found[name] = []
            if kind == "IntervalTier":
                found[name] = [
                    {"text": text.strip(), "start": float(start), "end": float(end)}
                    for start, end, text in zip(body[0::3], body[1::3], body[2::3], strict=True)
                ]
        if at != len(values):
            raise ValueError
    except (IndexError, TypeError, ValueError, AttributeError):
        raise InputError(f"{file}: the TextGrid ends early or is broken") from None
    for name, spans in found.items():
        if spans and name.lower() in (want.lower() for want in wanted):
            return [span for span in spans if span["text"].lower() not in _NO_SPEECH]
    raise InputError(
        f"{file}: no interval tier {' or '.join(wanted)}; it has {', '.join(found)} (--tier)"
    )


def _praat_text(file: Path) -> str:
    raw = file.read_bytes()
    codec = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return raw.decode(codec)
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not {codec} text ({error.reason})") from None


def _finder(root: Path) -> Callable[[str], str]:
    """name -> the audio file under `root` that bears it; root/name.wav where there is none."""
    found: dict[str, Path] = {}
    for path in sorted(root.rglob("*")) if root.is_dir() else ():
        if path.suffix.lower() in _AUDIO_SUFFIXES:
            if path.stem in found:
                raise InputError(f"{path} and {found[path.stem]} have one name; which is meant?")
            found[path.stem] = path
    return lambda name: str(found.get(name, root / f"{name}.wav"))


# --- files ---------------------------------------------------------------------------------------


def read_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line" or "file: row n", row) of a .parquet table, a JSON list, or JSON lines.

    Raises:
      InputError: a file that cannot be read, a line that is no JSON object.
    """
    if file.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise InputError(f"{file}: parquet needs pyarrow: {extra('evaluate')}") from None
        try:
            rows = pyarrow.parquet.read_table(file).to_pylist()
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError(f"{file}: {error}") from None
        yield from ((f"{file}: row {number}", row) for number, row in enumerate(rows, 1))
        return
    lines = _lines(file, keep_blank=True)
    if next((line for line in lines if line.strip()), "").lstrip().startswith("["):
        try:
            rows = json.loads("\n".join(lines))
        except ValueError as error:
            raise InputError(f"{file}: no JSON ({error})") from None
        numbered = ((f"{file}: row {number}", row) for number, row in enumerate(rows, 1))
    else:
        numbered = _json_lines(file, lines)
    for where, row in numbered:
        if not isinstance(row, dict):
            raise InputError(f"{where}: {str(row)[:40]!r} is no JSON object")
        yield where, row


def _json_lines(file: Path, lines: list[str]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{file}:{number}: no JSON ({error})") from None
        yield f"{file}:{number}", row


def first_of(row: dict[str, Any], keys: tuple[str, ...], where: str) -> Any:
    """The value of the first of `keys` that the row has, or InputError."""
    for key in keys:
        if row.get(key) is not None:
            return row[key]
    raise InputError(f"{where}: no {' or '.join(map(repr, keys))}")


def _lines(file: Path, keep_blank: bool = False) -> list[str]:
    try:
        # Not splitlines(): it also splits at characters that a JSON string may hold.
        lines = file.read_text(encoding="utf-8-sig").replace("\r\n", "\n").split("\n")
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text ({error.reason})") from None
    return lines if keep_blank else [line for line in lines if line.strip()]


def _keyed_lines(file: Path) -> Iterator[tuple[str, str, str]]:
    """("file:line", first word, the rest) of each line."""
    for number, line in enumerate(_lines(file, keep_blank=True), 1):
        if line.strip():
            name, *rest = line.strip().split(maxsplit=1)
            yield f"{file}:{number}", name, rest[0] if rest else ""
