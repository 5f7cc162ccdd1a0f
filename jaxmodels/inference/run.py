"""A loaded run: predict, generate, stream."""

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
from jaxmodels.runs.weights import Located
from jaxmodels.step.step import keys_by_index


class Run:
    """A loaded run.

    Attributes:
      model: the Flax module with its weights, in evaluation mode.
      task: the task object.
      config: the resolved config.
      step: the step of the weights.
      tokenizer: the tokenizer of a text run, or None.
      layout: sharding of the model over devices, or None for one device.
      located: where the weights came from, or None.
      info: the description of the data set, as the run's manifest has it.
    """

    def __init__(
        self,
        model: nnx.Module,
        task: Any,
        config: dict,
        step: int,
        tokenizer,
        layout: Layout | None = None,
        located: Located | None = None,
        info: Mapping[str, Any] | None = None,
    ):
        self.model, self.task, self.config, self.step, self.tokenizer, self.layout = model, task, config, step, tokenizer, layout
        self.located, self.info = located, dict(info or {})
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
          seed: random seed of tasks whose predictions are sampled. The samples of a row depend on the seed and the row's index in the batch.

        Returns:
          By task:
            `classify` from `image` [B, H, W, C], `classify_text` from `tokens` [B, T]: class probabilities [B, C].
            `language_model` from `tokens`: log-probabilities of the next token at each position [B, T, V].
            `masked_lm` from `tokens`: log-probabilities of the token at each position [B, T, V].
            `tag` from `tokens`: tag indices [B, T]; their names are `run.task.names`.
            `regress_text` from `tokens`: numbers [B].
            `seq2seq` from `source` [B, S]: decoded tokens [B, U]; `run.task.text(row)` decodes a row to text.
            `forecast` from `past` [B, L, V]: [B, H, V].
        """
        return jax.tree.map(np.asarray, self._predict(*self._weights, dict(batch), jax.random.key(seed)))

    def generate(self, prompts: Prompt | Sequence[Prompt], *, precision: str = "float32", **options: Any) -> list[Completion]:
        """Generate a completion for each prompt; a `seq2seq` run generates the target sequence of each source.

        Args:
          prompts: one text or several, or lists of token ids.
          precision: dtype of the computation, `float32` or `bfloat16`; `int8` stores matrices in 8 bits (`models.int8`), and computes in bfloat16, on
            CPUs in float32.
          options: `max_tokens`, `temperature`, `top_k`, …; see `generation.generate.Options`.

        Raises:
          ConfigError: the task does not generate text; a prompt is empty or too long; an option is invalid.
        """
        return self.generator(precision).generate(prompts, **options)

    def stream(self, prompt: Prompt, *, precision: str = "float32", **options: Any) -> Iterator[str]:
        """Yield the completion of one prompt in pieces as they are generated; arguments as in `generate`."""
        return self.generator(precision).stream(prompt, **options)

    @functools.lru_cache(maxsize=2)  # noqa: B019  the cache keeps the last two runs alive, which is intended
    def generator(self, precision: str, model: nnx.Module | None = None) -> Generator:
        """Return the model prepared for generation, or another one in its place; `precision` and errors as in `generate`."""
        name = self.config["task"]["name"]
        if name not in ("language_model", "seq2seq"):
            raise ConfigError(
                f"a run of the task {name!r} cannot generate text; only 'language_model' and 'seq2seq' can. "
                "Use jaxmodels evaluate or jaxmodels.load(RUN).predict(batch)."
            )
        if precision not in (*functional.DTYPES, "int8"):
            raise ConfigError(f"precision must be float32, bfloat16 or int8, got {precision!r}.")
        in_8_bits = precision == "int8"
        if in_8_bits:
            precision = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        own = {"start": self.task.start, "ends": (self.task.end,)} if name == "seq2seq" else {}
        return Generator(model or self.model, self.tokenizer, dtype=functional.DTYPES[precision], in_8_bits=in_8_bits, layout=self.layout, **own)
