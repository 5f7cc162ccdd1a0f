"""Models, and runs, with drawn parameters, for tests of what is made with them."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels.experiment.sections import resolve
from jaxmodels.models import create
from jaxmodels.models.functional import flatten, merge, split
from jaxmodels.runs.merge import new_folder, write_run


def drawn(name: str, *args, scale: float = 0.5, seed: int = 1, **options) -> nnx.Module:
    """A model with every parameter drawn by NumPy, which compiles nothing. Large ones keep logits apart: no near ties."""
    graph, params, stats = split(nnx.eval_shape(lambda: create(name, *args, rngs=nnx.Rngs(0), **options)))
    rng = np.random.default_rng(seed)
    return merge(graph, jax.tree.map(lambda p: jnp.asarray(rng.normal(0, scale, p.shape), p.dtype), params), stats)


def run_of(folder, model: dict, task: dict, tokenizer, *, mesh: dict | None = None, scale: float = 0.5) -> str:
    """A run's folder with drawn weights, as if it had been trained on text with this tokenizer. Returns its path."""
    info = {"vocab_size": tokenizer.vocab_size, "tokenizer": tokenizer, "target_length": 20}
    config = {"model": model, "task": task, "data": {"source": "arrays", "batch_size": 8}, "optimizer": {"name": "sgd", "learning_rate": 0.0}}
    resolved = resolve(config | {"training": {"steps": 1}, "mesh": mesh or {}})
    weights = drawn(model["name"], tokenizer.vocab_size, scale=scale, **{key: value for key, value in model.items() if key != "name"})
    _, params, stats = split(weights)
    write_run(new_folder(str(folder)), resolved, flatten(params), flatten(stats), 7, info=info, tokenizer=tokenizer.to_json(), parents=[])
    return str(folder)
