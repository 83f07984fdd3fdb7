"""Configs load and say how to run them; impossible values are refused before anything compiles."""

import ast
import shlex
import sys
from pathlib import Path

import jax
import pytest

from moss_audio_jax import config_file
from moss_audio_jax.errors import InputError, UsageError
from moss_audio_jax.plan import compile as plan_compile
from moss_audio_jax.plan.estimate import layer_inputs
from moss_audio_jax.train import loop
from moss_audio_jax.train.__main__ import load_config
from moss_audio_jax.train.check import check_keys
from moss_audio_jax.train.setup import loader_config_of, recipe_of
from moss_audio_jax.train.start import Start, sizes_of

CONFIGS = Path(__file__).parents[2] / "configs"
OTHERS = {"small/small.py", "annotate.py"}  # what recipes share; another verb's
FILES = sorted({str(file.relative_to(CONFIGS)) for file in CONFIGS.rglob("*.py")} - OTHERS)
# File -> the argument that its docstring speaks of, and a key that it changes.
ARGUMENTS = {
    "common.py": ("8b", "model.decoder.hidden_size"),
    "cold_start.py": ("8b", "model.decoder.hidden_size"),
    "dapo.py": ("8b", "model.decoder.hidden_size"),
    "lora.py": ("encoder", "lora.targets"),
    "pretrain_adapter.py": ("8b", "model.decoder.hidden_size"),
    "pretrain_full.py": ("8b", "model.decoder.hidden_size"),
    "sft.py": ("8b", "model.decoder.hidden_size"),
    "sft_one_gpu.py": ("80g,8b", "model.decoder.hidden_size"),
    **{
        f"small/{stage}.py": ("gpu", "data.batch")
        for stage in ("encoder", "adapter", "pretrain", "sft", "cold_start")
    },
}
KEYS = (
    "train.steps",
    "train.log_every",
    "train.seed",
    "checkpoint.every",
    "data.train",
    "mesh",
    "init_from",
)


def load(name: str, *overrides: str):
    return load_config(str(CONFIGS / name), overrides)


def at(config, key: str):
    for name in key.split("."):
        config = config[name]
    return config


@pytest.fixture
def nothing_compiles(monkeypatch):
    """Fails if a run reaches the weights, because then it was not refused in time."""

    def reached(*_):
        raise AssertionError("the run went on to its weights")

    monkeypatch.setattr(loop, "initial_params", reached)


# --- every file of configs/ -----------------------------------------------------------------------


def test_no_file_of_configs_is_missed():
    assert {
        "common.py",
        "tiny.py",
        "moss_audio_4b.py",
        "moss_audio_8b.py",
        "pretrain_encoder.py",
        "pretrain_adapter.py",
        "pretrain_full.py",
        "sft.py",
        "sft_one_gpu.py",
        "lora.py",
        "cold_start.py",
        *(f"small/{stage}.py" for stage in ("encoder", "adapter", "pretrain", "sft", "cold_start")),
    } <= set(FILES)
    assert set(ARGUMENTS) <= set(FILES)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_number_that_is_none_is_named(value):
    config = load("sft.py")
    config.optimizer.learning_rate = float(value)
    with pytest.raises(UsageError, match=f"learning_rate is {value}; expected a finite number"):
        check_keys(config)


@pytest.mark.parametrize("name", FILES)
def test_a_config_loads_with_all_keys_and_a_model_that_can_be(name):
    for argument in ("", *ARGUMENTS.get(name, ())[:1]):
        config = load(f"{name}:{argument}" if argument else name)
        check_keys(config)
        for key in KEYS:
            at(config, key)
        assert sizes_of(config.model).decoder.layers == config.model.decoder.layers
    if name in ARGUMENTS:
        argument, key = ARGUMENTS[name]
        assert at(load(f"{name}:{argument}"), key) != at(load(name), key)


@pytest.mark.parametrize("name", FILES)
def test_the_docstring_holds_a_command_that_runs(name):
    """Its --config is this file, and its overrides are keys of it with values of their types."""
    text = (CONFIGS / name).read_text()
    doc = ast.get_docstring(ast.parse(text), clean=False)
    commands = [
        line.strip()
        for line in doc.replace("\\\n", " ").splitlines()
        if line.strip().startswith("moss-audio-jax train")
    ]
    assert len(commands) == 1
    words = shlex.split(commands[0])
    assert words[:3] == ["moss-audio-jax", "train", "--config"]
    config, _, argument = words[3].partition(":")
    assert config == f"configs/{name}"
    assert argument in ("", *ARGUMENTS.get(name, ()))
    assert words[4:6] == ["--workdir", "DIR"]
    run = load(words[3].removeprefix("configs/"), *words[6:])
    assert run.data.train or run.data.mixture
    assert run.init_from or run.tokenizer  # else there is no tokenizer


@pytest.mark.parametrize("name", FILES)
def test_overrides_work_on_every_config(name):
    config = load(
        name,
        "--config.data.train=('rows.jsonl',)",
        "--config.train.steps=5",
        "--config.init_from=DIR",
        "--config.optimizer.learning_rate=1e-4",
        "--config.mesh.fsdp=4",
        "--config.data.packing=false",
        "--config.optimizer.groups=(('^lm_head/',2.0),('.*',0.5))",
    )
    assert config.data.train == ("rows.jsonl",)
    assert (config.train.steps, config.init_from, config.mesh.fsdp) == (5, "DIR", 4)
    assert config.optimizer.learning_rate == 1e-4
    assert config.data.packing is False
    assert config.optimizer.groups == (("^lm_head/", 2.0), (".*", 0.5))
    assert not config.data.mixture  # a recipe's own data is replaced, not mixed in


# --- by name, wherever one is --------------------------------------------------------------------


def test_packaged_configs_are_known_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("sft", "sft.py", "configs/sft.py", "configs/sft"):
        assert config_file.find(name) == config_file.FOLDER / "sft.py"
    assert config_file.find("small/sft") == config_file.FOLDER / "small" / "sft.py"
    assert load_config("sft:8b").model.decoder.hidden_size == 4096
    assert load_config("small/sft:gpu").optimizer.name == "muon"
    listed = {f"{name}.py" for name in config_file.names()}
    assert listed == set(FILES) | OTHERS - {"small/small.py"}


def test_a_file_comes_before_a_packaged_config_and_may_start_from_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sft.py").write_text(
        "import lora\n\ndef get_config(rank='2'):\n    c = lora.get_config()\n"
        "    c.lora.rank = int(rank)\n    return c\n"
    )
    (tmp_path / "work").mkdir()
    path = list(sys.path)
    assert load_config("sft.py:5").lora.rank == 5
    assert load_config("sft").lora.rank == 0  # the packaged one: a name is no file of this folder
    assert load_config(str(tmp_path / "sft.py")).lora.rank == 2
    assert sys.path == path
    for name in ("work", "no_such", "../configs/sft", "/configs/sft.py", "small"):
        with pytest.raises(InputError, match=r"no such config file; .*: annotate, .*, sft, ") as e:
            load_config(name)
        assert str(e.value).startswith(name)


@pytest.mark.usefixtures("nothing_compiles")
@pytest.mark.parametrize("name", ["tiny", "sft:small"])
def test_what_comes_with_the_package_is_enough_to_train(name, corpus, tmp_path):
    """Only rows are given: tokenizer and initial weights are those of the small model."""
    config = load_config(
        name, [f"--config.data.train=('{corpus / 'rows.jsonl'}',)", "--config.mesh.fsdp=1"]
    )
    with pytest.raises(AssertionError, match="went on to its weights"):
        loop.train(config, tmp_path / "run")


@pytest.mark.parametrize("options", ["24g,4b", "24g,8b", "80g,4b", "80g,8b"])
def test_one_gpu_holds_what_a_step_is_given(options):
    """State, gradients and the layers' inputs; what else a step needs, the compiler was asked:
    the config's docstring has it."""
    config = load_config(f"sft_one_gpu:{options}")
    run = plan_compile.build(config, jax.devices()[:1])
    state = plan_compile.held_bytes(run.state)
    gradients = plan_compile.held_bytes(run.state["trained"])
    room = {"24": 22.5, "80": 79}[options[:2]] * 2**30 * 0.95
    assert state + gradients + layer_inputs(run) < room


# --- keys and types ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("--config.trian.steps=5", "trian"),
        ("--config.train.stepz=5", "stepz"),
        ("--config.train.steps=5.5", "train.steps"),
        ("--config.train.steps=many", "train.steps"),
        ("--config.optimizer.learning_rate=fast", "optimizer.learning_rate"),
        ("--config.data.packing=maybe", "data.packing"),
        ("--config.mesh=8", "mesh"),
        ("--train.steps=5", "--train.steps=5"),
    ],
)
def test_unknown_keys_and_wrong_types_are_named(override, named):
    with pytest.raises(UsageError) as error:
        load("sft.py", override)
    message = str(error.value)
    assert named in message
    assert "\n" not in message
    assert "\\n" not in message


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("c.train.stepz = 5", "train.stepz"),
        ("c.optimiser = {'name': 'adamw'}", "optimiser"),
        ("c.train.steps = '5'", "train.steps is '5' .str.; expected int"),
        ("c.train.steps = True", "train.steps"),
        ("c.data.train = 'rows.jsonl'", "data.train is 'rows.jsonl'"),
        ("c.mesh = 8", "mesh is 8; expected a group"),
        ("del c.train.remat", "lacks the key train.remat"),
    ],
)
def test_keys_of_a_config_file_are_checked_too(line, named, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from moss_audio_jax.train import defaults\n\n"
        "def get_config():\n    c = defaults.get_config()\n"
        f"    with c.unlocked(), c.ignore_type():\n        {line}\n    return c\n"
    )
    with pytest.raises(UsageError, match=named):
        load_config(str(file))


@pytest.mark.parametrize(
    "text", ["def get_config(\n", "import no_such_module\n", "def get_config():\n    1 / 0\n"]
)
def test_a_config_file_that_cannot_be_loaded_is_named(text, tmp_path):
    file = tmp_path / "broken.py"
    file.write_text(text)
    with pytest.raises((InputError, UsageError), match=r"broken\.py"):
        load_config(str(file))
    with pytest.raises(InputError, match=r"none\.py: no such config file"):
        load_config(str(tmp_path / "none.py"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--config.train.step=2"], r"no key train\.step; train has steps"),
        (["--config.x=1"], r"no key x; the config has .*optimizer"),
        (["--config.train.steps.a=1"], r"no key train\.steps\.a: train\.steps is a value"),
        (["--config.=1"], "expected --config.KEY=VALUE"),
    ],
)
def test_an_override_of_no_key_is_named(words, told):
    with pytest.raises(UsageError, match=told) as error:
        config_file.read_config_file("tiny", words)
    assert "\n" not in str(error.value)


def test_of_a_key_that_is_given_twice_the_last_value_counts():
    words = [
        f"--config.{word}" for word in ("data.train=('a',)", "train.steps=1", "data.train=('b',)")
    ]
    assert config_file.read_config_file("tiny", words).data.train == ("b",)


@pytest.mark.parametrize("name", ["sft.py:9b", "lora.py:9b", "lora.py:8b,all", "small/sft.py:tpu"])
def test_an_argument_that_a_config_does_not_know_is_named(name):
    word = name.rpartition(":")[2].split(",")[-1]
    with pytest.raises(UsageError, match=rf"'{word}'; expected ") as error:
        load(name)
    assert "Traceback" not in str(error.value)


# --- impossible combinations ---------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_compiles")
def test_a_run_that_can_be_is_not_refused(run_config, tmp_path):
    """The measure of the next test: its base, and each way of splitting it, pass."""
    for mesh in (
        ("mesh.fsdp=-1",),
        ("mesh.fsdp=4", "mesh.data=2"),
        ("mesh.tensor=2", "mesh.fsdp=4"),
        ("mesh.fsdp=1", "mesh.sequence=8"),
    ):
        with pytest.raises(AssertionError, match="went on to its weights"):
            loop.train(run_config(*mesh), tmp_path / "run")


@pytest.mark.usefixtures("nothing_compiles")
@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        # batch, heads and lengths beside the mesh (eight devices) and the model
        (["data.batch=6", "mesh.fsdp=8"], r"data\.batch 6"),
        (["train.accumulate=3"], r"data\.batch 8 .* train\.accumulate"),
        (["mesh.fsdp=1", "mesh.tensor=4"], r"mesh\.tensor 4 .*\.kv_heads 2"),
        (["mesh.data=3", "mesh.fsdp=-1"], r"mesh .* does not fit 8 device"),
        (["mesh.fsdp=16"], r"mesh .* does not fit 8 device"),
        (["mesh.fsdp=0"], r"mesh .* sizes are positive"),
        (["mesh.data=-1", "mesh.fsdp=-1"], r"mesh .* at most one is -1"),
        (["data.length=1024"], r"data\.length 1024 .* 512 positions"),
        (["data.length=250", "mesh.sequence=4", "mesh.fsdp=2"], r"mesh\.sequence 4 .* 250"),
        (["model.decoder.heads=3"], r"config\.model: decoder\.heads 3"),
        (["model.encoder.tap_layers=[9]"], r"config\.model: encoder\.tap_layers"),
        (["model.inject_layers=9"], r"config\.model: inject_layers 9"),
        (["data.streams=3"], r"data\.streams 3 .* data\.batch 8"),
        (["data.echo=3"], r"data\.echo 3 does not divide data\.batch 8"),
        (["data.echo=2", "data.echo_rows=4"], r"data\.echo_rows is 4"),
        # names
        (["train.remat=half"], r"train\.remat is 'half'; expected one of none"),
        (["train.attention=flash"], r"train\.attention is 'flash'; expected one of auto"),
        (["train.dtype=float16"], r"train\.dtype"),
        (["optimizer.name=sgd"], r"optimizer\.name is 'sgd'; expected one of adamw"),
        (["optimizer.schedule=step"], r"optimizer\.schedule is 'step'; expected one of cosine"),
        (["optimizer.moment_dtype=int8"], r"optimizer\.moment_dtype"),
        (["checkpoint.export=onnx"], r"checkpoint\.export"),
        (["encoder_attention=local"], r"encoder_attention|encoder\.attention"),
        (["init_from=adapter=DIR"], r"init_from is 'adapter=DIR'"),
        (["tokenizer="], r"tokenizer is empty"),
        # numbers
        (["train.steps=0"], r"train\.steps is 0"),
        (["checkpoint.every=0"], r"checkpoint\.every is 0"),
        (["optimizer.learning_rate=-1"], r"optimizer\.learning_rate is -1"),
        (["optimizer.b1=1"], r"optimizer\.b1 is 1"),
        (["optimizer.decay=-4"], r"optimizer\.decay is -4"),
        (["optimizer.eps=-1"], r"optimizer\.eps is -1"),
        (["train.profile=[1]"], r"train\.profile is \(1,\); expected \(first step"),
        (["train.ema=1"], r"train\.ema is 1"),
        (["data.max_bad_share=2"], r"data\.max_bad_share is 2"),
        (["data.augment.speeds=[9.0]"], r"augment\.speeds holds 9"),
        # data
        (["data.train=[]"], r"data\.train or data\.mixture"),
        (['data.mixture={"a": {"paths": "x"}}'], r"data\.train or data\.mixture"),
        (["eval.every=5"], r"eval\.every .* data\.eval"),
        (["checkpoint.keep_best=2"], r"checkpoint\.keep_best .* eval\.every"),
        # what trains
        (['optimizer.groups=[[".*", 0.0]]'], r"optimizer\.groups freezes every parameter"),
        (['optimizer.groups=[["^lm_head/", 1.0]]'], r"optimizer\.groups: no pattern matches"),
        (['optimizer.groups=[["(", 1.0]]'], r"optimizer\.groups"),
        (["optimizer.groups=[5]"], r"optimizer\.groups"),
        (["optimizer.layers=[1.0]"], r"optimizer\.layers is \(1\.0,\); expected \d+ factors"),
        (['optimizer.layers=["a"]'], r"optimizer\.layers is \('a',\); expected \d+ factors"),
        (["lora.rank=2", "lora.targets=^nothing$"], r"lora\.targets '\^nothing\$' matches no"),
        (["lora.rank=2", "lora.targets=("], r"lora\.targets"),
        (["lora.rank=2", "lora.alpha=0"], r"lora\.alpha is 0; expected a number above 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused_before_anything_compiles(run_config, tmp_path, overrides, named):
    with pytest.raises((UsageError, InputError), match=named) as error:
        loop.train(run_config(*overrides), tmp_path / "run")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("limit", "segments"), [(0, 0), (7, 8)])
def test_a_limit_of_examples_in_a_row_reaches_packing_and_the_kernel(limit, segments):
    config = load_config(str(CONFIGS / "tiny.py"))
    config.data.row_examples = limit
    start = Start(sizes_of(config.model), None)
    assert loader_config_of(config, start).row_examples == limit
    assert recipe_of(config, start).compute.most_segments == segments  # padding is one more
