"""Training rows of a scene in the official fine-tuning form; every answer is true."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from moss_audio_jax.draw import Draw
from moss_audio_jax.text import phrases
from moss_audio_jax.text.tasks import MULTIPLE_CHOICE, NO_SPEECH, PROMPTS, Question
from moss_audio_jax.world import describe
from moss_audio_jax.world.questions import questions
from moss_audio_jax.world.reasoning import reasoned

Labels = dict[str, Any]

_LETTERS = frozenset("ABCD")  # of choices
# Questions whose answers must be searched for in a scene's notes.
_LEGIBLE = "time_|word_|count|order|overlap|absent|present|which_sound|who_said|tempo"


def rows(labels: Labels, audio: str, draws: int = 1) -> list[dict[str, Any]]:
    """Every row of a scene: transcripts, captions, questions, choices, reasoning.

    Args:
      labels: of a scene.
      audio: content of the audio message: the path of the clip.
      draws: how often questions are drawn: each time about other words, times and sounds.

    Returns:
      Rows as `data.records` reads them, with "task" and "id" (`{scene}/{number}-{task}`), none
      twice. They depend only on the arguments, not on earlier calls.
    """
    made = list(_described(labels))
    for draw in _draws(labels, draws):
        made += [*_asked(labels, draw), *_reasoned(labels, draw)]
    made = list(dict.fromkeys(made))
    return [
        {
            "conversation": [
                {"role": "user", "message_type": "audio", "content": audio},
                {"role": "user", "message_type": "text", "content": prompt},
                {"role": "assistant", "message_type": "text", "content": answer},
            ],
            "task": task,
            "id": f"{labels['id']}/{number:02d}-{task}",
        }
        for number, (task, prompt, answer) in enumerate(made)
    ]


def _draw(labels: Labels, *key: object) -> Draw:
    return Draw("rows", labels["version"], labels["id"], labels["duration"], *key)


def written(labels: Labels) -> dict[str, Any]:
    """A row without sound: questions about the scene's labels in writing, one turn each.

    What must be found in a clip must be found in its labels here, by the same words, with the same
    steps and answers. So a decoder learns to copy, to search and to calculate apart from hearing.

    Returns:
      A row as `data.records` reads it, with the task "written".
    """
    draws = list(_draws(labels, 3))
    copied = [said for said in _described(labels) if not said[0].startswith("caption")]
    found = [said for each in draws for said in _asked(labels, each, _LEGIBLE)]
    short = [said for said in found if not said[0].startswith("choice")]
    chosen = [said for said in found if said[0].startswith("choice")]
    steps = [said for each in draws for said in _reasoned(labels, each)]
    draw = _draw(labels, "written")
    turns: list[tuple[str, str, str]] = []
    for kind, most in ((copied, 2), (short, 5), (chosen, 1), (steps, 6)):
        kind = list(dict.fromkeys(kind))
        turns += draw.sample(kind, min(most, len(kind)))
    conversation = []
    for number, (_, question, answer) in enumerate(draw.shuffled(turns)):
        content = question if number else f"{describe.notes(labels)}\n{question}"
        for role, text in (("user", content), ("assistant", answer)):
            conversation.append({"role": role, "message_type": "text", "content": text})
    return {"conversation": conversation, "task": "written", "id": f"{labels['id']}/written"}


def _draws(labels: Labels, count: int) -> Iterator[Draw]:
    yield _draw(labels)
    for number in range(1, count):
        yield _draw(labels, number)


def _described(labels: Labels) -> Iterator[tuple[str, str, str]]:
    """(task, prompt, answer) of transcripts, timelines and captions."""
    spoken = bool(labels["sentences"])
    answers: dict[str, str] = {}
    answers["asr"] = describe.transcript(labels) or NO_SPEECH
    if spoken:
        answers["asr_sentences"] = phrases.stamped(labels["sentences"])
    if spoken and describe.timed(labels):
        answers["asr_words"] = phrases.stamped(describe.words(labels))
    if describe.sources(labels):
        answers["events"] = timeline(labels)
    if spoken:
        answers["caption_speech"] = describe.speech_caption(labels)
        if len(labels["speakers"]) == 1:
            answers["caption_speech_json"] = json.dumps(profile(labels), ensure_ascii=False)
    if labels["events"]:
        answers["caption_sound"] = describe.sound_caption(labels)
    if labels["music"]:
        answers["caption_music"] = describe.music_caption(labels)
    answers["caption"] = describe.caption(labels)
    for task, answer in answers.items():
        draw = _draw(labels, task)
        official, *others = PROMPTS[
            "asr_zh" if (task, labels["language"]) == ("asr", "zh") else task
        ]
        prompt = official if not others or draw.chance(0.5) else draw.choice(others)
        yield task, prompt, answer


def timeline(labels: Labels) -> str:
    return "\n".join(f"{phrases.span(item)}: {name}" for name, item in describe.sources(labels))


def profile(labels: Labels) -> dict[str, str | None]:
    """The official caption's 13 fields as far as the labels give them; for one speaker."""
    speaker = labels["speakers"][0]
    return {
        "gender": speaker["sex"],
        "pitch": None if speaker["whispered"] else speaker["pitch"],
        "speed": speaker["speed"],
        "volume": labels["loudness"]["level"],
        "accent": speaker["accent"],
        "texture": "whispered" if speaker["whispered"] else "voiced",
        "tone": None if speaker["whispered"] else speaker["intonation"],
        "summary": phrases.capitalised(describe.speaker_phrase(labels, speaker)) + ".",
    }


def _asked(labels: Labels, draw: Draw, tasks: str = "") -> Iterator[tuple[str, str, str]]:
    found = [q for q in questions(labels, draw.child("questions")) if re.match(tasks, q.task)]
    for question in found:
        if question.task == "which_sound":  # asks for one "of these", so it needs options
            continue
        yield question.task, question.question, question.answer
    draw = draw.child("choices")
    # Beside a choice "a", the answer "A" could mean either.
    four = [
        q
        for q in found
        if len(q.wrong) >= 3 and _LETTERS.isdisjoint(map(str.upper, (q.answer, *q.wrong)))
    ]
    for question in draw.sample(four, min(2, len(four))):
        yield "choice_letter", *_choice(draw, question, letter=True)
    several = [q for q in found if len(q.wrong) >= 2]
    for question in draw.sample(several, min(2, len(several))):
        yield "choice_text", *_choice(draw, question, letter=False)


def _choice(draw: Draw, question: Question, letter: bool) -> tuple[str, str]:
    """(prompt, answer) of a multiple choice; with letters, four options, as in the benchmarks."""
    wrong = draw.sample(question.wrong, min(3, len(question.wrong)))
    options = draw.shuffled([question.answer, *wrong])
    listed = "\n".join(f"{'ABCD'[i]}. {option}" for i, option in enumerate(options))
    if letter:
        prompt = f"{MULTIPLE_CHOICE} {question.question}\n{listed}"
        return prompt, "ABCD"[options.index(question.answer)]
    close = draw.choice(("Answer with one of the options.", "Choose one and write it out."))
    return f"{question.question}\n{listed}\n{close}", question.answer


def _reasoned(labels: Labels, draw: Draw) -> Iterator[tuple[str, str, str]]:
    for task, question, steps, answer in reasoned(labels, draw.child("reasoning")):
        chain = "\n".join(phrases.capitalised(step) for step in steps)
        yield task, question, f"<think>\n{chain}\n</think>\n\n{answer}"
