"""Dynamic batching: examples of many requests that come at about the same time are computed together.

A batch waits for others for `max_wait` seconds at most, and is padded to one of a few sizes, each of which is compiled when the service starts.
"""

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np

from jaxmodels.serving.requests import Busy

Example = Mapping[str, np.ndarray]
SIZES = (1, 4, 16)


@dataclasses.dataclass
class _Waiting:
    example: Example
    shape: tuple
    since: float
    future: Future


@dataclasses.dataclass(frozen=True)
class BatchStats:
    """What a batcher holds: `queued` examples that wait, the most that may, those that are `running`, and counts of batches and rows since the start."""

    queued: int
    queue_limit: int
    running: int
    batches: int
    rows: int


class Batcher:
    """Computes single examples in batches, in a thread of its own."""

    def __init__(self, compute: Callable[[Mapping[str, np.ndarray]], Any], *, max_wait: float = 0.005, queue: int = 256, sizes: Sequence[int] = SIZES):
        """
        Args:
          compute: from arrays with B rows to a tree of arrays with B rows.
          max_wait: seconds that an example waits for others.
          queue: the most examples that wait.
          sizes: B of the batches, in ascending order.
        """
        self._compute, self._max_wait, self._limit, self._sizes = compute, max_wait, queue, tuple(sizes)
        self._waiting: collections.deque[_Waiting] = collections.deque()
        self._condition = threading.Condition()
        self._open, self._closed = True, False
        self._running = self._batches = self._rows = 0
        self._seconds = 0.05  # of a batch, roughly
        self._thread = threading.Thread(target=self._loop, name="batcher", daemon=True)
        self._thread.start()

    def warm(self, blanks: Iterable[Example]) -> int:
        """Compile for each of these examples and each size; return the number of programs."""
        count = 0
        for blank in blanks:
            for size in self._sizes:
                self._compute(_stack([blank] * size, size))
                count += 1
        return count

    def submit(self, examples: Sequence[Example]) -> list[Future]:
        """Queue all examples of a request, or none; each future has the row of the output of its example.

        Raises:
          Busy: there is no room for them, or the batcher is draining.
        """
        now = time.monotonic()
        waiting = [_Waiting(example, _shape(example), now, Future()) for example in examples]
        with self._condition:
            if not self._open:
                raise Busy("the service is shutting down.", 1.0)
            if len(self._waiting) + len(waiting) > self._limit:
                batches = len(self._waiting) / self._sizes[-1] + 1
                raise Busy(f"{len(self._waiting)} inputs are waiting, of {self._limit} that may: try again later.", max(1.0, batches * self._seconds))
            self._waiting.extend(waiting)
            self._condition.notify_all()
        return [each.future for each in waiting]

    def stats(self) -> BatchStats:
        """Return what the batcher holds now."""
        with self._condition:
            return BatchStats(len(self._waiting), self._limit, self._running, self._batches, self._rows)

    def drain(self, seconds: float) -> int:
        """Refuse new examples, wait for the others, cancel those left; return their number."""
        end = time.monotonic() + seconds
        with self._condition:
            self._open = False
            self._condition.notify_all()
            while (self._waiting or self._running) and (left := end - time.monotonic()) > 0:
                self._condition.wait(left)
            abandoned = list(self._waiting)
            self._waiting.clear()
        for each in abandoned:
            each.future.cancel()
        return len(abandoned)

    def close(self) -> None:
        """End the thread, after the batch that runs."""
        self.drain(0)
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        self._thread.join(10)

    def _loop(self) -> None:
        while batch := self._next():
            self._run(batch)
            with self._condition:
                self._running = 0
                self._condition.notify_all()

    def _next(self) -> list[_Waiting]:
        """Wait for a batch of one shape, those that came first; none when the batcher is closed."""
        most = self._sizes[-1]
        with self._condition:
            while True:
                if self._closed:
                    return []
                if not self._waiting:
                    self._condition.wait()
                    continue
                first = self._waiting[0]
                alike = [each for each in self._waiting if each.shape == first.shape][:most]
                left = first.since + self._max_wait - time.monotonic()
                if len(alike) < most and left > 0 and self._open:
                    self._condition.wait(left)
                    continue
                chosen = set(map(id, alike))
                self._waiting = collections.deque(each for each in self._waiting if id(each) not in chosen)
                batch = [each for each in alike if each.future.set_running_or_notify_cancel()]
                if batch:
                    self._running = len(batch)
                    return batch

    def _run(self, batch: Sequence[_Waiting]) -> None:
        """Compute a batch, and pass each row or error on."""
        size = next(size for size in self._sizes if size >= len(batch))
        begun = time.monotonic()
        try:
            output = self._compute(_stack([each.example for each in batch], size))
        except Exception as error:  # noqa: BLE001  one request's failure must not be another's
            if len(batch) > 1:
                for each in batch:
                    self._run([each])
            else:
                batch[0].future.set_exception(error)
            return
        self._seconds += 0.2 * (time.monotonic() - begun - self._seconds)
        self._batches, self._rows = self._batches + 1, self._rows + len(batch)
        for row, each in enumerate(batch):
            each.future.set_result(jax.tree.map(lambda x, row=row: x[row], output))


def _shape(example: Example) -> tuple:
    return tuple(sorted((name, np.shape(value), np.asarray(value).dtype.str) for name, value in example.items()))


def _stack(examples: Sequence[Example], size: int) -> dict[str, np.ndarray]:
    """Return arrays with `size` rows; those after the examples repeat the first, so that they are valid."""
    rows = [*examples, *[examples[0]] * (size - len(examples))]
    return {name: np.stack([row[name] for row in rows]) for name in examples[0]}
