"""The cache interface for models without a cache: each step recomputes all tokens.

Shapes: B rows, T tokens, S cache length, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp


def with_cache(model: Any) -> Any:
    """Return the model if it has a cache (see `models.cache`), else a wrapper that recomputes all tokens at each step."""
    if hasattr(model, "extend"):
        return model
    return UncachedEncoderDecoder(model) if hasattr(model, "encode") else UncachedModel(model)


class UncachedModel:
    """A causal model from tokens [B, T] to logits [B, T, V].

    Its cache holds each row's tokens, from position 0, and their number.
    """

    def __init__(self, model: Any):
        self.model = model

    def make_cache(self, batch: int, length: int, dtype: Any = None) -> dict[str, jax.Array]:
        """Return an empty cache for `batch` rows of `length` tokens; `dtype` is unused."""
        return {"tokens": jnp.zeros((batch, length), jnp.int32), "lengths": jnp.zeros(batch, jnp.int32)}

    def prefill(self, tokens: jax.Array, cache: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the next logits [B, V] after prompts, int [B, T] padded with -1 on the left, and the cache with them."""
        valid, T = tokens >= 0, tokens.shape[1]
        shifted = jax.vmap(jnp.roll)(jnp.maximum(tokens, 0), -jnp.argmax(valid, axis=1))
        filled = jax.lax.dynamic_update_slice(cache["tokens"], shifted[:, : cache["tokens"].shape[1]].astype(jnp.int32), (0, 0))
        lengths = valid.sum(axis=1).astype(jnp.int32)
        # The model reads only the T columns that hold tokens.
        return _last(self.model(filled[:, :T]), lengths), {"tokens": filled, "lengths": lengths}

    def extend(self, tokens: jax.Array, cache: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Append one token to each row, int [B], -1 for none. Return the next logits [B, V] and the cache."""
        filled, lengths = _append(tokens, cache["tokens"], cache["lengths"])
        return _last(self.model(filled), lengths), {"tokens": filled, "lengths": lengths}


class UncachedEncoderDecoder:
    """An encoder–decoder: `encode(source) -> memory` (arrays with B rows), and a causal `decode(target, memory) -> logits`."""

    def __init__(self, model: Any):
        self.model = model

    def make_cache(self, source: jax.Array, length: int) -> dict[str, Any]:
        """Encode the source, int [B, S], and return an empty cache for `length` target tokens."""
        empty = UncachedModel(None).make_cache(len(source), length)
        return empty | {"memory": self.model.encode(source)}

    def extend(self, tokens: jax.Array, cache: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        """Append one target token to each row, int [B], -1 for none. Return the next logits [B, V] and the cache."""
        filled, lengths = _append(tokens, cache["tokens"], cache["lengths"])
        return _last(self.model.decode(filled, cache["memory"]), lengths), cache | {"tokens": filled, "lengths": lengths}


def _append(tokens, filled, lengths):
    """Append one token to each row; -1 appends none."""
    places = jnp.where(tokens >= 0, lengths, filled.shape[1])
    filled = filled.at[jnp.arange(len(filled)), places].set(tokens, mode="drop")
    return filled, lengths + (tokens >= 0)


def _last(logits_BTV, lengths):
    return jnp.take_along_axis(logits_BTV, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
