"""The Python interface: its names and signatures, and what they do."""

from __future__ import annotations

import argparse
import ast
import base64
import dataclasses
import inspect
import io
import os
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import AUDIO_ID, tiny_config, tone, write_checkpoint, write_wav

import moss_audio_jax as mj
from moss_audio_jax import api
from moss_audio_jax.config import DEFAULT_CHECKPOINT
from moss_audio_jax.generate import __main__ as generate_verb
from moss_audio_jax.generate import request
from moss_audio_jax.generate.engine import Output
from moss_audio_jax.generate.stop_strings import UntilStop
from moss_audio_jax.text.prompt import AUDIO_SPAN

FEW = {"max_new_tokens": 8, "loop_guard": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("api") / "toy")


@pytest.fixture(scope="module")
def model(folder):
    return mj.MossAudio.load(folder, dtype="float32")


@pytest.fixture(scope="module")
def mel():
    return mj.log_mel(tone(1.0) + 0.1 * tone(1.0, 1234.5))


@pytest.fixture(scope="module")
def prompt(model, mel):
    """Ids [L] for one clip of 100 frames: 13 placeholders."""
    return mj.build_prompt(model.tokenizer, "What?", mel_frames=[mel.shape[1]])


# --- names -------------------------------------------------------------------------------------

SIGNATURES = {
    "load_audio": "source",
    "log_mel": "wav",
    "load_tokenizer": "folder",
    "build_prompt": "tokenizer, text, mel_frames=(), time_markers=True, system=None",
    "parse_timestamps": "text",
    "to_srt": "segments",
    "to_vtt": "segments",
    "to_textgrid": "segments",
    "to_json": "segments",
    "Segment": "start, end, text",
    "Request": "text, audio=(), sampling",
    "Reply": "text, thinking, ids, finish_reason, warnings=(), error=None",
    "MossAudio.load": "path=None, dtype=None, mesh=None, encoder_attention=None",
    "MossAudio.encode_audio": "self, mels",
    "MossAudio.logits": "self, ids, mels=()",
    "MossAudio.logits_batch": "self, prompts",
    "MossAudio.loss": "self, ids, labels, mels=()",
    "MossAudio.generate_ids": (
        "self, ids, mels=(), max_new_tokens=64, temperature=0.0, top_p=1.0, top_k=0, seed=0"
    ),
    "MossAudio.generate": "self, text, audio=()",
    "MossAudio.stream": "self, text, audio=()",
    "MossAudio.generate_batch": "self, requests",
    "transcribe": "model, audio, timestamps='none'",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_kept(name):
    """Code outside the project calls these; parameters after the listed ones are optional."""
    found = mj
    for part in name.split("."):
        found = getattr(found, part)
    parameters = list(inspect.signature(found).parameters.values())
    for expected, parameter in zip(SIGNATURES[name].split(", "), parameters, strict=False):
        key, _, default = expected.partition("=")
        assert parameter.name == key
        if default:
            assert repr(parameter.default) == default
    extra = parameters[len(SIGNATURES[name].split(", ")) :]
    assert all(p.default is not p.empty or p.kind is p.VAR_KEYWORD for p in extra)


def test_one_set_of_defaults():
    """In every signature and on the command line; only `generate_ids` is short by default."""
    options = {field.name: field.default for field in dataclasses.fields(mj.Sampling)}
    short = {name: value for name, value in options.items() if name != "logprobs"}  # ids alone
    for call, expected in (
        (mj.MossAudio.generate, options),
        (mj.MossAudio.stream, options),
        (mj.MossAudio.generate_ids, short | {"max_new_tokens": 64}),
    ):
        parameters = inspect.signature(call).parameters
        assert {name: parameters[name].default for name in expected} == expected
    parser = argparse.ArgumentParser()
    generate_verb.sampling_options(parser)
    assert generate_verb.sampling_from(parser.parse_args([])) == mj.Sampling()
    assert mj.Sampling(stop=["a"]) == mj.Sampling(stop=("a",))


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": "5"},
        {"max_new_tokens": 1.5},
        {"top_p": None},
        {"temperature": float("nan")},
        {"top_k": float("inf")},
        {"seed": "x"},
        {"stop": "abc"},
        {"stop": ("",)},
        {"stop": (3,)},
        {"stop_ids": 5},
        {"thinking_budget": -1},
    ],
)
def test_options_out_of_range(wrong):
    with pytest.raises(mj.UsageError, match=f"^{next(iter(wrong))} is .*; expected "):
        mj.Sampling(**wrong)


def test_importing_starts_no_jax_and_transcribe_stays_a_function():
    script = (
        "import sys, moss_audio_jax as mj; mj.load_audio, mj.log_mel, mj.build_prompt, mj.to_srt;"
        "mj.load_tokenizer, mj.Sampling(); first = mj.transcribe; "
        "import moss_audio_jax.transcribe, importlib; "
        "module = importlib.import_module('moss_audio_jax.transcribe'); "
        "assert mj.transcribe is first is module.transcribe and module.WINDOW_SECONDS; "
        "sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_every_name_is_there():
    for name in mj.__all__:
        assert getattr(mj, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        mj.no_such_name  # noqa: B018


def test_type_checkers_find_what_is_imported():
    """They read the imports that never run, from the places where the names are found."""
    tree = ast.parse(inspect.getsource(mj))
    (block,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and len(node.body) > 1
    )
    found = {each.name: one.module for one in block.body for each in one.names}
    del found["Any"]
    assert found == mj._HOME


def test_what_a_model_holds(model, folder):
    assert model.config == tiny_config()
    kernel = model.params["lm_head"]["kernel"]
    assert (kernel.shape, kernel.dtype) == ((32, 384), "float32")
    assert model.tokenizer.decode(model.tokenizer.encode("hé")) == "hé"
    assert model.processor.audio_token_id == AUDIO_ID
    assert model.random_weights
    half = mj.MossAudio.load(str(folder), "bfloat16", encoder_attention="full")
    rounded = half.params["lm_head"]["kernel"]  # on a CPU held as bits
    assert (rounded.shape, rounded.dtype) == ((32, 384), "bfloat16")
    np.testing.assert_array_equal(np.asarray(rounded), np.asarray(kernel.astype("bfloat16")))
    assert half.config.encoder.attention == "full"


def test_a_model_says_what_it_is(model, folder):
    mesh = "mesh data=1, fsdp=1, tensor=1, sequence=1"
    assert repr(model) == f"MossAudio({str(folder)!r}, 0.1M parameters, float32, {mesh})"
    small = mj.MossAudio.load(quantize="weights")  # the one of the package, in a CPU's dtype
    assert small.folder == DEFAULT_CHECKPOINT
    assert f"M parameters, float32, int8 weights, {mesh})" in repr(small)
    assert small.tokenizer is not None


CACHE = """
import os, sys
import jax
import moss_audio_jax as mj
from moss_audio_jax import runtime
def found():
    c = jax.config
    return c.jax_compilation_cache_dir, c.jax_persistent_cache_min_compile_time_secs
before = found()
mj.MossAudio
assert found() == before, "importing changes settings"
if sys.argv[1] == "own":
    jax.config.update("jax_compilation_cache_dir", "own")
jax.jit(lambda x: x + 1)(1.0)  # what was compiled before does not matter
runtime.keep_compiled()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # on a fast machine too
jax.jit(lambda x: x @ x + 2)(jax.numpy.ones((9, 9)))
print(found()[0])
"""


@pytest.mark.parametrize("how", ["default", "off", "own", "told", "devices"])
def test_programs_are_kept_unless_something_else_is_said(how, tmp_path):
    names = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    env = {k: v for k, v in os.environ.items() if k not in (*names, "XLA_FLAGS")}
    env |= {"XDG_CACHE_HOME": str(tmp_path)}
    env |= {
        "off": {"MOSS_AUDIO_JAX_CACHE": "off"},
        "told": {names[0]: "told"},
        "devices": {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
    }.get(how, {})
    done = subprocess.run(
        [sys.executable, "-c", CACHE, how],
        env=env,
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    folder = tmp_path / "moss_audio_jax" / "xla"
    expected = {"default": str(folder), "off": "None", "devices": "None"}.get(how, how)
    assert done.stdout.strip() == expected
    assert bool(list(folder.glob("*"))) == (how == "default")


@pytest.mark.parametrize(
    ("how", "word"),
    [
        ({"dtype": "int8"}, "int8"),
        ({"encoder_attention": "half"}, "half"),
        ({"mesh": {"pipeline": 2}}, "pipeline"),
        ({"mesh": (64, 1, 1, 1)}, "does not fit 8 device"),
    ],
)
def test_loading_refuses_what_does_not_exist(folder, how, word):
    with pytest.raises((mj.UsageError, mj.InputError), match=word):
        mj.MossAudio.load(folder, **how)


# --- from ids and mels -------------------------------------------------------------------------


def test_shapes_and_dtypes(model, mel, prompt):
    one, two = model.encode_audio([mel, mel[:, :60]])
    assert (one[0].shape, one[1].shape) == ((13, 24), (2, 13, 24))
    assert (two[0].shape, two[1].shape) == ((8, 24), (2, 8, 24))
    assert all(x.dtype == np.float32 for pair in (one, two) for x in pair)
    assert model.encode_audio([]) == []
    logits = model.logits(prompt, [mel])
    assert (logits.shape, logits.dtype) == ((len(prompt), 384), np.float32)


def test_batch_and_loss_agree_with_single_logits(model, mel, prompt):
    text = mj.build_prompt(model.tokenizer, "Only text")
    alone = [model.logits(prompt, mels=[mel]), model.logits(text)]
    batch = model.logits_batch([(prompt, [mel]), (text, [])])
    for one, other in zip(alone, batch, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    assert model.logits_batch([]) == []

    labels = np.where(prompt == AUDIO_ID, -100, prompt)
    logits = alone[0].astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    counted = np.flatnonzero(labels[1:] != -100)
    expected = -np.mean(log_p[counted, labels[1:][counted]])
    assert model.loss(prompt, labels, [mel]) == pytest.approx(expected, rel=1e-5)
    labels[0] = 3  # has nothing before it to be predicted from
    assert model.loss(list(prompt), list(labels), mels=[mel]) == pytest.approx(expected, rel=1e-5)


def test_mels_are_rounded_where_a_prompt_is_prepared_and_nowhere_else(
    model, mel, prompt, monkeypatch
):
    rounded = mel.astype(ml_dtypes.bfloat16).astype(np.float32)
    wav = tone(1.0) + 0.1 * tone(1.0, 1234.5)
    np.testing.assert_array_equal(model.prepare(mj.Request("What?", [wav])).mels[0], rounded)
    for compute in (
        lambda mel: model.encode_audio([mel])[0][0],
        lambda mel: model.logits(prompt, [mel]),
    ):
        assert np.any(compute(mel) != compute(rounded))

    seen = []

    def run(self, requests, **_):
        seen.append(requests[0][0].mels[0])
        return [Output([1], "stop")]

    monkeypatch.setattr(api.Engine, "run", run)
    model.generate_ids(prompt, [mel])
    model.generate("What?", wav)
    np.testing.assert_array_equal(seen[0], mel)
    np.testing.assert_array_equal(seen[1], rounded)


MEL = np.zeros((128, 100), np.float32)
PLACEHOLDERS = [AUDIO_ID] * 13


@pytest.mark.parametrize(
    ("ids", "mels", "words"),
    [
        ([], [], "shape"),
        ([[1, 2]], [], "shape"),
        ([1.5], [], "float64"),
        ([5, 384], [], "384 is outside the model's vocabulary of 384"),
        ([5, -1], [], "-1 is outside"),
        ([1] * 257, [], "257 tokens, but the model has 256 positions"),
        ([1], [MEL], "0 audio placeholders"),
        (PLACEHOLDERS, [], "13 audio placeholders"),
        (PLACEHOLDERS, [MEL, MEL], "26 audio tokens"),
        (PLACEHOLDERS, [MEL.T], "clip 1: log-mel has shape [100, 128]"),
        (PLACEHOLDERS, MEL, "clip 1: log-mel has shape [100]"),
        (PLACEHOLDERS, [MEL[:, :0]], "at least one frame"),
        (PLACEHOLDERS, [MEL * np.nan], "clip 1: the log-mel holds values that are NaN"),
    ],
)
def test_ids_and_mels_that_cannot_be(model, ids, mels, words):
    for call in (model.logits, model.generate_ids, lambda i, m: model.loss(i, i, m)):
        with pytest.raises((mj.InputError, mj.UsageError)) as caught:
            call(ids, mels)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mels", [[MEL.T], MEL, [MEL[:, :0]], [MEL + np.inf]])
def test_encode_audio_refuses(model, mels):
    with pytest.raises(mj.InputError, match="clip 1: "):
        model.encode_audio(mels)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([1, 2], "expected int [3], one for each id"),
        ([1.0, 2.0, 3.0], "expected int [3]"),
        ([1, 2, 384], "label 384 is outside"),
        ([1, -1, 2], "label -1 is outside"),
        ([7, -100, -100], "no label counts"),
    ],
)
def test_labels_that_cannot_be(model, labels, words):
    with pytest.raises((mj.InputError, mj.UsageError)) as caught:
        model.loss([1, 2, 3], labels)
    assert words in str(caught.value)


# --- from text and sound -----------------------------------------------------------------------


def test_a_clip_may_come_in_any_form(model, tmp_path):
    wav = tone(1.0)
    file = write_wav(tmp_path / "a.wav", wav)
    expected = model.prepare(mj.Request("hi", [wav]))
    with file.open("rb") as opened:
        forms = [file, str(file), opened, io.BytesIO(file.read_bytes()), wav.astype(np.float64)]
        forms += [{"array": wav, "sampling_rate": 16_000}, (wav, 16_000), mj.Clip(wav)]
        for form in forms:
            for audio in ([form], form):  # a clip by itself is a list of one
                prepared = model.prepare(mj.Request("hi", audio))
                np.testing.assert_array_equal(prepared.ids, expected.ids)
                np.testing.assert_array_equal(prepared.mels[0], expected.mels[0])


def test_questions_share_a_clip_that_is_read_once(model, tmp_path, monkeypatch):
    write_wav(tmp_path / "a.wav", tone(1.0))
    few = mj.Sampling(**FEW)
    apart = model.generate_batch([mj.Request(q, tmp_path / "a.wav", few) for q in ("one", "two")])
    read = []

    def counted(audio):
        read.append(audio)
        return mj.load_audio(audio)

    monkeypatch.setattr(request, "load_audio", counted)
    clip = mj.Clip(tmp_path / "a.wav")
    prompts = [model.prepare(mj.Request(q, clip, few)) for q in ("one", "two")]
    assert prompts[0].mels[0] is prompts[1].mels[0]
    together = model.generate_batch([mj.Request(q, [clip], few) for q in ("one", "two")])
    assert [reply.ids for reply in together] == [reply.ids for reply in apart]
    assert read == [tmp_path / "a.wav"]
    with pytest.raises(mj.InputError, match=r"gone\.wav"):
        model.generate("?", mj.Clip(tmp_path / "gone.wav"))
    silent = np.zeros(4000, np.float32)
    named = model.prepare(mj.Request("?", [mj.Clip(tone(1.0)), mj.Clip(silent)]))
    assert [text[:7] for text in named.warnings] == ["clip 2:"]
    with pytest.raises(mj.InputError, match="clip 2:"):
        model.prepare(mj.Request("?", [mj.Clip(tone(1.0)), mj.Clip(silent[:9])]))
    transcript = mj.transcribe(model, mj.Clip(tone(1.0)), sampling=few)
    assert transcript.text == mj.transcribe(model, tone(1.0), sampling=few).text


def test_text_system_and_time_markers(model):
    wav = tone(2.5)  # 250 frames: 32 tokens, and a marker for the second 2

    def ids(**how):
        return model.prepare(mj.Request("hi", [wav], **how)).ids.tolist()

    def built(**how):
        return mj.build_prompt(model.tokenizer, "hi", mel_frames=[250], **how).tolist()

    assert ids() == built()
    assert ids(time_markers=False) == built(time_markers=False) != built()
    assert ids(system="Be brief.") == built(system="Be brief.")
    two = model.prepare(mj.Request("hi", [wav, tone(1.0)]))
    assert two.ids.tolist() == mj.build_prompt(model.tokenizer, "hi", [250, 100]).tolist()
    assert [mel.shape for mel in two.mels] == [(128, 250), (128, 100)]


@pytest.mark.parametrize(
    ("clips", "words"),
    [
        (["none.wav"], "none.wav: no such file"),
        ([np.zeros(16_000), np.zeros(100)], "clip 2: "),
        ([np.zeros((16_000, 2))], "clip 1: "),
        ([np.full(16_000, np.nan)], "clip 1: "),
        ([np.zeros(16_000, np.int16)], "clip 1: "),
        ([np.zeros(16_000 * 30, "f4")], "clip 1: 30 s of audio alone make 375 tokens"),
        ([np.zeros(16_000 * 10, "f4")] * 2, "clip 1, clip 2: 20 s of audio and the text make"),
        ([3], "expected a path"),
    ],
)
def test_clips_that_cannot_be(model, clips, words):
    with pytest.raises(mj.InputError) as caught:
        model.generate("hi", clips)
    assert words in str(caught.value)


def test_answers(model, mel, prompt, monkeypatch):
    """generate = prepare + generate_ids + decode; batches keep their order; streams join."""
    wav = tone(1.0) + 0.1 * tone(1.0, 1234.5)
    reply = model.generate("What?", wav, **FEW)
    prepared = model.prepare(mj.Request("What?", [wav]))
    assert reply.ids == model.generate_ids(prepared.ids, prepared.mels, max_new_tokens=8)
    raw = model.tokenizer.decode(reply.ids)
    assert (reply.text, reply.thinking, reply.finish_reason) == (raw.strip(), None, "length")
    assert len(reply.ids) == 8

    pieces: list[str] = []
    streamed = model.generate("What?", wav, on_text=pieces.append, **FEW)
    assert streamed == reply
    assert "".join(pieces) == raw
    assert len(pieces) > 1

    stream = model.stream("What?", wav, **FEW)
    assert stream.reply is None
    assert list(stream) == pieces
    assert stream.reply == reply
    assert list(stream) == []

    few = mj.Sampling(**FEW)
    requests = [mj.Request(text, wav, few) for text in ("b", "What?", "c")]
    replies = model.generate_batch(requests)
    assert replies[1] == reply
    assert len({tuple(r.ids) for r in replies}) == 3
    assert model.generate_batch([]) == []
    # An unusable request does not affect the others.
    faults = {
        "none.wav: no such file": mj.Request("x", "none.wav", few),
        "verbatim": mj.Request(AUDIO_SPAN, wav, few, "system"),
        "audio is None; expected a clip": mj.Request("x", None, few),
        "audio is 3; expected a clip": mj.Request("x", 3, few),
        "{}: expected a Sampling": mj.Request("x", wav, {}),
        "'x': expected a Request": "x",
    }
    requests[1:1] = faults.values()
    mixed = model.generate_batch(requests)
    assert [mixed[0], *mixed[1 + len(faults) :]] == replies
    for reply, fault in zip(mixed[1:], faults, strict=False):
        assert (reply.text, reply.ids, reply.finish_reason) == ("", [], "error")
        assert fault in reply.error
    with pytest.raises(mj.UsageError, match="audio is None"):
        model.generate("x", audio=None)
    assert not any(r.error for r in replies)

    monkeypatch.setattr(api, "BATCHES_AT_ONCE", 2)  # one call of the engine for each two
    assert model.generate_batch(requests, batch_size=1) == mixed
    for size in (0, -1):
        with pytest.raises(mj.UsageError, match=f"batch_size is {size}"):
            model.generate_batch(requests, batch_size=size)


def test_a_conversation_in_openais_form(model, tmp_path):
    """The same prompt as text and audio; sound may come later, and in any form."""
    wav = tone(1.0)
    write_wav(tmp_path / "a.wav", wav)
    data = base64.b64encode((tmp_path / "a.wav").read_bytes()).decode()
    question = {"type": "text", "text": "What?"}
    plain = model.generate("What?", [tmp_path / "a.wav"], system="Brief.", **FEW)
    for clip in (
        {"type": "audio", "audio": tmp_path / "a.wav"},
        {"type": "input_audio", "input_audio": {"data": data}},
        {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{data}"}},
    ):
        messages = [
            {"role": "system", "content": "Brief."},
            {"role": "user", "content": [question, clip]},
        ]
        assert model.generate(messages=messages, **FEW).ids == plain.ids
    turns = [*messages, {"role": "assistant", "content": "A tone."}, messages[1]]
    prompt = model.prepare(mj.Request(messages=turns))
    assert len(prompt.mels) == 2
    assert (
        "".join(model.stream(messages=turns, **FEW)) == model.generate(messages=turns, **FEW).text
    )
    with pytest.raises(mj.UsageError, match="instead of text"):
        model.generate("What?", messages=turns)
    with pytest.raises(mj.InputError, match="ends with the assistant"):
        model.generate(messages=turns[:-1])


def test_a_stream_leaves_the_mesh_to_its_reader(model):
    """Between two pieces the reader's own JAX code runs as it does outside."""
    outside = jax.sharding.get_abstract_mesh()
    stream = model.stream("hi", **FEW)
    next(stream)
    assert jax.sharding.get_abstract_mesh() == outside
    other = model.generate("What?", **FEW)  # nor does it affect those between
    assert list(model.stream("hi", **FEW))[1:] == list(stream)
    assert model.generate("What?", **FEW) == other


def test_warnings_reach_the_reply(model):
    """Warnings about the sound; with several clips they name the clip."""
    silent, heard = np.zeros(16_000, np.float32), tone(1.0)
    said = "every sample is 0: what the answer says was not heard"
    one, two, none = model.generate_batch(
        [
            mj.Request("hi", clips, mj.Sampling(**FEW))
            for clips in (silent, [heard, silent], [heard, heard])
        ]
    )
    assert (one.warnings, two.warnings, none.warnings) == ((said,), (f"clip 2: {said}",), ())
    assert model.generate("hi", silent, **FEW).warnings == (said,)


def test_stop_strings_are_cut_from_answer_and_stream(model):
    long = FEW | {"max_new_tokens": 40}
    raw = model.tokenizer.decode(model.generate("hi", **long).ids)
    # Two neighbours in the text, as a string of several tokens.
    start = next(i for i in range(4, len(raw)) if "�" not in raw[i : i + 2])
    stop = raw[start : start + 2]
    kept = raw[: raw.index(stop)]
    reply = model.generate("hi", stop=(stop, "never said"), **long)
    assert (reply.text, reply.finish_reason) == (kept.strip(), "stop")
    pieces: list[str] = []
    model.generate("hi", stop=(stop, "never said"), on_text=pieces.append, **long)
    assert "".join(pieces) == kept


@given(
    pieces=st.lists(st.text("abc", max_size=4)),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_streams_end_where_the_text_does(pieces, stops):
    got: list[str] = []
    until = UntilStop(stops, got.append)
    for i, piece in enumerate(pieces):
        until.push(piece)
        said = "".join(pieces[: i + 1])
        found = [said.index(stop) for stop in stops if stop in said]
        # No text is given too early, and none is held back that cannot begin a stop string.
        assert said.startswith("".join(got))
        if found:
            break
        held = said[len("".join(got)) :]
        assert not held or any(stop.startswith(held) for stop in stops)
    until.push("", last=True)
    said = "".join(pieces[: i + 1]) if pieces else ""
    assert "".join(got) == said[: min([len(said), *(said.index(s) for s in stops if s in said)])]


def test_without_a_tokenizer_ids_still_work(tmp_path):
    model = mj.MossAudio.load(write_checkpoint(tmp_path / "toy", tokenizer=False), "float32")
    assert model.tokenizer is None
    for call in (model.generate, model.stream, lambda text: model.generate_batch([])):
        with pytest.raises(mj.InputError, match=r"no tokenizer.*generate_ids"):
            call("hi")
    assert len(model.generate_ids([1, 2, 3], max_new_tokens=8)) == 8
