"""Grouped matrix products, one matrix for each group of rows, for mixtures of experts.

Shapes: S rows (slots), E groups, D and F the matrices' sizes.
"""

import functools

import jax
import jax.numpy as jnp

from jaxmodels.parallel.layout import traced_for

# Rows that are multiplied at once on a CPU. Groups are padded to whole blocks.
BLOCK = 64

# Rows, and values of a row, in a tile of the TPU kernel for the matrices' gradient. With 2-byte values it uses 12 of the 16 MB of vector memory.
TILE, SIDE = 512, 1024


def whole_blocks(sizes: jax.Array | int) -> jax.Array | int:
    """Return sizes rounded up to multiples of BLOCK."""
    return -(-sizes // BLOCK) * BLOCK


def rows(total: int, groups: int) -> int:
    """Return the maximum number of rows of groups padded to whole blocks, for `total` rows in any distribution."""
    if not isinstance(total, int):  # a symbolic size (jax.export) cannot be compared
        return whole_blocks(total) + (groups - 1) * BLOCK
    most = min(total * BLOCK, whole_blocks(total) + (groups - 1) * BLOCK)  # all groups but one end in a block that is not full
    return most if most < 8 * TILE else -(-most // TILE) * TILE


def product(x_SD: jax.Array, kernels_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Multiply consecutive groups of rows with one matrix each. The result of rows after the last group is undefined.

    Accelerators use `jax.lax.ragged_dot`. On TPUs, rows after the last group take no time, and the gradient of the matrices is Pallas'
    grouped product (after Gale et al. 2022, MegaBlocks): the gradient of `ragged_dot` multiplies every row with every matrix (compiled for
    a v5p with 8 matrices: 8 times the operations). On CPUs `ragged_dot` itself does this (measured with 8 matrices: 10 times the time of one
    dense product, its gradient 17 times). So there each block of rows is multiplied with its own copy of its matrix (3 times, 1.6 times).

    Args:
      x_SD: rows, a multiple of BLOCK.
      kernels_EDF: matrices.
      sizes_E: rows of each group, int32, multiples of BLOCK.
    """
    return _product(traced_for("tpu"), x_SD, kernels_EDF, sizes_E)  # read the layout here: gradients are traced after `layout.use` has ended


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(for_tpu, x_SD, kernels_EDF, sizes_E):
    ways = {"cpu": _by_blocks, "default": jax.lax.ragged_dot}
    if for_tpu:
        ways["tpu"] = _way_on_tpu(kernels_EDF)
    # Under `vmap` (pipeline stages, one per device) products run one after the other: TPUs have no batched ragged_dot.
    return jax.custom_batching.sequential_vmap(functools.partial(jax.lax.platform_dependent, **ways))(x_SD, kernels_EDF, sizes_E)


def _forward(for_tpu, x_SD, kernels_EDF, sizes_E):
    # A custom gradient: otherwise one platform's residuals, copies of matrices, would be saved on all.
    return _product(for_tpu, x_SD, kernels_EDF, sizes_E), (x_SD, kernels_EDF, sizes_E)


def _backward(for_tpu, residuals, g_SF):
    def transpose(way, x_SD, kernels_EDF, sizes_E, g_SF):
        return jax.vjp(lambda x, kernels: way(x, kernels, sizes_E), x_SD, kernels_EDF)[1](g_SF)

    ways = {"cpu": functools.partial(transpose, _by_blocks), "default": functools.partial(transpose, jax.lax.ragged_dot)}
    if for_tpu:  # only if used: tracing it takes a second
        ways["tpu"] = _transpose_on_tpu
    gradients = jax.custom_batching.sequential_vmap(functools.partial(jax.lax.platform_dependent, **ways))
    return *gradients(*residuals, g_SF), None


_product.defvjp(_forward, _backward)


def _by_blocks(x_SD, kernels_EDF, sizes_E):
    S, D = x_SD.shape
    starts = jnp.arange(0, S, BLOCK)
    owner = jnp.searchsorted(jnp.cumsum(sizes_E), starts, side="right", method="compare_all")
    kernels = jnp.take(kernels_EDF, owner, axis=0, mode="clip")
    return jnp.einsum("nbd,ndf->nbf", x_SD.reshape(-1, BLOCK, D), kernels).reshape(S, -1)


def _way_on_tpu(kernels_EDF, interpret=False):
    """Return `ragged_dot`, or Pallas' product for one matrix: the compiler cannot lower a `ragged_dot` whose only size is in scalar memory."""
    return jax.lax.ragged_dot if len(kernels_EDF) > 1 else functools.partial(_by_tiles, interpret=interpret)


def _by_tiles(x_SD, kernels_EDF, sizes_E, transpose=False, interpret=False):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    D, F = kernels_EDF.shape[-1:0:-1] if transpose else kernels_EDF.shape[1:]
    tiles = (_row_tile(len(x_SD)), min(D, SIDE), min(F, SIDE))
    return gmm(x_SD, kernels_EDF, sizes_E, x_SD.dtype, tiles, transpose_rhs=transpose, interpret=interpret)


def _row_tile(rows: int) -> int:
    return next(size for size in (TILE, 256, 128, 64, rows) if rows % size == 0)


def _transpose_on_tpu(x_SD, kernels_EDF, sizes_E, g_SF, interpret=False):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    D, F = kernels_EDF.shape[1:]
    tiles = (_row_tile(len(x_SD)), min(D, SIDE * 2 // x_SD.dtype.itemsize), min(F, SIDE))
    if len(kernels_EDF) > 1:
        (g_x_SD,) = jax.vjp(lambda x: jax.lax.ragged_dot(x, kernels_EDF, sizes_E), x_SD)[1](g_SF)
    else:
        g_x_SD = _by_tiles(g_SF, kernels_EDF, sizes_E, True, interpret)
    return g_x_SD, tgmm(x_SD.T, g_SF, sizes_E, kernels_EDF.dtype, tiles, interpret=interpret)
