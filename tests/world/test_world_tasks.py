"""Every answer of every task, derived again from the labels by separate code."""

import collections
import json
import re

import pytest
from world_helpers import needs_espeak

from moss_audio_jax import world
from moss_audio_jax.data.records import parse_row
from moss_audio_jax.text.labels import KINDS
from moss_audio_jax.text.timestamps import parse
from moss_audio_jax.world import describe

KIND = {kind.label: name for name, kind in KINDS.items()}
CLAUSE = {kind.clause: name for name, kind in KINDS.items()}
UNIT = {kind.unit[1]: name for name, kind in KINDS.items() if kind.unit}


def spans(labels, kind):
    return [(e["start"], e["end"]) for e in labels["events"] if e["kind"] == kind]


def starts(labels):
    """kind -> its first start, in order."""
    first = {}
    for event in sorted(labels["events"], key=lambda e: e["start"]):
        first.setdefault(event["kind"], event["start"])
    return first


def words(labels):
    return [word for sentence in labels["sentences"] for word in sentence["words"]]


def units(labels, kind):
    return sum(len(e["onsets"]) for e in labels["events"] if e["kind"] == kind)


def named_kind(question):
    """The kind of sound that a question names, by label or by clause."""
    for table in (KIND, CLAUSE):
        found = [name for text, name in table.items() if re.search(rf"\b{text}\b", question)]
        if found:
            return max(found, key=lambda name: len(KINDS[name].label))
    raise AssertionError(question)


def read_spans(answer):
    return [(float(a), float(b)) for a, b in re.findall(r"(\d+\.\d\d) - (\d+\.\d\d)", answer)]


def close(found, expected):
    assert len(found) == len(expected)
    for pair, truth in zip(found, expected, strict=True):
        assert pair == pytest.approx(truth, abs=0.0051)


def person(labels, sentence):
    sex = labels["speakers"][sentence["speaker"]]["sex"]
    return {"male": "man", "female": "woman"}[sex]


def active(labels, time):
    found = {KINDS[e["kind"]].label for e in labels["events"] if e["start"] <= time <= e["end"]}
    found |= {
        f"{person(labels, s)} speaking"
        for s in labels["sentences"]
        if s["start"] <= time <= s["end"]
    }
    music = labels["music"]
    if music and music["start"] <= time <= music["end"]:
        found.add(f"{music['parts'][0]} music playing")
    return found


def check_asr(labels, question, answer):
    joint = "" if labels["language"] == "zh" else " "
    said = joint.join(w["text"] for w in words(labels))
    assert answer == (said or "There is no speech.")


def check_stamps(items):
    def check(labels, question, answer):
        parsed = parse(answer)
        assert parsed.format == "stamps"
        assert not parsed.unread
        truth = items(labels)
        assert [s.text for s in parsed.segments] == [t["text"] for t in truth]
        close([(s.start, s.end) for s in parsed.segments], [(t["start"], t["end"]) for t in truth])

    return check


def check_events(labels, question, answer):
    parsed = parse(answer)
    assert parsed.format == "events"
    assert not parsed.unread
    assert [s.start for s in parsed.segments] == sorted(s.start for s in parsed.segments)
    truth = [(e["start"], e["end"], KINDS[e["kind"]].label) for e in labels["events"]]
    truth += [(s["start"], s["end"], f"{person(labels, s)} speaking") for s in labels["sentences"]]
    if music := labels["music"]:
        truth.append((music["start"], music["end"], f"{music['parts'][0]} music playing"))
    found = sorted((s.text, s.start, s.end) for s in parsed.segments)
    expected = sorted((name, start, end) for start, end, name in truth)
    assert [f[0] for f in found] == [e[0] for e in expected]
    close([f[1:] for f in found], [e[1:] for e in expected])


def check_caption(labels, question, answer):
    """Checks that a caption names everything in the scene and nothing else."""
    for clause, kind in CLAUSE.items():
        named = re.search(rf"(?i)(^|[,.] |then |while ){clause}\b", answer) is not None
        assert named == bool(spans(labels, kind)), (clause, answer)
    for sentence in labels["sentences"]:
        assert f'"{sentence["text"]}"' in answer
    music = labels["music"]
    assert ("beats per minute" in answer) == (music is not None)
    if music:
        assert f"{music['tonic']} {music['mode']} at {music['tempo']:.0f} beats" in answer
        assert all(part in answer for part in music["parts"])


def check_speech_caption(labels, question, answer):
    at = 0
    for number, speaker in enumerate(labels["speakers"]):
        said = [s["text"] for s in labels["sentences"] if s["speaker"] == number]
        at = answer.index({"male": "man", "female": "woman"}[speaker["sex"]], at)
        for text in said:
            at = answer.index(f'"{text}"', at)
        assert f"{speaker['speed']} speed" in answer
        assert speaker["whispered"] or f"{speaker['pitch']} voice" in answer


def check_profile(labels, question, answer):
    found, speaker = json.loads(answer), labels["speakers"][0]
    assert found["gender"] == speaker["sex"]
    assert found["pitch"] == (None if speaker["whispered"] else speaker["pitch"])
    assert found["volume"] == labels["loudness"]["level"]
    assert (found["speed"], found["accent"]) == (speaker["speed"], speaker["accent"])
    assert (found["texture"] == "whispered") == speaker["whispered"]


def check_time_what(labels, question, answer):
    time = float(re.search(r"(\d+\.\d)", question)[1])
    found = set(re.split(r", | and ", answer)) if answer != "nothing" else set()
    assert (
        found == active(labels, time) == active(labels, time - 0.14) == active(labels, time + 0.14)
    )


def check_time_when(labels, question, answer):
    if "music" in question:
        return close(read_spans(answer), [(labels["music"]["start"], labels["music"]["end"])])
    return close(read_spans(answer), spans(labels, named_kind(question)))


def check_word_when(labels, question, answer):
    word = re.search(r'"(.+)"', question)[1]
    close(read_spans(answer), [(w["start"], w["end"]) for w in words(labels) if w["text"] == word])


def check_word_what(labels, question, answer):
    time = float(re.search(r"(\d+\.\d+)", question)[1])
    assert [w["text"] for w in words(labels) if w["start"] < time < w["end"]] == [answer]


def check_count(labels, question, answer):
    unit, label = re.search(r"(\w+) \((.+)\)", question).groups()
    assert KINDS[KIND[label]].unit[1] == unit
    assert int(answer) == units(labels, KIND[label]) > 0


def check_order_first(labels, question, answer):
    pair = re.search(r"first: (.+) or (.+)\?", question).groups()
    assert answer == min(pair, key=lambda label: starts(labels)[KIND[label]])


def check_order_next(labels, question, answer):
    order = list(starts(labels))
    label = re.search(r"after (.+) has begun", question)[1]
    assert order.index(KIND[answer]) == order.index(KIND[label]) + 1


def check_overlap(labels, question, answer):
    pair = re.search(r"Do (.+) and (.+) ever", question).groups()
    together = any(
        a < d and c < b
        for a, b in spans(labels, KIND[pair[0]])
        for c, d in spans(labels, KIND[pair[1]])
    )
    assert answer == ("yes" if together else "no")


def check_present(labels, question, answer):
    assert answer == ("yes" if spans(labels, named_kind(question)) else "no")


def check_silence(labels, question, answer):
    [(start, end)] = read_spans(answer)
    longest = max(labels["silence"], key=lambda s: s["end"] - s["start"])
    close([(start, end)], [(longest["start"], longest["end"])])
    for step in range(1, 10):
        assert not active(labels, start + (end - start) * step / 10)


def thought(labels, answer):
    """The reasoning and the answer; checks the sums in it."""
    chain, final = re.fullmatch(r"<think>\n(.+)\n</think>\n\n(.+)", answer, re.DOTALL).groups()
    for left, op, right, result in re.findall(r"([\d.]+) ([-+/]) ([\d.]+) = ([\d.]+\d)", chain):
        a, b = float(left), float(right)
        value = {"-": a - b, "+": a + b, "/": a / b}[op]
        assert float(result) == pytest.approx(value, abs=0.0051)
    for label, start, end in re.findall(r"(?m)^(.+): (\d+\.\d\d) - (\d+\.\d\d)", chain):
        kind = KIND[next(name for name in KIND if name.lower() == label.lower())]
        close([(float(start), float(end))], [spans(labels, kind)[0]])
    for unit, listed, count in re.findall(r"(?m)^(.+) at ([\d., ]+): (\d+)\.$", chain):
        kind = UNIT[unit.lower()]
        onsets = [o for e in labels["events"] if e["kind"] == kind for o in e["onsets"]]
        times = [float(time) for time in listed.split(", ")]
        assert times == pytest.approx(onsets, abs=0.0051)
        assert int(count) == len(times)
    return chain, final


def check_reason_gap(labels, question, answer):
    first, second = re.search(r"end of (.+) and the start of (.+)\?", question).groups()
    gap = spans(labels, KIND[second])[0][0] - spans(labels, KIND[first])[0][1]
    assert float(thought(labels, answer)[1]) == pytest.approx(gap, abs=0.0101)


def check_reason_longest(labels, question, answer):
    best = max(labels["events"], key=lambda e: e["end"] - e["start"])
    assert thought(labels, answer)[1] == KINDS[best["kind"]].label


def check_reason_more(labels, question, answer):
    pair = re.search(r"more (\w+) or more (\w+)", question).groups()
    assert thought(labels, answer)[1] == max(pair, key=lambda unit: units(labels, UNIT[unit]))


def check_reason_sum(labels, question, answer):
    pair = re.search(r"many (\w+) and (\w+) are", question).groups()
    assert int(thought(labels, answer)[1]) == sum(units(labels, UNIT[unit]) for unit in pair)


def check_reason_before(labels, question, answer):
    label = re.search(r"Does (.+) begin", question)[1]
    first = spans(labels, KIND[label])[0][0]
    truth = "before" if first < words(labels)[0]["start"] else "after"
    assert thought(labels, answer)[1] == truth


def check_reason_word(labels, question, answer):
    label = re.search(r"when (.+) begins", question)[1]
    at = spans(labels, KIND[label])[0][0]
    assert thought(labels, answer)[1] in [
        w["text"] for w in words(labels) if w["start"] < at < w["end"]
    ]


def check_reason_sentence(labels, question, answer):
    counts = {s["text"]: len(s["text"].split()) for s in labels["sentences"]}
    assert counts[thought(labels, answer)[1]] == max(counts.values())


def check_reason_faster(labels, question, answer):
    pace = {"slow": 0, "normal": 1, "fast": 2}
    best = max(labels["speakers"], key=lambda s: pace[s["speed"]])
    assert thought(labels, answer)[1] == ("the man" if best["sex"] == "male" else "the woman")


def speaker(key):
    return lambda labels: labels["speakers"][0][key]


def fact(value):
    """A check that the answer is value(labels) as text."""

    def check(labels, question, answer):
        assert answer == str(value(labels))

    return check


def yes(value):
    return fact(lambda labels: "yes" if value(labels) else "no")


def check_reason_beats(labels, question, answer):
    chain, final = thought(labels, answer)
    found = re.findall(r"(\d+): (\d+\.\d\d)", chain)
    assert [int(number) for number, _ in found] == list(range(1, int(final) + 1))
    beats = labels["music"]["beats"]
    assert [float(time) for _, time in found] == pytest.approx(beats, abs=0.0051)


CHECKS = {
    "asr": check_asr,
    "asr_sentences": check_stamps(lambda labels: labels["sentences"]),
    "asr_words": check_stamps(words),
    "events": check_events,
    "caption": check_caption,
    "caption_speech": check_speech_caption,
    "caption_speech_json": check_profile,
    "caption_sound": lambda labels, q, a: check_caption(
        labels | {"music": None, "sentences": []}, q, a
    ),
    "caption_music": lambda labels, q, a: check_caption(
        labels | {"events": [], "sentences": []}, q, a
    ),
    "time_what": check_time_what,
    "time_when": check_time_when,
    "word_when": check_word_when,
    "word_what": check_word_what,
    "count": check_count,
    "count_kinds": fact(lambda labels: len({e["kind"] for e in labels["events"]})),
    "count_speakers": fact(lambda labels: len({s["speaker"] for s in labels["sentences"]})),
    "count_words": fact(lambda labels: sum(len(s["text"].split()) for s in labels["sentences"])),
    "order": fact(lambda labels: ", ".join(KINDS[kind].label for kind in starts(labels))),
    "order_first": check_order_first,
    "order_next": check_order_next,
    "overlap": check_overlap,
    "present": check_present,
    "absent": check_present,
    "any_speech": yes(words),
    "any_music": yes(lambda labels: labels["music"]),
    "speaker_sex": fact(speaker("sex")),
    "speaker_speed": fact(speaker("speed")),
    "speaker_pitch": fact(speaker("pitch")),
    "speaker_tone": fact(speaker("intonation")),
    "speaker_accent": fact(speaker("accent")),
    "speaker_whisper": yes(speaker("whispered")),
    "who_said": lambda labels, q, a: fact(
        lambda labels: next(
            f"the {person(labels, s)}" for s in labels["sentences"] if f'"{s["text"]}"' in q
        )
    )(labels, q, a),
    "language": fact(lambda labels: {"en": "English", "zh": "Mandarin"}[labels["language"]]),
    "tempo": fact(lambda labels: round(labels["music"]["tempo"])),
    "pace": fact(
        lambda labels: (
            "slow"
            if labels["music"]["tempo"] < 90
            else "fast"
            if labels["music"]["tempo"] > 126
            else "moderate"
        )
    ),
    "key": fact(lambda labels: f"{labels['music']['tonic']} {labels['music']['mode']}"),
    "mode": fact(lambda labels: labels["music"]["mode"]),
    "instrument": fact(lambda labels: labels["music"]["parts"][0]),
    "instruments": fact(lambda labels: ", ".join(labels["music"]["parts"])),
    "drums": yes(lambda labels: any(n["midi"] is None for n in labels["music"]["notes"])),
    "loudness": fact(lambda labels: labels["loudness"]["level"]),
    "background": fact(lambda labels: labels["background"]["kind"]),
    "silence": check_silence,
    "reason_gap": check_reason_gap,
    "reason_longest": check_reason_longest,
    "reason_more": check_reason_more,
    "reason_sum": check_reason_sum,
    "reason_before": check_reason_before,
    "reason_word": check_reason_word,
    "reason_sentence": check_reason_sentence,
    "reason_faster": check_reason_faster,
    "reason_beat": lambda labels, q, a: fact(
        lambda labels: f"{240 / round(labels['music']['tempo']):.2f}"
    )(labels, q, thought(labels, a)[1]),
    "reason_beats": check_reason_beats,
}


def check_rows(labels, seen, draws=1):
    answers = collections.defaultdict(list)  # question -> (task, answer), for the choices
    choices = []
    made = world.rows(labels, "wav/a.wav", draws)
    for row in made:
        parsed = parse_row(json.dumps(row).encode())
        assert parsed.clips == ("wav/a.wav",)
        assert parsed.id == row["id"]
        question, answer = (message["content"] for message in row["conversation"][1:])
        assert answer == answer.strip() != ""
        seen[row["task"]].add(question)
        if row["task"].startswith("choice"):
            choices.append((row["task"], question, answer))
        else:
            CHECKS[row["task"]](labels, question, answer)
            answers[question].append(answer)
    for task, question, answer in choices:
        options = dict(re.findall(r"(?m)^([A-D])\. (.+)$", question))
        assert len(set(options.values())) == len(options) >= 3
        stem = question.split("\nA. ")[0]
        if task == "choice_letter":
            assert not set(options) & {option.upper() for option in options.values()}
            assert stem.startswith("Choose the most suitable answer from options A, B, C, and D")
            assert len(options) == 4
            stem, answer = stem.split("\nQuestion: ")[1], options[answer]
        assert answer in options.values()
        if stem == "Which of these sounds is heard?":
            assert [o for o in options.values() if spans(labels, KIND[o])] == [answer]
        else:
            assert answers[stem] == [answer]
    assert len({row["id"] for row in made}) == len(made)


def test_rows_of_sounds_and_music():
    seen = collections.defaultdict(set)
    for content in ("sound", "music", "sound+music", "silence"):
        for index in range(40):
            check_rows(world.scene(index, content=content).labels, seen)
    assert {"reason_more", "order", "tempo", "overlap", "silence"} <= set(seen)


@needs_espeak
def test_rows_of_everything():
    seen = collections.defaultdict(set)
    for index in range(130):
        check_rows(world.scene(index, "test", 5).labels, seen)
    for index in range(70):
        check_rows(world.scene(index, "train", 5, "speech+sound").labels, seen)
    assert set(CHECKS) | {"choice_letter", "choice_text"} == set(seen)
    for task in ("asr", "asr_words", "events", "caption", "time_what", "time_when"):
        assert len(seen[task]) >= 3  # phrasings


def test_questions_drawn_again_are_others():
    once, often = [], []
    for index in range(30):
        labels = world.scene(index, content="sound+music").labels
        check_rows(labels, collections.defaultdict(set), draws=3)
        first, more = world.rows(labels, "a.wav"), world.rows(labels, "a.wav", 3)
        assert more[: len(first)] == first
        said = [[message["content"] for message in row["conversation"]] for row in more]
        assert len({tuple(each) for each in said}) == len(said)
        once += first
        often += more
    assert 1.2 * len(once) < len(often) < 3 * len(once)


def check_written(labels, seen):
    row = world.written(labels)
    parsed = parse_row(json.dumps(row).encode())
    assert parsed.clips == ()
    assert parsed.task == "written"
    texts = [message["content"] for message in row["conversation"]]
    assert [m["role"] for m in row["conversation"]] == ["user", "assistant"] * (len(texts) // 2)
    notes = describe.notes(labels)
    for event in labels["events"]:
        assert f"{event['start']:.2f} - {event['end']:.2f}: {KINDS[event['kind']].label}" in notes
    for word in words(labels):
        assert f"[{word['start']:.2f}]{word['text']}[{word['end']:.2f}]" in notes
    for beat in labels["music"]["beats"] if labels["music"] else ():
        assert f"{beat:.2f}" in notes
    assert texts[0].startswith(notes + "\n")
    texts[0] = texts[0].removeprefix(notes + "\n")
    rows = world.rows(labels, "", draws=3)
    tasks = {each["conversation"][1]["content"]: each["task"] for each in rows}
    for question, answer in zip(texts[::2], texts[1::2], strict=True):
        if "\nA. " not in question:
            CHECKS[tasks[question]](labels, question, answer)
            seen[tasks[question]].add(answer)


@needs_espeak
def test_questions_about_a_scene_in_writing():
    seen = collections.defaultdict(set)
    for index in range(150):
        check_written(world.scene(index, "test", 5).labels, seen)
    assert {"asr_words", "word_when", "time_when", "reason_word", "reason_beats"} <= set(seen)
    assert sum(map(len, seen.values())) > 500


def test_drills_are_answered_by_their_own_text():
    kinds = collections.Counter()
    for index in range(300):
        row = world.drill(index, seed=3)
        assert row == world.drill(index, seed=3) != world.drill(index, seed=4)
        assert parse_row(json.dumps(row).encode()).task == "drill"
        listed = ""
        turns = [message["content"] for message in row["conversation"]]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            if question.startswith("Repeat: "):
                assert question == f"Repeat: {answer}"
                kinds["repeat"] += 1
                continue
            if calculated := re.fullmatch(r"(.+) - (.+)", question):
                end, start = map(float, calculated.groups())
                assert answer == f"{question} = {end - start:.2f}."
                kinds["differences"] += 1
                continue
            *lines, question = question.split("\n")
            listed = "\n".join(lines) or listed
            name = re.search(r'"(.+)"', question)[1]
            if question.startswith("When is the word"):
                start, end = answer.split(" - ")
                assert listed.count(f"]{name}[") == 1
                assert f"[{start}]{name}[{end}]" in listed
            else:
                assert f"{answer}: {name}" in listed.split("\n")
            kinds[question.split('"')[0]] += 1
    assert min(kinds.values()) > 100
    assert len(kinds) == 4


def test_rows_depend_on_the_labels_alone():
    labels = world.scene(3, content="sound+music").labels
    first = world.rows(labels, "a.wav")
    world.rows(world.scene(4, content="sound+music").labels, "a.wav")
    assert world.rows(json.loads(json.dumps(labels)), "a.wav") == first
