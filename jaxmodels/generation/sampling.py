"""Choosing the next token from a model's logits.

The filters and their order are those of `transformers`: penalty of repetitions, temperature, top-k, top-p, min-p.

Shapes: B rows, V vocabulary, K candidates.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxmodels.errors import ConfigError

NONE = -jnp.inf  # the logit of a token that cannot be


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
      temperature: the logits are divided by; 0 takes the likeliest token (greedy).
      top_k: only the k likeliest tokens (Fan et al. 2018).
      top_p: only the likeliest tokens that together have this probability (Holtzman et al. 2020).
      min_p: only tokens with this share of the likeliest one's probability or more (Nguyen et al. 2024).
      repetition_penalty: logits of tokens that the prompt or the text so far holds are divided by this where positive, and multiplied
        with it where negative (Keskar et al. 2019).
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def check(self) -> None:
        """Raises ConfigError for a value that means nothing."""
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature must be 0 (the likeliest token) or more, got {self.temperature}.")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k must be at least 1, got {self.top_k}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must lie in (0, 1], got {self.top_p}.")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p must lie in [0, 1], got {self.min_p}.")
        if self.repetition_penalty is not None and not 0 < self.repetition_penalty < math.inf:
            raise ConfigError(f"repetition_penalty must be above 0 (1 is none), got {self.repetition_penalty}.")
        for name in ("top_k", "top_p", "min_p"):
            if self.temperature == 0 and getattr(self, name) is not None:
                raise ConfigError(f"{name} means nothing where the likeliest token is taken: give a temperature above 0 with it, such as 1.0.")

    def shape(self) -> "Shape":
        """What of it a compiled function depends on."""
        return Shape(self.temperature > 0, self.top_k, self.top_p is not None, self.min_p is not None, self.repetition_penalty is not None)

    def numbers(self) -> dict[str, float]:
        """The rest, which a compiled function is given."""
        return {key: value for key in ("temperature", "top_p", "min_p", "repetition_penalty") if (value := getattr(self, key)) is not None}


@dataclasses.dataclass(frozen=True)
class Shape:
    """The steps of choosing, without their numbers: two `Sampling` of one shape share compiled functions."""

    drawn: bool
    top_k: int | None
    top_p: bool
    min_p: bool
    penalty: bool


def penalize(logits_BV: jax.Array, seen_BV: jax.Array, penalty: jax.Array) -> jax.Array:
    """The logits, those of tokens seen made less by the penalty of repetitions."""
    return jnp.where(seen_BV, jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty), logits_BV)


def candidates(logits_BV: jax.Array, shape: Shape, numbers: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array | None]:
    """The logits that tokens are drawn by: those that a filter takes out are -inf.

    Returns:
      Logits of all tokens [B, V], and None; or, where a filter sorts, of candidates with the likeliest first, and their tokens [B, K].
    """
    logits, tokens = logits_BV.astype(jnp.float32) / numbers["temperature"], None
    if shape.top_k is not None or shape.top_p:
        logits, tokens = jax.lax.top_k(logits, min(shape.top_k or logits.shape[-1], logits.shape[-1]))
    if shape.top_p:
        # A token stays while those likelier than it have less than top_p together; the likeliest always does.
        probabilities = jax.nn.softmax(logits)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        logits = jnp.where((before < numbers["top_p"]) | (jnp.arange(logits.shape[-1]) == 0), logits, NONE)
    if shape.min_p:
        logits = jnp.where(logits >= logits.max(-1, keepdims=True) + jnp.log(numbers["min_p"]), logits, NONE)
    return logits, tokens


def choose(logits_BV: jax.Array, shape: Shape, numbers: Mapping[str, jax.Array], key: jax.Array, seen_BV: jax.Array | None = None) -> jax.Array:
    """The next token of each row, int32 [B].

    Args:
      logits_BV: of all tokens.
      shape, numbers: of a `Sampling`.
      key: of this step; every row draws from one of its own.
      seen_BV: bool, the tokens that a penalty of repetitions is for.
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
