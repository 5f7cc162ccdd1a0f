"""Weights in 8 bits, for models that are not trained any more.

The matrices of linear layers, and embeddings, are stored as int8 with a scale for each output, or for each token, and multiplied out where they are
used (weight-only quantization; Dettmers et al. 2022, without their outliers). Activations keep their type. `qwix` rounds and restores; its arrays
take the place of parameters.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.errors import optional_import

_AXIS = {"kernel": -2, "embedding": -1}  # last part of a path -> the axis whose values share a scale


def quantized(params: dict, dtype: Any) -> dict:
    """Return nested parameters with matrices in 8 bits, and scales of this type; ConfigError if `qwix` is not installed."""
    qwix = optional_import("qwix", "quantize")

    def changed(path, x):
        axis = _AXIS.get(str(path[-1].key))
        if axis is None or x.ndim < 2:
            return x
        own = [i for i in range(x.ndim) if i != x.ndim + axis]
        return jax.jit(lambda x: qwix.quantize(x, jnp.int8, channelwise_axes=own, scale_dtype=dtype))(x)

    return jax.tree_util.tree_map_with_path(changed, params)


def restored(params: dict) -> dict:
    """Return nested parameters with all matrices as numbers of their scales' type."""
    if not any(map(_is_quantized, jax.tree.leaves(params, is_leaf=_is_quantized))):
        return params
    qwix = optional_import("qwix", "quantize")
    return jax.tree.map(lambda x: qwix.dequantize(x) if _is_quantized(x) else x, params, is_leaf=_is_quantized)


def _is_quantized(x: Any) -> bool:
    return hasattr(x, "qvalue")
