"""Export a run's adapters in PEFT's format, which `pretrained/peft_folder.py` and `pretrained/peft.py` describe.

Shapes: R rank, D input width, F output width.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmodels.errors import ConfigError
from jaxmodels.models import vocabulary
from jaxmodels.models.lora import ADAPTERS, PAIR, Lora
from jaxmodels.pretrained import architecture as architecture_lib
from jaxmodels.pretrained import mapping, safetensors
from jaxmodels.pretrained.architecture import Architecture
from jaxmodels.pretrained.folder import is_pretrained, split_accepted, whole_folder
from jaxmodels.pretrained.mapping import Link
from jaxmodels.pretrained.peft import KINDS
from jaxmodels.pretrained.peft_folder import CONFIG, MAGNITUDE, MATRIX, PREFIX, TABLE, WEIGHTS
from jaxmodels.runs import weights as weights_lib
from jaxmodels.runs.folder import RunFolder
from jaxmodels.runs.weights import Stored
from jaxmodels.storage import paths as storage

_TASKS = {"gpt": "CAUSAL_LM", "encoder_decoder": "SEQ_2_SEQ_LM"}  # none for encoders: PEFT would save their head, trained or not
_INSTEAD = "Export the run with merged adapters: jaxmodels export without --format=peft."


@dataclasses.dataclass
class _Content:
    """Content of an adapter folder.

    Attributes:
      tensors: tensor name -> array.
      modules: name of an adapted module -> rank of its adapter.
      saved: names of fully trained modules (PEFT's `modules_to_save`).
      fan_in_fan_out: whether PEFT's model stores matrices as [in, out], as jaxmodels does.
      tied: whether the output layer is the embedding; its adapter is then written for both.
    """

    tensors: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    modules: dict[str, int] = dataclasses.field(default_factory=dict)
    saved: list[str] = dataclasses.field(default_factory=list)
    fan_in_fan_out: bool = False
    tied: bool = False


def export_adapters(run: str, output: str) -> Path:
    """Write the adapters of a run that started from pretrained weights, for `peft.PeftModel.from_pretrained` on that model.

    Other trained modules, such as a head, are written in full (`modules_to_save`).

    Args:
      run: `RUN`, `RUN@best`, `RUN@latest` or `RUN@STEP`.
      output: a folder that does not exist or is empty. It appears under its name once it is complete.

    Returns:
      The folder.

    Raises:
      ConfigError: the run does not exist, has no adapters or did not start from pretrained weights; PEFT cannot represent what was trained;
        or the folder is not empty.
    """
    located = weights_lib.locate(run)
    folder = located.folder
    config = folder.config()
    if config["lora"] is None:
        raise ConfigError(f"{folder.path} has no adapters (config.lora); export it without --format=peft.")
    lora, base = Lora(**config["lora"]), _base(folder)
    _check_rows(located, config["model"])
    architecture = architecture_lib.load(base["model_type"])
    head = architecture.head_in(located.arrays)
    model = config["model"]
    links = mapping.expand(architecture.entries(model, head), architecture.sizes(model), stacked=bool(model.get("scan")))
    with whole_folder(output) as target:
        content = _content(architecture, links, located, lora)
        tensors = {name: safetensors.ToWrite(x.shape, x.dtype, lambda x=x: x) for name, x in content.tensors.items()}
        safetensors.write(target / WEIGHTS, tensors, {"format": "pt"})
        values = _config(architecture, links, content, lora, base["name"])
        (target / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return storage.parse(output).expanduser().absolute()


def _check_rows(located: weights_lib.Located, model: Mapping[str, Any]) -> None:
    """Raise ConfigError if the run has other rows of the vocabulary than its base model: added tokens, or trained tables with padding."""
    parents, info = located.folder.manifest().get("parents", []), located.folder.manifest().get("info", {})
    if any(rows["stop"] > rows["start"] for rows in (parents[0] if parents else {}).get("resized", {}).values()):
        raise ConfigError(f"{located.name} has added tokens, for which the base model of its adapters has no rows. {_INSTEAD}")
    trained = {path: x for path, x in located.arrays.items() if isinstance(x, Stored) and x.checkpoints == located.folder.checkpoints}
    if vocabulary.padding(trained, model, info.get("vocab_size")):
        raise ConfigError(f"{located.name}: its trained tables have the rows of model.vocab_multiple, which the base model lacks. {_INSTEAD}")


def _base(folder: RunFolder) -> dict[str, str]:
    """Return `name` and `model_type` of the pretrained model that a run started from, directly or through an imported run."""
    parents = folder.manifest().get("parents", [])
    entry = parents[0] if parents else {}
    if len(parents) == 2 and entry.get("step") == 0 and parents[1].get("weights") == "published":
        entry = parents[1]  # written by jaxmodels import
    if not is_pretrained(entry.get("run")):
        problem = "did not start from pretrained weights (init_from=hf:…), so PEFT has no base model for its adapters"
        raise ConfigError(f"{folder.path} {problem}. {_INSTEAD}")
    name = split_accepted(entry["run"])[0].removeprefix("hf:")
    path = entry.get("path") or os.path.abspath(os.path.expanduser(name))
    if os.path.isfile(os.path.join(path, CONFIG)):
        problem = f"started from {entry['run']}, a model with merged adapters; PEFT would load the base model without them"
        raise ConfigError(f"{folder.path} {problem}. {_INSTEAD}")
    return {"name": path if os.path.isdir(os.path.expanduser(name)) else name, "model_type": entry["model_type"]}


def _content(architecture: Architecture, links: Sequence[Link], located: weights_lib.Located, lora: Lora) -> _Content:
    own = [path for path, stored in located.arrays.items() if isinstance(stored, Stored) and stored.checkpoints == located.folder.checkpoints]
    own += [path for path in located.arrays if (path.endswith(ADAPTERS) or path in located.saved) and path not in own]
    arrays = _read(located, own)
    adapted = {path.rpartition("/")[0] for path in own if path.endswith(ADAPTERS)}
    content = _Content(tied="output/kernel" not in located.arrays and not any(path.startswith("head/output") for path in located.arrays))
    found = set()
    for name, parts in mapping.by_tensor(links).items():
        layers = [link.path.rpartition("/")[0] for link in parts]
        if not parts[0].path.endswith(KINDS) or not adapted & set(layers):
            continue
        found.update(layers)
        if parts[0].form not in ("same", "transposed") or layers[0].endswith("/router"):
            raise ConfigError(f"{located.name}: {layers[0]} has an adapter, but PEFT cannot adapt {name}. {_INSTEAD}")
        module = name.removesuffix(".weight")
        if parts[0].path.endswith("/embedding"):
            _add_table(content, architecture, module, layers[0], arrays, located.name)
        else:
            content.fan_in_fan_out |= parts[0].form == "same"
            if lora.dora and (bare := [layer for layer in layers if layer not in adapted]):
                raise ConfigError(f"{located.name}: {name} has DoRA for some of its parts only, none for {bare[0]}, which PEFT cannot represent. {_INSTEAD}")
            a, b = _matrices(parts, layers, arrays, lora.rank)
            content.modules[module] = len(a)
            content.tensors |= {PREFIX + module + end: x for end, x in zip(MATRIX, (a, b), strict=True)}
            content.tensors |= _magnitudes(module, parts, layers, arrays) if lora.dora else {}
    if lost := sorted(adapted - found):
        raise ConfigError(f"{located.name}: {lost[0]} has an adapter, but {architecture.name} has no such layer. {_INSTEAD}")
    _add_saved(content, architecture, links, {path: arrays[path] for path in own if not path.endswith(ADAPTERS)}, located.name)
    return content


def _read(located: weights_lib.Located, paths: Iterable[str]) -> dict[str, np.ndarray]:
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = {path: jax.ShapeDtypeStruct(located.arrays[path].shape, np.float32, sharding=here) for path in paths}
    return {path: np.asarray(x) for path, x in weights_lib.read(located.arrays, shapes).items()}


def _matrices(parts: Sequence[Link], layers: Sequence[str], arrays: Mapping[str, np.ndarray], rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the adapter matrices [R, D] and [F, R] of a PEFT module that corresponds to one or several of our layers.

    Different adapters of several layers become one whose rank is their sum and whose second matrix is block-diagonal.
    """
    pairs = []
    for link, layer in zip(parts, layers, strict=True):
        pairs.append(tuple(arrays[path][link.index].T if path in arrays else None for path in (f"{layer}/{name}" for name in PAIR)))
    first = next(a for a, _ in pairs if a is not None)
    if all(a is not None and a.tobytes() == first.tobytes() for a, _ in pairs):
        return first, np.concatenate([b for _, b in pairs])
    bounds = [link.part[:2] for link in parts]
    width = next(b.shape[0] // (stop - start) for (_, b), (start, stop) in zip(pairs, bounds, strict=True) if b is not None)
    whole = np.zeros((bounds[-1][1] * width, len(pairs) * rank), np.float32)
    for i, ((_, b), (start, stop)) in enumerate(zip(pairs, bounds, strict=True)):
        if b is not None:
            whole[start * width : stop * width, i * rank : (i + 1) * rank] = b
    return np.concatenate([np.zeros_like(first) if a is None else a for a, _ in pairs]), whole


def _magnitudes(module: str, parts: Sequence[Link], layers: Sequence[str], arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the tensor of DoRA's magnitudes [F] of a PEFT module by its name; those of several of our layers follow each other, as their columns do."""
    pieces = [arrays[f"{layer}/lora_m"][link.index] for link, layer in zip(parts, layers, strict=True)]
    return {PREFIX + module + MAGNITUDE: np.concatenate(pieces)}


def _add_table(content: _Content, architecture: Architecture, module: str, layer: str, arrays: Mapping[str, np.ndarray], where: str) -> None:
    """Add an embedding's adapter, and the same for the output layer if it is tied."""
    if architecture.model == "encoder_decoder":
        raise ConfigError(f"{where}: {layer} has an adapter, but PEFT does not share adapters between the modules that share {module}. {_INSTEAD}")
    link = Link(f"{layer}/embedding", (), f"{module}.weight", "same", None)
    a, b = (arrays[f"{layer}/{name}"].T for name in PAIR)
    dora = f"{layer}/lora_m" in arrays
    content.modules[module] = len(a)
    content.tensors |= {PREFIX + module + end: x for end, x in zip(TABLE, (a, b), strict=True)}
    content.tensors |= _magnitudes(module, [link], [layer], arrays) if dora else {}
    if content.tied and layer == "embed":
        if dora:
            raise ConfigError(f"{where}: {layer} has DoRA and is also the output layer, where PEFT has other magnitudes. {_INSTEAD}")
        if architecture.model != "gpt":
            problem = f"{layer} has an adapter and is also the output layer, which PEFT does not adapt in {architecture.name}"
            raise ConfigError(f"{where}: {problem}. {_INSTEAD}")
        content.modules["lm_head"] = len(a)
        content.tensors |= {f"{PREFIX}lm_head{end}": x for end, x in zip(MATRIX, (b.T, a.T), strict=True)}


def _add_saved(content: _Content, architecture: Architecture, links: Sequence[Link], arrays: Mapping[str, np.ndarray], where: str) -> None:
    """Add the modules with trained parameters other than adapters, each in full."""
    by_name = mapping.by_tensor(links)
    modules = dict.fromkeys(link.tensor.rpartition(".")[0] for link in links if link.path in arrays)
    for module in modules:
        inside = [name for name in by_name if name.startswith(module + ".")]
        parts = [link for name in inside for link in by_name[name]]
        bad = next((link for link in parts if link.path not in arrays or link.part is not None), None)
        if bad is not None or any("." in name.removeprefix(module + ".") for name in inside) or module in content.modules:
            trained = next(link.path for link in links if link.path in arrays and link.tensor.rpartition(".")[0] == module)
            problem = f"{trained} was trained in addition to the adapters; PEFT saves such modules in full, but {module} was not trained in full"
            raise ConfigError(f"{where}: {problem}. {_INSTEAD}")
        content.saved.append(module)
        content.tensors |= {PREFIX + name: mapping.tensor_of(by_name[name], arrays) for name in inside}
        if parts[0].path == "embed/embedding" and (content.tied or architecture.model == "encoder_decoder"):
            if architecture.model != "gpt":
                raise ConfigError(
                    f"{where}: embed/embedding was trained, but PEFT does not share its copy with the other modules that use {module}. {_INSTEAD}"
                )
            content.saved.append("lm_head")
            content.tensors[f"{PREFIX}lm_head.weight"] = content.tensors[f"{PREFIX}{module}.weight"]


def _config(architecture: Architecture, links: Sequence[Link], content: _Content, lora: Lora, base: str) -> dict[str, Any]:
    """Return the content of adapter_config.json."""
    alpha = lora.scale * lora.rank
    larger = {module: rank // lora.rank for module, rank in content.modules.items() if rank != lora.rank}
    every = {link.tensor.removesuffix(".weight") for link in links if link.path.endswith(KINDS)}
    return {
        "peft_type": "LORA",
        "task_type": _TASKS.get(architecture.model),
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": _whole(alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": shortest(content.modules, every),
        "rank_pattern": {module: times * lora.rank for module, times in larger.items()},
        "alpha_pattern": {module: _whole(times * alpha) for module, times in larger.items()},
        "modules_to_save": content.saved or None,
        "fan_in_fan_out": content.fan_in_fan_out,
        "use_rslora": False,
        "use_dora": lora.dora,
        "init_lora_weights": True,
    }


def _whole(x: float) -> float | int:
    return int(x) if x == int(x) else x


def shortest(chosen: Iterable[str], every: Iterable[str]) -> list[str]:
    """Return the shortest suffixes of module names that match all of `chosen` and nothing else in `every`."""
    chosen, ends = set(chosen), {}
    for module in sorted(chosen):
        names = module.split(".")
        tails = (".".join(names[-count:]) for count in range(1, len(names) + 1))
        ends[next(end for end in tails if all(other in chosen for other in every if f".{other}".endswith(f".{end}")))] = None
    return list(ends)
