"""Transcribes audio of any length, with times.

example:
  moss-audio-jax transcribe --checkpoint DIR --audio talk.mp3 --timestamps sentence --format srt

Audio longer than --window-seconds is cut at quiet places; times are those of the whole file.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from moss_audio_jax import command
from moss_audio_jax.audio import load_audio
from moss_audio_jax.audio.lengths import SAMPLE_RATE, mel_frames
from moss_audio_jax.audio.windows import quiet_windows
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.text import Segment, to_json, to_srt, to_textgrid, to_vtt
from moss_audio_jax.text.tasks import TRANSCRIBE
from moss_audio_jax.text.timestamps import parse, shift

if TYPE_CHECKING:
    from moss_audio_jax.api import MossAudio, Reply
    from moss_audio_jax.data.batch import Example
    from moss_audio_jax.generate.sampling import Sampling

Timestamps = Literal["none", "sentence", "word"]
WINDOW_SECONDS = 60.0
FORMATS: dict[str, tuple[str, Callable[[Sequence[Segment]], str]]] = {
    "srt": (".srt", to_srt),
    "vtt": (".vtt", to_vtt),
    "textgrid": (".TextGrid", to_textgrid),
    "json": (".json", to_json),
}


@dataclasses.dataclass(frozen=True)
class Transcript:
    """What was said.

    Attributes:
      text: all of it, without times.
      segments: with times in seconds of the whole file; without timestamps one for each window.
      seconds: how long the file is.
      problems: what a reader should know: answers cut short, times that could not be read.
    """

    text: str
    segments: list[Segment]
    seconds: float
    problems: list[str]


class Window(NamedTuple):
    """A piece of a waveform, start and end in seconds, and what the model is asked about it."""

    start: float
    end: float
    prompt: Example


def transcribe(
    model: MossAudio,
    wavs: Sequence[np.ndarray],
    timestamps: Timestamps = "none",
    window_seconds: float = WINDOW_SECONDS,
    sampling: Sampling | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> list[Transcript]:
    """Transcribes 16 kHz mono waveforms of any length; nothing is dropped without a word.

    Args:
      window_seconds: longer audio is cut at quiet places into windows of at most so much.
      sampling: default greedy.

    Raises:
      InputError: a window that does not fit the model's positions, or samples that are not finite.
      UsageError: window_seconds is below 1.
    """
    cut = [cut_windows(model, wav, timestamps, window_seconds) for wav in wavs]
    return transcribe_windows(model, cut, timestamps, sampling, batch_size, progress)


def cut_windows(
    model: MossAudio,
    wav: np.ndarray,
    timestamps: Timestamps = "none",
    window_seconds: float = WINDOW_SECONDS,
) -> list[Window]:
    """The first half of `transcribe`, for one waveform."""
    from moss_audio_jax.api import Request

    windows = []
    for first, last in quiet_windows(wav, window_seconds):
        if mel_frames(last - first) == 0:
            continue
        start, end = first / SAMPLE_RATE, last / SAMPLE_RATE
        try:
            prompt = model.prepare(Request(TRANSCRIBE[timestamps], [wav[first:last]]))
        except InputError as error:
            raise InputError(f"{start:.2f}-{end:.2f} s: {error}") from None
        windows.append(Window(start, end, prompt))
    return windows


def transcribe_windows(
    model: MossAudio,
    cut: Sequence[Sequence[Window]],
    timestamps: Timestamps = "none",
    sampling: Sampling | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> list[Transcript]:
    """The second half of `transcribe`, for the windows of each waveform."""
    from moss_audio_jax.generate.sampling import Sampling

    sampling = sampling or Sampling()
    prompts = [(window.prompt, sampling) for windows in cut for window in windows]
    replies = iter(model.answer(prompts, batch_size=batch_size, progress=progress))
    return [
        _joined([_window(window, next(replies), timestamps) for window in windows])
        for windows in cut
    ]


def _joined(parts: Sequence[Transcript]) -> Transcript:
    return Transcript(
        " ".join(part.text for part in parts if part.text),
        [segment for part in parts for segment in part.segments],
        sum(part.seconds for part in parts),
        [problem for part in parts for problem in part.problems],
    )


def _window(window: Window, reply: Reply, timestamps: Timestamps) -> Transcript:
    """One window's answer at its place in the file."""
    duration = window.end - window.start
    text, segments, problems = _read(reply.text, timestamps, duration)
    if reply.finish_reason != "stop":
        problems.append(f"the answer did not end by itself ({reply.finish_reason})")
    where = f"{window.start:.2f}-{window.end:.2f} s"
    return Transcript(
        text,
        shift(segments, window.start),
        duration,
        [f"{where}: {problem}" for problem in problems],
    )


def _read(
    answer: str, timestamps: Timestamps, duration: float
) -> tuple[str, list[Segment], list[str]]:
    """Text, segments and problems of an answer; times count from the window's start."""
    if timestamps == "none":
        return answer, [Segment(0.0, duration, answer)] if answer else [], []
    parsed = parse(answer)
    problems = [f"no times in {piece!r}" for piece in parsed.unread]
    segments = []
    for segment in parsed.segments:
        if segment.end > duration + 0.1:
            problems.append(f"time {segment.end:.2f} lies beyond the end ({duration:.2f} s)")
        start, end = min(segment.start, duration), min(segment.end, duration)
        segments.append(Segment(start, end, segment.text))
    if not segments and answer:  # the words are worth keeping, even without their times
        segments = [Segment(0.0, duration, answer)]
    return " ".join(s.text for s in segments if s.text), segments, problems


def main(argv: Sequence[str]) -> int:
    from moss_audio_jax.generate.__main__ import sampling_from, sampling_options

    options = command.parser("transcribe", __doc__)
    command.add_model_options(options)
    options.add_argument("--audio", nargs="+", required=True, metavar="FILE")
    options.add_argument("--timestamps", choices=tuple(TRANSCRIBE), default="none")
    options.add_argument("--format", choices=("text", *FORMATS), default="text")
    options.add_argument("--out", type=Path, metavar="DIR",
                         help="write one file for each input there; default stdout")  # fmt: skip
    options.add_argument("--window-seconds", type=float, default=WINDOW_SECONDS, metavar="S",
                         help=f"cut longer audio; default {WINDOW_SECONDS:g}")  # fmt: skip
    options.add_argument("--batch-size", type=command.positive, default=8, metavar="N")
    sampling_options(options)
    args = options.parse_args(argv)
    if args.format in ("srt", "vtt", "textgrid") and args.timestamps == "none":
        raise UsageError(f"--format {args.format} needs --timestamps sentence or word")
    targets = _targets(args.audio, args.out, args.format)
    quiet_windows(np.zeros(0, np.float32), args.window_seconds)  # bad use is said before loading

    sampling = sampling_from(args)
    model = command.load_model(args)

    def windows(file: str) -> list[Window]:
        wav = load_audio(file)
        try:
            return cut_windows(model, wav, args.timestamps, args.window_seconds)
        except InputError as error:
            raise InputError(f"{file}: {error}") from None

    cut, failed = command.collect(args.audio, windows)
    read = [i for i, windows in enumerate(cut) if windows is not None]
    transcripts = transcribe_windows(
        model,
        [cut[i] for i in read],
        args.timestamps,
        sampling,
        args.batch_size,
        progress=sys.stderr.isatty(),
    )
    for i, transcript in zip(read, transcripts, strict=True):
        for problem in transcript.problems:
            command.say(f"warning: {args.audio[i]}: {problem}")
        written = _written(transcript, args.format, args.timestamps)
        if targets is None:
            heading = f"== {args.audio[i]}\n" if len(args.audio) > 1 else ""
            sys.stdout.write(f"{heading}{written}")
            continue
        _write(targets[i], written)
        command.say(f"{args.audio[i]} -> {targets[i]}")
    return 1 if failed else 0


def _write(target: Path, text: str) -> None:
    """All of it or nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"{target}: not written: {error.strerror or error}") from error


def _written(transcript: Transcript, form: str, timestamps: Timestamps) -> str:
    if form == "textgrid":
        return to_textgrid(transcript.segments, transcript.seconds)
    if form != "text":
        return FORMATS[form][1](transcript.segments).rstrip("\n") + "\n"
    if timestamps == "none":
        return transcript.text + "\n"
    return "".join(f"[{s.start:.2f}]{s.text}[{s.end:.2f}]\n" for s in transcript.segments)


def _targets(files: Sequence[str], out: Path | None, form: str) -> list[Path] | None:
    """Where each transcript goes; two inputs must not overwrite each other."""
    if out is None:
        return None
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"--out {out}: {there} is not a folder that can be written to")
    suffix = ".txt" if form == "text" else FORMATS[form][0]
    targets = [out / (Path(file).stem + suffix) for file in files]
    for i, target in enumerate(targets):
        if target in targets[:i]:
            raise UsageError(
                f"{files[i]} and {files[targets.index(target)]} would both be written to "
                f"{target}; rename one, or run them apart"
            )
    return targets


if __name__ == "__main__":
    sys.exit(command.run(main))
