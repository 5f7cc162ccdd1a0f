"""Figures of the service for Prometheus."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from jaxmodels.serving.served import Served

_SHORT = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_TOKEN = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

# name, whether it only grows, description, of the engine's stats.
_OF_ENGINES = (
    ("slots", False, "Rows of the engine's batch."),
    ("running", False, "Rows of the engine's batch in use."),
    ("cache_tokens", False, "Tokens that the cache has room for."),
    ("cache_used", False, "Tokens that the cache holds."),
    ("generated", True, "New tokens of the engine."),
    ("prompts", True, "Tokens of prompts that the engine has read."),
    ("prefix_hits", True, "Tokens of prompts that were in the cache already."),
    ("steps", True, "Decode steps of the engine; generated / (steps * slots) is its mean occupancy."),
)
_OF_BATCHERS = (("batches", True, "Batches of inputs."), ("rows", True, "Inputs in batches."))


class Metrics:
    """Counters and histograms, in a registry of their own."""

    def __init__(self, models: Callable[[], Mapping[str, "Served"]]):
        """`models` returns the models whose engines and batchers are asked when the figures are read."""
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry, "namespace": "jaxmodels"}
        self.requests = Counter("requests", "Requests that were answered.", ["model", "endpoint", "status"], **own)
        self.errors = Counter("errors", "Requests that were refused or failed.", ["model", "code"], **own)
        self.seconds = Histogram("request_seconds", "Time of a request.", ["model", "endpoint"], buckets=_SHORT, **own)
        self.first_token = Histogram("time_to_first_token_seconds", "Time from a request to its first token.", ["model"], buckets=_SHORT, **own)
        self.per_token = Histogram("time_per_token_seconds", "Time from one token to the next, averaged over an answer.", ["model"], buckets=_TOKEN, **own)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts.", ["model"], **own)
        self.completion_tokens = Counter("completion_tokens", "New tokens.", ["model"], **own)
        self.disconnects = Counter("disconnects", "Requests whose client went away.", ["endpoint"], **own)
        self.registry.register(_Held(models))


class _Held(Collector):
    """What engines and batchers hold at the time of reading."""

    def __init__(self, models: Callable[[], Mapping[str, "Served"]]):
        self._models = models

    def collect(self) -> Iterator[Metric]:
        models = self._models()
        queue = GaugeMetricFamily("jaxmodels_queue", "Requests or inputs that wait.", labels=["model", "part"])
        limit = GaugeMetricFamily("jaxmodels_queue_limit", "The most that may wait.", labels=["model", "part"])
        engines, batchers = {}, {}
        for name, model in models.items():
            for part, owner in (("engine", model.engine), ("predict", model.predicting), ("embeddings", model.embedding)):
                if owner is None or model.parent is not None:
                    continue
                stats = owner.stats()
                queue.add_metric([name, part], stats.queued)
                limit.add_metric([name, part], stats.queue_limit)
                (engines if part == "engine" else batchers)[name, part] = stats
        yield queue
        yield limit
        for table, found in ((_OF_ENGINES, engines), (_OF_BATCHERS, batchers)):
            for name, grows, text in table:
                family = (CounterMetricFamily if grows else GaugeMetricFamily)(f"jaxmodels_{name}", text, labels=["model", "part"])
                for labels, stats in found.items():
                    family.add_metric(list(labels), getattr(stats, name))
                yield family
