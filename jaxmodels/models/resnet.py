"""ResNet v1.5 (He et al. 2015; with the stride of a bottleneck on its 3×3 convolution, as in Goyal et al. 2017)."""

from collections.abc import Sequence
from typing import Literal

import jax
from flax import nnx

from jaxmodels.models.convolution import Conv, max_pool_3x3
from jaxmodels.models.layers import Linear, check_sizes

SIZES = {
    "resnet18": {"stages": (2, 2, 2, 2), "block": "basic"},
    "resnet34": {"stages": (3, 4, 6, 3), "block": "basic"},
    "resnet50": {"stages": (3, 4, 6, 3), "block": "bottleneck"},
    "resnet101": {"stages": (3, 4, 23, 3), "block": "bottleneck"},
}

he_normal = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


class ConvNorm(nnx.Module):
    """A convolution without bias, and batch normalization: over the batch with `train`, else with running statistics."""

    def __init__(self, channels: int, features: int, kernel: int, stride: int = 1, *, zero_scale: bool = False, rngs: nnx.Rngs):
        self.conv = Conv(channels, features, kernel, stride, init=he_normal, rngs=rngs)
        scale = nnx.initializers.zeros if zero_scale else nnx.initializers.ones
        self.norm = nnx.BatchNorm(features, momentum=0.9, epsilon=1e-5, scale_init=scale, rngs=rngs)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        # In training the layer decides: one with frozen parameters uses its running statistics.
        return self.norm(self.conv(x), use_running_average=None if train else True).astype(x.dtype)


class Basic(nnx.Module):
    """Two 3×3 convolutions with a shortcut."""

    expansion = 1

    def __init__(self, channels: int, features: int, stride: int, *, rngs: nnx.Rngs):
        self.first = ConvNorm(channels, features, 3, stride, rngs=rngs)
        self.second = ConvNorm(features, features, 3, zero_scale=True, rngs=rngs)
        self.shortcut = ConvNorm(channels, features, 1, stride, rngs=rngs) if stride > 1 or channels != features else None

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = self.second(nnx.relu(self.first(x, train)), train)
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x, train)))


class Bottleneck(nnx.Module):
    """1×1, 3×3 and 1×1 convolutions, the last with four times the width, with a shortcut."""

    expansion = 4

    def __init__(self, channels: int, features: int, stride: int, *, rngs: nnx.Rngs):
        wide = self.expansion * features
        self.first = ConvNorm(channels, features, 1, rngs=rngs)
        self.second = ConvNorm(features, features, 3, stride, rngs=rngs)
        self.third = ConvNorm(features, wide, 1, zero_scale=True, rngs=rngs)
        self.shortcut = ConvNorm(channels, wide, 1, stride, rngs=rngs) if stride > 1 or channels != wide else None

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        y = self.third(nnx.relu(self.second(nnx.relu(self.first(x, train)), train)), train)
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x, train)))


BLOCKS = {"basic": Basic, "bottleneck": Bottleneck}


class ResNet(nnx.Module):
    """Stages of residual blocks, with half the resolution and twice the width from stage to stage, then mean pooling and logits.

    Named sizes `resnet18`, `resnet34`, `resnet50` and `resnet101` have the published parameter counts at 1,000 classes.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        num_classes: int,
        *,
        stages: tuple[int, ...] = (2, 2, 2, 2),
        block: Literal["basic", "bottleneck"] = "basic",
        width: int = 64,
        stem: Literal["imagenet", "cifar"] = "imagenet",
        rngs: nnx.Rngs,
    ):
        """
        Args:
          image_shape: (height, width, channels); any height and width.
          num_classes: width of the output.
          stages: number of blocks in each stage.
          block: `basic` or `bottleneck`.
          width: channels of the stem and of the first stage's blocks.
          stem: `imagenet` is a 7×7 convolution of stride 2 and a 3×3 max-pooling of stride 2; `cifar`, for small images, a
            3×3 convolution.
          rngs: draws the initial parameters from its `params` stream.
        """
        check_sizes(width=width, **{f"stages[{i}]": count for i, count in enumerate(stages)})
        self.stem = stem
        self.first = ConvNorm(image_shape[-1], width, *((3, 1) if stem == "cifar" else (7, 2)), rngs=rngs)
        blocks, channels = [], width
        for stage, count in enumerate(stages):
            for number in range(count):
                features = width * 2**stage
                stride = 2 if stage > 0 and number == 0 else 1
                blocks.append(BLOCKS[block](channels, features, stride, rngs=rngs))
                channels = features * BLOCKS[block].expansion
        self.blocks = nnx.List(blocks)
        self.output = Linear(channels, num_classes, rngs=rngs)

    def __call__(self, image: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """image: float [B, H, W, C], computed in the dtype of the parameters. Returns logits [B, num_classes].

        With `rngs` (training), normalization is over the batch, and running statistics are updated.
        """
        train = rngs is not None
        x = nnx.relu(self.first(image.astype(self.output.kernel.dtype), train))
        if self.stem == "imagenet":
            x = max_pool_3x3(x)
        for block in self.blocks:
            x = block(x, train)
        return self.output(x.mean(axis=(1, 2)))
