"""Tagging: one label for each token, as in named-entity recognition."""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmodels.errors import ConfigError
from jaxmodels.tasks.base import Task, require


class Tag(Task):
    """Softmax cross-entropy over tags at each token that has one.

    Batches: `tokens` int [B, T] (-1 is padding), `tags` int [B, T] (-1 for no tag: padding, and a word's tokens after its first), `weight`
    float [B].
    """

    scores = ("precision", "recall", "f1")
    shown = ("loss", "accuracy", "f1")

    def __init__(self, info: Mapping, *, label_smoothing: float = 0.0, constrained: bool = True):
        """
        Args:
          info: of the data set: `vocab_size`, and `tags`, the names of the tags in BIO form (`O`, `B-PER`, `I-PER`, …).
          label_smoothing: probability taken from the true tag and spread evenly over all tags. Training only.
          constrained: predict the most probable sequence in which every `I-X` follows a `B-X` or `I-X`, instead of the most probable tag of
            each token. Entity scores use these predictions; `accuracy` uses the most probable tag of each token.
        """
        require(info, "tag", "texts with tags", "vocab_size", "tags")
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"config.task.label_smoothing must lie in [0, 1), got {label_smoothing}.")
        try:
            import seqeval.metrics as seqeval
        except ImportError as error:
            raise ConfigError("config.task: 'tag' scores entities with seqeval: pip install 'jaxmodels[text]'.") from error
        self._seqeval = seqeval
        self.names = tuple(info["tags"])
        if not all(re.fullmatch(r"O|[BI]-.+", name) for name in self.names):
            self.scores = ()  # without BIO tags there are no entities
        self.provides = {"vocab_size": info["vocab_size"], "head": ("tags", len(self.names))}
        self.batch = {"tokens": (None,), "tags": (None,)}
        self.label_smoothing = label_smoothing
        self._allowed = _allowed(self.names) if constrained else None

    def predict(self, model, batch, key=None):
        """Return the tag ids of `tokens` [B, T], int [B, T].

        If words have several tokens, give `tags` too, 0 at each word's first token and -1 elsewhere: only predictions at first tokens are
        meaningful, and constraints hold between these.
        """
        logits = self._logits(model, batch, None)
        if self._allowed is None:
            return jnp.argmax(logits, axis=-1)
        return best_sequence(jax.nn.log_softmax(logits), batch.get("tags", batch["tokens"]) >= 0, self._allowed)

    def loss(self, model, batch, rngs):
        """Return the sum of cross-entropies over tokens that count, their number, and metrics."""
        logits = self._logits(model, batch, rngs)
        metrics = _metrics(logits, batch)
        if not self.label_smoothing:
            return *metrics["loss"], metrics
        tags, weight = _targets(batch)
        targets = optax.smooth_labels(jnp.eye(logits.shape[-1])[tags], self.label_smoothing)
        return jnp.sum(optax.softmax_cross_entropy(logits, targets) * weight), jnp.sum(weight), metrics

    def evaluate(self, model, batch, key):
        """Return `loss` and `accuracy` over tokens."""
        return _metrics(self._logits(model, batch, None), batch)

    def outputs(self, model, batch, key):
        """Return the predicted and the true tags. Predictions use only whether a token has a tag, not which."""
        return {"predicted": self.predict(model, batch).astype(jnp.int16), "tags": batch["tags"].astype(jnp.int16)}

    def score(self, outputs):
        """Return `precision`, `recall` and `f1` of whole entities (type and both ends match), micro-averaged as conlleval does."""
        names = np.array(self.names, object)
        rows = [(predicted[tags >= 0], tags[tags >= 0]) for predicted, tags in zip(outputs["predicted"], outputs["tags"], strict=True)]
        predicted, true = ([names[row].tolist() for row in part] for part in zip(*rows, strict=True))
        functions = {
            "precision": self._seqeval.precision_score,
            "recall": self._seqeval.recall_score,
            "f1": self._seqeval.f1_score,
        }
        return {name: float(function(true, predicted, zero_division=0)) for name, function in functions.items()}

    def _logits(self, model, batch, rngs):
        return model(batch["tokens"], rngs=rngs).astype(jnp.float32)


def _allowed(names: tuple[str, ...]) -> np.ndarray:
    """Return which tag may follow which, bool [K + 1, K]; the last row is for the first tag of a sequence."""
    allowed = np.ones((len(names) + 1, len(names)), bool)
    for i, name in enumerate(names):
        before = ("B-" + name[2:], name)
        if name.startswith("I-") and before[0] in names:
            allowed[:, i] = [other in before for other in (*names, None)]
    return allowed


def best_sequence(scores_BTK: jax.Array, valid_BT: jax.Array, allowed: np.ndarray) -> jax.Array:
    """Return the allowed sequence of tags with the largest sum of scores (Viterbi 1967), int32 [B, T].

    Args:
      scores_BTK: of each tag at each token.
      valid_BT: bool; tokens where it is False are skipped, and get the tag of the token before.
      allowed: bool [K + 1, K], as `_allowed` returns.
    """
    B, _, K = scores_BTK.shape
    penalty = jnp.where(jnp.asarray(allowed), 0.0, -1e9)
    # State K stands for the start of the sequence; no tag leads to it.
    first = jnp.full((B, K + 1), -1e9).at[:, K].set(0.0)

    def forward(best_BK, inputs):
        scores_BK, valid_B = inputs
        paths_BJK = best_BK[:, :, None] + penalty
        new = jnp.pad(jnp.max(paths_BJK, axis=1) + scores_BK, ((0, 0), (0, 1)), constant_values=-2e9)
        came = jnp.pad(jnp.argmax(paths_BJK, axis=1), ((0, 0), (0, 1)))
        stay = jnp.broadcast_to(jnp.arange(K + 1), came.shape)
        return jnp.where(valid_B[:, None], new, best_BK), jnp.where(valid_B[:, None], came, stay)

    def backward(tag_B, came_BK):
        return jnp.take_along_axis(came_BK, tag_B[:, None], axis=1)[:, 0], tag_B

    best_BK, came_TBK = jax.lax.scan(forward, first, (scores_BTK.swapaxes(0, 1), valid_BT.T))
    _, tags_TB = jax.lax.scan(backward, jnp.argmax(best_BK, axis=1), came_TBK, reverse=True)
    return jnp.minimum(tags_TB.T, K - 1).astype(jnp.int32)


def _targets(batch):
    """Return the tags, 0 where there is none, and the weight of each token."""
    return jnp.maximum(batch["tags"], 0), (batch["tags"] >= 0) * batch["weight"][:, None]


def _metrics(logits, batch):
    tags, weight = _targets(batch)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tags)
    correct = jnp.argmax(logits, axis=-1) == tags
    total = jnp.sum(weight)
    return {"loss": (jnp.sum(losses * weight), total), "accuracy": (jnp.sum(correct * weight), total)}
