"""Forced alignment against the best of all paths, listed."""

import itertools

import numpy as np
import pytest

from moss_audio_jax.annotate.align import align, greedy
from moss_audio_jax.errors import InputError


def said(path, blank):
    """What a path says: repeats, then blanks taken out."""
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
        align(log_probs, [2])  # the blank is no piece
