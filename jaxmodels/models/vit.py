"""The Vision Transformer (Dosovitskiy et al. 2021): a Transformer encoder over square patches of an image.

Shapes: B batch, T patches (after the class token and a distillation token), D width, P side of a patch.
"""

import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels.models.attention import Implementation
from jaxmodels.models.blocks import Block, apply_blocks, make_blocks
from jaxmodels.models.convolution import patches
from jaxmodels.models.layers import Linear, check_rate, check_sizes, dropout, stochastic_depth
from jaxmodels.models.normalization import LayerNorm
from jaxmodels.models.remat import Remat

_TINY = {"layers": 12, "heads": 3, "width": 192}
_SMALL = {"layers": 12, "heads": 6, "width": 384}
_BASE = {"layers": 12, "heads": 12, "width": 768}
_LARGE = {"layers": 24, "heads": 16, "width": 1024}

SIZES = {
    "vit_ti16": {"patch": 16, **_TINY},
    "vit_s16": {"patch": 16, **_SMALL},
    "vit_s32": {"patch": 32, **_SMALL},
    "vit_b16": {"patch": 16, **_BASE},
    "vit_b32": {"patch": 32, **_BASE},
    "vit_l16": {"patch": 16, **_LARGE},
    "vit_l32": {"patch": 32, **_LARGE},
    "vit_g14": {"patch": 14, "layers": 40, "heads": 16, "width": 1408, "mlp_width": 6144},  # Zhai et al. 2022
    # Touvron et al. 2021: with a distillation token
    "deit_ti16": {"patch": 16, **_TINY, "distillation": "output"},
    "deit_s16": {"patch": 16, **_SMALL, "distillation": "output"},
    "deit_b16": {"patch": 16, **_BASE, "distillation": "output"},
}


class VisionBlock(Block):
    """A Transformer block with stochastic depth; and with a scale for each channel of what it adds, in a model with `layer_scale`."""

    def __init__(self, width: int, heads: int, *, stochastic_depth: float, layer_scale: float | None, rngs: nnx.Rngs, **options):
        super().__init__(width, heads, causal=False, rngs=rngs, **options)
        self.attention_scale, self.mlp_scale = (None if layer_scale is None else nnx.Param(jnp.full(width, layer_scale)) for _ in range(2))
        self.rate = stochastic_depth

    def __call__(self, x_BTD: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        return x_BTD + stochastic_depth(super().__call__(x_BTD, rngs) - x_BTD, self.rate, rngs)

    def _add(self, x_BTD, norm, function, rngs, output_norm=None):
        scale = self.attention_scale if norm is self.attention_norm else self.mlp_scale
        return super()._add(x_BTD, norm, function if scale is None else lambda x: function(x) * scale[...], rngs, output_norm)


class VisionTransformer(nnx.Module):
    """Pre-norm blocks over the patches of an image, and class logits.

    Named sizes (`vit_ti16`, `vit_s16`, `vit_s32`, `vit_b16`, `vit_b32`, `vit_l16`, `vit_l32`: the number is the patch) have the
    published parameter counts at 224×224 pixels and 1,000 classes; Ti and S are those of Touvron et al. 2021, as are `deit_ti16`, `deit_s16` and
    `deit_b16`, which have a distillation token.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        num_classes: int,
        *,
        patch: int = 4,
        layers: int = 6,
        heads: int = 3,
        width: int = 192,
        mlp_width: int | None = None,
        pool: Literal["token", "mean", "both"] = "token",
        distillation: Literal["none", "token", "output"] = "none",
        positions: Literal["learned", "sincos"] = "learned",
        grid: tuple[int, ...] | None = None,
        activation: Literal["gelu_exact", "swiglu"] = "gelu_exact",
        layer_scale: float | None = None,
        epsilon: float = 1e-6,
        qkv_bias: bool = True,
        dropout: float = 0.0,
        stochastic_depth: float = 0.0,
        scan: bool = False,
        remat: Remat | tuple[str, ...] = "none",
        attention: Implementation = "auto",
        rngs: nnx.Rngs,
    ):
        """
        Args:
          image_shape: (height, width, channels); `patch` must divide height and width.
          num_classes: width of the output.
          patch: P, in pixels.
          layers, heads, width: of the blocks; `heads` must divide `width`.
          mlp_width: hidden width of the feed-forward. The default is 4 D.
          pool: input of the output layer: the class token, the mean over patches (without a class token), or both, [2 D] (Oquab et al. 2023).
          distillation: `token` adds a distillation token after the class token (Touvron et al. 2021); `output` also an output layer that reads it. The
            logits are then the mean of those of both layers, in training too.
          positions: `learned`, or fixed sines and cosines of row and column, half of the width each, and zero for the class
            token (Chen et al. 2021).
          grid: rows and columns of the learned positions, if they are not those of the image: these are then interpolated at each step, bicubic, as in
            DINOv2 (Oquab et al. 2023). For a model that was pretrained on images of another size.
          activation: of the feed-forward, as in `blocks.Block`.
          layer_scale: initial value of scales on what attention and feed-forward add, one for each channel (Touvron et al. 2021). The default has none.
          epsilon: of the normalization.
          qkv_bias: whether queries, keys and values have a bias.
          dropout: rate on the embedding and on the residuals of each block.
          stochastic_depth: rate at which examples skip a block, the same for all blocks (Touvron et al. 2022).
          scan: stack the blocks' parameters, [layers, ...], and loop over them: compiling takes the time of one block.
          remat: what the backward pass recomputes, as in `blocks.apply_blocks`.
          attention: its implementation, as in `attention.attend`.
          rngs: draws the initial parameters from its `params` stream.
        """
        check_rate(dropout)
        check_rate(stochastic_depth, "stochastic_depth")
        check_sizes(patch=patch, layers=layers, heads=heads, width=width)
        rows, columns = image_shape[0] // patch, image_shape[1] // patch
        if (rows * patch, columns * patch) != tuple(image_shape[:2]):
            raise ValueError(f"patch must divide the image's sides, got patch={patch} for {image_shape[0]}×{image_shape[1]} pixels")
        if width % heads:
            raise ValueError(f"heads must divide width, got heads={heads}, width={width}")
        if distillation != "none" and pool != "token":
            raise ValueError(f"distillation={distillation!r} needs pool='token', got pool={pool!r}")
        if grid is not None and (positions != "learned" or len(grid) != 2 or min(grid) < 1):
            raise ValueError(f"grid is the rows and columns of positions='learned', got grid={tuple(grid)}, positions={positions!r}")
        learned_grid = tuple(grid or (rows, columns))
        tokens = (pool != "mean") + (distillation != "none")
        init = nnx.initializers.normal(0.02)
        self.patches = Linear(patch * patch * image_shape[2], width, rngs=rngs)
        self.token = nnx.Param(jnp.zeros((1, 1, width))) if pool != "mean" else None
        self.distillation_token = nnx.Param(jnp.zeros((1, 1, width))) if distillation != "none" else None
        if positions == "learned":
            self.positions = nnx.Param(init(rngs.params(), (learned_grid[0] * learned_grid[1] + tokens, width)))
        elif width % 4:
            raise ValueError(f"positions='sincos' needs a width that divides by 4, got {width}")
        else:
            self.positions = None

        def block(rngs):
            # Scaled by fan-in: at small widths, blocks with a deviation of 0.02 add almost nothing.
            options = {"mlp_width": mlp_width, "dropout": dropout, "layers": layers, "attention": attention, "init": "fan_in"}
            options |= {"epsilon": epsilon, "qkv_bias": qkv_bias, "activation": activation, "layer_scale": layer_scale}
            return VisionBlock(width, heads, stochastic_depth=stochastic_depth, rngs=rngs, **options)

        self.blocks = make_blocks(block, layers, scan, rngs)
        self.norm = LayerNorm(width, epsilon=epsilon, rngs=rngs)
        output = functools.partial(Linear, kernel_init=nnx.initializers.zeros, rngs=rngs)
        self.output = output(2 * width if pool == "both" else width, num_classes)
        self.output_distilled = output(width, num_classes) if distillation == "output" else None
        self.patch, self.grid, self.learned_grid, self.dropout, self.remat = patch, (rows, columns), learned_grid, dropout, remat
        self.tokens, self.pool = tokens, pool

    def __call__(self, image: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """image: float [B, H, W, C], computed in the dtype of the parameters. Returns logits [B, num_classes]."""
        x_BTD = self.embed(image)
        x_BTD, _ = apply_blocks(self.blocks, dropout(x_BTD, self.dropout, rngs), rngs, remat=self.remat)
        x_BTD = self.norm(x_BTD)
        if self.pool == "mean":
            return self.output(x_BTD.mean(axis=1))
        if self.pool == "both":
            return self.output(jnp.concatenate([x_BTD[:, 0], x_BTD[:, 1:].mean(axis=1)], axis=-1))
        logits = self.output(x_BTD[:, 0])
        return logits if self.output_distilled is None else (logits + self.output_distilled(x_BTD[:, 1])) / 2

    def embed(self, image: jax.Array) -> jax.Array:
        """Return patches as vectors with positions, after the tokens: [B, T, D].

        One matrix for every patch equals a convolution with a stride of the patch size.
        """
        x = self.patches(patches(image.astype(self.output.kernel.dtype), self.patch))
        x_BTD = x.reshape(x.shape[0], -1, x.shape[-1])
        B, _, D = x_BTD.shape
        first = [jnp.broadcast_to(token[...], (B, 1, D)) for token in (self.token, self.distillation_token) if token is not None]
        x_BTD = jnp.concatenate([*first, x_BTD], axis=1) if first else x_BTD
        if self.positions is None:
            return x_BTD + jnp.asarray(np.pad(sincos(*self.grid, D), ((self.tokens, 0), (0, 0))), x_BTD.dtype)
        positions = self.positions[...]
        if self.learned_grid == self.grid:
            return x_BTD + positions
        table = interpolated(positions[self.tokens :].reshape(*self.learned_grid, D), self.grid)
        return x_BTD + jnp.concatenate([positions[: self.tokens], table.reshape(-1, D)])


def interpolated(table: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Return positions [rows, columns, D] of another grid, interpolated in both directions by `cubic`."""
    rows, columns = (jnp.asarray(cubic(there, here), table.dtype) for there, here in zip(table.shape, grid, strict=False))
    return jnp.einsum("rs,std,ct->rcd", rows, table, columns, precision="highest")


def cubic(there: int, here: int) -> np.ndarray:
    """Return the weights of cubic interpolation from `there` points to `here`, float32 [here, there].

    Both have the same ends, a place beyond them counts as the last point, and the kernel is that of Keys (1981) with a = -0.75, without
    anti-aliasing: as PyTorch interpolates with `bicubic`, and so as the positions of published models are.
    """
    places = (np.arange(here) + 0.5) * there / here - 0.5
    first, weights = np.floor(places).astype(int), np.zeros((here, there))
    for offset in range(-1, 3):
        x = np.abs(places - first - offset)
        near, far = (1.25 * x - 2.25) * x**2 + 1, -0.75 * (((x - 5) * x + 8) * x - 4)
        np.add.at(weights, (np.arange(here), np.clip(first + offset, 0, there - 1)), np.where(x <= 1, near, far))
    return weights.astype(np.float32)


def sincos(rows: int, columns: int, width: int) -> np.ndarray:
    """Fixed positions of a grid, float32 [rows * columns, width]: a quarter of the width each for the sines and cosines of the
    column and of the row, with wavelengths from 2π to 20,000π (Vaswani et al. 2017, as Chen et al. 2021 have it for images)."""
    rates = 10_000.0 ** -(np.arange(width // 4) / (width // 4))
    row, column = np.divmod(np.arange(rows * columns), columns)
    parts = [f(place[:, None] * rates) for place in (column, row) for f in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1).astype(np.float32)
