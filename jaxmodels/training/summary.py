"""The summary printed at the end of a run."""

import os

from rich.console import Console
from rich.table import Table

from jaxmodels.data.evaluation_sets import SPLITS, of
from jaxmodels.experiment.experiment import Experiment
from jaxmodels.storage.paths import is_bucket
from jaxmodels.training.result import Result
from jaxmodels.training.terminal import format_duration


def print_summary(result: Result, experiment: Experiment, console: Console) -> None:
    """Print a table of final metrics by split, the time, the run folder, and commands for next steps."""
    try:
        _print(result, experiment, console)
    except (OSError, UnicodeError, SystemExit):
        pass  # the output is closed; the run has finished, and its folder contains everything printed here


def _print(result: Result, experiment: Experiment, console: Console) -> None:
    splits = [split for main in SPLITS for split in of(result.metrics, main)]
    names = [name for name in experiment.shown if any(name in result.metrics[split] for split in splits)]
    table = Table("split", *names, title=f"finished: step {result.step} in {format_duration(result.seconds)}", title_justify="left")
    for split in splits:
        table.add_row(split, *(f"{result.metrics[split][name]:.4f}" if name in result.metrics[split] else "" for name in names))
    console.print(table)
    if result.evaluated_step != result.step:
        console.print(f"tested: step {result.evaluated_step}, the best {experiment.best[1]} on {experiment.best[0]}", highlight=False, markup=False)
    if "test" in result.metrics and "accuracy" in result.metrics["test"]:
        console.print(f"test accuracy {result.metrics['test']['accuracy']:.4f}", highlight=False, markup=False, style="bold")
    folder = result.workdir if is_bucket(result.workdir) else os.path.relpath(result.workdir)
    folder = result.workdir if folder.startswith("..") else folder
    console.print(f"run folder: {folder}", highlight=False, markup=False, soft_wrap=True)
    split = [*of(result.metrics, "test"), *of(result.metrics, "validation"), "validation"][0]
    console.print(
        "next:\n"
        f"  jaxmodels evaluate --workdir={folder} --split={split}\n"
        f"  jaxmodels train --config={folder} --workdir={folder}_2 --config.seed=1\n"
        f"  python -c \"import jaxmodels; run = jaxmodels.load('{folder}'); print(run.model)\"",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
