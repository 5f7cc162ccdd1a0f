"""Autoregressive decoding with a cache, as pure functions of arrays that can be traced.

The decoding state is the dict of `make_state`. One compiled `advance` serves all lengths and streaming: its number of steps is an
argument, and it stops early when all rows have ended.

Shapes: B rows, P tokens of a prompt, N new tokens at most, V vocabulary.
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


def make_state(cache: dict, tokens_B: jax.Array, max_new_tokens: int, key: jax.Array, seen_BV: jax.Array | None, done_B: jax.Array | None = None) -> State:
    """Return the state before the first new token.

    Args:
      cache: of the model.
      tokens_B: the next input token of each row, not in the cache yet.
      max_new_tokens: N.
      key: random key of all steps.
      seen_BV: bool, tokens so far, for the repetition penalty; None without one.
      done_B: rows that generate nothing.

    Returns:
      A dict with `chosen` int32 [B, N], -1 at positions without a token; `count`, the number of filled columns; `done` bool [B]; and others.
    """
    B = len(tokens_B)
    state = {"cache": pack(cache), "tokens": tokens_B, "chosen": jnp.full((B, max_new_tokens), -1, jnp.int32), "count": jnp.zeros((), jnp.int32)}
    state |= {"done": jnp.zeros(B, bool) if done_B is None else done_B, "key": key}
    return state if seen_BV is None else state | {"seen": seen_BV}


def prefill(model: Any, tokens_BP: jax.Array, max_new_tokens: int, key: jax.Array, shape: Shape, dtype: Any) -> tuple[State, jax.Array]:
    """Return the state after left-padded prompts, int [B, P] with -1 as padding, and the next token's logits. A row of padding generates nothing."""
    model = with_cache(model)
    B, P = tokens_BP.shape
    logits_BV, cache = model.prefill(tokens_BP, model.make_cache(B, P + max_new_tokens, dtype))
    seen_BV = mark_seen(jnp.zeros(logits_BV.shape, bool), tokens_BP) if shape.penalty else None
    return make_state(cache, tokens_BP[:, -1], max_new_tokens, key, seen_BV, (tokens_BP < 0).all(axis=1)), logits_BV


def begin(model: Any, source_BS: jax.Array, starts_B: jax.Array, max_new_tokens: int, key: jax.Array, shape: Shape) -> State:
    """Return the state of an encoder–decoder after its sources, int [B, S] with -1 as padding, before the first target token.

    `starts_B` holds the start tokens; a row with -1 generates nothing.
    """
    model, seen_BV = with_cache(model), None
    cache = model.make_cache(source_BS, max_new_tokens)
    if shape.penalty:
        logits_BV = jax.eval_shape(lambda tokens, cache: model.extend(tokens, cache)[0], starts_B, cache)
        seen_BV = mark_seen(jnp.zeros(logits_BV.shape, bool), starts_B[:, None])
    return make_state(cache, starts_B, max_new_tokens, key, seen_BV, starts_B < 0)


def advance(model: Any, state: State, steps: jax.Array, stopped_B: jax.Array, shape: Shape, numbers: Mapping, eos_ids: jax.Array) -> State:
    """Return the state after up to `steps` more tokens.

    Args:
      state: of `prefill`, `begin` or `advance`.
      steps: maximum number of steps; fewer if N is reached or all rows have ended.
      stopped_B: rows that the caller ends, as at a stop string.
      shape, numbers: of a `Sampling`.
      eos_ids: int32 [E], end tokens; the end token is the last one chosen in its row.
    """
    model = with_cache(model)
    state = state | {"done": state["done"] | stopped_B}
    until = jnp.minimum(state["count"] + steps, state["chosen"].shape[1])

    def step(state):
        logits_BV, cache = model.extend(state["tokens"], unpack(state["cache"]))
        return choose_next(state | {"cache": pack(cache)}, logits_BV, shape, numbers, eos_ids)

    return jax.lax.while_loop(lambda state: (state["count"] < until) & ~state["done"].all(), step, state)


def choose_next(state: State, logits_BV: jax.Array, shape: Shape, numbers: Mapping, eos_ids: jax.Array) -> State:
    """Choose the next token of each row that has not ended; return the state with it. The model has not read it yet."""
    key = jax.random.fold_in(state["key"], state["count"])
    tokens_B = sampling.choose(logits_BV, shape, numbers, key, state.get("seen"))
    tokens_B = jnp.where(state["done"], -1, tokens_B)
    chosen = jax.lax.dynamic_update_slice(state["chosen"], tokens_B[:, None], (0, state["count"]))
    done = state["done"] | (tokens_B[:, None] == eos_ids).any(axis=1)
    state = state | {"tokens": tokens_B, "chosen": constrain(chosen, None, None), "count": state["count"] + 1, "done": constrain(done, None)}
    return state | {"seen": mark_seen(state["seen"], tokens_B[:, None])} if shape.penalty else state


def mark_seen(seen_BV: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Mark more tokens as seen in each row; -1 marks none."""
    V = seen_BV.shape[1]
    return seen_BV.at[jnp.arange(len(tokens_BT))[:, None], jnp.where(tokens_BT >= 0, tokens_BT, V)].set(True, mode="drop")


def sample(model: Any, first: int, length: int, key: jax.Array, *, temperature: float = 1.0) -> jax.Array:
    """Sample a text of any length after one token: int32 [length].

    When the model's context is full, its first half is dropped.

    Args:
      model: with a cache, or a causal model from int [B, T] to logits [B, T, V].
      first: id of the first token.
      length: number of tokens to sample.
      key: random key.
      temperature: divides the logits; 0 is greedy decoding.
    """
    model, none = with_cache(model), (jnp.zeros(1, bool), jnp.zeros(0, jnp.int32))
    settings = sampling.Sampling(temperature=temperature)
    shape, numbers = settings.shape(), settings.numbers()
    max_new_tokens = min(length, max(1, getattr(model, "context", length + 1) - 1))
    state = make_state(model.make_cache(1, max_new_tokens), jnp.full(1, first, jnp.int32), max_new_tokens, key, None)
    begun_R = advance(model, state, max_new_tokens, none[0], shape, numbers, none[1])["chosen"][0]
    if max_new_tokens == length:
        return begun_R
    half = (max_new_tokens + 1) // 2

    def go_on(tail_H, key):
        state, logits_1V = prefill(model, tail_H[None], half, key, shape, jnp.float32)
        state = choose_next(state, logits_1V, shape, numbers, none[1])
        tail_H = advance(model, state, half - 1, none[0], shape, numbers, none[1])["chosen"][0]
        return tail_H, tail_H

    keys = jax.random.split(jax.random.fold_in(key, max_new_tokens), -(-(length - max_new_tokens) // half))
    _, rest_NH = jax.lax.scan(go_on, begun_R[-half:], keys)
    return jnp.concatenate([begun_R, rest_NH.reshape(-1)])[:length]


def greedy(model: Any, source: jax.Array, length: int, *, start: int, end: int) -> jax.Array:
    """Decode targets greedily until `end`.

    Args:
      model: an encoder–decoder with a cache, or one with `encode(source) -> memory` and `decode(target, memory) -> logits`.
      source: int [B, S], -1 is padding.
      length: maximum number of new tokens.
      start, end: ids of the first and the last token of a target.

    Returns:
      int32 [B, length]: the tokens after `start`, including `end`, then -1.
    """
    state = begin(model, source, jnp.full(len(source), start, jnp.int32), length, jax.random.key(0), GREEDY)
    return advance(model, state, length, jnp.zeros(len(source), bool), GREEDY, {}, jnp.array([end], jnp.int32))["chosen"]
