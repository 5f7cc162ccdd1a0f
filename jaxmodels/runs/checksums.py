"""Checksums of arrays: of their values, so the same on every mesh, by any number of processes and in every file format.

The checksum of an array is the sum modulo 2^32 of a hash of each element's bits and index. The hash is a bijection of the bits, so a change within
one element is always found; a change of several is missed with probability 2^-32. A sum does not depend on its order: each device sums its own shard.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxmodels.errors import RunError

_ON_HOST = 1 << 16  # elements: up to here NumPy takes less time than compiling, once for each shape
_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio, odd: indices that are near become keys that are far apart


class Damaged(RunError):
    """Arrays of a checkpoint differ from those that were saved."""


def of(tree: Any) -> dict[str, str]:
    """Return the checksums of the arrays of a tree: path -> `TYPE:HEX`.

    Every process must call this. Waits for the arrays to be computed.

    Args:
      tree: nested dictionaries, tuples and dataclasses of arrays, of which each process has its shards.
    """
    arrays = {path: _data(x) for path, x in flatten(tree).items()}
    sums = jax.device_get({path: _sum(x, _dtype(x)) for path, x in arrays.items()})
    return {path: f"{_dtype(x)}:{int(sums[path]):08x}" for path, x in arrays.items()}


def check(tree: Any, stored: Mapping[str, str]) -> list[str]:
    """Return the paths of the arrays that differ from their stored checksums, or have none.

    Arrays that were read as another type are passed over, except bfloat16 as float32, which loses nothing.

    Args:
      tree: the restored arrays, a part of those that were saved or all.
      stored: of `of`.
    """
    arrays = {path: _data(x) for path, x in flatten(tree).items() if isinstance(x, jax.Array | np.ndarray)}
    saved = {path: stored[path].rpartition(":") for path in arrays if path in stored}
    same = {path: x for path, x in arrays.items() if path in saved and saved[path][0] in (_dtype(x), "bfloat16" if _dtype(x) == "float32" else None)}
    sums = jax.device_get({path: _sum(x, saved[path][0]) for path, x in same.items()})
    return [path for path in arrays if path not in saved or (path in sums and f"{int(sums[path]):08x}" != saved[path][2])]


def flatten(tree: Any) -> dict[str, Any]:
    """Return the leaves by path, which is the same for a state and for the dictionaries and lists that Orbax returns for it."""
    return ocp.tree.to_flat_dict(tree, sep="/")


def map_with_paths(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """Return the tree with each leaf replaced by function(path, leaf)."""
    paths = iter(flatten(tree))  # in the order of the leaves
    return jax.tree.map(lambda x: function(next(paths), x), tree)


def _data(x: Any) -> Any:
    """Return the array itself, or the bits of random keys."""
    return jax.random.key_data(x) if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def _dtype(x: Any) -> str:
    return np.dtype(x.dtype).name if hasattr(x, "dtype") else np.asarray(x).dtype.name


def _sum(x: Any, dtype: str) -> Any:
    """Return the checksum of `x` as if it were of `dtype`: a scalar on the devices of `x`, or of NumPy."""
    if not isinstance(x, jax.Array) or (x.size <= _ON_HOST and (x.is_fully_addressable or x.is_fully_replicated)):
        return _hash(np.asarray(x), dtype, np)
    sharding = x.sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    elif not isinstance(sharding, jax.sharding.SingleDeviceSharding):
        sharding = None
    return _compiled(dtype, sharding)(x)


@functools.cache
def _compiled(dtype: str, sharding: Any):
    return jax.jit(lambda x: _hash(x, dtype, jnp), out_shardings=sharding)


def _hash(x: Any, dtype: str, xp: Any) -> Any:
    """Return the sum of the hashes of all elements, uint32; `xp` is NumPy or `jax.numpy`."""
    bits = _bits(x, dtype, xp)
    key, stride = xp.uint32(0), 1
    for axis in reversed(range(bits.ndim)):
        indices = xp.arange(bits.shape[axis], dtype=xp.uint32) * xp.uint32(stride * _GOLDEN % 2**32)
        key = key + indices.reshape(-1, *[1] * (bits.ndim - 1 - axis))
        stride *= bits.shape[axis]
    # The finaliser of MurmurHash3.
    h = bits + key
    h = (h ^ (h >> xp.uint32(16))) * xp.uint32(0x85EBCA6B)
    h = (h ^ (h >> xp.uint32(13))) * xp.uint32(0xC2B2AE35)
    return xp.sum(h ^ (h >> xp.uint32(16)), dtype=xp.uint32)


def _bits(x: Any, dtype: str, xp: Any) -> Any:
    """Return the bits of each element as uint32, of at least one dimension; elements of 64 bits become two."""
    x = x.reshape(1) if x.ndim == 0 else x
    if dtype == "bfloat16" and x.dtype == np.float32:
        return _view(x, np.uint32, xp) >> xp.uint32(16)
    if x.dtype.kind == "c":
        x = xp.stack([x.real, x.imag], axis=-1)
    if x.dtype.itemsize == 8:
        return _view(x, np.uint32, xp)
    if x.dtype.kind in "bui" or jnp.issubdtype(x.dtype, jnp.integer):
        return x.astype(xp.uint32)
    if jnp.finfo(x.dtype).bits < 8:
        x = x.astype(xp.float32)
    return _view(x, {1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize], xp).astype(xp.uint32)


def _view(x: Any, dtype: Any, xp: Any) -> Any:
    """Return the bits of `x` as another type; where that has half the size, along a new last dimension."""
    if xp is jnp:
        return jax.lax.bitcast_convert_type(x, dtype)
    parts = x.dtype.itemsize // np.dtype(dtype).itemsize
    return np.ascontiguousarray(x).view(dtype).reshape(*x.shape, *[parts] * (parts > 1))
