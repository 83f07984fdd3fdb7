"""Batched generation: prompts are prefilled in buckets, slots decode together and are refilled.

Several questions about one clip are a family (`families`). What their prompts share is prefilled
once and kept until the last of them has a slot; each then runs its own rest.

The loop over tokens runs on the device (`decode_until`, with drafts `draft_until`). The host acts
only to refill slots once enough are free, to stream, to look for stop strings, or to see whether
drafts pay.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from moss_audio_jax.config import Compute, ModelConfig
from moss_audio_jax.data.batch import (
    MIN_LENGTH,
    Example,
    Shape,
    bucket,
    make_batch,
    packed_shape,
)
from moss_audio_jax.errors import InputError
from moss_audio_jax.generate.decode_state import (
    LENGTH,
    LOOP,
    RUNNING,
    STOP,
    Answers,
    DecodeState,
    decode_until,
    draft_until,
    empty_state,
    encode,
    end,
    extend,
    insert,
    new_answers,
    prefill,
    right_aligned,
    said,
    take_slots,
)
from moss_audio_jax.generate.drafts import Pace, Scribe, pieces_heard
from moss_audio_jax.generate.families import PREFILL_TOKENS, Family, Queue
from moss_audio_jax.generate.sampling import Sampling
from moss_audio_jax.generate.vocabulary import Vocabulary
from moss_audio_jax.models.cache import Cache, length_of, slots_of
from moss_audio_jax.models.decoder import unrolled
from moss_audio_jax.sharding import ways

FINISH_REASON = {STOP: "stop", LENGTH: "length", LOOP: "loop"}

_STOP_STRING_STEPS = 16  # tokens between two searches for stop strings
_STEPS_AHEAD, _LEAST_REACH = 32, 128  # see `_reach`
_WRITTEN = 4  # tokens of transcripts for one of audio, at most
_MIN_REST = 32  # the smallest bucket of tokens after a shared beginning


@dataclasses.dataclass(frozen=True)
class Output:
    """Token ids of one answer without its stop token, and why it ended: stop, length or loop."""

    ids: list[int]
    finish_reason: str


class Progress(NamedTuple):
    """How far the answer to request `number` is; `output` once it has ended."""

    number: int
    ids: list[int]
    output: Output | None


class Engine:
    """Generates answers with one set of parameters.

    Args:
      params: the model's tree, placed on `mesh`. If its decoder's layers are stacked they are
        unrolled here, and are then in memory twice.
      vocab: special ids; its `size` is the model's vocabulary.
      mesh: as `sharding.serving_mesh` makes it.
      decode: ids -> text, for stop strings; None if there is no tokenizer.
      slots: answers that are decoded together.
      scribe: of the CTC head that lies beside the model, for drafts; None if there is none.
    """

    def __init__(
        self,
        params: Any,
        config: ModelConfig,
        compute: Compute,
        vocab: Vocabulary,
        mesh: Mesh,
        decode: Callable[[list[int]], str] | None = None,
        slots: int = 16,
        scribe: Scribe | None = None,
    ) -> None:
        with jax.set_mesh(mesh):
            self._params = unrolled(params)
        self._static = {"config": config, "compute": compute, "vocab": vocab}
        self._mesh = mesh
        self._decode = decode
        self._slots = slots
        self._scribe = scribe

    def run(
        self,
        requests: Sequence[tuple[Example, Sampling]],
        on_done: Callable[[int, Output], None] | None = None,
        on_token: Callable[[int, list[int]], None] | None = None,
    ) -> list[Output]:
        """Answers every request; the order of the results is that of the requests.

        Args:
          requests: prompts with their sampling.
          on_done: called with (request number, output) as each answer ends.
          on_token: streaming: called with (request number, ids so far) after every token.

        Raises:
          InputError: a prompt does not fit the model's positions, or its placeholders and clips
            disagree.
        """
        results: list[Output | None] = [None] * len(requests)
        for number, ids, output in self.progress(requests, on_token is not None):
            if on_token is not None:
                on_token(number, ids)
            if output is not None:
                results[number] = output
                if on_done is not None:
                    on_done(number, output)
        return results

    def progress(
        self, requests: Sequence[tuple[Example, Sampling]], each_token: bool
    ) -> Iterator[Progress]:
        """The work of `run` bit by bit: after every token, or whenever the device loop returns."""
        work = self._progress(requests, each_token) if requests else iter(())
        while True:
            with jax.set_mesh(self._mesh):  # not around the yield: there the mesh is the caller's
                told = next(work, None)
            if told is None:
                return
            yield from told

    def _progress(self, requests, each_token) -> Iterator[list[Progress]]:
        max_positions = self._static["config"].decoder.max_positions
        for example, _ in requests:
            if len(example.ids) >= max_positions:
                raise InputError(
                    f"the prompt has {len(example.ids)} tokens, but the model has "
                    f"{max_positions} positions; shorten the audio or the text"
                )
        limits = [min(s.max_new_tokens, max_positions - len(e.ids)) for e, s in requests]
        slots_count = bucket(min(self._slots, len(requests)))
        room = bucket(max(limits), 64)
        size = bucket(
            max(len(e.ids) + n for (e, _), n in zip(requests, limits, strict=True)), MIN_LENGTH
        )
        pace = Pace(slots_count) if any(s.drafts for _, s in requests) else None
        scribe, hints = self._scribe if pace else None, 0
        if pace:
            hints = bucket(max(self._hints(e, scribe is not None) for e, _ in requests), MIN_LENGTH)
        decoding = empty_state(**self._static, count=slots_count, room=room, size=size, hints=hints)
        static = self._static | {"sampled": any(s.temperature > 0 for _, s in requests)}
        prefiller = _Prefiller(self._params, static, requests, limits, room, size, hints, scribe)
        watched = [bool(s.stop) and self._decode is not None for _, s in requests]
        owner: list[int | None] = [None] * slots_count  # the request in each slot
        count = np.zeros(slots_count, int)  # tokens of its answer so far
        heard = np.zeros(len(requests), int)  # tokens of each request that were told
        while prefiller or any(number is not None for number in owner):
            free = [slot for slot, number in enumerate(owner) if number is None]
            if prefiller and free:
                taken, new = prefiller.take(len(free))
                at = np.full(new.answers.token.shape, slots_count)
                at[: len(taken)] = free[: len(taken)]
                decoding = insert(decoding, new, at)
                del new  # its cache is as large as a prefill
                for slot, number in zip(free, taken, strict=False):
                    owner[slot] = number
            else:
                width, steps = pace.next(max(limits)) if pace else (1, max(limits))
                if each_token:
                    steps = 1
                elif any(number is not None and watched[number] for number in owner):
                    steps = min(steps, max(1, _STOP_STRING_STEPS // width))
                # Return when a quarter of the slots are done, to refill them or to report them.
                resting = sum(number is None for number in owner)
                enough = min(resting + max(1, slots_count // 4), slots_count)
                # Where the longest answer's next token goes.
                top = max(
                    len(requests[number][0].ids) + count[slot] - 1
                    for slot, number in enumerate(owner)
                    if number is not None
                )
                reach = _reach(top, size)
                if reach < size:  # beyond that all answers have come to their limits
                    steps = min(steps, (reach - top) // width)
                running = [slot for slot, number in enumerate(owner) if number is not None]
                if width == 1:
                    decoding = decode_until(
                        self._params, decoding, steps, enough, reach=reach, **static
                    )
                else:
                    before = count[running].sum()
                    decoding, passes = draft_until(
                        self._params, decoding, steps, enough, reach=reach, width=width, **static
                    )
                    made, passes = jax.device_get((decoding.answers.count, passes))
                    pace.told(made[running].sum() - before, int(passes) * len(running))

            state, count, output = jax.device_get(
                (decoding.answers.state, decoding.answers.count, decoding.answers.output)
            )
            told = []
            for slot, number in enumerate(owner):
                if number is None:
                    continue
                ids = output[slot, : count[slot]].tolist()
                reason = int(state[slot])
                if watched[number]:
                    cut = self._first_stop(ids, requests[number][1].stop)
                    if cut is not None:
                        ids, reason = ids[:cut], STOP
                        decoding = end(decoding, slot, STOP)
                ended = None if reason == RUNNING else Output(ids, FINISH_REASON[reason])
                if each_token:
                    between = range(heard[number] + 1, len(ids))
                    told += [Progress(number, ids[:n], None) for n in between]
                heard[number] = len(ids)
                told.append(Progress(number, ids, ended))
                if ended is not None:
                    owner[slot] = None
            yield told

    def _hints(self, example: Example, heard: bool) -> int:
        """Room for the hints about one answer."""
        words = len(said(example.ids, self._static["vocab"]))
        return words + heard * _WRITTEN * (len(example.ids) - words)

    def _first_stop(self, ids: list[int], stops: tuple[str, ...]) -> int | None:
        """The number of ids before the text first holds a stop string, or None if it never does."""
        if not any(stop in self._decode(ids) for stop in stops):
            return None
        low, high = 0, len(ids)  # the text of ids[:low] holds none, that of ids[:high] does
        while high - low > 1:
            middle = (low + high) // 2
            if any(stop in self._decode(ids[:middle]) for stop in stops):
                high = middle
            else:
                low = middle
        return high


def _reach(top: int, size: int) -> int:
    """Positions that the next steps read of a cache with `size`: all, half, a quarter and so on.

    A step reads what it may reach, and most answers end long before their limit. Each size is its
    own program. Some steps beyond `top` have room, so that the device loop does not return at once.
    """
    while size % 2 == 0 and size // 2 >= max(top + _STEPS_AHEAD, _LEAST_REACH):
        size //= 2
    return size


class _Waiting(NamedTuple):
    """A request whose prompt's beginning has been prefilled."""

    number: int
    slot: int  # of the prefixes' cache
    begin: int  # tokens that are in there
    heard: list[int]  # what was heard, as transcripts


class _Prefiller:
    """Prompts that wait for slots; true as long as there are any.

    The slots have space for `room` new tokens, `size` tokens in the cache and `hints` of hints.
    """

    def __init__(
        self,
        params: Any,
        static: dict[str, Any],
        requests: Sequence[tuple[Example, Sampling]],
        limits: Sequence[int],
        room: int,
        size: int,
        hints: int,
        scribe: Scribe | None,
    ) -> None:
        # A prompt attends to its own keys and values unrounded, in one pass or in two; only the
        # slots' cache rounds them.
        compute = dataclasses.replace(static["compute"], quantize="none")
        self._params, self._static = params, static | {"compute": compute}
        self._config, self._vocab = static["config"], static["vocab"]
        self._requests, self._limits = requests, limits
        self._room, self._size, self._hints = room, size, hints
        self._scribe = scribe
        examples = [example for example, _ in requests]
        self._queue = Queue(examples, self._config.encoder, self._vocab.audio_token_id)
        self._prefixes: Cache | None = None  # of the families that have members waiting
        self._waiting: list[_Waiting] = []

    def __bool__(self) -> bool:
        return bool(self._waiting or self._queue)

    def take(self, free: int) -> tuple[list[int], DecodeState]:
        """Prefills up to `free` requests: their numbers, and new slots that hold them."""
        if not self._waiting:
            families = self._queue.take(free)
            if not families[0].shared:
                numbers = [family.members[0] for family in families]
                new, heard = self._prefill(numbers, [len(self._ids(i)) for i in numbers])
                return numbers, self._hinted(new, numbers, heard)
            self._begin(families)
        return self._extend(free)

    def _ids(self, number: int) -> np.ndarray:
        return self._requests[number][0].ids

    def _prefill(
        self, numbers: Sequence[int], lengths: Sequence[int]
    ) -> tuple[DecodeState, list[list[int]]]:
        """Prefills the first tokens of some prompts, padded to a bucket of slots. Also says what
        was heard in each."""
        encoder = self._config.encoder
        examples = [
            Example(self._ids(number)[:length], self._requests[number][0].mels)
            for number, length in zip(numbers, lengths, strict=True)
        ]
        slots = bucket(len(examples))
        rows = ways((slots,), "batch")  # one for each group of devices
        each = slots // rows
        packed = [examples[each * row : each * (row + 1)] for row in range(rows)]
        shape = packed_shape(packed, encoder, each)
        length = min(bucket(max(lengths), MIN_LENGTH), self._config.decoder.max_positions)
        if each == 1:
            shape = dataclasses.replace(shape, tokens=length)
        batch = make_batch(packed, shape, encoder, self._vocab.audio_token_id)
        audio = None
        if shape.chunks:
            sound = (batch[name] for name in ("mels", "frames"))
            compute = self._static["compute"]
            audio = encode(self._params["audio_encoder"], *sound, config=encoder, compute=compute)
        answers = self._answers(numbers, slots)
        new = prefill(self._params, batch, answers, audio, length=length, **self._static)
        if self._scribe is None or audio is None:
            return new, [[] for _ in numbers]
        heard, written = np.asarray(pieces_heard(self._scribe.ear, audio[0])), []
        for slot in range(len(numbers)):
            row, segment = divmod(slot, each)
            index = batch["audio_index"][row, batch["segment_ids"][row] == segment + 1]
            written.append(self._scribe.write(heard[row, index[index >= 0]]))
        return new, written

    def _hinted(
        self, new: DecodeState, numbers: Sequence[int], heard: Sequence[list[int]]
    ) -> DecodeState:
        """New slots that know what was heard in their prompts."""
        if not any(heard):
            return new
        hints = np.array(new.answers.hints)
        for slot, (number, written) in enumerate(zip(numbers, heard, strict=True)):
            text = said(self._ids(number), self._vocab)
            hints[slot] = right_aligned([*written, *text], self._hints)
        return new._replace(answers=new.answers._replace(hints=hints))

    def _begin(self, families: Sequence[Family]) -> None:
        """Prefills what the members of each family share. All members wait afterwards."""
        # Reuses the program for whole prompts and only keeps its cache: one less to compile.
        numbers, lengths = [f.members[0] for f in families], [f.shared for f in families]
        new, heard = self._prefill(numbers, lengths)
        self._prefixes = new.cache
        self._waiting = [
            _Waiting(number, slot, family.shared, heard[slot])
            for slot, family in enumerate(families)
            for number in family.members
        ]

    def _extend(self, free: int) -> tuple[list[int], DecodeState]:
        """Prefills the rests of up to `free` prompts that wait."""
        rests = [len(self._ids(each.number)) - each.begin for each in self._waiting[:free]]
        tokens = bucket(max(rests), _MIN_REST)
        length = min(length_of(self._prefixes) + tokens, self._size)
        together = min(free, max(1, PREFILL_TOKENS // length))
        taken, self._waiting = self._waiting[:together], self._waiting[together:]
        shape = Shape(bucket(len(taken)), tokens, 0, self._config.encoder.chunk_frames)
        numbers = [each.number for each in taken]
        texts = [[Example(self._ids(each.number)[each.begin :])] for each in taken]
        batch = make_batch(texts, shape, self._config.encoder, self._vocab.audio_token_id)
        slot, begin = np.zeros((2, shape.rows), np.int32)
        slot[: len(taken)] = [each.slot for each in taken]
        begin[: len(taken)] = [each.begin for each in taken]
        cache = take_slots(self._prefixes, slot, length=length)
        self._release()
        answers = self._answers(numbers, shape.rows)
        new = extend(self._params, batch, answers, cache, begin, **self._static)
        return numbers, self._hinted(new, numbers, [each.heard for each in taken])

    def _release(self) -> None:
        """Frees the prefixes that no prompt waits for."""
        needed = sorted({each.slot for each in self._waiting})
        if not needed:
            self._prefixes = None
        elif bucket(len(needed)) < slots_of(self._prefixes):
            slot = np.zeros(bucket(len(needed)), np.int32)
            slot[: len(needed)] = needed
            length = length_of(self._prefixes)
            self._prefixes = take_slots(self._prefixes, slot, length=length)
            self._waiting = [each._replace(slot=needed.index(each.slot)) for each in self._waiting]

    def _answers(self, numbers: Sequence[int], count: int) -> Answers:
        requests = [self._requests[number] for number in numbers]
        limits = [self._limits[number] for number in numbers]
        return new_answers(requests, limits, self._room, count, self._vocab, self._hints)
