"""Fits the probe that tells sound like a model's training data from other sound; measures it.

example:
  python tools/small/fit_familiarity.py --unknown flite/kal flite/slt asterisk/fr asterisk/it \\
      games --test flite/rms asterisk/en --write

Known sound is scenes of `world`, unchanged and as in people's files: pieces of 1 to 12 s, quieter,
through codecs, telephones and noise. Unknown sound is that in the folders of --unknown, treated in
the same ways. The limits are set on the split `validation`, so that 1 in 100 of its clips is called
unfamiliar. The table at the end is about the three test splits and the folders of --test, to which
nothing was fitted. Needs the extra `world`.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import scipy.optimize
import soundfile

from moss_audio_jax import world
from moss_audio_jax.api import MossAudio
from moss_audio_jax.audio import load_audio, log_mel
from moss_audio_jax.audio.io import resample
from moss_audio_jax.config import DEFAULT_CHECKPOINT
from moss_audio_jax.errors import InputError
from moss_audio_jax.generate.familiarity import Gauge, Measures, Probe, save
from moss_audio_jax.generate.hearing import Hearing
from moss_audio_jax.weights.helpers import load_helpers

TAP = 2  # the third tapped layer, which separates best
FALSE_ALARMS = 0.01
RIDGE = 1e-3
TEST_SPLITS = ("test", "test_voices", "test_combinations")
WORLD = "the project's synthetic speech, sounds and music"


def as_files(wav: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The sound after a random treatment, such as a codec or noise, that people's files show."""
    seconds = rng.uniform(1, 12)
    start = int(rng.uniform(0, max(len(wav) - seconds * 16_000, 0) + 1))
    wav = wav[start : start + int(seconds * 16_000)] * np.float32(10 ** rng.uniform(-1.5, 0))
    way = rng.choice(["plain", "mp3", "opus", "vorbis", "telephone", "noise"], p=[0.4, *[0.12] * 5])
    if way == "noise":
        level = np.sqrt(np.mean(np.square(wav))) * 10 ** rng.uniform(-1.5, -0.25)
        return wav + level * rng.standard_normal(len(wav)).astype(np.float32)
    if way == "telephone":
        return resample(resample_to(wav, 8000), 8000)
    if way == "plain":
        return wav
    form = {"mp3": ("MP3", "MPEG_LAYER_III"), "opus": ("OGG", "OPUS"), "vorbis": ("OGG", "VORBIS")}
    file = io.BytesIO()
    soundfile.write(file, np.clip(wav, -1, 1), 16_000, format=form[way][0], subtype=form[way][1])
    return load_audio(file)


def resample_to(wav: np.ndarray, rate: int) -> np.ndarray:
    import soxr

    return soxr.resample(wav, 16_000, rate, quality="HQ")


def scenes(split: str, count: int, seed: int = 77) -> Iterator[np.ndarray]:
    for index in range(count):
        yield world.scene(index, split, seed).wav


def clips(folder: Path) -> Iterator[np.ndarray]:
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        try:
            wav = load_audio(file)
        except InputError:
            continue
        if len(wav) >= 16_000 and np.abs(wav).max() > 1e-3:
            yield wav[: 60 * 16_000]


def fit(known: np.ndarray, unknown: np.ndarray) -> tuple[np.ndarray, float]:
    """Ridge logistic regression on states [N, D], with equal weight of both sides; weight, bias."""
    x = np.concatenate([known, unknown]).astype(np.float64)
    sign = np.r_[-np.ones(len(known)), np.ones(len(unknown))]
    share = np.where(sign < 0, 0.5 / len(known), 0.5 / len(unknown))
    mean, scale = x.mean(0), x.std(0) + 1e-6
    x = (x - mean) / scale

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        weight, bias = parameters[:-1], parameters[-1]
        margin = sign * (x @ weight + bias)
        value = share @ np.logaddexp(0, -margin) + RIDGE * weight @ weight
        slope = -sign * share / (1 + np.exp(np.clip(margin, -500, 500)))
        return value, np.r_[slope @ x + 2 * RIDGE * weight, slope.sum()]

    found = scipy.optimize.minimize(loss, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B")
    weight = found.x[:-1] / scale
    return weight.astype(np.float32), float(found.x[-1] - mean @ weight)


def main(argv: Sequence[str]) -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    options.add_argument("--unknown", type=Path, nargs="+", required=True, metavar="DIR")
    options.add_argument("--test", type=Path, nargs="+", default=[], metavar="DIR")
    options.add_argument("--scenes", type=int, default=1500)
    options.add_argument(
        "--write", action="store_true", help="write it into the checkpoint's helpers"
    )
    args = options.parse_args(argv)
    model = MossAudio.load(args.checkpoint, "float32")
    heads, _ = load_helpers(args.checkpoint)
    pieces = heads["helpers/pieces/kernel"], heads["helpers/pieces/bias"]
    width = 2 * model.config.encoder.d_model
    gauge = Gauge(pieces, Probe(np.zeros(width, np.float32), 0.0, TAP, 1.0, 1.0, WORLD))
    hearing = Hearing(model.encoder_params, model.config.encoder, model.compute, gauge)
    rng = np.random.default_rng(0)

    def measured(wavs: Iterator[np.ndarray], ways: int = 0) -> list[Measures]:
        given = [
            wav if way < 0 else as_files(wav, rng)
            for wav in wavs
            for way in (range(ways) if ways else (-1,))
        ]
        found = []
        for start in range(0, len(given), 64):
            with jax.set_mesh(model.mesh):
                found += hearing.measure([log_mel(wav) for wav in given[start : start + 64]])
        return [each for each in found if each is not None]

    def pooled(measures: Sequence[Measures]) -> np.ndarray:
        return np.stack([each.pooled for each in measures])

    known = measured(scenes("train", args.scenes), 2)
    # Folders have equal weight, however many clips they contain.
    unknown = []
    for folder in args.unknown:
        found = measured(clips(folder), 2)
        unknown += [found[i] for i in rng.choice(len(found), 400)]
        print(f"{folder}: {len(found)} pieces", file=sys.stderr)
    weight, bias = fit(pooled(known), pooled(unknown))

    held_out = [
        *measured(scenes("validation", args.scenes // 2)),
        *measured(scenes("validation", args.scenes // 4), 1),
    ]
    strange = pooled(held_out) @ weight + bias
    probe = Probe(
        weight,
        bias,
        TAP,
        round(float(np.quantile([m.doubt for m in held_out], 1 - FALSE_ALARMS / 2)), 3),
        round(float(np.quantile(strange, 1 - FALSE_ALARMS / 2)), 3),
        WORLD,
    )
    judge = Gauge(pieces, probe).judge
    table = {split: measured(scenes(split, 300)) for split in TEST_SPLITS}
    table |= {f"{split}, as files": measured(scenes(split, 300), 1) for split in TEST_SPLITS}
    table |= {"/".join(folder.parts[-2:]): measured(clips(folder)) for folder in args.test}
    shares = {}
    print(f"limits: doubt {probe.doubt_limit}, strangeness {probe.strange_limit}")
    for name, found in table.items():
        told = [judge(each).unfamiliar for each in found]
        doubtful = np.mean([each.doubt > probe.doubt_limit for each in found])
        shares[name] = round(float(np.mean(told)), 3)
        print(
            f"{name:32} {len(found):5} clips, {np.mean(told):6.1%} unfamiliar "
            f"(by doubt alone {doubtful:.1%})"
        )
    if args.write:
        sources = ["/".join(folder.parts[-2:]) for folder in args.unknown]
        save(args.checkpoint, probe, {"fitted_against": sources, "unfamiliar_share": shares})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
