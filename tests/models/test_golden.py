"""The model against PyTorch's results: our own fixtures, and the shared ones if they exist."""

from pathlib import Path

import numpy as np
import pytest

import moss_audio_jax as mj

OWN = Path(__file__).parents[1] / "golden" / "tiny"
SHARED = Path(__file__).parents[3] / "shared" / "golden" / "tiny"
TOLERANCE = 2e-4  # of a tensor's largest absolute value; what is found is about 1e-6

CASES = [("a", i) for i in range(7)] + [("b", i) for i in range(7)]
CASES += [("shared", i) for i in range(8)]
OTHER_LAYOUTS = [
    (name, layout, i)
    for name in ("a", "b")
    for layout in ("full", "sliding", "sliding_causal")
    for i in (4, 6)
] + [("shared", "full", i) for i in range(5)]


class Golden:
    """A checkpoint folder with the numbers that belong to it."""

    def __init__(self, name: str, layout: str = "chunked"):
        folder = SHARED if name == "shared" else OWN / name
        if not folder.is_dir():
            pytest.skip(f"{folder} is absent; the fixtures a and b cover the same")
        checkpoint = folder / "checkpoint" if name == "shared" else folder
        suffix = "" if layout == "chunked" else f"_{layout}"
        self.inputs = np.load(folder / "golden.npz")
        self.outputs = np.load(folder / f"golden{suffix}.npz")
        self.audio_token_id = int(self.inputs["audio_token_id"])
        self.model = mj.MossAudio.load(checkpoint, "float32", None, layout.split("_")[0])
        if layout == "sliding_causal":
            self.model.config = _causal(self.model.config)

    def prompt(self, i: int) -> tuple[np.ndarray, list[np.ndarray]]:
        clips = self.inputs[f"s{i}_clips"]
        mels = np.split(self.inputs[f"s{i}_mel"], np.cumsum(clips)[:-1], axis=1)
        return self.inputs[f"s{i}_ids"], mels

    def assert_close(self, found: np.ndarray, key: str) -> None:
        expected = self.outputs[key]
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()

    def assert_logits(self, logits: np.ndarray, prefix: str) -> None:
        rows = self.outputs.get(f"{prefix}_rows")
        self.assert_close(logits if rows is None else logits[rows], f"{prefix}_logits")


def _causal(config):
    import dataclasses

    return dataclasses.replace(
        config, encoder=dataclasses.replace(config.encoder, causal_window=True)
    )


_loaded: dict[tuple, Golden] = {}


def golden(name: str, layout: str = "chunked") -> Golden:
    if (name, layout) not in _loaded:
        _loaded[name, layout] = Golden(name, layout)
    return _loaded[name, layout]


@pytest.mark.parametrize(("name", "i"), CASES)
def test_encoder_logits_loss_and_greedy_tokens(name, i):
    g = golden(name)
    ids, mels = g.prompt(i)
    encoded = g.model.encode_audio(mels)
    assert [len(features) for features, _ in encoded] == [-(-m.shape[1] // 8) for m in mels]
    g.assert_close(np.concatenate([features for features, _ in encoded]), f"s{i}_encoder")
    taps = np.concatenate([taps for _, taps in encoded], axis=1)
    for k, tap in enumerate(taps):
        g.assert_close(tap, f"s{i}_deepstack{k}")
    g.assert_logits(g.model.logits(ids, mels=mels), f"s{i}")
    labels = np.where(ids == g.audio_token_id, -100, ids)
    g.assert_close(np.float32(g.model.loss(ids, labels, mels=mels)), f"s{i}_loss")
    expected = g.outputs[f"s{i}_greedy"].tolist()
    assert g.model.generate_ids(ids, mels=mels, max_new_tokens=12) == expected


@pytest.mark.parametrize("name", ["a", "b", "shared"])
def test_text_without_audio(name):
    g = golden(name)
    g.assert_logits(g.model.logits(g.inputs["text_ids"]), "text")


@pytest.mark.parametrize(("name", "layout", "i"), OTHER_LAYOUTS)
def test_other_attention_layouts(name, layout, i):
    g = golden(name, layout)
    ids, mels = g.prompt(i)
    encoded = g.model.encode_audio(mels)
    g.assert_close(np.concatenate([features for features, _ in encoded]), f"s{i}_encoder")
    taps = np.concatenate([taps for _, taps in encoded], axis=1)
    for k, tap in enumerate(taps):
        g.assert_close(tap, f"s{i}_deepstack{k}")
    g.assert_logits(g.model.logits(ids, mels=mels), f"s{i}")


@pytest.mark.parametrize(("name", "count"), [("a", 7), ("b", 7), ("shared", 8)])
def test_all_prompts_in_one_batch(name, count):
    g = golden(name)
    prompts = [g.prompt(i) for i in range(count)]
    for i, logits in enumerate(g.model.logits_batch(prompts)):
        g.assert_logits(logits, f"s{i}")


def test_bfloat16_stays_near_float32():
    exact = golden("a")
    rough = mj.MossAudio.load(OWN / "a", "bfloat16")
    ids, mels = exact.prompt(5)
    expected, found = exact.model.logits(ids, mels=mels), rough.logits(ids, mels=mels)
    assert found.dtype == np.float32
    # 8 bits of mantissa through 9 layers: a few percent of the spread, not more.
    assert np.abs(found - expected).mean() < 0.03 * np.abs(expected).max()
    assert np.abs(found - expected).max() > 0
