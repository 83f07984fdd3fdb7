"""Reads the output of a CTC head: the best path, and the times of the pieces of a known text.

Letters: T tokens of 80 ms, V pieces; the last of the V + 1 columns is the blank.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moss_audio_jax.errors import InputError


class Aligned(NamedTuple):
    """spans: (first token, last token + 1) of each piece. score: mean log-probability per token."""

    spans: list[tuple[int, int]]
    score: float


def greedy(log_probs: np.ndarray) -> tuple[list[int], list[tuple[int, int]], float]:
    """The likeliest piece at each token, without repeats and blanks.

    Args:
      log_probs: float [T, V + 1].

    Returns:
      (pieces, (first token, last token + 1) of each, mean probability of the tokens that are not
      blank, or 0 if all are).
    """
    blank = log_probs.shape[1] - 1
    best = log_probs.argmax(axis=1)
    pieces, spans, at = [], [], 0
    for piece, run in itertools.groupby(best.tolist()):
        length = len(list(run))
        if piece != blank:
            pieces.append(piece)
            spans.append((at, at + length))
        at += length
    said = best != blank
    sure = float(np.exp(log_probs[said, best[said]]).mean()) if said.any() else 0.0
    return pieces, spans, sure


def align(log_probs: np.ndarray, pieces: Sequence[int]) -> Aligned:
    """The likeliest path through `log_probs` that says exactly `pieces`, by Viterbi.

    Args:
      log_probs: float [T, V + 1].
      pieces: ids below V; equal neighbours need a blank between them.

    Raises:
      InputError: there are more pieces than tokens, or an id is not below V.
    """
    tokens, columns = log_probs.shape
    if not len(pieces):
        best = log_probs[:, columns - 1]
        return Aligned([], float(best.mean()) if tokens else 0.0)
    if min(pieces) < 0 or max(pieces) >= columns - 1:
        raise InputError(f"alignment: pieces lie outside 0..{columns - 2}")
    least = len(pieces) + sum(a == b for a, b in itertools.pairwise(pieces))
    if least > tokens:
        raise InputError(
            f"alignment: {len(pieces)} pieces need {least} tokens of 80 ms; there are {tokens}"
        )
    # States: blank, piece, blank, piece, ..., blank.
    states = np.full(2 * len(pieces) + 1, columns - 1)
    states[1::2] = pieces
    skip = np.zeros(len(states), bool)  # whether a path may skip the state before
    skip[3::2] = states[3::2] != states[1:-2:2]
    score = np.full(len(states), -np.inf)
    score[:2] = log_probs[0, states[:2]]
    came = np.zeros((tokens, len(states)), np.int8)  # how many states back
    for at in range(1, tokens):
        options = np.full((3, len(states)), -np.inf)
        options[0] = score
        options[1, 1:] = score[:-1]
        options[2, 2:] = np.where(skip[2:], score[:-2], -np.inf)
        came[at] = options.argmax(axis=0)
        score = options.max(axis=0) + log_probs[at, states]
    state = len(states) - 1 if score[-1] >= score[-2] else len(states) - 2
    total = float(score[state])
    first, last = [0] * len(pieces), [0] * len(pieces)
    for at in range(tokens - 1, -1, -1):
        if state % 2:
            first[state // 2] = at
            last[state // 2] = max(last[state // 2], at + 1)
        state -= int(came[at, state])
    return Aligned(list(zip(first, last, strict=True)), total / tokens)
