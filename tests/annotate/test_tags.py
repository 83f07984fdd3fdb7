"""Cuts by a model's tags."""

import numpy as np
import pytest

from moss_audio_jax.annotate import boundary, tags
from moss_audio_jax.annotate.ears import TOKEN, Heard
from moss_audio_jax.annotate.features import COARSE, FINE, clip_features
from moss_audio_jax.annotate.segment import segment
from moss_audio_jax.annotate.spans import SegmentOptions

LABELS = ("sound:dog", "sound:rain", "speech", "music", "background:pink", "sex:male", "phone:a")


def tags_of(spans, seconds):
    """Tags uint8 [C, K] made from (label, start, end)."""
    tags = np.zeros((round(seconds * COARSE), len(LABELS)), np.uint8)
    for label, start, end in spans:
        tags[round(start * COARSE) : round(end * COARSE), LABELS.index(label)] = 250
    return tags


class Listener:
    """Ears that report a dog wherever it is loud."""

    has = frozenset({"tags"})
    tags = LABELS

    def hear(self, wavs):
        assert len(wavs) == 1
        count = len(wavs[0]) // 1280
        loud = np.abs(wavs[0][: count * 1280].reshape(count, 1280)).max(axis=1) > 0.1
        tags = np.zeros((count, len(LABELS)), np.float32)
        tags[:, 0] = loud
        return [Heard(TOKEN * np.arange(count), None, tags)]


def evidence(found, at, seconds):
    values = found.evidence(0, round(at * FINE), round(seconds * FINE))
    return dict(zip(tags.EVIDENCE, values, strict=True))


def test_a_place_where_one_source_gives_way_to_another():
    spans = [("sound:dog", 0, 4), ("background:pink", 0, 4), ("speech", 4, 8), ("sex:male", 4, 8)]
    found = tags.Sources(tags_of(spans, 8), LABELS)
    assert [list(edges) for edges in found.edges] == [[4.0]] * 3
    assert found.places() == [400]
    here, beside = evidence(found, 4, 8), evidence(found, 2, 8)
    assert here["most apart mean"] == here["most apart near"] == pytest.approx(250 / 255)
    assert here["apart mean"] == pytest.approx(500 / 255)
    assert here["in common, top"] == here["across"] == 0
    assert here["background"] == here["voice"] == pytest.approx(250 / 255)
    assert here["near edge, level 1"] == here["within edge, level 1"] == 1
    assert beside["across"] == pytest.approx(250 / 255)
    assert beside["within edge, level 1"] == 0
    assert here["instruments"] == beside["most apart near"] == 0


def test_a_pause_of_a_second_has_two_edges_and_a_shorter_one_a_middle():
    long = tags.Sources(tags_of([("speech", 0, 3), ("music", 4.5, 8)], 8), LABELS)
    assert [list(edges) for edges in long.edges] == [[3.0, 4.5]] * 3
    short = tags.Sources(tags_of([("speech", 0, 3), ("music", 3.6, 8)], 8), LABELS)
    assert [list(edges) for edges in short.edges] == [[3.3]] * 3
    one = tags.Sources(tags_of([("speech", 0, 3), ("speech", 3.6, 8)], 8), LABELS)
    assert [list(edges) for edges in one.edges] == [[]] * 3


def test_edges_of_a_clip_have_evidence_too():
    found = tags.Sources(tags_of([("speech", 0, 1)], 1), LABELS)
    for at in (10, 50, 90):
        assert np.isfinite(found.evidence(0, at, 100)).all()
    short = tags.Sources(np.zeros((1, len(LABELS)), np.uint8), LABELS)
    assert short.places() == []


@pytest.mark.parametrize("piece", [256.0, 3.2])
def test_a_clip_is_heard_piece_by_piece_at_its_times(monkeypatch, piece):
    monkeypatch.setattr(tags, "_PIECE", piece)
    seconds = 10.32
    wav = np.zeros(round(seconds * 16000), np.float32)
    wav[3 * 16000 : 6 * 16000] = 0.5

    def read(start, end):
        return wav[round(start * 16000) : round(end * 16000)]

    found = tags.hear_sources(Listener(), read, len(wav))
    for edges in found.edges:
        np.testing.assert_allclose(edges, [3.0, 6.0], atol=0.1)
    assert found.evidence(0, 100, 200)[0] == 0
    assert len(clip_features(wav).bands) == len(found._active)


def test_ears_without_tags_leave_it_to_the_signal():
    class Deaf:
        has = frozenset({"pieces"})

    assert tags.hear_sources(Deaf(), None, 16000) is None


def test_each_judge_takes_what_it_was_fitted_to():
    widths = {name: len(judge.mean) for name, judge in boundary.judges().items()}
    assert widths == {
        "signal": len(boundary.EVIDENCE),
        "sources": len(boundary.EVIDENCE) + len(tags.EVIDENCE),
    }
    for judge in boundary.judges().values():
        odds = judge.log_odds(np.stack([judge.mean, judge.mean + judge.deviation]))
        z = np.tanh(judge.kernel.sum(axis=0) + judge.bias) @ judge.weights + judge.offset[0]
        assert odds[1] == pytest.approx(float(z), rel=1e-4)


def test_two_sounds_alike_to_the_signal_are_parted_by_what_is_heard():
    rng = np.random.default_rng(0)
    wav = (0.05 * rng.standard_normal(12 * 16000)).astype(np.float32)
    features = clip_features(wav)
    keen = SegmentOptions(threshold=0.4)  # one noise throughout, so the signal gives no cut
    assert len(segment(features, keen)) == 1
    heard = tags.Sources(tags_of([("sound:rain", 0, 6), ("sound:dog", 6, 12)], 12), LABELS)
    edges = [round(each["start"], 1) for each in segment(features, keen, heard)]
    assert edges == [0.0, 6.0]
