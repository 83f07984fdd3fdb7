"""load_audio: every format these libraries can write here, and every way a file can be bad."""

import io
import math
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import soxr

from moss_audio_jax.audio import load_audio, log_mel
from moss_audio_jax.audio.io import resample
from moss_audio_jax.errors import InputError

SHARED = Path(__file__).parents[3] / "shared"
CLIP = Path(__file__).parents[2] / "moss_audio_jax" / "assets" / "bell_knocks_chirp.flac"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
CLICK = 0.6  # seconds


def sound(rate: int, seconds: float = 1.5) -> np.ndarray:
    """A rising chirp under 3 kHz with a burst at CLICK: float64 [n], peak below 0.65."""
    t = np.arange(round(rate * seconds)) / rate
    chirp = 0.2 * np.sin(2 * np.pi * (200 * t + 900 * t**2))
    burst = 0.45 * np.exp(-(((t - CLICK) / 0.002) ** 2)) * np.cos(2 * np.pi * 1000 * (t - CLICK))
    return chirp + burst


def write_av(path, wav, rate, codec, sample_format, container=None, options=None):
    """Encodes float [n] with PyAV into the container that the suffix names."""
    with av.open(str(path), "w", format=container, options=options or {}) as out:
        stream = out.add_stream(codec, rate=rate, layout="mono")
        data = wav.astype(np.float32) if "flt" in sample_format else np.round(wav * 32767)
        data = data.astype(np.float32 if "flt" in sample_format else np.int16)
        size = stream.codec_context.frame_size or 1024
        for start in range(0, len(data), size):
            frame = av.AudioFrame.from_ndarray(
                data[None, start : start + size], sample_format, "mono"
            )
            frame.sample_rate, frame.pts = rate, start
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def delay(wav: np.ndarray, reference: np.ndarray) -> int:
    """The delay of wav in samples: the peak of the cross-correlation."""
    size = 2 * max(len(wav), len(reference))
    spectrum = np.fft.rfft(wav, size) * np.conj(np.fft.rfft(reference, size))
    lag = int(np.argmax(np.fft.irfft(spectrum, size)))
    return lag if lag < size // 2 else lag - size


LIBSNDFILE = [  # largest error allowed; None: lossy
    ("wav", "PCM_U8", 16000, 1e-2),
    ("wav", "PCM_16", 8000, 1e-4),
    ("wav", "PCM_24", 11025, 1e-6),
    ("wav", "PCM_32", 22050, 1e-6),
    ("wav", "FLOAT", 96000, 1e-6),
    ("wav", "DOUBLE", 44100, 1e-6),
    ("flac", "PCM_16", 44100, 1e-4),
    ("flac", "PCM_24", 32000, 1e-6),
    ("ogg", "VORBIS", 44100, None),
    ("opus", "OPUS", 48000, None),
    ("mp3", "MPEG_LAYER_III", 44100, None),
    ("mp3", "MPEG_LAYER_III", 22050, None),  # MPEG 2: frames of another size
]


@pytest.mark.parametrize(("suffix", "subtype", "rate", "tolerance"), LIBSNDFILE)
@pytest.mark.parametrize("channels", [1, 2, 8])
def test_formats_of_libsndfile(tmp_path, suffix, subtype, rate, tolerance, channels):
    if channels == 8 and suffix == "mp3":
        channels = 2  # all that mp3 holds
    original = sound(rate)
    # Channels differ and their average is the sound; a single channel would be wrong by half.
    weights = np.linspace(0.5, 1.5, channels) if channels > 1 else np.ones(1)
    path = tmp_path / f"sound.{suffix}"
    container = {"opus": "OGG"}.get(suffix, suffix.upper())
    soundfile.write(path, original[:, None] * weights, rate, format=container, subtype=subtype)
    wav = load_audio(path)
    expected = soxr.resample(original.astype(np.float32), rate, 16000, quality="HQ")
    assert wav.dtype == np.float32
    assert len(wav) == math.ceil(len(original) * 16000 / rate)
    assert delay(wav, expected) == 0
    error = np.abs(wav[: len(expected)] - expected[: len(wav)])
    if tolerance is None:
        assert error.mean() < 0.03  # half a channel's difference would be 0.06
    else:
        assert error.max() < tolerance


@pytest.mark.parametrize(
    ("name", "codec", "sample_format", "rate", "codec_delay"),
    [
        ("sound.m4a", "aac", "fltp", 44100, 0),
        ("sound.mp4", "aac", "fltp", 16000, 0),
        ("sound.m4a", "alac", "s16p", 44100, 0),
        ("sound.webm", "libopus", "flt", 48000, 0),
        ("sound.mov", "pcm_s16le", "s16", 22050, 0),
        ("sound.aac", "aac", "fltp", 32000, 1024),  # a bare stream cannot tell its delay
    ],
)
def test_formats_of_pyav(tmp_path, name, codec, sample_format, rate, codec_delay):
    path = tmp_path / name
    original = sound(rate)
    container = "adts" if name.endswith("aac") else None
    write_av(path, original, rate, codec, sample_format, container)
    wav = load_audio(path)
    expected = resample(original, rate)
    lag = delay(wav, expected)
    assert lag == round(codec_delay * 16000 / rate)
    # The last block may be padded by the encoder, never cut.
    assert -1 <= len(wav) - lag - len(expected) < 2048 * 16000 / rate
    common = slice(0, min(len(wav) - lag, len(expected)))
    error = np.abs(wav[lag:][common] - expected[common])
    assert error.max() < 1e-4 if codec in ("alac", "pcm_s16le") else error.mean() < 0.02


def test_file_objects_and_paths_agree(tmp_path):
    path = tmp_path / "sound.m4a"
    write_av(path, sound(16000), 16000, "aac", "fltp")
    for file in (path, CLIP):
        expected = load_audio(str(file))
        handle = io.BytesIO(file.read_bytes())
        handle.read(10)  # read from its start whatever its position, and left open
        np.testing.assert_array_equal(load_audio(handle), expected)
        assert not handle.closed
        with file.open("rb") as handle:
            np.testing.assert_array_equal(load_audio(handle), expected)


@pytest.mark.parametrize("rate", [8000, 11025, 24000, 44100, 96000])
def test_streamed_resampling_is_one_shot_resampling(tmp_path, rate):
    # Longer than two blocks, and a length at which soxr stops one sample short.
    n = 600_001
    wav = (0.3 * np.random.default_rng(0).standard_normal(n)).astype(np.float32)
    path = tmp_path / "noise.wav"
    soundfile.write(path, wav, rate, subtype="FLOAT")
    loaded = load_audio(path)
    assert len(loaded) == math.ceil(n * 16000 / rate)
    np.testing.assert_array_equal(loaded, resample(wav, rate))
    one_shot = soxr.resample(wav, rate, 16000, quality="HQ")
    np.testing.assert_allclose(loaded[: len(one_shot)], one_shot, rtol=0, atol=1e-6)


def test_full_scale_and_beyond(tmp_path):
    path = tmp_path / "x.wav"
    extremes = np.array([-32768, 32767, 0, 16384] * 100, np.int16)
    soundfile.write(path, extremes, 16000)
    np.testing.assert_array_equal(load_audio(path), extremes / np.float32(32768))
    loud = np.array([-3.5, 2.5, 0, 1] * 100, np.float32)
    soundfile.write(path, loud, 16000, subtype="FLOAT")
    np.testing.assert_array_equal(load_audio(path), loud)


def test_bundled_clip():
    wav = load_audio(CLIP)
    assert wav.shape == (96_000,)
    assert CLIP.stat().st_size < 120_000
    energy = np.square(wav).reshape(60, 1600).mean(axis=1)  # per 0.1 s
    loud = np.flatnonzero(energy > 1e-3) / 10
    assert {0.5, 2.7, 3.0, 3.3} <= set(loud)  # bell and knocks start where the docstring says
    assert not ((loud > 5.5) | (loud < 0.5)).any()
    pitch = log_mel(wav)[:, 420:530].argmax(axis=0)
    assert (np.diff(pitch) >= -1).all()
    assert pitch[-1] > pitch[0] + 30


@needs_shared
def test_shared_files():
    golden = np.load(SHARED / "golden" / "processor.npz")
    for i in (0, 3):
        wav = load_audio(SHARED / "audio" / str(golden[f"a{i}_file"]))
        assert len(wav) == golden[f"a{i}_samples"]
    mel = log_mel(load_audio(SHARED / "audio" / str(golden["a0_file"])))
    np.testing.assert_allclose(mel, golden["a0_mel"].astype(np.float32), rtol=0, atol=6e-4)
    for path in sorted((SHARED / "audio").iterdir()):
        assert len(load_audio(path)) > 16_000


@needs_shared
@pytest.mark.oracle
def test_shared_files_as_librosa_loads_them():
    librosa = pytest.importorskip("librosa")
    for path in sorted((SHARED / "audio").glob("*.mp3")):
        expected, _ = librosa.load(path, sr=16000)
        wav = load_audio(path)
        # Two decoders (FFmpeg's, mpg123) round differently: 1.7e-6, a tenth of half a 16-bit step.
        np.testing.assert_allclose(wav, expected, rtol=0, atol=2e-6)
        # In the quietest bins, 8 decades down, that is 1.06e-4 of one value in 155,904.
        np.testing.assert_allclose(log_mel(wav), log_mel(expected), rtol=0, atol=2e-4)


# --- bad input -----------------------------------------------------------------------------------


def refusal(source) -> str:
    """The message with which load_audio refuses a file; one line."""
    with pytest.raises(InputError) as caught:
        load_audio(source)
    message = str(caught.value)
    assert "\n" not in message
    if isinstance(source, Path):
        assert message.startswith(f"{source}: ")
    return message


def encoded(suffix: str, seconds: float = 5.0, rate: int = 44100, **options) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, sound(rate, seconds), rate, format=suffix, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.wav", b"", "empty"),
        ("text.wav", b"Dear diary,\n" * 100, "not audio"),
        ("zeros.mp3", bytes(5000), "not audio"),
        ("utf16.mp3", "Dear diary".encode("utf-16") * 100, "not audio"),
        ("list.m3u8", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n", "not audio"),
        ("subtitles.wav", b"1\n00:00:00,000 --> 00:00:01,000\nhi\n\n", "not audio"),
        ("headerless.raw", bytes(5000), "raw"),
    ],
)
def test_not_audio(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    assert words in refusal(path)


def test_nothing_there(tmp_path):
    assert "no such file" in refusal(tmp_path / "missing.wav")
    assert "directory" in refusal(tmp_path)
    assert "empty" in refusal(io.BytesIO())
    assert "text" in refusal(io.StringIO("x"))
    assert "bytes" in refusal(b"RIFF")


@pytest.mark.parametrize(
    ("samples", "rate", "words"),
    [
        (np.zeros(0), 16000, "no samples"),
        (np.zeros(159), 16000, "9.9 ms"),
        (np.zeros(79), 8000, "9.9 ms"),
        (np.append(np.zeros(16000), [np.nan, 0]), 16000, "NaN or infinite, the first at 1.000 s"),
        (np.append(np.zeros(16000), [-np.inf, 0]), 16000, "NaN or infinite"),
        (np.zeros(1600), 500, "500 Hz"),
    ],
)
def test_unusable_samples(tmp_path, samples, rate, words):
    path = tmp_path / "x.wav"
    soundfile.write(path, samples, rate, subtype="FLOAT")
    assert words in refusal(path)


def test_shortest_clip(tmp_path):
    path = tmp_path / "x.wav"
    soundfile.write(path, np.zeros(441), 44100)
    assert load_audio(path).shape == (160,)


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_cut_short(tmp_path, suffix, share):
    data = encoded(suffix)
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(data)
    load_audio(path)
    path.write_bytes(data[: int(len(data) * share)])
    message = refusal(path)
    assert "cut short" in message
    if suffix != "ogg":
        assert "of the 5.0" in message
        held = float(message.split(" s ")[0].split()[-1])
        assert held == pytest.approx(5 * share, abs=0.6)


def test_every_cut_of_an_mp3_is_noticed(tmp_path):
    # With the header's frame count, and without it: then only cuts inside a frame can be seen.
    data = encoded("mp3", 1.0)
    path = tmp_path / "x.mp3"
    for cut in (1, 3, 50, 2000):
        path.write_bytes(data[:-cut])
        assert "cut short" in refusal(path)
    at = data.index(b"Xing") if b"Xing" in data else data.index(b"Info")
    bare = data[:at] + b"\0\0\0\0" + data[at + 4 :]
    path.write_bytes(bare)
    load_audio(path)
    for cut in (1, 3, 50):
        path.write_bytes(bare[:-cut])
        assert "middle of an MPEG frame" in refusal(path)


def test_joined_mp3_files_do_not_lose_the_second(tmp_path):
    path = tmp_path / "x.mp3"
    data = encoded("mp3", 1.0)
    path.write_bytes(data + data)
    assert "joined" in refusal(path)


def id3v2(size: int) -> bytes:
    """An ID3v2 tag whose body looks like MPEG frames."""
    length = bytes(size >> shift & 0x7F for shift in (21, 14, 7, 0))
    return b"ID3\x04\0\0" + length + (b"\xff\xfb\x90\x00" * size)[:size]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (id3v2(3000), b""),
        (b"", b"TAG" + b"song".ljust(125, b"\0")),
        (b"", b"APETAGEX" + bytes(24) + b"Artist\0somebody" + b"APETAGEX" + bytes(24)),
        (id3v2(100), b"APETAGEX" + bytes(500) + b"TAG" + bytes(125)),
        (b"", bytes(3000)),
    ],
)
def test_tags_are_no_damage(tmp_path, before, after):
    path = tmp_path / "x.mp3"
    data = encoded("mp3", 1.0)
    path.write_bytes(data)
    plain = load_audio(path)
    path.write_bytes(before + data + after)
    np.testing.assert_array_equal(load_audio(path), plain)


def test_wav_written_into_a_pipe(tmp_path):
    # Writers that cannot seek back leave a placeholder for the size.
    data = bytearray(encoded("wav", 1.0, 16000, subtype="PCM_16"))
    at = data.index(b"data")
    for placeholder in (0xFFFFFFFF, 0x7FFFF000):
        data[at + 4 : at + 8] = placeholder.to_bytes(4, "little")
        path = tmp_path / "x.wav"
        path.write_bytes(data)
        assert len(load_audio(path)) == 16000


def test_long_wav_header(tmp_path):
    path = tmp_path / "x.wav"
    soundfile.write(path, sound(16000), 16000, format="RF64", subtype="PCM_16")
    data = path.read_bytes()
    assert len(load_audio(path)) == 24000
    path.write_bytes(data[:-1000])
    assert "1.47 s of the 1.50 s" in refusal(path)


@pytest.mark.parametrize(("name", "codec"), [("x.m4a", "aac"), ("x.webm", "libopus")])
def test_cut_short_for_pyav(tmp_path, name, codec):
    path = tmp_path / name
    rate = 48000
    # The index in front, as on the web; at the end a cut would remove it, and nothing would open.
    options = {"movflags": "faststart"} if codec == "aac" else {}
    write_av(path, sound(rate, 5), rate, codec, "fltp" if codec == "aac" else "flt", None, options)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 5])
    assert "of the 5.0" in refusal(path)


def test_video_without_sound(tmp_path):
    path = tmp_path / "x.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for _ in range(3):
            picture = np.zeros((64, 64, 3), np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode(None))
    assert "no audio stream" in refusal(path)


def test_resample_refuses():
    with pytest.raises(InputError, match=r"\[2, 100\]"):
        resample(np.zeros((2, 100)), 8000)
    with pytest.raises(InputError, match="0 Hz"):
        resample(np.zeros(100), 0)
