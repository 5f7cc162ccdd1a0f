"""Save the train step of a config for the CPU devices of this process, as `jaxmodels plan --save` does for absent chips.

`python save_step.py CONFIG FOLDER DEVICES [HOST:PORT PROCESS]`: with the last two arguments it is one of two processes, and the first saves.
"""

import sys

import jax

from jaxmodels.config import load_config
from jaxmodels.distributed import processes, session
from jaxmodels.experiment.build import build_experiment
from jaxmodels.parallel import mesh as mesh_lib
from jaxmodels.parallel import sharding as sharding_lib
from jaxmodels.plan.compiler import CompiledStep
from jaxmodels.training import executable
from jaxmodels.training.compile import compile_train_step

FIGURES = {"step_seconds": 1000.0, "peak_bytes_per_device": 10**12}


def compiled_here(config) -> CompiledStep:
    """Return the train step, compiled from shapes."""
    experiment = build_experiment(config)
    mesh = mesh_lib.make_mesh(experiment.mesh)
    layout = sharding_lib.make_layout(mesh, experiment.sharding)
    experiment = experiment.on("cpu", layout)
    shapes = sharding_lib.place_state(experiment.state_shapes(), experiment.sharding, layout)
    key = jax.eval_shape(lambda: jax.random.key(0))
    compiled, record = compile_train_step(experiment, mesh, shapes, shapes, key)
    return CompiledStep(compiled, shapes, mesh, layout, record, experiment)


def main(config: str, folder: str, devices: str, coordinator: str | None = None, process: str | None = None) -> None:
    mesh_lib.simulate_devices(int(devices))
    jax.config.update("jax_enable_compilation_cache", False)  # as `plan --save` does: a CPU's program that came from the cache cannot be saved again
    if coordinator is not None:
        session.join(processes.find(coordinator, "2", process), {})
    step = compiled_here(load_config(config))
    if session.is_first():
        executable.save(step, folder, FIGURES)
    session.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
