"""Runs with random weights, made without data or training: what is tested of them is what comes after."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels.experiment import build_model
from jaxmodels.sections import resolve
from jaxmodels.training.merge import new_folder, write_run
from jaxmodels.training.step import flatten, split


def untrained_run(config: dict, info: dict, path) -> str:
    """The folder of a finished run of a config, every parameter and statistic drawn at random; `info` is what its data would say."""
    resolved = resolve(config)
    _, build = build_model(resolved, info)
    params, stats = (flatten(tree) for tree in split(nnx.eval_shape(lambda: build(nnx.Rngs(params=0))))[1:])
    random = np.random.default_rng(0)
    params = {name: jnp.asarray(0.2 * random.standard_normal(x.shape, np.float32)) for name, x in params.items()}
    stats = {name: jnp.asarray(random.uniform(0.5, 1.5, x.shape).astype(np.float32)) for name, x in stats.items()}
    tokenizer = info.get("tokenizer")
    write_run(new_folder(str(path)), resolved, params, stats, 0, info=info, tokenizer=tokenizer and tokenizer.to_json(), parents=[])
    return str(path)
