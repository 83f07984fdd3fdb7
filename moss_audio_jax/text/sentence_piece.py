"""SentencePiece, the tokenizer of models trained from scratch here.

Text round-trips (`decode(encode(t)) == t`) through a model trained with

    normalization_rule_name="identity"   text is kept as it is
    add_dummy_prefix=False               no space is put before a text
    remove_extra_whitespaces=False       runs of spaces and newlines stay
    byte_fallback=True                   256 byte pieces: any character can be written
    split_digits=True                    "0".."9" are separate pieces (time markers need them)
    control_symbols=[<|endoftext|>, <|im_start|>, <|im_end|>, <think>, </think>,
                     <|AUDIO|>, <|audio_bos|>, <|audio_eos|>]
    bos_id=-1, eos_id=-1, pad_id=-1      the control symbols above replace these

The training text must hold every digit. The same strings as `user_defined_symbols` work too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from moss_audio_jax.config import ProcessorConfig
from moss_audio_jax.errors import InputError
from moss_audio_jax.files import read_bytes
from moss_audio_jax.text.tokenizer import SPECIAL_STRINGS, Tokenizer

_SPACE = "\u2581"  # how a piece writes a space
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_BYTES = {f"<0x{b:02X}>" for b in range(256)}
_SPECIAL_SHAPE = re.compile(r"<\|[^|<>]+\|>")
# A chat is tokenised piece by piece, so no space may be added or dropped at a piece's start.
# Appended to a serialised ModelProto, this sets normalizer_spec (field 3) add_dummy_prefix and
# remove_extra_whitespaces (3 and 4) to false: protobuf merges a message given twice.
_KEEP_WHITESPACE = b"\x1a\x04\x18\x00\x20\x00"


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model of any kind (unigram or BPE)."""

    def __init__(
        self,
        model: sentencepiece.SentencePieceProcessor,
        files: Sequence[Path],
        processor: ProcessorConfig | None,
    ):
        """Args:
        model: the library's processor, loaded.
        files, processor: see `Tokenizer`.
        """
        try:
            pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
        except UnicodeDecodeError as error:
            raise InputError(f"{files[0]}: a piece is not UTF-8 ({error.reason})") from None
        self._byte_pieces = {p: i for i, p in enumerate(pieces) if model.is_byte(i)}
        if self._byte_pieces and self._byte_pieces.keys() != _BYTES:
            raise InputError(f"{files[0]}: its byte pieces are not <0x00> to <0xFF>")
        self._unknown = {p for i, p in enumerate(pieces) if model.is_unknown(i)}
        self._model = model
        control = {p for i, p in enumerate(pieces) if model.is_control(i)}
        # The library does not mark user-defined pieces, so they are recognised by their shape.
        defined = {
            p for p in pieces if p in SPECIAL_STRINGS or _SPECIAL_SHAPE.fullmatch(p)
        } - control
        special = control | defined
        vocab = {p: i for i, p in enumerate(pieces)}
        super().__init__(vocab, special, special, files, processor)
        # Text is cut after the first character of every user-defined string, so that the library
        # never sees a whole one. The lookahead also finds overlapping ones.
        strings = "|".join(map(re.escape, sorted(defined, key=len, reverse=True)))
        self._cut = re.compile(f"(?=(?:{strings}))") if strings else None

    def _encode_plain(self, text: str) -> list[int]:
        if self._cut is None:
            return self._encode_part(text)
        ids: list[int] = []
        cursor = 0
        for match in self._cut.finditer(text):
            ids += self._encode_part(text[cursor : match.start() + 1])
            cursor = match.start() + 1
        return ids + self._encode_part(text[cursor:])

    def _encode_part(self, text: str) -> list[int]:
        if _SPACE not in text or not self._byte_pieces:
            return self._model.encode(text)
        # The model would read this character as a space, so it is written as bytes.
        block = [self._byte_pieces[f"<0x{b:02X}>"] for b in _SPACE.encode()]
        first, *rest = text.split(_SPACE)
        ids = self._model.encode(first)
        for part in rest:
            ids += [*block, *self._model.encode(part)]
        return ids

    def _piece_bytes(self, piece: str) -> bytes:
        if piece in self._byte_pieces:
            return bytes([int(_BYTE.fullmatch(piece)[1], 16)])
        if piece in self._unknown:
            return "\ufffd".encode()
        return piece.replace(_SPACE, " ").encode()


def from_model(
    path: Path, side: Sequence[Path], processor: ProcessorConfig | None
) -> SentencePieceTokenizer:
    """Reads a *.model file and switches off its dummy prefix and its removal of whitespace."""
    model = sentencepiece.SentencePieceProcessor()
    try:
        raw = read_bytes(path, "a SentencePiece model")
        model.load_from_serialized_proto(raw + _KEEP_WHITESPACE)
    except (RuntimeError, UnicodeDecodeError):
        raise InputError(f"{path}: not a SentencePiece model; train or copy it anew") from None
    if not model.get_piece_size():
        raise InputError(f"{path}: a SentencePiece model without pieces; train or copy it anew")
    return SentencePieceTokenizer(model, [path, *side], processor)
