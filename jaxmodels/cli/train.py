"""jaxmodels train."""

import os
import sys

from jaxmodels.cli.arguments import find_processes, join, load


def run_train(options, overrides):
    from jaxmodels.distributed import session
    from jaxmodels.errors import Interrupted
    from jaxmodels.hardware.malloc import keep_freed_memory
    from jaxmodels.training.signals import StopSignals

    keep_freed_memory()
    processes = None if options.dry_run else find_processes(options)
    try:
        # From the first moment on: importing and building take seconds.
        with StopSignals() as stop, stop.may_raise():
            from rich.console import Console

            config = join(options, processes, lambda: load(options, overrides))
            from jaxmodels.config import split_spec
            from jaxmodels.experiment.build import build_experiment
            from jaxmodels.plan.dry_run import print_dry_run
            from jaxmodels.training import summary, trainer

            with session.first_goes_first("data"):  # what it caches, the others find
                experiment = build_experiment(config, data_dir=options.data_dir)
            console = Console()
            if options.dry_run:
                return print_dry_run(experiment, console if sys.stdout.isatty() else Console(width=200))
    except Interrupted as error:
        raise Interrupted(f"{error}: stopped before anything was trained. The same command begins again.") from None
    name = os.path.splitext(os.path.basename(split_spec(options.config)[0].rstrip("/")))[0]
    from jaxmodels.plan.compare import for_training

    workdir = options.workdir or os.path.join("runs", name)
    result = trainer.train(experiment, workdir, overwrite=options.overwrite, console=console, **for_training(options.plan))
    if session.is_first():
        summary.print_summary(result, experiment, console)
    return 0
