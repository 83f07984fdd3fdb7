"""A detector's probabilities per frame (posteriors): read from `frames.npz`, turned into events
and segments."""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path

import numpy as np

from moss_audio_jax.annotate.spans import DEFAULT, SegmentOptions, cover
from moss_audio_jax.errors import InputError

SPEECH_LABELS = ("speech", "human voice", "singing")  # long events of these set boundaries too


@dataclasses.dataclass(frozen=True)
class Posteriors:
    """Probabilities float [T, C], frames per second, and C names."""

    frames: np.ndarray
    fps: float
    labels: tuple[str, ...]


def load_posteriors(path: str | Path) -> Posteriors:
    """Reads `frames.npz`: arrays `frames` float [T, C] in 0..1, `fps` scalar, `labels` [C].

    Raises:
      InputError: an array is missing or has a wrong shape; names it and the file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in ("frames", "fps", "labels")}
    except KeyError as error:
        raise InputError(
            f"{path}: {error.args[0]!s}; expected arrays frames [T, C], fps and labels [C]"
        ) from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not a readable .npz file ({error})") from error
    frames, labels = found["frames"], tuple(map(str, np.atleast_1d(found["labels"])))
    if frames.ndim != 2 or frames.shape[1] != len(labels) or not frames.shape[0]:
        raise InputError(
            f"{path}: frames has shape {list(frames.shape)} and there are {len(labels)} labels; "
            "expected [T, C] with T >= 1 and C labels"
        )
    if len(set(labels)) < len(labels):
        raise InputError(f"{path}: a label appears twice; expected a name for each class")
    if not np.issubdtype(frames.dtype, np.number) or not (frames.min() >= 0 and frames.max() <= 1):
        raise InputError(f"{path}: frames holds values outside 0..1; expected probabilities")
    if found["fps"].size != 1 or not 0 < float(found["fps"]) < 1e5:
        raise InputError(f"{path}: fps is {found['fps']}; expected one positive number")
    return Posteriors(frames.astype(np.float32), float(found["fps"]), labels)


def events(
    posteriors: Posteriors,
    options: SegmentOptions = DEFAULT,
    thresholds: dict[str, tuple[float, float]] | None = None,
) -> list[dict]:
    """Events {"label", "start", "end", "score"} by hysteresis; seconds rounded to ms, in order.

    Args:
      thresholds: label -> (on, off), for labels that do not use those of `options`.

    Raises:
      InputError: `thresholds` names a class that the posteriors lack.
    """
    for name in thresholds or {}:
        if name not in posteriors.labels:
            raise InputError(
                f"thresholds: no class {name!r}; expected one of {', '.join(posteriors.labels)}"
            )
    found = []
    for label, column in zip(posteriors.labels, posteriors.frames.T, strict=True):
        on, off = (thresholds or {}).get(label, (options.on, options.off))
        runs: list[list[int]] = []
        edges = np.flatnonzero(np.diff(np.r_[False, column >= off, False].astype(np.int8)))
        for first, last in zip(edges[::2], edges[1::2], strict=True):
            if column[first:last].max() < on:
                continue
            if runs and first - runs[-1][1] < options.merge_seconds * posteriors.fps:
                runs[-1][1] = int(last)
            else:
                runs.append([int(first), int(last)])
        found += [
            {
                "label": label,
                "start": round(first / posteriors.fps, 3),
                "end": round(last / posteriors.fps, 3),
                "score": round(float(column[first:last].mean()), 3),
            }
            for first, last in runs
            if last - first >= options.event_seconds * posteriors.fps
        ]
    return sorted(found, key=lambda event: (event["start"], event["end"], event["label"]))


def segment_posteriors(
    posteriors: Posteriors,
    seconds: float,
    options: SegmentOptions = DEFAULT,
    thresholds: dict[str, tuple[float, float]] | None = None,
) -> list[dict[str, float]]:
    """Segments of a clip of `seconds`, cut at the edges of events: in order, no gap, no overlap.

    Overlapping events are joined; a gap shorter than `min_seconds` is cut in its middle. An event
    that is longer than `long_seconds` and not speech sets no boundary, but events within it do.
    """
    blocks: list[list[float]] = []
    for event in events(posteriors, options, thresholds):
        start, end = event["start"], min(event["end"], seconds)
        if start >= end:
            continue
        spoken = event["label"].lower() in SPEECH_LABELS
        if end - start > options.long_seconds and not spoken:
            continue
        if blocks and start < blocks[-1][1]:
            blocks[-1][1] = max(blocks[-1][1], end)
        else:
            blocks.append([start, end])
    cuts: list[float] = []
    before = 0.0
    for start, end in [*blocks, [seconds, seconds]]:
        if start - before >= options.min_seconds:
            cuts += [before, start]
        else:
            cuts.append((before + start) / 2 if before > 0 and start < seconds else 0.0)
        before = end
    return cover(cuts, seconds, options)
