"""What a model keeps of the tokens it has read, so that each new one is read once: keys and values, or recurrent states.

A model that generates has three methods more than `__call__`, all of them plain functions of arrays with fixed shapes:

    make_cache(batch, length, dtype) -> cache      empty, with room for `length` tokens a row
    prefill(tokens [B, P], cache) -> logits, cache   reads prompts into an empty cache
    extend(tokens [B], cache) -> logits, cache     reads one more token of every row

Logits are those of the token after the last one read, [B, V]. An encoder–decoder has `make_cache(source, length)` instead, which
reads the source, and no `prefill`.

Prompts of different lengths end together: rows are filled up with -1 in front. A token's place in the cache is its slot, the
same for all rows at a time, so that a step writes one slice; its position is the slot less the row's padding. Padding's slots are
seen by no query. A layer with a window keeps as many slots as that, and writes over the oldest.

A cache is a dict of arrays:

    layers   for each layer {"key", "value"} [B, G, S, K]; for stacked blocks one such dict with [L, B, G, S, K]
    memory   the same of an encoder's output; fixed, and the same for all that is made from one source
    pads     int32 [B], slots before a row's first token
    slot     int32, the next one to be written

Shapes: B rows, T tokens, S slots, G key-value heads, N heads, K width of a head, L layers.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.parallel.layout import constrain

_NAMES = ("batch", "kv_heads", None, None)


def make_layer(batch: int, length: int, kv_heads: int, head_width: int, window: int | None, dtype: Any) -> dict[str, jax.Array]:
    """Empty slots of one layer: `length`, or `window` where that is less."""
    shape = (batch, kv_heads, length if window is None else min(length, window), head_width)
    return {name: constrain(jnp.zeros(shape, dtype), *_NAMES) for name in ("key", "value")}


def fill(layer: dict[str, jax.Array], k_BTGK: jax.Array, v_BTGK: jax.Array) -> dict[str, jax.Array]:
    """An empty layer with the keys and values of slots 0..T-1, or of the last that there is room for."""

    def put(slots_BGSK, x_BTGK):
        S, T = slots_BGSK.shape[2], x_BTGK.shape[1]
        x_BGTK = jnp.moveaxis(x_BTGK, 1, 2).astype(slots_BGSK.dtype)
        if T > S:  # slot t lies at t % S
            x_BGTK = jnp.roll(x_BGTK[:, :, T - S :], (T - S) % S, axis=2)
        return constrain(jax.lax.dynamic_update_slice(slots_BGSK, x_BGTK, (0, 0, 0, 0)), *_NAMES)

    return {"key": put(layer["key"], k_BTGK), "value": put(layer["value"], v_BTGK)}


def append(layer: dict[str, jax.Array], slot: jax.Array, k_BG1K: jax.Array, v_BG1K: jax.Array, index: jax.Array | None = None) -> dict[str, jax.Array]:
    """The layer with keys and values of one slot more; of stacked layers that of number `index`."""

    def put(slots, x):
        x, start = x.astype(slots.dtype), (0, 0, slot % slots.shape[-2], 0)
        if index is not None:
            slots = jax.lax.dynamic_update_slice(slots, x[None], (index, *start))
            return constrain(slots, None, *_NAMES)
        kept = [i for i, size in enumerate(slots.shape) if size > 1]  # as `Packed` has it
        written = jax.lax.dynamic_update_slice(jnp.squeeze(slots), x.reshape([x.shape[i] for i in kept]), [start[i] for i in kept])
        return constrain(written.reshape(slots.shape), *_NAMES)

    return {"key": put(layer["key"], k_BG1K), "value": put(layer["value"], v_BG1K)}


def numbers(slot: jax.Array, size: int) -> jax.Array:
    """The slot that lies at each of `size` places when `slot` is the last that was written, int32 [S]; negative where none does."""
    return slot - (slot - jnp.arange(size)) % size


def valid(slot: jax.Array, pads_B: jax.Array, size: int) -> jax.Array:
    """Which of `size` places hold a token that the one in `slot` may see, bool [B, S]."""
    return numbers(slot, size)[None] >= pads_B[:, None]


def take_rows(cache: dict[str, Any], rows: jax.Array) -> dict[str, Any]:
    """The cache of these rows, in this order: for beams, all of which have one memory."""
    parts = {name: part for name, part in cache.items() if name not in ("slot", "memory")}
    return cache | jax.tree.map(lambda x: jnp.take(x, rows, axis=_row_axis(x)), parts)


def repeat_rows(cache: dict[str, Any], times: int) -> dict[str, Any]:
    """The cache with every row so many times, one after the other."""
    parts = {name: part for name, part in cache.items() if name != "slot"}
    return cache | jax.tree.map(lambda x: jnp.repeat(x, times, axis=_row_axis(x)), parts)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("arrays",), meta_fields=("structure", "shapes"))
@dataclasses.dataclass
class Packed:
    """A cache as a loop carries it: its arrays without dimensions of size 1, and how they were.

    With such dimensions XLA's compiler for CPUs writes each new slot into a copy of all slots (seen with one row, and with one head).
    """

    arrays: list[jax.Array]
    structure: Any
    shapes: tuple[tuple[int, ...], ...]


def pack(cache: Any) -> Packed:
    """The cache, packed; stacked layers stay as they are, since these are written in place as they are."""
    leaves, structure = jax.tree.flatten(cache)
    return Packed([x if x.ndim == 5 else jnp.squeeze(x) for x in leaves], structure, tuple(x.shape for x in leaves))


def unpack(packed: Packed) -> Any:
    """The cache again."""
    return jax.tree.unflatten(packed.structure, [x.reshape(shape) for x, shape in zip(packed.arrays, packed.shapes, strict=True)])


def _row_axis(x: jax.Array) -> int:
    """Where an array of a cache has its rows: the stacked ones [L, B, G, S, K] are the only ones of five dimensions."""
    return 1 if x.ndim == 5 else 0
