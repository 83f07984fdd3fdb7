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
from typing import Any

from moss_audio_jax import timeline
from moss_audio_jax.audio import load_audio
from moss_audio_jax.audio.lengths import SAMPLE_RATE
from moss_audio_jax.errors import InputError
from moss_audio_jax.evaluate import text_norm
from moss_audio_jax.evaluate.metrics.events import COLLAR
from moss_audio_jax.evaluate.report_html import ASSETS
from moss_audio_jax.evaluate.report_scores import Score

LONGEST = 30.0  # seconds of a clip that is written into the page
_HEAD, _TAIL = 4000, 1000  # characters that are kept of a text that has more
_TIMED = {"timestamps": "slots", "events": "events"}  # kind -> where its reference has times


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
    find = functools.cache(functools.partial(_find, audio_root))
    for number, score in enumerate(scores):
        if "rows" not in score.content:
            notes.append(f"{score.path} holds no rows: it was scored with --no-rows.")
            continue
        marked = [(row, *verdict(row)) for row in score.content["rows"]]
        if len(marked) > most:
            order = sorted(range(len(marked)), key=lambda i: (_credit(marked[i][2]), i))[:most]
            notes.append(f"{score.path}: {most:,} of {len(marked):,} rows, the worst; see --rows.")
            marked = [marked[i] for i in sorted(order)]
        data = (score.content.get("inputs") or {}).get("items_hash", str(score.path))
        for row, mark, credit, detail in marked:
            item = items.setdefault((score.benchmark, data, row["id"]), _item(row, len(items)))
            rows.append(_row(row, number, item["n"], mark, credit, detail))
            if len(paths := row.get("audio") or ()) == 1 and find(paths[0]):
                timed = row["kind"] in _TIMED
                ranked.setdefault(score.benchmark, []).append(
                    (not timed, _credit(credit), paths[0])
                )
    clips, unread = _clips(ranked, find, embed)
    notes += unread
    audio = {path: _link(find(path), output) for item in items.values() for path in item["audio"]}
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


def verdict(row: Mapping[str, Any]) -> tuple[str, float | None, str]:
    """(right, partly, wrong or "not scored"; credit from 0 to 1; in figures) by the strict rule."""
    sums = row["sums"]
    detail, credit = "", None

    def share(over: str, under: str) -> float:
        return sums[over] / sums[under] if sums.get(under) else 1.0

    name = next((n for n in ("strict", "open", "time", "tempo") if sums.get(f"{n}_rows")), None)
    if name:
        credit = float(sums[f"{name}_right"])
    elif "word_errors" in sums:
        errors, words = sums["word_errors"], sums["words"]
        credit = max(1 - errors / words, 0.0) if words else float(errors == 0)
        kinds = [int(sums.get(k, 0)) for k in ("substitutions", "deletions", "insertions")]
        rate = f"WER {100 * errors / words:.0f}%" if words else f"{errors:.0f} error(s)"
        detail = "{}: {} sub, {} del, {} ins".format(rate, *kinds)
    elif "reference_slots" in sums:
        shift = 1000 * sums["slot_shift"] / sums["slots"] if sums["slots"] else None
        credit = share("slots", "reference_slots")
        late = shift is not None and shift > 1000 * COLLAR
        if credit == 1 and (late or sums.get("order_violations")):
            credit = 0.99  # all words are there, their times are not
        detail = f"coverage {share('slots', 'reference_slots'):.0%}"
        detail += "" if shift is None else f", off by {shift:.0f} ms"
    elif "event_all" in sums:
        credit = share("event_twice_right", "event_all")
        detail = (f"F1 {credit:.2f}, {sums['event_right']:.0f} of {sums['event_reference']:.0f}, "
                  f"{sums['event_estimated'] - sums['event_right']:.0f} not there")  # fmt: skip
    elif "sources" in sums:
        credit = share("sources_named", "sources")
        detail = f"{sums['sources_named']:.0f} of {sums['sources']:.0f} sources"
    elif "fields" in sums:
        credit = share("field_points", "fields")
        detail = f"fields {credit:.2f}"
    if sums.get("judged_fields"):
        detail = f"{detail}, judge {share('judged_points', 'judged_fields'):.2f}".lstrip(", ")
    if credit is None:
        return "not scored", None, detail
    return "right" if credit >= 1 else "partly" if credit > 0 else "wrong", credit, detail


def _credit(credit: float | None) -> float:
    return 2.0 if credit is None else credit


def _item(row: Mapping[str, Any], number: int) -> dict[str, Any]:
    return {
        "n": number,
        "id": str(row["id"]),
        "kind": row["kind"],
        "prompt": row.get("prompt", ""),
        "reference": row["reference"],
        "group": row.get("group") or {},
        "audio": list(row.get("audio") or ()),
    }


def _row(
    row: Mapping[str, Any], file: int, item: int, mark: str, credit: float | None, detail: str
) -> dict[str, Any]:
    status = row.get("status", "ok")
    made = {
        "f": file, "i": item, "mark": mark, "credit": credit, "detail": detail, "status": status,
        "official": row["sums"].get("official_right"), "answer": _cut(row.get("answer") or ""),
        "thinking": _cut(row.get("thinking") or ""), "error": row.get("error"),
        "parsed": row.get("parsed"),
    }  # fmt: skip
    if row["kind"] in _TIMED and isinstance(row.get("parsed"), list):
        made["off"] = _off(row["parsed"], row["reference"][_TIMED[row["kind"]]])
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
        for start in range(len(parts)):
            if (found := root.joinpath(*parts[start:])).is_file():
                return found
    return Path(path) if Path(path).is_file() else None


def _link(path: Path | None, output: Path) -> str | None:
    if path is None:
        return None
    there = os.path.relpath(path.resolve(), output.resolve().parent)
    return urllib.parse.quote(Path(there).as_posix())


def _clips(ranked: Mapping[str, list], find: Any, count: int) -> tuple[dict[str, str], list[str]]:
    """({path: its player and spectrogram as HTML}, what could not be read)."""
    queues = [dict.fromkeys(path for *_, path in sorted(some)) for some in ranked.values()]
    order = dict.fromkeys(
        path for some in itertools.zip_longest(*queues) for path in some if path is not None
    )
    clips: dict[str, str] = {}
    problems = []
    for path in order:
        if len(clips) >= count:
            break
        try:
            wav = load_audio(find(path))
            if len(wav) <= LONGEST * SAMPLE_RATE:
                clips[path] = timeline.clip(wav, [])
        except InputError as error:
            problems.append(f"not embedded: {error}")
    return clips, problems
