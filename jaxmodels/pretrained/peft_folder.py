"""A folder of adapters in PEFT's format, read: `adapter_config.json` and `adapter_model.safetensors`.

For a matrix `NAME.weight`, PEFT has `base_model.model.NAME.lora_A.weight` and `lora_B.weight`; for an embedding, `lora_embedding_A` and
`lora_embedding_B`; with DoRA also `lora_magnitude_vector`. Modules that were trained in full (`modules_to_save`) have their tensors under
`base_model.model.`.

Each key of adapter_config.json that changes what is computed is used or refused. Which modules have adapters is read from the names of the
tensors, so the keys that choose modules are not needed, regular expressions included.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.errors import ConfigError
from jaxmodels.pretrained import safetensors
from jaxmodels.pretrained.folder import is_pretrained, place, read_json
from jaxmodels.pretrained.safetensors import Tensor
from jaxmodels.storage import paths as storage

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
MATRIX, TABLE = (".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")
MAGNITUDE = ".lora_magnitude_vector"

# Keys of adapter_config.json that do not affect the computation, or that are read elsewhere or follow from the tensors.
_HARMLESS = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "runtime_config"),
    *("r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "lora_dropout", "fan_in_fan_out", "megatron_core"),
    *("qalora_group_size", "eva_config", "ensure_weight_tying", "rank_pattern", "alpha_pattern"),
    *("use_dora", "modules_to_save", "layers_to_transform", "layers_pattern"),
}
_GUESSED = ("classifier", "score")  # heads that PEFT adds to modules_to_save, whether the model has them or not
_PLAIN_STARTS = (None, "gaussian", "eva", "orthogonal", "mica")  # values of init_lora_weights that do not change the base model's weights
INSTEAD = "Merge the adapters into their model with PEFT (merge_and_unload), and import the result."


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Adapters on disk.

    Attributes:
      path: the folder.
      base: name of the base model in the adapters' config.
      rank: R.
      scale: factor on the product of the two matrices.
      modules: name of a module -> names of its two tensors; with DoRA three, the last its magnitudes.
      tensors: tensors by name.
      tied: whether PEFT ties an embedding and the output layer that shares it, as this folder trains them.
      dora: whether the columns of the adapted matrices have trained lengths.
      saved: name of a tensor of the model -> its name here, of modules that were trained in full.
    """

    path: Path
    base: str | None
    rank: int
    scale: float
    modules: Mapping[str, tuple[str, ...]]
    tensors: Mapping[str, Tensor]
    tied: bool
    dora: bool = False
    saved: Mapping[str, str] = dataclasses.field(default_factory=dict)

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
        raise ConfigError(f"{where}: peft_type={config['peft_type']!r} is not supported; only LORA is. {INSTEAD}")
    _check_options(config, where)
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    if not _is_rank(rank) or not _is_number(alpha):
        raise ConfigError(f"{where}: r={rank!r} and lora_alpha={alpha!r}: r must be an integer of at least 1, and lora_alpha a number.")
    tensors = safetensors.read_header(path / WEIGHTS)
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    dora, saved = bool(config.get("use_dora")), _saved(tensors, config.get("modules_to_save") or [], path)
    modules = _modules(tensors, path, dora, saved)
    adapters = Adapters(path, config.get("base_model_name_or_path"), rank, scale, modules, tensors, _tied(config), dora, saved)
    _check_ranks(adapters, config)
    return adapters


def _tied(config: Mapping[str, Any]) -> bool:
    """Return whether PEFT ties the output layer to a trained embedding: it does so only for embeddings named `embed_tokens`."""
    lists = [config.get(key) for key in ("target_modules", "modules_to_save")]
    names = [name for names in lists if isinstance(names, list) for name in names if isinstance(name, str)]
    return bool(config.get("ensure_weight_tying")) and any(name.split(".")[-1] == "embed_tokens" for name in names)


def _check_options(config: Mapping[str, Any], where: Path) -> None:
    start = config.get("init_lora_weights", True)
    if not (isinstance(start, bool) or start in _PLAIN_STARTS):
        raise ConfigError(f"{where}: init_lora_weights={start!r} changes the base model's weights and is not supported. {INSTEAD}")
    for key, value in config.items():
        if key not in _HARMLESS and key != "init_lora_weights" and value not in (None, False, "none", {}, []):
            raise ConfigError(f"{where}: {key}={value!r} changes what the adapters compute and is not supported. {INSTEAD}")


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def some(names: Sequence[str]) -> str:
    """Return the first of some names in words."""
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")


def _saved(tensors: Mapping[str, Tensor], names: Any, path: Path) -> dict[str, str]:
    """Return the tensors of the modules in `modules_to_save`, whose entries are names of modules or the ends of names."""
    if not isinstance(names, list) or not all(isinstance(name, str) and re.fullmatch(r"[\w.-]+", name) for name in names):
        raise ConfigError(f"{path / CONFIG}: modules_to_save={names!r} must be a list of names of modules. {INSTEAD}")
    saved, unused = {}, set(names)
    for tensor in tensors:
        if tensor.startswith(PREFIX) and ".lora_" not in tensor:
            inside = f".{tensor.removeprefix(PREFIX)}"
            found = {name for name in names if f".{name}." in inside}
            saved |= {inside[1:]: tensor} if found else {}
            unused -= found
    if lacking := sorted(unused.difference(_GUESSED)):
        raise ConfigError(f"{path / CONFIG}: modules_to_save names {lacking[0]}, of which {WEIGHTS} has no tensors. Copy or download it again.")
    return saved


def _modules(tensors: Mapping[str, Tensor], path: Path, dora: bool, saved: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    modules: dict[str, tuple[str, ...]] = {}
    strange = []
    for name in tensors:
        if name in saved.values() or (dora and name.endswith(MAGNITUDE)):
            continue
        pair = next((pair for pair in (MATRIX, TABLE) if name.endswith(pair)), None)
        if pair is None or not name.startswith(PREFIX):
            strange.append(name)
            continue
        module = name.removesuffix(pair[0]).removesuffix(pair[1])
        ends = (*pair, MAGNITUDE) if dora else pair
        if other := next((module + end for end in ends if module + end not in tensors), None):
            raise ConfigError(f"{path / WEIGHTS} has {name} but no {other}. Copy or download it again.")
        modules[module.removeprefix(PREFIX)] = tuple(module + end for end in ends)
    known = {name for names in modules.values() for name in names} | set(saved.values())
    if strange := [*strange, *(name for name in tensors if name not in known and name not in strange)]:
        raise ConfigError(f"{path / WEIGHTS} has tensors that do not belong to adapters: {some(strange)}. {INSTEAD}")
    if not modules:
        raise ConfigError(f"{path / WEIGHTS} contains no adapters.")
    for module, (a, b, *magnitudes) in modules.items():
        shapes = tensors[a].shape, tensors[b].shape
        if any(len(shape) != 2 for shape in shapes) or shapes[0][0] != shapes[1][1]:
            raise ConfigError(f"{path / WEIGHTS}: {a} is {list(shapes[0])} and {b} {list(shapes[1])}; an adapter of {module} needs [R, D] and [F, R].")
        if any(tensors[name].shape != shapes[1][:1] for name in magnitudes):
            shape = list(tensors[magnitudes[0]].shape)
            raise ConfigError(f"{path / WEIGHTS}: {magnitudes[0]} is {shape}; an adapter of {module} needs one magnitude for each of {shapes[1][0]} columns.")
        if f"{module}.weight" in saved:
            raise ConfigError(f"{path}: {module} has an adapter and is in modules_to_save. {INSTEAD}")
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
            raise ConfigError(f"{where}: {key} must give a number for names of modules. {INSTEAD}")
        if odd := [name for name in patterns[key] if not re.fullmatch(r"[\w.-]+", name)]:
            raise ConfigError(f"{where}: {key} has {odd[0][:80]!r}, which is no name of a module; regular expressions are not supported. {INSTEAD}")
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
            raise ConfigError(f"{where}: {key}={patterns[key]!r}: adapters of different ranks or scales are not supported. {INSTEAD}")


def _blocks(adapters: Adapters, module: str) -> int | None:
    """Return the number of rank-R blocks on the diagonal of an adapter's second matrix, or None if it is not block-diagonal."""
    a, b = (adapters.tensors[name].view() for name in adapters.modules[module][:2])
    count = adapters.rank_of(module) // adapters.rank
    if b.shape[0] % count:
        return None
    b = b.reshape(count, -1, count, adapters.rank)
    return count if not any(np.any(b[i, :, j]) for i in range(count) for j in range(count) if i != j) else None
