"""Adapters in PEFT's format (`peft_folder.py`) under the names of our parameters: beside their matrices, or merged into them.

PEFT's two matrices are our `lora_a` and `lora_b`, transposed; the magnitudes of DoRA are `lora_m`.

Several of our matrices can be one matrix in PEFT's model (GPT-2's queries, keys and values). A PEFT adapter of it becomes one adapter for each
of ours, with the same `lora_a`. Different adapters of ours become one PEFT adapter: its rank is the sum of their ranks, and its `lora_B` is
block-diagonal.

Shapes: R rank, D input width, F output width.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmodels.errors import ConfigError
from jaxmodels.models.lora import ADAPTERS
from jaxmodels.pretrained import mapping
from jaxmodels.pretrained.architecture import Architecture
from jaxmodels.pretrained.mapping import FORMS, LazyParameter, Link
from jaxmodels.pretrained.peft_folder import INSTEAD, TABLE, Adapters, some

KINDS = ("kernel", "embedding")  # last path component of parameters that can have an adapter


@dataclasses.dataclass(frozen=True)
class Placed:
    """Adapters by parameter paths of our model.

    Attributes:
      arrays: path of `lora_a`, `lora_b` or `lora_m` -> parameter, read lazily.
      matrices: path of the adapted matrix -> paths of its `lora_a` and `lora_b`; with DoRA also of its `lora_m`.
    """

    arrays: Mapping[str, LazyParameter]
    matrices: Mapping[str, tuple[str, ...]]


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
        raise ConfigError(f"{adapters.path}: adapters for {some(strange)} of {architecture.name} are not supported. {INSTEAD}")
    _check_tied(adapters, architecture, modules, output, by_module)
    parts: dict[str, tuple[list[Link], ...]] = {}
    for name, names in modules.items():
        for link in by_module.get(name, ()):
            links_of_adapter = _adapter_links(adapters, name, names, link)
            for group, one in zip(parts.setdefault(link.path, tuple([] for _ in names)), links_of_adapter or (), strict=False):
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
        matrices[path] = tuple(f"{layer}/{name}" for name in ADAPTERS[: len(pair)])
        arrays |= {where: LazyParameter.of(group, adapters.tensors) for where, group in zip(matrices[path], pair, strict=True)}
    return Placed(arrays, matrices)


def _named(adapters: Adapters, architecture: Architecture) -> dict[str, tuple[str, ...]]:
    """Return the tensor names by module, with names of the base class (without a head) completed by its prefix."""
    return {_whole_name(name, adapters, architecture): names for name, names in adapters.modules.items()}


def _whole_name(name: str, adapters: Adapters, architecture: Architecture) -> str:
    prefix = architecture.prefix
    lacks = prefix and not any(each.startswith(prefix) for each in adapters.modules)
    return prefix + name if lacks and name.removesuffix(".weight").removesuffix(".bias") not in _outside(architecture) else name


def _outside(architecture: Architecture) -> set[str]:
    """Return the names of head modules, which have no prefix."""
    return {entry.tensor.removesuffix(".weight") for table in architecture.heads.values() for entry in table} | {"lm_head"}


def _check_tied(adapters: Adapters, architecture: Architecture, modules: Mapping, output: set[str], by_module: Mapping) -> None:
    tables = [name for name in modules if any(link.path == "embed/embedding" for link in by_module.get(name, ()))]
    if not tables and not output:
        return
    paths = {link.path for group in by_module.values() for link in group}
    if architecture.model == "encoder_decoder":
        raise ConfigError(f"{adapters.path}: PEFT does not share the adapter of {(*tables, *output)[0]} between the modules that share it. {INSTEAD}")
    shared = "output/kernel" not in paths and not any(path.startswith("head/output") for path in paths)
    same = _same(adapters, modules[tables[0]], modules[next(iter(output))]) if output and tables else adapters.tied
    if shared and adapters.dora:
        raise ConfigError(f"{adapters.path}: {(*tables, *output)[0]} has DoRA, but is both the embedding and the output layer: not supported. {INSTEAD}")
    if (shared and not same) or (output and not tables):
        name = (*tables, *output)[0]
        raise ConfigError(f"{adapters.path}: {name} has a separate adapter, but is shared by the embedding and the output layer. {INSTEAD}")


def _same(adapters: Adapters, table: tuple[str, ...], matrix: tuple[str, ...]) -> bool:
    """Return whether an output layer's adapter equals an embedding's, transposed."""
    (a, b), (c, d) = ([adapters.tensors[name].view() for name in names[:2]] for names in (table, matrix))
    return np.array_equal(c, b.T) and np.array_equal(d, a.T)


def _adapter_links(adapters: Adapters, module: str, names: tuple[str, ...], link: Link) -> tuple[Link, ...] | None:
    """Return the links of `lora_a`, `lora_b` and `lora_m` for the matrix of `link`, or None if this adapter is zero for it."""
    layer = link.path.rpartition("/")[0]
    rank = adapters.tensors[names[0]].shape[0]
    forms, parts = ["transposed", "transposed", "same"], [None, link.part, link.part]
    if link.part is not None and rank != adapters.rank:
        i, stop, n = link.part
        if rank != n * adapters.rank or stop != i + 1:
            raise ConfigError(f"{adapters.path}: {module} has rank {rank}; expected {n} adapters of rank {adapters.rank}. {INSTEAD}")
        if not adapters.dora and not np.any(adapters.tensors[names[0]].view()[i * adapters.rank : (i + 1) * adapters.rank]):
            return None
        forms[1] = _rows(i, n)
        parts[0] = link.part
    paths = (f"{layer}/{name}" for name in ADAPTERS)
    return tuple(Link(path, link.index, tensor, form, part) for path, tensor, form, part in zip(paths, names, forms, parts, strict=False))


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
    return {"rank": adapters.rank, "alpha": adapters.scale * adapters.rank, "targets": tuple(dict.fromkeys(targets)), "dora": adapters.dora}


def _kind(path: str) -> str:
    """Return a pattern for a path with any layer number."""
    return re.sub(r"(?<=/)\d+(?=/|$)", r"\\d+", path)


def saved(adapters: Adapters, architecture: Architecture, links: Sequence[Link]) -> dict[str, LazyParameter]:
    """Return the parameters of modules that were trained in full (`modules_to_save`), by path; they replace those of the base model.

    Raises:
      ConfigError: the model has no such parameter; only some of the tensors of a parameter are there; or an embedding and the output layer that
        shares it were trained apart.
    """
    names = {_whole_name(name, adapters, architecture): adapters.tensors[tensor] for name, tensor in adapters.saved.items()}
    tensors = mapping.renamed(names, architecture.renames)
    known = {link.tensor for link in links}
    copies = [name for name in tensors if name not in known and name in architecture.copies]
    if strange := [name for name in tensors if name not in known and name not in copies]:
        raise ConfigError(f"{adapters.path}: modules_to_save: {architecture.name} has no {some(strange)} here. {INSTEAD}")
    for name, original in architecture.copies.items():
        shared = name not in known and not any(link.path.startswith(("output/", "head/output/")) for link in links)
        both = [tensors[each] for each in (name, original) if each in tensors]
        equal = len(both) == 2 and np.array_equal(both[0].view(), both[1].view())
        if shared and both and not equal and not (original in tensors and name not in tensors and adapters.tied):
            raise ConfigError(f"{adapters.path}: modules_to_save: {original} and {name} are one parameter of the model, but were trained apart. {INSTEAD}")
    result = {}
    for path, group in mapping.by_path(links).items():
        lacking = [link.tensor for link in group if link.tensor not in tensors]
        if len(lacking) == len(group):
            continue
        if lacking:
            raise ConfigError(f"{adapters.path}: modules_to_save has a part of {path} only, no {lacking[0]}. {INSTEAD}")
        result[path] = LazyParameter.of(group, tensors)
    return result


@dataclasses.dataclass(frozen=True)
class Merged(LazyParameter):
    """A matrix into which an adapter is merged while reading.

    Attributes:
      a, b: the adapter's matrices.
      scale: factor on their product.
      magnitude: lengths of the columns; None without DoRA.
    """

    a: LazyParameter
    b: LazyParameter
    scale: float
    magnitude: LazyParameter | None = None

    def values(self, ranges: Sequence[tuple[int, int]], dtype: np.dtype) -> np.ndarray:
        """Return a slice, one (start, stop) for each dimension, with the adapter merged in float32."""
        *stack, rows, columns = ranges
        read = rows if self.magnitude is None else (0, self.shape[-2])  # a column's length needs all of it
        every = (0, self.a.shape[-1])
        a, b = self.a.values([*stack, read, every], np.float32), self.b.values([*stack, every, columns], np.float32)
        whole = super().values([*stack, read, columns], np.float32) + self.scale * (a @ b)
        if self.magnitude is not None:
            lengths = np.linalg.norm(whole, axis=-2)
            factors = self.magnitude.values([*stack, columns], np.float32) / np.where(lengths > 0, lengths, 1)
            whole = whole[..., slice(*rows), :] * factors[..., None, :]
        return whole.astype(dtype)


def merged(arrays: Mapping[str, LazyParameter], adapters: Adapters, placed: Placed) -> dict[str, LazyParameter]:
    """Return parameters with their adapters merged.

    Raises:
      ConfigError: an adapter's shape does not match its matrix.
    """
    result = dict(arrays)
    for path, (a, b, *magnitude) in placed.matrices.items():
        if path in arrays:
            check_shape(path, arrays[path].shape, a, placed.arrays[a].shape, b, placed.arrays[b].shape)
            base = {field.name: getattr(arrays[path], field.name) for field in dataclasses.fields(LazyParameter)} | {"dtype": np.dtype(np.float32)}
            beside = {"a": placed.arrays[a], "b": placed.arrays[b], "magnitude": placed.arrays[magnitude[0]] if magnitude else None}
            result[path] = Merged(**base, **beside, scale=adapters.scale)
    return result


def check_shape(path: str, shape: Sequence[int], a: str, a_shape: Sequence[int], b: str, b_shape: Sequence[int]) -> None:
    """Raise ConfigError unless the shapes of `a` and `b` fit the matrix that they adapt."""
    if (*a_shape[:-1], b_shape[-1]) != tuple(shape) or a_shape[-1] != b_shape[-2]:
        raise ConfigError(f"{path} has shape {tuple(shape)}, but its adapter is {a} {tuple(a_shape)} and {b} {tuple(b_shape)}: wrong base model.")
