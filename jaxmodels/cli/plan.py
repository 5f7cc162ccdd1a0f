"""jaxmodels plan."""

import os
import sys

from jaxmodels.cli.arguments import add_command, add_config, add_data_dir, load, seconds


def add(commands) -> None:
    """Add the command."""
    parser = add_command(commands, "plan", run_plan, "estimate memory, step time and cost on absent hardware, or search for the fastest setting there")
    add_config(parser)
    parser.add_argument("--topology", required=True, metavar="NAME", help="v5p-128, v6e-256, v5p:4x4x4, 4xv5p-128 (slices), h100x8, 2xh100x8 (nodes)")
    parser.add_argument("--json", metavar="FILE", help="write the estimates to FILE")
    parser.add_argument("--hlo", metavar="FILE", help="write the optimized HLO text to FILE")
    parser.add_argument("--save", metavar="DIR", help="save the compiled step in DIR, for jaxmodels train --plan=DIR")
    parser.add_argument("--search", action="store_true", help="search meshes, accumulation and rematerialisation, and report the fastest setting")
    parser.add_argument("--write", metavar="FILE", help="with --search: write the fastest setting as a config file")
    parser.add_argument("--budget", type=seconds, metavar="SECONDS", help="with --search: time limit (default: 900)")
    add_data_dir(parser)


def run_plan(options, overrides):
    """Plan a config on a topology; with `--search`, search for the fastest setting first."""
    import logging

    from jaxmodels.errors import ConfigError, Interrupted
    from jaxmodels.training.signals import StopSignals

    for name in ("write", "budget"):
        if getattr(options, name) is not None and not options.search:
            raise ConfigError(f"--{name} needs --search.")
    logging.getLogger("absl").setLevel(logging.ERROR)  # as in configure
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the local devices are not used
    try:
        with StopSignals() as stop, stop.may_raise():
            from rich.console import Console

            from jaxmodels.cli import plan_files, plan_output
            from jaxmodels.experiment.build import build_experiment

            files = {"json": options.json, "hlo": options.hlo, "save": options.save}
            console = Console(width=None if sys.stdout.isatty() else 200)
            topology = plan_files.check(options.topology, files)
            found = stop.run(_search, options, overrides, console) if options.search else None
            if found is not None:
                overrides = overrides | {key: repr(value) for key, value in found.best.changes.items()}
            if found is not None and found.best.plan and not (options.hlo or options.save):
                plan_files.write_found(found, options.json)  # the search has compiled it: nothing is left to compute
                return
            experiment = build_experiment(load(options, overrides), data_dir=options.data_dir)
            plan = stop.run(plan_files.plan_and_write, experiment, topology, files, found)
            plan_output.print_plan(plan, console)
    except Interrupted as error:
        raise Interrupted(f"{error}: stopped; there is nothing to save.") from None


def _search(options, overrides, console):
    """Run the search, print its result, and write the best setting with `--write`."""
    from jaxmodels.cli import plan_files, plan_output
    from jaxmodels.plan import search

    if options.write:
        plan_files.check_output(options.write)
    found = search.search(options.config, overrides, options.topology, budget=options.budget or 900.0, data_dir=options.data_dir)
    plan_output.print_search(found, console)
    if options.write:
        plan_files.write_config(options.write, options.config, overrides, found)
        console.print(f"wrote the best setting to {options.write}: jaxmodels train --config={options.write}\n", highlight=False, markup=False, soft_wrap=True)
    return found
