"""The Transformer decoder: pre-norm blocks with causal self-attention, as in GPT-2 (Radford et al. 2019).

Shapes: B batch, T time, D width, N heads, K width of a head, V vocabulary, L layers.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmodels.models.layers import Embed, check_rate, check_sizes, dropout

SIZES = {
    "gpt2": {"layers": 12, "heads": 12, "width": 768, "context": 1024},
    "gpt2-medium": {"layers": 24, "heads": 16, "width": 1024, "context": 1024},
    "gpt2-large": {"layers": 36, "heads": 20, "width": 1280, "context": 1024},
    "gpt2-xl": {"layers": 48, "heads": 25, "width": 1600, "context": 1024},
}


class Attention(nnx.Module):
    """Multi-head self-attention (Vaswani et al. 2017), query, key and value from one matrix product.

    With `causal`, position t sees positions 0..t.
    """

    def __init__(self, width: int, heads: int, *, causal: bool, out_init, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        self.query_key_value = nnx.Linear(width, 3 * width, kernel_init=init, rngs=rngs)
        self.out = nnx.Linear(width, width, kernel_init=out_init, rngs=rngs)
        self.heads, self.causal = heads, causal

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        B, T, D = x_BTD.shape
        q_BTNK, k_BTNK, v_BTNK = (
            part.reshape(B, T, self.heads, D // self.heads) for part in jnp.split(self.query_key_value(x_BTD), 3, axis=-1)
        )
        y_BTNK = jax.nn.dot_product_attention(q_BTNK, k_BTNK, v_BTNK, is_causal=self.causal)
        return self.out(y_BTNK.reshape(B, T, D))


class Block(nnx.Module):
    """Attention and a GELU feed-forward, each on a normalised input, added to its input.

    The feed-forward is four times as wide unless `mlp_width` is given; `layers` is how many blocks are stacked.
    """

    def __init__(
        self, width: int, heads: int, *, mlp_width: int | None = None, causal: bool = True, dropout: float, layers: int, rngs: nnx.Rngs
    ):
        mlp_width = 4 * width if mlp_width is None else mlp_width
        init = nnx.initializers.normal(0.02)
        # Every block adds twice to the residual stream; GPT-2 scales those sums back to unit growth.
        out_init = nnx.initializers.normal(0.02 / math.sqrt(2 * layers))
        self.attention_norm = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.attention = Attention(width, heads, causal=causal, out_init=out_init, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.up = nnx.Linear(width, mlp_width, kernel_init=init, rngs=rngs)
        self.down = nnx.Linear(mlp_width, width, kernel_init=out_init, rngs=rngs)
        self.dropout = dropout

    def __call__(self, x_BTD: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        x_BTD += dropout(self.attention(self.attention_norm(x_BTD)), self.dropout, rngs)
        hidden = nnx.gelu(self.up(self.mlp_norm(x_BTD)), approximate=True)
        return x_BTD + dropout(self.down(hidden), self.dropout, rngs)


class Decoder(nnx.Module):
    """A GPT-2-style language model: learned positions, pre-norm blocks, tied embeddings.

    Named sizes `gpt2`, `gpt2-medium`, `gpt2-large` and `gpt2-xl` have the published parameter counts.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        context: int = 1024,
        layers: int = 4,
        heads: int = 4,
        width: int = 128,
        dropout: float = 0.0,
        tie_embeddings: bool = True,
        scan: bool = False,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        """
        Args:
          vocab_size: V, rows of the embedding and width of the output.
          context: the longest sequence; rows of the position table.
          layers, heads, width: L, N and D; N must divide D.
          dropout: rate on the embedding and on what each block adds.
          tie_embeddings: the output matrix is the token embedding's (Press and Wolf 2017).
          scan: keep the blocks' parameters stacked, [L, ...], and loop over them: compiling takes the time of
            one block, however many there are.
          remat: compute each block again in the backward pass instead of keeping its activations.
          rngs: draws the initial parameters from its `params` stream.
        """
        check_rate(dropout)
        check_sizes(context=context, layers=layers, heads=heads, width=width)
        if width % heads:
            raise ValueError(f"heads must divide width, got heads={heads}, width={width}")
        init = nnx.initializers.normal(0.02)
        self.embed = Embed(vocab_size, width, init=init, rngs=rngs)
        self.positions = Embed(context, width, init=init, rngs=rngs)
        self.final_norm = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.output = None if tie_embeddings else nnx.Linear(width, vocab_size, use_bias=False, kernel_init=init, rngs=rngs)

        def block(rngs):
            return Block(width, heads, dropout=dropout, layers=layers, rngs=rngs)

        if scan:
            self.blocks = nnx.vmap(block)(rngs.split(layers))
        else:
            self.blocks = nnx.List([block(rngs) for _ in range(layers)])
        self.context, self.layers, self.scan, self.remat, self.dropout = context, layers, scan, remat, dropout

    def __call__(self, tokens: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """tokens: int [B, T], T at most `context`. Returns logits [B, T, V]; those at t see tokens 0..t."""
        T = tokens.shape[1]
        if T > self.context:
            raise ValueError(f"{T} tokens are more than the model's context of {self.context}")
        x_BTD = self.embed(tokens) + self.positions(jnp.arange(T))
        x_BTD = self._apply_blocks(dropout(x_BTD, self.dropout, rngs), rngs)
        x_BTD = self.final_norm(x_BTD)
        return self.embed.attend(x_BTD) if self.output is None else self.output(x_BTD)

    def _apply_blocks(self, x_BTD: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        """Each block draws dropout from a key of its own, so that scanned, unrolled and rematerialised are one function."""
        keys = None if rngs is None else jax.random.split(rngs.dropout(), self.layers)

        def apply(x_BTD, block_state, key, graphdef):
            block = nnx.merge(graphdef, block_state)
            return block(x_BTD, None if key is None else nnx.Rngs(dropout=key))

        if self.remat:
            apply = jax.checkpoint(apply, static_argnums=3, prevent_cse=not self.scan)
        if self.scan:
            graphdef, stacked = nnx.split(self.blocks)
            x_BTD, _ = jax.lax.scan(lambda x, layer: (apply(x, *layer, graphdef), None), x_BTD, (stacked, keys))
            return x_BTD
        for i, block in enumerate(self.blocks):
            graphdef, state = nnx.split(block)
            x_BTD = apply(x_BTD, state, None if keys is None else keys[i], graphdef)
        return x_BTD
