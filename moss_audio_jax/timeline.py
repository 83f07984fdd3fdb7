"""Pages about sound: players, spectrograms, and lanes of bars that show what is heard when.

A page is one HTML file that needs no other files: it embeds sound as FLAC and pictures as PNG.
"""

from __future__ import annotations

import base64
import html
import io
import struct
import unicodedata
import zlib
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import soundfile

from moss_audio_jax.audio.features import log_mel
from moss_audio_jax.audio.lengths import SAMPLE_RATE
from moss_audio_jax.text.timestamps import Segment

WORDS, EVENTS, MUSIC, CHORDS = "#2f6fb3", "#b3572f", "#3f8a4d", "#7a6aa8"  # colours of lanes
_OFF = "#d01030"
_WIDTH, _ROW, _GAP = 1000, 20, 5  # SVG units: width of the time axis, row height, lane distance
_LAP = 0.08  # bars in one row may overlap by this many seconds, as a model's words often do
_ROWS = 8  # the most rows of a lane; further bars overlap in the last one
_LETTER, _WIDE_LETTER = 6.2, 11.0  # estimated widths in the font below
# Dark to light in seven steps; colours between them are interpolated.
_COLOURS = np.array(
    [
        [8, 8, 30],
        [48, 18, 90],
        [120, 28, 109],
        [190, 55, 82],
        [237, 105, 37],
        [251, 180, 60],
        [252, 255, 200],
    ],
    np.float64,
)
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; padding: 0 1em; max-width: 1100px;
  color: #222; }
section { border-top: 1px solid #ccc; padding: 1em 0; }
h2 { font-size: 1.05em; margin: 0 0 .4em; }
audio { width: 100%; height: 34px; }
.time { position: relative; margin: .4em 0 .4em 104px; cursor: pointer; }
.time img { display: block; width: 100%; height: 180px; }
.time svg { display: block; width: 100%; overflow: visible; margin-top: 3px; }
.time .head { position: absolute; top: 0; bottom: 0; width: 2px; background: #18a0fb; left: 0; }
svg text { font: 11px system-ui, sans-serif; fill: #222; }
svg .name { text-anchor: end; fill: #555; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th { text-align: left; color: #666; font-weight: normal; }
th, td { border: 1px solid #ddd; padding: 3px 7px; vertical-align: top; }
td { white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; color: #666; font-size: 13px; }
pre { font-size: 12px; white-space: pre-wrap; background: #f6f6f6; padding: .6em; }
"""
_SCRIPT = """
document.querySelectorAll('.clip').forEach(function (part) {
  const sound = part.querySelector('audio');
  if (!sound) return;
  const time = part.querySelector('.time');
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


class Lane(NamedTuple):
    """Bars along the time axis under one name; overlapping bars are in separate rows.

    `off`: numbers of the bars that are drawn in red, because they are wrong.
    """

    name: str
    bars: Sequence[Segment]
    colour: str
    off: Collection[int] = ()


def document(title: str, body: Iterable[str], style: str = "") -> str:
    """A whole page. `title` is text; `body` and `style` are HTML and CSS."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}{style}</style></head>\n"
        f"<body>\n<h1>{html.escape(title)}</h1>\n"
        + "\n".join(body)
        + f"\n<script>{_SCRIPT}</script></body></html>\n"
    )


def player(source: str | None, lanes: Sequence[Lane]) -> str:
    """HTML of lanes of bars, and of a player if there is an address of a file."""
    seconds = 1.02 * max([1.0, *(bar.end for lane in lanes for bar in lane.bars)])
    sound = f'<audio controls preload="none" src="{html.escape(source)}"></audio>' if source else ""
    head = '<div class="head"></div>' if source else ""
    return (
        f'<div class="clip" data-seconds="{seconds:.3f}">{sound}'
        f'<div class="time">{_drawn(lanes, seconds) if lanes else ""}{head}</div></div>'
    )


def clip(wav: np.ndarray, lanes: Sequence[Lane]) -> str:
    """HTML of a player, a spectrogram (a click plays from that point) and lanes of bars.

    Args:
      wav: float32 [n] in -1..1, 16 kHz.

    Raises:
      InputError: the clip is too short for a spectrogram.
    """
    seconds = len(wav) / SAMPLE_RATE
    return (
        f'<div class="clip" data-seconds="{seconds:.3f}">\n'
        f'<audio controls preload="metadata" src="{_data("audio/flac", _flac(wav))}"></audio>\n'
        f'<div class="time"><img alt="log-mel spectrogram" '
        f'src="{_data("image/png", spectrogram_png(wav))}">\n{_drawn(lanes, seconds)}'
        '<div class="head"></div></div>\n</div>'
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
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)  # filter type 0 for each line
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(lines, 6))
        + chunk(b"IEND", b"")
    )


def _drawn(lanes: Sequence[Lane], seconds: float) -> str:
    """SVG of lanes, one below the other, above an axis in seconds."""
    scale = _WIDTH / seconds
    drawn, top = [], 0
    for lane in lanes:
        drawn.append(f'<text class="name" x="-8" y="{top + 14}">{html.escape(lane.name)}</text>')
        rows = _rows(lane.bars)
        for bar, row, off in zip(
            lane.bars, rows, (i in lane.off for i in range(len(rows))), strict=True
        ):
            drawn.append(_bar(bar, top + row * _ROW, scale, _OFF if off else lane.colour))
        top += (max(rows, default=0) + 1) * _ROW + _GAP
    step = next((s for s in (1, 2, 5, 10, 30, 60, 300) if seconds <= 16 * s), 600)
    for second in range(0, int(seconds) + 1, step):
        x = second * scale
        drawn.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{top + 4}" stroke="#999" '
            f'stroke-width="0.5"/><text x="{x + 2:.1f}" y="{top + 13}">{second} s</text>'
        )
    return f'<svg viewBox="0 0 {_WIDTH} {top + 20}">{"".join(drawn)}</svg>'


def _rows(bars: Sequence[Segment]) -> list[int]:
    """The row of each bar: the first whose last bar has ended, up to _LAP."""
    ends: list[float] = []
    rows = [0] * len(bars)
    for number in sorted(range(len(bars)), key=lambda i: bars[i].start):
        bar = bars[number]
        free = next((row for row, end in enumerate(ends) if end <= bar.start + _LAP), None)
        if free is None and len(ends) < _ROWS:
            ends.append(bar.end)
            free = len(ends) - 1
        rows[number] = _ROWS - 1 if free is None else free
        ends[rows[number]] = max(ends[rows[number]], bar.end)
    return rows


def _bar(bar: Segment, top: int, scale: float, colour: str) -> str:
    # A model may give times beyond the clip.
    x = min(bar.start * scale, _WIDTH - 1)
    width = max(min(bar.end * scale, _WIDTH) - x, 1.0)
    label = html.escape(bar.text)
    needed = sum(
        _WIDE_LETTER if unicodedata.east_asian_width(letter) in "WF" else _LETTER
        for letter in bar.text
    )
    squeezed = ""
    if width - 4 < needed:  # a word can be read down to half its width; below that it is cut
        squeezed = f' textLength="{max(width - 4, needed / 2):.1f}" lengthAdjust="spacingAndGlyphs"'
    # The inner <svg> clips the text; <title> shows all of it under the pointer.
    return (
        f'<svg x="{x:.1f}" y="{top + 2}" width="{width:.1f}" height="{_ROW - 4}">'
        f"<title>{bar.start:.2f} - {bar.end:.2f}: {label}</title>"
        f'<rect width="{width:.1f}" height="{_ROW - 4}" fill="{colour}" fill-opacity="0.22" '
        f'stroke="{colour}"/><text x="2" y="12"{squeezed}>{label}</text></svg>'
    )


def _flac(wav: np.ndarray) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wav, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
