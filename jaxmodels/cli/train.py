"""jaxmodels train."""

import os
import sys

from jaxmodels.cli.arguments import add_command, add_config, add_guards, add_machine, find_processes, guards, join, keys, load, positive_int


def add(commands) -> None:
    """Add the command."""
    parser = add_command(commands, "train", run_train, "train a config, or resume the run in --workdir")
    add_config(parser)
    parser.add_argument("--workdir", metavar="DIR", help="run folder (default: runs/NAME, with the name of the config file)")
    parser.add_argument("--overwrite", action="store_true", help="delete the run in --workdir and start a new one")
    text = "let a key of the run have another value from now on, beside those that always may change; several with commas or repeated"
    parser.add_argument("--allow_change", action="extend", type=keys, default=[], metavar="KEY,…", help=text)
    text = "go back to the checkpoint of this step; later ones are moved to RUN/set_aside. The same command again goes on from the latest checkpoint"
    parser.add_argument("--from_step", type=positive_int, metavar="STEP", help=text)
    plan = "use a saved plan: load the step that jaxmodels plan --save compiled, or compare the run with the figures of --json"
    parser.add_argument("--plan", metavar="PATH", help=plan)
    parser.add_argument("--dry_run", action="store_true", help="print config, parameters, memory and FLOPs, and exit")
    add_machine(parser)
    add_guards(parser)


def run_train(options, overrides):
    """Train, and print a summary."""
    experiment, console, planned = _prepare(options, overrides)
    if experiment is None:
        return
    from jaxmodels.config import split_spec
    from jaxmodels.distributed import session
    from jaxmodels.training import summary, trainer

    name = os.path.splitext(os.path.basename(split_spec(options.config)[0].rstrip("/")))[0]
    workdir = options.workdir or os.path.join("runs", name)
    going_on = {"overwrite": options.overwrite, "allow_change": options.allow_change, "from_step": options.from_step}
    result = trainer.train(experiment, workdir, **going_on, console=console, stop=guards(options), **planned)
    if session.is_first():
        summary.print_summary(result, experiment, console)


def _prepare(options, overrides):
    """Return the experiment, the console and what a saved plan adds to training; None for the experiment after a dry run."""
    from jaxmodels.distributed import session
    from jaxmodels.errors import Interrupted
    from jaxmodels.training.signals import StopSignals

    processes = None if options.dry_run else find_processes(options)
    try:
        # Signals are handled from here on: the imports and the data take seconds.
        with StopSignals(options.stop_signals) as stop, stop.may_raise():
            from rich.console import Console

            config = join(options, processes, lambda: load(options, overrides))
            from jaxmodels.experiment.build import build_experiment
            from jaxmodels.experiment.dry_run import print_dry_run
            from jaxmodels.training import summary, trainer  # noqa: F401  imported while signals are handled
            from jaxmodels.training.compare import for_training

            with session.first_goes_first("data"):  # process 0 fills the caches for the others
                experiment = build_experiment(config, data_dir=options.data_dir)
            console = Console()
            if options.dry_run:
                print_dry_run(experiment, console if sys.stdout.isatty() else Console(width=200))
                return None, console, {}
            return experiment, console, for_training(options.plan)
    except Interrupted as error:
        raise Interrupted(f"{error}: stopped before training. Run the same command again to start.") from None
