"""Settings that a search tries (mesh, accumulation and rematerialisation, which do not change the result), and their ranking."""

import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flax import nnx

from jaxmodels import config as config_lib
from jaxmodels import models
from jaxmodels.errors import ConfigError
from jaxmodels.experiment.build import build_model
from jaxmodels.experiment.experiment import Experiment
from jaxmodels.experiment.sections import Training, resolve
from jaxmodels.models.functional import new_rngs
from jaxmodels.parallel import mesh as mesh_lib
from jaxmodels.parallel import sharding as sharding_lib
from jaxmodels.parallel.mesh import MeshSizes
from jaxmodels.parallel.sharding import Sharding
from jaxmodels.plan import memory
from jaxmodels.plan.shardings import PRODUCTS, Graph, Op, Value

Changes = dict[str, Any]  # dotted key of a config -> value

# Minimum tokens of a sequence on a device, for meshes with the axis `context`.
SMALLEST_PART = 1024
# Maximum sizes of the axes `tensor` and `pipeline`. Beyond these, the work of a device is too small, and the pipeline's bubble too large.
MOST_TENSOR, MOST_STAGES = 16, 8
ACCUMULATIONS = (1, 2, 4, 8, 16)
# The order of a ranking.
STATES = ("compiled", "modelled", "out of time", "too large", "failed")


@dataclasses.dataclass
class Candidate:
    """A setting and its figures.

    Attributes:
      changes: dotted keys of the config with the setting's values.
      own: whether it is the config's own setting.
      state: one of `STATES`; `modelled` is not compiled.
      memory, seconds: estimates of the models: bytes on a device, and seconds of a step; None if not modelled.
      parts: seconds by part: from the compiled program if there is one, else from the model.
      plan: the JSON of `jaxmodels plan`; None if not compiled.
      why: why it is not the best.
    """

    changes: Changes
    own: bool = False
    state: str = "modelled"
    memory: int | None = None
    seconds: float | None = None
    parts: dict[str, float] = dataclasses.field(default_factory=dict)
    plan: dict | None = None
    why: str = ""

    @property
    def name(self) -> str:
        """A name such as `fsdp=64 remat=full`, without values of 1 and empty ones."""
        words = {key.rpartition(".")[2]: "+".join(value) if isinstance(value, tuple) else value for key, value in self.changes.items() if value not in (1, ())}
        return " ".join(f"{name}={value}" for name, value in words.items()) or "one device"

    @property
    def mesh(self) -> dict[str, int]:
        """Sizes of its mesh."""
        return {key.removeprefix("mesh."): value for key, value in self.changes.items() if key.startswith("mesh.")}

    @property
    def step_seconds(self) -> float:
        """Seconds of a step: from the compiled program if there is one, else from the model."""
        return self.plan["step_seconds"] if self.plan else math.inf if self.seconds is None else self.seconds

    @property
    def bytes(self) -> int:
        """Bytes on a device: from the compiler if compiled, else from the model."""
        return self.plan["peak_bytes_per_device"] if self.plan else self.memory or 0

    def does_not_fit(self, over: float, source: str) -> None:
        """Mark it as too large by `over` bytes, according to `compiler` or `model`."""
        self.state, self.why = "too large", f"does not fit by {over / 1e9:.1f} GB, according to the {source}"


def changed(experiment: Experiment, changes: Mapping[str, Any]) -> Experiment:
    """Return the experiment with changed values of its config. The data set is not opened again.

    Raises:
      ConfigError: a section does not allow its value.
    """
    config = copy.deepcopy(experiment.config)
    for key, value in changes.items():
        config_lib.set_at(config, key, value)
    config = resolve(config)
    task, build = build_model(config, experiment.dataset.info)
    sections = {"mesh": MeshSizes(**config["mesh"]), "sharding": Sharding(**config["sharding"]), "training": Training(**config["training"])}
    return dataclasses.replace(experiment, config=config, task=task, build=build, platform=None, layout=None, **sections)


def mesh_changes(mesh: Mapping[str, int]) -> Changes:
    """Return a mesh as keys and values of a config."""
    return {f"mesh.{axis}": size for axis, size in mesh.items()}


def context_changes(experiment: Experiment, mesh: Mapping[str, int]) -> Changes:
    """Return `sharding.context=heads` if the mesh shards sequences and the heads divide, else no change. It sends the fewest bytes, and has no turns to wait for."""
    heads, relative = experiment.config["model"].get("heads"), experiment.config["model"].get("positions") == "relative"
    divide = mesh["context"] > 1 and heads and heads % (mesh["tensor"] * mesh["context"]) == 0
    return {"sharding.context": "heads"} if divide and not relative else {}


def meshes(experiment: Experiment, topology: Any) -> list[tuple[dict[str, int], int]]:
    """Return the meshes that a model and its batch can be sharded over, with the bytes of state on a device; those with the fewest model shards first.

    A mesh is left out if one of its axes shards no part of the model, or if a dimension, the layers or the batch do not divide.
    """
    shapes, model = experiment.state_shapes(), experiment.config["model"]
    heads = [model[key] for key in ("heads", "kv_heads") if model.get(key)]
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


def _factorisations(experiment: Experiment, topology: Any) -> Iterator[dict[str, int]]:
    """Yield sizes of all axes that multiply to the topology's devices. An axis that the model cannot use has size 1."""
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
    """Yield all ways to write a number as a product of factors, one for each limit, none above it."""
    if not most:
        yield from [()] if total == 1 else []
        return
    for first in range(1, min(total, most[0]) + 1):
        if total % first == 0:
            yield from ((first, *rest) for rest in _products(total // first, most[1:]))


def accumulations(experiment: Experiment, mesh: Mapping[str, int]) -> list[int]:
    """Return the numbers of microbatches that divide the batch.

    Batch normalisation, the load of a mixture and contrastive losses depend on all rows of a microbatch. With them only the config's number is returned.
    """
    own = experiment.training.accumulate
    model = nnx.eval_shape(lambda: experiment.build(new_rngs(params=0)))
    normalised = any(isinstance(module, nnx.BatchNorm) for _, module in nnx.iter_modules(model))
    if normalised or experiment.config["model"].get("moe") or experiment.task.across_rows:
        return [own]
    rows = experiment.loading.batch_size // math.prod(mesh[axis] for axis in mesh_lib.BATCH_AXES)
    rows //= (experiment.sharding.microbatches or mesh["pipeline"]) if mesh["pipeline"] > 1 else 1
    return sorted({n for n in (own, *ACCUMULATIONS) if rows % n == 0})


def policies(experiment: Experiment, step: memory.TracedStep) -> list[Changes]:
    """Return the rematerialisation policies, from the one that saves the fewest activations; one empty change for models without the key.

    Args:
      experiment: as `build_experiment` returns.
      step: traced with `remat="full"`, for the size of each named activation and the FLOPs of computing it again.
    """
    fields = config_lib.fields(models.find(experiment.config["model"]["name"])[0])
    if "remat" not in fields:
        return [{}]
    if "offload" not in fields:
        return [{"model.remat": policy} for policy in ("full", "dots_no_batch", "dots", "none")]
    names = saved_lists(step)
    on_device = [{"model.remat": policy, "model.offload": ()} for policy in ("full", *names, "dots_no_batch", "dots", "none")]
    return on_device + [{"model.remat": policy, "model.offload": ("input",)} for policy in ("full", *names)]


def lightest(experiment: Experiment) -> Changes:
    """Return the policy that saves the fewest activations, for those of its keys that the model has."""
    fields = config_lib.fields(models.find(experiment.config["model"]["name"])[0])
    return {f"model.{key}": value for key, value in (("remat", "full"), ("offload", ())) if key in fields}


def saved_lists(step: memory.TracedStep) -> list[tuple[str, ...]]:
    """Return lists of activations to save, each with one more than the one before. The first name saves the most FLOPs per byte."""
    sizes: dict[str, float] = {}
    saved: dict[str, float] = {}
    for op, times in _named(step.graph, 1):
        name = op.params["name"]
        sizes[name] = sizes.get(name, 0) + times * memory.bytes_of(op.outputs[0], step.mesh)
        saved[name] = saved.get(name, 0) + times * _flops_behind(op.inputs[0], step.mesh)
    worth = sorted((name for name in sizes if saved[name] > 0), key=lambda name: -saved[name] / sizes[name])
    return [tuple(worth[:n]) for n in range(1, len(worth) + 1)]


def _named(graph: Graph, times: int) -> Iterator[tuple[Op, int]]:
    """Yield the operations of the forward pass that name an activation, and how often each runs."""
    for op in graph.ops:
        if op.name == "name" and not op.backward:
            yield op, times
        for body in op.bodies:
            yield from _named(body, times * op.params.get("length", 1))


def _flops_behind(value: Value, mesh: Mapping[str, int]) -> float:
    """Return the FLOPs of the products on a device that compute a value from named activations and other arrays in memory."""
    flops, waiting, seen = 0.0, [value], set()
    while waiting:
        value = waiting.pop()
        op = value.op
        if op is None or op in seen or op.name == "name":
            continue
        seen.add(op)
        if op.name in PRODUCTS | {"ragged_dot_general", "pallas_call"}:
            flops += op.flops / value.shards(mesh)
        elif op.name in memory.COMPUTED_IN_PLACE:
            waiting += op.inputs
    return flops


# The ranking


def rank(settings: Sequence[Candidate], available: int) -> list[Candidate]:
    """Rank settings, compiled ones before modelled ones. For each but the best, `why` states why it is not the best.

    Args:
      settings: in any order.
      available: bytes of a device that a program can use.

    Raises:
      ConfigError: none fits.
    """
    for each in settings:
        if each.state in ("compiled", "modelled") and each.bytes > available:
            each.does_not_fit(each.bytes - available, "compiler" if each.plan else "model")
    known = ("compiled", "modelled", "out of time")
    ranked = sorted(settings, key=lambda each: (STATES.index(each.state), each.step_seconds if each.state in known else each.bytes, each.bytes))
    best = ranked[0]
    if best.state not in ("compiled", "modelled"):
        nearest = min(settings, key=lambda each: each.bytes or math.inf)
        raise ConfigError(
            f"no setting fits a device's {available / 1e9:.1f} GB; the nearest, {nearest.name}, needs {nearest.bytes / 1e9:.1f} GB. "
            "Use a larger topology, or a smaller data.batch_size, which changes the run."
        )
    for each in ranked[1:]:
        each.why = each.why or _slower(each, best)
    return ranked


def _slower(setting: Candidate, best: Candidate) -> str:
    """Return by how much, and in which parts, a setting is slower than the best."""
    compared = setting.plan is not None or best.plan is None
    this, that = (setting.step_seconds, best.step_seconds) if compared else (setting.seconds, best.seconds)
    before = "" if compared else "not compiled: "
    if this is None or that is None or this <= that * 1.0005:
        more = f", and {(setting.bytes - best.bytes) / 1e9:.1f} GB more" if setting.bytes > best.bytes else ""
        return before + ("as fast" if compared else "not faster by the model") + more
    if not compared:
        return f"{before}{this / that - 1:.1%} slower by the model"
    again = setting.changes.get("model.remat") not in (best.changes.get("model.remat"), "none")
    grown = sorted(((seconds - best.parts.get(name, 0.0), name) for name, seconds in setting.parts.items()), reverse=True)
    named = [
        f"{name}{' (computed again)' if again and name in ('matrix products', 'attention kernels') else ''} +{1e3 * seconds:.3g} ms"
        for seconds, name in grown
        if seconds > 0.1 * (this - that)
    ]
    return f"{this / that - 1:.1%} slower" + (": " if named else "") + ", ".join(named)
