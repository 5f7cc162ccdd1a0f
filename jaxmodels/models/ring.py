"""Ring attention: sequences are sharded over the devices of an axis, and keys and values are sent around the ring of these devices.

Liu et al. 2023 (arXiv 2310.01889). Every device keeps its queries. In each turn it attends to the keys that it holds, while
they are sent to the next device. The results of the turns are combined by the running maximum and sum of the softmax (Milakov
and Gimelshein 2018), in float32. The backward pass recomputes the products from the logarithm of that sum (Dao et al.
2022), and sends the gradients of keys and values around with them. So a device holds its own shards, one more
shard of keys and values, and the products of one block of queries with one of keys: memory grows as T / devices.

Shapes: B batch, T queries, S keys, N heads, G key-value heads, R = N / G, K width of a head; in a block: b queries, s keys; i, j
indices of blocks.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.parallel.layout import Layout, on_each_device

BLOCK = 1024  # maximum number of queries, and of keys, in a block of products
LOW = -1e30  # below every product, and finite, so that the difference of two is zero
FILL = 2**30  # position of padding in a block of keys


@dataclasses.dataclass(frozen=True)
class _Ring:
    """Constants of all turns.

    Attributes:
      axes: of the mesh, that shard sequences.
      parts: number of devices along them.
      turns: number of turns; fewer than parts if a window reaches fewer devices.
      causal, window, scale: as in `attention.attend`.
      part_T, part_S: queries and keys of a device.
    """

    axes: tuple[str, ...]
    parts: int
    turns: int
    causal: bool
    window: int | None
    scale: float
    part_T: int
    part_S: int

    def shift(self, tree: Any, by: int) -> Any:
        """Send every device's arrays to the device that many steps further."""
        route = [(i, (i + by) % self.parts) for i in range(self.parts)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axes, route), tree)

    def place(self, q: jax.Array) -> jax.Array:
        """Return this device's index on the axes, made to depend on its queries.

        JAX computes what depends on no layer once, before a loop over layers: for masks, those of all turns would stay in memory.
        """
        return jax.lax.optimization_barrier((jax.lax.axis_index(self.axes), q))[0]

    def query_positions(self, place: jax.Array) -> jax.Array:
        """Return the positions of this device's queries in their sequence, [i, b]."""
        first = place * self.part_T
        return _blocks(first + jnp.arange(self.part_T), 0, mode="edge")

    def key_positions(self, place: jax.Array, turn: jax.Array | int) -> jax.Array:
        """Return the positions of the keys that this device holds in a turn, [j, s]."""
        first = (place - turn) % self.parts * self.part_S
        return _blocks(first + jnp.arange(self.part_S), 0, constant_values=FILL)


def ring_attend(
    q_BTNK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    *,
    layout: Layout,
    causal: bool,
    window: int | None,
    segments: tuple[jax.Array, jax.Array] | None,
    scale: float,
) -> jax.Array:
    """Attention by a ring over the axes of `sequence`; arguments as in `attention.attend`.

    The number of devices must divide T and S, and G if it divides N along `heads`. A query that sees no key has output zero.

    With `causal`, the device with the first queries has the least work, and waits in every turn for the one with the last queries. With
    a window too, keys are only sent as far as it reaches.

    Returns:
      [B, T, N, K].
    """
    parts = layout.size("sequence")
    part_T, part_S = q_BTNK.shape[1] // parts, k_BSGK.shape[1] // parts
    turns = parts if not causal or window is None or part_T != part_S else min(parts, (window + part_T - 2) // part_T + 1)
    ring = _Ring(layout.axes("sequence"), parts, turns, causal, window, scale, part_T, part_S)
    rows, sums = ("batch", "sequence", "heads", None), ("batch", "sequence", "heads")
    numbers = [("batch", "sequence")] * (0 if segments is None else 2)
    forward = on_each_device(functools.partial(_forward, ring), [rows] * 3 + numbers, (rows, sums))
    backward = on_each_device(functools.partial(_backward, ring), [rows] * 5 + [sums] + numbers, (rows, rows, rows))

    @jax.custom_vjp
    def attend(q, k, v, segments):
        return forward(q, k, v, *segments)[0]

    def attend_forward(q, k, v, segments):
        y, log_sum = forward(q, k, v, *segments)
        return y, (q, k, v, segments, y, log_sum)

    def attend_backward(residuals, dy):
        q, k, v, segments, y, log_sum = residuals
        return *backward(q, k, v, y, dy, log_sum, *segments), None

    attend.defvjp(attend_forward, attend_backward)
    return attend(q_BTNK, k_BSGK, v_BSGK, segments or ())


def _forward(ring: _Ring, q_BTNK, k_BSGK, v_BSGK, *segments):
    """Return a device's output for its queries, and the logarithms of the sums of their softmax, [B, T, N] in float32."""
    G, place = k_BSGK.shape[2], ring.place(q_BTNK)
    q_iBGRbK, (q_numbers, k_numbers) = _heads_first(_blocks(q_BTNK), G), _numbers(segments)
    shape = q_iBGRbK.shape[:-1]
    so_far = (jnp.zeros((*shape, v_BSGK.shape[-1]), jnp.float32), jnp.full(shape, LOW), jnp.zeros(shape, jnp.float32))
    queries = (q_iBGRbK, ring.query_positions(place), q_numbers)
    keys = (_blocks(k_BSGK), _blocks(v_BSGK), k_numbers)

    def attend_to(so_far, keys, turn):
        k_jBsGK, v_jBsGK, k_numbers = keys
        blocks = (k_jBsGK, v_jBsGK, ring.key_positions(place, turn), k_numbers)

        def of_queries(_, inputs):
            (q, q_at, q_number), so_far = inputs

            def to_keys(so_far, block):
                k, v, k_at, k_number = block
                sees = functools.partial(_sees, ring, q_at, k_at, q_number, k_number)
                return _where_seen(ring, q_at, k_at, lambda so_far: _join(ring, so_far, q, k, v, sees()), so_far), None

            return None, jax.lax.scan(to_keys, so_far, blocks)[0]

        return jax.lax.scan(of_queries, None, (queries, so_far))[1]

    def turn(carry, number):
        so_far, keys = carry
        following = ring.shift(keys, 1)
        return (attend_to(so_far, keys, number), following), None

    (so_far, keys), _ = jax.lax.scan(turn, (so_far, keys), jnp.arange(ring.turns - 1))
    y, top, total = attend_to(so_far, keys, ring.turns - 1)
    total = jnp.where(total == 0, 1, total)
    y_BTNK = _rows(y / total[..., None], ring.part_T).astype(q_BTNK.dtype)
    return y_BTNK, _rows((top + jnp.log(total))[..., None], ring.part_T)[..., 0]


def _join(ring: _Ring, so_far, q, k, v, sees):
    """Add a block of keys to the sums, the maximum and the sum of weights of a block of queries."""
    y, top, total = so_far
    products = _products(ring, q, k)
    if sees is not None:
        products = jnp.where(sees, products, LOW)
    higher = jnp.maximum(top, products.max(-1))
    weights = jnp.exp(products - higher[..., None])
    if sees is not None:
        weights = jnp.where(sees, weights, 0)
    fade = jnp.exp(top - higher)
    added = jnp.einsum("BGRbs,BsGK->BGRbK", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return y * fade[..., None] + added, higher, total * fade + weights.sum(-1)


def _backward(ring: _Ring, q_BTNK, k_BSGK, v_BSGK, y_BTNK, dy_BTNK, log_sum_BTN, *segments):
    """Return the gradients of a device's queries, keys and values."""
    G, place = k_BSGK.shape[2], ring.place(q_BTNK)
    q, dy = (_heads_first(_blocks(x), G) for x in (q_BTNK, dy_BTNK))
    mean_BTN = (dy_BTNK.astype(jnp.float32) * y_BTNK.astype(jnp.float32)).sum(-1)
    log_sum, mean = (_heads_first(_blocks(x[..., None]), G)[..., 0] for x in (log_sum_BTN, mean_BTN))
    q_numbers, k_numbers = _numbers(segments)
    queries = (q, dy, log_sum, mean, ring.query_positions(place), q_numbers)
    keys = (_blocks(k_BSGK), _blocks(v_BSGK), k_numbers)
    changes = tuple(jnp.zeros(x.shape, jnp.float32) for x in keys[:2])

    def attend_to(dq, changes, keys, turn):
        k_jBsGK, v_jBsGK, k_numbers = keys
        blocks = (k_jBsGK, v_jBsGK, ring.key_positions(place, turn), k_numbers)

        def to_keys(dq, inputs):
            (k, v, k_at, k_number), change = inputs

            def of_queries(change, inputs):
                (q, dy, log_sum, mean, q_at, q_number), dq = inputs
                sees = functools.partial(_sees, ring, q_at, k_at, q_number, k_number)
                return _where_seen(ring, q_at, k_at, lambda sums: _join_backward(ring, *sums, q, k, v, dy, log_sum, mean, sees()), (change, dq))

            change, dq = jax.lax.scan(of_queries, change, (queries, dq))
            return dq, change

        return jax.lax.scan(to_keys, dq, (blocks, changes))

    def turn(carry, number):
        dq, changes, keys = carry
        following = ring.shift(keys, 1)
        dq, changes = attend_to(dq, ring.shift(changes, 1), keys, number)  # this turn does not depend on `following`, so that sending overlaps with it
        return (dq, changes, following), None

    carry = (jnp.zeros(q.shape, jnp.float32), changes, keys)
    (dq, changes, keys), _ = jax.lax.scan(turn, carry, jnp.arange(ring.turns - 1))
    dq, changes = attend_to(dq, ring.shift(changes, 1) if ring.turns > 1 else changes, keys, ring.turns - 1)
    if ring.turns > 1:
        changes = ring.shift(changes, 1 - ring.turns)  # back to its own device
    dk, dv = (x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, : ring.part_S].astype(k_BSGK.dtype) for x in changes)
    return _rows(dq, ring.part_T).astype(q_BTNK.dtype), dk, dv


def _join_backward(ring: _Ring, change, dq, q, k, v, dy, log_sum, mean, sees):
    """Add the gradients of one block of queries and one of keys to each other."""
    dk, dv = change
    weights = jnp.exp(_products(ring, q, k) - log_sum[..., None])
    if sees is not None:
        weights = jnp.where(sees, weights, 0)
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    dv = dv + einsum("BGRbs,BGRbK->BsGK", weights.astype(dy.dtype), dy)
    products = weights * (einsum("BGRbK,BsGK->BGRbs", dy, v) - mean[..., None]) * ring.scale
    products = products.astype(q.dtype)
    return (dk + einsum("BGRbs,BGRbK->BsGK", products, q), dv), dq + einsum("BGRbs,BsGK->BGRbK", products, k)


def _products(ring: _Ring, q, k) -> jax.Array:
    return jnp.einsum("BGRbK,BsGK->BGRbs", q, k, preferred_element_type=jnp.float32) * ring.scale


def _where_seen(ring: _Ring, q_at, k_at, function, sums):
    """Return function(sums), or the sums unchanged if no query of the block sees a key of the other."""
    if not ring.causal and ring.window is None:
        return function(sums)
    seen = jnp.array(True)
    if ring.causal:
        seen &= k_at[0] <= q_at[-1]
    if ring.window is not None:
        seen &= q_at[0] - k_at[-1] < ring.window
        seen &= k_at[0] - q_at[-1] < ring.window
    return jax.lax.cond(seen, function, lambda sums: sums, sums)


def _sees(ring: _Ring, q_at, k_at, q_number, k_number) -> jax.Array | None:
    """Return which keys each query sees, broadcastable to [B, G, R, b, s]; None for all."""
    back = q_at[:, None] - k_at[None, :]
    rules = [back >= 0] if ring.causal else []
    if ring.window is not None:
        rules.append(jnp.abs(back) < ring.window)
    if ring.part_S % k_at.shape[0]:
        rules.append(k_at[None, :] < FILL)
    if q_number is not None:
        rules.append((q_number[:, :, None] == k_number[:, None, :])[:, None, None])
    return functools.reduce(jnp.logical_and, rules) if rules else None


def _blocks(x: jax.Array, axis: int = 1, **fill) -> jax.Array:
    """Split T into equal blocks of at most BLOCK, with padding in the last: [B, T, ...] -> [i, B, b, ...]."""
    length = x.shape[axis]
    count = -(-length // BLOCK)
    size = -(-length // count)
    x = jnp.pad(x, [(0, count * size - length if i == axis else 0) for i in range(x.ndim)], **fill)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0)


def _numbers(segments) -> tuple[jax.Array | None, jax.Array | None]:
    return (_blocks(segments[0]), _blocks(segments[1])) if segments else (None, None)


def _heads_first(x_iBbNK: jax.Array, G: int) -> jax.Array:
    """Return blocks as [i, B, G, R, b, K]."""
    i, B, b, N, K = x_iBbNK.shape
    return x_iBbNK.reshape(i, B, b, G, N // G, K).transpose(0, 1, 3, 4, 2, 5)


def _rows(x_iBGRbK: jax.Array, length: int) -> jax.Array:
    """Return [B, T, N, K], the inverse of `_blocks` and `_heads_first`."""
    i, B, G, R, b, K = x_iBGRbK.shape
    return x_iBGRbK.transpose(1, 0, 4, 2, 3, 5).reshape(B, i * b, G * R, K)[:, :length]
