"""How times and lists are written in captions, timelines and answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def span(item: Mapping[str, Any]) -> str:
    """ "1.20 - 3.45" """
    return f"{item['start']:.2f} - {item['end']:.2f}"


def times(seconds: Sequence[float]) -> str:
    """ "1.20, 3.45" """
    return ", ".join(f"{each:.2f}" for each in seconds)


def joined(parts: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c" """
    if len(parts) < 2:
        return "".join(parts)
    return ", ".join(parts[:-1]) + f" and {parts[-1]}"


def capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def stamped(items: Sequence[Mapping[str, Any]]) -> str:
    """ "[0.00]hello[0.41][0.45]there[0.80]" """
    return "".join(f"[{i['start']:.2f}]{i['text']}[{i['end']:.2f}]" for i in items)
