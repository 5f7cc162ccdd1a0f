"""Compare attention and cuDNN's LSTM on eight simulated devices with one device, in a separate process.

Prints a JSON object: for every case, the largest differences of results and gradients from those of one device. With the argument `more`, of rarer cases.
"""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import rnn as jax_rnn

from jaxmodels.models import cudnn, fused, ring
from jaxmodels.models.attention import _for_devices, attend
from jaxmodels.models.rnn import Recurrent
from jaxmodels.parallel import layout as layout_lib
from jaxmodels.parallel.mesh import MeshSizes, make_mesh, simulate_devices
from jaxmodels.parallel.sharding import Sharding, make_layout
from jaxmodels.plan import hlo

# mesh, (query heads, key heads), options. Shards of 16 tokens have blocks of 6, the last one with padding.
RING = {
    "causal window segments": ({"context": 8}, (2, 1), {"causal": True, "window": 40, "segments": True}),
    "window segments": ({"context": 4, "data": 2}, (4, 2), {"window": 40, "segments": True, "scale": 1.0}),
    "causal one key head": ({"context": 2, "tensor": 2, "data": 2}, (4, 1), {"causal": True, "segments": True}),
}
MORE_RINGS = {
    "causal": ({"context": 8}, (2, 2), {"causal": True}),
    "bidirectional": ({"context": 8}, (2, 1), {}),
    "causal heads": ({"context": 2, "tensor": 2, "data": 2}, (4, 2), {"causal": True}),
}
HEADS = {
    "fewer key heads": ({"context": 4, "data": 2}, (8, 2), {"causal": True, "window": 40, "segments": True}),
    "splash": ({"context": 2, "tensor": 2, "data": 2}, (4, 2), {"causal": True, "segments": True, "cap": 2.0, "implementation": "splash"}),
}
MORE_HEADS = {
    "causal": ({"context": 8}, (8, 8), {"causal": True}),
    "heads in parts too": ({"context": 2, "tensor": 2, "data": 2}, (4, 1), {"segments": True, "scale": 1.0}),
}
SPLASH = {"splash parts": ({"context": 2, "data": 4}, (2, 1), {"causal": True, "window": 150, "segments": True})}
MORE_SPLASH = {"splash rows": ({"data": 2, "fsdp": 2, "tensor": 2}, (4, 1), {"causal": True})}


def layout_of(mesh: dict, context: str) -> layout_lib.Layout:
    sizes = MeshSizes(**{"data": 1, **mesh})
    return make_layout(make_mesh(sizes), Sharding(context=context))


def inputs(T: int, heads: tuple[int, int], segments: bool, B: int = 4, K: int = 8):
    draw = np.random.default_rng(0)
    q, k, v, weight = (jnp.asarray(draw.normal(size=(B, T, n, K)), jnp.float32) for n in (heads[0], heads[1], heads[1], heads[0]))
    numbers = jnp.asarray(np.sort(draw.integers(0, 4, (B, T)), axis=1)) if segments else None
    return q, k, v, weight, numbers


def value_and_gradients(function, layout):
    def run(q, k, v, weight, numbers):
        def loss(q, k, v):
            y = function(q, k, v, segments=None if numbers is None else (numbers, numbers))
            return (y * weight).sum(), y

        with layout_lib.use(layout):
            (_, y), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
        return y, *gradients

    return jax.jit(run)


def compare(case, context: str, T: int, function) -> list[float]:
    mesh, heads, options = case
    options = dict(options)
    arguments = inputs(T, heads, options.pop("segments", False))
    layout = layout_of(mesh, context)
    names = [("batch", "sequence", "heads", None)] * 4 + [("batch", "sequence")]
    placed = [x if x is None else jax.device_put(x, layout.sharding(*n, shape=x.shape)) for n, x in zip(names, arguments, strict=True)]
    spread = value_and_gradients(lambda *x, **y: function(*x, **y, **options), layout)(*placed)
    one = value_and_gradients(lambda *x, **y: attend(*x, **y, **options | {"implementation": "xla"}), None)(*arguments)
    return differences(one, spread)


def differences(one, spread) -> list[float]:
    """Return the largest difference of each pair of arrays, relative to the array's largest value."""
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(one, spread, strict=True)]
    return [float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs]


def compiled(context: str, T: int, mesh: dict, heads: int = 2, key_heads: int = 1):
    """Return the compiled gradient of causal attention over sharded sequences of T tokens."""
    layout = layout_of(mesh, context)
    heads = (heads, key_heads, key_heads, heads)
    shapes = [jax.ShapeDtypeStruct((1, T, n, 8), jnp.float32, sharding=layout.sharding("batch", "sequence", "heads", None)) for n in heads]
    return value_and_gradients(lambda *x, **y: attend(*x, **y, causal=True), layout).lower(*shapes, None).compile()


def collectives(compiled) -> dict[str, int]:
    """Return how often each collective occurs, without those over groups of one device, which move no data."""
    names = []
    for line in compiled.as_text().splitlines():
        match = re.search(r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", line)
        if match and ("replica_groups" not in line or max(map(len, hlo.groups(line, jax.device_count()))) > 1):
            names.append(match[1])
    return {name: names.count(name) for name in set(names)}


def interpreted(q, k, v, *, causal=False, window=None, segments=None, scale=None):
    """Run the TPU kernel in Pallas' interpreter."""
    ways = layout_lib.current().size("heads")
    k, v = (_for_devices(x, q.shape[2], ways) for x in (k, v))
    return fused.splash(q, k, v, causal=causal, window=window, segments=segments, bias=None, scale=scale, interpret=True)


def lstm() -> list[float]:
    """Return the differences of outputs, last states and gradients of an LSTM layer. JAX's reference replaces the cuDNN call."""

    def reference(x, hidden, cell, weights, lengths, width_in, width, layers, rate, both):
        parts = jax_rnn.unpack_lstm_weights(weights, width_in, width, layers, both)
        return jax_rnn.lstm_ref(x, hidden, cell, *parts, lengths, width_in, width, layers, rate, both)

    def run(kernel, layout):
        def loss(state, x):
            with layout_lib.use(layout):
                layer = nnx.merge(graph, state)
                layer.kernel = kernel
                results = layer(x, valid=jnp.arange(6) < jnp.array([6, 0, 4, 2])[:, None])
            return sum((y**2).sum() for y in jax.tree.leaves(results)), results

        return jax.tree.leaves(jax.jit(jax.value_and_grad(loss, has_aux=True))(state, x))

    cudnn.rnn.lstm = reference
    graph, state = nnx.split(Recurrent(5, 3, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(1), (4, 6, 5))
    return differences(run("xla", None), run("cudnn", layout_of({"data": 4, "tensor": 2}, "gather")))


def attention(rings: dict, splash: dict, heads: dict) -> dict:
    """Return the differences of each case of attention."""
    found = {"ring": {name: compare(case, "ring", 128, attend) for name, case in rings.items()}}
    found["splash"] = {name: compare(case, "gather", 512, interpreted) for name, case in splash.items()}
    kernel = fused.splash
    fused.splash = lambda *x, **y: kernel(*x, **y, interpret=True)
    found["heads"] = {name: compare(case, "heads", 512 if name == "splash" else 128, attend) for name, case in heads.items()}
    return found


def main() -> dict:
    ring.BLOCK, fused.BLOCKS = 6, {128: 128}
    if sys.argv[1:] == ["more"]:
        return attention(MORE_RINGS, MORE_SPLASH, MORE_HEADS)
    found = attention(RING, SPLASH, HEADS)
    found["lstm"] = {"cudnn": lstm()}
    ring.BLOCK = 64
    programs = [compiled("ring", T, {"context": 8}) for T in (4096, 8192)]
    found["collectives"] = {"ring": collectives(programs[0]), "heads": collectives(compiled("heads", 512, {"context": 8}, 8, 8))}
    found["temporaries"] = [program.memory_analysis().temp_size_in_bytes for program in programs]
    return found


if __name__ == "__main__":
    simulate_devices(8)
    print(json.dumps(main()))
