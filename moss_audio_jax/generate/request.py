"""A question in three forms: the request, the prepared model input, and the reply."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from moss_audio_jax.audio import load_audio, log_mel
from moss_audio_jax.audio.features import rounded
from moss_audio_jax.data.batch import Example
from moss_audio_jax.errors import UsageError
from moss_audio_jax.files import brief
from moss_audio_jax.generate.options import Sampling
from moss_audio_jax.text.unsaid import Word


class Clip:
    """A clip that several requests share.

    It is read, and its log-mel made, when the first of them needs it, and both are kept. Requests
    of one `generate_batch` that begin with the same clips are encoded and prefilled once as far as
    they agree; one `Clip` for all says that the clips are the same.

    Args:
      audio: see `Audio`.
      name: in messages; by default the file's name, or its number in the request.

    Attributes:
      wav: float32 [n], 16 kHz mono. Reading it raises InputError for a clip that cannot be used.
    """

    def __init__(self, audio: Audio, name: str | None = None) -> None:
        self.audio = audio
        self.name = name
        self._mels: dict[str, np.ndarray] = {}

    @functools.cached_property
    def wav(self) -> np.ndarray:
        return self.audio if isinstance(self.audio, np.ndarray) else load_audio(self.audio)

    def log_mel(self, dtype: str) -> np.ndarray:
        """Float32 [128, frames], rounded to `dtype`, made anew."""
        return rounded(log_mel(self.wav), dtype)

    def mel(self, dtype: str, make: Callable[[Clip], np.ndarray]) -> np.ndarray:
        """What `make(clip)` gives for a model that rounds log-mels to `dtype`; made once."""
        if dtype not in self._mels:
            self._mels[dtype] = make(self)
        return self._mels[dtype]


# A file, a 16 kHz mono waveform, samples with their rate ({"array": ..., "sampling_rate": ...} or
# (samples, rate)), or a Clip.
Audio = str | Path | BinaryIO | np.ndarray | Mapping[str, Any] | tuple[np.ndarray, int] | Clip


def clip_of(audio: Audio) -> Clip:
    """The clip itself, or a new one."""
    return audio if isinstance(audio, Clip) else Clip(audio)


def name_of(clip: Audio, number: int) -> str:
    """The name of a clip in messages: its own, its file's, or "clip N"."""
    if isinstance(clip, Clip):
        return clip.name or name_of(clip.audio, number)
    if isinstance(clip, str | Path):
        return str(clip)
    return str(getattr(clip, "name", f"clip {number}"))


@dataclasses.dataclass(frozen=True)
class Request:
    """One question: a text, its clips (see `Audio`), how to sample the answer.

    `system` replaces the default system text; `time_markers` overrides processor_config.json.
    `messages` is a conversation in OpenAI's form (`text.messages`), instead of text, audio and
    system.
    """

    text: str = ""
    audio: Sequence[Audio] | Audio = ()
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    system: str | None = None
    time_markers: bool | None = None
    messages: Sequence[Mapping[str, Any]] | None = None

    @property
    def clips(self) -> Sequence[Audio]:
        """`audio` as a list. A single clip is one clip, not a sequence of letters or samples.

        Raises:
          UsageError: it is neither a clip nor a sequence.
        """
        audio = self.audio
        one = isinstance(audio, str | Path | np.ndarray | Mapping | Clip) or hasattr(audio, "read")
        with_rate = isinstance(audio, tuple) and len(audio) == 2 and np.isscalar(audio[1])
        if one or (with_rate and not isinstance(audio[1], str)):
            return [audio]
        if not isinstance(audio, Sequence):
            raise UsageError(
                f"audio is {brief(repr(audio), 80)}; expected a clip (a file, or a numpy "
                "waveform at 16 kHz, alone or with its rate) or a list of them"
            )
        return audio


class Guide(Protocol):
    """Constrains one answer, token by token."""

    def allowed(self) -> np.ndarray:
        """Bool [V]: the tokens that may come next."""

    def push(self, token: int) -> None:
        """Says which one came."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared(Example):
    """A request as model input: token ids and log-mels, and what its reply needs.

    `warnings` tells the reader of the answer about problems of the sound. `guide` says which tokens
    may come next; None allows all.
    """

    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    warnings: tuple[str, ...] = ()
    guide: Guide | None = None


class TokenLogprobs(NamedTuple):
    """The log-probability of an answer's token, and (token, log-probability) of the likeliest."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclasses.dataclass(frozen=True)
class Reply:
    """One answer.

    Attributes:
      text: the answer, without its thinking.
      thinking: the contents of the <think> block; None without one.
      ids: every generated token except the stop token.
      finish_reason: "stop", "length" (max_new_tokens or the last position), "loop" (the answer
        repeated itself and was ended) or "error" (there is no answer).
      warnings: reasons to doubt the answer, one sentence each; with several clips each begins with
        the name of its clip.
      error: in a batch, why there is no answer; None if there is one.
      logprobs: of each of the ids, if `Sampling.logprobs` asks for them.
      heard: the words that the encoder's CTC head hears in each clip, with times; empty without
        such a head beside the checkpoint.
    """

    text: str
    thinking: str | None
    ids: list[int]
    finish_reason: str
    warnings: tuple[str, ...] = ()
    error: str | None = None
    logprobs: list[TokenLogprobs] | None = None
    heard: tuple[list[Word], ...] = dataclasses.field(default=(), repr=False, compare=False)
