"""Language modelling: the next token, at every position."""

import inspect
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxmodels.errors import ConfigError
from jaxmodels.inference import decoding
from jaxmodels.tasks.losses import cross_entropy


class LanguageModel:
    """Cross-entropy of each token given those before it, in nats.

    Batches: `tokens` int [B, T + 1] (inputs are all but the last, targets all but the first; a target of -1 does
    not count), `weight` float [B], and where rows hold several examples `segments` int [B, T + 1]: a target in another
    segment than its input does not count, and a model sees nothing of other segments. Where there is `counts`, bool [B, T + 1], only tokens
    that it marks count as targets.
    """

    def __init__(self, info: Mapping, *, label_smoothing: float = 0.0, sample_length: int = 200, temperature: float = 0.8):
        """
        Args:
          info: of the data set: `vocab_size`, and `tokenizer` where samples are wanted.
          label_smoothing: probability taken from the true token and spread evenly over all. Training only.
          sample_length: tokens of the text shown at each evaluation, where the model's context holds as many; 0 shows none.
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
        """The sum of cross-entropies over targets that count, each with the model's auxiliary loss; how many count; and metrics."""
        logits, targets, weight, auxiliary = self._forward(model, batch, rngs)
        metrics = _metrics(logits, targets, weight, auxiliary)
        values = cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        count = jnp.sum(weight)
        return jnp.sum(values * weight) + auxiliary.get("loss", 0.0) * count, count, metrics

    def metrics(self, model, batch):
        """`loss` and `accuracy` of the next token; and what the model tells of its experts, means over layers and batches."""
        return _metrics(*self._forward(model, batch, None))

    def summarize(self, values):
        """Adds `perplexity`, the exponential of the loss."""
        return dict(values) | {"perplexity": math.exp(min(values["loss"], 700.0))}

    def sample(self, model, key):
        """A text that the model makes up: int [sample_length], or as many as a model's context holds.

        It follows the end of a text, where the tokenizer has a token for that; else token 0, of characters mostly the newline.
        """
        first = self.tokenizer.special("end") if self.tokenizer is not None else None
        return decoding.sample(model, first or 0, self.sample_length, key, temperature=self.temperature)

    def _forward(self, model, batch, rngs):
        tokens, segments = batch["tokens"], batch.get("segments")
        targets = tokens[:, 1:]
        counts = targets >= 0
        options = {}
        if segments is not None:
            if "segments" not in inspect.signature(type(model).__call__).parameters:
                raise ValueError(f"{type(model).__name__} does not tell several examples in a row apart; use data.packing='contiguous' with it")
            counts &= segments[:, 1:] == segments[:, :-1]
            options["segments"] = segments[:, :-1]
        if "counts" in batch:
            counts &= batch["counts"][:, 1:]
        inputs, auxiliary = tokens[:, :-1], {}
        if hasattr(model, "with_auxiliary"):
            inputs = jnp.where(batch["weight"][:, None] > 0, inputs, -1)  # rows that only fill a batch up are told of nowhere
            logits, auxiliary = model.with_auxiliary(inputs, rngs=rngs, **options)
        else:
            logits = model(inputs, rngs=rngs, **options)
        return logits.astype(jnp.float32), jnp.maximum(targets, 0), counts * batch["weight"][:, None], auxiliary


def _metrics(logits, targets, weight, auxiliary):
    losses = cross_entropy(logits, targets)
    correct = jnp.argmax(logits, axis=-1) == targets
    total = jnp.sum(weight)
    metrics = {"loss": (jnp.sum(losses * weight), total), "accuracy": (jnp.sum(correct * weight), total)}
    return metrics | {name: (value * total, total) for name, value in auxiliary.items() if name != "loss" and value.ndim == 0}
