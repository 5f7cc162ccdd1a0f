"""Where the train state lies: parameter path -> names of its dimensions -> mesh axes."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxmodels.errors import ConfigError
from jaxmodels.parallel.layout import RULES, Layout, axes_in

# Pattern on a parameter's path -> names of its dimensions, of which the first that matches counts; `layout.RULES` says what
# names mean. Stacked blocks have one dimension more, in front: `layers`. Parameters that no pattern names are spread
# along `largest`, if they have SMALL values or more.
PARAMETERS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # Transformers of all shapes
    (r"(norm|_norm)/(scale|bias)$", (None,)),
    (r"embed/embedding$", ("vocab", "embed")),
    (r"(positions|types)/embedding$", (None, "embed")),
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
    """The `sharding` section: how parameters and sequences are spread over the axes of `mesh`.

    Attributes:
      parameters: (pattern, name, name, …): names of the dimensions of parameters whose path matches; these go before the
        built-in table. An empty name leaves a dimension whole.
      rules: (name, axis, axis, …): the mesh axes that a name is spread over, none to leave it whole; before the built-in ones.
      optimizer: where the optimizer's state and the moving average lie: as the `parameters`, or spread over the copies of the
        `data` axis too (Rajbhandari et al. 2019, stage 1).
      context: how attention spans the parts of a sequence: `gather` brings keys and values together; `heads` gives each
        device all positions of a share of the heads; `ring` passes keys and values round.
      microbatches: parts of a batch that are in a pipeline at a time; as many as stages unless given.
      warn_mb: a parameter that is whole on every device, though there are axes to spread it over, is told of from this size on.
    """

    parameters: tuple[tuple[str, ...], ...] = ()
    rules: tuple[tuple[str, ...], ...] = ()
    optimizer: Literal["parameters", "data"] = "parameters"
    context: Literal["gather", "heads", "ring"] = "gather"
    microbatches: int | None = None
    warn_mb: float = 16.0


def check(section: Sharding) -> None:
    """Raises ConfigError for a rule or pattern that can mean nothing."""
    for key in ("rules", "parameters"):
        if not all(getattr(section, key)):
            raise ConfigError(f"config.sharding.{key} holds tuples of a {'name' if key == 'rules' else 'pattern'} and more, got an empty one.")
    for name, *axes in section.rules:
        if len(set(axes)) < len(axes):
            raise ConfigError(f"config.sharding.rules: {name!r} is spread over an axis twice: {', '.join(axes)}.")
        if name not in RULES:
            raise ConfigError(f"config.sharding.rules: there is no name {name!r}; there are {', '.join(RULES)}.")
        for axis in axes:
            if axis not in {a for rule in RULES.values() for a in rule}:
                raise ConfigError(f"config.sharding.rules: there is no mesh axis {axis!r} for {name!r} to be spread over.")
    for pattern, *names in section.parameters:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"config.sharding.parameters: {pattern!r} is not a regular expression: {error}.") from error
        for name in names:
            if name and name not in RULES:
                raise ConfigError(f"config.sharding.parameters: there is no name {name!r} for {pattern!r}; there are {', '.join(RULES)}.")


def check_patterns(params: Mapping[str, tuple[int, ...]], section: Sharding) -> None:
    """Raises ConfigError for a pattern that matches no parameter of such paths and shapes, or names more or fewer dimensions than it has."""
    for pattern, *names in section.parameters:
        matched = {path: shape for path, shape in params.items() if re.search(pattern, path)}
        if not matched:
            raise ConfigError(f"config.sharding.parameters: {pattern!r} matches no parameter; there are {', '.join(list(params)[:8])}, …")
        if not any(len(shape) in (len(names), len(names) + 1) for shape in matched.values()):
            path, shape = next(iter(matched.items()))
            raise ConfigError(f"config.sharding.parameters: {pattern!r} names {len(names)} dimensions, but {path} is {list(shape)}.")


def make_layout(mesh: jax.sharding.Mesh, section: Sharding, partition: str = "jit") -> Layout:
    """The layout of a run.

    Raises:
      ConfigError: `pmap` with an axis that cuts the model.
    """
    rules = dict(RULES) | {name: tuple(axes) for name, *axes in section.rules}
    if partition == "pmap":
        cut = [axis for axis, size in mesh.shape.items() if size > 1 and axis not in ("data", "slices")]
        if cut or section.optimizer == "data":
            what = f"mesh.{cut[0]}={mesh.shape[cut[0]]}" if cut else "sharding.optimizer=data"
            raise ConfigError(f"config.partition=pmap has the whole model on every device, so config.{what} cannot be; use partition=jit for it.")
    stages = mesh.shape["pipeline"]
    microbatches = (section.microbatches or stages) if stages > 1 else 1
    return Layout(mesh, rules, section.context, microbatches, axis="devices" if partition == "pmap" else None)


def names_of(path: str, shape: tuple[int, ...], section: Sharding, layout: Layout) -> tuple[str | None, ...]:
    """The names of a parameter's dimensions."""
    return _named(path, shape, section) or _largest(shape, layout)


def _named(path: str, shape: tuple[int, ...], section: Sharding) -> tuple[str | None, ...] | None:
    """What the first pattern that matches says; None where none does."""
    own = [(pattern, tuple(name or None for name in names)) for pattern, *names in section.parameters]
    for pattern, names in (*own, *PARAMETERS):
        if re.search(pattern, path) and len(shape) in (len(names), len(names) + 1):
            return names if len(shape) == len(names) else ("layers", *names)
    return None


def check_stages(params: Mapping[str, tuple[int, ...]], stages: int, section: Sharding) -> None:
    """Raises ConfigError where a model, of parameters of such paths and shapes, cannot be cut into so many stages of a pipeline."""
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
    """The largest dimension that divides, and of those the last."""
    ways = layout.size("largest")
    best = max((i for i, size in enumerate(shape) if size % ways == 0), key=lambda i: (shape[i], i), default=None)
    if math.prod(shape) < SMALL or best is None:
        return (None,) * len(shape)
    return tuple("largest" if i == best else None for i in range(len(shape)))


def parameter_spec(path: str, shape: tuple[int, ...], section: Sharding, layout: Layout) -> PartitionSpec:
    """Where a parameter lies.

    Raises:
      ConfigError: a dimension does not divide over its axes.
    """
    names = names_of(path, shape, section, layout)
    for i, name in enumerate(names):
        if name != "vocab" and shape[i] % layout.size(name):
            axes = " × ".join(f"{axis}={layout.mesh.shape[axis]}" for axis in layout.axes(name))
            raise ConfigError(
                f"config.mesh: dimension {i} of {path} {list(shape)} ({name}) does not divide over {axes}. Choose sizes that divide "
                f"{shape[i]}, or leave that dimension whole: --config.sharding.rules=\"(('{name}',),)\"."
            )
    # Few vocabularies divide by anything: such a table stays whole along it, and the layout says so.
    return layout.spec(*names, shape=shape)


def place_state(shapes: Any, section: Sharding, layout: Layout) -> Any:
    """The shapes of a train state, each with its sharding.

    Parameters and what is shaped like them (moments, moving average) lie alike. Of the optimizer's state, other arrays
    that belong to no parameter are spread along their largest dimension; statistics, metrics and counters are whole.

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
    """Axes that a quarter of the parameters or more is spread over: the last layer of a CNN alone is not what an axis is there for."""
    sizes: dict[str, int] = {}
    for path, shape in params.items():
        for axis in axes_in(specs[path]):
            sizes[axis] = sizes.get(axis, 0) + math.prod(shape)
    total = sum(math.prod(shape) for shape in params.values())
    return [axis for axis, size in sizes.items() if size >= total / 4]


def _leaves(tree: Any) -> Iterable[tuple[str, Any]]:
    """(path, array) of every leaf, the path such as `blocks/0/mlp/up/kernel`."""
    return ((jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in jax.tree_util.tree_leaves_with_path(tree))


def _ends(path: str) -> Iterable[str]:
    """The path without its first, second, … part: an optimizer keeps its arrays under the parameters' own paths."""
    parts = path.split("/")
    return ("/".join(parts[i:]) for i in range(len(parts)))


def _over_data(spec: PartitionSpec, shape: tuple[int, ...], layout: Layout) -> PartitionSpec:
    """The spec with the copies' axis added to the largest dimension that divides."""
    ways = layout.mesh.shape["data"]
    axes = [part if isinstance(part, tuple) else (part,) if part else () for part in (*spec, *[None] * (len(shape) - len(spec)))]
    parts = [math.prod(layout.mesh.shape[axis] for axis in dimension) for dimension in axes]
    fits = [i for i, size in enumerate(shape) if size % (parts[i] * ways) == 0]
    if ways == 1 or not fits or math.prod(shape) < SMALL:
        return spec
    best = max(fits, key=lambda i: shape[i] // parts[i])
    return PartitionSpec(*(((*dimension, "data") if i == best else dimension) or None for i, dimension in enumerate(axes)))


def notes(layout: Layout) -> list[str]:
    """What a traced function leaves whole, or repeats: for the log and the manifest."""
    busy = {*layout.used, *layout.rules["batch"]}
    idle = [axis for axis, size in layout.mesh.shape.items() if size > 1 and axis not in busy and layout.axis is None]
    repeated = [f"nothing of this model is spread over mesh.{axis}={layout.mesh.shape[axis]}: those devices repeat each other's work" for axis in idle]
    return [*repeated, *(f"{note}: it stays whole on each of their devices" for note in layout.left_whole)]


def replicated_notes(shapes: Any, section: Sharding, layout: Layout) -> list[str]:
    """Parameters of `warn_mb` or more that are whole on every device, where there is an axis for them."""
    if all(layout.mesh.shape[axis] == 1 for axis in ("fsdp", "tensor", "expert", "pipeline")):
        return []
    found = ((path, x) for part in (shapes.params, shapes.frozen) for path, x in _leaves(part) if x.sharding.is_fully_replicated)
    sizes = ((path, x.size * x.dtype.itemsize / 2**20) for path, x in found)
    return [
        f"{path} ({size:.3g} MiB) is whole on every device: see config.sharding for what could spread it" for path, size in sizes if size >= section.warn_mb
    ]
