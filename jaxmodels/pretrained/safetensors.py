"""The safetensors format: eight bytes with the length of the header, the header (JSON), and the tensors' bytes.

Reads are lazy: opening a file reads its header, and indexing a tensor reads only the indexed part. Writes are one tensor at a time. So
neither holds a whole file in memory.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxmodels.errors import ConfigError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_MOST_DIMENSIONS = 32  # fewer than NumPy's limit


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file.

    Attributes:
      file: path of the file.
      offset: offset of its first byte in the file.
      dtype, shape: dtype and shape of the array.
    """

    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.dtype.itemsize * math.prod(self.shape)

    def view(self) -> np.ndarray:
        """Return a memory map of the tensor; indexing it reads from the file, which stays open while the view exists."""
        if not math.prod(self.shape):
            return np.empty(self.shape, self.dtype)
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape or (1,)).reshape(self.shape)


def read_header(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name.

    Raises:
      ConfigError: the file is truncated, or its header is invalid or does not match the file.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise ConfigError(f"{path} is not a complete safetensors file: it has {size:,} bytes, and its header should have {length:,}. {_AGAIN}")
        try:
            header = json.loads(file.read(length), object_pairs_hook=_without_duplicates)
            if not isinstance(header, dict):
                raise ValueError("it is not an object")
            header.pop("__metadata__", None)
            tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in header.items()}
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: invalid safetensors header ({str(error).splitlines()[0]}). {_AGAIN}") from error
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != end:
            raise ConfigError(f"{path}: invalid offset of {name} in the header: it overlaps another tensor, or leaves a gap. {_AGAIN}")
        end += tensor.nbytes
    if end != size:
        raise ConfigError(f"{path} is {'truncated' if end > size else 'too long'}: expected {end:,} bytes by its header, found {size:,}. {_AGAIN}")
    return tensors


_AGAIN = "Copy or download it again."


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; ValueError if a name occurs twice, of which readers would choose different ones."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return values


def _tensor(path: Path, name: str, entry: Mapping, start: int) -> Tensor:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"{name} lacks dtype, shape or data_offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise ValueError(f"{name} has the unknown type {entry['dtype']!r}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    lists = isinstance(shape, list) and isinstance(offsets, list) and len(shape) <= _MOST_DIMENSIONS
    if not lists or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (*shape, *offsets)) or len(offsets) != 2:
        raise ValueError(f"{name} has an invalid shape or offsets: {shape}, {offsets}"[:300])
    tensor = Tensor(path, start + offsets[0], DTYPES[entry["dtype"]], tuple(shape))
    if offsets[1] - offsets[0] != tensor.nbytes:
        raise ValueError(f"{name} {shape} of {entry['dtype']} needs {tensor.nbytes:,} bytes, but its offsets span {offsets[1] - offsets[0]:,}")
    return tensor


@dataclasses.dataclass(frozen=True)
class ToWrite:
    """A tensor to be written; `values` is called when the tensor is written."""

    shape: tuple[int, ...]
    dtype: np.dtype
    values: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.dtype.itemsize * math.prod(self.shape)


def write(path: Path, tensors: Mapping[str, ToWrite], metadata: Mapping[str, str]) -> None:
    """Write a file, one tensor at a time in order. It appears under its name once it is complete."""
    header, end = {"__metadata__": dict(metadata)}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            values = np.asarray(tensor.values())
            if values.shape != tensor.shape or values.dtype != tensor.dtype:
                raise ValueError(f"{name}: expected {tensor.dtype} {tensor.shape}, got {values.dtype} {values.shape}")
            file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    os.replace(partial, path)


def in_files(tensors: Mapping[str, ToWrite], largest: int) -> Iterable[dict[str, ToWrite]]:
    """Group tensors, in order, into files of at most `largest` bytes; a larger tensor gets a separate group."""
    group, size = {}, 0
    for name, tensor in tensors.items():
        if group and size + tensor.nbytes > largest:
            yield group
            group, size = {}, 0
        group[name] = tensor
        size += tensor.nbytes
    yield group
