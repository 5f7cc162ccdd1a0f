"""jaxmodels evaluate."""

import json

from jaxmodels.cli.arguments import add_command, add_machine, add_run, find_processes, join


def add(commands) -> None:
    """Add the command."""
    parser = add_command(commands, "evaluate", run_evaluate, "evaluate a checkpoint of a run on a split of its data")
    add_run(parser)
    parser.add_argument("--split", default="test", help="train, validation or test (default: test)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_machine(parser)


def run_evaluate(options, _):
    """Evaluate, and print the metrics in process 0."""
    from jaxmodels.distributed import session
    from jaxmodels.inference import evaluate
    from jaxmodels.runs.checkpoint import parse_run
    from jaxmodels.runs.folder import RunFolder

    join(options, find_processes(options), lambda: RunFolder(parse_run(options.workdir)[0]).config())
    values = evaluate.evaluate(options.workdir, split=options.split, data_dir=options.data_dir)
    if not session.is_first():
        return
    if options.json:
        print(json.dumps(values))
        return
    print(f"{options.workdir}, {options.split}: " + "  ".join(f"{k} {v:.6g}" for k, v in values.items()))
