"""Options of XLA's compilers that make train steps faster, by chip. One that a compiler does not take is left out, and said.

They are given with each compilation, not by environment variables, so a step that is compiled for devices elsewhere has those it would
have there.
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
    """One option of a compiler.

    Attributes:
      name: as the compiler has it.
      value: of the type that the compiler wants.
      why: what it changed where it was measured.
      convolutions: whether it is also for models whose parameters are mostly those of convolutions.
    """

    name: str
    value: Value
    why: str
    convolutions: bool = True


# Collectives on the SparseCores of a chip, beside the products. (Asynchronous all-gathers on the cores themselves, libtpu 0.0.52 has for v5e alone.)
_SPARSE_CORES = "xla_tpu_enable_sparse_core_collective_offload_"


def _on_sparse_cores(*kinds: str, why: str) -> tuple[Option, ...]:
    return tuple(Option(_SPARSE_CORES + kind, True, why) for kind in kinds)


# By the names of `plan.chips`. `xla_tpu_scoped_vmem_limit_kib` is the room that a fused operation may use of the vector memory on the chip: with more of
# it, products work in larger tiles. An option stands here because a step was measured with it and without; `why` says what came of it.
OPTIONS: dict[str, tuple[Option, ...]] = {
    "v4": (),  # 24 MB for tiles instead of 16: the same cycles for a block of Llama-2-7B (libtpu 0.0.52)
    "v5e": (
        Option(
            "xla_tpu_scoped_vmem_limit_kib",
            "49152",
            "a block of Llama-2-7B, 4 × 4,096 tokens, forward and backward: 187.0 M estimated cycles, 220.7 M without; it compiles in 86 s, not 23 (libtpu 0.0.42.1)",
        ),
    ),
    "v5p": (
        Option(
            "xla_tpu_scoped_vmem_limit_kib",
            "49152",
            "a block of Llama-2-7B, 4 × 4,096 tokens, forward and backward: 97.6 M estimated cycles, 119.2 M without; 65536 gains 0.6% more and compiles "
            "longer (libtpu 0.0.52)",
        ),
        *_on_sparse_cores(
            "all_gather",
            "reduce_scatter",
            "all_reduce",
            why="Llama-2-7B on 64 chips: collectives that nothing runs beside take 1 ms of a step, 100 without (libtpu 0.0.42.1 and 0.0.52)",
        ),
        *_on_sparse_cores(
            "2d_all_gather",
            "3d_all_gather",
            why="Llama-2-70B on 512 chips, parameters in 64 shares over two dimensions of the torus: a step takes 0.7 s less with these two (libtpu 0.0.52)",
        ),
    ),
    "v6e": (
        Option(
            "xla_tpu_scoped_vmem_limit_kib",
            "98304",
            "a product of 8,192³: 1.10 times its FLOPs at the peak, 1.42 times without (libtpu 0.0.42.1 and 0.0.52); a block of Llama-3-8B, 4 × 8,192 tokens: "
            "138.8 M cycles, with 65536 147.1 M, with 49152 159.6 M. Not for convolutions: a ResNet of a bottleneck a stage takes 30.2 M cycles with it, 28.7 M "
            "without, 28.6 M with 49152, and compiles in 228, 95 and 155 s (libtpu 0.0.52)",
            convolutions=False,
        ),
        *_on_sparse_cores("all_gather", "reduce_scatter", "all_reduce", why="Llama-3-8B on 256 chips: a step takes 0.16 s less (libtpu 0.0.52)"),
    ),
    "tpu7x": (  # which has collectives on its SparseCores without being told
        Option(
            "xla_tpu_scoped_vmem_limit_kib",
            "49152",
            "Llama-2-7B on 64 chips, 2 × 4,096 tokens a core: 1,068 M estimated cycles a step, 1,248 M without; it compiles in 108 s, not 83 (libtpu 0.0.52)",
        ),
    ),
    "a100": (),
    "h100": (),
    "h200": (),
}

# Where a platform's compiler keeps the names of its options: (package, file).
_LIBRARIES = {"tpu": ("libtpu", "libtpu.so")}
_LIBRARY = ("jaxlib", "libjax_common.so")


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The options of a compilation.

    Attributes:
      options: what the compiler is given, by name.
      rejected: of the table's own, those that this compiler does not take: name -> what it said.
    """

    options: dict[str, Value]
    rejected: dict[str, str]


def choose(asked: Mapping[str, Value | None], device: Any, convolutional: bool = False) -> Chosen:
    """The options of a step for a device: the table's, changed by a config's.

    Args:
      asked: the section `compiler_options`: values by name; None leaves out what the table has.
      device: of those compiled for; it may be one that is not here. Of several processes, one of this process's own.
      convolutional: whether most of the model's parameters are kernels of convolutions; some options are not for such models.

    Raises:
      ConfigError: the compiler does not take an option that is asked for; names the nearest that there is.
    """
    chip = chip_of(device.device_kind)
    options, rejected = {}, {}
    for option in OPTIONS.get(chip.name, ()) if chip else ():
        suits = option.convolutions or not convolutional
        if option.name not in asked and suits:
            if reason := _rejection(device, option.name, option.value):
                rejected[option.name] = reason
            else:
                options[option.name] = option.value
    for name, value in asked.items():
        if value is None:
            continue
        if reason := _rejection(device, name, value):
            raise ConfigError(
                f"config.compiler_options.{name}={value!r}: the compiler for {device.device_kind} says: {reason}.{_nearest(device, name, reason)}"
            )
        options[name] = value
    return Chosen(options, rejected)


def check(asked: Mapping[str, Any]) -> None:
    """What of the section `compiler_options` can be told without a compiler.

    Raises:
      ConfigError: a value of another type; one that is left out and that no chip has.
    """
    known = sorted({option.name for options in OPTIONS.values() for option in options})
    for name, value in asked.items():
        if value is None and name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"Did you mean {close[0]!r}?" if close else f"Those are: {', '.join(known) or 'none'}."
            raise ConfigError(
                f"config.compiler_options.{name}=None leaves out an option that runs have unless told otherwise, and this is none of them. {hint}"
            )
        if value is not None and not isinstance(value, Value):
            raise ConfigError(f"config.compiler_options.{name} must be true or false, a number or a string, got {value!r} ({type(value).__name__}).")


@functools.lru_cache(maxsize=None, typed=True)  # True and 1 are equal, and not the same to a compiler
def _rejection(device: Any, name: str, value: Value) -> str | None:
    """What the compiler says against an option, asked with a program of one addition; None where it takes it.

    Compilers read their options before the program, so this tells what would become of a larger one: a hundredth of a second each.
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
    """` Did you mean …?` with the nearest option that the compiler has, where it has none of that name."""
    if not reason.startswith("No such"):
        return ""
    close = difflib.get_close_matches(name, _names(device.platform), n=5, cutoff=0.6)
    found = next((other for other in close if not (_rejection(device, other, "") or "").startswith("No such")), None)
    return f" Did you mean {found!r}?" if found else ""


def _names(platform: str) -> list[str]:
    """What may be names of a compiler's options: words of its library that look so."""
    package, file = _LIBRARIES.get(platform, _LIBRARY)
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / file if spec and spec.origin else None
    if path is None or not path.is_file():
        return []
    with open(path, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return sorted({word.decode() for word in re.findall(rb"xla_[a-z0-9_]{3,80}", content)})
