"""Runs with random weights, written without training."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels.experiment.build import build_experiment, build_model
from jaxmodels.experiment.sections import resolve
from jaxmodels.models.functional import flatten, new_rngs, split
from jaxmodels.parallel import mesh, sharding
from jaxmodels.runs.checkpoint import Checkpoints, Progress
from jaxmodels.runs.folder import RunFolder
from jaxmodels.runs.merge import new_folder, write_run
from jaxmodels.training.initialize import check_parent, start


def untrained_run(config: dict, info: dict, path) -> str:
    """Write the folder of a finished run with random parameters and statistics; return its path. `info` describes its data set."""
    resolved = resolve(config)
    _, build = build_model(resolved, info)
    params, stats = (flatten(tree) for tree in split(nnx.eval_shape(lambda: build(new_rngs(params=0))))[1:])
    random = np.random.default_rng(0)
    params = {name: jnp.asarray(0.2 * random.standard_normal(x.shape, np.float32)) for name, x in params.items()}
    stats = {name: jnp.asarray(random.uniform(0.5, 1.5, x.shape).astype(np.float32)) for name, x in stats.items()}
    tokenizer = info.get("tokenizer")
    write_run(new_folder(str(path)), resolved, params, stats, 0, info=info, tokenizer=tokenizer and tokenizer.to_json(), parents=[])
    return str(path)


def begun_run(config: dict, data: dict, path) -> str:
    """Write the folder of a run saved before its first step, with the weights of `init_from` if the config has it; return its path."""
    experiment = build_experiment(config, data=data)
    check_parent(experiment)
    layout = sharding.make_layout(mesh.make_mesh(experiment.mesh), experiment.sharding)
    shapes = sharding.place_state(experiment.state_shapes(), experiment.sharding, layout)
    folder = RunFolder(path)
    folder.write_config(experiment.config)
    folder.update_manifest(info={key: value for key, value in experiment.dataset.info.items() if key != "tokenizer"})
    folder.identify()
    checkpoints = Checkpoints(folder.checkpoints, save_frozen=not experiment.frozen_in_parent)
    begun, *_ = start(experiment, folder, checkpoints, shapes, jax.random.key(0))
    checkpoints.save(begun, Progress(finished=True))
    checkpoints.close()
    return str(path)
