"""Converting, loading onto devices, saving, composing models; and their errors."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_checkpoint import random_tensors, read_tensors, write_checkpoint

from moss_audio_jax import buckets, sharding
from moss_audio_jax.config import ProcessorConfig, read_json
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.tree import flatten
from moss_audio_jax.weights.convert import convert, load_params, save_official
from moss_audio_jax.weights.folder import check_replaceable, write_side_files
from moss_audio_jax.weights.native import MARKER, save_native, total_bytes
from moss_audio_jax.weights.official import OfficialReader, qwen3_table, table
from moss_audio_jax.weights.opening import folder_format, open_checkpoint
from moss_audio_jax.weights.safetensors import write_all

COPIED = [
    "config.json",
    "processor_config.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "tokenizer.model",
]


def same_tensors(one, other):
    one, other = read_tensors(one), read_tensors(other)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert tensor.tobytes() == other[name].tobytes(), name


def quiet(*args, **how):
    convert(*args, progress=False, **how)


@pytest.fixture
def native(folder, tmp_path):
    quiet(folder, tmp_path / "native", "native")
    return tmp_path / "native"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_there_and_back(tmp_path, config, dtype):
    write_checkpoint(tmp_path / "start", config, dtype)
    quiet(tmp_path / "start", tmp_path / "native", "native")
    quiet(tmp_path / "native", tmp_path / "end", "official")
    same_tensors(tmp_path / "start", tmp_path / "end")
    assert folder_format(tmp_path / "native") == "native"
    assert folder_format(tmp_path / "end") == "official"
    for folder in ("native", "end"):
        for name in COPIED:
            start, end = tmp_path / "start" / name, tmp_path / folder / name
            assert start.read_bytes() == end.read_bytes(), name
        assert not (tmp_path / folder / "README.md").exists()


def test_dtype_changes_weights_and_config(tmp_path, config):
    write_checkpoint(tmp_path / "f32", config, "float32")
    quiet(tmp_path / "f32", tmp_path / "official", "official", dtype="bfloat16")
    quiet(tmp_path / "f32", tmp_path / "native32", "native")
    quiet(tmp_path / "native32", tmp_path / "native16", "native", dtype="bfloat16")
    expected = read_tensors(tmp_path / "f32")
    for name, tensor in read_tensors(tmp_path / "official").items():
        assert tensor.tobytes() == expected[name].astype(ml_dtypes.bfloat16).tobytes()
    for loaded in (
        load_params(tmp_path / "native16"),
        load_params(tmp_path / "f32", dtype="bfloat16"),
        load_params(tmp_path / "native32", dtype="bfloat16"),
    ):
        jax.tree.map(np.testing.assert_array_equal, loaded, load_params(tmp_path / "official"))
    before = read_json(tmp_path / "f32" / "config.json")
    after = read_json(tmp_path / "native16" / "config.json")
    assert after == before | {"dtype": "bfloat16"}


def eight_devices():
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices (XLA_FLAGS=--xla_force_host_platform_device_count=8)")
    return sharding.make_mesh(fsdp=4, tensor=2)


def test_sharded_loads_and_saves(folder, native, tmp_path, config):
    mesh = eight_devices()
    whole = load_params(folder)
    shardings = sharding.param_shardings(whole, config, mesh)
    for source in (folder, native):
        params = load_params(source, shardings=shardings)
        jax.tree.map(np.testing.assert_array_equal, params, whole)
        assert jax.tree.map(lambda leaf: leaf.sharding, params) == shardings
    kernel = params["language_model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (4, 16, 24)  # of [4, 64, 48]

    save_official(tmp_path / "o", params, config, files_from=folder, max_shard_bytes=50_000)
    save_native(tmp_path / "n", params, config, files_from=folder)
    same_tensors(folder, tmp_path / "o")
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path / "n"), whole)
    for saved in ("o", "n"):
        for name in COPIED:
            assert (tmp_path / saved / name).read_bytes() == (folder / name).read_bytes()


def test_a_process_reads_a_slice_once(folder, config, bytes_read):
    """The bytes of a kernel in eight shards are read once. A slice's owner reads only the slice."""
    mesh = eight_devices()
    path = "language_model/layers/mlp/up_proj/kernel"
    layout = {entry.path: NamedSharding(mesh, P()) for entry in table(config)}
    layout[path] = NamedSharding(mesh, P(None, "fsdp", "tensor"))
    with open_checkpoint(folder) as reader:
        reader.load(path, layout[path])
        assert sum(bytes_read) == 4 * 64 * 48 * 2
        bytes_read.clear()
        # Only the first device, as in a process that has no other.
        index = layout[path].devices_indices_map(reader.entries[path].shape)[jax.devices()[0]]
        reader.read(path, index=index)
        assert sum(bytes_read) == 4 * 64 * 48 * 2 // 2  # half of the output columns, all rows


def test_saved_from_memory_without_a_source(tmp_path, folder, config):
    params = load_params(folder, dtype="float32")
    save_native(tmp_path / "n", params, config, processor=ProcessorConfig(audio_token_id=7))
    save_official(tmp_path / "o", params, config, dtype="bfloat16")
    assert read_json(tmp_path / "n" / "processor_config.json")["audio_token_id"] == 7
    assert read_json(tmp_path / "n" / "config.json")["dtype"] == "float32"
    assert read_json(tmp_path / "o" / "config.json")["dtype"] == "bfloat16"
    same_tensors(folder, tmp_path / "o")

    kernel = params["lm_head"].pop("kernel")
    with pytest.raises(InputError, match="lm_head/kernel is missing"):
        save_native(tmp_path / "x", params, config)
    params["lm_head"]["kernel"] = kernel.T
    with pytest.raises(InputError, match=r"lm_head/kernel has shape \[640, 64\]"):
        save_official(tmp_path / "x", params, config)
    assert not (tmp_path / "x").exists()


def test_outputs_that_are_refused(tmp_path, folder):
    quiet(folder, tmp_path / "out", "native")
    with pytest.raises(InputError, match="already exists"):
        quiet(folder, tmp_path / "out", "native")
    for output in (folder, folder / "inside", tmp_path, folder / ".." / "official"):
        with pytest.raises(UsageError, match="different folders"):
            quiet(folder, output, "official", overwrite=True)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not a checkpoint"):
        quiet(folder, precious, "native", overwrite=True)
    assert (precious / "thesis.txt").exists()
    quiet(folder, tmp_path / "out", "official", overwrite=True)
    assert folder_format(tmp_path / "out") == "official"


def test_what_may_be_replaced(tmp_path, folder, native):
    """Checkpoints, also with what people put beside one; and, in a bucket, one that was begun."""
    for made in (folder, native):
        copy = shutil.copytree(made, tmp_path / f"copy-{made.name}")
        (copy / "README.md").write_text("a model")
        check_replaceable(copy)
    begun = tmp_path / "begun"
    begun.mkdir()
    check_replaceable(begun)
    (begun / "model.safetensors").write_text("")
    with pytest.raises(InputError, match="not a checkpoint"):
        check_replaceable(begun)
    (begun / buckets.UNFINISHED).write_text("")
    check_replaceable(begun)
    (begun / "config.json").write_text("{}")
    (begun / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match=r"it holds metrics\.jsonl"):
        check_replaceable(begun)


@contextlib.contextmanager
def files_no_larger_than(limit):
    """A real write error (EFBIG) in the midst of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("layout", ["native", "official"])
@pytest.mark.parametrize("old", [True, False])
def test_a_failed_write_leaves_nothing_or_the_old(tmp_path, folder, layout, old):
    out = tmp_path / "out"
    if old:
        quiet(folder, out, layout)
        before = load_params(out)
    listed = sorted(path.name for path in tmp_path.iterdir())
    with files_no_larger_than(60_000), pytest.raises(InputError) as caught:
        quiet(folder, out, layout, overwrite=True)
    assert "\n" not in str(caught.value)
    assert str(out) in str(caught.value) or ".out.partial" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == listed
    if old:
        jax.tree.map(np.testing.assert_array_equal, load_params(out), before)
    quiet(folder, out, layout, overwrite=True)  # and once there is room, it works


def test_too_small_a_disk_is_seen_first(tmp_path, folder, config, monkeypatch):
    free = total_bytes(table(config), "bfloat16") - 1
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
    with pytest.raises(InputError, match=r"MB free in .* MB needed"):
        quiet(folder, tmp_path / "out", "native")
    assert not list(tmp_path.glob("*out*"))


def test_native_folders_of_an_older_version_load(native):
    """They have no checksums, and a warning says so."""
    marker = read_json(native / MARKER)
    assert len(marker.pop("files")) > len(marker["parameters"])
    (native / MARKER).write_text(json.dumps(marker))
    with pytest.warns(UserWarning, match="without checksums"):
        load_params(native)


def test_a_folder_with_a_checkpoint_for_each_parameter_loads(native, config):
    """The form of version 1."""
    expected = flatten(load_params(native, config))
    for file in (native / "params").iterdir():
        if file.is_file():
            file.unlink()
        else:
            shutil.rmtree(file)
    marker = json.loads((native / MARKER).read_text())
    for path in marker["parameters"]:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as checkpointer:
            checkpointer.save(
                native / "params" / path.replace("/", "."),
                args=ocp.args.PyTreeSave({"value": np.asarray(expected[path])}),
            )
    (native / MARKER).write_text(json.dumps(marker | {"version": 1, "files": {}}))
    found = flatten(load_params(native, config))
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, expected[path])


def test_orbax_restores_a_native_folder_without_this_package(native, config, tmp_path):
    """The lines of docs/use_a_checkpoint.md, where the package cannot be imported."""
    page = (Path(__file__).parents[2] / "docs" / "use_a_checkpoint.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(import orbax.*?)```", page, re.DOTALL)
    assert len(code.strip().splitlines()) <= 5
    code = code.replace("/path/to/native", str(native))
    check = (
        "import sys; sys.modules['moss_audio_jax'] = None\n"
        f"{code}\n"
        "import jax, numpy as np\n"
        f"np.savez({str(tmp_path / 'all.npz')!r}, **{{jax.tree_util.keystr(k, simple=True, "
        "separator='/'): np.asarray(v, np.float32) for k, v in "
        "jax.tree_util.tree_leaves_with_path(params)})"
    )
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "all.npz")
    expected = flatten(load_params(native, config, "float32"))
    assert set(found.files) == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf)


def test_a_disk_that_fills_up_is_one_line(tmp_path, folder, monkeypatch):
    def pwrite(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("moss_audio_jax.weights.safetensors.os.pwrite", pwrite)
    with pytest.raises(InputError, match=r"out: not written: the disk is full .* MB needed"):
        quiet(folder, tmp_path / "out", "official")
    assert not list(tmp_path.glob("*out*"))


def test_one_writer_at_a_time(tmp_path, folder, native, monkeypatch):
    """A second writer is refused in one line, and the first one's result is complete."""
    inside, finish = threading.Event(), threading.Event()
    real = write_side_files

    def slowly(*args, **how):
        inside.set()
        assert finish.wait(60)
        real(*args, **how)

    monkeypatch.setattr("moss_audio_jax.weights.convert.write_side_files", slowly)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(quiet, folder, tmp_path / "out", "native")
        assert inside.wait(60)
        for overwrite in (True, False):
            with pytest.raises(UsageError, match=r"out: in use by a writer .process") as caught:
                quiet(folder, tmp_path / "out", "official", overwrite=overwrite)
            assert "\n" not in str(caught.value)
        finish.set()
        first.result()
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path / "out"), load_params(native))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["native", "official", "out"]

    # Killed between two renames: the old checkpoint is restored, and then replaced.
    (tmp_path / "out").rename(tmp_path / ".out.old")
    (tmp_path / ".out.partial").mkdir()
    with pytest.raises(InputError, match="already exists"):
        quiet(folder, tmp_path / "out", "official")
    assert folder_format(tmp_path / "out") == "native"
    quiet(folder, tmp_path / "out", "official", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["native", "official", "out"]


def test_files_that_are_none_are_not_copied(tmp_path, folder):
    (folder / "merges.txt").unlink()
    os.mkfifo(folder / "merges.txt")
    with pytest.raises(InputError, match=r"merges.txt: is not a regular file"):
        quiet(folder, tmp_path / "out", "native")
    assert not (tmp_path / "out").exists()


def test_native_folders_that_are_broken(native, config):
    leaf = native / "params" / "language_model.layers.mlp.up_proj.kernel"
    chunk = next(path for path in leaf.rglob("*.0.0") if path.is_file())
    data = chunk.read_bytes()
    chunk.write_bytes(data[:10] + bytes([data[10] ^ 64]) + data[11:])
    with pytest.raises(InputError, match=r"up_proj/kernel: .* is damaged \(its checksum differs\)"):
        load_params(native)
    chunk.write_bytes(data[:-10])
    with pytest.raises(InputError, match=r"params: parameter .*up_proj/kernel: ") as caught:
        load_params(native)
    assert "\n" not in str(caught.value)
    chunk.unlink()  # must not be read as zeros
    with pytest.raises(InputError, match=r"params: parameter .*up_proj/kernel: "):
        load_params(native)
    with pytest.raises(InputError, match=r"params: parameter .*up_proj/kernel: "):
        quiet(native, native.with_name("out"), "official")
    shutil.rmtree(leaf)
    with pytest.raises(InputError, match=r"up_proj.kernel: incomplete"):
        load_params(native)
    leaf.mkdir()
    metadata = native / "params" / "_METADATA"  # Orbax's own list of the parameters
    kept = metadata.read_text()
    metadata.write_text(kept.replace("lm_head", "lm_heaD"))
    with pytest.raises(InputError, match=r"params: _METADATA is damaged"):
        load_params(native)
    metadata.unlink()
    with pytest.raises(InputError, match=r"params: _METADATA is missing"):
        load_params(native)
    metadata.write_text(kept)

    marker = read_json(native / MARKER)
    bigger = dataclasses.replace(config, adapter_dim=57)
    with pytest.raises(InputError, match=r"audio_adapter/gate_proj/kernel has shape"):
        load_params(native, bigger)
    for broken in ({"files": 3}, {"files": {"a": 1}}, {"parameters": {"a": {"shape": "b"}}}):
        (native / MARKER).write_text(json.dumps(marker | broken))
        with pytest.raises(InputError, match=r"moss_audio_jax.json: damaged"):
            load_params(native)
    (native / MARKER).write_text(json.dumps(marker | {"version": 99}))
    with pytest.raises(InputError, match="version 99"):
        load_params(native)
    (native / MARKER).unlink()
    with pytest.raises(InputError, match="incomplete"):
        load_params(native)


def write_qwen3(folder, config, tied):
    """A plain Qwen3 checkpoint with random weights; returns its tensors."""
    tensors = {
        name.replace("language_model.", "model."): tensor
        for name, tensor in random_tensors(config, "bfloat16", seed=9).items()
        if name.startswith("language_model.") or (name == "lm_head.weight" and not tied)
    }
    folder.mkdir()
    dec = config.decoder
    raw = {
        "model_type": "qwen3",
        "hidden_size": dec.hidden_size,
        "intermediate_size": dec.ffn_dim,
        "num_hidden_layers": dec.layers,
        "num_attention_heads": dec.heads,
        "num_key_value_heads": dec.kv_heads,
        "head_dim": dec.head_dim,
        "vocab_size": dec.vocab_size,
        "rope_theta": dec.rope_theta,
        "tie_word_embeddings": tied,
    }
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "vocab.json").write_text('{"qwen": 0}')
    write_all(folder, tensors)
    return tensors


@pytest.mark.parametrize("tied", [True, False])
def test_qwen3_checkpoints_are_the_decoder(tmp_path, config, tied):
    theirs = write_qwen3(tmp_path / "qwen", config, tied)
    with OfficialReader(tmp_path / "qwen", qwen3_table(config, tied)) as reader:
        ours = {path: reader.read(path) for path in reader.entries}
    up = np.stack([theirs[f"model.layers.{n}.mlp.up_proj.weight"].T for n in range(4)])
    np.testing.assert_array_equal(ours["language_model/layers/mlp/up_proj/kernel"], up)
    embedding = theirs["model.embed_tokens.weight"]
    np.testing.assert_array_equal(ours["language_model/embed_tokens/embedding"], embedding)
    head = embedding if tied else theirs["lm_head.weight"]
    np.testing.assert_array_equal(ours["lm_head/kernel"], head.T)
    assert all(path.startswith(("language_model/", "lm_head/")) for path in ours)


def test_a_qwen3_decoder_is_grafted(tmp_path, folder, config):
    theirs = write_qwen3(tmp_path / "qwen", config, tied=True)
    for file in folder.glob("model*"):  # a config is enough
        file.unlink()
    quiet(folder, tmp_path / "new", "official", decoder=tmp_path / "qwen")
    found = read_tensors(tmp_path / "new")
    for name, tensor in theirs.items():
        ours = name.replace("model.", "language_model.", 1)
        assert found[ours].tobytes() == tensor.tobytes(), name
    assert found["lm_head.weight"].tobytes() == theirs["model.embed_tokens.weight"].tobytes()
    fresh = found["audio_adapter.gate_proj.weight"].astype(np.float32)
    assert 0 < fresh.std() < 1
    assert (tmp_path / "new" / "vocab.json").read_text() == '{"qwen": 0}'
    for name in ("config.json", "processor_config.json"):
        assert (tmp_path / "new" / name).read_bytes() == (folder / name).read_bytes()

    raw = read_json(tmp_path / "qwen" / "config.json")
    (tmp_path / "qwen" / "config.json").write_text(json.dumps(raw | {"vocab_size": 512}))
    with pytest.raises(InputError, match="vocab_size is 512; the new model has 640"):
        quiet(folder, tmp_path / "other", "native", decoder=tmp_path / "qwen")
    with pytest.raises(InputError, match="hidden_size is 64; the new model has 4096"):
        quiet("8b", tmp_path / "other", "native", decoder=tmp_path / "qwen")


def test_ambiguous_and_missing_folders(folder, native, tmp_path):
    shutil.copy(next(folder.glob("model-00001*")), native / "model.safetensors")
    with pytest.raises(InputError, match="both native and official"):
        folder_format(native)
    with pytest.raises(InputError, match="no such folder"):
        folder_format(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no weights"):
        folder_format(tmp_path / "empty")
