"""Settings that a search looks at: how a step is spread, cut and rematerialised. What it computes is the same in all of them."""

import copy
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from flax import nnx

from jaxmodels import config as config_lib
from jaxmodels import models
from jaxmodels.errors import ConfigError
from jaxmodels.experiment.build import build_model
from jaxmodels.experiment.experiment import Experiment
from jaxmodels.experiment.sections import Training, resolve
from jaxmodels.hardware.flops import operation_flops
from jaxmodels.parallel import mesh as mesh_lib
from jaxmodels.parallel import sharding as sharding_lib
from jaxmodels.parallel.mesh import MeshSizes
from jaxmodels.parallel.sharding import Sharding
from jaxmodels.plan import memory
from jaxmodels.plan.graph import Graph, Op, Value, ways

Changes = dict[str, Any]  # dotted key of a config -> value

# Parts of a sequence that are not worth a device of their own.
SMALLEST_PART = 1024
# Ways that matrices are cut, and stages of a pipeline: beyond, each has too little to do, and the bubble grows.
MOST_TENSOR, MOST_STAGES = 16, 8
ACCUMULATIONS = (1, 2, 4, 8, 16)


def changed(experiment: Experiment, changes: Mapping[str, Any]) -> Experiment:
    """The experiment with other values of its config; its data stays open.

    Raises:
      ConfigError: a value that its section does not take.
    """
    config = copy.deepcopy(experiment.config)
    for key, value in changes.items():
        config_lib.set_at(config, key, value)
    config = resolve(config)
    task, build = build_model(config, experiment.dataset.info)
    sections = {"mesh": MeshSizes(**config["mesh"]), "sharding": Sharding(**config["sharding"]), "training": Training(**config["training"])}
    return dataclasses.replace(experiment, config=config, task=task, build=build, platform=None, layout=None, **sections)


def mesh_changes(mesh: Mapping[str, int]) -> Changes:
    """A mesh as values of a config."""
    return {f"mesh.{axis}": size for axis, size in mesh.items()}


def context_changes(experiment: Experiment, mesh: Mapping[str, int]) -> Changes:
    """How parts of a sequence come together: by shares of the heads, which moves least and waits for no one, where heads divide; else as the config says."""
    heads, relative = experiment.config["model"].get("heads"), experiment.config["model"].get("positions") == "relative"
    divide = mesh["context"] > 1 and heads and heads % (mesh["tensor"] * mesh["context"]) == 0
    return {"sharding.context": "heads"} if divide and not relative else {}


def meshes(experiment: Experiment, topology: Any) -> list[tuple[dict[str, int], int]]:
    """The meshes of a topology that a model and its batch can be spread over, and what bytes of state a device has in each.

    A mesh is left out where nothing of the model is spread over one of its axes, where a dimension, the layers or the batch do not divide.
    The first ones cut the model least.

    Args:
      experiment: as `build_experiment` gives.
      topology: as `plan.topology.parse` gives.
    """
    shapes, heads = experiment.state_shapes(), _heads(experiment)
    found = []
    for shape in _factorisations(experiment, topology):
        if any(size % shape["tensor"] for size in heads):
            continue
        mesh = memory.planned_mesh(MeshSizes(**shape), topology.devices, topology.chip.platform)
        layout = sharding_lib.make_layout(mesh, experiment.sharding)
        try:
            mesh_lib.check_batch(experiment.loading.batch_size, 1, mesh, "data.batch_size", layout.microbatches)
            state = sharding_lib.place_state(shapes, experiment.sharding, layout)
        except ConfigError:
            continue
        if all(shape[axis] == 1 or axis in layout.used for axis in ("fsdp", "expert", "tensor", "pipeline")):
            found.append((shape, mesh_lib.bytes_per_device(state)))
    return sorted(found, key=lambda each: (each[0]["tensor"] * each[0]["context"] * each[0]["pipeline"], sum(n > 1 for n in each[0].values()), each[1]))


def _heads(experiment: Experiment) -> tuple[int, ...]:
    model = experiment.config["model"]
    return tuple(model[key] for key in ("heads", "kv_heads") if model.get(key))


def _factorisations(experiment: Experiment, topology: Any) -> Iterator[dict[str, int]]:
    """Sizes of all axes that multiply to the topology's devices, as far as the model has something for them."""
    model, batch = experiment.config["model"], experiment.batch_shapes(1)
    length = batch["tokens"].shape[1] if "tokens" in batch and "attention" in experiment.kernels else 0
    most = {
        "data": topology.devices,
        "fsdp": topology.devices,
        "tensor": MOST_TENSOR if "attention" in experiment.kernels else 1,
        "context": max(1, length // SMALLEST_PART),
        "expert": (model.get("moe") or {}).get("experts", 1),
        "pipeline": MOST_STAGES if model.get("scan") else 1,
    }
    for sizes in _products(topology.devices // topology.slices, list(most.values())):
        # In the order of the mesh.
        yield dict.fromkeys((f.name for f in dataclasses.fields(MeshSizes)), 1) | {"slices": topology.slices} | dict(zip(most, sizes, strict=True))


def _products(total: int, most: list[int]) -> Iterator[tuple[int, ...]]:
    """All ways to write a number as a product of so many factors, none of them above its limit."""
    if not most:
        if total == 1:
            yield ()
        return
    for first in range(1, min(total, most[0]) + 1):
        if total % first == 0:
            for rest in _products(total // first, most[1:]):
                yield (first, *rest)


def accumulations(experiment: Experiment, mesh: Mapping[str, int]) -> list[int]:
    """In how many parts a batch may be computed: those that divide, where the loss is a sum over rows.

    Batch normalisation, a mixture's load and contrastive losses look at all rows of a part, so there it stays as the config says.
    """
    own = experiment.training.accumulate
    if not _rows_are_apart(experiment):
        return [own]
    rows = experiment.loading.batch_size // math.prod(mesh[axis] for axis in mesh_lib.BATCH_AXES)
    rows //= (experiment.sharding.microbatches or mesh["pipeline"]) if mesh["pipeline"] > 1 else 1
    return sorted({n for n in (own, *ACCUMULATIONS) if rows % n == 0})


def _rows_are_apart(experiment: Experiment) -> bool:
    model = nnx.eval_shape(lambda: experiment.build(nnx.Rngs(params=0)))
    normalised = any(isinstance(module, nnx.BatchNorm) for _, module in nnx.iter_modules(model))
    return not (normalised or experiment.config["model"].get("moe") or getattr(experiment.task, "across_rows", False))


def policies(experiment: Experiment, step: memory.TracedStep) -> list[Changes]:
    """Ways to rematerialise, from the one that keeps least; one empty change for models that have no choice.

    Args:
      experiment: as `build_experiment` gives.
      step: traced with `remat="full"`: it tells what the named activations take, and what computing them again takes.
    """
    fields = config_lib.fields(models.find(experiment.config["model"]["name"])[0])
    if "remat" not in fields:
        return [{}]
    offload = {"model.offload": ()} if "offload" in fields else {}
    found = [{"model.remat": policy, **offload} for policy in ("full", "dots_no_batch", "dots", "none")]
    if not offload:
        return found
    kept = keep_lists(step)
    lists = [{"model.remat": names, **offload} for names in kept]
    away = [{"model.remat": names, "model.offload": ("input",)} for names in ("full", *kept)]
    return [found[0], *lists, *found[1:], *away]


def lightest(experiment: Experiment) -> Changes:
    """The policy that keeps least, as far as the model has a choice."""
    fields = config_lib.fields(models.find(experiment.config["model"]["name"])[0])
    return {f"model.{key}": value for key, value in (("remat", "full"), ("offload", ())) if key in fields}


def keep_lists(step: memory.TracedStep) -> list[tuple[str, ...]]:
    """Names of activations to keep, each list with one more than the one before: first what saves most FLOPs for a byte."""
    sizes: dict[str, float] = {}
    saved: dict[str, float] = {}
    for op, times in _named(step.graph, 1):
        name = op.params["name"]
        sizes[name] = sizes.get(name, 0) + times * memory.bytes_of(op.outputs[0], step.mesh)
        saved[name] = saved.get(name, 0) + times * _made_of(op.inputs[0], step.mesh)
    worth = sorted((name for name in sizes if saved[name] > 0), key=lambda name: -saved[name] / sizes[name])
    return [tuple(worth[:n]) for n in range(1, len(worth) + 1)]


def _named(graph: Graph, times: int) -> Iterator[tuple[Op, int]]:
    """Operations of the forward pass that name an activation, and how often each runs."""
    for op in graph.ops:
        if op.name == "name" and not op.backward:
            yield op, times
        for body in op.bodies:
            yield from _named(body, times * op.params.get("length", 1))


def _made_of(value: Value, mesh: Mapping[str, int]) -> float:
    """FLOPs of the products that a value comes from, on a device, back to those that are named or written for others."""
    flops, open_values, seen = 0.0, [value], set()
    while open_values:
        value = open_values.pop()
        op = value.op
        if op is None or op in seen or op.name == "name":
            continue
        seen.add(op)
        if op.name in ("dot_general", "conv_general_dilated", "ragged_dot_general", "pallas_call"):
            parts = ways((axis for axes in value.spec for axis in axes), mesh)
            flops += operation_flops(op.name, op.params, [x.shape for x in op.inputs], [x.shape for x in op.outputs]) / parts
        elif op.name in memory.COMPUTED_IN_PLACE:
            open_values += op.inputs
    return flops


@functools.cache
def shown(changes: tuple[tuple[str, Any], ...]) -> str:
    """`fsdp=64 remat=full`: a setting for people; what is 1, or nothing, is left out."""
    words = []
    for key, value in changes:
        name = key.rpartition(".")[2]
        if value in (1, ()):
            continue
        words.append(f"{name}={'+'.join(value) if isinstance(value, tuple) else value}")
    return " ".join(words) or "one device"
