"""cuDNN's fused LSTM for GPUs: a whole layer in one kernel, with the parameters of `rnn.LSTM`.

Shapes: B batch, T time, D width in, H width of a layer.
"""

import jax
import jax.numpy as jnp
from jax.experimental import rnn

from jaxmodels.models.lora import matrix
from jaxmodels.parallel.layout import on_each_device


def check(kernel: str, cell: str) -> None:
    """Check the name of a kernel.

    Raises:
      ValueError: it is unknown, or cuDNN's with another cell than an LSTM.
    """
    if kernel not in ("xla", "cudnn"):
        raise ValueError(f"kernel must be 'xla' or 'cudnn', got {kernel!r}")
    if kernel == "cudnn" and cell != "lstm":
        raise ValueError(f"kernel='cudnn' runs LSTMs only, not cell={cell!r}; use kernel='xla'")
    if kernel == "cudnn":
        check_place(jax.default_backend(), jnp.float32)


def check_place(platform: str, dtype) -> None:
    """Check that cuDNN's LSTM runs on a platform, in a dtype.

    Raises:
      ValueError: the platform is not a GPU, or the dtype not float32.
    """
    if platform != "gpu":
        raise ValueError(f"kernel='cudnn' needs a GPU, but the platform is {platform}; use kernel='xla'")
    if dtype != jnp.float32:
        raise ValueError(f"kernel='cudnn' computes in float32, not {jnp.dtype(dtype).name}: use kernel='xla' with other precisions")


def pack(cells) -> jax.Array:
    """Return the parameters of a layer's directions in cuDNN's order, float [n].

    First come all matrices (input, then recurrent, of each direction), transposed to [4H, D] and [4H, H], then all biases. The
    gates have the order of `rnn.LSTM`. cuDNN's second bias, on the recurrent product, is zero.
    """
    matrices = [part.T.ravel() for cell in cells for part in (matrix(cell.input), cell.recurrent[...])]
    biases = [part for cell in cells for part in (cell.input.bias[...], jnp.zeros_like(cell.input.bias[...]))]
    return jnp.concatenate([*matrices, *biases])


def lstm(cells, x: jax.Array, states, valid: jax.Array | None):
    """Run one layer of one or two directions.

    Args:
      cells: an LSTM for each direction.
      x: float32 [B, T, D].
      states: (hidden, cell) for each direction, each [B, H]; or None for zeros.
      valid: bool [B, T] or None; padding must be at the end of rows.

    Returns:
      outputs [B, T, H] or [B, T, 2H], zero at padding, and the last states in the form of `states`.

    Raises:
      ValueError: x is not float32, the only type of JAX's cuDNN call.
    """
    check_place("gpu", x.dtype)  # only the dtype: a module outside of an experiment has no resolved platform
    batch, time, width_in = x.shape
    width = cells[0].width
    if states is None:
        states = [cell.initial_state(batch, x.dtype) for cell in cells]
    hidden, cell = (jnp.stack(parts) for parts in zip(*states, strict=True))
    lengths = jnp.full(batch, time, jnp.int32) if valid is None else valid.sum(axis=1, dtype=jnp.int32)
    # cuDNN rejects empty rows: they run one step, whose output is dropped.
    # The compiler cannot partition the call: each device runs its own rows.
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
