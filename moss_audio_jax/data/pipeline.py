"""Rows to batches: in an order that depends on nothing but the config, resumable at every step.

    Mixture.jobs()   grain.MapDataset: which row is read at index i
    PackedRows       grain.IterDataset, one a stream: examples that share rows
    Batches          grain.IterDataset: rows of this process's streams as arrays of static shape
    prefetching      grain.experimental.ThreadPrefetchIterDataset

The jobs are dealt to S streams: stream k owns k, k + S, k + 2 S, ... A step takes batch / S rows of
each stream, so that row b of the global batch is stream b // (batch / S)'s, and a process that owns
a range of streams holds a contiguous block of rows. Hence neither the number of processes nor of
workers changes a batch. A state has an entry for each stream, so that the states of all processes
merge into one, which any number of processes can continue.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from moss_audio_jax.config import EncoderConfig
from moss_audio_jax.data.augment import Augment
from moss_audio_jax.data.batch import TrainExample, make_train_batch
from moss_audio_jax.data.examples import ExampleMaker
from moss_audio_jax.data.loader_config import LoaderConfig
from moss_audio_jax.data.mixture import Mixture
from moss_audio_jax.data.packed_rows import PackedRows
from moss_audio_jax.data.reports import COUNTS, Reports
from moss_audio_jax.data.workers import Made, Workers
from moss_audio_jax.errors import InputError
from moss_audio_jax.files import brief
from moss_audio_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class HostBatch:
    """One process's rows of a global batch.

    Attributes:
      arrays: see `models.moss_audio` and `batch.make_train_batch`; numpy, B / processes rows. Mels
        have the dtype that the tokenizer's processor rounds them to.
      row_ids: the rows ("part:row") that were packed into each row of the batch.
      stats: of these rows: "examples", "tokens" (not padding), "room" (padding included), "labels",
        "chunks", "audio_seconds"; and of this process's streams since the run began: "seen", "bad",
        "overlong" rows.
      told: what metrics.jsonl says of this batch, the mean over the steps since the last line.
    """

    arrays: dict[str, np.ndarray]
    row_ids: list[list[str]]
    stats: dict[str, float]
    told: Mapping[str, float] = dataclasses.field(default_factory=dict)


class Batches(grain.IterDataset[HostBatch]):
    """Each element has `each` rows of every stream, in order, laid out as arrays.

    Args:
      streams: this process's.
      lay_out: (rows, counts of all streams) -> the batch.
    """

    def __init__(
        self,
        streams: Sequence[PackedRows],
        each: int,
        lay_out: Callable[[list[list[TrainExample]], Mapping[str, int]], HostBatch],
    ):
        super().__init__()
        self.streams, self.each, self.lay_out = streams, each, lay_out

    def __iter__(self) -> BatchesIterator:
        return BatchesIterator(self)


class BatchesIterator(grain.DatasetIterator[HostBatch]):
    def __init__(self, dataset: Batches):
        super().__init__()
        self.streams = [iter(stream) for stream in dataset.streams]
        self._each, self._lay_out = dataset.each, dataset.lay_out
        self._begun = False

    def counts(self) -> dict[str, int]:
        return {key: sum(stream.counts[key] for stream in self.streams) for key in COUNTS}

    def __next__(self) -> HostBatch:
        if not self._begun:
            self._begun = True
            for depth in (1, 2):  # every stream's first window before any stream's second
                for stream in self.streams:
                    stream.prefetch(depth)
        rows = [next(stream) for stream in self.streams for _ in range(self._each)]
        return self._lay_out(rows, self.counts())

    def get_state(self) -> dict[str, Any]:
        return {str(stream.number): stream.get_state() for stream in self.streams}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._begun = False
        for stream in self.streams:
            stream.set_state(state[str(stream.number)])


class Loader:
    """An endless iterator of HostBatch: the datasets above, with their workers and reports.

    with Loader(...) as loader:
        batch = next(loader)
        state = loader.state()  # of the batches handed out, not of those made ahead
    """

    def __init__(
        self,
        mixture: Mixture,
        tokenizer: Tokenizer,
        encoder: EncoderConfig,
        config: LoaderConfig,
        process_index: int = 0,
        process_count: int = 1,
        report_dir: str | None = None,
    ):
        """Args:
        mixture: of which rows, in which order.
        report_dir: where bad_rows.jsonl and overlong_rows.jsonl are written; None: nowhere.

        Raises:
          UsageError: a key of the config has a value that it may not have.
        """
        config.validate(encoder, process_count)
        self._mixture = mixture
        self._workers = _workers(tokenizer, encoder, config)
        self._reports = reports = Reports(report_dir, process_index, mixture.rows)
        self._fingerprint = _fingerprint(mixture, tokenizer, encoder, config)
        count = config.stream_count()
        own = range(
            process_index * count // process_count, (process_index + 1) * count // process_count
        )

        def counted(made: Made, counts: dict[str, int]) -> None:
            """Counts what one stream was given, and judges all of them."""
            reports.count(made, counts)
            reports.judge(self._batches.counts(), config.max_bad_share, config.min_seen)

        jobs = mixture.jobs()
        streams = [PackedRows(jobs, k, count, self._workers, counted, config) for k in own]
        room = _Room(tokenizer, encoder, config, process_count)
        self._batches = iter(Batches(streams, config.batch // count, room.batch))
        prefetch = grain.experimental.ThreadPrefetchDatasetIterator
        self._prefetched = prefetch(self._batches, prefetch_buffer_size=config.ahead)
        self._error: BaseException | None = None

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> HostBatch:
        """Raises InputError once too many rows are bad, none can be used, or their file is gone."""
        if self._error is not None:
            raise self._error
        try:
            return next(self._prefetched)
        except Exception as error:
            self._error = error
            raise

    def state(self) -> dict[str, Any]:
        """Where this process stands after the batch that `next` gave last: a small JSON object."""
        streams = self._prefetched.get_state()
        return {"version": 1, "config": self._fingerprint, "streams": streams}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues where `state` was taken; it may cover more streams than this process's.

        Raises:
          InputError: the state is of other data (the file is named) or of a config that packs
            differently (the key is named), or lacks a stream (`merge_states` was not given every
            process's).
        """
        own = dict(self._fingerprint)
        del own["content"]
        _agree(state["config"], own, "the saved run")
        if "content" in state["config"]:
            self._mixture.check_content(state["config"]["content"])
        else:
            warnings.warn(
                "the saved run does not say what its rows held, only how many they were; whether "
                "these are the same rows could not be checked",
                stacklevel=2,
            )
        for stream in self._batches.streams:
            if str(stream.number) not in state["streams"]:
                raise InputError(
                    f"the saved data state lacks stream {stream.number}; merge the states of all "
                    "processes"
                )
        self._error = None
        self._prefetched.set_state(state["streams"])

    def flush(self) -> None:
        """Writes the rows of reports that a file in a bucket lacks."""
        self._reports.flush()

    def close(self) -> None:
        """Stops the thread and the workers, a row that hangs included."""
        self._workers.close()  # first: the thread may wait for a row
        self._prefetched.close()
        self._reports.flush()
        self._error = RuntimeError("the data loader was closed")

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state of the whole run from those of its processes, taken after the same step.

    Raises:
      InputError: states of different runs, a stream twice or not at all.
    """
    if "streams" not in states[0]:  # of batches that every process makes alike (`train.source`)
        _agree(states[-1], states[0], "another process")
        return dict(states[0])
    streams: dict[str, Any] = {}
    for state in states:
        _agree(state["config"], states[0]["config"], "another process")
        twice = streams.keys() & state["streams"].keys()
        if twice:
            raise InputError(f"two data states hold stream {min(twice)}; expected one a process")
        streams |= state["streams"]
    missing = [k for k in range(states[0]["config"]["streams"]) if str(k) not in streams]
    if missing:
        raise InputError(f"no data state holds stream {missing[0]}; merge those of all processes")
    return {**states[0], "streams": dict(sorted(streams.items(), key=lambda item: int(item[0])))}


def eval_batches(
    mixture: Mixture,
    tokenizer: Tokenizer,
    encoder: EncoderConfig,
    config: LoaderConfig,
    process_index: int = 0,
    process_count: int = 1,
    report_dir: str | None = None,
) -> Iterator[HostBatch]:
    """Every row once, part after part, in the order of the files: one row a row, not augmented.

    Global batch n holds rows n B .. (n + 1) B - 1, so every process makes equally many batches. A
    row that is bad or over-long leaves its place empty, is counted in "bad" or "overlong" and
    listed in `report_dir`; so do the places after the last row. Too many bad rows raise InputError.
    """
    config = dataclasses.replace(config, augment=Augment(), streams=None)
    config.validate(encoder)
    if config.batch % process_count:
        raise InputError(
            f"data.batch {config.batch} is not a multiple of {process_count} processes"
        )
    room = _Room(tokenizer, encoder, config, process_count)
    workers = _workers(tokenizer, encoder, config)
    reports = Reports(report_dir, process_index, mixture.rows, "eval_")
    jobs = mixture.in_order()
    size = config.batch // process_count
    starts = deque(
        range(
            process_index * size, math.ceil(len(jobs) / config.batch) * config.batch, config.batch
        )
    )
    pending: deque = deque()
    counts = dict.fromkeys(COUNTS, 0)
    try:
        while starts or pending:
            while starts and len(pending) <= config.ahead:
                start = starts.popleft()
                here = range(start, min(start + size, len(jobs)))
                pending.append(workers.submit([jobs[i] for i in here]))
            made = pending.popleft()()
            reports.count(made, counts)
            reports.judge(counts, config.max_bad_share, config.min_seen)
            yield room.batch([[e] if isinstance(e, TrainExample) else [] for e in made], counts)
    finally:
        workers.close()
        reports.flush()


# --- shared by training and evaluation -----------------------------------------------------------


class _Room:
    """Lays rows out as one process's part of the batch."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        encoder: EncoderConfig,
        config: LoaderConfig,
        process_count: int,
    ):
        self._shape = config.shape(encoder, process_count)
        self._branched = config.branches > 1
        self._targets = config.targets()
        self._encoder = encoder
        self._processor = tokenizer.processor

    def batch(self, rows: list[list[TrainExample]], counts: Mapping[str, int]) -> HostBatch:
        arrays = make_train_batch(
            rows,
            self._shape,
            self._encoder,
            self._processor.audio_token_id,
            self._processor.mel_dtype,
            self._branched,
            self._targets,
        )
        examples = [example for row in rows for example in row]
        stats = {
            "examples": len(examples),
            "tokens": sum(len(e.ids) for e in examples),
            "room": self._shape.rows * self._shape.tokens,
            "labels": int(np.count_nonzero(arrays["weights"])),
            "chunks": int(np.count_nonzero(arrays["frames"].any(axis=-1))),
            "audio_seconds": sum(e.seconds for e in examples),
            **counts,
        }
        row_ids = [[e.row_id for e in row] for row in rows]
        row_ids += [[] for _ in range(self._shape.rows - len(rows))]
        return HostBatch(arrays, row_ids, stats)


def _workers(tokenizer: Tokenizer, encoder: EncoderConfig, config: LoaderConfig) -> Workers:
    return Workers(example_maker(tokenizer, encoder, config), config.workers, config.row_seconds)


def example_maker(
    tokenizer: Tokenizer, encoder: EncoderConfig, config: LoaderConfig
) -> ExampleMaker:
    return ExampleMaker(
        tokenizer=tokenizer,
        encoder=encoder,
        room=config.room(encoder),
        tasks=tuple(config.tasks),
        augment=config.augment,
        seed=config.seed,
        branches=config.branches,
        pick=config.pick,
        targets=config.targets(),
        time_markers=config.time_markers,
    )


def _fingerprint(
    mixture: Mixture, tokenizer: Tokenizer, encoder: EncoderConfig, config: LoaderConfig
) -> dict[str, Any]:
    """Everything that decides which row stands where: a state means nothing without it."""
    keys = ("length", "chunks", "packing", "row_examples", "seed", "window")
    return {
        **{key: getattr(config, key) for key in keys},
        "streams": config.stream_count(),
        "train": mixture.describe(),
        "content": mixture.content(),
        "speeds": list(config.augment.speeds),
        "branches": config.branches,
        "pick": [list(rule) for rule in config.pick],
        "attention": encoder.attention,
        "frames": config.chunk_frames(encoder),
        "words": bool(config.words),  # with them each piece of sound has a strip of its own
        "time_markers": config.time_markers,
        "vocabulary": tokenizer.vocab_size,
    }


def _agree(saved: Mapping[str, Any], own: Mapping[str, Any], who: str) -> None:
    for key in own:
        if saved.get(key) != own[key]:
            hint = f", or set data.streams={saved.get(key)}" if key == "streams" else ""
            raise InputError(
                f"data.{key}: {who} has {brief(repr(saved.get(key)))}, this one "
                f"{brief(repr(own[key]))}; the order of rows cannot be continued with another "
                f"(start anew with init_from{hint})"
            )
