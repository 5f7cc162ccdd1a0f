"""Recurrent networks: LSTM and GRU layers, stacks of them in one direction or both, and a language model.

Padding does not change a state: where `valid` [B, T] is False, a layer keeps its state. So the last state is that after the last real
token, and the backward direction, which starts at the end, starts at that token.

Shapes: B batch, T time, D width in, H width of a layer, V vocabulary.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels.models import cudnn, recurrence
from jaxmodels.models.layers import Embed, Linear, check_rate, check_sizes, dropout

SIZES = {"lstm": {"cell": "lstm"}, "gru": {"cell": "gru"}}


class LSTM(nnx.Module):
    """One LSTM layer over time (Hochreiter and Schmidhuber 1997), with gates in the order input, forget, cell, output.

    The products with the inputs of all times are one matrix product before the loop. Only the recurrent product is inside it.
    """

    def __init__(self, width_in: int, width: int, *, unroll: int = 1, rngs: nnx.Rngs):
        self.input = Linear(width_in, 4 * width, kernel_init=nnx.initializers.glorot_uniform(), rngs=rngs)
        self.recurrent = nnx.Param(_orthogonal_gates(rngs.params(), width, 4))
        # The forget gate is open initially (Jozefowicz et al. 2015).
        self.input.bias[...] = self.input.bias[...].at[width : 2 * width].set(1.0)
        self.width, self.unroll = width, unroll

    def initial_state(self, batch: int, dtype=jnp.float32) -> tuple[jax.Array, jax.Array]:
        """Return zero (hidden, cell), each [B, H]."""
        return jnp.zeros((batch, self.width), dtype), jnp.zeros((batch, self.width), dtype)

    def __call__(self, x, state=None, *, valid=None, restart=None, reverse=False):
        """x: [B, T, D]; state: (hidden, cell), or None for zeros. Return outputs [B, T, H] and the last state; see `_run`."""
        return _run(self, recurrence.Cell(True, _lstm, _lstm_factors, _lstm_pull), None, x, state, valid, restart, reverse)


def _lstm(state, gates):
    """Return the next (hidden, cell), and the hidden one as the output."""
    i, f, g, o = _lstm_gates(gates)
    cell = f * state[1] + i * g
    hidden = o * jnp.tanh(cell)
    return (hidden, cell), hidden


def _lstm_gates(gates):
    # sigmoid(x) = (tanh(x / 2) + 1) / 2: one pass over all gates, where XLA for CPUs (jaxlib 0.10 and 0.12) takes four times as long for one of each kind.
    half = np.repeat(np.array([True, True, False, True]), gates.shape[-1] // 4)
    scale, shift = (jnp.asarray(np.where(half, *values), gates.dtype) for values in ((0.5, 1.0), (0.5, 0.0)))
    return jnp.split(jnp.tanh(gates * scale) * scale + shift, 4, axis=-1)


def _lstm_factors(state, gates):
    """Return what gradients of the gates are multiplied with [..., 4H], of the cell [..., H], and of the cell before [..., H]."""
    i, f, g, o = _lstm_gates(gates)
    bounded = jnp.tanh(f * state[1] + i * g)
    of_gates = jnp.concatenate([g * i * (1 - i), state[1] * f * (1 - f), i * (1 - g * g), bounded * o * (1 - o)], axis=-1)
    return of_gates, o * (1 - bounded * bounded), f


def _lstm_pull(factors, of_state, of_output):
    of_gates, of_bounded, forget = factors
    of_hidden, of_cell = of_state
    of_hidden = of_hidden + of_output
    of_cell = of_cell + of_hidden * of_bounded
    return (0, of_cell * forget), (jnp.concatenate([of_cell, of_cell, of_cell, of_hidden], axis=-1) * of_gates,)


class GRU(nnx.Module):
    """One GRU layer over time (Cho et al. 2014), with the reset gate after the recurrent product, as in cuDNN."""

    def __init__(self, width_in: int, width: int, *, unroll: int = 1, rngs: nnx.Rngs):
        self.input = Linear(width_in, 3 * width, kernel_init=nnx.initializers.glorot_uniform(), rngs=rngs)
        self.recurrent = nnx.Param(_orthogonal_gates(rngs.params(), width, 3))
        self.recurrent_bias = nnx.Param(jnp.zeros(width))
        self.width, self.unroll = width, unroll

    def initial_state(self, batch: int, dtype=jnp.float32) -> jax.Array:
        """Return a zero hidden state [B, H]."""
        return jnp.zeros((batch, self.width), dtype)

    def __call__(self, x, state=None, *, valid=None, restart=None, reverse=False):
        """x: [B, T, D]; state: hidden [B, H], or None for zeros. Return outputs [B, T, H] and the last state; see `_run`."""
        bias = jnp.pad(self.recurrent_bias[...], (2 * self.width, 0))  # of the candidate, inside the reset gate
        return _run(self, recurrence.Cell(False, _gru, _gru_factors, _gru_pull), bias, x, state, valid, restart, reverse)


def _gru(hidden, gates, recurred):
    """Return the next hidden state, twice."""
    reset, update, candidate, _ = _gru_gates(gates, recurred)
    hidden = (1 - update) * candidate + update * hidden
    return hidden, hidden


def _gru_gates(gates, recurred):
    width = gates.shape[-1] // 3
    sums = gates[..., : 2 * width] + recurred[..., : 2 * width]
    reset, update = jnp.split(jnp.tanh(0.5 * sums) * 0.5 + 0.5, 2, axis=-1)  # sigmoids, as in `_lstm_gates`
    recurred = recurred[..., 2 * width :]
    return reset, update, jnp.tanh(gates[..., 2 * width :] + reset * recurred), recurred


def _gru_factors(hidden, gates, recurred):
    """Return what gradients of both terms are multiplied with [..., 3H], and of the hidden state before [..., H]."""
    reset, update, candidate, recurred = _gru_gates(gates, recurred)
    of_candidate = (1 - update) * (1 - candidate * candidate)
    both = [of_candidate * recurred * reset * (1 - reset), (hidden - candidate) * update * (1 - update)]
    return jnp.concatenate([*both, of_candidate], axis=-1), jnp.concatenate([*both, of_candidate * reset], axis=-1), update


def _gru_pull(factors, of_state, of_output):
    of_gates, of_recurred, update = factors
    of_state = of_state + of_output
    thrice = jnp.concatenate([of_state] * 3, axis=-1)
    return of_state * update, (thrice * of_gates, thrice * of_recurred)


def _run(layer, cell, bias, x, state, valid, restart, reverse):
    """Run a layer.

    Args:
      layer: with its `input`, `recurrent` and `unroll`.
      cell, bias: of `recurrence.loop`.
      x: [B, T, D].
      state: the initial state; None for zeros.
      valid: bool [B, T] or None; where False the state is unchanged, and the output is zero.
      restart: bool [B, T] or None; where True the state is set to zero before the step.
      reverse: loop from the last time to the first.

    Returns:
      outputs [B, T, H], each at its own time, and the last state.
    """
    x, *masks = (None if each is None else each.swapaxes(0, 1) for each in (x, valid, restart))
    gates = layer.input(x)
    state = layer.initial_state(gates.shape[1], gates.dtype) if state is None else state
    outputs, state = recurrence.loop(cell, layer.recurrent[...], bias, state, gates, tuple(masks), reverse=reverse, unroll=layer.unroll)
    return outputs.swapaxes(0, 1), state


CELLS = {"lstm": LSTM, "gru": GRU}


class Recurrent(nnx.Module):
    """Stacked layers, each in one direction or both (Schuster and Paliwal 1997), with dropout between them.

    The outputs of both directions of a layer are concatenated, and are the input of both directions of the next.
    """

    def __init__(
        self,
        width_in: int,
        width: int,
        *,
        cell: str = "lstm",
        layers: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
        kernel: str = "xla",
        unroll: int = 1,
        rngs: nnx.Rngs,
    ):
        """
        Args:
          width_in: D.
          width: H, of each direction.
          cell: `lstm` or `gru`.
          layers: number of layers.
          bidirectional: whether layers have a backward direction.
          dropout: rate on the outputs between layers.
          kernel: `xla`, or `cudnn`; see `models.cudnn`.
          unroll: time steps per iteration of the compiled loop.
          rngs: draws the initial parameters from its `params` stream.
        """
        check_rate(dropout)
        check_sizes(layers=layers, width=width, unroll=unroll)
        cudnn.check(kernel, cell)
        directions = 2 if bidirectional else 1
        widths = [width_in] + [directions * width] * (layers - 1)
        self.forward = nnx.List([CELLS[cell](w, width, unroll=unroll, rngs=rngs) for w in widths])
        self.backward = nnx.List([CELLS[cell](w, width, unroll=unroll, rngs=rngs) for w in widths]) if bidirectional else None
        self.dropout, self.kernel, self.width_out = dropout, kernel, directions * width

    def __call__(self, x, state=None, *, valid=None, restart=None, rngs: nnx.Rngs | None = None):
        """Return the outputs of the last layer, and the last states.

        Args:
          x: [B, T, D].
          state: for each layer a tuple of its directions' states, or None for zeros.
          valid: bool [B, T] or None, False at padding.
          restart: bool [B, T] or None, True where the states restart at zero.
          rngs: provides the `dropout` stream, in training.

        Returns:
          [B, T, H] (2H with both directions; zero where not `valid`), and the states in the form of `state`.
        """
        if restart is not None and self.backward is not None:
            raise ValueError("packed sequences (segments) need bidirectional=False")
        after = []
        for i in range(len(self.forward)):
            cells = [self.forward[i]] + ([] if self.backward is None else [self.backward[i]])
            x = x if i == 0 else dropout(x, self.dropout, rngs)
            x, last = run_layer(cells, x, None if state is None else state[i], valid, restart, self.kernel)
            after.append(last)
        return x, tuple(after)


def run_layer(cells, x, states, valid, restart, kernel: str):
    """Run one layer of one or two directions with a kernel. Return outputs [B, T, H or 2H] and a tuple of last states."""
    if kernel == "cudnn":
        if restart is not None:
            raise ValueError("kernel='cudnn' cannot restart within a row, as packed sequences need; use kernel='xla'")
        return cudnn.lstm(cells, x, states, valid)
    states = (None,) * len(cells) if states is None else states
    done = [cell(x, state, valid=valid, restart=restart, reverse=reverse) for cell, state, reverse in zip(cells, states, (False, True), strict=False)]
    outputs = done[0][0] if len(done) == 1 else jnp.concatenate([outputs for outputs, _ in done], axis=-1)
    return outputs, tuple(last for _, last in done)


class RecurrentLM(nnx.Module):
    """A language model: embedding, stacked LSTM or GRU layers and logits, with dropout between all of them."""

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
        kernel: Literal["xla", "cudnn"] = "xla",
        unroll: int = 1,
        rngs: nnx.Rngs,
    ):
        """
        Args:
          vocab_size: V, rows of the embedding and width of the output.
          cell: `lstm` or `gru`.
          layers: number of layers.
          width: of each layer.
          embedding: width of the embedding. The default is that of the layers.
          dropout: rate on the embedding and on every layer's output.
          tie_embeddings: the output matrix is the embedding's (Press and Wolf 2017); their widths must be equal.
          kernel: `xla`, or `cudnn`, NVIDIA's fused one, for LSTMs in float32 on a GPU; the parameters are the same.
          unroll: time steps per iteration of the compiled loop; more steps compile slower, and run slower on CPUs.
          rngs: draws the initial parameters from its `params` stream.
        """
        check_rate(dropout)
        check_sizes(layers=layers, width=width, unroll=unroll)
        cudnn.check(kernel, cell)
        embedding = width if embedding is None else embedding
        if tie_embeddings and embedding != width:
            raise ValueError(f"tied embeddings need embedding == width, got {embedding} and {width}")
        self.embed = Embed(vocab_size, embedding, init=nnx.initializers.normal(0.1), rngs=rngs)
        widths = [embedding] + [width] * layers
        self.layers = nnx.List([CELLS[cell](widths[i], width, unroll=unroll, rngs=rngs) for i in range(layers)])
        self.output = None if tie_embeddings else Linear(width, vocab_size, rngs=rngs)
        self.dropout, self.kernel = dropout, kernel

    def __call__(self, tokens: jax.Array, *, segments: jax.Array | None = None, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Return the logits of the next token.

        Args:
          tokens: int [B, T].
          segments: int [B, T] or None; for rows of several packed sequences, the number of each. The state restarts with each segment.
          rngs: provides the `dropout` stream, in training.

        Returns:
          [B, T, V]; those at t see the tokens 0..t of their segment.
        """
        logits, _ = self.with_state(tokens, None, segments=segments, rngs=rngs)
        return logits

    def make_cache(self, batch: int, length: int, dtype: Any = jnp.float32, *, whole: bool = False) -> dict[str, Any]:
        """Return the initial states; see `models.cache`. Their size does not depend on `length` or `whole`."""
        return {"states": tuple(layer.initial_state(batch, dtype) for layer in self.layers)}

    def prefill(self, tokens: jax.Array, cache: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        """Return the next logits [B, V] after prompts `tokens`, int [B, P] padded with -1 on the left, and the states after them."""
        x_BTD, cache = self._read(tokens, cache)
        return self._logits(x_BTD[:, -1]), cache

    def extend(self, tokens: jax.Array, cache: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        """Read one more token of each row, int [B], with -1 for rows that have ended. Return the next logits [B, V] and the states."""
        return self.prefill(tokens[:, None], cache)

    def read(self, tokens: jax.Array, cache: dict[str, Any]) -> tuple[jax.Array, dict[str, Any]]:
        """Read more tokens of each row, int [B, T] with -1 as padding. Return the logits after each, [B, T, V], and the states after the last."""
        x_BTD, cache = self._read(tokens, cache)
        return self._logits(x_BTD), cache

    def _read(self, tokens, cache):
        x_BTD, valid, states = self.embed(tokens), tokens >= 0, []
        for layer, state in zip(self.layers, cache["states"], strict=True):
            x_BTD, last = layer(x_BTD, state, valid=valid)
            states.append(last)
        return x_BTD, {"states": tuple(states)}

    def _logits(self, x):
        return self.embed.attend(x) if self.output is None else self.output(x)

    def with_state(self, tokens: jax.Array, state, *, segments: jax.Array | None = None, rngs: nnx.Rngs | None = None):
        """Continue from `state` (a tuple with one state per layer, or None for zeros). Return logits and the new state."""
        restart = None
        if segments is not None:
            restart = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
        state = (None,) * len(self.layers) if state is None else state
        x = dropout(self.embed(tokens), self.dropout, rngs)
        after = []
        for layer, before in zip(self.layers, state, strict=True):
            x, (last,) = run_layer([layer], x, None if before is None else (before,), None, restart, self.kernel)
            x = dropout(x, self.dropout, rngs)
            after.append(last)
        return self._logits(x), tuple(after)


def resolve_implementation(model: nnx.Module, platform: str | None, dtype=jnp.float32) -> dict[str, str]:
    """Return the kernel of a model's recurrent layers, after checking that it runs on the platform.

    Args:
      model: a module of arrays or of shapes.
      platform: `cpu`, `gpu` or `tpu`; None if it is not known yet.
      dtype: of the computation.

    Returns:
      The kernel that was requested (`asked`), the one that is `used`, and `why`. Empty for a model without a choice.

    Raises:
      ValueError: the kernel cannot run on the platform; the message says why.
    """
    kernels = {module.kernel for _, module in nnx.iter_modules(model) if isinstance(module, (Recurrent, RecurrentLM))}
    if not kernels:
        return {}
    (kernel,) = kernels
    if kernel == "cudnn" and platform is not None:
        cudnn.check_place(platform, dtype)
    return {"asked": kernel, "used": kernel, "why": "set by model.kernel"}


def _orthogonal_gates(key: jax.Array, width: int, gates: int) -> jax.Array:
    """Return [H, gates * H]: an orthogonal matrix for each gate (Saxe et al. 2014)."""
    init = nnx.initializers.orthogonal()
    return jnp.concatenate([init(k, (width, width)) for k in jax.random.split(key, gates)], axis=1)
