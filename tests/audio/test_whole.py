"""load_audio reads all of a file or says why it cannot; files are like those of other programs.

"a" is a tone of 440 Hz, "b" one of 1,200 Hz; each letter is a quarter of a second. All files are
made here, with libsndfile and FFmpeg or byte by byte.
"""

import contextlib
import gzip
import io
import os
import random
import struct
import tempfile
import warnings
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from moss_audio_jax.audio import compressed, load_audio
from moss_audio_jax.errors import InputError, UsageError

CASES = Path(__file__).parents[3] / "shared" / "cases"
HERTZ = {"a": 440, "b": 1200}


def tone(letter: str, seconds: float = 1.0, rate: int = 16000) -> np.ndarray:
    return 0.3 * np.sin(2 * np.pi * HERTZ[letter] * np.arange(round(seconds * rate)) / rate)


def heard(source, **options) -> str:
    """A letter for each quarter of a second of load_audio's result; "." is silence."""
    wav = load_audio(io.BytesIO(source) if isinstance(source, bytes) else source, **options)
    assert wav.dtype == np.float32
    assert np.isfinite(wav).all()
    letters = ""
    for start in range(0, len(wav) - 3999, 4000):
        part = wav[start : start + 4000]
        peak = np.abs(np.fft.rfft(part * np.hanning(4000))).argmax() * 4
        near = [letter for letter, hertz in HERTZ.items() if abs(peak - hertz) < 20]
        letters += "." if np.abs(part).max() < 1e-3 else near[0] if near else "?"
    return letters


def refusal(source, **options) -> str:
    with pytest.raises(InputError) as caught:
        load_audio(io.BytesIO(source) if isinstance(source, bytes) else source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def written(kind: str, letter: str = "a", seconds=1.0, rate=16000, channels=1, **options) -> bytes:
    """A file by libsndfile."""
    file = io.BytesIO()
    wav = tone(letter, seconds, rate)[:, None] * np.ones(channels)
    soundfile.write(file, wav, rate, format=kind, **options)
    return file.getvalue()


class Pipe:
    """A file that can only be written, from its start to its end."""

    def __init__(self):
        self.data = b""

    def write(self, data):
        self.data += bytes(data)

    def getvalue(self):
        return self.data


def muxed(
    codec: str,
    container: str,
    *letters: str,
    default: int = 0,
    rate: int = 48000,
    pictures: int = 0,
    file=None,
    **options,
) -> bytes:
    """A file by FFmpeg, one track of a second for each letter, and pictures, ten a second."""
    file = file or io.BytesIO()
    with av.open(file, "w", format=container, options=options) as out:
        tracks = [out.add_stream(codec, rate=rate, layout="mono") for _ in letters]
        if pictures:
            screen = out.add_stream("flv", rate=10)
            screen.width, screen.height, screen.pix_fmt = 64, 64, "yuv420p"
        for number, track in enumerate(tracks):
            track.disposition = int(number == default)
            if codec in ("wavpack", "libmp3lame"):
                track.codec_context.format = "s16p"
            track.bit_rate = 128_000
            track.codec_context.open()
        for letter, track in zip(letters, tracks, strict=True):
            data = tone(letter, 1, rate).astype(np.float32)
            kind = track.codec_context.format.name
            if kind.startswith("s16"):
                data = np.round(data * 32767).astype(np.int16)
            size = track.codec_context.frame_size or 1024
            for start in range(0, len(data), size):
                frame = av.AudioFrame.from_ndarray(data[None, start : start + size], kind, "mono")
                frame.sample_rate, frame.pts = rate, start
                out.mux(track.encode(frame))
            out.mux(track.encode(None))
        for number in range(pictures):
            black = np.zeros((64, 64, 3), np.uint8)
            picture = av.VideoFrame.from_ndarray(black, format="rgb24")
            picture.pts = number
            out.mux(screen.encode(picture))
        if pictures:
            out.mux(screen.encode(None))
    return file.getvalue()


def mpeg_frames(letter: str = "a", seconds: float = 1.0, rate: int = 44100, channels=1) -> bytes:
    """MP3 as an encoder writes it into a pipe: VBR, and no frame that counts the others."""
    options = {"bitrate_mode": "VARIABLE", "compression_level": 0.5}
    data = written("MP3", letter, seconds, rate, channels, **options)
    with av.open(io.BytesIO(data)) as container:
        return b"".join(bytes(packet) for packet in container.demux(audio=0))


def riff(tag: int, rate: int, data: bytes, size: int | None = None) -> bytes:
    described = struct.pack("<HHIIHH", tag, 1, rate, 2 * rate if tag == 1 else 4000, 2, 16)
    size = len(data) if size is None else size
    chunks = b"WAVEfmt " + struct.pack("<I", 16) + described + b"data" + struct.pack("<I", size)
    return b"RIFF" + struct.pack("<I", min(36 + size, 0xFFFFFFFF)) + chunks + data


PCM = np.round(tone("a") * 32767).astype("<i2").tobytes()


# --- all of it -----------------------------------------------------------------------------------


def silent_flac(frames: int, total: int) -> bytes:
    """FLAC of silence at 16 kHz, 4.1 s in each frame of 15 bytes, and a header that states `total`
    samples (0: it does not say)."""

    def crc(data: bytes, polynomial: int, bits: int) -> bytes:
        value = 0
        for byte in data:
            value ^= byte << bits - 8
            for _ in range(8):
                top = value >> bits - 1
                value = (value << 1 ^ polynomial * top) & (1 << bits) - 1
        return value.to_bytes(bits // 8, "big")

    size = 65535
    described = struct.pack(">HH6x", size, size) + (16000 << 44 | 15 << 36 | total).to_bytes(
        8, "big"
    )
    out = b"fLaC\x80\0\0\x22" + described + bytes(16)
    for number in range(frames):
        head = b"\xff\xf8\x70\x08" + chr(number).encode() + struct.pack(">H", size - 1)
        head += crc(head, 7, 8) + b"\0\0\0"
        out += head + crc(head, 0x8005, 16)
    return out


def test_mpeg_frames_without_a_count():
    data = mpeg_frames("a", 3)
    assert soundfile.info(io.BytesIO(data)).duration < 1  # which is what libsndfile makes of it
    for before in (b"", b"x" * 200, mpeg_frames("a", 0.02)):
        assert heard(before + data) == "a" * 12
    # The rate, then the number of channels, changes on the way.
    for other in (mpeg_frames("b", 1, 48000), mpeg_frames("b", 1, channels=2)):
        assert heard(mpeg_frames("a", 1) + other) == "aaaabbbb"
    assert heard(riff(0x55, 44100, mpeg_frames("a", 1))) == "aaaa"


@pytest.mark.parametrize("kind", ["FLAC", "OGG", "MP3", "AIFF"])
def test_whole_files_of_any_length(kind):
    """Several blocks, whose lengths in seconds are not binary fractions."""
    for samples in (119_637, 203_801, 252_827):
        data = written(kind, "a", samples / 44100, 44100)
        assert len(load_audio(io.BytesIO(data))) == -(-samples * 16000 // 44100)


def test_junk_between_frames_is_said():
    one = mpeg_frames("a", 1)
    whole = len(load_audio(io.BytesIO(one + one)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for tag in (b"TAG" + bytes(125), b"ID3\4\0\0\0\0\0\x40" + bytes(64)):
            assert heard(one + tag + one) == "a" * 8
            assert len(load_audio(io.BytesIO(one + tag + one))) == whole
    with pytest.warns(UserWarning, match="1000 bytes outside frames"):
        assert len(load_audio(io.BytesIO(one + b"junk" * 250 + one))) == whole


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("OGG", {"subtype": "VORBIS"}),
        ("OGG", {"subtype": "OPUS"}),
        ("FLAC", {}),
        ("WAV", {}),
        ("WAV", {"subtype": "FLOAT"}),
        ("WAV", {"subtype": "ULAW"}),
        ("AIFF", {}),
        ("AU", {}),
        ("CAF", {}),
        ("W64", {}),
        ("RF64", {}),
    ],
)
def test_files_joined_end_to_end_are_heard_to_the_end(kind, options):
    a, b = written(kind, "a", 1, **options), written(kind, "b", 1.5, **options)
    assert len(load_audio(io.BytesIO(a + b))) == 40000
    assert heard(a + b) == "aaaabbbbbb"
    other = written(kind, "b", 1, 48000, 2, **options)
    assert heard(a + other + a) == "aaaabbbbaaaa"
    assert "cut short" in refusal((a + b)[: -len(b) // 3])


def test_a_recording_of_a_broadcast_in_ogg():
    """Pages and times do not begin at 0; a missing page in the middle is noticed."""
    data = written("OGG", "a", 20, 44100, subtype="VORBIS")
    pages = [b"OggS" + page for page in data.split(b"OggS")[1:]]
    headers = next(i for i, page in enumerate(pages) if page[6] > 0 or page[7] > 0)
    assert len(pages) > headers + 3
    joined = load_audio(io.BytesIO(b"".join(pages[:headers] + pages[headers + 1 :])))
    assert 0 < 20 * 16000 - len(joined) < 16000 * 5
    missing = pages[: headers + 1] + pages[headers + 2 :]
    assert "page is missing" in refusal(b"".join(missing))
    with pytest.warns(UserWarning, match="not marked as the end"):
        load_audio(io.BytesIO(b"".join(pages[:-1])))
    middle = bytearray(data)
    middle[len(data) // 2] ^= 1
    assert "checksum" in refusal(bytes(middle))


PLACEHOLDERS = (0, 2_000_000_000, 0x7FFF0000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF - 36, 0xFFFFFFFF)


@pytest.mark.parametrize("size", PLACEHOLDERS)
def test_sizes_that_were_never_filled_in(size):
    assert len(load_audio(io.BytesIO(riff(1, 16000, PCM, size)))) == 16000
    assert heard(riff(1, 16000, PCM, size) * 2) == "a" * 8
    au = bytearray(written("AU"))
    au[8:12] = size.to_bytes(4, "big")
    assert heard(bytes(au)) == "aaaa"


def test_no_samples_is_no_placeholder():
    assert "no samples" in refusal(riff(1, 16000, b""))
    assert "no samples" in refusal(riff(1, 16000, b"") + b"LIST\4\0\0\0INFO")
    assert "before its samples" in refusal(riff(1, 16000, b"")[:36])
    assert "before its samples" in refusal(b"RIFF\0\0\0\0WAVE")


def test_contents_decide_never_the_name(tmp_path):
    for name in ("x.raw", "x.mp3", "x", "x.m3u8", "concat:x|y.wav"):
        (tmp_path / name).write_bytes(riff(1, 16000, PCM))
        assert heard(tmp_path / name) == "aaaa"
        (tmp_path / name).write_bytes(written("FLAC"))
        assert heard(tmp_path / name) == "aaaa"
        with (tmp_path / name).open("rb") as file:
            assert heard(file) == "aaaa"


# --- cut short -----------------------------------------------------------------------------------

BIG = {"endian": "BIG"}
CUT = {
    "aiff": lambda: written("AIFF"),
    "caf": lambda: written("CAF"),
    "au": lambda: written("AU"),
    "w64": lambda: written("W64"),
    "voc": lambda: written("VOC"),
    "nist": lambda: written("NIST"),
    "rifx": lambda: written("WAV", **BIG),
    "rf64": lambda: written("RF64"),
    "svx": lambda: written("SVX"),
    "ulaw": lambda: written("WAV", subtype="ULAW"),
    "mp3 in wav": lambda: riff(0x55, 44100, mpeg_frames()),
    "adts": lambda: muxed("aac", "adts", "a"),
    "fragmented mp4": lambda: muxed("aac", "mp4", "a", movflags="frag_keyframe+empty_moov"),
    "live webm": lambda: muxed("libopus", "webm", "a", live="1"),
    "avi": lambda: muxed("pcm_s16le", "avi", "a"),
    "matroska": lambda: muxed("aac", "matroska", "a"),
    "flv": lambda: muxed("aac", "flv", "a"),
}


def test_a_second_chunk_of_samples_is_reported():
    whole = riff(1, 16000, PCM)
    chunk = b"data" + struct.pack("<I", len(PCM)) + PCM
    data = whole[:4] + struct.pack("<I", len(whole) - 8 + len(chunk)) + whole[8:] + chunk
    with pytest.warns(UserWarning, match="several chunks of samples; only the first"):
        assert heard(data) == heard(whole)


@pytest.mark.parametrize("kind", ["riff", "au"])
def test_a_header_that_states_too_little_is_reported(kind):
    data = bytearray(riff(1, 16000, PCM) if kind == "riff" else written("AU"))
    at, order = (40, "<") if kind == "riff" else (8, ">")
    (stated,) = struct.unpack_from(f"{order}I", data, at)
    assert len(data) - stated < 64
    struct.pack_into(f"{order}I", data, at, 1000)
    with pytest.warns(UserWarning, match=f"the last {stated - 1000:,} bytes .* are not read"):
        assert len(load_audio(io.BytesIO(bytes(data)))) == 500
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        heard(riff(1, 16000, PCM) + b"TAG" + bytes(125))  # a tag's size is no sound


@pytest.mark.parametrize("kind", CUT)
def test_halves_are_refused(kind):
    data = CUT[kind]()
    whole = heard(data)
    assert whole.rstrip(".?") == "aaaa"
    for share in (0.5, 0.9):
        cut = refusal(data[: int(len(data) * share)])
        assert "cut short" in cut or "damaged" in cut
    if kind in ("aiff", "caf", "au", "w64", "rifx", "rf64"):
        assert "0.50 s of the 1.00 s" in refusal(data[: (len(data) - 32000) + 16000])


@pytest.mark.parametrize("container", ["asf", "flv"])
def test_cuts_between_two_parts_are_refused(container):
    """The header states the size of the file, so that no cut can hide, wherever it is."""
    data = muxed("wmav2" if container == "asf" else "aac", container, "a")
    for stop in range(len(data) // 4, len(data), 211):
        refusal(data[:stop])


def test_what_asf_and_flv_do_not_state_is_not_missed():
    """Into a pipe their writers state neither size nor length."""
    for codec, container in (("wmav2", "asf"), ("aac", "flv")):
        assert heard(muxed(codec, container, "a", file=Pipe())).startswith("aaa")


def test_an_asf_film_may_outlast_its_sound():
    """Its header states the longest stream's length; only with sound alone is that the sound's."""
    assert heard(muxed("wmav2", "asf", "a", pictures=30)) == "aaa"
    data = bytearray(muxed("wmav2", "asf", "a"))
    at = data.index(bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")) + 64  # how long it plays
    play = int.from_bytes(data[at : at + 8], "little") + 5_000_000
    data[at : at + 8] = play.to_bytes(8, "little")
    assert "of the 1.5" in refusal(bytes(data))


def test_pictures_that_begin_late_in_a_flv():
    """FFmpeg learns of them while it reads, and PyAV raises IndexError after the last packet."""
    sound, both = (muxed("libmp3lame", "flv", "a", rate=44100, pictures=n) for n in (0, 10))
    assert (sound[4], both[4]) == (4, 5)  # sound alone, says the header of the first
    tags, pictures, at = both[13:], b"", 0
    while at < len(tags):
        length = 15 + int.from_bytes(tags[at + 1 : at + 4], "big")
        pictures += tags[at : at + length] if tags[at] == 9 else b""
        at += length
    sound += 9 * sound[13:]
    with av.open(io.BytesIO(sound + pictures)) as container:
        assert len(container.streams) == 1
    np.testing.assert_array_equal(
        load_audio(io.BytesIO(sound + pictures)), load_audio(io.BytesIO(sound))
    )
    assert "cut short" in refusal((sound + pictures)[:-10])


@pytest.mark.parametrize(
    ("codec", "container"),
    [("wavpack", "wv"), ("ac3", "ac3"), ("ac3", "mp4"), ("eac3", "eac3"), ("eac3", "matroska")],
)
def test_checksums_of_frames(codec, container):
    """Zeros in the middle decode to something, but the frame's checksum is wrong."""
    data = muxed(codec, container, "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert heard(data)[:4] == "aaaa"
    middle = len(data) // 2
    damaged = data[:middle] + bytes(200) + data[middle + 200 :]
    assert "damaged" in refusal(damaged)


# --- what a person should know -------------------------------------------------------------------


def test_two_tracks():
    data = muxed("aac", "mp4", "a", "b", default=1)
    with pytest.warns(UserWarning, match="2 audio tracks; track 2, marked as the default"):
        assert heard(data).startswith("bbbb")
    with pytest.warns(UserWarning, match="track 1"):
        assert heard(muxed("aac", "matroska", "a", "b")).startswith("aaaa")


def test_opposite_phase():
    noise = np.random.default_rng(0).normal(0, 0.1, (16000, 2)).astype(np.float32)
    with pytest.warns(UserWarning, match="opposite phase"):
        assert not load_audio((noise[:, :1] * [1, -1], 16000)).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for channels in (noise, noise * [1, 0], noise[:, :1] * [1, -0.5], np.zeros((16000, 2))):
            load_audio((channels, 16000))


# --- sources -------------------------------------------------------------------------------------


class Bare:
    """A file object that only has `read`."""

    def __init__(self, data: bytes):
        self._file = io.BytesIO(data)

    def read(self, count: int = -1) -> bytes:
        return self._file.read(count)


def test_file_objects(tmp_path):
    for data in (muxed("aac", "mp4", "a"), riff(1, 16000, PCM)):
        expected = load_audio(io.BytesIO(data))
        path = tmp_path / "x"
        path.write_bytes(gzip.compress(data))
        sources = [Bare(data), gzip.open(path)]  # noqa: SIM115
        for opened in (
            tempfile.TemporaryFile,
            tempfile.NamedTemporaryFile,
            tempfile.SpooledTemporaryFile,
        ):
            file = opened()
            file.write(data)
            sources.append(file)
        path = tmp_path / "y.raw"
        path.write_bytes(data)
        sources += [path.open("a+b"), path.open("r+b"), path.open("rb", buffering=0)]
        for source in sources:
            np.testing.assert_array_equal(load_audio(source), expected)
    for source in sources[1:]:
        source.close()
    assert "'boo'" in refusal(type("Broken", (Bare,), {"read": lambda *_: {}["boo"]})(b""))
    assert "expected bytes" in refusal(type("Text", (Bare,), {"read": lambda *_: "x"})(b""))


def test_only_regular_files(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", "/dev/zero", "/dev/full", "/proc/cpuinfo"):
        assert "not a regular file" in refusal(path)
    with open("/dev/zero", "rb") as file:
        assert "device" in refusal(file)


def test_arrays():
    wav = tone("a", 1, 44100).astype(np.float32)
    expected = load_audio((wav, 44100))
    assert heard((wav, 44100)) == "aaaa"
    assert len(expected) == 16000
    stereo = np.stack([wav * 1.5, wav * 0.5])
    for source in (
        {"array": wav, "sampling_rate": 44100, "path": None},
        {"array": list(map(float, wav)), "sampling_rate": 44100.0},
        (wav.astype(np.float64), np.int64(44100)),
        (stereo, 44100),
        (stereo.T, 44100),
    ):
        np.testing.assert_allclose(load_audio(source), expected, atol=1e-6)
    for kind in (np.int16, np.int32):
        scaled = np.round(wav * np.iinfo(kind).max).astype(kind)
        np.testing.assert_allclose(load_audio((scaled, 44100)), expected, atol=1e-4)
    unsigned = np.round(128 + 127 * wav).astype(np.uint8)
    np.testing.assert_allclose(load_audio((unsigned, 44100)), expected, atol=1e-2)


class Foreign:
    """An array of another library that NumPy cannot read, such as a tensor on a GPU."""

    def __array__(self, *_, **__):
        raise TypeError("on a device of its own")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ((np.zeros((100, 100)), 16000), "which axis is time"),
        ((np.zeros((2, 3)), 16000), "which axis is time"),
        ((np.zeros((1, 2, 3)), 16000), "[1, 2, 3]"),
        ((np.zeros(1000, np.int64), 16000), "int64"),
        ((np.zeros(1000, bool), 16000), "bool"),
        (([[1.0, 2.0], [3.0]], 16000), "inhomogeneous"),
        ((np.zeros(1000), "16k"), "'16k'"),
        ((np.zeros(1000), 16000.5), "16000.5"),
        ((np.zeros(1000), float("nan")), "nan"),
        ((np.zeros(1000),), "tuple of 1"),
        ({"bytes": b""}, "'bytes'"),
        ({1: 2, "a": 3}, "['1', 'a']"),
        ((Foreign(), 16000), "NumPy cannot read the Foreign (on a device of its own)"),
        (Foreign(), "got Foreign; expected a path, a binary file object, or an array with its"),
        (Foreign(), "a NumPy waveform at 16 kHz"),
        ((np.ma.masked_greater(np.linspace(0, 1, 16000), 0.5), 16000), "masked samples"),
        (np.zeros(1000), "with its sampling rate"),
        ((np.full(1000, 1e300), 16000), "NaN or infinite"),
        ((np.repeat(np.float32([3.4e38, -3.4e38]), 500), 44100), "overflow when resampled"),
        ((np.zeros(0), 16000), "no samples"),
    ],
)
def test_arrays_that_are_refused(source, words):
    assert words in refusal(source)


def test_tensors_that_numpy_cannot_read():
    torch = pytest.importorskip("torch")
    assert ".float().cpu().numpy()" in refusal((torch.zeros(16000).bfloat16(), 16000))
    assert len(load_audio((torch.zeros(16000), 16000))) == 16000


def test_any_error_of_a_decoder_names_the_file(tmp_path, monkeypatch):
    path = tmp_path / "x.flac"
    path.write_bytes(written("FLAC"))

    def blocks(*_):
        raise IndexError("list index out of range")
        yield

    monkeypatch.setattr(compressed, "blocks", blocks)
    assert refusal(path) == f"{path}: cannot be decoded (list index out of range)"


# --- bounds --------------------------------------------------------------------------------------


def test_too_long(monkeypatch):
    wav = riff(1, 16000, PCM)
    assert len(load_audio(io.BytesIO(wav), max_seconds=1)) == 16000
    for data in (wav, riff(1, 16000, PCM, 0), written("MP3"), written("OGG"), mpeg_frames()):
        assert "more than 0.5 s" in refusal(data, max_seconds=0.5)
    assert "max_seconds" in refusal((np.zeros(16000), 16000), max_seconds=0.5)
    # A length in the header is refused at once, an unknown one during decoding.
    assert len(load_audio(io.BytesIO(silent_flac(2, 0)))) == 131070
    assert "more than 43200 s" in refusal(silent_flac(2, 400 * 3600 * 16000))
    assert "more than 60 s" in refusal(silent_flac(20, 0), max_seconds=60)
    monkeypatch.setenv("MOSS_AUDIO_JAX_MAX_SECONDS", "0.5")
    assert "MOSS_AUDIO_JAX_MAX_SECONDS" in refusal(wav)
    assert heard(wav, max_seconds=2) == "aaaa"
    monkeypatch.setenv("MOSS_AUDIO_JAX_MAX_SECONDS", "much")
    with pytest.raises(UsageError, match="'much'"):
        load_audio(io.BytesIO(wav))


def test_many_channels():
    """With more than seven channels PyAV reads past the planes of a frame."""
    for kind, subtype in (("OGG", "VORBIS"), ("FLAC", "PCM_16"), ("WAV", "PCM_24")):
        assert heard(written(kind, "a", 1, channels=8, subtype=subtype)) == "aaaa"
    header = struct.pack("<HHIIHH", 1, 60000, 16000, 0, 0, 16)
    wide = b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0" + header + b"data\xff\xff\xff\xff"
    assert "0.1 ms" in refusal(wide + bytes(240_001))


def test_damaged_files_are_refused_or_finite():
    """A few hundred mutations of each kind of file; tools try more."""
    kinds = [
        riff(1, 16000, PCM),
        written("AIFF"),
        written("CAF", subtype="PCM_24"),
        written("FLAC"),
        written("MP3"),
        written("OGG"),
        written("OGG", subtype="OPUS"),
        muxed("aac", "mp4", "a"),
        muxed("libopus", "webm", "a"),
    ]
    rng = random.Random(0)
    given = 0
    for _ in range(300):
        data = bytearray(rng.choice(kinds))
        for _ in range(rng.choice((1, 2, 8))):
            at = rng.randrange(min(len(data), rng.choice((64, 512, len(data)))))
            some = rng.choice((b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", rng.randbytes(1)))
            data[at : at + rng.choice((0, 1, len(some)))] = some
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert np.isfinite(load_audio(io.BytesIO(data))).all()
                given += 1
            except InputError:
                continue
    assert 30 < given < 270  # neither all nor nothing is taken


@pytest.mark.skipif(not CASES.exists(), reason="needs ../shared")
def test_shared_cases():
    heard_there = {
        "chain_vorbis.ogg": "aaaabbbbbb",
        "flac_joined.flac": "aaaabbbbbb",
        "mp3_in.wav": "aaaa",
        "mp3_rates.mp3": "aaaabbbbbb",
        "ph_0.wav": "aaaa",
        "ph_2e9.wav": "aaaa",
        "tag_200.mp3": "aaaa",
        "two_audio_def2.mp4": "bbbbbb",
        "valid.raw": "aaaa",
        "vbr_loses_sound.mp3": "??" + 12 * "a",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, letters in heard_there.items():
            assert heard(CASES / "audio" / name) == letters, name
        for name in ("sp_chain.opus", "sp_vbr.mp3"):
            assert len(load_audio(CASES / "audio" / name)) / 16000 == pytest.approx(5.7, abs=0.1)
        with gzip.open(CASES / "audio" / "x1.m4a.gz") as file:
            assert len(load_audio(file)) == 16384
        for name in ("cut_f_AIFF_PCM_16.aiff", "cut_f_CAF_PCM_16.caf", "rifx_cut.wav"):
            assert "of the 1.00 s" in refusal(CASES / "audio" / name)
        for path in (CASES / "bad_audio").iterdir():
            with contextlib.suppress(InputError):
                assert np.isfinite(load_audio(path)).all()
