"""The Transformer decoder (GPT-2 and similar models). The encoder is in `encoder.py`, the encoder–decoder in `encoder_decoder.py`.

Shapes: B batch, T time, D width, N heads, K width of a head, V vocabulary, L layers.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmodels.models import remat as remat_lib
from jaxmodels.models.attention import Implementation, QueryKeyNorm
from jaxmodels.models.blocks import Block, Norm, apply_blocks, extend_blocks, make_blocks, make_layers, make_norm, prefill_blocks, residual_init
from jaxmodels.models.layer_types import LayerType, RotaryTables, differing
from jaxmodels.models.layers import Activation, Embed, Output, check_rate, check_sizes, dropout, first_scores
from jaxmodels.models.moe import Mixture, MoE, statistics
from jaxmodels.models.positions import RotaryScaling, lengths_in, positions_in, sinusoids
from jaxmodels.models.remat import Remat
from jaxmodels.models.sizes import DECODERS
from jaxmodels.parallel.layout import constrain, gathered, sum_over_devices

SIZES = DECODERS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scales:
    """Factors and caps between the parts of a decoder. The defaults change nothing.

    Attributes:
      embedding: factor on the embeddings of tokens, rounded to their type; `sqrt_width` is the square root of D (Vaswani et al. 2017; Gemma).
      attention: factor on the products of queries and keys. The default is 1 / sqrt(K).
      attention_cap: products c become cap tanh(c / cap) (Gemma 2). `attention` is then `xla` or `splash`; others lack it.
      residual: factor on what attention and feed-forward add to the residual stream (Granite).
      logits: logits are divided by it (Granite).
      logits_cap: logits c become cap tanh(c / cap), after that (Gemma 2).
    """

    embedding: float | Literal["sqrt_width"] = 1.0
    attention: float | None = None
    attention_cap: float | None = None
    residual: float = 1.0
    logits: float = 1.0
    logits_cap: float | None = None

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, float | int) and not value > 0:
                raise ValueError(f"scales.{name} must be above 0, got {value}")

    def embeddings(self, x_BTD: jax.Array) -> jax.Array:
        """Return embeddings times their factor."""
        factor = x_BTD.shape[-1] ** 0.5 if self.embedding == "sqrt_width" else self.embedding
        return x_BTD if factor == 1.0 else x_BTD * jnp.asarray(factor, x_BTD.dtype)

    def scores(self, logits: jax.Array) -> jax.Array:
        """Return logits divided and capped."""
        logits = logits if self.logits == 1.0 else logits / jnp.asarray(self.logits, logits.dtype)
        return logits if self.logits_cap is None else self.logits_cap * jnp.tanh(logits / self.logits_cap)


def _experts(mixture: Mixture, width: int, mlp_width: int, activation: Activation, out_init) -> Callable[[nnx.Rngs], MoE]:
    """Return the constructor of a block's mixture of experts."""
    options = dataclasses.asdict(mixture)
    return lambda rngs: MoE(width, mlp_width, activation=activation, out_init=out_init, rngs=rngs, **options)


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
        rotary_fraction: float = 1.0,
        window: int | None = None,
        layer_types: tuple[LayerType, ...] | None = None,
        local_rotary_base: float | None = None,
        norm: Norm = "layer",
        epsilon: float = 1e-5,
        input_norm: bool = True,
        output_norm: bool = False,
        post_norm: bool = False,
        activation: Activation = "gelu",
        bias: bool = True,
        qkv_bias: bool | None = None,
        mlp_bias: bool | None = None,
        query_key_norm: QueryKeyNorm = False,
        scales: Scales | None = None,
        moe: Mixture | None = None,
        dropout: float = 0.0,
        tie_embeddings: bool = True,
        vocab_multiple: int = 1,
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
          rotary_fraction: part of the channels of each head that is rotated, the first ones (Phi-4-mini).
          window: number of last positions that a position sees (Jiang et al. 2023), in all layers or in local ones.
          layer_types: `global`, `local` (has the window) or `unrotated` (no rotary positions) for each layer; a shorter list repeats.
            The default is layers that are alike.
          local_rotary_base: `rotary_base` of local layers, which then have no scaling (Gemma 3).
          norm: `layer`, `rms`, or `rms_plus_one`, whose factor is 1 + scale (Gemma).
          epsilon: of the normalization.
          input_norm, output_norm: normalize the inputs of attention and feed-forward; and what they return (Gemma 2, OLMo 2).
          post_norm: normalize each residual sum, not the inputs of attention and feed-forward.
          activation: `gelu`, `gelu_exact`, `relu`, or gated `swiglu`, `geglu`, `geglu_exact`.
          bias: whether matrices and layer normalizations have a bias.
          qkv_bias, mlp_bias: whether queries, keys and values, and the feed-forward have a bias. The default is `bias`.
          query_key_norm: whether queries and keys are normalized (Qwen 3); `projection`: all heads together (OLMo 2).
          scales: factors on embeddings, products of attention, residuals and logits, and caps.
          moe: each feed-forward is a mixture of experts, each of width `mlp_width`: `{"experts": 8, "top_k": 2}`.
          dropout: rate on the embedding and on the residuals of each block.
          tie_embeddings: the output matrix is the token embedding's (Press and Wolf 2017).
          vocab_multiple: round the rows of the embedding and the columns of the output up to a multiple of this, with zeros that take no part in
            losses or generation, so that they divide over devices.
          attention: its implementation: `auto`, `xla`, `cudnn` or `splash`.
          scan: stack the blocks' parameters, [L, ...], and loop over them: compiling takes the time of one block for any number of layers.
          remat: what the backward pass recomputes of each block: `none`, `full` (all), `dots` (all but matrix products), `dots_no_batch` (all but matrix
            products with parameters); or the names of saved activations, of `remat.NAMES`.
          offload: names of activations that are offloaded to host memory until the backward pass.
          rngs: draws the initial parameters from its `params` stream.
        """
        check_rate(dropout)
        check_sizes(context=context, layers=layers, heads=heads, width=width, vocab_multiple=vocab_multiple)
        if not 0 < rotary_fraction <= 1:
            raise ValueError(f"rotary_fraction must be above 0 and at most 1, got {rotary_fraction}")
        if rotary_scaling is not None and positions != "rotary":
            raise ValueError(f"rotary_scaling needs positions='rotary', got positions={positions!r}")
        init = nnx.initializers.normal(0.02)
        self.mixture = Mixture(**moe) if isinstance(moe, Mapping) else moe
        self.scales = Scales(**scales) if isinstance(scales, Mapping) else scales or Scales()
        self.embed = Embed(vocab_size, width, init=init, multiple=vocab_multiple, rngs=rngs)
        self.positions = Embed(context, width, init=init, name=None, rngs=rngs) if positions == "learned" else None
        self.final_norm = None if post_norm else make_norm(norm, width, epsilon, bias, rngs)
        self.output = None if tie_embeddings else Output(width, vocab_size, init=init, multiple=vocab_multiple, rngs=rngs)
        options = {"kv_heads": kv_heads, "head_width": head_width, "mlp_width": mlp_width, "norm": norm, "epsilon": epsilon}
        options |= {"input_norm": input_norm, "output_norm": output_norm, "post_norm": post_norm, "activation": activation}
        options |= {"bias": bias, "qkv_bias": qkv_bias, "mlp_bias": mlp_bias, "query_key_norm": query_key_norm}
        options |= {"attention": attention, "dropout": dropout, "layers": layers}
        options |= {"scale": self.scales.attention, "cap": self.scales.attention_cap, "residual_scale": self.scales.residual}
        if self.mixture is not None:
            options["mlp"] = _experts(self.mixture, width, mlp_width or 4 * width, activation, residual_init(post_norm, layers))
        make = functools.partial(Block, width, heads, **options)
        self.blocks = make_blocks(lambda rngs, **own: make(**own, rngs=rngs), layers, scan, rngs, differing(layer_types, window))
        rotary = (int(rotary_fraction * (head_width or width // heads)), rotary_base, rotary_scaling, local_rotary_base, layer_types)
        self.rotary = RotaryTables.of(*rotary) if positions == "rotary" else None
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
        x_BTD, auxiliary = self.features(tokens, segments=segments, rngs=rngs)
        return self._whole(self._logits(x_BTD)), auxiliary

    def features(self, tokens: jax.Array, *, segments: jax.Array | None = None, rngs: nnx.Rngs | None = None) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return the final hidden states [B, T, D] and the statistics: `with_auxiliary` without the output layer, `head`."""
        T = tokens.shape[1]
        if T > self.context:
            raise ValueError(f"{T} tokens are more than the model's context of {self.context}")
        valid = tokens >= 0
        x_BTD = self._enter(tokens, positions := jnp.arange(T)[None] if segments is None else positions_in(segments))
        lengths = None
        if self.by_length:  # that of a text itself: neither padding nor other texts count
            lengths = valid.sum(axis=1, keepdims=True) if segments is None else lengths_in(jnp.where(valid, segments, -1))
        shared = {"rotary": self._rotate(positions, lengths), "valid": valid}
        if segments is not None:  # without segments, no token sees the padding after it
            shared["segments"] = jnp.where(valid, segments, -1)
        x_BTD, sums = apply_blocks(self.blocks, dropout(x_BTD, self.dropout, rngs), rngs, remat=self.remat, offload=self.offload, **shared)
        if self.mixture is None:
            return x_BTD, {}
        auxiliary = jax.vmap(lambda sums: statistics(sums, self.mixture))(sum_over_devices(sums))
        return x_BTD, {name: values.sum(0) if name == "loss" else values.mean(0) for name, values in auxiliary.items()}

    def head(self) -> Callable[[jax.Array], jax.Array]:
        """Map features [B, T, D] to logits [B, T, V]. For several calls on parts: the matrix is gathered once, and gradients add up in float32."""
        # Layers with adapters compute more than a product with one matrix.
        plain = type(self.embed) is Embed if self.output is None else type(self.output) is Output
        if not plain:
            return lambda x_BTD: self._whole(self._logits(x_BTD))
        matrix, names = (self.embed.embedding[...], ("vocab", "embed")) if self.output is None else (self.output.kernel[...], ("embed", "vocab"))
        whole = gathered(matrix, *names).astype(jnp.float32)

        def logits(x_BTD):
            x_BTD = x_BTD if self.final_norm is None else self.final_norm(x_BTD)
            products = jax.lax.dot_general(x_BTD, whole.astype(matrix.dtype), (((2,), (names.index("embed"),)), ((), ())))
            return self._whole(self.scales.scores(first_scores(products, self.embed.rows)))

        return logits

    def make_cache(self, batch: int, length: int, dtype: Any = jnp.float32, *, whole: bool = False) -> dict[str, Any]:
        """Return an empty cache for `batch` rows of `length` tokens; see `models.cache`, also for `whole`."""
        layers = make_layers(self.blocks, batch, length, dtype, whole)
        cache = {"layers": layers, "left_padding": jnp.zeros(batch, jnp.int32), "slot": jnp.zeros((), jnp.int32)}
        return cache | ({"tokens": jnp.full((batch, length), -1, jnp.int32)} if self.by_length else {})

    def prefill(self, tokens: jax.Array, cache: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        """Return the next logits [B, V] after prompts `tokens`, int [B, P] padded with -1 on the left, and the cache with them."""
        left_padding = jnp.argmax(tokens >= 0, axis=1).astype(jnp.int32)
        x_BTD, layers = self._read(tokens, cache["layers"], left_padding)
        logits = self._whole(self._logits(x_BTD[:, -1]))
        after = {"layers": layers, "left_padding": left_padding, "slot": jnp.asarray(tokens.shape[1], jnp.int32)}
        return logits, after | self._noted(tokens, cache, 0)

    def extend(self, tokens: jax.Array, cache: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        """Read one more token of each row, int [B], with -1 for rows that have ended. Return the next logits [B, V] and the cache.

        Where rotary positions depend on the length of a text and change with this token, all tokens are read again, as in the full forward pass.
        """
        slot, left_padding = cache["slot"], cache["left_padding"]
        noted = self._noted(tokens[:, None], cache, slot)

        def read_one(layers):
            x_B1D, layers = self._read_more(tokens[:, None], cache | {"layers": layers})
            return x_B1D[:, 0], layers

        def read_all(layers):
            x_BSD, layers = self._read(noted["tokens"], layers, left_padding, slot)
            return jax.lax.dynamic_index_in_dim(x_BSD, slot, axis=1, keepdims=False), layers

        if noted:
            changes = jnp.any(self.rotary.change(slot - left_padding + 1) & (tokens >= 0))
            x_BD, layers = jax.lax.cond(changes, read_all, read_one, cache["layers"])
        else:
            x_BD, layers = read_one(cache["layers"])
        logits = self._whole(self._logits(x_BD))
        return logits, {"layers": layers, "left_padding": left_padding, "slot": slot + 1} | noted

    def read(self, tokens: jax.Array, cache: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        """Read more tokens of each row, int [B, T]; -1 at the end of all rows is padding. Return the logits after each, [B, T, V], and the cache.

        The cache is one made with `whole=True`, and has room for T tokens more. Where rotary positions depend on the length of a text, texts have to
        end within the original context.
        """
        x_BTD, layers = self._read_more(tokens, cache)
        count = jnp.sum((tokens >= 0).any(axis=0), dtype=jnp.int32)
        return self._whole(self._logits(x_BTD)), cache | {"layers": layers, "slot": cache["slot"] + count}

    @property
    def by_length(self) -> bool:
        """Whether rotary positions depend on the number of tokens of a text."""
        return self.rotary is not None and self.rotary.by_length

    def _noted(self, tokens, cache, slot):
        """Return the cache's tokens with these ones from `slot` on, for models that may have to read them again; {} for a cache without tokens."""
        return {"tokens": jax.lax.dynamic_update_slice(cache["tokens"], tokens.astype(jnp.int32), (0, slot))} if "tokens" in cache else {}

    def _read_more(self, tokens, cache):
        """Run the blocks on tokens [B, T] from the next slot on. Return the output of the last one, and the cache's layers."""
        slot, left_padding = cache["slot"], cache["left_padding"]
        positions = slot + jnp.arange(tokens.shape[1]) - left_padding[:, None]
        x_BTD, rotary = self._enter(tokens, positions), self._rotate(positions, positions + 1)
        return extend_blocks(self.blocks, x_BTD, cache["layers"], slot=slot, left_padding=left_padding, rotary=rotary, valid=tokens >= 0)

    def _read(self, tokens, layers, left_padding, slot=None):
        """Run the blocks on tokens [B, S] that begin after their left padding, and write the cache's layers; with `slot`, the tokens end there."""
        S = tokens.shape[1]
        valid, positions = tokens >= 0, jnp.maximum(jnp.arange(S)[None] - left_padding[:, None], 0)
        lengths = (S if slot is None else slot + 1) - left_padding[:, None]
        x_BSD, rotary = self._enter(tokens, positions), self._rotate(positions, lengths)
        return prefill_blocks(self.blocks, x_BSD, layers, rotary=rotary, segments=jnp.where(valid, 0, -1), valid=valid, slot=slot)

    def _enter(self, tokens, positions):
        """Return the input of the blocks, [B, T, D]."""
        x_BTD = self.scales.embeddings(self.embed(tokens))
        if self.positions is not None:
            x_BTD = x_BTD + self.positions(positions)
        if self.sinusoidal:
            x_BTD = x_BTD + sinusoids(positions, x_BTD.shape[-1]).astype(x_BTD.dtype)
        return x_BTD

    def _rotate(self, positions, lengths):
        """Return the rotary tables at positions in texts of these lengths: see `positions.rotary_table`."""
        return None if self.rotary is None else self.rotary(positions, lengths)

    def _logits(self, x):
        x = x if self.final_norm is None else self.final_norm(x)
        return self.scales.scores(self.embed.attend(x) if self.output is None else self.output(x))

    def _whole(self, logits):
        """Constrain the sharding of logits of all rows; those of padded rows have theirs already."""
        if self.embed.embedding.shape[0] > self.embed.rows:
            return logits
        return constrain(logits, "rows", *("sequence",) * (logits.ndim - 2), "vocab")
