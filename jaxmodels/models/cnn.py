"""A small convolutional network for small images."""

import math
from collections.abc import Sequence

import jax
from flax import nnx

from jaxmodels.models.layers import Linear, check_rate, check_sizes, dropout, relu_max_pool_2x2


class CNN(nnx.Module):
    """Convolutions 3×3, each with ReLU and 2×2 max-pooling, a hidden dense layer with ReLU, and class logits."""

    def __init__(
        self,
        image_shape: Sequence[int],
        num_classes: int,
        *,
        features: tuple[int, ...] = (32, 64),
        hidden: int = 64,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        """
        Args:
          image_shape: (height, width, channels).
          num_classes: width of the output.
          features: filters of each convolution.
          hidden: width of the dense layer.
          dropout: rate before the output layer, and half of it after the last pooling.
          rngs: draws the initial parameters from its `params` stream.
        """
        check_rate(dropout)
        check_sizes(hidden=hidden, **{f"features[{i}]": wide for i, wide in enumerate(features)})
        height, width, channels = image_shape
        if min(height, width) < 2 ** len(features):
            raise ValueError(f"{len(features)} poolings reduce an image of {height}×{width} to nothing; use fewer features")
        layers = []
        for wide in features:
            layers.append(nnx.Conv(channels, wide, kernel_size=(3, 3), kernel_init=nnx.initializers.he_normal(), rngs=rngs))
            height, width, channels = height // 2, width // 2, wide
        self.convolutions = nnx.List(layers)
        flat = math.prod((height, width, channels))
        self.hidden = Linear(flat, hidden, kernel_init=nnx.initializers.he_normal(), rngs=rngs)
        self.output = Linear(hidden, num_classes, rngs=rngs)
        self.dropout = dropout

    def __call__(self, image: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """image: float [B, H, W, C], computed in the dtype of the parameters. Returns logits [B, num_classes]."""
        x = image.astype(self.output.kernel.dtype)
        for convolution in self.convolutions:
            x = relu_max_pool_2x2(convolution(x))
        x = dropout(x.reshape(x.shape[0], -1), self.dropout / 2, rngs)
        x = nnx.relu(self.hidden(x))
        return self.output(dropout(x, self.dropout, rngs))
