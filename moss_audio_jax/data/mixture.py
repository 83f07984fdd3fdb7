"""Which row comes i-th: parts, their shares, and a fresh permutation of each part every epoch.

Built on grain.MapDataset (range of rows -> shuffle -> repeat -> mix -> job): the job at index i is
a pure function of (spec, seed, i), whatever happened before.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from moss_audio_jax.data.examples import Job
from moss_audio_jax.data.sources import Source
from moss_audio_jax.errors import InputError
from moss_audio_jax.files import shown

_SMALL = 1 << 16  # grain's shuffle of an index costs about 65536 / rows steps: slow for few rows
_BY_SIZE = {"size": float, "sqrt": math.sqrt}


class Part(NamedTuple):
    """A source, the name it goes by and its share of the mixture (shares sum to 1)."""

    name: str
    source: Source
    share: float


class Mixture:
    """An endless sequence of rows: `mixture[i]` is (part, row), two ints.

    A part's rows come in a fresh order each epoch, each exactly once. Parts are interleaved evenly,
    by whole-number ratios that meet the asked shares within 1% of the smallest.
    """

    def __init__(self, spec: Any, seed: int = 0):
        """Args:
        spec: one of
          - a path or a tuple of paths: all their rows are one part, named "data";
          - a mapping from names to parts. A part is a path, a tuple of paths, or a mapping with
            "paths" (or with "parts": a group, a mapping like this one) and "weight": a number, or
            "sqrt" or "size" (of its number of rows; "size" is the default). The weights of one
            level are all numbers or all "sqrt" or all "size". ml_collections' dicts will do.
        seed: of the permutations.

        Raises:
          InputError: a spec or a file that cannot be used, named.
        """
        self.parts = _parts(spec)
        orders = [_order(len(p.source), _part_seed(seed, p.name)) for p in self.parts]
        order = orders[0]
        if len(orders) > 1:
            order = grain.MapDataset.mix(
                [
                    each.map(functools.partial(_with_part, number))
                    for number, each in enumerate(orders)
                ],
                [part.share for part in self.parts],
            )
        else:
            order = order.map(functools.partial(_with_part, 0))
        self._order = order

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self._order[index]

    @property
    def rows(self) -> int:
        """Rows of all parts together."""
        return sum(len(part.source) for part in self.parts)

    def jobs(self) -> grain.MapDataset[Job]:
        """The endless jobs of training: which row is read at index i."""
        return self._order.map_with_index(self._job)

    def in_order(self) -> grain.MapDataset[Job]:
        """A job for every row, once: part after part, in the order of the files."""
        starts = list(itertools.accumulate((len(p.source) for p in self.parts), initial=0))

        def at(index: int, row: int) -> Job:
            part = bisect.bisect_right(starts, row) - 1
            return self._job(index, (part, row - starts[part]))

        return grain.MapDataset.range(self.rows).map_with_index(at)

    def _job(self, index: int, where: tuple[int, int]) -> Job:
        number, row = where
        part = self.parts[number]
        # The row's name counts from 0 over all the part's files.
        return Job(index, part.source.location(row), f"{part.name}:{row}", part.name)

    def describe(self) -> list[list[Any]]:
        """[name, rows, share] of each part: what a saved state must agree with."""
        return [[p.name, len(p.source), round(p.share, 9)] for p in self.parts]

    def content(self) -> dict[str, list[str]]:
        """Each part's files by what is in them (`sources.Source.digests`), not by name."""
        return {part.name: part.source.digests for part in self.parts}

    def check_content(self, saved: Mapping[str, Sequence[str]]) -> None:
        """Raises InputError naming the first file that has other rows than `saved` says."""
        for part in self.parts:
            for path, now, before in itertools.zip_longest(
                part.source.paths, part.source.digests, saved.get(part.name, ())
            ):
                if now != before:
                    raise InputError(
                        f"{shown(path or part.source.paths[-1])}: holds other rows than the saved "
                        "run was trained on; the order of rows cannot be continued with them (give "
                        "back the old ones, or start anew with init_from)"
                    )


def _with_part(number: int, row: int) -> tuple[int, int]:
    return number, int(row)


def _order(rows: int, seed: int) -> grain.MapDataset:
    """Endless row numbers: one permutation of range(rows) after another."""
    if rows > _SMALL:
        return grain.MapDataset.range(rows).shuffle(seed=seed).repeat()

    @functools.lru_cache(4)
    def permutation(epoch: int) -> np.ndarray:
        # Raw words of the generator: NumPy promises that these never change.
        words = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(rows)
        return np.argsort(words, kind="stable")

    def pick(index: int, row: int) -> int:
        return permutation(index // rows)[index % rows]

    return grain.MapDataset.range(rows).repeat().map_with_index(pick)


def _part_seed(seed: int, name: str) -> int:
    """Parts of equal length must not be shuffled alike."""
    return zlib.crc32(f"{seed}/{name}".encode())


# --- the spec ------------------------------------------------------------------------------------


def _parts(spec: Any) -> tuple[Part, ...]:
    if not _is_mapping(spec):
        return (Part("data", Source(_paths(spec, "data")), 1.0),)
    return tuple(_level(spec, "", 1.0))


def _level(spec: Any, prefix: str, share: float) -> list[Part]:
    """The parts of one mapping from names to parts, which together have `share`."""
    if not len(spec):
        raise InputError(f"data: the mixture {prefix.rstrip('/') or 'itself'} has no parts")
    below: dict[str, list[Part]] = {}
    weights: dict[str, float] = {}
    kinds = set()
    for name, given in spec.items():
        where = f"data.{prefix}{name}".replace("/", ".")
        given = given if _is_mapping(given) else {"paths": given}
        unknown = sorted(set(given) - {"paths", "parts", "weight"})
        if unknown or ("paths" in given) == ("parts" in given):
            problem = f"has the key {unknown[0]!r}" if unknown else "needs either paths or parts"
            raise InputError(f'{where} {problem}; expected "paths" or "parts", and "weight"')
        if "parts" in given:
            if not _is_mapping(given["parts"]):
                raise InputError(f"{where}.parts is no mapping; expected names and their parts")
            below[name] = _level(given["parts"], f"{prefix}{name}/", 1.0)
        else:
            source = Source(_paths(given["paths"], where))
            below[name] = [Part(f"{prefix}{name}", source, 1.0)]
        rows = sum(len(part.source) for part in below[name])
        weight = given.get("weight", "size")
        if isinstance(weight, str) and weight in _BY_SIZE:
            kinds.add(weight)
            weights[name] = _BY_SIZE[weight](rows)
        elif (
            isinstance(weight, (int, float)) and not isinstance(weight, bool) and 0 < weight < 1e12
        ):
            kinds.add("a number")
            weights[name] = float(weight)
        else:
            raise InputError(
                f"{where}.weight is {weight!r}; expected a positive number, 'sqrt' or 'size'"
            )
    if len(kinds) > 1:
        raise InputError(
            f"data.{prefix.replace('/', '.')}*.weight: {' and '.join(sorted(kinds))} side by side; "
            "give all parts of one level the same kind of weight"
        )
    total = sum(weights.values())
    return [
        part._replace(share=part.share * share * weights[name] / total)
        for name, parts in below.items()
        for part in parts
    ]


def _is_mapping(value: Any) -> bool:
    return hasattr(value, "items")  # ml_collections' dicts are no Mapping


def _paths(value: Any, where: str) -> Sequence[str]:
    if isinstance(value, (str, os.PathLike)):
        return [os.fspath(value)]
    if (
        isinstance(value, (tuple, list))
        and value
        and all(isinstance(path, (str, os.PathLike)) for path in value)
    ):
        return [os.fspath(path) for path in value]
    raise InputError(f"{where} is {value!r}; expected a path or a tuple of paths")
