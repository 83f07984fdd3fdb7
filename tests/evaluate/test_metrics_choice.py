"""Which choice an answer names, strictly and by the official rules."""

from __future__ import annotations

import string

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moss_audio_jax.evaluate.metrics import parse
from moss_audio_jax.evaluate.metrics.choice import (
    LastLetter,
    choice_by_letter,
    letter_is_right,
    read_choice,
    words_match,
)
from moss_audio_jax.evaluate.metrics.instructions import follows

MANY = settings(max_examples=400, deadline=None)
WORDS = ("dog", "cat", "bird", "siren", "piano", "violin", "rain", "engine", "speech", "laughter")
TEXT = st.lists(st.sampled_from(WORDS), min_size=1, max_size=3).map(" ".join)
CHOICES = st.lists(TEXT, min_size=2, max_size=26)
# Answers by which a model may mean choice `letter` with the text `text`.
FORMS = (
    "{text}",
    "{text}.",
    "{Text}",
    '"{text}"',
    "{letter}",
    "{low}",
    "({letter})",
    "{letter}.",
    "{letter})",
    "Option {letter}",
    "({letter}) {text}",
    "{letter}. {text}",
    "{letter}: {text}.",
    "{letter} {text}",
    "**{letter}**",
    "**{letter}. {text}**",
    "\\boxed{{{letter}}}",
    "The answer is {letter}.",
    "The answer is ({letter}) {text}.",
    "The correct answer is {text}.",
    "Answer: {letter}",
    "**Answer:** {letter}. {text}",
    "I choose {letter}.",
    "答案是{letter}。",
    "选 {letter}",
    "（{letter}）{text}",
    "{letter}\n\nIt is what can be heard.",
    "It is loud.\nThe final answer is **{letter}**.",
    "Listening again...\n{letter}. {text}",
    "{letter}. Nothing else would fit.",
    "The answer is {letter} because of how it sounds.",
)
THINKING = ("", "<think>\nA? B? The answer is C.\n</think>\n\n")


@MANY
@given(CHOICES, st.data(), st.sampled_from(FORMS), st.sampled_from(THINKING))
def test_every_form_of_an_answer_is_read(choices, data, form, thinking):
    index = data.draw(st.integers(0, len(choices) - 1))
    letter, text = string.ascii_uppercase[index], choices[index]
    raw = form.format(letter=letter, low=letter.lower(), text=text, Text=text.capitalize())
    reference = {"choices": choices, "answer": text}
    assert parse("choice", reference, thinking + raw) == (text, "ok")


@MANY
@given(CHOICES, st.data())
def test_two_choices_at_once_are_none(choices, data):
    i, j = (data.draw(st.integers(0, len(choices) - 1)) for _ in range(2))
    assume(choices[i] != choices[j])
    a, b = string.ascii_uppercase[i], string.ascii_uppercase[j]
    for form in (
        "{a} or {b}",
        "{a}, {b}",
        "{a}\n{b}",
        "{a}. {other}",
        "({a}) {other}",
        "{text}, {other}",
        "The answer is {a}. No, the answer is {b}.",
        "{a}. It could also be {b}.",
        "The answer is not {a}",
        "neither {text} nor {other}",
        "It sounds like {text}",
    ):
        answer = form.format(a=a, b=b, text=choices[i], other=choices[j])
        assert read_choice(answer, choices) is None, answer


@pytest.mark.parametrize(
    "text", ["\u0130", "The answer is \u0130", "(\u0130) dog", "Option \u0131"]
)
def test_letters_of_other_alphabets_name_no_choice(text):
    assert read_choice(text, ["cat", "dog"]) is None


def test_more_choices_than_letters():
    choices = [f"({letter}) x{n}" for n, letter in enumerate([*string.ascii_lowercase, "z"])]
    assert read_choice("x26", choices) is None
    assert read_choice("(z) x26", choices) == choices[26]


def test_letters_that_are_texts_too():
    # A letter names its choice, but is unclear if the letter is also another choice's text.
    assert read_choice("A", ["A", "B"]) == "A"
    assert read_choice("A", ["G", "A", "B"]) is None
    assert read_choice("A. G", ["G", "A", "B"]) == "G"
    assert read_choice("A:maj7", ["E:7", "A:maj7"]) == "A:maj7"
    assert read_choice("C#", ["C", "C#"]) == "C#"
    assert read_choice("A dog", ["cat", "a dog", "dog"]) == "a dog"
    assert read_choice("E", ["x", "y", "z", "w"]) is None
    assert read_choice("E. x", ["x", "y", "z", "w"]) is None
    assert read_choice("The answer is A dog barking", ["cat", "dog"]) is None
    assert read_choice("man", ["(A) man", "(B) woman"]) == "(A) man"
    assert read_choice("four", ["four", "nine", "nine"]) == "four"
    assert read_choice("C", ["four", "nine", "nine"]) == "nine"


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("<think>\n</think>\n\n", "empty"),
        ("<think>\nIt is A", "truncated_thinking"),
        ("no idea", "unparsed"),
        ("It is A</think>B", "ok"),
    ],
)
def test_status(raw, status):
    assert parse("choice", {"choices": ["x", "y"]}, raw)[1] == status


# --- official: expected values follow from the published rules, by hand --------------------------


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ("A dog barks", True),
        ("barks, a dog", True),  # a set of words
        ("I hear that a dog barks loudly", True),
        ("(B) A dog barks", True),
        ("B", False),
        ("a dog", False),  # a word is missing
        ("a dog barks, not meows", False),  # a wrong choice's own word
        ("a dog barks. cat", False),
        ("a-dog.barks", True),
        ("", False),
        ("...", False),
    ],
)
def test_mmau_and_mmar_rule(prediction, right):
    choices = ["A cat meows", "A dog barks", "a dog barks", "A dog"]
    assert words_match("A dog barks", prediction, choices) is right


def test_words_of_duplicate_and_nested_choices():
    assert words_match("four", "four", ["four", "four", "nine"])
    authors = ["F. Scott", "J.D. Salinger"]
    assert words_match("J.D. Salinger", "The author J D Salinger", authors)
    assert not words_match("F. Scott", "J.D. Salinger", authors)


def test_mmsu_rule_remembers():
    rule = LastLetter()
    read = [
        ("", None),  # the first row has no row before it
        ("B. dog", "B"),
        ("", "B"),  # an empty response has the letter of the row before
        ("None", "B"),
        ("The answer is C.", "C"),
        ("the dog", None),  # not counted ...
        ("\n ", "C"),  # ... and not remembered
        ("Dogs bark", "D"),  # as any text with such an initial
        ("x", None),
        (None, None),
        ("it is (A)", "A"),
        ("d", None),
    ]
    assert [rule.read(response) for response, _ in read] == [letter for _, letter in read]
    assert letter_is_right("C", "y", ["x", "z", "y"])
    assert letter_is_right("A", "x", ["x", "x"])
    assert not letter_is_right("D", "x", ["x", "y", "z"])


@given(CHOICES, st.data(), st.sampled_from(FORMS))
def test_letters_become_texts_for_rules_that_compare_texts(choices, data, form):
    index = data.draw(st.integers(0, len(choices) - 1))
    letter, text = string.ascii_uppercase[index], choices[index]
    answer = form.format(letter=letter, low=letter.lower(), text=text, Text=text.capitalize())
    mapped = choice_by_letter(answer, choices)
    if "{text}" in form or "{Text}" in form:
        assert mapped is None  # it already contains the text
    else:
        assert mapped is None or mapped == text
        assert words_match(text, mapped or answer, choices)


@pytest.mark.parametrize(
    ("task", "arguments", "kept", "broken"),
    [
        ("Include Keywords", {"keywords": "cat, dog"}, "Dog and CAT", "dog"),
        ("Keyword Frequency", '{"keyword": "cat", "N": 2}', "cat, Cat", "cat cats"),
        ("Forbidden Words", {"forbidden_words": "cat"}, "a dog", "concatenate"),
        ("Number Paragraphs", {"N": 2}, "a***b***", "a"),
        ("Number Words (range)", {"N1": 1, "N2": 2}, "a b", "a b c"),
        ("Number Sentences (at most)", {"N": 2}, "It rains. Mr. x is wet!", "A. B. C."),
        ("All-capital Words (at least)", {"N": 1}, "by NASA", "by Nasa"),
        ("Multiple Sections", {"N": 2, "section_splitter": "§1"}, "a §1 b", "a § b"),
        ("Number Bullets", {"N": 2}, "* a\n* b", "- a\n- b"),
        ("Two Responses", None, "a ****** b", "a ****** A"),
        ("Repeat Prompt", None, "say IT. yes", "yes"),
        ("Quotation", {"N": None}, '"a"', "a"),
        ("No Commas", None, "a b", "a, b"),
        ("End Checker", {"end_phrase": "The end."}, "So. the end", "The end of it"),
    ],
)
def test_instructions(task, arguments, kept, broken):
    assert follows(task, arguments, kept, "Say it.")
    assert not follows(task, arguments, broken, "Say it.")
    assert not follows("No Such Task", arguments, kept, "Say it.")
