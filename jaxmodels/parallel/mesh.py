"""The mesh of devices, and the rows of a batch that each process reads."""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxmodels.errors import ConfigError

# Axes that shard the rows of a batch. Devices along `expert` have different rows too: outside the experts they do not repeat work.
BATCH_AXES = ("slices", "data", "fsdp", "expert")

_LARGE = 1 << 23  # bytes of a train state whose steps take tens of milliseconds or more on a CPU


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSizes:
    """The `mesh` section: number of devices along each axis. One of the sizes may be -1: it takes the remaining devices.

    The axes are in the mesh's order: later axes connect devices that are closer to each other.

    Attributes:
      slices: groups of devices on the slower network (TPU slices or GPU nodes). Rows of the batch are sharded over them.
      pipeline: stages of consecutive blocks, for Transformers with `scan`.
      data: copies of the model, each with a shard of the batch.
      fsdp: shards of the batch, and of parameters, gradients and optimizer state. A layer's parameters are gathered when it runs.
      expert: shards of the batch, and of a mixture's experts. Tokens are sent to the devices of their experts.
      context: shards of every sequence.
      tensor: shards of heads, hidden units and vocabulary.
    """

    slices: int = 1
    pipeline: int = 1
    data: int = -1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1


def simulate_devices(count: int) -> None:
    """Make JAX use `count` devices on the CPU. Call it before JAX initialises a backend."""
    # XLA's default of one thread per device can deadlock: devices that wait in a collective hold a thread each, so that
    # none may be left for the others (with eight on two cores, the gathers of `fsdp` hung in two of three runs).
    os.environ.setdefault("PJRT_NPROC", str(4 * count))
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)


def run_large_steps_here(state: Any) -> None:
    """Make a CPU run programs in the thread that calls them, and not in one of JAX's, for a large state. Call it before JAX initialises a backend.

    The caller is the main thread, whose heap keeps large blocks for the next step (`hardware/malloc.py`). Those of other threads go back to the kernel,
    which costs BERT-base 600,000 page faults a step: its step then takes 1.6 times as long; and the LSTM of `benchmarks/peers.py`, with a state of 13 MB and 69 MiB of
    temporaries, 18,000, and 1.25 times. Short steps are better run in another thread, beside the loop. Several devices of one process need threads of their own, to wait for each other.

    Args:
      state: shapes of the train state.
    """
    several = jax.config.jax_num_cpu_devices > 1 or "device_count" in os.environ.get("XLA_FLAGS", "")
    if not several and sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) >= _LARGE:
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def mesh_shape(sizes: MeshSizes, devices: int) -> dict[str, int]:
    """Return the size of every axis for a number of devices.

    Raises:
      ConfigError: the product of the sizes is not the number of devices.
    """
    shape = dataclasses.asdict(sizes)
    free = [axis for axis, size in shape.items() if size == -1]
    if any(size == 0 or size < -1 for size in shape.values()):
        raise ConfigError(f"config.mesh: sizes must be at least 1, or -1 for the remaining devices; got {shown(shape)}.")
    if len(free) > 1:
        raise ConfigError(f"config.mesh: only one axis may be -1, but {' and '.join(free)} are; give --config.mesh.{free[0]}=1, or another number.")
    known = math.prod(size for size in shape.values() if size != -1)
    if free and devices % known == 0:
        shape[free[0]] = devices // known
    if math.prod(shape.values()) != devices:
        divisors = ", ".join(str(n) for n in range(1, devices + 1) if devices % n == 0)
        raise ConfigError(f"config.mesh: {shown(shape)} needs {known} devices, but there are {devices}. Sizes must divide that: {divisors}.")
    return shape


def shown(shape: Mapping[str, int]) -> str:
    """Return the axes larger than 1 as text: `data=2 × fsdp=4`."""
    return " × ".join(f"{axis}={size}" for axis, size in shape.items() if size != 1) or "data=1"


def make_mesh(sizes: MeshSizes, devices=None) -> Mesh:
    """Return a mesh of all devices (or of those given), with every axis of `MeshSizes` in order, arranged by the hardware's network.

    Raises:
      ConfigError: the product of the sizes is not the number of devices, or does not fit the devices of a slice.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(sizes, len(devices))
    # Auto: under Explicit, the default of recent JAX, gathers and recurrent loops need explicit shardings.
    return Mesh(_arrange(shape, devices), tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def _arrange(shape: Mapping[str, int], devices) -> np.ndarray:
    """Return the devices as an array of that shape."""
    slices = {getattr(device, "slice_index", None) for device in devices}
    inner = tuple(1 if axis == "slices" else size for axis, size in shape.items())
    outer = tuple(size if axis == "slices" else 1 for axis, size in shape.items())
    # An axis of 4 or 16 on a network of 8 × 8 must use part of one of its dimensions, or span two.
    split = {"allow_split_physical_axes": True}
    if len(slices) > 1:
        if shape["slices"] != len(slices):
            raise ConfigError(f"config.mesh.slices={shape['slices']}, but the devices are in {len(slices)} slices: use --config.mesh.slices={len(slices)}.")
        return mesh_utils.create_hybrid_device_mesh(inner, outer, devices=devices, **split)
    if shape["slices"] == 1 or devices[0].platform == "cpu":
        # Without a torus network, neighbours in a slice follow the order of the devices.
        return np.asarray(mesh_utils.create_device_mesh(tuple(shape.values()), devices=devices, **split))
    processes = len({device.process_index for device in devices})
    if processes % shape["slices"] == 0:  # nodes of GPUs
        return mesh_utils.create_hybrid_device_mesh(inner, outer, devices=devices, process_is_granule=processes == shape["slices"], **split)
    raise ConfigError(f"config.mesh.slices={shape['slices']} does not divide the {processes} processes.")


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding that replicates an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: rows over all axes that shard a batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_ways(mesh: Mesh) -> int:
    """Return the number of shards of a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(batch_size: int, accumulate: int, mesh: Mesh, key: str, microbatches: int = 1) -> None:
    """Check that a batch divides over accumulation steps, the microbatches of a pipeline, and devices.

    Raises:
      ConfigError: it does not divide; the message names the nearest sizes that do.
    """
    ways = {f"{batch_ways(mesh)} devices": batch_ways(mesh), f"{accumulate} accumulation steps": accumulate, f"{microbatches} microbatches": microbatches}
    product = math.prod(ways.values())
    if batch_size % product:
        parts = " × ".join(name for name, count in ways.items() if count > 1)
        below, above = batch_size // product * product, -(-batch_size // product) * product
        raise ConfigError(f"config.{key}={batch_size} does not divide over {parts}; try {below or above} or {above}.")


def local_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """Return the indices of the rows of a global batch that this process's devices need, in order."""
    parts = {s.indices(batch_size)[:2] for (s, *_) in sharding.addressable_devices_indices_map((batch_size,)).values()}
    return np.concatenate([np.arange(start, stop) for start, stop in sorted(parts)])


def place(batch, sharding: NamedSharding, batch_size: int):
    """Return the arrays of the global batch on the devices, from this process's rows (those of `local_rows`)."""
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    rows = local_rows(sharding, batch_size)

    def globally(local: np.ndarray) -> jax.Array:
        def part(index):
            start, stop, _ = index[0].indices(batch_size)
            first = int(np.searchsorted(rows, start))
            return local[first : first + stop - start]

        return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, part)

    return jax.tree.map(globally, batch)


def bytes_per_device(tree) -> int:
    """Return the bytes that one device holds of arrays, or of shapes with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
