"""Recurrent networks: stacked LSTM and GRU layers, and a language model made of them.

Shapes: B batch, T time, D width in, H width of a layer, V vocabulary.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmodels.models.layers import Embed, check_rate, check_sizes, dropout

SIZES = {"lstm": {"cell": "lstm"}, "gru": {"cell": "gru"}}


class LSTM(nnx.Module):
    """One LSTM layer over time (Hochreiter and Schmidhuber 1997; gates in the order input, forget, cell, output).

    The products with the inputs of all times are one matrix product before the loop; only the recurrent
    product stays inside it.
    """

    def __init__(self, width_in: int, width: int, *, unroll: int = 1, rngs: nnx.Rngs):
        self.input = nnx.Linear(width_in, 4 * width, kernel_init=nnx.initializers.glorot_uniform(), rngs=rngs)
        self.recurrent = nnx.Param(_orthogonal_gates(rngs.params(), width, 4))
        # A forget gate that starts open (Jozefowicz et al. 2015).
        self.input.bias[...] = self.input.bias[...].at[width : 2 * width].set(1.0)
        self.width, self.unroll = width, unroll

    def initial_state(self, batch: int, dtype=jnp.float32) -> tuple[jax.Array, jax.Array]:
        """Zero (hidden, cell), each [B, H]."""
        return jnp.zeros((batch, self.width), dtype), jnp.zeros((batch, self.width), dtype)

    def __call__(self, x, state=None):
        """x: [B, T, D]; state: (hidden, cell) or None for zeros. Returns outputs [B, T, H] and the last state."""
        recurrent = self.recurrent[...]

        def step(state, gates):
            hidden, cell = state
            i, f, g, o = jnp.split(gates + hidden @ recurrent, 4, axis=-1)
            cell = nnx.sigmoid(f) * cell + nnx.sigmoid(i) * jnp.tanh(g)
            hidden = nnx.sigmoid(o) * jnp.tanh(cell)
            return (hidden, cell), hidden

        gates = self.input(x)
        state = self.initial_state(x.shape[0], gates.dtype) if state is None else state
        state, outputs = jax.lax.scan(step, state, gates.swapaxes(0, 1), unroll=self.unroll)
        return outputs.swapaxes(0, 1), state


class GRU(nnx.Module):
    """One GRU layer over time (Cho et al. 2014), with the reset gate after the recurrent product, as cuDNN has it."""

    def __init__(self, width_in: int, width: int, *, unroll: int = 1, rngs: nnx.Rngs):
        self.input = nnx.Linear(width_in, 3 * width, kernel_init=nnx.initializers.glorot_uniform(), rngs=rngs)
        self.recurrent = nnx.Param(_orthogonal_gates(rngs.params(), width, 3))
        self.recurrent_bias = nnx.Param(jnp.zeros(width))
        self.width, self.unroll = width, unroll

    def initial_state(self, batch: int, dtype=jnp.float32) -> jax.Array:
        """Zero hidden state [B, H]."""
        return jnp.zeros((batch, self.width), dtype)

    def __call__(self, x, state=None):
        """x: [B, T, D]; state: hidden [B, H] or None for zeros. Returns outputs [B, T, H] and the last state."""
        recurrent, bias = self.recurrent[...], self.recurrent_bias[...]

        def step(hidden, gates):
            reset, update, candidate = jnp.split(gates, 3, axis=-1)
            h_reset, h_update, h_candidate = jnp.split(hidden @ recurrent, 3, axis=-1)
            reset, update = nnx.sigmoid(reset + h_reset), nnx.sigmoid(update + h_update)
            candidate = jnp.tanh(candidate + reset * (h_candidate + bias))
            hidden = (1 - update) * candidate + update * hidden
            return hidden, hidden

        gates = self.input(x)
        state = self.initial_state(x.shape[0], gates.dtype) if state is None else state
        state, outputs = jax.lax.scan(step, state, gates.swapaxes(0, 1), unroll=self.unroll)
        return outputs.swapaxes(0, 1), state


CELLS = {"lstm": LSTM, "gru": GRU}


class RecurrentLM(nnx.Module):
    """A language model of stacked LSTM or GRU layers: embedding, layers, logits, with dropout between all of them."""

    def __init__(
        self,
        vocab_size: int,
        *,
        cell: Literal["lstm", "gru"] = "lstm",
        layers: int = 2,
        width: int = 256,
        embedding: int | None = None,
        dropout: float = 0.0,
        tie_embeddings: bool = False,
        unroll: int = 1,
        rngs: nnx.Rngs,
    ):
        """
        Args:
          vocab_size: V, rows of the embedding and width of the output.
          cell: `lstm` or `gru`.
          layers: how many are stacked.
          width: of each layer.
          embedding: width of the embedding; that of the layers unless given.
          dropout: rate on the embedding and on every layer's output.
          tie_embeddings: the output matrix is the embedding's (Press and Wolf 2017); their widths must be equal.
          unroll: time steps per turn of the compiled loop: more is faster and slower to compile.
          rngs: draws the initial parameters from its `params` stream.
        """
        check_rate(dropout)
        check_sizes(layers=layers, width=width, unroll=unroll)
        embedding = width if embedding is None else embedding
        if tie_embeddings and embedding != width:
            raise ValueError(f"tied embeddings need embedding == width, got {embedding} and {width}")
        self.embed = Embed(vocab_size, embedding, init=nnx.initializers.normal(0.1), rngs=rngs)
        widths = [embedding] + [width] * layers
        self.layers = nnx.List([CELLS[cell](widths[i], width, unroll=unroll, rngs=rngs) for i in range(layers)])
        self.output = None if tie_embeddings else nnx.Linear(width, vocab_size, rngs=rngs)
        self.dropout = dropout

    def __call__(self, tokens: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """tokens: int [B, T]. Returns logits [B, T, V]; those at t see tokens 0..t."""
        logits, _ = self.with_state(tokens, None, rngs=rngs)
        return logits

    def with_state(self, tokens: jax.Array, state, *, rngs: nnx.Rngs | None = None):
        """Goes on from `state` (a tuple with one state per layer, or None for zeros). Returns logits and the new state."""
        state = (None,) * len(self.layers) if state is None else state
        x = dropout(self.embed(tokens), self.dropout, rngs)
        after = []
        for layer, before in zip(self.layers, state, strict=True):
            x, last = layer(x, before)
            x = dropout(x, self.dropout, rngs)
            after.append(last)
        logits = self.embed.attend(x) if self.output is None else self.output(x)
        return logits, tuple(after)


def _orthogonal_gates(key: jax.Array, width: int, gates: int) -> jax.Array:
    """[H, gates * H]: an orthogonal matrix for each gate (Saxe et al. 2014)."""
    init = nnx.initializers.orthogonal()
    return jnp.concatenate([init(k, (width, width)) for k in jax.random.split(key, gates)], axis=1)
