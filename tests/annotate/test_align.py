"""Forced alignment, compared with the best of all enumerated paths."""

import itertools

import numpy as np
import pytest

from moss_audio_jax.annotate.align import align, greedy
from moss_audio_jax.annotate.speech import at_changes
from moss_audio_jax.errors import InputError


def said(path, blank):
    """The pieces of a path: repeats are merged, then blanks removed."""
    return [p for p, _ in itertools.groupby(path) if p != blank]


@pytest.mark.parametrize("pieces", [[0], [0, 1], [1, 1], [0, 1, 0], [2, 2, 1]])
def test_the_best_of_all_paths(pieces):
    rng = np.random.default_rng(sum(pieces) + len(pieces))
    for tokens in range(len(pieces) + 1, 7):
        log_probs = np.log(rng.dirichlet(np.ones(4), tokens))
        paths = [p for p in itertools.product(range(4), repeat=tokens) if said(p, 3) == pieces]
        if not paths:
            with pytest.raises(InputError, match="need"):
                align(log_probs, pieces)
            continue
        scores = [log_probs[np.arange(tokens), path].sum() for path in paths]
        best = paths[int(np.argmax(scores))]
        found = align(log_probs, pieces)
        assert found.score == pytest.approx(max(scores) / tokens)
        runs, at = [], 0
        for piece, run in itertools.groupby(best):
            length = len(list(run))
            runs += [(at, at + length)] * (piece != 3)
            at += length
        assert found.spans == runs


def test_greedy_and_what_cannot_be():
    log_probs = np.log(np.full((5, 3), 0.1))
    for token, piece in enumerate((0, 0, 2, 0, 1)):
        log_probs[token, piece] = np.log(0.8)
    assert greedy(log_probs)[:2] == ([0, 0, 1], [(0, 2), (3, 4), (4, 5)])
    assert greedy(log_probs)[2] == pytest.approx(0.8)
    assert align(log_probs, []).spans == []
    with pytest.raises(InputError, match="outside"):
        align(log_probs, [2])  # the blank is not a piece


def test_words_begin_and_end_where_the_sound_changes():
    rng = np.random.default_rng(0)
    wav = 0.001 * rng.standard_normal(2 * 16_000).astype(np.float32)
    true = [("a", 0.50, 0.81), ("b", 0.81, 1.23), ("c", 1.40, 1.62)]
    for number, (_, first, last) in enumerate(true):
        part = slice(round(16_000 * first), round(16_000 * last))
        hiss = rng.standard_normal(part.stop - part.start)
        wav[part] += 0.1 * np.convolve(hiss, [1, (-0.9, 0.9)[number % 2]], "same")
    off = iter((-0.03, 0.02, -0.02, 0.03, 0.02))  # "a" ends where "b" begins
    moved = {t: round(10 + t + next(off), 2) for t in (0.50, 0.81, 1.23, 1.40, 1.62)}
    words = [{"text": w, "start": moved[a], "end": moved[b]} for w, a, b in true]
    found = at_changes(words, wav, 10.0)
    assert [word["text"] for word in found] == ["a", "b", "c"]
    for word, (_, first, last) in zip(found, true, strict=True):
        assert word["start"] == pytest.approx(10 + first, abs=0.011)
        assert word["end"] == pytest.approx(10 + last, abs=0.011)
    assert found[0]["end"] == found[1]["start"]
    # Without evidence, or with hardly any room, the order stays, and no word is empty.
    short = [
        {"text": w, "start": 10 + a, "end": 10 + b}
        for w, a, b in [("a", 0.0, 0.02), ("b", 0.03, 0.04), ("c", 1.95, 2.0)]
    ]
    times = [t for word in at_changes(short, wav, 10.0) for t in (word["start"], word["end"])]
    assert times == sorted(times)
    assert all(a < b for a, b in zip(times[::2], times[1::2], strict=True))
