"""adapter_config.json of PEFT: every setting is obeyed, has no effect, or is refused.

The reference is PEFT 0.17.1: oracle tests merge the same adapters with it.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from moss_audio_jax.config import read_json
from moss_audio_jax.errors import InputError
from moss_audio_jax.files import brief, quoted

FILE = "adapter_config.json"

_OBEYED = object()
_NO_EFFECT = object()  # it does not change the merged weights
_MERGE = "merge the adapter into its base model with PEFT (merge_and_unload) and convert the result"
_RESTORE = (
    "save the adapter with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...), "
    "which makes it a plain LoRA adapter"
)

# How each key of the file is handled. A text says why the key is refused, unless it is off (null,
# false, "none" or empty). A key that is not in this table is also refused unless it is off.
KEYS: dict[str, Any] = {
    "peft_type": _OBEYED,
    "r": _OBEYED,
    "rank_pattern": _OBEYED,
    "lora_alpha": _OBEYED,
    "alpha_pattern": _OBEYED,
    "use_rslora": _OBEYED,
    "target_modules": _OBEYED,
    "exclude_modules": _OBEYED,
    "layers_to_transform": _OBEYED,
    "layers_pattern": _OBEYED,
    "init_lora_weights": _OBEYED,
    # Who made it, from what, and how it was trained.
    "task_type": _NO_EFFECT,
    "auto_mapping": _NO_EFFECT,
    "base_model_name_or_path": _NO_EFFECT,
    "revision": _NO_EFFECT,
    "inference_mode": _NO_EFFECT,
    "lora_dropout": _NO_EFFECT,
    "peft_version": _NO_EFFECT,
    "runtime_config": _NO_EFFECT,
    # PEFT ignores it for nn.Linear, and only linear layers are adapted here.
    "fan_in_fan_out": _NO_EFFECT,
    # Details of other settings; they have no effect if those are off.
    "loftq_config": _NO_EFFECT,
    "eva_config": _NO_EFFECT,
    "corda_config": _NO_EFFECT,
    "qalora_group_size": _NO_EFFECT,
    "megatron_core": _NO_EFFECT,
    "ensure_weight_tying": _NO_EFFECT,
    "use_dora": f"DoRA also scales each kernel's columns; {_MERGE}",
    "use_qalora": f"QALoRA pools its inputs; {_MERGE}",
    "lora_bias": f"the adapter adds biases, for which the model has no place; {_MERGE}",
    "bias": f"the adapter replaces biases; {_MERGE}",
    "modules_to_save": f"the adapter replaces whole modules; {_MERGE}",
    "trainable_token_indices": f"the adapter replaces rows of the embedding; {_MERGE}",
    "target_parameters": f"the adapter targets parameters of expert layers; {_MERGE}",
    "layer_replication": "the adapter repeats layers, which no model here supports",
    "megatron_config": f"the adapter is for Megatron's layers; {_MERGE}",
    "alora_invocation_tokens": "the adapter works on a part of a prompt; it cannot be merged",
    "arrow_config": "the adapter is a router of others; it cannot be merged",
}
# Others, such as pissa and olora, change the base weights when PEFT loads the adapter.
_INITS = ("gaussian", "eva", "orthogonal")

_PLAIN = re.compile(r"[\w.]*")  # a pattern with only these characters matches quickly
_ANY = "[^.]*"
_SECONDS = 10
_MATCH = """
import json, re, sys
how, patterns, names = json.load(sys.stdin)
match = getattr(re, how)
found = [[match(pattern, name) for name in names] for pattern in patterns]
json.dump([[m and [m.group(), *m.groups()] for m in row] for row in found], sys.stdout)
"""


class AdapterConfig:
    """The settings of adapter_config.json for each module.

    Args:
      folder: the folder of adapters.
      modules: official names (without ".weight") of all modules that could be adapted.

    Raises:
      InputError: the file is missing or broken, or a setting cannot be obeyed; its key is named.
    """

    def __init__(self, folder: Path, modules: Sequence[str]):
        self.file = folder / FILE
        raw = read_json(self.file)
        kind = raw.get("peft_type")
        if kind != "LORA":
            raise InputError(f"{self.file}: peft_type is {quoted(kind)}; expected 'LORA'")
        for key, value in raw.items():
            how = KEYS.get(key, "this setting is unknown")
            if isinstance(how, str) and value not in (None, False, "none", [], {}, ""):
                raise InputError(f"{self.file}: {brief(key, 60)} is {quoted(value)}: {how}")
        init = raw.get("init_lora_weights")
        named = isinstance(init, str) and init.lower() in _INITS
        if not named and not isinstance(init, bool | None):
            raise InputError(
                f"{self.file}: init_lora_weights is {quoted(init)}: PEFT changes the base weights "
                f"when it loads such an adapter; {_RESTORE}"
            )
        self._raw = raw
        self.targets = self._targets(modules)
        rank = self._positive(raw.get("r"), "r")
        alpha = self._number(raw.get("lora_alpha"), "lora_alpha")
        self._rank = self._by_pattern("rank_pattern", rank, self._positive)
        self._alpha = self._by_pattern("alpha_pattern", alpha, self._number)
        self._root = self._flag("use_rslora")

    def rank(self, module: str) -> int:
        return self._rank[module]

    def scale(self, module: str) -> float:
        """The factor of B A: alpha / r, or alpha / sqrt(r) if use_rslora is set."""
        rank = self._rank[module]
        return self._alpha[module] / (math.sqrt(rank) if self._root else rank)

    def _targets(self, modules: Sequence[str]) -> set[str]:
        """PEFT's check_target_module_exists for all modules at once."""
        targets, layers = self._raw.get("target_modules"), self._raw.get("layers_to_transform")
        pattern = self._raw.get("layers_pattern") or []
        excluded = self._selected(
            "exclude_modules", self._raw.get("exclude_modules") or [], modules
        )
        if isinstance(targets, str) and targets.lower() == "all-linear":
            found = {module for module in modules if module != "lm_head"}
        else:
            found = self._selected("target_modules", targets, modules)
        listed = [layers] if type(layers) is int else layers or []
        if not isinstance(listed, list) or any(type(layer) is not int for layer in listed):
            self._wrong("layers_to_transform", "a list of layer numbers")
        if isinstance(targets, str) and (listed or pattern):
            self._wrong(
                "layers_to_transform" if listed else "layers_pattern",
                "null if target_modules is a string, as in PEFT",
            )
        if pattern and not listed:
            self._wrong("layers_pattern", "null if layers_to_transform is not set")
        if listed:
            patterns = [pattern] if isinstance(pattern, str) else pattern or [_ANY]
            if not _strings(patterns):
                self._wrong("layers_pattern", "a string or a list of strings")
            chosen = set(listed)
            form = r".*\.{}\.(\d+)\."
            rows = self._match("layers_pattern", "match", patterns, modules, form)
            first = [next((m for m in hits if m), None) for hits in zip(*rows, strict=True)]
            there = {
                module
                for module, hit in zip(modules, first, strict=True)
                if hit and (hit[1] or "").isdecimal() and int(hit[1]) in chosen
            }
            # PEFT checks the layer only if a target is the end of the name, not all of it.
            found = {module for module in found if module in there or module in targets}
        return found - excluded

    def _selected(self, key: str, chosen: Any, modules: Sequence[str]) -> set[str]:
        """The modules that match a list of names (whole, or their ends) or a regular expression."""
        if isinstance(chosen, str):
            [hits] = self._match(key, "fullmatch", [chosen], modules)
            return {module for module, hit in zip(modules, hits, strict=True) if hit}
        if not _strings(chosen):
            self._wrong(key, "a list of module names, or a regular expression")
        names = set(chosen)
        return {module for module in modules if not names.isdisjoint(_ends(module))}

    def _by_pattern(self, key: str, default: Any, checked: Any) -> dict[str, Any]:
        """{module: value} for every target; `key` maps patterns of names to values."""
        patterns = self._raw.get(key) or {}
        if not isinstance(patterns, dict):
            self._wrong(key, "an object of module names and values")
        values = [checked(value, f"{key}.{pattern}") for pattern, value in patterns.items()]
        targets = sorted(self.targets)
        rows = self._match(key, "match", list(patterns), targets, r"(.*\.)?({})$")
        found = dict.fromkeys(targets, default)
        for value, hits in reversed(list(zip(values, rows, strict=True))):  # the first one wins
            found |= {module: value for module, hit in zip(targets, hits, strict=True) if hit}
        return found

    def _match(
        self, key: str, how: str, chosen: list[str], names: Sequence[str], form: str = "{}"
    ) -> list[list[list[str | None] | None]]:
        """For each pattern and name: the match and its groups, or None."""
        patterns = [form.replace("{}", pattern) for pattern in chosen]
        if all(pattern == _ANY or _PLAIN.fullmatch(pattern) for pattern in chosen):
            match = getattr(re, how)
            found = [[match(pattern, name) for name in names] for pattern in patterns]
            return [[m and [m.group(), *m.groups()] for m in row] for row in found]
        # A foreign expression may run forever, and nothing in this process could stop it.
        command = [sys.executable, "-I", "-S", "-c", _MATCH]
        question = json.dumps([how, patterns, list(names)])
        try:
            done = subprocess.run(
                command, input=question, capture_output=True, text=True, timeout=_SECONDS
            )
        except subprocess.TimeoutExpired:
            problem = f"it takes more than {_SECONDS} s"
        else:
            if done.returncode == 0:
                return json.loads(done.stdout)
            problem = brief((done.stderr.strip().splitlines() or ["it fails"])[-1], 100)
        raise InputError(
            f"{self.file}: {key} is {quoted(self._raw.get(key))}: not a usable regular "
            f"expression ({problem})"
        )

    def _positive(self, value: Any, key: str) -> int:
        if type(value) is not int or not 0 < value < 2**31:
            self._wrong(key, "a whole number above 0", value)
        return value

    def _number(self, value: Any, key: str) -> float:
        whole = type(value) is int and abs(value) < 2**63
        if not (whole or (type(value) is float and math.isfinite(value))):
            self._wrong(key, "a number", value)
        return float(value)

    def _flag(self, key: str) -> bool:
        value = self._raw.get(key, False)
        if value is not None and type(value) is not bool:
            self._wrong(key, "true or false")
        return bool(value)

    def _wrong(self, key: str, expected: str, value: Any = ...) -> None:
        value = self._raw.get(key) if value is ... else value
        raise InputError(f"{self.file}: {brief(key, 60)} is {quoted(value)}; expected {expected}")


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _ends(name: str) -> Iterable[str]:
    """'a.b.c', 'b.c', 'c'."""
    parts = name.split(".")
    return (".".join(parts[at:]) for at in range(len(parts)))
