"""The last checkpoint and the metrics of a run folder, to compare two runs."""

import jax
import numpy as np

from jaxmodels.runs import checksums
from jaxmodels.runs.checkpoint import Checkpoints
from jaxmodels.runs.folder import RunFolder

TIMES = {"seconds", "steps_per_second", "examples_per_second", "data_wait"}


def final_state(workdir):
    """Return the arrays of the last checkpoint by path, and the lines of metrics.jsonl without times."""
    checkpoints = Checkpoints(RunFolder(workdir).checkpoints, read_only=True)
    step = checkpoints.steps()[-1]
    parts = ("params", "ema", "stats", "opt_state", "metrics", "step", "diverged_at")
    shapes = checkpoints.shapes(step, *parts)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {k: v for k, v in shapes.items() if not isinstance(v, dict) or v}
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), wanted)
    arrays = checkpoints.restore_part(step, wanted)
    checkpoints.close()
    metrics = [{k: v for k, v in line.items() if k not in TIMES} for line in RunFolder(workdir).metrics()]
    return {path: np.asarray(x) for path, x in checksums.flatten(arrays).items()}, metrics
