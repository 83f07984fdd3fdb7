"""The small model's heads on real sound, with untrained weights."""

import json
import warnings
from collections import Counter
from pathlib import Path

import annotate_runs as runs
import numpy as np
import patchwork
import pytest
import soundfile
from tiny_model import tiny_config, write_checkpoint

from moss_audio_jax import command, world
from moss_audio_jax.annotate import doubt, pipeline, source
from moss_audio_jax.annotate.ears import TOKEN, Ears
from moss_audio_jax.annotate.speech import aligned
from moss_audio_jax.annotate.work import new_record
from moss_audio_jax.audio.lengths import audio_tokens
from moss_audio_jax.errors import InputError
from moss_audio_jax.generate.familiarity import Familiarity
from moss_audio_jax.weights.helpers import save_helpers
from moss_audio_jax.world import espeak


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("ears") / "tiny", max_positions=512)
    config, rng = tiny_config(), np.random.default_rng(3)
    heads = {}
    for name, size in (("pieces", config.decoder.vocab_size + 1), ("tags", len(world.TAGS))):
        kernel = 0.3 * rng.normal(size=(config.encoder.output_dim, size))
        heads[f"helpers/{name}/kernel"] = kernel.astype(np.float32)
        heads[f"helpers/{name}/bias"] = np.full(size, -1.0, np.float32)
    save_helpers(folder, heads, world.TAGS)
    return folder


def test_what_is_heard_of_a_clip_is_its_own(checkpoint):
    ears = Ears.load(checkpoint)
    rng = np.random.default_rng(1)
    wavs = [(0.1 * patchwork.babble(rng, n)).astype(np.float32) for n in (100, 9_000, 150_000)]
    together = ears.hear(wavs)
    assert [len(h.starts) for h in together[:2]] == [0, audio_tokens(56)]
    for wav, heard in zip(wavs[1:], together[1:], strict=True):
        (alone,) = ears.hear([wav])
        np.testing.assert_array_equal(heard.starts, alone.starts)
        np.testing.assert_allclose(heard.log_probs, alone.log_probs, atol=1e-4)
        np.testing.assert_allclose(heard.tags, alone.tags, atol=1e-5)
        np.testing.assert_allclose(np.exp(heard.log_probs).sum(1), 1, atol=1e-4)
        steps = np.diff(heard.starts)
        assert (steps > 0).all()  # chunks follow one another; the last token may be cut short
        assert steps.max() <= TOKEN + 1e-6
        grid = ears.posteriors(heard, len(wav) / 16_000)
        assert len(grid.frames) == round(25 * len(wav) / 16_000)
        assert grid.frames.max() <= 1
    words = aligned("ab c", together[2], ears.tokenizer, 100.0, least=-99)
    assert [w["text"] for w in words] == ["ab", "c"]
    assert 100 <= words[0]["start"] < words[0]["end"] <= words[1]["start"] < words[1]["end"] <= 110
    with pytest.raises(InputError, match="does not fit"):
        aligned("ab c", together[2], ears.tokenizer, 0.0, least=-1e-6)


def test_the_defaults_run_with_any_checkpoint(checkpoint, tmp_path):
    """Untrained heads give noise, but records stay free of contradictions."""
    rng = np.random.default_rng(2)
    wav = np.concatenate(
        [0.1 * patchwork.piece(kind, rng, 48_000) for kind in ("babble", "chord", "clicks")]
    )
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in" / "a.flac", wav, 16_000)
    summary = pipeline.annotate(
        source.find(tmp_path / "in"), tmp_path / "out", defaults_of(checkpoint)
    )
    assert summary.failed == []
    records, rows = runs.checked(tmp_path / "out")
    assert {one["system"] for r in records for one in r["asr"]} == {"ctc", "decoder"}
    assert any(r["events"] for r in records)
    assert any(r["music"] for r in records)
    assert rows


# --- sound that the model does not know ----------------------------------------------------------


def defaults_of(checkpoint):
    """The defaults, with thresholds so low that noise of untrained heads counts as evidence."""
    c = runs.defaults.get_config()
    c.checkpoint = str(checkpoint)
    c.sound.on, c.sound.over_speech, c.speech.gate, c.speech.present = 0.35, 0.35, 0.0, 0.2
    c.music.present, c.speech.threshold, c.speech.min_systems, c.speech.doubt = 0.2, 99.0, 1, 100.0
    return c


def test_foreign_sound_gives_only_the_rows_of_experts(checkpoint, tmp_path, monkeypatch):
    rng = np.random.default_rng(2)
    wav = np.concatenate([0.1 * patchwork.piece(kind, rng, 48_000) for kind in ("babble", "chord")])
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in" / "a.flac", wav, 16_000)
    foreign = Familiarity(2.0, True, "its encoder is in doubt")
    monkeypatch.setattr(Ears, "familiarity", lambda self, heard: foreign)

    def tried(name, c):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            summary = pipeline.annotate(source.find(tmp_path / "in"), tmp_path / name, c)
        records, rows = runs.checked(tmp_path / name)
        return records, rows, [str(w.message) for w in caught], summary

    c = defaults_of(checkpoint)
    c.speech.systems = ("ctc",)
    records, rows, said, summary = tried("out", c)
    assert rows == []
    (warning,) = said  # once, at the first segment
    assert "a.flac, from 0.00 s: unlike the sound that the model knows" in warning
    assert {r["doubt"] for r in records} == {
        "unlike the sound that the model knows: its encoder is in doubt"
    }
    assert all(s["sex"] is None for r in records for s in r["speakers"])
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["doubtful"]["segments"] == len(records) > 0
    assert manifest["warnings"] == summary.warnings
    assert "are foreign to the small model" in summary.warnings[0]
    assert (
        f"{manifest['doubtful']['rows']} row(s) that depend on it are left" in summary.warnings[0]
    )
    page = (tmp_path / "out" / "index.html").read_text()
    assert "are foreign to the small model" in page
    assert page.count("unlike the sound that the model knows") >= len(records)
    left_out = [
        n
        for n in runs.lines(tmp_path / "out" / "dropped.jsonl")
        if n["reason"].startswith("left out: unlike")
    ]
    assert len(left_out) == len(records)

    c.rows.keep_doubtful = True  # the records already exist
    _, rows, said, summary = tried("out", c)
    assert said == []
    assert {"events", "caption", "asr"} <= {row["task"] for row in rows}
    assert manifest["doubtful"]["rows"] >= len(rows) > 50  # these are balanced
    assert "their rows are kept" in summary.warnings[0]

    c = defaults_of(checkpoint)
    for name in ("one", "two"):
        runs.expert(name, "plugins:transcribe", c)
    runs.expert("words", "plugins:align", c)
    runs.expert("sounds", "plugins:gong", c)
    c.speech.systems, c.speech.align, c.sound.events = ("one", "two"), "words", "sounds"
    _, rows, _, _ = tried("experts", c)
    fields = {row["provenance"]["field"] for row in rows}
    assert {"transcript", "words", "sentences", "events", "captions.sound"} <= fields
    assert not fields & {"absent", "profile", "music", "captions.music"}


def test_systems_that_hear_different_words_are_not_believed():
    def record(*asr, rate, unfamiliar=None):
        heard = unfamiliar and {"score": 1.0, "unfamiliar": True, "reason": "why"}
        told = [("profile", "signal, tags"), ("events", "tags"), ("music", "librosa")]
        return new_record("a", "a", "a", 0.0, 1.0) | {
            "asr": [{"system": s, "text": "x", "confidence": None} for s in asr],
            "wer_agreement": rate,
            "familiarity": heard,
            "transcript": "x",
            "provenance": [{"field": f, "system": s} for f, s in told],
        }

    assert "WER 0.90" in doubt.why(record("decoder", "ctc", rate=0.9), 0.75)
    assert doubt.why(record("decoder", "ctc", rate=0.5), 0.75) is None
    assert doubt.why(record("whisper", "ctc", rate=0.9), 0.75) is None
    assert doubt.why(record(rate=None, unfamiliar=True), 0.75).endswith("knows: why")
    own = doubt.doubtful(record("decoder", "ctc", rate=0.9))
    assert {"events", "absent", "profile", "transcript", "speakers", "music", "unified"} <= {*own}
    own = doubt.doubtful(record("whisper", "ctc", rate=0.1))
    assert not {"transcript", "speakers", "captions.speech"} & {*own}
    detector = record("whisper", rate=None)
    detector["provenance"] = [
        {"field": "profile", "system": "posteriors"},
        {"field": "events", "system": "posteriors"},
    ]
    assert doubt.doubtful(detector) == []
    assert doubt.trusted("sentences+music", ["events"])
    assert not doubt.trusted("events+music", ["events"])


def test_the_small_model_tells_its_own_world_from_others(tmp_path):
    """Clips of the world keep their rows; a hum and a hiss, which are unknown sound, give none."""
    folder, strange = tmp_path / "in", ("hum", "noise")
    folder.mkdir()
    for number, kind in enumerate(strange):
        wav = 0.1 * patchwork.piece(kind, np.random.default_rng(3 * number), 48_000)
        soundfile.write(folder / f"{kind}.flac", wav, 16_000)
    for name in ("cow_drill_laser", "two_people"):
        clip = command.DEFAULT_CHECKPOINT.parent / "demo" / f"{name}.flac"
        (folder / clip.name).write_bytes(clip.read_bytes())
    c = runs.defaults.get_config()
    c.speech.systems, c.speech.min_systems = ("ctc",), 1  # the decoder would be slow
    with pytest.warns(UserWarning, match=r"hum\.flac, from 0\.00 s: unlike the sound"):
        pipeline.annotate(source.find(folder), tmp_path / "out", c)
    records, rows = runs.checked(tmp_path / "out")
    foreign = {Path(r["audio"]).stem for r in records if r["doubt"]}
    assert foreign == {*strange}
    by_file = Counter(Path(row["provenance"]["audio"]).stem for row in rows)
    assert by_file.keys() == {"cow_drill_laser", "two_people"}
    assert min(by_file.values()) >= 10
    assert {row["task"] for row in rows} >= {"events", "asr", "asr_words", "caption", "present"}


@pytest.mark.skipif(not espeak.available(), reason="needs espeak-ng: the extra `world`")
def test_world_scenes_from_sound_to_rows(tmp_path):
    """With experts that know the words, every word of speech scenes gets its true time."""
    folder = tmp_path / "in"
    folder.mkdir()
    c = runs.config()
    c.posteriors = ""
    c.classes = ()
    for name in ("one", "two"):
        runs.expert(name, "plugins:world_transcribe", c)
    runs.expert("words", "plugins:world_align", c)
    c.speech.gate = 0.0
    labels = {}
    for index in range(6):
        made = world.scene(index, split="validation", content="speech")
        path = folder / f"{index}.wav"
        soundfile.write(path, made.wav, 16_000)
        path.with_suffix(".json").write_text(json.dumps(made.labels))
        labels[str(path)] = made.labels
    runs.run(folder, tmp_path / "out", c)
    records, rows = runs.checked(tmp_path / "out")
    cut = total = 0
    for path, told in labels.items():
        own = [r for r in records if r["audio"] == path]
        said = [w for s in told["sentences"] for w in s["words"]]
        found = [w for r in own for w in r["words"]]
        assert [w["text"] for w in found] == [w["text"] for w in said]
        for word, true in zip(found, said, strict=True):
            edges = [e for r in own for e in (r["start"], r["end"])]
            if not any(true["start"] < e < true["end"] for e in edges):
                assert word["start"] == pytest.approx(true["start"], abs=0.011)
                assert word["end"] == pytest.approx(true["end"], abs=0.011)
        for sentence in told["sentences"]:
            total += 1
            cut += any(
                w["start"] + 0.05 < r["start"] < w["end"] - 0.05
                for r in own[1:]
                for w in sentence["words"]
            )
    assert cut <= 0.05 * total
    assert {"asr", "asr_words", "asr_sentences", "caption_speech"} <= {r["task"] for r in rows}
