"""Models with drawn parameters, for tests of what is made with them."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels.models import create
from jaxmodels.training.step import merge, split


def drawn(name: str, *args, scale: float = 0.5, seed: int = 1, **options) -> nnx.Module:
    """A model with every parameter drawn by NumPy, which compiles nothing. Large ones keep logits apart: no near ties."""
    graph, params, stats = split(nnx.eval_shape(lambda: create(name, *args, rngs=nnx.Rngs(0), **options)))
    rng = np.random.default_rng(seed)
    return merge(graph, jax.tree.map(lambda p: jnp.asarray(rng.normal(0, scale, p.shape), p.dtype), params), stats)
