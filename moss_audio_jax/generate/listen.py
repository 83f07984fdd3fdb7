"""Live audio: sound is heard as it comes, and questions may be asked at any time.

Nothing here is approximate. A question is asked about the clip so far, exactly as
`MossAudio.generate` would ask it. What was heard before is found by its content (`hearing`,
`pages`), so only new chunks are encoded and prefilled. The log-mel's floor depends on the clip's
maximum: where a later sound is so loud that it changes an earlier chunk, that chunk has another
content and is heard again.
"""

from __future__ import annotations

import dataclasses
import threading
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

from moss_audio_jax.audio.features import PEAK_LIMIT, GrowingMel, peak
from moss_audio_jax.audio.lengths import SAMPLE_RATE, audio_tokens, mel_frames
from moss_audio_jax.audio.pcm import array_of
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.files import brief
from moss_audio_jax.generate.engine import Engine
from moss_audio_jax.generate.options import Sampling
from moss_audio_jax.generate.request import Clip, Prepared, Reply, Request
from moss_audio_jax.generate.service import Service

if TYPE_CHECKING:
    from moss_audio_jax.api import MossAudio

_AHEAD = 200  # samples after a frame's middle that its window sees
_MOST_SECONDS = 10**9
_ROOM = 10 * SAMPLE_RATE  # samples, at first


class Ear:
    """A clip that grows; make one with `MossAudio.listen`.

    One thread may push, such as a microphone's, while another asks.

    What waits for answers (`push`, `ask`) is made of what does not (`take`, `begun`, `request`),
    which a server uses with its own way to wait.

    Args:
      answerer: an engine, or a service that others use, too.
      seconds: of sound, at most.
    """

    def __init__(self, model: MossAudio, answerer: Engine | Service, seconds: float) -> None:
        self._model, self._seconds = model, seconds
        self._answerer: Engine | Service | None = answerer
        self._samples, self._count = np.zeros(_ROOM, np.float32), 0
        self._mel = GrowingMel(model.processor.mel_dtype)
        self._heard = 0  # whole chunks
        self._pushes, self._turn = threading.Lock(), threading.Lock()  # who asks has the turn

    def __enter__(self) -> Ear:
        return self

    def __exit__(self, *_: object) -> None:
        self._answerer = None  # frees the cache of an engine of its own

    @property
    def wav(self) -> np.ndarray:
        """float32 [n], 16 kHz mono: all that was pushed so far. Any thread may ask."""
        count = self._count  # first: another thread may put new samples and more room in place
        return self._samples[:count]

    def push(self, samples: np.ndarray) -> None:
        """Adds sound, float [n] at 16 kHz mono, and hears the chunks of 4 s that are now whole.

        While another thread asks it only adds; the next push or question hears what has come.

        Raises:
          UsageError: not a waveform, or the ear is closed.
          InputError: values that are masked, not finite or absurdly large, or more seconds than
            `listen` was told. Nothing of it is kept.
        """
        with self._pushes:
            self.take(samples)
        if not self._turn.acquire(blocking=False):
            return
        try:
            begun = self.begun()
            if begun is not None:
                self._answerer.answer(begun, begun.sampling)
        finally:
            self._turn.release()

    def ask(self, text: str, **sampling: Any) -> Reply:
        """Answers a text about all that was pushed; options as in `MossAudio.generate`.

        Raises:
          InputError: nothing was pushed, or less than a log-mel frame.
          UsageError: an option is unknown or out of range, or the ear is closed.
        """
        self._check_open()
        try:
            chosen = Sampling(**sampling)
        except TypeError as error:
            raise UsageError(str(error)) from None
        with self._turn:
            prompt = self._model.prepare(self.request(text, chosen))
            output = self._answerer.answer(prompt, prompt.sampling)
            return self._model.reply(output, prompt)

    def take(self, samples: np.ndarray) -> None:
        """Adds sound like `push`, and hears nothing yet."""
        samples = array_of(samples)
        self._check_open()
        if samples.ndim != 1 or not np.issubdtype(samples.dtype, np.floating):
            raise UsageError(
                f"samples have shape {samples.shape} and dtype {samples.dtype}; expected float [n]"
            )
        if len(samples) and not (top := peak(samples)) <= PEAK_LIMIT:  # as in each later question
            raise InputError(
                f"the samples hold values that are NaN, infinite or too large ({top:g}); expected "
                "about -1..1. None of them was kept"
            )
        count = self._count + len(samples)
        if count / SAMPLE_RATE > self._seconds:
            raise InputError(
                f"more than the {self._seconds:g} s that this ear was made for: give `listen` more "
                "seconds, or begin with a new one"
            )
        if count > len(self._samples):  # twice as much, so that small pieces cost no copy each
            room = np.zeros(max(count, 2 * len(self._samples)), np.float32)
            room[: self._count] = self.wav
            self._samples = room
        self._samples[self._count : count] = samples
        self._count = count

    def begun(self) -> Prepared | None:
        """A prompt's beginning, up to the end of the last whole chunk, if that is new; else None.

        Once it is answered (with one token, which nobody reads), its keys and values are known.
        """
        config, sound = self._model.config.encoder, self._clip()
        wav = sound.wav
        chunks = mel_frames(max(0, len(wav) - _AHEAD)) // config.chunk_frames
        if config.attention != "chunked" or chunks <= self._heard:
            return None
        frames = chunks * config.chunk_frames
        prompt = self._model.prepare(Request("", [sound], Sampling(max_new_tokens=1)))
        places = np.flatnonzero(prompt.ids == self._model.processor.audio_token_id)
        end = 1 + places[audio_tokens(frames) - 1]
        self._heard = chunks
        mels = (prompt.mels[0][:, :frames],)
        return dataclasses.replace(prompt, ids=prompt.ids[:end], mels=mels)

    def request(self, text: str, sampling: Sampling, system: str | None = None) -> Request:
        """A question about the clip so far."""
        return Request(text, [self._clip()], sampling, system)

    def _clip(self) -> Clip:
        return _SoFar(self.wav, self._mel)

    def _check_open(self) -> None:
        if self._answerer is None:
            raise UsageError("this ear is closed")


class _SoFar(Clip):
    """A beginning of a clip that grows."""

    def __init__(self, wav: np.ndarray, mel: GrowingMel) -> None:
        super().__init__(wav)
        self._growing = mel

    def log_mel(self, dtype: str) -> np.ndarray:
        return self._growing.of(self.wav)  # which was made for this dtype


def check_sizes(seconds: float | None, new_tokens: int) -> None:
    """Raises UsageError if `listen` cannot take these arguments, whatever the model."""
    Sampling(max_new_tokens=new_tokens)
    number = isinstance(seconds, Real)
    if seconds is not None and not (number and 0 < seconds <= _MOST_SECONDS):
        raise UsageError(
            f"seconds is {brief(repr(seconds))}; expected a number above 0, at most "
            f"{_MOST_SECONDS:,}"
        )


def tokens_for(seconds: float, new_tokens: int) -> int:
    """Cache positions for a clip of so many seconds with a question and an answer."""
    sound = audio_tokens(mel_frames(round(SAMPLE_RATE * seconds)))
    markers = round(seconds / 2) * len(str(round(seconds)))
    return sound + markers + new_tokens + 1024
