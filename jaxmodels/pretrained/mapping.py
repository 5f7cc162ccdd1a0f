"""Map parameters of our models to tensors of pretrained models: one table per architecture, for import and export.

A table has one entry for each kind of parameter. Names contain the placeholders `{layer}` and `{expert}`. A placeholder on both sides gives
one pair per layer or expert. A placeholder only in the tensor's name means that our parameter stacks the tensors along leading axes, in the
order layer, expert.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import numpy as np

from jaxmodels.errors import ConfigError
from jaxmodels.pretrained.safetensors import Tensor


@dataclasses.dataclass(frozen=True)
class Entry:
    """An entry of a table.

    Attributes:
      path: path of our parameter: `blocks/{layer}/attention/query/kernel`.
      tensor: name of the pretrained tensor.
      form: key of `FORMS`: the conversion between the two layouts.
      part: (start, stop, total): the parameter is this share of the tensor along the last axis of our layout. The i-th of n equal parts is
        (i, i + 1, n); the queries of N heads beside G heads of keys and of values are (0, N, N + 2 G).
      first: the first layer that has it.
    """

    path: str
    tensor: str
    form: str = "same"
    part: tuple[int, int, int] | None = None
    first: int = 0


# form -> conversion of a tensor to the layout of the parameter, and back. Views where possible, so that only the used part of a tensor is read.
FORMS: dict[str, tuple[Callable, Callable]] = {
    "same": (lambda x: x, lambda x: x),
    # The tensor is [out, in], the parameter [in, out].
    "transposed": (lambda x: x.swapaxes(-1, -2), lambda x: x.swapaxes(-1, -2)),
    # The tensor is [out, in, height, width], the parameter [height, width, in, out].
    "convolution": (lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)),
    # The tensor is [channels, 1, height, width], the parameter [height, width, channels].
    "depthwise": (lambda x: x.transpose(2, 3, 1, 0)[:, :, 0], lambda x: x.transpose(2, 0, 1)[:, None]),
    # The tensor has a leading axis of length 1.
    "first": (lambda x: x[0], lambda x: x[None]),
}


def patches(size: int, channels: int) -> str:
    """Register the form of a convolution over patches of size×size pixels: the parameter is a matrix [size * size * channels, out]. Return its name."""
    name = f"patches{size}x{channels}"
    FORMS[name] = (
        lambda x: x.transpose(2, 3, 1, 0).reshape(size * size * channels, -1),
        lambda x: x.reshape(size, size, channels, -1).transpose(3, 2, 0, 1),
    )
    return name


@dataclasses.dataclass(frozen=True)
class Link:
    """One tensor and its place in a parameter.

    Attributes:
      path: path of our parameter.
      index: index along the leading (stacked) axes of our parameter.
      tensor: name of the tensor.
      form, part: as in `Entry`.
    """

    path: str
    index: tuple[int, ...]
    tensor: str
    form: str
    part: tuple[int, int, int] | None

    def to_parameter(self, tensor: np.ndarray) -> np.ndarray:
        """Convert the tensor, or this part of it, to the layout of the parameter; ValueError if it does not divide into the parts."""
        x = FORMS[self.form][0](tensor)
        if self.part is None:
            return x
        start, stop, total = self.part
        width, rest = divmod(x.shape[-1], total)
        if rest:
            raise ValueError(f"{self.tensor}: {x.shape[-1]} does not divide into {total} parts")
        return x[..., start * width : stop * width]


def expand(entries: Iterable[Entry], sizes: Mapping[str, int], *, stacked: bool) -> list[Link]:
    """Expand the placeholders of a table.

    Args:
      entries: the table.
      sizes: number of values of each placeholder.
      stacked: whether our parameters stack all layers, as in models with `scan`.
    """
    links = []
    for entry in entries:
        path = entry.path.replace("{layer}/", "") if stacked else entry.path
        names = [name for name in ("layer", "expert") if f"{{{name}}}" in entry.tensor]
        inner = [name for name in names if f"{{{name}}}" not in path]
        for values in itertools.product(*(range(entry.first if name == "layer" else 0, sizes[name]) for name in names)):
            at = dict(zip(names, values, strict=True))
            links.append(Link(path.format(**at), tuple(at[name] for name in inner), entry.tensor.format(**at), entry.form, entry.part))
    return links


def by_path(links: Iterable[Link]) -> dict[str, list[Link]]:
    """Group links by our parameter."""
    return _grouped(links, lambda link: link.path)


def by_tensor(links: Iterable[Link]) -> dict[str, list[Link]]:
    """Group links by tensor, sorted by part."""
    return {name: sorted(group, key=lambda link: link.part or (0, 1, 1)) for name, group in _grouped(links, lambda link: link.tensor).items()}


def _grouped(links, key):
    groups: dict[str, list[Link]] = {}
    for link in links:
        groups.setdefault(key(link), []).append(link)
    return groups


@dataclasses.dataclass(frozen=True)
class LazyParameter:
    """A parameter that is read from tensors on disk on demand.

    Attributes:
      links: its tensors and their places.
      tensors: the tensors by name.
      shape: in our layout.
      dtype: on disk.
    """

    links: Sequence[Link]
    tensors: Mapping[str, Tensor]
    shape: tuple[int, ...]
    dtype: np.dtype

    @classmethod
    def of(cls, links: Sequence[Link], tensors: Mapping[str, Tensor]) -> "LazyParameter":
        """Assemble a parameter; ConfigError if its tensors differ in shape, or their shape does not fit the form."""
        shapes = {link.tensor: tensors[link.tensor].shape for link in links}
        first = links[0]
        if len(set(shapes.values())) > 1:
            other = next(link for link in links if shapes[link.tensor] != shapes[first.tensor])
            raise ConfigError(f"{first.tensor} is {shapes[first.tensor]}, {other.tensor} is {shapes[other.tensor]}: their shapes must be equal.")
        try:
            inner = first.to_parameter(np.broadcast_to(np.False_, shapes[first.tensor])).shape
        except (ValueError, IndexError):
            raise ConfigError(f"{first.tensor} is {shapes[first.tensor]}, which cannot be {first.path} ({first.form}).") from None
        outer = tuple(max(link.index[axis] for link in links) + 1 for axis in range(len(first.index)))
        return cls(links, {name: tensors[name] for name in shapes}, outer + inner, tensors[first.tensor].dtype)

    def read(self, dtype: np.dtype, sharding: jax.sharding.Sharding) -> jax.Array:
        """Read the parameter; each device's shard is read separately, and nothing else.

        Args:
          dtype: of the result.
          sharding: of the result.
        """
        parts: dict[tuple, np.ndarray] = {}  # devices with the same shard share one read

        def part(index: tuple[slice, ...]) -> np.ndarray:
            ranges = tuple(s.indices(n)[:2] for s, n in zip(index, self.shape, strict=True))
            if ranges not in parts:
                parts[ranges] = self.values(ranges, dtype)
            return parts[ranges]

        return jax.make_array_from_callback(self.shape, sharding, part)

    def values(self, ranges: Sequence[tuple[int, int]], dtype: np.dtype) -> np.ndarray:
        """Read a part of the parameter, given as (start, stop) in each dimension."""
        outer = len(self.links[0].index)
        inside = tuple(slice(*bounds) for bounds in ranges[outer:])
        result = np.empty([stop - start for start, stop in ranges], dtype)
        for link in self.links:
            if all(start <= i < stop for i, (start, stop) in zip(link.index, ranges, strict=False)):
                place = tuple(i - start for i, (start, _) in zip(link.index, ranges, strict=False))
                _copy(result[place or ...], link.to_parameter(self.tensors[link.tensor].view())[inside])
        return result


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """Copy; a transposed source a few rows at a time, which is 2.6 times as fast (11008 × 4096, bfloat16)."""
    if source.ndim != 2 or source.strides[0] >= source.strides[1]:
        target[...] = source
        return
    for i in range(0, source.shape[1], _ROWS):
        target[:, i : i + _ROWS] = source[:, i : i + _ROWS].T.astype(target.dtype).T


_ROWS = 16


def components(links: Sequence[Link]) -> list[list[Link]]:
    """Group links into connected components: groups that share no parameter and no tensor, in the order of the table."""
    group_of: dict[tuple[str, str], int] = {}
    groups: dict[int, list[Link]] = {}
    for number, link in enumerate(links):
        keys = (("path", link.path), ("tensor", link.tensor))
        touched = sorted({group_of[key] for key in keys if key in group_of})
        home = touched[0] if touched else number
        for other in touched[1:]:
            moved = groups.pop(other)
            groups[home] += moved
            group_of.update({key: home for one in moved for key in (("path", one.path), ("tensor", one.tensor))})
        groups.setdefault(home, []).append(link)
        group_of.update(dict.fromkeys(keys, home))
    return list(groups.values())


def tensor_of(links: Sequence[Link], arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Convert our parameters to their tensor; `links` are all links of that tensor, sorted by part."""
    pieces = [arrays[link.path][link.index] if link.index else arrays[link.path] for link in links]
    whole = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=-1)
    return FORMS[links[0].form][1](whole)


def tensor_shape(links: Sequence[Link], shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape of their tensor, given the shapes of our parameters."""
    return tensor_of(links, {link.path: np.broadcast_to(np.False_, shapes[link.path]) for link in links}).shape


def unprefixed(names: Iterable[str], prefix: str) -> bool:
    """Return whether the tensors are those of the base model alone, whose names lack the prefix."""
    return not any(name.startswith(prefix) for name in names)


def renamed(tensors: Mapping[str, Tensor], renames: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Rename tensors of older files to the current names."""
    result = {}
    for name, tensor in tensors.items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        result[name] = tensor
    return result
