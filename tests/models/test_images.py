"""Vision Transformers and ConvNeXt: published sizes, and their parts against independent computations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx
from scipy.special import erf, softmax

from jaxmodels.models import create
from jaxmodels.models.convnext import ConvNeXtBlock
from jaxmodels.models.functional import merge, new_rngs, split
from jaxmodels.models.layers import stochastic_depth
from jaxmodels.models.vit import interpolated, sincos


def drawn(make, *args, **options):
    """Return a model with random parameters, because initial zeros and ones hide errors. NumPy draws them, without compilation."""
    graph, params, stats = split(nnx.eval_shape(lambda: make(*args, **options, rngs=new_rngs(0))))
    generator = np.random.default_rng(0)
    return merge(graph, jax.tree.map(lambda x: jnp.asarray(generator.normal(0, 0.3, x.shape), x.dtype), params), stats)


def normal(*shape):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("vit_ti16", 5_717_416),
        ("vit_s16", 22_050_664),
        ("vit_s32", 22_878_952),
        ("vit_b16", 86_567_656),
        ("vit_b32", 88_224_232),
        ("vit_l16", 304_326_632),
        ("vit_l32", 306_535_400),
        ("vit_g14", 1_012_611_432),
        ("deit_ti16", 5_910_800),
        ("deit_s16", 22_436_432),
        ("deit_b16", 87_338_192),
        ("swin-tiny", 28_288_354),
        ("swin-small", 49_606_258),
        ("swin-base", 87_768_224),
        ("swin-large", 196_532_476),
        ("convnext_t", 28_589_128),
        ("convnext_s", 50_223_688),
        ("convnext_b", 88_591_464),
    ],
)
def test_sizes_have_the_published_parameter_counts(name, parameters):
    options = {"scan": True} if name.startswith(("vit", "deit")) else {}
    shapes = nnx.eval_shape(lambda: create(name, (224, 224, 3), 1000, rngs=new_rngs(0), **options))
    assert sum(x.size for x in jax.tree.leaves(split(shapes)[1])) == parameters


def vit(**options):
    return drawn(create, "vit", (8, 12, 3), 5, **({"layers": 2, "heads": 2, "width": 8, "mlp_width": 12} | options))


@pytest.mark.parametrize("pool", ["token", "mean"])
@pytest.mark.parametrize("positions", ["learned", "sincos"])
def test_patches_are_embedded_as_by_a_strided_convolution(pool, positions):
    model = vit(pool=pool, positions=positions)
    image = normal(2, 8, 12, 3)
    kernel = model.patches.kernel[...].reshape(4, 4, 3, 8)
    numbers = ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(image, kernel, (4, 4), "VALID", dimension_numbers=numbers) + model.patches.bias[...]
    expected = np.asarray(expected).reshape(2, 6, 8)
    table = sincos(2, 3, 8) if positions == "sincos" else np.asarray(model.positions[...])[pool == "token" :]
    got = jax.jit(model.embed)(image)
    np.testing.assert_allclose(got[:, pool == "token" :], expected + table, atol=1e-5)
    if pool == "token":
        own = 0 if positions == "sincos" else model.positions[...][0]
        np.testing.assert_allclose(got[:, 0], np.broadcast_to(model.token[...][0, 0] + own, (2, 8)), atol=1e-6)


def test_fixed_positions_are_sines_and_cosines_of_column_and_row():
    table = sincos(3, 5, 16)
    for row, column in [(0, 0), (2, 1), (1, 4)]:
        expected = [f(place / 10_000 ** (i / 4)) for place in (column, row) for f in (np.sin, np.cos) for i in range(4)]
        np.testing.assert_allclose(table[5 * row + column], expected, atol=1e-6)


def numpy_vit(p, x, heads, pool):
    """Compute the logits from embedded patches, in float64."""

    def norm(x, layer):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * layer["scale"] + layer["bias"]

    def linear(x, layer):
        return x @ layer["kernel"] + layer["bias"]

    for i in range(len(p["blocks"])):
        b = p["blocks"][str(i)]
        h = norm(x, b["attention_norm"])
        q, k, v = (linear(h, b["attention"][name]) for name in ("query", "key", "value"))
        cut = np.array_split(np.arange(q.shape[-1]), heads)
        seen = [softmax(q[..., c] @ k[..., c].swapaxes(1, 2) / np.sqrt(len(c)), axis=-1) @ v[..., c] for c in cut]
        x = x + linear(np.concatenate(seen, -1), b["attention"]["out"])
        h = linear(norm(x, b["mlp_norm"]), b["mlp"]["up"])
        x = x + linear(h * (1 + erf(h / np.sqrt(2))) / 2, b["mlp"]["down"])
    x = norm(x, p["norm"])
    return linear(x[:, 0] if pool == "token" else x.mean(1), p["output"])


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_vit_equals_one_in_numpy(pool):
    model = vit(pool=pool)
    image = normal(2, 8, 12, 3)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), split(model)[1])
    embedded, logits = jax.jit(lambda: (model.embed(image), model(image)))()
    np.testing.assert_allclose(logits, numpy_vit(p, np.asarray(embedded, np.float64), 2, pool), atol=2e-5)


def test_vit_stacked_and_listed_are_one_function():
    plain = vit(stochastic_depth=0.3, dropout=0.1)
    params = dict(split(plain)[1])
    params["blocks"] = jax.tree.map(lambda *x: jnp.stack(x), params["blocks"]["0"], params["blocks"]["1"])
    image = normal(4, 8, 12, 3)
    got = []
    for model, weights in [(plain, split(plain)[1]), (vit(stochastic_depth=0.3, dropout=0.1, scan=True, remat="full"), params)]:
        graph, _, stats = split(model)
        run = jax.jit(lambda params, g=graph, s=stats: [merge(g, params, s)(image, rngs=rngs) for rngs in (nnx.Rngs(dropout=1), None)])
        got.append(run(weights))
    np.testing.assert_allclose(got[0], got[1], atol=1e-5)
    assert np.abs(got[0][0] - got[0][1]).max() > 0.01, "training drops"


def test_stochastic_depth_drops_whole_examples_and_keeps_the_mean():
    x = normal(2000, 3, 2)
    got = np.asarray(stochastic_depth(x, 0.25, nnx.Rngs(dropout=0)))
    dropped = (got == 0).all((1, 2))
    np.testing.assert_allclose(got[~dropped], np.asarray(x)[~dropped] / 0.75, rtol=1e-6)
    assert 0.2 < dropped.mean() < 0.3
    np.testing.assert_array_equal(stochastic_depth(x, 0.25, None), x)


def test_convnext_block_is_the_published_one():
    block = drawn(ConvNeXtBlock, 4, kernel=7, layer_scale=1e-6, rate=0.0)
    x = np.random.default_rng(1).normal(size=(2, 5, 6, 4)).astype(np.float32)
    padded = np.pad(x, ((0, 0), (3, 3), (3, 3), (0, 0)))
    kernel = np.asarray(block.kernel[...])
    y = sum(padded[:, i : i + 5, j : j + 6] * kernel[i, j] for i in range(7) for j in range(7)) + np.asarray(block.bias[...])
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
    y = y * np.asarray(block.norm.scale[...]) + np.asarray(block.norm.bias[...])
    hidden = y @ np.asarray(block.up.kernel[...]) + np.asarray(block.up.bias[...])
    hidden = scipy.stats.norm.cdf(hidden) * hidden
    y = (hidden @ np.asarray(block.down.kernel[...]) + np.asarray(block.down.bias[...])) * np.asarray(block.layer_scale[...])
    np.testing.assert_allclose(jax.jit(lambda x: block(x, None))(x), x + y, atol=1e-5)


def test_convnext_halves_by_stage_and_skips_blocks_more_often_later():
    model = drawn(create, "convnext", (17, 18, 3), 5, stages=(1, 2, 1), width=4, patch=2, stochastic_depth=0.3)
    sizes = []

    def forward(image):
        x = model.stem_norm(model.stem(image))
        for stage in range(3):
            x = model.merges[stage - 1](model.norms[stage - 1](x)) if stage else x
            sizes.append(x.shape[1:])
        return model(image, rngs=nnx.Rngs(dropout=0))

    assert jax.eval_shape(forward, jax.ShapeDtypeStruct((2, 17, 18, 3), jnp.float32)).shape == (2, 5)
    assert sizes == [(8, 9, 4), (4, 4, 8), (2, 2, 16)]
    np.testing.assert_allclose([block.rate for blocks in model.blocks for block in blocks], [0, 0.1, 0.2, 0.3])


def test_positions_of_another_grid_are_interpolated_as_pytorch_does():
    torch = pytest.importorskip("torch")
    table = np.random.default_rng(0).normal(size=(5, 5, 3)).astype(np.float32)
    for grid in [(7, 2), (4, 11), (5, 5)]:
        expected = torch.nn.functional.interpolate(torch.tensor(table).permute(2, 0, 1)[None], size=grid, mode="bicubic", align_corners=False)[0]
        np.testing.assert_allclose(interpolated(jnp.asarray(table), grid), expected.permute(1, 2, 0).numpy(), atol=1e-5)


def test_a_small_image_uses_the_middle_of_the_table_of_windows():
    """A window of 7 on 4×4 positions is a window of 4 with the offsets from -3 to 3."""
    options = {"stages": (2,), "heads": (2,), "width": 8, "patch": 2}
    large, small = (drawn(create, "swin", (8, 8, 3), 5, window=window, **options) for window in (7, 4))
    graph, params, stats = split(small)
    own = dict(split(large)[1])
    cut = {str(i): block | {"relative": block["relative"].reshape(13, 13, 2)[3:10, 3:10].reshape(49, 2)} for i, block in own["blocks"]["0"].items()}
    assert jax.tree.map(jnp.shape, own | {"blocks": {"0": cut}}) == jax.tree.map(jnp.shape, params)
    image = normal(2, 8, 8, 3)
    run = jax.jit(lambda: (large(image), merge(graph, own | {"blocks": {"0": cut}}, stats)(image)))
    np.testing.assert_allclose(*run(), atol=1e-5)


def test_swin_rematerialised_is_the_same_function_in_training():
    options = {"stages": (2,), "heads": (2,), "width": 8, "patch": 2, "window": 2, "stochastic_depth": 0.3, "dropout": 0.1}
    image, got = normal(4, 12, 8, 3), []
    for remat in ("none", "full"):
        graph, params, stats = split(drawn(create, "swin", (12, 8, 3), 5, remat=remat, **options))
        loss = jax.jit(jax.grad(lambda p, g=graph, s=stats: jnp.sum(merge(g, p, s)(image, rngs=nnx.Rngs(dropout=1)) ** 2)))
        got.append(jax.tree.leaves(loss(params)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *got)
    assert all(np.abs(x).max() > 0 for x in got[0])


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("vit", {"patch": 5}, "patch must divide"),
        ("vit", {"heads": 5}, "heads must divide"),
        ("vit", {"width": 6, "positions": "sincos"}, "divides by 4"),
        ("vit", {"stochastic_depth": 1.0}, "stochastic_depth"),
        ("vit", {"distillation": "token", "pool": "mean"}, "needs pool='token'"),
        ("vit", {"grid": (2, 2), "positions": "sincos"}, "grid is the rows and columns"),
        ("swin", {"heads": (2, 4)}, "one number for each stage"),
        ("swin", {"heads": (5, 4, 8)}, "heads must divide width"),
        ("convnext", {"kernel": 4}, "odd"),
        ("convnext", {}, "to nothing"),
    ],
)
def test_sizes_that_do_not_fit_are_named(name, options, words):
    with pytest.raises(ValueError, match=words):
        nnx.eval_shape(lambda: create(name, (16, 16, 3), 5, **options, rngs=new_rngs(0)))
