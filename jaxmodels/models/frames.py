"""A recurrent network over frames, such as those of speech or handwriting.

Shapes: B batch, T time, D width of a frame, H width of a layer, C classes.
"""

from typing import Literal

import jax
from flax import nnx

from jaxmodels.models.layers import Linear, check_rate, check_sizes, dropout
from jaxmodels.models.rnn import Recurrent

SIZES = {"lstm_frames": {"cell": "lstm"}, "gru_frames": {"cell": "gru"}}


class RecurrentFrames(nnx.Module):
    """LSTM or GRU layers over frames, in both directions, and logits at every frame (Graves et al. 2006)."""

    def __init__(
        self,
        frame_width: int,
        head: tuple[str, int],
        *,
        cell: Literal["lstm", "gru"] = "lstm",
        layers: int = 1,
        width: int = 128,
        bidirectional: bool = True,
        dropout: float = 0.0,
        kernel: Literal["xla", "cudnn"] = "xla",
        unroll: int = 1,
        rngs: nnx.Rngs,
    ):
        """
        Args:
          frame_width: D.
          head: ("tokens", C): C logits at every frame.
          cell: `lstm` or `gru`.
          layers: number of layers.
          width: H, of each direction.
          bidirectional: whether layers have a backward direction.
          dropout: rate between layers, and before the head.
          kernel: `xla`, or `cudnn`, as in the other recurrent models.
          unroll: time steps per turn of the compiled loop.
          rngs: draws the initial parameters from its `params` stream.
        """
        kind, classes = head
        if kind != "tokens":
            raise ValueError(f"the head of a model of frames must be ('tokens', C), got {kind!r}")
        check_rate(dropout)
        check_sizes(frame_width=frame_width)
        options = {"cell": cell, "layers": layers, "bidirectional": bidirectional, "dropout": dropout, "kernel": kernel, "unroll": unroll}
        self.encoder = Recurrent(frame_width, width, **options, rngs=rngs)
        self.head = Linear(self.encoder.width_out, classes, rngs=rngs)
        self.dropout = dropout

    def __call__(self, frames: jax.Array, *, valid: jax.Array | None = None, rngs: nnx.Rngs | None = None) -> jax.Array:
        """frames: float [B, T, D]; valid: bool [B, T], False at padding. Returns logits [B, T, C], computed in the dtype of the parameters."""
        x, _ = self.encoder(frames.astype(self.head.kernel.dtype), valid=valid, rngs=rngs)
        return self.head(dropout(x, self.dropout, rngs))
