"""What one client may ask for: each limit with its default, its option and what it is for."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any


def _limit(default: float, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits of a server. Each is an option of the verb: `max_body_mb` is --max-body-mb."""

    max_body_mb: float = _limit(100.0, "megabytes of a request's body")
    max_audio_seconds: float = _limit(7200.0, "seconds of sound in a request, all clips together")
    max_clips: int = _limit(16, "clips in a conversation")
    max_messages: int = _limit(128, "messages in a conversation")
    max_characters: int = _limit(400_000, "characters of a conversation's texts")
    max_new_tokens: int = _limit(4096, "tokens of an answer")
    max_choices: int = _limit(8, "answers to one request (n)")
    max_waiting: int = _limit(64, "requests that wait for a place; more get 429")
    max_sockets: int = _limit(16, "open sockets of live audio; more get 429")
    max_message_mb: float = _limit(4.0, "megabytes of a message on a socket")
    max_live_seconds: float = _limit(600.0, "seconds of sound in a socket's buffer")
    socket_idle_seconds: float = _limit(300.0, "seconds of silence after which a socket is closed")
    body_seconds: float = _limit(300.0, "seconds in which a request's body must arrive")
    decode_seconds: float = _limit(60.0, "seconds in which a clip must be decoded")
    request_seconds: float = _limit(1800.0, "seconds in which an answer must end")
    drain_seconds: float = _limit(30.0, "seconds that running answers get after SIGTERM")

    @property
    def body_bytes(self) -> int:
        return int(self.max_body_mb * 1e6)


def add_limits(options: argparse.ArgumentParser) -> None:
    """One option for each limit."""
    group = options.add_argument_group("limits")
    for field in dataclasses.fields(Limits):
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=_above_zero(type(field.default)),
            default=field.default,
            metavar="N",
            help=f"{field.metadata['help']}; default {field.default:g}",
        )


def limits_from(values: Mapping[str, Any]) -> Limits:
    """The limits among parsed options."""
    return Limits(**{field.name: values[field.name] for field in dataclasses.fields(Limits)})


def _above_zero(kind: type) -> Any:
    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            what = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r}: expected a {what} above 0")
        return value

    return read
