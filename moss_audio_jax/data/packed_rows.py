"""The packed rows of one stream, as a Grain dataset.

Grain's own packing (`grain.experimental.BestFitPackIterDataset`) packs one stream of whole features
and keeps the open rows in its state by value. Here tokens and audio chunks are packed together, a
state names examples by their index, and a row that could not be read stays out of the window that a
continued run finishes. So the packing is ours, behind Grain's interfaces.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import grain
import numpy as np

from moss_audio_jax.data.batch import TrainExample, chunk_count
from moss_audio_jax.data.examples import Job, rejected
from moss_audio_jax.data.loader_config import LoaderConfig
from moss_audio_jax.data.packing import Size, emptiest, pack
from moss_audio_jax.data.records import Rejected
from moss_audio_jax.data.reports import COUNTS
from moss_audio_jax.data.workers import Made, Workers
from moss_audio_jax.errors import InputError

_LEFT_OUT = "could not be used when the window that the run continues in was packed"
_HOPELESS = 1024  # rows of one stream, one after the other, that give no example at all


class PackedRows(grain.IterDataset[list[TrainExample]]):
    """Stream `number` of `streams`: every `streams`-th job, made into examples that share rows.

    Args:
      jobs: of all streams, endless; see `Mixture.jobs`.
      workers: make the examples.
      count: called with what one window made, and the stream's counts.
    """

    def __init__(
        self,
        jobs: grain.MapDataset[Job],
        number: int,
        streams: int,
        workers: Workers,
        count: Callable[[Made, dict[str, int]], None],
        config: LoaderConfig,
    ):
        super().__init__()
        self.jobs = jobs[number::streams]
        self.number, self.streams = number, streams
        self.workers, self.count, self.config = workers, count, config

    def __iter__(self) -> PackedRowsIterator:
        return PackedRowsIterator(self)


class PackedRowsIterator(grain.DatasetIterator[list[TrainExample]]):
    """Takes jobs in windows. The emptiest row of a window begins the next one."""

    def __init__(self, dataset: PackedRows):
        super().__init__()
        self.number = dataset.number
        self._step = dataset.streams
        self._jobs = dataset.jobs
        self._workers = dataset.workers
        self._count = dataset.count
        self._config = dataset.config
        self._encoder = dataset.workers.make.encoder
        self.set_state({"next": 0, "carry": [], "offset": 0, **dict.fromkeys(COUNTS, 0)})

    def set_state(self, saved: Mapping[str, Any]) -> None:
        self.counts = {key: int(saved[key]) for key in COUNTS}
        self._next = int(saved["next"])  # own position at which the next window begins
        self._carried: list[TrainExample] | list[int] = [int(i) for i in saved["carry"]]
        self._start = {"next": self._next, "carry": self._carried, **self.counts}
        self._rows: list[list[TrainExample]] | None = None
        self._offset = int(saved["offset"])  # rows of this window that were handed out
        # Bad rows of this window. Where a row can be read today that could not be read then, the
        # window would be packed otherwise, and its rows not be those that were not handed out yet.
        self._left_out = [int(i) for i in saved.get("left_out", ())]
        self._pending: deque = deque()

    def get_state(self) -> dict[str, Any]:
        """The next window, the carried examples, the rows given out, the bad rows: a small JSON."""
        if self._rows is not None and self._offset == len(self._rows):
            carry = [example.index for example in self._carried]
            return {"next": self._next, "carry": carry, "offset": 0, "left_out": [], **self.counts}
        return {**self._start, "offset": self._offset, "left_out": self._left_out}

    def prefetch(self, depth: int) -> None:
        """Has the next `depth` windows made, if they are not yet."""
        window = self._config.window
        while len(self._pending) < depth:
            first = self._next + len(self._pending) * window
            jobs = [self._jobs[n] for n in range(first, first + window)]
            left_out = set(self._left_out)
            wait = self._workers.submit([job for job in jobs if job.index not in left_out])
            self._pending.append((jobs, left_out, wait))

    def _window(self) -> Made:
        """What the next window's rows make."""
        jobs, left_out, wait = self._pending.popleft()
        made = iter(wait())
        made = [rejected(j, _LEFT_OUT) if j.index in left_out else next(made) for j in jobs]
        self._left_out = [
            job.index
            for job, each in zip(jobs, made, strict=True)
            if isinstance(each, Rejected) and each.bad
        ]
        return made

    def __next__(self) -> list[TrainExample]:
        """The next packed row."""
        while self._rows is None or self._offset == len(self._rows):
            if self._rows is not None:
                self._offset = 0
            self._load()  # after a restore, `_offset` rows of it were handed out before
        self._offset += 1
        return self._rows[self._offset - 1]

    def _load(self) -> None:
        """The next window that fills at least one row."""
        examples = self._carried_examples()
        barren = 0
        while True:
            self._start = {
                "next": self._next,
                "carry": [e.index for e in examples],
                **self.counts,
            }
            self.prefetch(1)
            made = self._window()
            self._next += self._config.window
            self.prefetch(1)
            self._count(made, self.counts)
            new = [each for each in made if isinstance(each, TrainExample)]
            barren = 0 if new else barren + len(made)
            if barren >= _HOPELESS:
                raise InputError(
                    f"none of {barren} rows in a row could be used; the last, "
                    f"{made[-1].source} line {made[-1].line}: {made[-1].reason}"
                )
            rows, carried = self._pack(examples + new, len(examples))
            examples = carried
            if rows:
                self._rows, self._carried = rows, carried
                return

    def _carried_examples(self) -> list[TrainExample]:
        """What the last window left over; made anew where a saved state only names it."""
        if self._carried and not isinstance(self._carried[0], TrainExample):
            jobs = [self._jobs[(index - self.number) // self._step] for index in self._carried]
            made = self._workers.submit(jobs)()
            lost = [each for each in made if isinstance(each, Rejected)]
            self._count(lost, dict.fromkeys(COUNTS, 0))  # listed; they were counted as good ones
            self._carried = [each for each in made if isinstance(each, TrainExample)]
        return self._carried

    def _pack(
        self, examples: list[TrainExample], carried: int
    ) -> tuple[list[list[TrainExample]], list[TrainExample]]:
        """Full rows, and the examples for the next window. None is carried twice."""
        if not self._config.packing:
            return [[example] for example in examples], []
        room = Size(self._config.length, self._config.chunks)
        sizes = [Size(len(e.ids), chunk_count(e, self._encoder)) for e in examples]
        rows = pack(sizes, room, carried, self._config.row_examples)
        if len(rows) < 2:
            return [], examples
        left = rows.pop(emptiest(rows, sizes, room))
        # The packing puts long examples first: batches would not be alike.
        order = np.random.default_rng([self._config.seed, self.number, self._next])
        rows = [rows[i] for i in order.permutation(len(rows))]
        return [[examples[i] for i in row] for row in rows], [examples[i] for i in left]
