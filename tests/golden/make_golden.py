"""Makes tests/golden/tiny: two tiny random checkpoints and the PyTorch reference's results.

    python tests/golden/make_golden.py              # rewrites tests/golden/tiny
    python tests/golden/make_golden.py --output DIR

Needs the extra `oracle` (torch, transformers). Everything follows from the seeds below; README.md
beside this file says what the files hold. tests/oracle/test_reference.py makes them again and
compares, so run this after any intended change and commit what it writes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from oracle.reference import TIMESCALES, Reference, randomize, to_numpy

TINY = Path(__file__).resolve().parent / "tiny"
DIGIT_0 = 15  # ids of "0" .. "9" follow one another, as in the Qwen vocabulary
GREEDY = 12
SMALLEST_MARGIN = 0.02  # logits: float noise is 1e-5, so it can flip no greedy token
EVERY_ROW = 24  # prompts up to this long keep every row of their logits,
ROW_STEP = 16  # longer ones every sixteenth, ending with the last

# Clips of each prompt, in mel frames. Chunks hold 400 frames in `a`, 40 in `b`; the last three
# tell the padding rule: many chunks, a long and a short clip, several that are all under a chunk.
# (Padding hardly shows where the length mod 8 is 5, and not at all where it is 0 or 7.)
CLIPS = {
    "a": [[5], [36], [400], [401], [826], [433, 99], [97, 36, 250]],
    "b": [[5], [36], [40], [41], [203], [92, 22], [11, 38, 26]],
}
# What the other encoder layouts are computed for: indices into CLIPS.
LAYOUT_PROMPTS = {"a": [4, 6], "b": [4, 6]}
LAYOUTS = {
    "full": ("full", False),
    "sliding": ("sliding", False),
    "sliding_causal": ("sliding", True),
}
SEEDS = {"a": 1, "b": 2}

CONFIGS: dict[str, dict[str, Any]] = {
    # Untied, projected encoder output, every tap injected, the default chunk (no `n_window`).
    "a": {
        "architectures": ["MossAudioModel"],
        "model_type": "moss_audio",
        "dtype": "float32",
        "adapter_hidden_size": 24,
        "deepstack_num_inject_layers": None,
        "ignore_index": -100,
        "num_hidden_layers": 4,
        "tie_word_embeddings": False,
        "vocab_size": 448,
        "audio_config": {
            "activation_function": "gelu",
            "d_model": 24,
            "output_dim": 16,
            "num_mel_bins": 128,
            "encoder_layers": 5,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 40,
            "downsample_rate": 8,
            "downsample_hidden_size": 8,
            "deepstack_encoder_layer_indexes": [0, 2, 3],
            "encoder_attention_window_size": 100,
            "layer_norm_eps": 1e-5,
            "max_source_positions": 1500,
        },
        "language_config": {
            "model_type": "qwen3",
            "attention_bias": False,
            "hidden_act": "silu",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": 448,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "sliding_window": None,
            "use_sliding_window": False,
        },
    },
    # Tied, encoder output as it is, two of three taps injected, short chunks, and the newer way
    # to write the rotary base.
    "b": {
        "architectures": ["MossAudioModel"],
        "model_type": "moss_audio",
        "dtype": "float32",
        "adapter_hidden_size": 28,
        "deepstack_num_inject_layers": 2,
        "ignore_index": -100,
        "num_hidden_layers": 3,
        "tie_word_embeddings": True,
        "vocab_size": 320,
        "audio_config": {
            "activation_function": "gelu",
            "d_model": 16,
            "output_dim": 16,
            "num_mel_bins": 128,
            "encoder_layers": 4,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 40,
            "downsample_rate": 8,
            "downsample_hidden_size": 6,
            "deepstack_encoder_layer_indexes": [0, 1, 3],
            "encoder_attention_window_size": 12,
            "layer_norm_eps": 1e-5,
            "max_source_positions": 1500,
            "n_window": 20,
        },
        "language_config": {
            "model_type": "qwen3",
            "attention_bias": False,
            "hidden_act": "silu",
            "hidden_size": 36,
            "intermediate_size": 44,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": 320,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
            "sliding_window": None,
            "use_sliding_window": False,
            "tie_word_embeddings": True,
        },
    },
}


def special_ids(config: dict[str, Any]) -> tuple[int, int, int]:
    """Audio placeholder, start and end: the last three of the vocabulary."""
    return config["vocab_size"] - 3, config["vocab_size"] - 2, config["vocab_size"] - 1


def make(folder: Path) -> None:
    """Writes folder/a and folder/b: checkpoints, golden.npz and golden_{layout}.npz."""
    for name, config in CONFIGS.items():
        write_checkpoint(folder / name, config, SEEDS[name])
        golden = chunked_golden(folder / name, CLIPS[name], special_ids(config), SEEDS[name])
        np.savez_compressed(folder / name / "golden.npz", **golden)
        for layout, (attention, causal) in LAYOUTS.items():
            model = Reference.load(folder / name, attention, causal)
            arrays: dict[str, np.ndarray] = {}
            for index in LAYOUT_PROMPTS[name]:
                ids, mels = golden[f"s{index}_ids"], _split(golden, index)
                arrays |= _outputs(model, f"s{index}_", ids, mels)
            np.savez_compressed(folder / name / f"golden_{layout}.npz", **arrays)


def write_checkpoint(folder: Path, config: dict[str, Any], seed: int) -> None:
    """An official checkpoint folder with random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    audio, start, end = special_ids(config)
    processor = {
        "mel_sr": 16000,
        "mel_dim": 128,
        "mel_n_fft": 400,
        "mel_hop_length": 160,
        "mel_dtype": "bfloat16",
        "use_whisper_feature_extractor": True,
        "enable_time_marker": True,
        "audio_token_id": audio,
        "audio_start_id": start,
        "audio_end_id": end,
    }
    generation = {"_from_model_config": True, "transformers_version": "4.57.1"}
    for name, content in (
        ("config.json", config),
        ("processor_config.json", processor),
        ("generation_config.json", generation),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    model = randomize(Reference(config, audio), seed)
    weights = {key: to_numpy(value) for key, value in model.state_dict().items()}
    if "n_window" in config["audio_config"]:  # one of the two carries the buffer that some files do
        half = config["audio_config"]["d_model"] // 2
        weights[TIMESCALES] = (1e4 ** -(np.arange(half) / (half - 1))).astype(np.float32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def chunked_golden(
    folder: Path, prompts: Sequence[Sequence[int]], special: tuple[int, int, int], seed: int
) -> dict[str, np.ndarray]:
    """Inputs and outputs of every prompt, and of one without audio, under the default layout."""
    model = Reference.load(folder)
    vocabulary = model.language_model.vocab_size
    arrays = {"audio_token_id": np.int32(special[0])}
    for index, clips in enumerate([*prompts, []]):
        prefix = f"s{index}_" if clips else "text_"
        for attempt in range(100):
            rng = np.random.default_rng([seed, index, attempt])
            mels = [random_mel(rng, frames) for frames in clips]
            ids = random_prompt(rng, clips, vocabulary, special)
            greedy, margin = model.greedy(ids, mels, GREEDY, forbidden=special)
            if margin >= SMALLEST_MARGIN:
                break
        else:
            raise RuntimeError(
                f"{folder.name}, prompt {index}: no draw has greedy margins that wide"
            )
        if clips:
            arrays[f"{prefix}clips"] = np.array(clips, np.int32)
            arrays[f"{prefix}mel"] = np.concatenate(mels, axis=1)
        arrays[f"{prefix}ids"] = ids
        arrays |= _outputs(model, prefix, ids, mels)
        labels = np.where(ids == special[0], -100, ids)
        arrays[f"{prefix}loss"] = to_numpy(model.loss(ids, labels, mels))
        arrays[f"{prefix}greedy"] = np.array(greedy, np.int32)
    return arrays


def random_mel(rng: np.random.Generator, frames: int) -> np.ndarray:
    """[128, frames] float32 in steps of 1/8 (so that it packs), in a log-mel's range.

    Louder and softer stretches, less energy in the higher bands; at most 2 (eight powers of ten)
    under the maximum, as the floor of real log-mels has it.
    """
    loudness = np.repeat(rng.normal(0, 0.3, frames // 20 + 1), 20)[:frames]
    slope = np.linspace(0.5, -0.5, 128)[:, None]
    mel = slope + loudness + rng.normal(0, 0.3, (128, frames))
    return (np.round(8 * np.maximum(mel, mel.max() - 2)) / 8).astype(np.float32)


def random_prompt(
    rng: np.random.Generator,
    clips: Sequence[int],
    vocabulary: int,
    special: tuple[int, int, int],
) -> np.ndarray:
    """int32 [L]: random text (digits may occur), each clip between its start and end id, text."""
    audio, start, end = special

    def text() -> list[int]:
        return rng.integers(0, vocabulary - 3, rng.integers(5, 10)).tolist()

    ids = text()
    for frames in clips:
        ids.append(start)
        for token in range(1, -(-frames // 8) + 1):
            ids.append(audio)
            if token % 25 == 0:  # two seconds more
                ids += [DIGIT_0 + int(digit) for digit in str(2 * token // 25)]
        ids += [end, *text()]
    return np.array(ids, np.int32)


def logit_rows(length: int) -> np.ndarray:
    """The positions of a prompt whose logits are stored."""
    step = 1 if length <= EVERY_ROW else ROW_STEP
    return np.arange((length - 1) % step, length, step, dtype=np.int32)


def _outputs(
    model: Reference, prefix: str, ids: np.ndarray, mels: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    arrays = {}
    if len(mels):
        features, taps = zip(*model.encode(mels), strict=True)
        arrays[f"{prefix}encoder"] = np.concatenate([to_numpy(clip) for clip in features])
        for k, tap in enumerate(np.concatenate([to_numpy(clip) for clip in taps], axis=1)):
            arrays[f"{prefix}deepstack{k}"] = tap
    rows = logit_rows(len(ids))
    arrays[f"{prefix}rows"] = rows
    arrays[f"{prefix}logits"] = to_numpy(model.logits(ids, mels))[rows]
    return arrays


def _split(golden: dict[str, np.ndarray], index: int) -> list[np.ndarray]:
    ends = np.cumsum(golden[f"s{index}_clips"])
    return np.split(golden[f"s{index}_mel"], ends[:-1], axis=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=TINY, help="folder to write (tiny/)")
    make(parser.parse_args().output)
