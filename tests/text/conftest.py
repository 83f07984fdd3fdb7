"""Small tokenizers of both kinds, made here; the Qwen one where ../shared is."""

import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from moss_audio_jax.text import bpe, load_tokenizer
from moss_audio_jax.text.tokenizer import SPECIAL_STRINGS

SHARED = Path(__file__).resolve().parents[3] / "shared"
CORPUS = [
    "hello there, the weather is nice; they're glad, I've seen birds chirping at 10.25 seconds",
    "You are a helpful assistant. system user assistant Describe this audio. 0123456789",
    "<think> </think> <|im_end|> <|im_start|>",
    "你好，世界。天气很好。 naïve café",
] * 20


@pytest.fixture(scope="session")
def shared():
    if not SHARED.is_dir():
        pytest.skip("../shared (golden data, Qwen vocabulary) does not exist")
    return SHARED


@pytest.fixture(scope="session")
def qwen(shared):
    return load_tokenizer(shared / "qwen_tokenizer")


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory):
    """vocab.json + merges.txt of about 400 pieces, special tokens in tokenizer_config.json.

    As in the hub's Qwen tokenizer, the placeholder carries another name (<|vision_pad|>) and the
    audio start and end have no piece.
    """
    folder = tmp_path_factory.mktemp("bpe")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(bpe.QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.model.save(str(folder))
    merges = folder / "merges.txt"
    if not merges.read_text(encoding="utf-8").startswith("#version"):
        merges.write_text("#version: 0.2\n" + merges.read_text(encoding="utf-8"), encoding="utf-8")

    strings = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_pad|>"]
    first = tokenizer.get_vocab_size()
    listed = {}
    for index, string in enumerate([*strings, "<think>", "</think>"], first):
        listed[str(index)] = {
            "content": string,
            "special": string in strings,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "single_word": False,
        }
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": listed,
        "additional_special_tokens": strings,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "errors": "replace",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ids = {
        "audio_token_id": first + 3,
        "audio_start_id": first + 6,
        "audio_end_id": first + 7,
    }
    (folder / "processor_config.json").write_text(json.dumps(ids))
    return folder


def train_sentencepiece(folder, kind):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=320,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        byte_fallback=True,
        split_digits=True,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        minloglevel=2,
        **{f"{kind}_symbols": sorted(SPECIAL_STRINGS)},
    )
    return folder


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory):
    return train_sentencepiece(tmp_path_factory.mktemp("sentencepiece"), "control")


@pytest.fixture(scope="session", params=["bpe", "control", "user_defined"])
def tiny(request, tmp_path_factory):
    """A small tokenizer of each kind; SentencePiece with special pieces of either type."""
    if request.param == "bpe":
        return load_tokenizer(request.getfixturevalue("bpe_folder"))
    return load_tokenizer(train_sentencepiece(tmp_path_factory.mktemp("sp"), request.param))
