"""Models without a cache, in the form of those that have one: they read all there is anew for each token.

Shapes: B rows, T tokens, S room for tokens, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp


def with_cache(model: Any) -> Any:
    """The model itself where it has a cache (see `models.cache`), else one around it that reads anew."""
    if hasattr(model, "extend"):
        return model
    return TargetsAnew(model) if hasattr(model, "encode") else TextsAnew(model)


class TextsAnew:
    """A model that maps tokens [B, T] to logits [B, T, V], those at t seeing tokens 0..t.

    Its cache holds each row's tokens from the first place on, and how many there are; what lies behind them is not seen.
    """

    def __init__(self, model: Any):
        self.model = model

    def make_cache(self, batch: int, length: int, dtype: Any = None) -> dict[str, jax.Array]:
        return {"tokens": jnp.zeros((batch, length), jnp.int32), "lengths": jnp.zeros(batch, jnp.int32)}

    def prefill(self, tokens: jax.Array, cache: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        valid, T = tokens >= 0, tokens.shape[1]
        begun = jax.vmap(jnp.roll)(jnp.maximum(tokens, 0), -jnp.argmax(valid, axis=1))
        kept = jax.lax.dynamic_update_slice(cache["tokens"], begun[:, : cache["tokens"].shape[1]].astype(jnp.int32), (0, 0))
        lengths = valid.sum(axis=1).astype(jnp.int32)
        # Only so many tokens are there yet.
        return _last(self.model(kept[:, :T]), lengths), {"tokens": kept, "lengths": lengths}

    def extend(self, tokens: jax.Array, cache: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        kept, lengths = _added(tokens, cache["tokens"], cache["lengths"])
        return _last(self.model(kept), lengths), {"tokens": kept, "lengths": lengths}


class TargetsAnew:
    """An encoder–decoder: `encode(source) -> memory` (arrays with B rows), `decode(target, memory) -> logits`, those at t seeing target 0..t."""

    def __init__(self, model: Any):
        self.model = model

    def make_cache(self, source: jax.Array, length: int) -> dict[str, Any]:
        empty = TextsAnew(None).make_cache(len(source), length)
        return empty | {"memory": self.model.encode(source)}

    def extend(self, tokens: jax.Array, cache: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        kept, lengths = _added(tokens, cache["tokens"], cache["lengths"])
        return _last(self.model.decode(kept, cache["memory"]), lengths), cache | {"tokens": kept, "lengths": lengths}


def _added(tokens, kept, lengths):
    """One token more in each row; a row that has ended, whose token is -1, stays as it is."""
    places = jnp.where(tokens >= 0, lengths, kept.shape[1])
    kept = kept.at[jnp.arange(len(kept)), places].set(tokens, mode="drop")
    return kept, lengths + (tokens >= 0)


def _last(logits_BTV, lengths):
    return jnp.take_along_axis(logits_BTV, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
