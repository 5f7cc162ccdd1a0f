"""Examples that two splits share."""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxmodels.data.source import Arrays

_TOGETHER = 1024  # examples read at once


def shared_examples(splits: Mapping[str, Arrays]) -> list[str]:
    """Return in words how many examples of other splits train has, too: the same inputs, whatever their labels."""

    def inputs(part: Arrays) -> list[int]:
        few = (part.get_batch(np.arange(start, min(len(part), start + _TOGETHER))) for start in range(0, len(part), _TOGETHER))
        return [number for arrays in few for number in inputs_of(arrays)]

    return shared({split: inputs(part) for split, part in splits.items()} if len(splits) > 1 else {})


def inputs_of(arrays: Mapping[str, np.ndarray]) -> list[int]:
    """Return a number for the inputs of each example."""
    columns = [np.ascontiguousarray(x).reshape(len(x), -1).view(np.uint8) for name, x in arrays.items() if name not in ("label", "weight", "tags")]
    return [hash(row.tobytes()) for row in np.concatenate(columns, axis=1)] if columns else []


def shared(inputs: Mapping[str, Sequence[int]]) -> list[str]:
    """Do what `shared_examples` does with the numbers of the inputs of each split."""
    known = set(inputs.get("train", ()))
    found = {split: sum(example in known for example in part) for split, part in inputs.items() if split != "train"}
    return [f"{count:,} of {len(inputs[split]):,} examples of {split} have inputs that an example of train has, too" for split, count in found.items() if count]
