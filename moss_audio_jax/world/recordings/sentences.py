"""What the synthesisers say: sentences of every source of texts, those of a split."""

from __future__ import annotations

from moss_audio_jax.draw import Draw
from moss_audio_jax.errors import UsageError
from moss_audio_jax.world.recordings import held_out
from moss_audio_jax.world.recordings.source import Text, of_kind

_WEIGHTS = {"grammar": 0.25, "wordfreq": 0.4, "alice": 0.02, "austen": 0.33}
_OTHER = 0.2  # of a source of another package
_TRIES = 1000


def sentence(draw: Draw, split: str) -> tuple[str, str]:
    """(sentence, name of its source): words as they are said, joined by single spaces.

    Raises:
      UsageError: an unknown split, or no source has a sentence of this one.
    """
    here = {source.name: source for source in of_kind("text")}
    for _ in range(_TRIES):
        name = draw.weighted({name: _WEIGHTS.get(name, _OTHER) for name in here})
        source = here[name]
        assert isinstance(source, Text)
        said = source.sentence(draw)
        if held_out.sentence_allowed(said, split):
            return said, name
    raise UsageError(f"no sentence of split {split!r} in {_TRIES} draws from {', '.join(here)}")
