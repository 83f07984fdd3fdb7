"""Transcription: windows, their times in the whole file, and output files."""

from __future__ import annotations

import dataclasses
import json
import types

import numpy as np
import pytest
import soundfile
from tiny_model import tone, write_checkpoint

import moss_audio_jax as mj
from moss_audio_jax import InputError, MossAudio, Reply, Segment, parse_timestamps, transcribe
from moss_audio_jax.config import DEFAULT_CHECKPOINT
from moss_audio_jax.errors import UsageError
from moss_audio_jax.generate.request import Prepared
from moss_audio_jax.generate.sampling import Sampling
from moss_audio_jax.text.tasks import NO_SPEECH, TRANSCRIBE
from moss_audio_jax.text.unsaid import Word

DEMO = DEFAULT_CHECKPOINT.parent / "demo"
RATE = 16_000


class Canned:
    """A model that answers windows from a list, and records its prompts."""

    def __init__(self, *answers: str | Reply) -> None:
        self.answers = [a if isinstance(a, Reply) else Reply(a, None, [], "stop") for a in answers]
        self.requests = []
        self.samplings = []

    def prepare(self, request):
        self.requests.append(request)
        return Prepared(np.zeros(1, np.int32), (np.zeros((128, 1)),), sampling=request.sampling)

    def answer(self, prompts, batch_size, progress):
        self.samplings += [prompt.sampling for prompt in prompts]
        assert len(prompts) == len(self.answers)
        return self.answers


def speech(seconds: float, *pauses: float) -> np.ndarray:
    """Noise with 0.5 s of silence at each of `pauses`."""
    wav = 0.3 * np.random.default_rng(0).standard_normal(int(seconds * RATE)).astype("f4")
    for pause in pauses:
        wav[int(pause * RATE) : int((pause + 0.5) * RATE)] = 0
    return wav


def test_times_are_those_of_the_whole_file():
    model = Canned(
        "[0.50]one[3.00][3.20]two[8.00]",
        "[0.00]three[2.00]",
        "[1.00]four[2.00]",
        "[0.25]other[1.00]",
    )
    wavs = [speech(24, 8.5, 17.0), speech(3)]
    long, short = transcribe(model, wavs, "sentence", window_seconds=10)

    clips = [request.audio[0] for request in model.requests]
    np.testing.assert_array_equal(np.concatenate(clips[:3]), wavs[0])
    np.testing.assert_array_equal(clips[3], wavs[1])
    first, second = len(clips[0]) / RATE, (len(clips[0]) + len(clips[1])) / RATE
    assert 8.5 < first < 9.0
    assert 17.0 < second < 17.5
    assert {request.text for request in model.requests} == {TRANSCRIBE["sentence"]}

    assert [s.text for s in long.segments] == ["one", "two", "three", "four"]
    expected = [0.5, 3.0, 3.2, 8.0, first, first + 2, second + 1, second + 2]
    found = [time for s in long.segments for time in (s.start, s.end)]
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert (long.text, long.problems) == ("one two three four", [])
    assert long.stopped_at is None
    assert long.seconds == pytest.approx(24)
    assert short.segments == [Segment(0.25, 1.0, "other")]


def test_what_went_wrong_is_said_with_its_place():
    model = Canned(
        Reply("[0.00]a[1.00] lost words", None, [], "length"),
        "[0.50]b[99.00]",
        "no times at all",
    )
    (transcript,) = transcribe(model, [speech(24, 8.5, 17.0)], "word", window_seconds=10)
    cuts = [len(request.audio[0]) / RATE for request in model.requests]
    places = [f"0.00-{cuts[0]:.2f} s", f"{cuts[0]:.2f}-{cuts[0] + cuts[1]:.2f} s"]
    assert transcript.problems[:3] == [
        f"{places[0]}: no times in 'lost words'",
        f"{places[0]}: the answer was cut short (length)",
        f"{places[1]}: time 99.00 is after the end ({cuts[1]:.2f} s)",
    ]
    assert "no times in 'no times at all'" in transcript.problems[3]
    # A time after the window is moved to its end; words without times get those of their window.
    assert transcript.segments[1].end == pytest.approx(cuts[0] + cuts[1])
    last = transcript.segments[2]
    assert (last.start, last.end) == pytest.approx((cuts[0] + cuts[1], 24))
    assert last.text == "no times at all"
    assert transcript.stopped_at == pytest.approx(1.0)  # the end of "a"; "lost words" has no times
    for segment in transcript.segments:
        assert 0 <= segment.start <= segment.end <= 24


def test_one_sound_in_any_form(tmp_path):
    """A path, a waveform, samples with their rate: one transcript; a list: a list."""
    soundfile.write(tmp_path / "a.wav", tone(2.0), RATE)
    with_rate = {"array": tone(2.0, rate=8000), "sampling_rate": 8000}
    forms = (str(tmp_path / "a.wav"), tmp_path / "a.wav", tone(2.0), with_rate)
    for form in forms:
        one = transcribe(Canned("[0.00]a[1.00]"), form, "word")
        assert one == mj.Transcript("a", [Segment(0.0, 1.0, "a")], 2.0, [])
        assert transcribe(Canned("[0.00]a[1.00]"), [form], timestamps="word") == [one]
    two = transcribe(Canned("a", "b"), list(forms[1:3]))
    assert [t.text for t in two] == ["a", "b"]
    assert transcribe(Canned(), []) == []
    with pytest.raises(UsageError, match="timestamps is 'words'; expected one of none"):
        transcribe(Canned(), tone(1.0), "words")
    with pytest.raises(InputError, match=r"gone\.wav: no such file"):
        transcribe(Canned(), str(tmp_path / "gone.wav"))


def test_warnings_of_windows_are_joined():
    """A warning of all windows is reported once, with its first window."""
    unfamiliar = Reply("a", None, [], "stop", ("unlike what the model knows",))
    model = Canned(unfamiliar, "b", unfamiliar)
    transcript = transcribe(model, speech(24, 8.5, 17.0), window_seconds=10)
    end = len(model.requests[0].audio[0]) / RATE
    assert transcript.problems == [
        f"0.00-{end:.2f} s and 1 other window(s): unlike what the model knows"
    ]


def test_an_answer_that_ends_before_the_speech_is_named():
    """The second window's; its words begin at 1, 2, ... s."""
    words = [Word(n + 1.0, n + 1.5, word, 1.0) for n, word in enumerate("abcdef")]
    early = Reply("[1.00]a[1.50]", None, [], "stop", heard=(words,))
    whole = Reply("[1.00]a b c d e f[6.50]", None, [], "stop", heard=(words,))
    untimed = dataclasses.replace(early, text="a")
    model = Canned(whole, early, untimed)
    (transcript,) = transcribe(model, [speech(24, 8.5, 17.0)], "sentence", window_seconds=10)
    first, second, _ = (len(request.audio[0]) / RATE for request in model.requests)
    ended = "the answer ended, but more is said from"
    assert transcript.problems == [
        f"{first:.2f}-{first + second:.2f} s: {ended} {first + 2:.2f} s on",
        f"{first + second:.2f}-24.00 s: no times in 'a'",
        f"{first + second:.2f}-24.00 s: {ended} {first + second + 2:.2f} s on",
    ]
    assert transcript.stopped_at == pytest.approx(first + 2)


@pytest.mark.parametrize("timestamps", ["none", "sentence"])
def test_what_is_no_speech_is_no_text(timestamps):
    """The sentence that says so, and stamps without words."""
    nothing = "" if timestamps == "none" else "[0.99]"
    words = [Word(n + 1.0, n + 1.5, word, 1.0) for n, word in enumerate("abcdef")]
    over = Reply(NO_SPEECH, None, [], "stop", heard=(words,))
    (silent, missed, some) = transcribe(
        Canned(NO_SPEECH, over, "hello", nothing),
        [speech(4), speech(8), speech(24, 12.0)],
        timestamps,
        window_seconds=14,
    )
    assert (silent.text, silent.segments, silent.problems) == ("", [], ["no words were found"])
    assert (missed.text, missed.segments, missed.stopped_at) == ("", [], 1.0)
    assert "0.00-8.00 s: the answer ended, but more is said from 1.00 s on" in missed.problems
    assert (some.text, [each.text for each in some.segments]) == ("hello", ["hello"])
    assert "no words were found" not in some.problems


@pytest.mark.parametrize("timestamps", ["none", "word"])
def test_speech_that_goes_on_is_told_from_silence_and_music(timestamps):
    """Scenes of the world and the small model, which is stopped before the second of two people."""
    model = MossAudio.load(dtype="float32")
    two, band = (mj.load_audio(DEMO / f"{name}.flac") for name in ("two_people", "trumpet_band"))
    clips = [two, np.concatenate([two, np.zeros(3 * RATE, "f4")]), band]
    for transcript in transcribe(model, clips, timestamps):
        assert transcript.problems in ([], ["no words were found"])  # in the music
        assert transcript.stopped_at is None
    for transcript in transcribe(model, clips[:2], timestamps, sampling=Sampling(stop=("my",))):
        assert transcript.text.endswith("desert")
        (problem,) = (p for p in transcript.problems if "no times" not in p)
        assert "the answer ended, but more is said from" in problem
        assert transcript.stopped_at == pytest.approx(2.7, abs=0.2)


def test_without_timestamps_each_window_is_a_segment():
    model = Canned("hello", "", "world")
    sampling = Sampling(temperature=0.5)
    (transcript,) = transcribe(
        model, [speech(24, 8.5, 17.0)], "none", window_seconds=10, sampling=sampling
    )
    assert transcript.text == "hello world"
    assert [s.text for s in transcript.segments] == ["hello", "world"]
    assert transcript.segments[1].end == pytest.approx(24)
    assert model.samplings == [sampling] * 3


def test_windows_that_cannot_be():
    with pytest.raises(UsageError, match="at least 1 s"):
        transcribe(Canned(), [speech(2)], window_seconds=0.5)

    def refuse(request):
        raise InputError("too long")

    model = types.SimpleNamespace(prepare=refuse)
    for one in (speech(2), [speech(2)]):
        with pytest.raises(InputError, match=r"^0\.00-2\.00 s: too long"):
            transcribe(model, one)
    with pytest.raises(InputError, match=r"^clip 1: 0\.00-2\.00 s: too long"):
        transcribe(model, [speech(2), speech(3)])
    for nothing in (np.zeros(0, "f4"), np.zeros(100, "f4")):
        with pytest.raises(InputError, match="has no sound"):
            transcribe(Canned(), nothing)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("transcribe") / "toy")


def test_end_to_end_in_windows(files):
    """The toy model gives the same answer for each window as alone."""
    model = MossAudio.load(files, dtype="float32")
    wav = np.concatenate([tone(2.0), np.zeros(RATE, "f4"), tone(2.0, 300)])
    sampling = Sampling(max_new_tokens=8)
    (transcript,) = transcribe(model, [wav], window_seconds=4, sampling=sampling)
    cut = round(transcript.segments[0].end * RATE)
    assert 2 * RATE < cut < 3 * RATE
    alone = [
        model.generate(TRANSCRIBE["none"], part, max_new_tokens=8).text
        for part in (wav[:cut], wav[cut:])
    ]
    assert transcript.text == " ".join(alone)
    assert alone[0] != alone[1]


def test_written_forms_hold_the_same_times(run_main):
    """Every format, from one canned answer, read back."""
    model_answer = "[0.50]one & two[1.25][1.50]three[2.00]"
    out = {
        form: run_main(model_answer, "--timestamps", "sentence", "--format", form)
        for form in ("text", "json", "srt", "vtt", "textgrid")
    }
    expected = [Segment(0.5, 1.25, "one & two"), Segment(1.5, 2.0, "three")]
    assert parse_timestamps(out["text"]) == expected
    assert [Segment(**row) for row in json.loads(out["json"])] == expected
    assert "00:00:00,500 --> 00:00:01,250\none & two\n" in out["srt"]
    assert "00:00:01.500 --> 00:00:02.000\nthree\n" in out["vtt"]
    assert out["vtt"].startswith("WEBVTT\n")
    assert "xmax = 3\n" in out["textgrid"]  # the sound's length, not the last word's end
    assert 'text = "three"' in out["textgrid"]
    assert run_main("just words", "--timestamps", "none", "--format", "text") == "just words\n"


@pytest.fixture
def run_main(monkeypatch, capsys, tmp_path):
    """main() on 3 s of sound with a canned answer -> stdout."""
    from moss_audio_jax import cli, command

    soundfile.write(tmp_path / "a.wav", tone(3.0), RATE)

    def run(answer: str, *options: str) -> str:
        monkeypatch.setattr(command, "load_model", lambda args: Canned(answer))
        argv = ["transcribe", "--checkpoint", "x", "--audio", str(tmp_path / "a.wav"), *options]
        assert cli.main(argv) == 0
        return capsys.readouterr().out

    return run
