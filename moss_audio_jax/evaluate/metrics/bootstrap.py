"""Confidence intervals of ratios of sums: accuracy, corpus error rates, F1, mean shifts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95


def intervals(
    ratios: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
) -> dict[str, tuple[float, float] | None]:
    """Percentile bootstrap over items of sum(numerators) / sum(denominators).

    All ratios are of the same items and use the same resamples.

    Args:
      ratios: name -> (numerators [n], denominators [n]), a pair for each item.

    Returns:
      name -> (low, high); None if all denominators are 0. Resamples whose denominators sum to 0 are
      left out.
    """
    if not ratios:
        return {}
    columns = np.array([column for pair in ratios.values() for column in pair], np.float64)
    n = columns.shape[1]
    generator = np.random.default_rng(seed)
    sums = np.empty((resamples, len(columns)))
    # Equal columns (such as those in which every item counts once) are summed only once.
    distinct, where = np.unique(columns, axis=0, return_inverse=True)
    for i in range(resamples):
        drawn = np.bincount(generator.integers(n, size=n), minlength=n)
        sums[i] = (distinct @ drawn.astype(np.float64))[where.reshape(-1)]
    tail = (1 - level) / 2
    found: dict[str, tuple[float, float] | None] = {}
    for index, name in enumerate(ratios):
        over, under = sums[:, 2 * index], sums[:, 2 * index + 1]
        if not (under > 0).any():
            found[name] = None
            continue
        low, high = np.quantile(over[under > 0] / under[under > 0], [tail, 1 - tail])
        found[name] = (float(low), float(high))
    return found
