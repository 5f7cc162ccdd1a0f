"""Models whose vocabulary has more rows than the tokenizer has tokens: rows without a token are never chosen.

Shapes: B rows, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.generation.full_forward import with_cache


def with_known_tokens(model: Any, tokens: int | None) -> Any:
    """Return a model with a cache that scores the ids 0 to `tokens` - 1 only; with None, all."""
    model = with_cache(model)
    return model if tokens is None else _KnownTokens(model, tokens)


class _KnownTokens:
    """The cache interface of a model (see `models.cache`), whose logits of ids that no token has are -inf."""

    def __init__(self, model: Any, tokens: int):
        self.model, self.tokens = model, tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def prefill(self, tokens: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """As the model's."""
        logits_BV, cache = self.model.prefill(tokens, cache)
        return self._known(logits_BV), cache

    def extend(self, tokens: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """As the model's."""
        logits_BV, cache = self.model.extend(tokens, cache)
        return self._known(logits_BV), cache

    def _known(self, logits_BV):
        if self.tokens >= logits_BV.shape[-1]:
            return logits_BV
        return jnp.where(jnp.arange(logits_BV.shape[-1]) < self.tokens, logits_BV, -jnp.inf)
