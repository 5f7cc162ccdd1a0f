"""Measure the framework's overhead per step: `jaxmodels train` against a plain Flax and Optax loop with the same model.

    python benchmarks/overhead.py gpt_shakespeare --data_dir=DIR
    python benchmarks/overhead.py cnn_digits
    python benchmarks/overhead.py cnn_digits --against=OLDER_CHECKOUT    # also alternate with the same run by another checkout

The two alternate, each in a new process, for ROUNDS rounds. A run's figure is the median over its windows of LOG steps, without the first; a ratio is the
median over the rounds. The plain loop is the shortest one with the same training: one jitted step with donated arguments on plain arrays, batches sliced
from arrays in memory with NumPy, and the loss read once a window. It runs with the default allocator, and again with the allocator setting of `jaxmodels`
(`jaxmodels/hardware/malloc.py`), which alone changes the step time.
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

ROOT = Path(__file__).parent.parent
CASES = {
    # config: (steps of one run, steps in a window)
    "gpt_shakespeare": (250, 50),
    "cnn_digits": (2000, 200),
}


def framework(name: str, data_dir: str | None, checkout: Path = ROOT) -> list[float]:
    """Run `jaxmodels train` from a checkout; return the seconds a step in each window."""
    steps, window = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "jaxmodels", "train", f"--config=configs/{name}.py", f"--workdir={folder}/run"]
        command += [f"--config.training={{'steps': {steps}}}", f"--config.log.every={window}", "--config.evaluation.every=None"]
        command += [f"--config.checkpoint.every={10 * steps}", "--config.checkpoint.best=None"]
        command += [f"--data_dir={data_dir}"] if data_dir else []
        environment = os.environ | {"PYTHONPATH": str(checkout)}
        subprocess.run(command, cwd=checkout, env=environment, check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in open(f"{folder}/run/metrics.jsonl")]
    return [1 / line["steps_per_second"] for line in lines if line["split"] == "train"][1:]


def plain(name: str, data_dir: str | None, allocator: bool) -> list[float]:
    """Run the plain loop in a new process; return the seconds a step in each window."""
    command = [sys.executable, __file__, name, "--plain"] + (["--allocator"] if allocator else [])
    command += [f"--data_dir={data_dir}"] if data_dir else []
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def plain_gpt(data_dir: str):
    """Return model, loss, optimizer and batches of configs/gpt_shakespeare.py, without the framework."""
    import jax
    import numpy as np
    import optax
    from flax import nnx

    from jaxmodels.models import create

    text = open(os.path.join(data_dir, "tinyshakespeare", "input.txt")).read()
    codes = {c: i for i, c in enumerate(sorted(set(text)))}
    tokens = np.array([codes[c] for c in text[: int(len(text) * 0.9)]], np.int32)
    model = create("gpt", len(codes), layers=4, heads=4, width=128, context=64, rngs=nnx.Rngs(0))
    rate = optax.warmup_cosine_decay_schedule(0, 4e-3, 100, 2000, 4e-4)

    def mask(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("bias", "scale"), params)

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=0.1, mask=mask))

    def loss(model, batch, rngs):
        logits = model(batch[:, :-1], rngs=rngs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    def batches(generator):
        while True:
            starts = generator.integers(0, len(tokens) - 65, 12)
            yield tokens[starts[:, None] + np.arange(65)]

    return model, loss, optimizer, batches


def plain_cnn(_):
    """Return model, loss, optimizer and batches of configs/cnn_digits.py, without the framework."""
    import numpy as np
    import optax
    from flax import nnx
    from sklearn.datasets import load_digits

    from jaxmodels.models import create

    images, labels = load_digits(return_X_y=True)
    images, labels = (images[:1259].reshape(-1, 8, 8, 1) / 16).astype(np.float32), labels[:1259].astype(np.int32)
    model = create("cnn", (8, 8, 1), 10, dropout=0.3, rngs=nnx.Rngs(0))
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, 2000))

    def loss(model, batch, rngs):
        image, label = batch
        return optax.softmax_cross_entropy_with_integer_labels(model(image, rngs=rngs), label).mean()

    def batches(generator):
        while True:
            order = generator.permutation(len(images))
            for i in range(0, len(order) - 63, 64):
                rows = order[i : i + 64]
                yield images[rows], labels[rows]

    return model, loss, optimizer, batches


def run_plain(name: str, data_dir: str | None, allocator: bool) -> list[float]:
    """Run the plain loop in this process; return the seconds a step in each window."""
    import jax
    import numpy as np
    import optax
    from flax import nnx

    if allocator:
        from jaxmodels.hardware.malloc import tune_malloc

        tune_malloc()
    model, loss, optimizer, batches = {"gpt_shakespeare": plain_gpt, "cnn_digits": plain_cnn}[name](data_dir)
    graph, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    opt_state = optimizer.init(params)

    def step(params, opt_state, batch, key):
        value, grads = jax.value_and_grad(lambda p: loss(nnx.merge(graph, p), batch, nnx.Rngs(dropout=key)))(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    step = jax.jit(step, donate_argnums=(0, 1))
    stream = batches(np.random.default_rng(0))
    steps, window = CASES[name]
    keys = jax.random.split(jax.random.key(0), steps)
    keys = [keys[i] for i in range(steps)]
    times, started = [], time.perf_counter()
    for i in range(steps):
        params, opt_state, value = step(params, opt_state, next(stream), keys[i])
        if (i + 1) % window == 0:
            float(value)
            times.append((time.perf_counter() - started) / window)
            started = time.perf_counter()
    return times[1:]


def main():
    """Run all kinds alternately and print their figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=CASES)
    parser.add_argument("--data_dir", default=os.environ.get("JAXMODELS_DATA_DIR"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="also measure the same run by another checkout")
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--allocator", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain:
        print(json.dumps(run_plain(options.name, options.data_dir, options.allocator)))
        return
    others = {
        "plain loop": lambda: plain(options.name, options.data_dir, False),
        "plain loop, same allocator": lambda: plain(options.name, options.data_dir, True),
    }
    if options.against is not None:
        others["other checkout"] = lambda: framework(options.name, options.data_dir, options.against.absolute())
    results = {kind: [] for kind in ("jaxmodels", *others)}
    for _ in range(options.rounds):
        results["jaxmodels"].append(statistics.median(framework(options.name, options.data_dir)))
        for kind, measure in others.items():
            results[kind].append(statistics.median(measure()))
    print(f"{options.name}: milliseconds a step, {options.rounds} rounds")
    for kind, times in results.items():
        print(f"  {kind:<27} median {1e3 * statistics.median(times):8.3f}  min {1e3 * min(times):8.3f}  max {1e3 * max(times):8.3f}")
    for kind in others:
        ratios = [a / b for a, b in zip(results["jaxmodels"], results[kind], strict=True)]
        print(f"  jaxmodels / {kind}: median {statistics.median(ratios):.3f}  min {min(ratios):.3f}  max {max(ratios):.3f}")


if __name__ == "__main__":
    main()
