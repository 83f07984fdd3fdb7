"""Speed of the input pipeline on one core, and how full its rows are.

    OMP_NUM_THREADS=1 python tools/bench/pipeline.py [--rows 200] [--tokenizer DIR]

Prints one JSON line. `audio_hours_per_second`: hours of sound that one process decodes, turns into
log-mels, tokenises, packs and lays out in batches each second, from files of each kind at their own
rate. `fill`: share of the tokens of packed rows that are no padding, for a realistic mixture of
2,000 rows: clips of 1 to 30 s (log-normal, median 8 s), texts of 10 to 300 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import grain
import numpy as np
import soundfile

from moss_audio_jax.audio import lengths
from moss_audio_jax.config import EncoderConfig, ProcessorConfig
from moss_audio_jax.data.batch import TrainExample, size_of
from moss_audio_jax.data.examples import Job
from moss_audio_jax.data.loader_config import LoaderConfig
from moss_audio_jax.data.mixture import Mixture
from moss_audio_jax.data.packed_rows import PackedRows
from moss_audio_jax.data.pipeline import Loader
from moss_audio_jax.text import load_tokenizer
from moss_audio_jax.text.prompt import audio_span

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools.make.toy import write_byte_tokenizer

_CHAT = 25  # tokens of the turns around a text
_ENCODER = EncoderConfig()


def realistic_lengths(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of each row's clip, tokens of its texts."""
    rng = np.random.default_rng(seed)
    seconds = np.clip(np.exp(rng.normal(np.log(8), 0.7, rows)), 1, 30)
    return seconds, rng.integers(10, 301, rows)


def packing_fill(length: int, chunks: int, rows: int = 2000, window: int = 64) -> dict[str, float]:
    """Packs one epoch of lengths, as one stream does; the shares of tokens and of sound in use."""
    seconds, texts = realistic_lengths(rows)

    def submit(jobs):
        made = []
        for job in jobs:
            frames = int(100 * seconds[job.index % rows])
            span = audio_span(lengths.audio_tokens(frames), ProcessorConfig(), range(10))
            ids = np.zeros(len(span) + texts[job.index % rows] + _CHAT, np.int32)
            mels = (np.broadcast_to(np.float16(0), (128, frames)),)
            made.append(
                TrainExample(
                    ids,
                    mels,
                    labels=ids,
                    weights=1.0,
                    tasks=0,
                    row_id="",
                    index=job.index,
                    seconds=0,
                )
            )
        return lambda: made

    def count(made, counts):
        counts["seen"] += len(made)

    config = LoaderConfig(batch=1, length=length, chunks=chunks, window=window)
    workers = SimpleNamespace(submit=submit, make=SimpleNamespace(encoder=_ENCODER))
    jobs = grain.MapDataset.range(rows).repeat().map_with_index(lambda i, _: Job(i, None, "", ""))
    stream = iter(PackedRows(jobs, 0, 1, workers, count, config))
    packed = []
    while stream.counts["seen"] < rows or stream.get_state()["offset"]:
        packed.append(next(stream))
    tokens = sum(len(e.ids) for row in packed for e in row)
    sound = sum(sum(size_of(e.mels, _ENCODER)) for row in packed for e in row)
    return {
        "tokens": round(tokens / length / len(packed), 4),
        "sound": round(sound / (chunks * _ENCODER.chunk_frames / 8) / len(packed), 4),
    }


def speed(kind: str, rate: int, rows: int, tokenizer_dir: str | None) -> dict[str, float]:
    """Hours of sound a second, for files of one kind at `rate` Hz."""
    seconds, texts = realistic_lengths(rows, seed=1)
    rng = np.random.default_rng(2)
    with tempfile.TemporaryDirectory() as folder:
        if tokenizer_dir is None:
            write_byte_tokenizer(folder)
            ids = {"audio_token_id": 300, "audio_start_id": 301, "audio_end_id": 302}
            Path(folder, "processor_config.json").write_text(json.dumps(ids))
        lines = []
        for i, (length, tokens) in enumerate(zip(seconds, texts, strict=True)):
            sound = 0.05 * rng.standard_normal(int(length * rate))
            soundfile.write(Path(folder, f"{i}.{kind}"), sound, rate)
            user = {"role": "user", "message_type": "audio", "content": f"{i}.{kind}"}
            ask = {"role": "user", "message_type": "text", "content": "Transcribe the audio."}
            answer = {"role": "assistant", "message_type": "text", "content": "word " * tokens}
            lines.append(json.dumps({"conversation": [user, ask, answer]}) + "\n")
        rows_file = Path(folder, "rows.jsonl")
        rows_file.write_text("".join(lines))
        tokenizer = load_tokenizer(tokenizer_dir or folder)
        config = LoaderConfig(batch=2, length=8192, chunks=128, streams=1)
        mixture = Mixture(str(rows_file))
        with Loader(mixture, tokenizer, _ENCODER, config) as loader:
            start, audio, examples = time.perf_counter(), 0.0, 0
            while examples < rows:
                batch = next(loader)
                audio += batch.stats["audio_seconds"]
                examples += batch.stats["examples"]
            # What was made ahead is work done too: count every row that was seen.
            taken = time.perf_counter() - start
            audio *= batch.stats["seen"] / examples
    return {
        "audio_hours_per_second": round(audio / 3600 / taken, 3),
        "real_time_factor": round(audio / taken),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--tokenizer", help="folder of a tokenizer (default: bytes)")
    args = parser.parse_args()
    result = {
        "cpus": len(os.sched_getaffinity(0)),
        "OMP_NUM_THREADS": os.getenv("OMP_NUM_THREADS"),
        "fill": {str(n): packing_fill(n, n // 64) for n in (4096, 8192)},
    }
    for kind, rate in (("wav", 16_000), ("flac", 44_100), ("mp3", 44_100)):
        result[f"{kind}_{rate}"] = speed(kind, rate, args.rows, args.tokenizer)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
