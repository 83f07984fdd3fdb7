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


def path_name(path: tuple) -> str:
    """'language_model/layers/mlp/up_proj/kernel' from a jax.tree_util key path."""
    return "/".join(str(getattr(key, "key", key)) for key in path)
