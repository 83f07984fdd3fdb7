"""The safetensors reader and writer, against the safetensors library and against broken files."""

from __future__ import annotations

import json
import os

import ml_dtypes
import numpy as np
import pytest
import safetensors as oracle
import safetensors.numpy

from moss_audio_jax.errors import InputError
from moss_audio_jax.weights.safetensors import INDEX, SINGLE, Reader, Writer

TENSORS = {
    "b.weight": np.arange(24, dtype=np.float32).reshape(4, 3, 2),
    "a.weight": np.linspace(-3, 3, 10).astype(ml_dtypes.bfloat16).reshape(5, 2),
    "half": np.arange(7, dtype=np.float16),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
}
SHAPES = {name: (tensor.shape, tensor.dtype) for name, tensor in TENSORS.items()}


def file_bytes(header: dict | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(start: int, end: int, dtype: str = "F32", shape: tuple = (1,)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def test_library_reads_what_we_write(tmp_path):
    with Writer(tmp_path, SHAPES) as writer:
        for name in reversed(TENSORS):  # any order
            writer.write(name, TENSORS[name])
    found = dict(oracle.deserialize((tmp_path / SINGLE).read_bytes()))
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tuple(found[name]["shape"]) == tensor.shape
        assert bytes(found[name]["data"]) == tensor.tobytes(), name
    with oracle.safe_open(tmp_path / SINGLE, "np") as f:
        assert f.metadata() == {"format": "pt"}


def test_we_read_what_the_library_writes(tmp_path):
    oracle.numpy.save_file(TENSORS, tmp_path / "x.safetensors")
    with Reader(tmp_path / "x.safetensors") as reader:
        for name, tensor in TENSORS.items():
            found = reader.read(name)
            assert found.dtype == tensor.dtype
            assert found.shape == tensor.shape
            assert found.tobytes() == tensor.tobytes(), name


def test_slices_read_only_their_rows(tmp_path, bytes_read):
    big = np.arange(6000, dtype=np.float32).reshape(100, 20, 3)
    with Writer(tmp_path, {"x": (big.shape, big.dtype)}) as writer:
        writer.write("x", big[60:], start=60)
        writer.write("x", big[:60])
    with Reader(tmp_path) as reader:
        assert bytes_read == []  # headers only
        part = reader.read("x", (slice(90, None), slice(3, 5)))
    np.testing.assert_array_equal(part, big[90:, 3:5])
    assert sum(bytes_read) == 10 * 20 * 3 * 4


def test_shards_and_index(tmp_path):
    tensors = {f"t{i}": np.full((10, 10), i, np.float32) for i in range(5)}
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    with Writer(tmp_path, shapes, max_shard_bytes=900) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 2000}
    for name, file in index["weight_map"].items():
        with oracle.safe_open(tmp_path / file, "np") as f:
            np.testing.assert_array_equal(f.get_tensor(name), tensors[name])
    with Reader(tmp_path) as reader:
        assert reader.tensors.keys() == tensors.keys()
        np.testing.assert_array_equal(reader.read("t4"), tensors["t4"])


@pytest.mark.parametrize("fault", ["raised", "short"])
def test_unfinished_files_never_load(tmp_path, fault):
    def write():
        with Writer(tmp_path, SHAPES) as writer:
            for name in list(TENSORS)[:3]:
                writer.write(name, TENSORS[name])
            if fault == "raised":
                raise OSError("disk full")

    with pytest.raises(OSError if fault == "raised" else ValueError):
        write()
    with pytest.raises(InputError, match="unfinished"):
        Reader(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file"),
        (b"\x80\x02}q\x00.........", "not a safetensors file"),
        ((10_000).to_bytes(8, "little") + b"{}", "truncated: the header"),
        (file_bytes(b'{"a": '), "broken header"),
        (file_bytes(b"[1, 2]"), "broken header"),
        (file_bytes(b'{"a": 1, "a": 2}'), "a is repeated"),
        (file_bytes({"a": 7}), "tensor a: broken header entry"),
        (file_bytes({"a": entry(0, 8)}, b"x" * 8), "tensor a: offsets 0..8 do not hold 4 bytes"),
        (file_bytes({"a": entry(4, 0, shape=(-1,))}), "tensor a: broken header entry"),
        (file_bytes({"a": entry(0, 4), "b": entry(4, 8)}, b"x" * 7), "truncated: tensor b ends"),
        (file_bytes({"a": entry(0, 4), "b": entry(2, 6)}, b"x" * 6), "tensor b: its data overlaps"),
        (file_bytes({"a": entry(0, 4), "b": entry(8, 12)}, b"x" * 12), "tensor b: .* a gap"),
        (file_bytes({"a": entry(0, 4)}, b"x" * 6), "2 bytes after the last tensor"),
        (file_bytes({"a": entry(0, 8, "I64")}, b"x" * 8), "tensor a has dtype I64; expected BF16"),
        (
            file_bytes({"a": entry(0, 1, "F8_E4M3")}, b"x"),
            "F8_E4M3; .*quantised weights are not re",
        ),
        (file_bytes({"a": entry(0, 4, ["F32"])}, b"x" * 4), "tensor a: broken header entry"),
        (file_bytes({"a": entry(0, 4, shape=(True,))}, b"x" * 4), "tensor a: broken header entry"),
        (file_bytes({"a": entry(0, 0, shape=(0, 10**30))}), "tensor a: broken header entry"),
        (file_bytes({"a": entry(0, 0, shape=(0,) * 70)}), "tensor a: broken header entry"),
        (
            file_bytes({"a": entry(0, 4) | {"shape": "1"}}, b"x" * 4),
            "tensor a: broken header entry",
        ),
        (file_bytes({"a": entry(0, 4) | {"data_offsets": [0, 1, 4]}}), "tensor a: broken header e"),
        (file_bytes({"a": entry(0, 10**4000)}), "tensor a: broken header entry"),
        (file_bytes(b'{"a": ' + b"[" * 100_000), "broken header.* nests too deeply"),
        (file_bytes(b'{"a": 1' + b"0" * 5000 + b"}"), "broken header: not usable JSON"),
        (file_bytes(b'{"\xff": 1}'), "broken header: not valid UTF-8"),
        (file_bytes({"\n\x1b": 3}), r"tensor \\n\\x1b: broken header entry"),
        ((2**63).to_bytes(8, "little") + b"{}", "not a safetensors file"),
    ],
)
def test_broken_files(tmp_path, content, message):
    file = tmp_path / SINGLE
    file.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        Reader(tmp_path)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_broken_folders(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        Reader(tmp_path / "nothing")
    with pytest.raises(InputError, match="no weights"):
        Reader(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="pickle files are not read"):
        Reader(tmp_path)

    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    data = file_bytes({"a": entry(0, 4)}, b"x" * 4)
    (tmp_path / one).write_bytes(data)

    def index(**weight_map):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    index(a=one, b=two)
    with pytest.raises(InputError, match=f"no such file '{two}', though {INDEX} names it"):
        Reader(tmp_path)
    index(a=one, b=one)
    with pytest.raises(InputError, match=f"{one}: no tensor b"):
        Reader(tmp_path)
    index(a="../elsewhere.safetensors")
    with pytest.raises(InputError, match="not a plain file name"):
        Reader(tmp_path)
    index(a=one, b=two)
    (tmp_path / two).write_bytes(data)
    with pytest.raises(InputError, match=f"tensor a is in both {one} and {two}"):
        Reader(tmp_path)
    (tmp_path / two).write_bytes(file_bytes({"b": entry(0, 4), "c": entry(4, 8)}, b"x" * 8))
    with pytest.raises(InputError, match=f"tensor c of {two} is not listed"):
        Reader(tmp_path)
    index(a=[one])
    with pytest.raises(
        InputError, match=r"shard \['model-00001.*'\] of a is not a plain file name"
    ):
        Reader(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(InputError, match=f"expected {SINGLE} or {INDEX}, without which {one}"):
        Reader(tmp_path)
    (tmp_path / SINGLE).mkdir()
    with pytest.raises(InputError, match=f"{SINGLE}: is a directory"):
        Reader(tmp_path)
    (tmp_path / SINGLE).rmdir()
    os.mkfifo(tmp_path / SINGLE)
    with pytest.raises(InputError, match=f"{SINGLE}: is not a regular file"):
        Reader(tmp_path)


def test_a_file_and_an_index_are_read_as_transformers_does(tmp_path):
    """The single file wins over shards, which an older save may have left; a warning names both."""
    old, new = "model-00001-of-00001.safetensors", "model-00001-of-00002.safetensors"
    for file, value in ((SINGLE, b"new!"), (old, b"old!"), (new, b"more")):
        (tmp_path / file).write_bytes(file_bytes({"a": entry(0, 4)}, value))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": old}}))
    with pytest.warns(UserWarning, match=f"holds both {SINGLE} and {INDEX}"), Reader(tmp_path) as r:
        assert r.read("a").tobytes() == b"new!"
    (tmp_path / SINGLE).unlink()
    with pytest.warns(UserWarning, match=f"{new}: is not in {INDEX}"), Reader(tmp_path) as r:
        assert r.read("a").tobytes() == b"old!"
