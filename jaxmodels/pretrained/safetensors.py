"""The safetensors format: eight bytes that say how long a header is, the header (JSON), and the tensors' bytes.

Reads are lazy and by tensor: nothing but the header is read until a tensor is asked for, and then only the parts of it that are
indexed. Writes are a tensor at a time. So neither ever holds a file in memory.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

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
_LONGEST_HEADER = 100_000_000  # bytes, as the format's own library has it


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file.

    Attributes:
      file: where.
      offset: of its first byte in the file.
      dtype, shape: of the array.
    """

    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    def view(self) -> np.ndarray:
        """The tensor as it lies in the file, read where it is indexed; the file stays open as long as the view lives."""
        if not math.prod(self.shape):
            return np.empty(self.shape, self.dtype)
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape or (1,)).reshape(self.shape)


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by name.

    Raises:
      ConfigError: it is cut off, or its header is no header or does not agree with the file.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise ConfigError(f"{path} is no whole safetensors file: it has {size:,} bytes, and says that its header has {length:,}. {_AGAIN}")
        try:
            header = json.loads(file.read(length))
            if not isinstance(header, dict):
                raise ValueError("it holds no names")
            header.pop("__metadata__", None)
            tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in header.items()}
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: the header is not that of a safetensors file ({str(error).splitlines()[0]}). {_AGAIN}") from error
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != end:
            raise ConfigError(f"{path}: the header lies about where {name} is: tensors overlap, or leave a gap before it. {_AGAIN}")
        end += tensor.nbytes
    if end != size:
        raise ConfigError(f"{path} is {'cut off' if end > size else 'too long'}: its header promises {end:,} bytes, it has {size:,}. {_AGAIN}")
    return tensors


_AGAIN = "Copy or download it anew."


def _tensor(path: Path, name: str, entry: Mapping, start: int) -> Tensor:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"{name} lacks dtype, shape or data_offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise ValueError(f"{name} has the unknown type {entry['dtype']!r}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    lists = isinstance(shape, list) and isinstance(offsets, list)
    if not lists or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (*shape, *offsets)) or len(offsets) != 2:
        raise ValueError(f"{name} has no proper shape and offsets: {shape}, {offsets}")
    tensor = Tensor(path, start + offsets[0], DTYPES[entry["dtype"]], tuple(shape))
    if offsets[1] - offsets[0] != tensor.nbytes:
        raise ValueError(f"{name} {shape} of {entry['dtype']} takes {tensor.nbytes:,} bytes, its offsets leave {offsets[1] - offsets[0]:,}")
    return tensor


@dataclasses.dataclass(frozen=True)
class ToWrite:
    """A tensor to be written: its form now, its values when its turn comes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    values: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def write(path: Path, tensors: Mapping[str, ToWrite], metadata: Mapping[str, str]) -> None:
    """Writes a file; `values` are asked for in order, one tensor at a time. It appears under its name when it is whole."""
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
                raise ValueError(f"{name}: {values.dtype} {values.shape}, but {tensor.dtype} {tensor.shape} was promised")
            file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    os.replace(partial, path)


def in_files(tensors: Mapping[str, ToWrite], largest: int) -> Iterable[dict[str, ToWrite]]:
    """Tensors in groups of at most so many bytes, in order; one that is larger has a group to itself."""
    group, size = {}, 0
    for name, tensor in tensors.items():
        if group and size + tensor.nbytes > largest:
            yield group
            group, size = {}, 0
        group[name] = tensor
        size += tensor.nbytes
    yield group
