"""Labels compared with the sound, by plain signal processing."""

import collections
import itertools

import numpy as np
import pytest
from world_helpers import RATE, envelope, needs_espeak, pitch, strikes

from moss_audio_jax import world
from moss_audio_jax.draw import Draw
from moss_audio_jax.world import espeak, grammar, instruments, mandarin, music, sounds
from moss_audio_jax.world.dsp import median_f0
from moss_audio_jax.world.speakers import FEMALE, HELD_OUT_VOICES, MALE, draw_speaker


def clean_scenes(content, count, split="train"):
    """Scenes without room, noise, line and whispers, at a level that 16 bits show well."""
    index = found = 0
    while found < count:
        made = world.scene(index, split, 0, content)
        labels, index = made.labels, index + 1
        if labels["room"] or labels["background"] or labels["band"]:
            continue
        if labels["loudness"]["level"] == "quiet" or any(
            speaker["whispered"] for speaker in labels["speakers"]
        ):
            continue
        found += 1
        yield made


@pytest.fixture(scope="module")
def speech_scenes():
    return list(clean_scenes("speech", 30))


@pytest.fixture(scope="module")
def music_scenes():
    return list(clean_scenes("music", 40))


# --- speech --------------------------------------------------------------------------------------


@needs_espeak
def test_word_onsets_against_energy(speech_scenes):
    """Words after a gap: the sound begins within 20 ms of the label."""
    errors, words = [], 0
    for made in speech_scenes:
        level = envelope(made.wav)
        for sentence in made.labels["sentences"]:
            span = level[int(1000 * sentence["start"]) : int(1000 * sentence["end"])]
            heard = level > span.max() * 10 ** (-40 / 20)
            before = 0.0
            for word in sentence["words"]:
                words += 1
                gap, before = min(word["start"] - before, 0.1), word["end"]
                start = round(1000 * word["start"])
                if gap >= 0.025:
                    at = start - round(500 * gap)  # from the middle of the gap on
                    while not heard[at : at + 5].all():
                        at += 1
                    errors.append(at - start)
    errors = np.abs(errors)
    print(
        f"{len(errors)} of {words} words follow a gap: mean {errors.mean():.1f} ms, "
        f"50/90/95/99% {np.percentile(errors, [50, 90, 95, 99])}"
    )
    assert len(errors) > 60
    assert errors.mean() < 5
    assert np.percentile(errors, 95) < 20


@needs_espeak
def test_words_touch_no_silence(speech_scenes):
    """Each word sounds, at its beginning, its end and most of the time between."""
    for made in speech_scenes:
        level = envelope(made.wav)
        for sentence in made.labels["sentences"]:
            text = [word["text"] for word in sentence["words"]]
            joint = "" if made.labels["language"] == "zh" else " "
            assert joint.join(text) == sentence["text"]
            ends = 0.0
            floor = level.max() * 10 ** (-60 / 20)
            for word in sentence["words"]:
                assert ends <= word["start"]
                ends = word["end"]
                first, last = round(1000 * word["start"]), round(1000 * word["end"])
                assert (level[first:last] > floor).mean() > 0.4, word
                assert level[first : first + 12].max() > floor, word
                assert level[last - 12 : last].max() > floor, word


@needs_espeak
def test_voices_are_pitched_as_labelled():
    """Low, medium and high do not overlap within a sex; men are lower than women."""
    units = ("seven", "lemons", "are", "on", "the", "table", "in", "the", "morning")
    drawn = [draw_speaker(Draw("pitch", i), "en", held_out=i % 2 == 1) for i in range(160)]
    said = [espeak.Utterance(units, s.espeak_voice, s.rate, s.tone, s.range) for s in drawn]
    spoken = [one for i in range(0, 160, 40) for one in espeak.speak(said[i : i + 40])]
    found, seconds = collections.defaultdict(list), collections.defaultdict(list)
    for i, (speaker, one) in enumerate(zip(drawn, spoken, strict=True)):
        assert speaker.voice in (MALE if speaker.sex == "male" else FEMALE)
        assert (speaker.voice in HELD_OUT_VOICES) == (i % 2 == 1)
        seconds[speaker.speed].append(len(one.wav) / RATE)
        if not speaker.whispered:
            found[speaker.sex, speaker.pitch].append(median_f0(one.wav))
    print({key: np.percentile(hertz, [0, 50, 100]).round() for key, hertz in sorted(found.items())})
    for sex in ("male", "female"):
        low, medium, high = (found[sex, name] for name in ("low", "medium", "high"))
        assert np.percentile(low, 90) < np.percentile(medium, 10)
        assert np.percentile(medium, 90) < np.percentile(high, 10)
    assert np.median(found["female", "low"]) > 1.2 * np.median(found["male", "medium"])
    assert max(seconds["fast"]) < min(seconds["normal"])
    assert max(seconds["normal"]) < min(seconds["slow"])


@needs_espeak
def test_f0_label():
    """The voice of a long vowel: the label's method against the highest autocorrelation peak."""
    for voice, low, high in (("en+m3", 60, 250), ("en+f1", 90, 450)):
        spoken = espeak.speak([espeak.Utterance(("are", "you", "all", "in"), voice, 110, 50, 0)])[0]
        middle = spoken.words[2]
        vowel = spoken.wav[middle.start + 800 : middle.start + 2400]
        assert median_f0(spoken.wav) == pytest.approx(pitch(vowel, low, high), rel=0.08)


@needs_espeak
def test_every_character_and_word_can_be_said():
    """Each word of the vocabulary gets its own bounds."""
    words = grammar.vocabulary()
    said = [
        espeak.Utterance(tuple(words[i : i + 12]), voice, 200, 50, 50)
        for i in range(0, len(words), 12)
        for voice in ("en+m1", "en-us+f2", "en-gb-scotland+m5")
    ]
    lines = [mandarin.sentence(Draw("say", i), "grammatical") for i in range(300)]
    lines += sorted({word for words in mandarin.SLOTS.values() for word in words})
    said += [espeak.Utterance(tuple(line), "cmn+f1", 200, 50, 50, True) for line in lines]
    for i in range(0, len(said), 40):
        for utterance, spoken in zip(said[i : i + 40], espeak.speak(said[i : i + 40]), strict=True):
            assert tuple(word.text for word in spoken.words) == utterance.units
            assert all(word.stop - word.start >= 160 for word in spoken.words), utterance


def test_vocabulary_is_used():
    used, characters = collections.Counter(), collections.Counter()
    for i in range(12_000):
        draw = Draw("vocabulary", i)
        used.update(grammar.sentence(draw, draw.weighted(grammar.ORDERS)).split())
        characters.update(mandarin.sentence(draw, draw.weighted(grammar.ORDERS)))
    assert set(used) <= set(grammar.vocabulary())
    assert sum(count >= 5 for count in used.values()) >= 1000
    assert set(characters) <= set(mandarin.characters())
    assert len(characters) >= 300


# --- sounds --------------------------------------------------------------------------------------


def test_event_bounds_against_energy():
    """Events that stand alone: sound within 20 ms of the start and the end, none before."""
    kinds = set()
    for made in clean_scenes("sound", 60):
        labels = made.labels
        if labels["overlap"]:
            continue
        level = envelope(made.wav)
        for event in labels["events"]:
            kinds.add(event["kind"])
            first, last = round(1000 * event["start"]), round(1000 * event["end"])
            # It begins and ends where a sample reaches -40 dB of its loudest 5 ms.
            floor = level[first:last].max() * 10 ** (-40 / 20)
            assert level[first : first + 20].max() > 0.2 * floor, event
            assert level[last - 20 : last].max() > 0.2 * floor, event
            assert level[max(first - 60, 0) : first - 4].max(initial=0) < floor / 20, event
    assert len(kinds) > 20


@pytest.mark.parametrize("kind", ["knock", "clap", "hammer", "clock", "footsteps", "bell", "alarm"])
def test_units_are_counted_right(kind):
    """Strikes found in the sound are the labelled ones, within 20 ms."""
    for i in range(12):
        made = sounds.make(kind, Draw("units", kind, i))
        wav = np.concatenate([np.zeros(3200), made.wav, np.zeros(1600)])
        expected = [0.2 + onset / RATE for onset in made.onsets]
        found = strikes(wav)
        assert len(found) == len(expected), (kind, i, found, expected)
        assert np.abs(np.subtract(found, expected)).max() < 0.02, (kind, i)


def test_kinds_vary_and_differ():
    """Two of a kind differ; a nearest-centroid rule on mean spectra tells most kinds apart."""

    def features(kind, i):
        wav = sounds.make(kind, Draw("kinds", kind, i)).wav
        wav = np.pad(wav, (0, max(0, 8000 - len(wav))))
        bands = np.abs(np.fft.rfft(wav))[: len(wav) // 2]
        edges = np.geomspace(20, len(bands) - 1, 25).astype(int)
        spectrum = np.log(np.array([bands[a : b + 1].mean() for a, b in itertools.pairwise(edges)]))
        level = envelope(wav, 160)
        spikes = np.log(level.max() / (level.mean() + 1e-9))
        return np.append(spectrum - spectrum.mean(), [2 * spikes, np.log(len(wav))])

    assert len(sounds.KINDS) >= 24
    centroids = {k: np.mean([features(k, i) for i in range(8)], axis=0) for k in sounds.KINDS}
    right = total = 0
    for kind in sounds.KINDS:
        first, second = features(kind, 100), features(kind, 101)
        assert np.abs(first - second).max() > 0.01
        for found in (first, second):
            nearest = min(centroids, key=lambda k: np.abs(centroids[k] - found).sum())
            right += nearest == kind
            total += 1
    print(f"nearest centroid: {right} of {total}")
    assert right / total > 0.75


# --- music ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*instruments.MELODIC, "bass"])
def test_notes_have_their_pitch(name):
    play = instruments.MELODIC.get(name, instruments.bass)
    for midi in (40, 45) if name == "bass" else (57, 64, 69, 76, 81):
        hertz = 440 * 2 ** ((midi - 69) / 12)
        wav = play(Draw("note", midi), hertz, 0.5)[1200:6800]
        cents = 1200 * np.log2(pitch(wav, hertz / 1.4, hertz * 1.4) / hertz)
        assert abs(cents) < 25, (name, midi)


def test_melody_notes_in_scenes(music_scenes):
    """A melody played alone: each note's pitch in the mixed sound, and its key's scale."""
    checked = 0
    for made in music_scenes:
        labels = made.labels["music"]
        if len(labels["parts"]) > 1:
            continue
        tonic = music.TONICS.index(labels["tonic"])
        scale = {(tonic + step) % 12 for step in music.SCALES[labels["mode"]]}
        assert labels["notes"][-1]["midi"] % 12 == tonic
        for note in labels["notes"]:
            assert note["midi"] % 12 in scale
            hertz = 440 * 2 ** ((note["midi"] - 69) / 12)
            first, last = round(RATE * note["start"]), round(RATE * note["end"])
            wav = made.wav[first + (last - first) // 3 : last - (last - first) // 6]
            cents = 1200 * np.log2(pitch(wav, hertz / 1.4, hertz * 1.4) / hertz)
            assert abs(cents) < 40, (made.labels["id"], note, cents)
            checked += 1
    assert checked > 30


def test_tempo_from_onsets(music_scenes):
    """The period at which rises of the level repeat, from 50 to 200 beats per minute."""
    right = total = 0
    for made in music_scenes:
        labels = made.labels["music"]
        if "drums" not in labels["parts"]:
            continue
        level = np.log(envelope(made.wav, 160) + 1e-3 * np.abs(made.wav).max())
        rise = np.maximum(level[10:] - level[:-10], 0)
        rise -= rise.mean()

        def strength(tempo, rise=rise):
            lag = 60_000 / tempo
            return sum(np.mean(rise[round(k * lag) :] * rise[: -round(k * lag)]) for k in (1, 2, 3))

        tempi = np.arange(50, 200, 0.5)
        best = tempi[np.argmax([strength(tempo) for tempo in tempi])]
        # Rises repeat at half and at double the tempo too.
        ratio = min((abs(np.log(best / (labels["tempo"] * f))), f) for f in (0.5, 1, 2))[0]
        right += ratio < 0.03
        total += 1
        gaps = np.diff(labels["beats"])
        assert np.allclose(gaps, 60 / labels["tempo"], atol=0.002)
    print(f"tempo found: {right} of {total}")
    assert total > 8
    assert right / total > 0.8
