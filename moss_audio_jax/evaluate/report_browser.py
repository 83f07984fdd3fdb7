"""The part of a report that shows rows: what was asked, said and true, heard and seen in time.

Rows lie in the page as JSON and become elements when they are looked at, 50 at a time, so that
thousands of them do no harm; assets/report.js does that.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moss_audio_jax import timeline
from moss_audio_jax.audio import load_audio
from moss_audio_jax.audio.lengths import SAMPLE_RATE
from moss_audio_jax.errors import InputError
from moss_audio_jax.evaluate import text_norm
from moss_audio_jax.evaluate.clips import part
from moss_audio_jax.evaluate.metrics.events import COLLAR
from moss_audio_jax.evaluate.report_html import ASSETS
from moss_audio_jax.evaluate.report_scores import TIMED, Score, verdict

LONGEST = 30.0  # seconds of a clip that is written into the page
_HEAD, _TAIL = 4000, 1000  # characters that are kept of a text that has more


@dataclasses.dataclass
class Browser:
    """`html`: the section; `notes`: what it does not show, one a line."""

    html: str
    notes: list[str]


def browser(
    scores: Sequence[Score], output: Path, audio_root: Path | None, embed: int, most: int
) -> Browser:
    """Rows of score files that can be filtered, searched and listened to.

    Args:
      output: where the page will lie; links to audio are relative to it.
      audio_root: looked into for audio first; ends of the paths in the rows count from there.
      embed: so many clips of up to LONGEST seconds are written into the page, those of events and
        timestamps first, the worst first.
      most: rows of each score file; the worst are kept.
    """
    notes, rows = [], []
    items: dict[tuple, dict[str, Any]] = {}
    ranked: dict[str, list[tuple[bool, float, str]]] = {}  # benchmark -> clips
    sounds: dict[str, _Sound] = {}
    find = functools.cache(lambda name: _find(audio_root, sounds[name].path))
    for number, score in enumerate(scores):
        if "rows" not in score.content:
            notes.append(f"{score.path} holds no rows: it was scored with --no-rows.")
            continue
        marked = [(row, *verdict(row)) for row in score.content["rows"]]
        if len(marked) > most:
            order = sorted(range(len(marked)), key=lambda i: (_credit(marked[i][2]), i))[:most]
            notes.append(f"{score.path}: {most:,} of {len(marked):,} rows, the worst; see --rows.")
            marked = [marked[i] for i in sorted(order)]
        data = str((score.content.get("inputs") or {}).get("items_hash", score.path))
        for row, mark, credit, detail in marked:
            heard = _sounds(row)
            sounds |= heard
            made = _item(row, len(items), [*heard])
            item = items.setdefault((score.benchmark, data, row["id"]), made)
            rows.append(_row(row, number, item["n"], mark, credit, detail))
            if len(heard) == 1 and find(name := next(iter(heard))):
                timed = row["kind"] in TIMED
                ranked.setdefault(score.benchmark, []).append((not timed, _credit(credit), name))
    clips, unread = _clips(ranked, find, sounds, embed)
    notes += unread
    names = dict.fromkeys(name for item in items.values() for name in item["audio"])
    audio = {name: _link(find(name), sounds[name], output) for name in names}
    if lost := sum(link is None for link in audio.values()):
        notes.append(
            f"{lost:,} of {len(audio):,} audio files are not where the scores say, such as "
            f"{next(path for path, link in audio.items() if link is None)}; see --audio-root."
        )
    content = {
        "files": [[score.benchmark, score.label] for score in scores],
        "items": list(items.values()),
        "rows": rows,
        "audio": audio,
        "clips": clips,
        "colours": {"timestamps": timeline.WORDS, "events": timeline.EVENTS, "off": "#d01030"},
    }
    script = (ASSETS / "report.js").read_text(encoding="utf-8")
    # Nothing in a text may end the script.
    packed = json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return Browser(
        '<section id="browser"><h2>Answers</h2>'
        '<p class="note">A click opens a row. Red is not in the reference, or not where it has '
        'it.</p><div id="controls"></div><div id="list"></div><div id="pager"></div></section>\n'
        f'<script type="application/json" id="rows">{packed}</script><script>{script}</script>',
        notes,
    )


def _credit(credit: float | None) -> float:
    return 2.0 if credit is None else credit


class _Sound(NamedTuple):
    """A file and its part that was asked about: seconds, None for an end that is the file's."""

    path: str
    cut: Sequence[float | None] | None

    @property
    def fragment(self) -> str:
        """What makes players play the part alone: a media fragment behind the file's address."""
        if self.cut is None:
            return ""
        start, end = self.cut
        return f"#t={start:g}" if end is None else f"#t={start:g},{end:g}"


def _sounds(row: Mapping[str, Any]) -> dict[str, _Sound]:
    """A row's clips by the names that they have in the page."""
    found = [_Sound(path, row.get("cut")) for path in row.get("audio") or ()]
    return {sound.path + sound.fragment: sound for sound in found}


def _item(row: Mapping[str, Any], number: int, audio: Sequence[str]) -> dict[str, Any]:
    return {
        "n": number,
        "id": str(row["id"]),
        "kind": row["kind"],
        "prompt": row.get("prompt", ""),
        "reference": row["reference"],
        "group": row.get("group") or {},
        "audio": audio,
    }


def _row(
    row: Mapping[str, Any], file: int, item: int, mark: str, credit: float | None, detail: str
) -> dict[str, Any]:
    status = row.get("status", "ok")
    made = {
        "f": file,
        "i": item,
        "mark": mark,
        "credit": credit,
        "detail": detail,
        "status": status,
        "official": row["sums"].get("official_right"),
        "answer": _cut(row.get("answer") or ""),
        "thinking": _cut(row.get("thinking") or ""),
        "error": row.get("error"),
        "parsed": row.get("parsed"),
    }
    if row["kind"] in TIMED and isinstance(row.get("parsed"), list):
        made["off"] = _off(row["parsed"], row["reference"][TIMED[row["kind"]]])
    return {key: value for key, value in made.items() if value not in (None, "", [])}


def _off(said: Sequence[Mapping[str, Any]], true: Sequence[Mapping[str, Any]]) -> list[int]:
    """Numbers of the segments that the reference does not have there, within the collar."""
    known: dict[str, list[tuple[float, float]]] = {}
    for one in true:
        known.setdefault(text_norm.key(one["text"]), []).append((one["start"], one["end"]))
    return [
        number
        for number, one in enumerate(said)
        if not any(
            max(abs(one["start"] - start), abs(one["end"] - end)) <= COLLAR + 1e-9
            for start, end in known.get(text_norm.key(one["text"]), ())
        )
    ]


def _cut(text: str) -> str:
    """A model that repeats itself without end need not fill the page."""
    left = len(text) - _HEAD - _TAIL
    if left <= 0:
        return text
    return f"{text[:_HEAD]}\n[... {left:,} characters ...]\n{text[-_TAIL:]}"


# --- sound ---------------------------------------------------------------------------------------


def _find(root: Path | None, path: str) -> Path | None:
    """Where a file is: under the root by as much of its path as fits, or where it was."""
    if root is not None:
        parts = Path(path).relative_to(Path(path).anchor).parts
        for start in range(len(parts)) if ".." not in parts else ():
            if (found := root.joinpath(*parts[start:])).is_file():
                return found
    return Path(path) if Path(path).is_file() else None


def _link(path: Path | None, sound: _Sound, output: Path) -> str | None:
    if path is None:
        return None
    there = os.path.relpath(path.resolve(), output.resolve().parent)
    return urllib.parse.quote(os.fsencode(Path(there).as_posix())) + sound.fragment


def _clips(
    ranked: Mapping[str, list], find: Any, sounds: Mapping[str, _Sound], count: int
) -> tuple[dict[str, str], list[str]]:
    """({name: its player and spectrogram as HTML}, what could not be read)."""
    queues = [dict.fromkeys(name for *_, name in sorted(some)) for some in ranked.values()]
    order = dict.fromkeys(
        name for some in itertools.zip_longest(*queues) for name in some if name is not None
    )
    clips: dict[str, str] = {}
    problems = []
    for name in order:
        if len(clips) >= count:
            break
        try:
            wav = load_audio(find(name))
            if sounds[name].cut is not None:
                wav = part(wav, sounds[name].cut, sounds[name].path)
            if len(wav) <= LONGEST * SAMPLE_RATE:
                clips[name] = timeline.clip(wav, [])
        except InputError as error:
            problems.append(f"not embedded: {error}")
    return clips, problems
