"""Compare predicted and measured peak memory and step time on this machine's GPU: GPT-2 and ResNet-50, bfloat16, random data.

    python benchmarks/plan_gpu.py
    python benchmarks/plan_gpu.py --steps=50 --models=gpt2

Needs JAX with CUDA (`pip install 'jaxmodels[cuda]'`) and a GPU of `jaxmodels/hardware/chips.py`. `jaxmodels plan` predicts for one such GPU in a process
that sees no device. Then another process runs the same config's step repeatedly on one batch; the figures are the median of STEPS steps after three
uncounted ones, and JAX's peak bytes in use. The targets are 5% of memory and 15% of time. The exit status is 1 if a target is missed.

It has not been run yet: no GPU was available.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TARGETS = {"peak_bytes_per_device": 0.05, "step_seconds": 0.15}
CONFIGS = {
    "gpt2": {
        "model": {"name": "gpt2"},
        "task": {"name": "language_model"},
        "data": {"source": "synthetic", "vocab_size": 50257, "sequence_length": 1024, "examples": 10_000, "batch_size": 16},
        "optimizer": {"name": "adamw", "learning_rate": 6e-4, "weight_decay": 0.1, "clip_norm": 1.0},
        "training": {"steps": 1000, "precision": "bfloat16"},
    },
    "resnet50": {
        "model": {"name": "resnet50"},
        "task": {"name": "classify", "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "flip": True, "label_smoothing": 0.1},
        "data": {"source": "synthetic", "kind": "images", "image_shape": (224, 224, 3), "num_classes": 1000, "examples": 10_000, "batch_size": 128},
        "optimizer": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4},
        "training": {"steps": 1000, "precision": "bfloat16"},
    },
}


def predict(config: dict, topology: str) -> dict:
    """Return the JSON of `jaxmodels plan` for a config."""
    with tempfile.TemporaryDirectory() as folder:
        file, answer = Path(folder) / "config.py", Path(folder) / "plan.json"
        file.write_text(f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({config!r})\n")
        command = [sys.executable, "-m", "jaxmodels", "plan", f"--config={file}", f"--topology={topology}", f"--json={answer}"]
        subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=True, stdout=subprocess.DEVNULL)
        return json.loads(answer.read_text())


def measure(config: dict, steps: int) -> dict:
    """Run the step on the first device of this process; return the same figures. Memory is None if the device does not report it."""
    import jax
    import numpy as np

    from jaxmodels.data.source import get_batch
    from jaxmodels.experiment.build import build_experiment
    from jaxmodels.parallel import mesh as mesh_lib
    from jaxmodels.parallel import sharding as sharding_lib
    from jaxmodels.training.compile import compile_train_step
    from jaxmodels.training.throughput import peak_memory

    experiment = build_experiment(config)
    mesh = mesh_lib.make_mesh(experiment.mesh, jax.devices()[:1])
    layout = sharding_lib.make_layout(mesh, experiment.sharding)
    experiment = experiment.on(jax.devices()[0].platform, layout)
    shapes = sharding_lib.place_state(experiment.state_shapes(), experiment.sharding, layout)
    key = jax.device_put(jax.random.key(0), mesh_lib.replicated(mesh))
    compiled, _ = compile_train_step(experiment, mesh, shapes, shapes, key)
    state = jax.jit(experiment.init_function(), out_shardings=jax.tree.map(lambda x: x.sharding, shapes))(key)
    size = experiment.loading.batch_size
    rows = get_batch(experiment.dataset.splits["train"], np.arange(size)) | {"weight": np.ones(size)}
    wanted = experiment.batch_shapes(size)
    batch = jax.device_put({name: jax.numpy.asarray(rows[name], shape.dtype) for name, shape in wanted.items()}, mesh_lib.batch_sharding(mesh))
    times = []
    for _ in range(steps + 3):
        started = time.perf_counter()
        state, metrics = compiled(state, batch, key)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - started)
    return {"peak_bytes_per_device": peak_memory(mesh), "step_seconds": statistics.median(times[3:])}


def compare(name: str, predicted: dict, measured: dict) -> bool:
    """Print a line for each figure. Return whether all are within their targets."""
    within = True
    for figure, target in TARGETS.items():
        off = predicted[figure] / measured[figure] - 1
        within &= abs(off) <= target
        scale, unit = (1e9, "GB") if figure == "peak_bytes_per_device" else (1e-3, "ms")
        verdict = "within" if abs(off) <= target else "MISSED:"
        print(
            f"{name:<10} {figure:<22} predicted {predicted[figure] / scale:8.2f} {unit}  measured {measured[figure] / scale:8.2f} {unit}  {off:+7.1%}  {verdict} {target:.0%}"
        )
    return within


def main() -> int:
    """Run all models, each in new processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--models", default=",".join(CONFIGS))
    parser.add_argument("--measure", choices=list(CONFIGS), help="only run this model's step, and print its figures as JSON")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(CONFIGS[options.measure], options.steps)))
        return 0
    kind = subprocess.run(
        [sys.executable, "-c", "import jax; print(jax.devices()[0].device_kind)"], check=True, capture_output=True, text=True
    ).stdout.splitlines()[-1]
    from jaxmodels.hardware.chips import chip_of

    chip = chip_of(kind)
    if chip is None or chip.platform != "gpu":
        parser.error(f"the first device is {kind!r}; it must be a GPU of jaxmodels/hardware/chips.py")
    good = True
    for name in options.models.split(","):
        predicted = predict(CONFIGS[name], f"{chip.name}x1")
        command = [sys.executable, __file__, f"--measure={name}", f"--steps={options.steps}"]
        measured = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
        print(f"{name}: {chip.name}, memory by the {predicted['method']}, time by the {predicted['step_seconds_method']}, versions {predicted['versions']}")
        good &= compare(name, predicted, measured)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
