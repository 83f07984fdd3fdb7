"""DATE and FENSE of a score file beside the package's own, with a tiny encoder of random weights.

Ours goes through files and a process of the package; theirs is `mecat.evaluate` in this process.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("mecat", reason="the extra `mecat`")

import mecat
import torch

from moss_audio_jax import command
from moss_audio_jax.evaluate import score
from moss_audio_jax.evaluate.benchmarks import load_benchmark
from moss_audio_jax.evaluate.mecat import SUBSETS

pytestmark = pytest.mark.oracle

WORDS = ["a", "dog", "barks", "music", "plays", "man", "speaks", "loudly", "wind", "in", "rooms"]
SUBTASKS = ("long", "short", "speech", "music", "sound", "environment")
CATEGORIES = ("direct_perception", "sound_characteristics", "quality_assessment")
CATEGORIES += ("environment_reasoning", "inference_judgement", "application_context")
MAX_LENGTH = 256  # to which the error checker pads sentences
ERROR = float(np.log(0.9 / 0.1))  # the logit above which a sentence counts as broken
LEVELS = ("basic", "intermediate", "advanced", "complex")


def bert(folder: Path, seed: int):
    """Writes a tiny BERT and its tokenizer; the package expects these ids of special tokens."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    unused = [f"[unused{i}]" for i in range(99)]
    vocabulary = ["[PAD]", *unused, "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(seed)
    # Large weights, so that sentences differ by more than DATE's tolerance.
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.6,
    )
    model = BertModel(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """The folder of a text encoder: a sentence encoder and an error checker."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("encoder")
    plain = tmp_path_factory.mktemp("plain") / "bert"
    bert(plain, seed=0)
    modules = [Transformer(str(plain)), Pooling(16)]
    SentenceTransformer(modules=modules).save(str(folder / "paraphrase-TinyBERT-L6-v2"))
    checker = bert(folder / "bert-base-uncased", seed=1)
    state = {f"encoder.{name}": value for name, value in checker.state_dict().items()}
    state |= {"clf.weight": torch.randn(6, 16), "clf.bias": torch.zeros(6)}
    tokenizer = AutoTokenizer.from_pretrained(folder / "bert-base-uncased")
    draw = random.Random(2)
    tokens = tokenizer([sentence(draw) for _ in range(30)], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = checker(**tokens).last_hidden_state[:, 0] @ state["clf.weight"][-1]
    state["clf.bias"][-1] = ERROR - logits.quantile(0.7)  # three sentences of ten have an error
    content = {"model_type": "bert-base-uncased", "num_classes": 6, "state_dict": state}
    torch.save(content, folder / "echecker_clotho_audiocaps_base.ckpt")
    return folder


@pytest.fixture
def theirs(encoder, monkeypatch):
    """`mecat.evaluate` of the package, which finds the encoder in the working folder."""
    monkeypatch.chdir(encoder)
    monkeypatch.setenv("FENSE_DATA", str(encoder))
    threads = torch.get_num_threads()
    from mecat.evaluate import evaluate

    yield lambda said, **more: evaluate(said, metrics=["fense", "date"], device="cpu", **more)
    torch.set_num_threads(threads)


def sentence(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(3, 8)))


def references(folder: Path, task: str, per_subset: int) -> Path:
    draw = random.Random(0)
    folder.mkdir()
    for subset in SUBSETS:
        rows = []
        for number in range(per_subset):
            if task == "caption":
                row = {name: [sentence(draw) for _ in range(3)] for name in SUBTASKS}
            else:
                row = {"category": draw.choice(CATEGORIES), "difficulty": draw.choice(LEVELS)}
                row |= {"question": "What is heard?", "answer": sentence(draw)}
            rows.append({f"{subset}_{number}": {**row, "domain": subset}})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{subset}.jsonl").write_text(text)
    return folder


def answers(items) -> dict[str, str]:
    """A part of a reference and other words, by id; the first item has no answer."""
    draw = random.Random(1)
    return {
        item.id: " ".join([*item.reference["answer"][0].split()[:4], sentence(draw)])
        for item in items[1:]
    }


def scored(benchmark: str, data: Path, said: dict[str, str], encoder: Path, folder: Path) -> dict:
    rows = [json.dumps({"id": name, "raw_output": text}) for name, text in said.items()]
    (folder / "predictions.jsonl").write_text("\n".join(rows) + "\n")
    words = ["--benchmark", benchmark, "--data", data, "--text-encoder", encoder]
    words += ["--predictions", folder / "predictions.jsonl", "--output", folder / "score.json"]
    assert command.run(score.main, list(map(str, words))) == 1  # one answer is missing
    return json.loads((folder / "score.json").read_text())


def assert_equal(result: dict, table, whole: str) -> None:
    """A score file has what the package's table has, and subtasks differ."""
    by = result["by"]["subtask"]
    for name in ("date", "fense"):
        found = {subtask: by[subtask]["official"][name] for subtask in by}
        found[whole] = result["official"][name]
        values = dict(zip(table["subtask"], 100 * table[name], strict=True))
        assert found == pytest.approx(values, abs=1e-9)
        assert len(set(found.values())) > 4
        assert 1 < found[whole] < 99


def test_captions(encoder, theirs, tmp_path):
    data = references(tmp_path / "caption", "caption", per_subset=4)
    said = answers(load_benchmark("mecat-caption", data).items)
    result = scored("mecat-caption", data, said, encoder, tmp_path)
    by_subtask: dict[str, dict[str, str]] = {name: {} for name in SUBTASKS}
    for name, text in said.items():
        key, subtask = name.split("/")
        by_subtask[subtask][key] = text
    table = theirs(by_subtask, task="caption", reference_dir=str(data))
    assert_equal(result, table, "score_caption")
    assert result["n"] - 1 == table["num_samples"].dropna().sum()
    assert fense_by_hand(encoder, data, said) == pytest.approx(
        result["by"]["subtask"]["pure_music"]["official"]["fense"], abs=0.01
    )


def fense_by_hand(encoder: Path, data: Path, said: dict[str, str]) -> float:
    """FENSE of the captions of clean music, in percent, from the papers' formulas."""
    from sentence_transformers import SentenceTransformer
    from transformers import AutoTokenizer, BertModel

    rows = [json.loads(line) for line in (data / "0M0.jsonl").read_text().splitlines()]
    true = {key: row["music"] for one in rows for key, row in one.items()}
    sbert = SentenceTransformer(str(encoder / "paraphrase-TinyBERT-L6-v2"), device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(encoder / "bert-base-uncased")
    checker = BertModel.from_pretrained(encoder / "bert-base-uncased").eval()
    state = torch.load(encoder / "echecker_clotho_audiocaps_base.ckpt")["state_dict"]
    points, errors = [], 0
    for key, texts in true.items():
        answer = said[f"{key}/music"]
        one, *several = sbert.encode([answer, *texts], normalize_embeddings=True)
        tokens = tokenizer(answer, padding="max_length", max_length=MAX_LENGTH, return_tensors="pt")
        with torch.no_grad():
            first = checker(**tokens).last_hidden_state[0, 0]
        wrong = state["clf.weight"][-1] @ first + state["clf.bias"][-1] > ERROR
        points.append(float(one @ np.mean(several, 0)) * (0.1 if wrong else 1))
        errors += bool(wrong)
    assert 0 < errors < len(points)
    return 100 * float(np.mean(points))


def test_questions(encoder, theirs, tmp_path):
    data = references(tmp_path / "qa", "qa", per_subset=12)
    said = answers(load_benchmark("mecat-qa", data).items)
    result = scored("mecat-qa", data, said, encoder, tmp_path)
    assert_equal(result, theirs(said, task="qa", reference_dir=str(data)), "score_qa")


def test_the_references_of_the_package():
    """The numbers of samples in the authors' tables."""
    folder = Path(mecat.__file__).parent / "reference"
    captions = load_benchmark("mecat-caption", folder / "caption" / "test").items
    whole = dict.fromkeys(("content_long", "content_short", "environment"), 20052)
    mixed = dict.fromkeys(("mixed_speech", "mixed_music", "mixed_sound"), 8593)
    pure = {"pure_speech": 7839, "pure_music": 2593, "pure_sound": 848}
    assert counts(captions) == {**whole, **mixed, **pure}
    questions = load_benchmark("mecat-qa", folder / "qa" / "test").items
    numbers = (20624, 19767, 18942, 18300, 19756, 2871)
    assert counts(questions) == dict(zip(CATEGORIES, numbers, strict=True))


def counts(items) -> dict[str, int]:
    names = [item.group["subtask"] for item in items]
    return {name: names.count(name) for name in dict.fromkeys(names)}
