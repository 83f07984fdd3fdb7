"""`tools/small/align.py`: an adapter that was spoiled learns again what the decoder was given."""

import re

import numpy as np
import pytest
from tiny_checkpoint import CONFIG, write_checkpoint

from moss_audio_jax.audio import load_audio, log_mel
from moss_audio_jax.config import DEFAULT_CHECKPOINT
from moss_audio_jax.data import shards
from moss_audio_jax.data.records import encode_record
from moss_audio_jax.errors import InputError
from moss_audio_jax.tree import flatten, unflatten
from moss_audio_jax.weights.convert import load_params, save_official
from moss_audio_jax.weights.opening import read_config
from tools.small import align

DEMO = DEFAULT_CHECKPOINT.parent / "demo"


@pytest.fixture
def workdir(tmp_path):
    row = {
        "conversation": [
            {"role": "user", "message_type": "audio", "content": "clip.wav"},
            {"role": "assistant", "message_type": "text", "content": "A clip."},
        ]
    }
    clips = [log_mel(load_audio(path)) for path in sorted(DEMO.glob("*.flac"))]
    (tmp_path / "joined").mkdir()
    shards.write_shard(
        shards.shard_path(str(tmp_path / "joined"), "all", 0, 1),
        (encode_record(row, [clip]) for clip in clips),
    )
    return tmp_path


def test_the_decoder_is_given_the_same_again(workdir, capsys, monkeypatch):
    monkeypatch.setattr(align, "STRIPS", 4)
    leaves = {
        path: np.array(leaf) for path, leaf in flatten(load_params(DEFAULT_CHECKPOINT)).items()
    }
    draw = np.random.default_rng(0)
    spoiled = {path for path in leaves if path.startswith(align.TRAINED) and "kernel" in path}
    for path in spoiled:
        noise = draw.normal(size=leaves[path].shape) * leaves[path].astype(np.float32).std()
        leaves[path] = (leaves[path] + 0.5 * noise).astype(leaves[path].dtype)
    config = read_config(DEFAULT_CHECKPOINT)
    save_official(workdir / "new", unflatten(leaves), config, files_from=DEFAULT_CHECKPOINT)

    paths = [str(path) for path in (workdir / "joined").iterdir()]
    align.align(DEFAULT_CHECKPOINT, workdir / "new", workdir / "out", paths, 100, 2e-3)

    losses = re.findall(r"adapter (\S+)  mergers (\S+)", capsys.readouterr().out)
    first, last = np.array(losses, float)
    assert (last < 0.6 * first).all()
    after = flatten(load_params(workdir / "out"))
    for path, leaf in leaves.items():
        same = np.array_equal(np.asarray(after[path]), leaf)
        assert same != path.startswith(align.TRAINED), path


def test_models_of_other_sizes(workdir):
    write_checkpoint(workdir / "tiny", CONFIG)
    with pytest.raises(InputError, match="expected models of the same sizes"):
        align.align(DEFAULT_CHECKPOINT, workdir / "tiny", workdir / "out", ["unread"], 1, 1e-3)
    assert not (workdir / "out").exists()
