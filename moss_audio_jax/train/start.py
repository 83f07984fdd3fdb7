"""What a run starts from: sizes, tokenizer and weights, as given by `init_from`.

init_from = ""                        a fresh model of config.model's sizes
init_from = "DIR"                     a whole checkpoint, official or native
init_from = "encoder=DIR"             its encoder; the rest fresh
init_from = "decoder=QWEN3_DIR"       a plain Qwen3 decoder; the rest fresh
init_from = "encoder=DIR,decoder=QWEN3_DIR"
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from moss_audio_jax.config import (
    DecoderConfig,
    EncoderConfig,
    ModelConfig,
    decoder_from_qwen3,
    read_config_json,
)
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.models.adapter import GATE
from moss_audio_jax.text import load_tokenizer
from moss_audio_jax.text.tokenizer import Tokenizer
from moss_audio_jax.weights.compose import Composed
from moss_audio_jax.weights.convert import load_params
from moss_audio_jax.weights.opening import read_config


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run starts. `whole`, `encoder`, `decoder`: folders, "" for fresh weights.

    `files_from` is the checkpoint whose side files an export takes along; None for a new model.
    """

    model: ModelConfig
    tokenizer: Tokenizer
    whole: str = ""
    encoder: str = ""
    decoder: str = ""

    @property
    def files_from(self) -> str | None:
        return self.whole or None


def read_start(config: Any) -> Start:
    """Resolves `init_from`, `model`, `tokenizer` of a run's config; reads no weights.

    Raises:
      InputError: a folder is incomplete, or the folders do not match.
      UsageError: init_from is malformed.
    """
    parts = _parts(config.init_from)
    whole, encoder, decoder = (parts.get(name, "") for name in ("whole", "encoder", "decoder"))
    if whole:
        model = read_config(whole)
        gated = model.inject_gate or config.model.inject_gate
        model = dataclasses.replace(model, inject_gate=gated)
    else:
        model = sizes_of(config.model)
        if encoder:
            model = dataclasses.replace(model, encoder=read_config(encoder).encoder)
            taps = len(model.encoder.tap_layers)
            model = dataclasses.replace(model, inject_layers=min(model.inject_layers, taps))
        if decoder:
            theirs = decoder_from_qwen3(*read_config_json(decoder))
            tied = model.decoder.tie_embeddings
            model = dataclasses.replace(
                model, decoder=dataclasses.replace(theirs, tie_embeddings=tied)
            )
    if config.encoder_attention:
        model = model.with_attention(config.encoder_attention)
    folder = config.tokenizer or whole or decoder
    if not folder:
        raise UsageError(
            "tokenizer is empty: name a folder with a tokenizer, or an init_from that has one"
        )
    tokenizer = load_tokenizer(folder, model.decoder.vocab_size)
    return Start(model.validate(), tokenizer, whole, encoder, decoder)


def initial_params(start: Start, shardings: Any, seed: int) -> Any:
    """The parameter tree before the first step, on its devices, in the dtypes as stored.

    Gates that a whole checkpoint lacks are 0: the run starts from the same model.
    """
    if start.whole:
        gated = read_config(start.whole).inject_gate
        stored = dataclasses.replace(start.model, inject_gate=gated)
        params = load_params(start.whole, stored, None, shardings)
        if start.model.inject_gate and not gated:
            shape = start.model.inject_layers, start.model.decoder.hidden_size
            zeros = jax.jit(jnp.zeros, static_argnums=0, out_shardings=shardings["mergers"][GATE])
            params["mergers"][GATE] = zeros(shape)
        return params
    with Composed(start.model, start.encoder, start.decoder, seed) as parts:
        return parts.tree(shardings)


def _parts(init_from: str) -> dict[str, str]:
    if not init_from:
        return {}
    if "=" not in init_from:
        return {"whole": init_from}
    parts = {}
    for part in init_from.split(","):
        name, _, folder = part.strip().partition("=")
        if name not in ("encoder", "decoder") or not folder or name in parts:
            raise UsageError(
                f"init_from is {init_from!r}; expected a folder, or encoder=DIR and decoder=DIR "
                "joined by a comma"
            )
        parts[name] = folder
    return parts


def sizes_of(given: Any) -> ModelConfig:
    """A ModelConfig from config.model's keys."""
    raw = given.to_dict()
    encoder, decoder = raw.pop("encoder"), raw.pop("decoder")
    encoder["tap_layers"] = tuple(encoder["tap_layers"])
    try:
        model = ModelConfig(EncoderConfig(**encoder), DecoderConfig(**decoder), **raw)
        return model.validate()
    except InputError as error:
        raise UsageError(f"config.model: {error}") from None
    except TypeError as error:  # a key of a config file that a model does not have
        raise UsageError(f"config.model: {error}") from None
