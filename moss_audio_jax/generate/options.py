"""The user's options for generating answers; the only place of their defaults. No JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from moss_audio_jax.errors import UsageError

MAX_STOP_IDS = 8
MOST_LOGPROBS = 20
BATCH_SIZE = 16  # answers that are decoded together
# Batches of one call of the engine: many enough that few slots are empty at its end, and few enough
# that memory has room for their sound and that for the next.
BATCHES_AT_ONCE = 8


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How one answer is generated. The default is greedy; the authors sample
    with temperature 1 and top_k 50.

    Attributes:
      max_new_tokens: the answer ends after this many tokens (`finish_reason` "length").
      temperature: 0 always takes the most likely token.
      top_k: keep the k most likely tokens; 0 keeps all.
      top_p: keep the smallest set of tokens whose probability reaches p.
      min_p: keep tokens at least p times as likely as the most likely one.
      repetition_penalty: above 1 makes tokens already in prompt or answer less likely.
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
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    thinking_budget: int | None = None
    loop_guard: bool = True
    drafts: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name in ("stop", "stop_ids"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        limits = {
            "max_new_tokens": lambda n: n >= 1 and n == int(n),
            "temperature": lambda t: t >= 0,
            "top_k": lambda k: 0 <= k < 2**31 and k == int(k),
            "top_p": lambda p: 0 < p <= 1,
            "min_p": lambda p: 0 <= p <= 1,
            "repetition_penalty": lambda r: r > 0,
            "seed": lambda seed: seed == int(seed),
            "stop": lambda stops: type(stops) is tuple and all(len(s) > 0 for s in stops),
            "stop_ids": lambda ids: type(ids) is tuple and len(ids) <= MAX_STOP_IDS,
            "logprobs": lambda n: n is None or (0 <= n <= MOST_LOGPROBS and n == int(n)),
            "thinking_budget": lambda n: n is None or 0 <= n < 2**31,
        }
        for name, good in limits.items():
            value = getattr(self, name)
            try:
                fits = good(value)
            except (TypeError, ValueError, OverflowError):
                fits = False
            if not fits:
                raise UsageError(f"{name} is {value!r}, which is out of range")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Sampling:
        """The options among other names, such as a call's `locals()` or a command line's."""
        names = (field.name for field in dataclasses.fields(cls))
        return cls(**{name: values[name] for name in names if name in values})
