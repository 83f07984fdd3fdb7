"""The sampler and the trainer agree on log-probabilities, so that w = 1 where nothing moved."""

import functools
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from reward_runs import sampled, tiny_run

from moss_audio_jax.data.batch import Shape, TrainExample, make_train_batch
from moss_audio_jax.post_train.batches import lay_out, pieces_of, read_back
from moss_audio_jax.post_train.rollout import Answer, Group, answer_of
from moss_audio_jax.sharding import make_mesh
from moss_audio_jax.train.step import batch_shardings, gradients, label_logprobs

pytestmark = pytest.mark.usefixtures("paid_for_letters")


def asked(config, mesh=None, temperature=1.0):
    """(run, state, groups of answers of many lengths) of the corpus's rows."""
    run, state, sampler, questions = sampled(config, mesh)
    outputs = sampler.sample(questions, temperature)
    groups = [
        Group(question, [_cut(answer_of(one, (-1.0) ** k), 9 * k) for k, one in enumerate(said)])
        for question, said in zip(questions, outputs, strict=True)
    ]
    return run, state, groups


def _cut(answer, tokens):
    keep = max(1, len(answer.ids) - tokens)
    return answer._replace(ids=answer.ids[:keep], logprobs=answer.logprobs[:keep])


def laid_out(run, groups):
    multiple = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
    pieces = pieces_of(groups, run.shape.tokens)
    processor = run.start.tokenizer.processor
    arrays, rows = lay_out(pieces, run.shape, multiple, run.start.model.encoder, processor)
    place = batch_shardings(arrays, run.mesh)
    return pieces, {name: jax.device_put(x, place[name]) for name, x in arrays.items()}, rows


def scored(run, state, groups):
    """{(group, number): log-probabilities by the trainer}, and the arrays of the step."""
    pieces, arrays, rows = laid_out(run, groups)
    with jax.set_mesh(run.mesh):
        score = jax.jit(functools.partial(label_logprobs, recipe=run.recipe))
        values = np.asarray(score(state["trained"], state["frozen"], arrays))
    return read_back(values, pieces, rows), arrays, pieces


@pytest.mark.parametrize(
    ("mesh", "temperature"), [((1, 1, 1, 1), 1.0), ((1, 1, 1, 1), 0.7), ((2, 2, 2, 1), 1.0)]
)
def test_sampler_and_trainer_agree(corpus, mesh, temperature):
    config = tiny_run(
        corpus,
        "policy.answers=5",
        "policy.new_tokens=96",
        "policy.slots=10",
        "data.length=512",
        "data.batch=16",
        f"policy.temperature={temperature}",
    )
    run, state, groups = asked(config, make_mesh(*mesh), temperature=temperature)
    tokenizer = run.start.tokenizer
    prompts = [tokenizer.decode(group.question.prompt.ids, False) for group in groups]
    assert len(groups[0].question.prompt.mels) == 2
    assert "<think>" in prompts[0]  # of an earlier turn
    assert prompts[0].count("4") > prompts[1].count("4")  # time markers: 5.3 s against 2.5 s
    lengths = {len(answer.ids) for group in groups for answer in group.answers}
    assert len(lengths) > 4

    found, arrays, pieces = scored(run, state, groups)
    assert len(pieces) > len(groups)  # a group needs more than one row
    for number, group in enumerate(groups):
        for k, answer in enumerate(group.answers):
            np.testing.assert_allclose(found[number, k], answer.logprobs, atol=1e-5, rtol=0)

    with jax.set_mesh(run.mesh):
        sums = jax.jit(functools.partial(gradients, recipe=run.recipe))(
            state["trained"], state["frozen"], batch=arrays
        )[1]["objective"]
    means = run.recipe.objective.means(sums)
    assert abs(float(means["importance"]) - 1) < 1e-5
    assert float(means["capped"]) == 0
    assert float(sums["tokens"]) == sum(len(a.ids) for g in groups for a in g.answers)


def test_an_answer_in_a_packed_branch_is_as_likely_as_alone(corpus):
    """Against conversations of a prompt and one answer, without branches, a row each."""
    config = tiny_run(corpus, "policy.answers=5", "policy.new_tokens=64")
    run, state, groups = asked(config)
    found, _, _ = scored(run, state, groups)
    answers, examples = [], []
    for number, group in enumerate(groups):
        ids = group.question.prompt.ids
        for k, answer in enumerate(group.answers):
            whole = np.concatenate([ids, answer.ids]).astype(np.int32)
            labels = np.where(np.arange(len(whole)) < len(ids), -100, whole)
            mels = group.question.prompt.mels
            more = {"weights": 1.0, "tasks": 0, "row_id": "", "index": 0, "seconds": 0.0}
            examples.append(TrainExample(ids=whole, mels=mels, labels=labels, **more))
            answers.append((number, k))
    shape = Shape(len(examples), 512, run.shape.chunks, run.shape.frames)
    batch = make_train_batch(
        [[each] for each in examples],
        shape,
        run.start.model.encoder,
        run.start.tokenizer.processor.audio_token_id,
    )
    score = jax.jit(functools.partial(label_logprobs, recipe=run.recipe))
    values = np.asarray(score(state["trained"], state["frozen"], batch))
    for row, (number, k) in enumerate(answers):
        alone = values[row][examples[row].labels.shape[0] - len(found[number, k]) :]
        np.testing.assert_allclose(
            found[number, k], alone[: len(found[number, k])], atol=1e-5, rtol=0
        )


def test_a_clip_is_heard_once_and_a_prompt_is_run_once(corpus):
    """But for its last page of 16 tokens, without which nothing says what follows it."""
    _, state, sampler, questions = sampled(tiny_run(corpus, "policy.answers=6", "policy.slots=6"))
    for question in questions:
        sampler.take(state)  # which forgets what was heard and run
        before = sampler.counts
        sampler.sample([question], 1.0)
        new = {name: count - before[name] for name, count in sampler.counts.items()}
        clips = {mel.tobytes(): mel.shape[1] for mel in question.prompt.mels}
        assert new["encoded_frames"] == sum(clips.values())
        prompt = len(question.prompt.ids)
        ran = new["prompt_tokens"] - new["cached_tokens"]
        assert ran == prompt + 5 * (prompt - (prompt - 1) // 16 * 16)


def test_pieces_hold_each_answer_once():
    """Also one that fills a row to its end; a row that holds too little for two begins another."""
    ids = np.arange(10, 20, dtype=np.int32)
    made = SimpleNamespace(tasks=np.array([0, 0, 2]), row_id="data:3", seconds=1.5)
    question = SimpleNamespace(index=7, made=made, prompt=SimpleNamespace(ids=ids, mels=()))
    sizes = (11, 10, 3, 2, 22)
    answers = [
        Answer([100 * k + i for i in range(n)], -np.ones(n, np.float32), float(k))
        for k, n in enumerate(sizes, 1)
    ]
    pieces = pieces_of([Group(question, answers)], 9 + 12 + 11)
    assert [piece.numbers for piece in pieces] == [[0, 1], [2, 3], [4]]
    for piece in pieces:
        example = piece.example
        assert len(example.ids) <= 32
        assert (example.tasks, example.index) == (2, 7)
        for start, answer in zip(piece.starts, piece.answers, strict=True):
            here = slice(start, start + len(answer.ids))
            assert example.ids[here].tolist() == answer.ids == example.labels[here].tolist()
            assert example.ids[start - 1] == ids[-1]  # predicts the first
            assert example.positions[start] == len(ids)
            assert len(set(example.branches[start - 1 : here.stop])) == 1
        assert (example.labels >= 0).sum() == sum(len(a.ids) for a in piece.answers)
