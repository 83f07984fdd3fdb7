"""Plug-ins ("experts") that replace the default of one step.

Every kind takes requests and gives replies, both JSON objects; times count from the start of the
segment's own file, "clip":

    {"id": 0, "step": "events", "clip": "/out/audio/a/0003.flac", "audio": "/in/a.mp3",
     "start": 12.3, "end": 15.1, "duration": 2.8, "evidence": {...}}

    step         reply
    transcribe   {"text": "...", "language": "en"}                      language may be left out
    align        {"words": [{"text", "start", "end"}]}                  of evidence.text
    diarise      {"turns": [{"speaker", "start", "end"}]}               speaker: any short name
    events       {"events": [{"label", "start", "end", "score"}]}       score may be left out
    music        {"instruments": ["piano"], "lyrics": "...", "tempo": 92, "key": "C major"}, any
    caption      {"text": "..."}      sound caption; a time is written as its slot, [1], [2], ...
    unify        {"text": "..."}      the unified caption, likewise
    judge        {"score": 1 to 5}    of evidence.caption, against evidence.events

A reply is checked before it is used; `ask` returns what was wrong with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ml_collections import ConfigDict

from moss_audio_jax.annotate.replies import Reply, Request, checked
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.evaluate.judge import read_scores
from moss_audio_jax.files import brief, parse_json, read_bytes, reason, shown
from moss_audio_jax.remote import Chat, redact, secrets_of, variable
from moss_audio_jax.text.prompt import split_thinking

STEPS = ("transcribe", "align", "diarise", "events", "music", "caption", "unify", "judge")
GROUP = "moss_audio_jax.annotate"  # the group of entry points
_REPLY_BYTES = 1 << 18  # the most bytes of one reply


class Expert(Protocol):
    """Answers requests in order. For a request that it cannot answer, the list holds an InputError.

    It may have `secrets`: texts that are hidden in all messages about it.
    """

    def answer(self, requests: Sequence[Request]) -> list[Reply | InputError]: ...


# --- kinds ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class Function:
    """A Python function Request -> Reply, called for each request."""

    call: Callable[[Request], Reply]

    def answer(self, requests: Sequence[Request]) -> list[Reply | InputError]:
        replies: list[Reply | InputError] = []
        for request in requests:
            try:
                replies.append(self.call(request))
            except (Exception, SystemExit) as error:  # a user's function may raise anything
                replies.append(InputError(f"{type(error).__name__}: {brief(error)}"))
        return replies


@dataclasses.dataclass
class Command:
    """A program that reads one request on each line of stdin and writes one reply on each line, in
    any order."""

    argv: tuple[str, ...]
    timeout: float

    @property
    def secrets(self) -> tuple[str, ...]:
        return secrets_of(self.argv)

    def answer(self, requests: Sequence[Request]) -> list[Reply | InputError]:
        try:
            said, problem = self._run(requests)
        except (OSError, ValueError) as error:  # ValueError: a zero byte in a word
            return [InputError(f"{shown(self.argv[0])}: {reason(error)}")] * len(requests)
        found: dict[int, Reply] = {}
        for line in said.splitlines():
            with contextlib.suppress(InputError):
                reply = parse_json(line, "a line")
                number = reply.get("id") if isinstance(reply, dict) else None
                if isinstance(number, int) and not isinstance(number, bool):
                    found[number] = reply
        why = problem or "no line of JSON with this request's id"
        return [found.get(request["id"], InputError(why)) for request in requests]

    def _run(self, requests: Sequence[Request]) -> tuple[bytes, str]:
        """(output, what went wrong). Kills a command that takes or writes too much."""
        limit, until = _REPLY_BYTES * (1 + len(requests)), time.monotonic() + self.timeout
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as complaints:
            for request in requests:
                line = json.dumps(request, ensure_ascii=False)
                # A byte of a file name that is not UTF-8 is written as JSON's escape: \udce9.
                given.write(line.encode("utf-8", "backslashreplace") + b"\n")
            given.seek(0)
            process = subprocess.Popen(
                self.argv,
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=complaints,
                start_new_session=True,
            )
            said, problem = bytearray(), ""
            _running.add(process.pid)
            try:
                while not problem:
                    ready, _, _ = select.select([process.stdout], [], [], 0.2)
                    if ready:
                        block = os.read(process.stdout.fileno(), 1 << 16)
                        if not block:
                            break
                        said += block
                    if len(said) > limit:
                        problem = f"wrote more than {limit} bytes"
                    elif time.monotonic() > until:
                        problem = f"took longer than {self.timeout:g} s"
                if not problem and process.wait(max(until - time.monotonic(), 1)):
                    complaints.seek(0)
                    words = complaints.read(2000).decode(errors="replace").split("\n")
                    last = next((w for w in reversed(words) if w.strip()), "")
                    problem = f"exit code {process.returncode} {brief(last)}".strip()
            except subprocess.TimeoutExpired:
                problem = f"took longer than {self.timeout:g} s"
            finally:
                _end(process.pid)
                process.wait()
                _running.discard(process.pid)
                process.stdout.close()
        return bytes(said), problem


_running: set[int] = set()  # process groups of commands


def _end(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def end_commands() -> None:
    """Ends all running commands and their children, for a process that is about to end."""
    for group in [*_running]:
        _end(group)


@dataclasses.dataclass
class Endpoint:
    """A language model behind an OpenAI-compatible endpoint: captions, and judging them."""

    chat: Chat

    @property
    def secrets(self) -> tuple[str, ...]:
        return self.chat.secrets

    def answer(self, requests: Sequence[Request]) -> list[Reply | InputError]:
        replies: list[Reply | InputError] = []
        for request in requests:
            try:
                said = self.chat.ask(_prompt(request))
                if request["step"] == "judge":
                    replies.append({"score": read_scores(said, ("score",))["score"]})
                else:
                    replies.append({"text": split_thinking(said)[1].strip()})
            except InputError as error:
                replies.append(error)
        return replies


class Replay:
    """Stored replies: JSONL rows with "audio" (path or file name), "start", "end"."""

    def __init__(self, path: str | Path):
        self._rows: dict[tuple[str, float, float], Reply] = {}
        for number, line in enumerate(read_bytes(path, "a JSONL of replies").splitlines(), 1):
            if not line.strip():
                continue
            where = f"{shown(path)}, line {number}"
            row = parse_json(line, where)
            try:
                key = (os.path.basename(row["audio"]), *(round(float(row[k]), 2) for k in _SPAN))
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise InputError(
                    f'{where}: {brief(error)}; expected "audio", "start", "end"'
                ) from None
            self._rows[key] = row

    def answer(self, requests: Sequence[Request]) -> list[Reply | InputError]:
        missing = InputError("the file holds no row for this audio, start and end")
        return [
            self._rows.get(
                (os.path.basename(r["audio"]), *(round(r[k], 2) for k in _SPAN)), missing
            )
            for r in requests
        ]


_SPAN = ("start", "end")


def make(name: str, spec: Mapping[str, Any]) -> Expert:
    """The expert that a config describes.

    Args:
      spec: "kind" entry_point, command, endpoint or replay; "target": a name of the entry-point
        group or "package.module:function", the words of a command, a URL, a path. Optional:
        "timeout" in seconds; for an endpoint "model" and "key_from" (an environment variable).

    Raises:
      UsageError: a kind or key that does not exist.
      InputError: what the target names cannot be read or imported.
    """
    if not isinstance(spec, Mapping | ConfigDict):
        raise UsageError(f"expert {name!r}: expected {{'kind': ..., 'target': ...}}")
    spec = dict(spec)
    kind, target = spec.pop("kind", None), spec.pop("target", None)
    timeout, model = spec.pop("timeout", 120.0), spec.pop("model", "")
    key_from = spec.pop("key_from", "")
    if spec or not target:
        raise UsageError(
            f"expert {name!r}: unknown key {next(iter(spec))!r}"
            if spec
            else f"expert {name!r}: no target"
        )
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0:
        raise UsageError(f"expert {name!r}: timeout is {timeout!r}; expected seconds above 0")
    if kind == "entry_point":
        return Function(_imported(name, str(target)))
    if kind == "command":
        words = (target,) if isinstance(target, str) else tuple(map(str, target))
        return Command(words, float(timeout))
    if kind == "endpoint":
        key = os.environ.get(variable(key_from)) if key_from else None
        return Endpoint(Chat(str(target), model, key, float(timeout), attempts=3))
    if kind == "replay":
        return Replay(str(target))
    raise UsageError(
        f"expert {name!r}: kind is {kind!r}; expected entry_point, command, endpoint or replay"
    )


def _imported(name: str, target: str) -> Callable[[Request], Reply]:
    try:
        if ":" in target:
            module, _, attribute = target.partition(":")
            found = getattr(importlib.import_module(module), attribute)
        else:
            (point,) = importlib.metadata.entry_points(group=GROUP, name=target)
            found = point.load()
    except Exception as error:  # importing runs a user's code
        raise InputError(
            f"expert {name!r}: {target!r} cannot be imported ({type(error).__name__}: "
            f"{brief(redact(str(error)))}); expected package.module:function or a name of the "
            f"entry-point group {GROUP}"
        ) from None
    if not callable(found):
        raise InputError(f"expert {name!r}: {target!r} is not a function")
    return found


_ASKED = {
    "caption": "Write one English caption of the sound events below, in the order given.",
    "unify": "Write one English caption of this recording from the evidence below, what matters "
    "most first. Quote what is said exactly, in double quotes.",
}


def _prompt(request: Request) -> str:
    evidence = json.dumps(request["evidence"], ensure_ascii=False, indent=1)
    if request["step"] == "judge":
        return (
            f"How well does the caption fit the events that were measured?\n{evidence}\nAnswer with"
            ' one JSON object {"score": n}, n an integer from 1 (wrong) to 5 (fully right).'
        )
    if request["step"] not in _ASKED:
        raise InputError("an endpoint is for captions and judging; sound cannot be sent to it")
    return (
        f"{_ASKED[request['step']]} Mention nothing else. Write no numbers: where a time belongs, "
        f"put its slot, like [1].\n{evidence}\nAnswer with the caption alone."
    )


# --- asking --------------------------------------------------------------------------------------


def ask(
    expert: Expert, step: str, requests: Sequence[Request]
) -> list[tuple[Reply | None, str | None]]:
    """(checked reply, None) or (None, what was wrong) for each request.

    Errors of the expert are never raised.
    """
    if not requests:
        return []
    asked = [{"id": i, "step": step, **request} for i, request in enumerate(requests)]

    def hidden(error: object) -> str:
        return redact(brief(error), getattr(expert, "secrets", ()))

    try:
        replies = expert.answer(asked)
    except InputError as error:
        replies = [error] * len(asked)
    found: list[tuple[Reply | None, str | None]] = []
    for request, reply in zip(asked, replies, strict=True):
        if isinstance(reply, InputError):
            found.append((None, hidden(reply)))
            continue
        try:
            found.append((checked(step, reply, request), None))
        except InputError as error:
            found.append((None, hidden(error)))
        except Exception as error:  # raised by a user's classes in a reply
            found.append((None, hidden(f"the reply cannot be read ({type(error).__name__})")))
    return found
