"""jaxmodels plan."""

import argparse
import os
import sys

from jaxmodels.cli.arguments import load, seconds


def add_plan(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--topology", required=True, metavar="NAME", help="v5p-128, v6e-256, v5p:4x4x4, 4xv5p-128 (slices), h100x8, 2xh100x8 (nodes)")
    sub.add_argument("--json", metavar="FILE", help="write the figures there")
    sub.add_argument("--hlo", metavar="FILE", help="write the optimized program's text there")
    sub.add_argument("--save", metavar="DIR", help="keep the compiled step there: jaxmodels train --plan=DIR loads it in place of compiling")
    sub.add_argument("--search", action="store_true", help="over meshes, accumulation and rematerialisation; the figures are then those of the best")
    sub.add_argument("--write", metavar="FILE", help="of --search: write the best as a config, for --config")
    sub.add_argument("--budget", type=seconds, metavar="SECONDS", help="of --search: the time it may take (default: 900)")
    sub.add_argument("--data_dir", metavar="DIR", help="where data lies (default: $JAXMODELS_DATA_DIR)")


def run_plan(options, overrides):
    import logging

    from jaxmodels.errors import ConfigError, Interrupted
    from jaxmodels.training.signals import StopSignals

    for name in ("write", "budget"):
        if getattr(options, name) is not None and not options.search:
            raise ConfigError(f"--{name} is of --search: give both, or neither.")
    logging.getLogger("absl").setLevel(logging.ERROR)  # as in configure
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # devices that are here have no part in it
    try:
        with StopSignals() as stop, stop.may_raise():
            from rich.console import Console

            from jaxmodels.experiment.build import build_experiment
            from jaxmodels.plan import plan as plan_lib
            from jaxmodels.plan import show

            files = {"json": options.json, "hlo": options.hlo, "save": options.save}
            console = Console(width=None if sys.stdout.isatty() else 200)
            topology = plan_lib.check(options.topology, files)
            found = stop.run(_search, options, overrides, console) if options.search else None
            if found is not None:
                overrides = overrides | {key: repr(value) for key, value in found.best.changes.items()}
            if found is not None and found.best.plan and not (options.hlo or options.save):
                plan_lib.write_found(found, options.json)  # it is compiled, and all is known
                return
            experiment = build_experiment(load(options, overrides), data_dir=options.data_dir)
            plan = stop.run(plan_lib.plan_and_write, experiment, topology, files, found)
            show.print_plan(plan, console)
    except Interrupted as error:
        raise Interrupted(f"{error}: stopped; there is nothing to save.") from None


def _search(options, overrides, console):
    """What `--search` found, printed and written."""
    from jaxmodels.plan import search, show

    if options.write:
        search.check_output(options.write)
    found = search.search(options.config, overrides, options.topology, budget=options.budget or 900.0, data_dir=options.data_dir)
    show.print_search(found, console)
    if options.write:
        search.write_config(options.write, options.config, overrides, found)
        console.print(f"{options.write} is the best as a config: jaxmodels train --config={options.write}\n", highlight=False, markup=False, soft_wrap=True)
    return found
