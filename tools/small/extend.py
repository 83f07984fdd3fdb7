"""Gives the small model more word pieces, for the open English of the world of recordings.

    python tools/small/extend.py --output DIR [--checkpoint DIR] [--pieces 1024]

The model's own tokenizer was trained on a closed vocabulary. It spells other words letter by
letter, and a fast speaker says more letters than the encoder has tokens for. The new pieces are
frequent words and parts of words, from sentences that the voices of that world say. Old pieces keep
their ids and weights; a new piece starts as the mean of the old ones that spelled it. The result
has to be trained before it is of use.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as protocol

from moss_audio_jax.config import DEFAULT_CHECKPOINT
from moss_audio_jax.draw import Draw
from moss_audio_jax.errors import InputError
from moss_audio_jax.text.loading import load_tokenizer
from moss_audio_jax.tree import flatten, unflatten
from moss_audio_jax.weights.convert import load_params, save_official
from moss_audio_jax.weights.helpers import load_helpers, save_helpers
from moss_audio_jax.weights.opening import read_config
from moss_audio_jax.world.recordings.sentences import sentence

MODEL = "tokenizer.model"
EMBEDDING = "language_model/embed_tokens/embedding"
HEAD = "helpers/pieces/"  # kernel [D, V + 1] and bias [V + 1]; the last: no piece
SENTENCES = 30_000
# Log-probabilities of the new pieces, the most frequent first. Two of them together are less likely
# than any word that was a piece before, and each is likelier than two letters.
SCORES = -8.0, -13.5


def new_pieces(words: Iterable[str], old: frozenset[str], count: int) -> list[str]:
    """The `count` most frequent pieces of `words` (with repetition) that are not among `old`."""
    words = list(words)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words),
        model_writer=model,
        vocab_size=2 * count + len(set().union(*words)),  # letters are pieces too
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    found = protocol.ModelProto.FromString(model.getvalue()).pieces
    ranked = sorted(found, key=lambda piece: -piece.score)
    texts = [piece.piece for piece in ranked if len(piece.piece) > 1 and piece.type == piece.NORMAL]
    texts = [text for text in texts if text not in old]
    if len(texts) < count:
        raise InputError(f"{len(texts)} new pieces were found; expected at least {count}")
    return texts[:count]


def extended(model: bytes, texts: Sequence[str]) -> bytes:
    """A SentencePiece model with more pieces behind its own."""
    proto = protocol.ModelProto.FromString(model)
    for text, score in zip(texts, np.linspace(*SCORES, len(texts)), strict=True):
        proto.pieces.add(piece=text, score=float(score))
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return proto.SerializeToString()


def extend(checkpoint: Path, output: Path, count: int) -> None:
    """Writes `checkpoint` with `count` more pieces, in float32.

    Raises:
      InputError: its tokenizer is not SentencePiece's, its embeddings are not tied, or `output`
        exists.
    """
    config = read_config(checkpoint)
    if not config.decoder.tie_embeddings or not (checkpoint / MODEL).is_file():
        raise InputError(f"{checkpoint}: expected tied embeddings and a {MODEL}")
    old = load_tokenizer(checkpoint)
    model = (checkpoint / MODEL).read_bytes()
    known = frozenset(piece.piece for piece in protocol.ModelProto.FromString(model).pieces)
    said = (sentence(Draw("pieces", i), "train")[0] for i in range(SENTENCES))
    texts = new_pieces((word for text in said for word in text.split()), known, count)
    spelled = [old.encode(text) for text in texts]

    leaves = {k: np.asarray(v, np.float32) for k, v in flatten(load_params(checkpoint)).items()}
    leaves[EMBEDDING] = _longer(leaves[EMBEDDING], spelled)
    heads, tags = load_helpers(checkpoint)
    for path, leaf in heads.items():
        heads[path] = leaf.astype(np.float32)
        if path.startswith(HEAD):
            *pieces, nothing = heads[path].T
            heads[path] = np.stack([*_longer(np.stack(pieces), spelled), nothing]).T
    decoder = dataclasses.replace(config.decoder, vocab_size=len(leaves[EMBEDDING]))
    config = dataclasses.replace(config, decoder=decoder)
    save_official(output, unflatten(leaves), config, files_from=checkpoint)
    (output / MODEL).write_bytes(extended(model, texts))
    if heads:
        save_helpers(output, heads, tags)


def _longer(rows: np.ndarray, spelled: Sequence[Sequence[int]]) -> np.ndarray:
    """[V, ...] -> [V + N, ...], with the mean of the rows that spell each new piece."""
    return np.stack([*rows, *(rows[list(ids)].mean(axis=0) for ids in spelled)])


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--checkpoint", type=Path, default=DEFAULT_CHECKPOINT, metavar="DIR")
    options.add_argument("--output", type=Path, required=True, metavar="DIR")
    options.add_argument("--pieces", type=int, default=1024)
    args = options.parse_args()
    extend(args.checkpoint, args.output, args.pieces)


if __name__ == "__main__":
    main()
