"""Arrays read from TensorStore onto devices: each process reads what its devices hold, and a CPU's arrays are read into their own memory."""

import collections
import ctypes
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

_IN_FLIGHT = 1 << 27  # bytes


def read(
    stores: Mapping[str, Any],
    shapes: Mapping[str, Any],
    *,
    types: Mapping[str, np.dtype] | None = None,
    at_once: int = _IN_FLIGHT,
    result: Callable[[Any, str], Any] = lambda future, path: future.result(),
) -> dict[str, jax.Array]:
    """Return arrays by path, each with the shape, type and sharding of its entry in `shapes`. Other types are converted.

    Args:
      stores: path -> opened TensorStore of the whole array.
      shapes: path -> shape; without a sharding, the array comes to this process's first device.
      types: path -> type of the elements, where a store has only their bits.
      at_once: bytes to read at a time, or one array if that is larger. They take memory in addition to that of the arrays.
      result: (future, path) -> its result; may raise an error that names the path.
    """
    types, found, started, in_flight = types or {}, {}, collections.deque(), 0

    def finish_one() -> int:
        path, size, finish = started.popleft()
        found[path] = finish(lambda future: result(future, path))
        return size

    for path, shape in shapes.items():
        size = math.prod(shape.shape) * getattr(shape.dtype, "itemsize", 8)
        while started and in_flight + size > at_once:
            in_flight -= finish_one()
        started.append((path, size, _start(stores[path], shape, types.get(path))))
        in_flight += size
    while started:
        finish_one()
    return found


def _start(store: Any, shape: Any, dtype: np.dtype | None) -> Callable[[Callable], jax.Array]:
    """Start to read an array. Returns a function that waits for it: (function for the result of a future) -> array."""
    if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(shape.shape, shape.dtype)).update(sharding=shape.sharding)
        bits = _start(store, data, dtype)
        return lambda result: jax.random.wrap_key_data(bits(result), impl=_kind_of_key(shape.dtype))
    if tuple(store.shape) != tuple(shape.shape):
        raise ValueError(f"an array has the shape {tuple(store.shape)}, and {tuple(shape.shape)} is needed")
    dtype = dtype or store.dtype.numpy_dtype
    sharding = getattr(shape, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    places: dict[tuple, tuple[Any, list]] = {}  # a part that several devices hold is read once
    for device, where in sharding.addressable_devices_indices_map(tuple(shape.shape)).items():
        places.setdefault(tuple((part.start, part.stop) for part in where), (where, []))[1].append(device)
    into = _into_memory if _writable(sharding, shape.dtype) and dtype == shape.dtype and 0 not in shape.shape else _through_host
    parts = [into(store[where], dtype, shape.dtype, devices, sharding.memory_kind) for where, devices in places.values()]

    def finish(result: Callable) -> jax.Array:
        pieces = [piece for part in parts for piece in part(result)]
        return jax.make_array_from_single_device_arrays(tuple(shape.shape), sharding, pieces)

    return finish


def _writable(sharding: Any, dtype: np.dtype) -> bool:
    """Return whether the memory of an array is the host's, with the same bytes as NumPy has for it."""
    on_cpu = all(device.platform == "cpu" and sharding.memory_kind in (None, device.default_memory().kind) for device in sharding.addressable_devices)
    whole_bytes = dtype.kind in "biufc" or (jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits % 8 == 0)
    return on_cpu and whole_bytes


def _into_memory(store: Any, dtype: np.dtype, _, devices: list, kind: str | None) -> Callable[[Callable], list[jax.Array]]:
    """Read a part straight into the memory of a new array.

    An array made of NumPy's memory would not do: a step cannot reuse memory that is not XLA's own for its results. The new array begins as a
    copy of one zero, which JAX cannot take over.
    """
    x = jax.block_until_ready(jax.device_put(np.broadcast_to(np.zeros((), dtype), store.shape), devices[0]))
    memory = (ctypes.c_char * x.nbytes).from_address(x.unsafe_buffer_pointer())
    memory.owner = x  # TensorStore may still write when an error of another array has ended the read
    future = ts.array(np.frombuffer(memory, store.dtype.numpy_dtype).reshape(store.shape)).write(store)

    def finish(result: Callable) -> list[jax.Array]:
        result(future)
        return [x, *(jax.device_put(x, jax.sharding.SingleDeviceSharding(device, memory_kind=kind)) for device in devices[1:])]

    return finish


def _through_host(store: Any, dtype: np.dtype, wanted: np.dtype, devices: list, kind: str | None) -> Callable[[Callable], list[jax.Array]]:
    """Read a part into memory of the host, and copy it to its devices."""
    future = store.read()

    def finish(result: Callable) -> list[jax.Array]:
        values = np.asarray(result(future))
        values = (values if values.dtype == dtype else values.view(dtype)).astype(wanted, copy=False)
        return [jax.device_put(values, jax.sharding.SingleDeviceSharding(device, memory_kind=kind)) for device in devices]

    return finish


def _kind_of_key(dtype: Any) -> Any:
    """Return the generator of random keys of a type."""
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), jax.ShapeDtypeStruct((), dtype))
    return found[0]
