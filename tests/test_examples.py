"""Every example runs to its end, with small numbers; tests its output, not the quality of a model
after a step or two."""

import ast
import re
import tempfile
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, **constants) -> dict:
    """Executes an example with other values for some of its constants; returns its names."""
    file = EXAMPLES / f"{name}.py"
    tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) in constants:
            node.value = ast.copy_location(
                ast.Constant(constants.pop(node.targets[0].id)), node.value
            )
    assert not constants, f"{name}.py has no constants {sorted(constants)}"
    names = {"__name__": name, "__file__": str(file)}
    exec(compile(tree, str(file), "exec"), names)
    return names


def test_quick_start(capsys):
    names = run("quick_start")
    assert [event.text for event in names["events"]] == ["cow mooing", "drilling", "laser zapping"]
    assert names["transcript"].text.startswith("the fox is in the desert")
    assert "00:00:00,450 --> " in capsys.readouterr().out


def test_lora_five_minutes(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    # As many new tokens as in test_quick_start: the same programs, compiled once.
    names = run("lora_five_minutes", TRAIN_SCENES=4, HELD_OUT_SCENES=1, STEPS=1, MAX_NEW_TOKENS=200)
    files = {file.name for file in (names["WORK"] / "run" / "lora").iterdir()}
    assert files >= {"adapter_config.json", "adapter_model.safetensors"}
    assert re.search(r"right: \d of 1 before, \d after", capsys.readouterr().out)


def test_eight_devices(capsys):
    names = run("eight_devices")  # alone it runs what test_quick_start has compiled
    assert names["mesh"].devices.size == 8
    assert names["held"] < names["total"] / 7  # all that is large is split over the eight
    table = capsys.readouterr().out
    gate = next(line for line in table.splitlines() if "layers/mlp/gate_proj" in line)
    assert re.search(r"\(4, 256, 512\) +-, fsdp, tensor +\(4, 64, 256\)", gate)


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.stem)
def test_an_example_is_tested_and_has_cells(file):
    assert f"test_{file.stem}" in globals()
    cells = re.findall(r"^# %%.*$", file.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(cells) == {"# %%", "# %% [markdown]"}
