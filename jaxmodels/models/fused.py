"""Fused attention kernels on one device or several. The compiler cannot partition them, so each device runs one on its own shard.

Shapes: B batch, T queries, S keys, N heads, G key-value heads, K width of a head.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.parallel.layout import Layout, current, on_each_device

ROWS, NUMBERS = ("batch", "sequence", "heads", None), ("batch", "sequence")
CUDNN_PARTS = "cuDNN counts the positions of a causal mask from a device's first query, so it does not support sharded sequences (mesh.context)"
# Block size of the TPU kernel -> the shortest sequence that it is used for. Larger blocks have less overhead around their products, but compute more
# products that a causal mask hides (`benchmarks/attention_kernels.py`). Vector memory limits blocks to 1,024 queries, and for heads wider than 128 to 512
# queries and keys.
BLOCKS = {2048: 32768, 1024: 2048, 512: 512, 256: 256, 128: 128}


def cudnn(q_BTNK, k_BSGK, v_BSGK, *, causal: bool, window: int | None, segments, bias, scale) -> jax.Array:
    """cuDNN's attention, through JAX; arguments as in `attention.attend`. Each device computes its own rows and heads.

    Each shard of a sequence attends to all keys.

    Raises:
      ValueError: cuDNN cannot compute this.
    """
    layout = current()
    if causal and layout is not None and layout.size("sequence") > 1 and q_BTNK.shape[1] % layout.size("sequence") == 0:
        raise ValueError(f"{CUDNN_PARTS}; use 'xla' or 'auto'")
    if bias is not None and layout is not None:
        raise ValueError("cuDNN attention does not support a bias on several devices; use 'xla' or 'auto'")

    def attend(q, k, v, *segments):
        k, v, *numbers = _all_keys(layout, k_BSGK.shape[1], k, v, *segments[1:])
        mask = (segments[0][:, :, None] == numbers[0][:, None, :])[:, None] if segments else None
        local = None if window is None else (window - 1, 0 if causal else window - 1)
        return jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask, scale=scale, is_causal=causal, local_window_size=local, implementation="cudnn")

    numbers = segments or ()
    return on_each_device(attend, [ROWS] * 3 + [NUMBERS] * len(numbers), ROWS)(q_BTNK, k_BSGK, v_BSGK, *numbers)


def splash(q_BTNK, k_BSGK, v_BSGK, *, causal: bool, window: int | None, segments, bias, scale, cap: float | None = None, interpret: bool = False) -> jax.Array:
    """JAX's Pallas kernel for TPUs; arguments as in `attention.attend`. Each device computes its own rows and heads.

    Each shard of a sequence attends to all keys, with its own part of the mask. The kernel works in blocks of at least 128, so sequences
    are padded with a segment that no query sees.

    Args:
      interpret: run in Pallas' interpreter, for tests on a CPU.

    Raises:
      ValueError: there is a bias.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel_lib,
    )

    if bias is not None:
        raise ValueError("splash attention does not support a bias; use 'xla' or 'auto'")
    layout = current()
    parts = 1 if layout is None else layout.size("sequence")
    (T, N, K), S = q_BTNK.shape[1:], k_BSGK.shape[1]
    filled_T, filled_S = (-(-length // (128 * parts)) * 128 * parts for length in (T, S))
    if segments is None and (S < filled_S or T < filled_T):
        segments = (jnp.zeros(q_BTNK.shape[:2], jnp.int32), jnp.zeros(k_BSGK.shape[:2], jnp.int32))
    # Padding queries see padding keys, so that no query is without a key.
    numbers = [_filled(x, length, np.iinfo(np.int32).min) for x, length in zip(segments or (), (filled_T, filled_S), strict=False)]
    heads, rows = N // _ways(layout, "heads", N), q_BTNK.shape[0] // _ways(layout, "batch", q_BTNK.shape[0])
    # In the backward pass the two cores of a chip divide only mapped dimensions. With an odd number of rows, groups of heads that share keys are mapped as
    # well as rows. With an even number they are not, since XLA would copy more.
    groups = k_BSGK.shape[2] // _ways(layout, "heads", N) if rows % 2 else 1
    block = _block(filled_T // parts, K, most=1024), _block(filled_S, K)
    kernel, masks, blocks = _splash_kernel((filled_T, filled_S), parts, heads // groups, causal, window, block, cap, interpret)
    scale = 1 / np.sqrt(K) if scale is None else scale

    def attend(q, k, v, *rest):
        numbers, masks = rest[: len(rest) - len(mask_names)], rest[len(rest) - len(mask_names) :]
        k, v, *key_numbers = _all_keys(layout, filled_S, k, v, *numbers[1:])
        heads_first = [x.swapaxes(1, 2) for x in (q * jnp.asarray(scale, q.dtype), k, v)]
        run = kernel(masks)

        def of_row(q, k, v, *numbers):
            segments = kernel_lib.SegmentIds(*numbers) if numbers else None
            if groups == 1:
                return run(q, k, v, segments)
            grouped = [x.reshape(groups, -1, *x.shape[1:]) for x in (q, k, v)]
            return jax.vmap(lambda q, k, v: run(q, k, v, segments))(*grouped).reshape(q.shape)

        with jax.named_scope(blocks):
            return jax.vmap(of_row)(*heads_first, *numbers[:1], *key_numbers).swapaxes(1, 2)

    # The mask arrays are the blocks of keys that each block of queries needs, [1, blocks, blocks], and the queries' positions.
    mask_names = [("sequence",) if x.ndim == 1 else (None, "sequence", None) for x in masks]
    inputs = [ROWS] * 3 + [NUMBERS] * len(numbers) + mask_names
    filled = [_filled(x, length) for x, length in ((q_BTNK, filled_T), (k_BSGK, filled_S), (v_BSGK, filled_S))]
    return on_each_device(attend, inputs, ROWS)(*filled, *numbers, *masks)[:, :T]


def _block(length: int, head_width: int, most: int = 2048) -> int:
    """Return the block size for a sequence whose length is a multiple of 128."""
    most = most if head_width <= 128 else 512
    return next(block for block, shortest in BLOCKS.items() if block <= most and shortest <= length and length % block == 0)


def _splash_kernel(
    shape: tuple[int, int], parts: int, heads: int, causal: bool, window: int | None, block: tuple[int, int], cap: float | None, interpret: bool
) -> tuple[Callable, list, str]:
    """Return the kernel for sequences of that shape with `parts` shards of queries, as (masks -> kernel), the masks of all shards, and a scope name.

    The name, `blocks=VISIBLEofALL`, holds the number of computed blocks, for the cost model.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel_lib,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as mask_lib,
    )

    left, right = None if window is None else window - 1, 0 if causal else window and window - 1
    mask = mask_lib.FullMask(shape) if left is right is None else _band_mask()(shape, (left, right), 0)
    q, kv = block
    # Two kernels compute the gradients: one for queries, one for keys and values. The fused kernel has five products instead of seven, but returns a partial
    # gradient of the queries for each block of keys, and XLA's sum of these costs as much as is saved (`docs/large_models.md`).
    sizes = {f"block_q{of}": q for of in ("", "_dkv", "_dq")} | {f"block_kv{of}": kv for of in ("", "_dkv", "_dq")}
    sizes |= {f"block_kv{of}_compute": min(kv, 512) for of in ("", "_dkv")}
    # One shard of heads: all heads have the same mask.
    options = {"head_shards": 1, "q_seq_shards": parts, "block_sizes": kernel_lib.BlockSizes(**sizes), "interpret": interpret}
    options["attn_logits_soft_cap"] = cap
    options["residual_checkpoint_name"] = "attention"  # one of `remat.NAMES`
    kernel = kernel_lib.make_splash_mha(mask_lib.MultiHeadMask([mask] * heads), **options)
    masks, structure = jax.tree.flatten(kernel)
    visible = _visible_blocks(shape, parts, block, (left, right))
    return lambda masks: jax.tree.unflatten(structure, masks), masks, f"blocks={visible}of{shape[0] // parts // q * (shape[1] // kv)}"


def _visible_blocks(shape: tuple[int, int], parts: int, block: tuple[int, int], sides: tuple[int | None, int | None]) -> int:
    """Return the number of query × key blocks in which a query sees a key, in the shard with the most of them."""
    left, right = (np.inf if side is None else side for side in sides)
    queries, keys = (np.arange(0, length, size) for length, size in zip(shape, block, strict=True))
    lowest = queries[:, None] - (keys[None] + block[1] - 1)  # smallest distance from a key of the block to a query
    highest = queries[:, None] + block[0] - 1 - keys[None]
    return int(((lowest <= left) & (highest >= -right)).reshape(parts, -1).sum(axis=1).max())


@functools.cache
def _band_mask() -> type:
    """Return the kernel's mask of keys at most so far to the left and right, for long sequences.

    The library inspects every block of a mask to find those that are empty, full, or neither. For 131,072 tokens that takes minutes with a
    mask of all products.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as mask_lib,
    )

    class BandMask(mask_lib.LocalMask):
        def __getitem__(self, index) -> np.ndarray:
            rows, keys = index
            left, right = (np.inf if side is None else side for side in self.window_size)
            lowest, highest = rows.start - (keys.stop - 1), rows.stop - 1 - keys.start  # smallest and largest distance from a key to a query
            full = highest <= left and lowest >= -right
            if full or lowest > left or highest < -right:
                return np.full((1, 1), full)
            return super().__getitem__(index)

    return BandMask


def _ways(layout: Layout | None, name: str, length: int) -> int:
    """Return the number of shards of heads or rows: 1 if they do not divide."""
    ways = 1 if layout is None else layout.size(name)
    return 1 if length % ways else ways


def _all_keys(layout: Layout | None, length: int, *parts: jax.Array) -> list[jax.Array]:
    """Gather the keys of a device, [B, S, ...], along the sequence, and pad them to that length."""
    if parts[0].shape[1] == length:
        return list(parts)
    return [jax.lax.all_gather(x, layout.axes("sequence"), axis=1, tiled=True) for x in parts]


def _filled(x: jax.Array, length: int, value: int = 0) -> jax.Array:
    """Pad [B, T, ...] along T."""
    return jnp.pad(x, [(0, length - x.shape[1] if axis == 1 else 0) for axis in range(x.ndim)], constant_values=value)
