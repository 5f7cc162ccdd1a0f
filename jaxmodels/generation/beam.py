"""Beam search (Graves 2012), with a length penalty (Wu et al. 2016).

The choice of candidates, complete texts and the end of the search follow `transformers`.

Shapes: B rows, K beams, C candidates, N new tokens at most, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxmodels.errors import ConfigError
from jaxmodels.generation import sampling
from jaxmodels.generation.decoding import mark_seen
from jaxmodels.generation.full_forward import with_cache
from jaxmodels.generation.sampling import Shape
from jaxmodels.models.cache import pack, repeat_rows, take_rows, unpack

_NEVER = -1e9  # score of an empty slot


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beams:
    """Settings of beam search.

    Attributes:
      beams: K, number of running beams and of complete texts that are kept.
      length_penalty: exponent α of the length; a complete text's score is its sum of log-probabilities / length ** α. Larger values favour
        longer texts.
      early_stopping: True ends with K complete texts. False ends when no running beam's current score exceeds the worst complete one;
        "never" when none can exceed it at any later length.
    """

    beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def check(self) -> None:
        """Raise ConfigError for an invalid value."""
        if self.beams < 1:
            raise ConfigError(f"beams must be at least 1, got {self.beams}.")
        if not math.isfinite(self.length_penalty):
            raise ConfigError(f"length_penalty must be a finite number, got {self.length_penalty}.")
        if self.beams == 1 and (self.length_penalty != 1.0 or self.early_stopping is not False):
            raise ConfigError("length_penalty and early_stopping need beam search: set beams above 1.")


def start(state: dict, logits_BV: jax.Array | None, limit: jax.Array, beams: Beams, shape: Shape, numbers: Mapping, eos_ids: jax.Array) -> dict:
    """Return the initial carry of the search.

    Args:
      state: of `decoding.make_state`, without new tokens.
      logits_BV: of the token after the prompts; None if the model has not read the state's `tokens` yet.
      limit: maximum length of a text, at most N.
      beams, shape, numbers: of `Beams` and `Sampling`; of the latter only the repetition penalty applies.
      eos_ids: int32 [E], end tokens.
    """
    K, (B, N) = beams.beams, state["chosen"].shape
    carry = {
        "cache": pack(repeat_rows(unpack(state["cache"]), K)),
        "rows": jnp.arange(B * K),
        "tokens": jnp.repeat(state["tokens"], K),
        "texts": jnp.full((B, K, N), -1, jnp.int32),
        # All beams of a row are equal at first, so only one is active.
        "scores": jnp.where(jnp.arange(K)[None] == 0, 0.0, _NEVER) * jnp.ones((B, 1)),
        "complete": jnp.full((B, K, N), -1, jnp.int32),
        "complete_scores": jnp.full((B, K), _NEVER),
        "is_complete": jnp.broadcast_to(state["done"][:, None], (B, K)),
        "can_improve": ~state["done"][:, None],
        "count": jnp.zeros((), jnp.int32),
        "more": ~state["done"].all(),
    }
    if shape.penalty:
        carry["seen"] = jnp.repeat(state["seen"], K, axis=0)
    return carry if logits_BV is None else _step(carry, jnp.repeat(logits_BV, K, axis=0), limit, beams, shape, numbers, eos_ids)


def search(model: Any, carry: dict, limit: jax.Array, beams: Beams, shape: Shape, numbers: Mapping, eos_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return each row's best text, int32 [B, N] with -1 after its end, and its score [B]. Arguments as of `start`; `carry` is its result."""
    model = with_cache(model)

    def body(carry):
        logits_BV, cache = model.extend(carry["tokens"], take_rows(unpack(carry["cache"]), carry["rows"]))
        return _step(carry | {"cache": pack(cache)}, logits_BV, limit, beams, shape, numbers, eos_ids)

    carry = jax.lax.while_loop(lambda carry: carry["more"], body, carry)
    return carry["complete"][:, 0], carry["complete_scores"][:, 0]


def _step(carry: dict, logits, limit, beams: Beams, shape: Shape, numbers: Mapping, eos_ids) -> dict:
    """Extend the beams by one token, which the model has not read yet; `rows` are the rows of the cache that they continue."""
    (B, K, N), count = carry["texts"].shape, carry["count"]
    log_BKV = jax.nn.log_softmax(logits.astype(jnp.float32))
    if shape.penalty:
        log_BKV = sampling.penalize(log_BKV, carry["seen"], numbers["repetition_penalty"])
    log_BKV = log_BKV.reshape(B, K, -1) + carry["scores"][:, :, None]
    V = log_BKV.shape[-1]
    # Enough candidates that K continue even if all others end here.
    scores_BC, best_BC = jax.lax.top_k(log_BKV.reshape(B, K * V), max(2, 1 + len(eos_ids)) * K)
    from_BC, tokens_BC = best_BC // V, (best_BC % V).astype(jnp.int32)
    texts_BCN = jnp.take_along_axis(carry["texts"], from_BC[:, :, None], axis=1)
    texts_BCN = jnp.where(jnp.arange(N) == count, tokens_BC[:, :, None], texts_BCN)
    ends_BC = (tokens_BC[:, :, None] == eos_ids).any(axis=2) | (count + 1 >= limit)

    running_BC = scores_BC + jnp.where(ends_BC, _NEVER, 0.0)
    on_BK = jax.lax.top_k(running_BC, K)[1]
    pick = lambda x: jnp.take_along_axis(x, on_BK.reshape(B, K, *[1] * (x.ndim - 2)), axis=1)  # noqa: E731
    after = {"texts": pick(texts_BCN), "scores": pick(running_BC)}

    length = (count + 1).astype(jnp.float32)
    first = jnp.arange(scores_BC.shape[1]) < K  # the remaining candidates only serve to continue
    full_B1 = carry["is_complete"].all(axis=1, keepdims=True) & (beams.early_stopping is True)
    allowed_BC = ends_BC & first & ~full_B1 & carry["can_improve"]
    new_BC = jnp.where(allowed_BC, scores_BC / length**beams.length_penalty, _NEVER)
    scores = jnp.concatenate([carry["complete_scores"], new_BC], axis=1)
    best_scores, best_BK = jax.lax.top_k(scores, K)
    gather_best = lambda x: jnp.take_along_axis(x, best_BK.reshape(B, K, *[1] * (x.ndim - 2)), axis=1)  # noqa: E731
    after["complete"] = gather_best(jnp.concatenate([carry["complete"], texts_BCN], axis=1))
    after["complete_scores"] = best_scores
    after["is_complete"] = gather_best(jnp.concatenate([carry["is_complete"], ends_BC & first], axis=1))

    reach = limit if beams.early_stopping == "never" and beams.length_penalty > 0 else count + 1
    hope_B1 = after["scores"][:, :1] / reach.astype(jnp.float32) ** beams.length_penalty
    worst_BK = jnp.where(after["is_complete"], best_scores.min(axis=1, keepdims=True), _NEVER)
    after["can_improve"] = carry["can_improve"] & (hope_B1 > worst_BK).any(axis=1, keepdims=True)
    more = after["can_improve"].any() & ~ends_BC.all()
    if beams.early_stopping is True:
        more &= ~after["is_complete"].all()
    after["rows"] = (pick(from_BC) + K * jnp.arange(B)[:, None]).reshape(-1)
    after["tokens"] = pick(tokens_BC).reshape(-1)
    if shape.penalty:
        after["seen"] = mark_seen(jnp.take(carry["seen"], after["rows"], axis=0), after["tokens"][:, None])
    return carry | after | {"count": count + 1, "more": more}
