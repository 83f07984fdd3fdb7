"""Which programs an answer compiles. Each takes up to two seconds of a first answer.

It counts and does not time: tools/bench/first.py does. Programs of loading are not counted.
"""

import contextlib
import dataclasses
import queue
from pathlib import Path

import jax
import numpy as np
import pytest
from golden_prompts import OWN, golden_prompts

import moss_audio_jax as mj
from moss_audio_jax.config import DEFAULT_CHECKPOINT
from moss_audio_jax.generate.request import Prepared
from moss_audio_jax.generate.sampling import Sampling

CLIP = Path(DEFAULT_CHECKPOINT).parent / "demo" / "two_people.flac"
COMPILED = "/jax/core/compile/backend_compile_duration"  # also where the cache on disk has it


@contextlib.contextmanager
def compiled():
    """A list of the names of programs that are compiled in this context."""
    names = []

    def listen(event, _, fun_name="", **__):
        if event == COMPILED:
            names.append(fun_name.removeprefix("jit(").removesuffix(")"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def model():
    jax.clear_caches()
    return mj.MossAudio.load(dtype="float32")


def test_a_first_answer_compiles_four_programs_and_one_like_it_none(model):
    wav = mj.load_audio(CLIP)
    with compiled() as first:
        model.generate("What is heard?", [wav], max_new_tokens=8)
    assert first == ["empty_state", "encode", "prefill", "decode_until"]
    with compiled() as second:
        model.generate("Transcribe the speech.", [wav[::-1].copy()], max_new_tokens=9)
        model.encode_audio([mj.log_mel(wav)])
        model.familiarity(wav[:80_000])
    assert second == []


def test_another_question_about_a_clip_compiles_what_continues_a_prompt(model):
    wav = 0.5 * mj.load_audio(CLIP)  # whose log-mel is another one
    model.generate("What is heard?", [wav], max_new_tokens=8)
    with compiled() as names:
        model.generate("Transcribe the speech.", [wav], max_new_tokens=8)
        model.generate("How many people speak?", [wav], max_new_tokens=8)
    assert names == ["extend"]


def test_a_sampled_answer_compiles_what_samples(model):
    wav = mj.load_audio(CLIP)
    for _ in range(2):
        model.generate("What is heard?", [wav], max_new_tokens=8)
    with compiled() as names:
        model.generate("What is heard?", [wav], max_new_tokens=8, temperature=1.0)
    assert names == ["extend", "decode_until"]
    with compiled() as names:
        model.generate("What is heard?", [wav], max_new_tokens=8, temperature=0.5, top_p=0.9)
    assert names == []


def test_a_service_that_compiled_at_its_start_compiles_nothing_for_any_request():
    """Prompts short and long, alone and together, begun before, sampled, guided, with
    log-probabilities, cancelled; with sound and without."""
    model = mj.MossAudio.load(OWN, "float32")
    prompts = golden_prompts()
    told = []

    class Anything:
        def allowed(self):
            return np.ones(model._vocab.size, bool)

        def push(self, token):
            pass

    def requests():
        guided = Prepared(prompts[1].ids, prompts[1].mels, guide=Anything())
        long = dataclasses.replace(prompts[0], ids=np.resize(prompts[0].ids[:1], 900), mels=())
        yield from ((prompt, Sampling(40, loop_guard=False)) for prompt in prompts)
        yield guided, Sampling(5)
        yield prompts[2], Sampling(7, logprobs=3, temperature=1.0, top_p=0.9)
        yield long, Sampling(60, loop_guard=False)
        yield dataclasses.replace(long, ids=np.append(long.ids, long.ids[:70])), Sampling(3)
        yield dataclasses.replace(long, ids=np.append(long.ids, long.ids[:300])), Sampling(3)

    compiling = lambda number, count: told.append((number, count))  # noqa: E731
    with model.service(16, 2048, 64, compiling=compiling) as service:
        assert [number for number, _ in told] == [*range(1, told[-1][1] + 1)]
        with compiled() as names:
            ended = queue.Queue()
            for each in [*requests(), *requests()]:
                service.submit(*each, lambda p: p.output is not None and ended.put(p.output))
            service.cancel(service.submit(prompts[3], Sampling(64), lambda _: None))
            reasons = {ended.get(timeout=120).finish_reason for _ in range(24)}
            for each in requests():
                service.answer(*each)
    assert reasons <= {"stop", "length"}
    assert names == []
