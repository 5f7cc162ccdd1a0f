"""Measure saving and restoring a state: GPT-2 small, 124M parameters, with AdamW.

    python benchmarks/save_time.py --folder=/tmp/states --repeats=5                 # what checksums add
    python benchmarks/save_time.py --folder=/tmp/states --repeats=5 --safetensors   # against safetensors
    python benchmarks/save_time.py --folder=/tmp/states --steps=20                  # steps while every tenth is saved

A save is timed from the call to its return (training waits), and to the end (on disk). With and without checksums, and the saves with and without
safetensors, alternate. Beside safetensors, each measurement is a new process with the allocator and the compilation cache of a run; it restores what
the page cache holds, and the peak is that of the resident memory over what it was before, as a multiple of the state. Steps are those of a Transformer
of 114M parameters, 512 tokens a step.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxmodels.hardware.malloc import tune_malloc
from jaxmodels.models.functional import split
from jaxmodels.models.transformer import Decoder
from jaxmodels.runs import checksums
from jaxmodels.runs.checkpoint import Checkpoints, Progress
from jaxmodels.step.state import TrainState
from jaxmodels.training.compile import use_persistent_cache


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


def add_of_checksums(options) -> None:
    """Print the times with and without checksums, in turn."""
    state = jax.block_until_ready(random_state(options.layers))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    print(describe(state))
    times = {(on, what): [] for on in (True, False) for what in ("call", "save", "restore")}
    for repeat in range(options.repeats + 1):
        for on in (True, False) if repeat % 2 else (False, True):
            folder = Path(options.folder) / f"save_time_{on}"
            checkpoints = Checkpoints(folder, checksums=on)
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
                    times[on, what].append(seconds)
    for what in ("call", "save", "restore"):
        with_them, without = (np.median(times[on, what]) for on in (True, False))
        spread = ", ".join(f"{x:.2f}" for x in sorted(times[True, what])), ", ".join(f"{x:.2f}" for x in sorted(times[False, what]))
        print(f"{what:8} with {with_them:.3f} s, without {without:.3f} s: {with_them / without - 1:+.1%}   ({spread[0]} | {spread[1]})")


def describe(state: TrainState) -> str:
    sizes = [x.nbytes for x in jax.tree.leaves(state)]
    return f"{sum(x.size for x in jax.tree.leaves(state.params)) / 1e6:.0f}M parameters, {len(sizes)} arrays, {sum(sizes) / 1e9:.2f} GB, {jax.devices()[0]}"


def against_safetensors(options) -> None:
    """Print times and memory of saves and restores by this package and by safetensors, each in a new process, in turn."""
    found: dict[tuple[str, str], list[dict]] = {}
    for repeat in range(options.repeats + 1):
        for what in ("save", "restore"):
            for who in ("jaxmodels", "safetensors") if repeat % 2 else ("safetensors", "jaxmodels"):
                command = [sys.executable, __file__, f"--folder={options.folder}", f"--layers={options.layers}", "--one", who, what]
                found.setdefault((what, who), []).append(
                    json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
                )
    for (what, who), lines in found.items():
        print(f"{what:8} {who:12} " + "  ".join(f"{name} {shown([line[name] for line in lines[1:]])}" for name in lines[0]))  # the first one compiles
    for what in ("save", "restore"):
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(found[what, "jaxmodels"][1:], found[what, "safetensors"][1:], strict=True)]
        print(f"{what:8} jaxmodels / safetensors: {shown(ratios)}")


def shown(values: list[float]) -> str:
    return f"{np.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def one(options) -> None:
    """Save or restore once, and print the measurements as JSON."""
    import safetensors.flax

    who, what = options.one
    tune_malloc()
    use_persistent_cache()
    state, folder = None, Path(options.folder) / f"save_time_{who}"
    if what == "save":
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        state = jax.block_until_ready(random_state(options.layers))
        gigabytes = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e9
    else:
        shapes = jax.eval_shape(lambda: random_state(options.layers))
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
        gigabytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes)) / 1e9
    checkpoints = Checkpoints(folder) if who == "jaxmodels" else None
    os.sync()  # what was written before is not written during the measurement
    before, begin = memory("VmRSS"), (time.perf_counter(), time.process_time())
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    line = {}
    if what == "save" and checkpoints:
        checkpoints.save(state, Progress())
        line["waits"] = time.perf_counter() - begin[0]
        checkpoints.wait()
    elif what == "save":
        safetensors.flax.save_file(checksums.flatten(state), folder / "state.safetensors")
    elif checkpoints:
        state = jax.block_until_ready(checkpoints.restore(0, shapes)[0])
    else:
        state = jax.block_until_ready(safetensors.flax.load_file(folder / "state.safetensors"))
    line |= {"seconds": time.perf_counter() - begin[0], "processor": time.process_time() - begin[1]}
    line["peak"] = (memory("VmHWM") - before) / gigabytes
    print(json.dumps(line | {"disk_gb": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e9}))
    if checkpoints:
        checkpoints.close()


def memory(name: str) -> float:
    """Return a figure of this process's memory in GB; Linux only."""
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024 / 1e9


def while_saving(options) -> None:
    """Print the seconds a step takes with and without a save at every tenth, in turn."""
    import jaxmodels

    class Times(jaxmodels.Callback):
        def __init__(self):
            self.at = []

        def on_step(self, run, step, metrics):
            self.at.append(time.perf_counter())

    model = {"name": "gpt", "layers": 16, "heads": 12, "width": 768, "context": 64}
    data = {"source": "text:letters.txt", "sequence_length": 64, "stride": 1, "batch_size": 8}
    config = {"model": model, "task": {"name": "language_model"}, "data": data, "optimizer": {"name": "adamw", "learning_rate": 1e-4}}
    config |= {"training": {"steps": options.steps + 10}, "evaluation": {"every": None}, "log": {"every": 10}}
    # A short text: the validation at the end takes its last tenth.
    Path(options.folder, "letters.txt").write_bytes(np.random.default_rng(0).integers(97, 123, 30_000, np.uint8).tobytes())
    found = {10: [], 1_000_000: []}
    for _ in range(options.repeats):
        for every in found:
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                times = Times()
                jaxmodels.train(config | {"checkpoint": {"every": every}}, f"{folder}/run", callbacks=[times], quiet=True, data_dir=options.folder)
            # From one step after a save to another: as many saves as tens of steps.
            found[every].append((times.at[-1] - times.at[9]) / (len(times.at) - 10))
    for every, seconds in found.items():
        print(f"{'every tenth is saved' if every == 10 else 'none is saved':22} {shown(seconds)} s a step")
    print(f"ratio {shown([a / b for a, b in zip(*found.values(), strict=True)])}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--safetensors", action="store_true")
    parser.add_argument("--steps", type=int, help="a multiple of 10")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    mode = one if options.one else against_safetensors if options.safetensors else while_saving if options.steps else add_of_checksums
    mode(options)


if __name__ == "__main__":
    main()
