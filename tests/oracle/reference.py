"""MOSS-Audio in plain PyTorch, with which the JAX model is compared.

Qwen3 and Whisper layers are those of `transformers` (4.57, eager attention); stem, adapters and
DeepStack are written out here. One prompt at a time, one chunk at a time, no cache: readable first.
Float32 throughout, always in eval mode, differentiable: `loss(...).backward()` leaves gradients
under the official weight names (`named_parameters()`).

    model = Reference.load("tests/golden/tiny/a")
    logits = model.logits(ids, [mel])       # [L, V], a tensor

Masks are boolean, True = the query (row) may see the key (column).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3Config, WhisperConfig
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3DecoderLayer,
    Qwen3Model,
    Qwen3RotaryEmbedding,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer

ArrayLike = np.ndarray | Tensor
# A buffer that some checkpoints carry; it is a function of d_model.
TIMESCALES = "audio_encoder.embed_positions.inv_timescales"


class Encoder(nn.Module):
    """Convolutional stem, sinusoids, Whisper layers. Dimensions from the official `audio_config`.

    `attention` is chunked | full | sliding; `causal_window` is the direction of `sliding`.
    """

    def __init__(self, config: dict[str, Any], attention: str, causal_window: bool) -> None:
        super().__init__()
        if attention not in ("chunked", "full", "sliding"):
            raise ValueError(f"attention {attention!r}: expected chunked, full or sliding")
        self.attention, self.causal_window = attention, causal_window
        self.window = config.get("encoder_attention_window_size", 100)
        self.chunk_frames = 2 * config.get("n_window", 200)
        self.taps = tuple(config["deepstack_encoder_layer_indexes"])

        width, channels = config["d_model"], config["downsample_hidden_size"]
        self.conv1 = nn.Conv2d(1, channels, kernel_size=3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=1)
        self.stem_proj = nn.Linear(channels * config["num_mel_bins"] // 8, width)
        layer_config = _whisper_config(config)
        self.layers = nn.ModuleList(
            WhisperEncoderLayer(layer_config) for _ in range(config["encoder_layers"])
        )
        self.layer_norm = nn.LayerNorm(width, eps=config.get("layer_norm_eps", 1e-5))
        if config["output_dim"] != width:
            self.out_proj = nn.Linear(width, config["output_dim"], bias=False)
        else:
            self.out_proj = nn.Identity()

    def forward(self, mels: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Mels [128, n] of ONE prompt -> per clip (features [tokens, D], taps [K, tokens, D])."""
        longest = max((mel.shape[1] for mel in mels), default=0)
        size = self.chunk_frames if self.attention == "chunked" else longest
        padded = min(size, longest)
        clips = []
        for mel in mels:
            parts = [self._chunk(chunk, padded) for chunk in mel.split(size, dim=1)]
            features, taps = zip(*parts, strict=True)
            clips.append((torch.cat(features), torch.cat(taps, dim=1)))
        return clips

    def _chunk(self, mel: Tensor, padded: int) -> tuple[Tensor, Tensor]:
        # The convolutions see the padding; attention never does, so it is cut off in between.
        tokens = math.ceil(mel.shape[1] / 8)
        x = self._stem(F.pad(mel, (0, padded - mel.shape[1])))[:tokens]
        x = x + sinusoids(tokens, x.shape[1])
        mask = None
        if self.attention == "sliding":
            mask = window_mask(tokens, self.window, self.causal_window)
        x = x[None]
        taps = []
        for index, layer in enumerate(self.layers):
            x = _run_whisper(layer, x, mask)
            if index in self.taps:
                taps.append(self.out_proj(x[0]))
        features = self.out_proj(self.layer_norm(x[0]))
        return features, torch.stack(taps) if taps else features.new_zeros(0, *features.shape)

    def _stem(self, mel: Tensor) -> Tensor:
        """[128, n] -> [ceil(n / 8), d_model]"""
        x = mel[None, None]
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.gelu(conv(x))
        _, channels, freqs, time = x.shape
        return self.stem_proj(x.reshape(channels * freqs, time).T)


class GatedMLP(nn.Module):
    """Adapter and mergers: down(silu(gate(x)) * up(x))."""

    def __init__(self, d_in: int, d_hidden: int, d_out: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_in, d_hidden, bias=False)
        self.up_proj = nn.Linear(d_in, d_hidden, bias=False)
        self.down_proj = nn.Linear(d_hidden, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Reference(nn.Module):
    """The whole model, built from an official config.json; parameters bear the official names.

    Args:
      config: the parsed config.json.
      audio_token_id: the placeholder (processor_config.json).
      attention: encoder layout: chunked, full or sliding.
      causal_window: with sliding, whether a query sees only keys up to itself.
    """

    def __init__(
        self,
        config: dict[str, Any],
        audio_token_id: int,
        attention: str = "chunked",
        causal_window: bool = False,
    ) -> None:
        super().__init__()
        audio, language = config["audio_config"], _qwen3_config(config["language_config"])
        self.audio_token_id = audio_token_id
        mergers = len(audio["deepstack_encoder_layer_indexes"])
        if config.get("deepstack_num_inject_layers") is not None:
            mergers = min(mergers, config["deepstack_num_inject_layers"])
        dims = audio["output_dim"], config["adapter_hidden_size"], language.hidden_size

        self.audio_encoder = Encoder(audio, attention, causal_window)
        self.audio_adapter = GatedMLP(*dims)
        self.deepstack_audio_merger_list = nn.ModuleList(GatedMLP(*dims) for _ in range(mergers))
        self.language_model = Qwen3Model(language)
        self.lm_head = None
        if not config.get("tie_word_embeddings", False):
            self.lm_head = nn.Linear(language.hidden_size, language.vocab_size, bias=False)
        self.eval()

    @classmethod
    def load(
        cls, folder: str | Path, attention: str = "chunked", causal_window: bool = False
    ) -> Reference:
        """Reads an official checkpoint folder; every weight must be there, and no other."""
        folder = Path(folder)
        config = json.loads((folder / "config.json").read_text())
        processor = json.loads((folder / "processor_config.json").read_text())
        model = cls(config, processor["audio_token_id"], attention, causal_window)
        weights: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            weights |= load_file(file)
        weights.pop(TIMESCALES, None)
        model.load_state_dict(weights, strict=True)
        return model

    def encode(self, mels: Sequence[ArrayLike]) -> list[tuple[Tensor, Tensor]]:
        """One prompt's clips [128, n] -> (features [tokens, D], taps [K, tokens, D]) of each."""
        return self.audio_encoder([torch.as_tensor(mel).float() for mel in mels])

    def logits(self, ids: ArrayLike, mels: Sequence[ArrayLike] = ()) -> Tensor:
        """Token ids [L] and the clips that their placeholders stand for -> logits [L, V]."""
        return self._decode(*self._embed(_ids(ids), mels))

    def loss(self, ids: ArrayLike, labels: ArrayLike, mels: Sequence[ArrayLike] = ()) -> Tensor:
        """Mean cross entropy of logits[t] against labels[t + 1]; labels of -100 do not count."""
        return F.cross_entropy(self.logits(ids, mels)[:-1], _ids(labels)[1:], ignore_index=-100)

    @torch.no_grad()
    def greedy(
        self,
        ids: ArrayLike,
        mels: Sequence[ArrayLike] = (),
        n: int = 12,
        forbidden: Collection[int] = (),
    ) -> tuple[list[int], float]:
        """The n likeliest next ids, one after the other, none of them in `forbidden`.

        Returns:
          The ids, and the smallest lead any of them had over the runner-up (in logits).
        """
        x, audio, injected = self._embed(_ids(ids), mels)
        chosen, margin = [], math.inf
        for _ in range(n):
            last = self._decode(x, audio, injected)[-1]
            last[list(forbidden)] = -math.inf
            (best, second), order = last.topk(2)
            margin = min(margin, float(best - second))
            chosen.append(int(order[0]))
            x = torch.cat([x, self.language_model.embed_tokens(order[:1])])
            audio = F.pad(audio, (0, 1))  # a generated token never stands for audio
        return chosen, margin

    def _embed(self, ids: Tensor, mels: Sequence[ArrayLike]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """-> embeddings [L, H], which positions are audio [L], what each merger adds [n, H]."""
        x = self.language_model.embed_tokens(ids)
        audio = ids == self.audio_token_id
        if not len(mels):
            assert not audio.any(), "placeholders without a clip"
            return x, audio, []
        features, taps = zip(*self.encode(mels), strict=True)
        embedded = self.audio_adapter(torch.cat(features))
        assert len(embedded) == audio.sum(), "placeholders and encoder tokens differ in number"
        # Fewer mergers than taps take the first taps.
        pairs = zip(self.deepstack_audio_merger_list, torch.cat(taps, dim=1), strict=False)
        injected = [merger(tap) for merger, tap in pairs]
        return _rows(x, audio, embedded, add=False), audio, injected

    def _decode(self, x: Tensor, audio: Tensor, injected: Sequence[Tensor]) -> Tensor:
        decoder = self.language_model
        x = x[None]
        for index, layer in enumerate(decoder.layers):
            x = _run_qwen3(layer, decoder.rotary_emb, x)
            if index < len(injected):
                x = _rows(x[0], audio, injected[index], add=True)[None]
        x = decoder.norm(x)[0]
        head = decoder.embed_tokens if self.lm_head is None else self.lm_head
        return x @ head.weight.T


def sinusoids(length: int, width: int) -> Tensor:
    """Positions 0 .. length-1 -> [length, width], sines in the first half, cosines after."""
    half = width // 2
    rates = torch.exp(torch.arange(half).float() * (-math.log(10_000.0) / (half - 1)))
    angles = torch.arange(length).float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def window_mask(length: int, window: int, causal: bool) -> Tensor:
    """Which of `length` keys each query sees: `window` of them, around it or up to it."""
    offset = torch.arange(length)[None, :] - torch.arange(length)[:, None]  # key - query
    first = 1 - window if causal else -(window // 2)
    return (offset >= first) & (offset < first + window)


# --- single layers, for comparisons one at a time -----------------------------------------------


def qwen3_layer(
    language_config: dict[str, Any], seed: int
) -> tuple[Qwen3DecoderLayer, Callable[..., Tensor], dict[str, np.ndarray]]:
    """A decoder layer with random weights.

    Returns:
      The module; `apply(x [B, T, H], positions=None [B, T], mask=None [T, T] or [B, T, T])`, whose
      defaults are 0 .. T-1 and causal; its weights by official name within the layer
      (`self_attn.q_proj.weight`, ...).
    """
    config = _qwen3_config(language_config)
    layer = randomize(Qwen3DecoderLayer(config, layer_idx=0).eval(), seed)
    rotary = Qwen3RotaryEmbedding(config)

    def apply(
        x: ArrayLike, positions: ArrayLike | None = None, mask: ArrayLike | None = None
    ) -> Tensor:
        return _run_qwen3(layer, rotary, torch.as_tensor(x), positions, mask)

    return layer, apply, _numpy_state(layer)


def whisper_layer(
    audio_config: dict[str, Any], seed: int
) -> tuple[WhisperEncoderLayer, Callable[..., Tensor], dict[str, np.ndarray]]:
    """An encoder layer with random weights: module, `apply(x [B, T, D], mask=None)`, weights.

    As `qwen3_layer`, without positions; by default every query sees every key.
    """
    layer = randomize(WhisperEncoderLayer(_whisper_config(audio_config)).eval(), seed)

    def apply(x: ArrayLike, mask: ArrayLike | None = None) -> Tensor:
        return _run_whisper(layer, torch.as_tensor(x), mask)

    return layer, apply, _numpy_state(layer)


def randomize(module: nn.Module, seed: int) -> nn.Module:
    """Fills every parameter, in place, so that no mistake is hidden by a special value.

    Matrices keep the scale of what passes through; norms spread around 1, biases around 0. Numpy
    draws the numbers, each tensor's from its name, so that neither torch's version nor the order
    of the modules decides them.
    """
    for name, parameter in module.named_parameters():
        rng = np.random.default_rng([seed, *name.encode()])
        values = rng.standard_normal(tuple(parameter.shape))
        if parameter.ndim > 1:
            values *= 1.2 / math.sqrt(math.prod(parameter.shape[1:]))
        elif name.endswith("weight"):
            values = 1 + 0.2 * values
        else:
            values *= 0.2
        parameter.data = torch.from_numpy(values.astype(np.float32))
    return module


def to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy()


# --- inner ----------------------------------------------------------------------------------------


def _run_qwen3(
    layer: Qwen3DecoderLayer,
    rotary: Qwen3RotaryEmbedding,
    x: Tensor,
    positions: ArrayLike | None = None,
    mask: ArrayLike | None = None,
) -> Tensor:
    batch, length, _ = x.shape
    if positions is None:
        positions = torch.arange(length).expand(batch, length)
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool).tril()
    rotation = rotary(x, torch.as_tensor(positions).long())
    out = layer(x, attention_mask=_additive(mask), position_embeddings=rotation)
    return out[0] if isinstance(out, tuple) else out


def _run_whisper(layer: WhisperEncoderLayer, x: Tensor, mask: ArrayLike | None) -> Tensor:
    additive = None if mask is None else _additive(mask)
    return layer(x, attention_mask=additive, layer_head_mask=None)[0]


def _additive(mask: ArrayLike) -> Tensor:
    """[T, T] or [B, T, T] of bool -> 0 where seen, the lowest float where not, [1 or B, 1, T, T]"""
    mask = torch.as_tensor(mask)
    mask = mask.reshape(-1, 1, *mask.shape[-2:])
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


def _rows(x: Tensor, where: Tensor, values: Tensor, add: bool) -> Tensor:
    """x [L, H] with `values` put (or added) at the rows where `where` is True."""
    (rows,) = where.nonzero(as_tuple=True)
    return x.index_add(0, rows, values) if add else x.index_copy(0, rows, values)


def _qwen3_config(raw: dict[str, Any]) -> Qwen3Config:
    names = """hidden_size intermediate_size num_hidden_layers num_attention_heads
        num_key_value_heads head_dim vocab_size max_position_embeddings rms_norm_eps hidden_act"""
    theta = (raw.get("rope_parameters") or raw)["rope_theta"]
    config = Qwen3Config(**{name: raw[name] for name in names.split()}, rope_theta=theta)
    config._attn_implementation = "eager"
    return config


def _whisper_config(raw: dict[str, Any]) -> WhisperConfig:
    names = "d_model encoder_attention_heads encoder_ffn_dim activation_function"
    config = WhisperConfig(**{name: raw[name] for name in names.split()}, attention_dropout=0.0)
    config._attn_implementation = "eager"
    return config


def _numpy_state(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: to_numpy(value).copy() for name, value in module.state_dict().items()}


def _ids(ids: ArrayLike | Sequence[int]) -> Tensor:
    return torch.as_tensor(ids).long()
