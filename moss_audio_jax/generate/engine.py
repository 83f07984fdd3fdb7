"""The engine that generates all answers, for requests that come at any time.

A request waits in line until a slot is free and pages of the cache are promised for all that it may
need. Its sound is heard (`hearing`), its prompt is prefilled in pieces (`piece_tokens`), and
then its slot is decoded together with the others. What begins like an earlier prompt takes that
one's pages (`pages`), so a second question about a clip runs its own words only.

The loop over tokens runs on the device (`decode_until`, with drafts `draft_until`). The host acts
between turns: it admits, prefills, streams, looks for stop strings and sees whether drafts pay.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from moss_audio_jax.config import Compute, ModelConfig
from moss_audio_jax.data.batch import Example, bucket, check, pieces_of
from moss_audio_jax.errors import TooLong
from moss_audio_jax.generate.decode_state import (
    EMPTY,
    LENGTH,
    LOOP,
    RUNNING,
    STOP,
    DecodeState,
    decode_until,
    draft_until,
    empty_state,
    end,
    extend,
    logprobs_of,
    new_answers,
    prefill,
    right_aligned,
    said,
)
from moss_audio_jax.generate.drafts import Likeliest, Pace, Scribe
from moss_audio_jax.generate.familiarity import Measures
from moss_audio_jax.generate.hearing import Heard, Hearing, Piece, sound_of
from moss_audio_jax.generate.pages import Pages, marks_of, page_keys, text_marks
from moss_audio_jax.generate.request import Guide, Prepared, TokenLogprobs
from moss_audio_jax.generate.sampling import Sampling
from moss_audio_jax.generate.shapes import LEAST_REACH, TOGETHER, Few, Tight
from moss_audio_jax.generate.vocabulary import Vocabulary
from moss_audio_jax.models.cache import NOWHERE, PAGE, pages_for
from moss_audio_jax.models.decoder import unrolled
from moss_audio_jax.sharding import ways

FINISH_REASON = {STOP: "stop", LENGTH: "length", LOOP: "loop"}
_STEPS_A_TURN = 8  # tokens between two looks at who has come
_STOP_STRING_STEPS = 16  # tokens between two searches for stop strings
_WORTH = 4  # a beginning of so many parts of a prompt is taken from another one
_WRITTEN = 4  # tokens of transcripts for one of audio, at most


@dataclasses.dataclass(frozen=True)
class Output:
    """Token ids of one answer without its stop token, and why it ended: stop, length, loop,
    cancelled, or error if the engine died. `cached_tokens` of its prompt were not run, because
    their keys and values were kept from before."""

    ids: list[int]
    finish_reason: str
    logprobs: list[TokenLogprobs] | None = None  # if `Sampling.logprobs` asks for them
    ending: TokenLogprobs | None = None  # then also of the stop token
    measures: tuple[Measures | None, ...] = ()  # of each clip: is it like the training data?
    cached_tokens: int = dataclasses.field(default=0, compare=False)  # the answer is the same
    heard: tuple[Likeliest | None, ...] = dataclasses.field(default=(), compare=False)  # in clips


class Progress(NamedTuple):
    """How far the answer to request `number` is; `output` once it has ended. `logprobs` are those
    of `ids`, if they are asked for and each token is told."""

    number: int
    ids: list[int]
    output: Output | None
    logprobs: list[TokenLogprobs] | None = None


class Size(NamedTuple):
    """What the decode state is made for.

    Attributes:
      slots: answers that are decoded together.
      pages: of the cache, in each group of devices.
      room: new tokens of one answer.
      logprobs: whether log-probabilities of the tokens are kept for who asks.
      hints: tokens of hints for drafts.
    """

    slots: int
    pages: int
    room: int
    logprobs: bool = True
    hints: int = 0


@dataclasses.dataclass(eq=False)
class Asked:
    """A request, and how far it is."""

    number: int
    example: Example
    sampling: Sampling
    limit: int  # new tokens
    clips: list[list[Piece]]  # of sound
    marks: np.ndarray  # [L, 3]
    keys: list[bytes]  # of its whole pages
    each_token: bool  # is somebody told of every token?
    slot: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)
    promised: int = 0
    learnt: int = 0  # its first pages that are known to `Pages`
    done: int = 0  # tokens of the prompt that are in the cache
    cached: int = 0  # of these: they were there before it
    heard: dict[bytes, Heard] = dataclasses.field(default_factory=dict)  # what the next piece needs
    count: int = 0  # tokens of the answer
    told: int = 0  # of these
    pushed: int = 0  # of these: its guide knows them
    begun: bool = False  # is its answer in the decode state?
    logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)  # fetched so far

    @property
    def length(self) -> int:
        return len(self.example.ids)

    @property
    def sound(self) -> list[Piece]:
        return [piece for clip in self.clips for piece in clip]

    @property
    def guide(self) -> Guide | None:
        return self.example.guide if isinstance(self.example, Prepared) else None

    @property
    def tokens(self) -> int:
        """The most that it may hold in the cache."""
        return self.length + self.limit


class Engine:
    """Generates answers with one set of parameters.

    Args:
      params: the model's tree, placed on `mesh`. If its decoder's layers are stacked they are
        unrolled here, and are then in memory twice.
      vocab: special ids; its `size` is the model's vocabulary.
      mesh: as `sharding.serving_mesh` makes it.
      decode: ids -> text, for stop strings; None if there is no tokenizer.
      slots: answers that are decoded together by `run`.
      scribe: of the CTC head that lies beside the model, for drafts; None if there is none.
      size: what the state is made for, once and for all; None: for the requests of each `run`.
      hearing: the encoder's outputs, if they are shared with others; None: its own.
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
        size: Size | None = None,
        hearing: Hearing | None = None,
    ) -> None:
        with jax.set_mesh(mesh):
            self._params = unrolled(params)
        self._config, self._vocab, self._mesh = config, vocab, mesh
        self._static = {"config": config, "compute": compute, "vocab": vocab}
        self._decode = decode
        self._slots = slots
        self._scribe = scribe
        self.hearing = hearing or Hearing(
            params["audio_encoder"],
            config.encoder,
            compute,
            head=scribe.head if scribe else None,
            few=size is not None,
        )
        self._numbers = itertools.count(1)
        self._line: list[Asked] = []
        self._owner: list[Asked | None] = []  # of each slot
        self._groups: list[Pages] = []
        self._state: DecodeState | None = None
        self._size: Size | None = None
        self._pace: Pace | None = None
        self._patient, self._sampled = True, True
        self._piece = piece_tokens(mesh.devices.flat[0].platform)
        self.counts = dict.fromkeys(("prompt_tokens", "cached_tokens", "new_tokens", "turns"), 0)
        if size is not None:
            self._patient = False
            self._make(size)

    # --- requests ------------------------------------------------------------------------------

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
          TooLong: a prompt does not fit the model's positions.
          InputError: its placeholders and clips disagree.
        """
        results: list[Output | None] = [None] * len(requests)
        for number, ids, output, _ in self.progress(requests, on_token is not None):
            if on_token is not None:
                on_token(number, ids)
            if output is not None:
                results[number] = output
                if on_done is not None:
                    on_done(number, output)
        return results

    def answer(self, example: Example, sampling: Sampling) -> Output:
        """Answers one request. Raises InputError as `run` does."""
        return self.run([(example, sampling)])[0]

    def progress(
        self, requests: Sequence[tuple[Example, Sampling]], each_token: bool
    ) -> Iterator[Progress]:
        """The work of `run` bit by bit: after every token, or whenever the device loop returns."""
        make = self._asked if self._patient else self.asked
        asked = [make(*request, each_token) for request in requests]
        if not asked:
            return
        if self._patient:
            self._fit(asked)
        number = {one.number: at for at, one in enumerate(asked)}
        # Costly prompts first, so that short ones fill the end; questions about one clip together.
        self._line += sorted(
            asked, key=lambda one: (-one.length, [each.digest for each in one.sound])
        )
        try:
            while self.busy:
                for one in self.step():
                    yield one._replace(number=number[one.number])
        except GeneratorExit:  # the caller stops early, between two turns
            for one in asked:
                self.cancel(one.number)
            raise
        except BaseException:
            self._forget()
            raise

    def asked(self, example: Example, sampling: Sampling, each_token: bool = False) -> Asked:
        """A request for `enter`; any thread may make one.

        Raises:
          TooLong: it does not fit the model's positions or the engine's size.
          InputError: its placeholders and clips disagree.
        """
        one = self._asked(example, sampling, each_token)
        most = self._shapes.most
        if one.length >= most:
            raise TooLong(
                f"the prompt has {one.length} tokens, but the cache holds {most}; shorten the "
                "audio or the text"
            )
        one.limit = min(one.limit, self._size.room, most - one.length)
        return one

    def enter(self, one: Asked) -> int:
        """Puts a request in line; returns its number."""
        self._line.append(one)
        return one.number

    def compile(self, told: Callable[[int, int], None]) -> int:
        """Runs each program that requests may need with nothing in it, before any request comes.

        Of an engine that was made for a size. If an encoder hears whole clips, and not chunks, its
        programs are left out: there is one for each length.

        Args:
          told: called with (programs so far, of how many).

        Returns:
          How many programs there are.
        """
        shapes, groups, slots = self._shapes, len(self._groups), len(self._owner)

        def packed(tokens: int) -> None:
            tables = np.full((groups, TOGETHER, pages_for(tokens)), NOWHERE, np.int32)
            self._run(prefill, self._batch(groups, tokens), tables, [None] * groups * TOGETHER)

        def piece(rows: int, tokens: int, reach: int) -> None:
            batch, count = self._batch(groups * rows, tokens), groups * rows
            del batch["positions"]
            tables = np.full((count, pages_for(reach)), NOWHERE, np.int32)
            self._run(extend, batch, tables, [None] * count, np.zeros(count, np.int32))

        def decode(rows: int, reach: int, guided: bool) -> None:
            tables = np.full((rows, pages_for(reach)), NOWHERE, np.int32)
            allowed = np.ones((rows, self._vocab.size), bool) if guided else None
            alone = [slots] * rows if rows < slots else None
            self._decode_until(tables, 1, rows, allowed, alone)

        def rest() -> None:
            logprobs_of(self._state, 0)
            self._state = end(self._state, 0, EMPTY)

        work = [
            *(functools.partial(self.hearing.silence, strips) for strips in self.hearing.sizes),
            *(functools.partial(packed, tokens) for tokens in shapes.all_packed()),
            *(functools.partial(piece, *each) for each in shapes.all_pieces()),
            *(
                functools.partial(decode, rows, reach, guided)
                for rows in self._rows
                for guided in (False, True)
                for reach in shapes.all_reaches(guided)
            ),
            rest,
        ]
        with jax.set_mesh(self._mesh):
            for number, run in enumerate(work, 1):
                run()
                told(number, len(work))
        return len(work)

    def cancel(self, number: int) -> Progress | None:
        """Ends a request wherever it is, and frees its place; None if it has ended already."""
        for one in [*self._line, *self._running]:
            if one.number == number:
                return self._end(one, Output(self._ids(one), "cancelled"))
        return None

    @property
    def busy(self) -> bool:
        return bool(self._line or self._running)

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._line)

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return len(self._running)

    @property
    def slots(self) -> int:
        return len(self._owner)

    @property
    def room(self) -> int:
        """Tokens that the cache has room for."""
        return sum(group.count for group in self._groups) * PAGE

    @property
    def held(self) -> tuple[int, int]:
        """Tokens that the pages in use have room for, and tokens in them."""
        pages = sum(group.used for group in self._groups) * PAGE
        tokens = sum(min(one.done + one.count, one.tokens) for one in [*self._owner] if one)
        return pages, tokens

    def step(self) -> list[Progress]:
        """One turn: admits who can be admitted, prefills a piece of prompts, decodes some tokens.

        Prompts are prefilled first if the engine is patient, as in `run`. Otherwise a piece of
        them and some tokens of the running answers take turns.
        """
        with jax.set_mesh(self._mesh):
            self.counts["turns"] += 1
            self._admit()
            begun = [one for one in self._running if one.done < one.length]
            if begun:
                self._prefill(begun)
                begun = [one for one in begun if one.done < one.length]
            if self._patient and (begun or self._admit()):
                return []
            if not any(one.done == one.length for one in self._running):
                return []
            self._advance()
            return self._tell()

    def renew(self, params: Any) -> None:
        """Other weights of the same model; None frees the old ones, and the cache, until the next
        call. Nothing may be running.

        What was kept of earlier prompts and of what was heard is forgotten: answers depend on what
        is asked from here on alone, to the last bit.
        """
        self._params = self._state = None
        self.hearing.renew(None if params is None else params["audio_encoder"])
        if params is None:
            return
        with jax.set_mesh(self._mesh):
            self._params = unrolled(params)
        if self._size is not None:
            self._make(self._size)

    # --- before a turn -------------------------------------------------------------------------

    def _asked(self, example: Example, sampling: Sampling, each_token: bool) -> Asked:
        config, positions = self._config.encoder, self._config.decoder.max_positions
        check(example, config, self._vocab.audio_token_id)
        if len(example.ids) >= positions:
            raise TooLong(
                f"the prompt has {len(example.ids)} tokens, but the model has {positions} "
                "positions; shorten the audio or the text"
            )
        sound = sound_of(example.mels, config)
        rest = iter(sound)
        counts = [len(pieces_of([mel.shape[1]], config)) for mel in example.mels]
        marks = marks_of(example, sound, self._vocab.audio_token_id)
        limit = min(sampling.max_new_tokens, positions - len(example.ids))
        return Asked(
            next(self._numbers),
            example,
            sampling,
            limit,
            [[*itertools.islice(rest, count)] for count in counts],
            marks,
            page_keys(marks),
            each_token,
        )

    def _fit(self, asked: Sequence[Asked]) -> None:
        """Makes the state anew if it is not made for these requests. Nothing may be running."""
        slots = bucket(min(self._slots, len(asked)))
        with jax.set_mesh(self._mesh):
            groups = ways((slots,), "batch")
        pages = _pages_for_all([one.tokens for one in asked], slots // groups)
        hints, drafts = 0, any(one.sampling.drafts for one in asked)
        if drafts:
            hints = bucket(max(self._hints(one.example) for one in asked), 64)
        logprobs = any(one.sampling.logprobs is not None for one in asked)
        size = Size(slots, pages, bucket(max(one.limit for one in asked), 64), logprobs, hints)
        old = self._size
        if old is None or old.slots != slots or any(a < b for a, b in zip(old, size, strict=True)):
            self._make(size)
        self._pace = Pace(slots, self._static["compute"]) if drafts else None
        self._sampled = any(one.sampling.temperature > 0 for one in asked)

    def _make(self, size: Size) -> None:
        self._size, self._owner, self._state = size, [None] * size.slots, None
        most = min(size.pages * PAGE, self._config.decoder.max_positions)
        self._shapes = (Tight if self._patient else Few)(self._piece, most)
        with jax.set_mesh(self._mesh):
            self._groups = [Pages(size.pages) for _ in range(ways((size.slots,), "batch"))]
            self._state = empty_state(
                **self._static,
                count=size.slots,
                room=size.room,
                pages=size.pages,
                hints=size.hints,
                logprobs=size.logprobs,
            )

    def _forget(self) -> None:
        """After a turn that was broken off, by Ctrl-C or for want of memory: its programs may have
        taken the state and given no other."""
        size, self._size, self._state = self._size, None, None
        self._line, self._owner, self._groups = [], [], []
        self.hearing.renew(self.hearing.params)
        if not self._patient:
            self._make(size)

    # --- in line -------------------------------------------------------------------------------

    @property
    def _running(self) -> list[Asked]:
        return [one for one in self._owner if one is not None]

    def _group(self, slot: int) -> int:
        return slot * len(self._groups) // len(self._owner)

    def _admit(self) -> bool:
        """Gives free slots to those in line, in order; says whether anyone got one.

        Who begins like a prompt that is just being prefilled lets others pass, to take its pages.
        """
        waiting = len(self._line)
        coming: list[set[bytes]] = [set() for _ in self._groups]
        for one in self._running:
            coming[self._group(one.slot)].update(one.keys[one.learnt :])
        for one in [*self._line]:
            free: dict[int, int] = {}
            for slot in reversed(range(len(self._owner))):
                if self._owner[slot] is None:
                    free[self._group(slot)] = slot
            if not free:
                break
            # The prompt's last token must be run, to know what follows it.
            keys = one.keys[: (one.length - 1) // PAGE]
            # A short beginning, such as a system text that all have alike, is not worth a pass over
            # pages: whole prompts are packed more tightly.
            worth = one.length / (_WORTH * PAGE)
            known = {group: self._groups[group].known(keys) for group in free}
            soon = {group: self._groups[group].known(keys, coming[group]) for group in free}
            if any(worth <= len(soon[group]) > len(known[group]) for group in free):
                continue
            best = max(free, key=lambda g: (len(known[g]), self._groups[g].available))
            shared = known[best] if worth <= len(known[best]) else []
            more = pages_for(one.tokens) - len(shared)
            if not self._groups[best].promise(shared, more):
                break
            self._line.remove(one)
            one.slot, one.pages, one.promised = free[best], [*shared], more
            one.learnt, one.done = len(shared), len(shared) * PAGE
            one.cached = one.done
            self._owner[one.slot] = one
            coming[best].update(one.keys[one.learnt :])
            self.counts["prompt_tokens"] += one.length
            self.counts["cached_tokens"] += one.done
            for piece in self._sound(one, one.done, one.length):
                self.hearing.want(piece)
        return len(self._line) < waiting

    def _sound(self, one: Asked, start: int, stop: int) -> list[Piece]:
        """The pieces of sound that have tokens among start..stop of a prompt."""
        is_sound = one.example.ids == self._vocab.audio_token_id
        before, inside = np.sum(is_sound[:start]), np.sum(is_sound[start:stop])
        ends = np.cumsum([piece.tokens for piece in one.sound])
        first = np.searchsorted(ends, before, side="right")
        last = np.searchsorted(ends, before + inside, side="left")
        return one.sound[first : last + 1] if inside else []

    # --- prefill -------------------------------------------------------------------------------

    def _prefill(self, begun: Sequence[Asked]) -> None:
        """Prefills whole prompts or pieces, those of the longest waiting first."""
        begun = sorted(begun, key=lambda one: one.number) if not self._patient else begun
        ready = []
        for one in begun:
            if self._hears(one, min(one.done + self._piece, one.length)):
                ready.append(one)
            elif not ready or self._patient:
                self.hearing.turn()
                if not self._patient:
                    return
                if self._hears(one, min(one.done + self._piece, one.length)):
                    ready.append(one)
        if not ready:
            return
        if ready[0].done == 0 and ready[0].length <= self._piece:
            self._prefill_whole(
                [one for one in ready if one.done == 0 and one.length <= self._piece]
            )
        else:
            self._prefill_pieces([one for one in ready if one.done or one.length > self._piece])

    def _hears(self, one: Asked, stop: int) -> bool:
        """Whether what the next piece needs of the sound is there."""
        needed = self._sound(one, one.done, stop)
        one.heard = {piece.digest: self.hearing.get(piece.digest) for piece in needed}
        missing = [piece for piece in needed if one.heard[piece.digest] is None]
        for piece in missing:  # it may have been dropped since
            self.hearing.want(piece)
        return not missing

    def _prefill_whole(self, ready: Sequence[Asked]) -> None:
        """Prefills prompts that fit into a row, packed into one row for each group of devices."""
        groups = len(self._groups)
        rows: list[list[Asked]] = [[] for _ in range(groups)]
        used = [0] * groups
        for one in ready:
            group = self._group(one.slot)
            if used[group] + one.length <= self._piece and len(rows[group]) < TOGETHER:
                rows[group].append(one)
                used[group] += one.length
        tokens, each = self._shapes.packed(max(used), max(map(len, rows)))
        batch = self._batch(groups, tokens)
        reach = pages_for(tokens)
        tables = np.full((groups, each, reach), NOWHERE, np.int32)
        placed: list[Asked | None] = [None] * (groups * each)
        for group, row in enumerate(rows):
            at = 0
            for segment, one in enumerate(row):
                here = slice(at, at + one.length)
                self._lay(batch, (group, here), one, 0, one.length)
                batch["segment_ids"][group, here] = segment + 1
                batch["positions"][group, here] = np.arange(one.length)
                self._grow(one, one.length)
                tables[group, segment, : len(one.pages)] = one.pages
                placed[group * each + segment] = one
                at += one.length
        self._run(prefill, batch, tables, placed)

    def _prefill_pieces(self, ready: Sequence[Asked]) -> None:
        """Prefills the next piece of prompts that are long or begun, each in a row of its own."""
        groups = len(self._groups)
        width, most = self._shapes.row(ready[0].length - ready[0].done)
        rows: list[list[Asked]] = [[] for _ in range(groups)]
        for one in ready:
            row = rows[self._group(one.slot)]
            fits = one.length - one.done <= width or one is ready[0]
            if len(row) < most and (fits or width == self._piece):
                row.append(one)
        each = self._shapes.rows(max(map(len, rows)), width)
        batch = self._batch(groups * each, width)
        start = np.zeros(groups * each, np.int32)
        placed: list[Asked | None] = [None] * (groups * each)
        for group, row in enumerate(rows):
            for at, one in enumerate(row, group * each):
                stop = min(one.done + width, one.length)
                here = slice(0, stop - one.done)
                self._lay(batch, (at, here), one, one.done, stop)
                batch["segment_ids"][at, here] = 1
                start[at] = one.done
                self._grow(one, stop)
                placed[at] = one
        reach = max(one.done for one in placed if one) + width
        reach = pages_for(self._shapes.reach_before(reach))
        tables = np.full((groups * each, reach), NOWHERE, np.int32)
        for at, one in enumerate(placed):
            if one:
                tables[at, : len(one.pages)] = one.pages[:reach]
        del batch["positions"]
        self._run(extend, batch, tables, placed, start)

    def _run(
        self,
        program: Callable[..., DecodeState],
        batch: dict[str, np.ndarray],
        tables: np.ndarray,
        placed: Sequence[Asked | None],
        *start: np.ndarray,
    ) -> None:
        """Runs a prefill, whose prompts stand in `placed`."""
        count = len(placed)
        audio = batch.pop("features"), batch.pop("taps")
        if self._patient and not (batch["audio_index"] >= 0).any():
            audio = None  # a batch of text needs no features
        slots = np.full(count, len(self._owner), np.int32)
        requests: list[tuple[Example, Sampling] | None] = [None] * count
        lengths = batch["segment_ids"].sum(axis=1)
        for at, one in enumerate(placed):
            if one is None:
                continue
            one.done = min(one.length, one.done + int(lengths[at])) if start else one.length
            if one.done == one.length:
                slots[at] = one.slot
                requests[at] = one.example, one.sampling
            self._learn(one)
        limits = [one.limit if one else 0 for one in placed]
        size = self._size
        answers = new_answers(requests, limits, size.room, self._vocab, size.hints, size.logprobs)
        if self._size.hints:
            for at, one in enumerate(placed):
                if one and one.sound and one.sampling.drafts:
                    answers.hints[at] = self._hint(one)
        self._state = program(
            self._params,
            self._state,
            batch,
            tables,
            answers,
            slots,
            *start,
            audio,
            self._allowed(
                [one if at else None for one, at in zip(placed, requests, strict=True)],
                always=not self._patient,
            ),
            **self._static,
            sampled=self._sampled,
        )
        for one in placed:
            if one is not None:
                one.begun = one.done == one.length

    def _batch(self, rows: int, tokens: int) -> dict[str, np.ndarray]:
        """Empty rows. The features of an audio token stand at the token's own place in its row."""
        encoder = self._config.encoder
        dtype = np.dtype(self._static["compute"].dtype)
        taps = len(encoder.tap_layers)
        return {
            "tokens": np.zeros((rows, tokens), np.int32),
            "positions": np.zeros((rows, tokens), np.int32),
            "segment_ids": np.zeros((rows, tokens), np.int32),
            "audio_index": np.full((rows, tokens), -1, np.int32),
            "features": np.zeros((rows, tokens, encoder.output_dim), dtype),
            "taps": np.zeros((taps, rows, tokens, encoder.output_dim), dtype),
        }

    def _lay(
        self,
        batch: dict[str, np.ndarray],
        at: tuple[int, slice],
        one: Asked,
        start: int,
        stop: int,
    ) -> None:
        """Writes the tokens start..stop of a prompt to a place of the batch."""
        row, here = at
        batch["tokens"][row, here] = one.example.ids[start:stop]
        marks = one.marks[start:stop]
        sound = one.example.ids[start:stop] == self._vocab.audio_token_id
        for piece in self._sound(one, start, stop):
            mine = sound & (marks[:, 1:] == np.frombuffer(piece.digest, np.uint64)).all(axis=1)
            place = here.start + np.flatnonzero(mine)
            token, heard = marks[mine, 0].astype(int), one.heard[piece.digest]
            batch["audio_index"][row, place] = place
            batch["features"][row, place] = heard.features[token]
            batch["taps"][:, row, place] = heard.taps[:, token]

    def _grow(self, one: Asked, tokens: int) -> None:
        """Takes the pages that so many tokens need."""
        group = self._groups[self._group(one.slot)]
        while len(one.pages) < pages_for(tokens):
            one.pages.append(group.take())
            one.promised -= 1

    def _learn(self, one: Asked) -> None:
        """Lets others use the pages whose tokens are in the cache."""
        while one.learnt < min(one.done // PAGE, len(one.keys)):
            group = self._groups[self._group(one.slot)]
            group.learn(one.pages[one.learnt], one.keys[one.learnt])
            one.learnt += 1

    # --- decoding ------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Decodes some tokens of every running answer."""
        running = [one for one in self._running if one.done == one.length]
        slots = len(self._owner)
        pace = self._pace
        width, steps = pace.next(self._size.room) if pace else (1, self._size.room)
        guided = any(one.guide for one in running)
        if guided:
            width, steps = 1, 1
        elif any(one.each_token for one in running):
            steps = 1
        elif any(one.sampling.stop for one in running) and self._decode is not None:
            steps = min(steps, max(1, _STOP_STRING_STEPS // width))
        if not self._patient:
            # Answers that begin a little later shall run beside these, not after them.
            coming = any(one.done < one.length for one in self._running)
            steps = min(steps, 1 if coming else _STEPS_A_TURN)
        # Of few answers in many slots, only these are computed.
        rows = [one.slot for one in running]
        count = next(count for count in self._rows if count >= len(rows))
        rows = None if count == slots else [*rows, *[slots] * (count - len(rows))]
        # Return when a quarter of the slots are done, to refill them or to report them.
        enough = min(count - len(running) + max(1, count // 4), count)
        # Where the longest answer's next token goes.
        top = max(one.length + one.count for one in running)
        reach = self._shapes.reach(top + width, guided)
        steps = max(1, min(steps, (reach - top) // width))
        tables = np.full((count, pages_for(reach)), NOWHERE, np.int32)
        for row, one in enumerate(running):
            self._grow(one, min(one.length + one.count + steps * width, one.tokens))
            place = row if rows else one.slot
            tables[place, : len(one.pages)] = one.pages[: tables.shape[1]]
        static = self._static | {"sampled": self._sampled}
        if width == 1:
            # Not those whose prompt is still being prefilled: a guide of theirs has no say yet.
            at = {one.slot: one for one in running}
            of = [at.get(slot) for slot in rows or range(slots)]
            self._decode_until(tables, steps, enough, self._allowed(of), rows)
            return
        numbers = np.int32(steps), np.int32(enough)
        self._state, passes = draft_until(
            self._params, self._state, tables, *numbers, width=width, **static
        )
        made, passes = jax.device_get((self._state.answers.count, passes))
        told = sum(int(made[one.slot]) - one.count for one in running)
        pace.told(told, int(passes) * len(running))

    @property
    def _rows(self) -> list[int]:
        """How many answers a program decodes, rising.

        On CPUs a step takes about as long for each slot, also for one at rest.
        """
        slots, groups = len(self._owner), len(self._groups)
        on_cpu = self._mesh.devices.flat[0].platform == "cpu"
        fewer = slots // 8 if on_cpu and groups == 1 and not self._patient else 0
        return [fewer, slots] if fewer else [slots]

    def _decode_until(
        self,
        tables: np.ndarray,
        steps: int,
        enough: int,
        allowed: np.ndarray | None,
        rows: Sequence[int] | None,
    ) -> None:
        self._state = decode_until(
            self._params,
            self._state,
            tables,
            np.int32(steps),
            np.int32(enough),
            allowed,
            None if rows is None else np.array(rows, np.int32),
            **self._static,
            sampled=self._sampled,
        )

    def _tell(self) -> list[Progress]:
        """What is new since the last turn."""
        answers = self._state.answers
        state, count, outputs = jax.device_get((answers.state, answers.count, answers.output))
        told = []
        for one in [one for one in self._running if one.done == one.length]:
            slot = one.slot
            ids, reason = outputs[slot, : count[slot]].tolist(), int(state[slot])
            self.counts["new_tokens"] += len(ids) - one.count
            one.count = len(ids)
            if one.sampling.stop and self._decode is not None:
                cut = self._first_stop(ids, one.sampling.stop)
                if cut is not None:
                    ids, reason = ids[:cut], STOP
                    if int(state[slot]) == RUNNING:
                        self._state = end(self._state, slot, STOP)
            by_token = int(state[slot]) == STOP and len(ids) == count[slot]
            new, ended = len(ids) > one.told, reason != RUNNING
            kept = ending = None
            if one.sampling.logprobs is not None and (ended or (new and one.each_token)):
                kept, ending = self._logprobs(one, ids, by_token)
            if one.each_token:
                for n in range(one.told + 1, len(ids)):
                    told.append(Progress(one.number, ids[:n], None, kept and kept[:n]))
            one.told = len(ids)
            if ended:
                measures = tuple(map(self.hearing.measures, one.clips))
                why = FINISH_REASON[reason]
                heard = tuple(map(self.hearing.words, one.clips))
                output = Output(ids, why, kept, ending, measures, one.cached, heard)
                told.append(self._end(one, output))
            elif new or not one.each_token:
                told.append(Progress(one.number, ids, None, kept))
        return told

    def _logprobs(
        self, one: Asked, ids: list[int], stopped: bool
    ) -> tuple[list[TokenLogprobs], TokenLogprobs | None]:
        """What is kept of an answer's tokens, and of its stop token if it has `stopped` by one."""
        most, known = one.sampling.logprobs, len(one.logprobs)
        kept, newest = jax.device_get(
            (logprobs_of(self._state, one.slot), self._state.answers.token)
        )
        tokens = [*ids, int(newest[one.slot])] if stopped else ids
        own, top_ids, top = (each[known : len(tokens)] for each in kept)
        pairs = [
            [*zip(a[:most].tolist(), b[:most].tolist(), strict=True)]
            for a, b in zip(top_ids, top, strict=True)
        ]
        new = zip(tokens[known:], own.tolist(), pairs, strict=True)
        one.logprobs += [TokenLogprobs(*each) for each in new]
        return one.logprobs[: len(ids)], one.logprobs[-1] if stopped else None

    def _allowed(self, those: Sequence[Asked | None], always: bool = False) -> np.ndarray | None:
        """bool [len(those), V]: the tokens that guides allow next; without guides all of them if
        `always`, else None."""
        guided = [(row, one) for row, one in enumerate(those) if one and one.guide]
        if not guided and not always:
            return None
        allowed = np.ones((len(those), self._vocab.size), bool)
        if guided:
            count, output = jax.device_get((self._state.answers.count, self._state.answers.output))
        for row, one in guided:
            if one.begun and one.done == one.length:
                for token in output[one.slot, one.pushed : count[one.slot]].tolist():
                    one.guide.push(token)
                    one.pushed += 1
            if one.done == one.length:
                allowed[row] = one.guide.allowed()
        return allowed

    def _end(self, one: Asked, output: Output) -> Progress:
        """Frees a request's place."""
        if one in self._line:
            self._line.remove(one)
        elif self._owner[one.slot] is one:
            if output.finish_reason == "cancelled" and one.done == one.length:
                self._state = end(self._state, one.slot, STOP)
            group = self._groups[self._group(one.slot)]
            # The last token of an answer may not be in the cache.
            inside = one.length + one.count - 1
            if one.done == one.length and inside // PAGE > len(one.keys):
                ids = np.array(self._ids(one)[: inside - one.length])
                one.keys = page_keys(np.concatenate([one.marks, text_marks(ids)]), one.keys)
                one.done = inside
            self._learn(one)
            group.release(one.pages, one.promised)
            self._owner[one.slot] = None
        return Progress(one.number, output.ids, output, output.logprobs)

    def _ids(self, one: Asked) -> list[int]:
        """The answer so far."""
        if self._state is None or one.done < one.length or one.slot < 0:
            return []
        return np.asarray(self._state.answers.output)[one.slot, : one.count].tolist()

    # --- words ---------------------------------------------------------------------------------

    def _hints(self, example: Example) -> int:
        """Room for the hints about one answer."""
        words = len(said(example.ids, self._vocab))
        heard = self._scribe is not None
        return words + heard * _WRITTEN * (len(example.ids) - words)

    def _hint(self, one: Asked) -> np.ndarray:
        """What was heard in a prompt, as transcripts, and its text."""
        text = said(one.example.ids, self._vocab)
        written = []
        if self._scribe is not None:
            heard = self.hearing.words(one.sound)
            # None: its pages were known, and what was heard is no longer kept.
            written = self._scribe.write(heard.pieces) if heard else []
        return right_aligned([*written, *text], self._size.hints)

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


def _pages_for_all(tokens: Sequence[int], slots: int) -> int:
    """Pages of a group with so many slots, for requests that hold so many tokens at most.

    One answer more than there are slots has room: for what is kept. Each number is a program of
    its own, so one answer is taken as long as its bucket, and many are rounded up by an eighth.
    """
    longest = pages_for(bucket(max(tokens), LEAST_REACH))
    if slots < 8:
        return (slots + 1) * longest
    pages = longest + sum(sorted(map(pages_for, tokens))[-slots:])
    step = max(1, (1 << pages.bit_length()) // 16)
    return -(-pages // step) * step


def piece_tokens(platform: str) -> int:
    """Tokens of prompts that are prefilled together in one row, at most.

    Others wait for it, so it is no larger than what keeps a device busy.
    """
    return 512 if platform == "cpu" else 2048
