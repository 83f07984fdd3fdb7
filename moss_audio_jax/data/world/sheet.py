"""A page to listen to scenes: players, spectrograms, what sounds when, labels, training rows.

One HTML file that needs nothing else: sound as FLAC and pictures as PNG are written into it.
"""

from __future__ import annotations

import base64
import html
import io
import json
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from moss_audio_jax.audio.features import log_mel
from moss_audio_jax.audio.lengths import SAMPLE_RATE
from moss_audio_jax.data.world import describe
from moss_audio_jax.data.world.sounds import KINDS
from moss_audio_jax.data.world.tasks import rows

_WIDTH, _LANE = 1000, 20  # of the time axis and of one row of bars, in the picture's units
# Dark to light, seven steps; the rest is interpolated.
_COLOURS = np.array(
    [[8, 8, 30], [48, 18, 90], [120, 28, 109], [190, 55, 82], [237, 105, 37], [251, 180, 60],
     [252, 255, 200]], np.float64,
)  # fmt: skip
_LANES = {"words": "#2f6fb3", "events": "#b3572f", "music": "#3f8a4d", "chords": "#7a6aa8"}
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1040px; color: #222; }
section { border-top: 1px solid #ccc; padding: 1em 0; }
h2 { font-size: 1.05em; margin: 0 0 .4em; }
audio { width: 100%; height: 34px; }
.time { position: relative; margin-top: .4em; cursor: pointer; }
.time img { display: block; width: 100%; height: 180px; }
.time svg { display: block; width: 100%; }
.time .head { position: absolute; top: 0; bottom: 0; width: 2px; background: #18a0fb; left: 0; }
svg text { font: 11px system-ui, sans-serif; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
td { border: 1px solid #ddd; padding: 3px 7px; vertical-align: top; white-space: pre-wrap; }
td:first-child { white-space: nowrap; color: #666; }
pre { font-size: 12px; white-space: pre-wrap; background: #f6f6f6; padding: .6em; }
"""
_SCRIPT = """
document.querySelectorAll('section').forEach(function (part) {
  const sound = part.querySelector('audio'), time = part.querySelector('.time');
  const head = part.querySelector('.head'), length = parseFloat(part.dataset.seconds);
  function move() {
    head.style.left = 100 * sound.currentTime / length + '%';
    if (!sound.paused) requestAnimationFrame(move);
  }
  sound.addEventListener('play', move);
  sound.addEventListener('seeked', move);
  time.addEventListener('click', function (event) {
    const box = time.getBoundingClientRect();
    sound.currentTime = length * (event.clientX - box.left) / box.width;
    sound.play();
  });
});
"""


def page(clips: Sequence[tuple[Path, dict[str, Any]]]) -> str:
    """The HTML of scenes given as (wav file, labels)."""
    parts = [_section(path, labels) for path, labels in clips]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>world</title>'
        f"<style>{_STYLE}</style></head><body>\n<h1>{len(parts)} scenes</h1>\n"
        "<p>Click into a spectrogram to play from there. Words are blue, sound events red, notes "
        "of the melody green, chords violet.</p>\n"
        + "\n".join(parts)
        + f"\n<script>{_SCRIPT}</script></body></html>\n"
    )


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
        f'<section data-seconds="{labels["duration"]}">\n<h2>{html.escape(title)}</h2>\n'
        f'<audio controls preload="metadata" src="{_data("audio/flac", _flac(wav))}"></audio>\n'
        f'<div class="time"><img alt="log-mel spectrogram" '
        f'src="{_data("image/png", spectrogram_png(wav))}">\n{_bars(labels)}'
        '<div class="head"></div></div>\n'
        f"<p>{html.escape(describe.caption(labels))}</p>\n"
        f"<details><summary>training rows</summary><table>{table}</table></details>\n"
        "<details><summary>labels</summary><pre>"
        f"{html.escape(json.dumps(labels, ensure_ascii=False, indent=1))}</pre></details>\n"
        "</section>"
    )


def spectrogram_png(wav: np.ndarray) -> bytes:
    """The log-mel of float32 [n] as a PNG, [128, n // 160] pixels, low frequencies below."""
    mel = log_mel(wav)[::-1]
    low, high = mel.min(), mel.max()
    at = (mel - low) / max(high - low, 1e-6) * (len(_COLOURS) - 1)
    below = np.minimum(at.astype(int), len(_COLOURS) - 2)
    part = (at - below)[..., None]
    pixels = _COLOURS[below] * (1 - part) + _COLOURS[below + 1] * part
    return _png(np.rint(pixels).astype(np.uint8))


def _png(pixels: np.ndarray) -> bytes:
    """uint8 [height, width, 3] -> PNG."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    height, width, _ = pixels.shape
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)  # each line unfiltered
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(lines, 6))
        + chunk(b"IEND", b"")
    )


def _bars(labels: dict[str, Any]) -> str:
    """Rows of bars under the spectrogram, and an axis of seconds, as SVG."""
    bars: list[tuple[str, list[tuple[float, float, str]]]] = []
    words = describe.words(labels)
    if words:
        bars.append(("words", [(w["start"], w["end"], w["text"]) for w in words]))
    lanes: list[list[tuple[float, float, str]]] = []  # events that overlap need a row each
    for event in labels["events"]:
        bar = (event["start"], event["end"], KINDS[event["kind"]].label)
        free = next((lane for lane in lanes if lane[-1][1] <= bar[0]), None)
        if free is None:
            lanes.append([bar])
        else:
            free.append(bar)
    bars += [("events", lane) for lane in lanes]
    if music := labels["music"]:
        lead = music["parts"][0]
        notes = [(n["start"], n["end"], "") for n in music["notes"] if n["instrument"] == lead]
        bars.append(("music", notes))
        bars.append(("chords", [(c["start"], c["end"], c["name"]) for c in music["chords"]]))

    scale = _WIDTH / labels["duration"]
    drawn = []
    for number, (lane, items) in enumerate(bars):
        top = number * _LANE
        for start, end, text in items:
            x, width = start * scale, max((end - start) * scale, 1.0)
            drawn.append(
                f'<rect x="{x:.1f}" y="{top + 2}" width="{width:.1f}" height="{_LANE - 4}" '
                f'fill="{_LANES[lane]}" opacity="0.22" stroke="{_LANES[lane]}"/>'
                f'<text x="{x + 2:.1f}" y="{top + 14}" fill="#222">{html.escape(text)}</text>'
            )
    base = len(bars) * _LANE
    for second in range(int(labels["duration"]) + 1):
        x = second * scale
        drawn.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{base + 4}" stroke="#999" '
            f'stroke-width="0.5"/><text x="{x + 2:.1f}" y="{base + 15}">{second} s</text>'
        )
    return f'<svg viewBox="0 0 {_WIDTH} {base + 20}">{"".join(drawn)}</svg>'


def _flac(wav: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wav, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
