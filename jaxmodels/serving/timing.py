"""The times and counts of the answers to one request, for the metrics and the access log."""

import time

from jaxmodels.serving.metrics import Metrics
from jaxmodels.serving.requests import Finished
from jaxmodels.serving.service import Call


class Timing:
    """Follows the tokens of some answers."""

    def __init__(self, metrics: Metrics, call: Call, model: str, prompt_tokens: int):
        self._metrics, self._call, self._model, self._started = metrics, call, model, time.monotonic()
        self._first: dict[int, float] = {}
        self._last: dict[int, float] = {}
        self._counts: dict[int, int] = {}
        call.log["prompt_tokens"] = prompt_tokens
        metrics.prompt_tokens.labels(model).inc(prompt_tokens)

    def token(self, index: int) -> None:
        """Note a new token of an answer."""
        now = time.monotonic()
        if index not in self._first:
            self._first[index] = now
            self._metrics.first_token.labels(self._model).observe(now - self._started)
            self._call.log.setdefault("first_token_seconds", round(now - self._started, 4))
        self._last[index] = now
        self._counts[index] = self._counts.get(index, 0) + 1

    def end(self, index: int, finished: Finished) -> None:
        """Note the end of an answer."""
        if self._counts.get(index, 0) > 1:
            spans = self._counts[index] - 1
            self._metrics.per_token.labels(self._model).observe((self._last[index] - self._first[index]) / spans)
        self._counts[index] = finished.completion_tokens
        self._call.log["finish"] = finished.reason

    def record(self) -> None:
        """Count the tokens, also those of answers that were given up."""
        count = sum(self._counts.values())
        self._call.log["completion_tokens"] = count
        self._metrics.completion_tokens.labels(self._model).inc(count)
