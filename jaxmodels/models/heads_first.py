"""Attention written out as products with the heads first: for CPUs, and for what the other implementations lack.

`jax.nn.dot_product_attention` keeps the heads between positions and width, and applies the softmax with a pass for each of its steps. On a CPU (jaxlib 0.10
and 0.12) forward and backward then take 1.3 to 2 times as long as with the heads moved once, and with the division by the softmax's sum after the product
with the values. Where a mask hides keys, queries are taken in blocks, each with the keys that it may see: with a causal mask, 8 blocks compute 9/16 of the
products. Shapes are those of `models.attention`; n = N / G is the number of query heads for each key-value head.
"""

import functools

import jax
import jax.numpy as jnp

BLOCK = 128  # queries; smaller blocks compute less, in smaller and slower products
LOWEST = 0.7 * float(jnp.finfo(jnp.float32).min)  # of masked products; their differences stay finite


def attend(q_BTNK, k_BSGK, v_BSGK, *, causal: bool, window: int | None, segments, bias, scale: float, cap: float | None, blocks: bool) -> jax.Array:
    """Return softmax(q k scale + bias) v, [B, T, N, K]; the arguments are those of `attention.attend`. The softmax is in float32.

    `blocks`: take queries in blocks where a causal mask or a window hides keys; T and S must be numbers.
    """
    (B, T, N, K), (S, G) = q_BTNK.shape, k_BSGK.shape[1:3]
    q_BGnTK = q_BTNK.reshape(B, T, G, N // G, K).transpose(0, 2, 3, 1, 4)
    k_BGSK, v_BGSK = k_BSGK.transpose(0, 2, 1, 3), v_BSGK.transpose(0, 2, 1, 3)
    if bias is not None:
        bias = bias.reshape(bias.shape[0], *((1, 1) if bias.shape[1] == 1 else (G, N // G)), T, S)
    if q_BGnTK.dtype == jnp.float32 and cap is None:
        q_BGnTK, scale = q_BGnTK * scale, 1.0  # fewer values than the products
    parts = []
    for queries, keys in _blocks(T, S, causal, window) if blocks else [(slice(0, T), slice(0, S))]:
        products_BGnTS = jnp.einsum("bgntk,bgsk->bgnts", q_BGnTK[:, :, :, queries], k_BGSK[:, :, keys], preferred_element_type=jnp.float32) * scale
        if cap is not None:
            products_BGnTS = cap * jnp.tanh(products_BGnTS / cap)
        if bias is not None:
            products_BGnTS += bias[..., queries, keys]
        seen = _seen(queries, keys, causal, window, segments)
        if seen is not None:
            products_BGnTS = jnp.where(seen, products_BGnTS, LOWEST)
        exponentials = jnp.exp(products_BGnTS - jax.lax.stop_gradient(jnp.max(products_BGnTS, axis=-1, keepdims=True)))
        sums_BGnT1 = jnp.sum(exponentials, axis=-1, keepdims=True)
        y_BGnTK = jnp.einsum("bgnts,bgsk->bgntk", exponentials.astype(v_BSGK.dtype), v_BGSK[:, :, keys], preferred_element_type=jnp.float32)
        parts.append((y_BGnTK / sums_BGnT1).astype(v_BSGK.dtype))
    y_BGnTK = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=3)
    return y_BGnTK.transpose(0, 3, 1, 2, 4).reshape(B, T, N, K)


def _blocks(T: int, S: int, causal: bool, window: int | None) -> list[tuple[slice, slice]]:
    """Return (queries, keys) of each block: the smallest range of keys that holds all those that its queries see, and at least one."""
    if T <= BLOCK or not (causal or window):
        return [(slice(0, T), slice(0, S))]
    found = []
    for start in range(0, T, BLOCK):
        stop = min(start + BLOCK, T)
        first = 0 if window is None else min(max(start - window + 1, 0), S - 1)
        last = S if window is None and not causal else min(stop if causal else stop + window - 1, S)
        found.append((slice(start, stop), slice(first, last)))
    return found


def _seen(queries: slice, keys: slice, causal: bool, window: int | None, segments) -> jax.Array | None:
    """Return which keys each query sees, broadcastable to [B, G, n, T, S]; None if all."""
    ahead_TS = jnp.arange(keys.start, keys.stop)[None] - jnp.arange(queries.start, queries.stop)[:, None]
    masks = [ahead_TS <= 0] if causal else []
    if window is not None:
        masks += [-ahead_TS < window] if causal else [jnp.abs(ahead_TS) < window]
    if segments is not None:
        masks.append((segments[0][:, queries, None] == segments[1][:, None, keys])[:, None, None])
    return functools.reduce(jnp.logical_and, masks) if masks else None
