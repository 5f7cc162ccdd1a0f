"""A trained run, loaded: predict, generate, stream."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels.errors import ConfigError
from jaxmodels.generation.generate import Completion, Generator, Prompt
from jaxmodels.models import functional
from jaxmodels.parallel.layout import Layout
from jaxmodels.step.step import keys_by_index


class Run:
    """A trained run, loaded.

    Attributes:
      model: the Flax module with its weights, in evaluation mode.
      task: what it learned.
      config: resolved.
      step: of the weights.
      tokenizer: of a text run, or None.
      layout: how the model is spread over devices; None for one.
    """

    def __init__(self, model: nnx.Module, task: Any, config: dict, step: int, tokenizer, layout: Layout | None = None):
        self.model, self.task, self.config, self.step, self.tokenizer, self.layout = model, task, config, step, tokenizer, layout
        graph, params, stats = functional.split(model)
        self._weights = (params, stats)

        def predict(params, stats, batch, key):
            keys = keys_by_index(key, jnp.arange(len(jax.tree.leaves(batch)[0])))
            return task.predict(functional.evaluation_model(graph, params, stats), batch, keys)

        self._predict = jax.jit(predict)

    def predict(self, batch: Mapping[str, np.ndarray], *, seed: int = 0) -> Any:
        """Return the predictions of the task for a batch.

        Args:
          batch: arrays with B rows, the model's inputs. Encode text with `run.tokenizer.encode`, and pad it with -1.
          seed: of tasks that draw their predictions. The draws of a row depend on the seed and its number in the batch.

        Returns:
          By task: `classify`, of `image` [B, H, W, C], and `classify_text`, of `tokens` [B, T]: class probabilities [B, C].
          `language_model`, of `tokens`: log-probabilities of what follows each [B, T, V]; `masked_lm`: of what is at each place.
          `tag`, of `tokens`: the tags' numbers [B, T], names in `run.task.names`. `regress_text`, of `tokens`: numbers [B].
          `seq2seq`, of `source` [B, S]: decoded tokens [B, U], which `run.task.text(row)` makes a text of.
          `forecast`, of `past` [B, L, V]: [B, H, V].
        """
        return jax.tree.map(np.asarray, self._predict(*self._weights, dict(batch), jax.random.key(seed)))

    def generate(self, prompts: Prompt | Sequence[Prompt], *, precision: str = "float32", **options: Any) -> list[Completion]:
        """Texts that the model makes of prompts: what follows them, or of a `seq2seq` run what they become.

        Args:
          prompts: a text or several, or lists of token numbers.
          precision: of the computation, `float32` or `bfloat16`.
          options: `max_tokens`, `temperature`, `top_k`, …, as `inference.generate.Options` has them.

        Raises:
          ConfigError: this run makes no texts; a prompt that is empty or does not fit; options that mean nothing.
        """
        return self._generator(precision).generate(prompts, **options)

    def stream(self, prompt: Prompt, *, precision: str = "float32", **options: Any) -> Iterator[str]:
        """The text of one prompt, in pieces as they come; arguments as of `generate`."""
        return self._generator(precision).stream(prompt, **options)

    @functools.lru_cache(maxsize=2)  # noqa: B019  a run is kept as long as its texts are made
    def _generator(self, precision: str) -> Generator:
        name = self.config["task"]["name"]
        if name not in ("language_model", "seq2seq"):
            raise ConfigError(
                f"a run of the task {name!r} makes no texts, those of 'language_model' and 'seq2seq' do; "
                "evaluate this one with jaxmodels evaluate, or ask jaxmodels.load(RUN).predict(batch)."
            )
        if precision not in functional.DTYPES:
            raise ConfigError(f"precision is {' or '.join(functional.DTYPES)}, got {precision!r}.")
        own = {"start": self.task.start, "ends": (self.task.end,)} if name == "seq2seq" else {}
        return Generator(self.model, self.tokenizer, dtype=functional.DTYPES[precision], layout=self.layout, **own)
