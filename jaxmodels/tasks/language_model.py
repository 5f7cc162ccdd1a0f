"""Language modelling: the next token, at every position."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from jaxmodels.errors import ConfigError
from jaxmodels.inference import generate


class LanguageModel:
    """Cross-entropy of each token given those before it, in nats.

    Batches: `tokens` int [B, T + 1] (inputs are all but the last, targets all but the first; a target of -1 does
    not count), `weight` float [B].
    """

    def __init__(self, info: Mapping, *, label_smoothing: float = 0.0, sample_length: int = 200, temperature: float = 0.8):
        """
        Args:
          info: of the data set: `vocab_size`, and `tokenizer` where samples are wanted.
          label_smoothing: probability taken from the true token and spread evenly over all. Training only.
          sample_length: tokens of the text shown at each evaluation; 0 shows none.
          temperature: that the logits are divided by in those samples.
        """
        if "vocab_size" not in info:
            raise ConfigError("config.task: 'language_model' needs a source of text; this data source gives no vocab_size.")
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"config.task.label_smoothing must lie in [0, 1), got {label_smoothing}.")
        if sample_length < 0 or temperature < 0:
            raise ConfigError("config.task: sample_length and temperature must not be negative.")
        self.provides = {"vocab_size": info["vocab_size"]}
        self.batch = {"tokens": (None,)}
        self.tokenizer = info.get("tokenizer")
        self.label_smoothing, self.sample_length, self.temperature = label_smoothing, sample_length, temperature

    def predict(self, model, batch):
        """Log-probabilities of the next token after each of `tokens` [B, T]: float [B, T, V]."""
        return jax.nn.log_softmax(model(batch["tokens"]).astype(jnp.float32))

    def loss(self, model, batch, rngs):
        """The sum of cross-entropies over targets that count, how many count, and metrics."""
        logits, targets, weight = self._forward(model, batch, rngs)
        metrics = _metrics(logits, targets, weight)
        if not self.label_smoothing:
            return *metrics["loss"], metrics
        # Cross-entropy with smoothed targets, without making them: (1 - s) * CE + s * the mean over all tokens.
        spread = -jnp.mean(jax.nn.log_softmax(logits), axis=-1)
        exact = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        losses = (1 - self.label_smoothing) * exact + self.label_smoothing * spread
        return jnp.sum(losses * weight), jnp.sum(weight), metrics

    def metrics(self, model, batch):
        """`loss` and `accuracy` of the next token."""
        return _metrics(*self._forward(model, batch, None))

    def summarize(self, values):
        """Adds `perplexity`, the exponential of the loss."""
        return dict(values) | {"perplexity": math.exp(min(values["loss"], 700.0))}

    def sample(self, model, key):
        """A text that the model makes up after token 0 (of a character tokenizer, mostly the newline): int [sample_length]."""
        return generate.sample(model, jnp.zeros((1, 1), jnp.int32), self.sample_length, key, temperature=self.temperature)[0]

    def _forward(self, model, batch, rngs):
        tokens = batch["tokens"]
        logits = model(jnp.maximum(tokens[:, :-1], 0), rngs=rngs).astype(jnp.float32)
        targets = tokens[:, 1:]
        weight = (targets >= 0) * batch["weight"][:, None]
        return logits, jnp.maximum(targets, 0), weight


def _metrics(logits, targets, weight):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    correct = jnp.argmax(logits, axis=-1) == targets
    total = jnp.sum(weight)
    return {"loss": (jnp.sum(losses * weight), total), "accuracy": (jnp.sum(correct * weight), total)}
