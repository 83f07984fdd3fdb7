"""Training rows of a scene in the official fine-tuning form; every answer is true."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from moss_audio_jax.draw import Draw
from moss_audio_jax.text import phrases
from moss_audio_jax.text.tasks import MULTIPLE_CHOICE, NO_SPEECH, PROMPTS, Question
from moss_audio_jax.world import describe
from moss_audio_jax.world.questions import questions
from moss_audio_jax.world.reasoning import reasoned

Labels = dict[str, Any]


def rows(labels: Labels, audio: str) -> list[dict[str, Any]]:
    """Every row of a scene: transcripts, captions, questions, choices, reasoning.

    Args:
      labels: of a scene.
      audio: content of the audio message: the path of the clip.

    Returns:
      Rows as `data.records` reads them, with "task" and "id" (`{scene}/{number}-{task}`). They
      depend only on the labels, not on earlier calls.
    """
    made = [*_described(labels), *_asked(labels), *_reasoned(labels)]
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


def _asked(labels: Labels) -> Iterator[tuple[str, str, str]]:
    found = questions(labels, _draw(labels, "questions"))
    for question in found:
        if question.task == "which_sound":  # asks for one "of these", so it needs options
            continue
        yield question.task, question.question, question.answer
    draw = _draw(labels, "choices")
    four = [q for q in found if len(q.wrong) >= 3]
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


def _reasoned(labels: Labels) -> Iterator[tuple[str, str, str]]:
    for task, question, steps, answer in reasoned(labels, _draw(labels, "reasoning")):
        chain = "\n".join(phrases.capitalised(step) for step in steps)
        yield task, question, f"<think>\n{chain}\n</think>\n\n{answer}"
