"""Layers of one model that differ in what they see: all positions or a window of them, and how these are rotated.

Shapes: B batch, T time, K width of a head.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax

from jaxmodels.models.positions import RotaryScaling, rotary_table

LayerType = Literal["global", "local", "unrotated"]


def differing(layer_types: Sequence[LayerType] | None, window: int | None) -> list[dict[str, Any]]:
    """Return the options of `blocks.Block` by which layers differ.

    Args:
      layer_types: `local` layers see the last `window` positions, `global` ones all (Beltagy et al. 2020; Gemma 2); `unrotated` ones all,
        without rotary positions (SmolLM3). None: all layers are alike, with `window`.
      window: number of positions, or None for all.

    Raises:
      ValueError: a type is unknown, or local layers lack a window.
    """
    if layer_types is None:
        return [{"window": window}]
    if not layer_types:
        raise ValueError("layer_types is empty; give a type for each layer, or a pattern that repeats")
    for kind in layer_types:
        if kind not in ("global", "local", "unrotated"):
            raise ValueError(f"layer_types are 'global', 'local' and 'unrotated', got {kind!r}")
    if (window is None) == ("local" in layer_types):
        raise ValueError(f"layer_types={tuple(layer_types)!r} and window={window}: local layers, and only these, need a window")
    return [{"window": window if kind == "local" else None, "rotary": kind} for kind in layer_types]


@dataclasses.dataclass(frozen=True)
class RotaryTables:
    """The tables of rotary positions of a model, one for each type of layers that rotates.

    Attributes:
      head_width: number of channels of a head that are rotated.
      base, scaling: of global layers, and of local ones unless these have a base of their own.
      local_base: of local layers, which then have no scaling (Gemma 3).
      types: of the layers that rotate.
    """

    head_width: int
    base: float
    scaling: RotaryScaling | None = None
    local_base: float | None = None
    types: tuple[LayerType, ...] = ("global",)

    @classmethod
    def of(cls, head_width: int, base: float, scaling: RotaryScaling | Mapping | None, local_base: float | None, layer_types: Sequence[LayerType] | None):
        """Return the tables for the options of a model; `layer_types` as in `differing`."""
        scaling = RotaryScaling(**scaling) if isinstance(scaling, Mapping) else scaling
        types = ("global",) if layer_types is None else tuple(sorted(set(layer_types) - {"unrotated"}))
        return cls(head_width, base, scaling, local_base, types)

    @property
    def by_length(self) -> bool:
        """Whether a table depends on the number of tokens of a text."""
        return any(scaling is not None and scaling.by_length for _, scaling in self._arguments().values())

    def change(self, lengths_B: jax.Array) -> jax.Array:
        """Return whether the tables of a text, which depend on its length, change when it grows to this length, bool [B]."""
        return self.scaling.changes(lengths_B)

    def __call__(self, positions: jax.Array, lengths: jax.Array | None = None) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Return cosines and sines at positions, int [1 or B, T], by type: as in `positions.rotary_table`, which also says what `lengths` are."""
        own = self._arguments()
        tables = {arguments: rotary_table(positions, self.head_width, *arguments, lengths) for arguments in dict.fromkeys(own.values())}
        return {kind: tables[arguments] for kind, arguments in own.items()}

    def _arguments(self) -> dict[str, tuple[float, RotaryScaling | None]]:
        """Return base and scaling by type."""
        return {kind: (self.local_base, None) if kind == "local" and self.local_base is not None else (self.base, self.scaling) for kind in self.types}
