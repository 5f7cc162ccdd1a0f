"""Tagging: one label for each token, as for named entities."""

from collections.abc import Mapping

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

    def __init__(self, info: Mapping, *, label_smoothing: float = 0.0):
        """
        Args:
          info: of the data set: `vocab_size`, and `tags`, the names of the tags in BIO form (`O`, `B-PER`, `I-PER`, …).
          label_smoothing: probability taken from the true tag and spread evenly over all. Training only.
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
        self.provides = {"vocab_size": info["vocab_size"], "head": ("tags", len(self.names))}
        self.batch = {"tokens": (None,), "tags": (None,)}
        self.label_smoothing = label_smoothing

    def predict(self, model, batch):
        """The likeliest tag's number for each of `tokens` [B, T]: int [B, T]."""
        return jnp.argmax(self._logits(model, batch, None), axis=-1)

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
        """The likeliest tags, and the true ones."""
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


def _targets(batch):
    """Tags, 0 where there is none, and the weight of each token."""
    return jnp.maximum(batch["tags"], 0), (batch["tags"] >= 0) * batch["weight"][:, None]


def _metrics(logits, batch):
    tags, weight = _targets(batch)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tags)
    correct = jnp.argmax(logits, axis=-1) == tags
    total = jnp.sum(weight)
    return {"loss": (jnp.sum(losses * weight), total), "accuracy": (jnp.sum(correct * weight), total)}
