"""The Swin Transformer (Liu et al. 2021): attention within windows of patches, and windows that are shifted from block to block.

Shapes: B batch, H and W rows and columns of a stage, T = H × W, D width, N heads, S positions in a window.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxmodels.models.attention import Implementation
from jaxmodels.models.blocks import Block, apply_blocks
from jaxmodels.models.convolution import patches
from jaxmodels.models.layers import Linear, check_rate, check_sizes, dropout, stochastic_depth
from jaxmodels.models.normalization import LayerNorm
from jaxmodels.models.remat import Remat

SIZES = {
    "swin-tiny": {"stages": (2, 2, 6, 2), "width": 96, "heads": (3, 6, 12, 24)},
    "swin-small": {"stages": (2, 2, 18, 2), "width": 96, "heads": (3, 6, 12, 24)},
    "swin-base": {"stages": (2, 2, 18, 2), "width": 128, "heads": (4, 8, 16, 32)},
    "swin-large": {"stages": (2, 2, 18, 2), "width": 192, "heads": (6, 12, 24, 48)},
}

init = nnx.initializers.truncated_normal(0.02)


class SwinBlock(Block):
    """A Transformer block with attention within windows, a bias of relative positions, and stochastic depth of each residual."""

    def __init__(self, width: int, heads: int, *, grid: tuple[int, int], window: int, shifted: bool, stochastic_depth: float, rngs: nnx.Rngs, **options):
        """
        Args:
          width, heads: D and N.
          grid: (H, W).
          window: side of a window, in positions. A smaller image has windows of its shorter side, without a shift.
          shifted: whether windows are shifted by half of their side.
          stochastic_depth: rate at which examples skip a residual.
          rngs: draws the initial parameters from its `params` stream.
          options: of `blocks.Block`.
        """
        super().__init__(width, heads, causal=False, relative=True, activation="gelu_exact", init="fan_in", rngs=rngs, **options)
        self.relative = nnx.Param(init(rngs.params(), ((2 * window - 1) ** 2, heads)))
        self.grid, self.table, self.rate = grid, window, stochastic_depth
        self.window = min(window, *grid)
        self.shift = window // 2 if shifted and min(grid) > window else 0

    def __call__(self, x_BTD: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """x: float [B, T, D]. Returns the same shape."""
        x_BTD, _ = self._add(x_BTD, self.attention_norm, self._attend, rngs)
        return self._add(checkpoint_name(x_BTD, "middle"), self.mlp_norm, self.mlp, rngs)[0]

    def _add(self, x_BTD, norm, function, rngs):
        return super()._add(x_BTD, norm, lambda x: stochastic_depth(function(x), self.rate, rngs), rngs)

    def _attend(self, x_BTD: jax.Array) -> jax.Array:
        """Attend within windows. Positions that fill incomplete windows are zeros, and are attended to, as in the published model."""
        (B, _, D), (H, W), side, shift = x_BTD.shape, self.grid, self.window, self.shift
        rows, columns = -(-H // side), -(-W // side)
        x = jnp.pad(x_BTD.reshape(B, H, W, D), ((0, 0), (0, rows * side - H), (0, columns * side - W), (0, 0)))
        x = jnp.roll(x, (-shift, -shift), axis=(1, 2)) if shift else x
        x = x.reshape(B, rows, side, columns, side, D).swapaxes(2, 3).reshape(B * rows * columns, side * side, D)
        bias_NSS = jnp.moveaxis(self.relative[...][offsets(side, self.table)], -1, 0)
        segments = jnp.tile(regions(rows, columns, side, shift), (B, 1)) if shift else None
        x = self.attention(x, segments=None if segments is None else (segments, segments), bias=bias_NSS[None])
        x = x.reshape(B, rows, columns, side, side, D).swapaxes(2, 3).reshape(B, rows * side, columns * side, D)
        x = jnp.roll(x, (shift, shift), axis=(1, 2)) if shift else x
        return x[:, :H, :W].reshape(B, H * W, D)


def offsets(side: int, table: int) -> np.ndarray:
    """Return the row of the table of relative positions for each pair of positions in a window, int [S, S].

    Args:
      side: of the window.
      table: side of the window that the table is made for, at least `side`: a smaller one uses the middle of the table.
    """
    row, column = np.divmod(np.arange(side * side), side)
    down, right = (place[:, None] - place[None] + table - 1 for place in (row, column))
    return down * (2 * table - 1) + right


def regions(rows: int, columns: int, side: int, shift: int) -> np.ndarray:
    """Return numbers of the positions in shifted windows, int [windows, S]: those with one number were neighbours before the shift."""
    down, right = (np.digitize(np.arange(count * side), [(count - 1) * side, count * side - shift]) for count in (rows, columns))
    region = 3 * down[:, None] + right[None]
    return region.reshape(rows, side, columns, side).swapaxes(1, 2).reshape(rows * columns, side * side)


class PatchMerging(nnx.Module):
    """Merge squares of 2×2 positions into one of twice the width, after normalization. An odd side is filled up with zeros."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.norm = LayerNorm(4 * width, epsilon=1e-5, rngs=rngs)
        self.linear = Linear(4 * width, 2 * width, use_bias=False, kernel_init=init, rngs=rngs)

    def __call__(self, x_BHWD: jax.Array) -> jax.Array:
        """x: [B, H, W, D]. Returns [B, H / 2, W / 2, 2 D], rounded up."""
        x = jnp.pad(x_BHWD, ((0, 0), (0, x_BHWD.shape[1] % 2), (0, x_BHWD.shape[2] % 2), (0, 0)))
        x = jnp.concatenate([x[:, row::2, column::2] for column in range(2) for row in range(2)], axis=-1)
        return self.linear(self.norm(x))


class Swin(nnx.Module):
    """Stages of Transformer blocks with windows, with half the resolution and twice the width from stage to stage, then mean pooling and logits.

    Named sizes `swin-tiny`, `swin-small`, `swin-base` and `swin-large` have the published parameter counts at 1,000 classes.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        num_classes: int,
        *,
        stages: tuple[int, ...] = (2, 2, 2),
        heads: tuple[int, ...] = (2, 4, 8),
        width: int = 48,
        patch: int = 4,
        window: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        epsilon: float = 1e-5,
        dropout: float = 0.0,
        stochastic_depth: float = 0.0,
        remat: Remat | tuple[str, ...] = "none",
        attention: Implementation = "auto",
        rngs: nnx.Rngs,
    ):
        """
        Args:
          image_shape: (height, width, channels) of any size: the parameters do not depend on it. A side that `patch` does not divide is filled up
            with zeros.
          num_classes: width of the output.
          stages: number of blocks in each stage; every second one has shifted windows.
          heads: of attention in each stage; they must divide the stage's width.
          width: of the first stage.
          patch: side in pixels of the square that becomes one position of the first stage; 1 or 2 for small images.
          window: side of a window in positions. A stage that is smaller has one window.
          mlp_ratio: hidden width of the feed-forwards, as a multiple of the stage's width.
          qkv_bias: whether queries, keys and values have a bias.
          epsilon: of the normalizations in blocks and the last one; that of the others is 1e-5.
          dropout: rate on the embedding and on the residuals of each block.
          stochastic_depth: rate at which examples skip the last block's residuals; it rises linearly from 0 at the first block.
          remat: what the backward pass recomputes, as in `blocks.apply_blocks`.
          attention: its implementation, as in `attention.attend`.
          rngs: draws the initial parameters from its `params` stream.
        """
        check_rate(dropout)
        check_rate(stochastic_depth, "stochastic_depth")
        check_sizes(width=width, patch=patch, window=window, **{f"stages[{i}]": count for i, count in enumerate(stages)})
        if len(heads) != len(stages) or not stages:
            raise ValueError(f"heads and stages must have one number for each stage, got heads={tuple(heads)}, stages={tuple(stages)}")
        check_sizes(**{f"heads[{i}]": count for i, count in enumerate(heads)})
        self.embed = Linear(patch * patch * image_shape[2], width, kernel_init=init, rngs=rngs)
        self.embed_norm = LayerNorm(width, epsilon=1e-5, rngs=rngs)
        grid, blocks, merges, done = tuple(-(-side // patch) for side in image_shape[:2]), [], [], 0
        for stage, count in enumerate(stages):
            D = width * 2**stage
            if D % heads[stage]:
                raise ValueError(f"heads must divide width, got heads={heads[stage]}, width={D} in stage {stage}")
            options = {"mlp_width": int(mlp_ratio * D), "dropout": dropout, "layers": sum(stages), "epsilon": epsilon, "qkv_bias": qkv_bias}
            options |= {"grid": grid, "window": window, "attention": attention}
            rates = [stochastic_depth * (done + i) / max(1, sum(stages) - 1) for i in range(count)]
            made = [SwinBlock(D, heads[stage], shifted=i % 2 == 1, stochastic_depth=rate, rngs=rngs, **options) for i, rate in enumerate(rates)]
            blocks.append(nnx.List(made))
            done += count
            if stage < len(stages) - 1:
                merges.append(PatchMerging(D, rngs=rngs))
                grid = tuple(math.ceil(side / 2) for side in grid)
        self.blocks, self.merges = nnx.List(blocks), nnx.List(merges)
        self.norm = LayerNorm(D, epsilon=epsilon, rngs=rngs)
        self.output = Linear(D, num_classes, kernel_init=init, rngs=rngs)
        self.patch, self.dropout, self.remat = patch, dropout, remat

    def __call__(self, image: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """image: float [B, H, W, C], computed in the dtype of the parameters. Returns logits [B, num_classes]."""
        image = image.astype(self.output.kernel.dtype)
        image = jnp.pad(image, ((0, 0), *((0, -side % self.patch) for side in image.shape[1:3]), (0, 0)))
        x = dropout(self.embed_norm(self.embed(patches(image, self.patch))), self.dropout, rngs)
        for stage, blocks in enumerate(self.blocks):
            B, H, W, D = x.shape
            x = apply_blocks(blocks, x.reshape(B, H * W, D), rngs, remat=self.remat)[0].reshape(B, H, W, D)
            if stage < len(self.merges):
                x = self.merges[stage](x)
        return self.output(self.norm(x).mean(axis=(1, 2)))
