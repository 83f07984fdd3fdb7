"""Whether speech goes on after its transcript. How often a real model is told so wrongly, and how
often rightly, tools/small/score_early_ends.py counts."""

from __future__ import annotations

import pytest

from moss_audio_jax.text.unsaid import Word, goes_on_at

SAID = "the fox is in the desert my nephew is fifteen years old"


def heard(text: str, sure: float = 1.0) -> list[Word]:
    """A word each half second."""
    return [Word(i / 2, i / 2 + 0.4, word, sure) for i, word in enumerate(text.split())]


@pytest.mark.parametrize(
    ("transcript", "at"),
    [
        (SAID, None),
        (f"{SAID} and", None),  # more than was heard
        ("The fox is in the desert. My nephew is 15 years old!", None),
        ("the ox sat in a dessert my nephews fifty years old", None),  # errors, but all of it
        ("the fox is in the desert my nephew is", None),  # three words may be the listener's error
        ("the fox is in the desert my nephew", 4.0),
        ("The fox is in the desert.", 3.0),
        ("the ox is in a dessert", 3.0),
        ("", 0.0),
    ],
)
def test_an_end_that_comes_early_is_found(transcript, at):
    assert goes_on_at(transcript, heard(SAID)) == at


def test_words_said_twice_are_not_taken_for_the_first_time():
    again = "my nephew is old my nephew is old my nephew is old"
    assert goes_on_at("my nephew is old", heard(again)) == 2.0
    assert goes_on_at("my nephew is old my nephew is old", heard(again)) == 4.0
    assert goes_on_at(again, heard(again)) is None


def test_scripts_without_spaces_and_pieces_of_words():
    chinese = heard(" ".join("请把衣服给我请给我一杯水"))
    assert goes_on_at("请把衣服给我。请给我一杯水。", chinese) is None
    assert goes_on_at("请把衣服给我", chinese) == 3.0
    assert goes_on_at("the fox is in the desert", heard("the f ox is in the des ert")) is None


def test_what_is_not_sure_proves_nothing():
    """A voice that the listener does not know, and silence."""
    assert goes_on_at("the fox", heard(SAID, sure=0.7)) is None
    assert goes_on_at("the fox", heard("the fox is") + heard("a b c d e", sure=0.8)) is None
    assert goes_on_at("There is no speech.", []) is None
    assert goes_on_at("", []) is None


def test_what_was_said_before_the_last_time_was_understood():
    """Wrongly, it may be; but it is no early end."""
    assert goes_on_at("the fox", heard(SAID), told=5.9) is None
    assert goes_on_at("the fox", heard(SAID), told=2.9) == 3.0
