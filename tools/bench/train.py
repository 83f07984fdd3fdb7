"""Tokens a second of training, ours beside the official PyTorch code, in turns on the same rows.

    OMP_NUM_THREADS=1 taskset -c 0 python tools/bench/train.py [--official DIR] [--rounds 5]

A model of about 50 million parameters, float32, AdamW, gradients clipped to norm 1, no dropout.
Rows are fine-tuning JSONL with noise clips of 3 to 12 s. Ours trains on packed rows, as the data
pipeline lays them out. The official code (DIR: a clone of its repository, whose dataset and model
are imported) trains on the same rows with the same token ids, one a step: padded to --max-len as
its trainer ships ("official_padded", every fourth row), and without any padding
("official_unpadded", all rows). Batches are prepared beforehand on both sides; nothing but steps
is timed, by the processor time of all threads, so that other work on the machine matters little.
On several cores a thread that spins while it waits is counted too; so bind the process to one core
as above. --clock wall takes the wall clock instead; it needs an idle machine.

Prints one JSON line for each layout of the encoder's attention. tokens_per_second counts real
tokens, never padding: the median over rounds, and the slowest and fastest round. ratio is the
median over rounds of ours / theirs of that round. loss is that of the first batch's rows before any
step, the same to rounding on both sides in the layout that DIR computes ("full" in the public code,
"chunked" in newer code).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import soundfile
from tokenizers import ByteLevelBPETokenizer

from moss_audio_jax import command
from moss_audio_jax.config import (
    Compute,
    DecoderConfig,
    EncoderConfig,
    ModelConfig,
    ProcessorConfig,
)
from moss_audio_jax.data.batch import IGNORE
from moss_audio_jax.data.loader_config import LoaderConfig
from moss_audio_jax.data.mixture import Mixture
from moss_audio_jax.data.pipeline import HostBatch, Loader
from moss_audio_jax.models.moss_audio import count_params
from moss_audio_jax.text import load_tokenizer
from moss_audio_jax.text.tokenizer import Tokenizer
from moss_audio_jax.train import defaults
from moss_audio_jax.train.optimizer import make_optimizer, schedule
from moss_audio_jax.train.step import Recipe, eval_step, init_state, make_train_step
from moss_audio_jax.tree import flatten
from moss_audio_jax.weights.convert import load_params, save_official

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools.make.toy import random_params

MODEL = ModelConfig(
    EncoderConfig(
        d_model=384,
        layers=6,
        heads=6,
        ffn_dim=1536,
        conv_channels=64,
        output_dim=384,
        tap_layers=(1, 2, 4),
    ),
    DecoderConfig(
        hidden_size=512,
        layers=8,
        heads=8,
        kv_heads=4,
        head_dim=64,
        ffn_dim=1536,
        vocab_size=8192,
        max_positions=4096,
    ),
    adapter_dim=1024,
)
SECONDS = (3.0, 12.0)
# Strips of sound in a row, and their mel frames: about as much sound as fills a row's tokens.
STRIPS = {"chunked": (8, 400), "full": (1, 3072)}
PROMPT = "Transcribe the audio."
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
AUDIO_IDS = (8189, 8190, 8191)  # placeholder, start, end


# --- rows, tokenizer and weights, as both sides read them ---------------------------------------


def write_inputs(folder: Path, rows: int) -> None:
    """rows.jsonl with its clips, and a checkpoint in the official layout with a tokenizer."""
    rng = np.random.default_rng(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er")]
    words = ["".join(rng.choice(syllables, rng.integers(1, 4))) for _ in range(2000)]
    lines, answers = [], []
    for i in range(rows):
        seconds = rng.uniform(*SECONDS)
        clip = folder / f"{i}.wav"
        soundfile.write(clip, 0.1 * rng.standard_normal(int(16_000 * seconds)), 16_000)
        answers.append(" ".join(rng.choice(words, int(2.5 * seconds))))  # a speaker's pace
        turns = (
            ("user", "audio", str(clip)),
            ("user", "text", PROMPT),
            ("assistant", "text", answers[-1]),
        )
        keys = ("role", "message_type", "content")
        lines.append({"conversation": [dict(zip(keys, turn, strict=True)) for turn in turns]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    bpe = ByteLevelBPETokenizer()
    frame = f"system\nYou are a helpful assistant.\nuser\n{PROMPT}\nassistant\n"
    bpe.train_from_iterator(
        [frame] * 10 + [" ".join(words)] * 2 + answers, vocab_size=8000, show_progress=False
    )
    files = folder / "tokenizer"
    files.mkdir()
    bpe.save_model(str(files))
    added = {
        str(8000 + i): {
            "content": piece,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for i, piece in enumerate(SPECIAL)
    }
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": added,
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[0],
    }
    (files / "tokenizer_config.json").write_text(json.dumps(config))

    # The official fine-tuning script knows no time markers.
    processor = ProcessorConfig(*AUDIO_IDS, time_markers=False)
    checkpoint = folder / "checkpoint"
    save_official(
        checkpoint, random_params(MODEL, 0, "float32"), MODEL, files_from=files, processor=processor
    )
    raw = json.loads((checkpoint / "config.json").read_text())
    raw["audio_config"] |= {"dropout": 0.0, "attention_dropout": 0.0}
    (checkpoint / "config.json").write_text(json.dumps(raw))


def packed_batches(folder: Path, args: argparse.Namespace, model: ModelConfig) -> list[HostBatch]:
    """The first batches of the pipeline: every round has its own, and the warm-up."""
    config = LoaderConfig(
        batch=args.batch,
        length=args.length,
        chunks=args.chunks or STRIPS[model.encoder.attention][0],
        streams=1,
        time_markers=False,  # see write_inputs
        frames=STRIPS[model.encoder.attention][1],
    )
    tokenizer = load_tokenizer(folder / "checkpoint")
    with Loader(Mixture(str(folder / "rows.jsonl")), tokenizer, model.encoder, config) as loader:
        return [next(loader) for _ in range(1 + args.rounds * args.steps)]


# --- ours -----------------------------------------------------------------------------------------


class Ours:
    def __init__(self, folder: Path, args: argparse.Namespace, model: ModelConfig, batch: dict):
        config = defaults.get_config().optimizer
        config.weight_decay = 0.0
        params = flatten(load_params(folder / "checkpoint", model, "float32"))
        recipe = Recipe(model, Compute(dtype="float32", remat=args.remat))
        optimizer = make_optimizer(config, 1000, dict.fromkeys(params, 1.0))
        self._state = jax.jit(lambda p: init_state(p, set(p), optimizer, recipe))(params)
        step = jax.jit(make_train_step(recipe, optimizer, schedule(config, 1000)), donate_argnums=0)
        self.parameters = count_params(params)
        sums = jax.jit(lambda p, b: eval_step(p, {}, b, recipe))(params, batch)
        self.loss = float(sums["loss"] / sums["weight"])
        start = time.perf_counter()
        self._step = step.lower(self._state, batch).compile()
        self.compile_seconds = time.perf_counter() - start

    def step(self, batch: dict) -> None:
        self._state, metrics = self._step(self._state, batch)
        jax.block_until_ready(metrics)


# --- theirs ---------------------------------------------------------------------------------------


class Official:
    """The official model and dataset under a plain training loop (its Trainer's own defaults)."""

    def __init__(self, source: Path, folder: Path, max_len: int):
        import torch

        for file in ("finetune/finetune.py", "src/modeling_moss_audio.py"):
            if not (source / file).is_file():
                raise SystemExit(
                    f"bench/train: {source / file} is missing; --official is a clone "
                    "of github.com/OpenMOSS/MOSS-Audio"
                )
        sys.path.insert(0, str(source))
        spec = importlib.util.spec_from_file_location("official", source / "finetune/finetune.py")
        self._code = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self._code)
        tokenizer = load_tokenizer(folder / "checkpoint")
        self._use_ids_of(tokenizer)
        rows = [json.loads(line) for line in (folder / "rows.jsonl").open()]
        self._dataset = self._code.MossAudioDataset(rows, _Encode(tokenizer), max_len)

        torch.manual_seed(0)
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        config = self._code.MossAudioConfig.from_pretrained(folder / "checkpoint")
        for part in (config, config.language_config):
            part._attn_implementation = "sdpa"
        self._model = self._code.MossAudioModel.from_pretrained(
            folder / "checkpoint", config=config, dtype=torch.float32
        )
        self._model.train()
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), lr=1e-7, weight_decay=0.0, fused=True
        )
        self._torch = torch

    def _use_ids_of(self, tokenizer: Tokenizer) -> None:
        """The script's token ids are constants of the Qwen vocabulary; ours is smaller."""
        start, end, nl = "<|im_start|>", "<|im_end|>", "\n"
        audio, audio_start, audio_end = AUDIO_IDS

        def ids(text: str) -> list[int]:
            return tokenizer.encode(text, special=True)

        constants = {
            "AUDIO_TOKEN_ID": audio,
            "AUDIO_START_ID": audio_start,
            "AUDIO_END_ID": audio_end,
            "IM_START_ID": ids(start)[0],
            "IM_END_ID": ids(end)[0],
            "SYSTEM_IDS": ids(f"{start}system\nYou are a helpful assistant.{end}\n"),
            "USER_AUDIO_START_IDS": [*ids(f"{start}user\n"), audio_start],
            "AUDIO_END_NL_IDS": [audio_end, *ids(nl)],
            "TURN_BOUNDARY_IDS": ids(f"{end}\n{start}assistant\n"),
        }
        for name, value in constants.items():
            if not hasattr(self._code, name):
                raise SystemExit(f"bench/train: finetune.py has no {name}: another version?")
            setattr(self._code, name, value)

    def inputs(self, row: int, padded: bool) -> tuple[dict[str, Any], int]:
        """One row as a batch, and its number of real tokens."""
        item = self._dataset[row]
        count = int(item["attention_mask"].sum())
        if not padded:
            item = {k: v if k.startswith("audio_data") else v[:count] for k, v in item.items()}
            del item["attention_mask"]
        item["audio_data"] = item["audio_data"].float()
        return {key: value[None] for key, value in item.items()}, count

    def loss_sum(self, inputs: dict[str, Any]) -> tuple[float, int]:
        """Summed loss of a row and its number of labels, without a step."""
        with self._torch.no_grad():
            labels = int((inputs["labels"] != IGNORE).sum())
            return float(self._model(**inputs).loss) * labels, labels

    def step(self, inputs: dict[str, Any]) -> None:
        self._model(**inputs).loss.backward()
        self._torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()


class _Encode:
    """What the official dataset asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.pad_token_id = tokenizer.encode(SPECIAL[0], special=True)[0]

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._tokenizer.encode(text)


def check_same_rows(official: Official, batch: HostBatch) -> list[int]:
    """The rows' numbers; exits unless both sides see the same ids."""
    numbers = []
    for row, names in enumerate(batch.row_ids):
        for segment, name in enumerate(names, 1):
            numbers.append(int(name.rpartition(":")[2]))
            ours = batch.arrays["tokens"][row][batch.arrays["segment_ids"][row] == segment]
            theirs = official.inputs(numbers[-1], padded=False)[0]["input_ids"][0].numpy()
            if not np.array_equal(ours, theirs):
                raise SystemExit(f"bench/train: row {name}: the token ids differ from DIR's")
    return numbers


# --- measuring ------------------------------------------------------------------------------------


CLOCKS = {"processor": time.process_time, "wall": time.perf_counter}


def seconds(clock: Callable[[], float], step: Callable[[Any], None], inputs: list) -> float:
    start = clock()
    for each in inputs:
        step(each)
    return clock() - start


def summary(speeds: list[float]) -> dict[str, Any]:
    return {
        "tokens_per_second": round(statistics.median(speeds), 1),
        "range": [round(min(speeds), 1), round(max(speeds), 1)],
    }


def measure(folder: Path, args: argparse.Namespace, layout: str) -> dict[str, Any]:
    model, clock = MODEL.with_attention(layout), CLOCKS[args.clock]
    # Rows of 75 tokens at the least, so that none comes twice.
    count = args.batch * args.length * (2 + args.rounds * args.steps) // 75
    write_inputs(folder, count)
    batches = packed_batches(folder, args, model)
    ours = Ours(folder, args, model, batches[0].arrays)
    official = Official(Path(args.official), folder, args.max_len) if args.official else None

    ours.step(batches[0].arrays)
    losses = {"ours": round(ours.loss, 5)}
    if official:
        rows = [official.inputs(n, False)[0] for n in check_same_rows(official, batches[0])]
        sums = [official.loss_sum(row) for row in rows]
        losses["official"] = round(sum(s for s, _ in sums) / sum(n for _, n in sums), 5)
        official.step(rows[0])

    speeds: dict[str, list[float]] = {"ours": []}
    if official:
        speeds |= {"official_padded": [], "official_unpadded": []}
    for number in range(args.rounds):
        here = batches[1 + number * args.steps :][: args.steps]
        tokens = sum(batch.stats["tokens"] for batch in here)
        spent = seconds(clock, ours.step, [batch.arrays for batch in here])
        speeds["ours"].append(tokens / spent)
        if not official:
            continue
        rows = [n for batch in here for n in check_same_rows(official, batch)]
        for mode, chosen in (("official_padded", rows[::4]), ("official_unpadded", rows)):
            pairs = [official.inputs(n, mode == "official_padded") for n in chosen]
            spent = seconds(clock, official.step, [inputs for inputs, _ in pairs])
            speeds[mode].append(sum(n for _, n in pairs) / spent)

    timed = batches[1:]
    sound_room = sum(b.arrays["mels"][..., 0].size for b in timed) / 100  # seconds
    result = {mode: summary(found) for mode, found in speeds.items()}
    result["ours"] |= {
        "compile_seconds": round(ours.compile_seconds, 1),
        "shape": list(batches[0].arrays["mels"].shape[:3]),
        "sound": round(sum(b.stats["audio_seconds"] for b in timed) / sound_room, 3),
        "fill": round(
            sum(b.stats["tokens"] for b in timed) / sum(b.stats["room"] for b in timed), 3
        ),
        "remat": args.remat,
    }
    for mode in set(result) - {"ours"}:
        pairs = zip(speeds["ours"], speeds[mode], strict=True)
        result[mode]["ratio"] = round(statistics.median(a / b for a, b in pairs), 2)
    rows = sum(b.stats["examples"] for b in timed)
    return {
        "parameters": ours.parameters,
        "clock": args.clock,
        "cores": len(os.sched_getaffinity(0)),
        "rows": rows,
        "tokens_a_row": round(sum(b.stats["tokens"] for b in timed) / rows, 1),
        "encoder_attention": layout,
        "max_len": args.max_len,
        "loss": losses,
        **result,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--official", metavar="DIR", help="clone of the official repository")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="of ours in a round")
    parser.add_argument("--batch", type=int, default=4, help="packed rows of a step of ours")
    parser.add_argument("--length", type=int, default=512, help="tokens of a packed row")
    parser.add_argument(
        "--chunks", type=int, help="strips of sound in a packed row, instead of as many as fill it"
    )
    parser.add_argument("--remat", default="none")
    parser.add_argument("--max-len", type=int, default=1024, help="the official padding")
    parser.add_argument("--encoder-attention", choices=STRIPS, help="one layout instead of both")
    parser.add_argument("--clock", choices=CLOCKS, default="processor")
    args = parser.parse_args()
    command.keep_memory()  # as the verb does; both sides gain
    for layout in [args.encoder_attention] if args.encoder_attention else STRIPS:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(Path(folder), args, layout)), flush=True)


if __name__ == "__main__":
    main()
