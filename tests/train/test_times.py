"""The helper loss on digits of times: which tokens it reads, its value, what it leaves alone."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sentencepiece
from tiny_model import AUDIO_ID, tiny_config, tone, write_checkpoint, write_wav

from moss_audio_jax.config import DEFAULT_CHECKPOINT, Compute
from moss_audio_jax.data.batch import IGNORE, Shape, make_train_batch
from moss_audio_jax.data.examples import ExampleMaker, Job
from moss_audio_jax.data.loader_config import LoaderConfig
from moss_audio_jax.data.packing import Room
from moss_audio_jax.data.sources import Source
from moss_audio_jax.data.targets import Targets, check_digits, time_places
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.models import decoder, moss_audio
from moss_audio_jax.sharding import make_mesh
from moss_audio_jax.text import load_tokenizer
from moss_audio_jax.text.tokenizer import SPECIAL_STRINGS
from moss_audio_jax.train import helpers as helping
from moss_audio_jax.train import setup
from moss_audio_jax.train.check import check
from moss_audio_jax.train.start import read_start
from moss_audio_jax.train.step import Recipe, gradients, init_state, make_train_step
from moss_audio_jax.tree import flatten, unflatten
from moss_audio_jax.weights.convert import load_params

MODEL = tiny_config(1024)
QWEN = Path(__file__).resolve().parents[3] / "shared" / "qwen_tokenizer"
ANSWERS = ("[0.31]hi[1.20]", "9.98 - 10.02", "2 dogs at 120.5 beats", "[99.90]a 7[100.05]")
TIMES = Targets(0, (), times=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """rows.jsonl: a row of four branches, then each of them as a row of its own."""
    folder = tmp_path_factory.mktemp("times")
    write_checkpoint(folder / "model", 1024)
    write_wav(folder / "clip.wav", tone(1.3))
    audio = {"role": "user", "message_type": "audio", "content": "clip.wav"}

    def row(numbers):
        branches = [
            {
                "messages": [
                    {"role": "user", "message_type": "text", "content": f"[1.50] {number}?"},
                    {"role": "assistant", "message_type": "text", "content": ANSWERS[number]},
                ],
                "task": str(number),
                "weight": 1.0 + number,
            }
            for number in numbers
        ]
        return json.dumps({"conversation": [audio], "branches": branches})

    rows = [row(range(4)), *(row([number]) for number in range(4))]
    (folder / "rows.jsonl").write_text("".join(line + "\n" for line in rows))
    return folder


def make(folder, row, targets=TIMES):
    source = Source(str(folder / "rows.jsonl"))
    tokenizer = load_tokenizer(folder / "model")
    room = Room(1000, 8, 50)
    maker = ExampleMaker(tokenizer, MODEL.encoder, room, branches=4, targets=targets)
    made = maker(Job(0, source.location(row), f"data:{row}", "data"))
    assert not hasattr(made, "reason"), made
    return made


def batch_of(rows, targets=TIMES):
    shape = Shape(4, 384, 4, MODEL.encoder.chunk_frames)
    return make_train_batch(rows, shape, MODEL.encoder, AUDIO_ID, branched=True, targets=targets)


@pytest.mark.parametrize("where", [DEFAULT_CHECKPOINT, QWEN], ids=["small", "qwen"])
def test_places_stand_at_the_digits(where):
    if not Path(where).is_dir():
        pytest.skip(f"{where} does not exist")
    tokenizer = load_tokenizer(where)
    check_digits(tokenizer)
    text = "你好 in 2024: [9.98]ten[10.02] 3 - 5\n99.90 - 100.05: naïve é"
    ids = tokenizer.encode(text)
    places = time_places(ids, [True] * len(ids), tokenizer)
    assert places.dtype == np.int8
    at = np.flatnonzero(places != IGNORE)
    assert tokenizer.decode([ids[i] for i in at]) == "998100299901000" + "5"
    assert places[at].tolist() == [0, -1, -2, 1, 0, -1, -2, 1, 0, -1, -2, 2, 1, 0, -1, -2]
    # Only labels, and no time across what is none.
    answers = np.ones(len(ids), bool)
    answers[at[1]] = False
    again = time_places(ids, answers, tokenizer)
    assert (again[at[:3]] == IGNORE).all()
    assert (again[at[3:]] == places[at[3:]]).all()


def test_a_tokenizer_that_joins_digits_is_named(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["[12.34]a[12.34]b 0123456789 56.78 - 90.12"] * 20),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=320,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        byte_fallback=True,
        split_digits=False,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        minloglevel=2,
        control_symbols=sorted(SPECIAL_STRINGS),
    )
    with pytest.raises(InputError, match=r"tokenizer.model: .*helpers.times needs a tokenizer"):
        check_digits(load_tokenizer(tmp_path))


def test_examples_have_places_in_answers_alone(folder):
    tokenizer = load_tokenizer(folder / "model")
    made = make(folder, 0)
    at = np.flatnonzero(made.time_places != IGNORE)
    assert tokenizer.decode(made.labels[at]) == "031120" + "9981002" + "999010005"
    assert make(folder, 0, targets=None).time_places is None
    assert LoaderConfig(1, 1, 1, times=True).targets() == TIMES
    assert LoaderConfig(1, 1, 1).targets() is None
    batch = batch_of([[make(folder, 2), make(folder, 1)]])
    assert batch["time_places"].dtype == np.int8
    first, second = ((batch["segment_ids"][0] == n) for n in (1, 2))
    assert np.sum(batch["time_places"][0][first] != IGNORE) == 7
    assert np.sum(batch["time_places"][0][second] != IGNORE) == 6
    assert (batch["time_places"][1:] == IGNORE).all()
    assert "time_places" not in batch_of([[make(folder, 1)]], None)


def helpers_of(digits, weight=1.0, **others):
    weights = (("times", weight), *others.items())
    return helping.Helpers(weights, (), MODEL.decoder.vocab_size, tuple(digits))


def expected(hidden, head, digits, batch):
    """Mean over the digits of times by their weights, digit by digit, in float64."""
    total = weight = 0.0
    for row, token in np.argwhere(batch["time_places"] != IGNORE):
        logits = hidden[row, token - 1].astype(np.float64) @ head[:, digits].astype(np.float64)
        chances = np.exp(logits - logits.max())
        chances /= chances.sum()
        true = digits.index(batch["labels"][row, token])
        place = int(batch["time_places"][row, token])
        cost = sum(chances[v] * np.log(1 + abs(v - true) * 10.0**place / 0.1) for v in range(10))
        total += batch["weights"][row, token] * cost
        weight += batch["weights"][row, token]
    return total, weight


def test_the_value_is_the_expected_distance(folder):
    digits = load_tokenizer(folder / "model").digit_ids
    helpers = helpers_of(digits)
    batch = batch_of([[make(folder, 0)], [make(folder, 4), make(folder, 2)]])
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(*batch["tokens"].shape, 32)).astype(np.float32)
    head = rng.normal(size=(32, MODEL.decoder.vocab_size)).astype(np.float32)

    def found(hidden):
        return helping.losses({}, helpers, None, batch, None, head, hidden)["times"]

    total, weight = expected(hidden, head, digits, batch)
    assert float(found(hidden)) == pytest.approx(total, rel=1e-5)
    assert float(helping.counts(helpers, batch)["times"]) == pytest.approx(weight)
    assert 0.5 < total / weight < 6
    # Sure and right: 0. Sure of the next digit: what that is off, at each place.
    true = np.argmax(np.roll(batch["labels"], -1, axis=1)[..., None] == digits, axis=-1)
    sure = 50 * np.eye(10, 32)
    head = np.zeros_like(head)
    head[np.arange(10), digits] = 1
    assert float(found(jnp.asarray(sure[true]))) < 1e-6
    off = np.where(true == 9, 8, true + 1)
    places = batch["time_places"][:, 1:]
    cost = np.where(places == IGNORE, 0, np.log1p(10.0**places / 0.1)) * batch["weights"][:, 1:]
    assert float(found(jnp.asarray(sure[off]))) == pytest.approx(cost.sum(), rel=1e-5)
    none = batch_of([[make(folder, 3)]])
    assert float(helping.counts(helpers, none)["times"]) == 1  # no digit: no division by 0


@functools.cache
def grad_fn(recipe):
    return jax.jit(functools.partial(gradients, recipe=recipe))


def test_neither_packing_nor_branches_nor_micro_batches_change_it(folder):
    params = flatten(load_params(folder / "model", MODEL, "float32"))
    digits = load_tokenizer(folder / "model").digit_ids
    recipe = Recipe(
        MODEL, Compute("float32"), decoder_loss=1e-9, helpers=helpers_of(digits, 0.5), clip_norm=0
    )
    alone = [make(folder, row) for row in (1, 2, 3, 4)]
    apart, sums = grad_fn(recipe)(params, {}, batch=batch_of([[e] for e in alone]))
    assert float(sums["times"]) > 0
    layouts = {
        "packed": (recipe, [[alone[2], alone[0], alone[3]], [], [alone[1]], []]),
        "branches": (recipe, [[make(folder, 0)]]),
        "parts": (dataclasses.replace(recipe, accumulate=2), [[e] for e in alone]),
    }
    for name, (own, rows) in layouts.items():
        other, its = grad_fn(own)(params, {}, batch=batch_of(rows))
        np.testing.assert_allclose(its["times"], sums["times"], rtol=1e-5, err_msg=name)
        for path, gradient in apart.items():
            largest = np.abs(gradient).max()
            assert np.abs(other[path] - gradient).max() <= 2e-5 * max(largest, 1e-6), (name, path)
    # Of the head, only the columns of digits are taught.
    taught = np.abs(apart["lm_head/kernel"]).max(axis=0)
    assert set(np.flatnonzero(taught > 1e-6)) == set(digits)
    tree = unflatten(params)
    batch = batch_of([[e] for e in alone])
    hidden = moss_audio.hidden_states(tree, MODEL, recipe.compute, batch)
    total, _ = expected(np.asarray(hidden), np.asarray(decoder.head_kernel(tree)), digits, batch)
    assert float(sums["times"]) == pytest.approx(total, rel=1e-4)


def test_without_a_weight_a_step_is_the_same_bit_for_bit(folder):
    params = flatten(load_params(folder / "model", MODEL, "float32"))
    optimizer = optax.sgd(0.1)

    def stepped(helpers, targets):
        recipe = Recipe(MODEL, Compute("float32"), helpers=helpers)
        state = init_state(params, set(params), optimizer, recipe)
        step = jax.jit(make_train_step(recipe, optimizer, lambda step: 0.1))
        batch = batch_of([[make(folder, 0, targets)]], targets)
        return batch, step(state, batch)[0]["trained"]

    digits = load_tokenizer(folder / "model").digit_ids
    batch, plain = stepped(None, None)
    assert "time_places" not in batch
    _, off = stepped(helpers_of(digits, 0.0), TIMES)
    _, on = stepped(helpers_of(digits, 0.5), TIMES)
    for path, leaf in plain.items():
        np.testing.assert_array_equal(off[path], leaf)
    assert any(np.abs(on[path] - leaf).max() > 1e-6 for path, leaf in plain.items())


def test_the_key_of_a_run(run_config):
    one = make_mesh(devices=jax.devices()[:1])
    config = run_config("helpers.times=0.2")
    start = read_start(config)
    built = setup.build(config, start, one)
    assert built.loader.times
    assert built.recipe.helpers.digits == start.tokenizer.digit_ids
    assert not any(path.startswith("helpers/") for path in built.params)  # it has no projection
    plain = setup.build(run_config(), start, one)
    assert plain.recipe.helpers is None
    assert not plain.loader.times
    with pytest.raises(UsageError, match=r"helpers.times needs train.decoder_loss"):
        check(run_config("helpers.times=0.2", "train.decoder_loss=0"), start.model, one)
