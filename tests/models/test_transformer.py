"""The Transformer's shapes and options against plain computations and published sizes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmodels import models
from jaxmodels.models import create
from jaxmodels.models.blocks import Block, apply_blocks, make_blocks
from jaxmodels.models.encoder_decoder import EncoderDecoder
from jaxmodels.models.functional import merge, split
from jaxmodels.models.positions import RotaryScaling, lengths_in, positions_in, relative_buckets, rotary_frequencies, rotary_table, rotate
from jaxmodels.models.transformer import Decoder, Scales


def count(make):
    shapes = split(nnx.eval_shape(make))[1]
    return {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in shapes.items()}


def filled(make):
    """Return a compiled model with all parameters drawn by NumPy: without compilation, and without zeros, which hide errors."""
    graph, params, stats = split(nnx.eval_shape(make))
    draw = np.random.default_rng(0)

    def fill(path, x):
        return jnp.asarray(0.3 * draw.normal(size=x.shape) + (path[-1].key == "scale"), jnp.float32)

    return merge(graph, jax.tree_util.tree_map_with_path(fill, params), stats)


# Parameters of the released checkpoints; for the original Transformer, those computed from its description.
PUBLISHED = {
    32000: {
        "llama2-7b": 6_738_415_616,
        "llama2-13b": 13_015_864_320,
        "llama2-70b": 68_976_648_192,
        "mistral-7b": 7_241_732_096,
    },
    128256: {
        "llama3-8b": 8_030_261_248,
        "llama3-70b": 70_553_706_496,
        "llama3.1-8b": 8_030_261_248,
        "llama3.1-70b": 70_553_706_496,
        "llama3.1-405b": 405_853_388_800,
        "llama3.2-1b": 1_235_814_400,
        "llama3.2-3b": 3_212_749_824,
        "smollm3-3b": 3_075_098_624,
    },
    32064: {"phi3-mini": 3_821_079_552},
    256000: {
        "gemma-2b": 2_506_172_416,
        "gemma-7b": 8_537_680_896,
        "gemma2-2b": 2_614_341_888,
        "gemma2-9b": 9_241_705_984,
        "gemma2-27b": 27_227_128_320,
    },
    262144: {"gemma3-270m": 268_098_176, "gemma3-1b": 999_885_952},
    100352: {"olmo2-1b": 1_484_916_736, "olmo2-7b": 7_298_617_344, "olmo2-13b": 13_716_198_400},
    49155: {"granite-3-2b": 2_533_531_648, "granite-3-8b": 8_170_848_256},
    151936: {
        "qwen2.5-0.5b": 494_032_768,
        "qwen2.5-1.5b": 1_543_714_304,
        "qwen2.5-3b": 3_085_938_688,
        "qwen3-0.6b": 596_049_920,
        "qwen3-1.7b": 1_720_574_976,
        "qwen3-4b": 4_022_468_096,
        "qwen3-8b": 8_190_735_360,
        "qwen3-14b": 14_768_307_200,
        "qwen3-32b": 32_762_123_264,
    },
    152064: {
        "qwen2.5-7b": 7_615_616_512,
        "qwen2.5-14b": 14_770_033_664,
        "qwen2.5-32b": 32_763_876_352,
        "qwen2.5-72b": 72_706_203_648,
    },
    32128: {
        "t5-small": 60_506_624,
        "t5-base": 222_903_552,
        "t5-large": 737_668_096,
        "t5-v1.1-small": 76_961_152,
        "t5-v1.1-base": 247_577_856,
        "t5-v1.1-large": 783_150_080,
        "t5-v1.1-xl": 2_849_757_184,
        "t5-v1.1-xxl": 11_135_332_352,
    },
    250112: {"mt5-small": 300_176_768, "mt5-base": 582_401_280, "mt5-large": 1_229_581_312},
}


@pytest.mark.parametrize(("vocabulary", "name"), [(V, name) for V, sizes in PUBLISHED.items() for name in sizes])
def test_sizes_have_the_published_parameter_counts(vocabulary, name):
    scan = models.find(name)[1].get("layer_types") is None  # layers that differ cannot be stacked
    assert sum(count(lambda: create(name, vocabulary, scan=scan, rngs=nnx.Rngs(0))).values()) == PUBLISHED[vocabulary][name]


def test_gpt3_has_the_parameters_of_its_description():
    D, L = 12288, 96
    parameters = sum(count(lambda: create("gpt3-175b", 50257, scan=True, rngs=nnx.Rngs(0))).values())
    assert parameters == L * (12 * D * D + 13 * D) + 50257 * D + 2048 * D + 2 * D
    assert round(parameters / 1e9) == 175  # 175.0 B in the paper's table, which does not state what it counts


@pytest.mark.parametrize(("name", "millions", "D", "F"), [("transformer-base", 65, 512, 2048), ("transformer-big", 213, 1024, 4096)])
def test_the_original_transformer_has_the_parameters_of_its_description(name, millions, D, F):
    attention, norm = 4 * (D * D + D), 2 * D
    mlp = 2 * D * F + F + D
    expected = 37000 * D + 6 * (attention + mlp + 2 * norm) + 6 * (2 * attention + mlp + 3 * norm)
    parameters = sum(count(lambda: create(name, 37000, scan=True, rngs=nnx.Rngs(0))).values())
    assert parameters == expected
    # 65 and 213 million in the paper's table, with a vocabulary of "about 37000".
    assert abs(parameters / 1e6 - millions) < 0.035 * millions


def test_encoders_have_the_published_parameter_counts():
    # BertModel and RobertaModel count a pooler (the dense layer of the "class" head); the tokens' heads are ForMaskedLM's.
    vocabulary = {"bert": 30522, "roberta": 50265, "distilbert": 30522, "modernbert": 50368, "deberta": 128100}
    published = {
        "bert-tiny": (4_385_920, None),
        "bert-mini": (11_170_560, None),
        "bert-small": (28_763_648, None),
        "bert-medium": (41_373_184, None),
        "bert-base": (109_482_240, 109_514_298),
        "bert-large": (335_141_888, 335_174_458),
        "roberta-base": (124_645_632, 124_697_433),
        "roberta-large": (355_359_744, 355_412_057),
        "distilbert-base": (66_362_880 + 590_592, 66_985_530),
        "deberta-v3-xsmall": (70_682_112 + 384 * 384 + 384, 70_958_820),
        "deberta-v3-small": (141_304_320 + 768 * 768 + 768, 142_024_548),
        "deberta-v3-base": (183_831_552 + 768 * 768 + 768, 184_551_780),
        "deberta-v3-large": (434_012_160 + 1024 * 1024 + 1024, 435_191_908),
        "modernbert-base": (149_014_272 + 768 * 768 + 768, 149_655_232),
        "modernbert-large": (394_781_696 + 1024 * 1024 + 1024, 395_881_664),
    }
    for name, (model, masked) in published.items():
        V = vocabulary[name.split("-")[0]]
        parts = count(lambda: create(name, V, ("class", 2), scan=not name.startswith("modern"), rngs=nnx.Rngs(0)))  # noqa: B023
        width = parts["embed"] // V
        assert sum(parts.values()) - (2 * width + 2) == model, name
        if masked is not None:
            assert sum(count(lambda: create(name, V, ("tokens", V), scan=not name.startswith("modern"), rngs=nnx.Rngs(0))).values()) == masked, name  # noqa: B023


@pytest.mark.parametrize(("head", "shape"), [(("tokens", 11), (2, 5, 11)), (("tags", 3), (2, 5, 3)), (("class", 4), (2, 4)), (("value", 1), (2, 1))])
def test_heads_have_the_shapes_of_their_outputs(head, shape):
    def run(tokens):
        return create("encoder", 11, head, layers=1, width=8, heads=2, rngs=nnx.Rngs(0))(tokens)

    assert nnx.eval_shape(run, jnp.zeros((2, 5), int)).shape == shape


@pytest.mark.parametrize("pool", ["first", "mean"])
def test_padding_changes_nothing_in_an_encoder(pool):
    model = filled(lambda: create("encoder", 11, ("class", 3), layers=1, width=8, heads=2, pool=pool, types=2, rngs=nnx.Rngs(0)))
    tokens = np.random.default_rng(0).integers(0, 11, (2, 6))
    padded = np.pad(tokens, ((0, 0), (0, 5)), constant_values=-1)
    whole = jax.jit(lambda tokens: (model.states(tokens)[:, :6], model(tokens)))
    for one, other in zip(whole(padded), whole(tokens), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_head_at_some_positions_gives_the_same_outputs():
    model = filled(lambda: create("encoder", 11, ("tokens", 11), layers=1, width=8, heads=2, rngs=nnx.Rngs(0)))
    tokens, positions = jnp.arange(10).reshape(2, 5), jnp.array([[3, 1], [0, 4]])
    chosen, whole = jax.jit(lambda tokens: (model(tokens, positions=positions), model(tokens)))(tokens)
    np.testing.assert_allclose(chosen, jnp.take_along_axis(whole, positions[:, :, None], 1), atol=1e-5)


def rows_of_texts():
    """Two texts: in separate rows, one changed at position 5, one truncated and padded, and both in one row."""
    draw = np.random.default_rng(0).integers
    a, b = draw(0, 11, 8), draw(0, 11, 3)
    changed = np.where(np.arange(8) == 5, (a + 1) % 11, a)
    tokens = np.array([a, changed, [*a[:5], -1, -1, -1], [*b, -1, -1, -1, -1, -1], [*a[:5], *b]], np.int32)
    segments = np.zeros_like(tokens)
    segments[4, 5:] = 1
    return tokens, segments


GEMMA2 = {"positions": "rotary", "norm": "rms_plus_one", "activation": "geglu", "bias": False, "layer_types": ["local", "global"], "window": 3}
GEMMA2 |= {"output_norm": True, "scales": {"embedding": "sqrt_width", "attention_cap": 2.0, "logits_cap": 5.0}}
LONGROPE = {"kind": "longrope", "original_context": 6, "short": [1.0, 1.2], "long": [2.0, 9.0], "attention_factor": 1.3}
OPTIONS = {
    "gpt2": {},
    "llama": {"positions": "rotary", "norm": "rms", "activation": "swiglu", "bias": False, "kv_heads": 1, "tie_embeddings": False, "scan": True},
    "qwen3": {"positions": "rotary", "norm": "rms", "query_key_norm": True, "head_width": 6, "activation": "geglu"},
    "mistral": {"positions": "rotary", "rotary_scaling": {"kind": "linear", "factor": 2.0}, "window": 3, "qkv_bias": True, "bias": False},
    "original": {"positions": "sinusoidal", "post_norm": True, "activation": "relu"},
    "none": {"positions": "none", "activation": "gelu_exact"},
    "differing": {"positions": "rotary", "layer_types": ["local", "unrotated"], "window": 3, "input_norm": False, "output_norm": True, "mlp_bias": False},
    "gemma2": GEMMA2,
    "olmo2": {"positions": "rotary", "rotary_fraction": 0.5, "norm": "rms", "query_key_norm": "projection", "input_norm": False, "output_norm": True},
    "granite": {"positions": "rotary", "kv_heads": 1, "scan": True, "scales": {"embedding": 3.0, "attention": 0.3, "residual": 0.5, "logits": 2.0}},
    "dynamic": {"positions": "rotary", "rotary_base": 2.0, "rotary_scaling": {"kind": "dynamic", "factor": 8.0, "original_context": 2}},
    "longrope": {"positions": "rotary", "scan": True, "rotary_scaling": LONGROPE},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_decoder_attends_only_to_its_past(name):
    model = filled(lambda: Decoder(11, context=8, layers=2, width=8, heads=2, **OPTIONS[name], rngs=nnx.Rngs(0)))
    tokens, segments = rows_of_texts()
    y = np.asarray(jax.jit(model)(tokens, segments=segments))
    if name in ("dynamic", "longrope"):  # a text of 5 tokens has other angles than the first 5 of 8
        assert np.abs(y[2, :5] - y[0, :5]).max() > 1e-3
        np.testing.assert_allclose(y[4, :5], y[2, :5], atol=1e-4)
        np.testing.assert_allclose(y[4, 5:], y[3, :3], atol=1e-4)
        cut = np.asarray(jax.jit(model)(tokens[2:3, :5]))
        np.testing.assert_allclose(y[2, :5], cut[0], atol=1e-4)
        return
    np.testing.assert_allclose(y[1, :5], y[0, :5], atol=1e-4)  # not the future
    assert np.abs(y[1, 5:] - y[0, 5:]).max() > 1e-3
    np.testing.assert_allclose(y[2, :5], y[0, :5], atol=1e-4)  # not padding
    np.testing.assert_allclose(y[4, :5], y[0, :5], atol=1e-4)  # a text in a packed row gives the same as in its own row
    np.testing.assert_allclose(y[4, 5:], y[3, :3], atol=1e-4)
    if name in ("gpt2", "llama"):
        alone = np.asarray(jax.jit(model)(tokens[:4]))  # without segments
        np.testing.assert_allclose(alone[tokens[:4] >= 0], y[:4][tokens[:4] >= 0], atol=1e-4)


def test_the_factor_of_embeddings_is_rounded_to_their_type():
    """As in Gemma: the root of 3072 is 55.4 in float32, and 55.5 in bfloat16."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 3072)), jnp.bfloat16)
    scaled = Scales(embedding="sqrt_width").embeddings(x)
    assert scaled.dtype == jnp.bfloat16
    np.testing.assert_array_equal(scaled, (x.astype(jnp.float32) * 55.5).astype(jnp.bfloat16))


def test_layers_of_several_types():
    def make(positions="rotary", **options):
        return Decoder(11, context=8, layers=3, width=8, heads=2, positions=positions, **options, rngs=nnx.Rngs(0))

    x = jnp.asarray(rows_of_texts()[0][:1])
    types = ("local", "global")  # repeats: local, global, local
    alike = make(window=3)(x)
    assert np.abs(make(window=3, layer_types=types)(x) - alike).max() > 1e-3
    np.testing.assert_array_equal(make(window=3, layer_types=("local",), local_rotary_base=1e4)(x), alike)
    np.testing.assert_array_equal(make(layer_types=("unrotated",))(x), make("none")(x))
    bases = make(window=9, layer_types=types, rotary_base=50.0)(x)
    assert np.abs(make(window=9, layer_types=types, rotary_base=50.0, local_rotary_base=1e4)(x) - bases).max() > 1e-6
    np.testing.assert_array_equal(make(window=9, layer_types=types, rotary_base=50.0, local_rotary_base=50.0)(x), bases)
    for options, problem in (
        ({"layer_types": types}, "local layers, and only these, need a window"),
        ({"layer_types": ("global",), "window": 3}, "local layers, and only these, need a window"),
        ({"layer_types": ("sliding",)}, "got 'sliding'"),
        ({"layer_types": ()}, "layer_types is empty"),
        ({"layer_types": types, "window": 3, "scan": True}, "use scan=False"),
    ):
        with pytest.raises(ValueError, match=problem):
            make(**options)


def rms(x, scale, epsilon):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale


def heads_of(x, p, heads):
    x = x @ p["kernel"] + p.get("bias", 0)
    return x.reshape(*x.shape[:2], heads, -1)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def mixed(q, k, v, hidden, scale, bias=0.0):
    """Attention with one key head for each query head: q [B, T, N, K]; `hidden` [T, S] is the mask of excluded positions."""
    scores = np.einsum("btnk,bsnk->bnts", q, k) * scale + bias
    return np.einsum("bnts,bsnk->btnk", softmax(np.where(hidden, -np.inf, scores)), v).reshape(*q.shape[:2], -1)


def test_decoder_equals_qwen3_in_numpy():
    options = {"layers": 2, "width": 8, "heads": 4, "kv_heads": 2, "head_width": 6, "mlp_width": 10, "rotary_base": 100.0, "epsilon": 1e-6}
    model = filled(lambda: create("qwen3-0.6b", 11, **options, context=8, qkv_bias=True, rngs=nnx.Rngs(0)))
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), split(model)[1])
    tokens, _ = rows_of_texts()
    tokens = tokens[:2]

    def turned(x):
        """Multiply each pair of channels (i, i + 3), as a complex number, by e^(i · angle)."""
        angle = np.arange(8)[:, None] * 100.0 ** (-np.arange(3) / 3)
        z = (x[..., :3] + 1j * x[..., 3:]) * np.exp(1j * angle)[:, None]
        return np.concatenate([z.real, z.imag], -1)

    x = p["embed"]["embedding"][tokens]
    for i in "01":
        b = p["blocks"][i]
        a, h = b["attention"], rms(x, b["attention_norm"]["scale"], 1e-6)
        q = turned(rms(heads_of(h, a["query"], 4), a["query_norm"]["scale"], 1e-6))
        k = turned(rms(heads_of(h, a["key"], 2), a["key_norm"]["scale"], 1e-6))
        k, v = (np.repeat(y, 2, axis=2) for y in (k, heads_of(h, a["value"], 2)))
        x = x + mixed(q, k, v, ~np.tri(8, dtype=bool), 6**-0.5) @ a["out"]["kernel"]
        m, h = b["mlp"], rms(x, b["mlp_norm"]["scale"], 1e-6)
        gate = h @ m["gate"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ m["up"]["kernel"])) @ m["down"]["kernel"]
    expected = rms(x, p["final_norm"]["scale"], 1e-6) @ p["embed"]["embedding"].T
    np.testing.assert_allclose(jax.jit(model)(tokens), expected, atol=1e-4)


def paper_bucket(ahead, buckets, distance, causal):
    """Return the bucket of one distance, as described in the T5 paper."""
    if causal:
        first, away = 0, max(-ahead, 0)
    else:
        buckets //= 2
        first, away = (buckets if ahead > 0 else 0), abs(ahead)
    exact = buckets // 2
    if away < exact:
        return first + away
    return first + min(buckets - 1, exact + int(math.log(away / exact) / math.log(distance / exact) * (buckets - exact) + 1e-6))


@pytest.mark.parametrize("causal", [False, True])
def test_relative_positions_fall_into_the_buckets_of_the_paper(causal):
    at = np.arange(300)
    buckets = relative_buckets(at, at, buckets=32, distance=128, causal=causal)
    # At 16, 32 and 64 the logarithm is an integer, so that rounding may move the distance into either bucket.
    expected = np.array([[paper_bucket(s - t, 32, 128, causal) for s in at] for t in (0, 150, 299)])
    np.testing.assert_array_equal(np.asarray(buckets)[[0, 150, 299]], expected)


def test_encoder_decoder_equals_t5_in_numpy():
    options = {"layers": 1, "heads": 2, "width": 8, "head_width": 6, "mlp_width": 10}
    model = filled(lambda: create("t5-v1.1-small", 11, **options, rngs=nnx.Rngs(0)))
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), split(model)[1])
    source, target = rows_of_texts()[0][2:4], rows_of_texts()[0][:2, :6]

    def attended(x, memory, a, hidden, bias):
        q, k, v = heads_of(x, a["query"], 2), heads_of(memory, a["key"], 2), heads_of(memory, a["value"], 2)
        return mixed(q, k, v, hidden, 1.0, bias) @ a["out"]["kernel"]

    def side(x, p, hidden, causal, memory=None, memory_hidden=None):
        b, T = p["blocks"]["0"], x.shape[1]
        bias = np.array([[p["relative"]["embedding"][paper_bucket(s - t, 32, 128, causal)] for s in range(T)] for t in range(T)])
        normed = rms(x, b["attention_norm"]["scale"], 1e-6)
        x = x + attended(normed, normed, b["attention"], hidden, bias.transpose(2, 0, 1))
        if memory is not None:
            x = x + attended(rms(x, b["memory_norm"]["scale"], 1e-6), memory, b["memory_attention"], memory_hidden, 0.0)
        m, h = b["mlp"], rms(x, b["mlp_norm"]["scale"], 1e-6)
        gate = h @ m["gate"]["kernel"]
        gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        x = x + (gate * (h @ m["up"]["kernel"])) @ m["down"]["kernel"]
        return rms(x, p["final_norm"]["scale"], 1e-6)

    padding = (source < 0)[:, None, None]
    memory = side(p["embed"]["embedding"][np.maximum(source, 0)], p["encoder"], padding, False)
    x = side(p["embed"]["embedding"][target], p["decoder"], ~np.tri(6, dtype=bool), True, memory, padding)
    np.testing.assert_allclose(jax.jit(model)(source, target), x @ p["output"]["kernel"], atol=2e-4)


@pytest.mark.parametrize("positions", ["learned", "relative"])
def test_an_encoder_decoder_attends_to_the_source_and_the_targets_past(positions):
    model = filled(lambda: EncoderDecoder(11, layers=2, width=8, heads=2, positions=positions, scan=True, rngs=nnx.Rngs(0)))
    texts, _ = rows_of_texts()
    source, target = np.pad(texts[2:3, :5], ((0, 4), (0, 0)), mode="edge"), texts[[0, 1, 2, 0, 0]]
    source = np.pad(source, ((0, 0), (0, 2)), constant_values=-1)
    source[3, 2] = (source[3, 2] + 1) % 11
    y = np.asarray(jax.jit(model)(source, target))
    np.testing.assert_allclose(y[1, :5], y[0, :5], atol=1e-4)
    np.testing.assert_allclose(y[2, :5], y[0, :5], atol=1e-4)
    assert np.abs(y[1, 5:] - y[0, 5:]).max() > 1e-3
    assert np.abs(y[3] - y[0]).max(-1).min() > 1e-4  # every position attends to the source
    short = np.asarray(jax.jit(lambda s, t: model.decode(t, model.encode(s)))(source[:, :5], target))
    np.testing.assert_allclose(short, y, atol=1e-4)


def test_encoder_equals_bert_in_numpy():
    options = {"context": 9, "layers": 2, "width": 8, "heads": 2, "dropout": 0.0}
    model = filled(lambda: create("bert-tiny", 11, ("tokens", 11), **options, rngs=nnx.Rngs(0)))
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), split(model)[1])
    tokens = rows_of_texts()[0][1:3]
    types = np.array([[0, 0, 0, 1, 1, 1, 1, 1]] * 2)

    def norm(x, p):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12) * p["scale"] + p["bias"]

    def linear(x, p):
        return x @ p["kernel"] + p["bias"]

    gelu = np.vectorize(lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2)
    e = p["embed"]["embedding"]
    x = norm(e[np.maximum(tokens, 0)] + p["positions"]["embedding"][:8] + p["types"]["embedding"][types], p["embedding_norm"])
    for i in "01":
        b = p["blocks"][i]
        q, k, v = (heads_of(x, b["attention"][name], 2) for name in ("query", "key", "value"))
        x = norm(x + linear(mixed(q, k, v, (tokens < 0)[:, None, None], 0.5), b["attention"]["out"]), b["attention_norm"])
        x = norm(x + linear(gelu(linear(x, b["mlp"]["up"])), b["mlp"]["down"]), b["mlp_norm"])
    h = p["head"]
    expected = norm(gelu(linear(x, h["dense"])), h["norm"]) @ e.T + h["bias"]
    y = np.asarray(jax.jit(model)(tokens, types=types))
    np.testing.assert_allclose(y[tokens >= 0], expected[tokens >= 0], atol=2e-4)


def test_rotary_products_depend_on_the_distance_alone():
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8)).astype(np.float32)

    def product(i, j, scaling=None):
        turned = [rotate(x, *rotary_table(jnp.array([[at]]), 8, 10000.0, scaling)) for x, at in ((q, i), (k, j))]
        return float((turned[0] * turned[1]).sum())

    assert product(5, 2) == pytest.approx(product(105, 102), abs=1e-4)
    assert product(5, 2) != pytest.approx(product(5, 3), abs=1e-2)
    assert product(10, 4, RotaryScaling(kind="linear", factor=2.0)) == pytest.approx(product(5, 2), abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": "rotary", "heads": 8}, "even head width"),
        ({"kv_heads": 3}, "kv_heads must divide"),
        ({"rotary_scaling": {"kind": "linear", "factor": 2.0}}, "rotary_scaling needs positions='rotary'"),
        ({"positions": "rotary", "rotary_scaling": {"kind": "linear"}}, "needs rotary_scaling.factor"),
        ({"positions": "rotary", "rotary_scaling": {"kind": "longrope"}}, "short lists 0 factors; there are 2 pairs"),
        ({"positions": "rotary", "rotary_fraction": 1.5}, "rotary_fraction must be above 0 and at most 1"),
        ({"scales": {"logits": 0.0}}, "scales.logits must be above 0"),
        ({"remat": True}, "remat is"),
        ({"context": 4}, "5 tokens are more"),
    ],
)
def test_inconsistent_options_are_errors(options, message):
    options = {"width": 8, "heads": 2, "layers": 1, **options}
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda tokens: Decoder(11, **options, rngs=nnx.Rngs(0))(tokens), jnp.zeros((1, 5), int))


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_rotary_scaling_slows_down_slow_angles_alone(kind):
    plain, _ = rotary_frequencies(128, 500000.0)
    scaled, factor = rotary_frequencies(128, 500000.0, RotaryScaling(kind=kind, factor=8.0, original_context=8192))
    turns = 8192 * plain / (2 * np.pi)
    fast, slow = (4.0, 1.0) if kind == "llama3" else (33.0, 0.9)
    np.testing.assert_allclose(scaled[turns > fast], plain[turns > fast])
    np.testing.assert_allclose(scaled[turns < slow], plain[turns < slow] / 8)
    between = (turns < fast * 0.8) & (turns > slow * 1.3)
    assert between.any() and np.all((scaled < plain)[between] & (scaled > plain / 8)[between])
    assert factor == pytest.approx(1.0 if kind == "llama3" else 0.1 * math.log(8) + 1)


def test_positions_restart_in_each_segment():
    segments = jnp.array([[0, 0, 0, 1, 1, 5, 0, -1], [2, 2, 2, 2, 2, 2, 2, 2]])
    np.testing.assert_array_equal(positions_in(segments), [[0, 1, 2, 0, 1, 0, 0, 0], np.arange(8)])
    np.testing.assert_array_equal(lengths_in(segments), [[3, 3, 3, 2, 2, 1, 1, 1], [8] * 8])


class Talkative(nnx.Module):
    """A module in the place of a feed-forward, which returns statistics."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x, *, valid=None, rngs=None):
        y = self.linear(x)
        return y, {"loss": jnp.where(valid[..., None], y, 0).sum(), "load": y.mean((0, 1))}


def test_statistics_of_the_module_in_the_feed_forwards_place_are_returned():
    x, valid = jax.random.normal(jax.random.key(0), (2, 3, 8)), jnp.array([[True, True, False]] * 2)
    for scan in (False, True):
        options = {"norm": "layer", "epsilon": 1e-5, "post_norm": False, "activation": "gelu", "bias": True}
        block = functools.partial(Block, 8, 2, dropout=0.0, layers=2, mlp=Talkative, **options)
        blocks = filled(lambda block=block, scan=scan: make_blocks(lambda rngs: block(rngs=rngs), 2, scan, nnx.Rngs(0)))
        graph, state = nnx.split(blocks)

        def both(x, blocks=blocks, graph=graph, state=state, scan=scan):
            collected, y = [], x
            for i in range(2):
                block = nnx.merge(graph, jax.tree.map(lambda x: x[i], state)) if scan else blocks[i]  # noqa: B023
                y, statistics = block(y, None, valid=valid)
                collected.append(statistics)
            return apply_blocks(blocks, x, None, remat="full", valid=valid), (y, collected)

        (y, collected), (expected, aux) = jax.jit(both)(x)
        np.testing.assert_allclose(y, expected, atol=1e-5)
        for name in ("loss", "load"):
            np.testing.assert_allclose(collected[name], np.stack([each[name] for each in aux]), atol=1e-5)
