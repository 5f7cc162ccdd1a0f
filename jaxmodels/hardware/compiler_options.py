"""XLA compiler options that make train steps faster, by chip, and for CPUs. An option that the compiler rejects is not used, with a warning.

They are arguments of each compilation, not environment variables. A step compiled for absent devices thus gets the same options as on
those devices.
"""

import dataclasses
import difflib
import functools
import importlib.util
import mmap
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.errors import ConfigError
from jaxmodels.hardware.chips import chip_of

Value = bool | int | float | str


@dataclasses.dataclass(frozen=True)
class Option:
    """One compiler option.

    Attributes:
      name: name of the option.
      value: value, of the type that the compiler expects.
      why: the measured effect.
      convolutions: whether to use it also for models whose parameters are mostly convolution kernels.
    """

    name: str
    value: Value
    why: str
    convolutions: bool = True


# Run collectives on the SparseCores, concurrently with matrix products. (libtpu 0.0.52 has asynchronous all-gathers on the TensorCores for v5e only.)
_SPARSE_CORES = "xla_tpu_enable_sparse_core_collective_offload_"


def _on_sparse_cores(*kinds: str, why: str) -> tuple[Option, ...]:
    return tuple(Option(_SPARSE_CORES + kind, True, why) for kind in kinds)


# By the names of `hardware.chips`, and `cpu`. `xla_tpu_scoped_vmem_limit_kib` limits the vector memory (VMEM) of a fused operation: a larger limit allows larger tiles
# in matrix products. Each option was measured with and without it; `why` states the result.
OPTIONS: dict[str, tuple[Option, ...]] = {
    "v4": (),  # 24 MB of VMEM instead of 16: the same cycles for a block of Llama-2-7B (libtpu 0.0.52)
    "v5e": (
        Option(
            "xla_tpu_scoped_vmem_limit_kib",
            "49152",
            "a block of Llama-2-7B, 4 × 4,096 tokens, forward and backward: 187.0 M estimated cycles instead of 220.7 M; compile time 86 s instead of 23 s (libtpu 0.0.42.1)",
        ),
    ),
    "v5p": (
        Option(
            "xla_tpu_scoped_vmem_limit_kib",
            "49152",
            "a block of Llama-2-7B, 4 × 4,096 tokens, forward and backward: 97.6 M estimated cycles instead of 119.2 M; 65536 saves 0.6% more and compiles "
            "more slowly (libtpu 0.0.52)",
        ),
        *_on_sparse_cores(
            "all_gather",
            "reduce_scatter",
            "all_reduce",
            why="Llama-2-7B on 64 chips: exposed collectives take 1 ms of a step instead of 100 ms (libtpu 0.0.42.1 and 0.0.52)",
        ),
        *_on_sparse_cores(
            "2d_all_gather",
            "3d_all_gather",
            why="Llama-2-70B on 512 chips, parameters in 64 shards over two torus dimensions: a step is 0.7 s shorter with these two options (libtpu 0.0.52)",
        ),
    ),
    "v6e": (
        Option(
            "xla_tpu_scoped_vmem_limit_kib",
            "98304",
            "a matrix product of 8,192³: 1.10 times its time at peak FLOP/s, instead of 1.42 (libtpu 0.0.42.1 and 0.0.52); a block of Llama-3-8B, 4 × 8,192 tokens: "
            "138.8 M cycles, with 65536 147.1 M, with 49152 159.6 M. Not for convolutions: a ResNet with one bottleneck per stage takes 30.2 M cycles with it, "
            "28.7 M without, 28.6 M with 49152, and compiles in 228, 95 and 155 s (libtpu 0.0.52)",
            convolutions=False,
        ),
        *_on_sparse_cores("all_gather", "reduce_scatter", "all_reduce", why="Llama-3-8B on 256 chips: a step is 0.16 s shorter (libtpu 0.0.52)"),
    ),
    "tpu7x": (  # runs collectives on its SparseCores by default
        Option(
            "xla_tpu_scoped_vmem_limit_kib",
            "49152",
            "Llama-2-7B on 64 chips, 2 × 4,096 tokens per core: 1,068 M estimated cycles per step instead of 1,248 M; compile time 108 s instead of 83 s (libtpu 0.0.52)",
        ),
    ),
    "a100": (),
    "h100": (),
    "h200": (),
    "cpu": (
        Option(
            "xla_cpu_experimental_ynn_fusion_type",
            "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE",
            "YNNPACK for products and sums, which is the default, but not for convolutions, whose kernel gradients it computes at 4 GFLOP/s: ResNet-18 takes 0.62 of "
            "the time, the CNN of cnn_mnist 0.80, with batches of 256 0.62; models without convolutions are the same program (`benchmarks/peers.py`, jaxlib 0.10.2)",
        ),
    ),
}

# Platform -> (package, file) of the compiler library that contains the option names; `_LIBRARY` for all others.
_LIBRARIES = {"tpu": ("libtpu", "libtpu.so")}
_LIBRARY = ("jaxlib", "libjax_common.so")


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The options of a compilation.

    Attributes:
      options: options to compile with, as name -> value.
      rejected: default options that this compiler rejects, as name -> its message.
    """

    options: dict[str, Value]
    rejected: dict[str, str]


def choose(requested: Mapping[str, Value | None], device: Any, convolutional: bool = False) -> Chosen:
    """Return the options of a train step for a device: the chip's defaults, overridden by the config.

    Args:
      requested: the section `compiler_options`, as name -> value; None disables a default option.
      device: a device to compile for, which may be absent; with several processes, a device of this process.
      convolutional: whether convolution kernels are most of the model's parameters; some options are not used for such models.

    Raises:
      ConfigError: the compiler rejects an option of the config; the message suggests the nearest existing name.
    """
    chip = chip_of(device.device_kind)
    options, rejected = {}, {}
    for option in OPTIONS.get(chip.name if chip else device.platform, ()):
        suits = option.convolutions or not convolutional
        if option.name not in requested and suits:
            if reason := _rejection(device, option.name, option.value):
                rejected[option.name] = reason
            else:
                options[option.name] = option.value
    for name, value in requested.items():
        if value is None:
            continue
        if reason := _rejection(device, name, value):
            raise ConfigError(
                f"config.compiler_options.{name}={value!r}: the compiler for {device.device_kind} rejects it: {reason}.{_nearest(device, name, reason)}"
            )
        options[name] = value
    return Chosen(options, rejected)


def check(requested: Mapping[str, Any]) -> None:
    """Check the section `compiler_options` as far as possible without a compiler.

    Raises:
      ConfigError: a value of a wrong type, or None for an option that is no chip's default.
    """
    known = sorted({option.name for options in OPTIONS.values() for option in options})
    for name, value in requested.items():
        if value is None and name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"Did you mean {close[0]!r}?" if close else f"The default options are: {', '.join(known) or 'none'}."
            raise ConfigError(f"config.compiler_options.{name}=None disables a default option, but this is not one. {hint}")
        if value is not None and not isinstance(value, Value):
            raise ConfigError(f"config.compiler_options.{name} must be true or false, a number or a string, got {value!r} ({type(value).__name__}).")


@functools.lru_cache(maxsize=None, typed=True)  # True == 1, but a compiler distinguishes them
def _rejection(device: Any, name: str, value: Value) -> str | None:
    """Return the compiler's error message for an option, from compiling one addition (about 0.01 s); None if it accepts the option.

    Compilers parse options before the program, so the result holds for every program.
    """
    x = jax.ShapeDtypeStruct((), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x + 1).lower(x).compile(compiler_options={name: value})
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        return str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ").strip(" :.")
    return None


def _nearest(device: Any, name: str, reason: str) -> str:
    """Return ` Did you mean …?` with the nearest existing option if the compiler has no option of this name, else an empty string."""
    if not reason.startswith("No such"):
        return ""
    close = difflib.get_close_matches(name, _names(device.platform), n=5, cutoff=0.6)
    found = next((other for other in close if not (_rejection(device, other, "") or "").startswith("No such")), None)
    return f" Did you mean {found!r}?" if found else ""


def _names(platform: str) -> list[str]:
    """Return candidates for option names: strings in the compiler's library that look like one."""
    package, file = _LIBRARIES.get(platform, _LIBRARY)
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / file if spec and spec.origin else None
    if path is None or not path.is_file():
        return []
    with open(path, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return sorted({word.decode() for word in re.findall(rb"xla_[a-z0-9_]{3,80}", content)})
