"""Questions about a scene: their true answers, and wrong ones for multiple choice."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from moss_audio_jax.draw import Draw
from moss_audio_jax.text import phrases
from moss_audio_jax.text.labels import ALL_KINDS, MODES, TONICS
from moss_audio_jax.text.tasks import Question
from moss_audio_jax.world import describe
from moss_audio_jax.world.music import TEMPI
from moss_audio_jax.world.scenes import LEVELS
from moss_audio_jax.world.speakers import ACCENTS, SPEEDS

Labels = dict[str, Any]


def questions(labels: Labels, draw: Draw) -> list[Question]:
    """Every question in this file that has an answer in the scene."""
    return [q for make in _MAKERS for q in make(labels, draw.child(make.__name__))]


def word_questions(
    name: str, words: Sequence[Mapping[str, Any]], count: int
) -> list[tuple[str, str, str]]:
    """(task, question, answer) of `count` draws: when a word is said, and which one at a time.

    Args:
      name: of the clip; the draws depend on it.
      words: {"text", "start", "end"} of all words that are said.
    """
    draws = (Draw("words", name, number) for number in range(count))
    found = (q for draw in draws for q in _about_words(words, draw))
    return list(dict.fromkeys((q.task, q.question, q.answer) for q in found))


# --- time ----------------------------------------------------------------------------------------


def _what_at(labels: Labels, draw: Draw) -> Iterator[Question]:
    grid = [i / 10 for i in range(2, int(labels["duration"] * 10))]
    clear = [time for time in grid if describe.clear_time(labels, time)]
    if not clear or not describe.sources(labels):
        return
    busy = [time for time in clear if describe.sounding_at(labels, time)]
    time = draw.choice(busy if busy and draw.chance(0.85) else clear)
    now = describe.sounding_at(labels, time)
    question = draw.choice(
        (
            "What happens at {t} seconds?",
            "What can be heard at {t} s?",
            "What is sounding {t} seconds into the clip?",
        )
    ).format(t=f"{time:.1f}")
    labels_of_all = [kind.label for kind in describe.possible_kinds(labels).values()]
    here = {name for name, _ in describe.sources(labels)}
    wrong = draw.sample([name for name in labels_of_all if name not in here], 3)
    yield Question("time_what", question, phrases.joined(now) or "nothing", tuple(wrong))


def _when(labels: Labels, draw: Draw) -> Iterator[Question]:
    for kind in describe.kinds(labels):
        spans = [phrases.span(event) for event in describe.of_kind(labels, kind)]
        question = draw.choice(
            (
                'When is "{label}" heard? Give start and end in seconds.',
                "At what time is it that {clause}? Answer as start - end in seconds.",
                "Find the time of this sound: {label}.",
            )
        ).format(label=ALL_KINDS[kind].label, clause=ALL_KINDS[kind].clause)
        yield Question("time_when", question, phrases.joined(spans))


def _when_said(labels: Labels, draw: Draw) -> Iterator[Question]:
    if describe.timed(labels):
        yield from _about_words(describe.words(labels), draw)


def _about_words(said: Sequence[Mapping[str, Any]], draw: Draw) -> Iterator[Question]:
    texts = [word["text"] for word in said]
    once = [word for word in said if texts.count(word["text"]) == 1]
    if once:
        word = draw.choice(once)
        question = draw.choice(
            (
                'When is the word "{w}" said? Give start and end in seconds.',
                'At what time do you hear "{w}"? Answer as start - end in seconds.',
            )
        ).format(w=word["text"])
        yield Question("word_when", question, phrases.span(word))
    long = [word for word in said if word["end"] - word["start"] > 0.12]
    if long:
        word = draw.choice(long)
        middle = (word["start"] + word["end"]) / 2
        question = draw.choice(
            ("Which word is said at {t} s?", "What word is heard at {t} seconds?")
        )
        others = sorted(set(texts) - {word["text"]})
        wrong = tuple(draw.sample(others, 3)) if len(others) >= 3 else ()
        yield Question("word_what", question.format(t=f"{middle:.2f}"), word["text"], wrong)


def _when_music(labels: Labels, draw: Draw) -> Iterator[Question]:
    if labels["music"]:
        question = draw.choice(("When does the music play?", "From when to when is there music?"))
        yield Question("time_when", question, phrases.span(labels["music"]))


# --- counting and order --------------------------------------------------------------------------


def _count(labels: Labels, draw: Draw) -> Iterator[Question]:
    for kind in describe.kinds(labels):
        if not describe.countable(labels, kind):
            continue
        unit = ALL_KINDS[kind].unit
        count = sum(len(event["onsets"]) for event in describe.of_kind(labels, kind))
        question = draw.choice(
            ("How many {units} are there?", "Count the {units}.", "How many {units} do you hear?")
        ).format(units=f"{unit[1]} ({ALL_KINDS[kind].label})")
        near = [n for n in range(max(count - 3, 1), count + 4) if n != count]
        wrong = tuple(str(n) for n in sorted(draw.sample(near, 3)))
        yield Question("count", question, str(count), wrong)


def _count_kinds(labels: Labels, draw: Draw) -> Iterator[Question]:
    if labels["events"]:
        count = len(describe.kinds(labels))
        question = draw.choice(
            (
                "How many different kinds of sound events are there, apart from speech and music?",
                "Not counting speech and music, how many different sounds occur?",
            )
        )
        wrong = [str(n) for n in range(1, 7) if n != count]
        yield Question("count_kinds", question, str(count), tuple(draw.sample(wrong, 3)))


def _count_speakers(labels: Labels, draw: Draw) -> Iterator[Question]:
    question = draw.choice(("How many people speak?", "How many different speakers are there?"))
    count = len(labels["speakers"])
    wrong = tuple(str(n) for n in range(4) if n != count)
    yield Question("count_speakers", question, str(count), wrong)


def _order(labels: Labels, draw: Draw) -> Iterator[Question]:
    kinds = describe.kinds(labels)
    starts = [describe.of_kind(labels, kind)[0]["start"] for kind in kinds]
    if len(kinds) < 2 or any(b - a < 0.2 for a, b in itertools.pairwise(starts)):
        return
    names = [ALL_KINDS[kind].label for kind in kinds]
    yield Question(
        "order",
        draw.choice(
            (
                "In which order do the sounds begin?",
                "List the sounds in the order in which they start.",
            )
        ),
        ", ".join(names),
    )
    i, j = sorted(draw.sample(range(len(kinds)), 2))
    pair = draw.shuffled([names[i], names[j]])
    yield Question(
        "order_first", f"Which begins first: {pair[0]} or {pair[1]}?", names[i], (names[j],)
    )
    i = draw.integer(1, len(kinds) - 1)
    yield Question(
        "order_next", f"Which sound begins next after {names[i - 1]} has begun?", names[i]
    )


def _together(labels: Labels, draw: Draw) -> Iterator[Question]:
    kinds = describe.kinds(labels)
    if len(kinds) < 2:
        return
    first, second = draw.sample(kinds, 2)
    shared = max(
        min(a["end"], b["end"]) - max(a["start"], b["start"])
        for a in describe.of_kind(labels, first)
        for b in describe.of_kind(labels, second)
    )
    if abs(shared) > 0.1:
        names = [ALL_KINDS[kind].label for kind in (first, second)]
        question = f"Do {names[0]} and {names[1]} ever sound at the same time?"
        answer = "yes" if shared > 0 else "no"
        yield Question("overlap", question, answer)


# --- presence ------------------------------------------------------------------------------------


def _present(labels: Labels, draw: Draw) -> Iterator[Question]:
    here = describe.kinds(labels)
    absent = [kind for kind in describe.possible_kinds(labels) if kind not in here]
    forms = (
        "Is this heard: {label}?",
        "Is it true that {clause} in this clip?",
        "Can you hear this sound: {label}?",
    )
    gone = ALL_KINDS[draw.choice(absent)]
    form = draw.choice(forms)
    yield Question("absent", form.format(label=gone.label, clause=gone.clause), "no")
    if here:
        heard = ALL_KINDS[draw.choice(here)]
        form = draw.choice(forms)
        yield Question("present", form.format(label=heard.label, clause=heard.clause), "yes")
        wrong = tuple(ALL_KINDS[k].label for k in draw.sample(absent, 3))
        yield Question("which_sound", "Which of these sounds is heard?", heard.label, wrong)
    for what, there in (("speech", bool(labels["sentences"])), ("music", bool(labels["music"]))):
        yield Question(f"any_{what}", f"Is there any {what}?", "yes" if there else "no")


# --- speakers ------------------------------------------------------------------------------------


def _speaker(labels: Labels, draw: Draw) -> Iterator[Question]:
    if len(labels["speakers"]) != 1:
        return
    speaker = labels["speakers"][0]
    yield _choice(
        "speaker_sex", "Is the speaker male or female?", speaker["sex"], ("male", "female")
    )
    if speaker["speed"]:
        yield _choice(
            "speaker_speed",
            "How fast does the speaker talk: slow, normal or fast?",
            speaker["speed"],
            tuple(SPEEDS),
        )
    yield _choice(
        "speaker_whisper",
        "Does the speaker whisper?",
        "yes" if speaker["whispered"] else "no",
        ("yes", "no"),
    )
    if speaker["whispered"]:  # a whisper has no pitch
        return
    person = describe.person(speaker)
    if speaker["pitch"]:
        yield _choice(
            "speaker_pitch",
            f"Is the voice low, medium or high for a {person}?",
            speaker["pitch"],
            ("low", "medium", "high"),
        )
    if labels["language"] == "en" and speaker["intonation"]:
        yield _choice(
            "speaker_tone",
            "Is the intonation flat, normal or lively?",
            speaker["intonation"],
            ("flat", "normal", "lively"),
        )
    if labels["language"] == "en" and speaker["accent"]:
        yield _choice(
            "speaker_accent",
            "Which accent of English does the speaker have?",
            speaker["accent"],
            tuple(ACCENTS),
        )


def _who_said(labels: Labels, draw: Draw) -> Iterator[Question]:
    if {s["sex"] for s in labels["speakers"]} != {"male", "female"}:
        return
    texts = [s["text"] for s in labels["sentences"]]
    once = [s for s in labels["sentences"] if texts.count(s["text"]) == 1]
    if once:
        sentence = draw.choice(once)
        speaker = labels["speakers"][sentence["speaker"]]
        yield _choice(
            "who_said",
            f'Who says "{sentence["text"]}", the man or the woman?',
            f"the {describe.person(speaker)}",
            ("the man", "the woman"),
        )


def _language(labels: Labels, draw: Draw) -> Iterator[Question]:
    if labels["language"]:
        answer = describe.LANGUAGES[labels["language"]]
        wrong = tuple(name for name in ("Russian", "Arabic", "French") if name != answer)
        yield Question("language", "Which language is spoken?", answer, wrong)
        if labels["language"] == "en":
            said = describe.transcript(labels).split()
            yield Question("count_words", "How many words are said in all?", str(len(said)))


# --- music ---------------------------------------------------------------------------------------


def _music(labels: Labels, draw: Draw) -> Iterator[Question]:
    music = labels["music"]
    if music is None:
        return
    tempo = round(music["tempo"])
    question = draw.choice(
        ("What is the tempo in beats per minute?", "How many beats per minute does the music have?")
    )
    wrong = tuple(str(round(tempo * factor)) for factor in (0.7, 1.3, 1.6))
    yield Question("tempo", question, str(tempo), wrong)
    yield _choice("pace", "Is the music slow, moderate or fast?", music["pace"], tuple(TEMPI))
    key = f"{music['tonic']} {music['mode']}"
    keys = [f"{tonic} {mode}" for tonic in TONICS for mode in MODES]
    wrong = tuple(draw.sample([name for name in keys if name != key], 3))
    yield Question(
        "key", draw.choice(("What key is the music in?", "Name the key of the music.")), key, wrong
    )
    yield _choice("mode", "Is the key major or minor?", music["mode"], MODES)
    lead = music["parts"][0]
    others = [i for i in describe.possible_instruments(labels) if i not in music["parts"]]
    wrong = tuple(draw.sample(others, 3))
    yield Question("instrument", "Which instrument plays the melody?", lead, wrong)
    yield Question("instruments", "Which instruments are playing?", ", ".join(music["parts"]))
    drums = "yes" if "drums" in music["parts"] else "no"
    yield _choice("drums", "Are there drums?", drums, ("yes", "no"))


# --- the recording -------------------------------------------------------------------------------


def _recording(labels: Labels, draw: Draw) -> Iterator[Question]:
    if labels["loudness"]["peak_dbfs"] is not None:
        yield _choice(
            "loudness",
            "Is the recording quiet, normal or loud?",
            labels["loudness"]["level"],
            tuple(LEVELS),
        )
    background = labels["background"]
    if background and (background["snr_db"] is None or background["snr_db"] < 25):
        yield _choice(
            "background",
            "What is the steady background noise: hiss, rumble or hum?",
            background["kind"],
            ("hiss", "rumble", "hum"),
        )
    if labels["silence"] and describe.sources(labels):
        longest = sorted(labels["silence"], key=lambda s: s["start"] - s["end"])
        lengths = [round(s["end"] - s["start"], 3) for s in longest]
        if len(lengths) == 1 or lengths[0] - lengths[1] > 0.1:
            yield Question(
                "silence",
                "When is the longest pause in which nothing sounds?",
                phrases.span(longest[0]),
            )


def _choice(task: str, question: str, answer: str, options: tuple[str, ...]) -> Question:
    return Question(task, question, answer, tuple(o for o in options if o != answer))


_MAKERS: tuple[Callable[[Labels, Draw], Iterator[Question]], ...] = (
    _what_at,
    _when,
    _when_said,
    _when_music,
    _count,
    _count_kinds,
    _count_speakers,
    _order,
    _together,
    _present,
    _speaker,
    _who_said,
    _language,
    _music,
    _recording,
)
