"""Weights in 8 bits are near the exact ones, and models with them generate."""

import jax
import numpy as np
import pytest
from random_models import LLAMA, drawn

from jaxmodels.generation.generate import Generator
from jaxmodels.models import int8
from jaxmodels.models.functional import flatten, split

pytest.importorskip("qwix", reason="the extra `quantize` is not installed")


@pytest.mark.parametrize("scan", [False, True])
def test_matrices_are_rounded_to_255_values_for_each_output(scan):
    _, params, _ = split(drawn("gpt", 29, **LLAMA, scan=scan))
    exact, small = flatten(params), int8.quantized(params, np.float32)
    restored = flatten(int8.restored(small))
    assert sum(x.nbytes for x in jax.tree.leaves(small)) < 0.4 * sum(x.nbytes for x in exact.values())
    for path, x in exact.items():
        axis = {"kernel": -2, "embedding": -1}.get(path.rpartition("/")[2])
        if axis is None:
            np.testing.assert_array_equal(restored[path], x)
        else:
            step = np.abs(x).max(axis=axis, keepdims=True) / 127
            assert (np.abs(restored[path] - x) <= 0.51 * step).all()


def test_a_model_generates_with_them():
    model = drawn("gpt", 29, **LLAMA)
    own = Generator(model, in_8_bits=True)
    _, params, stats = split(model)
    rounded = Generator(model)
    rounded.weights = int8.restored(own.weights[0]), stats
    assert own.generate([[1, 2, 3]], max_tokens=20)[0].tokens == rounded.generate([[1, 2, 3]], max_tokens=20)[0].tokens
