"""Disentangled attention (He et al. 2021, DeBERTa): contents and relative positions have vectors of their own, and each attends to the other.

The product of a query i and a key j is (q_i · k_j + q_i · K(i - j) + k_j · Q(i - j)) / sqrt(3 K), where K(d) and Q(d) are the key and the query of the
distance d. As in DeBERTa-v2 and v3, they are made from one table of embeddings by the matrices for contents, and large distances share rows.

Shapes: B batch, T time, N heads, K width of a head, D width, P = 2T - 1 distances: T-1, …, 0, …, 1-T.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxmodels.models.attention import Attention, to_heads
from jaxmodels.models.normalization import LayerNorm
from jaxmodels.parallel.layout import constrain, gathered


def log_buckets(distances: np.ndarray, buckets: int, longest: int) -> np.ndarray:
    """Return a bucket in (-buckets, buckets) for each distance, of the same sign.

    Up to buckets // 2 each distance has its own; from there on ranges grow exponentially, up to `longest`. In float32, as in `transformers`, so that no
    distance falls into another bucket.
    """
    near, away = buckets // 2, np.abs(distances)
    growth = np.log(np.maximum(away, near).astype(np.float32) / np.float32(near)) / np.log(np.float32((longest - 1) / near)) * np.float32(near - 1)
    return np.where(away <= near, distances, np.sign(distances) * (np.ceil(growth).astype(np.int64) + near))


class Distances(nnx.Module):
    """The embeddings of relative positions, which all layers share."""

    def __init__(self, width: int, *, buckets: int, longest: int, context: int, epsilon: float, init, rngs: nnx.Rngs):
        """
        Args:
          width: D.
          buckets: of distances in each direction; half of them hold one distance each.
          longest: distance at which the last bucket begins.
          context: the longest sequence.
          epsilon: of the normalization.
        """
        if buckets < 2 or longest <= buckets // 2 + 1:
            raise ValueError(f"relative_buckets must be at least 2, and relative_distance above half of that + 1; got {buckets} and {longest}")
        self.embedding = nnx.Param(init(rngs.params(), (2 * buckets, width)))
        self.norm = LayerNorm(width, epsilon=epsilon, rngs=rngs)
        self.buckets, self.longest, self.context = buckets, longest, context

    def __call__(self, T: int) -> jax.Array:
        """Return the embeddings of the distances T-1, …, 1-T: [1, 2T - 1, D]."""
        rows = log_buckets(np.arange(self.context - 1, -self.context, -1), self.buckets, self.longest) + self.buckets
        rows = jnp.asarray(np.clip(rows, 0, 2 * self.buckets - 1), jnp.int32)[jnp.arange(2 * T - 1) + self.context - T]
        return jnp.take(self.norm(gathered(self.embedding[...], None, "embed")), rows, axis=0)[None]


class DisentangledAttention(Attention):
    """Attention whose products depend on contents, and on contents and distances.

    Memory: it computes products with all distances, [B, N, T, 2T - 1], once for queries and once for keys, and their sum [B, N, T, T]: five times that of
    the products of plain attention. These are written out, so it always runs as `xla`.
    """

    def __init__(self, width: int, heads: int, *, kv_heads: int | None = None, head_width: int | None = None, scale: float | None = None, **options):
        """As `Attention`; the default of `scale` is 1 / sqrt(3 K), because products are sums of three."""
        if kv_heads not in (None, heads):
            raise ValueError(f"disentangled attention has one key head for each query head, got heads={heads}, kv_heads={kv_heads}")
        scale = 1 / math.sqrt(3 * (head_width or width // heads)) if scale is None else scale
        super().__init__(width, heads, head_width=head_width, scale=scale, **options)

    def __call__(
        self,
        x_BTD: jax.Array,
        memory_BSD: None = None,
        *,
        rotary: None = None,
        segments: tuple[jax.Array, jax.Array] | None = None,
        bias: jax.Array | None = None,
    ) -> jax.Array:
        """Attend from x to itself. `bias` is the output of `Distances`, [1, P, D]; `segments` as in `attention.attend`."""
        del memory_BSD, rotary
        q_BTNK, (k_BTNK, v_BTNK) = checkpoint_name(self._queries(x_BTD, None), "query"), self._keys_values(x_BTD, None)
        k_BTNK, v_BTNK = checkpoint_name(k_BTNK, "key"), checkpoint_name(v_BTNK, "value")
        queries_PNK, keys_PNK = (to_heads(f, bias, self.heads)[0] for f in (self.query, self.key))
        from_queries_BNTT = by_distance(jnp.einsum("btnk,pnk->bntp", q_BTNK, keys_PNK))
        # For a key the distances to the queries run the other way.
        from_keys_BNTT = by_distance(jnp.einsum("btnk,pnk->bntp", k_BTNK, queries_PNK[::-1])).swapaxes(2, 3)
        bias_BNTT = constrain((from_queries_BNTT + from_keys_BNTT) * self.scale, "batch", "heads", "sequence", None)
        return self._whole(q_BTNK, k_BTNK, v_BTNK, segments, bias_BNTT)


def by_distance(x_BNTP: jax.Array) -> jax.Array:
    """Return y[i, j] = x[i, T-1-i+j], [B, N, T, T]: of each row the products with its own distances.

    By padding and reshaping (Dai et al. 2019), because gathers, and their gradients above all, are slow: rows of 2T values, read with a stride of
    2T - 1 from T - 1 on, begin one value earlier each.
    """
    B, N, T, P = x_BNTP.shape
    flat = jnp.pad(x_BNTP, ((0, 0), (0, 0), (0, 0), (0, 1))).reshape(B, N, -1)
    return flat[..., T - 1 : T - 1 + T * P].reshape(B, N, T, P)[..., :T]
