"""From a run's config to everything static about it; pure, and without a single array.

The loop trains what `build` says, and `plan` compiles the very same step for a slice that is not
there.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from moss_audio_jax.config import Compute
from moss_audio_jax.data.augment import Augment
from moss_audio_jax.data.batch import Shape
from moss_audio_jax.data.loader_config import LoaderConfig, Pick
from moss_audio_jax.data.targets import check_digits
from moss_audio_jax.models import lora, moss_audio
from moss_audio_jax.train.check import check
from moss_audio_jax.train.helpers import LOSSES, Helpers, init_helpers
from moss_audio_jax.train.optimizer import factors, make_optimizer, schedule, untouched_layers
from moss_audio_jax.train.source import source_of
from moss_audio_jax.train.start import Start
from moss_audio_jax.train.step import Flat, Recipe, State, init_state, make_train_step
from moss_audio_jax.train.step import state_shardings as shardings_of
from moss_audio_jax.tree import flatten


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is trained, on what, and how.

    Attributes:
      config, start, mesh: what it is built from.
      loader: what the rows of a step are made by; `shape` is that of the global batch.
      recipe: the step's static part.
      params: ShapeDtypeStructs of all parameters by path, adapters and helper projections too.
      factors: the learning-rate factor of each; 0 freezes.
      optimizer: of the trained parameters.
      state, state_shardings: the train state as ShapeDtypeStructs, and where its leaves live.
    """

    config: Any
    start: Start
    mesh: Mesh
    loader: LoaderConfig
    shape: Shape
    recipe: Recipe
    params: dict[str, jax.ShapeDtypeStruct]
    factors: dict[str, float]
    optimizer: optax.GradientTransformation
    state: State
    state_shardings: State

    def init_state(self) -> Callable[[Flat], State]:
        """The jitted function from parameters of any dtype to the state before the first step."""
        init = functools.partial(_init_state, self.factors, self.optimizer, self.recipe)
        return jax.jit(init, out_shardings=self.state_shardings)

    def step(self) -> Callable[[State, dict], tuple[State, dict]]:
        """The jitted train step; the state is donated."""
        rate = schedule(self.config.optimizer, self.config.train.steps)
        step = make_train_step(self.recipe, self.optimizer, rate)
        return jax.jit(step, donate_argnums=0, out_shardings=(self.state_shardings, None))


def build(config: Any, start: Start, mesh: Mesh) -> Setup:
    """Everything static about a run. Reads no file.

    Raises:
      UsageError, InputError: naming the first key that cannot be, alone or beside another.
    """
    check(config, start.model, mesh)
    loader = loader_config_of(config, start)
    loader.validate(start.model.encoder, jax.process_count())
    recipe = recipe_of(config, start)
    params, factor = parameters_of(config, recipe)
    untouched = untouched_layers(factor, config.optimizer.layers)
    compute = dataclasses.replace(recipe.compute, untouched_layers=untouched)
    recipe = dataclasses.replace(recipe, compute=compute)
    optimizer = make_optimizer(config.optimizer, config.train.steps, factor)
    state = jax.eval_shape(functools.partial(_init_state, factor, optimizer, recipe), params)
    return Setup(
        config=config,
        start=start,
        mesh=mesh,
        loader=loader,
        shape=loader.shape(start.model.encoder),
        recipe=recipe,
        params=params,
        factors=factor,
        optimizer=optimizer,
        state=state,
        state_shardings=shardings_of(state, start.model, mesh),
    )


def _init_state(
    factor: dict[str, float], optimizer: optax.GradientTransformation, recipe: Recipe, params: Flat
) -> State:
    trained = {path for path, value in factor.items() if value}
    return init_state(params, trained, optimizer, recipe)


def parameters_of(config: Any, recipe: Recipe) -> tuple[dict, dict[str, float]]:
    """All parameters of a run by path, as ShapeDtypeStructs, and the learning-rate factor of each.

    Adapters and helper projections are among them; a factor of 0 freezes.
    """
    base = flatten(moss_audio.abstract_params(recipe.model))
    abstract = dict(base)
    if config.lora.rank:
        abstract |= jax.eval_shape(functools.partial(adapters_of, config, base))
        factor = {path: float(lora.is_adapter(path)) for path in abstract}
    else:
        factor = factors(list(abstract), config.optimizer.groups)
    if recipe.helpers:
        key = jax.random.key(config.train.seed)
        projections = jax.eval_shape(lambda: init_helpers(key, recipe.model, recipe.helpers))
        abstract |= projections
        factor |= dict.fromkeys(projections, 1.0)
    return abstract, factor


def adapters_of(config: Any, base: dict) -> Flat:
    """Fresh LoRA adapters of a base {path: array or ShapeDtypeStruct}."""
    return lora.init(jax.random.key(config.train.seed), base, config.lora.rank, config.lora.targets)


def recipe_of(config: Any, start: Start) -> Recipe:
    """The step's static part, as a config has it."""
    t, most = config.train, config.data.row_examples
    weights = tuple((name, config.helpers[name]) for name in LOSSES)
    helpers = Helpers(
        weights,
        tuple(config.helpers.names),
        start.model.decoder.vocab_size,
        _digits(start) if config.helpers.times else (),
    )
    return Recipe(
        model=start.model,
        compute=Compute(
            t.dtype,
            t.attention,
            t.remat,
            t.encoder_chunks,
            loss_chunk=t.loss_chunk,
            most_segments=most + 1 if most else 0,  # the last is padding
        ),
        accumulate=t.accumulate,
        clip_norm=t.clip_norm,
        z_loss=t.z_loss,
        ema=t.ema,
        lora_alpha=config.lora.alpha if config.lora.rank else 0.0,
        tasks=1 + len(config.data.tasks),
        decoder_loss=t.decoder_loss,
        objective=source.objective(config) if (source := source_of(config)) else None,
        helpers=helpers if helpers.losses else None,
    )


def _digits(start: Start) -> tuple[int, ...]:
    if start.tokenizer is None:  # a plan of a model without one: any ten columns of the head
        return tuple(range(10))
    check_digits(start.tokenizer)
    return start.tokenizer.digit_ids


def loader_config_of(config: Any, start: Start) -> LoaderConfig:
    """What a config's rows are made by."""
    d = config.data
    needed = {loss.needs for name, loss in LOSSES.items() if config.helpers[name]}
    return LoaderConfig(
        batch=d.batch,
        length=d.length,
        chunks=math.ceil(d.length / 64) if d.chunks < 0 else d.chunks,
        frames=d.frames or None,
        packing=d.packing,
        row_examples=d.row_examples,
        seed=config.train.seed,
        streams=d.streams or None,
        window=d.window,
        workers=d.workers,
        max_bad_share=d.max_bad_share,
        row_seconds=d.row_seconds,
        tasks=tuple(d.tasks),
        time_markers=d.time_markers,
        augment=Augment(**d.augment),
        branches=d.branches,
        pick=tuple(Pick(*rule) for rule in d.pick),
        words=config.helpers.words if "words" in needed else 0,
        tags=tuple(config.helpers.names) if "tags" in needed else (),
        times="times" in needed,
    )
