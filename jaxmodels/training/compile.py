"""Ahead-of-time compilation through a persistent cache on disk."""

import dataclasses
import hashlib
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxmodels.hardware import compiler_options
from jaxmodels.models.convolution import Conv
from jaxmodels.models.functional import new_rngs
from jaxmodels.parallel import mesh as mesh_lib


@dataclasses.dataclass
class CompileRecord:
    """The record of compiling one function. The attributes from `options` on are set for train steps only.

    Attributes:
      name: name of the function.
      seconds: time to trace and compile, or to load.
      cached: whether the executable came from the persistent cache.
      options: compiler options used.
      rejected: compiler options that this compiler does not accept, as name -> its message.
      program: SHA-256 of the lowered program.
      loaded: folder of the saved executable that was loaded instead of compiling; None if compiled.
      not_loaded: why a saved executable was not loaded; None if there was none, or it was loaded.
    """

    name: str
    seconds: float
    cached: bool
    options: dict[str, compiler_options.Value] = dataclasses.field(default_factory=dict)
    rejected: dict[str, str] = dataclasses.field(default_factory=dict)
    program: str | None = None
    loaded: str | None = None
    not_loaded: str | None = None


def cache_folder() -> Path:
    """Return the default folder of the persistent compilation cache: `jaxmodels/xla` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxmodels" / "xla"


def use_persistent_cache() -> str | None:
    """Make JAX cache every executable of this process on disk; return the problem if the folder cannot be used, else None.

    The folder is JAX's own setting (`JAX_COMPILATION_CACHE_DIR`) if it is set, else `cache_folder`.
    """
    folder = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or jax.config.jax_compilation_cache_dir or cache_folder())
    if "://" in (jax.config.jax_compilation_cache_dir or ""):
        return None  # a bucket URL, which JAX opens itself
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} is not writable")
    except OSError as error:
        return f"no compilation cache ({error}): every start compiles again; set JAX_COMPILATION_CACHE_DIR to a writable folder"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return None


_hits = 0


def _count_hits(event: str, **_) -> None:
    global _hits
    _hits += event == "/jax/compilation_cache/cache_hits"


jax.monitoring.register_event_listener(_count_hits)


def compile_ahead(
    name: str, function: Callable, *args, donate: tuple[int, ...] = (), out_shardings: Any = None, once: bool = False
) -> tuple[Callable, CompileRecord]:
    """Compile a function for the shapes, dtypes and shardings of `args` (arrays or ShapeDtypeStructs). With `once`, for a single call: a CPU's
    compiler then takes less time over it.

    The result accepts only such arguments: an argument of another shape is an error, never a second compilation.
    """
    options = {} if out_shardings is None else {"out_shardings": out_shardings}
    # Compiling the initialisation of cnn_digits takes 0.4 s instead of 1.2 s, that of gpt_shakespeare 1.3 instead of 1.4; the values are the same.
    quick = {"xla_backend_optimization_level": 1} if once and jax.default_backend() == "cpu" else {}
    return _compile(name, jax.jit(function, donate_argnums=donate, **options), args, quick)


def compile_mapped(name: str, function: Callable, mesh: jax.sharding.Mesh, axis: str, *args, options: Mapping) -> tuple[Callable, CompileRecord]:
    """Compile a train step with `pmap`: every device processes its own rows of the batch with a replicated state.

    Args:
      name: name for the record.
      function: (state, batch, key) -> (state, metrics), both results equal on all devices.
      mesh: mesh of the devices.
      axis: name of the axis of the function's collectives.
      args: the state, replicated; the batch, whose leading axis is that of the devices; the key.
      options: compiler options.
    """
    devices = list(mesh.devices.flat)
    mapped = jax.pmap(function, axis_name=axis, in_axes=(None, 0, None), out_axes=(None, None), donate_argnums=(0,), devices=devices)
    if jax.process_count() == 1:
        return _compile(name, mapped, args, options)
    # With several processes, lowering a pmap needs arrays, not shapes.
    compiled, record = _compile(name, mapped, jax.tree.map(lambda x: _zeros(x) if isinstance(x, jax.ShapeDtypeStruct) else x, args), options)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def step(*args):
        # The results of pmap name only the devices of this process; the rest of the program uses global arrays.
        return jax.tree.map(lambda x: jax.make_array_from_single_device_arrays(x.shape, everywhere, [s.data for s in x.addressable_shards]), compiled(*args))

    return step, record


def _zeros(shape: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.make_array_from_callback(shape.shape, shape.sharding, lambda _: np.zeros(shape.sharding.shard_shape(shape.shape), shape.dtype))


def _compile(name: str, function, args, options: Mapping | None = None) -> tuple[Callable, CompileRecord]:
    started, before = time.perf_counter(), _hits
    compiled = function.lower(*args).compile(compiler_options=dict(options or {}))
    return compiled, CompileRecord(name, round(time.perf_counter() - started, 3), _hits > before)


def own_device(mesh: jax.sharding.Mesh) -> Any:
    """Return a device of the mesh that belongs to this process; the first device if none does (as in a plan for absent devices)."""
    here = set(jax.local_devices())
    return next((device for device in mesh.devices.flat if device in here), mesh.devices.flat[0])


def compile_train_step(experiment: Any, mesh: jax.sharding.Mesh, shapes: Any, state: Any, key: Any, saved: Any = None) -> tuple[Callable, CompileRecord]:
    """Compile the train step of an experiment: (state, batch, key) -> (state, metrics).

    The state is donated and keeps its shardings; metrics are replicated scalars.

    Args:
      experiment: the experiment, as returned by `Experiment.on`.
      mesh: the device mesh.
      shapes: shapes of the train state, with shardings.
      state, key: arrays to compile for, or their shapes (as for absent devices).
      saved: an executable to load instead of compiling if it is of the same program; see `training.executable.Saved`.

    Raises:
      ConfigError: the compiler does not accept one of the config's `compiler_options`.
    """
    rows, mapped = mesh_lib.batch_sharding(mesh), experiment.layout.axis
    chosen = compiler_options.choose(experiment.config["compiler_options"], own_device(mesh), convolutional(experiment.build))
    batch = experiment.batch_shapes(experiment.loading.batch_size)
    if mapped:
        batch = {k: jax.ShapeDtypeStruct((mesh.size, s.shape[0] // mesh.size, *s.shape[1:]), s.dtype) for k, s in batch.items()}
    batch = {k: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=rows) for k, s in batch.items()}
    if mapped:
        compiled, record = compile_mapped("train_step", experiment.step_function(), mesh, mapped, state, batch, key, options=chosen.options)
        not_loaded = "it is a program for jit, and config.partition is 'pmap'" if saved is not None else None
        return compiled, dataclasses.replace(record, options=chosen.options, rejected=chosen.rejected, not_loaded=not_loaded)
    started, before = time.perf_counter(), _hits
    shardings = jax.tree.map(lambda x: x.sharding, shapes)
    function = jax.jit(experiment.step_function(shardings.params), donate_argnums=(0,), out_shardings=(shardings, mesh_lib.replicated(mesh)))
    # Lower for shapes and a replicated key: the program is then the same whether or not the arrays exist.
    lowered = function.lower(shapes, batch, jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=mesh_lib.replicated(mesh)))
    program = hashlib.sha256(lowered.as_text().encode()).hexdigest()
    compiled, not_loaded = saved.load(lowered, program, chosen.options, experiment.config, mesh) if saved is not None else (None, None)
    loaded = str(saved.folder) if compiled is not None else None
    if compiled is None:
        compiled = lowered.compile(compiler_options=chosen.options)
    seconds = round(time.perf_counter() - started, 3)
    return compiled, CompileRecord("train_step", seconds, _hits > before, chosen.options, chosen.rejected, program, loaded, not_loaded)


def convolutional(build: Callable[[nnx.Rngs], nnx.Module]) -> bool:
    """Return whether convolution kernels are most of a model's parameters."""
    model = nnx.eval_shape(lambda: build(new_rngs(params=0)))
    kernels = sum(math.prod(module.kernel.shape) for _, module in nnx.iter_modules(model) if isinstance(module, (nnx.Conv, Conv)))
    return 2 * kernels > sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
