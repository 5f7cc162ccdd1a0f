"""Convolutions and poolings against JAX's general ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmodels.models.convolution import convolve, depthwise, max_pool_3x3, patches


def general(x, kernel, stride, groups=1):
    edge = (kernel.shape[0] - 1) // 2
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), [(edge, edge)] * 2, dimension_numbers=numbers, feature_group_count=groups, precision="highest"
    )


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (7, 8), (9, 12)])
@pytest.mark.parametrize(("size", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_convolutions_and_their_gradients_equal_the_general_ones(height, width, size, stride):
    x = jax.random.normal(jax.random.key(0), (2, height, width, 3))
    kernel = jax.random.normal(jax.random.key(1), (size, size, 3, 4))
    (one, one_back), (other, other_back) = (jax.vjp(lambda x, k, f=f: f(x, k, stride), x, kernel) for f in (convolve, general))
    np.testing.assert_allclose(one, other, atol=1e-4)
    for a, b in zip(one_back(other), other_back(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


def test_depthwise_is_a_convolution_of_each_channel():
    x, kernel = jax.random.normal(jax.random.key(0), (2, 5, 6, 3)), jax.random.normal(jax.random.key(1), (7, 7, 3))
    expected = [general(x[..., c : c + 1], kernel[:, :, c, None, None], 1)[..., 0] for c in range(3)]
    np.testing.assert_allclose(depthwise(x, kernel), jnp.stack(expected, -1), atol=1e-4)


@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
def test_pooling_to_half_is_max_pooling(size):
    x = jax.random.normal(jax.random.key(0), (2, *size, 3))

    def pool(x):
        return nnx.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))

    np.testing.assert_array_equal(max_pool_3x3(x), pool(x))
    one, other = (jax.grad(lambda x, f=f: (f(x) ** 3).sum())(x) for f in (max_pool_3x3, pool))
    np.testing.assert_allclose(one, other, rtol=1e-6)


def test_patches_are_squares():
    x = np.arange(2 * 5 * 9 * 3).reshape(2, 5, 9, 3)
    got = patches(jnp.asarray(x), 2)
    assert got.shape == (2, 2, 4, 12)
    for i in range(2):
        for j in range(4):
            np.testing.assert_array_equal(got[:, i, j], x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(2, 12))
