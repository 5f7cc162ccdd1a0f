"""Attention spread over eight simulated devices, against the same on one: run by test_ring.py in a process of its own.

Prints a JSON object: for every case the largest difference of the result and of the gradients from those of one device.
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.models import fused, ring
from jaxmodels.models.attention import attend
from jaxmodels.parallel import layout as layout_lib
from jaxmodels.parallel.mesh import MeshSizes, make_mesh
from jaxmodels.parallel.sharding import Sharding, make_layout

RING = {
    # mesh, heads of queries and of keys, options; parts of 16 in blocks of 6, of which the last is filled up
    "causal": ({"context": 8}, (2, 2), {"causal": True}),
    "bidirectional": ({"context": 8}, (2, 1), {}),
    "causal window": ({"context": 8}, (2, 2), {"causal": True, "window": 20}),
    "causal window segments": ({"context": 8}, (2, 1), {"causal": True, "window": 40, "segments": True}),
    "window": ({"context": 4, "data": 2}, (4, 2), {"window": 40, "scale": 1.0}),
    "segments": ({"context": 4, "data": 2}, (2, 2), {"segments": True}),
    "causal heads": ({"context": 2, "tensor": 2, "data": 2}, (4, 2), {"causal": True}),
    "causal one key head": ({"context": 2, "tensor": 2, "data": 2}, (4, 1), {"causal": True, "segments": True}),
}
SPLASH = {
    "splash rows": ({"data": 2, "fsdp": 2, "tensor": 2}, (4, 1), {"causal": True}),
    "splash parts": ({"context": 4, "data": 2}, (2, 1), {"causal": True, "window": 150, "segments": True}),
}


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
    one = value_and_gradients(lambda *x, **y: attend(*x, **y, **options, implementation="xla"), None)(*arguments)
    return [float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in zip(one, spread, strict=True)]


def compiled_ring(T: int, mesh: dict):
    """The compiled gradient of causal attention by a ring, of sequences of T."""
    layout = layout_of(mesh, "ring")
    shapes = [jax.ShapeDtypeStruct((1, T, n, 8), jnp.float32, sharding=layout.sharding("batch", "sequence", "heads", None)) for n in (2, 1, 1, 2)]
    return value_and_gradients(lambda *x, **y: attend(*x, **y, causal=True), layout).lower(*shapes, None).compile()


def collectives(compiled) -> dict[str, int]:
    names = re.findall(r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", compiled.as_text())
    return {name: names.count(name) for name in set(names)}


def interpreted(q, k, v, *, causal=False, window=None, segments=None, scale=None):
    """The TPU's kernel, as the CPU's interpreter runs it."""
    from jaxmodels.models.attention import _for_devices

    ways = layout_lib.current().size("heads")
    k, v = (_for_devices(x, q.shape[2], ways) for x in (k, v))
    return fused.splash(q, k, v, causal=causal, window=window, segments=segments, bias=None, scale=scale, interpret=True)


def main() -> dict:
    ring.BLOCK = 6
    found = {"ring": {name: compare(case, "ring", 128, attend) for name, case in RING.items()}}
    found["splash"] = {name: compare(case, "gather", 512, interpreted) for name, case in SPLASH.items()}
    ring.BLOCK = 64
    programs = [compiled_ring(T, {"context": 8}) for T in (4096, 8192)]
    found["collectives"] = collectives(programs[0])
    found["temporaries"] = [program.memory_analysis().temp_size_in_bytes for program in programs]
    return found


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    print(json.dumps(main()))
