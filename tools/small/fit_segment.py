"""Fits the networks of annotate/boundary.py; --write puts them into the package.

    python tools/small/fit_segment.py [--scenes 100] [--seed 0] [--rounds 2] [--write]

Training clips are scenes of the split `train` of `world` (three times as many as of the others),
concatenations of them, and patchwork with separate seeds, each clean and with noise. Prints the
scores of thresholds on `validation`; tools/small/score_annotate.py gives those on `test`. One
network uses only the signal, the other also the small model's tags. Each is trained on proposed
cuts: first among other proposals, of which some are left out at random, then (--rounds) in the
order in which the segmenter removes them with the network so far. Needs scikit-learn, which comes
with `annotate`, and the extra `world`.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))
import boundaries
import score_annotate  # beside this file

from moss_audio_jax.annotate import boundary, segment
from moss_audio_jax.annotate.boundary import Judge, Sides
from moss_audio_jax.annotate.ears import Ears
from moss_audio_jax.annotate.features import FINE, ClipFeatures
from moss_audio_jax.annotate.spans import DEFAULT, SegmentOptions, cover
from moss_audio_jax.annotate.tags import Sources
from moss_audio_jax.config import DEFAULT_CHECKPOINT

TIMES = {"scenes": 3, "joined": 1, "patchwork": 1}  # clips of each set, times --scenes
THRESHOLDS = (0.3, 0.4, 0.5, 0.6)
HIDDEN, SEEDS, DECAY = 32, 2, 0.5  # the networks of SEEDS seeds are averaged
_TOLERANCE = 0.5
Data = list[tuple[score_annotate.Clip, ClipFeatures, Sources | None]]


class Clip:
    """The proposed cuts of a clip, each true (1), false (0), or neither."""

    def __init__(self, clip: score_annotate.Clip, features: ClipFeatures, sources: Sources | None):
        self.clip, self.seconds = clip, features.seconds
        features = segment.without_noise(features)
        self.sides = _Remembering(features, sources)
        self.places = segment.proposals(features, DEFAULT, sources)
        owed = boundaries.lenient([], clip.true, clip.free)[1]
        self.truth = dict.fromkeys(self.places, 0)
        for time in owed:
            near = [p for p in self.places if not self.truth[p]]
            if (
                near
                and abs((best := min(near, key=lambda p: abs(p / FINE - time))) / FINE - time)
                <= _TOLERANCE
            ):
                self.truth[best] = 1
        self.neither = {
            p
            for p in self.places
            if not self.truth[p] and any(abs(p / FINE - f) < _TOLERANCE for f in clip.free)
        }

    def thinned(self, rng: np.random.Generator) -> None:
        """Adds samples of each proposal among all, half of the false ones, and the true ones."""
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
        """Adds samples from the segmenter with the current network and a raised threshold."""
        segment.kept(self.sides, self.places, SegmentOptions(threshold=0.6))

    def samples(self) -> list[tuple[np.ndarray, int]]:
        return [
            (evidence, self.truth[at])
            for (_, at, _), evidence in self.sides.seen.items()
            if at not in self.neither
        ]

    def found(self, threshold: float) -> tuple[list[float], list[float]]:
        """(found, true) boundaries, without the optional ones."""
        options = SegmentOptions(threshold=threshold)
        cuts = [at / FINE for at in segment.kept(self.sides, self.places, options)]
        spans = cover([0.0, *cuts], self.seconds, options)
        cuts = [span["start"] for span in spans[1:]]
        return boundaries.lenient(cuts, self.clip.true, self.clip.free)


class _Remembering(Sides):
    def __init__(self, features: ClipFeatures, sources: Sources | None):
        super().__init__(features, sources)
        self.seen: dict[tuple[int, int, int], np.ndarray] = {}

    def evidence(self, before: int, at: int, after: int) -> np.ndarray:
        key = (before, at, after)
        if key not in self.seen:
            self.seen[key] = super().evidence(*key)
        return self.seen[key]


def held_out(clips: Sequence[Clip], threshold: float) -> float:
    return boundaries.f1([clip.found(threshold) for clip in clips])[0]


def fitted(clips: Sequence[Clip]) -> Judge:
    rows = [row for clip in clips for row in clip.samples()]
    evidence, truth = (np.array(column) for column in zip(*rows, strict=True))
    mean, deviation = evidence.mean(axis=0), evidence.std(axis=0) + 1e-3
    z = np.clip((evidence - mean) / deviation, -4, 4)
    models = [
        MLPClassifier(
            (HIDDEN,),
            activation="tanh",
            alpha=DECAY,
            batch_size=256,
            learning_rate_init=2e-3,
            max_iter=60,
            tol=0.0,
            n_iter_no_change=60,
            random_state=seed,
        ).fit(z, truth)
        for seed in range(SEEDS)
    ]
    print(f"{len(truth)} cuts, {np.mean(truth):.2f} of them true", flush=True)
    fields = (
        mean,
        deviation,
        np.concatenate([model.coefs_[0] for model in models], axis=1),
        np.concatenate([model.intercepts_[0] for model in models]),
        np.concatenate([model.coefs_[1][:, 0] for model in models]) / SEEDS,
        np.mean([model.intercepts_[1] for model in models], axis=0),
    )
    return Judge(*(field.astype(np.float32) for field in fields))


def use(name: str, judge: Judge) -> None:
    """Makes the segmenter of this process use a judge."""
    others = boundary.judges() if boundary.NETWORKS.exists() else {}
    boundary.judges = lambda: others | {name: judge}


def learned(name: str, data: Data, rounds: int, seed: int) -> Judge:
    rng = np.random.default_rng(seed)
    clips = [
        Clip(clip, features, sources if name == "sources" else None)
        for clip, features, sources in data
    ]
    for clip in clips:
        clip.thinned(rng)
    use(name, judge := fitted(clips))
    for _ in range(rounds):
        for clip in clips:
            clip.struck()
        use(name, judge := fitted(clips))
    return judge


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--scenes", type=int, default=100, help="clips per set")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--write", action="store_true", help=f"to assets/{boundary.NETWORKS.name}")
    args = options.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)  # the number of epochs is fixed on purpose
    ears = Ears.load(DEFAULT_CHECKPOINT)
    kinds = list(itertools.product(score_annotate.SETS, (False, True)))

    def made(split: str, scenes: int) -> dict[tuple[str, bool], Data]:
        return {
            (kind, noise): list(
                score_annotate.featured(kind, TIMES[kind] * scenes, split, args.seed, noise, ears)
            )
            for kind, noise in kinds
        }

    train, validation = made("train", args.scenes), made("validation", max(args.scenes // 3, 1))
    found = {}
    for name in ("signal", "sources"):
        every = list(itertools.chain.from_iterable(train.values()))
        found[name] = learned(name, every, args.rounds, args.seed)
        held = {
            key: [Clip(c, f, s if name == "sources" else None) for c, f, s in data]
            for key, data in validation.items()
        }
        for threshold in THRESHOLDS:
            scores = [round(held_out(clips, threshold), 3) for clips in held.values()]
            print(f"{name}, {threshold}: {scores}, mean {np.mean(scores):.3f}", flush=True)
    if args.write:
        np.savez_compressed(
            boundary.NETWORKS,
            **{
                f"{name}/{field}": value
                for name, judge in found.items()
                for field, value in judge._asdict().items()
            },
        )


if __name__ == "__main__":
    main()
