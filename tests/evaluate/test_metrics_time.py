"""Timestamps, events, short answers with a time, and confidence intervals."""

from __future__ import annotations

import numpy as np
import pytest

from moss_audio_jax.evaluate.metrics import bootstrap, closed, events
from moss_audio_jax.evaluate.metrics.events import Event
from moss_audio_jax.evaluate.metrics.timestamps import Shifts, order_violations, shifts
from moss_audio_jax.text.timestamps import Segment, parse_timestamps


def slots(*rows):
    return [{"text": text, "start": start, "end": end} for text, start, end in rows]


def test_both_conventions_by_hand():
    reference = slots(("the", 0.0, 0.2), ("cat", 0.2, 0.6), ("sat", 0.7, 1.0), ("down", 1.0, 1.5))
    # "sat" is another word and is left out; "oh" is nowhere in the reference.
    answer = parse_timestamps("[0.1]The[0.2][0.3]cat,[0.5][0.6]oh[0.7][0.7]sad[1.0][1.0]down[1.9]")
    found = shifts(reference, answer)
    # Slots: the +0.1 0, cat +0.1 -0.1, down 0 +0.4.
    expected = Shifts(0.7, 0.5, 6, 8, 0.7, 3)
    assert found == pytest.approx(expected)
    assert found.slot_shift / found.slots == pytest.approx(0.7 / 6)  # MOSS, Qwen3-ASR
    assert found.token_shift / found.tokens == pytest.approx(0.7 / 3)  # FunASR: twice as much
    assert found.slots / found.reference_slots == 0.75


def test_segments_of_several_words_compare_their_ends():
    reference = slots(("hello there you", 0.0, 1.0), ("good night", 1.5, 2.0))
    # With one boundary less, the first sentence's end and the second's start are inside a segment.
    found = shifts(reference, [Segment(0.1, 2.2, "Hello there you, good night.")])
    assert found == pytest.approx(Shifts(0.3, 0.3, 2, 4, 0.0, 0))
    # A wrong word in the middle of a sentence does not affect its times.
    found = shifts(
        reference, [Segment(0.1, 1.0, "hello dear you"), Segment(1.5, 2.0, "good night")]
    )
    assert found == pytest.approx(Shifts(0.1, 0.1, 4, 4, 0.1, 2))
    # Chinese is compared by character, not by word.
    reference = slots(("今天", 0.0, 0.5), ("好", 0.5, 0.8))
    answer = [Segment(0.0, 0.2, "今"), Segment(0.2, 0.6, "天"), Segment(0.6, 0.8, "好。")]
    assert shifts(reference, answer) == pytest.approx(Shifts(0.2, 0.2, 4, 4, 0.2, 2))


@pytest.mark.parametrize(
    ("answer", "count"),
    [
        ("[0.0]a[1.0][1.0]b[2.0]", 0),
        ("[0.0]a[1.0][0.5]b[2.0]", 0),  # speech overlaps, starts are in order
        ("[3.0]a[4.0][1.0]b[2.0]", 1),
        ("[3.0]a[2.0][4.0]b[5.0]", 1),
        ("[3.0]a[2.0][1.0]b[0.5]", 3),
        ("[3.0]a[3.0]", 0),
        ("[0.0]a[1.0][2.0]b", 0),  # cut off, not out of order
    ],
)
def test_order(answer, count):
    assert order_violations(answer, parse_timestamps(answer)) == count


def scenes(count: int, seed: int = 0):
    """Random timelines, and estimates with shifted, missing, false and mislabelled events."""
    random = np.random.default_rng(seed)
    labels = [f"sound {i}" for i in range(4)]
    for _ in range(count):
        true, found = [], []
        for _ in range(random.integers(1, 9)):
            start = round(random.uniform(0, 8), 2)
            event = Event(
                start,
                round(start + random.choice([0.1, 0.5, 2.0]) * random.random(), 2),
                str(random.choice(labels)),
            )
            true.append(event)
            for _ in range(random.choice([0, 1, 1, 1, 2])):
                onset, offset = (round(random.normal(0, 0.15), 2) for _ in range(2))
                start = max(event.start + onset, 0)
                label = event.label if random.random() < 0.8 else str(random.choice(labels))
                found.append(Event(start, max(event.end + offset, start), label))
        random.shuffle(found)
        yield true, [Event(*event) for event in found]


@pytest.mark.filterwarnings("ignore:Mean of empty slice")
def test_event_f1_is_that_of_sed_eval():
    sed_eval = pytest.importorskip("sed_eval", reason="the oracle; extra `test`")

    def rows(found):
        return [
            {"event_onset": e.start, "event_offset": e.end, "event_label": e.label} for e in found
        ]

    together = list(scenes(500))
    names = sorted({event.label for true, _ in together for event in true})
    all_scenes = sed_eval.sound_event.EventBasedMetrics(event_label_list=names)
    counts = []
    for true, found in together:
        one = sed_eval.sound_event.EventBasedMetrics(event_label_list=names)
        one.evaluate(rows(true), rows(found))
        all_scenes.evaluate(rows(true), rows(found))
        counts.append(events.count(true, found))
        right, reference, estimated = np.sum(list(counts[-1].values()), axis=0)
        assert one.overall["Ntp"] == right
        assert (one.overall["Nref"], one.overall["Nsys"]) == (reference, estimated)
        expected = one.results_class_wise_average_metrics()["f_measure"]["f_measure"]
        average = events.label_average([counts[-1]], skip_unfound=True)
        assert (average is None and np.isnan(expected)) or average == pytest.approx(expected)
    right, reference, estimated = np.sum([v for c in counts for v in c.values()], axis=0)
    assert 0.3 < right / reference < 0.9  # the scenes are neither hopeless nor perfect
    overall = all_scenes.results_overall_metrics()["f_measure"]
    assert 2 * right / (reference + estimated) == pytest.approx(overall["f_measure"], rel=1e-12)
    expected = all_scenes.results_class_wise_average_metrics()["f_measure"]["f_measure"]
    assert events.label_average(counts, skip_unfound=True) == pytest.approx(expected)


def test_events_by_hand():
    true = [events.event(0, 1, "Dog barks"), events.event(2, 10, "rain")]
    # The offset may differ by half of the reference's length, the onset by 0.2 s.
    said = [events.event(2.15, 6, "Rain."), events.event(0.21, 1, "dog  barks")]
    assert events.count(true, said) == {"dog barks": (0, 1, 1), "rain": (1, 1, 1)}
    assert events.ious(true, said) == pytest.approx([0.79, 3.85 / 8])
    assert events.ious(true, []) == [0, 0]
    # The greedy choice would give the first estimate to the first event and leave the other none.
    true = [Event(0.0, 1.0, "a"), Event(0.3, 1.0, "a")]
    said = [Event(0.15, 1.0, "a"), Event(0.0, 1.0, "a")]
    assert events.count(true, said) == {"a": (2, 2, 2)}
    # IoUs are of a one-to-one matching: one estimate does not serve two events.
    assert events.ious(true, said[1:]) == pytest.approx([1.0, 0.0])
    assert events.label_average([{"a": (1, 2, 2), "b": (0, 1, 0)}], skip_unfound=True) == 0.5
    assert events.label_average([{"a": (1, 2, 2), "b": (0, 1, 0)}], skip_unfound=False) == 0.25


@pytest.mark.parametrize(
    ("reference", "answer", "task", "right"),
    [
        ("1.20 - 3.45", "1.40 - 3.25", None, True),
        ("1.20 - 3.45", "1.2s to 3.45 seconds.", None, True),
        ("1.20 - 3.45", "1.41 - 3.45", None, False),
        ("1.20 - 3.45", "1.20", None, False),
        ("1.20 - 3.45 and 5.00 - 6.00", "1.20 - 3.45, 5.10 - 6.00", None, True),
        ("1.20 - 3.45 and 5.00 - 6.00", "1.20 - 3.45", None, False),
        ("2.00", "2.2 seconds", None, True),
        ("2.00", "2.3", None, False),
        ("120", "114 bpm", "tempo", True),
        ("120", "113", "tempo", False),
        ("3", "3.1", "count", False),  # a count is exact
        ("a dog and rain", "A dog and rain.", None, True),
        ("a dog", "dog", None, False),
        ("yes", "", None, False),
    ],
)
def test_closed_answers(reference, answer, task, right):
    assert closed.is_right(reference, answer, task) is right


def test_intervals_cover_and_repeat():
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        right = (random.random(200) < 0.7).astype(float)
        ratios = {"accuracy": (right, np.ones(200)), "twice": (2 * right, np.ones(200))}
        found = bootstrap.intervals(ratios, resamples=200)
        covered += found["accuracy"][0] <= 0.7 <= found["accuracy"][1]
        assert found["twice"] == pytest.approx([2 * bound for bound in found["accuracy"]])
    assert 85 <= covered <= 100
    assert bootstrap.intervals(ratios, resamples=200) == found
    assert bootstrap.intervals(ratios, seed=1, resamples=200) != found
    # By items, not by words: one long row among short ones makes the corpus rate uncertain.
    errors, words = np.array([90.0] + [0.0] * 99), np.array([100.0] + [10.0] * 99)
    low, high = bootstrap.intervals({"wer": (errors, words)})["wer"]
    assert low == 0
    assert high > 0.15
    assert bootstrap.intervals({"none": (np.zeros(3), np.zeros(3))}) == {"none": None}
