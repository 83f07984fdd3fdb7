"""A bounded run of tools/fuzz.py. Not covered: the 20,000 inputs of a full run, and checkpoints and
adapters, whose readers start JAX in a separate process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"
COUNTS = {
    "audio": 150,
    "rows": 60,
    "predictions": 40,
    "manifests": 60,
    "timestamps": 60,
    "replies": 60,
    "overrides": 30,
    "tokenizers": 30,
}


@pytest.fixture(scope="module")
def fuzzer():
    sys.path.insert(0, str(TOOLS))
    try:
        import fuzz

        yield fuzz
    finally:
        sys.path.remove(str(TOOLS))


@pytest.mark.parametrize("kind", COUNTS)
def test_hostile_inputs_are_named_or_read(fuzzer, kind, tmp_path):
    """In this process, because spawned ones, which also find crashes, take seconds each."""
    from fuzz_kinds import KINDS

    seeds, mutate, read = KINDS[kind].setup(tmp_path)
    for number in range(COUNTS[kind]):
        data = fuzzer.make(kind, 2026, number, mutate, seeds)
        failed = fuzzer.attempt(read, data, seconds=30, megabytes=2000)
        assert failed is None, f"input {number}: {failed[0]}\n{failed[1]}"


def test_what_fails_is_told_apart_and_made_small(fuzzer):
    """The fuzzer itself: an exception of another kind, a hang, an answer that is not finite."""

    def read(data: bytes) -> None:
        if b"bad" in data:
            raise KeyError("x")
        while b"slow" in data:
            pass

    assert fuzzer.attempt(read, b"fine", 5, 1000) is None
    signature, detail = fuzzer.attempt(read, b"0" * 500 + b"bad" + b"1" * 500, 5, 1000)
    assert signature.startswith("KeyError at ")
    assert "Traceback" in detail
    small = fuzzer._smaller(read, b"0" * 500 + b"bad" + b"1" * 500, signature, 5, 1000)
    assert b"bad" in small
    assert len(small) < 100
    assert fuzzer.attempt(read, b"slow", 0.2, 1000)[0] == "over 0.2 s"
