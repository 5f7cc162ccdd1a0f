"""Transcription: predict a sequence of labels from a sequence of frames, without alignments."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from jaxmodels.tasks import losses
from jaxmodels.tasks.base import Task, require


class Transcribe(Task):
    """Connectionist temporal classification (Graves et al. 2006). The last class is the blank.

    Batches: `frames` float [B, T, D], `target` int [B, S] (labels from 0, then -1), `weight` float [B], and optionally `length` int [B], the
    number of frames before the padding.
    """

    scores = ("label_error_rate", "exact_match")
    shown = ("loss", "label_error_rate", "exact_match")

    def __init__(self, info: Mapping):
        """
        Args:
          info: of the data set: `frame_width`, `num_labels`.
        """
        require(info, "transcribe", "frames with labels", "frame_width", "num_labels")
        self.blank = info["num_labels"]
        self.provides = {"frame_width": info["frame_width"], "head": ("tokens", self.blank + 1)}
        self.batch = {"frames": (None, info["frame_width"]), "target": (None,)}

    def predict(self, model, batch, key=None):
        """Return the most probable label of each frame, int [B, T]; -1 for blanks and for repetitions of the frame before."""
        logits, valid = self._logits(model, batch, None)
        best = jnp.argmax(logits, axis=-1)
        before = jnp.pad(best[:, :-1], ((0, 0), (1, 0)), constant_values=self.blank)
        return jnp.where((best != before) & (best != self.blank) & valid, best, -1)

    def loss(self, model, batch, rngs):
        """Return the weighted sum over rows of the negative log-likelihood of all alignments, in nats; the sum of weights; metrics."""
        logits, valid = self._logits(model, batch, rngs)
        values = losses.ctc(logits, batch["target"], valid=valid, blank=self.blank)
        total, weight = jnp.sum(values * batch["weight"]), jnp.sum(batch["weight"])
        return total, weight, {"loss": (total, weight)}

    def evaluate(self, model, batch, key):
        """Return `loss`, for each row."""
        return self.loss(model, batch, None)[2]

    def outputs(self, model, batch, key):
        """Return the predictions and the targets."""
        return {"predicted": self.predict(model, batch).astype(jnp.int32), "target": batch["target"].astype(jnp.int32)}

    def score(self, outputs):
        """Return `label_error_rate`, insertions, deletions and substitutions divided by the number of true labels, and `exact_match`."""
        pairs = zip(outputs["predicted"], outputs["target"], strict=True)
        wrong = np.array([edit_distance(predicted[predicted >= 0], target[target >= 0]) for predicted, target in pairs])
        rate = wrong.sum() / max(1, np.sum(outputs["target"] >= 0))
        return {"label_error_rate": float(rate), "exact_match": float(np.mean(wrong == 0))}

    def _logits(self, model, batch, rngs):
        frames = batch["frames"]
        valid = jnp.ones(frames.shape[:2], bool)
        if "length" in batch:
            valid = jnp.arange(frames.shape[1]) < batch["length"][:, None]
        return model(frames, valid=valid, rngs=rngs).astype(jnp.float32), valid


def edit_distance(one: np.ndarray, other: np.ndarray) -> int:
    """Return the number of insertions, deletions and substitutions that turn one sequence into the other (Levenshtein 1966)."""
    row = np.arange(len(other) + 1)
    for i, value in enumerate(one):
        change = np.minimum(row[1:] + 1, row[:-1] + (other != value))
        row = np.concatenate([[i + 1], change])
        # Insertions: the minimum over all positions to the left, plus the distance.
        row = np.minimum.accumulate(row - np.arange(len(row))) + np.arange(len(row))
    return int(row[-1])
