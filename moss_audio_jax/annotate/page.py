"""A page of annotations: player, spectrogram and lanes of each file, captions below."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import soundfile

from moss_audio_jax import timeline
from moss_audio_jax.annotate.record import Record
from moss_audio_jax.annotate.tasks import Row
from moss_audio_jax.audio.lengths import HOP
from moss_audio_jax.text.timestamps import Segment
from moss_audio_jax.timeline import Lane

_STYLE = "td:first-child { white-space: nowrap; color: #666; }\n.small { color: #777; }\n"
_FAILURES = 50  # that the page names
_SEGMENTS, _VOICES = "#555555", "#7a6aa8"


def page(
    clips: Sequence[Sequence[Record]],
    out: Path,
    seconds: float,
    rows: Callable[[Record], Sequence[Row]],
    warnings: Sequence[str],
    total: int,
    failed: Sequence[tuple[str, str]],
) -> str:
    """The HTML for files, given by their records; about the first `seconds` of each are shown.

    Args:
      out: the folder that the records' clips are relative to.
      rows: the training rows of a record.
      warnings: about the whole run, shown first.
      total: the number of annotated files.
      failed: (path, why) of files that could not be annotated.
    """
    intro = "<p>Click on a spectrogram to play from that point.</p>"
    intro += "".join(f"<p><b>Warning:</b> {html.escape(each)}</p>" for each in warnings)
    if failed:
        named = [f"{path}: {why}" for path, why in failed[:_FAILURES]]
        if (more := len(failed) - len(named)) > 0:
            named.append(f"{more} more, see dropped.jsonl")
        intro += (
            f"<details open><summary><b>{len(failed)} file(s) could not be annotated</b></summary>"
            f"<ul>{''.join(f'<li>{html.escape(each)}</li>' for each in named)}</ul></details>"
        )
    parts = [_section(records, out, seconds, rows) for records in clips if records]
    shown = f"the first {len(parts)} of {total}" if len(parts) < total else len(parts)
    return timeline.document(f"{shown} annotated files", [intro, *parts], _STYLE)


def _section(
    records: Sequence[Record],
    out: Path,
    seconds: float,
    rows: Callable[[Record], Sequence[Row]],
) -> str:
    shown = [record for record in records if record["end"] <= seconds] or [records[0]]
    # Segments follow one another without gaps, so their files make up the clip.
    wav = np.concatenate(
        [soundfile.read(out / record["clip"], dtype="float32")[0] for record in shown]
    )
    wav = wav[: round(2 * seconds * 16_000)]
    title = f"{Path(records[0]['audio']).name}: {records[-1]['end']:.2f} s"
    if len(shown) < len(records):
        title += f", the first {len(shown)} of {len(records)} segments"
    told = timeline.clip(wav, _lanes(shown)) if len(wav) >= HOP else "<p>too short to show</p>"
    return (
        f"<section>\n<h2>{html.escape(title)}</h2>\n{told}\n"
        f"<table>{''.join(map(_row, shown))}</table>\n"
        f"<details><summary>training rows</summary><table>"
        f"{''.join(_rows(rows(record)) for record in shown)}</table></details>\n"
        "<details><summary>records</summary><pre>"
        f"{html.escape(json.dumps(shown, ensure_ascii=False, indent=1))}</pre></details>\n"
        "</section>"
    )


def _row(record: Record) -> str:
    best = sorted(record["profile"].items(), key=lambda item: -item[1])[:3]
    profile = ", ".join(f"{name} {score:.2f}" for name, score in best)
    heard = "; ".join(f"{one['system']}: {one['text'] or '—'}" for one in record["asr"])
    rate = record["wer_agreement"]
    agreed = f" (differ by {rate:.2f})" if rate is not None else ""
    doubt = f"<b>{html.escape(record['doubt'])}</b>\n" if record["doubt"] else ""
    return (
        f"<tr><td>{record['start']:.2f} - {record['end']:.2f}</td>"
        f"<td>{doubt}{html.escape(record['unified'])}\n"
        f'<span class="small">{html.escape(profile)}'
        f"{html.escape(chr(10) + heard + agreed) if heard else ''}</span></td></tr>"
    )


def _rows(made: Sequence[Row]) -> str:
    return "".join(
        f"<tr><td>{html.escape(row['task'])}</td>"
        f"<td>{html.escape(row['conversation'][1]['content'])}</td>"
        f"<td>{html.escape(row['conversation'][2]['content'])}</td></tr>"
        for row in made
    )


def _lanes(records: Sequence[Record]) -> list[Lane]:
    segments, words, voices, events, music = [], [], [], [], []
    for record in records:
        best = max(record["profile"], key=record["profile"].get)
        segments.append(Segment(record["start"], record["end"], best))
        words += [Segment(w["start"], w["end"], w["text"]) for w in record["words"]]
        for speaker in record["speakers"]:
            name = f"{speaker['speaker'] + 1}: {speaker['pitch'] or 'voice'}"
            voices += [Segment(t["start"], t["end"], name) for t in speaker["turns"]]
        events += [Segment(e["start"], e["end"], e["label"]) for e in record["events"]]
        if record["music"]:
            told = [record["music"].get("key"), *record["music"].get("instruments", ())]
            name = ", ".join(part for part in told if part) or "music"
            music.append(Segment(record["music"]["start"], record["music"]["end"], name))
    lanes = [
        Lane("segments", segments, _SEGMENTS),
        Lane("words", words, timeline.WORDS),
        Lane("speakers", voices, _VOICES),
        Lane("events", events, timeline.EVENTS),
        Lane("music", music, timeline.MUSIC),
    ]
    return [lane for lane in lanes if lane.bars]
