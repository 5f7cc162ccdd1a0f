"""Token after token, from a model with a cache: pure functions of arrays, which can be traced.

What goes on from one call to the next is a dict, `make_state`'s. One compiled `advance` serves all lengths, as well as
streaming: it takes as many steps as it is told, and stops when all rows have ended.

Shapes: B rows, P tokens of a prompt, N room for new tokens, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.generation import sampling
from jaxmodels.generation.full_forward import with_cache
from jaxmodels.generation.sampling import Shape
from jaxmodels.models.cache import pack, unpack
from jaxmodels.parallel.layout import constrain

GREEDY = sampling.Sampling().shape()
State = dict[str, Any]


def make_state(cache: dict, tokens_B: jax.Array, room: int, key: jax.Array, seen_BV: jax.Array | None, done_B: jax.Array | None = None) -> State:
    """Before anything is chosen.

    Args:
      cache: of the model.
      tokens_B: the next that each row's model reads, not in the cache yet.
      room: N.
      key: that all steps draw from.
      seen_BV: bool, tokens so far, where repetitions are penalised; else None.
      done_B: rows in which nothing is to be chosen.

    Returns:
      With `chosen` int32 [B, N], -1 where nothing is chosen yet, or nothing any more; `count`, how many columns of it are done;
      `done` bool [B].
    """
    B = len(tokens_B)
    state = {"cache": pack(cache), "tokens": tokens_B, "chosen": jnp.full((B, room), -1, jnp.int32), "count": jnp.zeros((), jnp.int32)}
    state |= {"done": jnp.zeros(B, bool) if done_B is None else done_B, "key": key}
    return state if seen_BV is None else state | {"seen": seen_BV}


def prefill(model: Any, tokens_BP: jax.Array, room: int, key: jax.Array, shape: Shape, dtype: Any) -> tuple[State, jax.Array]:
    """The state after prompts, int [B, P] with -1 before the tokens (a row of -1 alone stays empty), and the logits of what follows."""
    model = with_cache(model)
    B, P = tokens_BP.shape
    logits_BV, cache = model.prefill(tokens_BP, model.make_cache(B, P + room, dtype))
    seen_BV = see(jnp.zeros(logits_BV.shape, bool), tokens_BP) if shape.penalty else None
    return make_state(cache, tokens_BP[:, -1], room, key, seen_BV, (tokens_BP < 0).all(axis=1)), logits_BV


def begin(model: Any, source_BS: jax.Array, starts_B: jax.Array, room: int, key: jax.Array, shape: Shape) -> State:
    """The state of an encoder–decoder that has read sources, int [B, S] with -1 as padding, before the first token of their targets.

    `starts_B` are the tokens that targets begin with, -1 where there is to be none.
    """
    model, seen_BV = with_cache(model), None
    cache = model.make_cache(source_BS, room)
    if shape.penalty:
        logits_BV = jax.eval_shape(lambda tokens, cache: model.extend(tokens, cache)[0], starts_B, cache)
        seen_BV = see(jnp.zeros(logits_BV.shape, bool), starts_B[:, None])
    return make_state(cache, starts_B, room, key, seen_BV, starts_B < 0)


def advance(model: Any, state: State, steps: jax.Array, stopped_B: jax.Array, shape: Shape, numbers: Mapping, ends_E: jax.Array) -> State:
    """The state some tokens on.

    Args:
      state: of `prefill`, `begin` or `advance`.
      steps: to take at most; fewer where there is no room, or all rows have ended.
      stopped_B: rows that have ended for another reason than their tokens.
      shape, numbers: of a `Sampling`.
      ends_E: tokens that end a row, int32; each is the last that is chosen in its row.
    """
    model = with_cache(model)
    state = state | {"done": state["done"] | stopped_B}
    until = jnp.minimum(state["count"] + steps, state["chosen"].shape[1])

    def step(state):
        logits_BV, cache = model.extend(state["tokens"], unpack(state["cache"]))
        return take(state | {"cache": pack(cache)}, logits_BV, shape, numbers, ends_E)

    return jax.lax.while_loop(lambda state: (state["count"] < until) & ~state["done"].all(), step, state)


def take(state: State, logits_BV: jax.Array, shape: Shape, numbers: Mapping, ends_E: jax.Array) -> State:
    """The state with one more token, by these logits, of each row that has not ended; the model has not read it yet."""
    key = jax.random.fold_in(state["key"], state["count"])
    tokens_B = sampling.choose(logits_BV, shape, numbers, key, state.get("seen"))
    tokens_B = jnp.where(state["done"], -1, tokens_B)
    chosen = jax.lax.dynamic_update_slice(state["chosen"], tokens_B[:, None], (0, state["count"]))
    done = state["done"] | (tokens_B[:, None] == ends_E).any(axis=1)
    state = state | {"tokens": tokens_B, "chosen": constrain(chosen, None, None), "count": state["count"] + 1, "done": constrain(done, None)}
    return state | {"seen": see(state["seen"], tokens_B[:, None])} if shape.penalty else state


def see(seen_BV: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Which tokens each row holds, with some more; -1 is none."""
    V = seen_BV.shape[1]
    return seen_BV.at[jnp.arange(len(tokens_BT))[:, None], jnp.where(tokens_BT >= 0, tokens_BT, V)].set(True, mode="drop")


def sample(model: Any, first: int, length: int, key: jax.Array, *, temperature: float = 1.0) -> jax.Array:
    """A text that a model makes up after one token: int32 [length].

    Where the model's context is full, it goes on from the second half of it: the first half is forgotten.

    Args:
      model: with a cache, or any that maps int [B, T] to logits [B, T, V], those at t seeing tokens 0..t.
      first: the token.
      length: tokens to draw.
      key: of the drawing.
      temperature: divides the logits; 0 takes the likeliest token.
    """
    model, none = with_cache(model), (jnp.zeros(1, bool), jnp.zeros(0, jnp.int32))
    settings = sampling.Sampling(temperature=temperature)
    shape, numbers = settings.shape(), settings.numbers()
    room = min(length, max(1, getattr(model, "context", length + 1) - 1))
    state = make_state(model.make_cache(1, room), jnp.full(1, first, jnp.int32), room, key, None)
    begun_R = advance(model, state, room, none[0], shape, numbers, none[1])["chosen"][0]
    if room == length:
        return begun_R
    half = (room + 1) // 2

    def go_on(tail_H, key):
        state, logits_1V = prefill(model, tail_H[None], half, key, shape, jnp.float32)
        state = take(state, logits_1V, shape, numbers, none[1])
        tail_H = advance(model, state, half - 1, none[0], shape, numbers, none[1])["chosen"][0]
        return tail_H, tail_H

    keys = jax.random.split(jax.random.fold_in(key, room), -(-(length - room) // half))
    _, rest_NH = jax.lax.scan(go_on, begun_R[-half:], keys)
    return jnp.concatenate([begun_R, rest_NH.reshape(-1)])[:length]


def greedy(model: Any, source: jax.Array, length: int, *, start: int, end: int) -> jax.Array:
    """The likeliest token at each place of a target, given those chosen before it, until `end`.

    Args:
      model: an encoder–decoder with a cache, or one with `encode(source) -> memory` and `decode(target, memory) -> logits`.
      source: int [B, S], -1 is padding.
      length: tokens to choose at most.
      start, end: the tokens that a target begins and ends with.

    Returns:
      int32 [B, length]: what follows `start`, with `end` where it is reached, and -1 after it.
    """
    state = begin(model, source, jnp.full(len(source), start, jnp.int32), length, jax.random.key(0), GREEDY)
    return advance(model, state, length, jnp.zeros(len(source), bool), GREEDY, {}, jnp.array([end], jnp.int32))["chosen"]
