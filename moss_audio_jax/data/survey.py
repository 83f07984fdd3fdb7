"""Reads every row once and notes what it holds, before a run: `train --check-data`.

A row is made into an example just as in training, without augmentation. Of an example only sizes
and digests are kept, about 60 bytes, so that the rows of a whole run fit into memory.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import os
import unicodedata
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from moss_audio_jax.config import EncoderConfig
from moss_audio_jax.data.batch import TrainExample, size_of
from moss_audio_jax.data.examples import ExampleMaker, Job, rejected
from moss_audio_jax.data.loader_config import LoaderConfig
from moss_audio_jax.data.mixture import Mixture
from moss_audio_jax.data.packed_rows import PackedRows
from moss_audio_jax.data.packing import strips_of
from moss_audio_jax.data.records import (
    Rejected,
    Row,
    conversations,
    id_of,
    parse_row,
    reason_of,
)
from moss_audio_jax.data.sources import SourceError, read_location
from moss_audio_jax.data.workers import Workers
from moss_audio_jax.text.prompt import build_branches

_TOGETHER = 256  # rows that the workers are given at a time
_EACH = 32  # rows that are worth a process of their own
_LETTERS = 400  # of an answer, by which its script is told


@dataclasses.dataclass(frozen=True)
class Reading:
    """What is kept of a row that can be used.

    Attributes:
      tokens, labels: of the example; labels are what is learned.
      frames: mel frames of each clip.
      seconds: of sound.
      sounds: a digest of each clip's log-mel: equal for equal sound, whatever file it is in.
      whole: a digest of the conversation and its sound.
      language: the row's "language", else the script of its answers.
      tasks: (task, label tokens) of each conversation; of a row with branches, all that may be
        drawn, or the one that is asked.
      branched: whether the row has branches.
    """

    tokens: int
    labels: int
    frames: tuple[int, ...]
    seconds: float
    sounds: tuple[int, ...]
    whole: int
    language: str
    tasks: tuple[tuple[str, int], ...]
    branched: bool = False


class Asks(Protocol):
    """How a run takes rows whose batches something else makes (`train.source`)."""

    def alone(self, row: Row, job: Job) -> Row:
        """The row as it is asked at this place of the mixture, without branches.

        Raises InputError if it cannot be used.
        """

    def over_long(self, made: TrainExample) -> str | None:
        """Which limit the example of such a row is beyond."""


@dataclasses.dataclass(frozen=True)
class Reader:
    """Makes readings in worker processes, a function of the job alone.

    Attributes:
      make: without augmentation.
      asks: None: the rows are learned from as they are.
    """

    make: ExampleMaker
    asks: Asks | None = None

    def __call__(self, job: Job) -> Reading | Rejected:
        """Raises SourceError if the file that holds the row cannot be read."""
        data = b""
        try:
            data = read_location(job.location)
            row = parse_row(data)
            branched = bool(row.branches)
            row = self.asks.alone(row, job) if self.asks else row
            made = self.make.make(row, job)
            long = made if isinstance(made, str) else self.asks and self.asks.over_long(made)
            if long:
                return rejected(job, long, row.id, bad=False)
            return dataclasses.replace(self._reading(row, made, job), branched=branched)
        except SourceError:
            raise
        except Exception as error:
            return rejected(job, reason_of(error), id_of(data))

    def _reading(self, row: Row, made: TrainExample, job: Job) -> Reading:
        frames = tuple(mel.shape[1] for mel in made.mels)
        labels = int(np.count_nonzero(made.labels >= 0))
        sounds = tuple(_digest(np.ascontiguousarray(mel.T).view(np.uint8)) for mel in made.mels)
        tasks = [(row.task or job.part, labels)]
        if row.branches:  # each must be usable, drawn or not
            drawn = [b for b in row.branches if self.make.branches and self.make.rule(b).often > 0]
            messages = [branch.messages for branch in drawn]
            markers = self.make.time_markers
            parts = build_branches(
                self.make.tokenizer, row.messages, messages, frames, markers
            ).branches
            tasks = [
                (branch.task or row.task or job.part, int(part.answer_mask.sum()))
                for branch, part in zip(drawn, parts, strict=True)
            ]
        said = conversations(row)
        return Reading(
            tokens=len(made.ids),
            labels=labels,
            frames=frames,
            seconds=made.seconds,
            sounds=sounds,
            whole=_digest(json.dumps([sounds, _texts(said)]).encode()),
            language=_language(row, said),
            tasks=tuple(tasks),
        )


def _digest(data: Any) -> int:
    """64 bits: among ten million different clips, two are taken for one with chance 3e-6."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _texts(said: Sequence[Sequence[Any]]) -> list[list[tuple[str, str]]]:
    """Who says what, with "audio" in place of a clip's name."""
    return [
        [
            (m["role"], m["content"] if m["message_type"] == "text" else m["message_type"])
            for m in messages
        ]
        for messages in said
    ]


def _language(row: Row, said: Sequence[Sequence[Any]]) -> str:
    if isinstance(named := row.more.get("language"), str) and named:
        return named
    answers = "".join(
        m["content"] for messages in said for m in messages if m["role"] == "assistant"
    )
    scripts = Counter(filter(None, map(_script, answers[:_LETTERS])))
    return scripts.most_common(1)[0][0] if scripts else "no letters"


@functools.lru_cache(1 << 16)
def _script(character: str) -> str | None:
    """Such as "Latin script", by the first word of a letter's Unicode name."""
    if not character.isalpha():
        return None
    word = unicodedata.name(character, "unknown").split(" ")[0]
    word = {"FULLWIDTH": "Latin", "CJK": "Han", "IDEOGRAPHIC": "Han"}.get(word, word.capitalize())
    return f"{word} script"


class Survey:
    """What the rows of a mixture hold, each read once, in the order of the files.

    Attributes:
      usable, bad, overlong: bool [rows].
      tokens, labels, seconds, whole: [rows] of each row's reading; 0 where there is none.
      clips, sounds: [all clips] mel frames and digest; those of row i are
        `clips[starts[i] : starts[i + 1]]`.
      tasks, languages: {name: [conversations or rows, label tokens]}.
      branched: rows that have branches.
    """

    def __init__(self, mixture: Mixture):
        self.mixture = mixture
        self.jobs = mixture.in_order()
        rows = mixture.rows
        self.usable, self.bad, self.overlong = (np.zeros(rows, bool) for _ in range(3))
        self.tokens, self.labels = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        self.seconds, self.whole = np.zeros(rows, np.float32), np.zeros(rows, np.uint64)
        self.tasks: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
        self.languages: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
        self.branched = 0
        self._clips, self._sounds = array("I"), array("Q")
        self._counts = np.zeros(rows, np.int32)  # clips of each row

    def read(self, reader: Reader, row_seconds: float) -> Iterator[Rejected | None]:
        """Reads all rows, on all cores: for each row in turn why it cannot be used, or None.

        Raises:
          InputError: a file of rows cannot be read, or row after row takes longer than
            `row_seconds`.
        """
        cores = len(os.sched_getaffinity(0))
        workers = Workers(reader, min(cores, len(self.jobs) // _EACH), row_seconds)
        pending: deque[tuple[range, Callable]] = deque()
        try:
            for first in range(0, len(self.jobs), _TOGETHER):
                rows = range(first, min(first + _TOGETHER, len(self.jobs)))
                pending.append((rows, workers.submit([self.jobs[i] for i in rows])))
                if len(pending) > 2:
                    yield from self._noted(*pending.popleft())
            while pending:
                yield from self._noted(*pending.popleft())
        finally:
            workers.close()

    def _noted(self, rows: range, wait: Callable) -> Iterator[Rejected | None]:
        for row, each in zip(rows, wait(), strict=True):
            if isinstance(each, Rejected):
                (self.bad if each.bad else self.overlong)[row] = True
                yield each
                continue
            self.usable[row] = True
            self.tokens[row], self.labels[row] = each.tokens, each.labels
            self.seconds[row], self.whole[row] = each.seconds, each.whole
            self._counts[row] = len(each.frames)
            self._clips.extend(each.frames)
            self._sounds.extend(each.sounds)
            self.branched += each.branched
            for task, labels in each.tasks:
                _add(self.tasks[task], labels)
            _add(self.languages[each.language], each.labels)
            yield None

    @functools.cached_property
    def starts(self) -> np.ndarray:
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self._counts, dtype=np.int64)])

    @functools.cached_property
    def clips(self) -> np.ndarray:
        return np.array(self._clips, np.uint32)

    @functools.cached_property
    def sounds(self) -> np.ndarray:
        return np.array(self._sounds, np.uint64)

    def name(self, row: int) -> str:
        """The row, for a message."""
        location = self.jobs[row].location
        return f"{location.path} line {location.line}"

    def repeats(self) -> dict[int, int]:
        """{row: the first row with the same conversation about the same sound}."""
        usable = np.flatnonzero(self.usable)
        _, first, which = np.unique(self.whole[usable], return_index=True, return_inverse=True)
        again = np.flatnonzero(first[which] != np.arange(len(usable)))
        return {int(usable[i]): int(usable[first[which[i]]]) for i in again}

    def heard_again(self) -> int:
        """Clips whose sound another clip has, too, beyond the first of each."""
        return len(self.sounds) - len(np.unique(self.sounds))

    def leaks(self, train: Survey) -> dict[int, tuple[int, str]]:
        """{own row: (a row of `train`, "sound" or "conversation" that both have)}."""
        owners = np.repeat(np.arange(train.mixture.rows), np.diff(train.starts))
        ours = np.repeat(np.arange(self.mixture.rows), np.diff(self.starts))
        found = {}
        usable, there = np.flatnonzero(self.usable), np.flatnonzero(train.usable)
        for what, mine, rows, theirs, places in (
            ("sound", self.sounds, ours, train.sounds, owners),
            ("conversation", self.whole[usable], usable, train.whole[there], there),
        ):
            known, first = np.unique(theirs, return_index=True)
            for i in np.flatnonzero(np.isin(mine, known)):
                place = places[first[np.searchsorted(known, mine[i])]]
                found[int(rows[i])] = (int(place), what)
        return dict(sorted(found.items()))


def _add(count: list[int], labels: int) -> None:
    count[0] += 1
    count[1] += labels


# --- packing -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Packed:
    """How an epoch is packed: as many visits as there are rows, rounded up to whole windows.

    Attributes:
      visits: of rows, unusable ones included, that are in `rows` packed rows.
      tokens, strips: float [packed rows], the share of each row that is not empty.
      examples: in all packed rows.
    """

    visits: int
    tokens: np.ndarray
    strips: np.ndarray
    examples: int

    @property
    def rows(self) -> int:
        return len(self.tokens)


def packed(
    survey: Survey,
    encoder: EncoderConfig,
    config: LoaderConfig,
    done: Callable[[int], Any] = lambda visits: None,
) -> Packed:
    """Packs as a run of this config does, by the sizes that were noted.

    Args:
      done: called now and then with how many visits of rows were packed since.

    Raises:
      InputError: a thousand rows in succession cannot be used; the run would stop, too.
    """
    room, streams = config.room(encoder), config.stream_count()
    recorded, jobs = _Recorded(survey, encoder), survey.mixture.jobs()
    visits = examples = 0
    tokens, strips = array("d"), array("d")
    for number in range(streams):
        rows = iter(PackedRows(jobs, number, streams, recorded, lambda *_: None, config))
        share = -(-(survey.mixture.rows - number) // streams)
        state = {"next": 0, "offset": 0, "carry": []}
        while state["offset"] or state["next"] < share:  # to a window's end
            row, before = next(rows), state["next"]
            state = rows.get_state()
            done(state["next"] - before)
            pieces = [n for example in row for n in size_of(example.mels, encoder)]
            tokens.append(sum(len(example.ids) for example in row) / room.tokens)
            strips.append(strips_of(pieces, room) / room.strips if room.strips else 0.0)
            examples += len(row)
        visits += state["next"] - len(state["carry"])
    return Packed(visits, np.array(tokens), np.array(strips), examples)


class _Recorded:
    """In place of `Workers`: examples of the sizes that a survey noted, without contents."""

    def __init__(self, survey: Survey, encoder: EncoderConfig):
        self.make = self  # which PackedRows asks for the encoder
        self.encoder = encoder
        self._survey = survey
        parts = survey.mixture.parts
        ends = np.cumsum([len(part.source) for part in parts]).tolist()
        self._first = dict(zip((part.name for part in parts), [0, *ends], strict=False))

    def submit(self, jobs: Sequence[Job]) -> Callable[[], list[TrainExample | Rejected]]:
        return lambda: [self._example(job) for job in jobs]

    def _example(self, job: Job) -> TrainExample | Rejected:
        row = self._first[job.part] + int(job.row_id.rpartition(":")[2])
        survey = self._survey
        if not survey.usable[row]:
            return rejected(job, "cannot be used", bad=bool(survey.bad[row]))
        clips = survey.clips[survey.starts[row] : survey.starts[row + 1]]
        nothing = np.zeros(1, np.int32)
        ids = np.broadcast_to(nothing, int(survey.tokens[row]))
        return TrainExample(
            ids=ids,
            mels=tuple(np.broadcast_to(nothing, (1, int(frames))) for frames in clips),
            labels=ids,
            weights=0.0,
            tasks=0,
            row_id=job.row_id,
            index=job.index,
            seconds=0.0,
        )
