"""POST /v1/audio/transcriptions: sound of any length, window by window, in OpenAI's forms."""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

import numpy as np
from starlette.datastructures import FormData, UploadFile

from moss_audio_jax.errors import InputError, TooLong
from moss_audio_jax.generate.options import Sampling
from moss_audio_jax.generate.request import Reply
from moss_audio_jax.serve.answers import Answers, Pieces, sse
from moss_audio_jax.serve.errors import TOO_LONG, ApiError, invalid
from moss_audio_jax.serve.schemas import TranscriptionRequest, read
from moss_audio_jax.serve.state import State
from moss_audio_jax.text import Segment, to_srt, to_vtt
from moss_audio_jax.transcribe import Timestamps, Transcript, Window, each_window, joined

_TOGETHER = 8  # windows of one file that are in the engine at a time, so that others have places
_PAUSE = 0.8  # seconds of silence that end a segment of words
_SENTENCE_ENDS = (".", "!", "?", "。", "！", "？", "…")
_LISTS = ("timestamp_granularities", "include")
_MOST_HEADER = 4000  # characters


class Transcription:
    """One request: a file's samples and how its transcript is written."""

    def __init__(
        self,
        state: State,
        service: Any,
        asked: TranscriptionRequest,
        wav: np.ndarray,
        notes: tuple[str, ...],
    ) -> None:
        self._state, self._service, self.asked = state, service, asked
        self._wav, self._notes = wav, notes
        self._answered: list[tuple[Window, Reply]] = []
        self._tokens = {"text": 0, "audio": 0, "made": 0}

    @property
    def timestamps(self) -> Timestamps:
        """Which times the model is asked for. Words are also those of segments."""
        if "word" in self.asked.timestamp_granularities:
            return "word"
        return "none" if self.asked.response_format in ("json", "text") else "sentence"

    async def begin(self, stack: contextlib.ExitStack) -> Work:
        """Submits the first windows, so that a file that cannot be used is refused at once."""
        state, seconds = self._state, self._state.limits.request_seconds
        stream = bool(self.asked.stream)
        answers = stack.enter_context(Answers(self._service, state.metrics, seconds, stream))
        most = min(Sampling.max_new_tokens, self._state.limits.max_new_tokens)
        sampling = Sampling(max_new_tokens=most, temperature=self.asked.temperature or 0.0)
        windows = each_window(
            state.model, self._wav, self.timestamps, state.window_seconds, sampling
        )
        work = Work(state, answers, windows)
        await work.more()
        if not work.windows:
            raise invalid("file: has no sound; expected at least 10 ms", "file", "invalid_audio")
        return work

    async def whole(self, work: Work) -> tuple[str | dict[str, Any], dict[str, str]]:
        """The reply's body, a text or for JSON an object, and its headers."""
        async for _ in self._pieces(work):
            pass
        return await self._state.in_thread(self._written)

    async def events(self, work: Work) -> AsyncIterator[str]:
        """The events of a streamed reply: pieces of text, then all of it."""
        try:
            async for piece in self._pieces(work):
                yield sse({"type": "transcript.text.delta", "delta": piece})
            transcript = await self._state.in_thread(self._transcript)
            done = {"type": "transcript.text.done", "text": transcript.text}
            yield sse(done | self._told(transcript) | {"usage": self._usage()})
        except ApiError as error:
            yield sse(error.body)
        yield "data: [DONE]\n\n"

    async def _pieces(self, work: Work) -> AsyncIterator[str]:
        """New text as it comes, in the file's order. Without times, joined, it is the whole."""
        model, audio_id = self._state.model, self._state.model.processor.audio_token_id
        pieces: dict[int, Pieces] = {}
        held: dict[int, str] = {}  # text that was not given yet
        replies: dict[int, Reply] = {}
        current, begun, said = 0, False, False  # the window whose text is given
        async for number, progress in work.answers:
            prompt = work.windows[number].prompt
            if number not in pieces:
                pieces[number] = Pieces(model.tokenizer, prompt.sampling.stop)
            new = pieces[number].push(progress.ids, progress.output is not None)
            held[number] = held.get(number, "") + new.get("text", "")
            if progress.output is not None:
                replies[number] = model.reply(progress.output, prompt)
                audio = int((prompt.ids == audio_id).sum())
                self._tokens["audio"] += audio
                self._tokens["text"] += len(prompt.ids) - audio
                self._tokens["made"] += len(progress.output.ids)
                await work.done(number)
            while True:
                if text := held.pop(current, ""):
                    yield f" {text}" if said and not begun else text
                    begun = said = True
                if current not in replies:
                    break
                current, begun = current + 1, False
        self._answered = [(window, replies[i]) for i, window in enumerate(work.windows)]

    def _transcript(self) -> Transcript:
        transcript = joined(self._answered, self.timestamps)
        transcript.problems[:0] = self._notes
        if transcript.stopped_at is not None:
            self._state.metrics.stopped_early.inc()
        return transcript

    def _told(self, transcript: Transcript) -> dict[str, Any]:
        """What a reader must know of parts that may be missing."""
        told: dict[str, Any] = {}
        if transcript.problems:
            told["warnings"] = transcript.problems
        if transcript.stopped_at is not None:
            told["stopped_at"] = round(transcript.stopped_at, 3)
        return told

    def _usage(self) -> dict[str, Any]:
        made, text, audio = (self._tokens[name] for name in ("made", "text", "audio"))
        return {
            "type": "tokens",
            "input_tokens": text + audio,
            "output_tokens": made,
            "total_tokens": text + audio + made,
            "input_token_details": {"text_tokens": text, "audio_tokens": audio},
        }

    def _written(self) -> tuple[str | dict[str, Any], dict[str, str]]:
        transcript, form = self._transcript(), self.asked.response_format
        told = self._told(transcript)
        if form == "json":
            return {"text": transcript.text, **told, "usage": self._usage()}, {}
        if form == "verbose_json":
            return self._verbose(transcript) | told, {}
        # A text has no other place for what was not heard.
        headers = {
            f"X-Transcript-{name.replace('_', '-')}": json.dumps(told[name]) for name in told
        }
        headers = {name: value[:_MOST_HEADER] for name, value in headers.items()}
        if form == "text":
            return f"{transcript.text}\n", headers
        write = to_srt if form == "srt" else to_vtt
        return write(transcript.segments), headers

    def _verbose(self, transcript: Transcript) -> dict[str, Any]:
        asked, segments = self.asked, transcript.segments
        body: dict[str, Any] = {
            "task": "transcribe",
            "language": asked.language or "unknown",
            "duration": round(transcript.seconds, 3),
            "text": transcript.text,
        }
        if self.timestamps == "word":
            body["words"] = [
                {"word": s.text, "start": round(s.start, 3), "end": round(s.end, 3)}
                for s in segments
            ]
            segments = _sentences(segments)
        if asked.timestamp_granularities != ["word"]:
            body["segments"] = [self._segment(i, s) for i, s in enumerate(segments)]
        return body | {"usage": {"type": "duration", "seconds": round(transcript.seconds, 3)}}

    def _segment(self, number: int, segment: Segment) -> dict[str, Any]:
        """A segment with all of Whisper's fields; null for what this model does not give."""
        data = segment.text.encode("utf-8", "replace")
        ratio = len(data) / max(len(zlib.compress(data)), 1)
        return {
            "id": number,
            "seek": 0,
            "start": round(segment.start, 3),
            "end": round(segment.end, 3),
            "text": segment.text,
            "tokens": [],
            "temperature": self.asked.temperature or 0.0,
            "avg_logprob": None,
            "compression_ratio": round(ratio, 3),
            "no_speech_prob": None,
        }


class Work:
    """A file's windows on their way through the engine, some at a time."""

    def __init__(self, state: State, answers: Answers, windows: Any) -> None:
        self.answers, self.windows = answers, []
        self._state, self._left = state, windows

    async def more(self) -> None:
        """Submits windows while there are places for them."""
        while self._left is not None and self.answers.open < _TOGETHER:
            try:
                window = await self._state.in_thread(next, self._left, None)
            except InputError as error:
                code = TOO_LONG if isinstance(error, TooLong) else "invalid_audio"
                raise invalid(f"file: {error}", "file", code) from None
            if window is None:
                self._left = None
                return
            self.windows.append(window)
            self.answers.begin(window.prompt)

    async def done(self, number: int) -> None:
        """Forgets the prompt of an answered window, and submits what follows."""
        self.windows[number] = self.windows[number]._replace(prompt=None)
        await self.more()


async def read_transcription(state: State, form: FormData) -> Transcription:
    """A form's file, decoded. Raises ApiError, naming the field that is wrong."""
    values, upload = _fields(form)
    asked: TranscriptionRequest = read(TranscriptionRequest, values)
    service = state.named(asked.model)
    if asked.stream and asked.response_format not in ("json", "text"):
        raise invalid(
            f"response_format {asked.response_format} is not streamed; expected json or text",
            "response_format",
        )
    if asked.timestamp_granularities and asked.response_format in ("json", "text"):
        raise invalid(
            "timestamp_granularities needs response_format verbose_json, srt or vtt",
            "timestamp_granularities",
        )
    data = await upload.read()
    decoded = await state.decode(data, state.limits.max_audio_seconds, "file", "file")
    return Transcription(state, service, asked, decoded.wav, decoded.warnings)


def _fields(form: FormData) -> tuple[Mapping[str, Any], UploadFile]:
    """The texts of a form, lists from names with brackets, and its file."""
    values: dict[str, Any] = {}
    upload = None
    for key, value in form.multi_items():
        name = key.partition("[")[0]
        if isinstance(value, UploadFile):
            if name != "file":
                raise invalid(f"{name}: a file; expected it as 'file'", "file")
            upload = value
        elif name in _LISTS:
            values.setdefault(name, []).append(value)
        else:
            values[name] = value
    if upload is None:
        raise invalid("Missing required parameter: 'file'.", "file", "missing_required_parameter")
    return values, upload


def _sentences(words: list[Segment]) -> list[Segment]:
    """Words joined to segments, which end with a sentence or before a pause."""
    groups: list[list[Segment]] = []
    for word in words:
        last = groups[-1][-1] if groups else None
        if last is None or last.text.endswith(_SENTENCE_ENDS) or word.start - last.end > _PAUSE:
            groups.append([])
        groups[-1].append(word)
    return [Segment(g[0].start, g[-1].end, " ".join(word.text for word in g)) for g in groups]
