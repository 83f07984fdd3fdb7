"""Process 0 tells another what its engine does. Here both are threads with engines of their own;
tests/serve/test_mesh_processes.py has real processes.
"""

import dataclasses
import functools
import queue
import threading

import jax
import numpy as np
import pytest
from golden_prompts import OWN, golden_prompts
from jax.experimental import multihost_utils
from served import until
from test_guided import Rising
from test_service import Asker, sampling

import moss_audio_jax as mj
from moss_audio_jax.data.batch import Example
from moss_audio_jax.generate import engine as engine_module
from moss_audio_jax.generate import service as service_module
from moss_audio_jax.generate import together
from moss_audio_jax.generate.request import Prepared
from moss_audio_jax.generate.sampling import Sampling
from moss_audio_jax.generate.service import Service

SIZE = 2, 640, 64  # slots, tokens, new tokens of an answer


@pytest.fixture(scope="module")
def model():
    return mj.MossAudio.load(OWN, "float32")


@pytest.fixture
def pair(model, monkeypatch):
    """(service of "process 0", messages that it told), with a follower in another thread. At the
    end both must have run the same programs on the same arrays."""
    told, messages = queue.SimpleQueue(), []
    ran = {"engine": [], "follower": [], "MainThread": []}

    def me():
        return threading.current_thread().name

    def broadcast(array):
        if me() != "follower":
            messages.append(np.asarray(array).copy())
            told.put(messages[-1])
            return messages[-1]
        given = told.get(timeout=120)
        assert given.shape == array.shape  # or real processes would wait for ever
        return given

    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", broadcast)
    for name in ("prefill", "extend", "decode_until", "end"):
        program = getattr(engine_module, name)

        def noted(*args, name=name, program=program, **more):
            inputs = jax.tree.leaves((args[1 if name == "end" else 2 :], more.get("sampled")))
            ran[me()].append((name, [np.array(x) for x in inputs]))
            return program(*args, **more)

        monkeypatch.setattr(engine_module, name, noted)
    vocab = model.config.decoder.vocab_size
    follower = threading.Thread(
        target=functools.partial(together.follow, model._sized_engine(*SIZE), vocab),
        name="follower",
        daemon=True,
    )
    follower.start()
    with Service(model._sized_engine(*SIZE), speaker=together.Speaker()) as service:
        yield service, messages
    follower.join(120)
    assert not follower.is_alive()
    assert told.empty()
    assert [name for name, _ in ran["engine"]] == [name for name, _ in ran["follower"]]
    assert len(ran["engine"]) > 5
    for (name, mine), (_, theirs) in zip(ran["engine"], ran["follower"], strict=True):
        for a, b in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)


def test_all_that_an_engine_runs_is_the_same(model, pair):
    """Sampled, streamed, with sound, cancelled in line and while running, more than fits."""
    service, _ = pair
    prompts = golden_prompts()
    endless = Sampling(64, loop_guard=False)
    first = Asker(service, prompts[1], endless)
    askers = [Asker(service, prompts[i], sampling(i), i % 2 == 0) for i in range(7)]
    gone = [Asker(service, prompts[i], endless) for i in (3, 5)]
    assert len(first.told.get(timeout=120).ids) == 1
    for asker in (first, *gone):
        service.cancel(asker.number)
    assert first.answer().finish_reason == "cancelled"
    for number, asker in enumerate(askers):
        vars_of = {k: v for k, v in vars(sampling(number)).items() if k != "logprobs"}
        alone = model.generate_ids(prompts[number].ids, prompts[number].mels, **vars_of)
        assert asker.answer().ids == alone
    assert {asker.answer().finish_reason for asker in gone} == {"cancelled"}


def test_what_a_guide_allows_is_told(model, pair):
    service, _ = pair
    plain, stop = golden_prompts()[1], 3
    asked = Sampling(9, stop_ids=(stop,))

    def guided():
        guide = Rising(model.config.decoder.vocab_size, stop, 6)
        return Prepared(plain.ids, plain.mels, guide=guide)

    with model._engine(2) as engine:
        (alone,) = engine.run([(guided(), asked)])
    assert len(alone.ids) == 6
    assert Asker(service, guided(), asked).answer().ids == alone.ids
    assert Asker(service, guided(), asked, False).answer().ids == alone.ids


def test_sound_is_told_in_parts_between_the_tokens_of_others(model, pair, monkeypatch):
    monkeypatch.setattr(together, "_NEXT", 2**13)
    monkeypatch.setattr(together, "_TURN", 2**13)
    service, messages = pair
    long = golden_prompts()[2]
    bytes_of = sum(mel.nbytes for mel in long.mels)
    assert bytes_of > 8 * 2**13
    short = Asker(service, Example(np.arange(9)), Sampling(60, loop_guard=False))
    assert len(short.told.get(timeout=120).ids) == 1
    before = len(messages)
    late = Asker(service, long, Sampling(4, loop_guard=False))
    dropped = Asker(service, long, Sampling(4, loop_guard=False))
    service.cancel(dropped.number)  # before it has entered
    assert late.answer().ids == model.generate_ids(long.ids, long.mels, 4, loop_guard=False)
    assert dropped.answer().finish_reason == "cancelled"
    assert len(short.answer().ids) == 60
    assert short.heard == [*range(2, 61)]
    sizes = {len(message) for message in messages[before:]}
    assert sizes == {together._FIRST, 2**13}


def test_a_turn_that_waits_for_another_process(model, monkeypatch):
    """As where a collective raises nothing: it is seen, and closing does not wait for it."""
    monkeypatch.setattr(service_module, "PATIENCE", 0.2)
    gone, back = threading.Event(), threading.Event()

    class Waits:
        def tell(self, line, cancelled):
            if gone.is_set():
                back.wait(60)
            return together.Turn(line, sorted(cancelled))

        def end(self):
            pass

    service = Service(model._sized_engine(*SIZE), speaker=Waits())
    prompt = Example(np.arange(9))
    assert Asker(service, prompt, Sampling(1)).answer().ids
    gone.set()
    asker = Asker(service, prompt, Sampling(1))
    until(lambda: service.stuck)
    back.set()
    assert asker.answer().ids  # late, but whole
    until(lambda: not service.stuck)
    back.clear()
    until(lambda: service.stuck)
    service.close()
    back.set()


def test_a_request_comes_as_it_was(model):
    mels = [np.random.default_rng(0).normal(size=(128, n)).astype("float32") for n in (30, 8)]
    engine = model._sized_engine(*SIZE)
    ids = np.concatenate([np.arange(9), np.full(5, model.processor.audio_token_id)])
    asked = Sampling(7, 0.3, 5, 0.9, 0.1, 1.25, 2**40, ("a", "ü"), (3, 4), 6, False, logprobs=2)
    prompt = Prepared(ids, tuple(mels), guide=object())
    one = engine.asked(prompt, dataclasses.replace(asked, max_new_tokens=np.int64(7)), True)
    come = bytearray(together._packed(one).tobytes() + b"next")
    described = together.json.loads(bytes(together._line(together._described(one))))
    two = together._unpacked(engine, described, come, 3)
    assert bytes(come) == b"next"
    assert (two.number, two.each_token, two.sampling) == (one.number, True, asked)
    np.testing.assert_array_equal(two.example.ids, ids)
    for a, b in zip(two.example.mels, mels, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
    assert (two.keys, two.limit) == (one.keys, one.limit)
    assert two.guide.allowed is not None
