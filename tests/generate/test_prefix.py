"""Several questions about one clip: it is encoded once, and answers are as if asked alone."""

import dataclasses
import weakref

import jax
import numpy as np
import pytest
from tiny_model import AUDIO_ID, tone, write_checkpoint, write_wav

import moss_audio_jax as mj
from moss_audio_jax.data.batch import Example, Shape, make_batch
from moss_audio_jax.errors import InputError
from moss_audio_jax.evaluate import clips, infer
from moss_audio_jax.evaluate.benchmarks import Item
from moss_audio_jax.generate import engine as engine_module
from moss_audio_jax.generate import request
from moss_audio_jax.generate.engine import Engine
from moss_audio_jax.generate.families import Family, find_families
from moss_audio_jax.generate.sampling import Sampling
from moss_audio_jax.generate.vocabulary import Vocabulary
from moss_audio_jax.models import cache as kv_cache
from moss_audio_jax.models import encoder, moss_audio

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


def test_families_by_ids_and_clips():
    mel = clip(16, 0)
    examples = [
        ask(mel, [1, 2, 3]),
        ask(clip(16, 1), [1, 2, 3]),  # other sound
        ask(mel.copy(), [1, 2]),
        ask(mel, [1, 2, 3], head=(7, 9)),  # other words before the sound
        Example(ask(mel, []).ids[:-2], (mel,)),  # ends with the sound
        ask(mel.astype(np.float64), [1, 2, 3]),
        Example(np.arange(9)),
        Example(np.arange(9)),
        ask(mel, [1, 5]),
    ]
    found = find_families(examples, AUDIO_ID)
    together = [family for family in found if family.shared]
    assert together == [Family([0, 2, 8], len(ask(mel, [1]).ids))]
    assert sorted(family.members for family in found if not family.shared) == [
        [1],
        [3],
        [4],
        [5],
        [6],
        [7],
    ]
    # Never all of a prompt: something must be left to run.
    (twice,) = find_families(examples[:1] * 2, AUDIO_ID)
    assert twice == Family([0, 1], len(examples[0].ids) - 1)
    two = [Example(np.tile(e.ids, 2), e.mels * 2) for e in (examples[0], examples[2])]
    assert find_families(two, AUDIO_ID)[0].shared == 0  # they part between their clips


def test_extended_logits_equal_whole_prompts(load):
    """Prefixes and rests of different lengths in one batch, on 8 devices, within 1e-5."""
    model = load(MESH)
    encoder_config = model.config.encoder
    long, short = clip(500, 0), clip(90, 1)
    begins = [ask(short, []), ask(long, [])]
    row = np.array([1, 0, 1, 1])
    rests = [[30], [20] * 32, [31] * 17, [32, 33]]
    examples = [Example(np.r_[begins[r].ids, t], begins[r].mels) for r, t in zip(row, rests)]  # noqa: B905
    prefix = make_batch([[e] for e in begins], Shape(2, 128, 2, 400), encoder_config, AUDIO_ID)
    texts = [[Example(np.array(rest))] for rest in rests]
    batch = make_batch(texts, Shape(4, 32, 0, 400), encoder_config, AUDIO_ID)

    @jax.jit
    def in_two(params, prefix, batch, row, start):
        _, cache = moss_audio.prefill(params, model.config, model.compute, prefix, 128)
        cache = kv_cache.take_slots(cache, row, 144)
        return moss_audio.extend(params, model.config, model.compute, batch, cache, start)[0]

    with jax.set_mesh(model.mesh):
        start = np.array([len(begins[r].ids) for r in row])
        found = in_two(model.params, prefix, batch, row, start)
    whole = [logits[-1] for logits in model.logits_batch([(e.ids, e.mels) for e in examples])]
    np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-5 * np.abs(whole).max())


def test_answers_are_those_of_prompts_alone(load, alone):
    """Greedy, sampled and penalised, while slots are refilled: siblings change nothing."""
    run = engine(load(), 3).run
    assert run(requests()) == alone
    programs = (engine_module.prefill, engine_module.extend, engine_module.take_slots)
    before = [program._cache_size() for program in programs]
    assert run(requests()) == alone
    assert [program._cache_size() for program in programs] == before


def test_eight_devices(load, alone):
    families = [0, 1, 2, 3, 4, 5, 7, 8]
    outputs = engine(load(MESH), 8).run([requests()[i] for i in families])
    assert outputs == [alone[i] for i in families]


def test_full_attention_and_an_int8_cache(load):
    """Only the slots' cache is rounded, not the stored prefix."""
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


def test_the_encoder_hears_a_family_once_and_its_prefix_goes_with_it(load, monkeypatch):
    heard = []  # chunks of every batch the encoder has really run on
    caches = []
    encode_rows, start = encoder.encode_rows, engine_module.prefill

    def counted(params, config, compute, mels, frames):
        jax.debug.callback(lambda f: heard.append(int((f > 0).any(-1).sum())), frames)
        return encode_rows(params, config, compute, mels, frames)

    def watched(*args, **more):
        made = start(*args, **more)
        caches.append(weakref.ref(made.cache[0].key))
        return made

    monkeypatch.setattr(encoder, "encode_rows", counted)
    monkeypatch.setattr(engine_module, "prefill", watched)
    model = load()
    long, short = clip(500, 0), clip(90, 1)
    limits = [4, 4, 2, 7, 3]
    prompts = [ask(long, [30]), ask(long.copy(), [31])]
    prompts += [ask(short, [20 + i] * 2) for i in range(3)]
    held = []
    outputs = engine(
        model,
        2,
        compute=dataclasses.replace(model.compute, encoder_chunks=31),  # traces anew
    ).run(
        [(p, Sampling(n, loop_guard=False)) for p, n in zip(prompts, limits, strict=True)],
        on_done=lambda i, _: held.append((i, sum(cache() is not None for cache in caches))),
    )
    jax.effects_barrier()
    assert [len(output.ids) for output in outputs] == limits
    assert heard == [2, 1]  # 5 s and 0.9 s, in chunks of 4 s; five questions
    # While the third question about the short clip waits, what it begins with is kept; not longer.
    assert held == [(0, 0), (1, 0), (2, 1), (4, 0), (3, 0)]


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
