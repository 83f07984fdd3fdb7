"""Several questions about one clip: it is encoded once, and answers are as if asked alone."""

import dataclasses

import jax
import numpy as np
import paged
import pytest
from tiny_model import AUDIO_ID, tone, write_checkpoint, write_wav

import moss_audio_jax as mj
from moss_audio_jax.config import EncoderConfig
from moss_audio_jax.data.batch import Example, Shape, make_batch
from moss_audio_jax.errors import InputError
from moss_audio_jax.evaluate import clips, infer
from moss_audio_jax.evaluate.benchmarks import Item
from moss_audio_jax.generate import engine as engine_module
from moss_audio_jax.generate import request
from moss_audio_jax.generate.engine import Engine
from moss_audio_jax.generate.hearing import sound_of
from moss_audio_jax.generate.pages import Pages, marks_of, page_keys
from moss_audio_jax.generate.sampling import Sampling
from moss_audio_jax.generate.vocabulary import Vocabulary
from moss_audio_jax.models import encoder, moss_audio
from moss_audio_jax.models.cache import PAGE

VOCAB = Vocabulary(384, AUDIO_ID, forbidden=(AUDIO_ID, AUDIO_ID + 1, AUDIO_ID + 2))
MESH = {"data": 4, "tensor": 2}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("prefix") / "toy")
    return lambda mesh=None, **more: mj.MossAudio.load(folder, "float32", mesh=mesh, **more)


def clip(frames, seed):
    return np.random.default_rng(seed).normal(size=(128, frames)).astype(np.float32)


def ask(mel, question, head=(7, 8)):
    placeholders = [AUDIO_ID] * -(-mel.shape[1] // 8)
    ids = [*head, AUDIO_ID + 1, *placeholders, AUDIO_ID + 2, 10, *question]
    return Example(np.array(ids, np.int32), (mel,))


def requests():
    """(prompt, sampling) of three families of unequal length and one single prompt."""
    long, short, other = clip(500, 0), clip(90, 1), clip(90, 2)
    prompts = [
        ask(short, [20, 21]),
        ask(long, [30]),
        ask(short.copy(), [20, 22, 23, 24]),  # loaded again
        ask(other, [20, 21]),  # other sound, same length: same ids as the first
        ask(long, [30]),  # the same question again
        ask(short, [25] * 30),
        ask(clip(300, 3), [26]),
        ask(other, [27]),
        ask(long, [31, 32]),
    ]
    ways = ({}, {"temperature": 0.9, "top_k": 50}, {"repetition_penalty": 1.3})
    return [
        (prompt, Sampling(4 + 3 * i, loop_guard=False, seed=i, **ways[i % 3]))
        for i, prompt in enumerate(prompts)
    ]


def engine(model, slots, decode=None, compute=None):
    compute = compute or model.compute
    return Engine(model.params, model.config, compute, VOCAB, model.mesh, decode, slots)


@pytest.fixture(scope="module")
def alone(load):
    model = load()
    outputs = [engine(model, 1).run([request])[0] for request in requests()]
    assert len({tuple(output.ids) for output in outputs}) == len(outputs)
    return outputs


def test_prompts_share_what_is_the_same_up_to_the_end_of_a_page():
    mel, config = clip(160, 0), EncoderConfig(chunk_frames=400)

    def keys(example):
        return page_keys(marks_of(example, sound_of(example.mels, config), AUDIO_ID))

    plain = ask(mel, range(20, 40))

    def shared(example):
        return [a == b for a, b in zip(keys(plain), keys(example), strict=False)]

    assert shared(ask(mel.copy(), range(20, 40))) == [True] * 2
    assert shared(ask(mel, [*range(20, 26), 50, 51, 52, 53])) == [True, False]
    assert shared(ask(clip(160, 1), range(20, 40))) == [False, False]  # other sound
    assert shared(ask(mel, range(20, 40), head=(7, 9))) == [False, False]
    twice = Example(np.tile(plain.ids, 2), plain.mels * 2)
    other = Example(twice.ids, (plain.mels[0], clip(160, 1)))
    same = [a == b for a, b in zip(keys(twice), keys(other), strict=True)]
    assert same == [True] * 3 + [False] * (len(same) - 3)  # they part in the second clip
    # Another clip of the prompt pads this one to another length, so it is heard otherwise.
    beside = Example(np.r_[plain.ids, ask(clip(300, 2), [5]).ids], (mel, clip(300, 2)))
    assert shared(beside)[1] is False
    # A clip that grows keeps its whole chunks.
    long = clip(1000, 3)
    grown = [keys(ask(long[:, :n], [30])) for n in (800, 1000)]
    same = [a == b for a, b in zip(*grown, strict=False)]
    assert same[:6] == [True] * 6


def test_pages_are_kept_until_others_need_them():
    pages = Pages(4)
    assert pages.promise([], 3)
    assert not pages.promise([], 2)  # one is left
    first = [pages.take() for _ in range(3)]
    for page, key in zip(first, (b"a", b"b"), strict=False):
        pages.learn(page, key)
    pages.release(first, 0)
    assert (pages.available, pages.used) == (4, 0)
    assert pages.known([b"a", b"b", b"c"]) == first[:2]
    assert pages.known([b"b", b"x"]) == first[1:2]
    assert pages.promise(first[:1], 3)  # the first one, and three more: all
    taken = {pages.take() for _ in range(3)}
    assert taken == {0, 1, 2, 3} - {first[0]}
    assert pages.known([b"a", b"b"]) == first[:1]  # the second one had to go
    assert not pages.promise([], 1)
    pages.release([*taken], 0)
    assert pages.promise(first[:1], 0)  # used twice
    pages.release(first[:1], 0)
    assert pages.used == 1


def test_extended_logits_equal_whole_prompts(load):
    """Prefixes and rests of different lengths in one batch, over four devices, within 1e-5."""
    model = load({"tensor": 2})
    encoder_config = model.config.encoder
    long, short = clip(500, 0), clip(90, 1)
    # No sound in the last page that is not whole.
    begins = [ask(each, [9] * PAGE) for each in (short, long)]
    row = np.array([1, 0, 1, 1])
    rests = [[30], [20] * 32, [31] * 17, [32, 33]]
    examples = [Example(np.r_[begins[r].ids, t], begins[r].mels) for r, t in zip(row, rests)]  # noqa: B905
    prefix = make_batch([begins], Shape(1, 192, 4, 400), encoder_config, AUDIO_ID)
    # Whole pages of a beginning are shared; what is left of it is run again with each rest.
    start = np.array([len(begins[r].ids) // PAGE * PAGE for r in row])
    texts = [[Example(each.ids[at:])] for each, at in zip(examples, start, strict=True)]
    batch = make_batch(texts, Shape(4, 64, 0, 400), encoder_config, AUDIO_ID)
    tables = np.zeros((4, 16), int)
    for at, r in enumerate(row):
        shared = start[at] // PAGE
        tables[at, :shared] = 16 * r + np.arange(shared)
        tables[at, shared : shared + 4] = (8, 12, 24, 28)[at] + np.arange(4)

    @jax.jit
    def in_two(params, prefix, batch, tables, start):
        _, cache = paged.prefilled(params, model.config, model.compute, prefix, 256, 2)
        return moss_audio.extend(params, model.config, model.compute, batch, cache, tables, start)[
            0
        ]

    with jax.set_mesh(model.mesh):
        found = in_two(model.params, prefix, batch, tables, start)
    whole = [logits[-1] for logits in model.logits_batch([(e.ids, e.mels) for e in examples])]
    np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-5 * np.abs(whole).max())


def test_answers_are_those_of_prompts_alone(load, alone):
    """Greedy, sampled and penalised, while slots are refilled: siblings change nothing."""
    run = engine(load(), 3).run
    assert run(requests()) == alone
    assert run(requests()) == alone  # now all are known
    programs = (engine_module.prefill, engine_module.extend, engine_module.decode_until)
    before = [program._cache_size() for program in programs]
    assert run(requests()) == alone
    assert [program._cache_size() for program in programs] == before


def test_eight_devices(load, alone):
    families = [0, 1, 2, 3, 4, 5, 7, 8]
    outputs = engine(load(MESH), 8).run([requests()[i] for i in families])
    assert outputs == [alone[i] for i in families]


def test_full_attention_and_an_int8_cache(load):
    """A prompt attends to rounded keys and values, in one pass or in two."""
    model = load(encoder_attention="full")
    compute = dataclasses.replace(model.compute, quantize="weights+cache")
    some = [requests()[i] for i in (1, 4, 8)]  # 5 s in one piece
    together = engine(model, 3, compute=compute).run(some)
    assert together == [engine(model, 1, compute=compute).run([each])[0] for each in some]


def test_streams_and_stop_strings(load, alone):
    """Each prompt's stop string cuts its answer at the same place as alone."""
    model = load()
    decode = lambda ids: "".join(f"<{i}>" for i in ids)  # noqa: E731
    some = [
        (prompt, dataclasses.replace(sampling, stop=(decode(output.ids[2:4]),)))
        for (prompt, sampling), output in zip(requests(), alone, strict=True)
    ]
    heard = {}
    outputs = engine(model, 3, decode).run(some, on_token=heard.__setitem__)
    for output, (_, sampling), whole in zip(outputs, some, alone, strict=True):
        lengths = range(len(whole.ids) + 1)
        cut = next(n for n in lengths if sampling.stop[0] in decode(whole.ids[:n]))
        assert output.ids == whole.ids[:cut]
    assert {output.finish_reason for output in outputs} == {"stop"}
    assert [heard[number] for number in range(len(some))] == [output.ids for output in outputs]


def test_the_encoder_hears_a_clip_once(load, monkeypatch):
    heard = []  # chunks of every batch the encoder has really run on
    encode_rows = encoder.encode_rows

    def counted(params, config, compute, mels, frames):
        jax.debug.callback(lambda f: heard.append(int((f > 0).any(-1).sum())), frames)
        return encode_rows(params, config, compute, mels, frames)

    monkeypatch.setattr(encoder, "encode_rows", counted)
    model = load()
    long, short = clip(500, 0), clip(90, 1)
    prompts = [ask(long, [30]), ask(long.copy(), [31])]
    prompts += [ask(short, [20 + i] * 2) for i in range(3)]
    one = engine(
        model,
        2,
        compute=dataclasses.replace(model.compute, encoder_chunks=31),  # traces anew
    )
    asked = [(p, Sampling(n, loop_guard=False)) for p, n in zip(prompts, (4, 4, 2, 7, 3))]  # noqa: B905
    outputs = one.run(asked)
    jax.effects_barrier()
    assert [len(output.ids) for output in outputs] == [4, 4, 2, 7, 3]
    assert heard == [2]  # strips of 4 s for 5 s and 0.9 s; five questions
    # The second question about the long clip runs little more than its own words.
    whole = sum(len(prompt.ids) for prompt in prompts)
    assert one.counts["prompt_tokens"] == whole
    assert one.counts["cached_tokens"] >= len(prompts[0].ids) // PAGE * PAGE
    assert one.run(asked) == outputs
    jax.effects_barrier()
    assert heard == [2]
    # All pages were given back.
    assert one.held == (0, 0)


def test_an_evaluation_keeps_questions_of_a_clip_together(load, tmp_path, monkeypatch):
    model = load()
    paths = [str(write_wav(tmp_path / f"{i}.wav", tone(0.3, 200 + 100 * i))) for i in range(9)]
    counts = [5, 1, 40, 2, 3, 5, 1, 1, 4]
    items = [
        Item(f"{clip}-{question}", "open", "why?" * (question % 5 + 1), (path,), {}, {})
        for clip, (path, count) in enumerate(zip(paths, counts, strict=True))
        for question in range(count)
    ]
    runs = infer._runs(items)
    assert [item for run in runs for item in run] == items
    # A clip with very many questions may keep several processes busy.
    assert [len(run) for run in runs] == [5, 1, 16, 16, 8, 2, 3, 5, 1, 1, 4]
    groups = list(infer._groups(runs, dict.fromkeys((i.id for i in items), 1.0), batch_size=2))
    assert [run for group in groups for run in group] == runs
    assert max(sum(map(len, group)) for group in groups) == 16
    # Each clip is loaded once in a run, and prompts are those of `prepare`.
    expected = [model.prepare(mj.Request(item.prompt, item.audio)) for item in runs[0]]
    loaded = []
    monkeypatch.setattr(
        request, "load_audio", lambda path: loaded.append(path) or mj.load_audio(path)
    )
    too_long = dataclasses.replace(runs[0][1], prompt="x" * 300)
    prompts = clips._prepare(model, [runs[0][0], too_long, *runs[0][1:]])
    assert isinstance(prompts[1], InputError)
    assert "256 positions" in str(prompts.pop(1))
    assert loaded == [paths[0]]
    for prompt, one in zip(prompts, expected, strict=True):
        np.testing.assert_array_equal(prompt.ids, one.ids)
        assert prompt.mels[0] is prompts[0].mels[0]
        np.testing.assert_array_equal(prompt.mels[0], one.mels[0])
