"""Log-probabilities of tokens, and answers whose tokens a guide allows one by one."""

import dataclasses
import queue

import numpy as np
import pytest
from golden_prompts import OWN, golden_prompts

import moss_audio_jax as mj
from moss_audio_jax.errors import UsageError
from moss_audio_jax.generate.request import Prepared
from moss_audio_jax.generate.sampling import Sampling


@pytest.fixture(scope="module")
def model():
    return mj.MossAudio.load(OWN, "float32")


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - np.logaddexp.reduce(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("heat", [0.0, 0.7])
def test_logprobs_are_those_of_the_logits(model, heat):
    prompt = golden_prompts()[1]
    asked = Sampling(9, temperature=heat, top_k=3, logprobs=4, loop_guard=False)
    plain = dataclasses.replace(asked, logprobs=None)
    with model._engine(2) as engine:
        first, other = engine.run([(prompt, asked), (prompt, plain)])
    assert other.ids == first.ids
    assert other.logprobs is None
    whole = np.concatenate([prompt.ids, first.ids])
    scores = model.logits(whole, prompt.mels)[len(prompt.ids) - 1 : -1]
    expected = log_softmax(scores / (heat or 1))
    assert [each.token for each in first.logprobs] == first.ids
    for each, row in zip(first.logprobs, expected, strict=True):
        np.testing.assert_allclose(each.logprob, row[each.token], atol=1e-4)
        best = np.argsort(-row)[:4]
        assert [token for token, _ in each.top] == best.tolist()
        np.testing.assert_allclose([value for _, value in each.top], row[best], atol=1e-4)


def test_more_than_twenty_are_refused():
    with pytest.raises(UsageError, match="logprobs is 21"):
        Sampling(logprobs=21)


class Rising:
    """Allows only tokens above the last one, and ends after some."""

    def __init__(self, size, stop, most):
        self.size, self.stop, self.most = size, stop, most
        self.seen = []

    def allowed(self):
        allowed = np.zeros(self.size, bool)
        if len(self.seen) == self.most:
            allowed[self.stop] = True
        else:
            allowed[(self.seen[-1] if self.seen else 3) + 1 :] = True
            allowed[self.stop] = False
        return allowed

    def push(self, token):
        self.seen.append(token)


@pytest.mark.parametrize("heat", [0.0, 1.0])
def test_a_guide_decides_what_may_come(model, heat):
    """Beside an answer without a guide, which stays as it is alone; streamed or not."""
    size, stop = model.config.decoder.vocab_size, 3
    example = golden_prompts()[1]
    free = Sampling(12, loop_guard=False)
    alone = model.generate_ids(example.ids, example.mels, 12, loop_guard=False)
    found = []
    with model.service(slots=2, cache_tokens=1024, max_new_tokens=64) as service:
        for each_token in (True, False):
            guide = Rising(size, stop, 7)
            guided = Prepared(example.ids, example.mels, guide=guide)
            told = queue.Queue()
            steered = Sampling(40, temperature=heat, seed=1, stop_ids=(stop,))
            numbers = [
                service.submit(guided, steered, told.put, each_token),
                service.submit(example, free, told.put, each_token),
            ]
            outputs = {}
            while len(outputs) < 2:
                progress = told.get(timeout=120)
                if progress.output is not None:
                    outputs[progress.number] = progress.output
            ids = outputs[numbers[0]].ids
            assert len(ids) == 7
            assert (np.diff([3, *ids]) > 0).all()
            assert outputs[numbers[0]].finish_reason == "stop"
            assert outputs[numbers[1]].ids == alone
            found.append(ids)
    assert found[0] == found[1]
