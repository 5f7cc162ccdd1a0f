"""`jaxmodels train --dry_run`: parameters, bytes and FLOPs of a run, without training."""

import dataclasses
import json
import math
from collections.abc import Mapping
from fractions import Fraction

import jax
from rich.console import Console
from rich.table import Table

from jaxmodels.experiment.experiment import Experiment
from jaxmodels.hardware.flops import count_flops
from jaxmodels.models import functional
from jaxmodels.parallel import mesh as mesh_lib
from jaxmodels.parallel import pipeline
from jaxmodels.parallel import sharding as sharding_lib


def summarize(experiment: Experiment) -> dict:
    """Return the figures of `print_dry_run`: parameters and their shardings by path, counts, bytes of state per device and on disk, FLOPs per step.

    Raises:
      ConfigError: the mesh or the batch does not fit the devices of this machine.
    """
    mesh = mesh_lib.make_mesh(experiment.mesh)
    layout = sharding_lib.make_layout(mesh, experiment.sharding, experiment.config["partition"])
    mesh_lib.check_batch(experiment.loading.batch_size, experiment.training.accumulate, mesh, "data.batch_size", layout.microbatches)
    mesh_lib.check_batch(experiment.eval_batch_size, 1, mesh, "data.eval_batch_size", layout.microbatches)
    shapes = sharding_lib.place_state(experiment.state_shapes(), experiment.sharding, layout)
    saved = shapes.replace(frozen={}) if experiment.frozen_in_parent else shapes
    # One program over all devices, also for pmap, whose collectives have no meaning outside it.
    placed = experiment.on(mesh.devices.flat[0].platform, dataclasses.replace(layout, axis=None))
    batch = experiment.batch_shapes(experiment.loading.batch_size)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = functional.flatten(shapes.params) | functional.flatten(shapes.frozen)
    jax.eval_shape(placed.step_function(), shapes, batch, key)  # fills the layout's `left_whole`
    stages = mesh.shape["pipeline"]
    return {
        "parameters": params,
        "parameter_count": experiment.count_parameters(shapes.weights),
        "active_parameter_count": active_parameters(shapes.weights, experiment.config["model"]) - experiment.padding(shapes.weights),
        "trained_count": experiment.count_parameters(shapes.params),
        "sharding": {path: x.sharding.spec for path, x in params.items()},
        "state_bytes_per_device": mesh_lib.bytes_per_device(shapes),
        "bytes_per_device": {part: mesh_lib.bytes_per_device(getattr(shapes, part)) for part in ("params", "frozen", "opt_state", "ema")},
        "checkpoint_bytes": sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(saved)),
        # As on one device: bubbles of a pipeline are no work.
        "flops_per_step": count_flops(experiment.step_function(), shapes, batch, key),
        "steps": experiment.steps,
        "mesh": dict(mesh.shape),
        "pipeline": pipeline.describe(stages, layout.microbatches) if stages > 1 else None,
        "notes": [*sharding_lib.replicated_notes(shapes, experiment.sharding, layout), *sharding_lib.notes(placed.layout)],
    }


def describe(shape: tuple[int, ...], spec: jax.sharding.PartitionSpec) -> str:
    """`64/fsdp×256/tensor`: a shape, with the mesh axes of its dimensions."""
    axes = [part if isinstance(part, tuple) else (part,) if part else () for part in (*spec, *[None] * (len(shape) - len(spec)))]
    return "×".join("/".join(map(str, (size, *parts))) for size, parts in zip(shape, axes, strict=True)) or "scalar"


def _sizes(arrays, spread: bool) -> list[str]:
    """Bytes of arrays in all; and on a device, if they are sharded."""
    whole = human_bytes(sum(x.size * x.dtype.itemsize for x in arrays))
    return [whole, human_bytes(mesh_lib.bytes_per_device(arrays))] if spread else [whole]


def active_parameters(params, model: Mapping) -> int:
    """Number of parameters (or of their shapes) that one token uses: of a mixture's experts, as many as the `model` section gives a token."""
    moe = model.get("moe")
    share = Fraction(moe["top_k"], moe["experts"]) if moe else 1
    return int(sum(x.size * (share if "experts" in path.split("/") else 1) for path, x in functional.flatten(params).items()))


def print_dry_run(experiment: Experiment, console: Console) -> None:
    """Print the resolved config and the figures of `summarize`."""
    console.print_json(json.dumps(experiment.config))
    figures = summarize(experiment)
    spread = math.prod(figures["mesh"].values()) > 1
    table = Table("parameter", "shape/axis" if spread else "shape", "values", "bytes", *["a device's"] * spread, box=None)
    for column in table.columns:
        column.no_wrap = True  # a terminal that is too narrow cuts numbers, not names
    table.columns[0].overflow = "ignore"
    table.columns[0].min_width = max(map(len, figures["parameters"]))
    for path, x in figures["parameters"].items():
        shape = describe(x.shape, figures["sharding"][path])
        table.add_row(path, shape, f"{x.size:,}", *_sizes([x], spread))
    table.add_section()
    count, parameters = figures["parameter_count"], list(figures["parameters"].values())
    table.add_row("all", "", f"{count:,}", *_sizes(parameters, spread))
    if figures["active_parameter_count"] != count:
        table.add_row("active for one token", "", f"{figures['active_parameter_count']:,}")
    if figures["trained_count"] < count:
        table.add_row("trained", "", f"{figures['trained_count']:,}")
    console.print(table)
    data = ", ".join(f"{len(split):,} {name}" for name, split in experiment.dataset.splits.items())
    rows = {
        "data": f"{data} examples",
        "steps": f"{figures['steps']:,} of {experiment.loading.batch_size} examples",
        "devices": f"{math.prod(figures['mesh'].values())} {jax.devices()[0].platform}, mesh {mesh_lib.shown(figures['mesh'])}",
        "state per device": f"{human_bytes(figures['state_bytes_per_device'])}: {_parts(figures['bytes_per_device'])}",
        "checkpoint": f"{human_bytes(figures['checkpoint_bytes'])} before compression",
        "FLOPs per step": f"{figures['flops_per_step']:.4g} in matrix products and convolutions",
    }
    if figures["pipeline"]:
        rows["pipeline"] = figures["pipeline"]
    for name, value in rows.items():
        console.print(f"{name:<17} {value}", highlight=False)
    for note in figures["notes"]:
        console.print("warning: " + note, style="yellow", highlight=False)


def _parts(sizes: Mapping[str, int]) -> str:
    names = {"params": "parameters", "frozen": "frozen parameters", "opt_state": "optimizer", "ema": "moving average"}
    return ", ".join(f"{names[part]} {human_bytes(size)}" for part, size in sizes.items() if size)


def human_bytes(count: float) -> str:
    """`1.5 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
