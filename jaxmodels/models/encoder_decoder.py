"""The encoder–decoder: the original Transformer (Vaswani et al. 2017), T5 (Raffel et al. 2020), T5 v1.1 (Shazeer 2020) and mT5 (Xue et al. 2021).

Shapes: B batch, S source, T target, D width, N heads, K width of a head, V vocabulary.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmodels.models import cache as cache_lib
from jaxmodels.models.attention import Implementation
from jaxmodels.models.blocks import Block, Norm, apply_blocks, extend_blocks, make_blocks, make_layers, make_norm
from jaxmodels.models.layers import Activation, Embed, Output, check_rate, check_sizes, dropout
from jaxmodels.models.positions import RelativePositions, sinusoids
from jaxmodels.models.remat import Remat

_T5 = {
    "positions": "relative",
    "norm": "rms",
    "epsilon": 1e-6,
    "post_norm": False,
    "activation": "geglu",
    "bias": False,
    "scale_attention": False,
    "scale_embeddings": False,
    "tie_embeddings": False,
    "head_width": 64,
    "dropout": 0.1,
}
# The first T5 has no gates, and one matrix for embedding and output.
_FIRST_T5 = _T5 | {"activation": "relu", "tie_embeddings": True, "scale_outputs": True}
SIZES = {
    "transformer-base": {"layers": 6, "heads": 8, "width": 512, "dropout": 0.1},
    "transformer-big": {"layers": 6, "heads": 16, "width": 1024, "dropout": 0.3},
    "t5-small": {"layers": 6, "heads": 8, "width": 512, **_FIRST_T5},
    "t5-base": {"layers": 12, "heads": 12, "width": 768, **_FIRST_T5},
    "t5-large": {"layers": 24, "heads": 16, "width": 1024, **_FIRST_T5},
    "t5-v1.1-small": {"layers": 8, "heads": 6, "width": 512, "mlp_width": 1024, **_T5},
    "t5-v1.1-base": {"layers": 12, "heads": 12, "width": 768, "mlp_width": 2048, **_T5},
    "t5-v1.1-large": {"layers": 24, "heads": 16, "width": 1024, "mlp_width": 2816, **_T5},
    "t5-v1.1-xl": {"layers": 24, "heads": 32, "width": 2048, "mlp_width": 5120, **_T5},
    "t5-v1.1-xxl": {"layers": 24, "heads": 64, "width": 4096, "mlp_width": 10240, **_T5},
    "mt5-small": {"layers": 8, "heads": 6, "width": 512, "mlp_width": 1024, **_T5},
    "mt5-base": {"layers": 12, "heads": 12, "width": 768, "mlp_width": 2048, **_T5},
    "mt5-large": {"layers": 24, "heads": 16, "width": 1024, "mlp_width": 2816, **_T5},
}


class Side(nnx.Module):
    """The encoder or the decoder: positions, blocks, and a final normalization for pre-norm blocks."""

    def __init__(
        self, width: int, heads: int, *, causal: bool, positions: str, context: int, scan: bool, remat: Remat | tuple[str, ...], rngs: nnx.Rngs, **block
    ):
        init = nnx.initializers.normal(width**-0.5)
        norm, epsilon, bias = block["norm"], block["epsilon"], block["bias"]
        self.positions = Embed(context, width, init=init, name=None, rngs=rngs) if positions == "learned" else None
        relative = positions == "relative"
        # One table for all layers, as in T5. Its initial values are small relative to products of unit variance.
        self.relative = RelativePositions(heads, buckets=32, distance=128, causal=causal, init=init, rngs=rngs) if relative else None
        options = {"causal": causal, "memory": causal, "relative": relative, "init": "fan_in", **block}
        self.blocks = make_blocks(lambda rngs: Block(width, heads, **options, rngs=rngs), block["layers"], scan, rngs)
        self.final_norm = None if block["post_norm"] else make_norm(norm, width, epsilon, bias, rngs)
        self.sinusoidal, self.remat, self.dropout = positions == "sinusoidal", remat, block["dropout"]

    def __call__(self, x_BTD: jax.Array, rngs: nnx.Rngs | None, **shared) -> jax.Array:
        """Return the output of the last block for embeddings, [B, T, D]; `shared` as in `blocks.apply_blocks`."""
        positions = jnp.arange(x_BTD.shape[1])[None]
        x_BTD = self._placed(x_BTD, positions)
        if self.relative is not None:
            shared["bias"] = self.relative(positions, positions)
        x_BTD, _ = apply_blocks(self.blocks, dropout(x_BTD, self.dropout, rngs), rngs, remat=self.remat, **shared)
        return x_BTD if self.final_norm is None else dropout(self.final_norm(x_BTD), self.dropout, rngs)

    def remember(self, memory_BSD: jax.Array) -> list | dict:
        """Return the keys and values of each block's cross-attention: a list, or [L, …] for stacked blocks."""
        if isinstance(self.blocks, nnx.List):
            return [block.memory_attention.remember(memory_BSD) for block in self.blocks]
        graphdef, state = nnx.split(self.blocks)
        return jax.lax.map(lambda state: nnx.merge(graphdef, state).memory_attention.remember(memory_BSD), state)

    def extend(self, x_B1D: jax.Array, cache: dict[str, Any], **shared) -> tuple[jax.Array, list | dict]:
        """Return the output of the last block for the embedding of one token, [B, 1, D], and the layers of the cache; see `models.cache`."""
        slot, layers = cache["slot"], cache["layers"]
        x_B1D = self._placed(x_B1D, (slot - cache["left_padding"])[:, None])
        if self.relative is not None:
            size = jax.tree.leaves(layers)[0].shape[-2]
            shared["bias"] = self.relative(slot[None, None], cache_lib.numbers(slot, size)[None])
        x_B1D, layers = extend_blocks(self.blocks, x_B1D, layers, slot=slot, left_padding=cache["left_padding"], **shared)
        return (x_B1D if self.final_norm is None else self.final_norm(x_B1D)), layers

    def _placed(self, x_BTD, positions):
        """Add absolute positions."""
        if self.positions is not None:
            x_BTD = x_BTD + self.positions(positions)
        if self.sinusoidal:
            x_BTD = x_BTD + sinusoids(positions, x_BTD.shape[-1]).astype(x_BTD.dtype)
        return x_BTD


class EncoderDecoder(nnx.Module):
    """An encoder of a source, and a decoder of the target with cross-attention; by default the original Transformer.

    Named sizes: `transformer-base`, `transformer-big`; and `t5-small` to `-large`, `t5-v1.1-small` to `-xxl` and `mt5-small` to `-large`, which have
    the parameter counts of the released checkpoints.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        context: int = 512,
        layers: int = 4,
        heads: int = 4,
        width: int = 128,
        kv_heads: int | None = None,
        head_width: int | None = None,
        mlp_width: int | None = None,
        positions: Literal["learned", "sinusoidal", "relative", "none"] = "sinusoidal",
        norm: Norm = "layer",
        epsilon: float = 1e-6,
        post_norm: bool = True,
        activation: Activation = "relu",
        bias: bool = True,
        scale_attention: bool = True,
        scale_embeddings: bool = True,
        scale_outputs: bool = False,
        tie_embeddings: bool = True,
        vocab_multiple: int = 1,
        dropout: float = 0.0,
        attention: Implementation = "auto",
        scan: bool = False,
        remat: Remat | tuple[str, ...] = "none",
        rngs: nnx.Rngs,
    ):
        """
        Args:
          vocab_size: V, rows of the embedding that source and target share, and width of the output.
          context: the longest source or target.
          layers: of the encoder, and of the decoder.
          heads, width, kv_heads, head_width, mlp_width: of the blocks, as in `blocks.Block`.
          positions: `learned` and `sinusoidal` are added to the embedding; `relative` adds a bias for each head and range
            of distances to attention's products (Raffel et al. 2020), one table for each side.
          norm: `layer` or `rms`.
          epsilon: of the normalization.
          post_norm: normalize each residual sum, not the inputs of attention and feed-forward.
          activation: `gelu`, `gelu_exact`, `relu`, or gated `swiglu`, `geglu`, `geglu_exact`.
          bias: whether matrices and layer normalizations have a bias.
          scale_attention: divide the products by the square root of the head width (not in T5).
          scale_embeddings: multiply embeddings by the square root of D (not in T5).
          scale_outputs: divide the input of the output matrix by the square root of D (the first T5).
          tie_embeddings: the output matrix is the embedding's.
          vocab_multiple: round the rows of the embedding and the columns of the output up to a multiple of this, with zeros that take no part in
            losses or generation, so that they divide over devices.
          dropout: rate on embeddings and on the residuals of each block; for pre-norm also on the final output of each side (T5).
          attention: its implementation: `auto`, `xla`, `cudnn` or `splash`.
          scan, remat: of the blocks, as in `transformer.Decoder`.
          rngs: draws the initial parameters from its `params` stream.
        """
        check_rate(dropout)
        check_sizes(context=context, layers=layers, heads=heads, width=width, vocab_multiple=vocab_multiple)
        # Embeddings that are scaled up by the square root of D are initialized smaller by that factor.
        embed_init = nnx.initializers.normal(width**-0.5 if tie_embeddings else 1.0)
        self.embed = Embed(vocab_size, width, init=embed_init, multiple=vocab_multiple, rngs=rngs)
        options = {"positions": positions, "context": context, "kv_heads": kv_heads, "head_width": head_width, "mlp_width": mlp_width}
        options |= {"norm": norm, "epsilon": epsilon, "post_norm": post_norm, "activation": activation, "bias": bias, "layers": layers}
        options |= {"scale": None if scale_attention else 1.0, "dropout": dropout, "attention": attention, "scan": scan, "remat": remat}
        self.encoder = Side(width, heads, causal=False, **options, rngs=rngs)
        self.decoder = Side(width, heads, causal=True, **options, rngs=rngs)
        init = nnx.initializers.normal(width**-0.5)
        self.output = None if tie_embeddings else Output(width, vocab_size, init=init, multiple=vocab_multiple, rngs=rngs)
        self.context, self.scale = context, width**0.5 if scale_embeddings else None
        self.output_scale = width**-0.5 if scale_outputs else None

    def __call__(self, source: jax.Array, target: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Return the logits of the token after each token of the target.

        Args:
          source: int [B, S], -1 is padding.
          target: int [B, T], beginning with its start token; -1 is padding, at the end.
          rngs: provides the `dropout` stream; None to evaluate.

        Returns:
          [B, T, V]; logits at t see the source and the target's tokens 0..t.
        """
        return self.decode(target, self.encode(source, rngs=rngs), rngs=rngs)

    def encode(self, source: jax.Array, rngs: nnx.Rngs | None = None) -> dict[str, jax.Array]:
        """Return the encoder output for a source [B, S]: `states` [B, S, D], and `valid` [B, S], the positions that are not padding."""
        valid = source >= 0
        segments = jnp.where(valid, 0, -1)
        return {"states": self.encoder(self._embed(source), rngs, segments=segments, valid=valid), "valid": valid}

    def decode(self, target: jax.Array, memory: dict[str, jax.Array], rngs: nnx.Rngs | None = None) -> jax.Array:
        """Return the logits [B, T, V] of the token after each of `target` [B, T], given the output of `encode`."""
        # Every position of the target attends to the source's tokens, and none to its padding.
        segments = (jnp.zeros(target.shape, jnp.int32), jnp.where(memory["valid"], 0, -1))
        x_BTD = self.decoder(self._embed(target), rngs, memory=memory["states"], memory_segments=segments, valid=target >= 0)
        return self._logits(x_BTD)

    def make_cache(self, source: jax.Array, length: int) -> dict[str, Any]:
        """Return a cache for targets of `length` tokens of a source, int [B, S] with -1 as padding; see `models.cache`."""
        if length > self.context:
            raise ValueError(f"{length} tokens are more than the model's context of {self.context}")
        batch, memory = len(source), self.encode(source)
        layers = make_layers(self.decoder.blocks, batch, length, memory["states"].dtype)
        remembered = {"layers": self.decoder.remember(memory["states"]), "valid": memory["valid"]}
        return {"layers": layers, "memory": remembered, "left_padding": jnp.zeros(batch, jnp.int32), "slot": jnp.zeros((), jnp.int32)}

    def extend(self, tokens: jax.Array, cache: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        """Read one more token of each target, int [B], with -1 for rows that have ended. Return the next logits [B, V] and the cache."""
        memory = cache["memory"]
        x_B1D, layers = self.decoder.extend(
            self._embed(tokens[:, None]), cache, memory=memory["layers"], memory_valid=memory["valid"], valid=tokens[:, None] >= 0
        )
        return self._logits(x_B1D[:, 0]), cache | {"layers": layers, "slot": cache["slot"] + 1}

    def _logits(self, x: jax.Array) -> jax.Array:
        x = x if self.output_scale is None else x * jnp.asarray(self.output_scale, x.dtype)
        return self.embed.attend(x) if self.output is None else self.output(x)

    def _embed(self, tokens: jax.Array) -> jax.Array:
        if tokens.shape[1] > self.context:
            raise ValueError(f"{tokens.shape[1]} tokens are more than the model's context of {self.context}")
        x_BTD = self.embed(tokens)
        return x_BTD if self.scale is None else x_BTD * jnp.asarray(self.scale, x_BTD.dtype)
