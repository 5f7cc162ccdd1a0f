"""The train state."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxmodels.models.functional import combine


@struct.dataclass
class TrainState:
    """All that training changes, and so all that a checkpoint holds.

    Attributes:
      step: updates made so far, int32.
      params: trained parameters, float32, nested by module.
      frozen: the other parameters, which no step changes.
      stats: what modules change as they run (running means), nested likewise.
      opt_state: of Optax.
      ema: moving average of `params`, or an empty dict.
      metrics: (sum, weight) since the last log line, so that a line is the same after a resume.
      diverged_at: the first step whose loss, gradients or update were not finite; 0 while there is none.
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
        """All parameters that a run is judged by: of the trained ones their moving average, where it keeps one."""
        return combine(self.ema or self.params, self.frozen)


def weights_alone(params: dict, stats: dict) -> TrainState:
    """A state of weights and statistics that nothing trains: for where these lie on devices."""
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    return TrainState(step=scalar, params=params, frozen={}, stats=stats, opt_state={}, ema={}, metrics={}, diverged_at=scalar)
