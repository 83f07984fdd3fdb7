"""Rows and clips for the tests of data/."""

import json
import os
import signal
import time

import numpy as np
import soundfile

from moss_audio_jax.config import EncoderConfig

ENCODER = EncoderConfig(chunk_frames=80)  # 0.8 s a chunk: several in a short clip


def text(role, content):
    return {"role": role, "message_type": "text", "content": content}


def audio(path):
    return {"role": "user", "message_type": "audio", "content": str(path)}


def asr(path, answer, **more):
    question = text("user", "Transcribe the audio.")
    return {"conversation": [audio(path), question, text("assistant", answer)], **more}


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def write_clip(path, seconds, seed=0):
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = (0.1 * rng.standard_normal(int(seconds * 16000))).astype(np.float32)
    soundfile.write(path, samples, 16000, subtype="FLOAT")
    return samples


def fragile(job):
    """Replaces a worker's maker, and can fail in several ways."""
    if job.part == "hangs":
        time.sleep(3600)
    if job.part == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    if job.part == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    return job.index
