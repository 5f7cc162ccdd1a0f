"""Convolutions and pooling of images [B, H, W, C], written so that they are fast on CPUs too."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmodels.models.products import product

# Outputs of at most so many rows and columns are computed as one matrix product. XLA's convolutions on CPUs take up to
# eighty times as long for images of one or two pixels, and somewhat longer at four; elsewhere it is no loss.
SMALL = 4


class Conv(nnx.Module):
    """A convolution without bias. Symmetric zero padding preserves the size (divided by the stride)."""

    def __init__(self, channels: int, features: int, size: int, stride: int = 1, *, init, rngs: nnx.Rngs):
        self.kernel = nnx.Param(init(rngs.params(), (size, size, channels, features)))
        self.stride = stride

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        return convolve(x_BHWC, self.kernel[...], self.stride)


def convolve(x_BHWC: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """Convolve images with a kernel [size, size, C, F] of odd size. Return [B, H / stride, W / stride, F], rounded up."""
    B, H, W, C = x_BHWC.shape
    size = kernel.shape[0]
    height, width, edge = -(-H // stride), -(-W // stride), (size - 1) // 2
    if size == 1:
        return product(x_BHWC[:, ::stride, ::stride], kernel[0, 0])
    if max(height, width) > SMALL:
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x_BHWC, kernel, (stride, stride), [(edge, edge)] * 2, dimension_numbers=numbers)
    columns = jnp.concatenate(_shifted(x_BHWC, size, stride, height, width, 0.0), axis=-1)
    return product(columns, kernel.reshape(size * size * C, -1))


def depthwise(x_BHWC: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve each channel with its own kernel (depthwise), [size, size, C], of odd size. Return the shape of x.

    This is a sum of shifted images on CPUs, where the general convolution takes about twenty times as long.
    """
    size, _, C = kernel.shape

    def shifted(x, kernel):
        slices = _shifted(x, size, 1, *x.shape[1:3], 0.0)
        return sum(part * weight for part, weight in zip(slices, kernel.reshape(-1, C), strict=True))

    def general(x, kernel):
        edges, numbers = [(size // 2, size // 2)] * 2, ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel[:, :, None], (1, 1), edges, dimension_numbers=numbers, feature_group_count=C)

    return jax.lax.platform_dependent(x_BHWC, kernel, cpu=shifted, default=general)


def max_pool_3x3(x_BHWC: jax.Array) -> jax.Array:
    """Max-pool 3×3 with stride 2 and padding of one pixel. Return half the size, rounded up.

    This is a maximum of nine slices: the gradient of a general max-pooling loops over windows, which is several times slower on a
    CPU. Equal maxima share the gradient.
    """
    B, H, W, C = x_BHWC.shape
    slices = _shifted(x_BHWC, 3, 2, -(-H // 2), -(-W // 2), -jnp.inf)
    result = slices[0]
    for other in slices[1:]:
        result = jnp.maximum(result, other)
    return result


def patches(x_BHWC: jax.Array, size: int) -> jax.Array:
    """Return squares of size×size pixels as vectors: [B, H / size, W / size, size * size * C]. Incomplete squares at the end are dropped."""
    B, H, W, C = x_BHWC.shape
    height, width = H // size, W // size
    x = x_BHWC[:, : height * size, : width * size].reshape(B, height, size, width, size, C)
    return x.swapaxes(2, 3).reshape(B, height, width, size * size * C)


def _shifted(x_BHWC, size, stride, height, width, fill):
    """Return the image shifted to each of the size×size offsets of a window, with padding of `fill`."""
    edge = (size - 1) // 2
    x = jnp.pad(x_BHWC, ((0, 0), (edge, edge), (edge, edge), (0, 0)), constant_values=fill)
    rows, columns = (height - 1) * stride + 1, (width - 1) * stride + 1
    return [x[:, i : i + rows : stride, j : j + columns : stride] for i in range(size) for j in range(size)]
