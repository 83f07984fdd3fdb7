"""Rows to batches: in an order that depends on nothing but the config, resumable at every step.

The mixture's indices are dealt to S streams: stream k owns k, k + S, k + 2 S, ... It takes them in
windows and packs each window by itself; the emptiest row's examples are not handed out but begin
the next window. A step takes batch / S rows of each stream, so that row b of the global batch is
stream b // (batch / S)'s, and a process that owns a range of streams holds a contiguous block of
rows. Hence neither the number of processes nor of workers changes a batch, and where a run stands
is said by (next window, carried examples, rows handed out) of each stream.
"""

from __future__ import annotations

import dataclasses
import math
import queue
import threading
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from moss_audio_jax.config import EncoderConfig
from moss_audio_jax.data.augment import Augment
from moss_audio_jax.data.batch import TrainExample, make_train_batch
from moss_audio_jax.data.examples import ExampleMaker
from moss_audio_jax.data.loader_config import LoaderConfig
from moss_audio_jax.data.mixture import Mixture
from moss_audio_jax.data.packing import Size
from moss_audio_jax.data.reports import COUNTS, Reports
from moss_audio_jax.data.stream import Stream, job_for
from moss_audio_jax.data.targets import Targets
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
    """

    arrays: dict[str, np.ndarray]
    row_ids: list[list[str]]
    stats: dict[str, float]


class Loader:
    """An endless iterator of HostBatch.

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
          InputError: a key of the config that cannot be.
        """
        config.validate(encoder, process_count)
        self._mixture = mixture
        self._room = _Room(tokenizer, encoder, config, process_count)
        self._workers = _workers(tokenizer, encoder, config)
        self._reports = Reports(report_dir, process_index)
        streams = config.stream_count()
        self._fingerprint = _fingerprint(mixture, tokenizer, encoder, config)
        own = range(
            process_index * streams // process_count, (process_index + 1) * streams // process_count
        )
        self._streams = [
            Stream(number, streams, mixture, self._workers, self._count, config) for number in own
        ]
        self._config = config
        self._state = self._snapshot()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> HostBatch:
        """Raises InputError once too many rows are bad, none can be used, or their file is gone."""
        if self._error is not None:
            raise self._error
        if self._thread is None:
            self._ready: queue.Queue = queue.Queue(self._config.ahead)
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._run, name="data", daemon=True)
            self._thread.start()
        batch, after = self._ready.get()
        if isinstance(batch, BaseException):
            self._halt()
            self._error = batch
            raise batch
        self._state = after
        return batch

    def state(self) -> dict[str, Any]:
        """Where this process stands after the batch that `next` gave last: a small JSON object."""
        return self._state

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues where `state` was taken; it may cover more streams than this process's.

        Raises:
          InputError: the state is of other data (the file is named) or of a config that packs
            otherwise (the key is named), or lacks a stream (`merge_states` was not given every
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
        self._halt()
        self._error = None
        for stream in self._streams:
            saved = state["streams"].get(str(stream.number))
            if saved is None:
                raise InputError(
                    f"the saved data state lacks stream {stream.number}; merge the states of all "
                    "processes"
                )
            stream.restore(saved)
        self._state = self._snapshot()

    def close(self) -> None:
        """Stops the thread and the workers, a row that hangs included."""
        self._workers.close()
        self._halt()
        self._error = RuntimeError("the data loader was closed")

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _halt(self) -> None:
        if self._thread is None:
            return
        self._stop.set()
        while self._thread.is_alive():  # it may wait for room in the queue
            try:
                self._ready.get(timeout=0.01)
            except queue.Empty:
                self._thread.join(0.01)
        self._thread = None

    def _run(self) -> None:
        try:
            # Every stream's first window before any stream's second.
            for depth in (1, 2):
                for stream in self._streams:
                    stream.prefetch(depth)
            while not self._stop.is_set():
                self._ready.put((self._next_batch(), self._snapshot()))
        except BaseException as error:
            self._ready.put((error, None))

    def _next_batch(self) -> HostBatch:
        each = self._config.batch // self._config.stream_count()
        rows = [stream.take() for stream in self._streams for _ in range(each)]
        return self._room.batch(rows, self._counts())

    def _counts(self) -> dict[str, int]:
        return {key: sum(s.counts[key] for s in self._streams) for key in COUNTS}

    def _count(self, made: Made, counts: dict[str, int]) -> None:
        """Counts what one stream was given, and judges all of them."""
        self._reports.count(made, counts)
        self._reports.judge(self._counts(), self._config.max_bad_share, self._config.min_seen)

    def _snapshot(self) -> dict[str, Any]:
        return {
            "version": 1,
            "config": self._fingerprint,
            "streams": {str(stream.number): stream.state() for stream in self._streams},
        }


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state of the whole run from those of its processes, taken after the same step.

    Raises:
      InputError: states of different runs, a stream twice or not at all.
    """
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
    reports = Reports(report_dir, process_index)
    rows = [
        (part, row) for part, each in enumerate(mixture.parts) for row in range(len(each.source))
    ]
    size = config.batch // process_count
    starts = deque(
        range(
            process_index * size, math.ceil(len(rows) / config.batch) * config.batch, config.batch
        )
    )
    pending: deque = deque()
    counts = dict.fromkeys(COUNTS, 0)
    try:
        while starts or pending:
            while starts and len(pending) <= config.ahead:
                start = starts.popleft()
                here = range(start, min(start + size, len(rows)))
                pending.append(workers.submit([job_for(mixture, i, *rows[i]) for i in here]))
            made = pending.popleft()()
            reports.count(made, counts)
            reports.judge(counts, config.max_bad_share, config.min_seen)
            yield room.batch([[e] if isinstance(e, TrainExample) else [] for e in made], counts)
    finally:
        workers.close()


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
        self._targets = targets_of(config)
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
            "chunks": int(np.count_nonzero(arrays["frames"])),
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
        room=Size(config.length, config.chunks),
        frames=config.chunk_frames(encoder),
        tasks=tuple(config.tasks),
        augment=config.augment,
        seed=config.seed,
        branches=config.branches,
        pick=config.pick,
        targets=targets_of(config),
        time_markers=config.time_markers,
    )


def targets_of(config: LoaderConfig) -> Targets | None:
    return Targets(config.words, config.tags) if config.words or config.tags else None


def _fingerprint(
    mixture: Mixture, tokenizer: Tokenizer, encoder: EncoderConfig, config: LoaderConfig
) -> dict[str, Any]:
    """Everything that decides which row stands where: a state means nothing without it."""
    keys = ("length", "chunks", "packing", "seed", "window")
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
        "time_markers": config.time_markers,
        "vocabulary": tokenizer.vocab_size,
    }


def _agree(saved: Mapping[str, Any], own: Mapping[str, Any], who: str) -> None:
    for key in own:
        if saved.get(key) != own[key]:
            raise InputError(
                f"data.{key}: {who} has {brief(repr(saved.get(key)))}, this one "
                f"{brief(repr(own[key]))}; the order of rows cannot be continued with another "
                "(start anew with init_from)"
            )
