"""Positions of tokens: within packed sequences, rotary, sinusoidal, and relative.

Shapes: B batch, T time, S keys' time, N heads, K width of a head, D width.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels.parallel.layout import traced_for


@dataclasses.dataclass(frozen=True, kw_only=True)
class RotaryScaling:
    """Scaling of rotary frequencies for contexts longer than those of pretraining.

    Attributes:
      kind: `linear` divides all frequencies by `factor` (Chen et al. 2023); `llama3` only low ones (Llama 3.1);
        `yarn` too, and it sharpens attention a little (Peng et al. 2024). Two kinds depend on the number of tokens of each text: `dynamic`
        raises the base once there are more than `original_context` (NTK-aware scaling); `longrope` divides each frequency by its own factor,
        of `long` ones once there are more than `original_context`, else of `short` ones (Ding et al. 2024; Phi-3).
      factor: ratio of the new context to the original one (not longrope).
      original_context: the context of pretraining (not linear).
      low_frequency, high_frequency: rotations within that context. Frequencies below the first are divided by `factor`, those above the
        second are unchanged (llama3).
      fast, slow: the same for yarn: unchanged above `fast` rotations, divided by `factor` below `slow`.
      short, long: for each pair of rotated channels, what divides its frequency (longrope).
      attention_factor: factor on sines and cosines (longrope). Attention grows by its square.
    """

    kind: Literal["linear", "llama3", "yarn", "dynamic", "longrope"]
    factor: float | None = None
    original_context: int = 8192
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    fast: float = 32.0
    slow: float = 1.0
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()
    attention_factor: float = 1.0

    def __post_init__(self):
        if self.factor is None and self.kind != "longrope":
            raise ValueError(f"rotary_scaling.kind={self.kind!r} needs rotary_scaling.factor")
        for name in ("short", "long"):  # from a config's lists, to be hashable
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def by_length(self) -> bool:
        """Whether frequencies depend on the number of tokens of a text."""
        return self.kind in ("dynamic", "longrope")

    def changes(self, lengths: jax.Array) -> jax.Array:
        """Return where frequencies of texts of these lengths differ from those of texts with one token less."""
        return lengths > self.original_context if self.kind == "dynamic" else lengths == self.original_context + 1


def positions_in(segments_BT: jax.Array) -> jax.Array:
    """Return the positions within each segment, int [B, T]: 0, 1, … from each change of the segment number."""
    index_BT = jnp.broadcast_to(jnp.arange(segments_BT.shape[1]), segments_BT.shape)
    begins_BT = jnp.concatenate([jnp.ones_like(segments_BT[:, :1], bool), segments_BT[:, 1:] != segments_BT[:, :-1]], axis=1)
    return index_BT - jax.lax.cummax(jnp.where(begins_BT, index_BT, 0), axis=1)


def lengths_in(segments_BT: jax.Array) -> jax.Array:
    """Return the number of positions in each position's own segment, int [B, T]; segments as in `positions_in`."""
    T = segments_BT.shape[1]
    changes_BT = segments_BT[:, 1:] != segments_BT[:, :-1]
    ends_BT = jnp.concatenate([jnp.where(changes_BT, jnp.arange(T - 1), T - 1), jnp.full_like(segments_BT[:, :1], T - 1)], axis=1)
    last_BT = jax.lax.cummin(ends_BT, axis=1, reverse=True)
    return last_BT - jnp.arange(T) + positions_in(segments_BT) + 1


def rotary_frequencies(head_width: int, base: float, scaling: RotaryScaling | None = None) -> tuple[np.ndarray, float]:
    """Return radians per position for each pair of channels of a head, float [K / 2], and a factor on sines and cosines."""
    if head_width % 2:
        raise ValueError(f"rotary positions need an even head width, got {head_width}")
    frequencies = base ** (-np.arange(0, head_width, 2) / head_width)
    if scaling is None:
        return frequencies, 1.0
    if scaling.kind == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.kind == "llama3":
        turns = scaling.original_context * frequencies / (2 * math.pi)
        unscaled = np.clip((turns - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency), 0, 1)
        return unscaled * frequencies + (1 - unscaled) * frequencies / scaling.factor, 1.0

    def pair(turns):
        """Return the (fractional) pair of channels with that number of rotations within the original context."""
        return head_width * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = max(math.floor(pair(scaling.fast)), 0), min(math.ceil(pair(scaling.slow)), head_width - 1)
    slowed = np.clip((np.arange(head_width // 2) - first) / max(last - first, 1e-3), 0, 1)
    return slowed * frequencies / scaling.factor + (1 - slowed) * frequencies, 0.1 * math.log(scaling.factor) + 1.0


def frequencies_by_length(lengths: jax.Array, head_width: int, base: float, scaling: RotaryScaling) -> jax.Array:
    """Return the frequencies of `dynamic` and `longrope` scaling in texts of `lengths` tokens, int [1 or B, 1 or T]: float32 [1 or B, 1 or T, 1, K / 2]."""
    lengths = lengths[..., None, None]
    powers = np.arange(0, head_width, 2) / head_width
    if scaling.kind == "longrope":
        for name, factors in (("short", scaling.short), ("long", scaling.long)):
            if len(factors) != len(powers):
                raise ValueError(f"rotary_scaling.{name} lists {len(factors)} factors; there are {len(powers)} pairs of rotated channels")
        short, long = (jnp.asarray(1 / (np.asarray(factors) * base**powers), jnp.float32) for factors in (scaling.short, scaling.long))
        return jnp.where(lengths > scaling.original_context, long, short)
    if head_width < 4:
        raise ValueError(f"rotary_scaling.kind='dynamic' needs at least 4 rotated channels, got {head_width}")
    longer = jnp.maximum(lengths, scaling.original_context).astype(jnp.float32)
    growth = scaling.factor * longer / scaling.original_context - (scaling.factor - 1)
    higher = base * growth ** (head_width / (head_width - 2))
    return higher ** -jnp.asarray(powers, jnp.float32)


def rotary_table(
    positions: jax.Array, head_width: int, base: float, scaling: RotaryScaling | None = None, lengths: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Return cosines and sines for `rotate`, float32 [1 or B, T, 1, K / 2] each.

    Args:
      positions: int [1 or B, T].
      head_width: K, the number of channels that are rotated.
      base, scaling: of the wavelengths.
      lengths: number of tokens of the text of each position, int [1 or B, 1 or T]; for `dynamic` and `longrope`, whose frequencies depend on it.
    """
    if scaling is not None and scaling.by_length:
        frequencies, factor = frequencies_by_length(lengths, head_width, base, scaling), scaling.attention_factor
    else:
        frequencies, factor = rotary_frequencies(head_width, base, scaling)
    angles = positions[..., None, None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x_BTNK: jax.Array, cosine: jax.Array, sine: jax.Array) -> jax.Array:
    """Apply rotary positions (Su et al. 2021): rotate channels i and i + K/2 by their angle, so that products depend on distances alone.

    A table of fewer channels rotates the first of a head and leaves the others.
    """
    if (rotated := 2 * cosine.shape[-1]) < x_BTNK.shape[-1]:
        return jnp.concatenate([rotate(x_BTNK[..., :rotated], cosine, sine), x_BTNK[..., rotated:]], axis=-1)
    if traced_for("tpu"):
        return _rotate_by_product(x_BTNK, cosine, sine)
    one, other = jnp.split(x_BTNK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([one * cosine - other * sine, other * cosine + one * sine], axis=-1).astype(x_BTNK.dtype)


def _rotate_by_product(x_BTNK: jax.Array, cosine: jax.Array, sine: jax.Array) -> jax.Array:
    """`rotate`, with the halves of channels exchanged by a product with a matrix of 0, 1 and -1, which is exact.

    On a TPU, channels are along the lanes of a vector. Slicing them into halves and concatenating these takes several times as long.
    """
    K = x_BTNK.shape[-1]
    places = np.zeros((K, K), np.float32)
    places[np.arange(K // 2) + K // 2, np.arange(K // 2)] = -1
    places[np.arange(K // 2), np.arange(K // 2) + K // 2] = 1
    swapped_BTNK = jax.lax.dot_general(
        x_BTNK, jnp.asarray(places, x_BTNK.dtype), (((3,), (0,)), ((), ())), precision="highest", preferred_element_type=jnp.float32
    )
    cosine, sine = (jnp.concatenate([x, x], axis=-1) for x in (cosine, sine))
    return (x_BTNK.astype(jnp.float32) * cosine + swapped_BTNK * sine).astype(x_BTNK.dtype)


def sinusoids(positions: jax.Array, width: int) -> jax.Array:
    """Return sines and cosines of positions (Vaswani et al. 2017), float32 [..., D]; channels 2i and 2i + 1 share a frequency."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(10000.0 ** (-np.arange(0, width, 2) / width), jnp.float32)
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*positions.shape, -1)[..., :width]


def relative_buckets(query_positions: jax.Array, key_positions: jax.Array, *, buckets: int, distance: int, causal: bool) -> jax.Array:
    """Return a bucket in [0, buckets) for each distance from query to key (Raffel et al. 2020).

    Half of the buckets (of each direction) hold one distance each, the others ranges that grow exponentially
    up to `distance`. All larger distances share the last bucket.

    Args:
      query_positions, key_positions: int [..., T] and [..., S].
      buckets: number of buckets; without `causal`, half of them are for keys after the query.
      distance: distance from which on all share one bucket.
      causal: treat keys after the query as distance 0.

    Returns:
      int32 [..., T, S].
    """
    ahead = key_positions[..., None, :] - query_positions[..., :, None]
    first = 0
    if causal:
        away = jnp.maximum(-ahead, 0)
    else:
        buckets //= 2
        first, away = jnp.where(ahead > 0, buckets, 0), jnp.abs(ahead)
    exact = buckets // 2
    growth = jnp.log(jnp.maximum(away, 1).astype(jnp.float32) / exact) / math.log(distance / exact) * (buckets - exact)
    far = jnp.minimum(exact + growth.astype(jnp.int32), buckets - 1)
    return first + jnp.where(away < exact, away, far)


class RelativePositions(nnx.Module):
    """A learned bias on the attention products for each head and bucket of distances (Raffel et al. 2020)."""

    def __init__(self, heads: int, *, buckets: int, distance: int, causal: bool, init, rngs: nnx.Rngs):
        self.embedding = nnx.Param(init(rngs.params(), (buckets, heads)))
        self.buckets, self.distance, self.causal = buckets, distance, causal

    def __call__(self, query_positions: jax.Array, key_positions: jax.Array) -> jax.Array:
        """Return the bias [1 or B, N, T, S] for int positions [1 or B, T] of queries and [1 or B, S] of keys."""
        buckets = relative_buckets(query_positions, key_positions, buckets=self.buckets, distance=self.distance, causal=self.causal)
        return jnp.moveaxis(jnp.take(self.embedding[...], buckets, axis=0), -1, 1)
