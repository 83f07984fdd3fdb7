"""What to say to a released model: the prompts of its authors' evaluation."""

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
