"""Rematerialization: which activations of a block are saved for the backward pass. The others are recomputed, or offloaded to host memory.

Chen et al. 2016 describe the method. A block names its activations (`checkpoint_name`), and a policy selects from the names.
"""

from collections.abc import Callable
from typing import Literal

import jax

Remat = Literal["none", "full", "dots", "dots_no_batch"]

POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

# Activations that a block names, in the order of computation. `input` is the block's input, which is always saved, on the device unless
# it is offloaded. `attention` is the output of the attention kernel with the residuals of its gradient.
NAMES = ("input", "query", "key", "value", "attention", "middle", "gate", "up", "hidden")


def checkpointed(function: Callable, remat: Remat | tuple[str, ...], offload: tuple[str, ...], *, scan: bool, static_argnums: int) -> Callable:
    """Return the function with a backward pass that recomputes what `remat` does not save.

    Args:
      function: of a block.
      remat: a name in POLICIES or `none`; or the names of activations to save.
      offload: names of activations that are offloaded to host memory.
      scan: whether the function is the body of a loop, where no barrier is needed against common-subexpression elimination.
      static_argnums: of the function.
    """
    if remat == "none" and not offload:
        return function
    if isinstance(remat, str) and not offload:
        policy = POLICIES[remat]
    else:
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[] if isinstance(remat, str) else list(remat),
            names_which_can_be_offloaded=list(offload),
            offload_src="device",
            offload_dst="pinned_host",
        )
    return jax.checkpoint(function, static_argnums=static_argnums, prevent_cse=not scan, policy=policy)


def check(remat: Remat | tuple[str, ...], offload: tuple[str, ...]) -> None:
    """Check a policy and the names of activations.

    Raises:
      ValueError: one is unknown, or the two exclude each other.
    """
    if remat not in ("none", *POLICIES) if isinstance(remat, str) else not isinstance(remat, tuple | list):
        raise ValueError(f"remat is 'none', {', '.join(map(repr, POLICIES))}, or names of activations to save, got {remat!r}")
    for key, names in (("remat", () if isinstance(remat, str) else remat), ("offload", offload)):
        for name in names:
            if name not in NAMES:
                raise ValueError(f"{key}: blocks have no activation {name!r}; they have {', '.join(NAMES)}")
    if offload and isinstance(remat, str) and remat != "full":
        raise ValueError(f"offload needs remat='full' or names of activations to save, got remat={remat!r}")
    if both := set(offload) & (set() if isinstance(remat, str) else set(remat)):
        raise ValueError(f"{min(both)!r} is both saved on the device (remat) and offloaded")
