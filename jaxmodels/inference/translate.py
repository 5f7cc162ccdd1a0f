"""Sequences from an encoder–decoder."""

import jax
import jax.numpy as jnp


def greedy(model, source: jax.Array, length: int, *, start: int, end: int) -> jax.Array:
    """The likeliest token at each place, given those chosen before it, until `end`.

    Traceable. A model that goes on from states (`decode_from`) reads each token once; another reads its whole output
    anew for each token, which costs `length` times as much as one reading.

    Args:
      model: with `encode(source) -> memory` and `decode(target, memory) -> logits`, those at t seeing target 0..t.
      source: int [B, S], -1 is padding.
      length: tokens to choose at most.
      start, end: the tokens that a target begins and ends with.

    Returns:
      int32 [B, length]: what follows `start`, with `end` where it is reached, and -1 after it.
    """
    memory = model.encode(source)
    if hasattr(model, "decode_from"):
        tokens = _from_states(model, memory, len(source), length, start)
    else:
        tokens = _from_prefixes(model, memory, len(source), length, start)
    ended = jnp.cumsum(tokens == end, axis=1) - (tokens == end)
    return jnp.where(ended > 0, -1, tokens)


def _from_states(model, memory, batch: int, length: int, start: int):
    def step(carry, _):
        token, states = carry
        logits, states = model.decode_from(token[:, None], memory, states)
        token = jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32)
        return (token, states), token

    first = jnp.full(batch, start, jnp.int32)
    _, tokens = jax.lax.scan(step, (first, memory["states"]), None, length=length)
    return tokens.T


def _from_prefixes(model, memory, batch: int, length: int, start: int):
    def step(position, tokens):
        # What lies after the position is not seen, and written over in its turn.
        logits = jnp.take(model.decode(tokens[:, :-1], memory), position, axis=1)
        chosen = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.lax.dynamic_update_slice_in_dim(tokens, chosen[:, None], position + 1, axis=1)

    tokens = jnp.full((batch, length + 1), start, jnp.int32)
    return jax.lax.fori_loop(0, length, step, tokens)[:, 1:]
