"""A small set of rows with synthetic clips, and what reads it."""

import json

import numpy as np
import pytest
from data_rows import ENCODER, asr, text, write_clip, write_rows

from moss_audio_jax.data.loader_config import LoaderConfig
from moss_audio_jax.data.mixture import Mixture
from moss_audio_jax.data.pipeline import Loader
from moss_audio_jax.text import load_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """Bytes and the special tokens, as vocab.json + merges.txt."""
    folder = tmp_path_factory.mktemp("bytes")
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    listed = {
        str(256 + i): {"content": token, "special": True}
        for i, token in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    }
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": listed}))
    ids = {"audio_token_id": 300, "audio_start_id": 301, "audio_end_id": 302}
    (folder / "processor_config.json").write_text(json.dumps(ids))
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """speech.jsonl: 23 clips of 0.2 to 1.9 s; text.jsonl: 12 rows without sound."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(5)
    rows = []
    for i in range(23):
        write_clip(folder / "clips" / f"{i}.wav", rng.uniform(0.2, 1.9), seed=i)
        rows.append(asr(f"clips/{i}.wav", f"answer {i} " + "word " * int(rng.integers(0, 12))))
    write_rows(folder / "speech.jsonl", rows)
    chat = [
        {"conversation": [text("user", f"count to {i}"), text("assistant", "1, 2 " * (i + 1))]}
        for i in range(12)
    ]
    write_rows(folder / "text.jsonl", chat)
    return folder


@pytest.fixture
def make_loader(tokenizer, corpus):
    """make_loader(spec=None, process=(0, 1), report_dir=None, **LoaderConfig keys)."""
    made = []

    def make(spec=None, process=(0, 1), report_dir=None, encoder=ENCODER, **keys):
        keys = {"batch": 4, "length": 400, "chunks": 8, "seed": 3, "window": 8, "ahead": 1} | keys
        config = LoaderConfig(**keys)
        spec = spec or {
            "speech": {"paths": str(corpus / "speech.jsonl"), "weight": 3},
            "text": {"paths": str(corpus / "text.jsonl"), "weight": 1},
        }
        mixture = Mixture(spec, config.seed)
        loader = Loader(mixture, tokenizer, encoder, config, *process, report_dir)
        made.append(loader)
        return loader

    yield make
    for loader in made:
        loader.close()
