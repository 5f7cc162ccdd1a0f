"""Compute the values that test_pipeline.py checks, on eight simulated devices in one process; print them as JSON."""

import dataclasses
import json
import math
import re
import sys

import jax

from jaxmodels.models import functional
from jaxmodels.parallel.mesh import simulate_devices

simulate_devices(8)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import small_configs  # noqa: E402
from flax import nnx  # noqa: E402

from jaxmodels.data.loader import TrainingBatches  # noqa: E402
from jaxmodels.experiment import dry_run  # noqa: E402
from jaxmodels.experiment.build import build_experiment  # noqa: E402
from jaxmodels.models.encoder import Encoder  # noqa: E402
from jaxmodels.models.encoder_decoder import EncoderDecoder  # noqa: E402
from jaxmodels.models.transformer import Decoder  # noqa: E402
from jaxmodels.parallel import layout as layout_lib  # noqa: E402
from jaxmodels.parallel import mesh as mesh_lib  # noqa: E402
from jaxmodels.parallel import pipeline, sharding  # noqa: E402

FOUR = {"pipeline": 4, "data": 2}
MIXED = {"pipeline": 2, "fsdp": 2, "tensor": 2, "data": 1}
SMALL = {"layers": 4, "heads": 2, "width": 16, "context": 12, "scan": True}
COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(.*?op_name=\"([^\"]*)\"")


def layout_of(sizes: dict, **section) -> layout_lib.Layout:
    return sharding.make_layout(mesh_lib.make_mesh(mesh_lib.MeshSizes(**sizes)), sharding.Sharding(**section))


def error(one, many) -> float:
    """Return the largest difference of two trees of arrays, relative to the array's largest value.

    If that is tiny (the gradient of the keys' biases is 0 except for rounding), it is relative to a thousandth of the tree's largest value.
    """
    one, many = (jax.tree.leaves(jax.device_get(tree)) for tree in (one, many))
    largest = max(np.abs(a).max() for a in one)
    return float(max(np.abs(a - b).max() / max(np.abs(a).max(), largest / 1000) for a, b in zip(one, many, strict=True)))


def tokens(rows: int, length: int = 12, *, padded: bool, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, 30, (rows, length))
    return np.where(np.arange(length) < generator.integers(length // 2, length, (rows, 1)), drawn, -1) if padded else drawn


def gradients(model: nnx.Module, call, arguments, layout: layout_lib.Layout | None):
    """Return a model's outputs and the gradient of a loss of all outputs, sharded by a layout."""
    graph, params, stats = functional.split(model)

    def loss(params, *arguments):
        with layout_lib.use(layout):
            result = call(functional.merge(graph, params, stats), *arguments)
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(result)), result

    if layout is not None:
        section = sharding.Sharding()
        place = {
            path: jax.NamedSharding(layout.mesh, sharding.parameter_spec(path, x.shape, section, layout)) for path, x in functional.flatten(params).items()
        }
        params = jax.device_put(params, functional.unflatten(place))
        arguments = jax.device_put(arguments, mesh_lib.batch_sharding(layout.mesh))
    (_, result), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, *arguments)
    return result, grads


def models(more: bool = False) -> dict:
    """Return for each model the error of outputs and gradients on a mesh, compared with one device; `more` adds rarer configurations."""
    segments = np.repeat(np.arange(2), 6)[None].repeat(16, axis=0)
    packed = tokens(16, padded=True)
    rngs = nnx.Rngs(0)
    decoder = {"positions": "rotary", "kv_heads": 1, "norm": "rms", "activation": "swiglu", "moe": {"experts": 4}, "remat": "full"}
    cases = {
        "packed mixture": (
            Decoder(30, rngs=rngs, **decoder, **SMALL),
            lambda model, tokens, segments: model.with_auxiliary(tokens, segments=segments),
            (packed, segments),
            layout_of({"pipeline": 2, "expert": 2, "data": 2}, microbatches=4),
        ),
        "padded encoder": (
            Encoder(30, ("tags", 5), rngs=rngs, **SMALL),
            lambda model, tokens: model(tokens) * (tokens >= 0)[..., None],
            (packed,),
            layout_of(MIXED, microbatches=8),
        ),
    }
    if more:
        unmasked = tokens(16, padded=False)
        cases = {
            "relative encoder-decoder": (
                EncoderDecoder(30, positions="relative", post_norm=False, rngs=rngs, **SMALL),
                lambda model, source, target: model(source, target) * (target >= 0)[..., None],
                (packed, tokens(16, 8, padded=True, seed=1)),
                layout_of(FOUR, microbatches=4),
            ),
            "ring": (
                Decoder(30, positions="rotary", kv_heads=1, remat="dots", rngs=rngs, **SMALL),
                lambda model, tokens, segments: model(tokens, segments=segments) * (tokens >= 0)[..., None],
                (packed, segments),
                layout_of({"pipeline": 2, "context": 2, "tensor": 2, "data": 1}, microbatches=4, context="ring"),
            ),
            "heads": (
                Decoder(30, positions="rotary", kv_heads=1, remat="full", rngs=rngs, **SMALL),
                lambda model, tokens, segments: model(tokens, segments=segments) * (tokens >= 0)[..., None],
                (packed, segments),
                layout_of({"pipeline": 2, "context": 2, "data": 2}, microbatches=4, context="heads"),
            ),
            "capacity": (
                Decoder(30, moe={"experts": 4, "dispatch": "capacity"}, rngs=rngs, **SMALL),
                lambda model, tokens: model.with_auxiliary(tokens),
                (unmasked,),
                layout_of({"pipeline": 2, "expert": 2, "tensor": 2, "data": 1}, microbatches=4),
            ),
        }
    return {
        name: error(gradients(model, call, arguments, None), gradients(model, call, arguments, layout))
        for name, (model, call, arguments, layout) in cases.items()
    }


def schedule() -> dict:
    """Return errors of `over_layers` for a function with a closed form, and results for a function with random draws.

    In the first, layer l adds its weight w_l and returns the sum of x over rows.
    """
    layout = layout_of(FOUR, microbatches=8)
    x, weights = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32), np.arange(1.0, 9, dtype=np.float32)

    def add(x, weights, keys, shared):
        return jax.lax.scan(lambda x, w: (x + w * shared["own"] + shared["all"], {"sum": x.sum(0)}), x, weights)

    def draw(x, layers, keys, shared):
        bits = jax.vmap(lambda key: jax.random.uniform(key))(keys)
        return x + bits @ jax.nn.one_hot(layers, 8), {"turns": jnp.ones(len(keys))}

    def piped(function, *arguments):
        with layout_lib.use(layout):
            return jax.jit(lambda *a: pipeline.over_layers(function, *a))(*arguments)

    shared = {"own": x[:, :1], "all": np.ones((1, 3), np.float32), "none": None}
    y, sums = piped(add, weights, None, x, shared)
    drawn, counted = piped(draw, jnp.arange(8), jax.random.split(jax.random.key(0), 8), np.zeros((16, 8), np.float32), {})
    few, _ = piped(add, weights, None, x[:1], {"own": x[:1, :1], "all": shared["all"]})
    return {
        "y": error(x + 36 * x[:, :1] + 8, y),
        "sums": error(np.stack([(x + w * (w - 1) / 2 * x[:, :1] + (w - 1)).sum(0) for w in weights]), sums["sum"]),
        "one row": error((x + 36 * x[:, :1] + 8)[:1], few),
        "drawn": np.asarray(drawn).tolist(),
        "counted": np.asarray(counted["turns"]).tolist(),
    }


def compiled(sizes: dict, microbatches: int, accumulate: int):
    """Return the experiment, state shapes, compiled train step, and four batches of a GPT on a mesh; `sizes` {} means one device."""
    changes = {"layers": 4, "dropout": 0.0, "scan": True, "width": 32}
    config = small_configs.config(small_configs.GPT, **{f"model__{key}": value for key, value in changes.items()}, data__batch_size=32)
    # Not Adam, whose steps have full size even for gradients that are only rounding errors.
    config |= {"mesh": sizes, "sharding": {"microbatches": microbatches}, "optimizer": {"name": "sgd", "learning_rate": 1.0, "clip_norm": 1.0}}
    config["training"]["accumulate"] = accumulate
    experiment = build_experiment(config)
    mesh = mesh_lib.make_mesh(experiment.mesh, None if sizes else jax.devices()[:1])
    layout = sharding.make_layout(mesh, experiment.sharding)
    experiment = experiment.on("cpu", layout)
    shapes = sharding.place_state(experiment.state_shapes(), experiment.sharding, layout)
    placed = jax.tree.map(lambda x: x.sharding, shapes)
    batches = TrainingBatches(experiment.dataset.splits["train"], 32, 4, seed=0, shuffle=True)
    batches = [mesh_lib.place(batches[i], mesh_lib.batch_sharding(mesh), 32) for i in range(4)]
    function = jax.jit(experiment.step_function(placed.params), donate_argnums=0, out_shardings=(placed, mesh_lib.replicated(mesh)))
    return experiment, shapes, function.lower(shapes, batches[0], jax.random.key(1)).compile(), batches


def exchange() -> dict:
    """Return a device's share of the blocks, the collectives of a train step, and figures of a dry run."""
    experiment, shapes, step_function, _ = compiled(FOUR, 4, 2)
    blocks = [x for path, x in functional.flatten(shapes.params).items() if path.startswith("blocks/")]
    whole = build_experiment(experiment.config | {"mesh": {}})
    plans = [dry_run.summarize(dataclasses.replace(experiment, layout=None, platform=None)), dry_run.summarize(whole)]
    text, V = step_function.as_text(), experiment.dataset.info["vocab_size"]
    return {
        "blocks": mesh_lib.bytes_per_device(blocks) / sum(x.size * x.dtype.itemsize for x in blocks),
        "collectives": [match.groups() for match in COLLECTIVE.finditer(text)],
        "logits": max(math.prod(map(int, sizes.split(","))) for sizes in re.findall(rf"f32\[([\d,]+),{V}\]", text)),
        "pipeline": plans[0]["pipeline"],
        "notes": plans[0]["notes"],
        "operations": [plan["flops_per_step"] for plan in plans],
    }


def training() -> dict:
    """Return the error of the parameters after four steps on each mesh, compared with one device."""
    cases = {"one": ({}, 1, 1)}
    cases |= {f"{sizes} {m} {a}": (sizes, m, a) for sizes in (FOUR, MIXED) for m in (4, 8) for a in (1, 2)}
    params = {}
    for name, case in cases.items():
        experiment, shapes, step_function, batches = compiled(*case)
        state = jax.jit(experiment.init_function(), out_shardings=jax.tree.map(lambda x: x.sharding, shapes))(jax.random.key(0))
        for batch in batches:
            state, _ = step_function(state, batch, jax.random.key(1))
        params[name] = jax.device_get(state.params)
    one = params.pop("one")
    return {name: error(one, other) for name, other in params.items()}


if __name__ == "__main__":
    if sys.argv[1:] == ["more"]:
        print(json.dumps(models(more=True) | training()))
    else:
        print(json.dumps({"models": models(), "schedule": schedule(), "exchange": exchange()}))
