"""Random draws that are the same on every machine, and the hash that defines the splits.

Streams come from BLAKE2 and the raw bits of PCG64, which never change. NumPy may change how its
distributions use those bits, so the few distributions that are needed are implemented here.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def bucket(*key: object) -> int:
    """A number from 0 to 99, evenly distributed over keys; decides the split of content."""
    return _digest(key) % 100


class Draw:
    """An independent stream for each key: `Draw("world", seed, split, index)`."""

    def __init__(self, *key: object):
        self._key = key
        self._bits = np.random.PCG64(_digest(key))

    def child(self, *key: object) -> Draw:
        """A separate stream; draws from this one do not change it."""
        return Draw(*self._key, *key)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * ((self._bits.random_raw() >> 11) * 2.0**-53)

    def log_uniform(self, low: float, high: float) -> float:
        return math.exp(self.uniform(math.log(low), math.log(high)))

    def integer(self, low: int, high: int) -> int:
        """An integer from `low` to `high`, both included."""
        return low + self._bits.random_raw() % (high - low + 1)

    def chance(self, probability: float) -> bool:
        return self.uniform() < probability

    def choice(self, items: Sequence[T]) -> T:
        return items[self._bits.random_raw() % len(items)]

    def weighted(self, weights: dict[T, float]) -> T:
        """A key, drawn in proportion to its weight."""
        at = self.uniform(0.0, sum(weights.values()))
        for key, weight in weights.items():
            at -= weight
            if at < 0:
                return key
        return next(reversed(weights))

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different items, in random order."""
        pool = list(items)
        for i in range(count):
            j = self.integer(i, len(pool) - 1)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:count]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        return self.sample(items, len(items))

    def noise(self, n: int) -> np.ndarray:
        """White noise, float64 [n], variance 1, nearly Gaussian (the sum of four uniforms)."""
        bits = self._bits.random_raw(n)
        total = (bits & 0xFFFF) + ((bits >> 16) & 0xFFFF) + ((bits >> 32) & 0xFFFF) + (bits >> 48)
        return (total.astype(np.float64) - 2 * 0xFFFF) / (0x10000 / math.sqrt(3))

    def uniforms(self, n: int) -> np.ndarray:
        """float64 [n] in 0..1."""
        return (self._bits.random_raw(n) >> 11) * 2.0**-53


def _digest(key: tuple[object, ...]) -> int:
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=16).digest(), "big")
