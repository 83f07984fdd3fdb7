"""The Python face: load a model, encode, score and generate."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from moss_audio_jax.audio import load_audio, log_mel
from moss_audio_jax.audio.lengths import audio_tokens, mel_frames
from moss_audio_jax.config import (
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
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.files import quoted
from moss_audio_jax.generate.engine import Engine, Output
from moss_audio_jax.generate.sampling import Sampling
from moss_audio_jax.generate.stop_strings import UntilStop, first_stop
from moss_audio_jax.generate.vocabulary import vocabulary
from moss_audio_jax.models import decoder, encoder, moss_audio
from moss_audio_jax.models.quantize import quantize_leaf
from moss_audio_jax.ops.linear import dense
from moss_audio_jax.ops.loss import IGNORE, cross_entropy, shift_labels
from moss_audio_jax.sharding import as_mesh, param_shardings, serving_mesh
from moss_audio_jax.text import build_prompt, load_tokenizer
from moss_audio_jax.text.prompt import split_thinking
from moss_audio_jax.text.tokenizer import StreamDecoder, Tokenizer, check_fits
from moss_audio_jax.weights.convert import load_params, read_config

Audio = str | Path | BinaryIO | np.ndarray  # a file, or a 16 kHz mono waveform


@dataclasses.dataclass(frozen=True)
class Request:
    """One question: a text, its clips (files or 16 kHz waveforms), how to sample the answer.

    `system` replaces the default system text; `time_markers` overrides processor_config.json.
    """

    text: str
    audio: Sequence[Audio] | Audio = ()
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    system: str | None = None
    time_markers: bool | None = None


@dataclasses.dataclass(frozen=True)
class Reply:
    """One answer.

    Attributes:
      text: the answer, without its thinking.
      thinking: what stood in the <think> block; None without one.
      ids: every generated token, the stop token dropped.
      finish_reason: "stop", "length" (max_new_tokens or the last position) or "loop" (the answer
        went round in circles and was ended).
    """

    text: str
    thinking: str | None
    ids: list[int]
    finish_reason: str


class MossAudio:
    """A model on a mesh, ready to answer. Make one with `MossAudio.load`.

    Attributes:
      config: what the model is made of.
      tokenizer: None where the folder has none.
      processor: the special ids and how audio is prepared.
      random_weights: config.json says that nothing was ever trained: answers are noise.
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
    ) -> None:
        self._params = params
        self.config = config
        self.compute = compute
        self.mesh = mesh
        self.tokenizer = tokenizer
        self.processor = processor or (tokenizer.processor if tokenizer else ProcessorConfig())
        self.random_weights = random_weights
        self._vocab = vocabulary(config, tokenizer, self.processor, stop_ids)

    @classmethod
    def load(
        cls,
        path: str | Path,
        dtype: str = "bfloat16",
        mesh: Mesh | Mapping[str, int] | Sequence[int] | None = None,
        encoder_attention: EncoderAttention | None = None,
        lora: str | Path | None = None,
        quantize: Quantize = "none",
    ) -> MossAudio:
        """Loads an official or native checkpoint folder.

        Args:
          path: the folder.
          dtype: of weights and compute: "bfloat16" or "float32".
          mesh: a Mesh, axis sizes ({"tensor": 4} or (data, fsdp, tensor, sequence)), or None for
            one device.
          encoder_attention: "chunked", "full" or "sliding"; default chunked, as the official code.
          lora: a folder of LoRA adapters to fold into the weights.
          quantize: what is stored as int8: "none"; "weights", those of the decoder and its head;
            "weights+cache", also keys and values. Half the memory and less to read for each token,
            for answers that may differ.

        Raises:
          InputError: a file that is missing, broken or does not fit the others.
          UsageError: a dtype, mesh, attention or quantisation that does not exist.
        """
        if quantize not in QUANTIZE:
            raise UsageError(f"quantize is {quantize!r}; expected one of {', '.join(QUANTIZE)}")
        if dtype not in ("bfloat16", "float32"):
            raise UsageError(f"dtype is {dtype!r}; expected 'bfloat16' or 'float32'")
        path = Path(path)
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
        shardings = param_shardings(moss_audio.abstract_params(config, dtype), config, mesh)

        def then(path: str, leaf: jax.Array) -> Any:  # no two leaves are there in both forms
            leaf = leaf if quantize == "none" else _quantize(path, leaf, config)
            return decoder.unstack(leaf) if path.startswith(_LAYERS) else leaf

        return cls(
            _by_layer(load_params(path, config, dtype, shardings, lora, then)),
            config,
            compute=Compute(dtype=dtype, quantize=quantize),
            mesh=mesh,
            tokenizer=tokenizer,
            processor=processor,
            stop_ids=_stop_ids(path),
            random_weights=bool(read_json(path / "config.json").get("random_weights")),
        )

    @property
    def params(self) -> Any:
        """Nested dict of arrays as the model holds them: the decoder's layers are a tuple of trees,
        one for each, which generation reads fastest; the encoder's are stacked on axis 0."""
        return self._params

    def stacked_params(self) -> Any:
        """`params` as training and checkpoints have them, all layers stacked on axis 0.

        The decoder is stacked anew at each call, and is then in memory twice.
        """
        with jax.set_mesh(self.mesh):
            return decoder.stacked(self._params)

    @property
    def encoder_params(self) -> Any:
        """The part of `params` that hears."""
        return self._params["audio_encoder"]

    # --- from ids and mels ---------------------------------------------------------------------

    def encode_audio(self, mels: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Encodes the clips of one prompt.

        Args:
          mels: log-mels [128, frames]; together they decide the padding (SPEC of the encoder).

        Returns:
          For each clip (features [n, D], taps [K, n, D]) float32, before the adapter.
        """
        clips = _float32(mels)
        if not clips:
            return []
        counts = [audio_tokens(clip.shape[-1]) for clip in clips]
        ids = np.full(sum(counts), self.processor.audio_token_id, np.int32)
        example = Example(ids, clips)
        check(example, self.config.encoder, self.processor.audio_token_id)
        batch = self._batch([example])
        with jax.set_mesh(self.mesh):
            features, taps = _encode(self._params, batch, self.config, self.compute)
        places = batch["audio_index"][0]
        places = places[places >= 0]
        features = np.asarray(features[0], np.float32)[places]
        taps = np.asarray(taps[:, 0], np.float32)[:, places]
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

        `labels` [L] stand at their own tokens, as the official code has it: label i is predicted
        from the tokens before i, so the first one never counts.

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
            raise InputError(f"no label counts; expected one behind the first that is not {IGNORE}")
        self._checkvocabulary("label", counted)
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
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        **sampling: Any,
    ) -> list[int]:
        """The ids that follow a prompt, the stop token dropped. No loop guard by default.

        `sampling` takes the other fields of `Sampling`.
        """
        sampling = Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            **{"loop_guard": False, **sampling},
        )
        return self._engine(1).run([(self._example(ids, mels), sampling)])[0].ids

    # --- from text and sound -------------------------------------------------------------------

    def prepare(self, request: Request) -> Example:
        """A request's token ids and mels, exactly as the official processor makes them.

        Raises:
          InputError: no tokenizer, or a clip that cannot be read or is too short (named).
        """
        if self.tokenizer is None:
            raise InputError(
                "this checkpoint has no tokenizer: put tokenizer.json, or vocab.json and "
                "merges.txt, or a SentencePiece *.model into its folder, or use generate_ids"
            )
        markers = self.processor.time_markers
        if request.time_markers is not None:
            markers = request.time_markers
        clips = _clips(request.audio)
        mels = [self._mel(clip, number) for number, clip in enumerate(clips, 1)]
        ids = build_prompt(
            self.tokenizer,
            request.text,
            mel_frames=[mel.shape[1] for mel in mels],
            time_markers=markers,
            system=request.system,
        )
        names = ", ".join(_name(clip, i) for i, clip in enumerate(clips, 1))
        seconds = sum(mel.shape[1] for mel in mels) / 100
        self._check_length(names or "the prompt", seconds, "and the text make", len(ids))
        return Example(ids, tuple(mels))

    def generate(
        self,
        text: str,
        audio: Sequence[Audio] | Audio = (),
        *,
        system: str | None = None,
        time_markers: bool | None = None,
        on_text: Callable[[str], None] | None = None,
        **sampling: Any,
    ) -> Reply:
        """Answers a text about any number of clips.

        Args:
          text: what to ask; a text with `<|audio_bos|><|AUDIO|><|audio_eos|>` spans is the whole
            prompt.
          audio: files or 16 kHz mono waveforms.
          on_text: streaming: called with each new piece of raw text (thinking included, stop
            strings not).
          **sampling: fields of `Sampling`; greedy by default.
        """
        request = Request(text, audio, Sampling(**sampling), system, time_markers)
        if on_text is None:
            return self.generate_batch([request])[0]
        prompt = self.prepare(request)
        stream, told = StreamDecoder(self.tokenizer), 0
        until = UntilStop(request.sampling.stop, on_text)

        def on_token(_: int, ids: list[int]) -> None:
            nonlocal told
            for token in ids[told:]:
                until.push(stream.push(token))
            told = len(ids)

        output = self._engine(1).run([(prompt, request.sampling)], on_token=on_token)[0]
        until.push(stream.flush(), last=True)
        return self.reply(output, request.sampling)

    def generate_batch(
        self, requests: Sequence[Request], batch_size: int = 16, progress: bool = False
    ) -> list[Reply]:
        """Answers many requests, `batch_size` at a time; slots refill as answers end.

        Order is kept, and an answer does not depend on what else is in the batch.
        """
        prompts = [(self.prepare(request), request.sampling) for request in requests]
        return self.answer(prompts, batch_size, progress)

    def answer(
        self,
        prompts: Sequence[tuple[Example, Sampling]],
        batch_size: int = 16,
        progress: bool = False,
        on_reply: Callable[[int, Reply], None] | None = None,
    ) -> list[Reply]:
        """`generate_batch` for prompts that `prepare` has made.

        `on_reply` is called with (prompt number, reply) as each answer ends.
        """
        replies: list[Reply | None] = [None] * len(prompts)

        def on_done(number: int, output: Output) -> None:
            replies[number] = reply = self.reply(output, prompts[number][1])
            bar.update()
            if on_reply is not None:
                on_reply(number, reply)

        with tqdm(total=len(prompts), unit="answer", disable=not progress) as bar:
            self._engine(batch_size).run(prompts, on_done=on_done)
        return replies

    def reply(self, output: Output, sampling: Sampling) -> Reply:
        """Text and thinking of generated ids."""
        text = self.tokenizer.decode(output.ids)
        thinking, answer = split_thinking(text[: first_stop(text, sampling.stop)])
        return Reply(answer.strip(), thinking, output.ids, output.finish_reason)

    # --- inside --------------------------------------------------------------------------------

    def _engine(self, slots: int) -> Engine:
        decode = self.tokenizer.decode if self.tokenizer else None
        return Engine(
            self._params, self.config, self.compute, self._vocab, self.mesh, decode, slots
        )

    def _example(self, ids: Sequence[int], mels: Sequence[np.ndarray]) -> Example:
        ids = np.asarray(ids)
        if ids.ndim != 1 or len(ids) == 0 or not np.issubdtype(ids.dtype, np.integer):
            raise UsageError(f"ids have shape {ids.shape} and dtype {ids.dtype}; expected int [L]")
        self._checkvocabulary("token id", ids)
        if len(ids) > self.config.decoder.max_positions:
            raise InputError(
                f"the prompt has {len(ids)} tokens, but the model has "
                f"{self.config.decoder.max_positions} positions"
            )
        example = Example(ids.astype(np.int32), _float32(mels))
        check(example, self.config.encoder, self.processor.audio_token_id)
        return example

    def _checkvocabulary(self, what: str, ids: np.ndarray) -> None:
        size = self.config.decoder.vocab_size
        outside = ids[(ids < 0) | (ids >= size)]
        if len(outside):
            raise InputError(f"{what} {outside[0]} is outside the model's vocabulary of {size}")

    def _check_length(self, names: str, seconds: float, make: str, tokens: int) -> None:
        positions = self.config.decoder.max_positions
        if tokens >= positions:
            raise InputError(
                f"{names}: {seconds:.0f} s of audio {make} {tokens} tokens, but the model has "
                f"{positions} positions; shorten it (transcribe cuts audio into windows)"
            )

    def _batch(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        shape = bucket_shape(examples, self.config.encoder, len(examples))
        return make_batch(
            [[e] for e in examples], shape, self.config.encoder, self.processor.audio_token_id
        )

    def _mel(self, clip: Audio, number: int) -> np.ndarray:
        wav = clip if isinstance(clip, np.ndarray) else load_audio(clip)
        # Before the mel is made: hours of audio would take gigabytes to no end.
        frames = mel_frames(wav.size)
        self._check_length(_name(clip, number), frames / 100, "alone make", audio_tokens(frames))
        try:
            mel = log_mel(wav)
        except InputError as error:
            raise InputError(f"{_name(clip, number)}: {error}") from None
        # The official processor rounds here, whatever the model's dtype.
        return mel.astype(ml_dtypes.finfo(self.processor.mel_dtype).dtype).astype(np.float32)


_LAYERS = "language_model/layers/"
_quantize = jax.jit(quantize_leaf, static_argnums=(0, 2))


def _by_layer(params: Any) -> Any:
    """Turns a tuple of layers at each of the decoder's leaves into a tuple of trees."""
    leaves = params["language_model"]["layers"]
    apart = {"is_leaf": lambda x: type(x) is tuple}  # Int8 is another
    count = len(jax.tree.leaves(leaves, **apart)[0])
    layers = (
        jax.tree.map(lambda leaf: leaf[index], leaves, **apart)  # noqa: B023  used at once
        for index in range(count)
    )
    return decoder.with_layers(params, tuple(layers))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _encode(params: Any, batch: moss_audio.Batch, config: ModelConfig, compute: Compute) -> tuple:
    return encoder.encode_rows(
        params["audio_encoder"], config.encoder, compute,
        batch["mels"], batch["frames"], batch["padded"],
    )  # fmt: skip


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


def _name(clip: Audio, number: int) -> str:
    if isinstance(clip, str | Path):
        return str(clip)
    return str(getattr(clip, "name", f"clip {number}"))


def _clips(audio: Sequence[Audio] | Audio) -> Sequence[Audio]:
    """A clip by itself is one clip, not a sequence of letters or samples."""
    one = isinstance(audio, str | Path | np.ndarray) or hasattr(audio, "read")
    return [audio] if one else audio


def _float32(mels: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    clips = tuple(np.atleast_1d(np.asarray(mel, np.float32)) for mel in mels)
    for number, clip in enumerate(clips, 1):
        if not np.isfinite(clip).all():
            raise InputError(f"clip {number}: the log-mel holds values that are NaN or infinite")
    return clips
