"""Parameters that are read with another number of rows of the vocabulary: added tokens start at the mean, padding is zero or cut off."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxmodels.models import vocabulary


@dataclasses.dataclass(frozen=True)
class Resized:
    """An array to read, and what its rows become.

    Rows from `start` to `stop` are the mean of the rows before them (Hewitt 2021, "Initializing new word embeddings for pretrained language
    models"). Others are those of the source, and zero after its end.

    Attributes:
      source: what to read (`weights.Stored` or `LazyParameter`).
      axis: of the rows.
      rows: their number in the result.
      start, stop: the rows that are added; equal if there are none.
    """

    source: Any
    axis: int
    rows: int
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result."""
        return tuple(self.rows if i == self.axis else size for i, size in enumerate(self.source.shape))

    @property
    def dtype(self) -> Any:
        """The dtype of the source."""
        return self.source.dtype

    def record(self) -> dict[str, int]:
        """Return what the manifest keeps, from which `of` makes it again."""
        return {"axis": self.axis, "rows": self.rows, "start": self.start, "stop": self.stop}

    def source_shape(self, shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        """Return the shape of the source, in the sharding of the result but with all rows on each device, since their number may not divide."""
        sharding = shape.sharding
        if isinstance(sharding, NamedSharding):
            spec = PartitionSpec(*(None if i == self.axis else part for i, part in enumerate(sharding.spec)))
            sharding = NamedSharding(sharding.mesh, spec)
        return jax.ShapeDtypeStruct(self.source.shape, shape.dtype, sharding=sharding)

    def apply(self, x: jax.Array, sharding: jax.sharding.Sharding) -> jax.Array:
        """Return the result for the source's values, in a sharding."""
        return jax.jit(self._values, out_shardings=sharding)(x)

    def _values(self, x: jax.Array) -> jax.Array:
        own = x.shape[self.axis]
        new = jax.lax.slice_in_dim(x, 0, min(own, self.rows), axis=self.axis)
        new = jnp.pad(new, [(0, self.rows - new.shape[self.axis] if i == self.axis else 0) for i in range(x.ndim)])
        if self.stop == self.start:
            return new
        known = jax.lax.slice_in_dim(x, 0, self.start, axis=self.axis).astype(jnp.float32)
        number = jnp.expand_dims(np.arange(self.rows), [i for i in range(x.ndim) if i != self.axis])
        added = (number >= self.start) & (number < self.stop)
        return jnp.where(added, known.mean(self.axis, keepdims=True).astype(x.dtype), new)


def without_padding(arrays: Mapping[str, Any], model: Mapping[str, Any], tokens: int | None) -> dict[str, Any]:
    """Return the arrays of a model (its section) of `tokens` without the rows of `model.vocab_multiple`."""
    if tokens is None or (model.get("vocab_multiple") or 1) == 1:
        return dict(arrays)
    own, whole = vocabulary.sizes(model, tokens)
    cut = {path: axis for path, x in arrays.items() if (axis := vocabulary.axis_of(path)) is not None and x.shape[axis] == whole}
    return {path: Resized(x, cut[path], own, 0, 0) if path in cut else x for path, x in arrays.items()}
