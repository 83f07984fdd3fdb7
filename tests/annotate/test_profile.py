import numpy as np
import patchwork
import pytest

from moss_audio_jax import world
from moss_audio_jax.annotate.features import clip_features
from moss_audio_jax.annotate.posteriors import Posteriors
from moss_audio_jax.annotate.profile import CLASSES, profile, profile_posteriors
from moss_audio_jax.annotate.sound import tag_sex
from moss_audio_jax.annotate.speakers import describe_voice, measured_speakers, told_speakers
from moss_audio_jax.annotate.tasks import sources
from moss_audio_jax.annotate.work import new_record
from moss_audio_jax.errors import InputError
from moss_audio_jax.text.labels import KINDS


def test_speech_music_and_silence_are_told_apart():
    right = total = 0
    for content in ("speech", "music"):
        for index in range(8):
            made = world.scene(index, split="validation", content=content)
            scores = profile(clip_features(made.wav), 0, made.labels["duration"])
            assert tuple(scores) == CLASSES
            assert all(0 <= score <= 1 for score in scores.values())
            other = "music" if content == "speech" else "speech"
            right += scores[content] > scores[other]
            total += 1
    assert right >= 0.85 * total
    silent = profile(clip_features(np.zeros(16000, np.float32)), 0, 1)
    assert max(silent, key=silent.get) == "environment"
    assert {kind.category for kind in KINDS.values()} - {"human sound"} <= set(CLASSES)


def test_profile_of_posteriors():
    frames = np.array([[0.1, 0.8], [0.1, 0.8], [0.9, 0.0], [0.9, 0.0]], np.float32)
    given = Posteriors(frames, 2.0, ("Bark", "Violin"))
    classes = {"Bark": "animal", "Violin": "music"}
    scores = profile_posteriors(given, classes, 0.0, 1.0)
    assert (scores["animal"], scores["music"], scores["speech"]) == (0.1, 0.8, 0.0)
    assert profile_posteriors(given, classes, 1.0, 2.0)["animal"] == 0.9
    with pytest.raises(InputError, match="'pet'"):
        profile_posteriors(given, {"Bark": "pet"}, 0, 1)


def test_pitch_and_loudness_of_world_voices():
    off = []
    for index in range(8):
        made = world.scene(index, split="validation", content="speech")
        sentence = made.labels["sentences"][0]
        speaker = made.labels["speakers"][0]
        told = describe_voice(
            clip_features(made.wav), sentence["start"], sentence["end"], len(sentence["words"])
        )
        assert told["words_per_minute"] > 0
        if told["pitch_hz"] and speaker["f0_hz"]:
            off.append(abs(np.log2(told["pitch_hz"] / speaker["f0_hz"])))
    assert len(off) >= 6
    assert np.median(off) < 0.1
    silent = describe_voice(clip_features(np.zeros(16000, np.float32)), 0, 1)
    assert silent["pitch_hz"] is None
    assert silent["rate"] is None


def test_loudness_follows_the_level():
    talk = 0.1 * patchwork.babble(np.random.default_rng(0), 48_000)
    one, two = (
        describe_voice(clip_features((gain * talk).astype(np.float32)), 0, 3) for gain in (1, 0.1)
    )
    assert one["level_dbfs"] - two["level_dbfs"] == pytest.approx(20, abs=0.2)
    assert one["syllables_per_second"] == pytest.approx(4, abs=2)


def test_turns_between_a_low_and_a_high_voice():
    rng = np.random.default_rng(5)
    parts = []
    for pitch in (100, 230, 100, 230):
        t = np.arange(24_000) / 16000
        phase = 2 * np.pi * pitch * (t + 0.01 * np.sin(2 * np.pi * 3 * t) / 10)
        voice = sum(np.sin(h * phase) / h for h in range(1, 12)) * (1 + np.sin(8 * np.pi * t))
        parts.append(0.05 * voice + 1e-4 * rng.standard_normal(len(t)))
    features = clip_features(np.concatenate(parts).astype(np.float32))
    sentences = [(1.5 * i, 1.5 * i + 1.5) for i in range(4)]
    assert measured_speakers(features, sentences) == [0, 1, 0, 1]


def test_sentences_go_to_who_speaks_longest_within_them():
    turns = [("ann", 0, 2), ("bob", 2, 5), ("ann", 2.5, 2.6), ("bob", 8, 9)]
    turns = [{"speaker": name, "start": a, "end": b} for name, a, b in turns]
    sentences = [(1.9, 4), (0, 2.5), (6, 6.5), (7, 7.5)]
    assert told_speakers(turns, sentences) == [0, 1, 0, 0]


def test_a_timeline_names_voices_and_music_as_far_as_they_are_known():
    frames = np.zeros((100, 3), np.float32)  # 4 s
    frames[:50, 0], frames[50:, 1], frames[50:75, 0] = 0.9, 0.8, 0.5
    tags = Posteriors(frames, 25.0, ("sex:female", "sex:male", "speech"))
    assert tag_sex(tags, [(0, 1), (1.2, 2)]) == "female"
    assert tag_sex(tags, [(3, 4)]) == "male"
    assert tag_sex(tags, [(2, 3)]) is None  # the tags contradict each other
    assert tag_sex(tags, [(0, 4)]) is None
    assert tag_sex(tags, [(9, 10)]) is None
    assert tag_sex(Posteriors(frames, 25.0, ("a", "b", "c")), [(0, 1)]) is None
    record = new_record("a", "a.wav", "a.flac", 0.0, 4.0)
    spans = [{"start": a, "end": a + 1.0} for a in (0.0, 1.5, 3.0)]
    record["speakers"] = [
        {"speaker": number, "sex": sex, "turns": [span]}
        for number, (sex, span) in enumerate(zip(("female", "male", None), spans, strict=True))
    ]
    record["music"] = {"start": 0.5, "end": 3.5, "instruments": ["kick", "piano"]}
    assert [name for name, _ in sources(record)] == [
        "woman speaking",
        "piano music playing",
        "man speaking",
        "person speaking",
    ]
    record["music"]["instruments"].append("flute")
    assert "music playing" in [name for name, _ in sources(record)]
    record["sentences"] = [{"text": "b", "speaker": 1, **spans[0]}]
    assert [name for name, _ in sources(record)] == ["man speaking", "music playing"]
