"""A hub's id in place of a folder: downloaded, checked, resumed; or told how to download it.

The server is on loopback; that the real hub speaks as it does is not tested here. huggingface_hub
reads its environment when it is imported, so these tests ask in processes of their own.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hub_server import HubServer
from tiny_model import tiny_config, tone, write_checkpoint, write_wav

import moss_audio_jax as mj
from moss_audio_jax import hub
from moss_audio_jax.errors import InputError
from moss_audio_jax.hub import OFFICIAL
from moss_audio_jax.train.__main__ import load_config
from moss_audio_jax.train.start import read_start
from moss_audio_jax.weights.adapters import save_adapters
from moss_audio_jax.weights.convert import convert
from moss_audio_jax.weights.opening import read_config

ROOT = Path(__file__).parents[1]
ID = "OpenMOSS-Team/MOSS-Audio-4B-Thinking"
ADVICE = f"hf download {ID} --local-dir MOSS-Audio-4B-Thinking"
A, B = "a" * 40, "b" * 40
WEIGHTS = "model.safetensors"

# argv: the id, and whether weights are wanted. The last line of stdout is the folder or the error.
ASK = """
import logging, sys
import huggingface_hub.constants
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 1 << 14  # parts of a file that is small
from moss_audio_jax import errors, hub
hub._WAITS = (0.01, 0.01, 0.01)
logging.basicConfig(format="%(message)s")
logging.getLogger("moss_audio_jax").setLevel("INFO")
try:
    print(hub.folder_of(sys.argv[1], sys.argv[2] == "weights"))
except errors.InputError as error:
    print(f"error: {error}")
"""


class Asked(NamedTuple):
    said: str  # a folder, or "error: ..."
    lines: str  # of stderr

    @property
    def folder(self) -> Path:
        assert not self.said.startswith("error"), self
        return Path(self.said)


def environment(server: HubServer, home: Path, **more: str) -> dict[str, str]:
    kept = {name: text for name, text in os.environ.items() if not name.startswith("HF_")}
    places = {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "PYTHONPATH": str(ROOT)}
    return kept | places | more


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("hub") / "toy")
    for name in ("pytorch_model.bin", "training_args.pt", "README.md", "consolidated.safetensors"):
        (folder / name).write_text("is not fetched")
    return folder


@pytest.fixture
def server(toy):
    with HubServer(toy) as served:
        yield served


@pytest.fixture
def start(server, tmp_path):
    """start(id, ...): a process that asks for a model, in an empty folder."""
    (tmp_path / "here").mkdir()

    def begin(name="org/tiny", weights=True, home="home", **more: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", ASK, name, "weights" if weights else ""],
            env=environment(server, tmp_path / home, **more),
            cwd=tmp_path / "here",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return begin


@pytest.fixture
def ask(start):
    def whole(*args, **kwargs) -> Asked:
        return answer(start(*args, **kwargs))

    return whole


def answer(process: subprocess.Popen) -> Asked:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return Asked(out.splitlines()[-1], err)


def is_copy(folder: Path, toy: Path) -> bool:
    """Whether the folder holds what loading needs, byte for byte, and nothing else."""
    wanted = {"config.json", "processor_config.json", "tokenizer_config.json"}
    wanted |= {"vocab.json", "merges.txt", WEIGHTS}
    return {f.name: f.read_bytes() for f in folder.iterdir()} == {
        name: (toy / name).read_bytes() for name in wanted
    }


# --- downloads -----------------------------------------------------------------------------------


def test_once_from_the_hub_then_from_the_cache(ask, server, toy):
    first = ask()
    assert is_copy(first.folder, toy)
    (line,) = [line for line in first.lines.splitlines() if "downloads" in line]
    assert line.startswith("org/tiny: downloads 6 of 6 files (0.3 MB) of revision " + A)
    assert f"from {server.url} into {first.folder}" in line

    server.requests.clear()
    again = ask("org/tiny@main")
    assert again.folder == first.folder
    assert "downloaded before" in again.lines
    assert server.fetched() == []

    server.requests.clear()
    offline = ask(HF_HUB_OFFLINE="1")
    assert offline.folder == first.folder
    assert f"HF_HUB_OFFLINE is set; the copy of revision {A} is used" in offline.lines
    assert server.requests == []

    server.__exit__()
    alone = ask()
    assert alone.folder == first.folder
    assert f"failed (Connection refused); the copy of revision {A} is used" in alone.lines


def test_a_broken_then_truncated_file_is_resumed(ask, server, toy):
    server.faults[WEIGHTS] = ["broken", "truncated", "truncated"]
    asked = ask()
    assert is_copy(asked.folder, toy)
    ranges = [part for part in server.fetched() if part.startswith(f"{WEIGHTS} bytes=")]
    assert len(ranges) == 2
    assert not ranges[0].endswith("=0-")
    assert ranges[0] != ranges[1]


def test_damaged_bytes_are_fetched_again_and_never_opened(ask, server, toy, tmp_path):
    server.faults[WEIGHTS] = ["corrupted"]
    asked = ask()
    assert is_copy(asked.folder, toy)
    assert f"{WEIGHTS} is damaged (its checksum is " in asked.lines

    server.faults[WEIGHTS] = ["corrupted"] * 9
    refused = ask(home="other")
    assert refused.said.startswith(f"error: org/tiny: {WEIGHTS} is damaged (its checksum is ")
    assert not list((tmp_path / "other").rglob(WEIGHTS))


def test_a_file_that_changes_in_the_cache_is_noticed(ask, server, toy):
    file = ask().folder / WEIGHTS
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.resolve().write_bytes(content)
    offline = ask(HF_HUB_OFFLINE="1")
    assert offline.said.startswith(f"error: {file}: is damaged (its checksum is ")
    assert "HF_HUB_OFFLINE is set; remove it" in offline.said
    assert is_copy(ask().folder, toy)


def test_small_files_first_and_weights_later(ask, server, toy):
    first = ask(weights=False)
    assert not (first.folder / WEIGHTS).exists()
    assert (first.folder / "vocab.json").exists()
    short = ask(HF_HUB_OFFLINE="1")
    assert "1 of 6 files are not in" in short.said
    assert WEIGHTS in short.said
    server.requests.clear()
    assert is_copy(ask().folder, toy)
    assert server.fetched() == [WEIGHTS]


def test_a_copy_of_the_library_alone_works_offline(ask, server, toy, tmp_path):
    """As `hf download` leaves one: without our notes of what was checked."""
    code = "from huggingface_hub import hf_hub_download as get, constants\nimport sys\n"
    code += "for file in sys.argv[1:]: get('org/tiny', file)"
    files = ["config.json", "vocab.json", "merges.txt", WEIGHTS]
    env = environment(server, tmp_path / "home")
    subprocess.run([sys.executable, "-c", code, *files], env=env, check=True, capture_output=True)
    asked = ask(HF_HUB_OFFLINE="1")
    assert sorted(f.name for f in asked.folder.iterdir()) == sorted(files)
    assert "4 files checked" in asked.lines
    blob = (asked.folder / "config.json").resolve()
    blob.write_bytes(blob.read_bytes() + b" ")
    assert "config.json: is damaged" in ask(HF_HUB_OFFLINE="1").said


def test_revisions(ask, server, toy):
    """A branch follows the hub; a commit that is there needs no server."""
    old = ask()
    server.commits[B] = server.commits[A] | {"vocab.json": b'{"b": 1}'}
    server.commit = B
    new = ask()
    assert (old.folder.name, new.folder.name) == (A, B)
    assert (new.folder / "vocab.json").read_bytes() == b'{"b": 1}'
    assert is_copy(old.folder, toy)
    assert ask(HF_HUB_OFFLINE="1").folder == new.folder

    server.requests.clear()
    pinned = ask(f"org/tiny@{A}")
    assert pinned.folder == old.folder
    assert server.requests == []
    assert "is used" not in pinned.lines


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("org/other", "no such folder here, and no such model at http"),
        ("a--b/c", "no such folder here, and no such model at http"),
        ("org/tiny@v7", "the model has no such revision; see http"),
    ],
)
def test_what_the_hub_does_not_have(name, why, ask, server):
    said = ask(name).said
    assert said.startswith(f"error: {name}: {why}")
    assert server.fetched() == []


def test_a_gate_opens_for_the_token_which_is_never_shown(ask, server, toy):
    server.gated, server.token = True, "unusual-secret"
    refused = ask(HF_TOKEN="another-secret")
    assert "its owners decide who gets it; ask for it at http" in refused.said
    assert "set HF_TOKEN" in refused.said
    server.faults["api"] = ["forbidden"]
    server.gated = False
    forbidden = ask(HF_TOKEN="another-secret")
    assert "refuses (" in forbidden.said
    assert "check HF_TOKEN" in forbidden.said
    server.gated = True
    allowed = ask(HF_TOKEN="unusual-secret")
    assert is_copy(allowed.folder, toy)
    for asked in (refused, forbidden, allowed):
        assert "-secret" not in asked.said + asked.lines
    sent = {str({name.lower(): text for name, text in h.items()}) for *_, h in server.requests}
    assert any("another-secret" in headers for headers in sent)


def test_no_answer_and_no_copy(ask, server, tmp_path):
    server.faults["api"] = ["broken"] * 9
    said = ask().said
    assert f"no copy of such a model in {tmp_path / 'home' / 'hub'}" in said
    assert "answers with HTTP 500; run this once with a connection" in said
    server.__exit__()
    assert "failed (Connection refused); run this once" in ask().said
    assert "HF_HUB_OFFLINE is set; run this once" in ask(HF_HUB_OFFLINE="1").said


def test_a_disk_without_room_is_noticed_before_the_download(ask, server):
    server.sizes[WEIGHTS] = 10**15
    said = ask().said
    assert "not written: the disk is full" in said
    assert "1,000,000,000.0 MB needed" in said
    assert server.fetched() == []


def test_a_model_without_safetensors(ask, server):
    del server.commits[A][WEIGHTS]
    assert f"revision {A} has no safetensors weights" in ask().said
    assert (ask(weights=False).folder / "vocab.json").exists()


# --- paths and processes -------------------------------------------------------------------------


def test_a_folder_of_the_same_name_wins(ask, server, tmp_path):
    (tmp_path / "here" / "org" / "tiny").mkdir(parents=True)
    asked = ask()
    assert (asked.said, asked.lines) == ("org/tiny", "")
    assert server.requests == []
    ask("org/tiny@main")
    both = ask()
    assert both.said == "org/tiny"
    assert "there is a folder of this name here; it is used" in both.lines
    for path in ("/org/tiny", "../org/tiny", "a/b/c", "tiny"):
        assert ask(path).said == path


def test_two_processes_download_once_and_a_killed_one_is_resumed(start, server, toy, tmp_path):
    server.faults[WEIGHTS] = ["stalled"]
    killed = start()
    wait_for(killed, server, tmp_path)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    cut = answer(start(f"org/tiny@{A}", HF_HUB_OFFLINE="1"))
    assert re.search(r"[1-6] of 6 files are not in .*and HF_HUB_OFFLINE is set; run this", cut.said)
    # Newer versions of huggingface_hub use a name of each process's own, and begin again.
    left = next((tmp_path / "home").rglob("*.incomplete"))
    resumes = re.fullmatch("[0-9a-f]+", left.stem)
    server.faults[WEIGHTS] = ["stalled"]
    server.requests.clear()
    first = start()
    wait_for(first, server, tmp_path)
    second = start()
    while "another process downloads" not in (line := second.stderr.readline()):
        assert line, "the second process did not wait"
    server.resume.set()
    assert is_copy(answer(first).folder, toy)
    assert is_copy(answer(second).folder, toy)
    (sent,) = [part for part in server.fetched() if part.startswith(WEIGHTS)]
    assert sent.startswith(f"{WEIGHTS} bytes=" if resumes else WEIGHTS)


def test_ctrl_c_ends_a_download_at_once(server, tmp_path):
    server.faults[WEIGHTS] = ["stalled"]
    write_wav(tmp_path / "a.wav", tone(1.0))
    words = ["generate", "--checkpoint", "org/tiny", "--audio", "a.wav", "--prompt", "hi"]
    process = subprocess.Popen(
        [sys.executable, "-m", "moss_audio_jax.cli", *words],
        env=environment(server, tmp_path / "home"),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(process, server)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in err
    assert not list((tmp_path / "home").rglob(WEIGHTS))


def wait_for(process: subprocess.Popen, server: HubServer, home: Path | None = None) -> None:
    """Until half of the weights was sent, and with `home` some of it is on the disk."""
    while not (
        any(part.startswith(WEIGHTS) for part in server.fetched())
        and (home is None or any(file.stat().st_size for file in home.rglob("*.incomplete")))
    ):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def test_processes_of_a_run_need_a_commit(start, server, tmp_path):
    code = "from moss_audio_jax import command\ncommand.join_processes()\n" + ASK
    launcher = [sys.executable, str(ROOT / "launch" / "local_processes.py"), "2", "--"]
    env = environment(server, tmp_path / "home")
    words = {"org/tiny": rf"name one, such as that found now: org/tiny@{A}$"}
    words[f"org/tiny@{A}"] = rf"^(\S+ )?/\S+/snapshots/{A}$"  # the second process has a prefix
    for name, said in words.items():
        done = subprocess.run(
            [*launcher, sys.executable, "-c", code, name, "weights"],
            env=env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert len(re.findall(said, done.stdout + done.stderr, re.MULTILINE)) == 2, done


# --- everything that opens a checkpoint ----------------------------------------------------------

DOORS = """
import argparse
from pathlib import Path
import moss_audio_jax as mj
from moss_audio_jax.annotate.annotator import checkpoint_folder
from moss_audio_jax.annotate import defaults
from moss_audio_jax.evaluate.infer import settings_of
from moss_audio_jax.train.__main__ import load_config
from moss_audio_jax.train.start import initial_params, read_start
from moss_audio_jax.weights.convert import convert
from moss_audio_jax.weights.helpers import load_helpers
from moss_audio_jax.weights.opening import read_config

name = "org/tiny"
assert mj.load_tokenizer(name).vocab_size > 255
assert read_config(name).decoder.vocab_size == 384
convert(name, "native", "native", progress=False)
config = load_config("tiny")
config.init_from, config.tokenizer = name, ""
assert initial_params(read_start(config), None, 0)
assert load_helpers(name) == ({}, ())
annotate = defaults.get_config()
annotate.checkpoint = name
assert checkpoint_folder(annotate).name == "a" * 40
model = mj.MossAudio.load(name)
assert model.folder.name == "a" * 40
args = argparse.Namespace(checkpoint=Path(name), lora=None)
assert settings_of(model, args, mj.Sampling()).model == "org/tiny@" + "a" * 40
"""


def test_every_door_takes_an_id(server, tmp_path, toy):
    env = environment(server, tmp_path / "home")
    done = subprocess.run(
        [sys.executable, "-c", DOORS], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    native = mj.MossAudio.load(tmp_path / "native")
    ids = [1, 2, 3]
    np.testing.assert_array_equal(native.logits(ids), mj.MossAudio.load(toy).logits(ids))


def test_adapters_take_an_id(tmp_path, toy):
    config = tiny_config()
    query = "language_model/layers/self_attn/q_proj/lora_"
    width = config.decoder.heads * config.decoder.head_dim
    shapes = {"a": (config.decoder.layers, config.decoder.hidden_size, 2)}
    shapes["b"] = (config.decoder.layers, 2, width)
    random = np.random.default_rng(0)
    adapters = {query + side: random.normal(size=shape) for side, shape in shapes.items()}
    adapters = {path: leaf.astype(np.float32) for path, leaf in adapters.items()}
    save_adapters(tmp_path / "lora", adapters, 4.0, config)
    code = "import sys, numpy, moss_audio_jax as mj\n"
    code += "model = mj.MossAudio.load(sys.argv[1], lora='org/lora')\n"
    code += "numpy.save('logits', model.logits([1, 2, 3]))"
    with HubServer(tmp_path / "lora", "org/lora") as server:
        env = environment(server, tmp_path / "home")
        command = [sys.executable, "-c", code, str(toy)]
        subprocess.run(command, env=env, cwd=tmp_path, check=True, capture_output=True)
    local = mj.MossAudio.load(toy, lora=tmp_path / "lora").logits([1, 2, 3])
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), local)
    assert np.any(local != mj.MossAudio.load(toy).logits([1, 2, 3]))


def test_generate_with_an_id_on_a_bad_line_then_offline(server, tmp_path, toy):
    """The answer is the local folder's."""
    server.faults[WEIGHTS] = ["broken", "truncated"]
    sound = write_wav(tmp_path / "a.wav", tone(1.0))
    words = [sys.executable, "-m", "moss_audio_jax.generate", "--audio", "a.wav", "--prompt", "hi"]
    words += ["--max-new-tokens", "6", "--no-loop-guard", "--checkpoint", "org/tiny@main"]

    def run() -> tuple[str, str]:
        env = environment(server, tmp_path / "home")
        done = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    out, err = run()
    assert "org/tiny@main: downloads 6 of 6 files" in err
    server.__exit__()
    offline, err = run()
    assert "the copy of revision" in err
    model = mj.MossAudio.load(toy)
    local = model.generate("hi", audio=[str(sound)], max_new_tokens=6, loop_guard=False)
    assert out == offline == f"{local.text}\n(random weights: this answer is noise)\n"


# --- without huggingface_hub ---------------------------------------------------------------------


def start_run(init_from: str, tokenizer: str = "") -> None:
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
        lambda name: start_run(name),
        lambda name: start_run(f"decoder={name}"),
        lambda name: start_run("", name),
    ],
)
def test_an_id_in_place_of_a_folder_is_told_how_to_download_it(opened, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError) as error:
        opened(ID)
    assert str(error.value).startswith(f"{ID}: no such f")
    assert ADVICE in str(error.value)
    assert "pip install" in str(error.value)
    assert "\n" not in str(error.value)


def test_advice_is_for_ids_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"the official model is {ID} on the Hugging Face hub"):
        read_config("moss-audio-4b-thinking")  # without its owner, in any case
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for name in ("nowhere", "/no/where", "../no/where", "a/b/c", str(tmp_path / "no")):
        with pytest.raises(InputError, match=r"no such file or folder$"):
            read_config(name)
    with pytest.raises(InputError, match=ADVICE):
        read_config("moss-audio-4b-thinking")
    with pytest.raises(InputError, match="hf download Qwen/Qwen3-4B --local-dir Qwen3-4B"):
        read_config("Qwen/Qwen3-4B")
    assert len(set(OFFICIAL)) == 4


def test_titles(tmp_path):
    assert hub.title("org/tiny@refs/pr/1") == hub.title(Path("org/tiny")) == "org/tiny"
    assert hub.title(tmp_path / "a@b") == "a@b"
