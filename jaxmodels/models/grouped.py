"""Products of groups of rows with a matrix each, which is what a mixture of experts computes.

Shapes: S rows (slots), E groups, D and F the matrices' sizes.
"""

import functools

import jax
import jax.numpy as jnp

from jaxmodels.parallel.layout import platform

# Rows that a matrix is applied to at once on a CPU; groups are filled up to whole blocks.
BLOCK = 64

# Rows, and the two sizes of a matrix, that a TPU's kernel of the matrices' gradient takes at once.
TILE, SIDES = 512, (1024, 1024)


def whole_blocks(sizes: jax.Array | int) -> jax.Array | int:
    """Sizes, rounded up to multiples of BLOCK."""
    return -(-sizes // BLOCK) * BLOCK


def rows(total: int, groups: int) -> int:
    """Rows that groups in whole blocks may take up, of at most `total` rows together, however these fall to them."""
    most = min(total * BLOCK, whole_blocks(total) + (groups - 1) * BLOCK)  # all groups but one end in a block that is not full
    return most if most < 8 * TILE else -(-most // TILE) * TILE


@jax.custom_vjp
def product(x_SD: jax.Array, kernels_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Products of groups of rows, one after the other, with a matrix each; rows after the last group give no particular value.

    `jax.lax.ragged_dot` where there is an accelerator; on TPUs rows after the last group take no time, and the gradient of the
    matrices is that of Pallas' grouped product (after Gale et al. 2022, MegaBlocks), since that of `ragged_dot` takes every row
    times every matrix (compiled for a v5p, 8 matrices: 8 times the operations). On a CPU `ragged_dot` itself does that
    (measured with 8 matrices: 10 times the time of one dense product, its gradient 17 times), so there each block of rows is
    multiplied with its own copy of its matrix (3 times, 1.6 times).

    Args:
      x_SD: rows, a multiple of BLOCK.
      kernels_EDF: matrices.
      sizes_E: rows of each group, int32, multiples of BLOCK.
    """
    return jax.lax.platform_dependent(x_SD, kernels_EDF, sizes_E, cpu=_by_blocks, default=jax.lax.ragged_dot)


def _forward(x_SD, kernels_EDF, sizes_E):
    # A gradient of its own, since what one platform keeps for it, copies of matrices, would be kept on all.
    return product(x_SD, kernels_EDF, sizes_E), (x_SD, kernels_EDF, sizes_E)


def _backward(kept, g_SF):
    def transpose(way, x_SD, kernels_EDF, sizes_E, g_SF):
        return jax.vjp(lambda x, kernels: way(x, kernels, sizes_E), x_SD, kernels_EDF)[1](g_SF)

    ways = {"cpu": functools.partial(transpose, _by_blocks), "default": functools.partial(transpose, jax.lax.ragged_dot)}
    if platform() == "tpu":  # not traced elsewhere, which would take a second
        ways["tpu"] = _transpose_on_tpu
    return *jax.lax.platform_dependent(*kept, g_SF, **ways), None


product.defvjp(_forward, _backward)


def _by_blocks(x_SD, kernels_EDF, sizes_E):
    S, D = x_SD.shape
    starts = jnp.arange(0, S, BLOCK)
    owner = jnp.searchsorted(jnp.cumsum(sizes_E), starts, side="right", method="compare_all")
    kernels = jnp.take(kernels_EDF, owner, axis=0, mode="clip")
    return jnp.einsum("nbd,ndf->nbf", x_SD.reshape(-1, BLOCK, D), kernels).reshape(S, -1)


def _transpose_on_tpu(x_SD, kernels_EDF, sizes_E, g_SF, interpret=False):
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    (S, D), F = x_SD.shape, g_SF.shape[1]
    rows = next(size for size in (TILE, 256, 128, 64, S) if S % size == 0)
    tiles = (rows, min(D, SIDES[0]), min(F, SIDES[1]))
    (g_x_SD,) = jax.vjp(lambda x: jax.lax.ragged_dot(x, kernels_EDF, sizes_E), x_SD)[1](g_SF)
    # Its own first gradient, and its value, are left to the compiler to throw away.
    (g_EDF,) = jax.vjp(lambda kernels: gmm(x_SD, kernels, sizes_E, g_SF.dtype, tiles, None, None, False, interpret), kernels_EDF)[1](g_SF)
    return g_x_SD, g_EDF
