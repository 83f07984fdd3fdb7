"""Training rows of a record in the official fine-tuning form; each names the field it came from.

Times in rows count from the start of the segment's file and are the record's, with two decimals.
Other times that a question asks about have one decimal.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from moss_audio_jax.annotate import merge, speech
from moss_audio_jax.annotate.record import Record, centi, times
from moss_audio_jax.annotate.sound import clause
from moss_audio_jax.draw import Draw
from moss_audio_jax.text.labels import DRUMS, MODES, TONICS
from moss_audio_jax.text.phrases import joined, span, stamped
from moss_audio_jax.text.tasks import MULTIPLE_CHOICE, NO_SPEECH, PROMPTS, Question

Row = dict[str, Any]
_PERSONS = {"female": "woman", "male": "man", None: "person"}
_EDGE = 0.15  # nothing may begin or end within these seconds of a time in a question
# Answers of these tasks are balanced: an answer is at most 1.5 times as frequent as the next.
BALANCED = {
    "present": "presence",
    "absent": "presence",
    "any_speech": "any_speech",
    "any_music": "any_music",
    "overlap": "overlap",
}


class Made(NamedTuple):
    task: str
    field: str  # field of the record
    prompt: str
    answer: str


def rows(record: Record) -> list[Row]:
    """Every row of a record; the same for the same record. [] if nothing is known.

    Besides what `data.records` reads, rows hold "provenance": {"audio", "start", "end", "field"}.
    """
    local = _local(record)
    draw = Draw("annotate", record["id"], record["start"])
    found = list(_questions(local, draw.child("questions")))
    made = [*_described(local, record, draw.child("described"))]
    made += [
        Made(q.task, field, q.question, q.answer) for field, q in found if q.task != "which_sound"
    ]
    made += _choices(found, draw.child("choices"))
    unique: dict[str, Made] = {}
    for one in made:
        unique.setdefault(one.prompt, one)
    provenance = {key: record[key] for key in ("audio", "start", "end")}
    return [
        {
            "conversation": [
                {"role": "user", "message_type": "audio", "content": record["clip"]},
                {"role": "user", "message_type": "text", "content": one.prompt},
                {"role": "assistant", "message_type": "text", "content": one.answer},
            ],
            "task": one.task,
            "id": f"{record['id']}/{number:02d}-{one.task}",
            "provenance": provenance | {"field": one.field},
        }
        for number, one in enumerate(unique.values())
    ]


def _local(record: Record) -> Record:
    """The record with times that count from the start of its clip."""
    start = record["start"]

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(item) for item in value]
        if isinstance(value, dict):
            return {
                k: centi(v - start) if k in ("start", "end") else moved(v) for k, v in value.items()
            }
        return value

    keys = ("words", "sentences", "speakers", "music", "events")
    # Ends are rounded down, because a file's end need not be a multiple of 10 ms.
    seconds = int(100 * (record["end"] - start) + 1e-6) / 100
    return record | {key: moved(record[key]) for key in keys} | {"start": 0.0, "end": seconds}


def sources(record: Record) -> list[tuple[str, dict[str, Any]]]:
    """(name in a timeline, span) of everything that is known to sound, in order of start."""
    found = [(event["label"], event) for event in record["events"]]
    voices = {s["speaker"]: f"{_PERSONS[s['sex']]} speaking" for s in record["speakers"]}
    if record["sentences"]:
        found += [(voices[s["speaker"]], s) for s in record["sentences"]]
    else:
        found += [(voices[s["speaker"]], turn) for s in record["speakers"] for turn in s["turns"]]
    if record["music"]:
        melodic = [name for name in record["music"].get("instruments", ()) if name not in DRUMS]
        name = f"{melodic[0]} music" if len(melodic) == 1 else "music"
        found.append((f"{name} playing", record["music"]))
    return sorted(found, key=lambda item: (item[1]["start"], item[0]))


def _fields(record: Record) -> str:
    """The non-empty fields that `sources` reads."""
    spoken = "sentences" if record["sentences"] else "speakers"
    return "+".join(field for field in ("events", spoken, "music") if record[field])


def _described(local: Record, record: Record, draw: Draw) -> Iterator[Made]:
    answers: dict[str, tuple[str, str]] = {}
    if record["transcript"]:
        answers["asr"] = "transcript", record["transcript"]
    elif not record["speakers"] and max(record["profile"][n] for n in merge.BRANCHES["speech"]) < (
        0.1
    ):
        answers["asr"] = "profile", NO_SPEECH
    if local["words"]:
        answers["asr_sentences"] = "sentences", stamped(local["sentences"])
        answers["asr_words"] = "words", stamped(local["words"])
    if sounding := sources(local):
        lines = [f"{span(item)}: {name}" for name, item in sounding]
        answers["events"] = _fields(local), "\n".join(lines)
    for branch in merge.BRANCHES:
        if caption := record["captions"][branch]:
            told = merge.relative(caption, record["start"])
            answers[f"caption_{branch}"] = f"captions.{branch}", told
    if any(record["captions"].values()) or record["level"]["silent"]:
        answers["caption"] = "unified", merge.relative(record["unified"], record["start"])
    for task, (field, answer) in answers.items():
        chinese = task == "asr" and speech.language(answer) == "zh"
        official, *others = PROMPTS["asr_zh" if chinese else task]
        prompt = official if not others or draw.chance(0.5) else draw.choice(others)
        yield Made(task, field, prompt, answer)


# --- questions -----------------------------------------------------------------------------------


def _questions(local: Record, draw: Draw) -> Iterator[tuple[str, Question]]:
    for make in (_times, _words, _counts, _orders, _presence, _music):
        yield from make(local, draw.child(make.__name__))


def _times(local: Record, draw: Draw) -> Iterator[tuple[str, Question]]:
    sounding = sources(local)
    edges = [item[edge] for _, item in sounding for edge in ("start", "end")]
    grid = [i / 10 for i in range(2, int(10 * local["end"]) - 1)]
    clear = [t for t in grid if all(abs(t - edge) >= _EDGE for edge in edges)]
    if sounding and clear:
        time = draw.choice(clear)
        now = dict.fromkeys(n for n, i in sounding if i["start"] <= time <= i["end"])
        here = {name for name, _ in sounding}
        wrong = (
            draw.sample([n for n in local["absent"] if n not in here], 3)
            if (len(local["absent"]) >= 3)
            else []
        )
        form = draw.choice(("What happens at {t} seconds?", "What can be heard at {t} s?"))
        question = form.format(t=f"{time:.1f}")
        answer = joined([*now]) or "nothing"
        yield _fields(local), Question("time_what", question, answer, tuple(wrong))
    for label in _labels(local):
        spans = [span(event) for event in local["events"] if event["label"] == label]
        form = draw.choice(
            (
                'When is "{label}" heard? Give start and end in seconds.',
                "Find the time of this sound: {label}.",
            )
        )
        yield "events", Question("time_when", form.format(label=label), joined(spans))
    if local["music"]:
        yield "music", Question("time_when", "When does the music play?", span(local["music"]))


def _words(local: Record, draw: Draw) -> Iterator[tuple[str, Question]]:
    texts = Counter(word["text"] for word in local["words"])
    once = [word for word in local["words"] if texts[word["text"]] == 1 and '"' not in word["text"]]
    if once:
        word = draw.choice(once)
        form = draw.choice(
            (
                'When is the word "{w}" said? Give start and end in seconds.',
                'At what time do you hear "{w}"? Answer as start - end in seconds.',
            )
        )
        yield "words", Question("word_when", form.format(w=word["text"]), span(word))
    inside = []
    for word in local["words"]:
        time = round((word["start"] + word["end"]) / 2, 1)
        others = [w for w in local["words"] if w is not word]
        if word["start"] + 0.04 <= time <= word["end"] - 0.04 and all(
            not w["start"] - 0.04 < time < w["end"] + 0.04 for w in others
        ):
            inside.append((time, word))
    if inside:
        time, word = draw.choice(inside)
        others = sorted(set(texts) - {word["text"]})
        wrong = tuple(draw.sample(others, 3)) if len(others) >= 3 else ()
        yield (
            "words",
            Question("word_what", f"Which word is said at {time:.1f} s?", word["text"], wrong),
        )


def _labels(local: Record) -> list[str]:
    return list(dict.fromkeys(event["label"] for event in local["events"]))


def _counts(local: Record, draw: Draw) -> Iterator[tuple[str, Question]]:
    for label in _labels(local):
        count = sum(event["label"] == label for event in local["events"])
        near = [n for n in range(max(count - 3, 1), count + 5) if n != count]
        wrong = tuple(str(n) for n in sorted(draw.sample(near, 3)))
        question = f'How many times is "{label}" heard?'
        yield "events", Question("count", question, str(count), wrong)
    if local["events"]:
        count = len(_labels(local))
        wrong = tuple(draw.sample([str(n) for n in range(1, 7) if n != count], 3))
        question = "Not counting speech and music, how many different sounds occur?"
        yield "events", Question("count_kinds", question, str(count), wrong)
    if local["sentences"]:
        count = len(local["speakers"])
        wrong = tuple(str(n) for n in range(1, 5) if n != count)[:3]
        yield "speakers", Question("count_speakers", "How many people speak?", str(count), wrong)
        if speech.language(local["transcript"]) == "en":
            question = "How many words are said in all?"
            yield "words", Question("count_words", question, str(len(local["words"])))


def _orders(local: Record, draw: Draw) -> Iterator[tuple[str, Question]]:
    labels = _labels(local)
    starts = [next(e["start"] for e in local["events"] if e["label"] == label) for label in labels]
    if len(labels) < 2:
        return
    if all(b - a >= 0.2 for a, b in itertools.pairwise(starts)):
        question = "In which order do the sounds begin?"
        yield "events", Question("order", question, ", ".join(labels))
        i, j = sorted(draw.sample(range(len(labels)), 2))
        pair = draw.shuffled([labels[i], labels[j]])
        yield (
            "events",
            Question(
                "order_first",
                f"Which begins first: {pair[0]} or {pair[1]}?",
                labels[i],
                (labels[j],),
            ),
        )
    one, two = draw.sample(labels, 2)
    spans = [[e for e in local["events"] if e["label"] == label] for label in (one, two)]
    shared = max(
        min(a["end"], b["end"]) - max(a["start"], b["start"]) for a in spans[0] for b in spans[1]
    )
    if abs(shared) > 0.2:
        question = f"Do {one} and {two} ever sound at the same time?"
        yield "events", Question("overlap", question, "yes" if shared > 0 else "no")


def _presence(local: Record, draw: Draw) -> Iterator[tuple[str, Question]]:
    labels, gone = _labels(local), local["absent"]
    forms = (
        "Is this heard: {label}?",
        "Can you hear this sound: {label}?",
        "Is it true that {clause} in this clip?",
    )
    for field, task, answer, among in (
        ("events", "present", "yes", labels),
        ("absent", "absent", "no", gone),
    ):
        if among:
            label = draw.choice(among)
            question = draw.choice(forms).format(label=label, clause=clause(label))
            yield field, Question(task, question, answer)
    if labels and len(gone) >= 3:
        yield (
            "events",
            Question(
                "which_sound",
                "Which of these sounds is heard?",
                draw.choice(labels),
                tuple(draw.sample(gone, 3)),
            ),
        )
    for what in ("speech", "music"):
        there = bool(local["speakers" if what == "speech" else "music"])
        scores = [local["profile"][name] for name in merge.BRANCHES[what]]
        if there or max(scores) < 0.1:  # between the two it is uncertain
            yield (
                "profile",
                Question(f"any_{what}", f"Is there any {what}?", "yes" if there else "no"),
            )


def _music(local: Record, draw: Draw) -> Iterator[tuple[str, Question]]:
    music = local["music"]
    if music.get("tempo"):
        tempo = round(music["tempo"])
        wrong = tuple(str(round(tempo * factor)) for factor in (0.7, 1.3, 1.6))
        question = "What is the tempo in beats per minute?"
        yield "music", Question("tempo", question, str(tempo), wrong)
    if music.get("key"):
        keys = [f"{tonic} {mode}" for tonic in TONICS for mode in MODES]
        wrong = tuple(draw.sample([k for k in keys if _key(k) != _key(music["key"])], 3))
        yield "music", Question("key", "What key is the music in?", music["key"], wrong)
    if music.get("instruments"):
        question = "Which instruments are playing?"
        yield "music", Question("instruments", question, ", ".join(music["instruments"]))


_FLATS = {"D flat": "C#", "E flat": "D#", "G flat": "F#", "A flat": "G#", "B flat": "A#"}


def _key(name: str) -> str:
    """One spelling of a key: "C sharp major", "D flat major" and "C# major" are the same."""
    tonic, _, mode = name.rpartition(" ")
    return f"{_FLATS.get(tonic, tonic.replace(' sharp', '#'))} {mode}"


def _choices(found: Sequence[tuple[str, Question]], draw: Draw) -> Iterator[Made]:
    four = [item for item in found if len(item[1].wrong) >= 3]
    for field, question in draw.sample(four, min(2, len(four))):
        options = draw.shuffled([question.answer, *draw.sample(question.wrong, 3)])
        listed = "\n".join(f"{'ABCD'[i]}. {option}" for i, option in enumerate(options))
        prompt = f"{MULTIPLE_CHOICE} {question.question}\n{listed}"
        yield Made("choice_letter", field, prompt, "ABCD"[options.index(question.answer)])


# --- checking ------------------------------------------------------------------------------------

_TIME = re.compile(r"(?<![\d.])\d+\.\d\d(?![\d.])")


def check_row(row: Mapping[str, Any], record: Record) -> list[str]:
    """Contradictions between a row and its record (times, clip, field); [] if there are none."""
    problems = []
    audio, prompt, answer = (message["content"] for message in row["conversation"])
    if audio != record["clip"]:
        problems.append(f"its clip is {audio}")
    if any(row["provenance"][key] != record[key] for key in ("audio", "start", "end")):
        problems.append("its provenance is another segment")
    for field in row["provenance"]["field"].split("+"):
        value: Any = record
        for key in field.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if not value:
            problems.append(f"its field {field} is empty")
    known = {f"{max(centi(t - record['start']), 0):.2f}" for t in times(record)}
    if row["task"] not in ("asr", "word_what"):
        text = re.sub(r'"[^"]*"', '""', f"{prompt}\n{answer}")
        if row["task"] in ("asr_words", "asr_sentences"):
            found = re.findall(r"\[(\d+\.\d\d)\]", text)
        else:
            found = _TIME.findall(text)
        problems += [f"{time} is not a time of its record" for time in found if time not in known]
    if not answer.strip():
        problems.append("its answer is empty")
    return problems


# --- many records --------------------------------------------------------------------------------


class Balance:
    """Balances the answers over all records: first `count` every row, then ask `keeps`."""

    def __init__(self) -> None:
        self._answers: dict[str, Counter[str]] = {}
        self._first: dict[tuple[str, float, float], str] = {}

    def count(self, made: Iterable[Row]) -> None:
        for row in made:
            if group := _group(row):
                self._answers.setdefault(group[0], Counter())[group[1]] += 1

    def keeps(self, row: Row, digest: str) -> str | None:
        """None if a row stays, else why it does not.

        Args:
          digest: hash of the source's content; identical files give their rows only once.
        """
        source = row["provenance"]
        first = self._first.setdefault((digest, source["start"], source["end"]), source["audio"])
        if first != source["audio"]:
            return f"the same sound as in {first}"
        if group := _group(row):
            task, said = group
            answers = self._answers[task]
            if task == "asr":  # at most one in ten answers that there is nothing to transcribe
                most = answers["said"] / 9 if said == "none" else answers[said]
            else:
                others = [n for other, n in answers.items() if other != said]
                most = 1.5 * (max(others) if others else 0)
            most = max(most, 1)
            rank = int.from_bytes(hashlib.blake2b(row["id"].encode(), digest_size=4).digest())
            if rank / 2**32 >= most / answers[said]:
                return f"balance: {task} has too many {said!r}"
        return None


def _group(row: Row) -> tuple[str, str] | None:
    answer = row["conversation"][2]["content"]
    if row["task"] == "asr":
        return "asr", "none" if answer == NO_SPEECH else "said"
    return (BALANCED[row["task"]], answer) if row["task"] in BALANCED else None
