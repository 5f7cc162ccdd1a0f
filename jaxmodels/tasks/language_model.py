"""Language modelling: predict the next token at every position."""

import inspect
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxmodels.errors import ConfigError
from jaxmodels.generation import decoding
from jaxmodels.generation.known import with_known_tokens
from jaxmodels.parallel.layout import current
from jaxmodels.tasks.base import Sample, Task, require
from jaxmodels.tasks.losses import cross_entropy
from jaxmodels.tokenizers.base import known_tokens


class LanguageModel(Task):
    """Cross-entropy of each token given those before it, in nats.

    Batches: `tokens` int [B, T + 1] (inputs are all but the last, targets all but the first; a target of -1 does not count), `weight` float
    [B], and optionally

    - `segments` int [B, T + 1], for rows of several examples: a target in another segment than its input does not count, and attention
      stays within a segment.
    - `counts` bool [B, T + 1]: only tokens where it is True count as targets.
    """

    shown = ("loss", "accuracy", "perplexity")

    def __init__(self, info: Mapping, *, label_smoothing: float = 0.0, tiles: int = 1, sample_length: int = 200, temperature: float = 0.8):
        """
        Args:
          info: of the data set: `vocab_size`, and `tokenizer`, without which no samples are shown.
          label_smoothing: probability taken from the true token and spread evenly over all tokens. Training only.
          tiles: number of parts of a batch whose logits are computed one after the other, and again in the backward pass. It saves the
            memory of the other parts' logits, which is much with a large vocabulary. The result is the same.
          sample_length: tokens of the text that is shown at each evaluation, at most as many as the model's context holds; 0 shows none.
          temperature: divides the logits of those samples; 0 picks the most probable token.
        """
        require(info, "language_model", "a source of text", "vocab_size")
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"config.task.label_smoothing must lie in [0, 1), got {label_smoothing}.")
        if tiles < 1:
            raise ConfigError(f"config.task.tiles must be 1 or more, got {tiles}.")
        if sample_length < 0 or temperature < 0:
            raise ConfigError("config.task: sample_length and temperature must not be negative.")
        self.provides = {"vocab_size": info["vocab_size"]}
        self.batch = {"tokens": (None,)}
        self.tokenizer = info.get("tokenizer")
        self.label_smoothing, self.tiles, self.sample_length, self.temperature = label_smoothing, tiles, sample_length, temperature

    def predict(self, model, batch, key=None):
        """Return log-probabilities of the next token after each of `tokens` [B, T], float [B, T, V]."""
        return jax.nn.log_softmax(model(batch["tokens"]).astype(jnp.float32))

    def loss(self, model, batch, rngs):
        """Return the sum of cross-entropies over targets that count, the model's auxiliary loss added to each; their number; and metrics."""
        sums, count, auxiliary = self._forward(model, batch, rngs)
        return sums["smoothed"] + auxiliary.get("loss", 0.0) * count, count, _metrics(sums, count, auxiliary)

    def evaluate(self, model, batch, key):
        """Return `loss` and `accuracy` of the next token, and routing statistics of a mixture of experts, averaged over layers."""
        return _metrics(*self._forward(model, batch, None))

    def summarize(self, values):
        """Add `perplexity`, the exponential of the loss."""
        return dict(values) | {"perplexity": math.exp(min(values["loss"], 700.0))}

    def samples(self, model, key):
        """Return the tokens of a generated text, int [sample_length], or fewer if the model's context is shorter.

        The first token follows the tokenizer's end token, or token 0 without one, which for characters is mostly the newline.
        """
        if not self.sample_length or self.tokenizer is None:
            return {}
        first = self.tokenizer.special("end") or 0
        return {"sample": decoding.sample(with_known_tokens(model, known_tokens(self.tokenizer)), first, self.sample_length, key, temperature=self.temperature)}

    def show(self, outputs):
        """Return the generated text."""
        return [Sample(name, "text", self.tokenizer.decode(tokens)) for name, tokens in outputs.items()]

    def _forward(self, model, batch, rngs):
        """Return sums over targets that count, their number, and the model's auxiliary values."""
        tokens, segments = batch["tokens"], batch.get("segments")
        targets = tokens[:, 1:]
        counts = targets >= 0
        options = {}
        if segments is not None:
            if "segments" not in inspect.signature(type(model).__call__).parameters:
                raise ValueError(
                    f"{type(model).__name__} has no argument segments, which keeps several examples in a row apart; use data.packing='contiguous' with it"
                )
            counts &= segments[:, 1:] == segments[:, :-1]
            options["segments"] = segments[:, :-1]
        if "counts" in batch:
            counts &= batch["counts"][:, 1:]
        weight, targets, inputs, auxiliary = counts * batch["weight"][:, None], jnp.maximum(targets, 0), tokens[:, :-1], {}
        if hasattr(model, "with_auxiliary"):
            inputs = jnp.where(batch["weight"][:, None] > 0, inputs, -1)  # padding rows are excluded from routing statistics
        if self.tiles > 1:
            if not hasattr(model, "features"):
                raise ValueError(f"{type(model).__name__} has no methods features and head to compute logits in parts; set task.tiles=1")
            x_BTD, auxiliary = model.features(inputs, rngs=rngs, **options)
            sums = self._in_tiles(model.head(), x_BTD, targets, weight)
        else:
            if hasattr(model, "with_auxiliary"):
                logits, auxiliary = model.with_auxiliary(inputs, rngs=rngs, **options)
            else:
                logits = model(inputs, rngs=rngs, **options)
            sums = self._sums(logits, targets, weight)
        return sums, jnp.sum(weight), auxiliary

    def _sums(self, logits, targets, weight):
        logits = logits.astype(jnp.float32)
        exact = jnp.sum(cross_entropy(logits, targets) * weight)
        smoothed = jnp.sum(cross_entropy(logits, targets, label_smoothing=self.label_smoothing) * weight) if self.label_smoothing else exact
        return {"exact": exact, "smoothed": smoothed, "correct": jnp.sum((jnp.argmax(logits, axis=-1) == targets) * weight)}

    def _in_tiles(self, head, x_BTD, targets_BT, weight_BT):
        """Return `_sums` of the logits `head(x)`, computed one tile after the other."""
        layout = current()
        B, T = targets_BT.shape
        rows = math.gcd(self.tiles, B // (1 if layout is None else layout.size("rows")))  # tiles of whole rows on each device first, then parts of rows
        parts = self.tiles // rows
        if T % (parts * (1 if layout is None else layout.size("sequence"))):
            raise ValueError(f"task.tiles={self.tiles} must divide sequences of {T} tokens into {parts} equal parts; use a power of two")

        def cut(x):
            # Row r goes to tile r % rows, and token t to t % parts where the sequence axis is sharded, so that each stays on its device.
            spread = parts > 1 and layout is not None and layout.size("sequence") > 1
            x = x.reshape(B // rows, rows, *((T // parts, parts) if spread else (parts, T // parts)), *x.shape[2:])
            x = jnp.moveaxis(x, (1, 3 if spread else 2), (0, 1))
            return x.reshape(rows * parts, B // rows, T // parts, *x.shape[4:])

        def add(sums, tile):
            x, targets, weight = tile
            return jax.tree.map(jnp.add, sums, self._sums(head(x), targets, weight)), None

        zeros = {name: jnp.zeros((), jnp.float32) for name in ("exact", "smoothed", "correct")}
        tiles = tuple(cut(x) for x in (x_BTD, targets_BT, weight_BT))
        return jax.lax.scan(jax.checkpoint(add, prevent_cse=False), zeros, tiles)[0]


def _metrics(sums, count, auxiliary):
    metrics = {"loss": (sums["exact"], count), "accuracy": (sums["correct"], count)}
    return metrics | {name: (value * count, count) for name, value in auxiliary.items() if name != "loss" and value.ndim == 0}
