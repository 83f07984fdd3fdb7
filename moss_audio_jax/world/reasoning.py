"""Questions that need steps: reasoning (<think>) computed from the labels, then the answer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from moss_audio_jax.draw import Draw
from moss_audio_jax.text import phrases
from moss_audio_jax.text.labels import ALL_KINDS
from moss_audio_jax.world import describe

Labels = dict[str, Any]


class Reasoned(NamedTuple):
    task: str
    question: str
    steps: list[str]
    answer: str


def reasoned(labels: Labels, draw: Draw) -> list[Reasoned]:
    """Every question in this file that has an answer in the scene."""
    return [r for make in _MAKERS for r in make(labels, draw.child(make.__name__))]


def _gap(labels: Labels, draw: Draw) -> Iterator[Reasoned]:
    kinds = [event["kind"] for event in labels["events"]]
    pairs = [
        (a, b)
        for a, b in itertools.pairwise(labels["events"])
        if b["start"] - a["end"] > 0.2 and kinds.count(a["kind"]) == kinds.count(b["kind"]) == 1
    ]
    if pairs:
        a, b = draw.choice(pairs)
        first, second = ALL_KINDS[a["kind"]].label, ALL_KINDS[b["kind"]].label
        end, start = round(a["end"], 2), round(b["start"], 2)
        yield Reasoned(
            "reason_gap",
            f"How many seconds pass between the end of {first} and the start of {second}?",
            [
                f"{first}: {phrases.span(a)}.",
                f"{second}: {phrases.span(b)}.",
                f"{start:.2f} - {end:.2f} = {start - end:.2f}.",
            ],
            f"{start - end:.2f}",
        )


def _longest(labels: Labels, draw: Draw) -> Iterator[Reasoned]:
    events = labels["events"]
    kinds = [event["kind"] for event in events]
    if len(events) < 2 or len(set(kinds)) < len(kinds):
        return
    lengths = sorted(((round(e["end"] - e["start"], 2), e) for e in events), key=lambda x: -x[0])
    if lengths[0][0] - lengths[1][0] < 0.3:
        return
    question = draw.choice(("Which sound lasts longest?", "Which of the sounds is the longest?"))
    steps = [
        f"{ALL_KINDS[e['kind']].label}: {phrases.span(e)}, {e['end'] - e['start']:.2f} s."
        for e in events
    ]
    best = ALL_KINDS[lengths[0][1]["kind"]].label
    yield Reasoned("reason_longest", question, [*steps, f"The longest is {best}."], best)


def _most(labels: Labels, draw: Draw) -> Iterator[Reasoned]:
    onsets = {
        kind: [onset for event in describe.of_kind(labels, kind) for onset in event["onsets"]]
        for kind in describe.kinds(labels)
        if describe.countable(labels, kind)
    }
    if len(onsets) < 2:
        return
    pair = draw.sample(list(onsets), 2)
    names = [ALL_KINDS[kind].unit[1] for kind in pair]
    a, b = (len(onsets[kind]) for kind in pair)
    steps = [
        f"{name} at {phrases.times(onsets[kind])}: {len(onsets[kind])}."
        for name, kind in zip(names, pair, strict=True)
    ]
    if a != b:
        more = names[0] if a > b else names[1]
        yield Reasoned(
            "reason_more",
            f"Are there more {names[0]} or more {names[1]}?",
            [*steps, f"{max(a, b)} is more than {min(a, b)}."],
            more,
        )
    yield Reasoned(
        "reason_sum",
        f"How many {names[0]} and {names[1]} are there together?",
        [*steps, f"{a} + {b} = {a + b}."],
        str(a + b),
    )


def _before(labels: Labels, draw: Draw) -> Iterator[Reasoned]:
    """A sound against speech: which comes first?"""
    if not labels["sentences"] or not labels["events"]:
        return
    event = labels["events"][0]
    if len(describe.of_kind(labels, event["kind"])) > 1:
        return
    label = ALL_KINDS[event["kind"]].label
    sentence = labels["sentences"][0]
    speech = sentence["start"]
    first = sentence["words"][0]["text"] if sentence["words"] else sentence["text"].split()[0]
    if abs(event["start"] - speech) < 0.2:
        return
    answer = "before" if event["start"] < speech else "after"
    compared = "less" if answer == "before" else "more"
    yield Reasoned(
        "reason_before",
        f"Does {label} begin before or after the first word?",
        [
            f'The first word, "{first}", begins at {speech:.2f}.',
            f"{label} begins at {event['start']:.2f}.",
            f"{event['start']:.2f} is {compared} than {speech:.2f}.",
        ],
        answer,
    )


def _during(labels: Labels, draw: Draw) -> Iterator[Reasoned]:
    """Which word is said when a sound begins?"""
    found = [
        (event, word)
        for event in labels["events"]
        if len(describe.of_kind(labels, event["kind"])) == 1
        for word in describe.words(labels)
        if word["start"] + 0.05 < event["start"] < word["end"] - 0.05
    ]
    if found:
        event, word = draw.choice(found)
        label = ALL_KINDS[event["kind"]].label
        yield Reasoned(
            "reason_word",
            f"Which word is being said when {label} begins?",
            [
                f"{label} begins at {event['start']:.2f}.",
                f'The word from {phrases.span(word)} is "{word["text"]}".',
            ],
            word["text"],
        )


def _longer_sentence(labels: Labels, draw: Draw) -> Iterator[Reasoned]:
    if len(labels["sentences"]) < 2 or labels["language"] != "en":
        return
    counts = [len(sentence["text"].split()) for sentence in labels["sentences"]]
    best = max(counts)
    if counts.count(best) > 1:
        return
    steps = [
        f'"{sentence["text"]}": {count} word{"s" * (count > 1)}.'
        for sentence, count in zip(labels["sentences"], counts, strict=True)
    ]
    yield Reasoned(
        "reason_sentence",
        draw.choice(("Which sentence has the most words?", "Which is the sentence of most words?")),
        [*steps, f"{best} is the most."],
        labels["sentences"][counts.index(best)]["text"],
    )


def _faster(labels: Labels, draw: Draw) -> Iterator[Reasoned]:
    order = ("slow", "normal", "fast")
    if {s["sex"] for s in labels["speakers"]} != {"male", "female"}:
        return
    first, second = labels["speakers"]
    if first["speed"] == second["speed"] or None in (first["speed"], second["speed"]):
        return
    faster = max(labels["speakers"], key=lambda s: order.index(s["speed"]))
    steps = [f"The {describe.person(s)} speaks at a {s['speed']} speed." for s in (first, second)]
    answer = f"the {describe.person(faster)}"
    yield Reasoned(
        "reason_faster",
        "Who speaks faster, the man or the woman?",
        [*steps, f"So {answer} is faster."],
        answer,
    )


def _bar(labels: Labels, draw: Draw) -> Iterator[Reasoned]:
    music = labels["music"]
    if music is None:
        return
    tempo = round(music["tempo"])
    yield Reasoned(
        "reason_beat",
        "How many seconds does one bar of four beats last?",
        [
            f"The tempo is {tempo} beats per minute.",
            f"One beat lasts 60 / {tempo} = {60 / tempo:.2f} s.",
            f"Four beats last 240 / {tempo} = {240 / tempo:.2f} s.",
        ],
        f"{240 / tempo:.2f}",
    )
    beats = [f"{number}: {beat:.2f}" for number, beat in enumerate(music["beats"], 1)]
    yield Reasoned(
        "reason_beats",
        "How many beats does the music have, from its first to its last?",
        [f"Beats {', '.join(beats)}."],
        str(len(beats)),
    )


_MAKERS: tuple[Callable[[Labels, Draw], Iterator[Reasoned]], ...] = (
    _gap,
    _longest,
    _most,
    _before,
    _during,
    _longer_sentence,
    _faster,
    _bar,
)
