"""Transformer blocks (Vaswani et al. 2017), and functions that run a list or a stack of them.

Shapes: B batch, T time, D width, N heads, K width of a head, L layers.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxmodels.models import cache as cache_lib
from jaxmodels.models import remat as remat_lib
from jaxmodels.models.attention import Attention, Implementation, QueryKeyNorm
from jaxmodels.models.functional import new_rngs
from jaxmodels.models.layers import ACTIVATIONS, GATED, Activation, Linear, RMSNormPlusOne, dropout
from jaxmodels.models.normalization import LayerNorm, RMSNorm
from jaxmodels.models.remat import Remat
from jaxmodels.parallel.layout import constrain, row_major
from jaxmodels.parallel.pipeline import over_layers

Norm = Literal["layer", "rms", "rms_plus_one"]
Rotary = Mapping[str, tuple[jax.Array, jax.Array]]  # tables of rotary positions by name


def make_norm(kind: Norm, width: int, epsilon: float, bias: bool, rngs: nnx.Rngs) -> nnx.Module:
    """Return a layer normalization (Ba et al. 2016), or a root-mean-square one (Zhang and Sennrich 2019), which has no bias.

    With `rms_plus_one`, what is trained and stored is how much its factor differs from 1.
    """
    if kind == "rms_plus_one":
        return RMSNormPlusOne(width, epsilon=epsilon)
    if kind == "rms":
        return RMSNorm(width, epsilon=epsilon, rngs=rngs)
    return LayerNorm(width, epsilon=epsilon, use_bias=bias, rngs=rngs)


def residual_init(post_norm: bool, layers: int) -> Callable:
    """Return the initializer of matrices whose products are added to the residual stream: normal with a deviation of 0.02.

    The residual stream of pre-norm blocks is not normalized, so GPT-2 divides the deviation by the root of the number of residuals, 2 × layers.
    """
    return nnx.initializers.normal(0.02 if post_norm else 0.02 / math.sqrt(2 * layers))


class MLP(nnx.Module):
    """Two matrices with an activation function between; with `swiglu`, `geglu` and `geglu_exact` a third one gates (Shazeer 2020)."""

    def __init__(self, width: int, mlp_width: int, *, activation: Activation = "gelu", bias: bool = True, init, out_init, rngs: nnx.Rngs):
        linear = functools.partial(Linear, use_bias=bias, rngs=rngs)
        self.up = linear(width, mlp_width, kernel_init=init)
        self.gate = linear(width, mlp_width, kernel_init=init) if activation in GATED else None
        self.down = linear(mlp_width, width, kernel_init=out_init)
        self.activation = activation

    def __call__(self, x_BTD: jax.Array, *, valid: jax.Array | None = None, rngs: nnx.Rngs | None = None) -> jax.Array:
        """x: [B, T, D]. Return the same shape. `valid` and `rngs` are unused; modules in its place may use them."""
        activate = ACTIVATIONS[self.activation]
        up = checkpoint_name(self.up(x_BTD), "up")
        hidden = activate(up) if self.gate is None else activate(checkpoint_name(self.gate(x_BTD), "gate")) * up
        return self.down(checkpoint_name(constrain(hidden, "batch", "sequence", "mlp"), "hidden"))


class Block(nnx.Module):
    """Attention and a feed-forward, each with a residual connection; between them cross-attention, in a decoder with a memory."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        mlp_width: int | None = None,
        causal: bool = True,
        dropout: float,
        layers: int,
        kv_heads: int | None = None,
        head_width: int | None = None,
        window: int | None = None,
        norm: Norm = "layer",
        epsilon: float = 1e-5,
        input_norm: bool = True,
        attention_input_norm: bool = True,
        output_norm: bool = False,
        post_norm: bool = False,
        activation: Activation = "gelu",
        bias: bool = True,
        qkv_bias: bool | None = None,
        mlp_bias: bool | None = None,
        query_key_norm: QueryKeyNorm = False,
        scale: float | None = None,
        cap: float | None = None,
        residual_scale: float = 1.0,
        rotary: str = "global",
        relative: bool = False,
        attention_type: type[Attention] = Attention,
        memory: bool = False,
        attention: Implementation = "auto",
        init: Literal["normal", "fan_in"] = "normal",
        mlp: Callable[[nnx.Rngs], nnx.Module] | None = None,
        rngs: nnx.Rngs,
    ):
        """
        Args:
          width, heads: D and N.
          mlp_width: hidden width of the feed-forward. The default is 4 D.
          causal: position t sees positions 0..t.
          dropout: rate on the residuals.
          layers: number of blocks in the model.
          norm, epsilon: kind and epsilon of the normalizations, as in `make_norm`.
          input_norm: normalize the inputs of attention and feed-forward.
          attention_input_norm: whether that holds for attention too; not in a block whose input is normalized already.
          output_norm: normalize what they return, before it is added to the residual stream (Gemma 2, OLMo 2).
          post_norm: normalize the residual sums (Vaswani et al. 2017), not the inputs.
          activation: `gelu` (by tanh, as in GPT-2), `gelu_exact`, `relu`, and the gated `swiglu`, `geglu` and `geglu_exact`.
          bias: whether matrices and layer normalizations have a bias.
          kv_heads, head_width, window, query_key_norm, scale, cap: as in `attention.Attention`.
          residual_scale: factor on what attention and feed-forward add to the residual stream.
          qkv_bias, mlp_bias: whether queries, keys and values, and the feed-forward have a bias. The default is `bias`.
          rotary: name of its table of rotary positions, if calls pass any.
          relative: whether calls pass a bias for the products of self-attention.
          attention_type: of self-attention; a type of another kind, such as `disentangled.DisentangledAttention`, says what it makes of the bias.
          memory: whether the block has cross-attention.
          attention: its implementation, as in `attention.attend`.
          init: of the matrices: `normal` with a deviation of 0.02 (GPT-2, BERT), or by `fan_in` (T5).
          mlp: constructor of a module in the feed-forward's place. It is called as `mlp(x, valid=…, rngs=…)` with [B, T, D],
            bool [B, T] (None: no padding) and `nnx.Rngs`, and returns [B, T, D], or that and a dict of arrays, sums
            over tokens, which the block then returns too.
          rngs: draws the initial parameters from its `params` stream.
        """
        if init == "normal":
            matrix = query = nnx.initializers.normal(0.02)
            out = residual_init(post_norm, layers)
        else:
            matrix = out = nnx.initializers.variance_scaling(1.0, "fan_in", "normal")
            # Without a scale on the products, the queries are initialized smaller.
            unscaled = 1 if scale is None else (head_width or width // heads)
            query = nnx.initializers.variance_scaling(1.0 / unscaled, "fan_in", "normal")
        options = {"kv_heads": kv_heads, "head_width": head_width, "query_key_norm": query_key_norm, "cap": cap}
        options["make_norm"] = lambda width: make_norm("rms" if norm == "layer" else norm, width, epsilon, False, rngs)
        options |= {"bias": bias if qkv_bias is None else qkv_bias, "out_bias": bias, "scale": scale, "implementation": attention}
        options |= {"init": matrix, "query_init": query, "out_init": out, "rngs": rngs}

        def normalization(wanted: bool) -> nnx.Module | None:
            return make_norm(norm, width, epsilon, bias, rngs) if wanted else None

        self.attention_norm = normalization((input_norm and attention_input_norm) or post_norm)
        self.attention = attention_type(width, heads, causal=causal, window=window, biased=relative, **options)
        self.attention_output_norm = normalization(output_norm)
        self.memory_norm = normalization(memory)
        self.memory_attention = Attention(width, heads, **options) if memory else None
        self.mlp_norm = normalization(input_norm or post_norm)
        if mlp is None:
            mlp_bias = bias if mlp_bias is None else mlp_bias
            self.mlp = MLP(width, mlp_width or 4 * width, activation=activation, bias=mlp_bias, init=matrix, out_init=out, rngs=rngs)
        else:
            self.mlp = mlp(rngs)
        self.mlp_output_norm = normalization(output_norm)
        self.rotary = rotary
        self.dropout, self.post_norm, self.residual_scale = dropout, post_norm, residual_scale

    def __call__(
        self,
        x_BTD: jax.Array,
        rngs: nnx.Rngs | None = None,
        *,
        rotary: Rotary | None = None,
        segments: jax.Array | None = None,
        bias: jax.Array | None = None,
        memory: jax.Array | None = None,
        memory_segments: tuple[jax.Array, jax.Array] | None = None,
        valid: jax.Array | None = None,
    ):
        """Run the block.

        Args:
          x_BTD: float [B, T, D].
          rngs: provides the `dropout` stream; None to evaluate.
          rotary: cosines and sines of `positions.rotary_table` by name; a block whose name is missing rotates nothing.
          segments: int [B, T]; a position sees only those with its own number.
          bias: added to the products of self-attention, or what its type makes of it.
          memory: float [B, S, D], for blocks made with `memory`.
          memory_segments: of x and of the memory, as in `attention.attend`.
          valid: bool [B, T], False at padding; for the feed-forward.

        Returns:
          [B, T, D]; and the dict of the module in the feed-forward's place, if it returns one.
        """
        pair = None if segments is None else (segments, segments)
        attend = functools.partial(self.attention, rotary=self._rotary(rotary), segments=pair, bias=bias)
        x_BTD, _ = self._add(x_BTD, self.attention_norm, attend, rngs, self.attention_output_norm)
        x_BTD = checkpoint_name(x_BTD, "middle")
        if self.memory_attention is not None:
            x_BTD, _ = self._add(x_BTD, self.memory_norm, lambda x: self.memory_attention(x, memory, segments=memory_segments), rngs)
        x_BTD, aux = self._add(x_BTD, self.mlp_norm, lambda x: self.mlp(x, valid=valid, rngs=rngs), rngs, self.mlp_output_norm)
        return x_BTD if aux is None else (x_BTD, aux)

    def prefill(
        self, x_BTD: jax.Array, layer: dict, *, rotary: Rotary | None, segments: jax.Array, valid: jax.Array, slot: jax.Array | None = None
    ) -> tuple[jax.Array, dict]:
        """Run the block without a memory, and write keys and values into the cache `layer`; see `models.cache`, and its `fill` for `slot`."""
        attend = functools.partial(self.attention.prefill, layer=layer, rotary=self._rotary(rotary), segments=(segments, segments), slot=slot)
        x_BTD, layer = self._add(x_BTD, self.attention_norm, attend, None, self.attention_output_norm)
        return self._add(x_BTD, self.mlp_norm, lambda x: self.mlp(x, valid=valid), None, self.mlp_output_norm)[0], layer

    def extend(
        self,
        x_BTD: jax.Array,
        layer: dict,
        slot: jax.Array,
        left_padding: jax.Array,
        *,
        index: jax.Array | None = None,
        rotary: Rotary | None = None,
        bias: jax.Array | None = None,
        memory: dict | None = None,
        memory_valid: jax.Array | None = None,
        valid: jax.Array | None = None,
    ) -> tuple[jax.Array, dict]:
        """Run the block on one token, or on T without a memory; arguments as in `attention.Attention.extend`, and `read` for the memory.

        Return [B, T, D] and the cache layer.
        """
        attend = functools.partial(self.attention.extend, layer=layer, slot=slot, left_padding_B=left_padding, index=index, bias=bias)
        attend = functools.partial(attend, rotary=self._rotary(rotary))
        x_BTD, layer = self._add(x_BTD, self.attention_norm, attend, None, self.attention_output_norm)
        if self.memory_attention is not None:
            x_BTD, _ = self._add(x_BTD, self.memory_norm, lambda x: self.memory_attention.read(x, memory, memory_valid), None)
        return self._add(x_BTD, self.mlp_norm, lambda x: self.mlp(x, valid=valid), None, self.mlp_output_norm)[0], layer

    def make_layer(self, batch: int, length: int, dtype: Any, whole: bool = False) -> dict:
        """Return an empty layer of a cache; with `whole`, one of `length` slots in spite of a window."""
        a = self.attention
        return cache_lib.make_layer(batch, length, a.kv_heads, a.head_width, None if whole else a.window, dtype)

    def _rotary(self, tables: Rotary | None) -> tuple[jax.Array, jax.Array] | None:
        return None if tables is None else tables.get(self.rotary)

    def _add(self, x_BTD, norm, function, rngs, output_norm=None):
        change = function(x_BTD if self.post_norm or norm is None else norm(x_BTD))
        change, aux = change if isinstance(change, tuple) else (change, None)
        change = change if output_norm is None else output_norm(change)
        change = change if self.residual_scale == 1.0 else change * jnp.asarray(self.residual_scale, change.dtype)
        x_BTD = row_major(constrain(x_BTD + dropout(change, self.dropout, rngs), "batch", "sequence", None))
        return norm(x_BTD) if self.post_norm else x_BTD, aux


def make_blocks(make: Callable[..., nnx.Module], layers: int, scan: bool, rngs: nnx.Rngs, differ: Sequence[Mapping[str, Any]] = ({},)) -> nnx.Module:
    """Return a list of `layers` blocks; with `scan`, one module with the parameters of all blocks stacked, [L, ...].

    Args:
      make: called as make(rngs, **options).
      layers, scan: as above.
      rngs: of the initial parameters.
      differ: options of the first layers, which repeat for those after.

    Raises:
      ValueError: `scan` with layers that differ.
    """
    differ = [differ[i % len(differ)] for i in range(layers)]
    if not scan:
        return nnx.List([make(rngs, **options) for options in differ])
    if any(options != differ[0] for options in differ):
        raise ValueError("scan=True loops over blocks that are alike, and those of this model differ (layer_types, embedding_norm); use scan=False")
    return nnx.vmap(lambda rngs: make(rngs, **differ[0]))(rngs.split(layers))


def apply_blocks(
    blocks: nnx.Module, x_BTD: jax.Array, rngs: nnx.Rngs | None, *, remat: Remat | tuple[str, ...] = "none", offload: tuple[str, ...] = (), **shared: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Run blocks one after the other: a list is unrolled, and stacked ones are looped over.

    Each block has its own dropout key, so that scanned, unrolled and rematerialised blocks give the same result.

    Args:
      blocks: from `make_blocks`.
      x_BTD: input of the first block.
      rngs: provides the `dropout` stream; None to evaluate.
      remat: what the backward pass recomputes: `none`; `full`, all but each block's input;
        `dots`, all but that and the results of matrix products; `dots_no_batch` saves only those with parameters; or the names, of
        `remat.NAMES`, of what is saved.
      offload: names of activations that are offloaded to host memory.
      shared: further arguments of every block.

    Returns:
      The output of the last block, and the blocks' statistics, stacked over the blocks that return any: {} for dense ones.
    """
    remat_lib.check(remat, offload)
    x_BTD = constrain(x_BTD, "batch", "sequence", None)
    scan = not isinstance(blocks, nnx.List)
    state = nnx.split(blocks)[1] if scan else None
    layers = jax.tree.leaves(state)[0].shape[0] if scan else len(blocks)
    keys = None if rngs is None else jax.random.split(rngs.dropout(), layers)

    def apply(x_BTD, block_state, key, shared, graphdef):
        block = nnx.merge(graphdef, block_state)
        x_BTD = checkpoint_name(row_major(x_BTD), "input")
        result = block(x_BTD, None if key is None else new_rngs(dropout=key), **shared)
        return result if isinstance(result, tuple) else (result, {})

    apply = remat_lib.checkpointed(apply, remat, offload, scan=scan, static_argnums=4)
    if scan:
        graphdef = nnx.split(blocks)[0]

        def loop(x_BTD, state, keys, shared):
            return jax.lax.scan(lambda x, layer: apply(x, *layer, shared, graphdef), x_BTD, (state, keys))

        return over_layers(loop, state, keys, x_BTD, shared)
    collected: dict[str, list] = {}
    for i, block in enumerate(blocks):
        graphdef, state = nnx.split(block)
        x_BTD, aux = apply(x_BTD, state, None if keys is None else keys[i], shared, graphdef)
        for name, value in aux.items():
            collected.setdefault(name, []).append(value)
    return x_BTD, {name: jnp.stack(values) for name, values in collected.items()}


def make_layers(blocks: nnx.Module, batch: int, length: int, dtype: Any, whole: bool = False) -> list | dict:
    """Return the empty layers of a cache for blocks of `make_blocks`; `whole` as in `Block.make_layer`."""
    if isinstance(blocks, nnx.List):
        return [block.make_layer(batch, length, dtype, whole) for block in blocks]
    layers = jax.tree.leaves(nnx.split(blocks)[1])[0].shape[0]
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (layers, *x.shape)), blocks.make_layer(batch, length, dtype, whole))


def prefill_blocks(blocks: nnx.Module, x_BTD: jax.Array, layers: list | dict, **shared: Any) -> tuple[jax.Array, list | dict]:
    """Run blocks one after the other on prompts. Return the output of the last one, and the layers with their keys and values."""
    x_BTD = constrain(x_BTD, "batch", "sequence", None)
    if isinstance(blocks, nnx.List):
        filled = []
        for block, layer in zip(blocks, layers, strict=True):
            x_BTD, layer = block.prefill(x_BTD, layer, **shared)
            filled.append(layer)
        return x_BTD, filled
    graphdef, state = nnx.split(blocks)
    return jax.lax.scan(lambda x, of: nnx.merge(graphdef, of[0]).prefill(x, of[1], **shared), x_BTD, (state, layers))


def extend_blocks(
    blocks: nnx.Module, x_BTD: jax.Array, layers: list | dict, *, memory: list | dict | None = None, **shared: Any
) -> tuple[jax.Array, list | dict]:
    """Run blocks one after the other on one token of every row, or more; see `Block.extend`. Return the output of the last one, and the layers of the cache.

    Stacked layers are the carry of the loop and are written in place. As inputs and outputs of the loop they would be copied.
    """
    if isinstance(blocks, nnx.List):
        after = []
        for i, (block, layer) in enumerate(zip(blocks, layers, strict=True)):
            x_BTD, layer = block.extend(x_BTD, layer, memory=None if memory is None else memory[i], **shared)
            after.append(layer)
        return x_BTD, after
    graphdef, state = nnx.split(blocks)

    def one(carry, of):
        state, index, memory = of
        return nnx.merge(graphdef, state).extend(*carry, index=index, memory=memory, **shared), None

    count = jax.tree.leaves(state)[0].shape[0]
    return jax.lax.scan(one, (x_BTD, layers), (state, jnp.arange(count), memory))[0]
