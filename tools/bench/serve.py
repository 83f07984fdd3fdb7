"""A server under load on loopback: is every answer right, how fast, and does it leak?

    python tools/bench/serve.py [--checkpoint DIR] [--requests 2000] [--clients 32]

Clips of 1 s to --most-seconds, each another, in chat (what the model's positions hold) and in
transcriptions (all), half of them streamed. A tenth of the clients hang up, a tenth send nonsense
or too much. Then the same engine answers the good ones offline, in this process: every answer must
be equal. Prints one JSON object; ends with 1 if anything was wrong.

The first tenth of the requests warms the server up and is not timed. Throughput is tokens of good
answers for each second, without the time of compiling, in both. The server also pays for what was
hung up on, for HTTP, decoding and log-mels, and for the clients, which run on the same machine;
`offline` reads and prepares the same files, `engine` only answers.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import contextlib
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np

from moss_audio_jax.audio import load_audio
from moss_audio_jax.config import DEFAULT_CHECKPOINT

QUESTION = "What is heard?"
DEMO = DEFAULT_CHECKPOINT.parent / "demo"
BODY_MB = 40
SHAPE = {"message", "type", "param", "code"}  # of an error


class Case(NamedTuple):
    """One request.

    Attributes:
      number: names its file.
      seconds: of its clip.
      route: "chat" or "transcriptions".
      kind: "good", "gone" (hangs up) or "bad".
      stream: are events asked for?
    """

    number: int
    seconds: float
    route: str
    kind: str
    stream: bool


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT)
    options.add_argument("--requests", type=int, default=2000)
    options.add_argument("--clients", type=int, default=32)
    options.add_argument("--most-seconds", type=float, default=600.0)
    options.add_argument(
        "--skew", type=float, default=3, help="1: lengths are even by logarithm; more: shorter"
    )
    options.add_argument("--slots", type=int, default=16)
    options.add_argument("--max-new-tokens", type=int, default=256)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.child is not None:
        return child(*args.child)
    with tempfile.TemporaryDirectory() as folder:
        cases = make(args, Path(folder))
        with serving(args, Path(folder)) as (url, process, compiled):
            load = asyncio.run(Load(args, cases, url, process, compiled).run())
            process.send_signal(signal.SIGTERM)
            load["exit_code"] = process.wait(60)
            log = (Path(folder) / "log").read_text().splitlines()
            load["wrong"] += [line for line in log if "error" in line]
        offline = answers_offline(args, cases, Path(folder))
    report = judged(args, cases, load, offline)
    print(json.dumps(report, indent=1))
    return 0 if report["right"] else 1


# --- the work ------------------------------------------------------------------------------------


def make(args: argparse.Namespace, folder: Path) -> list[Case]:
    """Writes a clip for each request, of 1 s to the most; most are short."""
    import soundfile

    rng = np.random.default_rng(args.seed)
    sounds = [load_audio(file) for file in sorted(DEMO.glob("*.flac"))]
    fits = chat_seconds(args)
    cases = []
    for number in range(args.requests):
        seconds = float(args.most_seconds ** (rng.uniform() ** args.skew))
        kind = str(rng.choice(["good", "gone", "bad"], p=[0.8, 0.1, 0.1]))
        route = str(rng.choice(["chat", "transcriptions"])) if seconds < fits else "transcriptions"
        case = Case(number, seconds, route, kind, bool(rng.integers(2)))
        cases.append(case)
        order = rng.integers(len(sounds), size=math.ceil(seconds / 3) + 1)
        wav = np.concatenate([sounds[i] * rng.uniform(0.3, 1) for i in order])
        wav = wav[: round(16_000 * seconds)]
        soundfile.write(folder / f"{number}.flac", wav, 16_000, subtype="PCM_16")
    return cases


def chat_seconds(args: argparse.Namespace) -> float:
    """The longest clip that a question and its answer leave room for in the model's positions."""
    from moss_audio_jax.generate.listen import tokens_for
    from moss_audio_jax.weights.opening import read_config

    positions = read_config(args.checkpoint).decoder.max_positions
    seconds = args.most_seconds
    while seconds > 1 and tokens_for(seconds, args.max_new_tokens) > positions:
        seconds *= 0.9
    return seconds


# --- the server ----------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(args: argparse.Namespace, folder: Path) -> Iterator[tuple[str, subprocess.Popen, Path]]:
    """(url, process, a file that counts compiled programs) of a server."""
    counts = folder / "compiled.json"
    words = [
        *("--checkpoint", str(args.checkpoint), "--port", "0", "--model-name", "bench"),
        *("--slots", str(args.slots), "--max-new-tokens", str(args.max_new_tokens)),
        *("--max-body-mb", str(BODY_MB), "--max-waiting", str(args.clients)),
        *("--max-audio-seconds", str(args.most_seconds + 1), "--drain-seconds", "20"),
    ]
    command = [sys.executable, __file__, "--child", str(counts), *words]
    log = (folder / "log").open("w+")
    with subprocess.Popen(command, stderr=log) as process:
        try:
            while not (found := re.search(r"at (http://\S+)/v1", (folder / "log").read_text())):
                if process.poll() is not None:
                    raise RuntimeError((folder / "log").read_text())
                time.sleep(0.1)
            yield found[1], process, counts
        finally:
            process.kill()
            log.close()


def child(counts: str, *words: str) -> int:
    """The verb, with a count of the programs that it compiles."""
    import jax

    from moss_audio_jax import command
    from moss_audio_jax.serve.__main__ import main as serve

    told = {"programs": 0, "seconds": 0.0}
    file, lock = Path(counts), threading.Lock()

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            with lock:  # several threads compile
                told["programs"] += 1
                told["seconds"] += seconds
                write()

    def write() -> None:
        new = file.with_suffix(".new")
        new.write_text(json.dumps(told))
        os.replace(new, file)

    write()
    jax.monitoring.register_event_duration_secs_listener(listen)
    return command.run(serve, list(words))


def resident(process: subprocess.Popen) -> dict[str, float]:
    """Resident megabytes and open files of a process, without its children."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    files = len(os.listdir(f"/proc/{process.pid}/fd"))
    kilobytes = int(re.search(r"VmRSS:\s+(\d+)", status)[1])
    return {"resident_mb": round(kilobytes / 1024, 1), "files": files}


# --- the clients ---------------------------------------------------------------------------------


class Load:
    """All requests of a run, by clients that each have one open at a time."""

    def __init__(
        self,
        args: argparse.Namespace,
        cases: list[Case],
        url: str,
        process: subprocess.Popen,
        compiled: Path,
    ) -> None:
        self._args, self._cases, self._process = args, cases, process
        self._compiled, self._folder = compiled, compiled.parent
        self._http = httpx.AsyncClient(
            base_url=url, timeout=1800, limits=httpx.Limits(max_connections=args.clients)
        )
        self._rng = np.random.default_rng(args.seed + 1)
        self.texts: dict[int, list[str]] = collections.defaultdict(list)
        self.wrong: list[str] = []
        self._held: collections.deque[dict[str, float]] = collections.deque(maxlen=30)
        self._first: list[float] = []
        self._between: list[float] = []
        self._statuses: collections.Counter[str] = collections.Counter()

    async def _watch(self) -> None:
        while True:
            self._held.append(resident(self._process))
            await asyncio.sleep(1)

    def _lately(self) -> dict[str, float]:
        """The median of the last 30 seconds, in which memory is taken and returned."""
        lately = [each["resident_mb"] for each in self._held]
        return {**self._held[-1], "resident_mb": statistics.median(lately), "most_mb": max(lately)}

    async def run(self) -> dict[str, Any]:
        watching = asyncio.create_task(self._watch())
        held = {"start": resident(self._process)}
        warm = len(self._cases) // 10
        left = collections.deque(self._cases[:warm])

        async def client() -> None:
            while left:
                case = left.popleft()
                if "warm" in held and len(left) == (len(self._cases) - warm) // 2:
                    held["half"] = self._lately()
                try:
                    await self._one(case)
                except (httpx.HTTPError, KeyError, ValueError) as error:
                    self.wrong.append(f"{case}: {type(error).__name__} {error}"[:300])

        async def clients() -> None:
            await asyncio.gather(*(client() for _ in range(self._args.clients)))

        await clients()
        held["warm"], before = self._lately(), json.loads(self._compiled.read_text())
        self._first, self._between = [], []
        left.extend(self._cases[warm:])
        begun = time.perf_counter()
        await clients()
        seconds = time.perf_counter() - begun
        idle = await self._idle()
        watching.cancel()
        held["end"], now = self._lately(), json.loads(self._compiled.read_text())
        if not idle:
            self.wrong.append("places are taken, though nobody asks any more")
        await self._http.aclose()
        return {
            "seconds": seconds,
            "timed": {case.number for case in self._cases[warm:]},
            "compiled": {name: now[name] - before[name] for name in now},
            "compiled_before": before,
            "texts": self.texts,
            "wrong": self.wrong,
            "statuses": dict(self._statuses),
            "first_token_ms": _quantiles(self._first),
            "between_tokens_ms": _quantiles(self._between),
            "held": held,
        }

    async def _idle(self) -> bool:
        """Whether all places are free, soon."""
        for _ in range(100):
            text = (await self._http.get("/metrics")).text
            names = ("active_requests", "running", "waiting")
            lines = [rf"^moss_audio_{name}(?:{{.*}})? (\S+)" for name in names]
            taken = [float(re.search(line, text, re.M)[1]) for line in lines]
            if not any(taken):
                return True
            await asyncio.sleep(0.1)
        return False

    async def _one(self, case: Case) -> None:
        sound = (self._folder / f"{case.number}.flac").read_bytes()
        if case.kind == "bad":
            await self._bad(sound)
            return
        begun = time.perf_counter()
        request = self._asked(case, sound)
        if case.kind == "gone":
            await self._gone(request)
            return
        reply = await self._http.send(request, stream=True)
        try:
            self._statuses[f"good {reply.status_code}"] += 1
            if reply.status_code != 200:
                self.wrong.append(f"{case}: {reply.status_code} {(await reply.aread())[:200]!r}")
            elif case.stream:
                self.texts[case.number].append(await self._events(case, reply, begun))
            else:
                body = json.loads(await reply.aread())
                if case.route == "chat":
                    body["text"] = body["choices"][0]["message"]["content"]
                self.texts[case.number].append(body["text"])
        finally:
            await reply.aclose()

    def _asked(self, case: Case, sound: bytes) -> httpx.Request:
        if case.route == "chat":
            clip = {"data": base64.b64encode(sound).decode(), "format": "flac"}
            parts = [
                {"type": "text", "text": QUESTION},
                {"type": "input_audio", "input_audio": clip},
            ]
            message = {"role": "user", "content": parts}
            body = {"model": "bench", "messages": [message], "stream": case.stream}
            return self._http.build_request("POST", "/v1/chat/completions", json=body)
        form = {"model": "bench", "stream": str(case.stream).lower()}
        file = {"file": ("clip", sound)}
        path = "/v1/audio/transcriptions"
        return self._http.build_request("POST", path, data=form, files=file)

    async def _events(self, case: Case, reply: httpx.Response, begun: float) -> str:
        """The text of a streamed reply; notes when its pieces came."""
        text, before, ended = "", None, False
        async for line in reply.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                ended = True
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise ValueError(event["error"])
            if case.route == "chat":
                piece = event["choices"][0]["delta"].get("content") if event["choices"] else ""
            else:
                piece = event.get("delta")
            if piece:
                now = time.perf_counter()
                if before is None:
                    self._first.append(now - begun)
                elif case.route == "chat":  # windows of a transcript wait for their turn
                    self._between.append(now - before)
                text, before = text + piece, now
        if not ended:
            raise ValueError("the events ended early")
        return text

    async def _gone(self, request: httpx.Request) -> None:
        """Hangs up after a while, in the middle of whatever happens then."""
        with contextlib.suppress(TimeoutError, httpx.HTTPError):
            async with asyncio.timeout(float(self._rng.uniform(0.01, 2))):
                reply = await self._http.send(request, stream=True)
                try:
                    async for _ in reply.aiter_bytes():
                        break
                finally:
                    await reply.aclose()
        self._statuses["gone"] += 1

    async def _bad(self, sound: bytes) -> None:
        """Something that cannot be used, which must be refused in OpenAI's shape."""
        chat, speech = "/v1/chat/completions", "/v1/audio/transcriptions"
        kind = {"Content-Type": "application/json"}
        torn = {"type": "input_audio", "input_audio": {"data": "%%%", "format": "wav"}}
        messages = [{"role": "user", "content": [torn]}]
        form = {"model": "bench"}
        requests = [
            (chat, {"content": b'{"model": "bench", "messages": [', "headers": kind}),
            (chat, {"json": {"model": "bench", "messages": messages}}),
            (chat, {"json": {"model": "other", "messages": messages}}),
            (chat, {"json": {"model": "bench", "messages": messages, "warmth": 1}}),
            (chat, {"content": b" " * (BODY_MB * 1_000_000 + 1), "headers": kind}),
            (speech, {"data": form}),
            (speech, {"data": form, "files": {"file": ("clip", sound[:40])}}),
            (speech, {"data": form, "files": {"file": ("clip", b"no sound" * 1000)}}),
            (speech, {"data": form, "files": {"file": ("clip", bytes(BODY_MB * 1_000_000))}}),
        ]
        path, body = requests[int(self._rng.integers(len(requests)))]
        reply = await self._http.post(path, **body)
        self._statuses[f"bad {reply.status_code}"] += 1
        error = reply.json()["error"]
        if not 400 <= reply.status_code < 500 or set(error) != SHAPE:
            self.wrong.append(f"{path}: {reply.status_code} {reply.text[:200]}")


def _quantiles(seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {}
    values = 1000 * np.quantile(seconds, [0.5, 0.95])
    return {"p50": round(values[0], 1), "p95": round(values[1], 1), "count": len(seconds)}


# --- offline -------------------------------------------------------------------------------------


def answers_offline(args: argparse.Namespace, cases: list[Case], folder: Path) -> dict[str, Any]:
    """What the engine says about the good clips, and how long it takes."""
    import jax

    from moss_audio_jax import MossAudio, Request, Sampling
    from moss_audio_jax.transcribe import each_window, joined

    compiling = 0.0

    def listen(event: str, seconds: float, **_: Any) -> None:
        nonlocal compiling
        if event == "/jax/core/compile/backend_compile_duration":
            compiling += seconds

    jax.monitoring.register_event_duration_secs_listener(listen)
    model = MossAudio.load(args.checkpoint)
    sampling = Sampling(max_new_tokens=args.max_new_tokens)
    texts, spent, reading = {}, 0.0, 0.0
    tokens: collections.Counter[int] = collections.Counter()
    compiling = 0.0
    for group in groups([case for case in cases if case.kind == "good"], 3600.0):
        begun = time.perf_counter()
        prompts, owners = [], []
        for case in group:
            wav = load_audio(folder / f"{case.number}.flac")
            if case.route == "chat":
                found = [(None, model.prepare(Request(QUESTION, [wav], sampling)))]
            else:
                cut = each_window(model, wav, sampling=sampling)
                found = [(window, window.prompt) for window in cut]
            prompts += [prompt for _, prompt in found]
            owners += [(case, window) for window, _ in found]
        read = time.perf_counter()
        replies = model.answer(prompts, batch_size=args.slots)
        spent += time.perf_counter() - read
        reading += read - begun
        windows = collections.defaultdict(list)
        for (case, window), reply in zip(owners, replies, strict=True):
            tokens[case.number] += len(reply.ids)
            if window is None:
                texts[case.number] = reply.text
            else:
                windows[case.number].append((window, reply))
        texts |= {number: joined(answered, "none").text for number, answered in windows.items()}
    return {
        "texts": texts,
        "tokens": tokens,
        "engine_seconds": spent - compiling,
        "seconds": spent + reading - compiling,
    }


def groups(cases: list[Case], most: float) -> Iterator[list[Case]]:
    """The cases in lists of so many seconds of sound, for whose log-mels there is memory."""
    group, seconds = [], 0.0
    for case in cases:
        if group and seconds + case.seconds > most:
            yield group
            group, seconds = [], 0.0
        group.append(case)
        seconds += case.seconds
    if group:
        yield group


def judged(
    args: argparse.Namespace, cases: list[Case], load: dict[str, Any], offline: dict[str, Any]
) -> dict[str, Any]:
    """The report."""
    good = [case for case in cases if case.kind == "good"]
    given = load["texts"]
    wrong = list(load["wrong"])
    for case in good:
        if len(given[case.number]) != 1:
            wrong.append(f"{case}: {len(given[case.number])} answers")
        elif given[case.number][0] != offline["texts"][case.number]:
            wrong.append(f"{case}: another answer than offline")
    if load["exit_code"] != 0:
        wrong.append(f"the server ended with {load['exit_code']}")
    held, tokens = load["held"], offline["tokens"]
    timed = sum(tokens[number] for number in load["timed"])
    serving = timed / (load["seconds"] - load["compiled"]["seconds"])
    engine = tokens.total() / offline["engine_seconds"]
    alone = tokens.total() / offline["seconds"]
    growth = held["end"]["resident_mb"] / held["half"]["resident_mb"] - 1
    return {
        "bench": "serve",
        "requests": len(cases),
        "clients": args.clients,
        "good": len(good),
        "sound_seconds": round(sum(case.seconds for case in good)),
        "right": not wrong,
        "wrong": wrong[:20],
        "statuses": load["statuses"],
        "seconds": round(load["seconds"], 1),
        "compiled_before": load["compiled_before"],
        "compiled_while_serving": load["compiled"],
        "first_token_ms": load["first_token_ms"],
        "between_tokens_ms": load["between_tokens_ms"],
        "tokens_per_second": {
            "served": round(serving, 1),
            "served_with_compiling": round(timed / load["seconds"], 1),
            "offline": round(alone, 1),
            "engine": round(engine, 1),
        },
        "served_of_offline": round(serving / alone, 3),
        "served_of_engine": round(serving / engine, 3),
        "held": held,
        "memory_growth_second_half": round(growth, 4),
    }


if __name__ == "__main__":
    sys.exit(main())
