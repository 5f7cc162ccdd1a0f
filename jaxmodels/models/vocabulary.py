"""Parameters with a row for each token, and rows of zeros that make their number divide over devices (`model.vocab_multiple`)."""

import math
import re
from collections.abc import Mapping
from typing import Any

from jaxmodels.models.layers import padded_size

# Pattern on a parameter's path -> its axis of tokens.
PARAMETERS = ((r"^embed/(embedding|lora_a)$", 0), (r"^output/(kernel|lora_b)$", 1), (r"^(output|head)/bias$", 0))


def axis_of(path: str) -> int | None:
    """Return the axis of tokens of a parameter; None if it has none."""
    return next((axis for pattern, axis in PARAMETERS if re.search(pattern, path)), None)


def sizes(model: Mapping[str, Any], tokens: int) -> tuple[int, int]:
    """Return the rows of a vocabulary of `tokens` in a model of this section: without those of padding, and with them."""
    return tokens, padded_size(tokens, model.get("vocab_multiple") or 1)


def padding(params: Mapping[str, Any], model: Mapping[str, Any], tokens: int | None) -> int:
    """Return how many values of parameters (path -> array or shape) are padding."""
    if tokens is None or (model.get("vocab_multiple") or 1) == 1:
        return 0
    own, whole = sizes(model, tokens)
    padded = [x for path, x in params.items() if (axis := axis_of(path)) is not None and x.shape[axis] == whole]
    return sum(math.prod(x.shape) // whole * (whole - own) for x in padded)
