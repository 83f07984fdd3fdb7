"""A model with adapters beside its base: the weights of `load(lora=...)`, shared where they agree.

Not covered: memory that several devices share.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from adapters import write_adapters
from tiny_model import tone, write_checkpoint

import moss_audio_jax as mj
from moss_audio_jax import devices
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.generate.decode_state import programs
from moss_audio_jax.models.lora import ENCODER
from moss_audio_jax.tree import path_name

MESH = {"data": 4, "tensor": 2}
DECODER = r"language_model/layers/self_attn/(q|v)_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("base") / "toy")


def arrays(model):
    return {path_name(k): v for k, v in jax.tree_util.tree_leaves_with_path(model.params)}


def buffers(array):
    return {shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards}


@pytest.mark.parametrize(
    ("mesh", "quantize", "dtype"),
    [(None, "none", "float32"), (None, "weights", "bfloat16"), (MESH, "none", "bfloat16")],
)
@pytest.mark.parametrize(("targets", "layers"), [(DECODER, None), (DECODER, [1]), (ENCODER, None)])
def test_what_adapters_leave_alone_is_in_memory_once(
    folder, tmp_path, mesh, quantize, dtype, targets, layers
):
    base = mj.MossAudio.load(folder, dtype, mesh, quantize=quantize)
    lora = write_adapters(tmp_path / "lora", base.config, targets, layers)
    model = base.adapted(lora)
    expected = arrays(mj.MossAudio.load(folder, dtype, mesh, quantize=quantize, lora=lora))
    changed = set()
    for path, array in arrays(model).items():
        theirs = arrays(base)[path]
        np.testing.assert_array_equal(np.asarray(array), np.asarray(expected[path]))
        assert (array.dtype, array.sharding) == (theirs.dtype, theirs.sharding)
        if buffers(array) == buffers(theirs):
            assert array is theirs
        else:
            assert not buffers(array) & buffers(theirs)
            changed.add(path)
    part = "audio_encoder/layers/" if targets == ENCODER else "language_model/layers/"
    part += "[1]/" if layers else ""
    assert changed
    assert all(path.startswith(part) and "self_attn" in path for path in changed)
    assert (model.encoder_params is base.encoder_params) == (targets == DECODER)


@pytest.mark.parametrize("mesh", [None, MESH])
def test_all_answer_as_if_alone_at_once(folder, tmp_path, mesh):
    """Only one of those with the same encoder hears the clip."""
    base = mj.MossAudio.load(folder, "float32", mesh)
    lora = write_adapters(tmp_path / "lora", base.config)
    ears = write_adapters(tmp_path / "ears", base.config, ENCODER)
    models = [base, base.adapted(lora), base.adapted(ears)]
    asked = mj.Request("What?", [tone(4.5)], mj.Sampling(max_new_tokens=8))
    expected = []
    for folders in (None, lora, ears):
        alone = mj.MossAudio.load(folder, "float32", lora=folders)
        expected.append(alone.generate_batch([asked])[0].ids)
    assert len({tuple(ids) for ids in expected}) == 3
    size = {"slots": 4, "cache_tokens": 1024, "max_new_tokens": 64}
    with (
        base.service(**size, compiling=None if mesh else lambda *_: None) as first,
        models[1].service(**size, beside=first) as second,
        models[2].service(**size, beside=first) as third,
        ThreadPoolExecutor(6) as pool,
    ):

        def ask(number):
            prompt = models[number].prepare(asked)
            return (first, second, third)[number].answer(prompt, prompt.sampling).ids

        compiled = programs()
        numbers = [0, 1, 2] * 4
        for number, ids in zip(numbers, pool.map(ask, numbers), strict=True):
            assert ids == expected[number]
        assert mesh or programs() == compiled  # for the base
        assert "programs" not in second.stats()
        assert second.hearing is first.hearing is not third.hearing
        assert "encoded_seconds" not in second.stats()
        heard = [service.stats()["encoded_seconds"] for service in (first, third)]
    assert heard == [4.5, 4.5]


def test_adapters_that_are_refused(folder, tmp_path, monkeypatch):
    base = mj.MossAudio.load(folder, "float32")
    lora = write_adapters(tmp_path / "lora", base.config)
    with pytest.raises(UsageError, match=r"but this model has .*load the checkpoint without"):
        base.adapted(lora).adapted(lora)
    with pytest.raises(InputError, match="not a folder of LoRA adapters"):
        base.adapted(folder)
    monkeypatch.setattr(devices, "host_memory", lambda: 1000)
    with pytest.raises(InputError, match="serve fewer adapters"):
        base.adapted(lora)
