"""The results of tools: the toy checkpoint, a tokenizer."""

from __future__ import annotations

import json

import pytest

from moss_audio_jax.config import processor_from_official, read_json
from moss_audio_jax.errors import InputError
from moss_audio_jax.text import load_tokenizer
from moss_audio_jax.weights.convert import load_params
from moss_audio_jax.weights.opening import read_config
from tools.make.toy import make_toy
from tools.small.tokenizer import texts_of, train_tokenizer


def test_a_tokenizer_of_rows_and_text(tmp_path):
    sentence = "the quick brown fox jumps over lazy dogs while seven owls hoot"
    words = sentence.split()
    said = {"role": "assistant", "message_type": "text", "content": "今天天气很好"}
    asked = said | {"role": "user", "content": sentence}
    (tmp_path / "rows.jsonl").write_text(json.dumps({"conversation": [asked, said]}) + "\n")
    (tmp_path / "more.txt").write_text("Zebra crossings\n[0.00]fox[1.25]")
    texts = texts_of([str(tmp_path / "rows.jsonl"), str(tmp_path / "more.txt")])
    processor = train_tokenizer(texts, 330, tmp_path / "made")

    tokenizer = load_tokenizer(tmp_path / "made", 330)
    assert tokenizer.vocab_size == 330
    assert tokenizer.processor == processor
    assert [len(tokenizer.encode(word)) for word in (*words, "Zebra")] == [1] * (len(words) + 1)
    assert len(tokenizer.encode("2025")) == 4
    text = "  what?\n[12.50]天 naïve 🦉<|im_end|>  "
    assert tokenizer.decode(tokenizer.encode(text)) == text
    with pytest.raises(InputError, match="vocab_size 260"):
        train_tokenizer(["a few words"], 260, tmp_path / "small")


def test_toy_with_its_own_tokenizer(tmp_path):
    config = make_toy(tmp_path / "toy")
    assert read_config(tmp_path / "toy") == config
    assert read_json(tmp_path / "toy" / "config.json")["random_weights"] is True
    vocab = json.loads((tmp_path / "toy" / "vocab.json").read_text(encoding="utf-8"))
    assert len(set(vocab.values())) == 256
    assert [vocab[digit] for digit in "0123456789"] == list(range(15, 25))
    processor = processor_from_official(read_json(tmp_path / "toy" / "processor_config.json"))
    ids = {processor.audio_token_id, processor.audio_start_id, processor.audio_end_id}
    assert ids == {261, 262, 263}
    assert config.decoder.vocab_size == 384
    params = load_params(tmp_path / "toy")
    assert params["lm_head"]["kernel"].dtype == "bfloat16"


def test_toy_with_a_vocabulary_like_qwens(tmp_path):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "vocab.json").write_text(json.dumps({"!": 0, "zz": 151642}))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    added = {"151645": {"content": "<|im_end|>"}, "151668": {"content": "</think>"}}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    config = make_toy(tmp_path / "toy", tokenizer)
    assert config.decoder.vocab_size == 151936
    processor = processor_from_official(read_json(tmp_path / "toy" / "processor_config.json"))
    assert (processor.audio_token_id, processor.audio_end_id) == (151654, 151670)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        assert (tmp_path / "toy" / name).read_bytes() == (tokenizer / name).read_bytes()
