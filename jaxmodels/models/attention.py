"""Attention: one function with several implementations, and the module around it.

Shapes: B batch, T queries, S keys, N heads, G key-value heads (N is a multiple of G), K width of a head, D width.
"""

import contextlib
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels.models import cache as cache_lib
from jaxmodels.models import fused
from jaxmodels.models.positions import rotate
from jaxmodels.models.remat import kept
from jaxmodels.models.ring import ring_attend
from jaxmodels.parallel.layout import Layout, constrain, current, on_each_device, on_tpu, use

Implementation = Literal["auto", "xla", "cudnn", "splash"]
Context = Literal["whole", "gather", "heads", "ring"]

NO_BIAS = "{} adds no bias, as relative positions need; use sharding.context='gather'"


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

    Where a layout has sequences in parts (the axis `context`), each device has its part of the queries, and is given all keys and
    values; by `xla` it then holds all products of the two, T / devices × S for each head. The layout's `context` chooses another way
    for long sequences: a ring (`ring.ring_attend`), or all positions of a share of the heads (`_by_heads`). A sequence that does not
    divide stays whole.

    Returns:
      [B, T, N, K].

    Raises:
      ValueError: that implementation cannot compute this.
    """
    (T, N, K), (S, G) = q_BTNK.shape[1:], k_BSGK.shape[1:3]
    if N % G:
        raise ValueError(f"{N} heads do not divide over {G} key-value heads")
    layout = current()
    context = context_of(layout)
    if implementation == "auto":
        options = {"causal": causal, "window": window, "bias": bias is not None, "context": context}
        implementation, _ = choose("auto", jax.default_backend(), q_BTNK.dtype, K, **options)
    if context in ("ring", "heads") and (T % layout.size("sequence") or S % layout.size("sequence")):
        context = "gather"
    if context in ("ring", "heads") and bias is not None:
        raise ValueError(NO_BIAS.format(f"sharding.context={context!r}"))
    q_BTNK = constrain(q_BTNK, "batch", "sequence", "heads", None)
    options = {"causal": causal, "window": window, "segments": segments, "scale": scale}
    if context == "heads":
        return _by_heads(q_BTNK, k_BSGK, v_BSGK, layout=layout, implementation=implementation, **options)
    if context == "ring" or implementation != "xla":
        if layout is not None:
            k_BSGK, v_BSGK = (_for_devices(x, N, layout.size("heads")) for x in (k_BSGK, v_BSGK))
        if context == "ring":
            scale = 1 / math.sqrt(K) if scale is None else scale
            return ring_attend(q_BTNK, k_BSGK, v_BSGK, layout=layout, **options | {"scale": scale})
        fuse = {"cudnn": fused.cudnn, "splash": fused.splash}[implementation]
        with _stated(T, S, causal, window):
            return fuse(q_BTNK, k_BSGK, v_BSGK, bias=bias, **options)
    # Parts of a sequence see all of its keys.
    k_BSGK, v_BSGK = (constrain(x, "batch", None, "kv_heads", None) for x in (k_BSGK, v_BSGK))
    mask = None if segments is None else (segments[0][:, :, None] == segments[1][:, None, :])[:, None]
    local = None if window is None else (window - 1, 0 if causal else window - 1)
    with _stated(T, S, causal, window):
        return jax.nn.dot_product_attention(
            q_BTNK, k_BSGK, v_BSGK, bias=bias, mask=mask, scale=scale, is_causal=causal, local_window_size=local, implementation="xla"
        )


def _stated(T: int, S: int, causal: bool, window: int | None) -> contextlib.AbstractContextManager:
    """A scope whose name tells those who count operations (`plan.flops`, `plan.roofline`) how many pairs of queries and keys are left; none
    where all are, nor where a program for any length is traced (jax.export)."""
    if not (causal or window) or not (isinstance(T, int) and isinstance(S, int)):
        return contextlib.nullcontext()
    return jax.named_scope(f"attended={_attended(T, S, causal, window)}of{T * S}")


def _attended(T: int, S: int, causal: bool, window: int | None) -> int:
    """Pairs of queries and keys that a causal mask and a window leave."""
    t, window = np.arange(T), window or max(T, S)
    first, last = np.maximum(t - window + 1, 0), np.minimum(t if causal else t + window - 1, S - 1)
    return int(np.maximum(last - first + 1, 0).sum())


def _by_heads(q_BTNK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, *, layout: Layout, segments, **options: Any) -> jax.Array:
    """Attention of sequences in parts, for which each device is given all positions of a share of its heads, and gives them back.

    Jacobs et al. 2023 (DeepSpeed Ulysses, arXiv 2309.14509). Of queries, keys and values a device sends what it has but once, where
    `gather` brings it the keys of all; and a causal mask leaves every device as much to do. Key-value heads are repeated until
    there is one for each device.
    """
    axes, (N, ways) = layout.axes("sequence"), (q_BTNK.shape[2], layout.size("heads") * layout.size("sequence"))
    if N % ways:
        raise ValueError(_indivisible(N, layout))
    k_BSGK, v_BSGK = (_for_devices(x, N, ways) for x in (k_BSGK, v_BSGK))

    def on_device(q, k, v, *numbers):
        q, k, v = (jax.lax.all_to_all(x, axes, split_axis=2, concat_axis=1, tiled=True) for x in (q, k, v))
        segments = tuple(jax.lax.all_gather(x, axes, axis=1, tiled=True) for x in numbers) or None
        with use(None):  # what a device has here is whole
            y = attend(q, k, v, segments=segments, **options)
        return jax.lax.all_to_all(y, axes, split_axis=1, concat_axis=2, tiled=True)

    numbers = segments or ()
    return on_each_device(on_device, [fused.ROWS] * 3 + [fused.NUMBERS] * len(numbers), fused.ROWS)(q_BTNK, k_BSGK, v_BSGK, *numbers)


def _indivisible(heads: int, layout: Layout) -> str:
    parts = " × ".join(f"{axis}={layout.mesh.shape[axis]}" for axis in (*layout.axes("heads"), *layout.axes("sequence")))
    return f"sharding.context='heads' gives each device a share of the heads: {heads} do not divide over {parts}; use 'gather' or 'ring'"


def _for_devices(x_BSGK: jax.Array, N: int, ways: int) -> jax.Array:
    """Keys or values, their heads repeated until each of so many devices has those of its own share of the N heads."""
    G = x_BSGK.shape[2]
    return x_BSGK if N % ways else jnp.repeat(x_BSGK, math.lcm(G, ways) // G, axis=2)


def context_of(layout: Layout | None) -> Context:
    """How the parts of a sequence come together: `whole` where a sequence lies on one device."""
    return "whole" if layout is None or layout.axis is not None or layout.size("sequence") == 1 else layout.context


def choose(
    asked: Implementation,
    platform: str,
    dtype: Any,
    head_width: int,
    *,
    causal: bool,
    window: int | None,
    bias: bool,
    context: Context = "whole",
) -> tuple[Implementation, str]:
    """The implementation that runs, and why: the one asked for, or for `auto` the fastest that can.

    Args:
      asked: as in `attend`.
      platform: `cpu`, `gpu` or `tpu`, as JAX names it.
      dtype: of the computation.
      head_width: K.
      causal, window: as in `attend`.
      bias: whether something is added to the products.
      context: how the parts of a sequence come together, as `context_of` says.

    Raises:
      ValueError: what is asked for cannot run; says why.
    """
    if context in ("ring", "heads") and bias:
        raise ValueError(NO_BIAS.format(f"sharding.context={context!r}"))
    if context == "ring":
        if asked not in ("auto", "xla"):
            cure = "use 'auto', or sharding.context='gather'"
            raise ValueError(f"attention={asked!r} does not go with sharding.context='ring', which computes by 'xla'; {cure}")
        return "xla", "keys are passed round (sharding.context=ring)"
    platform = {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)
    if asked == "xla":
        return "xla", "asked for"
    problems = {
        "cudnn": _cudnn_problem(platform, jnp.dtype(dtype), head_width, causal, window, bias, context),
        "splash": _splash_problem(platform, bias),
    }
    if asked != "auto":
        if problems[asked] is not None:
            raise ValueError(f"attention={asked!r} cannot run here: {problems[asked]}; use 'xla' or 'auto'")
        return asked, "asked for"
    best = {"gpu": "cudnn", "tpu": "splash"}.get(platform)
    if best is None:
        return "xla", f"there is no fused kernel for {platform}"
    return (best, f"auto on {platform}") if problems[best] is None else ("xla", f"no {best}: {problems[best]}")


def _cudnn_problem(platform, dtype, head_width, causal, window, bias, context) -> str | None:
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
    if causal and context == "gather":
        return fused.CUDNN_PARTS
    return None


def _splash_problem(platform, bias) -> str | None:
    if platform != "tpu":
        return f"splash attention is a TPU kernel, this is a {platform}"
    if bias:
        return "splash attention adds no bias (relative positions)"
    return None


def resolve_implementation(model: nnx.Module, platform: str | None, dtype: Any = jnp.float32, layout: Layout | None = None) -> dict[str, str]:
    """Gives every attention of a model the implementation that runs on a platform, in place.

    Args:
      model: a module, or the shapes of one.
      platform: as in `choose`; None while there is none, and only shapes are computed, which are the same for all.
      dtype: of the computation.
      layout: how it is spread over devices.

    Returns:
      What was asked, what is used and why: empty for a model without attention.

    Raises:
      ValueError: what is asked for cannot run; says why. Without a platform: on none.
    """
    found: dict[str, list[str]] = {"asked": [], "used": [], "why": []}
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Attention):
            wanted = module.implementation
            options = {"causal": module.causal, "window": module.window, "bias": module.biased, "context": context_of(layout)}
            if options["context"] == "heads" and module.heads % (layout.size("heads") * layout.size("sequence")):
                raise ValueError(_indivisible(module.heads, layout))
            likely = platform or {"cudnn": "gpu", "splash": "tpu"}.get(wanted, "cpu")
            used, why = choose(wanted, likely, dtype, module.head_width, **options)
            for key, value in zip(found, (wanted, used, why), strict=True):
                if value not in found[key]:
                    found[key].append(value)
            module.implementation = used if platform else "xla"
    # The kinds of attention in one model may differ: with relative positions, and without them between two sequences.
    return {key: " / ".join(values) for key, values in found.items() if values}


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
        q_BTNK, (k_BSGK, v_BSGK) = kept(self._queries(x_BTD, rotary), "query"), self._keys_values(memory_BSD, rotary)
        return self._whole(q_BTNK, kept(k_BSGK, "key"), kept(v_BSGK, "value"), segments, bias)

    def prefill(
        self, x_BTD: jax.Array, layer: dict[str, jax.Array], *, rotary: tuple[jax.Array, jax.Array] | None, segments: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """`__call__` of x to itself, and the empty `layer` of a cache with its keys and values."""
        k_BSGK, v_BSGK = self._keys_values(x_BTD, rotary)
        return self._whole(self._queries(x_BTD, rotary), k_BSGK, v_BSGK, segments, None), cache_lib.fill(layer, k_BSGK, v_BSGK)

    def extend(
        self,
        x_B1D: jax.Array,
        layer: dict[str, jax.Array],
        slot: jax.Array,
        pads_B: jax.Array,
        *,
        index: jax.Array | None = None,
        rotary: tuple[jax.Array, jax.Array] | None = None,
        bias: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Attends from one token, which goes to `slot`, to itself and those in the cache; see `models.cache`.

        Args:
          layer: of the cache; with `index` all of them stacked.
          bias: [1 or B, 1 or N, 1, S], for the places of the cache.
        """
        own = (jnp.moveaxis(x, 1, 2) for x in self._keys_values(x_B1D, rotary))
        layer = cache_lib.append(layer, slot, *own, index)
        now = {name: x if index is None else jax.lax.dynamic_index_in_dim(x, index, keepdims=False) for name, x in layer.items()}
        return self._read(x_B1D, now, cache_lib.valid(slot, pads_B, now["key"].shape[2]), rotary, bias), layer

    def remember(self, memory_BSD: jax.Array) -> dict[str, jax.Array]:
        """Keys and values of another sequence, as `read` takes them: [B, G, S, K] each."""
        return {name: jnp.moveaxis(x, 1, 2) for name, x in zip(("key", "value"), self._keys_values(memory_BSD, None), strict=True)}

    def read(self, x_B1D: jax.Array, layer: dict[str, jax.Array], valid_BS: jax.Array) -> jax.Array:
        """Attends from one token to those keys and values [B, G, S, K] that are valid, and none else."""
        return self._read(x_B1D, layer, valid_BS, None, None)

    def _read(self, x_B1D, layer, valid_BS, rotary, bias):
        q_B1NK = constrain(self._queries(x_B1D, rotary), "batch", None, "heads", None)
        B, _, N, K = q_B1NK.shape
        q_BGnK = q_B1NK.reshape(B, self.kv_heads, N // self.kv_heads, K)
        scale = 1 / math.sqrt(K) if self.scale is None else self.scale
        products_BGnS = jnp.einsum("bgnk,bgsk->bgns", q_BGnK, layer["key"], preferred_element_type=jnp.float32) * scale
        if bias is not None:
            products_BGnS += bias[:, :, 0].reshape(bias.shape[0], self.kv_heads, -1, bias.shape[-1])
        products_BGnS = jnp.where(valid_BS[:, None, None], products_BGnS, jnp.finfo(jnp.float32).min)
        weights_BGnS = jax.nn.softmax(products_BGnS).astype(x_B1D.dtype)  # in float32 until here
        y_BGnK = jnp.einsum("bgns,bgsk->bgnk", weights_BGnS, layer["value"])
        return self.out(y_BGnK.reshape(B, 1, N * K))

    def _queries(self, x_BTD, rotary):
        q_BTNK = _to_heads(self.query, x_BTD, self.heads)
        q_BTNK = q_BTNK if self.query_norm is None else self.query_norm(q_BTNK)
        return q_BTNK if rotary is None else rotate(q_BTNK, *rotary)

    def _keys_values(self, x_BSD, rotary):
        k_BSGK, v_BSGK = (_to_heads(f, x_BSD, self.kv_heads) for f in (self.key, self.value))
        k_BSGK = k_BSGK if self.key_norm is None else self.key_norm(k_BSGK)
        return (k_BSGK if rotary is None else rotate(k_BSGK, *rotary)), v_BSGK

    def _whole(self, q_BTNK, k_BSGK, v_BSGK, segments, bias):
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
        if self.implementation != "splash":  # which keeps what its gradient needs under that name itself
            y_BTNK = kept(y_BTNK, "attention")
        y_BTNK = constrain(y_BTNK, "batch", "sequence", "heads", None)
        return _from_heads(self.out, y_BTNK)


def _to_heads(linear: nnx.Module, x_BTD: jax.Array, heads: int) -> jax.Array:
    """A linear layer's result in heads, [B, T, N, K].

    As one product with a matrix of three dimensions, which a TPU's compiler lays out as attention's kernel wants it; cut up
    afterwards, it is copied.
    """
    if type(linear) is not nnx.Linear or not on_tpu():
        return linear(x_BTD).reshape(*x_BTD.shape[:2], heads, -1)
    y_BTNK = jnp.einsum("btd,dnk->btnk", x_BTD, linear.kernel[...].reshape(x_BTD.shape[-1], heads, -1))
    return y_BTNK if linear.bias is None else y_BTNK + linear.bias[...].reshape(heads, -1)


def _from_heads(linear: nnx.Module, y_BTNK: jax.Array) -> jax.Array:
    """A linear layer of heads brought together, [B, T, D]; see `_to_heads`."""
    if type(linear) is not nnx.Linear or not on_tpu():
        return linear(y_BTNK.reshape(*y_BTNK.shape[:2], -1))
    x_BTD = jnp.einsum("btnk,nkd->btd", y_BTNK, linear.kernel[...].reshape(*y_BTNK.shape[2:], -1))
    return x_BTD if linear.bias is None else x_BTD + linear.bias[...]
