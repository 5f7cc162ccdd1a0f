"""Embeddings of texts: the last states of an encoder, averaged over tokens or taken at the class token, with unit length.

Shapes: B rows, T tokens, D width.
"""

from collections.abc import Iterator, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.data.features.base import Problem
from jaxmodels.errors import ConfigError
from jaxmodels.inference.form import Example
from jaxmodels.inference.run import Run
from jaxmodels.inference.text_forms import Lengths, TokenIds
from jaxmodels.models import functional
from jaxmodels.parallel import layout as layout_lib
from jaxmodels.tokenizers.base import frame

POOLS = ("mean", "class")
Pool = Literal["mean", "class"]


class Embedder:
    """Texts to vectors of unit length.

    Attributes:
      width: D.
      limit: the most tokens of a text.
    """

    def __init__(self, run: Run):
        """Raises ConfigError unless the model is an encoder of text, with a method `states`."""
        if not has_embeddings(run):
            raise ConfigError(f"the model {run.config['model']['name']!r} gives no embeddings: only encoders of text with a method `states` do.")
        self._run, self._lengths = run, Lengths(run)
        self._ids, self.limit = TokenIds(run, self._lengths), self._lengths.longest
        graph, params, stats = functional.split(run.model)
        self._weights = params, stats

        def embed(params, stats, tokens):
            with layout_lib.use(run.layout):
                return pooled(functional.evaluation_model(graph, params, stats).states(tokens), tokens)

        self._embed = jax.jit(embed)
        self.width = jax.eval_shape(embed, params, stats, jax.ShapeDtypeStruct((1, 1), jnp.int32)).shape[-1]

    def encode(self, text: str | list[int]) -> Example:
        """Return the tokens of a text between the tokenizer's special tokens, or of token ids as they are; raise Problem for what is neither, or too long."""
        if isinstance(text, list):
            return self._lengths.cut(self._ids.encode(text, False))
        if self._run.tokenizer is None:
            raise Problem("the model has no tokenizer: send token ids, [1, 2].")
        try:
            own = self._run.tokenizer.encode(text)
        except ValueError as error:
            raise Problem(f"{error}.") from error
        if not len(own):
            raise Problem("the text is empty.")
        before, after = frame(self._run.tokenizer)
        ids = np.concatenate([before, own, after])
        if len(ids) > self.limit:
            raise Problem(f"the text has {len(ids)} tokens with the special ones, and the model reads {self.limit}: shorten it.")
        return self._lengths.cut(self._ids.encode(ids.tolist(), False))

    def __call__(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the embeddings of `tokens` [B, T], float32 [B, 2, D]: both of `POOLS`."""
        return np.asarray(self._embed(*self._weights, batch["tokens"]))

    def blanks(self) -> Iterator[Example]:
        """Yield one example of each shape that `encode` returns."""
        for length in self._lengths.all:
            yield {"tokens": np.zeros(length, np.int32)}


def has_embeddings(run: Run) -> bool:
    """Whether a run's model is an encoder of text."""
    return hasattr(run.model, "states") and "vocab_size" in run.info and "image_shape" not in run.info and not hasattr(run.model, "extend")


def pooled(states_BTD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Return the mean over tokens that are not padding, and the state of the first token, float32 [B, 2, D], each with unit length."""
    states_BTD = states_BTD.astype(jnp.float32)
    valid_BT1 = (tokens_BT >= 0)[:, :, None]
    mean_BD = jnp.sum(jnp.where(valid_BT1, states_BTD, 0), axis=1) / jnp.maximum(jnp.sum(valid_BT1, axis=1), 1)
    both_BPD = jnp.stack([mean_BD, states_BTD[:, 0]], axis=1)
    return both_BPD / jnp.maximum(jnp.linalg.norm(both_BPD, axis=-1, keepdims=True), 1e-12)
