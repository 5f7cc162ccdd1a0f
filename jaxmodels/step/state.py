"""The train state."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxmodels.models.functional import combine


@struct.dataclass
class TrainState:
    """Everything that training changes, which is what a checkpoint holds.

    Attributes:
      step: number of updates so far, int32.
      params: trained parameters, float32, nested by module.
      frozen: the other parameters, which no step changes.
      stats: variables that modules update as they run, such as running means, nested likewise.
      opt_state: of Optax.
      ema: moving average of `params`, or an empty dict.
      metrics: (sum, weight) since the last log line, so that a line is the same after a resume.
      diverged_at: the first step whose loss, gradients or update were not finite; 0 if there is none.
    """

    step: jax.Array
    params: Any
    frozen: Any
    stats: Any
    opt_state: Any
    ema: Any
    metrics: Any
    diverged_at: jax.Array

    @property
    def weights(self):
        """Parameters used for evaluation: the EMA if one is kept, else the trained parameters, plus the frozen ones."""
        return combine(self.ema or self.params, self.frozen)


def weights_alone(params: dict, stats: dict) -> TrainState:
    """Return a state of parameters and statistics only, for placing them on devices."""
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    return TrainState(step=scalar, params=params, frozen={}, stats=stats, opt_state={}, ema={}, metrics={}, diverged_at=scalar)
