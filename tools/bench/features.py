"""Speed of the log-mel features, ours beside others', measured in turns on the same sound.

    python tools/bench/features.py [--seconds 60 600] [--rounds 7]

Prints one JSON line: for each length the median seconds a call and the real-time factor (seconds of
sound a second of work) of ours and, where they are installed, of transformers'
WhisperFeatureExtractor (its NumPy and its torch path) and of librosa; and the number of threads
each may use. Threads are set from outside (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import numpy as np

from moss_audio_jax.audio.features import HOP, MEL_BINS, N_FFT, SAMPLE_RATE, log_mel


def contenders() -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """name -> function of a waveform; those whose package is missing are left out."""
    found = {"ours": log_mel}
    try:
        from transformers import WhisperFeatureExtractor

        # The 30 s padding is left out: these are the transform's own methods.
        whisper = WhisperFeatureExtractor(feature_size=MEL_BINS)
        found["transformers_numpy"] = lambda wav: whisper._np_extract_fbank_features(
            wav[None], "cpu"
        )
        import torch  # noqa: F401

        found["transformers_torch"] = whisper._torch_extract_fbank_features
    except ImportError:
        pass
    try:
        import librosa

        def librosa_log_mel(wav: np.ndarray) -> np.ndarray:
            mel = librosa.feature.melspectrogram(
                y=wav,
                sr=SAMPLE_RATE,
                n_fft=N_FFT,
                hop_length=HOP,
                n_mels=MEL_BINS,
                pad_mode="reflect",
            )
            log = np.log10(np.maximum(mel[:, :-1], 1e-10))
            return (np.maximum(log, log.max() - 8) + 4) / 4

        found["librosa"] = librosa_log_mel
    except ImportError:
        pass
    return found


def threads() -> dict[str, int | str | None]:
    """How many threads the libraries underneath may use."""
    told = {"cpus": len(os.sched_getaffinity(0)), "OMP_NUM_THREADS": os.getenv("OMP_NUM_THREADS")}
    try:
        import torch

        told["torch"] = torch.get_num_threads()
    except ImportError:
        pass
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=int, nargs="+", default=[60, 600])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()

    functions = contenders()
    result = {"threads": threads(), "rounds": args.rounds}
    for seconds in args.seconds:
        rng = np.random.default_rng(0)
        wav = (0.1 * rng.standard_normal(seconds * SAMPLE_RATE)).astype(np.float32)
        times = {name: [] for name in functions}
        for function in functions.values():
            function(wav)  # compile, warm up
        for _ in range(args.rounds):
            for name, function in functions.items():
                start = time.perf_counter()
                function(wav)
                times[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(values) for name, values in times.items()}
        result[f"{seconds}_s"] = {
            name: {"seconds": round(median, 4), "real_time_factor": round(seconds / median)}
            for name, median in medians.items()
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
