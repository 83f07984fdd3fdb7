"""Nested dicts of arrays, and paths of their leaves such as 'lm_head/kernel'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(tree: Any) -> dict[str, Any]:
    """{'lm_head/kernel': leaf, ...} of a nested dict."""
    leaves = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= {f"{key}/{path}": leaf for path, leaf in flatten(value).items()}
        else:
            leaves[key] = value
    return leaves


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def replaced(tree: Mapping[str, Any], leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict with other leaves at some paths. What holds none of them is not copied."""
    new, inside = dict(tree), {}
    for path, leaf in leaves.items():
        key, _, rest = path.partition("/")
        if rest:
            inside.setdefault(key, {})[rest] = leaf
        else:
            new[key] = leaf
    return new | {key: replaced(tree[key], those) for key, those in inside.items()}


def path_name(path: tuple) -> str:
    """'language_model/layers/mlp/up_proj/kernel' from a jax.tree_util key path."""
    return "/".join(str(getattr(key, "key", key)) for key in path)
