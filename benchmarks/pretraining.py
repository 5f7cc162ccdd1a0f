"""Compare fine-tuning with training from scratch: the same steps on the same examples, with several seeds.

    python benchmarks/pretraining.py bert_classify
    python benchmarks/pretraining.py bert_sst2 --data_dir=DIR

Trains the parent, `runs/PARENT`. Then trains, for each seed, `configs/NAME.py`, which starts from it, and `configs/NAME.py:scratch`, which does not, in
`runs/NAME-START-SEED` below the working directory. Finished runs are not repeated. Prints the test accuracy of each at the step with the best validation
score, and the means. The seed determines the new parameters, dropout and the order of examples; all seeds share one parent and one training set.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PARENTS = {"bert_classify": "bert_text", "bert_sst2": "bert_mlm_sst2"}
STARTS = {"fine-tuned": "", "scratch": ":scratch"}


def train(config: str, run: str, *options: str) -> float | None:
    """Train or resume a run, or do nothing if it is finished; return the test accuracy if there is one."""
    command = [sys.executable, "-m", "jaxmodels", "train", f"--config={ROOT}/configs/{config}", f"--workdir={run}", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}")
    lines = [json.loads(line) for line in open(Path(run) / "metrics.jsonl")]
    print(f"{run}: {' '.join(f'{k} {v:.4f}' for k, v in lines[-1].items() if isinstance(v, float))}", flush=True)
    return next((line["accuracy"] for line in reversed(lines) if line["split"] == "test"), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=PARENTS)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0 on")
    parser.add_argument("--data_dir", help="folder of the data sets")
    arguments = parser.parse_args()
    data = [f"--data_dir={arguments.data_dir}"] if arguments.data_dir else []
    parent = PARENTS[arguments.name]
    train(f"{parent}.py", f"runs/{parent}", *data)
    found = {start: [] for start in STARTS}
    for seed in range(arguments.seeds):
        for start, argument in STARTS.items():
            run = f"runs/{arguments.name}-{start}-{seed}"
            found[start].append(train(f"{arguments.name}.py{argument}", run, f"--config.seed={seed}", *data))
    print("test accuracy " + "".join(f"{'seed ' + str(seed):>9}" for seed in range(arguments.seeds)) + "     mean")
    for start, values in found.items():
        print(f"{start:<14}" + "".join(f"{value:9.4f}" for value in [*values, statistics.mean(values)]))
    differences = [a - b for a, b in zip(*found.values(), strict=True)]
    print(f"{'difference':<14}" + "".join(f"{value:+9.4f}" for value in [*differences, statistics.mean(differences)]))


if __name__ == "__main__":
    main()
