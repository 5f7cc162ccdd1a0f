"""The state of a batch whose rows begin and end at any time, as pure functions of arrays.

All rows read one token in a step, at the same slot, which is the next for all of them. A row's text began at a slot of its own, so its positions
count from there. A slot t is stored at index t % S, as `models.cache` does it: slots grow, and a row keeps its last S tokens. A text that was read
elsewhere, into a cache of one row, is copied so that it ends at the slot before the next.

The state is a dict of arrays:

    cache    of the model, without its slots: `layers`, `memory`, `states`; packed (`models.cache.pack`), as is a cache of one row
    slot     int32, the next slot
    begin    int32 [B], the slot of each row's first token
    token    int32 [B], the next token to be read
    texts    int32 [B, S], the tokens that were read

Shapes: B rows, S slots, P slots of a cache of one row.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.generation import rows as rows_lib
from jaxmodels.models import cache as cache_lib
from jaxmodels.models import lora_rows
from jaxmodels.models.cache import Packed, numbers, pack, row_axis, unpack
from jaxmodels.parallel.layout import constrain

State = dict[str, Any]
_PARTS = ("layers", "memory", "states")


def empty(model: Any, rows: int, length: int, dtype: Any, source: int | None = None) -> State:
    """Return the state of free rows for texts of up to `length` tokens; of an encoder–decoder, for sources of up to `source` tokens."""
    if source is None:
        cache = model.make_cache(rows, length, dtype)
    else:
        shapes = jax.eval_shape(lambda tokens: model.make_cache(tokens, length), jax.ShapeDtypeStruct((rows, source), jnp.int32))
        cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    state = {"cache": _parts(cache), "slot": jnp.asarray(length, jnp.int32), "begin": jnp.zeros(rows, jnp.int32)}
    return _placed(state | {"token": jnp.full(rows, -1, jnp.int32), "texts": jnp.full((rows, length), -1, jnp.int32)})


def read_more(model: Any, reading: Packed, count: jax.Array, tokens_1T: jax.Array, adapter: jax.Array) -> tuple[jax.Array, Packed]:
    """Read more tokens of one text, with -1 at their end as padding.

    Args:
      model: a language model.
      reading: parts of a cache of one row (`reading_cache`), that hold `count` tokens.
      count: number of tokens read before.
      tokens_1T: int [1, T]; the cache has room for them.
      adapter: number of the text's adapter.

    Returns:
      Logits [1, T, V], and the parts of the cache.
    """
    reading = unpack(reading)
    if "states" in reading:
        reading = jax.tree.map(lambda x: jnp.where(count == 0, jnp.zeros_like(x), x), reading)
    with lora_rows.use(adapter[None]):
        logits_1TV, cache = model.read(tokens_1T, _with_slots(reading, count, jnp.zeros(1, jnp.int32)))
    return logits_1TV, _parts(cache)


def reading_cache(model: Any, length: int, dtype: Any) -> Packed:
    """Return the parts of a cache of one row for texts of `length` tokens, in which every layer has all slots."""
    return _parts(model.make_cache(1, length, dtype, whole=True))


def read_source(model: Any, source_1S: jax.Array, adapter: jax.Array, length: int) -> Packed:
    """Return the parts of a cache that hold a source, with zeros up to those of one of `length` tokens.

    Args:
      model: an encoder–decoder.
      source_1S: int [1, S] with -1 as padding.
      adapter: as in `read_more`.
      length: S at most.
    """

    def of(source):
        return {name: part for name, part in model.make_cache(source, 1).items() if name in ("memory", "states")}

    with lora_rows.use(adapter[None]):
        cache = of(source_1S)
    whole = jax.eval_shape(of, jax.ShapeDtypeStruct((1, length), jnp.int32))
    return _parts(jax.tree.map(lambda x, like: jnp.pad(x, [(0, n - m) for n, m in zip(like.shape, x.shape, strict=True)]), cache, whole))


def insert(state: State, reading: Packed, row: jax.Array, tokens_S: jax.Array, count: jax.Array, token: jax.Array) -> State:
    """Return the state with another text in a row.

    Args:
      state: as above.
      reading: parts of a cache that hold the text: of `read_more` or `read_source`. It is unchanged.
      row: index of the row.
      tokens_S: the text's tokens, of which `count` were read.
      count: number of tokens in the cache, at most S.
      token: the next one.
    """
    slot, cache, reading = state["slot"], unpack(state["cache"]), unpack(reading)

    def last(size, among):
        """Return where the tokens that belong to `size` indices are in the text, cut to the range of indices into it."""
        return jnp.clip(numbers(slot - 1, size) - slot + count, 0, among - 1)

    def write(whole, part):
        return jax.lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), row, row_axis(whole))

    if "layers" in reading:
        copied = jax.tree.map(lambda ring, x: jnp.take(x, last(ring.shape[-2], x.shape[-2]), axis=-2), cache["layers"], reading["layers"])
        reading = reading | {"layers": copied}
    cache |= {name: jax.tree.map(write, cache[name], part) for name, part in reading.items()}
    S = state["texts"].shape[1]
    return _placed(
        {
            "cache": _parts(cache),
            "slot": slot,
            "begin": state["begin"].at[row].set(slot - count),
            "token": state["token"].at[row].set(token),
            "texts": write(state["texts"], jnp.take(tokens_S, last(S, S))[None]),
        }
    )


def step(model: Any, state: State, given: rows_lib.Settings, active_B: jax.Array, known: int | None) -> tuple[State, dict[str, jax.Array]]:
    """Read one token of each active row and choose the next.

    Args:
      model: with a cache.
      state: as above.
      given: settings of the rows, of `generation.rows`.
      active_B: bool, rows that hold a text; the others read nothing.
      known: number of tokens that may be chosen, None for all.

    Returns:
      The state, and `next` [B], the chosen tokens, with what `generation.rows.score` returns.
    """
    slot, S = state["slot"], state["texts"].shape[1]
    begin, token = jnp.where(active_B, state["begin"], slot), jnp.where(active_B, state["token"], -1)
    texts = jax.lax.dynamic_update_slice(state["texts"], token[:, None], (0, slot % S))
    with lora_rows.use(given["adapter"]):
        logits_BV, cache = model.extend(token, _with_slots(unpack(state["cache"]), slot, begin))
    generated = slot - begin + 1 - given["prompt"]
    chosen = rows_lib.choose(logits_BV, given, texts, numbers(slot, S) - begin[:, None], generated, known)
    result = {"next": chosen, **rows_lib.score(logits_BV, chosen, given["alternatives"], known)}
    state = {"cache": _parts(cache), "slot": slot + 1, "begin": begin, "token": chosen, "texts": texts}
    return _placed(state), jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), result)


def resize(model: Any, state: State, rows: jax.Array, length: int, dtype: Any, source: int | None = None) -> State:
    """Return the state with other rows and another number of slots, counted anew: the next slot is that number.

    Args:
      state: as above.
      rows: int32 [B'], which row each one was; the texts of those that are in use have no more tokens than there are slots then.
      length: number of slots.
      model, dtype, source: as in `empty`.
    """
    like = jax.eval_shape(lambda: unpack(empty(model, len(rows), length, dtype, source)["cache"]))
    moved_by = state["slot"] - length

    def of_rows(x):
        return jnp.take(x, rows, axis=row_axis(x))

    def moved(x, size, axis):
        """Return an array with another number of slots along an axis. Layers with a window may have fewer than others."""
        return jnp.take(x, (numbers(jnp.asarray(length - 1), size) + moved_by) % x.shape[axis], axis=axis)

    cache = {name: jax.tree.map(of_rows, part) for name, part in unpack(state["cache"]).items()}
    if "layers" in cache:
        cache["layers"] = jax.tree.map(lambda x, like: moved(x, like.shape[-2], -2), cache["layers"], like["layers"])
    own = {name: of_rows(state[name]) for name in ("begin", "token", "texts")}
    own |= {"begin": own["begin"] - moved_by, "texts": moved(own["texts"], length, 1)}
    return _placed({"cache": _parts(cache), "slot": jnp.asarray(length, jnp.int32), **own})


def cut(reading: Packed, start: jax.Array, size: int) -> Packed:
    """Return `size` slots of the layers of a cache of one row, from `start` on."""
    return pack(jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=x.ndim - 2), unpack(reading)["layers"]))


def paste(reading: Packed, block: Packed, start: jax.Array) -> Packed:
    """Return the parts of a cache of one row with the slots that `cut` returned."""
    put = lambda x, part: jax.lax.dynamic_update_slice_in_dim(x, part, start, axis=x.ndim - 2)  # noqa: E731
    reading = unpack(reading)
    return _parts(reading | {"layers": jax.tree.map(put, reading["layers"], unpack(block))})


def _parts(cache: dict) -> Packed:
    """Return the parts of a cache that a state keeps. Their sharding is the same for all functions that take and return them."""

    def row(x):
        names = (*(None,) * (x.ndim - 4), *cache_lib.NAMES) if x.ndim > 3 else ("batch", *(None,) * (x.ndim - 1))
        return constrain(x, *names)

    return pack({name: jax.tree.map(row, cache[name]) for name in _PARTS if name in cache})


def _with_slots(parts, slot, begin):
    return parts | {"slot": slot, "left_padding": begin} if "layers" in parts else parts


def _placed(state: State) -> State:
    """Constrain the sharding of the rest of a state."""
    return {name: x if name == "cache" else constrain(x, *("batch", None)[: x.ndim]) for name, x in state.items()}
