"""Compare train steps of jaxmodels with those of PyTorch on this CPU: the same model, initial weights, batches and optimizer, in float32.

    python benchmarks/peers.py nanogpt lstm
    python benchmarks/peers.py --all
    python benchmarks/peers.py lstm --profile       # and the operations that take most of the time of the jaxmodels step

Each side has a process of its own, on the same `--threads` processors (Linux). The two alternate for `--rounds` rounds after an uncounted warm-up; both
run the same number of steps a round, about `--seconds` long. A side's figure is the median over the rounds (and the range), a ratio the median of the
rounds' ratios. Processor time is that of the process, user and system. The machine must be idle: PyTorch's threads wait actively for each other, so other
work on the processors costs it more, in both times.

Our side is the step of `jaxmodels train`, compiled by the same function, with its norm of the gradient and its check for values that are not finite.
PyTorch's (`peer_models.py`) is a usual loop: eager, plain modules, `nn.LSTM`, `scaled_dot_product_attention`, fused optimizers, and the memory format
`channels_last`, with which a step of the ResNet takes 0.92 times the processor time on one thread, and one of the CNN and the ViT as much as without.
Biases of LSTMs are one vector, not two. There is no dropout, so that the losses of the first two steps can be compared: other losses are an error.
"""

import argparse
import collections
import dataclasses
import importlib.metadata
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

BATCHES = 64  # different ones, which are used in turns
TOLERANCES = (1e-4, 1e-3)  # relative, of the loss of the first step and of the second, which depends on gradients and the optimizer


def images(rows: int, side: int, channels: int) -> list[dict[str, np.ndarray]]:
    """Return batches of random images [rows, side, side, channels] and labels of ten classes.

    Two batches in turn have the same images with other labels. They cannot be learnt by heart, so gradients do not become denormal numbers, which are slow.
    """
    draw = np.random.default_rng(0)
    pictures = [draw.normal(size=(rows, side, side, channels)).astype(np.float32) for _ in range(BATCHES // 2)]
    return [{"image": pictures[i // 2], "label": np.append(draw.integers(0, 10, rows - 1), 9).astype(np.int32)} for i in range(BATCHES)]


def texts(rows: int, length: int) -> list[dict[str, np.ndarray]]:
    """Return batches of random tokens [rows, length + 1] of a vocabulary of 65."""
    draw = np.random.default_rng(0)
    return [{"tokens": _tokens(draw, rows, length + 1, 65)} for _ in range(BATCHES)]


def sentences(rows: int, length: int) -> list[dict[str, np.ndarray]]:
    """Return batches of random tokens [rows, length] of BERT's vocabulary, without padding, and labels of two classes."""
    draw = np.random.default_rng(0)
    return [{"tokens": _tokens(draw, rows, length, 30522), "label": (np.arange(rows) % 2).astype(np.int32)} for _ in range(BATCHES)]


def _tokens(draw, rows: int, length: int, vocab: int) -> np.ndarray:
    tokens = draw.integers(5, vocab, (rows, length), np.int32)
    tokens[0, 0] = vocab - 1  # the vocabulary size follows from the largest token
    return tokens


@dataclasses.dataclass(frozen=True)
class Workload:
    """What both sides train.

    Attributes:
      batches: function that returns the batches.
      task, model, optimizer: sections of the config.
    """

    batches: Callable[[], list[dict[str, np.ndarray]]]
    task: str
    model: dict
    optimizer: dict


_ADAM = {"name": "adam", "learning_rate": 1e-3}
_CLIPPED = _ADAM | {"clip_norm": 1.0}
_ADAMW = _CLIPPED | {"name": "adamw", "b2": 0.99, "weight_decay": 0.1}
_SGD = {"name": "sgd", "learning_rate": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
_CNN = {"name": "cnn", "features": (32, 64), "hidden": 64, "dropout": 0.0}

WORKLOADS = {
    "cnn": Workload(lambda: images(32, 28, 1), "classify", _CNN, _ADAM),
    "cnn_256": Workload(lambda: images(256, 28, 1), "classify", _CNN, _ADAM),
    "lstm": Workload(lambda: texts(32, 64), "language_model", {"name": "lstm", "layers": 2, "width": 256}, _CLIPPED),
    "nanogpt": Workload(lambda: texts(12, 64), "language_model", {"name": "gpt", "layers": 4, "heads": 4, "width": 128, "context": 64}, _ADAMW),
    "gpt": Workload(lambda: texts(8, 256), "language_model", {"name": "gpt", "layers": 6, "heads": 6, "width": 384, "context": 256}, _ADAMW),
    "resnet18": Workload(lambda: images(32, 32, 3), "classify", {"name": "resnet18", "stem": "cifar"}, _SGD),
    "vit_ti": Workload(lambda: images(32, 64, 3), "classify", {"name": "vit_ti16"}, _ADAMW),
    "bert": Workload(
        lambda: sentences(16, 128), "classify_text", {"name": "bert-base", "dropout": 0.0}, {"name": "adamw", "learning_rate": 5e-5, "weight_decay": 0.01}
    ),
}


class JaxSide:
    """The train step of jaxmodels. Writes its initial parameters to a file, for the other side."""

    def __init__(self, name: str, weights: Path, options: argparse.Namespace):
        os.environ["JAX_PLATFORMS"] = "cpu"
        from jaxmodels.hardware.malloc import tune_malloc

        tune_malloc()
        import jax
        from run_step import run_step

        from jaxmodels.experiment.build import build_experiment
        from jaxmodels.models.functional import flatten
        from jaxmodels.parallel import mesh as mesh_lib

        workload = WORKLOADS[name]
        batches = workload.batches()
        rows = len(next(iter(batches[0].values())))
        config = {"task": {"name": workload.task}, "model": workload.model, "optimizer": workload.optimizer}
        config |= {"data": {"source": "arrays", "batch_size": rows}, "training": {"steps": 10**6}, "log": {"every": 1}}
        experiment = build_experiment(config, data={"train": batches[0]})
        self.compiled, state, self.key, mesh = run_step(experiment)
        params = varied(jax.device_get(state.params))
        np.savez(weights, **flatten(params))
        self.state = state.replace(params=jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), params, state.params))
        self.batches = [batch | {"weight": np.ones(rows, np.float32)} for batch in batches]
        self.place = lambda batch: mesh_lib.place(batch, mesh_lib.batch_sharding(mesh), rows)
        self.steps = 0

    def run(self, steps: int) -> float:
        """Run steps; return the loss of the last one."""
        for _ in range(steps):
            self.state, metrics = self.compiled(self.state, self.place(self.batches[self.steps % BATCHES]), self.key)
            self.steps += 1
        total, weight = metrics["loss"]
        return float(total) / float(weight)

    def profile(self, steps: int) -> str:
        """Run steps under JAX's profiler; return the 15 operations that take most time, with milliseconds a step and the origin of each."""
        import jax

        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                self.run(steps)
            (file,) = Path(folder).rglob("*.xplane.pb")
            trace = jax.profiler.ProfileData.from_file(str(file))
        times = collections.Counter()
        for plane in trace.planes:
            for line in plane.lines:
                for event in line.events:
                    operation = dict(event.stats).get("hlo_op")
                    if operation is not None:
                        times[operation] += event.duration_ns
        origins = dict(re.findall(r'%?([\w.-]+) = .*op_name="([^"]+)"', self.compiled.as_text()))
        lines = [f"{time / 1e6 / steps:9.3f} ms  {operation:<32} {origins.get(operation, '')}".rstrip() for operation, time in times.most_common(15)]
        return "\n".join(["The most expensive operations, a step (a loop includes its body):", *lines])


def varied(params):
    """Return parameters of which none are all equal. Those that begin at zero or one would hide differences between the two models."""
    import jax

    draw = np.random.default_rng(0)
    return jax.tree.map(lambda x: x if np.ptp(x) else x + 0.1 * draw.normal(size=x.shape).astype(x.dtype), params)


class TorchSide:
    """The step of a usual PyTorch training loop."""

    def __init__(self, name: str, weights: Path, options: argparse.Namespace):
        if options.same_malloc:
            from jaxmodels.hardware.malloc import tune_malloc

            tune_malloc()
        import peer_models
        import torch

        torch.set_num_threads(options.threads)
        self.model = peer_models.MODELS[name]()
        with np.load(weights) as arrays:
            peer_models.load(self.model, arrays)
        self.model = self.model.train().to(memory_format=torch.channels_last)
        self.batches = [torch_batch(batch) for batch in WORKLOADS[name].batches()]
        self.optimizer, self.clip = torch_optimizer(self.model, **WORKLOADS[name].optimizer)
        self.steps = 0

    def run(self, steps: int) -> float:
        """Run steps; return the loss of the last one."""
        import torch

        for _ in range(steps):
            inputs, targets = self.batches[self.steps % BATCHES]
            self.optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(self.model(inputs).flatten(0, -2), targets.flatten())
            loss.backward()
            if self.clip is not None:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip, foreach=True)
            self.optimizer.step()
            self.steps += 1
        return float(loss.detach())


def torch_batch(batch: dict):
    """Return (inputs, targets) as tensors; images [B, C, H, W] in the memory format `channels_last`."""
    import torch

    if "image" in batch:
        return torch.from_numpy(batch["image"]).permute(0, 3, 1, 2), torch.from_numpy(batch["label"]).long()
    tokens = torch.from_numpy(batch["tokens"]).long()
    return (tokens, torch.from_numpy(batch["label"]).long()) if "label" in batch else (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def torch_optimizer(model, name: str, learning_rate: float, weight_decay: float = 0.0, clip_norm: float | None = None, b2: float = 0.999, **options):
    """Return the fused optimizer that a section `optimizer` describes, and the limit of the gradient's norm. Vectors are not decayed."""
    import torch

    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay}, {"params": [p for p in parameters if p.ndim == 1]}]
    function = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[name]
    options |= {} if name == "sgd" else {"betas": (0.9, b2)}
    return function(groups, lr=learning_rate, weight_decay=0.0, fused=True, **options), clip_norm


SIDES = {"jaxmodels": JaxSide, "PyTorch": TorchSide}


def serve(connection, side: str, name: str, weights: Path, options: argparse.Namespace) -> None:
    """Make a side in this process, on `options.threads` processors. Then answer calls (method, steps) with (result, seconds, processor seconds)."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    made = SIDES[side](name, weights, options)
    connection.send("ready")
    while (call := connection.recv()) is not None:
        method, steps = call
        started, busy = time.perf_counter(), time.process_time()
        result = getattr(made, method)(steps)
        connection.send((result, time.perf_counter() - started, time.process_time() - busy))


class Process:
    """A side in another process."""

    def __init__(self, side: str, name: str, weights: Path, options: argparse.Namespace):
        self.label = f"{name}: {side}"
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, side, name, weights, options), daemon=True)
        self.process.start()
        other.close()
        self._answer()

    def call(self, method: str, steps: int) -> tuple:
        """Return the method's result, its seconds and its processor seconds."""
        time.sleep(0.2)  # until the threads of the other side, which wait actively for a while, sleep
        self.connection.send((method, steps))
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self.connection.send(None)
        self.process.join()

    def _answer(self):
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            sys.exit(f"{self.label}: its process ended with an error; see above")


def compare(name: str, options: argparse.Namespace) -> None:
    """Measure a workload; print its row of the table, and the profile."""
    with tempfile.TemporaryDirectory() as folder:
        sides = {side: Process(side, name, Path(folder) / "weights.npz", options) for side in SIDES}  # ours is first, and writes the weights
    for step, tolerance in enumerate(TOLERANCES, 1):
        ours, theirs = (side.call("run", 1)[0] for side in sides.values())
        if not abs(ours - theirs) <= tolerance * abs(theirs):  # also if one is NaN
            sys.exit(f"{name}: the losses of step {step} differ: {ours:.6f} in jaxmodels, {theirs:.6f} in PyTorch; the two models are not the same")
    steps = steps_of_a_round(list(sides.values()), options.seconds)
    rounds = [{label: side.call("run", steps) for label, side in sides.items()} for _ in range(options.rounds)]
    if not all(np.isfinite(loss) for each in rounds for loss, *_ in each.values()):
        sys.exit(f"{name}: a loss is not finite after {steps * options.rounds} steps")
    print(row(name, rounds, steps), flush=True)
    if options.profile:
        print("\n" + sides["jaxmodels"].call("profile", min(steps, 10))[0] + "\n", flush=True)
    for side in sides.values():
        side.close()


def steps_of_a_round(sides: list[Process], seconds: float) -> int:
    """Warm both sides up; return the number of steps that take `seconds` on the slower one."""
    steps = 1
    while (slower := max(side.call("run", steps)[1] for side in sides)) < seconds / 4:
        steps *= 2
    return max(1, round(steps * seconds / slower))


HEADER = """\
| a step | jaxmodels, ms | PyTorch, ms | PyTorch / jaxmodels | of processor time | cores busy: jaxmodels | PyTorch |
|---|---|---|---|---|---|---|"""


def row(name: str, rounds: list[dict[str, tuple]], steps: int) -> str:
    """Return a row of the table from (loss, seconds, processor seconds) of each side by round."""

    def milliseconds(side):
        times = [1e3 * each[side][1] / steps for each in rounds]
        middle, low, high = (f"{time:,.0f}" if time >= 100 else f"{time:.3g}" for time in (statistics.median(times), min(times), max(times)))
        return f"{middle} ({low}–{high})"

    def median(function):
        return f"{statistics.median(map(function, rounds)):.2f}"

    ratios = [median(lambda each, i=i: each["PyTorch"][i] / each["jaxmodels"][i]) for i in (1, 2)]
    busy = [median(lambda each, side=side: each[side][2] / each[side][1]) for side in SIDES]
    return "| " + " | ".join([f"`{name}`", *map(milliseconds, SIDES), *ratios, *busy]) + " |"


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(WORKLOADS))
    parser.add_argument("--all", action="store_true", help="all workloads")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a round")
    parser.add_argument("--threads", type=int, default=2, help="processors of each side")
    parser.add_argument("--profile", action="store_true", help="also print the most expensive operations of the jaxmodels step")
    parser.add_argument("--same_malloc", action="store_true", help="give PyTorch the allocator setting of jaxmodels too")
    options = parser.parse_args()
    names = list(WORKLOADS) if options.all else options.names
    if not names or set(names) - set(WORKLOADS):
        parser.error(f"give --all, or names of {', '.join(WORKLOADS)}")
    if len(os.sched_getaffinity(0)) < options.threads:
        parser.error(f"--threads={options.threads}, and this process may use {len(os.sched_getaffinity(0))} processors")
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("jax", "jaxlib", "flax", "torch"))
    print(f"{versions}; {options.threads} threads, {options.rounds} rounds of {options.seconds:g} s\n\n{HEADER}", flush=True)
    for name in names:
        compare(name, options)


if __name__ == "__main__":
    main()
