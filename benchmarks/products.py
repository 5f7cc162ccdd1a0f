"""What the forms for CPUs gain over XLA's own, as a Markdown table: `python benchmarks/products.py`.

Each row is one part of a model, forward and backward, compiled with and without what `jaxmodels/models/products.py`, `heads_first.py`,
`recurrence.py`, `normalization.py` and `layers.py` do when a function is traced for a CPU. A row whose ratio is no longer below 1 says that this version of XLA does not need that form.
The machine must be idle; the two sides run in turn, and the figures are medians.
"""

import argparse
import contextlib
import importlib.metadata
import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmodels.hardware.malloc import tune_malloc
from jaxmodels.models.attention import attend
from jaxmodels.models.functional import merge, split
from jaxmodels.models.layers import gelu_exact, relu_max_pool_2x2
from jaxmodels.models.normalization import LayerNorm
from jaxmodels.models.products import product
from jaxmodels.models.rnn import GRU, LSTM
from jaxmodels.parallel import layout as layout_lib
from jaxmodels.parallel import mesh as mesh_lib
from jaxmodels.parallel import sharding as sharding_lib


def arrays(*shapes):
    """Return random arrays, float32."""
    draw = np.random.default_rng(0).normal
    return tuple(jnp.asarray(draw(size=shape), jnp.float32) for shape in shapes)


def linear(rows, width_in, width_out):
    """Return a linear layer as a function, and its arguments."""
    return product, arrays((*rows, width_in), (width_in, width_out))


def attention(batch, length, heads, width, causal):
    """Return attention as a function, and its arguments."""
    return lambda q, k, v: attend(q, k, v, causal=causal), arrays(*[(batch, length, heads, width)] * 3)


def normalization(batch, length, width):
    """Return layer normalization before a linear layer as a function, and its arguments."""
    graph, params, stats = split(LayerNorm(width, rngs=nnx.Rngs(0)))
    return lambda params, x, kernel: x + product(merge(graph, params, stats)(x), kernel), (params, *arrays((batch, length, width), (width, width)))


def recurrent(layer, batch, length, width):
    """Return a recurrent layer as a function, and its arguments."""
    graph, params, stats = split(layer(width, width, rngs=nnx.Rngs(0)))
    return lambda params, x: merge(graph, params, stats)(x)[0], (params, *arrays((batch, length, width)))


PARTS = {
    "linear 384 → 1,536, 8 × 256 rows": lambda: linear((8, 256), 384, 1536),
    "linear 1,536 → 384, 8 × 256 rows": lambda: linear((8, 256), 1536, 384),
    "linear 768 → 768, 16 × 128 rows": lambda: linear((16, 128), 768, 768),
    "attention, causal, 8 × 256 × 6 × 64": lambda: attention(8, 256, 6, 64, True),
    "attention, 16 × 128 × 12 × 64": lambda: attention(16, 128, 12, 64, False),
    "attention, causal, 2 × 1,024 × 12 × 64": lambda: attention(2, 1024, 12, 64, True),
    "LSTM of 256, 32 × 64": lambda: recurrent(LSTM, 32, 64, 256),
    "GRU of 256, 32 × 64": lambda: recurrent(GRU, 32, 64, 256),
    "ReLU and max-pool, 256 × 28 × 28 × 32": lambda: (relu_max_pool_2x2, arrays((256, 28, 28, 32))),
    "LayerNorm and linear 384 → 384, 8 × 256": lambda: normalization(8, 256, 384),
    "LayerNorm and linear 192 → 192, 32 × 17": lambda: normalization(32, 17, 192),
    "exact GELU, 2,048 × 3,072": lambda: (gelu_exact, arrays((2048, 3072))),
}


def compiled(function, args, layout):
    """Return the compiled value and gradient of a weighted sum of a function's result, traced for the layout."""

    def loss(*args):
        y = function(*args)
        return (y * jnp.cos(jnp.arange(y.size, dtype=y.dtype).reshape(y.shape))).sum()

    def both(*args):
        with contextlib.nullcontext() if layout is None else layout_lib.use(layout):
            return jax.value_and_grad(loss, tuple(range(len(args))))(*args)

    return jax.jit(both).lower(*args).compile()


def seconds(function, args, calls):
    """Return the mean seconds of a call."""
    started = time.perf_counter()
    for _ in range(calls):
        result = function(*args)
    jax.block_until_ready(result)
    return (time.perf_counter() - started) / calls


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="length of a round")
    options = parser.parse_args()
    tune_malloc()
    jax.config.update("jax_platforms", "cpu")
    mesh = mesh_lib.make_mesh(mesh_lib.MeshSizes(), jax.devices()[:1])
    layout = sharding_lib.make_layout(mesh, sharding_lib.Sharding())
    print(f"jaxlib {importlib.metadata.version('jaxlib')}, {len(os.sched_getaffinity(0))} processors\n")
    print("| forward and backward | XLA's own, ms | for CPUs, ms | ratio |\n|---|---|---|---|")
    for name, make in PARTS.items():
        function, args = make()
        sides = [compiled(function, args, chosen) for chosen in (None, layout)]
        plain, ours = (jax.tree.leaves(side(*args)) for side in sides)
        for one, other in zip(plain, ours, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3 * float(jnp.abs(one).max()))
        calls = max(1, int(options.seconds / max(seconds(side, args, 1) for side in sides)))
        rounds = [[seconds(side, args, calls) for side in sides] for _ in range(options.rounds)]
        before, after = (1e3 * statistics.median(times) for times in zip(*rounds, strict=True))
        print(f"| {name} | {before:.2f} | {after:.2f} | {statistics.median(b / a for a, b in rounds):.2f} |", flush=True)


if __name__ == "__main__":
    main()
