"""Loads the tokenizer of a folder, of any kind."""

from __future__ import annotations

from pathlib import Path

from moss_audio_jax import config, hub
from moss_audio_jax.errors import InputError
from moss_audio_jax.text import bpe, sentence_piece
from moss_audio_jax.text.tokenizer import Tokenizer

# Files that a converter copies as well, so that other programs find a complete tokenizer.
_SIDE_FILES = (
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)


def load_tokenizer(folder: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer in a folder: tokenizer.json, else vocab.json + merges.txt, else *.model.

    The first two are byte-level BPE as in Qwen; a *.model is SentencePiece (of several,
    tokenizer.model is taken). processor_config.json beside them gives the audio ids.

    Args:
      vocab_size: the model's; the tokenizer's ids must be below it.

    Raises:
      InputError: no tokenizer, a file that cannot be read, ids that clash or do not fit.
    """
    tokenizer = _read_tokenizer(hub.folder_of(folder, weights=False))
    tokenizer.check(vocab_size)
    return tokenizer


def _read_tokenizer(folder: Path) -> Tokenizer:
    """`load_tokenizer` without the check of ids."""
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder; expected one that holds a tokenizer{hub.advice(folder)}"
        )
    side = [folder / name for name in _SIDE_FILES if (folder / name).exists()]
    processor = None
    path = folder / "processor_config.json"
    if path.exists():
        processor = config.processor_from_official(config.read_json(path), str(path))

    whole, vocab, merges = (
        folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt")
    )
    models = sorted(folder.glob("*.model"))
    if whole.exists():
        parts = [path for path in (vocab, merges) if path.exists()]
        return bpe.from_tokenizer_json(whole, [*parts, *side], processor)
    if vocab.exists() and merges.exists():
        return bpe.from_vocab_and_merges(vocab, merges, side, processor)
    if models:
        preferred = folder / "tokenizer.model"
        if preferred not in models and len(models) > 1:
            raise InputError(
                f"{folder}: {len(models)} *.model files ({', '.join(m.name for m in models)}); "
                "rename the tokenizer's file to tokenizer.model"
            )
        model = preferred if preferred in models else models[0]
        return sentence_piece.from_model(model, side, processor)
    for here, missing in ((vocab, merges), (merges, vocab)):
        if here.exists():
            raise InputError(f"{missing}: no such file, although {here.name} exists; add it")
    raise InputError(
        f"{folder}: no tokenizer; expected tokenizer.json, vocab.json + merges.txt or *.model"
    )
