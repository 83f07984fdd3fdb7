"""Fits the weights of annotate/boundary.py, prints them, and with --write puts them there.

    python tools/fit_segment.py [--scenes 100] [--seed 0] [--rounds 2] [--write]

Learns from world scenes of the split `train`, concatenations of them and patchwork of seeds of its
own, each clean and under noise; picks the threshold on `validation`. tools/score_annotate.py then
tells of `test`. A logistic regression of proposed cuts: first between other proposals, thinned at
random, then (--rounds) in the order in which the segmenter strikes them out with the weights of
by then. The same seed gives the same weights. Needs scikit-learn, which comes with `annotate`.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "annotate"))
import boundaries
import score_annotate

from moss_audio_jax.annotate import boundary, segment
from moss_audio_jax.annotate.boundary import EVIDENCE, Sides
from moss_audio_jax.annotate.features import FINE, ClipFeatures
from moss_audio_jax.annotate.segment import SegmentOptions

WEIGHTS = {"scenes": 1.0, "joined": 1.0, "patchwork": 2.0}  # of a cut in the fit
THRESHOLDS = (0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6)
PENALTY = 0.3  # C of the regression
_TOLERANCE = 0.5


class Clip:
    """Proposals of a clip, which of them are true (1), false (0), or neither."""

    def __init__(self, clip: score_annotate.Clip, features: ClipFeatures, weight: float):
        self.clip, self.seconds = clip, features.seconds
        features = segment.without_noise(features)
        self.sides, self.weight = _Remembering(features), weight
        self.places = segment.proposals(features, segment.DEFAULT)
        owed = boundaries.lenient([], clip.true, clip.free)[1]
        self.truth = dict.fromkeys(self.places, 0)
        for time in owed:
            near = [p for p in self.places if not self.truth[p]]
            if near and abs((best := min(near, key=lambda p: abs(p / FINE - time))) / FINE - time) \
                    <= _TOLERANCE:  # fmt: skip
                self.truth[best] = 1
        self.neither = {p for p in self.places if not self.truth[p]
                        and any(abs(p / FINE - f) < _TOLERANCE for f in clip.free)}  # fmt: skip

    def thinned(self, rng: np.random.Generator) -> None:
        """Looks at the proposals among all, among half of the false ones, and among the true."""
        false = [p for p in self.places if not self.truth[p]]
        half = set(rng.permutation(false)[: len(false) // 2].tolist())
        for kept in (
            self.places,
            [p for p in self.places if p not in half],
            [p for p in self.places if self.truth[p]],
        ):
            edges = [0, *kept, len(self.sides.energy)]
            for before, at, after in zip(edges, edges[1:], edges[2:], strict=False):
                self.sides.evidence(before, at, after)

    def struck(self) -> None:
        """Looks at what the segmenter does with the weights of now, a little too keen to strike."""
        segment._kept(self.sides, self.places, SegmentOptions(threshold=0.6))

    def samples(self) -> list[tuple[np.ndarray, int, float]]:
        return [(evidence, self.truth[at], self.weight)
                for (_, at, _), evidence in self.sides.seen.items()
                if at not in self.neither]  # fmt: skip

    def found(self, threshold: float) -> tuple[list[float], list[float]]:
        """(found, true) boundaries without the optional ones."""
        options = SegmentOptions(threshold=threshold)
        cuts = [at / FINE for at in segment._kept(self.sides, self.places, options)]
        spans = segment.cover([0.0, *cuts], self.seconds, options)
        cuts = [span["start"] for span in spans[1:]]
        return boundaries.lenient(cuts, self.clip.true, self.clip.free)


class _Remembering(Sides):
    def __init__(self, features: ClipFeatures):
        super().__init__(features)
        self.seen: dict[tuple[int, int, int], np.ndarray] = {}

    def evidence(self, before: int, at: int, after: int) -> np.ndarray:
        key = (before, at, after)
        if key not in self.seen:
            self.seen[key] = super().evidence(*key)
        return self.seen[key]


def made(kind: str, noise: bool, count: int, split: str, seed: int) -> list[Clip]:
    data = score_annotate.featured(kind, count, split, seed, noise)
    return [Clip(clip, features, WEIGHTS[kind]) for clip, features in data]


def held_out(clips: Sequence[Clip], threshold: float) -> float:
    return boundaries.f1([clip.found(threshold) for clip in clips])[0]


def use(weights: Mapping[str, Sequence[float]], bias: float) -> None:
    """Makes the segmenter of this process weigh with these."""
    boundary._MEAN, boundary._DEVIATION, *both = np.array([weights[name] for name in EVIDENCE]).T
    boundary._WEIGHTS, boundary.BIAS = np.concatenate(both), bias


def fitted(clips: Sequence[Clip]) -> tuple[dict[str, tuple[float, ...]], float]:
    """(WEIGHTS, BIAS) as they stand in boundary.py, rounded as there."""
    rows = [row for clip in clips for row in clip.samples()]
    evidence, truth, weight = (np.array(column) for column in zip(*rows, strict=True))
    mean, deviation = evidence.mean(axis=0).round(3), evidence.std(axis=0).round(3) + 1e-3
    n = len(EVIDENCE)
    use({e: (mean[i], deviation[i], 0, 0) for i, e in enumerate(EVIDENCE)}, 0.0)
    model = LogisticRegression(C=PENALTY, max_iter=500)
    model.fit(boundary.expanded(evidence), truth, sample_weight=weight)
    both = model.coef_[0].round(3)
    table = zip(mean, deviation.round(3), both[:n], both[n:], strict=True)
    weights = {name: tuple(map(float, row)) for name, row in zip(EVIDENCE, table, strict=True)}
    bias = round(float(model.intercept_[0]), 3)
    use(weights, bias)
    print(f"{len(truth)} cuts, {np.mean(truth):.2f} of them true", flush=True)
    return weights, bias


def written(weights: Mapping[str, Sequence[float]], bias: float) -> str:
    lines = [f'    "{n}": ({", ".join(f"{x:.3f}" for x in w)}),' for n, w in weights.items()]
    kind = "dict[str, tuple[float, float, float, float]]"
    return "\n".join([f"WEIGHTS: {kind} = {{", *lines, "}", f"BIAS = {bias:.3f}"])


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--scenes", type=int, default=100, help="clips of each set")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--write", action="store_true", help="into annotate/boundary.py")
    args = options.parse_args()
    kinds = list(itertools.product(score_annotate.SETS, (False, True)))
    rng = np.random.default_rng(args.seed)
    clips = []
    for kind, noise in kinds:
        for clip, features in score_annotate.featured(kind, args.scenes, "train", args.seed, noise):
            clips.append(Clip(clip, features, WEIGHTS[kind]))
            clips[-1].thinned(rng)
    weights, bias = fitted(clips)
    for _ in range(args.rounds):
        for clip in clips:
            clip.struck()
        weights, bias = fitted(clips)
    validation = {kind: made(*kind, max(args.scenes // 3, 1), "validation", args.seed)
                  for kind in kinds}  # fmt: skip
    text = written(weights, bias)
    print(text, flush=True)
    if args.write:
        path = Path(boundary.__file__)
        whole = path.read_text("utf-8")
        block = re.compile(r"(?<=# fitted\n).*?(?=\n# end of fitted)", re.DOTALL)
        path.write_text(block.sub(lambda _: text, whole, count=1), "utf-8")
    for threshold in THRESHOLDS:
        scores = [round(held_out(data, threshold), 3) for data in validation.values()]
        print(f"threshold {threshold}: {scores}, mean {np.mean(scores):.3f}", flush=True)


if __name__ == "__main__":
    main()
