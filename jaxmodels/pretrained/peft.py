"""Low-rank adapters (Hu et al. 2021) as PEFT keeps them: `adapter_config.json` and `adapter_model.safetensors`, in and out.

What the tables say of a matrix, says where its adapter belongs: of `NAME.weight` it is `base_model.model.NAME.lora_A.weight`, our `lora_a`
transposed, and `lora_B`; of an embedding `lora_embedding_A` and `lora_embedding_B`. Where several of our matrices are one there (GPT-2's
queries, keys and values), an adapter of theirs is one of each of ours with the same `lora_a`; ours, which differ, are one adapter
there whose rank is the sum of theirs, and whose `lora_B` has their blocks on its diagonal.

Shapes: R rank, D width in, F width out.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.errors import ConfigError
from jaxmodels.models.lora import ADAPTERS
from jaxmodels.pretrained import safetensors
from jaxmodels.pretrained.architecture import Architecture
from jaxmodels.pretrained.folder import is_pretrained, place, read_json
from jaxmodels.pretrained.mapping import FORMS, LazyParameter, Link
from jaxmodels.pretrained.safetensors import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
MATRIX, TABLE = (".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")
KINDS = ("kernel", "embedding")  # the last part of the paths of what has an adapter

# Keys of an adapter_config.json that say nothing of what adapters compute, or what their tensors say anyway.
_HARMLESS = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "runtime_config"),
    *("r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "lora_dropout", "fan_in_fan_out", "megatron_core"),
    *("qalora_group_size", "eva_config", "ensure_weight_tying", "rank_pattern", "alpha_pattern"),
}
_PLAIN_STARTS = (True, None, "gaussian", "eva")  # of init_lora_weights: those that leave the model's own weights as they are
_INSTEAD = "Merge the adapters into their model with PEFT (merge_and_unload), and import that."


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Adapters on disk.

    Attributes:
      path: their folder.
      base: the model that they were trained for, as their config names it.
      rank: R.
      scale: that their products are multiplied with.
      modules: name of a module -> names of its two tensors.
      tensors: by name.
      tied: an embedding's adapter stands for the output layer's too.
    """

    path: Path
    base: str | None
    rank: int
    scale: float
    modules: Mapping[str, tuple[str, str]]
    tensors: Mapping[str, Tensor]
    tied: bool

    def rank_of(self, module: str) -> int:
        return self.tensors[self.modules[module][0]].shape[0]


def read(directory: str) -> Adapters:
    """The adapters in a folder, or on the hub (`hf:OWNER/NAME`); of tensors only headers are read.

    Raises:
      ConfigError: there are none, they are a pickle or damaged, or have an option that makes them something else than products of two
        matrices; names it.
    """
    path = place(directory, weights=True) if is_pretrained(directory) else Path(directory).expanduser().absolute()
    if not (path / CONFIG).is_file():
        raise ConfigError(f"{path} holds no adapters: it has no {CONFIG}.")
    if not (path / WEIGHTS).is_file():
        if (path / "adapter_model.bin").is_file():
            raise ConfigError(
                f"{path} has its adapters in adapter_model.bin, a pickle, which may run any code when it is read; only {WEIGHTS} is. "
                "Save them anew with safe_serialization=True."
            )
        raise ConfigError(f"{path} has no {WEIGHTS}. Copy or download it.")
    config, where = read_json(path / CONFIG), path / CONFIG
    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        raise ConfigError(f"{where}: peft_type={config['peft_type']!r} is not supported; only LORA is. {_INSTEAD}")
    _check_options(config, where)
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise ConfigError(f"{where}: r={rank!r} and lora_alpha={alpha!r} are no rank and scale.")
    tensors = safetensors.read_header(path / WEIGHTS)
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    adapters = Adapters(path, config.get("base_model_name_or_path"), rank, scale, _modules(tensors, path), tensors, _tied(config))
    _check_ranks(adapters, config)
    return adapters


def _tied(config: Mapping[str, Any]) -> bool:
    """PEFT ties embeddings of this name alone."""
    targets = config.get("target_modules")
    return bool(config.get("ensure_weight_tying")) and isinstance(targets, list) and any(name.split(".")[-1] == "embed_tokens" for name in targets)


def _check_options(config: Mapping[str, Any], where: Path) -> None:
    start = config.get("init_lora_weights", True)
    if not (isinstance(start, bool) or start in _PLAIN_STARTS):
        raise ConfigError(f"{where}: init_lora_weights={start!r} changes the model's own weights, and is not supported. {_INSTEAD}")
    for key, value in config.items():
        if key not in _HARMLESS and key != "init_lora_weights" and value not in (None, False, "none", {}, []):
            raise ConfigError(f"{where}: {key}={value!r} changes what the adapters compute, and is not supported. {_INSTEAD}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")


def _modules(tensors: Mapping[str, Tensor], path: Path) -> dict[str, tuple[str, str]]:
    modules: dict[str, tuple[str, str]] = {}
    strange = []
    for name in tensors:
        pair = next((pair for pair in (MATRIX, TABLE) if name.endswith(pair)), None)
        if pair is None or not name.startswith(PREFIX):
            strange.append(name)
            continue
        module = name.removesuffix(pair[0]).removesuffix(pair[1])
        if other := next((module + end for end in pair if module + end not in tensors), None):
            raise ConfigError(f"{path / WEIGHTS} has {name}, and no {other}. Copy or download it anew.")
        modules[module.removeprefix(PREFIX)] = (module + pair[0], module + pair[1])
    if strange:
        raise ConfigError(f"{path / WEIGHTS} has tensors that are no adapters: {_some(strange)}. {_INSTEAD}")
    if not modules:
        raise ConfigError(f"{path / WEIGHTS} has no adapters in it.")
    for module, (a, b) in modules.items():
        shapes = tensors[a].shape, tensors[b].shape
        if any(len(shape) != 2 for shape in shapes) or shapes[0][0] != shapes[1][1]:
            raise ConfigError(f"{path / WEIGHTS}: {a} is {list(shapes[0])} and {b} {list(shapes[1])}, which is no adapter of {module}.")
    return modules


def _check_ranks(adapters: Adapters, config: Mapping[str, Any]) -> None:
    """Every adapter has one rank and scale, but for those that `export_adapters` makes of several."""
    where = adapters.path / CONFIG
    patterns = {key: config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    for module in adapters.modules:
        found = {key: next((v for name, v in values.items() if re.match(rf"(.*\.)?({name})$", module)), None) for key, values in patterns.items()}
        rank, alpha = found["rank_pattern"] or adapters.rank, found["alpha_pattern"] or config.get("lora_alpha", 8)
        if adapters.rank_of(module) != rank:
            name = adapters.modules[module][0]
            raise ConfigError(f"{where}: {module} has the rank {rank}, but {name} is {list(adapters.tensors[name].shape)}.")
        if rank == adapters.rank and alpha == config.get("lora_alpha", 8):
            continue
        same = not config.get("use_rslora") and math.isclose(alpha / rank, adapters.scale)
        if rank % adapters.rank or not same or _blocks(adapters, module) is None:
            key = next(key for key in patterns if patterns[key])
            raise ConfigError(f"{where}: {key}={patterns[key]!r}: adapters of several ranks or scales are not supported. {_INSTEAD}")


def _blocks(adapters: Adapters, module: str) -> int | None:
    """How many adapters of rank R a larger one is made of, on the diagonal of its second matrix; None if it is not so made."""
    a, b = (adapters.tensors[name].view() for name in adapters.modules[module])
    count = adapters.rank_of(module) // adapters.rank
    if b.shape[0] % count:
        return None
    b = b.reshape(count, -1, count, adapters.rank)
    return count if not any(np.any(b[i, :, j]) for i in range(count) for j in range(count) if i != j) else None


@dataclasses.dataclass(frozen=True)
class Placed:
    """Adapters under our names.

    Attributes:
      arrays: path of `lora_a` or `lora_b` -> how it is read.
      matrices: path of the matrix beside -> the paths of the two.
    """

    arrays: Mapping[str, LazyParameter]
    matrices: Mapping[str, tuple[str, str]]


def under_our_names(adapters: Adapters, architecture: Architecture, links: Iterable[Link]) -> Placed:
    """Where adapters belong in a model here.

    Args:
      adapters: of `read`.
      architecture: of the model that they are for.
      links: of that model's parameters.

    Raises:
      ConfigError: some are for modules that the model does not have, or that have none here; of some layers alone where layers are stacked;
        of an embedding which is the output layer too, unless both are adapted.
    """
    by_module = {link.theirs.removesuffix(".weight"): [] for link in links}
    for link in links:
        by_module[link.theirs.removesuffix(".weight")].append(link)
    modules = _named(adapters, architecture)
    output = {name for name in modules if any(re.search(pattern, f"{name}.weight") for pattern in architecture.ignored)} - by_module.keys()
    strange = [name for name in modules if name not in by_module and name not in output]
    for name, pair in modules.items():
        group = by_module.get(name, [])
        table = pair[0].endswith(TABLE[0])
        if any(link.form not in ("same", "transposed") or link.ours.rpartition("/")[2] != KINDS[table] for link in group):
            strange.append(name)
    if strange:
        raise ConfigError(f"{adapters.path}: there are no adapters here for {_some(strange)} of {architecture.name}. {_INSTEAD}")
    _check_tied(adapters, architecture, modules, output, by_module)
    parts: dict[str, tuple[list[Link], list[Link]]] = {}
    for name, pair in modules.items():
        for link in by_module.get(name, ()):
            made = _adapter_links(adapters, name, pair, link)
            for group, one in zip(parts.setdefault(link.ours, ([], [])), made or (), strict=False):
                group.append(one)
    arrays, matrices = {}, {}
    for path, pair in parts.items():
        if not pair[0]:
            continue  # one of several in one, which has none
        own = [link for link in links if link.ours == path]
        if len(pair[0]) != len(own):
            lacking = sorted({link.theirs.removesuffix(".weight") for link in own} - modules.keys())
            cure = "with config.model.scan all layers have one, or none"
            raise ConfigError(f"{adapters.path} has adapters of some layers alone, none of {lacking[0]}: {cure}.")
        layer = path.rpartition("/")[0]
        matrices[path] = tuple(f"{layer}/{name}" for name in ADAPTERS)
        arrays |= {where: LazyParameter.of(group, adapters.tensors) for where, group in zip(matrices[path], pair, strict=True)}
    return Placed(arrays, matrices)


def _named(adapters: Adapters, architecture: Architecture) -> dict[str, tuple[str, str]]:
    """Modules as the class with a head names them."""
    prefix, names = architecture.prefix, adapters.modules
    lacks = prefix and not any(name.startswith(prefix) for name in names)
    return {prefix + name if lacks and name not in _outside(architecture) else name: pair for name, pair in names.items()}


def _outside(architecture: Architecture) -> set[str]:
    """Modules of heads."""
    return {entry.theirs.removesuffix(".weight") for table in architecture.heads.values() for entry in table} | {"lm_head"}


def _check_tied(adapters: Adapters, architecture: Architecture, modules: Mapping, output: set[str], by_module: Mapping) -> None:
    tables = [name for name in modules if any(link.ours == "embed/embedding" for link in by_module.get(name, ()))]
    if not tables and not output:
        return
    paths = {link.ours for group in by_module.values() for link in group}
    if architecture.model == "encoder_decoder":
        raise ConfigError(f"{adapters.path}: {(*tables, *output)[0]} is shared by several modules there, whose adapters are not. {_INSTEAD}")
    shared = "output/kernel" not in paths and not any(path.startswith("head/output") for path in paths)
    same = _same(adapters, modules[tables[0]], modules[next(iter(output))]) if output and tables else adapters.tied
    if (shared and not same) or (output and not tables):
        name = (*tables, *output)[0]
        raise ConfigError(f"{adapters.path}: {name} has an adapter of its own, but is embedding and output layer in one here. {_INSTEAD}")


def _same(adapters: Adapters, table: tuple[str, str], matrix: tuple[str, str]) -> bool:
    """Whether an output layer's adapter is that of an embedding, which multiplies from the other side."""
    (a, b), (c, d) = ([adapters.tensors[name].view() for name in pair] for pair in (table, matrix))
    return np.array_equal(c, b.T) and np.array_equal(d, a.T)


def _adapter_links(adapters: Adapters, module: str, pair: tuple[str, str], link: Link) -> tuple[Link, Link] | None:
    """Our two matrices beside the one of `link`, as parts of an adapter there; None if this adapter has none for it."""
    layer = link.ours.rpartition("/")[0]
    rank = adapters.tensors[pair[0]].shape[0]
    forms, parts = ["transposed", "transposed"], [None, link.part]
    if link.part is not None and rank != adapters.rank:
        i, n = link.part
        if rank != n * adapters.rank:
            raise ConfigError(f"{adapters.path}: {module} has the rank {rank}, which are not {n} adapters of {adapters.rank}. {_INSTEAD}")
        if not np.any(adapters.tensors[pair[0]].view()[i * adapters.rank : (i + 1) * adapters.rank]):
            return None
        forms[1] = _rows(i, n)
        parts[0] = link.part
    ours = (f"{layer}/{name}" for name in ADAPTERS)
    return tuple(Link(path, link.index, theirs, form, part) for path, theirs, form, part in zip(ours, pair, forms, parts, strict=True))


def _rows(i: int, n: int) -> str:
    """The form of the i-th of n blocks of columns, transposed."""
    name = f"rows{i}of{n}"
    FORMS[name] = (lambda x: x.swapaxes(-1, -2)[i * (x.shape[-1] // n) : (i + 1) * (x.shape[-1] // n)], lambda x: x.swapaxes(-1, -2))
    return name


def section(adapters: Adapters, architecture: Architecture, links: Sequence[Link]) -> dict[str, Any]:
    """The `lora` section of a config that adapters belong to."""
    chosen = set(under_our_names(adapters, architecture, links).matrices)
    kinds: dict[str, set[str]] = {}
    for link in links:
        if link.ours.endswith(KINDS):
            kinds.setdefault(_kind(link.ours), set()).add(link.ours)
    targets = []
    for path in sorted(chosen):
        layer = path.rpartition("/")[0]
        targets.append(f"^{_kind(layer)}$" if kinds[_kind(path)] <= chosen else f"^{layer}$")
    return {"rank": adapters.rank, "alpha": adapters.scale * adapters.rank, "targets": tuple(dict.fromkeys(targets))}


def _kind(path: str) -> str:
    """A path with any layer's number in it."""
    return re.sub(r"(?<=/)\d+(?=/|$)", r"\\d+", path)


@dataclasses.dataclass(frozen=True)
class Merged(LazyParameter):
    """A matrix with an adapter's product added to it as it is read.

    Attributes:
      a, b: the adapter's.
      scale: of its product.
    """

    a: LazyParameter
    b: LazyParameter
    scale: float

    def values(self, ranges: Sequence[tuple[int, int]], dtype: np.dtype) -> np.ndarray:
        *stack, rows, columns = ranges
        every = (0, self.a.shape[-1])
        a, b = self.a.values([*stack, rows, every], np.float32), self.b.values([*stack, every, columns], np.float32)
        return (super().values(ranges, np.float32) + self.scale * (a @ b)).astype(dtype)


def merged(arrays: Mapping[str, LazyParameter], adapters: Adapters, placed: Placed) -> dict[str, LazyParameter]:
    """Parameters with adapters merged into them.

    Raises:
      ConfigError: an adapter's sizes are not those of its matrix.
    """
    result = dict(arrays)
    for path, (a, b) in placed.matrices.items():
        if path in arrays:
            check_shape(path, arrays[path].shape, a, placed.arrays[a].shape, b, placed.arrays[b].shape)
            base = {field.name: getattr(arrays[path], field.name) for field in dataclasses.fields(LazyParameter)} | {"dtype": np.dtype(np.float32)}
            result[path] = Merged(**base, a=placed.arrays[a], b=placed.arrays[b], scale=adapters.scale)
    return result


def check_shape(path: str, shape: Sequence[int], a: str, a_shape: Sequence[int], b: str, b_shape: Sequence[int]) -> None:
    """Raises ConfigError unless two matrices are an adapter of a third."""
    if (*a_shape[:-1], b_shape[-1]) != tuple(shape) or a_shape[-1] != b_shape[-2]:
        raise ConfigError(f"{path} is {tuple(shape)}, but its adapter is {a} {tuple(a_shape)} and {b} {tuple(b_shape)}: it is one of another model.")
