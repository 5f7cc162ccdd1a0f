"""The train step of an experiment as a run compiles it, on one CPU device, for benchmarks."""

from typing import Any

import jax

from jaxmodels.experiment.experiment import Experiment
from jaxmodels.parallel import mesh as mesh_lib
from jaxmodels.parallel import sharding as sharding_lib
from jaxmodels.training.compile import compile_train_step


def run_step(experiment: Experiment) -> tuple[Any, Any, jax.Array, jax.sharding.Mesh]:
    """Return the compiled step, the initial state, the key and the mesh."""
    mesh_lib.run_large_steps_here(experiment.state_shapes())
    mesh = mesh_lib.make_mesh(experiment.mesh, jax.devices()[:1])
    experiment = experiment.on("cpu", sharding_lib.make_layout(mesh, experiment.sharding))
    shapes = sharding_lib.place_state(experiment.state_shapes(), experiment.sharding, experiment.layout)
    key = jax.device_put(jax.random.key(0), mesh_lib.replicated(mesh))
    compiled, _ = compile_train_step(experiment, mesh, shapes, shapes, key)
    state = jax.jit(experiment.init_function(), out_shardings=jax.tree.map(lambda x: x.sharding, shapes))(key)
    return compiled, state, key, mesh
