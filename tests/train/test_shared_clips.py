"""Rows whose questions share a clip, and helper losses on them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import tiny_config, tone, write_checkpoint, write_wav

from moss_audio_jax.config import Compute
from moss_audio_jax.data.batch import Shape, make_train_batch
from moss_audio_jax.data.examples import ExampleMaker, Job
from moss_audio_jax.data.loader_config import Pick
from moss_audio_jax.data.packing import Room
from moss_audio_jax.data.records import Row, Span, parse_row
from moss_audio_jax.data.sources import Source
from moss_audio_jax.data.targets import IGNORE, NOTHING, UNKNOWN, Targets
from moss_audio_jax.errors import InputError
from moss_audio_jax.text import load_tokenizer
from moss_audio_jax.train import helpers as helping
from moss_audio_jax.train.defaults import get_config
from moss_audio_jax.train.step import Recipe, gradients
from moss_audio_jax.tree import flatten, unflatten
from moss_audio_jax.weights.convert import load_params
from moss_audio_jax.weights.helpers import load_helpers, save_helpers

MODEL = tiny_config(1024)
TAGS = ("bell", "dog")
ROW = """{"conversation": [{"role": "user", "message_type": "audio", "content": "%s"}],
 "branches": [%s],
 "words": [{"text": "hi", "start": 0.1, "end": 0.5}, {"text": "you", "start": 4.2, "end": 4.5}],
 "tags": [{"name": "bell", "start": 0.4, "end": 4.1}, {"name": "cat", "start": 0, "end": 1}],
 "weight": 2.0, "id": "a"}"""
BRANCH = """{"messages": [{"role": "user", "message_type": "text", "content": "%s"},
 {"role": "assistant", "message_type": "text", "content": "%s"}], "task": "%s", "weight": %s}"""
BRANCHES = (
    ("what?", "a bell", "sound", 1.0),
    ("who says it", "you", "speech", 0.5),
    ("how many", "2", "count", 3.0),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    write_checkpoint(folder / "model", 1024)
    write_wav(folder / "clip.wav", tone(4.7))
    lines = [ROW % ("clip.wav", ", ".join(BRANCH % branch for branch in BRANCHES))]
    lines += [ROW % ("clip.wav", BRANCH % branch) for branch in BRANCHES]
    (folder / "rows.jsonl").write_text("".join(" ".join(x.split()) + "\n" for x in lines))
    return folder


def make(folder, row=0, index=0, **options):
    source = Source(str(folder / "rows.jsonl"))
    maker = ExampleMaker(
        load_tokenizer(folder / "model"), MODEL.encoder, Room(1000, 8, 50), **options
    )
    made = maker(Job(index, source.location(row), f"data:{row}", "data"))
    assert not hasattr(made, "reason"), made
    return made


@functools.cache
def grad_fn(recipe):
    return jax.jit(functools.partial(gradients, recipe=recipe))


def test_branches_are_conversations_of_their_own(folder):
    """Loss and gradient of three questions about one clip equal those of three rows."""
    params = flatten(load_params(folder / "model", MODEL, "float32"))
    recipe = Recipe(MODEL, Compute(dtype="float32"))
    shared = make(folder, branches=3)
    alone = [make(folder, row) for row in (1, 2, 3)]
    assert len(shared.ids) < sum(len(e.ids) for e in alone)
    assert sorted(set(shared.branches)) == [0, 1, 2, 3]

    def batch(rows):
        shape = Shape(len(rows), 192, 2, MODEL.encoder.chunk_frames)
        return make_train_batch(rows, shape, MODEL.encoder, 261, branched=True)

    together, sums = grad_fn(recipe)(params, {}, batch=batch([[shared]]))
    apart, expected = grad_fn(recipe)(params, {}, batch=batch([[e] for e in alone]))
    for name in ("loss", "weight"):
        np.testing.assert_allclose(sums[name], expected[name], rtol=1e-5)
    for path, gradient in apart.items():
        difference = np.abs(together[path] - gradient).max()
        assert difference <= 2e-5 * max(np.abs(gradient).max(), 1e-3), path


def test_a_branch_by_itself_is_an_ordinary_row(folder):
    first = make(folder, 1)
    assert first.positions.tolist() == list(range(len(first.ids)))
    assert not first.branches.any()
    assert np.unique(first.weights[first.labels != IGNORE]).tolist() == [2.0]


def test_branches_are_drawn_by_weight_and_index(folder):
    pick = (Pick("sound|count", 1.0), Pick(".*", 0.0))
    seen = {tuple(make(folder, index=i, branches=1, pick=pick).ids) for i in range(20)}
    assert len(seen) == 2
    assert len(set(make(folder, branches=5, pick=pick).branches)) == 3  # the clip and two
    heavy = make(folder, branches=3, pick=(Pick("count", 1.0, 4.0), Pick(".*", 1.0)))
    plain = make(folder, branches=3)
    more = heavy.weights[heavy.labels != IGNORE] / plain.weights[plain.labels != IGNORE]
    assert sorted(set(more.tolist())) == [1.0, 4.0]
    again = [make(folder, index=7, branches=2).ids.tolist() for _ in range(2)]
    assert again[0] == again[1]
    assert (make(folder, branches=0).labels == IGNORE).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('"branches": [', '"branches": [{"messages": []}, '), 'branches[0]: no "messages"'),
        (('"weight": 2.0', '"weight": -1'), '"weight" is -1'),
        (('"start": 4.2', '"start": 5'), "words[1]"),
        (('"name": "cat", ', ""), "tags[1]"),
        (
            (
                '"conversation": [',
                '"conversation": [{"role": "user", "message_type": "audio", "content": "b.wav"}, ',
            ),
            "one audio message; found 2",
        ),
    ],
)
def test_what_is_wrong_with_a_row_is_named(folder, change, message):
    line = (folder / "rows.jsonl").read_text().splitlines()[0]
    with pytest.raises(InputError) as error:
        parse_row(line.replace(*change).encode())
    assert message in str(error.value)


def test_targets_stand_where_they_are_heard(folder):
    targets = Targets(4, TAGS)
    example = make(folder, branches=0, targets=targets)
    h, i, *you = load_tokenizer(folder / "model").encode("hiyou")
    shape = Shape(1, 128, 2, MODEL.encoder.chunk_frames)
    batch = make_train_batch([[example]], shape, MODEL.encoder, 261, targets=targets)
    pieces = batch["heard_pieces"][0]
    # 0.1 - 0.3 s and 0.3 - 0.5 s: tokens whose centres (0.04 + 0.08 n) lie within.
    assert pieces[:7].tolist() == [NOTHING, h, h, h, i, i, NOTHING]
    assert (pieces[59:] == IGNORE).all()  # 4.7 s are 59 tokens
    before = batch["heard_before"][0]
    assert before[:7].tolist() == [IGNORE, IGNORE, IGNORE, IGNORE, h, h, IGNORE]
    assert (before[pieces == you[0]] == IGNORE).all()  # what was said before lies in another chunk
    assert (before[pieces == you[1]] == you[0]).all()
    assert set(before.tolist()) == {IGNORE, h, *you[:-1]}
    assert batch["heard_order"][0].tolist() == [
        [h, i, NOTHING, NOTHING],
        [*you, NOTHING],
    ]
    bell = np.flatnonzero(batch["heard_tags"][0, :, 0])
    assert (bell.min(), bell.max()) == (5, 50)
    assert not batch["heard_tags"][0, :, 1].any()
    tokenizer = load_tokenizer(folder / "model")
    said = (Span("hi", 0.0, 0.5), Span("you", 0.5, 1.0))
    crowded = targets.heard(Row([], words=said), tokenizer, [50, 10])
    assert (crowded.order[0] == IGNORE).all()  # five pieces, room for four
    assert (crowded.order[1] == NOTHING).all()
    # A row that says nothing of what is heard teaches nothing.
    silent, arrays = targets.heard(Row([]), tokenizer, [50, 10]), targets.empty(1, 2, 50)
    targets.fill(arrays, 0, silent, np.arange(60))
    assert (arrays["heard_pieces"] == IGNORE).all()
    assert (arrays["heard_before"] == IGNORE).all()
    assert (arrays["heard_order"] == IGNORE).all()
    assert (arrays["heard_tags"][0, :60] == UNKNOWN).all()
    assert not arrays["heard_tags"][0, 60:].any()


_HEARING = ("helpers/", "audio_encoder/", "audio_adapter/", "lm_head/")


def test_helper_losses(folder):
    """Zero for right and sure heads; the same in micro-batches; gradients reach the encoder."""
    targets = Targets(4, TAGS)

    def of(**weights):
        return helping.Helpers(tuple(weights.items()), TAGS, MODEL.decoder.vocab_size)

    helpers = of(
        ctc=0.3,
        frames=1.0,
        tags=0.5,
        position=0.1,
        adapter=0.2,
        clock=0.1,
        adapter_tags=0.1,
        adapter_before=0.1,
    )
    heads = helping.init_helpers(jax.random.key(0), MODEL, helpers)
    names = ("pieces", "tags", "position", "clock", "adapter_tags", "adapter_before")
    assert set(heads) == {f"helpers/{n}/{k}" for n in names for k in ("kernel", "bias")}
    example = make(folder, branches=0, targets=targets)
    shape = Shape(4, 128, 2, MODEL.encoder.chunk_frames)
    rows = [[example], [], [example], []]
    batch = make_train_batch(rows, shape, MODEL.encoder, 261, targets=targets)

    blank = helpers.pieces
    truth = np.where(batch["heard_pieces"] >= 0, batch["heard_pieces"], blank)
    sure = {"pieces": {"kernel": 50 * jnp.eye(blank + 1), "bias": jnp.zeros(blank + 1)}}
    only = of(ctc=0.3, frames=1.0, adapter=0.2)
    words, head = jax.nn.one_hot(truth, blank), 20 * jnp.eye(blank)
    right = helping.losses(sure, only, jax.nn.one_hot(truth, blank + 1), batch, words, head)
    assert float(right["frames"]) < 1e-3
    assert float(right["ctc"]) < 1e-3
    assert float(right["adapter"]) < 1e-3
    places = np.tile(np.arange(50), (4, 2))  # of a token in its chunk, off the adapter's output
    sure = {"clock": {"kernel": 50 * jnp.eye(blank)[:, :50], "bias": jnp.zeros(50)}}
    only = of(clock=1.0)
    shown = jax.nn.one_hot(places, blank)
    assert float(helping.losses(sure, only, shown, batch, shown)["clock"]) < 1e-3
    late = helping.losses(sure, only, shown, batch, jnp.roll(shown, 1, axis=1))["clock"]
    assert float(late / helping.counts(only, batch)["clock"]) > 10
    # Tags, off the adapter's output and not the encoder's.
    sure = {"adapter_tags": {"kernel": 50 * jnp.eye(blank)[:, : len(TAGS)], "bias": -jnp.ones(1)}}
    only = of(adapter_tags=1.0)
    held = jnp.pad((batch["heard_tags"] == 1) - 0.5, ((0, 0), (0, 0), (0, blank - len(TAGS))))
    assert float(helping.losses(sure, only, -held, batch, held)["adapter_tags"]) < 1e-3
    swapped = helping.losses(sure, only, held, batch, -held)["adapter_tags"]
    assert float(swapped / helping.counts(only, batch)["adapter_tags"]) > 10
    # The piece before the one that is said: here the matrix turns each piece into the one before.
    only = of(adapter_before=1.0)
    known = batch["heard_before"] >= 0
    assert helping.counts(only, batch)["adapter_before"] == known.sum() > 0
    turn = np.zeros((blank, blank))
    turn[truth[known], batch["heard_before"][known]] = 1.0
    for kernel, low, high in ((turn, 0, 1e-3), (turn.T, 10, np.inf)):
        sure = {
            "adapter_before": {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.zeros(blank)}
        }
        loss = helping.losses(sure, only, words, batch, words, head)["adapter_before"] / known.sum()
        assert low <= float(loss) < high

    params = flatten(load_params(folder / "model", MODEL, "float32")) | heads
    trained = {p: x for p, x in params.items() if p.startswith(_HEARING)}
    frozen = {p: x for p, x in params.items() if p not in trained}
    recipe = Recipe(MODEL, Compute(dtype="float32"), decoder_loss=0.0, helpers=helpers)
    whole, sums = grad_fn(recipe)(trained, frozen, batch=batch)
    parts, _ = grad_fn(dataclasses.replace(recipe, accumulate=2))(trained, frozen, batch=batch)
    assert float(sums["loss"]) == 0
    for path, gradient in whole.items():
        assert np.abs(gradient).max() > 0, path
        assert np.abs(gradient - parts[path]).max() <= 1e-5 * np.abs(gradient).max(), path


def test_every_helper_loss_has_its_key_and_its_own_projection():
    assert set(get_config().helpers) == {*helping.LOSSES, "words", "names"}
    heads = {loss.projection for loss in helping.LOSSES.values() if loss.projection}
    assert len({head.seed for head in heads}) == len({head.name for head in heads}) == len(heads)


def test_heads_are_kept_beside_a_checkpoint(tmp_path):
    heads = {"helpers/tags/kernel": np.ones((3, 2), np.float32)}
    save_helpers(tmp_path, heads, TAGS)
    found, tags = load_helpers(tmp_path)
    assert tags == TAGS
    np.testing.assert_array_equal(found["helpers/tags/kernel"], 1)
    assert load_helpers(tmp_path / "none") == ({}, ())
    assert unflatten(found)["helpers"]["tags"]["kernel"].shape == (3, 2)
