"""Drafts: what they propose, and that no answer changes with them.

What it does not cover: logits. A pass of another width adds up in another order, so they differ in
their last bits; an answer could change where two tokens are as close as that.
"""

import dataclasses

import numpy as np
import pytest
from golden_prompts import OWN, golden_prompts
from scipy import stats
from test_engine import AUDIO, VOCAB, always

import moss_audio_jax as mj
from moss_audio_jax.config import Compute
from moss_audio_jax.data.batch import Example
from moss_audio_jax.generate import drafts
from moss_audio_jax.generate import engine as engine_module
from moss_audio_jax.generate.drafts import NOTHING, WIDTH, CtcHead, Pace, Scribe, propose
from moss_audio_jax.generate.engine import Engine
from moss_audio_jax.generate.sampling import Sampling
from moss_audio_jax.generate.vocabulary import Vocabulary

MESH = {"data": 4, "tensor": 2}


@pytest.fixture(scope="module")
def load():
    made = {}

    def load(mesh=None):
        key = str(mesh)
        if key not in made:
            made[key] = mj.MossAudio.load(OWN, "float32", mesh)
        return made[key]

    return load


@pytest.fixture(scope="module")
def model(load):
    return load()


@pytest.fixture(scope="module")
def prompts():
    return golden_prompts()


@pytest.fixture
def passes(monkeypatch):
    """Every pass drafts; a list of how many passes each call of the device loop made."""
    made, draft_until = [], engine_module.draft_until

    def counted(*args, **static):
        state, count = draft_until(*args, **static)
        made.append(int(count))
        return state, count

    monkeypatch.setattr(engine_module, "draft_until", counted)
    monkeypatch.setattr(Pace, "next", lambda self, limit: (WIDTH, limit))
    return made


def engine(model, slots=3, vocab=VOCAB, params=None, decode=None, scribe=None):
    params = model.params if params is None else params
    return Engine(params, model.config, model.compute, vocab, model.mesh, decode, slots, scribe)


def drafted(requests):
    return [(e, dataclasses.replace(s, drafts=True)) for e, s in requests]


def proposed(hints, output, count, width=4):
    rows = [np.array(x, np.int32)[None] for x in (hints, output, count)]
    return propose(*rows, width)[0].tolist()


def test_a_draft_goes_on_after_the_place_most_like_the_end():
    hints = [NOTHING, 1, 2, 3, 4, 5, 6, 9, 3, 8, 8]
    assert proposed(hints, [2, 3, 0, 0], 2) == [4, 5, 6, 9]
    assert proposed(hints, [9, 3, 0, 0], 2)[:2] == [8, 8]
    # Of two places that are alike the last one; what repeats itself goes on doing so.
    assert proposed([NOTHING] * 4, [7, 5, 7, 6, 7, 6, 0], 6) == [7, 6, 7, 6]
    assert proposed([NOTHING] * 4, [7, 0, 0, 0], 1) == [7, 7, 7, 7]


def test_a_draft_goes_on_after_a_token_that_was_wrong_and_repeats_it():
    hints = [50, 1, 2, 3, 60, 1, 2, 3, 51, 52, 53]
    assert proposed(hints, [50, 1, 2, 4, 0, 0, 0, 0], 4) == [60, 1, 2, 4]
    assert proposed(hints, [50, 1, 2, 4, 60, 0, 0, 0], 5) == [1, 2, 4, 51]


class Letters:
    """A tokenizer of single letters."""

    def encode(self, text):
        return [ord(letter) for letter in text]

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_a_scribe_writes_all_forms_of_what_was_heard():
    scribe = Scribe(CtcHead(np.zeros((1, 201)), np.zeros(201)), Letters())
    blank, m, y, a = 200, *map(ord, "mya")
    pieces = np.array([blank, m, y, y, a, blank, blank, blank, blank, m, blank])
    text = Letters().decode(scribe.write(pieces))
    assert text == ("my a m[0.08]my a[0.40][0.72]m[0.80][0.08]my[0.32][0.32]a[0.40][0.72]m[0.80]")
    assert scribe.write(np.full(5, blank)) == []
    assert scribe.write(np.zeros(0, int)) == []


def test_a_ctc_head_of_another_model_is_no_scribe(model):
    decoder, encoder = model.config.decoder, model.config.encoder

    def of(width, pieces):
        named = {"kernel": np.zeros((width, pieces)), "bias": np.zeros(pieces)}
        params = {f"helpers/pieces/{name}": x for name, x in named.items()}
        return drafts.scribe_of(params, model.config, Letters())

    assert of(encoder.output_dim, decoder.vocab_size + 1) is not None
    assert of(encoder.output_dim, decoder.vocab_size) is None
    assert of(encoder.output_dim + 1, decoder.vocab_size + 1) is None
    assert drafts.scribe_of({}, model.config, Letters()) is None


def requests_of(prompts):
    limits = [40, 3, 64, 5, 30, 1, 50]
    numbered = enumerate(zip(prompts, limits, strict=True))
    return [(prompt, Sampling(n, loop_guard=i % 2 == 1)) for i, (prompt, n) in numbered]


def test_greedy_answers_are_those_without_drafts(model, prompts, passes):
    requests = requests_of(prompts)
    plain = engine(model).run(requests)
    assert not passes
    for slots in (1, 3, 8):
        assert engine(model, slots).run(drafted(requests)) == plain
    assert passes


def test_what_was_heard_changes_no_answer(model, prompts, passes):
    encoder, decoder = model.config.encoder, model.config.decoder
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(encoder.output_dim, decoder.vocab_size + 1)).astype(np.float32)
    wrote = []

    class Spy(Scribe):
        def write(self, pieces):
            wrote.append(len(pieces))
            return [int(piece) for piece in pieces]

    scribe = Spy(CtcHead(kernel, np.zeros(decoder.vocab_size + 1, np.float32)), Letters())
    requests = requests_of(prompts)
    requests += [(Example(np.append(e.ids, 3), e.mels), s) for e, s in requests[:4]]  # siblings
    plain = engine(model).run(requests)
    assert engine(model, scribe=scribe).run(drafted(requests)) == plain
    of = [sum(example.ids == AUDIO) for example, _ in requests]
    assert set(wrote) == set(of)


def test_eight_devices(load, prompts, passes):
    requests = requests_of(prompts)
    plain = engine(load()).run(requests)
    assert engine(load(MESH), 8).run(drafted(requests)) == plain
    assert passes


def test_drafts_save_passes_and_stop_where_the_answer_stops(model, passes):
    params = always(model, list(range(5, 35)))
    prompt = Example(np.arange(5, 35))  # says what the answer will be
    vocab = Vocabulary(448, AUDIO, stop=(20,))
    request = (prompt, Sampling(100, loop_guard=False))
    for ids, reason, of in (
        (list(range(5, 20)), "stop", vocab),
        ([*range(5, 35)] * 3 + [*range(5, 15)], "length", VOCAB),
    ):
        passes.clear()
        output = engine(model, 1, of, params).run(drafted([request]))[0]
        assert (output.ids, output.finish_reason) == (ids, reason)
        assert sum(passes) <= 2 + len(ids) // WIDTH


def test_loop_guard_thinking_budget_and_penalty_see_every_token(model, prompts, passes):
    params = always(model, [20, 5, 6, 7])
    vocab = Vocabulary(448, AUDIO, (), (9,), 20, 21, (22, 21, 22))
    prompt = Example(np.array([20]))
    requests = [
        (prompt, Sampling(600)),
        (prompt, Sampling(9, thinking_budget=4, loop_guard=False)),
        (prompt, Sampling(30, thinking_budget=7)),
        (prompt, Sampling(20, stop_ids=(7,))),
    ]
    plain = engine(model, 2, vocab, params).run(requests)
    assert engine(model, 2, vocab, params).run(drafted(requests)) == plain
    assert {output.finish_reason for output in plain} == {"loop", "length", "stop"}
    penalised = [(p, Sampling(30, repetition_penalty=5.0)) for p in prompts[:3]]
    assert engine(model).run(drafted(penalised)) == engine(model).run(penalised)
    assert passes


def test_streams_tell_every_token_and_stop_strings_cut(model, passes):
    params = always(model, [5, 6, 7, 8])

    def decode(ids):
        return "".join({5: "a", 6: "b", 7: "cX", 8: "d"}[i] for i in ids)

    heard = []
    request = (Example(np.array([8])), Sampling(40, stop=("Xda",), loop_guard=False))
    run = engine(model, 1, params=params, decode=decode).run
    output = run(drafted([request]), on_token=lambda _, ids: heard.append(list(ids)))[0]
    assert decode(output.ids) == "abcXda"
    assert run(drafted([request])) == [output]
    whole = (Example(np.array([8])), Sampling(30, loop_guard=False))
    heard.clear()
    run(drafted([whole]), on_token=lambda _, ids: heard.append(list(ids)))
    assert [len(ids) for ids in heard] == list(range(1, 31))
    assert sum(passes) < 30


def test_sampled_answers_are_those_without_drafts(model, prompts, passes):
    requests = [
        (prompt, Sampling(20, temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, seed=i))
        for i, prompt in enumerate(prompts)
    ]
    assert engine(model).run(drafted(requests)) == engine(model).run(requests)
    assert passes


def test_sampled_tokens_keep_their_distribution(model, passes):
    """With drafts, against as many answers without them and with other seeds."""
    params = always(model, [5, 6, 7, 8])
    # The next token of the cycle has a logit of sqrt(D), all others 0: at this temperature it comes
    # in 60% of the cases.
    temperature = model.config.decoder.hidden_size**0.5 / np.log(1.5 * (448 - 4))
    prompt = Example(np.array([5, 6, 7, 8, 5, 6]))

    def counts(first, drafts):
        requests = [
            (prompt, Sampling(5, temperature=temperature, seed=seed, drafts=drafts))
            for seed in range(first, first + 512)
        ]
        ids = [output.ids for output in engine(model, 512, params=params).run(requests)]
        cycle = [7, 8, 5, 6, 7]  # for how many tokens does an answer follow it?
        stays = [next((i for i in range(5) if a[i] != cycle[i]), 5) for a in ids]
        return np.bincount(stays, minlength=6)

    found, expected = counts(0, True), counts(10_000, False)
    assert passes
    assert min(*found, *expected) > 10
    assert stats.chi2_contingency([found, expected]).pvalue > 0.001


def test_drafts_go_on_while_they_pay(monkeypatch):
    pace = Pace(1, Compute("float32"))  # on a CPU a pass of 8 takes as long as three steps
    assert pace.next(1000) == (WIDTH, drafts._TRIAL)
    pace.told(tokens=5 * drafts._TRIAL, passes=drafts._TRIAL)
    assert pace.next(1000)[0] == WIDTH
    for _ in range(5):
        pace.told(tokens=drafts._TRIAL, passes=drafts._TRIAL)
    assert pace.next(1000) == (1, drafts._REST)
    assert pace.next(1000) == (WIDTH, drafts._TRIAL)  # tried again
    monkeypatch.setattr(drafts, "_cost", lambda rows, compute: rows)
    assert Pace(16, Compute()).next(1000) == (1, 1000)  # never pays


@pytest.mark.parametrize(
    ("compute", "goes_on"),
    [
        (Compute("float32"), False),
        (Compute("bfloat16"), True),
        (Compute("float32", quantize="weights"), True),
    ],
)
def test_a_pass_costs_less_where_weights_are_converted(compute, goes_on):
    pace = Pace(1, compute)
    pace.told(tokens=5, passes=2)
    assert (pace.next(1000)[0] == WIDTH) == goes_on


def test_a_model_that_repeats_its_prompt_switches_drafts_on_and_a_random_one_off(
    model, monkeypatch
):
    widths = []
    next_of = Pace.next
    monkeypatch.setattr(
        Pace, "next", lambda self, limit: widths.append(next_of(self, limit)) or widths[-1]
    )
    params = always(model, list(range(5, 35)))
    request = (Example(np.arange(5, 35)), Sampling(300, loop_guard=False, drafts=True))
    engine(model, 1, params=params).run([request])
    assert {width for width, _ in widths} == {WIDTH}
    widths.clear()
    request = (Example(np.arange(30)), Sampling(100, temperature=2.0, drafts=True))
    engine(model, 1).run([request])
    assert 1 in {width for width, _ in widths}
