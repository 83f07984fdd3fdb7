"""A page that plays scenes, with spectrograms, timelines, labels and training rows."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import soundfile

from moss_audio_jax import timeline
from moss_audio_jax.text.labels import ALL_KINDS
from moss_audio_jax.text.timestamps import Segment
from moss_audio_jax.timeline import Lane
from moss_audio_jax.world import describe
from moss_audio_jax.world.tasks import rows

_STYLE = "td:first-child { white-space: nowrap; color: #666; }\n"


def page(clips: Sequence[tuple[Path, dict[str, Any]]]) -> str:
    """The HTML of scenes given as (wav file, labels)."""
    intro = "<p>Click on a spectrogram to play from that point.</p>"
    parts = [_section(path, labels) for path, labels in clips]
    return timeline.document(f"{len(parts)} scenes", [intro, *parts], _STYLE)


def _section(path: Path, labels: dict[str, Any]) -> str:
    wav, _ = soundfile.read(path, dtype="float32")
    table = "\n".join(
        f"<tr><td>{html.escape(row['task'])}</td>"
        f"<td>{html.escape(row['conversation'][1]['content'])}</td>"
        f"<td>{html.escape(row['conversation'][2]['content'])}</td></tr>"
        for row in rows(labels, path.name)
    )
    title = f"{labels['id']}: {labels['content']}, {labels['duration']:.2f} s"
    return (
        f"<section>\n<h2>{html.escape(title)}</h2>\n{timeline.clip(wav, _lanes(labels))}\n"
        f"<p>{html.escape(describe.caption(labels))}</p>\n"
        f"<details><summary>training rows</summary><table>{table}</table></details>\n"
        "<details><summary>labels</summary><pre>"
        f"{html.escape(json.dumps(labels, ensure_ascii=False, indent=1))}</pre></details>\n"
        "</section>"
    )


def _lanes(labels: dict[str, Any]) -> list[Lane]:
    def bars(items: Sequence[dict[str, Any]], key: str | None = None) -> list[Segment]:
        return [Segment(i["start"], i["end"], i[key] if key else "") for i in items]

    lanes = [Lane("words", bars(describe.words(labels), "text"), timeline.WORDS)]
    events = [Segment(e["start"], e["end"], ALL_KINDS[e["kind"]].label) for e in labels["events"]]
    lanes.append(Lane("events", events, timeline.EVENTS))
    if music := labels["music"]:
        lead = music["parts"][0]
        notes = [note for note in music["notes"] if note["instrument"] == lead]
        lanes.append(Lane(lead, bars(notes), timeline.MUSIC))
        lanes.append(Lane("chords", bars(music["chords"], "name"), timeline.CHORDS))
    return [lane for lane in lanes if lane.bars]
