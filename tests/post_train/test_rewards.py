"""Single rewards: their values, their oracles, and that none is paid for a trick.

Whether a model learns from them is not tested here.
"""

import json
import math
import random
import re

import numpy as np
import pytest
import reward_rows
from reward_rows import ROWS, VOICE, hacks, row, said

from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.post_train import rewards
from moss_audio_jax.post_train.asked import Said, read
from moss_audio_jax.post_train.rewards import CONTENT, MANNER, by_judge, length

OF_ROW = {  # row -> the rewards that can pay for it
    "choice_letter": ("choice",),
    "choice_text": ("choice", "exact"),
    "asr": ("wer",),
    "asr_zh": ("wer",),
    "asr_words": ("aas",),
    "asr_sentences": ("aas",),
    "events": ("events",),
    "caption_speech_json": ("fields",),
    "count": ("number", "exact"),
    "tempo": ("number",),
    "time_when": ("number",),
    "present": ("exact",),
    "who_said": ("exact",),
    "reason_gap": ("number",),
    "reason_before": ("exact",),
}
PAIRS = [(name, reward) for name, given in OF_ROW.items() for reward in given]


def test_every_content_is_tried():
    assert OF_ROW.keys() == ROWS.keys()
    assert {reward for _, reward in PAIRS} == set(CONTENT)


@pytest.mark.parametrize(("name", "reward"), PAIRS)
def test_the_expected_answer_earns_all(name, reward):
    raw = ROWS[name]["conversation"][-1]["content"]
    for text in (raw, f"  {raw} \n"):
        assert CONTENT[reward](said(text), ROWS[name]).value == pytest.approx(1)
    for manner in MANNER.values():
        assert manner(said(raw), ROWS[name]).value == 1


@pytest.mark.parametrize(("name", "reward"), PAIRS)
def test_no_content_is_paid_for_a_trick(name, reward):
    paid = {}
    for trick, tried in hacks(ROWS[name]).items():
        found = CONTENT[reward](tried, ROWS[name])
        assert found.reason.strip()
        if found.value:
            paid[trick] = found
    assert not paid, paid


def test_manner_is_not_paid_without_an_answer():
    for each in ROWS.values():
        for trick in ("", "<think>\nLet me listen.\n</think>\n\n", "<think>\nnever closed"):
            for manner in (*MANNER.values(), length(100, 10)):
                assert manner(said(trick), each).value == 0


def test_exact():
    asked = ROWS["who_said"]
    for text, value in (("The Man.", 1), (" the  man", 1), ("man", 0), ("the man, I think", 0)):
        assert rewards.exact(said(text), asked).value == value
    assert rewards.exact(said("woman"), asked).reason == "'woman', expected 'the man'"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("C", 1),
        ("(c)", 1),
        ("C. bell ringing", 1),
        ("The answer is bell ringing.", 1),
        ("<think>\nA bell.\n</think>\n\nC", 1),
        ("B", 0),
        ("C. dog barking", 0),
        ("C or B", 0),
        ("E", 0),
    ],
)
def test_choice_is_the_strict_rule(text, value):
    assert rewards.choice(said(text), ROWS["choice_letter"]).value == value


def test_choices_may_stand_in_the_row():
    asked = row("choice", "What rings?", "a bell", choices=["a bell", "a phone"])
    assert rewards.choice(said("A"), asked).value == 1
    assert rewards.choice(said("a phone"), asked).value == 0
    with pytest.raises(InputError, match=r"row 'choice-1': 0 choice\(s\)"):
        rewards.choice(said("A"), row("choice", "What rings?", "a bell"))
    with pytest.raises(InputError, match="is none of the choices"):
        rewards.choice(said("A"), row("choice", "What rings?", "it", choices=["a bell", "a phone"]))


def test_a_letter_is_a_letter_beside_a_choice_of_that_text():
    asked = row("choice_letter", "What word?\nA. it\nB. a\nC. of", "A")
    for text, value in (("A", 1), ("A. it", 1), ("it", 1), ("B", 0), ("C", 0), ("A or B", 0)):
        assert rewards.choice(said(text), asked).value == value
    # Where the texts are asked for, it stays unclear.
    asked = row("choice_text", "What word?", "a", choices=["it", "a", "of"])
    with pytest.raises(InputError, match="is none of the choices"):
        rewards.choice(said("B"), asked)
    # A chord "A", not the first choice.
    with pytest.raises(InputError, match="is none of the choices"):
        rewards.choice(said("A"), row("choice", "What chord?", "A", choices=["C", "A", "G"]))


def test_wer_is_that_of_jiwer():
    jiwer = pytest.importorskip("jiwer", reason="the oracle; extra `test`")
    draw = random.Random(0)
    words = ["a", "cat", "dog", "sat", "on", "mat", "bell"]
    values = []
    for _ in range(200):
        true = [draw.choice(words) for _ in range(draw.randint(1, 10))]
        given = [draw.choice(words) if draw.random() < 0.2 else w for w in true]
        given = [w for w in given if draw.random() > 0.1] + draw.choices(
            words, k=draw.randint(0, 2)
        )
        if not given:
            continue
        found = rewards.wer(said(" ".join(given)), row("asr", "Write.", " ".join(true)))
        expected = 1 - min(jiwer.wer(" ".join(true), " ".join(given)), 1)
        assert found.value == pytest.approx(expected, abs=1e-12)
        values.append(found.value)
    assert 0.2 < np.mean(values) < 0.9


def test_wer_by_hand():
    found = rewards.wer(said("please put the video in the bag"), ROWS["asr"])
    assert found.value == pytest.approx(1 - 2 / 7)
    assert found.reason == "WER 29%: 2 sub, 0 del, 0 ins"
    assert rewards.wer(said("今天下雪"), ROWS["asr_zh"]).value == pytest.approx(0.75)
    assert rewards.wer(said("word " * 50), ROWS["asr"]).value == 0


def test_event_f1_is_that_of_sed_eval():
    sed_eval = pytest.importorskip("sed_eval", reason="the oracle; extra `test`")
    draw = random.Random(1)

    def timeline(events):
        return "\n".join(f"{start:.2f} - {end:.2f}: {label}" for start, end, label in events)

    def rows(events):
        return [
            {"event_onset": round(start, 2), "event_offset": round(end, 2), "event_label": label}
            for start, end, label in events
        ]

    values = []
    for _ in range(100):
        true = []
        for _ in range(draw.randint(1, 6)):
            start = draw.uniform(0, 8)
            true.append((start, start + draw.uniform(0.3, 2), draw.choice(reward_rows.SOUNDS)))
        given = [
            (max(s + draw.gauss(0, 0.15), 0), e + 0.2 + draw.gauss(0, 0.1), label)
            for s, e, label in true
            if draw.random() > 0.2
        ] or [(0.0, 1.0, "wind blowing")]
        given = [(s, max(e, s), label) for s, e, label in given]
        oracle = sed_eval.sound_event.EventBasedMetrics(event_label_list=reward_rows.SOUNDS)
        oracle.evaluate(rows(true), rows(given))
        expected = oracle.results_overall_metrics()["f_measure"]["f_measure"]
        asked = row("events", "List the events.", timeline(true))
        found = rewards.event_f1(said(timeline(given)), asked)
        assert found.value == pytest.approx(np.nan_to_num(expected), abs=1e-9)
        values.append(found.value)
    assert 0.1 < np.mean(values) < 0.9


def test_listing_every_event_pays_little():
    everything = "\n".join(
        f"0.10 - 4.00: {sound} {i}" for sound in reward_rows.SOUNDS for i in "abcdef"
    )
    found = rewards.event_f1(said(f"{everything}\n0.10 - 4.00: dog barking"), ROWS["events"])
    assert found.value == pytest.approx(2 / 27)
    assert found.reason == "F1 0.07: 1 of 2, 24 extra"


def test_times_of_words():
    asked = ROWS["asr_words"]
    values = {
        # all 100 ms late: F1 1, 1 - 0.1 / 0.5
        "[0.20]the[0.40][0.40]dog[0.90][1.10]barks[1.60]": 0.8,
        # one of three words: F1 of 2 right, 6 expected, 2 given
        "[0.30]dog[0.80]": 0.5,
        # every word is there, with three more: 6 right, 6 expected, 12 given
        "[0.10]the[0.30][0.30]dog[0.80][1.00]barks[1.50]"
        "[1.50]at[1.60][1.60]my[1.70][1.70]cat[1.80]": 12 / 18,
        "[9.10]the[9.30][9.30]dog[9.80][9.90]barks[9.95]": 0.0,
        "the dog barks": 0.0,
        "[0.10]a[0.30]": 0.0,
    }
    for text, value in values.items():
        assert rewards.aas(said(text), asked).value == pytest.approx(value), text
    found = rewards.aas(said("[0.20]the[0.40][0.40]dog[0.90][1.10]barks[1.60]"), asked)
    assert found.reason == "6 of 6 times, 3 segments given, off by 100 ms"
    back = rewards.aas(said("[0.10]the[0.30][0.00]dog[0.80][1.00]barks[1.50]"), asked)
    assert back.reason.endswith("1 out of order")
    assert back.value == pytest.approx((1 - 0.05 / 0.5) * 2 / 3)


def test_words_without_times_cost_as_wrong_ones_do():
    right = "[0.10]the[0.30][0.30]dog[0.80][1.00]barks[1.50]"
    found = rewards.aas(said(f"well now {right}"), ROWS["asr_words"])
    assert found.value == pytest.approx(2 * 6 / (6 + 2 * 5))
    assert found.reason.endswith("2 words without times")


def test_a_sentence_is_more_than_its_first_and_last_word():
    asked = {**ROWS["asr_sentences"], "answer": "[0.00]hello there my friend[2.00]"}
    for text, value in {
        "hello there my friend": 1.0,
        "hello friend": 0.5,
        "hello no no friend": 0.5,
        "hello there my own friend": 0.75,
    }.items():
        found = rewards.aas(said(f"[0.00]{text}[2.00]"), asked)
        assert found.value == pytest.approx(value), text


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("tolerance", math.inf, '"tolerance" is inf; expected a number from 0'),
        ("tolerance", -1, '"tolerance" is -1'),
        ("tolerance", math.nan, '"tolerance" is nan'),
        ("answer", math.nan, "nothing to compare with"),
        ("answer", "?!", "'?!', without letters or digits"),
    ],
)
def test_odd_values_of_a_row_are_named(key, value, words):
    with pytest.raises(InputError, match=re.escape(words)):
        rewards.number(said("3"), {**ROWS["count"], key: value})


def test_an_answer_of_null_is_none():
    row = ROWS["count"]
    right = row["answer"] if "answer" in row else row["conversation"][-1]["content"]
    end = {"role": "assistant", "message_type": "text", "content": right}
    row = {**row, "conversation": [*row["conversation"], end], "answer": None}
    assert rewards.number(said(right), row).value == 1


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("count", "3", 1),
        ("count", "4", 0),
        ("count", "about 3", 0),
        ("tempo", "126", 1),
        ("tempo", "127", 0),
        ("tempo", "115 bpm", 1),
        ("time_when", "0.70 - 3.25", 1),
        ("time_when", "0.70 s to 3.30 s", 1),
        ("time_when", "0.80 - 3.40", 0),
        ("time_when", "0.56 - 3.40 and 5.00 - 6.00", 0),
        ("reason_gap", "1.05", 1),
        ("reason_gap", "1.10", 0),
    ],
)
def test_numbers_with_their_tolerance(name, text, value):
    assert rewards.number(said(text), ROWS[name]).value == value


def test_a_row_may_give_its_tolerance():
    for tolerance, text, value in ((5, "125", 1), (5, "126", 0), (0.5, "120.5", 1), (0, "121", 0)):
        asked = row("number", "How fast is it?", "120", tolerance=tolerance)
        assert rewards.number(said(text), asked).value == value
    with pytest.raises(InputError, match="'ten' is no number"):
        rewards.number(said("10"), row("number", "How fast is it?", "ten"))


def test_fields():
    asked = ROWS["caption_speech_json"]
    for change, value in (
        ({"gender": "male"}, 2 / 3),
        ({"gender": "male, female"}, 2 / 3),  # naming all is wrong
        ({"summary": "A woman who whispers."}, (2 + 4 / 12) / 3),
        ({"summary": None}, 2 / 3),
    ):
        found = rewards.fields(said(json.dumps(VOICE | change)), asked)
        assert found.value == pytest.approx(value), change
        assert found.reason.endswith(f"not right: {next(iter(change))}")


@pytest.mark.parametrize(
    ("raw", "thinks", "plain"),
    [
        ("<think>\nIt rains.\n</think>\n\nbefore", 1, 0),
        ("<think>It rains.</think>before", 1, 0),
        ("before", 0, 1),
        ("<think>\n\n</think>\n\nbefore", 0, 0),
        ("<think>\n...\n</think>\n\nbefore", 0, 0),
        ("<think>\nIt rains.\n</think>\n\n", 0, 0),
        ("<think>\nIt rains.", 0, 0),
        ("It rains.\n</think>\n\nbefore", 0, 0),
        ("<think>\nIt rains.\n</think>\n\nbefore</think>", 0, 0),
        ("<think>\nIt <think> rains.\n</think>\n\nbefore", 0, 0),
        ("<think>a</think>\n<think>b</think>\nbefore", 0, 0),
        ("Well. <think>It rains.</think> before", 0, 0),
        ("</think>It rains.<think> before", 0, 0),
    ],
)
def test_form(raw, thinks, plain):
    assert rewards.form(said(raw), ROWS["reason_before"]).value == thinks
    assert rewards.form(said(raw), ROWS["present"]).value == plain
    # A row may ask for thoughts though its expected answer has none.
    assert rewards.form(said(raw), row("present", "Rain?", "yes", think=True)).value == thinks


def test_length_is_the_soft_punishment():
    reward = length(longest=100, margin=20)
    for tokens, punishment in ((1, 0), (80, 0), (85, -0.25), (90, -0.5), (100, -1), (500, -1)):
        found = reward(Said("yes", tokens), ROWS["present"])
        assert found.value == pytest.approx(1 + punishment)
    for wrong in ((100, 0), (100, 101), (0, 0)):
        with pytest.raises(UsageError, match="0 < margin <= longest"):
            length(*wrong)


def test_repetition():
    asked = ROWS["present"]
    text = "the rain is louder than a dog that barks at the bell"
    words = text.split()
    assert rewards.repetition(said(" ".join(words)), asked).value == 1
    assert rewards.repetition(said(" ".join(words * 2)), asked).value == 1  # twice is no loop
    loop = rewards.repetition(said(" ".join(words * 5)), asked)
    assert loop.value == pytest.approx(1 / 5)
    assert loop.reason == "48 of 60 words in a loop"
    assert rewards.repetition(said("no " * 50), asked).value == pytest.approx(1 / 50)
    thoughts = "<think>\n" + "it rains and " * 20 + "\n</think>\n\nyes"
    assert rewards.repetition(said(thoughts), asked).value < 0.1
    assert rewards.repetition(said("下雨了" * 10), asked).value == pytest.approx(0.1)
    assert rewards.repetition(said("yes", "loop"), asked).value == 0
    chant = row("asr", "Write.", "no " * 20)
    assert rewards.repetition(said("no " * 20), chant).value == 1


def test_language():
    english, chinese = ROWS["asr"], ROWS["asr_zh"]
    for asked, text, value in (
        (english, "a dog", 1),
        (english, "下雨", 0),
        (english, "ab下雨", 0.5),
        (chinese, "下雨", 1),
        (chinese, "a dog", 0),
        (ROWS["count"], "三", 1),  # a number has no script
        (english, "12", 1),
    ):
        assert rewards.language(said(text), asked).value == value, text
    assert rewards.language(said("дождь"), english).reason == "letters of CYRILLIC"


def test_a_judge_is_asked_only_about_answers():
    class Scripted:
        asked = ()

        def ask(self, prompt):
            self.asked = (*self.asked, prompt)
            return '<think>hm</think>{"answer": 4}'

    judge = Scripted()
    reward = by_judge(judge)
    assert reward(said("a man"), ROWS["who_said"]) == (0.75, "judge 4 of 5")
    assert "Right answer:\nthe man" in judge.asked[0]
    assert "Answer to judge:\na man" in judge.asked[0]
    for trick in ("", "<think>\nthe man\n</think>", read(ROWS["who_said"]).prompt):
        assert reward(said(trick), ROWS["who_said"]).value == 0
    assert len(judge.asked) == 1
    judge.ask = lambda prompt: "great"
    with pytest.raises(InputError, match="no JSON object in 'great'"):
        reward(said("a man"), ROWS["who_said"])


def test_a_row_is_read_in_both_forms():
    assert read(ROWS["reason_gap"]).thinks
    assert read(ROWS["reason_gap"]).answer == "0.88"
    prompt = {**ROWS["count"], "conversation": ROWS["count"]["conversation"][:2], "answer": 3}
    assert read(prompt).answer == "3"
    turns = [*ROWS["count"]["conversation"], *ROWS["present"]["conversation"][1:]]
    assert read({**ROWS["present"], "conversation": turns}) == read(ROWS["present"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"conversation": None}, 'no "conversation"'),
        ({"conversation": ROWS["count"]["conversation"][:2]}, '"answer", or an assistant'),
        ({"conversation": ROWS["count"]["conversation"][2:]}, "a text of the user"),
        ({"answer": "<think>\nhm\n</think>"}, "the expected answer is empty"),
        ({"answer": ["3"]}, "nothing to compare with"),
        ({"think": "yes"}, '"think" is text; expected bool'),
        ({"tolerance": True}, '"tolerance" is true or false'),
        ({"choices": "A"}, '"choices" is text; expected list'),
        ({"task": 3}, '"task" is a number'),
    ],
)
def test_a_row_that_cannot_be_read_is_named(change, words):
    with pytest.raises(InputError, match="row 'count-1'") as error:
        read(ROWS["count"] | change)
    assert words in str(error.value)
