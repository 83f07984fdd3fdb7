"""The state of running answers on the device, and the programs that advance it.

`encode` encodes sound. `prefill` runs whole prompts, `extend` a piece of one; both write keys and
values into the cache and, with a prompt's last piece, fill the slot of its answer. `decode_until`
or, with drafts, `draft_until` decodes all slots together. A slot holds one running answer.

Letters: B slots, b prompts of one prefill, M room for new tokens, H room for hints, V vocabulary,
n pages of a table (`models.cache`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moss_audio_jax.config import Compute, EncoderConfig, ModelConfig
from moss_audio_jax.data.batch import Example
from moss_audio_jax.generate.drafts import NOTHING, propose
from moss_audio_jax.generate.options import LEAST_FACTOR, MOST_LOGPROBS
from moss_audio_jax.generate.sampling import MAX_STOP_IDS, Knobs, Sampling, choose, heat
from moss_audio_jax.generate.vocabulary import Vocabulary
from moss_audio_jax.models import cache as kv_cache
from moss_audio_jax.models import encoder, moss_audio
from moss_audio_jax.models.cache import Cache
from moss_audio_jax.runtime import trim_memory
from moss_audio_jax.sharding import platform, replicate, ways

# Why an answer ended. RUNNING and EMPTY are states of a slot; the others reach the user.
RUNNING, EMPTY, STOP, LENGTH, LOOP = range(5)

# Loop guard: an answer has degenerated once a cycle of up to 64 tokens has been repeated for at
# least 48 tokens and 6 whole times.
_LOOP_PERIODS = 64
_LOOP_TOKENS = 48
_LOOP_ROUNDS = 6


class Logprobs(NamedTuple):
    """Log-probabilities of each token so far. M is 0 in a state that is made for none."""

    token: jax.Array  # float32 [B, M], the token's own
    top_ids: jax.Array  # int [B, M, K], the likeliest tokens
    top: jax.Array  # float32 [B, M, K], theirs


class Answers(NamedTuple):
    """The state of each running answer on the device; the leading axis is B everywhere."""

    token: jax.Array  # int [B], the newest token, not yet in the cache
    position: jax.Array  # int [B], its position
    output: jax.Array  # int [B, M], tokens so far
    count: jax.Array  # int [B], how many
    state: jax.Array  # int [B], RUNNING, EMPTY or why it ended
    limit: jax.Array  # int [B], most tokens it may have
    knobs: Knobs
    stop_ids: jax.Array  # int [B, MAX_STOP_IDS], -1 = none
    seen: jax.Array  # bool [B, V], tokens of prompt and answer
    guard: jax.Array  # bool [B], end degenerate repetition
    matches: jax.Array  # int [B, P], how many newest tokens equal those p tokens earlier
    thinking: jax.Array  # bool [B], inside a <think> block
    budget: jax.Array  # int [B], tokens left for thinking
    forced: jax.Array  # int [B], next entry of `close_thinking` to force; past its end: none
    hints: jax.Array  # int [B, H], what drafts are made of (`drafts`)
    wanted: jax.Array  # bool [B], keep log-probabilities
    logprobs: Logprobs


class DecodeState(NamedTuple):
    answers: Answers
    cache: Cache


def sample(
    answers: Answers,
    logits: jax.Array,
    vocab: Vocabulary,
    sampled: bool,
    due: jax.Array | bool = True,
    allowed: jax.Array | None = None,
) -> Answers:
    """Chooses the next token of each running answer from float32 logits [B, V] and records it.

    `sampled`: any of the answers has a temperature. Otherwise the program is half as large.
    `due` bool [B]: all other answers stay as they are. `allowed` bool [B, V]: the tokens that may
    come; None: all.
    """
    running = (answers.state == RUNNING) & due
    batch, said = jnp.arange(answers.token.shape[0]), logits
    if vocab.forbidden:
        logits = logits.at[:, jnp.array(vocab.forbidden)].set(-jnp.inf)
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    token = choose(logits, answers.knobs, answers.seen, answers.count, sampled)

    if vocab.close_thinking:
        closing = jnp.array(vocab.close_thinking, jnp.int32)
        spent = answers.thinking & (answers.budget <= 0) & (answers.forced >= len(closing))
        # A block that the model closes itself at this step is left alone.
        forced = jnp.where(spent & (token != vocab.think_close), 0, answers.forced)
        is_forced = forced < len(closing)
        token = jnp.where(is_forced, closing[jnp.minimum(forced, len(closing) - 1)], token)
        forced = forced + is_forced
    else:
        forced = answers.forced
    thinking = (answers.thinking | (token == vocab.think_open)) & (token != vocab.think_close)

    stop = jnp.any(token[:, None] == answers.stop_ids, axis=1)
    if vocab.stop:
        stop = stop | jnp.any(token[:, None] == jnp.array(vocab.stop), axis=1)

    # For how many tokens has the answer repeated what it had p tokens earlier?
    periods = 1 + jnp.arange(_LOOP_PERIODS)
    back = answers.count[:, None] - periods
    earlier = jnp.take_along_axis(answers.output, jnp.maximum(back, 0), axis=1)
    matches = jnp.where((earlier == token[:, None]) & (back >= 0), answers.matches + 1, 0)
    looped = jnp.any(matches >= jnp.maximum(_LOOP_TOKENS, _LOOP_ROUNDS * periods), axis=1)

    recorded = running & ~stop  # the stop token is not part of the answer
    count = answers.count + recorded
    room = answers.output.shape[1]
    state = jnp.select(
        [~running, stop, looped & answers.guard, count >= answers.limit],
        [answers.state, STOP, LOOP, LENGTH],
        RUNNING,
    )
    place = jnp.where(recorded, answers.count, room)  # of the token in the answer
    return answers._replace(
        logprobs=_keep_logprobs(answers, said, token, running),
        token=jnp.where(running, token, answers.token),
        position=answers.position + running,
        output=answers.output.at[batch, place].set(token, mode="drop"),
        count=count,
        state=state,
        seen=answers.seen.at[batch, token].max(running),
        matches=jnp.where(running[:, None], matches, answers.matches),
        thinking=jnp.where(running, thinking, answers.thinking),
        budget=answers.budget - (running & answers.thinking),
        forced=jnp.where(running, forced, answers.forced),
    )


def _keep_logprobs(
    answers: Answers, logits: jax.Array, token: jax.Array, running: jax.Array
) -> Logprobs:
    """The log-probabilities with those of each new token, also of one that ends its answer.

    They are the model's own: by the whole softmax at the answer's temperature, before anything is
    forbidden, guided, cut off or penalised.
    """
    kept = answers.logprobs
    if kept.token.shape[1] == 0:
        return kept
    batch = jnp.arange(len(token))
    place = jnp.where(running, answers.count, kept.token.shape[1])

    def with_new() -> Logprobs:
        # Below the likeliest before the division: of large quotients rounding loses the difference.
        below = logits - jnp.max(logits, axis=-1, keepdims=True)
        scores = jnp.minimum(jax.nn.log_softmax(below / heat(answers.knobs), axis=-1), 0)
        top, top_ids = jax.lax.top_k(scores, kept.top.shape[-1])
        new = Logprobs(scores[batch, token], top_ids, top)
        return jax.tree.map(lambda old, x: old.at[batch, place].set(x, mode="drop"), kept, new)

    return jax.lax.cond(jnp.any(running & answers.wanted), with_new, lambda: kept)


class _Program:
    """A function under `jax.jit`, compiled to save memory where a CPU computes in bfloat16.

    XLA otherwise orders a CPU's program so that much of it can run at once. As each layer has loops
    of its own (`ops.linear`), buffers of all layers are then in memory at once.
    """

    def __init__(self, function: Callable, **how: Any) -> None:
        functools.update_wrapper(self, function)
        self._usual = jax.jit(function, **how)
        in_order = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
        self._frugal = jax.jit(function, compiler_options=in_order, **how)

    def __call__(self, *args: Any, compute: Compute, **static: Any) -> Any:
        program = self._for(compute)
        compiled = program._cache_size()
        result = program(*args, compute=compute, **static)
        if program is self._frugal and program._cache_size() > compiled:
            trim_memory()  # a compiler's leavings: 0.2 GB for a 4B
        return result

    def lower(self, *args: Any, compute: Compute, **static: Any) -> jax.stages.Lowered:
        return self._for(compute).lower(*args, compute=compute, **static)

    def _for(self, compute: Compute) -> Callable:
        frugal = platform() == "cpu" and compute.dtype == "bfloat16"
        return self._frugal if frugal else self._usual

    def _cache_size(self) -> int:
        return self._usual._cache_size() + self._frugal._cache_size()


@functools.partial(jax.jit, static_argnames=("config", "compute"))
def encode(
    params: Any,
    mels: jax.Array,
    frames: jax.Array,
    *,
    config: EncoderConfig,
    compute: Compute,
) -> moss_audio.Audio:
    """`encoder.encode_rows` as one program for prompts, familiarity and `encode_audio`.

    Every process gets all of its output.
    """
    return replicate(encoder.encode_rows(params, config, compute, mels, frames))


@functools.partial(
    _Program, static_argnames=("config", "compute", "vocab", "sampled"), donate_argnames=("state",)
)
def prefill(
    params: Any,
    state: DecodeState,
    batch: moss_audio.Batch,
    tables: jax.Array,
    answers: Answers,
    slots: jax.Array,
    audio: moss_audio.Audio | None = None,
    allowed: jax.Array | None = None,
    *,
    config: ModelConfig,
    compute: Compute,
    vocab: Vocabulary,
    sampled: bool = True,
) -> DecodeState:
    """Prefills whole prompts, packed into rows, and samples the first token of each.

    Args:
      tables: int [rows, b / rows, n], the pages of each prompt.
      answers: new ones [b] (`new_answers`).
      slots: int [b], the slot of each; a number beyond the slots is dropped.
      audio: at which the batch's `audio_index` points; None for a batch of text.
      allowed: bool [b, V], the tokens that may come first; None: all.
    """
    logits, cache = moss_audio.prefill(params, config, compute, batch, state.cache, tables, audio)
    return _filled(state._replace(cache=cache), answers, logits, slots, vocab, sampled, allowed)


@functools.partial(
    _Program, static_argnames=("config", "compute", "vocab", "sampled"), donate_argnames=("state",)
)
def extend(
    params: Any,
    state: DecodeState,
    batch: moss_audio.Batch,
    tables: jax.Array,
    answers: Answers,
    slots: jax.Array,
    start: jax.Array,
    audio: moss_audio.Audio | None = None,
    allowed: jax.Array | None = None,
    *,
    config: ModelConfig,
    compute: Compute,
    vocab: Vocabulary,
    sampled: bool = True,
) -> DecodeState:
    """Prefills a piece of each prompt [b], which continues its `start` [b] tokens in the cache.

    Only what is the last piece of its prompt has a slot; other slots lie beyond them.
    """
    logits, cache = moss_audio.extend(
        params, config, compute, batch, state.cache, tables, start, audio
    )
    return _filled(state._replace(cache=cache), answers, logits, slots, vocab, sampled, allowed)


def _filled(
    state: DecodeState,
    answers: Answers,
    logits: jax.Array,
    slots: jax.Array,
    vocab: Vocabulary,
    sampled: bool,
    allowed: jax.Array | None,
) -> DecodeState:
    """Samples the first token of new answers, and copies them into their slots."""
    new = sample(answers, logits, vocab, sampled, allowed=allowed)
    answers = jax.tree.map(lambda old, one: old.at[slots].set(one, mode="drop"), state.answers, new)
    return DecodeState(replicate(answers), state.cache)


@functools.partial(
    _Program,
    static_argnames=("config", "compute", "vocab", "sampled"),
    donate_argnames=("state",),
)
def decode_until(
    params: Any,
    state: DecodeState,
    tables: jax.Array,
    max_steps: jax.Array,
    enough_free: jax.Array,
    allowed: jax.Array | None = None,
    rows: jax.Array | None = None,
    *,
    config: ModelConfig,
    compute: Compute,
    vocab: Vocabulary,
    sampled: bool = True,
) -> DecodeState:
    """Decodes until `enough_free` slots are not running, or `max_steps` steps are done.

    Each step reads all pages of `tables` [B, n]; no running answer may grow beyond them. `allowed`
    bool [B, V] are the tokens that may come next, for a single step; None: all. `rows` int [b]: of
    these slots alone, so that B is b everywhere; numbers beyond the slots are none; None: of all.
    """
    whole = state.answers
    if rows is not None:
        answers = jax.tree.map(lambda x: x[rows], whole)
        there = rows < whole.state.shape[0]
        answers = answers._replace(state=jnp.where(there, answers.state, EMPTY))
        state = state._replace(answers=answers)

    def one(carry: tuple) -> tuple:
        (answers, cache), step = carry
        logits, cache = moss_audio.decode_step(
            params, config, compute, answers.token[:, None], answers.position, cache, tables
        )
        answers = replicate(sample(answers, logits[:, 0], vocab, sampled, allowed=allowed))
        return DecodeState(answers, kv_cache.pin(cache)), step + 1

    go_on = functools.partial(_unfinished, max_steps, enough_free)
    state, _ = jax.lax.while_loop(go_on, one, (state, jnp.int32(0)))
    answers = state.answers
    if rows is not None:
        answers = jax.tree.map(lambda x, new: x.at[rows].set(new, mode="drop"), whole, answers)
    # A constraint inside the loop does not fix the result's sharding, and every process needs all
    # answers.
    return DecodeState(replicate(answers), state.cache)


@functools.partial(
    _Program,
    static_argnames=("width", "config", "compute", "vocab", "sampled"),
    donate_argnames=("state",),
)
def draft_until(
    params: Any,
    state: DecodeState,
    tables: jax.Array,
    max_passes: jax.Array,
    enough_free: jax.Array,
    *,
    width: int,
    config: ModelConfig,
    compute: Compute,
    vocab: Vocabulary,
    sampled: bool = True,
) -> tuple[DecodeState, jax.Array]:
    """`decode_until` in passes of `width` tokens, all but the first of them drafts.

    A pass adds one token to each answer, and one more for each token of its draft that is the one
    the model chooses. Each token is chosen and recorded as in `decode_until`, with its own random
    key, so that loop guard, budgets and limits see them one by one.

    Returns:
      The state, and how many passes were made.
    """

    def one(carry: tuple) -> tuple:
        (answers, cache), passes = carry
        draft = propose(answers.hints, answers.output, answers.count, width - 1)
        known = jnp.concatenate([answers.token[:, None], jnp.maximum(draft, 0)], axis=1)
        logits, cache = moss_audio.decode_step(
            params, config, compute, known, answers.position, cache, tables
        )

        def take(carry: tuple, column: tuple) -> tuple[tuple, None]:
            answers, due = carry
            logits, drafted = column
            answers = sample(answers, logits, vocab, sampled, due)
            due = due & (answers.state == RUNNING) & (answers.token == drafted)
            return (replicate(answers), due), None

        # After the last column every draft is used up.
        drafted = jnp.pad(draft, ((0, 0), (0, 1)), constant_values=NOTHING)
        due = jnp.ones(answers.token.shape, bool)
        columns = jnp.moveaxis(logits, 1, 0), drafted.T
        (answers, _), _ = jax.lax.scan(take, (answers, due), columns)
        return DecodeState(answers, kv_cache.pin(cache)), passes + 1

    go_on = functools.partial(_unfinished, max_passes, enough_free)
    state, passes = jax.lax.while_loop(go_on, one, (state, jnp.int32(0)))
    return DecodeState(replicate(state.answers), state.cache), passes


def _unfinished(most: jax.Array, enough_free: jax.Array, carry: tuple) -> jax.Array:
    """Whether the device loop goes on, for its carry of (state, turns so far)."""
    state, turns = carry
    free = jnp.sum(state.answers.state != RUNNING)
    return (free < enough_free) & (turns < most)


@functools.partial(jax.jit, donate_argnames=("state",))
def end(state: DecodeState, slot: jax.Array, why: jax.Array) -> DecodeState:
    """Ends the answer in one slot for a reason, such as STOP."""
    answers = state.answers
    return state._replace(answers=answers._replace(state=answers.state.at[slot].set(why)))


@jax.jit
def logprobs_of(state: DecodeState, slot: jax.Array) -> Logprobs:
    """Those of one slot, without B."""
    return replicate(jax.tree.map(lambda kept: kept[slot], state.answers.logprobs))


def programs() -> int:
    """How many programs of this file were compiled."""
    return sum(
        each._cache_size()
        for each in (encode, prefill, extend, decode_until, draft_until, end, logprobs_of)
    )


@functools.partial(
    jax.jit,
    static_argnames=("config", "compute", "vocab", "count", "room", "pages", "hints", "logprobs"),
)
def empty_state(
    *,
    config: ModelConfig,
    compute: Compute,
    vocab: Vocabulary,
    count: int,
    room: int,
    pages: int,
    hints: int = 0,
    logprobs: bool = False,
) -> DecodeState:
    """A state of `count` empty slots, each for `room` new tokens, with `logprobs` also their
    log-probabilities, and `hints` tokens of hints; and a cache of `pages` pages for each group of
    devices."""
    zero = jnp.zeros((count,), jnp.int32)
    knobs = Knobs(*(zero.astype(dtype) for dtype in (float, int, float, float, float, int)))
    answers = Answers(
        token=zero,
        position=zero,
        output=jnp.zeros((count, room), jnp.int32),
        count=zero,
        state=jnp.full((count,), EMPTY),
        limit=zero,
        knobs=knobs,
        stop_ids=jnp.full((count, MAX_STOP_IDS), -1),
        seen=jnp.zeros((count, vocab.size), bool),
        guard=zero.astype(bool),
        matches=jnp.zeros((count, _LOOP_PERIODS), jnp.int32),
        thinking=zero.astype(bool),
        budget=zero,
        forced=zero,
        hints=jnp.zeros((count, hints), jnp.int32),
        wanted=zero.astype(bool),
        logprobs=_no_logprobs(count, room if logprobs else 0, vocab, jnp.zeros),
    )
    cache = kv_cache.init_cache(config.decoder, ways((count,), "batch"), pages, compute)
    return DecodeState(replicate(answers), cache)


def new_answers(
    requests: Sequence[tuple[Example, Sampling] | None],
    limits: Sequence[int],
    room: int,
    vocab: Vocabulary,
    hints: int = 0,
    logprobs: bool = False,
) -> Answers:
    """Answers before their first token: numpy arrays, an empty one for each None.

    What the prompts say is in their `hints` tokens of hints.
    """
    count = len(requests)
    samplings = [Sampling() if each is None else each[1] for each in requests]
    prompts = [np.zeros(0, np.int32) if each is None else each[0].ids for each in requests]

    def column(values: Sequence, dtype: type) -> np.ndarray:
        return np.array([*values], dtype)

    seen = np.zeros((count, vocab.size), bool)
    stop_ids = np.full((count, MAX_STOP_IDS), -1, np.int32)
    thinking = np.zeros((count,), bool)
    for slot, (ids, sampling) in enumerate(zip(prompts, samplings, strict=True)):
        seen[slot, ids] = True
        stop_ids[slot, : len(sampling.stop_ids)] = sampling.stop_ids
        marks = ids[(ids == vocab.think_open) | (ids == vocab.think_close)]
        thinking[slot] = len(marks) > 0 and marks[-1] == vocab.think_open
    unlimited = np.iinfo(np.int32).max
    budgets = [unlimited if s.thinking_budget is None else s.thinking_budget for s in samplings]
    return Answers(
        token=np.zeros((count,), np.int32),
        # `sample` adds one: the first new token comes right after the prompt.
        position=column([len(ids) - 1 for ids in prompts], np.int32),
        output=np.zeros((count, room), np.int32),
        count=np.zeros((count,), np.int32),
        state=column([EMPTY if each is None else RUNNING for each in requests], np.int32),
        limit=column(limits, np.int32),
        knobs=Knobs(
            # A device would take a tiny temperature as 0.
            temperature=column(
                [s.temperature and max(s.temperature, LEAST_FACTOR) for s in samplings], np.float32
            ),
            top_k=column([s.top_k for s in samplings], np.int32),
            top_p=column([s.top_p for s in samplings], np.float32),
            min_p=column([s.min_p for s in samplings], np.float32),
            repetition_penalty=column([s.repetition_penalty for s in samplings], np.float32),
            seed=column([s.seed % 2**31 for s in samplings], np.int32),
        ),
        stop_ids=stop_ids,
        seen=seen,
        guard=column([s.loop_guard for s in samplings], bool),
        matches=np.zeros((count, _LOOP_PERIODS), np.int32),
        thinking=thinking,
        budget=column(budgets, np.int32),
        forced=np.full((count,), len(vocab.close_thinking), np.int32),
        hints=np.stack([right_aligned(said(ids, vocab), hints) for ids in prompts]),
        wanted=column([s.logprobs is not None for s in samplings], bool),
        logprobs=_no_logprobs(count, room if logprobs else 0, vocab, np.zeros),
    )


def _no_logprobs(count: int, room: int, vocab: Vocabulary, zeros: Callable) -> Logprobs:
    shape = count, room, min(MOST_LOGPROBS, vocab.size)
    return Logprobs(zeros(shape[:2], np.float32), zeros(shape, np.int32), zeros(shape, np.float32))


def said(ids: np.ndarray, vocab: Vocabulary) -> np.ndarray:
    """A prompt's tokens without its audio."""
    return ids[ids != vocab.audio_token_id]


def right_aligned(ids: Sequence[int], room: int) -> np.ndarray:
    """The last `room` ids, int32 [room], padded with NOTHING on the left."""
    ids = np.asarray(ids, np.int32)[max(0, len(ids) - room) :]
    return np.pad(ids, (room - len(ids), 0), constant_values=NOTHING)
