"""Two servers side by side: ours, and a plain one around the official PyTorch code.

    OMP_NUM_THREADS=1 taskset -c 0 python tools/bench/serve_official.py --official DIR

The plain server is what people write first: HTTP around the official model, one question at a time.
Both serve the model of tools/bench/train.py (50 million parameters, float32, random weights), whose
encoder computes `full` attention, and take the same bytes: a WAV of noise of 4 to 8 s, in base64,
and a question. 16 clients ask one question each, all at once, in turn of one server and the other.
Every clip is new to both. Seconds are the processor time of the server's process; --clock wall
takes the wall clock, and needs an idle machine.

Prints one JSON object: tokens a second, median over the rounds, and `ratio` of ours to theirs.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.server
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools.bench.train import PROMPT, write_inputs

ADDRESS = re.compile(r"at (http://[\d.:]+)")


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("--official", required=True, metavar="DIR", help="a clone")
    options.add_argument("--clients", type=int, default=16)
    options.add_argument("--tokens", type=int, default=32, help="of an answer")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--clock", choices=("processor", "wall"), default="processor")
    options.add_argument("--plain", metavar="CHECKPOINT", help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.plain:
        return plain(Path(args.official), Path(args.plain), args.tokens)
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), 4)
        checkpoint = str(Path(folder) / "checkpoint")
        ours = [
            *("-m", "moss_audio_jax.serve", "--checkpoint", checkpoint, "--port", "0"),
            *("--dtype", "float32", "--encoder-attention", "full", "--model-name", "bench"),
            *("--slots", str(args.clients), "--cache-tokens", "8192"),
        ]
        theirs = [__file__, "--official", args.official, "--plain", checkpoint]
        theirs += ["--tokens", str(args.tokens)]
        with serving(ours) as our, serving(theirs) as their:
            speeds = measured(args, {"ours": our, "official": their})
    ratio = statistics.median(a / b for a, b in zip(*speeds.values(), strict=True))
    report = {name: round(statistics.median(found), 1) for name, found in speeds.items()}
    print(json.dumps({"bench": "serve_official", "clients": args.clients, "clock": args.clock,
                      "tokens_per_second": report, "ratio": round(ratio, 2)}))  # fmt: skip
    return 0


def measured(
    args: argparse.Namespace, servers: dict[str, tuple[str, Callable[[], float]]]
) -> dict[str, list[float]]:
    """Tokens a second of each server, round by round; the first round is not counted."""
    speeds: dict[str, list[float]] = {name: [] for name in servers}
    rng = np.random.default_rng(0)
    with ThreadPoolExecutor(args.clients) as pool:
        for number in range(1 + args.rounds):
            bodies = [question(rng, args.tokens) for _ in range(args.clients)]
            for name, (url, spent) in servers.items():
                clock = spent if args.clock == "processor" else time.perf_counter
                begun = clock()
                tokens = sum(pool.map(lambda body, url=url: ask(url, body), bodies))
                if number:
                    speeds[name].append(tokens / (clock() - begun))
    return speeds


def question(rng: np.random.Generator, tokens: int) -> bytes:
    wav, file = rng.normal(size=rng.integers(64_000, 128_000)) / 10, io.BytesIO()
    soundfile.write(file, wav.clip(-1, 1), 16_000, format="WAV")
    sound = {"data": base64.b64encode(file.getvalue()).decode(), "format": "wav"}
    content = [{"type": "input_audio", "input_audio": sound}, {"type": "text", "text": PROMPT}]
    body = {"model": "bench", "messages": [{"role": "user", "content": content}]}
    return json.dumps(body | {"max_tokens": tokens}).encode()


def ask(url: str, body: bytes) -> int:
    """The tokens of the answer."""
    kind = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/chat/completions", body, kind)
    with urllib.request.urlopen(request, timeout=600) as reply:
        return json.load(reply)["usage"]["completion_tokens"]


@contextlib.contextmanager
def serving(words: list[str]) -> Iterator[tuple[str, Callable[[], float]]]:
    """(url, its seconds of processor time so far) of a server."""
    with subprocess.Popen([sys.executable, *words], stderr=subprocess.PIPE, text=True) as process:
        try:
            lines = []
            for line in process.stderr:
                lines.append(line)
                if found := ADDRESS.search(line):
                    break
            else:
                raise RuntimeError("".join(lines))
            threading.Thread(target=lambda: [*process.stderr], daemon=True).start()
            yield found[1], lambda: seconds_of(process.pid)
        finally:
            process.kill()


def seconds_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def plain(official: Path, checkpoint: Path, tokens: int) -> int:
    """The official model behind HTTP; its log-mels are ours, which equal its own."""
    from moss_audio_jax import MossAudio, load_audio, log_mel
    from moss_audio_jax.data.batch import Example
    from moss_audio_jax.text import build_prompt
    from tools.bench.generate import Official

    words = MossAudio.load(checkpoint, "float32")
    model = Official(official, checkpoint, words.processor.audio_token_id)
    one_at_a_time = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            sound, text = body["messages"][0]["content"]
            wav = load_audio(io.BytesIO(base64.b64decode(sound["input_audio"]["data"])))
            mel = log_mel(wav)
            markers = words.processor.time_markers
            ids = build_prompt(words.tokenizer, text["text"], [mel.shape[1]], markers)
            with one_at_a_time:
                said = model.answer(Example(ids, (mel,)), tokens)
            content = words.tokenizer.decode(said)
            reply = {"choices": [{"message": {"content": content}}]}
            data = json.dumps(reply | {"usage": {"completion_tokens": len(said)}}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 128  # all clients come at once

    server = Server(("127.0.0.1", 0), Handler)
    print(f"at http://127.0.0.1:{server.server_port}", file=sys.stderr, flush=True)
    server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
