"""Images to labels with probabilities, or to embeddings; see `forms`."""

import base64
import binascii
import io
import re

import numpy as np
from PIL import Image as PillowImage

from jaxmodels import config as config_lib
from jaxmodels.data.features.base import Problem, Row
from jaxmodels.data.features.image import Image
from jaxmodels.inference.form import NUMBER, Form, Labels, numbers
from jaxmodels.inference.run import Run
from jaxmodels.pretrained import preprocessing

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "MPO")
_DATA_URL = re.compile(r"data:[\w.+-]+/[\w.+-]+(;[\w=.+-]+)*;base64,", re.A)


class ImageForm(Form):
    """An image to labels with probabilities, or to an embedding."""

    def __init__(self, run: Run, max_pixels: int):
        self.shape = tuple(run.info["image_shape"])
        self.feature, self.missing = _image_feature(run, self.shape, max_pixels)
        self.labels = None if run.config["task"]["name"] == "contrast" else Labels(run)
        self.title = "classify images" if self.labels else "embed images"
        values = {"description": f"the values themselves, {' × '.join(map(str, self.shape))}, as the run was trained on them", "type": "array"}
        file = {"type": "string", "description": "an image file in base64, or as a data: URL", "contentEncoding": "base64"}
        self.input = {"anyOf": [file, values]} if self.feature else values
        self.output = self.labels.schema if self.labels else {"type": "object", "properties": {"embedding": {"type": "array", "items": NUMBER}}}

    def encode(self, item, *, truncate=False):
        if isinstance(item, (str, bytes)):
            if self.feature is None:
                raise Problem(f"this model takes no image files: {self.missing}. Send the values, {' × '.join(map(str, self.shape))}.")
            image = _opened(item if isinstance(item, bytes) else from_base64(item))
            if self.missing and image.size != (self.shape[1], self.shape[0]):
                found, wanted = " × ".join(map(str, image.size)), f"{self.shape[1]} × {self.shape[0]}"
                raise Problem(f"the image has {found} pixels, and the model reads {wanted}: {self.missing}. Resize it.")
            return self.feature.encode(Row("", {"image": image}))
        return {"image": numbers(item, self.shape, "the image")}

    def decode(self, item, example, output, *, top):
        return self.labels.decode(output, top) if self.labels else {"embedding": output.astype(float).tolist()}

    def blanks(self):
        yield {"image": np.zeros(self.shape, np.uint8 if self.feature else np.float32)}
        if self.feature:
            yield {"image": np.zeros(self.shape, np.float32)}


def _image_feature(run: Run, shape: tuple[int, ...], max_pixels: int) -> tuple[Image | None, str]:
    """Return what decodes image files as those of training were, None if the run does not say it; and what is missing, if anything."""
    data, keys = run.config["data"], {"image_column": "image", "size": shape[:2], "channels": shape[2]}
    if shape[2] not in (1, 3, 4):
        return None, f"its images have {shape[2]} channels"
    if "fit" in data and "max_pixels" in data:
        own = {name: data[name] for name in config_lib.fields(Image) if name in data and name not in keys}
        return Image(**keys, **own | {"max_pixels": min(max_pixels, data["max_pixels"])}), ""
    if values := run.info.get("preprocessor"):
        geometry = {key: value for key, value in preprocessing.geometry(values).items() if key != "size"}
        missing = "" if "fit" in geometry else f"the size to which {preprocessing.FILE} scales images varies with the image"
        return Image(**keys, **geometry, max_pixels=max_pixels), missing
    if data["source"].partition(":")[0] == "arrays":
        return None, "it was trained on arrays, and nothing says how an image file becomes one"
    return Image(**keys, max_pixels=max_pixels), f"the data of the run ({data['source']}) does not say how images of other sizes are resized"


def _opened(content: bytes) -> PillowImage.Image:
    """Return an image whose pixels are not decoded yet. What comes from strangers may have the common formats only, whose decoders are well tested."""
    try:
        return PillowImage.open(io.BytesIO(content), formats=FORMATS)
    except Exception as error:  # noqa: BLE001  what a decoder raises depends on where the file is broken
        raise Problem(f"it cannot be decoded as an image; the formats are {', '.join(FORMATS)}.") from error


def from_base64(text: str) -> bytes:
    """Return the content of a text in base64, or of a `data:` URL; raise Problem if it is neither."""
    if re.match(r"\s*(https?|file|ftp|gs|s3):", text):
        raise Problem("an image is sent as base64, or as a data: URL; no address is opened.")
    found = _DATA_URL.match(text)
    try:
        return base64.b64decode("".join((text[found.end() :] if found else text).split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise Problem("it is neither base64 nor a data: URL of an image.") from error
