"""Whole runs that learn from rewards, in this process."""

import json
import os
import signal
import string

import numpy as np
import pytest
from ml_collections import ConfigDict
from reward_runs import ROWS, audio, plug_in, text, tiny_run, write_corpus
from runs import log

from moss_audio_jax import files
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.post_train.rollout import Sampler
from moss_audio_jax.sharding import make_mesh
from moss_audio_jax.train.loop import train
from moss_audio_jax.train.setup import Setup, build
from moss_audio_jax.train.start import read_start
from moss_audio_jax.tree import flatten
from moss_audio_jax.weights.convert import load_params

pytestmark = pytest.mark.usefixtures("paid_for_letters")


def weights(folder):
    return flatten(load_params(folder, dtype="float32"))


def same(one, other):
    one, other = weights(one), weights(other)
    return all((one[path] == other[path]).all() for path in one)


def rows_file(folder, corpus, rows):
    """A config of a run on other rows beside the corpus's clips."""
    file = corpus / f"{folder.name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny_run(corpus)
    config.data.train = (str(file),)
    return config


def test_a_bandit_learns_what_each_question_wants(tmp_path, monkeypatch):
    """The first letter decides. Of two questions one pays for letters, the other for the rest of
    ASCII that can be seen; a policy that does not read the question gets half at best."""

    def wanted(said, row):
        first = said.text[0]
        seen = first in string.printable.strip()
        right = seen and (first in string.ascii_letters) == (row["wanted"] == "letters")
        return float(right), said.text

    plug_in(monkeypatch, "wanted", wanted)
    rows = [
        {"conversation": [text("user", ask)], "answer": "a", "wanted": ask}
        for ask in ("letters", "signs")
    ]
    config = tiny_run(
        write_corpus(tmp_path / "corpus", rows),
        "train.steps=40",
        "policy.answers=32",
        "policy.new_tokens=2",
        "policy.prompt_tokens=96",
        "policy.slots=64",
        "policy.dynamic=False",
        "data.length=160",
        "data.batch=4",
        "data.chunks=0",
    )
    config.policy.rewards = ConfigDict({"default": {"wanted": 1.0}})
    assert train(config, tmp_path / "run") == 0
    rewards = [row["reward"] for row in log(tmp_path / "run")]
    assert np.mean(rewards[:3]) < 0.25
    assert np.mean(rewards[-5:]) >= 0.95


@pytest.mark.parametrize("dynamic", [False, True])
def test_without_spread_nothing_moves(corpus, tmp_path, monkeypatch, caplog, dynamic):
    plug_in(monkeypatch, "letters", lambda said, row: (0.0, "never"))
    config = tiny_run(
        corpus, f"policy.dynamic={dynamic}", "policy.refills=2", "checkpoint.export=native"
    )
    assert train(config, tmp_path) == 0
    assert same(tmp_path / "export", corpus / "start")
    rows = log(tmp_path)
    assert [row["rollout/groups"] for row in rows] == [0 if dynamic else 2] * 2
    assert [row["reward/groups_without_spread"] for row in rows] == [1.0] * 2
    asked = 3 if dynamic else 1  # the first time and two refills
    lines = log(tmp_path, "rollouts.jsonl")
    assert len(lines) == 2 * asked * 2 * 4
    assert {line["learned"] for line in lines} == {not dynamic}
    told = "step 1: 0 of 2 groups teach anything; the batch is smaller" in caplog.text
    assert told == dynamic


def test_stopped_anywhere_it_repeats_the_uninterrupted_run(corpus, tmp_path, monkeypatch):
    """By SIGTERM among rollouts, by an error in the step, and while it saves. Two updates a phase
    and a step ahead, so groups wait in the checkpoints; a reference that is not in them."""
    config = tiny_run(
        corpus,
        "train.steps=7",
        "policy.updates=2",
        "policy.ahead=1",
        "policy.kl=0.1",
        "checkpoint.every=2",
        "checkpoint.export=native",
        "policy.new_tokens=20",
    )
    whole, hurt = tmp_path / "whole", tmp_path / "hurt"
    train(config, whole)

    def fails(kind, name, number, error):
        """Lets a function of a class or module fail at its `number`-th call."""
        real, calls = getattr(kind, name), []

        def function(*args, **kwargs):
            calls.append(1)
            if len(calls) == number:
                error()
            return real(*args, **kwargs)

        patched.setattr(kind, name, function)

    def crash():
        raise RuntimeError("a crash")

    with monkeypatch.context() as patched:
        fails(Sampler, "sample", 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train(config, hurt) == 0
    assert not log(hurt) or log(hurt)[-1]["step"] < 7
    step = Setup.step
    with monkeypatch.context() as patched:

        def counted(run):
            inner, calls = step(run), []

            def one(state, batch):
                calls.append(1)
                if len(calls) == 4:
                    crash()
                return inner(state, batch)

            return one

        patched.setattr(Setup, "step", counted)
        with pytest.raises(RuntimeError, match="a crash"):
            train(config, hurt)
    with monkeypatch.context() as patched:
        fails(files, "checksums", 3, crash)  # called twice a step
        with pytest.raises(InputError, match="not written: a crash"):
            train(config, hurt)
    assert [int(path.name) for path in (hurt / "checkpoints").iterdir()] != [7]
    assert train(config, hurt) == 0

    def told(workdir):
        timed = ("time/", "rollout/tokens_per_second", "seconds_per_step", "mfu")
        return [
            {key: value for key, value in row.items() if not key.startswith(timed)}
            for row in log(workdir)
        ]

    assert told(hurt) == told(whole)
    assert "policy/reference_kl" in told(whole)[-1]
    assert (hurt / "rollouts.jsonl").read_bytes() == (whole / "rollouts.jsonl").read_bytes()
    assert same(hurt / "export", whole / "export")
    assert not same(whole / "export", corpus / "start")

    # Rollouts are not continued with other keys, nor with other rows.
    config.policy.temperature = 0.5
    before = (hurt / "config.json").read_bytes()
    with pytest.raises(InputError, match=r"temperature: the saved run has 1.0, this one 0.5"):
        train(config, hurt)
    assert (hurt / "config.json").read_bytes() == before
    config.policy.temperature = 1.0
    other = rows_file(tmp_path, corpus, [*ROWS[:3], {**ROWS[3], "id": "other"}])
    config.data.train = other.data.train
    with pytest.raises(InputError, match="holds other rows than the saved run"):
        train(config, hurt)


@pytest.mark.parametrize("objective", ["grpo", "gspo", "lora"])
def test_other_objectives_and_adapters_learn(corpus, tmp_path, objective):
    options = ["train.steps=3", "checkpoint.export=native", f"policy.objective={objective}"]
    if objective == "lora":
        options[-1:] = ["lora.rank=4", "lora.alpha=8", "policy.kl=0.1"]
    config = tiny_run(corpus, *options)
    assert train(config, tmp_path) == 0
    rows = log(tmp_path)
    assert not same(tmp_path / "export", corpus / "start")
    # The sampler had the weights of each step, adapters merged.
    for row in rows:
        assert abs(row["policy/importance"] - 1) < 1e-4
        assert row["policy/capped"] == 0
        assert row["grad_norm"] > 0
    if objective == "lora":
        assert (tmp_path / "lora").is_dir()
        assert rows[0]["policy/reference_kl"] == pytest.approx(0, abs=1e-6)
        assert rows[-1]["policy/reference_kl"] > 1e-4


def test_a_reference_holds_the_policy_even_where_no_reward_pulls(corpus, tmp_path, monkeypatch):
    """With rewards, then from there on without any: the divergence falls."""
    config = tiny_run(corpus, "train.steps=10", "policy.kl=1.0", "policy.dynamic=False")

    taken = []
    take = Sampler.take

    def counted(self, state):
        taken.append(1)
        return take(self, state)

    def paid(said, row):
        return float(len(taken) <= 2 and len(said.text) % 3 == 0), ""

    monkeypatch.setattr(Sampler, "take", counted)
    plug_in(monkeypatch, "letters", paid)
    train(config, tmp_path)
    away = [row["policy/reference_kl"] for row in log(tmp_path)]
    assert away[0] == pytest.approx(0, abs=1e-6)
    assert 0 < away[-1] < 0.7 * max(away)


def test_rows_that_cannot_be_asked_are_counted_and_listed(corpus, tmp_path, monkeypatch, caplog):
    def picky(said, row):
        if row["id"] == "answer":
            raise ValueError("no")
        return len(said.text) / 100, ""

    plug_in(monkeypatch, "letters", picky)
    bad = [{"conversation": [text("user", "Where?")], "id": "no answer"}]
    long = {"conversation": [text("user", "x" * 400)], "answer": "y", "id": "long"}
    config = rows_file(tmp_path, corpus, [*ROWS, *bad, long])
    config.train.steps, config.data.max_bad_share = 4, 0.5
    assert train(config, tmp_path) == 0
    asked = log(tmp_path, "rollouts.jsonl")
    assert {line["id"] for line in asked} == {"two clips", "branches", "no sound"}
    assert {line["task"] for line in asked if line["id"] == "branches"} <= {"hum", "who"}
    listed = {log(tmp_path, f"{name}_rows.jsonl")[0]["id"] for name in ("bad", "overlong")}
    assert listed == {"no answer", "long"}
    reason = log(tmp_path, "overlong_rows.jsonl")[0]["reason"]
    assert reason.startswith("its prompt has 4")
    assert reason.endswith("tokens; policy.prompt_tokens is 300")
    assert "no reward, so its group is left out: reward 'letters': failed on row" in caplog.text
    assert any(row["rollout/groups_without_reward"] > 0 for row in log(tmp_path))


def test_a_reward_that_always_fails_ends_the_run(corpus, tmp_path, monkeypatch):
    def broken(said, row):
        raise KeyError("score")

    plug_in(monkeypatch, "letters", broken)
    monkeypatch.setattr("moss_audio_jax.post_train.phases._UNPAID", 3)
    with pytest.raises(
        InputError, match=r"3 groups in a row .* the last: reward 'letters': failed"
    ):
        train(tiny_run(corpus), tmp_path)


def test_rows_that_all_are_too_long_end_the_run(corpus, tmp_path):
    config = rows_file(tmp_path, corpus, [{**ROWS[3], "id": str(i)} for i in range(3)])
    config.policy.prompt_tokens = 40
    with pytest.raises(InputError, match=r"give no question, the last because its prompt has \d+"):
        train(config, tmp_path)


def test_rows_of_no_reward_are_found_before_weights_are_read(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("moss_audio_jax.train.loop._first_state", lambda run: pytest.fail("late"))
    lost = {**ROWS[2], "conversation": [audio("is-not-read.wav")]}
    config = rows_file(tmp_path, corpus, [{**ROWS[1], "task": "text"}, lost])
    config.policy.rewards = ConfigDict({"text": {"exact": 1.0}})
    with pytest.raises(InputError) as error:
        train(config, tmp_path)
    said = str(error.value)
    assert said.startswith("data.train: row 'branches': unknown task ")
    assert said.endswith("(1 more of 3 have problems)")
    config.policy.rewards = ConfigDict({"text": {"exact": 1.0}, "default": {"exact": 1.0}})
    config.data.eval = config.data.train
    with pytest.raises(InputError, match=r"data\.eval: row 'answer' has no assistant's message"):
        train(config, tmp_path)
    config.data.eval = (str(corpus / "none.jsonl"),)
    with pytest.raises(InputError, match=r"none\.jsonl"):
        train(config, tmp_path)


def test_held_out_rows_are_answered_and_rewarded(corpus, tmp_path):
    told = [row for row in ROWS if "answer" not in row]
    config = rows_file(tmp_path, corpus, told)
    config.eval.every = config.train.steps = 1
    config.policy.held_out, config.data.eval = 3, config.data.train
    assert train(config, tmp_path) == 0
    (row,) = [row for row in log(tmp_path) if "eval_loss" in row]
    assert 0 <= row["eval_reward"] <= 1
    assert row["eval_reward"] == row["eval_reward/default"]
    assert row["eval_left_out"] == 0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("policy.objective=ppo", "policy.objective is 'ppo'; expected one of dapo, grpo, gspo"),
        ("policy.answers=1", "policy.answers is 1; expected at least 2"),
        ("policy.prompts=0", "policy.prompts is 0"),
        ("policy.updates=0", "policy.updates is 0"),
        ("policy.ahead=-1", "policy.ahead is -1"),
        ("policy.refills=-1", "policy.refills is -1"),
        ("policy.kl=-0.1", "policy.kl is -0.1; expected at least 0"),
        ("policy.temperature=0.0", "policy.temperature is 0.0; expected above 0"),
        ("policy.tis_cap=0.0", "policy.tis_cap is 0.0; expected above 0"),
        ("data.echo=2", "data.echo is 2; a run with rewards needs 1"),
        ("data.branches=2", "data.branches is 2; a run with rewards needs 1"),
        ("data.row_examples=2", "data.row_examples is 2; a run with rewards needs 0"),
        ("train.z_loss=0.1", "train.z_loss is 0.1; a run with rewards needs 0"),
        ("helpers.ctc=0.1", "helpers have weights"),
        ("data.length=300", "data.length 300 does not hold policy.prompt_tokens and new_tokens"),
        ("policy.answers=400", "data.batch is 8; 2 groups of 400 answers may need"),
    ],
)
def test_keys_that_cannot_be_are_named(corpus, override, words):
    config = tiny_run(corpus, override)
    with pytest.raises(UsageError) as error:
        build(config, read_start(config), make_mesh(**config.mesh))
    assert words in str(error.value)


def test_a_reward_that_is_none_is_named(corpus):
    config = tiny_run(corpus)
    config.policy.rewards = ConfigDict({"text": {"exakt": 1.0}})
    with pytest.raises(UsageError, match="no reward 'exakt'"):
        build(config, read_start(config), make_mesh(**config.mesh))
