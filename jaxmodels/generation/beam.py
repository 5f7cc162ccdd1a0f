"""Beam search: the likeliest texts, of which several are followed at a time (Graves 2012; Wu et al. 2016 for the penalty of length).

Which texts are kept, when one is complete, and when the search ends is as in `transformers`.

Shapes: B rows, K beams, C candidates, N room for new tokens, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxmodels.errors import ConfigError
from jaxmodels.generation import sampling
from jaxmodels.generation.decoding import see
from jaxmodels.generation.full_forward import with_cache
from jaxmodels.generation.sampling import Shape
from jaxmodels.models.cache import pack, repeat_rows, take_rows, unpack

_NEVER = -1e9  # the score of what is not there


@dataclasses.dataclass(frozen=True, kw_only=True)
class Beams:
    """How beams are searched.

    Attributes:
      beams: K, texts that are followed at a time, and complete ones that are kept.
      length_penalty: a complete text's score is the sum of its tokens' log-probabilities over its length to this power; above 0
        longer texts gain.
      early_stopping: end as soon as there are K complete texts; otherwise when no text that is followed can be better than the
        worst of them, by its score so far; with `never` by the best it could reach.
    """

    beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def check(self) -> None:
        """Raises ConfigError for a value that means nothing."""
        if self.beams < 1:
            raise ConfigError(f"beams must be at least 1, got {self.beams}.")
        if not math.isfinite(self.length_penalty):
            raise ConfigError(f"length_penalty must be a finite number, got {self.length_penalty}.")
        if self.beams == 1 and (self.length_penalty != 1.0 or self.early_stopping is not False):
            raise ConfigError("length_penalty and early_stopping are of beam search: give beams=4, say, with them.")


def start(state: dict, logits_BV: jax.Array | None, limit: jax.Array, beams: Beams, shape: Shape, numbers: Mapping, ends_E: jax.Array) -> dict:
    """The beams before the model reads their tokens.

    Args:
      state: of `decoding.make_state`, before anything is chosen.
      logits_BV: of what follows the prompts; None where the model is still to read the state's `tokens`.
      limit: tokens of a text at most, up to the N that the state has room for.
      beams, shape, numbers: of `Beams` and `Sampling`, of which the penalty of repetitions counts.
      ends_E: tokens that complete a text.
    """
    K, (B, N) = beams.beams, state["chosen"].shape
    carry = {
        "cache": pack(repeat_rows(unpack(state["cache"]), K)),
        "rows": jnp.arange(B * K),
        "tokens": jnp.repeat(state["tokens"], K),
        "texts": jnp.full((B, K, N), -1, jnp.int32),
        # All beams of a row are the same at first: but one counts.
        "scores": jnp.where(jnp.arange(K)[None] == 0, 0.0, _NEVER) * jnp.ones((B, 1)),
        "complete": jnp.full((B, K, N), -1, jnp.int32),
        "complete_scores": jnp.full((B, K), _NEVER),
        "is_complete": jnp.broadcast_to(state["done"][:, None], (B, K)),
        "hopeful": ~state["done"][:, None],
        "count": jnp.zeros((), jnp.int32),
        "more": ~state["done"].all(),
    }
    if shape.penalty:
        carry["seen"] = jnp.repeat(state["seen"], K, axis=0)
    return carry if logits_BV is None else _step(carry, jnp.repeat(logits_BV, K, axis=0), limit, beams, shape, numbers, ends_E)


def search(model: Any, carry: dict, limit: jax.Array, beams: Beams, shape: Shape, numbers: Mapping, ends_E: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The best text of each row, int32 [B, N] with -1 after its end, and its score [B]; `carry` of `start`, the rest as there."""
    model = with_cache(model)

    def body(carry):
        logits_BV, cache = model.extend(carry["tokens"], take_rows(unpack(carry["cache"]), carry["rows"]))
        return _step(carry | {"cache": pack(cache)}, logits_BV, limit, beams, shape, numbers, ends_E)

    carry = jax.lax.while_loop(lambda carry: carry["more"], body, carry)
    return carry["complete"][:, 0], carry["complete_scores"][:, 0]


def _step(carry: dict, logits, limit, beams: Beams, shape: Shape, numbers: Mapping, ends_E) -> dict:
    """The beams with one token more, which the model has not read; `rows` are those of the cache that they go on from."""
    (B, K, N), count = carry["texts"].shape, carry["count"]
    log_BKV = jax.nn.log_softmax(logits.astype(jnp.float32))
    if shape.penalty:
        log_BKV = sampling.penalize(log_BKV, carry["seen"], numbers["repetition_penalty"])
    log_BKV = log_BKV.reshape(B, K, -1) + carry["scores"][:, :, None]
    V = log_BKV.shape[-1]
    # As many that K go on, if all others end here.
    scores_BC, best_BC = jax.lax.top_k(log_BKV.reshape(B, K * V), max(2, 1 + len(ends_E)) * K)
    from_BC, tokens_BC = best_BC // V, (best_BC % V).astype(jnp.int32)
    texts_BCN = jnp.take_along_axis(carry["texts"], from_BC[:, :, None], axis=1)
    texts_BCN = jnp.where(jnp.arange(N) == count, tokens_BC[:, :, None], texts_BCN)
    ends_BC = (tokens_BC[:, :, None] == ends_E).any(axis=2) | (count + 1 >= limit)

    running_BC = scores_BC + jnp.where(ends_BC, _NEVER, 0.0)
    on_BK = jax.lax.top_k(running_BC, K)[1]
    pick = lambda x: jnp.take_along_axis(x, on_BK.reshape(B, K, *[1] * (x.ndim - 2)), axis=1)  # noqa: E731
    after = {"texts": pick(texts_BCN), "scores": pick(running_BC)}

    length = (count + 1).astype(jnp.float32)
    first = jnp.arange(scores_BC.shape[1]) < K  # the others are there to go on with
    full_B1 = carry["is_complete"].all(axis=1, keepdims=True) & (beams.early_stopping is True)
    allowed_BC = ends_BC & first & ~full_B1 & carry["hopeful"]
    new_BC = jnp.where(allowed_BC, scores_BC / length**beams.length_penalty, _NEVER)
    scores = jnp.concatenate([carry["complete_scores"], new_BC], axis=1)
    kept_scores, kept_BK = jax.lax.top_k(scores, K)
    keep = lambda x: jnp.take_along_axis(x, kept_BK.reshape(B, K, *[1] * (x.ndim - 2)), axis=1)  # noqa: E731
    after["complete"] = keep(jnp.concatenate([carry["complete"], texts_BCN], axis=1))
    after["complete_scores"] = kept_scores
    after["is_complete"] = keep(jnp.concatenate([carry["is_complete"], ends_BC & first], axis=1))

    reach = limit if beams.early_stopping == "never" and beams.length_penalty > 0 else count + 1
    hope_B1 = after["scores"][:, :1] / reach.astype(jnp.float32) ** beams.length_penalty
    worst_BK = jnp.where(after["is_complete"], kept_scores.min(axis=1, keepdims=True), _NEVER)
    after["hopeful"] = carry["hopeful"] & (hope_B1 > worst_BK).any(axis=1, keepdims=True)
    more = after["hopeful"].any() & ~ends_BC.all()
    if beams.early_stopping is True:
        more &= ~after["is_complete"].all()
    after["rows"] = (pick(from_BC) + K * jnp.arange(B)[:, None]).reshape(-1)
    after["tokens"] = pick(tokens_BC).reshape(-1)
    if shape.penalty:
        after["seen"] = see(jnp.take(carry["seen"], after["rows"], axis=0), after["tokens"][:, None])
    return carry | after | {"count": count + 1, "more": more}
