"""Choose the next token of each row of a batch whose rows have settings of their own, as numbers: no setting makes a function compile again.

The filters and their order are those of `generation.sampling`; penalties for frequency and presence come after the one for repetition. What no row
asks for is not computed: sorting, penalties and log-probabilities are branches.

A row's random numbers are made from its seed and the number of its tokens so far, one for each token of the vocabulary. So its text does not
depend on the other rows.

Shapes: B rows, V vocabulary, S slots, K candidates.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.generation import sampling
from jaxmodels.generation.sampling import EXCLUDED

ALTERNATIVES = 20  # most likely tokens whose log-probabilities are returned
_CANDIDATES = 256  # most likely tokens among which top-k and top-p usually end; only these are sorted
NOT_FINITE = -2  # in place of a token

Settings = dict[str, Any]


def settings(rows: int) -> Settings:
    """Return the settings of rows that decode greedily, NumPy arrays [B]: those of `serving.requests.RowSampling`, and others.

    The others: `alternatives`, the number of most likely tokens to score, -1 for no score at all; `prompt`, the number of tokens of the prompt;
    `adapter`, the number of an adapter (`models.lora_rows`).
    """
    floats = {"temperature": 0.0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}
    whole = {"top_k": 0, "alternatives": -1, "prompt": 0, "adapter": 0}
    made = {name: np.full(rows, value, np.float32) for name, value in floats.items()} | {name: np.full(rows, value, np.int32) for name, value in whole.items()}
    return made | {"seed": np.zeros(rows, np.uint32)}


def choose(logits_BV: jax.Array, given: Settings, texts_BS: jax.Array, positions_BS: jax.Array, generated_B: jax.Array, known: int | None = None) -> jax.Array:
    """Return the next token of each row, int32 [B]; NOT_FINITE where logits are not numbers.

    Args:
      logits_BV: of all tokens.
      given: as `settings` returns.
      texts_BS, positions_BS: the tokens of each row so far, in any order, and their positions, negative where there is none.
      generated_B: number of new tokens so far.
      known: only ids below this one are chosen; None for all.
    """
    logits_BV = only_known(logits_BV.astype(jnp.float32), known)
    finite_B = ~jnp.isnan(logits_BV.max(axis=1))
    repeats_B = given["repetition_penalty"] != 1
    counts_B = (given["frequency_penalty"] != 0) | (given["presence_penalty"] != 0)
    penalized = lambda: _penalized(logits_BV, given, texts_BS, positions_BS)  # noqa: E731
    logits_BV = jax.lax.cond(jnp.any(repeats_B | counts_B), penalized, lambda: logits_BV)
    greedy_B = jnp.argmax(logits_BV, axis=1).astype(jnp.int32)
    draws_B = given["temperature"] > 0

    def drawn():
        scaled_BV = logits_BV / jnp.where(draws_B, given["temperature"], 1)[:, None]
        cut_B = draws_B & ((given["top_k"] > 0) | (given["top_p"] < 1))
        least_B = jax.lax.cond(jnp.any(cut_B), lambda: _least(scaled_BV, cut_B, given["top_k"], given["top_p"]), lambda: jnp.full(len(cut_B), EXCLUDED))
        least_B = jnp.maximum(least_B, scaled_BV.max(axis=1) + jnp.log(given["min_p"]))
        keys_B = jax.vmap(lambda seed, count: jax.random.fold_in(jax.random.key(seed), count))(given["seed"], generated_B)
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:]))(keys_B)
        return jnp.argmax(jnp.where(scaled_BV >= least_B[:, None], scaled_BV + noise_BV, EXCLUDED), axis=1).astype(jnp.int32)

    tokens_B = jnp.where(draws_B, jax.lax.cond(jnp.any(draws_B), drawn, lambda: greedy_B), greedy_B)
    return jnp.where(finite_B, tokens_B, NOT_FINITE)


def score(logits_BV: jax.Array, tokens_B: jax.Array, alternatives_B: jax.Array, known: int | None = None) -> dict[str, jax.Array]:
    """Return log-probabilities without penalties or filters, zeros where none are asked for.

    Args:
      logits_BV: of all tokens.
      tokens_B: chosen tokens.
      alternatives_B: number of most likely tokens to score, -1 for no score.
      known: only ids below this one are alternatives; None for all.

    Returns:
      `chosen` [B]: of the chosen tokens; `tops`, `tokens` [B, 20]: the most likely tokens, with and in order of their log-probabilities.
    """
    B, count = len(tokens_B), min(ALTERNATIVES, logits_BV.shape[1])
    tops = {"tops": jnp.zeros((B, count)), "tokens": jnp.zeros((B, count), jnp.int32)}

    def scored():
        log_BV = jax.nn.log_softmax(logits_BV.astype(jnp.float32))
        allowed_BV = only_known(log_BV, known)
        first = lambda: _first(allowed_BV, tops)  # noqa: E731
        most = lambda: dict(zip(("tops", "tokens"), jax.lax.top_k(allowed_BV, count), strict=True))  # noqa: E731
        found = jax.lax.cond(jnp.any(alternatives_B > 1), most, lambda: jax.lax.cond(jnp.any(alternatives_B == 1), first, lambda: tops))
        return {"chosen": jnp.take_along_axis(log_BV, jnp.maximum(tokens_B, 0)[:, None], axis=1)[:, 0], **found}

    return jax.lax.cond(jnp.any(alternatives_B >= 0), scored, lambda: {"chosen": jnp.zeros(B), **tops})


def only_known(logits_BV: jax.Array, known: int | None) -> jax.Array:
    """Return the logits with -inf for ids from `known` on."""
    return logits_BV if known is None or known >= logits_BV.shape[1] else jnp.where(jnp.arange(logits_BV.shape[1]) < known, logits_BV, EXCLUDED)


def _first(log_BV, tops):
    """Return the most likely token alone, in the form of `tops`."""
    return {"tops": tops["tops"].at[:, 0].set(log_BV.max(axis=1)), "tokens": tops["tokens"].at[:, 0].set(jnp.argmax(log_BV, axis=1).astype(jnp.int32))}


def _penalized(logits_BV, given, texts_BS, positions_BS):
    """Return the logits with the penalties for repetition, of tokens in the prompt or the answer, and for frequency and presence in the answer."""
    rows = jnp.arange(len(logits_BV))[:, None]

    def counted(wanted_BS):
        return jnp.zeros(logits_BV.shape, jnp.int32).at[rows, jnp.where(wanted_BS, texts_BS, logits_BV.shape[1])].add(1, mode="drop")

    answer_BV = counted(positions_BS >= given["prompt"][:, None])
    seen_BV = (answer_BV > 0) | (counted((positions_BS >= 0) & (positions_BS < given["prompt"][:, None])) > 0)
    logits_BV = sampling.penalize(logits_BV, seen_BV, given["repetition_penalty"][:, None])
    return logits_BV - given["frequency_penalty"][:, None] * answer_BV - given["presence_penalty"][:, None] * (answer_BV > 0)


def _least(logits_BV, cut_B, top_k_B, top_p_B):
    """Return the least logit of each row that top-k and top-p leave, [B]; -inf for rows that are not cut."""
    K = min(_CANDIDATES, logits_BV.shape[1])
    sorted_BK = jax.lax.top_k(logits_BV, K)[0]
    ranked_BK = (jnp.arange(K) < top_k_B[:, None]) | (top_k_B[:, None] == 0)
    total_B = jax.nn.logsumexp(jnp.where(ranked_BK, sorted_BK, EXCLUDED), axis=1)
    total_B = jnp.where(top_k_B > 0, total_B, jax.nn.logsumexp(logits_BV, axis=1))
    probabilities_BK = jnp.where(ranked_BK, jnp.exp(sorted_BK - total_B[:, None]), 0)
    before_BK = jnp.cumsum(probabilities_BK, axis=1) - probabilities_BK
    # A token stays while the more likely ones have a total below top_p; the most likely one always stays.
    kept_BK = ranked_BK & ((before_BK < top_p_B[:, None]) | (top_p_B[:, None] >= 1) | (jnp.arange(K) == 0))
    last_B = jnp.maximum(kept_BK.sum(axis=1) - 1, 0)
    among_B = jnp.where(top_k_B > 0, top_k_B <= K, last_B < K - 1) | (K == logits_BV.shape[1])
    least_B = jnp.take_along_axis(sorted_BK, last_B[:, None], axis=1)[:, 0]
    least_B = jax.lax.cond(jnp.all(among_B | ~cut_B), lambda: least_B, lambda: _least_of_all(logits_BV, top_k_B, top_p_B))
    return jnp.where(cut_B, least_B, EXCLUDED)


def _least_of_all(logits_BV, top_k_B, top_p_B):
    """As `_least`, for all rows and any number of tokens, by bisection: this takes a fifth of the time of sorting on a CPU. Equal logits stay together."""
    bits_BV = jax.lax.bitcast_convert_type(logits_BV, jnp.int32)
    keys_BV = jnp.where(bits_BV < 0, bits_BV ^ 0x7FFFFFFF, bits_BV)  # integers in the order of the logits

    def least(weights_BV, limit_B):
        """Return the least key such that the weights of greater ones sum to less than a limit."""

        def halve(_, between):
            low_B, high_B = between
            middle_B = (low_B & high_B) + ((low_B ^ high_B) >> 1)
            found_B = jnp.sum(jnp.where(keys_BV > middle_B[:, None], weights_BV, 0), axis=1) < limit_B
            return jnp.where(found_B, low_B, middle_B + 1), jnp.where(found_B, middle_B, high_B)

        return jax.lax.fori_loop(0, 32, halve, (keys_BV.min(axis=1), keys_BV.max(axis=1)))[1]

    V = logits_BV.shape[1]
    by_count_B = least(jnp.ones_like(keys_BV), jnp.where(top_k_B > 0, top_k_B, V))
    weights_BV = jnp.where(keys_BV >= by_count_B[:, None], jnp.exp(logits_BV - logits_BV.max(axis=1, keepdims=True)), 0)
    by_sum_B = least(weights_BV, jnp.where(top_p_B < 1, top_p_B * weights_BV.sum(axis=1), jnp.inf))
    key_B = jnp.maximum(by_count_B, by_sum_B)
    return jax.lax.bitcast_convert_type(jnp.where(key_B < 0, key_B ^ 0x7FFFFFFF, key_B), jnp.float32)
