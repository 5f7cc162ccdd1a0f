"""The `preprocessor_config.json` of a pretrained model of images: how it was trained to see them, and how a run sees them."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmodels.errors import ConfigError
from jaxmodels.pretrained import folder as folder_lib
from jaxmodels.pretrained.folder import Folder

FILE = "preprocessor_config.json"
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # Pillow's numbers
_OURS = "bicubic"  # of features/image.py
# What the image processors of `transformers` do where a file does not say it.
_EDGE, _SQUARE = {"shortest_edge": 224}, {"height": 224, "width": 224}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "ViT": {"size": _SQUARE, "resample": 2},
    "DeiT": {"size": {"height": 256, "width": 256}, "do_center_crop": True, "crop_size": _SQUARE, "resample": 3},
    "Bit": {"size": _EDGE, "do_center_crop": True, "crop_size": _SQUARE, "resample": 3},
    "ConvNext": {"size": {"shortest_edge": 384}, "crop_pct": 224 / 256, "resample": 3},
}
_WHOLE = 384  # pixels from which a ConvNeXt sees whole images, stretched to a square


def normalisation(folder: Folder) -> dict[str, tuple[float, ...]]:
    """Return the mean and standard deviation of each channel, as keys of an image task; empty if images are not normalised, or there is no file."""
    values = read(folder)
    keys = {"mean": values.get("image_mean"), "std": values.get("image_std")} if values.get("do_normalize", bool(values)) else {}
    return {key: tuple(value) if isinstance(value, (list, tuple)) else (value,) * 3 for key, value in keys.items() if value is not None}


def differences(folder: Folder, task: Mapping[str, Any], image_shape: tuple[int, ...], data: Mapping[str, Any] | None = None) -> list[str]:
    """Return in words how the images of a run differ from those that the pretrained model was trained on.

    Args:
      folder: of the pretrained model.
      task: the section of the run, resolved.
      image_shape: (height, width, channels) of what the model reads.
      data: the section of the run, resolved; its keys of images are compared if it has them.
    """
    values, found, name = read(folder), [], folder.reference
    if not values:
        return []
    for key, theirs in normalisation(folder).items():
        if key in task and not (task[key] is not None and len(task[key]) == len(theirs) and np.allclose(task[key], theirs)):
            found.append(f"config.task.{key}={task[key]}, and {name} was trained with {theirs}")
    wanted, resizes = geometry(values), values.get("do_resize", True)
    size = wanted.get("size")
    if size is not None and tuple(image_shape[:2]) != size:
        found.append(f"images of {image_shape[0]} × {image_shape[1]}, and {name} was trained with {size[0]} × {size[1]}")
    if data is not None and "fit" in data and resizes:
        keys = [key for key in ("fit", "scale_to", "resample") if key in wanted and _plain(data[key]) != _plain(wanted[key])]
        found += [f"config.data.{key}={data[key]!r}, and {name} was trained with {wanted[key]!r}" for key in keys]
        if "fit" not in wanted:
            found.append(f"images are all of one size here, and {name} was trained with size={values.get('size')}, which varies with the image")
    elif resizes and wanted["resample"] != _OURS:
        found.append(f"files of another size are resized {_OURS}, and {name} was trained with {wanted['resample']}")
    if _kind(values) not in (None, *_DEFAULTS):
        found.append(f"the images of {name} are prepared by {_type(values)}, which is not known here: only its keys were compared")
    factor = values.get("rescale_factor", 1 / 255)
    if values.get("do_rescale", True) is False or not np.isclose(factor, 1 / 255):
        found.append(f"images are scaled by 1 / 255, and {name} was trained with {'no scaling' if values.get('do_rescale') is False else f'{factor:g}'}")
    return found


def geometry(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an image processor does with images of another size, as keys of the section `data`: size, fit, scale_to and resample.

    Keys are absent if their value varies with the image. `scale_to` is None where nothing is cut off after resizing.
    """
    kind = _kind(values)
    values = _DEFAULTS.get(kind or "", {}) | {key: value for key, value in values.items() if value is not None}
    result: dict[str, Any] = {"resample": _RESAMPLE.get(values["resample"], _OURS) if isinstance(values.get("resample"), int) else _OURS}
    edge, both = _edge_or_both(values.get("size"), square=kind in (None, "ViT", "DeiT"))
    if kind == "ConvNext" and edge is not None:
        if edge >= _WHOLE:
            return result | {"size": (edge, edge), "fit": "stretch", "scale_to": None}
        share = values["crop_pct"]
        if not isinstance(share, int | float) or not 0 < share <= 1:
            raise ConfigError(f"{FILE}: crop_pct={share!r} is not a share above 0, and at most 1. Copy or download the file again.")
        return result | {"size": (edge, edge), "fit": "crop", "scale_to": int(edge / share)}
    if values.get("do_center_crop"):
        _, cut = _edge_or_both(values.get("crop_size"), square=True)
        result |= {} if cut is None else {"size": cut}
        if edge is not None:
            return result | {"fit": "crop", "scale_to": edge}
        return result | ({} if both is None else {"fit": "stretch", "scale_to": None if both == cut else both})
    return result if both is None else result | {"size": both, "fit": "stretch", "scale_to": None}


def processor(height: int, width: int, channels: int, task: Mapping[str, Any], data: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the preprocessor_config.json of a run, and notes on what it cannot say.

    Args:
      height, width, channels: of what the model reads.
      task, data: the sections of the run, resolved.
    """
    mean, std = task.get("mean"), task.get("std")
    scale_to, fit = data.get("scale_to"), data.get("fit", "stretch")
    resample, notes = data.get("resample") or ("bilinear" if task.get("resize") else _OURS), []
    size: dict[str, int] = {"height": height, "width": width}
    values: dict[str, Any] = {"do_resize": True, "size": size, "do_center_crop": False, "image_processor_type": "ViTImageProcessor"}
    if fit == "stretch" and scale_to is not None:
        both = [scale_to] * 2 if isinstance(scale_to, int) else scale_to
        values |= {"size": {"height": both[0], "width": both[1]}, "do_center_crop": True, "crop_size": size, "image_processor_type": "DeiTImageProcessor"}
    elif fit == "crop" and (scale_to is not None or height == width):
        values |= {"size": {"shortest_edge": scale_to or height}, "do_center_crop": True, "crop_size": size, "image_processor_type": "BitImageProcessor"}
        if scale_to is None:
            notes.append("`transformers` cuts out the centre of an image after resizing it, the run before: within half a pixel of the same place.")
    elif fit == "crop":
        notes.append("preprocessor_config.json stretches images to the model's size; the run cut out their centre.")
    values |= {"resample": {name: number for number, name in _RESAMPLE.items()}[resample], "do_rescale": True, "rescale_factor": 1 / 255}
    values |= {"do_normalize": bool(mean or std), "image_mean": list(mean or [0.0] * channels), "image_std": list(std or [1.0] * channels)}
    return values, notes


def read(folder: Folder) -> dict[str, Any]:
    """Return the file's values; {} without a file."""
    file = folder.path / FILE
    return folder_lib.read_json(file) if file.is_file() else {}


def _type(values: Mapping[str, Any]) -> Any:
    return values.get("image_processor_type") or values.get("feature_extractor_type")


def _kind(values: Mapping[str, Any]) -> str | None:
    """Return the name of the image processor without its ending; None if the file has none."""
    return re.sub(r"(ImageProcessor|FeatureExtractor).*", "", str(_type(values))) if _type(values) else None


def _edge_or_both(size: Any, *, square: bool) -> tuple[int | None, tuple[int, int] | None]:
    """Return the length of the shorter side, or height and width; None for what a size does not say. `square`: what one number means."""
    if isinstance(size, int):
        return (None, (size, size)) if square else (size, None)
    if isinstance(size, Mapping) and {"height", "width"} <= size.keys():
        return None, (int(size["height"]), int(size["width"]))
    if isinstance(size, Mapping) and isinstance(size.get("shortest_edge"), int) and "longest_edge" not in size:
        return size["shortest_edge"], None
    return None, None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
