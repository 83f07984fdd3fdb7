"""Training rows: one JSON object, alone or in one record together with its audio.

A row is what the official fine-tuning JSONL holds, and a little more:

    {"conversation": [{"role": "user", "message_type": "audio", "content": "clips/a.wav"},
                      {"role": "user", "message_type": "text", "content": "Transcribe the audio."},
                      {"role": "assistant", "message_type": "text", "content": "hello"}],
     "weight": 1.0, "task": "asr", "id": "a"}

A row may go on in several ways, so that many questions share one clip: its "conversation" is then
the opening (the audio), and each branch continues it. What is heard when, for the helper losses of
an encoder (`train.helpers`), may stand beside it:

    {"conversation": [AUDIO],
     "branches": [{"messages": [QUESTION, ANSWER], "task": "asr", "weight": 1.0}, ...],
     "words": [{"text": "hello", "start": 0.31, "end": 0.62}, ...],
     "tags": [{"name": "bell", "start": 1.2, "end": 2.0}, ...], "id": "a"}

A record of an ArrayRecord shard is such a line of JSON, or the row and its clips in one piece:

    b"MAJ1"  uint32 length of the header  header  blob  blob  ...        (little-endian)

The header is the row's JSON with one more key, "clips": a list that says for each audio message, in
order, what its blob is: {"kind": "audio", "bytes": n} a whole audio file of any format, or {"kind":
"mel", "bytes": n, "frames": t, "dtype": "bfloat16"} a log-mel, [t, 128] in C order. Needs nothing
but NumPy, so that other environments can write records.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from moss_audio_jax import files
from moss_audio_jax.errors import InputError
from moss_audio_jax.files import brief

MAGIC = b"MAJ1"
_HEADER = struct.Struct("<4sI")
MEL_DTYPES = ("bfloat16", "float16", "float32")
_NUMBER = (int, float)
# A row's weight, times its branch's, times thousands of tokens is still a float32.
_WEIGHTS = (1e-12, 1e12)
_LATEST = 1e6  # seconds: eleven days
_REASON = 400  # characters
_KEYS = ("conversation", "weight", "task", "id", "branches", "words", "tags", "clips")


class AudioFile(NamedTuple):
    """The bytes of an audio file, and its name."""

    data: bytes
    name: str


# A clip in a row: the path of a file, the file itself, or its log-mel [128, frames].
Clip = str | AudioFile | np.ndarray


class Branch(NamedTuple):
    """One continuation of a row's conversation."""

    messages: Sequence[Mapping[str, Any]]
    task: str | None = None
    weight: float = 1.0


class Span(NamedTuple):
    """A word or a tag, and when it is heard, in seconds."""

    text: str
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class Row:
    """One training row. `clips` stand in the order of the conversation's audio messages.

    `words` and `tags` are None where the row does not say what is heard. `more` has the keys that
    none of these is, such as "answer" and "choices", which rewards read.
    """

    messages: Sequence[Mapping[str, Any]]
    clips: tuple[Clip, ...] = ()
    weight: float = 1.0
    task: str | None = None
    id: str | None = None
    branches: tuple[Branch, ...] = ()
    words: tuple[Span, ...] | None = None
    tags: tuple[Span, ...] | None = None
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def conversations(row: Row) -> list[list[Mapping[str, Any]]]:
    """The whole conversations of a row: one, or one for each branch."""
    if not row.branches:
        return [list(row.messages)]
    return [[*row.messages, *branch.messages] for branch in row.branches]


def answered(row: Row) -> Row:
    """The row of a question with its "answer", if it has one, as the assistant's last message."""
    answer, last = row.more.get("answer"), row.messages[-1]
    if answer is None or (isinstance(last, Mapping) and last.get("role") == "assistant"):
        return row
    said = {"role": "assistant", "message_type": "text", "content": str(answer)}
    return dataclasses.replace(row, messages=[*row.messages, said])


@dataclasses.dataclass(frozen=True)
class Rejected:
    """A row that gives no example: `bad`, or too long for a row of the batch."""

    bad: bool
    source: str
    line: int
    row_id: str
    reason: str
    id: str | None = None


def parse_row(data: bytes) -> Row:
    """A row from a line of JSON or a record.

    Raises:
      InputError: not JSON, no conversation, a weight that is no number within 1e-12 to 1e12, a
        record that is cut short. The messages themselves are judged by `text.build_conversation`.
    """
    if data[:4] == MAGIC:
        raw, blobs = _split_record(data)
    else:
        raw, blobs = parse_json(data), None
    messages = raw.get("conversation")
    if not isinstance(messages, list) or not messages:
        raise InputError(
            'no "conversation"; expected a list of {"role", "message_type", "content"}'
        )
    weight = _weight(raw)
    for key in ("task", "id"):
        _string(raw, key)
    names = audio_names(messages)
    branches = tuple(_branch(i, each) for i, each in enumerate(_objects(raw, "branches")))
    words, tags = _spans(raw, "words", "text"), _spans(raw, "tags", "name")
    if (branches or words or tags) and len(names) != 1:
        raise InputError(
            f'a row with "branches", "words" or "tags" has one audio message; found {len(names)}'
        )
    if blobs is None:
        clips: tuple[Clip, ...] = tuple(names)
    elif len(blobs) != len(names):
        raise InputError(f"the record holds {len(blobs)} clips for {len(names)} audio messages")
    else:
        clips = tuple(
            AudioFile(bytes(blob), name) if isinstance(blob, memoryview) else blob
            for blob, name in zip(blobs, names, strict=True)
        )
    more = {key: value for key, value in raw.items() if key not in _KEYS}
    return Row(messages, clips, weight, raw.get("task"), raw.get("id"), branches, words, tags, more)


def id_of(data: bytes) -> str | None:
    """The "id" of a row, even if the rest of it cannot be used; None if it has none."""
    try:
        raw = _split_record(data)[0] if data[:4] == MAGIC else parse_json(data)
    except Exception:  # whatever is wrong with the row, its reason is told elsewhere
        return None
    return raw["id"] if isinstance(raw.get("id"), str) else None


def _weight(raw: Mapping[str, Any]) -> float:
    weight = raw.get("weight", 1.0)
    low, high = _WEIGHTS
    if type(weight) not in _NUMBER or not low <= weight <= high:
        raise InputError(
            f'"weight" is {_shown(weight)}; expected a number from {low:g} to {high:g}'
        )
    return float(weight)


def _string(raw: Mapping[str, Any], key: str) -> None:
    if not isinstance(raw.get(key), str | None):
        raise InputError(f'"{key}" is {_shown(raw[key])}; expected a string')


def _objects(raw: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    value = raw.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise InputError(f'"{key}" is {_shown(value)}; expected a list of objects')
    return value


def _shown(value: Any) -> str:
    """A value of any type and size, for a message."""
    return brief(repr(value), 60)


def _branch(index: int, raw: Mapping[str, Any]) -> Branch:
    messages = raw.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InputError(f'branches[{index}]: no "messages"; expected what follows the opening')
    if audio_names(messages):
        raise InputError(f"branches[{index}]: holds audio; expected it in the opening")
    _string(raw, "task")
    return Branch(messages, raw.get("task"), _weight(raw))


def _spans(raw: Mapping[str, Any], key: str, name: str) -> tuple[Span, ...] | None:
    if key not in raw:
        return None
    spans = []
    for index, each in enumerate(_objects(raw, key)):
        text, start, end = each.get(name), each.get("start"), each.get("end")
        # By exact types, since True is an int; a row has hundreds of spans, so it must be quick.
        times = type(start) in _NUMBER and type(end) in _NUMBER
        if type(text) is not str or not times or not 0 <= start <= end <= _LATEST:
            raise InputError(
                f'{key}[{index}] is {_shown(each)}; expected "{name}" and 0 <= "start" <= "end" '
                f"<= {_LATEST:g}"
            )
        spans.append(Span(text, float(start), float(end)))
    return tuple(spans)


def audio_names(messages: Sequence[Any]) -> list[str]:
    """The contents of the audio messages, in order. Raises InputError if one is not a path."""
    names = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InputError(f"messages[{index}] is {_shown(message)}; expected an object")
        if message.get("message_type") == "audio":
            content = message.get("content")
            if not isinstance(content, str) or not content:
                raise InputError(
                    f"messages[{index}]: content is {_shown(content)}; expected the path of an "
                    "audio file"
                )
            names.append(content)
    return names


def encode_record(raw: Mapping[str, Any], clips: Sequence[bytes | np.ndarray]) -> bytes:
    """A record of a row and its clips.

    Args:
      raw: the row's JSON object.
      clips: for each audio message the bytes of an audio file, or a log-mel [128, frames] in one of
        MEL_DTYPES.
    """
    described, blobs = [], []
    for clip in clips:
        if isinstance(clip, np.ndarray):
            blob = np.ascontiguousarray(clip.T).tobytes()
            kind = {"kind": "mel", "frames": clip.shape[1], "dtype": clip.dtype.name}
        else:
            blob, kind = clip, {"kind": "audio"}
        described.append({**kind, "bytes": len(blob)})
        blobs.append(blob)
    header = json.dumps({**raw, "clips": described}, ensure_ascii=False)
    header = header.encode("utf-8", "backslashreplace")  # a lone surrogate: JSON's own escape
    return b"".join([_HEADER.pack(MAGIC, len(header)), header, *blobs])


def _split_record(data: bytes) -> tuple[dict[str, Any], list[memoryview | np.ndarray]]:
    """The row's JSON, and for each clip a memoryview (audio file) or a log-mel [128, frames]."""
    size = int.from_bytes(data[4 : _HEADER.size], "little")
    end = _HEADER.size + size
    if len(data) < end:
        raise InputError(
            f"the record is cut short: {len(data)} bytes, its header alone needs {end}"
        )
    raw = parse_json(data[_HEADER.size : end])
    blobs: list[memoryview | np.ndarray] = []
    described = raw.get("clips")
    if not isinstance(described, list):
        raise InputError('the record\'s header has no list "clips"')
    for number, clip in enumerate(described, 1):
        try:
            start, end = end, end + clip["bytes"]
            blob = memoryview(data)[start:end]
            if len(blob) != clip["bytes"]:
                raise InputError(f"the record is cut short: clip {number} ends beyond it")
            if clip["kind"] == "audio":
                blobs.append(blob)
            elif clip["kind"] == "mel" and clip["dtype"] in MEL_DTYPES:
                mel = np.frombuffer(blob, _dtype(clip["dtype"])).reshape(clip["frames"], -1)
                blobs.append(mel.T)
            else:
                raise InputError(
                    f"clip {number} of the record is {_shown(clip)}; expected audio or mel"
                )
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, OverflowError):
            raise InputError(
                f"clip {number} of the record is described as {_shown(clip)}"
            ) from None
    return raw, blobs


def _dtype(name: str) -> np.dtype:
    if name == "bfloat16":
        import ml_dtypes  # here, because writers of audio do without it

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def parse_json(data: bytes) -> dict[str, Any]:
    """A JSON object from UTF-8; InputError says what is wrong with it."""
    raw = files.parse_json(data, "the row")
    if not isinstance(raw, dict):
        raise InputError(f"the row is a {type(raw).__name__}; expected a JSON object")
    return raw


def reason_of(error: Exception) -> str:
    """Why a row is bad, on one line; for an unforeseen error, with its type."""
    if isinstance(error, (InputError, OSError)):
        return brief(error, _REASON)
    return brief(f"{type(error).__name__}: {error}".removesuffix(": "), _REASON)
