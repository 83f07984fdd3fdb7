"""What to say to a released model: the prompts of its authors' evaluation."""

TRANSCRIBE = {
    "none": "Transcribe the audio.",
    "sentence": (
        "Transcribe the audio into sentence-level timestamps using the format [xx.xx]text[yy.yy]"
    ),
    "word": "Transcribe the audio into word-level timestamps using the format [xx.xx]text[yy.yy]",
}
