"""Batches by step number: order of examples, reading ahead with Grain, placement on devices.

The batch of step s is a pure function of (seed, s), so a resumed run starts reading at its step.
"""

import collections
import dataclasses
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from jaxmodels.data import order
from jaxmodels.data.rand_augment import RandAugment
from jaxmodels.data.random_crop import RandomResizedCrop
from jaxmodels.data.reading import ReadError, read
from jaxmodels.data.source import DataSource
from jaxmodels.errors import Interrupted, RunError

Batch = dict[str, np.ndarray]

_BLOCK = 4096  # positions whose permutation is computed at once
_CLOSE_SECONDS = 5.0  # for worker processes to end by themselves
_KILLED_SECONDS = 1.0  # for what they leave to be cleared up, after they are killed


class TrainingBatches:
    """Random access to the training batches: `[s]` has this process's rows of the batch of step s + 1.

    Each epoch uses every example once, in its own order; a batch may span two epochs.
    """

    def __init__(
        self,
        source: DataSource,
        batch_size: int,
        steps: int,
        *,
        seed: int,
        shuffle: bool,
        window: int | None = None,
        offset: int = 0,
        rows: np.ndarray | None = None,
        crop: Callable[[Callable, np.ndarray, np.ndarray], Batch] | None = None,
        transform: Callable[[Batch, np.ndarray], Batch] | None = None,
        name: str = "the data",
    ):
        """
        Args:
          source: the examples.
          batch_size: rows of the global batch.
          steps: number of batches.
          seed: seed of the order.
          shuffle: whether each epoch has its own order; otherwise the source's order.
          window: number of groups of the source that are shuffled together (see `order.Windows`); None shuffles all examples.
          offset: the batch of step s + 1 begins at position offset + s * batch_size of the sequence of all epochs; not 0 after earlier
            steps of another batch size, and then valid for later steps only.
          rows: indices of the rows of the global batch that this process reads, increasing; all by default.
          crop: reads examples with their images cropped, as `RandomResizedCrop.read`: a function of (function that reads examples, indices, positions).
          transform: function of a batch and the positions of its rows in the sequence of all epochs, int [rows]; must be pure.
          name: of source and split, for errors.
        """
        self.source, self.batch_size, self.steps, self.crop, self.transform, self.name = source, batch_size, steps, crop, transform, name
        self.seed, self.shuffle, self.offset = seed, shuffle, offset
        self.windows = order.Windows(order.groups_of(source, name).ends, window, seed) if shuffle and window else None
        self.rows = np.arange(batch_size) if rows is None else rows
        self._block = functools.lru_cache(maxsize=8)(self._compute_block)

    def __getstate__(self):  # each worker process has its own cache
        return {key: value for key, value in self.__dict__.items() if key != "_block"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._block = functools.lru_cache(maxsize=8)(self._compute_block)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        start = self.offset + step * self.batch_size
        first, last = start + self.rows[0], start + self.rows[-1]
        indices, reader = self.indices(first, last + 1)[self.rows - self.rows[0]], functools.partial(read, self.source, name=self.name)
        batch = reader(indices) if self.crop is None else self.crop(reader, indices, start + self.rows)
        if self.transform is not None:
            batch = self.transform(batch, start + self.rows)
        return _weighted(batch, np.ones(len(self.rows), np.float32))

    def indices(self, start: int, stop: int) -> np.ndarray:
        """Return the examples at the positions [start, stop) of the sequence of all epochs."""
        parts = []
        while start < stop:
            block, offset = divmod(start, _BLOCK)
            end = min(stop, (block + 1) * _BLOCK)
            parts.append(self._block(block)[offset : offset + end - start])
            start = end
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _compute_block(self, block: int) -> np.ndarray:
        size = len(self.source)
        epochs, within = np.divmod(np.arange(block * _BLOCK, (block + 1) * _BLOCK), size)
        if not self.shuffle:
            return within
        result = np.empty(_BLOCK, np.int64)
        for epoch in range(epochs[0], epochs[-1] + 1):
            here = epochs == epoch
            if self.windows is None:
                result[here] = order.shuffled(within[here], size, self.seed, int(epoch))
            else:
                result[here] = self.windows.order(within[here], int(epoch))
        return result


class EvaluationBatches:
    """Random access to batches that hold each example exactly once, in order. Rows of weight 0 fill the last batch.

    A batch also has an array `index`, int32 [B]: each row's index in the split.
    """

    def __init__(self, source: DataSource, batch_size: int, *, rows: np.ndarray | None = None, name: str = "the data"):
        self.source, self.batch_size, self.name = source, batch_size, name
        self.rows = np.arange(batch_size) if rows is None else rows

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch_size)

    def __getitem__(self, number: int) -> Batch:
        rows = number * self.batch_size + self.rows
        real = rows < len(self.source)
        batch = _weighted(read(self.source, np.where(real, rows, 0), self.name), real.astype(np.float32))
        return batch | {"index": rows.astype(np.int32)}


def _weighted(batch: Batch, real: np.ndarray) -> Batch:
    """Return the batch with the `weight` of each row: 1, or the example's own; 0 for padding rows and skipped examples.

    Args:
      batch: may have `weight` and `skipped` (see `data.skipping`).
      real: float32 [B], 0 for padding rows.
    """
    weight = real * np.asarray(batch.get("weight", 1), np.float32)
    if "skipped" in batch:
        skipped = real * batch["skipped"]
        return batch | {"skipped": skipped, "weight": weight * (1 - skipped)}
    return batch | {"weight": weight}


def read_ahead(batches: Sequence[Batch], *, start: int = 0, threads: int, workers: int, buffer: int) -> "Stream":
    """Return an iterator over batches from number `start` on, in order, read ahead with Grain.

    It is a context manager that ends its threads and processes.

    Args:
      batches: random access by number.
      start: first batch; the cost does not depend on it.
      threads: threads that read and decode in this process; 0 reads on demand, in the caller's thread.
      workers: processes that read and decode, instead of threads; 0 for none.
      buffer: number of batches read ahead.
    """
    dataset = grain.MapDataset.source(batches)[start:]
    if workers or not threads:
        options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    else:  # a smaller buffer would leave threads idle
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(buffer, threads))
    stream = dataset.to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain's processes read absl flags, which only absl programs parse
            flags.FLAGS.mark_as_parsed()
        stream = stream.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=max(1, buffer // workers)), worker_init_fn=_start_worker
        )
    return Stream(stream, workers)


def _start_worker(_index: int, _count: int) -> None:
    """Prepare a worker process. It ends with the training process, also when that is killed: Grain's own end needs a living parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the training process decides when to stop reading

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


class Stream:
    """Iterator over the batches of `read_ahead`.

    As a context manager it ends what reads ahead. After an error or a signal it does so by force and hardly waits: a reader may hang
    for ever, and the state of the run has to be saved.
    """

    def __init__(self, dataset: grain.IterDataset, workers: int):
        self._workers = workers
        self._before = {child.pid for child in multiprocessing.active_children()} if workers else set()
        self._iterator = iter(dataset)

    def __iter__(self):
        return self

    def __next__(self) -> Batch:
        try:
            return next(self._iterator)
        except (StopIteration, RunError):
            raise
        except Exception as error:  # of Grain itself, such as the death of a worker process
            raise ReadError(f"the data cannot be read: {type(error).__name__}: {' '.join(str(error).split())[:300]}.") from error

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.close(_CLOSE_SECONDS if kind is None else 0.0)

    def close(self, seconds: float = _CLOSE_SECONDS) -> None:
        """End threads and worker processes. Worker processes that have not ended after `seconds` are killed."""
        if not self._workers:
            self._iterator.close()  # threads end by themselves after what they read now
            return
        closing = threading.Thread(target=self._iterator.close, daemon=True)
        if seconds > 0:
            closing.start()
            closing.join(seconds)
        for child in multiprocessing.active_children():
            if child.pid not in self._before and child.name.startswith("grain-"):
                child.kill()  # also ends a process that is stopped
        if seconds <= 0:
            closing.start()
        closing.join(_KILLED_SECONDS)


class DeviceFeed:
    """Iterator over batches on the devices, `ahead` of which are placed in advance. An error of the reader is raised after the batches before it.

    Attributes:
      error: of the reader; None while there is none.
    """

    def __init__(self, batches: Iterator[Batch], place: Callable[[Batch], Any], ahead: int = 2):
        self._batches, self._place, self.ahead = batches, place, ahead
        self._queue = collections.deque()
        self.error: RunError | None = None

    def fill(self) -> None:
        """Read the next batch and those ahead of it."""
        while self.error is None and len(self._queue) <= self.ahead:
            try:
                batch = next(self._batches, None)
            except Interrupted:
                raise
            except RunError as error:
                error.state_is_good = True
                self.error = error
                return
            if batch is None:
                return
            self._queue.append(self._place(batch))

    def take(self) -> Any:
        """Return the next batch, which `fill` has read; raise the error in its place."""
        if not self._queue:
            raise self.error or StopIteration
        return self._queue.popleft()

    def __iter__(self):
        return self

    def __next__(self):
        self.fill()
        return self.take()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loading:
    """Keys of the `data` section that all sources share.

    Attributes:
      batch_size: examples in one step, over all devices and accumulation steps.
      eval_batch_size: examples in one evaluation step; `batch_size` by default.
      shuffle: whether each epoch has its own order; otherwise the source's order.
      shuffle_window: number of groups that are shuffled together, for sources whose rows are decoded in groups (row groups of Parquet, blocks of
        compressed files): an epoch takes the groups in random order, that many at a time, and decodes each once. By default all rows are shuffled.
      balance: whether training sees each class equally often: examples of the rarer ones repeat until the largest class has been seen whole.
      threads: threads that read ahead; by default none for sources in memory, else 16.
      workers: processes that read ahead, instead of threads.
      buffer: number of batches read ahead.
      memory_gb: maximum size in GiB of a split that is decoded once and cached in memory; no effect with `workers`.
      random_resized_crop: a random window of every training image, scaled to its size, on the host, where it is decoded (Szegedy et al. 2015); a section,
        {} for its defaults.
      rand_augment: random operations on every training image, on the host (Cubuk et al. 2020); a section, {} for its defaults.
    """

    batch_size: int
    eval_batch_size: int | None = None
    shuffle: bool = True
    shuffle_window: int | None = None
    balance: bool = False
    threads: int | None = None
    workers: int = 0
    buffer: int = 4
    memory_gb: float = 1.0
    random_resized_crop: RandomResizedCrop | None = None
    rand_augment: RandAugment | None = None
