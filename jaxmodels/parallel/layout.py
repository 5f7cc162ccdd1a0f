"""Names for the axes of arrays inside a model, which mean something only where a step is spread over devices.

A model says `constrain(x_BTD, "batch", "sequence", None)`: where there is no layout, or one device, that is x itself. So
models know names and no mesh, and run as they are without one.
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

# Which mesh axes each logical axis is spread over; `sharding.rules` of a config goes before.
RULES: Mapping[str, tuple[str, ...]] = {
    # Of activations.
    "batch": ("slices", "data", "fsdp", "expert"),
    "group": ("slices", "data", "fsdp"),  # rows of a batch, where experts have the axis `expert`
    "sequence": ("context",),
    # Of both.
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "expert": ("expert",),
    # Of parameters.
    "embed": ("fsdp",),
    "largest": ("fsdp",),  # the largest dimension that divides, of parameters that no pattern names
    "layers": ("pipeline",),
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one compiled function is spread over devices.

    Attributes:
      mesh: of all devices.
      rules: as `RULES`, the config's own first.
      context: how attention spreads over parts of a sequence: as `sharding.Sharding` has it.
      microbatches: that a pipeline cuts a batch into.
      axis: under `pmap`, the name of the mapped axis: each device then runs the model on its own rows.
      left_whole: notes of what could not be spread, for the log and the manifest: filled while tracing.
      used: axes that something is spread over: filled while tracing.
    """

    mesh: Mesh
    rules: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: RULES)
    context: Literal["gather", "heads", "ring"] = "gather"
    microbatches: int = 1
    axis: str | None = None
    left_whole: dict[str, None] = dataclasses.field(default_factory=dict)
    used: set[str] = dataclasses.field(default_factory=set)

    def axes(self, name: str | None) -> tuple[str, ...]:
        """The mesh axes, larger than 1, of a logical name. Rows of a batch are `batch`; and `rows` outside the layers of a pipeline,
        where its stages would all do the same: there each takes a part of them."""
        if name == "rows":
            return tuple(dict.fromkeys((*self.axes("batch"), *self.axes("layers"))))
        return tuple(axis for axis in self.rules[name] if self.mesh.shape[axis] > 1) if name is not None else ()

    def size(self, name: str | None) -> int:
        """Parts that a dimension of that name is cut into."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes(name))

    def spec(self, *names: str | None, shape: Sequence[int] | None = None) -> PartitionSpec:
        """The partition of an array whose dimensions have these names; of that shape, dimensions that do not divide stay whole."""
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
        """`spec` on the mesh."""
        return NamedSharding(self.mesh, self.spec(*names, shape=shape))


def axes_in(spec: PartitionSpec) -> list[str]:
    """The mesh axes of a partition."""
    return [axis for part in spec if part for axis in ((part,) if isinstance(part, str) else part)]


_layout: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("layout", default=None)


@contextlib.contextmanager
def use(layout: Layout | None):
    """Inside, what is traced is spread as `layout` says."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def current() -> Layout | None:
    """The layout of a function that is traced for several devices as one program; None elsewhere, also under `pmap`."""
    layout = _layout.get()
    return None if layout is None or layout.axis is not None or layout.mesh.size == 1 else layout


def on_tpu() -> bool:
    """Whether the function being traced is for TPUs, as its layout says: without one False, since to ask JAX would start the devices."""
    layout = _layout.get()
    return layout is not None and layout.mesh.devices.flat[0].platform == "tpu"


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """x, spread as the names of its dimensions say (None: whole); x itself where there is nothing to spread over."""
    layout = current()
    if layout is None:
        return x
    if x.ndim != len(names):
        raise ValueError(f"{len(names)} names for an array of {x.ndim} dimensions")
    sharding = layout.sharding(*names, shape=x.shape)
    layout.used.update(axes_in(sharding.spec))
    return jax.lax.with_sharding_constraint(x, sharding)


def row_major(x_BTD: jax.Array) -> jax.Array:
    """x [B, T, D], on a TPU with D along the lanes of a vector and T along its sublanes; elsewhere as it is.

    For the stream that a Transformer's blocks add to: the compiler would lay it out for the norms, and copy it for the products.
    """
    layout = current()
    if not on_tpu() or (layout is not None and layout.axes("layers")):
        return x_BTD  # in a pipeline, the stages are a dimension in front
    names = ("batch", "sequence", None)
    # Each device lays out its own part: libtpu 0.0.42 takes such a constraint on a spread array for one on all of it.
    return on_each_device(lambda x: with_layout_constraint(x, DeviceLayout((0, 1, 2))), [names], names)(x_BTD)


def gathered(parameter: jax.Array, *names: str | None) -> jax.Array:
    """A parameter, whole over the axes that it is only stored along (`embed`): for lookups, where the compiler would move
    activations instead; elsewhere it gathers of itself what a product needs."""
    return constrain(parameter, *(None if name == "embed" else name for name in names))


def mapped_axis() -> str | None:
    """Under `pmap`, the name of the mapped axis; None elsewhere."""
    layout = _layout.get()
    return None if layout is None else layout.axis


def sum_over_devices(tree: Any) -> Any:
    """Under `pmap`, the sums over all devices of what each has of its own rows; elsewhere `tree` itself, which is of all rows."""
    axis = mapped_axis()
    return tree if axis is None else jax.lax.psum(tree, axis)


def own_key(key: jax.Array) -> jax.Array:
    """The key; under `pmap` each device's own, since there each draws for its own rows. The first device's is the key itself."""
    axis = mapped_axis()
    if axis is None:
        return key
    device = jax.lax.axis_index(axis)
    return jax.lax.cond(device == 0, lambda: key, lambda: jax.random.fold_in(key, device))


def row_keys(key: jax.Array, rows: int) -> jax.Array:
    """A key for each row of a batch [rows], the same ones however rows are spread over devices."""
    layout, axis = _layout.get(), mapped_axis()
    if axis is None:
        return jax.random.split(key, rows)
    device, data = jax.lax.axis_index(axis), jax.random.key_data(key)
    first = jax.lax.psum(jnp.where(device == 0, data, jnp.zeros_like(data)), axis)
    keys = jax.random.split(jax.random.wrap_key_data(first, impl=jax.random.key_impl(key)), rows * layout.mesh.size)
    return jax.lax.dynamic_slice_in_dim(keys, device * rows, rows)


def on_each_device(function: Callable, inputs: Sequence[Sequence[str | None]], output: Any) -> Callable:
    """The function, run by every device on its own part of the arguments; itself where there is one device.

    For kernels that the compiler cannot spread, and for collectives by hand (`layout.axes` names their axes).

    Args:
      function: of arrays.
      inputs: names of each argument's dimensions.
      output: names of the result's dimensions; or a dict, or tuple, of such for several.
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
