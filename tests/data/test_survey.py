"""What a survey notes of rows is what training makes of them."""

import dataclasses

import numpy as np
import pytest
import soundfile
from data_rows import ENCODER, asr, audio, text, write_clip, write_rows

from moss_audio_jax.data import survey as surveys
from moss_audio_jax.data.loader_config import LoaderConfig, Pick
from moss_audio_jax.data.mixture import Mixture
from moss_audio_jax.data.pipeline import example_maker
from moss_audio_jax.data.survey import Reader, Survey, packed
from moss_audio_jax.post_train.questions import Questions

CONFIG = LoaderConfig(batch=4, length=400, chunks=8, seed=3, window=8, streams=2)


@pytest.fixture
def read(tokenizer):
    """read(spec, asks=None, **keys) -> (the survey, what each row was rejected for).

    asks: (prompt_tokens, new_tokens) of questions.
    """

    def read(spec, asks=None, **keys):
        config = dataclasses.replace(CONFIG, **keys)
        survey = Survey(Mixture(spec, config.seed))
        maker = example_maker(tokenizer, ENCODER, config)
        reader = Reader(maker, asks and Questions(maker, *asks))
        return survey, [each and each.reason for each in survey.read(reader, 60.0)]

    return read


@pytest.mark.parametrize("keys", [{}, {"packing": False}, {"row_examples": 2}, {"chunks": 3}])
def test_an_epoch_is_packed_as_the_loader_packs_it(read, make_loader, corpus, keys):
    spec = {
        "speech": {"paths": str(corpus / "speech.jsonl"), "weight": 3},
        "text": {"paths": str(corpus / "text.jsonl"), "weight": 1},
    }
    survey, _ = read(spec, **keys)
    found = packed(survey, ENCODER, dataclasses.replace(CONFIG, **keys))
    loader = make_loader(spec, streams=2, min_seen=10_000, **keys)
    rows = ([], [])
    while min(map(len, rows)) < found.rows:
        arrays = next(loader).arrays
        for row in range(4):
            used = arrays["frames"][row].any(axis=-1).sum() / arrays["frames"].shape[1]
            filled = (arrays["segment_ids"][row] > 0).sum() / arrays["segment_ids"].shape[1]
            rows[row // 2].append((filled, used))
    split = next(
        n
        for n in range(found.rows + 1)
        if list(zip(found.tokens[:n], found.strips[:n], strict=True)) == rows[0][:n]
        and list(zip(found.tokens[n:], found.strips[n:], strict=True)) == rows[1][: found.rows - n]
    )
    assert 0 < split < found.rows
    assert found.visits >= survey.mixture.rows


def test_processes_find_what_a_thread_finds(read, corpus, monkeypatch):
    spec = str(corpus / "speech.jsonl")
    alone, _ = read(spec)
    monkeypatch.setattr(surveys, "_EACH", 8)
    several, _ = read(spec)
    assert alone.usable.all()
    assert alone.seconds.min() > 0
    for name in ("usable", "tokens", "labels", "seconds", "whole", "clips", "sounds", "starts"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(several, name), err_msg=name)


def test_equal_sound_is_found_in_any_file(read, tmp_path):
    wav = np.round(write_clip(tmp_path / "float.wav", 1.0) * 32767).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", wav, 16000)
    soundfile.write(tmp_path / "same.flac", wav, 16000)
    write_clip(tmp_path / "other.wav", 1.0, seed=1)
    rows = [
        asr("a.wav", "hello"),
        asr("same.flac", "hello"),  # repeats it
        asr("same.flac", "good-bye"),
        asr("other.wav", "hello"),
        {"conversation": [text("user", "hi"), text("assistant", "hello")]},
    ]
    train, _ = read(write_rows(tmp_path / "train.jsonl", rows))
    assert train.repeats() == {1: 0}
    assert train.heard_again() == 2
    held_out = [asr("same.flac", "another answer"), asr("float.wav", "hello"), rows[4], rows[3]]
    held_out, _ = read(write_rows(tmp_path / "eval.jsonl", held_out))
    assert held_out.leaks(train) == {
        0: (0, "sound"),
        2: (4, "conversation"),
        3: (3, "conversation"),
    }


def test_every_branch_that_may_be_drawn_is_read(read, tmp_path):
    write_clip(tmp_path / "a.wav", 1.0)

    def row(*tasks, last="fine"):
        answers = ["fine"] * (len(tasks) - 1) + [last]
        branches = [
            {"messages": [text("user", "?"), text("assistant", answer)], "task": task}
            for task, answer in zip(tasks, answers, strict=True)
        ]
        return {"conversation": [audio("a.wav")], "branches": branches}

    tasks = [f"t{n}" for n in range(20)]
    rows = [row(*tasks), row(*tasks, last=""), row("t0", "never", last="")]
    pick = (Pick("t", 1.0),)
    survey, reasons = read(write_rows(tmp_path / "rows.jsonl", rows), pick=pick)
    assert reasons[0] is None
    assert reasons[1].startswith("branches[19]: ")
    assert reasons[2] is None  # the run never draws its empty answer
    assert survey.tasks["t0"] == [2, 2 * len("fine_")]  # of bytes, and the end of the turn
    assert survey.tasks.keys() == {*tasks}


def test_a_question_needs_only_an_answer(read, tmp_path):
    write_clip(tmp_path / "a.wav", 1.0)
    row = asr("a.wav", "x") | {"answer": "二"}
    row["conversation"].pop()
    path = write_rows(tmp_path / "rows.jsonl", [row, {**row, "language": "zh"}])
    asked, reasons = read(path, (400, 400))
    assert reasons == [None, None]
    assert {name: rows for name, (rows, _) in asked.languages.items()} == {"Han script": 1, "zh": 1}
    assert all("expected the assistant" in reason for reason in read(path)[1])
