"""Tagging: one label for each token, as for named entities."""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmodels.errors import ConfigError
from jaxmodels.tasks import require


class Tag:
    """Softmax cross-entropy over tags, at each token that has one.

    Batches: `tokens` int [B, T] (-1 is padding), `tags` int [B, T] (-1 where none counts: padding, and the later pieces of
    a word), `weight` float [B].
    """

    scores = ("precision", "recall", "f1")

    def __init__(self, info: Mapping, *, label_smoothing: float = 0.0, constrained: bool = True):
        """
        Args:
          info: of the data set: `vocab_size`, and `tags`, the names of the tags in BIO form (`O`, `B-PER`, `I-PER`, …).
          label_smoothing: probability taken from the true tag and spread evenly over all. Training only.
          constrained: predict the likeliest sequence in which every `I-X` follows a `B-X` or `I-X`; else the likeliest tag of
            each token by itself. Entities are scored on what is predicted, `accuracy` on each tag by itself.
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
            self.scores = ()  # tags that are no BIO make no entities
        self.provides = {"vocab_size": info["vocab_size"], "head": ("tags", len(self.names))}
        self.batch = {"tokens": (None,), "tags": (None,)}
        self.label_smoothing = label_smoothing
        self._allowed = _allowed(self.names) if constrained else None

    def predict(self, model, batch):
        """The tags' numbers for `tokens` [B, T]: int [B, T].

        Where words are several tokens, give `tags` as well, 0 at each word's first token and -1 elsewhere: only there do the
        predictions mean something, and only these follow each other.
        """
        logits = self._logits(model, batch, None)
        if self._allowed is None:
            return jnp.argmax(logits, axis=-1)
        return best_sequence(jax.nn.log_softmax(logits), batch.get("tags", batch["tokens"]) >= 0, self._allowed)

    def loss(self, model, batch, rngs):
        """The sum of cross-entropies over tokens that count, how many count, and metrics."""
        logits = self._logits(model, batch, rngs)
        metrics = _metrics(logits, batch)
        if not self.label_smoothing:
            return *metrics["loss"], metrics
        tags, weight = _targets(batch)
        targets = optax.smooth_labels(jnp.eye(logits.shape[-1])[tags], self.label_smoothing)
        return jnp.sum(optax.softmax_cross_entropy(logits, targets) * weight), jnp.sum(weight), metrics

    def metrics(self, model, batch):
        """`loss` and `accuracy`, by token."""
        return _metrics(self._logits(model, batch, None), batch)

    def outputs(self, model, batch):
        """The predicted tags, and the true ones; of these only whether there is one goes into the prediction."""
        return {"predicted": self.predict(model, batch).astype(jnp.int16), "tags": batch["tags"].astype(jnp.int16)}

    def score(self, outputs):
        """`precision`, `recall` and `f1` of whole entities (type and both ends right), over all, as conlleval counts them."""
        names = np.array(self.names, object)
        rows = [(predicted[tags >= 0], tags[tags >= 0]) for predicted, tags in zip(outputs["predicted"], outputs["tags"], strict=True)]
        predicted, true = ([names[row].tolist() for row in part] for part in zip(*rows, strict=True))
        functions = {
            "precision": self._seqeval.precision_score,
            "recall": self._seqeval.recall_score,
            "f1": self._seqeval.f1_score,
        }
        return {name: float(function(true, predicted, zero_division=0)) for name, function in functions.items()}

    def summarize(self, values):
        return dict(values)

    def _logits(self, model, batch, rngs):
        return model(batch["tokens"], rngs=rngs).astype(jnp.float32)


def _allowed(names: tuple[str, ...]) -> np.ndarray:
    """bool [K + 1, K]: which tag may follow which; the last row is for the first tag of a row."""
    allowed = np.ones((len(names) + 1, len(names)), bool)
    for i, name in enumerate(names):
        before = ("B-" + name[2:], name)
        if name.startswith("I-") and before[0] in names:
            allowed[:, i] = [other in before for other in (*names, None)]
    return allowed


def best_sequence(scores_BTK: jax.Array, valid_BT: jax.Array, allowed: np.ndarray) -> jax.Array:
    """The sequence of tags with the largest sum of scores among those allowed (Viterbi 1967).

    Args:
      scores_BTK: of each tag at each token.
      valid_BT: bool, the tokens that have a tag: the others are passed by.
      allowed: bool [K + 1, K], as of `_allowed`.

    Returns:
      int32 [B, T]; where not valid, the tag before it.
    """
    B, _, K = scores_BTK.shape
    penalty = jnp.where(jnp.asarray(allowed), 0.0, -1e9)
    # The state before the first tag is one more tag, K, which nothing goes back to.
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
    """Tags, 0 where there is none, and the weight of each token."""
    return jnp.maximum(batch["tags"], 0), (batch["tags"] >= 0) * batch["weight"][:, None]


def _metrics(logits, batch):
    tags, weight = _targets(batch)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tags)
    correct = jnp.argmax(logits, axis=-1) == tags
    total = jnp.sum(weight)
    return {"loss": (jnp.sum(losses * weight), total), "accuracy": (jnp.sum(correct * weight), total)}
