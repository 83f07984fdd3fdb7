"""The configuration of MOSS-Audio: frozen dataclasses, released sizes, config.json in and out.

A `ModelConfig` is hashable, so it can be a static argument of a jitted function. This file does not
import JAX.

A tap is an encoder layer whose output also reaches the decoder. DeepStack is how: a merger projects
each tap's output, and the result is added after one of the decoder's first layers.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, get_args

from moss_audio_jax import files, hub
from moss_audio_jax.errors import InputError
from moss_audio_jax.files import quoted, shown

# The small model, which this project trained (docs/small_model.md).
DEFAULT_CHECKPOINT = Path(__file__).parent / "assets" / "small"

EncoderAttention = Literal["chunked", "full", "sliding"]

# Keys of config.json that change what the model computes, with the only values that this code
# implements, which are those of the released files. Other values are refused, not ignored.
_ONLY_AUDIO = {"activation_function": "gelu", "downsample_rate": 8}
_ONLY_LANGUAGE = {
    "model_type": "qwen3",
    "hidden_act": "silu",
    "attention_bias": False,
    "rope_scaling": None,
    "use_sliding_window": False,
    "sliding_window": None,
}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Audio encoder: log-mel [frames, mel_bins] -> tokens [ceil(frames / 8), output_dim]."""

    d_model: int = 1280
    layers: int = 32
    heads: int = 20
    ffn_dim: int = 5120
    conv_channels: int = 480
    output_dim: int = 1280
    mel_bins: int = 128
    tap_layers: tuple[int, ...] = (8, 16, 24)  # 0-based; their outputs feed the mergers
    norm_eps: float = 1e-5  # of the final norm; the layers use Whisper's 1e-5
    attention: EncoderAttention = "chunked"
    chunk_frames: int = 400  # mel frames of an independent chunk, 4 s ("chunked")
    window: int = 100  # tokens that a query may attend to ("sliding")
    causal_window: bool = False  # sliding: False sees i-50..i+49, True sees i-99..i

    @property
    def head_dim(self) -> int:
        return self.d_model // self.heads


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Qwen3 decoder."""

    hidden_size: int = 4096
    ffn_dim: int = 12288
    layers: int = 36
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vocab_size: int = 151936
    max_positions: int = 40960
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    tie_embeddings: bool = False


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The whole model.

    Attributes:
      inject_layers: the number of taps that reach the decoder (DeepStack).
      inject_gate: a learned gate on each of them; see `models.decoder.decode`. The released models
        have none.
    """

    encoder: EncoderConfig = EncoderConfig()
    decoder: DecoderConfig = DecoderConfig()
    adapter_dim: int = 8192
    inject_layers: int = 3
    inject_gate: bool = False

    def with_attention(self, attention: EncoderAttention) -> ModelConfig:
        """The same model with another attention layout in its encoder."""
        encoder = dataclasses.replace(self.encoder, attention=attention)
        return dataclasses.replace(self, encoder=encoder).validate()

    def validate(self) -> ModelConfig:
        """Returns self, or raises InputError naming the first key with an impossible value."""
        enc, dec = self.encoder, self.decoder
        for owner, prefix in ((enc, "encoder"), (dec, "decoder"), (self, "model")):
            for field in dataclasses.fields(owner):
                value = getattr(owner, field.name)
                if field.type == "int" and (type(value) is not int or value < 0):
                    raise InputError(
                        f"{prefix}.{field.name} is {quoted(value)}; expected a non-negative integer"
                    )
                most = _MOST.get(field.name, _MOST_OTHERS)
                if field.type == "int" and value > most:
                    raise InputError(
                        f"{prefix}.{field.name} is {quoted(value)}; expected at most {most}"
                    )
                if field.type == "int" and value == 0 and field.name != "inject_layers":
                    raise InputError(f"{prefix}.{field.name} is 0; expected a positive integer")
        if enc.attention not in ("chunked", "full", "sliding"):
            raise InputError(
                f"encoder.attention is {enc.attention!r}; expected chunked, full or sliding"
            )
        if enc.d_model % enc.heads:
            raise InputError(
                f"encoder.d_model {enc.d_model} is not a multiple of encoder.heads {enc.heads}"
            )
        if enc.d_model % 2:
            raise InputError(f"encoder.d_model {enc.d_model} must be even (sin and cos halves)")
        if enc.mel_bins % 8:
            raise InputError(f"encoder.mel_bins {enc.mel_bins} must be a multiple of 8")
        if enc.chunk_frames % 8:
            raise InputError(f"encoder.chunk_frames {enc.chunk_frames} must be a multiple of 8")
        taps = enc.tap_layers
        if list(taps) != sorted(set(taps)) or any(not 0 <= t < enc.layers for t in taps):
            raise InputError(
                f"encoder.tap_layers {list(taps)} must be increasing and within 0..{enc.layers - 1}"
            )
        if dec.heads % dec.kv_heads:
            raise InputError(
                f"decoder.heads {dec.heads} is not a multiple of decoder.kv_heads {dec.kv_heads}"
            )
        if dec.head_dim % 2:
            raise InputError(f"decoder.head_dim {dec.head_dim} must be even (rotary halves)")
        if self.inject_layers > min(len(taps), dec.layers):
            raise InputError(
                f"inject_layers {self.inject_layers} exceeds the {len(taps)} taps "
                f"or the {dec.layers} decoder layers"
            )
        if self.inject_gate and not self.inject_layers:
            raise InputError("inject_gate is true and inject_layers 0; expected something to gate")
        return self


@dataclasses.dataclass(frozen=True)
class ProcessorConfig:
    """processor_config.json: the special ids and how a prompt's audio is prepared."""

    audio_token_id: int = 151654
    audio_start_id: int = 151669
    audio_end_id: int = 151670
    time_markers: bool = True
    mel_dtype: str = "bfloat16"


Quantize = Literal["none", "weights", "weights+cache"]
QUANTIZE: tuple[Quantize, ...] = get_args(Quantize)


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a model is computed. Results differ only by rounding, except with `quantize`."""

    dtype: str = "bfloat16"  # of activations; softmax, norms, rotary and logits stay float32
    attention: str = "auto"  # see ops.attention
    remat: str = "none"  # see models.remat
    encoder_chunks: int = 32  # chunks that the encoder processes together; limits its memory
    quantize: Quantize = "none"  # in generation: int8 decoder weights, or also keys and values
    loss_chunk: int = 1024  # labelled positions per device whose logits exist at a time
    most_segments: int = 0  # in a packed row, padding included; 0: not known. See ops.attention
    untouched_layers: int = 0  # of the decoder, from the first: no gradient passes them


RELEASED = {
    "4b": ModelConfig(decoder=DecoderConfig(hidden_size=2560, ffn_dim=9728)),
    "8b": ModelConfig(),
}


# No model has larger values; they would exhaust memory before the weights are compared.
_MOST = {"layers": 4096, "chunk_frames": 1_000_000, "window": 1_000_000}
_MOST_OTHERS = 2**31 - 1

# Types of the values that are not integers.
_KINDS = {
    "layer_norm_eps": (int, float),
    "rms_norm_eps": (int, float),
    "rope_theta": (int, float),
    "deepstack_encoder_layer_indexes": (list,),
}


# --- config.json -------------------------------------------------------------------------------


def from_official(raw: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """The model that an official config.json describes.

    Args:
      raw: the parsed JSON.
      where: the file's name, for error messages.

    Raises:
      InputError: a value is impossible, or this code does not implement it.
    """
    if raw.get("model_type", "moss_audio") != "moss_audio":
        raise InputError(
            f"{where}: model_type is {quoted(raw['model_type'])}; expected 'moss_audio'"
        )
    _refuse_quantized(raw, where)
    if "optimizer" in raw and "audio_config" not in raw:
        run = where.removesuffix("config.json")
        raise InputError(
            f"{where}: is of a training run; expected a checkpoint, such as the run's {run}export"
        )
    for key in ("audio_config", "language_config"):
        if not isinstance(raw.get(key), dict):
            raise InputError(f"{where}: {key} is missing; expected an object")
    audio, language = raw["audio_config"], raw["language_config"]
    _refuse_unknown(audio, _ONLY_AUDIO, f"{where}: audio_config")
    _refuse_unknown(language, _ONLY_LANGUAGE, f"{where}: language_config")

    layers = _take(audio, "encoder_layers", 32, f"{where}: audio_config")
    encoder = EncoderConfig(
        d_model=_take(audio, "d_model", 1280, where),
        layers=layers,
        heads=_take(audio, "encoder_attention_heads", 20, where),
        ffn_dim=_take(audio, "encoder_ffn_dim", 5120, where),
        conv_channels=_take(audio, "downsample_hidden_size", 480, where),
        output_dim=_take(audio, "output_dim", 1280, where),
        mel_bins=_take(audio, "num_mel_bins", 128, where),
        tap_layers=tuple(_take(audio, "deepstack_encoder_layer_indexes", [8, 16, 24], where) or ()),
        norm_eps=float(_take(audio, "layer_norm_eps", 1e-5, where)),
        chunk_frames=2 * _take(audio, "n_window", 200, where),
        window=_take(audio, "encoder_attention_window_size", 100, where),
    )
    decoder = decoder_from_qwen3(language, f"{where}: language_config")
    # transformers obeys the top-level key; here it defaults to untied.
    decoder = dataclasses.replace(decoder, tie_embeddings=_flag(raw, "tie_word_embeddings", where))
    taps = len(encoder.tap_layers)
    inject = _take(raw, "deepstack_num_inject_layers", taps, where)
    config = ModelConfig(
        encoder=encoder,
        decoder=decoder,
        adapter_dim=_take(raw, "adapter_hidden_size", 8192, where),
        inject_layers=min(taps, inject),
        inject_gate=_flag(raw, "inject_gate", where),
    )
    try:
        return config.validate()
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def decoder_from_qwen3(raw: dict[str, Any], where: str = "config.json") -> DecoderConfig:
    """The decoder that a Qwen3 config (or MOSS-Audio's `language_config`) describes."""
    _refuse_quantized(raw, where)
    _refuse_unknown(raw, _ONLY_LANGUAGE, where)
    rope = raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise InputError(f"{where}: rope_parameters is {quoted(rope)}; expected an object")
    if rope.get("rope_type", "default") != "default":
        raise InputError(f"{where}: rope_type is {quoted(rope['rope_type'])}; expected 'default'")
    hidden = _take(raw, "hidden_size", None, where)
    heads = _take(raw, "num_attention_heads", None, where)
    return DecoderConfig(
        hidden_size=hidden,
        ffn_dim=_take(raw, "intermediate_size", None, where),
        layers=_take(raw, "num_hidden_layers", None, where),
        heads=heads,
        kv_heads=_take(raw, "num_key_value_heads", heads, where),
        head_dim=_take(raw, "head_dim", 128, where),
        vocab_size=_take(raw, "vocab_size", None, where),
        max_positions=_take(raw, "max_position_embeddings", 40960, where),
        rope_theta=float(_take(raw | rope, "rope_theta", 1e6, where)),
        norm_eps=float(_take(raw, "rms_norm_eps", 1e-6, where)),
        tie_embeddings=_flag(raw, "tie_word_embeddings", where),
    )


def to_official(config: ModelConfig, dtype: str = "bfloat16") -> dict[str, Any]:
    """An official config.json for a model that was not loaded from one."""
    enc, dec = config.encoder, config.decoder
    ours = {"inject_gate": True} if config.inject_gate else {}  # in native checkpoints alone
    return ours | {
        "architectures": ["MossAudioModel"],
        "model_type": "moss_audio",
        "dtype": dtype,
        "adapter_hidden_size": config.adapter_dim,
        "deepstack_num_inject_layers": config.inject_layers,
        "ignore_index": -100,
        "num_hidden_layers": dec.layers,
        "tie_word_embeddings": dec.tie_embeddings,
        "vocab_size": dec.vocab_size,
        "audio_config": {
            "d_model": enc.d_model,
            "output_dim": enc.output_dim,
            "num_mel_bins": enc.mel_bins,
            "encoder_layers": enc.layers,
            "encoder_attention_heads": enc.heads,
            "encoder_ffn_dim": enc.ffn_dim,
            "downsample_rate": 8,
            "downsample_hidden_size": enc.conv_channels,
            "encoder_attention_window_size": enc.window,
            "n_window": enc.chunk_frames // 2,
            "max_source_positions": 1500,
            "activation_function": "gelu",
            "layer_norm_eps": enc.norm_eps,
            "deepstack_encoder_layer_indexes": list(enc.tap_layers),
        },
        "language_config": {
            "model_type": "qwen3",
            "attention_bias": False,
            "hidden_act": "silu",
            "hidden_size": dec.hidden_size,
            "intermediate_size": dec.ffn_dim,
            "num_hidden_layers": dec.layers,
            "num_attention_heads": dec.heads,
            "num_key_value_heads": dec.kv_heads,
            "head_dim": dec.head_dim,
            "vocab_size": dec.vocab_size,
            "max_position_embeddings": dec.max_positions,
            "rms_norm_eps": dec.norm_eps,
            "rope_scaling": None,
            "rope_theta": dec.rope_theta,
            "sliding_window": None,
            "use_sliding_window": False,
            "tie_word_embeddings": dec.tie_embeddings,
        },
    }


def processor_from_official(
    raw: dict[str, Any], where: str = "processor_config.json"
) -> ProcessorConfig:
    """Reads processor_config.json; missing keys get the values of the released models."""
    for key, only in (
        ("mel_sr", 16000),
        ("mel_dim", 128),
        ("mel_n_fft", 400),
        ("mel_hop_length", 160),
    ):
        if raw.get(key, only) != only:
            raise InputError(f"{where}: {key} is {quoted(raw[key])}; expected {only}")
    mel_dtype = raw.get("mel_dtype", "bfloat16")
    mel_dtype = mel_dtype.removeprefix("torch.") if isinstance(mel_dtype, str) else mel_dtype
    if mel_dtype not in ("bfloat16", "float16", "float32"):
        raise InputError(f"{where}: mel_dtype is {quoted(mel_dtype)}; expected bfloat16 or float32")
    default = ProcessorConfig()
    ids = {}
    for key in ("audio_token_id", "audio_start_id", "audio_end_id"):
        ids[key] = raw.get(key, getattr(default, key))
        if type(ids[key]) is not int or not 0 <= ids[key] <= _MOST_OTHERS:
            raise InputError(f"{where}: {key} is {quoted(ids[key])}; expected a token id")
    markers = _flag(raw, "enable_time_marker", where, True)
    return ProcessorConfig(**ids, time_markers=markers, mel_dtype=mel_dtype)


def processor_to_official(config: ProcessorConfig) -> dict[str, Any]:
    return {
        "mel_sr": 16000,
        "mel_dim": 128,
        "mel_n_fft": 400,
        "mel_hop_length": 160,
        "mel_dtype": config.mel_dtype,
        "use_whisper_feature_extractor": True,
        "enable_time_marker": config.time_markers,
        "audio_token_id": config.audio_token_id,
        "audio_start_id": config.audio_start_id,
        "audio_end_id": config.audio_end_id,
    }


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object from a file. Raises InputError, naming the file, if it is missing or broken."""
    value = files.read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{shown(path)}: expected a JSON object, found {type(value).__name__}")
    return value


def read_config_json(folder: str | Path) -> tuple[dict[str, Any], str]:
    """A checkpoint's config.json, and its path for messages.

    Raises:
      InputError: there is no such folder, or the file is missing or broken.
    """
    folder = hub.folder_of(folder, weights=False)
    if not folder.exists():
        raise InputError(f"{folder}: no such file or folder{hub.advice(folder)}")
    file = folder / "config.json"
    return read_json(file), str(file)


def _take(raw: dict[str, Any], key: str, default: Any, where: str) -> Any:
    value = raw.get(key)
    if value is None:
        value = default
    if value is None:
        raise InputError(f"{where}: {key} is missing")
    kinds = _KINDS.get(key, (int,))
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise InputError(f"{where}: {key} is {quoted(value)}; expected {kinds[-1].__name__}")
    if float in kinds and not 0 < value < 1e30:
        raise InputError(f"{where}: {key} is {quoted(value)}; expected a number above 0")
    if isinstance(value, list) and not all(type(item) is int for item in value):
        raise InputError(f"{where}: {key} is {quoted(value)}; expected a list of integers")
    return value


def _flag(raw: dict[str, Any], key: str, where: str, default: bool = False) -> bool:
    value = raw.get(key)
    if value is not None and type(value) is not bool:
        raise InputError(f"{where}: {key} is {quoted(value)}; expected true or false")
    return default if value is None else value


def _refuse_quantized(raw: dict[str, Any], where: str) -> None:
    for key in ("quantization_config", "compression_config"):
        settings = raw.get(key)
        if settings is None:
            continue
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        raise InputError(
            f"{where}: {key} says that the weights are quantised ({quoted(method)}); such weights "
            "are not read: use the unquantised checkpoint (--quantize converts it to int8)"
        )


def _refuse_unknown(raw: dict[str, Any], only: dict[str, Any], where: str) -> None:
    for key, value in only.items():
        if key in raw and raw[key] != value:
            raise InputError(
                f"{where}.{key} is {quoted(raw[key])}; this implementation only knows {value!r}"
            )
