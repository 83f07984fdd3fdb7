"""Live audio: sound is heard as it comes, and questions may be asked at any time.

Nothing here is approximate. A question is asked about the clip so far, exactly as
`MossAudio.generate` would ask it. What was heard before is found by its content (`hearing`,
`pages`), so only new chunks are encoded and prefilled. The log-mel's floor depends on the clip's
maximum: where a later sound is so loud that it changes an earlier chunk, that chunk has another
content and is heard again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moss_audio_jax.audio.lengths import audio_tokens, mel_frames
from moss_audio_jax.data.batch import Example
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.generate.engine import Engine
from moss_audio_jax.generate.options import Sampling
from moss_audio_jax.generate.request import Reply, Request

if TYPE_CHECKING:
    from moss_audio_jax.api import MossAudio

_AHEAD = 200  # samples after a frame's middle that its window sees


class Ear:
    """A clip that grows; make one with `MossAudio.listen`.

    Attributes:
      wav: float32 [n], 16 kHz mono: all that was pushed.
    """

    def __init__(self, model: MossAudio, engine: Engine, seconds: float) -> None:
        self.wav = np.zeros(0, np.float32)
        self._model, self._engine, self._seconds = model, engine, seconds
        self._heard = 0  # whole chunks

    def __enter__(self) -> Ear:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine = None  # frees its cache

    def push(self, samples: np.ndarray) -> None:
        """Adds sound, float [n] at 16 kHz mono, and hears the chunks of 4 s that are now whole.

        Raises:
          UsageError: not a waveform, or the ear is closed.
          InputError: values that are not finite, or more seconds than `listen` was told.
        """
        samples = np.asarray(samples)
        if self._engine is None:
            raise UsageError("this ear is closed")
        if samples.ndim != 1 or not np.issubdtype(samples.dtype, np.floating):
            raise UsageError(
                f"samples have shape {samples.shape} and dtype {samples.dtype}; expected float [n]"
            )
        if not np.isfinite(samples).all():
            raise InputError("the samples hold values that are NaN or infinite")
        if (len(self.wav) + len(samples)) / 16_000 > self._seconds:
            raise InputError(
                f"more than the {self._seconds:g} s that this ear was made for: give `listen` more "
                "seconds, or begin with a new one"
            )
        self.wav = np.concatenate([self.wav, samples.astype(np.float32)])
        config = self._model.config.encoder
        final = mel_frames(max(0, len(self.wav) - _AHEAD))
        chunks = final // config.chunk_frames
        if config.attention == "chunked" and chunks > self._heard:
            self._hear(chunks)

    def ask(self, text: str, **sampling: Any) -> Reply:
        """Answers a text about all that was pushed; options as in `MossAudio.generate`.

        Raises:
          InputError: nothing was pushed, or less than a log-mel frame.
          UsageError: an option is unknown or out of range, or the ear is closed.
        """
        if self._engine is None:
            raise UsageError("this ear is closed")
        try:
            chosen = Sampling(**sampling)
        except TypeError as error:
            raise UsageError(str(error)) from None
        prompt = self._model.prepare(Request(text, [self.wav], chosen))
        (prompt,) = self._model.warned([prompt])
        (output,) = self._engine.run([(prompt, prompt.sampling)])
        return self._model.reply(output, prompt)

    def _hear(self, chunks: int) -> None:
        """Runs a prompt's beginning up to the end of so many chunks; its pages are then known."""
        config = self._model.config.encoder
        frames = chunks * config.chunk_frames
        prompt = self._model.prepare(Request("", [self.wav]))
        places = np.flatnonzero(prompt.ids == self._model.processor.audio_token_id)
        end = 1 + places[audio_tokens(frames) - 1]
        begun = Example(prompt.ids[:end], (prompt.mels[0][:, :frames],))
        self._engine.run([(begun, Sampling(max_new_tokens=1))])
        self._heard = chunks


def tokens_for(seconds: float, new_tokens: int) -> int:
    """Cache positions for a clip of so many seconds with a question and an answer."""
    sound = audio_tokens(mel_frames(round(16_000 * seconds)))
    markers = round(seconds / 2) * len(str(round(seconds)))
    return sound + markers + new_tokens + 1024
