"""Shardings of the train state: parameter path -> logical axes of its dimensions -> mesh axes."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxmodels.errors import ConfigError
from jaxmodels.parallel.layout import RULES, Layout, axes_in

# Pattern on a parameter's path -> logical axes of its dimensions (see `layout.RULES`). The first match counts. Stacked blocks have a leading
# axis `layers`. Parameters without a pattern are sharded along `largest`, if they have at least SMALL values.
PARAMETERS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # Transformers
    (r"(norm|_norm)/(scale|bias)$", (None,)),
    (r"embed/embedding$", ("vocab", "embed")),
    (r"(positions|types|distances)/embedding$", (None, "embed")),
    (r"attention/query/kernel$", ("embed", "heads")),
    (r"attention/(key|value)/kernel$", ("embed", "kv_heads")),
    (r"attention/out/kernel$", ("heads", "embed")),
    (r"attention/query/bias$", ("heads",)),
    (r"attention/(key|value)/bias$", ("kv_heads",)),
    (r"mlp/(up|gate)/kernel$", ("embed", "mlp")),
    (r"mlp/down/kernel$", ("mlp", "embed")),
    (r"mlp/(up|gate)/bias$", ("mlp",)),
    (r"(attention/out|mlp/down)/bias$", (None,)),
    # Mixtures of experts
    (r"router/kernel$", ("embed", None)),
    (r"experts/(up|gate)/kernel$", ("expert", "embed", "mlp")),
    (r"experts/down/kernel$", ("expert", "mlp", "embed")),
    # The output of a decoder
    (r"^output/kernel$", ("embed", "vocab")),
)

SMALL = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sharding:
    """The `sharding` section: how parameters and sequences are sharded over the axes of `mesh`.

    Attributes:
      parameters: (pattern, name, name, …): logical axes of the dimensions of parameters whose path matches. These override the
        built-in table. An empty name replicates a dimension.
      rules: (name, axis, axis, …): the mesh axes of a logical axis, or none to replicate it. These override the built-in rules.
      optimizer: sharding of the optimizer state and the EMA: as the `parameters`, or over the `data` axis too (Rajbhandari et al. 2019,
        ZeRO stage 1).
      context: how attention spans the shards of a sequence: `gather` gathers keys and values on each device; `heads` gives each
        device all positions of some heads; `ring` sends keys and values from device to device.
      microbatches: number of microbatches in a pipeline. The default is the number of stages.
      warn_mb: size in MiB from which a replicated parameter is reported, on a mesh with axes that could shard it.
    """

    parameters: tuple[tuple[str, ...], ...] = ()
    rules: tuple[tuple[str, ...], ...] = ()
    optimizer: Literal["parameters", "data"] = "parameters"
    context: Literal["gather", "heads", "ring"] = "gather"
    microbatches: int | None = None
    warn_mb: float = 16.0


def check(section: Sharding) -> None:
    """Check the section without the model.

    Raises:
      ConfigError: a rule or pattern is empty or invalid, or names an unknown axis.
    """
    for key in ("rules", "parameters"):
        if not all(getattr(section, key)):
            raise ConfigError(f"config.sharding.{key} holds tuples that begin with a {'name' if key == 'rules' else 'pattern'}, got an empty one.")
    for name, *axes in section.rules:
        if len(set(axes)) < len(axes):
            raise ConfigError(f"config.sharding.rules: {name!r} names a mesh axis twice: {', '.join(axes)}.")
        if name not in RULES:
            raise ConfigError(f"config.sharding.rules: there is no name {name!r}; there are {', '.join(RULES)}.")
        for axis in axes:
            if axis not in {a for rule in RULES.values() for a in rule}:
                raise ConfigError(f"config.sharding.rules: there is no mesh axis {axis!r}, given for {name!r}.")
    for pattern, *names in section.parameters:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"config.sharding.parameters: {pattern!r} is not a regular expression: {error}.") from error
        for name in names:
            if name and name not in RULES:
                raise ConfigError(f"config.sharding.parameters: there is no name {name!r}, given for {pattern!r}; there are {', '.join(RULES)}.")


def check_patterns(params: Mapping[str, tuple[int, ...]], section: Sharding) -> None:
    """Check the patterns of the section against the parameters.

    Args:
      params: path -> shape.
      section: the section.

    Raises:
      ConfigError: a pattern matches no parameter, or has more or fewer names than a parameter has dimensions.
    """
    for pattern, *names in section.parameters:
        matched = {path: shape for path, shape in params.items() if re.search(pattern, path)}
        if not matched:
            raise ConfigError(f"config.sharding.parameters: {pattern!r} matches no parameter; there are {', '.join(list(params)[:8])}, …")
        if not any(len(shape) in (len(names), len(names) + 1) for shape in matched.values()):
            path, shape = next(iter(matched.items()))
            raise ConfigError(f"config.sharding.parameters: {pattern!r} names {len(names)} dimensions, but {path} is {list(shape)}.")


def make_layout(mesh: jax.sharding.Mesh, section: Sharding, partition: str = "jit") -> Layout:
    """Return the layout of a run.

    Raises:
      ConfigError: `pmap` with a mesh axis that shards the model.
    """
    rules = dict(RULES) | {name: tuple(axes) for name, *axes in section.rules}
    if partition == "pmap":
        cut = [axis for axis, size in mesh.shape.items() if size > 1 and axis not in ("data", "slices")]
        if cut or section.optimizer == "data":
            what = f"mesh.{cut[0]}={mesh.shape[cut[0]]}" if cut else "sharding.optimizer=data"
            raise ConfigError(f"config.partition=pmap replicates the model on every device, which excludes config.{what}; use partition=jit.")
    stages = mesh.shape["pipeline"]
    microbatches = (section.microbatches or stages) if stages > 1 else 1
    return Layout(mesh, rules, section.context, microbatches, axis="devices" if partition == "pmap" else None)


def names_of(path: str, shape: tuple[int, ...], section: Sharding, layout: Layout) -> tuple[str | None, ...]:
    """Return the logical axes of a parameter's dimensions."""
    return _named(path, shape, section) or _largest(shape, layout)


def _named(path: str, shape: tuple[int, ...], section: Sharding) -> tuple[str | None, ...] | None:
    """Return the logical axes by the first pattern that matches, or None."""
    for pattern, *listed in section.parameters:
        names = tuple(name or None for name in listed)
        if re.search(pattern, path) and len(shape) in (len(names), len(names) + 1):
            return names if len(shape) == len(names) else ("layers", *names)
    # Only stacked blocks have a leading axis: `nnx.MultiHeadAttention` has kernels [D, heads, K], of three axes without one.
    layers = ("layers",) if is_stacked(path) else ()
    for pattern, names in PARAMETERS:
        if re.search(pattern, path) and len(shape) == len(layers) + len(names):
            return (*layers, *names)
    return None


def is_stacked(path: str) -> bool:
    """Return whether a parameter holds all blocks of a model, stacked along its first axis (`model.scan=True`)."""
    return re.search(r"(^|/)blocks/(?!\d+/)", path) is not None


def check_stages(params: Mapping[str, tuple[int, ...]], stages: int, section: Sharding) -> None:
    """Check that a model can be split into pipeline stages.

    Args:
      params: path -> shape.
      stages: number of stages.
      section: the section.

    Raises:
      ConfigError: the model has no stacked blocks, or their number does not divide by the stages.
    """
    named = [(_named(path, shape, section), shape) for path, shape in params.items()]
    stacks = {shape[names.index("layers")] for names, shape in named if names and "layers" in names}
    if stages <= 1:
        return
    if not stacks:
        raise ConfigError(f"config.mesh.pipeline={stages} needs a Transformer with model.scan=True, whose blocks are stacked; or mesh.pipeline=1.")
    for layers in stacks:
        if layers % stages:
            sizes = ", ".join(str(n) for n in range(1, layers + 1) if layers % n == 0)
            raise ConfigError(f"config.mesh.pipeline={stages} does not divide the {layers} layers of the model; sizes that do: {sizes}.")


def _largest(shape: tuple[int, ...], layout: Layout) -> tuple[str | None, ...]:
    """Return logical axes that shard the largest dimension that divides; of equal ones, the last."""
    ways = layout.size("largest")
    best = max((i for i, size in enumerate(shape) if size % ways == 0), key=lambda i: (shape[i], i), default=None)
    if math.prod(shape) < SMALL or best is None:
        return (None,) * len(shape)
    return tuple("largest" if i == best else None for i in range(len(shape)))


def parameter_spec(path: str, shape: tuple[int, ...], section: Sharding, layout: Layout) -> PartitionSpec:
    """Return the partition of a parameter.

    Raises:
      ConfigError: a dimension does not divide over its axes.
    """
    names = names_of(path, shape, section, layout)
    for i, name in enumerate(names):
        if name != "vocab" and shape[i] % layout.size(name):
            axes = " × ".join(f"{axis}={layout.mesh.shape[axis]}" for axis in layout.axes(name))
            raise ConfigError(
                f"config.mesh: dimension {i} of {path} {list(shape)} ({name}) does not divide over {axes}. Choose sizes that divide "
                f"{shape[i]}, or replicate that dimension: --config.sharding.rules=\"(('{name}',),)\"."
            )
    # Few vocabularies divide: such a table is replicated along that dimension, with a note.
    return layout.spec(*names, shape=shape)


def place_state(shapes: Any, section: Sharding, layout: Layout) -> Any:
    """Return the shapes of a train state with their shardings.

    Parameters have the shardings of their logical axes, and so do arrays of the same path and shape (moments, EMA). Other arrays of the
    optimizer state are sharded along their largest dimension. Statistics, metrics and counters are replicated.

    Raises:
      ConfigError: a dimension does not divide over its axes, or the layers over stages.
    """
    params = {path: x.shape for part in (shapes.params, shapes.frozen) for path, x in _leaves(part)}
    check_stages(params, layout.mesh.shape["pipeline"], section)
    specs = {path: parameter_spec(path, shape, section, layout) for path, shape in params.items()}
    spread = section.optimizer == "data"
    layout.used.update(_worth_telling(params, specs))

    def place(tree, beside: bool):
        placed = []
        for path, x in _leaves(tree):
            owner = next((p for p in _ends(path) if p in params), None)
            if owner is not None and params[owner] == x.shape:
                spec = specs[owner]
            else:
                spec = layout.spec(*_largest(x.shape, layout))
            if beside and spread:
                spec = _over_data(spec, x.shape, layout)
            placed.append(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(layout.mesh, spec)))
        return jax.tree.unflatten(jax.tree.structure(tree), placed)

    whole = NamedSharding(layout.mesh, PartitionSpec())
    rest = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes)
    return rest.replace(
        params=place(shapes.params, False),
        frozen=place(shapes.frozen, False),
        opt_state=place(shapes.opt_state, True),
        ema=place(shapes.ema, True),
    )


def _worth_telling(params: Mapping[str, tuple[int, ...]], specs: Mapping[str, PartitionSpec]) -> list[str]:
    """Return the axes that shard at least a quarter of the parameters.

    An axis that shards the last layer of a CNN alone is reported as unused.
    """
    sizes: dict[str, int] = {}
    for path, shape in params.items():
        for axis in axes_in(specs[path]):
            sizes[axis] = sizes.get(axis, 0) + math.prod(shape)
    total = sum(math.prod(shape) for shape in params.values())
    return [axis for axis, size in sizes.items() if size >= total / 4]


def _leaves(tree: Any) -> Iterable[tuple[str, Any]]:
    """Return (path, array) of every leaf, with paths such as `blocks/0/mlp/up/kernel`."""
    return ((jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in jax.tree_util.tree_leaves_with_path(tree))


def _ends(path: str) -> Iterable[str]:
    """Return the path without its first, second, … part: the optimizer state stores its arrays under the parameters' paths."""
    parts = path.split("/")
    return ("/".join(parts[i:]) for i in range(len(parts)))


def _over_data(spec: PartitionSpec, shape: tuple[int, ...], layout: Layout) -> PartitionSpec:
    """Return the spec with the axis `data` added to the largest dimension that divides."""
    ways = layout.mesh.shape["data"]
    axes = [part if isinstance(part, tuple) else (part,) if part else () for part in (*spec, *[None] * (len(shape) - len(spec)))]
    parts = [math.prod(layout.mesh.shape[axis] for axis in dimension) for dimension in axes]
    fits = [i for i, size in enumerate(shape) if size % (parts[i] * ways) == 0]
    if ways == 1 or not fits or math.prod(shape) < SMALL:
        return spec
    best = max(fits, key=lambda i: shape[i] // parts[i])
    return PartitionSpec(*(((*dimension, "data") if i == best else dimension) or None for i, dimension in enumerate(axes)))


def notes(layout: Layout) -> list[str]:
    """Return notes about dimensions that are replicated and work that is repeated, for the log and the manifest."""
    busy = {*layout.used, *layout.rules["batch"]}
    idle = [axis for axis, size in layout.mesh.shape.items() if size > 1 and axis not in busy and layout.axis is None]
    repeated = [f"mesh.{axis}={layout.mesh.shape[axis]} shards no part of this model: its devices repeat the same work" for axis in idle]
    fix = "; model.vocab_multiple rounds it up"
    return [*repeated, *(f"{note}: it is replicated on their devices{fix if note.startswith('vocab ') else ''}" for note in layout.left_whole)]


def replicated_notes(shapes: Any, section: Sharding, layout: Layout) -> list[str]:
    """Return notes about replicated parameters of `warn_mb` MiB or more, on a mesh with an axis that could shard them."""
    if all(layout.mesh.shape[axis] == 1 for axis in ("fsdp", "tensor", "expert", "pipeline")):
        return []
    found = ((path, x) for part in (shapes.params, shapes.frozen) for path, x in _leaves(part) if x.sharding.is_fully_replicated)
    sizes = ((path, x.size * x.dtype.itemsize / 2**20) for path, x in found)
    return [f"{path} ({size:.3g} MiB) is replicated on every device; config.sharding can shard it" for path, size in sizes if size >= section.warn_mb]
