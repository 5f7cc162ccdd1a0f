"""An engine that generates for many requests at once: continuous batching (Yu et al. 2022, Orca).

A request waits in a queue until a row of the batch is free. Its prompt is read in parts, between the steps of the other rows, so that a long one
holds nobody up. Then its row takes part in each step, until the text ends. All of this happens in one thread, which is also the only one that touches
the device; callers only add to the queue. A step is started before the tokens of the one before are looked at, so the device does not wait for the
host; a row that turns out to have ended then computes one token in vain.
"""

import collections
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from jaxmodels.errors import ConfigError, RunError
from jaxmodels.generation.generate import Generator
from jaxmodels.inference.adapters import with_adapters
from jaxmodels.inference.run import Run
from jaxmodels.parallel import mesh as mesh_lib
from jaxmodels.serving import memory
from jaxmodels.serving.batch import Batch
from jaxmodels.serving.programs import Programs, limit
from jaxmodels.serving.prompts import Prompts
from jaxmodels.serving.requests import Busy, Event, Request, Stats
from jaxmodels.serving.text import Text

_CONTEXT = 2048  # tokens of a row, of models that set no limit


class Engine:
    """Rows, a queue, and the thread that works on both; see `serving.requests` for what callers exchange with it.

    Attributes:
      generator: the model.
      slots: rows at most.
      context: tokens of a row at most, prompt and answer together; of an encoder–decoder, of the source, and of the target.
      queue_limit: requests that may wait.
      failure: why the engine has ended; None while it works.
    """

    def __init__(
        self,
        generator: Generator,
        *,
        slots: int | None = None,
        context: int | None = None,
        queue: int = 256,
        prefix_tokens: int | None = None,
        adapters: Iterable[str] = (),
    ):
        """
        Args:
          generator: the model, prepared for generation.
          slots: rows of the batch, rounded up to a multiple of the devices that share them. The default is that of `memory.default_slots`.
          context: at most that of the model (`programs.limit`), which is the default; 2048 for a model that sets no limit.
          queue: requests that may wait.
          prefix_tokens: tokens of prompts whose keys and values are kept for later prompts. The default is a quarter of what all rows hold.
          adapters: names of the adapters that the model holds (`models.lora_rows`), in their order.

        Raises:
          ConfigError: the model cannot be served.
        """
        for name, value in (("slots", slots), ("context", context), ("queue", queue)):
            if value is not None and value < 1:
                raise ConfigError(f"--{name}={value} must be at least 1.")
        self.generator, self.queue_limit, self.context = generator, queue, context or limit(generator) or _CONTEXT
        self.programs = Programs(generator, slots or memory.default_slots(generator, self.context), self.context)
        self.slots = self.programs.rows[-1]
        self._batch = Batch(self.programs)
        self._prompts = Prompts(self.programs, self.slots * self.context // 4 if prefix_tokens is None else prefix_tokens)
        self._pending: tuple[list[tuple[int, Text]], dict] | None = None  # the texts of the last step, and its results
        self._change = threading.Condition()
        self._queue: collections.deque[Text] = collections.deque()
        self._live: set[Text] = set()
        self._admits, self._closed, self._generated, self._seconds = True, False, 0, 1.0  # seconds that a request takes
        self._adapters = {None: 0} | {name: number for number, name in enumerate(adapters, 1)}
        self.failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def warm(self) -> None:
        """Compile everything: no request compiles after this."""
        self.programs.warm()

    def start(self) -> "Engine":
        """Start the thread."""
        self._thread.start()
        return self

    def submit(self, request: Request, deliver: Callable[[Event], None]) -> Text:
        """As `serving.requests` says.

        Raises:
          ConfigError: the request cannot be served.
          Busy: the queue is full, or the engine takes no more requests.
          RunError: the engine has failed.
        """
        text = Text(request, deliver, self._limit(request), self._adapters[request.adapter], self.generator, self._wake)
        with self._change:
            if self.failure is not None:
                raise RunError(f"the engine has ended: {self.failure}")
            if not self._admits:
                raise Busy("the server is shutting down and takes no more requests; try another one", 5.0)
            if len(self._queue) >= self.queue_limit:
                wait = max(1.0, self._seconds * len(self._queue) / self.slots)
                raise Busy(f"{len(self._queue)} requests are waiting, and no more may (--queue); try again in {wait:.0f} s", wait)
            self._queue.append(text)
            self._live.add(text)
            self._change.notify_all()
        return text

    def stats(self) -> Stats:
        """As `serving.requests` says."""
        texts, prompts = self._batch.texts, self._prompts
        return Stats(
            slots=self.slots,
            running=len(texts),
            queued=len(self._queue),
            queue_limit=self.queue_limit,
            cache_tokens=self.slots * self.context,
            cache_used=sum(text.held for text in texts),
            generated=self._generated,
            prompts=prompts.read,
            prefix_hits=prompts.shared,
            steps=self._batch.steps,
        )

    def describe(self) -> str:
        """Return a line that says how many tokens the engine holds, and their bytes."""
        layout = self.generator.layout
        rows = self.slots if layout is None else self.slots // mesh_lib.batch_ways(layout.mesh)
        size = f"{rows * memory.row_bytes(self.generator, self.context) / 1e6:,.0f} MB" + ("" if layout is None else " on each device")
        held = f"{self.slots} slots of {self.context:,} tokens, {self.slots * self.context:,} in all, {size}"
        if self.context < (self.generator.context or 0) and limit(self.generator) < self.generator.context:
            held += f" (of the model's {self.generator.context:,}: beyond, its rotary positions change with the length of a text)"
        return f"{held}; beginnings that prompts share: {f'up to {self._prompts.kept:,} tokens' if self._prompts.kept else 'not kept'}"

    def drain(self, seconds: float) -> int:
        """As `serving.requests` says."""
        until = time.monotonic() + seconds
        with self._change:
            self._admits = False
            while self._live and (left := until - time.monotonic()) > 0:
                self._change.wait(left)
            rest = list(self._live)
        for text in rest:
            text.cancel()
        return len(rest)

    def close(self) -> None:
        """End the thread. Requests that are left are cancelled."""
        with self._change:
            self._closed, self._admits = True, False
            self._change.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def _limit(self, request: Request) -> int:
        """Return how many tokens a request may generate; ConfigError if it cannot be served."""
        count, vocab_size, sources = len(request.tokens), self.generator.vocab_size, self.generator.reads_sources
        if not count:
            raise ConfigError("the prompt is empty: give at least one token.")
        if not all(0 <= token < vocab_size for token in request.tokens):
            raise ConfigError(f"the prompt must be token ids, whole numbers from 0 to {vocab_size - 1}.")
        if request.adapter not in self._adapters:
            raise ConfigError(f"there is no adapter {request.adapter!r}; there are {', '.join(list(self._adapters)[1:]) or 'none'}.")
        if request.stop and self.generator.tokenizer is None:
            raise ConfigError(f"stop={request.stop[0]!r} needs a tokenizer, and the model has none.")
        if sources and request.echo and request.logprobs is not None:
            raise ConfigError("echo with logprobs scores the tokens of a prompt, and an encoder–decoder scores none of its source: leave out echo.")
        if count > self.context:
            raise ConfigError(f"the prompt has {count} tokens, and the context is {self.context}: shorten it.")
        left = self.context if sources else self.context - count
        if left == 0 and request.max_tokens != 0:
            raise ConfigError(f"the prompt has {count} tokens, and the context is {self.context} including new tokens: shorten it.")
        if request.max_tokens is not None and not 0 <= request.max_tokens <= left:
            raise ConfigError(f"max_tokens={request.max_tokens} does not fit: a prompt of {count} tokens leaves {left} of the context of {self.context}.")
        return left if request.max_tokens is None else request.max_tokens

    def _wake(self) -> None:
        with self._change:
            self._change.notify_all()

    # What follows runs in the engine's thread.

    def _run(self) -> None:
        reason, message = "cancelled", None
        try:
            while self._waits():
                self._turn()
        except Exception as error:  # of the device, or a bug: the state is lost
            reason, message = "error", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            print(f"jaxmodels: the engine has ended: {message}", file=sys.stderr)
        with self._change:
            self.failure, self._admits, left = message, False, list(self._live)
            self._live.clear()
            self._queue.clear()
            self._change.notify_all()
        for text in left:
            text.end(reason, error=message)

    def _waits(self) -> bool:
        """Wait until there is something to do; return False once the engine is closed."""
        with self._change:
            while not (self._closed or self._queue or self._pending or self._prompts.text or self._batch.texts):
                self._change.wait()
            return not self._closed

    def _turn(self) -> None:
        """Read some of a prompt, start a step, and look at the results of the one before."""
        self._drop_cancelled()
        self._read()
        before, self._pending = self._pending, self._batch.step() if self._batch.texts else None
        if before is not None:
            self._look(*before)

    def _drop_cancelled(self) -> None:
        with self._change:
            cancelled = [text for text in self._live if text.cancelled]
            for text in cancelled:
                if text in self._queue:
                    self._queue.remove(text)
        if self._prompts.text in cancelled:
            self._prompts.drop()
        for text in cancelled:
            self._finish(text, "cancelled")

    def _read(self) -> None:
        """Read prompts until as many tokens were read as may be between two steps, or there is no prompt or row left."""
        left = self.programs.part if self._batch.texts else self.programs.chunks[-1]
        while left > 0 and self._next():
            text = self._prompts.text
            size, done = self._prompts.read_part(left)
            left -= size
            if done is not None and text.limit:
                self._batch.add(text, *done)
            elif done is not None:
                self._finish(text, "length")

    def _next(self) -> bool:
        """Return whether there is a prompt to be read: the one at hand, or the next in the queue if a row is free."""
        if self._prompts.text is None:
            with self._change:
                if not self._queue or len(self._batch.texts) == self.slots:
                    return False
                text = self._queue.popleft()
            self._prompts.begin(text)
        return True

    def _look(self, held: list[tuple[int, Text]], results: dict[str, Any]) -> None:
        """Give the tokens of a step to their texts."""
        tokens, scored = np.asarray(results["next"]), any(text.request.logprobs is not None for _, text in held)
        scores = {name: np.asarray(x) for name, x in results.items()} if scored else {}
        for row, text in held:
            if not text.ended:  # one that has ended computed this token in vain
                text.add(int(tokens[row]), scores, row)
                self._generated += 1
                if text.ended:
                    self._finish(text)

    def _finish(self, text: Text, reason: str = "cancelled") -> None:
        """End a text, unless it has ended, and free its row."""
        text.end(reason)
        self._batch.remove(text)
        with self._change:
            self._seconds += 0.1 * (time.monotonic() - text.since - self._seconds)
            self._live.discard(text)
            self._change.notify_all()


def for_run(
    run: Run,
    *,
    slots: int | None = None,
    context: int | None = None,
    queue: int = 256,
    precision: str = "float32",
    adapters: Mapping[str, str] | None = None,
) -> Engine:
    """Return an engine for a run of the task `language_model` or `seq2seq`. It is neither warm nor started.

    Args:
      run: of `load`.
      slots, context, queue: as of `Engine`.
      precision: `float32`, `bfloat16` or `int8`, as of `Run.generate`.
      adapters: name -> run that trained adapters of this one, to be served on one copy of its weights; see `inference.adapters`.

    Raises:
      ConfigError: the run does not generate text; or as `Engine`.
    """
    adapters = adapters or {}
    generator = run.generator(precision, with_adapters(run, adapters) if adapters else None)
    return Engine(generator, slots=slots, context=context, queue=queue, adapters=adapters)
