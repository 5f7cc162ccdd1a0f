"""Models and runs with random parameters."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels.experiment.sections import resolve
from jaxmodels.models import create
from jaxmodels.models.functional import flatten, merge, new_rngs, split
from jaxmodels.runs.merge import new_folder, write_run


def drawn(name: str, *args, scale: float = 0.5, seed: int = 1, **options) -> nnx.Module:
    """Return a model with all parameters drawn by NumPy, without compilation. A large `scale` avoids near ties of logits."""
    graph, params, stats = split(nnx.eval_shape(lambda: create(name, *args, rngs=new_rngs(0), **options)))
    rng = np.random.default_rng(seed)
    return merge(graph, jax.tree.map(lambda p: jnp.asarray(rng.normal(0, scale, p.shape), p.dtype), params), stats)


def run_of(folder, model: dict, task: dict, tokenizer, *, mesh: dict | None = None, scale: float = 0.5) -> str:
    """Write the folder of a text run with random weights and this tokenizer; return its path."""
    info = {"vocab_size": tokenizer.vocab_size, "tokenizer": tokenizer, "target_length": 20}
    config = {"model": model, "task": task, "data": {"source": "arrays", "batch_size": 8}, "optimizer": {"name": "sgd", "learning_rate": 0.0}}
    resolved = resolve(config | {"training": {"steps": 1}, "mesh": mesh or {}})
    weights = drawn(model["name"], tokenizer.vocab_size, scale=scale, **{key: value for key, value in model.items() if key != "name"})
    _, params, stats = split(weights)
    write_run(new_folder(str(folder)), resolved, flatten(params), flatten(stats), 7, info=info, tokenizer=tokenizer.to_json(), parents=[])
    return str(folder)
