"""The Python interface: load a model, encode, score and generate."""

from __future__ import annotations

import bisect
import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from moss_audio_jax import hub
from moss_audio_jax.audio import log_mel
from moss_audio_jax.audio.lengths import audio_tokens, mel_frames
from moss_audio_jax.config import (
    DEFAULT_CHECKPOINT,
    QUANTIZE,
    Compute,
    EncoderAttention,
    ModelConfig,
    ProcessorConfig,
    Quantize,
    processor_from_official,
    read_json,
)
from moss_audio_jax.data.batch import Example, bucket_shape, check, make_batch
from moss_audio_jax.errors import InputError, TooLong, UsageError
from moss_audio_jax.files import brief, quoted
from moss_audio_jax.generate.decode_state import encode
from moss_audio_jax.generate.drafts import Scribe, scribe_of
from moss_audio_jax.generate.engine import Engine, Output, Size
from moss_audio_jax.generate.familiarity import Familiarity, Gauge, Measures
from moss_audio_jax.generate.hearing import Hearing
from moss_audio_jax.generate.listen import Ear, check_sizes, tokens_for
from moss_audio_jax.generate.options import BATCH_SIZE, BATCHES_AT_ONCE, Sampling
from moss_audio_jax.generate.request import Audio, Clip, Prepared, Reply, Request, clip_of, name_of
from moss_audio_jax.generate.service import Service
from moss_audio_jax.generate.stop_strings import UntilStop, first_stop
from moss_audio_jax.generate.together import Speaker, follow
from moss_audio_jax.generate.vocabulary import vocabulary
from moss_audio_jax.models import decoder, moss_audio
from moss_audio_jax.models.cache import pages_for
from moss_audio_jax.models.quantize import held_leaf, plain
from moss_audio_jax.ops.linear import dense
from moss_audio_jax.ops.loss import IGNORE, cross_entropy, shift_labels
from moss_audio_jax.runtime import keep_compiled, return_memory
from moss_audio_jax.sharding import as_mesh, param_shardings, serving_mesh, ways
from moss_audio_jax.text import build_conversation, build_prompt, load_tokenizer
from moss_audio_jax.text.messages import from_openai
from moss_audio_jax.text.prompt import split_thinking
from moss_audio_jax.text.tokenizer import StreamDecoder, Tokenizer, check_fits
from moss_audio_jax.tree import flatten, replaced
from moss_audio_jax.weights import memory
from moss_audio_jax.weights.convert import load_adapted, load_params
from moss_audio_jax.weights.helpers import load_helpers
from moss_audio_jax.weights.official import shapes
from moss_audio_jax.weights.opening import read_config

__all__ = ["Audio", "Clip", "MossAudio", "Prepared", "Reply", "Request", "Sampling", "Stream"]


# {reason} is that of a `Familiarity`.
STRANGE = "the sound is unlike what this model was trained on, so the answer is a guess: {reason}"


class MossAudio:
    """A model on a mesh, ready to answer. Make one with `MossAudio.load`.

    Attributes:
      config: the sizes of the model and its parts.
      tokenizer: None if the folder has none.
      processor: the special ids and how audio is prepared.
      random_weights: whether config.json says that the model was never trained.
      folder: the checkpoint; None for a model that was not loaded from one.
      lora: the folder of the adapters that are merged into the weights; None without any.
    """

    def __init__(
        self,
        params: Any,
        config: ModelConfig,
        *,
        compute: Compute,
        mesh: Mesh,
        tokenizer: Tokenizer | None = None,
        processor: ProcessorConfig | None = None,
        stop_ids: Sequence[int] = (),
        random_weights: bool = False,
        folder: Path | None = None,
        lora: Path | None = None,
        gauge: Gauge | None = None,
    ) -> None:
        self._params = params
        self.config = config
        self.compute = compute
        self.mesh = mesh
        self.tokenizer = tokenizer
        self.processor = processor or (tokenizer.processor if tokenizer else ProcessorConfig())
        self.random_weights = random_weights
        self.folder = folder
        self.lora = lora
        self._gauge = gauge
        self._vocab = vocabulary(config, tokenizer, self.processor, stop_ids)
        self._kept: list[tuple[tuple[int, bool], Engine]] = []  # one at most

    def __repr__(self) -> str:
        count = moss_audio.count_params(shapes(self.config, self.compute.dtype))
        kind = self.compute.dtype
        if self.compute.quantize != "none":
            kind += f", int8 {self.compute.quantize}"
        mesh = ", ".join(f"{axis}={size}" for axis, size in self.mesh.shape.items())
        where = "" if self.folder is None else f"{str(self.folder)!r}, "
        return f"MossAudio({where}{count / 1e6:,.1f}M parameters, {kind}, mesh {mesh})"

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        dtype: str | None = None,
        mesh: Mesh | Mapping[str, int] | Sequence[int] | None = None,
        encoder_attention: EncoderAttention | None = None,
        lora: str | Path | None = None,
        quantize: Quantize | None = None,
        progress: bool = False,
    ) -> MossAudio:
        """Loads an official or native checkpoint folder, or a model of the Hugging Face hub.

        From then on, programs that JAX compiles are kept on disk, unless MOSS_AUDIO_JAX_CACHE=off
        or settings of JAX say otherwise: see `runtime.keep_compiled`.

        Args:
          path: the folder, or the hub's id owner/name[@revision], which is downloaded unless it
            was before; None for the small model of this package, which knows only synthetic
            sound.
          dtype: of weights and compute: "bfloat16" or "float32". None means bfloat16, except for
            models of up to a billion parameters on CPUs, which are faster there in float32.
          mesh: a Mesh, axis sizes ({"tensor": 4} or (data, fsdp, tensor, sequence)), or None for
            one device.
          encoder_attention: "chunked", "full" or "sliding"; default chunked, as in the official
            code.
          lora: a folder of LoRA adapters to merge into the weights.
          quantize: what is stored as int8: "none"; "weights", those of the decoder and its head;
            "weights+cache", also keys and values. This halves the memory and what each token must
            read, but answers may differ. None means "none"; on a CPU it means "weights", with a
            warning, if dtype is None too and only int8 weights fit into memory.
          progress: show a bar on stderr.

        Raises:
          InputError: a file is missing, broken or does not fit the others; the model does not fit
            into memory, which is found before it is loaded.
          UsageError: no such dtype, mesh, attention or quantisation.
        """
        if quantize not in (None, *QUANTIZE):
            raise UsageError(f"quantize is {quantize!r}; expected one of {', '.join(QUANTIZE)}")
        if dtype not in (None, "bfloat16", "float32"):
            raise UsageError(f"dtype is {dtype!r}; expected 'bfloat16' or 'float32'")
        keep_compiled()
        path = DEFAULT_CHECKPOINT if path is None else hub.folder_of(path)
        config = read_config(path)
        if encoder_attention is not None:
            config = config.with_attention(encoder_attention)
        vocab_size = config.decoder.vocab_size
        tokenizer = load_tokenizer(path, vocab_size) if _has_tokenizer(path) else None
        processor = tokenizer.processor if tokenizer else ProcessorConfig()
        processor_file = path / "processor_config.json"
        if processor_file.exists():
            processor = processor_from_official(read_json(processor_file), str(processor_file))
        check_fits(tokenizer, processor, vocab_size, str(path))
        mesh = serving_mesh(as_mesh(mesh))
        dtype, quantize = memory.choose(str(path), config, dtype, quantize, mesh)
        if mesh.local_devices[0].platform == "cpu" and dtype == "bfloat16":
            return_memory()
        shardings = param_shardings(shapes(config, dtype), config, mesh)

        hold = functools.partial(held_leaf, quantize=quantize)
        with jax.set_mesh(mesh):
            params = load_params(path, config, dtype, shardings, lora, hold, _LAYERS, progress)
        return cls(
            _by_layer(params),
            config,
            compute=Compute(dtype=dtype, quantize=quantize),
            mesh=mesh,
            tokenizer=tokenizer,
            processor=processor,
            stop_ids=_stop_ids(path),
            random_weights=bool(read_json(path / "config.json").get("random_weights")),
            folder=path,
            lora=None if lora is None else Path(lora),
            gauge=Gauge.load(path),
        )

    def adapted(self, lora: str | Path) -> MossAudio:
        """This model with LoRA adapters, as `load(..., lora=...)` gives it.

        Weights that the adapters do not change are in memory once: both models hold the same
        arrays. The changed ones are read again from the checkpoint.

        Raises:
          InputError: the adapters are broken or do not fit the model; there is no memory for what
            they change.
          UsageError: this model was not loaded from a checkpoint, or has adapters already.
        """
        if self.folder is None or self.lora is not None:
            has = "was not loaded from a folder" if self.folder is None else f"has {self.lora}"
            raise UsageError(
                f"{lora}: adapters are merged into a checkpoint's own weights, but this model "
                f"{has}; load the checkpoint without adapters first"
            )

        def check_memory(touched: dict[str, list[bool]]) -> None:
            memory.check_more(str(lora), _those(self._params, touched), self.mesh)

        compute = self.compute
        shardings = param_shardings(shapes(self.config, compute.dtype), self.config, self.mesh)
        hold = functools.partial(held_leaf, quantize=compute.quantize)
        with jax.set_mesh(self.mesh):
            how = compute.dtype, shardings, hold, _LAYERS, check_memory
            leaves = load_adapted(self.folder, lora, self.config, *how)
        other = copy.copy(self)
        other.lora, other._kept = Path(lora), []
        other._params = _with_leaves(self._params, leaves)
        return other

    @property
    def params(self) -> Any:
        """The parameters as the model holds them, a nested dict of arrays.

        The decoder's layers are a tuple of trees, one for each layer, which is fastest for
        generation. The encoder's layers are stacked on axis 0.
        """
        return self._params

    def stacked_params(self) -> Any:
        """`params` as in training and checkpoints, with all layers stacked on axis 0.

        Each call makes a new stacked copy of the decoder, which is then in memory twice.
        """
        with jax.set_mesh(self.mesh):
            return plain(decoder.stacked(self._params))

    @property
    def encoder_params(self) -> Any:
        """The encoder's part of `params`."""
        return self._params["audio_encoder"]

    # --- from ids and mels ---------------------------------------------------------------------

    def encode_audio(self, mels: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Encodes the clips of one prompt.

        Args:
          mels: log-mels [128, frames]; together they determine the padding (`padded_frames`).

        Returns:
          For each clip (features [n, D], taps [K, n, D]) float32, before the adapter. Taps are the
          outputs of the encoder layers in `config.encoder.tap_layers`.
        """
        clips = _float32(mels)
        if not clips:
            return []
        counts = [audio_tokens(clip.shape[-1]) for clip in clips]
        ids = np.full(sum(counts), self.processor.audio_token_id, np.int32)
        example = Example(ids, clips)
        check(example, self.config.encoder, self.processor.audio_token_id)
        batch = self._batch([example])
        sound = (batch[name] for name in ("mels", "frames"))
        with jax.set_mesh(self.mesh):
            features, taps = encode(
                self.encoder_params, *sound, config=self.config.encoder, compute=self.compute
            )
        places = batch["audio_index"][0]
        places = places[places >= 0]
        features = np.asarray(features, np.float32)[0, places]
        taps = np.asarray(taps, np.float32)[:, 0, places]
        ends = np.cumsum(counts)[:-1]
        return list(zip(np.split(features, ends), np.split(taps, ends, axis=1), strict=True))

    def logits(self, ids: Sequence[int], mels: Sequence[np.ndarray] = ()) -> np.ndarray:
        """Logits of one prompt: ids [L] -> float32 [L, V]."""
        return self.logits_batch([(ids, mels)])[0]

    def logits_batch(
        self, prompts: Sequence[tuple[Sequence[int], Sequence[np.ndarray]]]
    ) -> list[np.ndarray]:
        """Logits of several prompts in one padded batch: a list of float32 [L_i, V]."""
        if not prompts:
            return []
        examples = [self._example(ids, mels) for ids, mels in prompts]
        with jax.set_mesh(self.mesh):
            logits = _logits(self._params, self._batch(examples), self.config, self.compute)
        logits = np.asarray(logits)
        return [logits[row, : len(example.ids)].copy() for row, example in enumerate(examples)]

    def loss(
        self, ids: Sequence[int], labels: Sequence[int], mels: Sequence[np.ndarray] = ()
    ) -> float:
        """Mean next-token cross entropy over the labels that are not -100.

        `labels` [L] are not shifted, as in the official code: label i is predicted from the tokens
        before i, so the first label never counts.

        Raises:
          UsageError: labels are not int [L].
          InputError: no label counts, or one is neither a token id nor -100.
        """
        example = self._example(ids, mels)
        labels = np.asarray(labels)
        if labels.shape != example.ids.shape or not np.issubdtype(labels.dtype, np.integer):
            raise UsageError(
                f"labels have shape {labels.shape} and dtype {labels.dtype}; "
                f"expected int [{len(ids)}], one for each id"
            )
        counted = labels[1:][labels[1:] != IGNORE]
        if not len(counted):
            raise InputError(f"no label counts; expected one after the first that is not {IGNORE}")
        self._check_vocabulary("label", counted)
        batch = self._batch([example])
        padded = np.full(batch["tokens"].shape, IGNORE, np.int32)
        padded[0, : len(labels)] = labels
        with jax.set_mesh(self.mesh):
            return float(_loss(self._params, batch, padded, self.config, self.compute))

    def generate_ids(
        self,
        ids: Sequence[int],
        mels: Sequence[np.ndarray] = (),
        max_new_tokens: int = 64,
        temperature: float = Sampling.temperature,
        top_p: float = Sampling.top_p,
        top_k: int = Sampling.top_k,
        seed: int = Sampling.seed,
        *,
        min_p: float = Sampling.min_p,
        repetition_penalty: float = Sampling.repetition_penalty,
        stop: Sequence[str] = Sampling.stop,
        stop_ids: Sequence[int] = Sampling.stop_ids,
        thinking_budget: int | None = Sampling.thinking_budget,
        loop_guard: bool = Sampling.loop_guard,
        drafts: bool = Sampling.drafts,
    ) -> list[int]:
        """The ids that follow a prompt, without the stop token.

        `Sampling` explains the options; the defaults are its own, except for `max_new_tokens`.
        """
        sampling = Sampling.of(locals())
        with self._engine(1) as engine:
            return engine.run([(self._example(ids, mels), sampling)])[0].ids

    # --- from text and sound -------------------------------------------------------------------

    def prepare(self, request: Request) -> Prepared:
        """A request's token ids and mels, exactly as the official processor makes them.

        Raises:
          InputError: there is no tokenizer, or a clip, which is named, cannot be read or is too
            short.
        """
        tokenizer = self._require_tokenizer()
        for value, expected in ((request, Request), (getattr(request, "sampling", None), Sampling)):
            if not isinstance(value, expected):
                raise UsageError(f"{brief(repr(value), 80)}: expected a {expected.__name__}")
        markers = self.processor.time_markers
        if request.time_markers is not None:
            markers = request.time_markers
        clips, messages = request.clips, None
        if request.messages is not None:
            if request.text or len(clips) or request.system is not None:
                raise UsageError("messages stand instead of text, audio and system; give either")
            messages, clips = from_openai(request.messages)
        mels, warnings = [], []
        for number, clip in enumerate(map(clip_of, clips), 1):
            make = functools.partial(self._mel, name=name_of(clip, number))
            mels.append(clip.mel(self.processor.mel_dtype, make))
            if not clip.wav.any():
                warnings.append(
                    _of(number, clips, "every sample is 0: what the answer says was not heard")
                )
        frames = [mel.shape[1] for mel in mels]
        if messages is None:
            ids = build_prompt(tokenizer, request.text, frames, markers, request.system)
        else:
            ids, _ = build_conversation(tokenizer, messages, frames, markers, True)
        names = ", ".join(name_of(clip, i) for i, clip in enumerate(clips, 1))
        seconds = sum(mel.shape[1] for mel in mels) / 100
        self._check_length(names or "the prompt", seconds, "and the text make", len(ids))
        return Prepared(ids, tuple(mels), sampling=request.sampling, warnings=tuple(warnings))

    def generate(
        self,
        text: str = "",
        audio: Sequence[Audio] | Audio = (),
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        system: str | None = None,
        time_markers: bool | None = None,
        on_text: Callable[[str], None] | None = None,
        max_new_tokens: int = Sampling.max_new_tokens,
        temperature: float = Sampling.temperature,
        top_k: int = Sampling.top_k,
        top_p: float = Sampling.top_p,
        min_p: float = Sampling.min_p,
        repetition_penalty: float = Sampling.repetition_penalty,
        seed: int = Sampling.seed,
        stop: Sequence[str] = Sampling.stop,
        stop_ids: Sequence[int] = Sampling.stop_ids,
        thinking_budget: int | None = Sampling.thinking_budget,
        loop_guard: bool = Sampling.loop_guard,
        drafts: bool = Sampling.drafts,
        logprobs: int | None = Sampling.logprobs,
    ) -> Reply:
        """Answers a text about any number of clips; greedy by default.

        Args:
          text: the question; a text with `<|audio_bos|><|AUDIO|><|audio_eos|>` spans is the whole
            prompt.
          audio: files, 16 kHz mono waveforms, or samples with their rate: see `Audio`.
          messages: a conversation in OpenAI's form instead of text, audio and system; sound may be
            in any turn of the user: see `text.messages`.
          on_text: called with each new piece of raw text, with thinking and without stop strings;
            `stream` gives the same pieces as an iterator.
          max_new_tokens and the other options: see `Sampling`.

        Raises:
          InputError: there is no tokenizer, or a clip cannot be used.
          UsageError: an option is out of range.
        """
        asked = Request(text, audio, Sampling.of(locals()), system, time_markers, messages)
        prompt = self.prepare(asked)
        if on_text is None:
            return self.answer([prompt])[0]
        stream = Stream(self, prompt)
        for piece in stream:
            on_text(piece)
        return stream.reply

    def stream(
        self,
        text: str = "",
        audio: Sequence[Audio] | Audio = (),
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        system: str | None = None,
        time_markers: bool | None = None,
        max_new_tokens: int = Sampling.max_new_tokens,
        temperature: float = Sampling.temperature,
        top_k: int = Sampling.top_k,
        top_p: float = Sampling.top_p,
        min_p: float = Sampling.min_p,
        repetition_penalty: float = Sampling.repetition_penalty,
        seed: int = Sampling.seed,
        stop: Sequence[str] = Sampling.stop,
        stop_ids: Sequence[int] = Sampling.stop_ids,
        thinking_budget: int | None = Sampling.thinking_budget,
        loop_guard: bool = Sampling.loop_guard,
        drafts: bool = Sampling.drafts,
        logprobs: int | None = Sampling.logprobs,
    ) -> Stream:
        """`generate` piece by piece: `for piece in model.stream(...)`, then `Stream.reply`.

        Raises the errors of `generate` in this call, not during iteration.
        """
        asked = Request(text, audio, Sampling.of(locals()), system, time_markers, messages)
        return Stream(self, self.prepare(asked))

    def generate_batch(
        self, requests: Sequence[Request], batch_size: int = BATCH_SIZE, progress: bool = False
    ) -> list[Reply]:
        """Answers many requests, `batch_size` at a time; slots refill as answers end.

        Order is kept, and an answer does not depend on what else is in the batch. A request that
        cannot be used gets a reply whose `finish_reason` is "error", and whose `error` says why.
        Memory holds the sound of a few batches, not of all requests.

        Raises:
          InputError: there is no tokenizer.
          UsageError: batch_size is below 1.
        """
        self._require_tokenizer()
        if batch_size < 1:
            raise UsageError(f"batch_size is {batch_size}; expected at least 1")
        replies: list[Reply] = []
        share = BATCHES_AT_ONCE * batch_size
        with tqdm(total=len(requests), unit="answer", disable=not progress) as bar:
            for first in range(0, len(requests), share):
                replies += self._replies(requests[first : first + share], batch_size, bar.update)
        return replies

    def _replies(
        self, requests: Sequence[Request], batch_size: int, told: Callable[[], Any]
    ) -> list[Reply]:
        """Those of `generate_batch`, in one call of the engine; `told` is called for each."""
        prompts: dict[int, Prepared] = {}
        replies: dict[int, Reply] = {}
        for number, request in enumerate(requests):
            try:
                prompts[number] = self.prepare(request)
            except (InputError, UsageError) as error:
                replies[number] = Reply("", None, [], "error", error=str(error))
                told()
        answered = self.answer([*prompts.values()], batch_size, on_reply=lambda *_: told())
        replies |= zip(prompts, answered, strict=True)
        return [replies[number] for number in range(len(requests))]

    def answer(
        self,
        prompts: Sequence[Prepared],
        batch_size: int = BATCH_SIZE,
        progress: bool = False,
        on_reply: Callable[[int, Reply], None] | None = None,
    ) -> list[Reply]:
        """`generate_batch` for requests that `prepare` has prepared.

        `on_reply` is called with (prompt number, reply) as each answer ends.
        """
        replies: list[Reply | None] = [None] * len(prompts)

        def on_done(number: int, output: Output) -> None:
            replies[number] = reply = self.reply(output, prompts[number])
            bar.update()
            if on_reply is not None:
                on_reply(number, reply)

        with tqdm(total=len(prompts), unit="answer", disable=not progress) as bar:
            asked = [(prompt, prompt.sampling) for prompt in prompts]
            drafts = any(prompt.sampling.drafts for prompt in prompts)
            with self._engine(batch_size, drafts) as engine:
                engine.run(asked, on_done=on_done)
        return replies

    def familiarity(self, audio: Audio) -> Familiarity | None:
        """Whether one clip is like the sound that this model was trained on.

        None if the checkpoint has no data for this (see `generate.familiarity`) or the clip is
        shorter than half a second. Raises InputError if the clip cannot be used.
        """
        mel = log_mel(clip_of(audio).wav)
        if self._gauge is None:
            return None
        with self._engine() as engine, jax.set_mesh(self.mesh):
            return self._judge(*engine.hearing.measure([mel]))

    def _judge(self, measures: Measures | None) -> Familiarity | None:
        return None if measures is None else self._gauge.judge(measures)

    def reply(self, output: Output, prompt: Prepared) -> Reply:
        """The reply to a prompt, with text and thinking, from the generated ids.

        It warns of each clip that is unlike the model's training data.
        """
        text = self.tokenizer.decode(output.ids)
        thinking, answer = split_thinking(text[: first_stop(text, prompt.sampling.stop)])
        strange = [
            _of(number, prompt.mels, STRANGE.format(reason=verdict.reason))
            for number, verdict in enumerate(map(self._judge, output.measures), 1)
            if verdict and verdict.unfamiliar
        ]
        return Reply(
            answer.strip(),
            thinking,
            output.ids,
            output.finish_reason,
            (*prompt.warnings, *strange),
            logprobs=output.logprobs,
            heard=tuple(self._scribe.words(each) if each else [] for each in output.heard),
        )

    # --- inside --------------------------------------------------------------------------------

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError(
                "this checkpoint has no tokenizer: put tokenizer.json, or vocab.json and "
                "merges.txt, or a SentencePiece *.model into its folder, or use generate_ids"
            )
        return self.tokenizer

    @contextlib.contextmanager
    def _engine(self, slots: int | None = None, drafts: bool = False) -> Iterator[Engine]:
        """An engine for one call: that of the last call if it is alike and no other thread has it,
        because it knows what that call heard. Otherwise a new one. Any will do without `slots`."""
        alike = slots or BATCH_SIZE, drafts
        try:
            before, engine = self._kept.pop()
        except IndexError:
            before, engine = None, None
        if slots is None and engine is not None:
            alike = before
        if before != alike:
            hearing = engine.hearing if engine else self._hearing()
            engine = None  # frees its cache first
            decode = self.tokenizer.decode if self.tokenizer else None
            scribe = self._scribe if drafts else None
            engine = Engine(
                self._params,
                self.config,
                self.compute,
                self._vocab,
                self.mesh,
                decode,
                alike[0],
                scribe,
                hearing=hearing,
            )
        yield engine
        self._kept[:] = [(alike, engine)]  # not after an error, which may have cost its state

    def service(
        self,
        slots: int = BATCH_SIZE,
        cache_tokens: int = 2**15,
        max_new_tokens: int = 4096,
        beside: Service | None = None,
        compiling: Callable[[int, int], None] | None = None,
    ) -> Service:
        """An engine that takes requests from any thread, at any time, until it is closed.

        Args:
          slots: answers that are decoded together.
          cache_tokens: tokens of prompts and answers that the cache has room for. Requests wait
            until there is room for all that they may need.
          max_new_tokens: the most that an answer may have, whatever its request says.
          compiling: see `Service`.
          beside: the service of the model of which this one is `adapted`. The two engines step in
            turn, and if the encoder is the same, what one has heard the other knows.

        If the mesh spans several processes, only process 0 calls this, and the others call `follow`
        with the same numbers, and compile if it does.

        Raises:
          UsageError: this is another process; or several processes and `beside`.
        """
        spans = self.mesh.is_multi_process
        if spans and jax.process_index() != 0:
            raise UsageError("process 0 has the service of a mesh; the others `follow` it")
        if spans and beside is not None:
            raise UsageError("several processes have one service; merge the adapters instead")
        hearing = None
        if beside is not None and beside.hearing.params is self.encoder_params:
            hearing = beside.hearing
        engine = self._sized_engine(slots, cache_tokens, max_new_tokens, hearing)
        return Service(engine, compiling, Speaker() if spans else None, beside)

    def follow(
        self,
        slots: int = BATCH_SIZE,
        cache_tokens: int = 2**15,
        max_new_tokens: int = 4096,
        compiling: Callable[[int, int], None] | None = None,
    ) -> None:
        """Computes with the `service` of process 0, in the other processes of a mesh; returns when
        that is closed."""
        engine = self._sized_engine(slots, cache_tokens, max_new_tokens)
        follow(engine, self.config.decoder.vocab_size, compiling)

    def listen(
        self,
        seconds: float | None = None,
        max_new_tokens: int = 1024,
        service: Service | None = None,
    ) -> Ear:
        """Live audio: `with model.listen() as ear: ear.push(samples); ear.ask("What happens?")`.

        Each chunk of 4 s is encoded and prefilled when it is whole, and answers are those of
        `generate` about the whole clip.

        Args:
          seconds: the most that will be pushed; default 600, or what fits the model's positions.
          max_new_tokens: the most that an answer may have.
          service: what answers, so that others share its engine; default an engine of its own.

        Raises:
          UsageError: an argument is out of range, or so much does not fit the model's positions.
        """
        check_sizes(seconds, max_new_tokens)
        positions = self.config.decoder.max_positions
        if seconds is None:
            fit = bisect.bisect(range(601), positions, key=lambda s: tokens_for(s, max_new_tokens))
            seconds = float(max(fit - 1, 1))
        tokens = tokens_for(seconds, max_new_tokens)
        if tokens > positions:
            raise UsageError(
                f"{seconds:g} s of sound, a question and {max_new_tokens} new tokens may take "
                f"{tokens} tokens, but the model has {positions} positions; ask for less "
                "(seconds, max_new_tokens)"
            )
        return Ear(self, service or self._sized_engine(1, tokens, max_new_tokens), seconds)

    def _sized_engine(
        self, slots: int, cache_tokens: int, max_new_tokens: int, hearing: Hearing | None = None
    ) -> Engine:
        with jax.set_mesh(self.mesh):
            groups = ways((slots,), "batch")
        return Engine(
            self._params,
            self.config,
            self.compute,
            self._vocab,
            self.mesh,
            self.tokenizer.decode if self.tokenizer else None,
            slots,
            size=Size(slots, pages_for(-(-cache_tokens // groups)), max_new_tokens),
            hearing=hearing or self._hearing(few=True),
        )

    def _hearing(self, few: bool = False) -> Hearing:
        encoder = self.encoder_params, self.config.encoder, self.compute
        return Hearing(*encoder, self._gauge, self._scribe and self._scribe.head, few)

    def forget(self) -> None:
        """Drops what was kept of earlier calls: the encoder's outputs, and a cache of keys and
        values. The next question about a clip hears it again."""
        self._kept.clear()

    @functools.cached_property
    def _scribe(self) -> Scribe | None:
        """Of the CTC head that lies beside the model, if one does."""
        if self.folder is None or self.tokenizer is None:
            return None
        params, _ = load_helpers(self.folder)
        return scribe_of(params, self.config, self.tokenizer)

    def _example(self, ids: Sequence[int], mels: Sequence[np.ndarray]) -> Example:
        ids = np.asarray(ids)
        if ids.ndim != 1 or len(ids) == 0 or not np.issubdtype(ids.dtype, np.integer):
            raise UsageError(f"ids have shape {ids.shape} and dtype {ids.dtype}; expected int [L]")
        self._check_vocabulary("token id", ids)
        if len(ids) > self.config.decoder.max_positions:
            raise TooLong(
                f"the prompt has {len(ids)} tokens, but the model has "
                f"{self.config.decoder.max_positions} positions"
            )
        example = Example(ids.astype(np.int32), _float32(mels))
        check(example, self.config.encoder, self.processor.audio_token_id)
        return example

    def _check_vocabulary(self, what: str, ids: np.ndarray) -> None:
        size = self.config.decoder.vocab_size
        outside = ids[(ids < 0) | (ids >= size)]
        if len(outside):
            raise InputError(f"{what} {outside[0]} is outside the model's vocabulary of {size}")

    def _check_length(self, names: str, seconds: float, make: str, tokens: int) -> None:
        positions = self.config.decoder.max_positions
        if tokens >= positions:
            raise TooLong(
                f"{names}: {seconds:.0f} s of audio {make} {tokens} tokens, but the model has "
                f"{positions} positions; shorten it (transcribe cuts audio into windows)"
            )

    def _batch(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        shape = bucket_shape(examples, self.config.encoder, len(examples))
        return make_batch(
            [[e] for e in examples], shape, self.config.encoder, self.processor.audio_token_id
        )

    def _mel(self, clip: Clip, name: str) -> np.ndarray:
        # Before the mel is made, because for hours of audio it would take gigabytes in vain.
        frames = mel_frames(clip.wav.size)
        self._check_length(name, frames / 100, "alone make", audio_tokens(frames))
        try:
            # The official processor rounds here, with every dtype of the model.
            return clip.log_mel(self.processor.mel_dtype)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None


class Stream(Iterator[str]):
    """An answer while it is written: an iterator over pieces of raw text, thinking included.

    Attributes:
      reply: the whole answer; None until the iterator has ended.
    """

    reply: Reply | None = None

    def __init__(self, model: MossAudio, prompt: Prepared) -> None:
        self._pieces = self._written(model, prompt)

    def __next__(self) -> str:
        return next(self._pieces)

    def _written(self, model: MossAudio, prompt: Prepared) -> Iterator[str]:
        pieces: list[str] = []
        until = UntilStop(prompt.sampling.stop, pieces.append)
        decoder, told = StreamDecoder(model.tokenizer), 0
        asked = [(prompt, prompt.sampling)]
        with model._engine(1, prompt.sampling.drafts) as engine:
            for _, ids, output, _ in engine.progress(asked, each_token=True):
                for token in ids[told:]:
                    until.push(decoder.push(token))
                told = len(ids)
                if output is not None:
                    until.push(decoder.flush(), last=True)
                    self.reply = model.reply(output, prompt)
                yield from pieces
                pieces.clear()


_LAYERS = "language_model/layers/"


def _by_layer(params: Any) -> Any:
    """Turns a tuple of layers at each of the decoder's leaves into a tuple of trees."""
    leaves = params["language_model"]["layers"]
    apart = {"is_leaf": lambda x: type(x) is tuple}  # Int8 and Bits are named tuples
    count = len(jax.tree.leaves(leaves, **apart)[0])
    layers = (
        jax.tree.map(lambda leaf: leaf[index], leaves, **apart)  # noqa: B023  used at once
        for index in range(count)
    )
    return decoder.with_layers(params, tuple(layers))


def _those(params: Any, touched: Mapping[str, Sequence[bool]]) -> list[jax.Array]:
    """The arrays of the leaves that `touched` names (`Merged.touched`)."""
    layers, others = [*map(flatten, params["language_model"]["layers"])], flatten(params)
    found = []
    for path, which in touched.items():
        if path.startswith(_LAYERS):
            name = path.removeprefix(_LAYERS)
            found += [each[name] for each, is_one in zip(layers, which, strict=True) if is_one]
        else:
            found.append(others[path])
    return jax.tree.leaves(found)


def _with_leaves(params: Any, leaves: Mapping[str, Any]) -> Any:
    """The tree with what `load_adapted` gives in the place of its own leaves."""
    layers = list(params["language_model"]["layers"])
    others = {}
    for path, leaf in leaves.items():
        if not path.startswith(_LAYERS):
            others[path] = leaf
            continue
        for number, one in enumerate(leaf):
            if one is not None:
                layers[number] = replaced(layers[number], {path.removeprefix(_LAYERS): one})
    return decoder.with_layers(replaced(params, others), tuple(layers))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _logits(
    params: Any, batch: moss_audio.Batch, config: ModelConfig, compute: Compute
) -> jax.Array:
    return decoder.logits(params, moss_audio.hidden_states(params, config, compute, batch))


@functools.partial(jax.jit, static_argnums=(3, 4))
def _loss(
    params: Any, batch: moss_audio.Batch, labels: jax.Array, config: ModelConfig, compute: Compute
) -> jax.Array:
    hidden = moss_audio.hidden_states(params, config, compute, batch)
    targets = shift_labels(labels)
    losses, _ = cross_entropy(hidden, dense(decoder.head_kernel(params)), targets)
    return jnp.sum(losses) / jnp.sum(targets != IGNORE)


def _has_tokenizer(path: Path) -> bool:
    names = ("tokenizer.json", "vocab.json", "merges.txt")
    return any((path / name).exists() for name in names) or any(path.glob("*.model"))


def _stop_ids(path: Path) -> tuple[int, ...]:
    """eos_token_id of generation_config.json, one or several."""
    file = path / "generation_config.json"
    eos = read_json(file).get("eos_token_id") if file.exists() else None
    eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(i) is int and 0 <= i < 2**31 for i in eos):
        warnings.warn(f"{file}: eos_token_id {quoted(eos)} is ignored; expected ids", stacklevel=3)
        return ()
    return tuple(eos)


def _of(number: int, clips: Sequence[Any], warning: str) -> str:
    """The warning, with the number of its clip if there are several."""
    return f"clip {number}: {warning}" if len(clips) > 1 else warning


def _float32(mels: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    clips = tuple(np.atleast_1d(np.asarray(mel, np.float32)) for mel in mels)
    for number, clip in enumerate(clips, 1):
        if not np.isfinite(clip).all():
            raise InputError(f"clip {number}: the log-mel holds values that are NaN or infinite")
    return clips
