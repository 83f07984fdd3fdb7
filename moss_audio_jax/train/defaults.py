"""Every key of a run, with its default. Recipes start from here and change a few.

    moss-audio-jax train --config configs/sft.py --workdir DIR --config.init_from=CHECKPOINT \
        --config.data.train="('rows.jsonl',)"

A config file is a Python file with `get_config()`; any key may be overridden on the command line.
`LIMITS`, below the keys, says which values each may have. The keys of `data` become a
`LoaderConfig`, which knows its own limits.
"""

import dataclasses

from ml_collections import ConfigDict

from moss_audio_jax.config import RELEASED, ModelConfig
from moss_audio_jax.data.augment import Augment
from moss_audio_jax.models.blocks import REMAT
from moss_audio_jax.ops.attention import IMPLEMENTATIONS
from moss_audio_jax.train.helpers import LOSSES
from moss_audio_jax.train.optimizer import OPTIMIZERS, SCHEDULES


def get_config(size: str = "4b") -> ConfigDict:
    if size not in ("", *RELEASED):
        raise ValueError(
            f"size is {size!r}; expected {', '.join(RELEASED)}, or what the config adds"
        )
    c = ConfigDict()

    # What to start from: a checkpoint folder (official or native); "" for a fresh model of
    # `model`'s sizes; or parts of one: "decoder=QWEN3_DIR", "encoder=DIR", both with a comma.
    c.init_from = ""
    # Folder of the tokenizer; "" = that of init_from (or of its decoder).
    c.tokenizer = ""
    # Sizes of a fresh model; a whole checkpoint brings its own, but `inject_gate` adds gates to it.
    c.model = sizes(RELEASED[size or "4b"])
    c.encoder_attention = ""  # chunked | full | sliding; "" = the model's own

    c.data = data = ConfigDict()
    data.train = ()  # paths of JSONL or ArrayRecord
    data.mixture = ConfigDict()  # or, if train is empty, named parts: see docs/data.md
    data.eval = ()  # paths, for the held-out loss
    data.length = 8192  # tokens of a row
    data.chunks = -1  # strips of sound in a row; -1 = as many as fit its tokens; 0 = text only
    data.frames = 0  # mel frames in a strip, for full and sliding attention; 0 = 4 s
    data.batch = 256  # rows of a step, over all devices
    data.packing = True  # several examples share a row
    # Examples that share a row at most; 0 = any number. A limit lets cuDNN skip what lies between
    # them (docs/scaling.md); its memory grows with the limit.
    data.row_examples = 0
    data.streams = 0  # independent orders; 0 = chosen; divides the batch
    data.window = 64  # examples that are packed with one another
    data.workers = 0  # decoding processes; 0 = in this one
    # Steps that see a row, on average; above 1 for hosts slower than the device (train/echo.py).
    data.echo = 1
    data.echo_rows = 1024  # newest rows, kept on the device, that repeats are drawn from
    data.time_markers = True
    data.max_bad_share = 0.05  # more unusable rows than this stop the run
    data.row_seconds = 60.0  # a row that takes longer to read is unusable
    # Speed, warp, SpecAugment; default none. With `echo`, each repeat of a row gets new masks.
    data.augment = ConfigDict(dataclasses.asdict(Augment()))
    data.tasks = ()  # names of tasks whose losses are reported separately
    data.branches = 1  # how many of a row's branches share its clip at a visit; 0: none
    # For branches: (task regex, relative frequency[, weight in the loss]); the first match wins.
    data.pick = ((".*", 1.0),)
    data.log_rows = False  # write which rows each step saw to rows-PROCESS.jsonl

    c.train = train = ConfigDict()
    train.steps = 1000
    train.seed = 0
    train.log_every = 10
    train.accumulate = 1  # micro-batches a step
    train.clip_norm = 1.0
    train.z_loss = 0.0
    train.decoder_loss = 1.0  # weight of the answers' loss; 0: only the helpers train the encoder
    train.ema = 0.0  # decay of an average of the weights; 0 = none
    train.dtype = "bfloat16"  # of compute; master weights are float32
    train.remat = "full"  # none | full | attention | projections | offload
    train.attention = "auto"  # auto | xla | splash (TPU) | cudnn (NVIDIA GPU); see ops/attention.py
    train.encoder_chunks = 128  # at a time on a device; gradients are summed over devices each time
    train.loss_chunk = 1024  # labelled positions at a time that the output head scores, on a device
    train.max_skipped = 10  # non-finite updates in a row that stop the run
    # A module that makes the batches, instead of the rows alone; `policy` has its keys. See
    # train/source.py; "moss_audio_jax.post_train.run" learns from rewards.
    train.source = ""
    train.profile = (0, 0)  # (first step, how many) to trace for the profiler

    c.policy = ConfigDict()  # keys of train.source

    # Weights of losses that teach the encoder from scratch what is said and heard when, for rows
    # with "words" and "tags"; 0 = none. train/helpers.py describes them. An export writes their
    # layers apart from the model. `times`, of timestamps in answers, needs nothing of the rows.
    c.helpers = helpers = ConfigDict(dict.fromkeys(LOSSES, 0.0))
    helpers.words = 32  # most pieces said in one chunk
    helpers.names = ()  # of the tags

    c.optimizer = optimizer = ConfigDict()
    optimizer.name = "adamw"  # adamw | adafactor | muon (matrices; the rest by adamw)
    optimizer.learning_rate = 1e-5
    optimizer.schedule = "cosine"  # cosine | wsd | linear | constant
    optimizer.warmup = 100  # steps
    optimizer.final = 0.1  # of the peak, at the end
    optimizer.decay = 0.2  # wsd: share of the steps that fall
    optimizer.b1 = 0.9
    optimizer.b2 = 0.95
    optimizer.eps = 1e-8
    optimizer.weight_decay = 0.1
    optimizer.moment_dtype = "float32"  # of the first moment; bfloat16 saves memory
    # (path regex, learning-rate factor); the first match wins, 0 freezes.
    optimizer.groups = ((".*", 1.0),)
    # A further factor for each layer of the decoder; () = 1 for all. If only the last layers (and
    # what follows them) are trained, nothing is computed backwards for those before.
    optimizer.layers = ()

    c.lora = lora = ConfigDict()
    lora.rank = 0  # 0 = no LoRA
    lora.alpha = 2.0
    lora.targets = "language_model/layers/(self_attn|mlp)/(q|k|v|o|gate|up|down)_proj"

    c.mesh = mesh = ConfigDict()
    mesh.data = 1
    mesh.fsdp = -1  # the rest
    mesh.tensor = 1
    mesh.sequence = 1

    c.checkpoint = checkpoint = ConfigDict()
    checkpoint.every = 500  # steps
    # Also after this many minutes, checked every train.log_every steps; 0 = never.
    checkpoint.minutes = 0.0
    checkpoint.keep_last = 2
    checkpoint.keep_every = 0  # also keep every n-th step for good
    checkpoint.keep_best = 0  # also keep the n best by held-out loss
    checkpoint.export = "official"  # official | native | none: what the last step writes

    # Faster saves in between, to each host's own disk (train/local_checkpoints.py).
    checkpoint.local = local = ConfigDict()
    local.folder = ""  # the same path on every host; "" = none
    local.every = 50  # steps

    c.eval = evaluation = ConfigDict()
    evaluation.every = 0  # 0 = never
    evaluation.samples = 0  # answers to generate and print
    evaluation.max_new_tokens = 128
    return c


# What a key's value may be: one of several, or a number of at least so much. check.py has the rules
# for keys that depend on one another.
LIMITS: dict[str, int | tuple[str, ...]] = {
    "encoder_attention": ("", "chunked", "full", "sliding"),
    "data.echo": 1,
    "train.steps": 1,
    "train.log_every": 1,
    "train.accumulate": 1,
    "train.clip_norm": 0,
    "train.z_loss": 0,
    "train.decoder_loss": 0,
    "train.ema": 0,
    "train.dtype": ("bfloat16", "float32"),
    "train.remat": REMAT,
    "train.attention": IMPLEMENTATIONS,
    "train.encoder_chunks": 1,
    "train.loss_chunk": 1,
    "train.max_skipped": 1,
    **dict.fromkeys((f"helpers.{name}" for name in LOSSES), 0),
    "helpers.words": 1,
    "optimizer.name": tuple(OPTIMIZERS),
    "optimizer.learning_rate": 0,
    "optimizer.schedule": tuple(SCHEDULES),
    "optimizer.warmup": 0,
    "optimizer.weight_decay": 0,
    "optimizer.eps": 0,
    "optimizer.moment_dtype": ("bfloat16", "float32"),
    "lora.rank": 0,
    "checkpoint.every": 1,
    "checkpoint.minutes": 0,
    "checkpoint.local.every": 1,
    "checkpoint.keep_last": 1,
    "checkpoint.keep_every": 0,
    "checkpoint.keep_best": 0,
    "checkpoint.export": ("official", "native", "none"),
    "eval.every": 0,
    "eval.samples": 0,
}


def sizes(model: ModelConfig) -> ConfigDict:
    """A model's sizes as keys that can be overridden one by one."""
    return ConfigDict(dataclasses.asdict(model))
