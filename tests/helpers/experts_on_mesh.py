"""Compare a mixture of experts on eight simulated devices with one device; print the differences and collectives as JSON.

    python tests/helpers/experts_on_mesh.py ACTIVATION…

It runs in its own process, since JAX fixes the number of devices when it starts.
"""

import collections
import functools
import json
import re
import sys

import jax

from jaxmodels.parallel.mesh import simulate_devices

simulate_devices(8)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import small_configs  # noqa: E402
from flax import nnx  # noqa: E402

from jaxmodels.errors import ConfigError  # noqa: E402
from jaxmodels.experiment.build import build_experiment  # noqa: E402
from jaxmodels.models import grouped, moe  # noqa: E402
from jaxmodels.models.functional import flatten, merge, split, unflatten  # noqa: E402
from jaxmodels.parallel import layout as layout_lib  # noqa: E402
from jaxmodels.parallel import sharding  # noqa: E402
from jaxmodels.parallel.mesh import MeshSizes, make_mesh  # noqa: E402

B, T, D, F, E, K = 8, 8, 8, 16, 4, 2
ROWS = ("batch", "sequence", None)
MESHES = {
    "expert and data": {"expert": 4, "data": 2},
    "expert, fsdp and tensor": {"expert": 2, "fsdp": 2, "tensor": 2},
    "context and expert": {"context": 2, "expert": 4},
    "data": {"data": 8},
}
COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


def make(**options):
    init = nnx.initializers.normal(0.5)
    return moe.MoE(D, F, experts=E, top_k=K, capacity_factor=0.75, init=init, out_init=init, rngs=nnx.Rngs(0), **options)


def inputs():
    valid = np.ones((B, T), bool)
    valid[0, 3] = valid[1, -4:] = valid[5] = False
    x = np.random.default_rng(1).normal(size=(B, T, D)).astype(np.float32)
    return jnp.asarray(np.where(valid[..., None], x, 1e3)), jnp.asarray(valid)


def loss(params, x, valid, *, model, layout=None):
    """Return the loss (a sum over rows plus the auxiliary loss) and (outputs, sums); under `pmap`, of the device's own rows."""
    graph, _, stats = split(model)
    with layout_lib.use(layout):
        y, sums = merge(graph, params, stats)(x, valid=valid)
        sums = layout_lib.sum_over_devices(sums)
    tokens = jnp.sum(valid)
    return jnp.sum(jnp.sin(y)) + moe.statistics(sums, model.mixture)["loss"] * tokens, (y, sums)


def gradient(model, layout=None):
    return jax.value_and_grad(functools.partial(loss, model=model, layout=layout), (0, 1), has_aux=True)


def make_layout(sizes):
    return sharding.make_layout(make_mesh(MeshSizes(**{"data": 1} | sizes)), sharding.Sharding())


def compiled(model, layout):
    """Return the compiled function of `gradient`, and its arguments, sharded by a layout."""
    params, (x, valid) = split(model)[1], inputs()
    specs = {path: sharding.parameter_spec(f"mlp/{path}", p.shape, sharding.Sharding(), layout) for path, p in flatten(params).items()}
    params = unflatten({path: jax.device_put(p, jax.NamedSharding(layout.mesh, specs[path])) for path, p in flatten(params).items()})
    arguments = params, jax.device_put(x, layout.sharding(*ROWS)), jax.device_put(valid, layout.sharding(*ROWS[:2]))
    out = ((layout.sharding(), None), (jax.tree.map(lambda p: p.sharding, params), arguments[1].sharding))
    return jax.jit(gradient(model, layout), out_shardings=out).lower(*arguments).compile(), arguments


def collectives(text):
    """Return how often each collective occurs in a compiled program, and the number of values of the largest gather."""
    found = re.findall(rf"= (.*?) ({COLLECTIVES})(?:-start)?\(", text)
    gathered = [shape for result, kind in found if kind == "all-gather" for shape in re.findall(r"\[([\d,]+)\]", result)]
    sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in gathered]
    return dict(collections.Counter(kind for _, kind in found)) | {"largest gather": int(max(sizes, default=0))}


def difference(one, other):
    """Return the largest difference of any pair of arrays, relative to the array's largest value."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(np.abs(np.asarray(a) - np.asarray(b)).max() / max(np.abs(a).max(), 1e-6)) for a, b in pairs)


def spread(model, one, sizes):
    layout = make_layout(sizes)
    program, arguments = compiled(model, layout)
    result = program(*arguments)
    experts = jax.tree.leaves(arguments[0]["experts"])
    return {
        "difference": difference(one, result),
        "sums": {name: np.asarray(value).tolist() for name, value in result[0][1][1].items()},
        "collectives": collectives(program.as_text()),
        "of the experts": sum(p.addressable_shards[0].data.nbytes for p in experts) / sum(p.nbytes for p in experts),
        "left whole": list(layout.left_whole),
    }


def mapped(model, one):
    """Compare the result under `pmap`, with one row on each device."""
    layout = layout_lib.Layout(make_mesh(MeshSizes(data=8)), axis="devices")
    (x, valid), params = inputs(), split(model)[1]

    def on_device(params, x, valid):
        (total, (y, sums)), (of_params, of_x) = gradient(model, layout)(params, x[None], valid[None])
        return (jax.lax.psum(total, "devices"), (y[0], sums)), (jax.lax.psum(of_params, "devices"), of_x[0])

    out = ((None, (0, None)), (None, 0))
    result = jax.pmap(on_device, axis_name="devices", in_axes=(None, 0, 0), out_axes=out)(params, x, valid)
    return {"difference": difference(one, result)}


def in_a_pipeline():
    """Compare two stages sharded over `pipeline`, in a rematerialised loop, with the same on one device."""
    layout = make_layout({"pipeline": 2, "expert": 2, "fsdp": 2})
    graph, _, stats = split(make())
    params = jax.tree.map(lambda p: jnp.stack([p, 0.7 * p]), split(make())[1])
    x = jax.random.normal(jax.random.key(2), (2, B, T, D))

    def total(params, x, layout):
        def body(x, _):
            with layout_lib.use(layout):
                y, sums = jax.vmap(lambda p, x: merge(graph, p, stats)(x), spmd_axis_name="pipeline" if layout else None)(params, x)
            return x + 0.1 * y, sums

        x, sums = jax.lax.scan(jax.checkpoint(body), x, None, length=2)
        return jnp.sum(x**2), sums

    def run(layout):
        return jax.jit(jax.value_and_grad(functools.partial(total, layout=layout), (0, 1), has_aux=True))(params, x)

    return {"difference": difference(run(None), run(layout))}


def experts_that_do_not_divide():
    config = small_configs.config(small_configs.GPT, model__moe={"experts": 6}, mesh={"expert": 4, "data": 2})
    experiment = build_experiment(config)
    try:
        sharding.place_state(experiment.state_shapes(), experiment.sharding, sharding.make_layout(make_mesh(experiment.mesh), experiment.sharding))
    except ConfigError as error:
        return str(error)


def main(activations):
    grouped.BLOCK = 4  # so that an expert has several blocks
    results = {}
    for dispatch in ("dropless", "capacity"):
        for activation in activations:
            model = make(dispatch=dispatch, activation=activation)
            one = jax.jit(gradient(model))(split(model)[1], *inputs())
            for name, sizes in MESHES.items():
                results[f"{dispatch} {activation} {name}"] = spread(model, one, sizes)
        results[f"{dispatch} pmap"] = mapped(model, one)
    results["pipeline"] = in_a_pipeline()
    results["error"] = experts_that_do_not_divide()
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
