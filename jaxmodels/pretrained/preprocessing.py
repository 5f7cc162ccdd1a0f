"""The `preprocessor_config.json` of a pretrained model of images: how it was trained to see them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxmodels.pretrained import folder as folder_lib
from jaxmodels.pretrained.folder import Folder

FILE = "preprocessor_config.json"
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # Pillow's numbers
_OURS = "bicubic"  # of features/image.py


def normalisation(folder: Folder) -> dict[str, tuple[float, ...]]:
    """Return the mean and standard deviation of each channel, as keys of an image task; empty if images are not normalised, or there is no file."""
    values = _read(folder)
    keys = {"mean": values.get("image_mean"), "std": values.get("image_std")} if values.get("do_normalize", bool(values)) else {}
    return {key: tuple(value) if isinstance(value, (list, tuple)) else (value,) * 3 for key, value in keys.items() if value is not None}


def differences(folder: Folder, task: Mapping[str, Any], image_shape: tuple[int, ...]) -> list[str]:
    """Return in words how the images of a run differ from those that the pretrained model was trained on.

    Args:
      folder: of the pretrained model.
      task: the section of the run, resolved.
      image_shape: (height, width, channels) of what the model reads.
    """
    values, found, name = _read(folder), [], folder.reference
    if not values:
        return []
    for key, theirs in normalisation(folder).items():
        if key in task and not (task[key] is not None and len(task[key]) == len(theirs) and np.allclose(task[key], theirs)):
            found.append(f"config.task.{key}={task[key]}, and {name} was trained with {theirs}")
    size = _size(values)
    if size is not None and tuple(image_shape[:2]) != size:
        found.append(f"images of {image_shape[0]} × {image_shape[1]}, and {name} was trained with {size[0]} × {size[1]}")
    resample = _RESAMPLE.get(values.get("resample"), _OURS)
    if values.get("do_resize", True) and resample != _OURS:
        found.append(f"files of another size are resized {_OURS}, and {name} was trained with {resample}")
    factor = values.get("rescale_factor", 1 / 255)
    if values.get("do_rescale", True) is False or not np.isclose(factor, 1 / 255):
        found.append(f"images are scaled by 1 / 255, and {name} was trained with {'no scaling' if values.get('do_rescale') is False else f'{factor:g}'}")
    return found


def _size(values: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the height and width of what the model reads; None if they vary."""
    size = values.get("crop_size") if values.get("do_center_crop") else values.get("size")
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping) and {"height", "width"} <= size.keys():
        return int(size["height"]), int(size["width"])
    return None


def _read(folder: Folder) -> dict[str, Any]:
    file = folder.path / FILE
    return folder_lib.read_json(file) if file.is_file() else {}
