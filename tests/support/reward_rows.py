"""Rows of every kind of answer, and the tricks for which no reward may be paid."""

import json
import string

from moss_audio_jax.post_train.asked import Said, read
from moss_audio_jax.text.tasks import EVENTS, MULTIPLE_CHOICE, TRANSCRIBE

SOUNDS = ["dog barking", "rain falling", "bell ringing", "wind blowing"]
LISTED = "\n".join(f"{letter}. {sound}" for letter, sound in zip("ABCD", SOUNDS, strict=True))
VOICE = {"gender": "female", "pitch": "low", "summary": "A woman who whispers at a slow speed."}


def row(task, prompt, answer, **more):
    return {
        "conversation": [
            {"role": "user", "message_type": "audio", "content": "a.wav"},
            {"role": "user", "message_type": "text", "content": prompt},
            {"role": "assistant", "message_type": "text", "content": answer},
        ],
        "task": task,
        "id": f"{task}-1",
        **more,
    }


def said(raw, finish_reason="stop"):
    return Said(raw, len(raw.split()), finish_reason)


ROWS = {
    "choice_letter": row("choice_letter", f"{MULTIPLE_CHOICE} Which is heard?\n{LISTED}", "C"),
    "choice_text": row(
        "choice_text",
        f"Which of these sounds is heard?\n{LISTED}\nChoose one and write it out.",
        "rain falling",
    ),
    "asr": row("asr", TRANSCRIBE["none"], "please put the audio into the bag"),
    "asr_zh": row("asr", "音频里说了什么？", "今天下雨", language="zh"),
    "asr_words": row(
        "asr_words", TRANSCRIBE["word"], "[0.10]the[0.30][0.30]dog[0.80][1.00]barks[1.50]"
    ),
    "asr_sentences": row(
        "asr_sentences", TRANSCRIBE["sentence"], "[0.10]the dog barks[1.50][2.00]it rains[3.00]"
    ),
    "events": row("events", EVENTS, "0.10 - 4.07: dog barking\n0.56 - 3.40: rain falling"),
    "caption_speech_json": row(
        "caption_speech_json",
        "Describe the speaker as JSON with the keys gender, pitch, summary.",
        json.dumps(VOICE),
    ),
    "count": row("count", "How many barks do you hear?", "3"),
    "tempo": row("tempo", "What is the tempo in beats per minute?", "120"),
    "time_when": row("time_when", 'When is "dog barking" heard?', "0.56 - 3.40"),
    "present": row("present", "Can you hear this sound: dog barking?", "yes"),
    "who_said": row("who_said", 'Who says "hello", the man or the woman?', "the man"),
    "reason_gap": row(
        "reason_gap",
        "How many seconds pass between the end of rain and the start of wind?",
        "<think>\n2.51 - 1.63 = 0.88.\n</think>\n\n0.88",
    ),
    "reason_before": row(
        "reason_before",
        "Does rain begin before or after the first word?",
        "<think>\nRain begins at 1.00, the word at 2.00.\n</think>\n\nbefore",
    ),
}
EVERY = {  # all that could be the answer, at once
    "number": [", ".join(map(str, range(200))), "0 or 1 or 2 or 3 or 120", "1\n2\n3\n0.88\n120"],
    "text": [
        "yes and no",
        "yes, no",
        "yes no",
        "the man or the woman",
        "before/after",
        "before, after",
    ],
    "fields": [json.dumps(dict.fromkeys(VOICE, "male, female, low, medium, high")), "{}"],
}


def hacks(row):
    """{what is tried: Said}: none of these is an answer."""
    asked = read(row)
    answer = asked.answer
    tried = {
        "nothing": "",
        "white space": " \n\n ",
        "an empty block": "<think></think>",
        "an empty block in the usual form": "<think>\n\n</think>\n\n",
        "thoughts alone": "<think>\nLet me listen.\n</think>\n\n",
        "the answer in the block alone": f"<think>\n{answer}\n</think>",
        "the answer in a block never closed": f"<think>\n{answer}",
        "the answer before a closing tag": f"{answer}\n</think>",
        "the question": asked.prompt,
        "the question twice": f"{asked.prompt}\n{asked.prompt}",
        "the question on one line": " ".join(asked.prompt.split()),
        "the question after thoughts": f"<think>\nHm.\n</think>\n\n{asked.prompt}",
        "the question's first line": asked.prompt.split("\n")[0],
    }
    if asked.choices:
        letters = string.ascii_uppercase[: len(asked.choices)]
        lines = [f"{a}. {text}" for a, text in zip(letters, asked.choices, strict=True)]
        tried |= {
            f"all choices, {number}": text
            for number, text in enumerate(
                (
                    "\n".join(lines),
                    " ".join(lines),
                    ", ".join(letters),
                    " ".join(letters),
                    "".join(letters),
                    " or ".join(asked.choices),
                    ", ".join(asked.choices),
                    "\n".join(asked.choices),
                    "The answer is " + ". The answer is ".join(letters) + ".",
                    f"{letters[0]} and {letters[1:]}",
                )
            )
        }
    for number, text in enumerate(EVERY.get(asked.kind, ())):
        tried[f"everything, {number}"] = text
    return {name: said(raw) for name, raw in tried.items()}
