"""Low-rank adapters: the trained part of a layer is a product of two thin matrices (LoRA, Hu et al. 2021).

With DoRA (Liu et al. 2024) the columns of the sum of both matrices are also rescaled to trained lengths, the magnitudes.

Shapes: D width in, F width out, R rank, V rows of an embedding; stacked layers have additional leading axes.
"""

import dataclasses
import re
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmodels.models.layers import Embed, Linear, Output, first_scores
from jaxmodels.models.products import product

PAIR = ("lora_a", "lora_b")  # the last part of the paths of the two thin matrices
MAGNITUDE = "lora_m"  # and of DoRA's magnitudes
ADAPTERS = (*PAIR, MAGNITUDE)


def lengths(matrix: jax.Array) -> jax.Array:
    """Return the Euclidean length of each column of matrices [..., D, F], float32 [..., F]."""
    return jnp.sqrt(jnp.sum(jnp.square(matrix.astype(jnp.float32)), axis=-2))


def factors(matrix: jax.Array, magnitude: jax.Array) -> jax.Array:
    """Return what rescales the columns of `matrix` [..., D, F] to the lengths `magnitude` [..., F].

    The gradient takes the lengths of the columns as constants (section 4.3 of Liu et al. 2024). A column of zeros, which has no direction,
    counts as one of length 1.
    """
    found = lengths(jax.lax.stop_gradient(matrix))
    return (magnitude / jnp.where(found > 0, found, 1.0)).astype(magnitude.dtype)


class LoRALinear(Linear):
    """A linear layer with an adapter: x W + b + scale · (x A) B. Initially A [D, R] is random and B [R, F] is zero.

    The layer's own parameters keep their names, so that the weights of a plain layer fit.
    """

    def __init__(self, linear: nnx.Linear, rank: int, scale: float, *, rngs: nnx.Rngs):
        take_over(self, linear)
        *stack, width_in, width_out = linear.kernel.shape
        bound = width_in**-0.5
        self.lora_a = nnx.Param(jax.random.uniform(rngs.params(), (*stack, width_in, rank), minval=-bound, maxval=bound))
        self.lora_b = nnx.Param(jnp.zeros((*stack, rank, width_out)))
        self.scale = scale

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [..., D]. Returns [..., F]."""
        return super().__call__(x) + product(product(x, self.lora_a[...]), self.lora_b[...]) * self.scale


class DoRALinear(LoRALinear):
    """A linear layer with an adapter and magnitudes m [F]: x V · m / ‖V‖ + b, where V = W + scale · A B and ‖V‖ are the lengths of its columns.

    Initially m are the lengths of the columns of W, so that the layer computes what it did.
    """

    def __init__(self, linear: nnx.Linear, rank: int, scale: float, *, rngs: nnx.Rngs):
        super().__init__(linear, rank, scale, rngs=rngs)
        self.lora_m = nnx.Param(lengths(linear.kernel[...]))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [..., D]. Returns [..., F]."""
        y = (product(x, self.kernel[...]) + product(product(x, self.lora_a[...]), self.lora_b[...]) * self.scale) * factors(_sum(self), self.lora_m[...])
        return y if self.bias is None else y + self.bias[...]


def _sum(linear: LoRALinear) -> jax.Array:
    return linear.kernel[...] + linear.scale * linear.lora_a[...] @ linear.lora_b[...]


def matrix(linear: nnx.Linear) -> jax.Array:
    """Return the matrix of a linear layer, [D, F], with its adapter merged, for callers that do not call the layer."""
    if not isinstance(linear, LoRALinear):
        return linear.kernel[...]
    return _sum(linear) * factors(_sum(linear), linear.lora_m[...])[..., None, :] if isinstance(linear, DoRALinear) else _sum(linear)


class LoRAEmbed(Embed):
    """An embedding with an adapter: row i is E_i + scale · A_i B. Initially A [V, R] is zero and B [R, D] is random."""

    def __init__(self, embed: Embed, rank: int, scale: float, *, rngs: nnx.Rngs):
        take_over(self, embed)
        rows, width = embed.embedding.shape
        self.lora_a = nnx.Param(jnp.zeros((rows, rank)))
        self.lora_b = nnx.Param(jax.random.normal(rngs.params(), (rank, width)) * rank**-0.5)
        self.scale = scale

    def __call__(self, indices: jax.Array) -> jax.Array:
        """indices: int of any shape, each in [0, V). Returns [..., D]."""
        return super().__call__(indices) + jnp.take(self.lora_a[...], indices, axis=0, mode="clip") @ self.lora_b[...] * self.scale

    def attend(self, x: jax.Array) -> jax.Array:
        """x: [..., D]. Returns products with every row, [..., V]."""
        return super().attend(x) + first_scores((x @ self.lora_b[...].T) @ self.lora_a[...].T * self.scale, self.rows)


class DoRAEmbed(LoRAEmbed):
    """An embedding with an adapter and magnitudes m [D], one for each column of the table, as in PEFT."""

    def __init__(self, embed: Embed, rank: int, scale: float, *, rngs: nnx.Rngs):
        super().__init__(embed, rank, scale, rngs=rngs)
        self.lora_m = nnx.Param(lengths(embed.embedding[...]))

    def __call__(self, indices: jax.Array) -> jax.Array:
        """indices: int of any shape, each in [0, V). Returns [..., D]."""
        return super().__call__(indices) * self._factors()

    def attend(self, x: jax.Array) -> jax.Array:
        """x: [..., D]. Returns products with every row, [..., V]."""
        return super().attend(x * self._factors())

    def _factors(self) -> jax.Array:
        return factors(self.embedding[...] + self.scale * self.lora_a[...] @ self.lora_b[...], self.lora_m[...])


class LoRAOutput(LoRALinear):
    """A scoring of tokens (`layers.Output`) with an adapter."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [..., D]. Returns [..., V]."""
        return first_scores(super().__call__(x), self.tokens)


class DoRAOutput(DoRALinear):
    """The same with DoRA."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [..., D]. Returns [..., V]."""
        return first_scores(super().__call__(x), self.tokens)


# Kind of layer -> with LoRA, with DoRA.
LAYERS = {Linear: (LoRALinear, DoRALinear), nnx.Linear: (LoRALinear, DoRALinear), Embed: (LoRAEmbed, DoRAEmbed), Output: (LoRAOutput, DoRAOutput)}


def take_over(module: nnx.Module, other: nnx.Module) -> None:
    """Copy the parameters and settings of another module, under their own names."""
    for name, value in vars(other).items():
        if not name.startswith("_"):
            setattr(module, name, value)


def add_lora(model: nnx.Module, *, rank: int, alpha: float, targets: tuple[str, ...], dora: bool = False, rngs: nnx.Rngs) -> None:
    """Add an adapter to every linear layer and embedding of `model` whose path matches one of `targets` anywhere.

    Args:
      model: changed in place; its layers may be stacked.
      rank: R.
      alpha: the adapter's output is multiplied by alpha / rank.
      targets: regular expressions on paths such as `blocks/0/attention/query`.
      dora: also rescale the columns to trained lengths.
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
        replace(model, path, LAYERS[type(layer)][dora](layer, rank, alpha / rank, rngs=rngs))


def replace(model: nnx.Module, path: tuple[str | int, ...], module: nnx.Module) -> None:
    """Put a module in the place of the one at `path` of a model."""
    for key in path[:-1]:
        model = _child(model, key)
    if isinstance(path[-1], str) and not isinstance(model, dict | nnx.Dict):
        setattr(model, path[-1], module)
    else:
        model[path[-1]] = module


def _child(module, key):
    return getattr(module, key) if isinstance(key, str) and hasattr(module, key) else module[key]


def merge_adapters(params: dict, scale: float) -> dict:
    """Return equivalent weights without adapters.

    Args:
      params: flat, path -> array.
      scale: alpha / rank.

    Returns:
      The weights without adapters, whose products are added to their layers' matrices: W + scale · A B. With magnitudes, its columns have their lengths.
    """
    merged = {path: value for path, value in params.items() if not path.endswith(ADAPTERS)}
    for path in params:
        if path.endswith(PAIR[0]):
            layer = path.removesuffix(PAIR[0])
            name, whole = _adapted(params, layer, scale)
            merged[name] = whole * factors(whole, params[layer + MAGNITUDE])[..., None, :] if layer + MAGNITUDE in params else whole
    return merged


def _adapted(params: dict, layer: str, scale: float) -> tuple[str, jax.Array]:
    """Return the path of a layer's matrix, and the matrix with the product of the thin ones added."""
    name = layer + ("kernel" if layer + "kernel" in params else "embedding")
    return name, params[name] + scale * jnp.matmul(params[layer + PAIR[0]], params[layer + PAIR[1]], precision="highest")


def magnitudes(params: dict, paths: Iterable[str], scale: float) -> dict[str, jax.Array]:
    """Return the magnitudes at `paths` with which DoRA begins: the lengths of the columns of W + scale · A B, of the same parameters."""
    return {path: lengths(_adapted(params, path.removesuffix(MAGNITUDE), scale)[1]) for path in paths}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """The `lora` section: low-rank adapters of linear layers and embeddings, trained in their place (Hu et al. 2021).

    Attributes:
      rank: inner size R of an adapter's two matrices.
      targets: patterns on paths of linear layers and embeddings.
      alpha: an adapter's output is multiplied by alpha / rank. The default is `rank`.
      dora: also train the length of each column of the adapted matrices (DoRA, Liu et al. 2024).
    """

    rank: int
    targets: tuple[str, ...]
    alpha: float | None = None
    dora: bool = False

    @property
    def scale(self) -> float:
        """Factor on the adapter's output, alpha / rank."""
        return (self.rank if self.alpha is None else self.alpha) / self.rank
