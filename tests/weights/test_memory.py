"""What a model takes of memory: temporaries of its programs, what fits, what is refused.

Not covered: the memory of a whole process (docs/results/memory.json has the 4B's).
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import moss_audio_jax as mj
from moss_audio_jax import api, cli, devices
from moss_audio_jax.config import RELEASED, Compute, ModelConfig, ProcessorConfig
from moss_audio_jax.data.batch import Example, Shape, make_batch
from moss_audio_jax.generate import decode_state
from moss_audio_jax.generate.options import Sampling
from moss_audio_jax.generate.vocabulary import vocabulary
from moss_audio_jax.models import blocks, decoder, moss_audio, quantize
from moss_audio_jax.models import cache as kv_cache
from moss_audio_jax.ops import linear
from moss_audio_jax.ops.linear import Bits, dense, matmul, to_bits
from moss_audio_jax.sharding import as_mesh
from moss_audio_jax.tree import flatten
from moss_audio_jax.weights import memory
from moss_audio_jax.weights.convert import convert, load_params

OWN = Path(__file__).parents[1] / "golden" / "tiny" / "a"
SMALL = mj.MossAudio.load(OWN, "float32").config
WIDE = dataclasses.replace(
    SMALL,
    decoder=dataclasses.replace(
        SMALL.decoder, hidden_size=1024, ffn_dim=3072, layers=4, vocab_size=8192
    ),
)
HOW = ["none", "weights"]


# --- kernels as bits -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(96, 40), (97, 24), (1, 8)])  # 97 is prime
def test_a_product_by_blocks_is_the_product(shape):
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
    x = rng.normal(size=(2, 3, shape[0])).astype(np.float32)
    expected = x.astype(np.float64) @ np.asarray(kernel, np.float64)
    found = matmul(jnp.asarray(x), to_bits(kernel))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * abs(expected).max())
    heads = matmul(jnp.asarray(x), to_bits(kernel), shape=(4, shape[1] // 4))
    np.testing.assert_array_equal(heads.reshape(found.shape), found)
    np.testing.assert_array_equal(dense(to_bits(kernel)), kernel)
    half = matmul(jnp.asarray(x, jnp.bfloat16), to_bits(kernel))
    assert half.dtype == "bfloat16"
    np.testing.assert_allclose(np.asarray(half, "f8"), expected, atol=0.03 * expected.std())


def test_a_checkpoint_in_bfloat16_is_held_as_its_bits(tmp_path):
    convert(OWN, tmp_path / "native", "native", progress=False)
    expected = flatten(load_params(OWN, dtype="bfloat16"))
    for folder in (OWN, tmp_path / "native"):
        model = mj.MossAudio.load(folder, "bfloat16")
        layer = model.params["language_model"]["layers"][0]
        assert isinstance(layer["mlp"]["up_proj"]["kernel"], Bits)
        assert isinstance(model.encoder_params["layers"]["fc1"]["kernel"], Bits)
        found = flatten(model.stacked_params())
        assert found.keys() == expected.keys()
        for path, leaf in found.items():
            np.testing.assert_array_equal(leaf, expected[path])


@pytest.mark.parametrize("how", HOW)
def test_logits_are_those_of_whole_kernels(how, monkeypatch):
    model = mj.MossAudio.load(OWN, "bfloat16", quantize=how)
    golden = np.load(OWN / "golden.npz")
    mels = np.split(golden["s1_mel"], np.cumsum(golden["s1_clips"])[:-1], axis=1)
    batch = model._batch([model._example(golden["s1_ids"], mels)])

    def logits(params):
        hidden = moss_audio.hidden_states(params, model.config, model.compute, batch)
        return decoder.logits(params, hidden)

    found = np.asarray(jax.jit(logits)(model.params))
    monkeypatch.setattr(linear, "platform", lambda: "gpu")  # int8 kernels are multiplied whole
    expected = np.asarray(jax.jit(lambda params: logits(params))(model.stacked_params()))
    assert np.abs(found - expected).max() < 0.1 * expected.std()
    assert np.abs(found - expected).mean() < 0.02 * expected.std()


# --- temporaries ---------------------------------------------------------------------------------


def stored(params):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))


def abstract(config: ModelConfig, how: str | None):
    params = moss_audio.abstract_params(config, "bfloat16")
    hold = functools.partial(quantize.held, quantize=how)
    params = params if how is None else jax.eval_shape(hold, params)
    return jax.eval_shape(decoder.unrolled, params)


def temporaries(params, how):
    """Bytes of prefill and of the loop over tokens, compiled from shapes alone."""
    vocab = vocabulary(WIDE, None, ProcessorConfig(audio_token_id=1))
    static = {"config": WIDE, "compute": Compute("bfloat16", quantize=how), "vocab": vocab}
    ids = np.full(40, 2, np.int32)
    ids[4:29] = 1
    example = Example(ids, (np.zeros((WIDE.encoder.mel_bins, 200), np.float32),))
    batch = make_batch([[example]], Shape(1, 64, 1, 400), WIDE.encoder, 1)
    sound = batch.pop("mels"), batch.pop("frames")
    heard = {"config": WIDE.encoder, "compute": static["compute"]}
    encode = functools.partial(decode_state.encode, **heard)
    audio = jax.eval_shape(encode, params["audio_encoder"], *sound)
    answers = decode_state.new_answers([(example, Sampling(8))], [8], 64, vocab)
    state = decode_state.empty_state(**static, count=1, room=64, pages=8)
    number, tables = jnp.int32(1), jnp.arange(8)[None]
    given = batch, tables[None, :, :4], answers, jnp.zeros(1, int), audio
    programs = (
        decode_state.prefill.lower(params, state, *given, **static),
        decode_state.decode_until.lower(params, state, tables, number, number, **static),
        decode_state.encode.lower(params["audio_encoder"], *sound, **heard),
    )
    return [program.compile().memory_analysis().temp_size_in_bytes for program in programs]


@pytest.mark.parametrize("how", HOW)
def test_no_float32_copy_of_the_weights_is_made(how):
    params = abstract(WIDE, how)
    assert max(temporaries(params, how)) < 0.2 * stored(params)


def test_that_would_be_seen():
    params = abstract(WIDE, None)  # plain bfloat16
    assert temporaries(params, "none")[1] > stored(params["language_model"]["layers"])


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
@pytest.mark.parametrize("how", HOW)
def test_accelerators_multiply_whole_kernels(platform, how, monkeypatch):
    for module in (blocks, linear, kv_cache, quantize):
        name = "gpu" if platform == "cuda" else platform
        monkeypatch.setattr(module, "platform", lambda name=name: name)
    params = abstract(SMALL, how)
    compute = Compute("bfloat16")

    def step(params):  # a function of its own: no trace of the other platform
        kv = kv_cache.init_cache(SMALL.decoder, 1, 2, compute)
        here, tables = jnp.array([3]), jnp.arange(2)[None]
        return moss_audio.decode_step(params, SMALL, compute, here[:, None], here, kv, tables)[0]

    text = jax.export.export(jax.jit(step), platforms=[platform])(params).mlir_module()
    assert ("stablehlo.while" in text) == (platform == "cpu")
    assert ("xui16>" in text) == (platform == "cpu" and how == "none")


# --- what fits -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "free", "form"),
    [
        ("4b", 100e9, ("bfloat16", "none")),
        ("4b", 9e9, ("bfloat16", "weights")),
        ("8b", 24e9, ("bfloat16", "none")),
        ("8b", 16e9, ("bfloat16", "weights")),
        ("tiny", 16e9, ("float32", "none")),
    ],
)
def test_the_default_on_a_cpu_is_what_fits(size, free, form, monkeypatch, recwarn, caplog):
    monkeypatch.setattr(devices, "host_memory", lambda: int(free))
    caplog.set_level("INFO", logger="moss_audio_jax")
    config = SMALL if size == "tiny" else RELEASED[size]
    assert memory.choose("here", config, None, None, as_mesh(None)) == form
    said = [str(w.message) for w in recwarn], [r.getMessage() for r in caplog.records]
    warned, logged = (bool(lines) for lines in said)
    assert warned == (form[1] == "weights")
    assert logged == (form == ("bfloat16", "none"))
    for line in (*said[0], *said[1]):
        assert line.startswith("here: bfloat16")
        assert f"{free / 1e9:.1f} GB that are free" in line


def test_what_is_given_stays_or_is_refused_with_what_would_fit(monkeypatch):
    monkeypatch.setattr(devices, "host_memory", lambda: int(9e9))
    choose = functools.partial(memory.choose, "here", RELEASED["4b"], mesh=as_mesh(None))
    assert choose("bfloat16", "weights") == ("bfloat16", "weights")
    for given, words in (
        (("bfloat16", None), r"in bfloat16 take 11\.\d GB .* 9.0 GB are free; .* int8 weights"),
        (("float32", None), r"in float32 take 22\.\d GB .* bfloat16 with int8 weights would take"),
        ((None, "none"), r"in bfloat16 take 11\.\d GB .* close other programs"),
    ):
        with pytest.raises(mj.InputError, match=f"^here: 5.2 billion parameters {words}"):
            choose(*given)
    monkeypatch.setattr(devices, "host_memory", lambda: int(3e9))
    with pytest.raises(mj.InputError, match=r"in bfloat16 with int8 weights take 7.* close"):
        choose(None, None)
    monkeypatch.setattr(devices, "host_memory", lambda: None)  # nobody says
    assert choose("float32", None) == ("float32", "none")


def test_a_model_that_does_not_fit_is_refused_before_it_loads(monkeypatch, capsys):
    monkeypatch.setattr(devices, "host_memory", lambda: 1_000_000)
    monkeypatch.setattr(api, "load_params", lambda *_, **__: pytest.fail("was loaded"))
    assert cli.main(["generate", "--checkpoint", str(OWN), "--prompt", "What?"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {OWN}: 0.0 billion parameters")


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "_CGROUP", tmp_path)
    without = devices.host_memory()
    assert without > 0
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("300\n")
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 50\n")
    assert devices.host_memory() > 10_000
    (tmp_path / "memory.max").write_text("1000\n")
    assert devices.host_memory() == 750
