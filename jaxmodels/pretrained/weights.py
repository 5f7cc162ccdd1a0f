"""Pretrained models: config section, weights under our names, and the module."""

import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxmodels import config as config_lib
from jaxmodels import models
from jaxmodels.errors import ConfigError
from jaxmodels.models.functional import new_rngs
from jaxmodels.models.lora import ADAPTERS
from jaxmodels.pretrained import architecture as architecture_lib
from jaxmodels.pretrained import folder as folder_lib
from jaxmodels.pretrained import mapping, peft, peft_folder
from jaxmodels.pretrained.architecture import Architecture, Keys
from jaxmodels.pretrained.folder import Folder
from jaxmodels.pretrained.mapping import LazyParameter, Link
from jaxmodels.pretrained.safetensors import Tensor

# Options that do not change the result of evaluation, or only the layout of the parameters.
FREE = {"dropout", "stochastic_depth", "attention", "scan", "remat", "context", "moe", "vocab_multiple"}


_COMPARED = 1 << 24  # bytes that are compared at a time
_HOW_TO_UNTIE = "Set config.model.tie_embeddings=false, so that the model has both."
_NO_SUCH_MODEL = "A model whose two are not tied is not supported."


@dataclasses.dataclass(frozen=True)
class PretrainedWeights:
    """The weights of a pretrained model, under the names of our parameters.

    Attributes:
      folder: of the model.
      architecture: of the model.
      arrays: path of a parameter or statistic -> the array to read.
      fresh: paths of a head that the folder lacks.
      dropped: tensors of heads that our model lacks.
      notes: differences between our model and the pretrained one.
      fingerprint: hash of the files' headers; it does not depend on the values.
      links: tensor of each parameter, also of a head that the folder lacks.
    """

    folder: Folder
    architecture: Architecture
    arrays: Mapping[str, LazyParameter]
    fresh: tuple[str, ...]
    dropped: tuple[str, ...]
    notes: tuple[str, ...]
    fingerprint: str
    links: Sequence[Link]

    @property
    def path(self) -> Path:
        """The folder of the adapters if the reference names some, else of the model."""
        return self.folder.adapters or self.folder.path


def describe(reference: str) -> tuple[Folder, Architecture, dict[str, Any], list[str]]:
    """Return a pretrained model's folder, architecture, options of our model, and notes on keys of its config.json that are not applied.

    Raises:
      ConfigError: no such model, or its architecture or one of its options is not supported.
    """
    folder = folder_lib.find(reference)
    where = str(folder.path / "config.json")
    architecture = architecture_lib.find(folder.config, where)
    keys = Keys(folder.config, where)
    keys.accept(*folder.accepted)
    options = architecture.options(keys, lambda: list(folder_lib.find(reference, weights=True).tensors()))
    keys.finish()
    if options.get("tie_embeddings") and (untied := _untied(folder, architecture)):
        options["tie_embeddings"] = False
        keys.notes.append(f"its config.json ties the embeddings, but {untied}: the model has both")
    return folder, architecture, options, keys.notes


def model_section(reference: str) -> dict[str, Any]:
    """Return the `model` section of a pretrained model."""
    _, architecture, options, _ = describe(reference)
    return {"name": architecture.model} | options


def locate(reference: str, model: Mapping[str, Any], paths: Iterable[str]) -> PretrainedWeights:
    """Locate the weights of a pretrained model; only headers are read.

    Args:
      reference: `hf:PATH_OR_ID`.
      model: the resolved `model` section.
      paths: parameters and statistics of that model.

    Raises:
      ConfigError: the model is of another kind; tensors are missing, unexpected or damaged.
    """
    _, architecture, options, notes = describe(reference)
    folder = folder_lib.find(reference, weights=True)
    if models.find(model["name"])[0] is not models.find(architecture.model)[0]:
        raise ConfigError(f"config.model.name={model['name']!r}: {reference} is a {architecture.name}; leave the name out to use its config.json.")
    paths = list(paths)
    notes = [*notes, *_differences(reference, model, options)]
    published = [architecture.classes[name] for name in folder.config.get("architectures") or () if name in architecture.classes]
    head = architecture.head_in(paths, published[0] if published else None)
    pretrained_head = published[0] if published else head
    entries = architecture.table(options) + architecture.heads[head]
    tensors = mapping.renamed(folder.tensors(), architecture.renames)
    adapters = peft_folder.read(str(folder.adapters)) if folder.adapters else None
    read = tensors | (adapters.tensors if adapters else {})
    fingerprint = hashlib.sha256("".join(f"{name}{t.dtype}{t.shape}{t.offset}" for name, t in sorted(read.items())).encode()).hexdigest()[:32]
    if mapping.unprefixed(tensors, architecture.prefix):
        tensors = {architecture.prefix + name: tensor for name, tensor in tensors.items()}
    every = mapping.expand(entries, architecture.sizes(options), stacked=bool(model.get("scan")))
    # The output layer is transferred only for the same kind of head, since it depends on the classes or tags.
    links = [link for link in every if pretrained_head == head or not link.path.startswith("head/output/")]
    if differs := _differing_copy(tensors, architecture, {link.tensor for link in links}):
        raise ConfigError(f"{folder.path}: {differs}, of which it should be a copy. {_HOW_TO_UNTIE if 'tie_embeddings' in options else _NO_SUCH_MODEL}")
    arrays, missing = {}, []
    for path, group in mapping.by_path(links).items():
        lacking = [link.tensor for link in group if link.tensor not in tensors]
        if not lacking:
            arrays[path] = LazyParameter.of(group, tensors)
        elif not path.startswith(architecture.head_paths):
            missing += lacking
    used = {link.tensor for link in links}
    rest = [name for name in tensors if name not in used and not any(re.search(pattern, name) for pattern in architecture.ignored)]
    dropped = [name for name in rest if re.search(architecture.others, name)]
    _check_complete(folder, missing, [name for name in rest if name not in dropped])
    if adapters:
        arrays = peft.merged(arrays, adapters, peft.under_our_names(adapters, architecture, links)) | peft.saved(adapters, architecture, every)
    fresh = tuple(path for path in paths if path.startswith(architecture.head_paths) and path not in arrays and not path.endswith(ADAPTERS))
    return PretrainedWeights(folder, architecture, arrays, fresh, tuple(dropped), tuple(notes), fingerprint, every)


def _untied(folder: Folder, architecture: Architecture) -> str | None:
    """Return how an output layer on disk differs from the embedding that its config.json ties it to; None if it does not, or has no weights yet."""
    try:
        tensors = mapping.renamed(folder.tensors(), architecture.renames)
    except ConfigError:
        return None
    return _differing_copy(tensors, architecture, ())


def _differing_copy(tensors: Mapping[str, Tensor], architecture: Architecture, used: Collection[str]) -> str | None:
    """Return in words which tensor that is not used differs from the one that it is a copy of; None if none does."""
    for name, original in architecture.copies.items():
        if name in tensors and original in tensors and name not in used:
            stamps = tuple(os.stat(tensors[each].file).st_mtime_ns for each in (name, original))
            if not _are_equal(tensors[name], tensors[original], stamps):
                return f"its {name} differs from {original}"
    return None


@functools.lru_cache
def _are_equal(one: Tensor, other: Tensor, stamps: tuple[int, int]) -> bool:
    """Return whether two tensors have the same values; `stamps` are the times when their files were changed."""
    if one.shape != other.shape:
        return False
    left, right = one.view(), other.view()
    rows = max(1, _COMPARED // max(1, one.nbytes // max(1, one.shape[0] if one.shape else 1)))
    return all(np.array_equal(np.asarray(left[i : i + rows]), np.asarray(right[i : i + rows])) for i in range(0, one.shape[0], rows))


def lora_section(reference: str, model: Mapping[str, Any], directory: str) -> dict[str, Any]:
    """Return the `lora` section of adapters for a pretrained model.

    Args:
      reference: `hf:PATH_OR_ID`, the model.
      model: the `model` section, resolved.
      directory: of the adapters.

    Raises:
      ConfigError: as `describe`, `peft_folder.read` and `peft.under_our_names`.
    """
    _, architecture, options, _ = describe(reference)
    entries = [*architecture.table(options), *(entry for table in architecture.heads.values() for entry in table)]
    links = mapping.expand(dict.fromkeys(entries), architecture.sizes(options), stacked=bool(model.get("scan")))
    return peft.section(peft_folder.read(directory), architecture, links)


def _differences(reference: str, model: Mapping, options: Mapping) -> list[str]:
    """Return notes on the options in which the config differs from the pretrained model."""
    resolved = resolve_options(model["name"], options)
    return [
        f"config.model.{key}={model[key]!r}, where {reference} has {resolved[key]!r}" for key in options if key not in FREE and model.get(key) != resolved[key]
    ]


def resolve_options(name: str, options: Mapping) -> dict:
    """Return a model's options with defaults filled in."""
    return config_lib.check_section("model", dict(options), config_lib.fields(models.find(name)[0]), f"the model {name!r}")


def _check_complete(folder: Folder, missing: list[str], left: list[str]) -> None:
    problems = [f"{name}: missing" for name in missing] + [f"{name}: unexpected, no parameter of the model uses it" for name in left]
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise ConfigError(f"{folder.path}: its tensors do not match its config.json:\n  {shown}\nCopy or download the folder again.")


def load_model(reference: str, *arguments: Any, dtype: Any = np.float32, **options: Any) -> nnx.Module:
    """Load a pretrained model as a plain Flax module.

    Args:
      reference: `hf:PATH_OR_ID`.
      arguments: positional arguments of our model's constructor; by default those of the config.json: vocabulary size, head, image size.
      dtype: of the parameters.
      options: options of our model, such as `scan=True`, that replace those of the config.json.

    Raises:
      ConfigError: as `locate`; or the folder has no weights for the head.
    """
    folder, architecture, own, _ = describe(reference)
    section = {"name": architecture.model} | resolve_options(architecture.model, own | options)
    constructor, _ = models.find(architecture.model)
    given = arguments or pretrained_arguments(folder, architecture)
    keywords = {key: value for key, value in section.items() if key != "name"}
    try:
        abstract = nnx.eval_shape(lambda: constructor(*given, **keywords, rngs=new_rngs(0)))
    except ValueError as error:
        raise ConfigError(f"{folder.path / 'config.json'}: {str(error).splitlines()[0]}.") from error
    graph, state = nnx.split(abstract)
    flat = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}
    pretrained = locate(reference, section, flat)
    if pretrained.fresh:
        raise ConfigError(f"{reference} has no weights for {pretrained.fresh[0]}: the pretrained model has no such head.")
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    for path, leaf in flat.items():
        stored = pretrained.arrays[path]
        if tuple(stored.shape) != tuple(leaf.shape):
            raise ConfigError(f"{reference}: {path}: shape differs: {tuple(leaf.shape)} by its config.json, {stored.shape} in its files.")
        leaf.set_value(stored.read(np.dtype(dtype), here))
    return nnx.merge(graph, state)


def pretrained_arguments(folder: Folder, architecture: Architecture) -> tuple:
    """Return the positional arguments of our model, by the config.json."""
    config = folder.config
    head = pretrained_head(folder, architecture)
    if architecture.images:
        size = config.get("image_size") or 224
        height, width = size if isinstance(size, list) else (size, size)
        return (height, width, config.get("num_channels") or 3), number_of_labels(config)
    vocabulary = Keys(config, str(folder.path / "config.json")).get("vocab_size")
    if architecture.model == "encoder":
        sizes = {"tokens": vocabulary, "class": number_of_labels(config), "tags": number_of_labels(config)}
        return vocabulary, (head, sizes[head])
    return (vocabulary,)


def pretrained_head(folder: Folder, architecture: Architecture) -> str:
    """Return the kind of the pretrained head.

    Raises:
      ConfigError: the model has no supported head.
    """
    names = folder.config.get("architectures") or []
    kinds = [architecture.classes[name] for name in names if name in architecture.classes]
    if not kinds or kinds[0] is None:
        raise ConfigError(
            f"{folder.path}: architectures={names} has no supported head; supported are "
            f"{', '.join(name for name, kind in architecture.classes.items() if kind is not None)}. Fine-tune it with config.init_from instead."
        )
    return kinds[0]


def number_of_labels(config: Mapping) -> int:
    """Return the number of classes or tags of a config.json; 2 by default, as in `transformers`."""
    return len(config["id2label"]) if config.get("id2label") else config.get("num_labels") or 2
