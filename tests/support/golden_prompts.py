"""The prompts of tests/golden/tiny/a, which hold sound."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from moss_audio_jax.data.batch import Example

OWN = Path(__file__).parents[1] / "golden" / "tiny" / "a"


def golden_prompts(numbers: Iterable[int] = range(7)) -> list[Example]:
    golden = np.load(OWN / "golden.npz")
    made = []
    for i in numbers:
        clips = np.cumsum(golden[f"s{i}_clips"])[:-1]
        made.append(Example(golden[f"s{i}_ids"], tuple(np.split(golden[f"s{i}_mel"], clips, 1))))
    return made
