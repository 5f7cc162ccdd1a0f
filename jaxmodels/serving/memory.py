"""How many texts fit in the memory of the devices."""

import math
from typing import Any

import jax

from jaxmodels.generation.generate import Generator
from jaxmodels.models import functional
from jaxmodels.parallel import layout as layout_lib
from jaxmodels.parallel import mesh as mesh_lib
from jaxmodels.serving import state as state_lib

_SHARE = 0.8  # of the memory that weights leave, for rows and prefixes; the rest is for what a step computes
_ON_HOST = 16  # rows on a CPU, whose memory is not its limit
_MOST = 256  # rows, without a wish
_ROOM = 1.5  # memory of a row over its size: a quarter for shared prefixes, and a quarter for the smaller state that a larger one is made from


def row_bytes(generator: Generator, context: int) -> int:
    """Return the bytes that one device holds of a row of `context` tokens."""
    layout, source = generator.layout, context if generator.reads_sources else None

    def row(params, stats):
        return state_lib.empty(functional.evaluation_model(generator.graph, params, stats, generator.dtype), 1, context, generator.dtype, source)

    with layout_lib.use(layout):
        leaves = jax.tree.leaves(jax.eval_shape(row, *generator.weights))
    ways = 1 if layout is None else layout.size("kv_heads")
    return sum(math.prod(x.shape) * x.dtype.itemsize // (ways if x.ndim > 3 and x.shape[-3] % ways == 0 else 1) for x in leaves)


def default_slots(generator: Generator, context: int) -> int:
    """Return how many rows of `context` tokens fit; 16 on CPUs.

    On GPUs and TPUs it is the largest power of two, up to 256, whose rows fit in 0.8 of the memory that is free, with half as much again for shared
    prefixes and for changes of size. With several devices, each holds its share of rows and heads.
    """
    ways = 1 if generator.layout is None else mesh_lib.batch_ways(generator.layout.mesh)
    free = [free_bytes(device) for device in _devices(generator)]
    if None in free:
        return _ON_HOST * ways
    fit = int(_SHARE * min(free) / (_ROOM * row_bytes(generator, context)))
    return ways * min(_MOST, 1 << max(fit, 1).bit_length() - 1)


def free_bytes(device: Any) -> int | None:
    """Return the bytes of a device's memory that are free; None where it does not say, as on CPUs."""
    stats = None if device.platform == "cpu" else device.memory_stats()
    return None if not stats or "bytes_limit" not in stats else stats["bytes_limit"] - stats["bytes_in_use"]


def _devices(generator):
    return [jax.local_devices()[0]] if generator.layout is None else generator.layout.mesh.local_devices
