"""The Vision Transformer (Dosovitskiy et al. 2021): a Transformer encoder over square patches of an image.

Shapes: B batch, T patches (and the class token, which is first), D width, P side of a patch.
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels.models.attention import Implementation
from jaxmodels.models.blocks import Block, apply_blocks, make_blocks
from jaxmodels.models.convolution import patches
from jaxmodels.models.layers import check_rate, check_sizes, dropout, stochastic_depth
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
}


class VisionBlock(Block):
    """A Transformer block with stochastic depth."""

    def __init__(self, width: int, heads: int, *, stochastic_depth: float, rngs: nnx.Rngs, **options):
        super().__init__(width, heads, causal=False, activation="gelu_exact", rngs=rngs, **options)
        self.rate = stochastic_depth

    def __call__(self, x_BTD: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        return x_BTD + stochastic_depth(super().__call__(x_BTD, rngs) - x_BTD, self.rate, rngs)


class VisionTransformer(nnx.Module):
    """Pre-norm blocks over the patches of an image, and class logits.

    Named sizes (`vit_ti16`, `vit_s16`, `vit_s32`, `vit_b16`, `vit_b32`, `vit_l16`, `vit_l32`: the number is the patch) have the
    published parameter counts at 224×224 pixels and 1,000 classes; Ti and S are those of Touvron et al. 2021.
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
        pool: Literal["token", "mean"] = "token",
        positions: Literal["learned", "sincos"] = "learned",
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
          pool: input of the output layer: the class token, or the mean over patches (without a class token).
          positions: `learned`, or fixed sines and cosines of row and column, half of the width each, and zero for the class
            token (Chen et al. 2021).
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
        init = nnx.initializers.normal(0.02)
        self.patches = nnx.Linear(patch * patch * image_shape[2], width, rngs=rngs)
        self.token = nnx.Param(jnp.zeros((1, 1, width))) if pool == "token" else None
        if positions == "learned":
            self.positions = nnx.Param(init(rngs.params(), (rows * columns + (pool == "token"), width)))
        elif width % 4:
            raise ValueError(f"positions='sincos' needs a width that divides by 4, got {width}")
        else:
            self.positions = None

        def block(rngs):
            # Scaled by fan-in: at small widths, blocks with a deviation of 0.02 add almost nothing.
            options = {"mlp_width": mlp_width, "dropout": dropout, "layers": layers, "attention": attention, "init": "fan_in"}
            options |= {"epsilon": epsilon, "qkv_bias": qkv_bias}
            return VisionBlock(width, heads, stochastic_depth=stochastic_depth, rngs=rngs, **options)

        self.blocks = make_blocks(block, layers, scan, rngs)
        self.norm = nnx.LayerNorm(width, epsilon=epsilon, rngs=rngs)
        self.output = nnx.Linear(width, num_classes, kernel_init=nnx.initializers.zeros, rngs=rngs)
        self.patch, self.grid, self.dropout, self.remat = patch, (rows, columns), dropout, remat

    def __call__(self, image: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """image: float [B, H, W, C], computed in the dtype of the parameters. Returns logits [B, num_classes]."""
        x_BTD = self.embed(image)
        x_BTD, _ = apply_blocks(self.blocks, dropout(x_BTD, self.dropout, rngs), rngs, remat=self.remat)
        x_BTD = self.norm(x_BTD)
        return self.output(x_BTD.mean(axis=1) if self.token is None else x_BTD[:, 0])

    def embed(self, image: jax.Array) -> jax.Array:
        """Return patches as vectors with positions, after the class token: [B, T, D].

        One matrix for every patch equals a convolution with a stride of the patch size.
        """
        x = self.patches(patches(image.astype(self.output.kernel.dtype), self.patch))
        x_BTD = x.reshape(x.shape[0], -1, x.shape[-1])
        if self.token is not None:
            x_BTD = jnp.concatenate([jnp.broadcast_to(self.token[...], (x_BTD.shape[0], 1, x_BTD.shape[2])), x_BTD], axis=1)
        if self.positions is not None:
            return x_BTD + self.positions[...]
        table = sincos(*self.grid, x_BTD.shape[2])
        return x_BTD + jnp.asarray(np.pad(table, ((x_BTD.shape[1] - len(table), 0), (0, 0))), x_BTD.dtype)


def sincos(rows: int, columns: int, width: int) -> np.ndarray:
    """Fixed positions of a grid, float32 [rows * columns, width]: a quarter of the width each for the sines and cosines of the
    column and of the row, with wavelengths from 2π to 20,000π (Vaswani et al. 2017, as Chen et al. 2021 have it for images)."""
    rates = 10_000.0 ** -(np.arange(width // 4) / (width // 4))
    row, column = np.divmod(np.arange(rows * columns), columns)
    parts = [f(place[:, None] * rates) for place in (column, row) for f in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1).astype(np.float32)
