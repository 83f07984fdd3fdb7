"""Transcribes audio of any length, with times.

example:
  moss-audio-jax transcribe --checkpoint DIR --audio talk.mp3 --timestamps sentence --format srt

Audio longer than --window-seconds is cut at quiet places; times are those of the whole file.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, so that Ctrl-C ends those too
    from moss_audio_jax import cli

    cli.run_verb("transcribe")

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import numpy as np

from moss_audio_jax import command
from moss_audio_jax.audio import load_audio
from moss_audio_jax.audio.lengths import SAMPLE_RATE, mel_frames
from moss_audio_jax.audio.windows import quiet_windows
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.files import check_folder, shown, write_whole
from moss_audio_jax.generate.options import BATCH_SIZE, Sampling
from moss_audio_jax.generate.request import Audio, Prepared, Reply, Request, clip_of, name_of
from moss_audio_jax.text import Segment, to_json, to_srt, to_textgrid, to_vtt
from moss_audio_jax.text.tasks import NO_SPEECH, TRANSCRIBE
from moss_audio_jax.text.timestamps import parse, shift, without_stamps
from moss_audio_jax.text.unsaid import goes_on_at

if TYPE_CHECKING:
    from moss_audio_jax.api import MossAudio

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
    """The transcript of a file.

    Attributes:
      text: the whole text, without times.
      segments: with times in seconds of the whole file; without timestamps one for each window.
      seconds: the length of the file.
      problems: messages for the reader, such as answers cut short and times that cannot be read.
      stopped_at: seconds of the file from which something may be missing, because an answer was cut
        short there or ended although more is said; None if none was. The latter is only found with
        a checkpoint that has a CTC head (`weights.helpers`), as the bundled one.
    """

    text: str
    segments: list[Segment]
    seconds: float
    problems: list[str]
    stopped_at: float | None = None


class Window(NamedTuple):
    """A part of a waveform: start and end in seconds, and the prompt about it."""

    start: float
    end: float
    prompt: Prepared


@overload
def transcribe(
    model: MossAudio, audio: Audio, timestamps: Timestamps = "none", **options: Any
) -> Transcript: ...


@overload
def transcribe(
    model: MossAudio, audio: Sequence[Audio], timestamps: Timestamps = "none", **options: Any
) -> list[Transcript]: ...


def transcribe(
    model: MossAudio,
    audio: Sequence[Audio] | Audio,
    timestamps: Timestamps = "none",
    window_seconds: float = WINDOW_SECONDS,
    sampling: Sampling | None = None,
    batch_size: int = BATCH_SIZE,
    progress: bool = False,
) -> Transcript | list[Transcript]:
    """Transcribes audio of any length, and names parts that are missing or doubtful.

    Args:
      audio: a file, a 16 kHz mono waveform, or samples with their rate (`api.Audio`), or a list of
        them.
      timestamps: "none", "sentence" or "word".
      window_seconds: longer sound is cut at quiet places into windows of at most this length.
      sampling: default greedy.

    Returns:
      A Transcript, or for a list a list of them.

    Raises:
      InputError: a file cannot be read, a window does not fit the model's positions, or samples are
        not finite. The file is named or, in a list of waveforms, its number.
      UsageError: window_seconds is below 1, or timestamps is not one of the three.
    """
    if timestamps not in TRANSCRIBE:
        raise UsageError(f"timestamps is {timestamps!r}; expected one of {', '.join(TRANSCRIBE)}")
    clips = Request("", audio).clips
    cut = []
    for number, clip in enumerate(clips, 1):
        wav = clip_of(clip).wav
        try:
            cut.append(cut_windows(model, wav, timestamps, window_seconds, sampling))
        except InputError as error:
            if len(clips) == 1 and isinstance(clip, np.ndarray):
                raise
            raise InputError(f"{name_of(clip, number)}: {error}") from None
    transcripts = transcribe_windows(model, cut, timestamps, batch_size, progress)
    return transcripts[0] if clips is not audio else transcripts


def cut_windows(
    model: MossAudio,
    wav: np.ndarray,
    timestamps: Timestamps = "none",
    window_seconds: float = WINDOW_SECONDS,
    sampling: Sampling | None = None,
) -> list[Window]:
    """The first half of `transcribe`, for one waveform: its windows with their prompts."""
    windows = list(each_window(model, wav, timestamps, window_seconds, sampling))
    if not windows:
        raise InputError("has no sound: a clip needs at least 10 ms")
    return windows


def each_window(
    model: MossAudio,
    wav: np.ndarray,
    timestamps: Timestamps = "none",
    window_seconds: float = WINDOW_SECONDS,
    sampling: Sampling | None = None,
) -> Iterator[Window]:
    """The windows of `cut_windows` one by one, each prepared when it is asked for."""
    for first, last in quiet_windows(wav, window_seconds):
        if mel_frames(last - first) == 0:
            continue
        start, end = first / SAMPLE_RATE, last / SAMPLE_RATE
        asked = Request(TRANSCRIBE[timestamps], [wav[first:last]], sampling or Sampling())
        try:
            prompt = model.prepare(asked)
        except InputError as error:
            raise type(error)(f"{start:.2f}-{end:.2f} s: {error}") from None  # TooLong stays so
        yield Window(start, end, prompt)


def transcribe_windows(
    model: MossAudio,
    cut: Sequence[Sequence[Window]],
    timestamps: Timestamps = "none",
    batch_size: int = BATCH_SIZE,
    progress: bool = False,
) -> list[Transcript]:
    """The second half: a transcript for each list of windows."""
    prompts = [window.prompt for windows in cut for window in windows]
    replies = iter(model.answer(prompts, batch_size=batch_size, progress=progress))
    return [joined([(window, next(replies)) for window in windows], timestamps) for windows in cut]


def joined(answered: Sequence[tuple[Window, Reply]], timestamps: Timestamps) -> Transcript:
    """The transcript of a file's windows and the replies about them."""
    texts, segments, problems, warned, stopped_at = [], [], [], {}, None
    for window, reply in answered:
        duration = window.end - window.start
        text, found, wrong = _read(reply.text, timestamps, duration)
        missing, told = None, max((s.end for s in found), default=0.0)
        if told == duration:  # then no time says so, or one that is too late
            told = 0.0
        if reply.finish_reason != "stop":
            wrong.append(f"the answer was cut short ({reply.finish_reason})")
            missing = told
        elif reply.heard:
            missing = goes_on_at(text, reply.heard[0], told)
            if missing is not None:
                at = window.start + missing
                wrong.append(f"the answer ended, but more is said from {at:.2f} s on")
        if stopped_at is None and missing is not None:
            stopped_at = window.start + missing
        place = f"{window.start:.2f}-{window.end:.2f} s"
        texts += [text] if text else []
        segments += shift(found, window.start)
        problems += [f"{place}: {problem}" for problem in wrong]
        for warning in reply.warnings:  # all windows of an hour may have the same one
            warned.setdefault(warning, []).append(place)
    for warning, (place, *more) in warned.items():
        others = f" and {len(more)} other window(s)" if more else ""
        problems.append(f"{place}{others}: {warning}")
    if not texts:
        problems.append("no words were found")
    seconds = sum(window.end - window.start for window, _ in answered)
    return Transcript(" ".join(texts), segments, seconds, problems, stopped_at)


def _read(
    answer: str, timestamps: Timestamps, duration: float
) -> tuple[str, list[Segment], list[str]]:
    """Text, segments and problems of an answer; times count from the window's start."""
    if answer.strip() == NO_SPEECH:
        return "", [], []
    if timestamps == "none":
        return answer, [Segment(0.0, duration, answer)] if answer else [], []
    parsed = parse(answer)
    problems = [f"no times in {piece!r}" for piece in parsed.unread]
    segments = []
    for segment in parsed.segments:
        if segment.end > duration + 0.1:
            problems.append(f"time {segment.end:.2f} is after the end ({duration:.2f} s)")
        start, end = min(segment.start, duration), min(segment.end, duration)
        segments.append(Segment(start, end, segment.text))
    if not segments and (words := without_stamps(answer)):  # keep them, even without times
        segments = [Segment(0.0, duration, words)]
    return " ".join(s.text for s in segments if s.text), segments, problems


def main(argv: Sequence[str]) -> int:
    from moss_audio_jax.generate.__main__ import sampling_from, sampling_options

    options = command.parser("transcribe", __doc__)
    command.add_model_options(options)
    options.add_argument("--audio", nargs="+", required=True, metavar="FILE")
    options.add_argument("--timestamps", choices=tuple(TRANSCRIBE), default="none")
    options.add_argument("--format", choices=("text", *FORMATS), default="text")
    options.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="write one file per input into DIR; default: stdout",
    )
    options.add_argument(
        "--window-seconds",
        type=float,
        default=WINDOW_SECONDS,
        metavar="S",
        help=f"cut longer audio into such windows; default {WINDOW_SECONDS:g}",
    )
    options.add_argument("--batch-size", type=command.positive, default=BATCH_SIZE, metavar="N")
    sampling_options(options)
    args = options.parse_args(argv)
    if args.format in ("srt", "vtt", "textgrid") and args.timestamps == "none":
        raise UsageError(f"--format {args.format} needs --timestamps sentence or word")
    targets = _targets(args.audio, args.out, args.format)
    # A wrong value is refused before the model is loaded.
    quiet_windows(np.zeros(0, np.float32), args.window_seconds)

    sampling = sampling_from(args)
    wrong = command.look(args.audio)
    for line in wrong.values():
        command.say(line)
    good = [i for i, file in enumerate(args.audio) if file not in wrong]
    if not good:
        return 1
    model = command.load_model(args)
    done, progress = 0, sys.stderr.isatty()

    def windows(i: int) -> list[Window]:
        wav = load_audio(args.audio[i])
        try:
            return cut_windows(model, wav, args.timestamps, args.window_seconds, sampling)
        except InputError as error:
            raise InputError(f"{shown(args.audio[i])}: {error}") from None

    for share in command.shares(good, windows, args.batch_size, progress):
        transcripts = transcribe_windows(
            model, [each for _, each in share], args.timestamps, args.batch_size, progress
        )
        for (i, _), transcript in zip(share, transcripts, strict=True):
            command.warn(transcript.problems, args.audio[i])
            written = _written(transcript, args.format, args.timestamps)
            if targets is None:
                heading = f"== {shown(args.audio[i])}\n" if len(args.audio) > 1 else ""
                sys.stdout.write(f"{heading}{written}")
            else:
                try:
                    write_whole(targets[i], written)
                except InputError as error:  # the other transcripts are not lost
                    command.say(f"error: {error}")
                    continue
                command.say(f"{shown(args.audio[i])} -> {shown(targets[i])}")
            done += 1
        sys.stdout.flush()
    return 0 if done == len(args.audio) else 1


def _written(transcript: Transcript, form: str, timestamps: Timestamps) -> str:
    if form == "textgrid":
        return to_textgrid(transcript.segments, transcript.seconds)
    if form != "text":
        return FORMATS[form][1](transcript.segments).rstrip("\n") + "\n"
    if timestamps == "none":
        return transcript.text + "\n"
    return "".join(f"[{s.start:.2f}]{s.text}[{s.end:.2f}]\n" for s in transcript.segments)


def _targets(files: Sequence[str], out: Path | None, form: str) -> list[Path] | None:
    """The output file of each transcript. Raises UsageError if two inputs have the same one."""
    if out is None:
        return None
    check_folder(out)
    suffix = ".txt" if form == "text" else FORMATS[form][0]
    targets = [out / (Path(file).stem + suffix) for file in files]
    for i, target in enumerate(targets):
        if target in targets[:i]:
            raise UsageError(
                f"{files[i]} and {files[targets.index(target)]} would both be written to "
                f"{target}; rename one, or run them separately"
            )
    return targets
