"""Masked language modelling: predict hidden tokens from all the others.

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
from jaxmodels.tasks.base import Task, require
from jaxmodels.tasks.losses import cross_entropy

SPECIAL = ("unknown", "start", "end", "mask")
EVALUATION_SEED = 0  # with each row's tokens, decides which are hidden in evaluation


class MaskedLM(Task):
    """Cross-entropy of hidden tokens, in nats (BERT; Devlin et al. 2019).

    A share `rate` of each row's tokens, rounded and at least one, are the targets. Of these, `mask_share` are replaced by the mask token,
    `random_share` by a token drawn uniformly, and the others stay. Padding and the tokenizer's special tokens are never targets, and no
    special token is drawn.

    Targets are drawn from the step's key in training. In evaluation they are drawn from a fixed key and the row's own tokens, not from the
    row's key: so runs of different seeds are compared on the same targets, whatever the batch size and the padding.

    Batches: `tokens` int [B, T] (-1 is padding), optionally `segments` int [B, T], `weight` float [B]. All T tokens are read: a source of
    windows for language models gives one more than its `sequence_length`.
    """

    shown = ("loss", "accuracy", "perplexity")

    def __init__(self, info: Mapping, *, rate: float = 0.15, mask_share: float = 0.8, random_share: float = 0.1):
        """
        Args:
          info: of the data set: `vocab_size`, and a `tokenizer` that has a mask token.
          rate: share of a row's tokens that are targets.
          mask_share: share of the targets that are replaced by the mask token.
          random_share: share of the targets that are replaced by a random token.
        """
        require(info, "masked_lm", "a source of text", "vocab_size", "tokenizer")
        tokenizer = info["tokenizer"]
        if tokenizer.special("mask") is None:
            raise ConfigError(
                "config.data.tokenizer: 'masked_lm' needs a mask token, and this tokenizer has none. Tokenizers with one: "
                "bpe:SIZE, word:MAX, byte+special, character+special, or a tokenizers file with a mask token."
            )
        if not 0 < rate < 1:
            raise ConfigError(f"config.task.rate must lie between 0 and 1, got {rate}.")
        if min(mask_share, random_share) < 0 or mask_share + random_share > 1 + 1e-9:
            raise ConfigError(f"config.task: mask_share and random_share must not be negative, nor their sum above 1; got {mask_share} and {random_share}.")
        self.vocab_size, self.mask = info["vocab_size"], tokenizer.special("mask")
        special = sorted({token for token in map(tokenizer.special, SPECIAL) if token is not None})
        self.is_special = np.isin(np.arange(self.vocab_size), special)
        self.ordinary = np.flatnonzero(~self.is_special).astype(np.int32)
        if not len(self.ordinary):
            raise ConfigError("config.data.tokenizer: the tokenizer has no tokens but special ones; train it on text.")
        self.provides = {"vocab_size": self.vocab_size, "head": ("tokens", self.vocab_size)}
        self.batch = {"tokens": (None,)}
        self.rate, self.mask_share, self.random_share = rate, mask_share, random_share

    def predict(self, model, batch, key=None):
        """Return log-probabilities of the token at each position of `tokens` [B, T], float [B, T, V]. Hides none of them."""
        return jax.nn.log_softmax(model(batch["tokens"], **_options(model, batch)).astype(jnp.float32))

    def loss(self, model, batch, rngs):
        """Return the sum of cross-entropies of the targets, their number, and metrics."""
        keys = row_keys(rngs.dropout(), len(batch["tokens"]))
        metrics = self._metrics(model, batch, keys, rngs)
        return *metrics["loss"], metrics

    def evaluate(self, model, batch, key):
        """Return `loss` and `accuracy` of the targets."""
        base = jax.random.key(EVALUATION_SEED)
        keys = jax.vmap(lambda row: jax.random.fold_in(base, row))(_row_hash(batch["tokens"]))
        return self._metrics(model, batch, keys, None)

    def summarize(self, values):
        """Add `perplexity`, the exponential of the loss."""
        return dict(values) | {"perplexity": math.exp(min(values["loss"], 700.0))}

    def hide(self, tokens_T: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Hide tokens of one row.

        Args:
          tokens_T: int [T], -1 is padding.
          key: of everything that is drawn.

        Returns:
          The model's input, int [T]; positions, int [K]; and which of them are targets, bool [K]. K depends on T alone.
        """
        T = len(tokens_T)
        K = max(1, round(self.rate * T))
        # One draw of [T, 3] bits: more padding leaves the draws of the positions before it unchanged.
        place_T, kind_T, other_T = jax.random.bits(key, (T, 3)).T
        eligible_T = (tokens_T >= 0) & ~jnp.asarray(self.is_special)[tokens_T]
        number = jnp.sum(eligible_T)
        # At least one target in each row that has an eligible token, as in BERT; short rows would have none.
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
    """Return the model's argument `segments`, if rows hold several texts."""
    if "segments" not in batch:
        return {}
    if "segments" not in _arguments(model):
        raise ValueError(f"{type(model).__name__} has no argument segments, which keeps several examples in a row apart; use data.packing='contiguous' with it")
    return {"segments": batch["segments"]}


def _logits(model, tokens_BT, positions_BK, batch, rngs):
    """Return logits at some positions, [B, K, V]. A model that takes `positions` computes no others, which saves much of the output layer."""
    options = _options(model, batch)
    if "positions" in _arguments(model):
        return model(tokens_BT, positions=positions_BK, rngs=rngs, **options)
    return jnp.take_along_axis(model(tokens_BT, rngs=rngs, **options), positions_BK[:, :, None], axis=1)


def _arguments(model):
    return inspect.signature(model).parameters


def _row_hash(tokens_BT):
    """Return a hash of each row's tokens and their positions, uint32 [B]. Padding does not change it."""
    place_T = jnp.arange(tokens_BT.shape[1], dtype=jnp.uint32)
    mixed_BT = (tokens_BT.astype(jnp.uint32) + 1) * jnp.uint32(0x9E3779B1) ^ (place_T + 1) * jnp.uint32(0x85EBCA77)
    mixed_BT = (mixed_BT ^ (mixed_BT >> 15)) * jnp.uint32(0xC2B2AE3D)  # the rounds of a 32-bit integer hash
    mixed_BT ^= mixed_BT >> 13
    return jnp.sum(jnp.where(tokens_BT >= 0, mixed_BT, 0), axis=1, dtype=jnp.uint32)
