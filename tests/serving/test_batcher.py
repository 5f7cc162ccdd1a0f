"""Dynamic batching, of a function that records its batches."""

import concurrent.futures
import threading
import time

import numpy as np
import pytest

from jaxmodels.serving.batcher import Batcher
from jaxmodels.serving.requests import Busy


class Doubling:
    """Doubles its input, and notes the number of rows of each batch; raises for rows of 13, and waits for `gate`."""

    def __init__(self):
        self.sizes, self.gate = [], threading.Event()
        self.gate.set()

    def __call__(self, batch):
        assert self.gate.wait(10)
        self.sizes.append(len(batch["x"]))
        if (batch["x"] == 13).any():
            raise RuntimeError("thirteen")
        return {"twice": 2 * batch["x"]}


def example(value, length=1):
    return {"x": np.full(length, value, np.float32)}


@pytest.fixture
def doubling():
    return Doubling()


@pytest.fixture
def batcher(doubling):
    made = Batcher(doubling, max_wait=0.02, queue=8, sizes=(1, 4))
    yield made
    doubling.gate.set()
    made.close()


def values(futures):
    return [float(future.result(10)["twice"][0]) for future in futures]


def test_examples_are_computed_together_and_padded_to_a_size(batcher, doubling):
    assert values(batcher.submit([example(i) for i in range(6)])) == [0, 2, 4, 6, 8, 10]
    assert doubling.sizes == [4, 4] and (batcher.stats().batches, batcher.stats().rows) == (2, 6)
    assert values(batcher.submit([example(1)])) == [2] and doubling.sizes[2:] == [1]
    mixed = batcher.submit([example(1), example(2, 3), example(3)])  # batches have rows of one shape
    assert values(mixed) == [2, 4, 6] and mixed[1].result()["twice"].shape == (3,)
    assert batcher.warm([example(0), example(0, 3)]) == 4


def test_a_failure_is_one_example_s_alone(batcher):
    good, bad, other = batcher.submit([example(1), example(13), example(2)])
    assert values([good, other]) == [2, 4]
    with pytest.raises(RuntimeError, match="thirteen"):
        bad.result(10)


def test_a_full_queue_takes_all_of_a_request_or_nothing(batcher, doubling):
    doubling.gate.clear()
    first = batcher.submit([example(0)])
    while batcher.stats().running == 0:
        time.sleep(0.001)
    waiting = batcher.submit([example(i) for i in range(6)])
    with pytest.raises(Busy, match="6 inputs are waiting, of 8") as caught:
        batcher.submit([example(0)] * 3)
    assert caught.value.retry_after >= 1 and batcher.stats().queued == 6
    assert waiting[2].cancel()
    doubling.gate.set()
    assert values(first + waiting[:2] + waiting[3:]) == [0, 0, 2, 6, 8, 10]


def test_draining_finishes_and_gives_up_the_rest(batcher, doubling):
    assert batcher.drain(1) == 0
    with pytest.raises(Busy, match="shutting down"):
        batcher.submit([example(0)])
    slow = Batcher(doubling, max_wait=0, queue=8, sizes=(1,))
    doubling.gate.clear()
    futures = slow.submit([example(i) for i in range(3)])
    while slow.stats().running == 0:
        time.sleep(0.001)
    assert slow.drain(0.05) == 2
    doubling.gate.set()
    assert values(futures[:1]) == [0]
    with pytest.raises(concurrent.futures.CancelledError):
        futures[1].result(1)
    slow.close()
