"""Which programs an answer compiles. Each takes up to two seconds of a first answer.

It counts and does not time: tools/bench/first.py does. Programs of loading are not counted.
"""

import contextlib
from pathlib import Path

import jax
import pytest

import moss_audio_jax as mj
from moss_audio_jax.config import DEFAULT_CHECKPOINT

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
    assert first == ["encode", "empty_state", "prefill", "decode_until"]
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
