"""Text generated with a cache equals that of the full forward pass, computed here for each token.

`pytest -m slow tests/generation/test_generate.py -n 0` runs more kinds of models.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_models import LLAMA, MORE, MORE_TARGETS, SIZE, TARGETS, TEXTS, drawn

from jaxmodels.errors import ConfigError
from jaxmodels.generation import decoding
from jaxmodels.generation.generate import Generator, bucket, generate
from jaxmodels.models.functional import merge, split
from jaxmodels.models.transformer import Decoder
from jaxmodels.tokenizers.simple import ByteTokenizer, CharacterTokenizer

V = 29


def both(few, more):
    return [*few, *(pytest.param(name, marks=pytest.mark.slow) for name in more)]


class Plain(nnx.Module):
    """A model without a cache: a mean over the previous tokens."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.table, self.output = (nnx.Param(jnp.asarray(rng.normal(0, 3, shape), jnp.float32)) for shape in ((V, 8), (8, V)))

    def __call__(self, tokens):
        x = jnp.cumsum(self.table[...][tokens], axis=1) / jnp.arange(1, tokens.shape[1] + 1)[:, None]
        return (x + self.table[...][tokens]) @ self.output[...]


def prompts(*lengths):
    rng = np.random.default_rng(3)
    return [rng.integers(0, V, length).tolist() for length in lengths]


def assert_likeliest(logits, begun, made, apart=1e-4):
    """Check for each row that each generated token is the most probable one, by a margin above rounding errors."""
    for row, before, after in zip(logits, begun, made, strict=True):
        at = np.asarray(row)[len(before) - 1 : len(before) + len(after) - 1]
        np.testing.assert_array_equal(at.argmax(-1), after)
        best = np.sort(at, axis=-1)
        assert (best[:, -1] - best[:, -2]).min() > apart


def filled(rows):
    result = np.full((len(rows), max(map(len, rows))), -1, np.int32)
    for i, row in enumerate(rows):
        result[i, : len(row)] = row
    return result


@pytest.mark.parametrize("name", both(TEXTS, MORE))
def test_texts_of_several_prompts_at_once_are_those_of_the_full_forward_pass(name):
    model_name, options = (TEXTS | MORE)[name]
    model, given = drawn(model_name, V, **options), prompts(3, 19, 1)
    made = [c.tokens for c in generate(model, None, given, max_tokens=20)]
    assert [len(tokens) for tokens in made] == [20, 20, 20]
    logits = nnx.jit(lambda model, tokens: model(tokens))(model, filled([a + b for a, b in zip(given, made, strict=True)]))
    assert_likeliest(logits, given, made)
    if name == "learned" or name in MORE:  # alone, with other padding
        assert generate(model, None, given[0], max_tokens=20)[0].tokens == made[0]


LONGROPE = {"kind": "longrope", "original_context": 8, "short": [1.0, 1.2], "long": [4.0, 9.0]}
BY_LENGTH = {
    "longrope": LLAMA | {"rotary_base": 3.0, "rotary_scaling": LONGROPE, "window": 5, "layer_types": ("local", "global", "unrotated")},
    "dynamic, stacked": LLAMA | {"rotary_base": 3.0, "rotary_scaling": {"kind": "dynamic", "factor": 4.0, "original_context": 8}, "scan": True},
}


@pytest.mark.parametrize("name", both(["longrope"], ["dynamic, stacked"]))
def test_positions_that_depend_on_the_length_are_those_of_each_row_at_each_token(name):
    """Angles of earlier tokens change when a text becomes longer than the original context: all tokens are read again."""
    model, given = drawn("gpt", V, **BY_LENGTH[name]), prompts(3, 11)
    made = [c.tokens for c in generate(model, None, given, max_tokens=14)]
    apply = nnx.jit(lambda model, tokens: model(tokens))
    for before, after in zip(given, made, strict=True):
        texts = [before + after[:i] for i in range(14)]  # padded to 25: the length of a text does not count its padding
        logits = apply(model, np.pad(filled(texts), ((0, 0), (0, 25 - len(texts[-1]))), constant_values=-1))
        last = np.asarray([logits[i, len(text) - 1] for i, text in enumerate(texts)])
        np.testing.assert_array_equal(last.argmax(-1), after)
        assert (np.sort(last)[:, -1] - np.sort(last)[:, -2]).min() > 1e-4


@pytest.mark.parametrize("name", both(TARGETS, MORE_TARGETS))
def test_targets_are_those_of_the_full_forward_pass(name):
    model_name, options = (TARGETS | MORE_TARGETS)[name]
    model, sources, begun = drawn(model_name, V, **options), prompts(5, 2, 11), [[7]] * 3
    made = [c.tokens for c in generate(model, None, sources, max_tokens=18, start=7)]
    targets = filled([a + b for a, b in zip(begun, made, strict=True)])
    logits = nnx.jit(lambda model, source, target: model(source, target))(model, filled(sources), targets)
    assert_likeliest(logits, begun, made)
    if name in MORE_TARGETS:  # alone
        assert generate(model, None, sources[1], max_tokens=18, start=7)[0].tokens == made[1]


@pytest.mark.parametrize("name", both([*TEXTS, *TARGETS, "longrope"], [*MORE, *MORE_TARGETS]))
def test_the_cache_has_the_types_of_half_precision(name):
    """Only traced: a loop whose cache changed its type would be an error."""
    model_name, options = (TEXTS | MORE | TARGETS | MORE_TARGETS | {"longrope": ("gpt", BY_LENGTH["longrope"])})[name]
    generator = Generator(drawn(model_name, V, **options), dtype=jnp.bfloat16, start=7)
    how = {"shape": decoding.GREEDY, "numbers": {}, "eos_ids": generator._eos_ids}
    inputs = generator._inputs([np.arange(3), np.arange(5)])
    state = jax.eval_shape(functools.partial(generator._programs.start, max_new_tokens=16, key=jax.random.key(0), **how), *generator.weights, *inputs)
    state = jax.eval_shape(functools.partial(generator._programs.advance, **how), *generator.weights, state, np.int32(3), np.zeros(2, bool))
    floats = {x.dtype for x in jax.tree.leaves(state["cache"]) if jnp.issubdtype(x.dtype, jnp.floating)}
    assert floats == {jnp.dtype(jnp.bfloat16)}


def test_a_model_without_a_cache_recomputes():
    model, given = Plain(), prompts(4, 9)
    with pytest.warns(UserWarning, match="Plain has no cache.*recomputes the whole text"):
        made = [c.tokens for c in generate(model, None, given, max_tokens=10)]
    assert_likeliest(model(filled([a + b for a, b in zip(given, made, strict=True)])), given, made)


def test_the_cache_of_a_window_does_not_grow_with_the_text():
    model = nnx.eval_shape(lambda: drawn("gpt", V, **LLAMA, window=5))
    for length in (3, 20, 2000):
        cache = jax.eval_shape(lambda length=length: model.make_cache(2, length))
        assert [x.shape for x in jax.tree.leaves(cache["layers"])] == [(2, 2, min(length, 5), 4)] * 4
    states = jax.eval_shape(lambda: drawn("lstm", V, layers=1, width=6).make_cache(2, 2000))
    assert [x.shape for x in jax.tree.leaves(states)] == [(2, 6)] * 2


COUNTS = {"traced": 0}


class Counted(Decoder):
    """A model that counts how often it is traced."""

    def prefill(self, *args):
        COUNTS["traced"] += 1
        return super().prefill(*args)

    def extend(self, *args):
        COUNTS["traced"] += 1
        return super().extend(*args)


@pytest.fixture(scope="module")
def small():
    model = Counted(V, **SIZE, rngs=nnx.Rngs(0))
    graph, params, stats = split(model)
    rng = np.random.default_rng(1)
    return merge(graph, jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.5, p.shape), p.dtype), params), stats)


def test_the_first_call_compiles_twice_and_later_calls_do_not(small):
    generator = Generator(small)
    programs = (generator._programs.start, generator._programs.advance)
    generator.generate(prompts(3, 9), max_tokens=30)
    first = COUNTS["traced"]
    assert [f._cache_size() for f in programs] == [1, 1] and first <= 4
    for given, options in ((prompts(1, 14), {"max_tokens": 17}), (prompts(16, 2), {"max_tokens": 32, "seed": 5})):
        generator.generate(given, **options)
    assert [f._cache_size() for f in programs] == [1, 1] and COUNTS["traced"] == first
    # The values of sampling options are not compiled in.
    drawn_by = [generator.generate(prompts(3, 9), max_tokens=30, temperature=t, seed=1)[0].tokens for t in (0.5, 2.0)]
    assert [f._cache_size() for f in programs] == [2, 2] and drawn_by[0] != drawn_by[1]
    # Calls on a bare model share the programs too: generators of the same graph do.
    assert Generator(nnx.clone(small))._programs is generator._programs


def test_the_cache_is_written_in_place(small):
    """Neither a step nor a call copies keys and values: the compiled loop has no copy of their shape, and its result aliases the argument.

    With one row, compilers tend to copy (see `models.cache.Packed`).
    """
    generator = Generator(small)
    how = {"shape": decoding.GREEDY, "numbers": {}, "eos_ids": np.zeros(1, np.int32)}
    start = functools.partial(generator._programs.start, max_new_tokens=32, key=jax.random.key(0), **how)
    state = jax.eval_shape(start, *generator.weights, np.zeros((1, 16), np.int32))
    compiled = generator._programs.advance.lower(*generator.weights, state, np.int32(3), np.zeros(1, bool), **how).compile()
    whole = r"= f32\[(\d+,)*4,48,4\]\S* "
    lines = compiled.as_text().splitlines()
    assert any(re.search(whole + "(fusion|dynamic-update-slice)", line) for line in lines)
    assert not [line for line in lines if re.search(whole + "copy", line)]
    assert compiled.memory_analysis().alias_size_in_bytes >= 4 * 2 * 4 * 48 * 4


def test_seeds_temperature_and_ends(small):
    generator = Generator(small)
    draw = lambda **options: [c.tokens for c in generator.generate(prompts(3, 9), max_tokens=30, temperature=1.0, **options)]  # noqa: E731
    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    greedy = generator.generate(prompts(3, 9), max_tokens=30)
    end = greedy[0].tokens[4]
    cut = [c.tokens[: c.tokens.index(end)] if end in c.tokens else c.tokens for c in greedy]
    ended = Generator(small, ends=(end,)).generate(prompts(3, 9), max_tokens=30)
    assert [c.tokens for c in ended] == cut and ended[0].finish == "end" and greedy[0].finish == "length"


def test_wrong_arguments_are_one_line_each(small):
    letters = CharacterTokenizer("abcdefghijklmnopqrstuvwxyz ,.")
    generator = Generator(small, letters)
    for given, options, message in (
        ("", {}, "prompt 1 is empty"),
        ([], {}, "no prompt"),
        (["abc", "A"], {}, "prompt 2: character 'A'"),
        ([[1, 2], [V]], {}, f"whole numbers from 0 to {V - 1}"),
        ("a" * 64, {}, "prompt 1 has 64 tokens, and the model's context is 64 .* shorten it to 63"),
        ("a" * 60, {"max_tokens": 9}, "max_tokens=9 is more than prompt 1 of 60 tokens leaves .*: max_tokens=4 fits"),
        ("a", {"max_tokens": 0}, "max_tokens must be at least 1"),
        ("a", {"temperature": -0.1}, "temperature must be 0"),
        ("a", {"temperature": 1.0, "top_p": 0.0}, r"top_p must lie in \(0, 1\]"),
        ("a", {"temperature": 1.0, "top_p": 1.5}, r"top_p must lie in \(0, 1\]"),
        ("a", {"temperature": 1.0, "min_p": -0.5}, "min_p must lie"),
        ("a", {"temperature": 1.0, "top_k": 0}, "top_k must be at least 1"),
        ("a", {"top_k": 5}, "top_k=5 has no effect with temperature=0"),
        ("a", {"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ("a", {"beams": 0}, "beams must be at least 1"),
        ("a", {"beams": 2, "temperature": 1.0}, "beam search does not sample"),
        ("a", {"beams": 2, "stop": "."}, "does not support stop strings"),
        ("a", {"length_penalty": 2.0}, "need beam search"),
        ("a", {"stop": ["", "b"]}, "an empty string would end"),
        ("a", {"stop": "A"}, "stop='A' cannot be generated: character 'A'"),
        ("a", {"seed": -1}, "seed must be"),
        ("a", {"tok_k": 5}, "has no option 'tok_k'"),
    ):
        with pytest.raises(ConfigError, match=message):
            generator.generate(given, **options)
    bare = Generator(small)
    for given, options, message in (
        ("a", {}, "the model has no tokenizer: give token ids"),
        ([1], {"stop": "b"}, "needs a tokenizer, and the model has none"),
    ):
        with pytest.raises(ConfigError, match=message):
            bare.generate(given, **options)
    with pytest.raises(ConfigError, match="beam search cannot stream"):
        generator.stream("a", beams=2)
    with pytest.raises(ConfigError, match="streaming needs a tokenizer"):
        bare.stream([1])
    with pytest.raises(ConfigError, match="no start token for targets"):
        Generator(drawn("lstm_seq2seq", V, width=8), letters)


def test_sizes_that_share_a_program():
    assert [bucket(n) for n in (1, 16, 17, 33, 49, 65, 97, 129, 1000)] == [16, 16, 32, 48, 64, 96, 128, 192, 1024]


class FixedText(nnx.Module):
    """A model that generates given bytes for any prompt: byte i after position i - 1 of a prompt of one token."""

    def __init__(self, text: bytes):
        self.next = nnx.Param(jnp.asarray(list(text), jnp.int32))

    def __call__(self, tokens):
        return jax.nn.one_hot(jnp.broadcast_to(self.next[...][: tokens.shape[1]], tokens.shape), 256)


def test_pieces_are_whole_characters_and_stop_before_a_string_that_ends_them():
    content = "Grün 😀, 漢字. END of it".encode()
    model = FixedText(content + bytes(64 - len(content)))
    with pytest.warns(UserWarning, match="has no cache"):
        generator = Generator(model, ByteTokenizer())
    pieces = list(generator.stream("x", max_tokens=len(content)))
    assert "".join(pieces) == content.decode() and "😀" in pieces and not any("\ufffd" in piece for piece in pieces)
    # A stop string over several tokens; text that may be its beginning is returned only when it is not.
    pieces = list(generator.stream("x", max_tokens=len(content), stop=("END", "zzz")))
    assert "".join(pieces) == "Grün 😀, 漢字. " and pieces[-1] == " "
    (whole,) = generator.generate("x", max_tokens=len(content), stop=["of", "END"])
    assert (whole.text, whole.finish) == ("Grün 😀, 漢字. ", "stop") and bytes(whole.tokens).endswith(b"END")
    (cut,) = generator.generate("x", max_tokens=8)
    assert (cut.text, cut.finish) == ("Grün \ufffd", "length")


def test_a_sample_continues_from_the_second_half_of_a_full_context():
    model = drawn("gpt", 30, layers=2, heads=2, width=16, context=9, tie_embeddings=False, norm="rms", seed=4)
    tokens = decoding.sample(model, 3, 21, jax.random.key(0), temperature=0)
    logits = jax.jit(lambda tokens: model(tokens[None])[0])  # of one shape: later positions are not attended to
    text, seen = [3], [3]
    while len(text) < 22:
        text.append(int(jnp.argmax(logits(jnp.array(seen + [0] * (9 - len(seen))))[len(seen) - 1])))
        seen = text[-4:] if len(text) in (9, 13, 17, 21) else [*seen, text[-1]]
    np.testing.assert_array_equal(tokens, text[1:])
    assert len(set(text)) > 5
