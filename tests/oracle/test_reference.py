"""The PyTorch reference against the official code's numbers, and our stored fixtures against it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from golden import make_golden  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from oracle.reference import (  # noqa: E402
    Reference,
    qwen3_layer,
    to_numpy,
    whisper_layer,
    window_mask,
)

pytestmark = pytest.mark.oracle

SHARED = Path(__file__).resolve().parents[3] / "shared" / "golden" / "tiny"
TINY = make_golden.TINY


def relative_error(actual, expected) -> float:
    """The largest difference, relative to the largest expected value."""
    if torch.is_tensor(actual):
        actual = to_numpy(actual)
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def clips_of(golden, index: int) -> list[np.ndarray]:
    ends = np.cumsum(golden[f"s{index}_clips"])
    return np.split(golden[f"s{index}_mel"], ends[:-1], axis=1)


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is absent")
@pytest.mark.parametrize(
    ("file", "attention", "prompts"), [("golden", "chunked", 8), ("golden_full", "full", 5)]
)
def test_reference_meets_the_official_code(file, attention, prompts):
    model = Reference.load(SHARED / "checkpoint", attention)
    golden = np.load(SHARED / f"{file}.npz")
    placeholder = int(golden["audio_token_id"])
    errors = {"text": relative_error(model.logits(golden["text_ids"]), golden["text_logits"])}
    for i in range(prompts):
        ids, mels = golden[f"s{i}_ids"], clips_of(golden, i)
        features, taps = zip(*model.encode(mels), strict=True)
        taps = torch.cat(taps, dim=1)
        labels = np.where(ids == placeholder, -100, ids)
        computed = {
            "encoder": torch.cat(features),
            **{f"deepstack{k}": tap for k, tap in enumerate(taps)},
            "logits": model.logits(ids, mels),
            "loss": model.loss(ids, labels, mels),
        }
        errors |= {
            f"s{i}_{key}": relative_error(value, golden[f"s{i}_{key}"])
            for key, value in computed.items()
        }
        greedy, _ = model.greedy(ids, mels, n=12, forbidden=[placeholder])
        assert greedy == golden[f"s{i}_greedy"].tolist(), f"prompt {i}"
    # Every array of the file was compared, save the inputs and the greedy ids.
    compared_otherwise = ("_clips", "_mel", "_ids", "_greedy", "audio_token_id", "text_logits")
    assert set(errors) - {"text"} == {k for k in golden if not k.endswith(compared_otherwise)}
    assert max(errors.values()) < 1e-5, errors


def test_fixtures_are_what_make_golden_makes(tmp_path):
    make_golden.make(tmp_path)
    files = {path.relative_to(TINY) for path in TINY.rglob("*") if path.is_file()}
    assert files == {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    for name in sorted(files):
        stored, made = TINY / name, tmp_path / name
        if name.suffix == ".json":
            assert json.loads(stored.read_text()) == json.loads(made.read_text()), name
            continue
        read = np.load if name.suffix == ".npz" else load_file
        stored, made = dict(read(stored)), dict(read(made))
        assert stored.keys() == made.keys(), name
        for key, value in stored.items():
            assert made[key].dtype == value.dtype, (name, key)
            if value.dtype.kind == "i":
                np.testing.assert_array_equal(made[key], value, err_msg=f"{name}: {key}")
            else:  # machines differ in the order of sums
                assert relative_error(made[key], value) < 1e-5, (name, key)


@pytest.mark.parametrize("name", ["a", "b"])
def test_fixtures_tell_layouts_and_padding_apart(name):
    """Each mistake that the fixtures should detect changes an output by more than the tolerance."""
    model = Reference.load(TINY / name)
    golden = np.load(TINY / name / "golden.npz")
    chunk = model.audio_encoder.chunk_frames
    for index in (4, 5, 6):  # chunks encoded one by one lack the prompt's padding
        parts = [
            part for mel in clips_of(golden, index) for part in torch.tensor(mel).split(chunk, 1)
        ]
        alone = [model.encode([part])[0][0] for part in parts]
        assert relative_error(torch.cat(alone), golden[f"s{index}_encoder"]) > 0.01
    # ... and a lone short clip has none, where static chunks would give it some.
    beside_a_whole_chunk = model.encode([golden["s1_mel"], np.zeros((128, chunk), np.float32)])
    assert relative_error(beside_a_whole_chunk[0][0], golden["s1_encoder"]) > 0.01
    layouts = ["full", "sliding", "sliding_causal"]
    encoded = [golden["s4_encoder"]] + [
        np.load(TINY / name / f"golden_{layout}.npz")["s4_encoder"] for layout in layouts
    ]
    for i, one in enumerate(encoded):
        for other in encoded[:i]:
            assert relative_error(one, other) > 0.01
    # Every merger matters, and its order.
    ids, mels, rows = golden["s4_ids"], clips_of(golden, 4), golden["s4_rows"]
    mergers = model.deepstack_audio_merger_list
    for changed in (mergers[:-1], mergers[::-1]):
        model.deepstack_audio_merger_list = changed
        assert relative_error(model.logits(ids, mels)[rows], golden["s4_logits"]) > 0.01


def test_text_runs_as_transformers_runs_it():
    model = Reference.load(TINY / "b")
    ids = np.load(TINY / "b" / "golden.npz")["text_ids"]
    hidden = model.language_model(torch.tensor(ids)[None].long()).last_hidden_state[0]
    expected = hidden @ model.language_model.embed_tokens.weight.T  # tied
    assert relative_error(model.logits(ids), to_numpy(expected)) < 1e-6


@pytest.mark.parametrize(("causal", "first", "last"), [(False, -50, 49), (True, -99, 0)])
def test_window_is_the_specified_one(causal, first, last):
    seen = window_mask(230, 100, causal)
    for query in (0, 60, 99, 130, 229):
        keys = range(max(0, query + first), min(229, query + last) + 1)
        assert seen[query].nonzero()[:, 0].tolist() == list(keys)


def test_loss_is_differentiable_in_every_weight():
    model = Reference.load(TINY / "b")
    golden = np.load(TINY / "b" / "golden.npz")
    ids = golden["s5_ids"]
    labels = np.where(ids == golden["audio_token_id"], -100, ids)
    model.loss(ids, labels, clips_of(golden, 5)).backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_single_layers_honour_mask_and_positions():
    """Two segments packed into one row give the same results as alone."""
    config = make_golden.CONFIGS["a"]
    rng = np.random.default_rng(0)
    segments = np.repeat([0, 1], [5, 8])
    same = segments[:, None] == segments[None]

    x = rng.standard_normal((2, 13, 32)).astype(np.float32)
    _, decoder_layer, weights = qwen3_layer(config["language_config"], seed=3)
    positions = np.tile(np.r_[:5, :8], (2, 1))
    packed = decoder_layer(x, positions, np.tril(same))
    for part in (slice(0, 5), slice(5, 13)):
        assert relative_error(packed[:, part], to_numpy(decoder_layer(x[:, part]))) < 1e-5
    assert relative_error(decoder_layer(x, None, np.tril(same)), to_numpy(packed)) < 1e-5
    stretched = decoder_layer(x, 3 * positions, np.tril(same))
    assert relative_error(stretched, to_numpy(packed)) > 1e-3

    y = rng.standard_normal((2, 13, 24)).astype(np.float32)
    _, encoder_layer, encoder_weights = whisper_layer(config["audio_config"], seed=3)
    packed = encoder_layer(y, same)
    for part in (slice(0, 5), slice(5, 13)):
        assert relative_error(packed[:, part], to_numpy(encoder_layer(y[:, part]))) < 1e-5

    # Their weights bear the names that a checkpoint gives them.
    stored = load_file(TINY / "a" / "model.safetensors")
    for prefix, state in (
        ("language_model.layers.0.", weights),
        ("audio_encoder.layers.0.", encoder_weights),
    ):
        names = {key.removeprefix(prefix) for key in stored if key.startswith(prefix)}
        assert names == state.keys()
