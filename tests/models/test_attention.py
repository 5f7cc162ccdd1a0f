"""Attention against plain computations, its implementations against each other, and the choice between them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_configs
from flax import nnx
from platforms import traced_as

from jaxmodels.errors import ConfigError
from jaxmodels.experiment.build import build_experiment
from jaxmodels.inference import load
from jaxmodels.models import create, fused, heads_first
from jaxmodels.models.attention import attend, choose, resolve_implementation
from jaxmodels.parallel.layout import Layout


def numpy_attend(q, k, v, *, causal=False, window=None, segments=None, bias=None, scale=None, cap=None):
    """Compute attention query by query in float64, by the paper's formula."""
    B, T, N, K = q.shape
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    y = np.zeros(q.shape)
    for b, n, t in np.ndindex(B, N, T):
        group = n // (N // k.shape[2])
        seen = [s for s in range(k.shape[1]) if not (causal and s > t) and not (window and abs(s - t) >= window)]
        seen = [s for s in seen if segments is None or segments[0][b, t] == segments[1][b, s]]
        scores = k[b, seen, group] @ q[b, t, n] * (K**-0.5 if scale is None else scale)
        scores = scores if cap is None else cap * np.tanh(scores / cap)
        scores = scores if bias is None else scores + np.asarray(bias, np.float64)[0, n, t, seen]
        weights = np.exp(scores - scores.max())
        y[b, t, n] = weights / weights.sum() @ v[b, seen, group]
    return y


def arrays(T=7, N=4, G=2, K=4, B=2):
    draw = np.random.default_rng(0).normal
    return tuple(draw(size=(B, T, heads, K)).astype(np.float32) for heads in (N, G, G))


SEGMENTS = np.array([[0, 0, 0, 1, 1, -1, -1], [3, 3, 2, 2, 2, 2, 2]])
BIAS = np.random.default_rng(1).normal(size=(1, 4, 7, 7)).astype(np.float32)


OPTIONS = pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"window": 3},
        {"causal": True, "window": 2, "scale": 1.0},
        {"segments": (SEGMENTS, SEGMENTS)},
        {"bias": BIAS, "causal": True},
        {"cap": 0.5, "causal": True, "window": 3, "segments": (SEGMENTS, SEGMENTS)},
        {"cap": 0.5, "window": 3, "scale": 1.0},
    ],
    ids=lambda options: "+".join(options),
)


@OPTIONS
def test_attention_equals_the_formula(options):
    y = jax.jit(lambda q, k, v: attend(q, k, v, **options))(*arrays())
    np.testing.assert_allclose(y, numpy_attend(*arrays(), **options), atol=1e-5)


@OPTIONS
def test_the_form_for_cpus_equals_the_formula_and_has_its_gradients(options, monkeypatch):
    monkeypatch.setattr(heads_first, "BLOCK", 3)  # 7 queries: blocks of 3, 3 and 1

    def loss(q, k, v, bias):
        y = attend(q, k, v, **options | ({} if bias is None else {"bias": bias}))
        return (y * jnp.sin(jnp.arange(y.size).reshape(y.shape))).sum(), y

    given = (*arrays(), options.get("bias"))
    gradients = jax.grad(loss, (0, 1, 2, 3)[: 4 if "bias" in options else 3], has_aux=True)
    others, _ = jax.jit(gradients)(*given)
    with traced_as("cpu"):
        found, y = jax.jit(lambda *given: gradients(*given))(*given)
    np.testing.assert_allclose(y, numpy_attend(*arrays(), **options), atol=1e-5)
    for one, other in zip(found, others, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 2), (False, 2), (True, 9)])
@pytest.mark.parametrize(("T", "S"), [(9, 4), (4, 9), (7, 7)])
def test_blocks_hold_the_keys_that_their_queries_see(T, S, causal, window, monkeypatch):
    monkeypatch.setattr(heads_first, "BLOCK", 3)
    everything = heads_first._seen(slice(0, T), slice(0, S), causal, window, None)
    found = np.zeros((T, S), bool)
    for queries, keys in heads_first._blocks(T, S, causal, window):
        assert 0 <= keys.start < keys.stop <= S
        found[queries, keys] = heads_first._seen(queries, keys, causal, window, None)
    np.testing.assert_array_equal(found, everything)


@pytest.mark.parametrize("options", [{"causal": True, "cap": 0.5}, {"segments": (SEGMENTS[:1], SEGMENTS[:1])}], ids=lambda options: "+".join(options))
def test_the_tpu_kernel_computes_the_same(options):
    # In an interpreter on the CPU; sequences of 7 are padded to blocks of 128.
    q, k, v = arrays(B=1)
    plain = {"causal": False, "window": None, "segments": None, "bias": None, "scale": None}
    y = fused.splash(q, k, v, **plain | options, interpret=True)
    np.testing.assert_allclose(y, numpy_attend(q, k, v, **options), atol=1e-4)


def test_gradients_of_the_tpu_kernel_are_those_of_the_formula(monkeypatch):
    # Sequences of 300 are padded to three blocks; two heads share keys and values.
    monkeypatch.setattr(fused, "BLOCKS", {128: 128})
    segments = jnp.asarray(np.repeat([[0, 0, 1], [0, 1, 1]], 100, axis=1))
    options = {"causal": True, "segments": (segments, segments)}

    def loss(attention, q, k, v):
        return (attention(q, k, v, **options) * jnp.sin(jnp.arange(300)[:, None, None])).sum()

    of_kernel = functools.partial(fused.splash, window=None, bias=None, scale=None, interpret=True)
    ours, theirs = (jax.jit(jax.grad(functools.partial(loss, f), (0, 1, 2)))(*arrays(T=300)) for f in (of_kernel, attend))
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-4 * np.abs(other).max())


def test_the_tpu_kernel_works_in_blocks_that_suit_a_sequence():
    # A single block of 1,024 would skip nothing of a causal mask. Blocks for wide heads, and for many queries, are limited by vector memory.
    assert [fused._block(length, 128) for length in (384, 1024, 1536, 2048, 8192, 131072)] == [128, 512, 512, 1024, 1024, 2048]
    assert fused._block(131072, 128, most=1024) == 1024 and fused._block(131072, 256) == 512


def test_the_tpu_kernel_and_its_gradient_lower_for_a_tpu():
    def loss(q, k, v, segments):
        return attend(q, k, v, causal=True, window=50, segments=(segments, segments), implementation="splash").astype(jnp.float32).sum()

    shapes = [jax.ShapeDtypeStruct((2, 300, heads, 64), jnp.bfloat16) for heads in (4, 2, 2)]
    segments = jax.ShapeDtypeStruct((2, 300), jnp.int32)
    exported = jax.export.export(jax.jit(jax.grad(loss, (0, 1, 2))), platforms=["tpu"])(*shapes, segments)
    assert [x.shape for x in exported.out_avals] == [x.shape for x in shapes]
    assert exported.mlir_module().count("tpu_custom_call") >= 3  # forward, and backward to queries, and to keys and values


REQUESTED = {"causal": True, "window": None, "bias": False}


@pytest.mark.parametrize(
    ("requested", "platform", "dtype", "changes", "used"),
    [
        ("auto", "cpu", "bfloat16", {}, "xla"),
        ("auto", "gpu", "bfloat16", {}, "cudnn"),
        ("auto", "gpu", "float32", {}, "xla"),
        ("auto", "gpu", "bfloat16", {"bias": True}, "xla"),
        ("auto", "gpu", "bfloat16", {"causal": False, "window": 4}, "xla"),
        ("auto", "gpu", "bfloat16", {"cap": True}, "xla"),
        ("auto", "tpu", "float32", {"cap": True}, "splash"),
        ("auto", "tpu", "float32", {}, "splash"),
        ("auto", "tpu", "float32", {"context": "gather"}, "splash"),
        ("auto", "tpu", "float32", {"context": "ring"}, "xla"),
        ("auto", "gpu", "bfloat16", {"context": "gather"}, "xla"),
        ("auto", "gpu", "bfloat16", {"context": "gather", "causal": False}, "cudnn"),
        ("xla", "gpu", "bfloat16", {}, "xla"),
        ("cudnn", "gpu", "float16", {}, "cudnn"),
    ],
)
def test_auto_is_the_fused_kernel_if_it_can_run(requested, platform, dtype, changes, used):
    assert choose(requested, platform, dtype, 64, **REQUESTED | changes)[0] == used


@pytest.mark.parametrize(
    ("requested", "platform", "dtype", "head_width", "changes", "message"),
    [
        ("cudnn", "cpu", "bfloat16", 64, {}, "needs an NVIDIA GPU"),
        ("cudnn", "gpu", "float32", 64, {}, "not float32"),
        ("cudnn", "gpu", "bfloat16", 36, {}, "up to 128, not 36"),
        ("cudnn", "gpu", "bfloat16", 64, {"context": "gather"}, "mesh.context"),
        ("cudnn", "gpu", "bfloat16", 64, {"cap": True}, "no cap on the products"),
        ("auto", "cpu", "float32", 64, {"context": "ring", "cap": True}, "ring' does not support a cap .*; use sharding.context='gather'"),
        ("splash", "gpu", "float32", 64, {}, "TPU kernel"),
        ("splash", "tpu", "float32", 64, {"context": "ring"}, "sharding.context='gather'"),
        ("auto", "cpu", "float32", 64, {"context": "ring", "bias": True}, "sharding.context='gather'"),
    ],
)
def test_an_implementation_that_cannot_run_is_an_error_with_the_reason(requested, platform, dtype, head_width, changes, message):
    with pytest.raises(ValueError, match=message):
        choose(requested, platform, dtype, head_width, **REQUESTED | changes)


def test_every_attention_layer_is_resolved_and_the_choice_is_returned():
    model = nnx.eval_shape(lambda: create("t5-v1.1-small", 11, layers=2, heads=2, width=16, head_width=8, scan=True, rngs=nnx.Rngs(0)))
    record = resolve_implementation(model, "gpu", jnp.bfloat16)
    # Self-attention has relative positions, for which there is no cuDNN; attention to the memory has none.
    assert (model.encoder.blocks.attention.implementation, model.decoder.blocks.memory_attention.implementation) == ("xla", "cudnn")
    assert record["asked"] == "auto" and set(record["used"].split(" / ")) == {"xla", "cudnn"}
    assert resolve_implementation(nnx.eval_shape(lambda: create("lstm", 11, rngs=nnx.Rngs(0))), "gpu") == {}


def test_the_choice_depends_on_the_sharding_of_sequences():
    def resolved(name, platform, context, **options):
        model = nnx.eval_shape(lambda: create(name, 11, **{"layers": 2, "heads": 2, "width": 16} | options, rngs=nnx.Rngs(0)))
        mesh = jax.sharding.AbstractMesh((4, 1), ("context", "tensor"))
        return resolve_implementation(model, platform, jnp.bfloat16, Layout(mesh, context=context))["used"]

    assert [resolved("gpt", "tpu", context) for context in ("gather", "ring")] == ["splash", "xla"]
    assert [resolved("gpt", "gpu", context) for context in ("gather", "ring")] == ["xla", "xla"]
    assert [resolved("gpt", platform, "heads", heads=4, width=32) for platform in ("tpu", "gpu", "cpu")] == ["splash", "cudnn", "xla"]
    for context in ("ring", "heads"):
        with pytest.raises(ValueError, match="relative positions.*sharding.context='gather'"):
            resolved("t5-v1.1-small", "tpu", context, heads=4, head_width=8)
    with pytest.raises(ValueError, match="2 do not divide over context=4; use 'gather' or 'ring'"):
        resolved("gpt", "cpu", "heads")


def test_attention_that_cannot_run_is_an_error_of_the_config():
    with pytest.raises(ConfigError, match="float32"):  # no GPU could run it: an error when the config is checked
        build_experiment(small_configs.config(small_configs.GPT, model__attention="cudnn"))
    experiment = build_experiment(small_configs.config(small_configs.GPT, model__attention="cudnn", training__precision="bfloat16"))
    with pytest.raises(ConfigError, match="config.model.attention.*NVIDIA"):
        experiment.on("cpu")
    assert experiment.on("gpu").kernels["attention"]["used"] == "cudnn"
    # A trained run can be evaluated on any platform.
    assert build_experiment(load.portable_config(experiment.config)).on("cpu").kernels["attention"]["used"] == "xla"
