"""Several rewards as one number, by task.

    pay = mixture({"choice": {"choice": 1.0, "format": 0.5}, "default": {"exact": 1.0}})
    pay(Said("B", tokens=1), row)       # Judged(total, {"choice": Reward(...), ...}, "choice")

The key of a mixture is a row's task; else the kind of its answer (`asked.KINDS`); else "default".

Content is averaged by its weights. Manner (format, length, repetition, language) never adds, for an
answer without worth would be paid for its form. It takes away: of strength s and value v, it
multiplies by 1 - s * (1 - v). With strength 1 it is a gate; with 0 it is logged only, as content of
weight 0 is.
"""

from __future__ import annotations

import copy
import importlib.metadata
import logging
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.evaluate.judge import Judge
from moss_audio_jax.files import brief
from moss_audio_jax.post_train.asked import KINDS, TASKS, Asked, Said, read
from moss_audio_jax.post_train.rewards import (
    CONTENT,
    MANNER,
    Reward,
    RewardFunction,
    Row,
    by_judge,
    length,
    worthless,
)
from moss_audio_jax.remote import variable

_log = logging.getLogger(__name__)

GROUP = "moss_audio_jax.rewards"  # of entry points: functions (said, row) -> Reward
DEFAULT = "default"


def default_rewards() -> ConfigDict:
    """A mixture for every kind but free captions, which need a judge."""
    content = {
        "choice": "choice",
        "asr": "wer",
        "words": "aas",
        "sentences": "aas",
        "events": "events",
        "fields": "fields",
        "number": "number",
        "text": "exact",
    }
    manner = dict.fromkeys(("format", "length", "repetition", "language"), 1.0)
    return ConfigDict({kind: {name: 1.0, **manner} for kind, name in content.items()})


def default_options() -> ConfigDict:
    """What rewards need to know: of `length`, tokens; of `judge`, the endpoint of a model."""
    return ConfigDict(
        {
            "length": {"longest": 2048, "margin": 512},
            # url: the part before /chat/completions; key_from: an environment variable
            "judge": {"url": "", "model": "", "key_from": "OPENAI_API_KEY"},
        }
    )


class Judged(NamedTuple):
    """What one answer earns.

    Attributes:
      total: from 0 to 1.
      parts: each reward by its name, for the log.
      entry: the mixture's key that was used.
    """

    total: float
    parts: dict[str, Reward]
    entry: str


class _Part(NamedTuple):
    reward: RewardFunction
    weight: float
    is_manner: bool


class Mixture:
    """A callable (said, row) -> Judged. Made by `mixture`."""

    def __init__(self, entries: Mapping[str, Mapping[str, _Part]]) -> None:
        self._entries = entries

    def __call__(self, said: Said, row: Row) -> Judged:
        """What an answer earns.

        Raises:
          InputError: the row cannot be rewarded (`check` finds that before a run), or a judge or a
            plug-in gives no reward.
        """
        entry = self.entry(read(row))
        parts = self._entries[entry]
        found = {name: part.reward(said, row) for name, part in parts.items()}
        paid = sum(p.weight * found[name].value for name, p in parts.items() if not p.is_manner)
        total = paid / sum(part.weight for part in parts.values() if not part.is_manner)
        for name, part in parts.items():
            if part.is_manner:
                total *= 1 - part.weight * (1 - found[name].value)
        return Judged(total, found, entry)

    def entry(self, asked: Asked) -> str:
        """The key of a row's rewards. Raises InputError if there is none."""
        # The kind "asr" is that of speech alone: silence is answered by a text.
        own = None if asked.task in KINDS else asked.task
        for key in (own, asked.kind, asked.task, DEFAULT):
            if key in self._entries:
                return key
        if asked.task is None:
            said, known = "no task", sorted(self._entries)
        elif asked.kind is None:
            said, known = f"unknown task {brief(repr(asked.task))}", sorted(TASKS)
        else:
            said, known = f"no rewards for task {asked.task}", sorted(self._entries)
        raise InputError(
            f"row {asked.name}: {said}; expected one of {', '.join(known)}, or rewards for "
            f'"{asked.task or DEFAULT}" or "{DEFAULT}"'
        )

    def check(self, row: Row) -> None:
        """Raises InputError, naming the row, if it is of an unknown task, or if its own expected
        answer earns nothing. A judge and plug-ins are not asked."""
        asked = read(row)
        said = Said(asked.answer, tokens=0)
        for name, part in self._entries[self.entry(asked)].items():
            reward = part.reward(said, row) if name in CONTENT else None
            if reward and not reward.value:
                raise InputError(
                    f"row {asked.name}: its expected answer earns nothing by {name}: "
                    f"{reward.reason}"
                )


def mixture(
    rewards: Mapping[str, Mapping[str, float]], options: Mapping[str, Any] | None = None
) -> Mixture:
    """The rewards of each task as one function.

    Args:
      rewards: {task, kind or "default": {name of a reward: weight, or strength from 0 to 1}}, such
        as `default_rewards`. A name is one of `CONTENT` or `MANNER`, "length", "judge", or an entry
        point of the group `moss_audio_jax.rewards`, which counts as content.
      options: changes to `default_options`.

    Raises:
      UsageError: an unknown reward or option, a weight that is none, or a task without content.
      InputError: an entry point that cannot be imported.
    """
    options = _options(options or {})
    made: dict[str, RewardFunction] = {}
    entries = {}
    for task, weights in rewards.items():
        parts = {}
        if not isinstance(weights, Mapping | ConfigDict):
            raise UsageError(
                f"rewards.{task} is {weights!r}; expected {{name of a reward: weight}}"
            )
        for name, weight in weights.items():
            is_manner = name in MANNER or name == "length"
            most = 1.0 if is_manner else math.inf
            if type(weight) not in (int, float) or not 0 <= weight <= most or weight == math.inf:
                wanted = "a number from 0 to 1" if is_manner else "a number from 0"
                raise UsageError(f"rewards.{task}.{name} is {weight!r}; expected {wanted}")
            if name not in made:
                made[name] = _reward(name, options)
            parts[name] = _Part(made[name], float(weight), is_manner)
        if not any(part.weight for part in parts.values() if not part.is_manner):
            raise UsageError(
                f"rewards.{task}: nothing says whether an answer is right; expected one of "
                f"{', '.join(CONTENT)}, judge or a plug-in, with a weight above 0"
            )
        entries[task] = parts
    return Mixture(entries)


def check(rows: Iterable[Row], pay: Mixture, share: float = 0.0) -> int:
    """Finds rows that cannot be rewarded before a run begins; a judge and plug-ins are not asked.

    Args:
      share: of the rows that may have problems; then there is a warning.

    Returns:
      The number of rows.

    Raises:
      InputError: rows of unknown tasks, or whose own expected answer earns nothing. The first is
        named, by its line if it has no id; the others are counted.
    """
    problems = []
    number = 0
    for number, row in enumerate(rows, 1):
        try:
            pay.check(row if row.get("id") else {**row, "id": f"line {number}"})
        except InputError as error:
            problems.append(str(error))
    if problems:
        more = f" ({len(problems) - 1} more of {number} have problems)" * (len(problems) > 1)
        if len(problems) > share * number:
            raise InputError(problems[0] + more)
        _log.warning(problems[0] + more)
    return number


def _options(changes: Mapping[str, Any]) -> ConfigDict:
    options = default_options().lock()
    try:
        options.update(changes)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"options of rewards: {brief(error)}") from None
    return options


def _reward(name: str, options: Mapping[str, Any]) -> RewardFunction:
    if name == "length":
        return length(**options["length"])
    if name == "judge":
        given = dict(options["judge"])
        key = os.environ.get(variable(given["key_from"])) if given["key_from"] else None
        return by_judge(Judge(given["url"], given["model"], key))
    return CONTENT.get(name) or MANNER.get(name) or _plug_in(name)


def _plug_in(name: str) -> RewardFunction:
    points = importlib.metadata.entry_points(group=GROUP, name=name)
    if not points:
        known = ", ".join([*CONTENT, *MANNER, "length", "judge"])
        raise UsageError(
            f"no reward {name!r}; expected one of {known}, or an entry point of the group {GROUP}"
        )
    try:
        (point,) = points
        function = point.load()
    except Exception as error:  # importing runs a user's code
        raise InputError(
            f"reward {name!r}: the entry point cannot be used ({type(error).__name__}: "
            f"{brief(error)})"
        ) from None

    def reward(said: Said, row: Row) -> Reward:
        asked = read(row)
        if (zero := worthless(said, asked)) is not None:
            return zero
        try:
            value, reason = function(said, copy.deepcopy(dict(row)))  # it may change what it got
        except Exception as error:
            raise InputError(
                f"reward {name!r}: failed on row {asked.name} ({type(error).__name__}: "
                f"{brief(error)})"
            ) from error
        try:
            wrong = isinstance(value, str | bool | np.bool_) or not 0 <= float(value) <= 1
        except (TypeError, ValueError):
            wrong = True
        if wrong:
            raise InputError(
                f"reward {name!r}: {brief(repr(value))} ({type(value).__name__}) for row "
                f"{asked.name}; expected a number from 0 to 1"
            )
        return Reward(float(value), str(reason))

    return reward
