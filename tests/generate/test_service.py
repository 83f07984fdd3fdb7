"""The engine that lives: requests come, stream, wait and go, and answers are as if asked alone."""

import queue
import signal
import threading
import time

import numpy as np
import pytest
from golden_prompts import OWN, golden_prompts

import moss_audio_jax as mj
from moss_audio_jax.data.batch import Example
from moss_audio_jax.errors import InputError
from moss_audio_jax.generate import engine as engine_module
from moss_audio_jax.generate.sampling import Sampling


@pytest.fixture(scope="module")
def model():
    return mj.MossAudio.load(OWN, "float32")


@pytest.fixture(scope="module")
def alone(model):
    return [model.generate_ids(e.ids, e.mels, **options(i)) for i, e in enumerate(golden_prompts())]


def sampling(number):
    heat = {"temperature": 0.9, "top_k": 50} if number % 3 == 1 else {}
    return Sampling(6 + 5 * number, seed=number, loop_guard=False, **heat)


def options(number):
    """As `generate_ids` takes them."""
    return {name: value for name, value in vars(sampling(number)).items() if name != "logprobs"}


class Asker:
    """Asks a service and keeps what it is told."""

    def __init__(self, service, example, sampling, each_token=True):
        self.told = queue.Queue()
        self.number = service.submit(example, sampling, self.told.put, each_token)

    def answer(self):
        self.heard = []
        while True:
            progress = self.told.get(timeout=120)
            self.heard.append(len(progress.ids))
            if progress.output is not None:
                return progress.output


def test_requests_come_at_any_time(model, alone):
    """Seven requests twice over from three threads, eight slots of which a few run: each answer as
    if asked alone."""
    prompts = golden_prompts()
    found = {}

    def ask(service, numbers):
        for number in numbers:
            asker = Asker(service, prompts[number % 7], sampling(number % 7), number % 2 == 0)
            found[number] = asker.answer(), asker.heard

    with model.service(slots=8, cache_tokens=640, max_new_tokens=64) as service:
        threads = [
            threading.Thread(target=ask, args=(service, range(start, 14, 3))) for start in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = service.stats()
    assert [found[number][0].ids for number in range(14)] == 2 * alone
    for number in range(0, 14, 2):  # each token was told, and the end
        assert found[number][1] == [*range(1, len(alone[number % 7]) + 1)]
    assert (stats["waiting"], stats["running"], stats["cache_tokens_taken"]) == (0, 0, 0)
    assert stats["cached_tokens"] > 0


def test_a_request_that_is_cancelled_frees_its_place(model, alone):
    endless = Sampling(64, loop_guard=False)
    prompts = golden_prompts()
    with model.service(slots=1, cache_tokens=256, max_new_tokens=64) as service:
        first = Asker(service, prompts[1], endless)
        second = Asker(service, prompts[2], sampling(2))
        third = Asker(service, prompts[3], sampling(3))
        assert len(first.told.get(timeout=60).ids) == 1
        service.cancel(first.number)
        service.cancel(third.number)
        output = first.answer()
        assert output.finish_reason == "cancelled"
        assert 1 <= len(output.ids) < 64
        assert second.answer().ids == alone[2]
        assert third.answer().finish_reason == "cancelled"
        service.cancel(first.number)  # too late: nothing happens
        assert service.stats()["cache_tokens_taken"] == 0


def test_an_interrupted_wait_frees_its_place(model, monkeypatch):
    """Ctrl-C in who waits, while the engine answers somebody else."""
    program, main, let_go = engine_module.decode_until, threading.get_ident(), threading.Event()
    prompts = golden_prompts()

    def interrupts(*args, **static):
        while not service.stats()["waiting"]:
            time.sleep(0.001)
        if not let_go.is_set():
            signal.pthread_kill(main, signal.SIGINT)
        let_go.wait(60)
        return program(*args, **static)

    with model.service(slots=1, cache_tokens=256, max_new_tokens=64) as service:
        monkeypatch.setattr(engine_module, "decode_until", interrupts)
        first = Asker(service, prompts[1], Sampling(4, loop_guard=False), each_token=False)
        with pytest.raises(KeyboardInterrupt):
            service.answer(prompts[2], Sampling(64, loop_guard=False))
        monkeypatch.undo()
        let_go.set()
        assert len(first.answer().ids) == 4
        assert service.stats()["waiting"] == service.stats()["running"] == 0
    assert service.stats()["prompt_tokens"] == len(prompts[1].ids)


def test_who_does_not_fit_waits_and_who_never_can_is_refused(model):
    """Room for one answer of 96 tokens: two slots are free, and yet one waits for the other."""
    prompt = Example(np.arange(60))
    with model.service(slots=2, cache_tokens=112, max_new_tokens=64) as service:
        askers = [Asker(service, prompt, Sampling(36, loop_guard=False)) for _ in range(3)]
        most = 0
        while service.stats()["running"] + service.stats()["waiting"]:
            most = max(most, service.stats()["running"])
            time.sleep(0.001)
        assert most == 1
        assert len({tuple(asker.answer().ids) for asker in askers}) == 1
        with pytest.raises(InputError, match="112 tokens, but the cache holds 112"):
            service.submit(Example(np.arange(112)), Sampling(1), print)


def test_a_long_prompt_stops_nobody(model, monkeypatch):
    """It is prefilled in pieces, and between them the others get their tokens."""
    monkeypatch.setattr(engine_module, "piece_tokens", lambda platform: 64)
    turns = []
    for name in ("extend", "decode_until"):
        program = getattr(engine_module, name)

        def noted(*args, name=name, program=program, **more):
            turns.append(name)
            return program(*args, **more)

        monkeypatch.setattr(engine_module, name, noted)
    long = golden_prompts()[2]
    assert len(long.ids) > 64
    long = Example(np.concatenate([long.ids, np.arange(200) % 400]), long.mels)
    expected = model.generate_ids(long.ids, long.mels, 8, loop_guard=False)
    turns.clear()
    with model.service(slots=2, cache_tokens=1024, max_new_tokens=64) as service:
        short = Asker(service, Example(np.arange(9)), Sampling(60, loop_guard=False))
        assert short.told.get(timeout=60).output is None
        late = Asker(service, long, Sampling(8, loop_guard=False))
        assert late.answer().ids == expected
        assert len(short.answer().ids) == 60
    pieces = [at for at, name in enumerate(turns) if name == "extend"]
    assert len(pieces) >= 4
    assert all(turns[at + 1] == "decode_until" for at in pieces[:-1])


def test_closing_lets_what_runs_end_or_says_that_it_did_not(model, alone):
    prompts = golden_prompts()
    service = model.service(slots=2, cache_tokens=640, max_new_tokens=64)
    asker = Asker(service, prompts[4], sampling(4))
    service.close(drain=60)
    assert asker.answer().ids == alone[4]
    with pytest.raises(InputError, match="stopping"):
        service.submit(prompts[0], Sampling(1), print)
    with pytest.raises(InputError, match="stopping"):
        service.answer(prompts[0], Sampling(1))
    service = model.service(slots=2, cache_tokens=640, max_new_tokens=64)
    asker = Asker(service, prompts[4], Sampling(64, loop_guard=False))
    service.close()
    assert asker.answer().finish_reason == "cancelled"


def test_an_engine_that_dies_says_so_to_everyone(model, monkeypatch):
    submitted = threading.Event()

    def broken(*args, **more):
        submitted.wait(60)  # later ones would be refused
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(engine_module, "decode_until", broken)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    service = model.service(slots=2, cache_tokens=640, max_new_tokens=64)
    prompts = golden_prompts()
    askers = [Asker(service, prompts[i], sampling(i)) for i in (1, 2, 3)]
    submitted.set()
    assert {asker.answer().finish_reason for asker in askers} == {"error"}
    with pytest.raises(RuntimeError, match="the device is gone"):
        service.answer(prompts[0], Sampling(1))
    with pytest.raises(RuntimeError, match="the device is gone"):
        service.submit(prompts[0], Sampling(1), print)
    service.close()


def test_threads_may_share_a_model(model, alone):
    """Calls at the same time do not meet in one engine."""
    prompts = golden_prompts()
    found = {}

    def ask(number):
        example = prompts[number]
        found[number] = model.generate_ids(example.ids, example.mels, **options(number))

    threads = [threading.Thread(target=ask, args=(number,)) for number in (1, 2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in (1, 2, 3, 4)] == alone[1:5]
