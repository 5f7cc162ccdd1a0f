"""Which models are served, with how many tokens and rows."""

import jax.numpy as jnp
import pytest
from engines import V, generator, prompts, started
from flax import nnx
from random_models import LLAMA, drawn

from jaxmodels.errors import ConfigError
from jaxmodels.generation.generate import Generator
from jaxmodels.serving import memory
from jaxmodels.serving.engine import Engine

BY_LENGTH = {"rotary_scaling": {"kind": "dynamic", "factor": 2.0, "original_context": 32}}


class Plain(nnx.Module):
    """A model without a cache."""

    def __init__(self):
        self.table = nnx.Param(jnp.ones((V, V)))

    def __call__(self, tokens):
        return self.table[...][tokens]


def test_what_cannot_be_served_is_refused():
    with pytest.raises(ConfigError, match="--context=65 is more than the 64 tokens .* --context=64 fits"):
        Engine(generator("learned"), context=65)
    with pytest.raises(ConfigError, match="--slots=0 must be at least 1"):
        Engine(generator("learned"), slots=0)
    with pytest.warns(UserWarning, match="has no cache"):
        plain = Generator(Plain())
    with pytest.raises(ConfigError, match="Plain cannot be served: it lacks the methods make_cache, extend and read"):
        Engine(plain)


def test_positions_that_depend_on_the_length_bound_the_context():
    engine = Engine(Generator(drawn("gpt", V, **LLAMA | BY_LENGTH)), slots=2)
    assert engine.context == 32
    assert "2 slots of 32 tokens, 64 in all" in engine.describe() and "of the model's 64" in engine.describe()


@pytest.mark.slow
def test_such_a_model_writes_the_same_texts():
    own, given = Generator(drawn("gpt", V, **LLAMA | BY_LENGTH)), prompts(3, 20, 9)
    with started(own, context=32) as answers:
        tickets = [answers.ask(tokens, max_tokens=12) for tokens in given]
        assert [answers.tokens(t) for t in tickets] == [c.tokens for c in own.generate([list(tokens) for tokens in given], max_tokens=12)]


def test_rows_fit_the_memory_that_is_free(monkeypatch):
    own = generator("llama")
    row = 2 * 2 * 2 * 64 * 4 * 4  # layers, keys and values, their heads, slots, width of a head, bytes
    assert row <= memory.row_bytes(own, 64) <= row + 64 * 4 + 100
    assert memory.default_slots(own, 64) == 16
    for rows in (1, 5, 100, 10**6):
        monkeypatch.setattr(memory, "free_bytes", lambda device, rows=rows: rows * memory.row_bytes(own, 64))
        slots = memory.default_slots(own, 64)
        assert slots == max(s for s in (1, 2, 4, 8, 16, 32, 64, 128, 256) if s == 1 or 1.5 * s <= 0.8 * rows)
