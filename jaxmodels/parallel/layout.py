"""Logical axes of arrays inside a model, and the layout that maps them to axes of a mesh.

A model calls `constrain(x_BTD, "batch", "sequence", None)`. Without a layout, or on one device, this returns x unchanged. So models
know logical axes and no mesh.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout as DeviceLayout
from jax.experimental.layout import with_layout_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Logical axis -> mesh axes. The config key `sharding.rules` overrides these.
RULES: Mapping[str, tuple[str, ...]] = {
    # Of activations.
    "batch": ("slices", "data", "fsdp", "expert"),
    "group": ("slices", "data", "fsdp"),  # rows of a batch, next to an axis of experts
    "sequence": ("context",),
    # Of both.
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "expert": ("expert",),
    # Of parameters.
    "embed": ("fsdp",),
    "largest": ("fsdp",),  # the largest dimension that divides, of parameters without a pattern
    "layers": ("pipeline",),
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one compiled function is sharded over devices.

    Attributes:
      mesh: all devices.
      rules: logical axis -> mesh axes, as `RULES`, with the config's own rules.
      context: how attention spans the shards of a sequence, as in `sharding.Sharding`.
      microbatches: number of parts that a pipeline splits a batch into.
      axis: under `pmap`, the name of the mapped axis. Each device then runs the model on its own rows.
      left_whole: notes about dimensions that could not be sharded, for the log and the manifest. Filled while tracing.
      used: mesh axes that an array is sharded over. Filled while tracing.
    """

    mesh: Mesh
    rules: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: RULES)
    context: Literal["gather", "heads", "ring"] = "gather"
    microbatches: int = 1
    axis: str | None = None
    left_whole: dict[str, None] = dataclasses.field(default_factory=dict)
    used: set[str] = dataclasses.field(default_factory=set)

    def axes(self, name: str | None) -> tuple[str, ...]:
        """Return the mesh axes, of size above 1, of a logical axis.

        Rows of a batch are `batch` inside of a pipeline's layers, and `rows` outside of them. There all stages would do the same work, so
        each takes a part of the rows.
        """
        if name == "rows":
            return tuple(dict.fromkeys((*self.axes("batch"), *self.axes("layers"))))
        return tuple(axis for axis in self.rules[name] if self.mesh.shape[axis] > 1) if name is not None else ()

    def size(self, name: str | None) -> int:
        """Return the number of shards of a dimension with that logical axis."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes(name))

    def spec(self, *names: str | None, shape: Sequence[int] | None = None) -> PartitionSpec:
        """Return the partition of an array whose dimensions have these logical axes. Given `shape`, dimensions that do not divide are replicated."""
        parts, used = [], set()
        for i, name in enumerate(names):
            if name == "rows" and shape is not None and shape[i] % self.size("rows"):
                name = "batch"
            axes = tuple(axis for axis in self.axes(name) if axis not in used)
            ways = math.prod(self.mesh.shape[axis] for axis in axes)
            if shape is not None and shape[i] % ways:
                if shape[i] > 1:
                    self.left_whole[f"{name} of {shape[i]} does not divide over {' × '.join(f'{axis}={self.mesh.shape[axis]}' for axis in axes)}"] = None
                axes = ()
            used.update(axes)
            parts.append(axes or None)
        return PartitionSpec(*parts)

    def sharding(self, *names: str | None, shape: Sequence[int] | None = None) -> NamedSharding:
        """Return `spec` on the mesh."""
        return NamedSharding(self.mesh, self.spec(*names, shape=shape))


def axes_in(spec: PartitionSpec) -> list[str]:
    """Return the mesh axes of a partition."""
    return [axis for part in spec if part for axis in ((part,) if isinstance(part, str) else part)]


_layout: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("layout", default=None)


@contextlib.contextmanager
def use(layout: Layout | None):
    """Shard what is traced inside the context by `layout`."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def current() -> Layout | None:
    """Return the layout of a function that is traced as one program for several devices, and None elsewhere, also under `pmap`."""
    layout = _layout.get()
    return None if layout is None or layout.axis is not None or layout.mesh.size == 1 else layout


def traced_for(platform: str) -> bool:
    """Return whether the function being traced is for a platform, `cpu`, `gpu` or `tpu`, by its layout.

    Returns False without a layout: querying JAX here would initialise the backend.
    """
    layout = _layout.get()
    return layout is not None and layout.mesh.devices.flat[0].platform == platform


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrain the sharding of x by the logical names of its axes (None: replicated). Return x unchanged without a layout."""
    layout = current()
    if layout is None:
        return x
    if x.ndim != len(names):
        raise ValueError(f"constrain got {len(names)} logical axes for an array of {x.ndim} dimensions")
    sharding = layout.sharding(*names, shape=x.shape)
    layout.used.update(axes_in(sharding.spec))
    return jax.lax.with_sharding_constraint(x, sharding)


def row_major(x_BTD: jax.Array) -> jax.Array:
    """On a TPU, constrain x [B, T, D] to a memory layout with D along the lanes of a vector and T along its sublanes.

    This is for the residual stream of a Transformer. The compiler would choose a layout for the norms, and copy it for the products.
    """
    layout = current()
    if not traced_for("tpu") or (layout is not None and layout.axes("layers")):
        return x_BTD  # a pipeline adds a leading dimension for the stages
    names = ("batch", "sequence", None)
    # Per device: libtpu 0.0.42 reads such a constraint on a sharded array as one on the whole array.
    return on_each_device(lambda x: with_layout_constraint(x, DeviceLayout((0, 1, 2))), [names], names)(x_BTD)


def gathered(parameter: jax.Array, *names: str | None) -> jax.Array:
    """Gather a parameter over the axes that only store it (`embed`).

    This is for lookups, where the compiler would move activations instead. For products it gathers the parameter without help.
    """
    return constrain(parameter, *(None if name == "embed" else name for name in names))


def mapped_axis() -> str | None:
    """Return the name of the mapped axis under `pmap`, and None elsewhere."""
    layout = _layout.get()
    return None if layout is None else layout.axis


def sum_over_devices(tree: Any) -> Any:
    """Return the sum of a tree over all devices under `pmap`. Elsewhere return the tree, which covers all rows already."""
    axis = mapped_axis()
    return tree if axis is None else jax.lax.psum(tree, axis)


def own_key(key: jax.Array) -> jax.Array:
    """Return the key; under `pmap`, a key for each device, since each draws for its own rows. The first device has the key itself."""
    axis = mapped_axis()
    if axis is None:
        return key
    device = jax.lax.axis_index(axis)
    return jax.lax.cond(device == 0, lambda: key, lambda: jax.random.fold_in(key, device))


def row_keys(key: jax.Array, rows: int) -> jax.Array:
    """Return a key for each row of a batch [rows]. The keys do not depend on the sharding of the rows."""
    layout, axis = _layout.get(), mapped_axis()
    if axis is None:
        return jax.random.split(key, rows)
    device, data = jax.lax.axis_index(axis), jax.random.key_data(key)
    first = jax.lax.psum(jnp.where(device == 0, data, jnp.zeros_like(data)), axis)
    keys = jax.random.split(jax.random.wrap_key_data(first, impl=jax.random.key_impl(key)), rows * layout.mesh.size)
    return jax.lax.dynamic_slice_in_dim(keys, device * rows, rows)


def on_each_device(function: Callable, inputs: Sequence[Sequence[str | None]], output: Any) -> Callable:
    """Return the function mapped over devices: each runs it on its own shards of the arguments. Return the function itself on one device.

    This is for kernels that the compiler cannot partition, and for explicit collectives (`layout.axes` names their axes).

    Args:
      function: of arrays.
      inputs: logical axes of each argument.
      output: logical axes of the result; or a dict or tuple of these for several results.
    """
    layout = current()
    if layout is None:
        return function

    def mapped(*arguments):
        whole = {name for names, x in zip(inputs, arguments, strict=True) for name, size in zip(names, x.shape, strict=True) if size % layout.size(name)}
        specs = tuple(layout.spec(*(None if name in whole else name for name in names)) for names in inputs)
        layout.used.update(axis for spec in specs for axis in axes_in(spec))
        results = _specs(layout, output, whole)
        return jax.shard_map(function, mesh=layout.mesh, in_specs=specs, out_specs=results, check_vma=False)(*arguments)

    return mapped


def _specs(layout: Layout, names: Any, whole: set) -> Any:
    if isinstance(names, dict):
        return {key: _specs(layout, value, whole) for key, value in names.items()}
    if names and isinstance(names[0], tuple | dict):
        return tuple(_specs(layout, value, whole) for value in names)
    return layout.spec(*(None if name in whole else name for name in names))
