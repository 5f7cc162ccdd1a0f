"""Checksums of arrays: of their values, so the same on every mesh, by any number of processes and in every file format.

The checksum of an array is the sum modulo 2^32 of a hash of each element's bits and index. The hash is a bijection of the bits, so a change within
one element is always found; a change of several is missed with probability 2^-32. A sum does not depend on its order: each device sums its own shard.
"""

import concurrent.futures
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxmodels.errors import RunError

_SMALL = 1 << 16  # elements: up to here NumPy takes less time than compiling, once for each shape
_BLOCK = 1 << 15  # elements that NumPy hashes at a time, so that they stay in the cache
_PARTS = 8  # of an array that a CPU holds whole
_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio, odd: indices that are near become keys that are far apart
_FACTORS = (0x85EBCA6B, 0xC2B2AE35)  # of the finaliser of MurmurHash3


class Damaged(RunError):
    """Arrays of a checkpoint differ from those that were saved."""


def of(tree: Any) -> dict[str, str]:
    """Return the checksums of the arrays of a tree: path -> `TYPE:HEX`.

    Every process must call this. Waits for the arrays to be computed.

    Args:
      tree: nested dictionaries, tuples and dataclasses of arrays, of which each process has its shards.
    """
    arrays = {path: _data(x) for path, x in flatten(tree).items()}
    sums = _sums({path: (x, _dtype(x)) for path, x in arrays.items()})
    return {path: f"{_dtype(x)}:{sums[path]:08x}" for path, x in arrays.items()}


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
    sums = _sums({path: (x, saved[path][0]) for path, x in same.items()})
    return [path for path in arrays if path not in saved or (path in sums and f"{sums[path]:08x}" != saved[path][2])]


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


def _sums(arrays: Mapping[str, tuple[Any, str]]) -> dict[str, int]:
    """Return the checksum of each array as if it were of a type: path -> (array, name of the type)."""
    on_host = {path for path, (x, _) in arrays.items() if _on_host(x)}
    # In one order in all processes, since arrays that are sharded over processes are summed together.
    started = {path: _start(x, dtype) for path, (x, dtype) in arrays.items() if path not in on_host}
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        found = threads.map(lambda path: _hash_on_host(_as_numpy(arrays[path][0]), arrays[path][1]), on_host)
        sums = dict(zip(on_host, found, strict=True))
    return sums | {path: int(x) for path, x in jax.device_get(started).items()}


def _as_numpy(x: Any) -> np.ndarray:
    """Return the values, on a CPU without copying; the array itself gets no reference to them, which would keep a step from reusing its memory."""
    return np.asarray(x.addressable_data(0) if isinstance(x, jax.Array) else x)


def _on_host(x: Any) -> bool:
    """Return whether NumPy computes the checksum: of arrays that are small, and not sharded."""
    return x.size <= _SMALL and (not isinstance(x, jax.Array) or x.is_fully_replicated) if hasattr(x, "size") else True


def _start(x: Any, dtype: str) -> jax.Array:
    """Start computing the checksum of an array where it is, uint32; NumPy arrays are copied."""
    if not isinstance(x, jax.Array):
        return _compiled_flat("uint32")(_bits(x, dtype, np))
    if x.is_fully_replicated and next(iter(x.sharding.device_set)).platform == "cpu":
        return _compiled_flat(dtype)(x.addressable_data(0))
    return _compiled(dtype, _replicated(x.sharding))(x)


def _replicated(sharding: Any) -> Any:
    """Return the sharding of a result that every process can read; None where the compiler decides."""
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return sharding if isinstance(sharding, jax.sharding.SingleDeviceSharding) else None


@functools.cache
def _compiled(dtype: str, sharding: Any):
    return jax.jit(lambda x: _hash(x, dtype), out_shardings=sharding)


def _hash(x: jax.Array, dtype: str) -> jax.Array:
    """Return the sum of the hashes of all elements, uint32."""
    return jnp.sum(_hashes(_bits(x, dtype, jnp)), dtype=jnp.uint32)


@functools.cache
def _compiled_flat(dtype: str):
    return jax.jit(lambda x: _hash_flat(_bits(x, dtype, jnp).reshape(-1)))


def _hash_flat(bits: jax.Array) -> jax.Array:
    """Return the same as `_hash`, for bits in one dimension.

    Parts of the array are added before elements are summed: XLA's CPU compiler makes vectors of additions and not of sums. `_hash` took 5 times as
    long for the embedding of GPT-2.
    """
    size = len(bits) // _PARTS
    parts = (_hashes(bits[i * size :][:size], i * size * _GOLDEN % 2**32) for i in range(_PARTS))
    rest = _hashes(bits[_PARTS * size :], _PARTS * size * _GOLDEN % 2**32)
    return jnp.sum(functools.reduce(jnp.add, parts), dtype=jnp.uint32) + jnp.sum(rest, dtype=jnp.uint32)


def _hashes(bits: jax.Array, key: Any = 0) -> jax.Array:
    """Return the hash of each element; `key` is that of the first one."""
    key, stride = jnp.uint32(key), 1
    for axis in reversed(range(bits.ndim)):
        key = key + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride * _GOLDEN % 2**32)
        stride *= bits.shape[axis]
    h = bits + key
    for shift, factor in zip((16, 13), _FACTORS, strict=True):
        h = (h ^ (h >> jnp.uint32(shift))) * jnp.uint32(factor)
    return h ^ (h >> jnp.uint32(16))


def _hash_on_host(x: np.ndarray, dtype: str) -> int:
    """Return the same as `_hash`, by NumPy: block by block, in place."""
    flat = np.ascontiguousarray(x).reshape(-1)
    total, first = 0, 0
    keys = np.arange(2 * _BLOCK, dtype=np.uint32) * np.uint32(_GOLDEN)
    h, shifted = np.empty(2 * _BLOCK, np.uint32), np.empty(2 * _BLOCK, np.uint32)
    for start in range(0, flat.size, _BLOCK):
        bits = _bits(flat[start : start + _BLOCK], dtype, np).reshape(-1)
        a, b = h[: bits.size], shifted[: bits.size]
        np.add(bits, keys[: bits.size], out=a)
        a += np.uint32(first * _GOLDEN % 2**32)
        for shift, factor in zip((16, 13), _FACTORS, strict=True):
            np.right_shift(a, np.uint32(shift), out=b)
            a ^= b
            a *= np.uint32(factor)
        np.right_shift(a, np.uint32(16), out=b)
        a ^= b
        total, first = total + int(a.sum(dtype=np.uint32)), first + bits.size
    return total % 2**32


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
        return x.astype(xp.uint32, copy=False)
    if jnp.finfo(x.dtype).bits < 8:
        x = x.astype(xp.float32)
    return _view(x, {1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize], xp).astype(xp.uint32, copy=False)


def _view(x: Any, dtype: Any, xp: Any) -> Any:
    """Return the bits of `x` as another type; where that has half the size, along a new last dimension."""
    if xp is jnp:
        return jax.lax.bitcast_convert_type(x, dtype)
    parts = x.dtype.itemsize // np.dtype(dtype).itemsize
    return np.ascontiguousarray(x).view(dtype).reshape(*x.shape, *[parts] * (parts > 1))
