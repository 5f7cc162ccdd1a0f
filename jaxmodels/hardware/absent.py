"""Devices that are not present, to compile for.

Package `libtpu` holds the TPU compiler, JAX's CUDA plugin the GPU compiler. Both work in a process for CPUs (`JAX_PLATFORMS=cpu`). The GPU compiler reads a
description of a GPU. It needs no driver and no CUDA libraries, except cuDNN for cuDNN's attention. It does not autotune.
"""

import importlib.util
import math
import os
from typing import Any

import jax
from jax.experimental import topologies

from jaxmodels.errors import ConfigError
from jaxmodels.hardware.chips import CHIPS
from jaxmodels.hardware.topologies import Topology, written

# The plugin must have JAX's own version, which no extra of this package can state; the rest of CUDA is not needed to compile.
INSTALL_CUDA = f"pip install --no-deps jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=={jax.__version__} nvidia-cudnn-cu13"
INSTALL = {"tpu": "pip install 'jaxmodels[plan]'", "gpu": INSTALL_CUDA}
_NAMES = {"tpu": "libtpu, the compiler for TPUs,", "gpu": "JAX's CUDA plugin, the compiler for GPUs,"}
_MODULES = {"tpu": ("libtpu",), "gpu": ("jax_cuda13_plugin", "jax_cuda12_plugin")}

# Fields of XLA's `GpuTargetConfigProto`, from NVIDIA's data sheets and tuning guides (docs.nvidia.com/cuda/ampere-tuning-guide and /hopper-tuning-guide).
# `device_memory_size` is about what drivers leave of 80 GB and 141 GB; the compiler saves memory where a step needs more.
_FIGURES = {
    "a100": {"core_count": 108, "fpus_per_core": 64, "shared_memory_per_core": 167936, "shared_memory_per_block_optin": 166912, "clock_rate_ghz": 1.41,
             "memory_bandwidth": 2039000000000, "l2_cache_size": 41943040, "device_memory_size": 84987740160},
    "h100": {"core_count": 132, "fpus_per_core": 128, "shared_memory_per_core": 233472, "shared_memory_per_block_optin": 232448, "clock_rate_ghz": 1.98,
             "memory_bandwidth": 3352320000000, "l2_cache_size": 52428800, "device_memory_size": 84929347584},
    "h200": {"core_count": 132, "fpus_per_core": 128, "shared_memory_per_core": 233472, "shared_memory_per_block_optin": 232448, "clock_rate_ghz": 1.98,
             "memory_bandwidth": 4814000000000, "l2_cache_size": 52428800, "device_memory_size": 150000000000},
}  # fmt: skip
_CAPABILITY = {"a100": (8, 0), "h100": (9, 0), "h200": (9, 0)}
_SHARED = {
    "threads_per_block_limit": 1024, "threads_per_warp": 32, "shared_memory_per_block": 49152, "threads_per_core_limit": 2048, "block_dim_limit_x": 2147483647,
    "block_dim_limit_y": 65535, "block_dim_limit_z": 65535, "registers_per_core_limit": 65536, "registers_per_block_limit": 65536,
}  # fmt: skip


def has_compiler(platform: str) -> bool:
    """Return whether the compiler for `tpu` or `gpu` is installed."""
    return any(importlib.util.find_spec(name) is not None for name in _MODULES[platform])


def missing(platform: str) -> str:
    """Return the message that a compiler is not installed, and how to install it."""
    return f"{_NAMES[platform]} is not installed ({INSTALL[platform]})"


def devices(topology: Topology) -> list:
    """Return the devices of a topology. They can run nothing.

    Raises:
      ConfigError: the compiler is not installed, or does not support the topology.
    """
    if not has_compiler(topology.chip.platform):
        raise ConfigError(f"{missing(topology.chip.platform)}, and is needed here.")
    try:
        return list((_tpus if topology.chip.platform == "tpu" else _gpus)(topology).devices)
    except (jax.errors.JaxRuntimeError, RuntimeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0].rstrip(" .") or type(error).__name__
        hint = (
            f" Set JAX_PLATFORMS=cpu to keep it from looking for a GPU; it must have JAX's version: {INSTALL_CUDA}" if topology.chip.platform == "gpu" else ""
        )
        raise ConfigError(f"{_NAMES[topology.chip.platform].partition(',')[0]} does not support topology {topology.name!r}: {reason}.{hint}") from error


def _tpus(topology: Topology) -> Any:
    if os.environ.get("TPU_SKIP_MDS_QUERY") == "1":
        # JAX found no TPU and set this, so that libtpu does not wait minutes for the cloud's metadata server. These variables answer what libtpu would
        # ask there, and let several processes compile at a time, although only one could use a TPU.
        defaults = {"TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        os.environ.update(defaults | {name: value for name, value in os.environ.items() if name in defaults})
    options: dict[str, Any] = {"num_slices": topology.slices}
    if topology.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # the two cores of a chip as one device, the default for v5p
    if math.prod(topology.grid) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    return topologies.get_topology_desc(platform="tpu", topology_name=written(topology.chip, topology.grid), **options)


def _gpus(topology: Topology) -> Any:
    shape = f"1x{topology.slices}x{math.prod(topology.grid)}"
    return topologies.get_topology_desc(platform="cuda", topology=shape, target_config=target_config(topology.chip.name))


def target_config(chip: str) -> str:
    """Return the description of a GPU that the compiler reads, as text."""
    figures = "\n".join(f"  {name}: {value}" for name, value in (_SHARED | _FIGURES[chip]).items())
    major, minor = _CAPABILITY[chip]
    capability = f"  cuda_compute_capability {{ major: {major} minor: {minor} }}"
    versions = "dnn_version_info { major: 9 minor: 12 }\nruntime_version { major: 13 }"
    (kind, *_) = CHIPS[chip].device_kinds
    return f'gpu_device_info {{\n{figures}\n{capability}\n}}\nplatform_name: "CUDA"\n{versions}\ndevice_description_str: "{kind}"\n'


def compiler_options(topology: Topology) -> dict[str, bool]:
    """Return the options for compiling without a GPU: no autotuning, and the compiler's estimates in the program if it has a table of the GPU."""
    if topology.chip.platform == "tpu":
        return {}
    hopper = _CAPABILITY[topology.chip.name] >= (9, 0)
    return {"xla_gpu_enable_triton_gemm": False} | ({"xla_gpu_collect_cost_model_stats": True} if hopper else {})
