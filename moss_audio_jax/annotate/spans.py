"""Options for cutting a clip, and segments from cuts."""

from __future__ import annotations

import dataclasses
import itertools

from moss_audio_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class SegmentOptions:
    """How to cut.

    Attributes:
      min_seconds: no segment is shorter, unless the clip is.
      max_seconds: a longer segment is cut again at the quietest place in its second half.
      penalty: cost of a change point, times dimensions times ln(frames), in units of (10 dB)^2.
      threshold: the lowest probability of a cut that is kept; higher means fewer segments.
      on, off: hysteresis of posteriors: an event begins at `on` and lasts while above `off`.
      merge_seconds: two events of a class that are closer than this are joined.
      event_seconds: shorter events of posteriors are dropped.
      long_seconds: a longer event that is not speech sets no boundary.
    """

    min_seconds: float = 1.0
    max_seconds: float = 180.0
    penalty: float = 0.2
    threshold: float = 0.5
    on: float = 0.5
    off: float = 0.3
    merge_seconds: float = 0.5
    event_seconds: float = 0.1
    long_seconds: float = 60.0

    def __post_init__(self):
        if not 0.1 <= self.min_seconds <= self.max_seconds / 2:
            raise UsageError(
                f"segments of {self.min_seconds:g} to {self.max_seconds:g} s; expected a minimum "
                "of 0.1 s or more, and a maximum of twice the minimum or more"
            )
        if not 0 <= self.off <= self.on <= 1:
            raise UsageError(
                f"hysteresis from {self.on:g} down to {self.off:g}; expected 0 <= off <= on <= 1"
            )


DEFAULT = SegmentOptions()


def cover(cuts: list[float], seconds: float, options: SegmentOptions) -> list[dict[str, float]]:
    """Segments from one cut to the next; cuts that leave less than `min_seconds` are ignored."""
    edges = [0.0]
    for cut in sorted(cuts):
        if cut - edges[-1] >= options.min_seconds and seconds - cut >= options.min_seconds:
            edges.append(round(cut, 3))
    edges.append(round(seconds, 3))
    return [{"start": a, "end": b} for a, b in itertools.pairwise(edges)]
