"""Byte-level BPE, Qwen's tokenizer: tokenizer.json, or vocab.json + merges.txt."""

from __future__ import annotations

import contextlib
import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers

from moss_audio_jax.config import ProcessorConfig, read_json
from moss_audio_jax.errors import InputError
from moss_audio_jax.files import brief, quoted, read_bytes
from moss_audio_jax.text.tokenizer import LONE_SURROGATE, SPECIAL_STRINGS, Tokenizer

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_alphabet() -> dict[str, int]:
    """Maps the character that a byte-level vocabulary uses for a byte to that byte.

    Printable Latin-1 bytes use their own character, the others those from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return {chr(b if b in printable else next(others)): b for b in range(256)}


BYTE_OF = _byte_alphabet()


class BpeTokenizer(Tokenizer):
    """Byte-level BPE. `core` holds only the ordinary pieces, so it recognises no special token."""

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        nfc: bool,
        ordinary: dict[str, int],
        added: Sequence[tuple[str, int, bool]],
        files: Sequence[Path],
        processor: ProcessorConfig | None,
    ):
        """Args:
        core: pre-tokenizer and BPE model.
        nfc: bring text into Unicode normalisation form C first.
        ordinary: the BPE model's own vocabulary.
        added: (string, id, hidden) of each added token.
        files, processor: see `Tokenizer`.
        """
        where = files[0]
        vocab = dict(ordinary)
        special = SPECIAL_STRINGS & ordinary.keys()
        hidden = set(special)
        owner = {index: piece for piece, index in ordinary.items()}
        for string, index, hide in added:
            if vocab.get(string, index) != index or owner.get(index, string) != string:
                raise InputError(
                    f"{where}: added token {quoted(string)} has id {index}, which clashes with "
                    f"{quoted(owner.get(index, string))} = {vocab.get(string, index)}; give it its "
                    "own id"
                )
            vocab[string] = index
            owner[index] = string
            special.add(string)
            (hidden.add if hide else hidden.discard)(string)
        if not vocab:
            raise InputError(f"{where}: the vocabulary is empty")
        super().__init__(vocab, special, hidden, files, processor)
        self._core = core
        self._nfc = nfc
        self._added = special - ordinary.keys()
        # BPE silently drops a byte that has no piece; see _encode_plain.
        self._no_piece = bytes(b for char, b in BYTE_OF.items() if char not in ordinary)

    def _normalize(self, text: str) -> str:
        return unicodedata.normalize("NFC", text) if self._nfc else text

    def _encode_plain(self, text: str) -> list[int]:
        if self._no_piece:
            for char in text:
                if any(b in self._no_piece for b in char.encode()):
                    raise InputError(
                        f"{self.files[0]}: no piece for the bytes of {char!r}; expected all 256 "
                        "bytes in the vocabulary"
                    )
        with _one_line(f"{self.files[0]}: cannot encode a text"):
            return self._core.encode(text, add_special_tokens=False).ids

    def _piece_bytes(self, piece: str) -> bytes:
        if piece in self._added or not BYTE_OF.keys() >= set(piece):
            return piece.encode()
        return bytes(BYTE_OF[char] for char in piece)


def from_vocab_and_merges(
    vocab_path: Path, merges_path: Path, side: Sequence[Path], processor: ProcessorConfig | None
) -> BpeTokenizer:
    """Reads vocab.json + merges.txt, with the added tokens of the `side` files."""
    vocab = _checked_vocab(read_json(vocab_path), vocab_path)
    try:
        text = read_bytes(merges_path, "a list of merges").decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{merges_path}: not valid UTF-8 ({error})") from None
    lines = [line.strip() for line in text.split("\n")]
    if lines[0].startswith("#version:"):
        lines[0] = ""
    merges = [tuple(line.split(" ")) for line in lines if line]
    try:
        with _one_line(f"{vocab_path.parent}: vocab.json and merges.txt"):
            model = models.BPE(vocab=vocab, merges=merges)
    except InputError as error:
        raise InputError(_bad_merge(lines, vocab, merges_path) or str(error)) from None
    core = tokenizers.Tokenizer(model)
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    files = [vocab_path, merges_path, *side]
    return BpeTokenizer(core, True, vocab, _added_tokens(side), files, processor)


def from_tokenizer_json(
    path: Path, side: Sequence[Path], processor: ProcessorConfig | None
) -> BpeTokenizer:
    """Reads tokenizer.json. Its normaliser and pre-tokenizer are kept."""
    raw = read_json(path)
    model = raw.get("model")
    kind = model.get("type", "BPE") if isinstance(model, dict) else None
    with _one_line(f"{path}: pre_tokenizer"):
        splitter = json.dumps(raw.get("pre_tokenizer"))
    if kind != "BPE" or '"ByteLevel"' not in splitter:
        raise InputError(
            f"{path}: expected a byte-level BPE model (model.type BPE, pre_tokenizer ByteLevel), "
            f"found {quoted(kind)}"
        )
    vocab = _checked_vocab(model.get("vocab"), path)
    listed = raw.get("added_tokens") or []
    if not isinstance(listed, list) or any(not isinstance(token, dict) for token in listed):
        raise InputError(f"{path}: added_tokens must be a list of objects")
    added = [_added(token, token.get("id"), path) for token in listed]
    # BpeTokenizer normalises to NFC itself, because it searches special tokens in normalised text.
    nfc = raw.get("normalizer") == {"type": "NFC"}
    raw |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    if nfc:
        raw["normalizer"] = None
    with _one_line(f"{path}: not a tokenizer.json"):
        core = tokenizers.Tokenizer.from_str(json.dumps(raw))
    # A token may be listed among the added ones and in the model's vocabulary too.
    return BpeTokenizer(core, nfc, vocab, [*added, *_added_tokens(side)], [path, *side], processor)


def _checked_vocab(vocab: Any, path: Path) -> dict[str, int]:
    if not isinstance(vocab, dict):
        raise InputError(f"{path}: no vocabulary; expected an object of piece -> id")
    for piece, index in vocab.items():
        if not _is_id(index):
            raise InputError(
                f"{path}: id of {quoted(piece)} is {quoted(index)}; expected a whole number >= 0"
            )
        if LONE_SURROGATE.search(piece):
            raise InputError(f"{path}: the piece {quoted(piece)} is not text (a lone surrogate)")
    return vocab


def _is_id(index: Any) -> bool:
    return type(index) is int and 0 <= index < 2**31


@contextlib.contextmanager
def _one_line(where: str) -> Iterator[None]:
    """Turns errors and panics of the library into an InputError."""
    try:
        yield
    except BaseException as error:  # a panic of the library is not an Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{where}: {brief(error)}") from None


def _added_tokens(side: Iterable[Path]) -> list[tuple[str, int, bool]]:
    """(string, id, hidden) of the added tokens that the files beside a vocabulary list."""
    raw = {path.name: (path, read_json(path)) for path in side if path.suffix == ".json"}
    found: dict[str, tuple[str, int, bool]] = {}
    if "added_tokens.json" in raw:  # a file of older folders, without flags
        path, tokens = raw["added_tokens.json"]
        for string, index in tokens.items():
            found[string] = _added({"content": string, "special": True}, index, path)
    tokens = []
    if "tokenizer_config.json" in raw:
        path, settings = raw["tokenizer_config.json"]
        listed = settings.get("added_tokens_decoder") or {}
        if not isinstance(listed, dict) or any(not isinstance(t, dict) for t in listed.values()):
            raise InputError(f"{path}: added_tokens_decoder must map ids to objects")
        for key, token in listed.items():
            number = int(key) if key.isascii() and key.isdecimal() and len(key) < 20 else key
            tokens.append(_added(token, number, path))
    # The flags of tokenizer_config.json win. A token with two ids stays, and is refused later.
    same = {(string, index) for string, index, _ in tokens}
    return [t for t in found.values() if t[:2] not in same] + tokens


def _added(token: dict[str, Any], index: Any, path: Path) -> tuple[str, int, bool]:
    string = token.get("content")
    whole = isinstance(string, str) and string and not LONE_SURROGATE.search(string)
    if not whole or not _is_id(index):
        raise InputError(
            f"{path}: added token {quoted(string)} has id {quoted(index)}; expected a string and a "
            "number >= 0"
        )
    return string, index, bool(token.get("special", False))


def _bad_merge(lines: Sequence[str], vocab: dict[str, int], path: Path) -> str | None:
    """What is wrong with the first impossible merge, or None."""
    for number, line in enumerate(lines, 1):
        pair = line.split(" ")
        if not line:
            continue
        if len(pair) != 2:
            return (
                f"{path}: line {number} is {line[:60]!r}; expected two pieces and a space between"
            )
        for piece in (*pair, "".join(pair)):
            if piece not in vocab:
                return (
                    f"{path}: line {number} makes or uses {quoted(piece)}, which vocab.json lacks"
                )
    return None
