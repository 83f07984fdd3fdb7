"""Checks a run's config before anything is compiled."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from moss_audio_jax.config import ModelConfig
from moss_audio_jax.errors import UsageError
from moss_audio_jax.train.defaults import LIMITS, get_config
from moss_audio_jax.train.helpers import LOSSES
from moss_audio_jax.train.source import source_of

_FREE = ("data.mixture", "policy.rewards", "policy.options")  # their keys are the user's own


def check_keys(config: ConfigDict) -> None:
    """Raises UsageError for an unknown key or a value of the wrong type."""
    expected = get_config()
    if source := source_of(config):
        expected.policy = source.get_config()
    _same_keys(config, expected, "")


def check(config: ConfigDict, model: ModelConfig, mesh: Mesh) -> None:
    """Raises UsageError naming the first key that is invalid, alone or in combination."""

    def value(key: str) -> Any:
        at = config
        for name in key.split("."):
            at = at[name]
        return at

    for key, limit in LIMITS.items():
        if isinstance(limit, tuple) and value(key) not in limit:
            raise UsageError(f"{key} is {value(key)!r}; expected one of {', '.join(limit)}")
        if isinstance(limit, int) and value(key) < limit:
            raise UsageError(f"{key} is {value(key)}; expected at least {limit}")
    if config.data.chunks < -1:
        raise UsageError(f"data.chunks is {config.data.chunks}; expected -1 or more")
    if bool(config.data.train) == bool(config.data.mixture):
        raise UsageError("data.train or data.mixture: give one of them, and not both")
    for key in ("optimizer.b1", "optimizer.b2"):
        if not 0 <= value(key) < 1:
            raise UsageError(f"{key} is {value(key)}; expected at least 0, below 1")
    for key in ("optimizer.final", "optimizer.decay"):
        if not 0 <= value(key) <= 1:
            raise UsageError(f"{key} is {value(key)}; expected 0 to 1")
    span = config.train.profile
    if len(span) != 2 or not all(isinstance(n, int) and n >= 0 for n in span):
        raise UsageError(f"train.profile is {span!r}; expected (first step, how many)")
    if config.train.ema >= 1:
        raise UsageError(f"train.ema is {config.train.ema}; expected less than 1")
    if config.data.length > model.decoder.max_positions:
        raise UsageError(
            f"data.length {config.data.length} exceeds the model's "
            f"{model.decoder.max_positions} positions"
        )
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.data.batch % (ways * config.train.accumulate):
        raise UsageError(
            f"data.batch {config.data.batch} is not a multiple of mesh.data * mesh.fsdp * "
            f"train.accumulate = {ways} * {config.train.accumulate}"
        )
    echo, kept = config.data.echo, config.data.echo_rows
    if echo > 1 and jax.process_count() > 1:
        raise UsageError(f"data.echo is {echo}; with several processes it must be 1")
    if config.data.batch % echo:
        raise UsageError(f"data.echo {echo} does not divide data.batch {config.data.batch}")
    if echo > 1 and kept < config.data.batch:
        raise UsageError(f"data.echo_rows is {kept}; expected at least data.batch")
    if config.eval.every and not config.data.eval:
        raise UsageError(f"eval.every is {config.eval.every} but data.eval names no rows")
    if config.checkpoint.keep_best and not config.eval.every:
        raise UsageError("checkpoint.keep_best needs eval.every: it goes by the held-out loss")
    for key, most in (("optimizer.groups", 1), ("data.pick", 2)):
        for rule in value(key):
            try:
                pattern, first, *others = rule
                re.compile(pattern)
                if len([float(number) for number in (first, *others)]) > most:
                    raise ValueError(f"{len(rule)} items")
            except (TypeError, ValueError, re.error) as error:
                more = ["", "[, number]"][most - 1]
                raise UsageError(
                    f"{key} holds {rule!r}; expected (regex, number{more}) ({error})"
                ) from None
    layers = config.optimizer.layers
    numbers = all(isinstance(n, int | float) and 0 <= n < math.inf for n in layers)
    if layers and not (numbers and any(layers) and len(layers) == model.decoder.layers):
        raise UsageError(
            f"optimizer.layers is {tuple(layers)!r}; expected {model.decoder.layers} factors, one "
            "for each layer of the decoder, 0 or more and not all 0"
        )
    helpers = {name: loss for name, loss in LOSSES.items() if config.helpers[name]}
    if not config.train.decoder_loss and not helpers:
        raise UsageError("train.decoder_loss is 0 and no helper has a weight: nothing is learned")
    if not config.train.decoder_loss and config.helpers.times:
        raise UsageError("helpers.times needs train.decoder_loss above 0: else no decoder runs")
    if any(loss.needs == "tags" for loss in helpers.values()) and not config.helpers.names:
        about = ", ".join(f"helpers.{name}" for name in LOSSES if LOSSES[name].needs == "tags")
        raise UsageError(f"{about} need helpers.names: which tags are told apart")
    if model.inject_gate and config.checkpoint.export == "official":
        raise UsageError(
            "checkpoint.export is 'official', which has no gates (inject_gate); set it to native"
        )
    if source := source_of(config):
        source.check(config)
    if helpers and not config.data.chunks:
        raise UsageError("data.chunks is 0: rows of text, and the helpers need sound")
    if config.lora.rank and not config.lora.alpha > 0:
        raise UsageError(f"lora.alpha is {config.lora.alpha:g}; expected a number above 0")
    try:
        re.compile(config.lora.targets)
    except re.error as error:
        raise UsageError(f"lora.targets is no regular expression ({error})") from None
    tensor, sequence = mesh.shape["tensor"], mesh.shape["sequence"]
    for key in ("heads", "kv_heads"):
        heads = getattr(model.decoder, key)
        if heads % tensor:
            raise UsageError(f"mesh.tensor {tensor} does not divide model.decoder.{key} {heads}")
    if config.data.length % sequence:
        raise UsageError(
            f"mesh.sequence {sequence} does not divide data.length {config.data.length}"
        )


def _same_keys(given: ConfigDict, expected: ConfigDict, prefix: str) -> None:
    for key in given:
        name = f"{prefix}{key}"
        if key not in expected:
            close = ", ".join(sorted(expected))
            raise UsageError(f"config has the unknown key {name}; {prefix or 'a run '}has {close}")
        if name in _FREE:
            continue
        if isinstance(expected[key], ConfigDict):
            if not isinstance(given[key], ConfigDict):
                raise UsageError(f"{name} is {given[key]!r}; expected a group of keys")
            _same_keys(given[key], expected[key], f"{name}.")
        else:
            kinds = type(expected[key])
            number = kinds is float and type(given[key]) is int
            if type(given[key]) is not kinds and not number:
                raise UsageError(
                    f"{name} is {given[key]!r} ({type(given[key]).__name__}); "
                    f"expected {kinds.__name__}"
                )
            if kinds is float and not math.isfinite(given[key]):
                raise UsageError(f"{name} is {given[key]}; expected a finite number")
    for key in expected:
        if key not in given:
            raise UsageError(f"config lacks the key {prefix}{key}; start from configs/common.py")
