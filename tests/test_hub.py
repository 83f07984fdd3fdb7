"""A hub's id instead of a folder: everything that opens a checkpoint says how to download it."""

import pytest

import moss_audio_jax as mj
from moss_audio_jax.config import OFFICIAL
from moss_audio_jax.errors import InputError
from moss_audio_jax.train.__main__ import load_config
from moss_audio_jax.train.start import read_start
from moss_audio_jax.weights.convert import convert
from moss_audio_jax.weights.opening import read_config

ID = "OpenMOSS-Team/MOSS-Audio-4B-Thinking"
ADVICE = f"hf download {ID} --local-dir MOSS-Audio-4B-Thinking"


def start(init_from: str, tokenizer: str = "") -> None:
    config = load_config("tiny")
    config.init_from, config.tokenizer = init_from, tokenizer
    read_start(config)


@pytest.mark.parametrize(
    "opened",
    [
        lambda name: read_config(name),
        lambda name: mj.MossAudio.load(name),
        lambda name: mj.load_tokenizer(name),
        lambda name: convert(name, "out", "native"),
        lambda name: convert("4b", "out", "native", decoder=name),
        lambda name: start(name),
        lambda name: start(f"decoder={name}"),
        lambda name: start("", name),
    ],
)
def test_an_id_in_place_of_a_folder_is_told_how_to_download_it(opened, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        opened(ID)
    assert str(error.value).startswith(f"{ID}: no such f")
    assert ADVICE in str(error.value)
    assert "\n" not in str(error.value)


def test_advice_is_for_ids_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("nowhere", "/no/where", "../no/where", "a/b/c", str(tmp_path / "no")):
        with pytest.raises(InputError, match=r"no such file or folder$"):
            read_config(name)
    with pytest.raises(InputError, match=ADVICE):  # without its owner, in any case
        read_config("moss-audio-4b-thinking")
    with pytest.raises(InputError, match="hf download Qwen/Qwen3-4B --local-dir Qwen3-4B"):
        read_config("Qwen/Qwen3-4B")
    assert len(set(OFFICIAL)) == 4
