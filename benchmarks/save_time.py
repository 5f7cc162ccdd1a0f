"""Measure the time that checksums add to saving and restoring a state: GPT-2 small, 124M parameters, with AdamW.

    python benchmarks/save_time.py --folder=/tmp/states --repeats=5

With and without checksums in turn. A save is timed from the call to its return (training waits), and to the end (on disk).
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxmodels.models.functional import split
from jaxmodels.models.transformer import Decoder
from jaxmodels.runs.checkpoint import Checkpoints, Progress
from jaxmodels.step.state import TrainState


def random_state(layers: int) -> TrainState:
    """Return a state of random values, which do not compress."""
    shapes = split(nnx.eval_shape(lambda: Decoder(50257, layers=layers, heads=12, width=768, context=1024, rngs=nnx.Rngs(0))))[1]
    keys = iter(jax.random.split(jax.random.key(0), 10_000))
    random = jax.jit(lambda key, shape: jax.random.normal(key, shape), static_argnums=1)
    params = jax.tree.map(lambda x: random(next(keys), tuple(x.shape)), shapes)
    opt_state = jax.tree.map(
        lambda x: random(next(keys), tuple(x.shape)) if x.ndim else jnp.zeros(x.shape, x.dtype), jax.eval_shape(optax.adamw(1e-3).init, params)
    )
    return TrainState(jnp.int32(0), params, {}, {}, opt_state, {}, {}, jnp.int32(0))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    options = parser.parse_args()
    state = jax.block_until_ready(random_state(options.layers))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    sizes = [x.nbytes for x in jax.tree.leaves(state)]
    print(f"{sum(x.size for x in jax.tree.leaves(state.params)) / 1e6:.0f}M parameters, {len(sizes)} arrays, {sum(sizes) / 1e9:.2f} GB, {jax.devices()[0]}")
    times = {(checksums, what): [] for checksums in (True, False) for what in ("call", "save", "restore")}
    for repeat in range(options.repeats + 1):
        for checksums in (True, False) if repeat % 2 else (False, True):
            folder = Path(options.folder) / f"save_time_{checksums}"
            checkpoints = Checkpoints(folder, checksums=checksums)
            begin = time.perf_counter()
            checkpoints.save(state, Progress())
            called = time.perf_counter()
            checkpoints.wait()
            saved = time.perf_counter()
            restored = jax.block_until_ready(checkpoints.restore(0, shapes)[0])
            end = time.perf_counter()
            del restored
            checkpoints.close()
            shutil.rmtree(folder)
            if repeat:  # the first compiles
                for what, seconds in (("call", called - begin), ("save", saved - begin), ("restore", end - saved)):
                    times[checksums, what].append(seconds)
    for what in ("call", "save", "restore"):
        one, other = (np.median(times[checksums, what]) for checksums in (True, False))
        spread = ", ".join(f"{x:.2f}" for x in sorted(times[True, what])), ", ".join(f"{x:.2f}" for x in sorted(times[False, what]))
        print(f"{what:8} with {one:.3f} s, without {other:.3f} s: {one / other - 1:+.1%}   ({spread[0]} | {spread[1]})")


if __name__ == "__main__":
    main()
