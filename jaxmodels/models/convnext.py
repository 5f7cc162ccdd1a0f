"""ConvNeXt (Liu et al. 2022): stages of blocks with a depthwise 7×7 convolution and a pointwise feed-forward."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmodels.models.convolution import depthwise, patches
from jaxmodels.models.layers import Linear, check_rate, check_sizes, gelu_exact, stochastic_depth
from jaxmodels.models.normalization import LayerNorm

SIZES = {
    "convnext_t": {"stages": (3, 3, 9, 3), "width": 96},
    "convnext_s": {"stages": (3, 3, 27, 3), "width": 96},
    "convnext_b": {"stages": (3, 3, 27, 3), "width": 128},
}

init = nnx.initializers.truncated_normal(0.02)


class Merge(nnx.Module):
    """Merge squares of `size`×`size` pixels into one pixel of `features` channels: a convolution with stride `size`."""

    def __init__(self, channels: int, features: int, size: int, *, rngs: nnx.Rngs):
        self.linear = Linear(size * size * channels, features, kernel_init=init, rngs=rngs)
        self.size = size

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(patches(x, self.size))


class ConvNeXtBlock(nnx.Module):
    """A depthwise convolution, normalization, and a feed-forward, scaled by channel and added to the input."""

    def __init__(self, channels: int, *, kernel: int, layer_scale: float, rate: float, rngs: nnx.Rngs):
        self.kernel = nnx.Param(init(rngs.params(), (kernel, kernel, channels)))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.norm = LayerNorm(channels, epsilon=1e-6, rngs=rngs)
        self.up = Linear(channels, 4 * channels, kernel_init=init, rngs=rngs)
        self.down = Linear(4 * channels, channels, kernel_init=init, rngs=rngs)
        self.layer_scale = nnx.Param(jnp.full(channels, layer_scale))
        self.rate = rate

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        y = depthwise(x, self.kernel[...]) + self.bias[...]
        y = self.down(gelu_exact(self.up(self.norm(y)))) * self.layer_scale[...]
        return x + stochastic_depth(y, self.rate, rngs)


class ConvNeXt(nnx.Module):
    """Stages of blocks, with half the resolution and twice the width from stage to stage, then mean pooling and logits.

    Named sizes `convnext_t`, `convnext_s` and `convnext_b` have the published parameter counts at 1,000 classes.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        num_classes: int,
        *,
        stages: tuple[int, ...] = (2, 2, 6, 2),
        width: int = 40,
        patch: int = 4,
        kernel: int = 7,
        layer_scale: float = 1e-6,
        epsilon: float = 1e-6,
        stochastic_depth: float = 0.0,
        rngs: nnx.Rngs,
    ):
        """
        Args:
          image_shape: (height, width, channels). An odd last row or column is dropped where the resolution halves.
          num_classes: width of the output.
          stages: number of blocks in each stage.
          width: channels of the first stage.
          patch: side in pixels of the square that becomes one position of the first stage; 1 or 2 for small images.
          kernel: side of the depthwise convolutions, odd.
          layer_scale: initial value of the scales on the outputs of blocks (Touvron et al. 2021).
          epsilon: of the last normalization; that of the others is 1e-6.
          stochastic_depth: rate at which examples skip the last block; it rises linearly from 0 at the first block.
          rngs: draws the initial parameters from its `params` stream.
        """
        check_rate(stochastic_depth, "stochastic_depth")
        check_sizes(width=width, patch=patch, kernel=kernel, **{f"stages[{i}]": count for i, count in enumerate(stages)})
        if kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {kernel}")
        if min(image_shape[:2]) < patch * 2 ** (len(stages) - 1):
            raise ValueError(f"{len(stages)} stages reduce {image_shape[0]}×{image_shape[1]} pixels to nothing; use a smaller patch or fewer stages")
        self.stem = Merge(image_shape[2], width, patch, rngs=rngs)
        self.stem_norm = LayerNorm(width, epsilon=1e-6, rngs=rngs)
        norms, merges, blocks, done = [], [], [], 0
        for stage, count in enumerate(stages):
            channels = width * 2**stage
            if stage:
                norms.append(LayerNorm(channels // 2, epsilon=1e-6, rngs=rngs))
                merges.append(Merge(channels // 2, channels, 2, rngs=rngs))
            rates = [stochastic_depth * (done + i) / max(1, sum(stages) - 1) for i in range(count)]
            blocks.append(nnx.List([ConvNeXtBlock(channels, kernel=kernel, layer_scale=layer_scale, rate=rate, rngs=rngs) for rate in rates]))
            done += count
        self.norms, self.merges, self.blocks = nnx.List(norms), nnx.List(merges), nnx.List(blocks)
        self.norm = LayerNorm(channels, epsilon=epsilon, rngs=rngs)
        self.output = Linear(channels, num_classes, kernel_init=init, rngs=rngs)

    def __call__(self, image: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """image: float [B, H, W, C], computed in the dtype of the parameters. Returns logits [B, num_classes]."""
        x = self.stem_norm(self.stem(image.astype(self.output.kernel.dtype)))
        for stage, blocks in enumerate(self.blocks):
            if stage:
                x = self.merges[stage - 1](self.norms[stage - 1](x))
            for block in blocks:
                x = block(x, rngs)
        return self.output(self.norm(x.mean(axis=(1, 2))))
