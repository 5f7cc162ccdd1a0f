"""Training time, and rates between log lines."""

import contextlib
import gc
import time

import jax


class Clock:
    """Measures rates between log lines and the training time of the run, without evaluation and saving."""

    def __init__(self, step: int, seconds_before: float):
        self._step, self._before = step, seconds_before
        self._first = self._last = time.perf_counter()
        self._waited = 0.0

    @contextlib.contextmanager
    def waiting(self, last_output):
        """Count the time of the block as a wait for data if the devices have finished `last_output`, and so are idle, at its end."""
        started = time.perf_counter()
        yield
        elapsed = time.perf_counter() - started
        if last_output is not None and jax.tree.leaves(last_output)[0].is_ready():
            self._waited += elapsed

    @contextlib.contextmanager
    def paused(self):
        """Exclude the time of the block from the rates and the total."""
        started = time.perf_counter()
        yield
        elapsed = time.perf_counter() - started
        self._first, self._last = self._first + elapsed, self._last + elapsed

    def rates(self, step: int, batch_size: int) -> dict[str, float]:
        """Return steps and examples per second since the last call, and `data_wait`: an upper bound of the fraction of time that devices waited for data."""
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
        """Return the seconds of training, over all starts."""
        return self._before + time.perf_counter() - self._first


@contextlib.contextmanager
def short_collections():
    """Keep Python's garbage collector off the objects that exist now: compiling leaves many, and a pass over them stops the loop for 0.2 s."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
