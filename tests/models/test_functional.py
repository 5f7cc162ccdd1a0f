"""Modules as pure functions."""

import jax
import numpy as np
from flax import nnx

from jaxmodels.models import functional


def test_new_rngs_draw_the_keys_of_nnx():
    """Also in forks and splits, inside and outside of a trace; and the trace has no operation of the counts."""

    def draws(make):
        def draw(key):
            rngs = make(key, params=jax.random.fold_in(key, 7))
            forked, halves = rngs.fork(), rngs.split(2)
            return [rngs.params(), rngs.params(), rngs.other(), rngs.params(), forked.params(), forked.other(), halves.params.key[...]]

        return draw

    for run in (lambda f, key: f(key), lambda f, key: jax.jit(f)(key)):
        for one, other in zip(run(draws(nnx.Rngs), jax.random.key(3)), run(draws(functional.new_rngs), jax.random.key(3)), strict=True):
            np.testing.assert_array_equal(jax.random.key_data(one), jax.random.key_data(other))
    traced = jax.make_jaxpr(lambda key: [functional.new_rngs(params=key).params() for _ in range(2)])(jax.random.key(3))
    assert "add" not in str(traced)
