"""Measure the time from the command to the first step: `jaxmodels train`, and a PyTorch script that trains the same CNN.

    python benchmarks/startup.py --data_dir=DIR --repeats=3

Each start is a new process, with an empty compilation cache (cold) and with the one that it wrote (warm). A start ends when the first step has
ended on the device; its seconds, and the processor seconds of the process, are those since the command. The data are scikit-learn's digits and
DIR/tinyshakespeare/input.txt.
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


class FirstStep:
    """A callback of the measured run: prints when the first step has ended, and ends the process."""

    def on_step(self, run, step, metrics):
        import jax

        jax.block_until_ready((run.state, metrics))
        report()


def report() -> None:
    """Print the processor seconds of this process, and end it."""
    print(json.dumps({"ended": time.time(), "processor": time.process_time()}), flush=True)
    os._exit(0)


def torch_cnn() -> None:
    """Take one step of the CNN of configs/cnn_digits.py in PyTorch, on the same data."""
    import torch
    from sklearn.datasets import load_digits
    from torch import nn

    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images[:64].reshape(-1, 1, 8, 8) / 16, dtype=torch.float32), torch.tensor(labels[:64])
    layers = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()
    report()


def start(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Run a command to its first step; return its seconds and processor seconds."""
    begin = time.time()
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=True, capture_output=True, text=True)
    line = json.loads(done.stdout.splitlines()[-1])
    return {"seconds": line["ended"] - begin, "processor": line["processor"]}


def main() -> None:
    """Measure all starts in turn, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", default=os.environ.get("JAXMODELS_DATA_DIR"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--torch", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.torch:
        torch_cnn()
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(options.repeats):
        for config in ("cnn_digits", "gpt_shakespeare"):
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", "jaxmodels", "train", f"--config=configs/{config}.py", f"--data_dir={options.data_dir}"]
                command += ["--config.callbacks=[{'name': 'startup:FirstStep'}]"]
                environment = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}"}
                for cache in ("cold", "warm"):
                    found.setdefault(f"{config}, {cache}", []).append(start([*command, f"--workdir={folder}/{cache}"], environment))
        found.setdefault("PyTorch, the same CNN", []).append(start([sys.executable, __file__, "--torch"], {}))
    for what, times in found.items():
        seconds, processor = (statistics.median(line[name] for line in times) for name in ("seconds", "processor"))
        print(f"{what:24} {seconds:5.1f} s, {processor:5.1f} s of processor time")


if __name__ == "__main__":
    main()
