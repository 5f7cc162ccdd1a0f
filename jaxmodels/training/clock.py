"""Time spent in training, and rates between log lines."""

import contextlib
import time

import jax


class Clock:
    """Rates between log lines, and the length of the run, without the time that evaluating and saving take."""

    def __init__(self, step: int, seconds_before: float):
        self._step, self._before = step, seconds_before
        self._first = self._last = time.perf_counter()
        self._waited = 0.0

    @contextlib.contextmanager
    def waiting(self, last_output):
        """What is done inside is a wait for data if the devices, which made `last_output`, have nothing left to do at its end."""
        started = time.perf_counter()
        yield
        elapsed = time.perf_counter() - started
        if last_output is not None and jax.tree.leaves(last_output)[0].is_ready():
            self._waited += elapsed

    @contextlib.contextmanager
    def paused(self):
        """What is done inside does not count."""
        started = time.perf_counter()
        yield
        elapsed = time.perf_counter() - started
        self._first, self._last = self._first + elapsed, self._last + elapsed

    def rates(self, step: int, batch_size: int) -> dict[str, float]:
        """Steps and examples per second since the last line, and the share of that time in which devices waited for data (at most)."""
        elapsed = max(time.perf_counter() - self._last, 1e-9)
        rate = (step - self._step) / elapsed
        waited, self._waited = self._waited, 0.0
        self._step, self._last = step, time.perf_counter()
        return {
            "steps_per_second": rate,
            "examples_per_second": rate * batch_size,
            "data_wait": min(1.0, waited / elapsed),
            "seconds": round(self.total(), 3),
        }

    def total(self) -> float:
        """Seconds of training, over all starts."""
        return self._before + time.perf_counter() - self._first
