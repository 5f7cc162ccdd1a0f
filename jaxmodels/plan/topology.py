"""A train step compiled for TPUs that are not here: does it compile, does it fit, what does it cost?

Package `libtpu` holds the TPU's compiler; it needs no TPU, and the process itself may be one for CPUs (`JAX_PLATFORMS=cpu`).
"""

import dataclasses
import importlib.util
import os
import re
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from jaxmodels.errors import ConfigError, RunError
from jaxmodels.experiment import Experiment
from jaxmodels.parallel import mesh as mesh_lib
from jaxmodels.parallel import sharding as sharding_lib
from jaxmodels.parallel.layout import Layout
from jaxmodels.training.compile import CompileRecord, compile_train_step

# Memory of a chip in 10**9 bytes, as Google's pages on the generations state it (cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e).
# The compiler itself lets a program have somewhat less: the rest is the runtime's.
HBM_GB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}

# Chips whose two cores are one device, unless the compiler is told otherwise.
_MEGACORE = ("v4",)


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A train step, compiled.

    Attributes:
      compiled: as `jax.jit(...).lower(...).compile()` gives.
      shapes: of the train state, with shardings.
      mesh: of the topology's devices.
      layout: of the step; its `left_whole` tells what could not be spread.
      record: how long it took.
      experiment: as it is on that mesh; its `kernels` tell which implementations run.
    """

    compiled: Any
    shapes: Any
    mesh: Mesh
    layout: Layout
    record: CompileRecord
    experiment: Experiment


def generation(topology: str) -> str:
    """`v5p` of `v5p:4x4x4`.

    Raises:
      ConfigError: it is not written so, or no generation that is known here.
    """
    match = re.fullmatch(r"(\w+):\d+(x\d+){1,2}", topology)
    if match is None or match[1] not in HBM_GB:
        raise ConfigError(f"a topology is one of {', '.join(HBM_GB)} and its chips, such as v5p:4x4x4 or v6e:8x8; got {topology!r}.")
    return match[1]


def devices(topology: str, slices: int = 1) -> list:
    """The devices of a TPU topology, to compile for; they can run nothing.

    Args:
      topology: of one slice, such as `v5p:4x4x4` or `v6e:8x8`.
      slices: how many there are, on the network between them.

    Raises:
      ConfigError: libtpu is not installed; or it makes no such topology.
    """
    kind = generation(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("libtpu, the compiler for TPUs, is not installed, and is needed here: pip install 'jaxmodels[plan]'")
    if os.environ.get("TPU_SKIP_MDS_QUERY") == "1":
        # JAX found no TPU here and set this, lest libtpu ask the cloud's metadata server, in vain and for minutes. These keep it from
        # asking for, and complaining of, what else that would have said.
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        # Several processes may compile at a time; only one could use a TPU.
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options: dict[str, Any] = {"num_slices": slices}
    if kind in _MEGACORE:
        options["chip_config_name"] = "megacore"
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        raise ConfigError(f"libtpu makes no topology {topology!r}: {_first_line(error)}") from error


def compile_step(experiment: Experiment, topology: str) -> CompiledStep:
    """Compiles the train step of a run, the one that `jaxmodels train` would run, for a TPU topology.

    Args:
      experiment: as `build_experiment` gives. Its mesh is made of the topology's devices; `mesh.slices` says how many slices of it.
      topology: of one slice, such as `v5p:4x4x4`.

    Raises:
      ConfigError: mesh, batch, or a kernel that is asked for, does not fit the topology.
      RunError: it needs more memory than a chip has; says how much.
    """
    if experiment.config["partition"] == "pmap":
        raise ConfigError("config.partition=pmap runs on devices that are here alone; to compile for others, use --config.partition=jit.")
    mesh = mesh_lib.make_mesh(experiment.mesh, devices(topology, max(1, experiment.mesh.slices)))
    layout = sharding_lib.make_layout(mesh, experiment.sharding)
    experiment = experiment.on("tpu", layout)
    mesh_lib.check_batch(experiment.loading.batch_size, experiment.training.accumulate, mesh, "data.batch_size", layout.microbatches)
    shapes = sharding_lib.place_state(experiment.state_shapes(), experiment.sharding, layout)
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=mesh_lib.replicated(mesh))
    try:
        compiled, record = compile_train_step(experiment, mesh, shapes, shapes, key)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise RunError(
            f"the step does not fit {topology}: {_first_line(error)}; try a smaller data.batch_size, a larger training.accumulate, "
            "model.remat='full', or a mesh that spreads the state further (mesh.fsdp, mesh.tensor)."
        ) from error
    return CompiledStep(compiled, shapes, mesh, layout, record, experiment)


def memory(compiled: Any) -> dict[str, int]:
    """Bytes on each device while a compiled function runs.

    Returns:
      arguments, outputs, temporaries, and aliased (outputs that take the place of donated arguments); total, without the
      aliased ones counted twice.
    """
    found = compiled.memory_analysis()
    parts = {
        "arguments": found.argument_size_in_bytes,
        "outputs": found.output_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "aliased": found.alias_size_in_bytes,
    }
    return parts | {"total": parts["arguments"] + parts["outputs"] + parts["temporaries"] - parts["aliased"]}


def cost(compiled: Any) -> dict[str, float]:
    """What the compiler counts for one device: floating-point operations, and bytes read and written."""
    found = compiled.cost_analysis()
    return {"flops": found["flops"], "bytes": found["bytes accessed"]}


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].removesuffix(".")
