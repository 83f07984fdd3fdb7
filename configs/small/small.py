"""Shared by the stages of the small model: its sizes, its data, and the settings of each machine.

This is not a run: `tools/small/train.py` runs them, from encoder to tell. The argument of each
config is the machine: `encoder.py` is for two CPU cores, `encoder.py:gpu` for one GPU with a dozen
CPU cores.
"""

from moss_audio_jax.config import DecoderConfig, EncoderConfig, ModelConfig
from moss_audio_jax.train import defaults
from moss_audio_jax.world import TAGS

# By task: how often a scene's branches (questions about one clip) are drawn, and the weight of
# their tokens if it is not 1, because one word teaches little beside forty words with times.
READING = (
    ("^asr$", 6.0), ("asr_words", 1.0), ("events", 1.0), ("caption", 0.5), ("reason", 0.0),
    (".*", 0.05),
)  # fmt: skip
PRETRAIN = (
    ("^asr$", 4.0), ("asr_words", 2.0), ("events", 2.0), ("caption", 0.7), ("reason", 0.0),
    (".*", 0.2),
)  # fmt: skip
SFT = (
    ("^asr$", 4.0, 2.0), ("asr_words", 6.0), ("asr", 1.0), ("events", 6.0), ("when", 3.0, 3.0),
    ("tempo", 4.0, 4.0), ("choice", 2.0, 5.0), ("count$", 2.0, 4.0), ("reason", 0.0),
    ("caption", 0.5), (".*", 0.5, 3.0),
)  # fmt: skip
REASONING = (("reason", 4.0), *(rule for rule in SFT if rule[0] != "reason"))
REASONED = (
    ("reason", 14.0), ("^asr$", 4.0, 2.0), ("asr_words", 6.0), ("asr", 1.0), ("events", 6.0),
    ("when", 5.0, 3.0), ("word_what", 4.0, 3.0), ("tempo", 4.0, 4.0), ("choice", 3.0, 5.0),
    ("count", 4.0, 4.0), ("caption", 0.5), (".*", 0.5, 3.0),
)  # fmt: skip
TELLING = (
    ("reason", 10.0), ("^asr$", 6.0, 2.0), ("asr_words", 5.0), ("asr", 1.0), ("events", 6.0),
    ("when", 5.0, 3.0), ("tempo", 4.0, 4.0), ("choice", 3.0, 5.0), ("count", 4.0, 4.0),
    ("instrument", 2.0, 3.0), ("any_", 1.0, 3.0), ("caption", 0.5), (".*", 0.5, 3.0),
)  # fmt: skip

REWARDED = (
    ("reason", 6.0), ("when", 3.0), ("tempo", 3.0), ("choice", 3.0), ("count", 2.0),
    ("^asr$", 1.5), ("asr_words", 0.5), ("asr_sentences", 0.3), ("events", 1.0), ("caption", 0.0),
    (".*", 0.5),
)  # fmt: skip

# On a GPU, with 16 rows per step: (steps, warmup) of each stage, as for the bundled model, except
# that its last two stages ran on CPUs. read, hear and tell did not make that model.
GPU = {
    "encoder": (2500, 133),
    "read": (600, 20),
    "adapter": (500, 60),
    "pretrain": (1800, 140),
    "sft": (2000, 133),
    "cold_start": (1000, 33),
    "reason": (1000, 33),
    "hear": (2500, 133),
    "tell": (2500, 100),
    "dapo": (1000, 10),
}

EXTENDED = 3584  # pieces after `tools/small/extend.py`


def get_config():
    c = defaults.get_config()
    c.model = defaults.sizes(
        ModelConfig(
            EncoderConfig(d_model=224, layers=6, heads=4, ffn_dim=896, conv_channels=24,
                          output_dim=224, tap_layers=(1, 2, 4)),
            DecoderConfig(hidden_size=256, ffn_dim=512, layers=4, heads=4, kv_heads=2, head_dim=64,
                          vocab_size=2560, max_positions=4096, rope_theta=10_000.0,
                          tie_embeddings=True),
            adapter_dim=192,
            inject_layers=3,
        )
    )  # fmt: skip
    c.data.train = ("scenes/train-*.array_record",)
    c.data.window = 32
    c.train.dtype = "float32"
    c.train.remat = "none"
    c.train.log_every = 20
    c.optimizer.name = "muon"
    c.optimizer.b2 = 0.98
    c.optimizer.weight_decay = 0.01
    c.helpers.names = TAGS
    c.checkpoint.every = 200
    c.checkpoint.keep_last = 2
    return c


def on(machine, stage, c):
    """The stage's config for a machine; the learning rate stays."""
    if machine == "gpu":
        c.train.steps, c.optimizer.warmup = GPU[stage]
        c.data.batch = 16
        c.data.workers = 12
        c.train.dtype = "bfloat16"
        c.train.log_every = 100
        c.checkpoint.every = c.train.steps
        c.checkpoint.minutes = 5.0
    elif machine != "cpu":
        raise ValueError(f"machine is {machine!r}; expected cpu or gpu")
    return c


def answers(c):
    """Sets rows of one or two clips, each with several questions."""
    c.data.length = 768
    c.data.chunks = 4
    c.data.batch = 4
    c.data.branches = 8
    c.data.augment.warp = 0.1
    c.data.tasks = ("asr", "asr_words", "asr_sentences", "events", "caption", "time_what",
                    "time_when", "count", "choice_letter", "tempo")  # fmt: skip


def joined(weights, folder):
    """Parts of a mixture: the sets {name: weight} of scenes joined end to end in a folder."""
    return {
        f"{folder}_{name}": {"weight": weight, "paths": (f"{folder}/{name}-*.array_record",)}
        for name, weight in weights.items()
    }


def listen(c):
    """Keeps the helper losses, with small weights, so that the encoder keeps words and times."""
    c.helpers.ctc = 0.05
    c.helpers.frames = 0.5
    c.helpers.tags = 0.2
    c.helpers.position = 0.05
    c.helpers.adapter = 0.2
    c.helpers.clock = 0.1
    c.helpers.adapter_tags = 0.1
    c.helpers.adapter_before = 0.2


def asked(c):
    """Sets scenes and joined rows with all their questions, ten each time a row is drawn.

    Questions about scenes in writing keep what the decoder can do with text.
    """
    c.data.train = ()
    c.data.mixture.scenes = {"weight": 0.5, "paths": ("scenes/train-*.array_record",)}
    c.data.mixture.timed = {"weight": 0.3, "paths": ("joined/timed-*.array_record",)}
    c.data.mixture.sounds = {"weight": 0.2, "paths": ("joined/sounds-*.array_record",)}
    c.data.mixture.written = {"weight": 0.4, "paths": ("written/scenes-*.array_record",)}
    c.data.length = 1664
    c.data.batch = 2
    c.data.branches = 10
    c.data.chunks = 10
