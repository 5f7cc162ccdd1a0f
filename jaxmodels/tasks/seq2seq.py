"""Sequence to sequence: predict a target from a source token by token, as in translation."""

import itertools
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from jaxmodels.errors import ConfigError
from jaxmodels.generation import decoding
from jaxmodels.generation.known import with_known_tokens
from jaxmodels.tasks.base import Task, require
from jaxmodels.tasks.losses import cross_entropy
from jaxmodels.tokenizers.base import known_tokens

SCORES = ("exact_match", "bleu", "rouge1", "rouge2", "rougeL")


class Seq2Seq(Task):
    """Cross-entropy of each target token given the source and the target tokens before it, in nats.

    Batches: `source` int [B, S], `target` int [B, T + 1] (the tokenizer's start token, the text, its end token, then -1; inputs are all but
    the last, predicted are all but the first), `weight` float [B].
    """

    shown = ("loss", "accuracy", "exact_match", "bleu", "rougeL")

    def __init__(
        self,
        info: Mapping,
        *,
        label_smoothing: float = 0.0,
        scores: tuple[str, ...] = ("exact_match",),
        max_length: int | None = None,
    ):
        """
        Args:
          info: of the data set: `vocab_size`, `tokenizer` with start and end tokens, and `target_length` if known.
          label_smoothing: probability taken from the true token and spread evenly over all tokens. Training only.
          scores: metrics of greedily decoded targets in evaluation: `exact_match`, `bleu` (of sacrebleu, 0 to 100), `rouge1`, `rouge2`,
            `rougeL` (F-measures of rouge-score, 0 to 1). An empty list saves the decoding.
          max_length: largest number of tokens to decode, with the end token; by default the length of the data's targets.
        """
        require(info, "seq2seq", "pairs of texts", "vocab_size", "tokenizer")
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"config.task.label_smoothing must lie in [0, 1), got {label_smoothing}.")
        if max_length is not None and max_length < 1:
            raise ConfigError(f"config.task.max_length must be at least 1, got {max_length}.")
        self.tokenizer = info["tokenizer"]
        special = getattr(self.tokenizer, "special", lambda name: None)
        self.start, self.end = special("start"), special("end")
        if self.start is None or self.end is None:
            raise ConfigError(
                "config.task: 'seq2seq' needs a tokenizer with start and end tokens: config.data.tokenizer one of "
                "'character+special', 'byte+special', 'word:SIZE', 'bpe:SIZE'."
            )
        self._scorers = _scorers(scores)
        self.scores = tuple(scores)
        self.provides = {"vocab_size": info["vocab_size"]}
        self.batch = {"source": (None,), "target": (None,)}
        self.label_smoothing = label_smoothing
        self.max_length, self._target_length = max_length, info.get("target_length")

    def predict(self, model, batch, key=None):
        """Return the greedily decoded targets of `source` [B, S], int [B, max_length], -1 after the end token; see `text`."""
        length = self.max_length or self._target_length
        if length is None:
            raise ValueError("the length of the data's targets is unknown: set task.max_length")
        return self._decode(model, batch["source"], length)

    def loss(self, model, batch, rngs):
        """Return the sum of cross-entropies over targets that count, their number, and metrics."""
        logits, targets, weight = self._forward(model, batch, rngs)
        metrics = _metrics(logits, targets, weight)
        losses = cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
        return jnp.sum(losses * weight), jnp.sum(weight), metrics

    def evaluate(self, model, batch, key):
        """Return `loss` and `accuracy` of the next token given the true ones before it."""
        return _metrics(*self._forward(model, batch, None))

    def outputs(self, model, batch, key):
        """Return the greedily decoded targets, and the true ones without the start token, int32 [B, …], -1 after the end."""
        length = self.max_length or batch["target"].shape[1] - 1
        predicted = self._decode(model, batch["source"], length)
        return {"predicted": predicted, "target": batch["target"][:, 1:]}

    def score(self, outputs):
        """Return the values of `scores`. `exact_match` is the share of targets that are decoded exactly."""
        predicted, target = outputs["predicted"], outputs["target"]
        values = {}
        if "exact_match" in self.scores:
            longest = max(predicted.shape[1], target.shape[1])
            one, other = (np.pad(x, ((0, 0), (0, longest - x.shape[1])), constant_values=-1) for x in (predicted, target))
            values["exact_match"] = float(np.mean(np.all(one == other, axis=1)))
        if self._scorers:
            texts = [self.text(row) for row in predicted], [self.text(row) for row in target]
            for scorer in self._scorers:
                values |= scorer(*texts)
        return values

    def text(self, tokens) -> str:
        """Return a decoded row, int [T], as text up to its end token."""
        tokens = np.asarray(tokens).tolist()
        return self.tokenizer.decode(list(itertools.takewhile(lambda token: token not in (self.end, -1), tokens)))

    def _decode(self, model, source, length):
        return decoding.greedy(with_known_tokens(model, known_tokens(self.tokenizer)), source, length, start=self.start, end=self.end)

    def _forward(self, model, batch, rngs):
        target = batch["target"]
        logits = model(batch["source"], target[:, :-1], rngs=rngs).astype(jnp.float32)
        targets = target[:, 1:]
        return logits, jnp.maximum(targets, 0), (targets >= 0) * batch["weight"][:, None]


def _metrics(logits, targets, weight):
    losses = cross_entropy(logits, targets)
    correct = jnp.argmax(logits, axis=-1) == targets
    total = jnp.sum(weight)
    return {"loss": (jnp.sum(losses * weight), total), "accuracy": (jnp.sum(correct * weight), total)}


def _scorers(scores: tuple[str, ...]) -> list:
    """Return functions (predicted texts, true texts) -> values, from the libraries that compute the scores.

    Raises:
      ConfigError: there is no such score, or a package is not installed.
    """
    for name in scores:
        if name not in SCORES:
            raise ConfigError(f"config.task.scores: there is no {name!r}. There are: {', '.join(SCORES)}.")
    scorers = []
    try:
        if "bleu" in scores:
            import sacrebleu

            scorers.append(lambda predicted, true: {"bleu": float(sacrebleu.corpus_bleu(predicted, [true]).score)})
        if rouge := [name for name in scores if name.startswith("rouge")]:
            from rouge_score.rouge_scorer import RougeScorer

            scorer = RougeScorer(rouge)

            def mean_rouge(predicted, true):
                rows = [scorer.score(t, p) for p, t in zip(predicted, true, strict=True)]
                return {name: float(np.mean([row[name].fmeasure for row in rows])) for name in rouge}

            scorers.append(mean_rouge)
    except ImportError as error:
        raise ConfigError(f"config.task.scores: {error.name} is not installed: pip install 'jaxmodels[text]'.") from error
    return scorers
