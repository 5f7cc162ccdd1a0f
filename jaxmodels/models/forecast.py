"""Forecasting models: from the past of some variables to their future.

Every variable is forecast separately with shared parameters ("channel independence", Nie et al. 2023). Shapes: B batch,
L rows of the past, H rows of the future, V variables, P patches, D width.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmodels.models.blocks import Block
from jaxmodels.models.layers import Linear, check_rate, check_sizes, dropout
from jaxmodels.models.normalization import LayerNorm
from jaxmodels.models.rnn import CELLS


class LinearForecast(nnx.Module):
    """DLinear (Zeng et al. 2023): moving average and remainder of the past, each mapped to the future by one matrix."""

    def __init__(self, lookback: int, horizon: int, variables: int, *, window: int = 25, dropout: float = 0.0, rngs: nnx.Rngs):
        """
        Args:
          lookback, horizon, variables: L, H and V.
          window: rows of the moving average; 1 does not split the past and uses one matrix.
          dropout: rate on the past.
          rngs: draws the initial parameters from its `params` stream.
        """
        check_rate(dropout)
        if window % 2 == 0 or window < 1:
            raise ValueError(f"window must be odd, got {window}")
        init = nnx.initializers.constant(1 / lookback)  # initially the mean of the past
        self.trend = Linear(lookback, horizon, kernel_init=init, rngs=rngs)
        self.rest = Linear(lookback, horizon, kernel_init=init, rngs=rngs) if window > 1 else None
        self.window, self.dropout = window, dropout

    def __call__(self, past: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """past: [B, L, V]. Returns [B, H, V]."""
        x_BVL = dropout(past.swapaxes(1, 2), self.dropout, rngs)
        if self.rest is None:
            return self.trend(x_BVL).swapaxes(1, 2)
        edge = self.window // 2
        padded = jnp.pad(x_BVL, ((0, 0), (0, 0), (edge, edge)), mode="edge")
        trend = jax.lax.reduce_window(padded, 0.0, jax.lax.add, (1, 1, self.window), (1, 1, 1), "valid") / self.window
        return (self.trend(trend) + self.rest(x_BVL - trend)).swapaxes(1, 2)


class _Patches(nnx.Module):
    """Overlapping patches of each variable's past, embedded, with learned positions."""

    def __init__(self, lookback: int, patch: int, stride: int, width: int, *, rngs: nnx.Rngs):
        if patch > lookback or min(patch, stride) < 1:
            raise ValueError(f"patches of {patch} rows every {stride} do not fit into a past of {lookback}")
        self.count = (lookback - patch) // stride + 1
        # Surplus rows are dropped at the front, so that the last row is always in the last patch.
        self.first = lookback - (self.count - 1) * stride - patch
        self.patch, self.stride = patch, stride
        self.embed = Linear(patch, width, rngs=rngs)
        self.positions = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (self.count, width)))

    def __call__(self, past: jax.Array) -> jax.Array:
        """past: [B, L, V]. Returns [B * V, P, D]."""
        B, _, V = past.shape
        rows = self.first + jnp.arange(self.count)[:, None] * self.stride + jnp.arange(self.patch)
        x = past.swapaxes(1, 2)[:, :, rows].reshape(B * V, self.count, self.patch)
        return self.embed(x) + self.positions[...]


class TransformerForecast(nnx.Module):
    """PatchTST (Nie et al. 2023): a Transformer encoder over patches of the past, and one matrix to the future."""

    def __init__(
        self,
        lookback: int,
        horizon: int,
        variables: int,
        *,
        patch: int = 16,
        stride: int = 8,
        layers: int = 3,
        heads: int = 4,
        width: int = 16,
        mlp_width: int = 128,
        dropout: float = 0.3,
        rngs: nnx.Rngs,
    ):
        """
        Args:
          lookback, horizon, variables: L, H and V.
          patch, stride: rows of a patch, and rows between the starts of two patches.
          layers, heads, width, mlp_width: of the encoder.
          dropout: rate on the embedding, on the residuals of each block, and before the last matrix.
          rngs: draws the initial parameters from its `params` stream.
        """
        check_rate(dropout)
        check_sizes(layers=layers, heads=heads, width=width, mlp_width=mlp_width)
        if width % heads:
            raise ValueError(f"heads must divide width, got heads={heads}, width={width}")
        self.patches = _Patches(lookback, patch, stride, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, mlp_width=mlp_width, causal=False, dropout=dropout, layers=layers, rngs=rngs) for _ in range(layers)])
        self.norm = LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.output = Linear(self.patches.count * width, horizon, rngs=rngs)
        self.dropout = dropout

    def __call__(self, past: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """past: [B, L, V]. Returns [B, H, V]."""
        x = dropout(self.patches(past), self.dropout, rngs)
        for block in self.blocks:
            x = block(x, rngs)
        x = dropout(self.norm(x).reshape(x.shape[0], -1), self.dropout, rngs)
        return self.output(x).reshape(past.shape[0], past.shape[2], -1).swapaxes(1, 2)


class RecurrentForecast(nnx.Module):
    """An LSTM or GRU over patches of the past, and one matrix from its last output to the future."""

    def __init__(
        self,
        lookback: int,
        horizon: int,
        variables: int,
        *,
        cell: Literal["lstm", "gru"] = "lstm",
        patch: int = 24,
        stride: int = 12,
        layers: int = 1,
        width: int = 64,
        dropout: float = 0.2,
        rngs: nnx.Rngs,
    ):
        """
        Args:
          lookback, horizon, variables: L, H and V.
          cell: `lstm` or `gru`.
          patch, stride: rows of a patch, and rows between the starts of two patches.
          layers, width: of the recurrent network.
          dropout: rate on the embedding and on every layer's output.
          rngs: draws the initial parameters from its `params` stream.
        """
        check_rate(dropout)
        check_sizes(layers=layers, width=width)
        self.patches = _Patches(lookback, patch, stride, width, rngs=rngs)
        self.layers = nnx.List([CELLS[cell](width, width, rngs=rngs) for _ in range(layers)])
        self.output = Linear(width, horizon, rngs=rngs)
        self.dropout = dropout

    def __call__(self, past: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """past: [B, L, V]. Returns [B, H, V]."""
        x = dropout(self.patches(past), self.dropout, rngs)
        for layer in self.layers:
            x, _ = layer(x)
            x = dropout(x, self.dropout, rngs)
        return self.output(x[:, -1]).reshape(past.shape[0], past.shape[2], -1).swapaxes(1, 2)
