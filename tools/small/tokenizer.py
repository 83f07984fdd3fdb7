"""Trains a SentencePiece tokenizer on training rows or plain text.

    python tools/small/tokenizer.py --input rows.jsonl notes.txt --vocab-size 2048 --output DIR

Writes DIR/tokenizer.model and DIR/processor_config.json (the ids of the audio tokens). Byte
fallback makes any text possible; digits are separate pieces, as time markers need them. Words count
more often than they occur (--emphasis), so that as many words as fit become one piece. A rarer word
after a space is two pieces, the space and the word, so that it is the same piece with and without
one.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from moss_audio_jax.config import ProcessorConfig, processor_to_official
from moss_audio_jax.data.records import conversations
from moss_audio_jax.data.sources import Source
from moss_audio_jax.errors import InputError
from moss_audio_jax.text.prompt import DEFAULT_SYSTEM
from moss_audio_jax.text.tokenizer import AUDIO, AUDIO_END, AUDIO_START, SPECIAL_STRINGS

# Every digit must occur in training, and parts of the chat should become pieces.
_WORD = re.compile(r"[\u2e80-\uffff]|[^\W\d_]+")  # an ideograph, or a run of letters
_ALWAYS = (DEFAULT_SYSTEM, "system\n", "user\n", "assistant\n", "0 1 2 3 4 5 6 7 8 9")


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, output: Path, emphasis: int = 300
) -> ProcessorConfig:
    """Writes the two files, and returns what processor_config.json says.

    Args:
      texts: the training texts; pieces do not cross their borders.
      vocab_size: of the result, including the eight special tokens and 256 byte pieces.
      emphasis: how many times each distinct word is added to the texts.
    """
    texts = [*_ALWAYS, *texts]
    words = sorted({word for text in texts for word in _WORD.findall(text)})
    output.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain(texts, words * emphasis),
            model_writer=model,
            vocab_size=vocab_size,
            character_coverage=1.0,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            byte_fallback=True,
            split_digits=True,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            control_symbols=sorted(SPECIAL_STRINGS),
            minloglevel=2,
        )
    except RuntimeError as error:  # more pieces than the text has, or fewer than its characters
        raise InputError(f"vocab_size {vocab_size}: {str(error).splitlines()[-1]}") from None
    (output / "tokenizer.model").write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    processor = ProcessorConfig(
        audio_token_id=pieces.piece_to_id(AUDIO),
        audio_start_id=pieces.piece_to_id(AUDIO_START),
        audio_end_id=pieces.piece_to_id(AUDIO_END),
    )
    config = json.dumps(processor_to_official(processor), indent=2) + "\n"
    (output / "processor_config.json").write_text(config)
    return processor


def texts_of(paths: Iterable[str]) -> Iterator[str]:
    """The texts of rows (*.jsonl, *.array_record), else the lines of a text file."""
    for path in paths:
        if Path(path).suffix in (".jsonl", ".array_record"):
            source = Source(path)
            for index in range(len(source)):
                for messages in conversations(source[index]):
                    yield from (m["content"] for m in messages if m["message_type"] == "text")
        else:
            yield from Path(path).read_text(encoding="utf-8").splitlines()


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--input", nargs="+", required=True, metavar="FILE")
    options.add_argument("--vocab-size", type=int, default=2560)
    options.add_argument("--emphasis", type=int, default=300)
    options.add_argument("--output", type=Path, required=True, metavar="DIR")
    args = options.parse_args()
    train_tokenizer(texts_of(args.input), args.vocab_size, args.output, args.emphasis)


if __name__ == "__main__":
    main()
