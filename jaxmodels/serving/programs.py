"""The compiled functions of a served model. Each takes and returns arrays of a few shapes, which `Programs.warm` compiles in advance."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxmodels.errors import ConfigError
from jaxmodels.generation import rows as rows_lib
from jaxmodels.generation.generate import Generator
from jaxmodels.models import functional
from jaxmodels.models.cache import Packed, unpack
from jaxmodels.parallel import layout as layout_lib
from jaxmodels.parallel import mesh as mesh_lib
from jaxmodels.serving import state as state_lib

CHUNKS = (32, 64, 128, 256, 512)  # tokens of a prompt that are read at once
LENGTH = 128  # slots of the smallest state
_STEPS = 4  # that a part of a prompt may take the time of
Size = tuple[int, int]  # rows and slots of a state


class Programs:
    """The compiled functions of one model.

    A step computes all rows of a state and attends to all of its slots. So that few and short texts cost little, states have a few sizes.

    Attributes:
      rows, lengths: numbers of rows and of slots that a state may have, ascending.
      chunks: sizes in which prompts are read.
      part: how many tokens of prompts may be read between two steps, so that these are not held up for long; `warm` finds it.
      block: tokens of a prompt that are kept together for later ones.
      length: slots of the cache in which a prompt is read.
    """

    def __init__(self, generator: Generator, slots: int, context: int):
        """
        Args:
          generator: the model, its weights and their layout.
          slots: rows at most.
          context: tokens of a row at most; of an encoder–decoder, of the source, and of the target.

        Raises:
          ConfigError: the model cannot be served.
        """
        _check(generator, context)
        self.generator, self.context = generator, context
        self.source = source = context if generator.reads_sources else None  # tokens of a source at most, of an encoder–decoder
        ways = 1 if generator.layout is None else mesh_lib.batch_ways(generator.layout.mesh)
        self.rows = _sizes(ways, -(-slots // ways) * ways)
        self.lengths = _sizes(LENGTH, context)
        self.block, self.part = CHUNKS[0], CHUNKS[-1]
        self.length = -(-context // self.block) * self.block
        self.chunks = tuple(size for size in CHUNKS if size <= self.length) if source is None else _sizes(self.block, source)
        layout = generator.layout
        self._everywhere = None if layout is None else mesh_lib.replicated(layout.mesh)
        self._empty = jax.jit(self._on_model(state_lib.empty), static_argnums=(2, 3, 4, 5))
        self._reading = jax.jit(self._on_model(state_lib.reading_cache), static_argnums=(2, 3))
        self._read = jax.jit(self._on_model(_read), donate_argnums=2)
        self._score = jax.jit(self._on_model(functools.partial(_score, generator.known)), donate_argnums=2)
        self._source = jax.jit(self._on_model(state_lib.read_source), static_argnums=4)
        self._step = jax.jit(self._on_model(functools.partial(_step, generator.known)), donate_argnums=2)
        self._resize = jax.jit(self._on_model(state_lib.resize), static_argnums=(4, 5, 6))
        self._insert = jax.jit(self._in_layout(state_lib.insert), donate_argnums=0)
        self._cut = jax.jit(self._in_layout(state_lib.cut), static_argnums=2)
        self._paste = jax.jit(self._in_layout(state_lib.paste), donate_argnums=0)

    @property
    def keeps_prefixes(self) -> bool:
        """Whether what a prompt's tokens leave in the cache can be cut into blocks."""
        return not self.source and "layers" in jax.eval_shape(lambda: unpack(self.reading_cache()))  # not in recurrent models

    def empty(self) -> state_lib.State:
        """Return an empty state of the smallest size."""
        return self._empty(*self.generator.weights, self.rows[0], self.lengths[0], self.generator.dtype, self.source)

    def resize(self, state: state_lib.State, rows: list[int], length: int) -> state_lib.State:
        """Return the state with these rows and number of slots. It is compiled for the sizes next to that of the state, and for its own."""
        return self._resize(*self.generator.weights, state, np.array(rows, np.int32), length, self.generator.dtype, self.source)

    def reading_cache(self) -> Packed | None:
        """Return an empty cache for a prompt; None for an encoder–decoder, whose sources are read at once."""
        return None if self.source else self._reading(*self.generator.weights, self.length, self.generator.dtype)

    def read(self, reading: Packed, count: int, tokens: np.ndarray, adapter: int = 0) -> Packed:
        """Read tokens of a prompt, int32 [T] with T in `chunks`; `reading` is used up. Return the cache with them."""
        return self._read(*self.generator.weights, reading, np.int32(count), tokens[None], np.int32(adapter))

    def score(
        self, reading: Packed, count: int, tokens: np.ndarray, adapter: int, following: np.ndarray, alternatives: int
    ) -> tuple[Packed, dict[str, jax.Array]]:
        """As `read`. Also return the scores of the tokens that follow each, as of `rows.score`."""
        asked = np.full(len(tokens), alternatives, np.int32)
        return self._score(*self.generator.weights, reading, np.int32(count), tokens[None], np.int32(adapter), following, asked)

    def read_source(self, tokens: np.ndarray, adapter: int = 0) -> Packed:
        """Return the cache of a source, int32 [T] with T in `chunks`."""
        return self._source(*self.generator.weights, tokens[None], np.int32(adapter), self.source)

    def insert(self, state: state_lib.State, reading: Packed, row: int, tokens: np.ndarray, count: int, token: int) -> state_lib.State:
        """As `state.insert`; `state` is used up."""
        return self._insert(state, reading, np.int32(row), tokens, np.int32(count), np.int32(token))

    def step(self, state: state_lib.State, given: rows_lib.Settings, active: Any) -> tuple[state_lib.State, dict[str, jax.Array]]:
        """As `state.step`; `state` is used up."""
        return self._step(*self.generator.weights, state, given, active)

    def cut(self, reading: Packed, start: int) -> Any:
        """Return a block of a prompt's cache."""
        return self._cut(reading, np.int32(start), self.block)

    def paste(self, reading: Packed, block: Packed, start: int) -> Packed:
        """Return a prompt's cache with a block; `reading` is used up."""
        return self._paste(reading, block, np.int32(start))

    def next_to(self, size: Size) -> list[Size]:
        """Return the sizes of states that differ in one of rows and slots, and as little as possible."""
        row, length = self.rows.index(size[0]), self.lengths.index(size[1])
        near = lambda sizes, i: sizes[max(i - 1, 0) : i] + sizes[i + 1 : i + 2]  # noqa: E731
        return [(rows, size[1]) for rows in near(self.rows, row)] + [(size[0], slots) for slots in near(self.lengths, length)]

    def warm(self) -> None:
        """Compile everything. Then find how long a part of a prompt may be: one that takes no longer than some steps of all rows."""
        reading = self.reading_cache()
        for size in self.chunks:
            tokens = np.zeros(size, np.int32)
            if self.source:
                reading = self.read_source(tokens)
            else:
                reading, _ = self.score(self.read(reading, 0, tokens), 0, tokens, 0, tokens, 0)
        if self.keeps_prefixes:
            reading = self.paste(reading, self.cut(reading, 0), 0)
        states, seen = {(self.rows[0], self.lengths[0]): self.empty()}, set()
        while states:
            (rows, slots), state = states.popitem()
            seen.add((rows, slots))
            state = self.insert(state, reading, 0, np.full(slots, -1, np.int32), 0, 0)
            state, result = self.step(state, *self.settings((rows_lib.settings(rows), np.zeros(rows, bool))))
            for size in [(rows, slots), *self.next_to((rows, slots))]:
                other = self.resize(state, [0] * size[0], size[1])
                if size not in seen:
                    states[size] = other
            jax.block_until_ready((other, result))
            if (rows, slots) == (self.rows[-1], self.lengths[-1]):
                step = _seconds(lambda state=state, rows=rows: self.step(state, *self.settings((rows_lib.settings(rows), np.ones(rows, bool)))))
        if self.source is None:
            taken = {size: _seconds(lambda size=size: self.read(self.reading_cache(), 0, np.zeros(size, np.int32))) for size in self.chunks}
            self.part = max((size for size in self.chunks if taken[size] <= _STEPS * step), default=self.chunks[0])

    def settings(self, values: Any) -> Any:
        """Place what the host says of rows on the device."""
        return jax.device_put(values, self._everywhere)

    def compiled(self) -> int:
        """Return how many programs were compiled."""
        return sum(f._cache_size() for f in vars(self).values() if hasattr(f, "_cache_size"))

    def _on_model(self, function):
        """Return the function of (params, stats, …) for one of (model, …)."""
        g = self.generator

        def run(params, stats, *arguments):
            with layout_lib.use(g.layout):
                return function(functional.evaluation_model(g.graph, params, stats, g.dtype), *arguments)

        return run

    def _in_layout(self, function):
        def run(*arguments):
            with layout_lib.use(self.generator.layout):
                return function(*arguments)

        return run


def _seconds(call: Callable[[], Any]) -> float:
    """Return the seconds that a call takes until its results are there."""
    before = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - before


def limit(generator: Generator) -> int | None:
    """Return how many tokens a text may have; None if the model sets no limit.

    Where rotary positions depend on the length of a text, keys that were written for a shorter one are not those of a longer one. Such a model is
    served up to its original context, within which they are the same.
    """
    model = _model(generator)
    if getattr(model, "by_length", False):
        return min(model.context, model.rotary.scaling.original_context)
    return generator.context


def _check(generator, context):
    name = type(_model(generator)).__name__
    if not hasattr(_model(generator), "make_cache" if generator.reads_sources else "read"):
        methods = "make_cache and extend" if generator.reads_sources else "make_cache, extend and read"
        raise ConfigError(f"{name} cannot be served: it lacks the methods {methods} of jaxmodels.models.cache. Use jaxmodels generate.")
    if (most := limit(generator)) is not None and context > most:
        raise ConfigError(f"--context={context} is more than the {most} tokens that {name} can be served with here; --context={most} fits.")
    if context < 2:
        raise ConfigError(f"--context={context} must be at least 2.")


def _model(generator):
    return functional.evaluation_model(generator.graph, *generator.weights, generator.dtype)


def _sizes(first: int, last: int) -> tuple[int, ...]:
    """Return a few sizes up to the last: each is four times the one before."""
    return (last,) if first >= last else (first, *_sizes(4 * first, last))


def _read(model, *arguments):
    return state_lib.read_more(model, *arguments)[1]


def _score(known, model, reading, count, tokens_1T, adapter, following_T, alternatives_T):
    logits_1TV, reading = state_lib.read_more(model, reading, count, tokens_1T, adapter)
    return reading, rows_lib.score(logits_1TV[0], following_T, alternatives_T, known)


def _step(known, model, state, given, active_B):
    return state_lib.step(model, state, given, active_B, known)
