"""Attention: one function with several implementations, and the module around it.

Shapes: B batch, T queries, S keys, N heads, G key-value heads (N is a multiple of G), K width of a head, D width.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxmodels.models import cache as cache_lib
from jaxmodels.models import fused, heads_first
from jaxmodels.models.layers import Linear
from jaxmodels.models.normalization import RMSNorm
from jaxmodels.models.positions import rotate
from jaxmodels.models.ring import ring_attend
from jaxmodels.parallel.layout import Layout, constrain, current, on_each_device, traced_for, use

Implementation = Literal["auto", "xla", "cudnn", "splash"]
QueryKeyNorm = bool | Literal["projection"]
Context = Literal["whole", "gather", "heads", "ring"]

NO_CAP = "{} does not support a cap on the products of attention (scales.attention_cap)"
NO_BIAS = "{} does not support the bias of relative positions; use sharding.context='gather'"


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
    cap: float | None = None,
    implementation: Implementation = "auto",
) -> jax.Array:
    """Scaled dot-product attention (Vaswani et al. 2017): softmax(q k scale + bias) v, over the keys that a query may see.

    If the layout shards sequences (the mesh axis `context`), each device has its shard of the queries, and all keys and values. With
    `xla` it then computes T / devices × S products for each head. For long sequences the layout's `context` selects another way: a ring
    (`ring.ring_attend`), or all positions of some heads on each device (`_by_heads`). A sequence that does not divide is replicated.

    Args:
      q_BTNK, k_BSGK, v_BSGK: queries, keys and values; each key head serves N / G query heads (Ainslie et al. 2023).
      causal: query t sees keys 0..t.
      window: query t sees only keys less than `window` positions away (Beltagy et al. 2020; Jiang et al. 2023).
      segments: int [B, T] and [B, S]; a query sees only keys with its own number. The output of a query that sees no key is
        finite and has no meaning.
      bias: added to the products, [1 or B, 1 or N, T, S].
      scale: factor on the products. The default is 1 / sqrt(K).
      cap: products c become cap tanh(c / cap), before masks (Gemma 2); for `xla` and `splash`.
      implementation: `xla` computes all products; `cudnn` is the fused kernel for NVIDIA GPUs; `splash` is that for TPUs;
        `auto` is the choice of `choose` for JAX's default backend.

    Returns:
      [B, T, N, K].

    Raises:
      ValueError: the implementation cannot compute this.
    """
    (T, N, K), (S, G) = q_BTNK.shape[1:], k_BSGK.shape[1:3]
    if N % G:
        raise ValueError(f"{N} heads do not divide over {G} key-value heads")
    layout = current()
    context = context_of(layout)
    if implementation == "auto":
        options = {"causal": causal, "window": window, "bias": bias is not None, "cap": cap is not None, "context": context}
        implementation, _ = choose("auto", jax.default_backend(), q_BTNK.dtype, K, **options)
    if cap is not None and (bias is not None or context == "ring" or implementation == "cudnn"):
        raise ValueError(NO_CAP.format("sharding.context='ring'" if context == "ring" else "a bias" if bias is not None else "attention='cudnn'"))
    if context in ("ring", "heads") and (T % layout.size("sequence") or S % layout.size("sequence")):
        context = "gather"
    if context in ("ring", "heads") and bias is not None:
        raise ValueError(NO_BIAS.format(f"sharding.context={context!r}"))
    q_BTNK = constrain(q_BTNK, "batch", "sequence", "heads", None)
    options = {"causal": causal, "window": window, "segments": segments, "scale": scale}
    if context == "heads":
        return _by_heads(q_BTNK, k_BSGK, v_BSGK, layout=layout, implementation=implementation, cap=cap, **options)
    if context == "ring" or implementation != "xla":
        if layout is not None:
            k_BSGK, v_BSGK = (_for_devices(x, N, layout.size("heads")) for x in (k_BSGK, v_BSGK))
        if context == "ring":
            scale = 1 / math.sqrt(K) if scale is None else scale
            return ring_attend(q_BTNK, k_BSGK, v_BSGK, layout=layout, **options | {"scale": scale})
        fuse = {"cudnn": fused.cudnn, "splash": functools.partial(fused.splash, cap=cap)}[implementation]
        with _stated(T, S, causal, window):
            return fuse(q_BTNK, k_BSGK, v_BSGK, bias=bias, **options)
    # Each shard of a sequence attends to all keys.
    k_BSGK, v_BSGK = (constrain(x, "batch", None, "kv_heads", None) for x in (k_BSGK, v_BSGK))
    on_cpu = traced_for("cpu")
    with _stated(T, S, causal, window):
        if on_cpu or cap is not None:
            scale = 1 / math.sqrt(K) if scale is None else scale
            options |= {"scale": scale, "blocks": on_cpu and context == "whole"}
            return heads_first.attend(q_BTNK, k_BSGK, v_BSGK, bias=bias, cap=cap, **options)
        mask = None if segments is None else (segments[0][:, :, None] == segments[1][:, None, :])[:, None]
        local = None if window is None else (window - 1, 0 if causal else window - 1)
        return jax.nn.dot_product_attention(
            q_BTNK, k_BSGK, v_BSGK, bias=bias, mask=mask, scale=scale, is_causal=causal, local_window_size=local, implementation="xla"
        )


def _stated(T: int, S: int, causal: bool, window: int | None) -> contextlib.AbstractContextManager:
    """Return a scope whose name holds the number of query–key pairs that the masks leave, for FLOP counts and the cost model.

    Without masks, and while tracing for symbolic lengths (jax.export), the scope has no name.
    """
    if not (causal or window) or not (isinstance(T, int) and isinstance(S, int)):
        return contextlib.nullcontext()
    return jax.named_scope(f"attended={_attended(T, S, causal, window)}of{T * S}")


def _attended(T: int, S: int, causal: bool, window: int | None) -> int:
    """Return the number of query–key pairs that a causal mask and a window leave."""
    t, window = np.arange(T), window or max(T, S)
    first, last = np.maximum(t - window + 1, 0), np.minimum(t if causal else t + window - 1, S - 1)
    return int(np.maximum(last - first + 1, 0).sum())


def _by_heads(q_BTNK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, *, layout: Layout, segments, **options: Any) -> jax.Array:
    """Attention of sharded sequences by an all-to-all: each device gets all positions of some heads, and returns their outputs.

    Jacobs et al. 2023 (DeepSpeed Ulysses, arXiv 2309.14509). A device sends its shard of queries, keys and values once, where `gather`
    brings it the keys of all devices. With a causal mask all devices have the same work. Key-value heads are repeated until each device
    has one.
    """
    axes, (N, ways) = layout.axes("sequence"), (q_BTNK.shape[2], layout.size("heads") * layout.size("sequence"))
    if N % ways:
        raise ValueError(_indivisible(N, layout))
    k_BSGK, v_BSGK = (_for_devices(x, N, ways) for x in (k_BSGK, v_BSGK))

    def on_device(q, k, v, *numbers):
        q, k, v = (jax.lax.all_to_all(x, axes, split_axis=2, concat_axis=1, tiled=True) for x in (q, k, v))
        segments = tuple(jax.lax.all_gather(x, axes, axis=1, tiled=True) for x in numbers) or None
        with use(None):  # the sequences are not sharded here
            y = attend(q, k, v, segments=segments, **options)
        return jax.lax.all_to_all(y, axes, split_axis=1, concat_axis=2, tiled=True)

    numbers = segments or ()
    return on_each_device(on_device, [fused.ROWS] * 3 + [fused.NUMBERS] * len(numbers), fused.ROWS)(q_BTNK, k_BSGK, v_BSGK, *numbers)


def _indivisible(heads: int, layout: Layout) -> str:
    parts = " × ".join(f"{axis}={layout.mesh.shape[axis]}" for axis in (*layout.axes("heads"), *layout.axes("sequence")))
    return f"sharding.context='heads' gives each device a share of the heads: {heads} do not divide over {parts}; use 'gather' or 'ring'"


def _for_devices(x_BSGK: jax.Array, N: int, ways: int) -> jax.Array:
    """Return keys or values with their heads repeated, so that each of `ways` devices has the keys or values of its N / ways query heads."""
    G = x_BSGK.shape[2]
    return x_BSGK if N % ways else jnp.repeat(x_BSGK, math.lcm(G, ways) // G, axis=2)


def context_of(layout: Layout | None) -> Context:
    """Return how attention spans the shards of a sequence: `whole` if sequences are not sharded."""
    return "whole" if layout is None or layout.axis is not None or layout.size("sequence") == 1 else layout.context


def choose(
    requested: Implementation,
    platform: str,
    dtype: Any,
    head_width: int,
    *,
    causal: bool,
    window: int | None,
    bias: bool,
    cap: bool = False,
    context: Context = "whole",
) -> tuple[Implementation, str]:
    """Return the implementation that runs, and the reason: the requested one, or for `auto` the fastest that can run.

    Args:
      requested: the argument `implementation` of `attend`.
      platform: `cpu`, `gpu` or `tpu`, as JAX names it.
      dtype: of the computation.
      head_width: K.
      causal, window: as in `attend`.
      bias: whether a bias is added to the products.
      cap: whether the products have a cap.
      context: as `context_of` returns.

    Raises:
      ValueError: the requested implementation cannot run; the message says why.
    """
    if context in ("ring", "heads") and bias:
        raise ValueError(NO_BIAS.format(f"sharding.context={context!r}"))
    if context == "ring" and cap:
        raise ValueError(NO_CAP.format("sharding.context='ring'") + "; use sharding.context='gather'")
    if context == "ring":
        if requested not in ("auto", "xla"):
            cure = "use 'auto', or sharding.context='gather'"
            raise ValueError(f"attention={requested!r} excludes sharding.context='ring', which computes with 'xla'; {cure}")
        return "xla", "ring attention (sharding.context=ring)"
    platform = {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)
    if requested == "xla":
        return "xla", "requested"
    problems = {
        "cudnn": _cudnn_problem(platform, jnp.dtype(dtype), head_width, causal, window, bias, cap, context),
        "splash": _splash_problem(platform, bias),
    }
    if requested != "auto":
        if problems[requested] is not None:
            raise ValueError(f"attention={requested!r} cannot run here: {problems[requested]}; use 'xla' or 'auto'")
        return requested, "requested"
    best = {"gpu": "cudnn", "tpu": "splash"}.get(platform)
    if best is None:
        return "xla", f"there is no fused kernel for {platform}"
    return (best, f"auto on {platform}") if problems[best] is None else ("xla", f"no {best}: {problems[best]}")


def _cudnn_problem(platform, dtype, head_width, causal, window, bias, cap, context) -> str | None:
    if platform != "gpu":
        return f"cuDNN needs an NVIDIA GPU, this is a {platform}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN's attention computes in bfloat16 or float16, not {dtype} (training.precision)"
    if head_width % 8 or head_width > 128:
        return f"cuDNN needs head widths that are multiples of 8 up to 128, not {head_width}"
    if cap:
        return "cuDNN's attention has no cap on the products (scales.attention_cap)"
    if bias:
        return "cuDNN is not used with relative positions, because their bias needs a gradient"
    if window is not None and not causal:
        return "cuDNN has windows only for causal attention"
    if causal and context == "gather":
        return fused.CUDNN_PARTS
    return None


def _splash_problem(platform, bias) -> str | None:
    if platform != "tpu":
        return f"splash attention is a TPU kernel, this is a {platform}"
    if bias:
        return "splash attention does not support a bias (relative positions)"
    return None


def resolve_implementation(model: nnx.Module, platform: str | None, dtype: Any = jnp.float32, layout: Layout | None = None) -> dict[str, str]:
    """Set each attention layer's implementation for the platform, in place.

    Args:
      model: a module of arrays or of shapes.
      platform: as in `choose`. None if it is not known yet; then only shapes are computed, with `xla`.
      dtype: of the computation.
      layout: sharding over devices, or None.

    Returns:
      The implementation that was requested (`asked`), the one that is `used`, and `why`. Empty for a model without attention.

    Raises:
      ValueError: the requested implementation cannot run on the platform, or without one on any; the message says why.
    """
    found: dict[str, list[str]] = {"asked": [], "used": [], "why": []}
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Attention):
            requested = module.implementation
            options = {"causal": module.causal, "window": module.window, "bias": module.biased, "cap": module.cap is not None, "context": context_of(layout)}
            if options["context"] == "heads" and module.heads % (layout.size("heads") * layout.size("sequence")):
                raise ValueError(_indivisible(module.heads, layout))
            likely = platform or {"cudnn": "gpu", "splash": "tpu"}.get(requested, "cpu")
            used, why = choose(requested, likely, dtype, module.head_width, **options)
            for key, value in zip(found, (requested, used, why), strict=True):
                if value not in found[key]:
                    found[key].append(value)
            module.implementation = used if platform else "xla"
    # Layers of one model may differ: with relative positions, and without them in cross-attention.
    return {key: " / ".join(values) for key, values in found.items() if values}


class Attention(nnx.Module):
    """Multi-head attention of a sequence to itself or to another one, with matrices for query, key, value and output."""

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
        query_key_norm: QueryKeyNorm = False,
        make_norm: Callable[[int], nnx.Module] | None = None,
        scale: float | None = None,
        cap: float | None = None,
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
          kv_heads: G. The default is N.
          head_width: K. The default is D / N.
          causal, window, scale, cap, implementation: as in `attend`.
          bias: whether queries, keys and values have a bias vector.
          out_bias: whether the output has one. The default is `bias`.
          query_key_norm: normalization of every query and key, with a scale (Henry et al. 2020; Qwen 3); `projection`: over all heads together (OLMo 2).
          make_norm: constructor of that normalization, by its width. The default is a root-mean-square one with an epsilon of 1e-6.
          biased: whether calls pass a bias for the products.
          init: initializer of the matrices. The default is normal with a deviation of 0.02.
          query_init, out_init: initializers of the query and output matrices. The default is `init`.
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
        linear = functools.partial(Linear, rngs=rngs)
        self.query = linear(width, heads * head_width, use_bias=bias, kernel_init=query_init or init)
        self.key = linear(width, kv_heads * head_width, use_bias=bias, kernel_init=init)
        self.value = linear(width, kv_heads * head_width, use_bias=bias, kernel_init=init)
        self.out = linear(heads * head_width, width, use_bias=bias if out_bias is None else out_bias, kernel_init=out_init or init)
        make_norm = make_norm or (lambda width: RMSNorm(width, epsilon=1e-6, rngs=rngs))
        widths = [n * head_width for n in (heads, kv_heads)] if query_key_norm == "projection" else [head_width] * 2
        self.query_norm, self.key_norm = (make_norm(width) if query_key_norm else None for width in widths)
        self.query_key_norm = query_key_norm
        self.heads, self.kv_heads, self.head_width = heads, kv_heads, head_width
        self.causal, self.window, self.scale, self.cap, self.biased = causal, window, scale, cap, biased
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
        """Attend from x to `memory_BSD`, or to x itself. `rotary` is from `positions.rotary_table`; the other arguments are as in `attend`."""
        memory_BSD = x_BTD if memory_BSD is None else memory_BSD
        q_BTNK, (k_BSGK, v_BSGK) = checkpoint_name(self._queries(x_BTD, rotary), "query"), self._keys_values(memory_BSD, rotary)
        return self._whole(q_BTNK, checkpoint_name(k_BSGK, "key"), checkpoint_name(v_BSGK, "value"), segments, bias)

    def prefill(
        self,
        x_BTD: jax.Array,
        layer: dict[str, jax.Array],
        *,
        rotary: tuple[jax.Array, jax.Array] | None,
        segments: tuple[jax.Array, jax.Array],
        slot: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Attend from x to itself, and write its keys and values into the cache `layer`, which is empty, or of which those up to `slot` are replaced."""
        k_BSGK, v_BSGK = self._keys_values(x_BTD, rotary)
        return self._whole(self._queries(x_BTD, rotary), k_BSGK, v_BSGK, segments, None), cache_lib.fill(layer, k_BSGK, v_BSGK, slot)

    def extend(
        self,
        x_BTD: jax.Array,
        layer: dict[str, jax.Array],
        slot: jax.Array,
        left_padding_B: jax.Array,
        *,
        index: jax.Array | None = None,
        rotary: tuple[jax.Array, jax.Array] | None = None,
        bias: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Attend from tokens to themselves and to those in the cache, and write them to the slots from `slot` on; see `models.cache`.

        Args:
          x_BTD: one token of each row; or T, which do not wrap around the layer.
          layer: of the cache; with `index`, all layers stacked.
          bias: [1 or B, N, T, S], for the slots of the cache.
        """
        own = (jnp.moveaxis(x, 1, 2) for x in self._keys_values(x_BTD, rotary))
        layer = cache_lib.append(layer, slot, *own, index)
        now = {name: x if index is None else jax.lax.dynamic_index_in_dim(x, index, keepdims=False) for name, x in layer.items()}
        seen_BTS = cache_lib.valid(slot, left_padding_B, now["key"].shape[2], x_BTD.shape[1], self.window)
        return self._read(x_BTD, now, seen_BTS, rotary, bias), layer

    def remember(self, memory_BSD: jax.Array) -> dict[str, jax.Array]:
        """Return the keys and values of another sequence for `read`: [B, G, S, K] each."""
        return {name: jnp.moveaxis(x, 1, 2) for name, x in zip(("key", "value"), self._keys_values(memory_BSD, None), strict=True)}

    def read(self, x_B1D: jax.Array, layer: dict[str, jax.Array], valid_BS: jax.Array) -> jax.Array:
        """Attend from one token to the valid ones of those keys and values [B, G, S, K]."""
        return self._read(x_B1D, layer, valid_BS[:, None], None, None)

    def _read(self, x_BTD, layer, seen_BTS, rotary, bias):
        q_BTNK = constrain(self._queries(x_BTD, rotary), "batch", None, "heads", None)
        (B, T, N, K), G = q_BTNK.shape, self.kv_heads
        # The n queries of a key head, each with T times, are the rows of one product.
        q_BGQK = jnp.moveaxis(q_BTNK.reshape(B, T, G, N // G, K), 1, 3).reshape(B, G, -1, K)
        scale = 1 / math.sqrt(K) if self.scale is None else self.scale
        products_BGQS = jnp.einsum("bgqk,bgsk->bgqs", q_BGQK, layer["key"], preferred_element_type=jnp.float32) * scale
        if self.cap is not None:
            products_BGQS = self.cap * jnp.tanh(products_BGQS / self.cap)
        products_BGnTS = products_BGQS.reshape(B, G, N // G, T, -1)
        if bias is not None:
            products_BGnTS += bias.reshape(bias.shape[0], G, N // G, T, -1)
        products_BGnTS = jnp.where(seen_BTS[:, None, None], products_BGnTS, jnp.finfo(jnp.float32).min)
        weights_BGQS = jax.nn.softmax(products_BGnTS).astype(x_BTD.dtype).reshape(products_BGQS.shape)  # in float32 until here
        y_BGQK = jnp.einsum("bgqs,bgsk->bgqk", weights_BGQS, layer["value"])
        return self.out(jnp.moveaxis(y_BGQK.reshape(B, G, N // G, T, K), 3, 1).reshape(B, T, N * K))

    def _queries(self, x_BTD, rotary):
        q_BTNK = to_heads(self.query, x_BTD, self.heads)
        q_BTNK = self._normalized(self.query_norm, q_BTNK)
        return q_BTNK if rotary is None else rotate(q_BTNK, *rotary)

    def _keys_values(self, x_BSD, rotary):
        k_BSGK, v_BSGK = (to_heads(f, x_BSD, self.kv_heads) for f in (self.key, self.value))
        k_BSGK = self._normalized(self.key_norm, k_BSGK)
        return (k_BSGK if rotary is None else rotate(k_BSGK, *rotary)), v_BSGK

    def _normalized(self, norm, x_BTNK):
        if self.query_key_norm == "projection":
            return norm(x_BTNK.reshape(*x_BTNK.shape[:2], -1)).reshape(x_BTNK.shape)
        return x_BTNK if norm is None else norm(x_BTNK)

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
            cap=self.cap,
            implementation=self.implementation,
        )
        if self.implementation != "splash":  # splash saves its residuals under that name itself
            y_BTNK = checkpoint_name(y_BTNK, "attention")
        y_BTNK = constrain(y_BTNK, "batch", "sequence", "heads", None)
        return _from_heads(self.out, y_BTNK)


def to_heads(linear: nnx.Module, x_BTD: jax.Array, heads: int) -> jax.Array:
    """Return the output of a linear layer in heads, [B, T, N, K].

    On TPUs this is one product with a matrix of three dimensions, which the compiler lays out for the attention kernel. A reshaped output
    would be copied.
    """
    if type(linear) is not Linear or not traced_for("tpu"):
        return linear(x_BTD).reshape(*x_BTD.shape[:2], heads, -1)
    y_BTNK = jnp.einsum("btd,dnk->btnk", x_BTD, linear.kernel[...].reshape(x_BTD.shape[-1], heads, -1))
    return y_BTNK if linear.bias is None else y_BTNK + linear.bias[...].reshape(heads, -1)


def _from_heads(linear: nnx.Module, y_BTNK: jax.Array) -> jax.Array:
    """Return the output of a linear layer over all heads, [B, T, D]; see `to_heads`."""
    if type(linear) is not Linear or not traced_for("tpu"):
        return linear(y_BTNK.reshape(*y_BTNK.shape[:2], -1))
    x_BTD = jnp.einsum("btnk,nkd->btd", y_BTNK, linear.kernel[...].reshape(*y_BTNK.shape[2:], -1))
    return x_BTD if linear.bias is None else x_BTD + linear.bias[...]
