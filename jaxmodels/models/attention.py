"""Attention: one function with several implementations, and the module around it.

Shapes: B batch, T queries, S keys, N heads, G key-value heads (N is a multiple of G), K width of a head, D width.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels.models.positions import rotate
from jaxmodels.parallel.layout import constrain

Implementation = Literal["auto", "xla", "cudnn", "splash"]


def attend(
    q_BTNK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    *,
    causal: bool = False,
    window: int | None = None,
    segments: tuple[jax.Array, jax.Array] | None = None,
    bias: jax.Array | None = None,
    scale: float | None = None,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Scaled dot-product attention (Vaswani et al. 2017): softmax(q k scale + bias) v, over the keys that a query may see.

    Args:
      q_BTNK, k_BSGK, v_BSGK: queries, keys and values; each key head serves N / G query heads (Ainslie et al. 2023).
      causal: query t sees keys 0..t.
      window: query t sees only keys less than `window` away (Beltagy et al. 2020; Jiang et al. 2023).
      segments: int [B, T] and [B, S]; a query sees only keys of its own number. A query that sees none gets some
        average of values: what it gives means nothing, but is finite.
      bias: added to the products, [1 or B, 1 or N, T, S].
      scale: of the products; 1 / sqrt(K) unless given.
      implementation: `xla` computes all products; `cudnn` is the fused kernel of NVIDIA GPUs; `splash` that of TPUs;
        `auto` is what `choose` says for the platform that JAX runs on by default.

    Returns:
      [B, T, N, K].

    Raises:
      ValueError: that implementation cannot compute this.
    """
    if q_BTNK.shape[2] % k_BSGK.shape[2]:
        raise ValueError(f"{q_BTNK.shape[2]} heads do not divide over {k_BSGK.shape[2]} key-value heads")
    if implementation == "auto":
        implementation, _ = choose("auto", jax.default_backend(), q_BTNK.dtype, q_BTNK.shape[-1], causal=causal, window=window, bias=bias is not None)
    if implementation == "splash":
        return _splash(q_BTNK, k_BSGK, v_BSGK, causal=causal, window=window, segments=segments, bias=bias, scale=scale)
    mask = None if segments is None else (segments[0][:, :, None] == segments[1][:, None, :])[:, None]
    local = None if window is None else (window - 1, 0 if causal else window - 1)
    return jax.nn.dot_product_attention(
        q_BTNK,
        k_BSGK,
        v_BSGK,
        bias=bias,
        mask=mask,
        scale=scale,
        is_causal=causal,
        local_window_size=local,
        implementation=implementation,
    )


def choose(
    asked: Implementation, platform: str, dtype: Any, head_width: int, *, causal: bool, window: int | None, bias: bool, devices: int = 1
) -> tuple[Implementation, str]:
    """The implementation that runs, and why: the one asked for, or for `auto` the fastest that can.

    Args:
      asked: as in `attend`.
      platform: `cpu`, `gpu` or `tpu`, as JAX names it.
      dtype: of the computation.
      head_width: K.
      causal, window: as in `attend`.
      bias: whether something is added to the products.
      devices: that the computation is spread over.

    Raises:
      ValueError: what is asked for cannot run; says why.
    """
    platform = {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)
    if asked == "xla":
        return "xla", "asked for"
    problems = {
        "cudnn": _cudnn_problem(platform, jnp.dtype(dtype), head_width, causal, window, bias),
        "splash": _splash_problem(platform, bias, devices),
    }
    if asked != "auto":
        if problems[asked] is not None:
            raise ValueError(f"attention={asked!r} cannot run here: {problems[asked]}; use 'xla' or 'auto'")
        return asked, "asked for"
    best = {"gpu": "cudnn", "tpu": "splash"}.get(platform)
    if best is None:
        return "xla", f"there is no fused kernel for {platform}"
    return (best, f"auto on {platform}") if problems[best] is None else ("xla", f"no {best}: {problems[best]}")


def _cudnn_problem(platform, dtype, head_width, causal, window, bias) -> str | None:
    if platform != "gpu":
        return f"cuDNN needs an NVIDIA GPU, this is a {platform}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN's attention computes in bfloat16 or float16, not {dtype} (training.precision)"
    if head_width % 8 or head_width > 128:
        return f"cuDNN wants heads of a multiple of 8 up to 128, not {head_width} wide"
    if bias:
        return "cuDNN is not used with relative positions, whose bias has a gradient of its own"
    if window is not None and not causal:
        return "cuDNN has windows only for causal attention"
    return None


def _splash_problem(platform, bias, devices) -> str | None:
    if platform != "tpu":
        return f"splash attention is a TPU kernel, this is a {platform}"
    if bias:
        return "splash attention adds no bias (relative positions)"
    if devices > 1:
        return "the compiler cannot spread a Pallas kernel over several devices by itself"
    return None


def settle(model: nnx.Module, platform: str | None, dtype: Any = jnp.float32, devices: int = 1) -> dict[str, str]:
    """Gives every attention of a model the implementation that runs on a platform, in place.

    Args:
      model: a module, or the shapes of one.
      platform: as in `choose`; None while there is none, and only shapes are computed, which are the same for all.
      dtype: of the computation.
      devices: that it is spread over.

    Returns:
      What was asked, what is used and why: empty for a model without attention.

    Raises:
      ValueError: what is asked for cannot run; says why. Without a platform: on none.
    """
    found: dict[str, list[str]] = {"asked": [], "used": [], "why": []}
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Attention):
            wanted = module.implementation
            options = {"causal": module.causal, "window": module.window, "bias": module.biased, "devices": devices}
            likely = platform or {"cudnn": "gpu", "splash": "tpu"}.get(wanted, "cpu")
            used, why = choose(wanted, likely, dtype, module.head_width, **options)
            for key, value in zip(found, (wanted, used, why), strict=True):
                if value not in found[key]:
                    found[key].append(value)
            module.implementation = used if platform else "xla"
    # The kinds of attention in one model may differ: with relative positions, and without them between two sequences.
    return {key: " / ".join(values) for key, values in found.items() if values}


def _splash(q_BTNK, k_BSGK, v_BSGK, *, causal, window, segments, bias, scale, interpret=False):
    """JAX's Pallas kernel for TPUs. It works in blocks of 128, so sequences are filled up with a segment that nothing sees."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel_lib,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as mask_lib,
    )

    if bias is not None:
        raise ValueError("splash attention adds no bias; use 'xla' or 'auto'")
    T, N, K = q_BTNK.shape[1:]
    S = k_BSGK.shape[1]
    blocks_T, blocks_S = -(-T // 128) * 128, -(-S // 128) * 128
    if segments is None and (S < blocks_S or T < blocks_T):
        segments = (jnp.zeros(q_BTNK.shape[:2], jnp.int32), jnp.zeros(k_BSGK.shape[:2], jnp.int32))
    shape = (blocks_T, blocks_S)
    if window is not None:
        mask = mask_lib.LocalMask(shape, (window - 1, 0 if causal else window - 1), 0)
    else:
        mask = mask_lib.CausalMask(shape) if causal else mask_lib.FullMask(shape)
    scale = 1 / np.sqrt(K) if scale is None else scale

    def rows(x, length):
        """Filled up along time, heads first: [B, heads, length, K]."""
        return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0))).swapaxes(1, 2)

    kernel = kernel_lib.make_splash_mha(mask_lib.MultiHeadMask([mask] * N), head_shards=1, q_seq_shards=1, interpret=interpret)
    arguments = [rows(q_BTNK * jnp.asarray(scale, q_BTNK.dtype), blocks_T), rows(k_BSGK, blocks_S), rows(v_BSGK, blocks_S)]
    if segments is None:
        y_BNTK = jax.vmap(kernel)(*arguments)
    else:
        # The rows that fill up a query's side and a key's side see each other, so that no row is without a key.
        fill = [
            jnp.pad(s, ((0, 0), (0, n - s.shape[1])), constant_values=np.iinfo(np.int32).min)
            for s, n in zip(segments, (blocks_T, blocks_S), strict=True)
        ]
        y_BNTK = jax.vmap(lambda q, k, v, a, b: kernel(q, k, v, kernel_lib.SegmentIds(a, b)))(*arguments, *fill)
    return y_BNTK.swapaxes(1, 2)[:, :T]


class Attention(nnx.Module):
    """Multi-head attention of a sequence to itself, or to another one, with a matrix each for query, key, value and output."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_width: int | None = None,
        causal: bool = False,
        window: int | None = None,
        bias: bool = True,
        out_bias: bool | None = None,
        query_key_norm: bool = False,
        epsilon: float = 1e-6,
        scale: float | None = None,
        biased: bool = False,
        implementation: Implementation = "auto",
        init=None,
        query_init=None,
        out_init=None,
        rngs: nnx.Rngs,
    ):
        """
        Args:
          width, heads: D and N.
          kv_heads: G; N unless given.
          head_width: K; D / N unless given.
          causal, window, scale, implementation: of `attend`.
          bias: add a vector to queries, keys and values.
          out_bias: and to the output; as `bias` unless given.
          query_key_norm: root-mean-square normalisation of every query and key, with a scale (Henry et al. 2020; Qwen 3).
          epsilon: of that normalisation.
          biased: a bias is added to the products when called.
          init: of the matrices, normal with a deviation of 0.02 unless given; `query_init` and `out_init` where those of query
            and output differ.
          rngs: draws the initial parameters from its `params` stream.
        """
        kv_heads = heads if kv_heads is None else kv_heads
        if head_width is None:
            if width % heads:
                raise ValueError(f"heads must divide width, got heads={heads}, width={width}; or give head_width")
            head_width = width // heads
        if heads % kv_heads:
            raise ValueError(f"kv_heads must divide heads, got heads={heads}, kv_heads={kv_heads}")
        init = init or nnx.initializers.normal(0.02)
        linear = functools.partial(nnx.Linear, rngs=rngs)
        self.query = linear(width, heads * head_width, use_bias=bias, kernel_init=query_init or init)
        self.key = linear(width, kv_heads * head_width, use_bias=bias, kernel_init=init)
        self.value = linear(width, kv_heads * head_width, use_bias=bias, kernel_init=init)
        self.out = linear(heads * head_width, width, use_bias=bias if out_bias is None else out_bias, kernel_init=out_init or init)
        self.query_norm = nnx.RMSNorm(head_width, epsilon=epsilon, rngs=rngs) if query_key_norm else None
        self.key_norm = nnx.RMSNorm(head_width, epsilon=epsilon, rngs=rngs) if query_key_norm else None
        self.heads, self.kv_heads, self.head_width = heads, kv_heads, head_width
        self.causal, self.window, self.scale, self.biased = causal, window, scale, biased
        self.implementation = implementation

    def __call__(
        self,
        x_BTD: jax.Array,
        memory_BSD: jax.Array | None = None,
        *,
        rotary: tuple[jax.Array, jax.Array] | None = None,
        segments: tuple[jax.Array, jax.Array] | None = None,
        bias: jax.Array | None = None,
    ) -> jax.Array:
        """Attends from x to `memory_BSD`, or to x itself; `rotary` as `positions.rotary_table` gives, the others as in `attend`."""
        memory_BSD = x_BTD if memory_BSD is None else memory_BSD
        B, T, _ = x_BTD.shape
        S = memory_BSD.shape[1]
        q_BTNK = self.query(x_BTD).reshape(B, T, self.heads, self.head_width)
        k_BSGK = self.key(memory_BSD).reshape(B, S, self.kv_heads, self.head_width)
        v_BSGK = self.value(memory_BSD).reshape(B, S, self.kv_heads, self.head_width)
        if self.query_norm is not None:
            q_BTNK, k_BSGK = self.query_norm(q_BTNK), self.key_norm(k_BSGK)
        if rotary is not None:
            q_BTNK, k_BSGK = rotate(q_BTNK, *rotary), rotate(k_BSGK, *rotary)
        q_BTNK = constrain(q_BTNK, "batch", "sequence", "heads", None)
        # Parts of a sequence see all of its keys.
        k_BSGK, v_BSGK = (constrain(x, "batch", None, "kv_heads", None) for x in (k_BSGK, v_BSGK))
        y_BTNK = attend(
            q_BTNK,
            k_BSGK,
            v_BSGK,
            causal=self.causal,
            window=self.window,
            segments=segments,
            bias=bias,
            scale=self.scale,
            implementation=self.implementation,
        )
        y_BTNK = constrain(y_BTNK, "batch", "sequence", "heads", None)
        return self.out(y_BTNK.reshape(B, T, self.heads * self.head_width))
