"""cuDNN's fused LSTM, for a GPU: a whole layer in one kernel, with the parameters of our own layers.

Shapes: B batch, T time, D width in, H width of a layer.
"""

import jax
import jax.numpy as jnp
from jax.experimental import rnn

from jaxmodels.models.lora import matrix
from jaxmodels.parallel.layout import on_each_device


def check(kernel: str, cell: str) -> None:
    """Raises ValueError where a kernel cannot run: cuDNN's is for LSTMs, and for a GPU."""
    if kernel not in ("xla", "cudnn"):
        raise ValueError(f"kernel must be 'xla' or 'cudnn', got {kernel!r}")
    if kernel == "cudnn" and cell != "lstm":
        raise ValueError(f"kernel='cudnn' runs LSTMs only, not cell={cell!r}; use kernel='xla'")
    if kernel == "cudnn":
        check_place(jax.default_backend(), jnp.float32)


def check_place(platform: str, dtype) -> None:
    """Raises ValueError unless cuDNN's LSTM runs on a platform, in a type: a GPU, float32."""
    if platform != "gpu":
        raise ValueError(f"kernel='cudnn' needs a GPU, and JAX runs on the {platform} here; use kernel='xla'")
    if dtype != jnp.float32:
        raise ValueError(f"kernel='cudnn' computes in float32, not {jnp.dtype(dtype).name}: use kernel='xla' with other precisions")


def pack(cells) -> jax.Array:
    """The parameters of a layer's directions in cuDNN's order, float [n].

    All matrices first (input, then recurrent, of each direction), transposed to [4H, D] and [4H, H], then all biases. The
    gates are in our order. cuDNN has a second bias, on the recurrent product, which stays zero.
    """
    matrices = [part.T.ravel() for cell in cells for part in (matrix(cell.input), cell.recurrent[...])]
    biases = [part for cell in cells for part in (cell.input.bias[...], jnp.zeros_like(cell.input.bias[...]))]
    return jnp.concatenate([*matrices, *biases])


def lstm(cells, x: jax.Array, states, valid: jax.Array | None):
    """One layer of one or two directions.

    Args:
      cells: an LSTM for each direction.
      x: float32 [B, T, D].
      states: (hidden, cell) for each direction, each [B, H]; or None for zeros.
      valid: bool [B, T] or None; padding must lie at the end of rows.

    Returns:
      outputs [B, T, H] or [B, T, 2H], zero at padding, and the last states in the form of `states`.

    Raises:
      ValueError: x is not float32, which is all that JAX's call of cuDNN takes.
    """
    check_place("gpu", x.dtype)  # the type alone: a module that stands alone has not been settled
    batch, time, width_in = x.shape
    width = cells[0].width
    if states is None:
        states = [cell.initial_state(batch, x.dtype) for cell in cells]
    hidden, cell = (jnp.stack(parts) for parts in zip(*states, strict=True))
    lengths = jnp.full(batch, time, jnp.int32) if valid is None else valid.sum(axis=1, dtype=jnp.int32)
    # cuDNN takes no empty rows: they run one step, which is then left out.
    # The compiler cannot spread the call: each device runs its own rows.
    rows, first = ("batch", None, None), (None, "batch", None)
    run = on_each_device(
        lambda x, hidden, cell, weights, lengths: rnn.lstm(x, hidden, cell, weights, lengths, width_in, width, 1, 0.0, len(cells) == 2),
        [rows, first, first, (None,), ("batch",)],
        (rows, first, first),
    )
    outputs, last_hidden, last_cell = run(x, hidden, cell, pack(cells), jnp.maximum(lengths, 1))
    if valid is not None:
        outputs = jnp.where(valid[:, :, None], outputs, 0)
        empty = (lengths == 0)[None, :, None]
        last_hidden, last_cell = jnp.where(empty, hidden, last_hidden), jnp.where(empty, cell, last_cell)
    return outputs, tuple((last_hidden[i], last_cell[i]) for i in range(len(cells)))
