"""Makes a small checkpoint with random weights in the official layout, for trying things.

    python tools/make/toy.py toy                              with a tiny byte-level tokenizer
    python tools/make/toy.py toy --tokenizer DIR              with another tokenizer and its size

It has about 10 million parameters besides the embedding and the head. Its answers are noise
(config.json: "random_weights": true).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import ml_dtypes  # noqa: F401  gives np.dtype the name bfloat16
import numpy as np
import sentencepiece

from moss_audio_jax.config import (
    RELEASED,
    DecoderConfig,
    EncoderConfig,
    ModelConfig,
    ProcessorConfig,
    to_official,
)
from moss_audio_jax.errors import InputError
from moss_audio_jax.tree import unflatten
from moss_audio_jax.weights.convert import save_official
from moss_audio_jax.weights.folder import copy_files
from moss_audio_jax.weights.official import table

# In the order of their ids, after the 256 bytes.
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")


def make_toy(
    output: str | Path,
    tokenizer: str | Path | None = None,
    *,
    seed: int = 0,
    dtype: str = "bfloat16",
    overwrite: bool = False,
) -> ModelConfig:
    """Writes the checkpoint and returns its config.

    Args:
      output: the new folder.
      tokenizer: a folder with tokenizer.json, vocab.json + merges.txt, or a SentencePiece *.model;
        None: bytes and five special tokens.
      seed: of the weights.
      dtype: of the weights.
      overwrite: replace a checkpoint at `output`.
    """
    with tempfile.TemporaryDirectory() as files:
        if tokenizer is None:
            write_byte_tokenizer(files)
        else:
            copy_files(tokenizer, files)
        config, processor = toy_config(ids_used(files))
        raw = to_official(config, dtype) | {"random_weights": True}
        Path(files, "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        params = random_params(config, seed, dtype)
        save_official(
            output, params, config, files_from=files, processor=processor, overwrite=overwrite
        )
    return config


def toy_config(ids: int) -> tuple[ModelConfig, ProcessorConfig]:
    """The toy's sizes for a tokenizer with ids 0 .. ids - 1; audio ids follow them.

    Qwen's tokenizer gets the audio ids and the vocabulary of the released models.
    """
    released = RELEASED["4b"].decoder.vocab_size
    processor = ProcessorConfig()
    qwen = processor.audio_token_id < ids <= processor.audio_start_id
    if not qwen:
        processor = ProcessorConfig(
            audio_token_id=ids, audio_start_id=ids + 1, audio_end_id=ids + 2
        )
    config = ModelConfig(
        encoder=EncoderConfig(
            d_model=256,
            layers=10,
            heads=4,
            ffn_dim=1024,
            conv_channels=64,
            output_dim=256,
            tap_layers=(2, 5, 8),
        ),
        decoder=DecoderConfig(
            hidden_size=64,
            ffn_dim=256,
            layers=6,
            heads=4,
            kv_heads=2,
            head_dim=32,
            vocab_size=released if qwen else -(-(ids + 3) // 128) * 128,
        ),
        adapter_dim=512,
    )
    return config.validate(), processor


def random_params(config: ModelConfig, seed: int, dtype: str) -> dict:
    """Normal weights of variance 1 / fan-in, norms 1, biases 0, as NumPy arrays."""
    rng = np.random.default_rng(seed)
    leaves = {}
    for entry in table(config):
        kind = entry.path.rsplit("/", 1)[1]
        if kind == "scale":
            leaf = np.ones(entry.shape, np.float32)
        elif kind == "bias":
            leaf = np.zeros(entry.shape, np.float32)
        else:
            layer = entry.shape if entry.stack is None else entry.shape[1:]
            fan_in = layer[-1] if kind == "embedding" else int(np.prod(layer[:-1]))
            leaf = rng.standard_normal(entry.shape, np.float32) / np.sqrt(np.float32(fan_in))
        leaves[entry.path] = leaf.astype(np.dtype(dtype))
    return unflatten(leaves)


def write_byte_tokenizer(folder: str | Path) -> None:
    """vocab.json, merges.txt (no merges) and tokenizer_config.json: 256 bytes, then SPECIAL."""
    # Byte-level BPE writes each byte as a printable character; the printable ones come first, so
    # that the digits 0-9 are ids 15-24 as in every vocabulary of this family.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    added = {
        str(len(vocab) + i): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": not token.endswith("think>"),
        }
        for i, token in enumerate(SPECIAL)
    }
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": added,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "unk_token": None,
    }
    folder = Path(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def ids_used(folder: str | Path) -> int:
    """One more than the highest token id in a tokenizer's files."""
    ids: set[int] = set()
    for file in Path(folder).iterdir():
        if file.suffix == ".model":
            ids.add(sentencepiece.SentencePieceProcessor(model_file=str(file)).vocab_size() - 1)
        if file.suffix != ".json":
            continue
        raw = json.loads(file.read_text(encoding="utf-8"))
        if file.name in ("vocab.json", "added_tokens.json"):
            ids.update(raw.values())
        elif file.name == "tokenizer_config.json":
            ids.update(map(int, raw.get("added_tokens_decoder", {})))
        elif file.name == "tokenizer.json":
            vocab = raw["model"]["vocab"]  # Unigram models have a list here
            ids.update(vocab.values() if isinstance(vocab, dict) else range(len(vocab)))
            ids.update(token["id"] for token in raw.get("added_tokens", []))
    if not ids:
        raise InputError(f"{folder}: no tokenizer.json, vocab.json or *.model")
    return max(ids) + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output")
    parser.add_argument("--tokenizer", help="folder to copy a tokenizer from (default: bytes)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args()
    try:
        config = make_toy(
            args.output,
            args.tokenizer,
            seed=args.seed,
            dtype=args.dtype,
            overwrite=args.overwrite,
        )
    except InputError as error:
        raise SystemExit(f"make_toy: {error}") from None
    sizes = {entry.path: int(np.prod(entry.shape)) for entry in table(config)}
    vocabulary = sum(n for path, n in sizes.items() if path.endswith("embedding") or "head" in path)
    total = sum(sizes.values())
    print(f"{args.output}: {total:,} parameters, {total - vocabulary:,} without embedding and head")


if __name__ == "__main__":
    main()
