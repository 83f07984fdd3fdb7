"""Decoding in a process: faults, limits, a decoder that hangs or dies; JSON guides."""

from __future__ import annotations

import io
import json
import os
import signal

import numpy as np
import pytest
import soundfile

import moss_audio_jax as mj
from moss_audio_jax.config import DEFAULT_CHECKPOINT
from moss_audio_jax.errors import InputError
from moss_audio_jax.serve.audio_input import Decoder
from moss_audio_jax.serve.errors import ApiError
from moss_audio_jax.serve.guides import Guides


@pytest.fixture(scope="module")
def decoder():
    decoder = Decoder(processes=1, seconds=20)
    yield decoder
    decoder.close()


def flac(seconds: float) -> bytes:
    held = io.BytesIO()
    wav = np.sin(np.arange(round(seconds * 16_000)) / 9).astype(np.float32)
    soundfile.write(held, wav, 16_000, format="FLAC")
    return held.getvalue()


def test_a_clip_is_what_the_library_reads(decoder):
    data = flac(1.5)
    decoded = decoder.decode(data, 10)
    np.testing.assert_array_equal(decoded.wav, mj.load_audio(io.BytesIO(data)))
    assert decoded.warnings == ()


def test_faults_and_warnings_are_told(decoder):
    for data, fault in (
        (b"", "is empty"),
        (b"no sound", "not audio"),
        (flac(1.9)[:5000], "cut short"),
        (flac(3.0), "holds more than 2 s"),
    ):
        with pytest.raises(InputError, match=fault) as raised:
            decoder.decode(data, 2)
        assert "max_seconds" not in str(raised.value)
    held = io.BytesIO()
    tone = np.sin(np.arange(8000) / 9)
    soundfile.write(held, np.stack([tone, -tone], 1), 16_000, format="WAV")
    (warning,) = decoder.decode(held.getvalue(), 2).warnings
    assert warning.startswith("its channels are in opposite phase")


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:5,\n{file}\n#EXT-X-ENDLIST\n",
        "#EXTM3U\n#EXTINF:5,\nhttp://127.0.0.1:9/a.mp3\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile '{file}'\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
    ],
    ids=["playlist", "address", "concat", "session"],
)
def test_a_file_opens_no_other(decoder, text, tmp_path):
    file = tmp_path / "a.wav"
    soundfile.write(file, np.zeros(16_000), 16_000)
    with pytest.raises(InputError, match="not audio that can be decoded"):
        decoder.decode(text.format(file=file).encode(), 10)


def test_a_decoder_that_hangs_is_killed_and_replaced(decoder):
    data = flac(0.5)
    decoder.decode(data, 2)
    process = decoder._idle.get()
    pid = process._process.pid
    decoder._idle.put(process)
    os.kill(pid, signal.SIGSTOP)
    decoder._seconds = 0.5
    with pytest.raises(InputError, match="longer than this server allows"):
        decoder.decode(data, 2)
    decoder._seconds = 20
    assert len(decoder.decode(data, 2).wav) == 8000
    process = decoder._idle.get()
    assert process._process.pid != pid
    decoder._idle.put(process)


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string"}, "b": {"enum": ["x", "yy"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def guides():
    tokenizer = mj.load_tokenizer(DEFAULT_CHECKPOINT)
    return Guides(tokenizer, 2560, tokenizer.stop_ids), tokenizer


def test_a_guide_allows_what_its_schema_does(guides):
    make, tokenizer = guides
    guide = make.of(SCHEMA)
    for token in tokenizer.encode('{"a": "a bell, [é]", "b": "yy"}'):
        allowed = guide.allowed()
        assert (allowed.shape, allowed.dtype) == ((2560,), bool)
        assert allowed[token]
        guide.push(token)
    assert set(np.flatnonzero(guide.allowed())) == set(tokenizer.stop_ids)
    guide.push(tokenizer.stop_ids[0])
    assert set(np.flatnonzero(guide.allowed())) == set(tokenizer.stop_ids)


def test_random_answers_of_a_guide_are_json(guides):
    """Any path through it ends in a value of the schema; think tags and audio never come."""
    make, tokenizer = guides
    draw = np.random.default_rng(0)
    schema = SCHEMA | {
        "properties": SCHEMA["properties"] | {"a": {"type": "string", "maxLength": 9}}
    }
    for _ in range(10):
        guide, ids = make.of(schema), []
        while not (allowed := guide.allowed())[list(tokenizer.stop_ids)].any():
            assert not allowed[[*tokenizer.think_ids, 3, 4, 5]].any()
            ids.append(int(draw.choice(np.flatnonzero(allowed))))
            guide.push(ids[-1])
        found = json.loads(tokenizer.decode(ids))
        assert set(found) == {"a", "b"}
        assert found["b"] in ("x", "yy")


@pytest.mark.parametrize(
    "schema", [{"type": 3}, {"$ref": "http://127.0.0.1/x"}, {"pattern": "(?=a)", "type": "string"}]
)
def test_a_schema_that_is_refused(guides, schema):
    with pytest.raises(ApiError) as raised:
        guides[0].of(schema)
    assert (raised.value.status, raised.value.code) == (400, "invalid_schema")
