"""Low-rank adapters (Hu et al. 2021): the trained part of a layer is a product of two thin matrices.

Shapes: D width in, F width out, R rank, V rows of an embedding; stacked layers have additional leading axes.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmodels.models.layers import Embed

ADAPTERS = ("lora_a", "lora_b")  # the last part of the parameters' paths


class LoRALinear(nnx.Linear):
    """A linear layer with an adapter: x W + b + scale · (x A) B. Initially A [D, R] is random and B [R, F] is zero.

    The layer's own parameters keep their names, so that the weights of a plain layer fit.
    """

    def __init__(self, linear: nnx.Linear, rank: int, scale: float, *, rngs: nnx.Rngs):
        _take_over(self, linear)
        *stack, width_in, width_out = linear.kernel.shape
        bound = width_in**-0.5
        self.lora_a = nnx.Param(jax.random.uniform(rngs.params(), (*stack, width_in, rank), minval=-bound, maxval=bound))
        self.lora_b = nnx.Param(jnp.zeros((*stack, rank, width_out)))
        self.scale = scale

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [..., D]. Returns [..., F]."""
        return super().__call__(x) + (x @ self.lora_a[...]) @ self.lora_b[...] * self.scale


def matrix(linear: nnx.Linear) -> jax.Array:
    """Return the matrix of a linear layer, [D, F], with its adapter's product added, for callers that do not call the layer."""
    if not isinstance(linear, LoRALinear):
        return linear.kernel[...]
    return linear.kernel[...] + linear.scale * linear.lora_a[...] @ linear.lora_b[...]


class LoRAEmbed(Embed):
    """An embedding with an adapter: row i is E_i + scale · A_i B. Initially A [V, R] is zero and B [R, D] is random."""

    def __init__(self, embed: Embed, rank: int, scale: float, *, rngs: nnx.Rngs):
        _take_over(self, embed)
        rows, width = embed.embedding.shape
        self.lora_a = nnx.Param(jnp.zeros((rows, rank)))
        self.lora_b = nnx.Param(jax.random.normal(rngs.params(), (rank, width)) * rank**-0.5)
        self.scale = scale

    def __call__(self, indices: jax.Array) -> jax.Array:
        """indices: int of any shape, each in [0, V). Returns [..., D]."""
        return super().__call__(indices) + jnp.take(self.lora_a[...], indices, axis=0, mode="clip") @ self.lora_b[...] * self.scale

    def attend(self, x: jax.Array) -> jax.Array:
        """x: [..., D]. Returns products with every row, [..., V]."""
        return super().attend(x) + (x @ self.lora_b[...].T) @ self.lora_a[...].T * self.scale


LAYERS = {nnx.Linear: LoRALinear, Embed: LoRAEmbed}


def _take_over(module: nnx.Module, other: nnx.Module) -> None:
    """Copy the parameters and settings of another module, under their own names."""
    for name, value in vars(other).items():
        if not name.startswith("_"):
            setattr(module, name, value)


def add_lora(model: nnx.Module, *, rank: int, alpha: float, targets: tuple[str, ...], rngs: nnx.Rngs) -> None:
    """Add an adapter to every linear layer and embedding of `model` whose path matches one of `targets` anywhere.

    Args:
      model: changed in place; its layers may be stacked.
      rank: R.
      alpha: the adapter's output is multiplied by alpha / rank.
      targets: regular expressions on paths such as `blocks/0/attention/query`.
      rngs: draws A from its `params` stream.

    Raises:
      ValueError: a pattern matches no such layer; the message lists paths.
    """
    layers = {"/".join(map(str, path)): (path, module) for path, module in nnx.iter_modules(model) if type(module) in LAYERS}
    for target in targets:
        if not any(re.search(target, name) for name in layers):
            raise ValueError(f"lora.targets: {target!r} matches no linear layer or embedding; there are {', '.join(sorted(layers)[:12])}, …")
    for name, (path, layer) in layers.items():
        if not any(re.search(target, name) for target in targets):
            continue
        parent = model
        for key in path[:-1]:
            parent = _child(parent, key)
        adapted = LAYERS[type(layer)](layer, rank, alpha / rank, rngs=rngs)
        if isinstance(path[-1], str) and not isinstance(parent, dict | nnx.Dict):
            setattr(parent, path[-1], adapted)
        else:
            parent[path[-1]] = adapted


def _child(module, key):
    return getattr(module, key) if isinstance(key, str) and hasattr(module, key) else module[key]


def merge_adapters(params: dict, scale: float) -> dict:
    """Return equivalent weights without adapters.

    Args:
      params: flat, path -> array.
      scale: alpha / rank.

    Returns:
      The weights without adapters, whose products are added to their layers' matrices: W + scale · A B.
    """
    merged = {path: value for path, value in params.items() if not path.endswith(ADAPTERS)}
    for path, a in params.items():
        if path.endswith(ADAPTERS[0]):
            layer = path.removesuffix(ADAPTERS[0])
            matrix = layer + ("kernel" if layer + "kernel" in params else "embedding")
            merged[matrix] = params[matrix] + scale * jnp.matmul(a, params[layer + ADAPTERS[1]], precision="highest")
    return merged


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """The `lora` section: low-rank adapters of linear layers and embeddings, trained in their place (Hu et al. 2021).

    Attributes:
      rank: inner size R of an adapter's two matrices.
      targets: patterns on paths of linear layers and embeddings.
      alpha: an adapter's output is multiplied by alpha / rank. The default is `rank`.
    """

    rank: int
    targets: tuple[str, ...]
    alpha: float | None = None

    @property
    def scale(self) -> float:
        """Factor on the adapter's output, alpha / rank."""
        return (self.rank if self.alpha is None else self.alpha) / self.rank
