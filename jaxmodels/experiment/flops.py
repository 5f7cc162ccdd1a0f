"""FLOPs of a model, counted on its trace."""

import dataclasses
from typing import Any, NamedTuple

import jax

from jaxmodels.experiment.build import build_model
from jaxmodels.hardware.flops import jaxpr_flops


class ModelFlops(NamedTuple):
    """Operations of a train step over all devices: all, and without the pairs of queries and keys that causal masks and windows leave out."""

    all: int
    attended: int


def model_flops(experiment: Any) -> ModelFlops:
    """Operations in the matrix products and convolutions of one train step; what is computed again in the backward pass counts once.

    Args:
      experiment: on its devices or not: the step is counted as it is on one, where nothing waits in a pipeline.
    """
    policy = {"remat": "none", "offload": (), "attention": "xla"}  # kernels leave out some of what masks cover
    policy = {key: value for key, value in policy.items() if key in experiment.config["model"]}
    config = experiment.config | {"model": experiment.config["model"] | policy}
    task, build = build_model(config, experiment.dataset.info)
    plain = dataclasses.replace(experiment, config=config, task=task, build=build, platform=None, layout=None)
    batch, key = plain.batch_shapes(plain.loading.batch_size), jax.eval_shape(lambda: jax.random.key(0))
    jaxpr = jax.make_jaxpr(plain.step_function())(plain.state_shapes(), batch, key).jaxpr
    return ModelFlops(jaxpr_flops(jaxpr), jaxpr_flops(jaxpr, attended=True))
