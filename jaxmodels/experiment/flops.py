"""FLOPs of a train step, counted in its jaxpr."""

import dataclasses
from typing import Any, NamedTuple

import jax

from jaxmodels.experiment.build import build_model
from jaxmodels.hardware.flops import jaxpr_flops


class ModelFlops(NamedTuple):
    """FLOPs of a train step over all devices.

    Attributes:
      all: FLOPs with all query–key pairs.
      attended: FLOPs with only the query–key pairs that causal masks and windows allow.
    """

    all: int
    attended: int


def model_flops(experiment: Any) -> ModelFlops:
    """Return the FLOPs of the matrix products and convolutions of one train step; rematerialised operations count once.

    Args:
      experiment: an experiment with or without devices; the step is counted for one device, without pipeline bubbles.
    """
    policy = {"remat": "none", "offload": (), "attention": "xla"}  # attention kernels skip some masked blocks
    policy = {key: value for key, value in policy.items() if key in experiment.config["model"]}
    config = experiment.config | {"model": experiment.config["model"] | policy}
    task, build = build_model(config, experiment.dataset.info)
    plain = dataclasses.replace(experiment, config=config, task=task, build=build, platform=None, layout=None)
    batch, key = plain.batch_shapes(plain.loading.batch_size), jax.eval_shape(lambda: jax.random.key(0))
    jaxpr = jax.make_jaxpr(plain.step_function())(plain.state_shapes(), batch, key).jaxpr
    return ModelFlops(jaxpr_flops(jaxpr), jaxpr_flops(jaxpr, attended=True))
