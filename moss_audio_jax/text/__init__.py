"""Text: tokenizers, prompts, timestamps. Importable without JAX."""

from moss_audio_jax.text.loading import load_tokenizer
from moss_audio_jax.text.prompt import build_conversation, build_prompt
from moss_audio_jax.text.textgrid import to_textgrid
from moss_audio_jax.text.timestamps import (
    Segment,
    parse_timestamps,
    to_json,
    to_srt,
    to_vtt,
)

__all__ = [
    "Segment",
    "build_conversation",
    "build_prompt",
    "load_tokenizer",
    "parse_timestamps",
    "to_json",
    "to_srt",
    "to_textgrid",
    "to_vtt",
]
