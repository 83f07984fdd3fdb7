"""Generation: the loop on the device, slots that are refilled, and all ends of an answer."""

import dataclasses

import jax
import numpy as np
import pytest
from golden_prompts import OWN, golden_prompts

import moss_audio_jax as mj
from moss_audio_jax.data.batch import Example
from moss_audio_jax.errors import InputError
from moss_audio_jax.generate import engine as engine_module
from moss_audio_jax.generate import hearing, shapes
from moss_audio_jax.generate.engine import Engine, Size
from moss_audio_jax.generate.sampling import Sampling
from moss_audio_jax.generate.vocabulary import Vocabulary

AUDIO, START, END = 445, 446, 447
VOCAB = Vocabulary(448, AUDIO, forbidden=(AUDIO, START, END))


@pytest.fixture(scope="module")
def model():
    return mj.MossAudio.load(OWN, "float32")


@pytest.fixture(scope="module")
def prompts():
    return golden_prompts()


def engine(model, vocab=VOCAB, slots=8, params=None, decode=None, size=None):
    params = model.params if params is None else params
    return Engine(params, model.config, model.compute, vocab, model.mesh, decode, slots, size=size)


def always(model, cycle):
    """Parameters under which token cycle[i] is always followed by cycle[i + 1], round and round.

    Every layer's output is zeroed, so the head sees the last embedding alone: one-hot directions.
    """
    params = jax.tree.map(np.array, model.stacked_params())
    layers = params["language_model"]["layers"]
    layers["self_attn"]["o_proj"]["kernel"][:] = 0
    layers["mlp"]["down_proj"]["kernel"][:] = 0
    params["language_model"]["norm"]["scale"][:] = 1
    embedding, head = params["language_model"]["embed_tokens"]["embedding"], params["lm_head"]
    embedding[:], head["kernel"][:] = 0, 0
    for i, token in enumerate(cycle):
        embedding[token, i] = 1
        head["kernel"][i, cycle[(i + 1) % len(cycle)]] = 1
    return jax.tree.map(jax.numpy.asarray, params)


def test_cached_decoding_equals_uncached(model, prompts):
    for prompt in (prompts[1], prompts[5]):
        ids = list(prompt.ids)
        for _ in range(8):
            logits = model.logits(ids, prompt.mels)[-1]
            logits[[AUDIO, START, END]] = -np.inf
            ids.append(int(logits.argmax()))
        cached = model.generate_ids(prompt.ids, prompt.mels, max_new_tokens=8)
        assert cached == ids[len(prompt.ids) :]


def test_a_second_prompt_in_the_same_buckets_compiles_nothing(model, prompts):
    def programs():
        jitted = (engine_module.prefill, engine_module.extend, engine_module.decode_until)
        return [function._cache_size() for function in jitted]

    def ask(ids):
        model.generate_ids(ids, prompts[1].mels, max_new_tokens=20)
        model.generate_ids(ids, prompts[1].mels, max_new_tokens=5, temperature=1.0, top_k=3)

    ask(prompts[1].ids)
    ask(prompts[1].ids)  # now its beginning is known
    before = programs()
    ask(np.concatenate([prompts[1].ids, prompts[1].ids[:3]]))
    assert programs() == before


def test_steps_read_no_more_of_the_cache_than_they_reach(model, prompts, monkeypatch):
    requests = [
        (prompt, Sampling(40 + 7 * i, loop_guard=False)) for i, prompt in enumerate(prompts)
    ]
    reaches = []
    decode_until = engine_module.decode_until

    def spy(params, state, tables, *numbers, **static):
        reaches.append(tables.shape[1])
        return decode_until(params, state, tables, *numbers, **static)

    monkeypatch.setattr(engine_module, "decode_until", spy)
    monkeypatch.setattr(shapes, "LEAST_REACH", 512)
    whole = engine(model, slots=3).run(requests)
    assert len(set(reaches)) == 1  # all of it
    monkeypatch.setattr(shapes, "LEAST_REACH", 16)
    monkeypatch.setattr(shapes, "STEPS_AHEAD", 4)
    assert engine(model, slots=3).run(requests) == whole
    assert len(set(reaches)) > 2
    assert max(reaches) > 2 * min(reaches)


def test_the_cache_is_as_large_as_what_is_asked_not_as_the_positions(model):
    """64 short requests to a model of 40,960 positions."""
    decoder = dataclasses.replace(model.config.decoder, max_positions=40_960)
    config = dataclasses.replace(model.config, decoder=decoder)
    rng = np.random.default_rng(0)
    requests = [
        (Example(rng.integers(5, 50, n).astype(np.int32)), Sampling(40, loop_guard=False))
        for n in rng.integers(60, 140, 64)
    ]
    engine = Engine(model._params, config, model.compute, model._vocab, model.mesh, slots=64)
    engine.run(requests)
    asked = sum(len(example.ids) + sampling.max_new_tokens for example, sampling in requests)
    token = 4 * 2 * decoder.layers * decoder.kv_heads * decoder.head_dim  # bytes of one, float32
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(engine._state.cache))
    assert held / (asked * token) < 1.3


def test_samples_do_not_depend_on_the_batch(model, prompts):
    requests = [
        (prompt, Sampling(20, temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, seed=i))
        for i, prompt in enumerate(prompts)
    ]
    together = engine(model, slots=3).run(requests)
    assert together == [engine(model, slots=1).run([request])[0] for request in requests]
    assert len({tuple(output.ids) for output in together}) == len(prompts)
    other_seed = [(e, dataclasses.replace(s, seed=s.seed + 100)) for e, s in requests]
    assert engine(model, slots=3).run(other_seed) != together


def test_audio_ids_are_never_generated(model):
    params = always(model, [5, AUDIO])
    output = engine(model, params=params).run([(Example(np.array([5])), Sampling(4))])[0]
    assert AUDIO not in output.ids
    allowed = engine(model, Vocabulary(448, AUDIO), params=params)
    assert allowed.run([(Example(np.array([5])), Sampling(2))])[0].ids == [AUDIO, 5]


def test_stop_ids_end_an_answer_and_are_dropped(model):
    params = always(model, [5, 6, 7, 8])
    requests = [
        (Example(np.array([5])), Sampling(10, stop_ids=(8,))),
        (Example(np.array([5])), Sampling(3)),
        (Example(np.array([7])), Sampling(10)),
        (Example(np.array([8])), Sampling(10)),
    ]
    outputs = engine(model, Vocabulary(448, AUDIO, stop=(5,)), params=params).run(requests)
    assert [(o.ids, o.finish_reason) for o in outputs] == [
        ([6, 7], "stop"),
        ([6, 7, 8], "length"),
        ([8], "stop"),
        ([], "stop"),
    ]


@pytest.mark.parametrize(("period", "tokens"), [(1, 49), (3, 51), (16, 112), (32, 224)])
def test_loop_guard_ends_degenerate_repetition(model, period, tokens):
    cycle = list(range(5, 5 + period))
    params = always(model, cycle)
    prompt = Example(np.array([cycle[-1]]))
    output = engine(model, params=params).run([(prompt, Sampling(600))])[0]
    assert (len(output.ids), output.finish_reason) == (tokens, "loop")
    assert output.ids[:period] == cycle
    free = engine(model, params=params).run([(prompt, Sampling(600, loop_guard=False))])[0]
    assert (len(free.ids), free.finish_reason) == (600, "length")


def test_a_varied_answer_does_not_trip_the_loop_guard(model, prompts):
    request = (prompts[2], Sampling(200, temperature=1.5, seed=3))
    assert engine(model).run([request])[0].finish_reason == "length"


def test_thinking_budget_closes_the_block(model):
    think_open, think_close, newline = 20, 21, 22
    vocab = Vocabulary(
        448, AUDIO, (), (9,), think_open, think_close, (newline, think_close, newline)
    )
    params = always(model, [20, 5, 6, 7])  # thinks 5 6 7 20 5 6 7 ... for ever
    prompt = Example(np.array([20]))  # the prompt has opened the block
    run = engine(model, vocab, params=params).run
    budget = Sampling(9, thinking_budget=4, loop_guard=False)
    forced = run([(prompt, budget)])[0].ids
    assert forced[:4] == [5, 6, 7, 20]
    assert forced[4:7] == [newline, think_close, newline]
    unlimited = run([(prompt, Sampling(9, loop_guard=False))])[0].ids
    assert think_close not in unlimited
    outside = Example(np.array([20, 21, 5]))  # closed again in the prompt: nothing to close
    assert run([(outside, dataclasses.replace(budget, max_new_tokens=3))])[0].ids == [6, 7, 20]


def test_stop_strings_cut_at_the_first_match(model):
    params = always(model, [5, 6, 7, 8])

    def decode(ids):
        return "".join({5: "a", 6: "b", 7: "cX", 8: "d"}[i] for i in ids)

    request = (Example(np.array([8])), Sampling(40, stop=("Xda",), loop_guard=False))
    output = engine(model, params=params, decode=decode).run([request])[0]
    assert decode(output.ids) == "abcXda"
    assert output.finish_reason == "stop"


def test_repetition_penalty_and_seen_prompt_tokens(model, prompts):
    plain = engine(model).run([(prompts[1], Sampling(30))])[0].ids
    penalised = engine(model).run([(prompts[1], Sampling(30, repetition_penalty=5.0))])[0].ids
    assert len(set(penalised)) == 30 > len(set(plain))
    assert not set(penalised) & set(prompts[1].ids.tolist())


def test_slots_refill_and_report_as_they_go(model, prompts):
    limits = [3, 40, 5, 4, 30, 2, 6]
    requests = [(p, Sampling(n, loop_guard=False)) for p, n in zip(prompts, limits, strict=True)]
    done = []
    outputs = engine(model, slots=2).run(requests, on_done=lambda i, output: done.append(i))
    assert [len(output.ids) for output in outputs] == limits
    assert sorted(done) == list(range(7))
    assert outputs == engine(model, slots=8).run(requests)


def test_streaming_tells_every_token(model, prompts):
    heard = []
    request = (prompts[0], Sampling(6, loop_guard=False))
    output = engine(model).run([request], on_token=lambda i, ids: heard.append(list(ids)))[0]
    assert heard[-1] == output.ids
    assert [len(ids) for ids in heard] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("size", [None, Size(4, 32, 64)], ids=["of the requests", "fixed"])
@pytest.mark.parametrize("broken", ["decode_until", "encode"])
def test_an_interrupted_answer_leaves_an_engine_that_can_be_used(
    model, prompts, broken, size, monkeypatch
):
    """Ctrl-C between a program and its result: the state was donated, and its successor is lost."""
    requests = [(prompt, Sampling(max_new_tokens=6)) for prompt in prompts[1:4]]
    expected = engine(model).run(requests)
    ours = engine(model, size=size)
    module = hearing if broken == "encode" else engine_module
    program = getattr(module, broken)

    def interrupted(*args, **static):
        jax.block_until_ready(program(*args, **static))
        raise KeyboardInterrupt

    monkeypatch.setattr(module, broken, interrupted)
    with pytest.raises(KeyboardInterrupt):
        ours.run(requests)
    monkeypatch.setattr(module, broken, program)
    assert not ours.busy
    assert [each.ids for each in ours.run(requests)] == [each.ids for each in expected]


def test_prompts_end_at_the_models_last_position(model):
    config = dataclasses.replace(
        model.config, decoder=dataclasses.replace(model.config.decoder, max_positions=40)
    )
    short = Engine(model.params, config, model.compute, VOCAB, model.mesh)
    output = short.run([(Example(np.arange(30)), Sampling(100, loop_guard=False))])[0]
    assert (len(output.ids), output.finish_reason) == (10, "length")
    with pytest.raises(InputError, match="40 tokens, but the model has 40 positions"):
        short.run([(Example(np.arange(40)), Sampling(1))])


def test_placeholders_must_match_the_clips(model, prompts):
    with pytest.raises(InputError, match="audio placeholders"):
        model.generate_ids(prompts[1].ids, prompts[2].mels)
