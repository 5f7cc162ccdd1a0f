"""Masked language modelling: some tokens are hidden, and predicted from all the others.

Shapes: B rows, T positions, K positions of a row that may be hidden, V vocabulary.
"""

import inspect
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.errors import ConfigError
from jaxmodels.parallel.layout import row_keys
from jaxmodels.tasks import require
from jaxmodels.tasks.losses import cross_entropy

SPECIAL = ("unknown", "start", "end", "mask")
EVALUATION_SEED = 0  # of what is hidden in evaluation, together with each row's own tokens


class MaskedLM:
    """Cross-entropy of hidden tokens, in nats (BERT; Devlin et al. 2019).

    Of each row's tokens, `rate` are chosen (rounded, at least one): those are the targets. Of the chosen, `mask_share` are shown
    as the mask token, `random_share` as another token drawn evenly, the others as they are. Padding and the tokenizer's special
    tokens are never chosen, and no special token is drawn.

    In training the choice is drawn from the step's key; in evaluation from a fixed key and the row's own tokens, so that a row is
    hidden in the same way every time, whatever batch it is in and however far it is padded.

    Batches: `tokens` int [B, T] (-1 is padding), optionally `segments` int [B, T], `weight` float [B]. All T tokens are read: a
    source of windows for language models gives one more than its `sequence_length`.
    """

    def __init__(self, info: Mapping, *, rate: float = 0.15, mask_share: float = 0.8, random_share: float = 0.1):
        """
        Args:
          info: of the data set: `vocab_size`, and a `tokenizer` that has a mask token.
          rate: share of a row's tokens that is predicted.
          mask_share: share of these that is shown as the mask token.
          random_share: share of these that is shown as a random token; what is left is shown as it is.
        """
        require(info, "masked_lm", "a source of text", "vocab_size", "tokenizer")
        tokenizer = info["tokenizer"]
        if tokenizer.special("mask") is None:
            raise ConfigError(
                "config.data.tokenizer: 'masked_lm' needs a token to hide others behind, and this tokenizer has none. Those that have one: "
                "bpe:SIZE, word:MAX, byte+special, character+special, or a tokenizers file with a mask token."
            )
        if not 0 < rate < 1:
            raise ConfigError(f"config.task.rate must lie between 0 and 1, got {rate}.")
        if min(mask_share, random_share) < 0 or mask_share + random_share > 1 + 1e-9:
            raise ConfigError(f"config.task: mask_share and random_share must be shares of one whole, got {mask_share} and {random_share}.")
        self.vocab_size, self.mask = info["vocab_size"], tokenizer.special("mask")
        special = sorted({token for token in map(tokenizer.special, SPECIAL) if token is not None})
        self.is_special = np.isin(np.arange(self.vocab_size), special)
        self.ordinary = np.flatnonzero(~self.is_special).astype(np.int32)
        if not len(self.ordinary):
            raise ConfigError("config.data.tokenizer: it has special tokens only; train it on text.")
        self.provides = {"vocab_size": self.vocab_size, "head": ("tokens", self.vocab_size)}
        self.batch = {"tokens": (None,)}
        self.rate, self.mask_share, self.random_share = rate, mask_share, random_share

    def predict(self, model, batch):
        """Log-probabilities of the token at each place of `tokens` [B, T], as these are (hide some yourself): float [B, T, V]."""
        return jax.nn.log_softmax(model(batch["tokens"], **_options(model, batch)).astype(jnp.float32))

    def loss(self, model, batch, rngs):
        """The sum of cross-entropies of hidden tokens, how many these are, and metrics."""
        keys = row_keys(rngs.dropout(), len(batch["tokens"]))
        metrics = self._metrics(model, batch, keys, rngs)
        return *metrics["loss"], metrics

    def metrics(self, model, batch):
        """`loss` and `accuracy` of the hidden tokens."""
        base = jax.random.key(EVALUATION_SEED)
        keys = jax.vmap(lambda row: jax.random.fold_in(base, row))(_row_hash(batch["tokens"]))
        return self._metrics(model, batch, keys, None)

    def summarize(self, values):
        """Adds `perplexity`, the exponential of the loss."""
        return dict(values) | {"perplexity": math.exp(min(values["loss"], 700.0))}

    def hide(self, tokens_T: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Hides tokens of one row.

        Args:
          tokens_T: int [T], -1 where there is none.
          key: decides all that is drawn.

        Returns:
          The row as shown, int [T]; positions, int [K]; and which of them are targets, bool [K]. K depends on T alone.
        """
        T = len(tokens_T)
        K = max(1, round(self.rate * T))
        # One draw, so much for each place: a longer row of padding leaves the draws of the places before it as they are.
        place_T, kind_T, other_T = jax.random.bits(key, (T, 3)).T
        eligible_T = (tokens_T >= 0) & ~jnp.asarray(self.is_special)[tokens_T]
        number = jnp.sum(eligible_T)
        # At least one in each row that has any, as in BERT: a short row would else have none.
        number = jnp.minimum(number, jnp.clip(jnp.round(self.rate * number), 1, K))
        _, positions_K = jax.lax.top_k(jnp.where(eligible_T, (place_T >> 1).astype(jnp.int32), -1), K)
        chosen_K = jnp.arange(K) < number
        true_K, kind_K = tokens_T[positions_K], kind_T[positions_K].astype(jnp.float32) / 2.0**32
        other_K = jnp.asarray(self.ordinary)[other_T[positions_K] % len(self.ordinary)]
        shown_K = jnp.where(kind_K < self.mask_share, self.mask, jnp.where(kind_K < self.mask_share + self.random_share, other_K, true_K))
        return tokens_T.at[positions_K].set(jnp.where(chosen_K, shown_K, true_K)), positions_K, chosen_K

    def _metrics(self, model, batch, keys, rngs):
        tokens_BT = batch["tokens"]
        shown_BT, positions_BK, chosen_BK = jax.vmap(self.hide)(tokens_BT, keys)
        targets_BK = jnp.where(chosen_BK, jnp.take_along_axis(tokens_BT, positions_BK, axis=1), 0)
        weight_BK = chosen_BK * batch["weight"][:, None]
        logits_BKV = _logits(model, shown_BT, positions_BK, batch, rngs).astype(jnp.float32)
        losses_BK = cross_entropy(logits_BKV, targets_BK)
        correct_BK = jnp.argmax(logits_BKV, axis=-1) == targets_BK
        total = jnp.sum(weight_BK)
        return {"loss": (jnp.sum(losses_BK * weight_BK), total), "accuracy": (jnp.sum(correct_BK * weight_BK), total)}


def _options(model, batch):
    """`segments`, where rows hold several texts."""
    if "segments" not in batch:
        return {}
    if "segments" not in _arguments(model):
        raise ValueError(f"{type(model).__name__} does not tell several examples in a row apart; use data.packing='contiguous' with it")
    return {"segments": batch["segments"]}


def _logits(model, tokens_BT, positions_BK, batch, rngs):
    """Logits at some positions, [B, K, V]. A model that takes `positions` makes no others: the output layer is much of the work."""
    options = _options(model, batch)
    if "positions" in _arguments(model):
        return model(tokens_BT, positions=positions_BK, rngs=rngs, **options)
    return jnp.take_along_axis(model(tokens_BT, rngs=rngs, **options), positions_BK[:, :, None], axis=1)


def _arguments(model):
    return inspect.signature(model).parameters


def _row_hash(tokens_BT):
    """A number for each row, uint32 [B], of its tokens and their places; padding adds nothing."""
    place_T = jnp.arange(tokens_BT.shape[1], dtype=jnp.uint32)
    mixed_BT = (tokens_BT.astype(jnp.uint32) + 1) * jnp.uint32(0x9E3779B1) ^ (place_T + 1) * jnp.uint32(0x85EBCA77)
    mixed_BT = (mixed_BT ^ (mixed_BT >> 15)) * jnp.uint32(0xC2B2AE3D)  # the rounds of a 32-bit integer hash
    mixed_BT ^= mixed_BT >> 13
    return jnp.sum(jnp.where(tokens_BT >= 0, mixed_BT, 0), axis=1, dtype=jnp.uint32)
