"""Transcribes audio of any length, with times.

example:
  moss-audio-jax transcribe --checkpoint DIR --audio talk.mp3 --timestamps sentence --format srt

Audio longer than --window-seconds is cut at quiet places; times are those of the whole file.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

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
    from moss_audio_jax.api import MossAudio
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
      problems: what a reader should know: answers cut short, times that could not be read.
    """

    text: str
    segments: list[Segment]
    problems: list[str]


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
    """
    from moss_audio_jax.api import Request
    from moss_audio_jax.generate.sampling import Sampling

    if window_seconds < 1:
        raise UsageError(f"window_seconds is {window_seconds}; expected at least 1")
    sampling = sampling or Sampling()
    windows = [
        (number, start, end)
        for number, wav in enumerate(wavs)
        for start, end in quiet_windows(wav, window_seconds)
        if mel_frames(end - start) > 0
    ]
    requests = [
        Request(TRANSCRIBE[timestamps], [wavs[number][start:end]], sampling)
        for number, start, end in windows
    ]
    replies = model.generate_batch(requests, batch_size=batch_size, progress=progress)
    parts: list[list[Transcript]] = [[] for _ in wavs]
    for (number, start, end), reply in zip(windows, replies, strict=True):
        part = _window(reply.text, timestamps, (end - start) / SAMPLE_RATE)
        if reply.finish_reason != "stop":
            part.problems.append(f"the answer did not end by itself ({reply.finish_reason})")
        offset = start / SAMPLE_RATE
        where = f"{offset:.2f}-{end / SAMPLE_RATE:.2f} s"
        parts[number].append(
            Transcript(
                part.text,
                shift(part.segments, offset),
                [f"{where}: {problem}" for problem in part.problems],
            )
        )
    return [
        Transcript(
            " ".join(part.text for part in group if part.text),
            [segment for part in group for segment in part.segments],
            [problem for part in group for problem in part.problems],
        )
        for group in parts
    ]


def _window(answer: str, timestamps: Timestamps, duration: float) -> Transcript:
    """One window's answer; times count from the window's start."""
    if timestamps == "none":
        return Transcript(answer, [Segment(0.0, duration, answer)] if answer else [], [])
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
    return Transcript(" ".join(s.text for s in segments if s.text), segments, problems)


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
    options.add_argument("--batch-size", type=int, default=8, metavar="N")
    sampling_options(options)
    args = options.parse_args(argv)
    if args.format in ("srt", "vtt", "textgrid") and args.timestamps == "none":
        raise UsageError(f"--format {args.format} needs --timestamps sentence or word")
    targets = _targets(args.audio, args.out, args.format)

    sampling = sampling_from(args)
    model = command.load_model(args)
    wavs, failed = command.collect(args.audio, load_audio)
    read = [i for i, wav in enumerate(wavs) if wav is not None]
    transcripts = transcribe(
        model,
        [wavs[i] for i in read],
        args.timestamps,
        args.window_seconds,
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
        targets[i].parent.mkdir(parents=True, exist_ok=True)
        partial = targets[i].with_name(f".{targets[i].name}.partial")
        partial.write_text(written, encoding="utf-8")
        partial.replace(targets[i])
        command.say(f"{args.audio[i]} -> {targets[i]}")
    return 1 if failed else 0


def _written(transcript: Transcript, form: str, timestamps: Timestamps) -> str:
    if form != "text":
        return FORMATS[form][1](transcript.segments).rstrip("\n") + "\n"
    if timestamps == "none":
        return transcript.text + "\n"
    return "".join(f"[{s.start:.2f}]{s.text}[{s.end:.2f}]\n" for s in transcript.segments)


def _targets(files: Sequence[str], out: Path | None, form: str) -> list[Path] | None:
    """Where each transcript goes; two inputs must not overwrite each other."""
    if out is None:
        return None
    suffix = ".txt" if form == "text" else FORMATS[form][0]
    targets = [out / (Path(file).stem + suffix) for file in files]
    for i, target in enumerate(targets):
        if target in targets[:i]:
            raise InputError(
                f"{files[i]} and {files[targets.index(target)]} would both be written to "
                f"{target}; rename one, or run them apart"
            )
    return targets


if __name__ == "__main__":
    sys.exit(command.run(main))
