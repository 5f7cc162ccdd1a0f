"""The compiler for NVIDIA GPUs, without a GPU: JAX's CUDA plugin, given a description of one.

It needs no driver and no CUDA libraries, except cuDNN for cuDNN's attention, whose version JAX asks for. Nothing is autotuned: matrix products all go to cuBLAS,
and cuDNN's algorithms stay open.
"""

import importlib.util
import math
from typing import Any

import jax
from jax.experimental import topologies

from jaxmodels.errors import ConfigError
from jaxmodels.hardware.chips import CHIPS

# The plugin must have JAX's own version, which no extra of ours can state; the rest of CUDA is not needed to compile.
INSTALL = f"pip install --no-deps jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=={jax.__version__} nvidia-cudnn-cu13"

MODELS_ARE_LOW = "for GPUs the memory model was 25 to 33% below the compiler (docs/estimates.md)"
NOT_TRIED = "compiled without a GPU, so nothing was autotuned; predictions for GPUs have not been measured (docs/estimates.md)"
JAX_SHARE = 0.75  # docs.jax.dev/en/latest/gpu_memory_allocation.html

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


def memory_notes(peak: int, topology: Any) -> list[str]:
    """Return a note if a step needs more of a GPU's memory than JAX allocates by default."""
    if peak <= JAX_SHARE * topology.chip.memory_per_device:
        return []
    return [f"JAX allocates {JAX_SHARE:.0%} of a GPU's memory by default, and this step needs more: XLA_PYTHON_CLIENT_MEM_FRACTION=.95"]


def has_compiler() -> bool:
    """Whether JAX's CUDA plugin is installed."""
    return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") is not None for version in (13, 12))


def target_config(chip: str) -> str:
    """Return the description of a GPU that its compiler reads, as text."""
    figures = "\n".join(f"  {name}: {value}" for name, value in (_SHARED | _FIGURES[chip]).items())
    major, minor = _CAPABILITY[chip]
    capability = f"  cuda_compute_capability {{ major: {major} minor: {minor} }}"
    versions = "dnn_version_info { major: 9 minor: 12 }\nruntime_version { major: 13 }"
    (kind, *_) = CHIPS[chip].device_kinds
    return f'gpu_device_info {{\n{figures}\n{capability}\n}}\nplatform_name: "CUDA"\n{versions}\ndevice_description_str: "{kind}"\n'


def devices(topology: Any) -> list:
    """Return the GPUs of a topology, to compile for; they can run nothing.

    Raises:
      ConfigError: JAX's CUDA plugin is not installed, or makes no such topology.
    """
    if not has_compiler():
        raise ConfigError(f"JAX's CUDA plugin, the compiler for GPUs, is not installed, and is needed here: {INSTALL}")
    shape = f"1x{topology.slices}x{math.prod(topology.grid)}"
    try:
        return list(topologies.get_topology_desc(platform="cuda", topology=shape, target_config=target_config(topology.chip.name)).devices)
    except (jax.errors.JaxRuntimeError, RuntimeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0].rstrip(" .") or type(error).__name__
        raise ConfigError(
            f"JAX's CUDA plugin makes no topology {topology.name!r}: {reason}. Set JAX_PLATFORMS=cpu to keep it from looking for a GPU; it must have JAX's version: {INSTALL}"
        ) from error


def compiler_options(topology: Any) -> dict[str, bool]:
    """Return the options for compiling without a GPU: no autotuning, and the compiler's own estimates in the program where it has a table of the GPU."""
    hopper = _CAPABILITY[topology.chip.name] >= (9, 0)
    return {"xla_gpu_enable_triton_gemm": False} | ({"xla_gpu_collect_cost_model_stats": True} if hopper else {})
