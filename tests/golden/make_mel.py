"""Writes mel.npz: log-mels of synthetic waveforms by transformers' WhisperFeatureExtractor.

    python tests/golden/make_mel.py        (needs the extra `oracle`; written with 4.57.1)

Keys: `{name}_wav` float32 [n], `{name}_mel` float32 [128, n // 160]. The short lengths are where
frames reach beyond the clip on both sides and numpy's reflection repeats.
"""

from pathlib import Path

import numpy as np
from transformers import WhisperFeatureExtractor


def waveforms() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    t = np.arange(8000) / 16000
    sounds = {f"noise{n}": 0.1 * rng.standard_normal(n) for n in (160, 200, 201, 400, 4237)}
    sounds["chirp"] = 0.8 * np.sin(2 * np.pi * (50 * t + 7500 * t**2))
    sounds["offset"] = 0.9 + 1e-3 * rng.standard_normal(4000)  # 60 dB below a constant
    sounds["high_tone"] = 0.9 * np.cos(2 * np.pi * 7990 * t[:4000]) + sounds["offset"] - 0.9
    sounds["silence"] = np.zeros(1600)
    return {name: sound.astype(np.float32) for name, sound in sounds.items()}


if __name__ == "__main__":
    extractor = WhisperFeatureExtractor(feature_size=128)
    arrays = {}
    for name, wav in waveforms().items():
        arrays[f"{name}_wav"] = wav
        mel = extractor._np_extract_fbank_features(wav[None], "cpu")[0]
        arrays[f"{name}_mel"] = mel.astype(np.float32)
    path = Path(__file__).with_name("mel.npz")
    np.savez_compressed(path, **arrays)
    print(f"{path}: {path.stat().st_size} bytes")
