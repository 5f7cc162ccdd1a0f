"""The Transformer encoder, by default BERT's (Devlin et al. 2019), with a head.

Shapes: B batch, T time, D width, V vocabulary.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmodels.models.attention import Attention, Implementation
from jaxmodels.models.blocks import Block, Norm, apply_blocks, make_blocks, make_norm
from jaxmodels.models.disentangled import DisentangledAttention, Distances
from jaxmodels.models.layer_types import LayerType, RotaryTables, differing
from jaxmodels.models.layers import ACTIVATIONS, GATED, Activation, Embed, Linear, check_rate, check_sizes, dropout
from jaxmodels.models.positions import positions_in, sinusoids
from jaxmodels.models.remat import Remat

_ROBERTA = {"position_offset": 2, "types": 1, "epsilon": 1e-5}
_MODERNBERT = {
    "context": 8192,
    "types": 0,
    "dropout": 0.0,
    "positions": "rotary",
    "rotary_base": 160000.0,
    "local_rotary_base": 10000.0,
    "window": 65,
    "layer_types": ("global", "local", "local"),
    "epsilon": 1e-5,
    "post_norm": False,
    "embedding_norm": True,
    "activation": "geglu_exact",
    "bias": False,
    "head_activation": "gelu_exact",
    "head_norm": True,
}
_DEBERTA = {"positions": "disentangled", "types": 0, "epsilon": 1e-7, "head_activation": "gelu_exact"}
_DISTILBERT = {"types": 0, "head_activation": "relu"}

# BERT's small models are those of Turc et al. 2019. DistilBERT: Sanh et al. 2019; DeBERTa-v3: He et al. 2023; ModernBERT: Warner et al. 2024.
SIZES = {
    "bert-tiny": {"layers": 2, "heads": 2, "width": 128},
    "bert-mini": {"layers": 4, "heads": 4, "width": 256},
    "bert-small": {"layers": 4, "heads": 8, "width": 512},
    "bert-medium": {"layers": 8, "heads": 8, "width": 512},
    "bert-base": {"layers": 12, "heads": 12, "width": 768},
    "bert-large": {"layers": 24, "heads": 16, "width": 1024},
    "roberta-base": {"layers": 12, "heads": 12, "width": 768, **_ROBERTA},
    "roberta-large": {"layers": 24, "heads": 16, "width": 1024, **_ROBERTA},
    "distilbert-base": {"layers": 6, "heads": 12, "width": 768, **_DISTILBERT},
    "deberta-v3-xsmall": {"layers": 12, "heads": 6, "width": 384, **_DEBERTA},
    "deberta-v3-small": {"layers": 6, "heads": 12, "width": 768, **_DEBERTA},
    "deberta-v3-base": {"layers": 12, "heads": 12, "width": 768, **_DEBERTA},
    "deberta-v3-large": {"layers": 24, "heads": 16, "width": 1024, **_DEBERTA},
    "modernbert-base": {"layers": 22, "heads": 12, "width": 768, "mlp_width": 1152, **_MODERNBERT},
    "modernbert-large": {"layers": 28, "heads": 16, "width": 1024, "mlp_width": 2624, **_MODERNBERT},
}
SIZES = {name: {"context": 512, "types": 2, "dropout": 0.1, **size} for name, size in SIZES.items()}

HeadActivation = Literal["tanh", "relu", "gelu", "gelu_exact"]


class Head(nnx.Module):
    """The output of an encoder for a sequence (`class`, `value`) or for each token (`tokens`, `tags`)."""

    def __init__(
        self,
        kind: str,
        size: int,
        width: int,
        *,
        pool: str,
        dropout: float,
        activation: Activation,
        head_activation: HeadActivation,
        head_norm: bool,
        bias: bool,
        norm: Norm,
        epsilon: float,
        rngs: nnx.Rngs,
    ):
        """`activation` is the feed-forward's, also used for scores of tokens; `head_activation` that of other heads. `bias` is read with `head_norm`."""
        init = nnx.initializers.normal(0.02)
        if kind not in ("tokens", "tags", "class", "value"):
            raise ValueError(f"a head must be 'tokens', 'tags', 'class' or 'value', got {kind!r}")
        bias = bias or not head_norm
        self.dense = Linear(width, width, use_bias=bias, kernel_init=init, rngs=rngs) if kind != "tags" or head_norm else None
        self.norm = make_norm(norm, width, epsilon, bias, rngs) if kind == "tokens" or head_norm else None
        if kind == "tokens":
            self.bias = nnx.Param(jnp.zeros(size))
        else:
            self.output = Linear(width, size, kernel_init=init, rngs=rngs)
        self.kind, self.pool, self.dropout = kind, pool, dropout
        self.activation = ("gelu_exact" if activation in GATED else activation) if kind == "tokens" else head_activation

    def __call__(self, x_BTD: jax.Array, valid_BT: jax.Array, embed: Embed, rngs: nnx.Rngs | None) -> jax.Array:
        """Return [B, T, size], or [B, size] for a sequence. `embed` is the encoder's embedding, whose rows score tokens."""
        if self.kind == "tokens":
            return embed.attend(self._hidden(x_BTD)) + self.bias[...]
        if self.kind == "tags":
            return self.output(dropout(self._hidden(x_BTD), self.dropout, rngs))
        if self.pool == "first":
            x_BD = x_BTD[:, 0]
        else:
            count = jnp.maximum(valid_BT.sum(1, keepdims=True), 1)
            x_BD = jnp.where(valid_BT[..., None], x_BTD, 0).sum(1) / count.astype(x_BTD.dtype)
        return self.output(dropout(self._hidden(x_BD), self.dropout, rngs))

    def _hidden(self, x):
        """Return the hidden layer, for [..., D]; x itself for a head of one matrix."""
        if self.dense is None:
            return x
        activate = jnp.tanh if self.activation == "tanh" else ACTIVATIONS[self.activation]
        x = activate(self.dense(x))
        return x if self.norm is None else self.norm(x)


class Encoder(nnx.Module):
    """Bidirectional Transformer blocks, and a head. Only the head's parameters are under `head/`.

    Named sizes (`bert-base`, `roberta-base`, `distilbert-base`, `modernbert-base`, `deberta-v3-base`, …) have the published parameter counts.
    """

    def __init__(
        self,
        vocab_size: int,
        head: tuple[str, int],
        *,
        context: int = 512,
        layers: int = 4,
        heads: int = 4,
        width: int = 128,
        kv_heads: int | None = None,
        mlp_width: int | None = None,
        positions: Literal["learned", "rotary", "sinusoidal", "disentangled", "none"] = "learned",
        position_offset: int = 0,
        relative_buckets: int = 256,
        relative_distance: int = 512,
        rotary_base: float = 10000.0,
        types: int = 0,
        window: int | None = None,
        layer_types: tuple[LayerType, ...] | None = None,
        local_rotary_base: float | None = None,
        norm: Norm = "layer",
        epsilon: float = 1e-12,
        post_norm: bool = True,
        embedding_norm: bool | None = None,
        activation: Activation = "gelu_exact",
        bias: bool = True,
        pool: Literal["first", "mean"] = "first",
        vocab_multiple: int = 1,
        head_activation: HeadActivation = "tanh",
        head_norm: bool = False,
        dropout: float = 0.0,
        attention: Implementation = "auto",
        scan: bool = False,
        remat: Remat | tuple[str, ...] = "none",
        rngs: nnx.Rngs,
    ):
        """
        Args:
          vocab_size: V, rows of the embedding.
          head: kind and size of the output: `("tokens", V)` scores of tokens, by the embedding; `("tags", K)` scores for
            each token; `("class", C)` scores and `("value", 1)` numbers for the sequence.
          context: the longest sequence.
          layers, heads, width, kv_heads, mlp_width: of the blocks, as in `blocks.Block`.
          positions: `learned` and `sinusoidal` are added to the embedding, `rotary` rotates queries and keys; `disentangled` is the attention of
            DeBERTa, which needs five times the memory for products.
          position_offset: of the first token in the table of learned positions (2 in RoBERTa).
          relative_buckets, relative_distance: of `disentangled`: buckets of distances in each direction, and where the last begins.
          rotary_base: of the wavelengths of `rotary`.
          window, layer_types, local_rotary_base: as in `transformer.Decoder`; a position sees the others less than `window` away.
          types: number of token types (2 in BERT, for a first and a second text); 0 for none.
          norm: `layer` or `rms`.
          epsilon: of the normalization.
          post_norm: normalize each residual sum, and the embedding (BERT). Otherwise normalize the inputs of attention and feed-forward.
          embedding_norm: normalize the embedding. The default is `post_norm`. Without `post_norm` this replaces the normalization of the input of the
            first attention (ModernBERT).
          activation: `gelu`, `gelu_exact`, `relu`, or gated `swiglu`, `geglu`, `geglu_exact`.
          bias: whether matrices and layer normalizations have a bias.
          pool: a sequence is represented by its `first` token (BERT), or by the `mean` of its tokens.
          vocab_multiple: round the rows of the embedding up to a multiple of this, with zeros that take no part in losses, so that they divide over devices.
          head_activation: of the hidden layer of a head for the sequence: `tanh` (BERT), `relu` (DistilBERT), `gelu` or `gelu_exact`.
          head_norm: all heads have a hidden layer, which is normalized, with biases by `bias` (ModernBERT). Otherwise the head for tags has none, and
            only that for tokens is normalized.
          dropout: rate on the embedding, on the residuals of each block, and in the head.
          attention: its implementation: `auto`, `xla`, `cudnn` or `splash`.
          scan, remat: of the blocks, as in `transformer.Decoder`.
          rngs: draws the initial parameters from its `params` stream.
        """
        check_rate(dropout)
        check_sizes(context=context, layers=layers, heads=heads, width=width, vocab_multiple=vocab_multiple)
        init = nnx.initializers.normal(0.02)
        self.embed = Embed(vocab_size, width, init=init, multiple=vocab_multiple, rngs=rngs)
        self.positions = Embed(context + position_offset, width, init=init, name=None, rngs=rngs) if positions == "learned" else None
        self.types = Embed(types, width, init=init, name=None, rngs=rngs) if types else None
        embedding_norm = post_norm if embedding_norm is None else embedding_norm
        self.embedding_norm = make_norm(norm, width, epsilon, bias, rngs) if embedding_norm else None
        self.final_norm = None if post_norm else make_norm(norm, width, epsilon, bias, rngs)
        relative = positions == "disentangled"
        distances = {"buckets": relative_buckets, "longest": relative_distance, "context": context, "epsilon": epsilon}
        self.distances = Distances(width, **distances, init=init, rngs=rngs) if relative else None
        options = {"relative": relative, "attention_type": DisentangledAttention if relative else Attention}
        options |= {"kv_heads": kv_heads, "mlp_width": mlp_width, "norm": norm, "epsilon": epsilon}
        options |= {"post_norm": post_norm, "activation": activation, "bias": bias, "attention": attention}
        options |= {"causal": False, "dropout": dropout, "layers": layers}
        make = functools.partial(Block, width, heads, **options)
        differ = differing(layer_types, window)
        if embedding_norm and not post_norm:
            differ = [differ[i % len(differ)] | {"attention_input_norm": i > 0} for i in range(layers)]
        self.blocks = make_blocks(lambda rngs, **own: make(**own, rngs=rngs), layers, scan, rngs, differ)
        options = {"pool": pool, "dropout": dropout, "activation": activation, "head_activation": head_activation, "head_norm": head_norm}
        options |= {"bias": bias, "norm": norm, "epsilon": epsilon}
        self.head = Head(*head, width, **options, rngs=rngs)
        self.rotary = RotaryTables.of(width // heads, rotary_base, None, local_rotary_base, layer_types) if positions == "rotary" else None
        self.sinusoidal = positions == "sinusoidal"
        self.context, self.position_offset, self.remat, self.dropout = context, position_offset, remat, dropout

    def __call__(
        self,
        tokens: jax.Array,
        *,
        segments: jax.Array | None = None,
        types: jax.Array | None = None,
        positions: jax.Array | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """Return the output of the head.

        Args:
          tokens: int [B, T], T at most `context`; -1 is padding.
          segments: int [B, T] for rows of several packed texts: each attends only to itself, from position 0.
          types: int [B, T], token types. The default is 0.
          positions: int [B, K], the positions at which a head for tokens is computed. The default is all.
          rngs: provides the `dropout` stream; None to evaluate.

        Returns:
          [B, T or K, size] for a head for tokens, [B, size] for one for the sequence.
        """
        x_BTD = self.states(tokens, segments=segments, types=types, rngs=rngs)
        if positions is not None:
            if self.head.kind not in ("tokens", "tags"):
                raise ValueError(f"a head for the sequence ({self.head.kind!r}) takes no positions")
            x_BTD = jnp.take_along_axis(x_BTD, positions[:, :, None], axis=1)
        return self.head(x_BTD, tokens >= 0, self.embed, rngs)

    def states(self, tokens: jax.Array, *, segments: jax.Array | None = None, types: jax.Array | None = None, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Return the output of the last block, [B, T, D], which is the input of the head. Arguments as for a call."""
        T = tokens.shape[1]
        if T > self.context:
            raise ValueError(f"{T} tokens are more than the model's context of {self.context}")
        if types is not None and self.types is None:
            raise ValueError("the model has no token types; construct it with types=2")
        valid = tokens >= 0
        positions = jnp.arange(T)[None] if segments is None else positions_in(segments)
        x_BTD = self.embed(tokens)
        if self.positions is not None:
            x_BTD = x_BTD + self.positions(positions + self.position_offset)
        if self.sinusoidal:
            x_BTD = x_BTD + sinusoids(positions, x_BTD.shape[-1]).astype(x_BTD.dtype)
        if self.types is not None:
            x_BTD = x_BTD + self.types(jnp.zeros_like(tokens) if types is None else types)
        x_BTD = x_BTD if self.embedding_norm is None else self.embedding_norm(x_BTD)
        shared = {
            "rotary": None if self.rotary is None else self.rotary(positions),
            "segments": jnp.where(valid, 0 if segments is None else segments, -1),
            "valid": valid,
            "bias": None if self.distances is None else self.distances(T),
        }
        x_BTD, _ = apply_blocks(self.blocks, dropout(x_BTD, self.dropout, rngs), rngs, remat=self.remat, **shared)
        return x_BTD if self.final_norm is None else self.final_norm(x_BTD)
