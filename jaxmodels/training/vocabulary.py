"""The rows of a vocabulary that a run takes from the weights it starts with: added tokens, rows without a token, padding."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxmodels.experiment.experiment import Experiment
from jaxmodels.models import vocabulary
from jaxmodels.runs.resized import Resized, without_padding
from jaxmodels.runs.weights import Located
from jaxmodels.tokenizers import factory as tokenizers
from jaxmodels.tokenizers.base import known_tokens


def fit(experiment: Experiment, located: Located, here: Mapping[str, Any]) -> Located:
    """Return the located weights with the rows of this model.

    Args:
      experiment: has the tokenizer and the model.
      located: the weights, with their own rows.
      here: path -> shape, of this model.
    """
    ours = experiment.task.provides.get("vocab_size")
    theirs, parent = _rows(located)
    if ours is None or theirs is None:
        return located
    arrays = without_padding(located.arrays, parent, theirs)
    start, stop = _added(experiment, located, theirs)
    if ours != max(theirs, stop):
        return dataclasses.replace(located, arrays=arrays)  # another vocabulary, whose shapes `match` compares
    result = {}
    for path, stored in arrays.items():
        axis = vocabulary.axis_of(path)
        whole = None if axis is None or path not in here else here[path].shape[axis]
        if whole in vocabulary.sizes(experiment.config["model"], ours) and stored.shape[axis] == theirs and (whole != theirs or stop > start):
            source = stored.source if isinstance(stored, Resized) else stored
            result[path] = Resized(source, axis, whole, start, stop) if source.shape[axis] == theirs else _cut_first(stored, axis, whole, start, stop)
        else:
            result[path] = stored
    return dataclasses.replace(located, arrays=result)


def _cut_first(stored: Resized, axis: int, whole: int, start: int, stop: int) -> Any:
    """Return the array with other rows. Padding of the source is zero, as that of the result: it is read as it is if it fits."""
    return stored.source if stored.source.shape[axis] == whole and start == stop else Resized(stored, axis, whole, start, stop)


def resized(located: Located, sources: Mapping[str, str]) -> dict[str, Resized]:
    """Return the transferred parameters whose rows change; `sources` of `weights.match`."""
    return {path: located.arrays[source] for path, source in sources.items() if isinstance(located.arrays[source], Resized)}


def lines(experiment: Experiment, located: Located, sources: Mapping[str, str], frozen: Mapping[str, Any]) -> list[str]:
    """Return in words what becomes of the rows: added tokens, rows without a token."""
    tokenizer, result = experiment.dataset.info.get("tokenizer"), []
    added = {path: x for path, x in resized(located, sources).items() if x.stop > x.start}
    if added:
        one = next(iter(added.values()))
        count = f"{one.stop - one.start:,} added token" + ("s" if one.stop - one.start > 1 else "")
        result.append(f"vocabulary: {count} (from id {one.start:,}) start at the mean of the {one.start:,} known rows, in {', '.join(added)}")
        result += [f"warning: {path} is frozen, so the {count} stay at the mean" for path in added if path in frozen]
    rows, tokens = experiment.task.provides.get("vocab_size"), known_tokens(tokenizer)
    if tokenizer is not None and rows is not None and rows > tokens and any(vocabulary.axis_of(path) is not None for path in sources):
        result.append(f"vocabulary: {rows - tokens:,} of {rows:,} rows have no token, and are kept; the tokenizer has {tokens:,} tokens")
    return result


def _rows(located: Located) -> tuple[int | None, Mapping[str, Any]]:
    """Return the rows of the weights' vocabulary without padding, and the section of their model."""
    if located.pretrained is not None:
        return located.pretrained.folder.config.get("vocab_size"), {}
    return located.folder.manifest().get("info", {}).get("vocab_size"), located.folder.config()["model"]


def _added(experiment: Experiment, located: Located, rows: int) -> tuple[int, int]:
    """Return the ids from and to which the data's tokenizer has tokens that the weights do not know."""
    tokenizer = experiment.dataset.info.get("tokenizer")
    if tokenizer is None or not hasattr(tokenizer, "with_added"):
        return 0, 0
    if located.pretrained is not None:
        before = tokenizer.published_tokens if hasattr(tokenizer, "published_tokens") else rows
    else:
        file = located.folder.tokenizer_file
        text = file.read_text(encoding="utf-8") if file.is_file() else None
        if text is None or text == tokenizer.to_json():
            return 0, 0
        before = known_tokens(tokenizers.from_json(text))
    start, stop = min(before, rows), known_tokens(tokenizer)
    return (start, stop) if stop > start else (0, 0)
