"""Frequent English words of the package wordfreq, alone, in rows and in the grammar's sentences."""

from __future__ import annotations

import functools
import importlib.util
import re

from moss_audio_jax.draw import Draw
from moss_audio_jax.errors import extra
from moss_audio_jax.world import grammar
from moss_audio_jax.world.recordings.source import Text

_COUNT = 8000
_FRAMES = (
    "the {0} and the {1}",
    "the {0} of the {1}",
    "a {0} or a {1}",
    "i said {0} and not {1}",
    "did you say {0} or {1}",
    "the word is {0}",
    "{0} is not {1}",
    "from {0} to {1}",
    "without {0} there is no {1}",
    "he wrote {0} and {1} and {2}",
    "what does {0} mean",
    "say {0} again",
    "{0} {1} {2} and {3}",
)
# Beginnings of words that nobody wants in a sentence made at random.
_COARSE = re.compile("fuck|shit|bitch|cunt|nigg|fag|whore|slut|porn|rape|rapi|dick|cock|puss|nazi")


class Words(Text):
    def available(self) -> bool:
        return importlib.util.find_spec("wordfreq") is not None

    def sentence(self, draw: Draw) -> str:
        self.require()
        form = draw.weighted({"row": 0.35, "frame": 0.3, "grammar": 0.35})
        if form == "row":
            return " ".join(_word(draw) for _ in range(draw.integer(2, 9)))
        if form == "frame":
            return draw.choice(_FRAMES).format(*(_word(draw) for _ in range(4)))
        words = grammar.sentence(draw, "grammatical").split()
        for at in draw.sample(range(len(words)), min(len(words), draw.integer(1, 3))):
            words[at] = _word(draw)
        return " ".join(words)


def _word(draw: Draw) -> str:
    known = _known()
    # Frequent words often, rare ones often enough to be learned.
    at = draw.log_uniform(20, len(known)) if draw.chance(0.5) else draw.uniform(0, len(known))
    return known[min(int(at), len(known) - 1)]


@functools.cache
def _known() -> tuple[str, ...]:
    """The most frequent words that have a vowel; letters and abbreviations are left out."""
    import wordfreq

    ranked = wordfreq.top_n_list("en", 2 * _COUNT)
    plain = [w for w in ranked if re.fullmatch(r"[a-z]{3,}", w) and re.search(r"[aeiouy]", w)]
    return tuple(word for word in plain if not _COARSE.match(word))[:_COUNT]


SOURCES = (
    Words(
        name="wordfreq",
        kind="text",
        licence="Apache-2.0, its lists CC-BY-SA-4.0",
        origin="wordfreq",
        install=extra("ears"),
    ),
)
