"""Low-rank adapters (Hu et al. 2021): a linear layer whose trained part is a product of two thin matrices.

Shapes: D width in, F width out, R rank; a stack of layers has further axes in front.
"""

import re

import jax
import jax.numpy as jnp
from flax import nnx

ADAPTERS = ("lora_a", "lora_b")  # the last part of their paths


class LoRALinear(nnx.Linear):
    """A linear layer with an adapter: x W + b + scale · (x A) B, A [D, R] random and B [R, F] zero at first.

    Its own parameters keep their names, so that weights of the plain layer fit it.
    """

    def __init__(self, linear: nnx.Linear, rank: int, scale: float, *, rngs: nnx.Rngs):
        for name, value in vars(linear).items():
            if not name.startswith("_"):
                setattr(self, name, value)
        *stack, width_in, width_out = linear.kernel.shape
        bound = width_in**-0.5
        self.lora_a = nnx.Param(jax.random.uniform(rngs.params(), (*stack, width_in, rank), minval=-bound, maxval=bound))
        self.lora_b = nnx.Param(jnp.zeros((*stack, rank, width_out)))
        self.scale = scale

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [..., D]. Returns [..., F]."""
        return super().__call__(x) + (x @ self.lora_a[...]) @ self.lora_b[...] * self.scale


def add_lora(model: nnx.Module, *, rank: int, alpha: float, targets: tuple[str, ...], rngs: nnx.Rngs) -> None:
    """Gives an adapter to every linear layer of `model` whose path matches one of `targets` (anywhere in it).

    Args:
      model: changed in place; its layers may be stacked.
      rank: R.
      alpha: the adapter's output is multiplied by alpha / rank.
      targets: regular expressions on paths such as `blocks/0/attention/query`.
      rngs: draws A from its `params` stream, after whatever made the model.

    Raises:
      ValueError: a pattern matches no linear layer; names those there are.
    """
    layers = {"/".join(map(str, path)): (path, module) for path, module in nnx.iter_modules(model) if type(module) is nnx.Linear}
    for target in targets:
        if not any(re.search(target, name) for name in layers):
            raise ValueError(f"lora.targets: {target!r} matches no linear layer; there are {', '.join(sorted(layers)[:12])}, …")
    for name, (path, linear) in layers.items():
        if not any(re.search(target, name) for target in targets):
            continue
        parent = model
        for key in path[:-1]:
            parent = _child(parent, key)
        adapted = LoRALinear(linear, rank, alpha / rank, rngs=rngs)
        if isinstance(path[-1], str) and not isinstance(parent, dict | nnx.Dict):
            setattr(parent, path[-1], adapted)
        else:
            parent[path[-1]] = adapted


def _child(module, key):
    return getattr(module, key) if isinstance(key, str) and hasattr(module, key) else module[key]


def merge_adapters(params: dict, scale: float) -> dict:
    """Weights without adapters that compute the same.

    Args:
      params: flat, path -> array.
      scale: alpha / rank.

    Returns:
      The same without adapters, each added to its layer's kernel: W + scale · A B.
    """
    merged = {path: value for path, value in params.items() if not path.endswith(ADAPTERS)}
    for path, a in params.items():
        if path.endswith(ADAPTERS[0]):
            layer = path.removesuffix(ADAPTERS[0])
            merged[layer + "kernel"] = params[layer + "kernel"] + scale * (a @ params[layer + ADAPTERS[1]])
    return merged
