"""Caches for generation: keys and values, or recurrent states, of the tokens that a model has read.

A model that generates has three methods in addition to `__call__`, all of them plain functions of arrays with fixed shapes:

    make_cache(batch, length, dtype) -> cache      an empty cache for `length` tokens a row
    prefill(tokens [B, P], cache) -> logits, cache   reads prompts into an empty cache
    extend(tokens [B], cache) -> logits, cache     reads one more token of every row

Logits [B, V] are those of the token after the last one read. An encoder–decoder has `make_cache(source, length)`, which reads the
source, and no `prefill`. A language model may have a fourth method, for prompts that are read in parts:

    read(tokens [B, T], cache) -> logits [B, T, V], cache     reads more tokens of every row, in a cache made with `whole=True`

Prompts of different lengths end at the same slot: rows are padded with -1 on the left. A slot is an index into the cache, the same for
all rows in a step, so that a step writes one slice. A token's position is its slot minus the row's left padding. No query sees the
slots of padding. A layer with a window has as many slots as the window, and overwrites the oldest; with `whole=True` it has all slots.

Slot t is stored at index t % S, so slots may also grow beyond S: a row that began in its slot `left_padding` keeps its last S tokens, and rows may
begin at any time (`serving.state`).

A cache is a dict of arrays:

    layers         for each layer {"key", "value"} [B, G, S, K]; for stacked blocks one such dict with [L, B, G, S, K]
    memory         keys and values of an encoder's output, in the same form; constant while generating
    tokens         int32 [B, slots], -1 where none, in models whose rotary positions depend on the length of a text
    left_padding   int32 [B], slots before a row's first token
    slot           int32, the next slot to be written

Shapes: B rows, T tokens, S slots, G key-value heads, N heads, K width of a head, L layers.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.parallel.layout import constrain

NAMES = ("batch", "kv_heads", None, None)


def make_layer(batch: int, length: int, kv_heads: int, head_width: int, window: int | None, dtype: Any) -> dict[str, jax.Array]:
    """Return the empty slots of one layer: `length` of them, or `window` if that is less."""
    shape = (batch, kv_heads, length if window is None else min(length, window), head_width)
    return {name: constrain(jnp.zeros(shape, dtype), *NAMES) for name in ("key", "value")}


def fill(layer: dict[str, jax.Array], k_BTGK: jax.Array, v_BTGK: jax.Array, slot: jax.Array | None = None) -> dict[str, jax.Array]:
    """Write the keys and values of slots 0..T-1 into an empty layer, or the last of them that fit; with `slot`, those up to this one into any layer."""
    if slot is not None:
        stored = jnp.maximum(numbers(slot, layer["key"].shape[2]), 0)
        new = {"key": k_BTGK, "value": v_BTGK}
        return {name: constrain(jnp.take(jnp.moveaxis(x, 1, 2), stored, axis=2).astype(layer[name].dtype), *NAMES) for name, x in new.items()}

    def put(slots_BGSK, x_BTGK):
        S, T = slots_BGSK.shape[2], x_BTGK.shape[1]
        x_BGTK = jnp.moveaxis(x_BTGK, 1, 2).astype(slots_BGSK.dtype)
        if T > S:  # slot t is stored at index t % S
            x_BGTK = jnp.roll(x_BGTK[:, :, T - S :], (T - S) % S, axis=2)
        return constrain(jax.lax.dynamic_update_slice(slots_BGSK, x_BGTK, (0, 0, 0, 0)), *NAMES)

    return {"key": put(layer["key"], k_BTGK), "value": put(layer["value"], v_BTGK)}


def append(layer: dict[str, jax.Array], slot: jax.Array, k_BGTK: jax.Array, v_BGTK: jax.Array, index: jax.Array | None = None) -> dict[str, jax.Array]:
    """Write the keys and values of T slots, which begin at `slot` and do not wrap around, into the layer, or into layer `index` of stacked ones."""

    def put(slots, x):
        x, start = x.astype(slots.dtype), (0, 0, slot % slots.shape[-2], 0)
        if index is not None:
            slots = jax.lax.dynamic_update_slice(slots, x[None], (index, *start))
            return constrain(slots, None, *NAMES)
        axes = [i for i, size in enumerate(slots.shape) if size > 1]  # those that `pack` leaves
        written = jax.lax.dynamic_update_slice(jnp.squeeze(slots), x.reshape([x.shape[i] for i in axes]), [start[i] for i in axes])
        return constrain(written.reshape(slots.shape), *NAMES)

    return {"key": put(layer["key"], k_BGTK), "value": put(layer["value"], v_BGTK)}


def numbers(slot: jax.Array, size: int) -> jax.Array:
    """Return the slot stored at each of `size` indices after `slot` was written, int32 [S]; negative where none is."""
    return slot - (slot - jnp.arange(size)) % size


def valid(slot: jax.Array, left_padding_B: jax.Array, size: int, tokens: int = 1, window: int | None = None) -> jax.Array:
    """Return which of `size` indices hold a token that those in `tokens` slots from `slot` on may see, bool [B, T, S]; `window` as in `attention.attend`."""
    stored_S = numbers(slot + tokens - 1, size)
    seen_BTS = jnp.broadcast_to((stored_S >= left_padding_B[:, None])[:, None], (len(left_padding_B), tokens, size))
    queries_T1 = slot + jnp.arange(tokens)[:, None]
    if tokens > 1:
        seen_BTS &= stored_S <= queries_T1
    if window is not None and window < size:
        seen_BTS &= stored_S > queries_T1 - window
    return seen_BTS


def take_rows(cache: dict[str, Any], rows: jax.Array) -> dict[str, Any]:
    """Return the cache with these rows in this order, for beam search. All beams share the memory."""
    parts = {name: part for name, part in cache.items() if name not in ("slot", "memory")}
    return cache | jax.tree.map(lambda x: jnp.take(x, rows, axis=row_axis(x)), parts)


def repeat_rows(cache: dict[str, Any], times: int) -> dict[str, Any]:
    """Return the cache with every row repeated."""
    parts = {name: part for name, part in cache.items() if name != "slot"}
    return cache | jax.tree.map(lambda x: jnp.repeat(x, times, axis=row_axis(x)), parts)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("arrays",), meta_fields=("structure", "shapes"))
@dataclasses.dataclass
class Packed:
    """A cache as the carry of a loop: its arrays without dimensions of size 1, and their original shapes.

    With such dimensions XLA's CPU compiler copies all slots to write one (seen with one row, and with one head).
    """

    arrays: list[jax.Array]
    structure: Any
    shapes: tuple[tuple[int, ...], ...]


def pack(cache: Any) -> Packed:
    """Pack a cache. Stacked layers are unchanged: XLA writes them in place."""
    leaves, structure = jax.tree.flatten(cache)
    return Packed([x if x.ndim == 5 else jnp.squeeze(x) for x in leaves], structure, tuple(x.shape for x in leaves))


def unpack(packed: Packed) -> Any:
    """Return the cache of `pack`."""
    return jax.tree.unflatten(packed.structure, [x.reshape(shape) for x, shape in zip(packed.arrays, packed.shapes, strict=True)])


def row_axis(x: jax.Array) -> int:
    """Return the axis of the rows: 1 for stacked layers [L, B, G, S, K], the only arrays of five dimensions, else 0."""
    return 1 if x.ndim == 5 else 0
