"""The prompts of each task: the official one first, then other wordings."""

from __future__ import annotations

from typing import NamedTuple

TRANSCRIBE = {
    "none": "Transcribe the audio.",
    "sentence": (
        "Transcribe the audio into sentence-level timestamps using the format [xx.xx]text[yy.yy]"
    ),
    "word": "Transcribe the audio into word-level timestamps using the format [xx.xx]text[yy.yy]",
}
EVENTS = (
    "Analyze the audio and describe the main sound events in chronological order. Output one event "
    "per line using this format:\nstart_sec - end_sec: event description"
)
MULTIPLE_CHOICE = (
    "Choose the most suitable answer from options A, B, C, and D for the question on the next "
    "line. You should output only A, B, C, or D. Do not provide any additional explanations or "
    "content.\nQuestion:"
)

NO_SPEECH = "There is no speech."

# The official prompt comes first and is used half of the time.
PROMPTS: dict[str, tuple[str, ...]] = {
    "asr": (
        TRANSCRIBE["none"],
        "Write down what is said.",
        "What do the speakers say?",
        "Please transcribe this recording.",
    ),
    "asr_zh": (TRANSCRIBE["none"], "请转写音频。", "音频里说了什么？"),
    "asr_sentences": (
        TRANSCRIBE["sentence"],
        "Transcribe each sentence with its start and end time: [xx.xx]text[yy.yy]",
        "Write down every sentence and when it is said, in the format [xx.xx]text[yy.yy]",
    ),
    "asr_words": (
        TRANSCRIBE["word"],
        "Transcribe each word with its start and end time: [xx.xx]text[yy.yy]",
        "Write down every word and when it is said, in the format [xx.xx]text[yy.yy]",
    ),
    "events": (
        EVENTS,
        "List all that is heard, one per line, as start - end: description",
        "Give a timeline of this clip, one line for each event: start - end: what is heard",
    ),
    "caption_speech": (
        "Describe the speech in this recording.",
        "Who speaks, how, and what is said?",
        "Describe the speakers and what they say.",
    ),
    "caption_speech_json": (
        "Describe the speaker as JSON with the keys gender, pitch, speed, volume, accent, texture, "
        "tone, summary.",
    ),
    "caption_sound": (
        "Describe the sounds in this recording.",
        "What sounds are heard, apart from speech and music?",
        "Describe the sound events in the order in which they happen.",
    ),
    "caption_music": (
        "Describe the music.",
        "What kind of music is this?",
        "Describe tempo, key and instruments of the music.",
    ),
    "caption": (
        "Describe this audio.",
        "Describe this recording in detail.",
        "What do you hear?",
        "Give a caption of this clip.",
    ),
}


class Question(NamedTuple):
    """A question about a scene, and its answer.

    `wrong`: false answers. With fewer than two there is no multiple choice.
    """

    task: str
    question: str
    answer: str
    wrong: tuple[str, ...] = ()
