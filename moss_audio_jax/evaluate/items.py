"""Items: the common form of all benchmarks' data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from moss_audio_jax.evaluate.manifests import Cut, Level

Kind = Literal["choice", "asr", "timestamps", "events", "caption", "open"]


@dataclasses.dataclass(frozen=True)
class Item:
    """One question of a benchmark.

    Attributes:
      id: unique in the benchmark.
      kind: the form of the answer, which decides how it is scored.
      prompt: the exact text that goes to the model.
      audio: paths of its clips, in order.
      reference: depends on the kind: choice {"choices": [...], "answer": text, or None if it is
        not published}, asr {"text"}, timestamps {"slots": [{"text", "start", "end"}, ...], "level":
        "word" | "sentence"}, events {"events": [{"start", "end", "text"}, ...]}, caption {field:
        value} or, in world, {"sources": [[name, other name, ...], ...]}, open {"answer"} (in MECAT
        a list of right answers; for MMAU-Pro's instructions {"answer", "task_identifier",
        "kwargs"}).
      group: keys of the breakdowns: task, category (a list is allowed), dimension, ...
      cut: the part of its one clip that it asks about, in seconds; None for the whole clip.
    """

    id: str
    kind: Kind
    prompt: str
    audio: tuple[str, ...]
    reference: dict[str, Any]
    group: dict[str, Any]
    cut: Cut | None = None


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Items in the order of the data. `problems` has a message for each oddity of the data."""

    name: str
    items: list[Item]
    problems: list[str]


@dataclasses.dataclass(frozen=True)
class Options:
    """Which part of the data is used, and how it is asked.

    Attributes:
      prompt: replaces the official prompt; for multiple choice, the instruction before the
      question.
      split: train, dev or test of AISHELL-1 and FLEURS.
      level: word or sentence, for timestamps.
      tier: the TextGrid tier's name, if it has an unusual one.
      tasks: of world: only these; empty for all.
      per_scene: of world: the number of rows per scene, drawn by a hash of their ids.
      limit: only this many items, the first ones.
      allow_outside: whether audio paths may leave a given audio root (absolute paths, "..").
    """

    prompt: str | None = None
    split: str = "test"
    level: Level = "word"
    tier: str | None = None
    tasks: tuple[str, ...] = ()
    per_scene: int | None = None
    limit: int | None = None
    allow_outside: bool = False


Loaded = tuple[list[Item], list[str]]
Loader = Callable[[Path, Path | None, Options], Loaded]
