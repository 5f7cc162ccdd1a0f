"""The Transformer (Vaswani et al. 2017): its block, and the decoder (GPT-2 and similar models).

The encoder is in `encoder.py`, the encoder–decoder in `encoder_decoder.py`.

Shapes: B batch, T time, D width, N heads, K width of a head, V vocabulary, L layers.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxmodels.models import cache as cache_lib
from jaxmodels.models import remat as remat_lib
from jaxmodels.models.attention import Attention, Implementation
from jaxmodels.models.layers import ACTIVATIONS, GATED, Activation, Embed, check_rate, check_sizes, dropout
from jaxmodels.models.moe import Mixture, MoE, statistics
from jaxmodels.models.positions import RotaryScaling, positions_in, rotary_table, sinusoids
from jaxmodels.models.remat import Remat
from jaxmodels.models.sizes import DECODERS
from jaxmodels.parallel.layout import constrain, gathered, row_major, sum_over_devices
from jaxmodels.parallel.pipeline import over_layers

Norm = Literal["layer", "rms"]

SIZES = DECODERS


def make_norm(kind: Norm, width: int, epsilon: float, bias: bool, rngs: nnx.Rngs) -> nnx.Module:
    """Return a layer normalization (Ba et al. 2016), or a root-mean-square one (Zhang and Sennrich 2019), which has no bias."""
    if kind == "rms":
        return nnx.RMSNorm(width, epsilon=epsilon, rngs=rngs)
    return nnx.LayerNorm(width, epsilon=epsilon, use_bias=bias, rngs=rngs)


class MLP(nnx.Module):
    """Two matrices with an activation function between; with `swiglu` and `geglu` a third one gates (Shazeer 2020)."""

    def __init__(self, width: int, mlp_width: int, *, activation: Activation = "gelu", bias: bool = True, init, out_init, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, use_bias=bias, rngs=rngs)
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
        post_norm: bool = False,
        activation: Activation = "gelu",
        bias: bool = True,
        qkv_bias: bool | None = None,
        query_key_norm: bool = False,
        scale: float | None = None,
        relative: bool = False,
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
          kv_heads, head_width, window, query_key_norm, scale: as in `attention.Attention`.
          norm: `layer` or `rms`.
          epsilon: of the normalization.
          post_norm: normalize the residual sums (Vaswani et al. 2017), not the inputs of attention and feed-forward.
          activation: `gelu` (by tanh, as in GPT-2), `gelu_exact`, `relu`, and the gated `swiglu` and `geglu`.
          bias: whether matrices and layer normalizations have a bias.
          qkv_bias: whether queries, keys and values have a bias. The default is `bias`.
          relative: whether calls pass a bias for the products of self-attention.
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
            # The residual stream of pre-norm blocks is not normalized; GPT-2 scales down the matrices that add to it.
            out = matrix if post_norm else nnx.initializers.normal(0.02 / math.sqrt(2 * layers))
        else:
            matrix = out = nnx.initializers.variance_scaling(1.0, "fan_in", "normal")
            # Without a scale on the products, the queries are initialized smaller.
            unscaled = 1 if scale is None else (head_width or width // heads)
            query = nnx.initializers.variance_scaling(1.0 / unscaled, "fan_in", "normal")
        options = {"kv_heads": kv_heads, "head_width": head_width, "query_key_norm": query_key_norm, "epsilon": epsilon}
        options |= {"bias": bias if qkv_bias is None else qkv_bias, "out_bias": bias, "scale": scale, "implementation": attention}
        options |= {"init": matrix, "query_init": query, "out_init": out, "rngs": rngs}
        self.attention_norm = make_norm(norm, width, epsilon, bias, rngs)
        self.attention = Attention(width, heads, causal=causal, window=window, biased=relative, **options)
        self.memory_norm = make_norm(norm, width, epsilon, bias, rngs) if memory else None
        self.memory_attention = Attention(width, heads, **options) if memory else None
        self.mlp_norm = make_norm(norm, width, epsilon, bias, rngs)
        if mlp is None:
            self.mlp = MLP(width, mlp_width or 4 * width, activation=activation, bias=bias, init=matrix, out_init=out, rngs=rngs)
        else:
            self.mlp = mlp(rngs)
        self.dropout, self.post_norm = dropout, post_norm

    def __call__(
        self,
        x_BTD: jax.Array,
        rngs: nnx.Rngs | None = None,
        *,
        rotary: tuple[jax.Array, jax.Array] | None = None,
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
          rotary: cosines and sines of `positions.rotary_table`.
          segments: int [B, T]; a position sees only those with its own number.
          bias: added to the products of self-attention.
          memory: float [B, S, D], for blocks made with `memory`.
          memory_segments: of x and of the memory, as in `attention.attend`.
          valid: bool [B, T], False at padding; for the feed-forward.

        Returns:
          [B, T, D]; and the dict of the module in the feed-forward's place, if it returns one.
        """
        pair = None if segments is None else (segments, segments)
        x_BTD, _ = self._add(x_BTD, self.attention_norm, lambda x: self.attention(x, rotary=rotary, segments=pair, bias=bias), rngs)
        x_BTD = checkpoint_name(x_BTD, "middle")
        if self.memory_attention is not None:
            x_BTD, _ = self._add(x_BTD, self.memory_norm, lambda x: self.memory_attention(x, memory, segments=memory_segments), rngs)
        x_BTD, aux = self._add(x_BTD, self.mlp_norm, lambda x: self.mlp(x, valid=valid, rngs=rngs), rngs)
        return x_BTD if aux is None else (x_BTD, aux)

    def prefill(self, x_BTD: jax.Array, layer: dict, *, rotary, segments: jax.Array, valid: jax.Array) -> tuple[jax.Array, dict]:
        """Run the block without a memory, and write keys and values into the empty cache `layer`; see `models.cache`."""
        attend = functools.partial(self.attention.prefill, layer=layer, rotary=rotary, segments=(segments, segments))
        x_BTD, layer = self._add(x_BTD, self.attention_norm, attend, None)
        return self._add(x_BTD, self.mlp_norm, lambda x: self.mlp(x, valid=valid), None)[0], layer

    def extend(
        self,
        x_B1D: jax.Array,
        layer: dict,
        slot: jax.Array,
        left_padding: jax.Array,
        *,
        index: jax.Array | None = None,
        rotary=None,
        bias: jax.Array | None = None,
        memory: dict | None = None,
        memory_valid: jax.Array | None = None,
        valid: jax.Array | None = None,
    ) -> tuple[jax.Array, dict]:
        """Run the block on one token; arguments as in `attention.Attention.extend`, and `read` for the memory. Return [B, 1, D] and the cache layer."""
        attend = functools.partial(self.attention.extend, layer=layer, slot=slot, left_padding_B=left_padding, index=index, rotary=rotary, bias=bias)
        x_B1D, layer = self._add(x_B1D, self.attention_norm, attend, None)
        if self.memory_attention is not None:
            x_B1D, _ = self._add(x_B1D, self.memory_norm, lambda x: self.memory_attention.read(x, memory, memory_valid), None)
        return self._add(x_B1D, self.mlp_norm, lambda x: self.mlp(x, valid=valid), None)[0], layer

    def make_layer(self, batch: int, length: int, dtype: Any) -> dict:
        """Return an empty layer of a cache."""
        a = self.attention
        return cache_lib.make_layer(batch, length, a.kv_heads, a.head_width, a.window, dtype)

    def _add(self, x_BTD, norm, function, rngs):
        change = function(x_BTD if self.post_norm else norm(x_BTD))
        change, aux = change if isinstance(change, tuple) else (change, None)
        x_BTD = row_major(constrain(x_BTD + dropout(change, self.dropout, rngs), "batch", "sequence", None))
        return norm(x_BTD) if self.post_norm else x_BTD, aux


def make_blocks(make: Callable[[nnx.Rngs], nnx.Module], layers: int, scan: bool, rngs: nnx.Rngs) -> nnx.Module:
    """Return a list of `layers` blocks; with `scan`, one module with the parameters of all blocks stacked, [L, ...]."""
    return nnx.vmap(make)(rngs.split(layers)) if scan else nnx.List([make(rngs) for _ in range(layers)])


def apply_blocks(
    blocks: nnx.Module, x_BTD: jax.Array, rngs: nnx.Rngs | None, *, remat: Remat | tuple[str, ...] = "none", offload: tuple[str, ...] = (), **shared: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Run blocks one after the other: a list is unrolled, and stacked ones are looped over.

    Each block draws dropout from a key of its own, so that scanned, unrolled and rematerialised blocks give the same result.

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
        result = block(x_BTD, None if key is None else nnx.Rngs(dropout=key), **shared)
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


def make_layers(blocks: nnx.Module, batch: int, length: int, dtype: Any) -> list | dict:
    """Return the empty layers of a cache for blocks of `make_blocks`."""
    if isinstance(blocks, nnx.List):
        return [block.make_layer(batch, length, dtype) for block in blocks]
    layers = jax.tree.leaves(nnx.split(blocks)[1])[0].shape[0]
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (layers, *x.shape)), blocks.make_layer(batch, length, dtype))


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
    blocks: nnx.Module, x_B1D: jax.Array, layers: list | dict, *, memory: list | dict | None = None, **shared: Any
) -> tuple[jax.Array, list | dict]:
    """Run blocks one after the other on one token of every row. Return the output of the last one, and the layers of the cache.

    Stacked layers are the carry of the loop and are written in place. As inputs and outputs of the loop they would be copied.
    """
    if isinstance(blocks, nnx.List):
        after = []
        for i, (block, layer) in enumerate(zip(blocks, layers, strict=True)):
            x_B1D, layer = block.extend(x_B1D, layer, memory=None if memory is None else memory[i], **shared)
            after.append(layer)
        return x_B1D, after
    graphdef, state = nnx.split(blocks)

    def one(carry, of):
        state, index, memory = of
        return nnx.merge(graphdef, state).extend(*carry, index=index, memory=memory, **shared), None

    count = jax.tree.leaves(state)[0].shape[0]
    return jax.lax.scan(one, (x_B1D, layers), (state, jnp.arange(count), memory))[0]


class Decoder(nnx.Module):
    """A language model: causal blocks over token embeddings, by default those of GPT-2 (Radford et al. 2019).

    Named sizes (`gpt2`, …) have the published parameter counts.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        context: int = 1024,
        layers: int = 4,
        heads: int = 4,
        width: int = 128,
        kv_heads: int | None = None,
        head_width: int | None = None,
        mlp_width: int | None = None,
        positions: Literal["learned", "rotary", "sinusoidal", "none"] = "learned",
        rotary_base: float = 10000.0,
        rotary_scaling: RotaryScaling | None = None,
        window: int | None = None,
        norm: Norm = "layer",
        epsilon: float = 1e-5,
        post_norm: bool = False,
        activation: Activation = "gelu",
        bias: bool = True,
        qkv_bias: bool | None = None,
        query_key_norm: bool = False,
        moe: Mixture | None = None,
        dropout: float = 0.0,
        tie_embeddings: bool = True,
        attention: Implementation = "auto",
        scan: bool = False,
        remat: Remat | tuple[str, ...] = "none",
        offload: tuple[str, ...] = (),
        rngs: nnx.Rngs,
    ):
        """
        Args:
          vocab_size: V, rows of the embedding and width of the output.
          context: the longest sequence; rows of the table of learned positions.
          layers, heads, width: L, N and D; N must divide D unless `head_width` is given.
          kv_heads: heads of keys and values, each for several query heads (Ainslie et al. 2023). The default is N.
          head_width: K. The default is D / N.
          mlp_width: hidden width of the feed-forward. The default is 4 D.
          positions: `learned` and `sinusoidal` are added to the embedding, `rotary` rotates queries and keys (Su et al. 2021).
          rotary_base: of the wavelengths of `rotary`.
          rotary_scaling: for contexts longer than that of pretraining.
          window: number of last positions that a position sees (Jiang et al. 2023).
          norm: `layer` or `rms`.
          epsilon: of the normalization.
          post_norm: normalize each residual sum, not the inputs of attention and feed-forward.
          activation: `gelu`, `gelu_exact`, `relu`, or gated `swiglu`, `geglu`.
          bias: whether matrices and layer normalizations have a bias.
          qkv_bias: whether queries, keys and values have a bias. The default is `bias`.
          query_key_norm: whether queries and keys are normalized (Qwen 3).
          moe: each feed-forward is a mixture of experts, each of width `mlp_width`: `{"experts": 8, "top_k": 2}`.
          dropout: rate on the embedding and on the residuals of each block.
          tie_embeddings: the output matrix is the token embedding's (Press and Wolf 2017).
          attention: its implementation: `auto`, `xla`, `cudnn` or `splash`.
          scan: stack the blocks' parameters, [L, ...], and loop over them: compiling takes the time of
            one block for any number of layers.
          remat: what the backward pass recomputes of each block: `none`, `full` (all),
            `dots` (all but matrix products), `dots_no_batch` (all but matrix products with parameters); or the names of
            saved activations, of `remat.NAMES`.
          offload: names of activations that are offloaded to host memory until the backward pass.
          rngs: draws the initial parameters from its `params` stream.
        """
        check_rate(dropout)
        check_sizes(context=context, layers=layers, heads=heads, width=width)
        if rotary_scaling is not None and positions != "rotary":
            raise ValueError(f"rotary_scaling has no meaning for positions={positions!r}")
        init = nnx.initializers.normal(0.02)
        self.embed = Embed(vocab_size, width, init=init, rngs=rngs)
        self.positions = Embed(context, width, init=init, name=None, rngs=rngs) if positions == "learned" else None
        self.final_norm = None if post_norm else make_norm(norm, width, epsilon, bias, rngs)
        self.output = None if tie_embeddings else nnx.Linear(width, vocab_size, use_bias=False, kernel_init=init, rngs=rngs)
        options = {"kv_heads": kv_heads, "head_width": head_width, "mlp_width": mlp_width, "window": window, "norm": norm}
        options |= {"epsilon": epsilon, "post_norm": post_norm, "activation": activation, "bias": bias, "qkv_bias": qkv_bias}
        options |= {"query_key_norm": query_key_norm, "attention": attention, "dropout": dropout, "layers": layers}
        self.mixture = Mixture(**moe) if isinstance(moe, Mapping) else moe
        if moe is not None:
            mixture = dataclasses.asdict(self.mixture)
            out_init = init if post_norm else nnx.initializers.normal(0.02 / math.sqrt(2 * layers))
            options["mlp"] = lambda rngs: MoE(width, mlp_width or 4 * width, activation=activation, out_init=out_init, rngs=rngs, **mixture)
        self.blocks = make_blocks(lambda rngs: Block(width, heads, **options, rngs=rngs), layers, scan, rngs)
        self.rotary = None
        if positions == "rotary":
            scaling = RotaryScaling(**rotary_scaling) if isinstance(rotary_scaling, Mapping) else rotary_scaling
            self.rotary = (head_width or width // heads, rotary_base, scaling)
        self.sinusoidal = positions == "sinusoidal"
        self.context, self.layers, self.dropout = context, layers, dropout
        remat_lib.check(remat, offload)
        self.remat, self.offload = remat if isinstance(remat, str) else tuple(remat), tuple(offload)

    def __call__(self, tokens: jax.Array, *, segments: jax.Array | None = None, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Return the logits of the token after each token.

        Args:
          tokens: int [B, T], T at most `context`; -1 is padding, at the end.
          segments: int [B, T] for rows of several packed texts: each attends only to itself, from position 0.
          rngs: provides the `dropout` stream; None to evaluate.

        Returns:
          [B, T, V]; those at t see tokens 0..t.
        """
        return self.with_auxiliary(tokens, segments=segments, rngs=rngs)[0]

    def with_auxiliary(self, tokens: jax.Array, *, segments: jax.Array | None = None, rngs: nnx.Rngs | None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return logits, and the statistics of mixtures of experts ({} for dense blocks).

        Of these, `loss` is the sum over layers; all others are the mean.
        """
        x_BTD, told = self.features(tokens, segments=segments, rngs=rngs)
        return constrain(self._logits(x_BTD), "rows", "sequence", "vocab"), told

    def features(self, tokens: jax.Array, *, segments: jax.Array | None = None, rngs: nnx.Rngs | None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the final hidden states [B, T, D] and the statistics: `with_auxiliary` without the output layer, `head`."""
        T = tokens.shape[1]
        if T > self.context:
            raise ValueError(f"{T} tokens are more than the model's context of {self.context}")
        valid = tokens >= 0
        x_BTD, rotary = self._enter(tokens, jnp.arange(T)[None] if segments is None else positions_in(segments))
        shared = {"rotary": rotary, "valid": valid}
        if segments is not None:  # without segments, no token sees the padding after it
            shared["segments"] = jnp.where(valid, segments, -1)
        x_BTD, sums = apply_blocks(self.blocks, dropout(x_BTD, self.dropout, rngs), rngs, remat=self.remat, offload=self.offload, **shared)
        if self.mixture is None:
            return x_BTD, {}
        told = jax.vmap(lambda sums: statistics(sums, self.mixture))(sum_over_devices(sums))
        return x_BTD, {name: values.sum(0) if name == "loss" else values.mean(0) for name, values in told.items()}

    def head(self) -> Callable[[jax.Array], jax.Array]:
        """Map features [B, T, D] to logits [B, T, V]. For several calls on parts: the matrix is gathered once, and gradients add up in float32."""
        plain = self.output is None or (type(self.output) is nnx.Linear and self.output.bias is None)
        if not plain:
            return lambda x_BTD: constrain(self._logits(x_BTD), "rows", "sequence", "vocab")
        matrix, names = (self.embed.embedding[...], ("vocab", "embed")) if self.output is None else (self.output.kernel[...], ("embed", "vocab"))
        whole = gathered(matrix, *names).astype(jnp.float32)

        def logits(x_BTD):
            x_BTD = x_BTD if self.final_norm is None else self.final_norm(x_BTD)
            products = jax.lax.dot_general(x_BTD, whole.astype(matrix.dtype), (((2,), (names.index("embed"),)), ((), ())))
            return constrain(products, "rows", "sequence", "vocab")

        return logits

    def make_cache(self, batch: int, length: int, dtype: Any = jnp.float32) -> dict[str, Any]:
        """Return an empty cache for `batch` rows of `length` tokens; see `models.cache`."""
        layers = make_layers(self.blocks, batch, length, dtype)
        return {"layers": layers, "left_padding": jnp.zeros(batch, jnp.int32), "slot": jnp.zeros((), jnp.int32)}

    def prefill(self, tokens: jax.Array, cache: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        """Return the next logits [B, V] after prompts `tokens`, int [B, P] padded with -1 on the left, and the cache with them."""
        valid = tokens >= 0
        left_padding = jnp.argmax(valid, axis=1).astype(jnp.int32)
        x_BTD, rotary = self._enter(tokens, jnp.maximum(jnp.arange(tokens.shape[1])[None] - left_padding[:, None], 0))
        x_BTD, layers = prefill_blocks(self.blocks, x_BTD, cache["layers"], rotary=rotary, segments=jnp.where(valid, 0, -1), valid=valid)
        logits = constrain(self._logits(x_BTD[:, -1]), "rows", "vocab")
        return logits, {"layers": layers, "left_padding": left_padding, "slot": jnp.asarray(tokens.shape[1], jnp.int32)}

    def extend(self, tokens: jax.Array, cache: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        """Read one more token of each row, int [B], with -1 for rows that have ended. Return the next logits [B, V] and the cache."""
        slot, left_padding = cache["slot"], cache["left_padding"]
        x_B1D, rotary = self._enter(tokens[:, None], (slot - left_padding)[:, None])
        x_B1D, layers = extend_blocks(self.blocks, x_B1D, cache["layers"], slot=slot, left_padding=left_padding, rotary=rotary, valid=tokens[:, None] >= 0)
        logits = constrain(self._logits(x_B1D[:, 0]), "rows", "vocab")
        return logits, {"layers": layers, "left_padding": left_padding, "slot": slot + 1}

    def _enter(self, tokens, positions):
        """Return the input of the blocks, [B, T, D], and the rotary table."""
        x_BTD = self.embed(tokens)
        if self.positions is not None:
            x_BTD = x_BTD + self.positions(positions)
        if self.sinusoidal:
            x_BTD = x_BTD + sinusoids(positions, x_BTD.shape[-1]).astype(x_BTD.dtype)
        return x_BTD, None if self.rotary is None else rotary_table(positions, *self.rotary)

    def _logits(self, x):
        x = x if self.final_norm is None else self.final_norm(x)
        return self.embed.attend(x) if self.output is None else self.output(x)
