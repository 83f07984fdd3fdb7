"""How often a transcript is said to end early, rightly and wrongly, on held-out scenes.

example:
  python tools/small/score_early_ends.py --scenes 40

Each scene is transcribed without times, with those of sentences and with those of words; every
second one again as in people's files (`fit_familiarity.as_files`). The model's own answers are
counted as whole, so that each that is told counts as an error. Of those without times that have
eight words or more, the first 30% and 60% are answers that end early. Needs the extra `world`.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from fit_familiarity import TEST_SPLITS, as_files

from moss_audio_jax import world
from moss_audio_jax.api import MossAudio, Reply, Request
from moss_audio_jax.config import DEFAULT_CHECKPOINT
from moss_audio_jax.text.tasks import TRANSCRIBE
from moss_audio_jax.transcribe import Window, joined

SEED = 901
SHARES, LEAST_WORDS = (0.3, 0.6), 8


def clips(count: int) -> list[tuple[str, np.ndarray]]:
    rng, found = np.random.default_rng(0), []
    for split in TEST_SPLITS:
        for index in range(count):
            wav = world.scene(index, split, SEED).wav
            found.append((split, wav))
            if index % 2 == 0:
                found.append((f"{split}, as files", as_files(wav, rng)))
    return found


def told(reply: Reply, wav: np.ndarray, timestamps: str) -> bool:
    window = Window(0.0, len(wav) / 16_000, None)
    return joined([(window, reply)], timestamps).stopped_at is not None


def main(argv: Sequence[str]) -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    options.add_argument("--scenes", type=int, default=40, help="of each test split")
    args = options.parse_args(argv)
    model = MossAudio.load(args.checkpoint, "float32")
    asked = [(*clip, form) for clip in clips(args.scenes) for form in TRANSCRIBE]
    replies = model.generate_batch([Request(TRANSCRIBE[form], [wav]) for _, wav, form in asked])
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for (name, wav, form), reply in zip(asked, replies, strict=True):
        if reply.finish_reason != "stop":
            continue
        counts[name].update(whole=1, whole_told=told(reply, wav, form))
        words = reply.text.split()
        for share in SHARES if form == "none" and len(words) >= LEAST_WORDS else ():
            cut = dataclasses.replace(reply, text=" ".join(words[: int(len(words) * share)]))
            counts[name].update(cut=1, cut_told=told(cut, wav, form))
    print(f"{'':28} whole  told   cut  told")
    for name, of in [*counts.items(), ("all", sum(counts.values(), collections.Counter()))]:
        row = (of["whole"], of["whole_told"], of["cut"], of["cut_told"])
        print(f"{name:28}" + "".join(f"{n:6}" for n in row))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
