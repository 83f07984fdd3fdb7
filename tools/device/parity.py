"""Does the device compute what PyTorch and a CPU compute?

Errors are a share of the largest value. What is in float32 must stay within TOLERANCE.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moss_audio_jax import MossAudio, Request
from moss_audio_jax.config import Compute
from moss_audio_jax.models import moss_audio
from moss_audio_jax.sharding import make_mesh
from moss_audio_jax.train.step import Recipe, gradients
from moss_audio_jax.tree import flatten
from tools.device.measure import TINY, Sizes, difference
from tools.device.training import train_batch

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "tiny" / "a"
CLIP = ROOT / "moss_audio_jax" / "assets" / "demo" / "two_people.flac"
QUESTION = "Transcribe the speech."
TOLERANCE = 2e-4  # as in tests/models/test_golden.py


def measure(setting: str, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """Args:
    setting: "golden", "answers" or "gradients".
    """
    yield {"golden": golden, "answers": answers, "gradients": gradients_}[setting]()


def golden() -> dict[str, Any]:
    """Prompts of a tiny checkpoint, against what PyTorch has left in tests/golden."""
    stored = np.load(GOLDEN / "golden.npz")
    model = MossAudio.load(GOLDEN, "float32")
    prompts = []
    for i in range(7):
        ends = np.cumsum(stored[f"s{i}_clips"])[:-1]
        prompts.append((stored[f"s{i}_ids"], np.split(stored[f"s{i}_mel"], ends, axis=1)))
    error = max(
        difference(logits[stored[f"s{i}_rows"]], stored[f"s{i}_logits"])
        for i, logits in enumerate(model.logits_batch(prompts))
    )
    equal = [
        model.generate_ids(prompts[i][0], mels=prompts[i][1], max_new_tokens=12)
        == stored[f"s{i}_greedy"].tolist()
        for i in (4, 6)
    ]
    return {
        "against": "PyTorch, stored",
        "logits_error": error,
        "greedy_equal": all(equal),
        "passed": error <= TOLERANCE and all(equal),
    }


def answers() -> dict[str, Any]:
    """The small model of the package about a clip of speech, against the CPU of this machine; and
    how far its bfloat16 is from float32."""
    there, here = MossAudio.load(None, "float32", _cpu()), MossAudio.load(None, "float32")
    rough = MossAudio.load(None, "bfloat16")
    prompt = there.prepare(Request(QUESTION, [CLIP]))
    expected, found, rounded = (
        model.logits(prompt.ids, mels=prompt.mels) for model in (there, here, rough)
    )
    tokens = [
        model.generate_ids(prompt.ids, mels=prompt.mels, max_new_tokens=64)
        for model in (there, here)
    ]
    error = difference(found, expected)
    return {
        "against": "the CPU of this machine",
        "logits_error": error,
        "greedy_equal": tokens[0] == tokens[1],
        "greedy_tokens": len(tokens[0]),
        "bfloat16_logits_error": difference(rounded, expected),
        "passed": error <= TOLERANCE and tokens[0] == tokens[1],
    }


def gradients_() -> dict[str, Any]:
    """The gradients of a tiny model on packed rows of sound and text, against the CPU."""
    recipe = Recipe(TINY.model, Compute("float32"))
    batch = train_batch(TINY.model, 2, TINY.train_length, True)
    batch["mels"] = batch["mels"].astype(np.float32)
    params = flatten(jax.device_get(moss_audio.init_params(jax.random.key(0), TINY.model)))
    found = []
    for mesh in (_cpu(), make_mesh(devices=jax.devices()[:1])):
        with jax.set_mesh(mesh):
            placed = jax.device_put((params, batch), mesh.devices.flat[0])
            step = jax.jit(functools.partial(_gradients, recipe=recipe))
            found.append(jax.device_get(step(*placed)))
    errors = {path: difference(found[1][path], found[0][path]) for path in params}
    worst = max(errors, key=errors.get)
    return {
        "against": "the CPU of this machine",
        "gradient_error": errors[worst],
        "worst": worst,
        "passed": errors[worst] <= TOLERANCE,
    }


def _gradients(params: dict, batch: dict, recipe: Recipe) -> dict:
    return gradients(params, {}, recipe, batch)[0]


def _cpu() -> jax.sharding.Mesh:
    return make_mesh(devices=jax.devices("cpu")[:1])
