"""Values of rows that are stored as bytes."""

from typing import Any

BINARY = ("image_column", "audio_column")  # keys whose columns hold the bytes of a file


def value_of(key: str, value: Any) -> Any:
    """Return a value as a feature expects it: bytes are a text, except in columns of images and audio.

    Bytes that are not UTF-8 become lone surrogates, which features refuse.

    Args:
      key: key of the section that names the column.
      value: the value.
    """
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) and key not in BINARY else value
