"""The user's options for generating answers; the only place of their defaults. No JAX."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from moss_audio_jax.errors import UsageError
from moss_audio_jax.files import brief

MAX_STOP_IDS = 8
MOST_LOGPROBS = 20
BATCH_SIZE = 16  # answers that are decoded together
# Batches of one call of the engine: many enough that few slots are empty at its end, and few enough
# that memory has room for their sound and that for the next.
BATCHES_AT_ONCE = 8
# Logits that are divided or multiplied by these keep apart in float32, and stay finite.
LEAST_FACTOR, MOST_FACTOR = 1e-6, 1e6


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How one answer is generated. The default is greedy; the authors sample
    with temperature 1 and top_k 50.

    Attributes:
      max_new_tokens: the answer ends after this many tokens (`finish_reason` "length").
      temperature: 0 always takes the most likely token. Others are at most 1e6; those below 1e-6
        count as 1e-6.
      top_k: keep the k most likely tokens; 0 keeps all.
      top_p: keep the smallest set of tokens whose probability reaches p, above 0; never none.
      min_p: keep tokens at least p times as likely as the most likely one.
      repetition_penalty: above 1 makes tokens already in prompt or answer less likely; from 1e-6
        to 1e6.
      seed: the same seed gives the same answer in any batch.
      stop: strings that end the answer and are cut from it; a tuple or list of them.
      stop_ids: token ids that end the answer, in addition to the model's own.
      thinking_budget: tokens after which an open <think> block is closed; None for no limit.
      loop_guard: end an answer that repeats itself endlessly (`finish_reason` "loop").
      logprobs: keep each token's log-probability and those of so many likeliest ones, at most 20;
        None keeps none. They are of the whole vocabulary at this temperature (0: at 1), before
        top_k and the like.
      drafts: guess tokens ahead and let one pass of the model check several of them. Answers stay
        the same; it goes on only while it pays.
    """

    max_new_tokens: int = 1024
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: Sequence[str] = ()
    stop_ids: Sequence[int] = ()
    thinking_budget: int | None = None
    loop_guard: bool = True
    drafts: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name in ("stop", "stop_ids"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        size = "a whole number from 0 to 2**31 - 1"
        checks = {
            "max_new_tokens": (_whole(self.max_new_tokens, 1), "a whole number from 1 on"),
            "temperature": (
                _number(self.temperature, 0, MOST_FACTOR),
                f"a number from 0 to {MOST_FACTOR:g}",
            ),
            "top_k": (_whole(self.top_k, 0, 2**31 - 1), size),
            "top_p": (
                _number(self.top_p, 0, 1) and self.top_p > 0,
                "a number above 0, at most 1",
            ),
            "min_p": (_number(self.min_p, 0, 1), "a number from 0 to 1"),
            "repetition_penalty": (
                _number(self.repetition_penalty, LEAST_FACTOR, MOST_FACTOR),
                f"a number from {LEAST_FACTOR:g} to {MOST_FACTOR:g}",
            ),
            "seed": (_whole(self.seed), "a whole number"),
            "stop": (
                isinstance(self.stop, tuple) and all(isinstance(s, str) and s for s in self.stop),
                "a tuple or list of texts that are not empty",
            ),
            "stop_ids": (
                isinstance(self.stop_ids, tuple)
                and len(self.stop_ids) <= MAX_STOP_IDS
                and all(_whole(each, 0, 2**31 - 1) for each in self.stop_ids),
                f"a tuple or list of at most {MAX_STOP_IDS} token ids, each {size}",
            ),
            "thinking_budget": (
                self.thinking_budget is None or _whole(self.thinking_budget, 0, 2**31 - 1),
                f"None or {size}",
            ),
            "loop_guard": (isinstance(self.loop_guard, bool), "True or False"),
            "drafts": (isinstance(self.drafts, bool), "True or False"),
            "logprobs": (
                self.logprobs is None or _whole(self.logprobs, 0, MOST_LOGPROBS),
                f"None or a whole number from 0 to {MOST_LOGPROBS}",
            ),
        }
        for name, (fits, expected) in checks.items():
            if not fits:
                value = brief(repr(getattr(self, name)), 80)
                raise UsageError(f"{name} is {value}; expected {expected}")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Sampling:
        """The options among other names, such as a call's `locals()` or a command line's."""
        names = (field.name for field in dataclasses.fields(cls))
        return cls(**{name: values[name] for name in names if name in values})


def _number(value: Any, least: float, most: float) -> bool:
    """Whether it is one, NumPy's too, in this range. True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and least <= value <= most


def _whole(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    return isinstance(value, Integral) and _number(value, least, most)
