"""Export a run as a pretrained model that `transformers` loads: safetensors, config.json, tokenizer and model card."""

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jaxmodels import models
from jaxmodels.errors import ConfigError
from jaxmodels.export import tokenizer_files
from jaxmodels.export.model_card import model_card
from jaxmodels.models.lora import ADAPTERS, Lora, merge_adapters
from jaxmodels.models.transformer import Scales
from jaxmodels.pretrained import architecture as architecture_lib
from jaxmodels.pretrained import mapping, preprocessing, safetensors, windows
from jaxmodels.pretrained.architecture import ARCHITECTURES, Architecture, Keys
from jaxmodels.pretrained.folder import whole_folder
from jaxmodels.pretrained.safetensors import ToWrite
from jaxmodels.pretrained.weights import FREE, resolve_options
from jaxmodels.runs import weights as weights_lib
from jaxmodels.runs.folder import RunFolder
from jaxmodels.runs.resized import without_padding
from jaxmodels.storage import paths as storage

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
_BATCH_BYTES = 1 << 30  # maximum bytes of parameters read at once


def export_run(run: str, output: str, *, dtype: str | None = None, shard_gb: float = 5.0) -> Path:
    """Write a run's weights (the EMA if the run keeps one) in the format of `transformers`, with adapters merged.

    Args:
      run: `RUN`, `RUN@best`, `RUN@latest` or `RUN@STEP`.
      output: a folder that does not exist or is empty. It appears under its name once it is complete.
      dtype: dtype of the weights: `float32`, `bfloat16` or `float16`. The default is the published dtype for imported weights that were not
        trained since, else float32.
      shard_gb: maximum size of a file in 10^9 bytes; a larger tensor gets a separate file.

    Returns:
      The folder.

    Raises:
      ConfigError: the run does not exist, the folder is not empty, or `transformers` has no such model; the message says why.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype={dtype}: it must be one of {', '.join(DTYPES)}.")
    if not shard_gb > 0:
        raise ConfigError(f"--shard_gb must be positive, got {shard_gb}.")
    located = weights_lib.locate(run)
    folder = located.folder
    config, manifest = folder.config(), folder.manifest()
    name, options = config["model"]["name"], {key: value for key, value in config["model"].items() if key != "name"}
    config["model"] = {"name": name} | resolve_options(name, options)  # runs of an earlier version lack new options
    located = dataclasses.replace(located, arrays=without_padding(located.arrays, config["model"], manifest["info"].get("vocab_size")))
    architecture, notes = choose(config["model"], manifest)
    _check_images(architecture, config, manifest["info"])
    head = architecture.head_in(located.arrays, "tags" if "tags" in manifest["info"] else "class")
    stacked = bool(config["model"].get("scan"))
    links = mapping.expand(architecture.entries(config["model"], head), architecture.sizes(config["model"]), stacked=stacked)
    _check_covered(links, located, folder)
    types = _types(located, manifest, dtype)
    tensors = _tensors(links, located, Lora(**config["lora"]).scale if config["lora"] else None, types)
    tensors |= {name: ToWrite(x.shape, x.dtype, lambda x=x: x) for name, x in architecture.constants(config["model"]).items()}
    with whole_folder(output) as target:
        _write_weights(target, tensors, int(shard_gb * 1e9))
        values = _config_json(architecture, head, folder, tokenizer_files.tokenizer_of(folder), sorted({t.name for t in types.values()}))
        _write_json(target / "config.json", values)
        notes += tokenizer_files.write(folder, target)
        notes += _write_processor(target, config, manifest["info"])
        (target / "README.md").write_text(model_card(folder, located.step, architecture, values, notes), encoding="utf-8")
    return storage.parse(output).expanduser().absolute()


def choose(model: Mapping[str, Any], manifest: Mapping[str, Any]) -> tuple[Architecture, list[str]]:
    """Return the `transformers` architecture of a model, and notes on differences in behaviour.

    Args:
      model: the `model` section of a resolved config.
      manifest: the run's manifest; the architectures of its parents are tried first.

    Raises:
      ConfigError: no architecture fits; the message lists the options that the nearest one does not support.
    """
    first = [parent["model_type"] for parent in manifest.get("parents", []) if "model_type" in parent]
    constructor = models.find(model["name"])[0]
    misfits: dict[str, list[str]] = {}
    for name in dict.fromkeys([*first, *ARCHITECTURES]):
        architecture = architecture_lib.load(name)
        if models.find(architecture.model)[0] is not constructor:
            continue
        misfits[name] = _misfits(architecture, model)
        if not misfits[name]:
            return architecture, _notes(model)
    if not misfits:
        raise ConfigError(
            f"{model['name']!r} has no equivalent in `transformers`; supported are {', '.join(ARCHITECTURES)}. "
            "--format=stablehlo exports the forward pass of any model."
        )
    nearest = min(misfits, key=lambda name: len(misfits[name]))
    raise ConfigError(
        f"`transformers` has no such model. The nearest is {nearest}, which does not support {', '.join(misfits[nearest])}. "
        "--format=stablehlo exports the forward pass of any model."
    )


def _misfits(architecture: Architecture, model: Mapping) -> list[str]:
    """Return the model options that an architecture cannot represent, found by a round trip through its config.json."""
    try:
        keys = Keys(architecture.config(model) | {"model_type": architecture.name}, "config.json")
        back = architecture.options(keys, lambda: [] if model.get("tie_embeddings") else ["lm_head.weight"])
        keys.finish()
    except StopIteration:  # the architecture lacks this activation
        return [f"activation={model['activation']!r}", *_misfits(architecture, dict(model) | {"activation": "gelu"})]
    except (ConfigError, KeyError, TypeError) as error:
        return [str(error)]
    back = _canonical(resolve_options(architecture.model, back))
    own = _canonical(model)
    ignored = FREE - {"context", "moe"} | {"name"}
    return [f"{key}={model[key]!r}" for key in own if key not in ignored and own[key] != back.get(key)]


def _canonical(model: Mapping) -> dict:
    """Return options with the value that None stands for in place of None."""
    result = dict(model)
    for key, value in (("kv_heads", model.get("heads")), ("mlp_width", 4 * model.get("width", 0))):
        if key in result and result[key] is None:
            result[key] = value
    for key in ("qkv_bias", "mlp_bias"):
        if key in result and result[key] is None:
            result[key] = model.get("bias")
    if result.get("scales"):
        scales = {key: value for key, value in result["scales"].items() if value != getattr(Scales(), key)}
        result["scales"] = scales or None
    if result.get("layer_types"):
        result |= windows.of_types(windows.types_of(model), model["window"])
    if "head_width" in result and result["head_width"] is None:
        result["head_width"] = model["width"] // model["heads"]
    if result.get("embedding_norm", False) is None:
        result["embedding_norm"] = result["post_norm"]
    if "types" in result:
        result["types"] = max(1, result["types"])
    if result.get("moe"):
        result["moe"] = {key: result["moe"].get(key) for key in ("experts", "top_k", "normalize")}
    return _listed(result)


def _listed(value: Any) -> Any:
    """Return the value with lists in place of tuples, also inside."""
    if isinstance(value, Mapping):
        return {key: _listed(x) for key, x in value.items()}
    return [_listed(x) for x in value] if isinstance(value, tuple | list) else value


def _notes(model: Mapping) -> list[str]:
    if model.get("moe") and model["moe"]["dispatch"] == "capacity":
        return ["The model was trained with a limited number of tokens per expert (dispatch='capacity'); `transformers` has no such limit."]
    return []


def _check_images(architecture: Architecture, config: Mapping, info: Mapping) -> None:
    """Raise ConfigError for images of a size that `transformers` cannot compute with this architecture."""
    if architecture.name not in ("swin", "dinov2") or "image_shape" not in info:
        return
    model, size = config["model"], _image_size(config, info)
    if architecture.name == "dinov2" and model["grid"] is None and size[0] != size[1]:
        raise ConfigError(f"images of {size[0]} × {size[1]}: `transformers` has positions of a square grid only. --format=stablehlo exports the forward pass.")
    if architecture.name == "dinov2":
        return
    last = min(-(-side // (model["patch"] * 2 ** (len(model["stages"]) - 1))) for side in size)
    if last < model["window"]:
        raise ConfigError(
            f"config.model.window={model['window']}: images of {size[0]} × {size[1]} have {last} positions on a side of the last stage, and `transformers` "
            f"has no smaller windows there. Train with window={last}, or use --format=stablehlo."
        )


def _check_covered(links: Sequence[mapping.Link], located: weights_lib.Located, folder: RunFolder) -> None:
    wanted = {link.path for link in links}
    missing = sorted(wanted - set(located.arrays))
    left = sorted(path for path in set(located.arrays) - wanted if not path.endswith(ADAPTERS))
    if missing or left:
        raise ConfigError(f"{folder.path}: {(missing + left)[0]} is {'missing from the run' if missing else 'not part of the model in `transformers`'}.")


def _types(located: weights_lib.Located, manifest: Mapping, requested: str | None) -> dict[str, np.dtype]:
    """Return the dtype of the exported tensors by parameter path."""
    imported = next((parent for parent in manifest.get("parents", [])[:1] if "dtypes" in parent and "taken" not in parent), None)
    if requested is None and imported is not None:
        return {path: np.dtype(imported["dtypes"].get(path, imported["dtypes"][""])) for path in located.arrays}
    return dict.fromkeys(located.arrays, DTYPES[requested or "float32"])


def _tensors(links: Sequence[mapping.Link], located: weights_lib.Located, scale: float | None, types: Mapping[str, np.dtype]) -> dict[str, ToWrite]:
    """Return the tensors to write by name. Their parameters are read in batches, when a tensor of the batch is written, and released after."""
    shapes = {path: tuple(stored.shape) for path, stored in located.arrays.items()}
    reader = _Reader(located, scale)
    tensors: dict[str, ToWrite] = {}
    for number, group in enumerate(_batches(mapping.components(links), shapes)):
        paths = sorted({link.path for link in group})
        for name, parts in mapping.by_tensor(group).items():
            dtype = types[parts[0].path]
            values = functools.partial(reader.tensor, number, paths, parts, dtype)
            tensors[name] = ToWrite(mapping.tensor_shape(parts, shapes), dtype, values)
    return tensors


def _batches(groups: Iterable[Sequence[mapping.Link]], shapes: Mapping[str, tuple[int, ...]]) -> Iterable[list[mapping.Link]]:
    """Group components into batches of at most `_BATCH_BYTES` of parameters."""
    batch, size = [], 0
    for group in groups:
        own = 4 * sum(int(np.prod(shapes[path])) for path in {link.path for link in group})
        if batch and size + own > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch = [*batch, *group]
        size += own
    yield batch


class _Reader:
    """Reader of a run's parameters that holds one batch in memory."""

    def __init__(self, located: weights_lib.Located, scale: float | None):
        """
        Args:
          located: location of the run's weights.
          scale: scale of the run's adapters, which are merged; None without adapters.
        """
        self.located, self.scale = located, scale
        self.batch: int | None = None
        self.arrays: dict[str, np.ndarray] = {}

    def tensor(self, batch: int, paths: Sequence[str], parts: Sequence[mapping.Link], dtype: np.dtype) -> np.ndarray:
        """Return a tensor of the batch with this index, whose parameters are `paths`."""
        if batch != self.batch:
            self.arrays, self.batch = {}, batch  # release the last batch before reading the next
            self.arrays = self._read(paths)
        return mapping.tensor_of(parts, self.arrays).astype(dtype)

    def _read(self, paths: Sequence[str]) -> dict[str, np.ndarray]:
        stored = self.located.arrays
        layers = {path.rpartition("/")[0] for path in paths}
        beside = [path for path in stored if path.endswith(ADAPTERS) and path.rpartition("/")[0] in layers]
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        wanted = {path: jax.ShapeDtypeStruct(stored[path].shape, np.float32, sharding=here) for path in [*paths, *beside]}
        arrays = weights_lib.read(stored, wanted)
        arrays = arrays if self.scale is None else merge_adapters(arrays, self.scale)
        return {path: np.asarray(x) for path, x in arrays.items()}


def _write_weights(folder: Path, tensors: Mapping[str, ToWrite], largest: int) -> None:
    files = list(safetensors.in_files(tensors, largest))
    names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)] if len(files) > 1 else ["model.safetensors"]
    for name, group in zip(names, files, strict=True):
        safetensors.write(folder / name, group, {"format": "pt"})
    if len(files) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        weight_map = {tensor: name for name, group in zip(names, files, strict=True) for tensor in group}
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _config_json(architecture: Architecture, head: str, folder: RunFolder, tokenizer: Any, dtypes: list[str]) -> dict[str, Any]:
    config, info = folder.config(), folder.manifest()["info"]
    values = {"architectures": [architecture.class_of(head)], "model_type": architecture.name} | architecture.config(config["model"])
    if "vocab_size" in info:
        values["vocab_size"] = info["vocab_size"]
    if "image_shape" in info:
        height, width = _image_size(config, info)
        values.setdefault("image_size", height if height == width else [height, width])
    labels = info.get("tags") or info.get("labels") or [str(i) for i in range(info.get("num_classes", 0))]
    if config["task"]["name"] == "regress_text":
        values |= {"num_labels": 1, "problem_type": "regression"}
    elif labels and head != "tokens":
        values |= {"id2label": {str(i): str(name) for i, name in enumerate(labels)}, "label2id": {str(name): i for i, name in enumerate(labels)}}
    if info.get("several_classes"):
        values["problem_type"] = "multi_label_classification"
    imported = [parent["token_ids"] for parent in folder.manifest().get("parents", []) if "token_ids" in parent]
    values |= tokenizer_files.special_ids(tokenizer, architecture) if tokenizer is not None else imported[0] if imported else {}
    values["torch_dtype"] = dtypes[0] if len(dtypes) == 1 else "float32"
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def _write_processor(folder: Path, config: Mapping, info: Mapping) -> list[str]:
    """Write the image preprocessing of an image run: the published one if its weights were only imported. Return notes on what it cannot say."""
    if "image_shape" not in info:
        return []
    height, width = _image_size(config, info)
    values, notes = preprocessing.processor(height, width, info["image_shape"][2], config["task"], config["data"])
    _write_json(folder / preprocessing.FILE, info.get("preprocessor") or values)
    return [] if info.get("preprocessor") else notes


def _image_size(config: Mapping, info: Mapping) -> tuple[int, int]:
    """Return the height and width of what the model reads."""
    height, width = config["task"].get("resize") or info["image_shape"][:2]
    return height, width


def _write_json(path: Path, values: Mapping) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
