"""Train configs with several seeds and print their results as rows of docs/results.md.

    python benchmarks/results.py cnn_digits forecast_linear --seeds=3 --output=results
    python benchmarks/results.py bert_sst2 --also=--config.init_from=runs/bert_mlm_sst2

Finished runs in the output folder are not trained again. Times are of training, without imports and compilation; measure them on an idle machine.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from jaxmodels.data import evaluation_sets

ROOT = Path(__file__).parent.parent
# The reported metric is the first of these that a run has, unless OWN names another.
METRICS = ("f1", "accuracy", "exact_match", "label_error_rate", "mse", "loss")
OWN = {
    "transcribe_digits": "label_error_rate",
    "seq2seq_lstm": "exact_match",
    "seq2seq_transformer": "exact_match",
    "gpt_text": "loss",
    "lstm_text": "loss",
    "moe_text": "loss",
    "gpt_shakespeare": "loss",
    "lstm_shakespeare": "loss",
}


def train(name: str, seed: int, folder: Path, also: list[str]) -> Path:
    """Train a config with a seed, unless the run is finished; return the run folder."""
    spec, _, argument = name.partition(":")
    workdir = folder / f"{name.replace(':', '_')}_{seed}"
    command = [sys.executable, "-m", "jaxmodels", "train", f"--config=configs/{spec}.py" + (f":{argument}" if argument else "")]
    command += [f"--workdir={workdir}", f"--config.seed={seed}", *also]
    if not (workdir / "done").is_file():
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        (workdir / "done").touch()
    return workdir


def read(workdir: Path, name: str) -> tuple[str, float, float]:
    """Return the name of the reported split and metric, its value, and the seconds of training."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    splits = dict.fromkeys(line["split"] for line in lines)
    split = [*evaluation_sets.of(splits, "test"), *evaluation_sets.of(splits, "validation")][0]
    last = [line for line in lines if line["split"] == split][-1]
    metric = OWN.get(name.partition(":")[0]) or next(metric for metric in METRICS if metric in last)
    return f"{split} {metric}", last[metric], [line for line in lines if line["split"] == "train"][-1]["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="CONFIG[:ARG]")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, … (default: 3)")
    parser.add_argument("--output", type=Path, default=Path("runs/results"), help="folder of the runs")
    parser.add_argument("--also", action="append", default=[], help="additional argument of jaxmodels train")
    options = parser.parse_args()
    print("| config | metric | mean | seeds | training |\n|---|---|---|---|---|", flush=True)
    for name in options.names:
        found = [read(train(name, seed, options.output.absolute(), options.also), name) for seed in range(options.seeds)]
        values, seconds = [value for _, value, _ in found], statistics.median(each for _, _, each in found)
        shown = ", ".join(f"{value:.4f}" for value in values)
        print(f"| `{name}` | {found[0][0]} | {statistics.mean(values):.4f} | {shown} | {seconds:.0f} s |", flush=True)


if __name__ == "__main__":
    main()
