"""Choose the next token from logits.

The filters and their order follow `transformers`: repetition penalty, temperature, top-k, top-p, min-p.

Shapes: B rows, V vocabulary, K candidates.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxmodels.errors import ConfigError

EXCLUDED = -jnp.inf  # the logit of an excluded token


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of sampling.

    Attributes:
      temperature: divides the logits; 0 is greedy decoding.
      top_k: sample from the k most likely tokens (Fan et al. 2018).
      top_p: sample from the smallest set of most likely tokens with at least this total probability (Holtzman et al. 2020).
      min_p: sample from tokens with at least this fraction of the highest probability (Nguyen et al. 2024).
      repetition_penalty: positive logits of tokens in the prompt or the text are divided by it, negative ones multiplied (Keskar et al. 2019).
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def check(self) -> None:
        """Raise ConfigError for an invalid value or combination."""
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature must be 0 (greedy) or more, got {self.temperature}.")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k must be at least 1, got {self.top_k}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must lie in (0, 1], got {self.top_p}.")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p must lie in [0, 1], got {self.min_p}.")
        if self.repetition_penalty is not None and not 0 < self.repetition_penalty < math.inf:
            raise ConfigError(f"repetition_penalty must be above 0 (1 is no penalty), got {self.repetition_penalty}.")
        for name in ("top_k", "top_p", "min_p"):
            if self.temperature == 0 and getattr(self, name) is not None:
                raise ConfigError(f"{name}={getattr(self, name)} has no effect with temperature=0 (greedy): set a temperature above 0.")

    def shape(self) -> "Shape":
        """Return the static part, on which compiled functions depend."""
        return Shape(self.temperature > 0, self.top_k, self.top_p is not None, self.min_p is not None, self.repetition_penalty is not None)

    def numbers(self) -> dict[str, float]:
        """Return the numbers, which are arguments of compiled functions."""
        return {key: value for key in ("temperature", "top_p", "min_p", "repetition_penalty") if (value := getattr(self, key)) is not None}


@dataclasses.dataclass(frozen=True)
class Shape:
    """The enabled filters, without their numbers. `Sampling` objects of equal shape share compiled functions."""

    drawn: bool
    top_k: int | None
    top_p: bool
    min_p: bool
    penalty: bool


def penalize(logits_BV: jax.Array, seen_BV: jax.Array, penalty: jax.Array) -> jax.Array:
    """Apply the repetition penalty to the logits of seen tokens."""
    return jnp.where(seen_BV, jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty), logits_BV)


def candidates(logits_BV: jax.Array, shape: Shape, numbers: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array | None]:
    """Return the filtered logits, -inf for excluded tokens.

    Returns:
      Logits [B, V] and None; or, with top-k or top-p, logits sorted in descending order and their token ids, both [B, K].
    """
    logits, tokens = logits_BV.astype(jnp.float32) / numbers["temperature"], None
    if shape.top_k is not None or shape.top_p:
        logits, tokens = jax.lax.top_k(logits, min(shape.top_k or logits.shape[-1], logits.shape[-1]))
    if shape.top_p:
        # A token stays while the more likely ones have a total below top_p; the most likely one always stays.
        probabilities = jax.nn.softmax(logits)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        logits = jnp.where((before < numbers["top_p"]) | (jnp.arange(logits.shape[-1]) == 0), logits, EXCLUDED)
    if shape.min_p:
        logits = jnp.where(logits >= logits.max(-1, keepdims=True) + jnp.log(numbers["min_p"]), logits, EXCLUDED)
    return logits, tokens


def choose(logits_BV: jax.Array, shape: Shape, numbers: Mapping[str, jax.Array], key: jax.Array, seen_BV: jax.Array | None = None) -> jax.Array:
    """Choose the next token of each row, int32 [B].

    Args:
      logits_BV: of all tokens.
      shape, numbers: of a `Sampling`.
      key: random key of this step; each row uses its own, folded from it.
      seen_BV: bool, tokens to penalise, for the repetition penalty.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    if shape.penalty:
        logits_BV = penalize(logits_BV, seen_BV, numbers["repetition_penalty"])
    if not shape.drawn:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits, tokens = candidates(logits_BV, shape, numbers)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(logits)))
    drawn = jax.vmap(jax.random.categorical)(keys, logits)
    return (drawn if tokens is None else jnp.take_along_axis(tokens, drawn[:, None], axis=1)[:, 0]).astype(jnp.int32)
