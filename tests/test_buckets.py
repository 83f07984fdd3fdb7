"""Reading from buckets and writing to them: real servers, and a proxy that breaks answers.

Not covered: the real services, their credentials and their speed.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import loopback
import numpy as np
import pytest
from tiny_checkpoint import CONFIG, read_tensors, write_checkpoint

import moss_audio_jax as mj
from moss_audio_jax import bucket_clients, files, lease
from moss_audio_jax import buckets as door
from moss_audio_jax.config import DEFAULT_CHECKPOINT
from moss_audio_jax.data.sources import Source, as_file, clip_file
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.text import load_tokenizer
from moss_audio_jax.tree import flatten
from moss_audio_jax.weights import safetensors
from moss_audio_jax.weights.convert import convert, load_params

SOUND = Path(mj.__file__).parent / "assets" / "bell_knocks_chirp.flac"


def test_objects_are_read_whole_and_by_ranges_through_faults(proxy, root):
    data = np.random.default_rng(0).bytes(300_000)
    path = door.as_path(root) / "x.bin"
    path.write_bytes(data)
    proxy.share, done = 0.2, sum(proxy.done.values())
    for start in range(0, 40_000, 1000):
        assert door.read(path, start, start + 50_000) == data[start : start + 50_000]
    memory = bytearray(250_000)
    door.read_into(path, memoryview(memory), 7)
    assert memory == data[7:250_007]
    with files.open_regular(path) as file:
        assert file.seek(-10, 2) == len(data) - 10
        assert file.read() == data[-10:]
        file.seek(3)
        assert file.read(5) == data[3:8]
    assert sum(proxy.done.values()) > done, "no fault came"


@pytest.mark.parametrize("kind", ["official", "native"])
def test_a_checkpoint_loads_as_from_a_folder(proxy, root, tmp_path, kind):
    write_checkpoint(tmp_path / "official", CONFIG, max_shard_bytes=100_000)
    if kind == "native":
        convert(tmp_path / "official", tmp_path / "native", "native", progress=False)
    loopback.fill(tmp_path / kind, f"{root}/{kind}")
    proxy.share = 0.02
    found = flatten(load_params(f"{root}/{kind}"))
    expected = flatten(load_params(tmp_path / kind))
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        assert found[path].dtype == leaf.dtype
        np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(leaf), err_msg=path)


def test_of_a_tensor_only_the_rows_asked_for_are_read(proxy, root, tmp_path):
    tensor = np.arange(4000 * 100, dtype=np.float32).reshape(4000, 100)
    safetensors.write_all(tmp_path, {"a": tensor})
    loopback.fill(tmp_path, root)
    with safetensors.Reader(root) as reader:
        proxy.requests.clear()
        rows = reader.read("a", (slice(1000, 1010), slice(5, 7)))
    np.testing.assert_array_equal(rows, tensor[1000:1010, 5:7])
    start = reader.tensors["a"].offset + 1000 * 400
    ranges = [span for _, _, span in proxy.requests if span]
    assert ranges == [f"bytes={start}-{start + 4000 - 1}"]


def test_the_small_model_answers_from_a_bucket(proxy, root):
    loopback.fill(DEFAULT_CHECKPOINT, root)
    (door.as_path(root) / "a.flac").write_bytes(SOUND.read_bytes())
    model = mj.MossAudio.load(root)
    here = mj.MossAudio.load()
    ask = {"audio": [f"{root}/a.flac"], "max_new_tokens": 6}
    assert (
        model.generate("What is heard?", **ask).ids
        == here.generate("What is heard?", audio=[str(SOUND)], max_new_tokens=6).ids
    )
    assert load_tokenizer(root).files[0].name == load_tokenizer(DEFAULT_CHECKPOINT).files[0].name


def test_rows_and_clips_stream_from_a_bucket(proxy, root, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    message = {"role": "user", "message_type": "audio", "content": "clips/a.flac"}
    rows = [{"conversation": [message], "id": str(i)} for i in range(20)]
    (tmp_path / "rows").mkdir()
    lines = tmp_path / "rows" / "rows.jsonl"
    lines.write_text("\n".join(map(json.dumps, rows)))
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(
        str(tmp_path / "rows" / "rows.array_record"), "group_size:1"
    )
    for row in rows:
        writer.write(json.dumps(row).encode())
    writer.close()
    (tmp_path / "rows" / "clips").mkdir()
    (tmp_path / "rows" / "clips" / "a.flac").write_bytes(SOUND.read_bytes())
    loopback.fill(tmp_path / "rows", root)
    proxy.share = 0.05
    found = Source(f"{root}/*.jsonl")
    assert [found[i].id for i in range(20)] == [str(i) for i in range(20)]
    assert found.digests == Source(str(lines)).digests
    shard = Source(f"{root}/rows.array_record")
    assert [shard[i].id for i in (3, 19, 0)] == ["3", "19", "0"]
    clip = clip_file("clips/a.flac", found.paths[0])
    np.testing.assert_array_equal(mj.load_audio(as_file(clip)), mj.load_audio(SOUND))


def test_a_copy_is_made_once_and_again_when_the_object_changes(proxy, root, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = door.as_path(root) / "x.jsonl"
    path.write_bytes(b"one")
    first = door.local_copy(path)
    proxy.requests.clear()
    assert door.local_copy(path) == first
    assert not any(span or "alt=media" in name for _, name, span in proxy.requests)
    path.write_bytes(b"two")
    assert Path(door.local_copy(path)).read_bytes() == b"two"
    assert Path(first).read_bytes() == b"one"


def test_what_is_missing_is_named(proxy, root):
    with pytest.raises(InputError, match=f"{root}/x.json: no such file"):
        files.read_json(f"{root}/x.json")
    with pytest.raises(InputError, match=f"{root}: no such file or folder"):
        mj.MossAudio.load(root)
    with pytest.raises(InputError, match=r"x\.wav: no such file"):
        mj.load_audio(f"{root}/x.wav")
    (door.as_path(root) / "y").write_bytes(b"0123")
    with pytest.raises(InputError, match="y: ends before byte 9"):
        door.read(f"{root}/y", 2, 9)


def test_other_addresses_are_refused():
    with pytest.raises(InputError, match="ftp://x/y: nothing here reads such addresses"):
        mj.MossAudio.load("ftp://x/y")


def test_missing_credentials_are_said():
    from botocore.exceptions import NoCredentialsError

    assert "AWS_ACCESS_KEY_ID" in bucket_clients.told(NoCredentialsError())
    anonymous = OSError("Anonymous caller does not have storage.objects.get access")
    assert "GOOGLE_APPLICATION_CREDENTIALS" in bucket_clients.told(anonymous)
    assert "credentials" not in bucket_clients.told(ConnectionResetError("reset by peer"))


# --- writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["official", "native"])
def test_a_checkpoint_is_converted_into_a_bucket_and_back(proxy, root, tmp_path, to):
    write_checkpoint(tmp_path / "official", CONFIG, max_shard_bytes=100_000)
    convert(tmp_path / "official", tmp_path / "here", to, progress=False)
    proxy.share = 0.02
    convert(tmp_path / "official", f"{root}/there", to, progress=False)
    proxy.share = 0.0
    there = loopback.objects(f"{root}/there")
    here = {str(f.relative_to(tmp_path / "here")): f for f in (tmp_path / "here").rglob("*")}
    assert there.keys() == {name for name, file in here.items() if file.is_file()}
    for name, data in there.items():
        if name.endswith(".safetensors") or name == "config.json" or "/c/" in name:
            assert data == here[name].read_bytes(), name
    assert not [name for name in loopback.objects(root) if not name.startswith("there/")]
    convert(f"{root}/there", tmp_path / "back", "official", progress=False)
    once, again = read_tensors(tmp_path / "official"), read_tensors(tmp_path / "back")
    assert once.keys() == again.keys()
    assert all(once[name].tobytes() == again[name].tobytes() for name in once)


def test_a_copy_that_was_cut_short_is_no_checkpoint_and_is_replaced(
    proxy, root, tmp_path, monkeypatch
):
    write_checkpoint(tmp_path / "official", CONFIG, max_shard_bytes=100_000)
    real, count = door.put, 0

    def put(source, target):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(door, "put", put)
        with pytest.raises(KeyboardInterrupt):
            convert(tmp_path / "official", f"{root}/there", "official", progress=False)
    assert loopback.objects(f"{root}/there"), "the copy had not begun"
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        load_params(f"{root}/there")
    convert(tmp_path / "official", f"{root}/there", "official", progress=False)
    assert flatten(load_params(f"{root}/there")).keys()
    with pytest.raises(InputError, match="already exists"):
        convert(tmp_path / "official", f"{root}/there", "official", progress=False)


def test_files_are_written_whole_and_appended_to(proxy, root):
    proxy.share = 0.05
    files.write_whole(f"{root}/a.json", "one")
    files.append(f"{root}/a.json", " two")
    with files.writing(f"{root}/b.bin", "wb") as file:
        file.write(b"x" * 9_000_000)
    with contextlib.suppress(ZeroDivisionError), files.writing(f"{root}/a.json") as file:
        file.write("half")
        raise ZeroDivisionError
    proxy.share = 0.0
    assert loopback.objects(root) == {"a.json": b"one two", "b.bin": b"x" * 9_000_000}


def test_one_process_owns_a_folder(proxy, root, monkeypatch):
    monkeypatch.setattr(lease, "_BEAT", 0.1)
    monkeypatch.setattr(lease, "_DEAD", 2.0)
    with files.Lock(root, "train") as lock:
        with pytest.raises(UsageError, match=f"{root}: in use by train .process"):
            files.Lock(root, "train").__enter__()
        lock.check()
        monkeypatch.setattr(lease, "_BEAT", 60.0)
    assert not loopback.objects(root)


def test_a_lock_whose_owner_died_is_taken_over(proxy, root, monkeypatch):
    monkeypatch.setattr(lease, "_DEAD", 0.5)
    elsewhere = {"owner": "train (process 1 on far)", "token": "t", "machine": "far", "process": 1}
    files.write_whole(f"{root}/.lock", json.dumps(elsewhere))
    with files.Lock(root, "train"):  # nobody renews it
        assert json.loads(files.read_bytes(f"{root}/.lock"))["token"] != "t"
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], stdout=-1)
    died = {**elsewhere, "machine": lease._machine(), "process": int(child.stdout)}
    files.write_whole(f"{root}/.lock", json.dumps(died))
    monkeypatch.setattr(lease, "_DEAD", 1e9)
    with files.Lock(root, "train"):  # its process is gone: nothing to wait for
        pass


def test_a_lock_that_another_took_is_noticed(proxy, root, monkeypatch):
    monkeypatch.setattr(lease, "_BEAT", 0.05)
    with files.Lock(root, "train") as lock:
        files.write_whole(f"{root}/.lock", json.dumps({"owner": "train (2)", "token": "t"}))
        until = time.monotonic() + 20
        while not lock._lease._lost and time.monotonic() < until:
            time.sleep(0.05)
        with pytest.raises(InputError, match=r"lost to train \(2\)"):
            lock.check()
    assert json.loads(files.read_bytes(f"{root}/.lock"))["token"] == "t"


def test_without_credentials_a_verb_says_so_in_one_line(buckets, tmp_path):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_ACCESS", "AWS_SECRET"))}
    env |= {"HOME": str(tmp_path), "AWS_EC2_METADATA_DISABLED": "true"}
    env["PYTHONPATH"] = str(Path(mj.__file__).parents[1])
    words = ["--input", f"s3://{loopback.BUCKET}/none", "--output", "out", "--format", "native"]
    run = subprocess.run(
        [sys.executable, "-m", "moss_audio_jax.convert", *words],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "AWS_ACCESS_KEY_ID" in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stderr
