"""The mesh of devices, and where arrays lie on it."""

import dataclasses

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxmodels.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSizes:
    """The `mesh` section: devices along each axis; -1 takes what the others leave.

    Attributes:
      data: copies of the model, each with a share of the batch.
    """

    data: int = -1


def make_mesh(sizes: MeshSizes, devices=None) -> Mesh:
    """A mesh of all devices (or those given), with every axis of `MeshSizes` in order.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = dataclasses.asdict(sizes)
    known = int(np.prod([size for size in shape.values() if size != -1]))
    free = [axis for axis, size in shape.items() if size == -1]
    if len(free) > 1 or any(size == 0 or size < -1 for size in shape.values()):
        raise ConfigError(f"config.mesh: sizes must be 1 or more, and at most one of them -1; got {shape}.")
    if free:
        shape[free[0]] = len(devices) // known
    if int(np.prod(list(shape.values()))) != len(devices):
        raise ConfigError(f"config.mesh: {shape} makes {int(np.prod(list(shape.values())))} devices, but there are {len(devices)}.")
    # Auto: under Explicit, which is JAX's own default now, gathers and recurrent loops need shardings spelled out.
    return jax.make_mesh(tuple(shape.values()), tuple(shape), devices=devices, axis_types=(AxisType.Auto,) * len(shape))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows spread over the data axis."""
    return NamedSharding(mesh, PartitionSpec("data"))


def check_batch(batch_size: int, accumulate: int, mesh: Mesh, key: str) -> None:
    """Raises ConfigError unless a batch divides over accumulation steps and devices."""
    ways = mesh.shape["data"]
    if batch_size % (accumulate * ways):
        parts = f"{ways} devices" + (f" × {accumulate} accumulation steps" if accumulate > 1 else "")
        below, above = batch_size // (accumulate * ways) * accumulate * ways, -(-batch_size // (accumulate * ways)) * accumulate * ways
        raise ConfigError(f"config.{key}={batch_size} does not divide over {parts}; try {below or above} or {above}.")


def place(batch, sharding: NamedSharding):
    """This process's rows of a batch, as arrays of the global batch on the devices."""
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)


def bytes_per_device(tree) -> int:
    """Bytes that one device holds of arrays, or of shapes with shardings."""
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in jax.tree.leaves(tree))
