"""The token ids that generation needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from moss_audio_jax.config import ModelConfig, ProcessorConfig
from moss_audio_jax.text.tokenizer import Tokenizer

_QWEN_STOP_IDS = (151645, 151643)  # without a tokenizer


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The special ids that the engine uses. Hashable, so that it can be a static argument."""

    size: int
    audio_token_id: int
    forbidden: tuple[int, ...] = ()
    stop: tuple[int, ...] = ()
    think_open: int = -1
    think_close: int = -1
    close_thinking: tuple[int, ...] = ()  # the ids that end a <think> block whose budget is spent


def vocabulary(
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    processor: ProcessorConfig,
    stop_ids: Sequence[int] = (),
) -> Vocabulary:
    """The ids of a model. Audio ids are never generated; turn ends and `stop_ids` end an answer."""
    size = config.decoder.vocab_size
    stop = {*stop_ids, *(tokenizer.stop_ids if tokenizer else _QWEN_STOP_IDS)}
    audio = (processor.audio_token_id, processor.audio_start_id, processor.audio_end_id)
    think_open = think_close = -1
    close_thinking: tuple[int, ...] = ()
    if tokenizer is not None and tokenizer.think_ids is not None:
        think_open, think_close = tokenizer.think_ids
        close_thinking = (*tokenizer.encode("\n"), think_close, *tokenizer.encode("\n\n"))
    return Vocabulary(
        size=size,
        audio_token_id=processor.audio_token_id,
        forbidden=tuple(i for i in sorted(set(audio)) if i < size),
        stop=tuple(i for i in sorted(stop) if i < size),
        think_open=think_open,
        think_close=think_close,
        close_thinking=close_thinking,
    )
