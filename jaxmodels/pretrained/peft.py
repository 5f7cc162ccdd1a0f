"""Low-rank adapters (Hu et al. 2021) in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

The name of an adapter follows from the name of its matrix. For `NAME.weight`, PEFT has `base_model.model.NAME.lora_A.weight`, which is our
`lora_a` transposed, and `lora_B.weight`; for an embedding, `lora_embedding_A` and `lora_embedding_B`.

Several of our matrices can be one matrix in PEFT's model (GPT-2's queries, keys and values). A PEFT adapter of it becomes one adapter for each
of ours, with the same `lora_a`. Different adapters of ours become one PEFT adapter: its rank is the sum of their ranks, and its `lora_B` is
block-diagonal.

Shapes: R rank, D input width, F output width.
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
from jaxmodels.storage import paths as storage

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
MATRIX, TABLE = (".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")
KINDS = ("kernel", "embedding")  # last path component of parameters that can have an adapter

# Keys of adapter_config.json that do not affect the computation, or that are read elsewhere or follow from the tensors.
_HARMLESS = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "runtime_config"),
    *("r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "lora_dropout", "fan_in_fan_out", "megatron_core"),
    *("qalora_group_size", "eva_config", "ensure_weight_tying", "rank_pattern", "alpha_pattern"),
}
_PLAIN_STARTS = (True, None, "gaussian", "eva")  # values of init_lora_weights that do not change the base model's weights
_INSTEAD = "Merge the adapters into their model with PEFT (merge_and_unload), and import the result."


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Adapters on disk.

    Attributes:
      path: the folder.
      base: name of the base model in the adapters' config.
      rank: R.
      scale: factor on the product of the two matrices.
      modules: name of a module -> names of its two tensors.
      tensors: tensors by name.
      tied: whether an embedding's adapter applies to the output layer too.
    """

    path: Path
    base: str | None
    rank: int
    scale: float
    modules: Mapping[str, tuple[str, str]]
    tensors: Mapping[str, Tensor]
    tied: bool

    def rank_of(self, module: str) -> int:
        """Return the rank of the adapter of a module."""
        return self.tensors[self.modules[module][0]].shape[0]


def read(directory: str) -> Adapters:
    """Open the adapters in a folder or on the hub (`hf:OWNER/NAME`); only headers of tensors are read.

    Raises:
      ConfigError: there are no adapters, they are pickled or damaged, or an option makes them something other than a product of two
        matrices; the message names it.
    """
    path = place(directory, weights=True) if is_pretrained(directory) else storage.parse(directory).expanduser().absolute()
    path = storage.local_copy(path) if isinstance(path, storage.BucketPath) else path
    if not (path / CONFIG).is_file():
        raise ConfigError(f"{path} is not a folder of adapters: it has no {CONFIG}.")
    if not (path / WEIGHTS).is_file():
        if (path / "adapter_model.bin").is_file():
            raise ConfigError(
                f"{path} has its adapters in adapter_model.bin, a pickle, which can execute code when loaded; only {WEIGHTS} is supported. "
                "Save them again with safe_serialization=True."
            )
        raise ConfigError(f"{path} has no {WEIGHTS}. Copy or download it.")
    config, where = read_json(path / CONFIG), path / CONFIG
    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        raise ConfigError(f"{where}: peft_type={config['peft_type']!r} is not supported; only LORA is. {_INSTEAD}")
    _check_options(config, where)
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    if not _is_rank(rank) or not _is_number(alpha):
        raise ConfigError(f"{where}: r={rank!r} and lora_alpha={alpha!r}: r must be an integer of at least 1, and lora_alpha a number.")
    tensors = safetensors.read_header(path / WEIGHTS)
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    adapters = Adapters(path, config.get("base_model_name_or_path"), rank, scale, _modules(tensors, path), tensors, _tied(config))
    _check_ranks(adapters, config)
    return adapters


def _tied(config: Mapping[str, Any]) -> bool:
    """Return whether PEFT ties the output layer's adapter: it does so only for embeddings named `embed_tokens`."""
    targets = config.get("target_modules")
    names = [name for name in targets if isinstance(name, str)] if isinstance(targets, list) else []
    return bool(config.get("ensure_weight_tying")) and any(name.split(".")[-1] == "embed_tokens" for name in names)


def _check_options(config: Mapping[str, Any], where: Path) -> None:
    start = config.get("init_lora_weights", True)
    if not (isinstance(start, bool) or start in _PLAIN_STARTS):
        raise ConfigError(f"{where}: init_lora_weights={start!r} changes the base model's weights and is not supported. {_INSTEAD}")
    for key, value in config.items():
        if key not in _HARMLESS and key != "init_lora_weights" and value not in (None, False, "none", {}, []):
            raise ConfigError(f"{where}: {key}={value!r} changes what the adapters compute and is not supported. {_INSTEAD}")


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


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
            raise ConfigError(f"{path / WEIGHTS} has {name} but no {other}. Copy or download it again.")
        modules[module.removeprefix(PREFIX)] = (module + pair[0], module + pair[1])
    if strange:
        raise ConfigError(f"{path / WEIGHTS} has tensors that do not belong to adapters: {_some(strange)}. {_INSTEAD}")
    if not modules:
        raise ConfigError(f"{path / WEIGHTS} contains no adapters.")
    for module, (a, b) in modules.items():
        shapes = tensors[a].shape, tensors[b].shape
        if any(len(shape) != 2 for shape in shapes) or shapes[0][0] != shapes[1][1]:
            raise ConfigError(f"{path / WEIGHTS}: {a} is {list(shapes[0])} and {b} {list(shapes[1])}; an adapter of {module} needs [R, D] and [F, R].")
    return modules


def _check_ranks(adapters: Adapters, config: Mapping[str, Any]) -> None:
    """Check that all adapters have one rank and scale, except the block-diagonal ones that `export_adapters` writes.

    The keys of the two patterns are names of modules, or the ends of names. PEFT also takes regular expressions; those are refused, since one
    of an untrusted file may take for ever.
    """
    where = adapters.path / CONFIG
    patterns = {key: config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    for key, valid in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        if not isinstance(patterns[key], dict) or not all(map(valid, patterns[key].values())):
            raise ConfigError(f"{where}: {key} must give a number for names of modules. {_INSTEAD}")
        if odd := [name for name in patterns[key] if not re.fullmatch(r"[\w.-]+", name)]:
            raise ConfigError(f"{where}: {key} has {odd[0][:80]!r}, which is no name of a module; regular expressions are not supported. {_INSTEAD}")
    for module in adapters.modules:
        found = {key: next((v for name, v in values.items() if f".{module}".endswith(f".{name}")), None) for key, values in patterns.items()}
        rank, alpha = found["rank_pattern"] or adapters.rank, found["alpha_pattern"] or config.get("lora_alpha", 8)
        if adapters.rank_of(module) != rank:
            name = adapters.modules[module][0]
            raise ConfigError(f"{where}: {module} has rank {rank}, but {name} has shape {list(adapters.tensors[name].shape)}.")
        if rank == adapters.rank and alpha == config.get("lora_alpha", 8):
            continue
        same = not config.get("use_rslora") and math.isclose(alpha / rank, adapters.scale)
        if rank % adapters.rank or not same or _blocks(adapters, module) is None:
            key = next(key for key in patterns if patterns[key])
            raise ConfigError(f"{where}: {key}={patterns[key]!r}: adapters of different ranks or scales are not supported. {_INSTEAD}")


def _blocks(adapters: Adapters, module: str) -> int | None:
    """Return the number of rank-R blocks on the diagonal of an adapter's second matrix, or None if it is not block-diagonal."""
    a, b = (adapters.tensors[name].view() for name in adapters.modules[module])
    count = adapters.rank_of(module) // adapters.rank
    if b.shape[0] % count:
        return None
    b = b.reshape(count, -1, count, adapters.rank)
    return count if not any(np.any(b[i, :, j]) for i in range(count) for j in range(count) if i != j) else None


@dataclasses.dataclass(frozen=True)
class Placed:
    """Adapters by parameter paths of our model.

    Attributes:
      arrays: path of `lora_a` or `lora_b` -> parameter, read lazily.
      matrices: path of the adapted matrix -> paths of its `lora_a` and `lora_b`.
    """

    arrays: Mapping[str, LazyParameter]
    matrices: Mapping[str, tuple[str, str]]


def under_our_names(adapters: Adapters, architecture: Architecture, links: Iterable[Link]) -> Placed:
    """Map adapters to the parameter paths of our model.

    Args:
      adapters: as `read` returns.
      architecture: architecture of the base model.
      links: mapping of the base model's parameters.

    Raises:
      ConfigError: an adapted module does not exist or cannot have an adapter; only some of the stacked layers have adapters; or an
        embedding that is also the output layer has an adapter for one of the two uses only.
    """
    by_module = {link.tensor.removesuffix(".weight"): [] for link in links}
    for link in links:
        by_module[link.tensor.removesuffix(".weight")].append(link)
    modules = _named(adapters, architecture)
    output = {name for name in modules if any(re.search(pattern, f"{name}.weight") for pattern in architecture.ignored)} - by_module.keys()
    strange = [name for name in modules if name not in by_module and name not in output]
    for name, pair in modules.items():
        group = by_module.get(name, [])
        table = pair[0].endswith(TABLE[0])
        if any(link.form not in ("same", "transposed") or link.path.rpartition("/")[2] != KINDS[table] for link in group):
            strange.append(name)
    if strange:
        raise ConfigError(f"{adapters.path}: adapters for {_some(strange)} of {architecture.name} are not supported. {_INSTEAD}")
    _check_tied(adapters, architecture, modules, output, by_module)
    parts: dict[str, tuple[list[Link], list[Link]]] = {}
    for name, pair in modules.items():
        for link in by_module.get(name, ()):
            links_of_pair = _adapter_links(adapters, name, pair, link)
            for group, one in zip(parts.setdefault(link.path, ([], [])), links_of_pair or (), strict=False):
                group.append(one)
    arrays, matrices = {}, {}
    for path, pair in parts.items():
        if not pair[0]:
            continue  # its block of a block-diagonal adapter is zero: no adapter
        own = [link for link in links if link.path == path]
        if len(pair[0]) != len(own):
            lacking = sorted({link.tensor.removesuffix(".weight") for link in own} - modules.keys())
            cure = "with config.model.scan, all layers or none must have one"
            raise ConfigError(f"{adapters.path} has adapters for some layers only, none for {lacking[0]}: {cure}.")
        layer = path.rpartition("/")[0]
        matrices[path] = tuple(f"{layer}/{name}" for name in ADAPTERS)
        arrays |= {where: LazyParameter.of(group, adapters.tensors) for where, group in zip(matrices[path], pair, strict=True)}
    return Placed(arrays, matrices)


def _named(adapters: Adapters, architecture: Architecture) -> dict[str, tuple[str, str]]:
    """Return the tensor names by module, with names of the base class (without a head) completed by its prefix."""
    prefix, names = architecture.prefix, adapters.modules
    lacks = prefix and not any(name.startswith(prefix) for name in names)
    return {prefix + name if lacks and name not in _outside(architecture) else name: pair for name, pair in names.items()}


def _outside(architecture: Architecture) -> set[str]:
    """Return the names of head modules, which have no prefix."""
    return {entry.tensor.removesuffix(".weight") for table in architecture.heads.values() for entry in table} | {"lm_head"}


def _check_tied(adapters: Adapters, architecture: Architecture, modules: Mapping, output: set[str], by_module: Mapping) -> None:
    tables = [name for name in modules if any(link.path == "embed/embedding" for link in by_module.get(name, ()))]
    if not tables and not output:
        return
    paths = {link.path for group in by_module.values() for link in group}
    if architecture.model == "encoder_decoder":
        raise ConfigError(f"{adapters.path}: PEFT does not share the adapter of {(*tables, *output)[0]} between the modules that share it. {_INSTEAD}")
    shared = "output/kernel" not in paths and not any(path.startswith("head/output") for path in paths)
    same = _same(adapters, modules[tables[0]], modules[next(iter(output))]) if output and tables else adapters.tied
    if (shared and not same) or (output and not tables):
        name = (*tables, *output)[0]
        raise ConfigError(f"{adapters.path}: {name} has a separate adapter, but is shared by the embedding and the output layer. {_INSTEAD}")


def _same(adapters: Adapters, table: tuple[str, str], matrix: tuple[str, str]) -> bool:
    """Return whether an output layer's adapter equals an embedding's, transposed."""
    (a, b), (c, d) = ([adapters.tensors[name].view() for name in pair] for pair in (table, matrix))
    return np.array_equal(c, b.T) and np.array_equal(d, a.T)


def _adapter_links(adapters: Adapters, module: str, pair: tuple[str, str], link: Link) -> tuple[Link, Link] | None:
    """Return the links of `lora_a` and `lora_b` for the matrix of `link`, or None if this adapter is zero for it."""
    layer = link.path.rpartition("/")[0]
    rank = adapters.tensors[pair[0]].shape[0]
    forms, parts = ["transposed", "transposed"], [None, link.part]
    if link.part is not None and rank != adapters.rank:
        i, n = link.part
        if rank != n * adapters.rank:
            raise ConfigError(f"{adapters.path}: {module} has rank {rank}; expected {n} adapters of rank {adapters.rank}. {_INSTEAD}")
        if not np.any(adapters.tensors[pair[0]].view()[i * adapters.rank : (i + 1) * adapters.rank]):
            return None
        forms[1] = _rows(i, n)
        parts[0] = link.part
    paths = (f"{layer}/{name}" for name in ADAPTERS)
    return tuple(Link(path, link.index, tensor, form, part) for path, tensor, form, part in zip(paths, pair, forms, parts, strict=True))


def _rows(i: int, n: int) -> str:
    """Register and return the form that transposes a matrix and takes the i-th of n blocks of its rows."""
    name = f"rows{i}of{n}"
    FORMS[name] = (lambda x: x.swapaxes(-1, -2)[i * (x.shape[-1] // n) : (i + 1) * (x.shape[-1] // n)], lambda x: x.swapaxes(-1, -2))
    return name


def section(adapters: Adapters, architecture: Architecture, links: Sequence[Link]) -> dict[str, Any]:
    """Return the `lora` section of the config that matches adapters."""
    chosen = set(under_our_names(adapters, architecture, links).matrices)
    kinds: dict[str, set[str]] = {}
    for link in links:
        if link.path.endswith(KINDS):
            kinds.setdefault(_kind(link.path), set()).add(link.path)
    targets = []
    for path in sorted(chosen):
        layer = path.rpartition("/")[0]
        targets.append(f"^{_kind(layer)}$" if kinds[_kind(path)] <= chosen else f"^{layer}$")
    return {"rank": adapters.rank, "alpha": adapters.scale * adapters.rank, "targets": tuple(dict.fromkeys(targets))}


def _kind(path: str) -> str:
    """Return a pattern for a path with any layer number."""
    return re.sub(r"(?<=/)\d+(?=/|$)", r"\\d+", path)


@dataclasses.dataclass(frozen=True)
class Merged(LazyParameter):
    """A matrix to which an adapter's product is added while reading.

    Attributes:
      a, b: the adapter's matrices.
      scale: factor on their product.
    """

    a: LazyParameter
    b: LazyParameter
    scale: float

    def values(self, ranges: Sequence[tuple[int, int]], dtype: np.dtype) -> np.ndarray:
        """Return a slice, one (start, stop) for each dimension, with the adapter's product added in float32."""
        *stack, rows, columns = ranges
        every = (0, self.a.shape[-1])
        a, b = self.a.values([*stack, rows, every], np.float32), self.b.values([*stack, every, columns], np.float32)
        return (super().values(ranges, np.float32) + self.scale * (a @ b)).astype(dtype)


def merged(arrays: Mapping[str, LazyParameter], adapters: Adapters, placed: Placed) -> dict[str, LazyParameter]:
    """Return parameters with their adapters merged.

    Raises:
      ConfigError: an adapter's shape does not match its matrix.
    """
    result = dict(arrays)
    for path, (a, b) in placed.matrices.items():
        if path in arrays:
            check_shape(path, arrays[path].shape, a, placed.arrays[a].shape, b, placed.arrays[b].shape)
            base = {field.name: getattr(arrays[path], field.name) for field in dataclasses.fields(LazyParameter)} | {"dtype": np.dtype(np.float32)}
            result[path] = Merged(**base, a=placed.arrays[a], b=placed.arrays[b], scale=adapters.scale)
    return result


def check_shape(path: str, shape: Sequence[int], a: str, a_shape: Sequence[int], b: str, b_shape: Sequence[int]) -> None:
    """Raise ConfigError unless the shapes of `a` and `b` fit the matrix that they adapt."""
    if (*a_shape[:-1], b_shape[-1]) != tuple(shape) or a_shape[-1] != b_shape[-2]:
        raise ConfigError(f"{path} has shape {tuple(shape)}, but its adapter is {a} {tuple(a_shape)} and {b} {tuple(b_shape)}: wrong base model.")
