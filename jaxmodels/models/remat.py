"""What the forward pass of a block leaves for the backward pass: the rest is computed again, or fetched from the host's memory.

Chen et al. 2016 for the method. A block names its activations (`kept`), and a policy says which of them stay.
"""

from collections.abc import Callable
from typing import Literal

import jax
from jax.ad_checkpoint import checkpoint_name

Remat = Literal["none", "full", "dots", "dots_no_batch"]

POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

# Activations that a block names, in the order that they are computed in. `input` is what the block is given, which is kept anyway, on the
# device unless it is offloaded; `attention` is what the attention's kernel gives, with what its own gradient needs.
NAMES = ("input", "query", "key", "value", "attention", "middle", "gate", "up", "hidden")


def kept(x: jax.Array, name: str) -> jax.Array:
    """x, under one of NAMES."""
    return checkpoint_name(x, name)


def checkpointed(function: Callable, remat: Remat | tuple[str, ...], offload: tuple[str, ...], *, scan: bool, static_argnums: int) -> Callable:
    """The function, whose backward pass computes again what `remat` does not keep.

    Args:
      function: of a block.
      remat: a name in POLICIES or `none`; or the names of activations to keep.
      offload: names of activations that wait in the host's memory.
      scan: the function is the body of a loop, which keeps the compiler from undoing this.
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
    """Raises ValueError for a policy or a name that there is not."""
    if remat not in ("none", *POLICIES) if isinstance(remat, str) else not isinstance(remat, tuple | list):
        raise ValueError(f"remat is 'none', {', '.join(map(repr, POLICIES))}, or names of activations to keep, not {remat!r}")
    for key, names in (("remat", () if isinstance(remat, str) else remat), ("offload", offload)):
        for name in names:
            if name not in NAMES:
                raise ValueError(f"{key}: blocks have no activation {name!r}; they have {', '.join(NAMES)}")
    if offload and isinstance(remat, str) and remat != "full":
        raise ValueError(f"offload goes with remat='full' or with names of activations to keep, not with remat={remat!r}")
    if both := set(offload) & (set() if isinstance(remat, str) else set(remat)):
        raise ValueError(f"{min(both)!r} is both kept on the device (remat) and offloaded")
