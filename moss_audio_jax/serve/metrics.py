"""Counters and times of a server, as Prometheus reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

_PREFIX = "moss_audio"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)
# Of the engine (`Service.stats`): its name there, its name here, what it is.
_COUNTERS = {
    "prompt_tokens": "tokens of prompts",
    "cached_tokens": "tokens of prompts that were held from before",
    "new_tokens": "tokens of answers",
    "encoded_seconds": "seconds of sound that were encoded; the rest was held from before",
    "turns": "turns of the device",
    "programs": "programs that were compiled",
}
_GAUGES = {
    "waiting": "answers that wait for a place",
    "running": "answers that are being written",
    "slots": "places",
    "cache_tokens_taken": "tokens for which running answers have taken room in the cache",
    "cache_tokens_held": "tokens in the cache of keys and values",
    "cache_tokens_room": "tokens for which it has room",
    "engine_alive": "1 while it answers",
}


class Metrics:
    """The metrics of one server.

    Args:
      services: give the numbers of their engines when they are asked for; by the names of models.
    """

    def __init__(self, services: Mapping[str, Any]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Engines(services))

        def make(kind: Any, name: str, what: str, labels: tuple[str, ...] = (), **more: Any) -> Any:
            return kind(f"{_PREFIX}_{name}", what, labels, registry=self.registry, **more)

        self.requests = make(Counter, "requests", "requests", ("route", "status"))
        self.rejected = make(Counter, "rejected", "requests that were refused", ("reason",))
        self.active = make(Gauge, "active_requests", "requests that are being answered")
        self.sockets = make(Gauge, "sockets", "open sockets of live audio")
        self.answers = make(Counter, "answers", "answers, by why they ended", ("reason",))
        self.audio = make(Counter, "audio_seconds", "seconds of sound in prompts")
        self.stopped_early = make(
            Counter, "transcripts_stopped_early", "transcripts of which a part may be missing"
        )
        times = {"buckets": _SECONDS}
        self.request = make(Histogram, "request_seconds", "whole requests", ("route",), **times)
        self.first = make(
            Histogram, "first_token_seconds", "from a request to its first token", **times
        )
        self.between = make(Histogram, "between_tokens_seconds", "between two tokens", **times)
        self.decoding = make(Histogram, "decode_seconds", "decoding of one clip", **times)

    def text(self) -> bytes:
        """All of them in Prometheus' text form."""
        return generate_latest(self.registry)


class _Engines:
    """The engines' own numbers, each with the name of its model."""

    def __init__(self, services: Mapping[str, Any]) -> None:
        self._services = services

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        stats = {}
        for model, service in self._services.items():
            alive = service.dead is None and not service.stuck
            stats[model] = service.stats() | {"engine_alive": float(alive)}
        for names, kind in ((_COUNTERS, CounterMetricFamily), (_GAUGES, GaugeMetricFamily)):
            for name, what in names.items():
                family = kind(f"{_PREFIX}_{name}", what, labels=["model"])
                for model, numbers in stats.items():
                    if name in numbers:
                        family.add_metric([model], numbers[name])
                if family.samples:
                    yield family
