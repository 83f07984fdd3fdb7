"""Splits have different content, and their rules are fixed."""

import itertools

import pytest
from world_helpers import needs_espeak

from moss_audio_jax import world
from moss_audio_jax.draw import Draw
from moss_audio_jax.text.labels import KINDS
from moss_audio_jax.world import grammar, mandarin, splits
from moss_audio_jax.world.speakers import FEMALE, HELD_OUT_VOICES, MALE

VOICED = ("train", "validation", "test", "test_random_order", "test_voices")


def test_rules_are_fixed():
    """Changed rules would move sentences between splits; then raise world.VERSION."""
    part = world.sentence_part
    assert part("the cat is in the garden") == "train"
    assert part("hello") == "train"
    assert part("我们去公园吧") == "train"
    assert splits.held_out_pairs()[:3] == (("alarm", "cow"), ("alarm", "dog"), ("alarm", "drill"))
    assert len(splits.held_out_pairs()) == 83
    assert not any(splits.pair_held_out(kind, kind) for kind in KINDS)


def test_shares_and_symmetry():
    texts = {grammar.sentence(Draw("share", i), "grammatical") for i in range(6000)}
    parts = [world.sentence_part(text) for text in texts]
    assert parts.count("train") / len(parts) == pytest.approx(0.90, abs=0.02)
    assert parts.count("test") / len(parts) == pytest.approx(0.05, abs=0.015)
    pairs = list(itertools.permutations(sorted(KINDS), 2))
    held = {pair for pair in pairs if world.pair_held_out(*pair)}
    assert held == {(b, a) for a, b in held}
    assert len(held) / len(pairs) == pytest.approx(0.10, abs=0.03)
    for kind in KINDS:  # each kind is heard with most others in training
        assert sum(world.pair_held_out(kind, other) for other in KINDS) < 12


@needs_espeak
@pytest.mark.parametrize("split", VOICED)
def test_speech_of_a_split(split):
    rules = splits.SPLITS[split]
    found = set()
    for index in range(30):
        labels = world.scene(index, split, content="speech").labels
        for sentence in labels["sentences"]:
            assert world.sentence_part(sentence["text"]) == rules.sentences
            assert rules.order in (None, sentence["order"])
            found.add(sentence["order"])
        for speaker in labels["speakers"]:
            assert (speaker["voice"] in HELD_OUT_VOICES) == rules.held_out_voices
    assert found == ({rules.order} if rules.order else set(grammar.ORDERS))


@pytest.mark.parametrize("split", ["train", "test", "test_combinations"])
def test_sounds_of_a_split(split):
    for index in range(40):
        labels = world.scene(index, split, content="sound").labels
        kinds = sorted({event["kind"] for event in labels["events"]})
        held = [pair for pair in itertools.combinations(kinds, 2) if world.pair_held_out(*pair)]
        assert bool(held) == (split == "test_combinations")


def test_enough_voices():
    train = [name for name in (*MALE, *FEMALE) if name not in HELD_OUT_VOICES]
    assert len(train) >= 12
    assert len(HELD_OUT_VOICES) >= 4
    assert set(HELD_OUT_VOICES) <= {*MALE, *FEMALE}


def test_random_order_has_no_homophones():
    for i in range(300):
        words = grammar.sentence(Draw("order", i), "random").split()
        assert 2 <= len(words) <= 14
        assert not grammar.HOMOPHONES & set(words)
    assert all(1 <= len(grammar.sentence(Draw(i), "short").split()) <= 3 for i in range(200))
    assert len({mandarin.sentence(Draw(i), "random") for i in range(50)}) == 50
